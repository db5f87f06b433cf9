"""REINFORCE and GRPO on math problems in one file: why does GRPO divide by the standard deviation?

    pip install -r requirements.txt
    python grpo.py --norm std                     # the embedded task, no download, a few minutes on a laptop
    python grpo.py --norm none                    # the same prompts and random numbers without the division
    python grpo.py --help                         # every setting
    python grpo.py --task gsm8k --model DIR_OR_HUB_NAME --lr 1e-6
    python grpo.py --task math --data FILE.jsonl --model DIR
    python grpo.py --norm std --resume            # goes on where an interrupted run stopped
    torchrun --nproc_per_node 2 grpo.py --norm std          # the same run, its prompts shared out to two processes

A step: P prompts, G sampled completions each, rewards r [P, G], advantages A = (r - group mean) * scale, one ascent
step on the policy gradient. `--norm` chooses the scale and nothing else:

    none   1                                REINFORCE with the group mean as baseline
    std    1 / (sigma + eps)                GRPO (Shao et al. 2024, arXiv 2402.03300)
    var    1 / (sigma^2 + eps)              one power further: ascent on the log-odds of the pass rate
    batch  1 / (std of all P*G rewards + eps)

On the way it measures the prompts' gradients, their orthogonality and the curvature along them (`--geometry-every`,
`--probe-every`): the quantities by which Ge et al. (arXiv 2601.23135) explain the division.

Where conventions differ, this file takes: population standard deviation (TRL, verl and OpenRLHF: sample form), eps
1e-6, a group of equal rewards has advantage exactly 0; `--agg sequence`, the sum over a completion's tokens divided by
the constant P*G, which is the gradient of the expected reward (GRPO as published: `mean` over each sequence's tokens;
DAPO: `token`, mean over the batch's tokens; Dr. GRPO: `--norm none --agg sequence` up to a constant factor); on-policy,
one update a batch, so clipping acts only with `--epochs` > 1; no KL term unless `--kl` > 0 (k3 estimate).

The file reads top to bottom: Config, the mathematics, tasks and rewards, processes, the policy, rollout, update, files,
training.
The functions under "mathematics" need torch and their arguments alone: copy them.
"""

import copy
import ctypes
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's large tensors on a CPU in large pages: a tenth of a step

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset, disable_progress_bars, load_dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicLayer,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    PreTrainedTokenizerFast,
)
from transformers.hf_argparser import HfArg
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask
from transformers.modeling_outputs import MoEModelOutputWithPastAndCrossAttentions
from transformers.utils import logging as transformers_logging

Reward = Callable[[str, str], float]  # (completion, answer) -> reward


class InputError(ValueError):
    """What the user gave cannot be used: one line, exit status 2, no run begun or changed."""


class RunError(RuntimeError):
    """A run that cannot go on: one line, exit status 1, the last checkpoint intact."""

    status = 1


class Interrupted(RunError):
    """SIGINT or SIGTERM ended the run between two steps, after a checkpoint: exit status 130 or 143."""

    def __init__(self, number: int, out: str) -> None:
        name = signal.Signals(number).name
        super().__init__(f"{name}: saved a checkpoint in {out}; the same command with --resume goes on from there")
        self.status = 128 + number


# -------------------------- Config: one field a setting; the command line is made from it ---------------------------


def setting(default: Any, text: str) -> Any:
    """A dataclass field with its line of documentation, which --help shows."""
    return HfArg(default=default, help=text)


@dataclass
class Config:
    """Settings of a run. 0 or an empty text means "chosen for the task or model", as the field says.

    Raises InputError for a value out of range.
    """

    norm: Literal["none", "std", "var", "batch"] = setting("std", "what advantages are divided by")
    task: Literal["arith", "gsm8k", "math"] = setting("arith", "problems and their reward")
    model: str = setting("tiny", "'tiny' (embedded), a directory, or a hub name")
    data: str = setting("", "JSONL file of training problems instead of the task's own")
    eval_data: str = setting("", "JSONL file of held-out problems; empty: the task's test split, or part of --data")
    instruction: str = setting("", "prompt text around {question}; empty: the task's")
    chat: bool = setting(True, "use the tokenizer's chat template if it has one")
    prompts: int = setting(16, "P, prompts a step")
    group: int = setting(16, "G, completions a prompt")
    max_new_tokens: int = setting(0, "longest completion; 0: 6 for arith, 512 for gsm8k, 1024 for math")
    temperature: float = setting(1.0, "of the sampled, and trained, distribution")
    steps: int = setting(300, "batches sampled, each with --epochs updates")
    lr: float = setting(0.0, "learning rate; 0: 3e-4 for tiny, 1e-6 for other models")
    warmup: int = setting(10, "steps of linear warm-up; constant afterwards")
    optimizer: Literal["adamw", "sgd"] = setting("adamw", "sgd is what the theory speaks of")
    max_grad_norm: float = setting(10.0, "clip the gradient, which has the norm's scale, to this size; 0: never")
    agg: Literal["sequence", "mean", "token"] = setting("sequence", "how token terms become a loss")
    epochs: int = setting(1, "updates a batch; above 1 the importance ratio is clipped")
    clip: float = setting(0.2, "range of the importance ratio around 1")
    kl: float = setting(0.0, "weight of the KL term against the frozen start policy")
    micro_batch: int = setting(0, "tokens of one training pass at most; 0: 4096, but 512 for a model on a CPU")
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "of the weights; auto: bfloat16 on CUDA")
    device: str = setting("auto", "torch device; auto: cuda if there is one, else cpu")
    seed: int = setting(0, "of prompts' order and sampling")
    reward_timeout: float = setting(60.0, "seconds that one completion's reward may take; 0: no limit")
    rank_timeout: float = setting(600.0, "seconds that one of torchrun's processes may keep the others waiting")
    sft_steps: int = setting(0, "supervised warm start on worked solutions; 0: 2000 for tiny, none else")
    sft_batch: int = setting(0, "solutions a warm-start step; 0: 64 for tiny, 16 else")
    sft_lr: float = setting(0.0, "peak rate of the warm start; 0: 6e-3 for tiny, 5e-5 else")
    geometry_every: int = setting(-1, "measure prompt gradients; 0: never; -1: 1 up to a million parameters, else 25")
    probe_every: int = setting(-1, "measure curvature; 0: never; -1: 10 up to a million parameters, else 25")
    sketch: int = setting(65536, "numbers kept of a gradient of over a million parameters (random projection)")
    eval_every: int = setting(50, "steps between evaluations on held-out problems; 0: start and end alone")
    eval_problems: int = setting(512, "held-out problems (of one --data file at most a third)")
    save_every: int = setting(50, "steps between checkpoints")
    out: str = setting("", "run directory; empty: runs/TASK-NORM-SEED")
    resume: bool = setting(False, "continue the run in --out")
    cache: str = setting("~/.cache/grpo", "where warm-started models are kept for later runs")

    def __post_init__(self) -> None:
        for name in (entry.name for entry in fields(self)):
            value, allowed = getattr(self, name), get_args(type(self).__annotations__[name])
            if allowed and value not in allowed:
                raise InputError(f"{name} is {value!r}, not one of {', '.join(allowed)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{name} is {value}, not a finite number")
            ones = ("prompts", "epochs", "sketch", "save_every", "eval_problems", "rank_timeout")
            least = {"group": 2, "geometry_every": -1, "probe_every": -1, **dict.fromkeys(ones, 1)}.get(name, 0)
            if isinstance(value, (int, float)) and value < least:
                raise InputError(f"{name} is {value}, below {least}")
        if self.temperature == 0:
            raise InputError("temperature is 0: greedy completions are all alike and teach nothing")
        tiny = self.model == "tiny"
        self.instruction = self.instruction or TASKS[self.task].instruction
        if "{question}" not in self.instruction:
            raise InputError("instruction has no {question}, so no prompt would hold its problem")
        self.max_new_tokens = self.max_new_tokens or TASKS[self.task].max_new_tokens
        self.lr = self.lr or (3e-4 if tiny else 1e-6)
        if self.device in ("auto", "cuda"):  # of several processes on a machine each takes the GPU of its number
            gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            self.device = gpu if self.device == "cuda" or torch.cuda.is_available() else "cpu"
        self.micro_batch = self.micro_batch or (512 if self.device == "cpu" and not tiny else 4096)
        self.sft_steps = self.sft_steps or (2000 if tiny else 0)
        self.sft_batch = self.sft_batch or (64 if tiny else 16)
        self.sft_lr = self.sft_lr or (6e-3 if tiny else 5e-5)
        try:
            torch.empty(0, dtype=torch.float64, device=self.device)  # which what is measured needs
        except (RuntimeError, AssertionError, TypeError) as error:
            raise InputError(f"device {self.device} cannot be used: {first_line(error)}") from error
        self.dtype = ("bfloat16" if "cuda" in self.device else "float32") if self.dtype == "auto" else self.dtype
        self.out = self.out or f"runs/{self.task}-{self.norm}-{self.seed}"


# ------------------ Mathematics: pure functions of torch and their arguments, to be copied freely -------------------


def group_advantages(rewards: torch.Tensor, norm: str, eps: float = 1e-6) -> torch.Tensor:
    """Advantages of sampled completions relative to their own group.

    rewards: [P, G], G completions for each of P prompts. norm: "none" (r - group mean), "std" (divided by the group's
    standard deviation, GRPO, arXiv 2402.03300 section 4.1.2), "var" (by its variance), "batch" (by the standard
    deviation of all P*G rewards). Population forms (correction=0). Returns [P, G], exactly 0 where a group's rewards
    are all equal: there rounding alone would otherwise be divided by eps. Raises ValueError for another norm or shape.
    """
    if rewards.ndim != 2:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}, not [prompts, group]")
    centered = rewards - rewards.mean(dim=1, keepdim=True)  # [P, G]
    std = rewards.std(dim=1, correction=0, keepdim=True)  # [P, 1]
    if norm == "none":
        advantages = centered
    elif norm == "std":
        advantages = centered / (std + eps)
    elif norm == "var":
        advantages = centered / (std**2 + eps)
    elif norm == "batch":
        advantages = centered / (rewards.std(correction=0) + eps)
    else:
        raise ValueError(f"unknown norm {norm!r}")
    equal = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    return torch.where(equal, torch.zeros_like(advantages), advantages)


def token_weights(lengths: torch.Tensor, agg: str) -> torch.Tensor:
    """What each token's term counts in the batch loss; fixed for the whole batch, so no split of it matters.

    lengths: [P, G] tokens of each completion. agg: "sequence" 1/(P*G) (the policy gradient of the whole completion),
    "mean" 1/(P*G*length) (GRPO as published), "token" 1/(all tokens) (DAPO, arXiv 2503.14476). Returns [P, G].
    Raises ValueError for another agg.
    """
    if agg == "sequence":
        return torch.full(lengths.shape, 1.0 / lengths.numel(), device=lengths.device)
    if agg == "mean":
        return 1.0 / (lengths.numel() * lengths)
    if agg == "token":
        return torch.full(lengths.shape, 1.0 / lengths.sum().item(), device=lengths.device)
    raise ValueError(f"unknown agg {agg!r}")


def policy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, weights: torch.Tensor, clip: float
) -> torch.Tensor:
    """Clipped policy-gradient loss, -sum of weights * min(ratio * A, clip(ratio) * A) (PPO, arXiv 1707.06347, eq. 7).

    All arguments but clip have one equal shape, an entry a token; logprobs in nats. With old_logprobs =
    logprobs.detach() the ratio is 1 and the gradient is REINFORCE's, -sum of weights * A * grad logprobs.
    """
    ratio = (logprobs - old_logprobs).exp()
    bounded = ratio.clamp(1 - clip, 1 + clip)
    return -(weights * torch.minimum(ratio * advantages, bounded * advantages)).sum()


def k3_divergence(logprobs: torch.Tensor, reference_logprobs: torch.Tensor) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) in nats, >= 0: exp(d) - d - 1 with d = reference - policy.

    Any equal shapes; returns the same shape. Unbiased in value (Schulman, "Approximating KL Divergence", 2020, k3).
    """
    difference = reference_logprobs - logprobs
    return torch.expm1(difference) - difference


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probability in nats of each token under softmax(logits / temperature). logits: [N, V], tokens: [N] -> [N].

    In float32 at least.
    """
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True).div_(temperature)
    return scaled.log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]


def sample_tokens(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> tuple[torch.Tensor, ...]:
    """Draw one token a row from softmax(logits / temperature), and nothing else: no top-k, no top-p, no penalty.

    logits: [N, V]; uniforms: [N] in [0, 1), one a token, so that a draw depends on its own number alone; temperature 0
    takes the most likely token. Returns tokens [N], their log-probabilities [N] and the distributions' entropies [N],
    in nats (at temperature 0 those of temperature 1).
    """
    scaled = logits.to(torch.float32, copy=True).div_(temperature or 1.0)  # [N, V]
    # In place, here and below: fresh memory for so many numbers costs a CPU more than the arithmetic. The bound keeps
    # 0 * log 0 a number.
    logprobs = scaled.log_softmax(dim=-1).clamp_(min=torch.finfo(torch.float32).min)
    probs = torch.exp(logprobs, out=scaled)
    if temperature == 0:
        tokens = logits.argmax(dim=-1)
    else:
        cumulative = probs.cumsum(dim=-1)
        # Rounding leaves the last cumulative value a little off 1: the target is a share of that value instead.
        target = uniforms[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0], -torch.linalg.vecdot(probs, logprobs)


def count_sketch(tensors: list[torch.Tensor], size: int, seed: int) -> torch.Tensor:
    """Random projection [size] of the tensors, taken as one long vector, that preserves inner products.

    Every coordinate gets a random sign and is added to one of `size` sums (Charikar, Chen, Farach-Colton 2002). Of two
    vectors with one seed, the sketches' inner product is unbiased, its deviation about |a| |b| / sqrt(size). Float32.
    """
    device = tensors[0].device
    generator, sums = torch.Generator(device).manual_seed(seed), torch.zeros(size, device=device)
    for tensor in tensors:
        signs = torch.empty(tensor.numel(), dtype=torch.int8, device=device).random_(0, 2, generator=generator)
        parts = (tensor.detach().flatten().float() * (signs * 2 - 1)).split(size)
        # Every part starts at another sum: a matrix's large columns would else be added to each other.
        starts = torch.randint(size, (len(parts),), generator=generator, device=device)
        for part, start in zip(parts, starts.tolist(), strict=True):
            rest = size - start
            sums[start : start + len(part)] += part[:rest]
            sums[: max(0, len(part) - rest)] += part[rest:]
    return sums


def gradient_geometry(gram: torch.Tensor, half_products: torch.Tensor, group: int) -> dict[str, float]:
    """How the gradients of P prompts lie to each other, as sampled and with the sampling noise taken out.

    gram: [P, P] inner products of the prompt gradients, estimated with leave-one-out advantages, a row of zeros for a
    prompt without reward variance. half_products: [P], inner product of the gradients of the two halves of a prompt's
    group, each a mean over its half, with the whole group's baseline. group: G. Units: reward^2 / parameter^2.

    Over pairs of gradients that are not zero: cos_abs (mean |cosine|) and cos_negative (share below 0). interference =
    |sum g|^2 / sum |g|^2: 1 if orthogonal, P if equal, below 1 in conflict. Over all P prompts: signal_share, the part
    of sum |g|^2 that is not sampling noise, and cos_signal, mean inner product of two prompts over the mean squared
    norm, both without bias before the ratio is taken. For halves and on-policy samples E<g_A, g_B> = (1 + 1/(G-1)^2)
    |g|^2. NaN for what fewer than two gradients, or no signal, leave undefined.
    """
    squares = gram.diagonal()
    present = squares > 0
    count = int(present.sum())
    signal = half_products.sum() / (1 + 1 / (group - 1) ** 2)
    norms = squares[present].sqrt()
    upper = torch.ones(count, count, dtype=torch.bool, device=gram.device).triu(1)
    cosines = (gram[present][:, present] / (norms[:, None] * norms))[upper]  # [pairs]; the mean of none is NaN
    total, enough = squares.sum(), count >= 2
    cross = (gram.sum() - total) / max(1, len(gram) * (len(gram) - 1))
    return {
        "n_gradients": count,
        "cos_abs": float(cosines.abs().mean()),
        "cos_negative": float((cosines < 0).double().mean()),
        "interference": float(gram.sum() / total) if enough else float("nan"),
        "signal_share": float(signal / total) if enough else float("nan"),
        "cos_signal": float(cross / (signal / len(gram))) if enough and signal > 0 else float("nan"),
    }


def predicted_gain(grad_squares: torch.Tensor, reward_std: torch.Tensor, largest_std: float = 0.5) -> float:
    """Ascent gained by steps 1/sigma a prompt over one step size for all, largest_std * sum(|g|^2/sigma) / sum(|g|^2).

    grad_squares: [P] squared norms of the prompt gradients (or their noise-corrected estimates); reward_std: [P]
    within-prompt standard deviations; largest_std: the largest there can be, 1/2 for rewards of 0 and 1. Prompts
    without variance have no gradient and are left out. At least 1 for true norms; NaN if the norms do not sum to more
    than 0. Holds for orthogonal prompts and curvature proportional to sigma.
    """
    present = reward_std > 0
    squares = grad_squares[present]
    if squares.sum() <= 0:
        return float("nan")
    return float(largest_std * (squares / reward_std[present]).sum() / squares.sum())


def directional_curvature(
    sequence_logprobs, parameters: dict, direction: dict, advantages: torch.Tensor, slope: float
) -> float:
    """Curvature v'Hv of the sequence-level surrogate mean(A * pi_new(y) / pi(y)) along v, by forward passes alone.

    sequence_logprobs: function from parameters (a dict of float32 tensors) to the log-probabilities [n] of n sampled
    sequences, in nats. parameters: where to measure; direction: tensors of the same names, v = direction / |direction|.
    advantages: [n]. slope: a guess of how fast the log-probabilities change along v, in nats / parameter. Returns
    reward / parameter^2: the second difference over a step, found here, that changes the log-probabilities by 0.03 to
    0.1 nats (root mean square, within a factor of 2). At the sampling policy this surrogate's Hessian is the sample
    Hessian of the expected reward (a token-level ratio's is not). NaN for a direction of length 0, where no such step
    is found, and where rounding could reach some percent of the result's usual size.
    """
    # In float64: torch's float32 norm of 10^8 numbers is off by a percent on a CPU.
    norm = float(sum(torch.linalg.vector_norm(v, dtype=torch.float64) ** 2 for v in direction.values())) ** 0.5
    if not 0 < norm < float("inf"):
        return float("nan")
    if not advantages.any():
        return 0.0

    def change(step: float) -> torch.Tensor:
        """Of the log-probabilities [n], by a step of this length along v."""
        moved = {name: tensor.float() + direction[name].float() * (step / norm) for name, tensor in parameters.items()}
        return sequence_logprobs(moved) - start

    with torch.no_grad():
        start = sequence_logprobs({name: tensor.float() for name, tensor in parameters.items()})
        rounding = torch.finfo(torch.float32).eps * float(start.abs().mean() + 1)
        wanted = min(max((rounding / 0.02) ** 0.5, 0.03), 0.1)
        step = wanted / slope
        for _ in range(4):
            ahead = change(step)
            size = float(ahead.square().mean().sqrt())
            if wanted / 2 < size < wanted * 2:
                break
            step *= min(max(wanted / max(size, 1e-30), 1e-3), 1e3)
        if not wanted / 2 < size < wanted * 2 or rounding > 0.1 * size**2:
            return float("nan")
        # expm1 keeps the digits that exp loses next to 1.
        return float((advantages * (ahead.expm1() + change(-step).expm1())).mean()) / step**2


def rank_correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Spearman's correlation of two series [n], ties at their mean rank; NaN where one is constant or n < 2."""
    ranks = [(v[:, None] > v).double().sum(1) + (v[:, None] == v).double().sum(1) / 2 for v in (x, y)]
    a, b = (rank - rank.mean() for rank in ranks)
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())


# ---------------------------------------- Tasks, and rewards that check them ----------------------------------------

MAX_SPAN = 300  # characters of an answer: a longer one is none, and slow to parse
DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
NUMBER = re.compile(rf"([-+]?)\s*({DIGITS})(?:/([0-9]+))?")
# What may stand beside the digits of a number: words, units, currency, marks; no operator, no LaTeX, no "5x".
BESIDE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}|(?<=\s)[A-Za-z]\b|[$€£%°*_()'\"?]|[,.:;/](?![0-9])")
# Towers of powers, factorials, long numbers and deep brackets are legal LaTeX and take for ever, or memory that the
# parser never gives back: an answer has none.
BOMB = re.compile(r"!|\^[^a-zA-Z+]*\^|\^\s*[{(]?[-\s]*[0-9.]{5}|[0-9.]{50}|(?:[({\[][^(){}\[\]]*){20}")


def marked_answer(text: str) -> str | None:
    r"""The last answer marked by \boxed{...} or ####; None without a mark, "" where the last one is not closed."""
    text = text.replace("\\fbox", "\\boxed")
    boxed, hashes = text.rfind("\\boxed"), text.rfind("####")
    if hashes > boxed:
        return text[hashes + 4 : hashes + MAX_SPAN].strip().split("\n")[0]
    if boxed < 0:
        return None
    rest, depth = text[boxed + 6 : boxed + MAX_SPAN].lstrip(), 0
    if not rest.startswith("{"):
        return re.split(r"[\s$]", rest)[0].rstrip(".,")  # "\boxed 5"
    for i, character in enumerate(rest):
        if rest[i - 1 : i] != "\\":
            depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:i].strip()
    return ""


def plain_latex(text: str) -> str:
    """One spelling for what LaTeX writes in several ways."""
    text = re.sub(r"\\[!,;: ]|\\left\b|\\right\b|~", "", text.replace("\\$", "").replace("−", "-").replace("{,}", ","))
    text = re.sub(r"\\[dt]frac", r"\\frac", text.replace("\\%", "%"))
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree\b", "°", text)
    text = re.sub(r"(\{\s*(?:m|[A-Za-z][A-Za-z. ]+)\})\s*\^\s*(?:[23]|\{[23]\})", r"\1", text)  # square, cubic units
    return re.sub(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}", r" \1 ", text).strip()


def parse_number(text: str) -> Fraction | None:
    """The value of a plain_latex text that is one number, perhaps with currency, percent sign, unit or words."""
    if re.search(r"[(\[][^()\[\]]*,[^()\[\]]*[)\]]", text[:MAX_SPAN]):  # "(3,100)" is a pair
        return None
    found = NUMBER.fullmatch(BESIDE.sub(" ", text.rsplit("=", 1)[-1]).strip())
    if not found or len(found[0]) > MAX_SPAN or found[3] and int(found[3]) == 0:
        return None
    return Fraction(found[1] + found[2].replace(",", "")) / int(found[3] or 1)


def same_latex(given: str, answer: str) -> bool:
    """Whether two LaTeX texts are equal, by math-verify, which may take a second to read and one to compare."""
    if any(len(text) > MAX_SPAN or BOMB.search(text) for text in (given, answer)):
        return False
    import math_verify  # a second to import: only where LaTeX is compared

    # Its time limit is a signal, which only the main thread gets.
    limit = 1 if threading.current_thread() is threading.main_thread() else None
    try:
        wanted, got = (math_verify.parse(f"${text}$", parsing_timeout=limit) for text in (answer, given))
        return bool(math_verify.verify(wanted, got, timeout_seconds=limit))
    except Exception:  # sympy raises whatever it likes on text that is not mathematics
        return False


def grade(completion: str, answer: str) -> float:
    r"""1.0 if the completion's answer equals the gold answer, else 0.0; never an exception, never over 3 seconds.

    The completion's answer is the last one marked by \boxed{} or ####; without a mark, its last number. Numbers are
    compared by value, separators, currency, percent sign and unit set aside; the rest as LaTeX by math-verify (whose
    time nothing limits outside the main thread).
    """
    given, answer = marked_answer(completion), plain_latex(answer)
    if given is None:
        given = ([found[0] for found in NUMBER.finditer(BESIDE.sub(" ", plain_latex(completion[-1000:])))] or [""])[-1]
    given = plain_latex(given[:MAX_SPAN])
    number, gold = parse_number(given), parse_number(answer)
    if number is not None and gold is not None:
        return float(number == gold)
    return float(given != "" and (given.split() == answer.split() or same_latex(given, answer)))


def exact_match(completion: str, answer: str) -> float:
    """1.0 if the completion is the answer to the letter, else 0.0."""
    return float(completion == answer)


@dataclass(frozen=True)
class Task:
    """Prompt text, longest completion, reward, and load_dataset's arguments for the two splits."""

    instruction: str
    max_new_tokens: int
    reward: Reward
    train: tuple[str, str, str] = ("", "", "")
    test: tuple[str, str, str] = ("", "", "")


TASKS = {
    "arith": Task("{question}", 6, exact_match),
    "gsm8k": Task(
        "{question}\nReason step by step, then give the answer as a number on the last line: #### N",
        512, grade, ("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")),
    "math": Task(
        "{question}\nReason step by step, and put the final answer within \\boxed{}.", 1024, grade,
        ("DigitalLearningGmbH/MATH-lighteval", "default", "train"), ("HuggingFaceH4/MATH-500", "default", "test")),
}


def make_arith(held_out: int, size: int = 1 << 15) -> tuple[Dataset, Dataset]:
    """Three-digit sums, "047+085=" with the answer's units digit first, "2310"; no problem is in both data sets.

    The column `solution` is for the warm start: worked as by somebody who forgets each carry with probability 1/2. A
    policy trained on it has the skill and slips, as a pretrained model does: RL can only raise what is sampled.
    """
    rng = np.random.default_rng(0)
    chosen = rng.permutation(10**6)  # problem k is k // 1000 + k % 1000
    pairs = chosen[: size + max(held_out, 512)]  # at least 512, as the slips below depend on how many there are
    columns = {}
    for name, slip in (("answer", 0.0), ("solution", 0.5)):
        carry, digits = np.zeros_like(pairs), []
        for place in (1, 10, 100):
            total = pairs // 1000 // place % 10 + pairs // place % 10 + carry
            digits.append(total % 10)
            carry = total // 10 * (rng.random(len(pairs)) >= slip)
        columns[name] = ["".join(map(str, row)) for row in np.stack([*digits, carry], 1).tolist()]
    rows = Dataset.from_dict({"question": [f"{k // 1000:03}+{k % 1000:03}=" for k in pairs.tolist()], **columns})
    return rows.select(range(size)), rows.select(range(size, size + held_out))


def standard_columns(raw: Dataset, source: str, graded: bool) -> Dataset:
    """Rows as question, answer (the final one) and solution ("" where there is none).

    raw's columns: question, problem or prompt; answer, final_answer or solution. Raises InputError for an empty data
    set, missing columns, and, where `grade` will read it, an answer that cannot be graded, with its row number (the
    first is 1).
    """
    question = next((name for name in ("question", "problem", "prompt") if name in raw.column_names), "")
    answer = next((name for name in ("answer", "final_answer", "solution") if name in raw.column_names), "")
    if not question or not answer:
        raise InputError(f"{source}: no column question/problem or answer/solution in {', '.join(raw.column_names)}")
    if len(raw) == 0:
        raise InputError(f"{source}: no rows")
    rows = []
    for number, row in enumerate(raw, 1):
        text = "" if row[answer] is None else str(row[answer]).strip()
        marked = marked_answer(text)
        final = (marked or "") if marked is not None or answer == "solution" else text
        if not isinstance(row[question], str) or not row[question].strip():
            raise InputError(f"{source}, row {number}: no {question}")
        braces = re.sub(r"\\[{}]", "", final)  # but for escaped ones, which need not match
        if graded and (not final or len(final) > MAX_SPAN or braces.count("{") != braces.count("}")):
            raise InputError(f"{source}, row {number}: answer {text[-60:]!r} cannot be graded")
        worked = str(row.get("solution") or (text if marked is not None else ""))
        # GSM8K marks its sums for a calculator, <<48/2=24>>: not text to learn.
        rows.append({"question": row[question], "answer": final, "solution": re.sub(r"<<[^<>]*>>", "", worked)})
    return Dataset.from_list(rows)


def load_problems(config: Config, dataset: Dataset | None, reward: Reward) -> tuple[Dataset, Dataset]:
    """Training and held-out problems: `dataset`, files, the hub, or the embedded task. Raises InputError."""

    def load(path: str, name: str = "", split: str = "train") -> Dataset:
        file = not name
        if file and not Path(path).is_file():
            raise InputError(f"there is no file {path}")
        try:
            raw = load_dataset("json", data_files=path, split=split) if file else load_dataset(path, name, split=split)
        except Exception as error:  # what datasets raises has no common class
            hint = "" if file else " (without a network, pass a local file: --data FILE.jsonl)"
            raise InputError(f"cannot load {path}: {first_line(error)}{hint}") from error
        return standard_columns(raw, path, reward is grade)

    task, test = TASKS[config.task], None
    if dataset is not None:
        train = standard_columns(dataset, "dataset", reward is grade)
    elif config.data:
        train = load(config.data)
    elif config.task == "arith":
        train, test = make_arith(config.eval_problems)
    else:
        train, test = load(*task.train), None if config.eval_data else load(*task.test)
    if config.eval_data:
        test = load(config.eval_data)
    if test is None:
        if len(train) < 3:
            raise InputError(f"{len(train)} problems are too few to hold any out: pass --eval-data FILE.jsonl")
        order = np.random.default_rng(0).permutation(len(train))
        share = min(config.eval_problems, len(train) // 3)
        train, test = train.select(order[share:]), train.select(order[:share])
    return train, test.select(range(min(config.eval_problems, len(test))))


def first_line(error: Exception) -> str:
    """What another library's error says, in one line."""
    return (str(error).strip() or repr(error)).splitlines()[0]


# -------------------------- Processes: the prompts are shared out, the sums are exchanged ---------------------------


@dataclass
class Team:
    """The processes that torchrun started for this run; a single one without it.

    All of them hold the policy and take the same steps. A process that does not come to an exchange within the time
    limit ends it on all, with a RunError that names it.
    """

    rank: int = 0
    size: int = 1
    limit: float = 0.0  # seconds
    control: Any = None  # a gloo group: objects, and the barrier that tells who is missing

    def share(self, count: int) -> range:
        """This process's part of `count` things."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    @contextmanager
    def exchange(self, limit: float) -> Iterator[None]:
        """The body's collective operations, begun once all processes are here."""
        try:
            if self.size > 1:
                dist.monitored_barrier(self.control, timedelta(seconds=limit), wait_all_ranks=True)
            yield
        except RuntimeError as error:
            raise RunError(f"rank {self.rank} waited for the others: {first_line(error)}") from error

    def gather(self, part: Any, limit: float | None = None) -> list[Any]:
        """Every process's part, in the order of their ranks."""
        parts: list[Any] = [part] * self.size
        with self.exchange(limit or self.limit):
            if self.size > 1:
                dist.all_gather_object(parts, part, self.control)
        return parts

    def add(self, tensors: Iterable[Any]) -> None:
        """Replace each tensor by its sum over the processes."""
        with self.exchange(self.limit):
            for tensor in tensors if self.size > 1 else ():
                dist.all_reduce(tensor)


@contextmanager
def team_of(config: Config) -> Iterator[Team]:
    """The processes of this run. Raises InputError where there are more of them than prompts."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Team()
        return
    if size > config.prompts:
        raise InputError(f"{config.prompts} prompts a step are too few for {size} processes")
    cuda = "cuda" in config.device
    if cuda:
        torch.cuda.set_device(config.device)
    limit = timedelta(seconds=config.rank_timeout)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=limit)
    try:
        control = dist.new_group(backend="gloo", timeout=limit) if cuda else dist.group.WORLD
        yield Team(dist.get_rank(), size, config.rank_timeout, control)
    finally:
        dist.destroy_process_group()


# ------------------- The policy: model, tokenizer, float32 masters, and the supervised warm start -------------------


@dataclass
class Policy:
    """A causal language model, what turns text into its tokens, and the float32 weights that the optimizer steps."""

    model: Any
    tokenizer: Any
    eos_ids: list[int]
    masters: dict[str, torch.Tensor]  # the model's own parameters when they are float32
    team: Team = field(default_factory=Team)  # the processes that train it

    def __post_init__(self) -> None:
        for name, parameter in self.model.named_parameters():
            if self.masters[name] is not parameter:
                parameter.register_post_accumulate_grad_hook(partial(add_to_master, self.masters[name]))

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(master.numel() for master in self.masters.values())

    @contextmanager
    def apart(self) -> Iterator[dict[str, torch.Tensor]]:
        """In the body the masters' gradients, yielded by name, are its own; after it they join the former ones."""
        former: dict[str, Any] = {name: master.grad for name, master in self.masters.items()}
        own = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        for name, master in self.masters.items():
            master.grad = own[name]
        yield own
        for name, master in self.masters.items():
            if former[name] is not None:
                master.grad = former[name].add_(own[name])

    def publish(self) -> None:
        """Copy the masters into the working weights, so that rollout and training see the same policy."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if self.masters[name] is not parameter:
                    parameter.copy_(self.masters[name])


def add_to_master(master: Any, parameter: Any) -> None:
    """Move a parameter's new gradient to its float32 master: sums of many passes stay in float32, and none is kept."""
    for total, part in zip(master.grad.split(1024), parameter.grad.split(1024), strict=True):
        total += part  # a part at a time: torch copies what it adds to float32
    parameter.grad = None


def tiny_model() -> tuple[Any, Any]:
    """An untrained one-layer transformer of 133k parameters with a character tokenizer: the embedded model."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: i for i, token in enumerate(["<eos>", "<unk>", *characters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))  # without merges: characters
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    shape = GPT2Config(
        vocab_size=len(vocabulary), n_positions=128, n_embd=96, n_layer=1, n_head=8, n_inner=384, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    with torch.random.fork_rng():  # the same start for every --seed, and the caller's random state untouched
        torch.manual_seed(0)
        model = GPT2LMHeadModel(shape)
    model.loss_type = "ForCausalLM"  # what transformers falls back to, with a warning
    return model, tokenizer


def grouped_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor,
    scaling: float, **options: Any,
) -> tuple[torch.Tensor, Any]:
    """Attention as two matrix products, query heads that share a key head being further queries of it.

    query: [B, H, T, D]; key, value: [B, K, N, D] with K dividing H; attention_mask: [B or 1, 1, T, N], added to the
    scores. Returns [B, T, H, D]. On a CPU several times faster than torch's fused kernel.
    """
    if any(options.get(name) is not None for name in ("position_bias", "softcap", "s_aux")):  # no plain softmax
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    grouped = query.unflatten(1, (key.shape[1], -1))  # [B, K, H/K, T, D]
    scores = (grouped * scaling).flatten(2, 3) @ key.transpose(2, 3)
    probs = (scores.unflatten(2, grouped.shape[2:4]) + attention_mask[:, :, None]).softmax(-1)  # [B, K, H/K, T, N]
    return (probs.flatten(2, 3) @ value).reshape(*query.shape[:3], -1).transpose(1, 2).contiguous(), None


AttentionInterface.register("grouped", grouped_attention)
AttentionMaskInterface.register("grouped", eager_mask)


class OneDnnProduct(torch.autograd.Function):
    """a [..., N, K] @ b [M, K].T and its gradients by oneDNN: as exact as by MKL, in float32 up to twice as fast."""

    @staticmethod
    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        return OneDnnProduct.product(a, b)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = ctx.saved_tensors
        rows, inputs = gradient.flatten(0, -2), a.flatten(0, -2)
        return OneDnnProduct.product(gradient, b.T), OneDnnProduct.product(rows.T, inputs.T)


class OneDnnLinear(torch.nn.Linear):
    """A linear layer by oneDNN."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = OneDnnProduct.apply(input, self.weight)
        return output if self.bias is None else output + self.bias


def for_cpu(model: Any) -> Any:
    """The same model, its attention and float32 products computed in the ways that are fast on a CPU."""
    if model.config._attn_implementation == "sdpa":  # where a model's attention is of another kind, it keeps that
        model.set_attn_implementation("grouped")
    for module in model.modules():
        # In bfloat16 torch uses oneDNN by itself; some builds, as for Apple's processors, come without it.
        plain = type(module) is torch.nn.Linear and module.weight.dtype == torch.float32
        if plain and torch.backends.mkldnn.is_available():
            module.__class__ = OneDnnLinear
    return model


def from_pretrained(config: Config, path: str, dtype: str) -> tuple[Any, Any]:
    """Model and tokenizer of a directory or hub name. Raises InputError."""
    try:
        # Never code from the model's directory: without the argument transformers would ask, and wait for an answer.
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False)
        model = for_cpu(model) if config.device == "cpu" else model.to(config.device)
        return model, AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, ImportError, SafetensorError, ...
        hint = "(without a network: --model DIR --data FILE.jsonl)"
        raise InputError(f"cannot load model {path}: {first_line(error)} {hint}") from error


WARM_START_LIMIT = 24 * 3600.0  # seconds that the other processes wait for it


def load_policy(config: Config, rows: Dataset, team: Team) -> Policy:
    """The start policy: the named model, warm-started if asked for, by the first process. Raises InputError."""
    made = warm_start(config, rows) if config.sft_steps and team.rank == 0 else None
    path = team.gather(made, WARM_START_LIMIT)[0] or config.model
    model, tokenizer = from_pretrained(config, str(path), config.dtype)
    model.eval()  # dropout would make the trained distribution another one than the sampled
    ends = getattr(model.generation_config, "eos_token_id", None)  # None, one id, or several
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    if not ends:
        raise InputError(f"model {config.model} names no end-of-sequence token")
    masters = dict(model.named_parameters())
    if config.dtype != "float32":
        masters = {name: p.detach().float() for name, p in masters.items()}
    return Policy(model, tokenizer, sorted(ends), masters, team)


@dataclass
class Problem:
    """A row of a data set, with its prompt in the model's tokens."""

    question: str
    answer: str
    solution: str  # worked, for a warm start; may be empty
    prompt: list[int]


def encode_problems(rows: Dataset, model: Any, tokenizer: Any, config: Config) -> list[Problem]:
    """Problems with their prompts. Raises InputError for one that is empty, unreadable or longer than the context."""
    texts = [config.instruction.replace("{question}", question) for question in rows["question"]]
    chat = config.chat and getattr(tokenizer, "chat_template", None)
    if chat:
        dialogs = [[{"role": "user", "content": text}] for text in texts]
        texts = [tokenizer.apply_chat_template(d, tokenize=False, add_generation_prompt=True) for d in dialogs]
    prompts = tokenizer(texts, add_special_tokens=not chat)["input_ids"]
    # Some tokenizers name an ordinary special token, which may well stand in a prompt, as the unknown one.
    unknown = {tokenizer.unk_token_id} - {None, tokenizer.bos_token_id, tokenizer.eos_token_id}
    for i, prompt in enumerate(prompts):
        name = f"prompt {i} ({texts[i][:40]!r}...)"
        if not prompt or unknown & set(prompt):
            raise InputError(f"{name} is empty or has characters that the tokenizer does not know")
        if len(prompt) + config.max_new_tokens > context_length(model):
            total = f"{len(prompt)} tokens, with {config.max_new_tokens} new ones"
            raise InputError(f"{name} has {total} more than the model's context of {context_length(model)}")
    columns = (list(rows[name]) for name in ("question", "answer", "solution"))
    return [Problem(*row) for row in zip(*columns, prompts, strict=True)]


WARM_START_VERSION = 1  # models that another version made are not taken from the cache


def warm_start(config: Config, rows: Dataset) -> Path:
    """Directory of the model after --sft-steps of supervised training on the problems' worked solutions.

    Kept in --cache under a hash of everything it depends on (not the seed), so that it is made once. Written under a
    temporary name and renamed. Raises InputError where there is no solution to learn from.
    """
    files = sorted(Path(config.model).glob("*"))  # none for tiny or a hub name
    stamp = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    names = ("model", "instruction", "chat", "sft_steps", "sft_batch", "sft_lr")
    key = hashlib.sha256(json.dumps([WARM_START_VERSION, stamp, [getattr(config, name) for name in names]]).encode())
    for column in ("question", "solution"):
        key.update("\0".join(rows[column]).encode())
    target = Path(config.cache).expanduser() / key.hexdigest()[:16]
    if target.is_dir():
        return target
    if not any(rows["solution"]):
        raise InputError("a warm start (--sft-steps) needs problems with a column of worked solutions: solution")
    model, tokenizer = tiny_model() if config.model == "tiny" else from_pretrained(config, config.model, "float32")
    supervised(model.to(config.device).eval(), tokenizer, rows, config)
    target.parent.mkdir(parents=True, exist_ok=True)
    made = tempfile.mkdtemp(dir=target.parent)
    try:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        os.chmod(made, 0o755)  # a cache may be shared
        os.rename(made, target)
    except OSError:
        if not target.is_dir():  # else another run made it meanwhile
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return target


def supervised(model: Any, tokenizer: Any, rows: Dataset, config: Config) -> None:
    """Train the model in place on worked solutions: cross-entropy of their tokens, AdamW, linear decay to 0."""
    problems = [problem for problem in encode_problems(rows, model, tokenizer, config) if problem.solution]
    solutions = tokenizer([problem.solution for problem in problems], add_special_tokens=False)["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.sft_lr, betas=(0.9, 0.95), weight_decay=0.1)
    warm, rng = max(1, config.sft_steps // 20), np.random.default_rng(0)
    queue: list[int] = []
    bar = progress(range(config.sft_steps), "warm start")
    for step in bar:
        while len(queue) < config.sft_batch:
            queue += rng.permutation(len(problems)).tolist()
        chosen, queue = queue[: config.sft_batch], queue[config.sft_batch :]
        pairs = [(problems[i].prompt, [*solutions[i], tokenizer.eos_token_id]) for i in chosen]
        total, loss = sum(len(solution) for _, solution in pairs), 0.0
        for rows in passes([len(prompt) + len(solution) for prompt, solution in pairs], config.micro_batch):
            part = [pairs[row] for row in rows]
            ids = [torch.tensor(prompt + solution)[: context_length(model)] for prompt, solution in part]
            labels = [torch.tensor([-100] * len(prompt) + solution) for prompt, solution in part]  # -100: not predicted
            batch = pad_sequence(ids, batch_first=True).to(model.device)
            wanted = pad_sequence(labels, batch_first=True, padding_value=-100)[:, : batch.shape[1]].to(model.device)
            share = model(batch, labels=wanted, use_cache=False, num_items_in_batch=total).loss
            share.backward()
            loss += share.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = config.sft_lr * min((step + 1) / warm, 1 - step / config.sft_steps)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, config.sft_steps // 10) == 0:
            bar.set_postfix_str(f"loss {loss:.3f}")
            if bar.disable:
                bar.write(f"warm start {step:>5}/{config.sft_steps}  loss {loss:.3f}")


def context_length(model: Any) -> int:
    """Positions that the model can hold; without limit where its config names none."""
    return getattr(model.config, "max_position_embeddings", None) or sys.maxsize


# -------------------- Rollout: sample completions from exactly the distribution that is trained ---------------------

ORDER, TRAIN, EVALUATE = range(3)  # what a random stream is for


def stream(*key: int) -> np.random.Generator:
    """Random numbers that depend on the key (seed, purpose, step, index) alone, not on what was drawn before."""
    return np.random.default_rng(key)


@dataclass
class Rollout:
    """Completions of P prompts, G each; what lies beyond a completion's length is not part of it."""

    tokens: torch.Tensor  # [P, G, T], the sampled end token included
    lengths: torch.Tensor  # [P, G]
    logprobs: torch.Tensor  # [P, G, T] of the sampled tokens, nats
    entropy: torch.Tensor  # [P, G, T] of the distributions they were drawn from, nats
    truncated: torch.Tensor  # [P, G] bool: no end token within T

    @property
    def valid(self) -> torch.Tensor:
        """[P, G, T] bool: the tokens that belong to a completion."""
        return torch.arange(self.tokens.shape[2], device=self.tokens.device) < self.lengths[..., None]


class RoomyLayer(DynamicLayer):
    """Keys and values with room for tokens to come, so that a token is written into it and not all copied anew.

    Behind a prompt, what is handed out ends with up to ROOM - 1 places without a token, which the causal mask hides.
    """

    ROOM = 64
    keys: Any
    values: Any
    length = 0  # tokens held

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        total = self.length + query_length
        return (-(-total // self.ROOM) * self.ROOM if self.length else total), 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens, [B, K, T, D] each; returns all keys and values, [B, K, N, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        room = self.get_mask_sizes(key_states.shape[2])[0] - self.keys.shape[2]
        if room:
            pad = torch.nn.functional.pad
            self.keys, self.values = pad(self.keys, (0, 0, 0, room)), pad(self.values, (0, 0, 0, room))
        new = slice(self.length, self.length + key_states.shape[2])
        self.keys[:, :, new], self.values[:, :, new], self.length = key_states, value_states, new.stop
        return self.keys, self.values


@torch.no_grad()
def rollout(policy: Policy, prompts: list[list[int]], uniforms: torch.Tensor, temperature: float) -> Rollout:
    """Sample G completions of at most T tokens for each of P prompts; temperature 0 is greedy.

    uniforms: [P, G, T] in [0, 1), one a token. Every prompt is encoded once, then its cache is replicated; rows that
    have ended leave the batch, some at a time.
    """
    model, device = policy.model, policy.model.device
    P, G, T = uniforms.shape
    uniforms, ends = uniforms.view(P * G, T).to(device), torch.tensor(policy.eos_ids, device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    width = int(lengths.max())
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)  # [P, width]
    slots = torch.arange(-(-(width + T) // RoomyLayer.ROOM) * RoomyLayer.ROOM, device=device)  # the cache's at most
    mask = ((slots >= width - lengths[:, None]) & (slots < width)).long()  # [P, slots]
    position = (mask[:, :width].cumsum(1) - 1).clamp(min=0)  # of left-padded rows, which absolute ones depend on
    cache = Cache([RoomyLayer() for _ in range(model.config.num_hidden_layers)])
    output = model(
        ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits = output.logits[:, -1].repeat_interleave(G, 0)  # [R, V], R = P*G
    cache.batch_repeat_interleave(G)
    mask, position = mask.repeat_interleave(G, 0), lengths.repeat_interleave(G)[:, None]

    tokens = torch.zeros(P * G, T, dtype=torch.long, device=device)
    logprobs, entropy = torch.zeros(P * G, T, device=device), torch.zeros(P * G, T, device=device)
    count, ended = torch.zeros_like(position[:, 0]), torch.zeros(P * G, dtype=torch.bool, device=device)
    rows = torch.arange(P * G, device=device)  # of the batch, those that still run
    every = 1 if device.type == "cpu" else 8  # asking which rows have ended makes an accelerator wait
    for t in range(T):
        drawn, logprobs[rows, t], entropy[rows, t] = sample_tokens(logits, uniforms[rows, t], temperature)
        tokens[rows, t] = drawn
        count[rows] += ~ended[rows]
        ended[rows] |= torch.isin(drawn, ends)
        if t + 1 == T:
            break
        if (t + 1) % every == 0:
            running = (~ended[rows]).nonzero()[:, 0]
            if len(running) == 0:
                break
            if len(running) < 0.9 * len(rows):  # which copies the cache: not for every row that ends
                rows, drawn, mask = rows[running], drawn[running], mask[running]
                cache.batch_select_indices(running)
        mask[:, width + t] = 1
        logits = model(
            drawn[:, None], attention_mask=mask, position_ids=position[rows] + t, past_key_values=cache, use_cache=True
        ).logits[:, -1]
    return Rollout(*(x.unflatten(0, (P, G)) for x in (tokens, count, logprobs, entropy, ~ended)))


def completions(policy: Policy, sampled: Rollout) -> list[list[str]]:
    """The text of every completion, [P][G], without special tokens."""
    groups = zip(sampled.tokens.tolist(), sampled.lengths.tolist(), strict=True)
    parts = ([row[:length] for row, length in zip(*group, strict=True)] for group in groups)
    return [policy.tokenizer.batch_decode(part, skip_special_tokens=True) for part in parts]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError in a body that takes longer, unless it sets an alarm of its own, as math_verify does.

    Only the main thread gets the signal: elsewhere there is no limit.
    """
    if seconds == 0 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"no answer within {seconds:g} seconds")

    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def score(texts: list[list[str]], answers: list[str], reward: Reward, seconds: float) -> torch.Tensor:
    """Rewards [P, G] of completions. Raises RunError, naming the completion, for a reward that is no finite number,
    or takes longer than `seconds` (0: no limit)."""
    rewards = torch.zeros(len(texts), len(texts[0]), dtype=torch.float64)
    for p, (group, answer) in enumerate(zip(texts, answers, strict=True)):
        for g, text in enumerate(group):
            try:
                with time_limit(seconds):
                    rewards[p, g] = value = float(reward(text, answer))
            except Exception as error:
                raise RunError(f"the reward failed ({error!r}) on completion {text!r}, answer {answer!r}") from error
            if not math.isfinite(value):
                raise RunError(f"the reward is {value} on completion {text!r}, answer {answer!r}")
    return rewards


def pass_rates(rewards: torch.Tensor) -> torch.Tensor:
    """Share of rewards equal to 1 in each row, [P, G] -> [P]; NaN (in the log: null) where one lies outside [0, 1]."""
    inside = ((rewards >= 0) & (rewards <= 1)).all(dim=1)
    return torch.where(inside, (rewards == 1).double().mean(dim=1), math.nan)


# --------------------------------- Update: the policy gradient, a prompt at a time ----------------------------------


@dataclass
class Batch:
    """A step's prompts and what was sampled for them."""

    ids: list[int]  # P rows of the training problems
    prompts: list[list[int]]  # P token lists
    sampled: Rollout
    rewards: torch.Tensor  # [P, G]
    advantages: torch.Tensor  # [P, G]

    @property
    def std(self) -> torch.Tensor:
        """Within-prompt standard deviation of the rewards, [P]."""
        return self.rewards.std(dim=1, correction=0)

    @property
    def scale(self) -> torch.Tensor:
        """What each prompt's centred rewards were multiplied by, [P]: the ratio of the spreads; 0 if all are equal."""
        return self.advantages.std(dim=1, correction=0) / torch.where(self.std > 0, self.std, 1.0)


def encode_prefix(model: Any, prompt: torch.Tensor) -> Any:
    """Cache [1, L-1] of all but the prompt's last token, which starts the completions' pass; None for one token."""
    return model.base_model(prompt[None, :-1], use_cache=True).past_key_values if len(prompt) > 1 else None


def fork(cache: Any, n: int) -> Any:
    """A cache of n rows that all continue the given one of one row; the given one stays as it is."""
    if cache is None:
        return None
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in forked.layers:
        layer.keys, layer.values = layer.keys.expand(n, -1, -1, -1), layer.values.expand(n, -1, -1, -1)
    return forked


class Passthrough(torch.nn.Module):
    """Stands in for the body of a model whose hidden states are known: they come in as embeddings and go out again."""

    decoder = property(lambda self: self)  # by this name OPT calls the body

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> MoEModelOutputWithPastAndCrossAttentions:
        return MoEModelOutputWithPastAndCrossAttentions(last_hidden_state=inputs_embeds)


def apply_head(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [N, V] of hidden states [N, D], by the model's own forward, with whatever it scales and caps there."""
    head = copy.copy(model)
    head._modules = {**model._modules, model.base_model_prefix: Passthrough()}
    return head(inputs_embeds=hidden[None]).logits[0]


MAX_LOGITS = 1 << 23  # numbers held at once: a large vocabulary would else fill the memory


def chunks(model: Any, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors [N, ...] in parts of as many rows as the model makes logits for at once."""
    return zip(*(tensor.split(max(1, MAX_LOGITS // model.config.vocab_size)) for tensor in tensors), strict=True)


def passes(lengths: list[int], limit: int) -> Iterator[list[int]]:
    """Rows of these lengths, the longest first, in parts of at most `limit` tokens with their padding, or one row."""
    rows = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    while rows:
        count = max(1, limit // lengths[rows[0]])
        yield rows[:count]
        rows = rows[count:]


def completion_states(
    model: Any, prompt: torch.Tensor, prefix: Any, tokens: torch.Tensor, lengths: torch.Tensor, limit: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Passes of at most `limit` tokens: hidden states [N, D], the tokens [N] that they predict, and the places [N] of
    these among all completions' tokens, one after the other.

    prompt: [L]; prefix: encode_prefix of it; tokens: [n, T]; lengths: [n]. Padding stands on the right, where no token
    of a completion attends to it, so no mask is needed.
    """
    sizes = lengths.tolist()
    places = torch.arange(sum(sizes), device=tokens.device).split(sizes)
    for rows in passes(sizes, limit):
        part = tokens[rows, : sizes[rows[0]]]  # [m, T']
        inputs = torch.cat([prompt[-1].expand(len(rows), 1), part[:, :-1]], dim=1)
        valid = torch.arange(part.shape[1], device=tokens.device) < lengths[rows, None]
        output = model.base_model(inputs, past_key_values=fork(prefix, len(rows)), use_cache=prefix is not None)
        yield output.last_hidden_state[valid], part[valid], torch.cat([places[row] for row in rows])


@torch.no_grad()
def completion_logprobs(
    model: Any, prompt: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor, config: Config
) -> torch.Tensor:
    """Log-probabilities in nats of all completions' tokens, one after the other: [lengths.sum()].

    prompt: [L]; tokens: [n, T]; lengths: [n].
    """
    prefix, found = encode_prefix(model, prompt), torch.zeros(int(lengths.sum()), device=tokens.device)
    for batch in completion_states(model, prompt, prefix, tokens, lengths, config.micro_batch):
        for hidden, wanted, places in chunks(model, *batch):
            found[places] = token_logprobs(apply_head(model, hidden), wanted, config.temperature)
    return found


def prompt_backward(
    model: Any, prompt: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor, advantages: torch.Tensor,
    weights: torch.Tensor, config: Config, old: torch.Tensor | None = None, reference: Any = None,
) -> torch.Tensor:
    """Add the gradient of one prompt's loss to the parameters'; returns its log-probabilities [lengths.sum()].

    prompt: [L]; tokens: [G, T]; lengths, advantages, weights: [G]; old: the log-probabilities that the importance ratio
    is taken to (None: the present ones, ratio 1); reference: model of the KL term, or None. The prompt is encoded once:
    every pass leaves its gradient at the prompt's keys and values, from where all of it goes back through the prompt
    together. Likewise every chunk of a pass's logits leaves its gradient at the hidden states.
    """
    prefix = encode_prefix(model, prompt)
    layers = prefix.layers if prefix else []
    roots = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    leaves = [root.detach().requires_grad_() for root in roots]
    for layer, keys, values in zip(layers, leaves[::2], leaves[1::2], strict=True):
        layer.keys, layer.values = keys, values
    weight, advantage = (x.repeat_interleave(lengths) for x in (weights, advantages))  # [lengths.sum()]
    anchor = completion_logprobs(reference, prompt, tokens, lengths, config) if reference else None
    found = torch.zeros_like(weight)
    for hidden, *rest in completion_states(model, prompt, prefix, tokens, lengths, config.micro_batch):
        states = hidden.detach().requires_grad_()
        for part, wanted, places in chunks(model, states, *rest):
            logprobs = token_logprobs(apply_head(model, part), wanted, config.temperature)
            found[places] = logprobs.detach()
            before = found[places] if old is None else old[places]
            loss = policy_loss(logprobs, before, advantage[places], weight[places], config.clip)
            if anchor is not None:
                loss = loss + config.kl * (weight[places] * k3_divergence(logprobs, anchor[places])).sum()
            loss.backward()
        hidden.backward(states.grad)
    if roots:
        torch.autograd.backward(roots, [leaf.grad for leaf in leaves])
    return found


SMALL = 1_000_000  # parameters up to which gradients are kept whole and measured often


@dataclass
class Measured:
    """What a step's backward passes tell of its P prompts; the two halves of a group are called A and B."""

    gradients: torch.Tensor  # [P, 2, D] of each half, whole or sketched; zero for a prompt without reward variance
    curvature: torch.Tensor  # [P, 2] along A's gradient on B, and along B's on A; NaN where not measured

    @classmethod
    def of(cls, policy: Policy, batch: Batch, config: Config) -> "Measured":
        """Nothing measured yet."""
        P, width = len(batch.prompts), policy.size if policy.size <= SMALL else config.sketch
        return cls(torch.zeros(P, 2, width, device=policy.model.device), torch.full((P, 2), math.nan))

    def join(self, team: Team) -> None:
        """Take in what the other processes measured of their prompts."""
        team.add([self.gradients])
        self.curvature = torch.stack(team.gather(self.curvature)).nanmean(dim=0)


def halves(group: int) -> list[slice]:
    """The rows of the two halves of a group; an odd group's first half is the larger."""
    return [slice(0, (group + 1) // 2), slice((group + 1) // 2, group)]


class Bound(torch.nn.Module):
    """A function of a model as a module, to which functional_call can give other weights."""

    def __init__(self, function: Callable[..., torch.Tensor], model: Any) -> None:
        super().__init__()
        self.function, self.model = function, model

    def forward(self, *arguments: Any) -> torch.Tensor:
        return self.function(self.model, *arguments)


def probe(
    policy: Policy, batch: Batch, p: int, half: int, direction: dict[str, torch.Tensor], scale: float, config: Config
) -> float:
    """Curvature of prompt p's objective along a direction, the gradients of one half, on the other half's samples.

    The other half has its own leave-one-out baseline, so that next to nothing of the direction's noise is in it. scale:
    from those gradients to the prompt gradient. NaN where the other half has a single completion, and where the
    direction's half was rewarded alike: then only the other half's rewards make it a direction at all.
    """
    parts = halves(batch.rewards.shape[1])
    own, rows = batch.rewards[p][parts[half]], parts[1 - half]
    tokens, lengths, rewards = batch.sampled.tokens[p][rows], batch.sampled.lengths[p][rows], batch.rewards[p][rows]
    if len(rewards) < 2 or own.max() == own.min():
        return math.nan
    prompt = torch.tensor(batch.prompts[p], device=tokens.device)

    def sequence_logprobs(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        named = {f"model.{name}": tensor for name, tensor in parameters.items()}
        bound = Bound(completion_logprobs, policy.model)
        found = torch.func.functional_call(bound, named, (prompt, tokens, lengths, config))
        return torch.stack([sequence.double().sum() for sequence in found.split(lengths.tolist())])

    advantages = (rewards - rewards.mean()) * len(rewards) / (len(rewards) - 1)
    # The gradient is a mean of advantage * score: over the rewards' deviation it is about the scores' size along it.
    norm = float(torch.nn.utils.get_total_norm(direction.values()))
    slope = norm * scale / float(batch.std[p])
    return directional_curvature(sequence_logprobs, policy.masters, direction, advantages.to(tokens.device), slope)


def measured_backward(
    policy: Policy, batch: Batch, p: int, weights: torch.Tensor, config: Config, measured: Measured, curvature: bool
) -> torch.Tensor:
    """prompt_backward of a whole group in two halves, which fills in `measured` for prompt p on the way."""
    group, found = batch.rewards.shape[1], []
    advantages = batch.advantages[p].to(weights)
    for half, rows in enumerate(halves(group)):
        size = rows.stop - rows.start
        # From the loss's gradient to the leave-one-out estimate of the prompt's: a mean, not normalized, uphill.
        scale = group / (group - 1) / (float(weights[p, 0]) * size * float(batch.scale[p]))
        with policy.apart() as gradients:
            found.append(prompt_backward(
                policy.model, torch.tensor(batch.prompts[p], device=weights.device), batch.sampled.tokens[p][rows],
                batch.sampled.lengths[p][rows], advantages[rows], weights[p][rows], config))
            if policy.size <= SMALL:
                vector = torch.cat([gradient.flatten() for gradient in gradients.values()])
            else:
                vector = count_sketch(list(gradients.values()), config.sketch, seed=0)
            measured.gradients[p, half] = -scale * vector
            if curvature:
                measured.curvature[p, half] = probe(policy, batch, p, half, gradients, scale, config)
    return torch.cat(found)


def describe_measured(
    measured: Measured, batch: Batch, geometry: bool, curvature: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The measurements' part of the step's log line and of its prompts' lines."""
    group, std, scale = batch.rewards.shape[1], batch.std, batch.scale
    line: dict[str, Any] = {}
    columns: dict[str, list[Any]] = {}
    if geometry:
        shares = torch.tensor([[rows.stop - rows.start] for rows in halves(group)]).to(measured.gradients) / group
        whole = (measured.gradients * shares).sum(dim=1).double()  # [P, D]
        gram = (whole @ whole.T).cpu()
        products = (measured.gradients[:, 0].double() * measured.gradients[:, 1]).sum(dim=1).cpu()
        norms, signal = gram.diagonal().sqrt(), products / (1 + 1 / (group - 1) ** 2)
        binary = bool(((batch.rewards == 0) | (batch.rewards == 1)).all())
        line |= gradient_geometry(gram, products, group)
        line["predicted_gain"] = predicted_gain(gram.diagonal(), std) if binary else math.nan
        line["predicted_gain_signal"] = predicted_gain(signal, std) if binary else math.nan
        # Of a prompt without a gradient 0/0. The update is the sum of scaled gradients, before clipping and optimizer.
        columns["cos_update"] = (gram @ scale / (norms * (scale @ gram @ scale).sqrt())).tolist()
        columns |= {"grad_norm": norms.tolist(), "grad_sq_signal": signal.tolist()}
    if curvature:
        known, parts = ~measured.curvature.isnan(), [batch.rewards[:, rows] for rows in halves(group)]
        stds = torch.stack([part.std(dim=1, correction=0) for part in parts], dim=1)  # [P, 2] of A and B
        rates = torch.stack([pass_rates(part) for part in parts], dim=1)
        line["curvature"] = float(measured.curvature[known].mean())
        line["curvature_corr"] = rank_correlation(measured.curvature[known].abs(), stds[known])
        columns |= {"curvature": measured.curvature.tolist(), "reward_std_half": stds.tolist(),
                    "pass_rate_half": rates.tolist()}
    return line, [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def update(
    policy: Policy, optimizer: Any, batch: Batch, config: Config, reference: Any = None,
    geometry: bool = False, curvature: bool = False,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One optimizer step an epoch on the whole batch; returns what the log says of it and of its prompts.

    A prompt whose completions were all rewarded alike has no gradient and costs nothing, unless there is a KL term.
    Where the sampled log-probabilities or the gradient are not finite, no step is taken: `skipped` counts those.
    geometry, curvature: what to measure on the way, of a loss whose gradient is the policy gradient.
    """
    sampled, norms, gap = batch.sampled, [], 0.0
    masters = list(policy.masters.values())
    advantages = batch.advantages.to(masters[0])  # its device and dtype
    weights = token_weights(sampled.lengths, config.agg).to(masters[0])  # [P, G]
    finite = bool(sampled.logprobs.isfinite().all())
    active = [p for p in range(len(batch.prompts)) if finite and (config.kl > 0 or bool(advantages[p].any()))]
    limit = config.max_grad_norm or math.inf
    measured = Measured.of(policy, batch, config) if geometry or curvature else None
    old: dict[int, torch.Tensor] = {}
    for epoch in range(config.epochs):
        for master in masters:  # which have none between the steps: a rollout needs the memory
            master.grad = torch.zeros_like(master)
        for p in active[policy.team.rank :: policy.team.size]:
            if measured and epoch == 0:
                logprobs = measured_backward(policy, batch, p, weights, config, measured, curvature)
            else:
                logprobs = prompt_backward(
                    policy.model, torch.tensor(batch.prompts[p], device=advantages.device), sampled.tokens[p],
                    sampled.lengths[p], advantages[p], weights[p], config, old.get(p), reference)
            if epoch == 0:
                gap = max(gap, float((logprobs - sampled.logprobs[p][sampled.valid[p]]).abs().max()))
                old[p] = logprobs
        policy.team.add(master.grad for master in masters)
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters, limit)) if finite else math.nan)
        if math.isfinite(norms[-1]):
            optimizer.step()
            policy.publish()
        optimizer.zero_grad()
    gap = max(policy.team.gather(gap))
    if measured:
        measured.join(policy.team)
    line = {
        "grad_norm": sum(norms) / len(norms),
        "clipped": any(norm > limit for norm in norms),
        "skipped": sum(not math.isfinite(norm) for norm in norms),
        "logprob_gap": gap if active else None,
    }
    more, rows = describe_measured(measured, batch, geometry, curvature) if measured else ({}, [])
    return line | more, rows


def make_optimizer(policy: Policy, config: Config) -> Any:
    """AdamW or plain SGD over the float32 masters, without weight decay: the start policy is not to be forgotten."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(policy.masters.values(), lr=config.lr)
    return torch.optim.AdamW(policy.masters.values(), lr=config.lr, weight_decay=0.0, fused=True)


# -------------------------------------------- What a run leaves on disk ---------------------------------------------

LOGS = ("metrics.jsonl", "prompts.jsonl", "samples.jsonl")
# Between a run and its resumption:
MAY_CHANGE = (
    "steps", "eval_every", "save_every", "micro_batch", "reward_timeout", "rank_timeout", "device", "out", "resume",
    "cache")


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add one JSON line a row; JSON has no NaN, so a number that is not finite becomes null."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    lines = [json.dumps({key: plain(value) for key, value in row.items()}, ensure_ascii=False) for row in rows]
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}; the last checkpoint is whole") from error


def save_checkpoint(out: Path, policy: Policy, optimizer: Any, step: int, skipped: int) -> None:
    """One safetensors file with masters, optimizer state and the logs' sizes; replaces the previous one atomically."""
    folder = out / "checkpoint"
    folder.mkdir(exist_ok=True)
    tensors = {f"weights.{name}": master.detach() for name, master in policy.masters.items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": value for key, value in state.items() if value is not None}
    sizes = {}
    for name in LOGS:  # the logs reach the disk before the checkpoint that counts on them
        with (out / name).open("ab") as file:
            os.fsync(file.fileno())
            sizes[name] = file.tell()
    temporary = folder / "state.safetensors.tmp"
    try:
        save_file(tensors, temporary, metadata={"state": json.dumps({"step": step, "skipped": skipped, "logs": sizes})})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(folder / "state.safetensors")
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"cannot write a checkpoint in {folder} ({error}); the previous one is whole") from error


def load_checkpoint(config: Config, policy: Policy, optimizer: Any) -> tuple[int, int]:
    """Restore weights, optimizer and logs as they were; returns the next step and the updates skipped in a row.

    Raises InputError, naming the file, where it is torn, belongs to another model, is beyond --steps, or counts on log
    lines that are gone; then nothing has been changed on disk.
    """
    out = Path(config.out)
    path = out / "checkpoint" / "state.safetensors"
    try:
        with safe_open(path, "pt", device=str(policy.model.device)) as file:
            state = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        step, skipped, sizes = state["step"], state["skipped"], state["logs"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"cannot read the checkpoint {path}: {error}") from error
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name in [name for name in tensors if name.startswith("optimizer.")]:
        _, i, key = name.split(".")
        moments.setdefault(int(i), {})[key] = tensors.pop(name)
    shapes = {f"weights.{name}": master.shape for name, master in policy.masters.items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
        raise InputError(f"the checkpoint {path} belongs to another model")
    if step > config.steps:
        raise InputError(f"{out} has made {step} steps already, more than --steps {config.steps}")
    short = [name for name in LOGS if not (out / name).is_file() or (out / name).stat().st_size < sizes[name]]
    if short:
        raise InputError(f"{out / short[0]} is shorter than when the checkpoint {path} was written")
    for name, master in policy.masters.items():
        master.data.copy_(tensors[f"weights.{name}"])
    policy.publish()
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    for name in LOGS if policy.team.rank == 0 else ():
        os.truncate(out / name, sizes[name])
    return step, skipped


def check_out(config: Config) -> None:
    """Raises InputError where --out cannot take this run: a run without --resume, or --resume of another one."""
    out = Path(config.out)
    log = out / "metrics.jsonl"
    if not config.resume and ((out / "config.json").exists() or (log.exists() and log.stat().st_size > 0)):
        raise InputError(f"{out} holds a run: add --resume to continue it, or --out OTHER_DIR to start a new one")
    if config.resume:
        try:
            saved = json.loads((out / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"no run to resume in {out}: {error}") from error
        now = asdict(config)
        differ = [name for name in now if name not in MAY_CHANGE and saved.get(name) != now[name]]
        if differ:
            text = ", ".join(f"{name} was {saved.get(name)!r}, is {now[name]!r}" for name in differ)
            raise InputError(f"{out} was run with other settings: {text}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}") from error
    if not os.access(out, os.W_OK):
        raise InputError(f"cannot write to {out}")


def progress(steps: range, title: str, wanted: bool = True) -> Any:
    """The steps with a bar on a terminal, and without one elsewhere."""
    disable = None if wanted else True  # None: where there is no terminal
    return tqdm(steps, desc=title, disable=disable, initial=steps.start, total=steps.stop, leave=False)


# ----------------------------------------------------- Training -----------------------------------------------------


def largest_gap(config: Config) -> float:
    """Nats between the log-probabilities of rollout and training, two forward passes of one distribution, that rounding
    explains: what is more is a fault (mask, position, temperature)."""
    return 1e-3 if config.dtype == "float32" else 0.5


def check_model(policy: Policy, prompt: list[int], config: Config) -> None:
    """Raises InputError for a model that rollout and training cannot use, or do not take for one distribution."""
    try:
        uniforms = torch.full((1, 1, min(2, config.max_new_tokens)), 0.5)
        sampled = rollout(policy, [prompt], uniforms, config.temperature)
        tokens, lengths = sampled.tokens[0], sampled.lengths[0]
        found = completion_logprobs(policy.model, torch.tensor(prompt, device=tokens.device), tokens, lengths, config)
    except Exception as error:  # whatever another kind of model raises
        raise InputError(f"model {config.model} cannot be used: {first_line(error)}") from error
    gap = float((found - sampled.logprobs[sampled.valid]).abs().max())
    if not gap <= largest_gap(config):  # NaN too
        raise InputError(f"model {config.model} cannot be used: rollout and training differ by {gap:.2g} nats")


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """The SIGINTs and SIGTERMs that came during the body, which goes on; a second one of a kind acts as usual.

    A step is not left in the middle: its weights would be neither the old nor the new ones.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    former: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(number, former[number])
        os.write(2, b"\nstopping after this step, with a checkpoint (a second time: at once)\n")

    for number in former:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def prompt_rows(step: int, config: Config, problems: int) -> list[int]:
    """The step's P rows: the problems in a seeded order, a new order each time they are used up."""
    first = step * config.prompts
    epochs = range(first // problems, (first + config.prompts - 1) // problems + 1)
    orders = np.concatenate([stream(config.seed, ORDER, epoch).permutation(problems) for epoch in epochs])
    offset = first - epochs.start * problems
    return orders[offset : offset + config.prompts].tolist()


def draw(config: Config, purpose: int, step: int, rows: Sequence[int], group: int) -> torch.Tensor:
    """Uniforms [rows, group, T]: every row of every step has its own stream, whatever else is sampled beside it."""
    shape = (group, config.max_new_tokens)
    draws = [stream(config.seed, purpose, step, row).random(shape, np.float32) for row in rows]
    return torch.from_numpy(np.stack(draws))


def sample_batch(policy: Policy, step: int, problems: list[Problem], reward: Reward, config: Config) -> Batch:
    """Roll out the step's prompts, each process its share, and turn the rewards into advantages."""
    ids = prompt_rows(step, config, len(problems))
    prompts, mine = [problems[i].prompt for i in ids], policy.team.share(len(ids))
    uniforms = draw(config, TRAIN, step, mine, config.group)
    part = rollout(policy, [prompts[p] for p in mine], uniforms, config.temperature)
    answers = [problems[ids[p]].answer for p in mine]
    rewards = score(completions(policy, part), answers, reward, config.reward_timeout)
    parts = policy.team.gather(([getattr(part, entry.name).cpu() for entry in fields(part)], rewards))
    columns = zip(*(tensors for tensors, _ in parts), strict=True)
    joined = (torch.cat(tensors).to(policy.model.device) for tensors in columns)
    rewards = torch.cat([rewards for _, rewards in parts])
    return Batch(ids, prompts, Rollout(*joined), rewards, group_advantages(rewards, config.norm))


def describe(batch: Batch, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The batch's part of the step's log line, and the lines of its prompts."""
    rewards, sampled, rates = batch.rewards, batch.sampled, pass_rates(batch.rewards)
    line = {
        "step": step,
        "reward": rewards.mean().item(),
        "pass_rate": rates.mean().item(),
        "reward_std": batch.std.mean().item(),
        "frac_all_right": (rewards == 1).all(dim=1).double().mean().item(),
        "frac_all_wrong": (rewards == 0).all(dim=1).double().mean().item(),
        "entropy": sampled.entropy[sampled.valid].mean().item(),
        "length": sampled.lengths.double().mean().item(),
        "truncated": sampled.truncated.double().mean().item(),
    }
    columns = {"prompt": batch.ids, "pass_rate": rates.tolist(), "reward_std": batch.std.tolist(),
               "scale": batch.scale.tolist()}
    return line, [{"step": step, **dict(zip(columns, row, strict=True))} for row in zip(*columns.values(), strict=True)]


def due(step: int, size: int, config: Config) -> tuple[bool, bool]:
    """Whether the geometry and the curvature are measured at this step, for a model of so many parameters."""
    if config.agg == "mean" or config.kl > 0:  # the loss's gradient is not the policy gradient
        return False, False
    usual = (1, 10) if size <= SMALL else (25, 25)
    chosen = (config.geometry_every, config.probe_every)
    geometry, curvature = (every if every >= 0 else default for every, default in zip(chosen, usual, strict=True))
    return geometry > 0 and step % geometry == 0, curvature > 0 and step % curvature == 0


def training_step(
    policy: Policy, optimizer: Any, reference: Any, problems: list[Problem], reward: Reward, step: int, config: Config
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Rollout and update; returns the step's log line and those of its prompts."""
    began = time.perf_counter()
    batch = sample_batch(policy, step, problems, reward, config)
    release_memory()
    sampled = time.perf_counter()
    optimizer.param_groups[0]["lr"] = config.lr * min(1.0, (step + 1) / max(1, config.warmup))
    line, rows = describe(batch, step)
    geometry, curvature = due(step, policy.size, config)
    changes, measurements = update(policy, optimizer, batch, config, reference, geometry, curvature)
    release_memory()
    ended = time.perf_counter()
    line |= changes | {
        "lr": optimizer.param_groups[0]["lr"],
        "seconds_rollout": sampled - began,
        "seconds_update": ended - sampled,
        "tokens_per_second": float(batch.sampled.lengths.sum()) / (ended - began),
    }
    return line, [a | b for a, b in zip(rows, measurements or [{}] * len(rows), strict=True)]


def evaluate(
    policy: Policy, step: int, problems: list[Problem], reward: Reward, config: Config
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Pass rates and rewards of one sampled and one greedy completion of every problem, and a few samples in full.

    Every evaluation uses the same random numbers, so that what differs between two of them is the policy.
    """
    rates: dict[str, float] = {}
    samples, mine = [], policy.team.share(len(problems))
    size = max(1, config.prompts * config.group // policy.team.size)  # as many rows at once as in training
    ways = ("eval_pass_rate", "eval_reward", config.temperature), ("eval_greedy", "eval_greedy_reward", 0.0)
    for key, reward_key, temperature in ways:
        rewards = [torch.zeros(0, 1, dtype=torch.float64)]
        for start in range(mine.start, mine.stop, size):
            rows = range(start, min(start + size, mine.stop))
            part, uniforms = problems[rows.start : rows.stop], draw(config, EVALUATE, 0, rows, 1)
            texts = completions(policy, rollout(policy, [problem.prompt for problem in part], uniforms, temperature))
            rewards.append(score(texts, [problem.answer for problem in part], reward, config.reward_timeout))
            if start == 0 and temperature:
                first = list(zip(part, texts, rewards[-1].tolist(), strict=True))[:4]
                samples = [{"step": step, "question": problem.question, "completion": text[0], "answer": problem.answer,
                            "reward": value[0]} for problem, text, value in first]
        whole = torch.cat(policy.team.gather(torch.cat(rewards)))
        rates |= {key: pass_rates(whole).mean().item(), reward_key: whole.mean().item()}
    return rates, samples


def report(config: Config, lines: list[dict[str, Any]], held_out: int) -> str:
    """The table at the end of a run, from its log: first and last evaluation, first and last tenth of the steps."""
    steps, final = lines[:-1] or lines, lines[-1]
    tenth = max(1, len(steps) // 10)

    def mean(key: str, part: list[dict[str, Any]]) -> float:
        values = [line[key] for line in part if line.get(key) is not None]
        return sum(values) / len(values) if values else math.nan

    def cosine(part: list[dict[str, Any]]) -> float:
        """cos_signal as a ratio of means over steps: a single step's may have next to nothing below the line."""
        return (mean("interference", part) - 1) / max(1, config.prompts - 1) / (mean("signal_share", part) or math.nan)

    ends = steps[:tenth], steps[-tenth:]
    binary = all(line.get("eval_pass_rate") == line.get("eval_reward") for line in lines)
    what = "pass rate" if binary else "reward"
    rows: list[tuple[Any, ...]] = [
        (f"{held_out} held-out problems", "before", "after"),
        (f"{what}, sampled", mean("eval_reward", steps[:1]), mean("eval_reward", [final])),
        (f"{what}, greedy", mean("eval_greedy_reward", steps[:1]), mean("eval_greedy_reward", [final])),
        (f"training, mean of {tenth} steps", "start", "end"),
        ("σ, within-prompt reward deviation", *(mean("reward_std", part) for part in ends)),
        ("signal share of gradients", *(mean("signal_share", part) for part in ends)),
        ("cosine of prompts, noise removed", *(cosine(part) for part in ends)),
        ("curvature along the other half", *(mean("curvature", part) for part in ends)),
    ]
    texts = [[v if isinstance(v, str) else "-" if math.isnan(v) else f"{v:.3f}" for v in row] for row in rows]
    other = "none" if config.norm != "none" else "std"
    return "\n".join([
        "",
        *(f"{title:34}{before:>9}{after:>9}" for title, before, after in texts),
        f"\nlogs    {config.out}/metrics.jsonl, prompts.jsonl, samples.jsonl",
        f"model   {config.out}/model (AutoModelForCausalLM.from_pretrained loads it)",
        f"next    the same command with --norm {other}: same prompts, same random numbers",
    ])


def train(config: Config, dataset: Dataset | None = None, reward: Reward | None = None) -> dict[str, Any]:
    """Run a training from start policy to saved model; everything it leaves lies in config.out.

    dataset: problems with columns question and answer (and solution, for a warm start) instead of the task's own;
    reward(completion, answer) -> float instead of the task's. Returns the last evaluation. Raises InputError for what
    cannot be used, before a run is begun or changed, RunError for a run that cannot go on, and its subclass Interrupted
    after SIGINT or SIGTERM, which are noted from the first step to the last and answered between two.
    """
    reward = reward or TASKS[config.task].reward
    check_out(config)
    splits = load_problems(config, dataset, reward)
    with team_of(config) as team:
        policy = load_policy(config, splits[0], team)
        problems, held_out = (encode_problems(rows, policy.model, policy.tokenizer, config) for rows in splits)
        check_model(policy, max((problem.prompt for problem in problems), key=len), config)
        return train_policy(policy, problems, held_out, reward, config)


def begin(policy: Policy, optimizer: Any, problems: int, config: Config) -> tuple[int, int]:
    """Start the run in --out or take it up again; returns the next step and the updates skipped in a row."""
    out, start, skipped = Path(config.out), 0, 0
    policy.team.gather("begin")  # all have seen what is in --out before the first process writes there
    if config.resume:
        start, skipped = load_checkpoint(config, policy, optimizer)
    if policy.team.rank == 0:
        if not config.resume:
            save_checkpoint(out, policy, optimizer, start, skipped)
        # Only now, and at once, is there a run: before this it would start anew, from here on it can resume.
        (out / "config.json.tmp").write_text(json.dumps(asdict(config), indent=2) + "\n")
        (out / "config.json.tmp").replace(out / "config.json")
        print(f"{config.task}, {problems:,} problems · {config.model}, {policy.size:,} parameters, {config.dtype} on "
              f"{config.device} · norm {config.norm} · {config.prompts} prompts × {config.group} completions"
              + f" · {policy.team.size} processes" * (policy.team.size > 1), flush=True)
    return start, skipped


def train_policy(
    policy: Policy, problems: list[Problem], held_out: list[Problem], reward: Reward, config: Config
) -> dict[str, Any]:
    """All steps; the first process logs and saves. Returns the last evaluation."""
    out, team = Path(config.out), policy.team
    reference = copy.deepcopy(policy.model).requires_grad_(False) if config.kl > 0 else None
    optimizer = make_optimizer(policy, config)
    start, skipped = begin(policy, optimizer, len(problems), config)
    first = team.rank == 0
    bar = progress(range(start, config.steps), "training", first)
    with signals_noted() as received:
        for step in bar:
            stop = max(team.gather(max(received, default=0)))  # together: all have taken the same steps
            if first and (stop or (step % config.save_every == 0 and step > start)):
                save_checkpoint(out, policy, optimizer, step, skipped)
            if stop:
                raise Interrupted(stop, config.out)
            evaluation: dict[str, Any] = {}
            samples: list[dict[str, Any]] = []
            if step == 0 or (config.eval_every and step % config.eval_every == 0):
                evaluation, samples = evaluate(policy, step, held_out, reward, config)
            line, rows = training_step(policy, optimizer, reference, problems, reward, step, config)
            if first:
                append(out / "samples.jsonl", samples)
                append(out / "metrics.jsonl", [line | evaluation])
                append(out / "prompts.jsonl", rows)
                show(bar, line | evaluation, config)
            skipped = skipped + 1 if line["skipped"] else 0
            if skipped == 5:
                raise RunError(f"no finite gradient in 5 steps in a row, up to {step}; the last checkpoint is whole")
    return finish(policy, optimizer, skipped, held_out, reward, config)


def release_memory() -> None:
    """Give freed memory back to the system, where it is glibc that keeps it: rollout and update would else add up."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)


def show(bar: Any, line: dict[str, Any], config: Config) -> None:
    """The step on the progress bar, and where there is no terminal, or an evaluation, on a line of its own."""
    text = f"reward {line['reward']:.3f}  σ {line['reward_std']:.3f}  length {line['length']:.1f}"
    bar.set_postfix_str(text)
    if "eval_pass_rate" in line or (bar.disable and line["step"] % 10 == 0):
        text += "".join(f"  {key} {line[key]:.3f}" for key in ("eval_pass_rate", "eval_greedy") if key in line)
        bar.write(f"step {line['step']:>5}/{config.steps}  {text}")
    if line["truncated"] > 0.2 and line["step"] % 50 == 0:
        bar.write(f"warning: {line['truncated']:.0%} of the completions were cut off: raise --max-new-tokens")
    if (line["logprob_gap"] or 0.0) > largest_gap(config):
        warnings.warn(f"rollout and training log-probabilities differ by over {largest_gap(config)}", stacklevel=2)


def finish(
    policy: Policy, optimizer: Any, skipped: int, problems: list[Problem], reward: Reward, config: Config
) -> dict[str, Any]:
    """Last checkpoint, last evaluation, saved model and the closing table; returns the evaluation."""
    out = Path(config.out)
    if policy.team.rank == 0:
        save_checkpoint(out, policy, optimizer, config.steps, skipped)
    after, samples = evaluate(policy, config.steps, problems, reward, config)
    if policy.team.rank > 0:
        return after
    append(out / "samples.jsonl", samples)
    append(out / "metrics.jsonl", [{"step": config.steps, **after}])
    policy.model.save_pretrained(out / "model")
    policy.tokenizer.save_pretrained(out / "model")
    with (out / "metrics.jsonl").open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    print(report(config, lines, len(problems)))
    return after


class Parser(HfArgumentParser):
    """Config's command line; a wrong flag or value is one line and exit status 2."""

    def error(self, message: str) -> Any:
        self.exit(2, f"grpo.py: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    about = (__doc__ or "").split("\n")[0]
    parser = Parser(Config, prog="grpo.py", allow_abbrev=False, description=about)  # type: ignore[arg-type]
    try:
        train(Config(**vars(parser.parse_args(arguments))))
    except InputError as error:
        print(f"grpo.py: error: {error}", file=sys.stderr)
        return 2
    except (RunError, OSError, SafetensorError) as error:
        print(f"grpo.py: stopped: {error}", file=sys.stderr, flush=True)
        return getattr(error, "status", 1)
    except KeyboardInterrupt:  # before the first step, after the last, or the second one
        print("grpo.py: stopped by Ctrl-C", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
