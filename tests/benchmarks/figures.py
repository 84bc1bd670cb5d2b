"""Draw figures of the tables in results/, and the clipped surrogate.

    python tests/benchmarks/figures.py mujoco table1   # of experiments: results/NAME.csv
    python tests/benchmarks/figures.py first_minute    # what the scripts learn
    python tests/benchmarks/figures.py clip            # from `ppo_loss`, as Figure 1 of the paper

An experiment with up to three settings becomes learning curves, of the rows that have one; one with
more becomes a dot for each seed. Results: figures/NAME.png.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
from sweep import EXPERIMENTS
from tables import EVAL, HERE, RESULTS, ROOT, TRAIN, Row, grouped, read, score

sys.path.insert(0, str(ROOT))
import ppo  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

FIRST_RUNS = [  # experiment, environment
    ("cartpole", "CartPole-v1"),
    ("mujoco", "HalfCheetah-v5"),
    ("mujoco", "Hopper-v5"),
    ("mujoco", "Walker2d-v5"),
    ("atari", "PongNoFrameskip-v4"),
]


def with_curve(rows: list[Row]) -> list[Row]:
    """Those that have a learning curve."""
    return [row for row in rows if row.get("curve")]


def plot_curve(axis: plt.Axes, rows: list[Row], color: str, label: str) -> None:
    """Mean over seeds, and a band from the lowest to the highest."""
    curves = np.array([row["curve"].split() for row in rows], float)
    grid = int(rows[0]["global_step"]) / 1e6 * np.arange(1, curves.shape[1] + 1) / curves.shape[1]
    seen = ~np.isnan(curves).any(axis=0)  # an episode of every seed has ended
    grid, curves = grid[seen], curves[:, seen]
    axis.plot(grid, curves.mean(axis=0), color=color, label=label, linewidth=1.5)
    axis.fill_between(grid, curves.min(axis=0), curves.max(axis=0), color=color, alpha=0.2)
    axis.set_xlabel("environment steps (millions)", fontsize=9)
    axis.set_ylabel("return, last 100 episodes", fontsize=9)
    axis.set_xlim(left=0)


def panels(rows: int, columns: int, width: float, height: float) -> tuple[plt.Figure, np.ndarray]:
    size = (width * columns, height * rows + 0.4)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3, linewidth=0.5)
    return figure, axes


def save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100, facecolor="white")
    plt.close(figure)
    print(path)


def draw_curves(rows: list[Row], path: Path) -> None:
    """A panel an environment, a line a setting."""
    envs = grouped(rows, "env_id")
    columns = min(len(envs), 4)
    figure, axes = panels(-(-len(envs) // columns), columns, 3.6, 2.8)
    for axis in axes.flat[len(envs) :]:
        axis.set_visible(False)
    for axis, ((env_id,), runs) in zip(axes.flat, envs.items(), strict=False):
        settings = grouped(runs, "setting")
        for i, ((setting,), members) in enumerate(settings.items()):
            plot_curve(axis, members, f"C{i}", f"{setting}, {len(members)} seeds")
        axis.set_title(env_id, fontsize=10)
        axis.legend(fontsize=8)
    save(figure, path)


def draw_dots(rows: list[Row], path: Path) -> None:
    """A row an environment, a panel a score: a dot each seed, a bar at each setting's mean."""
    envs, settings = grouped(rows, "env_id"), [name for (name,) in grouped(rows, "setting")]
    figure, axes = panels(len(envs), 2, 4.2, 0.6 + 0.22 * len(settings))
    for line, ((env_id,), runs) in zip(axes, envs.items(), strict=True):
        titles = {TRAIN: "training, last 100", EVAL: "evaluation"}
        for axis, (column, title) in zip(line, titles.items(), strict=True):
            for (setting,), members in grouped(runs, "setting").items():
                values, y = [score(row, column) for row in members], settings.index(setting)
                axis.scatter(values, [y] * len(values), s=14, color="C0", alpha=0.6, linewidth=0)
                axis.plot([np.mean(values)] * 2, [y - 0.35, y + 0.35], color="C1", linewidth=2)
            axis.set_yticks(range(len(settings)), settings)
            axis.set_ylim(len(settings) - 0.5, -0.5)
            axis.set_title(f"{env_id}, {title}", fontsize=10)
    figure.suptitle("Returns: a dot a seed, a bar at their mean", fontsize=10)
    save(figure, path)


def draw_first_minute(path: Path) -> None:
    runs = []
    for name, env_id in FIRST_RUNS:
        rows = with_curve(read(RESULTS / f"{name}.csv"))
        rows = [row for row in rows if row["env_id"] == env_id]
        if rows:
            runs.append(rows)
        else:
            print(f"no learning curves of {env_id} in {name}.csv, left out")
    if not runs:
        sys.exit("nothing to draw")
    figure, axes = panels(1, len(runs), 2.9, 2.6)
    for axis, rows in zip(axes.flat, runs, strict=True):
        plot_curve(axis, rows, "C0", "")
        axis.set_title(f"{rows[0]['script']}\n{rows[0]['env_id']}, {len(rows)} seeds", fontsize=10)
    save(figure, path)


def objective(ratio: float, advantage: float, surrogate: str) -> float:
    """What PPO maximizes for one sample, as a function of its probability ratio."""
    probability = torch.tensor([[0.5, 0.5], [0.5 * ratio, 1 - 0.5 * ratio]])
    old, new = probability.log().split(1)
    agent = SimpleNamespace(
        features=lambda rows: rows["obs"],
        get_dist=lambda features: new,
        get_value=lambda features: torch.zeros(1),
    )
    args = ppo.Args(surrogate=surrogate, norm_adv=False, vf_coef=0.0, ent_coef=0.0)
    zero = torch.zeros(1)
    mb = {"obs": zero, "actions": torch.zeros(1, dtype=torch.int64), "dist": old}
    mb |= {"logprobs": old[:, 0], "advantages": zero + advantage, "values": zero, "returns": zero}
    return -ppo.ppo_loss(agent, args, mb, torch.tensor(0.0))[0].item()


def draw_clip(path: Path) -> None:
    figure, axes = panels(1, 2, 4, 2.9)
    ratios, clip_coef = np.linspace(0.3, 1.7, 141), ppo.Args().clip_coef
    for axis, advantage in zip(axes.flat, (1.0, -1.0), strict=True):
        plain, clipped = (
            [objective(ratio, advantage, surrogate) for ratio in ratios]
            for surrogate in ("none", "clip")
        )
        edge = 1 + advantage * clip_coef
        axis.plot(ratios, plain, "--", color="0.6", linewidth=1.2, label="r A, not clipped")
        axis.plot(ratios, clipped, color="C0", linewidth=2, label="clipped surrogate")
        axis.plot(1, objective(1.0, advantage, "clip"), "o", color="C3", label="old policy")
        axis.axvline(edge, color="0.4", linewidth=0.8, linestyle=":")
        beyond = (edge, ratios[-1]) if advantage > 0 else (ratios[0], edge)
        axis.axvspan(*beyond, color="C0", alpha=0.08, label="no gradient")
        axis.set_xticks([0.5, 1, edge, 1.5], ["0.5", "1", f"1 {'-+'[advantage > 0]} ε", "1.5"])
        axis.set_title(f"advantage A {'<>'[advantage > 0]} 0", fontsize=10)
        axis.set_xlabel("probability ratio r = π_new / π_old", fontsize=9)
        axis.set_ylabel("objective, in units of |A|", fontsize=9)
        axis.legend(fontsize=8)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", nargs="+", choices=[*EXPERIMENTS, "first_minute", "clip"])
    for name in parser.parse_args().figures:
        path = HERE / "figures" / f"{name}.png"
        if name == "clip":
            draw_clip(path)
        elif name == "first_minute":
            draw_first_minute(path)
        elif rows := read(RESULTS / f"{name}.csv"):
            if len(grouped(rows, "setting")) > 3:
                draw_dots(rows, path)
            elif curves := with_curve(rows):
                draw_curves(curves, path)
            else:
                sys.exit(f"no row of {RESULTS / name}.csv has a learning curve: train again")
        else:
            sys.exit(f"there is no {RESULTS / name}.csv")


if __name__ == "__main__":
    main()
