"""How long `python ppo.py` takes, from process start, to solve CartPole-v1 with its defaults.

    python tests/benchmarks/cartpole_time.py --seeds 10
    python tests/benchmarks/cartpole_time.py --seeds 10 --against OTHER/ppo.py

Solved: the mean return of the last 100 training episodes reaches 475, to the end of an iteration.
One process at a time; with --against, another copy of the script in turn, seed by seed. Results:
results/cartpole_time.csv and .md; with --against or flags, runs/trials/cartpole_time.csv and .md.
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

from tables import RESULTS, ROOT, RUNS, Row, grouped, markdown, measured, read, write

GOAL = 475
COLUMNS = {
    "seconds": f"seconds to {GOAL}",
    "steps": f"steps to {GOAL}",
    "startup": "of it start-up, s",
    "total": "whole run, s",
    "train": "training, last 100",
    "eval": "evaluation",
}


def train(script: Path, seed: int, flags: list[str]) -> Row:
    """One run: seconds and steps until the goal (infinite where it is missed), and its scores."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder, "run")
        command = [sys.executable, str(script), "--seed", str(seed), "--run-dir", str(run_dir)]
        start = time.monotonic()
        process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True)
        process.stdout.readline()  # printed as the run's own clock has begun
        startup = time.monotonic() - start
        process.communicate()
        total = time.monotonic() - start
        if process.returncode:
            raise RuntimeError(f"seed {seed}: exit code {process.returncode}")
        summary = json.loads((run_dir / "summary.json").read_text())
        metrics, episodes = read(run_dir / "metrics.csv"), read(run_dir / "episodes.csv")
    hundredth = float(episodes[99]["global_step"]) if len(episodes) > 99 else math.inf
    seconds = steps = math.inf
    for row in metrics:
        step, mean = float(row["global_step"]), float(row["charts/episodic_return"])
        if step >= hundredth and mean >= GOAL:
            seconds, steps = startup + float(row["wall_time"]), step
            break
    values = (seconds, steps, startup, total, summary["train_return_last100"])
    values += (summary["eval_return_mean"],)
    texts = [f"{value:.6g}" for value in values]
    return {"script": str(script), "seed": str(seed)} | dict(zip(COLUMNS, texts, strict=True))


def line(*texts: str, values: dict[str, float]) -> list[str]:
    numbers = [f"{value:,.{0 if name == 'steps' else 1}f}" for name, value in values.items()]
    return [*texts, *(number.replace("inf", "not reached") for number in numbers)]


def report(rows: list[Row], flags: str) -> str:
    text = (
        f"# CartPole-v1, defaults\n\n`python tests/benchmarks/cartpole_time.py{flags}`. "
        f"{measured()}.\n\nSeconds from process start, and steps, until the mean return of the "
        f"last 100 training episodes reaches {GOAL}; one process at a time. Whole run: with the "
        "deterministic evaluation, whose mean return stands last.\n"
    )
    for (script,), runs in grouped(rows, "script").items():
        table = [
            line(run["seed"], values={name: float(run[name]) for name in COLUMNS}) for run in runs
        ]
        columns = {name: [float(run[name]) for run in runs] for name in COLUMNS}
        best = ("train", "eval")  # the more the better
        worst = {name: (min if name in best else max)(x) for name, x in columns.items()}
        medians = {name: statistics.median(x) for name, x in columns.items()}
        table += [line("median", values=medians), line("worst", values=worst)]
        text += f"\n`{script}`:\n\n" + markdown(["seed", *COLUMNS.values()], table)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=int, default=10, help="seeds 1 to this")
    add("--against", type=Path, help="another copy of the script")
    add("--flags", nargs=argparse.REMAINDER, default=[], help="last: flags for the script")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        ours = Path(folder, "ppo.py")
        ours.write_bytes((ROOT / "ppo.py").read_bytes())  # edits made meanwhile do not reach it
        for seed in range(1, options.seeds + 1):
            for script in (ours, options.against) if options.against else (ours,):
                row = train(script, seed, options.flags)
                rows.append(row | {"script": "ppo.py" if script == ours else str(script)})
                print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    trial = options.against or options.flags
    path = (RUNS / "trials" if trial else RESULTS) / "cartpole_time.csv"
    write(path, rows)
    text = report(rows, f" --flags {' '.join(options.flags)}" if options.flags else "")
    path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
