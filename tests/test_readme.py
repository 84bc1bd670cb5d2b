"""README.md says what is so: its commands, flags, links, names, files, metrics and code.

PYTHONPATH=. python tests/test_readme.py    # puts the scripts' line numbers right
"""

import builtins
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import pytest
import tyro
from helpers import TINY

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = [(match[1], match[2]) for match in FENCE.finditer(README)]
COMMANDS = [line for kind, text in CODE if kind == "bash" for line in text.splitlines()]
COMMANDS += re.findall(r"`((?:\w+=\S+ )?python [^`]+)`", FENCE.sub("", README))
PYTHON = [text for kind, text in CODE if kind == "python"]
PROSE = FENCE.sub("", README)
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*)")
OTHERS = {"help", "check", "standalone", "nproc-per-node", "nnodes", "rdzv-backend"}
OTHERS |= {"rdzv-endpoint", "script"}  # of torchrun; help of all, check of ruff, of conformance
SCRIPTS = {name: importlib.import_module(name) for name in ("ppo", "ppo_continuous", "ppo_atari")}


def script_commands() -> Iterator[tuple[str, list[str]]]:
    """(script, its arguments) of every command that starts one of the three."""
    for line in COMMANDS:
        for part in line.split("&&"):
            words = shlex.split(part)
            for i, word in enumerate(words):
                if word.removesuffix(".py") in SCRIPTS:
                    yield word.removesuffix(".py"), words[i + 1 :]


def parsed(name: str, argv: list[str], **changes: object) -> object:
    return dataclasses.replace(tyro.cli(SCRIPTS[name].Args, args=argv), **changes)


@pytest.mark.parametrize(("name", "argv"), script_commands(), ids=str)
def test_every_command_can_be_run(
    name: str, argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--help" in argv:
        with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit, match="0"):
            parsed(name, argv)
    else:
        SCRIPTS[name].check(parsed(name, argv), Path("new").absolute())


def test_settings_of_environments_are_those_that_are_measured(
    benchmark_module: Callable[[str], ModuleType],
) -> None:
    commands = [(name, argv) for name, argv in script_commands() if "--help" not in argv]
    for experiment in benchmark_module("sweep").EXPERIMENTS.values():
        for env_id, flags in experiment.envs.items():
            name = experiment.script.removesuffix(".py")
            if flags and not env_id.startswith("envs:"):
                wanted = parsed(name, ["--env-id", env_id, *flags.split()])
                assert any(parsed(*c) == wanted for c in commands if c[0] == name), env_id


def test_every_flag_exists() -> None:
    known = set(OTHERS)
    for script in SCRIPTS.values():
        for field in dataclasses.fields(script.Args):
            flag = field.name.replace("_", "-")
            known |= {flag, f"no-{flag}"} if field.type is bool else {flag}
    assert not set(FLAG.findall(README)) - known


def test_every_link_leads_somewhere() -> None:
    titles = re.findall(r"^#+ (.*)$", PROSE, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)\s]+)\)", PROSE):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("http"):
            assert (ROOT / target.partition("#")[0]).exists(), target
    for word in re.findall(r"[\w/.]+\.(?:py|txt|csv|patch)\b", " ".join(COMMANDS)):
        assert (ROOT / word).exists() or re.search("FOLDER|path/to", word), word


def test_it_can_be_read_in_an_afternoon_and_its_front_page_in_a_minute() -> None:
    assert len(README.splitlines()) <= 750 and len(README.encode()) <= 65_000
    assert len(README.partition("\n## PPO from nothing")[0].splitlines()) <= 150


def with_the_right_numbers(readme: str) -> str:
    """The map of ppo.py with the line where each part stands, the scripts with their lengths."""
    lines = Path(SCRIPTS["ppo"].__file__).read_text().splitlines()

    def map_row(match: re.Match) -> str:
        starts = re.compile(rf"\s*{re.escape(match[1])}\b")
        (number,) = (i for i, line in enumerate(lines, 1) if starts.match(line))
        return f"| [{number}](ppo.py#L{number}) | `{match[1]}` |"

    def script_row(match: re.Match) -> str:
        length = len(Path(SCRIPTS[match[1]].__file__).read_text().splitlines())
        return f"| [{match[1]}.py]({match[1]}.py) | {length} |"

    readme = re.sub(r"\| \[\d+\]\(ppo\.py#L\d+\) \| `([^`]+)` \|", map_row, readme)
    return re.sub(r"\| \[\w+\.py\]\((ppo\w*)\.py\) \| \d+ \|", script_row, readme)


def test_the_map_leads_to_the_lines_of_ppo() -> None:
    assert len(re.findall(r"\(ppo\.py#L\d+\)", README)) > 10
    pairs = zip(README.splitlines(), with_the_right_numbers(README).splitlines(), strict=True)
    wrong = [right for line, right in pairs if line != right]
    assert not wrong, "PYTHONPATH=. python tests/test_readme.py puts these right"


def test_every_bug_and_every_recipe_has_a_row() -> None:
    for path in (ROOT / "tests/bugs").glob("*.patch"):
        test = re.search(r"^Caught by \S+::(\w+)", path.read_text(), re.MULTILINE)[1]
        row = rf"^\| \[{path.stem}\]\(tests/bugs/{path.name}\).* \| `{test}` \| (yes|no) \|"
        row += r"( [^|]+ \|){3}$"  # returns on two environments, metrics
        assert re.search(row, README, re.MULTILINE), path.name
    for path in (ROOT / "tests/modifications").glob("*.patch"):
        assert f"| [{path.stem}](tests/modifications/{path.name}) |" in README, path.name


def test_every_linked_name_is_defined_there() -> None:
    """[`name`](script.py) and [phase 2: rollout](script.py)."""
    names = re.findall(r"\[`(\w+)`\]\((ppo\w*\.py)\)", README)
    phases = re.findall(r"\[[Pp]hase\s+(\d(?::\s+\w+)?)\]\((ppo\w*\.py)\)", README)
    assert len(names) > 30
    assert len(phases) > 10
    texts = {f"{name}.py": Path(script.__file__).read_text() for name, script in SCRIPTS.items()}
    for name, script in names:
        assert re.search(rf"^\s*(def|class) {name}\b", texts[script], re.MULTILINE), name
    for title, script in phases:
        assert f"# ---- Phase {' '.join(title.split())}" in texts[script], title


def test_every_called_name_exists() -> None:
    """`name(...)` is a function or a method of the scripts, or of Python; `ppo.name` too."""
    places = [*SCRIPTS.values(), builtins, gym.Env]
    places += [getattr(SCRIPTS["ppo"], name) for name in ("Agent", "Log", "RunningMeanStd")]
    known = {name for place in places for name in dir(place)}
    for name in re.findall(r"`(?:log\.)?(\w{3,})\([^`]*`", PROSE):
        assert name in known, name
    for name in re.findall(r"\bppo\.(\w+)", README):
        assert name == "py" or hasattr(SCRIPTS["ppo"], name), name


def test_every_file_and_metric_of_a_run_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    columns = set()
    for surrogate in ("clip", "kl-adaptive"):
        args = SCRIPTS["ppo"].Args(run_dir=surrogate, surrogate=surrogate, **TINY)
        folder = Path(SCRIPTS["ppo"].train(args))
        columns |= set((folder / "metrics.csv").read_text().split("\n")[0].split(","))
    files = {path.name for path in folder.iterdir()}
    section = README.split("| file in the run folder |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `([\w./]+)` \|", section, re.MULTILINE)) == files | {"videos/"}
    section = README.split("\n### Metrics\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `([\w/]+)` \|", section, re.MULTILINE)) == columns
    assert set(re.findall(r"`((?:losses|charts)/\w+)`", README)) <= columns | {"losses/NAME"}


@pytest.fixture
def my_envs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The README's module of that name, in the current folder as its reader has it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_envs", raising=False)  # of another test
    monkeypatch.delitem(gym.registry, "Corridor-v0", raising=False)
    (text,) = (text for text in PYTHON if "class Corridor" in text)
    Path("my_envs.py").write_text(text)
    return text


def test_python_code_runs(my_envs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block, in one namespace, with fewer steps; MiniGrid's only where that is installed."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    namespace: dict[str, object] = {}
    for text in PYTHON:
        short = text.replace("50_000", "1024").replace("100_000", "2048")
        code = compile(short, "README.md", "exec")
        if text != my_envs and ("minigrid" not in text or importlib.util.find_spec("minigrid")):
            exec(code, namespace)
    rows = Path(namespace["folder"], "metrics.csv").read_text().splitlines()
    assert rows[-1].startswith("2048,")
    assert Path("returns.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_corridor_is_learned(my_envs: str) -> None:
    (command,) = (c for c in script_commands() if "my_envs:Corridor-v0" in c[1])
    folder = SCRIPTS["ppo"].train(parsed(*command, cuda=False))
    assert json.loads(Path(folder, "summary.json").read_text())["eval_return_mean"] == 1


if __name__ == "__main__":
    (ROOT / "README.md").write_text(with_the_right_numbers(README))
