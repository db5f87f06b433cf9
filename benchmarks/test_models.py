"""Models: what is refused, what is found out about one, and kinds that rollout and training take
for one distribution, a tiny one of each (`GRPO_SLOW=1 pytest`).
"""

import inspect
import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import grpo  # noqa: E402
import test_grpo  # noqa: E402
from grpo import Config, InputError, Problem  # noqa: E402
from test_grpo import (  # noqa: E402
    LETTERS,
    PROMPTS,
    flat,
    naive_logprobs,
    naive_loss,
    relative_error,
    run,
    sample_batch,
    settings,
    slow,
)

PROBLEMS = [Problem("q", "a", None, prompt) for prompt in PROMPTS]

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
    "gpt_neo": dict(num_layers=2, attention_types=[[["local"], 2]], window_size=4),
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
def test_rollout_and_loss_gradient_are_the_naive_pass(family):
    naive, policy = make_model(family), make_policy(family)
    config = Config(max_new_tokens=8)
    policy = grpo.check_model(policy, PROBLEMS, config)  # and find out what its gradient needs
    batch = sample_batch(policy)
    now = naive_logprobs(naive, batch)
    loss = naive_loss(now, now, now, batch, "sequence")
    expected = torch.autograd.grad(loss, list(naive.parameters()), materialize_grads=True)
    gradient, logprobs = grpo.loss_gradient(policy, batch, range(20), config)
    assert relative_error(flat(gradient), flat(expected)) < 1e-5
    for p, rows in enumerate(now):
        exact = pad_sequence(rows, batch_first=True).detach()
        for found in (batch.logprobs[p], logprobs[p].nan_to_num(0)):
            torch.testing.assert_close(found[:, : exact.shape[1]], exact, rtol=0, atol=1e-4)


@slow
@pytest.mark.parametrize("family", REFUSED)
def test_check_model_refuses_other_kinds(family):
    with pytest.raises(InputError, match="with a DynamicCache it fails|plain pass differ"):
        grpo.check_model(make_policy(family), PROBLEMS, Config(max_new_tokens=8))


def planted(fault):
    """A policy of which fault(logits, tokens, mask) changes what the model returns."""
    model = test_grpo.make_model("llama")
    forward = model.forward

    def changed(tokens, **named):
        output = forward(tokens, **named)
        output.logits = fault(output.logits, tokens, named.get("attention_mask"))
        return output

    model.forward = changed
    return test_grpo.make_policy(model)


def other_in_training(size):
    return lambda logits, *_: logits + size * torch.is_grad_enabled() * torch.arange(23)


def other_for_lone_tokens(logits, tokens, _):
    return logits * 2 if tokens.shape[1] == 1 else logits


def no_training_on_lone_tokens(logits, tokens, _):
    return logits / 0 if tokens.shape[1] == 1 and torch.is_grad_enabled() else logits


def other_beside_padding(logits, _, mask):
    return logits if mask is None else logits * (2 - mask[:, :1, None])


FAULTS = [  # completions of two tokens are extended by one in training, those of eight by seven
    (other_for_lone_tokens, "rollout and a plain pass differ by [0-9.]+ nats"),
    (no_training_on_lone_tokens, "training and a plain pass differ by nan nats"),
    (other_in_training(0.0003), "training and a plain pass differ by 0.00[12][0-9]* nats"),
    (other_beside_padding, "rollout and a plain pass differ"),
    (lambda logits, *_: logits[5:], "with a DynamicCache it fails: no slot for its state"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS)
def test_check_model_refuses_one_whose_rollout_and_training_disagree(fault, message):
    config = Config(model="DIR", max_new_tokens=8)
    with pytest.raises(InputError, match=rf"^model DIR \(llama\) cannot be used: {message}"):
        grpo.check_model(planted(fault), PROBLEMS, config)


@pytest.mark.parametrize(("size", "dtype"), [(0.0001, torch.float32), (0.05, torch.bfloat16)])
def test_check_model_accepts_what_is_rounding(size, dtype):
    policy = planted(other_in_training(size))
    policy.model.to(dtype)
    assert grpo.check_model(policy, PROBLEMS, Config(max_new_tokens=8)) is policy


def test_check_model_guards_one_that_overwrites_what_its_gradient_needs():
    def overwriting(logits, *_):
        shares = logits.sigmoid()
        result = shares * 3
        shares.zero_()  # which the gradient of the sigmoid is made of
        return result

    policy = grpo.check_model(planted(overwriting), PROBLEMS, Config(max_new_tokens=8))
    exact = planted(lambda logits, *_: logits.sigmoid() * 3)
    batch = sample_batch(exact)
    found, _ = grpo.loss_gradient(policy, batch, range(20), Config())
    expected, _ = grpo.loss_gradient(exact, batch, range(20), Config())
    assert relative_error(flat(found), flat(expected)) < 1e-6


def test_load_policy_finds_ends_limits_and_masters(tmp_path):
    path = tmp_path / "model"
    model = test_grpo.make_model("llama", 8192)
    model.generation_config.eos_token_id = [5, 3]
    model.save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(LETTERS.model)  # whose end token is 0
    tokenizer.save_pretrained(path)
    config = grpo.resolve(settings("-", model=str(path), dtype="bfloat16", micro_batch=None))
    policy = grpo.load_policy(config)
    assert policy.eos_ids == [0, 3, 5] and not policy.model.training
    assert policy.limits == (4096, 2**24 // 8192)  # by vocabulary
    assert grpo.load_policy(replace(config, micro_batch=9)).limits == (9, 9)
    assert policy.model.config._attn_implementation == "eager"
    assert policy.cache_argument in inspect.signature(policy.model.forward).parameters
    assert policy.trained.keys() == policy.masters.keys() == dict(model.named_parameters()).keys()
    assert {x.dtype for x in policy.trained.values()} == {torch.bfloat16}
    assert {x.dtype for x in policy.masters.values()} == {torch.float32}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    adapted = [grpo.load_policy(replace(config, lora=2)) for _ in range(2)]
    assert torch.equal(*(flat(x.masters.values()) for x in adapted))  # always the same start
    assert torch.equal(before, torch.get_rng_state())  # as before
    assert {x.dtype for x in adapted[0].trained.values()} == {torch.float32}
    assert sum("lora_A" in name for name in adapted[0].trained) == 2 * 7  # all linear layers
    model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(path)
    with pytest.raises(InputError, match="names no end-of-sequence token"):
        grpo.load_policy(config)


TURN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ END }}{% endfor %}"
ENDS = [  # what a template puts after an answer, and what of it ends a completion
    ("<|im_end|>\n", ["<|im_end|>"]),
    ("<eos>", ["<eos>"]),
    ("\nUser:<|im_end|>", []),  # plain text comes first
    ("{{ raise_exception('no') if m.role == 'assistant' }}", []),
]


@pytest.mark.parametrize(("end", "expected"), ENDS)
def test_end_of_turn_is_the_special_token_after_an_answer(end, expected, tmp_path):
    """And ends a completion where the template is used."""
    path = shutil.copytree(LETTERS.model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TURN.replace("{{ END }}", end)
    expected = set(tokenizer.convert_tokens_to_ids(expected))
    assert grpo.end_of_turn(tokenizer) == expected
    tokenizer.save_pretrained(path)
    for chat in (True, False):
        policy = grpo.load_policy(grpo.resolve(settings("-", model=str(path), chat=chat)))
        assert policy.eos_ids == sorted({0} | (expected if chat else set()))


def test_load_policy_executes_no_code_of_a_model(tmp_path):
    mark = tmp_path / "executed"
    marker = type("Marker", (), {"__reduce__": lambda _: (Path.touch, (mark,))})
    foreign = Path(shutil.copytree(LETTERS.model, tmp_path / "foreign"))
    pickled = Path(shutil.copytree(LETTERS.model, tmp_path / "pickled"))
    own = '{"model_type": "foreign", "auto_map": {"AutoConfig": "code.C"}}'
    (foreign / "config.json").write_text(own)
    (foreign / "code.py").write_text(f"import pathlib; pathlib.Path({str(mark)!r}).touch()")
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": marker()}))
    for path in (foreign, pickled):
        with pytest.raises(InputError, match="cannot load or save model"):
            run(tmp_path / "run", model=str(path))
    assert not mark.exists() and not (tmp_path / "run").exists()
