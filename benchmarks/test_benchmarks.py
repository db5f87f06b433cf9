"""Tests of make_tasks.py, warm_start.py, neighbours.py, experiment.py and tables.py.

`GRPO_SLOW=1 pytest` runs them: nobody changes these in passing, and quick tests are for grpo.py and
analyze.py."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

if not os.environ.get("GRPO_SLOW"):  # before the imports, which are slow, too
    pytest.skip("slow: set GRPO_SLOW=1", allow_module_level=True)

import scipy.stats
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import experiment  # noqa: E402
import make_tasks  # noqa: E402
import neighbours  # noqa: E402
import tables  # noqa: E402
import warm_start  # noqa: E402
from test_analyze import write_run  # noqa: E402

import grpo  # noqa: E402

ASSETS = ROOT / "assets"


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def load(path):
    """Model and tokenizer of a directory, as stored."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    return model, AutoTokenizer.from_pretrained(path)


def pass_rates(directory, problems, samples):
    """Each problem's share of right completions among `samples` of them, drawn by transformers."""
    model, tokenizer = load(directory / "model")
    prompts = torch.tensor(tokenizer([row["question"] for row in problems])["input_ids"])
    right = np.zeros(len(problems))
    plain = dict(do_sample=True, top_k=0, max_new_tokens=6, pad_token_id=0)
    torch.manual_seed(0)
    for _ in range(samples):
        whole = model.generate(prompts, attention_mask=torch.ones_like(prompts), **plain)
        texts = tokenizer.batch_decode(whole[:, prompts.shape[1] :], skip_special_tokens=True)
        right += [text == row["answer"] for text, row in zip(texts, problems, strict=True)]
    return right / samples


# ------------------------------------------- the tasks --------------------------------------------


@pytest.mark.parametrize("task", ["arith", "letters"])
def test_the_committed_problems_are_those_that_make_tasks_writes(task):
    made = make_tasks.TASKS[task](0)
    for split in ("train", "test"):
        stored = rows(ASSETS / task / f"{split}.jsonl")
        assert [(row["question"], row["answer"]) for row in stored] == getattr(made, split)
        assert [row["level"] for row in stored] == [made.level(row["question"]) for row in stored]
    held_out, seen = ({q for q, _ in part} for part in (made.test, made.train + made.solutions))
    assert len(made.test) == 512 and not held_out & seen
    assert len({q for q, _ in made.train}) == len(made.train) > 5000
    files = [file for file in (ASSETS / task).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 1_000_000


def test_arith_answers_are_sums_and_half_of_the_carries_slip():
    task = make_tasks.make_arith()
    for question, answer in task.train + task.test:
        a, b = map(int, re.fullmatch(r"(\d{3})\+(\d{3})=", question).groups())
        assert answer == f"{a + b:04}"[::-1]
    slipped = []
    for question, solution in task.solutions[:4000]:
        a, b = map(int, question.rstrip("=").split("+"))
        if a % 10 + b % 10 >= 10:  # a carry from the units to the tens
            slipped.append(int(solution[1]) != (a + b) // 10 % 10)
    assert np.mean(slipped) == pytest.approx(0.5, abs=0.05)  # four standard errors


def test_letters_answers_add_the_letters_digit_and_slips_have_the_stated_rates():
    task = make_tasks.make_letters()
    for question, answer in task.train + task.test:
        letter, number = re.fullmatch(r"([a-f])\+(\d{3})=", question).groups()
        right = make_tasks.LETTERS[letter][0]
        assert answer == "".join("0123456789"[(int(digit) + right) % 10] for digit in number)
    assert dict(task.train + task.test)["c+047="] == "158"
    for split in (task.train, task.test):  # every skill as often, to one problem
        counts = Counter(question[0] for question, _ in split).values()
        assert len(counts) == 6 and max(counts) - min(counts) <= 1
    added: dict[str, Counter] = {letter: Counter() for letter in make_tasks.LETTERS}
    for question, solution in task.solutions[:30000]:
        digits = zip(solution, question[2:5], strict=True)
        added[question[0]].update((int(s) - int(d)) % 10 for s, d in digits)
    for letter, (right, wrong, rate) in make_tasks.LETTERS.items():
        assert set(added[letter]) == {right, wrong}
        found = added[letter][right] / added[letter].total()
        assert found == pytest.approx(rate, abs=0.016)  # four standard errors


def test_the_letters_pass_rates_at_the_start_are_as_stated():
    problems = rows(ASSETS / "letters" / "test.jsonl")
    rates = pass_rates(ASSETS / "letters", problems, 4)
    for letter, (*_, rate) in make_tasks.LETTERS.items():
        own = [row["question"][0] == letter for row in problems]
        found = rates[own].mean()
        assert found == pytest.approx(rate**3, abs=0.08)  # 340 samples: up to three standard errors


def test_start_rates_are_as_stated():
    rates = experiment.start_rates(ASSETS / "letters", samples=4)
    for letter, (*_, rate) in make_tasks.LETTERS.items():
        assert rates[letter] == pytest.approx(rate**3, abs=0.08)  # as above


def test_drawn_letters_differ_in_digits_and_order_and_equal_ones_are_as_hard_on_average():
    drawn = [make_tasks.draw_skills(seed) for seed in range(20)]
    assert drawn[0] == make_tasks.LETTERS
    assert len({str(skills) for skills in drawn}) == 20
    for seed, skills in enumerate(drawn):
        right, wrong, rates = zip(*skills.values())
        assert len({*right}) == len({*wrong}) == 6 and all(a != b for a, b in zip(right, wrong))
        assert sorted(rates) == [0.30, 0.33, 0.55, 0.75, 0.87, 0.97]
        alike = [rate for *_, rate in make_tasks.draw_skills(seed, True).values()]
        assert np.mean(np.power(alike, 3)) == pytest.approx(np.mean(np.power(rates, 3)))
        assert len({*alike}) == 1
    question, answer = make_tasks.make_letters(3, shared=3).train[1]
    added = drawn[3]["a"][0]
    assert answer == "".join(str((int(digit) + added) % 10) for digit in question[2:5])


def test_welchs_interval_is_scipys():
    a, b = [1.0, 2.0, 4.0, 3.0], [0.5, 0.7, 0.2]
    expected = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    found = tables.welch([a, b], [1, -1])
    assert found == pytest.approx([2.5 - 1.4 / 3, expected.low, expected.high])


@pytest.mark.parametrize("task", ["arith", "letters"])
def test_a_task_made_again_is_the_same(task, tmp_path):
    make_tasks.main(["--out", str(tmp_path), task])
    for split in ("train", "test"):
        name = f"{task}/{split}.jsonl"
        assert (tmp_path / name).read_bytes() == (ASSETS / name).read_bytes()
    problems = rows(ASSETS / task / "test.jsonl")
    again, committed = (pass_rates(root / task, problems, 8).mean() for root in (tmp_path, ASSETS))
    assert again == pytest.approx(committed, abs=0.03)


# ------------------------------------------ warm starts -------------------------------------------

SOLVED = [{"question": "ab"[: 1 + i % 2], "solution": "x" * (1 + i)} for i in range(5)]


@pytest.fixture
def start(tmp_path):
    """The untrained small model on disk, and a file of worked solutions of unequal length."""
    pytest.importorskip("accelerate")
    for part in make_tasks.small_model():
        part.save_pretrained(tmp_path / "start")
    (tmp_path / "solved.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SOLVED))
    return [str(tmp_path / name) for name in ("start", "solved.jsonl", "out")]


def test_a_warm_starts_loss_is_cross_entropy_over_solution_tokens(start):
    flags = "--instruction {question}= --steps 30 --batch 5 --lr 0.003"
    losses = warm_start.main([*start, *flags.split()])
    model, tokenizer = load(start[0])
    naive = []
    for row in SOLVED:
        texts = row["question"] + "=", row["solution"]
        prompt, solution = (tokenizer(text)["input_ids"] for text in texts)
        logprobs = model(torch.tensor([prompt + solution])).logits[0].log_softmax(-1)
        targets = [*solution, tokenizer.eos_token_id]
        naive += [-logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(targets)]
    assert losses[0] == pytest.approx(np.mean(naive), abs=1e-3)  # four digits or so are logged
    assert len(losses) == 30 and losses[-1] < losses[0] / 2


def test_a_warm_start_leaves_a_model_in_the_wanted_type(start):
    for dtype, stored in (("", torch.float32), ("bfloat16", torch.bfloat16)):
        start[2] += dtype
        warm_start.main([*start, "--steps", "1", *(["--dtype", dtype] if dtype else [])])
        model, tokenizer = load(start[2])
        assert model.dtype == stored
        assert tokenizer("a+1")["input_ids"] == load(start[0])[1]("a+1")["input_ids"]


@pytest.mark.parametrize("chat", [True, False])
def test_a_warm_starts_prompt_goes_through_the_chat_template(start, chat, tmp_path):
    tokenizer = make_tasks.small_model()[1]
    turns = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}~{% endif %}"
    args = warm_start.argparse.Namespace(instruction="Q {question}", chat=chat)
    row = warm_start.encode({"question": "1+1", "solution": "2"}, tokenizer, args)
    prompt = "<Q 1+1>~" if chat else "Q 1+1"
    assert tokenizer.decode(row["input_ids"]) == prompt + "2<eos>"
    assert row["labels"].tolist() == [-100] * len(prompt) + row["input_ids"].tolist()[-2:]


@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        (None, ["--steps", "0"], "at least 1"),
        (None, ["--lr", "nan"], "between 0 and 1"),
        (None, ["--lr", "much"], "invalid float"),
        (None, ["--dtype", "int8"], "invalid choice"),
        (None, ["--instruction", "no place"], "{question}"),
        ("", [], "no rows"),
        ('{"question": "1"}\n', [], "row 1: no question or no solution"),
        ('{"question": "1", "solution": "2"}\n[1]\n', [], "row 2: no question or no solution"),
        ("not json\n", [], "Expecting value"),
        (json.dumps({"question": "1" * 100, "solution": "2" * 100}), [], "context of 128"),
    ],
)
def test_a_warm_start_says_in_one_line_what_is_wrong(start, capsys, text, flags, said):
    if text is not None:
        Path(start[1]).write_text(text)
    with pytest.raises(SystemExit) as error:
        warm_start.main([*start, *flags])
    told = capsys.readouterr().err
    assert error.value.code == 2 and said in told
    assert re.fullmatch(r"warm_start\.py: error: .*\n", told)
    assert not Path(start[2]).exists()


def test_a_warm_start_overwrites_nothing_and_needs_its_inputs(start, capsys):
    for i, name in ((0, f"{start[0]}/nothing"), (1, "nothing.jsonl"), (2, start[0])):
        with pytest.raises(SystemExit) as error:
            warm_start.main([*start[:i], name, *start[i + 1 :]])
        assert error.value.code == 2 and "error" in capsys.readouterr().err


# ----------------------------------------- neighbours.py ------------------------------------------


def test_vl_norm_weighs_by_the_length_to_the_minus_three_quarters():
    weights = neighbours.vl_norm_weights(torch.tensor([[1, 16], [81, 1]]), "sequence")
    expected = torch.tensor([[1, 1 / 8], [1 / 27, 1]]) / (2 + 1 / 8 + 1 / 27)
    torch.testing.assert_close(weights, expected)


def test_normalized_sgd_steps_one_length_along_the_mean_of_gradients_and_not_at_zero():
    optimizer = neighbours.NormalizedSGD([x := torch.zeros(1), y := torch.ones(1)], lr=0.5)
    # Means of the gradients: (0, 0), (0.3, 0.4), (0, -1).
    cases = ((0, 0), (0, 1)), ((3, 4), (-0.3, 0.6)), ((-2.7, -13.6), (-0.3, 1.1))
    for gradients, expected in cases:
        x.grad, y.grad = (torch.tensor([float(g)]) for g in gradients)
        optimizer.step()
        assert (x.item(), y.item()) == pytest.approx(expected, abs=1e-6)


def test_scalar_adamw_is_torchs_where_all_squares_are_alike_and_turns_no_gradient():
    """Squares alike: both have one second moment. Else the step is along the mean gradient, and
    the measurement's metric is 1 / its root, as the optimizer's."""
    start = [torch.zeros(2), torch.zeros(1)]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    optimizer = neighbours.ScalarAdamW(ours, lr=0.1)
    torchs = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.0)
    assert neighbours.scalar_diagonal(optimizer, ours) is None
    for scale in (1.0, 3.0, -2.0):
        for a, b in zip(ours, theirs):
            a.grad = torch.full_like(a, scale)
            b.grad = torch.full_like(b, scale)
        optimizer.step()
        torchs.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)
    x, y = torch.zeros(1), torch.zeros(1)
    optimizer = neighbours.ScalarAdamW([x, y], lr=0.1)
    x.grad, y.grad = torch.tensor([3.0]), torch.tensor([4.0])
    optimizer.step()  # the mean square is 12.5
    assert (x.item(), y.item()) == pytest.approx((-0.3 / 12.5**0.5, -0.4 / 12.5**0.5))
    diagonal = neighbours.scalar_diagonal(optimizer, [x, y])
    assert [d.item() for d in diagonal] == pytest.approx([12.5**-0.5] * 2)


def test_vespo_weighs_each_sequence_by_its_ratio():
    logprobs = torch.tensor([[-1.0, -2.0], [-1.0, 0.0], [-9.0, -9.0]], requires_grad=True)
    shift = torch.tensor([[0.0, math.log(2)], [math.log(2), 0.0], [0.0, 100.0]])  # W = 2, 2, e^100
    advantages, weights = torch.tensor([[1.0], [-1.0], [1.0]]), torch.tensor([[0.5], [0.25], [1.0]])
    for old, phi in (
        (logprobs - shift, [2**2 * math.exp(3 * (1 - 2)), 2**3 * math.exp(2 * (1 - 2)), 0.0]),
        (logprobs, [1.0, 1.0, 1.0]),  # a batch's first update is REINFORCE's
    ):
        loss = neighbours.vespo_loss(logprobs, old.detach(), advantages, weights, clip=0.0)
        (found,) = torch.autograd.grad(loss, logprobs)
        expected = -weights * advantages * torch.tensor(phi)[:, None]
        torch.testing.assert_close(found, expected.expand(3, 2))


@pytest.mark.parametrize("flags, task", [({}, "letters"), (dict(data="rows.jsonl"), "math")])
def test_neighbours_config_names_a_run_after_task_and_method(flags, task):
    config = neighbours.Config(method="vespo", seed=3, device="cpu", **flags)
    resolved = neighbours.resolve(config)
    assert resolved.task == task and resolved.out == f"runs/{task}-vespo-std-3"
    assert neighbours.resolve(resolved) == resolved
    assert neighbours.resolve(replace(config, out="here")).out == "here"


def test_neighbours_measure_the_same_policy_gradient(monkeypatch):
    """With tokens weighed and losses taken by other functions: a batch's first update is made by
    the policy that sampled it."""
    config = grpo.resolve(grpo.Config(prompts=3, group=4, curvature=True, device="cpu"))
    policy = grpo.load_policy(config)
    problems = grpo.load_problems(config, None, grpo.exact_match)[0][:3]
    problems = grpo.encode_problems(problems, policy, config)
    uniforms = grpo.draw(config, grpo.TRAIN, 0, range(3), 4)
    batch = grpo.rollout(policy, [problem.prompt for problem in problems], uniforms, 1.0)
    batch.rewards = torch.tensor([[0.0, 1, 1, 0], [1, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.float64)
    batch.weights = grpo.token_weights(batch.lengths, "sequence")
    optimizer = torch.optim.SGD([*policy.masters.values()], lr=0.1)
    gradient = [torch.ones_like(master) for master in policy.masters.values()]
    grpo.set_gradient(policy, gradient, 0.0)
    columns = grpo.measure(policy, batch, "abc", config, optimizer)[1]
    monkeypatch.setattr(grpo, "policy_loss", neighbours.vespo_loss)
    batch.weights = neighbours.vl_norm_weights(batch.lengths, "sequence")
    again = grpo.measure(policy, batch, "abc", config, optimizer)[1]
    assert columns["prompt_grad_norm"][0] > 0
    torch.testing.assert_close(again, columns, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("method", ["vl-norm", "nsgd --lr 0.1", "vespo --epochs 2", "scalar"])
def test_neighbours_trains_by_each_method(method, tmp_path):
    flags = f"--eval-problems 3 --out {tmp_path}/run --prompts 4 --group 4 --steps 8"
    command = [sys.executable, neighbours.__file__, *method.split(), *flags.split()]
    subprocess.run(command, check=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count('"skipped": 0') == 8


# ----------------------------------------- experiment.py ------------------------------------------


@pytest.mark.parametrize("norm", ["none", "std"])
@pytest.mark.parametrize("group", [2, 4])
def test_expected_gradients_are_those_over_all_possible_groups(norm, group):
    """One prompt, pass rate J = sigmoid(z): dJ/dz = J (1 - J), and d log pi/dz is 1 - J or -J."""
    J, expected = 0.3, 0.0
    for rewards in itertools.product((0.0, 1.0), repeat=group):
        r = torch.tensor([rewards], dtype=torch.float64)
        terms = grpo.group_advantages(r, norm, eps=0.0) * (r - J)
        expected += float(terms.mean()) * math.prod(J if reward else 1 - J for reward in rewards)
    found = tables.family_scale(np.array([J]), group, norm)
    assert found == pytest.approx([expected / (J * (1 - J))])


def write_levels(path, norm, seed, rates, later=None):
    """The logs of 30 steps at constant pass rates by level, which may change at step 20."""
    by_level = {
        level: [rate] * 20 + [(later or rates)[level]] * 10 for level, rate in rates.items()
    }
    write_run(path, by_level, norm, seed)


def test_fresh_is_the_mean_gap_of_the_stored_pairs():
    text = (ROOT / "benchmarks" / "results" / "letters-gaps-20-29.json").read_text()
    gaps = [100 * sum(pair["gap"]) / 250 for pair in json.loads(text).values()]
    low, high = scipy.stats.t.interval(0.95, 9, np.mean(gaps), scipy.stats.sem(gaps))
    expected = f"| 10 | {np.mean(gaps):.3g} [{low:.3g}, {high:.3g}] |"
    assert expected == "| 10 | 1.69 [1.29, 2.1] |"
    assert expected in tables.fresh(Path())


@pytest.mark.parametrize("study", ["pretrained", "ahead", "foretell", "undo", "letters", "words"])
def test_run_takes_the_packed_runs_as_made(study, tmp_path, monkeypatch):
    """Those of `pretrained` are an earlier grpo.py's, with other settings of what is measured."""
    monkeypatch.chdir(tmp_path)
    tables.unpack([study], Path("runs/experiment"))

    def started(given, shared):
        return given.out / "tasks" / f"SmolLM2-135M-Instruct-{shared}-of-3"

    monkeypatch.setattr(experiment, "pretrained_start", started)
    monkeypatch.setattr(experiment, "warm_start", lambda *arguments: None)
    (tmp_path / "none.jsonl").write_text("")
    given = SimpleNamespace(out=Path("runs/experiment"), seeds=range(10))
    given.svamp = given.gsm8k = Path("none.jsonl")
    given.model = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    plan = dict(getattr(experiment, study)(given))
    made = [path.parent for path in given.out.glob(f"{study}/*/*/model")]
    for path in made:
        flags = plan[f"{path.relative_to(given.out / study)}"]
        assert experiment.run(path, flags, 1) == f"{path}: there already"
        changed = experiment.run(path, flags | dict(temperature=0.5), 1)
        assert changed == f"{path}: there already, but made with another temperature: remove it"
    assert (
        len(made) == dict(pretrained=56, ahead=6, foretell=60, undo=30, letters=35, words=2)[study]
    )


def test_the_tables_of_runs_whose_gaps_are_known(tmp_path):
    for study in ("letters", "arith"):
        for seed, lead in enumerate((0.06, 0.09, 0.12)):  # on one level of three
            rates = dict(a=0.2, b=0.5, c=0.8)
            write_levels(tmp_path / study / "default" / f"none-{seed}", "none", seed, rates)
            more = rates | dict(a=0.2 + lead)
            write_levels(tmp_path / study / "default" / f"std-{seed}", "std", seed, more)
    low, high = 3 + scipy.stats.t.ppf([0.025, 0.975], 2) / 3**0.5  # of 2, 3 and 4 points
    gap, both = f"3 [{low:.3g}, {high:.3g}]", tables.embedded(tmp_path)
    assert f"| 0 to 30 | {gap} | {gap} |" in both
    assert "|  | 30 |\n| --- | --- |\n| letters, none | 0.5 |\n| letters, std | 0.53 |" in both
    mean = f"0.53 [{0.5 + low / 100:.3g}, {0.5 + high / 100:.3g}]"
    assert tables.table(tmp_path).count(f" | {mean} | {gap} | 0 |") == 2  # in each task, of std
    found = tables.in_window(experiment.whole_runs(tmp_path / "letters" / "default"))
    assert found["last step"] == [30]  # the pass rate never comes to 0.95
    assert found["gap, hardest"] == pytest.approx([6, 9, 12])
    assert found["gap, middle"] == found["gap, easiest"] == [0, 0, 0]
    assert found["held out"] == pytest.approx([2, 3, 4])


def test_letters_less_control_in_a_study_that_is_still_under_way(tmp_path):
    """The control is learned at step 20, where the lead in letters opens: 6, 9 and 12 points over
    all 30 steps."""
    half = scipy.stats.t.ppf(0.975, 2) * 3**0.5
    rates, learned = dict(a=0.2, b=0.4, c=0.6), dict(a=0.95, b=0.96, c=0.97)
    for seed, lead in enumerate((0.18, 0.27, 0.36)):
        for shared, after, leads in ((0, rates, (0, lead)), (3, learned, (0.03, 0.03))):
            folder = tmp_path / "pretrained" / f"Some-{shared}-of-3"
            early, late = (
                {level: rate + more for level, rate in now.items()}
                for now, more in zip((rates, after), leads)
            )
            write_levels(folder / f"none-{seed}", "none", seed, rates, after)
            write_levels(folder / f"std-{seed}", "std", seed, early, late)
        third = {level: rate + lead / 3 for level, rate in rates.items()}
        path = tmp_path / "pretrained" / "letters-batch" / f"batch-{seed}"
        write_levels(path, "batch", seed, rates, third)
    write_levels(folder / "none-3", "none", 3, rates, learned)  # its pair is not made yet
    (tmp_path / "pretrained" / "letters-lora" / "none-0").mkdir(parents=True)  # only begun
    lines = tables.carried(tmp_path).splitlines()
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in lines}
    column = rows[""].index("gap, hardest")
    found = {name: row[column].strip(" |") for name, row in rows.items()}
    assert found["Some-0-of-3"] == f"9 [{9 - half:.3g}, {9 + half:.3g}]"
    assert rows["Some-3-of-3"][1] == "20"
    low, high = (f"{6 + sign * half * 2 / 3:.3g}" for sign in (-1, 1))
    assert found["letters, std over batch"] == f"6 [{low}, {high}]"
    low, high = (f"{3 + sign * half / 3:.3g}" for sign in (-1, 1))
    assert found["letters, batch over none"] == f"3 [{low}, {high}]"
    assert found["letters less control"] == f"6 [{6 - half:.3g}, {6 + half:.3g}]"
    # To step 20 the lead is one of 21 steps: 27 / 21 points less the control's 3.
    low, high = (f"{9 / 7 - 3 + sign * half / 7:.3g}" for sign in (-1, 1))
    assert found["the same, both to the control's last step"] == f"-1.71 [{low}, {high}]"
    assert "letters-lora" not in found


def test_thirds_of_runs_that_part_in_the_last_one(tmp_path):
    rates, half = dict(a=0.25, b=0.75), scipy.stats.t.ppf(0.975, 2) / 3**0.5
    for seed in range(3):  # ahead by 1, 2 and 3 points
        later = {level: rate + 0.01 * (seed + 1) for level, rate in rates.items()}
        write_levels(tmp_path / "model" / "Some" / f"none-{seed}", "none", seed, rates)
        write_levels(tmp_path / "model" / "Some" / f"std-{seed}", "std", seed, rates, later)
    gap, alike = f"2 [{2 - half:.3g}, {2 + half:.3g}]", "0 [0, 0]"
    lines = tables.thirds(tmp_path).splitlines()
    assert lines[0] == "|  | 0 to 10 | 10 to 20 | 20 to 30 |"
    assert lines[2] == "| pass rate, none | " + " | ".join(["0.5 [0.5, 0.5]"] * 3) + " |"
    assert lines[4] == f"| gap, points | {alike} | {alike} | {gap} |"
    assert lines[5] == "| prompts without variance, none | " + " | ".join([alike] * 3) + " |"


def test_the_contrast_of_drawn_tasks_whose_gaps_are_known(tmp_path):
    start = dict(a=0.2, b=0.5, c=0.8)
    for cell, n in itertools.product(tables.CELLS, range(3)):
        lead = 0.06 + 0.03 * n if cell == "separate-unequal" else 0.03  # on one level of three
        for norm, more in (("none", 0), ("std", lead), ("batch", 0.015 + 0.015 * n)):
            rates = start | dict(a=0.2 + more)
            write_levels(tmp_path / "drawn" / cell / f"{n}" / f"{norm}-0", norm, 0, rates)
    rows = [line.split(" | ") for line in tables.contrast(tmp_path).splitlines()[2:]]
    found = {row[0].strip("| "): [cell.strip("| ") for cell in row[1:]] for row in rows}
    half = scipy.stats.t.ppf(0.975, 2) / 3**0.5  # of 2, 3 and 4 points over three tasks
    assert found["std, separate-unequal"][1] == f"3 [{3 - half:.3g}, {3 + half:.3g}]"
    assert found["std, separate-unequal"][2] == f"9 [{9 - 3 * half:.3g}, {9 + 3 * half:.3g}]"
    assert found["std, shared-equal"][1] == "1 [1, 1]"
    assert (
        found["std, separate-unequal less the others"][1] == f"2 [{2 - half:.3g}, {2 + half:.3g}]"
    )
    # Batch leads by 0.5, 1 and 1.5 points everywhere: variances of 0.25 in all cells (Welch).
    half = scipy.stats.t.ppf(0.975, (4 / 3) ** 2 / ((1 + 3 / 81) / 2)) / 3
    both = found["std less batch, separate-unequal less the others"][1]
    assert both == f"2 [{2 - half:.3g}, {2 + half:.3g}]"


def write_progress(path, norm, seed, rates, **progress):
    """Logs of steps of one length, in which each level's progress (pairs none, std) is constant."""
    lengths = dict.fromkeys(("length_none", "length_std", "length_var", "length_taken"), 1.0)

    def measured(step, level):
        none, std = progress[level]
        values = dict(progress_none=[none] * 2, progress_std=[std] * 2, progress_var=[std] * 2)
        halves = dict(pass_rate_half=[0.5, 0.5], reward_std_half=[0.5, 0.5], grad_sq_signal=1.0)
        return values | halves

    write_run(path, rates, norm, seed, columns=lengths, measured=measured)


def test_leads_foretold_are_progress_times_steps_beside_those_seen(tmp_path):
    """std should gain 0.1 points a step on a, and lose 0.05 on b; by step 40 it gained 1, 2 or 3
    points on a (three seeds), and lost 1, 2 or 3 on b."""
    flat = dict(a=[0.5] * 60, b=[0.3] * 60)
    progress = dict(a=(0.001, 0.002), b=(0.001, 0.0005))
    for seed in range(3):
        lead = 0.01 * (seed + 1)
        parted = dict(a=[0.5] * 30 + [0.5 + lead] * 30, b=[0.3] * 30 + [0.3 - lead] * 30)
        write_progress(tmp_path / "x" / f"none-{seed}", "none", seed, flat, **progress)
        write_run(tmp_path / "x" / f"std-{seed}", parted, "std", seed)
    runs = experiment.whole_runs(tmp_path / "x")
    none = [run for run in runs if run.config["norm"] == "none"]
    rows, slope = tables.beside_gap(none, runs, "std", 40)
    half = scipy.stats.t.ppf(0.975, 2) / 3**0.5
    assert rows["level a"]["foretold"] == pytest.approx(4)
    assert rows["level b"]["foretold"] == pytest.approx(-2)
    assert rows["level a"]["seen"] == pytest.approx([2, 2 - half, 2 + half], abs=1e-3)
    assert rows["level b"]["seen"] == pytest.approx([-2, -2 - half, -2 + half], abs=1e-3)
    assert rows["level b"]["of none's progress"] == pytest.approx(-0.5)
    assert slope == pytest.approx(4 / 6, abs=1e-3)
    assert tables.same_sign(rows["level a"]) and tables.same_sign(rows["level b"])
    rows, _ = tables.beside_gap(none, runs, "std", 20)  # before the runs part
    assert rows["level a"]["seen"][0] == pytest.approx(0, abs=1e-3)


def test_what_a_level_should_be_ahead_by(tmp_path):
    """By progress: 0.1 points a step from step 10 on. By clocks: in groups of two a deviation is
    one half or nothing, so that std only changes the length; in larger ones the level that has all
    of the gradient keeps its speed, and the other one's is the ratio of their scales."""
    rising = dict(a=[0.5] * 60, b=list(np.linspace(0.05, 0.25, 60)))
    progress = dict(a=(0.001, 0.002), b=(0.001, 0.001))
    write_progress(tmp_path / "none", "none", 0, rising, **progress)
    run = experiment.analyze.read_run(tmp_path / "none")
    ahead = tables.advance([run], "progress", 50)
    assert ahead.loc[(0, "a"), [10, 20, 49]].tolist() == pytest.approx([0, 1, 3.9])
    assert ahead.loc[(0, "b")].abs().max() == 0
    run.config["group"] = 2
    assert tables.advance([run], "groups", 50).abs().to_numpy().max() == pytest.approx(0, abs=1e-12)
    run.config["group"] = 16
    run.prompts.loc[run.prompts["level"] == "b", "grad_sq_signal"] = 0.0
    ahead = tables.advance([run], "groups", 50)
    assert ahead.loc[(0, "a")].abs().max() == pytest.approx(0, abs=1e-9)
    clock, curve = 0.0, np.linspace(0.05, 0.25, 60)
    for _ in range(40):
        rate = np.interp(clock, range(60), curve)
        of_b, of_a = tables.family_scale(np.array([rate, 0.5]), 16, "std")
        clock += of_b / of_a
    lead = 100 * (np.interp(clock, range(60), curve) - curve[40])
    assert ahead.loc[(0, "b"), 40] == pytest.approx(lead, rel=1e-2)  # of smoothed rates
    # All deviations are 0.3 in these logs: no level is faster than another.
    assert tables.advance([run], "1 / σ", 50).abs().to_numpy().max() == pytest.approx(0, abs=1e-9)


def test_words_by_pass_rate(tmp_path):
    rates = dict(a=[0.5] * 60, b=[0.3] * 60)
    write_progress(
        tmp_path / "words" / "x" / "none-0", "none", 0, rates, a=(0.001, 0.002), b=(0, 0)
    )
    lines = [line.split(" | ") for line in tables.words(tmp_path).splitlines()]
    column = lines[0].index("std less none")
    assert [line[0] for line in lines[2:]] == [
        "| x, seed 0, pass rate up to ⅔",
        "| x, seed 0, all",
    ]
    assert lines[2][column].startswith("5")  # of 0.001, and of nothing: 5 points in 100 steps


CITED = {  # on the pages
    "foretold": ["| all to step 60 | 43 | 41 | 41 |"],
    "undone": ["0.594 [0.437, 0.752]"],
    "language": ["1.63 [1.49, 1.77]", "step 60, level b | -8.09 [-108, 92.2] | 6.94 [3.5, 10.4] |"],
    "words": ["-12.7 [-28.4, 3.03]", "-2.51 [-8.25, 3.22]"],
    "findings": ["1.76 [1.38, 2.15]"],
    "levels": ["1.12 [1.05, 1.19]"],
    "embedded": ["3.68 [3.07, 4.29]"],
    "picture": ["10 pairs of runs: Three phases: alike on average to step 34"],
    "carried": ["2.32 [1.93, 2.71]"],
    "thirds": ["0.438 [-0.985, 1.86]"],
    "fresh": ["1.69 [1.29, 2.1]"],
    "exact": ["1.09 [1.09, 1.11]"],
}


@pytest.mark.parametrize("name", tables.PACKED)
def test_every_table_comes_from_the_packed_logs_in_a_minute(name, tmp_path):
    script = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), name]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    start = sum(os.times()[2:4])
    found = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert sum(os.times()[2:4]) - start < 60  # of processor time
    assert all(number in found.stdout for number in CITED[name])


def test_a_table_without_packed_logs_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tables.py", "contrast"])
    with pytest.raises(SystemExit) as ended:
        tables.main()
    assert ended.value.code == 2
    assert "make its runs" in capsys.readouterr().err
