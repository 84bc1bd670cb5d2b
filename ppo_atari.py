# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "numpy>=1.26", "tyro==1.0.17", "wandb==0.31.0",
#   "ale-py==0.12.1", "gymnasium[atari,other]==1.4.0"]
# ///
"""PPO for Atari games from pixels. Read ppo.py first.

    python ppo_atari.py --env-id BreakoutNoFrameskip-v4  # 10M steps: hours on a CPU

Unlike ppo.py: games step in C++ threads, actor and critic share a convolutional network, a lost
life is a termination, rewards are clipped, evaluations sample, the defaults in `Args`. Unlike
the paper, mainly: a constant clip range, 4 epochs, a clipped value loss.

[PPO] Schulman et al. 2017, arXiv:1707.06347. [GAE] Schulman et al. 2016, arXiv:1506.02438.
[Nature] Mnih et al. 2015, Nature 518:529-533.
"""

import contextlib
import json
import math
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from ale_py.vector_env import AtariVectorEnv
from gymnasium.utils.save_video import save_video
from torch import Tensor, nn

Rows = dict[str, Tensor]  # name -> values of transitions, (T, N, ...) or (rows, ...)


@dataclass
class Args:
    env_id: str = "BreakoutNoFrameskip-v4"  # or ALE/Breakout-v5, which has sticky actions
    total_timesteps: int = 10_000_000  # over all environments, in whole batches
    seed: int = 1  # same seed, same CPU: same numbers; try several
    exp_name: str = Path(__file__).stem  # in the folder name
    num_envs: int = 8  # N, stepped together; 1 to 64
    num_steps: int = 128  # T, steps of each per batch; 16 to 2048
    gamma: float = 0.99  # discount: plans about 1/(1-gamma) steps ahead; 0.9 to 0.9999
    gae_lambda: float = 0.95  # 0: trust the critic (bias), 1: the rewards (variance)
    norm_obs: bool = False  # not for pixels, which are scaled to [0, 1]
    norm_reward: bool = False  # divide rewards by the std of their discounted sums
    sticky_actions: float | None = None  # chance a frame keeps the last action; None: the id's
    learning_rate: float = 2.5e-4  # Adam's step size; lower where approx_kl runs high
    anneal_lr: bool = True  # linearly: steadier at the end
    final_lr_fraction: float = 0.0  # share of the rate left at the end
    update_epochs: int = 4  # passes over each batch; 3 to 20
    num_minibatches: int = 4  # gradient steps per pass, usually of 64 to 512 rows
    recompute_advantages: bool = False  # between epochs, by the newer critic
    norm_adv: bool = True  # normalize the advantages of each minibatch
    surrogate: Literal["clip", "kl-adaptive", "kl-fixed", "none"] = "clip"  # objective
    clip_coef: float = 0.1  # epsilon: no gain from p_new/p_old beyond 1 +- epsilon; 0.1 to 0.3
    kl_coef: float = 1.0  # beta, weight of the KL penalty (kl-adaptive: at first)
    kl_target: float = 0.01  # kl-adaptive halves or doubles beta to stay near this KL
    target_kl: float | None = None  # end the update after an epoch of higher KL; 0.01 to 0.05
    clip_vloss: bool = True  # no gain from changing values by more than clip_coef
    vf_coef: float = 0.5  # weight of the value loss
    ent_coef: float = 0.01  # entropy bonus, if the policy settles too soon; 0 to 0.02
    max_grad_norm: float = 0.5  # clip the norm of all gradients
    cuda: bool = field(default_factory=torch.cuda.is_available)  # small nets: --no-cuda
    torch_deterministic: bool = True  # reproducible cuDNN kernels
    torch_threads: int = 0  # CPU threads; 1 suits small nets, 0: torch's choice
    bf16: bool = False  # network in bfloat16: faster on some CPUs
    compile: bool = False  # torch.compile the loss: a slow start, then faster
    run_dir: str | None = None  # default: runs/{env_id}__{exp_name}__{seed}__{time}
    eval_episodes: int = 10  # of an evaluation; 0: none after training
    capture_video: bool = False  # film environment 0, up to 1,000 steps
    resume: str | None = None  # run folder to continue; flags override its arguments
    evaluate: str | None = None  # run folder to evaluate instead of training
    track: bool = False  # to wandb as well; WANDB_MODE=offline needs no account
    wandb_project_name: str = "ppo"  # of wandb
    wandb_entity: str | None = None  # user or team


def make_envs(args: Args, num_envs: int, videos: Path | None = None) -> gym.vector.VectorEnv:
    """Build games that step together in C++; what the first sees is filmed into `videos`.

    Observations (N, 4, 84, 84), uint8: the last 4 steps, newest last. A step is 4 frames, whatever
    the id; games start with FIRE and no-ops, up to 29.
    """
    with on_error(refuse=f"--env-id {args.env_id}"):
        settings = gym.spec(args.env_id.removeprefix("ale_py:")).kwargs
        if "game" not in settings or args.norm_obs:
            raise TypeError("it needs an Atari game, and no --norm-obs")
        sticky = settings["repeat_action_probability"]
        if args.sticky_actions is not None:
            sticky = args.sticky_actions
        if not 0 <= sticky <= 1:
            raise ValueError(f"--sticky-actions {sticky}: must be between 0 and 1")
        envs = AtariVectorEnv(
            settings["game"],
            num_envs,
            autoreset_mode="SameStep",
            repeat_action_probability=sticky,
            life_loss_info=True,  # a lost life is a termination
            reward_clipping=False,  # GameStatistics clips them
        )
    return GameStatistics(envs, videos)


class GameStatistics(gym.vector.VectorWrapper):
    """True returns of games in infos["episode"]; clips rewards to [-1, 1], mends final_obs."""

    def __init__(self, envs: AtariVectorEnv, videos: Path | None) -> None:
        super().__init__(envs)
        self.videos, self.frames = videos, []

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        obs, infos = self.env.reset(**kwargs)
        self.episode_returns, self.episode_lengths = np.zeros((2, self.num_envs))
        self.frame_numbers = infos["episode_frame_number"].copy()
        return obs, infos

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        obs, rewards, terminations, truncations, infos = self.env.step(actions)
        self.episode_returns += rewards
        self.episode_lengths += 1
        # Frame numbers fall at a new game, not at a lost life
        ended = truncations | (infos["episode_frame_number"] < self.frame_numbers)
        self.frame_numbers = infos["episode_frame_number"].copy()
        final_obs, infos["final_obs"] = infos.get("final_obs"), obs.copy()
        if ended.any():
            infos["final_obs"][ended] = final_obs[ended]  # ALE's other rows are uninitialized
            infos["episode"] = {"r": self.episode_returns.copy(), "l": self.episode_lengths.copy()}
            infos["_episode"] = ended
            self.episode_returns[ended] = self.episode_lengths[ended] = 0
        if self.videos:  # the last 1,000 steps
            self.frames = [*self.frames[-999:], np.repeat(obs[0, -1, ..., None], 3, axis=-1)]
        return obs, np.clip(rewards, -1, 1), terminations, truncations, infos

    def close(self, **kwargs: Any) -> None:
        if self.frames:
            save_video(self.frames, str(self.videos), fps=15)
        super().close(**kwargs)


# Categorical: `dist` is log-probabilities, (N, actions).
def sample(dist: Tensor) -> Tensor:
    """Actions (N,). Gumbel-max trick: argmax(log p + g), g = -log(exponential), follows p."""
    return (dist - torch.empty_like(dist).exponential_().log()).argmax(dim=-1)


def evaluation_action(dist: Tensor) -> Tensor:
    return sample(dist)  # the most likely one may never press FIRE after a lost life


def log_prob(dist: Tensor, actions: Tensor) -> Tensor:
    """log p(action), (N,)"""
    return dist.gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def entropy(dist: Tensor) -> Tensor:
    """H = -sum_a p(a) * log p(a), (N,)"""
    return -(dist.exp() * dist).sum(dim=-1)


def kl_divergence(old: Tensor, new: Tensor) -> Tensor:
    """KL[old || new] = sum_a old(a) * (log old(a) - log new(a)), exact, (N,)"""
    return (old.exp() * (old - new)).sum(dim=-1)


class Agent(nn.Module):
    """Observation -> features, by one convolutional network -> policy and value."""

    def __init__(self, envs: gym.vector.VectorEnv, args: Args) -> None:
        super().__init__()
        self.bf16, num_actions = args.bf16, int(envs.single_action_space.n)
        conv1, conv2, conv3 = nn.Conv2d(4, 32, 8, 4), nn.Conv2d(32, 64, 4, 2), nn.Conv2d(64, 64, 3)
        linear, relu = nn.Linear(64 * 7 * 7, 512), nn.ReLU()
        layers = [conv1, relu, conv2, relu, conv3, relu, nn.Flatten(), linear, relu]  # [Nature]
        self.network = nn.Sequential(*layers)
        self.actor, self.critic = nn.Linear(512, num_actions), nn.Linear(512, 1)
        gains = {self.actor: 0.01, self.critic: 1.0}  # 0.01: actions start about equally likely
        self.register_buffer("progress", torch.zeros(()))  # set by ppo()
        for layer in (conv1, conv2, conv3, linear, self.actor, self.critic):
            nn.init.orthogonal_(layer.weight, gains.get(layer, math.sqrt(2)))
            nn.init.zeros_(layer.bias)

    def features(self, rows: Rows) -> Tensor:
        """(N, 4, 84, 84) -> (N, 512); pixels to [0, 1]; channels_last is faster."""
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        with torch.autocast(rows["obs"].device.type, torch.bfloat16, enabled=self.bf16):
            pixels = rows["obs"].contiguous(memory_format=torch.channels_last).to(dtype) / 255
            return self.network(pixels).float()

    def get_dist(self, features: Tensor) -> Tensor:
        return self.actor(features).log_softmax(dim=-1)

    def get_value(self, features: Tensor) -> Tensor:
        return self.critic(features).squeeze(-1)


# >>> shared: algorithm
def all_mean(x: Tensor) -> Tensor:
    """Average x, in place, over the processes of torchrun, if any."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
        x /= torch.distributed.get_world_size()
    return x


class RunningMeanStd(nn.Module):
    """Mean and variance of all rows so far; buffers, so a state_dict has them."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, x: Tensor) -> None:
        """Take in x, (rows, *shape), of all processes (Chan, Golub & LeVeque 1979)."""
        x = x.double()
        mean = all_mean(x.mean(dim=0))
        var = all_mean(((x - mean) ** 2).mean(dim=0))
        share = len(x) / (self.count + len(x))  # len(x), count: the same in all processes
        self.var += share * (var - self.var) + share * (1 - share) * (mean - self.mean) ** 2
        self.mean += share * (mean - self.mean)
        self.count += len(x)


def compute_gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminations: Tensor,
    dones: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation ([GAE] eq. 16, [PPO] 11-12): A, and the returns A + V.

    All (T, N). next_values[t] = V(s_{t+1}), before any reset. terminations: s_{t+1} is terminal.
    dones: the episode ends there, by termination or by truncation (a time limit).
    """
    # delta_t = r_t + gamma * V(s_{t+1}) * (1 - termination_t) - V(s_t)
    # (critical: after a time limit s_{t+1} has a value, so terminations count, not dones)
    deltas = rewards + gamma * next_values * (1 - terminations) - values
    # A_t = delta_t + gamma * lambda * (1 - done_t) * A_{t+1}: no other episode's A
    decays = gamma * gae_lambda * (1 - dones)
    advantages = torch.zeros_like(rewards)
    advantage = torch.zeros_like(rewards[0])  # A_T = 0: no delta is known past the batch
    for t in reversed(range(len(rewards))):
        advantages[t] = advantage = deltas[t] + decays[t] * advantage
    return advantages, advantages + values


@torch.no_grad()
def add_advantages(agent: Agent, args: Args, batch: Rows) -> None:
    """Put "values", "advantages" and "returns", (T, N), into the batch."""
    rewards, terminations, dones = batch["rewards"], batch["terminations"], batch["dones"]
    rows = {name: x.flatten(0, 1) for name, x in batch.items()}
    values = agent.get_value(agent.features(rows)).view_as(rewards)
    # V(s_{t+1}) is values[t + 1], except where an episode or the batch ends
    next_values = values.roll(-1, dims=0)
    last = dones.bool()
    last[-1] = True  # where roll put values[0]
    next_values[last] = agent.get_value(agent.features({"obs": batch["next_obs"][last]}))
    batch["values"] = values
    batch["advantages"], batch["returns"] = compute_gae(
        rewards, values, next_values, terminations, dones, args.gamma, args.gae_lambda
    )


def ppo_loss(agent: Agent, args: Args, mb: Rows, kl_coef: Tensor) -> tuple[Tensor, dict]:
    """PPO's objective on M rows, as a loss to minimize ([PPO] eq. 6-9), and statistics.

    mb: "obs", "actions", old "dist", (M, ...); "logprobs", "values", "advantages", "returns", (M,).
    """
    features = agent.features(mb)
    dist, values = agent.get_dist(features), agent.get_value(features)
    advantages = mb["advantages"]
    if args.norm_adv:  # over the minibatch of all processes
        advantages = advantages - all_mean(advantages.mean())
        advantages = advantages / (all_mean((advantages**2).mean()).sqrt() + 1e-8)
    # r = pi_new(a|s) / pi_old(a|s): importance weights, as the actions are the old policy's
    logratio = log_prob(dist, mb["actions"]) - mb["logprobs"]
    ratio = logratio.exp()
    objective, clipped = ratio * advantages, torch.zeros_like(ratio)
    penalty, stats = 0.0, {}
    if args.surrogate == "clip":
        # L_CLIP = E[min(r * A, clip(r, 1 - eps, 1 + eps) * A)]: nothing to gain from r > 1 + eps
        # if A > 0, from r < 1 - eps if A < 0; where r went the wrong way, the way back is open:
        # A = -2, r = 1.5, eps = 0.2: min(-3, -2.4) = -3 has a gradient.
        clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        objective = torch.min(objective, clipped_ratio * advantages)
        clipped = ((ratio - 1).abs() > args.clip_coef).float()
    elif args.surrogate in ("kl-fixed", "kl-adaptive"):
        # L_KLPEN = E[r * A - beta * KL[old || new]], KL exact
        stats = {"kl": kl_divergence(mb["dist"], dist).mean(), "kl_coef": kl_coef}
        penalty = kl_coef * stats["kl"]
    elif args.surrogate != "none":
        raise ValueError(f"unknown surrogate {args.surrogate}")
    policy_loss = -objective.mean()
    # L_VF = 1/2 * E[(V - return)^2]; clipped: in each row the larger one of this square and
    # (V_old + clip(V - V_old, -eps, eps) - return)^2; V_old: from add_advantages
    value_error = (values - mb["returns"]) ** 2
    if args.clip_vloss:
        change = (values - mb["values"]).clamp(-args.clip_coef, args.clip_coef)
        value_error = torch.max(value_error, (mb["values"] + change - mb["returns"]) ** 2)
    value_loss = 0.5 * value_error.mean()
    # loss = -L_CLIP (or -L_KLPEN, with its penalty) + vf_coef * L_VF - ent_coef * H
    mean_entropy = entropy(dist).mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * mean_entropy + penalty
    stats |= {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": mean_entropy,
        # KL[old || new] estimated from samples (joschu.net/blog/kl-approx.html)
        "approx_kl": ((ratio - 1) - logratio).mean(),  # k3: never negative, little noise
        "old_approx_kl": -logratio.mean(),  # k1: noisier; both unbiased
        "clipfrac": clipped.mean(),  # "clip": share of ratios outside 1 +- eps
    }
    return loss, {name: x.detach() for name, x in stats.items()}


def ppo(args: Args, envs: gym.vector.VectorEnv, folder: Path) -> "Log | None":
    """Train an agent. A batch is T steps of each of N environments, a minibatch M rows."""
    T, N, batch_size = args.num_steps, envs.num_envs, args.num_steps * args.num_envs
    M = T * N // args.num_minibatches  # N and M: of this process, batch_size: of all
    rank = int(os.environ.get("RANK", 0))
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.cuda else "cpu")
    seed_all(args.seed, 0)  # without the rank: the same weights in all processes
    agent = Agent(envs, args).to(device)
    parameters = [x for x in agent.parameters() if x.requires_grad]
    optimizer = torch.optim.Adam(parameters, args.learning_rate, eps=1e-5, fused=True)
    learning_rates = [group["lr"] for group in optimizer.param_groups]  # before annealing
    reward_stats = RunningMeanStd().to(device)
    loss_function = torch.compile(ppo_loss, dynamic=False) if args.compile else ppo_loss
    if N < args.num_envs:  # torchrun's processes split the environments
        torch.distributed.init_process_group("nccl" if args.cuda else "gloo")
    # For --resume: what has a state_dict, and plain data
    modules = {"agent": agent, "optimizer": optimizer, "reward_stats": reward_stats}
    state = {"global_step": 0, "kl_scale": 1.0, "wall_time": 0.0, "episodes": [], "columns": {}}
    state |= {"files": {"metrics.csv": 0, "episodes.csv": 0}, "id": os.urandom(4).hex()}
    if args.resume:
        state |= restore(folder, modules)["state"]
    env_seed = seed_all(args.seed, 1, rank, state["global_step"])
    next_obs = torch.tensor(envs.reset(seed=env_seed)[0], device=device)  # (N, ...)
    # Cut first episodes at different steps (environment 0's: not), or all end at once
    for i, env in enumerate(getattr(envs.unwrapped, "envs", [])):
        if limit := getattr(env.spec, "max_episode_steps", None):
            env.set_wrapper_attr("_elapsed_steps", i * limit // N)
    past_sum = torch.zeros(N, device=device)  # discounted, for --norm-reward
    log = Log(args, folder, state) if rank == 0 else None
    if args.norm_obs and agent.obs_stats.count == 0:
        for _ in range(T):  # uncounted steps give the statistics a scale
            dist = agent.get_dist(agent.features({"obs": next_obs})).detach()
            next_obs = torch.tensor(envs.step(sample(dist).cpu().numpy())[0], device=device)
            agent.obs_stats.update(next_obs)
    while state["global_step"] + batch_size <= args.total_timesteps:
        # ---- Phase 1: anneal the learning rate
        progress = state["global_step"] / args.total_timesteps
        agent.progress.fill_(progress)
        fraction = 1 - progress * (1 - args.final_lr_fraction) if args.anneal_lr else 1.0
        for group, rate in zip(optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = float(fraction * rate)  # numpy's could not be saved

        # ---- Phase 2: rollout: the policy acts, and every transition is kept
        steps = []
        scalars = np.zeros((3, T, N), dtype=np.float32)
        rewards, terminations, dones = scalars  # views
        with torch.no_grad():
            for t in range(T):
                step = {"obs": next_obs}
                step["dist"] = agent.get_dist(agent.features(step))
                step["actions"] = sample(step["dist"])
                actions = step["actions"].cpu().numpy()
                next_obs, rewards[t], terminations[t], truncated, infos = envs.step(actions)
                next_obs = torch.tensor(next_obs, device=device)
                dones[t] = np.maximum(terminations[t], truncated)
                step["next_obs"] = next_obs.clone()
                for i in np.flatnonzero(dones[t]):  # the ended episode's last obs
                    step["next_obs"][i] = torch.as_tensor(infos["final_obs"][i])
                steps.append(step)
                state["global_step"] += args.num_envs
                if log and "episode" in infos:
                    log.episodes_ended(infos)
        # (T, N, ...) each. "values" and "logprobs" come later: faster in one pass
        batch = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}
        batch["rewards"], batch["terminations"], batch["dones"] = torch.tensor(scalars).to(device)
        if args.norm_reward:  # one scale for the critic; a shift would change the task
            past_sums = torch.zeros_like(batch["rewards"])
            for t in range(T):
                past_sums[t] = past_sum = batch["rewards"][t] + args.gamma * past_sum
                past_sum = past_sum * (1 - batch["dones"][t])  # an episode starts from 0
            reward_stats.update(past_sums.flatten())
            batch["rewards"] /= (reward_stats.var + 1e-8).sqrt()

        # ---- Phase 3: advantages: how much better was an action than the policy's average?
        add_advantages(agent, args, batch)
        # Explained variance (A = return - V): 1 is perfect, below 0 worse than a constant
        explained = 1 - (batch["advantages"].var() / batch["returns"].var()).item()

        # ---- Phase 4: update: better actions become likelier, in shuffled minibatches
        kl_coef = torch.tensor(args.kl_coef * state["kl_scale"], device=device)  # for --compile
        all_stats = []
        for epoch in range(args.update_epochs):
            if args.recompute_advantages and epoch > 0:
                add_advantages(agent, args, batch)
            order = torch.randperm(T * N, device=device)
            flat = {name: x.flatten(0, 1)[order] for name, x in batch.items()}  # (T * N, ...)
            flat["logprobs"] = log_prob(flat["dist"], flat["actions"])
            for start in range(0, T * N, M):
                mb = {name: x[start : start + M] for name, x in flat.items()}  # (M, ...)
                loss, stats = loss_function(agent, args, mb, kl_coef)
                optimizer.zero_grad()
                loss.backward()
                if torch.distributed.is_initialized():  # one collective for all gradients
                    gradients = [parameter.grad for parameter in parameters]
                    averages = all_mean(nn.utils.parameters_to_vector(gradients))
                    nn.utils.vector_to_parameters(averages, gradients)  # in place
                stats["grad_norm"] = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                all_stats.append(stats)
            if args.target_kl is not None:
                # Each KL is taken before its step: the first is 0, the last step is not seen
                kls = [stats["approx_kl"] for stats in all_stats[-args.num_minibatches :]]
                if all_mean(torch.stack(kls).mean()) > args.target_kl:
                    break
        if args.surrogate == "kl-adaptive":  # [PPO] section 4; beta = kl_coef * kl_scale
            dist = agent.get_dist(agent.features(flat)).detach()
            kl = all_mean(kl_divergence(flat["dist"], dist).mean())
            if kl < args.kl_target / 1.5:
                state["kl_scale"] = max(state["kl_scale"] / 2, 1 / 1000)
            elif kl > args.kl_target * 1.5:
                state["kl_scale"] = min(state["kl_scale"] * 2, 1000)
        if args.norm_obs:
            agent.obs_stats.update(flat["obs"])  # (critical: not earlier: first ratios must be 1)

        # ---- Phase 5: record; the batch is thrown away
        metrics = {"charts/learning_rate": optimizer.param_groups[0]["lr"]}
        metrics["losses/explained_variance"] = explained
        for name in all_stats[0]:  # over this process's minibatches
            metrics[f"losses/{name}"] = torch.stack([x[name] for x in all_stats]).mean().item()
        bad = [name for name, x in flat.items() if not x.isfinite().all()]
        if bad or not math.isfinite(metrics["losses/grad_norm"]):
            raise FloatingPointError(f"NaN or infinite: {bad or 'gradient'}")
        if log:
            log.iteration_ended(metrics, modules)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if log:
        log.save(modules)
        log.summarize({"eval_episodes": 0})  # until evaluated
    return log


# <<< shared: algorithm
# >>> shared: records
# PPO ends here. Below: evaluation, files, checks, command line.
class BadInput(ValueError):
    """A request that cannot be run."""


@contextlib.contextmanager
def on_error(close: Any = (), refuse: str = "") -> Any:
    """On an error, close environments; with `refuse`, raise BadInput."""
    try:
        yield
    except BaseException as error:
        for env in close:
            with contextlib.suppress(Exception):
                env.close()
        if refuse and isinstance(error, Exception):
            raise BadInput(f"{refuse}: {type(error).__name__}: {error}") from error
        raise


def seed_all(*numbers: int) -> int:
    """Seed everything. numbers: seed, purpose (0 weights, 1 training, 2 evaluation), ..."""
    seed, env_seed = np.random.SeedSequence(numbers).generate_state(2).tolist()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return env_seed % 2**30  # of environment 0; i gets this + i


def train(args: Args) -> str:
    """Train and evaluate; returns the run folder. Raises BadInput."""
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns()}"
    name = args.run_dir or "runs/" + name.replace("/", "-").replace(":", "-")
    folder = Path(args.evaluate or args.resume or name).absolute()  # environments may chdir
    check(args, folder)
    torch.set_num_threads(args.torch_threads or torch.get_num_threads())
    torch.backends.cudnn.deterministic = args.torch_deterministic
    film = args.capture_video and os.environ.get("RANK", "0") == "0"
    videos = folder / f"videos/{time.time_ns()}" if film else None
    if args.evaluate:
        print(*(f"{name}={value}" for name, value in evaluate(args, folder, videos).items()))
        return str(folder)
    envs = make_envs(args, args.num_envs // int(os.environ.get("WORLD_SIZE", 1)), videos)
    with on_error(close=[envs]):
        log = ppo(args, envs, folder)
        envs.close()
    if log and args.eval_episodes > 0:
        log.summarize(evaluate(args, folder))
    return str(folder)


@torch.no_grad()
def evaluate(args: Args, folder: str | Path, videos: Path | None = None) -> dict[str, Any]:
    """One episode in each of --eval-episodes environments, cut at 27,000 steps."""
    returns, device = np.full(args.eval_episodes, np.nan), "cuda" if args.cuda else "cpu"
    envs = make_envs(args, args.eval_episodes, videos)
    with on_error(close=[envs]), torch.random.fork_rng([0] if args.cuda else []):
        agent = Agent(envs, args).to(device)
        restore(folder, {"agent": agent})
        obs, rewards = envs.reset(seed=seed_all(args.seed, 2))[0], 0.0
        for _ in range(27_000):
            if not (np.isfinite(obs).all() and np.isfinite(rewards).all()):
                raise FloatingPointError("NaN or infinity")
            rows = {"obs": torch.tensor(obs, device=device)}
            actions = evaluation_action(agent.get_dist(agent.features(rows)))
            obs, rewards, _, _, infos = envs.step(actions.cpu().numpy())
            for i in np.flatnonzero(infos.get("_episode", False) & np.isnan(returns)):
                returns[i] = infos["episode"]["r"][i]
            playing = np.isnan(returns)
            if not playing.any():
                break
        else:
            print(f"evaluation: {playing.sum()} episodes cut at 27,000 steps")
            returns[playing] = envs.episode_returns[playing]
        envs.close()
    mean, std = float(returns.mean()), float(returns.std())
    return {"eval_return_mean": mean, "eval_return_std": std, "eval_episodes": len(returns)}


class Log:
    """Files and wandb of a run; `state`, shared with `ppo`, is kept for --resume."""

    def __init__(self, args: Args, folder: Path, state: dict[str, Any]) -> None:
        self.args, self.folder, self.state, self.wandb = args, folder, state, None
        self.next_save, self.start = 0.0, time.monotonic() - state["wall_time"]
        with on_error(refuse=f"--run-dir {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
        self.script = Path(__file__).read_bytes()
        if args.track:
            import wandb

            names = {"project": args.wandb_project_name, "entity": args.wandb_entity}
            names |= {"name": folder.name, "id": state["id"], "dir": folder, "resume": "allow"}
            with on_error(refuse="--track"):
                self.wandb = wandb.init(**names, config=vars(args), reinit="finish_previous")
            self.wandb.define_metric("*", step_metric="global_step")
        for name, size in state["files"].items():  # cut rows past the checkpoint
            with open(folder / name, "ab") as file:
                file.truncate(min(size, file.tell()))
        print(f"{args.env_id}, seed {args.seed}, files in {folder}", flush=True)

    def episodes_ended(self, infos: dict[str, Any]) -> None:
        for i in np.flatnonzero(infos["_episode"]):
            r, length = float(infos["episode"]["r"][i]), int(infos["episode"]["l"][i])
            row = {"global_step": self.state["global_step"], "episodic_return": r}
            self.append("episodes.csv", row | {"episodic_length": length})
            self.state["episodes"] = [*self.state["episodes"][-99:], (r, length)]

    def iteration_ended(self, metrics: dict[str, float], modules: dict[str, Any]) -> None:
        """Write a row. Print and save every 2 s, less often if that takes over 1% of time."""
        state, now = self.state, time.monotonic()
        state["wall_time"] = round(now - self.start, 3)
        state["SPS"] = round(state["global_step"] / max(now - self.start, 1e-9))
        mean, length = np.mean(state["episodes"] or [(np.nan, np.nan)], axis=0).tolist()
        state["train_return_last100"] = mean if state["episodes"] else None
        row = {"global_step": state["global_step"], "charts/SPS": state["SPS"]}
        row |= {"charts/episodic_return": mean, "charts/episodic_length": length}
        row |= metrics | {"wall_time": state["wall_time"]}
        self.append("metrics.csv", row)
        if self.wandb:
            self.wandb.log(row)
        if now >= self.next_save:
            try:
                self.save(modules)
                self.next_save = now + max(2, 100 * (time.monotonic() - now))
            except (OSError, RuntimeError) as error:  # the final save raises
                print(f"{self.folder}/checkpoint.pt is late (disk full?): {error}", file=sys.stderr)
            print(f"step {state['global_step']}, {state['SPS']} SPS, return {mean:.1f}", flush=True)

    def append(self, name: str, row: dict[str, Any]) -> None:
        if (old := self.state["columns"].setdefault(name, list(row))) != list(row):
            raise BadInput(f"{self.folder / name}: columns/order differ: {sorted({*old} ^ {*row})}")
        with open(self.folder / name, "a") as file:
            if file.tell() == 0:
                print(*row, sep=",", file=file)
            print(*row.values(), sep=",", file=file)
            self.state["files"][name] = file.tell()

    def save(self, modules: dict[str, Any]) -> None:
        checkpoint = {key: module.state_dict() for key, module in modules.items()}
        plain = {"state": self.state, "args": vars(self.args) | {"resume": None, "run_dir": None}}
        checkpoint |= json.loads(json.dumps(plain, default=lambda x: x.tolist()))  # numpy's
        if self.next_save == 0.0:  # once, when columns fit
            (self.folder / "config.json").write_text(json.dumps(checkpoint["args"], indent=2))
            (self.folder / "script.py").write_bytes(self.script)
        with open(self.folder / "checkpoint.pt.tmp", "wb") as file:
            torch.save(checkpoint, file.name)  # in C++: Ctrl-C waits
            os.fsync(file.fileno())
        os.replace(file.name, self.folder / "checkpoint.pt")  # whole or not at all

    def summarize(self, evaluation: dict[str, Any]) -> None:
        names = ("global_step", "wall_time", "SPS", "train_return_last100")
        summary = {name: self.state[name] for name in names}
        summary |= {"eval_return_mean": None, "eval_return_std": None} | evaluation
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2))
        print(*(f"{name}={value}" for name, value in summary.items()), flush=True)
        if self.wandb:
            self.wandb.summary.update(summary)


def restore(folder: str | Path, modules: dict[str, Any]) -> dict[str, Any]:
    """Load checkpoint[name] into each module; returns all. weights_only: runs no code."""
    try:
        checkpoint = torch.load(f"{folder}/checkpoint.pt", map_location="cpu", weights_only=True)
        Args(**checkpoint["args"])  # raises for unknown flags
        for name, module in modules.items():
            module.load_state_dict(checkpoint[name])
    except Exception as error:
        reason = str(error).partition(". ")[0]  # without torch's unsafe advice
        raise BadInput(f"--resume/--evaluate {folder}: no fitting checkpoint: {reason}") from error
    return checkpoint


def check(args: Args, folder: Path) -> None:
    """Raise BadInput: flag, value and reason."""

    def require(name: str, ok: bool, reason: str) -> None:
        if not ok:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: {reason}")

    counts = ("total_timesteps", "num_envs", "num_steps", "num_minibatches", "update_epochs")
    for name in (*counts, "learning_rate", "clip_coef", "max_grad_norm", "kl_coef", "kl_target"):
        require(name, 0 < getattr(args, name) < math.inf, "must be finite and above 0")
    for name in ("seed", "vf_coef", "ent_coef", "eval_episodes", "torch_threads"):
        require(name, 0 <= getattr(args, name) < math.inf, "must be finite, at least 0")
    for name in ("gamma", "gae_lambda", "final_lr_fraction"):
        require(name, 0 <= getattr(args, name) <= 1, "must be between 0 and 1")
    processes, batch = int(os.environ.get("WORLD_SIZE", 1)), args.num_envs * args.num_steps
    rows = batch / processes / args.num_minibatches
    require("num_envs", args.num_envs % processes == 0, f"not divisible by {processes} processes")
    require("num_minibatches", rows % 1 == 0 and rows > 1, f"leaves {rows:g} of {batch} rows each")
    require("total_timesteps", args.total_timesteps >= batch, f"is less than a batch of {batch}")
    require("cuda", torch.cuda.is_available() or not args.cuda, "no GPU found; try --no-cuda")
    require("target_kl", args.target_kl is None or args.target_kl > 0, "must be above 0")
    require("resume", not (args.resume and args.evaluate), "not with --evaluate")
    require("run_dir", Path(args.run_dir or folder).absolute() == folder, "is for new runs")
    free = args.resume or args.evaluate or not folder.exists() or int(os.environ.get("RANK", 0))
    require("run_dir", free or folder.is_dir() and not os.listdir(folder), "is not an empty folder")
    require("eval_episodes", args.eval_episodes > 0 or not args.evaluate, "must be above 0")


def main() -> None:
    """Bad input: one line, exit code 2. Ctrl-C: 130."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args = tyro.cli(Args)
    try:
        for folder in [x for x in (args.evaluate, args.resume) if x is not None]:
            args = tyro.cli(Args, default=Args(**restore(folder, {})["args"]))  # parse again
        train(args)
    except BadInput as error:
        print("error:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as error:
        print("stopped; --resume continues from the checkpoint, if any", file=sys.stderr)
        sys.exit(getattr(error, "code", 130))


if __name__ == "__main__":
    main()
# <<< shared: records
