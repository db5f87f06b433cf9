"""Tests of grpo.py. `pytest` runs the quick ones, `GRPO_SLOW=1 pytest` all of them.

Every expected value is worked out by hand, by another library, or by the naive computation that the
code avoids.
"""

import inspect
import itertools
import json
import math
import multiprocessing.forkserver
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from datasets import Dataset
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy import stats
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

import grpo
from grpo import Batch, Config, InputError, Policy, RunError

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # more only cost here
DATA = Path(__file__).resolve().parent.parent / "shared" / "data"
slow = pytest.mark.skipif(not os.environ.get("GRPO_SLOW"), reason="slow: set GRPO_SLOW=1")
LETTERS = grpo.TASKS["letters"]

# --------------------------------------- models and groups ----------------------------------------

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
SIZES |= dict(bos_token_id=0, eos_token_id=1, pad_token_id=0)
SHARED = SIZES | dict(intermediate_size=64, num_key_value_heads=2)  # two query heads for a key head
WINDOW = dict(final_logit_softcapping=2.0, head_dim=8, query_pre_attn_scalar=8, sliding_window=4)
GRANITE = SHARED | dict(logits_scaling=3.0, attention_multiplier=0.2)
NEO = SIZES | dict(num_layers=2, attention_types=[[["local"], 2]], window_size=4)
# Absolute positions; rotary ones; scaled or capped logits; experts; windows shorter than a prompt.
MODELS = {
    "gpt2": (transformers.GPT2Config, SIZES),
    "opt": (transformers.OPTConfig, SIZES | dict(ffn_dim=64, word_embed_proj_dim=32)),
    "llama": (transformers.LlamaConfig, SHARED),
    "mixtral": (transformers.MixtralConfig, SHARED | dict(num_local_experts=4)),
    "granite": (transformers.GraniteConfig, GRANITE),
    "cohere": (transformers.CohereConfig, SHARED | dict(logit_scale=0.3)),
    "gemma2": (transformers.Gemma2Config, SHARED | WINDOW),
    "gpt-neo": (transformers.GPTNeoConfig, NEO),
    "mamba": (transformers.MambaConfig, SIZES),  # no keys and values: cannot be used
}
PROMPTS = [[5, 6, 7, 8, 9], [3, 4], [11, 12, 13], [17]]


def make_model(kind: str, vocab_size: int = 23, attention: str = ""):
    """A random transformer, far from uniform: distributions with a shape, positions that matter."""
    torch.manual_seed(0)
    config, sizes = MODELS[kind]
    model = AutoModelForCausalLM.from_config(config(vocab_size=vocab_size, **sizes)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4.0 if parameter.ndim > 1 else 1.0)
    if attention:
        model.set_attn_implementation(attention)
    return model


def save_model(kind: str, path: Path) -> str:
    make_model(kind, 98).save_pretrained(path)
    AutoTokenizer.from_pretrained(LETTERS.model).save_pretrained(path)
    return str(path)


def make_policy(model, ends=(1,), limits=(4096, 4096)) -> Policy:
    masters = dict(model.named_parameters())
    return Policy(model, None, list(ends), masters, masters, limits)


def uniforms(P: int, G: int, T: int) -> torch.Tensor:
    return torch.rand(P, G, T, generator=torch.Generator().manual_seed(0))


def with_advantages(batch: Batch, norm: str, agg: str) -> Batch:
    scale = grpo.advantage_scale(batch.rewards, norm)[:, 0]
    batch.advantages, batch.scale = grpo.group_advantages(batch.rewards, norm), scale
    batch.weights = grpo.token_weights(batch.lengths, agg)
    batch.old_logprobs = torch.full_like(batch.logprobs, math.nan)
    return batch


def sample_batch(policy: Policy, agg: str = "sequence") -> Batch:
    """Five completions of each of PROMPTS with random rewards, one group without variance."""
    batch = grpo.rollout(policy, PROMPTS, uniforms(4, 5, 9), 1.0)
    batch.rewards = (torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) < 0.5).double()
    batch.rewards[1] = 1.0
    return with_advantages(batch, "std", agg)


def naive_logprobs(forward, batch: Batch, temperature: float = 1.0) -> list[list[torch.Tensor]]:
    """Of every completion's tokens [P][G]: whole sequences, no cache, no batch, no padding."""
    found = []
    for prompt, rows, lengths in zip(batch.prompts, batch.tokens, batch.lengths.tolist()):
        found.append([])
        for row, length in zip(rows, lengths):
            ids = torch.cat([torch.tensor(prompt), row[:length]])
            logits = forward(ids[None], use_cache=False).logits[0, -length - 1 : -1] / temperature
            found[-1].append(torch.log_softmax(logits, -1)[range(length), ids[-length:]])
    return found


def naive_loss(now, old, reference, batch: Batch, agg: str, clip: float = 0.2, kl: float = 0.0):
    """The loss written out by completion, from three policies' log-probabilities [P][G]."""
    (P, G), loss, total = batch.lengths.shape, 0.0, int(batch.lengths.sum())
    for p, g in itertools.product(range(P), range(G)):
        ratio, A = (now[p][g] - old[p][g].detach()).exp(), float(batch.advantages[p, g])
        terms = -torch.min(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
        d = reference[p][g].detach() - now[p][g]
        terms = terms + kl * ratio * (d.exp() - d - 1)
        weight = {"sequence": 1 / (P * G), "mean": 1 / (P * G * len(d)), "token": 1 / total}[agg]
        loss += weight * terms.sum()
    return loss


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def naive_forward(model, theta: dict[str, torch.Tensor]):
    """The plain model's forward at trained weights theta, adapters merged into what they adapt."""
    weights = {name: value for name, value in theta.items() if "lora" not in name}
    for name in (name for name in theta if "lora_B" in name):
        target = name.removeprefix("base_model.model.").replace("lora_B.default.", "")
        change = 2 * theta[name] @ theta[name.replace("lora_B", "lora_A")]  # alpha over rank is 2
        transposed = isinstance(model.get_submodule(target.removesuffix(".weight")), Conv1D)
        weights[target] = model.get_parameter(target) + (change.T if transposed else change)
    return lambda *args, **named: torch.func.functional_call(model, weights, args, named)


# ------------------------------------------ mathematics -------------------------------------------


def geometry(f, first, levels, second=None):
    """Of groups of 3, 2 in the first half; the halves are alike if there is one."""
    halves = (torch.tensor(x, dtype=torch.float64) for x in (first, second or first))
    values, columns = f(*halves, 3, levels and [*levels])
    return [*values.values()], *columns.values()


def curvature(f, slope=1.0, v=(5.0, 0.0), A=(1.0, 2.0, -0.5), logprobs=None):
    c, d = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, -4.0]])  # log pi = c t + d t^2 / 2 along v
    logprobs = logprobs or (lambda p: c * p["a"][0] + d * p["a"][0] ** 2 / 2 - 1)
    return f(logprobs, {"a": torch.zeros(2)}, {"a": torch.tensor(v)}, torch.tensor(A), slope)


# A call, and its value worked out by hand; a line that is indented goes on.
BY_HAND = """
advantage_scale(T([[1.0, 0, 0, 0, 0], [1] * 5]), "std", 0.1) -> [[2], [0]]
group_advantages(T([[1.0, 0, 0, 0, 0]]), "none") -> [[0.8, -0.2, -0.2, -0.2, -0.2]]
# integers and booleans
group_advantages(T([[1, 0, 0, 0, 0], [2, 1, 1, 1, 1]]), "std", 0.0)
  -> [[2, -0.5, -0.5, -0.5, -0.5]] * 2
group_advantages(T([[True, False, False, False, False]]), "var", 0.04) -> [[4, -1, -1, -1, -1]]
advantage_scale(T([[3, 1]]), "batch", 0.0) -> [[1]]
group_advantages(T([[1.0, 0, 0, 0, 0]]), "std", 0.0) -> [[2, -0.5, -0.5, -0.5, -0.5]]
group_advantages(T([[1.0, 0, 0, 0, 0]]), "var", 0.04) -> [[4, -1, -1, -1, -1]]
# all rewards 1 0 1 1: mean 3/4, variance 3/16; group means 1/2 and 1
group_advantages(T([[1.0, 0], [1, 1]]), "batch", 0.0) -> [[2 / 3**0.5, -2 / 3**0.5], [0, 0]]
# exactly 0, though the deviation of these is 1e-8 by rounding
group_advantages(T([[0.1] * 12] * 2), "std", 0.0) -> [[0] * 12] * 2
group_advantages(T([[0.1] * 12] * 2), "batch", 0.0) -> [[0] * 12] * 2
token_weights(T([[1, 3], [4, 2]]), "sequence") -> [[1 / 4] * 2] * 2
token_weights(T([[1, 3], [4, 2]]), "mean") -> [[1 / 4, 1 / 12], [1 / 16, 1 / 8]]
token_weights(T([[1, 3], [4, 2]]), "token") -> [[1 / 10] * 2] * 2
# ratios 2 (A = 1: clipped to 1.2), 2 (A = -1: not), 1/2 (A = 1: not, twice the weight), 1/2
# (A = -1: clipped to 0.8)
policy_loss(log(T([2, 2, 0.5, 0.5])), T([0.0] * 4), T([1, -1, 1, -1]), T([1, 1, 2, 1]), 0.2)
  -> 2 + 0.8 - 1.2 - 1
# ratios 1, 2, 1/2 to what was sampled from; the reference has log-probability 0
k3_divergence(log(T([1, 2, 0.5])), T([0.0] * 3), T([0.0] * 3))
  -> [0, 2 * ln(2) - 1, (1 - ln(2)) / 2]
# logits 0 and log 3: probabilities 1/4 and 3/4, at temperature 1/2 1/10 and 9/10
token_logprobs(log(T([[1, 3.0]] * 2)), T([1, 0]), 1.0) -> [ln(0.75), ln(0.25)]
token_logprobs(log(T([[1, 3.0]] * 2)), T([1, 0]), 0.5) -> [ln(0.9), ln(0.1)]
sample_tokens(log(T([[1, 3.0]] * 2)), T([0.2, 0.3]), 1.0)
  -> [0, 1], [ln(0.25), ln(0.75)], [ln(4) - 0.75 * ln(3)] * 2
sample_tokens(log(T([[1, 3.0]])), T([0.0]), 0.0) -> [1], [ln(0.75)], [ln(4) - 0.75 * ln(3)]
# the ends of the unit interval, beside tokens that cannot be drawn
sample_tokens(log(T([[0, 1.0, 1, 0]] * 2)), T([0, 1 - 2**-24]), 1.0)
  -> [1, 2], [-ln(2)] * 2, [ln(2)] * 2
# entries 0, 3 and 6; 1, 4 and 7; 2 and 5 of the two tensors together
count_sketch([T([[1.0, 2], [3, 4]]), T([5.0, 6, 7, 8])], T([1, -1, 1, 1, 1, -1, 1, -1]), 3)
  -> [1 + 4 + 7, -2 + 5 - 8, 3 - 6]
pair_cosines(T([[1.0, 3, 0, 0], [3, 25, 0, 4], [0] * 4, [0, 4, 0, 1]])) -> [3 / 5, 0, 4 / 5]
# number; cosines' mean, deviation, shares above 0 and small; interference, signal share; corrected
# cosine and its square: of all pairs, of one level, of two. Of |g|^2 a group of 3 leaves 4/5.
geometry(gradient_geometry, [[1, 2]] * 3, "aab")
  -> [3, 1, 0, 1, 0, 3, 4/5] + [5/4, 1] * 3, [5**0.5] * 3, [4] * 3
geometry(gradient_geometry, [[1, 0], [0, 2], [-3, 0]], "aba")
  -> [3, -1/3, 2**0.5/3, 0, 2/3, 8/14, 4/5, -15/56, 9/49, -3/4, 1, 0, 0], [1, 2, 3], [0.8, 3.2, 7.2]
# halves that differ, and no levels: x = (4, 0) / 3 and (7, 10) / 3
geometry(gradient_geometry, [[1, 0], [3, 4]], [None] * 2, [[2, 0], [1, 2]])
  -> [2, 7 / 149**0.5, 0, 1, 0, 221/165, 93.6/165] + [28/46.8, 6/22] * 2 + [nan] * 2,
  [4/3, 149**0.5/3], [1.6, 8.8]
# the same where nothing is known of levels: what needs them is left out
geometry(gradient_geometry, [[1, 0], [3, 4]], None, [[2, 0], [1, 2]])
  -> [2, 7 / 149**0.5, 0, 1, 0, 221/165, 93.6/165, 28/46.8, 6/22], [4/3, 149**0.5/3], [1.6, 8.8]
# a prompt without a gradient, which is a gradient of 0; one gradient alone
geometry(gradient_geometry, [[3, 4], [0, 0], [3, 0]], "aab")
  -> [2, 0.6, 0, 1, 0, 52/34, 4/5, 45/136, 0.36, 0, nan, 45/86, 0.36], [5, 0, 3], [20, 0, 7.2]
geometry(gradient_geometry, [[1, 1], [0, 0]], "ab")
  -> [1] + [nan] * 6 + [0, nan, nan, nan, 0, nan], [2**0.5, 0], [1.6, 0]
# mean of A (c^2 + d), whatever the first guess of the step
curvature(directional_curvature, 1e-3) -> (1.5 + 2 * 4 - 0.5 * 5) / 3
curvature(directional_curvature, 1e3) -> (1.5 + 2 * 4 - 0.5 * 5) / 3
curvature(directional_curvature, A=(0.0, 0.0, 0.0)) -> 0
# no direction; log-probabilities that do not change, are noise, or are too long for float32
curvature(directional_curvature, v=(0.0, 0.0)) -> nan
curvature(directional_curvature, v=(0.0, 1.0)) -> nan
curvature(directional_curvature, logprobs=lambda _: 1e-4 * torch.randn(3) - 500) -> nan
curvature(directional_curvature, logprobs=lambda p: p["a"].sum().repeat(3) - 1e6) -> nan
"""
CALLS = [line for line in BY_HAND.replace("\n  ", " ").splitlines() if line and line[0] != "#"]


@pytest.mark.parametrize("line", CALLS)
def test_each_function_alone_gives_the_value_worked_out_by_hand(line):
    """Made of its source alone, with nothing but torch in sight; but one calls another."""
    called, expected = line.split(" -> ")
    name = re.search(r"[a-z0-9]+_[a-z_]+", called)[0]
    calls = {"group_advantages": ["advantage_scale"], "gradient_geometry": ["pair_cosines"]}
    calls["directional_curvature"] = ["square"]
    names = [*calls.get(name, []), name]
    source = "\n".join(inspect.getsource(getattr(grpo, name)) for name in names)
    namespace = {"torch": torch}
    exec(f"from __future__ import annotations\n{source}", namespace)
    torch.manual_seed(0)
    tools = dict(T=torch.tensor, log=torch.log, torch=torch, geometry=geometry, curvature=curvature)
    found = eval(called, tools | {name: namespace[name]})
    expected = eval(expected, {"ln": math.log, "nan": math.nan})
    rtol, atol = (0.01, 0) if name == "directional_curvature" else (1e-6, 1e-6)
    found, expected = (x if isinstance(x, tuple) else (x,) for x in (found, expected))
    for value, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, wanted, rtol, atol)


@pytest.mark.parametrize("moved", [0.0, 0.7])
def test_the_kl_terms_expected_gradient_is_that_of_the_divergence(moved):
    """Sampled from `old`, with exact probabilities of one token, at old itself and elsewhere."""
    seeded = torch.Generator().manual_seed(0)
    old, reference, direction = torch.randn(3, 6, dtype=torch.float64, generator=seeded)
    logits = (old + moved * direction).requires_grad_()
    policy, old, reference = (x.log_softmax(0) for x in (logits, old, reference))
    estimate = (old.exp() * grpo.k3_divergence(policy, old, reference)).sum()
    divergence = (policy.exp() * (policy - reference)).sum()
    both = estimate, divergence
    found, expected = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in both)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("large", [[1.0] * 5, [100.0, 1, 1, 1, 1]])
def test_sketches_preserve_inner_products_without_bias(large):
    """Unbiased, with the stated deviation, also where all that is large is one matrix column."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 40, 5) * torch.tensor(large)
    products = []
    for _ in range(2000):
        signs = torch.randint(0, 2, (200,), dtype=torch.int8) * 2 - 1
        products.append(float(torch.dot(*(grpo.count_sketch([x], signs, 17) for x in (a, b)))))
    assert within(products, float((a * b).sum()))
    assert np.std(products) == pytest.approx(float(a.norm() * b.norm()) / 17**0.5, rel=0.15)


def within(values, truth: float, errors: float = 3) -> bool:
    """Whether independent values' mean agrees with the truth within so many standard errors."""
    values = np.asarray(values)
    return abs(values.mean() - truth) < errors * values.std(ddof=1) / len(values) ** 0.5


# -------------------------------------- rollout and gradient --------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_greedy_rollout_equals_generate_on_a_left_padded_batch(kind):
    model, ends = make_model(kind), [1, 4, 9]  # several, so that rows end at different times
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = ends, 0
    batch = grpo.rollout(make_policy(model, ends), PROMPTS, uniforms(4, 1, 12), 0.0)
    ids = torch.tensor([[0] * (5 - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (5 - len(p)) + [1] * len(p) for p in PROMPTS])
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, 5:]
    for p, row in enumerate(expected.tolist()):
        end = next((t for t, token in enumerate(row, 1) if token in ends), 12)
        assert batch.tokens[p, 0].tolist() == row + [0] * (12 - len(row))
        assert batch.lengths[p, 0] == end and batch.truncated[p, 0] == (row[end - 1] not in ends)


PASSES = [
    ("gpt2", "sdpa", 0.7),
    ("llama", "eager", 0.7),
    ("gemma2", "eager", 1.0),
]


@pytest.mark.parametrize(("kind", "attention", "temperature"), PASSES)
def test_rollout_is_the_naive_pass(kind, attention, temperature):
    """Log-probabilities, entropies, what the output layer reads; and a completion has its own
    random numbers alone."""
    policy, u = make_policy(make_model(kind, attention=attention)), uniforms(4, 6, 10)
    batch, naive, read = grpo.rollout(policy, PROMPTS, u, temperature), make_model(kind), []
    naive.get_output_embeddings().register_forward_pre_hook(lambda _, x: read.append(x[0]))
    for p, prompt in enumerate(PROMPTS):
        naive(torch.tensor([prompt]))
        torch.testing.assert_close(batch.features[p], read[-1][0].mean(0), rtol=0, atol=1e-5)
        alone = grpo.rollout(policy, [prompt], u[p : p + 1, p : p + 1], temperature)
        assert alone.tokens[0, 0].tolist() == batch.tokens[p, p].tolist()
        for g, length in enumerate(batch.lengths[p].tolist()):
            ids = torch.tensor([*prompt, *batch.tokens[p, g, :length]])
            logits = naive(ids[None]).logits[0, -length - 1 : -1] / temperature
            exact = torch.distributions.Categorical(logits=logits)
            for found, value in (
                (batch.logprobs, exact.log_prob(ids[-length:])),
                (batch.entropy, exact.entropy()),
            ):
                torch.testing.assert_close(found[p, g, :length], value, rtol=0, atol=1e-5)


def test_the_output_layer_reads_no_strided_view():
    """For one torch copies the layer's weights, for every prompt: gigabytes with many tokens."""
    policy, seen = make_policy(make_model("llama")), []
    layer = policy.model.get_output_embeddings()
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = grpo.rollout(policy, PROMPTS, uniforms(4, 2, 2), 1.0)
    grpo.completion_logprobs(policy, batch, [0, 1, 2], Config())
    assert len(seen) == 4 and all(x.stride() == torch.empty(x.shape).stride() for x in seen)


def test_sampled_frequencies_match_the_models_probabilities():
    """Two-token completions over five tokens, 20,000 draws, chi-square; whatever the generation
    config says."""
    model = make_model("gpt2", 5)
    others = dict(top_k=1, top_p=0.1, temperature=9.0, repetition_penalty=5.0, do_sample=False)
    model.generation_config.update(**others)
    batch = grpo.rollout(make_policy(model, [4]), [[2, 3]], uniforms(1, 20_000, 2), 1.3)

    def probs(*ids: int) -> np.ndarray:
        logits = model(torch.tensor([ids])).logits[0, -1].detach().double()
        return torch.softmax(logits / 1.3, -1).numpy()

    first = probs(2, 3)  # token 4 ends
    expected = np.concatenate([*(first[a] * probs(2, 3, a) for a in range(4)), first[4:]])
    counts = np.bincount(batch.tokens[0] @ torch.tensor([5, 1]), minlength=21)
    assert stats.chisquare(counts, 20_000 * expected).pvalue > 0.001


def test_random_numbers_and_prompts_depend_on_seed_step_and_row_alone():
    config = Config(max_new_tokens=3, prompts=4)
    both = grpo.draw(config, 1, 5, [2, 7], 4)
    assert torch.equal(both[1:, :2], grpo.draw(config, 1, 5, [7], 2))  # a larger group adds draws
    others = (config, 1, 6), (config, 2, 5), (replace(config, seed=1), 1, 5)  # step, purpose, seed
    assert all((both[:1] != grpo.draw(*other, [2], 4)).all() for other in others)
    rows = [row for step in range(5) for row in grpo.prompt_rows(step, config, 10)]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))  # in epochs
    assert rows[:10] != rows[10:]


KINDS = "gpt2 sequence, gpt2 mean, gpt2 token, llama mean, gemma2 sequence, opt token"
KINDS += ", mixtral sequence, granite mean, cohere token, gpt-neo mean"


@pytest.mark.parametrize(("kind", "agg"), [pair.split() for pair in KINDS.split(", ")])
def test_gradient_equals_the_naive_one_whatever_the_split_padding_and_order(kind, agg):
    """Several prompts of unequal length in a micro-batch, one of one token, or one completion."""
    naive, attention = make_model(kind), "eager" if kind == "llama" else ""
    policy = make_policy(make_model(kind, attention=attention))
    batch, config = sample_batch(policy, agg), Config(temperature=0.8, device="cpu")
    now = naive_logprobs(naive, batch, 0.8)
    loss = naive_loss(now, now, now, batch, agg)
    expected = flat(torch.autograd.grad(loss, [*naive.parameters()]))
    wide = [pad(x, (0, 7), value=22) for x in (batch.tokens, batch.old_logprobs)]
    padded = replace(batch, tokens=wide[0], old_logprobs=wide[1] * math.nan)
    active = [r for r in range(20) if batch.advantages.flatten()[r]]  # the others have no gradient
    for limits, rows, variant in (
        ((999, 999), range(20), batch),
        ((60, 40), [*range(20)][::-1], padded),
        ((1, 1), active, batch),
    ):
        policy.limits = limits
        variant.old_logprobs = torch.full_like(variant.old_logprobs, math.nan)
        gradient = flat(grpo.loss_gradient(policy, variant, rows, config))
        assert relative_error(gradient, expected) < 1e-5
        for row in rows:
            value = now[row // 5][row % 5].detach()
            found = variant.old_logprobs.flatten(0, 1)[row, : len(value)]
            torch.testing.assert_close(found, value, rtol=0, atol=1e-5)


HYBRID = dict(vocab_size=23, layer_types=["linear_attention", "full_attention"], head_dim=8)
STATES = {  # whose past is not keys and values alone: a delta rule, a state space
    "qwen3_next": dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8)
    | dict(linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "granitemoehybrid": dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=4)
    | dict(num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=16),
}
if transformers.__version__ < "5":
    STATES["granitemoehybrid"] |= dict(layer_types=["mamba", "attention"])  # as it has them


@pytest.mark.parametrize("kind", STATES)
def test_models_with_a_state_have_the_naive_gradient_or_are_refused(kind):
    """transformers 4 has caches of another kind for them."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SHARED | HYBRID | STATES[kind])
    policy = make_policy(AutoModelForCausalLM.from_config(config).eval(), limits=(60, 40))
    settings = Config(device="cpu")
    if transformers.__version__ < "5":
        refused = f"{kind}.*: with a DynamicCache it fails: .*state"
        with pytest.raises(InputError, match=refused):
            grpo.check_model(policy, [3, 4, 5], settings)
        return
    grpo.check_model(policy, [3, 4, 5], settings)
    batch = sample_batch(policy)
    now = naive_logprobs(policy.model, batch)
    loss = naive_loss(now, now, now, batch, "sequence")
    expected = torch.autograd.grad(loss, [*policy.trained.values()], materialize_grads=True)
    gradient = flat(grpo.loss_gradient(policy, batch, range(20), settings))
    assert relative_error(gradient, flat(expected)) < 1e-5


def test_micro_batches_keep_to_their_limits():
    """Prompts of 400 tokens and answers of 4 or 5: all would fit but for copies of the prompts."""
    lengths = torch.tensor([[4, 5, 4], [5, 5, 5], [4, 4, 4], [9, 1, 1]])
    batch = SimpleNamespace(prompts=[[0] * 400, [0] * 400, [0] * 400, [0] * 10], lengths=lengths)
    split = lambda *limits: grpo.split_rows(batch, range(12), limits)  # noqa: E731
    order = [9, 10, 11, 1, 0, 2, 3, 4, 5, 6, 7, 8]  # a prompt's longest answer first
    assert split(12 * 409, 4096) == [order]
    assert split(4096, 4096) == [order[:10], order[10:]]  # 10 * 409; the last two are of 404
    assert split(820, 4096) == [[9, 10, 11], [1, 0], [2, 3], [4, 5], [6, 7], [8]]  # 2 * 405, not 3
    assert split(1e9, 40) == [order[:4], order[4:12]]  # 4 * 9, 8 * 5
    assert split(1, 1) == [[row] for row in order] and grpo.split_rows(batch, [], (1, 1)) == []


def parity(completion: str, answer: str) -> float:
    """A reward that any policy earns half of the time."""
    return float(zlib.crc32((completion + answer).encode()) % 2)


SETTINGS = dict(steps=10, prompts=3, group=5, eval_every=4, eval_problems=20, save_every=4, lr=1e-3)
SETTINGS |= dict(probe_every=4, micro_batch=40, device="cpu", dtype="float32", task="letters")
SETTINGS |= dict(data=LETTERS.test)
UNMEASURED, BRIEF = dict(geometry_every=0, probe_every=0), dict(eval_every=0, eval_problems=2)


def settings(out, **changes) -> Config:
    """A small run: 10 updates of 3 prompts with 5 completions, everything measured."""
    return Config(**SETTINGS | changes | {"out": str(out)})


def run(out, reward=parity, stop=(), **changes) -> dict[str, float]:
    return grpo.train(settings(out, **changes), reward=reward, stop=stop)


def step_batch(policy: Policy, step: int, config: Config) -> Batch:
    """What the step of a run samples, with rewards and advantages."""
    problems = grpo.encode_problems(grpo.load_problems(config, None, parity)[0], policy, config)
    problems = [problems[row] for row in grpo.prompt_rows(step, config, len(problems))]
    random = grpo.draw(config, grpo.TRAIN, step, range(config.prompts), config.group)
    prompts = [problem.prompt for problem in problems]
    batch = grpo.rollout(policy, prompts, random, config.temperature)
    grpo.score(policy, batch, problems, parity)
    return with_advantages(batch, config.norm, config.agg)


def naive_run(config: Config):
    """The run written out with plain SGD: weights before and after, updates' norms, largest changes
    of a ratio, and the plain model."""
    policy = grpo.load_policy(config)
    plain = AutoModelForCausalLM.from_pretrained(config.model or LETTERS.model)
    start = {name: x.detach().clone().requires_grad_() for name, x in policy.masters.items()}
    theta, anchor, norms, changes = start, naive_forward(plain, start), [], []
    for step in range(config.steps):
        for name, master in policy.masters.items():
            master.data.copy_(theta[name])
        batch = step_batch(policy, step, config)
        table = lambda forward: naive_logprobs(forward, batch, config.temperature)  # noqa: B023, E731
        old = None
        for _ in range(config.epochs):
            now = table(naive_forward(plain, theta))
            old = old or now
            far = table(anchor) if config.kl else now
            loss = naive_loss(now, old, far, batch, config.agg, config.clip, config.kl)
            gradient = torch.autograd.grad(loss, [*theta.values()])
            norms.append(float(flat(gradient).norm()))
            ratio = (flat(sum(now, [])) - flat(sum(old, []))).exp()
            changes.append(float((ratio - 1).abs().max()))
            shrink = min(1, (config.max_grad_norm or math.inf) / norms[-1])
            rate = config.lr * (step + 1) / 10 * shrink
            moved = zip(theta.items(), gradient)
            theta = {name: (t - rate * g).detach().requires_grad_() for (name, t), g in moved}
    return start, theta, norms, changes, plain


RUNS = [
    dict(norm="none", agg="token", probe_every=1, micro_batch=24),  # a half in two
    dict(norm="var", agg="mean", temperature=0.8),
    dict(norm="batch", max_grad_norm=0.05, **UNMEASURED),
    dict(norm="std", epochs=3, clip=0.05, kl=0.3, max_grad_norm=0.0),
    dict(norm="std", lora=4, epochs=2, clip=0.01, kl=0.3),
    dict(norm="none", lora=4, probe_every=1, task="arith", model="llama"),
]


@pytest.mark.parametrize("changes", RUNS)
def test_a_run_is_the_naive_one(changes, tmp_path):
    """Weights, logged norms and the saved model; measured or not, clipped, in epochs, with KL, with
    adapters."""
    changes = changes | BRIEF | dict(optimizer="sgd", lr=0.3, steps=2)
    if "kl" in changes or changes.get("agg") == "mean":  # by default where there is what to measure
        changes |= dict(geometry_every=-1, probe_every=-1)
    if "model" in changes:
        changes |= {"model": save_model(changes["model"], tmp_path / "start")}
    run(tmp_path, **changes)
    config = settings(tmp_path, **changes)
    start, theta, norms, ratios, plain = naive_run(config)
    before, after = flat(start.values()), flat(theta.values())
    assert relative_error(weights(tmp_path, start) - before, after - before) < 1e-4
    assert all(("lora" in name) == bool(config.lora) for name in start)
    assert config.epochs == 1 or max(ratios) > config.clip
    first, *_ = lines = read(tmp_path)[:-1]
    log = pd.DataFrame(lines)
    assert [*log.grad_norm] == pytest.approx(np.reshape(norms, (2, -1)).mean(1), rel=1e-4)
    assert (log.clipped == (config.max_grad_norm == 0.05)).all() and (log.logprob_gap < 1e-5).all()
    # With `mean` or KL the loss has another gradient than what is measured.
    measured = config.agg != "mean" and not config.kl and bool(config.geometry_every)
    assert [key in first for key in ("cos_mean", "curvature")] == [measured] * 2
    ids = torch.arange(20, 60).view(2, 20)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    expected = naive_forward(plain, theta)(ids).logits
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-3, atol=1e-3)


def weights(out, names) -> torch.Tensor:
    """The trained weights of a run's checkpoint."""
    saved = load_file(out / grpo.CHECKPOINT)
    return flat(saved[f"weights.{name}"] for name in names)


def test_a_task_brings_its_settings_and_a_model_or_data_of_ones_own_is_mathematics():
    rates = {task: Config(task=task).lr for task in grpo.TASKS}
    assert rates == {"letters": 2e-4, "arith": 3e-4, "gsm8k": 1e-6, "math": 1e-6}
    assert Config(task="gsm8k", lora=64).lr == pytest.approx(1e-5)
    assert Config(lr=0.5, lora=1).lr == 0.5
    own = [Config(), Config(model="DIR"), Config(data="FILE"), Config(task="letters", model="DIR")]
    assert [config.task for config in own] == ["letters", "math", "math", "letters"]
    assert [config.out for config in own[:2]] == ["runs/letters-std-0", "runs/math-std-0"]
    assert (own[1].max_new_tokens, own[1].lr, own[1].instruction) == (1024, 1e-6, grpo.BOXED)
    rewards = [grpo.TASKS[config.task].reward("so 5.0\n", "5") for config in own]
    assert rewards == [0.0, 1.0, 1.0, 0.0]  # exact match, the grader


TURN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ END }}{% endfor %}"
ENDS = [  # what a template puts after an answer, and what of it ends a completion
    ("<|im_end|>\n", ["<|im_end|>"]),
    ("<eos>", []),  # which ends one already
    ("\nUser:", []),  # plain text
    ("{{ raise_exception('no') if m.role == 'assistant' }}", []),
]


@pytest.mark.parametrize(("end", "more"), ENDS)
def test_what_ends_a_turn_by_the_template_ends_a_completion(end, more, tmp_path):
    path = str(shutil.copytree(LETTERS.model, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TURN.replace("{{ END }}", end)
    tokenizer.save_pretrained(path)
    for chat in (True, False):
        policy = grpo.load_policy(settings(tmp_path, model=path, chat=chat))
        wanted = ["<eos>", *more * chat]
        assert policy.eos_ids == sorted(tokenizer.convert_tokens_to_ids(wanted))


def read(out, name: str = "metrics.jsonl") -> list[dict]:
    """A log, without what the clock says."""
    clock = "seconds_rollout", "seconds_update", "tokens_per_second"
    rows = map(json.loads, (Path(out) / name).read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in clock} for row in rows]


def test_bfloat16_weights_follow_float32_masters(tmp_path):
    config = settings(tmp_path, dtype="bfloat16", optimizer="sgd", lr=1e-3, steps=1, **UNMEASURED)
    grpo.train(config, reward=parity)
    policy = grpo.load_policy(config)
    batch = step_batch(policy, 0, config)
    # Those that a run trains on: in other micro-batches bfloat16 would be rounded otherwise.
    active = [row for row, A in enumerate(batch.advantages.flatten()) if A]
    gradient = flat(grpo.loss_gradient(policy, batch, active, config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    found, start = weights(tmp_path, policy.masters), flat(policy.masters.values())
    torch.testing.assert_close(found, start - 1e-4 * gradient, rtol=1e-6, atol=1e-8)
    assert torch.equal(flat(model.parameters()), found.bfloat16())
    assert (found != start).float().mean() > 0.5


# ------------------------------------------ measurement -------------------------------------------


class LogLinear(torch.nn.Module):
    """P prompts of a token, K answers of a token, the first one right, in closed form:
    softmax(features[x] @ theta)."""

    def __init__(self, P: int, K: int):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.features = torch.randn(P, K, 6, dtype=torch.float64, generator=generator)
        self.theta = torch.nn.Parameter(torch.randn(6, dtype=torch.float64, generator=generator))
        self.device, self.config = torch.device("cpu"), None

    def forward(self, ids, **_):
        return SimpleNamespace(logits=self.features[ids] @ self.theta.double())

    def closed_form(self, p: int):
        """Probabilities [K], scores [K, D]; the expected reward's gradient [D], Hessian [D, D]."""
        probs = torch.softmax(self.features[p] @ self.theta.detach(), -1)
        scores = self.features[p] - probs @ self.features[p]
        centred = probs * ((torch.arange(len(probs)) == 0).double() - probs[0])
        return probs, scores, centred @ scores, torch.einsum("k,ki,kj->ij", centred, scores, scores)

    def measured(self, p: int, actions) -> dict:
        tokens = torch.as_tensor(actions)[None, :, None]
        nothing, ones = torch.zeros(tokens.shape).double(), torch.ones_like(tokens[..., 0])
        rewards = (tokens[..., 0] == 0).double()
        batch = Batch(
            [[p]], nothing, tokens, ones, nothing, nothing, nothing, nothing * math.nan, rewards
        )
        batch = with_advantages(batch, "std", "sequence")
        return measure(make_policy(self), batch, 0, settings("-"))


def measure(policy: Policy, batch: Batch, p: int, config: Config) -> dict:
    """What a step measures of a prompt, from the parts that its two halves have in the update."""
    G, found = batch.lengths.shape[1], defaultdict(list)
    for rows in (range(p * G, p * G + (G + 1) // 2), range(p * G + (G + 1) // 2, p * G + G)):
        active = rows if batch.advantages[p].any() else []
        part = grpo.loss_gradient(policy, batch, active, config)
        grpo.measure_half(policy, batch, rows, part, None, config, True, found)
    return found


@pytest.mark.parametrize("G", [2, 3, 4])
def test_over_all_possible_groups_the_measurements_average_to_the_truth(G):
    """Gradient, corrected norm, cosine, signal share, Fisher trace E|grad log pi|^2; curvature,
    where it can be had."""
    model, truth, averages, first = LogLinear(2, 3), [], [], (G + 1) // 2
    for p in range(2):
        probs, scores, gradient, _ = model.closed_form(p)
        average = 0.0
        for actions in itertools.product(range(3), repeat=G):
            found, halves = model.measured(p, actions), (actions[:first], actions[first:])
            for own, other, value in zip(halves, halves[::-1], found["curvature"]):
                alike = len({action == 0 for action in own}) == 1
                assert math.isnan(value) == (alike or len(other) < 2)
            A, B = (vector.double() for vector in found["vector"])
            whole = (first * A + (G - first) * B) / G
            values = torch.tensor([*found["fisher_half"], whole @ whole])
            sums = torch.cat([whole, values, torch.outer(A, B).flatten()])
            average += probs[list(actions)].prod() * sums
        expected = torch.cat([gradient, (probs @ scores.square().sum(1)).expand(2)])
        torch.testing.assert_close(average[:8], expected, rtol=1e-5, atol=1e-6)
        truth.append(gradient)
        averages.append(average)
    x, y = truth
    # By linearity these are the means of the products that gradient_geometry divides: x y, and as
    # prompts are independent (x_A y_A)(x_B y_B), are traces of E[x_A x_B'] and of E[y_A y_B'].
    moments = [average[9:].view(6, 6) for average in averages]
    factor = 1 + 1 / (G - 1) ** 2
    for moment, g in zip(moments, truth):
        torch.testing.assert_close(moment, factor * torch.outer(g, g), rtol=1e-5, atol=1e-6)
    squared = float((moments[0] * moments[1]).sum() / (moments[0].trace() * moments[1].trace()))
    assert squared == pytest.approx(float((x @ y) ** 2 / (x @ x) / (y @ y)), rel=1e-5)
    found, _ = grpo.gradient_geometry(torch.stack(truth), torch.stack(truth), G, [1, 2])
    assert found["cos_sq_signal"] == pytest.approx(squared, rel=1e-5)
    exact = float(2 * x @ y / (x @ x + y @ y))
    assert found["cos_signal"] == pytest.approx(factor * exact, rel=1e-5)


def test_cross_fitted_curvature_is_the_true_one_along_the_same_directions():
    model, errors, truths = LogLinear(300, 5), [], []
    torch.manual_seed(0)
    for p in range(300):
        probs, _, _, hessian = model.closed_form(p)
        found = model.measured(p, torch.multinomial(probs, 16, replacement=True))
        for v, curvature in zip(found["vector"], found["curvature"]):
            if not math.isnan(curvature):
                truths.append(float(v.double() @ hessian @ v.double() / v.double().square().sum()))
                errors.append(curvature - truths[-1])
    scaled = np.array(errors) * truths  # neither shifted nor scaled
    assert within(errors, 0.0) and within(scaled, 0.0)
    assert not within(scaled + np.square(truths), 0.0, 6)  # if all estimates were 0, it would show


@pytest.mark.parametrize(("dtype", "lora", "close"), [("float32", 0, 1e-5), ("bfloat16", 4, 0.1)])
def test_what_is_measured_of_a_model_is_the_naive_value(dtype, lora, close):
    """Halves' gradients, Fisher traces, and the exact Hessian-vector product in float64; adapters
    start as nothing."""
    config = settings("-", group=8, prompts=10, dtype=dtype, lora=lora)
    policy, curvatures = grpo.load_policy(config), []
    how = dict(dtype=config.dtype, attn_implementation="eager")
    plain = AutoModelForCausalLM.from_pretrained(LETTERS.model, **how)
    both = [step_batch(x, 0, config) for x in (policy, grpo.load_policy(replace(config, lora=0)))]
    assert torch.equal(*(x.tokens for x in both))
    assert next(iter(policy.trained.values())).dtype == torch.float32
    torch.manual_seed(0)
    for name, master in policy.masters.items():
        master.data += 0.05 * torch.randn(master.shape) * ("lora_B" in name)
    theta = {name: x.detach().double().requires_grad_() for name, x in policy.masters.items()}
    forward = naive_forward(plain.double(), theta)

    def gradient(value, again: bool = False):
        kept = dict(retain_graph=True, create_graph=again)
        found = torch.autograd.grad(value, [*theta.values()], **kept)
        return torch.cat([g.flatten() for g in found])

    batch = step_batch(policy, 0, config)
    for p, (r, logprobs) in enumerate(zip(batch.rewards, naive_logprobs(forward, batch))):
        found = measure(policy, batch, p, config)
        if r[:4].std() == 0:
            continue
        sums = torch.stack([values.sum() for values in logprobs])
        halves = sums.view(2, 4), (r - (r.sum() - r) / 7).view(2, 4)
        wanted = [gradient((A * s).mean()) for s, A in zip(*halves)]
        assert all(relative_error(v, g) < close for v, g in zip(found["vector"], wanted))
        fisher = [4 * float(gradient(s.mean()).square().sum()) for s in halves[0]]
        assert found["fisher_half"] == pytest.approx(fisher, rel=2 * close)
        v = found["vector"][0].double() / found["vector"][0].norm()
        own = (r[4:] - r[4:].mean()) * 4 / 3
        surrogate = (own * (sums[4:] - sums[4:].detach()).exp()).mean()
        exact = float(gradient(gradient(surrogate, True) @ v) @ v)
        curvatures.append((found["curvature"][0], exact))
    found, wanted = np.array(curvatures).T
    assert len(found) > 3 and np.corrcoef(found, wanted)[0, 1] > 0.999
    assert np.median(np.abs(found - wanted) / np.abs(wanted).mean()) < 0.02


def test_the_description_of_a_measured_step_by_hand():
    """Gradients (1, 0) and (3, 4), of which the first half has 2 of 3 completions; hidden states
    like them."""
    vectors = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    apart = torch.tensor([[0.5, 2.0], [-1.0, -4.0]])
    found = {"vector": [v + half for v in vectors for half in apart]}
    line, columns = grpo.describe_measured(found, [*vectors], ["a", "b"], 3, True)
    assert columns["grad_norm"].tolist() == pytest.approx([1, 5])
    assert line["cos_signal_between"] == line["cos_signal"] and math.isnan(
        line["cos_signal_within"]
    )
    assert [line["feature_cos"], line["feature_cos_centered"]] == pytest.approx([0.6, 1.0])


# ---------------------------------------------- runs ----------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that others are compared with."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(out)
    return out


def assert_same_run(out, other) -> None:
    """Logs, weights and moments of the one equal those of the other, to the bit."""
    assert all(read(out, name) == read(other, name) for name in grpo.LOGS)
    ours, theirs = (load_file(Path(path) / grpo.CHECKPOINT) for path in (out, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


KEYS = """step reward pass_rate reward_std frac_all_right frac_all_wrong entropy length truncated
    grad_norm clipped skipped logprob_gap lr"""
MEASURES = """n_gradients cos_mean cos_std cos_positive cos_small interference signal_share
    cos_signal cos_sq_signal cos_signal_within cos_sq_signal_within cos_signal_between
    cos_sq_signal_between feature_cos feature_cos_centered"""
PROBES = ["curvature", "reward_std_half", "pass_rate_half", "fisher_half"]


def test_the_advantages_decide_the_update_of_a_measured_step_too(tmp_path, monkeypatch):
    """Others in their place, of the sizes 0 to 14: they are those of its gradient."""
    A = torch.arange(15.0).view(3, 5) - 7
    monkeypatch.setattr(grpo, "group_advantages", lambda rewards, norm: A)
    changes = BRIEF | dict(steps=1, optimizer="sgd", lr=1.0, max_grad_norm=0)
    run(tmp_path, probe_every=1, **changes)
    policy = grpo.load_policy(config := settings(tmp_path, **changes))
    before, batch = flat(policy.masters.values()), step_batch(policy, 0, config)
    now = naive_logprobs(policy.model, batch)
    loss = sum(A[p, g] / 15 * now[p][g].sum() for p in range(3) for g in range(5))
    gradient = flat(torch.autograd.grad(loss, [*policy.trained.values()]))
    moved = weights(tmp_path, policy.masters) - before
    assert relative_error(moved, 0.1 * gradient) < 1e-4 and "curvature" in read(tmp_path)[0]


def test_a_run_may_go_on_where_auto_means_another_dtype_and_from_when_it_was_stored(tmp_path):
    run(tmp_path, steps=2, dtype="auto", **BRIEF | UNMEASURED)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "auto"
    path = tmp_path / grpo.CHECKPOINT
    with safe_open(path, "pt") as file:
        state, tensors = json.loads(file.metadata()["state"]), load_file(path)
    state["config"]["dtype"] = "bfloat16"  # as a run on CUDA had it
    save_file(tensors, path, {"state": json.dumps(state)})
    with pytest.raises(InputError, match="other settings.*dtype.*bfloat16.*float32"):
        run(tmp_path, steps=3, dtype="float32", resume=True, **BRIEF | UNMEASURED)
    run(tmp_path, steps=3, dtype="auto", resume=True, **BRIEF | UNMEASURED)


def test_without_hidden_states_a_run_has_no_feature_cosines(tmp_path, monkeypatch):
    extend = grpo.extend

    def without(*args, **options):
        return SimpleNamespace(logits=extend(*args, **options).logits)

    monkeypatch.setattr(grpo, "extend", without)
    run(tmp_path, steps=1, **BRIEF)
    line, last = read(tmp_path)
    assert line["feature_cos"] is line["feature_cos_centered"] is None
    assert line["cos_mean"] is not None


def test_what_a_run_leaves(whole):
    assert {x.name for x in whole.iterdir()} == {*grpo.LOGS, "config.json", "checkpoint", "model"}
    metrics, samples = read(whole), read(whole, "samples.jsonl")
    evaluation = {"eval_pass_rate", "eval_greedy", "eval_reward", "eval_greedy_reward"}
    always = {*KEYS.split(), *MEASURES.split()}
    assert set(metrics[1]) == always == set(metrics[8]) - evaluation - {"curvature"}
    assert set(metrics[10]) == evaluation | {"step"}
    assert [row["step"] for row in metrics] == list(range(11))
    assert [row["step"] for row in metrics if evaluation & set(row)] == [0, 4, 8, 10]
    assert len(samples) == 16
    assert set(samples[0]) == {"step", "question", "completion", "answer", "reward"}
    assert all(row["reward"] == parity(row["completion"], row["answer"]) for row in samples)
    model = dict(AutoModelForCausalLM.from_pretrained(whole / "model").named_parameters())
    assert torch.equal(flat(model.values()), weights(whole, model))
    lines, rows = pd.DataFrame(metrics), pd.DataFrame(read(whole, "prompts.jsonl"))
    lines, std = lines[:-1], (rows.pass_rate * (1 - rows.pass_rate)) ** 0.5
    steps = rows.assign(mixed=std > 0, square=rows.grad_norm**2).groupby("step")
    share, count = steps.grad_sq_signal.sum() / steps.square.sum(), steps.mixed.sum()
    for name, expected in (
        (rows.reward_std, std),
        (rows.scale, np.where(std > 0, 1 / (std + 1e-6), 0)),
        (lines.pass_rate, steps.pass_rate.mean()),
        (lines.frac_all_right, steps.pass_rate.apply(lambda rates: (rates == 1).mean())),
        (lines.frac_all_wrong, steps.pass_rate.apply(lambda rates: (rates == 0).mean())),
        (lines.n_gradients, count),
        (lines.signal_share, share.where(count > 1)),
    ):
        np.testing.assert_allclose(name.astype(float), expected, rtol=1e-6, atol=1e-9)
    assert ((rows.grad_norm > 0) == (std > 0)).all()
    probed = rows[rows.step % 4 == 0]
    assert rows[PROBES].notna().all(axis=1).equals(rows.step % 4 == 0)
    found, deviations, rates = (np.array(probed[name].tolist(), float) for name in PROBES[:3])
    np.testing.assert_allclose(rates @ [0.6, 0.4], probed.pass_rate)
    np.testing.assert_allclose(deviations, (rates - rates**2) ** 0.5)
    np.testing.assert_allclose(lines.curvature[::4], [np.nanmean(x) for x in found.reshape(3, 6)])


def test_the_progress_line_says_how_long_is_left(tmp_path, monkeypatch, capsys):
    ticks = itertools.count(20, 20)  # of a step three: began, sampled, updated
    monkeypatch.setattr(grpo, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    run(tmp_path, **SETTINGS | UNMEASURED | BRIEF | dict(steps=4))
    left = re.findall(r"([\d.]+) min left", capsys.readouterr().out)
    assert left == ["2.0", "1.7", "0.9", "0.0"]  # 3 steps at 40 s, 2 at 100/2, 1 at 160/3


def test_what_depends_on_neither_norm_nor_measuring(whole, tmp_path, monkeypatch):
    """Prompts and the first rollouts; the probe changes no gradient, and sketched cosines are
    close."""
    run(tmp_path / "none", norm="none", **UNMEASURED)
    monkeypatch.setattr(grpo, "SMALL", 0)
    run(tmp_path / "sketch", geometry_every=1, probe_every=0)
    paths = (whole, tmp_path / "none", tmp_path / "sketch")
    std, none, sketch = (pd.DataFrame(read(out)[:-1]) for out in paths)
    prompts = [[row["prompt"] for row in read(out, "prompts.jsonl")] for out in paths]
    assert prompts[0] == prompts[1] and "cos_mean" not in none and "curvature" not in sketch
    for key in ("reward", "entropy", "length", "eval_reward"):
        assert none[key][0] == std[key][0]
    assert none.grad_norm[0] != std.grad_norm[0] and none.entropy[9] != std.entropy[9]
    np.testing.assert_allclose(sketch.cos_mean, std.cos_mean, atol=0.02)
    ours, theirs = (load_file(out / grpo.CHECKPOINT) for out in paths[::2])
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def at_call(number: int, act):
    """The reward, which at its call of this number acts first."""
    calls = itertools.count(1)
    return lambda *texts: (next(calls) == number and act()) or parity(*texts)


RECEIVED = []  # signals
INTERRUPTED = [
    ({}, 40 + 75 + 40 + 33, sys.exit, 7),
    ({}, 40 + 2 * 15 + 7, lambda: RECEIVED.append(signal.SIGTERM), 3),
    (dict(optimizer="sgd", lora=4, steps=4), 60, sys.exit, 1),
]


@pytest.mark.parametrize(("changes", "call", "act", "steps"), INTERRUPTED)
def test_an_interrupted_run_resumes_to_the_bit(whole, changes, call, act, steps, tmp_path):
    """At a reward, of 40 an evaluation and 15 a step; or, after a signal, between two steps."""
    out, other = tmp_path / "run", tmp_path / "whole" if changes else whole
    if changes:
        run(other, **changes)
    RECEIVED.clear()
    with pytest.raises((SystemExit, RunError)) as stopped:
        run(out, at_call(call, act), RECEIVED, **changes)
    said = stopped.value
    assert not RECEIVED or said.status == 143 and "add --resume" in str(said)
    assert len(read(out)) == steps
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')  # killed while writing
    run(out, resume=True, **changes)
    assert_same_run(out, other)


def test_a_run_survives_its_beginning_a_full_disk_and_its_end(whole, tmp_path, capsys, monkeypatch):
    """It begins anew where none began, a full disk is one line and costs nothing, and it goes on
    when finished."""
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "state.tmp").write_text("half a checkpoi")  # killed while it began
    run(tmp_path, steps=5)
    monkeypatch.setitem(grpo.TASKS, "letters", LETTERS._replace(reward=parity))
    checkpoint, former = tmp_path / grpo.CHECKPOINT, resource.getrlimit(resource.RLIMIT_FSIZE)
    first = checkpoint.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(first) // 2, former[1]))
    status = command(settings(tmp_path, resume=True))
    resource.setrlimit(resource.RLIMIT_FSIZE, former)
    error = capsys.readouterr().err
    assert status == 1 and re.search("^grpo.py: stopped: .*File too large.*\n\\Z", error, re.M)
    assert checkpoint.read_bytes() == first and list(checkpoint.parent.iterdir()) == [checkpoint]
    run(tmp_path, resume=True, save_every=7)
    assert_same_run(tmp_path, whole)
    # After running out of memory, say.
    run(tmp_path, resume=True, steps=11, micro_batch=6, eval_every=3)
    assert [row["step"] for row in read(tmp_path) if "eval_reward" in row] == [0, 4, 8, 11]


FOREIGN = {"state": json.dumps({"step": 1, "logs": {}, "config": {}})}


def cut(name: str, size: int):
    return lambda out: os.truncate(out / name, size)


def exchange(out: Path) -> None:
    save_file({"a": torch.ones(1)}, out / grpo.CHECKPOINT, FOREIGN)


HARM = [  # what happens to the files, settings of the resuming run, what is said
    (None, dict(resume=False), "holds a run: add --resume to continue it, or --out OTHER_DIR"),
    (None, dict(norm="none", lr=2e-3), "other settings.*norm.*'std'.*'none'.*lr.*0.001.*0.002"),
    (None, dict(steps=3), "10 steps are done, over --steps 3"),
    (cut(grpo.CHECKPOINT, 99_999), {}, "state.safetensors: "),
    (exchange, {}, "state.safetensors: .* tensor"),
    (cut("prompts.jsonl", 50), {}, "prompts.jsonl is shorter"),
]


@pytest.mark.parametrize(("harm", "changes", "message"), HARM)
def test_what_cannot_be_resumed_is_named_and_left_as_it_is(whole, tmp_path, harm, changes, message):
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    if harm:
        harm(copy)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=message):
        run(copy, **dict(resume=True) | changes)
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


def command(arguments) -> int:
    """Exit status of the command line, of these arguments or settings."""
    if isinstance(arguments, Config):
        options = {key.replace("_", "-"): value for key, value in asdict(arguments).items()}
        arguments = [f"--{key}={value}" for key, value in options.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "signal", lambda *_: None)  # the test run keeps its own handlers
        try:
            return grpo.main(arguments)
        except SystemExit as end:
            return end.code


FIVE = pytest.raises(RunError, match="5 steps in a row")


@pytest.mark.parametrize(("last", "ends"), [(2, nullcontext()), (6, FIVE)])
def test_spoiled_logits_skip_the_step_and_five_in_a_row_end_the_run(
    last, ends, tmp_path, monkeypatch
):
    sample, rows, steps = grpo.sample_tokens, grpo.prompt_rows, [0]

    def spoiled(logits, *more):
        return sample(logits * (math.nan if 2 <= steps[-1] <= last else 1), *more)

    def counted(step, *more):
        return steps.append(step) or rows(step, *more)

    monkeypatch.setattr(grpo, "prompt_rows", counted)
    monkeypatch.setattr(grpo, "sample_tokens", spoiled)
    with ends:
        run(tmp_path, steps=8, eval_every=0)
    log = [row for row in read(tmp_path) if "skipped" in row]
    assert [row["step"] for row in log if row["skipped"]] == [*range(2, last + 1)]
    assert all((row["grad_norm"] is row["entropy"] is None) == row["skipped"] for row in log)
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / grpo.CHECKPOINT).values())


FAILING = [
    (lambda *_: 1 / 0, "division by zero"),
    (lambda *_: math.nan, "finite"),
    (lambda *_: None, "TypeError"),
]


@pytest.mark.parametrize(("reward", "message"), FAILING)
def test_a_reward_that_fails_names_completion_and_answer(reward, message, tmp_path):
    with pytest.raises(RunError, match=f"{message}.*'[0-9]*'.*answer='[0-9]{{3}}'"):
        run(tmp_path, reward)


def test_rewards_outside_zero_and_one_have_no_pass_rate(tmp_path):
    run(tmp_path, lambda *x: 3 * parity(*x) - 1, steps=1, eval_problems=4)
    line, final = read(tmp_path)
    assert line["pass_rate"] is line["eval_pass_rate"] is final["eval_greedy"] is None
    samples = read(tmp_path, "samples.jsonl")[:4]
    assert line["eval_reward"] == np.mean([row["reward"] for row in samples])
    rates = grpo.pass_rates(torch.tensor([[0.0, 1.0, 0.5, 1.0], [0.0, 2.0, 1.0, 1.0]]))
    np.testing.assert_equal(rates.numpy(), [0.5, math.nan])


# ------------------------------------------- processes --------------------------------------------


def process(config: Config, rank: int, size: int, port: int, death: int) -> None:
    """One of the processes that torchrun would start; the last may die, at a call of its reward."""
    where = dict(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(size), **where)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    death = death if rank == size - 1 else -1
    reward = at_call(death, lambda: os.kill(os.getpid(), signal.SIGKILL))
    grpo.TASKS["letters"] = LETTERS._replace(reward=reward)
    sys.exit(command(config))


# Forks from a process that has imported torch, and done no more.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["test_grpo", "peft"])


@pytest.fixture(scope="session", autouse=True)
def server(request) -> None:
    """The process from which others fork starts at once: its imports run beside the first tests."""
    if len(request.session.items) > 1:
        multiprocessing.forkserver.ensure_running()


def start(config: Config, size: int = 1, death: int = -1) -> list:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    each = [(config, rank, size, port, death) for rank in range(size)]
    processes = [SERVER.Process(target=process, args=arguments) for arguments in each]
    for one in processes:
        one.start()
    return processes


def statuses(processes) -> list[int]:
    for each in processes:
        each.join(120)
        each.kill()
    return [each.exitcode for each in processes]


@slow
def test_killed_at_random_moments_a_run_resumes_to_the_bit(tmp_path):
    """SIGKILL at seeded moments, until 50 have hit; a checkpoint at every second step."""
    config, kills = settings(tmp_path / "whole", save_every=2, steps=20), 50
    assert statuses(start(replace(config, steps=0))) == [0]  # with all that there is to prepare
    began = time.perf_counter()
    assert statuses(start(replace(config, resume=True))) == [0]
    length, rng = time.perf_counter() - began, np.random.default_rng(kills)
    while kills:
        out, status = tmp_path / str(kills), None
        while status is None:
            resume = (out / grpo.CHECKPOINT).exists()
            (running,) = start(replace(config, out=str(out), resume=resume))
            running.join(rng.uniform(0, length) if kills else None)
            status, kills = running.exitcode, kills - (running.exitcode is None)
            running.kill()
            running.join()
        assert status == 0
        assert_same_run(out, config.out)
        shutil.rmtree(out)


def assert_like(out, other) -> None:
    """The same tokens at every step, so the same logs but for rounding, and the same weights."""
    assert read(out, "samples.jsonl") == read(other, "samples.jsonl")
    exact = {"reward", "length", "prompt", "pass_rate"}
    compared = {*KEYS.split(), *MEASURES.split(), *exact, "grad_sq_signal"} - {"logprob_gap"}
    for name in grpo.LOGS[:2]:
        ours, theirs = (pd.DataFrame(read(path, name)) for path in (out, other))
        for key in compared & {*theirs}:
            a, b = (x[key].astype(float) for x in (ours, theirs))
            np.testing.assert_allclose(a, b, *((1e-12, 0) if key in exact else (1e-2, 1e-4)))
    ours, theirs = (load_file(path / grpo.CHECKPOINT) for path in (out, other))
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in theirs) < 1e-5


SHARED_OUT = dict(steps=5, prompts=4, optimizer="sgd", lr=0.1, probe_every=2)
MORE = [
    dict(norm="none", agg="mean", probe_every=-1),
    dict(norm="var", kl=0.1, epochs=2, probe_every=-1),
    dict(lora=4, lr=1.0),
]


@slow
@pytest.mark.parametrize("changes", MORE)
def test_the_number_of_processes_changes_nothing(changes, tmp_path):
    run(tmp_path / "1", **SHARED_OUT | changes)
    for size in (2, 3):
        out = tmp_path / str(size)
        assert {*statuses(start(settings(out, **SHARED_OUT | changes), size))} == {0}
        assert_like(out, tmp_path / "1")


def test_a_process_that_dies_ends_the_others_and_another_number_goes_on(tmp_path, monkeypatch):
    """Of 3 the last dies in step 3, after 2 * 7 rewards of the evaluation and 3 * 10 of steps."""
    changes = SHARED_OUT | dict(norm="batch", agg="token", save_every=2)
    config = settings(tmp_path / "run", **changes)
    processes = start(config, 3, death=14 + 30 + 5)
    run(tmp_path / "whole", **changes)  # meanwhile
    assert statuses(processes) == [1, 1, -signal.SIGKILL]
    assert len(read(tmp_path / "run")) == 3
    assert statuses(start(replace(config, resume=True), 2)) == [0, 0]
    assert_like(tmp_path / "run", tmp_path / "whole")
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(InputError, match="4 prompts a step are too few for 5 processes"):
        run(tmp_path / "other", **changes)


def test_an_unexpected_error_keeps_its_traceback_and_a_lost_process_is_one_line(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(RunError, match="another process has stopped: Connection closed by peer"):
        grpo.collective(fail)
    monkeypatch.setattr(grpo, "train", fail)
    with pytest.raises(RuntimeError, match="^Connection closed by peer$"):
        command([])


def test_each_process_evaluates_its_share_in_batches_of_its_share(tmp_path, monkeypatch):
    config, sizes, rollout = settings(tmp_path, prompts=2, group=4), [], grpo.rollout

    def counted(policy, prompts, *more):
        sizes.append(len(prompts))
        return rollout(policy, prompts, *more)

    policy = grpo.load_policy(config)
    monkeypatch.setattr(grpo, "rollout", counted)
    problems = grpo.encode_problems(grpo.load_rows(LETTERS.test, False)[:9], policy, config)
    whole, samples = grpo.evaluate(policy, problems, range(9), 1, parity, config)
    monkeypatch.setattr(grpo, "gather", lambda part: part)
    grpo.evaluate(policy, problems, range(4, 9), 2, parity, config)
    assert sizes == [8, 1] * 2 + [4, 1] * 2 and len(samples) == 4
    assert whole["eval_pass_rate"] == whole["eval_reward"]


# --------------------------------------- tasks and rewards ----------------------------------------

GRADES = r"""
18 ✓ so\n#### 18 ¦ #### 18. ¦ #### 18.0 ¦ #### 018 ¦ ####18
18 ✓ #### 18 dollars ¦ #### The answer is 18
18 ✓ #### **18** ¦ #### 10 + 8 = 18 ¦ I think 12, no, 18.
18 ✗ #### 17 or 18 ¦ #### ¦ nothing ¦  ¦ 180 ¦ \boxed{18 ‖ 17 ✗ \boxed{17} \boxed{18
12 ✗ I think 12, no, 18. ¦ #### 1,2 ‖ 7 ✓ #### +7 ¦ so \fbox{7} of 8 ✗ #### -7
-7 ✓ #### -7 ¦ #### −7 ¦ #### - 7 ¦ #### -$7 ¦ #### $-7 ‖ 1200 ✓ #### $1,200 ¦ It costs $1,200.
200 ✗ #### $1,200 ‖ 1200.5 ✓ #### 1,200.50 ‖ 1,200 ✓ #### 1200 ✗ #### 1
1234.5 ✓ \boxed{\$1,234.50} ‖ 7.5 ✓ \boxed{\$7.50} ‖ 10000 ✓ \boxed{10,\!000} ‖ 3.5 ✓ \boxed 3.5.
3 ✓ pages 1-3 ¦ #### 4 or \boxed{3} ✗ \boxed 3.5 ¦ #### 10-3 ¦ #### 3/0 ¦ #### 3\nno:\n#### 4
4 ✓ #### 3\nno:\n#### 4 ¦ \boxed{3} #### 4 ‖ 9 ✗ 12 #### 4 and then 9 ‖ 8 ✗ #### 7 apples
50 ✓ #### 50% ¦ #### 50\%
5 ✓ #### €5 ¦ #### 5 a day ‖ 5 ✓ #### 5 km/hour ¦ #### 5 m
5 ✓ #### x = 5 ¦ \boxed{5\text{ cm}} ¦ \boxed 5 ✗ #### 5x
1/2 ✓ #### .5 ‖ 0.75 ✓ #### 3/4 ‖ 0.5 ✓ \boxed{\frac{1}{2}} ‖ \frac{1}{2} ✓ \boxed{\dfrac12}
2 ✗ \boxed{2\pi} ¦ #### 2 pi ¦ \boxed{2  pi} ¦ \boxed{2 x} ¦ \boxed{\sqrt{2}}
2\sqrt{2} ✓ \boxed{\sqrt{8}}
\text{Evelyn} ✓ \boxed{\text{Evelyn}} ¦ \boxed{Evelyn} ✗ \boxed{Bob} ‖ 90 ✓ \boxed{90^\circ}
\left( 3, \frac{\pi}{2} \right) ✓ \boxed{(3,\frac{\pi}{2})} ‖ [-2,7] ✓ \boxed{x \in [-2,7]}
(-2,7) ✗ \boxed{(7,-2)} ‖ 42 ✓ \boxed{42} \ ‖ 864 \mbox{ inches}^2 ✓ \boxed{864}
15 ✓ \boxed{15 \text{ cm}^{3}} ‖ \text{e} ✗ \boxed{\text{e}^2}
(3,100) ✓ \boxed{(3, 100)} ✗ \boxed{3100} ‖ [0,100) ✗ \boxed{100} ‖ 0 ✗ \boxed{}
-5 ✓ it is −5 ¦ −$5.\n ✗ 3 - 5 ‖ 3/4 ✓ so 3/4 ¦ 0.75\n ✗ 4 ‖ 4 ✗ it is 3/4 ¦ 1.5e3 ‖ 3 ✗ 3/4 ¦ 1.5e3
1500 ✓ it is 1.5e3.\n ¦ #### 1.5e3 ¦ #### 15E+2 ✗ 1.5e2 ‖ 10 ✗ 1e100
5 ✓ 3 - 5 ¦ ```\n5\n```\n ¦ $5$\n\n ‖ 1+x ✓ \boxed{x+1} ‖ 53 ✗ \boxed{5(3)} ‖ 1024 ✓ \boxed{2^{10}}
-3 ✓ it is -3
"""


@pytest.mark.parametrize("line", re.split(" ‖ |\n", GRADES.strip()))
def test_grade(line):
    """A gold answer, and completions that have it, or do not; also in a thread, without signals to
    stop a parser."""
    answer, *parts = re.split(" ([✓✗]) ", line.replace("\\n", "\n"))
    with ThreadPoolExecutor(1) as pool:
        for mark, completions in zip(parts[::2], parts[1::2]):
            for completion in completions.split(" ¦ "):
                there = pool.submit(grpo.grade, completion, answer).result()
                assert grpo.grade(completion, answer) == there == (mark == "✓"), completion


REPEATED = dict(deadline=None, database=None, derandomize=True)  # the same examples at every run
# What stands around an answer, or around the line that marks one; what marks it.
AROUND = "{}¦{}\n¦{}\n\n¦ {} ¦{}.¦{}.\n¦**{}**¦**{}.**\n¦${}$¦${}$.¦`{}`¦x = {} \n"
AROUND += "¦```\n{}\n```¦```text\n{}\n```\n¦\n\n{}"
MARKS = "{}¦I think 12, no, {}¦#### {}¦so 12:\n#### {}¦#### **{}**¦#### ${}$¦\\boxed{{{}}}"
FORMS = "{}¦{} km¦{} apples¦{} km/hour¦{} square feet.¦{}%¦{}\\%¦${}¦\\${}¦€{}¦{} €"


@pytest.mark.parametrize("examples", [500, pytest.param(20_000, marks=slow)])
def test_a_right_number_earns_1_in_every_form_and_its_neighbour_0(examples):
    """Signs, thousands, decimals, percent, currency, units; the neighbour differs by one in the
    last digit."""

    def check(value, decimals, sign, thousands, form, mark, around, inner):
        def text(number):
            shown = f"{number / 10**decimals:{',' if thousands else ''}.{decimals}f}"
            return form.format(sign + shown) if inner else sign + form.format(shown)

        gold = f"{'-' * (sign in '-−' and sign != '')}{value / 10**decimals:.{decimals}f}"
        for number, grade in ((value, 1.0), (value + 1, 0.0)):
            completion = around.format(mark.format(text(number)))
            assert grpo.grade(completion, gold) == grade, (completion, gold)

    flags, signs = st.booleans(), st.sampled_from(["", "-", "−", "+"])
    shapes = (st.sampled_from(texts.split("¦")) for texts in (FORMS, MARKS, AROUND))
    parts = st.integers(0, 10**6), st.integers(0, 3), signs, flags, *shapes, flags
    hypothesis.settings(max_examples=examples, **REPEATED)(hypothesis.given(*parts)(check))()


# fmt: off
HOSTILE = [
    "9^{9^{9^9}}", "(9^{99})^{(9^{99})}", "((9^{999})^{999})^{999}", "10000!!", "(" * 200,
    "{" * 200, "x" * 250, "9" * 10**6, "\\boxed{" * 10**5, "####" * 10**5, "1," * 10**6,
    "a" * 10**6, "-" * 10**6, " " * 10**6, "\\text{" * 10**5, "^" * 10**5,
    "(" * 10**5 + "," * 10**5, "\\int_0^1 x^{x^x}", "\\sqrt{" * 60 + "2" + "}" * 60,
    "\\frac{1}{0}", "٣", "\0", "$" * 999,
    pytest.param("\\sum_{n=1}^{9999} \\frac{1}{n^9}", marks=slow),
]
# fmt: on


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_completions_get_no_reward_in_bounded_time(text):
    """As completions, and as a gold answer, which is never boxed."""
    boxed = f"\\boxed{{{text}}}"
    for completion, answer in ((text, "\\frac{3}{4}"), (boxed, "\\frac{3}{4}"), ("3", text)):
        began = time.perf_counter()
        assert grpo.grade(completion, answer) == 0.0
        assert time.perf_counter() - began < 3


STRANGE = ["é" * 301, "(" * 20 + "x", "[a" * 20 + "]" * 20, "{" * 30 + "}" * 30, "9" * 301]


@pytest.mark.parametrize("text", STRANGE)
def test_what_no_answer_is_like_is_never_parsed(text, monkeypatch):
    """The parser needs a second and a hundred megabytes for such a text, and keeps some of them."""
    parsed = []
    monkeypatch.setattr("math_verify.parse", lambda text, **_: parsed.append(text) or [])
    assert grpo.grade("\\boxed{x}", text) == grpo.grade(f"\\boxed{{{text}}}", "x") == 0
    assert parsed == []


ROWS = r"""
{"question": "q", "answer": "2+2=<<2+2=4>>4\n#### 4"} -> 4
{"problem": "q", "solution": "so \\boxed{\\frac{1}{2}}."} -> \frac{1}{2}
{"prompt": "q", "solution": "\\boxed{1} \\boxed{2}", "final_answer": 7} -> 7
{"text": "q", "answer": "1"} -> ! no column of each
{"question": "q", "reply": "1"} -> ! no column .*answer
{"question": "q", "answer": ""} -> ! row 1: ‖ {"question": "q", "answer": null} -> ! row 1:
{"question": "q", "answer": "\\frac{1}{2"} -> ! row 1:
{"question": "q", "answer": "#### "} -> ! row 1:
{"question": " ", "answer": "1"} -> ! row 1: no question
"""


@pytest.mark.parametrize("line", re.split(" ‖ |\n", ROWS.strip()))
def test_columns_are_found_by_name_and_unusable_rows_named(line):
    row, expected = line.split(" -> ")
    rows = Dataset.from_list([json.loads(row)])
    if expected[0] != "!":
        assert grpo.load_rows("file", True, rows) == [("q", expected, None)]
        return
    with pytest.raises(InputError, match=f"^[^\n]*file.*{expected[2:]}[^\n]*$"):
        grpo.load_rows("file", True, rows)


def test_a_split_of_a_data_set_is_loaded_with_or_without_a_configuration(tmp_path):
    for split, answer in (("train", 1), ("test", 2)):
        row = {"question": "q", "answer": answer, "level": 5}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row))
    found = [grpo.load_rows(f"{tmp_path}:{name}", True) for name in ("test", "default:test")]
    assert found == [[("q", "2", 5)]] * 2


FILES = dict(gsm8k_test="gsm8k", svamp="gsm8k", math500="math")


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the public data files are not in {DATA}")
@pytest.mark.parametrize(("file", "task"), FILES.items())
def test_real_files_load_and_every_gold_answer_earns_its_reward(file, task):
    path = f"{DATA}/{file}.jsonl"
    config = Config(task=task, data=path, eval_problems=100)
    train, test = grpo.load_problems(config, None, grpo.grade)
    raw = pd.read_json(path, lines=True, dtype=False).rename(columns={"problem": "question"})
    golds = [answer.split("####")[-1].strip() for answer in raw.answer]
    levels = raw.get("level", [None] * len(raw))
    assert sorted(train + test) == sorted(zip(raw.question, golds, levels, strict=True))
    assert all(grpo.grade(f"so \\boxed{{{answer}}}.", answer) == 1 for answer in golds)


# What answers are made of, what breaks parsers, and what takes for ever if one lets it.
# fmt: off
PIECES = st.sampled_from([
    "\\boxed{", "####", "\\frac", "\\sqrt[", "^{", "9" * 10**6, "1e999999", "\\left(", "\\\\",
    "\\int", "\\begin{pmatrix}", "1,200", "\\text{", "^" * 50, "(" * 300, "é" * 10**6, "9!!!!!!!!",
    "2^{3^{4^{5^6}}}", *"{}!٣½\0\ud800&=$,.-/07x \n%",
])
# fmt: on
PARTS = st.one_of(st.lists(PIECES, max_size=12), st.text(max_size=60))  # to be joined
thorough = pytest.mark.parametrize("examples", [50, pytest.param(5_000, marks=slow)])


@thorough
def test_grade_bears_anything(examples):
    def check(parts):
        began = time.perf_counter()
        assert grpo.grade(*map("".join, parts)) in (0.0, 1.0) and time.perf_counter() - began < 3

    # Hypothesis keeps what it makes: joined texts would be gigabytes of its own.
    pairs = st.tuples(PARTS, PARTS)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # noqa: E731, in GB
    before = peak()
    hypothesis.settings(max_examples=examples, **REPEATED)(hypothesis.given(pairs)(check))()
    assert peak() - before < 0.5


@thorough
def test_files_of_anything_load_or_are_refused_in_one_line(examples, tmp_path):
    values = st.one_of(PARTS.map("".join), st.none(), st.integers(-(2**62), 2**62), st.floats())
    names = st.sampled_from(["question", "problem", "answer", "solution", "x"])
    rows = st.dictionaries(names, values)
    lines = st.one_of(rows.map(lambda row: json.dumps(row).encode()), st.binary(max_size=40))

    def check(lines):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_bytes(b"\n".join(lines))
        try:
            for question, answer, _ in grpo.load_rows(str(path), True):
                assert str(question).strip() and 0 < len(answer) <= grpo.MAX_SPAN
        except InputError as error:
            assert "\n" not in str(error) and str(path) in str(error)

    few = hypothesis.settings(max_examples=examples // 3, **REPEATED)
    few(hypothesis.given(st.lists(lines, max_size=3))(check))()


@pytest.mark.parametrize("name", ["letters", "arith"])
def test_embedded_problems_are_right_and_the_held_out_ones_unseen(name):
    task, shifts = grpo.TASKS[name], set()
    train, test = (grpo.load_rows(path, False) for path in (task.train, task.test))
    questions = [{question for question, *_ in rows} for rows in (train, test)]
    assert len(test) == 512 and len(set.union(*questions)) == len(train) + 512 > 5000
    for question, answer, level in train + test:
        a, b = question.removesuffix("=").split("+")
        if name == "letters":  # each digit plus the letter's own one
            assert level == a
            shifts |= {(a, (int(x) - int(y)) % 10) for x, y in zip(answer, b, strict=True)}
        else:
            assert answer == f"{int(a) + int(b):04}"[::-1]
            powers = 10, 100, 1000
            assert level == sum(int(a) % n + int(b) % n >= n for n in powers)
    assert len(shifts) == len(dict(shifts)) == (6 if name == "letters" else 0)


# ------------------------------- command line, models and the claim -------------------------------


BAD = """
--nrom std -> unrecognized arguments: --nrom std ‖ --norm sd -> invalid choice: 'sd'
--group 1 -> group is 1, not a finite number from 2 on ‖ --group x -> invalid int value: 'x'
--lora -1 -> lora is -1 ‖ --lora 4.5 -> invalid int value: '4.5' ‖ --lr nan -> lr is nan
--lr -1 -> lr is -1.0, not a finite number from 0 on ‖ --lr inf -> lr is inf
--temperature 0 -> temperature is 0 ‖ --prompts 0 -> prompts is 0 ‖ --steps -1 -> steps is -1
--data nowhere.jsonl -> cannot load nowhere.jsonl
--eval-data nowhere.jsonl -> cannot load nowhere.jsonl ‖ --data /dev/null -> cannot load /dev/null
--instruction hi -> must contain {question} ‖ --model no/where -> --model DIR --data FILE.jsonl
--resume -> state.safetensors ‖ --task gsm8k -> cannot load openai/gsm8k
--max-new-tokens 500 -> the context of 128 ‖ --out /dev/null/run -> /dev/null/run
--device tpu9 -> device tpu9 cannot be used
"""


@pytest.mark.parametrize("line", re.split(" ‖ |\n", BAD.strip()))
def test_bad_input_is_one_line_and_status_2(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)  # without a network, at once
    few = LETTERS._replace(train=LETTERS.test)  # problems: so that the others take no time
    monkeypatch.setitem(grpo.TASKS, "letters", few)
    arguments, message = line.split(" -> ")
    assert command(arguments.split()) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("grpo.py: error: ") and message in error
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_help_shows_every_setting_and_its_default(capsys):
    with pytest.raises(InputError, match="norm is 'mad', not one of none, std, var, batch"):
        Config(norm="mad")
    assert command(["--help"]) == 0
    shown, source = " ".join(capsys.readouterr().out.split()), inspect.getsource(Config)
    for field in fields(Config):
        (comment,) = re.findall(rf"^    {field.name}: .*?  # (.*)$", source, re.M)
        assert f"--{field.name.replace('_', '-')}" in shown
        assert f"{comment} (default: {field.default})" in shown
    defaults = "arith (.*?), gsm8k (.*?), math (.*?) .* letters (.*?), arith (.*?), else (.*?) "
    told = re.search(defaults, shown)
    a, b, c, d = grpo.TASKS.values()
    assert (a.max_new_tokens, c.lr) == (b.max_new_tokens, d.lr)
    values = b.max_new_tokens, c.max_new_tokens, d.max_new_tokens, a.lr, b.lr, d.lr
    assert told and tuple(map(float, told.groups())) == values


def test_models_that_cannot_be_used_are_refused_and_none_of_their_code_is_executed(tmp_path):
    mark, reduce = tmp_path / "executed", lambda _: (Path.touch, (mark,))
    marker = type("Marker", (), {"__reduce__": reduce})
    save_model("mamba", tmp_path / "mamba")  # whose state is not in a cache of keys and values
    foreign, pickled = tmp_path / "foreign", tmp_path / "pickled"
    for path in (foreign, pickled):
        shutil.copytree(LETTERS.model, path)
    own = '{"model_type": "foreign", "auto_map": {"AutoConfig": "code.C"}}'
    (foreign / "config.json").write_text(own)
    (foreign / "code.py").write_text(f"import pathlib; pathlib.Path({str(mark)!r}).touch()")
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": marker()}))
    why = dict(foreign="cannot load", pickled="cannot load", mamba="model .* cannot be used")
    for name in why:
        with pytest.raises(InputError, match=why[name]):
            run(tmp_path / "run", model=f"{tmp_path}/{name}")
    assert not mark.exists() and not (tmp_path / "run").exists()


@slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_line_says_how_to_resume(number, status, tmp_path):
    line = [sys.executable, grpo.__file__, "--prompts=4", f"--out={tmp_path}"]
    log = tmp_path / "metrics.jsonl"
    process = subprocess.Popen([*line, "--steps=5000"], stderr=subprocess.PIPE, text=True)
    while not log.exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status
    assert "add --resume" in error and "Traceback" not in error
    steps = len(read(tmp_path)) + 1
    assert subprocess.run([*line, f"--steps={steps}", "--resume"]).returncode == 0
    assert [row["step"] for row in read(tmp_path)] == list(range(steps + 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_rollout_and_training_agree(tmp_path):
    run(tmp_path, device="cuda")
    assert 0 < max(row["logprob_gap"] or 0.0 for row in read(tmp_path)[:-1]) < 1e-3


@slow
@pytest.mark.parametrize("norm", ["none", "std"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_default_run_learns(norm, seed, tmp_path):
    """The README's first command: at least 0.25 gained on problems not trained on, and above 0.8 in
    the end."""
    began = time.perf_counter()
    assert command([f"--norm={norm}", f"--seed={seed}", f"--out={tmp_path}"]) == 0
    metrics = read(tmp_path)
    assert metrics[-1]["eval_pass_rate"] > max(0.8, metrics[0]["eval_pass_rate"] + 0.25)
    assert time.perf_counter() - began < 300
