"""README.md says what is so: flags, names, commands, code, tables and patches."""

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import pytest
import tyro
from helpers import ROOT, TINY, spy

MODIFICATIONS = ROOT / "tests" / "modifications"
README = (ROOT / "README.md").read_text()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = [(m[1], m[2]) for m in FENCE.finditer(README)]
PROSE = FENCE.sub("", README)
COMMANDS = [line for kind, text in CODE if kind == "bash" for line in text.splitlines()]
NAMES = ("ppo", "ppo_continuous", "ppo_atari")
Import = Callable[[str], ModuleType]
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*)")
# Flags of programs that are not ours, and a form that stands for many flags
OTHERS = {"standalone", "nproc-per-node", "nnodes", "rdzv-backend", "rdzv-endpoint"}  # torchrun
OTHERS |= {"help", "check", "no-"}


def load(path: Path, name: str | None = None) -> ModuleType:
    """The file as a module, under a name of its own where two files share one."""
    name = name or path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def script_commands() -> list[tuple[str, str, list[str]]]:
    """(line, script, its arguments) of every command that starts one of the three scripts."""
    found = []
    for line in COMMANDS:
        for part in line.split("&&"):
            words = shlex.split(part)
            for i, word in enumerate(words):
                if word.removesuffix(".py") in NAMES:
                    found.append((part.strip(), word.removesuffix(".py"), words[i + 1 :]))
    return found


def arguments(name: str, argv: list[str]) -> object:
    return tyro.cli(importlib.import_module(name).Args, args=argv)


def script_flags(name: str) -> dict[str, object]:
    """Flag -> default."""
    args = importlib.import_module(name).Args()
    return {field.name.replace("_", "-"): getattr(args, field.name) for field in fields(name)}


def fields(name: str) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(importlib.import_module(name).Args)


# ---- flags and metrics


def test_every_flag_exists() -> None:
    known = set(OTHERS)
    for name in NAMES:
        for flag, default in script_flags(name).items():
            known |= {flag, f"no-{flag}"} if isinstance(default, bool) else {flag}
    for program in (ROOT / "tests" / "benchmarks").glob("*.py"):
        known |= set(FLAG.findall(program.read_text()))
    unknown = set(FLAG.findall(README)) - known
    assert not unknown


def flag_rows() -> dict[str, list[str]]:
    """Flag -> the cells beside it in the tables of flags."""
    rows = re.findall(r"^\| `--([a-z0-9-]+)` \|(.*)\|$", README, re.MULTILINE)
    assert len(rows) == len(dict(rows)), "a flag has two rows"
    return {flag: [cell.strip() for cell in cells.split("|")] for flag, cells in rows}


@pytest.mark.parametrize("name", NAMES)
def test_the_tables_have_every_flag_and_default(name: str) -> None:
    rows, column = flag_rows(), NAMES.index(name)
    defaults = script_flags(name)
    for flag, default in defaults.items():
        text = "none" if default is None else f"{default}"
        text = ("on" if default else "off") if isinstance(default, bool) else text
        text = "if there" if flag == "cuda" else text
        assert flag in rows, f"--{flag} has no row"
        assert rows[flag][column] == text, f"--{flag}: {name}.py's default is {default}"
        assert rows[flag][3], f"--{flag} is not explained"
    for flag in rows.keys() - defaults.keys():
        assert rows[flag][column] == "", f"{name}.py has no --{flag}"


def test_every_metric_is_explained() -> None:
    metrics = importlib.import_module("ppo").METRICS
    for metric in metrics:
        assert f"\n| `{metric}` |" in README, metric
    assert set(re.findall(r"`((?:losses|charts)/\w+)`", README)) <= set(metrics)


# ---- names, links, details, tests


def test_every_linked_name_exists() -> None:
    """[`name`](script.py) is defined there; [phase 2](script.py) is a comment there."""
    names = re.findall(r"\[`(\w+)`\]\((ppo\w*\.py)\)", README)
    phases = re.findall(r"\[[Pp]hase\s+(\d)(?:[:,]\s+(\w+))?\]\((ppo\w*\.py)\)", README)
    assert len(names) > 30 and len(phases) > 10
    for name, script in names:
        text = (ROOT / script).read_text()
        assert re.search(rf"^\s*(def|class) {name}\b", text, re.MULTILINE), f"{script}: {name}"
    for number, title, script in phases:
        assert f"# ---- Phase {number}: {title}" in (ROOT / script).read_text(), (number, title)


def test_every_link_leads_somewhere() -> None:
    titles = re.findall(r"^#+ (.*)$", PROSE, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)\s]+)\)", PROSE):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_every_named_test_exists() -> None:
    named = set(re.findall(r"`(test_\w+\.py)::(\w+)`", README))
    assert len(named) > 35
    for file, test in named:
        text = (ROOT / "tests" / file).read_text()
        assert f"\ndef {test}(" in text, f"{file}::{test}"


def test_every_detail_of_the_scripts_is_in_the_table() -> None:
    section = README.split("\n## Implementation details\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| (\d+) \|(.*)\|$", section, re.MULTILINE))
    assert list(rows) == [str(i) for i in range(1, 32)]
    for name in NAMES:
        text = (ROOT / f"{name}.py").read_text()
        for numbers in re.findall(r"\(?details? ([\d, ]+)", text):
            for number in re.findall(r"\d+", numbers):
                assert number in rows, f"{name}.py: detail {number}"
    atari = (ROOT / "tests" / "test_atari.py").exists()
    for number, cells in rows.items():
        if "not done here" not in cells:
            assert "](ppo" in cells, f"detail {number} lacks its place"
            tested = "`test_" in cells or (cells.strip().startswith("Atari") and not atari)
            assert tested, f"detail {number} lacks its test"


# ---- commands


def test_every_command_names_an_existing_program() -> None:
    for line in COMMANDS:
        for word in shlex.split(line):
            if word.endswith((".py", ".txt")):
                assert (ROOT / word).exists(), line


@pytest.mark.parametrize(
    ("name", "argv"), [command[1:] for command in script_commands()], ids=lambda x: f"{x}"
)
def test_every_command_parses(name: str, argv: list[str]) -> None:
    if "--help" in argv:
        with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit, match="0"):
            arguments(name, argv)
        return
    args = arguments(name, argv)
    if not (args.resume or args.evaluate):
        args.check()


def test_benchmark_commands_parse() -> None:
    """Their options exist, and what they are told to run too."""
    for line in COMMANDS:
        words = shlex.split(line)
        if len(words) > 1 and words[1].startswith("tests/benchmarks/"):
            text = (ROOT / words[1]).read_text()
            for flag in FLAG.findall(line):
                assert f'"--{flag}"' in text, line
            for word in words[2:]:
                if re.fullmatch(r"[a-z][\w-]+", word):
                    assert f'"{word}"' in text, line


def test_documented_flags_are_those_of_the_benchmarks(benchmark_module: Import) -> None:
    sweep = benchmark_module("sweep")

    flags = {
        "Acrobot-v1": sweep.ACROBOT,
        "MountainCar-v0": sweep.MOUNTAIN_CAR,
        "Swimmer-v5": sweep.SWIMMER,
        "Ant-v5": sweep.ANT,
        "Pendulum-v1": sweep.PENDULUM,
        "LunarLander-v3": sweep.LUNAR_LANDER,
        "PongNoFrameskip-v4": sweep.PONG,
    }
    lines = [line for line, *_ in script_commands()]
    for env_id, documented in flags.items():
        commands = [line for line in lines if f"--env-id {env_id} " in line]
        assert [line.split(f"{env_id} ")[1] for line in commands] == [documented], env_id


def test_settings_of_an_experiment_differ(benchmark_module: Import) -> None:
    """Each by its flags or by a script whose edits fit."""
    sweep = benchmark_module("sweep")

    for name, experiment in sweep.EXPERIMENTS.items():
        script = experiment.script.removesuffix(".py")
        plain = (ROOT / experiment.script).read_text()
        seen = set()
        for setting, flags in experiment.settings.items():
            text = sweep.edited(experiment, setting)
            compile(text, setting, "exec")
            args = arguments(script, flags.split())
            args.check()
            assert (text != plain) == (setting in experiment.edits), setting
            seen.add((str(args), text))
        assert len(seen) == len(experiment.settings), f"{name}: two settings are the same"


def test_ablations_that_the_details_name_exist(benchmark_module: Import) -> None:
    sweep = benchmark_module("sweep")

    experiments = ("ablations", "ablations_cartpole")
    settings = {name for key in experiments for name in sweep.EXPERIMENTS[key].settings}
    section = README.split("\n## Implementation details\n")[1].split("\n## ")[0]
    rows = [re.split(r" *\| *", line) for line in section.splitlines() if line.startswith("| ")]
    named = {name for row in rows for name in re.findall(r"`([\w-]+)`", row[-3])}
    assert named == settings - {"defaults"}


def test_first_figures_are_those_of_the_tables(benchmark_module: Import) -> None:
    beside = benchmark_module("beside")

    assert beside.table() in README, "run python tests/benchmarks/beside.py, then readme.py"


def brief_runs() -> Iterator[tuple[str, list[str]]]:
    """Commands that train here; the rest needs a run folder, a screen or many processes."""
    for line, name, argv in script_commands():
        if line.startswith("python ") and not {"--help", "--resume", "--evaluate"} & set(argv):
            yield name, argv


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("name", "argv"), brief_runs(), ids=lambda x: f"{x}")
def test_every_training_command_runs(
    name: str, argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One iteration of each, compilation apart."""
    write_my_envs(tmp_path, monkeypatch)
    args = arguments(name, argv)
    if args.env_id.startswith("LunarLander"):
        pytest.importorskip("Box2D", reason="an extra: see the README")
    steps = args.num_envs * args.num_steps
    short = {"total_timesteps": steps, "eval_episodes": 0, "cuda": False, "compile": False}
    folder = importlib.import_module(name).train(dataclasses.replace(args, **short))
    assert json.loads(Path(folder, "summary.json").read_text())["global_step"] == steps


# ---- tables and code


def test_tables_and_patches_are_those_of_their_files() -> None:
    program = ROOT / "tests" / "benchmarks" / "readme.py"
    process = subprocess.run(
        [sys.executable, str(program), "--check"], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    blocks = set(re.findall(r"<!-- patch: (\w+) -->", README))
    assert blocks == {path.stem for path in MODIFICATIONS.glob("*.patch")}


MY_ENVS = {"my_envs": "class Corridor", "my_ant": "BlindAnt-v5"}  # and what marks their code


def write_my_envs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's my_envs.py and my_ant.py, in the current folder as its reader has them."""
    for name, mark in MY_ENVS.items():
        (text,) = (text for kind, text in CODE if kind == "python" and mark in text)
        (folder / f"{name}.py").write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))


def test_python_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block, in one namespace, with a run's folder and fewer steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    ppo = importlib.import_module("ppo")
    folder = ppo.train(ppo.Args(env_id="CartPole-v1", run_dir="run", **TINY))
    namespace: dict[str, object] = {}
    write_my_envs(tmp_path, monkeypatch)
    blocks = [text for kind, text in CODE if kind == "python"]
    blocks = [text for text in blocks if not any(mark in text for mark in MY_ENVS.values())]
    assert len(blocks) == 5
    for text in blocks:
        text = text.replace("runs/FOLDER", folder).replace("50_000", "512")
        exec(text.replace("100_000", "768"), namespace)
    (loading,) = (text for text in blocks if "load_checkpoint" in text)
    lines = loading.strip().splitlines()[2:]
    assert len(lines) == 5, "loading an agent takes five lines"
    assert Path("returns.png").stat().st_size > 1000
    rows = Path(namespace["folder"], "metrics.csv").read_text().splitlines()
    assert rows[-1].startswith("768,")
    assert gym.make("my_ant:BlindAnt-v5").observation_space.shape == (27,), "Ant-v5 has 105"


# ---- modifications


def patched(name: str, folder: Path, sibling: str | None = None) -> ModuleType:
    """The script that the patch changes, changed, as a module; or a sibling of that script."""
    patch = (MODIFICATIONS / f"{name}.patch").read_text()
    own = re.search(r"^\+\+\+ b/(\w+\.py)$", patch, re.MULTILINE)[1]
    script = sibling or own
    shutil.copy(ROOT / script, folder)
    # Beside what changes, a sibling may have other lines (another default).
    command = ["git", "apply", "--verbose", *(["-C0"] if sibling else []), "-"]
    text = patch.replace(own, script)
    process = subprocess.run(command, input=text, cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert (folder / script).read_bytes() != (ROOT / script).read_bytes()
    return load(folder / script, f"{name}_{Path(script).stem}")


def score(module: ModuleType, **settings: object) -> float:
    """Mean return of the evaluation after training."""
    folder = module.train(module.Args(run_dir="run", cuda=False, **settings))
    return json.loads(Path(folder, "summary.json").read_text())["eval_return_mean"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_my_envs(tmp_path, monkeypatch)
    monkeypatch.syspath_prepend(str(MODIFICATIONS))
    return tmp_path


@pytest.mark.parametrize("path", sorted(MODIFICATIONS.glob("*.patch")), ids=lambda x: x.stem)
def test_modifications_apply_and_are_short(path: Path, tmp_path: Path) -> None:
    assert callable(patched(path.stem, tmp_path).train)
    assert len(path.read_text().splitlines()) < 40


@pytest.mark.parametrize("sibling", [None, "ppo_continuous.py"])
def test_two_learning_rates_leave_no_parameter_out(sibling: str | None, folder: Path) -> None:
    """In a sibling too, for which the patch was not made: it has parameters of its own."""
    module = patched("critic_learning_rate", folder, sibling)
    env_id = "Pendulum-v1" if sibling else "CartPole-v1"
    args = module.Args(**TINY | {"env_id": env_id, "run_dir": "run", "total_timesteps": 64})
    groups = module.load_checkpoint(module.train(args))["optimizer"]["param_groups"]
    with contextlib.closing(module.make_envs(args, 1)) as envs:
        parameters = list(module.Agent(envs).parameters())
    assert len(groups) == 2
    assert sum(len(group["params"]) for group in groups) == len(parameters)


@pytest.mark.slow
def test_the_corridor_is_learned(folder: Path) -> None:
    ppo = importlib.import_module("ppo")
    assert score(ppo, env_id="my_envs:Corridor-v0", total_timesteps=20_000) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip_schedule", "critic_learning_rate"])
def test_schedules_still_learn_cartpole(name: str, folder: Path) -> None:
    module = patched(name, folder)
    assert score(module, total_timesteps=100_000) > 400


@pytest.mark.slow
def test_masked_actions_are_never_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masked raises at an illegal action; the unchanged script runs into that."""
    settings = {"env_id": "masked:Masked-v0", "total_timesteps": 30_000}
    assert score(patched("action_mask", folder), **settings) > 9
    (folder / "unchanged").mkdir()
    monkeypatch.chdir(folder / "unchanged")
    with pytest.raises(RuntimeError, match="illegal"):
        score(importlib.import_module("ppo"), **settings)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_the_bonus_finds_the_end_of_the_long_corridor(seed: int, folder: Path) -> None:
    """Without the bonus it depends on luck: a policy that no reward moves drifts."""
    settings = {"env_id": "my_envs:LongCorridor-v0", "total_timesteps": 50_000, "seed": seed}
    assert score(patched("intrinsic_reward", folder), **settings) == 1


def test_the_bonus_pays_for_rare_places_where_the_corridor_pays_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"env_id": "my_envs:LongCorridor-v0", **TINY}
    module = patched("intrinsic_reward", folder)
    for script, bonus in ((importlib.import_module("ppo"), False), (module, True)):
        calls = spy(monkeypatch, script, "compute_gae")
        script.train(script.Args(run_dir=f"bonus-{bonus}", **settings))
        for (rewards, *_), _, _ in calls:
            assert (rewards > 0).all() if bonus else not rewards.any()
        # Each of n arrivals at a place pays bonus / sqrt(n): their squares make bonus^2 a place.
        places = (calls[0][0][0] / 0.1).square().sum().item()
        assert places == pytest.approx(round(places), abs=1e-4) and (places > 2) == bonus


@pytest.mark.slow
def test_state_dependent_deviations_learn_the_pendulum(folder: Path) -> None:
    """A random policy keeps InvertedPendulum up for about 6 steps."""
    module = patched("state_dependent_std", folder)
    assert score(module, env_id="InvertedPendulum-v5", total_timesteps=40_000) > 100
