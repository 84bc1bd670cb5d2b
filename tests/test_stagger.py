"""--stagger: environments restart one by one at first, so that episodes do not run in step."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import SCRIPTS, column, read_csv, spy, tiny

import ppo_continuous

T, N, LENGTH = 16, 4, 11  # of tiny runs; Timer's time limit

scripts = pytest.mark.parametrize("script", SCRIPTS, ids=[s.__name__ for s in SCRIPTS])
both = pytest.mark.parametrize("stagger", [True, False], ids=["stagger", "in step"])


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def timed(script: ModuleType, iterations: int = 8, **changes: object) -> object:
    """A run in Timer, which observes how many steps its episode has had."""
    box = "Box" if script is ppo_continuous else ""
    settings = {"env_id": f"envs:Timer{box}-v0", "recompute_advantages": False}
    settings |= {"total_timesteps": iterations * T * N, "update_epochs": 1}
    return tiny(script, **(settings | changes))


def counts(iterations: int, stagger: bool) -> np.ndarray:
    """What Timer shows in each row of a run or of its resumed part, (T * iterations, N).

    Environment i > 0 is restarted once, before iteration 1 + i, so after i * T steps.
    """
    t, i = np.arange(T * iterations)[:, None], np.arange(N)
    restarted = stagger & (t >= i * T)
    return (t - restarted * i * T) % LENGTH


def assert_whole_episodes(folder: str, shown: np.ndarray) -> None:
    """episodes.csv has a row where a time limit was reached, and none for a restart."""
    rows = read_csv(f"{folder}/episodes.csv")
    ends, _ = np.nonzero(shown == LENGTH - 1)
    assert [int(row["global_step"]) for row in rows] == (N * (ends + 1)).tolist()
    assert {row["episodic_length"] for row in rows} == {str(LENGTH)}
    # 1 + 2 + ... + 11
    assert {row["episodic_return"] for row in rows} == {"66.0"}
    assert column(folder, "charts/episodic_return")[-1] == 66


@scripts
@both
def test_environments_restart_one_by_one(
    script: ModuleType, stagger: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = spy(monkeypatch, script, "estimate_values")
    folder = script.train(timed(script, stagger=stagger))
    assert len(calls) == 8
    shown = torch.cat([args[1] for args, _, _ in calls])[..., 0].numpy()
    np.testing.assert_array_equal(shown, counts(8, stagger))
    for (_, obs, next_obs, truncations, final_obs), _, _ in calls:
        # What follows a batch is seen as it is before a restart, for its value.
        assert torch.equal(next_obs, (obs[-1] + 1) % LENGTH)
        # A restart is no end of an episode.
        assert torch.equal(truncations.bool(), obs[..., 0] == LENGTH - 1)
        assert final_obs.flatten().tolist() == [LENGTH] * int(truncations.sum())
    assert len(set(shown[-1])) == (N if stagger else 1)
    assert_whole_episodes(folder, shown)


@scripts
@both
def test_a_resumed_run_spreads_them_again(
    script: ModuleType, stagger: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All environments start anew there, whether or not all had been restarted before."""
    calls = spy(monkeypatch, script, "estimate_values")
    folder = script.train(timed(script, iterations=3, stagger=stagger))
    script.train(script.Args(resume=folder, total_timesteps=9 * T * N, cuda=False))
    assert len(calls) == 9
    shown = torch.cat([args[1] for args, _, _ in calls])[..., 0].numpy()
    expected = np.concatenate([counts(3, stagger), counts(6, stagger)])
    np.testing.assert_array_equal(shown, expected)
    assert_whole_episodes(folder, expected)


@scripts
@both
def test_reward_scaling_forgets_what_a_restart_broke_off(script: ModuleType, stagger: bool) -> None:
    """Its statistics are those of the discounted returns since the last start, worked out here."""
    folder = script.train(timed(script, stagger=stagger, norm_reward=True, gamma=0.9))
    # Step p of an episode pays p + 1, the steps before it count gamma, gamma^2... as much.
    traces = [sum(0.9**k * (p + 1 - k) for k in range(p + 1)) for p in range(LENGTH)]
    rows = np.array(traces)[counts(8, stagger)]
    stats = script.load_checkpoint(folder)["reward_stats"]
    assert stats["count"] == rows.size
    np.testing.assert_allclose(stats["mean"], rows.mean(), rtol=1e-6)
    np.testing.assert_allclose(stats["var"], rows.var(), rtol=1e-5)
