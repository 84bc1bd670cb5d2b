"""Gather the figures of a first look, beside other implementations, from the measured tables.

    python tests/benchmarks/beside.py    # after any of the programs that it names

Result: beside.md.
"""

import statistics

from sweep import HERE, read_csv


def rows(name: str) -> list[dict[str, str]]:
    return read_csv(HERE / f"{name}.csv")


def seconds_to_solve() -> str:
    seconds = [float(row["seconds"]) for row in rows("cartpole")]
    return (
        f"{statistics.median(seconds):.1f} s (median of {len(seconds)} seeds; "
        f"worst {max(seconds):.1f} s)"
    )


def speed(setting: str) -> str:
    pairs = [row for row in rows("speed") if row["setting"] == setting]
    median = {
        name: statistics.median(float(row[name]) for row in pairs)
        for name in ("ours_SPS", "sb3_SPS", "ratio")
    }
    return (
        f"**{median['ratio']:.2f} times** as fast ({median['ours_SPS']:,.0f} against "
        f"{median['sb3_SPS']:,.0f} steps a second, {len(pairs)} pairs)"
    )


def score(env_id: str, name: str) -> str:
    row = next(row for row in rows(name) if row["environment"] == env_id)
    mean, std = float(row["eval_mean"]), float(row["eval_std"])
    return f"{mean:.0f} ± {std:.0f} ({len(row['seeds'].split())} seeds)"


def kills() -> str:
    checks = ("loads", "resumed", "metrics", "episodes", "kept")
    survived = [all(row[check] == "True" for check in checks) for row in rows("kills")]
    return f"{sum(survived)} of {len(survived)} runs went on with nothing missing or doubled"


def start_up() -> str:
    ratios = [float(row["ratio"]) for row in rows("startup")]
    return f"{statistics.median(ratios):.2f} times the time of its imports ({len(ratios)} pairs)"


def table() -> str:
    against = "stable-baselines3, the same setting"
    measured = (
        ("CartPole-v1 solved (475), from process start", seconds_to_solve(), "cartpole_time.py"),
        (f"CartPole-v1, against {against}", speed("cartpole"), "speed.py cartpole"),
        ("the same with `--compile`", speed("cartpole-compile"), "speed.py cartpole-compile"),
        (
            f"HalfCheetah-v5, against {against}",
            speed("halfcheetah-sb3"),
            "speed.py halfcheetah-sb3",
        ),
        (
            "HalfCheetah-v5, each with its defaults",
            speed("halfcheetah-defaults"),
            "speed.py halfcheetah-defaults",
        ),
        (
            "the same with our `--compile`",
            speed("halfcheetah-compile"),
            "speed.py halfcheetah-compile",
        ),
        (f"Breakout on the CPU, against {against}", speed("atari"), "speed.py atari"),
        ("the same with `--bf16`", speed("atari-bf16"), "speed.py atari-bf16"),
        (
            "HalfCheetah-v5, evaluation after 1M steps",
            score("HalfCheetah-v5", "mujoco"),
            "sweep.py mujoco",
        ),
        ("process start to the first step", start_up(), "startup.py"),
        ("killed at a random moment (`kill -9`), resumed", kills(), "kills.py"),
    )
    lines = ["| what | measured here | `python tests/benchmarks/...` |", "| --- | --- | --- |"]
    lines += [f"| {what} | {figure} | `{program}` |" for what, figure, program in measured]
    return "\n".join(lines)


def main() -> None:
    text = "# Beside other implementations: measured\n\n" + table() + "\n"
    (HERE / "beside.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
