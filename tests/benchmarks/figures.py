"""Draw the figures of the README that belong to no table.

    python tests/benchmarks/figures.py clip            # the clipped surrogate
    python tests/benchmarks/figures.py first_minute    # what the three scripts learn

clip: from `ppo_loss` itself, for both signs of the advantage, as Figure 1 of the paper.
first_minute: learning curves of the finished runs of sweep.py, a panel a script; an experiment that
has not been run is left out. Results: tests/benchmarks/figures/clip.png and first_minute.png.
"""

import argparse
import sys

import numpy as np
import torch
from sweep import HERE, ROOT, load_run, plot_curve, save

sys.path.insert(0, str(ROOT))
from ppo import ppo_loss  # noqa: E402

# script -> folder of its runs under tests/benchmarks/runs
FIRST_RUNS = {
    "ppo.py": "classic/documented/CartPole-v1",
    "ppo_continuous.py": "mujoco/defaults/HalfCheetah-v5",
    "ppo_atari.py": "atari/documented/PongNoFrameskip-v4",
}


def objective(ratio: float, advantage: float, clip_coef: float | None) -> float:
    """What PPO maximises for one sample, as a function of its probability ratio."""
    zero, one = torch.zeros(1), torch.ones(1)
    new_logprob = torch.tensor([ratio]).log()
    rows = (new_logprob, zero, advantage * one, zero, zero, zero, zero)
    weights = {"vf_coef": 0.0, "ent_coef": 0.0}
    loss, _ = ppo_loss(*rows, clip_coef=clip_coef, vf_clip_coef=None, **weights)
    return -loss.item()


def draw_clip(clip_coef: float) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained", facecolor="white")
    ratios = np.linspace(0.3, 1.7, 141)
    for axis, advantage in zip(axes, (1.0, -1.0), strict=True):
        clipped, plain = (
            [objective(ratio, advantage, coef) for ratio in ratios] for coef in (clip_coef, None)
        )
        sign = ">" if advantage > 0 else "<"
        edge = 1 + advantage * clip_coef
        axis.plot(ratios, plain, "--", color="0.6", linewidth=1.2, label="r A, not clipped")
        axis.plot(ratios, clipped, color="C0", linewidth=2, label="clipped surrogate")
        axis.plot(1, objective(1.0, advantage, clip_coef), "o", color="C3", label="old policy")
        axis.axvline(edge, color="0.4", linewidth=0.8, linestyle=":")
        beyond = (edge, ratios[-1]) if advantage > 0 else (ratios[0], edge)
        axis.axvspan(*beyond, color="C0", alpha=0.08, label="no gradient")
        axis.set_xticks([0.5, 1, edge, 1.5], ["0.5", "1", f"1 {advantage:+.0f}"[:3] + " ε", "1.5"])
        axis.set_title(f"advantage A {sign} 0", fontsize=10)
        axis.set_xlabel("probability ratio r = π_new / π_old", fontsize=9)
        axis.set_ylabel("objective, in units of |A|", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3, linewidth=0.5)
        axis.legend(fontsize=8)
    save(figure, HERE / "figures" / "clip.png")


def draw_first_minute() -> None:
    """Mean over seeds, band from the lowest to the highest."""
    import matplotlib.pyplot as plt

    runs = {}
    for script, folder in FIRST_RUNS.items():
        finished = (HERE / "runs" / folder).glob("*/summary.json")
        if members := [load_run(path.parent) for path in sorted(finished)]:
            runs[script] = members
        else:
            print(f"no finished runs in {folder}, left out")
    if not runs:
        sys.exit("nothing to draw")
    figure, axes = plt.subplots(
        1,
        len(runs),
        figsize=(3.7 * len(runs), 3),
        squeeze=False,
        layout="constrained",
        facecolor="white",
    )
    for axis, (script, members) in zip(axes.flat, runs.items(), strict=True):
        plot_curve(axis, members, "C0", 0.2, "")
        seeds = f"{len(members)} seed{'s' * (len(members) > 1)}"
        axis.set_title(f"{script}\n{members[0].env_id}, {seeds}", fontsize=10)
    save(figure, HERE / "figures" / "first_minute.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figure", choices=("clip", "first_minute"))
    parser.add_argument("--clip-coef", type=float, default=0.2)
    options = parser.parse_args()

    import matplotlib

    matplotlib.use("Agg")
    if options.figure == "clip":
        draw_clip(options.clip_coef)
    else:
        draw_first_minute()


if __name__ == "__main__":
    main()
