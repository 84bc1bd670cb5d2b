"""Train environments x seeds x settings in parallel, and make tables and learning curves of it.

    python tests/benchmarks/sweep.py mujoco --jobs 2
    python tests/benchmarks/sweep.py table1 --envs Hopper-v5 --settings none clip-0.2 --seeds 1 2
    python tests/benchmarks/sweep.py mujoco --name trial --envs Hopper-v5 --flags --gamma 0.995
    python tests/benchmarks/sweep.py mujoco --table-only

Finished runs are skipped, those cut off go on where they stopped, one that fails does not stop the
others. Runs: tests/benchmarks/runs/NAME/SETTING/ENV/SEED, with the output in SEED.log. Results:
tests/benchmarks/NAME.csv and NAME.md, of every run in runs/NAME, and figures/NAME.png. Where two
experiments have a setting in common, its runs stand in the folder of one of them.
"""

import argparse
import csv
import fcntl
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
EVAL_EPISODES = 100
WINDOW = 100  # episodes behind a point of a learning curve, as in the table


@dataclass(frozen=True)
class Experiment:
    script: str
    seeds: int  # 1 to this
    envs: dict[str, str]  # environment -> flags it needs in every setting
    settings: dict[str, str] = field(default_factory=lambda: {"defaults": ""})
    env_seeds: dict[str, int] = field(default_factory=dict)  # where it is not `seeds`
    # setting -> (line of the script, what stands there instead), ...
    edits: dict[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    # setting -> folder of the same runs in another experiment: they are trained once
    shared: dict[str, str] = field(default_factory=dict)
    baseline: str = ""  # the setting that the others are compared with
    whole: bool = False  # the mean over all of training as well
    needs: tuple[str, str] = ("", "")  # module beside requirements.txt, and how to install it


PAPER_ENVS = dict.fromkeys(
    "HalfCheetah-v5 Hopper-v5 InvertedDoublePendulum-v5 InvertedPendulum-v5 Reacher-v5 Swimmer-v5 "
    "Walker2d-v5".split(),
    "",
)
# The flags that the README documents for single environments.
SWIMMER = (
    "--num-envs 4 --num-steps 1024 --num-minibatches 16 --learning-rate 6e-4 --gamma 0.9999 "
    "--gae-lambda 0.98"
)
ANT = "--gamma 0.99 --num-minibatches 8 --no-norm-obs"
PENDULUM = (
    "--total-timesteps 200000 --num-envs 16 --num-steps 128 --learning-rate 1e-3 "
    "--final-lr-fraction 0 --gamma 0.95"
)
ACROBOT = (
    "--total-timesteps 500000 --num-envs 16 --num-steps 128 --num-minibatches 8 "
    "--gamma 0.99 --gae-lambda 0.95 --norm-obs"
)
MOUNTAIN_CAR = (
    "--total-timesteps 1000000 --num-envs 16 --num-steps 64 --num-minibatches 4 --update-epochs 4 "
    "--gamma 0.99 --gae-lambda 0.98 --norm-obs --norm-reward"
)
LUNAR_LANDER = (
    "--total-timesteps 1000000 --num-envs 16 --num-steps 256 --num-minibatches 16 "
    "--learning-rate 3e-4 --gamma 0.999 --gae-lambda 0.98 --ent-coef 0.01 --norm-obs --norm-reward"
)
PONG = (
    "--total-timesteps 3000000 --num-envs 16 --num-steps 128 --update-epochs 3 "
    "--num-minibatches 8 --clip-coef 0.2 --learning-rate 1e-3 --bf16"
)
DELTAS = "    deltas = rewards + gamma * next_values * (1 - {}.to(rewards.dtype)) - values"
# Some settings of the ablations need another script. `terminations` stop the bootstrap, `dones` are
# time limits too; without its two lines, a layer starts as PyTorch leaves it.
ABLATION_EDITS = {
    "time-limit-as-death": ((DELTAS.format("terminations"), DELTAS.format("dones")),),
    "default-init": (
        ("    nn.init.orthogonal_(linear.weight, gain)", "    # weights stay as PyTorch drew them"),
        (
            "    nn.init.zeros_(linear.bias)",
            "    # and biases: U(-1 / sqrt(inputs), 1 / sqrt(inputs))",
        ),
    ),
}
NO_STD_FLOOR = {"no-std-floor": (("    min_log_std = -1.5", "    min_log_std = -math.inf"),)}
CONTINUOUS_EDITS = ABLATION_EDITS | NO_STD_FLOOR
# The policy's actions go to the environment as they are, clipped to its bounds.
UNSCALED = (
    ("        scaled = self.center + self.half_range * actions", "        scaled = actions"),
)
# What Ant-v4 and, by a fault of its simulator, Ant-v3 have: the figures of others stand for those.
NO_CONTACT_FORCES = (
    (
        "        env = gym.make(args.env_id, disable_env_checker=True)",
        "        env = gym.make(args.env_id, disable_env_checker=True, "
        "include_cfrc_ext_in_observation=False)",
    ),
)
# The paper's gamma, and the default of ppo_continuous.py before 0.994: what was measured with it.
GAMMA = "--gamma 0.99"
COMMON_ABLATIONS = {
    "defaults": "",
    "no-adv-norm": "--no-norm-adv",
    "value-clip": "--clip-vloss",
    "no-anneal": "--no-anneal-lr",
}

EXPERIMENTS = {
    "mujoco": Experiment("ppo_continuous.py", seeds=5, envs=PAPER_ENVS),
    "mujoco_gamma": Experiment(
        "ppo_continuous.py",
        seeds=5,
        envs=PAPER_ENVS,
        settings={"gamma-0.99": GAMMA, "gamma-0.994": "--gamma 0.994"},
        shared={"gamma-0.994": "mujoco/defaults"},
        baseline="gamma-0.99",
    ),
    "swimmer": Experiment(
        "ppo_continuous.py", seeds=5, envs={"Swimmer-v5": ""}, settings={"documented": SWIMMER}
    ),
    "ant_humanoid": Experiment(
        "ppo_continuous.py",
        seeds=1,
        envs={"Ant-v5": "", "Humanoid-v5": ""},
        settings={
            "defaults": "",
            "gamma-0.99": GAMMA,
            "no-obs-norm": f"{GAMMA} --no-norm-obs",
            "no-std-floor": GAMMA,
            "no-contact-forces": GAMMA,
        },
        edits=NO_STD_FLOOR | {"no-contact-forces": NO_CONTACT_FORCES},
    ),
    "larger_minibatches": Experiment(
        "ppo_continuous.py",
        seeds=3,
        envs={"Ant-v5": "", "Humanoid-v5": ""},
        settings={"256": "--num-minibatches 8", "256-no-obs-norm": ANT},
    ),
    "pendulum": Experiment(
        "ppo_continuous.py",
        seeds=5,
        envs={"Pendulum-v1": ""},
        settings={"documented": PENDULUM, "unscaled": PENDULUM},
        edits={"unscaled": UNSCALED},
    ),
    "classic": Experiment(
        "ppo.py",
        seeds=5,
        envs={"CartPole-v1": "", "Acrobot-v1": ACROBOT, "MountainCar-v0": MOUNTAIN_CAR},
        settings={"documented": ""},
        env_seeds={"CartPole-v1": 10},
    ),
    "lunarlander": Experiment(
        "ppo.py",
        seeds=5,
        envs={"LunarLander-v3": LUNAR_LANDER},
        settings={"documented": ""},
        needs=("Box2D", 'pip install "gymnasium[box2d]"'),
    ),
    "atari": Experiment(
        "ppo_atari.py",
        seeds=2,
        envs={"PongNoFrameskip-v4": PONG},
        settings={"documented": ""},
        whole=True,
    ),
    "ablations": Experiment(
        "ppo_continuous.py",
        seeds=3,
        envs={"HalfCheetah-v5": GAMMA, "Hopper-v5": GAMMA},
        settings={
            **COMMON_ABLATIONS,
            "no-obs-norm": "--no-norm-obs",
            "no-reward-norm": "--no-norm-reward",
            "no-recompute": "--no-recompute-advantages",
            "no-stagger": "--no-stagger",
            **dict.fromkeys(CONTINUOUS_EDITS, ""),
        },
        edits=CONTINUOUS_EDITS,
        shared={"defaults": "mujoco_gamma/gamma-0.99"},
        baseline="defaults",
    ),
    # What ppo.py does not do by default is switched on.
    "ablations_cartpole": Experiment(
        "ppo.py",
        seeds=10,
        envs={"CartPole-v1": ""},
        settings={
            **COMMON_ABLATIONS,
            "with-obs-norm": "--norm-obs",
            "with-reward-norm": "--norm-reward",
            "with-recompute": "--recompute-advantages",
            "no-stagger": "--no-stagger",
            **dict.fromkeys(ABLATION_EDITS, ""),
        },
        edits=ABLATION_EDITS,
        shared={"defaults": "classic/documented"},
        baseline="defaults",
        whole=True,
    ),
    "table1": Experiment(
        "ppo_continuous.py",
        seeds=3,
        envs=dict.fromkeys(PAPER_ENVS, GAMMA),
        settings={
            "none": "--surrogate none",
            "clip-0.1": "--surrogate clip --clip-coef 0.1",
            "clip-0.2": "--surrogate clip --clip-coef 0.2",
            "clip-0.3": "--surrogate clip --clip-coef 0.3",
            "adaptive-0.003": "--surrogate kl-adaptive --kl-target 0.003",
            "adaptive-0.01": "--surrogate kl-adaptive --kl-target 0.01",
            "adaptive-0.03": "--surrogate kl-adaptive --kl-target 0.03",
            "fixed-0.3": "--surrogate kl-fixed --kl-coef 0.3",
            "fixed-1": "--surrogate kl-fixed --kl-coef 1",
            "fixed-3": "--surrogate kl-fixed --kl-coef 3",
            "fixed-10": "--surrogate kl-fixed --kl-coef 10",
        },
        shared={"clip-0.2": "mujoco_gamma/gamma-0.99"},
    ),
}
# Table 1 of the paper: 7 MuJoCo environments (v1) x 3 seeds, 1M steps.
PAPER_TABLE1 = dict(
    zip(
        EXPERIMENTS["table1"].settings,
        (-0.39, 0.76, 0.82, 0.70, 0.68, 0.74, 0.71, 0.62, 0.71, 0.72, 0.69),
        strict=True,
    )
)
# What may differ between runs of one setting: it does not change what is learned.
IRRELEVANT = {"run_dir", "resume", "evaluate", "cuda", "torch_threads", "compile"}


# ---- Training


@dataclass(frozen=True)
class Job:
    env_id: str
    setting: str
    seed: int
    folder: Path
    script: Path
    flags: tuple[str, ...]  # everything but --run-dir and --compile
    args: dict[str, Any]  # what the script makes of them

    def __str__(self) -> str:
        return f"{self.env_id} {self.setting} seed {self.seed}"


class Trainer:
    """Runs jobs as child processes and passes a request to stop on to them."""

    def __init__(self, compile: bool, threads: int) -> None:
        self.compile, self.threads = compile, threads
        self.children: set[subprocess.Popen] = set()
        self.stopping = False

    def stop(self, number: int, frame: object) -> None:
        """Signal handler: let every child save its checkpoint and end."""
        if not self.stopping:
            print("stopping: the runs are saved, the same command goes on with them", flush=True)
        self.stopping = True
        for child in tuple(self.children):
            child.terminate()

    def train(self, job: Job) -> str:
        """Start, resume or skip one run; returns what happened."""
        if self.stopping:
            return "stopped"
        if (job.folder / "summary.json").exists():
            return "skipped: finished before" + stale(job)
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(log_of(job.folder), "a") as log:
            try:  # the child inherits the lock, so it holds even if this program is killed
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return "skipped: another process trains it"
            start = time.time()
            code = 2
            if (job.folder / "checkpoint.pt").exists():
                code = self.run([str(job.script), "--resume", str(job.folder)], log)
            if code == 2 and not self.stopping:  # nothing to go on from
                shutil.rmtree(job.folder, ignore_errors=True)
                extra = ["--compile"] if self.compile else []
                flags = [*job.flags, "--run-dir", str(job.folder), *extra]
                code = self.run([str(job.script), *flags], log)
        if self.stopping:
            return "stopped"
        if code or not (job.folder / "summary.json").exists():
            lines = log_of(job.folder).read_text().strip().splitlines() or ["no output"]
            return f"FAILED with exit code {code}: {lines[-1]} ({log_of(job.folder)})"
        run = load_run(job.folder)
        return (
            f"done: last-100 training mean {number(run.train)}, evaluation {number(run.eval)}, "
            f"{time.time() - start:.0f} s"
        )

    def run(self, command: list[str], log: Any) -> int:  # noqa: ANN401
        if self.stopping:
            return 1
        command = [sys.executable, *command]
        print("$", *command, file=log, flush=True)
        child = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(self.threads)},
            start_new_session=True,  # Ctrl-C reaches it through `stop` only, once
        )
        self.children.add(child)
        if self.stopping:
            child.terminate()
        code = child.wait()
        self.children.discard(child)
        return code


def log_of(folder: Path) -> Path:
    return folder.with_name(folder.name + ".log")


def stale(job: Job) -> str:
    """The first argument in which a finished run differs from what it would be trained with now."""
    config = json.loads((job.folder / "config.json").read_text())
    for name in sorted(job.args.keys() - IRRELEVANT):
        if name not in config:
            return f", before the script had {name} (--redo repeats it)"
        if config[name] != job.args[name]:
            return f", with {name} = {config[name]} instead of {job.args[name]} (--redo repeats it)"
    return ""


def edited(experiment: Experiment, setting: str) -> str:
    """The script that a setting trains with."""
    text = (ROOT / experiment.script).read_text()
    for old, new in experiment.edits.get(setting, ()):
        if (times := text.count(old + "\n")) != 1:
            raise ValueError(
                f"{setting}: this line stands {times} times in {experiment.script}, not once: {old}"
            )
        text = text.replace(old, new)
    return text


def write_script(path: Path, text: str) -> None:
    """At once, as a run may be reading it and another sweep writing it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def shared(experiment: Experiment, runs: Path) -> dict[str, str]:
    """The settings whose runs stand in another experiment's folder; trials have their own."""
    return experiment.shared if EXPERIMENTS.get(runs.name) is experiment else {}


def plan(options: argparse.Namespace, experiment: Experiment, runs: Path) -> list[Job]:
    """All selected jobs, the first seed of everything first. Wrong flags end the program here."""
    import tyro

    arguments = load_script(ROOT / experiment.script).Args
    suffix = "".join(f" {flag}" for flag in options.flags)
    suffix = suffix.replace(" --", "+").replace(" ", "=").replace("/", "-")
    jobs = []
    for env_id in options.envs or experiment.envs:
        seeds = options.seeds or range(1, experiment.env_seeds.get(env_id, experiment.seeds) + 1)
        for setting in options.settings or experiment.settings:
            own = f"{experiment.envs.get(env_id, '')} {experiment.settings[setting]}".split()
            for seed in seeds:
                flags = ["--env-id", env_id, "--seed", str(seed)]
                flags += ["--eval-episodes", str(EVAL_EPISODES), *own, *options.flags]
                args = tyro.cli(arguments, args=flags)
                args.check()
                folder = runs / (setting + suffix)
                own_script = setting in experiment.edits
                script = (folder if own_script else runs) / experiment.script
                if setting in shared(experiment, runs) and not suffix:
                    folder = runs.parent / experiment.shared[setting]
                folder = folder / env_id.replace("/", "-") / str(seed)
                jobs.append(Job(env_id, setting, seed, folder, script, tuple(flags), vars(args)))
    return sorted(jobs, key=lambda job: job.seed)


def cores() -> int:
    """Processors this program may use; `taskset` may have left it fewer than there are."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def sweep(options: argparse.Namespace, experiment: Experiment, runs: Path) -> int:
    """Train what is missing; returns the exit code."""
    module, install = experiment.needs
    if module and importlib.util.find_spec(module) is None:
        raise ValueError(f"{', '.join(experiment.envs)}: needs {module}, an extra: {install}")
    jobs = plan(options, experiment, runs)
    # Copies: edits made meanwhile do not reach later runs.
    for script, setting in {job.script: job.setting for job in jobs}.items():
        write_script(script, edited(experiment, setting))
    if options.redo:
        for job in jobs:
            if (job.folder / "summary.json").exists() and stale(job):
                shutil.rmtree(job.folder)
    trainer = Trainer(options.compile, max(1, cores() // options.jobs))
    failures = 0
    for number_ in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number_, trainer.stop)
    print(f"{len(jobs)} runs, {options.jobs} at a time, in {runs.relative_to(ROOT)}", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = {pool.submit(trainer.train, job): job for job in jobs}
        for i, future in enumerate(as_completed(futures), 1):
            try:
                outcome = future.result()
            except Exception as error:
                outcome = f"FAILED: {error!r}"
            failures += outcome.startswith("FAILED")
            if not trainer.stopping:
                print(f"[{i}/{len(jobs)}] {futures[future]} {outcome}", flush=True)
    return 130 if trainer.stopping else int(failures > 0)


# ---- Results


@dataclass
class Run:
    env_id: str
    setting: str
    seed: int
    train: float  # mean return of the last 100 training episodes
    eval: float  # mean return of the evaluation episodes
    steps: int
    sps: float
    config: dict[str, Any]
    folder: Path
    date: str

    @functools.cached_property
    def episodes(self) -> np.ndarray:
        """Step and return of every training episode, (episodes, 2)."""
        path = self.folder / "episodes.csv"
        return np.loadtxt(path, delimiter=",", skiprows=1, usecols=(0, 1), ndmin=2)

    @property
    def whole(self) -> float:
        """Mean return of all training episodes, the paper's measure of fast learning."""
        return float(self.episodes[:, 1].mean()) if len(self.episodes) else math.nan

    def curve(self, grid: np.ndarray) -> np.ndarray:
        """Mean return of the last 100 episodes at each step of the grid; NaN before the first."""
        rows = self.episodes
        if not len(rows):
            return np.full(len(grid), np.nan)
        total = np.concatenate([[0.0], rows[:, 1].cumsum()])
        ends = np.searchsorted(rows[:, 0], grid, side="right")
        starts = np.maximum(ends - WINDOW, 0)
        counts = ends - starts
        return np.where(counts, (total[ends] - total[starts]) / np.maximum(counts, 1), np.nan)


def load_run(folder: Path, setting: str | None = None) -> Run:
    """A finished run; its setting is the folder's unless it is another experiment's."""
    summary = json.loads((folder / "summary.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    scores = (summary["train_return_last100"], summary["eval_return_mean"])
    train, eval_ = (math.nan if score is None else score for score in scores)
    return Run(
        env_id=config["env_id"],
        setting=setting or folder.parts[-3],
        seed=config["seed"],
        train=train,
        eval=eval_,
        steps=summary["global_step"],
        sps=summary["SPS"],
        config=config,
        folder=folder,
        date=time.strftime("%Y-%m-%d", time.localtime(os.stat(folder / "summary.json").st_mtime)),
    )


def load_runs(experiment: Experiment, folder: Path) -> tuple[list[Run], list[str]]:
    """The finished runs, in the experiment's order, and the names of those not finished."""
    elsewhere = shared(experiment, folder)
    found = [path for path in folder.glob("*/*/*") if path.is_dir()]
    found = [path for path in found if path.parts[-3] not in elsewhere]
    finished = [path for path in found if (path / "summary.json").exists()]
    unfinished = sorted(str(path.relative_to(folder)) for path in set(found) - set(finished))
    runs = [load_run(path) for path in finished]
    own = {(run.env_id, run.seed) for run in runs}  # others' runs stand beside these only
    every = argparse.Namespace(envs=None, settings=list(elsewhere), seeds=None, flags=[])
    for job in plan(every, experiment, folder) if elsewhere else ():
        if (job.env_id, job.seed) not in own:
            continue
        name = str(job.folder.relative_to(folder.parent))
        if not (job.folder / "summary.json").exists():
            unfinished += [name] if job.folder.exists() else []
        elif reason := stale(job):
            unfinished.append(f"{name} ({reason.removeprefix(', ')})")
        else:
            runs.append(load_run(job.folder, job.setting))
    envs, settings = list(experiment.envs), list(experiment.settings)

    def order(run: Run) -> tuple:
        setting = run.setting.split("+")[0]
        return (
            envs.index(run.env_id) if run.env_id in envs else len(envs),
            run.env_id,
            settings.index(setting) if setting in settings else len(settings),
            run.setting,
            run.seed,
        )

    return sorted(runs, key=order), unfinished


def number(x: float, like: float | None = None) -> str:
    """Rounded to what the spread of scores lets one read, or to as many decimals as another."""
    size = abs(x if like is None else like)
    return "-" if math.isnan(x) else f"{x:.{0 if size >= 1000 else 1 if size >= 20 else 2}f}"


def mean_std(values: list[float]) -> str:
    """Mean +- sample standard deviation."""
    mean = statistics.fmean(values)
    spread = f" ± {number(statistics.stdev(values), mean)}" if len(values) > 1 else ""
    return number(mean) + spread


def groups(runs: list[Run]) -> dict[tuple[str, str], list[Run]]:
    result: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        result.setdefault((run.env_id, run.setting), []).append(run)
    return result


def markdown(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def write_csv(path: Path, header: list[str], rows: list[list[Any]], comment: str) -> None:
    with open(path, "w", newline="") as file:
        file.write(f"# {comment}\n")
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file that write_csv has written."""
    with open(path) as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def measured(*packages: str) -> str:
    """When, where and with what a benchmark that has just run was measured."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    python = f"python {sys.version.split()[0]}"
    return f"Measured {time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPU cores, " + ", ".join(
        [python, *versions]
    )


def unedited(run: Run, experiment: Experiment) -> str:
    """The script of a run as it is without the setting's own edits."""
    text = (run.folder / "script.py").read_text()
    for old, new in experiment.edits.get(run.setting.split("+")[0], ()):
        text = text.replace(new, old)
    return text


def provenance(runs: list[Run], experiment: Experiment) -> str:
    """One line: when, with which versions, and whether all runs are of one kind."""
    dates = sorted({run.date for run in runs})
    text = f"Measured {dates[0]}" + (f" to {dates[-1]}" if len(dates) > 1 else "")
    for name in ("python", "torch", "gymnasium", "numpy"):
        versions = {run.config["versions"][name].split()[0] for run in runs}
        text += f", {name} {' / '.join(sorted(versions))}"
    simulators = {
        "mujoco": any(run.env_id.endswith("-v5") and "/" not in run.env_id for run in runs),
        "ale-py": experiment.script == "ppo_atari.py",
        "box2d": experiment.needs[0] == "Box2D",
    }
    for name in (name for name, used in simulators.items() if used):
        text += f", {name} {importlib.metadata.version(name)}"
    compiled = sum(run.config["compile"] for run in runs)
    text += f"; {'all' if compiled == len(runs) else compiled or 'no'} runs with --compile"
    devices = {"GPU" if run.config["cuda"] else "CPU" for run in runs}
    text += f", on {' and '.join(sorted(devices))}"
    versions = {unedited(run, experiment) for run in runs}
    return text + (f"; {len(versions)} versions of the script" if len(versions) > 1 else "") + "."


def scores(experiment: Experiment) -> dict[str, str]:
    """Attribute of a run -> the heading of its column."""
    result = {"train": "training, last 100"}
    result |= {"whole": "training, all episodes"} if experiment.whole else {}
    return result | {"eval": f"evaluation, {EVAL_EPISODES} episodes"}


def difference(values: list[float], base: list[float]) -> str:
    """Between two means, +- its standard error."""
    if not base:
        return "-"
    mean = statistics.fmean(values) - statistics.fmean(base)
    # As many decimals as the means have
    text = f"{'+' if mean > 0 else ''}{number(mean, statistics.fmean(base))}"
    if min(len(values), len(base)) > 1:
        error = math.sqrt(sum(statistics.variance(x) / len(x) for x in (values, base)))
        text += f" ± {number(error, statistics.fmean(base))}"
    return text


def write_tables(name: str, experiment: Experiment, runs: list[Run], unfinished: list[str]) -> None:
    comment = provenance(runs, experiment)
    own_name = next(key for key, value in EXPERIMENTS.items() if value is experiment)
    command = f"python tests/benchmarks/sweep.py {own_name}"
    command += f" --name {name}" if name != own_name else ""
    table, each, csv_rows = [], [], []
    several, headings = len({run.setting for run in runs}) > 1, scores(experiment)
    compared = bool(experiment.baseline) and several
    for (env_id, setting), members in groups(runs).items():
        values = {key: [getattr(run, key) for run in members] for key in headings}
        steps = max(run.steps for run in members)
        sps = round(statistics.median(run.sps for run in members))
        row = [env_id, setting] if several else [env_id]
        row += [len(members), f"{steps:,}"]
        base = setting.replace(setting.split("+")[0], experiment.baseline, 1)
        for key in headings:
            row.append(mean_std(values[key]))
            if compared:
                others = groups(runs).get((env_id, base), []) if setting != base else []
                row.append(difference(values[key], [getattr(run, key) for run in others]))
        seeds = [" ".join(map(number, values[key])) for key in headings]
        if compared:  # a table of its own, as this one is wide enough
            each.append([env_id, setting, *seeds])
        else:
            row += seeds
        table.append([*row, f"{sps:,}"])
        csv_row = [env_id, setting, " ".join(str(run.seed) for run in members), steps]
        for x in values.values():
            spread = statistics.stdev(x) if len(x) > 1 else math.nan
            csv_row += [f"{statistics.fmean(x):.6g}", f"{spread:.4g}".replace("nan", "")]
        csv_row += [" ".join(f"{score:.6g}" for score in x) for x in values.values()]
        csv_rows.append([*csv_row, sps])
    header = ["environment"] + ["setting"] * several + ["seeds", "steps"]
    for heading in headings.values():
        header += [heading, f"difference to {experiment.baseline}"] if compared else [heading]
    titles = {"train": "training", "whole": "training, all", "eval": "evaluation"}
    seeds = [f"{titles[key]}, each seed" for key in headings]
    header += [] if compared else seeds
    text = (
        f"# {name}\n\n`{command}` trains with `{experiment.script}`. "
        f"{comment}\n\nTraining: mean return of the last 100 training episodes"
    )
    text += ", and of all of them, which rewards fast learning" if experiment.whole else ""
    kind = "sampled actions" if experiment.script == "ppo_atari.py" else "deterministic"
    text += (
        f". Evaluation: mean return of {EVAL_EPISODES} episodes of the final policy, {kind}, one "
        f"in each of {EVAL_EPISODES} fresh environments. All are means over seeds ± sample "
        "standard deviation over seeds. No finished run is left out. SPS is that of runs trained "
        "side by side, not a speed measurement."
    )
    text += " Differences are between means ± their standard error." if compared else ""
    text += "\n\n" + markdown([*header, "median SPS"], table)
    if compared:
        text += "\n" + markdown(["environment", "setting", *seeds], each)
    text += "\nFlags beside the defaults:\n"
    for env_id, flags in experiment.envs.items():
        text += f"- {env_id}: `{flags}`\n" if flags else ""
    changes = ""
    for setting in dict.fromkeys(run.setting for run in runs):
        base, *extra = setting.split("+")
        own = experiment.settings.get(base, "") + "".join(f" --{flag}" for flag in extra)
        text += f"- {setting}: {f'`{own.strip()}`' if own else 'none'}"
        text += ", but a changed script\n" if base in experiment.edits else "\n"
        if base in experiment.edits and (edits := experiment.edits[base]):
            lines = [f"-{old}" for old, _ in edits] + [f"+{new}" for _, new in edits]
            changes += "\n".join([f"\n{base}:\n\n```diff", *lines, "```\n"])
    text += changes
    if unfinished:
        text += f"\nNot finished: {', '.join(unfinished)}.\n"
    if experiment is EXPERIMENTS["table1"]:
        text += "\n" + normalised_scores(name, experiment, runs)
    if (HERE / "figures" / f"{name}.png").exists():
        title = "Scores of each seed" if experiment.baseline else "Learning curves"
        text += f"\n![{title}](figures/{name}.png)\n"
    (HERE / f"{name}.md").write_text(text)
    header = "environment setting seeds steps".split()
    header += [f"{key}_{statistic}" for key in headings for statistic in ("mean", "std")]
    header += [*(f"{key}_each_seed" for key in headings), "median_SPS"]
    write_csv(HERE / f"{name}.csv", header, csv_rows, comment)


# ---- The paper's normalised score


def random_score(env_id: str, episodes: int = 100) -> float:
    """Mean return of uniformly random actions, measured once and kept in random_scores.csv."""
    import gymnasium as gym

    path = HERE / "random_scores.csv"
    known = read_csv(path) if path.exists() else []
    for row in known:
        if row["environment"] == env_id:
            return float(row["mean"])
    env = gym.make(env_id, disable_env_checker=True)
    env.action_space.seed(0)
    returns = []
    for episode in range(episodes):
        env.reset(seed=episode)
        total, ended = 0.0, False
        while not ended:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, ended = total + float(reward), terminated or truncated
        returns.append(total)
    env.close()
    mean, spread = statistics.fmean(returns), statistics.stdev(returns)
    rows = [list(row.values()) for row in known]
    rows.append([env_id, f"{mean:.6g}", f"{spread:.4g}", str(episodes)])
    comment = "returns of a policy that acts uniformly at random"
    write_csv(path, ["environment", "mean", "std", "episodes"], sorted(rows), comment)
    return mean


def compared(runs: list[Run]) -> list[Run]:
    """The runs of environments and seeds that every setting was trained with.

    Without this rule a setting could win by the environments that it was trained in.
    """
    settings = {run.setting for run in runs}
    trained = {(run.env_id, run.seed, run.setting) for run in runs}
    return [
        run
        for run in runs
        if all((run.env_id, run.seed, setting) in trained for setting in settings)
    ]


def best_settings(runs: list[Run]) -> dict[str, float]:
    """Environment -> mean of the setting that did best there."""
    result: dict[str, float] = {}
    for (env_id, _), members in groups(runs).items():
        mean = statistics.fmean(run.train for run in members)
        result[env_id] = max(mean, result.get(env_id, -math.inf))
    return result


def normalised(runs: list[Run], random: dict[str, float]) -> dict[str, list[float]]:
    """Setting -> score of each run: 0 is the random policy, 1 the environment's best setting."""
    result: dict[str, list[float]] = {}
    best = best_settings(runs)
    for run in runs:
        low, high = random[run.env_id], best[run.env_id]
        result.setdefault(run.setting, []).append((run.train - low) / (high - low))
    return result


def normalised_scores(name: str, experiment: Experiment, runs: list[Run]) -> str:
    """Table 1 of the paper, from the runs that are there."""
    runs = compared(runs)
    if not runs:
        return "## Normalised scores\n\nNo environment was trained with every setting yet.\n"
    random = {run.env_id: random_score(run.env_id) for run in runs}
    by_setting = normalised(runs, random)
    rows = [
        [
            setting,
            len(values),
            f"{statistics.fmean(values):.2f}",
            f"{PAPER_TABLE1[setting.split('+')[0]]:.2f}",
        ]
        for setting, values in by_setting.items()
    ]
    header = ["setting", "runs", "our score", "the paper's"]
    write_csv(HERE / f"{name}_scores.csv", header, rows, provenance(runs, experiment))
    best = best_settings(runs)
    environments = ", ".join(
        f"{env_id} ({number(random[env_id])}, {number(high)}; seeds "
        + " ".join(map(str, sorted({run.seed for run in runs if run.env_id == env_id})))
        + ")"
        for env_id, high in best.items()
    )
    return (
        "## Normalised scores\n\nThe paper's statistic: the mean of the last 100 training "
        "episodes, scaled so that 0 is a random policy (100 episodes of uniformly random actions) "
        "and 1 the best setting's mean in that environment, averaged over all runs. Only "
        "environments and seeds that every setting was trained with count. "
        f"Ours: {len(best)} environments (random, best): {environments}. "
        "The paper's: 7 environments x 3 seeds with its own hyperparameters.\n\n"
        + markdown(header, rows)
    )


# ---- Learning curves


def colour(setting: str, index: int) -> Any:  # noqa: ANN401
    """A family of settings (clip-0.1, clip-0.2, ...) shares a hue."""
    import matplotlib

    families = {"clip": "Blues", "adaptive": "Greens", "fixed": "Oranges"}
    setting = setting.split("+")[0]
    kind = setting.split("-")[0]
    if setting not in PAPER_TABLE1:
        return f"C{index % 10}"
    if kind not in families:
        return "0.2"
    members = [name for name in PAPER_TABLE1 if name.startswith(kind)]
    shade = 0.4 + 0.55 * members.index(setting) / (len(members) - 1)
    return matplotlib.colormaps[families[kind]](shade)


def plot_curve(axis: Any, members: list[Run], shade: Any, band: float, label: str) -> None:  # noqa: ANN401
    """Mean over seeds, and a band from the lowest to the highest."""
    grid = np.linspace(0, max(run.steps for run in members), 201)[1:]
    curves = np.array([run.curve(grid) for run in members])
    seen = ~np.isnan(curves).any(axis=0)
    grid, curves = grid[seen] / 1e6, curves[:, seen]
    if not len(grid):
        return
    axis.plot(grid, curves.mean(axis=0), color=shade, label=label, linewidth=1.5)
    axis.fill_between(
        grid, curves.min(axis=0), curves.max(axis=0), color=shade, alpha=band, linewidth=0
    )
    axis.set_xlabel("environment steps (millions)", fontsize=9)
    axis.set_ylabel("return, last 100 episodes", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3, linewidth=0.5)
    axis.set_xlim(left=0)


def draw_scores(name: str, experiment: Experiment, runs: list[Run]) -> None:
    """A row an environment, a panel a score: a dot each seed, a bar at each setting's mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    envs = list(dict.fromkeys(run.env_id for run in runs))
    settings = list(dict.fromkeys(run.setting for run in runs))
    headings = scores(experiment)
    size = (1.2 + 3.2 * len(headings), 0.7 + len(envs) * (0.7 + 0.24 * len(settings)))
    figure, axes = plt.subplots(
        len(envs),
        len(headings),
        figsize=size,
        sharey=True,
        squeeze=False,
        layout="constrained",
        facecolor="white",
    )
    for row, env_id in zip(axes, envs, strict=True):
        for axis, (key, heading) in zip(row, headings.items(), strict=True):
            for i, setting in enumerate(settings):
                members = groups(runs).get((env_id, setting), [])
                values = [getattr(run, key) for run in members]
                if not values:
                    continue
                basis = setting.split("+")[0] == experiment.baseline
                shade, mean = "C1" if basis else "C0", statistics.fmean(values)
                spread = np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else [0]
                axis.scatter(
                    values, i + np.array(spread), s=14, color=shade, alpha=0.6, linewidth=0
                )
                axis.plot([mean, mean], [i - 0.35, i + 0.35], color=shade, linewidth=2)
                if basis:
                    axis.axvline(mean, color="0.4", linewidth=0.8, linestyle=":")
            axis.set_yticks(range(len(settings)), settings)
            axis.set_title(env_id, fontsize=10)
            axis.set_xlabel(f"mean return: {heading}", fontsize=9)
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.3, linewidth=0.5)
        row[0].set_ylabel("setting", fontsize=9)
    axes[0, 0].set_ylim(len(settings) - 0.5, -0.5)
    title = f"A dot a seed, a bar at their mean; dotted line: mean of {experiment.baseline}"
    figure.suptitle(title, fontsize=11)
    save(figure, HERE / "figures" / f"{name}.png")
    plt.close(figure)


def draw(name: str, runs: list[Run]) -> None:
    """A panel an environment, a line a setting: mean over seeds, band from minimum to maximum."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    envs = list(dict.fromkeys(run.env_id for run in runs))
    settings = list(dict.fromkeys(run.setting for run in runs))
    columns = min(len(envs), 4 if len(envs) > 6 else 3)
    lines = math.ceil(len(envs) / columns)
    size = (4 * columns, 3 * lines + 0.6)
    figure, axes = plt.subplots(
        lines, columns, figsize=size, squeeze=False, layout="constrained", facecolor="white"
    )
    for axis in axes.flat[len(envs) :]:
        axis.set_visible(False)
    for (env_id, setting), members in groups(runs).items():
        axis = axes.flat[envs.index(env_id)]
        shade = colour(setting, settings.index(setting))
        plot_curve(axis, members, shade, 0.2 if len(settings) < 4 else 0.08, setting)
        axis.set_title(f"{env_id} ({len(members)} seed{'s' * (len(members) > 1)})", fontsize=10)
    if len(settings) > 1:
        entries: dict[str, Any] = {}
        for axis in axes.flat:
            handles, labels = axis.get_legend_handles_labels()
            entries |= dict(zip(labels, handles, strict=True))
        chosen = {setting: entries[setting] for setting in settings if setting in entries}
        ncols = min(6, max(1, int(12 * size[0] / (8 + max(map(len, chosen))))))
        figure.legend(
            chosen.values(), chosen.keys(), loc="outside lower center", ncols=ncols, fontsize=9
        )
    title = "Training returns: mean over seeds, band from lowest to highest"
    figure.suptitle(title.replace(", ", ",\n") if len(envs) == 1 else title, fontsize=11)
    save(figure, HERE / "figures" / f"{name}.png")
    plt.close(figure)


def save(figure: Any, path: Path, limit: int = 300_000) -> None:  # noqa: ANN401
    """Write an opaque PNG, coarser where it would be larger than the limit in bytes."""
    path.parent.mkdir(exist_ok=True)
    for dpi in (120, 90, 60):
        figure.savefig(path, dpi=dpi, facecolor="white", transparent=False)
        if path.stat().st_size < limit:
            return


# ---- Command line


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("experiment", choices=EXPERIMENTS)
    add("--jobs", type=int, default=2, help="runs at a time, sharing the cores (default 2)")
    add("--envs", nargs="+", help="some of the experiment's environments, or others")
    add("--settings", nargs="+", help="some of the experiment's settings")
    add("--seeds", nargs="+", type=int, help="instead of the experiment's seeds")
    add("--name", help="folder of the runs and name of the results; default: the experiment's")
    add("--compile", action="store_true", help="pass --compile to all runs")
    add("--redo", action="store_true", help="repeat finished runs made with other arguments")
    add("--table-only", action="store_true", help="train nothing")
    add("--flags", nargs=argparse.REMAINDER, default=[], help="last: more flags for the script")
    options = parser.parse_args()
    experiment = EXPERIMENTS[options.experiment]
    if unknown := set(options.settings or ()) - experiment.settings.keys():
        parser.error(f"--settings {' '.join(unknown)}: there are {' '.join(experiment.settings)}")
    # Trials stay out of the published table.
    options.name = options.name or options.experiment + ("_trials" if options.flags else "")
    return options


def main() -> None:
    options = parse()
    experiment, folder = EXPERIMENTS[options.experiment], HERE / "runs" / options.name
    try:
        code = 0 if options.table_only else sweep(options, experiment, folder)
    except ValueError as error:
        sys.exit(f"error: {error}")
    runs, unfinished = load_runs(experiment, folder)
    if runs:
        if experiment.baseline:
            draw_scores(options.name, experiment, runs)
        else:
            draw(options.name, runs)
        write_tables(options.name, experiment, runs, unfinished)
        print((HERE / f"{options.name}.md").read_text())
    else:
        print(f"no finished runs in {folder.relative_to(ROOT)}")
    sys.exit(code)


if __name__ == "__main__":
    main()
