"""Warm-start a causal language model on worked solutions, for `grpo.py --model OUT_DIR`.

    pip install accelerate
    python benchmarks/warm_start.py MODEL SOLUTIONS.jsonl OUT_DIR \\
        --instruction $'Question: {question}\\nAnswer:'

RL raises what is sampled already: a model that never answers in the expected form earns nothing. A
few steps on solutions (columns question and solution) teach it the form. The loss is the
cross-entropy of the solution's tokens and the end token; prompts are built as grpo.py builds them.
The weights train in float32, whatever they are saved in.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.utils import logging


def load_rows(path: str) -> list[dict[str, str]]:
    """The file's rows. Raises ValueError for one that lacks a question or a solution."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line.strip()]
    for number, row in enumerate(rows, 1):
        values = row if isinstance(row, dict) else {}
        texts = values.get("question"), values.get("solution")
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{path}, row {number}: no question or no solution")
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def encode(
    row: dict[str, str], tokenizer: Any, args: argparse.Namespace
) -> dict[str, torch.Tensor]:
    """Tokens of prompt, solution and end; in `labels` those of the prompt are -100, which means not
    predicted."""
    text = args.instruction.replace("{question}", row["question"])
    chat = args.chat and tokenizer.chat_template
    if chat:
        dialog = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(dialog, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    solution = tokenizer(row["solution"], add_special_tokens=False)["input_ids"]
    solution = [*solution, tokenizer.eos_token_id]
    tokens, labels = prompt + solution, [-100] * len(prompt) + solution
    return {"input_ids": torch.tensor(tokens), "labels": torch.tensor(labels)}


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch, padded on the right, where no token of a causal model looks: so it needs no mask."""
    tokens, labels = ([row[key] for row in rows] for key in ("input_ids", "labels"))
    return {"input_ids": pad_sequence(tokens, True, 0), "labels": pad_sequence(labels, True, -100)}


def warm_start(args: argparse.Namespace) -> list[float]:
    """Train and save; returns each step's loss. Raises ValueError, or what a library raises, for
    input that cannot be used."""
    valid = min(args.steps, args.batch) >= 1 and 0 < args.lr < 1
    if not valid or "{question}" not in args.instruction:
        needs = "--steps and --batch at least 1, --lr a value between 0 and 1"
        raise ValueError(f"--instruction needs {{question}}, {needs}")
    if Path(args.out).exists():
        raise ValueError(f"{args.out} exists")
    rows = load_rows(args.data)
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    options: Any = dict(dtype="auto", trust_remote_code=False)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, **options)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model {args.model} names no end-of-sequence token")
    dtype = getattr(torch, args.dtype or "", model.dtype)
    data = [encode(row, tokenizer, args) for row in rows]
    longest = max(len(row["labels"]) for row in data)
    context = getattr(model.config, "max_position_embeddings", None)
    if context and longest > context:
        more = f"more than the model's context of {context}"
        raise ValueError(f"{args.data}: a row of {longest} tokens, {more}")
    sizes: Any = dict(max_steps=args.steps, per_device_train_batch_size=args.batch)
    quiet: Any = dict(logging_steps=1, save_strategy="no", report_to=[])
    quiet["dataloader_pin_memory"] = torch.cuda.is_available()
    settings = TrainingArguments(args.out, learning_rate=args.lr, **sizes, **quiet)
    trainer = Trainer(model.float(), settings, collate, data)  # type: ignore[arg-type]
    trainer.train()
    model.to(dtype).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """The command line; returns each step's loss."""
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser("warm_start.py", argparse.SUPPRESS, about)
    add, yes_no = parser.add_argument, argparse.BooleanOptionalAction
    add("model", help="directory or hub name")
    add("data", help="JSONL file with columns question and solution")
    add("out", help="directory to make")
    add("--instruction", default="{question}", help="prompt text around {question}")
    add("--chat", action=yes_no, default=True, help="use a chat template")
    add("--steps", type=int, default=16)
    add("--batch", type=int, default=16, help="solutions a step")
    add("--lr", type=float, default=1e-5, help="falls linearly to 0")
    add("--dtype", choices=["float32", "bfloat16"], help="of the saved weights; else as they were")
    args = parser.parse_args(arguments)
    logging.disable_progress_bar()
    try:
        return warm_start(args)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        said = str(error).strip() or repr(error)
        return parser.error(said.splitlines()[0])  # exit status 2


if __name__ == "__main__":
    main()
