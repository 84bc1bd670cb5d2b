"""Environment steps a second (SPS) of our scripts against another implementation, in turn.

    pip install -r tests/benchmarks/requirements.txt
    python tests/benchmarks/speed.py cartpole halfcheetah-sb3            # stable-baselines3
    python tests/benchmarks/speed.py cartpole --against sbx --python VENV/bin/python
    python tests/benchmarks/speed.py cartpole --against CLEANRL/ppo.py --python VENV/bin/python
    python tests/benchmarks/speed.py cartpole --against OTHER/FOLDER     # a copy of our scripts

Ours, theirs, theirs, ours, ...: each in a process of its own, with as many torch threads and
steps. The ratio of each pair and the median of the ratios count, as the speed of a machine drifts.
The first fifth of the iterations, where libraries warm up and compile, is left out on both sides.
Our records are on, stable-baselines3's and SBX's are Monitor and logger, CleanRL's TensorBoard.
CleanRL runs with its own defaults, in an environment of gymnasium 0.29.1 that has no v5 robots.
Results: results/speed.csv, a row a pair, and speed.md; with --steps or against a copy of ours,
runs/trials/speed.csv and .md instead.
"""

import argparse
import importlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tables import RESULTS, ROOT, RUNS, Row, grouped, markdown, measured, read, write

SB3, SBX = "stable-baselines3", "sbx"


@dataclass(frozen=True)
class Setting:
    what: str
    script: str
    flags: str
    steps: int
    env_id: str
    num_envs: int = 1  # of stable-baselines3, and from here on
    ppo: dict[str, Any] = field(default_factory=dict)  # beside its defaults
    policy: str = "MlpPolicy"


CLEANRL = {"n_steps": 128, "n_epochs": 4, "learning_rate": 2.5e-4, "ent_coef": 0.01}
SETTINGS = {
    "cartpole": Setting(
        "CartPole-v1, 4 envs x 128 steps, 4 epochs x 4 minibatches (CleanRL's settings)",
        "ppo.py",
        "--num-envs 4 --num-steps 128 --update-epochs 4 --num-minibatches 4 --learning-rate 2.5e-4 "
        "--gamma 0.99 --gae-lambda 0.95 --no-norm-reward --clip-vloss --ent-coef 0.01 "
        "--target-kl None",
        200_000,
        "CartPole-v1",
        4,
        CLEANRL | {"batch_size": 128, "clip_range_vf": 0.2},
    ),
    "halfcheetah-sb3": Setting(
        "HalfCheetah-v5, 1 env x 2048 steps, 10 epochs x 32 minibatches (stable-baselines3's "
        "defaults, without normalization; CleanRL's script normalizes)",
        "ppo_continuous.py",
        "--num-envs 1 --num-steps 2048 --update-epochs 10 --num-minibatches 32 --gamma 0.99 "
        "--no-recompute-advantages --no-norm-obs --no-norm-reward --no-anneal-lr",
        81_920,
        "HalfCheetah-v5",
    ),
    "halfcheetah-defaults": Setting(
        "HalfCheetah-v5, each with its own defaults: ours steps 64 environments at once, "
        "stable-baselines3 one",
        "ppo_continuous.py",
        "",
        81_920,
        "HalfCheetah-v5",
    ),
    "atari": Setting(
        "Breakout, 8 envs x 128 steps, 4 epochs x 4 minibatches",
        "ppo_atari.py",
        "--num-envs 8 --num-steps 128 --update-epochs 4 --num-minibatches 4",
        20_480,
        "BreakoutNoFrameskip-v4",
        8,
        CLEANRL | {"batch_size": 256, "clip_range": 0.1, "clip_range_vf": 0.1},
        "CnnPolicy",
    ),
}


def rate(steps: list[float], clock: list[float]) -> float:
    """SPS after the first fifth of the iterations; an entry is the end of an iteration."""
    first = max(1, len(steps) // 5)
    return (steps[-1] - steps[first]) / (clock[-1] - clock[first])


def run(command: list[str], threads: int, python: str = sys.executable) -> str:
    """Run a Python program; returns what it printed."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [python, *command], env=env, cwd=folder, capture_output=True, text=True
        )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return done.stdout


def ours(script: Path, flags: list[str], threads: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        own = ["--eval-episodes", "0", "--run-dir", f"{folder}/run"]
        run([str(script), *flags, *own], threads)
        rows = read(Path(folder, "run", "metrics.csv"))
    return rate(*([float(row[name]) for row in rows] for name in ("global_step", "wall_time")))


def peer(name: str, steps: int, options: argparse.Namespace) -> float:
    """SPS of another implementation."""
    setting, against = SETTINGS[name], options.against
    if against in (SB3, SBX):
        command = [__file__, name, "--child", "--steps", str(steps), "--against", against]
        return float(run(command, options.threads, options.python).splitlines()[-1])
    # CleanRL prints after each iteration the steps a second since its start
    command = [os.path.abspath(against), "--env-id", setting.env_id.replace("-v5", "-v4")]
    command += ["--total-timesteps", str(steps), "--no-cuda"]
    lines = run(command, options.threads, options.python).splitlines()
    rates = [float(line.split()[1]) for line in lines if line.startswith("SPS:")]
    batch = setting.num_envs * setting.ppo.get("n_steps", 2048)
    ends = [batch * (i + 1) for i in range(len(rates))]
    return rate(ends, [end / sps for end, sps in zip(ends, rates, strict=True)])


def child(setting: Setting, steps: int, library: str) -> None:
    """Train with stable-baselines3 or SBX and print its SPS."""
    import torch

    PPO = importlib.import_module(library.replace("-", "_")).PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rows: list[tuple[float, float]] = []

    class Clock(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:  # the end of the previous iteration
            rows.append((self.num_timesteps, time.monotonic()))

        def _on_training_end(self) -> None:
            rows.append((self.num_timesteps, time.monotonic()))

    if setting.policy == "CnnPolicy":
        import ale_py
        import gymnasium

        gymnasium.register_envs(ale_py)
        envs = VecFrameStack(make_atari_env(setting.env_id, setting.num_envs, seed=1), 4)
    else:
        envs = make_vec_env(setting.env_id, setting.num_envs, seed=1)
    agent = PPO(setting.policy, envs, seed=1, device="cpu", **setting.ppo)
    agent.learn(steps, callback=Clock())
    print(rate(*zip(*rows[1:], strict=True)))


def measure(name: str, options: argparse.Namespace, copies: Path) -> list[Row]:
    """The pairs of a setting."""
    setting, threads = SETTINGS[name], options.threads
    steps = options.steps or setting.steps
    more = ["--compile"] * options.compile + options.flags.split()
    flags = ["--env-id", setting.env_id, *setting.flags.split(), "--total-timesteps", str(steps)]
    flags += ["--torch-threads", str(threads), "--no-cuda", *more]
    rows = []
    for pair in range(1, options.pairs + 1):
        sps: dict[str, float] = {}
        for side in ("ours", "other") if pair % 2 else ("other", "ours"):  # undoes a drift
            if side == "other" and not options.copied:
                sps[side] = peer(name, steps, options)
            else:
                extra = options.other_flags.split() if side == "other" else []
                sps[side] = ours(copies / side / setting.script, flags + extra, threads)
        against = "CleanRL" if options.against.endswith(".py") else options.against
        row = {"setting": name, "flags": " ".join(more), "against": against}
        row |= {"pair": str(pair), "ours": f"{sps['ours']:.0f}", "other": f"{sps['other']:.0f}"}
        row["ratio"] = f"{sps['ours'] / sps['other']:.3f}"
        row["measured"] = f"CPU, torch threads: {threads}. {measured()}"
        print(*row.values(), sep=", ", flush=True)
        rows.append(row)
    return rows


def report(rows: list[Row]) -> str:
    table = []
    for (name, flags, against), pairs in grouped(rows, "setting", "flags", "against").items():
        ours, other, ratios = (
            [float(row[column]) for row in pairs] for column in ("ours", "other", "ratio")
        )
        cells = [name, f"`{flags}`" if flags else "", against]
        cells += [f"{statistics.median(x):,.0f}" for x in (ours, other)]
        each = " ".join(f"{ratio:.2f}" for ratio in ratios)
        table.append([*cells, each, f"**{statistics.median(ratios):.2f}**", pairs[0]["measured"]])
    header = ["setting", "our flags", "against", "ours, SPS", "theirs, SPS", "ratio of each pair"]
    text = (
        "# Speed\n\nEnvironment steps a second (median over pairs), in turn, each in a process of "
        "its own. The first fifth of the iterations is left out on both sides.\n\n"
    ) + markdown([*header, "median ratio", "measured"], table)
    for name in dict.fromkeys(row["setting"] for row in rows):
        setting = SETTINGS[name]
        command = f"{setting.script} --env-id {setting.env_id} {setting.flags}".strip()
        text += f"\n- {name}: {setting.what}. Ours: `{command}`"
    return text + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("settings", nargs="+", choices=SETTINGS)
    add("--pairs", type=int, default=5)
    add("--steps", type=int, help="instead of each setting's own number")
    add("--threads", type=int, default=1, help="of torch, on both sides (default 1)")
    add("--against", default=SB3, help=f"{SB3} (default), {SBX}, CleanRL's file, a folder of ours")
    add("--python", default=sys.executable, help="interpreter of the other side")
    add("--compile", action="store_true", help="ours with --compile (--against too)")
    add("--flags", default="", help='of ours (of --against too), as in --flags="--bf16"')
    add("--other-flags", default="", help="of the copy of --against only")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(SETTINGS[options.settings[0]], options.steps, options.against)
    options.python = os.path.abspath(shutil.which(options.python) or options.python)
    options.copied = options.against not in (SB3, SBX) and not options.against.endswith(".py")
    trial = options.copied or options.steps
    path = (RUNS / "trials" if trial else RESULTS) / "speed.csv"
    with tempfile.TemporaryDirectory() as folder:
        for side, source in ("ours", ROOT), ("other", Path(options.against)):
            copies = Path(folder, side)
            copies.mkdir()
            for name in {SETTINGS[name].script for name in options.settings}:
                if side == "ours" or options.copied:
                    shutil.copy(source / name, copies)  # edits made meanwhile do not reach it
        for name in options.settings:
            rows = measure(name, options, Path(folder))
            keys = ("setting", "flags", "against")
            new = {tuple(row[key] for key in keys) for row in rows}
            rows += [row for row in read(path) if tuple(row[key] for key in keys) not in new]
            rows.sort(key=lambda row: (*(row[key] for key in keys), int(row["pair"])))
            write(path, rows)
            path.with_suffix(".md").write_text(report(rows))
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
