"""Train each classic bug of tests/bugs, and see which logged metric betrays it.

    python tests/benchmarks/bugs.py --seeds 1-5

CartPole-v1 with FLAGS (InvertedPendulum-v5 for those of ppo_continuous.py), beside the scripts as
they are, with the same seeds. A metric betrays a bug from the iteration on at which, for ten
iterations, the median over the bug's seeds lies outside the range of the right runs, widened by its
width on each side. Results: results/bugs.csv, a row a run, and bugs.md.
"""

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from sweep import fingerprint
from tables import RESULTS, ROOT, RUNS, Row, grouped, markdown, measured, number, write

HOME = RUNS / "bugs"
BUGS = sorted((ROOT / "tests/bugs").glob("*.patch"))
RIGHT = "none"
ENVS = {"ppo.py": "CartPole-v1", "ppo_continuous.py": "InvertedPendulum-v5"}
FLAGS = {
    "ppo.py": "--total-timesteps 100000 --num-minibatches 4 --norm-obs --norm-reward "
    "--target-kl None",
    "ppo_continuous.py": "--total-timesteps 100000 --num-envs 16 --num-minibatches 8",
}
COMMON = "--eval-episodes 20 --no-cuda --torch-threads 1"
METRICS = ("approx_kl", "old_approx_kl", "clipfrac", "entropy", "explained_variance", "grad_norm")
METRICS += ("policy_loss", "value_loss")


def train(job: tuple[str, str, str, int]) -> Row:
    """A run of the script with the bug, unless it is there already."""
    script, bug, mark, seed = job
    folder = HOME / mark / bug / str(seed)
    if not (folder / "run/summary.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        shutil.copy(ROOT / script, folder)
        if bug != RIGHT:
            patch = ROOT / f"tests/bugs/{bug}.patch"
            subprocess.run(["git", "apply", patch], cwd=folder, check=True)
        command = [sys.executable, script, "--env-id", ENVS[script], "--seed", str(seed)]
        command += [*FLAGS[script].split(), *COMMON.split(), "--run-dir", "run"]
        with open(folder / "output", "w") as file:
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, cwd=folder, stdout=file, stderr=file, env=env)
    row = {"script": script, "bug": bug, "fingerprint": mark, "seed": str(seed)}
    row |= {"train_return_last100": "", "eval_return_mean": "", "failed": ""}
    if (folder / "run/summary.json").exists():
        summary = json.loads((folder / "run/summary.json").read_text())
        row |= {name: str(summary[name]) for name in row.keys() & summary.keys()}
    else:
        row["failed"] = (folder / "output").read_text().splitlines()[-1]
    print(", ".join(row.values()), flush=True)
    return row


def curves(row: Row) -> dict[str, np.ndarray]:
    path = HOME / row["fingerprint"] / row["bug"] / row["seed"] / "run/metrics.csv"
    with open(path) as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(x[f"losses/{name}"]) for x in rows]) for name in METRICS}


def betrayal(wrong: list[Row], right: list[Row]) -> str:
    """The metrics that leave the right runs' range, the first one first."""
    ours, theirs = [curves(row) for row in wrong], [curves(row) for row in right]
    found = []
    for name in METRICS:
        length = min(len(x[name]) for x in [*ours, *theirs])
        median = np.median([x[name][:length] for x in ours], axis=0)
        good = np.array([x[name][:length] for x in theirs])
        low, high = good.min(axis=0), good.max(axis=0)
        outside = (median < low - (high - low)) | (median > high + (high - low))
        runs = np.convolve(outside, np.ones(10), "valid") == 10
        if runs.any():
            found.append((int(runs.argmax()), name))
    return ", ".join(f"{name} ({start})" for start, name in sorted(found)[:3]) or "none of them"


def report(rows: list[Row]) -> str:
    right = {
        script: [x for x in rows if x["bug"] == RIGHT and x["script"] == script] for script in ENVS
    }
    table = []
    for (script, bug), members in grouped(rows, "script", "bug").items():
        scores = [float(row["eval_return_mean"]) for row in members if not row["failed"]]
        failed = members[0]["failed"].split(":")[0] if len(scores) < len(members) else ""
        worst = f"{number(min(scores))} to {number(max(scores))}" if scores else ""
        median = number(float(np.median(scores))) if scores else "-"
        metrics = "" if bug == RIGHT else failed or betrayal(members, right[script])
        table.append([bug, ENVS[script], median, worst, metrics])
    header = ["bug", "environment", "evaluation, median", "all seeds"]
    header += ["metrics that betray it (from which iteration on)"]
    lines = [f"`{script}`: `{FLAGS[script]}`." for script in ENVS]
    return (
        f"# Bugs\n\n{measured()}. `python tests/benchmarks/bugs.py`, {len(right['ppo.py'])} seeds, "
        f"evaluation of 20 episodes. {' '.join(lines)}\n\n"
    ) + markdown(header, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="1-5")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    first, last = (int(x) for x in args.seeds.split("-"))
    jobs = []
    for script in ENVS:
        bugs = [x for x in BUGS if re.search(rf"^--- a/{script}$", x.read_text(), re.MULTILINE)]
        for bug in (RIGHT, *(path.stem for path in bugs)):
            mark = fingerprint((ROOT / script).read_text())
            jobs += [(script, bug, mark, seed) for seed in range(first, last + 1)]
    with ThreadPoolExecutor(args.processes) as pool:
        rows = list(pool.map(train, jobs))
    write(RESULTS / "bugs.csv", rows)
    (RESULTS / "bugs.md").write_text(report(rows))


if __name__ == "__main__":
    main()
