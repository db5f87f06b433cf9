"""What grpo.py refuses, and what it says, in other people's hands: files that have changed,
directories in use, models that cannot be saved or are not what they seem, steps that fail."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import grpo  # noqa: E402
from grpo import Config, InputError, RunError  # noqa: E402
from test_grpo import (  # noqa: E402
    BRIEF,
    LETTERS,
    PROMPTS,
    make_model,
    make_policy,
    parity,
    run,
    settings,
    slow,
)


@slow
@pytest.mark.parametrize("changes", [dict(lora=4), dict(kl=0.1)])
def test_resume_refuses_other_problems_start_models_and_frozen_weights(changes, tmp_path):
    """They are in no checkpoint, and another file may lie where they were."""
    model = Path(shutil.copytree(LETTERS.model, tmp_path / "model"))
    data = Path(shutil.copy(LETTERS.test, tmp_path / "problems.jsonl"))
    changes = BRIEF | changes | dict(model=str(model), data=str(data), steps=1)
    run(tmp_path / "run", **changes)
    again = changes | dict(steps=2, resume=True)
    lines = data.read_text()
    for old, new in (("a+1", "b+1"), ('"answer":"', '"answer":"9')):
        data.write_text(lines.replace(old, new))
        with pytest.raises(InputError, match="other problems than it was saved with"):
            run(tmp_path / "run", **again)
    data.write_text(lines)
    saved = load_file(model / "model.safetensors")
    save_file(
        {k: 1.01 * x for k, x in saved.items()}, model / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(InputError, match="other start model than it was saved with"):
        run(tmp_path / "run", **again)


def test_train_saves_nothing_while_steps_fail_and_does_not_end_well(tmp_path, monkeypatch):
    """Steps 2 and 3, the last ones, come to nothing: the checkpoint is that of step 2."""
    norms = iter([1.0, 1.0, math.nan, math.nan])
    monkeypatch.setattr(grpo, "set_gradient", lambda *_: next(norms))
    with pytest.raises(RunError, match="no finite gradient in the last 2 steps") as ended:
        run(tmp_path, **BRIEF | dict(steps=4, save_every=1))
    assert ended.value.status == 1 and not (tmp_path / "model").exists()
    with safe_open(tmp_path / grpo.CHECKPOINT, "pt") as file:
        assert json.loads(file.metadata()["state"])["step"] == 2


def test_train_saves_nothing_if_the_last_epoch_of_a_step_fails(tmp_path, monkeypatch):
    """The first of its two updates may be what broke the policy."""
    norms = iter([1.0, 1.0, 1.0, math.nan])
    monkeypatch.setattr(grpo, "set_gradient", lambda *_: next(norms))
    with pytest.raises(RunError, match="no finite gradient in the last 1 steps"):
        run(tmp_path, **BRIEF | dict(steps=2, epochs=2, save_every=1))
    assert grpo.saved_state(tmp_path)["step"] == 1


def test_train_leaves_nothing_behind_if_the_first_reward_fails(tmp_path):
    with pytest.raises(RunError, match="the reward failed: ZeroDivisionError"):
        run(tmp_path, lambda *_: 1 / 0, **BRIEF)
    assert list(tmp_path.iterdir()) == []


def test_start_run_refuses_a_directory_in_use_until_it_is_free(tmp_path):
    refused = pytest.raises(InputError, match="is in use by another run")
    with grpo.start_run(settings(tmp_path), None, parity), refused:
        run(tmp_path, **BRIEF)
    run(tmp_path, **BRIEF | dict(steps=0))


def test_report_trouble_says_that_nothing_can_be_learnt(tmp_path, capsys):
    """Once, after 20 steps of equal rewards; all wrong, or all right."""
    run(tmp_path, lambda *_: 0.0, **BRIEF | dict(steps=22))
    said = [x for x in capsys.readouterr().out.splitlines() if "nothing can be learnt" in x]
    assert (
        len(said) == 1
        and "20 steps of equal rewards, mean 0; the problems may be too hard" in said[0]
    )
    grpo.report_trouble(0, 20, 30, torch.ones(2, 3))
    assert "mean 1; the problems may be too easy (see" in capsys.readouterr().out


def test_check_model_out_of_memory_does_not_blame_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "loss_gradient", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(RunError, match="out of memory: lower --micro-batch") as ended:
        grpo.train(settings(tmp_path, **BRIEF), reward=parity)
    assert ended.value.status == 1


def test_resume_without_a_run_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="cannot resume from .*missing.*state.safetensors"):
        run(tmp_path / "missing", **BRIEF | dict(resume=True))
    assert not (tmp_path / "missing").exists()


def test_measure_has_step_lengths_of_the_aggregation_by_tokens(tmp_path):
    """Unclipped plain SGD without division: the step that would be taken is the one taken."""
    changes = BRIEF | dict(steps=1, measure_every=1, optimizer="sgd", lr=0.1, max_grad_norm=0.0)
    run(tmp_path, norm="none", agg="token", curvature=False, **changes)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert line["length"] > 1
    assert line["length_none"] == pytest.approx(line["length_taken"], rel=1e-5)


def test_start_run_out_of_memory_is_one_line(tmp_path):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    stopped = pytest.raises(RunError, match="out of memory: .*--micro-batch.*--group.*--lora")
    with stopped, grpo.start_run(settings(tmp_path), None, parity):
        exhausted()


def test_load_policy_saves_what_has_odd_generation_settings(tmp_path):
    """Of which only the tokens are kept: with the others save_pretrained would raise an error."""
    model = Path(shutil.copytree(LETTERS.model, tmp_path / "model"))
    odd = dict(temperature=0.6, top_p=0.9, do_sample=False, eos_token_id=[0, 5], bos_token_id=0)
    (model / "generation_config.json").write_text(json.dumps(odd))
    run(tmp_path / "run", model=str(model), **BRIEF | dict(steps=1))
    saved = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [0, 5] and not {"temperature", "top_p"} & saved.keys()


def test_load_policy_refuses_what_cannot_be_saved_and_adapters_alone(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            "transformers.PreTrainedTokenizerBase.save_pretrained", lambda *_, **__: 1 / 0
        )
        with pytest.raises(InputError, match="division by zero"):
            grpo.load_policy(grpo.resolve(settings("-")))
    model = Path(shutil.copytree(LETTERS.model, tmp_path / "model"))
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="model .* is adapters alone: merge them"):
        grpo.load_policy(grpo.resolve(settings("-", model=str(model))))


def test_prepare_run_says_what_curvature_costs_in_memory(monkeypatch, capsys):
    """Two float32 copies of 133,728 parameters, which are many here."""
    monkeypatch.setattr(grpo, "SMALL", 1000)
    for curvature in (None, True):
        begun = grpo.prepare_run(settings("-", curvature=curvature), None, parity)
        said = "curvature: measured steps take up to 0.0 GB more" in capsys.readouterr().out
        assert said == begun.config.curvature == bool(curvature)
    monkeypatch.setattr(grpo, "SMALL", 1e6)
    assert not grpo.prepare_run(settings("-", curvature=False), None, parity).config.curvature


def test_start_run_ends_with_what_another_process_was_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "gather", lambda own: [*own, InputError("no file on node 1")])
    with pytest.raises(InputError, match="no file on node 1"):
        run(tmp_path, **BRIEF)


@pytest.mark.parametrize("blind", ["mask", "positions"])
def test_check_model_finds_an_extend_that_is_blind(blind, monkeypatch):
    """To the padding of the shorter prompt, in the mask or in GPT-2's absolute positions."""
    policy = make_policy(make_model("gpt2"))
    problems = [SimpleNamespace(prompt=prompt) for prompt in PROMPTS]
    config = grpo.resolve(Config(device="cpu"))
    assert grpo.check_model(policy, problems, config) is policy
    forward = policy.model.forward

    def blinded(tokens, attention_mask=None, position_ids=None, **options):
        if attention_mask is not None and blind == "mask":
            attention_mask = torch.ones_like(attention_mask)
        if attention_mask is not None and blind == "positions":
            position_ids = torch.arange(attention_mask.shape[1])[None, -tokens.shape[1] :]
        return forward(tokens, attention_mask=attention_mask, position_ids=position_ids, **options)

    monkeypatch.setattr(policy.model, "forward", blinded)
    with pytest.raises(InputError, match="gpt2.*: rollout and a plain pass differ by"):
        grpo.check_model(policy, problems, config)


def test_resolve_names_the_directory_after_what_is_ones_own():
    for given, out in (
        (dict(), "letters-std-0"),
        (dict(task="gsm8k", norm="none", seed=3), "gsm8k-none-3"),
        (dict(data="data/problems.jsonl"), "problems-std-0"),
        (dict(model="models/tiny"), "tiny-math-std-0"),
        (
            dict(model="org/Qwen2.5-1.5B", data="org/set:main:train"),
            "Qwen2.5-1.5B-set-main-train-std-0",
        ),
    ):
        assert grpo.resolve(Config(device="cpu", **given)).out == f"runs/{out}"


def torchrun(port, node, nodes, *flags):
    """A node's torchrun, of one process, or of two if it is the only node."""
    script = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}"]
    script += [f"--node_rank={node}", f"--nproc_per_node={2 // nodes}", "--master_addr=localhost"]
    script += [f"--master_port={port}", grpo.__file__, "--steps=2", "--prompts=4", "--group=4"]
    script += ["--eval-problems=4", "--eval-every=0", "--measure-every=0", "--device=cpu"]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*script, *flags], env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@slow
def test_train_on_two_nodes_is_that_of_two_processes_and_ends_on_both(tmp_path):
    """Two nodes emulated on one machine; then the data are missing on one of them."""
    (alone,) = [torchrun(free_port(), 0, 1, f"--out={tmp_path / 'one'}")]
    assert alone.wait(120) == 0
    port = free_port()
    both = [torchrun(port, node, 2, f"--out={tmp_path / 'two'}") for node in (0, 1)]
    assert [each.wait(120) for each in both] == [0, 0]
    ours, theirs = (load_file(tmp_path / x / grpo.CHECKPOINT) for x in ("two", "one"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    port = free_port()
    began = time.perf_counter()
    missing = [], ["--data=nowhere.jsonl"]
    both = [torchrun(port, n, 2, f"--out={tmp_path / 'no'}", *missing[n]) for n in (0, 1)]
    for each in both:
        _, error = each.communicate(timeout=120)
        assert each.returncode and "grpo.py: error: cannot load nowhere.jsonl" in error
    assert time.perf_counter() - began < 60  # 30 on a quiet machine
    assert not (tmp_path / "no").exists() or not any((tmp_path / "no").iterdir())
