"""Memory and open files of a long run: two million steps of CartPole-v1 in 64 environments.

    python tests/benchmarks/long_run.py --steps 2000000

Each second, the resident memory of the process, its open file descriptors and its threads are read
from /proc (Linux) beside the step that metrics.csv has reached.
Results: tests/benchmarks/long_run.csv, every sample, and long_run.md.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sweep import HERE, ROOT, markdown, measured, write_csv

FLAGS = "--env-id CartPole-v1 --num-envs 64 --num-steps 32 --num-minibatches 8 --eval-episodes 0"
MARKS = (0.1, 0.5, 1.0)  # of the run


def usage(pid: int) -> tuple[float, int, int]:
    """Resident memory in MiB, open file descriptors, threads."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    memory = int(fields["VmRSS"].split()[0]) / 1024
    return memory, len(os.listdir(f"/proc/{pid}/fd")), int(fields["Threads"])


def last_step(path: Path) -> int:
    """global_step of the last whole row, 0 before the first."""
    if not path.exists():
        return 0
    rows = path.read_bytes().rpartition(b"\n")[0].splitlines()[1:]
    return int(rows[-1].split(b",")[0]) if rows else 0


def sample(process: subprocess.Popen, path: Path) -> list[tuple[float, int, float, int, int]]:
    """(seconds, step, MiB, descriptors, threads), once a second until the process ends."""
    samples, start = [], time.time()
    while process.poll() is None:
        try:
            samples.append((time.time() - start, last_step(path), *usage(process.pid)))
        except (OSError, KeyError):  # it is just ending
            continue
        if len(samples) % 10 == 0:
            print("{:.0f} s, step {:,}, {:.1f} MiB, {}, {}".format(*samples[-1]), flush=True)
        time.sleep(1)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2_000_000)
    options = parser.parse_args()
    command = f"ppo.py {FLAGS} --total-timesteps {options.steps}"
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder, "run")
        process = subprocess.Popen(
            [sys.executable, *command.split(), "--run-dir", str(run_dir)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )
        samples = sample(process, run_dir / "metrics.csv")
        if process.returncode:
            sys.exit(f"exit code {process.returncode}")
        end = last_step(run_dir / "metrics.csv")
        sizes = {path.name: path.stat().st_size for path in run_dir.iterdir()}
    samples = [s for s in samples if s[1] < end]  # in training, not while it tidies up
    # The first sample at each mark; for the end, the last one.
    chosen = [next((s for s in samples if s[1] >= mark * end), samples[-1]) for mark in MARKS[:-1]]
    chosen.append(samples[-1])
    after = [s for s in samples if s[1] >= MARKS[0] * end]
    growth = samples[-1][2] - chosen[0][2]
    most = max(s[2] for s in after) - chosen[0][2]
    comment = f"{measured('torch', 'gymnasium', 'numpy')}; {command}"
    header = ["seconds", "global_step", "MiB", "descriptors", "threads"]
    rows = [[f"{s[0]:.1f}", s[1], f"{s[2]:.2f}", s[3], s[4]] for s in samples]
    write_csv(HERE / "long_run.csv", header, rows, comment)
    cells = [
        [f"{mark:.0%}", f"{step:,}", f"{seconds:,.0f}", f"{memory:.1f}", files, threads]
        for mark, (seconds, step, memory, files, threads) in zip(MARKS, chosen, strict=True)
    ]
    header = ["of the run", "step", "seconds", "memory, MiB", "open descriptors", "threads"]
    text = (
        f"# long run\n\n`python tests/benchmarks/long_run.py --steps {options.steps}`. {comment}."
        f"\n\nResident memory, open file descriptors and threads of the process, read once a "
        f"second ({len(samples)} samples). After the first tenth, memory grows by "
        f"**{growth:+.1f} MiB** to the end of the run, and by at most {most:+.1f} MiB in any "
        f"sample; descriptors stay between {min(s[3] for s in after)} and "
        f"{max(s[3] for s in after)}. The files of the run have {sum(sizes.values()) / 1e6:.1f} MB "
        f"at the end, `episodes.csv` {sizes['episodes.csv'] / 1e6:.1f} of it.\n\n"
    )
    (HERE / "long_run.md").write_text(text + markdown(header, cells))
    print(text + markdown(header, cells))


if __name__ == "__main__":
    main()
