"""Tests of grpo.py. `pytest` runs the quick ones, `GRPO_SLOW=1 pytest` all of them.

The tests "to copy" go with the functions that are there to be copied, and need only torch and
pytest. Every expected value is worked out by hand, by another library, or by the naive computation
that the code avoids.
"""
# ruff: noqa: E402

import math

import pytest
import torch
from torch import tensor

from grpo import (
    advantage_scale,
    count_sketch,
    directional_curvature,
    gradient_geometry,
    group_advantages,
    k3_divergence,
    pair_cosines,
    policy_loss,
    sample_tokens,
    square,
    token_logprobs,
    token_weights,
)

# ------------------------------------------- to copy ----------------------------------------------


def test_group_advantages():
    # Means 1/5 and 6/5; deviations 2/5, variances 4/25. As integers, too.
    rewards = tensor([[1, 0, 0, 0, 0], [2, 1, 1, 1, 1]])
    shape = tensor([0.8, -0.2, -0.2, -0.2, -0.2])
    for norm, eps, scale in (("none", 0.1, 1), ("std", 0.1, 2), ("var", 0.04, 5)):
        advantages = group_advantages(rewards, norm, eps)
        assert torch.allclose(advantages, torch.stack([shape, shape]) * scale)
    # All rewards 1 0 1 1: mean 3/4, variance 3/16; group means 1/2 and 1.
    advantages = group_advantages(tensor([[True, False], [True, True]]), "batch", 0.0)
    assert torch.allclose(advantages, tensor([[2 / 3**0.5, -2 / 3**0.5], [0, 0]]))


def test_advantage_scale():
    rewards = tensor([[3.0, 1.0], [0.1, 0.1]], dtype=torch.float64)  # deviations 1 and 0
    assert advantage_scale(rewards, "std", 0.25).tolist() == [[0.8], [0]]
    assert advantage_scale(rewards, "none").tolist() == [[1], [0]]
    assert advantage_scale(rewards, "var")[0].item() == pytest.approx(1 / 1.000001, rel=1e-9)
    assert advantage_scale(tensor([[5, 1]]), "var", 0.0).tolist() == [[0.25]]
    # Equal rewards: exactly 0, though by rounding the deviation of these is 1e-8.
    for norm in ("std", "batch"):
        assert advantage_scale(tensor([[0.1] * 12] * 2), norm, 0.0).tolist() == [[0], [0]]


def test_token_weights():
    lengths = tensor([[1, 3], [4, 2]])
    assert token_weights(lengths, "sequence").tolist() == [[1 / 4, 1 / 4], [1 / 4, 1 / 4]]
    assert torch.allclose(
        token_weights(lengths, "mean"), tensor([[1 / 4, 1 / 12], [1 / 16, 1 / 8]])
    )
    assert torch.allclose(token_weights(lengths, "token"), torch.full((2, 2), 1 / 10))


def test_policy_loss():
    # Ratio 2: A = 1 is clipped to 1.2, A = -1 is not. Ratio 1/2: A = 1 is not clipped, and has
    # twice the weight; A = -1 is clipped to 0.8.
    ratio = tensor([2, 2, 0.5, 0.5])
    old = tensor([-1.0, -2.0, -3.0, -4.0])
    A = tensor([1.0, -1.0, 1.0, -1.0])
    loss = policy_loss(old + ratio.log(), old, A, tensor([1.0, 1.0, 2.0, 1.0]), 0.2)
    assert loss.item() == pytest.approx(-(1.2 - 2 + 2 * 0.5 - 0.8))


def test_k3_divergence():
    # Log ratios to the reference ln 1, ln 2, ln 1/2: e^-d - 1 + d is 0, ln 2 - 1/2, 1 - ln 2;
    # ratios to what was sampled from: 1, 2, 1/2.
    logprobs = tensor([1, 2, 0.5]).log()
    expected = [0, 2 * (math.log(2) - 0.5), (1 - math.log(2)) / 2]
    assert k3_divergence(logprobs, tensor([0.0] * 3), tensor([0.0] * 3)).tolist() == (
        pytest.approx(expected, abs=1e-7)
    )


def test_sample_tokens():
    # Probabilities 1/4 and 3/4; at temperature 1/2, 1/10 and 9/10. Entropy ln 4 - 3/4 ln 3.
    logits = tensor([[1.0, 3.0], [1.0, 3.0]]).log()
    tokens, logprobs, entropy = sample_tokens(logits, tensor([0.24, 0.26]), 1.0)
    assert tokens.tolist() == [0, 1]
    assert logprobs.tolist() == pytest.approx([math.log(1 / 4), math.log(3 / 4)])
    assert entropy.tolist() == pytest.approx([math.log(4) - 0.75 * math.log(3)] * 2)
    tokens, logprobs, _ = sample_tokens(logits, tensor([0.09, 0.11]), 0.5)
    assert tokens.tolist() == [0, 1]
    assert logprobs.tolist() == pytest.approx([math.log(0.1), math.log(0.9)])
    tokens, logprobs, entropy = sample_tokens(logits, tensor([0.0, 0.0]), 0.0)  # greedy
    assert tokens.tolist() == [1, 1]
    assert logprobs[0].item() == pytest.approx(math.log(3 / 4))
    assert entropy[0].item() == pytest.approx(math.log(4) - 0.75 * math.log(3))
    # The ends of the unit interval, beside tokens of probability 0.
    logits = tensor([[0, 1.0, 1, 0]] * 2).log()
    assert sample_tokens(logits, tensor([0, 1 - 2**-24]), 1.0)[0].tolist() == [1, 2]
    assert sample_tokens(logits, tensor([0.49, 0.51]), 1.0)[2].tolist() == pytest.approx(
        [math.log(2)] * 2
    )


def test_token_logprobs():
    # Logits 0 and ln 3: probabilities 1/4 and 3/4, at temperature 1/2 1/10 and 9/10.
    logits = tensor([[1.0, 3.0], [1.0, 3.0]]).log()
    found = token_logprobs(logits, tensor([1, 0]), 1.0)
    assert found.tolist() == pytest.approx([math.log(3 / 4), math.log(1 / 4)])
    found = token_logprobs(logits, tensor([1, 0]), 0.5)
    assert found.tolist() == pytest.approx([math.log(9 / 10), math.log(1 / 10)])
    assert logits[0, 1].item() == pytest.approx(math.log(3))  # as before


def test_count_sketch():
    # Entries 0, 3 and 6 of both tensors together; 1, 4 and 7; 2 and 5.
    signs = tensor([1, -1, 1, 1, 1, -1, 1, -1])
    sketch = count_sketch([tensor([[1.0, 2], [3, 4]]), tensor([5.0, 6, 7, 8])], signs, 3)
    assert sketch.tolist() == [1 + 4 + 7, -2 + 5 - 8, 3 - 6]


def test_pair_cosines():
    # Vectors of length 1, 5, 0, 1: the pairs of the three others.
    gram = tensor([[1.0, 3, 0, 0], [3, 25, 0, 4], [0, 0, 0, 0], [0, 4, 0, 1]])
    assert pair_cosines(gram).tolist() == pytest.approx([3 / 5, 0, 4 / 5])


def test_square():
    assert square([tensor([3.0, 4.0]), tensor([[12.0]])]) == pytest.approx(9 + 16 + 144)
    assert square([tensor([1e30])]) == pytest.approx(1e60, rel=1e-6)  # beyond float32


def test_gradient_geometry():
    # Of 3 completions 2 are in the first half: x = (4, 0) / 3, y = (7, 10) / 3, xx = 16/9,
    # yy = 149/9, xy = 28/9. The halves' products are 2 and 11, of which 4/5 are |g|^2: 1.6, 8.8.
    first = tensor([[1.0, 0], [3, 4]])
    second = tensor([[2.0, 0], [1, 2]])
    values, columns = gradient_geometry(first, second, 3, ["a", "a"])
    assert columns["prompt_grad_norm"].tolist() == pytest.approx([4 / 3, 149**0.5 / 3])
    assert columns["grad_sq_signal"].tolist() == pytest.approx([1.6, 8.8])
    assert values["n_gradients"] == 2
    assert values["cos_mean"] == pytest.approx(7 / 149**0.5)
    assert values["interference"] == pytest.approx(221 / 165)  # |x + y|^2 = 221/9
    assert values["signal_share"] == pytest.approx(93.6 / 165)  # 10.4 / (165/9)
    assert values["cos_signal"] == values["cos_signal_within"] == pytest.approx(28 / 46.8)
    assert values["cos_sq_signal"] == pytest.approx(
        3 * 2 / (2 * 11)
    )  # in the halves, xy is 3 and 2
    assert math.isnan(values["cos_signal_between"])


def test_directional_curvature():
    # log pi = c t + d t^2 / 2 along a unit vector: the mean of A (c^2 + d).
    c = tensor([1.0, -2.0, 3.0])
    d = tensor([0.5, 0.0, -4.0])
    direction = {"a": tensor([5.0, 0.0])}
    advantages = tensor([1.0, 2.0, -0.5])
    for dtype in (torch.float32, torch.float64):
        for slope in (1e-3, 1.0, 1e3):  # however wrong the guess
            curvature, _ = directional_curvature(
                lambda x: c * x["a"][0] + d * x["a"][0] ** 2 / 2 - 1,
                {"a": torch.zeros(2, dtype=dtype)}, direction, advantages, slope,
            )  # fmt: skip
            assert curvature == pytest.approx((1.5 + 2 * 4 - 0.5 * 5) / 3, rel=0.01)


# ----------------------- rollout and gradient against the naive pass ------------------------------

import functools
import inspect
import itertools
import json
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import numpy as np
import pandas as pd
import transformers
from datasets import Dataset
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

import grpo
from benchmarks.pretend_cuda import Pretence
from grpo import Batch, Config, InputError, Policy, Problem, RunError

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # more only cost here
DATA = Path(__file__).resolve().parent.parent / "shared" / "data"
slow = pytest.mark.skipif(not os.environ.get("GRPO_SLOW"), reason="slow: set GRPO_SLOW=1")
LETTERS = grpo.TASKS["letters"]

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
SIZES |= dict(bos_token_id=0, eos_token_id=1, pad_token_id=0)
SHARED = SIZES | dict(intermediate_size=64, num_key_value_heads=2)  # two query heads for a key head
WINDOW = dict(final_logit_softcapping=2.0, head_dim=8, query_pre_attn_scalar=8, sliding_window=4)
# Absolute positions; rotary ones; capped logits and windows shorter than a prompt. Many others are
# in benchmarks/test_models.py.
MODELS = {
    "gpt2": (transformers.GPT2Config, SIZES),
    "llama": (transformers.LlamaConfig, SHARED),
    "gemma2": (transformers.Gemma2Config, SHARED | WINDOW),
}
PROMPTS = [[5, 6, 7, 8, 9], [3, 4], [11, 12, 13], [17]]


def make_model(kind, vocab_size=23):
    """A random transformer, far from uniform: distributions with a shape, positions that matter."""
    torch.manual_seed(0)
    config, sizes = MODELS[kind]
    model = AutoModelForCausalLM.from_config(config(vocab_size=vocab_size, **sizes)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return model


def save_model(kind, path, vocab_size=98):
    make_model(kind, vocab_size).save_pretrained(path)
    AutoTokenizer.from_pretrained(LETTERS.model).save_pretrained(path)
    return str(path)


def make_policy(model, ends=(1,), limits=(4096, 4096)):
    masters = dict(model.named_parameters())
    return Policy(model, None, list(ends), masters, masters, limits)


def uniforms(P, G, T):
    return torch.rand(P, G, T, generator=torch.Generator().manual_seed(0))


def with_advantages(batch, norm, agg):
    batch.advantages = group_advantages(batch.rewards, norm)
    batch.weights = token_weights(batch.lengths, agg)
    return batch


def sample_batch(policy, agg="sequence"):
    """Five completions of each of PROMPTS with random rewards, one group without variance."""
    batch = grpo.rollout(policy, PROMPTS, uniforms(4, 5, 9), 1.0)
    batch.rewards = (torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) < 0.5).double()
    batch.rewards[1] = 1.0
    return with_advantages(batch, "std", agg)


def naive_logprobs(forward, batch, temperature=1.0):
    """Of every completion's tokens [P][G]: whole sequences, no cache, no batch, no padding."""
    found = []
    for prompt, rows, lengths in zip(batch.prompts, batch.tokens, batch.lengths.tolist()):
        found.append([])
        for row, length in zip(rows, lengths):
            ids = torch.cat([tensor(prompt), row[:length]])
            logits = forward(ids[None], use_cache=False).logits[0, -length - 1 : -1] / temperature
            found[-1].append(torch.log_softmax(logits, -1)[range(length), ids[-length:]])
    return found


def naive_loss(now, old, reference, batch, agg, clip=0.2, kl=0.0):
    """The loss written out by completion, from three policies' log-probabilities [P][G]."""
    P, G = batch.lengths.shape
    total = int(batch.lengths.sum())
    loss = 0.0
    for p, g in itertools.product(range(P), range(G)):
        ratio = (now[p][g] - old[p][g].detach()).exp()
        A = float(batch.advantages[p, g])
        terms = -torch.min(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
        d = reference[p][g].detach() - now[p][g]
        terms = terms + kl * ratio * (d.exp() - d - 1)
        weight = {"sequence": 1 / (P * G), "mean": 1 / (P * G * len(d)), "token": 1 / total}[agg]
        loss += weight * terms.sum()
    return loss


def flat(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])


def relative_error(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_rollout_at_temperature_0_is_generate_on_a_left_padded_batch(kind):
    ends = [1, 4, 9]  # several, so that rows end at different times
    model = make_model(kind)
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = 0
    batch = grpo.rollout(make_policy(model, ends), PROMPTS, uniforms(4, 1, 12), 0.0)
    ids = tensor([[0] * (5 - len(p)) + p for p in PROMPTS])
    mask = tensor([[0] * (5 - len(p)) + [1] * len(p) for p in PROMPTS])
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, 5:]
    for p, row in enumerate(expected.tolist()):
        end = next((t for t, token in enumerate(row, 1) if token in ends), 12)
        assert batch.tokens[p, 0].tolist() == row + [0] * (12 - len(row))
        assert batch.lengths[p, 0] == end
        assert batch.truncated[p, 0] == (row[end - 1] not in ends)


@pytest.mark.parametrize(("kind", "temperature"), [("gpt2", 0.7), ("llama", 0.7), ("gemma2", 1.0)])
def test_rollout_is_the_naive_pass(kind, temperature):
    """Log-probabilities, entropies; and a completion has its own random numbers alone."""
    model = make_model(kind)
    policy = make_policy(model)
    u = uniforms(4, 6, 10)
    batch = grpo.rollout(policy, PROMPTS, u, temperature)
    assert len(set(batch.lengths.flatten().tolist())) > 2
    for p, prompt in enumerate(PROMPTS):
        alone = grpo.rollout(policy, [prompt], u[p : p + 1, p : p + 1], temperature)
        assert alone.tokens[0, 0].tolist() == batch.tokens[p, p].tolist()
        for g, length in enumerate(batch.lengths[p].tolist()):
            ids = tensor([*prompt, *batch.tokens[p, g, :length]])
            logits = model(ids[None]).logits[0, -length - 1 : -1] / temperature
            exact = torch.distributions.Categorical(logits=logits)
            logprobs = torch.zeros(10)
            logprobs[:length] = exact.log_prob(ids[-length:])
            entropy = torch.zeros(10)
            entropy[:length] = exact.entropy()
            torch.testing.assert_close(batch.logprobs[p, g], logprobs, rtol=0, atol=1e-5)
            torch.testing.assert_close(batch.entropy[p, g], entropy, rtol=0, atol=1e-5)


def test_rollout_draws_from_the_models_probabilities():
    """Two-token completions over five tokens, 20,000 draws, chi-square; whatever the generation
    config says."""
    model = make_model("gpt2", 5)
    others = dict(top_k=1, top_p=0.1, temperature=9.0, repetition_penalty=5.0, do_sample=False)
    model.generation_config.update(**others)
    batch = grpo.rollout(make_policy(model, [4]), [[2, 3]], uniforms(1, 20_000, 2), 1.3)

    def probs(*ids):
        logits = model(tensor([ids])).logits[0, -1].detach().double()
        return torch.softmax(logits / 1.3, -1).numpy()

    first = probs(2, 3)  # token 4 ends
    expected = np.concatenate([*(first[a] * probs(2, 3, a) for a in range(4)), first[4:]]) * 20_000
    counts = np.bincount(batch.tokens[0] @ tensor([5, 1]), minlength=21)
    # With 20 degrees of freedom, above 45.31 once in a thousand times (any table of chi-square).
    assert ((counts - expected) ** 2 / expected).sum() < 45.31


def test_sample_tokens_never_draws_what_has_no_probability():
    """However the sum of all probabilities is rounded; and half precision is made float32."""
    for n in range(2, 300):
        logits = pad(torch.zeros(1, n), (0, 1), value=-math.inf)
        token, _, _ = sample_tokens(logits, tensor([1 - 2**-24]), 1.0)
        assert token < n
    _, logprob, _ = sample_tokens(tensor([[0.0, 1.0]]).bfloat16(), tensor([0.0]), 1.0)
    assert logprob.item() == pytest.approx(-math.log(1 + math.e), rel=1e-6)
    found = token_logprobs(tensor([[0.0, 1.0]]).bfloat16(), tensor([0]), 1.0)
    assert found.item() == pytest.approx(-math.log(1 + math.e), rel=1e-6)
    wide = token_logprobs(tensor([[0.0, 1.0]]).double(), tensor([0]), 1.0)
    assert wide.item() == pytest.approx(-math.log(1 + math.e), rel=1e-14)


@pytest.mark.parametrize("moved", [0.0, 0.7])
def test_k3_divergences_expected_gradient_is_that_of_the_divergence(moved):
    """Sampled from `old`, with exact probabilities of one token, at old itself and elsewhere."""
    seeded = torch.Generator().manual_seed(0)
    old, reference, direction = torch.randn(3, 6, dtype=torch.float64, generator=seeded)
    logits = (old + moved * direction).requires_grad_()
    policy = logits.log_softmax(0)
    old = old.log_softmax(0)
    reference = reference.log_softmax(0)
    estimate = (old.exp() * k3_divergence(policy, old, reference)).sum()
    divergence = (policy.exp() * (policy - reference)).sum()
    (found,) = torch.autograd.grad(estimate, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(divergence, logits)
    torch.testing.assert_close(found, expected)


def test_draw_depends_on_seed_purpose_step_and_row_alone():
    config = Config(max_new_tokens=3)
    both = grpo.draw(config, 1, 5, [2, 7], 4)
    assert both.shape == (2, 4, 3) and both.dtype == torch.float32
    assert torch.equal(both[1:, :2], grpo.draw(config, 1, 5, [7], 2))  # a larger group adds draws
    others = (config, 1, 6), (config, 2, 5), (replace(config, seed=1), 1, 5)
    for other in others:
        assert (both[:1] != grpo.draw(*other, [2], 4)).all()
    assert len({grpo.ORDER, grpo.TRAIN, grpo.EVALUATE}) == 3


def test_prompt_ids_go_through_all_problems_in_an_order_of_each_pass():
    config = Config(prompts=4)
    ids = [i for step in range(5) for i in grpo.prompt_ids(step, config, 10)]
    assert sorted(ids[:10]) == sorted(ids[10:]) == list(range(10))
    assert ids[:10] != ids[10:] and ids[:10] != list(range(10))
    assert grpo.prompt_ids(0, replace(config, seed=1), 10) != ids[:4]
    assert len(grpo.prompt_ids(0, config, 3)) == 4  # fewer problems than prompts a step


def test_pad_prompts_and_extend_by_hand():
    """Prompts end side by side; token 0 is a token; positions count from a prompt's beginning."""
    tokens, mask = grpo.pad_prompts([[5, 0, 7], [9]], "cpu")
    assert tokens.tolist() == [[5, 0, 7], [0, 0, 9]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    called = []

    def forward(tokens, **named):
        called.append(named)
        return "output"

    policy = replace(make_policy(make_model("gpt2")), model=forward, cache_argument="past")
    assert grpo.extend(policy, tokens[:, 1:], mask, "cache", more=1) == "output"
    assert called[0].pop("position_ids").tolist() == [[1, 2], [0, 0]]
    assert called[0].pop("attention_mask") is mask
    assert called[0] == {"past": "cache", "use_cache": True, "more": 1}


def test_encode_prompts_runs_each_once_and_the_output_layer_reads_no_strided_view():
    """For one torch copies the layer's weights, for every prompt: gigabytes with many tokens."""
    policy = make_policy(make_model("llama"))
    seen = []
    layer = policy.model.get_output_embeddings()
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = grpo.rollout(policy, PROMPTS, uniforms(4, 2, 2), 1.0)
    grpo.completion_logprobs(policy, batch, [0, 1, 2], 1.0)
    assert [x.shape[:2] for x in seen] == [(4, 1), (8, 1), (2, 1), (3, 1)]
    assert all(x.stride() == torch.empty(x.shape).stride() for x in seen)
    mask, _, logits = grpo.encode_prompts(policy, PROMPTS[:2], tensor([1, 0, 1]))
    assert mask.tolist() == [[0, 0, 0, 1, 1], [1] * 5, [0, 0, 0, 1, 1]]
    expected = policy.model(tensor([PROMPTS[1]])).logits[0, -1]
    torch.testing.assert_close(logits[2], expected)


def test_completion_logprobs_with_parameters_of_another_policy():
    """Without an output layer every token has probability 1/23; beyond a row's end there is 0."""
    policy = make_policy(make_model("llama"))
    nothing = {"lm_head.weight": torch.zeros(23, 32)}
    forward = grpo.with_parameters(policy.model, nothing)
    batch = grpo.rollout(policy, PROMPTS, uniforms(4, 5, 9), 1.0)
    rows = [3, 7, 12, 1]
    found = grpo.completion_logprobs(policy, batch, rows, 1.0, forward)
    lengths = batch.lengths.flatten()[rows]
    assert len(set(lengths.tolist())) > 1 and found.shape == (4, lengths.max())
    inside = torch.arange(int(lengths.max())) < lengths[:, None]
    torch.testing.assert_close(found, -math.log(23) * inside)


def test_score_gives_each_completion_its_own_prompts_answer():
    """Rewards by row, of texts without special tokens and without what comes after the end."""
    tokenizer = AutoTokenizer.from_pretrained(LETTERS.model)  # "0" is token 18, the end token 0
    policy = SimpleNamespace(tokenizer=tokenizer)
    tokens = tensor([[[19, 0, 0], [20, 21, 0]], [[22, 23, 24], [0, 0, 0]]])
    batch = SimpleNamespace(tokens=tokens, lengths=tensor([[2, 2], [3, 1]]))
    problems = [Problem("q", "100", None, []), Problem("q", "200", None, [])]
    rewards, texts = grpo.score(policy, batch, problems, lambda text, a: int(text or 7) + int(a))
    assert texts == ["1", "23", "456", ""]
    assert rewards.tolist() == [[101, 123], [656, 207]] and rewards.dtype == torch.float64


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda *_: 1 / 0, "division by zero"),
        (lambda *_: math.nan, "finite"),
        (lambda *_: -math.inf, "finite"),
        (lambda *_: None, "TypeError"),
    ],
)
def test_score_names_completion_and_answer_if_the_reward_fails(reward, message):
    policy = SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(LETTERS.model))
    batch = SimpleNamespace(tokens=tensor([[[19, 20]]]), lengths=tensor([[2]]))
    with pytest.raises(RunError, match=f"{message}.*'12'.*answer='57'"):
        grpo.score(policy, batch, [Problem("q", "57", None, [])], reward)


def test_split_rows_by_hand():
    """Prompts of 400 tokens and answers of 4 or 5: all would fit but for copies of the prompts."""
    lengths = tensor([[4, 5, 4], [5, 5, 5], [4, 4, 4], [9, 1, 1]])
    batch = SimpleNamespace(prompts=[[0] * 400, [0] * 400, [0] * 400, [0] * 10], lengths=lengths)
    split = functools.partial(grpo.split_rows, batch, range(12))
    order = [9, 10, 11, 1, 0, 2, 3, 4, 5, 6, 7, 8]  # a prompt's longest answer first
    assert split((12 * 409, 4096)) == [order]
    assert split((4096, 4096)) == [order[:10], order[10:]]  # 10 * 409; the last two are of 404
    assert split((820, 4096)) == [[9, 10, 11], [1, 0], [2, 3], [4, 5], [6, 7], [8]]  # 2 * 405
    assert split((1e9, 40)) == [order[:4], order[4:12]]  # 4 * 9, 8 * 5
    assert split((1, 1)) == [[row] for row in order]
    assert grpo.split_rows(batch, [], (1, 1)) == []


@pytest.mark.parametrize(
    ("kind", "agg"), [("gpt2", "sequence"), ("llama", "mean"), ("gemma2", "token")]
)
def test_loss_gradient_is_the_naive_one_whatever_the_split_padding_and_order(kind, agg):
    """Several prompts of unequal length in a micro-batch, one of one token, or one completion."""
    model = make_model(kind)
    policy = make_policy(model)
    policy.trained = policy.trained | {"unused": torch.ones(3, requires_grad=True)}
    config = Config(temperature=0.8)
    batch = sample_batch(policy, agg)
    now = naive_logprobs(model, batch, 0.8)
    loss = naive_loss(now, now, now, batch, agg)
    expected = pad(flat(torch.autograd.grad(loss, [*model.parameters()])), (0, 3))
    wide = replace(batch, tokens=pad(batch.tokens, (0, 7), value=22))
    wide.logprobs = pad(batch.logprobs, (0, 7))
    active = [r for r in range(20) if batch.advantages.flatten()[r]]  # the others have no gradient
    for limits, rows, variant in (
        ((999, 999), range(20), batch),
        ((60, 40), [*range(20)][::-1], wide),
        ((1, 1), active, batch),
    ):
        policy.limits = limits
        gradient, logprobs = grpo.loss_gradient(policy, variant, rows, config)
        assert relative_error(flat(gradient), expected) < 1e-5
        for row in range(20):
            value = now[row // 5][row % 5].detach()
            found = logprobs.flatten(0, 1)[row]
            if row in rows:
                torch.testing.assert_close(found[: len(value)], value, rtol=0, atol=1e-5)
            else:
                assert found.isnan().all()
    gradient, _ = grpo.loss_gradient(policy, batch, [], config)
    assert [x.shape for x in gradient] == [x.shape for x in model.parameters()]
    assert not flat(gradient).any()


def test_set_gradient_clips_the_norm_by_hand():
    """Of (3, 4) and (12), 13 in all; autograd may return one tensor for two parameters."""
    masters = {"a": torch.zeros(2), "b": torch.zeros(1)}
    policy = SimpleNamespace(masters=masters)
    gradient = [tensor([3.0, 4.0]), tensor([12.0])]
    for max_norm, scale in ((0.0, 1), (20.0, 1), (6.5, 0.5)):
        assert grpo.set_gradient(policy, gradient, max_norm) == pytest.approx(13)
        assert masters["a"].grad.tolist() == pytest.approx([3 * scale, 4 * scale])
        assert masters["b"].grad.tolist() == pytest.approx([12 * scale])
    twice = [tensor([3.0])] * 2
    masters["a"] = torch.zeros(1)
    assert grpo.set_gradient(policy, twice, 1.0) == pytest.approx(18**0.5)
    assert masters["a"].grad.item() == pytest.approx(0.5**0.5)
    assert twice[0].item() == 3


SETTINGS = dict(steps=12, prompts=3, group=5, eval_every=4, eval_problems=4, save_every=4, lr=1e-3)
SETTINGS |= dict(measure_every=4, micro_batch=40, device="cpu", dtype="float32", task="letters")
SETTINGS |= dict(data=LETTERS.test)
BRIEF = dict(eval_every=0, eval_problems=1, steps=2, measure_every=0)


def settings(out, **changes):
    """A small run: 12 updates of 3 prompts with 5 completions, measured at every fourth."""
    return Config(**SETTINGS | changes | {"out": str(out)})


def parity(completion, answer):
    """A reward that any policy earns half of the time."""
    return float(zlib.crc32((completion + answer).encode()) % 2)


def length_reward(completion, answer):
    return len(completion) + int(answer) / 1000


@pytest.fixture(scope="module")
def letters():
    """The embedded policy, its problems and the settings."""
    config = grpo.resolve(settings("-"))
    policy = grpo.load_policy(config)
    rows, _ = grpo.load_problems(config, None, parity)
    return policy, grpo.encode_problems(rows, policy, config), config


def test_evaluate_is_generate_and_then_the_rollout_of_each_problem(letters, monkeypatch):
    """Five problems in batches of 3, as large as in training; another process has its share."""
    policy, problems, config = letters
    config = replace(config, prompts=3, group=1, temperature=1.5)
    problems = problems[:5]
    greedy = []
    sampled = []
    texts = []
    for i, problem in enumerate(problems):
        ids = tensor([problem.prompt])
        how = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
        (tokens,) = policy.model.generate(ids, attention_mask=ids**0, **how)
        text = policy.tokenizer.decode(tokens[ids.shape[1] :], skip_special_tokens=True)
        greedy.append(length_reward(text, problem.answer))
        u = grpo.draw(config, grpo.EVALUATE, 0, [i], 1)
        alone = grpo.rollout(policy, [problem.prompt], u, 1.5)
        rewards, (text,) = grpo.score(policy, alone, [problem], length_reward)
        sampled.append(float(rewards))
        texts.append(text)
    sizes = []
    rollout = grpo.rollout
    monkeypatch.setattr(grpo, "rollout", lambda *x: sizes.append(len(x[1])) or rollout(*x))
    columns, samples = grpo.evaluate(policy, problems, length_reward, config)
    assert sizes == [3, 2, 3, 2]
    assert columns["eval_greedy_reward"] == pytest.approx(np.mean(greedy))
    assert columns["eval_reward"] == pytest.approx(np.mean(sampled))
    assert math.isnan(columns["eval_greedy"]) and math.isnan(columns["eval_pass_rate"])
    assert [x["completion"] for x in samples] == texts[:4]
    assert [x["reward"] for x in samples] == pytest.approx(sampled[:4])
    assert [x["question"] for x in samples] == [x.question for x in problems[:4]]
    assert [x["answer"] for x in samples] == [x.answer for x in problems[:4]]
    columns, _ = grpo.evaluate(policy, problems, lambda text, a: float(text == texts[0]), config)
    assert columns["eval_pass_rate"] == columns["eval_reward"] == texts.count(texts[0]) / 5
    monkeypatch.setattr(grpo, "share", lambda count: range(count // 2, count))
    sizes.clear()
    columns, _ = grpo.evaluate(policy, problems, length_reward, config)
    assert sizes == [2, 1, 2, 1] and columns["eval_reward"] == pytest.approx(np.mean(sampled[2:]))


def planted(fault):
    """A policy of which fault(logits, tokens) changes what the model returns."""
    model = make_model("llama")
    forward = model.forward

    def changed(tokens, **named):
        output = forward(tokens, **named)
        output.logits = fault(output.logits, tokens)
        return output

    model.forward = changed
    return make_policy(model)


def twice_as_sure_of_lone_tokens(logits, tokens):
    return logits * 2 if tokens.shape == (2, 1) else logits


def fail_in_training_on_a_lone_token(logits, tokens):
    if tokens.shape == (2, 1) and torch.is_grad_enabled():
        raise ValueError("planted")
    return logits


def unlike_training(size):
    return lambda logits, _: logits + size * torch.is_grad_enabled() * torch.arange(23)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (twice_as_sure_of_lone_tokens, "rollout and training differ by [0-9.]+ nats"),
        (unlike_training(0.002), "rollout and training differ by 0.0018"),
        (lambda logits, _: logits * math.nan, "rollout and training differ by nan"),
        (fail_in_training_on_a_lone_token, "with a DynamicCache it fails: planted"),
    ],
)
def test_check_model_refuses_one_whose_rollout_and_training_disagree(fault, message):
    """Before a run begins; a completion of two tokens extends by one in training, of eight not."""
    config = Config(model="DIR", max_new_tokens=8)
    problems = [Problem("q", "a", None, prompt) for prompt in PROMPTS]
    with pytest.raises(InputError, match=rf"^model DIR \(llama\) cannot be used: {message}"):
        grpo.check_model(planted(fault), problems, config)
    sound = planted(unlike_training(0.0005))  # less than a thousandth of a nat
    assert grpo.check_model(sound, problems, config) is sound
    rough = planted(unlike_training(0.05))
    rough.model.bfloat16()
    assert grpo.check_model(rough, problems, config) is rough  # up to half a nat is its rounding


def test_check_model_guards_one_that_overwrites_what_its_gradient_needs():
    def overwriting(logits, tokens):
        shares = logits.sigmoid()
        result = shares * 3
        shares.zero_()  # which the gradient of the sigmoid is made of
        return result

    config = Config(max_new_tokens=8)
    problems = [Problem("q", "a", None, prompt) for prompt in PROMPTS]
    policy = grpo.check_model(planted(overwriting), problems, config)
    exact = planted(lambda logits, _: logits.sigmoid() * 3)
    batch = sample_batch(exact)
    found, _ = grpo.loss_gradient(policy, batch, range(20), config)
    expected, _ = grpo.loss_gradient(exact, batch, range(20), config)
    assert relative_error(flat(found), flat(expected)) < 1e-6


# ---------------------------------- a run against the naive run -----------------------------------


def run(out, reward=parity, stop=(), **changes):
    return grpo.train(settings(out, **changes), reward=reward, stop=stop)


def read(out, name="metrics.jsonl"):
    """A log, without what the clock says."""
    clock = "seconds_rollout", "seconds_update", "tokens_per_second"
    rows = map(json.loads, (Path(out) / name).read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in clock} for row in rows]


def weights(out, names):
    """The trained weights of a run's checkpoint."""
    saved = load_file(Path(out) / grpo.CHECKPOINT)
    return flat(saved[f"weights.{name}"] for name in names)


def naive_forward(model, theta):
    """The plain model's forward at trained weights theta, adapters merged into what they adapt."""
    merged = {name: value for name, value in theta.items() if "lora" not in name}
    for name in (name for name in theta if "lora_B" in name):
        target = name.removeprefix("base_model.model.").replace("lora_B.default.", "")
        change = 2 * theta[name] @ theta[name.replace("lora_B", "lora_A")]  # alpha over rank is 2
        transposed = isinstance(model.get_submodule(target.removesuffix(".weight")), Conv1D)
        merged[target] = model.get_parameter(target) + (change.T if transposed else change)
    return lambda *args, **named: torch.func.functional_call(model, merged, args, named)


def step_batch(policy, step, config):
    """What the step of a run samples, with rewards and advantages."""
    problems = grpo.encode_problems(grpo.load_problems(config, None, parity)[0], policy, config)
    problems = [problems[row] for row in grpo.prompt_ids(step, config, len(problems))]
    random = grpo.draw(config, grpo.TRAIN, step, range(config.prompts), config.group)
    prompts = [problem.prompt for problem in problems]
    batch = grpo.rollout(policy, prompts, random, config.temperature)
    batch.rewards, _ = grpo.score(policy, batch, problems, parity)
    return with_advantages(batch, config.norm, config.agg)


def naive_run(config):
    """The run written out with plain SGD: weights before and after, updates' norms, largest changes
    of a ratio, and the plain model."""
    policy = grpo.load_policy(config)
    plain = AutoModelForCausalLM.from_pretrained(config.model or LETTERS.model)
    start = {name: x.detach().clone().requires_grad_() for name, x in policy.masters.items()}
    theta = start
    anchor = naive_forward(plain, start)
    norms = []
    changes = []
    for step in range(config.steps):
        for name, master in policy.masters.items():
            master.data.copy_(theta[name])
        batch = step_batch(policy, step, config)
        table = functools.partial(naive_logprobs, batch=batch, temperature=config.temperature)
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
    dict(norm="std", epochs=3, clip=0.05, kl=0.3, max_grad_norm=0.0, measure_every=1, agg="mean"),
    dict(norm="none", lora=4, task="arith", model="llama", agg="token", max_grad_norm=0.05),
    pytest.param(dict(norm="none", agg="token", measure_every=1, micro_batch=24), marks=slow),
    pytest.param(dict(norm="var", agg="mean", temperature=0.8, measure_every=1), marks=slow),
    pytest.param(dict(norm="batch", max_grad_norm=0.05), marks=slow),
    pytest.param(dict(norm="std", lora=4, epochs=2, clip=0.01, kl=0.3), marks=slow),
]


@pytest.mark.parametrize("changes", RUNS)
def test_train_is_the_naive_run(changes, tmp_path):
    """Weights, logged norms and the saved model; measured or not, clipped, in epochs, with KL, with
    adapters."""
    changes = BRIEF | dict(optimizer="sgd", lr=0.3) | changes
    if "model" in changes:
        changes["model"] = save_model(changes["model"], tmp_path / "start")
    run(tmp_path, **changes)
    config = grpo.resolve(settings(tmp_path, **changes))
    start, theta, norms, ratios, plain = naive_run(config)
    before = flat(start.values())
    after = flat(theta.values())
    assert relative_error(weights(tmp_path, start) - before, after - before) < 1e-4
    assert all(("lora" in name) == bool(config.lora) for name in start)
    assert config.epochs == 1 or max(ratios) > config.clip
    lines = read(tmp_path)[:-1]
    expected = np.reshape(norms, (2, -1))
    assert [line["grad_norm"] for line in lines] == pytest.approx(expected.mean(1), rel=1e-4)
    over = (expected > (config.max_grad_norm or math.inf)).any(1)
    assert [line["clipped"] for line in lines] == over.tolist()
    assert all(0 <= line["logprob_gap"] < 1e-5 for line in lines)
    measured = bool(config.measure_every)  # also with `mean` and KL
    assert [key in lines[0] for key in ("cos_mean", "curvature")] == [measured] * 2
    ids = torch.arange(20, 60).view(2, 20)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    expected = naive_forward(plain, theta)(ids).logits
    torch.testing.assert_close(saved(ids).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that others are compared with, and the gradients that its optimizer had."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    gradients = []
    set_gradient = grpo.set_gradient

    def recorded(policy, gradient, max_norm):
        norm = set_gradient(policy, gradient, max_norm)
        gradients.append([x.grad.clone() for x in policy.masters.values()])
        return norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "set_gradient", recorded)
        run(out)
    return out, gradients


def test_train_takes_the_steps_of_torchs_adamw_without_weight_decay(whole):
    """With a rate that rises for ten steps."""
    out, gradients = whole
    policy = grpo.load_policy(grpo.resolve(settings(out)))
    theta = [x.clone() for x in policy.masters.values()]
    optimizer = torch.optim.AdamW(theta, weight_decay=0.0)  # torch's defaults
    for step, gradient in enumerate(gradients):
        for parameter, grad in zip(theta, gradient):
            parameter.grad = grad
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 10)
        optimizer.step()
    found = weights(out, policy.masters)
    torch.testing.assert_close(found, flat(theta), rtol=0, atol=1e-6)
    assert len(gradients) == 12
    expected = [1e-4 * n for n in range(1, 11)] + [1e-3, 1e-3]
    assert [line["lr"] for line in read(out)[:-1]] == pytest.approx(expected)


def test_train_in_bfloat16_steps_float32_masters(tmp_path):
    changes = BRIEF | dict(dtype="bfloat16", optimizer="sgd", steps=1)
    config = grpo.resolve(settings(tmp_path, **changes))
    grpo.train(config, reward=parity)
    policy = grpo.load_policy(config)
    batch = step_batch(policy, 0, config)
    # Those that a run trains on: in other micro-batches bfloat16 would be rounded otherwise.
    active = [row for row, A in enumerate(batch.advantages.flatten()) if A]
    gradient = flat(grpo.loss_gradient(policy, batch, active, config)[0])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    found = weights(tmp_path, policy.masters)
    start = flat(policy.masters.values())
    torch.testing.assert_close(found, start - 1e-4 * gradient, rtol=1e-6, atol=1e-8)
    assert torch.equal(flat(model.parameters()), found.bfloat16())
    assert (found != start).float().mean() > 0.5


MEASURED = [  # every norm, optimizer and aggregation
    dict(norm="none", agg="sequence"),
    dict(norm="std", agg="mean", optimizer="sgd", lr=0.1, epochs=2),
    dict(norm="var", agg="token", dtype="bfloat16"),
    dict(norm="batch", optimizer="sgd", lr=0.1, kl=0.1),
]


@pytest.mark.parametrize("changes", MEASURED)
def test_train_has_the_same_weights_to_the_bit_with_and_without_measuring(changes, tmp_path):
    """And random numbers; what is measured is logged where it was, and not elsewhere."""
    measured = BRIEF | changes | dict(steps=3, measure_every=2)
    run(tmp_path / "with", **measured)
    run(tmp_path / "without", **BRIEF | changes | dict(steps=3))
    ours = load_file(tmp_path / "with" / grpo.CHECKPOINT)
    theirs = load_file(tmp_path / "without" / grpo.CHECKPOINT)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for name in ("metrics.jsonl", "prompts.jsonl"):
        lines = read(tmp_path / "with", name)
        plain = read(tmp_path / "without", name)
        keys = set(plain[0])
        assert [{key: line[key] for key in line.keys() & keys} for line in lines] == plain
        more = [bool(line.keys() - keys) for line in lines[: 3 if name[0] == "m" else 9]]
        assert (
            more == [True, False, True] if name[0] == "m" else [True] * 3 + [False] * 3 + [True] * 3
        )


def test_train_on_another_device_is_the_same(tmp_path):
    """On CUDA pretended by the CPU: whatever meets a tensor of the other side raises an error."""
    changes = BRIEF | dict(steps=1, measure_every=1, epochs=2, kl=0.1)
    run(tmp_path / "cpu", **changes)
    with Pretence():
        run(tmp_path / "cuda", **changes | dict(device="cuda"))
        filled = grpo.resolve(Config(device="cuda"))
    assert (filled.device, filled.dtype) == ("cuda:0", "bfloat16")
    assert read(tmp_path / "cuda", "samples.jsonl") == read(tmp_path / "cpu", "samples.jsonl")
    ours, theirs = (read(tmp_path / name)[0] for name in ("cuda", "cpu"))
    assert ours.keys() == theirs.keys()
    for key in ours.keys() - {"logprob_gap"}:
        assert ours[key] == pytest.approx(theirs[key], rel=1e-2, abs=1e-4), key


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_train_on_cuda_has_one_policy_in_rollout_and_training(tmp_path):
    run(tmp_path, device="cuda")
    assert 0 < max(row["logprob_gap"] or 0.0 for row in read(tmp_path)[:-1]) < 1e-3


def test_train_skips_steps_that_are_not_finite_and_ends_after_five_in_a_row(tmp_path, monkeypatch):
    """Of steps 1 to 4 and 6 to 10 the logits are spoiled: where all rewards are 0, so is the
    gradient, and only the entropy tells."""
    sample_tokens_ = grpo.sample_tokens
    prompt_ids = grpo.prompt_ids
    steps = []
    spoiled = {1, 2, 3, 4, 6, 7, 8, 9, 10}

    def counted(step, *more):
        steps.append(step)
        return prompt_ids(step, *more)

    def sample(logits, *more):
        return sample_tokens_(logits * (math.nan if steps and steps[-1] in spoiled else 1), *more)

    monkeypatch.setattr(grpo, "prompt_ids", counted)
    monkeypatch.setattr(grpo, "sample_tokens", sample)
    with pytest.raises(RunError, match="no finite gradient in 5 steps in a row, up to 10"):
        run(tmp_path, lambda *x: parity(*x) * (steps[-1:] != [6]), **BRIEF | dict(steps=30))
    lines = read(tmp_path)
    assert [line["step"] for line in lines] == [*range(11)]
    assert [line["step"] for line in lines if line["skipped"]] == sorted(spoiled)
    for line in lines:
        assert (line["grad_norm"] is line["entropy"] is None) == (line["step"] in spoiled)
    run(tmp_path / "before", **BRIEF | dict(steps=6))
    assert all(
        x.isfinite().all() for x in load_file(tmp_path / "before" / grpo.CHECKPOINT).values()
    )


def test_train_takes_one_thread_for_a_small_model_and_gives_the_others_back(tmp_path, monkeypatch):
    """Unless OMP_NUM_THREADS says how many; also after an error."""
    seen = []

    def reward(*_):
        seen.append(torch.get_num_threads())
        return 1 / 0

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for small, number, expected in ((1e6, None, 1), (1e6, "2", 2), (1e5, None, 2)):
            monkeypatch.setattr(grpo, "SMALL", small)
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
            if number:
                monkeypatch.setenv("OMP_NUM_THREADS", number)
            seen.clear()
            with pytest.raises(RunError, match="division by zero"):
                run(tmp_path / str(small), reward)
            assert seen == [expected] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
