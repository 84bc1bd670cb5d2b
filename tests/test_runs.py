"""Runs that are killed, resumed, evaluated, tracked, copied: no row is lost, no figure changes."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    FIGURES,
    ROOT,
    assert_equal,
    assert_whole,
    column,
    flags,
    metrics,
    read_csv,
    run_main,
    saved,
    start,
    summary,
    tiny,
    wait_for,
)

import ppo


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---- resuming


def test_resume_with_more_steps() -> None:
    """Twice; what was there stays as it was."""
    run = Path(ppo.train(tiny(ppo, norm_obs=True, norm_reward=True)))
    before = {name: (run / name).read_text() for name in ("metrics.csv", "episodes.csv")}
    for total in (1024, 1536):
        run_main(ppo, "--resume", run, "--total-timesteps", total)
        assert_whole(run, total)
        assert all((run / name).read_text().startswith(text) for name, text in before.items())
    assert json.loads((run / "config.json").read_text())["total_timesteps"] == 1536
    assert summary(run)["global_step"] == 1536
    assert not list(run.glob("*.tmp"))


@pytest.mark.parametrize("first", [64, 256])
def test_rows_after_the_checkpoint_are_cut_off(first: int) -> None:
    """What a kill -9 leaves behind, also where the first episode ended after the checkpoint."""
    run = Path(ppo.train(tiny(ppo, env_id="faulty:fine-v0", total_timesteps=first)))
    episodes = run / "episodes.csv"
    assert (episodes.exists() and len(read_csv(episodes)) > 0) == (first == 256)
    old = (run / "checkpoint.pt").read_bytes()
    resume = ("--resume", run, "--total-timesteps", 512)
    run_main(ppo, *resume)
    rows = {name: (run / name).read_text() for name in ("metrics.csv", "episodes.csv")}
    (run / "checkpoint.pt").write_bytes(old)
    for name in rows:
        with open(run / name, "a") as file:
            file.write("513,1.")  # killed while writing
    (run / "notes.csv").write_text("mine")
    run_main(ppo, *resume)
    assert (run / "notes.csv").read_text() == "mine"
    assert_whole(run, 512)
    assert (run / "episodes.csv").read_text() == rows["episodes.csv"]


def test_resume_with_another_number_of_environments() -> None:
    run = ppo.train(tiny(ppo, num_envs=8, norm_obs=True, norm_reward=True))
    run_main(ppo, "--resume", run, "--num-envs", 2, "--total-timesteps", 640)
    steps = column(run, "global_step")
    assert steps == [*range(128, 513, 128), *range(544, 641, 32)]
    assert saved(run)["state"]["global_step"] == 640


def test_what_is_given_anew_on_resuming_holds() -> None:
    """And the rest is as it was: beta's factor, the seed, the kind of surrogate."""
    settings = {"surrogate": "kl-adaptive", "kl_coef": 2.0, "learning_rate": 1e-3, "seed": 5}
    run = Path(ppo.train(tiny(ppo, gamma=0.9, **settings)))
    scale = saved(run)["state"]["kl_scale"]
    words = ["--learning-rate", 0.01, "--kl-coef", 6.0, "--total-timesteps", 1024]
    run_main(ppo, "--resume", run, *words)
    rates, betas = column(run, "charts/learning_rate")[8:], column(run, "losses/kl_coef")[8:]
    assert rates == pytest.approx([0.01 * (1 - step / 1024) for step in range(512, 1024, 64)])
    assert betas[0] == pytest.approx(6 * scale) and scale != 1
    config = json.loads((run / "config.json").read_text())
    assert config == saved(run)["args"]
    assert [config[name] for name in ("gamma", "seed", "kl_coef")] == [0.9, 5, 6.0]
    (group,) = saved(run)["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(rates[-1])
    assert config["surrogate"] == "kl-adaptive"
    again = ppo.Args(**config)  # a new run, not the old one
    assert ppo.train(dataclasses.replace(again, run_dir="other")) == str(Path("other").absolute())
    assert ppo.train(dataclasses.replace(again, resume=str(run))) == str(run)


def test_runs_started_together_have_folders_of_their_own() -> None:
    assert len({ppo.train(tiny(ppo, run_dir=None)) for _ in range(3)}) == 3


def test_resume_of_a_finished_run_changes_nothing() -> None:
    """All that is saved is loaded. What was killed before its evaluation is evaluated."""
    settings = {"norm_obs": True, "norm_reward": True, "surrogate": "kl-adaptive"}
    run = Path(ppo.train(tiny(ppo, eval_episodes=2, **settings)))
    old, rows, results = saved(run), metrics(run, times=True), summary(run)
    (run / "summary.json").unlink()
    run_main(ppo, "--resume", run)
    assert summary(run) == results and metrics(run, times=True) == rows
    new = saved(run)
    assert new.keys() == {"agent", "optimizer", "reward_stats", "state", "args"}
    for name in ("agent", "optimizer", "reward_stats", "state"):
        assert_equal(new[name], old[name])
    assert old["reward_stats"]["count"] == 512


def test_two_resumes_are_bit_identical() -> None:
    settings = {"norm_obs": True, "norm_reward": True, "eval_episodes": 2}
    ppo.train(tiny(ppo, run_dir="first", surrogate="kl-adaptive", **settings))
    shutil.copytree("first", "second")
    for folder in ("first", "second"):
        run_main(ppo, "--resume", folder, "--total-timesteps", 1024)
    assert metrics("first") == metrics("second") and len(metrics("first")) == 16
    assert summary("first") == summary("second")
    for name in ("agent", "optimizer", "reward_stats"):
        assert_equal(saved("first")[name], saved("second")[name])


def test_a_resumed_run_does_not_repeat_its_first_leg() -> None:
    """Environments start from seeds that the first leg has not used."""
    settings = {"learning_rate": 1e-12, "anneal_lr": False, "num_steps": 64}
    run = ppo.train(tiny(ppo, **settings))
    run_main(ppo, "--resume", run, "--total-timesteps", 1024)
    losses = column(run, "losses/value_loss")
    assert len(losses) == len({round(loss, 4) for loss in losses}) == 4


def test_other_columns_are_refused_and_the_run_stays_as_it_was(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Path(ppo.train(tiny(ppo)))
    (run / "script.py").write_text("# the script that trained it")
    names = ("metrics.csv", "config.json", "script.py", "checkpoint.pt")
    before = [(run / name).read_bytes() for name in names]
    with pytest.raises(SystemExit, match="2"):
        run_main(ppo, "--resume", run, "--surrogate", "kl-fixed", "--total-timesteps", 1024)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(run / "metrics.csv") in error and "losses/kl" in error
    assert [(run / name).read_bytes() for name in names] == before


def test_a_readers_own_flag_is_saved_and_may_be_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass
    class Args(ppo.Args):
        bonus: float = 0.0

    monkeypatch.setattr(ppo, "Args", Args)
    run = ppo.train(tiny(ppo, bonus=-1.5, total_timesteps=64))
    run_main(ppo, "--resume", run, "--total-timesteps", 128)
    assert saved(run)["args"]["bonus"] == -1.5


# ---- kills


def test_kill_at_random_moments(tmp_path: Path) -> None:
    """Kills of one run, two of them inside of the writing of a checkpoint; no row is lost."""
    chance, run, kept = random.Random(1), tmp_path / "run", []
    argv = flags(ppo, run_dir=run, total_timesteps=10**7, norm_obs=True)
    for die_at in (None, "fsync", None, "replace"):
        path = run / "checkpoint.pt"
        old = path.stat().st_mtime_ns if path.exists() else 0
        process = start(ppo, argv, tmp_path / "out", die_at=die_at)
        if not die_at:
            wait_for(lambda path=path, old=old: path.exists() and path.stat().st_mtime_ns != old)
            time.sleep(chance.uniform(0, 0.6))
            process.kill()
        process.join(60)
        says = (tmp_path / "out" / "stderr").read_text()
        assert process.exitcode == -signal.SIGKILL and says == "", says
        # What the checkpoint counts on is there, and what was there at the last one still is.
        done = saved(run)["state"]["global_step"]
        rows = (run / "metrics.csv").read_text().splitlines()
        assert len(rows) > done // 64 and rows[: len(kept)] == kept
        kept = rows[: done // 64 + 1]
        argv = ["--resume", str(run)]
    run_main(ppo, "--resume", run, "--total-timesteps", done + 640)
    assert_whole(run, done + 640)
    assert (run / "metrics.csv").read_text().splitlines()[: len(kept)] == kept
    assert summary(run)["global_step"] == done + 640
    assert not list(run.glob("*.tmp"))


# ---- evaluating


def test_evaluate_repeats_the_summary(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the digit, with the saved statistics, and changes no file of the run."""
    norm = {"norm_obs": True, "norm_reward": True}
    run = Path(ppo.train(tiny(ppo, eval_episodes=3, seed=6, **norm)))
    before = {path: path.read_bytes() for path in run.iterdir()}
    lines = []
    torch.set_num_threads(2)  # as many as the run had is part of "to the digit"
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    for words in ([run], [run, "--seed", 7, "--eval-episodes", 5]):
        run_main(ppo, "--evaluate", *words)
        lines.append(capsys.readouterr().out.splitlines()[-1])
    assert torch.get_num_threads() == 1 and torch.backends.cudnn.deterministic
    figures = summary(run)
    assert lines[0] == " ".join(f"{name}={figures[name]}" for name in FIGURES)
    assert lines[1].split()[0] != lines[0].split()[0] and lines[1].endswith("eval_episodes=5")
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_a_second_checkpoint_can_be_evaluated_and_resumed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a script that keeps its best agent."""
    real = ppo.Log.iteration_ended

    def iteration_ended(log: ppo.Log, metrics: dict, modules: dict) -> None:
        real(log, metrics, modules)
        if log.state["global_step"] == 256:
            log.save(modules)
            (log.folder / "best").mkdir()
            shutil.copy(log.folder / "checkpoint.pt", log.folder / "best")

    monkeypatch.setattr(ppo.Log, "iteration_ended", iteration_ended)
    figures = []
    for total in (256, 512):
        settings = {"total_timesteps": total, "learning_rate": 0.02, "anneal_lr": False}
        run = Path(ppo.train(tiny(ppo, eval_episodes=3, **settings)))
        figures.append([summary(run)[name] for name in FIGURES])
    run_main(ppo, "--evaluate", run / "best")
    said = capsys.readouterr().out.splitlines()[-1].split()
    assert [float(word.split("=")[1]) for word in said] == figures[0] != figures[1]
    run_main(ppo, "--resume", run / "best", "--total-timesteps", 384)
    assert column(run / "best", "global_step") == [320, 384]
    assert len(metrics(run)) == 8


# ---- tracking


@pytest.mark.slow
def test_wandb_offline_receives_the_names_of_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run goes on under its id. wandb ends with a real interpreter only."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    first = [*flags(ppo, run_dir="run", eval_episodes=2), "--track"]
    for argv in (first, ["--resume", "run", "--total-timesteps", "640"]):
        subprocess.run([sys.executable, ppo.__file__, *argv], check=True)
    stored = list(Path("run/wandb").glob("offline-*/run-*.wandb"))
    assert [path.stem for path in stored] == [f"run-{saved('run')['state']['id']}"] * 2
    names = [*metrics("run", times=True)[0], *summary("run", times=True), *vars(ppo.Args())]
    for name in names:
        assert all(name.encode() in path.read_bytes() for path in stored)
    assert len(metrics("run")) == 10


@pytest.mark.slow
def test_two_tracked_runs_of_one_process_are_two_runs_of_wandb(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    code = "import ppo; [ppo.train(ppo.Args(run_dir=x, track=True, total_timesteps=1024, "
    code += "eval_episodes=0, cuda=False)) for x in ('one', 'two')]"
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environ)
    for name in ("one", "two"):
        (path,) = Path(name, "wandb").glob("offline-*/run-*.wandb")
        assert path.stem == f"run-{saved(name)['state']['id']}"
        assert b"losses/approx_kl" in path.read_bytes()
