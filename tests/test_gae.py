"""compute_gae and estimate_values, against the definition and cases worked by hand."""

from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

GAMMA, LAMBDA = 0.9, 0.7


def random_batch(T: int = 25, N: int = 6) -> tuple[Tensor, ...]:
    """rewards, values, next_values, terminations, dones, about a fifth of the rows of each kind."""
    rewards, values, next_values = torch.randn(3, T, N, dtype=torch.float64)
    ending = torch.randint(5, (T, N))
    return rewards, values, next_values, (ending == 0).double(), (ending <= 1).double()


def gae_by_definition(batch: tuple[Tensor, ...], gamma: float, gae_lambda: float) -> np.ndarray:
    """[GAE] eq. 16 row by row: sum over l of (gamma * lambda)^l * delta_{t+l}, up to a done."""
    rewards, values, next_values, terminations, dones = (x.double().numpy() for x in batch)
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


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.6, 0.95, 1.0])
def test_is_the_sum_of_discounted_deltas(
    script: ModuleType, gamma: float, gae_lambda: float
) -> None:
    batch = random_batch()
    advantages, returns = script.compute_gae(*batch, gamma, gae_lambda)
    expected = gae_by_definition(batch, gamma, gae_lambda)
    np.testing.assert_allclose(advantages.numpy(), expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(returns.numpy(), expected + batch[1].numpy(), rtol=1e-10, atol=1e-12)


def test_lambda_0_is_the_td_error(script: ModuleType) -> None:
    rewards, values, next_values, terminations, dones = batch = random_batch()
    advantages, returns = script.compute_gae(*batch, GAMMA, 0.0)
    targets = torch.where(terminations == 1, rewards, rewards + GAMMA * next_values)
    torch.testing.assert_close(advantages, targets - values)
    torch.testing.assert_close(returns, targets)


def test_lambda_1_is_the_monte_carlo_return_minus_the_value(script: ModuleType) -> None:
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
    advantages, returns = script.compute_gae(*batch, GAMMA, 1.0)
    torch.testing.assert_close(returns, expected)
    torch.testing.assert_close(advantages, expected - values)


def test_is_the_average_over_all_numbers_of_steps(script: ModuleType) -> None:
    """(1 - lambda) * sum of lambda^(k-1) * A^(k), where A^(k) waits for k steps of rewards.

    No episode ends; what would follow the last row is worth what the critic says of it.
    """
    rewards, states = torch.randn(40, dtype=torch.float64), torch.randn(41, dtype=torch.float64)
    expected = 0.0
    for k in range(1, 2000):  # from k = 40 on A^(k) stays as it is
        n = min(k, 40)
        discounts = GAMMA ** torch.arange(n + 1).double()
        waited = (discounts[:n] * rewards[:n]).sum() + discounts[n] * states[n] - states[0]
        expected += (1 - LAMBDA) * LAMBDA ** (k - 1) * waited.item()
    zeros = torch.zeros(40, 1)
    batch = (rewards[:, None], states[:-1, None], states[1:, None], zeros, zeros)
    advantages, _ = script.compute_gae(*batch, GAMMA, LAMBDA)
    assert advantages[0].item() == pytest.approx(expected, rel=1e-9)


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
def test_worked_by_hand(script: ModuleType, case: str) -> None:
    next_values, terminations, dones, expected = HAND_WORKED[case]
    columns = ([1.0, 2.0, 4.0], [2.0, 4.0, 6.0], next_values, terminations, dones)
    batch = [torch.tensor(column).float().unsqueeze(1) for column in columns]  # (3, 1)
    advantages, returns = script.compute_gae(*batch, 0.5, 0.5)
    assert advantages.flatten().tolist() == expected
    assert returns.flatten().tolist() == [expected[0] + 2, expected[1] + 4, expected[2] + 6]


def test_a_right_critic_has_no_advantages_at_a_time_limit(script: ModuleType) -> None:
    """A reward of 1 for ever is worth 1/(1 - gamma), wherever a time limit cuts."""
    ones, zeros = torch.ones(12, 1, dtype=torch.float64), torch.zeros(12, 1, dtype=torch.float64)
    cut = zeros.clone()
    cut[3::4] = 1
    worth = ones / (1 - GAMMA)
    advantages, returns = script.compute_gae(ones, worth, worth, zeros, cut, GAMMA, LAMBDA)
    torch.testing.assert_close(advantages, zeros)
    torch.testing.assert_close(returns, worth)
    terminated, _ = script.compute_gae(ones, worth, worth, cut, cut, GAMMA, LAMBDA)
    assert terminated[3].item() == pytest.approx(-GAMMA / (1 - GAMMA))


def test_terminated_and_done_have_each_their_place(script: ModuleType) -> None:
    """Taking one mask for the other, in either place, gives other numbers."""
    rewards, values, next_values, terminations, dones = batch = random_batch()
    expected = torch.as_tensor(gae_by_definition(batch, GAMMA, LAMBDA))
    advantages, _ = script.compute_gae(*batch, GAMMA, LAMBDA)
    torch.testing.assert_close(advantages, expected)
    no_bootstrap = rewards, values, next_values, dones, dones  # done in place of terminated
    no_cut = rewards, values, next_values, terminations, terminations  # and the reverse
    for mistake in (no_bootstrap, no_cut):
        wrong = torch.as_tensor(gae_by_definition(mistake, GAMMA, LAMBDA))
        assert (advantages - wrong).abs().max() > 0.1


def test_nothing_passes_from_one_episode_to_another(script: ModuleType) -> None:
    rewards, values, next_values, terminations, dones = random_batch(T=8)
    terminations[:], dones[:] = 0, 0
    dones[4, 0] = terminations[4, 1] = dones[4, 1] = 1
    before, _ = script.compute_gae(rewards, values, next_values, terminations, dones, GAMMA, LAMBDA)
    rewards[5:] += 100
    after, _ = script.compute_gae(rewards, values, next_values, terminations, dones, GAMMA, LAMBDA)
    changed = (before != after).all(dim=1), (before == after)[:5, :2].all()
    assert changed[0].tolist() == [False] * 5 + [True] * 3
    assert changed[1] and (before != after)[:5, 2:].all()


def test_environments_do_not_mix(script: ModuleType) -> None:
    batch = random_batch()
    advantages, returns = script.compute_gae(*batch, GAMMA, LAMBDA)
    for n in range(advantages.shape[1]):
        alone = script.compute_gae(*(x[:, n : n + 1] for x in batch), GAMMA, LAMBDA)
        assert torch.equal(alone[0][:, 0], advantages[:, n])
        assert torch.equal(alone[1][:, 0], returns[:, n])


@pytest.mark.parametrize("T", [1, 2])
def test_short_rollouts(script: ModuleType, T: int) -> None:
    batch = random_batch(T=T, N=40)
    advantages, _ = script.compute_gae(*batch, GAMMA, LAMBDA)
    np.testing.assert_allclose(advantages.numpy(), gae_by_definition(batch, GAMMA, LAMBDA))


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes(script: ModuleType, dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    *numbers, terminations, dones = batch = random_batch()
    numbers = [x.to(dtype) for x in numbers]
    masks = terminations.to(mask_dtype), dones.to(mask_dtype)
    advantages, returns = script.compute_gae(*numbers, *masks, GAMMA, LAMBDA)
    assert advantages.dtype == returns.dtype == dtype
    expected = gae_by_definition(batch, GAMMA, LAMBDA)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    np.testing.assert_allclose(advantages.numpy(), expected, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rewards_dtype_decides(script: ModuleType, dtype: torch.dtype) -> None:
    rewards, values, next_values, terminations, dones = random_batch()
    other = torch.float64 if dtype == torch.float32 else torch.float32
    batch = rewards.to(dtype), values.to(other), next_values.to(other), terminations, dones
    assert {x.dtype for x in script.compute_gae(*batch, GAMMA, LAMBDA)} == {dtype}


def test_inputs_stay_as_they_are(script: ModuleType) -> None:
    batch = random_batch()
    copies = [x.clone() for x in batch]
    script.compute_gae(*batch, GAMMA, LAMBDA)
    assert all(torch.equal(x, copy) for x, copy in zip(batch, copies, strict=True))


# ---- estimate_values: the agent's V is ten times the observation

TENFOLD = SimpleNamespace(get_value=lambda obs: 10 * obs.squeeze(-1))
OBS = torch.tensor([[[0.1], [0.2]], [[0.3], [0.4]], [[0.5], [0.6]]])  # (T, N, 1)
NEXT_OBS = torch.tensor([[0.7], [0.8]])


def test_next_values_without_a_time_limit_are_the_row_below(script: ModuleType) -> None:
    none = torch.zeros(3, 2), torch.zeros(0, 1)
    values, next_values = script.estimate_values(TENFOLD, OBS, NEXT_OBS, *none)
    torch.testing.assert_close(values, torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    torch.testing.assert_close(next_values, torch.tensor([[3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]))


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32])
def test_next_values_at_time_limits_are_those_of_the_final_observations(
    script: ModuleType, mask_dtype: torch.dtype
) -> None:
    truncations = torch.tensor([[0, 1], [1, 1], [0, 1]]).to(mask_dtype)
    final_obs = torch.tensor([[9.1], [9.2], [9.3], [9.4]])  # in the order of steps, then envs
    values, next_values = script.estimate_values(TENFOLD, OBS, NEXT_OBS, truncations, final_obs)
    torch.testing.assert_close(next_values, torch.tensor([[3.0, 91.0], [92.0, 93.0], [7.0, 94.0]]))
    torch.testing.assert_close(values, torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))


def test_values_have_no_gradient(script: ModuleType) -> None:
    weight = torch.ones((), requires_grad=True)
    critic = SimpleNamespace(get_value=lambda obs: weight * obs.squeeze(-1))
    truncations = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    both = script.estimate_values(critic, OBS, NEXT_OBS, truncations, torch.tensor([[9.0]]))
    assert not any(x.requires_grad for x in both)


def test_time_limit_from_final_observation_to_advantage(script: ModuleType) -> None:
    """Two steps, then a time limit at V = 90, then a new episode that must not leak back."""
    obs, rewards = torch.tensor([[[0.1]], [[0.3]], [[0.5]]]), torch.tensor([[1.0], [1.0], [1.0]])
    truncations, terminations = torch.tensor([[0.0], [1.0], [0.0]]), torch.zeros(3, 1)
    rest = torch.tensor([[0.7]]), truncations, torch.tensor([[9.0]])
    values, next_values = script.estimate_values(TENFOLD, obs, *rest)
    batch = rewards, values, next_values, terminations, truncations
    advantages, _ = script.compute_gae(*batch, 0.5, 1.0)
    # row 2: 1 + 7/2 - 5;  row 1: 1 + 90/2 - 3;  row 0: 1 + 3/2 - 1 + 43/2
    torch.testing.assert_close(advantages, torch.tensor([[23.0], [43.0], [-0.5]]))
