"""Draw the clipped surrogate from `ppo_loss` itself, for both signs of the advantage.

    python tests/benchmarks/figures.py

As Figure 1 of the paper, with the gradient's direction. Result: tests/benchmarks/figures/clip.png.
"""

import argparse
import sys

import numpy as np
import torch
from sweep import HERE, ROOT, save

sys.path.insert(0, str(ROOT))
from ppo import ppo_loss  # noqa: E402


def objective(ratio: float, advantage: float, clip_coef: float | None) -> float:
    """What PPO maximises for one sample, as a function of its probability ratio."""
    zero, one = torch.zeros(1), torch.ones(1)
    new_logprob = torch.tensor([ratio]).log()
    rows = (new_logprob, zero, advantage * one, zero, zero, zero, zero)
    weights = {"vf_coef": 0.0, "ent_coef": 0.0}
    loss, _ = ppo_loss(*rows, clip_coef=clip_coef, vf_clip_coef=None, **weights)
    return -loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clip-coef", type=float, default=0.2)
    clip_coef = parser.parse_args().clip_coef

    import matplotlib

    matplotlib.use("Agg")
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


if __name__ == "__main__":
    main()
