"""Kill runs with SIGKILL at random moments, resume them, and check every file that they leave.

    python tests/benchmarks/kills.py --kills 100 --jobs 2

Each kill has a short run of its own. Four of five come from outside, at a uniformly random time
between the first checkpoint and the end of the process. The fifth comes from inside the writing of
a checkpoint: the process, which runs the unchanged script, has open, os.fsync and os.replace
replaced by versions that kill it after a random share of the bytes, before the flush to disk, or
between the flush and the renaming. Then `--resume` runs to the end.
Results: tests/benchmarks/kills.csv, a row a kill, and kills.md. Runs that fail a check stay in
tests/benchmarks/runs/kills.
"""

import argparse
import builtins
import csv
import importlib
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sweep import HERE, ROOT, markdown, measured, write_csv

RUNS = HERE / "runs" / "kills"
TABLES = ("metrics.csv", "episodes.csv")
FLAGS = {
    "ppo.py": "--env-id CartPole-v1 --total-timesteps 25600",
    "ppo_continuous.py": "--env-id InvertedPendulum-v5 --total-timesteps 25600 --num-envs 8 "
    "--num-minibatches 4 --update-epochs 4",
    "ppo_atari.py": "--env-id ALE/Breakout-v5 --total-timesteps 1920 --num-envs 4 --num-steps 32 "
    "--update-epochs 1",
}
COMMON = "--eval-episodes 2 --no-cuda"
ORDER = ("ppo.py", "ppo_continuous.py", "ppo.py", "ppo_continuous.py", "ppo_atari.py")
STAGES = ("bytes", "bytes", "flush", "rename")
CHECKS = {
    "loads": "checkpoint loads",
    "resumed": "resumed to its end",
    "metrics": "`metrics.csv` whole",
    "episodes": "`episodes.csv` whole",
    "kept": "earlier rows kept",
}


@dataclass(frozen=True)
class Kill:
    number: int
    script: str
    stage: str  # "any time", or where in the writing of a checkpoint
    seed: int

    @property
    def folder(self) -> Path:
        return RUNS / str(self.number)


def plan(kills: int, seed: int) -> list[Kill]:
    """Two of five kills each for ppo.py and ppo_continuous.py; one of five inside a writing."""
    chosen = []
    for i in range(kills):
        inside = i % 5 == i // 5 % 5  # goes round the scripts
        stage = STAGES[i // 5 % len(STAGES)] if inside else "any time"
        chosen.append(Kill(i + 1, ORDER[i % 5], stage, seed))
    return chosen


# ---- In the process that is to die


class Torn(io.BufferedWriter):
    """A file whose writing ends with the process, after a share of the bytes."""

    share = 0.0

    def write(self, content: bytes) -> int:
        super().write(content[: int(self.share * len(content))])
        self.flush()
        die()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(stage: str, delay: float, share: float) -> None:
    """Die in the first writing of checkpoint.pt that begins `delay` seconds after the first one."""
    real_open, real_fsync, real_replace = builtins.open, os.fsync, os.replace
    first, armed = math.inf, False

    def deadly_open(file: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal armed
        if not isinstance(file, int) and Path(file).name == "checkpoint.pt.tmp":
            armed = time.monotonic() >= first + delay
            if armed and stage == "bytes":
                torn = Torn(io.FileIO(file, "w"))
                torn.share = share
                return torn
        return real_open(file, *args, **kwargs)

    def deadly_fsync(number: int) -> None:
        if armed and stage == "flush":
            die()
        real_fsync(number)

    def deadly_replace(source: Any, target: Any) -> None:
        nonlocal first
        if armed and stage == "rename":
            die()
        real_replace(source, target)
        if Path(target).name == "checkpoint.pt":
            first = min(first, time.monotonic())

    builtins.open, os.fsync, os.replace = deadly_open, deadly_fsync, deadly_replace


# ---- Killing and resuming

# A fork server that has imported torch once starts each process in a moment.
server = multiprocessing.get_context("forkserver")


def child(script: str, argv: list[str], deadly: tuple[str, float, float] | None) -> None:
    """In the new process: `python script.py argv`, its stderr in a file, armed if it is to die."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(errors_of(argv), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.stdout, sys.stderr, sys.argv = os.fdopen(1, "w"), os.fdopen(2, "w"), [script, *argv]
    if deadly:
        arm(*deadly)
    importlib.import_module(Path(script).stem).main()


def errors_of(argv: list[str]) -> Path:
    return Path(f"{argv[-1]}.err")  # the run folder stands last


def start(
    script: str, argv: list[str], deadly: tuple[str, float, float] | None = None
) -> BaseProcess:
    process = server.Process(target=child, args=(script, argv, deadly), daemon=True)
    process.start()
    return process


def end(process: BaseProcess, argv: list[str]) -> tuple[int, str]:
    """Wait for it; its exit code, below 0 where a signal ended it, and what it said on stderr."""
    process.join()
    return process.exitcode, errors_of(argv).read_text().strip()


def flags(script: str, folder: Path) -> list[str]:
    return [*FLAGS[script].split(), *COMMON.split(), "--run-dir", str(folder)]


def wait_for_checkpoint(process: BaseProcess, folder: Path) -> None:
    while not (folder / "checkpoint.pt").exists() and process.is_alive():
        time.sleep(0.002)


def duration(script: str) -> float:
    """Seconds from the first checkpoint of an uncut run to the end of its process."""
    folder = RUNS / "uncut" / script
    argv = flags(script, folder)
    process = start(script, argv)
    wait_for_checkpoint(process, folder)
    began = time.monotonic()
    code, errors = end(process, argv)
    if code or errors or failed(folder):
        raise RuntimeError(f"{script}, uncut: exit code {code}, {failed(folder)} {errors}")
    return time.monotonic() - began


def killed(kill: Kill, seconds: float) -> tuple[float, int]:
    """Start a run and have it killed; the delay, and how many runs had ended before their kill."""
    chance = random.Random(f"{kill.seed} {kill.number}")
    argv = flags(kill.script, kill.folder)
    for late in range(20):
        shutil.rmtree(kill.folder, ignore_errors=True)
        delay, share = chance.uniform(0, seconds), chance.random()
        if kill.stage == "any time":
            process = start(kill.script, argv)
            wait_for_checkpoint(process, kill.folder)
            time.sleep(delay)
            process.kill()
        else:
            process = start(kill.script, argv, (kill.stage, delay, share))
        code, errors = end(process, argv)
        if errors or code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"{kill}: exit code {code}: {errors}")
        if code:
            return delay, late
    raise RuntimeError(f"{kill}: 20 runs have ended before they were killed")


def outcome(kill: Kill, seconds: float) -> dict[str, Any]:
    """One kill: what it left, and whether each check passed after resuming."""
    delay, late = killed(kill, seconds)
    folder = kill.folder
    row = {"kill": kill.number, "script": kill.script, "stage": kill.stage}
    row |= {"delay_s": round(delay, 3), "ended_before": late}
    try:
        saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        return row | dict.fromkeys(CHECKS, False) | {"error": repr(error)}
    found = {name: (folder / name).read_bytes() for name in TABLES}
    step, clock = (saved["progress"][name] for name in ("global_step", "wall_time"))
    last = found["metrics.csv"].rpartition(b"\n")[0].splitlines()[-1].split(b",")
    row |= {"checkpoint_step": step, "seconds_lost": round(float(last[-1]) - clock, 3)}
    row["tmp_after_kill"] = temporary(folder)
    argv = ["--resume", str(folder)]
    code, errors = end(start(kill.script, argv), argv)
    faults = failed(folder) | moved(folder, found, saved)
    if code or errors or not (folder / "summary.json").exists():
        faults["resumed"] = f"exit code {code}: {errors}"
    row |= {name: name not in faults for name in CHECKS}
    row |= {"tmp_at_end": temporary(folder), "error": " ".join(faults.values())}
    if not faults:
        shutil.rmtree(folder)
    return row


def temporary(folder: Path) -> str:
    return " ".join(sorted(path.name for path in folder.glob("*.tmp")))


# ---- Checks


def table(path: Path) -> list[dict[str, float]]:
    """The rows of a CSV file; raises ValueError for a line that is not whole."""
    text = path.read_text()
    header, *lines = text.splitlines()
    if not text.endswith("\n") or any(line.count(",") != header.count(",") for line in lines):
        raise ValueError("a line is not whole")
    return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(text.splitlines())]


def failed(folder: Path) -> dict[str, str]:
    """What is wrong with the files of a finished run: "metrics" or "episodes" -> how."""
    config = json.loads((folder / "config.json").read_text())
    batch = config["num_envs"] * config["num_steps"]
    faults = {}
    try:
        metrics = table(folder / "metrics.csv")
        steps = [row["global_step"] for row in metrics]
        if steps != [batch * (i + 1) for i in range(config["total_timesteps"] // batch)]:
            faults["metrics"] = "metrics.csv has not each iteration once and in order"
    except ValueError as error:
        return {"metrics": f"metrics.csv: {error}", "episodes": "not compared"}
    try:
        episodes = table(folder / "episodes.csv")
    except ValueError as error:
        return faults | {"episodes": f"episodes.csv: {error}"}
    steps = [row["global_step"] for row in episodes]
    clock = [row["wall_time"] for row in episodes]
    if steps != sorted(steps) or clock != sorted(clock):
        faults["episodes"] = "episodes.csv is not in order"
    if any(steps.count(step) > config["num_envs"] for step in set(steps)):
        faults["episodes"] = "more episodes end in a step than there are environments"
    # metrics.csv holds the means of the last 100 episodes, so a row twice or missing shows there.
    for row in metrics:
        end = np.searchsorted(steps, row["global_step"], side="right")
        for name in ("episodic_return", "episodic_length"):
            last = [episode[name] for episode in episodes[max(0, end - 100) : end]]
            mean = np.mean(last) if last else math.nan
            if not np.isclose(mean, row[f"charts/{name}"], rtol=1e-9, atol=0, equal_nan=True):
                faults["episodes"] = f"episodes.csv: other means at step {row['global_step']:.0f}"
    return faults


def moved(folder: Path, found: dict[str, bytes], saved: dict[str, Any]) -> dict[str, str]:
    """{"kept": how} where a row that the checkpoint counts on is gone, or a later one is not."""
    step = saved["progress"]["global_step"]
    for name, content in found.items():
        size, now = saved[name], (folder / name).read_bytes()
        if len(content) < size or now[:size] != content[:size] or content[size - 1 : size] != b"\n":
            return {"kept": f"{name} has changed before byte {size}"}
        before, after = now[:size].splitlines()[1:], now[size:].splitlines()
        if any(first_number(line) > step for line in before):
            return {"kept": f"{name} has a row of a step after {step} before byte {size}"}
        if any(first_number(line) <= step for line in after):
            return {"kept": f"{name} has a row of step {step} or before it after byte {size}"}
    return {}


def first_number(line: bytes) -> int:
    return int(line.split(b",")[0])


# ---- Results


def write_results(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    comment = measured("torch", "gymnasium", "numpy", "mujoco", "ale-py") + f"; seed {options.seed}"
    names = list(dict.fromkeys(name for row in rows for name in row))
    write_csv(
        HERE / "kills.csv", names, [[row.get(name, "") for name in names] for row in rows], comment
    )
    cells = []
    for script in FLAGS:
        for inside in (False, True):
            group = [
                row
                for row in rows
                if row["script"] == script and (row["stage"] != "any time") == inside
            ]
            if group:
                counts = [sum(row[name] for row in group) for name in CHECKS]
                when = "while a checkpoint is written" if inside else "any time"
                cells.append([f"`{script}`", when, len(group), *counts])
    counts = [sum(row[name] for row in rows) for name in CHECKS]
    cells.append(["all", "", len(rows), *(f"**{count}**" for count in counts)])
    whole = sum(all(row[name] for name in CHECKS) for row in rows)
    stages = [sum(row["stage"] == stage for row in rows) for stage in ("bytes", "flush", "rename")]
    left = [row for row in rows if row.get("tmp_after_kill")]
    at_end = sum(bool(row.get("tmp_at_end")) for row in rows)
    lost = [row["seconds_lost"] for row in rows if "seconds_lost" in row] or [math.nan]
    late = sum(row["ended_before"] for row in rows)
    command = f"python tests/benchmarks/kills.py --kills {options.kills}"
    text = f"""# kills

`{command}`. {comment}.

**{whole} of {len(rows)}** killed runs pass every check. Each is a short run of its own (flags
below), killed once with SIGKILL and resumed to its end. "Any time": from outside, at a uniformly
random moment between the first checkpoint and the end of the process. "While a checkpoint is
written": inside the writing, {stages[0]} after a random share of the bytes, {stages[1]} before the
flush to disk, {stages[2]} between the flush and the renaming. A run that had ended before its kill
was repeated with another moment ({late} times). SIGKILL ends a process, not the machine: a loss of
power is not tested.

Checkpoint loads: `checkpoint.pt`, as the kill left it, with `weights_only=True`. Resumed to its
end: exit code 0, nothing on stderr, `summary.json`. `metrics.csv` whole: each iteration once and in
order. `episodes.csv` whole: in order, no line torn, and the mean of its last 100 rows is the one in
`metrics.csv` at every iteration, which a row missing or standing twice would change. Earlier rows
kept: what was in both files when the checkpoint was written is still there byte for byte, and all
that follows is of later steps.

"""
    text += markdown(["script", "killed", "kills", *CHECKS.values()], cells)
    text += f"""
{len(left)} kills left a `checkpoint.pt.tmp`; resuming ignores it, the next checkpoint overwrites
it, and {at_end or "none"} of the finished runs still had a `*.tmp`. Training that a kill undid:
median {statistics.median(lost):.2f} s, at most {max(lost):.2f} s (rows after the checkpoint are
dropped and trained again).

"""
    text += "".join(f"- `{script} {line} {COMMON}`\n" for script, line in FLAGS.items())
    (HERE / "kills.md").write_text(text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1, help="of the moments of the kills")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    options = parser.parse_args()
    shutil.rmtree(RUNS, ignore_errors=True)
    (RUNS / "uncut").mkdir(parents=True)
    kills = plan(options.kills, options.seed)
    scripts = list(dict.fromkeys(kill.script for kill in kills))
    for script in scripts:
        shutil.copy(ROOT / script, RUNS)  # edits made meanwhile do not reach the runs
    sys.path.insert(0, str(RUNS))
    os.environ["OMP_NUM_THREADS"] = "1"
    server.set_forkserver_preload(["torch._dynamo", *(Path(script).stem for script in scripts)])
    seconds = {}
    for script in scripts:
        seconds[script] = duration(script)
        print(f"{script}: {seconds[script]:.1f} s from the first checkpoint to the end", flush=True)
    rows = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(lambda kill: outcome(kill, seconds[kill.script]), kills):
            rows.append(row)
            print(*row.values(), flush=True)
    write_results(rows, options)
    sys.exit(not all(row[name] for row in rows for name in CHECKS))


if __name__ == "__main__":
    main()
