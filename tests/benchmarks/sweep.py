"""Train environments x seeds x settings in parallel, and write one table for each experiment.

    python tests/benchmarks/sweep.py cartpole --seeds 1-40
    python tests/benchmarks/sweep.py mujoco --envs Hopper-v5 Walker2d-v5 --seeds 1-5
    python tests/benchmarks/sweep.py mujoco --envs Hopper-v5 --set "lambda-0.9:--gae-lambda 0.9"

Finished runs, here or in a table of results/, are skipped and those cut off are resumed: the same
command goes on where it was stopped. A run is known by its script's fingerprint, environment, flags
and seed, so experiments that have one in common train it once. Runs, their output beside them:
runs/SCRIPT-FINGERPRINT/ENVIRONMENT/FLAGS/SEED. Tables: results/NAME.csv, a row a run, and its
summary, NAME.md. With --set, --script-dir or --timesteps the runs are trials, whose table is
runs/trials/NAME.md.
"""

import argparse
import fcntl
import functools
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tokenize
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tables import EVAL, RESULTS, ROOT, RUNS, TRAIN, Row, read, report, score, write

EVAL_EPISODES = 100
COLUMNS = (
    "experiment script fingerprint env_id setting seed global_step train_return_last100 "
    "eval_return_mean eval_return_std eval_episodes wall_time flags curve"
).split()


@dataclass(frozen=True)
class Experiment:
    script: str
    seeds: int  # 1 to this
    envs: dict[str, str]  # environment -> the flags that it needs
    settings: dict[str, str] = field(default_factory=lambda: {"defaults": ""})


ACROBOT = "--total-timesteps 500000 --num-envs 16 --num-minibatches 8 --norm-obs"
MOUNTAIN_CAR = """--total-timesteps 1000000 --num-envs 16 --num-steps 64 --update-epochs 4
    --gae-lambda 0.98 --norm-obs"""
LUNAR_LANDER = """--total-timesteps 1000000 --num-envs 16 --num-steps 256 --num-minibatches 16
    --learning-rate 3e-4 --gamma 0.999 --gae-lambda 0.98 --ent-coef 0.01 --norm-obs"""
SWIMMER = """--num-envs 4 --num-steps 1024 --num-minibatches 16 --learning-rate 6e-4 --gamma 0.9999
    --gae-lambda 0.98"""
ANT = "--gamma 0.99 --num-minibatches 8 --no-norm-obs --init-log-std -1.5"
HUMANOID = "--gamma 0.99 --learning-rate 1e-4 --init-log-std -1"
PENDULUM = """--total-timesteps 200000 --num-envs 16 --num-steps 128 --learning-rate 1e-3
    --final-lr-fraction 0 --gamma 0.95"""
PONG = """--total-timesteps 3000000 --num-envs 16 --num-steps 128 --update-epochs 3
    --num-minibatches 8 --clip-coef 0.2 --learning-rate 1e-3"""
ROBOTS = """HalfCheetah-v5 Hopper-v5 InvertedDoublePendulum-v5 InvertedPendulum-v5 Reacher-v5
    Swimmer-v5 Walker2d-v5""".split()
FOUR = ("HalfCheetah-v5", "Hopper-v5", "InvertedPendulum-v5", "Walker2d-v5")
OWN = {"documented": ""}  # the environment's own flags are in the README
ABLATIONS = {
    "defaults": "",
    "no-obs-norm": "--no-norm-obs",
    "no-reward-norm": "--no-norm-reward",
    "no-recompute": "--no-recompute-advantages",
    "no-std-floor": "--min-log-std -100",
    "time-limit-as-death": "@time-limit-as-death",
    "default-init": "@default-init",
}
# "@name" among the flags: a changed script, by old text -> new text, or by tests/modifications
EDITS = {
    "@time-limit-as-death": {"next_values * (1 - terminations)": "next_values * (1 - dones)"},
    "@default-init": {
        "nn.init.orthogonal_(layer.weight, scale)": "pass",
        "nn.init.zeros_(layer.bias)": "pass",
    },
}
SURROGATES = {
    "none": "--surrogate none",
    "clip-0.1": "--clip-coef 0.1",
    "clip-0.2": "",  # the defaults
    "clip-0.3": "--clip-coef 0.3",
    "adaptive-0.003": "--surrogate kl-adaptive --kl-target 0.003",
    "adaptive-0.01": "--surrogate kl-adaptive --kl-target 0.01",
    "adaptive-0.03": "--surrogate kl-adaptive --kl-target 0.03",
    "fixed-0.3": "--surrogate kl-fixed --kl-coef 0.3",
    "fixed-1": "--surrogate kl-fixed --kl-coef 1",
    "fixed-3": "--surrogate kl-fixed --kl-coef 3",
    "fixed-10": "--surrogate kl-fixed --kl-coef 10",
}
POSITIONS = "--total-timesteps 300000 --num-envs 16 --num-steps 64 --update-epochs 4 --norm-obs"
HIDDEN = {"envs:Positions-v0": POSITIONS, "envs:Cue-v0": "--total-timesteps 60000"}  # tests/envs.py
MULTIPLIERS = {
    "clip": "",
    "kl-adaptive": "--surrogate kl-adaptive",
    "lagrangian": "@lagrangian --surrogate kl-adaptive",
}
TANH = {"defaults": "", "tanh-squashed": "@tanh-squashed"}
RECURRENT = {"defaults": "", "recurrent": "@recurrent"}
AUXILIARY = {"defaults": "", "shared-trunk": "@shared-trunk", "auxiliary": "@auxiliary"}
P, C = "ppo.py", "ppo_continuous.py"
EXPERIMENTS = {
    "cartpole": Experiment(P, 100, {"CartPole-v1": ""}),
    "classic": Experiment(P, 10, {"Acrobot-v1": ACROBOT, "MountainCar-v0": MOUNTAIN_CAR}, OWN),
    "lunarlander": Experiment(P, 5, {"LunarLander-v3": LUNAR_LANDER}, OWN),  # gymnasium[box2d]
    "mujoco": Experiment(C, 10, dict.fromkeys(ROBOTS, "")),
    "swimmer": Experiment(C, 5, {"Swimmer-v5": SWIMMER}, OWN),
    "ant_humanoid": Experiment(C, 3, {"Ant-v5": ANT, "Humanoid-v5": HUMANOID}, OWN),
    "pendulum": Experiment(C, 5, {"Pendulum-v1": PENDULUM}, OWN),
    "atari": Experiment("ppo_atari.py", 2, {"PongNoFrameskip-v4": PONG}, OWN),
    "ablations": Experiment(C, 5, dict.fromkeys(FOUR[:2], ""), ABLATIONS),
    "table1": Experiment(C, 3, dict.fromkeys(FOUR, ""), SURROGATES),
    "recurrent": Experiment(P, 3, HIDDEN, RECURRENT),
    "lagrangian": Experiment(C, 3, dict.fromkeys(("Hopper-v5", "Walker2d-v5"), ""), MULTIPLIERS),
    "tanh_squashed": Experiment(C, 3, dict.fromkeys(("HalfCheetah-v5", "Walker2d-v5"), ""), TANH),
    "auxiliary": Experiment(P, 5, {"CartPole-v1": "", "Acrobot-v1": ACROBOT}, AUXILIARY),
}


# ---- Runs


def fingerprint(script: str) -> str:
    """Of a script's code above its records: comments, docstrings and blank lines do not count."""
    text = script.partition("# >>> shared: records")[0]
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        (row, column), (last, _) = token.start, token.end
        if token.type == tokenize.COMMENT:
            lines[row - 1] = lines[row - 1][:column]
        elif token.type == tokenize.STRING and token.string.startswith('"""'):
            lines[row - 1 : last] = [""] * (last - row + 1)
    code = [line.rstrip() for line in lines if line.strip()]
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Job:
    script: str
    fingerprint: str
    env_id: str
    setting: str
    seed: int
    flags: str

    @property
    def home(self) -> Path:
        return RUNS / f"{Path(self.script).stem}-{self.fingerprint}"

    @property
    def folder(self) -> Path:
        names = (self.env_id, self.flags.replace("--", "").replace(" ", "_") or "defaults")
        safe = [name.replace("/", "-").replace(":", "-") for name in names]
        return self.home.joinpath(*safe, str(self.seed))

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.seed}.log")

    @property
    def known(self) -> Row | None:
        """Its row in some table of results/."""
        return published().get((self.script, self.fingerprint, self.env_id, self.seed, self.flags))

    def trained(self) -> bool:
        try:
            summary = json.loads((self.folder / "summary.json").read_text())
        except (OSError, ValueError):  # there is none, or it was cut off
            return False
        return summary["eval_episodes"] == EVAL_EPISODES

    def finished(self) -> bool:
        return self.trained() or self.known is not None

    def row(self, experiment: str) -> Row:
        if not self.trained():
            return self.known | {"experiment": experiment, "setting": self.setting}
        summary = json.loads((self.folder / "summary.json").read_text())
        config = json.loads((self.folder / "config.json").read_text())
        extra = "".join(f" --{name}" for name in ("compile", "cuda") if config[name])
        values = vars(self) | {"experiment": experiment, "flags": (self.flags + extra).strip()}
        values = summary | values | {"curve": curve(self.folder, summary["global_step"])}
        return {name: "" if values[name] is None else str(values[name]) for name in COLUMNS}


@functools.cache
def published() -> dict[tuple[str, str, str, int, str], Row]:
    """The rows of all tables in results/, by run: whether it was compiled does not matter."""
    rows = [row for path in sorted(RESULTS.glob("*.csv")) for row in read(path)]
    runs = {}
    for row in rows:
        if "fingerprint" in row and "flags" in row:
            flags = row["flags"].replace("--compile", "").replace("--cuda", "").strip()
            run = (row["script"], row["fingerprint"], row["env_id"], int(row["seed"]), flags)
            runs[run] = row
    return runs


def curve(run: Path, global_step: int) -> str:
    """Mean return of the last 100 training episodes, at each fortieth of a run's steps."""
    columns = np.loadtxt(run / "episodes.csv", delimiter=",", skiprows=1, usecols=(0, 1), ndmin=2)
    points = []
    for k in range(1, 41):
        returns = columns[columns[:, 0] <= global_step * k / 40, 1]
        points.append(f"{returns[-100:].mean():.4g}" if len(returns) else "nan")
    return " ".join(points)


def merged(*texts: str) -> str:
    """Flags in one line, sorted; of a flag given twice, or with its --no- form, the last counts."""
    flags: dict[str, str] = {}
    for part in " ".join(texts).replace("=", " ").replace("@", "--@").split("--")[1:]:
        name, _, value = part.strip().partition(" ")
        name = name.replace("_", "-")
        flags[name.removeprefix("no-")] = f"--{name} {value}".strip()
    return " ".join(flags[name] for name in sorted(flags)).replace("--@", "@")


@functools.cache
def frozen(path: Path, edits: tuple[str, ...]) -> str:
    """Copy a script for the runs, whatever happens to it meanwhile; its fingerprint, unedited."""
    text = path.read_text()
    mark = fingerprint(text)
    copy = RUNS.joinpath(f"{path.stem}-{mark}", *edits, path.name)
    copy.parent.mkdir(parents=True, exist_ok=True)
    temporary = copy.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(text)
    for name in edits:
        if name not in EDITS:
            recipe = ROOT / f"tests/modifications/{name[1:].replace('-', '_')}.patch"
            subprocess.run(["patch", "-s", temporary, recipe], check=True)
            continue
        for old, new in EDITS[name].items():
            if text.count(old) != 1:
                raise ValueError(f"{name}: {path} has {text.count(old)} times, not once: {old}")
            text = text.replace(old, new)
        temporary.write_text(text)
    temporary.replace(copy)
    return mark


def edits_of(flags: str) -> tuple[str, ...]:
    return tuple(word for word in flags.split() if word.startswith("@"))


def plan(options: argparse.Namespace) -> list[Job]:
    """All runs that are asked for, the first seed of everything first."""
    experiment, jobs = EXPERIMENTS[options.name], []
    names = experiment.settings if options.settings is None else options.settings
    settings = {name: experiment.settings[name] for name in names}
    settings |= dict(text.split(":", 1) for text in options.set)
    label = f"@{options.timesteps}" if options.timesteps else ""
    label += "" if options.script_dir == ROOT else f"@{options.script_dir.name}"
    steps = f"--total-timesteps {options.timesteps}" if options.timesteps else ""
    for seed in options.seeds or range(1, experiment.seeds + 1):
        for env_id in options.envs or experiment.envs:
            for name, own in settings.items():
                flags = merged(experiment.envs.get(env_id, ""), own, steps)
                mark = frozen(options.script_dir / experiment.script, edits_of(flags))
                jobs.append(Job(experiment.script, mark, env_id, name + label, seed, flags))
    return jobs


def start(job: Job, options: argparse.Namespace) -> subprocess.Popen | None:
    """Start or resume a run; None where another process trains it, or has."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "a") as log:
        try:  # the child inherits the lock, so that it holds as long as the run lives
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return None
        if job.finished():
            return None
        edits = edits_of(job.flags)
        command = [sys.executable, str(job.home.joinpath(*edits, job.script))]
        if (job.folder / "checkpoint.pt").exists():
            command += ["--resume", str(job.folder)]
        else:
            shutil.rmtree(job.folder, ignore_errors=True)
            command += ["--env-id", job.env_id, "--seed", str(job.seed)]
            command += ["--run-dir", str(job.folder), "--eval-episodes", str(EVAL_EPISODES)]
            command += [word for word in job.flags.split() if word not in edits]
        command += ["--torch-threads", str(options.threads)]
        command += ["--compile" if options.compile else "--no-compile"]
        command += ["--cuda" if options.cuda else "--no-cuda"]
        print("$", *command, file=log, flush=True)
        env = os.environ | {"OMP_NUM_THREADS": str(options.threads), "PYTHONPATH": f"{ROOT}/tests"}
        return subprocess.Popen(
            command, cwd=job.home, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )


def sweep(jobs: list[Job], options: argparse.Namespace) -> int:
    """Train what is missing; returns how many runs failed. One that fails stops no other."""
    waiting = list({job.folder: job for job in jobs if not job.finished()}.values())
    running: dict[subprocess.Popen, Job] = {}
    ended, failed, total, kills = 0, 0, len(waiting), 0
    print(f"{len(jobs)} runs, {total} of them to train, in {RUNS}", flush=True)
    try:
        while waiting or running:
            while waiting and len(running) < options.processes:
                job = waiting.pop(0)
                if process := start(job, options):
                    running[process] = job
                else:
                    ended += 1
                    print(f"[{ended}/{total}] of another process: {job.folder}", flush=True)
            time.sleep(0.2)
            for process in [process for process in running if process.poll() is not None]:
                job = running.pop(process)
                if (process.returncode < 0 or process.returncode > 128) and kills < 2 * total:
                    print(f"killed, goes on later: {job.folder}", flush=True)
                    kills += 1
                    waiting.append(job)
                    continue
                ended += 1
                if job.finished():
                    row = job.row(options.name)
                    outcome = f"training {score(row, TRAIN):.2f}, evaluation "
                    outcome += f"{score(row, EVAL):.2f}, {row['wall_time']} s"
                else:
                    failed += 1
                    last = job.log.read_text().strip().splitlines()[-1]
                    outcome = f"FAILED, exit code {process.returncode}: {last} ({job.log})"
                what = f"{job.env_id} {job.setting} seed {job.seed}"
                print(f"[{ended}/{total}] {what}: {outcome}", flush=True)
                try:
                    write_tables(jobs, options)
                except Exception:  # no table is worth the runs
                    traceback.print_exc()
    finally:  # where this is stopped, its runs are as well; their checkpoints go on
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    return failed


def write_tables(jobs: list[Job], options: argparse.Namespace) -> Path | None:
    """Put the finished runs among the rows that are there; returns the path of the summary."""
    experiment, trial = EXPERIMENTS[options.name], options.set or options.timesteps
    trial = bool(trial or options.script_dir != ROOT)
    path = (RUNS / "trials" if trial else RESULTS) / f"{options.name}.csv"
    rows = [*read(path), *(job.row(options.name) for job in jobs if job.finished())]
    if not rows:
        return None

    def place(row: Row) -> tuple:
        envs = [*experiment.envs, row["env_id"]]
        settings = [*experiment.settings, row["setting"].partition("@")[0]]
        position = (envs.index(row["env_id"]), settings.index(settings[-1]))
        return (*position, row["env_id"], row["setting"], int(row["seed"]))

    def table(rows: list[Row]) -> list[Row]:
        """Sorted; of rows of the same run, the last."""
        latest = {(row["env_id"], row["setting"], row["seed"]): row for row in rows}
        return sorted(latest.values(), key=place)

    write(path, table(rows))
    if trial:  # beside what is published
        rows = [*read(RESULTS / path.name), *rows]
    baseline = next(iter(experiment.settings))
    baseline += f"@{options.timesteps}" if options.timesteps else ""
    title = f"{options.name} (trials)" if trial else options.name
    text = report(title, experiment.script, EVAL_EPISODES, table(rows), baseline)
    path.with_suffix(".md").write_text(text)
    return path.with_suffix(".md")


def seed_range(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("name", choices=EXPERIMENTS, help="the experiment")
    add("--envs", nargs="+", help="some of its environments, or others")
    add("--settings", nargs="*", help="some of its settings, or none of them")
    add("--seeds", nargs="+", type=seed_range, default=[], help="1 2 3 or 1-10")
    add("--processes", type=int, default=2, help="runs at a time (default 2)")
    add("--threads", type=int, default=1, help="torch threads of each (default 1)")
    add("--compile", action="store_true", help="train with --compile")
    add("--cuda", action="store_true", help="train with --cuda")
    add("--set", action="append", default=[], help='trial of a setting, "label:--flag value"')
    add("--script-dir", type=Path, default=ROOT, help="trial of changed copies of the scripts")
    add("--timesteps", type=int, help="trial of another length")
    options = parser.parse_args()
    if unknown := {*(options.settings or ())} - {*EXPERIMENTS[options.name].settings}:
        parser.error(f"--settings: {options.name} has no {', '.join(sorted(unknown))}")
    if any(":" not in text for text in options.set):
        parser.error('--set: it is "label:--flag value"')
    options.script_dir = options.script_dir.resolve()
    options.seeds = [seed for seeds in options.seeds for seed in seeds]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    jobs = plan(options)
    try:
        failed = sweep(jobs, options)
    finally:
        print(f"table: {write_tables(jobs, options)}", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
