"""From process start to the first environment step of `python ppo.py`, against bare imports.

    python tests/benchmarks/startup.py --pairs 10

The yardstick is `import torch, gymnasium, tyro` and one Adam optimizer: what no script of this kind
can do without. Both run in turn. Results: tests/benchmarks/startup.md and startup.csv.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sweep import HERE, ROOT, markdown, measured, write_csv

TARGET = 1.3
BARE = (
    "import os, torch, gymnasium, tyro; torch.optim.Adam([torch.zeros(1, requires_grad=True)]); "
    "os._exit(0)"  # both end without tidying up
)
# CartPole, that ends the process at its first step.
FIRST_STEP = """
import os
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv

class FirstStep(CartPoleEnv):
    def step(self, action):
        os._exit(0)

gymnasium.register("FirstStep-v0", FirstStep, max_episode_steps=500)
"""


def seconds(command: list[str], folder: Path) -> float:
    start = time.perf_counter()
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=10)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "first_step_env.py").write_text(FIRST_STEP)
        script = [str(ROOT / "ppo.py"), "--env-id", "first_step_env:FirstStep-v0"]
        for pair in range(options.pairs + 1):
            ours = seconds([*script, "--run-dir", str(folder / f"{pair}")], folder)
            bare = seconds(["-c", BARE], folder)
            if pair:  # the first fills the disk cache
                rows.append([pair, f"{ours:.3f}", f"{bare:.3f}", f"{ours / bare:.3f}"])
                print(*rows[-1], flush=True)
    ours, bare, ratio = (statistics.median(float(row[i]) for row in rows) for i in (1, 2, 3))
    comment = measured("torch", "gymnasium", "tyro")
    write_csv(HERE / "startup.csv", ["pair", "ours_s", "bare_s", "ratio"], rows, comment)
    header = ["`ppo.py` to its first step, s", "imports and Adam, s", "median ratio", "at most"]
    table = markdown(header, [[f"{ours:.2f}", f"{bare:.2f}", f"**{ratio:.2f}**", TARGET]])
    text = (
        f"# Start-up\n\n`python tests/benchmarks/startup.py`. {comment}.\n\nMedians of "
        f"{len(rows)} pairs, run in turn: process start to the first environment step of `ppo.py`, "
        f'against `python -c "{BARE}"`.\n\n'
    )
    (HERE / "startup.md").write_text(text + table)
    print(table)


if __name__ == "__main__":
    main()
