"""Train each classic bug of tests/bugs, and see which logged metric betrays it.

    python tests/benchmarks/bugs.py --seeds 1-5

On CartPole-v1 and on Hopper-v5, with FLAGS, beside the scripts as they are and with the same seeds;
a bug is trained wherever its patch applies. A metric betrays a bug from the iteration on at which,
for ten iterations, the median over the bug's seeds lies outside the range of the right runs,
widened by its width on each side. Results: results/bugs.csv, a row a run, bugs.md and
figures/bugs.png.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from figures import panels, save
from sweep import fingerprint
from tables import HERE, RESULTS, ROOT, RUNS, Row, grouped, markdown, measured, number, write

HOME = RUNS / "bugs"
BUGS = sorted((ROOT / "tests/bugs").glob("*.patch"))
RIGHT = "none"
SCRIPTS = {"CartPole-v1": "ppo.py", "Hopper-v5": "ppo_continuous.py"}
FLAGS = {
    "CartPole-v1": "--total-timesteps 100000 --num-steps 32 --num-minibatches 4 --gamma 0.98 "
    "--gae-lambda 0.8 --norm-obs --norm-reward --target-kl None",
    "Hopper-v5": "--total-timesteps 150000",
}
COMMON = "--eval-episodes 20 --no-cuda --torch-threads 1"
METRICS = ("approx_kl", "old_approx_kl", "clipfrac", "entropy", "explained_variance", "grad_norm")
METRICS += ("policy_loss", "value_loss")


def with_bug(env_id: str, bug: str, folder: Path) -> bool:
    """Copy the environment's script into the folder, with the bug; False where it does not fit."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    script = shutil.copy(ROOT / SCRIPTS[env_id], folder)
    if bug == RIGHT:
        return True
    text = (ROOT / f"tests/bugs/{bug}.patch").read_bytes()
    command = ["patch", "-s", "--no-backup-if-mismatch", "-r", "-", script]
    return subprocess.run(command, input=text, stdout=subprocess.DEVNULL).returncode == 0


def train(job: tuple[str, str, int]) -> Row | None:
    """A run of the script with the bug, unless it is there already."""
    env_id, bug, seed = job
    mark = fingerprint((ROOT / SCRIPTS[env_id]).read_text())
    folder = HOME / mark / env_id / bug / str(seed)
    if not (folder / "run/summary.json").exists():
        if not with_bug(env_id, bug, folder):
            return None
        command = [sys.executable, SCRIPTS[env_id], "--env-id", env_id, "--seed", str(seed)]
        command += [*FLAGS[env_id].split(), *COMMON.split(), "--run-dir", "run"]
        with open(folder / "output", "w") as file:
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, cwd=folder, stdout=file, stderr=file, env=env)
    row = {"script": SCRIPTS[env_id], "env_id": env_id, "bug": bug, "fingerprint": mark}
    row |= {"seed": str(seed), "train_return_last100": "", "eval_return_mean": "", "failed": ""}
    if (folder / "run/summary.json").exists():
        summary = json.loads((folder / "run/summary.json").read_text())
        row |= {name: str(summary[name]) for name in row.keys() & summary.keys()}
    else:
        row["failed"] = (folder / "output").read_text().splitlines()[-1]
    print(", ".join(row.values()), flush=True)
    return row


def curves(row: Row) -> dict[str, np.ndarray]:
    folder = HOME / row["fingerprint"] / row["env_id"] / row["bug"] / row["seed"]
    with open(folder / "run/metrics.csv") as file:
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


def scores(members: list[Row]) -> list[float]:
    return sorted(float(row["eval_return_mean"]) for row in members if not row["failed"])


def report(groups: dict[tuple[str, str], list[Row]]) -> str:
    table = []
    for bug in (RIGHT, *(path.stem for path in BUGS)):
        cells = [bug]
        for env_id in SCRIPTS:
            members = groups.get((env_id, bug), [])
            values, failed = scores(members), {row["failed"].split(":")[0] for row in members}
            text = ", ".join(failed) or "-"
            if values:
                text = f"{number(float(np.median(values)))} "
                text += f"({number(values[0])} to {number(values[-1])})"
            metrics = ", ".join(failed - {""})
            if bug != RIGHT and values and len(values) == len(members):
                metrics = betrayal(members, groups[env_id, RIGHT])
            cells += [text, metrics]
        table.append(cells)
    seeds = len(groups["CartPole-v1", RIGHT])
    header = ["bug"]
    for env_id in SCRIPTS:
        header += [env_id, "betrayed by (from iteration)"]
    lines = [f"{env_id}: `{SCRIPTS[env_id]} {FLAGS[env_id]}`." for env_id in SCRIPTS]
    return (
        f"# Bugs\n\n{measured('mujoco')}. `python tests/benchmarks/bugs.py`. Evaluation of 20 "
        f"episodes: median of {seeds} seeds (lowest to highest). {' '.join(lines)}\n\n"
    ) + markdown(header, table)


def draw(groups: dict[tuple[str, str], list[Row]]) -> None:
    """A dot a seed, a line at the right script's median; worst on CartPole on top."""

    def place(bug: str) -> tuple[bool, float]:
        rows = groups.get(("CartPole-v1", bug)) or groups["Hopper-v5", bug]
        return bug == RIGHT, -float(np.median(scores(rows) or [0]))

    names = sorted({bug for _, bug in groups}, key=place)
    figure, axes = panels(1, 2, 4.5, 6.1)
    for axis, env_id in zip(axes.flat, SCRIPTS, strict=True):
        axis.axvline(np.median(scores(groups[env_id, RIGHT])), color="tab:green", linewidth=1)
        for y, bug in enumerate(names):
            values = scores(groups.get((env_id, bug), []))
            color = "tab:green" if bug == RIGHT else "tab:red"
            axis.plot(values, [y] * len(values), "o", color=color, markersize=5, alpha=0.6)
        axis.set_title(env_id, fontsize=10)
        axis.set_xlabel("evaluation, one dot a seed", fontsize=9)
        axis.set_yticks(range(len(names)), names if axis is axes[0, 0] else [])
        axis.set_ylim(-1, len(names))
    save(figure, HERE / "figures/bugs.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="1-5")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    first, last = (int(x) for x in args.seeds.split("-"))
    jobs = [
        (env_id, bug, seed)
        for seed in range(first, last + 1)
        for env_id in SCRIPTS
        for bug in (RIGHT, *(path.stem for path in BUGS))
    ]
    with ThreadPoolExecutor(args.processes) as pool:
        rows = [row for row in pool.map(train, jobs) if row]
    groups = grouped(sorted(rows, key=lambda row: row["env_id"]), "env_id", "bug")
    write(RESULTS / "bugs.csv", [row for members in groups.values() for row in members])
    (RESULTS / "bugs.md").write_text(report(groups))
    draw(groups)


if __name__ == "__main__":
    main()
