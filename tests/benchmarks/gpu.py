"""Environment steps a second (SPS) of the scripts with a GPU and without.

    python tests/benchmarks/gpu.py

One run after the other, each in a process of its own; the first fifth of the iterations, where
libraries warm up and compile, is left out. Results: results/gpu.csv, a row a run, and gpu.md.
"""

import argparse
import statistics

import torch
from speed import ours
from tables import RESULTS, ROOT, grouped, markdown, measured, read, write

BREAKOUT = ("ppo_atari.py", "BreakoutNoFrameskip-v4", 30_720)
CHEETAH = ("ppo_continuous.py", "HalfCheetah-v5", 32_768)
RUNS = [
    (*BREAKOUT, "--cuda"),
    (*BREAKOUT, "--cuda --bf16"),
    (*BREAKOUT, "--cuda --bf16 --compile"),
    (*BREAKOUT, "--cuda --compile"),
    (*BREAKOUT, "--cuda --update-epochs 1"),
    (*CHEETAH, "--cuda"),
    (*CHEETAH, "--no-cuda"),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    path, card = RESULTS / "gpu.csv", torch.cuda.get_device_name()
    for _ in range(options.repeats):
        for script, env_id, steps, flags in RUNS:
            words = ["--env-id", env_id, "--total-timesteps", str(steps), "--torch-threads", "1"]
            row = {"script": script, "env_id": env_id, "flags": flags, "gpu": card}
            row["SPS"] = f"{ours(ROOT / script, words + flags.split(), 1):.0f}"
            row["measured"] = measured()
            print(*row.values(), sep=", ", flush=True)
            rows = [*read(path), row]
            write(path, rows)
            table, keys = [], ("script", "env_id", "flags", "gpu", "measured")
            for key, same in grouped(rows, *keys).items():
                each = [float(row["SPS"]) for row in same]
                table.append([*key[:4], f"{statistics.median(each):,.0f}", str(len(each)), key[4]])
            header = ["script", "environment", "flags", "GPU", "SPS, median", "runs", "measured"]
            path.with_suffix(".md").write_text(f"# Speed with a GPU\n\n{markdown(header, table)}")


if __name__ == "__main__":
    main()
