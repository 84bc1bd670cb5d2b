"""Tables and statistics of the benchmarks: interquartile means and their bootstrap intervals.

As in Agarwal et al. 2021, "Deep reinforcement learning at the edge of the statistical precipice".
"""

import csv
import importlib.metadata
import math
import os
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT, RUNS, RESULTS = HERE.parents[1], HERE / "runs", HERE / "results"
TRAIN, EVAL = "train_return_last100", "eval_return_mean"
Row = dict[str, str]


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[Row]) -> None:
    """A CSV file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "w", newline="") as file:
        names = dict.fromkeys(name for row in rows for name in row)  # older rows have fewer
        writer = csv.DictWriter(file, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def markdown(header: list[str], rows: list[list[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def measured(*packages: str, verb: str = "Measured") -> str:
    """When and with what."""
    names = ("torch", "gymnasium", "numpy", *packages)
    texts = [f"{name} {importlib.metadata.version(name)}" for name in names]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = f"CPU cores: {cores}, python {sys.version.split()[0]}"
    return ", ".join([f"{verb} {time.strftime('%Y-%m-%d')}", machine, *texts])


def number(x: float) -> str:
    return f"{x:.{0 if abs(x) >= 1000 else 1 if abs(x) >= 20 else 2}f}"


def score(row: Row, name: str) -> float:
    """NaN where no episode has ended."""
    return float(row[name]) if row[name] else math.nan


def grouped(rows: list[Row], *names: str) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def iqm(values: np.ndarray) -> np.ndarray:
    """Interquartile mean over the last axis: without the lowest and the highest quarter."""
    cut = values.shape[-1] // 4
    return np.sort(values, axis=-1)[..., cut : values.shape[-1] - cut].mean(axis=-1)


def interval(groups: list[np.ndarray]) -> list[str]:
    """IQM of all with its 95% bootstrap interval, each group resampled by itself; its std error."""
    text = number(float(iqm(np.concatenate(groups))))
    if max(map(len, groups)) == 1:
        return [text, "-"]
    rng = np.random.default_rng(0)
    drawn = [group[rng.integers(len(group), size=(5000, len(group)))] for group in groups]
    means = iqm(np.concatenate(drawn, axis=1))
    low, high = np.percentile(means, [2.5, 97.5])
    return [f"{text} [{number(low)}, {number(high)}]", number(means.std())]


def summary(rows: list[Row]) -> str:
    """A line for each environment, setting and fingerprint."""
    table = []
    for key, members in grouped(rows, "env_id", "setting", "fingerprint").items():
        train, scores = (np.array([score(row, name) for row in members]) for name in (TRAIN, EVAL))
        mean = number(scores.mean())
        mean += f" ± {number(scores.std(ddof=1))}" if len(scores) > 1 else ""
        line = [*key[:2], len(members), number(train.mean()), interval([scores])[0], mean]
        flags = f"`{members[0]['flags']}`" if members[0]["flags"] else "defaults"
        line += [number(scores.min()), " ".join(map(number, scores)), flags, key[2]]
        table.append(line)
    header = ["environment", "setting", "n", "training", "evaluation, IQM [95%]", "mean ± std"]
    return markdown([*header, "worst", "each seed", "flags", "fingerprint"], table)


def random_score(env_id: str) -> float:
    """Mean return of 100 episodes of random actions, measured once, kept in random_scores.csv."""
    rows = read(RESULTS / "random_scores.csv")
    for row in rows:
        if row["environment"] == env_id:
            return float(row["mean"])
    import gymnasium as gym

    env = gym.wrappers.RecordEpisodeStatistics(gym.make(env_id, disable_env_checker=True))
    env.action_space.seed(0)
    for episode in range(100):
        env.reset(seed=episode)
        ended = False
        while not ended:
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            ended = terminated or truncated
    mean, std = np.mean(env.return_queue), np.std(env.return_queue, ddof=1)
    row = {"environment": env_id, "mean": f"{mean:.6g}", "std": f"{std:.4g}", "episodes": "100"}
    write(RESULTS / "random_scores.csv", sorted([*rows, row], key=lambda row: row["environment"]))
    return float(mean)


def comparison(rows: list[Row], baseline: str) -> str:
    """Each setting over all environments, against the baseline's runs of the same seeds."""
    scores = {(row["setting"], row["env_id"], row["seed"]): score(row, EVAL) for row in rows}
    table = []
    for (setting,), members in grouped(rows, "setting").items():
        groups = []
        for (env_id,), runs in grouped(members, "env_id").items():
            seeds = [row["seed"] for row in runs if (baseline, env_id, row["seed"]) in scores]
            if seeds:
                base = iqm(np.array([scores[baseline, env_id, seed] for seed in seeds]))
                own = np.array([scores[setting, env_id, seed] for seed in seeds])
                low = random_score(env_id)
                groups.append((own - low) / (base - low))
        if groups:
            worst = " ".join(f"{group.min():.2f}" for group in groups)
            table.append([setting, sum(map(len, groups)), *interval(groups), worst])
    if not table:
        return ""
    header = ["setting", "n", "IQM [95%]", "standard error", "worst of each environment"]
    return (
        "\n## Over all environments\n\nEvaluations, scaled in each environment so that 0 is a "
        f"random policy and 1 the IQM of `{baseline}` on the same seeds.\n\n"
    ) + markdown(header, table)


# Table 1 of the paper: 7 MuJoCo environments (v1) x 3 seeds, 1M steps
PAPER = {"none": -0.39, "clip-0.1": 0.76, "clip-0.2": 0.82, "clip-0.3": 0.70}
PAPER |= {"adaptive-0.003": 0.68, "adaptive-0.01": 0.74, "adaptive-0.03": 0.71}
PAPER |= {"fixed-0.3": 0.62, "fixed-1": 0.71, "fixed-3": 0.72, "fixed-10": 0.69}


def table1(rows: list[Row]) -> str:
    """The paper's statistic (best result: a setting's mean), of what every setting was run on."""
    settings = {row["setting"] for row in rows}
    results: dict[str, list[float]] = {}
    complete = [
        row
        for runs in grouped(rows, "env_id", "seed").values()
        for row in runs
        if {row["setting"] for row in runs} == settings
    ]
    for (env_id,), runs in grouped(complete, "env_id").items():
        by_setting = grouped(runs, "setting").values()
        best = max(np.mean([score(row, TRAIN) for row in members]) for members in by_setting)
        low = random_score(env_id)
        for row in runs:
            results.setdefault(row["setting"], []).append((score(row, TRAIN) - low) / (best - low))
    table = [
        [setting, len(scores), f"{np.mean(scores):.2f}", PAPER.get(setting.partition("@")[0], "-")]
        for setting, scores in results.items()
    ]
    return (
        "\n## As in the paper\n\nThe last 100 training episodes, scaled in each environment so "
        "that 0 is a random policy and 1 the mean of the best setting, averaged over the "
        "environments and seeds that every setting here was trained with.\n\n"
    ) + markdown(["setting", "runs", "ours", "the paper's"], table)


def report(title: str, script: str, episodes: int, rows: list[Row], baseline: str) -> str:
    """The summary of an experiment."""
    name, actions = title.split()[0], "sampled" if script == "ppo_atari.py" else "deterministic"
    text = (
        f"# {title}\n\n`python tests/benchmarks/sweep.py {name}` trains with `{script}`. "
        f"{measured(verb='Written')}.\n\nTraining: mean return of the last 100 episodes. "
        f"Evaluation: mean return of {episodes} episodes of the final policy, {actions} actions, "
        "in fresh environments. Over n seeds: interquartile mean with its 95% bootstrap interval, "
        f"mean ± standard deviation, the worst.\n\n{summary(rows)}"
    )
    if name == "table1":
        return text + table1(rows)
    several = len({row["setting"] for row in rows}) > 1
    if several and script == "ppo_continuous.py":
        text += comparison(rows, baseline)
    return text
