"""Tests of grpo.py. `pytest` runs the quick ones, `GRPO_SLOW=1 pytest` all of them.

Those "to copy" go with the functions that are there to be copied, and need only torch and pytest.
Every expected value is worked out by hand, by another library, or by the naive computation that the
code avoids. In benchmarks/ are test_models.py (load_policy, check_model by plain_logprobs,
end_of_turn), test_measurement.py (against closed forms) and test_runs.py (long runs).
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
    shape = tensor([[0.8, -0.2, -0.2, -0.2, -0.2]] * 2)
    for norm, eps, scale in (("none", 0.1, 1), ("std", 0.1, 2), ("var", 0.04, 5)):
        assert torch.allclose(group_advantages(rewards, norm, eps), shape * scale)
    default = group_advantages(tensor([[1.0, 0.0]], dtype=torch.float64), "std")
    assert default[0, 0].item() == pytest.approx(0.5 / 0.500001, rel=1e-9)
    # All rewards 1 0 1 1: mean 3/4, variance 3/16; group means 1/2 and 1.
    advantages = group_advantages(tensor([[True, False], [True, True]]), "batch", 0.0)
    assert torch.allclose(advantages, tensor([[2 / 3**0.5, -2 / 3**0.5], [0, 0]]))


def test_advantage_scale():
    rewards = tensor([[3.0, 1.0], [0.1, 0.1]], dtype=torch.float64)  # deviations 1 and 0
    assert advantage_scale(rewards, "std", 0.25).tolist() == [[0.8], [0]]
    assert advantage_scale(rewards, "none").tolist() == [[1], [0]]
    assert advantage_scale(rewards, "var")[0].item() == pytest.approx(1 / 1.000001, rel=1e-9)
    assert advantage_scale(tensor([[5, 1]]), "var", 0.0).tolist() == [[0.25]]
    assert advantage_scale(tensor([[5, 1]]), "batch", 2.0).tolist() == [[0.25]]
    # Equal rewards: exactly 0, though by rounding the deviation of these is 1e-8.
    for norm in ("std", "var", "batch"):
        assert advantage_scale(tensor([[0.1] * 12] * 2), norm, 0.0).tolist() == [[0], [0]]


def test_token_weights():
    lengths = tensor([[1, 3], [4, 2]])
    assert token_weights(lengths, "sequence").tolist() == [[1 / 4, 1 / 4], [1 / 4, 1 / 4]]
    assert token_weights(lengths, "mean").tolist() == [
        pytest.approx([1 / 4, 1 / 12]), pytest.approx([1 / 16, 1 / 8])
    ]  # fmt: skip
    assert torch.allclose(token_weights(lengths, "token"), torch.full((2, 2), 1 / 10))


def test_policy_loss():
    # Ratio 2: A = 1 is clipped to 1.2, A = -1 is not. Ratio 1/2: A = 1 is not clipped, and has
    # twice the weight; A = -1 is clipped to 0.8.
    old = tensor([-1.0, -2.0, -3.0, -4.0])
    logprobs = old + tensor([2, 2, 0.5, 0.5]).log()
    A = tensor([1.0, -1.0, 1.0, -1.0])
    loss = policy_loss(logprobs, old, A, tensor([1.0, 1.0, 2.0, 1.0]), 0.2)
    assert loss.item() == pytest.approx(-(1.2 - 2 + 2 * 0.5 - 0.8))


def test_k3_divergence():
    # Ratios to what was sampled from, and to the reference, of 1, 2, 1/2: times 1/ratio - 1 + ln.
    logprobs = tensor([1, 2, 0.5]).log()
    expected = [0, 2 * (math.log(2) - 0.5), (1 - math.log(2)) / 2]
    found = k3_divergence(logprobs, tensor([0.0] * 3), tensor([0.0] * 3))
    assert found.tolist() == pytest.approx(expected, abs=1e-7)
    # Over the tokens sampled from `old`, its mean gradient is that of sum p (ln p - ln reference).
    logits = tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(0)
    old = tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference = tensor([0.1, 0.2, 0.7], dtype=torch.float64).log()
    estimate = (old * k3_divergence(logprobs, old.log(), reference)).sum()
    divergence = (logprobs.exp() * (logprobs - reference)).sum()
    (found,) = torch.autograd.grad(estimate, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(divergence, logits)
    assert torch.allclose(found, expected)


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
    greedy = sample_tokens(logits[:1], tensor([0.0]), 0.0)
    expected = 1, math.log(3 / 4), math.log(4) - 0.75 * math.log(3)
    assert [x.item() for x in greedy] == pytest.approx(expected)
    # The ends of the unit interval: what has probability 0 is not drawn, however sums are rounded.
    logits = tensor([[0, 1.0, 1, 0]] * 2).log()
    tokens, _, entropy = sample_tokens(logits, tensor([0, 1 - 2**-24]), 1.0)
    assert tokens.tolist() == [1, 2] and entropy.tolist() == pytest.approx([math.log(2)] * 2)
    for n in range(2, 300):
        logits = torch.cat([torch.zeros(1, n), tensor([[-math.inf]])], dim=1)
        assert sample_tokens(logits, tensor([1 - 2**-24]), 1.0)[0] < n
    _, logprob, _ = sample_tokens(tensor([[0.0, 1.0]]).bfloat16(), tensor([0.0]), 1.0)
    assert logprob.item() == pytest.approx(-math.log(1 + math.e), rel=1e-6)  # in float32


def test_token_logprobs():
    # Logits 0 and ln 3: probabilities 1/4 and 3/4, at temperature 1/2 1/10 and 9/10.
    logits = tensor([[1.0, 3.0], [1.0, 3.0]]).log()
    found = token_logprobs(logits, tensor([1, 0]), 1.0)
    assert found.tolist() == pytest.approx([math.log(3 / 4), math.log(1 / 4)])
    found = token_logprobs(logits, tensor([1, 0]), 0.5)
    assert found.tolist() == pytest.approx([math.log(9 / 10), math.log(1 / 10)])
    assert logits[0, 1].item() == pytest.approx(math.log(3))  # as before
    for dtype, close in ((torch.bfloat16, 1e-6), (torch.float64, 1e-14)):
        found = token_logprobs(tensor([[0.0, 1.0]]).to(dtype), tensor([0]), 1.0)
        assert found.item() == pytest.approx(-math.log(1 + math.e), rel=close)


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
    # Of 3 completions 2 are in the first half: x = (4, 0) / 3, y = (7, 10) / 3, z = 0; xx = 16/9,
    # yy = 149/9, xy = 28/9. The halves' products are 2 and 11, of which 4/5 are |g|^2: 1.6, 8.8.
    first = tensor([[1.0, 0], [3, 4], [0, 0]])
    second = tensor([[2.0, 0], [1, 2], [0, 0]])
    values, columns = gradient_geometry(first, second, 3, ["a", "a", "b"])
    assert columns["prompt_grad_norm"].tolist() == pytest.approx([4 / 3, 149**0.5 / 3, 0])
    assert columns["grad_sq_signal"].tolist() == pytest.approx([1.6, 8.8, 0])
    expected = dict(n_gradients=2, cos_mean=7 / 149**0.5, cos_std=0, cos_positive=1, cos_small=0)
    expected |= dict(interference=221 / 165, signal_share=93.6 / 165)  # |x + y|^2 = 221/9
    expected |= dict(cos_signal_within=28 / 46.8, cos_sq_signal_within=3 * 2 / (2 * 11))
    expected |= dict(cos_signal=28 / 93.6, cos_sq_signal=3 * 2 / (2 * 11))  # (28/9) / (10.4/9 * 9)
    expected |= dict(cos_signal_between=0, cos_sq_signal_between=math.nan)
    assert values == pytest.approx(expected, nan_ok=True)
    unknown, _ = gradient_geometry(first, second, 3, None)
    assert len(unknown) == 9 and unknown == {key: values[key] for key in unknown}
    # Cosines 0, -1, 0; sums (-2, 2). Of two levels: pairs 1-2, 2-3 between, 1-3 within.
    same = tensor([[1.0, 0], [0, 2], [-3, 0]])
    values, _ = gradient_geometry(same, same, 3, [None, "b", None])
    expected = dict(n_gradients=3, cos_mean=-1 / 3, cos_std=2**0.5 / 3, cos_positive=0)
    expected |= dict(cos_small=2 / 3, interference=8 / 14, signal_share=4 / 5)
    expected |= dict(cos_signal=-15 / 56, cos_sq_signal=9 / 49, cos_signal_within=-3 / 4)
    expected |= dict(cos_sq_signal_within=1, cos_signal_between=0, cos_sq_signal_between=0)
    assert values == pytest.approx(expected)
    values, _ = gradient_geometry(same[:1], same[:1], 3, ["a"])
    assert values.pop("n_gradients") == 1 and all(math.isnan(x) for x in values.values())


def test_directional_curvature():
    # log pi = start + c t + d t^2 / 2 along a unit vector: the mean of A (c^2 + d).
    c = tensor([1.0, -2.0, 3.0] * 4)
    d = tensor([0.5, 0.0, -4.0] * 4)

    def probe(slope, dtype=torch.float32, A=(1.0, 2.0, -0.5), v=5.0, start=-1.0):
        weight = {"a": torch.zeros(2, dtype=dtype)}
        return directional_curvature(
            lambda x: start + c * x["a"][0] + d * x["a"][0] ** 2 / 2,
            weight, {"a": tensor([v, 0.0])}, tensor(A * 4), slope,
        )  # fmt: skip

    for slope in (1e-3, 1.0, 1e3):  # however wrong the guess
        for dtype in (torch.float32, torch.float64):
            assert probe(slope, dtype)[0] == pytest.approx((1.5 + 8 - 2.5) / 3, rel=0.01)
    # The error: deviation of A, times sqrt(6 / 12) roundings of 5 * 2^-23 * (1 + 1), over t^2.
    error = (5.25 / 3) ** 0.5 * 0.5**0.5 * 10 * 2**-23 / (0.03 / 2) ** 2
    assert probe(2.0)[1] == pytest.approx(error, rel=1e-6)
    assert probe(1.0, A=(0.0, 0.0, 0.0)) == (0, 0)
    # No direction; too long for float32, where steps of 0.1 nats are lost, or nearly; no change.
    right = (14 / 3) ** 0.5  # the slope of log pi, root mean square
    assert not any(math.isnan(x) for x in probe(right, start=-2000.0))
    for found in (probe(1.0, v=0.0), probe(right, start=-2800.0), probe(1.0, start=math.nan)):
        assert all(math.isnan(x) for x in found)


# ----------------------- rollout and gradient against the naive pass ------------------------------

import datetime
import functools
import gc
import inspect
import itertools
import json
import os
import re
import resource
import shutil
import signal
import socket
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
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
from grpo import Config, InputError, Policy, Problem, RunError

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # more only cost here
gc.disable()  # a search through all that is imported takes a third of a second, again and again
DATA = Path(__file__).resolve().parent.parent / "shared" / "data"
slow = pytest.mark.skipif(not os.environ.get("GRPO_SLOW"), reason="slow: set GRPO_SLOW=1")
LETTERS = grpo.TASKS["letters"]
SHARED = dict(hidden_size=32, num_hidden_layers=2, intermediate_size=64, pad_token_id=0)
SHARED |= dict(num_attention_heads=4, num_key_value_heads=2)  # two query heads for a key head
SHARED |= dict(max_position_embeddings=64, bos_token_id=0, eos_token_id=1)
MODELS = {  # absolute positions; rotary ones; capped logits, and windows shorter than a prompt
    "gpt2": transformers.GPT2LMHeadModel,
    "llama": transformers.LlamaForCausalLM,
    "gemma2": transformers.Gemma2ForCausalLM,
}
WINDOW = dict(final_logit_softcapping=2.0, head_dim=8, sliding_window=4)  # for gemma2
PROMPTS = [[5, 0, 7, 8, 9], [3, 4], [11, 12, 13], [17]]


def make_model(kind, vocab_size=23):
    """A random transformer, far from uniform: distributions with a shape, positions that matter."""
    torch.manual_seed(0)
    sizes = SHARED | WINDOW if kind == "gemma2" else SHARED
    config = MODELS[kind].config_class(vocab_size=vocab_size, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return model


def make_policy(model, ends=(1,), limits=(4096, 4096)):
    masters = dict(model.named_parameters())
    named = "cache" in inspect.signature(model.forward).parameters  # by newer transformers
    cache = "cache" if named else "past_key_values"
    return Policy(model, None, list(ends), masters, masters, limits, cache)


def uniforms(P, G, T):
    return torch.rand(P, G, T, generator=torch.Generator().manual_seed(0))


def with_advantages(batch, norm, agg):
    batch.advantages = group_advantages(batch.rewards, norm)
    batch.weights = token_weights(batch.lengths, agg)
    return batch


def sample_batch(policy, agg="sequence"):
    """Five completions of each of PROMPTS with random rewards, one group without variance."""
    batch = grpo.rollout(policy, PROMPTS, uniforms(4, 5, 9), 1.0)
    batch.rewards = (uniforms(4, 5, 1)[..., 0] < 0.5).double()
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
    loss = 0.0
    for p, g in itertools.product(range(P), range(G)):
        ratio = (now[p][g] - old[p][g].detach()).exp()
        A = float(batch.advantages[p, g])
        terms = -torch.min(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
        d = reference[p][g].detach() - now[p][g]
        terms = terms + kl * ratio * (d.exp() - d - 1)
        divisor = {"sequence": P * G, "mean": P * G * len(d), "token": int(batch.lengths.sum())}
        loss += terms.sum() / divisor[agg]
    return loss


def flat(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])


def relative_error(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("kind", "temperature"), [("gpt2", 0.7), ("llama", 0.7), ("gemma2", 1.0)])
def test_rollout_is_the_naive_pass(kind, temperature):
    """Tokens, log-probabilities and entropies of prompts of unlike length, and of completions that
    end at different times; each has its own random numbers alone, whatever generate would do."""
    model = make_model(kind)
    model.generation_config.update(top_k=1, temperature=9.0, repetition_penalty=5.0)
    ends = [1, 4, 9]
    policy = make_policy(model, ends)
    u = uniforms(4, 6, 10)
    batch = grpo.rollout(policy, PROMPTS, u, temperature)
    assert len(set(batch.lengths.flatten().tolist())) > 3 and batch.truncated.any()
    for (p, prompt), g in itertools.product(enumerate(PROMPTS), range(6)):
        length = int(batch.lengths[p, g])
        row = batch.tokens[p, g].tolist()
        assert row == row[:length] + [0] * (10 - length)
        assert [token in ends for token in row[: length - 1]] == [False] * (length - 1)
        assert batch.truncated[p, g] == (row[length - 1] not in ends)
        assert length == 10 or not batch.truncated[p, g]
        logits = model(tensor([prompt + row[:length]])).logits[0, -length - 1 : -1] / temperature
        exact = torch.distributions.Categorical(logits=logits)
        drawn = (exact.probs.cumsum(1) < u[p, g, :length, None]).sum(1)
        assert row[:length] == drawn.tolist()
        for found, value in (
            (batch.logprobs, exact.log_prob(drawn)), (batch.entropy, exact.entropy())
        ):  # fmt: skip
            value = pad(value.detach(), (0, 10 - length))
            torch.testing.assert_close(found[p, g], value, rtol=0, atol=1e-5)
    alone = grpo.rollout(policy, PROMPTS[2:3], u[2:3, 1:2], temperature)
    assert torch.equal(alone.tokens[0, 0], batch.tokens[2, 1])


def test_draw_depends_on_seed_purpose_step_and_row_alone():
    config = Config(max_new_tokens=3)
    both = grpo.draw(config, 1, 5, [2, 7], 4)
    assert both.shape == (2, 4, 3)
    assert torch.equal(both[1:, :2], grpo.draw(config, 1, 5, [7], 2))  # a larger group adds draws
    for other in ((config, 1, 6), (config, 2, 5), (replace(config, seed=1), 1, 5)):
        assert (both[:1] != grpo.draw(*other, [2], 4)).all()
    other = replace(config, norm="none", lr=1.0, prompts=3)
    assert torch.equal(both, grpo.draw(other, 1, 5, [2, 7], 4))
    assert len({grpo.ORDER, grpo.TRAIN, grpo.EVALUATE}) == 3


def test_prompt_ids_go_through_all_problems_in_an_order_of_each_pass():
    config = Config(prompts=4)
    ids = [i for step in range(5) for i in grpo.prompt_ids(step, config, 10)]
    assert sorted(ids[:10]) == sorted(ids[10:]) == list(range(10))
    assert ids[:10] != ids[10:] and ids[:10] != list(range(10))
    assert grpo.prompt_ids(0, replace(config, seed=1), 10) != ids[:4]
    assert len(grpo.prompt_ids(0, config, 3)) == 4  # fewer problems than prompts a step


def test_encode_prompts_runs_each_once_and_the_output_layer_reads_no_strided_view():
    """For one torch copies the layer's weights, for every prompt: gigabytes with many tokens."""
    policy = make_policy(make_model("llama"), ends=[-1])
    seen = []
    layer = policy.model.get_output_embeddings()
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = grpo.rollout(policy, PROMPTS, uniforms(4, 2, 2), 1.0)
    grpo.completion_logprobs(policy, batch, [0, 1, 2], 1.0)
    assert [x.shape[:2] for x in seen] == [(4, 1), (8, 1), (2, 1), (3, 1)]
    assert all(x.stride() == torch.empty(x.shape).stride() for x in seen)


def test_encode_prompts_repeats_each_prompts_logits_in_any_order():
    policy = make_policy(make_model("gpt2"))
    mask, _, logits = grpo.encode_prompts(policy, PROMPTS, tensor([2, 0, 2, 3]))
    assert mask.sum(1).tolist() == [3, 5, 3, 1]
    for found, p in zip(logits, (2, 0, 2, 3), strict=True):
        expected = policy.model(tensor([PROMPTS[p]])).logits[0, -1]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_pad_prompts_and_extend_count_positions_from_a_prompts_beginning():
    """Of prompts that end side by side, and may contain token 0."""
    tokens, mask = grpo.pad_prompts([[5, 0, 7], [9]], "cpu")
    assert tokens.tolist() == [[5, 0, 7], [0, 0, 9]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    called = {}
    policy = make_policy(make_model("llama"))
    policy.model = lambda tokens, **named: called.update(named)
    policy.cache_argument = "past"
    grpo.extend(policy, tokens[:, 1:], mask, "cache")
    assert called.pop("position_ids").tolist() == [[1, 2], [0, 0]]
    assert called == {"attention_mask": mask, "past": "cache", "use_cache": True}


def test_score_gives_each_completion_its_own_prompts_answer():
    """Rewards of texts without special tokens and without what comes after the end."""
    tokenizer = AutoTokenizer.from_pretrained(LETTERS.model)  # "0" is token 18, the end token 0
    policy = SimpleNamespace(tokenizer=tokenizer)
    tokens = tensor([[[19, 0, 0], [20, 21, 30]], [[22, 23, 24], [0, 0, 0]]])
    batch = SimpleNamespace(tokens=tokens, lengths=tensor([[2, 2], [3, 1]]))
    problems = [Problem("q", "100", None, []), Problem("q", "200", None, [])]
    rewards, texts = grpo.score(policy, batch, problems, lambda text, a: int(text or 7) + int(a))
    assert texts == ["1", "23", "456", ""]
    assert rewards.tolist() == [[101, 123], [656, 207]] and rewards.dtype == torch.float64
    for reward, message in (
        (lambda *_: 1 / 0, "division by zero"),
        (lambda *_: math.nan, "finite"),
        (lambda *_: None, "TypeError"),
    ):
        with pytest.raises(RunError, match=f"{message}.*'1'.*answer='100'"):
            grpo.score(policy, batch, problems, reward)


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


GRADIENTS = [("gpt2", "sequence"), ("llama", "mean")]
GRADIENTS += [pytest.param("gemma2", "token", marks=slow)]


@pytest.mark.parametrize(("kind", "agg"), GRADIENTS)
def test_loss_gradient_is_the_naive_one_whatever_the_split_and_order(kind, agg):
    """Several prompts of unequal length in a micro-batch, one of one token, or one completion."""
    policy = make_policy(make_model(kind))
    policy.trained = policy.trained | {"unused": torch.ones(3, requires_grad=True)}
    batch = sample_batch(policy, agg)
    now = naive_logprobs(policy.model, batch, 0.8)
    loss = naive_loss(now, now, now, batch, agg)
    expected = pad(flat(torch.autograd.grad(loss, [*policy.masters.values()])), (0, 3))
    active = [r for r in range(20) if batch.advantages.flatten()[r]]  # the others have no gradient
    for limits, rows in (
        ((999, 999), range(20)),
        ((60, 40), [*range(19, -1, -1)]),
        ((1, 1), active),
    ):
        policy.limits = limits
        gradient, logprobs = grpo.loss_gradient(policy, batch, rows, Config(temperature=0.8))
        assert relative_error(flat(gradient), expected) < 1e-5
        for row in range(20):
            value = now[row // 5][row % 5].detach()
            found = logprobs.flatten(0, 1)[row, : len(value)]
            exact = value if row in rows else torch.full_like(value, math.nan)
            torch.testing.assert_close(found, exact, rtol=0, atol=1e-5, equal_nan=True)
    padded = grpo.completion_logprobs(policy, batch, range(20), 0.8)
    assert torch.equal(padded != 0, torch.arange(padded.shape[1]) < batch.lengths.view(20, 1))
    gradient, _ = grpo.loss_gradient(policy, batch, [], Config())
    assert [x.shape for x in gradient] == [x.shape for x in policy.masters.values()]
    assert not flat(gradient).any()


def test_set_gradient_clips_the_norm_by_hand():
    """Of (3, 4) and (12), 13 in all."""
    policy = SimpleNamespace(masters={"a": torch.zeros(2), "b": torch.zeros(1)})
    for max_norm, scale in ((0.0, 1), (20.0, 1), (6.5, 0.5)):
        norm = grpo.set_gradient(policy, [tensor([3.0, 4.0]), tensor([12.0])], max_norm)
        grads = flat(x.grad for x in policy.masters.values())
        assert norm == pytest.approx(13) and grads.tolist() == pytest.approx(
            [3 * scale, 4 * scale, 12 * scale]
        )


SETTINGS = dict(steps=12, prompts=3, group=5, eval_every=4, eval_problems=4, save_every=4, lr=1e-3)
SETTINGS |= dict(measure_every=4, micro_batch=80, device="cpu", dtype="float32", task="letters")
SETTINGS |= dict(data=LETTERS.test)
BRIEF = dict(eval_every=0, eval_problems=1, steps=2, measure_every=0)


def settings(out, **changes):
    """A small run: 12 updates of 3 prompts with 5 completions, measured at every fourth."""
    return Config(**SETTINGS | changes | {"out": str(out)})


def parity(completion, answer):
    """A reward that any policy earns half of the time."""
    return float(zlib.crc32((completion + answer).encode()) % 2)


def encoded(policy, config):
    """A run's problems."""
    return grpo.encode_problems(grpo.load_problems(config, None, parity)[0], policy, config)


def test_evaluate_is_generate_and_then_the_rollout_of_each_problem(monkeypatch):
    """Five problems in batches of 3, as large as in training; another process has its share."""
    config = replace(grpo.resolve(settings("-")), group=1, temperature=1.5)
    policy = grpo.load_policy(config)
    problems = encoded(policy, config)[:5]
    texts = {"greedy": [], "sampled": []}
    for i, problem in enumerate(problems):
        ids = tensor([problem.prompt])
        (row,) = policy.model.generate(ids, attention_mask=ids**0, max_new_tokens=6, pad_token_id=0)
        rest = row[ids.shape[1] :]
        texts["greedy"].append(policy.tokenizer.decode(rest, skip_special_tokens=True))
        u = grpo.draw(config, grpo.EVALUATE, 0, [i], 1)
        alone = grpo.rollout(policy, [problem.prompt], u, 1.5)
        texts["sampled"] += grpo.score(policy, alone, [problem], parity)[1]

    def reward(completion, answer):
        return float(completion or 0) + float(answer) / 1e4

    def rewards(how):
        return [reward(text, problem.answer) for text, problem in zip(texts[how], problems)]

    sizes = []
    rollout = grpo.rollout
    monkeypatch.setattr(grpo, "rollout", lambda *x: sizes.append(len(x[1])) or rollout(*x))
    columns, samples = grpo.evaluate(policy, problems, reward, config)
    assert sizes == [3, 2, 3, 2]
    assert columns["eval_greedy_reward"] == pytest.approx(np.mean(rewards("greedy")))
    assert columns["eval_reward"] == pytest.approx(np.mean(rewards("sampled")))
    assert math.isnan(columns["eval_greedy"]) and math.isnan(columns["eval_pass_rate"])
    questions, _, _, _ = zip(*problems)
    shown = zip(questions, texts["sampled"], [x.answer for x in problems], rewards("sampled"))
    keys = "question", "completion", "answer", "reward"
    assert samples == [dict(zip(keys, values)) for values in shown][:4]
    first = texts["sampled"][0]
    columns, _ = grpo.evaluate(policy, problems, lambda text, _: text == first, config)
    assert columns["eval_pass_rate"] == texts["sampled"].count(first) / 5
    assert columns["eval_greedy"] == texts["greedy"].count(first) / 5
    monkeypatch.setattr(grpo, "share", lambda count: range(count // 2, count))
    columns, _ = grpo.evaluate(policy, problems, reward, config)
    assert sizes[8:] == [2, 1, 2, 1]
    assert columns["eval_reward"] == pytest.approx(np.mean(rewards("sampled")[2:]))


# ---------------------------------- a run against the naive run -----------------------------------


def run(out, reward=parity, stop=(), **changes):
    """grpo.train, without the check of the model, which is a third of so short a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "check_model", lambda policy, *_: policy)
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
    problems = encoded(policy, config)
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
            far = table(naive_forward(plain, start)) if config.kl else now
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
    dict(epochs=3, clip=0.05, kl=0.3, max_grad_norm=0.0, measure_every=1, agg="mean", group=3),
    dict(norm="none", lora=4, task="arith", model="llama", agg="token", max_grad_norm=0.05),
    pytest.param(dict(norm="none", agg="token", measure_every=1, micro_batch=24), marks=slow),
    pytest.param(dict(norm="var", agg="mean", temperature=0.8, measure_every=1), marks=slow),
    pytest.param(dict(norm="batch", max_grad_norm=0.05), marks=slow),
    pytest.param(dict(norm="std", lora=4, epochs=2, clip=0.01, kl=0.3), marks=slow),
]


@pytest.mark.parametrize("changes", RUNS)
def test_train_is_the_naive_run(changes, tmp_path):
    """Weights, logged norms and the saved model; measured or not, clipped, in epochs, with KL (by
    with_parameters), with adapters; what `finish` returns is in the log."""
    changes = BRIEF | dict(optimizer="sgd", lr=0.3) | changes
    if "model" in changes:
        changes["model"] = str(tmp_path / "start")
        make_model("llama", 98).save_pretrained(changes["model"])
        AutoTokenizer.from_pretrained(LETTERS.model).save_pretrained(changes["model"])
    config = settings(tmp_path, **changes)
    given = asdict(config)
    evaluation = grpo.train(config, reward=parity)
    assert asdict(config) == given and read(tmp_path)[-1] == {"step": config.steps} | evaluation
    config = grpo.resolve(config)
    start, theta, norms, ratios, plain = naive_run(config)
    before = flat(start.values())
    after = flat(theta.values())
    assert relative_error(weights(tmp_path, start) - before, after - before) < 1e-4
    assert all(("lora" in name) == bool(config.lora) for name in start)
    assert config.epochs == 1 or max(ratios) > config.clip
    lines = read(tmp_path)[:-1]
    norms = np.reshape(norms, (2, -1))
    assert [line["grad_norm"] for line in lines] == pytest.approx(norms.mean(1), rel=1e-4)
    over = (norms > (config.max_grad_norm or math.inf)).any(1)
    assert [line["clipped"] for line in lines] == over.tolist()
    assert all(0 <= line["logprob_gap"] < 1e-5 for line in lines)
    ids = torch.arange(20, 60).view(2, 20)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    expected = naive_forward(plain, theta)(ids).logits
    torch.testing.assert_close(saved(ids).logits, expected, rtol=1e-3, atol=1e-3)


WHOLE = dict(dtype="bfloat16", kl=0.1, measure_every=6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that others are compared with, and the gradients that its optimizer had."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    gradients = []
    set_gradient = grpo.set_gradient

    def recorded(policy, *more):
        norm = set_gradient(policy, *more)
        gradients.append([x.grad.clone() for x in policy.masters.values()])
        return norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "set_gradient", recorded)
        run(out, **WHOLE)
    return out, gradients


def test_make_optimizer_takes_the_steps_of_torchs_adamw_on_float32_masters(whole):
    """No weight decay, a rate that rises for ten steps; the model has them in bfloat16."""
    out, gradients = whole
    policy = grpo.load_policy(grpo.resolve(settings(out, **WHOLE)))
    theta = [x.clone() for x in policy.masters.values()]
    optimizer = torch.optim.AdamW(theta, weight_decay=0.0)  # else torch's defaults
    for step, gradient in enumerate(gradients):
        for parameter, grad in zip(theta, gradient):
            parameter.grad = grad
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 10)
        optimizer.step()
    found = weights(out, policy.masters)
    torch.testing.assert_close(found, flat(theta), rtol=0, atol=1e-6)
    rates = [line["lr"] for line in read(out)[:-1]]
    assert rates == pytest.approx([1e-4 * n for n in range(1, 11)] + [1e-3, 1e-3])
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert torch.equal(flat(model.parameters()), found.bfloat16())


MEASURED = [  # every norm, optimizer and aggregation
    pytest.param(dict(norm="none", agg="sequence"), marks=slow),
    pytest.param(dict(norm="std", agg="mean", optimizer="sgd", lr=0.1, epochs=2), marks=slow),
    dict(norm="var", agg="token", dtype="bfloat16"),
    pytest.param(dict(norm="batch", optimizer="sgd", lr=0.1, kl=0.1), marks=slow),
]


@pytest.mark.parametrize("changes", MEASURED)
def test_train_has_the_same_weights_to_the_bit_with_and_without_measuring(changes, tmp_path):
    """And samples; what is measured is logged at every second step, and not elsewhere."""
    changes = BRIEF | dict(steps=3) | changes
    run(tmp_path / "with", **changes | dict(measure_every=2))
    run(tmp_path / "without", **changes)
    ours, theirs = (load_file(tmp_path / x / grpo.CHECKPOINT) for x in ("with", "without"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for name in ("metrics.jsonl", "prompts.jsonl"):
        plain = read(tmp_path / "without", name)
        lines = read(tmp_path / "with", name)
        for line, other in zip(lines, plain, strict=True):
            assert {key: line[key] for key in other} == other
            more = {"interference", "curvature_error", "feature_cos", "fisher_half"} & line.keys()
            assert len(more) == (2 if line["step"] in (0, 2) else 0)


@slow
def test_train_on_another_device_is_the_same(tmp_path):
    """On CUDA pretended by the CPU: whatever meets a tensor of the other side raises an error."""
    changes = BRIEF | dict(steps=1, measure_every=1, epochs=2, kl=0.1)
    run(tmp_path / "cpu", **changes)
    with Pretence():
        run(tmp_path / "cuda", **changes | dict(device="cuda"))
        filled = grpo.resolve(Config(device="cuda"))
    assert (filled.device, filled.dtype) == ("cuda:0", "bfloat16")
    assert read(tmp_path / "cuda", "samples.jsonl") == read(tmp_path / "cpu", "samples.jsonl")
    ours, theirs = (pd.DataFrame(read(tmp_path / x)).astype(float) for x in ("cuda", "cpu"))
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-2, atol=1e-4)


def test_train_skips_steps_that_are_not_finite_and_ends_after_five_in_a_row(tmp_path, monkeypatch):
    """Logits are spoiled at steps 1 to 4 and 6 to 10. Where all rewards are 0, so is the gradient,
    and only the entropy tells."""
    spoiled = [1, 2, 3, 4, 6, 7, 8, 9, 10]
    steps = []
    draw = grpo.draw
    sample = grpo.sample_tokens

    def counted(config, purpose, step, *more):
        steps.append(step)
        return draw(config, purpose, step, *more)

    def spoil(logits, *more):
        return sample(logits * (math.nan if steps and steps[-1] in spoiled else 1), *more)

    monkeypatch.setattr(grpo, "draw", counted)
    monkeypatch.setattr(grpo, "sample_tokens", spoil)
    with pytest.raises(RunError, match="no finite gradient in 5 steps in a row, up to 10"):
        changes = BRIEF | dict(steps=30, save_every=1)
        run(tmp_path, lambda *x: parity(*x) * (steps[-1] != 6), **changes)
    lines = read(tmp_path)
    assert len(lines) == 11
    for line in lines:
        assert line["skipped"] == (line["step"] in spoiled)
        assert (line["grad_norm"] is line["entropy"] is None) == (line["step"] in spoiled)
    saved = load_file(tmp_path / grpo.CHECKPOINT)
    assert all(x.isfinite().all() for x in saved.values())
    assert saved["step.transformer.wte.weight"] == 2  # steps 0 and 5


def test_start_run_takes_one_thread_for_a_small_model_and_gives_the_others_back(monkeypatch):
    """Unless OMP_NUM_THREADS says how many; also after an error. By what prepare_run found."""
    threads = [7]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    for small, variable, expected in ((1e6, None, 1), (1e6, "7", 7), (1e5, None, 7)):
        monkeypatch.setattr(grpo, "SMALL", small)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if variable:
            monkeypatch.setenv("OMP_NUM_THREADS", variable)
        with pytest.raises(ZeroDivisionError), grpo.start_run(settings("-"), None, parity) as begun:
            assert threads[-1] == expected and begun.config.curvature == (small == 1e6)
            raise ZeroDivisionError
        assert threads[-1] == 7


# ----------------------------------------- measurement --------------------------------------------


def measure(policy, batch, config, levels=None):
    """What grpo.measure returns, and what it got from measure_half for each half, two a prompt."""
    masters = [*policy.masters.values()]
    optimizer = torch.optim.SGD(masters, lr=0.5)
    for master in masters:
        master.grad = torch.ones_like(master)
    halves = []
    measure_half = grpo.measure_half

    def keep(*arguments):
        half = measure_half(*arguments)
        halves.append(dict(half))
        return half

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "measure_half", keep)
        levels = levels or [0] * len(batch.prompts)
        line, columns = grpo.measure(policy, batch, levels, config, optimizer)
    return line, columns, halves


KINDS = [("float32", 0, 1e-5), pytest.param("bfloat16", 4, 0.1, marks=slow)]


@pytest.mark.parametrize(("dtype", "lora", "close"), KINDS)
def test_measure_half_is_the_naive_value(dtype, lora, close, monkeypatch):
    """Of every half: its gradient, Fisher trace and, from probe_curvature, curvature within 1% of a
    Hessian-vector product by double backward in float64. The error told in float32 is as large as
    the true one, within a factor of ten."""
    changes = dict(group=8, prompts=5, temperature=2.0, micro_batch=24, curvature=True)
    config = grpo.resolve(settings("-", lora=lora, dtype=dtype, **changes))
    policy = grpo.load_policy(config)
    policy.eos_ids = [0, 19, 20, 21]  # so that completions are of unlike lengths
    how = dict(dtype=dtype, attn_implementation="eager")
    plain = AutoModelForCausalLM.from_pretrained(LETTERS.model, **how)
    torch.manual_seed(0)
    for name, master in policy.masters.items():  # adapters start as nothing
        master.data += 0.05 * torch.randn(master.shape) * ("lora_B" in name)
    theta = {name: x.detach().double().requires_grad_() for name, x in policy.masters.items()}
    forward = naive_forward(plain.double(), theta)

    def gradient(value, again=False):
        found = torch.autograd.grad(value, [*theta.values()], retain_graph=True, create_graph=again)
        return torch.cat([g.flatten() for g in found])

    batch = step_batch(policy, 0, config)
    assert len(set(batch.lengths[:, 4:].flatten().tolist())) > 2  # so micro-batches reorder them
    batch.old_logprobs = batch.logprobs * math.nan  # as after training on other rows
    line, columns, halves = measure(policy, batch, config)
    exact = []
    naive = naive_logprobs(forward, batch, 2.0)
    for i, half in enumerate(halves):
        p, first = divmod(i, 2)
        own = slice(0, 4) if first == 0 else slice(4, 8)
        other = slice(4, 8) if first == 0 else slice(0, 4)
        sums = torch.stack([values.sum() for values in naive[p]])
        r = batch.rewards[p]
        A = r - (r.sum() - r) / 7  # the others' mean
        wanted = gradient((A * sums)[own].mean())
        assert relative_error(half["vector"], wanted) < close or not r.std()
        assert bool(half["vector"].any()) == bool(r.std())
        fisher = 4 * float(gradient(sums[own].mean()).square().sum())
        assert half["fisher_half"] == pytest.approx(fisher, rel=2 * close)
        assert half["reward_std_half"] == pytest.approx(r[own].std(correction=0))
        assert half["pass_rate_half"] == r[own].mean()
        v = half["vector"].double() / (half["vector"].double().norm() or 1)
        surrogate = (r[other] - r[other].mean()) * 4 / 3 * sums[other].detach().exp() ** -1
        surrogate = (surrogate * sums[other].exp()).mean()
        exact.append(float(gradient(gradient(surrogate, True) @ v) @ v) if r[other].std() else 0.0)
        if r[own].std() == 0:
            exact[-1] = math.nan
    found = [half["curvature"] for half in halves]
    np.testing.assert_allclose(found, exact, rtol=0.01, atol=1e-9)
    assert np.isfinite(exact).sum() > 4
    assert line["curvature"] == pytest.approx(np.nanmean(found))
    for name in ("fisher_half", "pass_rate_half", "reward_std_half", "curvature"):
        pairs = np.array([half[name] for half in halves], float).reshape(5, 2)
        np.testing.assert_array_equal(np.array(columns[name], float), pairs)
    monkeypatch.setattr(grpo, "SMALL", 0)  # so that it is done in float32
    _, _, halves = measure(policy, batch, config)
    errors = [half["curvature"] - x for half, x in zip(halves, exact)]
    told = [half["curvature_error"] for half in halves]
    ratio = [abs(error) / size for error, size in zip(errors, told) if size > 0]
    # Wider registers round less: on some processors a tenth of what is told, never much more.
    assert len(ratio) > 3 and max(ratio) < 10 and np.median(ratio) > 0.01


def test_measure_takes_features_levels_and_sketches(tmp_path, monkeypatch):
    """Hidden states by the naive pass; with sketch_signs, cosines are close to the exact ones."""
    policy = make_policy(make_model("llama"))
    read_by = []
    policy.model.lm_head.register_forward_pre_hook(lambda _, x: read_by.append(x[0]))
    features = []
    for prompt in PROMPTS:
        policy.model(tensor([prompt]))
        features.append(read_by[-1][0].mean(0).detach())
    features = torch.stack(features)
    found = grpo.prompt_features(policy, PROMPTS)
    torch.testing.assert_close(found, features, rtol=0, atol=1e-5)
    batch = sample_batch(policy)
    config = Config(group=5, curvature=False)
    line, columns, halves = measure(policy, batch, config, ["a", "b", "a", "a"])
    assert "curvature" not in line and not {"curvature", "fisher_half"} & columns.keys()
    centred = features - features.mean(0)
    for name, x in (("feature_cos", features), ("feature_cos_centered", centred)):
        unit = x / x.norm(dim=1, keepdim=True)
        cosines = (unit @ unit.T)[~torch.eye(4).bool()]
        assert line[name] == pytest.approx(float(cosines.abs().mean()), rel=1e-4)
    vectors = torch.stack([half["vector"] for half in halves]).double()
    expected, _ = gradient_geometry(vectors[::2], vectors[1::2], 5, ["a", "b", "a", "a"])
    assert {key: line[key] for key in expected} == pytest.approx(expected, nan_ok=True)
    monkeypatch.setattr(grpo, "SMALL", 0)
    torch.manual_seed(1)
    sketched, _, halves = measure(policy, batch, config)
    assert len(halves[0]["vector"]) == grpo.SKETCH
    for name in ("cos_mean", "cos_std", "signal_share"):
        assert sketched[name] == pytest.approx(line[name], abs=0.02)
    policy.model.forward = lambda *_, **__: SimpleNamespace(logits=None)
    assert grpo.prompt_features(policy, PROMPTS).isnan().all()


def test_precise_parameters_are_the_masters_in_float64_and_large_ones_in_float32(monkeypatch):
    """Not the working ones in bfloat16, of which the masters are a thousandth away."""
    policy = grpo.load_policy(grpo.resolve(settings("-", dtype="bfloat16")))
    for master in policy.masters.values():
        master += 1e-3
    for small, dtype in ((1e6, torch.float64), (1e5, torch.float32)):
        monkeypatch.setattr(grpo, "SMALL", small)
        precise = grpo.precise_parameters(policy)
        assert all(torch.equal(precise[k], x.to(dtype)) for k, x in policy.masters.items())


def test_measure_does_not_depend_on_the_advantages(tmp_path, monkeypatch):
    """Geometry, curvature and Fisher stay as they are if the update takes three times those."""
    changes = BRIEF | dict(steps=1, measure_every=1, agg="mean", kl=0.1, prompts=6, epochs=2)
    changes |= dict(optimizer="sgd", lr=1.0)  # it is measured before the first update
    levels = []
    geometry = grpo.gradient_geometry
    monkeypatch.setattr(grpo, "gradient_geometry", lambda *x: levels.append(x[3]) or geometry(*x))
    run(tmp_path / "one", **changes)
    monkeypatch.setattr(grpo, "group_advantages", lambda *x: 3 * group_advantages(*x))
    run(tmp_path / "three", **changes)
    one, three = (read(tmp_path / name)[0] for name in ("one", "three"))
    assert three.pop("grad_norm") > 2 * one.pop("grad_norm")
    own = {"logprob_gap", "clipped", "length_taken"}
    assert all(one[key] == three[key] for key in one.keys() - own) and "curvature" in one
    rows, others = (read(tmp_path / name, "prompts.jsonl") for name in ("one", "three"))
    assert rows == others and "fisher_half" in rows[0]
    assert levels[0] == [row["level"] for row in rows] and len(set(levels[0])) > 1


# ------------------------------------- files and resumption ---------------------------------------


def test_log_step_by_hand(tmp_path, capsys, monkeypatch):
    """Four prompts, of which the first alone has completions that are trained on."""
    config = settings(tmp_path, max_grad_norm=2.5, steps=20)
    problems = [Problem("q", "a", level, []) for level in "wxyz"]
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.5}])
    state = SimpleNamespace(config=config, problems=problems, optimizer=optimizer, step=3)
    monkeypatch.setattr(grpo, "time", SimpleNamespace(perf_counter=lambda: 100.0))
    clock = 20.0, 96.5, 98.0  # of the run, the step, its update: 80 s for 5 steps, 12 are left
    lengths = tensor([[1, 3], [2, 2], [1, 1], [2, 2]])
    inside = torch.arange(3) < lengths[..., None]
    batch = SimpleNamespace(tokens=torch.zeros(4, 2, 3), lengths=lengths, prompts=[[0]] * 4)
    batch.rewards = tensor([[1.0, 0.5], [1, 1], [1, 1], [0, 0]])
    batch.entropy = 0.5 * inside
    batch.entropy[0, 1] = 2.5
    batch.truncated = lengths == 3
    batch.logprobs = torch.full((4, 2, 3), -1.0) * inside
    batch.old_logprobs = torch.where(inside, batch.logprobs, -9.0)  # beyond the end nothing counts
    batch.old_logprobs[0, 1, 2] = -1.25
    batch.old_logprobs[1:] = math.nan  # not trained on
    active = tensor([[True, True], [False] * 2, [False] * 2, [False] * 2])
    measured = {"cos_mean": 0.25}, {"prompt_grad_norm": tensor([1.0, 2, 3, math.nan])}
    evaluation = {"eval_reward": 0.125}, [{"question": "é"}]
    norms = [1.0, 3.0]
    ids = [2, 0, 3, 2]

    def log(step=7, norms=norms, evaluation=evaluation, measured=measured):
        grpo.log_step(state, step, ids, batch, active, norms, clock, measured, evaluation)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])

    line = log()
    expected = dict(step=7, reward=5.5 / 8, pass_rate=5 / 8, reward_std=1 / 16, lr=0.5)
    expected |= dict(
        frac_all_right=1 / 2, frac_all_wrong=1 / 4, entropy=(7.5 + 0.5 * 11) / 14, length=14 / 8
    )
    expected |= dict(truncated=1 / 8, grad_norm=2, clipped=True, skipped=0, logprob_gap=0.25)
    expected |= dict(seconds_rollout=1.5, seconds_update=2.0, tokens_per_second=4.0)
    assert line == pytest.approx(expected | measured[0] | evaluation[0])
    rows = read(tmp_path, "prompts.jsonl")
    scale = 1 / (0.25 + 1e-6)
    assert rows[0] == dict(step=7, prompt=2, level="y", pass_rate=0.5, reward_std=0.25,
                           scale=pytest.approx(scale), prompt_grad_norm=1)  # fmt: skip
    assert [row["level"] for row in rows] == ["y", "w", "z", "y"]
    assert [row["scale"] for row in rows[1:]] == [0, 0, 0] and rows[3]["prompt_grad_norm"] is None
    assert (tmp_path / "samples.jsonl").read_text() == '{"step": 7, "question": "é"}\n'
    shown = "step     7/20  reward 0.688  σ 0.062  cut off 12%  3.2 min left  held out 0.125\n"
    assert capsys.readouterr().out == shown
    line = log(norms=[2.0, math.nan], measured=None, evaluation=None)
    assert (line["clipped"], line["skipped"], line["grad_norm"]) == (False, 1, None)
    assert len(read(tmp_path, "samples.jsonl")) == 1 and "cos_mean" not in line
    batch.old_logprobs[0, 0, 0] = math.nan  # of one that is trained on
    assert log()["logprob_gap"] is None
    active[:] = False
    assert log()["logprob_gap"] is None
    rates = grpo.pass_rates(tensor([[0.0, 1.0, 0.5, 1.0], [0.0, 2.0, 1.0, 1.0], [-1.0, 1, 1, 1]]))
    np.testing.assert_equal(rates.numpy(), [0.5, math.nan, math.nan])


def test_the_last_line_says_before_and_after(tmp_path, capsys):
    after = run(tmp_path / "run", **BRIEF | dict(steps=2, lr=0.1))
    before = read(tmp_path / "run")[0]
    assert before["eval_reward"] != after["eval_reward"]
    held_out, greedy = (
        f"{before[key]:.3f} → {after[key]:.3f}" for key in ("eval_reward", "eval_greedy_reward")
    )
    assert f"\nheld out {held_out}, greedy {greedy}; all in " in capsys.readouterr().out


def test_train_leaves_logs_checkpoint_model_and_settings(whole):
    """That save_checkpoint, as save_or_stop calls it, log_step and finish write."""
    out = whole[0]
    assert {x.name for x in out.iterdir()} == {*grpo.LOGS, "config.json", "checkpoint", "model"}
    metrics = read(out)
    evaluation = {"eval_pass_rate", "eval_greedy", "eval_reward", "eval_greedy_reward"}
    assert [row["step"] for row in metrics] == list(range(13))
    assert [row["step"] for row in metrics if evaluation <= row.keys()] == [0, 4, 8, 12]
    assert [row["step"] for row in metrics if "curvature" in row] == [0, 6]
    assert metrics[12].keys() == evaluation | {"step"}
    samples = read(out, "samples.jsonl")
    assert [row["step"] for row in samples] == [0] * 4 + [4] * 4 + [8] * 4 + [12] * 4
    assert all(row["reward"] == parity(row["completion"], row["answer"]) for row in samples)
    config = grpo.resolve(settings(out, **WHOLE))
    problems, held_out = grpo.load_problems(config, None, parity)
    assert [row["question"] for row in samples[:4]] == [question for question, *_ in held_out]
    rows = read(out, "prompts.jsonl")
    ids = [i for step in range(12) for i in grpo.prompt_ids(step, config, len(problems))]
    assert [row["prompt"] for row in rows] == ids
    assert [row["level"] for row in rows] == [problems[i][0][0] for i in ids]  # its letter
    with safe_open(out / grpo.CHECKPOINT, "pt") as file:
        state = json.loads(file.metadata()["state"])
        assert file.get_tensor("step.transformer.wte.weight") == 12
    sizes = {name: (out / name).stat().st_size for name in grpo.LOGS}
    given = asdict(replace(config, curvature=True))
    assert state["config"] == json.loads((out / "config.json").read_text()) == given
    assert state["step"] == 12 and all(0 < state["logs"][name] <= sizes[name] for name in sizes)
    assert AutoTokenizer.from_pretrained(out / "model")("e+7=").input_ids == [71, 13, 25, 31]


def test_train_says_how_long_is_left_and_measures_its_time(tmp_path, monkeypatch, capsys):
    ticks = itertools.count(20, 20)  # of a step three: began, sampled, updated
    monkeypatch.setattr(grpo, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    run(tmp_path, **BRIEF | dict(steps=4))
    shown = capsys.readouterr().out
    left = re.findall(r"([\d.]+) min left", shown)
    assert left == ["2.0", "1.7", "0.9", "0.0"]  # 3 steps at 40 s, 2 at 100/2, 1 at 160/3
    assert "letters: 511 problems, reward parity, at most 6 new tokens; norm std, adamw" in shown
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])
    assert line["seconds_rollout"] == line["seconds_update"] == 20
    assert line["tokens_per_second"] == pytest.approx(line["length"] * 15 / 40)


def at_call(number, act):
    """The reward, which at its call of this number acts first."""
    calls = itertools.count(1)

    def reward(*texts):
        if next(calls) == number:
            act()
        return parity(*texts)

    return reward


def assert_same_run(out, other):
    """Logs, weights and moments of the one equal those of the other, to the bit."""
    assert all(read(out, name) == read(other, name) for name in grpo.LOGS)
    ours, theirs = (load_file(Path(path) / grpo.CHECKPOINT) for path in (out, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_resume_after_a_crash_is_the_same_run_to_the_bit(whole, tmp_path):
    """In bfloat16, which is not asked for again, and with KL to the start policy. A reward fails in
    step 1, of which the logs began after the checkpoint, and in step 6, two after another."""
    for call, steps in ((8 + 15 + 7, 1), (2 * 8 + 6 * 15 + 7, 6)):
        with pytest.raises(SystemExit):  # of evaluations with 8 rewards, and of 15 a step
            run(tmp_path, at_call(call, sys.exit), resume=steps > 1, **WHOLE)
        assert len(read(tmp_path)) == steps
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')  # killed while writing
    run(tmp_path, resume=True, **WHOLE | dict(dtype=None))
    assert_same_run(tmp_path, whole[0])


@slow
def test_resume_after_a_signal_a_full_disk_and_a_changed_schedule(tmp_path, capsys, monkeypatch):
    """With adapters. A full disk is one line and costs nothing. Some settings may differ."""
    changes = BRIEF | dict(save_every=2, steps=5, lora=4)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "state.tmp").write_text("half a checkpoi")  # killed while it began
    received = []
    with pytest.raises(RunError, match="^SIGTERM: add --resume to continue$") as stopped:
        run(tmp_path, at_call(2 + 7, lambda: received.append(signal.SIGTERM)), received, **changes)
    assert stopped.value.status == 143 and len(read(tmp_path)) == 1
    checkpoint = tmp_path / grpo.CHECKPOINT
    first = checkpoint.read_bytes()
    monkeypatch.setitem(grpo.TASKS, "letters", LETTERS._replace(reward="parity"))
    monkeypatch.setitem(grpo.REWARDS, "parity", parity)
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(first) // 2, former[1]))
    status = command(settings(tmp_path, **changes | dict(resume=True)))
    resource.setrlimit(resource.RLIMIT_FSIZE, former)
    error = capsys.readouterr().err
    assert status == 1 and re.search("^grpo.py: stopped: .*File too large.*\n\\Z", error, re.M)
    assert checkpoint.read_bytes() == first and list(checkpoint.parent.iterdir()) == [checkpoint]
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    allowed = dict(micro_batch=6, eval_every=3, save_every=7, measure_every=2, curvature=False)
    run(moved, resume=True, **changes | allowed)
    run(tmp_path, **changes)
    rewards = [[line.get("reward") for line in read(out)] for out in (moved, tmp_path)]
    assert rewards[0] == rewards[1]
    assert [line["step"] for line in read(moved) if "eval_reward" in line] == [0, 3, 5]
    ours, theirs = (load_file(out / grpo.CHECKPOINT) for out in (moved, tmp_path))
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in theirs) < 1e-4


def cut(name, size):
    return lambda out: os.truncate(out / name, size)


def exchange(out):
    state = {"state": json.dumps({"step": 1, "logs": {}, "config": {}})}
    save_file({"a": torch.ones(1)}, out / grpo.CHECKPOINT, state)


HARM = [  # what happens to the files, settings of the resuming run, what is said
    (None, dict(resume=False), "holds a run: add --resume to continue it, or --out OTHER_DIR"),
    (os.remove, dict(resume=False), "holds a run"),  # but for its checkpoint
    (None, dict(steps=3), "12 steps are done, over --steps 3"),
    (cut(grpo.CHECKPOINT, 99_999), {}, "state.safetensors: "),
    (exchange, {}, "state.safetensors: .* tensor"),
    (cut("prompts.jsonl", 50), {}, "prompts.jsonl is shorter"),
]


@pytest.mark.parametrize(("harm", "changes", "message"), HARM)
def test_resume_refuses_and_leaves_as_it_is(whole, tmp_path, harm, changes, message):
    copy = Path(shutil.copytree(whole[0], tmp_path / "copy"))
    if harm:
        harm(copy / grpo.CHECKPOINT if harm == os.remove else copy)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=message):
        run(copy, **WHOLE | dict(resume=True) | changes)
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


def test_load_checkpoint_refuses_other_settings(whole):
    """All but those that change nothing in what is trained."""
    config = grpo.resolve(settings(whole[0], resume=True, **WHOLE))
    may_change = {"steps", "eval_every", "save_every", "micro_batch", "device", "out", "resume"}
    may_change |= {"measure_every", "curvature"}
    for field in fields(Config):
        if field.name not in may_change:
            with pytest.raises(InputError, match=f"other settings.*'{field.name}': .*, 'other'"):
                grpo.load_checkpoint(
                    SimpleNamespace(config=replace(config, **{field.name: "other"}))
                )


# ------------------------------------------- processes --------------------------------------------

# A fork has all imports; but not of a process that has a GPU, nor on macOS.
FORK = sys.platform == "linux" and not torch.cuda.is_available()
CONTEXT = get_context("fork" if FORK else "spawn")


def process(config, rank, size, port, death, small):
    """One of those that torchrun starts and join_processes joins; the last may die, at a call of
    its reward."""
    torch.set_num_threads(1)  # a fork has none of OpenMP's threads, and would wait for them
    where = dict(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(size), **where)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    grpo.SMALL = small
    grpo.REWARDS["exact_match"] = parity
    if rank == size - 1:
        grpo.REWARDS["exact_match"] = at_call(death, lambda: os.kill(os.getpid(), signal.SIGKILL))
    sys.exit(command(config))


def start(config, size=1, death=-1, small=grpo.SMALL):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    each = [(config, rank, size, port, death, small) for rank in range(size)]
    processes = [CONTEXT.Process(target=process, args=arguments) for arguments in each]
    for one in processes:
        one.start()
    return processes


def statuses(processes):
    for each in processes:
        each.join(120)
        each.kill()
    return [each.exitcode for each in processes]


def assert_like(out, other):
    """The same tokens at every step, so the same logs but for rounding, and the same weights."""
    assert read(out, "samples.jsonl") == read(other, "samples.jsonl")
    for name in grpo.LOGS[:2]:
        ours, theirs = (read(path, name) for path in (out, other))
        for line, expected in zip(ours, theirs, strict=True):
            assert line.keys() == expected.keys()
            for key in line.keys() - {"level", "logprob_gap", "curvature", "curvature_error"}:
                a, b = (np.array(x[key], float) for x in (line, expected))
                np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4, err_msg=key)
    ours, theirs = (load_file(path / grpo.CHECKPOINT) for path in (out, other))
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in theirs) < 1e-5


SHARED_OUT = dict(steps=3, prompts=4, optimizer="sgd", lr=0.1, measure_every=2, save_every=1)


@slow
def test_train_with_processes_of_which_one_dies_resumes_with_another_number(tmp_path, monkeypatch):
    """Gradients are sketched, with one set of signs. Of 2 the last dies in step 1, after 2 * 4
    rewards of the evaluation and 10 of a step; the other ends."""
    changes = BRIEF | SHARED_OUT | dict(norm="batch", agg="token", eval_problems=8)
    config = settings(tmp_path / "run", **changes)
    monkeypatch.setattr(grpo, "SMALL", 1000)
    processes = start(config, 2, death=8 + 10 + 5, small=1000)
    run(tmp_path / "whole", **changes)  # meanwhile
    assert statuses(processes) == [1, -signal.SIGKILL]
    assert len(read(tmp_path / "run")) == 1
    run(tmp_path / "run", **changes | dict(resume=True))
    assert_like(tmp_path / "run", tmp_path / "whole")
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(InputError, match="4 prompts a step are too few for 5 processes"):
        run(tmp_path / "other", **changes)


def test_share_gather_and_everyone_by_hand(tmp_path, monkeypatch):
    """Of three processes, each of which has the same; a lost one is one line."""
    rank = [0]

    def all_gather_object(lists, value):
        lists[:] = [value] * 3

    pretended = dict(
        is_initialized=lambda: True, get_rank=lambda: rank[0], get_world_size=lambda: 3
    )
    pretended["all_gather_object"] = all_gather_object
    monkeypatch.setattr(grpo, "dist", SimpleNamespace(**pretended))
    shares = []
    for rank[0] in range(3):
        shares.append([*grpo.share(8)])
        assert grpo.is_first() == (rank[0] == 0)
    assert shares == [[0, 1], [2, 3, 4], [5, 6, 7]]
    assert grpo.gather([1, 2]) == [1, 2, 1, 2, 1, 2]
    shared = grpo.everyone(tensor([[1.0], [2.0]]))
    assert shared.tolist() == [[1], [2]] * 3 and shared.dtype == torch.float64
    grpo.append(SimpleNamespace(config=Config(out=str(tmp_path))), "log", [{}])
    assert not (tmp_path / "log").exists()  # by the first process alone

    def fail(*_, **__):
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(RunError, match="another process has stopped: Connection closed by peer"):
        grpo.collective(fail)
    monkeypatch.setattr(grpo, "train", fail)
    with pytest.raises(RuntimeError, match="^Connection closed by peer$"):  # with its traceback
        command([])


# --------------------------------------- grader and data ------------------------------------------

GRADES = r"""
18 ✓ so\n#### 18 ¦ #### 18. ¦ #### 18.0 ¦ #### 018 ¦ ####18 ¦ #### 18 dollars ¦ #### **18** km
18 ✓ #### The answer is 18 ¦ #### 10 + 8 = 18 ¦ I think 12, no, 18. ‖ 17 ✗ \boxed{17} \boxed{18
18 ✗ #### 17 or 18 ¦ #### ¦ nothing ¦  ¦ 180 ¦ \boxed{18 ¦ #### x = 16 or x = 18 ¦ \boxed{18, 3}
12 ✗ I think 12, no, 18. ¦ #### 1,2 ‖ 7 ✓ #### +7 ¦ so \fbox{7} of 8 ✗ #### -7 ‖ 0 ✗ \boxed{}
-7 ✓ #### -7 ¦ #### −7 ¦ #### - 7 ¦ #### -$7 ¦ #### $-7 ‖ 1200 ✓ #### $1,200 ¦ It costs $1,200.
200 ✗ #### $1,200 ‖ 1200.5 ✓ #### 1,200.50 ‖ 1,200 ✓ #### 1200 ✗ #### 1 ‖ -3 ✓ it is -3
1234.5 ✓ \boxed{\$1,234.50} ‖ 7.5 ✓ \boxed{\$7.50} ‖ 10000 ✓ \boxed{10,\!000} ‖ 3.5 ✓ \boxed 3.5.
3 ✓ pages 1-3 ¦ #### 4 or \boxed{3} ✗ \boxed 3.5 ¦ #### 10-3 ¦ #### 3/0 ¦ #### 3\nno:\n#### 4
4 ✓ #### 3\nno:\n#### 4 ¦ \boxed{3} #### 4 ‖ 9 ✗ 12 #### 4 and then 9 ‖ 8 ✗ #### 7 apples
5 ✓ 3 - 5 ¦ ```\n5\n```\n ¦ $5$\n\n ¦ #### x = 5 ¦ \boxed{5\text{ cm}} ¦ \boxed 5 ¦ #### 5 times
5 ✓ #### €5 ¦ #### 5 a day ¦ #### 5 km/hour ¦ \boxed{\sqrt{25}} ¦ #### \left(5\right) ¦ #### \(5\)
5 ✗ #### 5x ¦ it is 5² ¦ #### 2 \cdot 2.5 ¦ \boxed{\gcd(10,25)} ¦ \boxed{5!} ¦ #### 5 xy
-5 ✓ it is −5 ¦ −$5.\n ✗ 3 - 5 ‖ 3/4 ✓ so 3/4 ¦ 0.75\n ✗ 4 ‖ 4 ✗ it is 3/4 ‖ 3 ✗ 3/4 ¦ 1.5e3
1500 ✓ it is 1.5e3.\n ¦ #### 1.5e3 ¦ #### 15E+2 ¦ \boxed{1.5 \times 10^3} ✗ 1.5e2 ‖ 10 ✗ 1e100
1/2 ✓ #### .5 ‖ 0.75 ✓ #### 3/4 ‖ 0.5 ✓ \boxed{\frac{1}{2}} ‖ \frac{1}{2} ✓ \boxed{\dfrac12}
9/5 ✓ \boxed{1\frac{4}{5}} ‖ 10^{-7} ✓ #### 1e-7 ¦ \boxed{10^{-7}} ✗ 0.0 ‖ 0.333333 ✗ #### 1/3
2 ✗ \boxed{2\pi} ¦ #### 2 pi ¦ \boxed{2  pi} ¦ \boxed{2 x} ¦ \boxed{\sqrt{2}} ¦ \boxed{17 \mod 5}
50 ✓ #### 50% ¦ #### 50\% ‖ 53 ✗ \boxed{5(3)} ‖ 72 ✗ #### 48+48/2 ‖ 1024 ✗ \boxed{2^{10}}
1/3 ✗ \boxed{\int_0^1 x^2 dx} ‖ 4368 ✗ \boxed{\binom{16}{5}} ‖ 3 ✗ #### 3 and a half
x-y=0 ✓ \boxed{x-y=0} ✗ #### 0 ‖ 100 ✗ #### 100, 100 ‖ 20000 ✓ \boxed{20{,}000}
5 m ✓ #### 5 m ¦ #### 5 ¦ \boxed{5\text{ m}} ✗ #### 5 km ¦ #### 5 m^2 ‖ \$5 ✓ \boxed{\$5} ✗ #### 5€
5 dollars ✓ #### \$5 ¦ #### 5 dollar ✗ #### 5 cents ‖ 4 \mbox{ inches}^2 ✓ #### 4 inch²
15 ✓ \boxed{15 \text{ cm}^{3}} ‖ \text{e} ✗ \boxed{\text{e}^2} ‖ 90 ✓ \boxed{90^\circ}
\frac{2^{10}}{3^5} ✓ \boxed{\frac{2^{10}}{3^5}} ¦ #### 1024/243 ‖ 8/9 ✗ \boxed{\frac{2^{3}}{3^2}}
2\sqrt{2} ✓ \boxed{\sqrt{8}} ‖ \frac{\sqrt{3}}{3} ✓ \boxed{\frac{1}{\sqrt{3}}} ‖ 1+x ✓ \boxed{x+1}
2\pi ✓ \boxed{2 \cdot \pi} ¦ \boxed{2π} ✗ #### 6.283185 ¦ \boxed{\pi+\pi} ‖ 3x ✗ \boxed{x+2x}
x^2+3x+2 ✓ \boxed{2 + 3 \cdot x + x^{2}} ✗ \boxed{(x+1)(x+2)} ‖ 3 ✗ #### 3\sqrt{13}.
(a+5)(b+2) ✓ \boxed{(b+2)(a+5)} ✗ \boxed{ab+2a+5b+10} ‖ 52_8 ✓ \boxed{52_{8}} ✗ \boxed{52_9}
42 ✓ \boxed{42} \ ‖ 4 ✗ it is 1.5e3 ‖ 864 \mbox{ inches}^2 ✓ \boxed{864}
2k+2 ✓ \boxed{f(k) = 2k+2} ✗ \boxed{2(k+1)} ‖ 1 \pm \sqrt{2} ✓ \boxed{1+\sqrt{2}, 1-\sqrt{2}}
\left( 3, \frac{\pi}{2} \right) ✓ \boxed{(3,\frac{\pi}{2})} ‖ [-2,7] ✓ \boxed{x \in [-2,7]}
(3,100) ✓ \boxed{(3, 100)} ✗ \boxed{3100} ‖ [0,100) ✗ \boxed{100} ‖ (-2,7) ✗ \boxed{(7,-2)}
\text{Evelyn} ✓ \boxed{\text{Evelyn}} ¦ \boxed{Evelyn} ✗ \boxed{Bob}
"""


@pytest.mark.parametrize("line", GRADES.strip().splitlines())
def test_grade(line):
    """A gold answer, and completions that have it, or do not; also in a thread, without signals to
    stop a parser."""
    with ThreadPoolExecutor(1) as pool:
        for row in line.replace("\\n", "\n").split(" ‖ "):
            answer, *parts = re.split(" ([✓✗]) ", row)
            for mark, completions in zip(parts[::2], parts[1::2]):
                for completion in completions.split(" ¦ "):
                    there = pool.submit(grpo.grade, completion, answer).result()
                    assert grpo.grade(completion, answer) == there == (mark == "✓"), completion


# fmt: off
REPEATED = dict(deadline=None, database=None, derandomize=True)  # the same examples at every run
FORMS = [
    "{}", "{} km", "{} apples", "{} km/hour", "{} square feet.", "{}%", "{}\\%", "${}", "\\${}",
    "€{}", "{} €",
]
MARKS = [  # without a mark, "1-3" ends in 3
    "{}", "I think 12, no, {}",
    "#### {}", "so 12:\n#### {}", "#### **{}**", "#### ${}$", "\\boxed{{{}}}",
]
AROUND = [
    "{}", "{}\n", "{}\n\n", " {} ", "{}.", "{}.\n", "**{}**", "**{}.**\n", "${}$", "${}$.", "`{}`",
    "x = {} \n", "```\n{}\n```", "```text\n{}\n```\n", "\n\n{}",
]
SPOILED = [  # what is made from a number n, and is not n whatever it works out to
    "{n}-{k}", "{n}–{k}", "{n}...{k}", "{n} to {k}", "{n} \\ldots {k}", "{n}→{k}", "{n} -> {k}",
    "{n} \\to {k}", "{n}**{k}", "{n}^{k}", "{n}^{{{k}}}", "{n}*{k}", "{n} \\times {k}", "{n}({k})",
    "{k}\\cdot {n}", "{n} times four", "{n}+{k}", "{k} + {n}", "{n} \\pm {k}", "{n}-0", "{n} - {k}",
    "{n} minus {k}", "{n} \\cup {k}", "{k} ∪ {n}", "{n}_{k}", "{n}_{{{k}}}", "{n}₂", "{n}, {k}",
    "{n} or {k}", "{k} and {n}", "{n}\\\\{k}", "x = {k}, x = {n}", "{n} \\text{{ or }} {k}", "{n}²",
    "{n}^a", "{n} squared", "{n}/7", "\\frac{{{n}}}{{7}}", "7/{n}", "{n} over six", "{n} \\div 7",
]
# fmt: on


@pytest.mark.parametrize("examples", [50, pytest.param(20_000, marks=slow)])
def test_grade_of_a_number_in_every_form_is_1_and_of_what_is_made_from_it_0(examples):
    """Made from it: its neighbour, by one in the last digit; another unit; what is to work out."""

    def check(value, k, decimals, sign, thousands, form, spoiled, mark, around, inner):
        def text(number):
            shown = f"{number / 10**decimals:{',' if thousands else ''}.{decimals}f}"
            return form.format(sign + shown) if inner else sign + form.format(shown)

        gold = f"{sign.strip('+').replace('−', '-')}{value / 10**decimals:.{decimals}f}"
        for number, grade in ((value, 1.0), (value + 1, 0.0)):
            completion = around.format(mark.format(text(number)))
            assert grpo.grade(completion, gold) == grade, (completion, gold)
        assert grpo.grade(f"\\boxed{{{gold} cubits}}", gold + " feet") == 0
        if mark not in MARKS[:2]:
            completion = around.format(mark.format(form.format(spoiled.format(n=gold, k=k))))
            assert grpo.grade(completion, gold) == 0, (completion, gold)

    parts = [st.integers(1, 10**6), st.integers(0, 3) | st.integers(0, 10**6), st.integers(0, 3)]
    choices = [["", "-", "−", "+"], [False, True], FORMS, SPOILED, MARKS, AROUND, [False, True]]
    parts += [st.sampled_from(choice) for choice in choices]
    hypothesis.settings(max_examples=examples, **REPEATED)(hypothesis.given(*parts)(check))()


STRANGE = ["é" * 301, "(" * 20 + "x", "[a" * 20 + "]" * 20, "{" * 30 + "}" * 30, "9" * 301]
HOSTILE = [
    *STRANGE, "9^{9^{9^9}}", "(9^{99})^{(9^{99})}", "((9^{999})^{999})^{999}", "10000!!", "(" * 200,
    "{" * 200, "x" * 250, "9" * 10**6, "\\boxed{" * 10**4, "####" * 10**4, "1," * 10**6, "٣", "\0",
    "a" * 10**5, "-" * 10**5, " " * 10**5, "\\text{" * 10**5, "^" * 10**5, "$" * 999,
    "(" * 10**5 + "," * 10**5, "\\sqrt{" * 60 + "2" + "}" * 60, "\\frac{1}{0}",
    pytest.param("\\sum_{n=1}^{9999} \\frac{1}{n^9}", marks=slow),
    pytest.param("\\binom{999999999}{499999999}", marks=slow),
    pytest.param("\\int_0^1 x^{x^x}", marks=slow),
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_grade_of_hostile_completions_is_0_in_bounded_time(text, monkeypatch):
    """As completions, and as a gold answer, which is never boxed. The parser needs a second and a
    hundred megabytes for what no answer is like, and keeps some of them: it never sees that."""
    if text in STRANGE:
        monkeypatch.delattr("math_verify.parse")
    boxed = f"\\boxed{{{text}}}"
    pairs = (text, "\\frac{3}{4}"), (boxed, "\\frac{3}{4}"), (boxed, "x"), ("3", text)
    for completion, answer in pairs:
        began = time.process_time()
        assert grpo.grade(completion, answer) == 0
        assert time.process_time() - began < 3


LINES = [  # a line of a file, what is loaded from it or said of it
    ('{"question": "q", "answer": "2+2=<<2+2=4>>4\\n#### 4"}', ("q", "4", None)),
    ('{"problem": "q", "solution": "so \\\\boxed{\\\\frac{1}{2}}."}', ("q", "\\frac{1}{2}", None)),
    ('{"prompt": "q", "solution": "\\\\boxed{1}", "final_answer": 7}', ("q", "7", None)),
    ('{"question": "é", "answer": 12345678901234567890}', ("é", "12345678901234567890", None)),
    ('{"question": "q", "answer": 0.10, "level": 5}', ("q", "0.10", 5)),
    ('{"question": "q", "answer": 1e3, "level": 0.50}', ("q", "1e3", "0.50")),
    ('{"question": "q", "answer": "2020-01-01", "level": [1, {"a": null}]}',
     ("q", "2020-01-01", [1, {"a": None}])),
    ('{"text": "q", "answer": "1"}', "cannot load .*no row with one each of .*text"),
    ('{"question": "q"}', "cannot load .*no row"),
    ('{"question": "q", "answer": ""}', "line 2: no answer"),
    ('{"question": "q", "answer": "\\\\frac{1}{2"}', "line 2: no completion could equal"),
    ('{"question": "q", "answer": "#### "}', "line 2: no completion could equal"),
    ('{"question": "q", "answer": "5!"}', "line 2: no completion could equal the answer '5!'"),
    ('{"question": "q", "answer": true}', "line 2: no completion could equal"),
    ('{"question": "q", "solution": "so 4"}', "line 2: no solution .*boxed"),
    ('{"question": " ", "answer": "1"}', "line 2: no question"),
    ('{"question": "q", "answer": "1"}\r\n\n{"question": "q"}', "line 4: no answer"),
    ("{", "line 2: Expecting property name enclosed in double quotes: column 2"),
    ("[1]", "line 2: not an object"),
    ('{"question": "\\ud800"}', "line 2: .*surrogates not allowed"),
    ("[" * 100_000, "line 2: .*recursion"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), LINES)
def test_load_rows_of_a_file_takes_lines_as_written_or_names_them(text, expected, tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("\n\ufeff" + text)
    if isinstance(expected, tuple):
        assert grpo.load_rows(str(path), True) == [expected]
        return
    with pytest.raises(InputError, match=expected) as refused:
        grpo.load_rows(str(path), True)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_load_rows_of_a_data_set_with_or_without_a_configuration_and_of_a_list(tmp_path):
    for split, answer in (("train", 1), ("test", 2)):
        row = {"question": "q", "answer": answer, "level": datetime.date(2020, 1, 2)}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row, default=str))
    expected = [("q", "2", "2020-01-02")]
    assert grpo.load_rows(f"{tmp_path}:test", True)[0][:2] == expected[0][:2]
    assert grpo.load_rows(f"{tmp_path}:default:test", True)[0][:2] == expected[0][:2]
    assert grpo.load_rows("list", True, [row]) == expected
    with pytest.raises(InputError, match="^list, row 1: not an object with named columns"):
        grpo.load_rows("list", True, ["q"])


FILES = dict(gsm8k_test="gsm8k", svamp="gsm8k", math500="math")


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the public data files are not in {DATA}")
@pytest.mark.parametrize(("file", "task"), FILES.items())
def test_load_problems_of_real_files_and_grade_of_their_solutions(file, task):
    path = f"{DATA}/{file}.jsonl"
    config = Config(task=task, data=path, eval_problems=100)
    train, test = grpo.load_problems(config, None, grpo.grade)
    raw = pd.read_json(path, lines=True, dtype=False).rename(columns={"problem": "question"})
    golds = [answer.split("####")[-1].strip() for answer in raw.answer]
    levels = raw.get("level", [None] * len(raw))
    assert sorted(train + test) == sorted(zip(raw.question, golds, levels, strict=True))
    for solution, gold in zip(raw.answer, golds):
        assert grpo.grade(solution if "####" in solution else f"\\boxed{{{solution}}}.", gold) == 1


# What answers are made of, what breaks parsers, and what takes for ever if one lets it.
PIECES = st.sampled_from([
    "\\boxed{", "####", "\\frac", "\\sqrt[", "^{", "9" * 10**6, "1e999999", "\\left(", "\\\\",
    "\\int", "\\begin{pmatrix}", "1,200", "\\text{", "^" * 50, "(" * 300, "é" * 10**6, "9!!!!!!!!",
    "2^{3^{4^{5^6}}}", *"{}!٣½\0\ud800&=$,.-/07x \n%",
])  # fmt: skip
PARTS = st.one_of(st.lists(PIECES, max_size=12), st.text(max_size=60))  # to be joined


@pytest.mark.parametrize("examples", [50, pytest.param(5_000, marks=slow)])
def test_grade_and_load_rows_bear_anything(examples, tmp_path):
    """In bounded time and memory; a file that cannot be used is refused in one line."""
    values = st.one_of(PARTS, st.none(), st.integers(-(2**62), 2**62), st.floats())
    names = st.sampled_from(["question", "problem", "answer", "solution", "x"])
    rows = st.lists(st.dictionaries(names, values) | st.binary(max_size=40), max_size=2)
    path = tmp_path / "problems.jsonl"

    def text(value):  # joined here, for Hypothesis keeps what it makes: that would be gigabytes
        return "".join(value) if isinstance(value, list) else value

    def line(row):
        if isinstance(row, bytes):
            return row
        return json.dumps({name: text(value) for name, value in row.items()}).encode()

    def check(pair, rows):
        began = time.process_time()
        assert grpo.grade(*map(text, pair)) in (0.0, 1.0) and time.process_time() - began < 3
        path.write_bytes(b"\n".join(map(line, rows)))
        try:
            for question, answer, _ in grpo.load_rows(str(path), True):
                assert question.strip() and 0 < len(answer) <= grpo.MAX_SPAN
        except InputError as error:
            assert "\n" not in str(error) and str(path) in str(error)

    given = hypothesis.given(st.tuples(PARTS, PARTS), rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    hypothesis.settings(max_examples=examples, **REPEATED)(given(check))()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KB


@pytest.mark.parametrize("name", ["letters", "arith"])
def test_load_rows_of_embedded_problems_are_right_and_the_held_out_ones_unseen(name):
    task = grpo.TASKS[name]
    train, test = (grpo.load_rows(path, False) for path in (task.train, task.test))
    assert len(test) == 512 and len({question for question, *_ in train + test}) > 5000
    assert not {question for question, *_ in train} & {question for question, *_ in test}
    shifts = set()
    for question, answer, level in train + test:
        a, b = question.removesuffix("=").split("+")
        if name == "letters":  # each digit plus the letter's own one
            assert level == a
            shifts |= {(a, (int(x) - int(y)) % 10) for x, y in zip(answer, b, strict=True)}
        else:
            assert answer == f"{int(a) + int(b):04}"[::-1]
            assert level == sum(int(a) % n + int(b) % n >= n for n in (10, 100, 1000))  # carries
    assert len(shifts) == len(dict(shifts)) == (6 if name == "letters" else 0)


def test_load_problems_holds_out_what_is_not_trained_on(tmp_path):
    """Of a file of one's own a third of the questions at most, always the same; else of another
    file the first."""
    rows = [{"question": f"q{i % 10}", "answer": str(i), "level": i % 3} for i in range(20)]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = sorted((f"q{i % 10}", str(i), i % 3) for i in range(20))
    own = Config(task="math", data=str(path))
    for config, dataset in ((own, None), (Config(task="letters"), Dataset.from_list(rows))):
        train, test = grpo.load_problems(config, dataset, parity)
        assert len(test) == 6 and sorted(train + test) == expected != train + test
        assert not {question for question, *_ in train} & {question for question, *_ in test}
        assert grpo.load_problems(replace(config, eval_problems=3), dataset, None)[1] == test[:3]
    letters = grpo.load_rows(LETTERS.test, False)
    other = grpo.load_problems(replace(own, eval_data=LETTERS.test, eval_problems=2), None, None)
    assert (sorted(other[0]), other[1]) == (expected, letters[:2])
    train, test = grpo.load_problems(Config(task="letters", eval_problems=5), None, None)
    assert (len(train), test) == (5488, letters[:5])
    with pytest.raises(InputError, match="2 problems are too few to hold any out"):
        grpo.load_problems(own, Dataset.from_list(rows[:2]), None)
    with pytest.raises(InputError, match="cannot load dataset: no row"):
        grpo.load_problems(own, Dataset.from_list([]), parity)


BEGINS = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TEMPLATES = [  # a template, and the text whose characters are the prompt's tokens; b is <bos>
    (BEGINS + "{% if add_generation_prompt %}<a>{% endif %}", "b<user>say: e+7=!<a>"),
    ("{% for m in messages %}{{ m.content }}{% endfor %}?", "say: e+7=!?"),  # without a beginning
    (None, "bsay: e+7=!"),
]


@pytest.mark.parametrize(("template", "expected"), TEMPLATES)
def test_encode_problems_follows_the_chat_template_token_by_token(template, expected):
    """The beginning of a text is marked once: by the template, or else by the tokenizer; an end
    that the tokenizer marks is dropped."""
    tokenizer = AutoTokenizer.from_pretrained(LETTERS.model)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    special = [("<bos>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)]
    single = TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = single
    tokenizer.chat_template = template
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=len(expected) + 6))
    policy = SimpleNamespace(tokenizer=tokenizer, model=model, eos_ids=[tokenizer.eos_token_id])
    config = Config(instruction="say: {question}!", max_new_tokens=6)
    (problem,) = grpo.encode_problems([("e+7=", "1", "e")], policy, config)
    characters = ["<bos>" if x == "b" else x for x in expected]
    tokens = tokenizer.convert_tokens_to_ids(characters)
    assert problem == ("e+7=", "1", "e", tokens)
    (plain,) = grpo.encode_problems([("e+7=", "1", "e")], policy, replace(config, chat=False))
    assert plain.prompt == tokenizer.convert_tokens_to_ids(["<bos>", *"say: e+7=!"])
    with pytest.raises(InputError, match=f"context of {len(expected) + 6}: lower --max-new-tokens"):
        grpo.encode_problems([("e+7=", "1", "e")], policy, replace(config, max_new_tokens=7))
    tokenizer.chat_template = "{{ raise_exception('no way') }}"
    with pytest.raises(InputError, match=r"the chat template fails \(no way\): pass --chat false"):
        grpo.encode_problems([("e+7=", "1", "e")], policy, config)


# ---------------------------------------- the command line ----------------------------------------


def command(arguments):
    """Exit status of the command line, of these arguments or settings."""
    if isinstance(arguments, Config):
        given = {key: value for key, value in asdict(arguments).items() if value is not None}
        arguments = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "signal", lambda *_: None)  # the test run keeps its own handlers
        try:
            return grpo.main(arguments)
        except SystemExit as end:
            return end.code


BAD = [
    ("--nrom std", "unrecognized arguments: --nrom std"),
    ("--norm sd", "invalid choice: 'sd'"),
    ("--group 1", "group is 1, not a finite number from 2 on"),
    ("--lora 4.5", "invalid int value: '4.5'"),
    ("--lr inf", "lr is inf"),
    ("--optimizer sgd", "sgd has no default rate: add --lr, from 0.01 to 0.5 on letters"),
    ("--data nowhere.jsonl", "cannot load nowhere.jsonl"),
    ("--eval-data nowhere.jsonl", "cannot load nowhere.jsonl"),
    ("--data /dev/null", "cannot load /dev/null"),
    ("--instruction hi", "must contain {question}"),
    ("--model no/where", "--model DIR --data FILE.jsonl"),
    ("--resume", "state.safetensors"),
    ("--task gsm8k", "cannot load openai/gsm8k"),
    ("--max-new-tokens 500", "the context of 128"),
    ("--out /dev/null/run", "/dev/null/run"),
    ("--device tpu9", "device tpu9 cannot be used"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_main_says_in_one_line_what_is_wrong(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)  # without a network, at once
    few = LETTERS._replace(train=LETTERS.test)  # problems: so that the others take no time
    monkeypatch.setitem(grpo.TASKS, "letters", few)
    assert command(arguments.split()) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("grpo.py: error: ") and message in error
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


TITLES = ["Task and model", "Algorithm", "Optimizer", "Measuring", "Run"]


def test_main_helps_with_every_setting_and_its_default(capsys):
    assert command(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    source = inspect.getsource(Config)
    for field in fields(Config):
        (comment,) = re.findall(rf"^ +{field.name}: [^#]*?# (.*)$", source, re.M)
        assert f"--{field.name.replace('_', '-')}" in shown and comment in shown
    assert shown.count("(default: 16)") == 2 and "None" not in shown  # P and G
    assert "default: letters and arith 6, gsm8k 512, math 1024" in shown
    assert "default: letters 2e-4, arith 3e-4, else 1e-6; with --lora 10 times" in shown
    titles = [shown.index(f" {title}: --") for title in TITLES]
    assert titles == sorted(titles)  # and a setting stands under its title
    assert titles[1] < shown.index(" --norm {") < titles[2] < shown.index(" --lr LR ") < titles[3]


def test_main_passes_settings_on_and_notes_a_signal(monkeypatch, capfd):
    """The first is left to the step; a second one ends the process."""
    trained = []

    def train(config, stop):
        trained.append(config)
        if config.steps == 7:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
            raise OSError("no space\nleft")

    monkeypatch.setattr(grpo, "train", train)
    assert command(["--norm=var", "--chat", "false", "--curvature", "--lr=1e-3"]) == 0
    assert command(["--curvature", "false"]) == 0
    assert trained[0] == Config(norm="var", chat=False, curvature=True, lr=1e-3)
    assert trained[1] == Config(curvature=False)
    former = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert grpo.main(["--steps=7"]) == 1
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), former):
        signal.signal(number, handler)
    error = capfd.readouterr().err
    assert "stopping after this step" in error
    assert error.endswith("grpo.py: stopped: no space left\n")


def test_resolve_fills_in_what_the_task_brings():
    """A model or data of one's own is mathematics. What is filled in stays so."""
    rates = {task: grpo.resolve(Config(task=task)).lr for task in grpo.TASKS}
    assert rates == {"letters": 2e-4, "arith": 3e-4, "gsm8k": 1e-6, "math": 1e-6}
    assert grpo.resolve(Config(task="gsm8k", lora=64)).lr == pytest.approx(1e-5)
    assert grpo.resolve(Config(lr=0.5, lora=1)).lr == 0.5
    own = Config(), Config(model="DIR"), Config(data="FILE"), Config(task="letters", model="DIR")
    own = [grpo.resolve(config) for config in own]
    assert [config.task for config in own] == ["letters", "math", "math", "letters"]
    assert [config.out for config in own[:2]] == ["runs/letters-std-0", "runs/DIR-math-std-0"]
    assert (own[1].max_new_tokens, own[1].instruction) == (1024, grpo.BOXED)
    assert (own[0].device, own[0].dtype) == ("cpu", "float32") or torch.cuda.is_available()
    assert all(grpo.resolve(config) == config for config in own)
    rewards = [grpo.REWARDS[grpo.TASKS[config.task].reward]("so 5.0\n", "5") for config in own]
    assert rewards == [0.0, 1.0, 1.0, 0.0]
    assert [grpo.exact_match(text, "5") for text in ("5", "4", "6", "5 ")] == [1, 0, 0, 0]


def test_config_has_the_conventional_values():
    config = Config()
    assert (config.clip, config.kl, config.epochs, config.temperature) == (0.2, 0.0, 1, 1.0)
    assert (config.prompts, config.group, config.steps, config.measure_every) == (16, 16, 250, 10)


def test_resolve_of_a_changed_config_is_what_the_command_line_gives(monkeypatch):
    """Also of one that was trained with, which stays as it was (test_train_is_the_naive_run)."""
    config = Config()
    commanded = []
    monkeypatch.setattr(grpo, "train", lambda config, stop: commanded.append(grpo.resolve(config)))
    changes = dict(norm="none", task="gsm8k", seed=3, kl=0.5, model="DIR", lora=8)
    for name, value in changes.items():
        assert command([f"--{name}={value}"]) == 0
        assert grpo.resolve(replace(config, **{name: value})) == commanded[-1]


def test_resolve_gives_each_process_the_gpu_of_its_number(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "empty", lambda *_, device, **__: asked.append(device))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert grpo.resolve(Config()).device == grpo.resolve(Config(device="cuda")).device == "cuda:3"
    assert grpo.resolve(Config(device="cpu")).device == "cpu" and asked == ["cuda:3"] * 2 + ["cpu"]


def test_resolve_refuses_what_is_out_of_range():
    least = dict(prompts=1, epochs=1, save_every=1, eval_problems=1, max_new_tokens=1, steps=0)
    least |= dict(micro_batch=1, group=2, lora=0, eval_every=0, measure_every=0, clip=0.0, kl=0.0)
    grpo.resolve(Config(device="cpu", **least))
    for name, value in least.items():
        with pytest.raises(InputError, match=f"{name} is {value - 1}, not a finite number from "):
            grpo.resolve(Config(**{name: value - 1}))
    for name in ("norm", "agg", "optimizer", "task", "dtype"):
        with pytest.raises(InputError, match=f"{name} is 'mad', not one of "):
            grpo.resolve(Config(**{name: "mad"}))
