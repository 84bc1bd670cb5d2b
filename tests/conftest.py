"""What the tests share: the scripts as modules, small agents, fixed random numbers."""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor, nn

# The tests know what a CPU computes. CUDA_VISIBLE_DEVICES=0 shows them a GPU all the same.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

# PPO_SCRIPTS_DIR lets the tests judge changed copies of the scripts, in another folder.
FOLDER = Path(os.environ.get("PPO_SCRIPTS_DIR", Path(__file__).resolve().parents[1]))
SCRIPTS = ("ppo", "ppo_continuous", "ppo_atari")
sys.path.insert(0, str(FOLDER))

VECTOR = Box(-np.inf, np.inf, (3,), np.float32)
SPACES = {  # observations and actions of the agents under test
    "ppo": (VECTOR, Discrete(5)),
    "ppo_continuous": (VECTOR, Box(-1, 1, (2, 3), np.float32)),
    "ppo_atari": (Box(0, 255, (4, 84, 84), np.uint8), Discrete(5)),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--script", default=str(FOLDER / "ppo.py"), help="what conformance.py checks")
    parser.addoption("--env-id", help="where conformance.py trains")


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a program of tests/benchmarks, which find each other by their folder."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent / "benchmarks"))
    return importlib.import_module


@pytest.fixture(params=SCRIPTS)
def script(request: pytest.FixtureRequest) -> ModuleType:
    """Each script; @pytest.mark.parametrize("script", [...], indirect=True) picks."""
    return importlib.import_module(request.param)


@pytest.fixture
def make_agent(script: ModuleType) -> Callable[..., nn.Module]:
    """make_agent(**flags): an agent for the SPACES of the script."""

    def make_agent(**flags: object) -> nn.Module:
        observations, actions = SPACES[script.__name__]
        envs = SimpleNamespace(single_observation_space=observations, single_action_space=actions)
        return script.Agent(envs, script.Args(cuda=False, **flags))

    return make_agent


@pytest.fixture
def agent(make_agent: Callable[..., nn.Module]) -> nn.Module:
    """An agent with 5 actions, or with actions of shape (2, 3), that sees raw observations."""
    return make_agent(norm_obs=False)


@pytest.fixture
def observe(script: ModuleType) -> Callable[[int], dict[str, Tensor]]:
    """A function that makes up n rows of raw observations, as agent.features takes them."""
    space = SPACES[script.__name__][0]
    if space.dtype == np.uint8:
        return lambda n: {"obs": torch.randint(0, 256, (n, *space.shape), dtype=torch.uint8)}
    scale, offset = torch.tensor([0.1, 1.0, 3.0]), torch.tensor([0.0, -5.0, 10.0])
    return lambda n: {"obs": offset + scale * torch.randn(n, *space.shape)}


@pytest.fixture
def shake() -> Callable[[nn.Module, float], None]:
    """A function that changes all parameters, weights of large layers less."""

    @torch.no_grad()
    def shake(agent: nn.Module, strength: float) -> None:
        for parameter in agent.parameters():
            parameter += strength * torch.randn_like(parameter) / parameter[0].numel() ** 0.5

    return shake
