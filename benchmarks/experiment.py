"""The runs behind the README's results: `python grpo.py` with other flags; whole ones are kept, others resumed.

    python benchmarks/experiment.py rates                  # learning rates, on seeds that nothing else uses
    python benchmarks/experiment.py norms                  # norms at their best rates, five other seeds
    python benchmarks/experiment.py groups                 # G = 8, 16, 64, 256 at equal completions a step
    python benchmarks/experiment.py tasks                  # spread of difficulty, number of prompts, width of the model
    python benchmarks/experiment.py exact                  # no runs: policies whose gradient is known, every G and none
    python benchmarks/experiment.py svamp --model HuggingFaceTB/SmolLM2-135M-Instruct --svamp SVAMP.jsonl
    python benchmarks/experiment.py table                  # what all of them say, one line a comparison

`rates` comes first: norms, groups and tasks take each norm's best rate from it. Two runs at a time (--jobs) share the
cores. `python analyze.py runs/experiment/norms/adamw-[nsv]*/` gives the full report of any of them.

svamp: a JSONL file with columns question, answer, equation (SVAMP, Patel et al. 2021): the first 700 problems train,
the rest are held out.
"""

import argparse
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special, stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import analyze  # noqa: E402
import grpo  # noqa: E402

NORMS = ("none", "std", "var")
RATES = {"adamw": (1e-4, 3e-4, 1e-3, 3e-3), "sgd": (1e-3, 3e-3, 5e-3, 1e-2, 1.7e-2, 3e-2, 5e-2, 1e-1)}
CLIP = {"adamw": 10, "sgd": 0}  # plain SGD has no clipping: it would act on the norms unequally
CHOOSING, COMPARING = (100, 101), (0, 1, 2, 3, 4)  # seeds
QUIET = dict(geometry_every=0, probe_every=0, eval_every=0)  # nothing measured but pass rates
WIDTH = 96  # of the embedded model
SIZES = (4, 8, 16, 64, 256, 0)  # of groups; 0: without sampling
Plan = Iterator[tuple[str, dict[str, Any]]]  # name of a run, and its flags


# ------------------------------------------------------- Plans -------------------------------------------------------


def rates(out: Path) -> Plan:
    """Every norm and optimizer at several learning rates; nothing measured but the pass rate."""
    for optimizer, choices in RATES.items():
        for seed in CHOOSING:
            for norm in NORMS:
                for lr in choices:
                    yield f"{optimizer}-{norm}-{lr:g}-{seed}", dict(
                        optimizer=optimizer, max_grad_norm=CLIP[optimizer], norm=norm, lr=lr, seed=seed, **QUIET)


def norms(out: Path) -> Plan:
    """Every norm and optimizer at its best rate, everything measured; AdamW without clipping besides."""
    for optimizer, clip, more in (*((name, CLIP[name], {}) for name in RATES), ("adamw", 0, QUIET)):
        for seed in COMPARING:
            for norm in NORMS:
                name = f"{optimizer}-unclipped" if more else optimizer
                yield f"{name}-{norm}-{seed}", dict(
                    optimizer=optimizer, max_grad_norm=clip, norm=norm, lr=best_rate(out, optimizer, norm), seed=seed,
                    **more)


def groups(out: Path) -> Plan:
    """Group sizes at 512 completions a step, each norm at three rates around its best, and with few prompts at two
    lower ones besides; the comparison takes the best of them on the same seeds."""
    for seed in COMPARING[:3]:
        for group in (8, 16, 64, 256):
            for norm in NORMS[:2]:
                for factor in (0.5, 1, 2) if group <= 16 else (0.125, 0.25, 0.5, 1, 2):
                    lr = float(f"{factor * best_rate(out, 'adamw', norm):.2g}")
                    yield f"{group}-{norm}-{lr:g}-{seed}", dict(
                        group=group, prompts=512 // group, norm=norm, lr=lr, seed=seed, steps=200, **QUIET)


def tasks(out: Path) -> Plan:
    """What the theory says should matter, for both norms: other problems or another model, all else as in `norms`, but
    that a wider model has its rates divided by its width (at the same ones, width 256 learns little and collapses)."""
    for name, flags in variants(out / "tasks").items():
        for seed in COMPARING[:3]:
            for norm in NORMS[:2]:
                width = int(name.removeprefix("width-")) if name.startswith("width-") else WIDTH
                lr = best_rate(out, "adamw", norm) * min(1.0, WIDTH / width)
                yield f"{name}-{norm}-{seed}", dict(norm=norm, lr=lr, seed=seed, micro_batch=4096, **flags)


def variants(folder: Path) -> dict[str, dict[str, Any]]:
    """Flags of each variant of the embedded task; makes its problems and models."""
    folder.mkdir(parents=True, exist_ok=True)
    grpo.disable_progress_bars()
    rows, held_out = grpo.make_arith(512)
    start = grpo.warm_start(grpo.Config(), rows)

    def file(name: str, data: Any) -> str:
        data.to_json(folder / f"{name}.jsonl")
        return str(folder / f"{name}.jsonl")

    def carries(row: dict[str, Any]) -> int:
        a, b = row["question"][:3], row["question"][4:7]
        return sum(int(a[-k:]) + int(b[-k:]) >= 10**k for k in (1, 2, 3))

    found: dict[str, dict[str, Any]] = {}
    for name, chosen in (("equal difficulty", (2,)), ("wide difficulty", (1, 3))):
        parts = [part.filter(lambda row, chosen=chosen: carries(row) in chosen) for part in (rows, held_out)]
        name = name.replace(" ", "-")
        found[name] = {"model": start, "data": file(name, parts[0]), "eval_data": file(f"{name}-held-out", parts[1])}
    test = file("held-out", held_out)
    for count in (16, 256):
        name = f"{count}-prompts"
        found[name] = {"model": start, "data": file(name, rows.select(range(count))), "eval_data": test}
    for width in (32, 256):
        found[f"width-{width}"] = {"model": wide_model(folder / f"start-{width}", width), "sft_steps": 2000,
                                   "sft_batch": 64, "sft_lr": 6e-3 * min(1.0, WIDTH / width)}
    return found


def wide_model(path: Path, width: int) -> Path:
    """The embedded model with another width, untrained, as a directory."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    model, tokenizer = grpo.tiny_model()
    shape = GPT2Config(**{**model.config.to_dict(), "n_embd": width, "n_inner": 4 * width})
    torch.manual_seed(0)
    if not path.exists():  # a new one would be a new model to the cache of warm starts
        GPT2LMHeadModel(shape).save_pretrained(path)
        tokenizer.save_pretrained(path)
    return path


def svamp(out: Path, model: str, source: Path) -> Plan:
    """A language model on word problems, warm-started on their equations: none against std."""
    folder = out / "svamp"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in map(json.loads, source.read_text(encoding="utf-8").splitlines()):
        equation = re.sub(r"(\d+)\.0\b", r"\1", row["equation"]).replace("( ", "(").replace(" )", ")")
        if equation.count("(") == 1:  # around all of it
            equation = equation.strip("()")
        solution = f"{equation} = {row['answer']}\n#### {row['answer']}"
        rows.append({"question": row["question"], "answer": row["answer"], "solution": solution})
    for name, part in (("train", rows[:700]), ("test", rows[700:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    for seed in COMPARING[:3]:
        for norm in NORMS[:2]:
            yield f"{norm}-{seed}", dict(
                task="gsm8k", model=model, data=folder / "train.jsonl", eval_data=folder / "test.jsonl", chat=False,
                instruction="Question: {question}\nAnswer:", sft_steps=120, prompts=8, group=8, max_new_tokens=28,
                lr=1e-5, dtype="bfloat16", steps=100, eval_every=50, eval_problems=300, geometry_every=3,
                probe_every=20, save_every=25, norm=norm, seed=seed)


# ------------------------------------------------------ Running ------------------------------------------------------


def run(path: Path, flags: dict[str, Any], jobs: int) -> str:
    """Make one run, or what is missing of it; returns a line on how it ended."""
    if (path / "model").exists() and not (path / "checkpoint").exists():
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        other = [key for key, value in flags.items() if str(config[key]) != str(type(config[key])(value))]
        return f"{path}: there already" + f", but made with another {', '.join(other)}: remove it" * bool(other)
    path.parent.mkdir(parents=True, exist_ok=True)
    resume = ["--resume"] if (path / "config.json").exists() else []
    given = [f"--{key}={value}" for key, value in flags.items()]
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    with path.with_suffix(path.suffix + ".txt").open("a") as log:
        command = [sys.executable, ROOT / "grpo.py", *given, f"--out={path}", *resume]
        ended = subprocess.run(command, stdout=log, stderr=log, env={"OMP_NUM_THREADS": threads} | os.environ)
    if ended.returncode == 0:
        shutil.rmtree(path / "checkpoint")  # what remains is a whole run
    return f"{path}: exit status {ended.returncode}"


@functools.cache
def best_rate(out: Path, optimizer: str, norm: str) -> float:
    """The rate with the highest mean training pass rate, over steps and seeds, among those whole in `rates`."""
    found: dict[float, list[float]] = {}
    for path in sorted((out / "rates").glob(f"{optimizer}-{norm}-*/model")):
        one = analyze.read_run(path.parent)
        found.setdefault(one.config["lr"], []).append(float(one.log["pass_rate"].mean()))
    whole = {lr: np.mean(means) for lr, means in found.items() if len(means) == len(CHOOSING)}
    if not whole:
        sys.exit(f"experiment.py: error: no learning rate has all its runs in {out}/rates: run `rates` first")
    return max(whole, key=lambda lr: whole[lr])


# ----------------------------------------------- Policies without sampling -------------------------------------------


def family_gradient(J: np.ndarray, group: int, norm: str) -> np.ndarray:
    """F'(J), by which the expected gradient of a norm multiplies that of the pass rate J, for groups of a size (0: no
    sampling, the limit). `std`: E[sd / (J (1 - J))] over the binomial number of right completions."""
    J = np.clip(J, 1e-12, 1 - 1e-12)
    if norm == "none":
        return np.full_like(J, 1.0 if group == 0 else 1 - 1 / group)
    if group == 0:
        return 1 / np.sqrt(J * (1 - J))
    right = np.arange(group + 1)
    chance = stats.binom.pmf(right, group, J[..., None])
    return (chance * np.sqrt(right * (group - right)) / group).sum(-1) / (J * (1 - J))


def exact_steps(norm: str, group: int, rate: float, spread: float, seeds: int = 8, most: int = 50_000) -> np.ndarray:
    """Steps to a mean pass rate of 0.9 by expected gradients, for softmax policies over 6 actions of 8 prompts. [seeds]

    spread: of the right action's initial logit over the prompts. NaN where it takes over `most`.
    """
    logits = np.random.default_rng(0).normal(0, 0.5, size=(seeds, 8, 6))
    logits[..., 0] -= np.linspace(0, spread, 8)
    steps = np.full(seeds, math.nan)
    for step in range(most):
        policy = special.softmax(logits, axis=-1)
        J = policy[..., 0]  # [seeds, 8]
        steps[np.isnan(steps) & (J.mean(axis=1) >= 0.9)] = step
        if np.isfinite(steps).all():
            break
        gradient = J[..., None] * (np.eye(6)[0] - policy)
        logits += rate * family_gradient(J, group, norm)[..., None] * gradient
    return steps


def exact() -> str:
    """Speed-up of std over none in expectation, by group size and without sampling; every norm takes the step that the
    curvature bound allows it: eta / sigma, or 2 eta for all prompts, as sigma is 1/2 at most."""
    lines = ["| spread of logits | " + " | ".join(f"G = {g}" if g else "exact" for g in SIZES) + " |",
             "|---" * (1 + len(SIZES)) + "|"]
    for spread in (0, 2, 4, 6):
        ratios = [exact_steps("none", g, 0.5, spread) / exact_steps("std", g, 0.25, spread) for g in SIZES]
        lines.append(f"| {spread} | " + " | ".join(
            f"{np.median(r):.2f} ({r.min():.2f} to {r.max():.2f})" for r in ratios) + " |")
    return "\n".join(lines)


# ------------------------------------------------------- Table -------------------------------------------------------


def detectable(ratios: Iterable[float]) -> float:
    """Smallest speed-up that so many pairs with this spread show in four of five trials (paired t-test, 5%)."""
    logs = np.log([ratio for ratio in ratios if math.isfinite(ratio)])
    n = len(logs)
    if n < 3:
        return math.nan
    return float(np.exp((stats.t.ppf(0.975, n - 1) + stats.t.ppf(0.8, n - 1)) * logs.std(ddof=1) / math.sqrt(n)))


def clipped(path: str) -> float:
    """Share of a run's steps whose gradient was clipped."""
    rows, _ = analyze.read_lines(Path(path) / "metrics.jsonl")
    return float(np.mean([row["clipped"] for row in rows if "clipped" in row]))


def table(out: Path) -> str:
    """One line a norm and comparison, over all studies but `rates`."""
    lines = ["| study | norm (rate) | runs | pass rate, last tenth | held out | steps to target | speed-up over none | "
             "predicted | the same, noise removed | detectable | clipped | three phases (two measures a run) |",
             "|---" * 12 + "|"]
    for study in ("norms", "groups", "tasks", "svamp"):
        paths = [path.parent for path in sorted((out / study).glob("*/model"))]
        runs = [analyze.read_run(path) for path in paths]
        analysis = analyze.analyse(runs, [], "sampled", None)
        for title, found in analysis["groups"].items():
            for norm, arm in found["norms"].items():
                against = found["against_none"].get(norm, {})
                ratios = [ratio for ratio, *_ in against.get("measured", [])]
                phases = [phase for path in arm["runs"] for phase in analysis["runs"][path]["phases"].values()]
                decided = [phase for phase in phases if phase["boundaries"]]
                speed, foreseen = against.get("speed_up", [math.nan]), against.get("predicted_speed_up", {})
                cells = [f"{study}: {title}", f"{norm} ({arm['lr']:g})", str(len(arm["runs"])),
                         *(analyze.show(arm[key]) for key in ("pass_rate", "held_out")),
                         analyze.show(arm["steps_to_target"], 0), analyze.show(speed, 2),
                         *(analyze.show(foreseen.get(kind, [math.nan]), 2) for kind in analyze.KINDS),
                         analyze.show([detectable(ratios), math.nan], 2),
                         f"{np.mean([clipped(path) for path in arm['runs']]):.3f}",
                         f"{sum(phase['found'] for phase in decided)} of {len(decided)}"]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("study", choices=["rates", "norms", "groups", "tasks", "exact", "svamp", "table"])
    parser.add_argument("--out", type=Path, default=Path("runs/experiment"), help="where the runs lie")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct",
                        help="of svamp: directory or hub name")
    parser.add_argument("--svamp", type=Path, help="JSONL file of SVAMP")
    given = parser.parse_args()
    if given.study in ("exact", "table"):
        print(exact() if given.study == "exact" else table(given.out))
        return
    if given.study == "svamp" and not (given.svamp and given.svamp.is_file()):
        parser.error("svamp needs --svamp FILE.jsonl")
    plans = {"rates": rates, "norms": norms, "groups": groups, "tasks": tasks}
    plan = svamp(given.out, given.model, given.svamp) if given.study == "svamp" else plans[given.study](given.out)
    failed = False
    with ThreadPoolExecutor(given.jobs) as pool:
        for line in pool.map(lambda entry: run(given.out / given.study / entry[0], entry[1], given.jobs), plan):
            print(line, flush=True)
            failed = failed or not line.endswith(("exit status 0", "there already"))
    sys.exit(failed)


if __name__ == "__main__":
    main()
