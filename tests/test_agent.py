"""Agents and distributions: networks, normalization inside, against torch's own distributions."""

import copy
import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal, kl_divergence

DISCRETE = pytest.mark.parametrize("script", ["ppo", "ppo_atari"], indirect=True)
CONTINUOUS = pytest.mark.parametrize("script", ["ppo_continuous"], indirect=True)
VECTOR = pytest.mark.parametrize("script", ["ppo", "ppo_continuous"], indirect=True)
MakeAgent = Callable[..., nn.Module]
Observe = Callable[[int], dict[str, Tensor]]
Shake = Callable[[nn.Module, float], None]


def oracle(script: ModuleType, dist: Tensor) -> Categorical | Independent:
    """torch's object for what the scripts call `dist`."""
    if script.__name__ != "ppo_continuous":
        return Categorical(logits=dist)
    mean, log_std = dist.chunk(2, dim=-1)
    return Independent(Normal(mean, log_std.exp()), 1)


def random_dist(script: ModuleType, outputs: Tensor) -> Tensor:
    """A distribution per row of outputs, of all sorts."""
    return outputs if script.__name__ == "ppo_continuous" else (2 * outputs).log_softmax(dim=-1)


# ---- the distribution, as functions of tensors


def test_logprob_entropy_and_kl_are_torchs_with_their_gradients(script: ModuleType) -> None:
    # The gradient is that of the network's outputs: of log-probabilities alone it is not unique.
    old_outputs, outputs = torch.randn(2, 30, 6, dtype=torch.float64)
    old, outputs = random_dist(script, old_outputs), outputs.requires_grad_()
    dist = random_dist(script, outputs)
    actions = script.sample(dist)
    theirs = oracle(script, dist)
    pairs = [
        (script.log_prob(dist, actions), theirs.log_prob(actions)),
        (script.entropy(dist), theirs.entropy()),
        (script.kl_divergence(old, dist), kl_divergence(oracle(script, old), theirs)),
    ]
    for ours, expected in pairs:
        assert ours.shape == (30,)
        torch.testing.assert_close(ours, expected)
        weights = torch.randn(30, dtype=torch.float64)
        gradients = [
            torch.autograd.grad((weights * x).sum(), outputs, retain_graph=True)[0]
            for x in (ours, expected)
        ]
        torch.testing.assert_close(*gradients)
    assert (pairs[2][0] > 0).all() and script.kl_divergence(old, old).abs().max() < 1e-12
    assert (pairs[2][0] - script.kl_divergence(dist, old)).abs().max() > 0.1  # the order matters


@DISCRETE
def test_samples_have_the_policys_frequencies(script: ModuleType) -> None:
    n, probs = 20_000, np.array([0.5, 0.3, 0.15, 0.04, 0.01])
    actions = script.sample(torch.tensor(probs).float().log().expand(n, 5))
    counts = np.bincount(actions.numpy(), minlength=5)
    chi_square = ((counts - n * probs) ** 2 / (n * probs)).sum()
    assert chi_square < 18.5  # exceeded by chance once in 1000, with 4 degrees of freedom
    # Rows are drawn independently: the next row does not know what this one drew.
    both = (actions[:-1] == 0) & (actions[1:] == 0)
    assert both.float().mean().item() == pytest.approx(0.25, abs=5 * 0.5 / n**0.5)


@CONTINUOUS
def test_samples_have_the_policys_moments(script: ModuleType) -> None:
    n, means, stds = 20_000, torch.linspace(-3, 3, 6), torch.linspace(0.3, 2, 6)
    dist = torch.cat([means, stds.log()]).expand(n, 12)
    z = (script.sample(dist) - means) / stds
    assert (z.mean(dim=0).abs() < 4 / n**0.5).all()
    assert ((z.std(dim=0) - 1).abs() < 4 / (2 * n) ** 0.5).all()
    assert ((z**4).mean(dim=0) - 3).abs().max() < 0.2  # tails of a Gaussian
    assert (torch.corrcoef(z.T) - torch.eye(6)).abs().max() < 4 / n**0.5  # independent


@VECTOR
def test_evaluation_plays_the_mode(script: ModuleType) -> None:
    dist = random_dist(script, torch.randn(30, 6))
    actions = script.evaluation_action(dist)
    assert torch.equal(actions, oracle(script, dist).mode)


@pytest.mark.parametrize("script", ["ppo_atari"], indirect=True)
def test_evaluation_of_atari_samples(script: ModuleType) -> None:
    actions = script.evaluation_action(torch.tensor([0.7, 0.3]).log().expand(2000, 2))
    assert actions.float().mean().item() == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("script", ["ppo"], indirect=True)
def test_several_actions_at_once_add_up(script: ModuleType) -> None:
    """(N, K, actions): K independent choices in each of N rows, as of a MultiDiscrete space."""
    old, dist = torch.randn(2, 4000, 3, 2).log_softmax(dim=-1)
    actions = script.sample(dist)
    assert actions.shape == script.evaluation_action(dist).shape == (4000, 3)
    torch.testing.assert_close(
        actions.float().mean(dim=0), dist[..., 1].exp().mean(dim=0), atol=0.04, rtol=0
    )
    summed = (Categorical(logits=dist).log_prob(actions)).sum(dim=1)
    torch.testing.assert_close(script.log_prob(dist, actions), summed)
    torch.testing.assert_close(script.entropy(dist), Categorical(logits=dist).entropy().sum(dim=1))
    kl = kl_divergence(Categorical(logits=old), Categorical(logits=dist)).sum(dim=1)
    torch.testing.assert_close(script.kl_divergence(old, dist), kl)


@DISCRETE
def test_certain_policies_have_no_nan(script: ModuleType) -> None:
    logits = torch.tensor([[0.0, 500.0, 0.0, -500.0]] * 4, requires_grad=True)
    dist = logits.log_softmax(dim=-1)
    actions = script.sample(dist)
    assert actions.tolist() == [1] * 4
    divergence = script.kl_divergence(dist.detach(), dist)
    for x in (script.log_prob(dist, actions), script.entropy(dist), divergence):
        assert x.tolist() == [0.0] * 4
        assert torch.autograd.grad(x.sum(), logits, retain_graph=True)[0].isfinite().all()


# ---- networks


def test_orthogonal_layers_with_their_gains(script: ModuleType, agent: nn.Module) -> None:
    """sqrt(2) in hidden layers, 0.01 before the actions, 1 before the value; biases 0."""
    layers = [m for m in agent.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(layers) == 6
    for layer in layers:
        gain = {1: 1.0, 5: 0.01, 6: 0.01}.get(layer.weight.shape[0], math.sqrt(2))
        weight = layer.weight.detach().double().flatten(1)
        weight = weight if weight.shape[0] <= weight.shape[1] else weight.T
        expected = gain**2 * torch.eye(len(weight), dtype=torch.float64)
        torch.testing.assert_close(weight @ weight.T, expected, atol=1e-5 * gain**2, rtol=1e-5)
        assert not layer.bias.any()


def test_shapes(script: ModuleType, agent: nn.Module, observe: Observe) -> None:
    for n in (1, 7):
        features = agent.features(observe(n))
        dist, values = agent.get_dist(features), agent.get_value(features)
        actions = script.sample(dist)
        assert features.shape == (n, 512 if script.__name__ == "ppo_atari" else 3)
        assert dist.shape == ((n, 12) if script.__name__ == "ppo_continuous" else (n, 5))
        assert actions.shape == ((n, 6) if script.__name__ == "ppo_continuous" else (n,))
        assert values.shape == script.log_prob(dist, actions).shape == (n,)
        assert {x.dtype for x in (features, dist, values)} == {torch.float32}


@VECTOR
def test_networks_are_separate_tanh_layers(
    script: ModuleType, agent: nn.Module, observe: Observe, shake: Shake
) -> None:
    """W3 tanh(W2 tanh(W1 x + b1) + b2) + b3, worked out in numpy."""
    shake(agent, 1.0)
    features = agent.features(observe(9)) / 10
    outputs = agent.get_dist(features)
    for network, actual in ((agent.actor, outputs), (agent.critic, agent.get_value(features))):
        x, layers = features.double().numpy(), [m for m in network if isinstance(m, nn.Linear)]
        for layer in layers:
            weight, bias = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
            x = x @ weight.T + bias
            x = np.tanh(x) if layer is not layers[-1] else x
        if network is agent.critic:
            x = x[:, 0]
        elif script.__name__ == "ppo_continuous":
            x = np.concatenate([x, np.tile(agent.log_std.detach().numpy(), (9, 1))], axis=1)
        else:
            x = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(actual.detach().numpy(), x, rtol=1e-4, atol=1e-5)
    outputs.square().sum().backward()
    assert all(parameter.grad is None for parameter in agent.critic.parameters())


@pytest.mark.parametrize("script", ["ppo_atari"], indirect=True)
def test_network_is_the_nature_cnn(agent: nn.Module, observe: Observe, shake: Shake) -> None:
    """Filters of 8, 4 and 3 with strides 4, 2 and 1, a layer of 512, on pixels in [0, 1]."""
    shake(agent, 0.5)
    weights = [p.detach().double() for p in agent.network.parameters()]
    rows = observe(3)
    x = rows["obs"].double() / 255
    for i, (size, stride) in enumerate(((8, 4), (4, 2), (3, 1))):
        assert weights[2 * i].shape[2:] == (size, size)
        x = nn.functional.conv2d(x, weights[2 * i], weights[2 * i + 1], stride).relu()
    x = (x.flatten(1) @ weights[6].T + weights[7]).relu()
    assert x.shape == (3, 512)
    features = agent.features(rows)
    np.testing.assert_allclose(features.detach().numpy(), x, rtol=1e-4, atol=1e-5)
    values, logits = (layer(features) for layer in (agent.critic, agent.actor))
    torch.testing.assert_close(agent.get_value(features), values[:, 0])
    torch.testing.assert_close(agent.get_dist(features), logits.log_softmax(dim=1))


# ---- normalization lives in the agent


@VECTOR
def test_features_are_normalized_within_10(make_agent: MakeAgent, observe: Observe) -> None:
    agent, seen = make_agent(norm_obs=True), observe(300)["obs"]
    obs = torch.cat([observe(20)["obs"], 1000 * observe(4)["obs"]])
    assert torch.equal(agent.features({"obs": obs}), obs.clamp(-10, 10))  # nothing seen as yet
    agent.obs_stats.update(seen)
    before = copy.deepcopy(agent.state_dict())
    mean, std = seen.double().numpy().mean(axis=0), seen.double().numpy().std(axis=0)
    expected = np.clip((obs.double().numpy() - mean) / std, -10, 10)
    assert np.abs(expected).max() == 10 and np.abs(expected).min() < 1
    for dtype in (torch.float32, torch.float64):
        features = agent.features({"obs": obs.to(dtype)})
        np.testing.assert_allclose(features.numpy(), expected, rtol=1e-5, atol=1e-5)
        assert features.dtype == torch.float32
    assert agent.features({"obs": obs > 0}).isfinite().all()
    agent.get_value(features), agent.get_dist(features)
    assert all(torch.equal(x, before[name]) for name, x in agent.state_dict().items())


@VECTOR
def test_features_of_large_numbers_keep_their_digits(make_agent: MakeAgent) -> None:
    """Timestamps a second apart are the same number as float32 until they are normalized."""
    agent = make_agent(norm_obs=True)
    obs = 1e9 + torch.arange(8, dtype=torch.float64).unsqueeze(1).expand(8, 3)
    agent.obs_stats.update(obs)
    expected = ((torch.arange(8) - 3.5) / math.sqrt(63 / 12)).unsqueeze(1).expand(8, 3)
    for x in (obs, obs.long()):
        torch.testing.assert_close(agent.features({"obs": x}), expected, atol=1e-5, rtol=0)


@VECTOR
def test_features_are_raw_where_no_normalization_is_asked_for(
    agent: nn.Module, observe: Observe
) -> None:
    obs = 100 * observe(5)["obs"]
    for x in (obs, obs.double(), obs.long(), obs > 0):
        assert torch.equal(agent.features({"obs": x}), x.float())


@VECTOR
def test_state_dict_holds_the_statistics(
    make_agent: MakeAgent, observe: Observe, shake: Shake
) -> None:
    agent, other, rows = make_agent(norm_obs=True), make_agent(norm_obs=True), observe(20)
    agent.obs_stats.update(observe(100)["obs"])
    shake(agent, 1.0)
    other.load_state_dict(agent.state_dict())
    features = [network.features(rows) for network in (agent, other)]
    assert torch.equal(*features)
    assert torch.equal(agent.get_dist(features[0]), other.get_dist(features[0]))
    assert torch.equal(agent.get_value(features[0]), other.get_value(features[0]))


# ---- the noise of continuous actions


@CONTINUOUS
def test_noise_at_first_is_that_of_the_flag(make_agent: MakeAgent, observe: Observe) -> None:
    for flags, expected in (({}, -0.5), ({"init_log_std": 0.25}, 0.25)):
        agent = make_agent(norm_obs=False, **flags)
        mean, log_std = agent.get_dist(agent.features(observe(50))).chunk(2, dim=-1)
        assert torch.equal(log_std, torch.full((50, 6), float(expected)))
        assert mean.abs().max() < 0.2


@CONTINUOUS
def test_the_floor_under_the_noise_is_no_dead_end(
    script: ModuleType, make_agent: MakeAgent, observe: Observe
) -> None:
    """What has come down to the floor stays there, has a gradient as ever, and can rise again."""
    agent = make_agent(norm_obs=False, min_log_std=-1.5)
    agent.progress.fill_(1.0)
    features, fallen = agent.features(observe(4)), torch.tensor([-9.0, -3.0, -1.6, -1.4, 0.0, 1.0])
    with torch.no_grad():
        agent.log_std.copy_(fallen)
    optimizer = torch.optim.SGD([agent.log_std], lr=1.0)
    expected = torch.tensor([-1.5, -1.5, -1.5, -1.4, 0.0, 1.0])
    for direction in (-1, -1, 1, 1):  # entropy grows by 1 with each log_std
        dist = agent.get_dist(features)
        torch.testing.assert_close(dist[:, 6:], expected.expand(4, 6))
        torch.testing.assert_close(agent.log_std.detach(), expected)
        optimizer.zero_grad()
        (-direction * script.entropy(dist).mean()).backward()
        torch.testing.assert_close(agent.log_std.grad, torch.full((6,), -float(direction)))
        optimizer.step()
        expected = (expected + direction).clamp(min=-1.5)


@CONTINUOUS
def test_the_floor_under_the_noise_falls_in_a_straight_line(
    script: ModuleType, make_agent: MakeAgent, observe: Observe
) -> None:
    """From --init-log-std at the start of training to --min-log-std at its end."""
    agent = make_agent(norm_obs=False, init_log_std=-0.5, min_log_std=-2.5)
    for progress, floor in ((0.0, -0.5), (0.25, -1.0), (0.5, -1.5), (1.0, -2.5)):
        agent.progress.fill_(progress)
        agent.log_std.data.fill_(-9.0)
        log_std = agent.get_dist(agent.features(observe(4))).chunk(2, dim=-1)[1]
        torch.testing.assert_close(log_std, torch.full((4, 6), floor))
