"""Scores of stable-baselines3's PPO, evaluated as ours are: the defaults with VecNormalize.

    pip install -r tests/benchmarks/requirements.txt
    python tests/benchmarks/peers.py --seeds 1-5

1M steps; 100 deterministic episodes of the final policy, each in a fresh environment, observations
normalized by the statistics of training. Runs that results/peers.csv has are skipped; peers.md is
its summary.
"""

import argparse
import itertools
import multiprocessing
import sys
import time

from sweep import COLUMNS, seed_range
from tables import RESULTS, Row, measured, read, summary, write

ENVS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")
SETTINGS = {"sb3 defaults": (1, 2048), "sb3 64 x 32": (64, 32)}  # environments, steps of each


def train(job: tuple[str, str, int]) -> Row:
    import numpy as np
    import stable_baselines3
    import torch
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import VecNormalize

    torch.set_num_threads(1)
    env_id, setting, seed = job
    num_envs, num_steps = SETTINGS[setting]
    envs = VecNormalize(make_vec_env(env_id, num_envs, seed=seed * 1000))
    agent = stable_baselines3.PPO("MlpPolicy", envs, n_steps=num_steps, seed=seed, device="cpu")
    start = time.monotonic()
    agent.learn(1_000_000)
    wall_time = time.monotonic() - start
    last100 = np.mean([episode["r"] for episode in agent.ep_info_buffer])
    fresh = make_vec_env(env_id, 100, seed=10**6 + seed * 1000)
    fresh = VecNormalize(fresh, training=False, norm_reward=False)
    fresh.obs_rms = envs.obs_rms
    returns, _ = evaluate_policy(agent, fresh, 100, return_episode_rewards=True)
    version = f"stable-baselines3 {stable_baselines3.__version__}"
    values = ["peers", version, "peer", env_id, setting, seed, agent.num_timesteps, last100]
    values += [np.mean(returns), np.std(returns), 100, round(wall_time, 1), "", ""]
    return dict(zip(COLUMNS, map(str, values), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--envs", nargs="+", choices=ENVS, default=ENVS)
    add("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    add("--seeds", type=seed_range, default=range(1, 6), help="1-5")
    add("--processes", type=int, default=2, help="runs at a time (default 2)")
    options = parser.parse_args()
    rows = read(RESULTS / "peers.csv")
    done = {(row["env_id"], row["setting"], int(row["seed"])) for row in rows}
    jobs = [
        (env_id, setting, seed)
        for setting, seed, env_id in itertools.product(
            options.settings, options.seeds, options.envs
        )
    ]
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.processes, maxtasksperchild=1) as pool:
        for row in pool.imap_unordered(train, [job for job in jobs if job not in done]):
            rows.append(row)
            rows.sort(key=lambda row: (row["env_id"], row["setting"], int(row["seed"])))
            write(RESULTS / "peers.csv", rows)
            text = "# stable-baselines3\n\n`python tests/benchmarks/peers.py`: PPO's defaults with "
            text += "VecNormalize, 1M steps, 1 environment x 2048 steps (defaults) or 64 x 32; "
            text += f"100 deterministic episodes. {measured(verb='Written')}.\n\n{summary(rows)}"
            (RESULTS / "peers.md").write_text(text)
            print(*row.values(), sep=", ", flush=True)


if __name__ == "__main__":
    sys.exit(main())
