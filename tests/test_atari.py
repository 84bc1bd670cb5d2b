"""ppo_atari.py with the real emulator: lives, whole games, frame limits, frames, seeds, runs."""

import itertools
import json
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from ale_py import ALEInterface, roms
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from helpers import column, metrics, read_csv, run_main, spy

import ppo_atari

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


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, object]]]:
    """limit(name=value) changes what the emulator is built with; returns all that it was."""

    def limit(**changes: object) -> list[dict[str, object]]:
        built = []

        def build(game: str, num_envs: int, **kwargs: object) -> AtariVectorEnv:
            built.append(kwargs | {"game": game, "num_envs": num_envs})
            return AtariVectorEnv(game, num_envs, **(kwargs | changes))

        monkeypatch.setattr(ppo_atari, "AtariVectorEnv", build)
        return built

    return limit


def make(
    env_id: str = "BreakoutNoFrameskip-v4", num_envs: int = 2, **changes: object
) -> gym.vector.VectorEnv:
    return ppo_atari.make_envs(ppo_atari.Args(env_id=env_id, **changes), num_envs)


def random_actions(envs: gym.vector.VectorEnv, steps: int) -> np.ndarray:
    size = (steps, envs.num_envs)
    return np.random.default_rng(0).integers(envs.single_action_space.n, size=size)


def frames(envs: gym.vector.VectorEnv, seed: int) -> np.ndarray:
    """40 steps, (41, 2, 4, 84, 84), of a fresh environment that is closed after."""
    actions = random_actions(envs, 40)
    with closing(envs):
        return np.stack([envs.reset(seed=seed)[0], *(envs.step(row)[0] for row in actions)])


# ---- lives, whole games, rewards


def test_a_lost_life_ends_the_bootstrap_and_not_the_game() -> None:
    envs = make(num_envs=2)
    _, infos = envs.reset(seed=1)
    lives, frame_numbers = infos["lives"], infos["episode_frame_number"]
    lost = games = 0
    with closing(envs):
        for actions in random_actions(envs, 400):
            obs, _, terminations, truncations, infos = envs.step(actions)
            assert not truncations.any()
            for i in range(2):
                over = bool(infos["_episode"][i]) if "_episode" in infos else False
                if infos["lives"][i] < lives[i]:
                    assert terminations[i] and not over
                    # What follows is the next frame of the same game
                    np.testing.assert_array_equal(infos["final_obs"][i], obs[i])
                    lost += 1
                else:
                    assert terminations[i] == over
                if over:
                    games += 1
                    # The new game: all lives, an empty stack but for its first frame
                    assert infos["lives"][i] == 5 and infos["episode_frame_number"][i] <= 30
                    assert not obs[i, :3].any() and obs[i, 3].any()
                else:
                    assert infos["episode_frame_number"][i] == frame_numbers[i] + 4
            lives, frame_numbers = infos["lives"].copy(), infos["episode_frame_number"].copy()
    # Four lives are lost in each game; the fifth ends it
    assert games >= 2 and lost >= 4 * games


@pytest.mark.parametrize(("name", "frame_limit"), [("Breakout", 108_000), ("SpaceInvaders", 1200)])
def test_episodes_are_whole_games_with_their_true_score(
    name: str, frame_limit: int, limit: Limit
) -> None:
    """Against our own sums over the plain emulator; what is learned from is clipped to [-1, 1]."""
    limits = {"max_num_frames_per_episode": frame_limit, "num_threads": 1}
    limit(**limits)
    envs = make(f"{name}NoFrameskip-v4", 2)
    mode = AutoresetMode.SAME_STEP
    game = gym.spec(f"ALE/{name}-v5").kwargs["game"]
    raw = AtariVectorEnv(game, 2, autoreset_mode=mode, reward_clipping=False, **limits)
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
    """The frame number of a new game, up to 29, may be above the last one of the game before."""
    limit(max_num_frames_per_episode=8, num_threads=1)
    envs = make(num_envs=4)
    envs.reset(seed=1)
    with closing(envs):
        for step in range(1, 21):
            infos = envs.step(np.zeros(4, dtype=int))[-1]
            assert np.all(infos.get("_episode", False)) == (step % 2 == 0), f"step {step}"


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
        """cut: ale-py leaves at its frame limit before it reads the fourth frame."""
        reward, seen = 0, [self.newest]
        for _ in range(4):
            reward += self.ale.act(self.actions[action])
            seen.append(self.ale.getScreenGrayscale())
        self.newest = np.maximum(seen[0], seen[3]) if cut else np.maximum(seen[3], seen[4])
        self.stack = [*self.stack[1:], self.small()]
        return reward


@pytest.mark.parametrize("name", ["Breakout", "Pong", "MsPacman"])
def test_frames_are_those_of_a_slow_reference(name: str) -> None:
    """Four frames a step, the maximum of the last two, gray, 84 x 84 by area, four in a stack."""
    env_id = f"{name}NoFrameskip-v4"
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


def test_the_final_observation_of_a_game_cut_short(limit: Limit) -> None:
    """It continues the game that is cut; the next observation starts another game."""
    limit(max_num_frames_per_episode=240, num_threads=1)
    envs = make(num_envs=2)
    _, infos = envs.reset(seed=3)
    noops = infos["episode_frame_number"]
    games = [Game("breakout", 3 + i, int(noops[i])) for i in range(2)]
    with closing(envs):
        for step, actions in enumerate(random_actions(envs, 60), 1):
            obs, _, terminations, truncations, infos = envs.step(actions)
            for game, action in zip(games, actions, strict=True):
                game.step(action, cut=step == 60)
            assert truncations.tolist() == [step == 60] * 2
    assert not terminations.any() and infos["_episode"].all()
    assert infos["episode"]["l"].tolist() == [60, 60]
    assert infos["final_obs"].dtype == np.uint8
    np.testing.assert_array_equal(infos["final_obs"], [game.stack for game in games])
    assert not obs[:, :3].any()


def test_games_start_with_fire_and_no_ops_of_a_random_number() -> None:
    """The reference above shows that FIRE is among them."""
    envs = make(num_envs=8)
    _, infos = envs.reset(seed=1)
    envs.close()
    starts = infos["episode_frame_number"]
    assert len(set(starts.tolist())) > 3 and 1 <= starts.min() and starts.max() <= 30


# ---- seeds, ids, sticky actions


def test_seeds_reproduce_frame_for_frame() -> None:
    """In the game with sticky actions, whose draws are seeded too."""
    first, again, other = (frames(make("ALE/Breakout-v5"), seed) for seed in (5, 5, 7))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_old_and_new_ids_are_the_same_game_but_for_sticky_actions(limit: Limit) -> None:
    """Those come from the id, unless the flag says otherwise."""
    built = limit(num_threads=1)
    old, new = "BreakoutNoFrameskip-v4", "ALE/Breakout-v5"
    plain = frames(make(old), 2)
    np.testing.assert_array_equal(plain, frames(make(new, sticky_actions=0.0), 2))
    np.testing.assert_array_equal(plain, frames(make(f"ale_py:{old}"), 2))
    sticky = frames(make(new), 2)
    np.testing.assert_array_equal(sticky, frames(make(old, sticky_actions=0.25), 2))
    assert not np.array_equal(plain, sticky)
    probabilities = [kwargs["repeat_action_probability"] for kwargs in built]
    assert probabilities == [0, 0, 0, 0.25, 0.25]


@pytest.mark.slow
def test_every_game_steps() -> None:
    env_ids = sorted(env_id for env_id in gym.registry if env_id.startswith("ALE/"))
    assert len(env_ids) > 100
    for env_id in env_ids:
        with closing(make(env_id, 1)) as envs:
            envs.reset(seed=1)
            obs, *_ = envs.step(random_actions(envs, 1)[0])
            assert obs.shape == (1, 4, 84, 84) and obs.dtype == np.uint8, env_id


# ---- the agent


def test_bf16_is_close_to_float32() -> None:
    envs = make()
    envs.close()
    agent, fast = ppo_atari.Agent(envs, tiny()), ppo_atari.Agent(envs, tiny(bf16=True))
    fast.load_state_dict(agent.state_dict())
    rows = {"obs": torch.randint(0, 256, (4, 4, 84, 84), dtype=torch.uint8)}
    features, exact = fast.features(rows), agent.features(rows)
    dist, values = fast.get_dist(features), fast.get_value(features)
    assert {x.dtype for x in (features, dist, values)} == {torch.float32}
    torch.testing.assert_close(features, exact, rtol=0.05, atol=0.02)
    torch.testing.assert_close(values, agent.get_value(exact), rtol=0.05, atol=0.05)
    assert not torch.equal(features, exact)
    (values.sum() + dist[:, 0].sum()).backward()
    gradients = [parameter.grad for parameter in fast.parameters()]
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in gradients)


# ---- runs


def test_training_learns_from_true_transitions_and_clipped_rewards(
    limit: Limit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over lost lives and cuts of games, after 20 steps; each step pays 30 points more."""
    limit(num_threads=1, max_num_frames_per_episode=80)
    step, steps = AtariVectorEnv.step, itertools.count(1)

    def rich(envs: AtariVectorEnv, actions: np.ndarray) -> tuple:
        obs, rewards, terminations, *rest = step(envs, actions)
        terminations[0] |= next(steps) % 7 == 0  # as if the first game lost many lives
        return obs, rewards + 30, terminations, *rest

    monkeypatch.setattr(AtariVectorEnv, "step", rich)
    batches = spy(monkeypatch, ppo_atari, "add_advantages")
    losses = spy(monkeypatch, ppo_atari, "ppo_loss")
    folder = ppo_atari.train(tiny(env_id="BreakoutNoFrameskip-v4", num_steps=32))
    ((_, _, batch), *_), *_ = batches
    obs, next_obs = batch["obs"], batch["next_obs"]
    assert obs.dtype == next_obs.dtype == torch.uint8 and obs.shape == (32, 2, 4, 84, 84)
    # A transition moves each stack on by a frame, at the end of a game too
    assert torch.equal(next_obs[:, :, :3], obs[:, :, 1:])
    goes_on = (next_obs[:-1] == obs[1:]).flatten(2).all(dim=2)
    assert torch.equal(goes_on, (torch.arange(31) != 19)[:, None].expand(31, 2))
    ends = [batch[name][:, 0].nonzero().flatten().tolist() for name in ("terminations", "dones")]
    assert ends == [[6, 13, 20, 27], [6, 13, 19, 20, 27]]
    assert torch.equal(batch["rewards"], torch.ones(32, 2))
    assert all(mb["obs"].dtype == torch.uint8 for (_, _, mb, _), _, _ in losses)
    rows = read_csv(Path(folder, "episodes.csv"))
    assert [row["global_step"] for row in rows] == ["40", "40"]
    assert all(float(row["episodic_return"]) >= 30 * 20 for row in rows)


def test_a_run_goes_on_and_its_evaluation_repeats(
    limit: Limit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limit(num_threads=1, max_num_frames_per_episode=40)
    folder = Path(ppo_atari.train(tiny(eval_episodes=2, bf16=True, surrogate="kl-adaptive")))
    names = {"config.json", "script.py", "metrics.csv", "episodes.csv", "checkpoint.pt"}
    assert {path.name for path in folder.iterdir()} == names | {"summary.json"}
    assert column(folder, "global_step") == [32, 64]
    # Two lanes, each cut after 10 steps, in 32 steps of each
    rows = read_csv(folder / "episodes.csv")
    assert [row["global_step"] for row in rows] == ["20", "20", "40", "40", "60", "60"]
    assert {float(row["episodic_length"]) for row in rows} == {10}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["global_step"] == 64 and summary["eval_episodes"] == 2
    assert np.isfinite(column(folder, "losses/value_loss")).all()

    run_main(ppo_atari, "--resume", folder, "--total-timesteps", 128)
    assert column(folder, "global_step") == [32, 64, 96, 128]
    capsys.readouterr()
    summary = json.loads((folder / "summary.json").read_text())
    run_main(ppo_atari, "--evaluate", folder)
    words = [f"{name}={summary[name]}" for name in summary if name.startswith("eval")]
    assert capsys.readouterr().out.splitlines()[-1].split() == words


def test_same_seed_same_run(limit: Limit) -> None:
    limit(num_threads=1)
    runs = [metrics(ppo_atari.train(tiny(seed=seed, total_timesteps=32))) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


# ---- films


def film_lengths(folder: Path) -> list[int]:
    """Frames of the films by their names. Encoders may drop a last one."""
    lengths = []
    for path in sorted(folder.rglob("*.mp4")):
        film = cv2.VideoCapture(str(path))
        lengths.append(int(film.get(cv2.CAP_PROP_FRAME_COUNT)))
        film.release()
    return lengths


@pytest.mark.parametrize(
    ("game", "steps", "films"), [(10, 6, [6]), (10, 106, [106]), (2000, 1250, [1000])]
)
def test_a_film_shows_the_last_1000_steps_of_the_first_game(
    game: int, steps: int, films: list[int], limit: Limit, tmp_path: Path
) -> None:
    """From one game on to the next; no more frames are kept. Closing writes it."""
    limit(num_threads=1, max_num_frames_per_episode=4 * game)
    envs, shown, most = ppo_atari.make_envs(ppo_atari.Args(), 2, tmp_path), [], 0
    envs.reset(seed=1)
    for _ in range(steps):
        shown.append(envs.step(np.zeros(2, dtype=int))[0][0, -1])
        most = max(most, len(envs.frames))
    assert np.array_equal(np.stack(envs.frames)[..., 0], shown[-1000:])
    envs.close()
    assert film_lengths(tmp_path) == pytest.approx(films, abs=1)
    assert most <= 1000


@pytest.mark.filterwarnings("default")
def test_films_of_training_and_evaluation(limit: Limit, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(num_threads=1, max_num_frames_per_episode=40)
    folder = Path(ppo_atari.train(tiny(capture_video=True, total_timesteps=32)))
    films = list(folder.glob("videos/*/*.mp4"))
    assert film_lengths(folder) == pytest.approx([16], abs=1)
    films[0].unlink()
    run_main(ppo_atari, "--evaluate", folder, "--eval-episodes", 1, "--capture-video")
    assert film_lengths(folder) == pytest.approx([10], abs=1)


# ---- bad input


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--env-id", "CartPole-v1"], "an Atari game"),
        (["--env-id", "ALE/Breakot-v5"], "Breakout"),
        (["--env-id", "BreakotNoFrameskip-v4"], "BreakoutNoFrameskip"),
        (["--env-id", "ALE/Breakout-ram-v5"], "Breakout"),
        (["--env-id", ""], "Malformed"),
        (["--norm-obs"], "--norm-obs"),
        (["--sticky-actions", "1.5"], "--sticky-actions 1.5"),
    ],
)
def test_what_is_no_atari_game_and_observation_statistics_are_refused(
    words: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_main(ppo_atari, *words, "--no-cuda", "--run-dir", "new")
    error = capsys.readouterr().err
    assert error.startswith("error: --env-id") and error.count("\n") == 1 and says in error
    assert not os.path.exists("new")
