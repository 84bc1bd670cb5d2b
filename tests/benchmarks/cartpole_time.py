"""How long `python ppo.py` takes, from process start, to solve CartPole-v1 with its defaults.

    python tests/benchmarks/cartpole_time.py --seeds 10

Solved: the mean return of the last 100 training episodes reaches 475. One process at a time.
Results: tests/benchmarks/cartpole.md and cartpole.csv.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from sweep import HERE, ROOT, markdown, measured, write_csv

GOAL = 475


def train(seed: int, flags: list[str]) -> dict[str, float]:
    """One run: seconds and steps until the goal (infinite where it is missed), and its scores."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder, "run")
        command = [sys.executable, "ppo.py", "--seed", str(seed), "--run-dir", str(run_dir), *flags]
        start = time.time()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        process.stdout.readline()  # printed as the run's own clock, in episodes.csv, has begun
        startup = time.time() - start
        process.communicate()
        total = time.time() - start
        if process.returncode:
            raise RuntimeError(f"seed {seed}: exit code {process.returncode}")
        summary = json.loads((run_dir / "summary.json").read_text())
        episodes = np.loadtxt(run_dir / "episodes.csv", delimiter=",", skiprows=1)
    steps, returns, _, clock = episodes.T
    means = np.convolve(returns, np.full(100, 0.01), mode="valid")  # [i]: episodes i to i + 99
    solved = np.flatnonzero(means >= GOAL - 1e-9)
    at = solved[0] + 99 if len(solved) else None
    return {
        "seed": seed,
        "seconds": math.inf if at is None else startup + clock[at],
        "steps": math.inf if at is None else steps[at],
        "startup": startup,
        "total": total,
        "train": summary["train_return_last100"],
        "eval": summary["eval_return_mean"],
    }


def cells(run: dict[str, float]) -> list[str]:
    names = ("seconds", "steps", "startup", "total", "train", "eval")
    texts = (f"{run[name]:,.{0 if name == 'steps' else 1}f}" for name in names)
    return [text.replace("inf", "not reached") for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10, help="seeds 1 to this")
    parser.add_argument(
        "--flags", nargs=argparse.REMAINDER, default=[], help="last: flags for ppo.py"
    )
    options = parser.parse_args()
    runs = []
    for seed in range(1, options.seeds + 1):
        runs.append(train(seed, options.flags))
        print(", ".join(f"{name} {value:.5g}" for name, value in runs[-1].items()), flush=True)

    rows = [[f"{run['seed']}", *cells(run)] for run in runs]
    names = list(runs[0])[1:]
    median = {name: statistics.median(run[name] for run in runs) for name in names}
    best = {"train", "eval"}  # the more the better
    worst = {name: (min if name in best else max)(run[name] for run in runs) for name in names}
    rows += [["median", *cells(median)], ["worst", *cells(worst)]]
    header = ["seed", f"seconds to {GOAL}", f"steps to {GOAL}", "of it start-up, s"]
    header += ["whole run, s", "training, last 100", "evaluation"]
    comment = (
        measured("torch", "gymnasium", "numpy") + f"; ppo.py {' '.join(options.flags)}".rstrip()
    )
    text = (
        f"# CartPole-v1, defaults\n\n`python tests/benchmarks/cartpole_time.py`. {comment}.\n\n"
        f"Seconds from process start, and steps, until the mean return of the last 100 training "
        f"episodes reaches {GOAL}; one process at a time. Whole run: with the deterministic "
        "evaluation, whose mean return stands last.\n\n"
    )
    (HERE / "cartpole.md").write_text(text + markdown(header, rows))
    write_csv(
        HERE / "cartpole.csv",
        list(runs[0]),
        [[f"{x:.6g}" for x in run.values()] for run in runs],
        comment,
    )
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
