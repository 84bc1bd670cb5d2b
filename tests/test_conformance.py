"""conformance.py passes on the scripts and on modifications, and fails on a bug."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, copy_scripts

TESTS = Path(__file__).parent


def failures(
    folder: Path, patch: str = "", script: str = "ppo", options: tuple[str, ...] = (), **edit: str
) -> set[str]:
    """The checks that fail on a copy of the script with the patch, or `old` replaced by `new`."""
    copy_scripts(folder, *([TESTS / f"{patch}.patch"] if patch else []))
    if edit:
        copy = folder / f"{script}.py"
        assert edit["old"] in copy.read_text()
        copy.write_text(copy.read_text().replace(edit["old"], edit["new"]))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["tests/conformance.py", "--script", folder / f"{script}.py", *options]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode in (0, 1), process.stdout + process.stderr
    return set(re.findall(r"^(?:FAILED|ERROR) \S+::(\w+)", process.stdout, re.MULTILINE))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["ppo", "ppo_continuous", "ppo_atari"])
def test_the_scripts_conform(script: str, tmp_path: Path) -> None:
    assert failures(tmp_path, script=script) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patch", "script"),
    [("recurrent", "ppo"), ("multidiscrete", "ppo"), ("tanh_squashed", "ppo_continuous")],
)
def test_modifications_conform(patch: str, script: str, tmp_path: Path) -> None:
    assert failures(tmp_path, f"modifications/{patch}", script) == set()


@pytest.mark.slow
def test_a_script_whose_environments_are_unknown_conforms_with_one_named(tmp_path: Path) -> None:
    script = {"patch": "modifications/pixels", "script": "ppo_atari"}
    assert "test_same_seed_same_numbers" in failures(tmp_path, **script)
    assert failures(tmp_path, **script, options=("--env-id", "pixels:Catch-v0")) == set()


@pytest.mark.slow
def test_a_bug_fails_its_checks(tmp_path: Path) -> None:
    names = {"test_advantages_are_those_of_gae", "test_a_time_limit_is_no_death"}
    assert failures(tmp_path, "bugs/time_limit_as_death") == names


@pytest.mark.slow
def test_frozen_parameters_conform(tmp_path: Path) -> None:
    old = "        self.critic = mlp("
    new = "        self.frozen = nn.Linear(2, 2).requires_grad_(False)\n"
    assert failures(tmp_path, old=old, new=new + old) == set()


@pytest.mark.slow
def test_an_averaged_agent_without_the_statistics_fails(tmp_path: Path) -> None:
    old = '{"agent": agent, "optimizer"'
    new = '{"agent": agent, "average": Agent(envs, args), "optimizer"'
    names = {"test_resuming_loses_nothing_and_evaluating_repeats"}
    assert failures(tmp_path, old=old, new=new) == names
