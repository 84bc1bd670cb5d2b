"""Each classic bug of tests/bugs is introduced into a copy of its script, and its test fails."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, copy_scripts

BUGS = sorted((Path(__file__).parent / "bugs").glob("*.patch"))


@pytest.mark.slow
@pytest.mark.parametrize("path", BUGS, ids=lambda path: path.stem)
def test_each_bug_is_caught(path: Path, tmp_path: Path) -> None:
    """The test that the patch names fails, where `import ppo` is the copy."""
    copy_scripts(tmp_path, path)
    test = re.search(r"^Caught by (\S+)$", path.read_text(), re.MULTILINE)[1]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test]
    env = os.environ | {"PPO_SCRIPTS_DIR": str(tmp_path)}
    process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert process.returncode == 1, process.stdout + process.stderr
    assert re.search(r"^FAILED ", process.stdout, re.MULTILINE), process.stdout
