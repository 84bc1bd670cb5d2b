"""Copy the measured tables and the patches of tests/modifications into README.md.

    python tests/benchmarks/readme.py            # after a benchmark has written its NAME.md
    python tests/benchmarks/readme.py --check    # exit code 1 where README.md would change

What stands between `<!-- table: NAME -->` and `<!-- end: NAME -->` is tests/benchmarks/NAME.md
without its title, or "Not measured yet."; between `<!-- patch: NAME -->` and `<!-- end: NAME -->`
it is tests/modifications/NAME.patch.
"""

import argparse
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BLOCK = re.compile(r"(<!-- (table|patch): (\w+) -->\n).*?(<!-- end: \3 -->\n)", re.DOTALL)


def table(name: str) -> str:
    """A result file as a part of the README: links and headings moved one level."""
    path = HERE / f"{name}.md"
    if not path.exists():
        return "Not measured yet."
    text = re.sub(r"\A# .*\n+", "", path.read_text().strip())
    text = re.sub(r"^#+ ", "#### ", text, flags=re.MULTILINE)
    return text.replace("](figures/", "](tests/benchmarks/figures/")


def patch(name: str) -> str:
    return f"```diff\n{(ROOT / 'tests' / 'modifications' / f'{name}.patch').read_text()}```"


def filled(text: str) -> str:
    """The README's text with every block as it should be."""
    makers = {"table": table, "patch": patch}
    return BLOCK.sub(lambda m: f"{m[1]}{makers[m[2]](m[3])}\n{m[4]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    path = ROOT / "README.md"
    old = path.read_text()
    new = filled(old)
    if not parser.parse_args().check:
        path.write_text(new)
    elif old != new:
        blocks = zip(BLOCK.finditer(old), BLOCK.finditer(new), strict=True)
        names = ", ".join(m[3] for m, n in blocks if m[0] != n[0])
        sys.exit(f"README.md differs from its tables or patches ({names}): run {sys.argv[0]}")


if __name__ == "__main__":
    main()
