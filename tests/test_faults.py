"""Faults around the algorithm: of simulators, signals, clocks, disks; what a user then reads."""

import dataclasses
import errno
import io
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

import faulty
import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import assert_whole, column, flags, metrics, run_main, start, summary, tiny, wait_for

import ppo
import ppo_continuous


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    faulty.events.clear()


# ---- which error is shown, and what survives it


@pytest.mark.parametrize(("name", "steps"), [("two-faults", 192), ("worn", 512)])
def test_the_first_error_is_the_last_thing_a_user_reads(
    name: str, steps: int, tmp_path: Path
) -> None:
    """In training and in the evaluation, though closing fails after it, too."""
    argv = flags(ppo, env_id=f"faulty:{name}-v0", run_dir="run", eval_episodes=2)
    process = start(ppo, argv, tmp_path)
    process.join(60)
    assert process.exitcode == 1
    says = (tmp_path / "stderr").read_text()
    assert says.endswith("\nValueError: joint 3 has left its range\n")
    assert "Traceback" in says and "in step" in says and "hung up" not in says
    assert column("run", "global_step")[-1] == steps
    assert Path("run/checkpoint.pt").exists()
    if name == "worn":  # a fault in the evaluation does not cost the figures of training
        results = summary("run")
        assert results["global_step"] == 512 and results["train_return_last100"] > 0
        assert results["eval_return_mean"] is results["eval_return_std"] is None
    else:
        assert not Path("run/summary.json").exists()


@pytest.mark.parametrize("at", ["obs", "reward"])
def test_infinity_in_the_evaluation_stops_it(at: str) -> None:
    """Training ends before step 15 of an episode, from which on it comes."""
    sizes = {"num_steps": 8, "total_timesteps": 32, "eval_episodes": 2}
    with pytest.raises(FloatingPointError, match="^NaN or infinity$"):
        ppo.train(tiny(ppo, env_id=f"faulty:{at}-inf-v0", run_dir="run", **sizes))
    assert summary("run")["global_step"] == 32
    assert summary("run")["eval_return_mean"] is None


def test_a_failing_first_reset_leaves_no_folder() -> None:
    with pytest.raises(RuntimeError, match="the battery is flat"):
        ppo.train(tiny(ppo, env_id="faulty:flat-v0", run_dir="run"))
    assert os.listdir() == []
    assert faulty.events == ["open"] * 4 + ["close"] * 4


# ---- what is acquired is released


def test_environments_of_training_are_closed_before_those_of_the_evaluation_are_built() -> None:
    """As some simulators allow a single instance."""
    ppo.train(tiny(ppo, env_id="faulty:fine-v0", run_dir="run", eval_episodes=2))
    evaluation = ["open"] * 2 + ["close"] * 2
    assert faulty.events == ["open"] * 4 + ["close"] * 4 + evaluation
    faulty.events.clear()
    run_main(ppo, "--evaluate", "run")
    assert faulty.events == evaluation


@pytest.mark.parametrize(
    ("name", "built", "says"),
    [
        ("third", 2, "no license for one more simulator"),
        ("turn", 1, "actions are Dict('turn': Discrete(2)), but ppo.py needs Discrete"),
        ("words", 1, "FilterObservation"),
    ],
)
def test_what_was_built_is_closed_where_the_rest_is_refused(
    name: str, built: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_main(ppo, *flags(ppo, env_id=f"faulty:{name}-v0"))
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--env-id faulty:{name}-v0" in error and says in error
    assert name != "words" or "'words'" in error  # the part that is at fault
    assert faulty.events == ["open"] * built + ["close"] * built
    assert os.listdir() == []


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("way", ["filtered", "empty"])
def test_observations_without_words_or_without_anything_train(way: str) -> None:
    ppo.train(tiny(ppo, env_id=f"faulty:{way}-v0", run_dir="run", norm_obs=True, eval_episodes=2))
    assert summary("run")["eval_episodes"] == 2


# ---- films


def films(folder: str | Path) -> set[Path]:
    return {path for path in Path(folder, "videos").rglob("*.mp4") if path.stat().st_size > 500}


def test_films_of_training_and_of_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a new run, of a resumed one, of what was saved; filming does not disturb training."""
    settings = {"env_id": "faulty:fine-v0", "total_timesteps": 128}
    monkeypatch.setattr(time, "time", itertools.count(10**9).__next__)
    seen = films(run := ppo.train(tiny(ppo, capture_video=True, **settings)))
    plain = ppo.train(tiny(ppo, **settings))
    assert seen and metrics(run) == metrics(plain) and not films(plain)
    for words in (["--resume", run, "--total-timesteps", 192], ["--evaluate", run]):
        run_main(ppo, *words, "--capture-video", "--eval-episodes", 1)
        assert films(run) > seen
        seen = films(run)
    assert films(ppo_continuous.train(tiny(ppo_continuous, capture_video=True)))


def test_only_the_first_process_films(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    ppo.train(tiny(ppo, env_id="faulty:fine-v0", capture_video=True))
    assert os.listdir() == [] and "frame" not in faulty.events


def test_films_have_a_maximal_length() -> None:
    settings = {"num_envs": 2, "num_steps": 512, "total_timesteps": 3072, "capture_video": True}
    folder = ppo.train(tiny(ppo, env_id="faulty:endless-v0", **settings))
    assert len(films(folder)) == 1 and faulty.events.count("frame") == 1001


# ---- working directory, clocks, disks


@pytest.mark.parametrize("at", ["init", "reset"])
def test_an_environment_may_change_the_working_directory(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = flags(ppo, env_id=f"faulty:chdir-{at}-v0", run_dir="run", eval_episodes=1)
    resume = ["--resume", "run", "--total-timesteps", 576]
    for words in (argv, resume, ["--evaluate", "run"]):
        run_main(ppo, *words)
        assert Path.cwd() == Path("/")
        monkeypatch.chdir(tmp_path)
    assert len(metrics("run")) == 9 and summary("run")["eval_episodes"] == 1
    assert os.listdir() == ["run"]


@pytest.mark.parametrize(("iteration", "saving"), [(3, 0.1), (0.6, 0.01)])
def test_durations_ignore_a_wall_clock_that_goes_back(
    iteration: float, saving: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1% of the time for saving allows it every 10 s, and it need not be less than 2 s."""
    clock = {"steady": 100.0, "wall": 1e9}
    saves, real_save, real_gae = [], torch.save, ppo.compute_gae

    def save(*args: object) -> None:
        saves.append(len(metrics("run")))
        clock["steady"] += saving
        real_save(*args)

    def compute_gae(*args: object) -> tuple:
        clock["steady"] += iteration
        clock["wall"] -= 3600
        return real_gae(*args)

    monkeypatch.setattr(time, "monotonic", lambda: clock["steady"])
    monkeypatch.setattr(time, "time", lambda: clock["wall"])
    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(ppo, "compute_gae", compute_gae)
    ppo.train(tiny(ppo, run_dir="run"))
    assert saves == [1, 5, 8]
    saved = [0, 1, 1, 1, 1, 2, 2, 2]  # so often before the row was written
    expected = [(i + 1) * iteration + n * saving for i, n in enumerate(saved)]
    assert column("run", "wall_time") == pytest.approx(expected)
    assert column("run", "charts/SPS")[0] == round(64 / iteration)


def test_a_coarse_clock_is_no_division_by_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    folder = ppo.train(tiny(ppo, eval_episodes=1))
    assert len(metrics(folder)) == 8 and summary(folder, times=True)["wall_time"] == 0


def test_a_save_that_fails_once_is_made_up_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """os.replace does on Windows while a virus scanner reads the file."""
    real, calls = os.replace, []

    def replace(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 1:
            raise PermissionError(13, "Access is denied")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    ppo.train(tiny(ppo, run_dir="run"))
    error = capsys.readouterr().err
    assert "Access is denied" in error and os.path.join("run", "checkpoint.pt") in error
    assert ppo.restore("run", {})["state"]["global_step"] == 512
    assert not list(Path("run").glob("*.tmp"))


@pytest.mark.parametrize("missing", [1_000, 30_000])
def test_a_full_disk_costs_no_earlier_checkpoint(missing: int, tmp_path: Path) -> None:
    """Files may grow to less than a checkpoint: it is not replaced, and said which was not."""
    ppo.train(tiny(ppo, run_dir="run"))
    good = Path("run/checkpoint.pt").read_bytes()
    argv = ["--resume", "run", "--total-timesteps", "1024"]
    start(ppo, argv, tmp_path, file_limit=len(good) - missing).join(60)
    error = (tmp_path / "stderr").read_text().splitlines()[0]
    assert "(disk full?): " in error and str(tmp_path / "run" / "checkpoint.pt") in error
    assert Path("run/checkpoint.pt").read_bytes() == good
    run_main(ppo, *argv)  # with room again
    assert_whole("run", 1024)


def test_a_first_save_that_fails_is_made_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """config.json and script.py are written once."""
    writes, write_bytes = [], Path.write_bytes

    def failing_once(path: Path, content: bytes) -> int:
        writes.append(path)
        if len(writes) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", failing_once)
    ppo.train(tiny(ppo, run_dir="run"))
    assert Path("run/script.py").read_bytes() == Path(ppo.__file__).read_bytes()


def test_a_file_that_cannot_grow_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ppo.compute_gae

    def compute_gae(*args: object) -> tuple:
        Path("run/metrics.csv").unlink(missing_ok=True)
        Path("run/metrics.csv").symlink_to("/dev/full")
        return real(*args)

    monkeypatch.setattr(ppo, "compute_gae", compute_gae)
    with pytest.raises(OSError, match="No space left"):
        ppo.train(tiny(ppo, run_dir="run"))


def test_a_closed_terminal_costs_no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of `python ppo.py | head -1`: the line that cannot be printed comes after the save."""

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            if text.startswith("step 64,"):
                raise BrokenPipeError
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(BrokenPipeError):
        ppo.train(tiny(ppo, run_dir="run"))
    assert ppo.restore("run", {})["state"]["global_step"] == 64


def test_numpy_numbers_in_the_saved_state_become_plain_ones() -> None:
    """Or torch.load, which runs no code of a checkpoint, would refuse it."""
    numbers = {"a": np.float32(0.5), "b": np.int64(7), "c": np.arange(3), "d": np.float64(1.5)}
    state = {"wall_time": 0.0, "files": {}, "columns": {}, "episodes": [(np.float32(2), 3)]}
    log = ppo.Log(tiny(ppo), Path("run").absolute(), state | numbers)
    log.save({})
    saved = ppo.restore("run", {})["state"]
    assert [saved[name] for name in "abcd"] == [0.5, 7, [0, 1, 2], 1.5]
    assert saved["episodes"] == [[2, 3]] and type(saved["a"]) is float


def test_numpy_numbers_in_the_arguments_train_and_resume() -> None:
    """As of a sweep over np.logspace and np.arange."""
    args = tiny(ppo, run_dir="run", learning_rate=np.float64(1e-3), seed=np.int64(3))
    ppo.train(args)
    assert ppo.restore("run", {})["args"] == dataclasses.asdict(args) | {"run_dir": None}
    assert json.loads(Path("run/config.json").read_text())["seed"] == 3


@pytest.mark.slow
def test_an_evaluation_that_does_not_end_is_cut_at_27_000_steps_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ppo, "evaluation_action", lambda dist: 0 * dist.argmax(dim=-1))  # pays 1
    args = tiny(ppo, env_id="faulty:endless-v0", eval_episodes=2)
    results = summary(ppo.train(args))
    assert results["eval_episodes"] == 2 and results["eval_return_mean"] == 27_000
    assert "evaluation: 2 episodes cut at 27,000 steps" in capsys.readouterr().out


# ---- signals


@pytest.mark.parametrize(
    ("number", "code", "during"),
    [
        (signal.SIGINT, 130, "training"),
        (signal.SIGTERM, 143, "training"),
        (signal.SIGINT, 130, "evaluation"),
    ],
)
def test_a_signal_ends_the_run_at_once_with_one_line(
    number: int, code: int, during: str, tmp_path: Path
) -> None:
    """Though the environments' processes, which have to be asked to close, got it as well."""
    total = 64 if during == "evaluation" else 10**8
    argv = flags(ppo, env_id="faulty:piped-v0", run_dir="run", total_timesteps=total)
    process = start(ppo, [*argv, "--eval-episodes", "4"], tmp_path)
    last = {"training": "checkpoint.pt", "evaluation": "summary.json"}[during]
    wait_for(lambda: Path("run", last).exists())
    time.sleep(0.2)
    os.killpg(process.pid, number)
    process.join(60)
    assert process.exitcode == code
    message = (tmp_path / "stderr").read_text()
    assert message.startswith("stopped; --resume continues from the checkpoint, if any")
    assert message.count("\n") == 1
    done = ppo.restore("run", {})["state"]["global_step"]
    run_main(ppo, "--resume", "run", "--total-timesteps", done + 64, "--eval-episodes", 0)
    assert column("run", "global_step") == list(range(64, done + 65, 64))
    assert summary("run")["global_step"] == done + 64


@pytest.mark.parametrize(
    ("owner", "name", "events"), [(ppo, "evaluation_action", ["open", "close"]), (gym, "make", [])]
)
def test_a_signal_in_evaluate_closes_what_is_open_and_leaves_one_line(
    owner: ModuleType,
    name: str,
    events: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ppo.train(tiny(ppo, env_id="faulty:fine-v0", run_dir="run"))
    monkeypatch.setattr(owner, name, lambda *_, **__: signal.raise_signal(signal.SIGINT))
    faulty.events.clear()
    capsys.readouterr()
    with pytest.raises(SystemExit, match="130"):
        run_main(ppo, "--evaluate", "run", "--eval-episodes", 1)
    assert capsys.readouterr().err.count("\n") == 1
    assert faulty.events == events
