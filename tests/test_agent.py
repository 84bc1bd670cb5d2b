"""Agents: networks, initialisation, normalisation inside, distributions, against torch's own."""

import copy
import math
import warnings
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal, kl_divergence

DISCRETE = pytest.mark.parametrize("script", ["ppo", "ppo_atari"], indirect=True)
CONTINUOUS = pytest.mark.parametrize("script", ["ppo_continuous"], indirect=True)
VECTOR = pytest.mark.parametrize("script", ["ppo", "ppo_continuous"], indirect=True)
Observe = Callable[[int], Tensor]
Shake = Callable[[nn.Module, float], None]


def build(script: ModuleType, observations: gym.Space, actions: gym.Space) -> nn.Module:
    envs = SimpleNamespace(single_observation_space=observations, single_action_space=actions)
    return script.Agent(envs)


def distribution(script: ModuleType, dist: Tensor) -> Categorical | Independent:
    """torch's object for what an agent calls `dist`."""
    if script.__name__ != "ppo_continuous":
        return Categorical(logits=dist)
    mean, log_std = dist.chunk(2, dim=-1)
    return Independent(Normal(mean, log_std.exp()), 1)


def flat(script: ModuleType, action: Tensor) -> Tensor:
    return action.flatten(1) if script.__name__ == "ppo_continuous" else action


def last_actor_layer(agent: nn.Module) -> nn.Linear:
    layers = [m for m in agent.modules() if isinstance(m, nn.Linear) and m.out_features in (5, 6)]
    assert len(layers) == 1
    return layers[0]


@torch.no_grad()
def fix_outputs(agent: nn.Module, outputs: list[float]) -> None:
    """Let the actor put out the same numbers whatever it sees."""
    last_actor_layer(agent).weight.zero_()
    last_actor_layer(agent).bias.copy_(torch.tensor(outputs))


# ---- initialisation


def test_orthogonal_layers_with_their_gains(script: ModuleType, agent: nn.Module) -> None:
    """sqrt(2) in hidden layers, 0.01 before the actions, 1 before the value; biases 0."""
    layers = [m for m in agent.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(layers) >= 5
    for layer in layers:
        gain = {1: 1.0, 5: 0.01, 6: 0.01}.get(layer.weight.shape[0], math.sqrt(2))
        weight = layer.weight.detach().double().flatten(1)
        weight = weight if weight.shape[0] <= weight.shape[1] else weight.T
        expected = gain**2 * torch.eye(len(weight), dtype=torch.float64)
        torch.testing.assert_close(weight @ weight.T, expected, atol=1e-5 * gain**2, rtol=1e-5)
        assert not layer.bias.any()
    parameters = sum(p.numel() for m in layers for p in m.parameters())
    assert parameters + (6 if script.__name__ == "ppo_continuous" else 0) == sum(
        p.numel() for p in agent.parameters()
    )


@DISCRETE
def test_actions_are_equally_probable_at_first(agent: nn.Module, observe: Observe) -> None:
    probs = agent.get_dist(observe(50)).exp()
    torch.testing.assert_close(probs, torch.full((50, 5), 0.2), atol=0.02, rtol=0)


@CONTINUOUS
def test_standard_deviations_at_first(agent: nn.Module, observe: Observe) -> None:
    assert torch.equal(agent.log_std, torch.full((6,), -0.5))
    assert agent.log_std.requires_grad
    assert agent.act(observe(50)).abs().max() < 0.1


@VECTOR
def test_networks_are_tanh_layers(
    script: ModuleType, agent: nn.Module, observe: Observe, shake: Shake
) -> None:
    """W3 tanh(W2 tanh(W1 x + b1) + b2) + b3, worked out in numpy."""
    shake(agent, 1.0)
    obs = observe(9) / 100
    for network, actual in (
        (agent.actor, agent.actor(obs)),
        (agent.critic, agent.get_value(obs).unsqueeze(1)),
    ):
        x, layers = obs.double().numpy(), [m for m in network if isinstance(m, nn.Linear)]
        assert len(layers) == 3
        for layer in layers:
            hidden = layer is not layers[-1]
            weight, bias = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
            x = np.tanh(x @ weight.T + bias) if hidden else x @ weight.T + bias
        np.testing.assert_allclose(actual.detach().numpy(), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("script", ["ppo_atari"], indirect=True)
def test_network_is_the_nature_cnn(agent: nn.Module, observe: Observe) -> None:
    """Filters of 8, 4 and 3 with strides 4, 2 and 1, a layer of 512, on pixels in [0, 1]."""
    weights = [p.detach().double() for p in agent.network.parameters()]
    obs = observe(3)
    x = obs.double() / 255
    for i, (size, stride) in enumerate(((8, 4), (4, 2), (3, 1))):
        assert weights[2 * i].shape[2:] == (size, size)
        x = nn.functional.conv2d(x, weights[2 * i], weights[2 * i + 1], stride).relu()
    x = (x.flatten(1) @ weights[6].T + weights[7]).relu()
    assert x.shape == (3, 512)
    expected = x @ agent.critic.weight.detach().double()[0]
    np.testing.assert_allclose(agent.get_value(obs).detach().numpy(), expected, rtol=1e-4)
    logits = x @ agent.actor.weight.detach().double().T
    np.testing.assert_allclose(agent.get_dist(obs).detach(), logits.log_softmax(1), atol=1e-4)


@VECTOR
def test_networks_are_separate(agent: nn.Module, observe: Observe) -> None:
    _, logprob, entropy, _ = agent.get_action_and_value(observe(8))
    (logprob.sum() + entropy.sum()).backward()
    assert all(parameter.grad is None for parameter in agent.critic.parameters())
    assert all(parameter.grad is not None for parameter in agent.actor.parameters())
    agent.zero_grad()
    agent.get_value(observe(8)).sum().backward()
    assert all(parameter.grad is None for parameter in agent.actor.parameters())
    assert all(parameter.grad is not None for parameter in agent.critic.parameters())


# ---- shapes and dtypes


@pytest.mark.parametrize("n", [1, 2, 7])
def test_shapes(script: ModuleType, agent: nn.Module, observe: Observe, n: int) -> None:
    obs = observe(n)
    shape = (n, 2, 3) if script.__name__ == "ppo_continuous" else (n,)
    action, logprob, entropy, value = agent.get_action_and_value(obs)
    assert action.shape == agent.act(obs).shape == agent.act(obs, False).shape == shape
    assert logprob.shape == entropy.shape == value.shape == agent.get_value(obs).shape == (n,)
    dist = agent.get_dist(obs)
    assert agent.sample(dist).shape == shape
    assert agent.log_prob(dist, action).shape == (n,)
    assert agent.kl(dist, dist).shape == (n,)
    assert not action.requires_grad or script.__name__ == "ppo_continuous"
    assert {x.dtype for x in (logprob, entropy, value, dist)} == {torch.float32}


@VECTOR
def test_float64_observations(agent: nn.Module, observe: Observe) -> None:
    obs = observe(6)
    agent.obs_stats.update(obs)
    for judge in (agent.get_value, agent.act, agent.get_dist):
        assert torch.equal(judge(obs.double()), judge(obs))
    action = agent.act(obs)
    for x, y in zip(
        agent.get_action_and_value(obs.double(), action),
        agent.get_action_and_value(obs, action),
        strict=True,
    ):
        assert torch.equal(x, y)


@CONTINUOUS
@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3), (2, 1, 2)])
@pytest.mark.parametrize("bound", [1.0, 50.0, np.inf])
def test_action_spaces(
    script: ModuleType, observe: Observe, shape: tuple[int, ...], bound: float
) -> None:
    """Any shape and any bounds, none too: the policy itself knows no bounds."""
    agent = build(script, Box(-np.inf, np.inf, (3,)), Box(-bound, bound, shape))
    action, logprob, _, _ = agent.get_action_and_value(observe(5))
    assert action.shape == agent.act(observe(5)).shape == (5, *shape)
    assert agent.log_std.numel() == math.prod(shape)
    assert logprob.isfinite().all() and action.isfinite().all()


@pytest.mark.parametrize("script", ["ppo"], indirect=True)
@pytest.mark.parametrize("n", [2, 3, 18])
def test_number_of_actions(script: ModuleType, observe: Observe, n: int) -> None:
    agent = build(script, Box(-np.inf, np.inf, (3,)), Discrete(n))
    assert agent.get_dist(observe(4)).shape == (4, n)
    assert set(agent.get_action_and_value(observe(2000))[0].tolist()) == set(range(n))


# ---- normalisation lives in the agent


@VECTOR
def test_every_method_normalizes(agent: nn.Module, observe: Observe, shake: Shake) -> None:
    """An agent that knows the statistics sees raw rows as a fresh one sees normalised rows."""
    shake(agent, 1.0)
    fresh, seen = copy.deepcopy(agent), observe(300)
    agent.obs_stats.update(seen)
    obs = torch.cat([observe(20), 1000 * observe(4)])
    mean, std = seen.double().numpy().mean(axis=0), seen.double().numpy().std(axis=0)
    normalized = torch.as_tensor(np.clip((obs.double().numpy() - mean) / std, -10, 10))
    action = agent.act(obs)
    torch.testing.assert_close(action, fresh.act(normalized))
    torch.testing.assert_close(agent.get_value(obs), fresh.get_value(normalized))
    torch.testing.assert_close(agent.get_dist(obs), fresh.get_dist(normalized))
    judged = agent.get_action_and_value(obs, action), fresh.get_action_and_value(normalized, action)
    torch.testing.assert_close(*judged)
    for method, options in (("act", {"deterministic": False}), ("get_action_and_value", {})):
        samples = []
        for judge, x in ((agent, obs), (fresh, normalized)):
            torch.manual_seed(1)
            samples.append(getattr(judge, method)(x, **options))
        torch.testing.assert_close(*samples)
    assert (agent.get_value(obs) - fresh.get_value(obs)).abs().max() > 0.1


@VECTOR
def test_playing_does_not_update_statistics(agent: nn.Module, observe: Observe) -> None:
    agent.obs_stats.update(observe(10))
    before = copy.deepcopy(agent.state_dict())
    for method in (agent.act, agent.get_value, agent.get_dist, agent.get_action_and_value):
        method(observe(10))
    assert all(torch.equal(x, before[name]) for name, x in agent.state_dict().items())


@VECTOR
def test_state_dict_holds_the_statistics(
    script: ModuleType, agent: nn.Module, observe: Observe, shake: Shake
) -> None:
    shake(agent, 1.0)
    fresh_keys = set(agent.state_dict())
    agent.obs_stats.update(observe(100))
    other = copy.deepcopy(agent)
    for buffer in other.buffers():
        buffer.fill_(3)
    assert set(other.state_dict()) == fresh_keys
    other.load_state_dict(agent.state_dict())
    obs = 100 * observe(20)
    assert torch.equal(agent.get_value(obs), other.get_value(obs))
    assert torch.equal(agent.act(obs), other.act(obs))


# ---- log-probabilities, entropies, divergences


def test_logprob_and_entropy_are_torchs(
    script: ModuleType, agent: nn.Module, observe: Observe, shake: Shake
) -> None:
    shake(agent, 1.0)
    obs = observe(40)
    oracle = distribution(script, agent.get_dist(obs))
    sampled = agent.get_action_and_value(obs)
    judged = agent.get_action_and_value(obs, sampled[0])
    torch.testing.assert_close(judged, sampled)
    assert torch.equal(sampled[0], judged[0])
    logprobs = oracle.log_prob(flat(script, sampled[0]))
    torch.testing.assert_close(sampled[1], logprobs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sampled[2], oracle.entropy(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sampled[3], agent.get_value(obs))
    # As in the rollout: a sample of each of the stored distributions, judged afterwards
    dist = agent.get_dist(obs)
    action = agent.sample(dist)
    expected = oracle.log_prob(flat(script, action))
    torch.testing.assert_close(agent.log_prob(dist, action), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        agent.get_action_and_value(obs, action)[1], expected, rtol=1e-4, atol=1e-5
    )


def test_gradients_of_logprob_and_entropy_are_torchs(
    script: ModuleType, agent: nn.Module, observe: Observe, shake: Shake
) -> None:
    shake(agent, 1.0)
    obs = observe(16)
    weights = torch.randn(2, 16)
    action = agent.act(obs, deterministic=False).detach()
    parameters = [last_actor_layer(agent).weight, last_actor_layer(agent).bias]
    if script.__name__ == "ppo_continuous":
        parameters.append(agent.log_std)
    _, logprob, entropy, _ = agent.get_action_and_value(obs, action)
    actual = torch.autograd.grad((weights[0] * logprob + weights[1] * entropy).sum(), parameters)
    oracle = distribution(script, agent.get_dist(obs))
    logprob, entropy = oracle.log_prob(flat(script, action)), oracle.entropy()
    expected = torch.autograd.grad((weights[0] * logprob + weights[1] * entropy).sum(), parameters)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@CONTINUOUS
def test_dist_is_means_and_log_stds(agent: nn.Module, observe: Observe) -> None:
    means, log_stds = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [-1.5, -1.0, -0.5, 0.0, 0.5, 1.0]
    fix_outputs(agent, means)
    with torch.no_grad():
        agent.log_std.copy_(torch.tensor(log_stds))
    dist = agent.get_dist(observe(3))
    torch.testing.assert_close(dist, torch.tensor([means + log_stds] * 3))
    # The log-density at the means is -sum(log std) - 6/2 * log(2 pi), the entropy 6/2 more minus.
    _, logprob, entropy, _ = agent.get_action_and_value(observe(3), agent.act(observe(3)))
    at_means = -sum(log_stds) - 3 * math.log(2 * math.pi)
    torch.testing.assert_close(logprob, torch.full((3,), at_means))
    torch.testing.assert_close(entropy, torch.full((3,), 3 - at_means))


@CONTINUOUS
def test_noise_does_not_die_out(agent: nn.Module, observe: Observe) -> None:
    """However far log_std falls, actions keep a standard deviation of exp(-1.5) = 0.2231."""
    with torch.no_grad():
        agent.log_std.copy_(torch.tensor([-9.0, -3.0, -1.6, -1.4, 0.0, 1.0]))
        obs = observe(20_000)
        dist = agent.get_dist(obs)
        action, logprob, entropy, _ = agent.get_action_and_value(obs)
    expected = torch.tensor([-1.5, -1.5, -1.5, -1.4, 0.0, 1.0])
    torch.testing.assert_close(dist[:, 6:], expected.expand(20_000, 6))
    stds = (action.flatten(1) - dist[:, :6]).std(dim=0)
    torch.testing.assert_close(stds[:3], torch.full((3,), 0.2231), rtol=0.03, atol=0)
    oracle = Independent(Normal(dist[:, :6], expected.exp()), 1)
    torch.testing.assert_close(logprob, oracle.log_prob(action.flatten(1)))
    torch.testing.assert_close(entropy, oracle.entropy())


@DISCRETE
def test_dist_is_log_probabilities(agent: nn.Module, observe: Observe) -> None:
    probs = [0.5, 0.25, 0.125, 0.0625, 0.0625]
    fix_outputs(agent, [3 + math.log(p) for p in probs])
    torch.testing.assert_close(agent.get_dist(observe(2)).exp(), torch.tensor([probs] * 2))
    # H = 1/2 * 1 bit + 1/4 * 2 + 1/8 * 3 + 2/16 * 4 = 1.875 bits
    _, logprob, entropy, _ = agent.get_action_and_value(observe(2), torch.tensor([0, 3]))
    torch.testing.assert_close(logprob.exp(), torch.tensor([0.5, 0.0625]))
    torch.testing.assert_close(entropy, torch.full((2,), 1.875 * math.log(2)))


@DISCRETE
def test_certain_policies_have_no_nan(agent: nn.Module, observe: Observe) -> None:
    fix_outputs(agent, [0.0, 500.0, 0.0, 0.0, -500.0])
    action, logprob, entropy, _ = agent.get_action_and_value(observe(4))
    dist = agent.get_dist(observe(4))
    assert action.tolist() == [1] * 4
    assert logprob.tolist() == entropy.tolist() == agent.kl(dist, dist).tolist() == [0.0] * 4
    (entropy + agent.kl(dist.detach(), dist)).sum().backward()
    assert last_actor_layer(agent).bias.grad.isfinite().all()


def random_dists(script: ModuleType) -> tuple[Tensor, Tensor]:
    """Old and new parameters of 30 distributions, of all sorts."""
    old, new = torch.randn(2, 30, 6, dtype=torch.float64)
    if script.__name__ == "ppo_continuous":
        return old, new
    return (2 * old).log_softmax(dim=-1), (2 * new).log_softmax(dim=-1)


def test_kl_is_torchs(script: ModuleType) -> None:
    old, new = random_dists(script)
    new.requires_grad_()
    kl = script.Agent.kl(old, new)
    expected = kl_divergence(distribution(script, old), distribution(script, new))
    torch.testing.assert_close(kl, expected)
    assert (kl > 0).all()
    assert (kl - script.Agent.kl(new, old)).abs().max() > 0.1  # the order matters
    assert script.Agent.kl(old, old).abs().max() < 1e-12
    if script.__name__ == "ppo_continuous":  # through log_softmax, gradients have no unique form
        gradient, oracle = (torch.autograd.grad(x.sum(), new)[0] for x in (kl, expected))
        torch.testing.assert_close(gradient, oracle)


@DISCRETE
def test_gradient_of_kl_is_torchs(script: ModuleType) -> None:
    old, _ = random_dists(script)
    logits = torch.randn(30, 6, dtype=torch.float64, requires_grad=True)
    kl = script.Agent.kl(old, logits.log_softmax(dim=-1))
    expected = kl_divergence(Categorical(logits=old), Categorical(logits=logits))
    gradient, oracle = (torch.autograd.grad(x.sum(), logits)[0] for x in (kl, expected))
    torch.testing.assert_close(gradient, oracle)


@CONTINUOUS
def test_kl_worked_by_hand(script: ModuleType) -> None:
    """A mean one standard deviation away: 1/2. Twice as wide: ln 2 + 1/8 - 1/2. Both add up."""
    old = torch.tensor([[0.0, 3.0, 0.0, 1.0]])
    new = torch.tensor([[1.0, 3.0, 0.0, 1.0 + math.log(2)]])
    kl = script.Agent.kl(old, new)
    torch.testing.assert_close(kl, torch.tensor([0.5 + math.log(2) + 0.125 - 0.5]))


# ---- sampling


@DISCRETE
def test_samples_have_the_policys_frequencies(
    script: ModuleType, agent: nn.Module, observe: Observe
) -> None:
    probs = np.array([0.5, 0.3, 0.15, 0.04, 0.01])
    fix_outputs(agent, np.log(probs).tolist())
    n = 1_000 if script.__name__ == "ppo_atari" else 20_000
    obs = observe(1).expand(n, *observe(1).shape[1:])
    with torch.no_grad():
        samples = [agent.get_action_and_value(obs)[0], agent.sample(agent.get_dist(obs))]
        samples.append(agent.act(obs, deterministic=False))
    for actions in samples:
        counts = np.bincount(actions.numpy(), minlength=5)
        chi_square = ((counts - n * probs) ** 2 / (n * probs)).sum()
        assert chi_square < 18.5  # exceeded by chance once in 1000, with 4 degrees of freedom
    assert not torch.equal(samples[0], samples[1])
    # Rows are drawn independently: the next row does not know what this one drew.
    first, second = samples[0][:-1] == 0, samples[0][1:] == 0
    assert (first & second).float().mean().item() == pytest.approx(0.25, abs=5 * 0.5 / n**0.5)


@CONTINUOUS
def test_samples_have_the_policys_mean_and_std(agent: nn.Module, observe: Observe) -> None:
    n, means, stds = 20_000, torch.linspace(-3, 3, 6), torch.linspace(0.3, 2, 6)
    fix_outputs(agent, means.tolist())
    with torch.no_grad():
        agent.log_std.copy_(stds.log())
        action, logprob, entropy, _ = agent.get_action_and_value(observe(n))
        samples = [action, agent.sample(agent.get_dist(observe(n)))]
        samples.append(agent.act(observe(n), deterministic=False))
    for actions in samples:
        z = (actions.flatten(1) - means) / stds
        assert (z.mean(dim=0).abs() < 4 / n**0.5).all()
        assert ((z.std(dim=0) - 1).abs() < 4 / (2 * n) ** 0.5).all()
        assert ((z**4).mean(dim=0) - 3).abs().max() < 0.2  # tails of a Gaussian
        assert (torch.corrcoef(z.T) - torch.eye(6)).abs().max() < 4 / n**0.5  # independent
    assert not torch.equal(samples[0], samples[1])
    # The entropy is what -log p is on average; its spread over rows is sqrt(6 / 2).
    assert -logprob.mean().item() == pytest.approx(entropy[0].item(), abs=4 * (3 / n) ** 0.5)


def test_deterministic_action_is_the_mode(
    script: ModuleType, agent: nn.Module, observe: Observe, shake: Shake
) -> None:
    shake(agent, 1.0)
    obs = observe(30)
    state = torch.get_rng_state()
    action = agent.act(obs)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(action, agent.act(obs, deterministic=True))
    mode = distribution(script, agent.get_dist(obs)).mode
    torch.testing.assert_close(flat(script, action), mode)
    best = agent.get_action_and_value(obs, action)[1]
    for _ in range(20):
        assert (agent.get_action_and_value(obs)[1] <= best + 1e-5).all()


def test_same_seed_same_actions(agent: nn.Module, observe: Observe) -> None:
    obs, actions = observe(20), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        actions.append(agent.get_action_and_value(obs)[0])
    assert torch.equal(actions[0], actions[1]) and not torch.equal(actions[0], actions[2])


# ---- what the environment gets


class Echo(gym.Env):
    """Shows the action that it got as the next observation."""

    observation_space = Box(-np.inf, np.inf, (5,), np.float32)
    action_space = Box(
        np.array([0, -2, -1, -np.inf, 0], np.float32),
        np.array([10, 2, 1, np.inf, np.inf], np.float32),
    )

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        return np.zeros(5, np.float32), {}

    def step(self, action: np.ndarray) -> tuple:
        assert action in self.action_space
        return action, 0.0, False, False, {}


def echo(script: ModuleType, actions: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """What environments get of the actions, a row each; nothing may warn on the way."""
    spec = gym.envs.registration.EnvSpec("Echo-v0", entry_point=Echo)
    monkeypatch.setitem(gym.registry, "Echo-v0", spec)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # infinity - infinity, or overflow
        envs = script.make_envs(script.Args(env_id="Echo-v0"), num_envs=len(actions))
        envs.reset(seed=0)
        got = envs.step(actions.astype(np.float32))[0]
    envs.close()
    return got


@CONTINUOUS
def test_actions_are_stretched_to_their_bounds_and_clipped(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    actions = np.repeat([[-3.0], [-1.0], [-0.5], [0.0], [1.0], [3.0]], 5, axis=1)
    got = echo(script, actions, monkeypatch)
    expected = [
        [0, -2, -1, -3, 0],
        [0, -2, -1, -1, 0],
        [2.5, -1, -0.5, -0.5, 0],
        [5, 0, 0, 0, 0],
        [10, 2, 1, 1, 1],
        [10, 2, 1, 3, 3],
    ]
    np.testing.assert_allclose(got, expected)


HUGE = np.finfo(np.float32).max


@CONTINUOUS
@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (Box(0, 3, (5,), np.int64), [0, 1, 2, 2, 3]),  # of 0, 0.9, 1.65, 2.1, 3
        (Box(-HUGE, HUGE, (5,), np.float32), [-1, -0.4, 0.1, 0.4, 1]),
    ],
    ids=["whole", "huge"],
)
def test_whole_numbers_are_rounded_and_huge_bounds_are_none(
    script: ModuleType, space: Box, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Echo, "action_space", space)
    got = echo(script, np.array([[-1, -0.4, 0.1, 0.4, 1]]), monkeypatch)
    np.testing.assert_allclose(got[0], expected)


def test_rollout_and_update_share_the_policy(
    agent: nn.Module, observe: Observe, shake: Shake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy that is changed in one place is changed in both."""
    shake(agent, 1.0)
    names = {"ppo": "get_dist", "ppo_continuous": "gaussian", "ppo_atari": "policy"}
    name = names[type(agent).__module__]
    obs, policy = observe(8), getattr(agent, name)
    before = agent.get_dist(obs)

    def sharper(x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if name == "gaussian":
            mean, log_std = policy(x)
            return 3 * mean, log_std
        return (3 * policy(x)).log_softmax(dim=-1)

    monkeypatch.setattr(agent, name, sharper)
    dist = agent.get_dist(obs)
    assert not torch.allclose(dist, before)
    action = agent.sample(dist)
    _, logprob, _, _ = agent.get_action_and_value(obs, action)
    torch.testing.assert_close(logprob, agent.log_prob(dist, action))
