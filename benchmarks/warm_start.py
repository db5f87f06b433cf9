"""Warm-start a causal language model on worked solutions, and leave a directory for `grpo.py --model`.

    pip install accelerate
    python benchmarks/warm_start.py MODEL SOLUTIONS.jsonl OUT_DIR --instruction $'Question: {question}\\nAnswer:'

RL raises what is sampled already: a model that never answers in the expected form earns nothing. A few steps on
solutions (columns question and solution) teach it the form. The loss is the cross-entropy of the solution's tokens and
the end token; prompts are built as grpo.py builds them. The weights train in float32, whatever they are saved in.
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
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
    for number, row in enumerate(rows, 1):
        texts = [row.get(column) for column in ("question", "solution")] if isinstance(row, dict) else [None]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{path}, row {number}: no question or no solution")
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def encode(row: dict[str, str], tokenizer: Any, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Tokens of prompt, solution and end; in `labels` those of the prompt are -100, which means not predicted."""
    text, chat = args.instruction.replace("{question}", row["question"]), args.chat and tokenizer.chat_template
    if chat:
        dialog = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(dialog, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    solution = [*tokenizer(row["solution"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": torch.tensor(prompt + solution), "labels": torch.tensor([-100] * len(prompt) + solution)}


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch, padded on the right, where no token of a causal model looks: so it needs no mask."""
    padding = {"input_ids": 0, "labels": -100}
    return {key: pad_sequence([row[key] for row in rows], True, value) for key, value in padding.items()}


def warm_start(args: argparse.Namespace) -> list[float]:
    """Train and save; returns each step's loss. Raises ValueError, or what a library raises, for bad input."""
    if "{question}" not in args.instruction or min(args.steps, args.batch) < 1 or not 0 < args.lr < 1:
        raise ValueError("--instruction needs {question}, --steps and --batch at least 1, --lr a value between 0 and 1")
    if Path(args.out).exists():
        raise ValueError(f"{args.out} exists")
    rows = load_rows(args.data)
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model {args.model} names no end-of-sequence token")
    dtype, data = getattr(torch, args.dtype or "", model.dtype), [encode(row, tokenizer, args) for row in rows]
    longest, context = max(len(row["labels"]) for row in data), getattr(model.config, "max_position_embeddings", None)
    if context and longest > context:
        raise ValueError(f"{args.data}: a row of {longest} tokens, more than the model's context of {context}")
    sizes: dict[str, Any] = {"max_steps": args.steps, "per_device_train_batch_size": args.batch, "logging_steps": 1}
    quiet: dict[str, Any] = {"save_strategy": "no", "report_to": [], "dataloader_pin_memory": torch.cuda.is_available()}
    settings = TrainingArguments(args.out, learning_rate=args.lr, **sizes, **quiet)
    trainer = Trainer(model.float(), settings, collate, data)  # type: ignore[arg-type]
    trainer.train()
    model.to(dtype).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """The command line; returns each step's loss."""
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="warm_start.py", usage=argparse.SUPPRESS, description=about)
    parser.add_argument("model", help="directory or hub name")
    parser.add_argument("data", help="JSONL file with columns question and solution")
    parser.add_argument("out", help="directory to make")
    parser.add_argument("--instruction", default="{question}", help="prompt text around {question}")
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction, default=True, help="use a chat template")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16, help="solutions a step")
    parser.add_argument("--lr", type=float, default=1e-5, help="falls linearly to 0")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the saved weights; as they were")
    args = parser.parse_args(arguments)
    logging.disable_progress_bar()
    try:
        return warm_start(args)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        return parser.error((str(error).strip() or repr(error)).splitlines()[0])  # one line, exit status 2


if __name__ == "__main__":
    main()
