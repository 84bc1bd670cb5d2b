"""What the scripts do with a GPU, on a simulated one, as most machines have none."""

import itertools
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import metrics
from simulated_gpu import GpuTensor, Operations, simulated_gpu
from torch import Tensor

import ppo_atari

# Environments whose time limit ends episodes within a rollout
ENV_IDS = {"ppo": "envs:Timer-v0", "ppo_continuous": "envs:TimerBox-v0"}
SHORT = {"total_timesteps": 48, "num_envs": 2, "num_steps": 12, "num_minibatches": 2}
SHORT |= {"update_epochs": 2, "eval_episodes": 2, "torch_threads": 1}
SETTINGS = {
    "defaults": {},
    "more": {
        "surrogate": "kl-adaptive",
        "target_kl": 1.0,
        "stagger": True,
        "norm_reward": True,
        "recompute_advantages": True,
    },
    "less": {
        "surrogate": "none",
        "clip_vloss": True,
        "norm_obs": False,
        "norm_reward": False,
        "norm_adv": False,
        "anneal_lr": False,
        "recompute_advantages": False,
    },
}
numbers = itertools.count()
# For what is the same code in all scripts, and slow with pixels
few_numbers = pytest.mark.parametrize("script", ["ppo", "ppo_continuous"], indirect=True)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def short_games(limit: Callable[..., object]) -> None:
    limit(max_num_frames_per_episode=40)


def short(script: ModuleType, **changes: object) -> ppo_atari.Args:
    names = {"env_id": ENV_IDS.get(script.__name__, "ALE/Pong-v5"), "run_dir": f"{next(numbers)}"}
    return script.Args(**(names | SHORT | changes))


def on_gpu(script: ModuleType, **changes: object) -> tuple[str, Operations]:
    with simulated_gpu() as gpu:
        return script.train(short(script, cuda=True, **changes)), gpu


# ---- the simulation


def test_the_simulated_gpu_is_strict_about_devices() -> None:
    with simulated_gpu() as gpu:
        x = torch.arange(3.0, device="cuda")
        rows = torch.tensor([2, 0])
        for mix in (
            lambda: x + torch.ones(3),
            lambda: torch.stack([x, torch.ones(3)]),
            lambda: x.index_select(0, rows),
            lambda: x.add_(torch.ones(3)),
            lambda: torch.ones(3).mul_(x),
            lambda: torch.tensor(1.0).add_(x.sum()),
            lambda: torch.nn.functional.linear(x, torch.ones(2, 3)),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                mix()
        with pytest.raises((RuntimeError, TypeError)):
            x.numpy()
        with pytest.raises((RuntimeError, TypeError)):
            np.asarray(x)
        assert not gpu.waits
        assert x.device == (2 * x).device == torch.zeros_like(x).device == torch.device("cuda", 0)
        assert (x.cpu() + torch.ones(3)).tolist() == [1, 2, 3] and gpu.waits == ["_to_copy"]
        assert type(x.cpu()) is Tensor and not isinstance(torch.ones(3), GpuTensor)
    with pytest.raises(RuntimeError, match="outlived"):
        x + 1


def test_the_simulated_gpu_computes_gradients() -> None:
    with simulated_gpu():
        layer = torch.nn.Linear(3, 1).to("cuda")
        before = layer.weight.detach().cpu()
        layer(torch.tensor([1.0, 2.0, 3.0], device="cuda")).sum().backward()
        torch.optim.Adam(layer.parameters(), lr=1, fused=True).step()
        assert layer.weight.grad.device.type == "cuda"
        assert layer.weight.grad.cpu().tolist() == [[1, 2, 3]]
        # Adam's first step is the learning rate, against the sign of the gradient.
        assert torch.allclose(before - layer.weight.detach().cpu(), torch.ones(1, 3))


def test_adam_does_not_ask_for_a_real_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PyTorch that was built for CUDA names the simulated GPU as its accelerator."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    test_the_simulated_gpu_computes_gradients()


def test_no_test_computes_on_a_real_gpu() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


@pytest.mark.parametrize(
    ("code", "waits"),
    [
        ("x.item()", 1),
        ("float(x[0])", 1),
        ("bool((x > 0).all())", 1),
        ("x.tolist()", 1),
        ("x.cpu()", 1),
        ("x.nonzero()", 1),
        ("x[x > 0]", 1),
        ("x.masked_select(x > 0)", 1),
        ("x.index_put_((x > 0,), x[:1])", 1),
        ("torch.zeros(1).copy_(x)", 1),
        ("x.copy_(torch.zeros(1))", 0),
        ("torch.zeros(1).to('cuda')", 0),
        ("torch.where(x > 0, x, -x)", 0),
        ("x.sum() * 2", 0),
        ("x * torch.tensor(2.0)", 0),
    ],
)
def test_the_simulated_gpu_counts_what_must_wait(code: str, waits: int) -> None:
    with simulated_gpu() as gpu:
        eval(code, {"torch": torch, "x": torch.ones(1, device="cuda")})
        assert len(gpu.waits) == waits


# ---- the scripts


@pytest.mark.parametrize(
    ("script", "setting"),
    [*itertools.product(("ppo", "ppo_continuous"), SETTINGS), ("ppo_atari", "more")],
    indirect=["script"],
)
def test_a_run_on_a_gpu_has_the_numbers_of_the_cpu(script: ModuleType, setting: str) -> None:
    """Everything lies where it is computed, and is what it is without a GPU."""
    here = script.train(short(script, cuda=False, **SETTINGS[setting]))
    there, _ = on_gpu(script, **SETTINGS[setting])
    assert metrics(there) == metrics(here)
    assert all(math.isfinite(float(row["losses/grad_norm"])) for row in metrics(here))
    one, other = (script.load_checkpoint(folder)["agent"] for folder in (here, there))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert Path(there, "summary.json").exists()


def test_a_rollout_waits_for_the_gpu_once_a_step(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, make_envs = [], script.make_envs

    def watched(*args: object) -> gym.vector.VectorEnv:
        envs = make_envs(*args)
        step = envs.step

        def watched_step(actions: np.ndarray) -> tuple:
            waits.append(len(gpu.waits))
            return step(actions)

        envs.step = watched_step
        return envs

    monkeypatch.setattr(script, "make_envs", watched)
    with simulated_gpu() as gpu:
        script.train(short(script, cuda=True, eval_episodes=0))
    assert len(waits) == 24
    assert (np.diff(waits[:12]) == 1).all() and (np.diff(waits[12:]) == 1).all()


def test_an_update_does_not_wait_for_the_gpu(script: ModuleType) -> None:
    """However many minibatches it has, each fetches nothing."""
    settings = {"recompute_advantages": False, "eval_episodes": 0}
    _, one = on_gpu(script, update_epochs=1, num_minibatches=1, **settings)
    _, many = on_gpu(script, update_epochs=3, num_minibatches=4, **settings)
    assert one.waits == many.waits


@few_numbers
def test_a_run_goes_on_with_or_without_the_gpu(script: ModuleType) -> None:
    """The random numbers of the GPU are saved and restored; the rest may change its device."""
    start, first = on_gpu(script, eval_episodes=0)
    saved = script.load_checkpoint(start)
    assert not first.rng_states
    folders = []
    for cuda in (True, False):
        folder = Path(shutil.copytree(start, f"{next(numbers)}"))
        args = script.Args(resume=str(folder), total_timesteps=96, cuda=cuda)
        with simulated_gpu() as gpu:
            script.train(args, defaults=script.Args(cuda=True))
        assert len(gpu.rng_states) == cuda
        assert all(torch.equal(state, saved["cuda_rng"]) for state in gpu.rng_states)
        folders.append(folder)
    assert metrics(folders[0]) == metrics(folders[1]) and len(metrics(folders[0])) == 4
    results = []
    for cuda in (True, False):
        args = script.Args(evaluate=str(folders[0]), eval_episodes=2, cuda=cuda)
        with simulated_gpu() as gpu:
            script.evaluate_checkpoint(args, defaults=script.Args(cuda=True))
        assert bool(gpu.waits) == cuda
        results.append(Path(folders[0], "evaluation.json").read_text())
    assert results[0] == results[1]


@few_numbers
def test_a_fault_of_an_update_on_the_gpu_is_named(script: ModuleType) -> None:
    """After the iteration, as looking at each minibatch would make the CPU wait."""
    with pytest.raises(RuntimeError, match="iteration 1, after step 24: .*gradient is NaN"):
        on_gpu(script, run_dir="broken", learning_rate=1e30, max_grad_norm=1e30)
    assert metrics("broken") == []


@few_numbers
def test_a_fault_of_an_environment_is_named(script: ModuleType) -> None:
    env_id = ENV_IDS[script.__name__].replace("Timer", "Bad").replace("-v0", "-obs-v0")
    messages = []
    for cuda in (True, False):
        folder = str(next(numbers))
        with simulated_gpu(), pytest.raises(RuntimeError) as fault:
            script.train(
                short(script, env_id=env_id, cuda=cuda, run_dir=folder, total_timesteps=120)
            )
        messages.append(str(fault.value).replace(f" {folder}", ""))
    assert messages[0] == messages[1] and "observation[" in messages[0]


@few_numbers
def test_each_process_tries_the_compiler_on_its_own_gpu(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or each would hold memory of the first GPU, too."""
    devices = []

    def no_compiler(function: object) -> None:
        devices.append(torch.cuda.current_device())
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="--compile True"):
        on_gpu(script, compile=True)
    assert devices == [1]


@few_numbers
def test_the_compiler_has_nothing_to_warn_of(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks for TF32 wherever a GPU has it; without --compile, products stay as exact as ever."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for compiles in (True, False):
        on_gpu(script, compile=compiles, total_timesteps=24, eval_episodes=0)
        assert (torch.backends.cuda.matmul.fp32_precision == "tf32") == compiles
        assert torch.backends.cuda.matmul.allow_tf32 == compiles
        assert torch.backends.mkldnn.matmul.fp32_precision == "none"
        assert torch.get_float32_matmul_precision() == ("high" if compiles else "highest")
