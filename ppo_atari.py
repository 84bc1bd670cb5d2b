# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch==2.13.0",
#   "gymnasium[classic-control,mujoco,atari,other]==1.4.0",
#   "ale-py==0.12.1",
#   "numpy>=1.26",
#   "tyro==1.0.17",
#   "wandb==0.31.0",
# ]
# ///
"""PPO for Atari games from pixels, in one file to read from top to bottom.

    python ppo_atari.py --env-id ALE/Breakout-v5                  # 10M steps: hours on a CPU
    python ppo_atari.py --env-id PongNoFrameskip-v4 --help        # what every flag does
    python ppo_atari.py --resume runs/FOLDER                      # go on where a run stopped
    python ppo_atari.py --evaluate runs/FOLDER --capture-video    # watch what it has learned
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 ppo_atari.py --num-envs 8

Read ppo.py first: what follows `Agent` is the same here, byte for byte. In short, the loop repeats

    1. anneal      take smaller learning steps as the end of training comes nearer
    2. rollout     let the policy act in N environments for T steps and keep every transition
    3. advantages  estimate how much better each action was than the policy's average (GAE)
    4. update      make better actions likelier, for several epochs of shuffled minibatches, with
                   nothing to gain where a probability has changed by more than the share clip_coef
    5. record      log, save, and forget the batch: it tells about a policy that is no more

What differs from ppo.py: the emulator steps all games in C++ threads, a convolutional network is
shared by actor and critic, a lost life ends the bootstrap, and `Args` holds other numbers.

Unlike the paper: clip range constant, 4 epochs, values clipped, their squared errors' weight 1/4.

[PPO] Schulman et al. 2017, arXiv:1707.06347. [GAE] Schulman et al. 2016, arXiv:1506.02438.
[Nature] Mnih et al. 2015, "Human-level control through deep reinforcement learning".
Details: Huang et al. 2022, "The 37 Implementation Details of Proximal Policy Optimization".
"""

import contextlib
import ctypes
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as distributed
import tyro
from ale_py.vector_env import AtariVectorEnv
from gymnasium.utils.save_video import save_video
from torch import Tensor, nn

SCRIPT = "ppo_atari"  # marks checkpoints, so that copies under other names can read them


@dataclass
class Args:
    # What to run
    env_id: str = "ALE/Breakout-v5"
    """environment; "my_module:MyEnv-v0" imports my_module (beside the script or PYTHONPATH)"""
    total_timesteps: int = 10_000_000
    """steps of all environments together, rounded down to whole batches"""
    seed: int = 1
    """same seed, same CPU: same numbers; compare settings over 3 or more seeds"""
    exp_name: str = "ppo_atari"
    """label of the run, part of the folder's name"""
    # Rollout
    num_envs: int = 8
    """N, environments stepped together; more make the batch more varied; 1 to 64"""
    num_steps: int = 128
    """T, steps of each environment per batch; more see further ahead in time; 16 to 2048"""
    gamma: float = 0.99
    """discount of future rewards: the policy plans about 1/(1-gamma) steps ahead; 0.9 to 0.9999"""
    gae_lambda: float = 0.95
    """lower trusts the critic (bias), higher the rewards that followed (variance); 0.8 to 0.98"""
    norm_obs: bool = False
    """normalise observations (not pixels) by running mean and std; try it where sizes differ"""
    norm_reward: bool = False
    """divide rewards by the running std of returns; try it where returns are far from 1"""
    stagger: bool = False
    """restart environments one by one at first, so that each batch mixes stages of episodes"""
    sticky_actions: float = 0.0
    """probability that the emulator repeats the last action instead; 0.25 makes games random"""
    # Update
    learning_rate: float = 2.5e-4
    """Adam's step size; lower it where approx_kl or clipfrac run high; 1e-4 to 1e-3"""
    anneal_lr: bool = True
    """lower the learning rate linearly over the run: steadier at the end"""
    final_lr_fraction: float = 0.0
    """the share of the learning rate that annealing leaves at the end; 0 to 1"""
    update_epochs: int = 4
    """passes over each batch; more learn more from it but move further from it; 3 to 20"""
    num_minibatches: int = 4
    """gradient steps per pass; more are smaller and noisier, usually of 64 to 512 rows"""
    recompute_advantages: bool = False
    """estimate advantages anew with the current critic before each epoch; helps with many epochs"""
    norm_adv: bool = True
    """normalise advantages in each minibatch: step sizes do not depend on the size of rewards"""
    surrogate: Literal["clip", "kl-adaptive", "kl-fixed", "none"] = "clip"
    """how policy steps are kept small: clipped ratio, penalty on the KL, or not at all"""
    clip_coef: float = 0.1
    """epsilon: probability ratios gain nothing beyond 1 +- epsilon; smaller is safer; 0.1 to 0.3"""
    kl_coef: float = 1.0
    """beta, the weight of the KL penalty (kl-adaptive: at the start); 0.3 to 10"""
    kl_target: float = 0.01
    """kl-adaptive halves or doubles beta to keep each update's KL near this; 0.003 to 0.03"""
    target_kl: float | None = None
    """stop an update after an epoch whose mean approx_kl exceeds this; 0.01 to 0.05"""
    clip_vloss: bool = True
    """also limit the change of predicted values to clip_coef; rarely helps"""
    vf_coef: float = 0.5
    """weight of the value loss; raise it where explained_variance stays low; 0.25 to 1"""
    ent_coef: float = 0.01
    """weight of the entropy bonus; raise it where the policy settles too soon; 0 to 0.02"""
    max_grad_norm: float = 0.5
    """longer gradients are cut to this length; grad_norm often above it is fine; 0.5 to 5"""
    # Machine
    cuda: bool = field(default_factory=torch.cuda.is_available)
    """compute on the GPU, by default where there is one; small networks are faster on the CPU"""
    torch_deterministic: bool = True
    """only reproducible cuDNN kernels; turn off for a little speed on a GPU"""
    torch_threads: int = 0
    """CPU threads; 1 is fastest for small networks, 0 is torch's own choice"""
    bf16: bool = False
    """compute the convolutions in bfloat16: faster where the processor knows it"""
    compile: bool = False
    """torch.compile the loss, on a GPU the policy too: starts later, then runs faster"""
    # Records
    run_dir: str | None = None
    """folder for the files, by default runs/{env_id}__{exp_name}__{seed}__{unix time}"""
    eval_episodes: int = 10
    """episodes of the evaluation after training, 0 for none"""
    capture_video: bool = False
    """film episodes of the first environment into videos/"""
    resume: str | None = None
    """run folder or checkpoint to go on from, with its arguments; --total-timesteps may grow"""
    evaluate: str | None = None
    """run folder or checkpoint to evaluate instead of training"""
    track: bool = False
    """send the metrics to wandb as well; WANDB_MODE=offline needs no account"""
    wandb_project_name: str = "ppo"
    """wandb's project"""
    wandb_entity: str | None = None
    """wandb's user or team"""

    # >>> shared: check
    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        return self.batch_size // self.num_minibatches

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.batch_size

    def check(self) -> None:
        """Raise ValueError, one line with flag, value and mend, for what cannot be run as asked."""

        def refuse(name: str, condition: object, mend: str) -> None:
            if condition:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: {mend}")

        most = dict.fromkeys(("gamma", "gae_lambda", "final_lr_fraction", "sticky_actions"), 1)
        most |= {"seed": 2_000_000_000, "torch_threads": 1024}
        counts = ("total_timesteps", "num_envs", "num_steps", "num_minibatches", "update_epochs")
        for name, value in vars(self).items():
            number = value if isinstance(value, int | float) else 0
            refuse(name, not 0 <= number < math.inf, "must be a finite number, not negative")
            refuse(name, value == "", "is empty; give it a value or leave it out")
            whole = type(value) is int and value >= 1
            refuse(name, name in counts and not whole, "must be a whole number (int) of at least 1")
            refuse(name, number > most.get(name, number), f"must be at most {most.get(name, 0):,}")
        for name in ("learning_rate", "clip_coef", "max_grad_norm", "kl_coef", "kl_target"):
            refuse(name, getattr(self, name) == 0, "must be greater than 0")
        kinds = get_args(Args.__annotations__["surrogate"])
        refuse("surrogate", self.surrogate not in kinds, f"must be one of {', '.join(kinds)}")
        batch = f"the batch of --num-envs x --num-steps = {self.batch_size} rows"
        processes, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
        if not (processes.isdecimal() and rank.isdecimal() and int(rank) < int(processes)):
            raise ValueError(f"RANK {rank} of WORLD_SIZE {processes}: not of torchrun; unset both")
        processes = int(processes)
        each = f" / {processes} processes" if processes > 1 else ""
        refuse("total_timesteps", self.num_iterations < 1, f"is less than {batch}; raise it")
        parts = self.num_minibatches * processes
        refuse("num_minibatches", self.batch_size % parts, f"must divide {batch}{each}")
        refuse("num_minibatches", self.minibatch_size < 2 * processes, f"is too much for {batch}")
        refuse("num_envs", self.num_envs % processes, f"must divide among {processes} processes")
        clips = self.surrogate == "clip" or self.clip_vloss
        for name, used, needs in (  # refuse a flag that is not used, and say what would use it
            ("kl_coef", self.surrogate.startswith("kl"), "--surrogate kl-fixed or kl-adaptive"),
            ("kl_target", self.surrogate == "kl-adaptive", "--surrogate kl-adaptive"),
            ("clip_coef", clips, "--surrogate clip or --clip-vloss"),
            ("final_lr_fraction", self.anneal_lr, "--anneal-lr"),
            ("wandb_project_name", self.track, "--track"),
            ("wandb_entity", self.track, "--track"),
        ):
            given = vars(self)[name] != getattr(Args, name) and not (self.resume or self.evaluate)
            refuse(name, given and not used, f"has no effect without {needs}")
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        few = gpus < int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes on this machine
        refuse("cuda", self.cuda and few, f"needs a GPU per process, found {gpus}; try --no-cuda")
        tracks = self.track and not self.evaluate
        refuse("track", tracks and not importlib.util.find_spec("wandb"), "pip install wandb")
        apart = self.evaluate and (self.resume or processes > 1)
        refuse("evaluate", apart, "goes neither with --resume nor with torchrun")
        refuse("eval_episodes", self.evaluate and not self.eval_episodes, "must be at least 1")

    # <<< shared: check


# >>> shared: env_errors
@contextlib.contextmanager
def env_errors(env_id: str) -> Iterator[None]:
    """Turn whatever fails while an environment is built into one line that names it."""
    atari = env_id.startswith(("ale_py:", "ALE/")) or "NoFrameskip" in env_id
    try:
        if atari and SCRIPT != "ppo_atari":
            raise ValueError("For Atari games use ppo_atari.py.")
        yield
    except Exception as error:
        reason = " ".join(f"{error}".split()) or repr(error)
        if isinstance(error, (ModuleNotFoundError, gym.error.NameNotFound)):
            reason += " Your own is my_module:MyEnv-v0, beside the script or on PYTHONPATH."
        if not isinstance(error, (ValueError, ImportError, gym.error.Error)):
            at = traceback.extract_tb(error.__traceback__)[-1]
            reason += f" ({type(error).__name__}, {at.filename}:{at.lineno})"
        raise ValueError(f"--env-id {env_id}: {reason}") from error


# <<< shared: env_errors


def make_envs(args: Args, num_envs: int, videos: Path | None = None) -> gym.vector.VectorEnv:
    """Build games that step together in C++ threads; the first is filmed where `videos` is given.

    Observations (N, 4, 84, 84), uint8: the last four frames, grey and small (details 18, 20); each
    step repeats the action for 4 frames and takes the maximum of the last two (detail 15); a game
    starts with FIRE, where there is that action (detail 17), and up to 30 no-ops (detail 14). A
    lost life counts as a termination, though the game goes on (detail 16). SAME_STEP autoreset: the
    step that ends a game returns the first observation of the next one. Of the id, only the game
    counts; v5's sticky actions need --sticky-actions 0.25. ValueError for what is no Atari game.
    """
    if args.norm_obs:
        raise ValueError("--norm-obs True: pixels are scaled to [0, 1] already; leave it out")
    with env_errors(args.env_id):
        env_id = args.env_id.removeprefix("ale_py:")
        if ":" in env_id or "game" not in gym.spec(env_id).kwargs:
            raise ValueError("This is no Atari game: use ppo.py or ppo_continuous.py.")
        envs = AtariVectorEnv(
            gym.spec(env_id).kwargs["game"],
            num_envs,
            autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
            repeat_action_probability=args.sticky_actions,
            life_loss_info=True,
            reward_clipping=False,  # the emulator would hide the true score; GameStatistics clips
            max_num_frames_per_episode=108_000,
        )
    envs = GameStatistics(envs, videos)
    envs.bf16 = args.bf16
    return envs


class GameStatistics(gym.vector.VectorWrapper):
    """True returns of whole games in infos["episode"]; rewards clipped to [-1, 1] (detail 19)."""

    def __init__(self, envs: AtariVectorEnv, videos: Path | None) -> None:
        super().__init__(envs)
        self.videos, self.frames, self.games = videos, [], 0
        self.episode_returns = np.zeros(self.num_envs)
        self.episode_lengths = np.zeros(self.num_envs, dtype=int)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple:
        obs, infos = self.env.reset(seed=seed, options=options)
        self.frame_numbers = infos["episode_frame_number"].copy()
        restarted = options["reset_mask"] if options else np.ones(self.num_envs, dtype=bool)
        self.episode_returns[restarted] = self.episode_lengths[restarted] = 0
        return obs, infos

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        obs, rewards, terminations, truncations, infos = self.env.step(actions)
        self.episode_returns += rewards
        self.episode_lengths += 1
        # Frame numbers fall where a new game has begun, and not where only a life was lost.
        ended = truncations | (infos["episode_frame_number"] < self.frame_numbers)
        self.frame_numbers = infos["episode_frame_number"].copy()
        if ended.any():
            infos["episode"] = {"r": self.episode_returns.copy(), "l": self.episode_lengths.copy()}
            infos["_episode"] = ended
            self.episode_returns[ended] = self.episode_lengths[ended] = 0
        if self.videos is not None and self.games % 10 == 0:  # as the agent sees it
            self.frames.append(np.repeat(obs[0, -1, ..., None], 3, axis=-1))
        if ended[0]:
            self.end_film()
        return obs, np.clip(rewards, -1, 1), terminations, truncations, infos

    def end_film(self) -> None:
        if self.frames:
            save_video(self.frames, self.videos, lambda _: True, episode_index=self.games, fps=15)
        self.frames, self.games = [], self.games + 1

    def close(self, **kwargs: Any) -> None:
        self.end_film()  # of a game still under way
        super().close(**kwargs)


# >>> shared: statistics
def all_mean(x: Tensor) -> Tensor:
    """Average x in place over all processes of torchrun; a single process leaves it as it is."""
    if distributed.is_initialized():
        distributed.all_reduce(x)
        x /= distributed.get_world_size()
    return x


def all_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance over the rows of x, (rows, ...), of all processes."""
    var, mean = torch.var_mean(x, dim=0, correction=0)
    if distributed.is_initialized():
        own_mean, mean = mean, all_mean(mean.clone())
        var = all_mean(var + (own_mean - mean) ** 2)
    return mean, var


class RunningMeanStd(nn.Module):
    """Mean and variance of all rows seen so far, in float64. A fresh one leaves x as it is."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("std", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.fresh = True  # no buffer, as asking one would wait for a GPU
        self.register_load_state_dict_post_hook(RunningMeanStd.loaded)

    def loaded(self, keys: object) -> None:
        self.fresh = not self.count

    def update(self, x: Tensor) -> None:
        """Take in x, (rows, *shape): the pairwise formula of Chan, Golub & LeVeque 1979."""
        mean, var = all_moments(x.double())
        share = len(x) / (self.count + len(x))  # of the new rows in all rows
        self.var.lerp_(var, share).add_(share * (1 - share) * (mean - self.mean) ** 2)
        self.mean.lerp_(mean, share)
        self.count += len(x)
        self.std.copy_((self.var + 1e-8).sqrt())
        self.fresh = False

    def normalize(self, x: Tensor) -> Tensor:
        """(x - mean) / std, clipped to +-10 (details 28, 29); as float32."""
        x = x.float()
        return x if self.fresh else ((x - self.mean) / self.std).clamp(-10, 10).float()


# <<< shared: statistics


def initialize(layer: nn.Linear | nn.Conv2d, gain: float = math.sqrt(2)) -> nn.Module:
    """Orthogonal weights and zero biases (detail 2)."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """Policy (actor) and value function (critic) on top of one convolutional network (detail 21).

    They take raw frames (N, 4, 84, 84), uint8. The policy is a categorical distribution; what is
    called `dist` below is its log-probabilities, (N, actions).
    """

    eval_deterministic = False  # a greedy policy may never press FIRE again after a lost life

    def __init__(self, envs: gym.vector.VectorEnv) -> None:
        super().__init__()
        self.bf16 = getattr(envs, "bf16", False)
        self.network = nn.Sequential(  # [Nature], methods
            initialize(nn.Conv2d(envs.single_observation_space.shape[0], 32, 8, stride=4)),
            nn.ReLU(),
            initialize(nn.Conv2d(32, 64, 4, stride=2)),
            nn.ReLU(),
            initialize(nn.Conv2d(64, 64, 3, stride=1)),
            nn.ReLU(),
            nn.Flatten(),
            initialize(nn.Linear(64 * 7 * 7, 512)),
            nn.ReLU(),
        ).to(memory_format=torch.channels_last)
        # A small last layer: all actions are about equally probable at first.
        self.actor = initialize(nn.Linear(512, int(envs.single_action_space.n)), gain=0.01)
        self.critic = initialize(nn.Linear(512, 1), gain=1.0)

    def features(self, obs: Tensor) -> Tensor:
        """(N, 4, 84, 84) -> (N, 512); pixels are scaled to [0, 1] (detail 22)."""
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):
            pixels = obs.contiguous(memory_format=torch.channels_last).to(dtype).div_(255)
            return self.network(pixels).float()

    def get_dist(self, obs: Tensor) -> Tensor:
        return self.policy(self.features(obs))

    def policy(self, features: Tensor) -> Tensor:
        return self.actor(features).log_softmax(dim=-1)

    def get_value(self, obs: Tensor) -> Tensor:
        """V(s), (N,); of many rows a part at a time, whose activations stay small."""
        return torch.cat([self.critic(self.features(x)).squeeze(-1) for x in obs.split(256)])

    def get_action_and_value(self, obs: Tensor, action: Tensor | None = None) -> tuple[Tensor, ...]:
        """Actions (sampled if none are given), logprobs, entropies and values, (N,) each."""
        features = self.features(obs)
        dist = self.policy(features)
        action = self.sample(dist) if action is None else action
        # H(p) = -sum_a p(a) * log p(a)
        entropy = -(dist.exp() * dist).sum(dim=-1)
        return action, self.log_prob(dist, action), entropy, self.critic(features).squeeze(-1)

    def act(self, obs: Tensor, deterministic: bool = True) -> Tensor:
        """Actions (N,): the most probable ones, or samples."""
        dist = self.get_dist(obs)
        return dist.argmax(dim=-1) if deterministic else self.sample(dist)

    def sample(self, dist: Tensor) -> Tensor:
        # Categorical(logits=dist).sample(), faster: the argmax of log p + Gumbel noise, which is
        # -log(Exponential(1)), is a sample of p.
        return (dist - torch.empty_like(dist).exponential_().log()).argmax(dim=-1)

    def log_prob(self, dist: Tensor, action: Tensor) -> Tensor:
        return dist.gather(-1, action.unsqueeze(-1)).squeeze(-1)  # log p of each row's action

    @staticmethod
    def kl(old_dist: Tensor, new_dist: Tensor) -> Tensor:
        """KL[old || new] = sum_a old(a) * (log old(a) - log new(a)), exact, (N,)."""
        return (old_dist.exp() * (old_dist - new_dist)).sum(dim=-1)


# >>> shared: algorithm
def compute_gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminations: Tensor,
    dones: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation ([GAE] eq. 16, [PPO] eq. 11-12; detail 5).

    All (T, N); row t is the transition from s_t to s_{t+1}. next_values[t] = V(s_{t+1}), taken
    before any reset. terminations: s_{t+1} is terminal. dones: the episode ended here, by
    termination or by truncation (a time limit). Returns advantages and returns, in the rewards'
    dtype; returns are what the critic should have said.
    """
    values, next_values = values.to(rewards.dtype), next_values.to(rewards.dtype)
    # delta_t = r_t + gamma * V(s_{t+1}) * (1 - termination_t) - V(s_t)
    # (critical: after a time limit s_{t+1} still has a value, so terminations count, not dones)
    deltas = rewards + gamma * next_values * (1 - terminations.to(rewards.dtype)) - values
    # A_t = delta_t + gamma * lambda * (1 - done_t) * A_{t+1}: row t+1 may be another episode's
    decays = gamma * gae_lambda * (1 - dones.to(rewards.dtype))
    advantages = torch.zeros_like(rewards)
    advantage = torch.zeros_like(rewards[0])  # A_T = 0: V in the last delta stands for the rest
    for t in reversed(range(len(rewards))):
        advantages[t] = advantage = deltas[t] + decays[t] * advantage
    return advantages, advantages + values


def ppo_loss(
    new_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    new_values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    entropies: Tensor,
    *,
    clip_coef: float | None,
    vf_clip_coef: float | None,
    vf_coef: float,
    ent_coef: float,
    kl: Tensor | None = None,
    kl_coef: float | Tensor = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's objective on a minibatch, as a loss to minimise ([PPO] eq. 6-9), and its statistics.

    All tensors (M,). clip_coef None: plain surrogate r * A. vf_clip_coef None: plain squared
    error. kl: exact KL[old || new] of each row, where it is penalised.
    """
    # r = pi_new(a|s) / pi_old(a|s) weighs what the old policy did, as if the new one had done it
    logratio = new_logprobs - old_logprobs
    ratio = logratio.exp()
    # L_CLIP = E[min(r * A, clip(r, 1 - eps, 1 + eps) * A)] (detail 8): nothing to gain from moving
    # r beyond 1 +- eps in A's favour; where r has moved the wrong way, the way back stays open.
    surrogate = ratio * advantages
    if clip_coef is not None:
        clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
        surrogate = torch.min(surrogate, clipped_ratio * advantages)
    policy_loss = -surrogate.mean()
    # L_VF = 1/2 * E[(V - return)^2], or of the worse of V and V held near the old one (detail 9)
    squared_error = (new_values - returns) ** 2
    if vf_clip_coef is not None:
        held_values = old_values + (new_values - old_values).clamp(-vf_clip_coef, vf_clip_coef)
        squared_error = torch.max(squared_error, (held_values - returns) ** 2)
    value_loss = 0.5 * squared_error.mean()
    # loss = -L_CLIP + vf_coef * L_VF - ent_coef * H + beta * KL: minus what shall grow (detail 10)
    entropy = entropies.mean()
    loss = policy_loss + vf_coef * value_loss - ent_coef * entropy
    if kl is not None:
        loss = loss + kl_coef * kl.mean()
    stats = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    # KL[old || new] estimated from old's samples (http://joschu.net/blog/kl-approx.html)
    stats["approx_kl"] = ((ratio - 1) - logratio).mean()  # k3: never negative, little noise
    stats["old_approx_kl"] = -logratio.mean()  # k1: noisier; both are unbiased
    outside = (ratio - 1).abs() > (clip_coef if clip_coef is not None else math.inf)
    stats["clipfrac"] = outside.to(ratio.dtype).mean()  # share of ratios beyond 1 +- eps
    return loss, {name: value.detach() for name, value in stats.items()}


def minibatch_loss(
    agent: Agent, args: Args, mb: dict[str, Tensor], kl_coef: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """ppo_loss of the rows mb for the agent as it is now; one function for --compile to fuse."""
    _, new_logprobs, entropies, new_values = agent.get_action_and_value(mb["obs"], mb["actions"])
    advantages = normalize_advantages(mb["advantages"]) if args.norm_adv else mb["advantages"]
    rows = (new_logprobs, mb["logprobs"], advantages, new_values, mb["values"], mb["returns"])
    clip_coef = args.clip_coef if args.surrogate == "clip" else None
    clips = {"clip_coef": clip_coef, "vf_clip_coef": args.clip_coef if args.clip_vloss else None}
    weights = {"vf_coef": args.vf_coef, "ent_coef": args.ent_coef, "kl_coef": kl_coef}
    kl = agent.kl(mb["dist"], agent.get_dist(mb["obs"])) if "kl" in args.surrogate else None
    return ppo_loss(*rows, entropies, kl=kl, **clips, **weights)


def normalize_advantages(advantages: Tensor) -> Tensor:
    """(A - mean) / std over the minibatch of all processes, (M,) (detail 7)."""
    mean, var = all_moments(advantages)
    return (advantages - mean) / (var.sqrt() + 1e-8)


def discounted_returns(rewards: Tensor, dones: Tensor, gamma: float, start: Tensor) -> tuple:
    """R_t = r_t + gamma * R_{t-1}: rewards so far, earlier ones discounted, (T, N), for scaling.

    They begin at 0 in each episode; start (N,): the last call's second result, or 0 (detail 30).
    """
    traces = torch.zeros_like(rewards)
    for t in range(len(rewards)):
        traces[t] = rewards[t] + gamma * start
        start = traces[t] * (1 - dones[t])
    return traces, start


@torch.no_grad()
def estimate_values(
    agent: Agent, obs: Tensor, next_obs: Tensor, truncations: Tensor, final_obs: Tensor
) -> tuple[Tensor, Tensor]:
    """V(s_t) and V(s_{t+1}) of all rows, (T, N) each; s_{t+1} as it was before any reset.

    obs (T, N, ...); next_obs (N, ...) follows the last row; final_obs (K, ...) are what the K rows
    set in truncations (T, N) led to, in order. (critical: the row below begins another episode.)
    Where a row terminated, V(s_{t+1}) means nothing and is not used.
    """
    values = agent.get_value(torch.cat([obs.flatten(0, 1), next_obs, final_obs]))
    values, final_values = values.split([len(values) - len(final_obs), len(final_obs)])
    values = values.unflatten(0, (len(obs) + 1, -1))
    next_values = values[1:].clone()  # to write into: `values` stays as it is
    next_values[truncations.bool()] = final_values
    return values[:-1], next_values


def join_gradients(agent: Agent) -> Tensor:
    """All gradients as one tensor, (P,), to clear, average and cut at once: .grad are its parts."""
    parameters = [parameter for parameter in agent.parameters() if parameter.requires_grad]
    sizes = [parameter.numel() for parameter in parameters]
    gradients = torch.zeros(sum(sizes), device=parameters[0].device)
    for parameter, part in zip(parameters, gradients.split(sizes), strict=True):
        parameter.grad = part.as_strided(parameter.shape, parameter.stride())  # in its layout
    return gradients


def check_finite(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if not (math.isfinite(x.item()) if x.ndim == 0 else x.isfinite().all()):
            index = (~x.isfinite()).nonzero()[0].tolist() if x.ndim else ""  # [t, i, ...]
            raise FloatingPointError(f"{name}{index} is NaN or infinite")


def ppo(args: Args, stack: contextlib.ExitStack) -> tuple[Agent, "Run"]:
    """Train an agent. T steps, N environments (of this process), B = T * N rows, M a minibatch."""
    device = torch.device("cuda" if args.cuda else "cpu")
    torch.set_num_threads(args.torch_threads or torch.get_num_threads())
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.backends.cuda.matmul.allow_tf32 = args.compile  # the compiler for GPUs warns without it
    torch.manual_seed(args.seed)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    envs = make_envs(args, args.num_envs // world_size, None if rank else video_folder(args))
    agent = Agent(envs).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), eps=1e-5, fused=True)  # (detail 3)
    reward_stats = RunningMeanStd().to(device)
    # Creates the files, seeds this process, catches Ctrl-C; with --resume, loads what is named here
    run = Run(args, stack, agent=agent, optimizer=optimizer, reward_stats=reward_stats)
    stack.callback(envs.close)
    gradients = join_gradients(agent)
    policy, loss_function = agent.get_dist, minibatch_loss
    if args.compile:
        # dynamic=False: compiled anew for each value of a float, as code for all values is wrong in
        # torch 2.13. So what changes in a run must be a tensor, as kl_coef is.
        loss_function = torch.compile(loss_function, dynamic=False)
        policy = torch.compile(policy, dynamic=False) if args.cuda else policy  # CPU: no gain

    T, N = args.num_steps, envs.num_envs
    B = T * N
    obs_dtype = torch.uint8 if envs.single_observation_space.dtype == np.uint8 else torch.float32
    next_obs, _ = envs.reset(seed=run.seed if args.resume else args.seed + rank * N)
    next_obs = torch.as_tensor(next_obs, dtype=obs_dtype, device=device)  # (N, ...)
    carry = torch.zeros(N, device=device)  # discounted sums of the episodes under way

    first = run.iteration + 1
    for iteration in range(first, args.num_iterations + 1):
        run.iteration = iteration
        # ---- Phase 1: anneal (detail 4)
        progress = (iteration - 1) / args.num_iterations if args.anneal_lr else 0.0
        learning_rate = args.learning_rate * (1 - progress * (1 - args.final_lr_fraction))
        optimizer.param_groups[0]["lr"] = learning_rate  # its only group
        metrics = {"charts/learning_rate": learning_rate, "losses/kl_coef": run.kl_coef}

        # ---- Phase 2: rollout (detail 1)
        # Environments that begin together fill each batch with one stage of their episodes. To
        # spread them out, environment i restarts once, before the i-th iteration after the first.
        if args.stagger and 0 < (i := iteration - first) < N:
            next_obs, _ = envs.reset(options={"reset_mask": np.arange(N) == i})
            next_obs = torch.as_tensor(next_obs, dtype=obs_dtype, device=device)
            carry[i] = 0.0
        steps, outcomes, final_obs = [], [], []
        for t in range(T):
            with torch.inference_mode():
                old_dist = policy(next_obs)
                action = agent.sample(old_dist)
            steps.append((next_obs, action, old_dist))
            # Fetching the actions is the rollout's only long wait for a GPU.
            next_obs, reward, terminated, truncated, infos = envs.step(action.cpu().numpy())
            next_obs = torch.as_tensor(next_obs, dtype=obs_dtype, device=device)
            truncated = truncated & ~terminated  # where both are set, it has ended for good
            outcomes.append((reward, terminated, truncated))
            # next_obs begins a new episode there; V(s_{t+1}) needs what the old one led to.
            final_obs += [infos["final_obs"][i] for i in np.flatnonzero(truncated)]
            # "_episode" marks where an episode ended, "r" is its return, "l" its length
            for i in np.flatnonzero(infos["_episode"]) if "_episode" in infos else ():
                step = run.global_step + (t + 1) * args.num_envs
                run.episode(step, infos["episode"]["r"][i], infos["episode"]["l"][i])
        run.global_step += args.batch_size
        # (T, N, ...) each, and (K, ...) of the K rows that a time limit ended
        obs, actions, old_dist = map(torch.stack, zip(*steps, strict=True))
        outcomes = torch.as_tensor(np.array(outcomes), dtype=torch.float32, device=device)
        rewards, terminations, truncations = outcomes.unbind(dim=1)  # of (T, 3, N)
        dones = terminations + truncations
        final_obs = np.array(final_obs).reshape(-1, *obs.shape[2:])
        final_obs = torch.as_tensor(final_obs, dtype=obs_dtype, device=device)
        check_finite(observation=obs, final_observation=final_obs, reward=rewards)
        if args.norm_reward:
            traces, carry = discounted_returns(rewards, dones, args.gamma, carry)
            reward_stats.update(traces.flatten())
            rewards = (rewards / reward_stats.std).float()

        # (T, N, ...) -> (B, ...)
        batch = {"obs": obs, "actions": actions, "dist": old_dist}
        batch = {name: x.flatten(0, 1) for name, x in batch.items()}
        batch["logprobs"] = agent.log_prob(batch["dist"], batch["actions"]).detach()
        mb_stats, kl_coef = [], torch.tensor(run.kl_coef, device=device)
        for epoch in range(args.update_epochs):
            # ---- Phase 3: advantages, once or anew before each epoch
            if epoch == 0 or args.recompute_advantages:
                values, next_values = estimate_values(agent, obs, next_obs, truncations, final_obs)
                advantages, returns = compute_gae(
                    rewards, values, next_values, terminations, dones, args.gamma, args.gae_lambda
                )
                batch |= {"advantages": advantages.flatten(), "returns": returns.flatten()}
                batch["values"] = values.flatten()
            if epoch == 0:  # how much of the returns the critic foresaw, before it learns them
                explained = 1 - (returns - values).var() / returns.var()
            # ---- Phase 4: update (detail 6)
            for rows in torch.randperm(B, device=device).split(B // args.num_minibatches):
                mb = {name: x.index_select(0, rows) for name, x in batch.items()}  # (M, ...)
                loss, stats = loss_function(agent, args, mb, kl_coef)
                gradients.zero_()  # (critical: zero_grad() would replace .grad and clip nothing)
                loss.backward()
                all_mean(gradients)
                grad_norm = gradients.norm()  # of actor and critic together
                gradients *= (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)  # (detail 11)
                if not args.cuda:  # a GPU would have to wait; phase 5 checks its gradients
                    check_finite(loss=loss, gradient=grad_norm)
                optimizer.step()
                mb_stats.append(stats | {"grad_norm": grad_norm})
            kls = [stats["approx_kl"] for stats in mb_stats[-args.num_minibatches :]]
            if args.target_kl is not None and all_mean(torch.stack(kls).mean()) > args.target_kl:
                break
        if args.surrogate == "kl-adaptive":  # [PPO] section 4; the bounds are ours
            with torch.no_grad():
                dist = torch.cat([*map(agent.get_dist, batch["obs"].split(args.minibatch_size))])
                kl = all_mean(agent.kl(batch["dist"], dist).mean())
            run.kl_coef *= 0.5 if kl < args.kl_target / 1.5 else 1
            run.kl_coef *= 2.0 if kl > args.kl_target * 1.5 else 1
            run.kl_coef = min(max(run.kl_coef, args.kl_coef / 1000), args.kl_coef * 1000)

        # ---- Phase 5: record, means over all minibatches (detail 12)
        for name in mb_stats[0]:
            metrics[f"losses/{name}"] = torch.stack([x[name] for x in mb_stats]).mean().item()
        check_finite(gradient=torch.tensor(metrics["losses/grad_norm"]))
        metrics["losses/explained_variance"] = explained.item()
        if args.norm_obs:
            agent.obs_stats.update(batch["obs"])  # (critical: only now, or no ratio starts at 1)
        stopped = all_mean(torch.tensor(float(run.signal), device=device)) > 0
        run.record(metrics, last=bool(stopped) or iteration == args.num_iterations)
        if stopped:
            run.signal = run.signal or signal.SIGTERM  # it may have reached another process only
            break
    return agent, run


# <<< shared: algorithm


# >>> shared: records
# The algorithm ends here. What follows writes files, resumes, evaluates and reads the command line.
METRICS = (  # the columns of metrics.csv; what has no name here goes to wandb only
    "global_step charts/SPS charts/learning_rate charts/episodic_return charts/episodic_length "
    "losses/value_loss losses/policy_loss losses/entropy losses/approx_kl losses/old_approx_kl "
    "losses/clipfrac losses/explained_variance losses/grad_norm losses/kl_coef wall_time"
).split()
EPISODES = "global_step episodic_return episodic_length wall_time".split()
EVALUATION = "eval_return_mean eval_return_std eval_episodes".split()
CHECKPOINT = set("agent optimizer reward_stats progress rng script args".split())
PROGRESS = "iteration global_step wall_time sps kl_coef episodes solved_at_step wandb_id".split()


class Run:
    """A run's folder: CSV files, checkpoints, progress line; wandb; what Ctrl-C and faults do."""

    def __init__(self, args: Args, stack: contextlib.ExitStack, **modules: Any) -> None:
        """Create the folder, or restore the modules (anything with a state_dict) to resume."""
        self.args, self.modules, self.wandb, self.files = args, modules, None, {}
        self.iteration = self.global_step = self.signal = self.next_save = self.next_line = 0
        self.wall_time, self.sps, self.episodes, self.solved_at_step = 0.0, 0.0, [], None
        self.kl_coef = args.kl_coef if args.surrogate.startswith("kl") else 0.0
        self.folder, self.wandb_id = Path(args.run_dir), os.urandom(8).hex()
        saved = load_checkpoint(args.resume) if args.resume else {}
        for name, module in modules.items() if saved else ():
            load_state(module, saved.get(name))
        vars(self).update(saved.get("progress", {}))
        self.began = time.time() - self.wall_time  # as if there had been no break
        # Seeds of their own for other processes and for the environments of a resumed run
        self.rank = int(os.environ.get("RANK", 0))
        sequence = np.random.SeedSequence((args.seed, self.rank, self.iteration))
        self.seed = int(sequence.generate_state(1)[0]) >> 2  # fits a C int, with some to add
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # only the main thread may
                previous = signal.signal(number, self.on_signal)
                stack.callback(signal.signal, number, previous)  # put back in the end
        if self.rank:
            torch.manual_seed(self.seed)
            stack.push(self.on_exit)
            return
        if saved:
            torch.set_rng_state(saved["rng"])
        if args.cuda and "cuda_rng" in saved:
            torch.cuda.set_rng_state(saved["cuda_rng"])
        versions = {module.__name__: str(module.__version__) for module in (torch, gym, np)}
        config = vars(args) | {"versions": versions | {"python": sys.version}}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, columns in (("metrics.csv", METRICS), ("episodes.csv", EPISODES)):
                file = stack.enter_context(open(self.folder / name, "r+" if saved else "x"))
                self.files[name], header = file, ",".join(columns) + "\n"
                if not saved:
                    file.write(header)
                elif file.readline() != header or file.seek(0, os.SEEK_END) < saved[name]:
                    raise OSError(f"{name} has other columns or fewer rows than the checkpoint's")
                else:
                    file.seek(saved[name])
                    file.truncate()  # rows after the checkpoint are trained again
            write(self.folder / "config.json", json.dumps(config, indent=2).encode())
            script, own = self.folder / "script.py", Path(__file__).read_bytes()
            if script.exists() and script.read_bytes() != own:  # resumed with a changed one
                script = script.with_name(f"script-from-{self.iteration + 1}.py")
            write(script, own)
        except OSError as error:
            flag = "--resume" if saved else "--run-dir"
            raise ValueError(f"{flag} {self.folder}: {error}") from error
        if args.track:
            import wandb

            names = {"project": args.wandb_project_name, "entity": args.wandb_entity}
            names |= {"id": self.wandb_id, "name": self.folder.name, "dir": self.folder}
            try:
                self.wandb = wandb.init(**names, config=config, resume="allow")
            except Exception as error:  # not logged in, no network
                raise ValueError(f"--track True: {' '.join(f'{error}'.split())}") from error
            self.wandb.define_metric("*", step_metric="global_step")
            self.wandb.log_code(self.folder, include_fn=lambda path: path.endswith(script.name))
            self.video, self.films = wandb.Video, {*self.folder.glob("videos/*/*.mp4")}  # sent
        (self.folder / "summary.json").unlink(missing_ok=True)  # of the run before it went on
        stack.push(self.on_exit)
        done = f" ({self.iteration:,} of them done)" if saved else ""
        steps = f"{args.num_iterations * args.batch_size:,} of {args.total_timesteps:,} steps"
        device = "cuda" if args.cuda else "cpu"
        rows = f"{args.batch_size:,} rows = {args.num_envs} envs x {args.num_steps} steps"
        updates = args.update_epochs * args.num_minibatches
        passes = f"{args.update_epochs} epochs x {args.num_minibatches} minibatches"
        print(f"{args.env_id}, seed {args.seed}, files in {self.folder}")
        print(f"{args.num_iterations:,} iterations{done}, {steps}; device {device}")
        print(f"each: {rows}, {updates} updates = {passes} of {args.minibatch_size}", flush=True)

    def on_signal(self, number: int, frame: object) -> None:
        """End after this iteration or evaluation step; the same signal again ends at once."""
        self.signal = number
        signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # a closed pipe; no print, as this may interrupt one
            if self.rank == 0:
                os.write(2, b"\nstopping soon; a second time stops at once and saves nothing\n")

    def on_exit(self, kind: object, error: BaseException | None, trace: object) -> None:
        for file in self.files.values():
            with contextlib.suppress(OSError):  # a full disk, already reported
                file.close()
        with contextlib.suppress(Exception):  # wandb is gone; what the run has written is not
            if self.wandb:
                self.wandb.finish(exit_code=int(error is not None))
        if isinstance(error, Exception):
            at = f"iteration {self.iteration}, after step {self.global_step}"
            files = f"; files in {self.folder}" if self.rank == 0 else ""
            raise RuntimeError(f"{at}: {error!r}{files}") from error

    def episode(self, step: int, episodic_return: float, length: int) -> None:
        self.episodes = [*self.episodes[-99:], (float(episodic_return), int(length))]
        if self.rank == 0:
            row = (step, *self.episodes[-1], round(time.time() - self.began, 3))
            print(*row, sep=",", file=self.files["episodes.csv"])

    def record(self, metrics: dict[str, float], last: bool) -> None:
        """Write the iteration's row; when it is time, a checkpoint and the progress line."""
        if self.rank:
            return
        args, now, done = self.args, time.time(), self.iteration / self.args.num_iterations
        self.wall_time = now - self.began
        self.sps = self.global_step / self.wall_time
        mean_return, mean_length = np.mean(self.episodes or [(np.nan, np.nan)], axis=0).tolist()
        threshold = getattr(gym.registry.get(args.env_id.split(":")[-1]), "reward_threshold", None)
        solved = threshold is not None and len(self.episodes) == 100 and mean_return >= threshold
        if solved and self.solved_at_step is None:
            self.solved_at_step = self.global_step
        row = metrics | {"global_step": self.global_step, "charts/SPS": round(self.sps)}
        row |= {"charts/episodic_return": mean_return, "charts/episodic_length": mean_length}
        row |= {"wall_time": round(self.wall_time, 3)}
        print(*(row.get(name, "nan") for name in METRICS), sep=",", file=self.files["metrics.csv"])
        for file in self.files.values():
            file.flush()
        if self.wandb:
            try:
                films = {*self.folder.glob("videos/*/*.mp4")} - self.films
                self.films |= films
                videos = [self.video(str(film)) for film in sorted(films)]
                self.wandb.log(row | ({"videos": videos} if videos else {}))
            except Exception as error:
                self.wandb = None
                print(f"wandb is gone, training goes on: {error}", file=sys.stderr)
        if now >= self.next_save or last:
            self.save()
            self.next_save = now + 101 * (time.time() - now)  # so it takes 1% of the time
        if now >= self.next_line or last:
            terminal = sys.stdout.isatty()
            self.next_line = now + (1 if terminal else 10)
            left = (args.num_iterations * args.batch_size - self.global_step) / self.sps
            line = f"{done:4.0%} {self.global_step:,} steps, {self.sps:,.0f} SPS, {left:.0f} s left"
            line += f", return {mean_return:.1f}, KL {metrics['losses/approx_kl']:.4f}"
            line += f", clipped {metrics['losses/clipfrac']:.2f}"
            line += f", explained {metrics['losses/explained_variance']:.2f}"
            width = os.get_terminal_size().columns - 1 if terminal else None  # more would wrap
            print(f"{line:<99}"[:width], end="\r" if terminal and not last else "\n", flush=True)

    def save(self) -> None:
        state = {name: module.state_dict() for name, module in self.modules.items()}
        state |= {name: file.tell() for name, file in self.files.items()}
        state |= {"progress": {name: getattr(self, name) for name in PROGRESS}, "script": SCRIPT}
        state |= {"args": vars(self.args) | {"resume": None}, "rng": torch.get_rng_state()}
        state |= {"cuda_rng": torch.cuda.get_rng_state()} if self.args.cuda else {}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write(self.folder / "checkpoint.pt", buffer.getvalue())


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: under a temporary name, flushed to disk, renamed."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def folder_of(args: Args) -> Path:
    if path := args.resume or args.evaluate:
        return Path(path).parent if Path(path).is_file() else Path(path)
    if args.run_dir is None:
        name = f"{args.env_id}__{args.exp_name}__{args.seed}".replace("/", "-").replace(":", "-")
        times = itertools.count(int(time.time()))  # the first second whose folder is not taken
        return next(f for t in times if not (f := Path("runs", f"{name}__{t}")).exists())
    folder = Path(args.run_dir)
    if os.environ.get("RANK", "0") == "0" and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"--run-dir {folder}: is not empty; name a new folder")
    return folder


def video_folder(args: Args) -> Path | None:
    """A new folder for each start, as each numbers its films from 0 on."""
    return Path(args.run_dir, f"videos/started-{int(time.time())}") if args.capture_video else None


def load_checkpoint(path: str) -> dict[str, Any]:
    """Read this script's checkpoint from a file or run folder; runs no code that it may hold."""
    file = Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict) or not checkpoint.keys() >= CHECKPOINT:
            raise ValueError(f"It does not hold {', '.join(sorted(CHECKPOINT))}.")
        if checkpoint["script"] != SCRIPT:
            raise ValueError(f"It was written by {checkpoint['script']}.py.")
        Args(**checkpoint["args"])
    except Exception as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        if isinstance(error, pickle.UnpicklingError):  # torch advises to trust the file
            reason = "It holds something else."
        own = file.with_name("script.py")
        reason += f" The run's own script is {own}." if own.exists() else ""
        raise ValueError(f"--resume/--evaluate {file}: cannot be used. {reason}") from error
    return checkpoint


def load_state(module: Any, state: dict[str, Any] | None) -> None:
    try:
        module.load_state_dict(state)
    except Exception as error:
        reason = " ".join(str(error).split())
        lacks = f"the checkpoint has no {type(module).__name__} that fits"
        raise ValueError(f"{lacks}: it is of another network or script. {reason}") from error


def resumed_args(args: Args, defaults: Args) -> Args:
    """The checkpoint's arguments, with those of `args` that are not `defaults` and may change."""
    saved = vars(Args(**load_checkpoint(args.resume or args.evaluate)["args"]))
    free = {"resume", "evaluate", "cuda", "torch_threads", "eval_episodes"}
    free |= {"total_timesteps", "track"} if args.resume else {"seed", "capture_video"}
    given = {name: value for name, value in vars(args).items() if value != getattr(defaults, name)}
    for name, value in given.items():
        shrinks = name == "total_timesteps" and value < saved[name]
        if value != saved[name] and (name not in free or shrinks):
            flag = f"--{name.replace('_', '-')} {value}"
            raise ValueError(f"{flag}: contradicts the run's {saved[name]}; leave it out")
    return replace(Args(**saved), **given)


@torch.no_grad()
def evaluate(agent: Agent, args: Args, videos: Path | None = None, run: Run | None = None) -> dict:
    """Play an episode in each of --eval-episodes fresh environments, seeded from --seed alone.

    One in each, as the first so many to end would favour short ones. Statistics stay frozen, and
    training's random numbers untouched. Episodes longer than 27,000 steps are cut. A signal to
    `run` ends it, and makes its result worthless.
    """
    device, n = next(agent.parameters()).device, args.eval_episodes
    if n == 0:
        return dict.fromkeys(EVALUATION) | {"eval_episodes": 0}
    envs = make_envs(args, n, videos)
    returns, lengths, playing = np.zeros(n), np.zeros(n, dtype=int), np.ones(n, dtype=bool)
    try:
        with torch.random.fork_rng([device] * (device.type == "cuda")), contextlib.closing(envs):
            torch.manual_seed(args.seed)
            obs, _ = envs.reset(seed=args.seed + 1_000_000)
            while playing.any() and lengths.max() < 27_000 and not (run and run.signal):
                action = agent.act(torch.as_tensor(obs, device=device), agent.eval_deterministic)
                obs, _, _, _, infos = envs.step(action.cpu().numpy())
                ended = playing & infos.get("_episode", False)
                final = infos["episode"]["r"] if ended.any() else returns
                returns = np.where(ended, final, np.where(playing, envs.episode_returns, returns))
                lengths += playing
                playing &= ~ended
    except Exception as error:
        raise RuntimeError(f"evaluation, after step {lengths.max()}: {error!r}") from error
    numbers = (float(returns.mean()), float(returns.std()), n)
    cut = (lengths >= 27_000).tolist()
    if any(cut):
        print(f"{sum(cut)} of {n} evaluation episodes were cut at 27,000 steps", file=sys.stderr)
    episodes = {"returns": returns.tolist(), "lengths": lengths.tolist(), "cut": cut}
    return dict(zip(EVALUATION, numbers, strict=True)) | episodes


def train(args: Args, defaults: Args | None = None) -> str:
    """Train, evaluate, write summary.json; returns the run folder.

    Raises ValueError where `args` cannot be run, RuntimeError where training fails (it names the
    step), SystemExit after Ctrl-C (130) or SIGTERM (143), when everything is saved.
    """
    args = resumed_args(args, defaults or Args()) if args.resume else args
    args.check()
    args = replace(args, run_dir=str(folder_of(args)))
    if args.cuda and "WORLD_SIZE" in os.environ:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if args.compile:
        try:
            torch.compile(lambda x: x + 1)(torch.ones(2, device="cuda" if args.cuda else "cpu"))
        except Exception as error:
            reason = f"needs a C++ compiler and Python's headers, say g++ and python3-dev ({error}"
            raise ValueError(f"--compile True: {reason.splitlines()[0]})") from error
    with contextlib.ExitStack() as stack:
        if "WORLD_SIZE" in os.environ:
            importlib.import_module("torch.distributed.nn")  # later, it would keep the group alive
            distributed.init_process_group("nccl" if args.cuda else "gloo")
        agent, run = ppo(args, stack)
        if distributed.is_initialized():
            distributed.barrier(device_ids=[torch.cuda.current_device()] if args.cuda else None)
            distributed.destroy_process_group()  # together; not after an error: NCCL would wait
        if run.rank == 0 and not run.signal:
            result = evaluate(agent, args, run=run)
        if run.signal:  # one that comes later finds the run finished
            print(f"stopped; go on with --resume {run.folder}\n" * (run.rank == 0), end="")
            raise SystemExit(128 + run.signal)
        if run.rank == 0:
            mean_return = float(np.mean(run.episodes, axis=0)[0]) if run.episodes else None
            summary = {"global_step": run.global_step, "wall_time": round(run.wall_time, 3)}
            summary |= {"SPS": round(run.sps), "train_return_last100": mean_return}
            summary |= {x: result[x] for x in EVALUATION} | {"solved_at_step": run.solved_at_step}
            write(run.folder / "summary.json", json.dumps(summary, indent=2).encode())
            with contextlib.suppress(Exception):  # wandb is gone, or was never there
                run.wandb.summary.update(summary)
            print(*(f"{name}={value}" for name, value in summary.items()))
            print(f"files in {run.folder}", flush=True)
    return str(run.folder)


def evaluate_checkpoint(args: Args, defaults: Args) -> None:
    """--evaluate: write evaluation.json into the run folder and print the mean."""
    args = resumed_args(args, defaults)
    args.check()
    torch.set_num_threads(args.torch_threads or torch.get_num_threads())
    args = replace(args, run_dir=str(folder_of(args)))
    with contextlib.closing(make_envs(args, 1)) as envs:
        agent = Agent(envs)
    load_state(agent, load_checkpoint(args.evaluate)["agent"])
    result = evaluate(agent.to("cuda" if args.cuda else "cpu"), args, video_folder(args))
    print(*(f"{name}={result[name]}" for name in EVALUATION), flush=True)
    write(Path(args.run_dir, "evaluation.json"), json.dumps(result, indent=2).encode())


def main() -> None:
    """Run the command line; bad input is one line on stderr and exit code 2."""
    try:
        args, defaults = tyro.cli(Args), None
        if path := args.resume or args.evaluate:
            defaults = Args(**load_checkpoint(path)["args"])
            args = tyro.cli(Args, default=defaults)
        evaluate_checkpoint(args, defaults) if args.evaluate else train(args, defaults)
    except (ValueError, OSError) as error:  # OSError: nothing can be written into the folder
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not isinstance(error.__cause__, (FloatingPointError, OSError)):
            traceback.print_exception(error.__cause__ or error)
        print(f"error: {str(error) or repr(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # before training, or with --evaluate
        sys.exit(130)


# <<< shared: records


# With each minibatch, glibc returns large tensors' memory to Linux, for up to a third of its time.
with contextlib.suppress(OSError, AttributeError):  # another C library
    for option, size in ((-3, 2**25), (-1, 2**30)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD: bytes
        ctypes.CDLL("libc.so.6").mallopt(option, size)


if __name__ == "__main__":
    main()
