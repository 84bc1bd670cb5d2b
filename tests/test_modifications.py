"""The patches of tests/modifications apply to the scripts, and what they make of them learns."""

import importlib.util
import json
import re
from contextlib import closing
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import TINY, column, copy_scripts, metrics, read_csv, spy

import ppo

MODIFICATIONS = Path(__file__).parent / "modifications"


class Corridor(gym.Env):
    """Fifty places in a row, back and forward; only at the end of them is a reward."""

    observation_space = gym.spaces.Discrete(50)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[int, dict]:
        super().reset(seed=seed)
        self.position = 0
        return self.position, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        self.position = max(self.position + (1 if action == 1 else -1), 0)
        arrived = self.position == 49
        return self.position, float(arrived), arrived, False, {}


gym.register("Corridor-v0", Corridor, max_episode_steps=100)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(MODIFICATIONS))


def patched(*names: str) -> ModuleType:
    """The script that these patches change, copied here and changed, as a module."""
    script = re.search(r"^--- a/(\w+)\.py", (MODIFICATIONS / f"{names[0]}.patch").read_text())[1]
    copy_scripts(".", *(MODIFICATIONS / f"{name}.patch" for name in names))
    spec = importlib.util.spec_from_file_location("_".join(names), f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained(module: ModuleType, **settings: object) -> Path:
    return Path(module.train(module.Args(**{"run_dir": "run", "cuda": False} | settings)))


def score(module: ModuleType, **settings: object) -> float:
    """Mean return of the evaluation after training."""
    summary = json.loads((trained(module, **settings) / "summary.json").read_text())
    return summary["eval_return_mean"]


@pytest.mark.parametrize("path", sorted(MODIFICATIONS.glob("*.patch")), ids=lambda path: path.stem)
def test_each_applies_and_runs(path: Path) -> None:
    module = patched(path.stem)
    default = "Pendulum-v1" if module.Args().exp_name == "ppo_continuous" else "CartPole-v1"
    own = {"action_mask": "masked:Masked-v0", "intrinsic_reward": "Corridor-v0"}
    own |= {"multidiscrete": "envs:Locks-v0", "pixels": "pixels:Catch-v0"}
    settings = TINY | {"env_id": own.get(path.stem, default), "eval_episodes": 2}
    folder = trained(module, **settings | {"total_timesteps": 128})
    args = module.Args(**settings | {"resume": str(folder)})
    module.train(args)
    assert (folder / "metrics.csv").read_text().splitlines()[-1].startswith("512,")
    summary = json.loads((folder / "summary.json").read_text())
    assert module.evaluate(args, folder).items() <= summary.items()


@pytest.mark.parametrize("name", ["recurrent", "auxiliary", "multidiscrete", "tanh_squashed"])
def test_the_first_update_sees_the_policy_that_acted(name: str) -> None:
    """Its memory, its features and its actions: each ratio is 1, the exact KL is 0."""
    module = patched(name)
    own = {"multidiscrete": "envs:Locks-v0", "tanh_squashed": "Pendulum-v1"}
    sizes = TINY | {"update_epochs": 1, "num_minibatches": 1, "surrogate": "kl-fixed"}
    folder = trained(module, **sizes | {"env_id": own.get(name, "CartPole-v1")})
    for name in ("losses/approx_kl", "losses/old_approx_kl", "losses/kl"):
        np.testing.assert_allclose(column(folder, name), np.zeros(8), atol=1e-6)


def test_a_multiplier_follows_the_kl_by_gradient_ascent(monkeypatch: pytest.MonkeyPatch) -> None:
    """beta + kl_lr * (KL - d), never below 0."""
    module = patched("lagrangian")
    settings = TINY | {"env_id": "Pendulum-v1", "surrogate": "kl-adaptive", "kl_lr": 100.0}
    calls = spy(monkeypatch, module, "kl_divergence")
    folder = trained(module, **settings, kl_target=0.001, kl_coef=0.02, learning_rate=1e-3)
    betas = np.array(column(folder, "losses/kl_coef"))
    kls = [kl.mean().item() for (old, _), _, kl in calls if len(old) == 64]  # of whole batches
    assert betas[0] == pytest.approx(0.02) and len(set(betas)) > 4
    expected = np.maximum(betas + 100 * (np.array(kls) - 0.001), 0)
    np.testing.assert_allclose(betas[1:], expected[:-1], rtol=1e-5, atol=1e-7)


def test_squashed_actions_never_reach_beyond_the_bounds() -> None:
    module = patched("tanh_squashed")
    with closing(module.make_envs(module.Args(env_id="Pendulum-v1"), 3)) as envs:
        (scale,) = (x for x in wrappers(envs) if isinstance(x, module.ScaleAction))
        actions = scale.actions(np.array([[-1e3], [0], [0.5]]))
    np.testing.assert_allclose(actions, [[-2], [0], [2 * np.tanh(0.5)]], rtol=1e-6)


def wrappers(envs: gym.vector.VectorEnv) -> list[gym.vector.VectorEnv]:
    return [envs, *(wrappers(envs.env) if hasattr(envs, "env") else [])]


def test_the_best_agent_is_kept_and_survives_a_resume() -> None:
    module = patched("best_agent")
    settings = TINY | {"env_id": "CartPole-v1", "eval_episodes": 3, "eval_every": 2}
    folder = trained(module, **settings | {"total_timesteps": 256})
    module.train(module.Args(**settings | {"resume": str(folder)}))
    rows = read_csv(folder / "evaluations.csv")
    assert [row["global_step"] for row in rows] == ["128", "256", "384", "512"]
    best = max(float(row["mean"]) for row in rows)
    args = module.Args(**settings)
    assert module.evaluate(args, folder / "best")["eval_return_mean"] == best
    assert module.restore(folder / "best", {})["state"]["best"] == best
    # Its evaluations change nothing in the training
    plain = TINY | {"env_id": "CartPole-v1", "run_dir": "plain", "total_timesteps": 256}
    assert metrics(ppo.train(ppo.Args(**plain))) == metrics(folder)[:4]


def test_four_of_one_script_apply_together() -> None:
    module = patched("action_mask", "clip_schedule", "critic_learning_rate", "intrinsic_reward")
    assert callable(module.train)


def test_the_clip_range_falls_with_the_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    module = patched("clip_schedule")
    calls = spy(monkeypatch, module, "ppo_loss")
    trained(module, env_id="CartPole-v1", **TINY | {"total_timesteps": 256})  # 4 iterations of 4
    ranges = torch.stack([args.clip_coef for (_, args, *_), _, _ in calls[::4]])
    torch.testing.assert_close(ranges, 0.2 * torch.tensor([1, 0.75, 0.5, 0.25]))


def test_two_learning_rates_leave_no_parameter_out() -> None:
    module = patched("critic_learning_rate")
    settings = TINY | {"env_id": "CartPole-v1", "critic_learning_rate": 0.1}
    folder = trained(module, **settings)
    groups = torch.load(folder / "checkpoint.pt")["optimizer"]["param_groups"]
    with closing(module.make_envs(module.Args(), 1)) as envs:
        agent = module.Agent(envs, module.Args())
    sizes = [len(list(network.parameters())) for network in (agent.actor, agent.critic)]
    assert [len(group["params"]) for group in groups] == sizes
    assert [group["lr"] for group in groups] == pytest.approx([1e-3 / 8, 0.1 / 8])  # the last


def test_illegal_actions_have_no_probability() -> None:
    module = patched("action_mask")
    with closing(module.make_envs(module.Args(env_id="masked:Masked-v0"), 1)) as envs:
        agent = module.Agent(envs, module.Args())
    mask = torch.tensor([[1, 0, 1, 0, 0, 1], [0, 1, 0, 0, 0, 0]])
    obs = torch.cat([mask, torch.rand(2, 2)], dim=1)
    dist = agent.get_dist(agent.features({"obs": obs}))
    expected = mask / mask.sum(dim=1, keepdim=True)
    torch.testing.assert_close(dist.exp(), expected, atol=0.02, rtol=0)
    assert torch.equal(dist.exp() > 0, mask > 0)


def test_the_bonus_pays_for_rare_places_where_the_corridor_pays_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = patched("intrinsic_reward")
    calls = spy(monkeypatch, module, "compute_gae")
    folder = trained(module, env_id="Corridor-v0", norm_reward=False, **TINY)
    rewards = [rewards for (rewards, *_), _, _ in calls]
    visits = torch.load(folder / "checkpoint.pt")["agent"]["visits"]
    assert visits.sum() == 512 and visits[0] > visits[10]
    # Each of a place's n arrivals in the first batch pays bonus / sqrt(n): squared, 1 for a place
    places = (rewards[0] / 0.1).square().sum().item()
    assert places == pytest.approx(round(places), abs=1e-4) and places > 2
    assert all((x > 0).all() for x in rewards) and rewards[-1].mean() < rewards[0].mean()
    returns = [row.split(",")[1] for row in (folder / "episodes.csv").read_text().splitlines()[1:]]
    assert returns and not any(map(float, returns))


def test_the_noise_depends_on_the_state_and_has_a_floor_that_is_no_dead_end() -> None:
    module = patched("state_dependent_std")
    with closing(module.make_envs(module.Args(env_id="Pendulum-v1"), 1)) as envs:
        agent = module.Agent(envs, module.Args(init_log_std=-0.5, min_log_std=-1.5))
    features = torch.randn(20, 3)
    log_std = agent.get_dist(features)[:, 1]
    torch.testing.assert_close(log_std, torch.full((20,), -0.5), atol=0.05, rtol=0)
    assert log_std.std() > 0
    bias = agent.actor[-1].bias
    with torch.no_grad():
        bias[1] = -5
    log_std = agent.get_dist(features)[:, 1]
    assert (log_std > -1.5).all() and (log_std < -1.4).all()
    log_std.mean().backward()
    assert bias.grad[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip_schedule", "critic_learning_rate"])
def test_schedules_still_learn_cartpole(name: str) -> None:
    assert score(patched(name), total_timesteps=100_000) > 400


@pytest.mark.slow
def test_a_memory_remembers_what_is_no_longer_seen() -> None:
    """Whoever has none guesses, 0.5 on average."""
    assert score(patched("recurrent"), env_id="envs:Cue-v0", total_timesteps=40_000) == 1


@pytest.mark.slow
def test_several_choices_are_learned_at_once() -> None:
    """Of 20; guessing is right in 6.9."""
    assert score(patched("multidiscrete"), env_id="envs:Locks-v0", total_timesteps=60_000) > 19


@pytest.mark.slow
@pytest.mark.parametrize("name", ["auxiliary", "shared_trunk", "best_agent"])
def test_other_networks_still_learn_cartpole(name: str) -> None:
    assert score(patched(name), total_timesteps=100_000) > 400


@pytest.mark.slow
def test_masked_actions_are_never_taken() -> None:
    """Masked raises at an illegal action; the unchanged script runs into that."""
    settings = {"env_id": "masked:Masked-v0", "total_timesteps": 30_000}
    assert score(patched("action_mask"), **settings) > 9
    with pytest.raises(ValueError, match="illegal"):
        ppo.train(ppo.Args(run_dir="unchanged", cuda=False, **settings))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_the_bonus_finds_the_end_of_the_corridor(seed: int) -> None:
    """Without the bonus it depends on luck: a policy that no reward moves drifts."""
    module = patched("intrinsic_reward")
    assert score(module, env_id="Corridor-v0", total_timesteps=50_000, seed=seed) == 1


@pytest.mark.slow
def test_state_dependent_deviations_learn_the_pendulum() -> None:
    """A random policy keeps InvertedPendulum up for about 6 steps."""
    module = patched("state_dependent_std")
    assert score(module, env_id="InvertedPendulum-v5", total_timesteps=40_000) > 100


@pytest.mark.slow
def test_catch_is_learned_from_pixels() -> None:
    settings = {"num_envs": 16, "num_steps": 16, "num_minibatches": 4, "update_epochs": 2}
    settings |= {"total_timesteps": 12_288, "learning_rate": 1e-3, "clip_coef": 0.2, "gamma": 0.9}
    settings |= {"torch_threads": 1, "eval_episodes": 100}
    assert score(patched("pixels"), env_id="pixels:Catch-v0", **settings) > 0.5
    assert column("run", "charts/episodic_return")[0] < 0
