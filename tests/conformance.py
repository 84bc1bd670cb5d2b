"""Is your modified PPO still PPO? Checks of any script with the interfaces of ppo.py.

    python -m pytest tests/conformance.py --script path/to/my_ppo.py

They train small environments for some seconds; --env-id my_envs:Mine-v0 takes yours where any will
do. A failure says what is wrong, and what it usually comes from. Checks whose environments do not
fit the script's actions or observations are skipped.
"""

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import column, copied, metrics
from torch import Tensor

ANY = ("CartPole-v1", "Pendulum-v1", "envs:Locks-v0", "BreakoutNoFrameskip-v4")
SMALL = {"num_envs": 4, "num_steps": 16, "num_minibatches": 2, "update_epochs": 2}
SMALL |= {"total_timesteps": 256, "eval_episodes": 0, "cuda": False, "torch_threads": 1}
LEARN = {"num_envs": 8, "num_steps": 32, "num_minibatches": 2, "update_epochs": 10}
LEARN |= {"learning_rate": 1e-2, "target_kl": None, "total_timesteps": 20 * 256}


@pytest.fixture(scope="module")
def script(request: pytest.FixtureRequest) -> ModuleType:
    path = Path(request.config.getoption("--script")).resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train(
    script: ModuleType, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., SimpleNamespace]:
    """train(*ids, **flags): a run in the first of these environments that fits, and what it did."""
    own = request.config.getoption("--env-id")
    anywhere = (own,) if own else ANY

    def train(*ids: str, **flags: object) -> SimpleNamespace:
        for env_id in ids or anywhere:
            args = script.Args(**SMALL | flags | {"env_id": env_id})
            args.run_dir = args.run_dir or str(tmp_path_factory.mktemp("run") / "run")
            try:
                script.make_envs(args, 1).close()
            except script.BadInput:
                continue
            with pytest.MonkeyPatch.context() as patch:
                batches, losses, gradients = watch(script, patch)
                folder = Path(script.train(args))
            return SimpleNamespace(
                args=args, folder=folder, batches=batches, losses=losses, gradients=gradients
            )
        reason = f"none of {ids or anywhere} has the script's kind of actions and observations"
        if ids or flags:
            pytest.skip(reason)
        pytest.fail(f"{reason}; --env-id names another")

    return train


def watch(script: ModuleType, patch: pytest.MonkeyPatch) -> tuple[list, list, list]:
    """What add_advantages made, what ppo_loss was given, and gradients, as they are and used."""
    batches, losses, gradients = [], [], []
    real_advantages, real_loss = script.add_advantages, script.ppo_loss
    real_step = torch.optim.Adam.step

    def add_advantages(agent: object, args: object, batch: dict[str, Tensor]) -> None:
        real_advantages(agent, args, batch)
        batches.append(copied(batch))

    def ppo_loss(
        agent: torch.nn.Module, args: object, mb: dict[str, Tensor], beta: Tensor
    ) -> tuple:
        loss, stats = real_loss(agent, args, mb, beta)
        parameters = [x for x in agent.parameters() if x.requires_grad]
        right = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        named = zip(parameters, right, strict=True)
        gradients.append({x: 0 * x.detach() if g is None else g for x, g in named})
        losses.append(SimpleNamespace(agent=agent, args=args, mb=mb, beta=beta, stats=stats))
        return loss, stats

    def step(self: torch.optim.Adam, closure: None = None) -> None:
        used = {x: x.grad for group in self.param_groups for x in group["params"]}
        used = {x: torch.zeros_like(x) if grad is None else grad for x, grad in used.items()}
        right = {x: torch.zeros_like(x) for x in used} | gradients[-1]
        gradients[-1] = tuple(torch.cat([g[x].flatten() for x in used]) for g in (right, used))
        return real_step(self)

    patch.setattr(script, "add_advantages", add_advantages)
    patch.setattr(script, "ppo_loss", ppo_loss)
    patch.setattr(torch.optim.Adam, "step", step)
    return batches, losses, gradients


@pytest.fixture(scope="module")
def run(train: Callable[..., SimpleNamespace]) -> SimpleNamespace:
    return train()


def test_advantages_are_those_of_gae(script: ModuleType) -> None:
    T, N, gamma, lambda_ = 12, 5, 0.9, 0.8
    rewards, values, next_values, chance = torch.randn(4, T, N, dtype=torch.float64)
    terminations = (chance > 0.8).double()
    dones = (chance > 0.4).double()
    ours = script.compute_gae(rewards, values, next_values, terminations, dones, gamma, lambda_)
    deltas = rewards + gamma * next_values * (1 - terminations) - values
    expected = torch.zeros(T, N, dtype=torch.float64)
    for t in range(T):
        weight = torch.ones(N, dtype=torch.float64)
        for later in range(t, T):
            expected[t] += weight * deltas[later]
            weight = weight * gamma * lambda_ * (1 - dones[later])
    reason = "advantages are not sums of (gamma * lambda)^k * delta within an episode: terminations"
    reason += " stop the bootstrap, dones the trace"
    torch.testing.assert_close(ours[0], expected, msg=reason)
    torch.testing.assert_close(ours[1], expected + values, msg="returns = advantages + values")


def test_a_time_limit_is_no_death(
    script: ModuleType, train: Callable[..., SimpleNamespace]
) -> None:
    """With a reward of 1 at each step, V = 1 / (1 - gamma), however short the episodes are."""
    ids = ("envs:Constant-v0", "envs:ConstantBox-v0")
    quiet = {"norm_obs": False, "norm_reward": False, "gamma": 0.8, "gae_lambda": 0.95}
    learned = train(*ids, **LEARN | quiet).batches[-1]["values"].mean().item()
    reason = (
        f"V is {learned:.2f}, not 5: time limits treated as terminations, or V(s_{{t+1}}) after"
    )
    assert learned == pytest.approx(5, rel=0.1), f"{reason} the reset, or broken value targets"


def test_no_row_crosses_a_reset(train: Callable[..., SimpleNamespace]) -> None:
    ids = ("envs:Counter-v0", "envs:CounterBox-v0")
    batches = train(*ids, norm_obs=False, norm_reward=False).batches
    for batch in batches:
        moved = batch["next_obs"] - batch["obs"]
        reason = (
            "s_{t+1} is not one step after s_t: the first observation of the next episode, a row"
        )
        assert (moved == 1).all(), f"{reason} of NEXT_STEP's reset, or an array that is reused"
        paid = batch["next_obs"][..., 0]  # and up to a quarter more or less, for the action
        assert (batch["rewards"] - paid).abs().max() < 0.5, "rewards of other rows"


def test_normalized_rewards_are_divided(train: Callable[..., SimpleNamespace]) -> None:
    ids = ("envs:Counter-v0", "envs:CounterBox-v0")
    for batch in train(*ids, norm_obs=False, norm_reward=True).batches:
        scale = batch["next_obs"][..., 0] / batch["rewards"]
        reason = (
            "normalized rewards are not the rewards divided by one number: centered or clipped,"
        )
        assert scale.std() < 0.01 * scale.mean(), f"{reason} or scaled step by step"


@pytest.mark.parametrize("norm_obs", [False, True])
def test_the_first_ratio_is_1(norm_obs: bool, train: Callable[..., SimpleNamespace]) -> None:
    sizes = {"update_epochs": 1, "num_minibatches": 1, "learning_rate": 1e-2}
    first = train(norm_obs=norm_obs, **sizes)
    kls = np.abs(column(first.folder, "losses/approx_kl"))
    reason = "the update sees another policy than the one that acted: statistics updated before it,"
    assert kls.max() < 1e-5, f"{reason} a mask, a memory or dropout that differs, rows mixed up"


@pytest.mark.parametrize("ratio", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_the_surrogate_is_clipped(
    script: ModuleType, run: SimpleNamespace, advantage: float, ratio: float
) -> None:
    last, plain = run.losses[-1], {"surrogate": "clip", "clip_coef": 0.2, "norm_adv": False}
    args = dataclasses.replace(run.args, **plain)
    with torch.no_grad():
        dist = last.agent.get_dist(last.agent.features(last.mb))
        logprobs = script.log_prob(dist, last.mb["actions"])
    mb = last.mb | {"advantages": torch.full_like(logprobs, advantage)}
    mb["logprobs"] = logprobs - np.log(ratio)
    loss = script.ppo_loss(last.agent, args, mb, last.beta)[1]["policy_loss"].item()
    right = -min(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
    reason = f"policy_loss is {loss:.3f}, not {right:.3f} = -min(r * A, clip(r) * A)"
    assert loss == pytest.approx(right, rel=1e-4), reason


def test_the_value_loss_is_half_the_squared_error(script: ModuleType, run: SimpleNamespace) -> None:
    last = run.losses[-1]
    args = dataclasses.replace(run.args, clip_vloss=False)
    loss = script.ppo_loss(last.agent, args, last.mb, last.beta)[1]["value_loss"].item()
    values = last.agent.get_value(last.agent.features(last.mb)).flatten()
    right = 0.5 * ((values - last.mb["returns"]) ** 2).mean().item()
    reason = f"value_loss is {loss:.4f}, not {right:.4f}: (M, 1) for (M,), other targets or critics"
    assert loss == pytest.approx(right, rel=1e-3), reason


def test_samples_follow_the_policy(script: ModuleType, run: SimpleNamespace) -> None:
    """E[-log p(a)] is the entropy, if actions are sampled from p and kept as they were."""
    last = run.losses[-1]
    with torch.no_grad():
        dist = last.agent.get_dist(last.agent.features(last.mb))[:1]
        many = dist.expand(40_000, *dist.shape[1:])
        surprises = -script.log_prob(many, script.sample(many))
    surprise, right = surprises.mean().item(), script.entropy(dist).item()
    error = surprises.std().item() / len(surprises) ** 0.5  # of their mean
    reason = f"-log p(a) is {surprise:.3f} on average, the entropy {right:.3f}: actions are clipped"
    assert surprise == pytest.approx(right, abs=5 * error + 1e-3), (
        f"{reason} or greedy before log_prob sees them"
    )


def test_entropy_is_a_bonus(script: ModuleType, run: SimpleNamespace) -> None:
    last = run.losses[-1]
    both = [dataclasses.replace(run.args, ent_coef=ent_coef) for ent_coef in (0.0, 1.0)]
    losses = [script.ppo_loss(last.agent, args, last.mb, last.beta) for args in both]
    change = (losses[1][0] - losses[0][0]).item()
    reason = "more entropy must lower the loss: its sign, or ent_coef is not used"
    assert change == pytest.approx(-losses[0][1]["entropy"].item(), rel=1e-4), reason


def test_each_epoch_sees_every_row_once(run: SimpleNamespace) -> None:
    batch = run.batches[0]["obs"].flatten(0, 1).flatten(1).double().sum(dim=1)
    mbs = [loss.mb for loss in run.losses[: run.args.num_minibatches]]
    seen = torch.cat([mb["obs"].flatten(1).double().sum(dim=1) for mb in mbs])
    reason = "an epoch's minibatches are not the batch: rows left out or twice"
    torch.testing.assert_close(seen.sort()[0], batch.sort()[0], msg=reason)
    following = [loss.mb["obs"] for loss in run.losses[len(mbs) : 2 * len(mbs)]]
    same = all(torch.equal(mb["obs"], obs) for mb, obs in zip(mbs, following, strict=True))
    assert not same, "each epoch has the same minibatches: not shuffled"
    for mb in mbs:
        assert mb["returns"].shape == mb["values"].shape == mb["logprobs"].shape, "(M,) expected"
        reason = "returns are not advantages + values: rows mixed up, or normalized too early"
        torch.testing.assert_close(mb["returns"], mb["advantages"] + mb["values"], msg=reason)


def test_a_step_follows_the_gradient_of_its_minibatch(run: SimpleNamespace) -> None:
    for right, used in run.gradients:
        norm = right.norm()
        expected = right * (run.args.max_grad_norm / norm).clamp(max=1)
        reason = (
            "Adam does not get the clipped gradient of this minibatch alone: zero_grad forgotten,"
        )
        message = f"{reason} clipping after the step or over a part of the parameters"
        torch.testing.assert_close(used, expected, rtol=1e-3, atol=1e-5, msg=message)


def test_all_parameters_learn_and_stay_finite(run: SimpleNamespace) -> None:
    for name, x in run.losses[-1].agent.named_parameters():
        assert x.isfinite().all(), f"{name} is NaN or infinite"
    rates = column(run.folder, "charts/learning_rate")
    assert min(rates) > 0, "an update with a learning rate of 0 wastes its batch"
    optimizer = torch.load(run.folder / "checkpoint.pt", weights_only=True)["optimizer"]
    listed = sum(len(group["params"]) for group in optimizer["param_groups"])
    learning = [x for x in run.losses[-1].agent.parameters() if x.requires_grad]
    assert listed >= len(learning), "parameters of the agent that no optimizer has"


def test_what_is_shown_is_learned(train: Callable[..., SimpleNamespace]) -> None:
    flags = LEARN | {"gamma": 0.5, "eval_episodes": 10, "learning_rate": 5e-3}
    run = train("envs:Identity-matrix-v0", "envs:IdentityBox-v0", "envs:Locks-v0", **flags)
    summary = json.loads((run.folder / "summary.json").read_text())
    enough = {"IdentityBox": -2.0, "Locks": 15.0}.get(run.args.env_id[5:-3], 9.0)
    reason = f"return {summary['eval_return_mean']}: the action that the observation names is not"
    assert summary["eval_return_mean"] > enough, f"{reason} found in 5,000 steps"


def test_same_seed_same_numbers(
    run: SimpleNamespace, train: Callable[..., SimpleNamespace]
) -> None:
    reason = "a source of randomness is not seeded, or state is left from the run before"
    assert metrics(train().folder) == metrics(run.folder), reason
    assert metrics(train(seed=2).folder) != metrics(run.folder), "the seed changes nothing"


def test_resuming_loses_nothing_and_evaluating_repeats(
    script: ModuleType, train: Callable[..., SimpleNamespace], run: SimpleNamespace
) -> None:
    first = train(eval_episodes=2, norm_obs=hasattr(run.losses[-1].agent, "obs_stats"))
    learned = first.losses[-1].agent
    loaded = type(learned)(script.make_envs(first.args, 1), first.args)
    script.restore(str(first.folder), {"agent": loaded})
    dists = [x.get_dist(x.features(first.losses[-1].mb)) for x in (learned, loaded)]
    reason = "a loaded agent acts otherwise: statistics or another state are not saved"
    torch.testing.assert_close(*dists, msg=reason)
    before = torch.load(first.folder / "checkpoint.pt", weights_only=True)
    counts = {float(x["obs_stats.count"]) for x in before.values() if "obs_stats.count" in x}
    assert len(counts) < 2, "a saved agent, averaged or a target, lacks the observation statistics"
    summary = json.loads((first.folder / "summary.json").read_text())
    again = script.evaluate(first.args, first.folder)
    assert again.items() <= summary.items(), "an evaluation of the checkpoint gives other figures"
    script.train(dataclasses.replace(first.args, resume=str(first.folder)))
    after = torch.load(first.folder / "checkpoint.pt", weights_only=True)
    for module in before.keys() - {"state", "args"}:
        texts = [str(checkpoint[module]) for checkpoint in (before, after)]
        assert texts[0] == texts[1], f"{module} is not loaded on --resume"
    longer = dataclasses.replace(first.args, resume=str(first.folder), total_timesteps=512)
    script.train(longer)
    steps = column(first.folder, "global_step")
    assert steps == list(range(64, 513, 64)), "rows of metrics.csv are lost or twice"
