"""An environment whose legal actions change, to try action_mask.patch: masked:Masked-v0."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Masked(gym.Env):
    """Ten steps, at each three of six actions are legal; the one with the lowest number pays 1.

    An illegal action raises.
    """

    observation_space = spaces.Dict(
        {"action_mask": spaces.Box(0, 1, (6,), np.float32), "noise": spaces.Box(0, 1, (2,))}
    )
    action_space = spaces.Discrete(6)

    def observe(self) -> dict[str, np.ndarray]:
        self.legal = self.np_random.choice(6, size=3, replace=False)
        mask = np.zeros(6, np.float32)
        mask[self.legal] = 1
        return {"action_mask": mask, "noise": self.np_random.random(2, dtype=np.float32)}

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[dict[str, np.ndarray], dict]:
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action: int) -> tuple[dict[str, np.ndarray], float, bool, bool, dict]:
        if action not in self.legal:
            raise ValueError(f"action {action} is illegal")
        reward = float(action == min(self.legal))
        return self.observe(), reward, False, False, {}


gym.register("Masked-v0", Masked, max_episode_steps=10)
