"""What each process of torchrun runs for test_distributed.py: main(), with JSON in sys.argv[1].

That is a list of runs, each a dict of arguments with the script's name. What became of them is
written into the working folder, as rank0.pt and rank1.pt.
"""

import functools
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

RANK = int(os.environ.get("RANK", 0))
PER_PROCESS = 2  # environments, where two processes share four


class Numbered(gym.Env):
    """Seeds do not matter: it shows what its number, among those of all processes, says."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    built = 0

    def __init__(self, continuous: bool, render_mode: str | None = None) -> None:
        box = gym.spaces.Box(-1, 1, (1,), np.float32)
        self.action_space = box if continuous else gym.spaces.Discrete(2)
        self.number, self.steps = PER_PROCESS * RANK + Numbered.built, 0
        Numbered.built += 1

    def observe(self) -> np.ndarray:
        angle = self.steps / (3 + self.number)
        return np.array([np.sin(angle), self.number + 9 * np.cos(angle)], np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action: Any) -> tuple:
        self.steps += 1
        reward = self.number + float(np.sum(action)) * np.sin(self.steps)
        over = self.steps % (5 + self.number) == 0
        return self.observe(), reward, over and self.number % 2 == 0, over, {}


class Fault(Numbered):
    """Breaks in the second process after 20 steps."""

    def step(self, action: Any) -> tuple:
        if RANK == 1 and self.steps == 20:
            raise ValueError("the wheel came off")
        return super().step(action)


gym.register("Numbered-v0", f"{__name__}:Numbered", kwargs={"continuous": False})
gym.register("NumberedBox-v0", f"{__name__}:Numbered", kwargs={"continuous": True})
gym.register("Fault-v0", "torchrun_driver:Fault", kwargs={"continuous": False})


def group_threads() -> list[str]:
    """Names of the threads that gloo runs in this process, as Linux lists them."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return sorted(name for name in names if "gloo" in name)


def training(name: str, **flags: Any) -> dict[str, Any]:
    """Train; return what this process saw and did, and what its agent became.

    Numbered environments meet prescribed actions, as if all were in one process.
    """
    script = importlib.import_module(name)
    batches, betas, sizes, made = [], [], [], {}
    real_advantages, real_loss = script.add_advantages, script.ppo_loss
    real_statistics, real_reduce = script.RunningMeanStd, torch.distributed.all_reduce
    Numbered.built = steps = 0

    class Agent(script.Agent):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.frozen = torch.nn.Linear(2, 2).requires_grad_(False)  # has no gradient

    def add_advantages(agent: Any, args: Any, batch: dict[str, Tensor]) -> None:
        made["agent"], made["threads"] = agent, group_threads()
        batches.append({k: batch[k].clone() for k in ("obs", "actions")})
        real_advantages(agent, args, batch)

    def ppo_loss(agent: Any, args: Any, mb: dict[str, Tensor], kl_coef: Tensor) -> tuple:
        betas.append(float(kl_coef))
        return real_loss(agent, args, mb, kl_coef)

    def statistics(*args: Any) -> torch.nn.Module:
        stats = real_statistics(*args)
        return stats if args else made.setdefault("reward_stats", stats)  # of numbers

    def all_reduce(x: Tensor) -> None:
        sizes.append(x.numel())
        real_reduce(x)

    def prescribed(dist: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        numbers = PER_PROCESS * RANK + torch.arange(len(dist))
        if name == "ppo":
            return (steps * (1 + numbers) // 3) % 2
        return (steps * (1 + numbers)).float().sin().unsqueeze(1)

    patches = {"add_advantages": add_advantages, "ppo_loss": ppo_loss}
    patches |= {"RunningMeanStd": statistics, "Agent": Agent}
    if "Numbered" in flags["env_id"]:
        patches["sample"] = prescribed
    with (
        mock.patch.multiple(script, **patches),
        mock.patch.object(torch.distributed, "all_reduce", all_reduce),
    ):
        folder = script.train(script.Args(**flags))
    states = {k: made[k].state_dict() for k in ("agent", "reward_stats")}
    states |= {k: torch.stack([batch[k] for batch in batches]) for k in batches[0]}
    learning = [x for x in made["agent"].parameters() if x.requires_grad]
    states |= {"parameters": sum(x.numel() for x in learning)}
    end = time.monotonic() + 2  # Linux lists a thread for a moment after it was joined
    while group_threads() and time.monotonic() < end:
        time.sleep(0.01)
    threads = {"training": made["threads"], "trained": group_threads()}
    return states | {"betas": betas, "sizes": sizes, "threads": threads, "folder": folder}


def main() -> None:
    init, address = torch.distributed.init_process_group, os.environ["MASTER_ADDR"]
    store = torch.distributed.TCPStore(address, int(os.environ["MASTER_PORT"]))
    results = []
    for number, run in enumerate(json.loads(sys.argv[1])):
        # torchrun's own store still has what the group of the last run has written
        own = torch.distributed.PrefixStore(str(number), store)
        own_init = functools.partial(init, store=own, rank=RANK, world_size=2)
        with mock.patch.object(torch.distributed, "init_process_group", own_init):
            results.append(training(run.pop("script"), **run))
    torch.save(results, f"rank{RANK}.pt")
