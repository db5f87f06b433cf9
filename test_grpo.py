"""Tests of grpo.py and analyze.py. `pytest` runs the quick ones, `GRPO_SLOW=1 pytest` all of them.

Every expected value is worked out by hand, by another library, or by the naive computation that the code avoids.
"""

import inspect
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager
from dataclasses import fields, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import hypothesis
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy import optimize
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
)

import analyze
import grpo
from grpo import Batch, Config, InputError, Policy, RunError

torch.set_num_threads(1)  # for tensors as small as here a second thread only costs
DATA = Path(__file__).resolve().parent.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the public data files are not in {DATA}")
slow = pytest.mark.skipif(not os.environ.get("GRPO_SLOW"), reason="slow: set GRPO_SLOW=1")

# ------------------------------------------------- models and batches -------------------------------------------------


def make_model(kind: str, vocabulary: int = 23, dtype: torch.dtype = torch.float32):
    """A random transformer: absolute positions (gpt2), or rotary ones with shared key-value heads (llama).

    Of the latter kind some scale their logits (granite, cohere), or cap them, and attend to a window (gemma2), or have
    experts (mixtral). opt keeps its body one level deeper.
    """
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=vocabulary,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            bos_token_id=0,
            eos_token_id=1,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        model = GPT2LMHeadModel(config)
    elif kind == "opt":
        model = AutoModelForCausalLM.from_config(OPTConfig(
            vocab_size=vocabulary, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0, bos_token_id=0, eos_token_id=1))
    else:
        configs = {"llama": LlamaConfig, "granite": GraniteConfig, "cohere": CohereConfig, "gemma2": Gemma2Config,
                   "mixtral": MixtralConfig}
        special = {
            "mixtral": dict(num_local_experts=4),
            "granite": dict(logits_scaling=3.0, attention_multiplier=0.2),
            "cohere": dict(logit_scale=0.3),
            "gemma2": dict(final_logit_softcapping=2.0, head_dim=8, query_pre_attn_scalar=8, sliding_window=4),
        }
        config = configs[kind](
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=0,
            **special.get(kind, {}),
        )
        model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # far from uniform: distributions with a shape, and a visible position
        parameter.data.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return model.to(dtype).eval()


def make_policy(model, eos_ids=(1,)) -> Policy:
    masters = dict(model.named_parameters())
    if model.dtype == torch.bfloat16:
        masters = {name: p.detach().float() for name, p in masters.items()}
    for master in masters.values():
        master.grad = torch.zeros_like(master)
    return Policy(model, grpo.tiny_model()[1], list(eos_ids), masters)


PROMPTS = [[5, 6, 7, 8, 9], [3, 4], [11, 12, 13], [17]]


def uniforms(P: int, G: int, T: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(P, G, T, generator=torch.Generator().manual_seed(seed))


def make_batch(policy: Policy, G: int = 5, norm: str = "std", seed: int = 0) -> Batch:
    sampled = grpo.rollout(policy, PROMPTS, uniforms(len(PROMPTS), G, 9, seed), 1.0)
    rewards = (torch.rand(len(PROMPTS), G, generator=torch.Generator().manual_seed(seed)) < 0.5).double()
    rewards[1] = 1.0  # one group without variance
    return Batch(list(range(len(PROMPTS))), PROMPTS, sampled, rewards, grpo.group_advantages(rewards, norm))


def naive_logprobs(model, prompt: list[int], tokens: list[int], temperature: float = 1.0) -> torch.Tensor:
    """One full sequence, no cache, no batch, no padding: the log-probability of each completion token."""
    ids = torch.tensor([prompt + tokens])
    logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1)[range(len(tokens)), tokens]


def naive_loss(model, batch: Batch, agg: str, temperature: float = 1.0, old=None, clip=0.2, kl=0.0, reference=None):
    """The batch's loss written out, a completion at a time."""
    P, G = batch.rewards.shape
    total = int(batch.sampled.lengths.sum())
    loss = torch.zeros((), dtype=model.dtype)
    for p in range(P):
        for g in range(G):
            tokens = batch.sampled.tokens[p, g, : batch.sampled.lengths[p, g]].tolist()
            logprobs = naive_logprobs(model, batch.prompts[p], tokens, temperature)
            ratio = (logprobs - (logprobs.detach() if old is None else old[p, g])).exp()
            advantage = batch.advantages[p, g].to(model.dtype)
            terms = -torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
            if kl:
                d = naive_logprobs(reference, batch.prompts[p], tokens, temperature).detach() - logprobs
                terms = terms + kl * (d.exp() - d - 1)
            share = {"sequence": 1 / (P * G), "mean": 1 / (P * G * len(tokens)), "token": 1 / total}[agg]
            loss = loss + share * terms.sum()
    return loss


def flat_gradient(parameters) -> torch.Tensor:
    return torch.cat([p.grad.flatten().clone() for p in parameters])


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ---------------------------------------------------- mathematics -----------------------------------------------------

# Each function from its source alone, with only torch in sight: (name, arguments, value worked out by hand).
# fmt: off
BY_HAND = [
    ("group_advantages", ([[1.0, 0.0, 0.0, 1.0]], "none"), [[0.5, -0.5, -0.5, 0.5]]),
    ("group_advantages", ([[1.0, 0.0, 0.0, 0.0, 0.0]], "std", 0.0), [[2.0, -0.5, -0.5, -0.5, -0.5]]),
    ("group_advantages", ([[1.0, 0.0, 0.0, 0.0, 0.0]], "var", 0.0), [[5.0, -1.25, -1.25, -1.25, -1.25]]),
    # all rewards 1 0 1 1: mean 3/4, variance 3/16; group means 1/2 and 1
    ("group_advantages", ([[1.0, 0.0], [1.0, 1.0]], "batch", 0.0), [[2 / 3**0.5, -2 / 3**0.5], [0.0, 0.0]]),
    ("group_advantages", ([[1.0, 0.0, 0.0, 1.0]], "std", 0.5), [[0.5, -0.5, -0.5, 0.5]]),
    ("token_weights", ([[1, 3], [4, 2]], "sequence"), [[0.25, 0.25], [0.25, 0.25]]),
    ("token_weights", ([[1, 3], [4, 2]], "mean"), [[1 / 4, 1 / 12], [1 / 16, 1 / 8]]),
    ("token_weights", ([[1, 3], [4, 2]], "token"), [[0.1, 0.1], [0.1, 0.1]]),
    # ratios 2 (A=1: clipped to 1.2), 2 (A=-1: not), 1/2 (A=1: not), 1/2 (A=-1: clipped to 0.8); weights 1, 1, 2, 1
    ("policy_loss", ([math.log(2), math.log(2), -math.log(2), -math.log(2)], [0.0] * 4, [1.0, -1.0, 1.0, -1.0],
                     [1.0, 1.0, 2.0, 1.0], 0.2), -(1.2 - 2.0 + 2 * 0.5 - 0.8)),
    ("k3_divergence", ([0.0, math.log(2), -math.log(2)], [0.0] * 3), [0.0, 0.5 - 1 + math.log(2), 1 - math.log(2)]),
    # logits log(1, 3) and log(1, 1): probabilities 3/4 and 1/2; at temperature 1/2 9/10 and 1/2
    ("token_logprobs", ([[0.0, math.log(3)], [0.0, 0.0]], [1, 0], 1.0), [math.log(0.75), math.log(0.5)]),
    ("token_logprobs", ([[0.0, math.log(3)], [0.0, 0.0]], [1, 0], 0.5), [math.log(0.9), math.log(0.5)]),
    # probabilities 1/4, 3/4: 0.2 falls to the first, 0.3 to the second
    ("sample_tokens", ([[0.0, math.log(3)]] * 2, [0.2, 0.3], 1.0),
     ([0, 1], [math.log(0.25), math.log(0.75)], [math.log(4) - 0.75 * math.log(3)] * 2)),
    ("sample_tokens", ([[0.0, math.log(3)]], [0.0], 0.0), ([1], [math.log(0.75)], [math.log(4) - 0.75 * math.log(3)])),
]
# fmt: on


def alone(name: str):
    """The function made from its source alone, with nothing but torch in sight."""
    namespace = {"torch": torch}
    exec(inspect.getsource(getattr(grpo, name)), namespace)
    return namespace[name]


@pytest.mark.parametrize(("name", "arguments", "expected"), BY_HAND)
def test_each_function_alone_gives_the_value_worked_out_by_hand(name, arguments, expected):
    found = alone(name)(*[torch.tensor(a) if isinstance(a, list) else a for a in arguments])
    found, expected = (x if isinstance(found, tuple) else (x,) for x in (found, expected))
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, torch.tensor(wanted, dtype=value.dtype), rtol=1e-6, atol=1e-6)


MEASURES_BY_HAND = {  # the functions of the measurements, likewise alone: found and expected
    # halves' products 1.25 times the squared norms 4 and 9, the factor of a group of 3: all is signal
    "gradient_geometry": lambda f: (
        f(torch.diag(torch.tensor([4.0, 9.0])), torch.tensor([5.0, 11.25]), 3)["signal_share"], 1.0),
    "predicted_gain": lambda f: (f(torch.tensor([1.0, 1.0]), torch.tensor([0.5, 0.25])), 0.5 * (2 + 4) / 2),
    "rank_correlation": lambda f: (f(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([9.0, 5.0, 4.0])), -1.0),
    # neighbours never share a sum, so that the two numbers are found again but for their signs
    "count_sketch": lambda f: (
        f([torch.tensor([3.0, -4.0])], 64, 0).abs().sort().values[-3:].tolist(), [0.0, 3.0, 4.0]),
    # log pi = (t, -2t): mean of A * slope^2 for A = 1, 2
    "directional_curvature": lambda f: (
        f(lambda p: torch.tensor([1.0, -2.0]) * p["a"], {"a": torch.zeros(1)}, {"a": torch.ones(1)},
          torch.tensor([1.0, 2.0]), 1.0), (1 + 8) / 2),
}  # fmt: skip


@pytest.mark.parametrize("name", MEASURES_BY_HAND)
def test_each_measure_alone_gives_the_value_worked_out_by_hand(name):
    found, expected = MEASURES_BY_HAND[name](alone(name))
    assert found == pytest.approx(expected, rel=0.01 if name == "directional_curvature" else 1e-6)


def test_every_function_of_the_mathematics_is_tested_alone():
    section = re.split(r"^# -+ ", inspect.getsource(grpo), flags=re.M)[2]
    assert section.startswith("Mathematics")
    assert set(re.findall(r"^def (\w+)", section, re.M)) == {case[0] for case in BY_HAND} | set(MEASURES_BY_HAND)


@pytest.mark.parametrize("norm", ["none", "std", "var", "batch"])
def test_a_group_of_equal_rewards_has_advantage_exactly_zero(norm):
    rewards = torch.full((2, 12), 0.1)
    rewards[1, 0] = 0.9
    assert rewards[0].std(correction=0) != 0  # rounding: what a small epsilon would blow up
    advantages = grpo.group_advantages(rewards, norm)
    assert advantages[0].tolist() == [0.0] * 12 and advantages[1].abs().min() > 0


def test_advantages_refuse_an_unknown_norm_and_a_flat_tensor():
    with pytest.raises(ValueError, match="unknown norm 'mad'"):
        grpo.group_advantages(torch.rand(2, 3), "mad")
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        grpo.group_advantages(torch.rand(3), "std")
    with pytest.raises(ValueError, match="unknown agg 'max'"):
        grpo.token_weights(torch.ones(1, 1), "max")


def test_on_policy_gradient_is_reinforce():
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    grpo.policy_loss(
        logprobs, logprobs.detach(), torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 0.5, 0.1]), 0.2
    ).backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-0.5, 1.0, -0.3]))


def test_draws_at_the_ends_of_the_unit_interval_have_positive_probability():
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]]).repeat(2, 1)
    tokens, logprobs, entropy = grpo.sample_tokens(logits, torch.tensor([0.0, 1 - 2**-24]), 1.0)
    assert tokens.tolist() == [1, 2]
    torch.testing.assert_close(torch.stack([logprobs, entropy]), torch.tensor([[-math.log(2)] * 2, [math.log(2)] * 2]))


# ------------------------------------------------------ rollout -------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_greedy_rollout_equals_generate_on_a_left_padded_batch(kind):
    model = make_model(kind)
    ends = [1, 4, 9]  # several end tokens, so that rows end at different times
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = 0
    sampled = grpo.rollout(make_policy(model, ends), PROMPTS, uniforms(4, 1, 12), 0.0)
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, width:].tolist()
    lengths = sampled.lengths[:, 0].tolist()
    assert len(set(lengths)) > 1 and not all(sampled.truncated)
    for p, length in enumerate(lengths):
        assert sampled.tokens[p, 0, :length].tolist() == expected[p][:length]
        assert (expected[p][length - 1] in ends) == (not sampled.truncated[p, 0])
        assert not set(expected[p][length:]) - {0} and not set(expected[p][: length - 1]) & set(ends)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollout_logprobs_and_entropy_are_those_of_the_naive_pass(temperature):
    model = make_model("gpt2")
    sampled = grpo.rollout(make_policy(model), PROMPTS, uniforms(4, 6, 10), temperature)
    assert len(set(sampled.lengths.flatten().tolist())) > 2
    for p, prompt in enumerate(PROMPTS):
        for g in range(6):
            tokens = sampled.tokens[p, g, : sampled.lengths[p, g]].tolist()
            torch.testing.assert_close(
                sampled.logprobs[p, g, : len(tokens)],
                naive_logprobs(model, prompt, tokens, temperature),
                rtol=0,
                atol=1e-5,
            )
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
            entropy = torch.distributions.Categorical(logits=logits / temperature).entropy()
            torch.testing.assert_close(sampled.entropy[p, g, : len(tokens)], entropy, rtol=0, atol=1e-5)


@pytest.mark.parametrize("room", [1, 4, 64])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("fast", [False, True])
def test_rollout_logprobs_do_not_depend_on_the_cache_and_the_attention(kind, room, fast, monkeypatch):
    """Room for tokens that runs out at every step, some steps, or never, and the model's own attention or the CPU's."""
    monkeypatch.setattr(grpo.RoomyLayer, "ROOM", room)
    naive, model = make_model(kind), make_model(kind)
    sampled = grpo.rollout(make_policy(grpo.for_cpu(model) if fast else model), PROMPTS, uniforms(4, 6, 10), 1.0)
    assert model.config._attn_implementation == ("eager" if kind == "gemma2" else "grouped" if fast else "sdpa")
    for p, prompt in enumerate(PROMPTS):
        for g in range(6):
            tokens = sampled.tokens[p, g, : sampled.lengths[p, g]].tolist()
            expected = naive_logprobs(naive, prompt, tokens)
            torch.testing.assert_close(sampled.logprobs[p, g, : len(tokens)], expected, rtol=0, atol=1e-5)


def test_sampled_frequencies_match_the_models_probabilities():
    """Two-token completions over five tokens, 20,000 draws, chi-square; whatever the generation config says."""
    model = make_model("gpt2", vocabulary=5)
    model.generation_config.update(top_k=1, top_p=0.1, temperature=9.0, repetition_penalty=5.0, do_sample=False)
    temperature, draws = 1.3, 20_000
    sampled = grpo.rollout(make_policy(model, [4]), [[2, 3]], uniforms(1, draws, 2), temperature)
    first = torch.softmax(model(torch.tensor([[2, 3]])).logits[0, -1] / temperature, -1).detach()
    expected = {(4,): float(first[4])}
    for a in range(4):
        second = torch.softmax(model(torch.tensor([[2, 3, a]])).logits[0, -1] / temperature, -1).detach()
        expected |= {(a, b): float(first[a] * second[b]) for b in range(5)}
    rows = zip(sampled.tokens[0].tolist(), sampled.lengths[0].tolist(), strict=True)
    counts: dict[tuple, int] = {}
    for row, length in rows:
        counts[tuple(row[:length])] = counts.get(tuple(row[:length]), 0) + 1
    assert set(counts) <= set(expected) and math.isclose(sum(expected.values()), 1, rel_tol=1e-5)
    likely = {key: p for key, p in expected.items() if p * draws >= 5}
    chi_square = sum((counts.get(key, 0) - p * draws) ** 2 / (p * draws) for key, p in likely.items())
    freedom = len(likely) - 1
    assert freedom > 5
    # Wilson and Hilferty: the 99.9% quantile of chi-square with so many degrees of freedom.
    assert chi_square < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


def test_a_completion_depends_on_its_own_random_numbers_alone():
    policy, u = make_policy(make_model("gpt2")), uniforms(4, 3, 8)
    together = grpo.rollout(policy, PROMPTS, u, 1.0)
    for p, g in ((0, 0), (2, 1), (3, 2)):
        alone = grpo.rollout(policy, [PROMPTS[p]], u[p : p + 1, g : g + 1], 1.0)
        length = int(alone.lengths)
        assert length == together.lengths[p, g]
        assert alone.tokens[0, 0, :length].tolist() == together.tokens[p, g, :length].tolist()


def test_random_streams_depend_on_seed_step_and_slot_alone():
    config = Config(max_new_tokens=3)
    both = grpo.draw(config, grpo.TRAIN, 5, [2, 7], 4)
    assert both.shape == (2, 4, 3) and torch.equal(both[1:], grpo.draw(config, grpo.TRAIN, 5, [7], 4))
    assert torch.equal(both[:, :2], grpo.draw(config, grpo.TRAIN, 5, [2, 7], 2))  # a larger group only adds draws
    others = [
        grpo.draw(config, grpo.TRAIN, 6, [2], 4),
        grpo.draw(config, grpo.EVALUATE, 5, [2], 4),
        grpo.draw(Config(max_new_tokens=3, seed=1), grpo.TRAIN, 5, [2], 4),
    ]
    assert all(not torch.equal(both[:1], other) for other in others)


def test_prompts_come_in_seeded_epochs_without_repetition():
    config = Config(prompts=4, seed=3)
    rows = [row for step in range(5) for row in grpo.prompt_rows(step, config, 10)]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10)) and rows[:10] != rows[10:]
    assert grpo.prompt_rows(1, Config(prompts=4, seed=3, norm="none"), 10) == rows[4:8]
    assert len(grpo.prompt_rows(0, Config(prompts=7), 3)) == 7  # more prompts than problems


# ------------------------------------------------------- update -------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-7)])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("agg", ["sequence", "mean", "token"])
def test_gradient_equals_the_naive_one_whatever_the_split_padding_and_order(kind, agg, dtype, bound):
    model = make_model(kind, dtype=dtype)
    policy = make_policy(model)
    batch = make_batch(policy)
    naive_loss(model, batch, agg, temperature=0.8).backward()
    expected = flat_gradient(model.parameters())
    order = torch.tensor([3, 0, 4, 1, 2])
    padded = torch.nn.functional.pad(batch.sampled.tokens, (0, 7), value=22)
    for micro, rows, tokens in ((99, slice(None), batch.sampled.tokens), (18, slice(None), padded), (1, order, padded)):
        model.zero_grad()
        weights = grpo.token_weights(batch.sampled.lengths, agg).to(dtype)
        for p, prompt in enumerate(batch.prompts):
            logprobs = grpo.prompt_backward(
                model,
                torch.tensor(prompt),
                tokens[p][rows],
                batch.sampled.lengths[p][rows],
                batch.advantages[p][rows].to(dtype),
                weights[p][rows],
                Config(micro_batch=micro, temperature=0.8),
            )
            first = tokens[p][rows][0, : batch.sampled.lengths[p][rows][0]].tolist()
            naive = naive_logprobs(model, prompt, first, 0.8).detach()
            torch.testing.assert_close(
                logprobs[: len(first)], naive, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-9
            )
        assert relative_error(flat_gradient(model.parameters()), expected) < bound


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "granite", "cohere", "gemma2", "mixtral", "opt"])
def test_gradient_through_chunks_of_logits_equals_the_naive_one(kind, rows, monkeypatch):
    """With the attention and the products that are used on a CPU, where the model allows them, and without."""
    monkeypatch.setattr(grpo, "MAX_LOGITS", rows * 23)
    seen, whole = [], grpo.apply_head
    monkeypatch.setattr(grpo, "apply_head", lambda model, hidden: seen.append(len(hidden)) or whole(model, hidden))
    naive = make_model(kind)
    policies = [make_policy(make_model(kind)), make_policy(grpo.for_cpu(make_model(kind)))]
    batch = make_batch(policies[0])
    naive_loss(naive, batch, "sequence").backward()
    expected = flat_gradient(naive.parameters())
    for policy in policies:
        for p in range(4):
            grpo.prompt_backward(
                policy.model,
                torch.tensor(PROMPTS[p]),
                batch.sampled.tokens[p],
                batch.sampled.lengths[p],
                batch.advantages[p].float(),
                torch.full((5,), 1 / 20),
                Config(micro_batch=18),
            )
        assert relative_error(flat_gradient(policy.model.parameters()), expected) < 1e-5
    assert max(seen) == min(rows, 18)


def test_passes_take_the_longest_completions_first_within_the_limit():
    assert list(grpo.passes([3, 5, 1, 4, 3], 8)) == [[1], [3, 0], [4, 2]]
    assert list(grpo.passes([3, 3, 2], 1)) == [[0], [1], [2]] and list(grpo.passes([2, 3], 6)) == [[1, 0]]


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (1, 1, 7)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_linear_layer_by_onednn_is_torchs(shape, bias):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(7, 11, bias=bias), torch.randn(shape, requires_grad=True)
    tensors, out = [x, *layer.parameters()], torch.randn(*shape[:-1], 11)
    results = []
    for kind in (torch.nn.Linear, grpo.OneDnnLinear):
        layer.__class__ = kind
        gradients = [torch.autograd.grad(y, tensors) for y in ((layer(x) * out).sum(), layer(x).sum())]
        results.append([layer(x).detach(), *gradients[0], *gradients[1]])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_three_epochs_equal_the_clipped_loss_written_out(kl):
    """SGD steps on the naive clipped loss, importance ratios against the first epoch, KL against the start policy."""
    policy, naive, reference = (make_policy(make_model("gpt2")), make_model("gpt2"), make_model("gpt2"))
    batch = make_batch(policy)
    config = Config(epochs=3, kl=kl, clip=0.05, lr=0.05, optimizer="sgd", max_grad_norm=0)
    result, _ = grpo.update(policy, grpo.make_optimizer(policy, config), batch, config, reference if kl else None)
    lengths = batch.sampled.lengths
    old = {
        (p, g): naive_logprobs(naive, PROMPTS[p], batch.sampled.tokens[p, g, : lengths[p, g]].tolist()).detach()
        for p in range(4)
        for g in range(5)
    }
    start, norms = torch.cat([p.detach().flatten() for p in naive.parameters()]), []
    for _ in range(3):
        naive.zero_grad()
        naive_loss(naive, batch, "sequence", old=old, clip=0.05, kl=kl, reference=reference).backward()
        norms.append(float(flat_gradient(naive.parameters()).norm()))
        with torch.no_grad():
            for p in naive.parameters():
                p -= 0.05 * p.grad
    moved = torch.cat([p.detach().flatten() for p in policy.model.parameters()]) - start
    expected = torch.cat([p.detach().flatten() for p in naive.parameters()]) - start
    assert relative_error(moved, expected) < 1e-4
    assert result["grad_norm"] == pytest.approx(sum(norms) / 3, rel=1e-4) and result["skipped"] == 0
    assert result["logprob_gap"] < 1e-5


def test_clipping_scales_the_step_to_the_limit_and_says_so():
    policy = make_policy(make_model("gpt2"))
    before = torch.cat([p.detach().flatten() for p in policy.model.parameters()])
    config = Config(lr=1.0, optimizer="sgd", max_grad_norm=1e-3)
    result, _ = grpo.update(policy, grpo.make_optimizer(policy, config), make_batch(policy), config)
    step = torch.cat([p.detach().flatten() for p in policy.model.parameters()]) - before
    assert result["clipped"] and result["grad_norm"] > 1e-3
    assert float(step.norm()) == pytest.approx(1e-3, rel=1e-2)


def test_bfloat16_weights_follow_float32_masters():
    policy = make_policy(make_model("gpt2", dtype=torch.bfloat16))
    start = {name: master.clone() for name, master in policy.masters.items()}
    batch, config = make_batch(policy), Config(lr=1e-4, optimizer="sgd", max_grad_norm=0)
    total = {name: torch.zeros_like(master) for name, master in start.items()}
    weights = grpo.token_weights(batch.sampled.lengths, "sequence")
    alone = make_model("gpt2", dtype=torch.bfloat16)
    for p in range(4):  # each prompt's gradient alone, summed in float32
        alone.zero_grad()
        grpo.prompt_backward(
            alone,
            torch.tensor(PROMPTS[p]),
            batch.sampled.tokens[p],
            batch.sampled.lengths[p],
            batch.advantages[p].float(),
            weights[p],
            config,
        )
        for name, parameter in alone.named_parameters():
            total[name] += parameter.grad.float()
    grpo.update(policy, grpo.make_optimizer(policy, config), batch, config)
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(policy.masters[name], start[name] - 1e-4 * total[name], rtol=1e-6, atol=1e-7)
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, policy.masters[name].bfloat16())
    moved = [not torch.equal(start[name], master) for name, master in policy.masters.items()]
    assert all(moved)  # steps far below bfloat16's resolution are not lost


def test_measuring_a_bfloat16_policy_leaves_the_same_gradient_in_the_masters():
    policies = [make_policy(make_model("llama", dtype=torch.bfloat16)) for _ in range(2)]
    batch, config = make_batch(policies[0], G=6), Config(micro_batch=1)
    weights = grpo.token_weights(batch.sampled.lengths, "sequence")
    measured = grpo.Measured.of(policies[0], batch, config)
    grpo.measured_backward(policies[0], batch, 0, weights, config, measured, True)
    grpo.prompt_backward(
        policies[1].model,
        torch.tensor(PROMPTS[0]),
        batch.sampled.tokens[0],
        batch.sampled.lengths[0],
        batch.advantages[0].float(),
        weights[0],
        config,
    )
    found, expected = (flat_gradient(policy.masters.values()) for policy in policies)
    assert all(parameter.grad is None for parameter in policies[0].model.parameters())
    # A completion a pass on both sides: what differs is that the prefix's two gradients are rounded before they add up.
    assert relative_error(found, expected) < 2**-7 and float(expected.norm()) > 0
    scale = 6 / 5 / (float(weights[0, 0]) * 3 * float(batch.scale[0]))
    torch.testing.assert_close(measured.gradients[0].sum(0), -scale * found, rtol=1e-4, atol=1e-5)


def test_a_gradient_that_is_not_finite_is_not_applied():
    policy = make_policy(make_model("gpt2"))
    batch, config = make_batch(policy), Config(optimizer="sgd", lr=1.0)
    before = {name: master.detach().clone() for name, master in policy.masters.items()}
    batch.advantages[0, 0] = math.nan
    assert grpo.update(policy, grpo.make_optimizer(policy, config), batch, config)[0]["skipped"] == 1
    assert all(torch.equal(before[name], master) for name, master in policy.masters.items())
    assert all(master.grad is None for master in policy.masters.values())


# -------------------------------------------------- tasks and rewards -------------------------------------------------

# fmt: off
GRADES = [  # completion, gold answer, reward
    ("so\n#### 18", "18", 1), ("#### 18.", "18", 1), ("#### 18.0", "18", 1), ("#### 018", "18", 1), ("####18", "18", 1),
    ("#### -7", "7", 0), ("#### -7", "-7", 1), ("#### −7", "-7", 1), ("#### - 7", "-7", 1), ("#### +7", "7", 1),
    ("#### $1,200", "1200", 1), ("#### $1,200", "200", 0), ("#### 1,200.50", "1200.5", 1), ("#### -$7", "-7", 1),
    ("#### $-7", "-7", 1), ("#### €5", "5", 1), ("#### 1200", "1,200", 1), ("#### 1", "1,200", 0),
    ("#### 1,2", "12", 0),
    ("#### 50%", "50", 1), ("#### 50\\%", "50", 1), ("#### 18 dollars", "18", 1), ("#### 5 km/hour", "5", 1),
    ("#### 5 m", "5", 1), ("#### The answer is 18", "18", 1), ("#### **18**", "18", 1), ("#### x = 5", "5", 1),
    ("#### 10 + 8 = 18", "18", 1), ("#### 17 or 18", "18", 0), ("#### 5x", "5", 0), ("#### 10-3", "3", 0),
    ("#### .5", "1/2", 1), ("#### 3/4", "0.75", 1), ("#### 3/0", "3", 0), ("#### 7 apples", "8", 0), ("#### ", "18", 0),
    ("#### 3\nno:\n#### 4", "4", 1), ("#### 3\nno:\n#### 4", "3", 0), ("\\boxed{3} #### 4", "4", 1),
    ("#### 4 or \\boxed{3}", "3", 1), ("12 #### 4 and then 9", "9", 0), ("I think 12, no, 18.", "18", 1),
    ("I think 12, no, 18.", "12", 0), ("It costs $1,200.", "1200", 1), ("nothing", "18", 0), ("", "18", 0),
    ("180", "18", 0),
    ("\\boxed{\\frac{1}{2}}", "0.5", 1), ("\\boxed{\\dfrac12}", "\\frac{1}{2}", 1), ("\\boxed{2\\pi}", "2", 0),
    ("\\boxed{\\sqrt{2}}", "2", 0), ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}", 1),
    ("\\boxed{\\text{Evelyn}}", "\\text{Evelyn}", 1),
    ("\\boxed{Evelyn}", "\\text{Evelyn}", 1), ("\\boxed{Bob}", "\\text{Evelyn}", 0), ("\\boxed{90^\\circ}", "90", 1),
    ("\\boxed{5\\text{ cm}}", "5", 1), ("\\boxed{10,\\!000}", "10000", 1), ("\\boxed{\\$7.50}", "7.5", 1),
    ("\\boxed{(3,\\frac{\\pi}{2})}", "\\left( 3, \\frac{\\pi}{2} \\right)", 1), ("\\boxed{x \\in [-2,7]}", "[-2,7]", 1),
    ("\\boxed{(7,-2)}", "(-2,7)", 0), ("\\boxed{18", "18", 0), ("\\boxed{17} \\boxed{18", "17", 0),
    ("\\boxed 5", "5", 1), ("\\boxed{42} \\", "42", 1), ("\\boxed 3.5.", "3.5", 1), ("\\boxed 3.5", "3", 0),
    ("\\boxed{864}", "864 \\mbox{ inches}^2", 1), ("\\boxed{15 \\text{ cm}^{3}}", "15", 1),
    ("\\boxed{\\text{e}^2}", "\\text{e}", 0), ("so \\fbox{7} of 8", "7", 1), ("\\boxed{3100}", "(3,100)", 0),
    ("\\boxed{100}", "[0,100)", 0), ("\\boxed{(3, 100)}", "(3,100)", 1), ("\\boxed{\\$1,234.50}", "1234.5", 1),
    ("\\boxed{}", "0", 0), ("\\boxed{x+1}", "1+x", 1), ("\\boxed{5(3)}", "53", 0), ("\\boxed{2^{10}}", "1024", 1),
]
# fmt: on


@pytest.mark.parametrize(("completion", "answer", "reward"), GRADES)
def test_grade(completion, answer, reward):
    assert grpo.grade(completion, answer) == reward


# fmt: off
HOSTILE = [
    "9^{9^{9^9}}", "(9^{99})^{(9^{99})}", "((9^{999})^{999})^{999}", "10000!!", "(" * 200, "{" * 200,
    "x" * 250, "9" * 10**6,
    "\\boxed{" * 10**5, "####" * 10**5, "1," * 10**6, "a" * 10**6, "-" * 10**6, " " * 10**6,
    "\\text{" * 10**5, "^" * 10**5, "(" * 10**5 + "," * 10**5,
    "\\sqrt{" * 60 + "2" + "}" * 60, "\\int_0^1 x^{x^x}", "\\sum_{n=1}^{9999} \\frac{1}{n^9}", "\\frac{1}{0}",
    "٣", "\0", "$" * 999,
]
# fmt: on


def test_a_gold_answer_too_long_for_a_number_is_none():
    assert grpo.grade("#### 7", "9" * 10**6) == 0 and grpo.parse_number("9" * 301) is None


@pytest.mark.parametrize("text", ["é" * 301, "(" * 20 + "x", "[a" * 20 + "]" * 20, "{" * 30 + "}" * 30])
def test_what_no_answer_is_like_is_never_parsed(text, monkeypatch):
    """The parser needs a second and a hundred megabytes for such a text, and keeps some of them."""
    parsed = []
    monkeypatch.setattr("math_verify.parse", lambda text, **_: parsed.append(text) or [])
    assert grpo.grade("\\boxed{x}", text) == 0 and grpo.same_latex(text, "x") is False and parsed == []


def test_brackets_as_deep_as_answers_have_them_are_parsed():
    nested = "\\sqrt{" * 8 + "\\frac{(x+1)}{2}" + "}" * 8
    assert grpo.grade(f"\\boxed{{{nested}}}", nested.replace("x+1", "1+x")) == 1


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_completions_get_no_reward_in_bounded_time(text):
    for completion in (text, f"\\boxed{{{text}}}"):
        began = time.perf_counter()
        assert grpo.grade(completion, "\\frac{3}{4}") == grpo.grade("3", completion) == 0.0
        assert time.perf_counter() - began < 3


def test_numbers_are_exact():
    assert grpo.parse_number("0.1") == Fraction(1, 10) and grpo.parse_number("-1,234.50 dollars") == Fraction(-2469, 2)


def test_arith_problems_are_right_and_the_held_out_ones_unseen():
    train, test = grpo.make_arith(100, size=3000)
    assert train.to_list() == grpo.make_arith(512, size=3000)[0].to_list()  # so fewer evaluations leave the start as is
    for row in [*train.select(range(300)), *test]:
        a, b = map(int, row["question"].rstrip("=").split("+"))
        assert row["answer"] == f"{a + b:04}"[::-1] and re.fullmatch(r"\d{3}\+\d{3}=", row["question"])
    assert not set(train["question"]) & set(test["question"]) and len(set(train["question"])) == 3000
    carries = [
        sum((a % 10**i + b % 10**i) >= 10**i for i in (1, 2, 3))
        for a, b in (map(int, question.rstrip("=").split("+")) for question in train["question"])
    ]
    right = [answer == solution for answer, solution in zip(train["answer"], train["solution"], strict=True)]
    share = [np.mean([r for r, c in zip(right, carries, strict=True) if c == k]) for k in range(3)]
    assert share[0] == 1 and abs(share[1] - 1 / 2) < 0.06 and abs(share[2] - 1 / 4) < 0.09


def columns(rows: list[dict], graded: bool = True) -> list[dict]:
    return list(grpo.standard_columns(Dataset.from_list(rows), "file", graded))


def test_columns_are_found_by_name():
    gsm = {"question": "q", "answer": "2+2=<<2+2=4>>4\n#### 4"}
    assert columns([gsm]) == [{"question": "q", "answer": "4", "solution": "2+2=4\n#### 4"}]
    assert columns([{"problem": "q", "solution": "so \\boxed{\\frac{1}{2}}."}]) == [
        {"question": "q", "answer": "\\frac{1}{2}", "solution": "so \\boxed{\\frac{1}{2}}."}
    ]
    assert columns([{"problem": "q", "solution": "thus \\boxed{\\left\\{ 2}"}])[0]["answer"] == "\\left\\{ 2"
    assert columns([{"problem": "q", "answer": 7}]) == [{"question": "q", "answer": "7", "solution": ""}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "q", "answer": "1"}], "no column question/problem"),
        ([{"question": "q", "reply": "1"}], "no column question/problem or answer/solution in question, reply"),
        ([{"question": "q", "answer": "1"}, {"question": "q", "answer": ""}], "row 2: answer '' cannot be graded"),
        ([{"question": "q", "answer": "\\frac{1}{2"}], "row 1: answer .* cannot be graded"),
        ([{"question": "q", "solution": "no mark"}], "row 1: answer 'no mark' cannot be graded"),
        ([{"question": " ", "answer": "1"}], "row 1: no question"),
    ],
)
def test_unusable_rows_are_named(rows, message):
    with pytest.raises(InputError, match=message):
        columns(rows)


def test_an_empty_data_set_is_an_error():
    with pytest.raises(InputError, match="no rows"):
        grpo.standard_columns(Dataset.from_dict({"question": [], "answer": []}), "file", True)


@needs_data
@pytest.mark.parametrize(
    ("file", "task", "rows", "first"),
    [
        ("gsm8k_test.jsonl", "gsm8k", 1319, "18"),
        ("svamp.jsonl", "gsm8k", 1000, None),
        ("math500.jsonl", "math", 500, None),
    ],
)
def test_real_files_load_and_every_gold_answer_earns_its_reward(file, task, rows, first, tmp_path):
    config = Config(task=task, data=str(DATA / file), eval_problems=100)
    train, test = grpo.load_problems(config, None, grpo.grade)
    assert (len(train), len(test)) == (rows - 100, 100) and not set(train["question"]) & set(test["question"])
    raw = [json.loads(line) for line in (DATA / file).open()]
    golds = {row.get("question", row.get("problem")): row["answer"].split("####")[-1].strip() for row in raw}
    for row in [*train, *test]:
        assert row["answer"] == golds[row["question"]]
        assert grpo.grade(f"so \\boxed{{{row['answer']}}}.", row["answer"]) == 1
    assert first is None or golds[raw[0]["question"]] == first


# -------------------------------------------------------- runs --------------------------------------------------------


def even(completion: str, answer: str) -> float:
    """A reward that a policy without any training earns now and then."""
    return float(completion[:1] in set("02468 acegikmoqsuwy" + answer))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def problems():
    return grpo.make_arith(1, size=300)[0]


@pytest.fixture
def train(problems):
    """grpo.train on a few problems, with a reward that needs no skill."""
    return partial(grpo.train, dataset=problems, reward=even)


@pytest.fixture
def settings(tmp_path, cache):
    """A small run: 60 warm-start steps, 10 updates of 3 prompts with 5 completions."""
    return dict(
        sft_steps=60,
        cache=cache,
        steps=10,
        prompts=3,
        group=5,
        eval_every=4,
        eval_problems=20,
        save_every=4,
        out=str(tmp_path / "run"),
        lr=1e-3,
        micro_batch=18,
    )


TIMINGS = ("seconds_rollout", "seconds_update", "tokens_per_second")


def read(out, name: str = "metrics.jsonl") -> list[dict]:
    rows = [json.loads(line) for line in (Path(out) / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def test_what_a_run_leaves(train, settings, capsys):
    final = train(Config(**settings, geometry_every=0, probe_every=0))
    out = Path(settings["out"])
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "prompts.jsonl",
        "samples.jsonl",
        "checkpoint",
        "model",
    }
    metrics, prompts = read(out), read(out, "prompts.jsonl")
    assert [row["step"] for row in metrics] == list(range(11))
    assert set(metrics[1]) == {
        "step",
        "reward",
        "pass_rate",
        "reward_std",
        "frac_all_right",
        "frac_all_wrong",
        "grad_norm",
        "clipped",
        "skipped",
        "entropy",
        "length",
        "truncated",
        "logprob_gap",
        "lr",
    }
    assert [row["step"] for row in metrics if "eval_pass_rate" in row] == [0, 4, 8, 10]
    assert metrics[10] == {"step": 10, **final} and metrics[3]["lr"] == pytest.approx(4e-4)
    assert len(prompts) == 30
    for step in range(10):
        mine = [row for row in prompts if row["step"] == step]
        assert metrics[step]["pass_rate"] == pytest.approx(np.mean([row["pass_rate"] for row in mine]))
        assert metrics[step]["reward_std"] == pytest.approx(np.mean([row["reward_std"] for row in mine]))
        for row in mine:
            assert row["reward_std"] == pytest.approx((row["pass_rate"] * (1 - row["pass_rate"])) ** 0.5)
            assert row["scale"] == pytest.approx(1 / (row["reward_std"] + 1e-6) if row["reward_std"] else 0.0)
    samples = read(out, "samples.jsonl")
    assert len(samples) == 16 and set(samples[0]) == {"step", "question", "completion", "answer", "reward"}
    assert all(row["reward"] == even(row["completion"], row["answer"]) for row in samples)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out / "model"), AutoTokenizer.from_pretrained(out / "model")
    saved = load_file(out / "checkpoint" / "state.safetensors")
    assert all(torch.equal(p, saved[f"weights.{name}"]) for name, p in model.named_parameters())
    assert tokenizer.decode(tokenizer("047+085=")["input_ids"]) == "047+085="
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if "held-out problems" in line)
    assert f"{final['eval_pass_rate']:.3f}" in lines[first + 1]
    assert [len(line) for line in lines[first : first + 8]] == [34 + 9 + 9] * 8 and lines[first + 8] == ""


def test_two_norms_see_the_same_prompts_and_the_same_first_rollouts(train, settings, problems):
    runs = {}
    for norm in ("none", "std"):
        train(Config(**settings | dict(norm=norm, out=settings["out"] + norm)))
        config = Config(**settings | dict(norm=norm))
        policy = grpo.load_policy(config, problems, grpo.Team())
        encoded = grpo.encode_problems(problems, policy.model, policy.tokenizer, config)
        runs[norm] = grpo.sample_batch(policy, 0, encoded, even, config)
    none, std = runs["none"], runs["std"]
    assert none.ids == std.ids and torch.equal(none.sampled.tokens, std.sampled.tokens)
    assert torch.equal(none.sampled.logprobs, std.sampled.logprobs) and not torch.equal(none.advantages, std.advantages)
    logs = [[(row["step"], row["prompt"]) for row in read(settings["out"] + norm, "prompts.jsonl")] for norm in runs]
    assert logs[0] == logs[1]
    assert read(settings["out"] + "none")[0]["reward"] == read(settings["out"] + "std")[0]["reward"]


@pytest.mark.parametrize(
    ("optimizer", "rewards", "steps"), [("adamw", 6 * 15 + 60, (4, 9)), ("sgd", 60, (1, 3)), ("sgd", 0, (0, 0))]
)
def test_a_killed_run_resumes_to_the_bit(train, settings, optimizer, rewards, steps):
    """Killed after so many rewards: those of evaluations, 40 each, and of steps, 15 each."""
    settings["optimizer"] = optimizer
    train(Config(**settings | {"out": settings["out"] + "-whole"}))
    calls = SimpleNamespace(left=rewards)

    def dying(completion, answer):
        calls.left -= 1
        if calls.left < 0:
            raise KeyboardInterrupt
        return even(completion, answer)

    with pytest.raises(KeyboardInterrupt):
        train(Config(**settings), reward=dying)
    log = Path(settings["out"]) / "metrics.jsonl"
    assert steps[0] <= len(log.read_text().splitlines()) <= steps[1]
    with (Path(settings["out"]) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')  # killed while writing
    train(Config(**settings | dict(resume=True, eval_every=4)))
    for name in grpo.LOGS:
        assert read(settings["out"], name) == read(settings["out"] + "-whole", name)
    resumed, whole = (
        load_file(Path(out) / "checkpoint" / "state.safetensors")
        for out in (settings["out"], settings["out"] + "-whole")
    )
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_a_finished_run_goes_on_with_more_steps(train, settings):
    train(Config(**settings | dict(out=settings["out"] + "-whole")))
    train(Config(**settings | dict(steps=5)))
    train(Config(**settings | dict(resume=True)))
    assert read(settings["out"]) == read(settings["out"] + "-whole")
    with pytest.raises(InputError, match="has made 10 steps already, more than --steps 5"):
        train(Config(**settings | dict(resume=True, steps=5)))


def test_a_run_killed_before_it_had_begun_starts_anew(train, settings):
    settings["steps"] = 2
    train(Config(**settings | {"out": settings["out"] + "-whole"}))
    train(Config(**settings))
    out = Path(settings["out"])
    (out / "config.json").unlink()  # written last of what a run begins with
    (out / "metrics.jsonl").write_text("")
    (out / "prompts.jsonl").write_text("")
    train(Config(**settings))
    assert read(out) == read(settings["out"] + "-whole")
    (out / "config.json").unlink()  # somebody else's log is not written over
    with pytest.raises(InputError, match="holds a run"):
        train(Config(**settings))


def test_runs_are_not_mixed_up(train, settings):
    settings["steps"] = 2
    train(Config(**settings))
    before = {path: path.read_bytes() for path in Path(settings["out"]).rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"holds a run: add --resume to continue it, or --out OTHER_DIR"):
        train(Config(**settings))
    with pytest.raises(InputError, match=r"other settings: norm was 'std', is 'none', lr was 0.001, is 0.002"):
        train(Config(**settings | dict(resume=True, norm="none", lr=2e-3)))
    assert before == {path: path.read_bytes() for path in Path(settings["out"]).rglob("*") if path.is_file()}


def test_a_run_resumes_with_smaller_passes(train, settings):
    """Which is what one does after running out of memory."""
    train(Config(**settings | dict(steps=2)))
    train(Config(**settings | dict(steps=4, resume=True, micro_batch=9)))
    assert [line["step"] for line in read(settings["out"])[-2:]] == [3, 4]


@pytest.mark.parametrize(("config", "why"), [
    (GPTNeoConfig(vocab_size=98, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["local"], 2]],
                  window_size=4, max_position_embeddings=64, bos_token_id=0, eos_token_id=0), "training differ by"),
    (MambaConfig(vocab_size=98, hidden_size=32, num_hidden_layers=2, bos_token_id=0, eos_token_id=0), ""),
])  # fmt: skip
def test_models_that_are_not_sampled_as_they_are_trained_are_refused(train, settings, tmp_path, config, why):
    """gpt-neo takes the room in the cache for tokens; mamba has no cache of keys and values."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 10  # a random model's distributions are all alike
    model.save_pretrained(tmp_path / "model")
    grpo.tiny_model()[1].save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=f"model .* cannot be used: .*{why}"):
        train(Config(**settings | dict(model=str(tmp_path / "model"), sft_steps=0)))
    assert not (Path(settings["out"]) / "config.json").exists()


def test_a_run_resumes_on_another_device(train, settings):
    """Of several processes, each on its GPU, the first one's stands in the settings: cuda:0."""
    train(Config(**settings | dict(steps=2)))
    file = Path(settings["out"]) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"device": "cuda:0"}))
    train(Config(**settings | dict(steps=4, resume=True)))
    assert [line["step"] for line in read(settings["out"])[-2:]] == [3, 4]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA there is no error to name the device")
def test_every_process_takes_the_gpu_of_its_number(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(InputError, match="device cuda:1 cannot be used"):
        Config(device="cuda")


def test_torn_foreign_and_missing_checkpoints_are_named(train, settings):
    settings["steps"] = 2
    train(Config(**settings))
    path = Path(settings["out"]) / "checkpoint" / "state.safetensors"
    resume, whole = Config(**settings | dict(resume=True)), path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=f"cannot read the checkpoint {path}"):
        train(resume)
    save_file({"weights.a": torch.zeros(3)}, path, metadata={"state": '{"step": 1, "skipped": 0, "logs": {}}'})
    with pytest.raises(InputError, match=f"the checkpoint {path} belongs to another model"):
        train(resume)
    path.write_bytes(whole)
    log = Path(settings["out"]) / "prompts.jsonl"
    log.write_text(log.read_text()[:50])
    with pytest.raises(InputError, match="prompts.jsonl is shorter than when the checkpoint"):
        train(resume)
    path.unlink()
    with pytest.raises(InputError, match=f"cannot read the checkpoint {path}"):
        train(resume)


def test_five_gradients_in_a_row_that_are_not_finite_end_the_run(train, settings, monkeypatch):
    whole = grpo.prompt_backward
    count = SimpleNamespace(calls=0)

    def spoiled(model, *arguments, **named):
        count.calls += 1
        found = whole(model, *arguments, **named)
        if count.calls > 6:
            next(model.parameters()).grad[0, 0] = math.nan
        return found

    monkeypatch.setattr(grpo, "prompt_backward", spoiled)
    with pytest.raises(RunError, match="no finite gradient in 5 steps in a row"):
        train(Config(**settings | dict(steps=30)))
    metrics = read(settings["out"])
    assert [row["skipped"] for row in metrics[-6:]] == [0, 1, 1, 1, 1, 1] and metrics[-1]["grad_norm"] is None
    saved = load_file(Path(settings["out"]) / "checkpoint" / "state.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())


def test_a_reward_that_fails_names_the_completion(train, settings):
    def broken(completion, answer):
        return 1 / 0

    for reward, message in (
        (broken, "division by zero"),
        (lambda *_: math.nan, "the reward is nan"),
        (lambda *_: None, "failed"),
    ):
        with pytest.raises(RunError, match=f"{message}.*completion '.*', answer '[0-9]{{4}}'"):
            train(Config(**settings | dict(out=settings["out"] + message)), reward=reward)


def test_rewards_outside_zero_and_one_have_no_pass_rate(train, settings, capsys):
    settings |= dict(steps=1, eval_problems=4)
    train(Config(**settings), reward=lambda completion, answer: 3 * even(completion, answer) - 1)
    line, final = read(settings["out"])
    assert line["pass_rate"] is None and line["eval_pass_rate"] is None and final["eval_greedy"] is None
    assert -1 <= line["reward"] <= 2
    texts = [row["reward"] for row in read(settings["out"], "samples.jsonl")]
    assert line["eval_reward"] == np.mean(texts[:4]) and final["eval_reward"] == np.mean(texts[4:])  # of four held out
    before, after = capsys.readouterr().out.split("reward, sampled")[1].split()[:2]
    assert (before, after) == (f"{line['eval_reward']:.3f}", f"{final['eval_reward']:.3f}")
    rates = grpo.pass_rates(torch.tensor([[0.0, 1.0, 0.5], [1.0, 1.0, 1.0], [0.0, 2.0, 1.0]]))
    assert rates[:2].tolist() == [pytest.approx(1 / 3), 1.0] and rates[2].isnan()


def test_the_warm_start_learns_and_is_made_once_for_all_seeds(tmp_path):
    rows = [{"question": f"{a}{b}", "answer": str(b), "solution": str(b)} for a in range(10) for b in range(10)]
    problems = Dataset.from_list(rows)
    settings = dict(sft_steps=150, sft_lr=6e-3, cache=str(tmp_path))
    made = grpo.warm_start(Config(**settings), problems)
    stamp = (made / "model.safetensors").stat().st_mtime_ns
    assert grpo.warm_start(Config(**settings, seed=5, norm="none", steps=1), problems) == made
    assert (made / "model.safetensors").stat().st_mtime_ns == stamp and len(list(tmp_path.iterdir())) == 1
    others = [
        grpo.warm_start(Config(**settings | dict(sft_steps=1)), problems),
        grpo.warm_start(Config(**settings | dict(sft_steps=1)), problems.select(range(50))),
    ]
    assert len({made, *others}) == 3
    policy = grpo.load_policy(Config(**settings), problems, grpo.Team())
    prompts = [problem.prompt for problem in grpo.encode_problems(problems, policy.model, policy.tokenizer, Config())]
    texts = grpo.completions(policy, grpo.rollout(policy, prompts, uniforms(100, 1, 4), 0.0))
    assert [text for (text,) in texts] == [row["answer"] for row in rows]


def test_a_warm_start_that_cannot_be_saved_leaves_nothing(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.GPT2LMHeadModel.save_pretrained", full)
    problems = Dataset.from_list([{"question": "1", "answer": "1", "solution": "1"}])
    with pytest.raises(OSError, match="No space left"):
        grpo.warm_start(Config(sft_steps=1, cache=str(tmp_path / "cache")), problems)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_warm_start_step_is_cross_entropy_over_the_solutions_tokens(tmp_path, monkeypatch):
    """The first step's gradient, whatever the micro-batch, against the naive sequences' mean over solution tokens."""
    rows = [{"question": "ab"[: 1 + i % 2], "answer": "", "solution": "x" * (1 + i)} for i in range(5)]
    problems, found = Dataset.from_list(rows), []
    seen = lambda parameters, _: found.append(flat_gradient(parameters))  # noqa: E731
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", seen)
    for micro in (999, 40):
        model, tokenizer = grpo.tiny_model()
        grpo.supervised(model, tokenizer, problems, Config(sft_steps=1, sft_batch=5, micro_batch=micro))
    model, tokenizer = grpo.tiny_model()
    encode = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    losses = [-naive_logprobs(model, encode(r["question"]), [*encode(r["solution"]), 0]) for r in rows]
    torch.cat(losses).mean().backward()
    assert len(found) == 2
    assert all(relative_error(gradient, flat_gradient(model.parameters())) < 1e-5 for gradient in found)


def test_kl_keeps_the_policy_near_its_start(train, settings):
    """The KL term's gradient is zero at the start policy; a large weight holds later steps back."""
    moved = {}
    for kl in (0.0, 100.0):
        out = f"{settings['out']}{kl}"
        train(Config(**settings | dict(kl=kl, out=out, optimizer="sgd", lr=0.02)))
        start = load_file(next(Path(settings["cache"]).iterdir()) / "model.safetensors")
        end = load_file(Path(out) / "model" / "model.safetensors")
        moved[kl] = math.sqrt(sum(float((end[key] - start[key]).square().sum()) for key in end))
    assert read(f"{settings['out']}100.0")[0]["grad_norm"] == pytest.approx(
        read(f"{settings['out']}0.0")[0]["grad_norm"], rel=1e-4
    )
    assert 0 < moved[100.0] < moved[0.0]


# ------------------------------------------- curvature: log-linear policies ------------------------------------------


class LogLinear:
    """P prompts, K actions, pi(a|x) = softmax(features[x] @ theta): everything is known in closed form."""

    def __init__(self, P: int, K: int, overlap: float, seed: int, aligned: bool = False):
        """Unit features: a part of each prompt's own, and a share `overlap` in common, at the same actions if aligned.

        One action is right, with a probability that is uniform in [0.05, 0.95] over prompts; the others are alike.
        """
        generator, dtype = torch.Generator().manual_seed(seed), torch.float64
        own = torch.eye(P * K, dtype=dtype).view(P, K, P * K)
        order = torch.stack([torch.arange(K) if aligned else torch.randperm(K, generator=generator) for _ in range(P)])
        shared = torch.eye(K, dtype=dtype)[order]
        self.features = torch.cat([(1 - overlap) ** 0.5 * own, overlap**0.5 * shared], -1)  # [P, K, D]
        self.rewards = torch.zeros(P, K, dtype=dtype)
        self.rewards[:, 0] = 1.0
        start = 0.05 + 0.9 * torch.rand(P, generator=generator, dtype=dtype)
        self.offset = torch.zeros(P, K, dtype=dtype)
        self.offset[:, 0] = torch.log((K - 1) * start / (1 - start))
        self.theta = torch.zeros(self.features.shape[-1], dtype=dtype)

    def probs(self, theta=None):
        return torch.softmax(self.offset + self.features @ (self.theta if theta is None else theta), -1)  # [P, K]

    def scores(self, theta=None):
        probs = self.probs(theta)
        return self.features - (probs[..., None] * self.features).sum(1, keepdim=True)  # [P, K, D]

    def value(self, theta=None):
        return (self.probs(theta) * self.rewards).sum(1)  # J [P]

    def std(self, theta=None):
        value = self.value(theta)
        return (value * (1 - value)).sqrt()

    def gradient(self, theta=None):
        centered = self.rewards - self.value(theta)[:, None]
        return torch.einsum("pk,pk,pkd->pd", self.probs(theta), centered, self.scores(theta))

    def hessian(self, p: int):
        scores = self.scores()[p]
        return torch.einsum("k,k,kd,ke->de", self.probs()[p], self.rewards[p] - self.value()[p], scores, scores)

    def draw(self, G: int, generator):
        """G actions a prompt, [P, G]."""
        return torch.multinomial(self.probs(), G, replacement=True, generator=generator)

    def half_gradients(self, actions, rewards):
        """[P, 2, D], as the training's two halves give them: leave-one-out advantages of the whole group."""
        P, G = actions.shape
        advantages = grpo.group_advantages(rewards, "none") * G / (G - 1)
        terms = advantages[..., None] * self.scores()[torch.arange(P)[:, None], actions]  # [P, G, D]
        return torch.stack([terms[:, rows].mean(1) for rows in grpo.halves(G)], 1)


def geometry_of(halves: torch.Tensor, G: int) -> dict[str, float]:
    shares = torch.tensor([rows.stop - rows.start for rows in grpo.halves(G)]).to(halves) / G
    whole = (halves * shares[:, None]).sum(1)
    return grpo.gradient_geometry(whole @ whole.T, (halves[:, 0] * halves[:, 1]).sum(1), G)


def test_closed_forms_equal_autograd():
    policy = LogLinear(3, 5, 0.5, 0)
    for p in range(3):
        gradient = torch.autograd.functional.jacobian(lambda theta: policy.value(theta)[p], policy.theta)  # noqa: B023
        hessian = torch.autograd.functional.hessian(lambda theta: policy.value(theta)[p], policy.theta)  # noqa: B023
        torch.testing.assert_close(policy.gradient()[p], gradient)
        torch.testing.assert_close(policy.hessian(p), hessian)


def test_reward_deviation_bounds_gradient_and_curvature():
    """|g| <= sigma (E|s|^2)^1/2 and |H| <= sigma (E|s|^4)^1/2, on 1,000 random policies."""
    for seed in range(1000):
        policy = LogLinear(1, 4, 0.0, seed)
        squares = policy.scores()[0].square().sum(-1)
        moments = [(policy.probs()[0] * squares**k).sum().sqrt() for k in (1, 2)]
        sigma = policy.std()[0] * (1 + 1e-9)
        assert policy.gradient()[0].norm() <= sigma * moments[0]
        assert torch.linalg.matrix_norm(policy.hessian(0), 2) <= sigma * moments[1]


@pytest.mark.parametrize(("norm", "alpha"), [("none", 0), ("std", 1), ("var", 2)])
def test_each_norm_ascends_its_own_objective(norm, alpha):
    """Expected update over all groups of G 0/1 rewards = F'(J) grad J; for large G F is J, 2 asin sqrt J, logit J."""
    for G in (2, 5, 16, 400):
        for J in (0.1, 0.5, 0.8):
            K = torch.arange(G + 1, dtype=torch.float64)
            weights = torch.distributions.Binomial(G, torch.tensor(J, dtype=torch.float64)).log_prob(K).exp()
            rewards = (torch.arange(G) < K[:, None]).double()  # [G+1, G]: every number of right completions
            advantages = grpo.group_advantages(rewards, norm, eps=0.0)
            # d log pi is 1/J of a right and -1/(1-J) of a wrong completion, for each unit of dJ.
            slope = (weights * (advantages * (rewards / J - (1 - rewards) / (1 - J))).mean(1)).sum()
            spread = K * (G - K) / G**2
            power = torch.where(spread > 0, spread.clamp(min=1e-9) ** ((2 - alpha) / 2), 0.0)
            assert float(slope) == pytest.approx(float((weights * power).sum()) / (J * (1 - J)), rel=1e-9)
            limit = [lambda v: v, lambda v: 2 * math.asin(math.sqrt(v)), lambda v: math.log(v / (1 - v))][alpha]
            if G == 400:
                assert float(slope) == pytest.approx((limit(J + 1e-6) - limit(J - 1e-6)) / 2e-6, rel=0.04)


def ascend(policy: LogLinear, normalized: bool, scale: float, steps: int):
    """Mean J at every step of exact ascent with the steps of the theory, and the predicted gain at each (S^2 = 4)."""
    theta, values, gains = policy.theta.clone(), [], []
    for _ in range(steps):
        gradient, std = policy.gradient(theta), policy.std(theta)
        values.append(float(policy.value(theta).mean()))
        gains.append(grpo.predicted_gain(gradient.square().sum(1), std))
        size = 1 / (4 * std) if normalized else torch.full_like(std, 1 / (4 * 0.5))
        theta = theta + scale * (size[:, None] * gradient).sum(0)
        if values[-1] > 0.97:
            break
    return values, gains


def test_the_measured_speed_up_is_the_predicted_gain():
    """Steps to a mean pass rate of 0.9. (From much harder starts the measured one is larger: 1.2 to 1.7 times.)"""
    ratios = []
    for seed in range(8):
        policy = LogLinear(8, 6, 0.0, seed)
        steps = {}
        for normalized in (False, True):
            values, gains = ascend(policy, normalized, 1.0, 3000)
            steps[normalized] = next(i for i, value in enumerate(values) if value >= 0.9)
            if not normalized:
                predicted = np.mean(gains[: steps[False]])
        ratios.append(steps[False] / steps[True] / predicted)
    assert 0.8 < np.median(ratios) < 1.25


def test_overlap_takes_the_room_for_larger_steps():
    largest = {}
    for overlap in (0.0, 0.5):
        limits = []
        for seed in range(8):
            policy, scale = LogLinear(8, 6, overlap, seed), 1.0
            while scale < 1024 and np.diff(ascend(policy, True, scale, 150)[0]).min(initial=0) > -1e-12:
                scale *= 2
            limits.append(scale / 2)
        largest[overlap] = np.median(limits)
    assert largest[0.5] <= largest[0.0] / 2


def within(values, truth: float, errors: float = 3) -> bool:
    """Whether the mean of independent values agrees with the truth within so many standard errors."""
    values = np.asarray(values)
    return abs(values.mean() - truth) < errors * values.std(ddof=1) / len(values) ** 0.5


def regression(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope of y on x and its standard error, whatever the noise's spread at each x (White)."""
    x, y = x - x.mean(), y - y.mean()
    slope = (x * y).sum() / (x**2).sum()
    return slope, float(np.sqrt((x**2 * (y - slope * x) ** 2).sum()) / (x**2).sum())


@pytest.mark.parametrize("G", [4, 7, 16])
def test_the_corrected_norm_and_cosine_are_those_of_the_true_gradients(G):
    policy, generator = LogLinear(150, 5, 0.3, 1, aligned=True), torch.Generator().manual_seed(G)
    truth = policy.gradient()
    inner = truth @ truth.T
    square, cross = float(inner.diagonal().mean()), float((inner.sum() - inner.trace()) / (150 * 149))
    found = {key: [] for key in ("square", "raw", "cosine", "share")}
    for _ in range(100):
        actions = policy.draw(G, generator)
        halves = policy.half_gradients(actions, policy.rewards.gather(1, actions))
        geometry = geometry_of(halves, G)
        shares = torch.tensor([rows.stop - rows.start for rows in grpo.halves(G)]).double() / G
        found["square"].append(float((halves[:, 0] * halves[:, 1]).sum(1).mean()) / (1 + 1 / (G - 1) ** 2))
        found["raw"].append(float((halves * shares[:, None]).sum(1).square().sum(1).mean()))
        found["cosine"].append(geometry["cos_signal"])
        found["share"].append(geometry["signal_share"])
    assert within(found["square"], square) and not within(found["raw"], square)
    assert within(found["cosine"], cross / square)
    assert not within(np.array(found["cosine"]) * found["share"], cross / square)  # of uncorrected norms
    assert np.mean(found["share"]) == pytest.approx(np.mean(found["square"]) / np.mean(found["raw"]), rel=0.02)


def test_gradients_without_signal_have_a_corrected_norm_of_zero():
    policy, generator, found = LogLinear(40, 5, 0.5, 2), torch.Generator().manual_seed(0), []
    for _ in range(200):
        actions = policy.draw(8, generator)
        rewards = torch.randint(0, 2, actions.shape, generator=generator).double()  # whatever was done
        halves = policy.half_gradients(actions, rewards)
        found.append(float((halves[:, 0] * halves[:, 1]).sum(1).mean()))
    assert within(found, 0.0)


def cross_fitted(policy: LogLinear, G: int, generator):
    """Of each prompt and half: curvature by the probe, true curvature along its direction, both halves' deviations."""
    actions = policy.draw(G, generator)
    rewards = policy.rewards.gather(1, actions)
    halves, rows = policy.half_gradients(actions, rewards), grpo.halves(G)
    found = []
    for p in range(len(actions)):
        for half in (0, 1):
            other, direction = rows[1 - half], halves[p, half]
            if rewards[p, rows[half]].std(correction=0) == 0:  # as the program does
                continue
            mine, chosen = rewards[p, other], actions[p, other]

            def logprobs(parameters):
                return torch.log(policy.probs(parameters["theta"].double())[p, chosen])  # noqa: B023

            advantages = (mine - mine.mean()) * len(mine) / (len(mine) - 1)
            slope = float(direction.norm() / rewards[p].std(correction=0))
            found.append(
                (
                    grpo.directional_curvature(
                        logprobs, {"theta": policy.theta}, {"theta": direction}, advantages, slope
                    ),
                    float(direction @ policy.hessian(p) @ direction / direction.norm() ** 2),
                    float(rewards[p, rows[half]].std(correction=0)),
                    float(mine.std(correction=0)),
                )
            )
    return np.array(found).reshape(-1, 4)


def test_cross_fitted_curvature_is_the_true_one_along_the_same_directions():
    generator = torch.Generator().manual_seed(0)
    found = np.concatenate([cross_fitted(LogLinear(10, 5, 0.5, seed), 16, generator) for seed in range(60)])
    assert np.isfinite(found).all() and len(found) > 800
    assert within(found[:, 0] - found[:, 1], 0.0)
    slope, error = regression(found[:, 1], found[:, 0])
    assert abs(slope - 1) < 3 * error < 0.3


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.7])
def test_identical_prompts_show_no_law_of_curvature_and_deviation(rate):
    """Against the deviation of the direction's half; that of the measured half manufactures a law.

    With two actions every direction has the same true curvature.
    """
    policy, generator = LogLinear(1, 2, 0.0, 0), torch.Generator().manual_seed(0)
    policy.offset[0, 0] = math.log(rate / (1 - rate))
    found = np.concatenate([cross_fitted(policy, 16, generator) for _ in range(1000)])
    assert np.ptp(found[:, 1]) < 1e-9 and within(found[:, 0], found[0, 1])
    slope, error = regression(found[:, 2], found[:, 0])
    assert abs(slope) < 3 * error
    manufactured, error = regression(found[:, 3], found[:, 0])
    assert abs(manufactured) > 10 * error


# ---------------------------------------------- geometry: vectors by hand ---------------------------------------------


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [  # n_gradients, cos_abs, cos_negative, interference, cos_signal
        ([[2.0, 0.0], [0.0, 3.0]], (2, 0.0, 0.0, 1.0, 0.0)),
        ([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]], (3, 1.0, 0.0, 3.0, 1.0)),
        ([[1.0, 0.0], [-1.0, 0.0]], (2, 1.0, 1.0, 0.0, -1.0)),
        ([[3.0, 4.0], [0.0, 0.0], [3.0, 0.0]], (2, 0.6, 0.0, (36 + 16) / 34, (18 / 6) / (34 / 3))),
        ([[1.0, 1.0]], (1, None, None, None, None)),
        ([[0.0, 0.0], [0.0, 0.0]], (0, None, None, None, None)),
    ],
)
def test_geometry_of_vectors_by_hand(vectors, expected):
    """Both halves alike, so that without the factor of a finite group all is signal."""
    vectors, G = torch.tensor(vectors, dtype=torch.float64), 3
    factor = 1 + 1 / (G - 1) ** 2
    found = grpo.gradient_geometry(vectors @ vectors.T, vectors.square().sum(1) * factor, G)
    names = ("n_gradients", "cos_abs", "cos_negative", "interference", "cos_signal")
    for name, value in zip(names, expected, strict=True):
        assert math.isnan(found[name]) if value is None else found[name] == pytest.approx(value), name
    assert math.isnan(found["signal_share"]) if expected[1] is None else found["signal_share"] == pytest.approx(1.0)


def test_predicted_gain_by_hand():
    std = torch.tensor([0.5, 0.25, 0.0])
    assert grpo.predicted_gain(torch.tensor([1.0, 1.0, 0.0]), std) == pytest.approx(0.5 * (2 + 4) / 2)
    assert grpo.predicted_gain(torch.tensor([3.0, 3.0]), torch.tensor([0.5, 0.5])) == 1.0
    assert math.isnan(grpo.predicted_gain(torch.tensor([0.0]), torch.tensor([0.0])))
    assert math.isnan(grpo.predicted_gain(torch.tensor([-1.0, 0.5]), torch.tensor([0.5, 0.5])))


def test_rank_correlation_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert grpo.rank_correlation(x, x.exp()) == pytest.approx(1.0) and grpo.rank_correlation(x, -x) == pytest.approx(
        -1.0
    )
    # ranks 1.5 1.5 3 4 against 1 2 3 4: covariance 4.5, variances 4.5 and 5
    assert grpo.rank_correlation(torch.tensor([0.0, 0.0, 5.0, 9.0]), x) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert math.isnan(grpo.rank_correlation(torch.ones(3), torch.arange(3.0)))
    assert math.isnan(grpo.rank_correlation(torch.ones(0), torch.ones(0)))


def test_sketches_preserve_inner_products_without_bias():
    tensors = [[torch.randn(3, 50, generator=torch.Generator().manual_seed(i)), torch.randn(7)] for i in (1, 2)]
    exact = float(sum((a * b).sum() for a, b in zip(*tensors, strict=True)))
    products = []
    for seed in range(600):
        a, b = (grpo.count_sketch(vector, 16, seed) for vector in tensors)
        products.append(float(a @ b))
    assert a.shape == (16,) and within(products, exact)
    alone = grpo.count_sketch(tensors[0], 4096, 5)  # nothing to add up: signs and places only
    assert alone.norm() ** 2 == pytest.approx(float(sum(t.square().sum() for t in tensors[0])), rel=1e-5)


# ------------------------------------------------- curvature of a model ----------------------------------------------


@pytest.fixture(scope="session")
def prepared(cache, problems):
    """The tiny model after 60 warm-start steps, with a sampled batch of 40 prompts and 16 completions."""
    config = Config(sft_steps=60, cache=cache, prompts=40, group=16)
    policy = grpo.load_policy(config, problems, grpo.Team())
    encoded = grpo.encode_problems(problems, policy.model, policy.tokenizer, config)
    return policy, grpo.sample_batch(policy, 0, encoded, even, config), config


def test_the_probe_equals_the_exact_hessian_vector_product(prepared):
    """Against double backward through full sequences in float64, same samples, same direction."""
    policy, batch, config = prepared
    exact = GPT2LMHeadModel(policy.model.config).double().eval()
    exact.load_state_dict(policy.model.state_dict())
    exact.set_attn_implementation("eager")
    parameters, found, wanted = list(exact.parameters()), [], []
    weights = grpo.token_weights(batch.sampled.lengths, "sequence")
    for p in range(40):
        if not batch.rewards[p, grpo.halves(16)[0]].std():
            continue
        measured = grpo.Measured.of(policy, batch, config)
        grpo.measured_backward(policy, batch, p, weights, config, measured, True)
        policy.model.zero_grad(set_to_none=False)
        rows = grpo.halves(16)[1]
        rewards = batch.rewards[p, rows]
        advantages = (rewards - rewards.mean()) * 8 / 7
        tokens, lengths = batch.sampled.tokens[p, rows], batch.sampled.lengths[p, rows]
        prompt = torch.tensor(batch.prompts[p]).expand(8, -1)
        logits = exact(torch.cat([prompt, tokens], 1), use_cache=False).logits[:, prompt.shape[1] - 1 : -1]
        logprobs = torch.log_softmax(logits, -1).gather(2, tokens[..., None])[..., 0]
        sums = (logprobs * (torch.arange(tokens.shape[1]) < lengths[:, None])).sum(1)
        surrogate = (advantages * (sums - sums.detach()).exp()).mean()
        direction = measured.gradients[p, 0].double() / measured.gradients[p, 0].double().norm()
        first = torch.cat([g.flatten() for g in torch.autograd.grad(surrogate, parameters, create_graph=True)])
        second = torch.autograd.grad(first @ direction, parameters)
        wanted.append(float(torch.cat([g.flatten() for g in second]) @ direction))
        found.append(float(measured.curvature[p, 0]))
    found, wanted = np.array(found), np.array(wanted)
    assert len(found) >= 32 and np.isfinite(found).all()
    assert np.corrcoef(found, wanted)[0, 1] >= 0.999
    assert (found[wanted == 0] == 0).all()  # where all of the other half were rewarded alike
    assert np.median(np.abs(found[wanted != 0] / wanted[wanted != 0] - 1)) <= 0.02


def test_measured_gradients_are_the_leave_one_out_prompt_gradients(prepared):
    """And the halves add up to the training gradient, with prompts weighted by their scale."""
    policy, batch, config = prepared
    weights, p = grpo.token_weights(batch.sampled.lengths, "token"), 0
    while not batch.advantages[p].any():
        p += 1
    measured = grpo.Measured.of(policy, batch, config)
    grpo.measured_backward(policy, batch, p, weights, config, measured, False)
    trained = flat_gradient(policy.model.parameters())
    policy.model.zero_grad(set_to_none=False)
    rewards, tokens, lengths = batch.rewards[p], batch.sampled.tokens[p], batch.sampled.lengths[p]
    expected = []
    for rows in (range(8), range(8, 16)):
        total = 0.0
        for i in rows:
            others = (rewards.sum() - rewards[i]) / 15
            total = (
                total
                + (rewards[i] - others)
                * naive_logprobs(policy.model, batch.prompts[p], tokens[i, : lengths[i]].tolist()).sum()
            )
        gradient = torch.autograd.grad(total / 8, list(policy.model.parameters()))
        expected.append(torch.cat([g.flatten() for g in gradient]))
        assert relative_error(measured.gradients[p, len(expected) - 1], expected[-1]) < 1e-5
    scale = float(batch.advantages[p].abs().max() / (rewards - rewards.mean()).abs().max())
    update = (
        -(expected[0] + expected[1])
        / 2
        * 15
        / 16
        * scale
        * 16
        / lengths.shape[0]
        * 16
        / int(batch.sampled.lengths.sum())
    )
    assert relative_error(trained, update) < 1e-5


def test_the_correction_makes_small_groups_agree_with_large_ones(prepared, problems):
    """Squared norm and cosine of 12 prompts from groups of 16, 30 draws, and of 512, three draws."""
    policy, _, config = prepared
    encoded = grpo.encode_problems(problems, policy.model, policy.tokenizer, config)[:12]
    found = {}
    for G, draws in ((16, 30), (512, 3)):
        config = replace(config, group=G, prompts=12, micro_batch=4096)
        rows = []
        for step in range(draws):
            batch = grpo.sample_batch(policy, step, encoded, even, config)
            weights, measured = (
                grpo.token_weights(batch.sampled.lengths, "sequence"),
                grpo.Measured.of(policy, batch, config),
            )
            for p in range(12):
                if batch.advantages[p].any():
                    grpo.measured_backward(policy, batch, p, weights, config, measured, False)
                    policy.model.zero_grad(set_to_none=False)
            order = np.argsort(batch.ids)
            halves = measured.gradients[order].double()
            gram = halves.mean(1) @ halves.mean(1).T
            signal = float((halves[:, 0] * halves[:, 1]).sum(1).mean()) / (1 + 1 / (G - 1) ** 2)
            rows.append((signal, float(gram.trace()) / 12, float(gram.sum() - gram.trace()) / (12 * 11)))
        found[G] = np.array(rows)
    small, large = found[16], found[512].mean(0)
    assert within(small[:, 0], large[0]) and not within(small[:, 1], large[0])
    # A ratio of means differs from the truth by the mean of what is left over, to first order.
    truth = large[2] / large[0]
    assert within(small[:, 2] - truth * small[:, 0], 0.0) and not within(small[:, 2] - truth * small[:, 1], 0.0)


def test_sketched_cosines_of_real_gradients_are_within_two_hundredths(prepared):
    policy, batch, config = prepared
    measured = grpo.Measured.of(policy, batch, config)
    weights = grpo.token_weights(batch.sampled.lengths, "sequence")
    for p in range(40):
        if batch.advantages[p].any():
            grpo.measured_backward(policy, batch, p, weights, config, measured, False)
            policy.model.zero_grad(set_to_none=False)
    whole = measured.gradients.sum(1)
    whole = whole[whole.norm(dim=1) > 0]
    shapes = [parameter.shape for parameter in policy.model.parameters()]
    sketches = []
    for vector in whole:
        parts = vector.split([math.prod(shape) for shape in shapes])
        sketches.append(
            grpo.count_sketch([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], 65536, 0)
        )
    pairs = torch.ones(len(whole), len(whole)).triu(1).bool()
    exact, sketched = (torch.nn.functional.normalize(x) for x in (whole, torch.stack(sketches)))
    error = ((exact @ exact.T).abs() - (sketched @ sketched.T).abs()).abs()[pairs]
    assert len(whole) > 30 and float((error < 0.02).double().mean()) >= 0.95


def test_where_rounding_would_drown_the_curvature_there_is_none():
    generator = torch.Generator().manual_seed(0)

    def noise(parameters):
        return -500.0 + 1e-4 * torch.randn(4, generator=generator)

    def long(parameters):  # sums too long for float32
        return -1e6 + parameters["a"].sum().repeat(4)

    theta, v = {"a": torch.zeros(3)}, {"a": torch.ones(3)}
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert math.isnan(grpo.directional_curvature(noise, theta, v, advantages, 1.0))
    assert math.isnan(grpo.directional_curvature(long, theta, v, advantages, 1.0))
    assert math.isnan(grpo.directional_curvature(long, theta, {"a": torch.zeros(3)}, advantages, 1.0))


@pytest.mark.parametrize("slope", [1e-3, 1.0, 1e3])
def test_the_probe_finds_its_own_step(slope):
    """log pi_i = c_i t + d_i t^2 / 2 along v: mean A (c^2 + d) by hand, whatever the first guess of the step."""
    c, d = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 0.0, -4.0])
    curve = lambda parameters: c * parameters["a"][0] + d * parameters["a"][0] ** 2 / 2 - 1  # noqa: E731
    advantages = torch.tensor([1.0, 2.0, -0.5])
    found = grpo.directional_curvature(curve, {"a": torch.zeros(2)}, {"a": torch.tensor([5.0, 0.0])}, advantages, slope)
    assert found == pytest.approx((1.5 + 2 * 4.0 - 0.5 * 5) / 3, rel=0.01)


def test_what_measuring_adds_to_the_logs(train, settings):
    train(Config(**settings, probe_every=4))
    metrics, prompts = read(settings["out"]), read(settings["out"], "prompts.jsonl")
    keys = {"n_gradients", "cos_abs", "cos_negative", "interference", "signal_share", "cos_signal", "predicted_gain",
            "predicted_gain_signal"}  # fmt: skip
    assert all(keys <= set(row) for row in metrics[:-1])
    assert (
        [row["step"] for row in metrics if "curvature" in row]
        == [0, 4, 8]
        == [row["step"] for row in metrics if "curvature_corr" in row]
    )
    for row in prompts:
        assert {"grad_norm", "cos_update", "grad_sq_signal"} <= set(row) and ("curvature" in row) == (
            row["step"] % 4 == 0
        )
        assert (row["grad_norm"] > 0) == (row["reward_std"] > 0) and (row["cos_update"] is None) == (
            row["reward_std"] == 0
        )
        rates = row.get("pass_rate_half", [])
        assert not rates or (3 * rates[0] + 2 * rates[1]) / 5 == pytest.approx(row["pass_rate"])
        for curvature, std, rate in zip(row.get("curvature", []), row.get("reward_std_half", []), rates, strict=True):
            assert (curvature is None) == (std == 0) and std == pytest.approx((rate * (1 - rate)) ** 0.5)
    for step, line in enumerate(metrics[:-1]):
        mine = [row for row in prompts if row["step"] == step]
        assert line["n_gradients"] == sum(row["reward_std"] > 0 for row in mine)
        if line["n_gradients"] >= 2:
            squares = [row["grad_norm"] ** 2 for row in mine]
            assert line["signal_share"] == pytest.approx(sum(row["grad_sq_signal"] for row in mine) / sum(squares))
            gain = (
                0.5 * sum(row["grad_norm"] ** 2 / row["reward_std"] for row in mine if row["reward_std"]) / sum(squares)
            )
            assert line["predicted_gain"] == pytest.approx(gain)


def test_the_probe_leaves_the_training_as_it_was(train, settings):
    ends = []
    for every in (4, 1000):
        out = f"{settings['out']}-{every}"
        train(Config(**settings | {"probe_every": every, "out": out}))
        ends.append(load_file(Path(out) / "model" / "model.safetensors"))
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@pytest.mark.parametrize("changed", [{"agg": "mean"}, {"kl": 0.1}])
def test_where_the_loss_is_another_there_is_no_geometry(train, settings, changed):
    train(Config(**settings | {"steps": 1} | changed))
    line, row = read(settings["out"])[0], read(settings["out"], "prompts.jsonl")[0]
    assert line["grad_norm"] > 0 and not {"cos_abs", "curvature", "n_gradients", "cos_update"} & (set(line) | set(row))


def test_measuring_can_be_turned_off(train, settings):
    train(Config(**settings | {"steps": 2, "geometry_every": 0, "probe_every": 0}))
    assert not {"cos_abs", "curvature"} & set(read(settings["out"])[0])


@pytest.mark.parametrize("group", [2, 3, 5])
def test_small_and_odd_groups_are_measured_as_far_as_they_can_be(train, settings, group):
    train(Config(**settings | {"group": group, "steps": 3, "prompts": 8, "probe_every": 1}))
    rows = [row for row in read(settings["out"], "prompts.jsonl") if row["reward_std"] > 0]
    sizes = [group // 2, (group + 1) // 2]  # of the half that the curvature is measured on
    for half, size in enumerate(sizes):
        mixed = [row["reward_std_half"][half] > 0 for row in rows]
        assert [row["curvature"][half] is not None for row in rows] == [m and size > 1 for m in mixed]


# ------------------------------------------------------- faults ------------------------------------------------------


def assert_same_run(out: str, whole: str) -> None:
    """Logs, weights and moments of the one equal those of the other, to the bit."""
    for name in grpo.LOGS:
        assert read(out, name) == read(whole, name)
    ours, theirs = (load_file(Path(path) / "checkpoint" / "state.safetensors") for path in (out, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def signalling(number: int, after: int, times: int = 1):
    """A reward that sends this process a signal at its `after`-th call."""
    calls = SimpleNamespace(left=after)

    def reward(completion, answer):
        calls.left -= 1
        for _ in range(times if calls.left == 0 else 0):
            os.kill(os.getpid(), number)
            time.sleep(0.05)  # two at once would count as one
        return even(completion, answer)

    return reward


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(train, settings, number, status, capfd):
    settings["eval_every"] = 0
    train(Config(**settings | {"out": settings["out"] + "-whole"}))
    before = signal.getsignal(number)
    with pytest.raises(grpo.Interrupted, match="--resume") as stopped:  # 40 rewards of the evaluation, 15 a step
        train(Config(**settings), reward=signalling(number, 40 + 15 * 5 + 7))
    assert stopped.value.status == status and signal.getsignal(number) == before
    assert len(read(settings["out"])) == 6 and "stopping after this step" in capfd.readouterr().err
    train(Config(**settings | {"resume": True}))
    assert_same_run(settings["out"], settings["out"] + "-whole")


def test_a_second_ctrl_c_stops_at_once(train, settings):
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background shells have it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            train(Config(**settings), reward=signalling(signal.SIGINT, 40 + 15 + 7, times=2))
    finally:
        signal.signal(signal.SIGINT, former)
    assert len(read(settings["out"])) == 1


@slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_line_says_how_to_resume(number, status, tmp_path, cache):
    out = tmp_path / "run"
    line = [
        sys.executable,
        grpo.__file__,
        "--out",
        str(out),
        "--cache",
        cache,
        "--sft-steps",
        "60",
        "--eval-problems",
        "9",
    ]
    process = subprocess.Popen([*line, "--steps", "5000"], stderr=subprocess.PIPE, text=True)
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < 3:
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status and "--resume goes on from there" in error and "Traceback" not in error
    done = len(read(out))
    assert subprocess.run([*line, "--steps", str(done + 1), "--resume"]).returncode == 0
    assert [row["step"] for row in read(out)] == list(range(done + 2))


def forked_run(settings: dict) -> None:
    """A run in a process of its own; nothing printed."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    grpo.train(Config(**settings), grpo.make_arith(1, size=300)[0], even)


@pytest.mark.parametrize(("kills", "steps"), [(2, 10), pytest.param(50, 30, marks=slow)])
def test_killed_at_random_moments_a_run_resumes_to_the_bit(settings, kills, steps):
    """SIGKILL at seeded moments, until `kills` of them have hit; a checkpoint is written at every second step."""
    server = multiprocessing.get_context("forkserver")  # forks from a process that has imported torch, and done no more
    server.set_forkserver_preload(["grpo", "test_grpo"])

    def started(**changes):
        process = server.Process(target=forked_run, args=(settings | changes,))
        process.start()
        return process

    settings |= {"save_every": 2, "steps": steps}
    for name in ("first", "whole"):  # the second for its duration, with all that the first has to prepare
        began = time.perf_counter()
        started(out=f"{settings['out']}-{name}").join()
    length, rng, hits, runs = time.perf_counter() - began, np.random.default_rng(kills), 0, 0
    while hits < kills:
        runs += 1
        out, resume = f"{settings['out']}-{runs}", False
        while True:
            process = started(out=out, resume=resume)
            process.join(rng.uniform(0, length) if hits < kills else None)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            hits += 1
            resume = (Path(out) / "config.json").exists()
        assert process.exitcode == 0
        assert_same_run(out, f"{settings['out']}-whole")


@contextmanager
def files_no_longer_than(size: int):
    """A disk that is full, as a limit on the size of a file that is written."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def test_a_full_disk_is_one_line_and_costs_nothing(train, settings):
    train(Config(**settings | {"out": settings["out"] + "-whole"}))
    checkpoint = Path(settings["out"]) / "checkpoint" / "state.safetensors"
    train(Config(**settings | {"steps": 4}))
    first = checkpoint.read_bytes()
    # Enough for the logs, not for a checkpoint; then not for the logs.
    for size, message in (
        (len(first) // 2, "cannot write a checkpoint in .*; the previous one is whole"),
        (
            (Path(settings["out"]) / "prompts.jsonl").stat().st_size,
            "cannot write .*(metrics|prompts).jsonl: File too large",
        ),
    ):
        with files_no_longer_than(size), pytest.raises(RunError, match=f"^{message}.*$"):
            train(Config(**settings | {"resume": True}))
        assert checkpoint.read_bytes() == first and [path.name for path in checkpoint.parent.iterdir()] == [
            checkpoint.name
        ]
    train(Config(**settings | {"resume": True}))
    assert_same_run(settings["out"], settings["out"] + "-whole")


def test_logits_that_are_not_numbers_skip_the_step(train, settings, monkeypatch):
    count, whole = SimpleNamespace(rollouts=0), grpo.rollout

    def spoiled(policy, prompts, uniforms, temperature):
        count.rollouts += temperature > 0
        if count.rollouts == 3 + 3:  # one is the model's check, two are the evaluation's
            with monkeypatch.context() as patch:
                patch.setattr(grpo, "sample_tokens", lambda logits, *more: sample_tokens(logits * math.nan, *more))
                return whole(policy, prompts, uniforms, temperature)
        return whole(policy, prompts, uniforms, temperature)

    sample_tokens = grpo.sample_tokens
    monkeypatch.setattr(grpo, "rollout", spoiled)
    train(Config(**settings | {"eval_every": 0}))
    metrics = read(settings["out"])
    assert [row["skipped"] for row in metrics[:-1]] == [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert metrics[2]["entropy"] is None and metrics[2]["grad_norm"] is None and metrics[-1]["eval_greedy"] is not None


def test_a_reward_that_hangs_names_the_completion(train, settings):
    def hanging(completion, answer):
        time.sleep(60)

    began = time.perf_counter()
    with pytest.raises(RunError, match="no answer within 0.2 seconds.* on completion '.*', answer '[0-9]{4}'"):
        train(Config(**settings | {"reward_timeout": 0.2}), reward=hanging)
    assert time.perf_counter() - began < 20 and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


class Marker:
    """Unpickled it leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_code_of_a_model_is_executed(train, settings, tmp_path):
    mark, folder = tmp_path / "executed", tmp_path / "model"
    model, tokenizer = grpo.tiny_model()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    foreign = {"model_type": "foreign", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps(foreign))
    (folder / "code.py").write_text(f"import pathlib; pathlib.Path({str(mark)!r}).touch()")
    with pytest.raises(InputError, match="cannot load model"):
        train(Config(**settings | {"model": str(folder), "sft_steps": 0}))
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"weight": Marker(mark)}, file)
    with pytest.raises(InputError, match="cannot load model"):
        train(Config(**settings | {"model": str(folder), "sft_steps": 0}))
    assert not mark.exists()


# What answers are made of, what breaks parsers, and what takes for ever if one lets it.
PIECES = st.sampled_from(
    ["\\boxed{", "####", "{", "}", "\\frac", "\\sqrt[", "^{", "!", "9" * 10**6, "1e999999", "٣", "½", "\0", "\ud800",
     "\\left(", "\\begin{pmatrix}", "&", "\\\\", "=", "$", ",", ".", "-", "/", "0", "7", "x", " ", "\n", "\\int",
     "1,200", "%", "\\text{", "^" * 50, "(" * 300, "é" * 10**6, "9!!!!!!!!", "2^{3^{4^{5^6}}}"]
)  # fmt: skip
PARTS = st.one_of(st.lists(PIECES, max_size=12), st.text(max_size=60))  # to be joined
TEXTS = PARTS.map("".join)
thorough = pytest.mark.parametrize("examples", [100, pytest.param(10_000, marks=slow)])


def peak_memory() -> float:
    """Of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


@thorough
def test_grade_bears_anything(examples):
    before = peak_memory()

    @hypothesis.settings(max_examples=examples, deadline=3000, database=None, derandomize=True)
    @hypothesis.given(PARTS, PARTS)  # hypothesis keeps what it makes: joined texts would be gigabytes of its own
    def check(completion, answer):
        assert grpo.grade("".join(completion), "".join(answer)) in (0.0, 1.0)

    check()
    assert peak_memory() - before < 0.5


@thorough
def test_the_data_loader_bears_anything(examples):
    """Rows of generated texts are taken, or refused in one line that names the row."""
    value = st.one_of(TEXTS, st.none(), st.integers(-(2**62), 2**62), st.floats())
    names = st.sampled_from(["question", "problem", "answer", "solution", "x"])
    rows = st.lists(names, min_size=1, max_size=3, unique=True).flatmap(
        lambda columns: st.lists(st.fixed_dictionaries(dict.fromkeys(columns, value)), min_size=1, max_size=4)
    )

    @hypothesis.settings(max_examples=examples, deadline=3000, database=None, derandomize=True)
    @hypothesis.given(rows)
    def check(rows):
        try:
            raw = Dataset.from_list(rows)
        except Exception:  # of mixed types: the library's own refusal, see the test of files
            return
        try:
            taken = grpo.standard_columns(raw, "file", graded=True)
        except InputError as error:
            assert str(error).startswith("file") and "\n" not in str(error)
        else:
            assert all(row["question"].strip() and 0 < len(row["answer"]) <= grpo.MAX_SPAN for row in taken)

    check()


@thorough
def test_files_of_anything_load_or_are_refused_in_one_line(examples, tmp_path):
    lines = st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.text(max_size=40).map(lambda text: text.encode("utf-8", "replace")),
            st.builds(lambda q, a: json.dumps({"question": q, "answer": a}).encode(), TEXTS, TEXTS),
        ),
        max_size=6,
    )
    count, rows = examples // 50, [0]

    @hypothesis.settings(max_examples=count, deadline=None, database=None, derandomize=True)
    @hypothesis.given(lines)
    def check(lines):
        rows[0] += 1
        path = tmp_path / f"{rows[0]}.jsonl"
        path.write_bytes(b"\n".join(lines))
        try:
            grpo.load_problems(Config(task="gsm8k", data=str(path)), None, grpo.grade)
        except InputError as error:
            assert "\n" not in str(error)

    check()


@thorough
def test_analysis_bears_damaged_logs(examples, tmp_path):
    path = write_run(tmp_path / "run", saturating(50, 40))
    whole, intact = (path / "metrics.jsonl").read_bytes().splitlines(), analyze.read_run(path).log
    damage = st.lists(
        st.tuples(
            st.integers(0, 40),
            st.one_of(
                st.binary(max_size=30),
                st.builds(
                    lambda k, v: json.dumps({"step": k, "reward_std": v, "cos_abs": v}).encode(),
                    st.integers(-5, 60),
                    st.one_of(st.floats(), TEXTS, st.integers(), st.none()),
                ),
            ),
        ),
        max_size=5,
    )

    @hypothesis.settings(max_examples=examples // 10, deadline=None, database=None, derandomize=True)
    @hypothesis.given(damage)
    def check(damage):
        lines = list(whole)
        for at, line in damage:
            lines[at] = line
        (path / "metrics.jsonl").write_bytes(b"\n".join(lines))
        log = analyze.read_run(path).log
        named = {row["step"] for row in analyze.read_lines(path / "metrics.jsonl")[0] if "pass_rate" not in row}
        left = [step for step in range(40) if step not in named | {at for at, _ in damage}]
        both = log.loc[left, ["reward_std", "sampled"]], intact.loc[left, ["reward_std", "sampled"]]
        assert len(left) >= 30 and both[0].equals(both[1])
        found = analyze.detect_phases(log["reward_std"], log["sampled"], log["pass_rate"], log.index, draws=2)
        assert not found["found"] and found["reason"]

    check()


# -------------------------------------------------- several processes -------------------------------------------------


def fingerprint(completion: str, answer: str) -> float:
    """A reward in [0, 1) that tells almost any two completions apart: equal rewards mean equal tokens."""
    return zlib.crc32(completion.encode()) % 9973 / 9973


def one_rank(settings: dict, rank: int, size: int, port: int, fault: str, folder: str) -> None:
    """One of the processes that torchrun would start; its error goes to a file. fault: what befalls the last one."""
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    calls = SimpleNamespace(left=40)

    def reward(completion, answer):
        calls.left -= 1
        if fault and rank == size - 1 and calls.left == 0:
            os.kill(os.getpid(), signal.SIGKILL) if fault == "dies" else time.sleep(60)
        return fingerprint(completion, answer)

    try:
        grpo.train(Config(**settings), grpo.make_arith(1, size=300)[0], reward)
    except Exception as error:
        (Path(folder) / f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
        sys.exit(1)


def run_team(settings: dict, size: int, folder: Path, fault: str = "") -> list[int]:
    """Exit statuses of a run in `size` processes."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["grpo", "test_grpo"])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        server.Process(target=one_rank, args=(settings, rank, size, port, fault, str(folder))) for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes if not fault else processes[:-1]:
        process.join(120)
    processes[-1].kill()
    processes[-1].join()
    return [process.exitcode for process in processes]


@pytest.mark.parametrize(
    ("norm", "agg", "sizes"),
    [("batch", "token", [2])]
    + [
        pytest.param(norm, agg, [2, 3], marks=slow)
        for norm in ("none", "std", "var", "batch")
        for agg in ("sequence", "mean", "token")
    ],
)
def test_the_number_of_processes_changes_nothing(settings, norm, agg, sizes, tmp_path):
    """Four prompts in 1, 2 and 3 processes: the same tokens at every step, the same weights, the same measurements."""
    settings |= dict(norm=norm, agg=agg, steps=5, prompts=4, group=6, optimizer="sgd", lr=0.02, probe_every=2)
    runs = {}
    for size in (1, *sizes):
        out = str(tmp_path / f"of-{size}")
        assert run_team(settings | {"out": out}, size, tmp_path) == [0] * size
        weights = load_file(Path(out) / "checkpoint" / "state.safetensors")
        runs[size] = (read(out), read(out, "prompts.jsonl"), read(out, "samples.jsonl"), weights)
    metrics, prompts, samples, weights = runs.pop(1)
    assert max(row["grad_norm"] for row in metrics[:-1]) > 0.01
    for others in runs.values():
        for ours, theirs in ((others[0], metrics), (others[1], prompts)):
            assert [row.keys() for row in ours] == [row.keys() for row in theirs]
            for a, b in zip(ours, theirs, strict=True):
                for key in a.keys() - {"logprob_gap", "curvature_corr"}:
                    left, right = (np.array(row[key], float) for row in (a, b))  # None becomes NaN
                    exact = key in ("reward", "prompt", "pass_rate", "eval_pass_rate", "eval_greedy", "length")
                    # A second difference of float32 keeps some percent of the usual size, a small one less of its own.
                    known = [np.ravel(r["curvature"]) for r in theirs if r.get("curvature") is not None]
                    usual = np.nanmax(np.abs(np.concatenate([[0.0], *known]).astype(float)))
                    size = 0.05 * usual if key == "curvature" else 1e-4
                    tolerance = dict(rtol=1e-12, atol=0) if exact else dict(rtol=1e-2, atol=size)
                    assert np.allclose(left, right, **tolerance, equal_nan=True), key
        assert others[2] == samples
        assert max(float((others[3][key] - weights[key]).abs().max()) for key in weights) < 1e-5


@pytest.mark.parametrize("fault", ["dies", pytest.param("hangs", marks=slow)])
def test_a_rank_that_fails_ends_the_run_on_all_and_is_named(settings, fault, tmp_path):
    """40 rewards in: after the evaluations' 6 and in the fourth step of 9; the checkpoint is that of step 2."""
    settings |= dict(
        prompts=4, group=6, optimizer="sgd", save_every=2, rank_timeout=5.0, reward_timeout=0.0, eval_every=0
    )
    whole = settings | {"out": settings["out"] + "-whole"}
    assert run_team(whole, 1, tmp_path) == [0]
    began = time.perf_counter()
    assert run_team(settings, 3, tmp_path, fault)[:2] == [1, 1]
    assert time.perf_counter() - began < 60
    assert "rank 0 waited for the others: [Rank 0]: Ranks 2 failed" in (tmp_path / "error-0").read_text()
    assert run_team(settings | {"resume": True}, 2, tmp_path) == [0, 0]
    ours, theirs = ([row["reward"] for row in read(path)[:-1]] for path in (settings["out"], whole["out"]))
    assert len(ours) == 10 and ours == pytest.approx(theirs, rel=1e-12)


def test_more_processes_than_prompts_are_refused(train, settings, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match="3 prompts a step are too few for 4 processes"):
        train(Config(**settings))


# ----------------------------------------------- command line and bad input -------------------------------------------


def command(*arguments: str) -> tuple[int, str]:
    """Exit status and standard error of the command line."""
    try:
        status = grpo.main(arguments)
    except SystemExit as exit:
        status = exit.code
    return status


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nrom", "std"], "unrecognized arguments: --nrom std"),
        (["--norm", "sd"], "invalid choice: 'sd'"),
        (["--group", "1"], "group is 1, below 2"),
        (["--group", "x"], "invalid int value: 'x'"),
        (["--lr", "nan"], "lr is nan"),
        (["--lr", "-1"], "lr is -1.0, below 0"),
        (["--temperature", "0"], "temperature is 0"),
        (["--prompts", "0"], "prompts is 0"),
        (["--data", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
        (["--instruction", "hi"], "has no {question}"),
        (["--model", "nowhere/at-all", "--max-new-tokens", "5"], "--model DIR --data FILE.jsonl"),
        (["--resume"], "no run to resume in"),
        (["--task", "gsm8k"], "cannot load openai/gsm8k"),
        (["--max-new-tokens", "500"], "has 8 tokens, with 500 new ones"),
        (["--out", "/dev/null/run"], "cannot write to /dev/null/run"),
        (["--device", "tpu9"], "device"),
        (["--rank-timeout", "0"], "rank_timeout is 0.0, below 1"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, tmp_path, monkeypatch, capsys, cache):
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # without a network, at once
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert command("--sft-steps", "1" if "--model" not in arguments else "0", "--cache", cache, *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("grpo.py: error: ") and message in error
    assert not list(tmp_path.rglob("*.*")) and not list(tmp_path.rglob("model"))


def test_data_files_that_cannot_be_used(tmp_path, capsys):
    file = tmp_path / "data.jsonl"
    for content, message in (
        ("", "cannot load"),
        ("{bad", "cannot load"),
        ('{"q": 1}\n', "no column question/problem"),
        ('{"question": "1+1=", "answer": "#### "}\n', "row 1: answer '####' cannot be graded"),
    ):
        file.write_text(content)
        arguments = ["--task", "gsm8k", "--data", str(file), "--out", str(tmp_path / "run")]
        assert command(*arguments) == 2 and not (tmp_path / "run" / "config.json").exists()
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("grpo.py: error: ") and message in error and str(file) in error


def test_help_shows_every_setting_and_its_default(capsys):
    assert command("--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for field in fields(Config):
        assert f"--{field.name.replace('_', '-')}" in shown and field.metadata["help"] in shown
        assert f"(default: {field.default})" in shown
    assert "--no-chat" in shown


def test_every_setting_is_checked_when_made_in_python():
    with pytest.raises(InputError, match="norm is 'mad', not one of none, std, var, batch"):
        Config(norm="mad")


@pytest.mark.parametrize("module", [grpo, analyze])
def test_functions_are_short_and_the_files_have_no_state(module):
    source = Path(module.__file__).read_text()
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if function.__module__ == module.__name__:
            assert len(inspect.getsourcelines(function)[0]) <= 60, name
    assert not re.search(r"^\s*global ", source, re.M) and ".cuda()" not in source


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_rollout_and_training_agree(train, settings):
    train(Config(**settings | dict(device="cuda", dtype="float32")))
    assert max(row["logprob_gap"] or 0.0 for row in read(settings["out"])[:-1]) < 1e-3


# ------------------------------------------------------ the claim -----------------------------------------------------


@slow
@pytest.mark.parametrize("norm", ["none", "std"])
@pytest.mark.parametrize("seed", range(5))
def test_the_default_run_learns(norm, seed, tmp_path):
    """The README's first command, both norms, five seeds: at least 0.25 gained and over 0.9 in the end."""
    out = tmp_path / "run"
    arguments = ["--norm", norm, "--seed", str(seed), "--out", str(out)]
    began = time.perf_counter()
    subprocess.run([sys.executable, grpo.__file__, *arguments], check=True, timeout=600)
    metrics = read(out)
    assert metrics[-1]["eval_pass_rate"] > max(0.9, metrics[0]["eval_pass_rate"] + 0.25)
    assert time.perf_counter() - began < 180


# ----------------------------------------------- analyze.py: the phases ----------------------------------------------


def ar_noise(rng: np.random.Generator, n: int, rho: float) -> np.ndarray:
    """AR(1) noise of deviation 1."""
    noise = rng.normal(size=n)
    for i in range(1, n):
        noise[i] = rho * noise[i - 1] + math.sqrt(1 - rho**2) * noise[i]
    return noise


def synthetic(kind: str, rng: np.random.Generator, n: int = 300):
    """(reward_std, orthogonality, pass_rate or None, true boundaries): noise of deviation 1, AR(1) up to 0.5."""
    t, rho, size = np.arange(n), rng.uniform(0, 0.5), rng.choice([1.0, 2.0, 4.0, 8.0, 20.0])
    if kind == "walk":
        return *np.cumsum(rng.normal(size=(2, n)), axis=1), None, None
    mean, truth, rates = np.zeros(n), None, None
    if kind == "phases":
        truth = [int(rng.integers(60, 130)), int(rng.integers(170, 240))]
        mean = -2.0 * ((t >= truth[0]).astype(float) + (t >= truth[1]))  # two shifts of two deviations of the noise
        rates = np.interp(t, [0, *truth, n], [0.3, 0.6, 0.7, 0.75]) + 0.03 * rng.normal(size=n)
    elif kind == "linear":
        mean = -size * t / n
    elif kind == "exponential":
        mean = size * np.exp(-t / rng.choice([15, 30, 60, 120, 300]))
    elif kind == "logistic":
        mean = size / (1 + np.exp((t - rng.uniform(50, 250)) / rng.choice([2, 5, 15, 40])))
    elif kind == "step and decay":  # one change of level, not two
        mean = -4.0 * (t >= rng.integers(60, 240)) + 4 * np.exp(-t / rng.choice([60, 120]))
    other = mean
    if kind == "levels and line":  # only one of the two has phases
        mean, other = -4.0 * ((t >= 100).astype(float) + (t >= 200)), -4.0 * t / n
    return mean + ar_noise(rng, n, rho), other + ar_noise(rng, n, rho), rates, truth


OTHERS = ("constant", "linear", "exponential", "logistic", "walk", "step and decay", "levels and line")


def detected(kind: str, count: int) -> list[tuple[dict, list[int] | None]]:
    """What is found in `count` synthetic series."""
    rng, found = np.random.default_rng(7), []
    for _ in range(count):
        *series, truth = synthetic(kind, rng)
        found.append((analyze.detect_phases(*series, draws=39), truth))
    return found


def assert_true_phases(found, share: float) -> None:
    close = [all(abs(a - b) <= 10 for a, b in zip(result["boundaries"], truth, strict=True)) for result, truth in found]
    assert np.mean(close) >= share and np.mean([result["found"] for result, _ in found]) >= share


def test_true_phases_are_found_and_a_decay_is_not():
    assert_true_phases(detected("phases", 5), 0.8)
    for kind in OTHERS:
        assert sum(result["found"] for result, _ in detected(kind, 2)) <= 0.1


@slow
@pytest.mark.parametrize("kind", ["phases", *OTHERS])
def test_phases_in_two_hundred_series(kind):
    found = detected(kind, 200)
    if kind == "phases":
        assert_true_phases(found, 0.9)
        covered = [
            low <= b <= high
            for result, truth in found
            for (low, high), b in zip(result["intervals"], truth, strict=True)
        ]
        assert np.mean(covered) >= 0.85  # of intervals of 95%
    else:
        assert np.mean([result["found"] for result, _ in found]) <= (0.1 if kind == "walk" else 0.05)
    if kind == "constant":  # the p-value is one: below 0.1 in a tenth of the series, give or take 3 deviations
        assert abs(np.mean([result["p_value"] <= 0.1 for result, _ in found]) - 0.1) < 3 * math.sqrt(0.09 / 200)


def test_the_split_is_the_best_of_all():
    rng, n, least = np.random.default_rng(0), 40, 5
    series = rng.normal(size=(n, 2)) + (np.arange(n) > 22)[:, None]

    def left(*breaks: int) -> float:
        edges = [0, *breaks, n]
        parts = [series[a:b] for a, b in zip(edges, edges[1:], strict=False)]
        return sum(float(((part - part.mean(axis=0)) ** 2).sum()) for part in parts)

    pairs = [(a, b) for a in range(least, n) for b in range(a + least, n - least + 1)]
    assert tuple(analyze.split(series, 3, least)) == min(pairs, key=lambda pair: left(*pair))
    assert analyze.split(series, 2, least) == [min(range(least, n - least + 1), key=left)]
    assert analyze.split(series, 1, least) == []
    fit = analyze.fitted_levels(series, [10, 30])
    assert np.allclose(
        fit[[0, 9, 10, 29, 30, 39], 0], np.repeat([series[a:b, 0].mean() for a, b in ((0, 10), (10, 30), (30, 40))], 2)
    )


def test_the_likelihood_is_the_largest_of_regression_with_ar_noise():
    rng, n = np.random.default_rng(1), 120
    y, columns = ar_noise(rng, n, 0.6) + np.linspace(0, 3, n), np.stack([np.ones(n), np.linspace(0, 1, n)], axis=1)

    def negative(x):  # conditional on the first value; x: two coefficients, rho
        noise = y - columns @ x[:2]
        return (n - 1) / 2 * math.log(np.mean((noise[1:] - x[2] * noise[:-1]) ** 2))

    best = optimize.minimize(negative, [0.0, 0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-9})
    assert analyze.log_likelihood(y, columns) == pytest.approx(-best.fun, abs=1e-3)


def test_boundaries_are_in_steps_and_nan_is_left_out():
    *series, truth = synthetic("phases", np.random.default_rng(3))
    detect_phases = partial(analyze.detect_phases, draws=39)
    whole = detect_phases(*series)
    assert whole["found"] and "to III" in whole["reason"] and len(whole["levels"]) == 3
    apart = detect_phases(*series, steps=np.arange(300) * 25)
    assert apart["boundaries"] == [25 * step for step in whole["boundaries"]]
    padded = [np.full(600, math.nan) for _ in series]
    for wide, column in zip(padded, series, strict=True):
        wide[::2] = column
    assert detect_phases(*padded)["boundaries"] == [2 * step for step in whole["boundaries"]]
    long = detect_phases(*(np.repeat(column, 4) for column in series))  # averaged to 300 again
    assert long["boundaries"] == [4 * step for step in whole["boundaries"]]


def test_what_fails_is_said():
    detect_phases = partial(analyze.detect_phases, draws=39)
    rng = np.random.default_rng(0)
    sigma, angle, rates, _ = synthetic("phases", rng)
    rose = detect_phases(sigma, -angle, rates)
    assert re.search(r"^orthogonality did not fall: \+(3\.[5-9]|4\.[0-4])", rose["reason"]) and not rose["found"]
    late = detect_phases(sigma, angle, 1 - rates[::-1])
    assert late["reason"].startswith("the pass rate does not rise fastest in I: +")
    assert "the pass rate was not checked" in detect_phases(sigma, angle)["reason"]
    decay = detect_phases(*(4 * np.exp(-np.arange(300) / 60) + ar_noise(rng, 300, 0) for _ in range(2)))
    assert not decay["found"] and re.search(r"reward deviation: (exponential|logistic) beats", decay["reason"])
    order = rng.permutation(300)
    shuffled = detect_phases(sigma[order], angle[order], rates[order])
    assert shuffled["segments"] == 1 and not shuffled["found"] and shuffled["reason"].startswith("one segment")


@pytest.mark.parametrize(
    ("sigma", "angle", "reason"),
    [
        (np.arange(29.0), np.arange(29.0), "29 steps have both measures, 30 are needed"),
        ([], [], "0 steps have both measures"),
        (np.full(50, math.nan), np.arange(50.0), "0 steps have both measures"),
        (np.full(50, 0.25), np.arange(50.0), "constant: reward deviation"),
        (np.zeros(50), np.zeros(50), "constant: reward deviation and orthogonality"),
    ],
)
def test_series_without_an_answer(sigma, angle, reason):
    result = analyze.detect_phases(sigma, angle)
    assert reason in result["reason"] and not result["found"] and result["boundaries"] == []


def test_series_of_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match=r"unequal lengths: \(40,\), \(39,\)"):
        analyze.detect_phases(np.zeros(40), np.zeros(39))


# ------------------------------------------ analyze.py: law and comparison -------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "sign", "verdict"), [(1.0, 1, "agrees with 1"), (2.0, -1, "agrees with 2"), (3.5, -1, "neither")]
)
def test_an_exact_power_law_is_recovered(alpha, sign, verdict):
    sigma = np.tile(np.sqrt(np.array([1, 2, 3, 4]) * np.array([7, 6, 5, 4])) / 8, 50)
    law = analyze.curvature_law(sigma, sigma**2, sign * 5 * sigma**alpha + 0 * sigma, np.arange(200) // 8)
    assert law["alpha"] == law["alpha_raw"] == pytest.approx(alpha, abs=0.011)  # the grid's step is 0.02
    assert law["verdict"].startswith(verdict) and [row["n"] for row in law["bins"]] == [50] * 4
    assert [row["mean"] for row in law["bins"]] == pytest.approx(list(sign * 5 * sigma[:4] ** alpha))
    assert [row["envelope"] for row in law["bins"]] == pytest.approx(list(5 * sigma[:4] ** alpha))


def halves_of_prompts(rates: np.ndarray, rng: np.random.Generator, power: float = 2.0):
    """Sigma of one half of eight 0/1 rewards; unbiased variance of the other; a curvature, -sigma^power and noise."""
    one, other, true = rng.binomial(8, rates) / 8, rng.binomial(8, rates) / 8, np.sqrt(rates * (1 - rates))
    kept = (one > 0) & (one < 0.5)
    variance = other * (1 - other) * 8 / 7
    curvature = -(variance if power == 2 else true**power) * (1 + rng.normal(size=len(rates)))
    return np.sqrt(one * (1 - one))[kept], variance[kept], curvature[kept]


@pytest.mark.parametrize(("power", "verdict"), [(1.0, "agrees with 1"), (2.0, "agrees with 2")])
def test_the_law_of_prompts_is_found_through_the_noise_of_sigma(power, verdict):
    rng = np.random.default_rng(0)
    sigma, variance, curvature = halves_of_prompts(rng.uniform(0.02, 0.45, 20_000), rng, power)
    law = analyze.curvature_law(sigma, variance, curvature, np.arange(len(sigma)) // 16)
    low, high = law["alpha_interval"]
    assert low <= power <= high and high - low < 0.8 and law["verdict"] == verdict
    assert law["alpha_raw"] < 0.7 * power  # the noise of sigma makes it flatter


def test_prompts_that_are_all_alike_make_no_law():
    rng = np.random.default_rng(0)
    sigma, variance, curvature = halves_of_prompts(np.full(20_000, 0.25), rng)
    law = analyze.curvature_law(sigma, variance, curvature, np.arange(len(sigma)) // 16)
    low, high = law["alpha_raw_interval"]
    assert low <= 0 <= high < 1 and law["verdict"] == "undetermined"
    few = analyze.curvature_law(*(np.full(20, 0.4),) * 3, np.arange(20))
    assert few["verdict"] == "undetermined" and few["reason"].startswith("1 values of sigma")
    signs = analyze.curvature_law(sigma, variance, np.where(sigma > 0.4, 1.0, -1.0), np.arange(len(sigma)))
    assert signs["verdict"] == "no power law, the mean changes its sign"


def test_every_curvature_is_in_the_bin_of_its_sigma():
    """Halves of 32 have more values of sigma than bins; the smallest, sqrt(31)/32, is no round number."""
    k = np.repeat(np.arange(1, 17), 50)  # right completions
    sigma = np.sqrt(k * (32 - k)) / 32
    law = analyze.curvature_law(sigma, sigma**2, -(sigma**2), np.arange(len(sigma)))
    assert sum(b["n"] for b in law["bins"]) == len(sigma) and law["bins"][0]["sigma"] == pytest.approx(
        (math.sqrt(31) + math.sqrt(60)) / 64, abs=1e-8)  # the lowest eighth: k = 1 and 2
    assert law["alpha"] == pytest.approx(2, abs=0.021)


def test_a_law_that_changes_during_training_is_no_law(tmp_path):
    """One exponent in each third of the steps; what is pooled lies between."""
    run = analyze.read_run(write_run(tmp_path / "run", saturating(50, 300)))
    rng, step = np.random.default_rng(0), np.repeat(np.arange(300), 8)
    sigma = np.tile(np.sqrt(np.array([1, 2, 3, 4]) * np.array([7, 6, 5, 4])) / 8, 600)
    for alphas, verdict in (((1, 1, 1), "agrees with 1"), ((0.2, 2, 2), "no single power law, α changes")):
        curvature = -(sigma ** np.repeat(alphas, 800)) * rng.uniform(0.9, 1.1, 2400)
        halves = pd.DataFrame({"step": step, "rate": 0.8, "sigma": sigma, "variance": sigma**2, "curvature": curvature})
        law = analyze.curvature_laws([replace(run, halves=halves)])["above"]
        assert law["verdict"].startswith(verdict)
        assert [third[0] for third in law["thirds"]] == pytest.approx(alphas, abs=0.1)


def test_a_bootstrap_that_misses_bins_has_no_interval():
    """Each value of sigma was measured in one cluster: few draws have them all."""
    sigma = np.repeat(np.linspace(0.1, 0.5, 8), 12)
    law = analyze.curvature_law(sigma, sigma**2, -sigma, np.repeat(np.arange(8), 12), seed=2)
    assert (law["verdict"], law["reason"], law["bins"]) == ("undetermined", "too few probes for an interval", [])


def test_windows_stand_at_the_middle_of_their_steps():
    series = pd.Series(np.arange(301.0) ** 2)  # 27 windows of 11 steps, and one of 4
    means = analyze.windows(series)
    assert means.index[0] == 5 and means.index[-1] == 298.5
    assert means.iloc[-1] == pytest.approx(np.mean(np.arange(297.0, 301) ** 2))


def test_means_and_their_intervals():
    assert analyze.mean_interval([1.0, 2.0, 3.0]) == pytest.approx([2, 2 - 2.4841, 2 + 2.4841], abs=1e-4)  # t: 4.3027
    mean, low, high = analyze.mean_interval([1.0, math.nan, 3.0])
    assert mean == 2 and math.isnan(low) and math.isnan(high)
    rising = np.stack([np.arange(5.0), np.arange(5.0) ** 3], axis=1)[:, None]
    assert analyze.rank_correlation(rising) == pytest.approx([1, 1, 1])
    assert analyze.rank_correlation(rising * [1, -1]) == pytest.approx([-1, -1, -1])
    assert math.isnan(analyze.rank_correlation(rising[:3])[1])


def write_run(
    path: Path, rates: np.ndarray, norm: str = "std", seed: int = 0, changed: dict = MappingProxyType({}), **config
) -> Path:
    """A run's directory whose log has the given pass rates, and a predicted gain of 2 at each step."""
    path.mkdir(parents=True)
    settings = {
        "norm": norm,
        "seed": seed,
        "lr": 1e-3,
        "prompts": 16,
        "group": 16,
        "task": "arith",
        "model": "tiny",
        "out": str(path),
    }
    (path / "config.json").write_text(json.dumps(settings | config))
    rng = np.random.default_rng(seed)
    fixed = {"interference": 2.5, "signal_share": 0.5, "predicted_gain": 2.0} | changed
    lines = [
        {"step": t, "pass_rate": rate, "reward_std": 0.3 + 0.01 * a, "cos_abs": 0.2 + 0.01 * b, **fixed}
        for t, (rate, a, b) in enumerate(zip(rates.tolist(), *rng.normal(size=(2, len(rates))), strict=True))
    ]
    lines.append({"step": len(rates), "eval_pass_rate": float(rates[-1:].sum()), "eval_greedy": 1.0})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = [
        {
            "step": t,
            "prompt": 1,
            "pass_rate": 0.25,
            "reward_std": std,
            "grad_sq_signal": 0.5 - std,
            "grad_norm": 0.2**0.5,
            "reward_std_half": [std, 0.4],
            "pass_rate_half": [0.2, 0.7],
            "curvature": [std, None],
        }
        for t in range(0, len(rates), 2)
        for std in (0.3, 0.4, 0.5)
    ]
    (path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
    return path


def saturating(tau: float, n: int = 300) -> np.ndarray:
    return 0.2 + 0.7 * (1 - np.exp(-np.arange(n) / tau))


def test_twice_as_fast_is_a_speed_up_of_two(tmp_path, capsys):
    paths = [
        write_run(tmp_path / f"{norm}-{seed}", saturating(tau + seed), norm, seed)
        for norm, tau in (("none", 100), ("std", 50))
        for seed in range(3)
    ]
    assert analyze.main([*map(str, paths), "--target", "0.6"]) == 0
    found = json.loads((tmp_path / "analysis.json").read_text())
    (group,) = found["groups"].values()
    # From 0.2 + 0.7 (1 - exp(-t/tau)) = 0.6: t = tau ln(7/3), but for the windows of 11 steps.
    assert group["norms"]["none"]["steps_to_target"][0] == pytest.approx(101 * math.log(7 / 3), rel=0.02)
    assert group["norms"]["std"]["steps_to_target"][0] == pytest.approx(51 * math.log(7 / 3), rel=0.02)
    against = group["against_none"]["std"]
    assert against["speed_up"][0] == pytest.approx(101 / 51, rel=0.02)
    # Noise removed: squared norms 0.2, 0.1, 0 of three prompts with sigma 0.3, 0.4, 0.5; half of 0.6 is signal.
    for kind, foreseen in (("sampled", 2), ("corrected", 0.5 * (0.2 / 0.3 + 0.1 / 0.4) / 0.3)):
        assert against["predicted_speed_up"][kind][0] == pytest.approx(foreseen)
        assert against["over_predicted"][kind] == pytest.approx([value / foreseen for value in against["speed_up"]])
    assert against["final_gain"][0] == pytest.approx(
        np.mean([(saturating(50 + s) - saturating(100 + s))[-30:].mean() for s in range(3)])
    )
    assert group["norms"]["std"]["held_out"][0] == pytest.approx(np.mean([saturating(50 + s)[-1] for s in range(3)]))
    assert group["law"]["below"]["alpha_raw"] == pytest.approx(1, abs=0.011) and group["law"]["above"]["n"] == 0
    gain, step = against["gain"][3], 38  # the fourth window: steps 33 to 43
    assert gain[0] == step and gain[1] == pytest.approx(
        np.mean([(saturating(50 + s) - saturating(100 + s))[step - 5 : step + 6].mean() for s in range(3)])
    )
    assert list(found["runs"]) == [str(path) for path in paths] and found["left_out"] == []
    report = (tmp_path / "analysis.md").read_text()
    assert report in capsys.readouterr().out and "| none | 0.001 | 3 |" in report
    assert analyze.plt.imread(tmp_path / "phases.png").shape == (720, 1320, 4)


def test_growth_of_the_gain_in_each_phase(tmp_path):
    t = np.arange(300.0)
    gain = np.interp(t, [0, 100, 200, 300], [0.0, 0.2, 0.25, 0.15])
    ours, other = (
        analyze.read_run(write_run(tmp_path / name, rates))
        for name, rates in (("a", 0.3 + t / 1000 + gain), ("b", 0.3 + t / 1000))
    )
    assert analyze.growth(ours, other, [100, 200]) == pytest.approx([0.2, 0.05, -0.1], abs=1e-9)
    assert all(map(math.isnan, analyze.growth(ours, other, [])))


def test_noise_is_removed_from_the_cosine_as_a_ratio_of_means():
    share = np.full(60, 0.5)
    share[30] = -0.7  # one step's share may be negative; the mean of 25 is (24 * 0.5 - 0.7) / 25
    log = pd.DataFrame({"interference": np.full(60, 2.5), "signal_share": share})
    cosine = analyze.corrected_cosine(log, prompts=16)
    assert cosine[0] == pytest.approx(1.5 / 15 / 0.5) and cosine[30] == pytest.approx(1.5 / 15 / (11.3 / 25))


def test_the_two_measures_may_disagree(tmp_path, capsys):
    rng = np.random.default_rng(3)
    sigma, angle, rates, _ = synthetic("phases", rng)
    path = write_run(tmp_path / "run", rates)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for line, std, orthogonal in zip(lines, sigma, angle, strict=False):
        line |= {"reward_std": 0.5 + 0.05 * std, "cos_abs": 0.3 - 0.02 * orthogonal}
        line["interference"] = 2 + 0.1 * rng.normal()
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert analyze.main([str(path)]) == 0
    text = capsys.readouterr().out
    assert "steps: three phases found**" in text
    assert "what changed between the phases may be the sampling noise alone" in text
    assert analyze.main([str(path), "--orthogonality", "corrected"]) == 0
    assert "steps: not found**" in capsys.readouterr().out


def test_runs_that_differ_in_more_are_compared_apart(tmp_path):
    runs = [
        analyze.read_run(write_run(tmp_path / f"{i}", saturating(50, 40), norm, i, **more))
        for i, (norm, more) in enumerate(
            [("std", {"group": 8}), ("none", {"group": 8, "lr": 0.5, "resume": True}), ("std", {"group": 64})]
        )
    ]
    groups = analyze.group_runs(runs)
    assert {title: [run.path.name for run in members] for title, members in groups.items()} == {
        "group 8": ["0", "1"],
        "group 64": ["2"],
    }


def test_settings_that_look_alike_when_cut_short_are_told_apart(tmp_path):
    texts = ("a " + "x" * 60, "b " + "x" * 60)
    runs = [analyze.read_run(write_run(tmp_path / str(i), saturating(50, 40), seed=i, instruction=text, device=text[0]))
            for i, text in enumerate((*texts, texts[0]))]
    assert [[run.path.name for run in group] for group in analyze.group_runs(runs).values()] == [["0", "2"], ["1"]]


def test_a_rate_whose_run_came_to_no_end_is_not_the_best(tmp_path):
    runs = [analyze.read_run(write_run(tmp_path / f"{lr}", saturating(tau, n), lr=lr))
            for lr, tau, n in ((1e-3, 50, 300), (1e-2, 5, 40))]
    split = {"sampled": {"boundaries": []}}
    found = analyze.compare(runs, {str(run.path): split for run in runs}, "sampled", None)
    assert found["norms"]["std"]["lr"] == 1e-3 and found["last_step"] == 300 and not found["cut"]


def test_what_begins_beyond_the_target_has_no_speed_up(tmp_path):
    runs = [write_run(tmp_path / f"{norm}-{seed}", saturating(50), norm, seed)
            for norm in ("none", "std") for seed in range(3)]
    group, _ = compared(runs, tmp_path, "--target", "0.1")
    assert group["against_none"]["std"]["speed_up"] == [None] * 3


def test_the_prediction_is_of_std_alone(tmp_path):
    """It speaks of steps 1/sigma."""
    runs = [write_run(tmp_path / f"{norm}-{seed}", saturating(50), norm, seed)
            for norm in ("none", "var") for seed in range(3)]
    group, text = compared(runs, tmp_path)
    against = group["against_none"]["var"]
    assert against["speed_up"][0] == pytest.approx(1) and against["predicted_speed_up"]["sampled"] == [None] * 3
    assert "Does the predicted gain predict?" not in text


def test_a_norm_is_compared_at_its_best_learning_rate(tmp_path):
    runs = [
        analyze.read_run(write_run(tmp_path / f"{tau}", saturating(tau, 60), "std", tau, lr=lr))
        for tau, lr in ((20, 1e-3), (50, 1e-2))
    ]
    split = {"sampled": {"boundaries": []}}
    arm = analyze.compare(runs, {str(run.path): split for run in runs}, "sampled", None)["norms"]["std"]
    assert arm["lr"] == 1e-3 and arm["rates"] == [1e-3, 1e-2] and arm["runs"] == [str(tmp_path / "20")]


def compared(runs: list[Path], tmp_path: Path, *arguments: str) -> tuple[dict, str]:
    """The only group of an analysis, and its report."""
    assert analyze.main([*map(str, runs), "--out", str(tmp_path / "report"), *arguments]) == 0
    (group,) = json.loads((tmp_path / "report" / "analysis.json").read_text())["groups"].values()
    return group, (tmp_path / "report" / "analysis.md").read_text()


def test_a_run_that_was_killed_is_compared_as_far_as_it_went(tmp_path):
    rates = saturating(50)
    runs = [
        write_run(tmp_path / f"{norm}-{seed}", rates[: 60 if norm == "none" else 300], norm, seed)
        for norm in ("none", "std")
        for seed in range(3)
    ]
    group, text = compared(runs, tmp_path)
    assert group["against_none"]["std"]["final_gain"] == pytest.approx([0, 0, 0], abs=1e-12)
    assert "Compared up to step 59, the last that all of these runs have." in text


def test_a_target_that_is_not_always_reached_has_no_mean(tmp_path):
    runs = [
        write_run(tmp_path / f"{norm}-{seed}", saturating(50) * (0.5 if seed and norm == "none" else 1), norm, seed)
        for norm in ("none", "std")
        for seed in range(3)
    ]
    group, text = compared(runs, tmp_path, "--target", "0.8")
    assert group["norms"]["none"]["reached"] == 1 and group["norms"]["none"]["steps_to_target"] == [None] * 3
    assert group["against_none"]["std"]["speed_up"] == [None] * 3 and "| reached by 1 of 3 |" in text
    assert group["norms"]["std"]["steps_to_target"][0] == pytest.approx(50 * math.log(7), rel=0.02)


def test_a_seed_counts_once(tmp_path):
    runs = [write_run(tmp_path / name, saturating(50), name[:3], 0) for name in ("std", "std-again", "none")]
    runs[2].joinpath("config.json").write_text(runs[2].joinpath("config.json").read_text().replace('"non"', '"none"'))
    group, text = compared([*runs, runs[0] / ".." / "std"], tmp_path)
    assert group["against_none"]["std"]["pairs"] == 1 and group["twice"] == [str(runs[1])]
    assert f"left out, its norm, rate and seed are there already: {runs[1]}" in text


def test_settings_of_any_text_and_logs_without_prompts_are_read(tmp_path):
    runs = [
        write_run(tmp_path / f"{i}", saturating(50, 40), instruction=text) for i, text in enumerate(["a$b_$c\n", "d"])
    ]
    (runs[0] / "prompts.jsonl").unlink()
    assert analyze.main([*map(str, runs)]) == 0
    text = (tmp_path / "analysis.md").read_text()
    assert "# Runs with instruction a$b_$c\n" in text and text.count("0 values of sigma") == 3


def test_rewards_without_a_pass_rate_are_compared_by_their_mean(tmp_path):
    path = write_run(tmp_path / "run", saturating(50, 40))
    log = path / "metrics.jsonl"
    log.write_text(log.read_text().replace('"pass_rate":', '"reward":'))
    assert analyze.read_run(path).log["pass_rate"].iloc[:40].tolist() == saturating(50, 40).tolist()
    partial = write_run(tmp_path / "partial", np.zeros(40), changed={"reward": 0.7})  # full marks never, 0.7 always
    lines = [json.loads(line) for line in (partial / "metrics.jsonl").read_text().splitlines()]
    lines[3]["pass_rate"], lines[-1]["eval_reward"] = None, 0.6
    (partial / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = analyze.read_run(partial).log
    assert log["pass_rate"].iloc[:40].tolist() == [0.7] * 40 and log["eval_pass_rate"].iloc[-1] == 0.6


def test_a_log_that_has_lost_its_beginning_is_compared(tmp_path):
    runs = [write_run(tmp_path / "std", saturating(50, 300)), write_run(tmp_path / "none", saturating(50, 50), "none")]
    lines = (runs[0] / "metrics.jsonl").read_text().splitlines()
    (runs[0] / "metrics.jsonl").write_text("\n".join(lines[100:]) + "\n")
    group, _ = compared(runs, tmp_path)
    assert group["norms"]["std"]["pass_rate"][0] == pytest.approx(saturating(50)[100])
    assert group["norms"]["none"]["pass_rate"][0] == pytest.approx(saturating(50)[45:50].mean())


def test_a_second_report_does_not_read_the_first(tmp_path, capsys):
    runs = [write_run(tmp_path / name, saturating(50, 20), name) for name in ("std", "none")]
    assert analyze.main([*map(str, runs)]) == 0 and analyze.main([*map(str, sorted(tmp_path.iterdir()))]) == 0
    text = (tmp_path / "analysis.md").read_text()
    assert "left out" not in text and "found in 0 of 0 runs, not decided in 2" in text and "not decided**" in text


def test_damaged_logs_are_read_as_far_as_they_can_be(tmp_path, capsys):
    path = write_run(tmp_path / "run", saturating(50, 40))
    whole = analyze.read_run(path)
    junk = [
        "{",
        "[1]",
        "3",
        "",
        '{"step": "1"}',
        '{"step": true}',
        '{"no": 1}',
        '{"step": -1}',
        "\0\0",
        "[" * 10**5,
        '{"step": 5, "pass_rate": ' + "9" * 5000 + "}",
        "é" * 1000,
    ]
    with (path / "metrics.jsonl").open("ab") as file:
        file.write("\n".join(junk).encode() + b'\n\xff\xfe\n{"step": 41, "pass_ra')
    damaged = analyze.read_run(path)
    assert damaged.skipped == len(junk) + 2 and damaged.log.equals(whole.log)
    with (path / "metrics.jsonl").open("a") as file:
        file.write(
            '\n{"step": 50, "pass_rate": "1", "reward_std": [1], "cos_abs": 1e999, "length": 1, "interference": '
        )
        file.write("1" * 400 + "}")
    assert analyze.read_run(path).log.loc[50].isna().all()
    assert analyze.main([str(path), str(tmp_path / "nothing"), str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert f"{len(junk) + 2} unreadable log lines skipped" in text
    assert text.count("left out:") == 2 and f"left out: {tmp_path / 'nothing'}: " in text


def test_nothing_to_analyse_is_one_line(tmp_path, capsys):
    empty = write_run(tmp_path / "empty", saturating(50, 0))
    other = write_run(tmp_path / "other", saturating(50, 10))
    (other / "config.json").write_text("[]")
    with pytest.raises(SystemExit) as exit:
        analyze.main([str(empty), str(other)])
    text = capsys.readouterr().err
    assert text.startswith("analyze.py: error: no run to read: ") and text.count("\n") == 1
    assert "metrics.jsonl has no step" in text and "does not name norm" in text
    assert exit.value.code == 2
    with pytest.raises(SystemExit) as exit:
        analyze.main(["--orthogonality", "x", "run"])
    assert exit.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_run_of_grpo_is_read(train, settings, capsys):
    train(Config(**settings | {"probe_every": 2}))
    assert analyze.main([settings["out"]]) == 0
    run, lines = analyze.read_run(Path(settings["out"])), read(settings["out"])
    assert run.log["reward_std"].dropna().tolist() == [line["reward_std"] for line in lines[:-1]] and run.skipped == 0
    angles = [1 - line["cos_abs"] for line in lines[:-1] if line["cos_abs"] is not None]
    assert run.log["sampled"].dropna().tolist() == angles
    rows = [row for row in read(settings["out"], "prompts.jsonl") if "curvature" in row]
    pairs = [(row["reward_std_half"][i], row["curvature"][i]) for row in rows for i in (0, 1)]
    assert run.halves[["sigma", "curvature"]].to_records(index=False).tolist() == [p for p in pairs if p[1] is not None]
    sizes = (3, 2)  # of the two halves of a group of five
    other = [
        row["reward_std_half"][1 - i] ** 2 * sizes[1 - i] / (sizes[1 - i] - 1)
        for row in rows
        for i in (0, 1)
        if row["curvature"][i] is not None
    ]
    assert run.halves["variance"].tolist() == pytest.approx(other)
    assert f"{len(angles)} steps have both measures, 30 are needed" in capsys.readouterr().out


@slow
def test_twenty_long_runs_in_half_a_minute(tmp_path):
    paths = [
        write_run(tmp_path / f"{norm}-{seed}", saturating(200, 1000), norm, seed)
        for norm in ("none", "std")
        for seed in range(10)
    ]
    for path in paths:
        line = (path / "prompts.jsonl").read_text().splitlines()[0]
        (path / "prompts.jsonl").write_text((line + "\n") * 16_000)
    began = time.perf_counter()
    subprocess.run([sys.executable, analyze.__file__, *map(str, paths)], check=True, capture_output=True)
    assert time.perf_counter() - began < 30
