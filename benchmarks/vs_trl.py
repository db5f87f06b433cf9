"""Seconds and memory of a training step, here and in TRL's GRPOTrainer, on the same work.

    pip install trl
    python benchmarks/vs_trl.py HuggingFaceTB/SmolLM2-135M-Instruct PROBLEMS.jsonl    # columns question and answer
    python benchmarks/vs_trl.py tiny                                                  # the embedded arith, float32
    python benchmarks/vs_trl.py MODEL PROBLEMS.jsonl --growth                         # ours alone, to 4 times P, G, T

Both sides: P prompts x G completions of at most T tokens at temperature 1, AdamW, no KL term, one update a batch,
the median of --steps steps after one that warms up, each side in a process of its own, one after the other. bfloat16
means what each side does under that name: here bfloat16 weights with float32 masters, in TRL autocast. TRL without
gradient checkpointing and with micro-batches of 8, which are its faster settings on a CPU.

The reward is a hash of the completion's text. A real one would favour this program, which spends nothing on a prompt
whose completions were all rewarded alike: so every prompt has a gradient, on both sides. Memory is the peak of the
whole process, start and saving included; on CUDA that of the device's allocations.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LABELS = {"ours": "grpo.py", "measured": "grpo.py, geometry and probe every step", "trl": "TRL"}


def reward(completion: str, answer: str) -> float:
    """A number in [0, 1) that depends on the text alone and differs within a group."""
    return zlib.crc32(completion.encode()) / 2**32


def our_settings(args: argparse.Namespace, out: str = "") -> Any:
    """A grpo.Config for one more step than are timed."""
    import grpo

    every = int(args.side == "measured")
    return grpo.Config(
        model=args.model,
        data=args.data,
        instruction="{question}",
        prompts=args.prompts,
        group=args.group,
        max_new_tokens=args.new_tokens,
        steps=args.steps + 1,
        lr=1e-6,
        dtype=args.dtype,
        geometry_every=every,
        probe_every=every,
        eval_every=0,
        eval_problems=1,
        out=out,
    )


def run_ours(args: argparse.Namespace) -> list[float]:
    """Seconds of each step of grpo.train, as its log has them."""
    import grpo

    with tempfile.TemporaryDirectory() as out:
        grpo.train(our_settings(args, out), reward=reward)
        lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [line["seconds_rollout"] + line["seconds_update"] for line in lines if "seconds_update" in line]


def run_trl(args: argparse.Namespace) -> list[float]:
    """Seconds of each step of GRPOTrainer, from the beginning of its rollout to the end of its update."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import grpo

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.began, self.seconds = 0.0, list[float]()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)

    def rewards(completions: list, **_: Any) -> list[float | None]:
        return [reward(c if isinstance(c, str) else c[0]["content"], "") for c in completions]

    chat = AutoTokenizer.from_pretrained(args.model).chat_template
    settings = our_settings(args)
    problems, _ = grpo.load_problems(settings, None, reward)
    order = [row for step in range(args.steps + 1) for row in grpo.prompt_rows(step, settings, len(problems))]
    texts = [problems[row][0] for row in order]  # the prompts of our steps
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": x}] if chat else x} for x in texts])
    batch, clock = args.prompts * args.group, Clock()
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out,
            use_cpu=not torch.cuda.is_available(),
            bf16=args.dtype == "bfloat16",
            per_device_train_batch_size=args.micro,
            gradient_accumulation_steps=batch // args.micro,
            num_generations=args.group,
            max_completion_length=args.new_tokens,
            temperature=1.0,
            beta=0.0,
            max_steps=args.steps + 1,
            learning_rate=1e-6,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            shuffle_dataset=False,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": torch.float32},
        )
        GRPOTrainer(args.model, rewards, args=config, train_dataset=rows, callbacks=[clock]).train()
    return clock.seconds


def child(args: argparse.Namespace) -> None:
    """Run one side in this process; the last line it prints is its result."""
    import torch

    torch.set_num_threads(args.threads)
    seconds = run_trl(args) if args.side == "trl" else run_ours(args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    print(json.dumps({"seconds": seconds[1:], "peak": peak}))


def run(side: str, args: argparse.Namespace, **changes: Any) -> Any:
    """The result of one side in a process of its own. Exits with the last line it said where it fails."""
    wanted = {**vars(args), **changes, "side": side}
    command = [sys.executable, __file__, wanted.pop("model"), wanted.pop("data")]
    command += [f"--{key.replace('_', '-')}={value}" for key, value in wanted.items() if key != "growth"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"vs_trl.py: error: {side}: {(done.stderr.strip() or str(done.returncode)).splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def row(*cells: Any) -> None:
    """A line of a markdown table, shown as soon as it is known."""
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def compare(args: argparse.Namespace, dtype: str) -> None:
    """The table's lines of one number format."""
    sides = {side: run(side, args, dtype=dtype) for side in LABELS}
    trl = sides["trl"]
    for side, label in LABELS.items():
        seconds, peak = statistics.median(sides[side]["seconds"]), sides[side]["peak"]
        row(
            dtype,
            label,
            f"{seconds:.3g}",
            f"{statistics.median(trl['seconds']) / seconds:.2f}×",
            f"{peak / 1e9:.2f} GB",
            f"{peak / trl['peak']:.0%}",
        )


def growth(args: argparse.Namespace, dtype: str) -> None:
    """Our cost at one, two and four times the prompts, the group and the length."""
    row("dtype", "what grows", "×1, s", "×2", "×4", "peak ×1", "peak ×4")
    row(*["---"] * 7)
    once = run("ours", args, dtype=dtype)
    for key in ("prompts", "group", "new_tokens"):
        results = [once, *(run("ours", args, dtype=dtype, **{key: getattr(args, key) * k}) for k in (2, 4))]
        first, *more = (statistics.median(result["seconds"]) for result in results)
        row(
            dtype,
            f"{key} {getattr(args, key)}",
            f"{first:.3g}",
            *(f"{seconds / first:.2f}" for seconds in more),
            *(f"{results[i]['peak'] / 1e9:.2f} GB" for i in (0, 2)),
        )


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    cli = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.add_argument("model", help="'tiny', a directory, or a hub name")
    cli.add_argument("data", nargs="?", default="", help="JSONL file with question and answer; not for tiny")
    for flag, text in (("prompts", "P"), ("group", "G"), ("new-tokens", "longest completion")):
        cli.add_argument(f"--{flag}", type=int, default=0, help=f"{text}; 0: the embedded default's, else 8, 8, 64")
    cli.add_argument("--steps", type=int, default=3, help="measured steps, after one that warms up")
    cli.add_argument("--micro", type=int, default=8, help="completions of one training pass in TRL")
    cli.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    cli.add_argument("--dtype", choices=["float32", "bfloat16", "both"], default="both", help="tiny: always float32")
    cli.add_argument("--growth", action="store_true", help="measure how our cost grows, instead of the comparison")
    cli.add_argument("--side", choices=[*LABELS], help=argparse.SUPPRESS)
    args = cli.parse_args()
    if (args.model == "tiny") == bool(args.data) and not args.side:
        cli.error("a model comes with a JSONL file of problems, and tiny without one")
    if args.data and not Path(args.data).is_file():
        cli.error(f"there is no file {args.data}")
    if args.side:
        return child(args)
    usual = (16, 16, 6) if args.model == "tiny" else (8, 8, 64)
    args.prompts, args.group, args.new_tokens = (
        given or default for given, default in zip((args.prompts, args.group, args.new_tokens), usual, strict=True)
    )
    dtypes = ["bfloat16", "float32"] if args.dtype == "both" else [args.dtype]
    print(
        f"{args.model}, {args.prompts} prompts × {args.group} completions of at most {args.new_tokens} tokens; "
        f"{processor()}, {args.threads} threads; Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
        + "\n"
    )
    if args.model == "tiny":
        assets = Path(__file__).resolve().parent.parent / "assets" / "arith"
        args.model, args.data, dtypes = str(assets / "model"), str(assets / "train.jsonl"), ["float32"]
    if args.growth:
        growth(args, dtypes[0])
        return
    row("dtype", "", "s / step", "speed to TRL", "peak memory", "of TRL's")
    row(*["---"] * 6)
    for dtype in dtypes:
        compare(args, dtype)


if __name__ == "__main__":
    main()
