"""ppo_loss against closed forms, finite differences and torch.distributions."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence

import ppo

EPS, BETA = 0.2, torch.tensor(1.7, dtype=torch.float64)
SURROGATES = ("clip", "kl-adaptive", "kl-fixed", "none")
OLD_PROB = 0.25  # of every action that the old policy took
only_ppo = pytest.mark.parametrize("script", ["ppo"], indirect=True)


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
    (2.0, 1.5, -2.4, 0.0),  # good action is likely enough: clipped
    (-2.0, 0.5, 1.6, 0.0),  # bad action is rare enough: clipped
    (-2.0, 0.9, 1.8, 1.8),
    (-2.0, 1.5, 3.0, 3.0),  # bad action became likelier: the way back is open, however far
]


@pytest.mark.parametrize(("advantage", "ratio", "loss", "gradient"), SURROGATE)
def test_clipped_surrogate(advantage: float, ratio: float, loss: float, gradient: float) -> None:
    rows = Rows(1, advantages=[advantage], ratios=[ratio])
    actual, stats = rows.loss()
    assert actual.item() == stats["policy_loss"].item() == pytest.approx(loss)
    assert rows.dist.grad[0, 0].item() == pytest.approx(gradient)
    assert stats["clipfrac"].item() == (ratio in (0.5, 1.5))  # whatever the advantage


@pytest.mark.parametrize("surrogate", SURROGATES[1:])
def test_other_surrogates_do_not_clip(surrogate: str) -> None:
    advantages, ratios, _, _ = (list(x) for x in zip(*SURROGATE, strict=True))
    expected = -np.array(advantages) * np.array(ratios)
    for clip_coef in (EPS, 0.01):
        rows = Rows(6, advantages=advantages, ratios=ratios)
        _, stats = rows.loss(0 * BETA, surrogate=surrogate, clip_coef=clip_coef)
        assert stats["policy_loss"].item() == pytest.approx(expected.mean())
        np.testing.assert_allclose(rows.dist.grad[:, 0].numpy(), expected / 6)
        assert stats["clipfrac"].item() == 0


def test_an_unknown_surrogate_is_refused() -> None:
    for surrogate in ("kl", "klip", "Clip"):
        with pytest.raises(ValueError, match=surrogate):
            Rows(1).loss(surrogate=surrogate)


# 1/2 * (V - R)^2, or of V held within old +- eps where that is farther from R, with no gradient.
VALUE = [  # new value, old value, return, loss, d loss / d new value
    (1.0, 0.0, 2.0, 1.62, 0.0),  # toward R, too fast: held at 0.2, (0.2 - 2)^2 / 2
    (4.0, 5.0, 3.0, 1.62, 0.0),
    (1.0, 0.0, 0.0, 0.5, 1.0),  # away from R: the larger, unclipped error counts
    (-1.0, 0.0, 0.5, 1.125, -1.5),
    (0.1, 0.0, 1.0, 0.405, -0.9),  # within the range
    (6.0, 5.0, 5.5, 0.125, 0.5),  # past R, farther from it than 5.2 is
]


@pytest.mark.parametrize(("new", "old", "ret", "loss", "gradient"), VALUE)
def test_value_loss(new: float, old: float, ret: float, loss: float, gradient: float) -> None:
    for clip_vloss in (True, False):
        rows = Rows(1, new_values=[new], values=[old], returns=[ret])
        actual, stats = rows.loss(vf_coef=3.0, clip_vloss=clip_vloss, surrogate="none")
        if not clip_vloss:
            loss, gradient = 0.5 * (new - ret) ** 2, new - ret
        assert stats["value_loss"].item() == pytest.approx(loss)
        assert actual.item() == pytest.approx(3 * loss)
        assert rows.new_values.grad.item() == pytest.approx(3 * gradient)


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
        rows = Rows(2, advantages=[difference, -difference])
        rows.loss(norm_adv=True)
        np.testing.assert_allclose(-2 * rows.dist.grad[:, 0].numpy(), [expected, -expected])


# ---- entropy and KL penalty


def test_loss_falls_as_entropy_grows() -> None:
    rows = Rows(2, ratios=[2.0, 1.0])  # probabilities of 1/2 and 1/4
    loss, stats = rows.loss(ent_coef=0.1)
    mean = (math.log(2) + 2 * math.log(2) - 0.75 * math.log(3)) / 2
    assert stats["entropy"].item() == pytest.approx(mean)
    assert loss.item() == pytest.approx(-0.1 * mean)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_kl_penalty_is_exact(surrogate: str) -> None:
    """beta * KL[old || new], with the gradient of torch's, where a penalty is asked for."""
    rows = Rows(3, ratios=[0.5, 1.5, 2.0])
    loss, stats = rows.loss(surrogate=surrogate)
    assert ("kl" in stats) == surrogate.startswith("kl")
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


# ---- with an agent of parameters


def minibatch(agent: nn.Module, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows that this agent leaves behind, with advantages and returns made up."""
    with torch.no_grad():
        features = agent.features(rows)
        mb = {"dist": agent.get_dist(features), "values": agent.get_value(features)}
    mb["actions"] = ppo.sample(mb["dist"])
    mb["logprobs"] = ppo.log_prob(mb["dist"], mb["actions"])
    advantages, returns = torch.randn(2, len(mb["values"]))
    return rows | mb | {"advantages": 5 * advantages + 1, "returns": returns}


@only_ppo
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("switch", [True, False])
def test_loss_is_the_sum_of_what_the_flags_ask_for(
    make_agent: Callable[..., nn.Module],
    observe: Callable[[int], dict[str, Tensor]],
    shake: Callable[[nn.Module, float], None],
    surrogate: str,
    switch: bool,
) -> None:
    """loss = policy loss + c1 * value loss - c2 * entropy + beta * KL, row by row."""
    flags = {"norm_adv": switch, "clip_vloss": switch, "surrogate": surrogate, "clip_coef": 0.1}
    args = ppo.Args(cuda=False, vf_coef=0.7, ent_coef=0.3, **flags)
    agent = make_agent(norm_obs=True)
    agent.obs_stats.update(observe(50)["obs"])
    mb = minibatch(agent, observe(32))
    shake(agent, 0.3)
    loss, stats = ppo.ppo_loss(agent, args, mb, torch.tensor(1.7))
    with torch.no_grad():
        new_values = agent.get_value(agent.features(mb)).numpy()
        new = Categorical(logits=agent.get_dist(agent.features(mb)))
    logratios = (new.log_prob(mb["actions"]) - mb["logprobs"]).numpy()
    kl = kl_divergence(Categorical(logits=mb["dist"]), new).mean().item()
    rows = {name: x.double().numpy() for name, x in mb.items()}
    advantages = rows["advantages"]
    if switch:
        advantages = (advantages - advantages.mean()) / advantages.std()
    policy, value, far = 0.0, 0.0, 0
    for i in range(32):
        ratio = math.exp(logratios[i])
        gain = ratio * advantages[i]
        if surrogate == "clip":
            far += not 0.9 <= ratio <= 1.1
            gain = min(gain, min(max(ratio, 0.9), 1.1) * advantages[i])
        policy -= gain / 32
        error = (new_values[i] - rows["returns"][i]) ** 2
        if switch:
            held = min(max(new_values[i], rows["values"][i] - 0.1), rows["values"][i] + 0.1)
            error = max(error, (held - rows["returns"][i]) ** 2)
        value += 0.5 * error / 32
    assert stats["policy_loss"].item() == pytest.approx(policy, rel=1e-4, abs=1e-5)
    assert stats["value_loss"].item() == pytest.approx(value, rel=1e-4)
    assert stats["clipfrac"].item() == pytest.approx(far / 32)
    penalty = 1.7 * kl if surrogate.startswith("kl") else 0.0
    expected = policy + 0.7 * value - 0.3 * new.entropy().mean().item() + penalty
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert (0 < far < 32) if surrogate == "clip" else kl > 1e-3  # the rows put it to the test
    assert all(x.shape == () and not x.requires_grad for x in stats.values())


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("clip_vloss", [True, False])
def test_gradient_against_finite_differences(surrogate: str, clip_vloss: bool) -> None:
    """Of a linear agent's weights, through all terms."""
    old_policy, policy = torch.randn(2, 4, 3, dtype=torch.float64)
    old_critic, critic = torch.randn(2, 4, 1, dtype=torch.float64)

    def linear(policy: Tensor, critic: Tensor) -> SimpleNamespace:
        return SimpleNamespace(
            features=lambda rows: rows["obs"],
            get_dist=lambda features: (features @ policy).log_softmax(dim=-1),
            get_value=lambda features: (features @ critic).squeeze(-1),
        )

    mb = minibatch(linear(old_policy, old_critic), {"obs": torch.randn(20, 4).double()})
    flags = {"surrogate": surrogate, "clip_vloss": clip_vloss, "ent_coef": 0.1}
    args = ppo.Args(cuda=False, **flags)

    def loss(policy: Tensor, critic: Tensor) -> Tensor:
        return ppo.ppo_loss(linear(policy, critic), args, mb, BETA)[0]

    assert torch.autograd.gradcheck(loss, (policy.requires_grad_(), critic.requires_grad_()))


@only_ppo
def test_first_ratio_is_1(
    make_agent: Callable[..., nn.Module], observe: Callable[[int], dict[str, Tensor]]
) -> None:
    """Exactly on the rows as they were; nearly so in shuffled minibatches of another size."""
    agent, args = make_agent(norm_obs=True), ppo.Args(cuda=False)
    agent.obs_stats.update(observe(500)["obs"])
    mb = minibatch(agent, observe(64))
    stats = ppo.ppo_loss(agent, args, mb, BETA)[1]
    for name in ("approx_kl", "old_approx_kl", "clipfrac"):
        assert stats[name] == 0
    rows = torch.randperm(64)[:8]
    stats = ppo.ppo_loss(agent, args, {name: x[rows] for name, x in mb.items()}, BETA)[1]
    assert abs(stats["old_approx_kl"].item()) < 1e-5 and abs(stats["approx_kl"].item()) < 1e-6
    assert stats["clipfrac"] == 0
