"""A small environment with pixels: pixels:Catch-v0."""

import gymnasium as gym
import numpy as np


class Catch(gym.Env):
    """A ball falls through a grid of 7 x 7 cells; the paddle below it stays, goes left or right.

    Pays 1 for a ball that is caught and -1 for one that is not, so about -0.7 an episode to who
    does not look. An episode is one ball, 6 steps.
    """

    observation_space = gym.spaces.Box(0, 255, (96, 96, 3), np.uint8)
    action_space = gym.spaces.Discrete(3)

    def observe(self) -> np.ndarray:
        grid = np.zeros((8, 8, 3), dtype=np.uint8)  # the last row and column stay black
        grid[6, self.paddle] = (0, 200, 0)
        grid[self.row, self.ball] = 255
        return grid.repeat(12, axis=0).repeat(12, axis=1)

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


gym.register("Catch-v0", Catch)
