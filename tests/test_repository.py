"""What holds between the files: shared blocks, flags, requirements, scripts that travel alone."""

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from helpers import ROOT, flags, metrics, read_csv
from packaging.requirements import Requirement

import ppo
import ppo_continuous

NAMES = ("ppo", "ppo_continuous", "ppo_atari")
COMMON = {"gymnasium", "numpy", "torch", "tyro", "wandb"}
SIMULATORS = {"ppo": set(), "ppo_continuous": {"mujoco"}, "ppo_atari": {"ale-py"}}
ENV_IDS = {"ppo": "CartPole-v1", "ppo_continuous": "Pendulum-v1", "ppo_atari": "PongNoFrameskip-v4"}
OWN_HELP = {("ppo_atari", "env_id"), ("ppo_atari", "norm_obs")}  # other ids; not for pixels
OWN_FLAGS = {
    "ppo": set(),
    "ppo_continuous": {"init_log_std", "min_log_std"},
    "ppo_atari": {"sticky_actions", "bf16"},
}
CLEANRL = """exp_name seed torch_deterministic cuda track wandb_project_name wandb_entity
    capture_video env_id total_timesteps learning_rate num_envs num_steps anneal_lr gamma gae_lambda
    num_minibatches update_epochs norm_adv clip_coef clip_vloss ent_coef vf_coef max_grad_norm
    target_kl""".split()

each_script = pytest.mark.parametrize("name", NAMES)


def text_of(name: str) -> str:
    return (ROOT / f"{name}.py").read_text()


def shared_blocks(text: str) -> dict[str, str]:
    """The text of each block; fails where the markers do not pair."""
    blocks = re.findall(r"^# >>> shared: (\w+)\n(.*?)^# <<< shared: \1\n", text, re.M | re.S)
    assert len(re.findall(r"^\s*# (?:>>>|<<<)", text, re.M)) == 2 * len(blocks)
    return dict(blocks)


def flags_of(name: str) -> dict[str, tuple[str, str]]:
    """Flag -> its type and its help, the comment that stands behind it."""
    body = re.search(r"^class Args:\n(.*?)^\S", text_of(name), re.M | re.S)[1]
    fields = re.findall(r"^    (\w+): (.+?) = (?:.+?)(?:  # (.+))?$", body, re.M)
    return {flag: (annotation, words) for flag, annotation, words in fields}


@pytest.mark.parametrize("name", NAMES[1:])
def test_shared_blocks_are_the_same(name: str) -> None:
    first, other = shared_blocks(text_of("ppo")), shared_blocks(text_of(name))
    assert list(first) == list(other) == ["algorithm", "records"]
    for block in first:
        pairs = zip(first[block].splitlines(), other[block].splitlines(), strict=False)
        different = [pair for pair in pairs if pair[0] != pair[1]]
        assert first[block] == other[block], f"{block}, first difference: {different[:1]}"


def test_environments_of_vectors_are_built_alike() -> None:
    """But for their actions: so each part of make_envs is tested in one script."""
    built = [inspect.getsource(script.make_envs).splitlines() for script in (ppo, ppo_continuous)]
    for line in {*built[0]} ^ {*built[1]}:
        assert "action" in line.lower() or "RecordEpisodeStatistics" in line


@pytest.mark.parametrize("name", NAMES[1:])
def test_flags_of_several_scripts_have_the_same_type_and_help(name: str) -> None:
    first, other = flags_of("ppo"), flags_of(name)
    assert other.keys() - first.keys() == OWN_FLAGS[name] and not first.keys() - other.keys()
    for flag, (annotation, words) in first.items():
        assert words or "Literal" in annotation, f"{flag} has no help"
        if (name, flag) not in OWN_HELP:
            assert first[flag] == other[flag], f"ppo.py and {name}.py: {flag}"


@each_script
def test_help_knows_every_flag_and_every_flag_of_cleanrl(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        __import__(name).main()
    said = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out)
    for flag in flags_of(name).keys() | CLEANRL:
        assert re.search(rf"--{flag.replace('_', '-')}[ ,\n]", said), flag


@each_script
def test_inline_requirements_are_those_of_the_repository(name: str) -> None:
    """Each of the PEP 723 block stands in requirements.txt, but for extras that it does without."""
    block = re.match(r"# /// script\n(.*?)# ///\n", text_of(name), re.S)[1]
    assert '# requires-python = ">=3.10"\n' in block
    listed = block.split("dependencies = ")[1].replace("#", "")
    dependencies = ast.literal_eval(re.sub(r"\s+", " ", listed).strip())
    lines = (Path(__file__).parents[1] / "requirements.txt").read_text().splitlines()
    required = {needed.name: needed for needed in map(Requirement, lines)}
    for needed in map(Requirement, dependencies):
        assert needed.specifier == required[needed.name].specifier
        assert needed.extras <= required[needed.name].extras
    packages = {re.match(r"[\w-]+", line)[0] for line in dependencies}
    assert packages == COMMON | SIMULATORS[name]


@each_script
def test_imports_are_the_dependencies(name: str) -> None:
    allowed = COMMON | set(sys.stdlib_module_names)
    allowed |= {"ale_py"} if name == "ppo_atari" else set()
    for node in ast.walk(ast.parse(text_of(name))):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules = [node.module]
        for module in modules:
            assert module.split(".")[0] in allowed, f"{name}.py imports {module}"


def test_results_are_of_the_present_scripts(
    benchmark_module: Callable[[str], ModuleType],
) -> None:
    """A table of another fingerprint belongs into results/history."""
    fingerprint = benchmark_module("sweep").fingerprint
    present = {f"{name}.py": fingerprint(text_of(name)) for name in NAMES}
    for path in (ROOT / "tests/benchmarks/results").glob("*.csv"):
        for row in read_csv(path):
            if row.get("fingerprint", "peer") != "peer":
                assert row["fingerprint"] == present[row["script"]], path.name
    for path in (ROOT / "tests/benchmarks/results").glob("*.md"):
        marks = re.findall(r"\b[0-9a-f]{12}\b", path.read_text())
        assert {*marks} <= {*present.values()}, path.name


def run(script: Path, folder: Path, **settings: object) -> None:
    """The command line, without the repository on Python's path; nothing may warn."""
    process = subprocess.run(
        [
            sys.executable,
            "-W",
            "error::DeprecationWarning:__main__",
            str(script),
            *flags(ppo, **settings),
        ],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""


@pytest.mark.slow
@each_script
def test_a_script_alone_runs_and_the_script_of_its_run_reproduces_it(
    name: str, tmp_path: Path
) -> None:
    """Copied under another name into an empty folder; then script.py with config.json's values."""
    shutil.copy(ROOT / f"{name}.py", tmp_path / "mine.py")
    sizes = {"total_timesteps": 64, "num_envs": 2, "num_steps": 16, "num_minibatches": 2}
    sizes |= {"torch_threads": 1}
    run(tmp_path / "mine.py", tmp_path, env_id=ENV_IDS[name], **sizes)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.py", "runs"}
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith(f"{ENV_IDS[name]}__mine__1__")
    assert (folder / "script.py").read_bytes() == (ROOT / f"{name}.py").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    given = {flag: value for flag, value in config.items() if value is not None}
    run(folder / "script.py", tmp_path, **(given | {"run_dir": tmp_path / "again"}))
    assert len(metrics(folder)) == 2 and metrics(folder) == metrics(tmp_path / "again")


@pytest.mark.slow
def test_an_environment_beside_a_script_alone_is_found(tmp_path: Path) -> None:
    shutil.copy(ROOT / "ppo.py", tmp_path)
    shutil.copy(Path(__file__).parent / "envs.py", tmp_path / "my_module.py")
    settings = {"env_id": "my_module:Identity-dict-v0", "eval_episodes": 1, "run_dir": "run"}
    run(tmp_path / "ppo.py", tmp_path, **settings)
    assert len(metrics(tmp_path / "run")) == 8
