"""Small environments for the tests. With tests/ on the path: --env-id envs:Name-v0."""

import time
from typing import ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces

Action = np.ndarray | np.integer | int
Observation = np.ndarray | int | tuple | dict
Step = tuple[Observation, float, bool, bool, dict]
Reset = tuple[Observation, dict]


def one_dimensional(continuous: bool) -> spaces.Space:
    return spaces.Box(-1, 1, (1,), np.float32) if continuous else spaces.Discrete(2)


class Constant(gym.Env):
    """The same observation and the same reward at each step; an episode lasts `length` steps."""

    def __init__(
        self,
        length: int = 5,
        reward: float = 1.0,
        terminates: bool = False,
        continuous: bool = False,
        render_mode: str | None = None,
    ) -> None:
        self.length, self.reward, self.terminates = length, reward, terminates
        self.observation_space = spaces.Box(-2, 2, (1,), np.float32)
        self.action_space = one_dimensional(continuous)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Reset:
        super().reset(seed=seed)
        self.steps = 0
        return np.ones(1, np.float32), {}

    def step(self, action: Action) -> Step:
        self.steps += 1
        over = self.steps == self.length
        ends = over and self.terminates, over and not self.terminates
        return np.ones(1, np.float32), self.reward, *ends, {}


class Counter(gym.Env):
    """Observes and pays a count that names every state: 1000 * episode + step of the episode.

    Reset gives 1000 * episode; each step adds 1, and its reward is the count it arrives at.
    Episodes have random lengths and end in either way, sometimes in both at once. As real ones do,
    it changes the array that it has returned, and has infos of all kinds.
    """

    def __init__(self, continuous: bool = False, render_mode: str | None = None) -> None:
        self.observation_space = spaces.Box(0, np.inf, (1,), np.float32)
        self.action_space = one_dimensional(continuous)
        self.episode = 0
        self.observation = np.zeros(1, np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Reset:
        super().reset(seed=seed)
        self.episode += 1
        self.observation[0] = 1000 * self.episode
        return self.observation, {"state": "new", "episode": {"r": -1.0, "l": 1}}

    def step(self, action: Action) -> Step:
        self.observation += 1
        terminated, truncated = (self.np_random.random(2) < 0.12).tolist()
        count = float(self.observation[0])
        return self.observation, count, terminated, truncated, {"state": np.ones(int(count) % 3)}


class Timer(gym.Env):
    """Observes how many steps its episode has had; a step pays the count it arrives at."""

    def __init__(self, continuous: bool = False, render_mode: str | None = None) -> None:
        self.observation_space = spaces.Box(0, np.inf, (1,), np.float32)
        self.action_space = one_dimensional(continuous)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Reset:
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Action) -> Step:
        self.count += 1
        return np.array([self.count], np.float32), float(self.count), False, False, {}


class Identity(gym.Env):
    """Pays 1 for the action that the one-hot observation names."""

    def __init__(
        self, actions: int = 4, start: int = 0, coded: str = "box", render_mode: str | None = None
    ) -> None:
        self.coded, self.start = coded, start
        self.action_space = spaces.Discrete(actions, start=start)
        # What is observed besides the right action is noise.
        self.observation_space = {
            "box": spaces.Box(0, 1, (actions,), np.float32),
            "float64": spaces.Box(0, 1, (actions,), np.float64),
            "matrix": spaces.Box(0, 1, (actions, 1), np.float32),
            "discrete": spaces.Discrete(actions),
            "multidiscrete": spaces.MultiDiscrete([3, actions]),
            "tuple": spaces.Tuple((spaces.Discrete(actions), spaces.Box(-1, 1, (2,)))),
            "dict": spaces.Dict(
                {"noise": spaces.Box(-1, 1, (1, 2)), "right": spaces.Discrete(actions)}
            ),
        }[coded]

    def observe(self) -> Observation:
        self.right = int(self.np_random.integers(self.action_space.n))
        space = self.observation_space
        noise = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        if isinstance(space, spaces.Box):
            one_hot = np.zeros(space.shape, space.dtype)
            one_hot[self.right] = 1
            return one_hot
        return {
            "discrete": self.right,
            "multidiscrete": np.array([self.np_random.integers(3), self.right]),
            "tuple": (self.right, noise),
            "dict": {"noise": noise[None], "right": self.right},
        }[self.coded]

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Reset:
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action: Action) -> Step:
        if not self.action_space.contains(action):
            raise AssertionError(f"{action!r} is not in {self.action_space}")
        reward = float(action - self.start == self.right)
        return self.observe(), reward, False, False, {}


class IdentityBox(gym.Env):
    """Pays -|action - target|^2 for the target it observes, anywhere in [-1, 1]."""

    def __init__(self, coded: str = "box", render_mode: str | None = None) -> None:
        box = spaces.Box(-1, 1, (2,), np.float64 if coded == "float64" else np.float32)
        self.coded = coded
        self.action_space = spaces.Box(-2, 2, (2,), np.float32)
        self.observation_space = box
        if coded == "dict":
            self.observation_space = spaces.Dict({"target": box, "zero": spaces.Box(0, 1, (1, 1))})

    def observe(self) -> Observation:
        self.target = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        if self.coded == "dict":
            return {"target": self.target, "zero": np.zeros((1, 1), np.float32)}
        return self.target.astype(self.observation_space.dtype)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Reset:
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action: np.ndarray) -> Step:
        reward = -float(((action - self.target) ** 2).sum())
        return self.observe(), reward, False, False, {}


class Actions(gym.Env):
    """Takes box actions as they come and keeps them in `seen`, which all instances share."""

    seen: ClassVar[list[np.ndarray]] = []
    boxes: ClassVar[dict[str, spaces.Box]] = {
        "odd": spaces.Box(-1, 1, (2, 3), np.float32),
        "narrow": spaces.Box(-0.4, 0.4, (3,), np.float32),
        "skewed": spaces.Box(np.array([1, -8], np.float32), np.array([3, -2], np.float32)),
        "unbounded": spaces.Box(-np.inf, np.inf, (2,), np.float32),
        "half": spaces.Box(0.25, np.inf, (2,), np.float32),
        "above": spaces.Box(5, np.inf, (2,), np.float32),
        "below": spaces.Box(-np.inf, -5, (2,), np.float32),
        "double": spaces.Box(-1, 1, (2,), np.float64),
        "float16": spaces.Box(-1, 1, (2,), np.float16),
        "bool": spaces.Box(0, 1, (2,), np.bool_),
    }

    def __init__(self, box: str, render_mode: str | None = None) -> None:
        self.observation_space = spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = self.boxes[box]

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Reset:
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action: np.ndarray) -> Step:
        self.seen.append(np.array(action))
        observation = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return observation, -float((action**2).sum()), False, False, {}


class Bad(gym.Env):
    """Misbehaves in its own way from step 50 on, or when it is built or reset."""

    def __init__(self, way: str, continuous: bool = False, render_mode: str | None = None) -> None:
        if way == "init":
            raise RuntimeError("no licence\nfor this robot")
        self.way, self.steps = way, 0
        self.observation_space = spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = one_dimensional(continuous)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Reset:
        super().reset(seed=seed)
        if self.way == "reset":
            raise RuntimeError("the battery is flat")
        return np.zeros(2, np.float32), {}

    def step(self, action: Action) -> Step:
        self.steps += 1
        now = self.steps >= 50
        if (now and self.way == "step") or (self.steps == 8 and self.way == "soon"):
            raise ValueError("the wheel came off")
        if self.way == "slow":
            time.sleep(0.02)
        ends = self.steps % 10 == 0
        x = np.nan if now and (self.way == "obs" or (self.way == "final" and ends)) else 0.5
        reward = {"reward": np.nan, "infinite": np.inf}.get(self.way, 1.0) if now else 1.0
        return np.full(2, x, np.float32), reward, False, ends, {}

    def close(self) -> None:
        if self.way == "close":
            raise BrokenPipeError(32, "the simulator has hung up")


class Plain(gym.Env):
    """An environment as a beginner writes it: no render_mode, no seeding."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, seed: int | None = None, options: dict | None = None) -> Reset:
        return np.zeros(2, np.float32), {}

    def step(self, action: int) -> Step:
        return np.zeros(2, np.float32), float(action), False, False, {}


class Dark(Plain):
    """Says that it can be drawn, and cannot, as MuJoCo without a display."""

    metadata: ClassVar[dict[str, object]] = {"render_modes": ["rgb_array"]}

    def __init__(self, continuous: bool = False, render_mode: str | None = None) -> None:
        self.action_space = (
            spaces.Box(-1, 1, (1,), np.float32) if continuous else Plain.action_space
        )
        self.render_mode = render_mode

    def render(self) -> None:
        raise OSError("no display")


class Spaces(gym.Env):
    """Has the spaces that it is told to have, for refusals; it is never stepped."""

    observations: ClassVar[dict[str, spaces.Space]] = {
        "box": spaces.Box(-1, 1, (2,), np.float32),
        "sequence": spaces.Sequence(spaces.Discrete(3)),
        "graph": spaces.Graph(spaces.Box(-1, 1, (2,)), None),
    }
    actions: ClassVar[dict[str, spaces.Space]] = {
        "discrete": spaces.Discrete(2),
        "box": spaces.Box(-1, 1, (2,), np.float32),
        "multidiscrete": spaces.MultiDiscrete([2, 3]),
        "multibinary": spaces.MultiBinary(3),
        "tuple": spaces.Tuple((spaces.Discrete(2), spaces.Discrete(2))),
        "dict": spaces.Dict({"turn": spaces.Discrete(2)}),
    }

    def __init__(
        self, observes: str = "box", acts: str = "discrete", render_mode: str | None = None
    ) -> None:
        self.observation_space = self.observations[observes]
        self.action_space = self.actions[acts]

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Reset:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}


def register(name: str, env: type[gym.Env], limit: int | None = None, **kwargs: object) -> None:
    gym.register(f"{name}-v0", f"{__name__}:{env.__name__}", max_episode_steps=limit, kwargs=kwargs)


register("Constant", Constant)
register("ConstantBox", Constant, continuous=True)
register("Hundred", Constant, reward=100.0, length=7)
register("HundredBox", Constant, reward=100.0, length=7, continuous=True)
register("Once", Constant, length=1, terminates=True)
register("OnceBox", Constant, length=1, terminates=True, continuous=True)
register("Counter", Counter)
register("CounterBox", Counter, continuous=True)
register("Timer", Timer, limit=11)
register("TimerBox", Timer, limit=11, continuous=True)
for coded in ("box", "float64", "matrix", "discrete", "multidiscrete", "tuple", "dict"):
    register(f"Identity-{coded}", Identity, limit=10, coded=coded)
register("Identity-from1", Identity, limit=10, start=1)
for coded in ("box", "float64", "dict"):
    register(f"IdentityBox-{coded}", IdentityBox, limit=10, coded=coded)
for box in Actions.boxes:
    register(f"Actions-{box}", Actions, limit=10, box=box)
for way in ("obs", "final", "reward", "infinite", "step", "soon", "init", "reset", "slow", "close"):
    register(f"Bad-{way}", Bad, way=way)
    register(f"BadBox-{way}", Bad, way=way, continuous=True)
register("Plain", Plain, limit=10)
register("Dark", Dark, limit=10)
register("DarkBox", Dark, limit=10, continuous=True)
register("Endless", Constant, length=10**9)
for acts in Spaces.actions:
    register(f"Acts-{acts}", Spaces, acts=acts)
for observes in Spaces.observations:
    register(f"Observes-{observes}", Spaces, observes=observes)
    register(f"ObservesBox-{observes}", Spaces, observes=observes, acts="box")
