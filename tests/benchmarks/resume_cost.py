"""What resuming costs: process start to the end of the first iteration, resumed against fresh.

    python tests/benchmarks/resume_cost.py --pairs 7

A run of three iterations is resumed and a new one is started with the same flags, in turn, each in
a process of its own that is killed when it has written the checkpoint after its first iteration.
Results: tests/benchmarks/resume_cost.csv, a row a pair, and resume_cost.md.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sweep import HERE, ROOT, markdown, measured, write_csv

TARGET = 1.0  # seconds more, at most
FLAGS = {  # and the rows of a batch
    "ppo.py": ("--env-id CartPole-v1", 256),
    "ppo_continuous.py": ("--env-id HalfCheetah-v5", 2048),
    "ppo_atari.py": ("--env-id ALE/Breakout-v5 --num-steps 16 --update-epochs 1", 128),
}


def first_iteration(words: list[str], checkpoint: Path) -> tuple[float, float]:
    """Seconds until a new checkpoint stands there, and the process's CPU seconds until then."""
    old = checkpoint.stat().st_ino if checkpoint.exists() else None
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=checkpoint.parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    while not checkpoint.exists() or checkpoint.stat().st_ino == old:
        if process.poll() is not None:
            raise RuntimeError(f"{words}: exit code {process.returncode}")
        time.sleep(0.001)
    seconds = time.perf_counter() - start
    process.kill()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return seconds, used.ru_utime + used.ru_stime


def pair(script: str, folder: Path, number: int) -> list[float]:
    """Seconds of a fresh and of a resumed run, then CPU seconds of both."""
    flags, batch = FLAGS[script]
    long = ["--total-timesteps", str(100 * batch)]
    fresh, resumed = folder / "fresh", folder / "resumed"
    commands = {
        fresh: [script, *flags.split(), *long, "--run-dir", str(fresh)],
        resumed: [script, "--resume", str(resumed), *long],
    }
    shutil.copytree(folder / f"saved-{script}", resumed)
    order = list(commands)[:: 1 if number % 2 else -1]  # neither is always the first
    times = {key: first_iteration(commands[key], key / "checkpoint.pt") for key in order}
    for key in commands:
        shutil.rmtree(key)
    return [times[key][i] for i in (0, 1) for key in (fresh, resumed)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7, help="of each script")
    options = parser.parse_args()
    rows: list[list] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for script, (flags, batch) in FLAGS.items():
            shutil.copy(ROOT / script, folder)
            words = [script, *flags.split(), "--total-timesteps", str(3 * batch)]
            words += ["--eval-episodes", "0", "--run-dir", f"saved-{script}"]
            command = [sys.executable, *words]
            subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=True)
            for number in range(1, options.pairs + 1):
                rows.append([script, number, *pair(script, folder, number)])
                print(*rows[-1], flush=True)
    load = os.getloadavg()[2] / (os.cpu_count() or 1)
    comment = measured("torch", "gymnasium") + f"; {load:.1f} busy programs a core meanwhile"
    header = ["script", "pair", "fresh_s", "resumed_s", "fresh_cpu_s", "resumed_cpu_s"]
    digits = [[*row[:2], *(f"{x:.3f}" for x in row[2:])] for row in rows]
    write_csv(HERE / "resume_cost.csv", header, digits, comment)
    cells = []
    for script in FLAGS:
        own = [row[2:] for row in rows if row[0] == script]
        medians = [f"{statistics.median(column):.2f}" for column in zip(*own, strict=True)]
        more = [statistics.median(row[i + 1] - row[i] for row in own) for i in (0, 2)]
        each = " ".join(f"{row[1] - row[0]:+.2f}" for row in own)
        cells.append([f"`{script}`", len(own), *medians[:2], f"**{more[0]:+.2f}**", TARGET, each])
        cells[-1] += [*medians[2:], f"{more[1]:+.2f}"]
    header = ["script", "pairs", "fresh, s", "resumed, s", "median difference, s", "at most"]
    header += ["difference of each pair, s", "fresh, CPU s", "resumed, CPU s", "difference, CPU s"]
    text = (
        f"# resume cost\n\n`python tests/benchmarks/resume_cost.py --pairs {options.pairs}`. "
        f"{comment}.\n\nFrom process start to the end of the first iteration, its checkpoint "
        "included: a run resumed after three iterations against a fresh one with the same flags, "
        "in turn. Medians over the pairs. CPU seconds are what the process itself used, which "
        "other programs on the machine hardly change.\n\n"
    )
    text += markdown(header, cells) + "\n"
    text += "".join(f"- `{script} {flags}`\n" for script, (flags, _) in FLAGS.items())
    (HERE / "resume_cost.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
