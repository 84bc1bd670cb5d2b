"""What training does in real environments: learns, loses no step, repeats itself, keeps files."""

import importlib
import itertools
import json
from pathlib import Path
from types import ModuleType

import envs
import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import ENV_IDS, SCRIPTS, column, metrics, read_csv, spy, tiny
from torch import Tensor

import ppo
import ppo_continuous

SURROGATES = ("clip", "kl-adaptive", "kl-fixed", "none")
# The settings of a run that learns the values of a two-line environment in a second.
FAST = {"num_envs": 8, "num_steps": 32, "num_minibatches": 2, "update_epochs": 10}
FAST |= {"learning_rate": 1e-2, "norm_obs": False, "norm_reward": False}

scripts = pytest.mark.parametrize("script", SCRIPTS, ids=[s.__name__ for s in SCRIPTS])


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def box(script: ModuleType) -> str:
    """What distinguishes the names of the test environments with continuous actions."""
    return "Box" if script is ppo_continuous else ""


def saved_agent(script: ModuleType, folder: str) -> torch.nn.Module:
    args = script.Args(**script.load_checkpoint(folder)["args"])
    agent = script.Agent(script.make_envs(args, 1))
    agent.load_state_dict(script.load_checkpoint(folder)["agent"])
    return agent


# ---- time limits and rows


@scripts
@pytest.mark.parametrize(("name", "value"), [("Constant", 10.0), ("Once", 1.0)])
def test_value_of_constant_reward(script: ModuleType, name: str, value: float) -> None:
    """V = 1 / (1 - gamma) where only time limits end episodes; 1 where each step is the last."""
    env_id = f"envs:{name}{box(script)}-v0"
    settings = FAST | {"total_timesteps": 30 * 256, "gamma": 0.9, "gae_lambda": 0.95}
    folder = script.train(tiny(script, env_id=env_id, **settings))
    learned = saved_agent(script, folder).get_value(torch.ones(1, 1)).item()
    assert learned == pytest.approx(value, rel=0.03)


class CountingCritic:
    """Mixed into an Agent: V(s) is the count that Counter observes, whatever has been learned."""

    def get_value(self, obs: Tensor) -> Tensor:
        return obs[:, 0] + 0 * super().get_value(obs)

    def get_action_and_value(self, obs: Tensor, action: Tensor | None = None) -> tuple[Tensor, ...]:
        return *super().get_action_and_value(obs, action)[:3], self.get_value(obs)


@scripts
@pytest.mark.parametrize("stagger", [False, True], ids=["", "stagger"])
@pytest.mark.parametrize("num_steps", [1, 7, 40])
def test_rows_are_transitions(
    script: ModuleType, num_steps: int, stagger: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No row crosses a reset, none is lost, and next_values belong to the final observation.

    Nor does a row cross a restart, and what follows the row before is valued without it.
    """
    agent = type("CountingAgent", (CountingCritic, script.Agent), {})
    monkeypatch.setattr(script, "Agent", agent)
    calls = spy(monkeypatch, script, "compute_gae")
    iterations, num_envs = 280 // num_steps, 3
    sizes = {"num_envs": num_envs, "num_steps": num_steps, "num_minibatches": 1}
    sizes |= {"update_epochs": 1}
    args = tiny(
        script,
        env_id=f"envs:Counter{box(script)}-v0",
        total_timesteps=iterations * num_envs * num_steps,
        recompute_advantages=False,
        stagger=stagger,
        **(FAST | sizes),
    )
    folder = script.train(args)
    assert len(calls) == iterations
    columns = zip(*(call[0][:5] for call in calls), strict=True)
    rewards, values, next_values, terminations, dones = (torch.cat(x).float() for x in columns)
    assert rewards.shape == (iterations * num_steps, num_envs)
    # Counter pays the count it arrives at: row t goes from one count to the next one.
    assert torch.equal(values + 1, rewards)
    alive = terminations == 0
    assert torch.equal(next_values[alive], rewards[alive])
    # Each episode starts where the one before has ended, also from one batch to the next, or
    # where an environment is restarted: the second after one iteration, the third after two.
    starts = (dones > 0).float()
    for i in range(1, num_envs if stagger else 0):
        starts[i * num_steps - 1, i] += 1
    fresh = 1000 * (values // 1000 + starts)
    expected = torch.where(starts[:-1] > 0, fresh[:-1], rewards[:-1])
    assert torch.equal(values[1:], expected)
    assert torch.equal(values[0], torch.full((num_envs,), 1000.0))
    # All four kinds of rows have occurred, a step with both endings counts as terminated.
    truncations = (dones > 0) & alive
    assert truncations.any() and (terminations > 0).any() and (dones == 0).any()
    assert not (terminations > dones).any()
    assert len(read_csv(f"{folder}/episodes.csv")) == int((dones > 0).sum())


@scripts
def test_episodes_csv_holds_the_true_returns(script: ModuleType) -> None:
    """7 steps of reward 100 are 700, however rewards are scaled for learning."""
    env_id = f"envs:Hundred{box(script)}-v0"
    args = tiny(script, env_id=env_id, norm_reward=True, stagger=False, eval_episodes=3)
    folder = script.train(args)
    rows = read_csv(f"{folder}/episodes.csv")
    assert len(rows) == args.num_envs * (128 // 7)
    assert {row["episodic_return"] for row in rows} == {"700.0"}
    assert {row["episodic_length"] for row in rows} == {"7"}
    # Four environments in step end their episodes together, after 7, 14, 21... steps of each.
    assert [int(row["global_step"]) for row in rows[::4]] == [28 * (i + 1) for i in range(18)]
    assert all(float(a["wall_time"]) <= float(b["wall_time"]) for a, b in itertools.pairwise(rows))
    assert column(folder, "charts/episodic_return")[-1] == 700
    assert column(folder, "charts/episodic_length")[-1] == 7
    summary = json.loads(Path(folder, "summary.json").read_text())
    assert summary["train_return_last100"] == summary["eval_return_mean"] == 700


@scripts
def test_norm_reward_scales_what_is_learned(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = spy(monkeypatch, script, "compute_gae")
    env_id = f"envs:Hundred{box(script)}-v0"
    for norm_reward in (False, True):
        script.train(tiny(script, env_id=env_id, norm_reward=norm_reward, num_steps=32))
    rewards = [call[0][0] for call in calls]
    assert (rewards[0] == 100).all()
    assert 0 < rewards[-1].max() < 5


@scripts
def test_norm_obs_alone_changes_the_statistics(script: ModuleType) -> None:
    """Without --norm-obs the buffers of the agent stay what a fresh agent has."""
    fresh = script.Agent(script.make_envs(tiny(script), 1))
    names = [name for name, x in fresh.named_buffers() if x.is_floating_point() and x.numel()]
    assert names
    for norm_obs in (False, True):
        state = saved_agent(script, script.train(tiny(script, norm_obs=norm_obs))).state_dict()
        same = [torch.equal(state[name], fresh.state_dict()[name]) for name in names]
        assert not any(same) if norm_obs else all(same)


# ---- same seed, same numbers


@scripts
@pytest.mark.parametrize("more", [{}, {"norm_obs": True, "norm_reward": True}], ids=["", "norm"])
def test_same_seed_same_metrics(script: ModuleType, more: dict[str, bool]) -> None:
    runs = [
        script.train(tiny(script, run_dir=f"run{i}", seed=seed, **more))
        for i, seed in enumerate((3, 3, 4))
    ]
    first, again, other = map(metrics, runs)
    assert first == again
    assert len(first) == 8
    assert all(
        a["losses/value_loss"] != b["losses/value_loss"] for a, b in zip(first, other, strict=True)
    )
    states = [script.load_checkpoint(run)["agent"] for run in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@scripts
def test_evaluation_does_not_disturb_training(script: ModuleType) -> None:
    runs = [
        script.train(tiny(script, eval_episodes=n, run_dir=f"run{n}", norm_obs=True))
        for n in (0, 5)
    ]
    assert metrics(runs[0]) == metrics(runs[1])
    agents = [script.load_checkpoint(run)["agent"] for run in runs]
    assert all(torch.equal(agents[0][name], agents[1][name]) for name in agents[0])
    summaries = [json.loads(Path(run, "summary.json").read_text()) for run in runs]
    assert [summary["eval_episodes"] for summary in summaries] == [0, 5]
    assert summaries[0]["eval_return_mean"] is None
    # Not even a caller's random numbers are touched.
    agent, args = saved_agent(script, runs[1]), tiny(script, eval_episodes=2)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    before = {name: x.clone() for name, x in agent.state_dict().items()}
    results = [script.evaluate(agent, args) for _ in range(2)]
    assert torch.equal(torch.rand(3), expected)
    assert results[0] == results[1]
    assert all(torch.equal(before[name], x) for name, x in agent.state_dict().items())


@scripts
def test_train_leaves_the_arguments_of_a_caller_usable(script: ModuleType) -> None:
    """train(Args(...)) twice with one object: two runs, not a folder that is not empty."""
    args = tiny(script, seed=11, exp_name="twice", run_dir=None)
    first = script.train(args)
    args.exp_name = "again"
    second = script.train(args)
    assert first != second
    assert metrics(first) == metrics(second)


def test_two_runs_may_start_in_the_same_second() -> None:
    """Their folders' names end in the unix time; neither is refused, neither mixes its files."""
    folders = {ppo.train(tiny(ppo, run_dir=None, total_timesteps=64)) for _ in range(3)}
    assert len(folders) == 3
    assert all(len(metrics(folder)) == 1 for folder in folders)


# ---- what is learned


def evaluated(script: ModuleType, folder: str) -> float:
    return json.loads(Path(folder, "summary.json").read_text())["eval_return_mean"]


LEARN = FAST | {"total_timesteps": 30 * 256, "learning_rate": 3e-3, "eval_episodes": 20}


@pytest.mark.parametrize(
    "coded",
    ["box", "float64", "matrix", "discrete", "multidiscrete", "tuple", "dict", "from1"],
)
def test_discrete_identity_is_learned(coded: str) -> None:
    """10 steps of at most 1, however the right action is written into the observation."""
    folder = ppo.train(tiny(ppo, env_id=f"envs:Identity-{coded}-v0", gamma=0.5, **LEARN))
    assert evaluated(ppo, folder) == 10


@pytest.mark.parametrize(
    "coded",
    [
        pytest.param("box", marks=pytest.mark.slow),
        pytest.param("float64", marks=pytest.mark.slow),
        "dict",
    ],
)
def test_continuous_identity_is_learned(coded: str) -> None:
    """A policy that ignores the target cannot do better than -20 / 3."""
    settings = LEARN | {"total_timesteps": 60 * 256, "norm_obs": True, "norm_reward": True}
    env_id = f"envs:IdentityBox-{coded}-v0"
    folder = ppo_continuous.train(tiny(ppo_continuous, env_id=env_id, gamma=0.5, **settings))
    assert evaluated(ppo_continuous, folder) > -0.5


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "Taxi-v4"])
def test_toy_text_trains(env_id: str) -> None:
    folder = ppo.train(tiny(ppo, env_id=env_id, total_timesteps=2048, eval_episodes=2))
    assert len(metrics(folder)) == 32
    rows = read_csv(f"{folder}/episodes.csv")
    assert rows
    if env_id == "FrozenLake-v1":
        assert {row["episodic_return"] for row in rows} <= {"0.0", "1.0"}


def test_an_environment_of_a_beginner_trains() -> None:
    """No render_mode in its constructor, no seeding in its reset."""
    ppo.train(tiny(ppo, env_id="envs:Plain-v0", eval_episodes=1))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("box", list(envs.Actions.boxes))
def test_actions_are_stretched_and_clipped_to_their_bounds(
    box: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the environment gets is legal; what is learned from is what was sampled."""
    space = envs.Actions.boxes[box]
    seen: list[np.ndarray] = []
    monkeypatch.setattr(envs.Actions, "seen", seen)
    sampled: list[Tensor] = []

    class WatchedAgent(ppo_continuous.Agent):
        def sample(self, dist: Tensor) -> Tensor:
            sampled.append(super().sample(dist))
            return sampled[-1]

        def get_action_and_value(
            self, obs: Tensor, action: Tensor | None = None
        ) -> tuple[Tensor, ...]:
            learned.append(action)
            return super().get_action_and_value(obs, action)

    learned: list[Tensor] = []
    monkeypatch.setattr(ppo_continuous, "Agent", WatchedAgent)
    ppo_continuous.train(tiny(ppo_continuous, env_id=f"envs:Actions-{box}-v0", update_epochs=1))
    policy_actions = torch.cat(sampled).numpy()
    assert len(seen) == len(policy_actions) == 512
    got = np.array(seen)
    assert all(action in space for action in seen)
    assert got.dtype == space.dtype
    assert got.shape[1:] == policy_actions.shape[1:] == space.shape
    # Every sample is learned from as it was drawn, in some order.
    rows = torch.cat(learned).flatten(1).numpy()
    assert sorted(map(tuple, rows)) == sorted(map(tuple, policy_actions.reshape(512, -1)))
    if np.isfinite(space.low).all() and np.isfinite(space.high).all():
        assert (np.abs(policy_actions) > 1).any()  # so something has been clipped
        low, high = space.low.astype(float), space.high.astype(float)
        stretched = low + (policy_actions + 1) / 2 * (high - low)
        assert (got == space.low).any() and (got == space.high).any()
    else:  # around 0, or around the legal action that is nearest to it
        stretched = policy_actions + np.clip(0.0, space.low, space.high)
    expected = np.clip(stretched, space.low, space.high)
    if box == "bool":
        expected = expected > 0.5
    np.testing.assert_allclose(got, expected, atol=1e-3 if box == "float16" else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_cartpole_is_solved_with_the_defaults(seed: int) -> None:
    """A mean of 475 over 100 training episodes within 150k steps, and a perfect evaluation."""
    folder = ppo.train(ppo.Args(seed=seed))
    summary = json.loads(Path(folder, "summary.json").read_text())
    solved = summary["solved_at_step"]
    assert solved is not None and solved <= 150_000
    assert max(column(folder, "charts/episodic_return")) >= 475
    assert summary["eval_return_mean"] == 500


@pytest.mark.slow
def test_inverted_pendulum_is_learned() -> None:
    """A random policy keeps it up for about 6 steps."""
    args = ppo_continuous.Args(env_id="InvertedPendulum-v5", total_timesteps=80_000)
    folder = ppo_continuous.train(args)
    assert evaluated(ppo_continuous, folder) > 500
    assert not list(Path().glob("MUJOCO_LOG*"))


# ---- the objectives and the other switches


@scripts
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_each_surrogate_uses_its_own_terms(
    script: ModuleType, surrogate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = spy(monkeypatch, script, "ppo_loss")
    folder = script.train(tiny(script, surrogate=surrogate))
    assert len(metrics(folder)) == 8
    for _, options, _ in calls:
        assert options["clip_coef"] == (0.2 if surrogate == "clip" else None)
        penalised = surrogate.startswith("kl")
        assert (options["kl"] is not None and options["kl_coef"] > 0) == penalised
    betas = set(column(folder, "losses/kl_coef"))
    assert betas == {1.0} if surrogate == "kl-fixed" else betas != {1.0}
    if surrogate in ("clip", "none"):
        assert betas == {0.0}
    else:
        kls = torch.stack([options["kl"].mean() for _, options, _ in calls])
        assert (kls >= -1e-6).all() and (kls > 1e-6).any()


@scripts
@pytest.mark.parametrize(("target", "factor"), [(1e-9, 2.0), (1e9, 0.5)])
def test_adaptive_beta_doubles_and_halves(script: ModuleType, target: float, factor: float) -> None:
    folder = script.train(tiny(script, surrogate="kl-adaptive", kl_target=target))
    betas = column(folder, "losses/kl_coef")
    assert [b / a for a, b in itertools.pairwise(betas)] == [factor] * 7
    assert betas[0] in (1.0, factor)


@scripts
@pytest.mark.parametrize(("target", "bound"), [(1e-9, 500.0), (1e9, 0.0005)])
def test_adaptive_beta_never_goes_too_far_to_come_back(
    script: ModuleType, target: float, bound: float
) -> None:
    """After 14 doublings it is 1,000 times where it started, and not 16,384 times."""
    sizes = {"total_timesteps": 15 * 64, "kl_target": target, "kl_coef": 0.5}
    betas = column(script.train(tiny(script, surrogate="kl-adaptive", **sizes)), "losses/kl_coef")
    assert len(betas) == 15
    assert betas[-1] == pytest.approx(bound) and betas[-2] == pytest.approx(bound)


@scripts
def test_adaptive_beta_takes_the_memory_of_a_minibatch(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 rows a batch, 32 a minibatch."""
    calls = spy(monkeypatch, script.Agent, "get_dist")
    script.train(tiny(script, surrogate="kl-adaptive", num_minibatches=2, eval_episodes=0))
    assert max(len(positional[1]) for positional, *_ in calls) == 32


@scripts
def test_adaptive_beta_follows_the_kl_of_the_whole_batch(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """d < d_targ / 1.5 halves, d > 1.5 d_targ doubles, where d is over all B rows; bounded."""
    measured: list[float] = []

    class WatchedAgent(script.Agent):
        @staticmethod
        def kl(old: Tensor, new: Tensor) -> Tensor:
            result = script.Agent.__mro__[1].kl(old, new)
            if len(result) == 64:  # the batch; the minibatches have 32 rows
                measured.append(result.mean().item())
            return result

    monkeypatch.setattr(script, "Agent", WatchedAgent)
    target = 0.01
    args = tiny(
        script,
        surrogate="kl-adaptive",
        kl_target=target,
        total_timesteps=40 * 64,
        learning_rate=3e-3,
        anneal_lr=False,
    )
    betas = column(script.train(args), "losses/kl_coef")
    assert betas[0] == 1.0
    assert len(measured) == len(betas) == 40
    factors = [0.5 if d < target / 1.5 else 2.0 if d > 1.5 * target else 1.0 for d in measured]
    assert len(set(factors)) > 1
    expected = np.clip(np.array(betas) * factors, 1 / 1000, 1000)  # the bounds, from 1 at the start
    assert betas[1:] == expected[:-1].tolist()


@scripts
@pytest.mark.parametrize("recompute", [False, True])
def test_target_kl_stops_the_epochs(
    script: ModuleType, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each epoch, the mean approx_kl of that epoch's minibatches decides."""
    calls = spy(monkeypatch, script, "ppo_loss")
    iterations = 8
    target = 0.004
    settings = {"update_epochs": 6, "learning_rate": 3e-3, "recompute_advantages": recompute}
    script.train(tiny(script, target_kl=target, anneal_lr=False, **settings))
    kls = [stats["approx_kl"].item() for _, _, (_, stats) in calls]
    lengths = []
    while kls:
        for epoch in range(6):
            if np.mean(kls[2 * epoch : 2 * epoch + 2]) > target:
                break
        lengths.append(epoch + 1)
        kls = kls[2 * (epoch + 1) :]
    assert len(lengths) == iterations
    assert len(set(lengths)) > 1


@scripts
def test_recompute_advantages_asks_the_current_critic(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = spy(monkeypatch, script, "compute_gae")
    script.train(tiny(script, recompute_advantages=True, update_epochs=3))
    assert len(calls) == 3 * 8
    for first, *later in zip(*(iter(calls),) * 3, strict=True):
        for again in later:
            assert torch.equal(first[0][0], again[0][0])  # the rewards
            assert not torch.equal(first[0][1], again[0][1])  # the values
            assert not torch.equal(first[0][2], again[0][2])
    calls.clear()
    script.train(tiny(script, recompute_advantages=False, update_epochs=3, run_dir="once"))
    assert len(calls) == 8


@scripts
def test_first_ratio_is_one(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first minibatch of each iteration sees the policy that acted, normalised or not."""
    calls = spy(monkeypatch, script, "ppo_loss")
    script.train(tiny(script, norm_obs=True, total_timesteps=2048, learning_rate=3e-3))
    assert len(calls) == 32 * 4
    for (new, old, *_), _, _ in calls[::4]:
        assert (new - old).exp().sub(1).abs().max() < 1e-5
    assert max((new - old).abs().max() for (new, old, *_), _, _ in calls) > 1e-3


@scripts
def test_learning_rate_is_annealed(script: ModuleType) -> None:
    rates = {
        anneal: column(
            script.train(tiny(script, anneal_lr=anneal, learning_rate=1e-3, run_dir=f"{anneal}")),
            "charts/learning_rate",
        )
        for anneal in (False, True)
    }
    assert rates[False] == [1e-3] * 8
    assert rates[True][0] == 1e-3
    differences = -np.diff(rates[True])
    assert (differences > 0).all()
    np.testing.assert_allclose(differences, differences[0])


@scripts
@pytest.mark.parametrize(
    "change",
    [
        {"norm_adv": False},
        {"clip_vloss": True},
        {"clip_vloss": True, "surrogate": "none", "clip_coef": 0.1},
        {"ent_coef": 0.01},
        {"vf_coef": 0.0},
        {"max_grad_norm": 1e-6},
        {"num_minibatches": 1},
        {"gamma": 1.0, "gae_lambda": 1.0},
        {"gamma": 0.0, "gae_lambda": 0.0},
        {"learning_rate": 0.01},
        {"update_epochs": 1},
        {"num_envs": 1, "num_steps": 64},
        {"num_envs": 16, "num_steps": 4},
    ],
    ids=str,
)
def test_each_setting_changes_the_run(script: ModuleType, change: dict[str, object]) -> None:
    # Large enough steps that values leave the clip range.
    common = {"recompute_advantages": False, "learning_rate": 3e-3, "update_epochs": 4}
    base = metrics(script.train(tiny(script, **common)))
    changed = metrics(script.train(tiny(script, **(common | change))))
    assert len(base) == len(changed) == 8
    assert base != changed
    assert all(np.isfinite(float(row["losses/value_loss"])) for row in changed)


@pytest.mark.slow
@scripts
@pytest.mark.filterwarnings("default")
def test_compile_gives_the_same_run(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the same random numbers, which compiled code would draw in its own way."""
    inductor = importlib.import_module("torch._inductor.config")
    monkeypatch.setattr(inductor, "fallback_random", True)
    runs = [script.train(tiny(script, compile=c, run_dir=f"{c}")) for c in (False, True)]
    for name in ("losses/value_loss", "losses/policy_loss", "losses/entropy"):
        eager, compiled = column(runs[0], name), column(runs[1], name)
        np.testing.assert_allclose(eager[:2], compiled[:2], atol=1e-4)
    states = [script.load_checkpoint(run)["agent"] for run in runs]
    assert list(states[0]) == list(states[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_compile_is_right_about_every_clip_range_of_a_process() -> None:
    """Code that torch 2.13 compiles for changing floats keeps the second value for the third."""
    for clip_coef in (0.2, 0.1, 0.02):
        both = []
        for compiled in (False, True):
            settings = {"clip_coef": clip_coef, "clip_vloss": True, "learning_rate": 3e-3}
            folder = f"{clip_coef}-{compiled}"
            args = tiny(ppo, **settings, compile=compiled, num_steps=64, run_dir=folder)
            run = ppo.train(args)
            both.append([column(run, f"losses/{name}")[0] for name in ("policy_loss", "clipfrac")])
        np.testing.assert_allclose(*both, rtol=1e-3, atol=1e-5)


# ---- the files of a run


COLUMNS = {
    "global_step",
    "charts/SPS",
    "charts/learning_rate",
    "charts/episodic_return",
    "charts/episodic_length",
    "losses/value_loss",
    "losses/policy_loss",
    "losses/entropy",
    "losses/approx_kl",
    "losses/old_approx_kl",
    "losses/clipfrac",
    "losses/explained_variance",
    "losses/grad_norm",
    "losses/kl_coef",
    "wall_time",
}
SUMMARY = {
    "global_step",
    "wall_time",
    "SPS",
    "train_return_last100",
    "eval_return_mean",
    "eval_return_std",
    "eval_episodes",
    "solved_at_step",
}


@scripts
def test_files_of_a_run(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    args = tiny(script, total_timesteps=600, eval_episodes=2, num_steps=32, seed=7, run_dir=None)
    folder = Path(script.train(args))
    name = folder.name.split("__")
    assert folder.parent == Path("runs")
    assert name[:3] == [ENV_IDS[script.__name__], script.__name__, "7"]
    assert int(name[3]) > 1_600_000_000
    expected = {"config.json", "script.py", "metrics.csv", "episodes.csv"}
    expected |= {"checkpoint.pt", "summary.json"}
    assert {path.name for path in folder.iterdir()} == expected

    rows = read_csv(folder / "metrics.csv")
    assert set(rows[0]) == COLUMNS
    # 600 steps are rounded down to 4 batches of 128, which the plan says.
    assert [row["global_step"] for row in rows] == ["128", "256", "384", "512"]
    out = capsys.readouterr().out
    assert "512" in out and "600" in out
    times = [float(row["wall_time"]) for row in rows]
    assert times == sorted(times)
    for row in rows:
        sps, expected_sps = float(row["charts/SPS"]), int(row["global_step"])
        assert sps == pytest.approx(expected_sps / float(row["wall_time"]), rel=0.1)
    assert "\n\n" not in (folder / "metrics.csv").read_text()

    episodes = read_csv(folder / "episodes.csv")
    assert set(episodes[0] if episodes else COLUMNS) <= COLUMNS | {
        "episodic_return",
        "episodic_length",
    }
    if script is ppo:  # CartPole pays 1 a step
        assert episodes
        for row in episodes:
            assert float(row["episodic_return"]) == int(row["episodic_length"])
        mean = np.mean([float(row["episodic_return"]) for row in episodes][-100:])
        assert float(rows[-1]["charts/episodic_return"]) == pytest.approx(mean)

    config = json.loads((folder / "config.json").read_text())
    assert {k: config[k] for k in vars(args) if k != "run_dir"} == {
        k: v for k, v in vars(args).items() if k != "run_dir"
    }
    text = json.dumps(config)
    assert torch.__version__ in text and gym.__version__ in text and np.__version__ in text
    assert (folder / "script.py").read_bytes() == Path(script.__file__).read_bytes()

    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) == SUMMARY
    assert summary["global_step"] == 512
    assert summary["eval_episodes"] == 2
    assert summary["solved_at_step"] is None
    assert str(folder) in out

    checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    assert isinstance(checkpoint, dict)
    agent = script.Agent(script.make_envs(args, 1))
    agent.load_state_dict(checkpoint["agent"])


@scripts
def test_device_is_recorded(script: ModuleType) -> None:
    folder = script.train(tiny(script))
    config = json.loads(Path(folder, "config.json").read_text())
    assert "device" in config or config["cuda"] is False


@pytest.mark.parametrize("threshold", [4.5, 0.0])
def test_solved_at_step_is_the_first_mean_of_100_above_the_threshold(threshold: float) -> None:
    """FrozenLake's threshold of 0.7 is met at once by an environment that always pays 1."""
    env_id = f"Easy-{threshold:.0f}-v0"
    gym.register(env_id, "envs:Constant", reward_threshold=threshold, max_episode_steps=5)
    folder = ppo.train(tiny(ppo, env_id=env_id, total_timesteps=1024))
    episodes = read_csv(f"{folder}/episodes.csv")
    hundredth = int(episodes[99]["global_step"])
    solved = json.loads(Path(folder, "summary.json").read_text())["solved_at_step"]
    assert hundredth <= solved < hundredth + 64


def test_a_run_folder_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ppo.train(tiny(ppo, run_dir="a/b c/d")) == "a/b c/d"
    Path("empty").mkdir()
    assert ppo.train(tiny(ppo, run_dir="empty")) == "empty"
    assert len(metrics("empty")) == 8


def test_names_with_slashes_and_colons_make_one_folder() -> None:
    folder = ppo.train(tiny(ppo, env_id="envs:Identity-box-v0", exp_name="a/b:c", run_dir=None))
    assert Path(folder).parent == Path("runs")
    assert ":" not in folder


@scripts
def test_explained_variance_is_the_critic_before_it_learns(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where later epochs recompute the values of rows that the critic has learned by then."""
    calls = spy(monkeypatch, script, "compute_gae")
    folder = script.train(tiny(script, recompute_advantages=True, update_epochs=3))
    assert len(calls) == 8 * 3
    for (args, _, (_, returns)), logged in zip(
        calls[::3], column(folder, "losses/explained_variance"), strict=True
    ):
        values, returns = args[1].numpy(), returns.numpy()
        share = np.var(returns - values) / np.var(returns)  # what is left unexplained
        assert logged == pytest.approx(1 - share, abs=1e-4)


@scripts
def test_log_probabilities_of_the_rollout_are_constants(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they depend on parameters beyond what `dist` says, as a reader's agent may."""

    class Scaled(script.Agent):
        def __init__(self, envs: gym.vector.VectorEnv) -> None:
            super().__init__(envs)
            self.scale = torch.nn.Parameter(torch.ones(()))

        def log_prob(self, dist: Tensor, action: Tensor) -> Tensor:
            return self.scale * super().log_prob(dist, action)

    monkeypatch.setattr(script, "Agent", Scaled)
    losses = spy(monkeypatch, script, "minibatch_loss")
    script.train(tiny(script, total_timesteps=64))
    assert len(losses) == 4
    assert all(not args[2]["logprobs"].requires_grad for args, _, _ in losses)
    assert losses[0][2][1]["approx_kl"].abs() < 1e-6
