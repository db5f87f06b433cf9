"""in_trl.py on the embedded letters: the trainer, and the loop in its docstring, find grpo.py's own
figures on the same samples. Needs TRL (pip install trl); `GRPO_SLOW=1 pytest` runs these tests."""

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
from datasets import Dataset

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import grpo  # noqa: E402
from test_grpo import slow  # noqa: E402

trl = pytest.importorskip("trl")
import in_trl  # noqa: E402

LETTERS = grpo.TASKS["letters"]
P = 8  # prompts of a process
G = 7  # halves of 4 and 3
STEPS = 3
TEMPERATURE = 3.0  # so hot that completions differ in length
NORMS = ["prompt_grad_norm", "grad_sq_signal"]
GEOMETRY = ["n_gradients", "cos_mean", "cos_std", "cos_positive", "cos_small", "interference"]
GEOMETRY += ["signal_share", "cos_signal", "cos_sq_signal", *NORMS]
PROGRESS = [f"{kind}_{norm}" for kind in ("progress", "length") for norm in ("none", "std", "var")]


def digits_right(completions, answer, **_):
    """Rewards: the share of the answer's digits that stand where they should."""
    pairs = zip(completions, answer, strict=True)
    return [sum(a == b for a, b in zip(text, gold)) / len(gold) for text, gold in pairs]


def make_trainer(kind, out, more, **named):
    """A trainer of the embedded model, apart from its size with TRL's defaults and `more`."""
    problems = [json.loads(line) for line in Path(LETTERS.train).read_text().splitlines()]
    rows = [{"prompt": x["question"], "answer": x["answer"]} for x in problems[:100]]
    config = trl.GRPOConfig(
        output_dir=str(out),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=P,
        gradient_accumulation_steps=G,
        num_generations=G,
        max_completion_length=LETTERS.max_new_tokens,
        temperature=TEMPERATURE,
        learning_rate=0.1 if "optim" in more else LETTERS.lr,
        max_steps=STEPS,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        **more,
    )
    dataset = Dataset.from_list(rows)
    return kind(LETTERS.model, digits_right, args=config, train_dataset=dataset, **named)


class Compared(in_trl.MeasuredGRPOTrainer):
    """Keeps what each measured step finds: the trainer, grpo.py, and the docstring's loop."""

    def __init__(self, *args, **named):
        super().__init__(*args, **named)
        self.compared = []
        self.lengths = set()  # of completions

    def measure(self, batch):
        found = super().measure(batch)
        rewards = self.rewards.view(-1, G)
        samples = to_batch(batch, rewards[grpo.share(len(rewards))])
        self.lengths |= {*samples.lengths.flatten().tolist()}
        config = grpo.Config(temperature=TEMPERATURE, prompts=P, group=G, device="cpu")
        config = grpo.resolve(config)
        policy, optimizer = copy_to_grpo(self, config)
        expected = grpo.measure(policy, samples, [None] * len(rewards), config, optimizer)
        loop = run_loop(self.model, samples, self.optimizer.optimizer)
        # A column's values, not its mean, where there are both.
        self.compared.append([x[0] | x[1] for x in (found, expected, loop)])
        return found


def copy_to_grpo(trainer, config):
    """grpo.py's policy and optimizer, with the trainer's weights, learning rate and moments."""
    theirs = trainer.optimizer.optimizer
    policy = grpo.load_policy(config)
    optimizer = type(theirs)([*policy.masters.values()], lr=theirs.param_groups[0]["lr"])
    for master, parameter in zip(policy.masters.values(), trainer.model.parameters(), strict=True):
        master.copy_(parameter.detach())
        master.grad = torch.zeros_like(master)  # that of the update, which is of no concern here
        optimizer.state[master] = theirs.state.get(parameter, {})
    policy.publish()
    return policy, optimizer


def to_batch(batch, rewards):
    """TRL's samples as a grpo.Batch; the task's prompts have one length."""
    assert batch["prompt_mask"].all()
    tokens = batch["completion_ids"].view(P, G, -1)
    lengths = batch["completion_mask"].sum(dim=1).view(P, G)
    nothing = torch.zeros(tokens.shape)
    prompts = batch["prompt_ids"][::G].tolist()
    samples = grpo.Batch(prompts, tokens, lengths, nothing, nothing, None, rewards)
    samples.weights = torch.ones(P, G)
    return samples


def run_loop(model, samples, optimizer):
    """What the loop in in_trl.py's docstring finds in the same samples."""
    loop = in_trl.__doc__[in_trl.__doc__.index("    import torch\n") :]
    completions = []
    for rows, lengths in zip(samples.tokens.tolist(), samples.lengths.tolist()):
        completions.append([row[:n] for row, n in zip(rows, lengths)])
    given = {"model": model, "prompts": samples.prompts, "completions": completions}
    given |= {"rewards": samples.rewards, "temperature": TEMPERATURE, "optimizer": optimizer}
    exec(dedent(loop), given)
    return given["values"], given["columns"]


def assert_close(found, expected, names):
    """To 1e-4: cosines and shares, whose scale is 1, absolutely; norms, progress and lengths in
    units of the largest in their column."""
    for name in names:
        largest = np.abs(expected[name]).max()
        scale = largest if name in NORMS + PROGRESS else max(largest, 1.0)
        np.testing.assert_allclose(found[name], expected[name], 0, 1e-4 * scale, err_msg=name)


def assert_grpos_figures(trainer, first_with_progress=1):
    for step, (found, expected, _) in enumerate(trainer.compared):
        names = GEOMETRY + (PROGRESS if step >= first_with_progress else [])
        assert found.keys() == {*names, "pass_rate_half"}
        assert_close(found, expected, found.keys())
    assert len(trainer.compared) == STEPS and len(trainer.lengths) > 1


SGD = dict(scale_rewards="none", loss_type="dr_grpo", optim="sgd")  # knows D in the first step


@slow
@pytest.mark.parametrize(("more", "first"), [(dict(scale_rewards="group"), 1), (SGD, 0)])
def test_trainer_and_loop_find_grpos_figures(tmp_path, more, first):
    trainer = make_trainer(Compared, tmp_path, more, measure_every=1)
    trainer.train()
    assert_grpos_figures(trainer, first)
    for step, (_, expected, loop) in enumerate(trainer.compared):
        assert_close(loop, expected, GEOMETRY + (PROGRESS if step >= first else []))


@slow
def test_trainer_finds_grpos_figures_where_both_keep_sketches(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "SMALL", 0)
    trainer = make_trainer(Compared, tmp_path, dict(scale_rewards="batch"), measure_every=1)
    trainer.train()
    assert_grpos_figures(trainer)


@slow
def test_trainer_finds_grpos_figures_in_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, __file__, tmp_path], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = (tmp_path / "prompts.jsonl").read_text().splitlines()
    assert len(rows) == 2 * P * STEPS


@slow
def test_measuring_is_logged_and_leaves_the_training_as_it_is(tmp_path):
    """Every second step; with a loss that averages over a completion's tokens, so no progress."""
    more = dict(loss_type="grpo")
    plain = make_trainer(trl.GRPOTrainer, tmp_path / "plain", more)
    plain.train()
    trainer = make_trainer(Compared, tmp_path / "measured", more, measure_every=2)
    trainer.train()
    for one, other in zip(plain.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(one, other)
    logs = [line for line in trainer.state.log_history if "measure/interference" in line]
    assert [log["step"] for log in logs] == [1, 3]  # TRL's number for steps 0 and 2
    lines = (tmp_path / "measured" / "prompts.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [0] * P + [2] * P
    norms = []
    for log, (found, *_) in zip(logs, trainer.compared, strict=True):
        assert found.keys() == {*GEOMETRY, "pass_rate_half"}
        assert log["measure/interference"] == found["interference"]
        assert log["measure/prompt_grad_norm"] == pytest.approx(np.mean(found["prompt_grad_norm"]))
        norms += found["prompt_grad_norm"]
    assert [row["prompt_grad_norm"] for row in rows] == pytest.approx(norms)


if __name__ == "__main__":  # one of two processes
    distributed = make_trainer(Compared, sys.argv[1], {}, measure_every=1)
    distributed.train()
    assert_grpos_figures(distributed)
