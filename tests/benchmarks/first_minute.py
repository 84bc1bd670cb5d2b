"""Run the README's first command and keep what it prints.

    python tests/benchmarks/first_minute.py

Result: tests/benchmarks/first_minute.md.
"""

import subprocess
import sys
import tempfile

from sweep import HERE, ROOT, measured

FLAGS = ("--env-id", "CartPole-v1")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "ppo.py"), *FLAGS]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    output = "\n".join(["$ python ppo.py " + " ".join(FLAGS), *lines])
    text = (
        f"# The first minute\n\n```text\n{output}\n```\n\n`python tests/benchmarks/first_minute.py`"
        f". {measured('torch', 'gymnasium')}.\n"
    )
    (HERE / "first_minute.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
