"""Runs that are killed, interrupted, resumed, evaluated, filmed, tracked; faults of all kinds."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from importlib import machinery
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import SCRIPTS, column, flags, metrics, read_csv, start, tiny, wait_for

import ppo
import ppo_continuous

scripts = pytest.mark.parametrize("script", SCRIPTS, ids=[s.__name__ for s in SCRIPTS])
Main = Callable[..., str]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """Call main() with a command line; returns what it says on stdout."""

    def run(script: ModuleType, *argv: object) -> str:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, argv)])
        script.main()
        return capsys.readouterr().out

    return run


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def weights(folder: str | Path, script: ModuleType) -> dict[str, torch.Tensor]:
    return script.load_checkpoint(str(folder))["agent"]


def assert_same_weights(script: ModuleType, one: str | Path, other: str | Path) -> None:
    first, second = weights(one, script), weights(other, script)
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def assert_whole(folder: Path, batch: int, total: int) -> None:
    """Each row once and in order, in both files, and no line that is empty or cut off."""
    assert column(folder, "global_step") == list(range(batch, total // batch * batch + 1, batch))
    times = column(folder, "wall_time")
    assert times == sorted(times)
    for name in ("metrics.csv", "episodes.csv"):
        text = (folder / name).read_text()
        commas = {line.count(",") for line in text.splitlines()}
        assert text.endswith("\n") and len(commas) == 1, f"{name}: {commas}"
    steps = [int(row["global_step"]) for row in read_csv(folder / "episodes.csv")]
    assert steps == sorted(steps)


# ---- resuming


@scripts
def test_resume_with_more_steps(script: ModuleType, run_main: Main) -> None:
    folder = Path(script.train(tiny(script, norm_obs=True, norm_reward=True)))
    before = {name: (folder / name).read_text() for name in ("metrics.csv", "episodes.csv")}
    for path in (folder, folder / "checkpoint.pt"):
        total = 1024 if path is folder else 1536
        out = run_main(script, "--resume", path, "--total-timesteps", total)
        assert str(folder) in out
        assert_whole(folder, 64, total)
        for name, text in before.items():
            assert (folder / name).read_text().startswith(text)
    assert json.loads((folder / "config.json").read_text())["total_timesteps"] == 1536
    assert json.loads((folder / "summary.json").read_text())["global_step"] == 1536
    assert not list(folder.glob("*.tmp"))


@scripts
def test_resume_in_a_notebook(script: ModuleType) -> None:
    folder = Path(script.train(tiny(script)))
    again = script.train(script.Args(resume=str(folder), total_timesteps=1024))
    assert Path(again) == folder
    assert_whole(folder, 64, 1024)


@scripts
def test_resume_of_a_finished_run_only_evaluates(script: ModuleType, run_main: Main) -> None:
    """So does that of a run which was killed between its last checkpoint and summary.json."""
    folder = Path(script.train(tiny(script, eval_episodes=2)))
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").unlink()
    rows = metrics(folder, times=True)
    run_main(script, "--resume", folder)
    again = json.loads((folder / "summary.json").read_text())
    for name in summary.keys() - {"wall_time", "SPS"}:
        assert again[name] == summary[name]
    assert again["wall_time"] == pytest.approx(summary["wall_time"], abs=0.5)
    assert metrics(folder, times=True) == rows


@scripts
def test_resume_restores_what_a_reader_adds_and_refuses_what_has_it_not(
    script: ModuleType, run_main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = []

    class More(script.Run):
        def __init__(self, *args: object, **modules: object) -> None:
            added.append(torch.nn.Linear(2, 2))
            super().__init__(*args, **modules, curiosity=added[-1])

    plain = script.train(tiny(script))
    monkeypatch.setattr(script, "Run", More)
    folder = script.train(tiny(script))
    run_main(script, "--resume", folder, "--total-timesteps", 1024)
    assert torch.equal(added[0].weight, added[1].weight)
    with pytest.raises(ValueError, match="no Linear that fits: it is of another network or script"):
        script.train(script.Args(resume=plain, cuda=False))


@scripts
def test_two_resumes_are_bit_identical(script: ModuleType, run_main: Main) -> None:
    settings = {"norm_obs": True, "norm_reward": True, "eval_episodes": 2}
    settings |= {"surrogate": "kl-adaptive", "num_steps": 64}
    script.train(tiny(script, run_dir="first", **settings))
    shutil.copytree("first", "second")
    for folder in ("first", "second"):
        run_main(script, "--resume", folder, "--total-timesteps", 1536)
    assert metrics("first") == metrics("second")
    assert len(metrics("first")) == 6
    assert_same_weights(script, "first", "second")
    summaries = [json.loads(Path(f, "summary.json").read_text()) for f in ("first", "second")]
    for name in summaries[0].keys() - {"wall_time", "SPS"}:
        assert summaries[0][name] == summaries[1][name]
    # It is the first leg that goes on: beta, the means over 100 episodes.
    betas = column("first", "losses/kl_coef")
    assert all(b / a in (0.5, 1.0, 2.0) for a, b in zip(betas, betas[1:], strict=False))


@scripts
def test_a_resumed_run_does_not_repeat_its_first_leg(script: ModuleType, run_main: Main) -> None:
    """Environments start from seeds that the first leg has not used."""
    settings = {"learning_rate": 1e-12, "anneal_lr": False, "num_steps": 64}
    folder = script.train(tiny(script, **settings))
    run_main(script, "--resume", folder, "--total-timesteps", 1024)
    losses = column(folder, "losses/value_loss")
    assert len(losses) == 4
    assert len({round(loss, 4) for loss in losses}) == 4


@pytest.mark.parametrize("flag", ["--gamma", "--seed"])
def test_contradicting_flag_leaves_the_run_alone(
    flag: str, run_main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(ppo.train(tiny(ppo, gamma=0.9, seed=5)))
    before = folder_bytes(folder)
    with pytest.raises(SystemExit) as stop:
        run_main(ppo, "--resume", folder, flag, 0)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert flag in err and len(err.splitlines()) == 1
    assert folder_bytes(folder) == before
    # The run's own value, said again, contradicts nothing.
    value = {"--gamma": 0.9, "--seed": 5}[flag]
    run_main(ppo, "--resume", folder, flag, value, "--total-timesteps", 576)
    assert_whole(folder, 64, 576)


def test_a_default_given_anew_contradicts_too(
    run_main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    """--gamma 0.98 is what ppo.py does by itself, but not what this run did."""
    folder = ppo.train(tiny(ppo, gamma=0.9))
    with pytest.raises(SystemExit) as stop:
        run_main(ppo, "--resume", folder, "--gamma", ppo.Args.gamma)
    assert stop.value.code == 2
    assert "--gamma" in capsys.readouterr().err


# ---- evaluating


@scripts
@pytest.mark.parametrize("norm", [False, True], ids=["raw", "normalised"])
def test_evaluate_repeats_the_summary(script: ModuleType, norm: bool, run_main: Main) -> None:
    args = tiny(script, eval_episodes=3, norm_obs=norm, norm_reward=norm, num_steps=64, seed=6)
    folder = Path(script.train(args))
    kept = {"summary.json", "metrics.csv", "episodes.csv", "checkpoint.pt", "config.json"}
    before = {k: v for k, v in folder_bytes(folder).items() if k in kept}
    summary = json.loads((folder / "summary.json").read_text())
    last = run_main(script, "--evaluate", folder).splitlines()[-1]
    names = ("eval_return_mean", "eval_return_std", "eval_episodes")
    assert last == " ".join(f"{name}={summary[name]}" for name in names)
    result = json.loads((folder / "evaluation.json").read_text())
    assert {name: result[name] for name in names} == {name: summary[name] for name in names}
    assert len(result["returns"]) == len(result["lengths"]) == 3
    assert sum(result["returns"]) / 3 == pytest.approx(summary["eval_return_mean"])
    assert result["lengths"] == ([200] * 3 if script is ppo_continuous else result["returns"])
    assert {k: v for k, v in folder_bytes(folder).items() if k in kept} == before
    # Again, from the file, and with numbers of its own.
    assert run_main(script, "--evaluate", folder / "checkpoint.pt").splitlines()[-1] == last
    out = run_main(script, "--evaluate", folder, "--eval-episodes", 5, "--seed", 77)
    assert out.splitlines()[-1].endswith("eval_episodes=5")
    other = json.loads((folder / "evaluation.json").read_text())
    assert len(other["returns"]) == 5 and other["returns"][:3] != result["returns"]


@scripts
def test_evaluation_needs_the_saved_statistics(script: ModuleType, run_main: Main) -> None:
    """The saved weights alone are another agent: it takes the statistics to be the saved one."""
    folder = script.train(tiny(script, norm_obs=True, total_timesteps=2048))
    args = script.Args(**script.load_checkpoint(folder)["args"])
    envs = script.make_envs(args, 1)
    whole, bare = script.Agent(envs), script.Agent(envs)
    saved = weights(folder, script)
    whole.load_state_dict(saved)
    bare.load_state_dict({n: x for n, x in saved.items() if "obs_stats" not in n}, strict=False)
    obs = torch.randn(50, envs.single_observation_space.shape[0])
    mean, std = saved["obs_stats.mean"], saved["obs_stats.var"].add(1e-8).sqrt()
    normalized = ((obs - mean) / std).clamp(-10, 10).float()
    torch.testing.assert_close(whole.get_value(obs), bare.get_value(normalized))
    assert (whole.get_value(obs) - bare.get_value(obs)).abs().max() > 0.01


# ---- kills


def killed(process: BaseProcess, folder: Path, seconds: float) -> None:
    """Kill -9 so long after the first checkpoint that this process writes."""
    checkpoint = folder / "checkpoint.pt"
    old = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    wait_for(
        lambda: (
            not process.is_alive() or (checkpoint.exists() and checkpoint.stat().st_mtime_ns != old)
        )
    )
    time.sleep(seconds)
    process.kill()
    process.join(60)


@pytest.mark.parametrize(
    "script",
    [ppo, pytest.param(ppo_continuous, marks=pytest.mark.slow)],
    ids=["ppo", "ppo_continuous"],
)
def test_kill_at_random_moments(script: ModuleType, tmp_path: Path, run_main: Main) -> None:
    """Six kills of one run, two of them inside the writing of a checkpoint; no row is lost."""
    chance = random.Random(1)
    folder, batch = tmp_path / "run", 64
    total = 60_000
    first = flags(script, run_dir=folder, total_timesteps=total, norm_obs=True)
    kept: list[str] = []
    for number, die_at in enumerate([None, "fsync", None, "replace", None, None]):
        argv = first if number == 0 else ["--resume", str(folder), "--total-timesteps", str(total)]
        process = start(script, argv, tmp_path / "out", die_at=die_at)
        if die_at:
            process.join(60)
        else:
            killed(process, folder, chance.uniform(0, 0.6))
        says = (tmp_path / "out" / "stderr").read_text()
        assert process.exitcode == -signal.SIGKILL, says
        assert says == ""
        # What the checkpoint counts on is there, and what was there at the last one still is.
        done = script.load_checkpoint(str(folder))["progress"]["global_step"]
        rows = (folder / "metrics.csv").read_text().splitlines()
        assert len(rows) > done // batch
        assert rows[: len(kept)] == kept
        kept = rows[: done // batch + 1]
        total = done // batch * batch + 60_000
    total = len(kept) * batch + 640
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    checkpoint["args"]["total_timesteps"] = total  # as it may not shrink on the command line
    torch.save(checkpoint, folder / "checkpoint.pt")
    run_main(script, "--resume", folder)
    assert_whole(folder, batch, total)
    assert (folder / "metrics.csv").read_text().splitlines()[: len(kept)] == kept
    assert (folder / "summary.json").exists()
    assert not list(folder.glob("*.tmp"))


# ---- signals


@scripts
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_say_how_to_resume(
    script: ModuleType, number: int, code: int, tmp_path: Path, run_main: Main
) -> None:
    folder, out = tmp_path / "run", tmp_path / "out"
    process = start(script, flags(script, run_dir=folder, total_timesteps=10**6), out)
    wait_for(lambda: (folder / "checkpoint.pt").exists())
    time.sleep(0.2)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code
    lines = (out / "stderr").read_text().split("\n")
    assert lines == ["", "stopping soon; a second time stops at once and saves nothing", ""]
    assert f"--resume {folder}" in (out / "stdout").read_text().splitlines()[-1]
    assert not (folder / "summary.json").exists()
    # The iteration was finished and saved: resuming cuts nothing off.
    done = script.load_checkpoint(str(folder))["progress"]["global_step"]
    assert column(folder, "global_step")[-1] == done
    rows = metrics(folder, times=True)
    process = start(script, ["--resume", str(folder)], out)
    wait_for(lambda: len(metrics(folder)) > len(rows))
    process.kill()
    process.join(60)
    assert metrics(folder, times=True)[: len(rows)] == rows


def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    # An iteration takes 40 s.
    argv = flags(ppo, env_id="envs:Bad-slow-v0", run_dir=folder, num_steps=500, num_minibatches=1)
    process = start(ppo, [*argv, "--total-timesteps", "100000"], tmp_path / "out")
    wait_for((folder / "metrics.csv").exists)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(5)
    assert process.exitcode not in (None, 0)


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    ppo.train(tiny(ppo))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@scripts
def test_a_signal_is_heeded_where_stderr_is_closed(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `2>&1 | tee log`, where Ctrl-C ends tee as well."""
    args, real = tiny(script), os.write

    def write(file: int, content: bytes) -> int:
        if file == 2:
            raise BrokenPipeError(32, "Broken pipe")
        return real(file, content)

    monkeypatch.setattr(os, "write", write)
    record = script.Run.record

    def interrupted(run: object, metrics: dict[str, float], last: bool) -> None:
        record(run, metrics, last)
        if run.iteration == 2:
            signal.raise_signal(signal.SIGINT)  # in this thread, at once

    monkeypatch.setattr(script.Run, "record", interrupted)
    with pytest.raises(SystemExit) as stop:
        script.train(args)
    assert stop.value.code == 130
    assert len(metrics(args.run_dir)) == 3  # the iteration under way is finished
    assert script.load_checkpoint(args.run_dir)["progress"]["iteration"] == 3


@scripts
def test_the_summary_of_a_run_that_went_on_is_not_kept(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(script.train(tiny(script)))
    assert (folder / "summary.json").exists()
    monkeypatch.setattr(script, "compute_gae", None)  # a fault in the first iteration
    with pytest.raises(RuntimeError):
        script.train(script.Args(resume=str(folder), total_timesteps=1024))
    assert not (folder / "summary.json").exists()


# ---- faults


@scripts
@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("obs", "'observation[3, 0, 0]"),
        ("final", "final_observation[0, 0]"),
        ("reward", "reward[1, 0]"),
        ("infinite", "reward[1, 0]"),
        ("step", "the wheel came off"),
        ("reset", "the battery is flat"),
    ],
)
def test_faults_of_the_environment(
    script: ModuleType, way: str, words: str, run_main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    """From step 50 of each environment on, in iteration 4; three iterations are kept.

    Step 50 is row 1 of that batch. It ends an episode: the first bad observation is that of row 3.
    """
    box = "Box" if script is ppo_continuous else ""
    argv = flags(script, env_id=f"envs:Bad{box}-{way}-v0", run_dir="run", norm_obs=True)
    with pytest.raises(SystemExit) as stop:
        run_main(script, *argv)
    assert stop.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error
    # What is found in a batch is named with the batch's last step.
    iteration, step = {"reset": (0, 0), "step": (4, 192)}.get(way, (4, 256))
    assert f"iteration {iteration}" in error and f"step {step}" in error
    if way in ("obs", "final", "reward", "infinite"):
        assert "NaN or infinite" in error
    assert Path("run/config.json").exists()
    assert len(metrics("run")) == max(iteration - 1, 0)
    if iteration:
        checkpoint = script.load_checkpoint("run")
        tensors = [x for x in checkpoint["agent"].values() if x.is_floating_point()]
        assert not any(x.isnan().any() for x in tensors)
        assert len(read_csv("run/episodes.csv")) >= 4 * 4
    assert not Path("run/summary.json").exists()


@scripts
def test_an_environment_that_cannot_be_closed_names_the_step(
    script: ModuleType, run_main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    """BrokenPipeError is an OSError, and yet no bad input."""
    box = "Box" if script is ppo_continuous else ""
    with pytest.raises(SystemExit) as stop:
        run_main(script, *flags(script, env_id=f"envs:Bad{box}-close-v0", run_dir="run"))
    assert stop.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: iteration 8, after step 512: BrokenPipeError")
    assert "files in run" in error and len(metrics("run")) == 8


@scripts
def test_train_raises_what_failed(script: ModuleType) -> None:
    box = "Box" if script is ppo_continuous else ""
    with pytest.raises(RuntimeError, match="iteration 4.*the wheel came off") as caught:
        script.train(tiny(script, env_id=f"envs:Bad{box}-step-v0"))
    assert isinstance(caught.value.__cause__, ValueError)


@scripts
def test_weights_that_overflow_stop_the_run(script: ModuleType) -> None:
    """A NaN loss or gradient is found before the weights are touched by it."""
    settings = {"learning_rate": 1e30, "max_grad_norm": 1e30, "norm_adv": False}
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        script.train(tiny(script, run_dir="run", total_timesteps=6400, **settings))
    path = Path("run/checkpoint.pt")
    if path.exists():
        assert all(not x.isnan().any() for x in weights("run", script).values())


@scripts
def test_disk_full(script: ModuleType, tmp_path: Path) -> None:
    """Files may grow a little less than a checkpoint: the next one fails, the good one stays."""
    folder, out = Path(script.train(tiny(script, run_dir=str(tmp_path / "run")))), tmp_path / "out"
    good = (folder / "checkpoint.pt").read_bytes()
    limit = len(good) - 1000
    argv = ["--resume", str(folder), "--total-timesteps", "100000"]
    process = start(script, argv, out, file_limit=limit)
    process.join(60)
    assert process.exitcode == 1
    err = (out / "stderr").read_text()
    assert len(err.splitlines()) == 1 and "File too large" in err
    assert "step" in err and str(folder) in err
    assert (folder / "checkpoint.pt").read_bytes() == good
    rows = column(folder, "global_step")
    assert rows == [64 * (i + 1) for i in range(len(rows))] and len(rows) >= 8
    # With room again, it goes on.
    process = start(script, ["--resume", str(folder), "--total-timesteps", "1024"], out)
    process.join(60)
    assert process.exitcode == 0
    assert_whole(folder, 64, 1024)


@pytest.mark.slow
def test_disk_full_while_rows_are_written(tmp_path: Path) -> None:
    """A metrics.csv that can no longer grow ends the run; the checkpoint before it loads."""
    folder, out = tmp_path / "run", tmp_path / "out"
    settings = {"num_envs": 2, "num_steps": 4, "num_minibatches": 1, "update_epochs": 1}
    argv = flags(ppo, run_dir=folder, total_timesteps=10**6, **settings)
    process = start(ppo, argv, out, file_limit=200_000)
    process.join(120)
    assert process.exitcode == 1
    err = (out / "stderr").read_text()
    assert len(err.splitlines()) == 1 and "File too large" in err
    ppo.load_checkpoint(str(folder))
    process = start(ppo, ["--resume", str(folder)], out)
    wait_for(lambda: (folder / "metrics.csv").stat().st_size > 210_000)
    process.kill()
    process.join(60)
    steps = column(folder, "global_step")[:-1]
    assert steps == [8.0 * (i + 1) for i in range(len(steps))]


@scripts
def test_a_deleted_run_folder_ends_the_run(script: ModuleType, tmp_path: Path) -> None:
    folder, out = tmp_path / "run", tmp_path / "out"
    process = start(script, flags(script, run_dir=folder, total_timesteps=10**6), out)
    wait_for(lambda: (folder / "checkpoint.pt").exists())
    shutil.rmtree(folder)
    process.join(60)
    assert process.exitcode == 1
    err = (out / "stderr").read_text()
    assert len(err.splitlines()) == 1 and str(folder) in err


# ---- wandb


class Tracker(ModuleType):
    """Stands in for wandb, and is gone after the third row."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = machinery.ModuleSpec("wandb", None)
        self.rows: list[dict] = []
        self.options: dict = {}
        self.summary: dict = {}
        self.exit_code: int | None = None

    def init(self, **options: object) -> "Tracker":
        self.options = options
        return self

    def define_metric(self, *args: object, **kwargs: object) -> None:
        pass

    def log_code(self, *args: object, **kwargs: object) -> None:
        pass

    def Video(self, path: str) -> str:  # noqa: N802
        return path

    def log(self, row: dict, **kwargs: object) -> None:
        assert not kwargs  # step= would drop the rows of a resumed run
        if len(self.rows) == 3:
            raise ConnectionError("no route to host")
        self.rows.append(row)

    def finish(self, exit_code: int | None = None) -> None:
        self.exit_code = exit_code


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Tracker:
    module = Tracker()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@scripts
def test_training_goes_on_without_wandb(
    script: ModuleType, tracker: Tracker, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = script.train(tiny(script, track=True, wandb_project_name="p", wandb_entity="e"))
    assert len(metrics(folder)) == 8
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "wandb" in err and "no route to host" in err
    assert len(tracker.rows) == 3
    assert set(tracker.rows[0]) == set(metrics(folder, times=True)[0])
    assert tracker.options["project"] == "p" and tracker.options["entity"] == "e"
    assert tracker.options["config"]["env_id"] == tiny(script).env_id


@scripts
def test_a_crash_is_marked_in_wandb_and_a_resumed_run_continues_it(
    script: ModuleType, tracker: Tracker, run_main: Main
) -> None:
    box = "Box" if script is ppo_continuous else ""
    with pytest.raises(RuntimeError):
        script.train(tiny(script, env_id=f"envs:Bad{box}-step-v0", track=True))
    assert tracker.exit_code == 1
    tracker.rows.clear()
    folder = script.train(tiny(script, track=True, total_timesteps=128))
    assert tracker.exit_code == 0
    wandb_id = tracker.options["id"]
    assert tracker.summary == json.loads(Path(folder, "summary.json").read_text())
    run_main(script, "--resume", folder, "--total-timesteps", 192)
    assert tracker.options["id"] == wandb_id
    assert tracker.options["resume"]


@scripts
def test_wandb_that_goes_away_in_the_end_leaves_a_finished_run(
    script: ModuleType, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish(exit_code: int | None = None) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tracker, "finish", finish)
    folder = script.train(tiny(script, track=True, total_timesteps=128))
    assert Path(folder, "summary.json").exists()


@scripts
def test_a_wandb_that_does_not_start_is_named(
    script: ModuleType, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**options: object) -> Tracker:
        raise RuntimeError("project p\n  is not yours\n")

    monkeypatch.setattr(tracker, "init", init)
    with pytest.raises(ValueError, match=r"^--track True: project p is not yours$"):
        script.train(tiny(script, track=True))


@pytest.mark.slow
def test_tracking_without_an_account_is_refused(tmp_path: Path) -> None:
    environ = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": str(tmp_path)}
    argv = [*flags(ppo, run_dir=tmp_path / "run"), "--track"]
    process = start(ppo, argv, tmp_path / "out", environ)
    process.join(120)
    assert process.exitcode == 2
    err = (tmp_path / "out" / "stderr").read_text()
    assert len(err.splitlines()) == 1
    assert err.startswith("error: --track True: ") and "wandb login" in err


@pytest.mark.slow
@scripts
def test_wandb_offline(script: ModuleType, tmp_path: Path) -> None:
    environ = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path / "w")}
    argv = [*flags(script, run_dir=tmp_path / "run"), "--track"]
    process = start(script, argv, tmp_path / "out", environ)
    process.join(120)
    err = (tmp_path / "out" / "stderr").read_text()
    assert process.exitcode == 0 and "warn" not in err.lower(), err
    (stored,) = tmp_path.rglob("run-*.wandb")
    content = stored.read_bytes()
    assert all(name in content for name in (b"losses/value_loss", b"script.py", b"eval_return_std"))
    assert len(metrics(tmp_path / "run")) == 8


@pytest.mark.slow
def test_films_reach_wandb_once(tmp_path: Path) -> None:
    environ = {"WANDB_MODE": "offline"}
    first = [*flags(ppo, run_dir=tmp_path / "run"), "--track", "--capture-video"]
    second = ["--resume", str(tmp_path / "run"), "--total-timesteps", "1024"]
    for number, argv in enumerate((first, second)):
        before = videos(tmp_path / "run")
        process = start(ppo, argv, tmp_path / f"out-{number}", environ)
        process.join(120)
        err = (tmp_path / f"out-{number}" / "stderr").read_text()
        assert process.exitcode == 0 and "warn" not in err.lower(), err
        films = [path.read_bytes() for path in videos(tmp_path / "run") if path not in before]
        (sent,) = (tmp_path / "run" / "wandb" / "latest-run").glob("files/media/videos")
        assert films
        assert sorted(path.read_bytes() for path in sent.rglob("*.mp4")) == sorted(films)


# ---- found by reading


@scripts
def test_a_flag_given_as_its_default_is_heeded_on_resuming(
    script: ModuleType, run_main: Main
) -> None:
    """Also in evaluation. It differs from the checkpoint's, though not from the script's own."""
    default = script.Args().torch_threads
    folder = Path(script.train(tiny(script, torch_threads=2)))
    run_main(script, "--resume", folder, "--torch-threads", default, "--total-timesteps", 576)
    assert json.loads((folder / "config.json").read_text())["torch_threads"] == default
    assert len(metrics(folder)) == 9
    torch.set_num_threads(2)
    run_main(script, "--evaluate", folder, "--torch-threads", default, "--eval-episodes", 1)
    assert torch.get_num_threads() == default


@scripts
def test_a_tracked_run_without_wandb(
    script: ModuleType, tracker: Tracker, run_main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = script.train(tiny(script, track=True, wandb_project_name="p"))
    monkeypatch.delitem(sys.modules, "wandb")
    real = script.importlib.util.find_spec
    monkeypatch.setattr(
        script.importlib.util, "find_spec", lambda name: real(name) if name != "wandb" else None
    )
    assert "eval_return_mean=" in run_main(script, "--evaluate", folder, "--eval-episodes", 1)
    run_main(script, "--resume", folder, "--no-track", "--total-timesteps", 576)
    assert len(metrics(folder)) == 9


@scripts
def test_a_failure_outside_the_loop_shows_where(
    script: ModuleType,
    run_main: Main,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def no_memory(*args: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(script, "Agent", no_memory)
    with pytest.raises(SystemExit, match="1"):
        run_main(script, *flags(script))
    err = capsys.readouterr().err
    assert "in no_memory" in err and err.endswith("error: out of memory\n")


@scripts
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_evaluation_too(
    script: ModuleType,
    number: int,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """At its second step. --resume then makes up for it, as if nothing had been."""
    script.train(tiny(script, run_dir="whole", eval_episodes=2))
    whole = json.loads(Path("whole/summary.json").read_text())
    act, acted = script.Agent.act, []

    def interrupted(*args: object) -> torch.Tensor:
        if len(acted) == 1:
            signal.raise_signal(number)  # in this thread, at once
        acted.append(args)
        return act(*args)

    with monkeypatch.context() as patch:
        patch.setattr(script.Agent, "act", interrupted)
        with pytest.raises(SystemExit) as stop:
            script.train(tiny(script, run_dir="run", eval_episodes=2))
    assert stop.value.code == code
    assert len(acted) == 2
    assert capfd.readouterr().out.endswith("stopped; go on with --resume run\n")
    assert not Path("run/summary.json").exists()
    script.train(script.Args(resume="run"))
    again = json.loads(Path("run/summary.json").read_text())
    for name in whole.keys() - {"wall_time", "SPS"}:
        assert again[name] == whole[name]


@scripts
def test_a_signal_after_the_evaluation_leaves_a_finished_run(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While summary.json is written, there is nothing left to go on with."""
    write = script.write

    def interrupted(path: Path, content: bytes) -> None:
        if path.name == "summary.json":
            signal.raise_signal(signal.SIGTERM)  # in this thread, at once
        write(path, content)

    monkeypatch.setattr(script, "write", interrupted)
    folder = Path(script.train(tiny(script, eval_episodes=1)))
    assert json.loads((folder / "summary.json").read_text())["eval_episodes"] == 1


@scripts
def test_ctrl_c_in_evaluate_leaves_without_a_traceback(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    run_main: Main,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = script.train(tiny(script))

    def interrupted(*args: object) -> None:
        signal.raise_signal(signal.SIGINT)  # in this thread, at once

    monkeypatch.setattr(script.Agent, "act", interrupted)
    capsys.readouterr()
    # Python's own handler: a shell's background jobs inherit that Ctrl-C is ignored
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stop:
            run_main(script, "--evaluate", folder, "--eval-episodes", 2)
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert stop.value.code == 130
    assert capsys.readouterr().err == ""


@scripts
def test_evaluate_says_the_score_before_it_fails_to_write(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    run_main: Main,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = script.train(tiny(script))

    def read_only(path: Path, content: bytes) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(script, "write", read_only)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main(script, "--evaluate", folder, "--eval-episodes", 1)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert "eval_return_mean=" in out
    assert err.startswith("error: ") and err.count("\n") == 1 and "evaluation.json" in err


@scripts
def test_an_environment_that_fails_in_evaluate_shows_where(
    script: ModuleType, run_main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    """It raises ValueError at step 8: no bad input of the command line."""
    box = "Box" if script is ppo_continuous else ""
    args = tiny(script, env_id=f"envs:Bad{box}-soon-v0", num_steps=4, total_timesteps=16)
    folder = script.train(args)
    with pytest.raises(SystemExit) as stop:
        run_main(script, "--evaluate", folder, "--eval-episodes", 3)
    assert stop.value.code == 1
    err = capsys.readouterr().err
    assert "envs.py" in err and "in step" in err
    assert err.splitlines()[-1].startswith("error: evaluation, after step ")
    assert "the wheel came off" in err.splitlines()[-1]


@scripts
def test_resuming_may_evaluate_differently(script: ModuleType, run_main: Main) -> None:
    folder = Path(script.train(tiny(script, eval_episodes=2)))
    run_main(script, "--resume", folder, "--total-timesteps", 576, "--eval-episodes", 0)
    assert_whole(folder, 64, 576)
    assert json.loads((folder / "summary.json").read_text())["eval_episodes"] == 0


@scripts
def test_an_agent_saved_on_a_gpu_is_evaluated_on_a_cpu(script: ModuleType) -> None:
    """Its arguments say cuda; the random numbers to keep are those of the agent's device."""
    args = tiny(script, cuda=True, eval_episodes=2)
    with contextlib.closing(script.make_envs(args, 1)) as envs:
        result = script.evaluate(script.Agent(envs), args)
    assert len(result["returns"]) == 2


@scripts
def test_a_run_that_is_no_longer_tracked_can_be_evaluated(
    script: ModuleType, run_main: Main
) -> None:
    """Begun with --track --wandb-project-name mine, resumed with --no-track: the name stays."""
    folder = Path(script.train(tiny(script)))
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    checkpoint["args"]["wandb_project_name"] = "mine"
    torch.save(checkpoint, folder / "checkpoint.pt")
    out = run_main(script, "--evaluate", folder, "--eval-episodes", 1)
    assert "eval_return_mean=" in out


@scripts
@pytest.mark.parametrize(
    ("way", "at", "said"), [("step", 192, "ValueError"), ("reward", 256, "reward[")]
)
def test_a_fault_of_another_process_names_the_step_too(
    script: ModuleType,
    way: str,
    at: int,
    said: str,
    run_main: Main,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without torchrun: what a process of rank 1 does by itself."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(script.Args, "check", lambda args: None)  # it asks for WORLD_SIZE
    box = "Box" if script is ppo_continuous else ""
    argv = flags(script, env_id=f"envs:Bad{box}-{way}-v0", run_dir="run")
    with pytest.raises(SystemExit) as stop:
        run_main(script, *argv)
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1
    assert last.startswith(f"error: iteration 4, after step {at}: ") and said in last
    assert "files in" not in last  # it has none


@pytest.mark.slow
def test_cut_evaluation_episodes_are_announced(capsys: pytest.CaptureFixture[str]) -> None:
    args = tiny(ppo, env_id="envs:Endless-v0", eval_episodes=2)
    with contextlib.closing(ppo.make_envs(args, 1)) as envs:
        result = ppo.evaluate(ppo.Agent(envs), args)
    assert result["cut"] == [True, True] and result["lengths"] == [27_000] * 2
    line = "2 of 2 evaluation episodes were cut at 27,000 steps\n"
    assert capsys.readouterr().err == line


@scripts
def test_the_records_that_a_checkpoint_continues_must_be_there(
    script: ModuleType, tmp_path: Path
) -> None:
    folder = Path(script.train(tiny(script)))
    (tmp_path / "alone").mkdir()
    alone = shutil.copy(folder / "checkpoint.pt", tmp_path / "alone")
    with pytest.raises(ValueError, match="--resume .*No such file.*metrics.csv"):
        script.train(script.Args(resume=alone, total_timesteps=576))
    assert os.listdir(tmp_path / "alone") == ["checkpoint.pt"]
    lines = (folder / "episodes.csv").read_bytes().splitlines(keepends=True)
    (folder / "episodes.csv").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(ValueError, match="--resume .*episodes.csv has other columns or fewer rows"):
        script.train(script.Args(resume=str(folder), total_timesteps=576))
    assert (folder / "episodes.csv").read_bytes() == b"".join(lines[:-1])


@scripts
def test_other_columns_are_not_mixed(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(script.train(tiny(script)))
    before = (folder / "metrics.csv").read_bytes()
    monkeypatch.setattr(script, "METRICS", [*script.METRICS, "losses/mine"])
    with pytest.raises(ValueError, match="--resume .*metrics.csv has other columns"):
        script.train(script.Args(resume=str(folder), total_timesteps=576))
    assert (folder / "metrics.csv").read_bytes() == before
    # In a new run the column is there, empty of numbers as nobody writes any.
    folder = script.train(tiny(script))
    assert all(row["losses/mine"] == "nan" for row in metrics(folder))


@scripts
def test_a_changed_script_does_not_replace_the_one_that_began(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(script.train(tiny(script)))
    original = Path(script.__file__).read_text()
    changed = tmp_path / "changed.py"
    changed.write_text(original + "# mine\n")
    monkeypatch.setattr(script, "__file__", str(changed))
    script.train(script.Args(resume=str(folder), total_timesteps=576))
    assert (folder / "script.py").read_text() == original
    assert (folder / "script-from-9.py").read_text() == original + "# mine\n"


@scripts
@pytest.mark.parametrize("columns", [80, 200])
def test_the_progress_line_fits_into_the_terminal(
    script: ModuleType,
    columns: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A longer line would wrap, and the carriage return go back to the second part only."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(os, "get_terminal_size", lambda: os.terminal_size((columns, 24)))
    script.train(tiny(script))
    lines = [x for x in re.split("[\r\n]", capsys.readouterr().out) if " SPS, " in x]
    assert len(lines) >= 2 and all(70 < len(x) < columns for x in lines)


@scripts
def test_a_resumed_run_says_what_is_done(script: ModuleType, run_main: Main) -> None:
    folder = script.train(tiny(script))
    assert "8 iterations (8 of them done)," in run_main(script, "--resume", folder)


def test_a_failing_constructor_is_located(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """
        import gymnasium as gym

        class Broken(gym.Env):
            def __init__(self):
                self.speed = {}["speed"]

        gym.register("Broken-v0", Broken)
    """
    (tmp_path / "broken.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"'speed' \(KeyError, .*broken.py:6\)"):
        ppo.train(tiny(ppo, env_id="broken:Broken-v0"))


@scripts
def test_a_checkpoint_of_a_changed_script_names_that(script: ModuleType) -> None:
    folder = Path(script.train(tiny(script)))
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    checkpoint["args"]["own_flag"] = 1
    torch.save(checkpoint, folder / "checkpoint.pt")
    with pytest.raises(ValueError, match=f"own_flag.*own script is {folder / 'script.py'}"):
        script.load_checkpoint(str(folder))


@scripts
@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_films(
    script: ModuleType, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception):
        pass

    def make_envs(args: object, num_envs: int, videos: Path | None = None) -> None:
        raise Asked(num_envs, videos)

    monkeypatch.setattr(script, "make_envs", make_envs)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with contextlib.ExitStack() as stack, pytest.raises(Asked) as asked:
        script.ppo(tiny(script, capture_video=True), stack)
    num_envs, folder = asked.value.args
    assert num_envs == 2 and (folder is None) == (rank == 1)


# ---- videos


def videos(folder: Path) -> list[Path]:
    return [path for path in (folder / "videos").rglob("*.mp4") if path.stat().st_size > 1000]


def test_video_of_training_and_evaluation(run_main: Main) -> None:
    folder = Path(ppo.train(tiny(ppo, capture_video=True, eval_episodes=1)))
    training = videos(folder)
    assert training
    plain = ppo.train(tiny(ppo, eval_episodes=1))
    assert metrics(folder) == metrics(plain)  # filming does not disturb training
    time.sleep(1.1)  # folders of videos are named by the second
    run_main(ppo, "--evaluate", plain, "--capture-video")
    assert videos(Path(plain))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["egl", "osmesa"])
def test_video_of_mujoco_without_a_display(backend: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    argv = flags(ppo_continuous, env_id="InvertedPendulum-v5", run_dir=folder)
    process = start(
        ppo_continuous, [*argv, "--capture-video"], tmp_path / "out", {"MUJOCO_GL": backend}
    )
    process.join(120)
    err = (tmp_path / "out" / "stderr").read_text()
    if process.exitcode and any(
        word in err for word in ("EGL", "egl", "OSMesa", "OpenGL", "glGetError")
    ):
        pytest.skip(f"no {backend} here: {err.splitlines()[-1]}")
    assert process.exitcode == 0, err
    assert videos(folder)
