"""The checks of tests/benchmarks/kills.py find what they are there to find."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import tiny

import ppo

Change = Callable[[list[str]], list[str]]


@pytest.fixture
def kills(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("kills")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with more than 100 episodes: it hardly learns, so they stay short."""
    settings = {"total_timesteps": 4096, "num_steps": 32, "learning_rate": 1e-6}
    return Path(ppo.train(tiny(ppo, run_dir=str(tmp_path_factory.mktemp("runs")), **settings)))


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def change(path: Path, how: Change) -> None:
    path.write_text("".join(how(path.read_text().splitlines(keepends=True))))


def test_nothing_is_wrong_with_a_run_that_was_left_alone(kills: ModuleType, folder: Path) -> None:
    assert len((folder / "episodes.csv").read_text().splitlines()) > 120
    assert kills.failed(folder) == {}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("metrics", lambda lines: lines[:-1]),
        ("metrics", lambda lines: [*lines, lines[-1]]),
        ("metrics", lambda lines: [*lines[:5], lines[6], lines[5], *lines[7:]]),
        ("metrics", lambda lines: [*lines[:-1], lines[-1][:-9]]),
        ("episodes", lambda lines: [*lines[:50], *lines[51:]]),
        ("episodes", lambda lines: [*lines[:50], *lines[49:]]),
        ("episodes", lambda lines: [lines[0], lines[20], *lines[2:20], lines[1], *lines[21:]]),
        ("episodes", lambda lines: [*lines[:-1], lines[-1][:9]]),
        ("episodes", lambda lines: lines[:1]),
    ],
)
def test_a_row_missing_twice_moved_or_torn_is_found(
    kills: ModuleType, folder: Path, name: str, how: Change
) -> None:
    change(folder / f"{name}.csv", how)
    assert name in kills.failed(folder)


@pytest.mark.parametrize("name", ["metrics.csv", "episodes.csv"])
def test_rows_that_the_checkpoint_counts_on_may_not_change(
    kills: ModuleType, folder: Path, name: str
) -> None:
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    found = {table: (folder / table).read_bytes() for table in kills.TABLES}
    assert kills.moved(folder, found, saved) == {}
    # A row of before the checkpoint, behind it
    last = (folder / name).read_text().splitlines(keepends=True)[-1]
    change(folder / name, lambda lines: [*lines, last])
    assert "kept" in kills.moved(folder, found, saved)
    change(folder / name, lambda lines: [*lines[:3], lines[3].replace(",", ",1", 1), *lines[4:]])
    assert "kept" in kills.moved(folder, found, saved)


def test_a_plan_of_100_kills(kills: ModuleType) -> None:
    plan = kills.plan(100, seed=1)
    scripts = [kill.script for kill in plan]
    counts = [scripts.count(script) for script in kills.FLAGS]
    assert counts == [40, 40, 20]
    inside = [kill for kill in plan if kill.stage != "any time"]
    assert len(inside) == 20
    assert {kill.stage for kill in inside} == set(kills.STAGES)
    assert {kill.script for kill in inside} == set(kills.FLAGS)
