"""Training on a device other than the CPU, which pretend_cuda.py pretends; `GRPO_SLOW=1 pytest`
runs these tests."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import pretend_cuda  # noqa: E402

import grpo  # noqa: E402
from test_grpo import read, run, slow  # noqa: E402

# With a large learning rate, so that the second step's numbers show the first one's update.
SMALL = dict(task="letters", steps=2, prompts=4, group=4, eval_problems=8, lr=3e-3, dtype="float32")
MEASURED = dict(measure_every=1, curvature=True)
# Times, and what is nothing but rounding.
UNEQUAL = {"seconds_rollout", "seconds_update", "tokens_per_second", "logprob_gap"}


def pretended(out, **changes):
    """A run on the pretended device, in a process of its own; returns what it printed."""
    settings = SMALL | dict(out=out) | changes
    flags = [f"--{name.replace('_', '-')}={settings[name]}" for name in settings]
    command = [sys.executable, ROOT / "benchmarks" / "pretend_cuda.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def here(out, device="cpu", **changes):
    """A run in this process."""
    with pretend_cuda.Pretence() if device == "cuda" else nullcontext():
        grpo.train(grpo.Config(**SMALL | dict(out=str(out), device=device) | changes))


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def stored(out):
    """The settings in a run's checkpoint."""
    with safe_open(out / grpo.CHECKPOINT, "pt") as file:
        return json.loads(file.metadata()["state"])["config"]


def assert_same_run(found, expected):
    """Same samples, and the same numbers up to the rounding of two attention implementations: about
    1e-6, which Adam amplifies where a gradient is almost zero, and which the curvature, a second
    difference, amplifies to as much as a few percent."""
    assert rows(found / "samples.jsonl") == rows(expected / "samples.jsonl")
    logs = [rows(out / "metrics.jsonl") for out in (found, expected)]
    assert len(logs[0]) == len(logs[1])
    for line, other in zip(*logs):
        assert line.keys() == other.keys()
        for name in line.keys() - UNEQUAL:
            a, b = (np.nan if x[name] is None else x[name] for x in (line, other))
            close = dict(rel=0.05 if name == "curvature" else 1e-3, abs=1e-4, nan_ok=True)
            assert a == pytest.approx(b, **close), (name, line["step"])


@slow
@pytest.mark.parametrize(
    "settings",
    [
        MEASURED,
        dict(epochs=2, kl=0.1),
        dict(lora=4) | MEASURED,
        dict(optimizer="sgd", agg="token", lr=10.0),
    ],
    ids=str,
)
def test_a_run_is_that_of_the_cpu(settings, tmp_path):
    assert "torch.float32 on cuda:0" in pretended(tmp_path / "there", **settings)
    here(tmp_path / "here", **settings)
    assert_same_run(tmp_path / "there", tmp_path / "here")


@slow
def test_a_sketched_run_is_that_of_the_cpu(tmp_path, monkeypatch):
    """A model of millions of weights has its gradients sketched, with signs from a generator of the
    device. Here a small one is taken for such a model."""
    monkeypatch.setattr(grpo, "SMALL", 1000)
    here(tmp_path / "here", **MEASURED)
    here(tmp_path / "there", "cuda", **MEASURED)
    assert_same_run(tmp_path / "there", tmp_path / "here")


@slow
def test_a_run_in_bfloat16(tmp_path):
    """Rollout and training are one policy, measured in float32, of which the masters are."""
    assert "torch.bfloat16 on cuda:0" in pretended(tmp_path, dtype="bfloat16", **MEASURED)
    *steps, _ = rows(tmp_path / "metrics.jsonl")
    assert len(steps) == 2 and all(x["logprob_gap"] < 0.1 and x["skipped"] == 0 for x in steps)
    assert np.isfinite([x["curvature"] for x in steps]).all()
    masters, saved = tmp_path / grpo.CHECKPOINT, tmp_path / "model" / "model.safetensors"
    assert {x.dtype for x in load_file(masters).values()} == {torch.float32}
    assert {x.dtype for x in load_file(saved).values()} == {torch.bfloat16}


@slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_goes_on_on_the_cpu_and_back(dtype, tmp_path, capsys):
    """In the type that it began in, which is not named when it is resumed."""
    out = tmp_path / "run"
    for steps, device in ((2, "cuda"), (4, "cpu"), (6, "cuda")):
        if steps == 2:
            printed = pretended(out, dtype=dtype)
        else:
            here(out, device, dtype=None, steps=steps, resume=True)
            printed = capsys.readouterr().out
        assert f"torch.{dtype} on {device}" in printed
        assert stored(out)["dtype"] == dtype
        assert device in stored(out)["device"]
        log = rows(out / "metrics.jsonl")
        assert [line["step"] for line in log] == [*range(steps + 1)]
        assert not any(line["skipped"] for line in log[:-1])
    if dtype == "float32":
        here(tmp_path / "whole", steps=6)
        assert_same_run(out, tmp_path / "whole")


REFUSED = {
    "other operand": lambda x, y: x + y,
    "operand of a CPU tensor": lambda x, y: y + x,
    "CPU tensor in place": lambda x, y: y.mul_(x),
    "CPU number in place": lambda x, y: y[0].mul_(x[0]),
    "list": lambda x, y: torch.stack([x[0], y[0]]),
    "named argument": lambda x, y: torch.where(x > 0, input=x, other=y),
    "out": lambda x, y: torch.exp(x, out=y),
    "index of a CPU tensor": lambda x, y: y[x.long()],
    "gathered": lambda x, y: x.gather(0, y.long()),
    "assigned": lambda x, y: x.__setitem__(x > 0, y),
    "module": lambda x, y: torch.nn.Linear(3, 3)(x),
    "input of a module": lambda x, y: torch.nn.Linear(3, 3).to("cuda")(y),
    "gradient": lambda x, y: setattr(x.detach(), "grad", y),
    "CPU generator": lambda x, y: x.normal_(generator=torch.Generator()),
    "generator": lambda x, y: y.normal_(generator=torch.Generator("cuda")),
    "CPU generator of a new tensor": lambda x, y: torch.rand(
        3, generator=torch.Generator(), device="cuda"
    ),
    "generator of a new tensor": lambda x, y: torch.rand(3, generator=torch.Generator("cuda")),
    "numpy": lambda x, y: x.numpy(),
    "numpy array": lambda x, y: np.asarray(x),
}


@slow
@pytest.mark.parametrize("mistake", REFUSED)
def test_the_pretence_refuses(mistake):
    with pretend_cuda.Pretence():
        x, y = torch.ones(3, device="cuda"), torch.ones(3)
        with pytest.raises((RuntimeError, TypeError), match="cuda:0"):
            REFUSED[mistake](x, y)
        assert x.device.type == "cuda" and y.device.type == "cpu"


@slow
def test_the_pretence_allows_what_a_gpu_does():
    with pretend_cuda.Pretence():
        x, y = torch.arange(3.0, device="cuda"), torch.arange(3.0)
        moved, seeded = y.to("cuda"), torch.Generator("cuda").manual_seed(0)
        assert moved.data_ptr() != y.data_ptr() and x.to("cuda") is x and y.cpu() is y
        made = [x + 1, x * y[2], x[y.long()], moved.to(torch.int64), *x, x.max(dim=0).values]
        made += [torch.zeros_like(y, device="cuda"), torch.rand(3, generator=seeded, device="cuda")]
        assert {z.device for z in made} == {torch.device("cuda:0")}
        back = [x.cpu(), x.to(y), torch.zeros_like(x, device="cpu"), torch.ones(3).copy_(x)]
        assert {z.device for z in back} == {torch.device("cpu")}
        assert back[0].numpy().tolist() == x.tolist() == [0, 1, 2] and "cuda:0" in repr(x)
        tied = torch.nn.ModuleList([torch.nn.Linear(3, 3, bias=False) for _ in range(2)])
        tied[1].weight = tied[0].weight
        tied.to("cuda")[0](x).sum().backward()
        assert tied[1].weight is tied[0].weight and len([*tied.parameters()]) == 1
        assert tied[0].weight.grad.device == torch.device("cuda:0")
    assert torch.Generator().device == torch.ones(1).device == torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_train_on_cuda_has_one_policy_in_rollout_and_training(tmp_path):
    run(tmp_path, device="cuda")
    assert 0 < max(row["logprob_gap"] or 0.0 for row in read(tmp_path)[:-1]) < 1e-3
