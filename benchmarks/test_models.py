"""Kinds of model that rollout and training take for one distribution: a tiny one of each.

Run by `GRPO_SLOW=1 pytest`.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import grpo  # noqa: E402
import test_grpo  # noqa: E402
from test_grpo import flat, naive_logprobs, naive_loss, relative_error  # noqa: E402

slow = pytest.mark.skipif(not os.environ.get("GRPO_SLOW"), reason="slow: set GRPO_SLOW=1")

SIZES = test_grpo.SHARED | dict(vocab_size=98)  # two layers of four heads, hidden size 32
HEAD = dict(head_dim=8)  # where it is not hidden size over heads by itself
WINDOW = dict(sliding_window=4)  # shorter than most prompts with their completions
LOCAL = WINDOW | dict(layer_types=["sliding_attention", "full_attention"], use_sliding_window=True)
GEMMA = LOCAL | HEAD | dict(query_pre_attn_scalar=8)
SHARING = dict(num_hidden_layers=4, num_kv_shared_layers=2, layer_types=LOCAL["layer_types"] * 2)
PER_LAYER = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=98, global_head_dim=8)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
SHARED_EXPERT = EXPERTS | dict(shared_expert_intermediate_size=16)
ROUTED = EXPERTS | dict(n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1)
ROUTED |= dict(first_k_dense_replace=1)
LATENT = dict(kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
LATENT |= ROUTED | dict(num_key_value_heads=4)
HYBRID = dict(layer_types=["linear_attention", "full_attention"])
DELTA = HYBRID | HEAD | dict(linear_num_value_heads=4, linear_key_head_dim=8)
DELTA |= dict(linear_value_head_dim=8)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=4)
# It bounds the time step for several tokens but not for one: here the bound is next to nothing.
NEMOTRON_H = ROUTED | HEAD | dict(time_step_min=1e-9, num_hidden_layers=4, chunk_size=4, n_groups=2)
NEMOTRON_H |= dict(layer_types=["linear_attention", "moe", "full_attention", "mlp"])
NEMOTRON_H |= dict(mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8)
NEMOTRON_H |= dict(moe_shared_expert_intermediate_size=16)

FAMILIES = {  # what a configuration has beyond SIZES
    "apertus": {},
    "arcee": {},
    "bamba": MAMBA | dict(attn_layer_indices=[1]),
    "bloom": {},
    "cohere": dict(logit_scale=1.0),
    "cohere2": LOCAL | dict(logit_scale=1.0),
    "deepseek_v2": LATENT | HEAD,
    "deepseek_v3": LATENT,
    "ernie4_5": HEAD,
    "exaone4": LOCAL,
    "falcon_h1": MAMBA | dict(mamba_d_ssm=64),
    "gemma": HEAD,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gemma4_text": GEMMA | SHARING | PER_LAYER,
    "glm": HEAD,
    "glm4": HEAD,
    "glm4_moe": ROUTED | HEAD,
    "gpt2": {},
    "gpt_neox": {},
    "gpt_oss": EXPERTS | LOCAL | HEAD,
    "gptj": dict(rotary_dim=4),
    "granite": {},
    "granitemoe": EXPERTS,
    "granitemoehybrid": HYBRID | EXPERTS | MAMBA | dict(shared_intermediate_size=16),
    "helium": HEAD,
    "hunyuan_v1_dense": HEAD,
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "llama": {},
    "llama4_text": EXPERTS | HEAD | dict(no_rope_layers=[1, 0], attention_chunk_size=4),
    "mamba2": dict(num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=4),
    "minimax_m2": EXPERTS | HEAD,
    "ministral3": WINDOW | HEAD,
    "mistral": WINDOW,
    "mixtral": EXPERTS | WINDOW,
    "nemotron": {},
    "nemotron_h": NEMOTRON_H,
    "olmo": {},
    "olmo2": {},
    "olmo3": LOCAL,
    "olmo_hybrid": DELTA | dict(linear_num_key_heads=4),
    "olmoe": EXPERTS,
    "opt": dict(ffn_dim=64, word_embed_proj_dim=32),
    "phi": {},
    "phi3": WINDOW,
    "qwen2": LOCAL,
    "qwen2_moe": SHARED_EXPERT | LOCAL,
    "qwen3": LOCAL | HEAD,
    "qwen3_5_text": DELTA | dict(linear_num_key_heads=2),
    "qwen3_moe": EXPERTS | HEAD | WINDOW | dict(use_sliding_window=True),
    "qwen3_next": DELTA | SHARED_EXPERT | dict(linear_num_key_heads=2),
    "seed_oss": HEAD,
    "smollm3": dict(no_rope_layers=[1, 0]),
    "stablelm": {},
    "starcoder2": WINDOW,
    "xglm": dict(ffn_dim=64),
}
REFUSED = {  # that take no cache by the usual name, or go on from it as if it were empty (jamba)
    "jamba": EXPERTS | dict(mamba_d_state=8, attn_layer_period=2, attn_layer_offset=1),
    "mamba": {},
    "recurrent_gemma": dict(num_hidden_layers=3, lru_width=32, attention_window_size=64),
    "rwkv": dict(context_length=64),
}


def make_model(family: str):
    """A random transformer, far from uniform: of 98 tokens about 40 are likely, and it matters what
    came before."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | (FAMILIES | REFUSED)[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        # Not the logarithm of a state's decay: times 12, no token would reach the next.
        parameter.data.mul_(12.0 if parameter.ndim > 1 and "A_log" not in name else 1.0)
    return model


def make_policy(family: str) -> grpo.Policy:
    """With the attention that load_policy takes on a CPU; a quarter of the tokens end, so that
    completions are unequal."""
    model = make_model(family)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
    return test_grpo.make_policy(model, range(1, 98, 4), limits=(60, 9))


@slow
@pytest.mark.parametrize("family", FAMILIES)
def test_rollout_and_training_are_the_naive_pass(family):
    naive, policy = make_model(family), make_policy(family)
    config = grpo.Config(device="cpu")
    grpo.check_model(policy, [5, 6, 7], config)  # and find out what its gradient needs
    batch = test_grpo.sample_batch(policy)
    now = naive_logprobs(naive, batch)
    loss = naive_loss(now, now, now, batch, "sequence")
    expected = torch.autograd.grad(loss, list(naive.parameters()), materialize_grads=True)
    gradient = flat(grpo.loss_gradient(policy, batch, range(20), config))
    assert relative_error(gradient, flat(expected)) < 1e-5
    for p, logprobs in enumerate(now):
        exact = pad_sequence(logprobs, batch_first=True).detach()
        for found in (batch.logprobs[p], batch.old_logprobs[p].nan_to_num(0)):
            torch.testing.assert_close(found[:, : exact.shape[1]], exact, rtol=0, atol=1e-4)


@slow
@pytest.mark.parametrize("family", REFUSED)
def test_other_kinds_are_refused(family):
    config = grpo.Config(device="cpu")
    with pytest.raises(grpo.InputError, match="with a DynamicCache|rollout and training differ"):
        grpo.check_model(make_policy(family), [5, 6, 7, 8, 9], config)
