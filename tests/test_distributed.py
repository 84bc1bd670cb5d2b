"""Two processes of torchrun (gloo): they stay equal, and equal one process on all rows."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import SCRIPTS as NAMES
from helpers import ENV_IDS, ROOT, SCRIPTS, TINY, column, flags, read_csv, tiny, wait_for
from torchrun_driver import mathematics

import ppo

TESTS = Path(__file__).parent
DRIVER = str(TESTS / "torchrun_driver.py")
pytestmark = pytest.mark.slow  # each start of torchrun imports torch three times


class Processes(subprocess.Popen):
    """Those of torchrun, in a folder whose files stdout and stderr get what they say."""

    folder: Path


def torchrun(folder: Path, *argv: str) -> Processes:
    """Start two processes in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", *argv]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{TESTS}"}
    with open(folder / "stdout", "w") as out, open(folder / "stderr", "w") as err:
        processes = Processes(command, cwd=folder, env=environ, stdout=out, stderr=err)
    processes.folder = folder
    return processes


def finish(processes: Processes, seconds: float = 300) -> int:
    try:
        return processes.wait(seconds)
    finally:
        processes.kill()
        processes.wait()
        print((processes.folder / "stderr").read_text())  # pytest shows it where a test fails


def script_file(script: ModuleType) -> str:
    return str(ROOT / f"{script.__name__}.py")


def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


# ---- mathematics


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes gets from its half of the rows, for each script."""
    folder = tmp_path_factory.mktemp("mathematics")
    assert finish(torchrun(folder, DRIVER, "mathematics", json.dumps(NAMES))) == 0
    return ranks(folder)


@pytest.fixture
def alone(script: ModuleType) -> dict[str, Any]:
    """What one process gets from all rows."""
    return mathematics(script, slice(None))


def test_gradients_are_those_of_one_process_on_all_rows(
    script: ModuleType, shares: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    first, second = (share[script.__name__]["gradients"] for share in shares)
    assert list(first) == list(alone["gradients"])
    halves = mathematics(script, slice(0, None, 2))["gradients"]
    for name, expected in alone["gradients"].items():
        assert torch.equal(first[name], second[name]), name
        scale = float(expected.abs().max())
        torch.testing.assert_close(first[name], expected, rtol=1e-4, atol=1e-5 * scale)
        # The test can tell: half of the rows alone give another gradient.
        assert scale == 0 or (halves[name] - expected).abs().max() > 0.01 * scale, name


def test_a_step_of_the_optimizer_is_that_of_one_process(
    script: ModuleType, shares: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    """A fused Adam takes gradients as they lie in memory, so this must not change either."""
    for share in shares:
        for name, x in share[script.__name__]["parameters"].items():
            torch.testing.assert_close(x, alone["parameters"][name], rtol=1e-4, atol=1e-4)


def test_advantages_are_normalised_over_all_processes(
    script: ModuleType, shares: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    for rank, share in enumerate(shares):
        actual = share[script.__name__]["advantages"]
        torch.testing.assert_close(actual, alone["advantages"][rank::2], rtol=1e-5, atol=1e-6)


def test_statistics_are_those_of_all_rows(
    script: ModuleType, shares: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    first, second = (share[script.__name__]["statistics"] for share in shares)
    for name, expected in alone["statistics"].items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], expected, rtol=1e-9, atol=1e-9)


# ---- runs


# What each script trains on; the frames of the emulator are too slow for more than a few steps.
SETTINGS = {
    name: TINY | {"env_id": env_id, "norm_obs": True, "norm_reward": True, "eval_episodes": 2}
    for name, env_id in ENV_IDS.items()
}
SETTINGS["ppo_atari"] = TINY | {"env_id": "ALE/Breakout-v5", "total_timesteps": 128}
Trained = tuple[str, Path]


@pytest.fixture(scope="module", params=NAMES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A script's name and the folder in which two processes have trained it."""
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    settings = json.dumps(SETTINGS[name] | {"script": name})
    assert finish(torchrun(folder, DRIVER, "training", settings)) == 0
    return name, folder


def test_parameters_and_statistics_stay_bit_equal(trained: Trained) -> None:
    name, folder = trained
    first, second = ranks(folder)
    if "norm_obs" in SETTINGS[name]:
        assert first["agent"]["obs_stats.count"] > 0 and first["reward_stats"]["count"] > 0
    for module in ("agent", "reward_stats"):
        assert first[module].keys() == second[module].keys()
        for key, x in first[module].items():
            assert torch.equal(x, second[module][key]), key
    moments = [rank["optimizer"]["state"] for rank in (first, second)]
    for index, state in moments[0].items():
        assert all(torch.equal(x, moments[1][index][key]) for key, x in state.items())


def test_no_thread_of_the_process_group_outlives_it(trained: Trained) -> None:
    """One that frees a tensor while the interpreter ends takes the process down: SIGABRT."""
    for rank in ranks(trained[1]):
        assert rank["group_threads"]["training"] and not rank["group_threads"]["trained"]


def test_processes_see_and_do_different_things(trained: Trained) -> None:
    first, second = ranks(trained[1])
    assert len(first["first"]) == TINY["num_envs"] // 2
    # No environment of one starts where one of the other starts.
    both = torch.cat([first["first"], second["first"]])
    assert len(both.unique(dim=0)) == len(both)
    one, other = first["actions"].double(), second["actions"].double()
    assert one.shape == other.shape
    assert (one != other).double().mean() > 0.3


def test_one_run_folder_with_valid_files(trained: Trained) -> None:
    name, folder = trained
    (run,) = (folder / "runs").iterdir()
    assert Path(ranks(folder)[0]["folder"]).name == run.name
    names = {"config.json", "script.py", "metrics.csv", "episodes.csv", "checkpoint.pt"}
    assert {path.name for path in run.iterdir()} == names | {"summary.json"}
    # num_envs is the total of all processes.
    batch = TINY["num_envs"] * TINY["num_steps"]
    steps = list(range(batch, SETTINGS[name]["total_timesteps"] + 1, batch))
    assert column(run, "global_step") == steps
    for row in read_csv(run / "metrics.csv"):
        assert None not in row and None not in row.values()
    ends = [float(row["global_step"]) for row in read_csv(run / "episodes.csv")]
    assert ends == sorted(ends) and all(end <= steps[-1] for end in ends)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["global_step"] == steps[-1]
    assert summary["eval_episodes"] == SETTINGS[name]["eval_episodes"]
    output = (folder / "stdout").read_text()
    assert output.count("eval_return_mean=") == 1 and output.count("files in ") == 2


def test_resume(trained: Trained) -> None:
    name, folder = trained
    (run,) = (folder / "runs").iterdir()
    before = torch.load(run / "checkpoint.pt", weights_only=True)
    total = 2 * SETTINGS[name]["total_timesteps"]
    words = ["--resume", str(run), "--total-timesteps", str(total), "--no-cuda"]
    assert finish(torchrun(folder / "resumed", str(ROOT / f"{name}.py"), *words)) == 0
    batch = TINY["num_envs"] * TINY["num_steps"]
    assert column(run, "global_step") == list(range(batch, total + 1, batch))
    after = torch.load(run / "checkpoint.pt", weights_only=True)
    assert after["progress"]["global_step"] == total == 2 * before["progress"]["global_step"]
    assert any(not torch.equal(x, before["agent"][key]) for key, x in after["agent"].items())


def test_two_gpus_have_the_numbers_of_two_cpus(trained: Trained, tmp_path: Path) -> None:
    """Simulated ones: what NCCL gets are tensors of the GPU, and it has nothing to warn of."""
    name, folder = trained
    settings = json.dumps(SETTINGS[name] | {"script": name, "cuda": True})
    assert finish(torchrun(tmp_path, DRIVER, "training", settings)) == 0
    assert "Warning" not in (tmp_path / "stderr").read_text()
    for here, there in zip(ranks(folder), ranks(tmp_path), strict=True):
        assert torch.equal(here["actions"], there["actions"])
        for key, x in here["agent"].items():
            assert torch.equal(x, there["agent"][key]), key


def test_a_compiled_loss_averages_too(tmp_path: Path) -> None:
    """Advantages are normalised over all processes inside of what is compiled."""
    settings = SETTINGS["ppo"] | {"script": "ppo", "total_timesteps": 64, "eval_episodes": 0}
    agents = []
    for name, compiles in (("plain", False), ("compiled", True)):
        words = json.dumps(settings | {"compile": compiles})
        assert finish(torchrun(tmp_path / name, DRIVER, "training", words)) == 0
        first, second = (rank["agent"] for rank in ranks(tmp_path / name))
        assert all(torch.equal(x, second[key]) for key, x in first.items())
        agents.append(first)
    for key, x in agents[0].items():
        torch.testing.assert_close(agents[1][key], x, rtol=1e-3, atol=1e-4)


# ---- faults


def test_environments_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    argv = flags(SCRIPTS[0], num_envs=3, run_dir="new")
    assert finish(torchrun(tmp_path, script_file(SCRIPTS[0]), *argv)) != 0
    lines = (tmp_path / "stderr").read_text().splitlines()
    errors = {line for line in lines if line.startswith("error: ")}
    assert errors == {"error: --num-envs 3: must divide among 2 processes"}
    assert not any(line.lstrip().startswith('File "') and "ppo.py" in line for line in lines)
    assert not (tmp_path / "new").exists()


def test_a_fault_in_one_process_ends_all(tmp_path: Path) -> None:
    argv = flags(SCRIPTS[0], env_id="torchrun_driver:Fault-v0", run_dir="new")
    began = time.time()
    assert finish(torchrun(tmp_path, script_file(SCRIPTS[0]), *argv)) not in (0, -9)
    assert time.time() - began < 120
    assert "the wheel came off" in (tmp_path / "stderr").read_text()
    assert column(tmp_path / "new", "global_step") == [64]
    assert not (tmp_path / "new" / "summary.json").exists()


@pytest.mark.parametrize(
    ("script", "number"),
    [(SCRIPTS[0], signal.SIGTERM), (SCRIPTS[1], signal.SIGINT)],
    ids=["ppo-SIGTERM", "ppo_continuous-SIGINT"],
)
def test_signals_save_and_say_how_to_resume(
    script: ModuleType, number: signal.Signals, tmp_path: Path
) -> None:
    """torchrun passes the signal on to every process; none may leave before the others."""
    run = tmp_path / "new"
    argv = flags(script, run_dir="new", total_timesteps=64 * 10**6)
    process = torchrun(tmp_path, script_file(script), *argv)
    try:
        wait_for(
            lambda: (run / "metrics.csv").exists() and len(read_csv(run / "metrics.csv")) > 20, 200
        )
        process.send_signal(number)
        assert finish(process, 60) not in (0, -9)
    finally:
        process.kill()
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    assert checkpoint["progress"]["global_step"] == column(run, "global_step")[-1]
    assert f"--resume {run.name}" in (tmp_path / "stdout").read_text()
    assert "RuntimeError" not in (tmp_path / "stderr").read_text()


@pytest.mark.parametrize("fault", ["", "environment"])
def test_when_the_group_is_left(
    fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before the evaluation, which only rank 0 does; not after a fault, where NCCL would wait."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in where.items():
        monkeypatch.setenv(name, value)
    joined = []

    def evaluate(*args: object, **options: object) -> dict[str, Any]:
        joined.append(torch.distributed.is_initialized())
        return {"eval_return_mean": None, "eval_return_std": None, "eval_episodes": 0}

    monkeypatch.setattr(ppo, "evaluate", evaluate)
    args = tiny(ppo, run_dir=str(tmp_path / "run"))
    if not fault:
        ppo.train(args)
        assert joined == [False]
        assert not torch.distributed.is_initialized()
        return

    def fail(*args: object) -> None:
        assert torch.distributed.is_initialized()
        raise ArithmeticError(fault)

    monkeypatch.setattr(ppo, "minibatch_loss", fail)
    try:
        with pytest.raises(RuntimeError, match=fault):
            ppo.train(args)
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()
    assert joined == []
