"""REINFORCE and GRPO on math problems in one file: why does GRPO divide by the standard deviation?

    pip install -r requirements.txt
    python grpo.py --norm std               # the embedded task: no download, one to three minutes
    python grpo.py --norm none              # same prompts, same random numbers, no division
    python grpo.py --norm std --resume      # goes on where an interrupted run stopped
    python grpo.py --task gsm8k             # a hub model and data set
    python grpo.py --model DIR --data FILE.jsonl
    torchrun --nproc_per_node 2 grpo.py     # the same run, its prompts shared out to two processes

Each step samples G completions for each of P prompts, scores them with rewards r [P, G], turns the
rewards into advantages A = (r - group mean) * scale, and takes one ascent step along the policy
gradient. `--norm` chooses the scale, and changes nothing else:

    none   1                              REINFORCE with the group mean as baseline
    std    1 / (sigma + eps)              GRPO (Shao et al. 2024, arXiv 2402.03300)
    var    1 / (sigma^2 + eps)            one power further: ascent on the log-odds
    batch  1 / (std of all P*G rewards + eps)

`--agg` chooses what the sum over tokens is divided by:

    sequence  P*G                         the policy gradient of whole completions, times (G-1)/G
                                          (with --norm none: Dr. GRPO, up to a constant)
    mean      P*G * the sequence's length GRPO as published
    token     the batch's tokens          DAPO (arXiv 2503.14476)

Conventions differ: here sigma is the population standard deviation (TRL, verl and OpenRLHF use the
sample one) and eps is 1e-6. There is no KL term unless `--kl` > 0. With one update per batch the
importance ratio is 1, so the ratio and the clip only matter with `--epochs` > 1.

Along the way, the script measures what Ge et al. (arXiv 2601.23135) use to explain the division:
each prompt's gradient, how orthogonal the prompts are, and the curvature along the gradients.

Read it from top to bottom: mathematics, model, rollout, gradient, measurement, `train`. The helpers
come after `train`: answers, data, files, processes, the command line. The functions under
"Mathematics" need only torch and their arguments, so feel free to copy them (group_advantages with
advantage_scale, gradient_geometry with pair_cosines, directional_curvature with square).
"""

import argparse
import inspect
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections import defaultdict, namedtuple
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset, disable_progress_bars, load_dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, HfArgumentParser
from transformers.cache_utils import DynamicCache
from transformers.utils import logging as transformers_logging


class RunError(RuntimeError):
    """The run cannot go on: one-line error, exit status `status`, last checkpoint intact."""

    status = 1


class InputError(RunError):
    """What the user gave cannot be used: one line, exit status 2, no run begun or changed."""

    status = 2


# ------------------- Settings: a field each; the command line is made from them -------------------


@dataclass
class Config:
    """Settings of a run; --help shows the comments. Raises InputError for a value out of range."""

    norm: Literal["none", "std", "var", "batch"] = "std"  # what advantages are divided by
    task: Literal["", "letters", "arith", "gsm8k", "math"] = ""  # empty: letters; own data: math
    model: str = ""  # a directory or hub name; empty: the embedded one, or Qwen/Qwen2.5-Math-1.5B
    lora: int = 0  # rank of adapters on all linear layers (alpha twice that); 0: train all weights
    data: str = ""  # JSONL file, or PATH[:NAME]:SPLIT of the hub; empty: embedded, GSM8K or MATH
    eval_data: str = ""  # held-out problems, like --data; empty: the task's, or a part of --data
    instruction: str = ""  # prompt text around {question}; empty: the task's, as in config.json
    chat: bool = True  # whether to use the tokenizer's chat template, if it has one
    prompts: int = 16  # P, prompts per step
    group: int = 16  # G, completions per prompt
    max_new_tokens: int = 0  # limit per completion; 0: letters and arith 6, gsm8k 512, math 1024
    temperature: float = 1.0  # softmax temperature, the same for sampling and training
    steps: int = 250  # number of batches to sample; each gets --epochs updates
    lr: float = 0.0  # after warm-up; 0: letters 2e-4, arith 3e-4, else 1e-6 (10x with --lora)
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd is the one that the theory is about
    max_grad_norm: float = 10.0  # clip the gradient norm (it varies with --norm) to this; 0: never
    agg: Literal["sequence", "mean", "token"] = "sequence"  # what the sum over tokens is divided by
    epochs: int = 1  # updates per batch; above 1 the importance ratio is clipped
    clip: float = 0.2  # range of the importance ratio around 1
    kl: float = 0.0  # weight of the KL term against the frozen start policy
    micro_batch: int = 0  # max tokens per training pass, prompt copies included; 0: by vocabulary
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of weights; auto: bfloat16 on CUDA
    device: str = "auto"  # torch device; auto: cuda if there is one, else cpu
    seed: int = 0  # random seed for the order of prompts and for sampling
    geometry_every: int = -1  # measure gradients every N steps; 0: off; -1: 1 (25 over 1M weights)
    probe_every: int = -1  # measure curvature every N steps; 0: off; -1: 10 (25 over 1M weights)
    eval_every: int = 50  # steps between evaluations on held-out problems; 0: only at start and end
    eval_problems: int = 512  # number of held-out problems (at most a third if split off --data)
    save_every: int = 50  # steps between checkpoints
    out: str = ""  # run directory; empty: runs/TASK-NORM-SEED
    resume: bool = False  # continue the run in --out

    def __post_init__(self) -> None:
        settle(self)


# ------------ Mathematics: pure functions of torch and their arguments, to be copied --------------


def advantage_scale(rewards, norm, eps=1e-6):
    """What each prompt's centred rewards are multiplied by. rewards: [P, G] -> [P, 1].
    norm: "none" 1, "std" 1 / (sigma + eps), "var" 1 / (sigma^2 + eps), "batch" 1 / (deviation of
    all rewards + eps), with population standard deviations (correction=0). Under every norm it is 0
    for a group of equal rewards, where otherwise rounding error alone could be divided by eps."""
    rewards = rewards * 1.0  # integers and booleans have no deviation
    std = rewards.std(dim=1, correction=0, keepdim=True)  # [P, 1]
    divisor = {
        "none": std * 0 + 1,
        "std": std + eps,
        "var": std**2 + eps,
        "batch": rewards.std(correction=0) + eps,
    }[norm]
    mixed = (rewards != rewards[:, :1]).any(dim=1, keepdim=True)
    return torch.where(mixed, 1 / divisor, 0.0)


def group_advantages(rewards, norm, eps=1e-6):
    """Advantages within each group, (r - group mean) * scale (arXiv 2402.03300, 4.1.2).
    rewards: [P, G], G completions for each of P prompts -> [P, G]. Calls advantage_scale."""
    rewards = rewards * 1.0  # integers and booleans have no mean
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred * advantage_scale(rewards, norm, eps)


def token_weights(lengths, agg):
    """Weight of each token's term in the batch's loss, the same however the batch is split.
    lengths: [P, G], in tokens. agg: "sequence" 1/(P*G) (the policy gradient of whole
    completions), "mean" 1/(P*G*length) (GRPO as published), "token" 1/(all tokens) (DAPO, arXiv
    2503.14476). Returns [P, G]."""
    count = {"sequence": lengths.numel(), "mean": lengths.numel() * lengths, "token": lengths.sum()}
    return torch.ones_like(lengths, dtype=torch.float32) / count[agg]


def policy_loss(logprobs, old_logprobs, advantages, weights, clip):
    """Clipped policy-gradient loss, -sum of weights * min(ratio * A, clip(ratio) * A) (PPO, arXiv
    1707.06347, eq. 7). Log-probabilities are in nats. All tensors have, or broadcast to, one shape
    with an entry per token. Where old_logprobs = logprobs.detach(), the ratio is 1 and the gradient
    is REINFORCE's, -sum of weights * A * grad logprobs."""
    ratio = (logprobs - old_logprobs).exp()
    bounded = ratio.clamp(1 - clip, 1 + clip)
    return -(weights * torch.minimum(ratio * advantages, bounded * advantages)).sum()


def k3_divergence(logprobs, old_logprobs, reference_logprobs):
    """Per-token estimate, in nats, of KL(policy || reference): ratio * (exp(d) - d - 1) >= 0, with
    d = log reference - log policy. All shapes are equal. This is k3 (Schulman, "Approximating KL
    Divergence", 2020) times the ratio policy / old, neither detached nor clipped: without the ratio
    its gradient would be that of KL(reference || policy) (arXiv 2505.17508)."""
    difference = reference_logprobs - logprobs
    return (logprobs - old_logprobs).exp() * (torch.expm1(difference) - difference)


def token_logprobs(logits, tokens, temperature):
    """Log-probabilities of tokens [N] under softmax(logits [N, V] / temperature), in nats -> [N],
    float32 at least."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    scaled = logits.to(wide, copy=True).div_(temperature)
    return scaled.log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]


def sample_tokens(logits, uniforms, temperature):
    """Draw one token per row from softmax(logits / temperature): no top-k, no top-p, no penalty.
    logits: [N, V]; uniforms: [N] in [0, 1), one per token; temperature 0 takes the most likely
    token. Returns the tokens, their log-probabilities and the distributions' entropies, [N] each,
    in nats (at temperature 0, those of temperature 1)."""
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(dim=1)  # [N, V]
    probs = logprobs.exp()
    cumulative = probs.cumsum(dim=1)
    # Rounding leaves the last cumulative value a little off 1: the target is a share of that value.
    target = uniforms[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True)[:, 0]
    tokens = tokens.clamp(max=logits.shape[1] - 1) if temperature else logits.argmax(dim=1)
    entropy = torch.special.entr(probs).sum(dim=1)  # 0 where the probability is
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0], entropy


def count_sketch(tensors, signs, size):
    """Random projection [size] of the tensors, taken as one vector, that preserves inner products:
    entry i, times a random sign, is added to sum i modulo `size` (Charikar, Chen, Farach-Colton
    2002). signs: int8 [D], +1 or -1 equally likely, the same for all vectors to be compared. Two
    sketches' inner product is an unbiased estimate of the vectors', with deviation about
    |a| |b| / sqrt(size); with a prime size, even if large entries lie in columns of a matrix."""
    sums, start = torch.zeros(size, device=signs.device), 0
    for part in (x.flatten() for x in tensors):
        signed = part * signs[start : start + len(part)]
        before = start % size  # zeros that bring the part's first entry to its sum
        padded = torch.nn.functional.pad(signed, (before, -(before + len(part)) % size))
        sums += padded.view(-1, size).sum(dim=0, dtype=torch.float32)
        start += len(part)
    return sums


def pair_cosines(gram):
    """Cosines [pairs] of all pairs of vectors that are not zero. gram: [P, P] inner products."""
    present = gram.diagonal() > 0
    lengths = gram.diagonal()[present].sqrt()
    cosines = gram[present][:, present] / (lengths[:, None] * lengths)
    return cosines[torch.ones_like(cosines).triu(1) > 0]


def gradient_geometry(first, second, group, levels):
    """How P prompts' gradients relate to each other, as sampled and with sampling noise removed.
    first, second: [P, D] gradients from the two halves, (group + 1) // 2 and group // 2, of each
    prompt's completions: the half's mean of leave-one-out advantage * grad log pi, zero if all G
    rewards are equal. levels: [P] of any kind. Returns values, and two columns [P]. As sampled,
    over pairs of nonzero gradients: the cosine's mean, deviation, and shares above 0 and below 0.1
    in size. interference = |sum g|^2 / sum |g|^2: 1 if orthogonal, P if equal, below 1 in conflict.
    signal_share: the part of sum |g|^2 that is not noise. Noise-free, over all, same-level, and
    cross-level pairs x, y: cos_signal = mean xy / mean (xx + yy)/2, and cos_sq_signal = mean (xy)^2
    / mean xx yy; over several steps, average each mean before dividing. NaN if there is no pair."""
    n, m = (group + 1) // 2, group // 2
    AA, AB, BB = first @ first.T, first @ second.T, second @ second.T  # [P, P]
    gram = (n * n * AA + n * m * (AB + AB.T) + m * m * BB) / group**2
    count, cosines = int((gram.diagonal() > 0).sum()), pair_cosines(gram)
    total = gram.trace() if count > 1 else gram.trace() * torch.nan
    # On-policy E<g_A, g_B> = (1 + 1/(G-1)^2) |g|^2; in a ratio of products of halves that cancels.
    halves = AB.diagonal()
    unbiased = halves / (1 + 1 / (group - 1) ** 2)
    values = {
        "cos_mean": cosines.mean(),  # NaN of none
        "cos_std": cosines.std(correction=0) if count > 1 else total,
        "cos_positive": (cosines > 0).double().mean(),
        "cos_small": (cosines.abs() < 0.1).double().mean(),
        "interference": gram.sum() / total,
        "signal_share": unbiased.sum() / total,
    }
    apart = ~torch.eye(len(levels), dtype=torch.bool)
    alike = torch.tensor([[x == y for y in levels] for x in levels])
    for name, pairs in ("", apart), ("_within", apart & alike), ("_between", ~alike):
        squares, products = (unbiased[:, None] + unbiased) / 2, halves[:, None] * halves
        values["cos_signal" + name] = gram[pairs].mean() / squares[pairs].mean()
        values["cos_sq_signal" + name] = (AA * BB)[pairs].mean() / products[pairs].mean()
    columns = {"grad_norm": gram.diagonal().sqrt(), "grad_sq_signal": unbiased}
    return {"n_gradients": count} | {name: float(x) for name, x in values.items()}, columns


def square(tensors):
    """|v|^2 of tensors taken as one vector -> float. In float64: torch's float32 norm of 10^8
    numbers is off by a percent on a CPU."""
    return sum(float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2 for x in tensors)


def directional_curvature(sequence_logprobs, parameters, direction, advantages, slope):
    """Curvature v'Hv, in reward / parameter^2, along v = direction / |direction|, of the surrogate
    mean(A * pi_new(y) / pi(y)) over whole sequences y, using forward passes alone. At the sampling
    policy H is the sample Hessian of the expected reward; a token-level ratio would not give that.
    sequence_logprobs: maps parameters (a dict of float32 tensors) to the log-probabilities [n] of n
    sampled sequences, in nats. direction: a dict with the same names. advantages: [n]. slope: a
    guess at how fast the log-probabilities change along v. The second difference uses a step that
    changes them by 0.03 to 0.1 (root mean square, within a factor of 2). NaN if no such step is
    found, or if rounding would blur the result; 0 if all advantages are 0."""
    length = square(direction.values()) ** 0.5
    if not 0 < length < torch.inf:
        return torch.nan
    if not advantages.any():
        return 0.0

    def logprobs_at(step):
        moved = {k: direction[k].float() * (step / length) for k in parameters}
        return sequence_logprobs({k: p.float() + moved[k] for k, p in parameters.items()})

    with torch.no_grad():
        start = logprobs_at(0.0)
        rounding = torch.finfo(torch.float32).eps * float(start.abs().mean() + 1)
        wanted = min(max((rounding / 0.02) ** 0.5, 0.03), 0.1)
        step = wanted / slope
        for _ in range(4):
            ahead = logprobs_at(step) - start
            size = float(ahead.square().mean().sqrt())
            if wanted / 2 < size < wanted * 2:
                break
            step *= min(max(wanted / max(size, 1e-30), 1e-3), 1e3)
        else:
            return torch.nan
        if rounding > 0.1 * size**2:
            return torch.nan
        behind = logprobs_at(-step) - start
        # expm1 keeps the digits that exp loses next to 1.
        return float((advantages * (ahead.expm1() + behind.expm1())).mean()) / step**2


# --------------- Model: working weights, and the float32 masters that are optimized ---------------


@dataclass
class Policy:
    """A causal language model, its tokenizer, and the float32 weights that the optimizer steps."""

    model: Any
    tokenizer: Any
    eos_ids: list[int]  # any of them ends a completion
    trained: dict[str, Any]  # the model's parameters that are trained, by name
    masters: dict[str, Tensor]  # the same in float32, sharing memory with any that already are
    limits: tuple[int, int]  # max tokens and max completion tokens of a micro-batch
    guard: Callable = nullcontext  # context needed by a model that overwrites tensors in place

    def publish(self):
        """Copy the masters into the working weights: rollout and training see one policy."""
        for name, parameter in self.trained.items():
            parameter.data.copy_(self.masters[name])


def load_policy(config):
    """The start policy. Raises InputError for a model that cannot be loaded or has no end token."""
    path, cuda = config.model or TASKS[config.task].model, "cuda" in config.device
    kind = config.dtype if config.dtype != "auto" else "bfloat16" if cuda else "float32"
    safe = dict(trust_remote_code=False)  # no code from a model's directory is executed
    how = dict(dtype=kind, attn_implementation=None if cuda else "eager")  # faster on CPUs
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, **how, **safe)
        tokenizer = AutoTokenizer.from_pretrained(path, **safe)
        vocabulary = len(model.get_output_embeddings().weight)
        if config.lora:  # arXiv 2106.09685; in float32, beside weights of any type
            import peft

            torch.manual_seed(0)  # the same start for every norm, seed and process
            r = config.lora
            adapters = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear")
            model = peft.get_peft_model(model, adapters)
    except Exception as error:  # OSError, ValueError, ImportError, SafetensorError, ...
        raise InputError(f"cannot load model {path}: {error} {OFFLINE}") from error
    model.to(config.device).eval()  # dropout would train another distribution than is sampled
    ends = getattr(model.generation_config, "eos_token_id", None)  # None, one id, or several
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    ends |= end_of_turn(tokenizer) if config.chat else set()
    if not ends:
        raise InputError(f"model {path} names no end-of-sequence token")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    masters = {name: p.detach().float() for name, p in trained.items()}
    # A micro-batch holds its logits and their gradient: on a GPU there is room for some gigabytes.
    most = (1 << (28 if cuda else 24)) // vocabulary
    limits = config.micro_batch or 4096, config.micro_batch or min(4096, most)
    return Policy(model, tokenizer, sorted(ends), trained, masters, limits)


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


def with_weights(model, weights):
    """The model's forward at other weights, by parameter name; those not named stay as they are."""
    return lambda *args, **named: torch.func.functional_call(model, weights, args, named)


# The name of a model's cache argument: whichever of these two GPT-2's forward accepts.
CACHE = max({"cache", "past_key_values"} & {*inspect.signature(GPT2LMHeadModel.forward).parameters})


def extend(forward, tokens, mask, cache, **options):
    """The model's output for further tokens [n, t] of n rows, whose past is in the cache.
    mask: [n, past + t], 0 where a row is padded on the left, so before its position 0."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    inputs = {"attention_mask": mask, "position_ids": positions, CACHE: cache, "use_cache": True}
    return forward(tokens, **inputs, **options)


def encode_prompts(policy, prompts, copies, forward, hidden=False):
    """Run each prompt (a token list) once, then repeat its cache and logits for each completion.
    copies: [n], the prompt that each completion continues. Returns the mask [n, width] and cache
    for `extend`, the logits [n, V] of the first tokens, and the last hidden states [prompts, D],
    averaged over each prompt's tokens, or NaN if they are not asked for or not available."""
    device, tokens = policy.model.device, [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(tokens, True, -1, padding_side="left").to(device)  # [prompts, width]
    mask, ids = (ids >= 0).long(), ids.clamp(min=0)
    cache, copies = DynamicCache(config=policy.model.config), copies.to(device)
    # The last logits, by index: for a slice torch would copy the output layer, once per prompt.
    last = torch.tensor([-1], device=device)
    output = extend(forward, ids, mask, cache, logits_to_keep=last, output_hidden_states=hidden)
    features = torch.full((len(prompts), 1), math.nan)
    states = hidden and getattr(output, "hidden_states", None)
    if states and states[-1].shape[:2] == ids.shape:  # one kind of model stacks several of each
        features = (states[-1].float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    cache.reorder_cache(copies)
    return mask[copies], cache, output.logits[copies, -1], features


# ----------- Rollout: sample completions from exactly the distribution that is trained ------------

ORDER, TRAIN, EVALUATE = range(3)  # what a random stream is for


def prompt_rows(step, config, problems):
    """The P problems (row numbers) for this step, in a seeded order, reshuffled after each pass."""

    def row(slot):
        stream = np.random.default_rng((config.seed, ORDER, slot // problems))
        return int(stream.permutation(problems)[slot % problems])

    return [row(slot) for slot in range(step * config.prompts, (step + 1) * config.prompts)]


def draw(config, purpose, step, rows, group):
    """Uniforms [rows, group, T]: every row of every step has a stream of its own."""
    streams = (np.random.default_rng((config.seed, purpose, step, row)) for row in rows)
    shape = group, config.max_new_tokens
    return torch.from_numpy(np.stack([stream.random(shape, np.float32) for stream in streams]))


@dataclass
class Batch:
    """G completions for each of P prompts, on the CPU; 0 beyond a completion's length.
    Row p * G + g is completion g of prompt p."""

    prompts: list[list[int]]  # their tokens
    features: Tensor  # [P, D] mean over a prompt's tokens of what the output layer reads, or NaN
    tokens: Tensor  # [P, G, T] sampled, the end token included
    lengths: Tensor  # [P, G]
    logprobs: Tensor  # [P, G, T] of the tokens, nats
    entropy: Tensor  # [P, G, T] of the distributions that they were drawn from, nats
    truncated: Tensor  # [P, G] bool: no end token within T
    old_logprobs: Tensor  # [P, G, T] as first trained on, for the importance ratio; NaN before
    rewards: Any = None  # [P, G]; this and what follows are known later
    advantages: Any = None  # [P, G]
    scale: Any = None  # [P] what a prompt's centred rewards are multiplied by
    weights: Any = None  # [P, G] of each token's term


@torch.no_grad()
def rollout(policy, prompts, uniforms, temperature):
    """Sample G completions of at most T tokens for each of P prompts (token lists); temperature 0
    is greedy. uniforms: [P, G, T] in [0, 1). Rows that have ended leave the batch."""
    model, device = policy.model, policy.model.device
    P, G, T = uniforms.shape
    uniforms, ends = uniforms.view(P * G, T).to(device), torch.tensor(policy.eos_ids, device=device)
    rows = torch.arange(P * G, device=device)  # those that still run
    # Hidden states are large, and of no use in an evaluation, where G is 1.
    mask, cache, logits, features = encode_prompts(policy, prompts, rows // G, model, hidden=G > 1)
    tokens, lengths = rows.new_zeros(P * G, T), rows.new_zeros(P * G)
    logprobs, entropy = torch.zeros(2, P * G, T, device=device)
    for t in range(T):
        drawn = sample_tokens(logits, uniforms[rows, t], temperature)
        tokens[rows, t], logprobs[rows, t], entropy[rows, t] = drawn
        lengths[rows] += 1
        running = (~torch.isin(drawn[0], ends)).nonzero()[:, 0]
        if len(running) < len(rows):
            rows, mask = rows[running], mask[running]
            cache.reorder_cache(running)
        if t + 1 == T or not len(rows):
            break
        mask = pad(mask, (0, 1), value=1)
        logits = extend(model, tokens[rows, t, None], mask, cache).logits[:, -1]
    truncated = torch.isin(torch.arange(P * G, device=device), rows)
    columns = tokens, lengths, logprobs, entropy, truncated, torch.full_like(logprobs, math.nan)
    return Batch(prompts, features.cpu(), *(x.cpu().unflatten(0, (P, G)) for x in columns))


def score(policy, batch, problems, reward):
    """Set the batch's rewards; returns the texts [P * G] of its completions, without special
    tokens. Raises RunError, naming the completion, for a reward that fails or is not finite."""
    G, lengths = batch.lengths.shape[1], batch.lengths.flatten().tolist()
    tokens = [row[:n] for row, n in zip(batch.tokens.flatten(0, 1).tolist(), lengths)]
    texts, rewards = policy.tokenizer.batch_decode(tokens, skip_special_tokens=True), []
    for row, text in enumerate(texts):
        answer = problems[row // G].answer
        try:
            rewards.append(float(reward(text, answer)))
            if not math.isfinite(rewards[-1]):
                raise ValueError("not a finite number")
        except Exception as error:
            raise RunError(f"the reward failed: {error!r}, {text=}, {answer=}") from error
    batch.rewards = torch.tensor(rewards, dtype=torch.float64).view_as(batch.lengths)
    return texts


def pass_rates(rewards):
    """Share of rewards equal to 1 in each row, [P, G] -> [P]; NaN (in the log: null) where one lies
    outside [0, 1]."""
    inside = (rewards.clamp(0, 1) == rewards).all(dim=1)
    return torch.where(inside, (rewards == 1).double().mean(dim=1), math.nan)


def evaluate(policy, problems, mine, size, reward, config):
    """Complete every problem twice, greedily and by sampling. Returns log columns, and samples for
    the first 4. The random numbers are always the same, so evaluations differ only in the policy.
    mine: this process's share, out of `size` processes; batches are as large as in training."""
    most, of_all = max(1, config.prompts * config.group // size), []
    for temperature in (0.0, config.temperature):
        rewards, texts = [], []
        for start in range(0, len(mine), most):
            rows = mine[start : start + most]
            part, uniforms = [problems[row] for row in rows], draw(config, EVALUATE, 0, rows, 1)
            batch = rollout(policy, [problem.prompt for problem in part], uniforms, temperature)
            texts += score(policy, batch, part, reward)
            rewards += batch.rewards
        of_all.append(torch.cat(gather(rewards)))
    both = torch.stack(of_all)  # [greedy and sampled, problems]
    names = "eval_greedy", "eval_pass_rate", "eval_greedy_reward", "eval_reward"
    columns = dict(zip(names, torch.cat([pass_rates(both), both.mean(dim=1)]).tolist()))
    samples = [
        {"question": x.question, "completion": text, "answer": x.answer, "reward": value}
        for x, text, value in zip(problems[:4], texts, both[1].tolist())
    ]
    return columns, samples


# ---------------------------- Gradient: of completions, in micro-batches --------------------------


def split_rows(batch, rows, limits):
    """Split rows of the batch into micro-batches of at most limits[0] tokens, counting padding and
    each completion's copy of its prompt, and at most limits[1] completion tokens; a lone completion
    may exceed both. Prompts with the longest completions come first, one prompt at a time."""
    G, lengths = batch.lengths.shape[1], batch.lengths.flatten().tolist()
    longest, width, length = batch.lengths.amax(dim=1).tolist(), 0, 0
    parts: list[list[int]] = []
    for row in sorted(rows, key=lambda row: (-longest[row // G], row // G, -lengths[row])):
        size = len(batch.prompts[row // G])
        width, length = max(width, size), max(length, lengths[row])  # that all are padded to
        n = len(parts[-1]) + 1 if parts else math.inf
        if n * (width + length) > limits[0] or n * length > limits[1]:
            parts.append([])
            width, length = size, lengths[row]
        parts[-1].append(row)
    return parts


def completion_logprobs(policy, batch, rows, config, forward=None):
    """Log-probabilities [n, T] in nats of the rows' tokens; T is the longest row's length, and
    entries past a row's end are 0. forward: the model with other weights, if needed. Every prompt
    is encoded once. Completions are padded on the right, where none of their tokens sees it."""
    forward, G, device = forward or policy.model, batch.lengths.shape[1], policy.model.device
    lengths = batch.lengths.flatten()[rows]
    tokens = batch.tokens.flatten(0, 1)[rows, : lengths.max()].to(device)  # [n, T]
    own, copies = (torch.tensor(rows) // G).unique(return_inverse=True)
    prompts = [batch.prompts[p] for p in own]
    mask, cache, logits, _ = encode_prompts(policy, prompts, copies, forward)
    logits = logits[:, None]
    if tokens.shape[1] > 1:  # the last one leads to no other
        mask = pad(mask, (0, tokens.shape[1] - 1), value=1)
        later = extend(forward, tokens[:, :-1], mask, cache).logits
        logits = torch.cat([logits, later], dim=1)  # [n, T, V]
    logprobs = token_logprobs(logits.flatten(0, 1), tokens.flatten(), config.temperature)
    inside = torch.arange(tokens.shape[1]) < lengths[:, None]
    return torch.where(inside.to(device), logprobs.view_as(tokens), 0.0)


def loss_gradient(policy, batch, rows, config, reference=None):
    """The gradient of the loss of some rows of the batch, a tensor for each trained parameter.
    reference: the forward of the KL term's policy, or None. Sets the rows' old_logprobs."""
    gradient: Any = None
    for part in split_rows(batch, rows, policy.limits):
        with policy.guard():
            logprobs = completion_logprobs(policy, batch, part, config)  # [n, T]
            first = batch.old_logprobs.flatten(0, 1)[:, : logprobs.shape[1]]  # a view
            old = first[part].to(logprobs)
            old = torch.where(old.isnan(), logprobs.detach(), old)
            first[part] = old.cpu()
            advantages, weights = (
                x.reshape(-1, 1)[part].to(logprobs) for x in (batch.advantages, batch.weights)
            )
            loss = policy_loss(logprobs, old, advantages, weights, config.clip)
            if reference:
                anchor = completion_logprobs(policy, batch, part, config, reference)
                loss = loss + config.kl * (weights * k3_divergence(logprobs, old, anchor)).sum()
            new = torch.autograd.grad(loss, [*policy.trained.values()], materialize_grads=True)
        gradient = [a.float() + b for a, b in zip(gradient, new)] if gradient else new
    return gradient or [torch.zeros_like(x) for x in policy.masters.values()]


def make_optimizer(masters, config):
    """Plain SGD, or AdamW without weight decay, which would erode what the start policy knows."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(masters, lr=config.lr)
    return torch.optim.AdamW(masters, lr=config.lr, weight_decay=0.0, fused=True)


# ------------- Measurement: the two halves of a group are two looks at its prompt -----------------

SMALL = 1_000_000  # up to this many trained parameters, gradients are kept whole, measured often
SKETCH = 65_537  # size of the sketch kept of a larger gradient; a prime


def measure_half(policy, batch, rows, gradient, signs, config, probe, found):
    """Append the measurements of one half of a prompt's group to the lists in `found`, by name.
    gradient: this half's part of the update's gradient. It is rescaled to the half's own estimate
    of the gradient of the expected reward (uphill): the mean over the half of leave-one-out
    advantage * grad log pi. signs: for count_sketch, or None to keep vectors whole."""
    G, n, rewards = batch.lengths.shape[1], len(rows), batch.rewards.flatten()[rows]
    p = rows[0] // G
    scaled = float(batch.scale[p] * batch.weights[p, 0])  # 0 if all rewards are equal
    # Divide that out; leave-one-out advantages are G/(G-1) times those to the group's mean.
    factor = -G / (G - 1) / n / scaled if scaled else 0.0
    flat = [x.flatten() for x in gradient]
    vector = torch.cat(flat) if signs is None else count_sketch(flat, signs, SKETCH)
    vector = vector.float().cpu() * factor
    found["vector"].append(vector)
    if not probe:
        return
    norm = float(vector.norm())
    found["curvature"].append(probe_curvature(policy, batch, rows, gradient, norm, config))
    found["reward_std_half"].append(rewards.std(correction=0))
    found["pass_rate_half"].append(pass_rates(rewards[None])[0])
    # The paper's Fisher proxy (4.3): n |mean of grad log pi(y)|^2, no reward in it.
    alike = torch.ones_like(batch.weights)
    plain = replace(batch, advantages=-alike, weights=alike / G)
    fisher = square(loss_gradient(policy, plain, rows, config))
    found["fisher_half"].append(G**2 / n * fisher)


def probe_curvature(policy, batch, rows, gradient, norm, config):
    """Curvature of a prompt's expected reward along the gradient of one half (`rows`), from the
    other half's samples, whose own leave-one-out baseline keeps out nearly all of that gradient's
    noise. gradient: that gradient times a factor; norm: its norm without the factor. NaN for a
    single such sample, or if `rows` all earn the same: their gradient is then due to the others."""
    G, own = batch.lengths.shape[1], batch.rewards.flatten()[rows]
    p = rows[0] // G
    others = [row for row in range(p * G, p * G + G) if row not in rows]
    if len(others) < 2 or own.max() == own.min():
        return math.nan
    parts, n = split_rows(batch, others, policy.limits), len(others)
    rewards = batch.rewards.flatten()[sum(parts, [])]
    # All weights in float32: a second difference drowns in bfloat16.
    weights = {
        name: x.float() for name, x in policy.model.named_parameters() if not x.requires_grad
    }

    def sequence_logprobs(parameters):
        forward = with_weights(policy.model, weights | parameters)
        found = (completion_logprobs(policy, batch, part, config, forward) for part in parts)
        return torch.cat([logprobs.double().sum(dim=1).cpu() for logprobs in found])

    # The gradient is a mean of advantage * grad log pi: divided by the rewards' deviation, its norm
    # is about the slope of log pi along it.
    slope = norm / float(batch.rewards[p].std(correction=0))
    advantages, masters = (rewards - rewards.mean()) * n / (n - 1), policy.masters
    direction = dict(zip(masters, gradient))  # up or down, the curvature is the same
    return directional_curvature(sequence_logprobs, masters, direction, advantages, slope)


def describe_measured(found, features, levels, G, geometry):
    """What the measurements add to the step's log line, and as columns to the lines of its prompts.
    found: from measure_half, 2 entries per prompt. features [P][D], levels [P]: of all prompts."""
    vectors, line = torch.stack(found.pop("vector")).double(), {}  # [2P, D]
    columns = {name: [*zip(values[::2], values[1::2])] for name, values in found.items()}
    if found:
        line["curvature"] = torch.tensor(found["curvature"], dtype=torch.float64).nanmean()
    if geometry:
        more, of_prompts = gradient_geometry(vectors[::2], vectors[1::2], G, levels)
        line, columns = line | more, columns | of_prompts
        x = torch.stack(features).double()
        for name, y in (("feature_cos", x), ("feature_cos_centered", x - x.mean(dim=0))):
            line[name] = pair_cosines(y @ y.T).abs().mean()
    return line, columns


# ------------------------- train: the algorithm, in the order it happens --------------------------


def train(config, dataset=None, reward=None, stop=()):
    """Train from the start policy to a saved model; everything is written to config.out.
    dataset: problems to use instead of the task's, with columns question and answer.
    reward(completion, answer) -> float: used instead of the task's. stop: once it contains a signal
    number, the run ends between two steps. Returns the last evaluation. Raises InputError before a
    run is begun or changed, RunError if the run cannot go on or was stopped."""
    out, P, G = Path(config.out), config.prompts, config.group
    if not config.resume and ((out / CHECKPOINT).exists() or (out / LOGS[0]).exists()):
        raise InputError(f"{out} holds a run: add --resume to continue it, or --out OTHER_DIR")
    reward = reward or TASKS[config.task].reward
    splits = load_problems(config, dataset, reward)
    rank, size = join_processes(config)
    policy = load_policy(config)
    problems, held_out = (encode_problems(rows, policy, config) for rows in splits)
    check_model(policy, max([problem.prompt for problem in problems], key=len), config)
    mine, mine_held_out = (
        range(rank * n // size, (rank + 1) * n // size) for n in (P, len(held_out))
    )
    masters, limit = [*policy.masters.values()], config.max_grad_norm or math.inf
    optimizer, trained = make_optimizer(masters, config), sum(x.numel() for x in masters)
    # The KL term's policy is the start policy, so it is copied before a checkpoint is loaded.
    first = {name: x.detach().clone() for name, x in policy.trained.items() if config.kl}
    reference = torch.no_grad()(with_weights(policy.model, first)) if first else None
    signs, usual = None, 1 if trained <= SMALL else 25  # without signs gradients are kept whole
    geometry_every = usual if config.geometry_every < 0 else config.geometry_every
    probe_every = max(10, usual) if config.probe_every < 0 else config.probe_every
    if trained > SMALL and (geometry_every or probe_every):
        rng = torch.Generator(config.device).manual_seed(0)
        signs = torch.randint(2, (trained,), generator=rng, device=rng.device, dtype=torch.int8)
        signs = signs * 2 - 1
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error}") from error
    gather([])  # all have seen what is in --out before the first process writes there
    failed, start = 0, load_checkpoint(config, policy, optimizer, rank) if config.resume else 0
    if rank == 0:
        save_checkpoint(config, policy, optimizer, start)
        print(
            f"{config.task}: {len(problems):,} problems, "
            f"reward {getattr(reward, '__name__', reward)}, at most "
            f"{config.max_new_tokens} new tokens; norm {config.norm}, {config.optimizer} at "
            f"{config.lr:g}, {trained:,} parameters, {policy.model.dtype} on {config.device}"
        )

    launched = 0.0
    for step in range(start, config.steps + 1):
        number = max(gather(list(stop)), default=0)  # together: all have taken the same steps
        due = number or step == config.steps or step % config.save_every == 0
        if rank == 0 and step > start and due:
            save_checkpoint(config, policy, optimizer, step)
        if number:
            stopped = RunError(f"{signal.Signals(number).name}: add --resume to continue")
            stopped.status = 128 + number
            raise stopped
        evaluation = {}
        if step in (0, config.steps) or step % (config.eval_every or math.inf) == 0:
            evaluation, samples = evaluate(policy, held_out, mine_held_out, size, reward, config)
            if rank == 0:
                append(out / LOGS[2], [{"step": step} | sample for sample in samples])
        if step == config.steps:
            break
        began = time.perf_counter()
        launched = launched or began

        # Prompts, and a random number for each token that may be sampled: the same for every norm.
        ids = prompt_rows(step, config, len(problems))  # [P] rows of the problems
        own = [problems[ids[p]] for p in mine]  # [P'], this process's
        uniforms = draw(config, TRAIN, step, mine, G)  # [P', G, T]

        # Rollout and rewards.
        batch = rollout(policy, [problem.prompt for problem in own], uniforms, config.temperature)
        score(policy, batch, own, reward)
        columns = batch.rewards, batch.lengths, batch.truncated, batch.entropy.sum(2)  # [P', G]
        rewards, lengths, truncated, entropy = (  # [P, G] of all processes
            torch.cat(gather([column])).double() for column in columns
        )
        sampled = time.perf_counter()

        # Advantages: here REINFORCE (none) and GRPO (std) differ, and nowhere else.
        advantages = group_advantages(rewards, config.norm)  # [P, G]
        weights = token_weights(lengths, config.agg)  # [P, G]
        scale = advantage_scale(rewards, config.norm)[:, 0]  # [P], to be measured and logged
        batch.advantages, batch.weights, batch.scale = advantages[mine], weights[mine], scale[mine]

        # Gradient: summed over micro-batches or, when measuring, over half groups; only one part's
        # gradient is held at a time. Rows with zero advantage have none, unless there is a KL term.
        geometry, probe = (e > 0 and step % e == 0 for e in (geometry_every, probe_every))
        active = [row for row, A in enumerate(batch.advantages.flatten()) if A or reference]
        lr = optimizer.param_groups[0]["lr"] = config.lr * min(1.0, (step + 1) / 10)
        grad_norms, found = [], defaultdict(list)  # type: ignore[var-annotated]
        for epoch in range(config.epochs):
            for master in masters:
                master.grad = torch.zeros_like(master)
            parts: Any = split_rows(batch, active, policy.limits)
            measured = (geometry or probe) and epoch == 0
            if measured:
                groups = torch.arange(len(mine) * G).view(-1, G)
                parts = [half.tolist() for group in groups for half in group.tensor_split(2)]
            for rows in parts:
                live = [row for row in rows if row in active]
                gradient = loss_gradient(policy, batch, live, config, reference)
                for master, new in zip(masters, gradient):
                    master.grad += new
                if measured:
                    measure_half(policy, batch, rows, gradient, signs, config, probe, found)
                gradient = new = None  # the next pass needs the memory
            for master in masters:
                collective(dist.all_reduce, master.grad)
            grad_norm = float(clip_grad_norm_(masters, limit))
            # If the policy is NaN, every reward may be 0, making the gradient 0 rather than NaN.
            grad_norms.append(grad_norm if entropy.isfinite().all() else math.nan)
            if math.isfinite(grad_norms[-1]):
                optimizer.step()
                policy.publish()
            optimizer.zero_grad()
        updated = time.perf_counter()

        # Log: a line speaks of the policy before this step's update.
        std, rates = rewards.std(dim=1, correction=0), pass_rates(rewards)  # [P]
        gaps = (batch.old_logprobs - batch.logprobs).abs().nan_to_num(-math.inf)
        line = {
            "step": step,
            "reward": rewards.mean(),
            "pass_rate": rates.mean(),
            "reward_std": std.mean(),
            "frac_all_right": (rates == 1).double().mean(),
            "frac_all_wrong": (rewards == 0).all(dim=1).double().mean(),
            "entropy": entropy.sum() / lengths.sum(),
            "length": lengths.mean(),
            "truncated": truncated.mean(),
            "grad_norm": np.mean(grad_norms),
            "clipped": any(grad_norm > limit for grad_norm in grad_norms),
            "skipped": int(np.sum(~np.isfinite(grad_norms))),
            "logprob_gap": max(gather([float(gaps.max())])),
            "lr": lr,
            "seconds_rollout": sampled - began,
            "seconds_update": updated - sampled,
            "tokens_per_second": lengths.sum() / (updated - began),
        }
        levels = [problems[row].level for row in ids]
        per_prompt = {"step": [step] * P, "prompt": ids, "level": levels, "pass_rate": rates}
        per_prompt |= {"reward_std": std, "scale": scale}
        if geometry or probe:
            of_all = {name: gather(values) for name, values in found.items()}
            features = gather([*batch.features])
            more_line, more_columns = describe_measured(of_all, features, levels, G, geometry)
            line, per_prompt = line | more_line, per_prompt | more_columns
        if rank == 0:
            append(out / LOGS[0], [line | evaluation])
            append(out / LOGS[1], [dict(zip(per_prompt, row)) for row in zip(*per_prompt.values())])
            if evaluation or step % 10 == 0 or updated - began > 1:
                held = f"  held out {evaluation['eval_reward']:.3f}" if evaluation else ""
                pace = (updated - launched) / (step + 1 - start)
                print(
                    f"step {step:>5}/{config.steps}  reward {line['reward']:.3f}  "
                    f"σ {line['reward_std']:.3f}  cut off {line['truncated']:.0%}  "
                    f"{pace * (config.steps - step - 1) / 60:.1f} min left{held}",
                    flush=True,
                )
        failed = failed + 1 if line["skipped"] == config.epochs else 0
        if failed == 5:
            raise RunError(f"no finite gradient in 5 steps in a row, up to {step}")

    if rank == 0:
        append(out / LOGS[0], [{"step": step} | evaluation])
        model = policy.model.merge_and_unload() if config.lora else policy.model
        model.save_pretrained(out / "model")
        policy.tokenizer.save_pretrained(out / "model")
        print(
            f"held out {evaluation['eval_reward']:.3f}, greedy "
            f"{evaluation['eval_greedy_reward']:.3f}; all in {out}\nnext: run with another --norm "
            "(and --out, if given), then analyze.py with both directories"
        )
    if size > 1:
        dist.destroy_process_group()
    return evaluation


# ------------------------------ Tasks, and rewards that check them --------------------------------

MAX_SPAN = 300  # characters; anything longer is not taken for an answer, and is slow to parse
DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
DIGITS += r"(?:[eE][-+]?[0-9]{1,2}(?![0-9]))?"
# A number with its currency, percent, unit, and the bold, dollars or backticks of a model's text.
UNIT = r"(?! *(?:pi|sqrt|[beiknxyz])\b)[A-Za-z/ ]+"  # but "5 x" and "2 pi" are no numbers
NUMBER = re.compile(
    rf"[\s*`$€£\\]*([-+]?)[\s$€£\\]*({DIGITS})[\s*`$€£\\%.]*(?:(?<=\s){UNIT}[*`$.]*)?"
)
BRACED = r"(?:\\.|[^\\{}])*"  # what a pair of braces holds, with up to 8 pairs in each other
for _ in range(8):
    BRACED = rf"(?:\\.|[^\\{{}}]|\{{{BRACED}\}})*"
MARKED = re.compile(rf"####\s*(.*)|\\(?:boxed|fbox)\s*(?:\{{({BRACED})\}}|([^\s${{]*[^\s${{.,]))")
# The last number of a text: "1-3" ends in 3, not in -3.
UNMARKED = re.compile(rf"(?:(?<![0-9])-\\?[$€£]?)?{DIGITS}(?:/{DIGITS})?")
# Valid LaTeX on which the parser never finishes or never frees its memory; no answer contains it.
BOMB = re.compile(
    r"(?<!\\)!|\^[^a-zA-Z+]*\^|\^\s*[{(]?[-\s]*[0-9.]{5}|[0-9.]{50}|(?:[({\[][^(){}\[\]]*){20}"
)


def marked_answer(text):
    r"""The last answer marked by \boxed{...} or ####; None without a mark, "" where the last one is
    not closed."""
    marks = [*re.finditer(r"####|\\boxed|\\fbox", text)]
    if not marks:
        return None
    found = MARKED.match(text[marks[-1].start() :][:MAX_SPAN])
    return found[found.lastindex or 0].strip() if found else ""


def grade(completion, answer):
    r"""1.0 if the completion's answer equals the gold answer, else 0.0; never raises an exception.
    The completion's answer is the last one marked by \boxed{} or ####, or if there is no mark, its
    last number; there, "3/4" is a fraction, "1.5e3" is 1500, and a minus counts if it touches the
    number. Numbers are compared by value, everything else as LaTeX by math-verify. Its time limit,
    a second to parse and one to compare, relies on a signal that only the main thread receives; in
    other threads there is no limit."""
    completion, answer = (text.replace("−", "-").strip() for text in (completion, answer))
    given = marked_answer(completion)
    if given is None:
        given = ([""] + UNMARKED.findall(completion[-1000:]))[-1]
    if not given or len(given) > MAX_SPAN or len(answer) > MAX_SPAN:
        return 0.0
    numbers = NUMBER.fullmatch(given), NUMBER.fullmatch(answer)
    if all(numbers):
        a, b = (Fraction("".join(found.groups()).replace(",", "")) for found in numbers if found)
        return float(a == b)
    if given == answer or BOMB.search(given) or BOMB.search(answer):
        return float(given == answer)
    import math_verify  # a second to import: only where LaTeX is compared

    limit = 1 if threading.current_thread() is threading.main_thread() else None
    try:
        texts = (f"${text}$" for text in (answer, given))
        gold, found = (math_verify.parse(text, parsing_timeout=limit) for text in texts)
        return float(math_verify.verify(gold, found, timeout_seconds=limit))
    except Exception:  # sympy raises whatever it likes on text that is not mathematics
        return 0.0


def exact_match(completion, answer):
    """1.0 if the completion is the answer, character by character, else 0.0."""
    return float(completion == answer)


# Defaults of a task; train, test: a JSONL file, or PATH[:NAME]:SPLIT of load_dataset.
Task = namedtuple("Task", "train test model reward max_new_tokens lr instruction")
Problem = namedtuple("Problem", "question answer level prompt")  # prompt: in the model's tokens
QWEN = "Qwen/Qwen2.5-Math-1.5B"  # the paper's model
LAST = "{question}\nReason step by step, then give the answer as a number on the last line: #### N"
BOXED = "{question}\nReason step by step, and put the final answer within \\boxed{}."
HERE = f"{Path(__file__).resolve().parent}/assets"
LETTERS = f"{HERE}/letters/train.jsonl", f"{HERE}/letters/test.jsonl", f"{HERE}/letters/model"
ARITH = f"{HERE}/arith/train.jsonl", f"{HERE}/arith/test.jsonl", f"{HERE}/arith/model"
GSM8K = "openai/gsm8k:main:train", "openai/gsm8k:main:test", QWEN
MATH = "DigitalLearningGmbH/MATH-lighteval:default:train", "HuggingFaceH4/MATH-500:default:test"
TASKS = {
    "letters": Task(*LETTERS, exact_match, 6, 2e-4, "{question}"),
    "arith": Task(*ARITH, exact_match, 6, 3e-4, "{question}"),
    "gsm8k": Task(*GSM8K, grade, 512, 1e-6, LAST),
    "math": Task(*MATH, QWEN, grade, 1024, 1e-6, BOXED),
}
COLUMNS = ("question", "problem", "prompt"), ("answer", "final_answer", "solution")
OFFLINE = "(without a network, or away from its assets: --model DIR --data FILE.jsonl)"


def load_rows(source, graded, raw=None):
    """Question, final answer and level (None if missing) of every row of a JSONL file, of a hub
    data set PATH[:NAME]:SPLIT, or of `raw`, with `source` as its name. Raises InputError if
    it cannot be loaded, or if a row (counted from 1) lacks a question or an answer to grade."""
    try:
        if raw is None:
            path, *hub = [source] if Path(source).is_file() else source.split(":")
            raw = load_dataset(path, *hub[:-1], split=hub[-1]) if hub else Dataset.from_json(path)
    except Exception as error:  # what datasets raises has no common class
        raise InputError(f"cannot load {source}: {error} {OFFLINE}") from error
    found = [next((n for n in names if n in raw.column_names), "") for names in COLUMNS]
    if not all(found) or not len(raw):
        raise InputError(f"{source}: no row, or no column of each of {COLUMNS}: {raw.column_names}")
    rows, levels = [], raw["level"] if "level" in raw.column_names else [None] * len(raw)
    columns = zip(*(raw[name] for name in found), levels)
    for number, (asked, answer, level) in enumerate(columns, 1):
        text = "" if answer is None else str(answer).strip()
        final = marked_answer(text) or ("" if found[1] == "solution" else text)
        usable = isinstance(asked, str) and asked.strip() and final
        if not usable or graded and not grade(f"\\boxed{{{final}}}", final):
            missing = f"no {found[0]}, or no {found[1]} to grade: {text[-60:]!r}"
            raise InputError(f"{source}, row {number}: {missing}")
        rows.append((asked, final, level))
    return rows


def load_problems(config, dataset, reward):
    """Training and held-out rows (see load_rows) of dataset, files or task. Raises InputError."""
    task, graded = TASKS[config.task], reward is grade
    train = load_rows("dataset" if dataset else config.data or task.train, graded, dataset)
    test = config.eval_data or ("" if dataset or config.data else task.test)
    if test:
        return train, load_rows(test, graded)[: config.eval_problems]
    if len(train) < 3:
        raise InputError(f"{len(train)} problems are too few to hold any out: pass --eval-data")
    count = min(config.eval_problems, len(train) // 3)
    train = [train[row] for row in np.random.default_rng(0).permutation(len(train))]
    return train[count:], train[:count]


def encode_problems(rows, policy, config):
    """Problems with their prompts. Raises InputError for one longer than the model's context."""
    tokenizer = policy.tokenizer
    texts = [config.instruction.replace("{question}", question) for question, *_ in rows]
    chat = config.chat and getattr(tokenizer, "chat_template", None)
    if chat:
        dialogs = [[{"role": "user", "content": text}] for text in texts]
        texts = tokenizer.apply_chat_template(dialogs, tokenize=False, add_generation_prompt=True)
    prompts = tokenizer(texts, add_special_tokens=not chat)["input_ids"]
    context = getattr(policy.model.config, "max_position_embeddings", None) or sys.maxsize
    for text, prompt in zip(texts, prompts):
        if len(prompt) + config.max_new_tokens > context:
            raise InputError(f"over the context of {context} with new tokens: {text[:40]!r}")
    return [Problem(*row, prompt) for row, prompt in zip(rows, prompts)]  # type: ignore[call-arg]


def check_model(policy, prompt, config):
    """Raises InputError if rollout or training fails with this model, or if the two disagree.
    If the model overwrites tensors that autograd needs, sets a guard that keeps copies of them."""
    kind = policy.model.config.model_type
    refusal = f"model {config.model or config.task} ({kind}) cannot be used"
    limit = 1e-3 if policy.model.dtype == torch.float32 else 0.5  # of rounding, nats
    for T in (2, 8):  # some layers have a way of their own for a single token
        endless = replace(policy, eos_ids=[-1])
        uniforms = torch.full((1, 2, min(T, config.max_new_tokens)), 0.5)
        try:
            batch = rollout(endless, [prompt], uniforms, config.temperature)
            batch.advantages = batch.weights = torch.ones(1, 2)
            try:
                loss_gradient(policy, batch, [0, 1], config)
            except RuntimeError:
                policy.guard = torch.autograd.graph.allow_mutation_on_saved_tensors
                loss_gradient(policy, batch, [0, 1], config)
        except Exception as error:  # whatever another kind of model raises
            reason = "no slot for its state" if isinstance(error, IndexError) else error
            raise InputError(f"{refusal}: with a DynamicCache it fails: {reason}") from error
        apart = float((batch.old_logprobs - batch.logprobs).abs().max())
        if not apart <= limit:  # nor NaN
            raise InputError(f"{refusal}: rollout and training differ by {apart:.2g} nats")


# ------------------------ Files of a run, processes, and the command line -------------------------

CHECKPOINT = "checkpoint/state.safetensors"
LOGS = "metrics.jsonl", "prompts.jsonl", "samples.jsonl"
MAY_CHANGE = {"steps", "eval_every", "save_every", "micro_batch", "device", "out", "resume"}


def append(path, rows):
    """Add one JSON line a row; a number that is not finite, which JSON lacks, becomes null."""
    rows = json.loads(json.dumps(rows, default=Tensor.tolist), parse_constant=lambda name: None)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def save_checkpoint(config, policy, optimizer, step):
    """One safetensors file with masters, optimizer state and the logs' sizes; replaces the previous
    one atomically."""
    out, tensors = Path(config.out), {}  # type: ignore[var-annotated]
    path = out / CHECKPOINT
    for name, master in policy.masters.items():
        parts = {"weights": master.detach(), **optimizer.state[master]}
        tensors |= {f"{kind}.{name}": part for kind, part in parts.items() if part is not None}
    temporary = path.with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    logs = [out / name for name in LOGS if (out / name).exists()]
    sizes = {log.name: log.stat().st_size for log in logs}
    state = json.dumps({"step": step, "logs": sizes, "config": asdict(config)})
    try:
        save_file(tensors, temporary, metadata={"state": state})
        for file in (temporary, *logs):  # all on the disk before the previous one is gone
            with file.open("rb") as descriptor:
                os.fsync(descriptor.fileno())
        temporary.replace(path)
        (out / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    finally:  # on a full disk the previous one stays
        temporary.unlink(missing_ok=True)


def load_checkpoint(config, policy, optimizer, rank):
    """Restore weights, optimizer and logs as they were; returns the next step. Raises InputError,
    changing nothing on disk, for a damaged file, other settings or model, or missing log lines."""
    out = Path(config.out)
    path = out / CHECKPOINT
    try:
        with safe_open(path, "pt", device=config.device) as file:
            state = json.loads(file.metadata()["state"])
            then = {k: v for k, v in state["config"].items() if k not in MAY_CHANGE}
            then, now = asdict(replace(config, **then)), asdict(config)  # settled in one way
            # The dtype auto takes whatever the run had: its masters are float32.
            differ = {k: (v, now[k]) for k, v in then.items() if now[k] not in (v, "auto")}
            if differ:
                raise ValueError(f"other settings, saved and given: {differ}")
            if state["step"] > config.steps:
                raise ValueError(f"{state['step']} steps are done, over --steps {config.steps}")
            for name, size in state["logs"].items():
                if (out / name).stat().st_size < size:
                    raise ValueError(f"{name} is shorter than it was then")
            kinds = {name.split(".")[0] for name in file.keys()}  # noqa: SIM118
            for name, master in policy.masters.items():
                parts = {kind: file.get_tensor(f"{kind}.{name}") for kind in kinds}
                master.data.copy_(parts.pop("weights").view_as(master))
                optimizer.state[master] = parts
    except Exception as error:  # whatever a damaged file makes safetensors and torch raise
        raise InputError(f"cannot resume from {path}: {error}") from error
    policy.publish()
    for log in (out / name for name in LOGS if rank == 0 and (out / name).exists()):
        os.truncate(log, state["logs"].get(log.name, 0))
    return state["step"]


def join_processes(config):
    """This process's rank, and how many processes torchrun started; (0, 1) without torchrun.
    Raises InputError."""
    size, cuda = int(os.environ.get("WORLD_SIZE", 1)), "cuda" in config.device
    if size > config.prompts:
        raise InputError(f"{config.prompts} prompts a step are too few for {size} processes")
    if size == 1:
        return 0, 1
    if cuda:
        torch.cuda.set_device(config.device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return dist.get_rank(), size


def collective(operation, *arguments):
    """Run an operation that all processes take part in, or nothing if there is only one process.
    Raises RunError if another process has stopped."""
    try:
        if dist.is_initialized():
            operation(*arguments)
    except RuntimeError as error:
        raise RunError(f"another process has stopped: {error}") from error


def gather(part):
    """The lists of all processes, one after the other."""
    parts = [part] * (dist.get_world_size() if dist.is_initialized() else 1)
    collective(dist.all_gather_object, parts, part)
    return sum(parts, [])


def settle(config):
    """Check the settings, and fill in what depends on others. Raises InputError."""
    least = {"group": 2, "geometry_every": -1, "probe_every": -1, "temperature": 1e-3}
    least |= dict.fromkeys(("prompts", "epochs", "save_every", "eval_problems"), 1)
    for entry in fields(config):
        name, value, allowed = entry.name, getattr(config, entry.name), get_args(entry.type)
        if allowed and value not in allowed:
            raise InputError(f"{name} is {value!r}, not one of {', '.join(allowed).strip(', ')}")
        if isinstance(value, (int, float)) and not least.get(name, 0) <= value < math.inf:
            raise InputError(f"{name} is {value}, not a finite number from {least.get(name, 0)} on")
    if config.agg == "mean" or config.kl:
        if max(config.geometry_every, config.probe_every) > 0:
            raise InputError("agg mean and kl cannot be measured: leave out geometry and probe")
        config.geometry_every = config.probe_every = 0
    config.task = config.task or ("math" if config.model or config.data else "letters")
    task = TASKS[config.task]
    config.instruction = config.instruction or task.instruction
    if "{question}" not in config.instruction:
        raise InputError("instruction must contain {question}, where the problem goes")
    config.max_new_tokens = config.max_new_tokens or task.max_new_tokens
    config.lr = config.lr or task.lr * (10 if config.lora else 1)
    if config.device in ("auto", "cuda"):  # each process of a machine takes the GPU of its number
        cuda = config.device == "cuda" or torch.cuda.is_available()
        config.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
    try:
        torch.empty(0, dtype=torch.float64, device=config.device)  # which the measurements need
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"device {config.device} cannot be used: {error}") from error
    config.out = config.out or f"runs/{config.task}-{config.norm}-{config.seed}"


def main(arguments=None):
    """The command line; returns the exit status."""
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    about = str(__doc__).splitlines()[0]
    parser = HfArgumentParser(Config, prog="grpo.py", description=about, allow_abbrev=False)  # type: ignore[arg-type]
    parser.usage = argparse.SUPPRESS  # so that an error is one line
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), flags=re.M))
    for action in parser._actions:
        action.help = comments.get(action.dest, action.help)
    received = []

    def note(number, _):
        received.append(number)  # a step is not left in the middle, where weights are half updated
        signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nstopping after this step, with a checkpoint (a second time: at once)\n")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    try:
        train(Config(**vars(parser.parse_args(arguments))), stop=received)
    except (RunError, OSError, SafetensorError) as error:
        status = getattr(error, "status", 1)
        said = f"grpo.py: {'error' if status == 2 else 'stopped'}: {error}"
        print(*said.split(), file=sys.stderr)  # one line of what may be several
        return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
