"""ppo_loss against closed forms and torch.distributions."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

import ppo

EPS, BETA = 0.3, torch.tensor(1.7, dtype=torch.float64)
SURROGATES = ("clip", "kl-adaptive", "kl-fixed", "none")
OLD_PROB = 0.25  # of every action that the old policy took


def rows_of(values: list[float], requires_grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=requires_grad)


class Rows:
    """M rows, and an agent whose outputs for them are these, whatever it sees.

    All are 0 unless given; the policy gives the actions of the rows `ratios` times OLD_PROB.
    """

    def __init__(self, M: int, **given: list[float]) -> None:
        rows = {name: rows_of(x) for name, x in given.items()}
        probs = OLD_PROB * rows.pop("ratios", torch.ones(M, dtype=torch.float64))
        self.dist = torch.stack([probs, 1 - probs], dim=1).log().requires_grad_()
        self.new_values = rows.pop("new_values", rows_of([0.0] * M)).requires_grad_()
        self.mb = {"obs": torch.zeros(M, 1), "actions": torch.zeros(M, dtype=torch.int64)}
        self.mb["dist"] = rows_of([[OLD_PROB, 1 - OLD_PROB]] * M).log()
        self.mb["logprobs"] = self.mb["dist"][:, 0]
        for name in ("values", "advantages", "returns"):
            self.mb[name] = rows.pop(name, rows_of([0.0] * M))

    def features(self, rows: dict[str, Tensor]) -> Tensor:
        return rows["obs"]

    def get_dist(self, features: Tensor) -> Tensor:
        return self.dist

    def get_value(self, features: Tensor) -> Tensor:
        return self.new_values

    def loss(self, kl_coef: Tensor = BETA, **flags: object) -> tuple[Tensor, dict[str, Tensor]]:
        """What ppo_loss makes of them, without terms that no flag asks for; backward is done."""
        usual = {"norm_adv": False, "vf_coef": 0.0, "ent_coef": 0.0, "clip_coef": EPS}
        loss, stats = ppo.ppo_loss(self, ppo.Args(cuda=False, **(usual | flags)), self.mb, kl_coef)
        loss.backward()
        return loss.detach(), stats


# A * r, or A * (1 +- eps) where r is beyond that in A's favor: the loss is minus that, and as
# dr/dlogprob = r, its gradient is the loss itself, or 0 beyond.
SURROGATE = [  # advantage, ratio, loss, d loss / d logprob
    (2.0, 0.5, -1.0, -1.0),  # good action became rarer: the way back is open
    (2.0, 1.1, -2.2, -2.2),
    (2.0, 1.5, -2.6, 0.0),  # good action is likely enough: clipped
    (-2.0, 0.5, 1.4, 0.0),  # bad action is rare enough: clipped
    (-2.0, 0.9, 1.8, 1.8),
    (-2.0, 1.5, 3.0, 3.0),  # bad action became likelier: the way back is open, however far
]


def columns(rows: list[tuple[float, ...]]) -> list[list[float]]:
    return [list(column) for column in zip(*rows, strict=True)]


def test_clipped_surrogate() -> None:
    advantages, ratios, losses, gradients = columns(SURROGATE)
    rows = Rows(6, advantages=advantages, ratios=ratios)
    actual, stats = rows.loss()
    assert actual.item() == stats["policy_loss"].item() == pytest.approx(np.mean(losses))
    np.testing.assert_allclose(rows.dist.grad[:, 0].numpy(), np.array(gradients) / 6)
    assert stats["clipfrac"].item() == pytest.approx(4 / 6)  # 0.5 and 1.5, whatever the advantage


@pytest.mark.parametrize("surrogate", SURROGATES[1:])
def test_other_surrogates_do_not_clip(surrogate: str) -> None:
    advantages, ratios, _, _ = columns(SURROGATE)
    expected = -np.array(advantages) * np.array(ratios)
    for clip_coef in (EPS, 0.01):
        rows = Rows(6, advantages=advantages, ratios=ratios)
        _, stats = rows.loss(0 * BETA, surrogate=surrogate, clip_coef=clip_coef)
        assert stats["policy_loss"].item() == pytest.approx(expected.mean())
        np.testing.assert_allclose(rows.dist.grad[:, 0].numpy(), expected / 6)
        assert stats["clipfrac"].item() == 0


# 1/2 * (V - R)^2, or of V held within old +- eps where that is farther from R, with no gradient.
VALUE = [  # new value, old value, return, loss, d loss / d new value
    (1.0, 0.0, 2.0, 1.445, 0.0),  # toward R, too fast: held at 0.3, (0.3 - 2)^2 / 2
    (4.0, 5.0, 3.0, 1.445, 0.0),
    (1.0, 0.0, 0.0, 0.5, 1.0),  # away from R: the larger, unclipped error counts
    (-1.0, 0.0, 0.5, 1.125, -1.5),
    (0.1, 0.0, 1.0, 0.405, -0.9),  # within the range
    (6.0, 5.0, 5.5, 0.125, 0.5),  # past R, farther from it than 5.3 is
]


@pytest.mark.parametrize("clip_vloss", [True, False])
def test_value_loss(clip_vloss: bool) -> None:
    new, old, returns, losses, gradients = columns(VALUE)
    if not clip_vloss:
        gradients = np.array(new) - np.array(returns)
        losses = 0.5 * gradients**2
    rows = Rows(6, new_values=new, values=old, returns=returns)
    actual, stats = rows.loss(vf_coef=3.0, clip_vloss=clip_vloss, surrogate="none")
    assert stats["value_loss"].item() == pytest.approx(np.mean(losses))
    assert actual.item() == pytest.approx(3 * np.mean(losses))
    np.testing.assert_allclose(rows.new_values.grad.numpy(), 3 * np.array(gradients) / 6)


# ---- normalized advantages: where the ratio is 1, d loss / d logprob = -A / M


def test_normalized_advantages_worked_by_hand() -> None:
    """2, 4, 4, 4, 5, 5, 7, 9 have mean 5 and (population) standard deviation 2."""
    rows = Rows(8, advantages=[2, 4, 4, 4, 5, 5, 7, 9])
    rows.loss(norm_adv=True)
    expected = [-1.5, -0.5, -0.5, -0.5, 0, 0, 1, 2]
    np.testing.assert_allclose(-8 * rows.dist.grad[:, 0].numpy(), expected, rtol=1e-7)
    assert rows.mb["advantages"].tolist() == [2, 4, 4, 4, 5, 5, 7, 9]  # the batch is not changed


def test_advantages_without_differences_are_no_division_by_zero() -> None:
    """Their std gets 1e-8 added: equal ones become 0, and 3 +- 1e-8 becomes +- 1/2."""
    for difference, expected in ((0.0, 0.0), (1e-8, 0.5)):
        rows = Rows(2, advantages=[3 + difference, 3 - difference])
        rows.loss(norm_adv=True)
        actual = -2 * rows.dist.grad[:, 0].numpy()
        np.testing.assert_allclose(actual, [expected, -expected], rtol=1e-6)


# ---- entropy and KL penalty


def test_loss_falls_as_entropy_grows() -> None:
    rows = Rows(2, ratios=[2.0, 1.0])  # probabilities of 1/2 and 1/4
    loss, stats = rows.loss(ent_coef=0.1)
    mean = (math.log(2) + 2 * math.log(2) - 0.75 * math.log(3)) / 2
    assert stats["entropy"].item() == pytest.approx(mean)
    assert loss.item() == pytest.approx(-0.1 * mean)
    logs = rows.dist.detach()  # d/dlog(p) of p * log(p) is p * (log(p) + 1)
    torch.testing.assert_close(rows.dist.grad, 0.1 * logs.exp() * (logs + 1) / 2)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_kl_penalty_is_exact(surrogate: str) -> None:
    """beta * KL[old || new], with the gradient of torch's, where a penalty is asked for."""
    rows = Rows(3, ratios=[0.5, 1.5, 2.0])
    loss, stats = rows.loss(surrogate=surrogate)
    assert ("kl" in stats) == surrogate.startswith("kl")
    assert not any(x.requires_grad for x in stats.values())
    new = rows.dist.detach().requires_grad_()
    expected = kl_divergence(Categorical(logits=rows.mb["dist"]), Categorical(logits=new)).mean()
    if "kl" not in stats:
        assert loss == 0
        return
    expected.backward()
    assert stats["kl"].item() == pytest.approx(expected.item())
    assert stats["kl_coef"].item() == pytest.approx(1.7)
    assert loss.item() == pytest.approx(1.7 * expected.item())
    gradients = [  # through log_softmax, as that of log-probabilities alone is not unique
        torch.autograd.grad(new.log_softmax(1), new, gradient)[0]
        for gradient in (rows.dist.grad, 1.7 * new.grad)
    ]
    torch.testing.assert_close(*gradients)


# ---- statistics


def test_kl_estimates_worked_by_hand() -> None:
    """Ratios 2 and 1: k1 = -ln(r) and k3 = (r - 1) - ln(r), in the mean."""
    _, stats = Rows(2, ratios=[2.0, 1.0]).loss()
    assert stats["old_approx_kl"].item() == pytest.approx(-math.log(2) / 2)
    assert stats["approx_kl"].item() == pytest.approx((1 - math.log(2)) / 2)
