"""Bad input: one line on stderr that names flag and value, exit code 2, nothing written."""

import contextlib
import os
import pickle
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import ENV_IDS, run_main, tiny

import ppo
import ppo_continuous

# Command lines, and after the arrow what the refusal says; else it names the last flag and value.
BAD = """
--total-timesteps 100 -> --total-timesteps 100: is less than a batch of 1024
--num-envs 0
--num-steps -128
--num-minibatches 0
--num-minibatches 3 -> --num-minibatches 3: leaves 341.333 of 1024 rows
--num-minibatches 1024 -> --num-minibatches 1024: leaves 1 of 1024 rows
--update-epochs 0
--gamma 1.01
--gae-lambda nan
--learning-rate 0
--clip-coef nan
--max-grad-norm 0
--kl-target -0.01
--target-kl 0
--target-kl nan
--kl-coef 0
--vf-coef inf
--ent-coef -0.01
--learning-rate inf
--seed -1
--torch-threads -1
--eval-episodes -1
--final-lr-fraction 1.5
--cuda -> --cuda True: no GPU
--run-dir {full} -> --run-dir {full}: is not an empty folder
--run-dir {file} -> --run-dir {file}: is not an empty folder
--run-dir {file}/run -> --run-dir {file}/run: NotADirectoryError
--env-id CartPol-v1 -> `CartPol` doesn't exist. Did you mean: `CartPole`
--env-id no_such_module:Some-v0
--env-id Pendulum-v1 -> float32), but ppo.py needs Discrete
--resume {nowhere}
--evaluate {full}
--resume= -> no fitting checkpoint
--evaluate= -> no fitting checkpoint
--evaluate {own} --eval-episodes 0
--evaluate {own} --resume {own} -> --resume {own}: not with --evaluate
--resume {own} --gamma 7
--resume {own} --run-dir other -> --run-dir other: is for new runs
--resume {noise}
--evaluate {truncated}
--resume {without_agent}
--resume {without_args}
--evaluate {unknown_argument} -> unexpected keyword argument 'color'
--resume {other_network} -> size mismatch
--evaluate {other_network} -> size mismatch
WORLD_SIZE=3 --num-envs 4 -> --num-envs 4: not divisible by 3 processes
WORLD_SIZE=8 --num-steps 8 --num-minibatches 8 -> --num-minibatches 8: leaves 1 of 64 rows
WORLD_SIZE=2 --num-envs 2 --num-steps 15 --num-minibatches 2 -> leaves 7.5 of 30 rows
"""
OTHERS = """
--env-id CartPole-v1 -> actions are Discrete(2), but ppo_continuous.py needs Box
"""
CASES = [(ppo, line) for line in BAD.strip().splitlines()]
CASES += [(ppo_continuous, line) for line in OTHERS.strip().splitlines()]


class Payload:
    """Pickled, it asks to create a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders and files that command lines name."""
    root = tmp_path_factory.mktemp("places")
    paths = {name: root / name for name in ("own", "full", "nowhere")}
    paths["file"] = paths["full"] / "notes.txt"
    paths["full"].mkdir()
    (paths["full"] / "notes.txt").write_text("precious")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        ppo.train(tiny(ppo, run_dir="own", total_timesteps=64, eval_episodes=1))
    checkpoint = torch.load(paths["own"] / "checkpoint.pt", weights_only=True)
    args = checkpoint["args"]
    contents = {
        "noise": bytes(range(256)) * 9,
        "truncated": (paths["own"] / "checkpoint.pt").read_bytes()[:5000],
        "without_agent": {k: v for k, v in checkpoint.items() if k != "agent"},
        "without_args": {k: v for k, v in checkpoint.items() if k != "args"},
        "unknown_argument": checkpoint | {"args": args | {"color": "red"}},
        "other_network": checkpoint | {"args": args | {"env_id": "Acrobot-v1"}},
    }
    for name, content in contents.items():
        paths[name] = root / name
        paths[name].mkdir()
        if isinstance(content, bytes):
            (paths[name] / "checkpoint.pt").write_bytes(content)
        else:
            torch.save(content, paths[name] / "checkpoint.pt")
    return paths


def snapshot(*folders: Path) -> dict[Path, bytes | None]:
    paths = [path for folder in folders for path in folder.rglob("*")]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def refusal(script: ModuleType, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command line in this process; it must end with code 2 and one line, returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="^2$"):
        run_main(script, *argv)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.endswith("\n")
    assert err.count("\n") == 1 and "weights_only" not in err, err  # no unsafe advice
    return err


@pytest.mark.parametrize(("script", "line"), CASES, ids=[f"{s.__name__} {x}" for s, x in CASES])
def test_refused(
    script: ModuleType,
    line: str,
    places: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    command, _, says = line.format(**places).partition(" -> ")
    argv = command.split()
    if argv[0].startswith("WORLD_SIZE="):
        monkeypatch.setenv(*argv.pop(0).split("="))
    if argv[0] not in ("--env-id", "--resume", "--evaluate"):
        argv = ["--env-id", ENV_IDS[script.__name__], *argv]
    before = snapshot(places["full"].parent, tmp_path)
    error = refusal(script, argv, capsys)
    assert all(words in error for words in ([says] if says else argv[-2:])), error
    assert snapshot(places["full"].parent, tmp_path) == before


def test_what_wandb_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder is there by then, and empty, so that the same command may be given again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    argv = ["--env-id", "CartPole-v1", "--track", "--run-dir", "run"]
    assert "--track: " in refusal(ppo, argv, capsys)
    assert list(tmp_path.rglob("*")) == [tmp_path / "run"]


@pytest.mark.parametrize("way", ["--resume", "--evaluate"])
@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_hostile_checkpoint_is_refused_and_not_run(
    way: str, form: str, places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trap, file = tmp_path / "sprung", tmp_path / "checkpoint.pt"
    if form == "torch":
        good = torch.load(places["own"] / "checkpoint.pt", weights_only=True)
        torch.save(good | {"extra": Payload(trap)}, file)
    else:
        file.write_bytes(pickle.dumps(Payload(trap)))
    assert str(tmp_path) in refusal(ppo, [way, str(tmp_path)], capsys)
    assert list(tmp_path.iterdir()) == [file]
    with open(file, "rb") as stream:  # the payload is a real one
        torch.load(stream, weights_only=False) if form == "torch" else pickle.load(stream)
    assert trap.exists()


@pytest.mark.parametrize("argv", ["--gamma high", "--surrogate trpo"])
def test_the_parser_refuses(argv: str, capsys: pytest.CaptureFixture[str]) -> None:
    """tyro's own errors are boxes of a few lines."""
    with pytest.raises(SystemExit, match="^2$"):
        run_main(ppo, *argv.split())
    assert argv.split()[0] in capsys.readouterr().err


def test_train_raises_the_line_that_main_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for change, line in (
        ({"gamma": 2.0}, "^--gamma 2.0: must be between 0 and 1$"),
        ({"env_id": "Nope-v0"}, "^--env-id Nope-v0: "),
    ):
        with pytest.raises(ValueError, match=line):
            ppo.train(tiny(ppo, **change))
    assert snapshot(tmp_path) == {}


def test_an_unknown_surrogate_trains_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="surrogate kl_adaptive"):
        ppo.train(tiny(ppo, surrogate="kl_adaptive", run_dir="run"))
    assert Path("run/metrics.csv").read_text() == ""


def test_other_processes_may_start_after_the_first_has_filled_the_folder(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = tiny(ppo, run_dir=str(places["full"]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, refusal in (("0", pytest.raises(ppo.BadInput)), ("1", contextlib.nullcontext())):
        monkeypatch.setenv("RANK", rank)
        with refusal:
            ppo.check(args, places["full"])
