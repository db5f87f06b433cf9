"""REINFORCE and GRPO on math problems in one file: why does GRPO divide by the standard deviation?

    python grpo.py --norm none          # REINFORCE: a minute or two on a CPU, no download
    python grpo.py --norm std           # GRPO: same prompts, same random numbers
    python analyze.py runs/*            # what the division changed, and for whom
    python grpo.py --norm std --resume  # goes on where an interrupted run stopped
    python grpo.py --task gsm8k         # a hub model and data set; or --model DIR --data FILE.jsonl

GRPO in short. For each of P prompts:

    sample G completions from the policy
    score them: rewards r [G]
    advantages A = (r - mean of r) * scale      scale = 1: REINFORCE; 1 / deviation of r: GRPO
    loss = -mean over the completions of A * log-probability of the completion

and the optimizer takes a step along the gradient of the P losses' mean. `--norm` only chooses the
scale: none 1, std 1 / sigma, var 1 / sigma^2 (ascent on log-odds), batch 1 / (deviation of all).

Differences from GRPO as published (Shao et al. 2024, arXiv 2402.03300):

  - A completion's token terms are summed, not averaged: with `--norm none` the gradient is that of
    the expected reward, times (G-1)/G. `--agg mean` averages; `--agg token` is DAPO's (arXiv
    2503.14476); `--norm none` with the sum is Dr. GRPO (arXiv 2503.20783), up to a constant.
  - sigma is the population standard deviation (TRL, verl and OpenRLHF take the sample one), eps is
    1e-6, and a group of equal rewards has advantages of exactly 0.
  - No KL term unless `--kl` > 0; the importance ratio multiplies it, so its gradient is right.
  - One update per batch, at which the importance ratio is 1, unless `--epochs` > 1.
  - What is sampled is what is trained: no top-k, no top-p, one temperature for both.
  - Rewards come from a checker, not a model; AdamW has no weight decay.

Part one, the algorithm: `train`, its formulas, then sampling, gradient, evaluation. Read this.
Part two, the measurement: what Ge et al. (arXiv 2601.23135) explain the division with, for those
who want to know why: each prompt's gradient, how orthogonal they are, the curvature along them.
Part three, the plumbing: models, answers, data, files, processes, the command line. Skip it.

To copy, as they need only torch and their arguments: group_advantages (with advantage_scale),
token_weights, policy_loss, k3_divergence, sample_tokens, gradient_geometry (with pair_cosines),
progress, step_diagonal, directional_curvature (with square), count_sketch.
"""

import argparse
import difflib
import hashlib
import inspect
import json
import math
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, namedtuple
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

os.environ["SYMPY_GROUND_TYPES"] = "python"  # before torch imports sympy: gmpy2 can hang or abort

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, HfArgumentParser
from transformers.cache_utils import DynamicCache
from transformers.utils import logging as transformers_logging


class RunError(RuntimeError):
    """The run cannot go on: one-line error, exit status `status`, last checkpoint intact."""

    status = 1


class InputError(RunError):
    """What the user gave cannot be used: one line, exit status 2, no run begun or changed."""

    status = 2


@dataclass
class Config:
    """The user's settings; --help shows the comments. None: not set, `resolve` fills it in."""

    # Task and model:
    task: Literal["letters", "arith", "gsm8k", "math"] | None = None  # default: letters, or math
    model: str | None = None  # directory or hub name; default: embedded, or Qwen/Qwen2.5-Math-1.5B
    lora: int = 0  # rank of adapters on all linear layers (alpha twice that); 0: train all weights
    data: str | None = None  # JSONL file, or PATH[:NAME]:SPLIT of the hub; default: the task's
    eval_data: str | None = None  # held-out problems; default: the task's, or a part of --data
    instruction: str | None = None  # prompt text around {question}; default: the task's
    chat: bool = True  # whether to use the tokenizer's chat template, if it has one
    # Algorithm:
    norm: Literal["none", "std", "var", "batch"] = "std"  # divisor: 1, sigma, sigma^2, the batch's
    prompts: int = 16  # P, prompts per step
    group: int = 16  # G, completions per prompt
    max_new_tokens: int | None = None  # default: letters and arith 6, gsm8k 512, math 1024
    temperature: float = 1.0  # softmax temperature, the same for sampling and training
    agg: Literal["sequence", "mean", "token"] = "sequence"  # what the sum over tokens is divided by
    epochs: int = 1  # updates per batch; above 1 the importance ratio is clipped
    clip: float = 0.2  # range of the importance ratio around 1
    kl: float = 0.0  # weight of the KL term against the frozen start policy
    # Optimizer:
    steps: int = 250  # number of batches to sample; each gets --epochs updates
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd, of which the theory speaks, needs --lr
    lr: float | None = None  # default: letters 2e-4, arith 3e-4, else 1e-6; with --lora 10 times
    max_grad_norm: float = 10.0  # clip the gradient norm (it varies with --norm) to this; 0: never
    # Measuring:
    measure_every: int = 10  # steps between measurements of the prompts' gradients; 0: never
    curvature: bool | None = None  # also measure curvature and Fisher; default: up to 1M weights
    eval_every: int = 50  # steps between evaluations on held-out problems; 0: only at start and end
    eval_problems: int = 512  # number of held-out problems (at most a third if split off --data)
    # Run:
    seed: int = 0  # random seed for the order of prompts and for sampling
    micro_batch: int | None = None  # most tokens per training pass; default: 4096, or by vocabulary
    dtype: Literal["float32", "bfloat16"] | None = None  # of weights; default: bfloat16 on CUDA
    device: str | None = None  # torch device; default: cuda if there is one, else cpu
    save_every: int = 50  # steps between checkpoints
    out: str | None = None  # run directory; default: runs/TASK-NORM-SEED, or after --model, --data
    resume: bool = False  # continue the run in --out


# Defaults of a task; train, test: a JSONL file, or PATH[:NAME]:SPLIT of load_dataset.
Task = namedtuple("Task", "train test model reward max_new_tokens lr instruction")
QWEN = "Qwen/Qwen2.5-Math-1.5B"  # the paper's model
LAST = "{question}\nReason step by step, then give the answer as a number on the last line: #### N"
BOXED = "{question}\nReason step by step, and put the final answer within \\boxed{}."
HERE = f"{Path(__file__).resolve().parent}/assets"
LETTERS = f"{HERE}/letters/train.jsonl", f"{HERE}/letters/test.jsonl", f"{HERE}/letters/model"
ARITH = f"{HERE}/arith/train.jsonl", f"{HERE}/arith/test.jsonl", f"{HERE}/arith/model"
GSM8K = "openai/gsm8k:main:train", "openai/gsm8k:main:test", QWEN
MATH = "DigitalLearningGmbH/MATH-lighteval:default:train", "HuggingFaceH4/MATH-500:default:test"
TASKS = {
    "letters": Task(*LETTERS, "exact_match", 6, 2e-4, "{question}"),
    "arith": Task(*ARITH, "exact_match", 6, 3e-4, "{question}"),
    "gsm8k": Task(*GSM8K, "grade", 512, 1e-6, LAST),
    "math": Task(*MATH, QWEN, "grade", 1024, 1e-6, BOXED),
}


# ----------------------------------- Part one: the algorithm --------------------------------------

WARM_UP = 10  # steps in which the learning rate rises to its value
ORDER, TRAIN, EVALUATE = range(3)  # what a stream of random numbers is for


def train(config, dataset=None, reward=None, stop=()):
    """Train from the start policy to a saved model; everything is written to config.out. dataset:
    problems in place of the task's, with columns question and answer. reward(completion, answer) ->
    float, in place of the task's. stop: once it holds a signal number, the run ends between steps.
    Returns the last evaluation. Raises InputError, with nothing begun or changed, and RunError."""
    with start_run(config, dataset, reward) as run:
        config = run.config
        policy = run.policy
        optimizer = run.optimizer
        mine = share(config.prompts)  # which of the P prompts are this process's
        failed = 0  # steps in a row that were not finite
        silent = 0  # steps in a row in which every group's rewards were equal
        launched = None
        for step in range(run.step, config.steps):
            evaluation = None
            if step == 0 or (config.eval_every and step % config.eval_every == 0):
                evaluation = evaluate(policy, run.held_out, run.reward, config)
            began = time.perf_counter()
            launched = launched or began

            # Prompts, and random numbers for what may be sampled: the same for every norm.
            ids = prompt_ids(step, config, len(run.problems))  # [P], indices of problems
            problems = [run.problems[ids[p]] for p in mine]  # [P'], this process's
            prompts = [problem.prompt for problem in problems]
            uniforms = draw(config, TRAIN, step, mine, config.group)  # [P', G, T]

            # Rollout and rewards.
            batch = rollout(policy, prompts, uniforms, config.temperature)
            batch.rewards, _ = score(policy, batch, problems, run.reward)  # [P', G]
            rewards = everyone(batch.rewards)  # [P, G], of all processes
            lengths = everyone(batch.lengths)  # [P, G]
            rolled_out = time.perf_counter()
            if step == run.step:
                save_checkpoint(run, step)  # not before: a reward that fails leaves nothing behind

            # Advantages: here REINFORCE (none) and GRPO (std) differ, and nowhere else.
            advantages = group_advantages(rewards, config.norm)  # [P, G]
            weights = token_weights(lengths, config.agg)  # [P, G]
            batch.advantages = advantages[mine]  # [P', G]
            batch.weights = weights[mine]

            # Updates. A completion without advantage has no gradient, unless there is a KL term.
            active = (batch.advantages != 0) | bool(run.reference)  # [P', G]
            rows = active.flatten().nonzero()[:, 0].tolist()
            optimizer.param_groups[0]["lr"] = config.lr * min(1.0, (step + 1) / WARM_UP)
            grad_norms = []
            measured = None
            for epoch in range(config.epochs):
                gradient, logprobs = loss_gradient(policy, batch, rows, config, run.reference)
                grad_norms.append(set_gradient(policy, gradient, config.max_grad_norm))
                del gradient  # its memory is needed
                if epoch == 0:
                    batch.old_logprobs = logprobs  # what later epochs' importance ratios refer to
                if epoch == 0 and config.measure_every and step % config.measure_every == 0:
                    levels = [run.problems[i].level for i in ids]
                    measured = measure(policy, batch, levels, config, optimizer)
                # If the policy is NaN, all rewards may be 0, and the gradient 0, not NaN.
                if not everyone(batch.entropy.sum(dim=2)).isfinite().all():
                    grad_norms[-1] = math.nan
                if math.isfinite(grad_norms[-1]):
                    optimizer.step()
                    policy.publish()
                optimizer.zero_grad()

            # Log: each line describes the policy before this step's update.
            clock = launched, began, rolled_out
            log_step(run, step, ids, batch, active, grad_norms, clock, measured, evaluation)
            failed = 0 if math.isfinite(grad_norms[-1]) else failed + 1
            silent = 0 if advantages.any() else silent + 1
            report_trouble(failed, silent, step, rewards)
            save_or_stop(run, step + 1, stop, failed)

        evaluation = evaluate(policy, run.held_out, run.reward, config)
        return finish(run, evaluation)


def group_advantages(rewards, norm, eps=1e-6):
    """Advantages within each group, (r - group mean) * scale (arXiv 2402.03300, 4.1.2).
    rewards: [P, G], G completions for each of P prompts -> [P, G]. Calls advantage_scale."""
    rewards = rewards * 1.0  # integers and booleans have no mean
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred * advantage_scale(rewards, norm, eps)


def advantage_scale(rewards, norm, eps=1e-6):
    """What each prompt's centred rewards are multiplied by. rewards: [P, G] -> [P, 1].
    norm: "none" 1, "std" 1 / (sigma + eps), "var" 1 / (sigma^2 + eps), "batch" 1 / (deviation of
    all rewards + eps), with population standard deviations (correction=0). Under every norm it is 0
    for a group of equal rewards, where otherwise rounding error alone could be divided by eps."""
    rewards = rewards * 1.0  # integers and booleans have no deviation
    std = rewards.std(dim=1, correction=0, keepdim=True)  # [P, 1]
    divisor = {
        "none": torch.ones_like(std),
        "std": std + eps,
        "var": std**2 + eps,
        "batch": rewards.std(correction=0) + eps,
    }[norm]
    mixed = (rewards != rewards[:, :1]).any(dim=1, keepdim=True)
    return torch.where(mixed, 1 / divisor, 0.0)


def token_weights(lengths, agg):
    """Weight of each token's term in the batch's loss, the same however the batch is split.
    lengths: [P, G], in tokens. agg: "sequence" 1/(P*G) (the policy gradient of whole
    completions), "mean" 1/(P*G*length) (GRPO as published), "token" 1/(all tokens) (DAPO, arXiv
    2503.14476). Returns [P, G]."""
    count = lengths.numel()
    divisor = {"sequence": count, "mean": count * lengths, "token": lengths.sum()}[agg]
    return torch.ones_like(lengths, dtype=torch.float32) / divisor


def policy_loss(logprobs, old_logprobs, advantages, weights, clip):
    """Clipped policy-gradient loss, -sum of weights * min(ratio * A, clip(ratio) * A) (PPO, arXiv
    1707.06347, eq. 7). Log-probabilities are in nats. All tensors have, or broadcast to, one shape
    with an entry per token; padding has weight 0. Where old_logprobs = logprobs.detach(), the ratio
    is 1 and the gradient is REINFORCE's, -sum of weights * A * grad logprobs."""
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -(weights * torch.minimum(ratio * advantages, clipped * advantages)).sum()


def k3_divergence(logprobs, old_logprobs, reference_logprobs):
    """Per-token estimate, in nats, of KL(policy || reference): ratio * (exp(d) - d - 1) >= 0, with
    d = log reference - log policy. All shapes are equal. This is k3 (Schulman, "Approximating KL
    Divergence", 2020) times the ratio policy / old, neither detached nor clipped: without the ratio
    its gradient would be that of KL(reference || policy) (arXiv 2505.17508)."""
    difference = reference_logprobs - logprobs
    return (logprobs - old_logprobs).exp() * (torch.expm1(difference) - difference)


def prompt_ids(step, config, count):
    """This step's P of `count` problems, by index, in a seeded order that each pass draws anew."""
    slots = range(step * config.prompts, (step + 1) * config.prompts)
    order = {}
    for data_pass in range(slots[0] // count, slots[-1] // count + 1):
        stream = np.random.default_rng((config.seed, ORDER, data_pass))
        order[data_pass] = stream.permutation(count)
    return [int(order[slot // count][slot % count]) for slot in slots]


def draw(config, purpose, step, ids, group):
    """Uniforms [ids, group, T]; ids: places in the batch, or in evaluation problems' indices."""
    streams = [np.random.default_rng((config.seed, purpose, step, i)) for i in ids]
    shape = group, config.max_new_tokens
    return torch.from_numpy(np.stack([stream.random(shape, np.float32) for stream in streams]))


@dataclass
class Batch:
    """G completions for each of P prompts, on the CPU; 0 beyond a completion's length.
    Row p * G + g is completion g of prompt p."""

    prompts: list[list[int]]  # their tokens
    tokens: Tensor  # [P, G, T] sampled, the end token included
    lengths: Tensor  # [P, G]
    logprobs: Tensor  # [P, G, T] of the tokens, nats
    entropy: Tensor  # [P, G, T] of the distributions that they were drawn from, nats
    truncated: Tensor  # [P, G] bool: no end token within T
    rewards: Any = None  # [P, G]; filled in later, from here on
    advantages: Any = None  # [P, G]
    weights: Any = None  # [P, G] of each token's term in the loss
    old_logprobs: Any = None  # [P, G, T] at the batch's first update; None: this is it


def sample_tokens(logits, uniforms, temperature):
    """Draw one token per row from softmax(logits / temperature): no top-k, no top-p, no penalty.
    logits: [N, V]; uniforms: [N] in [0, 1), one per token (in float32: probabilities are exact up
    to 2^-24); temperature 0 takes the most likely token. Returns the tokens, their
    log-probabilities and the distributions' entropies, [N] each, in nats (at temperature 0, those
    of temperature 1)."""
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(dim=1)  # [N, V]
    probs = logprobs.exp()
    if temperature:
        cumulative = probs.cumsum(dim=1)
        # It ends at 1 only up to rounding: the uniforms are scaled to its end.
        target = uniforms[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True)[:, 0]
        tokens = tokens.clamp(max=logits.shape[1] - 1)  # NaN would be out of range
    else:
        tokens = logits.argmax(dim=1)
    entropy = torch.special.entr(probs).sum(dim=1)  # 0 where the probability is
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0], entropy


@torch.no_grad()
def rollout(policy, prompts, uniforms, temperature):
    """Sample G completions of at most T tokens for each of P prompts (token lists); temperature 0
    is greedy. uniforms: [P, G, T] in [0, 1). Rows that have ended leave the forward passes."""
    device = policy.model.device
    P, G, T = uniforms.shape
    uniforms = uniforms.view(P * G, T).to(device)
    end_tokens = torch.tensor(policy.eos_ids, device=device)
    rows = torch.arange(P * G, device=device)  # those that still run
    mask, cache, logits = encode_prompts(policy, prompts, rows // G)
    tokens = rows.new_zeros(P * G, T)
    lengths = rows.new_zeros(P * G)
    logprobs, entropy = torch.zeros(2, P * G, T, device=device)
    for t in range(T):
        drawn = sample_tokens(logits, uniforms[rows, t], temperature)
        tokens[rows, t], logprobs[rows, t], entropy[rows, t] = drawn
        lengths[rows] += 1
        running = (~torch.isin(tokens[rows, t], end_tokens)).nonzero()[:, 0]
        if len(running) < len(rows):
            rows = rows[running]
            mask = mask[running]
            cache.reorder_cache(running)
        if t + 1 == T or not len(rows):
            break
        mask = pad(mask, (0, 1), value=1)
        logits = extend(policy, tokens[rows, t, None], mask, cache).logits[:, -1]
    truncated = torch.isin(torch.arange(P * G, device=device), rows)
    per_row = [
        x.cpu().unflatten(0, (P, G)) for x in (tokens, lengths, logprobs, entropy, truncated)
    ]
    return Batch(prompts, *per_row)


def score(policy, batch, problems, reward):
    """Rewards [P, G] of the batch, and the texts [P * G] of its completions without special tokens.
    Raises RunError, naming the completion, for a reward that fails or is not finite."""
    G = batch.lengths.shape[1]
    lengths = batch.lengths.flatten().tolist()
    tokens = [row[:n] for row, n in zip(batch.tokens.flatten(0, 1).tolist(), lengths)]
    texts = policy.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    rewards = []
    for row, text in enumerate(texts):
        answer = problems[row // G].answer
        try:
            rewards.append(float(reward(text, answer)))
            if not math.isfinite(rewards[-1]):
                raise ValueError("not a finite number")
        except Exception as error:
            raise RunError(f"the reward failed: {error!r}, {text=}, {answer=}") from error
    return torch.tensor(rewards, dtype=torch.float64).view_as(batch.lengths), texts


def split_rows(batch, rows, limits):
    """Split rows of the batch into micro-batches of at most limits[0] tokens, counting padding and
    each completion's copy of its prompt, and at most limits[1] completion tokens; a lone completion
    may exceed both. Prompts with the longest completions come first, one prompt at a time."""
    G = batch.lengths.shape[1]
    lengths = batch.lengths.flatten().tolist()
    longest = batch.lengths.amax(dim=1).tolist()
    micro_batches: list[list[int]] = []
    width = length = 0  # that the prompts and completions of the last one are padded to
    for row in sorted(rows, key=lambda row: (-longest[row // G], row // G, -lengths[row])):
        prompt_length = len(batch.prompts[row // G])
        if micro_batches:
            width = max(width, prompt_length)
            length = max(length, lengths[row])
            n = len(micro_batches[-1]) + 1
        if not micro_batches or n * (width + length) > limits[0] or n * length > limits[1]:
            micro_batches.append([])
            width = prompt_length
            length = lengths[row]
        micro_batches[-1].append(row)
    return micro_batches


def completion_logprobs(policy, batch, rows, temperature, forward=None):
    """Log-probabilities [n, T] in nats of the rows' tokens; T is the longest row's length, and
    entries past a row's end are 0. forward: the model with other parameters, if needed. Each prompt
    is encoded once. Completions are padded on the right, where none of their tokens sees it."""
    G = batch.lengths.shape[1]
    device = policy.model.device
    lengths = batch.lengths.flatten()[rows]
    tokens = batch.tokens.flatten(0, 1)[rows, : lengths.max()].to(device)  # [n, T]
    own, copies = (torch.tensor(rows) // G).unique(return_inverse=True)
    prompts = [batch.prompts[p] for p in own]
    mask, cache, first_logits = encode_prompts(policy, prompts, copies, forward)
    logits = first_logits[:, None]
    if tokens.shape[1] > 1:  # the last one leads to no other
        mask = pad(mask, (0, tokens.shape[1] - 1), value=1)
        later = extend(policy, tokens[:, :-1], mask, cache, forward).logits
        logits = torch.cat([logits, later], dim=1)  # [n, T, V]
    logprobs = token_logprobs(logits.flatten(0, 1), tokens.flatten(), temperature).view_as(tokens)
    inside = torch.arange(tokens.shape[1]) < lengths[:, None]
    return torch.where(inside.to(device), logprobs, 0.0)


def token_logprobs(logits, tokens, temperature):
    """Log-probabilities of tokens [N] under softmax(logits [N, V] / temperature), in nats -> [N],
    float32 at least."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    scaled = logits.to(wide, copy=True).div_(temperature)
    return scaled.log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]


def loss_gradient(policy, batch, rows, config, reference=None):
    """The gradient of the loss of some rows of the batch, in float32: a list with a tensor for each
    trained parameter. reference: the forward of the KL term's policy, or None. Also returns the
    rows' present log-probabilities, [P, G, T] on the CPU, NaN for other rows."""
    gradient: list[Tensor] = []
    found = torch.full_like(batch.logprobs, math.nan)
    for micro_batch in split_rows(batch, rows, policy.limits):
        lengths = batch.lengths.flatten()[micro_batch]
        T = int(lengths.max())
        with policy.guard():
            logprobs = completion_logprobs(policy, batch, micro_batch, config.temperature)  # [n, T]
            old = logprobs.detach()
            found.view(-1, found.shape[2])[micro_batch, :T] = old.cpu().to(found)
            if batch.old_logprobs is not None:
                old = batch.old_logprobs.flatten(0, 1)[micro_batch, :T].to(logprobs)
            advantages = batch.advantages.reshape(-1, 1)[micro_batch].to(logprobs)  # [n, 1]
            inside = torch.arange(T) < lengths[:, None]
            weights = (batch.weights.reshape(-1, 1)[micro_batch] * inside).to(logprobs)  # [n, T]
            loss = policy_loss(logprobs, old, advantages, weights, config.clip)
            if reference:
                far = completion_logprobs(policy, batch, micro_batch, config.temperature, reference)
                loss = loss + config.kl * (weights * k3_divergence(logprobs, old, far)).sum()
            parameters = [*policy.trained.values()]
            new: list[Any] = [*torch.autograd.grad(loss, parameters, materialize_grads=True)]
        for i in range(len(new)):  # tensor by tensor, to free memory on the way
            # A copy: autograd may return views, or one tensor for two parameters.
            part = new[i].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            new[i] = None
            if i == len(gradient):
                gradient.append(torch.zeros_like(part))
            gradient[i] += part
    return gradient or [torch.zeros_like(x) for x in policy.masters.values()], found


def set_gradient(policy, gradient, max_norm):
    """Put the gradient, summed over processes, where the optimizer looks for it, scaled down to
    max_norm (0: never); returns its norm before that. Nothing calls backward(): the weights that
    are trained on may be bfloat16, and the optimizer steps their float32 masters."""
    for master, new in zip(policy.masters.values(), gradient):
        master.grad = new
        collective(dist.all_reduce, master.grad)
    grads = [master.grad for master in policy.masters.values()]
    norm = square(grads) ** 0.5
    if max_norm and norm > max_norm:
        for grad in grads:
            grad *= max_norm / norm
    return norm


@torch.no_grad()
def evaluate(policy, problems, reward, config):
    """Complete every problem twice, greedily and by sampling, with the same random numbers every
    time. Returns log columns, and samples for the first 4 (of the first process's share)."""
    mine = share(len(problems))
    most = config.group * len(share(config.prompts))
    columns: dict[str, float] = {}
    names = ("eval_greedy", "eval_greedy_reward"), ("eval_pass_rate", "eval_reward")
    for (rate, mean), temperature in zip(names, (0.0, config.temperature)):
        rewards = []
        texts = []
        for start in range(0, len(mine), most):
            ids = mine[start : start + most]
            chosen = [problems[i] for i in ids]
            uniforms = draw(config, EVALUATE, 0, ids, 1)
            batch = rollout(policy, [problem.prompt for problem in chosen], uniforms, temperature)
            more_rewards, more_texts = score(policy, batch, chosen, reward)
            rewards += more_rewards.flatten().tolist()
            texts += more_texts
        values = torch.tensor(gather(rewards), dtype=torch.float64)
        columns |= {rate: float(pass_rates(values[None])), mean: float(values.mean())}
    samples = [
        {"question": x.question, "completion": text, "answer": x.answer, "reward": value}
        for x, text, value in zip(problems[:4], texts, values.tolist())
    ]
    return columns, samples


# ---------------------------------- Part two: the measurement -------------------------------------

SMALL = 1_000_000  # up to so many weights, gradients are kept whole and curvature is in float64
SKETCH = 65_537  # size of the sketch kept of a larger gradient; a prime
ROUNDING = 5  # error of a sequence's log-probability, in units of eps * (its size + 1)


def measure(policy, batch, levels, config, optimizer):
    """Measure what the paper explains the division with: each prompt's gradient of its expected
    reward, how the gradients relate, what each norm's step would teach, and with config.curvature
    curvature and Fisher information. A group's halves are two looks at its prompt, with noises of
    their own. The update is not changed; of it only `.grad` is read, for length_taken. levels: [P],
    of all processes' prompts. Returns columns for the step's line in the log, and columns [P] for
    its prompts' lines."""
    G = config.group
    masters = [*policy.masters.values()]
    diagonal = None
    if config.agg != "mean" and not config.kl:  # with which a step is not what `progress` knows
        diagonal = step_diagonal(optimizer, masters)
    unknown = torch.full((1,), math.nan, device=policy.model.device)  # so what needs it is NaN
    root = torch.cat([d.flatten() for d in diagonal]).sqrt() if diagonal else unknown
    signs = sketch_signs(masters)
    precise = precise_parameters(policy) if config.curvature else None
    halves = []
    for group in torch.arange(batch.lengths.numel()).view(-1, G):
        first, second = (half.tolist() for half in group.tensor_split(2))
        halves.append(measure_half(policy, batch, first, second, signs, root, precise, config))
        halves.append(measure_half(policy, batch, second, first, signs, root, precise, config))
    halves = gather(halves)  # of all processes' prompts, in order: two a prompt
    vectors = torch.stack([half.pop("vector") for half in halves]).double()  # [2P, D]
    scaled = torch.stack([half.pop("scaled_vector") for half in halves]).double()
    line, columns = gradient_geometry(vectors[::2], vectors[1::2], G, levels)
    for name in halves[0]:
        values = [half[name] for half in halves]
        columns[name] = [*zip(values[::2], values[1::2])]
    if precise:
        curvature = torch.tensor([half["curvature"] for half in halves], dtype=torch.float64)
        line["curvature"] = curvature.nanmean()
    features = torch.stack(gather([*prompt_features(policy, batch.prompts)])).double()  # [P, D]
    centred = features - features.mean(dim=0)
    line["feature_cos"] = pair_cosines(features @ features.T).abs().mean()
    line["feature_cos_centered"] = pair_cosines(centred @ centred.T).abs().mean()
    lr = optimizer.param_groups[0]["lr"]
    lengths = everyone(batch.lengths)
    # `progress` is of steps divided by P*G; those of `--agg token` are by the tokens.
    rate = lr * lengths.numel() / float(lengths.sum()) if config.agg == "token" else lr
    rewards = everyone(batch.rewards)
    A, B = scaled[::2], scaled[1::2]
    for norm in ("none", "std", "var", "batch"):
        scale = advantage_scale(rewards, norm)[:, 0]
        values, length = progress(A @ A.T, A @ B.T, B @ B.T, G, scale)
        line[f"length_{norm}"] = rate * length
        if norm != "batch":  # whose scale depends on a prompt's own rewards: a bias
            columns[f"progress_{norm}"] = (rate * values).tolist()
    taken = [(d * x.grad.square()).sum() for d, x in zip(diagonal or [], masters)]
    line["length_taken"] = lr * sum(taken) ** 0.5 if taken else math.nan
    return line, columns


def measure_half(policy, batch, rows, others, signs, root, precise, config):
    """What is measured of one half of a group, by name. rows, others: this half and the other one.
    signs: for count_sketch, or None to keep the gradient whole. root: sqrt of the step's diagonal,
    see `progress`. precise: all parameters, by name, for curvature and Fisher information, or None.
    The gradient, of the prompt's expected reward, is the mean of leave-one-out advantage * grad log
    pi: the baseline is the whole group's, so that the halves' mean is the group's gradient."""
    G = batch.lengths.shape[1]
    group_rewards = batch.rewards[rows[0] // G]
    rewards = batch.rewards.flatten()[rows]
    half = {"reward_std_half": rewards.std(correction=0)}
    half["pass_rate_half"] = pass_rates(rewards[None])[0]
    advantages = (batch.rewards - batch.rewards.mean(dim=1, keepdim=True)) * G / (G - 1)
    weights = torch.full_like(batch.weights, 1 / len(rows))
    half_batch = replace(batch, advantages=advantages, weights=weights, old_logprobs=None)
    used = rows if group_rewards.max() > group_rewards.min() else []  # else rounding errors
    downhill, _ = loss_gradient(policy, half_batch, used, config)
    if signs is None:
        half["vector"] = -torch.cat([x.flatten() for x in downhill]).cpu()
        half["scaled_vector"] = half["vector"] * root.cpu()
    else:
        half["vector"] = -count_sketch(downhill, signs, SKETCH).cpu()
        half["scaled_vector"] = -count_sketch(downhill, signs * root, SKETCH).cpu()
    if precise:
        found = probe_curvature(policy, batch, rows, others, downhill, precise, config)
        half["curvature"], half["curvature_error"] = found
        # The paper's Fisher proxy (4.3): n |mean of grad log pi(y)|^2, no reward in it.
        unrewarded = replace(half_batch, advantages=torch.ones_like(advantages))
        fisher = square(loss_gradient(policy, unrewarded, rows, config)[0])
        half["fisher_half"] = len(rows) * fisher
    return half


def gradient_geometry(first, second, group, levels=None):
    """How P prompts' gradients relate to each other, as sampled and with sampling noise removed.
    first, second: [P, D] gradients from the two halves, (group + 1) // 2 and group // 2, of each
    prompt's completions: the half's mean of leave-one-out advantage * grad log pi, zero if all G
    rewards are equal. levels: [P] of any kind, or None. Returns values, and two columns [P]. As
    sampled, over pairs of nonzero gradients: the cosine's mean, deviation, and shares above 0 and
    below 0.1 in size. interference = |sum g|^2 / sum |g|^2: 1 if orthogonal, P if equal, below 1 in
    conflict. signal_share: the part of sum |g|^2 that is not noise. Noise-free, over all pairs x, y
    and, given levels, same-level and cross-level ones: cos_signal = mean xy / mean (xx + yy)/2, and
    cos_sq_signal = mean (xy)^2 / mean xx yy; over several steps, average each mean before dividing.
    NaN if there is no pair."""
    n, m = (group + 1) // 2, group // 2
    AA, AB, BB = first @ first.T, first @ second.T, second @ second.T  # [P, P]
    gram = (n * n * AA + n * m * (AB + AB.T) + m * m * BB) / group**2  # of (n A + m B) / group
    norms = gram.diagonal().sqrt()
    cosines = pair_cosines(gram)
    count = int((norms > 0).sum())
    total = gram.trace() if count > 1 else torch.tensor(torch.nan)

    # With baselines of their own, the halves' estimates A and B of g = E[r s], s = grad log pi(y),
    # would be independent: E<A, B> = |g|^2. But a leave-one-out advantage is r_i - the mean of the
    # G - 1 other rewards, the other half's among them. For i in A and j in B, E<A_i s_i, A_j s_j>
    # has, as E[s] = 0, only terms with both rewards: r_i r_j, each from its own advantage, and the
    # same times 1/(G-1)^2, each from the other's baseline. So E<A, B> = (1 + 1/(G-1)^2) |g|^2. In
    # a ratio of products of halves that cancels.
    halves = AB.diagonal()
    unbiased = halves / (1 + 1 / (group - 1) ** 2)
    values = {
        "cos_mean": cosines.mean(),  # NaN if there is no pair
        "cos_std": cosines.std(correction=0) if count > 1 else total,
        "cos_positive": (cosines > 0).double().mean(),
        "cos_small": (cosines.abs() < 0.1).double().mean(),
        "interference": gram.sum() / total,
        "signal_share": unbiased.sum() / total,
    }
    pairs = {"": ~torch.eye(len(gram), dtype=torch.bool)}
    if levels is not None:
        same_level = torch.tensor([[x == y for y in levels] for x in levels])
        pairs |= {"_within": pairs[""] & same_level, "_between": ~same_level}
    for name, chosen in pairs.items():
        squares = (unbiased[:, None] + unbiased) / 2
        products = halves[:, None] * halves
        values["cos_signal" + name] = gram[chosen].mean() / squares[chosen].mean()
        values["cos_sq_signal" + name] = (AA * BB)[chosen].mean() / products[chosen].mean()
    columns = {"prompt_grad_norm": norms, "grad_sq_signal": unbiased}
    return {"n_gradients": count} | {name: float(x) for name, x in values.items()}, columns


def pair_cosines(gram):
    """Cosines [pairs] of all pairs of vectors that are not zero. gram: [P, P] inner products."""
    nonzero = gram.diagonal() > 0
    norms = gram.diagonal()[nonzero].sqrt()
    cosines = gram[nonzero][:, nonzero] / (norms[:, None] * norms)
    return cosines[torch.ones_like(cosines).triu(1) > 0]


def progress(AA, AB, BB, group, scale):
    """What every prompt would learn from this batch, to first order: the change of a fresh prompt's
    expected reward by a step lr * D * mean over p of scale_p * (G-1)/G * g_p, divided by lr, where
    g_p is prompt p's leave-one-out gradient and D the optimizer's diagonal. AA, AB, BB: [P, P]
    inner products of the gradients sqrt(D) * g from the groups' halves, as in gradient_geometry.
    scale: [P], advantage_scale(...)[:, 0]. Returns the values [P, 2], one from each half of the
    prompt's own group, and the step's length in the metric D, divided by lr. A prompt's own part in
    the step is left out: the next prompt is another one, and then there is no bias."""
    n, m = (group + 1) // 2, group // 2
    first = (n * AA + m * AB) / group  # [P, P]: of half A of the one, all of the other
    second = (n * AB.T + m * BB) / group
    whole = (n * first + m * second) / group
    weights = scale * (group - 1) / group
    others = 1 - torch.eye(len(scale), dtype=scale.dtype)
    halves = torch.stack([(others * x) @ weights for x in (first, second)], dim=1)  # [P, 2]
    return halves / (len(scale) - 1), (weights @ whole @ weights).sqrt() / len(scale)


def step_diagonal(optimizer, parameters):
    """D, a list of tensors like the parameters: what the optimizer's next step multiplies each
    entry of a gradient by, apart from the learning rate, as known before that step. None for an
    optimizer that is not known, and for AdamW before its first step. For AdamW 1 / (sqrt(v) + eps),
    v free of its bias, and sqrt(v) at least a tenth of its root mean square in the tensor: where v
    is near 0, the step's own gradient would enter it first. Replace it for other optimizers."""
    if isinstance(optimizer, torch.optim.SGD):
        return [torch.ones_like(x) for x in parameters]
    if not isinstance(optimizer, torch.optim.AdamW):
        return None
    eps, betas = optimizer.param_groups[0]["eps"], optimizer.param_groups[0]["betas"]
    diagonal = []
    for state in (optimizer.state[x] for x in parameters):
        if "exp_avg_sq" not in state:
            return None
        v = state["exp_avg_sq"] / (1 - betas[1] ** state["step"])
        root = v.sqrt().clamp(min=0.1 * v.mean().sqrt())
        diagonal.append(torch.where(v.mean() > 0, 1 / (root + eps), 0.0))
    return diagonal


def count_sketch(tensors, signs, size):
    """Random projection [size] of the tensors, taken as one vector, that preserves inner products:
    entry i, times a random sign, is added to sum i modulo `size` (Charikar, Chen, Farach-Colton
    2002). signs: int8 [D], +1 or -1 equally likely, the same for all vectors to be compared. Two
    sketches' inner product is an unbiased estimate of the vectors', with deviation about
    |a| |b| / sqrt(size); with a prime size, even if large entries lie in columns of a matrix."""
    sums = torch.zeros(size, device=signs.device)
    start = 0
    for tensor in tensors:
        entries = tensor.flatten()
        end = start + len(entries)
        signed = entries * signs[start:end]
        before = start % size  # zeros that bring the first entry to its sum
        padded = torch.nn.functional.pad(signed, (before, -(before + len(entries)) % size))
        sums += padded.view(-1, size).sum(dim=0, dtype=torch.float32)
        start = end
    return sums


def sketch_signs(parameters):
    """Signs for count_sketch, the same in every step and process; None for a small model, whose
    gradients are kept whole."""
    count = sum(x.numel() for x in parameters)
    if count <= SMALL:
        return None
    device = parameters[0].device
    stream = torch.Generator(device).manual_seed(0)
    return torch.randint(2, (count,), generator=stream, device=device, dtype=torch.int8) * 2 - 1


def square(tensors):
    """|v|^2 of tensors taken as one vector -> float. In float64: torch's float32 norm of 10^8
    numbers is off by a percent on a CPU."""
    return sum(float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2 for x in tensors)


def prompt_features(policy, prompts):
    """Mean over each prompt's tokens of what the output layer reads -> [P, D]; NaN [P, 1] if the
    model does not give it. The paper compares prompts by it (4.1)."""
    ids, mask = pad_prompts(prompts, policy.model.device)
    with torch.no_grad():
        cache = DynamicCache(config=policy.model.config)
        output = extend(policy, ids, mask, cache, output_hidden_states=True)
    states = getattr(output, "hidden_states", None)
    if not states or states[-1].shape[:2] != ids.shape:  # one kind of model stacks several of each
        return torch.full((len(prompts), 1), math.nan)
    return ((states[-1].float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).cpu()


def precise_parameters(policy):
    """All parameters, by name, in a type in which a second difference does not drown in rounding:
    float64 for a small model, else float32."""
    parameters = dict(policy.model.named_parameters()) | policy.masters
    small = sum(x.numel() for x in parameters.values()) <= SMALL
    dtype = torch.float64 if small else torch.float32
    return {name: x.detach().to(dtype) for name, x in parameters.items()}


def probe_curvature(policy, batch, rows, others, direction, precise, config):
    """Curvature, and its error by rounding, of the prompt's expected reward along the gradient of a
    half (`rows`), from the other half's samples, whose own leave-one-out baseline keeps out nearly
    all of that gradient's noise. direction: that gradient, up or down. precise: all parameters, by
    name. NaN if the other half is a single sample, or if `rows` all earn the same: their gradient
    is then due to the others."""
    own = batch.rewards.flatten()[rows]
    n = len(others)
    if n < 2 or own.max() == own.min():
        return math.nan, math.nan
    micro_batches = split_rows(batch, others, policy.limits)
    in_order = [row for micro_batch in micro_batches for row in micro_batch]
    rewards = batch.rewards.flatten()[in_order]
    advantages = (rewards - rewards.mean()) * n / (n - 1)

    def sequence_logprobs(parameters):
        forward = with_parameters(policy.model, precise | parameters)
        sums = []
        for micro_batch in micro_batches:
            logprobs = completion_logprobs(policy, batch, micro_batch, config.temperature, forward)
            sums.append(logprobs.double().sum(dim=1).cpu())
        return torch.cat(sums)

    # The gradient is a mean of advantage * grad log pi: divided by the rewards' deviation, its norm
    # is about the slope of log pi along it.
    p = rows[0] // batch.lengths.shape[1]
    slope = square(direction) ** 0.5 / float(batch.rewards[p].std(correction=0))
    direction = dict(zip(policy.masters, direction))
    start = {name: precise[name] for name in policy.masters}
    return directional_curvature(sequence_logprobs, start, direction, advantages, slope)


def directional_curvature(sequence_logprobs, parameters, direction, advantages, slope):
    """Curvature v'Hv, in reward / parameter^2, along v = direction / |direction|, of the surrogate
    mean(A * pi_new(y) / pi(y)) over whole sequences y, using forward passes alone. At the sampling
    policy H is the sample Hessian of the expected reward; a token-level ratio would not give that.
    sequence_logprobs: maps parameters (a dict of tensors, float64 if memory allows, else float32)
    to the log-probabilities [n] of n sampled sequences, in nats. direction: a dict with the same
    names. advantages: [n]. slope: a guess at how fast the log-probabilities change along v. Returns
    the second difference and its absolute error by rounding (one standard deviation): NaN if no
    step changes the log-probabilities by about what is wanted, or if the error is over a tenth of
    what bounds any curvature's size, deviation(A) * |change per step|^2."""
    length = square(direction.values()) ** 0.5
    if not 0 < length < torch.inf:
        return torch.nan, torch.nan
    if not advantages.any():
        return 0.0, 0.0

    def logprobs_at(distance):
        scale = distance / length
        return sequence_logprobs({k: p + direction[k].to(p) * scale for k, p in parameters.items()})

    dtype = next(iter(parameters.values())).dtype
    with torch.no_grad():
        start = logprobs_at(0.0)
        rounding = ROUNDING * torch.finfo(dtype).eps * float(start.abs().mean() + 1)
        # That of the mean of ahead + behind, each with its own and twice that of the start.
        noise = rounding * (6 / len(advantages)) ** 0.5
        wanted = max((noise / 0.025) ** 0.5, 0.005 if dtype == torch.float64 else 0.03)
        wanted = min(wanted, 0.1)  # root mean square change, in nats
        distance = wanted / slope
        for _ in range(4):
            ahead = logprobs_at(distance) - start
            change = float(ahead.square().mean().sqrt())
            if wanted / 2 < change < wanted * 2:
                break
            distance *= min(max(wanted / max(change, 1e-30), 1e-3), 1e3)
        else:
            return torch.nan, torch.nan
        behind = logprobs_at(-distance) - start
    # expm1 keeps the digits that exp loses next to 1.
    curvature = float((advantages * (ahead.expm1() + behind.expm1())).mean()) / distance**2
    deviation = float(advantages.square().mean().sqrt())
    error = deviation * noise / distance**2
    if error > 0.1 * deviation * (change / distance) ** 2:
        return torch.nan, torch.nan
    return curvature, error


# ---------------------------------- Part three: the plumbing --------------------------------------


@contextmanager
def start_run(config, dataset, reward):
    """The run, see prepare_run, at its start or, with `resume`, where it was saved. What one
    process cannot use ends all of them. At the end torch has its threads back."""
    join_processes(config)
    threads = torch.get_num_threads()
    lock = None
    try:
        refused = []
        try:
            run = prepare_run(config, dataset, reward)
            lock = lock_directory(Path(run.config.out)) if is_first() else None
            run.step = load_checkpoint(run) if run.config.resume else 0
        except InputError as error:
            refused = [error]
        if refusals := gather(refused):
            raise refusals[0]
        if run.small and run.config.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # more gain nothing, and lose much beside another program
        yield run
    except (MemoryError, RuntimeError) as error:
        exhausted = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not exhausted and "can't allocate memory" not in str(error):  # as torch says on a CPU
            raise
        resume = "lower --micro-batch (and --resume, if there is a checkpoint)"
        advice = f"{resume}, or start anew with a smaller --group, or with --lora"
        raise RunError(f"out of memory: {advice}") from error
    finally:
        torch.set_num_threads(threads)
        if lock is not None:
            os.close(lock)


def prepare_run(config, dataset, reward):
    """All that a run works with: the settings, with everything filled in, policy, optimizer, the
    forward of the KL term's policy, problems, held-out ones, reward, and hashes of what a resumed
    run must have again. Writes nothing. Raises InputError."""
    config = resolve(config)
    reward = reward or REWARDS[TASKS[config.task].reward]
    training, held_out = load_problems(config, dataset, reward)
    out = Path(config.out)
    if not config.resume and ((out / CHECKPOINT).exists() or (out / LOGS[0]).exists()):
        raise InputError(f"{out} holds a run: add --resume to continue it, or --out OTHER_DIR")
    policy = load_policy(config)
    problems = encode_problems(training, policy, config)
    policy = check_model(policy, problems, config)
    count = sum(x.numel() for x in policy.model.parameters())
    small = count <= SMALL
    if config.curvature is None:
        config = replace(config, curvature=small)
    frozen = {}  # what is not in a checkpoint, so that a resumed run could have another
    reference = None
    if config.lora:
        frozen = {k: x for k, x in policy.model.named_parameters() if k not in policy.masters}
    if config.kl:  # copied before a checkpoint is loaded: it is the start policy
        frozen |= {name: x.detach().clone() for name, x in policy.trained.items()}
        reference = torch.no_grad()(with_parameters(policy.model, frozen))
    run = SimpleNamespace(config=config, policy=policy, reference=reference, small=small)
    run.problems = problems
    run.held_out = encode_problems(held_out, policy, config)
    run.reward = reward
    run.optimizer = make_optimizer([*policy.masters.values()], config)
    run.hashes = fingerprint(problems, frozen.values())
    trained = sum(master.numel() for master in policy.masters.values())
    if is_first():
        print(
            f"{config.task}: {len(problems):,} problems, "
            f"reward {getattr(reward, '__name__', reward)}, at most "
            f"{config.max_new_tokens} new tokens; norm {config.norm}, {config.optimizer} at "
            f"{config.lr:g}, {trained:,} parameters, {policy.model.dtype} on {config.device}"
        )
    if is_first() and config.curvature and config.measure_every and not small:
        print(f"curvature: measured steps take up to {8 * count / 1e9:.1f} GB more for copies")
    return run


# ----------------------------------------- The model ----------------------------------------------


@dataclass
class Policy:
    """A causal language model, its tokenizer, and the parameters that the optimizer steps."""

    model: Any
    tokenizer: Any
    eos_ids: list[int]  # any of them ends a completion
    trained: dict[str, Any]  # the model's parameters that are trained, by name
    masters: dict[str, Tensor]  # the same in float32, sharing memory with any that already are
    limits: tuple[int, int]  # max tokens and max completion tokens of a micro-batch
    cache_argument: str = "past_key_values"  # what the model's forward calls its cache
    guard: Callable = nullcontext  # context needed by a model that overwrites tensors in place

    def publish(self):
        """Copy the masters into the working parameters: rollout and training see one policy."""
        for name, parameter in self.trained.items():
            parameter.data.copy_(self.masters[name])


def load_policy(config):
    """The start policy. Raises InputError for a model that cannot be loaded or has no end token."""
    path = config.model or TASKS[config.task].model
    cuda = "cuda" in config.device
    safe = dict(trust_remote_code=False)  # no code from a model's directory is executed
    options = safe | dict(dtype=config.dtype)
    if not cuda:
        options["attn_implementation"] = "eager"  # which is faster on CPUs
    if Path(path, "adapter_config.json").exists():
        raise InputError(
            f"model {path} is adapters alone: merge them into their model, and save it"
        )
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, **options)
        tokenizer = AutoTokenizer.from_pretrained(path, **safe)
        vocabulary = len(model.get_output_embeddings().weight)
        # Newer versions of transformers call it `cache`.
        named_cache = "cache" in inspect.signature(model.forward).parameters
        generation = model.generation_config
        # Only its token ids are kept: some models' other settings cannot be saved.
        kept = {k: getattr(generation, f"{k}_token_id") for k in ("bos", "eos", "pad")}
        model.generation_config = GenerationConfig(**{f"{k}_token_id": v for k, v in kept.items()})
        with tempfile.TemporaryDirectory() as folder:  # fail now, not after the last step
            for part in (model.config, model.generation_config, tokenizer):
                part.save_pretrained(folder)
        if config.lora:  # arXiv 2106.09685; in float32, beside parameters of any type
            import peft

            adapters = dict(r=config.lora, lora_alpha=2 * config.lora, target_modules="all-linear")
            with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
                torch.manual_seed(0)  # the same start for every norm, seed and process
                model = peft.get_peft_model(model, peft.LoraConfig(**adapters))
    except Exception as error:  # OSError, ValueError, ImportError, SafetensorError, ...
        raise InputError(f"cannot load or save model {path}: {error} {OFFLINE}") from error
    model.to(config.device).eval()  # dropout would train another distribution than is sampled
    ends = kept["eos"]  # None, one id, or several
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    ends |= end_of_turn(tokenizer) if config.chat else set()
    if not ends:
        raise InputError(f"model {path} names no end-of-sequence token")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    masters = {name: p.detach().float() for name, p in trained.items()}
    # A micro-batch holds its logits and their gradient: on a GPU there is room for some gigabytes.
    most = (1 << (28 if cuda else 24)) // vocabulary
    limits = config.micro_batch or 4096, config.micro_batch or min(4096, most)
    cache_argument = "cache" if named_cache else "past_key_values"
    return Policy(model, tokenizer, sorted(ends), trained, masters, limits, cache_argument)


def make_optimizer(masters, config):
    """Plain SGD, or AdamW without weight decay, which would erode what the start policy knows."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(masters, lr=config.lr)
    return torch.optim.AdamW(masters, lr=config.lr, weight_decay=0.0, fused=True)


def end_of_turn(tokenizer):
    """The token that ends an assistant's turn, which is not the end token in every model: it is the
    special token that the chat template puts right after an answer. Returns a set, empty if there
    is no template, or if the template drops the answer or ends it in plain text."""
    dialog = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
    try:
        text = tokenizer.apply_chat_template(dialog, tokenize=False)
    except Exception:  # a template raises what it likes
        return set()
    tokens = tokenizer(text.partition("ANSWER")[2], add_special_tokens=False)["input_ids"]
    return {*tokens[:1]} & {*tokenizer.all_special_ids}


def with_parameters(model, parameters):
    """The model's forward with other parameters, by name; those not named stay as they are."""
    return lambda *args, **named: torch.func.functional_call(model, parameters, args, named)


def extend(policy, tokens, mask, cache, forward=None, **options):
    """The model's output for further tokens [n, t] of n rows, whose past is in the cache.
    mask: [n, past + t], 0 where a row is padded on the left, so before its position 0. forward: the
    model with other parameters, or None."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    options |= {policy.cache_argument: cache, "use_cache": True}
    forward = forward or policy.model
    return forward(tokens, attention_mask=mask, position_ids=positions, **options)


def pad_prompts(prompts, device):
    """Token lists, padded on the left -> tokens and mask [prompts, longest]."""
    tokens = [torch.tensor(prompt) for prompt in prompts]
    padded = pad_sequence(tokens, True, -1, padding_side="left").to(device)
    return padded.clamp(min=0), (padded >= 0).long()


def encode_prompts(policy, prompts, copies, forward=None):
    """Run each prompt (a token list) once, then repeat its cache and logits for each completion.
    copies: [n], the prompt that each completion continues. Returns the mask [n, width] and cache
    for `extend`, and the logits [n, V] of the first tokens."""
    ids, mask = pad_prompts(prompts, policy.model.device)
    copies = copies.to(ids.device)
    cache = DynamicCache(config=policy.model.config)
    # The last logits, by index: for a slice torch would copy the output layer, once per prompt.
    last = torch.tensor([-1], device=ids.device)
    logits = extend(policy, ids, mask, cache, forward, logits_to_keep=last).logits
    cache.reorder_cache(copies)
    return mask[copies], cache, logits[copies, -1]


def check_model(policy, problems, config):
    """The policy, with a guard if the model overwrites tensors that autograd needs, which keeps
    copies of them. Raises InputError if rollout or training of the shortest and the longest prompt
    together fails, or is not what each completion alone, in a plain pass without a cache, gives."""
    prompts = sorted((problem.prompt for problem in problems), key=len)
    model_type = policy.model.config.model_type
    refusal = f"model {config.model or config.task} ({model_type}) cannot be used"
    most = 1e-3 if policy.model.dtype == torch.float32 else 0.5  # of rounding, nats
    for T in (2, 8):  # some layers have a way of their own for a single token
        T = min(T, config.max_new_tokens)
        uniforms = torch.tensor([0.3, 0.7])[:, None].expand(2, 2, T).contiguous()
        endless = replace(policy, eos_ids=[-1])
        try:
            batch = rollout(endless, [prompts[0], prompts[-1]], uniforms, config.temperature)
            batch.advantages = batch.weights = torch.ones(2, 2)
            try:
                _, logprobs = loss_gradient(policy, batch, range(4), config)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                guard = torch.autograd.graph.allow_mutation_on_saved_tensors
                policy = replace(policy, guard=guard)
                _, logprobs = loss_gradient(policy, batch, range(4), config)
            plain = plain_logprobs(policy, batch, config.temperature)
        except (MemoryError, torch.OutOfMemoryError):
            raise  # start_run says what to do
        except Exception as error:  # whatever another kind of model raises
            reason = "no slot for its state" if isinstance(error, IndexError) else error
            raise InputError(f"{refusal}: with a DynamicCache it fails: {reason}") from error
        for name, found in (("rollout", batch.logprobs), ("training", logprobs)):
            apart = float((found - plain).abs().max())
            if not apart <= most:  # nor NaN
                raise InputError(f"{refusal}: {name} and a plain pass differ by {apart:.2g} nats")
    return policy


@torch.no_grad()
def plain_logprobs(policy, batch, temperature):
    """[P, G, T] of completions that all have T tokens: each alone, without padding or a cache."""
    T = batch.tokens.shape[2]
    found = []
    for row, tokens in enumerate(batch.tokens.flatten(0, 1).to(policy.model.device)):
        prompt = torch.tensor(batch.prompts[row // batch.tokens.shape[1]], device=tokens.device)
        sequence = torch.cat([prompt, tokens])[None]
        logits = policy.model(sequence, use_cache=False, logits_to_keep=T + 1).logits[0, :-1]
        found.append(token_logprobs(logits, tokens, temperature))
    return torch.stack(found).cpu().view_as(batch.logprobs)


# ------------------------------ Answers: rewards that check them ----------------------------------

MAX_SPAN = 300  # characters; anything longer is not taken for an answer, and is slow to parse
DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
DIGITS += r"(?:[eE][-+]?[0-9]{1,2}(?![0-9]))?"
NUMBER = rf"[-+]? *(?:[0-9]+/0*[1-9][0-9]*|{DIGITS})"
# The last number of a text, with its exponent: "1-3" ends in 3, not in -3.
UNMARKED = rf"(?:(?<![0-9])-\\?[$€£]?)?{DIGITS}(?:/{DIGITS})?(?:[_^²³₀-₉]\S*)?"
BRACED = r"(?:\\.|[^\\{}])*"  # what a pair of braces holds, with up to 8 pairs in each other
for _ in range(8):
    BRACED = rf"(?:\\.|[^\\{{}}]|\{{{BRACED}\}})*"
MARKED = re.compile(rf"####\s*(.*)|\\(?:boxed|fbox)\s*(?:\{{({BRACED})\}}|([^\s${{]*[^\s${{.,]))")
# What stands before an answer, "x =", "The answer is", "x \in"; but not in "x = 2 or x = 3".
EQUATION = r"^(?:(?! or | and |,(?![0-9]{3}))[^;<>])*(?:=|\\in(?![a-z])|\\approx|≈|\bis\b|[a-z]:)"
# Currency, percent, and words after a space; but not those of "5 x", "2 pi" and "5 over six".
UNIT = r"(?!(?:pi|sqrt|squared|[b-fi-kn-rt-z]|[a-cxyz]{2,3}|(?:times|over|plus|minus|and|to) .*)\b)"
UNIT = rf"\\\$|\\?[€£%°]|(?<=\s)(?<!\( ){UNIT}[A-Za-z][A-Za-z/. ]*(?:(?<=[a-z])\^\{{?[23]\}}?)?"
SYMBOLS = str.maketrans({"²": "^2", "³": "^3", "×": "*", "·": "*", "π": r"\pi ", "∪": r"\cup "})
# Binary +, subscripts, parenthesised factors, functions, ranges, products (but 2*x is 2x), second
# numbers, and every other sign.
OPERATOR = r"(?<=[\w)\]}|]) *(\+)|_\{?(\w+)|(?<=[\w)}]) *(\()|(\)) *(?=\w)|(\\[a-zA-Z]+)\(?|\.\."
OPERATOR += r"|\*(?! *[a-zA-Z\\])|(?<!\{),|\d( +)(?=\d)|\b(and|or)\b|[^\w\s.,+*(){}\[\]]"
# Valid LaTeX on which the parser never finishes or never frees its memory; no answer contains it.
BOMB = r"(?<!\\)!|[0-9.]{50}|(?:[({\[][^(){}\[\]]*){20}|\^\s*[{(]?[-\s]*[0-9.]{5}"
BOMB += r"|\^(?:[^a-zA-Z^+)}\]]*|[^a-zA-Z^+]*[)}\]]\s*)\^"


def marked_answer(text):
    r"""The last answer marked by \boxed{...} or ####; None without a mark, "" where the last one is
    not closed."""
    marks = [*re.finditer(r"####|\\boxed|\\fbox", text)]
    if not marks:
        return None
    found = MARKED.match(text[marks[-1].start() :][:MAX_SPAN])
    return found[found.lastindex or 0].strip() if found else ""


def parse_answer(text):
    """Value of an answer that is a number, else None; its unit, singular; its operators' count."""
    text = re.sub(r"\\(?:left|right|q?quad)\b|\\[,;:!] ?|(?<!\\)(?:[$`]|\\(?=[ ()]))", "", text)
    text = re.sub(r"\*\*|\^\{?\\circ\}?", " ", text).translate(SYMBOLS)
    text = re.sub(r"\\(?:text|mbox|math)[a-z]*\s*\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"(.*)\\pm(.*)", r"\1+\2,\1-\2", text)
    text = re.sub(r"\\times|\\cdot", "*", text).strip().rstrip(" .*\\")
    text = re.sub(r"(?<![0-9 ])\\[dtc]?frac *\{([0-9]+)\} *\{([0-9]+)\}", r"\1/\2", text)
    text = re.sub(r"\\[dtc]?frac", "/", text)
    text = re.sub(rf"({DIGITS}) *\* *10\^\{{?(-?[0-9]{{1,2}})\}}?", r"\1E\2", text)
    words = " ".join(re.findall(UNIT, text)).lower().replace("$", "dollar").replace("%", "percent")
    unit = {word.rstrip("es") for word in re.findall(r"[a-z]+|[23€£]", words)}
    text = re.sub(UNIT, "", text).strip()
    if re.fullmatch(NUMBER, text):
        return Fraction(re.sub("[ ,]", "", text)), unit, Counter()
    found = re.finditer(OPERATOR, text.replace("-", "+"))
    return None, unit, Counter(match[match.lastindex or 0] for match in found)


def grade(completion, answer):
    r"""1.0 if the completion's answer equals the gold answer, else 0.0; never raises an exception.
    The completion's answer is the last one marked by \boxed{} or ####, or if there is no mark, its
    last number; there, "3/4" is a fraction, "1.5e3" is 1500, and a minus counts if it touches the
    number. Numbers are compared by value, all else by math-verify, if it has no operator that the
    gold answer lacks; for a second each, parsing and comparing, but in a thread without limit."""
    completion, answer = (text.replace("−", "-").strip() for text in (completion, answer))
    given = marked_answer(completion)
    if given is None:
        given = ([""] + re.findall(UNMARKED, completion[-1000:]))[-1]
    if not given or len(given) > MAX_SPAN or len(answer) > MAX_SPAN:
        return 0.0
    if "=" not in answer:
        answer = re.sub(EQUATION, "", answer)
        given = re.sub(EQUATION, "", given)
    gold, gold_unit, allowed = parse_answer(answer)
    found, unit, used = parse_answer(given)
    if unit and gold_unit and unit != gold_unit:
        return 0.0
    if gold is not None and found is not None:
        return float(gold == found)
    if gold is not None:
        allowed = Counter(["/", r"\sqrt", r"\pi"])
    if given == answer or used - allowed or any(re.search(BOMB, text) for text in (answer, given)):
        return float(given == answer)
    import math_verify  # a second to import: only where LaTeX is compared

    limit = 1 if threading.current_thread() is threading.main_thread() else None
    latex = [math_verify.LatexExtractionConfig()]  # by default it takes "5 is odd" for 5
    try:
        texts = (f"${answer if gold is None else gold}$", f"${given if found is None else found}$")
        gold, found = (math_verify.parse(text, latex, parsing_timeout=limit) for text in texts)
        return float(math_verify.verify(gold, found, float_rounding=30, timeout_seconds=limit))
    except Exception:  # sympy raises whatever it likes on text that is not mathematics
        return 0.0


def exact_match(completion, answer):
    """1.0 if the completion is the answer, character by character, else 0.0."""
    return float(completion == answer)


REWARDS = {"exact_match": exact_match, "grade": grade}

# ---------------------------------------- Data: problems ------------------------------------------

Problem = namedtuple("Problem", "question answer level prompt")  # prompt: in the model's tokens
COLUMNS = ("question", "problem", "prompt"), ("answer", "final_answer", "solution")
OFFLINE = "(without a network, or away from its assets: --model DIR --data FILE.jsonl)"


def read_rows(source, raw=None):
    """Rows of a JSONL file (decimals as their text), of a hub data set PATH[:NAME]:SPLIT, or of
    `raw`, a Dataset or a list of dicts, by where they stand. Raises InputError."""
    place = f"cannot load {source}, a file or PATH[:NAME]:SPLIT"
    is_file = raw is None and (Path(source).is_file() or ":" not in source)
    rows = {}
    try:
        if is_file:
            raw = Path(source).read_bytes().splitlines()
        elif raw is None:
            from datasets import load_dataset

            place = f"cannot load {source} {OFFLINE}"
            path, *name, split = source.split(":")
            raw = load_dataset(path, *name, split=split)
        for number, row in enumerate(raw, 1):
            place = f"{source}, {'line' if is_file else 'row'} {number}"
            if is_file:
                if not row.strip():
                    continue
                row = json.loads(row.decode("utf-8-sig"), parse_float=str, parse_constant=str)
                json.dumps(row, ensure_ascii=False).encode()  # half a surrogate has no tokens
            if not isinstance(row, dict):
                raise TypeError("not an object with named columns")
            rows[place] = row
    except Exception as error:  # what datasets raises has no common class
        raise InputError(f"{place}: {error}".replace(": line 1 ", ": ")) from error
    return rows


def load_rows(source, graded, raw=None):
    """Question, final answer and level (None if missing) of every row that read_rows finds. Raises
    InputError if there is none, or if one lacks a question or an answer to grade."""
    rows = read_rows(source, raw)
    present = dict.fromkeys(name for row in rows.values() for name in row)
    found = [next((name for name in names if name in present), "") for names in COLUMNS]
    if not all(found):
        raise InputError(f"cannot load {source}: no row with one each of {COLUMNS}: {[*present]}")
    question, answer = found
    problems = []
    for place, row in rows.items():
        asked = row.get(question)
        if not isinstance(asked, str) or not asked.strip():
            raise InputError(f"{place}: no {question}")
        text = "" if row.get(answer) is None else str(row[answer]).strip()
        final = marked_answer(text) or ("" if answer == "solution" else text)
        if not final:
            raise InputError(f"{place}: no {answer} (marked by \\boxed or ####): {text[-60:]!r}")
        if graded and (
            final in ("True", "False")
            or re.search(BOMB, final)
            or not grade(f"\\boxed{{{final}}}", final)
        ):
            raise InputError(f"{place}: no completion could equal the {answer} {final[-60:]!r}")
        level = json.loads(json.dumps(row.get("level"), default=str))  # what logs can hold
        problems.append((asked, final, level))
    return problems


def load_problems(config, dataset, reward):
    """Training and held-out rows (see load_rows) of dataset, files or task; if they are split here,
    rows with the same question stay together. Raises InputError."""
    task = TASKS[config.task]
    graded = reward is grade
    source = "dataset" if dataset is not None else config.data
    train = load_rows(source or task.train, graded, dataset)
    if test := config.eval_data or ("" if source else task.test):
        return train, load_rows(test, graded)[: config.eval_problems]
    questions = [*dict.fromkeys(question for question, *_ in train)]
    if len(questions) < 3:
        raise InputError(f"{len(questions)} problems are too few to hold any out: pass --eval-data")
    order = np.random.default_rng(0).permutation(len(questions))
    place = {questions[number]: position for position, number in enumerate(order)}
    train.sort(key=lambda row: place[row[0]])
    count = min(config.eval_problems, len(questions) // 3)
    held_out = [row for row in train if place[row[0]] < count]
    return train[len(held_out) :], held_out[: config.eval_problems]


def encode_problems(rows, policy, config):
    """Problems with their prompts, without an end token that the tokenizer appends. Raises
    InputError for a prompt over the model's context, or a chat template that fails."""
    tokenizer = policy.tokenizer
    texts = [config.instruction.replace("{question}", question) for question, *_ in rows]
    chat = config.chat and getattr(tokenizer, "chat_template", None)
    if chat:
        dialogs = [[{"role": "user", "content": text}] for text in texts]
        options = dict(tokenize=False, add_generation_prompt=True)
        try:
            texts = tokenizer.apply_chat_template(dialogs, **options)
        except Exception as error:  # a template may raise whatever it likes
            raise InputError(f"the chat template fails ({error}): pass --chat false") from error
    prompts = tokenizer(texts, add_special_tokens=not chat)["input_ids"]
    context = getattr(policy.model.config, "max_position_embeddings", None) or sys.maxsize
    for text, prompt in zip(texts, prompts):
        while not chat and prompt and prompt[-1] in policy.eos_ids:
            prompt.pop()
        if len(prompt) + config.max_new_tokens > context:
            total = f"{len(prompt)} + {config.max_new_tokens} tokens, over the context of {context}"
            raise InputError(f"{total}: lower --max-new-tokens, or leave out {text[:40]!r}")
    return [Problem(*row, prompt) for row, prompt in zip(rows, prompts)]  # type: ignore[call-arg]


# --------------------------------------- Files of a run -------------------------------------------

CHECKPOINT = "checkpoint/state.safetensors"
LOGS = "metrics.jsonl", "prompts.jsonl", "samples.jsonl"
MAY_CHANGE = {"steps", "eval_every", "save_every", "micro_batch", "device", "out", "resume"}
MAY_CHANGE |= {"measure_every", "curvature"}


def pass_rates(rewards):
    """Share of rewards equal to 1 in each row, [P, G] -> [P]; NaN (in the log: null) where one lies
    outside [0, 1]."""
    inside = (rewards.clamp(0, 1) == rewards).all(dim=1)
    return torch.where(inside, (rewards == 1).double().mean(dim=1), math.nan)


def log_step(run, step, ids, batch, active, grad_norms, clock, measured, evaluation):
    """Write the step's lines, and say how far the run is. active: [P, G], which completions were
    trained on. clock: when the run's first step, this one, and its update began. measured,
    evaluation: what `measure` and `evaluate` returned, or None."""
    config = run.config
    launched, began, rolled_out = clock
    now = time.perf_counter()
    seconds_left = (now - launched) / (step + 1 - run.step) * (config.steps - step - 1)
    rewards = everyone(batch.rewards)  # [P, G]
    lengths = everyone(batch.lengths)
    rates = pass_rates(rewards)  # [P]
    reward_std = rewards.std(dim=1, correction=0)  # [P]
    inside = torch.arange(batch.tokens.shape[2]) < batch.lengths[..., None]  # [P', G, T]
    gaps = (batch.old_logprobs - batch.logprobs).abs()[inside & active[..., None]]
    line = {
        "step": step,
        "reward": rewards.mean(),
        "pass_rate": rates.mean(),
        "reward_std": reward_std.mean(),
        "frac_all_right": (rates == 1).double().mean(),
        "frac_all_wrong": (rewards == 0).all(dim=1).double().mean(),
        "entropy": everyone(batch.entropy.sum(dim=2)).sum() / lengths.sum(),
        "length": lengths.mean(),
        "truncated": everyone(batch.truncated).mean(),
        "grad_norm": np.mean(grad_norms),
        "clipped": any(norm > (config.max_grad_norm or math.inf) for norm in grad_norms),
        "skipped": sum(not math.isfinite(norm) for norm in grad_norms),
        "logprob_gap": everyone(torch.cat([gaps, gaps.new_tensor([-math.inf])]).amax()[None]).max(),
        "lr": run.optimizer.param_groups[0]["lr"],
        "seconds_rollout": rolled_out - began,
        "seconds_update": now - rolled_out,
        "tokens_per_second": lengths.sum() / (now - began),
    }
    levels = [run.problems[i].level for i in ids]
    columns = {"step": [step] * len(ids), "prompt": ids, "level": levels, "pass_rate": rates}
    columns |= {"reward_std": reward_std, "scale": advantage_scale(rewards, config.norm)[:, 0]}
    if measured:
        line |= measured[0]
        columns |= measured[1]
    held_out = ""
    if evaluation:
        line |= evaluation[0]
        held_out = f"  held out {evaluation[0]['eval_reward']:.3f}"
        append(run, LOGS[2], [{"step": step} | sample for sample in evaluation[1]])
    append(run, LOGS[0], [line])
    append(run, LOGS[1], [dict(zip(columns, values)) for values in zip(*columns.values())])
    if is_first() and (evaluation or step % 10 == 0 or now - began > 1):
        print(
            f"step {step:>5}/{config.steps}  reward {line['reward']:.3f}  "
            f"σ {line['reward_std']:.3f}  cut off {line['truncated']:.0%}  "
            f"{seconds_left / 60:.1f} min left{held_out}",
            flush=True,
        )


def finish(run, evaluation):
    """Write the last evaluation and the trained model, and say what is next; returns the
    evaluation's columns."""
    columns, samples = evaluation
    folder = Path(run.config.out) / "model"
    if run.step == run.config.steps:  # no step was taken, so none has saved this
        save_checkpoint(run, run.step)
    append(run, LOGS[2], [{"step": run.config.steps} | sample for sample in samples])
    append(run, LOGS[0], [{"step": run.config.steps} | columns])
    if is_first():
        model = run.policy.model.merge_and_unload() if run.config.lora else run.policy.model
        model.save_pretrained(folder)
        run.policy.tokenizer.save_pretrained(folder)
        log = (folder.parent / LOGS[0]).read_text(encoding="utf-8")
        first = json.loads(log.splitlines()[0])
        print(
            f"held out {first['eval_reward']:.3f} → {columns['eval_reward']:.3f}, greedy "
            f"{first['eval_greedy_reward']:.3f} → {columns['eval_greedy_reward']:.3f}; "
            f"all in {run.config.out}\nnext: run with another --norm (and --out, if given), "
            "then analyze.py with both directories"
        )
    if dist.is_initialized():
        dist.destroy_process_group()
    return columns


def append(run, name, lines):
    """Add JSON lines to a log; a number that is not finite, which JSON lacks, becomes null."""
    text = json.dumps(lines, default=Tensor.tolist)
    lines = json.loads(text, parse_constant=lambda name: None)
    if is_first():
        with (Path(run.config.out) / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def report_trouble(failed, silent, step, rewards):
    """Say so when nothing can be learnt. failed, silent: how many steps in a row had no finite
    gradient, and only groups of equal rewards. Raises RunError for the fifth that fails."""
    if failed == 5:
        raise RunError(f"no finite gradient in 5 steps in a row, up to {step}")
    if silent == 20 and is_first():
        cause = "too hard, or answers not in the form that the reward looks for"
        if rewards.min() >= 1:
            cause = "too easy"
        mean = float(rewards.mean())
        print(
            f"nothing can be learnt yet: 20 steps of equal rewards, mean {mean:.3g}; "
            f"the problems may be {cause} (see samples.jsonl)"
        )


def save_or_stop(run, step, stop, failed):
    """Save a checkpoint if one is due before this step, or if the run is to stop there: then also
    raises RunError, as it does if the run's last steps have failed. While steps fail nothing is
    saved: what broke the policy may be in the weights."""
    config = run.config
    # All processes have taken the same steps, so all stop here if one of them is told to.
    signal_number = max(gather(list(stop)), default=0)
    due = signal_number or step == config.steps or step % config.save_every == 0
    if due and not failed:
        save_checkpoint(run, step)
    if signal_number:
        stopped = RunError(f"{signal.Signals(signal_number).name}: add --resume to continue")
        stopped.status = 128 + signal_number
        raise stopped
    if step == config.steps and failed:
        raise RunError(f"no finite gradient in the last {failed} steps: they are not saved")


def save_checkpoint(run, step):
    """One safetensors file with masters, optimizer state and the logs' sizes, by the first process;
    replaces the previous one atomically."""
    if not is_first():
        return
    out = Path(run.config.out)
    path = out / CHECKPOINT
    tensors = {}
    for name, master in run.policy.masters.items():
        tensors[f"weights.{name}"] = master.detach()
        for key, value in run.optimizer.state[master].items():
            if value is not None:
                tensors[f"{key}.{name}"] = value
    temporary = path.with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    logs = [out / name for name in LOGS if (out / name).exists()]
    sizes = {log.name: log.stat().st_size for log in logs}
    settings = asdict(run.config)
    state = {"step": step, "logs": sizes, "config": settings, "hashes": run.hashes}
    try:
        save_file(tensors, temporary, metadata={"state": json.dumps(state)})
        for written in (temporary, *logs):  # all on the disk before the previous one is gone
            with written.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
        temporary.write_text(json.dumps(settings, indent=2) + "\n")
        temporary.replace(out / "config.json")
    finally:  # on a full disk the previous one stays
        temporary.unlink(missing_ok=True)


def load_checkpoint(run):
    """Restore weights, optimizer and logs as they were; returns the next step. Raises InputError,
    changing nothing on disk, for a damaged file, other settings, problems or model, or missing log
    lines."""
    out = Path(run.config.out)
    path = out / CHECKPOINT
    state = saved_state(out)
    try:
        with safe_open(path, "pt", device=run.config.device) as file:
            now = {k: v for k, v in asdict(run.config).items() if k not in MAY_CHANGE}
            then = state["config"]
            differ = {k: (then[k], v) for k, v in now.items() if then.get(k, v) != v}
            if differ:
                raise ValueError(f"other settings, saved and given: {differ}")
            for name, value in state.get("hashes", {}).items():
                if value != run.hashes[name]:
                    raise ValueError(f"other {name} than it was saved with")
            if state["step"] > run.config.steps:
                raise ValueError(f"{state['step']} steps are done, over --steps {run.config.steps}")
            for name, size in state["logs"].items():
                if (out / name).stat().st_size < size:
                    raise ValueError(f"{name} is shorter than it was then")
            kinds = {name.split(".")[0] for name in file.keys()} - {"weights"}  # noqa: SIM118
            for name, master in run.policy.masters.items():
                master.data.copy_(file.get_tensor(f"weights.{name}").view_as(master))
                run.optimizer.state[master] = {k: file.get_tensor(f"{k}.{name}") for k in kinds}
    except Exception as error:  # whatever a damaged file makes safetensors and torch raise
        raise InputError(f"cannot resume from {path}: {error}") from error
    run.policy.publish()
    for log in (out / name for name in LOGS):
        if is_first() and log.exists():
            os.truncate(log, state["logs"].get(log.name, 0))
    return state["step"]


def saved_state(out):
    """What is saved of a run beside tensors: its step, settings and hashes, the sizes of its logs.
    Raises InputError."""
    path = Path(out) / CHECKPOINT
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["state"])
    except Exception as error:  # whatever a damaged file makes safetensors raise
        raise InputError(f"cannot resume from {path}: {error}") from error


def fingerprint(problems, tensors):
    """What tells these problems, and tensors by the first thousand numbers of each, from others."""
    texts = json.dumps([[x.question, x.answer, x.prompt] for x in problems])
    numbers = [x.detach().flatten()[:1000].float().cpu().numpy().tobytes() for x in tensors]
    hashes = [hashlib.sha256(part).hexdigest() for part in (texts.encode(), b"".join(numbers))]
    return dict(zip(("problems", "start model"), hashes))


def lock_directory(out):
    """Make the directory, and keep other runs out of it until the descriptor that is returned is
    closed; None where the system has no such locks. Raises InputError if another run is in it."""
    try:
        import fcntl
    except ImportError:  # Windows
        fcntl = None  # type: ignore[assignment]
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY) if fcntl else None
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error}") from error
    if descriptor is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(f"{out} is in use by another run") from error
    return descriptor


# ----------------------------------------- Processes ----------------------------------------------


def join_processes(config):
    """Join the processes that torchrun started, if it did. Raises InputError."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > max(1, config.prompts):
        raise InputError(f"{config.prompts} prompts a step are too few for {world_size} processes")
    if world_size > 1:
        cuda = config.device != "cpu" and torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")


def share(count):
    """Which of `count` things are this process's, as a range."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return range(rank * count // world_size, (rank + 1) * count // world_size)


def is_first():
    """Whether this is the process that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def collective(operation, *arguments):
    """Run an operation that all processes take part in, or nothing if there is only one process.
    Raises RunError if another process has stopped."""
    try:
        if dist.is_initialized():
            operation(*arguments)
    except RuntimeError as error:
        raise RunError(f"another process has stopped: {error}") from error


def gather(values):
    """The lists of all processes, one after the other."""
    lists = [values] * (dist.get_world_size() if dist.is_initialized() else 1)
    collective(dist.all_gather_object, lists, values)
    return [value for each in lists for value in each]


def everyone(values):
    """A tensor's rows [n, ...] of all processes, in float64."""
    return torch.cat(gather([values])).double()


# --------------------------------------- The command line -----------------------------------------


def resolve(config):
    """The settings with everything filled in that was not given, and checked; of resolved ones,
    the same. Raises InputError for a value that cannot be used."""
    least = {"group": 2, "temperature": 1e-3}
    least |= dict.fromkeys(("prompts", "epochs", "save_every", "eval_problems"), 1)
    least |= dict.fromkeys(("max_new_tokens", "micro_batch"), 1)
    for entry in fields(Config):
        value = getattr(config, entry.name)
        kinds = [get_args(kind) or (kind,) for kind in get_args(entry.type)]  # of X | None, Literal
        allowed = [x for kind in kinds for x in kind if isinstance(x, str)]
        if allowed and value not in (*allowed, entry.default):
            raise InputError(f"{entry.name} is {value!r}, not one of {', '.join(allowed)}")
        low = least.get(entry.name, 0)
        if isinstance(value, (int, float)) and not low <= value < math.inf:
            raise InputError(f"{entry.name} is {value}, not a finite number from {low} on")
    if config.optimizer == "sgd" and config.lr is None:
        raise InputError("sgd has no default rate: add --lr, from 0.01 to 0.5 on letters")
    device = config.device
    if device in (None, "cuda"):  # each process of a machine takes the GPU of its number
        cuda = device == "cuda" or torch.cuda.is_available()
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
    try:
        torch.empty(0, dtype=torch.float64, device=device)  # which the measurements need
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"device {device} cannot be used: {error}") from error
    own = config.model or config.data
    name = config.task or ("math" if own else "letters")
    task = TASKS[name]
    titles = [config.model or "", config.data or name]  # named after what is one's own
    titles = [Path(x.removesuffix(".jsonl")).name.replace(":", "-") for x in titles if x]
    out = config.out or f"runs/{'-'.join(titles)}-{config.norm}-{config.seed}"
    dtype = "bfloat16" if "cuda" in device else "float32"
    if config.resume:  # it keeps the type that it had
        dtype = saved_state(out)["config"].get("dtype", dtype)
    defaults = {
        "task": name,
        "lr": task.lr * (10 if config.lora else 1),
        "dtype": dtype,
        "out": out,
    }
    defaults |= {"instruction": task.instruction, "max_new_tokens": task.max_new_tokens}
    filled = {key: value for key, value in defaults.items() if getattr(config, key) is None}
    config = replace(config, device=device, **filled)
    if "{question}" not in config.instruction:
        raise InputError("instruction must contain {question}, where the problem goes")
    return config


def main(arguments=None):
    """The command line; returns the exit status."""
    transformers_logging.disable_progress_bar()
    about = str(__doc__).splitlines()[0]
    parser = HfArgumentParser(Config, prog="grpo.py", description=about, allow_abbrev=False)  # type: ignore[arg-type]
    parser.usage = argparse.SUPPRESS  # so that an error is one line
    source = "".join(map(inspect.getsource, Config.__mro__[:-1]))
    comments = {}
    group_of = {}
    group = None
    for name, comment in re.findall(r"^    (?:(\w+): .*?  )?# (.*)$", source, flags=re.M):
        if not name:  # a heading
            group = parser.add_argument_group(comment.rstrip(":"))
        comments[name] = comment
        group_of[name] = group
    for action in parser._actions:
        action.help = comments.get(action.dest, action.help)
        if group := group_of.get(action.dest):
            parser._optionals._group_actions.remove(action)
            group._group_actions.append(action)
        if action.const is False:  # --no-chat, beside --chat false
            action.help = argparse.SUPPRESS
        if action.dest == "curvature":
            action.nargs = "?"  # as for settings that are either true or false
            action.const = True
        if action.default is None:  # what is not given is not set
            action.default = argparse.SUPPRESS
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        close = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    received = []

    def note(signal_number, _):
        received.append(signal_number)  # not in the middle of a step: weights are half updated
        signal.signal(signal_number, signal.SIG_DFL)
        os.write(2, b"\nstopping after this step, with a checkpoint (a second time: at once)\n")

    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, note)
    try:
        train(Config(**vars(given)), stop=received)
    except (RunError, OSError, SafetensorError) as error:
        status = getattr(error, "status", 1)
        said = f"grpo.py: {'error' if status == 2 else 'stopped'}: {error}"
        print(*said.split(), file=sys.stderr)  # one line of what may be several
        return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
