"""Two processes of torchrun (gloo): they stay equal, and equal one process with all rows."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, TINY, assert_equal, assert_whole, column, flags, read_csv, saved
from torchrun_driver import training

import ppo

TESTS = Path(__file__).parent
DRIVER = ["--no-python", sys.executable, "-c", "import torchrun_driver; torchrun_driver.main()"]
pytestmark = pytest.mark.slow  # each start of torchrun imports torch three times

NORM = {"norm_obs": True, "norm_reward": True}
# A run with what processes have to agree on, and the same resumed; frames
USUAL = TINY | NORM | {"env_id": "CartPole-v1", "surrogate": "kl-adaptive", "target_kl": 0.02}
USUAL |= {"script": "ppo", "run_dir": "usual", "eval_episodes": 2, "kl_target": 1e-4}
RESUMED = USUAL | {"resume": "usual", "total_timesteps": 1024, "run_dir": None}
FRAMES = {"env_id": "ALE/Breakout-v5", "total_timesteps": 128, "torch_threads": 1}
FRAMES = TINY | FRAMES | {"script": "ppo_atari", "run_dir": "frames"}
# Environments and actions that do not depend on the process they are in; one minibatch, as the
# order in a batch does. By the KLs of the halves, this kl_target would give unlike betas.
SAME = TINY | NORM | {"num_minibatches": 1, "total_timesteps": 256, "learning_rate": 1e-3}
SAME |= {"recompute_advantages": True, "surrogate": "kl-adaptive", "kl_target": 1.38e-4}
SAME = {
    name: SAME | {"script": name, "env_id": f"torchrun_driver:{env}-v0", "run_dir": f"same-{name}"}
    for name, env in (("ppo", "Numbered"), ("ppo_continuous", "NumberedBox"))
}
RUNS = {"usual": USUAL, "resumed": RESUMED, "frames": FRAMES} | SAME
Results = dict[str, list[dict[str, Any]]]


def torchrun(folder: Path, *argv: str) -> int:
    """Two processes in the folder, whose files stdout and stderr get what they say."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", *argv]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{TESTS}"}
    with open(folder / "stdout", "w") as out, open(folder / "stderr", "w") as err:
        code = subprocess.run(command, cwd=folder, env=environ, stdout=out, stderr=err, timeout=300)
    print((folder / "stderr").read_text())  # pytest shows it where a test fails
    return code.returncode


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have done all runs, one after the other."""
    folder = tmp_path_factory.mktemp("torchrun")
    code = torchrun(folder, *DRIVER, json.dumps(list(RUNS.values())))
    assert code == 0
    return folder


@pytest.fixture(scope="module")
def both(place: Path) -> Results:
    """For each run, what became of it in either process."""
    ranks = [torch.load(place / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    return {name: [rank[i] for rank in ranks] for i, name in enumerate(RUNS)}


@pytest.mark.parametrize("run", RUNS)
def test_parameters_and_statistics_stay_bit_equal(run: str, both: Results) -> None:
    first, second = both[run]
    for name in ("agent", "reward_stats"):
        assert_equal(first[name], second[name])
    if RUNS[run].get("norm_obs"):
        assert first["agent"]["obs_stats.count"] > 0 and first["reward_stats"]["count"] > 0


@pytest.mark.parametrize("name", SAME)
def test_two_processes_do_what_one_does_with_all_rows(
    name: str, both: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients, statistics, normalized advantages: all that parameters depend on."""
    monkeypatch.chdir(tmp_path)
    alone = training(**{k: v for k, v in SAME[name].items() if k != "script"}, name=name)
    first, second = both[name]
    for key in ("obs", "actions"):  # the same rows, (iterations and epochs, T, N)
        assert torch.equal(torch.cat([first[key], second[key]], dim=2), alone[key])
    assert first["betas"] == second["betas"] == alone["betas"]
    for module in ("agent", "reward_stats"):
        for key in alone[module].keys() - {"obs_stats.count", "count"}:  # of a process's rows
            torch.testing.assert_close(first[module][key], alone[module][key], rtol=1e-3, atol=1e-4)
    # The test can tell: a process's share of the rows has other statistics.
    assert not torch.allclose(first["obs"].mean((0, 1, 2)), alone["obs"].mean((0, 1, 2)), 0.1)


def test_gradients_take_one_collective_a_minibatch(both: Results) -> None:
    for run, updates in (("frames", 2 * 2 * 2), ("ppo", 4 * 2), ("ppo_continuous", 4 * 2)):
        for rank in both[run]:
            large = [size for size in rank["sizes"] if size > 2]  # others: statistics, KLs
            assert large == [rank["parameters"]] * updates


def test_processes_see_and_do_different_things(both: Results) -> None:
    first, second = both["usual"]
    assert first["obs"].shape[2] == 2  # of the four environments
    starts = torch.cat([first["obs"][0, 0], second["obs"][0, 0]])
    assert len(starts.unique(dim=0)) == 4
    assert (first["actions"][0] != second["actions"][0]).double().mean() > 0.3


def test_no_thread_of_the_process_group_outlives_it(both: Results) -> None:
    """One that frees a tensor while the interpreter ends takes the process down: SIGABRT."""
    for results in both.values():
        for rank in results:
            assert rank["threads"]["training"] and not rank["threads"]["trained"]


def test_one_folder_with_whole_files_that_is_resumed(both: Results, place: Path) -> None:
    folders = {"usual", "frames", "same-ppo", "same-ppo_continuous"}
    assert {path.name for path in place.iterdir() if path.is_dir()} == folders
    assert {Path(rank["folder"]) for rank in both["resumed"]} == {place / "usual"}
    assert_whole(place / "usual", 1024)  # num_envs is the total of all processes
    assert saved(place / "usual")["state"]["global_step"] == 1024
    summary = json.loads((place / "usual" / "summary.json").read_text())
    assert summary["global_step"] == 1024 and summary["eval_episodes"] == 2
    output = (place / "stdout").read_text()
    assert output.count("files in ") == len(RUNS) and output.count("eval_episodes=2") == 2
    assert len(read_csv(place / "frames" / "metrics.csv")) == 2


def test_a_fault_in_one_process_ends_all(tmp_path: Path) -> None:
    argv = flags(ppo, env_id="torchrun_driver:Fault-v0", run_dir="new")
    assert torchrun(tmp_path, ppo.__file__, *argv) != 0  # does not wait for the other
    assert "the wheel came off" in (tmp_path / "stderr").read_text()
    assert column(tmp_path / "new", "global_step") == [64]
    assert not (tmp_path / "new" / "summary.json").exists()
