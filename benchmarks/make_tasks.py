"""Make the embedded tasks: problems, and a small language model that sometimes solves some of them.

    python benchmarks/make_tasks.py                       # assets/arith, assets/letters: 2 minutes
    python benchmarks/make_tasks.py --out DIR letters     # one of them, elsewhere
    python benchmarks/make_tasks.py --out DIR --seed 1    # others of their kind

Each directory gets train.jsonl and test.jsonl (columns question, answer and level; no problem is in
both) and model/ (float32, with its tokenizer). The problems come out the same byte for byte; the
weights do up to rounding, which differs between machines.

RL can only raise what is sampled already. So both models are trained here, by supervision, on
solutions with slips: like a pretrained model they have the skills, and slip as often as their
teacher did.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

Pairs = list[tuple[str, str]]  # (question, answer), or (question, solution)

HELD_OUT = 512


class Task(NamedTuple):
    """Problems to train on, problems held out, the warm start's solutions, which have slips, and
    the level of a question."""

    train: Pairs
    test: Pairs
    solutions: Pairs
    level: Callable[[str], Any]


def carries(question: str) -> int:
    """How often a sum carries: each time its digits add up to 9 less."""
    numbers = question[:3], question[4:7], str(int(question[:3]) + int(question[4:7]))
    a, b, total = (sum(map(int, digits)) for digits in numbers)
    return (a + b - total) // 9


def make_arith(seed: int = 0) -> Task:
    """Three-digit sums, the answer's units digit first, "047+085=" and "2310": every problem takes
    one skill, the carry.

    The solutions are those of somebody who forgets each carry with probability 1/2. There are four
    times as many as training problems: with fewer, the model would memorize the slips.
    """
    rng = np.random.default_rng(seed)
    size = 1 << 15
    pairs = rng.permutation(10**6)[: size + HELD_OUT]  # problem k is k // 1000 + k % 1000
    texts = []  # of the answers, of the solutions
    for slip in (0.0, 0.5):
        carry, digits = np.zeros_like(pairs), []
        for place in (1, 10, 100):
            total = pairs // 1000 // place % 10 + pairs // place % 10 + carry
            digits.append(total % 10)
            carry = total // 10 * (rng.random(len(pairs)) >= slip)
        texts.append(["".join(map(str, row)) for row in np.stack([*digits, carry], 1).tolist()])
    questions = [f"{k // 1000:03}+{k % 1000:03}=" for k in pairs.tolist()]
    answers, solutions = (list(zip(questions, column, strict=True)) for column in texts)
    return Task(answers[: size // 4], answers[size:], solutions[:size], carries)


# By letter: what it adds to each digit, what a slip adds instead, and how often a digit is right in
# the warm start's solutions.
LETTERS = {
    "a": (3, 7, 0.30),
    "b": (8, 1, 0.33),
    "c": (1, 9, 0.55),
    "d": (6, 8, 0.75),
    "e": (9, 0, 0.87),
    "f": (4, 3, 0.97),
}


def draw_skills(seed: int, equal: bool = False) -> dict[str, tuple[int, int, float]]:
    """Six skills like LETTERS (which seed 0 gives), with other digits and slips and the rates in
    another order. equal: one rate for all, chosen so that as many answers are right overall."""
    skills = LETTERS
    if seed:
        rng = np.random.default_rng((seed, 1))
        right, wrong = (rng.permutation(10)[:6].tolist() for _ in range(2))
        while any(a == b for a, b in zip(right, wrong, strict=True)):
            wrong = rng.permutation(10)[:6].tolist()
        rates = rng.permutation([rate for *_, rate in LETTERS.values()]).tolist()
        skills = dict(zip(LETTERS, zip(right, wrong, rates, strict=True), strict=True))
    mean = float(np.mean([rate**3 for *_, rate in skills.values()])) ** (1 / 3)
    return {x: (a, b, mean if equal else rate) for x, (a, b, rate) in skills.items()}


def make_letters(seed: int = 0, shared: int = 0, equal: bool = False) -> Task:
    """Six skills of unequal difficulty, one a letter: "c+047=" asks for the digits of 047 with 1
    added to each, "158".

    Sums are modulo 10. A slip adds another digit, which is also fixed for each letter. If one digit
    is right with probability q, all three are with q^3: from 0.03 to 0.91. The digits follow no
    pattern, so that the skills are separate: when every slip was 5 off, one letter's gradient
    pointed against another's (cosines down to -0.6), and the hard letters were never learnt.

    To the first `shared` digits, every letter adds what "a" adds (or slips as "a" does) at its own
    rate: a skill that all letters have in common.
    """
    rng, skills = np.random.default_rng(seed), draw_skills(seed, equal)
    orders = [rng.permutation(1000).tolist() for _ in LETTERS]
    numbers = [f"{number:03}" for row in zip(*orders, strict=True) for number in row]
    # Letters in turn: as often in train as in test.
    problems = list(zip([*LETTERS] * 1000, numbers, strict=True))

    def solve(letter: str, number: str, slips: bool) -> tuple[str, str]:
        *own, rate = skills[letter]
        pairs = [skills["a"][:2]] * shared + [own] * (3 - shared)
        added = [wrong if slips and rng.random() >= rate else right for right, wrong in pairs]
        digits = [str((int(d) + a) % 10) for d, a in zip(number, added, strict=True)]
        return f"{letter}+{number}=", "".join(digits)

    rows = [solve(*problem, False) for problem in problems]
    copies = problems[:-HELD_OUT] * 24  # each with slips of its own
    solutions = [solve(*problem, True) for problem in copies]
    return Task(rows[:-HELD_OUT], rows[-HELD_OUT:], solutions, lambda question: question[0])


TASKS: dict[str, Callable[[int], Task]] = {"arith": make_arith, "letters": make_letters}


def write_problems(task: Task, out: Path) -> None:
    """Write train.jsonl and test.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    for split, pairs in (("train", task.train), ("test", task.test)):
        rows = [dict(question=q, answer=a, level=task.level(q)) for q, a in pairs]
        text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
        (out / f"{split}.jsonl").write_text(text, encoding="utf-8")


def small_model(seed: int = 0) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
    """An untrained one-layer transformer of 133k parameters, and a tokenizer whose tokens are
    characters."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: i for i, token in enumerate(["<eos>", "<unk>", *characters])}
    # Without merges its tokens are characters.
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    names = dict(eos_token="<eos>", unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    shape = GPT2Config(
        vocab_size=len(vocabulary),
        n_positions=128,
        n_embd=96,
        n_layer=1,
        n_head=8,
        n_inner=384,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(shape)
    model.loss_type = "ForCausalLM"  # what transformers falls back to, with a warning
    return model, tokenizer


def warm_start(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Pairs,
    seed: int = 0,
    steps: int = 2000,
) -> None:
    """Train the model in place: cross-entropy of the solutions' tokens, AdamW, batches of 64, and a
    learning rate that falls linearly to 0.

    All questions have one length, and so have all solutions: a batch needs no padding.
    """
    prompts, solutions = (tokenizer(list(texts))["input_ids"] for texts in zip(*pairs, strict=True))
    end = tokenizer.eos_token_id
    tokens = torch.tensor([[*p, *s, end] for p, s in zip(prompts, solutions, strict=True)])
    labels = tokens.clone()
    labels[:, : len(prompts[0])] = -100  # not predicted
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.95), weight_decay=0.1)
    rng, queue, warmup = np.random.default_rng(seed), np.zeros(0, dtype=np.int64), steps // 20
    for step in range(steps):
        if len(queue) < 64:
            queue = np.concatenate([queue, rng.permutation(len(pairs))])
        rows, queue = queue[:64], queue[64:]
        loss = model(tokens[rows], labels=labels[rows], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 6e-3 * min((step + 1) / warmup, 1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
        if step % 200 == 0:
            print(f"warm start {step:>5}/{steps}  loss {loss.item():.3f}", flush=True)


def make(task: Task, out: Path, seed: int = 0) -> None:
    """Write the task's directory."""
    model, tokenizer = small_model(seed)
    write_problems(task, out)
    warm_start(model, tokenizer, task.solutions, seed)
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    settings = out / "model" / "tokenizer_config.json"  # a name that transformers 4 knows, too
    text = settings.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
    settings.write_text(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names, assets = ", ".join(TASKS), Path(__file__).resolve().parent.parent / "assets"
    choices: Any = dict(choices=[[], *TASKS], metavar="task", help=f"of {names}; none: all of them")
    parser.add_argument("tasks", nargs="*", **choices)
    parser.add_argument("--out", type=Path, default=assets)
    parser.add_argument("--seed", type=int, default=0, help="0: the embedded ones")
    args = parser.parse_args(arguments)
    for name in args.tasks or TASKS:
        make(TASKS[name](args.seed), args.out / name, args.seed)


if __name__ == "__main__":
    main()
