"""A small environment with pixels: pixels:Catch-v0, as ppo_atari.py's network takes them."""

import gymnasium as gym
import numpy as np


class Catch(gym.Env):
    """A ball falls through a grid of 7 x 7 cells; the paddle below it stays, goes left or right.

    Pays 1 for a ball that is caught and -1 for one that is not, so about -0.7 an episode to who
    does not look. An episode is one ball, 6 steps.
    """

    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(3)

    def observe(self) -> np.ndarray:
        grid = np.zeros((7, 7), dtype=np.uint8)
        grid[6, self.paddle] = 128
        grid[self.row, self.ball] = 255
        return np.repeat(grid.repeat(12, axis=0).repeat(12, axis=1)[None], 4, axis=0)

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.row, (self.ball, self.paddle) = 0, self.np_random.integers(7, size=2)
        return self.observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.row += 1
        self.paddle = min(max(self.paddle + [0, -1, 1][action], 0), 6)
        down = self.row == 6
        reward = (1.0 if self.ball == self.paddle else -1.0) if down else 0.0
        return self.observe(), reward, down, False, {}
