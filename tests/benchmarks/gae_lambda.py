"""Measure what lambda does to `compute_gae`: its bias and its noise, on a small Markov chain.

    python tests/benchmarks/gae_lambda.py

States 1 to 19; each step goes left or right with equal probability; arriving at 20 pays 1, at 0
nothing, and both end the episode. Without discounting V(s) = s/20, and in each state going right
is better than going left by exactly 0.1. The critic is half right: its values lie halfway between
the true ones and 0.5. States 1 and 19 are left out, as one of their moves needs no critic.
Result: results/gae_lambda.md.
"""

import argparse
import statistics
import sys

import torch
from tables import RESULTS, ROOT, markdown, measured
from torch import Tensor

sys.path.insert(0, str(ROOT))
from ppo import compute_gae  # noqa: E402

LAMBDAS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 1.0)
TRUE_DIFFERENCE = 0.1  # Q(s, right) - Q(s, left)
KEPT = 300  # rows of each rollout; the rows after them are there so that episodes end


def critic(states: Tensor) -> Tensor:
    return 0.5 + 0.5 * (states / 20 - 0.5)


def walk(num_envs: int, num_steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random walks with restarts: states, moves, next states and endings, each (T, N)."""
    state, rows = torch.randint(1, 20, (num_envs,)), []
    for _ in range(num_steps):
        move = torch.randint(0, 2, (num_envs,)) * 2 - 1
        next_state = state + move
        done = (next_state == 0) | (next_state == 20)
        rows.append((state, move, next_state, done))
        state = torch.where(done, torch.randint(1, 20, (num_envs,)), next_state)
    states, moves, next_states, dones = (torch.stack(column) for column in zip(*rows, strict=True))
    return states, moves, next_states, dones.double()


def bias_and_noise(rows: tuple[Tensor, ...], gae_lambda: float) -> tuple[float, float]:
    """Error of (mean estimate of right - mean estimate of left), and an estimate's std."""
    states, moves, next_states, dones = rows
    rewards = (next_states == 20).double()
    values = (critic(states), critic(next_states))
    advantages, _ = compute_gae(rewards, *values, dones, dones, 1.0, gae_lambda)
    states, moves, advantages = (x[:KEPT] for x in (states, moves, advantages))
    differences, variances = [], []
    for s in range(2, 19):
        right, left = (advantages[(states == s) & (moves == move)] for move in (1, -1))
        differences.append((right.mean() - left.mean()).item())
        variances.append((0.5 * (right.var() + left.var())).item())
    return statistics.fmean(differences) - TRUE_DIFFERENCE, statistics.fmean(variances) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--num-envs", type=int, default=2000)
    options = parser.parse_args()
    results: dict[float, list[tuple[float, float]]] = {}
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        rows = walk(options.num_envs, KEPT + 1200)
        for gae_lambda in LAMBDAS:
            results.setdefault(gae_lambda, []).append(bias_and_noise(rows, gae_lambda))
    lines = []
    for gae_lambda, pairs in results.items():
        cells = []
        for values in zip(*pairs, strict=True):
            cells.append(f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}")
        lines.append([gae_lambda, *cells])
    header = ["lambda", "bias of (right - left), which is 0.1", "std of one estimate"]
    text = (
        f"# Bias and noise of lambda\n\n`python tests/benchmarks/gae_lambda.py`. "
        f"{measured()}.\n\nMean ± sample standard deviation over {options.seeds} seeds, "
        f"each with {KEPT * options.num_envs:,} rows of a random walk over 19 states. The critic's "
        "values lie halfway between the true ones and 0.5. The two states beside the ends are left "
        "out: one of their moves needs no critic. Right and left are the estimated advantages of "
        "the two moves, gamma is 1.\n\n" + markdown(header, lines)
    )
    (RESULTS / "gae_lambda.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
