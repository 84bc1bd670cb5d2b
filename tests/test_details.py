"""Implementation details that no other test would miss: Adam, minibatches, gradient lengths."""

import itertools
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import SCRIPTS, column, tiny
from torch import Tensor

import ppo_continuous

scripts = pytest.mark.parametrize("script", SCRIPTS, ids=[s.__name__ for s in SCRIPTS])


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def watch_minibatches(
    monkeypatch: pytest.MonkeyPatch, script: ModuleType
) -> list[dict[str, Tensor]]:
    """The rows of every minibatch that the script trains on, in order."""
    real, seen = script.minibatch_loss, []

    def watched(agent: object, args: object, mb: dict[str, Tensor], kl_coef: Tensor) -> object:
        seen.append({name: x.clone() for name, x in mb.items()})
        return real(agent, args, mb, kl_coef)

    monkeypatch.setattr(script, "minibatch_loss", watched)
    return seen


def counting(script: ModuleType, **changes: object) -> object:
    """A run in Counter, whose reward is the count that the next observation will show."""
    box = "Box" if script is ppo_continuous else ""
    settings = {"norm_obs": False, "norm_reward": False, "gamma": 0.0} | changes
    return tiny(script, env_id=f"envs:Counter{box}-v0", **settings)


@scripts
def test_each_epoch_uses_every_row_once(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch_minibatches(monkeypatch, script)
    script.train(counting(script, num_minibatches=4, update_epochs=3))
    assert len(seen) == 8 * 3 * 4
    assert all(len(x) == 16 for mb in seen for x in mb.values())
    epochs = [
        torch.cat([torch.cat([mb["obs"].flatten(1), mb["logprobs"][:, None]], 1) for mb in mbs])
        for mbs in (seen[i : i + 4] for i in range(0, len(seen), 4))
    ]
    for first, second in itertools.pairwise(epochs[:3]):
        assert sorted(first.tolist()) == sorted(second.tolist())
        assert first.tolist() != second.tolist()  # shuffled anew
    assert sorted(epochs[0].tolist()) != sorted(epochs[3].tolist())  # another batch


@scripts
def test_rows_keep_together(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without discounting ahead, a row's return is its reward: the observed count and one more."""
    seen = watch_minibatches(monkeypatch, script)
    script.train(counting(script, recompute_advantages=False))
    for mb in seen:
        torch.testing.assert_close(mb["returns"], mb["obs"][:, 0] + 1)
        torch.testing.assert_close(mb["advantages"], mb["returns"] - mb["values"])
    assert len(seen[0]["obs"].unique()) > 1


@scripts
def test_adam_has_its_epsilon(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizers = []

    class Watched(torch.optim.Adam):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            optimizers.append(self)

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    script.train(tiny(script))
    (optimizer,) = optimizers
    assert [group["eps"] for group in optimizer.param_groups] == [1e-5]


@scripts
def test_gradients_are_cut_to_their_length(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All parameters' gradients together; grad_norm in metrics.csv is the length before."""
    lengths = []

    class Watched(torch.optim.Adam):
        def step(self, closure: None = None) -> None:
            gradients = [p.grad.flatten() for g in self.param_groups for p in g["params"]]
            lengths.append(torch.cat(gradients).norm().item())
            super().step(closure)

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    folder = script.train(tiny(script, max_grad_norm=0.01))
    assert len(lengths) == 8 * 4
    assert max(lengths) < 0.01 + 1e-6
    assert min(column(folder, "losses/grad_norm")) > 0.01
    # Shorter ones stay as they are. (A row of metrics.csv is the mean of an iteration's four.)
    lengths.clear()
    folder = script.train(tiny(script, max_grad_norm=1e6))
    means = torch.tensor(lengths, dtype=torch.float64).view(8, 4).mean(dim=1)
    expected = torch.tensor(column(folder, "losses/grad_norm"), dtype=torch.float64)
    torch.testing.assert_close(means, expected, rtol=1e-5, atol=0)
