"""ppo_atari.py with the real emulator: lives, whole games, frame limits, frames, seeds, runs."""

import itertools
import json
import os
import platform
import resource
import statistics
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import ModuleType, SimpleNamespace

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from ale_py import ALEInterface, roms
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from helpers import column, metrics, read_csv, start, wait_for
from pixels import Catch, Clocks, Endless, Pixels
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence

import ppo
import ppo_atari
import ppo_continuous

GAMES = sorted(env_id for env_id in gym.registry if env_id.startswith("ALE/"))
GAMES = [env_id for env_id in GAMES if "-ram-" not in env_id]
Limit = Callable[..., list[dict[str, object]]]

# Two iterations of 32 steps.
TINY = {"total_timesteps": 64, "num_envs": 2, "num_steps": 16, "num_minibatches": 2}
TINY |= {"update_epochs": 1, "cuda": False, "torch_threads": 1, "eval_episodes": 0}
numbers = itertools.count()


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def tiny(**changes: object) -> ppo_atari.Args:
    defaults = {"env_id": "PongNoFrameskip-v4", "run_dir": f"runs/{next(numbers)}"}
    return ppo_atari.Args(**(defaults | TINY | changes))


def make(env_id: str = "ALE/Breakout-v5", num_envs: int = 2, **changes: object) -> gym.vector:
    return ppo_atari.make_envs(ppo_atari.Args(env_id=env_id, **changes), num_envs)


def plain(game: str, num_envs: int, **changes: object) -> AtariVectorEnv:
    """The emulator without anything of the script: raw rewards, endings of whole games only."""
    mode = AutoresetMode.SAME_STEP
    return AtariVectorEnv(
        game, num_envs, autoreset_mode=mode, reward_clipping=False, num_threads=1, **changes
    )


def random_actions(envs: gym.vector.VectorEnv, steps: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(envs.single_action_space.n, size=(steps, envs.num_envs))


def frames(envs: gym.vector.VectorEnv, actions: np.ndarray, seed: int) -> np.ndarray:
    """All observations, (steps + 1, N, 4, 84, 84), of a fresh environment that is closed after."""
    with closing(envs):
        return np.stack([envs.reset(seed=seed)[0], *(envs.step(row)[0] for row in actions)])


def replace_envs(monkeypatch: pytest.MonkeyPatch, build: Callable[[int], Pixels]) -> None:
    monkeypatch.setattr(ppo_atari, "make_envs", lambda args, n, videos=None: build(n))


# ---- lives, whole games, rewards


def test_a_lost_life_ends_the_bootstrap_and_not_the_game() -> None:
    envs = make(num_envs=2)
    _, infos = envs.reset(seed=1)
    lives, numbers = infos["lives"], infos["episode_frame_number"]
    lost = games = 0
    with closing(envs):
        for actions in random_actions(envs, 400):
            obs, _, terminations, truncations, infos = envs.step(actions)
            assert not truncations.any()
            for i in range(2):
                over = bool(infos["_episode"][i]) if "_episode" in infos else False
                if infos["lives"][i] < lives[i]:
                    assert terminations[i] and not over
                    lost += 1
                else:
                    assert terminations[i] == over
                if over:
                    games += 1
                    # The new game: all lives, an empty stack but for its first frame.
                    assert infos["lives"][i] == 5 and infos["episode_frame_number"][i] <= 30
                    assert not obs[i, :3].any() and obs[i, 3].any()
                else:
                    assert infos["episode_frame_number"][i] == numbers[i] + 4
            lives, numbers = infos["lives"].copy(), infos["episode_frame_number"].copy()
    # Four lives are lost in each game; the fifth ends it.
    assert games >= 2 and lost >= 4 * games


@pytest.mark.parametrize(
    ("env_id", "frame_limit"), [("ALE/Breakout-v5", 108_000), ("ALE/SpaceInvaders-v5", 1200)]
)
def test_episodes_are_whole_games_with_their_true_score(
    env_id: str, frame_limit: int, limit: Limit
) -> None:
    """Against our own sums over the plain emulator; what is learned from is clipped to [-1, 1]."""
    limit(max_num_frames_per_episode=frame_limit, num_threads=1)
    game = gym.spec(env_id).kwargs["game"]
    envs = make(env_id, 2)
    raw = plain(game, 2, max_num_frames_per_episode=frame_limit)
    envs.reset(seed=3)
    raw.reset(seed=3)
    expected, recorded, largest = [], [], 0
    score, length = np.zeros(2), np.zeros(2, dtype=int)
    with closing(envs), closing(raw):
        for t, actions in enumerate(random_actions(envs, 500)):
            raw_obs, raw_rewards, over, cut, _ = raw.step(actions)
            obs, rewards, _, truncations, infos = envs.step(actions)
            np.testing.assert_array_equal(obs, raw_obs)
            np.testing.assert_array_equal(rewards, np.clip(raw_rewards, -1, 1))
            np.testing.assert_array_equal(truncations, cut)
            score, length = score + raw_rewards, length + 1
            largest = max(largest, raw_rewards.max())
            for i in np.flatnonzero(over | cut):
                expected.append((t, i, score[i], length[i]))
                score[i] = length[i] = 0
            for i in np.flatnonzero(infos.get("_episode", ())):
                recorded.append((t, i, infos["episode"]["r"][i], infos["episode"]["l"][i]))
            np.testing.assert_array_equal(envs.episode_returns, score)
    assert recorded == expected
    assert len(expected) >= 2 and max(row[2] for row in expected) > 0
    if frame_limit < 108_000:
        assert largest > 1 and {row[3] for row in expected} >= {frame_limit // 4}


def test_games_shorter_than_the_no_ops_of_the_next_are_told_apart(limit: Limit) -> None:
    """The frame number of a new game, up to 30, may be above the last one of the game before."""
    limit(max_num_frames_per_episode=8, num_threads=1)
    envs = make(num_envs=4)
    envs.reset(seed=1)
    with closing(envs):
        for step in range(1, 21):
            infos = envs.step(np.zeros(4, dtype=int))[-1]
            assert np.all(infos.get("_episode", False)) == (step % 2 == 0), f"step {step}"


# ---- restarts


@pytest.mark.parametrize("env_id", ["ALE/Breakout-v5", "ALE/SpaceInvaders-v5"])
def test_a_restarted_game_leaves_the_others_alone(env_id: str, limit: Limit) -> None:
    """Their frames, scores and lengths go on; the broken off game is no episode."""
    limit(max_num_frames_per_episode=320, num_threads=1)
    game = gym.spec(env_id).kwargs["game"]
    envs, raw = make(env_id, 3), plain(game, 3, max_num_frames_per_episode=320)
    obs, infos = envs.reset(seed=3)
    raw.reset(seed=3)
    lives = infos["lives"][0]
    expected, recorded, restarts = [], [], 0
    score, length = np.zeros(3), np.zeros(3, dtype=int)
    with closing(envs), closing(raw):
        for t, actions in enumerate(random_actions(envs, 300)):
            if t and t % 40 == 0:  # in the middle of a game, or where the limit has just ended it
                restarted = np.arange(3) == t // 40 % 3
                again, infos = envs.reset(options={"reset_mask": restarted.copy()})
                raw.reset(options={"reset_mask": restarted.copy()})
                np.testing.assert_array_equal(again[~restarted], obs[~restarted])
                assert not again[restarted, :3].any() and again[restarted, 3].any()
                assert infos["lives"][restarted] == lives
                restarts += bool(length[restarted] > 0)
                score[restarted] = length[restarted] = 0
                np.testing.assert_array_equal(envs.episode_returns, score)
                np.testing.assert_array_equal(envs.episode_lengths, length)
            raw_obs, raw_rewards, over, cut, _ = raw.step(actions)
            obs, _, _, truncations, infos = envs.step(actions)
            np.testing.assert_array_equal(obs, raw_obs)
            np.testing.assert_array_equal(truncations, cut)
            score, length = score + raw_rewards, length + 1
            for i in np.flatnonzero(over | cut):
                expected.append((t, i, score[i], length[i]))
                score[i] = length[i] = 0
            for i in np.flatnonzero(infos.get("_episode", ())):
                recorded.append((t, i, infos["episode"]["r"][i], infos["episode"]["l"][i]))
            np.testing.assert_array_equal(envs.episode_returns, score)
            np.testing.assert_array_equal(envs.episode_lengths, length)
    assert recorded == expected
    assert restarts >= 5 and len(expected) >= 5 and max(row[2] for row in expected) > 0


def test_stagger_restarts_games_one_by_one(limit: Limit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Games of 10 steps; the second is restarted after 16 steps, the third after 32."""
    limit(num_threads=1, max_num_frames_per_episode=40)
    real, calls = ppo_atari.estimate_values, []

    def watched(agent: nn.Module, obs: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(obs)
        return real(agent, obs, *tensors)

    monkeypatch.setattr(ppo_atari, "estimate_values", watched)
    folder = ppo_atari.train(tiny(stagger=True, num_envs=3, total_timesteps=192))
    rows = read_csv(Path(folder, "episodes.csv"))
    assert {row["episodic_length"] for row in rows} == {"10"}
    ends = [10, 20, 30, 40, 50, 60] + [10, 26, 36, 46, 56] + [10, 20, 30, 42, 52, 62]
    assert [int(row["global_step"]) for row in rows] == [3 * t for t in sorted(ends)]
    # A game's first observation has an empty stack below its only frame.
    begins = (torch.cat(calls)[:, :, :3] == 0).flatten(2).all(dim=2)
    starts = [[*range(0, 64, 10)], [0, 10, *range(16, 64, 10)], [0, 10, 20, 30, *range(32, 64, 10)]]
    assert [begins[:, i].nonzero().flatten().tolist() for i in range(3)] == starts


# ---- frame limit


def test_the_final_observation_of_a_game_cut_short(limit: Limit) -> None:
    """It continues the game that is cut; the next observation starts another game.

    Where the limit is reached, ale-py leaves before it reads the fourth frame: the newest of the
    four pictures is the maximum of the frames 4 of the step before, 3 of this step.
    """
    longer = make(num_envs=2)
    limit(max_num_frames_per_episode=240, num_threads=1)
    envs = make(num_envs=2)
    _, infos = envs.reset(seed=3)
    longer.reset(seed=3)
    noops = infos["episode_frame_number"]
    games = [Game("breakout", 3 + i, int(noops[i])) for i in range(2)]
    with closing(envs), closing(longer):
        for step, actions in enumerate(random_actions(envs, 60), 1):
            obs, _, terminations, truncations, infos = envs.step(actions)
            going_on = longer.step(actions)[0]
            for game, action in zip(games, actions, strict=True):
                game.step(action, cut=step == 60)
            assert truncations.tolist() == [step == 60] * 2
            if step < 60:
                np.testing.assert_array_equal(obs, going_on)
        assert not terminations.any() and infos["_episode"].all()
        assert infos["episode"]["l"].tolist() == [60, 60]
        final_obs = infos["final_obs"]
        assert final_obs.dtype == np.uint8
        np.testing.assert_array_equal(final_obs[:, :3], going_on[:, :3])
        np.testing.assert_array_equal(final_obs, [game.stack for game in games])
        assert not obs[:, :3].any()


def test_only_final_observations_of_lanes_cut_short_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other rows of final_obs are garbage, and a lane that has terminated needs none."""
    replace_envs(monkeypatch, Clocks)
    real, calls = ppo_atari.estimate_values, []

    def watched(agent: nn.Module, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        calls.append([x.clone() for x in tensors])
        return real(agent, *tensors)

    monkeypatch.setattr(ppo_atari, "estimate_values", watched)
    ppo_atari.train(tiny(num_envs=3, num_steps=14, total_timesteps=84))
    assert len(calls) == 2
    for obs, next_obs, truncations, final_obs in calls:
        assert obs.dtype == next_obs.dtype == final_obs.dtype == torch.uint8
        shown = obs[..., 0, 0, 0].int()
        assert len(final_obs) == int(truncations.sum()) > 3
        # A lane's last observation is one step later than the row's own.
        assert final_obs[:, 0, 0, 0].tolist() == (shown[truncations.bool()] + 1).tolist()
        lanes = truncations.nonzero()[:, 1]
        assert final_obs[:, 0, 0, 0].tolist() == (50 * lanes + 3 + lanes).tolist()
        # Lane 0 comes to its end every third step, and dies in every second one of those.
        last = shown[:, 0] == 2
        assert 0 < int(truncations[:, 0].sum()) < int(last.sum())


# ---- frames


class Game:
    """A slow reference: one game by single calls of the emulator, frames treated one at a time."""

    def __init__(self, game: str, seed: int, frame_number: int) -> None:
        """frame_number: of the first observation, FIRE and the no-ops together."""
        self.ale = ALEInterface()
        ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self.ale.setFloat("repeat_action_probability", 0.0)
        self.ale.setInt("random_seed", seed)
        self.ale.loadROM(roms.get_rom_path(game))
        self.ale.reset_game()
        self.actions = self.ale.getMinimalActionSet()
        fires = ale_py.Action.FIRE in self.actions
        for action in [ale_py.Action.FIRE] * fires + [ale_py.Action.NOOP] * (frame_number - fires):
            self.ale.act(action)
        self.newest = self.ale.getScreenGrayscale()
        self.stack = [np.zeros((84, 84), np.uint8)] * 3 + [self.small()]

    def small(self) -> np.ndarray:
        return cv2.resize(self.newest, (84, 84), interpolation=cv2.INTER_AREA)

    def step(self, action: int, cut: bool = False) -> int:
        reward, seen = 0, [self.newest]
        for _ in range(4):
            reward += self.ale.act(self.actions[action])
            seen.append(self.ale.getScreenGrayscale())
        self.newest = np.maximum(seen[0], seen[3]) if cut else np.maximum(seen[3], seen[4])
        self.stack = [*self.stack[1:], self.small()]
        return reward


@pytest.mark.parametrize("env_id", ["ALE/Breakout-v5", "PongNoFrameskip-v4", "ALE/MsPacman-v5"])
def test_frames_are_those_of_a_slow_reference(env_id: str) -> None:
    """Four frames a step, the maximum of the last two, grey, 84 x 84 by area, four in a stack."""
    envs = make(env_id, 2)
    obs, infos = envs.reset(seed=11)
    noops = infos["episode_frame_number"]
    games = [Game(gym.spec(env_id).kwargs["game"], 11 + i, int(noops[i])) for i in range(2)]
    assert envs.single_action_space.n == len(games[0].actions)
    with closing(envs):
        for actions in random_actions(envs, 60):
            np.testing.assert_array_equal(obs, [game.stack for game in games])
            obs, rewards, _, _, infos = envs.step(actions)
            pairs = zip(games, actions, strict=True)
            expected = [game.step(action) for game, action in pairs]
            assert rewards.tolist() == np.clip(expected, -1, 1).tolist()
            assert "_episode" not in infos
    assert obs.dtype == np.uint8 and obs.shape == (2, 4, 84, 84)


def test_games_start_with_no_ops_of_a_random_number() -> None:
    """And with FIRE in Breakout, where the ball is then in play without another one."""
    envs = make(num_envs=16)
    _, infos = envs.reset(seed=1)
    envs.close()
    starts = infos["episode_frame_number"]
    assert len(set(starts.tolist())) > 6 and 1 <= starts.min() and starts.max() <= 30


def test_seeds_reproduce_frame_for_frame() -> None:
    actions = random_actions(
        SimpleNamespace(single_action_space=gym.spaces.Discrete(4), num_envs=2), 40
    )
    first, again, other = (frames(make(), actions, seed) for seed in (5, 5, 7))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    # Environment i is seeded with seed + i.
    shifted = frames(make(), actions[:, ::-1], 6)
    np.testing.assert_array_equal(first[:, 1], shifted[:, 0])


def test_old_and_new_names_are_the_same_game(limit: Limit) -> None:
    """The sticky actions of the v5 names do not leak in."""
    built = limit(num_threads=1)
    names = ("ALE/Breakout-v5", "BreakoutNoFrameskip-v4")
    actions = np.random.default_rng(0).integers(4, size=(40, 2))
    one, other = (frames(make(name), actions, 2) for name in names)
    np.testing.assert_array_equal(one, other)
    assert built[0] == built[1] and built[0]["repeat_action_probability"] == 0


def test_sticky_actions_change_the_game(limit: Limit) -> None:
    built = limit(num_threads=1)
    actions = np.random.default_rng(0).integers(4, size=(40, 2))
    plain, sticky, again = (
        frames(make(sticky_actions=probability), actions, 2) for probability in (0, 0.25, 0.25)
    )
    assert [kwargs["repeat_action_probability"] for kwargs in built] == [0, 0.25, 0.25]
    assert not np.array_equal(plain, sticky)
    np.testing.assert_array_equal(sticky, again)


def test_training_and_evaluation_use_one_autoreset_mode(limit: Limit) -> None:
    built = limit(num_threads=1, max_num_frames_per_episode=24)
    ppo_atari.train(tiny(eval_episodes=1))
    assert len(built) == 2
    assert {kwargs["autoreset_mode"] for kwargs in built} == {AutoresetMode.SAME_STEP}
    assert AtariVectorEnv.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP


@pytest.mark.slow
def test_every_game_constructs_and_steps() -> None:
    assert len(GAMES) > 100
    for env_id in GAMES:
        envs = make(env_id, 1)
        agent = ppo_atari.Agent(envs)
        obs, _ = envs.reset(seed=1)
        with closing(envs):
            for _ in range(3):
                assert obs.shape == (1, 4, 84, 84) and obs.dtype == np.uint8, env_id
                action, *_ = agent.get_action_and_value(torch.as_tensor(obs))
                obs, rewards, *_ = envs.step(action.numpy())
                assert np.abs(rewards).max() <= 1, env_id


# ---- the agent


@pytest.fixture
def agent() -> nn.Module:
    space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    return ppo_atari.Agent(
        SimpleNamespace(single_observation_space=space, single_action_space=gym.spaces.Discrete(6))
    )


def noise(rows: int) -> Tensor:
    return torch.randint(0, 256, (rows, 4, 84, 84), dtype=torch.uint8)


def test_layers_have_their_shapes_and_gains(agent: nn.Module) -> None:
    shapes = [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 64 * 7 * 7), (6, 512), (1, 512)]
    layers = [layer for layer in agent.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in layers] == shapes
    gains = [2**0.5] * 4 + [0.01, 1.0]
    for layer, gain in zip(layers, gains, strict=True):
        rows = layer.weight.detach().flatten(1).double()
        expected = gain**2 * torch.eye(len(rows), dtype=torch.float64)
        torch.testing.assert_close(rows @ rows.T, expected, rtol=0, atol=1e-4 * gain**2)
        assert not layer.bias.any()
    with torch.no_grad():
        assert agent.features(noise(2)).shape == (2, 512)


def test_raw_frames_go_in_whatever_their_number(agent: nn.Module) -> None:
    obs = noise(5)
    before = obs.clone()
    action, logprob, entropy, value = agent.get_action_and_value(obs)
    assert all(x.shape == (5,) for x in (action, logprob, entropy, value))
    assert action.dtype == torch.int64 and 0 <= action.min() and action.max() < 6
    assert all(x.dtype == torch.float32 for x in (logprob, entropy, value))
    policy = Categorical(logits=agent.get_dist(obs))
    torch.testing.assert_close(logprob, policy.log_prob(action))
    torch.testing.assert_close(entropy, policy.entropy())
    torch.testing.assert_close(value, agent.get_value(obs))
    same = agent.get_action_and_value(obs, action)
    assert torch.equal(same[0], action)
    torch.testing.assert_close(same[1], logprob)
    assert torch.equal(obs, before)
    torch.testing.assert_close(agent.get_value(obs[:1]), value[:1], rtol=1e-4, atol=1e-5)


def test_values_of_many_rows_come_in_small_parts(
    agent: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations of all frames of a rollout at once would take memory, and time to get it."""
    sizes, features = [], agent.features
    monkeypatch.setattr(agent, "features", lambda x: (sizes.append(len(x)), features(x))[1])
    obs = noise(300)
    with torch.no_grad():
        values = agent.get_value(obs)
        assert values.shape == (300,)
        for i in (0, 255, 256, 299):
            alone = agent.critic(features(obs[i : i + 1]))[0, 0]
            torch.testing.assert_close(values[i], alone, rtol=1e-4, atol=1e-5)
    assert sum(sizes) == 300 and max(sizes) <= 256


def test_kl_is_exact(agent: nn.Module) -> None:
    obs = noise(8)
    with torch.no_grad():
        old = agent.get_dist(obs)
        for parameter in agent.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        new = agent.get_dist(obs)
    expected = kl_divergence(Categorical(logits=old), Categorical(logits=new))
    assert expected.min() > 1e-3
    torch.testing.assert_close(agent.kl(old, new), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(agent.kl(old, old), torch.zeros(8))


def test_bf16_is_close_to_float32(agent: nn.Module) -> None:
    obs = noise(4)
    exact = agent.get_value(obs).detach()
    agent.bf16 = True
    _, logprobs, entropies, values = agent.get_action_and_value(obs)
    assert all(x.dtype == torch.float32 for x in (logprobs, entropies, values))
    torch.testing.assert_close(values.detach(), exact, rtol=0.05, atol=0.05)
    assert not torch.equal(values, exact)
    (values.sum() + logprobs.sum()).backward()
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in agent.parameters()
    )


def test_evaluation_samples_its_actions(agent: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A greedy policy may never press FIRE again after a lost life."""
    replace_envs(monkeypatch, lambda n: Endless([5] * n))
    asked, real = [], agent.act

    def act(obs: Tensor, deterministic: bool = True) -> Tensor:
        asked.append(deterministic)
        return real(obs, deterministic)

    monkeypatch.setattr(agent, "act", act)
    result = ppo_atari.evaluate(agent, tiny(eval_episodes=2))
    assert asked == [False] * 5
    assert result["returns"] == [5, 5] and result["cut"] == [False, False]


class Still(nn.Module):
    """An agent that never does anything."""

    eval_deterministic = False

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def act(self, obs: Tensor, deterministic: bool) -> Tensor:
        return torch.zeros(len(obs), dtype=torch.int64)


@pytest.mark.parametrize(
    ("limits", "cut"),
    [([10, 10**9], [False, True]), ([27_000, 26_999], [True, False])],
    ids=["without a limit", "at the emulator's own limit"],
)
def test_evaluation_is_cut_at_27_000_steps(
    limits: list[int], cut: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulator's limit of 108,000 frames is reached by the same step: cut as well."""
    replace_envs(monkeypatch, lambda n: Endless(limits))
    result = ppo_atari.evaluate(Still(), tiny(eval_episodes=2))
    assert result["lengths"] == [min(limit, 27_000) for limit in limits]
    assert result["returns"] == result["lengths"]
    assert result["cut"] == cut


@pytest.mark.slow
def test_a_lane_that_never_fires_again_is_cut_in_the_real_emulator() -> None:
    """Breakout stands still after its first life is lost; the evaluation ends all the same."""
    result = ppo_atari.evaluate(Still(), tiny(env_id="ALE/Breakout-v5", eval_episodes=1))
    assert result["lengths"] == [27_000] and result["cut"] == [True]


# ---- runs


def test_training_stores_frames_as_bytes_and_clips_rewards(
    limit: Limit, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(num_threads=1)
    real_loss, real_gae, batches, rewards = ppo_atari.minibatch_loss, ppo_atari.compute_gae, [], []

    def loss(agent: nn.Module, args: object, mb: dict[str, Tensor], beta: Tensor) -> object:
        batches.append({name: (x.dtype, tuple(x.shape)) for name, x in mb.items()})
        return real_loss(agent, args, mb, beta)

    def gae(*args: object) -> tuple[Tensor, Tensor]:
        rewards.append(args[0])
        return real_gae(*args)

    monkeypatch.setattr(ppo_atari, "minibatch_loss", loss)
    monkeypatch.setattr(ppo_atari, "compute_gae", gae)
    # Games of 30 points a step, the emulator's rewards scaled up so that clipping shows.
    step = AtariVectorEnv.step

    def rich(envs: AtariVectorEnv, actions: np.ndarray) -> tuple:
        obs, reward, *rest = step(envs, actions)
        return obs, reward + 30, *rest

    monkeypatch.setattr(AtariVectorEnv, "step", rich)
    ppo_atari.train(tiny())
    assert len(batches) == 4
    assert all(mb["obs"] == (torch.uint8, (16, 4, 84, 84)) for mb in batches)
    assert all(torch.equal(x, torch.ones(16, 2)) for x in rewards)


def test_a_run_its_resumption_and_its_evaluation(
    limit: Limit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limit(num_threads=1, max_num_frames_per_episode=40)
    folder = Path(ppo_atari.train(tiny(eval_episodes=2)))
    names = {"config.json", "script.py", "metrics.csv", "episodes.csv", "checkpoint.pt"}
    assert {path.name for path in folder.iterdir()} == names | {"summary.json"}
    assert column(folder, "global_step") == [32, 64]
    # Two lanes, each cut after 10 steps, in 32 steps of each.
    rows = read_csv(folder / "episodes.csv")
    assert [row["global_step"] for row in rows] == ["20", "20", "40", "40", "60", "60"]
    assert {row["episodic_length"] for row in rows} == {"10"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["global_step"] == 64 and summary["eval_episodes"] == 2
    assert (folder / "script.py").read_bytes() == Path(ppo_atari.__file__).read_bytes()

    words = ["--resume", folder, "--total-timesteps", 128, "--no-cuda"]
    monkeypatch.setattr("sys.argv", ["ppo_atari.py", *map(str, words)])
    ppo_atari.main()
    assert column(folder, "global_step") == [32, 64, 96, 128]

    capsys.readouterr()
    words = ["--evaluate", folder, "--eval-episodes", 3, "--no-cuda"]
    monkeypatch.setattr("sys.argv", ["ppo_atari.py", *map(str, words)])
    ppo_atari.main()
    assert "eval_episodes=3" in capsys.readouterr().out
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["lengths"] == [10, 10, 10]


def test_same_seed_same_run(limit: Limit) -> None:
    limit(num_threads=1)
    runs = [metrics(ppo_atari.train(tiny(seed=seed, total_timesteps=32))) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize("surrogate", ["kl-adaptive", "none"])
def test_other_surrogates_and_bf16_run(surrogate: str, limit: Limit) -> None:
    limit(num_threads=1)
    plain = {"clip_vloss": False, "clip_coef": ppo_atari.Args.clip_coef}
    folder = ppo_atari.train(tiny(surrogate=surrogate, bf16=True, total_timesteps=32, **plain))
    assert np.isfinite(column(folder, "losses/value_loss")).all()


@pytest.mark.filterwarnings("default")
def test_videos_of_training_and_evaluation(limit: Limit, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(num_threads=1, max_num_frames_per_episode=40)
    folder = Path(ppo_atari.train(tiny(capture_video=True, total_timesteps=32)))
    films = list(folder.glob("videos/*/*.mp4"))
    assert len(films) == 1 and films[0].stat().st_size > 0
    film = cv2.VideoCapture(str(films[0]))
    assert film.get(cv2.CAP_PROP_FRAME_COUNT) == 10
    film.release()
    films[0].unlink()
    words = ["--evaluate", folder, "--eval-episodes", 1, "--capture-video", "--no-cuda"]
    monkeypatch.setattr("sys.argv", ["ppo_atari.py", *map(str, words)])
    ppo_atari.main()
    assert len(list(folder.glob("videos/*/*.mp4"))) == 1


@pytest.mark.parametrize(("steps", "films"), [(6, [6]), (17, [10]), (106, [10, 6])])
def test_a_film_ends_with_its_game_or_with_the_run(
    steps: int, films: list[int], limit: Limit, tmp_path: Path
) -> None:
    limit(num_threads=1, max_num_frames_per_episode=40)  # games of 10 steps
    envs = ppo_atari.make_envs(ppo_atari.Args(), 1, tmp_path)
    envs.reset(seed=1)
    for _ in range(steps):
        envs.step(np.zeros(1, dtype=int))
    envs.close()
    lengths = []
    for path in sorted(tmp_path.glob("*.mp4")):  # episode-0, episode-10
        film = cv2.VideoCapture(str(path))
        lengths.append(film.get(cv2.CAP_PROP_FRAME_COUNT))
        film.release()
    assert lengths == pytest.approx(films, abs=1)  # the encoder may drop a last frame


def test_only_frames_of_filmed_games_are_kept(limit: Limit, tmp_path: Path) -> None:
    limit(num_threads=1, max_num_frames_per_episode=40)
    envs = ppo_atari.make_envs(ppo_atari.Args(), 1, tmp_path)
    envs.reset(seed=1)
    kept = []
    for _ in range(25):
        envs.step(np.zeros(1, dtype=int))
        kept.append(len(envs.frames))
    envs.close()
    assert kept == [*range(1, 10), *[0] * 16]  # games of 10 steps: the first and the tenth


@pytest.mark.slow
def test_catch_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_envs(monkeypatch, Catch)
    settings = {"num_envs": 16, "num_steps": 16, "num_minibatches": 4, "update_epochs": 3}
    settings |= {"total_timesteps": 16_384, "learning_rate": 1e-3, "clip_coef": 0.2, "gamma": 0.9}
    folder = ppo_atari.train(tiny(eval_episodes=100, **settings))
    returns = column(folder, "charts/episodic_return")
    assert returns[0] < 0
    assert json.loads(Path(folder, "summary.json").read_text())["eval_return_mean"] > 0.9


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc")
def test_minibatches_reuse_their_memory() -> None:
    """Without the limits that the script sets, each has some 8,000 pages of memory to fetch."""
    with closing(make()) as envs:
        agent = ppo_atari.Agent(envs)
    obs = torch.randint(256, (128, 4, 84, 84), dtype=torch.uint8)
    faults = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        agent.get_value(obs).mean().backward()
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert statistics.median(faults[3:]) < 1000


# ---- bad input


@pytest.mark.parametrize(
    ("env_id", "says"),
    [
        ("CartPole-v1", "ppo.py or ppo_continuous.py"),
        ("HalfCheetah-v5", "ppo.py or ppo_continuous.py"),
        ("envs:Constant-v0", "ppo.py or ppo_continuous.py"),
        ("ALE/Breakot-v5", "Breakout"),
        ("BreakotNoFrameskip-v4", "BreakoutNoFrameskip"),
        ("ALE/Pongg-v5", "Pong"),
        ("ALE/Nonsense-v5", "Nonsense"),
        ("ALE/Breakout-ram-v5", "ram"),
        ("Breakout", "Breakout"),
        ("", "--env-id"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*out of date")
def test_what_is_no_atari_game_is_refused(
    env_id: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["ppo_atari.py", "--env-id", env_id, "--no-cuda", "--run-dir", "new"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit, match="2"):
        ppo_atari.main()
    error = capsys.readouterr().err
    assert error.startswith(f"error: --env-id {env_id}: ") and error.count("\n") == 1
    assert says in error and "ppo_atari.py" not in error
    assert not os.path.exists("new")


@pytest.mark.parametrize("script", [ppo, ppo_continuous], ids=["ppo", "ppo_continuous"])
@pytest.mark.parametrize("env_id", ["ALE/Breakout-v5", "PongNoFrameskip-v4"])
def test_the_siblings_name_this_script(script: ModuleType, env_id: str, tmp_path: Path) -> None:
    process = start(script, ["--env-id", env_id, "--no-cuda", "--run-dir", "new"], tmp_path)
    wait_for(lambda: process.exitcode is not None)
    assert process.exitcode == 2
    error = (tmp_path / "stderr").read_text()
    assert error.startswith(f"error: --env-id {env_id}: ") and error.count("\n") == 1
    assert "ppo_atari.py" in error


def test_the_module_of_an_id_may_be_named() -> None:
    envs = make(env_id="ale_py:ALE/Pong-v5")
    assert envs.reset(seed=1)[0].shape[1:] == (4, 84, 84)
    envs.close()


def test_observation_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match="--norm-obs"):
        make(norm_obs=True)
