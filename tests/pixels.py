"""Small vector environments with pixels, made as ppo_atari.py's make_envs promises them."""

from typing import Any

import gymnasium as gym
import numpy as np

Step = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]


class Pixels(gym.vector.VectorEnv):
    """What they share: spaces, true returns, new episodes in the step that ends the old ones.

    begin(lanes) starts an episode in each of the lanes, draw() returns what there is to be seen,
    advance(actions) returns rewards, terminations and truncations.
    """

    actions = 3

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.single_observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
        self.single_action_space = gym.spaces.Discrete(self.actions)

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        self.rng = np.random.default_rng(seed)
        self.episode_returns = np.zeros(self.num_envs)
        self.episode_lengths = np.zeros(self.num_envs, dtype=int)
        self.begin(np.arange(self.num_envs))
        return self.draw(), {}

    def step(self, actions: np.ndarray) -> Step:
        rewards, terminations, truncations = self.advance(actions)
        self.episode_returns += rewards
        self.episode_lengths += 1
        ended, infos = terminations | truncations, {}
        if ended.any():
            # As in the emulator, only the rows of lanes that have ended can be read.
            final = np.where(ended[:, None, None, None], self.draw(), np.uint8(255))
            infos = {"final_obs": final, "_episode": ended}
            infos["episode"] = {"r": self.episode_returns.copy(), "l": self.episode_lengths.copy()}
            self.episode_returns[ended] = self.episode_lengths[ended] = 0
            self.begin(np.flatnonzero(ended))
        return self.draw(), rewards, terminations, truncations, infos


class Catch(Pixels):
    """A ball falls through a grid of 7 x 7 cells; the paddle below it stays, goes left or right.

    Pays 1 for a ball that is caught and -1 for one that is not, so about -0.7 an episode to who
    does not look. An episode is one ball, 6 steps.
    """

    def begin(self, lanes: np.ndarray) -> None:
        if len(lanes) == self.num_envs:
            self.row, self.ball, self.paddle = np.zeros((3, self.num_envs), dtype=int)
        self.row[lanes] = 0
        self.ball[lanes] = self.rng.integers(7, size=len(lanes))
        self.paddle[lanes] = self.rng.integers(7, size=len(lanes))

    def draw(self) -> np.ndarray:
        grid = np.zeros((self.num_envs, 7, 7), dtype=np.uint8)
        lanes = np.arange(self.num_envs)
        grid[lanes, 6, self.paddle] = 128
        grid[lanes, self.row, self.ball] = 255
        frame = grid.repeat(12, axis=1).repeat(12, axis=2)
        return np.repeat(frame[:, None], 4, axis=1)

    def advance(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        self.paddle = (self.paddle + np.array([0, -1, 1])[actions]).clip(0, 6)
        self.row += 1
        down = self.row == 6
        rewards = np.where(down, np.where(self.ball == self.paddle, 1, -1), 0)
        return rewards, down, np.zeros_like(down)


class Clocks(Pixels):
    """Lane i is cut off after 3 + i steps; lane 0 dies in every second one of its last steps.

    Each pixel shows the lane and the steps of the episode: 50 * lane + steps.
    """

    def begin(self, lanes: np.ndarray) -> None:
        if len(lanes) == self.num_envs:
            self.clock = np.zeros(self.num_envs, dtype=int)
            self.deaths = 0
        self.clock[lanes] = 0

    def draw(self) -> np.ndarray:
        shown = (50 * np.arange(self.num_envs) + self.clock).astype(np.uint8)
        return np.broadcast_to(shown[:, None, None, None], (self.num_envs, 4, 84, 84)).copy()

    def advance(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        self.clock += 1
        truncations = self.clock == 3 + np.arange(self.num_envs)
        terminations = np.zeros_like(truncations)
        self.deaths += int(truncations[0])
        terminations[0] = truncations[0] and self.deaths % 2 == 0
        return np.ones(self.num_envs, dtype=int), terminations, truncations


class Endless(Pixels):
    """Lane i ends after limits[i] steps, by a time limit; each step pays 1."""

    def __init__(self, limits: list[int]) -> None:
        super().__init__(len(limits))
        self.limits = np.array(limits)
        self.blank = np.zeros((len(limits), 4, 84, 84), dtype=np.uint8)

    def begin(self, lanes: np.ndarray) -> None:
        if len(lanes) == self.num_envs:
            self.clock = np.zeros(self.num_envs, dtype=int)
        self.clock[lanes] = 0

    def draw(self) -> np.ndarray:
        return self.blank

    def advance(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        self.clock += 1
        truncations = self.clock == self.limits
        return np.ones(self.num_envs, dtype=int), np.zeros_like(truncations), truncations
