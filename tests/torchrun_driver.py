"""What each process of torchrun runs for test_distributed.py: `torchrun_driver.py TASK JSON`.

Results are written into the working folder as rank0.pt and rank1.pt.
"""

import contextlib
import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import envs
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
from simulated_gpu import simulated_gpu
from torch import Tensor

ROWS, PROCESSES = 32, 2
VECTOR = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
SPACES = {
    "ppo": (VECTOR, gym.spaces.Discrete(5)),
    "ppo_continuous": (VECTOR, gym.spaces.Box(-1, 1, (2,), np.float32)),
    "ppo_atari": (gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), gym.spaces.Discrete(5)),
}


class Fault(envs.Constant):
    """Breaks in the second process, after 20 steps."""

    steps_of_all_episodes = 0

    def step(self, action: envs.Action) -> envs.Step:
        self.steps_of_all_episodes += 1
        if os.environ.get("RANK") == "1" and self.steps_of_all_episodes > 20:
            raise ValueError("the wheel came off")
        return super().step(action)


envs.register("Fault", Fault)
gym.registry["Fault-v0"].entry_point = f"{Fault.__module__}:Fault"


def example(script: ModuleType) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """An agent and a minibatch of ROWS rows, the same in every process."""
    torch.manual_seed(3)
    observations, actions = SPACES[script.__name__]
    agent = script.Agent(
        SimpleNamespace(single_observation_space=observations, single_action_space=actions)
    )
    if observations.dtype == np.uint8:
        obs = torch.randint(0, 256, (ROWS, *observations.shape), dtype=torch.uint8)
    else:
        obs = torch.randn(ROWS, *observations.shape)
    with torch.no_grad():
        action, logprobs, _, values = agent.get_action_and_value(obs)
        dist = agent.get_dist(obs)
        for parameter in agent.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    noise = 0.1 * torch.randn(ROWS)
    mb = {"obs": obs, "actions": action, "logprobs": logprobs + noise, "values": values}
    mb |= {"advantages": 5 + 3 * torch.randn(ROWS), "returns": torch.randn(ROWS)}
    return agent, mb | {"dist": dist}


def mathematics(script: ModuleType, share: slice) -> dict[str, Any]:
    """Gradient, statistics and advantages of this process's share of the rows."""
    agent, mb = example(script)
    mb = {name: x[share] for name, x in mb.items()}
    flags = {"surrogate": "kl-fixed", "kl_coef": 0.5, "clip_vloss": False, "norm_adv": True}
    args = script.Args(cuda=False, **flags)
    loss, _ = script.minibatch_loss(agent, args, mb, torch.tensor(0.5))
    joined = script.join_gradients(agent)
    loss.backward()
    script.all_mean(joined)
    gradients = {name: p.grad.clone() for name, p in agent.named_parameters()}
    # As in training, but for an eps that keeps small gradients' rounding errors small.
    torch.optim.Adam(agent.parameters(), lr=1.0, eps=0.1, fused=True).step()
    statistics = script.RunningMeanStd((3,))
    generator = torch.Generator().manual_seed(4)
    for scale in (1.0, 30.0):
        rows = 7 + scale * torch.randn(ROWS, 3, generator=generator)
        rows[::2] -= 4 * scale  # the two processes see different means
        statistics.update(rows[share])
    return {
        "gradients": gradients,
        "parameters": dict(agent.named_parameters()),
        "advantages": script.normalize_advantages(mb["advantages"]),
        "statistics": {name: statistics.state_dict()[name] for name in ("mean", "var")},
    }


def group_threads() -> list[str]:
    """Names of the threads that gloo runs in this process, as Linux lists them."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return sorted(name for name in names if "gloo" in name)


def training(script: ModuleType, settings: dict[str, Any]) -> dict[str, Any]:
    """Train; keep what this process did and what its agent became."""
    first, actions, kept = [], [], {}
    real_make_envs, real_ppo = script.make_envs, script.ppo

    def make_envs(*args: Any, **kwargs: Any) -> gym.vector.VectorEnv:
        made = real_make_envs(*args, **kwargs)
        real_step, real_reset = made.step, made.reset

        def reset(**options: Any) -> tuple:
            obs, infos = real_reset(**options)
            first.append(torch.tensor(obs))
            return obs, infos

        def step(action: np.ndarray) -> tuple:
            actions.append(torch.tensor(action))
            return real_step(action)

        made.reset, made.step = reset, step
        return made

    def ppo(args: Any, stack: contextlib.ExitStack) -> tuple:
        agent, run = real_ppo(args, stack)
        modules = {name: module.state_dict() for name, module in run.modules.items()}
        kept.update(modules, actions=torch.stack(actions), first=first[0])
        kept["group_threads"] = {"training": group_threads()}
        return agent, run

    script.make_envs, script.ppo = make_envs, ppo
    kept["folder"] = script.train(script.Args(**settings))
    kept["group_threads"]["trained"] = group_threads()
    return kept


def main() -> None:
    task, settings = sys.argv[1], json.loads(sys.argv[2])
    rank = int(os.environ["RANK"])
    if task == "training":
        script = importlib.import_module(settings.pop("script"))
        with simulated_gpu() if settings["cuda"] else contextlib.nullcontext():
            result = training(script, settings)
    else:
        importlib.import_module("torch.distributed.nn")  # as in the scripts, before the group
        dist.init_process_group("gloo")
        share = slice(rank, None, PROCESSES)
        result = {name: mathematics(importlib.import_module(name), share) for name in settings}
        dist.destroy_process_group()
    torch.save(result, f"rank{rank}.pt")


if __name__ == "__main__":
    main()
