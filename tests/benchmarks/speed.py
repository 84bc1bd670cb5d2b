"""Environment steps a second (SPS) of our scripts against stable-baselines3, interleaved.

    pip install -r tests/benchmarks/requirements.txt
    python tests/benchmarks/speed.py cartpole cartpole-compile --pairs 5

Ours, theirs, ours, theirs, ...: each in a process of its own, with as many torch threads; the
ratio of each pair and the median ratio count, as the speed of a machine drifts. Both sides run the
same number of steps; the first fifth of the iterations, where libraries warm up and compile, is
left out on both. Our records are on, stable-baselines3's are its Monitor and its logger.
Results: tests/benchmarks/speed.csv, a row a pair, and speed.md. A new measurement of a setting
replaces its old one.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweep import HERE, ROOT, markdown, measured


@dataclass(frozen=True)
class Setting:
    what: str
    command: str  # ours, without --total-timesteps
    steps: int
    env_id: str  # from here on, stable-baselines3's side
    num_envs: int
    ppo: dict[str, Any]
    target: float | None = None  # of the median ratio
    threads: int = 1  # torch's, on both sides; 0: one a core
    policy: str = "MlpPolicy"


CARTPOLE = Setting(
    what="CartPole-v1, 4 envs x 128 steps, 4 epochs x 4 minibatches (CleanRL's settings)",
    command="ppo.py --env-id CartPole-v1 --num-envs 4 --num-steps 128 --update-epochs 4 "
    "--num-minibatches 4 --learning-rate 2.5e-4 --gamma 0.99 --gae-lambda 0.95 --clip-vloss "
    "--ent-coef 0.01",
    steps=200_000,
    env_id="CartPole-v1",
    num_envs=4,
    ppo={
        "n_steps": 128,
        "batch_size": 128,
        "n_epochs": 4,
        "learning_rate": 2.5e-4,
        "clip_range_vf": 0.2,
        "ent_coef": 0.01,
    },
    target=1.7,
)
HALFCHEETAH = Setting(
    what="HalfCheetah-v5, 1 env x 2048 steps, 10 epochs x 32 minibatches "
    "(stable-baselines3's defaults, without normalisation on both sides)",
    command="ppo_continuous.py --env-id HalfCheetah-v5 --num-envs 1 --num-steps 2048 "
    "--update-epochs 10 --num-minibatches 32 --no-recompute-advantages --no-norm-obs "
    "--no-norm-reward --no-anneal-lr --gamma 0.99",
    steps=81_920,
    env_id="HalfCheetah-v5",
    num_envs=1,
    ppo={},  # its defaults
    target=1.5,
)
ATARI = Setting(
    what="Breakout, 8 envs x 128 steps, 4 epochs x 4 minibatches",
    command="ppo_atari.py --env-id ALE/Breakout-v5 --num-envs 8 --num-steps 128 "
    "--update-epochs 4 --num-minibatches 4",
    steps=20_480,
    target=1.7,
    env_id="BreakoutNoFrameskip-v4",
    num_envs=8,
    ppo={
        "n_steps": 128,
        "batch_size": 256,
        "n_epochs": 4,
        "learning_rate": 2.5e-4,
        "clip_range": 0.1,
        "clip_range_vf": 0.1,
        "ent_coef": 0.01,
    },
    threads=0,
    policy="CnnPolicy",
)


def variant(setting: Setting, **changes: Any) -> Setting:  # noqa: ANN401
    return Setting(**{**vars(setting), **changes})


SETTINGS = {
    "cartpole": CARTPOLE,
    "cartpole-compile": variant(
        CARTPOLE,
        what=CARTPOLE.what + ", ours with --compile",
        command=CARTPOLE.command + " --compile",
        target=2.2,
    ),
    "halfcheetah-sb3": HALFCHEETAH,
    "halfcheetah-sb3-compile": variant(
        HALFCHEETAH,
        what=HALFCHEETAH.what + ", ours with --compile",
        command=HALFCHEETAH.command + " --compile",
    ),
    "halfcheetah-defaults": variant(
        HALFCHEETAH,
        what="HalfCheetah-v5, each with its own defaults",
        command="ppo_continuous.py --env-id HalfCheetah-v5",
        target=2.2,
    ),
    "halfcheetah-compile": variant(
        HALFCHEETAH,
        what="HalfCheetah-v5, each with its own defaults, ours with --compile",
        command="ppo_continuous.py --env-id HalfCheetah-v5 --compile",
        target=2.2,
    ),
    "atari": ATARI,
    "atari-bf16": variant(
        ATARI,
        what=ATARI.what + ", ours with --bf16",
        command=ATARI.command + " --bf16",
        target=2.5,
    ),
    "atari-bf16-compile": variant(
        ATARI,
        what=ATARI.what + ", ours with --bf16 --compile",
        command=ATARI.command + " --bf16 --compile",
        target=2.5,
    ),
}


def rate(steps: list[float], clock: list[float]) -> float:
    """SPS after the first fifth of the iterations; one entry at the end of each iteration."""
    first = max(1, len(steps) // 5)
    return (steps[-1] - steps[first]) / (clock[-1] - clock[first])


def ours(setting: Setting, threads: int, device: str) -> tuple[float, float]:
    """SPS, and the seconds from process start to the end of the first iteration."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--total-timesteps", str(setting.steps), "--torch-threads", str(threads)]
        flags += ["--eval-episodes", "0", "--run-dir", f"{folder}/run"]
        flags += ["--cuda" if device == "cuda" else "--no-cuda"]
        start = time.time()
        run([*setting.command.split(), *flags], threads)
        total = time.time() - start
        with open(Path(folder, "run", "metrics.csv")) as file:
            rows = list(csv.DictReader(file))
    steps, clock = ([float(row[name]) for row in rows] for name in ("global_step", "wall_time"))
    return rate(steps, clock), total - (clock[-1] - clock[0])


def theirs(name: str, steps: int, threads: int, device: str) -> float:
    command = [__file__, name, "--child", "--steps", str(steps), "--device", device]
    return float(run(command, threads).splitlines()[-1])


def run(command: list[str], threads: int) -> str:
    """Run a Python program; returns what it printed."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True
    )
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {result.stderr[-2000:]}")
    return result.stdout


def child(setting: Setting, steps: int, device: str) -> None:
    """Train with stable-baselines3 and print its SPS."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rows: list[tuple[float, float]] = []

    class Clock(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:  # the end of the previous iteration
            rows.append((self.num_timesteps, time.time()))

        def _on_training_end(self) -> None:
            rows.append((self.num_timesteps, time.time()))

    if setting.policy == "CnnPolicy":
        import ale_py
        import gymnasium

        gymnasium.register_envs(ale_py)
        envs = VecFrameStack(make_atari_env(setting.env_id, setting.num_envs, seed=1), 4)
    else:
        envs = make_vec_env(setting.env_id, setting.num_envs, seed=1)
    agent = PPO(setting.policy, envs, seed=1, device=device, **setting.ppo)
    agent.learn(steps, callback=Clock())
    print(rate(*zip(*rows[1:], strict=True)))


def merge(results: list[list[str]]) -> list[list[str]]:
    """Write speed.csv: the new rows, and the old ones of settings not measured now."""
    path = HERE / "speed.csv"
    header = "setting pair ours_SPS sb3_SPS ratio ours_first_iteration_s device provenance".split()
    new = {row[0] for row in results}
    old: list[list[str]] = []
    if path.exists():
        with open(path) as file:
            old = [row for row in list(csv.reader(file))[1:] if row[0] not in new]
    rows = sorted(old + results, key=lambda row: (list(SETTINGS).index(row[0]), int(row[1])))
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return rows


def report(rows: list[list[str]]) -> str:
    table, notes = [], []
    for name, setting in SETTINGS.items():
        mine = [row for row in rows if row[0] == name]
        if not mine:
            continue
        ours_, theirs_, ratios, first = (
            [float(row[column]) for row in mine] for column in (2, 3, 4, 5)
        )
        table.append(
            [
                name,
                f"{statistics.median(ours_):,.0f}",
                f"{statistics.median(theirs_):,.0f}",
                " ".join(f"{ratio:.2f}" for ratio in ratios),
                f"**{statistics.median(ratios):.2f}**",
                "-" if setting.target is None else f"{setting.target}",
                f"{statistics.median(first):.1f}",
            ]
        )
        notes.append(
            f"- {name}: {setting.what}. `{setting.command}`, on {mine[0][6]}. {mine[0][7]}."
        )
    header = ["setting", "ours, SPS", "stable-baselines3, SPS", "ratio of each pair"]
    header += ["median ratio", "target", "ours: start-up, compiling, first iteration, s"]
    return (
        "# Speed\n\n`python tests/benchmarks/speed.py "
        + " ".join(row[0] for row in table)
        + "`\n\n"
        "Environment steps a second (median over pairs), ours and stable-baselines3's in turn, "
        "each in a process of its own. The first fifth of the iterations is left out on both "
        "sides.\n\n" + markdown(header, table) + "\n" + "\n".join(notes) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="+", choices=SETTINGS)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, help="instead of each setting's own number")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    results = []
    for name in options.settings:
        setting = SETTINGS[name]
        setting = variant(setting, steps=options.steps or setting.steps)
        if options.child:
            return child(setting, setting.steps, options.device)
        threads = setting.threads or os.cpu_count() or 1
        packages = ("torch", "gymnasium", "numpy", "stable-baselines3")
        where = f"{options.device}, torch threads: {threads}"
        for pair in range(1, options.pairs + 1):
            mine, first = ours(setting, threads, options.device)
            other = theirs(name, setting.steps, threads, options.device)
            row = [f"{mine:.0f}", f"{other:.0f}", f"{mine / other:.3f}", f"{first:.1f}"]
            results.append([name, str(pair), *row, where, measured(*packages)])
            print(f"{name} pair {pair}: {row[0]} / {row[1]} SPS = {row[2]}", flush=True)
    text = report(merge(results))
    (HERE / "speed.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
