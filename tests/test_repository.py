"""What holds between the files: shared blocks, help texts, requirements, scripts that travel."""

import ast
import contextlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import pytest
from helpers import ROOT, TINY, flags, metrics, tiny

import ppo
import ppo_continuous

NAMES = ("ppo.py", "ppo_continuous.py", "ppo_atari.py")
PATHS = [ROOT / name for name in NAMES if (ROOT / name).exists()]
CARD = {"gymnasium", "numpy", "torch", "tyro", "wandb"}

each_script = pytest.mark.parametrize("path", PATHS, ids=[path.name for path in PATHS])


def shared_blocks(text: str) -> dict[str, list[str]]:
    """The lines of each block; raises where the markers do not pair."""
    blocks: dict[str, list[str]] = {}
    inside = None
    for line in text.splitlines():
        mark = re.fullmatch(r"\s*# (>>>|<<<) shared: (\w+)", line)
        if not mark:
            assert not re.match(r"\s*# (>>>|<<<)", line), f"odd marker: {line}"
            if inside:
                blocks[inside].append(line)
        elif mark[1] == ">>>":
            assert inside is None, f"{mark[2]} starts inside {inside}"
            assert mark[2] not in blocks, f"{mark[2]} stands twice"
            inside = mark[2]
            blocks[inside] = []
        else:
            assert inside == mark[2], f"{mark[2]} ends inside {inside}"
            inside = None
    assert inside is None, f"{inside} does not end"
    return blocks


def first_difference(one: list[str], other: list[str]) -> str | None:
    for number, pair in enumerate(zip_longest(one, other), 1):
        if pair[0] != pair[1]:
            return f"line {number}: {pair[0]!r} against {pair[1]!r}"
    return None


@pytest.mark.parametrize("path", PATHS[1:], ids=[path.name for path in PATHS[1:]])
def test_shared_blocks_are_the_same(path: Path) -> None:
    first, other = (shared_blocks(file.read_text()) for file in (PATHS[0], path))
    assert list(first) == list(other)
    assert first
    for name in first:
        difference = first_difference(first[name], other[name])
        assert difference is None, f"{PATHS[0].name} and {path.name}, {name}, {difference}"


def test_the_comparison_finds_a_difference() -> None:
    """Also of a space, of a line more, and of markers that do not pair."""
    text = "# >>> shared: x\na = 1\nb = 2\n# <<< shared: x\n"
    block = shared_blocks(text)["x"]
    assert block == ["a = 1", "b = 2"]
    assert first_difference(block, ["a = 1", "b = 2"]) is None
    assert first_difference(block, ["a = 1", "b = 2 "]) == "line 2: 'b = 2' against 'b = 2 '"
    assert first_difference(block, [*block, ""]) == "line 3: None against ''"
    for bad in (text[:-20], text + text, text.replace("<<< shared: x", "<<< shared: y")):
        with pytest.raises(AssertionError):
            shared_blocks(bad)


def args_class(path: Path) -> ast.ClassDef:
    tree = ast.parse(path.read_text())
    return next(x for x in tree.body if isinstance(x, ast.ClassDef) and x.name == "Args")


def help_texts(path: Path) -> dict[str, tuple[str, str]]:
    """Field name -> its type and its docstring, which is what --help prints."""
    body = args_class(path).body
    texts = {}
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            assert isinstance(following, ast.Expr), f"{path.name}: {ast.unparse(node)} has no text"
            text = ast.literal_eval(following.value)
            texts[ast.unparse(node.target)] = (ast.unparse(node.annotation), text)
    return texts


def test_common_flags_have_the_same_text() -> None:
    first = help_texts(PATHS[0])
    assert len(first) > 30
    for path in PATHS[1:]:
        other = help_texts(path)
        assert len(first.keys() & other.keys()) > 30
        for name in first.keys() & other.keys():
            assert first[name] == other[name], f"{PATHS[0].name}, {path.name}: {name}"


def test_ppo_and_ppo_continuous_have_the_same_flags() -> None:
    assert list(help_texts(ROOT / "ppo.py")) == list(help_texts(ROOT / "ppo_continuous.py"))


def test_flags_of_cleanrl_exist() -> None:
    names = """exp_name seed torch_deterministic cuda track wandb_project_name wandb_entity
    capture_video env_id total_timesteps learning_rate num_envs num_steps anneal_lr gamma
    gae_lambda num_minibatches update_epochs norm_adv clip_coef clip_vloss ent_coef vf_coef
    max_grad_norm target_kl""".split()
    for path in PATHS:
        assert set(names) <= set(help_texts(path))


@each_script
def test_no_help_text_only_repeats_its_flag(path: Path) -> None:
    for name, (_, text) in help_texts(path).items():
        words = set(re.findall(r"[a-z]+", text.lower())) - set(name.split("_"))
        assert len(words) >= 3 or name == "wandb_project_name" or name == "wandb_entity", name
        assert "\n" not in text and not text.endswith("."), name


@each_script
def test_inline_requirements_are_those_of_the_repository(path: Path) -> None:
    """Each line of the PEP 723 block stands word for word in requirements.txt."""
    lines = path.read_text().splitlines()
    assert lines[0] == "# /// script"
    block = lines[1 : lines.index("# ///")]
    dependencies = [match[1] for line in block if (match := re.fullmatch(r'#   "(.+)",', line))]
    required = (ROOT / "requirements.txt").read_text().splitlines()
    assert dependencies
    assert set(dependencies) <= set(required)
    distributions = {re.match(r"[\w-]+", line)[0] for line in dependencies}
    simulators = {"ppo_continuous.py": {"mujoco"}, "ppo_atari.py": {"ale-py"}}
    assert distributions == CARD | simulators.get(path.name, set())  # pinned, as scores need it
    assert block[:2] == ['# requires-python = ">=3.10"', "# dependencies = ["]
    assert len(block) == len(dependencies) + 3


@each_script
def test_imports_are_those_of_the_card(path: Path) -> None:
    allowed = CARD | set(sys.stdlib_module_names)
    allowed |= {"ale_py"} if path.name == "ppo_atari.py" else set()
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules = [node.module]
        for module in modules:
            assert module.split(".")[0] in allowed, f"{path.name} imports {module}"


@each_script
def test_length_of_the_page(path: Path) -> None:
    """Width 100, a docstring of at most 40 lines; the page grows no further."""
    text = path.read_text()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert len(ast.get_docstring(ast.parse(text)).splitlines()) <= 40
    end_of_algorithm = lines.index("# <<< shared: algorithm")
    assert end_of_algorithm <= 738, f"{end_of_algorithm} lines of algorithm"
    assert len(lines) <= 1097, f"{len(lines)} lines"


def test_no_line_is_too_long() -> None:
    for path in [*PATHS, *(ROOT / "tests").glob("*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{path.name}:{number}"


def environment_without_the_repository() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.mark.slow
@pytest.mark.parametrize("script", [ppo, ppo_continuous], ids=["ppo", "ppo_continuous"])
def test_a_script_that_travels_alone_runs(script: object, tmp_path: Path) -> None:
    """Copied to an empty folder: help, and a run of an environment that stands beside it."""
    name = f"{script.__name__}.py"
    shutil.copy(ROOT / name, tmp_path)
    shutil.copy(ROOT / "tests" / "envs.py", tmp_path / "my_module.py")
    box = "Box" if script is ppo_continuous else ""
    env_id = f"my_module:Identity{box}-dict-v0"
    for argv in (["--help"], flags(script, env_id=env_id, run_dir="run", eval_episodes=1)):
        process = subprocess.run(
            [sys.executable, "-W", "error::DeprecationWarning:__main__", name, *argv],
            cwd=tmp_path,
            env=environment_without_the_repository(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == 0, process.stderr
        assert process.stderr == ""
        if argv == ["--help"]:
            for flag in help_texts(ROOT / name):
                assert f"--{flag.replace('_', '-')}" in process.stdout, flag
    assert len(metrics(tmp_path / "run")) == TINY["total_timesteps"] // 64
    assert (tmp_path / "run" / "script.py").read_bytes() == (ROOT / name).read_bytes()
    left = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert left == {name, "my_module.py", "run"}


def test_a_copy_may_rename_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another default of exp_name: it still reads the original's checkpoints, and knows Atari."""
    folder = ppo.train(tiny(ppo, run_dir=str(tmp_path / "a")))
    for name in ("ppo", "ppo_atari"):
        text = (ROOT / f"{name}.py").read_text()
        default = f'exp_name: str = "{name}"'
        assert text.count(default) == 1
        (tmp_path / f"my_{name}.py").write_text(text.replace(default, 'exp_name: str = "mine"'))
    monkeypatch.syspath_prepend(str(tmp_path))
    mine, atari = importlib.import_module("my_ppo"), importlib.import_module("my_ppo_atari")
    resumed = mine.train(mine.Args(resume=folder, total_timesteps=2 * TINY["total_timesteps"]))
    assert len(metrics(Path(resumed))) == 2 * TINY["total_timesteps"] // 64
    with contextlib.closing(atari.make_envs(atari.Args(env_id="ALE/Pong-v5"), 1)) as envs:
        assert envs.single_observation_space.shape == (4, 84, 84)


@pytest.mark.slow
@pytest.mark.parametrize("script", [ppo, ppo_continuous], ids=["ppo", "ppo_continuous"])
def test_script_py_of_a_run_reproduces_it(script: object, tmp_path: Path) -> None:
    """script.py of the folder, with the arguments of config.json."""
    folder = script.train(tiny(script, run_dir=str(tmp_path / "a")))
    config = json.loads(Path(folder, "config.json").read_text())
    given = {name: config[name] for name in vars(script.Args()) if config[name] is not None}
    given |= {"run_dir": str(tmp_path / "b")}
    words = flags(script, **given)
    process = subprocess.run(
        [sys.executable, f"{folder}/script.py", *words], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
