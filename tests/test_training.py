"""What training does: it loses no step, repeats itself, learns, and keeps the files it names."""

import functools
import json
import random
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import envs
import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import column, metrics, read_csv, spy, summary, tiny
from torch import Tensor

import ppo
import ppo_continuous

T, N = 16, 4  # of tiny runs
# A run that learns a very small environment in a second
FAST = {"num_envs": 8, "num_steps": 32, "update_epochs": 10, "learning_rate": 5e-3}
FAST |= {"total_timesteps": 15 * 256, "eval_episodes": 10}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def train(**changes: object) -> str:
    """The folder of a short run of ppo.py."""
    return ppo.train(tiny(ppo, **changes))


def learn(**changes: object) -> ppo.Agent:
    """The agent of such a run."""
    args = tiny(ppo, **changes)
    agent = ppo.Agent(ppo.make_envs(args, 1), args)
    ppo.restore(Path(ppo.train(args)), {"agent": agent})
    return agent


def joined(calls: list[tuple[tuple, dict, object]], name: str) -> Tensor:
    """One name of all batches that add_advantages was given, (T * iterations, N, ...)."""
    return torch.cat([args[2][name] for args, _, _ in calls])


# ---- rows are transitions


@pytest.mark.parametrize(
    ("script", "copy", "num_steps"),
    [(ppo, True, 1), (ppo, True, 40), (ppo, False, 1), (ppo, False, 40), (ppo_continuous, True, 8)],
)
def test_rows_are_transitions(
    script: ModuleType, copy: bool, num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No row crosses a reset, none is lost; s_{t+1} is the state before any reset, also its value.

    All that though the environments, or the vector of them too, return the same arrays again.
    """

    class CountingAgent(script.Agent):
        def get_value(self, features: Tensor) -> Tensor:
            return features[:, 0] + 0 * super().get_value(features)

    vector = functools.partial(gym.vector.SyncVectorEnv, copy=copy)
    monkeypatch.setattr(gym.vector, "SyncVectorEnv", vector)
    monkeypatch.setattr(script, "Agent", CountingAgent)
    batches = spy(monkeypatch, script, "add_advantages")
    estimates = spy(monkeypatch, script, "compute_gae")
    sizes = {"num_envs": 3, "num_steps": num_steps, "num_minibatches": 1, "update_epochs": 1}
    sizes |= {"total_timesteps": 120 * 3, "norm_obs": False, "norm_reward": False}
    sizes |= {"recompute_advantages": False}
    name = "Counter" if script is ppo else "CounterBox"
    folder = script.train(tiny(script, env_id=f"envs:{name}-v0", **sizes))
    assert len(batches) == len(estimates) == 120 // num_steps
    obs, next_obs = joined(batches, "obs")[..., 0], joined(batches, "next_obs")[..., 0]
    assert obs.shape == (120, 3)
    assert (obs[0] == 1000).all()
    assert torch.equal(next_obs, obs + 1)
    actions = joined(batches, "actions").view_as(obs).clamp(-1, 1)
    torch.testing.assert_close(joined(batches, "rewards"), next_obs + 0.25 * actions)
    dones, terminations = joined(batches, "dones") > 0, joined(batches, "terminations") > 0
    following = torch.where(dones, 1000 * (obs // 1000 + 1), next_obs)
    assert torch.equal(obs[1:], following[:-1])
    values, next_values = (torch.cat([args[i] for args, _, _ in estimates]) for i in (1, 2))
    assert torch.equal(values, obs)
    assert torch.equal(next_values, next_obs)
    # All kinds of rows have occurred; what ends in both ways is a termination.
    assert terminations.any() and (dones & ~terminations).any() and not dones.all()
    assert not (terminations & ~dones).any()
    assert len(read_csv(f"{folder}/episodes.csv")) == dones.sum()


def test_first_episodes_end_at_different_times() -> None:
    """Or environments of equally long episodes would fill each batch with one stage of them."""
    episodes = read_csv(f"{train(env_id='envs:Plain-v0', norm_obs=False)}/episodes.csv")
    ends = [(int(row["episodic_length"]), int(row["global_step"])) for row in episodes]
    assert ends[:4] == [(3, 12), (5, 20), (8, 32), (10, 40)]
    assert {length for length, _ in ends[4:]} == {10}


@pytest.mark.parametrize(
    ("name", "states", "values"),
    [("Constant", [1], [10]), ("Chain", [0, 1, 2], [2.71, 1.9, 1])],
    ids=["time limits", "terminations"],
)
def test_value_of_reward_1(name: str, states: list[float], values: list[float]) -> None:
    """1 / (1 - gamma) where only time limits end episodes; 1 + gamma + gamma^2 before 3 steps."""
    settings = FAST | {"total_timesteps": 20 * 256, "learning_rate": 1e-2, "norm_reward": False}
    agent = learn(env_id=f"envs:{name}-v0", gamma=0.9, gae_lambda=0.95, **settings)
    learned = agent.get_value(torch.tensor(states).float().view(-1, 1)).tolist()
    assert learned == pytest.approx(values, rel=0.05)


# ---- normalization


def test_statistics_of_observations_wait_for_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update sees those of the T uncounted steps and of the batches before its own."""
    seen = []
    loss = ppo.ppo_loss

    def watched(agent: ppo.Agent, *rest: object) -> tuple[Tensor, dict[str, Tensor]]:
        stats = agent.obs_stats
        seen.append((stats.count.item(), stats.mean.item(), stats.var.item()))
        return loss(agent, *rest)

    monkeypatch.setattr(ppo, "ppo_loss", watched)
    folder = train(env_id="envs:Timer-v0", norm_obs=True)
    shown = np.arange(T + 512 // N) % 11  # what Timer shows in each environment, step by step
    for update, (count, mean, var) in enumerate(seen):
        rows = np.concatenate([shown[1 : T + 1], shown[T : T + update // 4 * T]])
        assert count == N * len(rows)
        assert (mean, var) == pytest.approx((rows.mean(), rows.var()))
    assert len(seen) == 8 * 4
    # The first 16 of 22 steps of two episodes are not counted.
    assert read_csv(f"{folder}/episodes.csv")[0]["global_step"] == str(N * (22 - T))
    assert len(metrics(folder)) == 8


@pytest.mark.parametrize("norm_obs", [False, True])
def test_first_ratio_is_one(norm_obs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one step an update, it sees the policy that acted, though all changes from then on."""
    calls = spy(monkeypatch, ppo, "ppo_loss")
    train(norm_obs=norm_obs, update_epochs=1, num_minibatches=1, learning_rate=3e-2)
    assert len(calls) == 8
    for _, _, (_, stats) in calls:
        assert abs(stats["old_approx_kl"]) < 1e-6 and abs(stats["approx_kl"]) < 1e-6
    train(norm_obs=norm_obs, update_epochs=2, num_minibatches=1, learning_rate=3e-2)
    assert all(stats["approx_kl"] > 1e-5 for _, _, (_, stats) in calls[9::2])


def test_rewards_are_divided_by_the_std_of_discounted_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of the past begin again with each episode, and go on from one batch to the next."""
    batches = spy(monkeypatch, ppo, "add_advantages")
    train(env_id="envs:Counter-v0", norm_reward=True, gamma=0.9)
    dones = joined(batches, "dones").numpy()
    raw = (joined(batches, "next_obs")[..., 0] + 0.25 * joined(batches, "actions")).numpy()
    sums = np.zeros_like(raw)
    for i in range(N):
        start = 0
        for t in range(len(raw)):
            ages = t - np.arange(start, t + 1)
            sums[t, i] = (0.9**ages * raw[start : t + 1, i]).sum()
            if dones[t, i]:
                start = t + 1
    std = np.repeat([sums[: T * (k + 1)].std() for k in range(8)], T)
    np.testing.assert_allclose(joined(batches, "rewards"), raw / std[:, None], rtol=1e-4)


def test_rewards_of_0_are_no_division_by_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envs.Constant, "reward", 0.0)
    assert len(metrics(train(env_id="envs:Constant-v0", norm_reward=True))) == 8


# ---- same seed, same numbers


@pytest.mark.parametrize("env_id", ["CartPole-v1", "envs:Global-v0"])
def test_same_seed_same_metrics(env_id: str) -> None:
    """Also where an environment draws from the global generators of numpy and Python."""
    settings = {"env_id": env_id, "norm_obs": True, "norm_reward": True, "eval_episodes": 2}
    args = tiny(ppo, seed=3, **settings)
    before = asdict(args)
    first = ppo.train(args)
    assert asdict(args) == before  # a caller's arguments may serve again
    again, other = (train(seed=seed, **settings) for seed in (3, 4))
    assert metrics(first) == metrics(again)
    assert read_csv(f"{first}/episodes.csv") == read_csv(f"{again}/episodes.csv")
    assert summary(first)["eval_return_mean"] == summary(again)["eval_return_mean"]
    losses = [column(folder, "losses/value_loss") for folder in (first, other)]
    assert len(losses[0]) == 8
    assert all(a != b for a, b in zip(*losses, strict=True))


def test_no_two_environments_share_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of one run, those of its evaluation included, nor of runs of seeds 1, 2 and 3.

    Nor do the first weights, the rollouts and the evaluation draw the same random numbers.
    """
    calls = spy(monkeypatch, ppo, "seed_all")
    seeds = []
    reset = envs.Constant.reset

    def watched(
        self: envs.Constant, *, seed: int | None, options: dict | None = None
    ) -> envs.Reset:
        seeds.append(seed)
        return reset(self, seed=seed)

    monkeypatch.setattr(envs.Constant, "reset", watched)
    for seed in (1, 2, 3):
        train(env_id="envs:Constant-v0", total_timesteps=64, seed=seed, eval_episodes=3)
    given = [seed for seed in seeds if seed is not None]  # None: go on with your own generator
    assert len(given) == 3 * (N + 3) == len(set(given))
    assert len(calls) == 3 * 3 == len({env_seed for _, _, env_seed in calls})


def test_seed_all_seeds_every_global_generator() -> None:
    def draws(*numbers: int) -> tuple[float, ...]:
        return ppo.seed_all(*numbers), random.random(), np.random.random(), torch.rand(()).item()

    runs = [draws(*numbers) for numbers in [(1, 0), (1, 1, 0, 0), (1, 1, 1, 0), (1, 2), (2, 0)]]
    assert draws(1, 0) == runs[0]
    for draw in zip(*runs, strict=True):
        assert len(set(draw)) == 5
    assert all(0 <= seed < 2**31 - 1000 for seed, *_ in runs)  # seed + i is a seed too
    # SeedSequence sets neighbors far apart: what follows a seed is of no other run's.
    assert np.diff(sorted(ppo.seed_all(seed, 1) for seed in range(50))).min() > 1000


def test_evaluation_leaves_the_checkpoint_and_torch_as_they_were() -> None:
    """So that one between two updates, for a best agent, does not change the training."""
    args = tiny(ppo, norm_obs=True, eval_episodes=2)
    folder = Path(ppo.train(args))
    before = (folder / "checkpoint.pt").read_bytes()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    results = [ppo.evaluate(args, folder) for _ in range(2)]
    assert torch.equal(torch.rand(3), expected)
    assert results[0] == results[1]
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_evaluation_counts_the_first_episode_of_each_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those that end early do not play a second one that counts."""
    args = tiny(ppo, env_id="envs:Counter-v0")
    folder, lengths = ppo.train(args), {}

    def pay(self: envs.Counter, action: int) -> float:
        if self.episode == 1:
            lengths[id(self)] = self.steps
        return 1.0 if self.episode == 1 else 1000.0

    monkeypatch.setattr(envs.Counter, "pay", pay)
    result = ppo.evaluate(replace(args, eval_episodes=8), folder)
    first = np.array(list(lengths.values()))
    assert len(first) == result["eval_episodes"] == 8
    assert result["eval_return_mean"] == pytest.approx(first.mean()) != np.median(first)
    assert result["eval_return_std"] == pytest.approx(np.sqrt(((first - first.mean()) ** 2).mean()))


# ---- the update


def test_each_epoch_uses_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In minibatches of one size, in another order each time, and without mixing up the rows."""
    losses = spy(monkeypatch, ppo, "ppo_loss")
    batches = spy(monkeypatch, ppo, "add_advantages")
    sizes = {"num_minibatches": 4, "update_epochs": 3, "total_timesteps": 128}
    train(env_id="envs:Counter-v0", norm_reward=False, **sizes)
    assert len(losses) == 2 * 3 * 4
    assert {len(x) for (_, _, mb, _), _, _ in losses for x in mb.values()} == {T * N // 4}
    orders = []
    for epoch in range(6):
        minibatches = [mb for (_, _, mb, _), _, _ in losses[4 * epoch : 4 * epoch + 4]]
        rows = {name: torch.cat([mb[name] for mb in minibatches]) for name in minibatches[0]}
        orders.append(rows["obs"].flatten().tolist())
        batch = batches[epoch // 3][0][2]["obs"]
        assert sorted(orders[-1]) == sorted(batch.flatten().tolist())
        assert torch.equal(rows["rewards"], rows["next_obs"][:, 0] + 0.25 * rows["actions"])
        torch.testing.assert_close(rows["returns"], rows["advantages"] + rows["values"])
        categorical = torch.distributions.Categorical(logits=rows["dist"])
        torch.testing.assert_close(rows["logprobs"], categorical.log_prob(rows["actions"]))
    assert len(set(map(tuple, orders))) == 6


def test_each_step_follows_the_clipped_gradient_of_its_minibatch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without what is left of the minibatch before; grad_norm is the norm before clipping."""
    expected, taken = [], []
    loss = ppo.ppo_loss

    def watched(agent: ppo.Agent, *rest: object) -> tuple[Tensor, dict[str, Tensor]]:
        result = loss(agent, *rest)
        gradients = torch.autograd.grad(result[0], list(agent.parameters()), retain_graph=True)
        expected.append(torch.cat([x.flatten() for x in gradients]))
        return result

    class WatchedAdam(torch.optim.Adam):
        def step(self, closure: None = None) -> None:
            assert self.defaults["eps"] == 1e-5
            taken.append(torch.cat([x.grad.flatten() for x in self.param_groups[0]["params"]]))
            super().step()

    monkeypatch.setattr(ppo, "ppo_loss", watched)
    monkeypatch.setattr(torch.optim, "Adam", WatchedAdam)
    folder = train(max_grad_norm=5.3, norm_reward=False)
    assert len(taken) == len(expected) == 8 * 4
    norms = torch.stack([gradient.norm() for gradient in expected])
    assert (norms > 5.3).any() and (norms < 5.3).any()
    for gradient, norm, step in zip(expected, norms, taken, strict=True):
        torch.testing.assert_close(step, gradient * (5.3 / norm).clamp(max=1), rtol=1e-4, atol=1e-6)
    logged = column(folder, "losses/grad_norm")
    assert logged == pytest.approx(norms.view(8, 4).mean(dim=1).tolist(), rel=1e-4)


def test_learning_rates_are_annealed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linearly to --final-lr-fraction; a group of parameters keeps its share of the rate."""
    steps = []

    class TwoRates(torch.optim.Adam):
        def __init__(self, parameters: list[Tensor], lr: float, **kwargs: object) -> None:
            groups = [{"params": parameters[:-2]}, {"params": parameters[-2:], "lr": lr / 10}]
            super().__init__(groups, lr, **kwargs)

        def step(self, closure: None = None) -> None:
            steps.append([group["lr"] for group in self.param_groups])
            super().step()

    monkeypatch.setattr(torch.optim, "Adam", TwoRates)
    fractions = [({"anneal_lr": False}, 1.0), ({}, 1 / 8), ({"final_lr_fraction": 0.2}, 0.3)]
    for flags, last in fractions:  # of the last iteration, the eighth
        steps.clear()
        folder = train(learning_rate=1e-3, **flags)
        rates = column(folder, "charts/learning_rate")
        expected = np.linspace(1e-3, last * 1e-3, 8)
        np.testing.assert_allclose(rates, expected)  # of --learning-rate
        assert len(steps) == 8 * 4
        np.testing.assert_allclose(steps[::4], np.stack([expected, expected / 10], axis=1))
        agent = torch.load(f"{folder}/checkpoint.pt", weights_only=True)["agent"]
        assert agent["progress"] == 7 / 8  # what other schedules read, also without anneal_lr


@pytest.mark.parametrize("recompute", [False, True])
def test_target_kl_ends_the_epochs(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each epoch, the mean approx_kl of that epoch's minibatches decides."""
    calls = spy(monkeypatch, ppo, "ppo_loss")
    target, epochs = 0.004, 6
    settings = {"update_epochs": epochs, "learning_rate": 3e-3, "anneal_lr": False}
    train(target_kl=target, recompute_advantages=recompute, total_timesteps=2048, **settings)
    kls = np.array([stats["approx_kl"].item() for _, _, (_, stats) in calls])
    lengths = [0]  # of each update so far, in epochs
    for beyond in kls.reshape(-1, 2).mean(axis=1) > target:
        lengths[-1] += 1
        if beyond or lengths[-1] == epochs:
            lengths.append(0)
    assert lengths.pop() == 0
    assert len(lengths) == 32
    assert len(set(lengths)) > 2


def test_recompute_advantages_asks_the_current_critic(monkeypatch: pytest.MonkeyPatch) -> None:
    estimates, losses = spy(monkeypatch, ppo, "compute_gae"), spy(monkeypatch, ppo, "ppo_loss")
    train(recompute_advantages=True, update_epochs=3, num_minibatches=1)
    assert len(estimates) == len(losses) == 3 * 8
    for (args, _, (advantages, returns)), ((_, _, mb, _), _, _) in zip(
        estimates, losses, strict=True
    ):
        for name, x in (("values", args[1]), ("advantages", advantages), ("returns", returns)):
            assert torch.equal(mb[name].sort()[0], x.flatten().sort()[0])
    for first, *later in zip(*(iter(estimates),) * 3, strict=True):
        for again in later:
            assert torch.equal(first[0][0], again[0][0])  # the rewards
            assert not torch.equal(first[0][1], again[0][1])  # the values
            assert not torch.equal(first[0][2], again[0][2])
    estimates.clear()
    train(recompute_advantages=False, update_epochs=3)
    assert len(estimates) == 8


def test_explained_variance_is_the_critic_before_it_learns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = spy(monkeypatch, ppo, "compute_gae")
    folder = train(recompute_advantages=True, update_epochs=3)
    logged = column(folder, "losses/explained_variance")
    for (args, _, (_, returns)), value in zip(calls[::3], logged, strict=True):
        unexplained = np.var((returns - args[1]).numpy()) / np.var(returns.numpy())
        assert value == pytest.approx(1 - unexplained, abs=1e-4)


# ---- the surrogates and the other settings


LIVELY = {"learning_rate": 3e-3, "update_epochs": 4}  # so that clipping happens


def test_a_fixed_beta_stays() -> None:
    assert set(column(train(surrogate="kl-fixed", **LIVELY), "losses/kl_coef")) == {1.0}


@pytest.mark.parametrize("target", [1e-9, 0.01, 1e9])
def test_adaptive_beta_follows_the_kl_of_the_whole_batch(
    target: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """d < target / 1.5 halves, d > 1.5 * target doubles; within a factor 1,000 of the start."""
    batches, calls = (spy(monkeypatch, ppo, name) for name in ("add_advantages", "kl_divergence"))
    settings = {"learning_rate": 1e-2, "anneal_lr": False, "kl_coef": 0.5, "kl_target": target}
    folder = train(surrogate="kl-adaptive", total_timesteps=40 * T * N, **settings)
    ends = [args for args, _, _ in calls if len(args[0]) == T * N]  # of updates
    betas = column(folder, "losses/kl_coef")
    assert len(ends) == len(batches) == len(betas) == 40 and betas[0] == 0.5
    ratios = []
    for (args, _, _), dists in zip(batches, ends, strict=True):
        assert torch.equal(dists[0].sort(dim=0)[0], args[2]["dist"].flatten(0, 1).sort(dim=0)[0])
        old, new = (torch.distributions.Categorical(logits=dist) for dist in dists)
        kl = torch.distributions.kl_divergence(old, new).mean()
        ratios.append(kl.item() / target)
    factors = [0.5 if x < 1 / 1.5 else 2.0 if x > 1.5 else 1.0 for x in ratios]
    expected = np.clip(np.array(betas) * factors, 0.5 / 1000, 0.5 * 1000)
    np.testing.assert_allclose(betas[1:], expected[:-1], rtol=1e-5)
    if target != 0.01:
        assert betas[-1] in (pytest.approx(0.0005), pytest.approx(500))


@pytest.mark.parametrize(
    ("kl", "factor", "epochs"), [(0.006, 0.5, 6), (0.007, 1, 6), (0.014, 1, 6), (0.016, 2, 1)]
)
def test_the_average_kl_of_all_processes_decides(
    kl: float, factor: float, epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a --kl-target of 0.01, and a --target-kl of 0.015. No process goes by its own KL."""
    calls = spy(monkeypatch, ppo, "ppo_loss")
    monkeypatch.setattr(ppo, "all_mean", lambda x: torch.full_like(x, kl))
    settings = {"norm_adv": False, "norm_obs": False, "norm_reward": False, "update_epochs": 6}
    folder = train(surrogate="kl-adaptive", kl_target=0.01, target_kl=0.015, **settings)
    assert column(folder, "losses/kl_coef") == [factor**i for i in range(8)]
    assert len(calls) == 8 * 2 * epochs


def test_adaptive_beta_does_not_see_the_normalization_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = spy(monkeypatch, ppo, "kl_divergence")
    train(surrogate="kl-adaptive", norm_obs=True, learning_rate=1e-12)
    ends = [args for args, _, _ in calls if len(args[0]) == T * N]
    assert len(ends) == 8
    for old, new in ends:
        torch.testing.assert_close(old, new, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("surrogate", ["clip", "kl-adaptive"])
def test_compile_gives_the_same_run(surrogate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiles = spy(monkeypatch, torch, "compile")
    settings = LIVELY | {"surrogate": surrogate, "norm_obs": True, "clip_vloss": True}
    eager, compiled = (train(compile=compile, **settings) for compile in (False, True))
    for name in metrics(eager)[0]:
        both = column(eager, name), column(compiled, name)
        np.testing.assert_allclose(*both, rtol=0.01, atol=1e-3)
    assert len(compiles) == 1


# ---- what cannot go on


@pytest.mark.parametrize(
    ("way", "names"),
    [
        ("first", r"\['obs', "),
        ("endless", r"\['obs'"),
        ("final", r"\['next_obs', "),
        ("reward", r"\['rewards', "),
        ("infinite", r"\['rewards', "),
        ("huge", "gradient"),
    ],
)
def test_nan_and_infinity_stop_the_run_and_are_named(way: str, names: str) -> None:
    """From step 50 on, in the fourth iteration; what was saved before is usable.

    Endless, observations are normalized, so clipped: an infinite one spoils their statistics only,
    and is met an iteration earlier, as 16 steps precede the first.
    """
    with pytest.raises(FloatingPointError, match=f"NaN or infinite: {names}"):
        settings = {"norm_obs": way == "endless", "norm_reward": False, "run_dir": "run"}
        train(env_id=f"envs:Bad-{way}-v0", **settings)
    assert len(metrics("run")) == 3 - (way == "endless")
    checkpoint = torch.load("run/checkpoint.pt", weights_only=True)
    assert all(x.isfinite().all() for x in checkpoint["agent"].values())


# ---- environments of all kinds


@pytest.mark.parametrize("coded", ["dict", "from1"])
def test_discrete_identity_is_learned(coded: str) -> None:
    """10 steps of at most 1, however the right action is written into the observation."""
    folder = train(env_id=f"envs:Identity-{coded}-v0", gamma=0.5, **FAST)
    assert summary(folder)["eval_return_mean"] == 10


def test_continuous_identity_is_learned() -> None:
    """A policy that ignores the target cannot do better than -20 / 3."""
    args = tiny(ppo_continuous, env_id="envs:IdentityBox-v0", gamma=0.5, **FAST)
    folder = ppo_continuous.train(args)
    assert summary(folder)["eval_return_mean"] > -0.5


def test_a_state_number_becomes_a_one_hot() -> None:
    observations, _ = ppo.make_envs(tiny(ppo, env_id="FrozenLake-v1"), 3).reset(seed=1)
    assert observations.tolist() == [[1] + [0] * 15] * 3
    assert len(metrics(train(env_id="FrozenLake-v1"))) == 8


@pytest.mark.parametrize("norm", [False, True])
def test_an_environment_of_a_beginner_trains(norm: bool) -> None:
    """int64 and float64 where its space says float32, an int as reward, a constructor without."""
    folder = train(env_id="envs:Plain-v0", eval_episodes=2, norm_obs=norm, norm_reward=norm)
    returns = [float(row["episodic_return"]) for row in read_csv(f"{folder}/episodes.csv")]
    assert len(returns) > 40 and set(returns) <= set(range(11))
    assert 0 <= summary(folder)["eval_return_mean"] <= 10


POLICY = np.array([-3.0, -1.0, 0.0, 0.5, 1.0, 3.0], np.float32)  # what the policy says, and...
GETS = {  # ...what the environment gets, in each dimension
    "odd": [[-1, -1, 0, 0.5, 1, 1]] * 6,
    "scalar": [[0, 0, 5, 7.5, 10, 10]],
    "skewed": [[1, 1, 2, 2.5, 3, 3], [-8, -8, -5, -3.5, -2, -2]],
    "unbounded": [[-3, -1, 0, 0.5, 1, 3]] * 2,
    "huge": [[-3, -1, 0, 0.5, 1, 3]],
    "half": [[0.25, 0.25, 0.25, 0.5, 1, 3]],
    "mixed": [[0, 0, 5, 7.5, 10, 10], [-3, -1, 0, 0.5, 1, 3]],
    "int": [[-2, -2, 0, 1, 2, 2]],
}


@pytest.mark.parametrize("box", list(envs.Actions.boxes))
def test_actions_are_stretched_and_clipped_to_their_bounds(
    box: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-1 and 1 are the bounds; without bounds actions are as the policy says, or clipped."""
    space, seen = envs.Actions.boxes[box], []
    monkeypatch.setattr(envs.Actions, "seen", seen)
    args = tiny(ppo_continuous, env_id=f"envs:Actions-{box}-v0")
    vector = ppo_continuous.make_envs(args, len(POLICY))
    vector.reset(seed=1)
    actions = np.repeat(POLICY[:, None], len(GETS[box]), axis=1)
    given = actions.copy()
    vector.step(given)
    assert np.array_equal(given, actions)  # the policy learns from what it said
    assert all(x.dtype == space.dtype and x.shape == space.shape and x in space for x in seen)
    got = np.array(seen, np.float64).reshape(len(POLICY), -1)
    np.testing.assert_allclose(got, np.array(GETS[box]).T, rtol=1e-6)


@pytest.mark.slow
def test_cartpole_is_solved_with_the_defaults() -> None:
    folder = ppo.train(ppo.Args())
    assert max(column(folder, "charts/episodic_return")) >= 475
    assert summary(folder)["eval_return_mean"] == 500


@pytest.mark.slow
def test_inverted_pendulum_is_learned() -> None:
    """A random policy keeps it up for about 6 steps."""
    args = ppo_continuous.Args(env_id="InvertedPendulum-v5", total_timesteps=80_000)
    assert summary(ppo_continuous.train(args))["eval_return_mean"] > 500


@pytest.mark.slow
def test_large_coordinates_lose_no_digits() -> None:
    """Centimeters at 4,500,000 m, which float32 rounds to half meters, are learned as at 0 m."""
    settings = FAST | {"total_timesteps": 60 * 256, "norm_obs": True}
    folders = [train(env_id=f"envs:{name}-v0", **settings) for name in ("Line", "Northing")]
    line, northing = (summary(folder)["eval_return_mean"] for folder in folders)
    assert line > -12 and northing == pytest.approx(line, abs=1)


# ---- the files of a run

COLUMNS = ["global_step", "charts/SPS", "charts/episodic_return", "charts/episodic_length"]
COLUMNS += ["charts/learning_rate", "losses/explained_variance", "losses/policy_loss"]
COLUMNS += ["losses/value_loss", "losses/entropy", "losses/approx_kl", "losses/old_approx_kl"]
COLUMNS += ["losses/clipfrac", "losses/grad_norm", "wall_time"]
SUMMARY = ["global_step", "wall_time", "SPS", "train_return_last100"]
SUMMARY += ["eval_return_mean", "eval_return_std", "eval_episodes"]


def test_files_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Of 700 steps, rounded down to 5 batches of 128, and of a label with / and :."""
    settings = {"total_timesteps": 700, "num_steps": 32, "exp_name": "a/b:c", "seed": 7}
    settings |= {"env_id": "envs:Counter-v0", "eval_episodes": 2}
    args = tiny(ppo, run_dir=None, **settings)
    folder = Path(ppo.train(args))
    assert folder.parent == Path("runs").absolute()
    *name, now = folder.name.split("__")
    assert name == ["envs-Counter-v0", "a-b-c", "7"] and int(now) > 1_600_000_000
    files = {"config.json", "script.py", "metrics.csv", "episodes.csv", "checkpoint.pt"}
    assert {path.name for path in folder.iterdir()} == files | {"summary.json"}
    assert json.loads((folder / "config.json").read_text()) == asdict(args)
    assert (folder / "script.py").read_bytes() == Path(ppo.__file__).read_bytes()

    rows = read_csv(folder / "metrics.csv")
    assert sorted(rows[0]) == sorted(COLUMNS)
    assert [row["global_step"] for row in rows] == ["128", "256", "384", "512", "640"]
    times = column(str(folder), "wall_time")
    assert times == sorted(times)
    episodes = read_csv(folder / "episodes.csv")
    assert list(episodes[0]) == ["global_step", "episodic_return", "episodic_length"]
    assert len(episodes) > 100  # their returns rise
    for name in ("episodic_return", "episodic_length"):
        mean = np.mean([float(row[name]) for row in episodes[-100:]])
        assert float(rows[-1][f"charts/{name}"]) == pytest.approx(mean)

    kept = summary(folder, times=True)
    assert sorted(kept) == sorted(SUMMARY)
    assert kept["global_step"] == 640 and kept["eval_episodes"] == 2
    assert kept["train_return_last100"] == float(rows[-1]["charts/episodic_return"])
    said = capsys.readouterr().out
    assert re.search(r"^step 128, \d+ SPS, return \d", said, re.MULTILINE)
    assert f"eval_return_mean={kept['eval_return_mean']}" in said
    checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    assert checkpoint["args"] == asdict(args)
    evaluation = {name: kept[name] for name in kept if name.startswith("eval")}
    assert ppo.evaluate(args, folder) == evaluation


def test_episodes_csv_holds_the_true_returns() -> None:
    """7 steps of reward 100 are 700, however rewards are scaled for learning."""
    folder = train(env_id="envs:Hundred-v0", norm_reward=True, eval_episodes=3)
    rows = read_csv(f"{folder}/episodes.csv")
    assert {(row["episodic_return"], row["episodic_length"]) for row in rows} == {("700.0", "7")}
    # Four environments in step end their episodes together, after 7, 14, 21... steps of each.
    assert [int(row["global_step"]) for row in rows[::4]] == [28 * (i + 1) for i in range(18)]
    assert len(rows) == 4 * 18
    kept = summary(folder)
    assert kept["train_return_last100"] == kept["eval_return_mean"] == 700


def test_a_folder_has_the_name_it_is_given() -> None:
    Path("empty").mkdir()
    for name in ("a/b c/d", "empty"):
        assert train(run_dir=name, total_timesteps=64) == str(Path(name).absolute())
        assert len(metrics(name)) == 1
