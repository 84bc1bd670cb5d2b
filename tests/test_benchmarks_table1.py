"""tests/benchmarks/sweep.py: the normalised score, against a case worked by hand; two at once."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest


@pytest.fixture
def sweep(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("sweep")


def run(env_id: str, setting: str, seed: int, train: float) -> SimpleNamespace:
    return SimpleNamespace(env_id=env_id, setting=setting, seed=seed, train=train)


RUNS = [
    run("A", "clip", 1, 30.0),
    run("A", "clip", 2, 50.0),  # mean 40: the best of A
    run("A", "none", 1, 10.0),
    run("A", "none", 2, -20.0),
    run("B", "clip", 1, -3.0),
    run("B", "none", 1, -1.0),  # the best of B
]


def test_scores_worked_by_hand(sweep: ModuleType) -> None:
    # A: (x - 10) / (40 - 10); B: (x + 5) / (-1 + 5)
    scores = sweep.normalised(RUNS, {"A": 10.0, "B": -5.0})
    assert scores == {
        "clip": pytest.approx([20 / 30, 40 / 30, 2 / 4]),
        "none": pytest.approx([0, -1, 1]),
    }


def test_only_what_every_setting_was_trained_with_counts(sweep: ModuleType) -> None:
    extra = [
        run("A", "clip", 3, 900.0),  # a seed more
        run("C", "clip", 1, 900.0),  # an environment more
        run("C", "none", 2, 900.0),  # of another seed
    ]
    assert sweep.compared([*RUNS, *extra]) == RUNS
    assert sweep.compared(extra) == []


def test_runs_of_another_experiment_stand_beside_own_ones_only(
    sweep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """clip-0.2 is trained as mujoco_gamma/gamma-0.99, there with more environments and seeds."""
    for name in ("table1/none/Hopper-v5/2", "mujoco_gamma/gamma-0.99/Hopper-v5/1"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("Hopper-v5/2", "Reacher-v5/2"):
        (tmp_path / "mujoco_gamma/gamma-0.99" / name).mkdir(parents=True)
    for folder in tmp_path.glob("*/*/*/*"):
        (folder / "summary.json").touch()

    def load_run(folder: Path, setting: str | None = None) -> SimpleNamespace:
        return run(folder.parts[-2], setting or folder.parts[-3], int(folder.name), 0.0)

    monkeypatch.setattr(sweep, "load_run", load_run)
    monkeypatch.setattr(sweep, "stale", lambda job: "")
    runs, unfinished = sweep.load_runs(sweep.EXPERIMENTS["table1"], tmp_path / "table1")
    assert runs == [run("Hopper-v5", "none", 2, 0.0), run("Hopper-v5", "clip-0.2", 2, 0.0)]
    assert unfinished == []


def test_two_sweeps_may_write_the_script_at_once(
    sweep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, replace = tmp_path / "ppo.py", Path.replace

    def replace_second(temporary: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", replace)
        with monkeypatch.context() as other_process:
            other_process.setattr("os.getpid", lambda: 0)
            sweep.write_script(path, "text")
        return replace(temporary, target)

    monkeypatch.setattr(Path, "replace", replace_second)
    sweep.write_script(path, "text")
    assert path.read_text() == "text"
    assert list(tmp_path.iterdir()) == [path]
