"""What the scripts do on a real GPU, in processes of their own; skipped where there is none."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import (
    FIGURES,
    assert_equal,
    column,
    flags,
    metrics,
    saved,
    server,
    start,
    summary,
    tiny,
)

import ppo

# The other tests are shown no GPU, so torch cannot be asked in this process.
FOUND = any(Path("/dev", name).exists() for name in ("nvidia0", "nvidiactl", "dxg"))
pytestmark = pytest.mark.skipif(not FOUND, reason="no GPU")
SHOWN = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES") or "0"}
CUDA = torch.device("cuda")
USUAL = {"surrogate": "kl-adaptive", "target_kl": 1.0, "norm_obs": True, "norm_reward": True}
USUAL |= {"recompute_advantages": True, "eval_episodes": 2, "cuda": True}


@pytest.mark.parametrize("name", ["ppo", "ppo_continuous", "ppo_atari"])
def test_a_run_goes_on_and_its_evaluation_repeats(name: str, tmp_path: Path) -> None:
    """With and without the GPU; where it is the same, the evaluation repeats to the digit."""
    folder, script = tmp_path / "run", importlib.import_module(name)

    def run(*argv: object) -> str:
        process = start(script, [str(word) for word in argv], tmp_path, SHOWN)
        process.join(300)
        assert process.exitcode == 0, (tmp_path / "stderr").read_text()
        return (tmp_path / "stdout").read_text().splitlines()[-1]

    settings = USUAL | {"env_id": "CartPole-v1", "run_dir": folder}
    settings |= {"ppo_continuous": {"env_id": "Pendulum-v1"}}.get(name, {})
    if name == "ppo_atari":
        settings |= {"env_id": "ALE/Pong-v5", "norm_obs": False, "eval_episodes": 1}
    run(*flags(ppo, **settings))
    figures = " ".join(f"{figure}={summary(folder)[figure]}" for figure in FIGURES)
    assert run("--evaluate", folder) == figures
    run("--resume", folder, "--total-timesteps", 640)
    run("--resume", folder, "--total-timesteps", 768, "--no-cuda")
    assert len(metrics(folder)) == 12
    assert all(norm > 0 for norm in column(folder, "losses/grad_norm"))
    run("--evaluate", folder, "--no-cuda")


def same_run_again() -> None:
    folders = [ppo.train(tiny(ppo, **USUAL)) for _ in range(2)]
    assert metrics(folders[0]) == metrics(folders[1])
    assert_equal(*(saved(folder)["agent"] for folder in folders))


def loss_and_gradients_of_the_cpu() -> None:
    args = ppo.Args(cuda=False, norm_obs=True, surrogate="kl-fixed", clip_vloss=True)
    agent = ppo.Agent(ppo.make_envs(args, 1), args)
    batch = {name: torch.randn(8, 4, 4) for name in ("obs", "next_obs")}
    batch["dist"] = agent.get_dist(agent.features(batch)).detach()
    batch |= {"actions": torch.randint(2, (8, 4)), "rewards": torch.randn(8, 4)}
    batch["terminations"] = batch["dones"] = (torch.rand(8, 4) > 0.8).float()
    results = []
    for device in (torch.device("cpu"), CUDA):
        agent.to(device).zero_grad()
        here = {name: x.to(device) for name, x in batch.items()}
        ppo.add_advantages(agent, args, here)
        mb = {name: x.flatten(0, 1) for name, x in here.items()}
        mb["logprobs"] = ppo.log_prob(mb["dist"], mb["actions"]) + 0.1
        loss, stats = ppo.ppo_loss(agent, args, mb, torch.tensor(0.5, device=device))
        loss.backward()
        stats |= {name: parameter.grad for name, parameter in agent.named_parameters()}
        results.append({name: x.to("cpu", copy=True) for name, x in stats.items()})
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


def gradient_of_nan_stops() -> None:
    settings = {"learning_rate": 1e30, "max_grad_norm": 1e30, "total_timesteps": 6400}
    with pytest.raises(FloatingPointError):
        ppo.train(tiny(ppo, **(USUAL | settings)))


def shown(function: Callable[[], None]) -> None:
    os.environ.update(SHOWN)
    function()


@pytest.mark.parametrize(
    "function", [same_run_again, loss_and_gradients_of_the_cpu, gradient_of_nan_stops]
)
def test_on_the_gpu(
    function: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    process = server.Process(target=shown, args=(function,))
    process.start()
    process.join(300)
    assert process.exitcode == 0
