"""compute_gae and add_advantages, against the definition and cases worked by hand."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ppo import Args, add_advantages, compute_gae

GAMMA, LAMBDA = 0.9, 0.7


def random_batch(T: int = 25) -> tuple[Tensor, ...]:
    """rewards, values, next_values, terminations, dones, about a fifth of the rows of each kind."""
    rewards, values, next_values = torch.randn(3, T, 6, dtype=torch.float64)
    ending = torch.randint(5, (T, 6))
    return rewards, values, next_values, (ending == 0).double(), (ending <= 1).double()


def gae_by_definition(batch: tuple[Tensor, ...], gamma: float, gae_lambda: float) -> np.ndarray:
    """[GAE] eq. 16 row by row: sum over l of (gamma * lambda)^l * delta_{t+l}, up to a done."""
    rewards, values, next_values, terminations, dones = (x.numpy() for x in batch)
    T, N = rewards.shape
    advantages = np.zeros((T, N))
    for n in range(N):
        for start in range(T):
            for t in range(start, T):
                target = rewards[t, n]
                if not terminations[t, n]:
                    target += gamma * next_values[t, n]
                weight = (gamma * gae_lambda) ** (t - start)
                advantages[start, n] += weight * (target - values[t, n])
                if dones[t, n]:
                    break
    return advantages


@pytest.mark.parametrize("T", [1, 25])
@pytest.mark.parametrize(
    ("gamma", "gae_lambda"), [(0.99, 0.95), (0.5, 0.6), (1.0, 1.0), (0, 0.9), (0.99, 0)]
)
def test_is_the_sum_of_discounted_deltas(gamma: float, gae_lambda: float, T: int) -> None:
    batch = random_batch(T)
    copies = [x.clone() for x in batch]
    advantages, returns = compute_gae(*batch, gamma, gae_lambda)
    expected = gae_by_definition(batch, gamma, gae_lambda)
    np.testing.assert_allclose(advantages.numpy(), expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(returns.numpy(), expected + batch[1].numpy(), rtol=1e-10, atol=1e-12)
    assert all(torch.equal(x, copy) for x, copy in zip(batch, copies, strict=True))


def test_lambda_1_is_the_monte_carlo_return_minus_the_value() -> None:
    """Returns are the episode's rewards, plus the last state's value unless that is terminal."""
    rewards, values, next_values, terminations, dones = random_batch()
    T, N = rewards.shape
    within = dones[:-1] == 0  # inside an episode, the next state is the row below
    next_values[:-1][within] = values[1:][within]
    expected = torch.zeros(T, N, dtype=torch.float64)
    for n in range(N):
        for start in range(T):
            end = next((t for t in range(start, T) if dones[t, n]), T - 1)
            for t in range(start, end + 1):
                expected[start, n] += GAMMA ** (t - start) * rewards[t, n]
            if not terminations[end, n]:
                expected[start, n] += GAMMA ** (end + 1 - start) * next_values[end, n]
    batch = rewards, values, next_values, terminations, dones
    advantages, returns = compute_gae(*batch, GAMMA, 1.0)
    torch.testing.assert_close(returns, expected)
    torch.testing.assert_close(advantages, expected - values)


# gamma = lambda = 1/2, so that a delta weighs 1/4 one row up. Rewards 1, 2, 4; values 2, 4, 6.
# deltas: 1 + 4/2 - 2 = 1;  2 + 6/2 - 4 = 1;  4 + 8/2 - 6 = 2
HAND_WORKED = {  # next values, terminations, dones, advantages
    # 1 + 1.5/4;  1 + 2/4;  2
    "goes on": ([4.0, 6.0, 8.0], [0, 0, 0], [0, 0, 0], [1.375, 1.5, 2.0]),
    # last delta: 4 - 6 = -2;  1 + 0.5/4;  1 - 2/4;  -2
    "terminated at the end": ([4.0, 6.0, 8.0], [0, 0, 1], [0, 0, 1], [1.125, 0.5, -2.0]),
    # a truncation in the last row changes nothing but what the next batch starts with
    "truncated at the end": ([4.0, 6.0, 8.0], [0, 0, 0], [0, 0, 1], [1.375, 1.5, 2.0]),
    # middle delta: 2 - 4 = -2;  1 - 2/4;  -2;  2
    "terminated in the middle": ([4.0, 9.0, 8.0], [0, 1, 0], [0, 1, 0], [0.5, -2.0, 2.0]),
    # middle delta: 2 + 9/2 - 4 = 2.5, V of the final observation is 9;  1 + 2.5/4;  2.5;  2
    "truncated in the middle": ([4.0, 9.0, 8.0], [0, 0, 0], [0, 1, 0], [1.625, 2.5, 2.0]),
    # 1 - 2 = -1;  middle delta 2 + 9/2 - 4 = 2.5;  4 - 6 = -2: three episodes of one step
    "all end": ([4.0, 9.0, 8.0], [1, 0, 1], [1, 1, 1], [-1.0, 2.5, -2.0]),
}


@pytest.mark.parametrize("case", HAND_WORKED)
def test_worked_by_hand(case: str) -> None:
    next_values, terminations, dones, expected = HAND_WORKED[case]
    columns = ([1.0, 2.0, 4.0], [2.0, 4.0, 6.0], next_values, terminations, dones)
    batch = [torch.tensor(column).float().unsqueeze(1) for column in columns]  # (3, 1)
    advantages, returns = compute_gae(*batch, 0.5, 0.5)
    assert advantages.flatten().tolist() == expected
    assert returns.flatten().tolist() == [expected[0] + 2, expected[1] + 4, expected[2] + 6]


# ---- add_advantages


class Tenfold:
    """V is ten times the observation; keeps which rows it was asked about."""

    def __init__(self) -> None:
        self.asked, self.weight = [], torch.ones((), requires_grad=True)

    def features(self, rows: dict[str, Tensor]) -> Tensor:
        self.asked.append(rows)
        return rows["obs"]

    def get_value(self, features: Tensor) -> Tensor:
        return self.weight * 10 * features.squeeze(-1)


def batch_of(obs: list, next_obs: list, terminations: list, dones: list) -> dict[str, Tensor]:
    """A batch with rewards of 1; all are (T, N)."""
    columns = {"terminations": terminations, "dones": dones, "rewards": np.ones_like(obs)}
    batch = {name: torch.as_tensor(np.array(x, np.float32)) for name, x in columns.items()}
    observations = {"obs": obs, "next_obs": next_obs}
    return batch | {name: torch.tensor(x).unsqueeze(-1) for name, x in observations.items()}


def test_time_limit_from_final_observation_to_advantage() -> None:
    """Two steps, then a time limit at V = 90, then a new episode that must not leak back."""
    args = Args(gamma=0.5, gae_lambda=1.0, cuda=False)
    obs, next_obs, none = [[0.1], [0.3], [0.5]], [[0.3], [9.0], [0.7]], [[0], [0], [0]]
    batch = batch_of(obs, next_obs, terminations=none, dones=[[0], [1], [0]])
    add_advantages(Tenfold(), args, batch)
    # row 2: 1 + 7/2 - 5;  row 1: 1 + 90/2 - 3;  row 0: 1 + 3/2 - 1 + 43/2
    torch.testing.assert_close(batch["values"], torch.tensor([[1.0], [3.0], [5.0]]))
    torch.testing.assert_close(batch["advantages"], torch.tensor([[23.0], [43.0], [-0.5]]))
    torch.testing.assert_close(batch["returns"], torch.tensor([[24.0], [46.0], [4.5]]))
    # The same where the episode terminates: row 1: 1 - 3;  row 0: 1 + 3/2 - 1 - 2/2
    batch = batch_of(obs, next_obs, terminations=[[0], [1], [0]], dones=[[0], [1], [0]])
    add_advantages(Tenfold(), args, batch)
    torch.testing.assert_close(batch["advantages"], torch.tensor([[0.5], [-2.0], [-0.5]]))


def test_next_observations_are_asked_where_an_episode_or_the_batch_ends() -> None:
    """Elsewhere V(s_{t+1}) is the row below, in the same environment."""
    agent, args = Tenfold(), Args(gamma=1.0, gae_lambda=0.0, cuda=False)
    obs, next_obs = [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], [[7.1, 7.2], [7.3, 7.4], [7.5, 7.6]]
    dones = [[0, 1], [0, 0], [1, 0]]
    batch = batch_of(obs, next_obs, terminations=np.zeros((3, 2)).tolist(), dones=dones)
    batch["memory"] = torch.arange(6.0).view(3, 2, 1)  # a modification's
    add_advantages(agent, args, batch)
    next_values = batch["returns"] - 1  # where gamma is 1 and lambda 0
    torch.testing.assert_close(next_values, torch.tensor([[3.0, 72.0], [5.0, 6.0], [75.0, 76.0]]))
    rows, last_rows = agent.asked
    assert last_rows["obs"].flatten().tolist() == pytest.approx([7.2, 7.5, 7.6])
    assert rows["obs"].shape == (6, 1) and rows["memory"].flatten().tolist() == list(range(6))
    assert batch["memory"].shape == (3, 2, 1) and batch["obs"].shape == (3, 2, 1)
    assert not any(x.requires_grad for x in batch.values())
