"""Each classic bug of tests/bugs is introduced into a copy of its script, and its test fails."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import ROOT, copy_scripts

BUGS = sorted((Path(__file__).parent / "bugs").glob("*.patch"))


def run_its_test(path: Path, folder: Path) -> tuple[int, str]:
    """Exit code and output of the test that the patch names, in which `import ppo` is the copy."""
    folder.mkdir()
    copy_scripts(folder, path)
    test = re.search(r"^Caught by (\S+)$", path.read_text(), re.MULTILINE)[1]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test]
    env = os.environ | {"PPO_SCRIPTS_DIR": str(folder)}
    process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    return process.returncode, process.stdout + process.stderr


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, tuple[int, str]]:
    folders = [tmp_path_factory.mktemp("bugs") / path.stem for path in BUGS]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(BUGS, pool.map(run_its_test, BUGS, folders), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("path", BUGS, ids=lambda path: path.stem)
def test_each_bug_is_caught(path: Path, outcomes: dict[Path, tuple[int, str]]) -> None:
    code, output = outcomes[path]
    assert code == 1 and re.search(r"^FAILED ", output, re.MULTILINE), output
