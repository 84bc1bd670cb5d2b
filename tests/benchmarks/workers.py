"""Do worker processes pay? Training with SyncVectorEnv against AsyncVectorEnv, in turn.

    python tests/benchmarks/workers.py --pairs 3

The same training, by ppo_continuous.py's own loop, with environments that step one after the other
in its process, and with one worker process for each of them. Results: workers.csv and workers.md.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from speed import run
from sweep import HERE, ROOT, load_script, markdown, measured, write_csv

ENVS = {"HalfCheetah-v5": (64,), "Ant-v5": (64, 8), "Humanoid-v5": (64, 8)}
ITERATIONS = 12  # the first two do not count


def train(kind: str, env_id: str, num_envs: int) -> None:
    """In a process of its own: train, and print steps a second."""
    import gymnasium as gym
    import numpy as np

    script = load_script(ROOT / "ppo_continuous.py")
    if kind == "async":
        script.SyncEnvs = gym.vector.AsyncVectorEnv
    batch = script.Args().batch_size
    flags = {"num_envs": num_envs, "num_steps": batch // num_envs, "stagger": False}
    with tempfile.TemporaryDirectory() as folder:
        args = script.Args(
            env_id=env_id,
            total_timesteps=ITERATIONS * batch,
            eval_episodes=0,
            cuda=False,
            run_dir=str(Path(folder, "run")),
            **flags,
        )
        rows = np.genfromtxt(
            Path(script.train(args), "metrics.csv"), delimiter=",", names=True, deletechars=""
        )
    seconds = rows["wall_time"][-1] - rows["wall_time"][1]
    print(f"SPS={(rows['global_step'][-1] - rows['global_step'][1]) / seconds}")


def measure(kind: str, env_id: str, num_envs: int) -> float:
    output = run([__file__, "--train", kind, env_id, str(num_envs)], threads=1)
    return float(output.split("SPS=")[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--train", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        kind, env_id, num_envs = options.train
        return train(kind, env_id, int(num_envs))
    rows, lines = [], []
    for env_id, counts in ENVS.items():
        for num_envs in counts:
            pairs = [
                (measure("sync", env_id, num_envs), measure("async", env_id, num_envs))
                for _ in range(options.pairs)
            ]
            ratios = [workers / one for one, workers in pairs]
            for number, ((one, workers), ratio) in enumerate(zip(pairs, ratios, strict=True), 1):
                rows.append(
                    [env_id, num_envs, number, f"{one:.0f}", f"{workers:.0f}", f"{ratio:.3f}"]
                )
            median = [statistics.median(values) for values in zip(*pairs, strict=True)]
            each = " ".join(f"{ratio:.2f}" for ratio in ratios)
            speeds = [f"{value:,.0f}" for value in median]
            lines.append([env_id, num_envs, *speeds, each, f"**{statistics.median(ratios):.2f}**"])
            print(*lines[-1], flush=True)
    comment = measured("torch", "gymnasium", "mujoco")
    header = "environment num_envs pair sync_SPS async_SPS ratio".split()
    write_csv(HERE / "workers.csv", header, rows, comment)
    header = ["environment", "--num-envs", "one process, SPS", "workers, SPS"]
    header += ["ratio of each pair", "median ratio"]
    (HERE / "workers.md").write_text(
        f"# Worker processes\n\n`python tests/benchmarks/workers.py`. {comment}.\n\n"
        "Steps a second of training with the defaults (2048 rows a batch, not staggered): "
        "environments stepped in one process (SyncVectorEnv) and by a worker process each "
        "(AsyncVectorEnv), in turn; medians over pairs.\n\n" + markdown(header, lines)
    )


if __name__ == "__main__":
    main()
