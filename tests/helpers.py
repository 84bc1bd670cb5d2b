"""What several test modules need: short runs, their files, and runs in processes of their own."""

import csv
import importlib
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import ppo

ROOT = Path(ppo.__file__).parent
ENV_IDS = {"ppo": "CartPole-v1", "ppo_continuous": "Pendulum-v1"}
numbers = itertools.count()
TIMES = ("charts/SPS", "wall_time")
FIGURES = ("eval_return_mean", "eval_return_std", "eval_episodes")

# Settings of a run of half a second: 8 iterations of 64 steps.
TINY = {
    "total_timesteps": 512,
    "num_envs": 4,
    "num_steps": 16,
    "num_minibatches": 2,
    "update_epochs": 2,
    "eval_episodes": 0,
    "cuda": False,
}


def tiny(script: ModuleType, **changes: object) -> ppo.Args:
    """Arguments of a short run in a folder of its own (a second may see several of these runs)."""
    defaults = {"env_id": ENV_IDS[script.__name__], "run_dir": f"runs/{next(numbers)}"}
    return script.Args(**(defaults | TINY | changes))


def flags(script: ModuleType, **changes: object) -> list[str]:
    """The same as a command line."""
    words = []
    for name, value in ({"env_id": ENV_IDS[script.__name__]} | TINY | changes).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return words


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """The rows as text, so that equal means equal to the last digit and nan equals nan."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def metrics(folder: str | Path, times: bool = False) -> list[dict[str, str]]:
    """metrics.csv, without the columns that hold times."""
    rows = read_csv(Path(folder, "metrics.csv"))
    return [{k: v for k, v in row.items() if times or k not in TIMES} for row in rows]


def column(folder: str | Path, name: str) -> list[float]:
    return [float(row[name]) for row in metrics(folder, times=True)]


def copy_scripts(folder: str | Path, *patches: Path) -> None:
    """Put copies of the scripts into the folder, and change them by the patches."""
    for script in ROOT.glob("ppo*.py"):
        shutil.copy(script, folder)
    for patch in patches:
        command = ["git", "apply", patch]
        process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr


def copied(x: object) -> object:
    """Tensors, and dicts of them, as they are now."""
    if isinstance(x, dict):
        return {name: copied(value) for name, value in x.items()}
    return x.detach().clone() if isinstance(x, Tensor) else x


def run_main(script: ModuleType, *argv: object) -> None:
    """Call main() with a command line."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, argv)])
        try:
            script.main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def summary(folder: str | Path, times: bool = False) -> dict[str, float]:
    """summary.json, in which a bare NaN or Infinity is no JSON."""
    text = Path(folder, "summary.json").read_text()
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"a bare {name}"))
    return {k: v for k, v in content.items() if times or k not in ("SPS", "wall_time")}


def saved(folder: str | Path) -> dict[str, dict]:
    return torch.load(Path(folder, "checkpoint.pt"), weights_only=True)


def assert_equal(one: object, other: object) -> None:
    """Tensors bit by bit, also in dicts."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_equal(one[name], other[name])
    else:
        assert one == other


def assert_whole(folder: str | Path, total: int) -> None:
    """Batches of 64: each row once and in order, in both files; no line is empty or cut off."""
    assert column(folder, "global_step") == list(range(64, total + 1, 64))
    times = column(folder, "wall_time")
    assert times == sorted(times)
    for name in ("metrics.csv", "episodes.csv"):
        text = Path(folder, name).read_text()
        commas = {line.count(",") for line in text.splitlines()}
        assert text.endswith("\n") and len(commas) == 1, f"{name}: {commas}"
    steps = [int(row["global_step"]) for row in read_csv(Path(folder, "episodes.csv"))]
    assert steps == sorted(steps) and steps[-1] <= total


def spy(
    monkeypatch: pytest.MonkeyPatch, script: ModuleType, name: str
) -> list[tuple[tuple, dict, object]]:
    """Replace a function of the script by one that also keeps its inputs and its result."""
    real, calls = getattr(script, name), []

    def watched(*args: object, **kwargs: object) -> object:
        before = tuple(copied(x) for x in args)
        result = real(*args, **kwargs)
        calls.append((before, copied(kwargs), result))
        return result

    monkeypatch.setattr(script, name, watched)
    return calls


def wait_for(condition: Callable[[], object]) -> None:
    end = time.time() + 60
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.005)


# A fork server that has imported torch once starts each of these processes in milliseconds.
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["torch._dynamo", "ppo", "ppo_continuous"])


def child(
    script: str,
    argv: list[str],
    output: Path,
    environ: dict[str, str],
    file_limit: int | None,
    die_at: str | None,
) -> None:
    """Run in the new process: `python script.py argv`, the two streams written to files."""
    os.chdir(output)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ.update(environ)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if die_at:
        arm(die_at)
    sys.argv = [f"{script}.py", *argv]
    importlib.import_module(script).main()


def arm(call: str) -> None:
    """Make the process kill itself in its second call of os.fsync or os.replace on a checkpoint."""
    real, calls = getattr(os, call), []

    def deadly(*args: int | str | Path) -> None:
        names = [os.readlink(f"/proc/self/fd/{x}") if isinstance(x, int) else str(x) for x in args]
        calls.extend(name for name in names[:1] if "checkpoint.pt" in name)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*args)

    setattr(os, call, deadly)


def start(
    script: ModuleType,
    argv: list[str],
    output: Path,
    environ: dict[str, str] | None = None,
    file_limit: int | None = None,
    die_at: str | None = None,
) -> BaseProcess:
    """Start the script in a process of its own; output/stdout and output/stderr are what it says.

    Its exitcode is below 0 where a signal ended it.
    """
    output.mkdir(parents=True, exist_ok=True)
    args = (script.__name__, argv, output, environ or {}, file_limit, die_at)
    process = server.Process(target=child, args=args, daemon=True)
    process.start()
    return process
