"""RunningMeanStd, against numpy over the whole history."""

import io

import numpy as np
import pytest
import torch
from helpers import tiny

import ppo
from ppo import RunningMeanStd


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 4.5e6])  # a coordinate in meters
@pytest.mark.parametrize("shape", [(), (3,), (2, 4)])
def test_statistics_are_those_of_the_whole_history(
    shape: tuple[int, ...], offset: float, dtype: torch.dtype
) -> None:
    stats, history = RunningMeanStd(shape), []
    for i, rows in enumerate((1, 7, 64, 3, 200)):  # each with a mean and a spread of its own
        batch = (offset + i + (i + 1) * torch.randn(rows, *shape, dtype=torch.float64)).to(dtype)
        before = batch.clone()
        stats.update(batch)
        assert torch.equal(batch, before)
        history.append(batch.double().numpy())
        seen = np.concatenate(history)
        np.testing.assert_allclose(stats.mean.numpy(), seen.mean(axis=0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(stats.var.numpy(), seen.var(axis=0), rtol=1e-7, atol=1e-12)
        assert stats.count.item() == len(seen)
    assert stats.mean.dtype == stats.var.dtype == torch.float64
    assert stats.mean.shape == stats.var.shape == shape


def test_what_never_changes_is_no_division_by_zero() -> None:
    args = tiny(ppo, norm_obs=True)
    agent = ppo.Agent(ppo.make_envs(args, 1), args)
    for _ in range(3):
        agent.obs_stats.update(torch.full((8, 4), 0.1))
    assert agent.features({"obs": torch.full((2, 4), 0.1)}).abs().max() < 1e-3


@pytest.mark.parametrize("updates", [0, 3])
def test_statistics_survive_saving(updates: int) -> None:
    """All of them: what was loaded is the same now and after a further update."""
    stats, loaded, file = RunningMeanStd((3,)), RunningMeanStd((3,)), io.BytesIO()
    loaded.update(torch.randn(5, 3))
    for _ in range(updates):
        stats.update(3 + 5 * torch.randn(20, 3))
    torch.save(stats.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(2):
        for name in ("mean", "var", "count"):
            assert torch.equal(getattr(stats, name), getattr(loaded, name))
        more = torch.randn(11, 3)
        stats.update(more)
        loaded.update(more)
