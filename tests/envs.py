"""Small environments for the tests. With tests/ on the path: --env-id envs:Name-v0."""

import random
from collections.abc import Callable
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.spaces import Box, Dict, Discrete, Space

Action = np.ndarray | np.integer | int
Observation = np.ndarray | int | tuple | dict
Step = tuple[Observation, float, bool, bool, dict]
Reset = tuple[Observation, dict]


class Base(gym.Env):
    """What most have in common: they are registered with some attributes, or a time limit."""

    observation_space: Space = Box(-1, 1, (2,), np.float32)
    action_space: Space = Discrete(2)

    def __init__(self, render_mode: str | None = None, **attributes: Any) -> None:
        self.render_mode = render_mode
        vars(self).update(attributes)

    def observe(self) -> Observation:
        return self.np_random.uniform(-1, 1, 2).astype(np.float32)

    def pay(self, action: Action) -> float:
        return 0.0

    def ends(self) -> tuple[bool, bool]:
        return False, False

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Reset:
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action: Action) -> Step:
        self.steps += 1
        reward = self.pay(action)
        return self.observe(), reward, *self.ends(), {}


class Constant(Base):
    """The same observation and the same reward at each step; an episode lasts `length` steps."""

    observation_space = Box(0, np.inf, (1,), np.float32)
    length, reward, terminates = 5, 1.0, False

    def observe(self) -> np.ndarray:
        return np.ones(1, np.float32)

    def pay(self, action: Action) -> float:
        return self.reward

    def ends(self) -> tuple[bool, bool]:
        over = self.steps == self.length
        return over and self.terminates, over and not self.terminates


class Timer(Constant):
    """Observes how many steps its episode has had."""

    def observe(self) -> np.ndarray:
        return np.array([self.steps], np.float32)


class Counter(Base):
    """Observes a count that names every state: 1000 * episode + step of the episode.

    A step pays the count it arrives at, and a quarter of the action more. Episodes have random
    lengths and end in either way, sometimes in both. It changes the array that it has returned.
    """

    observation_space = Box(0, np.inf, (1,), np.float32)
    episode = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Reset:
        self.episode += 1
        return super().reset(seed=seed)

    def observe(self) -> np.ndarray:
        observation = vars(self).setdefault("observation", np.zeros(1, np.float32))
        observation[0] = 1000 * self.episode + self.steps
        return observation

    def pay(self, action: Action) -> float:
        return 1000 * self.episode + self.steps + 0.25 * float(np.ravel(action)[0])

    def ends(self) -> tuple[bool, bool]:
        terminated, truncated = (self.np_random.random(2) < 0.12).tolist()
        return terminated, truncated


class Global(Base):
    """A simulator that draws from the global generators of numpy and Python."""

    def observe(self) -> np.ndarray:
        return np.array([np.random.random(), random.random()], np.float32)

    def pay(self, action: Action) -> float:
        return np.random.random() + random.random()


class Identity(Base):
    """Pays 1 for the action that the observation names; all else that it shows is noise."""

    action_space = Discrete(4)
    coded: str

    def observe(self) -> Observation:
        right = int(self.np_random.integers(4))
        noise = super().observe()
        self.right = right + self.action_space.start
        return {
            "matrix": np.eye(4, dtype=np.float32)[:, [right]],
            "dict": {"noise": noise[None], "right": right},
        }[self.coded]

    def pay(self, action: Action) -> float:
        if action not in self.action_space:
            raise AssertionError(f"{action!r} is not in {self.action_space}")
        return float(action == self.right)


class IdentityBox(Base):
    """Pays -|action - target|^2 for the target it observes, anywhere in [-1, 1]."""

    observation_space = Dict({"target": Box(-1, 1, (2,)), "zero": Box(0, 1, (1, 1))})
    action_space = Box(-2, 2, (2,), np.float32)

    def observe(self) -> Observation:
        self.target = super().observe()
        return {"target": self.target, "zero": np.zeros((1, 1), np.float32)}

    def pay(self, action: Action) -> float:
        return -float(((action - self.target) ** 2).sum())


class Actions(Base):
    """Takes box actions as they come and keeps them in `seen`, which all instances share."""

    seen: ClassVar[list[np.ndarray]] = []
    boxes: ClassVar[dict[str, Box]] = {
        "odd": Box(-1, 1, (2, 3), np.float32),
        "scalar": Box(0, 10, (), np.float32),
        "skewed": Box(np.array([1, -8], np.float32), np.array([3, -2], np.float32)),
        "unbounded": Box(-np.inf, np.inf, (2,), np.float32),
        "huge": Box(-1e38, 1e38, (1,), np.float32),
        "half": Box(0.25, np.inf, (1,), np.float32),
        "mixed": Box(np.array([0, -np.inf]), np.array([10, np.inf]), dtype=np.float64),
        "int": Box(-2, 2, (1,), np.int64),
    }

    def pay(self, action: Action) -> float:
        self.seen.append(np.array(action))
        return 0.0


class Place(Base):
    """A random walk around 0 on a line, observed as a distance from a point that is far away.

    A random policy loses about 25 points an episode, one that stays at 0 fewer than 10.
    """

    observation_space = Box(-1e7, 1e7, (1,), np.float64)
    offset = 0.0

    def observe(self) -> np.ndarray:
        if self.steps == 0:
            self.x = self.np_random.uniform(-0.25, 0.25)
        return np.array([self.offset + self.x])

    def pay(self, action: Action) -> float:
        self.x += 0.05 if action else -0.05
        return -10 * abs(self.x)


class Bad(Base):
    """Observes or pays what is no number, or too large a one, from step 50 of all on."""

    way: str
    all_steps = 0

    def observe(self) -> np.ndarray:
        steps = {"first": [0], "endless": [0], "final": [10]}.get(self.way, [])
        bad = self.all_steps >= 50 and self.steps in steps
        wrong = np.inf if self.way == "endless" else np.nan
        return np.full(2, wrong if bad else 0.5, np.float32)

    def pay(self, action: Action) -> float:
        self.all_steps += 1
        # The square of 1e30 is beyond float32: the loss of the critic becomes infinite.
        rewards = {"reward": np.nan, "infinite": np.inf, "huge": 1e30}
        return rewards.get(self.way, 1.0) if self.all_steps >= 50 else 1.0

    def ends(self) -> tuple[bool, bool]:
        return False, self.steps == 10


class Cue(gym.Env):
    """A sign at the first step, five blank ones, and then the question which sign it was."""

    observation_space = Box(-1, 1, (2,), np.float32)
    action_space = Discrete(2)

    def observe(self) -> np.ndarray:
        return np.array([self.cue if self.steps == 0 else 0, self.steps == 6], np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Reset:
        super().reset(seed=seed)
        self.steps, self.cue = 0, self.np_random.choice([-1, 1])
        return self.observe(), {}

    def step(self, action: int) -> Step:
        right = self.steps == 6 and (action == 1) == (self.cue == 1)
        self.steps += 1
        return self.observe(), float(right), self.steps == 7, False, {}


def positions(**kwargs: Any) -> gym.Env:
    """CartPole without its velocities: who does not remember the last positions has to guess."""
    env = CartPoleEnv(**kwargs)
    seen = Box(env.observation_space.low[::2], env.observation_space.high[::2])
    return gym.wrappers.TransformObservation(env, lambda obs: obs[::2], seen)


class Locks(gym.Env):
    """Pays the share of right choices, of 3, 2 and 5, which are counted from 1, 0 and -2."""

    observation_space = Box(0, 1, (10,), np.float32)
    action_space = gym.spaces.MultiDiscrete([3, 2, 5], start=[1, 0, -2])

    def observe(self) -> np.ndarray:
        self.right = self.np_random.integers(self.action_space.nvec)
        obs = np.zeros(10, np.float32)
        obs[self.right + [0, 3, 5]] = 1
        return obs

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Reset:
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action: np.ndarray) -> Step:
        assert self.action_space.contains(action)
        share = (action - self.action_space.start == self.right).mean()
        return self.observe(), float(share), False, False, {}


class Plain(gym.Env):
    """An environment as a beginner writes it: no render_mode, no seeding, whatever types."""

    observation_space = Box(-1, 1, (2,), np.float32)
    action_space = Discrete(2)

    def reset(self, seed: int | None = None, options: dict | None = None) -> Reset:
        return np.array([0, 1]), {}  # of int64

    def step(self, action: int) -> Step:
        return np.array([0.5, -0.5]), int(action), np.bool_(False), False, {}  # of float64


def register(
    name: str, env: Callable[..., gym.Env], limit: int | None = None, **attributes: Any
) -> None:
    entry = f"{__name__}:{env.__name__}"
    gym.register(f"{name}-v0", entry, max_episode_steps=limit, kwargs=attributes)


for name, acts in (("", Discrete(2)), ("Box", Box(-1, 1, (1,), np.float32))):
    register(f"Constant{name}", Constant, action_space=acts)
    register(f"Counter{name}", Counter, action_space=acts)
register("Hundred", Constant, length=7, reward=100.0)
register("Chain", Timer, length=3, terminates=True)
register("Timer", Timer, length=11)
for way in ("first", "endless", "final", "reward", "infinite", "huge"):
    register(f"Bad-{way}", Bad, way=way)
register("Global", Global, limit=10)
for coded, space in {
    "matrix": Box(0, 1, (4, 1), np.float32),
    "dict": Dict({"noise": Box(-1, 1, (1, 2)), "right": Discrete(4)}),
}.items():
    register(f"Identity-{coded}", Identity, limit=10, coded=coded, observation_space=space)
matrix = {"coded": "matrix", "observation_space": Box(0, 1, (4, 1), np.float32)}
register("Identity-from1", Identity, limit=10, action_space=Discrete(4, start=1), **matrix)
register("IdentityBox", IdentityBox, limit=10)
for box, space in Actions.boxes.items():
    register(f"Actions-{box}", Actions, limit=10, action_space=space)
register("Line", Place, limit=20)
register("Northing", Place, limit=20, offset=4_500_000.0)
register("Plain", Plain, limit=10)
register("Cue", Cue)
register("Positions", positions, limit=500)
register("Locks", Locks, limit=20)
