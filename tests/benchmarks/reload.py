"""Whether a saved agent plays as the trained one did: --evaluate against the run's own evaluation.

    python tests/benchmarks/reload.py --seeds 3

Each script trains shortly and evaluates. Then two new processes evaluate with the run's seed: one
the run folder, one its checkpoint.pt alone, copied to an empty folder. Mean and standard deviation
must be those of summary.json to the last digit, and the two lists of returns equal.
Results: tests/benchmarks/reload.csv, a row a run, and reload.md.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sweep import HERE, ROOT, markdown, measured, write_csv

FLAGS = {
    "ppo.py": "--env-id CartPole-v1 --total-timesteps 10240 --norm-obs",
    "ppo_continuous.py": "--env-id Hopper-v5 --total-timesteps 8192",
    "ppo_atari.py": "--env-id ALE/Breakout-v5 --total-timesteps 1280 --num-envs 4 --num-steps 32 "
    "--update-epochs 1 --eval-episodes 4",
}
SCORES = ("eval_return_mean", "eval_return_std", "eval_episodes")


def run(*words: str, folder: Path) -> None:
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    subprocess.run(command, cwd=folder, env=environ, stdout=subprocess.DEVNULL, check=True)


def compare(script: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train once, evaluate twice."""
    trained, alone = folder / f"{script}-{seed}", folder / f"{script}-{seed}-alone"
    flags = [*FLAGS[script].split(), "--seed", str(seed), "--run-dir", str(trained)]
    run(script, *flags, folder=folder)
    alone.mkdir()
    shutil.copy(trained / "checkpoint.pt", alone)
    run(script, "--evaluate", str(trained), folder=folder)
    run(script, "--evaluate", str(alone / "checkpoint.pt"), folder=folder)
    summary = json.loads((trained / "summary.json").read_text())
    first, second = (json.loads((x / "evaluation.json").read_text()) for x in (trained, alone))
    same = [all(summary[name] == x[name] for name in SCORES) for x in (first, second)]
    row = {"script": script, "seed": seed, "episodes": summary["eval_episodes"]}
    for kind, scores in (("run", summary), ("first", first), ("second", second)):
        row |= {f"{kind}_{name}": scores[name] for name in SCORES[:2]}
    row |= {"first_same": same[0], "second_same": same[1], "returns_same": first == second}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each script")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for script in FLAGS:
            shutil.copy(ROOT / script, name)  # edits made meanwhile do not reach later runs
        for script in FLAGS:
            for seed in range(1, options.seeds + 1):
                rows.append(compare(script, seed, Path(name)))
                print(*rows[-1].values(), flush=True)
    comment = measured("torch", "gymnasium", "numpy", "mujoco", "ale-py")
    write_csv(HERE / "reload.csv", list(rows[0]), [list(row.values()) for row in rows], comment)
    words = {True: "identical", False: "**different**"}
    cells = [
        [
            f"`{row['script']}`",
            row["seed"],
            row["episodes"],
            f"{row['run_eval_return_mean']!r} ± {row['run_eval_return_std']!r}",
            *(words[row[name]] for name in ("first_same", "second_same", "returns_same")),
        ]
        for row in rows
    ]
    header = ["script", "seed", "episodes", "evaluation after training (`summary.json`)"]
    header += ["`--evaluate` of the folder", "of `checkpoint.pt` alone", "each return in both"]
    whole = sum(row["first_same"] and row["second_same"] and row["returns_same"] for row in rows)
    text = (
        f"# reload\n\n`python tests/benchmarks/reload.py --seeds {options.seeds}`. {comment}.\n\n"
        f"**{whole} of {len(rows)}** saved agents play as they did right after training. Each run "
        "is evaluated by two more processes with its seed, from the run folder and from a copy of "
        "`checkpoint.pt` alone; mean and standard deviation are compared with `summary.json` to "
        "the last digit, and the returns and lengths of all episodes between the two.\n\n"
    )
    text += markdown(header, cells) + "\n"
    text += "".join(f"- `{script} {flags}`\n" for script, flags in FLAGS.items())
    (HERE / "reload.md").write_text(text)
    print(text)
    sys.exit(whole != len(rows))


if __name__ == "__main__":
    main()
