"""ppo_loss and minibatch_loss, against closed forms, finite differences and exact divergences."""

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Normal, kl_divergence

Shake = Callable[[nn.Module, float], None]
EPS = 0.2
STATS = {"policy_loss", "value_loss", "entropy", "approx_kl", "old_approx_kl", "clipfrac"}

# A * r, or A * (1 +- eps) where r is beyond that in A's favour: the loss is minus that, and as
# dr/dlogprob = r, its gradient is the loss itself, or 0 beyond.
SURROGATE = [  # advantage, ratio, loss, d loss / d new_logprob
    (2.0, 0.5, -1.0, -1.0),  # good action became rarer: the way back is open
    (2.0, 0.9, -1.8, -1.8),
    (2.0, 1.0, -2.0, -2.0),
    (2.0, 1.1, -2.2, -2.2),
    (2.0, 1.5, -2.4, 0.0),  # good action is likely enough: clipped
    (-2.0, 0.5, 1.6, 0.0),  # bad action is rare enough: clipped
    (-2.0, 0.9, 1.8, 1.8),
    (-2.0, 1.0, 2.0, 2.0),
    (-2.0, 1.1, 2.2, 2.2),
    (-2.0, 1.5, 3.0, 3.0),  # bad action became likelier: the way back is open, however far
    (0.0, 0.5, 0.0, 0.0),
    (0.0, 1.5, 0.0, 0.0),
]

# 1/2 * (V - R)^2, or of V held within old +- eps where that is farther from R, with no gradient.
VALUE = [  # new value, old value, return, loss, d loss / d new value
    (1.0, 0.0, 2.0, 1.62, 0.0),  # towards R, too fast: held at 0.2, (0.2 - 2)^2 / 2
    (-1.0, 0.0, -2.0, 1.62, 0.0),
    (1.0, 0.0, 0.0, 0.5, 1.0),  # away from R: the worse, unclipped error counts
    (-1.0, 0.0, 0.5, 1.125, -1.5),
    (0.1, 0.0, 1.0, 0.405, -0.9),  # within the range
    (-0.1, 0.0, -1.0, 0.405, 0.9),
    (6.0, 5.0, 5.5, 0.125, 0.5),  # beyond R, still nearer than old + eps is not: 0.5 against 0.3
    (6.0, 5.0, 7.0, 1.62, 0.0),
    (4.0, 5.0, 3.0, 1.62, 0.0),
]


def loss_of(
    script: ModuleType,
    *,
    logratios: Tensor | float = 0.0,
    rows: int = 1,
    **given: Tensor | float | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """ppo_loss where everything not given is 0, and nothing is clipped."""
    zeros = torch.zeros(rows, dtype=torch.float64)
    tensors = "advantages new_values old_values returns entropies".split()
    inputs = [given.pop(name, zeros) for name in tensors]
    old_logprobs = torch.linspace(-3, -1, rows, dtype=torch.float64)
    options = {"clip_coef": None, "vf_clip_coef": None, "vf_coef": 0.0, "ent_coef": 0.0} | given
    return script.ppo_loss(old_logprobs + logratios, old_logprobs, *inputs, **options)


def column(values: list[float], requires_grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=requires_grad)


# ---- the surrogate


@pytest.mark.parametrize(("advantage", "ratio", "loss", "gradient"), SURROGATE)
def test_clipped_surrogate(
    script: ModuleType, advantage: float, ratio: float, loss: float, gradient: float
) -> None:
    logratios = column([math.log(ratio)], requires_grad=True)
    actual, stats = loss_of(
        script, logratios=logratios, advantages=column([advantage]), clip_coef=EPS
    )
    actual.backward()
    assert actual.item() == pytest.approx(loss)
    assert stats["policy_loss"].item() == pytest.approx(loss)
    assert logratios.grad.item() == pytest.approx(gradient)


@pytest.mark.parametrize(("advantage", "ratio"), [row[:2] for row in SURROGATE])
def test_unclipped_surrogate(script: ModuleType, advantage: float, ratio: float) -> None:
    logratios = column([math.log(ratio)], requires_grad=True)
    actual, stats = loss_of(script, logratios=logratios, advantages=column([advantage]))
    actual.backward()
    assert actual.item() == pytest.approx(-ratio * advantage)
    assert stats["policy_loss"].item() == pytest.approx(-ratio * advantage)
    assert logratios.grad.item() == pytest.approx(-ratio * advantage)


def test_surrogate_is_a_mean_of_rows(script: ModuleType) -> None:
    advantages, ratios, losses, gradients = (list(x) for x in zip(*SURROGATE, strict=True))
    logratios = column(ratios).log().requires_grad_()
    rows = len(SURROGATE)
    actual, _ = loss_of(
        script, logratios=logratios, rows=rows, advantages=column(advantages), clip_coef=EPS
    )
    actual.backward()
    assert actual.item() == pytest.approx(np.mean(losses))
    np.testing.assert_allclose(logratios.grad.numpy(), np.array(gradients) / rows, atol=1e-12)


def test_first_gradient_is_the_policy_gradient(script: ModuleType) -> None:
    """Where old and new policy are the same, d loss / d logprob = -A / M, clipped or not."""
    advantages = torch.randn(6, dtype=torch.float64)
    for clip_coef in (None, EPS, 0.01):
        logratios = torch.zeros(6, dtype=torch.float64, requires_grad=True)
        loss, _ = loss_of(
            script, logratios=logratios, rows=6, advantages=advantages, clip_coef=clip_coef
        )
        loss.backward()
        torch.testing.assert_close(logratios.grad, -advantages / 6)


def test_clipping_never_promises_more(script: ModuleType) -> None:
    """The clipped objective is a lower bound of the unclipped one, so its loss an upper bound."""
    for _ in range(50):
        logratios, advantages = torch.randn(2, 1, dtype=torch.float64)
        plain, _ = loss_of(script, logratios=logratios, advantages=advantages)
        clipped, _ = loss_of(script, logratios=logratios, advantages=advantages, clip_coef=EPS)
        assert clipped >= plain


# ---- the value loss


@pytest.mark.parametrize(("new", "old", "ret", "loss", "gradient"), VALUE)
def test_clipped_value_loss(
    script: ModuleType, new: float, old: float, ret: float, loss: float, gradient: float
) -> None:
    new_values = column([new], requires_grad=True)
    values = {"new_values": new_values, "old_values": column([old]), "returns": column([ret])}
    actual, stats = loss_of(script, **values, vf_clip_coef=EPS, vf_coef=3.0)
    actual.backward()
    assert stats["value_loss"].item() == pytest.approx(loss)
    assert actual.item() == pytest.approx(3 * loss)
    assert new_values.grad.item() == pytest.approx(3 * gradient)


@pytest.mark.parametrize(("new", "old", "ret"), [row[:3] for row in VALUE])
def test_plain_value_loss_is_half_the_squared_error(
    script: ModuleType, new: float, old: float, ret: float
) -> None:
    new_values = column([new], requires_grad=True)
    values = {"new_values": new_values, "old_values": column([old]), "returns": column([ret])}
    actual, stats = loss_of(script, **values, vf_coef=3.0)
    actual.backward()
    assert stats["value_loss"].item() == pytest.approx(0.5 * (new - ret) ** 2)
    assert new_values.grad.item() == pytest.approx(3 * (new - ret))


def test_value_loss_is_a_mean_of_rows(script: ModuleType) -> None:
    new, old, returns, losses, gradients = (list(x) for x in zip(*VALUE, strict=True))
    rows, new_values = len(VALUE), column(new, requires_grad=True)
    values = {"new_values": new_values, "old_values": column(old), "returns": column(returns)}
    actual, _ = loss_of(script, rows=rows, **values, vf_clip_coef=EPS, vf_coef=1.0)
    actual.backward()
    assert actual.item() == pytest.approx(np.mean(losses))
    np.testing.assert_allclose(new_values.grad.numpy(), np.array(gradients) / rows, atol=1e-12)


def test_policy_and_value_clip_have_each_their_own_coefficient(script: ModuleType) -> None:
    given = {"advantages": column([1.0]), "logratios": math.log(3.0), "vf_coef": 1.0}
    given |= {"new_values": column([1.0]), "returns": column([2.0])}
    _, stats = loss_of(script, **given, clip_coef=0.5, vf_clip_coef=0.25)
    assert stats["policy_loss"].item() == pytest.approx(-1.5)
    assert stats["value_loss"].item() == pytest.approx(0.5 * 1.75**2)


# ---- entropy, KL penalty, and the sum


def test_loss_falls_as_entropy_grows(script: ModuleType) -> None:
    entropies = column([1.0, 2.0, 6.0], requires_grad=True)
    loss, stats = loss_of(script, rows=3, entropies=entropies, ent_coef=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(-0.3)
    assert stats["entropy"].item() == pytest.approx(3.0)
    torch.testing.assert_close(entropies.grad, column([-0.1 / 3] * 3))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_loss_grows_with_the_kl_penalty(script: ModuleType, as_tensor: bool) -> None:
    kl = column([0.1, 0.2, 0.6], requires_grad=True)
    kl_coef = torch.tensor(2.0, dtype=torch.float64) if as_tensor else 2.0
    loss, _ = loss_of(script, rows=3, kl=kl, kl_coef=kl_coef)
    loss.backward()
    assert loss.item() == pytest.approx(0.6)
    torch.testing.assert_close(kl.grad, column([2 / 3] * 3))


def test_no_kl_coefficient_no_penalty(script: ModuleType) -> None:
    rows = torch.randn(4, dtype=torch.float64)
    plain, _ = loss_of(script, rows=4, advantages=rows)
    for options in ({"kl": rows.exp()}, {"kl": rows.exp(), "kl_coef": 0.0}, {"kl_coef": 5.0}):
        assert loss_of(script, rows=4, advantages=rows, **options)[0] == plain


def test_loss_is_the_weighted_sum_of_its_parts(script: ModuleType) -> None:
    """loss = policy loss + c1 * value loss - c2 * entropy + beta * KL"""
    inputs = torch.randn(7, 9, dtype=torch.float64)
    weights = {"vf_coef": 0.7, "ent_coef": 0.3, "kl_coef": 1.9}
    kl = torch.rand(9, dtype=torch.float64)
    loss, stats = script.ppo_loss(*inputs, clip_coef=EPS, vf_clip_coef=EPS, kl=kl, **weights)
    parts = stats["policy_loss"], stats["value_loss"], stats["entropy"], kl.mean()
    expected = sum(w * x.item() for w, x in zip((1, 0.7, -0.3, 1.9), parts, strict=True))
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("clip_coef", [None, EPS])
@pytest.mark.parametrize("vf_clip_coef", [None, EPS])
def test_gradient_against_finite_differences(
    script: ModuleType, clip_coef: float | None, vf_clip_coef: float | None
) -> None:
    old_logprobs, advantages, old_values, returns = torch.randn(4, 40, dtype=torch.float64)
    learned = torch.randn(4, 40, dtype=torch.float64, requires_grad=True)

    def loss(new_logprobs: Tensor, new_values: Tensor, entropies: Tensor, kl: Tensor) -> Tensor:
        rows = new_logprobs, old_logprobs, advantages, new_values, old_values, returns, entropies
        clips = {"clip_coef": clip_coef, "vf_clip_coef": vf_clip_coef}
        weights = {"vf_coef": 0.5, "ent_coef": 0.1, "kl_coef": 0.3}
        return script.ppo_loss(*rows, **clips, **weights, kl=kl)[0]

    assert torch.autograd.gradcheck(loss, tuple(learned.unbind()))


# ---- statistics


def test_kl_estimates_worked_by_hand(script: ModuleType) -> None:
    """Ratios 2 and 1: k1 = -ln(r) and k3 = (r - 1) - ln(r), in the mean."""
    _, stats = loss_of(script, logratios=column([2.0, 1.0]).log(), rows=2)
    assert stats["old_approx_kl"].item() == pytest.approx(-math.log(2) / 2)
    assert stats["approx_kl"].item() == pytest.approx((1 - math.log(2)) / 2)


def test_kl_estimates_are_those_of_kl_old_new(script: ModuleType) -> None:
    """Over actions that occur exactly as often as the old policy takes them, both are exact."""
    old, new = column([0.5, 0.25, 0.125, 0.125]), column([0.1, 0.2, 0.3, 0.4])
    actions = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])
    exact = (old * (old / new).log()).sum().item()
    logratios = (new.log() - old.log())[actions]
    _, stats = loss_of(script, logratios=logratios, rows=8)
    assert stats["old_approx_kl"].item() == pytest.approx(exact)
    assert stats["approx_kl"].item() == pytest.approx(exact)


def test_k3_is_never_negative(script: ModuleType) -> None:
    for logratio in (-5.0, -0.1, 0.0, 0.1, 5.0):
        _, stats = loss_of(script, logratios=logratio)
        assert stats["approx_kl"] >= 0
        assert (stats["approx_kl"] > 0) == (logratio != 0)


def test_clipfrac_is_the_share_of_ratios_beyond_the_range(script: ModuleType) -> None:
    beyond = {0.5: 1, 0.79: 1, 0.81: 0, 1.0: 0, 1.19: 0, 1.21: 1, 1.5: 1, 9.0: 1}
    for ratio, expected in beyond.items():
        _, stats = loss_of(script, logratios=math.log(ratio), clip_coef=EPS)
        assert stats["clipfrac"].item() == expected
    logratios = column(list(beyond)).log()
    for sign in (1, -1):  # whatever the advantage
        advantages = sign * torch.ones(8, dtype=torch.float64)
        given = {"logratios": logratios, "rows": 8, "advantages": advantages}
        assert loss_of(script, **given, clip_coef=EPS)[1]["clipfrac"].item() == 5 / 8
        assert loss_of(script, **given, clip_coef=0.3)[1]["clipfrac"].item() == 3 / 8
        assert loss_of(script, **given, clip_coef=None)[1]["clipfrac"].item() == 0


@pytest.mark.parametrize("clip_coef", [None, EPS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_shapes_and_dtypes(
    script: ModuleType, rows: int, dtype: torch.dtype, clip_coef: float | None
) -> None:
    inputs = torch.randn(7, rows, dtype=dtype, requires_grad=True)
    options = {"clip_coef": clip_coef, "vf_clip_coef": clip_coef, "vf_coef": 0.5, "ent_coef": 0.1}
    loss, stats = script.ppo_loss(*inputs.unbind(), **options)
    assert loss.shape == () and loss.dtype == dtype and loss.requires_grad
    assert set(stats) == STATS
    for value in stats.values():
        assert value.shape == () and value.dtype == dtype and not value.requires_grad


# ---- minibatch_loss: an agent and the arguments in front of ppo_loss


def minibatch(agent: nn.Module, obs: Tensor, shake: Shake) -> dict[str, Tensor]:
    """Rows that a somewhat different policy left behind."""
    with torch.no_grad():
        actions, logprobs, _, values = agent.get_action_and_value(obs)
        old_dist = agent.get_dist(obs)
    shake(agent, 0.2)
    advantages, returns, noise = torch.randn(3, len(obs))
    mb = {"obs": obs, "actions": actions, "logprobs": logprobs + 0.2 * noise, "dist": old_dist}
    return mb | {"advantages": 5 * advantages + 1, "returns": returns, "values": values}


@pytest.mark.parametrize("surrogate", ["clip", "none", "kl-fixed", "kl-adaptive"])
@pytest.mark.parametrize("norm_adv", [True, False])
@pytest.mark.parametrize("clip_vloss", [True, False])
def test_minibatch_loss_does_what_the_arguments_say(
    script: ModuleType,
    agent: nn.Module,
    observe: Callable[[int], Tensor],
    shake: Shake,
    surrogate: str,
    norm_adv: bool,
    clip_vloss: bool,
) -> None:
    args = script.Args(surrogate=surrogate, norm_adv=norm_adv, clip_vloss=clip_vloss)
    args.clip_coef, args.vf_coef, args.ent_coef = 0.1, 0.7, 0.3
    mb = minibatch(agent, observe(32), shake)
    kl = agent.kl(mb["dist"], agent.get_dist(mb["obs"])).mean().item()
    loss, stats = script.minibatch_loss(agent, args, mb, torch.tensor(1.7))
    beta = 1.7 if surrogate.startswith("kl") else 0.0  # the other objectives have no penalty

    with torch.no_grad():
        judged = agent.get_action_and_value(mb["obs"], mb["actions"])
    _, new_logprobs, entropies, new_values = (x.double().numpy() for x in judged)
    rows = {name: x.double().numpy() for name, x in mb.items()}
    advantages = rows["advantages"]
    if norm_adv:
        advantages = (advantages - advantages.mean()) / advantages.std()
    policy, value, far = 0.0, 0.0, 0
    for i in range(32):
        ratio = math.exp(new_logprobs[i] - rows["logprobs"][i])
        gain = ratio * advantages[i]
        if surrogate == "clip":
            far += not 0.9 <= ratio <= 1.1
            gain = min(gain, min(max(ratio, 0.9), 1.1) * advantages[i])
        policy -= gain / 32
        error = (new_values[i] - rows["returns"][i]) ** 2
        if clip_vloss:
            held = min(max(new_values[i], rows["values"][i] - 0.1), rows["values"][i] + 0.1)
            error = max(error, (held - rows["returns"][i]) ** 2)
        value += 0.5 * error / 32
    assert stats["policy_loss"].item() == pytest.approx(policy, rel=1e-4, abs=1e-5)
    assert stats["value_loss"].item() == pytest.approx(value, rel=1e-4)
    assert stats["clipfrac"].item() == pytest.approx(far / 32)
    expected = policy + 0.7 * value - 0.3 * entropies.mean() + beta * kl
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert (0 < far < 32) if surrogate == "clip" else kl > 1e-4  # the rows put it to the test


def test_minibatch_loss_teaches_every_parameter(
    script: ModuleType, agent: nn.Module, observe: Callable[[int], Tensor], shake: Shake
) -> None:
    args = script.Args(surrogate="kl-fixed", ent_coef=0.01)
    loss, _ = script.minibatch_loss(
        agent, args, minibatch(agent, observe(32), shake), torch.tensor(1.0)
    )
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in agent.parameters())


def test_kl_penalty_pulls_the_policy_back(
    script: ModuleType, agent: nn.Module, observe: Callable[[int], Tensor], shake: Shake
) -> None:
    """The penalty's share of the gradient is beta times that of torch's own divergence."""
    args, mb = script.Args(surrogate="kl-fixed"), minibatch(agent, observe(32), shake)
    parameters = list(agent.parameters())
    gradients = []
    for beta in (0.0, 2.0):
        loss, _ = script.minibatch_loss(agent, args, mb, torch.tensor(beta))
        gradients.append(torch.autograd.grad(loss, parameters))
    old, new = mb["dist"], agent.get_dist(mb["obs"])
    if script.__name__ == "ppo_continuous":
        (old_mean, old_log_std), (new_mean, new_log_std) = old.chunk(2, -1), new.chunk(2, -1)
        old, new = Normal(old_mean, old_log_std.exp()), Normal(new_mean, new_log_std.exp())
        kl = kl_divergence(old, new).sum(dim=-1).mean()
    else:
        kl = kl_divergence(Categorical(logits=old), Categorical(logits=new)).mean()
    expected = torch.autograd.grad(2 * kl, parameters, allow_unused=True)
    for without, penalized, gradient in zip(*gradients, expected, strict=True):
        gradient = torch.zeros_like(without) if gradient is None else gradient
        torch.testing.assert_close(penalized - without, gradient, rtol=1e-3, atol=1e-5)


def test_first_ratio_is_1(
    script: ModuleType, agent: nn.Module, observe: Callable[[int], Tensor]
) -> None:
    """What was sampled in batches of N is judged alike in shuffled minibatches of M."""
    if script.__name__ != "ppo_atari":
        agent.obs_stats.update(observe(500))
    obs = observe(64)
    with torch.no_grad():
        dists = [agent.get_dist(part) for part in obs.split(4)]
        actions = torch.cat([agent.sample(dist) for dist in dists])
        logprobs = agent.log_prob(torch.cat(dists), actions)
        values = torch.cat([agent.get_value(part) for part in obs.split(4)])
    rows = torch.randperm(64)[:32]
    judged = agent.get_action_and_value(obs[rows], actions[rows])
    ratio = (judged[1] - logprobs[rows]).exp()
    torch.testing.assert_close(ratio, torch.ones(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(judged[3], values[rows], atol=1e-5, rtol=1e-5)
    mb = {"obs": obs, "actions": actions, "logprobs": logprobs, "values": values}
    mb |= {"advantages": torch.randn(64), "returns": torch.randn(64), "dist": torch.cat(dists)}
    mb = {name: x[rows] for name, x in mb.items()}
    _, stats = script.minibatch_loss(agent, script.Args(), mb, torch.tensor(0.0))
    assert stats["clipfrac"] == 0
    assert abs(stats["old_approx_kl"].item()) < 1e-5 and abs(stats["approx_kl"].item()) < 1e-6
