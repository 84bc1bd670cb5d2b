"""Kill runs with SIGKILL at random moments, resume them, and check every file that they leave.

    python tests/benchmarks/kills.py --kills 100 --processes 2

Each kill has a short run of its own. It falls at a random step of the training and up to half a
second later; every fourth waits from there until a checkpoint is being written, and then strikes
within a millisecond. `--resume` runs to the end. Results: results/kills.csv, a row a kill, and
kills.md; of fewer than 100 kills, in runs/trials. Runs that fail a check stay in runs/kills.
"""

import argparse
import csv
import json
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tables import RESULTS, ROOT, RUNS, grouped, markdown, measured, write

HOME = RUNS / "kills"
FLAGS = {
    "ppo.py": "--env-id CartPole-v1 --total-timesteps 81920",
    "ppo_continuous.py": "--env-id InvertedPendulum-v5 --total-timesteps 40960 --num-envs 8 "
    "--num-minibatches 4 --update-epochs 4",
    "ppo_atari.py": "--env-id BreakoutNoFrameskip-v4 --total-timesteps 2560 --num-envs 4 "
    "--num-steps 32 --update-epochs 1",
}
COMMON = "--eval-episodes 2 --no-cuda --torch-threads 1"
ORDER = ("ppo.py", "ppo_continuous.py", "ppo.py", "ppo_continuous.py", "ppo_atari.py")
CHECKS = {
    "loads": "checkpoint loads",
    "resumed": "resumed to its end",
    "metrics": "`metrics.csv` whole",
    "episodes": "`episodes.csv` whole",
    "kept": "earlier rows kept",
    "results": "final results",
}


# ---- Killing


def start(script: str, argv: list[str], log: Path) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "a") as file:
        command = [sys.executable, str(HOME / script), *argv]
        return subprocess.Popen(command, cwd=HOME, env=env, stdout=file, stderr=file)


def rows_of(path: Path) -> int:
    """Whole lines below the header."""
    return path.read_bytes().count(b"\n") - 1 if path.exists() else 0


def killed(script: str, stage: str, chance: random.Random, folder: Path) -> None:
    """Start a run and kill it; again, with another moment, where it has ended before."""
    flags = f"{FLAGS[script]} {COMMON} --run-dir {folder}".split()
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        share, delay = chance.random(), chance.uniform(0, 0.5)
        process = start(script, flags, folder.with_suffix(".log"))
        while process.poll() is None and not (folder / "checkpoint.pt").exists():
            time.sleep(0.01)
        total = iterations(folder)
        while process.poll() is None and rows_of(folder / "metrics.csv") < share * total:
            time.sleep(0.01)
        if stage == "any time":
            time.sleep(delay)
        else:
            while process.poll() is None and not (folder / "checkpoint.pt.tmp").exists():
                time.sleep(0.0005)
        process.kill()
        if process.wait() < 0:
            return
        if process.returncode:
            raise RuntimeError(f"{folder.with_suffix('.log')}: exit code {process.returncode}")


def outcome(number: int, seed: int) -> dict[str, str]:
    """One kill: what it left, and whether each check passed after resuming."""
    script, stage = ORDER[number % 5], "any time" if number % 4 else "checkpoint"
    folder = HOME / str(number)
    killed(script, stage, random.Random(f"{seed} {number}"), folder)
    row = {"kill": str(number), "script": script, "stage": stage, "checkpoint_step": ""}
    row |= {"rows_lost": "", "tmp_left": str((folder / "checkpoint.pt.tmp").exists())}
    faults: dict[str, str] = {}
    try:
        checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        return row | dict.fromkeys(CHECKS, "False") | {"error": repr(error)}
    state, found = checkpoint["state"], {x.name: x.read_bytes() for x in folder.glob("*.csv")}
    saved = found["metrics.csv"][: state["files"]["metrics.csv"]]
    row["checkpoint_step"] = str(state["global_step"])
    row["rows_lost"] = str(found["metrics.csv"].count(b"\n") - saved.count(b"\n"))
    code = start(script, ["--resume", str(folder)], folder.with_suffix(".log")).wait()
    if code:
        faults["resumed"] = f"exit code {code}"
    faults |= failed(folder) | moved(folder, found, state)
    row |= {name: str(name not in faults) for name in CHECKS} | {"error": " ".join(faults.values())}
    if not faults:
        shutil.rmtree(folder)
    return row


# ---- Checks


def iterations(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text())
    return config["total_timesteps"] // (config["num_envs"] * config["num_steps"])


def table(path: Path) -> list[dict[str, float]]:
    """The rows of a CSV file; raises ValueError for a line that is not whole."""
    text = path.read_text()
    header, *lines = text.splitlines()
    if not text.endswith("\n") or any(line.count(",") != header.count(",") for line in lines):
        raise ValueError("a line is not whole")
    return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(text.splitlines())]


def failed(folder: Path) -> dict[str, str]:
    """What is wrong with the files of a finished run: a check -> how."""
    faults: dict[str, str] = {}
    try:
        metrics, episodes = (table(folder / name) for name in ("metrics.csv", "episodes.csv"))
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError) as error:
        return dict.fromkeys(("metrics", "episodes", "results"), f"{error}")
    count = iterations(folder)
    steps = [row["global_step"] for row in metrics]
    if steps != [(i + 1) * steps[0] for i in range(count)]:
        faults["metrics"] = "metrics.csv has not each iteration once and in order"
    ends = [row["global_step"] for row in episodes]
    if ends != sorted(ends):
        faults["episodes"] = "episodes.csv is not in order"
    # metrics.csv holds means of the last 100 episodes: a row twice or missing shows there
    for row in metrics:
        end = np.searchsorted(ends, row["global_step"], side="right")
        for name in ("episodic_return", "episodic_length"):
            last = [episode[name] for episode in episodes[max(0, end - 100) : end]]
            mean = np.mean(last) if last else np.nan
            if not np.isclose(mean, row[f"charts/{name}"], rtol=1e-9, atol=0, equal_nan=True):
                faults["episodes"] = f"episodes.csv: other means at step {row['global_step']:.0f}"
    if summary["eval_return_mean"] is None or summary["global_step"] != steps[-1]:
        faults["results"] = f"summary.json: {summary}"
    return faults


def moved(folder: Path, found: dict[str, bytes], state: dict[str, Any]) -> dict[str, str]:
    """{"kept": how} where a row that the checkpoint counts on has changed, or a later one stays."""

    def steps(content: bytes) -> list[int]:
        lines = [line for line in content.splitlines() if not line.startswith(b"global_step")]
        return [int(line.split(b",")[0]) for line in lines]

    for name, content in found.items():
        size, now = state["files"].get(name, 0), (folder / name).read_bytes()  # 0: it came later
        before, after = now[:size], now[size:]
        if before != content[:size] or not (b"\n" + before).endswith(b"\n"):
            return {"kept": f"{name} has changed before byte {size}"}
        if any(step > state["global_step"] for step in steps(before)):
            return {"kept": f"{name} has a row of a later step before byte {size}"}
        if any(step <= state["global_step"] for step in steps(after)):
            return {"kept": f"{name} has a row of an earlier step after byte {size}"}
    return {}


# ---- Results


def report(rows: list[dict[str, str]], seed: int) -> str:
    cells = []
    for (script, stage), group in grouped(rows, "script", "stage").items():
        counts = [sum(row[name] == "True" for row in group) for name in CHECKS]
        when = "while a checkpoint is written" if stage == "checkpoint" else stage
        cells.append([f"`{script}`", when, len(group), *counts])
    whole = sum(all(row[name] == "True" for name in CHECKS) for row in rows)
    left = sum(row["tmp_left"] == "True" for row in rows)
    lost = [int(row["rows_lost"] or 0) for row in rows]
    text = f"""# kills

`python tests/benchmarks/kills.py --kills {len(rows)} --seed {seed}`. {measured()}.

**{whole} of {len(rows)}** runs killed with SIGKILL and resumed pass every check. "Any time": at a
random step of the training and up to half a second later. "While a checkpoint is written": as soon
as its temporary file is there; {left} kills left one. SIGKILL ends a process, not the machine: a
loss of power is not tested. Rows of `metrics.csv` that a kill undid, to be trained again: median
{np.median(lost):.0f}, at most {max(lost)}.

Checkpoint loads: `checkpoint.pt`, as the kill left it, with `weights_only=True`. Resumed to its
end: exit code 0. `metrics.csv` whole: each iteration once and in order. `episodes.csv` whole: in
order, no line torn, and the mean of its last 100 rows is the one in `metrics.csv` at every
iteration, which a row missing or standing twice would change. Earlier rows kept: what was in both
files when the checkpoint was written is still there byte for byte, and all that follows is of later
steps. Final results: `summary.json` with the last step and the evaluation.

"""
    text += markdown(["script", "killed", "kills", *CHECKS.values()], sorted(cells)) + "\n"
    return text + "".join(f"- `{script} {line} {COMMON}`\n" for script, line in FLAGS.items())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1, help="of the moments of the kills")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time (default 2)")
    options = parser.parse_args()
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True)
    for script in FLAGS:
        shutil.copy(ROOT / script, HOME)  # edits made meanwhile do not reach the runs
    rows = []
    with ThreadPoolExecutor(options.processes) as pool:
        for row in pool.map(outcome, range(options.kills), [options.seed] * options.kills):
            rows.append(row)
            print(", ".join(row.values()), flush=True)
    path = (RESULTS if options.kills >= 100 else RUNS / "trials") / "kills.csv"
    write(path, rows)
    path.with_suffix(".md").write_text(report(rows, options.seed))
    print(report(rows, options.seed))
    sys.exit(any(row[name] != "True" for row in rows for name in CHECKS))


if __name__ == "__main__":
    main()
