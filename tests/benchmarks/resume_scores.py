"""Scores of runs that were stopped at half and resumed, against those of runs that were not.

    python tests/benchmarks/resume_scores.py --envs CartPole-v1 HalfCheetah-v5 --seeds 5 --jobs 2

SIGTERM ends a run at about half of its steps, `--resume` goes on from there. A resumed run starts
new episodes with other random numbers, so its scores are not those of the uncut one; over seeds
they should be alike. Both halves run the script.py of the uncut run.
Uncut runs that sweep.py has finished (runs/mujoco, runs/classic), with the arguments of today and
never resumed, are used again. Runs: tests/benchmarks/runs/resume_scores, those that are finished
are skipped. Results: tests/benchmarks/resume_scores.csv and resume_scores.md, of every pair.
"""

import argparse
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from sweep import (
    EVAL_EPISODES,
    HERE,
    IRRELEVANT,
    ROOT,
    Run,
    load_run,
    load_script,
    markdown,
    mean_std,
    number,
    write_csv,
)

FLAGS = {  # script, flags, where sweep.py keeps such runs
    "CartPole-v1": ("ppo.py", "--env-id CartPole-v1", "classic/documented"),
    "HalfCheetah-v5": (
        "ppo_continuous.py",
        "--env-id HalfCheetah-v5 --compile",
        "mujoco/defaults",
    ),
}


@dataclass(frozen=True)
class Pair:
    env_id: str
    seed: int
    runs: Path
    flags: list[str]
    args: dict[str, Any]  # what today's script makes of them

    def folder(self, kind: str) -> Path:
        return self.runs / kind / self.env_id / str(self.seed)

    def finished(self, folder: Path) -> bool:
        """Whether a run with these arguments has ended there."""
        if not (folder / "summary.json").exists():
            return False
        config = json.loads((folder / "config.json").read_text())
        names = self.args.keys() - IRRELEVANT
        return all(config.get(name) == self.args[name] for name in names)

    def log(self, kind: str) -> Path:
        return self.folder(kind).with_suffix(".log")


def never_resumed(folder: Path) -> bool:
    """What the log of sweep.py says of a run in runs/NAME/SETTING/ENV/SEED."""
    log = folder.with_name(folder.name + ".log")
    lines = log.read_text().splitlines() if log.exists() else []
    commands = [line for line in lines if line.startswith("$ ")]
    return bool(commands) and not any("--resume" in line for line in commands)


def last_step(folder: Path) -> int:
    """global_step of the last whole row of metrics.csv, 0 before the first."""
    path = folder / "metrics.csv"
    rows = path.read_bytes().rpartition(b"\n")[0].splitlines()[1:] if path.exists() else []
    return int(rows[-1].split(b",")[0]) if rows else 0


def train(script: Path, flags: list[str], log: Path, stop: tuple[Path, int] | None = None) -> int:
    """Run the script; SIGTERM where the run in folder stop[0] reaches step stop[1]."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as output:
        command = [sys.executable, str(script), *flags]
        print("$", *command, file=output, flush=True)
        environ = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=output, stderr=output)
        while stop and process.poll() is None:
            if last_step(stop[0]) >= stop[1]:
                process.terminate()
                break
            time.sleep(0.05)
        return process.wait()


def make_uncut(pair: Pair, script: Path) -> str:
    """Find or train the uncut run of a pair."""
    folder = pair.folder("uncut")
    if pair.finished(folder):
        return "finished before"
    shutil.rmtree(folder, ignore_errors=True)
    before = HERE / "runs" / FLAGS[pair.env_id][2] / pair.env_id / str(pair.seed)
    if pair.finished(before) and never_resumed(before):
        shutil.copytree(before, folder)
        return f"taken from {before.relative_to(ROOT)}"
    if code := train(script, [*pair.flags, "--run-dir", str(folder)], pair.log("uncut")):
        raise RuntimeError(f"exit code {code}, see {pair.log('uncut')}")
    return "trained"


def make_resumed(pair: Pair) -> str:
    """Train the other run of a pair with the script of the first, stopped at half."""
    folder, first = pair.folder("resumed"), pair.folder("uncut")
    script = first / "script.py"
    if pair.finished(folder) and (folder / "script.py").read_bytes() == script.read_bytes():
        return "finished before"
    shutil.rmtree(folder, ignore_errors=True)
    half = pair.args["total_timesteps"] // 2
    flags, log = [*pair.flags, "--run-dir", str(folder)], pair.log("resumed")
    if (code := train(script, flags, log, stop=(folder, half))) != 128 + signal.SIGTERM:
        raise RuntimeError(f"exit code {code} instead of {128 + signal.SIGTERM}, see {log}")
    step = last_step(folder)
    stopped_at(folder).write_text(f"{step}\n")
    if code := train(script, ["--resume", str(folder)], log):
        raise RuntimeError(f"exit code {code}, see {log}")
    return f"trained, stopped at step {step:,}"


def stopped_at(folder: Path) -> Path:
    return folder.with_suffix(".stopped_at")


def make(pair: Pair, script: Path) -> str:
    """Both runs of a pair; what happened."""
    texts = []
    try:
        for kind, maker in (
            ("uncut", lambda: make_uncut(pair, script)),
            ("resumed", lambda: make_resumed(pair)),
        ):
            happened = maker()
            run = load_run(pair.folder(kind))
            texts.append(f"{kind}: {number(run.train)}, {number(run.eval)} ({happened})")
    except (RuntimeError, OSError) as error:
        texts.append(f"FAILED: {error}")
    return f"{pair.env_id} seed {pair.seed}: " + "; ".join(texts)


def plan(options: argparse.Namespace, runs: Path) -> list[Pair]:
    pairs = []
    for env_id in options.envs:
        script, words, _ = FLAGS[env_id]
        args_class = load_script(ROOT / script).Args
        for seed in range(1, options.seeds + 1):
            flags = [*words.split(), "--seed", str(seed), "--eval-episodes", str(EVAL_EPISODES)]
            if options.total_timesteps:
                flags += ["--total-timesteps", str(options.total_timesteps)]
            args = tyro.cli(args_class, args=flags)
            args.check()
            pairs.append(Pair(env_id, seed, runs, flags, vars(args)))
    return pairs


# ---- Results


def load_pairs(runs: Path) -> list[tuple[Run, Run, int]]:
    """Uncut run, resumed run and the step of the stop, of every pair that is finished."""
    pairs = []
    for env_id in FLAGS:
        for first in sorted((runs / "uncut" / env_id).glob("*/summary.json")):
            second = runs / "resumed" / env_id / first.parent.name
            if (second / "summary.json").exists():
                uncut, resumed = load_run(first.parent), load_run(second)
                pairs.append((uncut, resumed, int(stopped_at(second).read_text())))
    return pairs


def provenance(runs: list[Run]) -> str:
    """When the runs ended, with which versions; how many versions of each script."""
    dates = sorted({run.date for run in runs})
    text = f"Measured {dates[0]}" + (f" to {dates[-1]}" if len(dates) > 1 else "")
    for name in ("python", "torch", "gymnasium", "numpy"):
        versions = sorted({run.config["versions"][name].split()[0] for run in runs})
        text += f", {name} {' / '.join(versions)}"
    for env_id in FLAGS:
        scripts = {(x.folder / "script.py").read_bytes() for x in runs if x.env_id == env_id}
        text += f"; {len(scripts)} versions of {FLAGS[env_id][0]}" if len(scripts) > 1 else ""
    return text + "."


def difference(pairs: list[tuple[Run, Run, int]], score: str) -> str:
    """Mean of resumed - uncut over seeds, and its standard error."""
    values = [getattr(resumed, score) - getattr(uncut, score) for uncut, resumed, _ in pairs]
    mean, size = statistics.fmean(values), max(abs(getattr(uncut, score)) for uncut, *_ in pairs)
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{number(mean, size)} ± {number(spread / len(values) ** 0.5, size)}"


def results(pairs: list[tuple[Run, Run, int]]) -> tuple[str, list[list]]:
    """The Markdown text and the rows of the CSV file."""
    cells, lines, rows = [], [], []
    for env_id in dict.fromkeys(uncut.env_id for uncut, *_ in pairs):
        own = [pair for pair in pairs if pair[0].env_id == env_id]
        stops = [step for *_, step in own]
        for kind, members in (
            ("uncut", [uncut for uncut, *_ in own]),
            ("stopped and resumed", [resumed for _, resumed, _ in own]),
        ):
            scores = [[getattr(run, name) for run in members] for name in ("train", "eval")]
            each = [" ".join(map(number, values)) for values in scores]
            steps = f"{max(run.steps for run in members):,}"
            cells.append([env_id, kind, len(own), steps, *map(mean_std, scores), *each])
        lines.append(
            f"- {env_id}: stopped at step {min(stops):,} to {max(stops):,}. Resumed - uncut, mean "
            f"over seeds ± standard error: training {difference(own, 'train')}, evaluation "
            f"{difference(own, 'eval')}.\n"
        )
        for uncut, resumed, step in own:
            scores = (uncut.train, resumed.train, uncut.eval, resumed.eval)
            rows.append([env_id, uncut.seed, uncut.steps, step, *(f"{x:.6g}" for x in scores)])
    header = ["environment", "run", "seeds", "steps", "training, last 100"]
    header += [f"evaluation, {EVAL_EPISODES} episodes", "training, each seed"]
    return markdown([*header, "evaluation, each seed"], cells) + "\n" + "".join(lines), rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--envs", nargs="+", choices=FLAGS, default=list(FLAGS))
    add("--seeds", type=int, default=5, help="seeds 1 to this")
    add("--jobs", type=int, default=2, help="runs at a time, each on one thread (default 2)")
    add("--total-timesteps", type=int, help="a trial: printed, not written")
    options = parser.parse_args()
    runs = HERE / "runs" / ("resume_scores" + "_trial" * bool(options.total_timesteps))
    pairs = plan(options, runs)
    runs.mkdir(parents=True, exist_ok=True)
    scripts = {}
    for env_id in options.envs:  # copies: edits made meanwhile do not reach later runs
        scripts[env_id] = runs / FLAGS[env_id][0]
        shutil.copy(ROOT / FLAGS[env_id][0], scripts[env_id])
    failures = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for text in pool.map(lambda pair: make(pair, scripts[pair.env_id]), pairs):
            failures += "FAILED" in text
            print(text, flush=True)
    if done := load_pairs(runs):
        text, rows = results(done)
        comment = provenance([run for pair in done for run in pair[:2]])
        envs = dict.fromkeys(uncut.env_id for uncut, *_ in done)
        flags = ", ".join("`{} {}`".format(*FLAGS[env_id][:2]) for env_id in envs)
        text = (
            f"# resume scores\n\n`python tests/benchmarks/resume_scores.py`. {comment}\n\nThe same "
            "flags and seeds twice: trained in one go, and ended by SIGTERM at about half of the "
            "steps and resumed in another process. Training: mean return of the last 100 training "
            f"episodes. Evaluation: mean return of {EVAL_EPISODES} deterministic episodes. Both "
            "are means over seeds ± sample standard deviation over seeds. From the stop on, the "
            "two go different ways, as the resumed run begins new episodes. "
            f"Flags: {flags}.\n\n" + text
        )
        print(text)
        if not options.total_timesteps:
            (HERE / "resume_scores.md").write_text(text)
            header = "environment seed steps stopped_at train_uncut train_resumed".split()
            header += ["eval_uncut", "eval_resumed"]
            write_csv(HERE / "resume_scores.csv", header, rows, comment)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
