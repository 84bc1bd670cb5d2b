"""Bad input: one line on stderr that names what is wrong, exit code 2, nothing written."""

import os
import pickle
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import ROOT, SCRIPTS, tiny

import ppo
import ppo_continuous

scripts = pytest.mark.parametrize("script", SCRIPTS, ids=[s.__name__ for s in SCRIPTS])


@dataclass(frozen=True)
class Bad:
    """A command line, and the words that its refusal must have."""

    argv: str
    says: str = ""
    environ: dict[str, str] = field(default_factory=dict)
    script: ModuleType | None = None  # None: each of them

    def __str__(self) -> str:
        words = [*(f"{k}={v}" for k, v in self.environ.items()), self.argv]
        return " ".join([self.script.__name__, *words] if self.script else words)


# Where `says` is left out, the refusal must repeat the command line's flag and value.
TABLE = [
    # numbers out of their range
    Bad("--total-timesteps 0"),
    Bad("--total-timesteps -5"),
    Bad("--total-timesteps 100", "--total-timesteps 100 num-envs num-steps"),
    Bad("--num-envs 0"),
    Bad("--num-envs -1"),
    Bad("--num-steps 0"),
    Bad("--num-steps -128"),
    Bad("--num-minibatches 0"),
    Bad("--num-minibatches -4"),
    Bad("--num-envs 8 --num-steps 32 --num-minibatches 3", "--num-minibatches 3 256"),
    Bad("--num-envs 4 --num-steps 8 --num-minibatches 32", "--num-minibatches 32"),
    Bad("--num-envs 4 --num-steps 8 --num-minibatches 64", "--num-minibatches 64"),
    Bad("--num-envs 1 --num-steps 1 --num-minibatches 1", "--num-minibatches 1"),
    Bad("--update-epochs 0"),
    Bad("--update-epochs -1"),
    Bad("--gamma 1.01"),
    Bad("--gamma -0.1"),
    Bad("--gamma nan"),
    Bad("--gamma inf"),
    Bad("--gae-lambda 1.5"),
    Bad("--gae-lambda -1", "--gae-lambda -1"),
    Bad("--gae-lambda nan"),
    Bad("--learning-rate 0", "--learning-rate 0"),
    Bad("--learning-rate -0.001"),
    Bad("--learning-rate nan"),
    Bad("--learning-rate inf"),
    Bad("--clip-coef 0", "--clip-coef 0"),
    Bad("--clip-coef -0.2"),
    Bad("--clip-coef nan"),
    Bad("--ent-coef -0.01"),
    Bad("--ent-coef nan"),
    Bad("--vf-coef -0.5"),
    Bad("--vf-coef inf"),
    Bad("--max-grad-norm 0", "--max-grad-norm 0"),
    Bad("--max-grad-norm -1", "--max-grad-norm -1"),
    Bad("--max-grad-norm nan"),
    Bad("--target-kl -0.01"),
    Bad("--target-kl nan"),
    Bad("--target-kl inf"),
    Bad("--surrogate kl-fixed --kl-coef -1", "--kl-coef -1"),
    Bad("--surrogate kl-fixed --kl-coef nan", "--kl-coef nan"),
    Bad("--surrogate kl-adaptive --kl-coef 0", "--kl-coef 0"),
    Bad("--surrogate kl-adaptive --kl-target 0", "--kl-target 0"),
    Bad("--surrogate kl-adaptive --kl-target -0.01", "--kl-target -0.01"),
    Bad("--seed -1"),
    Bad("--seed 36893488147419103232", "--seed"),
    Bad("--torch-threads 1025", "--torch-threads 1025 1,024"),
    Bad("--torch-threads -1"),
    Bad("--eval-episodes -1"),
    Bad("--final-lr-fraction 1.5"),
    Bad("--final-lr-fraction nan"),
    # flags that this run would ignore, or that contradict each other
    Bad("--kl-coef 0.5", "--kl-coef 0.5 --surrogate"),
    Bad("--kl-target 0.02", "--kl-target 0.02 --surrogate"),
    Bad("--surrogate none --kl-coef 3", "--kl-coef 3"),
    Bad("--surrogate kl-fixed --kl-target 0.02", "--kl-target 0.02"),
    Bad("--surrogate none --clip-coef 0.1", "--clip-coef 0.1 --surrogate --clip-vloss"),
    Bad("--surrogate kl-adaptive --clip-coef 0.3", "--clip-coef 0.3"),
    Bad("--no-anneal-lr --final-lr-fraction 0.55", "--final-lr-fraction 0.55 --anneal-lr"),
    Bad("--wandb-project-name mine", "--wandb-project-name mine --track"),
    Bad("--wandb-entity me", "--wandb-entity me --track"),
    # environments
    Bad("--env-id CartPol-v1", "--env-id CartPol-v1 CartPole"),
    Bad("--env-id HalfChetah-v5", "--env-id HalfChetah-v5 HalfCheetah"),
    Bad("--env-id CartPole-v9", "--env-id CartPole-v9 v1"),
    Bad("--env-id Nothing-like-this"),
    Bad("--env-id no_such_module:Some-v0", "no_such_module my_module:MyEnv-v0 PYTHONPATH"),
    Bad("--env-id MyForgottenModule-v0", "MyForgottenModule my_module:MyEnv-v0 PYTHONPATH"),
    Bad("--env-id envs:Missing-v0"),
    Bad("--env-id a/b/c-v0"),
    Bad("--env-id CartPole-v1", "CartPole-v1 ppo.py", script=ppo_continuous),
    Bad("--env-id FrozenLake-v1", "FrozenLake-v1 ppo.py", script=ppo_continuous),
    Bad("--env-id Pendulum-v1", "Pendulum-v1 ppo_continuous.py", script=ppo),
    Bad("--env-id envs:Actions-odd-v0", "ppo_continuous.py", script=ppo),
    Bad("--env-id envs:Acts-multidiscrete-v0", "Acts-multidiscrete MultiDiscrete"),
    Bad("--env-id envs:Acts-multibinary-v0", "Acts-multibinary MultiBinary"),
    Bad("--env-id envs:Acts-tuple-v0", "Acts-tuple Tuple"),
    Bad("--env-id envs:Acts-dict-v0", "Acts-dict Dict"),
    Bad("--env-id envs:Observes-sequence-v0", script=ppo),
    Bad("--env-id envs:Observes-graph-v0", script=ppo),
    Bad("--env-id envs:ObservesBox-sequence-v0", script=ppo_continuous),
    Bad("--env-id envs:ObservesBox-graph-v0", script=ppo_continuous),
    Bad("--env-id envs:Bad-init-v0", "--env-id envs:Bad-init-v0 licence", script=ppo),
    Bad("--env-id envs:BadBox-init-v0", "BadBox-init-v0 licence", script=ppo_continuous),
    Bad("--env-id envs:ConstantBox-v0 --capture-video", "render", script=ppo_continuous),
    Bad("--env-id CartPole-v1 --capture-video", "CartPole-v1 ppo.py", script=ppo_continuous),
    Bad("--env-id Pendulum-v1 --capture-video", "Pendulum-v1 ppo_continuous.py", script=ppo),
    Bad("--env-id ale_py:Breakout-v4", "ale_py:Breakout-v4 ppo_atari.py"),
    Bad("--env-id ALE/Breakout-v5", "ALE/Breakout-v5 ppo_atari.py"),
    Bad("--env-id ale_py:ALE/Breakout-v5", "ale_py:ALE/Breakout-v5 ppo_atari.py"),
    Bad("--env-id BreakoutNoFrameskip-v4", "BreakoutNoFrameskip-v4 ppo_atari.py"),
    # folders
    Bad("--run-dir {full}"),
    Bad("--run-dir {file}"),
    Bad("--run-dir {file}/below"),
    Bad("--run-dir /proc/no/such"),
    # checkpoints
    Bad("--resume {nowhere}", "--resume {nowhere} directory"),
    Bad("--evaluate {nowhere}", "--evaluate {nowhere} directory"),
    Bad("--resume=", "--resume empty"),
    Bad("--evaluate=", "--evaluate empty"),
    Bad("--run-dir=", "--run-dir empty"),
    Bad("--resume {empty}", "{empty}"),
    Bad("--evaluate {full}", "{full}"),
    Bad("--resume {own} --evaluate {own}", "--evaluate --resume"),
    Bad("--resume {other}", "{other} {other_script}.py"),
    Bad("--evaluate {other}", "{other} {other_script}.py"),
    Bad("--resume {own} --total-timesteps 256", "--total-timesteps 256 512"),
    Bad("--resume {own} --gamma 0.5", "--gamma 0.5"),
    Bad("--resume {own} --gamma 7", "--gamma 7"),
    Bad("--resume {own} --seed 9", "--seed 9"),
    Bad("--resume {own} --num-envs 2", "--num-envs 2"),
    Bad("--resume {own} --exp-name other", "--exp-name other"),
    Bad("--resume {own} --surrogate none", "--surrogate none"),
    Bad("--resume {own} --norm-obs --num-steps 4", "--num-steps 4", script=ppo),
    Bad("--resume {own} --run-dir elsewhere", "--run-dir elsewhere"),
    Bad("--evaluate {own} --learning-rate 0.5", "--learning-rate 0.5"),
    Bad("--evaluate {own} --total-timesteps 100000", "--total-timesteps 100000"),
    Bad("--evaluate {own} --track", "--track True: contradicts"),
    Bad("--evaluate {own} --eval-episodes 0", "--eval-episodes 0"),
    Bad("--evaluate {own} --eval-episodes -3", "--eval-episodes -3"),
    Bad("--evaluate {own} --seed -3", "--seed -3"),
    *(
        Bad(f"--{way} {{{kind}}}", f"{{{kind}}}" + " agent, args" * kind.startswith("without"))
        for kind in (
            "truncated",
            "nothing",
            "noise",
            "text",
            "tensor",
            "list",
            "without_agent",
            "without_args",
            "unknown_argument",
            "object",
        )
        for way in ("resume", "evaluate")
    ),
    Bad("--resume {bad_argument}", "--num-envs 0"),
    Bad("--evaluate {bad_argument}", "--num-envs 0"),
    Bad("--resume {other_env}", "network"),
    Bad("--evaluate {other_env}", "network"),
    # processes
    Bad("", "--num-envs 3", {"WORLD_SIZE": "3", "RANK": "0"}),
    Bad(
        "--num-envs 8 --num-steps 8 --num-minibatches 8",
        "--num-minibatches 8",
        {"WORLD_SIZE": "8", "RANK": "0"},
    ),
    Bad(
        "--num-envs 2 --num-steps 15 --num-minibatches 2",  # 15 rows a process
        "--num-minibatches 2",
        {"WORLD_SIZE": "2", "RANK": "0"},
    ),
    Bad("--evaluate {own}", "--evaluate torchrun", {"WORLD_SIZE": "2", "RANK": "0"}),
    Bad("", "RANK", {"WORLD_SIZE": "2"}),
    Bad("", "WORLD_SIZE", {"WORLD_SIZE": "many"}),
    Bad("", "WORLD_SIZE", {"WORLD_SIZE": "0"}),
    Bad("", "RANK 1 WORLD_SIZE unset", {"RANK": "1"}),
    Bad("", "RANK abc unset", {"RANK": "abc"}),
    Bad("", "RANK 2 WORLD_SIZE 2", {"WORLD_SIZE": "2", "RANK": "2"}),
    Bad(
        "--env-id envs:Constant-v0 --capture-video",
        "envs:Constant-v0 --capture-video rgb_array",
        script=ppo,
    ),
    Bad(
        "--env-id envs:Plain-v0 --capture-video",
        "envs:Plain-v0 --capture-video rgb_array",
        script=ppo,
    ),
    Bad("--env-id envs:Dark-v0 --capture-video", "--capture-video drawn display", script=ppo),
    Bad(
        "--env-id envs:DarkBox-v0 --capture-video",
        "--capture-video drawn display",
        script=ppo_continuous,
    ),
]
# What stands before a command line that names no environment and no checkpoint.
BASE = {
    ppo: ["--env-id", "CartPole-v1"],
    ppo_continuous: ["--env-id", "Pendulum-v1"],
}
CASES = [
    pytest.param(script, bad, id=f"{script.__name__} {bad}")
    for bad in TABLE
    for script in SCRIPTS
    if bad.script in (None, script)
]


class Payload:
    """Pickled, it asks to create a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[ModuleType, dict[str, str]]:
    """Folders and files that command lines name, for each script."""
    root = tmp_path_factory.mktemp("places")
    own = {s: s.train(tiny(s, run_dir=str(root / s.__name__), eval_episodes=1)) for s in SCRIPTS}
    result = {}
    for script, other in zip(SCRIPTS, reversed(SCRIPTS), strict=True):
        here = root / f"for_{script.__name__}"
        here.mkdir()
        good = Path(own[script], "checkpoint.pt")
        checkpoint = torch.load(good, weights_only=True)
        args = checkpoint["args"]
        wider = {"ppo": "Acrobot-v1", "ppo_continuous": "MountainCarContinuous-v0"}[script.__name__]
        contents = {
            "truncated": good.read_bytes()[: good.stat().st_size // 2],
            "nothing": b"",
            "noise": os.urandom(20_000),
            "text": b"not a checkpoint\n",
        }
        objects = {
            "tensor": torch.zeros(3),
            "list": [1, 2, 3],
            "without_agent": {k: v for k, v in checkpoint.items() if k != "agent"},
            "without_args": {k: v for k, v in checkpoint.items() if k != "args"},
            "unknown_argument": checkpoint | {"args": args | {"colour": "red"}},
            "bad_argument": checkpoint | {"args": args | {"num_envs": 0}},
            "object": checkpoint | {"extra": Path("x")},
            "other_env": checkpoint | {"args": args | {"env_id": wider}},
        }
        paths = {"nowhere": here / "nowhere", "own": Path(own[script]), "other": Path(own[other])}
        for name, content in contents.items():
            paths[name] = here / f"{name}.pt"
            paths[name].write_bytes(content)
        for name, content in objects.items():
            paths[name] = here / f"{name}.pt"
            torch.save(content, paths[name])
        paths |= {"full": here / "full", "empty": here / "empty", "file": here / "file"}
        for name in ("full", "empty"):
            paths[name].mkdir()
        (paths["full"] / "notes.txt").write_text("precious")
        paths["file"].write_text("precious")
        result[script] = {name: str(path) for name, path in paths.items()}
        result[script]["other_script"] = other.__name__
    return result


def snapshot(*folders: str | Path) -> dict[Path, bytes | None]:
    paths = [path for folder in folders for path in Path(folder).rglob("*")]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def refusal(
    script: ModuleType,
    argv: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """Run the command line in this process; it must end with code 2 and one line, returned."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *argv])
    with pytest.raises(SystemExit) as stop:
        script.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.endswith("\n") and len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    assert len(err) < 2000
    return err


@pytest.mark.parametrize(("script", "bad"), CASES)
def test_refused(
    script: ModuleType,
    bad: Bad,
    places: dict[ModuleType, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in bad.environ.items():
        monkeypatch.setenv(name, value)
    argv = bad.argv.format(**places[script]).split()
    own_env = {"--env-id", "--resume", "--evaluate"} & set(argv)
    argv = argv if own_env else BASE[script] + argv
    root = Path(places[script]["full"]).parent.parent
    before = snapshot(root)
    line = refusal(script, argv, monkeypatch, capsys)
    for word in (bad.says or bad.argv).format(**places[script]).split():
        assert word in line
    assert snapshot(tmp_path) == {}
    assert snapshot(root) == before


@scripts
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("surrogate", "kl_adaptive"),
        ("surrogate", None),
        ("total_timesteps", 1e6),
        ("total_timesteps", "1000000"),
        ("num_envs", 4.0),
        ("update_epochs", True),
    ],
)
def test_what_tyro_would_refuse_is_refused_from_python(
    script: ModuleType, name: str, value: object
) -> None:
    """Unknown names must not train something else in silence."""
    with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')} {value}: must be "):
        script.train(script.Args(**{name: value}))


def test_enough_bad_inputs_are_tried() -> None:
    assert len({str(bad) for bad in TABLE}) == len(TABLE) >= 60


@scripts
@pytest.mark.parametrize(
    "argv",
    [
        "--gamma high",
        "--num-envs 2.5",
        "--seed",
        "--surrogate trpo",
        "--no-such-flag 3",
        "--learning-rate 1e-3x",
        "--anneal-lr maybe",
        "CartPole-v1",
    ],
)
def test_the_parser_refuses(
    script: ModuleType,
    argv: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """tyro's own errors are boxes of a few lines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *argv.split()])
    with pytest.raises(SystemExit) as stop:
        script.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert any(word in err for word in argv.split())
    assert "Traceback" not in err
    assert snapshot(tmp_path) == {}


@scripts
@pytest.mark.parametrize("way", ["resume", "evaluate"])
@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_hostile_checkpoint_is_refused_and_not_run(
    script: ModuleType,
    way: str,
    form: str,
    places: dict[ModuleType, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    trap, file = tmp_path / "sprung", tmp_path / "checkpoint.pt"
    good = torch.load(Path(places[script]["own"], "checkpoint.pt"), weights_only=True)
    if form == "torch":
        torch.save(good | {"extra": Payload(trap)}, file)
    else:
        file.write_bytes(pickle.dumps(Payload(trap)))
    line = refusal(script, [f"--{way}", str(file)], monkeypatch, capsys)
    assert str(file) in line
    assert "trust" not in line  # torch's advice: to load it nevertheless, if one trusts it
    assert not trap.exists()
    assert list(tmp_path.iterdir()) == [file]
    # The payload is a real one.
    with open(file, "rb") as stream:
        if form == "torch":
            torch.load(stream, weights_only=False)
        else:
            pickle.load(stream)
    assert trap.exists()


@scripts
def test_cuda_where_there_is_none(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # one without a working driver
    line = refusal(script, [*BASE[script], "--cuda"], monkeypatch, capsys)
    assert "--cuda" in line and "found 0" in line and "--no-cuda" in line


@scripts
def test_cuda_with_fewer_gpus_than_processes(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The two of a machine; another machine has its own."""
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    line = refusal(script, [*BASE[script], "--cuda"], monkeypatch, capsys)
    assert "--cuda" in line and "found 1" in line and "--no-cuda" in line
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    script.Args(num_envs=8, cuda=True).check()


@scripts
def test_compiling_without_a_compiler(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(function: object) -> None:
        raise RuntimeError("No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(ValueError, match=r"^--compile True: needs .* \(No working C\+\+ .*\)$"):
        script.train(tiny(script, compile=True, run_dir=str(tmp_path / "run")))
    assert snapshot(tmp_path) == {}


@pytest.mark.slow
def test_a_real_missing_compiler_is_named(tmp_path: Path) -> None:
    environ = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, ppo.__file__, *BASE[ppo], "--compile"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | environ, capture_output=True, text=True
    )
    assert done.returncode == 2 and not done.stdout and not (tmp_path / "runs").exists()
    assert done.stderr.startswith("error: --compile True: needs a C++ compiler")
    assert len(done.stderr.splitlines()) == 1


@scripts
def test_tracking_without_wandb(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    find_spec = util.find_spec
    monkeypatch.setattr(
        util, "find_spec", lambda name, *rest: None if name == "wandb" else find_spec(name, *rest)
    )
    line = refusal(script, [*BASE[script], "--track"], monkeypatch, capsys)
    assert "--track" in line and "wandb" in line
    assert snapshot(tmp_path) == {}


@pytest.mark.skipif(util.find_spec("Box2D") is not None, reason="Box2D is installed")
@pytest.mark.parametrize(
    ("script", "env_id"), [(ppo, "LunarLander-v3"), (ppo_continuous, "BipedalWalker-v3")]
)
def test_an_environment_that_is_not_installed(
    script: ModuleType,
    env_id: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The line says which extra of gymnasium to install."""
    monkeypatch.chdir(tmp_path)
    line = refusal(script, ["--env-id", env_id], monkeypatch, capsys)
    assert env_id in line and "gymnasium[box2d]" in line
    assert snapshot(tmp_path) == {}


@pytest.mark.filterwarnings("ignore:.*out of date")
def test_an_environment_of_the_past_names_its_successor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "Taxi-v4" in refusal(ppo, ["--env-id", "Taxi-v3"], monkeypatch, capsys)


@scripts
def test_train_raises_the_line_that_main_prints(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for change, words in (
        ({"gamma": 2.0}, "--gamma 2.0"),
        ({"learning_rate": float("nan")}, "--learning-rate nan"),
        ({"env_id": "Nope-v0"}, "--env-id Nope-v0"),
    ):
        with pytest.raises(ValueError, match=words):
            script.train(tiny(script, **change))
    assert snapshot(tmp_path) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "argv", "says"),
    [
        (ppo, "--env-id CartPol-v1", "CartPole"),
        (ppo_continuous, "--run-dir /proc/no/such", "--run-dir /proc/no/such"),
    ],
)
def test_refused_from_a_shell(script: ModuleType, argv: str, says: str, tmp_path: Path) -> None:
    """No warning of an import, no other line: what a user sees."""
    command = [sys.executable, str(ROOT / f"{script.__name__}.py"), *argv.split()]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stdout == ""
    assert len(process.stderr.splitlines()) == 1
    assert says in process.stderr
    assert snapshot(tmp_path) == {}
