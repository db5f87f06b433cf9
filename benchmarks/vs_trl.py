"""Seconds and memory of a training step, here and in TRL's GRPOTrainer, on the same work.

    pip install trl
    python benchmarks/vs_trl.py MODEL PROBLEMS.jsonl              # columns question and answer
    python benchmarks/vs_trl.py MODEL PROBLEMS.jsonl --prompts 16 --group 16 --new-tokens 8  # short
    python benchmarks/vs_trl.py tiny                              # the embedded arith, float32
    python benchmarks/vs_trl.py MODEL PROBLEMS.jsonl --growth     # ours alone, to 4 times P, G, T

In the reported results MODEL is HuggingFaceTB/SmolLM2-135M-Instruct. With --measured there is a
line for this program with everything measured in every step, too.

Both sides: P prompts x G completions of at most T tokens at temperature 1, AdamW, no KL term, one
update a batch; the median of --steps steps after one that warms up; each side in a process of its
own, one after the other. bfloat16 means what each side does under that name: here bfloat16 weights
with float32 masters, in TRL autocast. TRL runs without gradient checkpointing and with
micro-batches of 8, which are its faster settings on a CPU.

The reward is a hash of the completion's text, so that every prompt has a gradient on both sides. A
real reward would favour this program, which spends nothing on a prompt whose completions were all
rewarded alike. Memory is the peak of the whole process, start and saving included; on CUDA that of
the device's allocations.
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

LABELS = {"ours": "grpo.py", "measured": "grpo.py, measured every step", "trl": "TRL"}


def reward(completion: str, answer: str) -> float:
    """A number in [0, 1) that depends on the text alone and differs within a group."""
    return zlib.crc32(completion.encode()) / 2**32


def our_settings(args: argparse.Namespace, out: str | None = None) -> Any:
    """A grpo.Config for one more step than are timed."""
    import grpo

    measured = args.side == "measured"
    config = grpo.Config(
        task="letters",  # what it would choose is given here, or as the reward
        model=args.model,
        data=args.data,
        instruction="{question}",
        prompts=args.prompts,
        group=args.group,
        max_new_tokens=args.new_tokens,
        steps=args.steps + 1,
        lr=1e-6,
        dtype=args.dtype,
        measure_every=int(measured),
        curvature=measured,
        eval_every=0,
        eval_problems=1,
        out=out,
    )
    return grpo.resolve(config)


def run_ours(args: argparse.Namespace) -> list[float]:
    """Seconds of each step of grpo.train, as its log has them."""
    import grpo

    with tempfile.TemporaryDirectory() as out:
        grpo.train(our_settings(args, out), reward=reward)
        log = (Path(out) / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, log) if "seconds_update" in line]
    return [step["seconds_rollout"] + step["seconds_update"] for step in steps]


def run_trl(args: argparse.Namespace) -> list[float]:
    """Seconds of each step of GRPOTrainer, from its rollout's start to its update's end."""
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
    texts: list[str] = []  # the prompts of our steps
    for step in range(args.steps + 1):
        texts += [problems[i][0] for i in grpo.prompt_ids(step, settings, len(problems))]
    prompts = [[{"role": "user", "content": text}] if chat else text for text in texts]
    rows = Dataset.from_dict({"prompt": prompts})
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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024  # bytes there, else kilobytes
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    print(json.dumps({"seconds": seconds[1:], "peak": peak}))


def run(side: str, args: argparse.Namespace, **changes: Any) -> Any:
    """The result of one side, in a process of its own. Where that fails, exits with the last line
    that it said."""
    wanted = {**vars(args), **changes, "side": side}
    command = [sys.executable, __file__, wanted.pop("model"), wanted.pop("data")]
    for key in wanted.keys() - {"growth", "measured"}:
        command.append(f"--{key.replace('_', '-')}={wanted[key]}")
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or str(done.returncode)).splitlines()[-1]
        sys.exit(f"vs_trl.py: error: {side}: {said}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def row(*cells: Any) -> None:
    """A line of a markdown table, shown as soon as it is known."""
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def compare(args: argparse.Namespace, dtype: str) -> None:
    """The table's lines of one number format."""
    chosen = [side for side in LABELS if side != "measured" or args.measured]
    results = {side: run(side, args, dtype=dtype) for side in chosen}
    theirs = results["trl"]
    for side, result in results.items():
        seconds, peak = statistics.median(result["seconds"]), result["peak"]
        speed = f"{statistics.median(theirs['seconds']) / seconds:.2f}×"
        memory = f"{peak / 1e9:.2f} GB", f"{peak / theirs['peak']:.0%}"
        row(dtype, LABELS[side], f"{seconds:.3g}", speed, *memory)


def growth(args: argparse.Namespace, dtype: str) -> None:
    """Our cost at one, two and four times the prompts, the group and the length."""
    row("dtype", "what grows", "×1, s", "×2", "×4", "peak ×1", "peak ×4")
    row(*["---"] * 7)
    once = run("ours", args, dtype=dtype)
    for key in ("prompts", "group", "new_tokens"):
        size = getattr(args, key)
        results = [once, *(run("ours", args, dtype=dtype, **{key: size * k}) for k in (2, 4))]
        first, *more = (statistics.median(result["seconds"]) for result in results)
        ratios = [f"{seconds / first:.2f}" for seconds in more]
        peaks = [f"{results[i]['peak'] / 1e9:.2f} GB" for i in (0, 2)]
        row(dtype, f"{key} {size}", f"{first:.3g}", *ratios, *peaks)


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    cli = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=layout
    )
    add, dtypes = cli.add_argument, ["bfloat16", "float32"]
    add("model", help="'tiny', a directory, or a hub name")
    add("data", nargs="?", default="", help="JSONL file with question and answer; not for tiny")
    for flag, text in (("prompts", "P"), ("group", "G"), ("new-tokens", "longest completion")):
        usual = "0: 16, 16, 6 for tiny, else 8, 8, 64"
        add(f"--{flag}", type=int, default=0, help=f"{text}; {usual}")
    add("--steps", type=int, default=3, help="timed steps, after one that warms up")
    add("--micro", type=int, default=8, help="completions of one training pass in TRL")
    add("--threads", type=int, default=os.cpu_count(), help="of torch")
    add("--dtype", choices=[*dtypes, "both"], default="both", help="tiny: always float32")
    add("--measured", action="store_true", help="also this program with all measured, every step")
    add("--growth", action="store_true", help="how our cost grows, instead of the comparison")
    add("--side", choices=[*LABELS], help=argparse.SUPPRESS)
    args = cli.parse_args()
    if (args.model == "tiny") == bool(args.data) and not args.side:
        cli.error("a model comes with a JSONL file of problems, and tiny without one")
    if args.data and not Path(args.data).is_file():
        cli.error(f"there is no file {args.data}")
    if args.side:
        return child(args)
    P, G, T = (16, 16, 6) if args.model == "tiny" else (8, 8, 64)
    args.prompts, args.group = args.prompts or P, args.group or G
    args.new_tokens = args.new_tokens or T
    dtypes = dtypes if args.dtype == "both" else [args.dtype]
    versions = [f"{name} {version(name)}" for name in ("torch", "transformers", "trl")]
    print(
        f"{args.model}, {args.prompts} prompts × {args.group} completions of at most "
        f"{args.new_tokens} tokens; {processor()}, {args.threads} threads; "
        f"Python {platform.python_version()}, {', '.join(versions)}\n"
    )
    if args.model == "tiny":
        assets, dtypes = Path(__file__).resolve().parent.parent / "assets" / "arith", ["float32"]
        args.model, args.data = str(assets / "model"), str(assets / "train.jsonl")
    if args.growth:
        growth(args, dtypes[0])
        return
    row("dtype", "", "s / step", "speed to TRL", "peak memory", "of TRL's")
    row(*["---"] * 6)
    for dtype in dtypes:
        compare(args, dtype)


if __name__ == "__main__":
    main()
