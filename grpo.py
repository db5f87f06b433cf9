"""REINFORCE and GRPO on math problems in one file: why does GRPO divide by the standard deviation?

    pip install -r requirements.txt
    python grpo.py --norm std               # the embedded task, no download, a minute on a laptop
    python grpo.py --norm none              # the same prompts and random numbers without the division
    python grpo.py --task gsm8k             # a hub model and data set; --model DIR --data FILE.jsonl: your own
    python grpo.py --norm std --resume      # goes on where an interrupted run stopped
    torchrun --nproc_per_node 2 grpo.py     # the same run, its prompts shared out to two processes

A step: P prompts, G sampled completions each, rewards r [P, G], advantages A = (r - group mean) * scale, one ascent
step on the policy gradient. `--norm` chooses the scale and nothing else:

    none   1                                REINFORCE with the group mean as baseline
    std    1 / (sigma + eps)                GRPO (Shao et al. 2024, arXiv 2402.03300)
    var    1 / (sigma^2 + eps)              one power further: ascent on the log-odds of the pass rate
    batch  1 / (std of all P*G rewards + eps)

On the way it measures what Ge et al. (arXiv 2601.23135) explain the division by: the prompts' gradients, how orthogonal
they are, and the curvature along them. Where conventions differ, this file takes: population standard deviation (TRL,
verl, OpenRLHF: sample form), eps 1e-6; `--agg sequence`, the sum over a completion's tokens over the constant P*G,
(G-1)/G of the gradient of the expected reward (GRPO as published: `mean` over each sequence's tokens; DAPO: `token`,
over the batch's; Dr. GRPO: `--norm none --agg sequence` up to a constant). Where are the ratio and the clip? On-policy
with one update a batch the ratio is 1: they act with `--epochs` > 1. No KL term unless `--kl` > 0.

The file reads top to bottom, and what follows `train` can be skipped. The functions under "Mathematics" need torch and
their arguments alone (group_advantages: advantage_scale besides): copy them.
"""

import inspect
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Sequence
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
from torch.linalg import vector_norm
from torch.nn.utils import clip_grad_norm_
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.utils import logging as transformers_logging


class RunError(RuntimeError):
    """A run that cannot go on: one line, exit status 1 or as given, the last checkpoint whole."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(" ".join(message.split()))
        self.status = status


class InputError(RunError):
    """What the user gave cannot be used: one line, exit status 2, no run begun or changed."""


# ---------------------------- Settings: a field each; the command line is made from them ----------------------------


@dataclass
class Config:
    """Settings of a run; --help shows the comments. Raises InputError for a value out of range."""

    norm: Literal["none", "std", "var", "batch"] = "std"  # what advantages are divided by
    task: Literal["letters", "arith", "gsm8k", "math"] = "letters"  # problems and their reward
    model: str = ""  # a directory or hub name; empty: the task's
    lora: int = 0  # rank of adapters on all linear layers (alpha twice that); 0: train all weights
    data: str = ""  # training problems instead of the task's own: a JSONL file, or PATH[:NAME]:SPLIT of a hub data set
    eval_data: str = ""  # held-out problems, like --data; empty: the task's test split, or part of --data
    instruction: str = ""  # prompt text around {question}; empty: the task's
    chat: bool = True  # use the tokenizer's chat template if it has one
    prompts: int = 16  # P, prompts a step
    group: int = 16  # G, completions a prompt
    max_new_tokens: int = 0  # longest completion; 0: the task's
    temperature: float = 1.0  # of the sampled, and trained, distribution
    steps: int = 250  # batches sampled, each with --epochs updates
    lr: float = 0.0  # learning rate, after 10 steps of warm-up; 0: the task's, with adapters ten times that
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd is what the theory speaks of
    max_grad_norm: float = 10.0  # clip the gradient, which has the norm's scale, to this size; 0: never
    agg: Literal["sequence", "mean", "token"] = "sequence"  # how token terms become a loss
    epochs: int = 1  # updates a batch; above 1 the importance ratio is clipped
    clip: float = 0.2  # range of the importance ratio around 1
    kl: float = 0.0  # weight of the KL term against the frozen start policy
    micro_batch: int = 0  # completion tokens of one training pass at most; 0: by size of the vocabulary
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the weights; auto: bfloat16 on CUDA
    device: str = "auto"  # torch device; auto: cuda if there is one, else cpu
    seed: int = 0  # of prompts' order and sampling
    geometry_every: int = -1  # measure prompt gradients; 0: never; -1: 1 up to a million parameters, else 25
    probe_every: int = -1  # measure curvature; 0: never; -1: 10 up to a million parameters, else 25
    eval_every: int = 50  # steps between evaluations on held-out problems; 0: start and end alone
    eval_problems: int = 512  # held-out problems (of one --data file at most a third)
    save_every: int = 50  # steps between checkpoints
    out: str = ""  # run directory; empty: runs/TASK-NORM-SEED
    resume: bool = False  # continue the run in --out

    def __post_init__(self) -> None:
        least = {"group": 2, "geometry_every": -1, "probe_every": -1, "temperature": 1e-3}
        least |= dict.fromkeys(("prompts", "epochs", "save_every", "eval_problems"), 1)
        for entry in fields(self):
            name, value, allowed = entry.name, getattr(self, entry.name), get_args(entry.type)
            if allowed and value not in allowed:
                raise InputError(f"{name} is {value!r}, not one of {', '.join(allowed)}")
            if isinstance(value, (int, float)) and not (low := least.get(name, 0)) <= value < math.inf:
                raise InputError(f"{name} is {value}, not a number from {low} on")
        if max(self.geometry_every, self.probe_every) > 0 and (self.agg == "mean" or self.kl):
            raise InputError("with agg mean or kl the loss's gradient is not the policy gradient: nothing to measure")
        task = TASKS[self.task]
        self.instruction = self.instruction or task.instruction
        if "{question}" not in self.instruction:
            raise InputError("instruction has no {question}, so no prompt would hold its problem")
        self.max_new_tokens = self.max_new_tokens or task.max_new_tokens
        self.lr = self.lr or task.lr * (10 if self.lora else 1)
        if self.device in ("auto", "cuda"):  # of several processes on a machine each takes the GPU of its number
            gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            self.device = gpu if self.device == "cuda" or torch.cuda.is_available() else "cpu"
        try:
            torch.empty(0, dtype=torch.float64, device=self.device)  # which the measurements need
        except (RuntimeError, AssertionError, TypeError) as error:
            raise InputError(f"device {self.device} cannot be used: {error}") from error
        self.dtype = ("bfloat16" if "cuda" in self.device else "float32") if self.dtype == "auto" else self.dtype
        self.out = self.out or f"runs/{self.task}-{self.norm}-{self.seed}"


# ------------------ Mathematics: pure functions of torch and their arguments, to be copied freely -------------------


def advantage_scale(rewards, norm, eps=1e-6):
    """What each prompt's centred rewards are multiplied by. rewards: [P, G] -> [P, 1]. norm: "none" 1, "std" 1 / (sigma
    + eps), "var" 1 / (sigma^2 + eps), "batch" 1 / (deviation of all + eps); population deviations (correction=0).
    0 for a group of equal rewards under every norm: there rounding alone would be divided by eps."""
    std = rewards.std(dim=1, correction=0, keepdim=True)  # [P, 1]
    scale = {
        "none": torch.ones_like(std),
        "std": 1 / (std + eps),
        "var": 1 / (std**2 + eps),
        "batch": 1 / (rewards.std(correction=0) + eps).expand_as(std),
    }[norm]
    return torch.where(rewards.amax(dim=1, keepdim=True) > rewards.amin(dim=1, keepdim=True), scale, 0.0)


def group_advantages(rewards, norm, eps=1e-6):
    """Advantages relative to the own group, (r - group mean) * scale (arXiv 2402.03300, 4.1.2); calls advantage_scale.
    rewards: [P, G], G completions for each of P prompts -> [P, G]."""
    return (rewards - rewards.mean(dim=1, keepdim=True)) * advantage_scale(rewards, norm, eps)


def token_weights(lengths, agg):
    """What each token's term counts in the batch loss; fixed for the whole batch, so no split of it matters.
    lengths: [P, G] tokens of each completion. agg: "sequence" 1/(P*G) (the policy gradient of the whole completion),
    "mean" 1/(P*G*length) (GRPO as published), "token" 1/(all tokens) (DAPO, arXiv 2503.14476). Returns [P, G]."""
    count = {"sequence": lengths.numel(), "mean": lengths.numel() * lengths, "token": lengths.sum()}[agg]
    return torch.ones_like(lengths, dtype=torch.float32) / count


def policy_loss(logprobs, old_logprobs, advantages, weights, clip):
    """Clipped policy-gradient loss, -sum of weights * min(ratio * A, clip(ratio) * A) (PPO, arXiv 1707.06347, eq. 7).
    Log-probabilities in nats; all of one shape, or broadcast to it, an entry a token. Where old_logprobs =
    logprobs.detach() the ratio is 1 and the gradient is REINFORCE's, -sum of weights * A * grad logprobs."""
    ratio = (logprobs - old_logprobs).exp()
    bounded = ratio.clamp(1 - clip, 1 + clip)
    return -(weights * torch.minimum(ratio * advantages, bounded * advantages)).sum()


def k3_divergence(logprobs, old_logprobs, reference_logprobs):
    """Estimate per token, in nats, of KL(policy || reference): ratio * (exp(d) - d - 1) >= 0, d = reference - policy.
    Equal shapes. k3 (Schulman, "Approximating KL Divergence", 2020) times the ratio policy / old, neither detached nor
    clipped: without it the gradient would be that of KL(reference || policy) (arXiv 2505.17508)."""
    difference = reference_logprobs - logprobs
    return (logprobs - old_logprobs).exp() * (torch.expm1(difference) - difference)


def token_logprobs(logits, tokens, temperature):
    """Log-probabilities in nats, float32 at least, of tokens [N] under softmax(logits [N, V] / temperature) -> [N]."""
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True).div_(temperature)
    return scaled.log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]


def sample_tokens(logits, uniforms, temperature):
    """Draw one token a row from softmax(logits / temperature), and nothing else: no top-k, no top-p, no penalty.
    logits: [N, V]; uniforms: [N] in [0, 1), a token each; temperature 0 takes the most likely token. Returns tokens,
    their log-probabilities and the distributions' entropies, [N] each, in nats (at temperature 0 those of 1)."""
    scaled = logits.to(torch.float32, copy=True).div_(temperature or 1.0)  # [N, V]
    logprobs = scaled.log_softmax(dim=-1).clamp_(min=torch.finfo(torch.float32).min)  # so that 0 * log 0 is 0
    probs = torch.exp(logprobs, out=scaled)
    cumulative = probs.cumsum(dim=-1)
    # Rounding leaves the last cumulative value a little off 1: the target is a share of that value instead.
    target = uniforms[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    tokens = tokens if temperature else logits.argmax(dim=-1)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0], -torch.linalg.vecdot(probs, logprobs)


def count_sketch(tensors, size, seed):
    """Random projection [size] of the tensors, taken as one long vector, that preserves inner products.
    Every coordinate gets a random sign and is added to one of `size` sums (Charikar, Chen, Farach-Colton 2002). Of two
    vectors with one seed the sketches' inner product is unbiased, its deviation about |a| |b| / sqrt(size)."""
    device = tensors[0].device
    generator, sums = torch.Generator(device).manual_seed(seed), torch.zeros(size, device=device)
    for tensor in tensors:
        signs = torch.empty(tensor.numel(), dtype=torch.int8, device=device).random_(0, 2, generator=generator)
        parts = (tensor.detach().flatten().float() * (signs * 2 - 1)).split(size)
        # Every part starts at another sum: a matrix's large columns would else be added to each other.
        starts = torch.randint(size, (len(parts),), generator=generator, device=device)
        for part, start in zip(parts, starts.tolist()):
            sums += torch.nn.functional.pad(part, (0, size - len(part))).roll(start)
    return sums


def gradient_geometry(gram, half_products, group):
    """How the gradients of P prompts lie to each other, as sampled and with the sampling noise taken out.
    gram: [P, P] inner products of their gradients, from leave-one-out advantages, zeros where all rewards are equal.
    half_products: [P], of the gradients of the two halves of a prompt's group of `group` completions, means over their
    half. Of pairs of gradients: the cosine's mean, deviation, shares above 0 and below 0.1 in size, mean size.
    interference = |sum g|^2 / sum |g|^2: 1 if orthogonal, P if equal, below 1 in conflict. signal_share: the part of
    sum |g|^2 that is not noise; cos_signal: mean inner product of two prompts over the mean squared norm, unbiased,
    as E<g_A, g_B> = (1 + 1/(G-1)^2) |g|^2 on-policy. NaN for what lacks two gradients, or a signal."""
    P, squares, present = len(gram), gram.diagonal(), gram.diagonal() > 0
    count, norms = int(present.sum()), squares[present].sqrt()
    cosines = gram[present][:, present] / (norms[:, None] * norms)
    cosines = cosines[torch.ones_like(cosines).triu(1) > 0]  # [pairs]; the mean of none is NaN
    total = squares.sum() if count > 1 else squares.sum() * float("nan")
    signal = half_products.sum() / (1 + 1 / (group - 1) ** 2)
    values = {
        "cos_mean": cosines.mean(),
        "cos_std": (cosines - cosines.mean()).square().mean().sqrt(),
        "cos_positive": (cosines > 0).double().mean(),
        "cos_small": (cosines.abs() < 0.1).double().mean(),
        "cos_abs": cosines.abs().mean(),
        "interference": gram.sum() / total,
        "signal_share": signal / total,
        "cos_signal": (gram.sum() - total) / (P - 1) / signal.where(signal > 0, float("nan")),
    }
    return {"n_gradients": count, **{name: float(value) for name, value in values.items()}}


def directional_curvature(sequence_logprobs, parameters, direction, advantages, slope):
    """Curvature v'Hv of the sequence-level surrogate mean(A * pi_new(y) / pi(y)) along v, by forward passes alone.
    sequence_logprobs: from parameters (a dict of float32 tensors) to the log-probabilities [n] of n sampled sequences,
    in nats. direction: of the same names, v = direction / |direction|. advantages: [n]. slope: a guess of how fast the
    log-probabilities change along v. Returns reward / parameter^2, the second difference over a step that changes them
    by 0.03 to 0.1 (root mean square, within a factor of 2): at the sampling policy the sample Hessian of the expected
    reward, which a token-level ratio's is not. NaN where no such step is found, or rounding would blur the result."""
    # In float64: torch's float32 norm of 10^8 numbers is off by a percent on a CPU.
    norm = float(sum(torch.linalg.vector_norm(v, dtype=torch.float64) ** 2 for v in direction.values())) ** 0.5
    if not 0 < norm < float("inf"):
        return float("nan")
    if not advantages.any():
        return 0.0

    def change(step):
        """Of the log-probabilities [n], by a step of this length along v."""
        return sequence_logprobs({k: p.float() + direction[k].float() * (step / norm) for k, p in parameters.items()})

    with torch.no_grad():
        start = change(0.0)
        rounding = torch.finfo(torch.float32).eps * float(start.abs().mean() + 1)
        wanted = min(max((rounding / 0.02) ** 0.5, 0.03), 0.1)
        step = wanted / slope
        for _ in range(4):
            ahead = change(step) - start
            size = float(ahead.square().mean().sqrt())
            if wanted / 2 < size < wanted * 2:
                break
            step *= min(max(wanted / max(size, 1e-30), 1e-3), 1e3)
        if not wanted / 2 < size < wanted * 2 or rounding > 0.1 * size**2:
            return float("nan")
        # expm1 keeps the digits that exp loses next to 1.
        return float((advantages * (ahead.expm1() + (change(-step) - start).expm1())).mean()) / step**2


# ------------------------ Model: working weights, and the float32 masters that are optimized ------------------------


@dataclass
class Policy:
    """A causal language model, what turns text into its tokens, and the float32 weights that the optimizer steps."""

    model: Any
    tokenizer: Any
    eos_ids: list[int]
    parameters: list[Tensor]  # the model's, those that are trained
    masters: dict[str, Tensor]  # the same by name in float32: the parameters themselves where they are
    sizes: list[int]  # of each; a gradient is one float32 vector [D] of all of them

    def publish(self) -> None:
        """Copy the masters into the working weights, so that rollout and training see the same policy."""
        for master, parameter in zip(self.masters.values(), self.parameters):
            if master is not parameter:
                parameter.data.copy_(master)


def load_policy(config: Config):
    """The start policy. Raises InputError for a model that cannot be loaded or names no end token."""
    path = config.model or TASKS[config.task].model
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=config.dtype, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if config.device == "cpu" and model.config._attn_implementation == "sdpa":
            AttentionInterface.register("grouped", grouped_attention)
            AttentionMaskInterface.register("grouped", eager_mask)
            model.set_attn_implementation("grouped")
        if config.lora:  # arXiv 2106.09685; in float32, beside weights of any type
            import peft

            torch.manual_seed(0)  # the same start for every norm, seed and process
            model = peft.get_peft_model(
                model, peft.LoraConfig(r=config.lora, lora_alpha=2 * config.lora, target_modules="all-linear")
            )
    except Exception as error:  # transformers raises OSError, ValueError, ImportError, SafetensorError, ...
        raise InputError(f"cannot load model {path}: {error} {OFFLINE}") from error
    model.to(config.device).eval()  # dropout would make the trained distribution another one than the sampled
    ends = getattr(model.generation_config, "eos_token_id", None)  # None, one id, or several
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    if not ends:
        raise InputError(f"model {path} names no end-of-sequence token")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    masters = {name: p if p.dtype == torch.float32 else p.detach().float() for name, p in trained.items()}
    sizes = [master.numel() for master in masters.values()]
    return Policy(model, tokenizer, sorted(ends), list(trained.values()), masters, sizes)


def grouped_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **options):
    """Attention by two matrix products, query heads that share a key head as further queries of it; for CPUs, faster.
    query: [B, H, T, D]; key, value: [B, K, N, D], K divides H; mask: [B or 1, 1, T, N], added. Returns [B, T, H, D]."""
    if any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError("attention that is no plain softmax")
    grouped = query.unflatten(1, (key.shape[1], -1)) * scaling  # [B, K, H/K, T, D]
    scores = (grouped.flatten(2, 3) @ key.transpose(2, 3)).unflatten(2, grouped.shape[2:4])
    probs = (scores + mask[:, :, None]).softmax(dim=-1)  # [B, K, H/K, T, N]
    return (probs.flatten(2, 3) @ value).reshape(query.shape).transpose(1, 2).contiguous(), None


def with_weights(model: Any, weights: dict):
    """The model's forward at other weights, given by parameter name; those not named stay as they are."""
    return lambda *args, **named: torch.func.functional_call(model, weights, args, named)


# -------------------- Rollout: sample completions from exactly the distribution that is trained ---------------------

ORDER, TRAIN, EVALUATE = range(3)  # what a random stream is for


def prompt_rows(step: int, config: Config, problems: int):
    """The step's P rows: the problems in a seeded order, a new order each time they are used up."""
    slots = (divmod(slot, problems) for slot in range(step * config.prompts, (step + 1) * config.prompts))
    return [int(np.random.default_rng((config.seed, ORDER, epoch)).permutation(problems)[i]) for epoch, i in slots]


def draw(config: Config, purpose: int, step: int, rows: Sequence[int], group: int):
    """Uniforms [rows, group, T]: every row of every step has its own stream, whatever else is sampled beside it."""
    streams = (np.random.default_rng((config.seed, purpose, step, row)) for row in rows)
    return torch.from_numpy(np.stack([each.random((group, config.max_new_tokens), np.float32) for each in streams]))


@dataclass
class Group:
    """The G completions of one prompt, on the CPU; what lies beyond a completion's length is 0 and not part of it."""

    prompt: Tensor  # [L] its tokens
    feature: Tensor  # [D] mean over the prompt's tokens of the hidden states that the output layer reads
    tokens: Tensor  # [G, T] sampled, the end token included
    lengths: Tensor  # [G]
    logprobs: Tensor  # [G, T] of the tokens, nats
    entropy: Tensor  # [G, T] of the distributions that they were drawn from, nats
    truncated: Tensor  # [G] bool: no end token within T
    texts: Any = None  # [G] str; this and what follows are known later
    rewards: Any = None  # [G]
    advantages: Any = None  # [G]
    weights: Any = None  # [G] what each token's term counts
    old: Any = None  # [G, T] log-probabilities that the importance ratio is taken to; None: the present ones, ratio 1


@torch.no_grad()
def rollout(policy: Policy, prompts: list, uniforms: Tensor, temperature: float) -> list[Group]:
    """Sample G completions of at most T tokens for each of P prompts (token lists); temperature 0 is greedy.
    uniforms: [P, G, T] in [0, 1). Every prompt is encoded once, its cache repeated; rows that ended leave the batch."""
    model, device = policy.model, policy.model.device
    P, G, T = uniforms.shape
    uniforms, ends = uniforms.view(P * G, T).to(device), torch.tensor(policy.eos_ids, device=device)
    sizes = torch.tensor([len(prompt) for prompt in prompts], device=device)  # [P]
    width = int(sizes.max())
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)  # [P, width]
    mask = (torch.arange(width, device=device) >= width - sizes[:, None]).long()
    position = (mask.cumsum(1) - 1).clamp(min=0)  # of left-padded rows, which absolute ones depend on
    cache = DynamicCache()  # given: a sliding-window model's own keeps too few keys
    # The last logits, by index: from a slice's strided view torch would copy the output layer for every prompt.
    options: dict = dict(past_key_values=cache, use_cache=True, logits_to_keep=torch.tensor([-1]))
    output = model(ids, attention_mask=mask, position_ids=position, output_hidden_states=G > 1, **options)
    hidden = output.hidden_states[-1].float() if G > 1 else mask[..., None]  # large, and of no use in an evaluation
    features = (hidden * mask[..., None]).sum(1) / sizes[:, None]  # [P, D]
    cache.batch_repeat_interleave(G)
    logits, mask, position = (x.repeat_interleave(G, 0) for x in (output.logits, mask, sizes[:, None]))
    tokens = torch.zeros(P * G, T, dtype=torch.long, device=device)
    logprobs, entropy = torch.zeros(2, P * G, T, device=device)
    lengths, ended = torch.zeros_like(mask[:, 0]), torch.zeros(P * G, dtype=torch.bool, device=device)
    rows = torch.arange(P * G, device=device)  # of the batch, those that still run
    for t in range(T):
        drawn, logprobs[rows, t], entropy[rows, t] = sample_tokens(logits[:, -1], uniforms[rows, t], temperature)
        tokens[rows, t] = drawn
        lengths[rows] += ~ended[rows]
        ended[rows] |= torch.isin(drawn, ends)
        running = (~ended[rows]).nonzero()[:, 0]
        if len(running) < 0.9 * len(rows):  # which copies the cache: not for every row that ends
            rows, drawn, mask = rows[running], drawn[running], mask[running]
            cache.batch_select_indices(running)
        if t + 1 == T or len(rows) == 0:
            break
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        logits = model(drawn[:, None], attention_mask=mask, position_ids=position[rows] + t, **options).logits
    inside = torch.arange(T, device=device) < lengths[:, None]
    columns = (tokens.where(inside, 0), lengths, logprobs.where(inside, 0), entropy.where(inside, 0), ~ended)
    groups = zip(features.cpu(), *(column.cpu().unflatten(0, (P, G)) for column in columns))
    return [Group(torch.tensor(prompt), *rest) for prompt, rest in zip(prompts, groups)]


def score(policy: Policy, groups: list[Group], problems: list, reward: Callable):
    """Give every group the texts of its completions, without special tokens, and their rewards; returns the groups.
    Raises RunError, naming the completion, for a reward that fails or is no finite number."""
    for group, problem in zip(groups, problems):
        parts = [row[:length] for row, length in zip(group.tokens.tolist(), group.lengths.tolist())]
        group.texts = policy.tokenizer.batch_decode(parts, skip_special_tokens=True)
        group.rewards = torch.zeros(len(parts), dtype=torch.float64)
        for g, text in enumerate(group.texts):
            try:
                group.rewards[g] = value = float(reward(text, problem.answer))
                if not math.isfinite(value):
                    raise ValueError("not a finite number")
            except Exception as error:
                raise RunError(f"the reward failed: {error!r}, {text=}, answer={problem.answer!r}") from error
    return groups


def pass_rates(rewards: Tensor):
    """Share of rewards equal to 1 in each row, [P, G] -> [P]; NaN (in the log: null) where one lies outside [0, 1]."""
    inside = ((rewards >= 0) & (rewards <= 1)).all(dim=1)
    return torch.where(inside, (rewards == 1).double().mean(dim=1), math.nan)


def evaluate(policy: Policy, problems: list, mine: range, reward: Callable, config: Config):
    """A sampled and a greedy completion, a group each, of every problem in this process's share, `mine`.
    The random numbers are always the same, so that what differs between two evaluations is the policy."""
    found: list = [[], []]
    for start in range(0, len(mine), config.prompts * config.group):  # as many rows at once as in training
        rows = mine[start : start + config.prompts * config.group]
        part, uniforms = [problems[row] for row in rows], draw(config, EVALUATE, 0, rows, 1)
        for groups, temperature in zip(found, (config.temperature, 0.0)):
            sampled = rollout(policy, [problem.prompt for problem in part], uniforms, temperature)
            groups += score(policy, sampled, part, reward)
    return found


# --------------------------------- Gradient: of one prompt's completions, in passes ---------------------------------


def pass_logprobs(forward: Callable, group: Group, rows: list[int], config: Config):
    """Passes of at most config.micro_batch tokens, or one completion: rows, and their log-probabilities [n, T] in nats.
    forward: the model, or it at other weights. The longest completions come first; T is a pass's longest, beyond the
    others stands 0. The prompt is encoded once a pass. Padding, on the right, is seen by no completion: no mask."""
    rows, prompt = sorted(rows, key=lambda row: -int(group.lengths[row])), group.prompt.to(config.device)
    while rows:
        n = max(1, config.micro_batch // int(group.lengths[rows[0]]))
        part, rows = rows[:n], rows[n:]
        lengths = group.lengths[part]
        tokens = group.tokens[part, : int(lengths[0])].to(config.device)  # [n, T]
        cache = DynamicCache()  # given, as in the rollout
        if len(prompt) > 1:  # the last token starts the completions
            forward(prompt[None, :-1], past_key_values=cache, use_cache=True, logits_to_keep=torch.tensor([-1]))
            cache.batch_repeat_interleave(len(part))
        inputs = torch.cat([prompt[-1].expand(len(part), 1), tokens[:, :-1]], dim=1)
        logits = forward(inputs, past_key_values=cache, use_cache=True).logits  # [n, T, V]
        logprobs = token_logprobs(logits.flatten(0, 1), tokens.flatten(), config.temperature).view_as(tokens)
        inside = torch.arange(tokens.shape[1]) < lengths[:, None]
        yield part, torch.where(inside.to(config.device), logprobs, 0.0)


def group_gradient(policy: Policy, group: Group, rows: list, config: Config, gradient: Tensor, reference: Any = None):
    """Add to `gradient` [D] that of some completions' loss; returns their log-probabilities [G, T], else 0.
    reference: the forward of the KL term's policy, or None."""
    found = torch.zeros_like(group.logprobs)
    for part, logprobs in pass_logprobs(policy.model, group, rows, config):
        T = logprobs.shape[1]
        found[part, :T] = logprobs.detach().cpu()
        old = logprobs.detach() if group.old is None else group.old[part, :T].to(logprobs)
        advantages, weights = (each[part, None].to(logprobs) for each in (group.advantages, group.weights))
        loss = policy_loss(logprobs, old, advantages, weights, config.clip)
        if reference:
            ((_, anchor),) = pass_logprobs(reference, group, part, config)
            loss = loss + config.kl * (weights * k3_divergence(logprobs, old, anchor)).sum()
        parts = torch.autograd.grad(loss, policy.parameters, materialize_grads=True)
        for total, new in zip(gradient.split(policy.sizes), parts):
            total += new.flatten()
    return found


def make_optimizer(masters: list[Tensor], config: Config) -> Any:
    """Plain SGD, or AdamW without weight decay: the start policy is not to be forgotten."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(masters, lr=config.lr)
    return torch.optim.AdamW(masters, lr=config.lr, weight_decay=0.0, fused=True)


# ---------------------- Measurement: a group's two halves A and B are two looks at its prompt -----------------------

SMALL = 1_000_000  # trained parameters up to which gradients are kept whole and measured often
SKETCH = 65_536  # numbers kept of larger ones


def measured_gradient(policy: Policy, group: Group, scale: Tensor, config: Config, gradient: Tensor, probe: bool):
    """group_gradient in two halves, each measured on the way; returns the log-probabilities and what was found.
    scale: of the centred rewards, 0 if all are equal. A half's own gradient is that of the expected reward:
    uphill, the mean over the half of leave-one-out advantages * grad log pi. Found, as pairs of the halves: vectors
    [2, D], whole or sketched, and the columns of prompts.jsonl for probe steps."""
    G, rewards, square = len(group.rewards), group.rewards, lambda v: float(vector_norm(v, dtype=torch.float64)) ** 2
    uphill = replace(group, advantages=(rewards - rewards.mean()) * G / (G - 1))
    logprobs, vectors, scores = torch.zeros_like(group.logprobs), [], torch.zeros_like(gradient) if probe else gradient
    found: dict = {"curvature": [], "reward_std_half": [], "pass_rate_half": [], "fisher_half": []}
    halves = [list(range((G + 1) // 2)), list(range((G + 1) // 2, G))]
    for rows, others in (halves, halves[::-1]):
        uphill.weights, own = torch.full((G,), -1 / len(rows)), torch.zeros_like(gradient)
        if scale:
            logprobs += group_gradient(policy, uphill, rows, config, own)
            # From uphill, by a half's leave-one-out mean, back to the whole batch's loss.
            gradient.add_(own, alpha=-float(group.weights[0] * scale) * len(rows) * (G - 1) / G)
        vectors.append((own if len(own) <= SMALL else count_sketch(own.split(1 << 24), SKETCH, seed=0)).cpu())
        if probe:
            found["curvature"].append(probe_curvature(policy, group, rows, others, own, config))
            found["reward_std_half"].append(rewards[rows].std(correction=0))
            found["pass_rate_half"].append(pass_rates(rewards[None, rows])[0])
            # The paper's Fisher proxy (4.3): n |mean of grad log pi(y)|^2, no reward in it.
            own = torch.zeros_like(gradient)
            group_gradient(policy, replace(uphill, advantages=torch.ones(G)), rows, config, own)
            found["fisher_half"].append(len(rows) * square(own))
            scores.add_(own, alpha=len(rows) / G)
    return logprobs, (found | {"fisher": G * square(scores)} if probe else {}) | {"vectors": torch.stack(vectors)}


def probe_curvature(policy: Policy, group: Group, rows: list, others: list, gradient: Tensor, config: Config):
    """Curvature of the prompt's expected reward along the gradient of one half's rows, on the other half's samples.
    The other half has its own leave-one-out baseline: next to nothing of the direction's noise is in it. NaN if it is a
    single completion, or the direction's half was rewarded alike: its gradient then is of the others' rewards alone."""
    n, rewards = len(others), group.rewards[others]
    if n < 2 or group.rewards[rows].max() == group.rewards[rows].min():
        return math.nan
    # All weights in float32: a second difference drowns in bfloat16.
    frozen = {name: p.float() for name, p in policy.model.named_parameters() if name not in policy.masters}

    def sequence_logprobs(parameters: dict) -> Tensor:
        found = torch.zeros(len(group.rewards), dtype=torch.float64)
        for part, logprobs in pass_logprobs(with_weights(policy.model, frozen | parameters), group, others, config):
            found[part] = logprobs.double().sum(1).cpu()
        return found[others]

    # The gradient is a mean of advantage * score: over the rewards' deviation it is about the scores' size along it.
    slope = float(vector_norm(gradient, dtype=torch.float64) / group.rewards.std(correction=0))
    parts = zip(policy.masters.items(), gradient.split(policy.sizes))
    direction = {name: part.view_as(master) for (name, master), part in parts}
    advantages = (rewards - rewards.mean()) * n / (n - 1)
    return directional_curvature(sequence_logprobs, policy.masters, direction, advantages, slope)


def describe_measured(groups: list[Group], scale: Tensor, found: list, geometry: bool):
    """The measurements' part of the step's log line, and of its prompts' lines by column; found: of all P prompts."""
    G, line = len(groups[0].rewards), dict[str, Any]()
    columns: dict = {name: [each[name] for each in found] for name in found[0] if name != "vectors"}
    if columns:
        line["curvature"] = torch.tensor(columns["curvature"]).nanmean()
    if geometry:
        A, B = torch.stack([each["vectors"] for each in found], dim=1).double()  # [P, D]
        whole, products, features = (A * ((G + 1) // 2) + B * (G // 2)) / G, (A * B).sum(1), stack(groups, "feature")
        gram = whole @ whole.T
        norms = gram.diagonal().sqrt()
        line |= gradient_geometry(gram, products, G)
        for name, x in (("feature_cos", features), ("feature_cos_centered", features - features.mean(dim=0))):
            line[name] = gradient_geometry((x @ x.T).double(), products, G)["cos_abs"]
        columns |= {"grad_norm": norms, "grad_sq_signal": products / (1 + 1 / (G - 1) ** 2)}
        # Of a prompt without a gradient 0/0. The update is the sum of scaled gradients, before clipping and optimizer.
        columns["cos_update"] = gram @ scale / (norms * (scale @ gram @ scale).sqrt())
    return line, columns


def stack(groups: list[Group], name: str):
    """One field of all P groups, [P, ...]."""
    return torch.stack([getattr(group, name) for group in groups])


# ---------------------------------- train: the algorithm, in the order it happens -----------------------------------


def train(config: Config, dataset: Dataset | None = None, reward: Callable | None = None, stop: Sequence[int] = ()):
    """Run a training from start policy to saved model; everything it leaves lies in config.out.
    dataset: problems with columns question and answer instead of the task's own; reward(completion, answer) -> float
    instead of the task's; stop: once a signal's number is in it, the run ends between two steps. Returns the last
    evaluation. Raises InputError before a run is begun or changed, RunError where it cannot go on or was stopped."""
    out, P, G, reward = Path(config.out), config.prompts, config.group, reward or TASKS[config.task].reward
    if not config.resume and ((out / CHECKPOINT).exists() or (out / LOGS[0]).exists()):
        raise InputError(f"{out} holds a run: add --resume to continue it, or --out OTHER_DIR to start a new one")
    splits = load_problems(config, dataset, reward)
    rank, size = join_processes(config)
    policy = load_policy(config)
    problems, held_out = (encode_problems(rows, policy, config) for rows in splits)
    mine, mine_held_out = (range(rank * n // size, (rank + 1) * n // size) for n in (P, len(held_out)))
    # A pass holds its logits and their gradient: a CPU has no use for large ones, a GPU room for some gigabytes.
    most = (1 << (28 if "cuda" in config.device else 25)) // policy.model.config.vocab_size
    config = replace(config, micro_batch=config.micro_batch or min(4096, most))
    check_model(policy, max((problem.prompt for problem in problems), key=len), config)
    masters, trained, limit = list(policy.masters.values()), sum(policy.sizes), config.max_grad_norm or math.inf
    # The KL term's policy is the present one: a second copy of what is trained, and of no more.
    first = {name: p.detach().clone() for name, p in zip(policy.masters, policy.parameters) if config.kl}
    reference = torch.no_grad()(with_weights(policy.model, first)) if first else None
    optimizer = make_optimizer(masters, config)
    measurable = config.agg != "mean" and not config.kl
    asked = zip((config.geometry_every, config.probe_every), (1, 10) if trained <= SMALL else (25, 25))
    every = [measurable * (usual if given < 0 else given) for given, usual in asked]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error}") from error
    gather([])  # all have seen what is in --out before the first process writes there
    start, failed = load_checkpoint(config, policy, optimizer, rank) if config.resume else 0, 0
    if rank == 0:
        save_checkpoint(config, policy, optimizer, start)
        print(f"{config.task}, {len(problems):,} problems; {trained:,} parameters; norm {config.norm}")

    for step in range(start, config.steps + 1):
        number = max(gather(list(stop)), default=0)  # together: all processes have taken the same steps
        if rank == 0 and step > start and (number or step == config.steps or step % config.save_every == 0):
            save_checkpoint(config, policy, optimizer, step)
        if number:
            raise RunError(f"{signal.Signals(number).name}: the same command with --resume goes on", 128 + number)
        evaluation: dict = {}
        if step in (0, config.steps) or (config.eval_every and step % config.eval_every == 0):
            both = [gather(groups) for groups in evaluate(policy, held_out, mine_held_out, reward, config)]
            values = torch.stack([stack(groups, "rewards")[:, 0] for groups in both])  # [2, held out]
            names = ("eval_pass_rate", "eval_greedy", "eval_reward", "eval_greedy_reward")
            evaluation = dict(zip(names, torch.cat([pass_rates(values), values.mean(dim=1)]).tolist()))
            for problem, group in zip(held_out[:4] if rank == 0 else [], both[0]):
                sample = {"step": step, "question": problem.question, "completion": group.texts[0]}
                append(out / LOGS[2], [sample | {"answer": problem.answer, "reward": group.rewards[0]}])
        if step == config.steps:
            break
        began = time.perf_counter()

        # Prompts, and a random number for each token that may be sampled: the same ones under every norm.
        ids = prompt_rows(step, config, len(problems))  # [P] rows of the problems
        own = [problems[ids[p]] for p in mine]  # [P'], this process's
        uniforms = draw(config, TRAIN, step, mine, G)  # [P', G, T]

        # Rollout and rewards.
        groups = rollout(policy, [problem.prompt for problem in own], uniforms, config.temperature)
        groups = gather(score(policy, groups, own, reward))  # [P]
        rewards, lengths = stack(groups, "rewards"), stack(groups, "lengths")  # [P, G]
        sampled = time.perf_counter()

        # Advantages: here REINFORCE (none) and GRPO (std) part, and nowhere else.
        advantages = group_advantages(rewards, config.norm)  # [P, G]
        scale = advantage_scale(rewards, config.norm)[:, 0]  # [P]
        weights = token_weights(lengths, config.agg)  # [P, G]

        # Gradient, a prompt at a time. One whose completions were all rewarded alike has none, unless there is KL.
        geometry, probe = (e > 0 and step % e == 0 for e in every)
        measured, norms, gaps = [], [], []
        optimizer.param_groups[0]["lr"] = config.lr * min(1.0, (step + 1) / 10)
        for epoch in range(config.epochs):
            gradient = torch.zeros(trained, device=config.device)
            for p in mine:
                group, active = groups[p], advantages[p].any() or reference
                group.advantages, group.weights = advantages[p], weights[p]
                if (geometry or probe) and epoch == 0:
                    logprobs, found = measured_gradient(policy, group, scale[p], config, gradient, probe)
                    measured.append(found)
                elif active:
                    logprobs = group_gradient(policy, group, list(range(G)), config, gradient, reference)
                if active and epoch == 0:
                    group.old = logprobs
                    gaps.append(float((logprobs - group.logprobs).abs().max()))
            if size > 1:
                dist.all_reduce(gradient)
            for master, part in zip(masters, gradient.split(policy.sizes)):
                master.grad = part.view_as(master)
            norm = float(clip_grad_norm_(masters, limit))
            norms.append(norm if stack(groups, "logprobs").isfinite().all() else math.nan)
            if math.isfinite(norms[-1]):
                optimizer.step()
                policy.publish()
            optimizer.zero_grad()
            del gradient, part  # a rollout needs the memory
        updated = time.perf_counter()

        # Log: a line speaks of the policy before this step's update.
        std, rates = rewards.std(dim=1, correction=0), pass_rates(rewards)  # [P]
        line = {
            "step": step, "reward": rewards.mean(), "pass_rate": rates.mean(), "reward_std": std.mean(),
            "frac_all_right": (rates == 1).double().mean(),
            "frac_all_wrong": (rewards == 0).all(dim=1).double().mean(),
            "entropy": stack(groups, "entropy").sum() / lengths.sum(), "length": lengths.double().mean(),
            "truncated": stack(groups, "truncated").double().mean(),
            "grad_norm": sum(norms) / len(norms), "clipped": any(norm > limit for norm in norms),
            "skipped": sum(not math.isfinite(norm) for norm in norms),
            "logprob_gap": torch.tensor(gather(gaps) or [math.nan]).max(), "lr": optimizer.param_groups[0]["lr"],
            "seconds_rollout": sampled - began, "seconds_update": updated - sampled,
            "tokens_per_second": lengths.sum() / (updated - began),
        }  # fmt: skip
        columns = {"step": [step] * P, "prompt": ids, "pass_rate": rates, "reward_std": std, "scale": scale}
        if geometry or probe:
            more, more_columns = describe_measured(groups, scale, gather(measured), geometry)
            line, columns = line | more, columns | more_columns
        if rank == 0:
            append(out / LOGS[0], [line | evaluation])
            append(out / LOGS[1], [dict(zip(columns, row)) for row in zip(*columns.values())])
            if evaluation or step % 10 == 0 or updated - began > 1:
                held = f"  held out {evaluation['eval_reward']:.3f}" if evaluation else ""
                text = f"reward {line['reward']:.3f}  σ {line['reward_std']:.3f}  cut off {line['truncated']:.0%}"
                print(f"step {step:>5}/{config.steps}  {text}{held}", flush=True)
        failed = failed + 1 if line["skipped"] == config.epochs else 0
        if failed == 5:
            raise RunError(f"no finite gradient in 5 steps in a row, up to {step}; the last checkpoint is whole")

    if rank == 0:
        append(out / LOGS[0], [{"step": step} | evaluation])
        model = policy.model.merge_and_unload() if config.lora else policy.model
        model.save_pretrained(out / "model")
        policy.tokenizer.save_pretrained(out / "model")
        print(f"held out {evaluation['eval_reward']:.3f}, greedy {evaluation['eval_greedy_reward']:.3f}; all in {out}")
        print("next: the same with another --norm (and --out, if given), then python analyze.py of both directories")
    if size > 1:
        dist.destroy_process_group()
    return evaluation


# ---------------------------------------- Tasks, and rewards that check them ----------------------------------------

MAX_SPAN = 300  # characters of an answer: a longer one is none, and slow to parse
DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
NUMBER = re.compile(rf"[\s$€£*]*([-+]?)[\s$€£]*({DIGITS})[\s%*.]*(?:\s[A-Za-z/ ]+)?")  # and currency, words
# Legal LaTeX that takes for ever, or memory that the parser never gives back: an answer has none of it.
BOMB = re.compile(r"(?<!\\)!|\^[^a-zA-Z+]*\^|\^\s*[{(]?[-\s]*[0-9.]{5}|[0-9.]{50}|(?:[({\[][^(){}\[\]]*){20}")


def marked_answer(text: str):
    r"""The last answer marked by \boxed{...} or ####; None without a mark, "" where the last one is not closed."""
    *before, mark, rest = ["", *re.split(r"(####|\\boxed|\\fbox)", text)]
    if not before:
        return None
    rest, depth = rest[:MAX_SPAN].lstrip(), 0
    if mark == "####":
        return rest.split("\n")[0].strip()
    if not rest.startswith("{"):
        return re.split(r"[\s$]", rest)[0].rstrip(".,")  # "\boxed 5"
    for i, character in enumerate(rest):
        if rest[i - 1 : i] != "\\":
            depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:i].strip()
    return ""


def grade(completion: str, answer: str) -> float:
    r"""1.0 if the completion's answer equals the gold answer, else 0.0; never an exception.
    The completion's answer is the last one marked by \boxed{} or ####; without a mark, its last number. Plain numbers
    are compared by value, the rest as LaTeX by math-verify, whose time limit, a second to read and one to compare, is a
    signal, which only the main thread gets: elsewhere there is no limit."""
    given = marked_answer(completion)
    if given is None:
        given = re.findall(rf"(?:(?<![0-9])-)?(?:{DIGITS})|$", completion[-1000:])[-2:][0]
    given, answer = (text.replace("−", "-").strip() for text in (given, answer))
    if not given or len(given) > MAX_SPAN or len(answer) > MAX_SPAN:
        return 0.0
    number, gold = NUMBER.fullmatch(given), NUMBER.fullmatch(answer)
    if number and gold:
        return float(Fraction(number[1] + number[2].replace(",", "")) == Fraction(gold[1] + gold[2].replace(",", "")))
    if given == answer or BOMB.search(given) or BOMB.search(answer):
        return float(given == answer)
    import math_verify  # a second to import: only where LaTeX is compared

    limit = 1 if threading.current_thread() is threading.main_thread() else None
    try:
        wanted, got = (math_verify.parse(f"${text}$", parsing_timeout=limit) for text in (answer, given))
        return float(math_verify.verify(wanted, got, timeout_seconds=limit))
    except Exception:  # sympy raises whatever it likes on text that is not mathematics
        return 0.0


# Defaults of a task; train, test: a JSONL file, or PATH[:NAME]:SPLIT of load_dataset.
Task = namedtuple("Task", "train test model reward max_new_tokens lr instruction")
Problem = namedtuple("Problem", "question answer prompt")  # the prompt in the model's tokens
QWEN = "Qwen/Qwen2.5-Math-1.5B"  # the paper's model
LAST_LINE = "{question}\nReason step by step, then give the answer as a number on the last line: #### N"
BOXED = "{question}\nReason step by step, and put the final answer within \\boxed{}."
MATH = "DigitalLearningGmbH/MATH-lighteval:default:train", "HuggingFaceH4/MATH-500:default:test"
HERE = f"{Path(__file__).resolve().parent}/assets"
TASKS = {
    n: Task(f"{HERE}/{n}/train.jsonl", f"{HERE}/{n}/test.jsonl", f"{HERE}/{n}/model", str.__eq__, 6, lr, "{question}")
    for n, lr in (("letters", 2e-4), ("arith", 3e-4))
}
TASKS["gsm8k"] = Task("openai/gsm8k:main:train", "openai/gsm8k:main:test", QWEN, grade, 512, 1e-6, LAST_LINE)
TASKS["math"] = Task(*MATH, QWEN, grade, 1024, 1e-6, BOXED)
COLUMNS = ("question", "problem", "prompt"), ("answer", "final_answer", "solution")
OFFLINE = "(without a network, or away from its assets: --model DIR --data FILE.jsonl)"


def load_rows(source: str, graded: bool, raw: Dataset | None = None):
    """Question and final answer of every row of a JSONL file, a hub data set PATH[:NAME]:SPLIT, or `raw`, thus named.
    Raises InputError for what cannot be loaded, or for a row (from 1) without a question and an answer to grade."""
    try:
        if raw is None:
            path, *hub = [source] if Path(source).is_file() else source.split(":")
            raw = load_dataset(path, *hub[:-1], split=hub[-1]) if hub else Dataset.from_json(path)
    except Exception as error:  # what datasets raises has no common class
        raise InputError(f"cannot load {source}: {error} {OFFLINE}") from error
    question, answer = ([n for n in names if n in raw.column_names] for names in COLUMNS)
    if not question or not answer or not len(raw):
        raise InputError(f"{source}: no rows, or no column of each of {COLUMNS} in {raw.column_names}")
    rows = []
    for number, row in enumerate(raw, 1):
        asked, text = row[question[0]], "" if row[answer[0]] is None else str(row[answer[0]]).strip()
        final = marked_answer(text) or ("" if answer[0] == "solution" else text)
        usable = isinstance(asked, str) and asked.strip() and final
        if not usable or graded and not grade(f"\\boxed{{{final}}}", final):
            raise InputError(f"{source}, row {number}: no {question[0]}, or no {answer[0]} to grade: {text[-60:]!r}")
        rows.append((asked, final))
    return rows


def load_problems(config: Config, dataset: Dataset | None, reward: Callable):
    """Questions and answers to train on and held out: of `dataset`, files, or the task. Raises InputError."""
    task, graded = TASKS[config.task], reward is grade
    train = load_rows(config.data or task.train, graded) if dataset is None else load_rows("dataset", graded, dataset)
    test = config.eval_data or (task.test if dataset is None and not config.data else "")
    if test:
        return train, load_rows(test, graded)[: config.eval_problems]
    if len(train) < 3:
        raise InputError(f"{len(train)} problems are too few to hold any out: pass --eval-data FILE.jsonl")
    count, order = min(config.eval_problems, len(train) // 3), np.random.default_rng(0).permutation(len(train))
    train = [train[row] for row in order]
    return train[count:], train[:count]


def encode_problems(rows: list, policy: Policy, config: Config):
    """Problems with their prompts. Raises InputError for one that is longer than the model's context."""
    tokenizer = policy.tokenizer
    texts = [config.instruction.replace("{question}", question) for question, _ in rows]
    chat = config.chat and getattr(tokenizer, "chat_template", None)
    if chat:
        dialogs = [[{"role": "user", "content": text}] for text in texts]
        texts = tokenizer.apply_chat_template(dialogs, tokenize=False, add_generation_prompt=True)
    prompts = tokenizer(texts, add_special_tokens=not chat)["input_ids"]
    context = getattr(policy.model.config, "max_position_embeddings", None) or sys.maxsize
    for text, prompt in zip(texts, prompts):
        if len(prompt) + config.max_new_tokens > context:
            raise InputError(f"{len(prompt)} tokens and new ones exceed the context of {context}: {text[:40]!r}")
    return [Problem(question, answer, prompt) for (question, answer), prompt in zip(rows, prompts)]


def check_model(policy: Policy, prompt: list[int], config: Config):
    """Raises InputError for a model that rollout and training cannot use, or do not take for one distribution."""
    try:
        (group,) = rollout(policy, [prompt], torch.full((1, 1, min(2, config.max_new_tokens)), 0.5), config.temperature)
        ((_, logprobs),) = pass_logprobs(torch.no_grad()(policy.model), group, [0], config)
    except Exception as error:  # whatever another kind of model raises
        raise InputError(f"model {config.model or config.task} cannot be used: {error}") from error
    gap = float((logprobs.cpu() - group.logprobs[:, : logprobs.shape[1]]).abs().max())
    if not gap <= (1e-3 if config.dtype == "float32" else 0.5):  # more than rounding explains, or NaN
        raise InputError(
            f"model {config.model or config.task} cannot be used: rollout and training differ by {gap:.2g} nats"
        )


# ---------------------------------- Files of a run, processes, and the command line ----------------------------------

CHECKPOINT = "checkpoint/state.safetensors"
LOGS = ("metrics.jsonl", "prompts.jsonl", "samples.jsonl")
MAY_CHANGE = ("steps", "eval_every", "save_every", "micro_batch", "device", "out", "resume")  # between run and resume


def append(path: Path, rows: list):
    """Add one JSON line a row; a number that is not finite, which JSON lacks, becomes null."""
    rows = json.loads(json.dumps(rows, default=Tensor.tolist), parse_constant=lambda name: None)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def save_checkpoint(config: Config, policy: Policy, optimizer: Any, step: int):
    """One safetensors file with masters, optimizer state and the logs' sizes; replaces the previous one atomically."""
    out, path, tensors = Path(config.out), Path(config.out) / CHECKPOINT, dict[str, Tensor]()
    for name, master in policy.masters.items():
        parts = {"weights": master.detach(), **optimizer.state[master]}
        tensors |= {f"{kind}.{name}": tensor for kind, tensor in parts.items() if tensor is not None}
    temporary = path.with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    logs = [out / name for name in LOGS if (out / name).exists()]
    state = {"step": step, "logs": {log.name: log.stat().st_size for log in logs}, "config": asdict(config)}
    try:
        save_file(tensors, temporary, metadata={"state": json.dumps(state)})
        for file in (temporary, *logs):  # all on the disk before the previous one is gone
            with file.open("rb") as descriptor:
                os.fsync(descriptor.fileno())
        temporary.replace(path)
        (out / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    finally:  # on a full disk the previous one stays
        temporary.unlink(missing_ok=True)


def load_checkpoint(config: Config, policy: Policy, optimizer: Any, rank: int):
    """Restore weights, optimizer and logs as they were; returns the next step.
    Raises InputError, with nothing changed on disk, for a torn file, another model or settings, and lost log lines."""
    out, path = Path(config.out), Path(config.out) / CHECKPOINT
    try:
        with safe_open(path, "pt", device=config.device) as file:
            state = json.loads(file.metadata()["state"])
            was = {name: value for name, value in state["config"].items() if name not in MAY_CHANGE}
            differ = {
                name: (value, getattr(config, name)) for name, value in was.items() if value != getattr(config, name)
            }
            if differ:
                raise ValueError(f"other settings, then and now: {differ}")
            if state["step"] > config.steps:
                raise ValueError(f"{state['step']} steps are made already, more than --steps {config.steps}")
            for name, size in state["logs"].items():
                if (out / name).stat().st_size < size:
                    raise ValueError(f"{name} is shorter than it was then")
            kinds = {name.split(".")[0] for name in file.keys()}  # noqa: SIM118
            for name, master in policy.masters.items():
                parts = {kind: file.get_tensor(f"{kind}.{name}") for kind in kinds}
                master.data.copy_(parts.pop("weights").view_as(master))
                optimizer.state |= {master: parts} if parts else {}
    except (SafetensorError, OSError, LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot resume from {path}: {error}") from error
    policy.publish()
    for log in (out / name for name in LOGS if rank == 0 and (out / name).exists()):
        os.truncate(log, state["logs"].get(log.name, 0))
    return state["step"]


def join_processes(config: Config):
    """Number of this process, and of all that torchrun started for the run; (0, 1) without it. Raises InputError."""
    size, cuda = int(os.environ.get("WORLD_SIZE", 1)), "cuda" in config.device
    if size > config.prompts:
        raise InputError(f"{config.prompts} prompts a step are too few for {size} processes")
    if size == 1:
        return 0, 1
    if cuda:
        torch.cuda.set_device(config.device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return dist.get_rank(), size


def gather(part: list):
    """The lists of all processes, one after the other."""
    parts = [part] * (dist.get_world_size() if dist.is_initialized() else 1)
    if len(parts) > 1:
        dist.all_gather_object(parts, part)
    return sum(parts, [])


def main(arguments: Sequence[str] | None = None):
    """The command line; returns the exit status."""
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    parser = HfArgumentParser(Config, prog="grpo.py", allow_abbrev=False, description=str(__doc__).splitlines()[0])  # type: ignore[arg-type]
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), flags=re.M))
    for action in parser._actions:
        action.help = comments.get(action.dest, action.help)
    parser.error = lambda message: parser.exit(2, f"grpo.py: error: {message}\n")  # type: ignore[method-assign]
    received: list = []

    def note(number: int, _: Any) -> None:
        received.append(number)  # a step is not left in the middle: its weights would be neither the old nor the new
        signal.signal(number, signal.SIG_DFL)
        os.write(2, b"\nstopping after this step, with a checkpoint (a second time: at once)\n")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    try:
        train(Config(**vars(parser.parse_args(arguments))), stop=received)
    except Exception as error:
        if not isinstance(error, (RunError, OSError, SafetensorError)) and not dist.is_initialized():
            raise
        status = 2 if isinstance(error, InputError) else getattr(error, "status", 1)
        print(f"grpo.py: {'error' if status == 2 else 'stopped'}: {error}", file=sys.stderr, flush=True)
        return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
