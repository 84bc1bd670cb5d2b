"""Running statistics, advantage normalisation and reward scaling, against numpy."""

import copy
import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

BATCHES = (1, 7, 64, 3, 200)  # rows


class Threads:
    """Stands in for torch.distributed: threads play the processes of torchrun."""

    def __init__(self, world_size: int) -> None:
        self.world_size, self.parts = world_size, []
        self.barrier = threading.Barrier(world_size, timeout=20)

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self) -> int:
        return self.world_size

    def all_reduce(self, x: Tensor) -> None:
        """Every process's x becomes the sum of them all, as torch.distributed does by default."""
        self.parts.append(x.clone())
        self.barrier.wait()
        x.copy_(torch.stack(self.parts).sum(dim=0))
        self.barrier.wait()
        self.parts.clear()
        self.barrier.wait()

    def run(self, function: Callable[[int], object]) -> list:
        """What function(rank) gives, for each rank."""
        with ThreadPoolExecutor(self.world_size) as pool:
            return list(pool.map(function, range(self.world_size)))


# ---- RunningMeanStd


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("shape", [(), (3,), (2, 4)])
def test_running_statistics_are_those_of_the_whole_history(
    script: ModuleType, shape: tuple[int, ...], offset: float, dtype: torch.dtype
) -> None:
    stats, history = script.RunningMeanStd(shape), []
    for i, rows in enumerate(BATCHES):  # each batch has a mean and a spread of its own
        batch = (offset + i + (i + 1) * torch.randn(rows, *shape, dtype=torch.float64)).to(dtype)
        stats.update(batch)
        history.append(batch.double().numpy())
        seen = np.concatenate(history)
        np.testing.assert_allclose(stats.mean.numpy(), seen.mean(axis=0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(stats.var.numpy(), seen.var(axis=0), rtol=1e-7, atol=1e-12)
        assert stats.count.item() == len(seen)
    np.testing.assert_allclose(stats.std.numpy(), seen.std(axis=0), rtol=1e-6)
    assert stats.mean.dtype == stats.var.dtype == torch.float64
    assert stats.mean.shape == stats.var.shape == shape


def test_many_updates_lose_no_precision(script: ModuleType) -> None:
    stats = script.RunningMeanStd((1,))
    history = 1e7 + torch.randn(500, 4, 1, dtype=torch.float64)
    for batch in history:
        stats.update(batch)
    np.testing.assert_allclose(stats.mean.numpy(), history.numpy().mean(axis=(0, 1)), rtol=1e-14)
    np.testing.assert_allclose(stats.var.numpy(), history.numpy().var(axis=(0, 1)), rtol=1e-6)


def test_one_large_batch_is_as_good_as_many_small_ones(script: ModuleType) -> None:
    rows = 5 + 2 * torch.randn(60, 3)
    whole, parts = script.RunningMeanStd((3,)), script.RunningMeanStd((3,))
    whole.update(rows)
    for part in rows.split(7):
        parts.update(part)
    torch.testing.assert_close(whole.state_dict(), parts.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
def test_fresh_statistics_are_the_identity(script: ModuleType, dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, 1.0, 11.0], [250.0, 3.0, 10.0]]).to(dtype)
    x = x if dtype == torch.uint8 else torch.cat([x, -1000 * x])
    normalized = script.RunningMeanStd((3,)).normalize(x)
    assert normalized.dtype == torch.float32
    assert torch.equal(normalized, x.float())


def test_normalized_rows_have_mean_0_and_std_1(script: ModuleType) -> None:
    x = torch.tensor([1e-2, 1.0, 1e4]) * torch.randn(500, 3) + torch.tensor([5.0, -1.0, 1e5])
    stats = script.RunningMeanStd((3,))
    stats.update(x)
    normalized = stats.normalize(x)
    assert normalized.dtype == torch.float32
    np.testing.assert_allclose(normalized.numpy().mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(normalized.numpy().std(axis=0), 1, rtol=1e-3)


def test_normalized_values_worked_by_hand(script: ModuleType) -> None:
    """Rows 1 and 5 have mean 3 and standard deviation 2; results are held within 10."""
    stats = script.RunningMeanStd((1,))
    stats.update(torch.tensor([[1.0], [5.0]]))
    x = torch.tensor([[3.0], [4.0], [0.0], [22.8], [23.2], [1e9], [-16.8], [-17.2], [-1e9]])
    expected = torch.tensor([[0.0], [0.5], [-1.5], [9.9], [10], [10], [-9.9], [-10], [-10]])
    torch.testing.assert_close(stats.normalize(x), expected)
    torch.testing.assert_close(stats.normalize(x.double()), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64])
def test_observations_of_other_types_are_normalised_as_float32(
    script: ModuleType, dtype: torch.dtype
) -> None:
    """Training makes observations float32 before it normalises them, an evaluation does not."""
    stats = script.RunningMeanStd((2,))
    stats.update(torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.25]]))
    x = torch.tensor([[1 / 3, 1], [0, 1]], dtype=torch.float64).to(dtype)
    assert torch.equal(stats.normalize(x), stats.normalize(x.float()))
    assert stats.normalize(x).dtype == torch.float32


def test_what_never_changes_is_no_division_by_zero(script: ModuleType) -> None:
    stats = script.RunningMeanStd((2,))
    for _ in range(3):
        stats.update(torch.full((8, 2), 0.1))
    assert torch.equal(stats.normalize(torch.full((4, 2), 0.1)), torch.zeros(4, 2))
    assert (stats.std > 0).all()


def test_normalizing_does_not_update(script: ModuleType) -> None:
    stats = script.RunningMeanStd((3,))
    stats.update(torch.randn(9, 3))
    before = {name: x.clone() for name, x in stats.state_dict().items()}
    stats.normalize(torch.randn(50, 3) + 7), stats.std
    assert all(torch.equal(x, before[name]) for name, x in stats.state_dict().items())


@pytest.mark.parametrize("updates", [0, 1, 3])
def test_statistics_survive_saving(script: ModuleType, updates: int) -> None:
    """All of them: what was loaded normalises alike now and after further updates."""
    stats, loaded, file = script.RunningMeanStd((3,)), script.RunningMeanStd((3,)), io.BytesIO()
    for _ in range(updates):
        stats.update(3 + 5 * torch.randn(20, 3))
    torch.save(stats.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    x, more = 200 * torch.randn(30, 3), torch.randn(11, 3)
    assert torch.equal(stats.normalize(x), loaded.normalize(x))
    stats.update(more), loaded.update(more)
    assert torch.equal(stats.normalize(x), loaded.normalize(x))


def test_statistics_move_with_their_module(script: ModuleType) -> None:
    """Loaded first and moved to a device then, they are all there (--evaluate does so)."""
    stats, loaded = script.RunningMeanStd((3,)), script.RunningMeanStd((3,))
    stats.update(torch.randn(9, 3))
    loaded.load_state_dict(stats.state_dict())
    x = torch.zeros(2, 3, device="meta")  # a device that every machine has
    assert loaded.to("meta").normalize(x).device.type == "meta"
    assert script.RunningMeanStd((3,)).to("meta").normalize(x).device.type == "meta"


# ---- over processes


def test_a_single_process_has_its_own_mean(script: ModuleType) -> None:
    x = torch.randn(4, 3)
    copy = x.clone()
    assert script.all_mean(x) is x
    assert torch.equal(x, copy)


def test_mean_over_processes(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = Threads(3)
    monkeypatch.setattr(script, "distributed", threads)
    x = torch.randn(3, 5)
    parts = x.clone()
    means = threads.run(lambda rank: script.all_mean(parts[rank]))
    for rank in range(3):
        torch.testing.assert_close(means[rank], x.mean(dim=0))
        torch.testing.assert_close(parts[rank], x.mean(dim=0))  # in place


def test_moments(script: ModuleType) -> None:
    x = 3 + 2 * torch.randn(50, 4, dtype=torch.float64)
    copy = x.clone()
    mean, var = script.all_moments(x)
    np.testing.assert_allclose(mean.numpy(), x.numpy().mean(axis=0))
    np.testing.assert_allclose(var.numpy(), x.numpy().var(axis=0))
    assert torch.equal(x, copy)


def test_processes_together_know_what_one_would(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moments, advantages and running statistics are those of all processes' rows."""
    x = torch.randn(2, 3, 10, 4, dtype=torch.float64)  # processes, updates, rows, columns
    x[1] = 100 + 7 * x[1]
    whole = script.RunningMeanStd((4,))
    for i in range(3):
        whole.update(x[:, i].flatten(0, 1))
    advantages = script.normalize_advantages(x[:, 0, :, 0].flatten()).view(2, 10)

    def process(rank: int) -> tuple[Tensor, ...]:
        stats = script.RunningMeanStd((4,))
        for i in range(3):
            stats.update(x[rank, i])
        own = script.normalize_advantages(x[rank, 0, :, 0])
        return *script.all_moments(x[rank, 0]), own, stats

    threads = Threads(2)
    monkeypatch.setattr(script, "distributed", threads)
    first = x[:, 0].flatten(0, 1).numpy()
    for rank, (mean, var, own, stats) in enumerate(threads.run(process)):
        np.testing.assert_allclose(mean.numpy(), first.mean(axis=0))
        np.testing.assert_allclose(var.numpy(), first.var(axis=0))
        torch.testing.assert_close(own, advantages[rank])
        torch.testing.assert_close(stats.mean, whole.mean)
        torch.testing.assert_close(stats.var, whole.var)


def test_all_gradients_lie_in_one_tensor(script: ModuleType, agent: nn.Module) -> None:
    alone = copy.deepcopy(agent)
    gradients = script.join_gradients(agent)
    assert gradients.shape == (sum(p.numel() for p in agent.parameters()),)

    def loss(network: nn.Module) -> Tensor:
        return sum(((k + 1) * p**2).sum() for k, p in enumerate(network.parameters()))

    for _ in range(2):  # not added to what was there before, once it is cleared
        gradients.zero_()
        loss(agent).backward()
        expected = torch.autograd.grad(loss(alone), list(alone.parameters()))
        torch.testing.assert_close([p.grad for p in agent.parameters()], list(expected))
    squares = [(x.double() ** 2).sum() for x in expected]
    torch.testing.assert_close(gradients.norm().double(), sum(squares).sqrt(), rtol=1e-4, atol=0)
    gradients *= 3
    torch.testing.assert_close([p.grad for p in agent.parameters()], [3 * x for x in expected])
    # Fused Adam goes through memory: it mixes up gradients laid out unlike their parameters.
    assert all(p.grad.stride() == p.stride() for p in agent.parameters())


def test_processes_average_their_gradients(
    script: ModuleType, agent: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents = [agent, copy.deepcopy(agent)]
    gradients = [script.join_gradients(process) for process in agents]
    expected = [torch.zeros_like(parameter) for parameter in agent.parameters()]
    for process in agents:
        for parameter, mean in zip(process.parameters(), expected, strict=True):
            parameter.grad += torch.randn_like(parameter)
            mean += parameter.grad / 2
    before = gradients[0].clone()
    script.all_mean(gradients[0])  # alone: nothing happens
    assert torch.equal(gradients[0], before)
    threads = Threads(2)
    monkeypatch.setattr(script, "distributed", threads)
    threads.run(lambda rank: script.all_mean(gradients[rank]))
    for process in agents:
        torch.testing.assert_close([p.grad for p in process.parameters()], expected)


def test_a_frozen_network_has_no_gradients(script: ModuleType, agent: nn.Module) -> None:
    """Which a reader may add to Agent; the others' gradients are joined as without it."""
    agent.frozen = nn.Linear(2, 3).requires_grad_(False)
    gradients = script.join_gradients(agent)
    gradients += 0.5
    assert agent.frozen.weight.grad is None
    learning = [p for p in agent.parameters() if p.requires_grad]
    assert learning and all((p.grad == 0.5).all() for p in learning)
    assert len(gradients) == sum(p.numel() for p in learning)


# ---- normalize_advantages


@pytest.mark.parametrize("rows", [2, 5, 64, 1000])
def test_advantages_get_mean_0_and_std_1(script: ModuleType, rows: int) -> None:
    advantages = 50 + 20 * torch.randn(rows)
    copy = advantages.clone()
    normalized = script.normalize_advantages(advantages)
    assert normalized.shape == (rows,) and normalized.dtype == torch.float32
    assert normalized.numpy().mean() == pytest.approx(0, abs=1e-5)
    assert normalized.numpy().std() == pytest.approx(1, rel=1e-4)
    assert torch.equal(normalized.argsort(), advantages.argsort())
    assert torch.equal(advantages, copy)


def test_advantages_worked_by_hand(script: ModuleType) -> None:
    """2, 4, 4, 4, 5, 5, 7, 9 have mean 5 and (population) standard deviation 2."""
    normalized = script.normalize_advantages(torch.tensor([2.0, 4, 4, 4, 5, 5, 7, 9]))
    expected = torch.tensor([-1.5, -0.5, -0.5, -0.5, 0, 0, 1, 2])
    torch.testing.assert_close(normalized, expected)


def test_equal_advantages_become_0(script: ModuleType) -> None:
    assert torch.equal(script.normalize_advantages(torch.full((8,), 3.0)), torch.zeros(8))


# ---- discounted_returns


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_discounted_returns_by_definition(script: ModuleType, gamma: float) -> None:
    """The sum of gamma^k * r_{t-k} back to the episode's start, in whichever batch that was."""
    T, N = 36, 5
    rewards = torch.randn(T, N, dtype=torch.float64)
    dones = (torch.rand(T, N) < 0.15).double()
    assert dones[11].any() and dones[:11].any()  # an end in a batch's last row, and inside
    dones[11, 0], dones[11, 1] = 1, 0
    expected = torch.zeros(T, N, dtype=torch.float64)
    for n in range(N):
        for t in range(T):
            for k in range(t + 1):
                if k and dones[t - k, n]:
                    break
                expected[t, n] += gamma**k * rewards[t - k, n]
    start = torch.zeros(N, dtype=torch.float64)
    traces = []
    for batch in range(3):
        rows = slice(12 * batch, 12 * (batch + 1))
        copy = start.clone()
        trace, next_start = script.discounted_returns(rewards[rows], dones[rows], gamma, start)
        assert torch.equal(start, copy)  # untouched
        start = next_start
        traces.append(trace)
    torch.testing.assert_close(torch.cat(traces), expected)


def test_discounted_returns_worked_by_hand(script: ModuleType) -> None:
    rewards = torch.tensor([[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]])
    dones = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    traces, end = script.discounted_returns(rewards, dones, 0.5, torch.tensor([0.0, 8.0]))
    torch.testing.assert_close(traces, torch.tensor([[1.0, 5.0], [2.5, 4.5], [4.0, 6.25]]))
    torch.testing.assert_close(end, torch.tensor([4.0, 0.0]))
