"""Environments in the situations of public bug reports. With tests/ on the path: faulty:WAY-v0."""

import os
import subprocess
import sys
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces

events: list[str] = []  # what simulators of this process have done, in order


class Text(spaces.Space):
    """What cannot become numbers, as the missions of MiniGrid."""

    def contains(self, x: Any) -> bool:
        return isinstance(x, str)


class Simulator(gym.Env):
    """Episodes of 20 steps of noise, of which each pays 1 for action 0, but for what is faulty."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, way: str, render_mode: str | None = None) -> None:
        if way == "third" and events.count("open") == 2:
            raise RuntimeError("no license\nfor one more simulator")
        if way == "chdir-init":
            os.chdir("/")
        events.append("open")
        self.way, self.render_mode, self.all_steps, self.length = way, render_mode, 0, 20
        self.breaks_at = {"two-faults": 50}.get(way)
        if way == "worn" and events.count("open") > 4:  # in the evaluation of a tiny run
            self.breaks_at = 5
        if way in ("endless", "piped"):
            self.length = 10**9
        box, turn = spaces.Box(-1, 1, (2,), np.float32), spaces.Dict({"turn": spaces.Discrete(2)})
        observations = {"empty": spaces.Box(-1, 1, (0,), np.float32)}
        observations["words"] = spaces.Dict({"image": box, "words": Text((), str)})
        self.observation_space = observations.get(way, box)
        self.action_space = turn if way == "turn" else spaces.Discrete(2)

    def observe(self) -> Any:
        x = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        if self.way == "obs-inf" and self.steps >= 15:
            x *= np.inf
        return {"words": {"image": x, "words": "go to the red door"}, "empty": x[:0]}.get(
            self.way, x
        )

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        if self.way == "flat":
            raise RuntimeError("the battery is flat")
        if self.way == "chdir-reset":
            os.chdir("/")
        return self.observe(), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        self.all_steps += 1
        if self.all_steps == self.breaks_at:
            raise ValueError("joint 3 has left its range")
        obs, reward, over = self.observe(), float(action == 0), self.steps == self.length
        if self.way == "reward-inf" and self.steps >= 15:
            reward = np.inf
        return obs, reward, False, over, {}

    def render(self) -> np.ndarray:
        events.append("frame")
        return np.full((16, 16, 3), self.all_steps % 256, np.uint8)

    def close(self) -> None:
        events.append("close")
        if self.breaks_at:
            raise BrokenPipeError(32, "the simulator has hung up")


class Piped(Simulator):
    """A process computes its observations; who closes it has to ask that process first.

    The script and its children become a process group, as from a shell: Ctrl-C reaches all.
    """

    code = "import sys\nfor line in sys.stdin: print(0.5, flush=True)"

    def __init__(self, way: str, render_mode: str | None = None) -> None:
        super().__init__(way, render_mode)
        if os.getpgrp() != os.getpid():
            os.setpgid(0, 0)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.child = subprocess.Popen([sys.executable, "-S", "-c", self.code], text=True, **pipes)

    def observe(self) -> Any:
        print("next", file=self.child.stdin, flush=True)
        return np.full(2, float(self.child.stdout.readline()), np.float32)

    def close(self) -> None:
        self.observe()
        with self.child:
            self.child.kill()


def filtered(way: str, render_mode: str | None = None) -> gym.Env:
    """What an error message about words recommends."""
    return gym.wrappers.FilterObservation(Simulator("words", render_mode), ["image"])


WAYS = "fine two-faults worn third flat turn words endless empty chdir-init chdir-reset"
WAYS += " obs-inf reward-inf piped filtered"
for way in WAYS.split():
    make = {"piped": Piped, "filtered": filtered}.get(way, Simulator)
    gym.register(f"{way}-v0", f"{__name__}:{make.__name__}", kwargs={"way": way})
