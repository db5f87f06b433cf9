"""The runs behind the results: grpo.py with other flags. Whole runs are kept, others resumed.

    python benchmarks/experiment.py letters        # the embedded task: four norms, all measured
    python benchmarks/experiment.py rates          # learning rates, on seeds that nothing else uses
    python benchmarks/experiment.py norms          # each norm at its best rate; needs `rates`
    python benchmarks/experiment.py groups         # G = 4, 16, 64 at equal completions a step
    python benchmarks/experiment.py overlap        # letters that share one, two, all three digits
    python benchmarks/experiment.py arith          # one skill in every problem
    python benchmarks/experiment.py neighbours     # the methods of neighbours.py
    python benchmarks/experiment.py model --model DIR --svamp SVAMP.jsonl   # a language model
    python benchmarks/experiment.py drawn          # twenty tasks drawn anew, in four cells
    python benchmarks/experiment.py pretrained --model DIR --seeds 0 1 2 3 4 5 6 7 8 9
    python benchmarks/experiment.py table          # what they say: a line a comparison and norm
    python benchmarks/experiment.py embedded       # of `letters` and `arith`: gaps, held-out rates
    python benchmarks/experiment.py fresh          # gap in ten more pairs of `letters`, kept here
    python benchmarks/experiment.py picture        # of `letters`, for the README: OUT/lead.png
    python benchmarks/experiment.py condition      # gap against overlap: table, OUT/condition.png
    python benchmarks/experiment.py contrast       # of `drawn`: what the gap depends on
    python benchmarks/experiment.py carried        # of `pretrained`: gate, gaps, contrast
    python benchmarks/experiment.py exact          # no runs: policies whose gradient is known

Runs lie in OUT/STUDY/VARIANT/; `python analyze.py runs/experiment/letters/default/*` reports on
them in full. SVAMP.jsonl (Patel et al. 2021) has columns question, answer and equation; the first
700 problems train, the rest are held out. Choose a rate for `model` by --lr and --seeds, on a seed
that is not reported.
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
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import special, stats

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent)]

import analyze  # noqa: E402

NORMS = ("none", "std", "var")
RATES = {
    "adamw": (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3),
    "sgd": (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4),
}
CLIP = {"adamw": 10, "sgd": 0}  # plain SGD has no clipping: it would act on the norms unequally
CHOOSING, COMPARING, TEN = (100, 101), (0, 1, 2, 3, 4), range(10)  # seeds
# Nothing is measured but pass rates; everything, in every step.
QUIET: dict[str, Any] = dict(measure_every=0, eval_every=0)
EVERY: dict[str, Any] = dict(measure_every=1, curvature=True)
# Of `drawn`: how many of three digits are one skill, and whether all letters start alike.
CELLS = {"separate-unequal": (0, False), "separate-equal": (0, True)}
CELLS |= {"shared-unequal": (3, False), "shared-equal": (3, True)}
Plan = Iterator[tuple[str, dict[str, Any]]]  # VARIANT/RUN, and its flags


# --------------------------------------------- Plans ----------------------------------------------


def paired(
    variant: str, norms: Sequence[str], seeds: Sequence[int] = COMPARING, **flags: Any
) -> Plan:
    """A run of each norm with each seed."""
    for seed in seeds:
        for norm in norms:
            yield f"{variant}/{norm}-{seed}", dict(norm=norm, seed=seed, **flags)


def letters(given: argparse.Namespace) -> Plan:
    """None, std and batch at the task's learning rate, and var for the first seeds."""
    yield from paired("default", ("none", "std", "batch"), TEN, **EVERY)
    yield from paired("default", ["var"], **EVERY)


def arith(given: argparse.Namespace) -> Plan:
    """The same where all prompts teach one skill."""
    yield from paired("default", NORMS[:2], TEN, task="arith", **EVERY)
    yield from paired("default", ["var"], task="arith", **EVERY)


def rates(given: argparse.Namespace) -> Plan:
    """Every norm and optimizer at several learning rates."""
    for optimizer, choices in RATES.items():
        for lr in choices:
            more: dict[str, Any] = dict(max_grad_norm=CLIP[optimizer], lr=lr, **QUIET)
            for name, flags in paired(optimizer, NORMS, CHOOSING, optimizer=optimizer, **more):
                yield f"{name}-{lr:g}", flags


def norms(given: argparse.Namespace) -> Plan:
    """Every norm and optimizer at its best rate."""
    for optimizer in RATES:
        for norm in NORMS:
            more: dict[str, Any] = dict(max_grad_norm=CLIP[optimizer])
            more["lr"] = best_rate(given.out, optimizer, norm)
            yield from paired(optimizer, [norm], optimizer=optimizer, **more)


def groups(given: argparse.Namespace) -> Plan:
    """Group sizes at 256 completions a step, at the task's learning rate."""
    for group in (4, 16, 64):
        yield from paired(f"{group}", NORMS[:2], group=group, prompts=256 // group, **QUIET)


def overlap(given: argparse.Namespace) -> Plan:
    """Letters with a part of the skill in common, by the number of digits; `letters` and `arith`
    are the two ends."""
    import make_tasks

    for shared in (1, 2, 3):
        folder = given.out / "tasks" / f"letters-{shared}"
        if not (folder / "model" / "tokenizer.json").exists():  # written last
            make_tasks.make(make_tasks.make_letters(shared=shared), folder)
        files = dict(data=folder / "train.jsonl", eval_data=folder / "test.jsonl")
        flags = dict(task="letters", model=folder / "model", **files)
        yield from paired(f"{shared}-of-3", NORMS[:2], **flags, **EVERY)


def neighbours(given: argparse.Namespace) -> Plan:
    """The methods of neighbours.py (nsgd at its best of three rates on seed 100), and the clip that
    vespo replaces."""
    changes: dict[str, dict[str, Any]] = {"vl-norm": {}, "nsgd": dict(lr=0.1)}
    changes["vespo"] = dict(epochs=2)
    for method, flags in changes.items():
        yield from paired(method, ["std"], COMPARING[:3], method=method, **flags)
    yield from paired("two-epochs", ["std"], COMPARING[:3], epochs=2, **QUIET)


def model(given: argparse.Namespace) -> Plan:
    """A language model with adapters on word problems, after a warm start on their equations: none
    against std."""
    folder, instruction = given.out / "tasks" / "svamp", "Question: {question}\nAnswer:"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in map(json.loads, given.svamp.read_text(encoding="utf-8").splitlines()):
        equation = re.sub(r"(\d+)\.0\b", r"\1", row["equation"])
        equation = equation.replace("( ", "(").replace(" )", ")")
        if equation.count("(") == 1:  # around all of it
            equation = equation.strip("()")
        rows.append({**row, "solution": f"{equation} = {row['answer']}\n#### {row['answer']}"})
    for name, part in (("train", rows[:700]), ("test", rows[700:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    start = folder / Path(given.model).name
    warm_start(given.model, folder / "train.jsonl", start, f"--instruction={instruction}")
    flags = dict(task="gsm8k", model=start, instruction=instruction, chat=False)
    flags |= dict(data=folder / "train.jsonl", eval_data=folder / "test.jsonl")
    flags |= dict(lora=64, dtype="bfloat16", lr=given.lr)
    flags |= dict(prompts=4, group=8, max_new_tokens=28, steps=given.steps, save_every=10)
    flags |= dict(max_grad_norm=0)  # a limit would act on std's larger gradients alone
    flags |= dict(eval_every=150, eval_problems=150)
    yield from paired(f"{start.name}-{given.lr:g}", NORMS[:2], given.seeds, **flags)


def drawn(given: argparse.Namespace) -> Plan:
    """Five tasks in each cell, drawn from seeds of their own; batch tells std's common rate from
    what it does between prompts."""
    for k, (cell, kind) in enumerate(CELLS.items()):
        for n in range(5):
            folder = draw_task(given.out / "tasks", cell, 5 * k + n + 1, *kind)
            flags = dict(task="letters", model=folder / "model", data=folder / "train.jsonl")
            flags |= dict(eval_data=folder / "test.jsonl", **QUIET)
            yield from paired(f"{cell}/{folder.name}", ("none", "std", "batch"), (0, 1), **flags)


def draw_task(out: Path, cell: str, seed: int, shared: int, equal: bool) -> Path:
    """The directory of a task whose letters start within 0.1 of the intended pass rates. If a seed
    misses, its task stays, for the record, and the seed 20 above it is tried next."""
    import make_tasks

    while True:
        folder = out / cell / f"{seed}"
        if not (folder / "model" / "tokenizer.json").exists():  # written last
            task = make_tasks.make_letters(seed, shared, equal)
            make_tasks.make(task, folder, seed)
        skills = make_tasks.draw_skills(seed, equal)
        meant = pd.Series({letter: rate**3 for letter, (*_, rate) in skills.items()})
        rates = start_rates(folder)
        (folder / "start.json").write_text(pd.DataFrame({"meant": meant, "is": rates}).to_json())
        if (rates - meant).abs().max() <= 0.1:
            return folder
        seed += 20


def start_rates(folder: Path, samples: int = 8) -> pd.Series:
    """By letter the pass rate of a task's model on its held-out problems, sampled at temperature
    1."""
    import torch

    import grpo

    config = grpo.Config(task="letters", model=f"{folder / 'model'}", chat=False, device="cpu")
    config = grpo.resolve(config)
    policy = grpo.load_policy(config)
    rates = []
    rows = grpo.load_rows(f"{folder / 'test.jsonl'}", False)
    problems = grpo.encode_problems(rows, policy, config)
    seeded = torch.Generator().manual_seed(0)
    for start in range(0, len(problems), 16):
        part = problems[start : start + 16]
        uniforms = torch.rand(len(part), samples, config.max_new_tokens, generator=seeded)
        batch = grpo.rollout(policy, [problem.prompt for problem in part], uniforms, 1.0)
        rewards, _ = grpo.score(policy, batch, part, grpo.exact_match)
        rates += rewards.mean(dim=1).tolist()
    return pd.Series(rates).groupby([problem.level for problem in problems]).mean()


def pretrained(given: argparse.Namespace) -> Plan:
    """Letters, and letters that share all digits, in a language model that learned them in a warm
    start, slips included: none against std, training all weights; with adapters, letters alone.
    Not planned beforehand: batch, for a few seeds of letters."""
    starts = [pretrained_start(given, shared) for shared in (0, 3)]
    flags = dict(task="letters", chat=False, max_grad_norm=0, dtype="bfloat16", steps=120)
    flags |= dict(measure_every=10, curvature=False, eval_every=0, save_every=40)
    both = []
    for folder in starts:
        files = dict(data=folder / "train.jsonl", eval_data=folder / "test.jsonl")
        both.append(flags | files | dict(model=folder / "model"))
    for seed in given.seeds:  # in turn, so that a part of the study already compares the tasks
        for folder, of_task in zip(starts, both):
            yield from paired(folder.name, NORMS[:2], [seed], lr=7e-6, **of_task)
    yield from paired("letters-lora", NORMS[:2], given.seeds[:5], lr=1e-4, lora=64, **both[0])
    yield from paired("letters-batch", ["batch"], given.seeds[:6], lr=7e-6, **both[0])


def pretrained_start(given: argparse.Namespace, shared: int) -> Path:
    """The directory of a language model warm-started on letters of which the first `shared` digits
    are one skill, with its problems."""
    import make_tasks

    folder = given.out / "tasks" / f"{Path(given.model).name}-{shared}-of-3"
    task = make_tasks.make_letters(shared=shared)
    make_tasks.write_problems(task, folder)
    solved = (json.dumps(dict(question=q, solution=a)) + "\n" for q, a in task.solutions)
    (folder / "solved.jsonl").write_text("".join(solved), encoding="utf-8")
    sizes = ("--steps=300", "--batch=64", "--lr=1e-4", "--dtype=bfloat16")
    warm_start(given.model, folder / "solved.jsonl", folder / "model", *sizes)
    return folder


def warm_start(model: str, data: Path, out: Path, *flags: str) -> None:
    """A directory made by warm_start.py, whole or not there."""
    unfinished = out.with_name("unfinished")
    if not out.exists():
        shutil.rmtree(unfinished, ignore_errors=True)
        script = [sys.executable, HERE / "warm_start.py", model, data, unfinished]
        subprocess.run([*map(str, script), "--no-chat", *flags], check=True)
        unfinished.rename(out)


# -------------------------------------------- Running ---------------------------------------------


def run(path: Path, flags: dict[str, Any], jobs: int) -> str:
    """Make one run, or what is missing of it; returns a line on how it ended."""
    if (path / "model").exists() and not (path / "checkpoint").exists():
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        differ = []
        for key, value in flags.items():
            wanted = str(value) if isinstance(value, Path) else value
            # Runs of an earlier grpo.py lack settings of what is measured, which alters no run.
            if key in config and config[key] != wanted:
                differ.append(key)
        if differ:
            return f"{path}: there already, but made with another {', '.join(differ)}: remove it"
        return f"{path}: there already"
    method = flags.get("method", "")
    path.parent.mkdir(parents=True, exist_ok=True)
    script = [HERE / "neighbours.py", method] if method else [HERE.parent / "grpo.py"]
    command = [sys.executable, *script]
    command += [f"--{key}={value}" for key, value in flags.items() if key != "method"]
    command += [f"--out={path}", *(["--resume"] if (path / "config.json").exists() else [])]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    with Path(f"{path}.txt").open("a") as log:
        ended = subprocess.run(command, stdout=log, stderr=log, env=threads | os.environ)
    if ended.returncode == 0:
        shutil.rmtree(path / "checkpoint")  # what remains is a whole run
    return f"{path}: exit status {ended.returncode}"


def whole_runs(folder: Path) -> list[analyze.Run]:
    """The runs in a variant's folder that have come to their end."""
    return [analyze.read_run(path.parent) for path in sorted(folder.glob("*/model"))]


@functools.cache
def best_rate(out: Path, optimizer: str, norm: str) -> float:
    """The rate with the highest mean training pass rate, over steps and seeds, among those that
    have all their runs in `rates`."""
    table = analyze.tabulate(whole_runs(out / "rates" / optimizer))
    means = table[table["norm"] == norm].groupby("lr")["rate"].agg(["mean", "size"])
    whole = means.loc[means["size"] == len(CHOOSING), "mean"]
    if whole.empty:
        missing = f"no learning rate has all its runs in {out}/rates: run `rates` first"
        sys.exit(f"experiment.py: error: {missing}")
    return float(whole.idxmax())


# --------------------------------------------- Tables ---------------------------------------------


def early_geometry(runs: list[analyze.Run]) -> dict[str, list[float]]:
    """Corrected cosine and interference of the first 60 steps, before the runs have parted."""
    free = [analyze.noise_free(analyze.signals(run)[""].loc[:59])[0] for run in runs]
    values = {"corrected cosine": free}
    values["interference"] = [run.log["interference"][run.log["step"] < 60].mean() for run in runs]
    return {name: analyze.mean_interval(each) for name, each in values.items()}


def table(out: Path) -> str:
    """A line for every comparison and norm, with mean pass rates and gaps (points) of all steps; of
    `rates`, mean pass rates over steps and seeds by learning rate."""
    rows: dict[str, dict[str, Any]] = {}
    rates: dict[str, dict[str, Any]] = {}
    for folder in sorted({path.parents[1] for path in out.glob("*/*/*/model")}):
        name, whole = f"{folder.parent.name} {folder.name}", analyze.tabulate(whole_runs(folder))
        if folder.parent.name == "rates":
            for (norm, lr), mean in whole.groupby(["norm", "lr"])["rate"].mean().items():
                rates.setdefault(f"{folder.name} {norm}", {})[lr] = mean
            continue
        for title, runs in analyze.arrange(whole).items():
            found = analyze.compare(runs, None)[0]
            means = pd.concat([run.log for run in runs]).groupby(["norm", "seed"])["rate"].mean()
            for norm, numbers in found["norms"].items():
                row = {
                    re.sub(r"steps to .*", "steps to goal", key): numbers[key] for key in numbers
                }
                row["mean"] = analyze.mean_interval(means[norm])
                if "none" in means and norm != "none":
                    gaps = 100 * (means[norm] - means["none"]).dropna()
                    row["gap, all steps"] = analyze.mean_interval(gaps)
                three = float(found["phases"]["found"])
                row["three phases"] = three if norm == found["norm"] else None
                mine = [one for one in runs if one.config["norm"] == norm]
                rows[f"{name}, {title}: {norm}"] = row | early_geometry(mine)
    return f"{analyze.markdown(rows)}\n\n{analyze.markdown(rates)}"


def embedded(out: Path) -> str:
    """Of `letters` and `arith` each norm's gap to none, in points, by parts of the run (steps 70 to
    100 were chosen on other seeds), what std has over batch, and mean held-out pass rates."""
    gaps, held = defaultdict[str, dict[str, Any]](dict), defaultdict[str, dict[str, Any]](dict)
    for name in ("letters", "arith"):
        logs = pd.concat([run.log for run in whole_runs(out / name / "default")])
        rates = logs.pivot(index="step", columns=["norm", "seed"], values="rate")
        norms = [norm for norm in rates.columns.unique(0) if norm != "none"]
        lead = {norm: 100 * (rates[norm] - rates["none"]) for norm in norms}
        if "batch" in lead:
            lead["std less batch"] = lead["std"] - lead["batch"]
        for first, end in ((0, 30), (70, 100), (220, 250), (0, 250)):
            for norm, gap in lead.items():
                means = gap.loc[first : end - 1].mean().dropna()  # a value a seed
                gaps[f"{first} to {end}"][f"{name}, {norm}"] = analyze.mean_interval(means)
        for (norm, step), mean in logs.groupby(["norm", "step"])["held_out"].mean().items():
            if math.isfinite(mean):
                held[f"{name}, {norm}"][f"{step}"] = mean
    return f"{analyze.markdown(gaps)}\n\n{analyze.markdown(held)}"


def fresh(out: Path) -> str:
    """The mean gap of std over none, in points, and the phases in ten pairs of runs of `letters`,
    seeds 20 to 29, whose series are kept in results/."""
    text = (HERE / "results" / "letters-gaps-20-29.json").read_text(encoding="utf-8")
    pairs = json.loads(text).values()
    gap = [pair["gap"] for pair in pairs]  # a list a pair, with a share for each step
    reward_std = [pair["reward_std"] for pair in pairs]
    cos_std = [pair["cos_std"] for pair in pairs]
    interval = analyze.mean_interval(100 * np.mean(gap, axis=1))
    phases = analyze.detect_phases(gap, reward_std, cos_std)
    row = {"pairs": float(len(gap)), "gap, all steps": interval}
    return f"{analyze.markdown({'letters, seeds 20 to 29': row})}\n\n{phases['reason']}"


def picture(out: Path) -> str:
    """OUT/lead.png: of `letters` the pass rates of std and none, and the lead of std by difficulty,
    means of ten steps with 95% intervals over seeds."""
    runs = [run for run in whole_runs(out / "letters/default") if run.config["norm"] in NORMS[:2]]
    found, lines = analyze.compare(runs, None)
    rates, lead, by_level, *_ = lines.values()
    hardest, middle, easiest = (by_level[name] for name in by_level.columns.unique(0))
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, series, color, style, label, *place in (
        (left, rates["std"], analyze.COLORS["std"], "-", "GRPO (÷ std)", 95, 86, "right"),
        (left, rates["none"], analyze.COLORS["none"], "--", "REINFORCE (no ÷)", 105, 69, "left"),
        (right, hardest, analyze.COLORS["hardest"], "-", "hard problems", 93, 15, "left"),
        (right, middle, analyze.COLORS["middle"], "-", "medium problems", 95, -5.5, "left"),
        (right, easiest, analyze.COLORS["easiest"], "-", "easy problems", 252, -1.9, "right"),
        (right, lead["std"], "#000000", "-", "all problems", 130, 4.8, "left"),
    ):
        tens = series.groupby(series.index // 10 * 10 + 5).mean()
        rows = analyze.bands(tens.T.items())
        axis.plot(rows["mean"], color=color, linestyle=style, linewidth=3)
        axis.fill_between(
            rows.index, rows["low"], rows["high"], color=color, alpha=0.2, linewidth=0
        )
        x, y, side = place
        axis.text(x, y, label, color=color, fontsize=17, ha=side)
    right.axhline(0, color="black", linewidth=1)
    phases = found["phases"]
    edges = [0, *phases["boundaries"], found["last_step"]] if phases["found"] else []
    for a, b, name in zip(edges, edges[1:], ("alike", "opens", "closes")):
        right.axvspan(a, b, color="grey", alpha=0.15 * (name == "opens"), linewidth=0)
        above = dict(transform=right.get_xaxis_transform(), ha="center", va="top")
        right.text((a + b) / 2, 0.98, name, fontsize=15, style="italic", **above)
    left.set_title("Pass rate in training (%)", fontsize=18)
    right.set_title("Lead of GRPO (percentage points)", fontsize=18)
    for axis in (left, right):
        axis.set_xlabel("training step", fontsize=15)
        axis.tick_params(labelsize=14)
    figure.savefig(out / "lead.png", dpi=100)
    return f"{len(lead['std'].columns)} pairs of runs: {phases['reason']}"


def condition(out: Path) -> str:
    """Gap and geometry by how much of the skill all prompts share, from `letters`, `overlap` and
    `arith`; a picture. The largest gap is the mean of the 30 consecutive steps where the mean
    over pairs is largest, so noise alone would make it positive. The geometry is that of std."""
    studies = {"0 of 3 digits": "letters/default"}
    studies |= {f"{n} of 3 digits": f"overlap/{n}-of-3" for n in (1, 2, 3)}
    studies |= {"arith": "arith/default"}
    figure, rows = Figure(figsize=(12, 3.4), layout="constrained"), dict[str, dict[str, Any]]()
    curves, *axes = figure.subplots(1, 4, width_ratios=(2, 1, 1, 1))
    colors = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#000000"]
    curves.set_prop_cycle(color=colors, linestyle=["-", "--", "-.", ":", "-"])
    for name, study in studies.items():
        runs = [run for run in whole_runs(out / study) if run.config["norm"] in ("std", "none")]
        logs = pd.concat([run.log for run in runs])
        rates = logs.pivot(index="step", columns=["norm", "seed"], values="rate")
        gaps = 100 * (rates["std"] - rates["none"]).dropna()  # points, a column a pair
        smooth = gaps.rolling(30).mean()
        widest = smooth.mean(axis=1).idxmax()
        row: dict[str, Any] = {"pairs": float(gaps.shape[1])}
        row["gap, mean of all steps"] = analyze.mean_interval(gaps.mean())
        row["largest gap of 30 steps"] = analyze.mean_interval(smooth.loc[widest])
        row["its last step"] = float(widest)
        row |= early_geometry([run for run in runs if run.config["norm"] == "std"])
        found = analyze.compare(runs, None)[0]
        row["speed-up"] = found["norms"]["std"]["speed-up"]
        rows[name] = row | {"phases found": float(found["phases"]["found"])}
        curves.plot(smooth.index - 15, smooth.mean(axis=1), label=name.split()[0])
    curves.axhline(0, color="grey", linewidth=0.5)
    curves.set(title="std − none, points (mean of 30 steps)", xlabel="step")
    curves.legend(title="digits shared", fontsize=8, loc="upper right")
    for axis, key in zip(axes, ("largest gap of 30 steps", "corrected cosine", "interference")):
        means, lows, highs = zip(*(row[key] for row in rows.values()))
        bars = np.array([np.subtract(means, lows), np.subtract(highs, means)])
        axis.errorbar(range(len(rows)), means, bars, fmt="o", color="black", capsize=3)
        axis.set(title=key, xlabel="digits shared", xlim=(-0.5, 4.5))
        axis.set_xticks(range(len(rows)), [label.split()[0] for label in rows])
        axis.axhline(axis is axes[2], color="grey", linewidth=0.5)  # no gap; orthogonal
    figure.savefig(out / "condition.png", dpi=120)
    return analyze.markdown(rows)


def welch(groups: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """A weighted sum of the groups' means and its 95% interval by Welch and Satterthwaite."""
    means, parts, sizes = (np.array([f(group) for group in groups]) for f in (np.mean, np.var, len))
    parts = np.square(weights) * parts / (sizes - 1)  # of the sum's variance
    freedom = parts.sum() ** 2 / (parts**2 / (sizes - 1)).sum()
    half = stats.t.ppf(0.975, freedom) * math.sqrt(parts.sum())
    mean = float(np.dot(weights, means))
    return [mean, mean - half, mean + half]


def task_gaps(folder: Path) -> pd.DataFrame:
    """A drawn task's mean gaps between std, batch and none, in points, over all steps and seeds;
    for all its problems and for the hardest third."""
    prompts = pd.concat([run.prompts for run in whole_runs(folder)])
    hardest = next(iter(analyze.cut_levels(prompts).values()))
    gaps = {}
    for name, part in {"all": prompts, "hardest": prompts[prompts["level"].isin(hardest)]}.items():
        by_step = part.groupby(["norm", "seed", "step"])["pass_rate"].mean()
        rates = 100 * by_step.groupby("norm").mean()
        gaps[name] = rates[["std", "batch"]] - rates["none"]
        gaps[name]["std less batch"] = rates["std"] - rates["batch"]
    return pd.DataFrame(gaps)


def contrast(out: Path) -> str:
    """Of `drawn`: the gap over all steps by cell, and how much larger it is where skills are
    separate and unequal than in the mean of the other cells: of std, of batch, which has a common
    rate alone, and of std less batch. Intervals are over tasks."""
    rows: dict[str, dict[str, Any]] = {}
    gaps = {}
    for cell in CELLS:
        folders = sorted({path.parents[1] for path in (out / "drawn" / cell).glob("*/*/model")})
        gaps[cell] = [task_gaps(folder) for folder in folders]
    for name in ("std", "batch", "std less batch"):
        for cell, tasks in gaps.items():
            row = rows[f"{name}, {cell}"] = {"tasks": float(len(tasks))}
            row["gap, points"] = analyze.mean_interval(task["all"][name] for task in tasks)
            if "unequal" in cell:
                hardest = analyze.mean_interval(task["hardest"][name] for task in tasks)
                row["of the hardest third"] = hardest
        cells = [[task["all"][name] for task in tasks] for tasks in gaps.values()]
        more = welch(cells, [1, -1 / 3, -1 / 3, -1 / 3])
        rows[f"{name}, separate-unequal less the others"] = {"gap, points": more}
    return analyze.markdown(rows)


def in_window(
    runs: list[analyze.Run], end: int | None = None, norm: str = "std", other: str = "none"
) -> dict[str, list[float]]:
    """One value per seed from one task's runs: the noise-free cosine between letters at steps 0, 10
    and 20; the gaps of one norm over another in points, of all letters and by difficulty, up to
    step `end`, or to the first at which the pass rate pooled over norms and seeds reaches 0.95; and
    the held-out gap at the end."""
    log, prompts = pd.concat([x.log for x in runs]), pd.concat([x.prompts for x in runs])
    pooled = log.groupby("step")["rate"].mean()
    if end is None:
        end = next((step for step, rate in pooled.items() if rate >= 0.95), pooled.index.max())
    parts = {"all": [*prompts["level"].unique()]} | analyze.cut_levels(prompts)
    found: dict[str, list[float]] = {"last step": [float(end)]}
    cosines = defaultdict(list)
    for run in runs:
        moments = analyze.signals(run)["_between"].reindex([0, 10, 20])
        cosines[run.config["seed"]].append(analyze.noise_free(moments)[0])
    found["cosine between letters"] = [float(np.mean(values)) for values in cosines.values()]
    for name, levels in parts.items():
        chosen = prompts[prompts["level"].isin(levels) & (prompts["step"] <= end)]
        rates = chosen.groupby(["seed", "norm"])["pass_rate"].mean().unstack()
        gaps = (100 * (rates[norm] - rates[other])).dropna().tolist()
        found[f"gap, {name}".split(":")[0]] = gaps
    held = log.groupby(["seed", "norm"])["held_out"].last().unstack()
    found["held out"] = (100 * (held[norm] - held[other])).dropna().tolist()
    return found


def carried(out: Path) -> str:
    """Of `pretrained`: a row a task, intervals over seeds; in the window of letters, std over batch
    and batch over none; by how much the gaps of letters are larger than the control's, in their own
    windows and where both stop with the control."""
    made = {folder.name: whole_runs(folder) for folder in sorted((out / "pretrained").glob("*/"))}
    batch = made.pop("letters-batch", [])
    found = {name: in_window(runs) for name, runs in made.items() if runs}
    letters, control = ([name for name in found if f"{n}-of-3" in name] for n in (0, 3))
    if letters and batch:
        end = int(found[letters[0]]["last step"][0])
        for norm, other in (("std", "batch"), ("batch", "none")):
            runs = [x for x in made[letters[0]] + batch if x.config["norm"] in (norm, other)]
            found[f"letters, {norm} over {other}"] = in_window(runs, end, norm, other)
    rows = {
        task: {k: analyze.mean_interval(v) for k, v in row.items()} for task, row in found.items()
    }
    if letters and control:
        end, base = int(found[control[0]]["last step"][0]), found[control[0]]
        windows = {"letters less control": found[letters[0]]}
        windows["the same, both to the control's last step"] = in_window(made[letters[0]], end)
        for name, row in windows.items():
            gaps = [key for key in row if "gap" in key and min(len(row[key]), len(base[key])) > 1]
            rows[name] = {key: welch([row[key], base[key]], [1, -1]) for key in gaps}
    return analyze.markdown(rows)


def thirds(out: Path) -> str:
    """Of `model`, by thirds of the run, intervals over seeds: pass rates, the gap in points, and
    the share of prompts whose completions were all rewarded alike."""
    folders = [path.parent for path in sorted((out / "model").glob("*/*/config.json"))]
    tables = ((run.log, run.prompts) for run in map(analyze.read_run, folders))
    log, prompts = map(pd.concat, zip(*tables))
    prompts["alike"], width = prompts["reward_std"] == 0, (prompts["step"].max() + 1) // 3
    rows = defaultdict[str, dict[str, Any]](dict)
    for start in range(0, 3 * width, width):
        rates, alike = (
            whole[whole["step"].between(start, start + width - 1)]
            .groupby(["norm", "seed"])[key]
            .mean()
            for whole, key in ((log, "rate"), (prompts, "alike"))
        )
        found = {f"pass rate, {norm}": rates[norm] for norm in NORMS[:2]}
        found["gap, points"] = 100 * (rates["std"] - rates["none"])
        found |= {f"prompts without variance, {norm}": alike[norm] for norm in NORMS[:2]}
        for name, values in found.items():
            rows[name][f"{start} to {start + width}"] = analyze.mean_interval(values)
    return analyze.markdown(rows)


def family_scale(J: np.ndarray, group: int, norm: str) -> np.ndarray:
    """A norm's expected gradient divided by that of the pass rate J, for groups of this size (0: no
    sampling). For std: E[sd / (J (1 - J))] over the binomial number of right completions."""
    J = np.clip(J, 1e-12, 1 - 1e-12)
    if norm == "none":
        return np.full_like(J, 1 - 1 / group if group else 1)
    if not group:
        return 1 / np.sqrt(J * (1 - J))
    right = np.arange(group + 1)
    deviations = np.sqrt(right * (group - right)) / group
    return (stats.binom.pmf(right, group, J[..., None]) * deviations).sum(-1) / (J * (1 - J))


def exact_steps(
    norm: str, group: int, rate: float, spread: float, seeds: int = 8, most: int = 50_000
) -> np.ndarray:
    """Steps [seeds] to a mean pass rate of 0.9 by expected gradients, for softmax policies over the
    6 actions of each of 8 prompts; NaN where it takes more than `most`. spread: of the right
    action's initial logit over the prompts."""
    logits = np.random.default_rng(0).normal(0, 0.5, size=(seeds, 8, 6))
    logits[..., 0] -= np.linspace(0, spread, 8)
    steps = np.full(seeds, math.nan)
    for step in range(most):
        policy = special.softmax(logits, axis=-1)
        J = policy[..., 0]  # [seeds, 8]
        steps[np.isnan(steps) & (J.mean(axis=1) >= 0.9)] = step
        if np.isfinite(steps).all():
            break
        logits += rate * (family_scale(J, group, norm) * J)[..., None] * (np.eye(6)[0] - policy)
    return steps


def exact(out: Path) -> str:
    """Speed-up of std over none for known gradients: median, least and largest of 8 starts. Each
    norm takes the steps that the curvature bound allows it: eta / sigma, or 2 eta for all prompts,
    as sigma is at most 1/2."""
    rows: dict[str, dict[str, Any]] = {}
    for spread in (0, 2, 4, 6):
        row = rows[f"logits spread over {spread}"] = {}
        for group in (4, 16, 64, 0):
            none = exact_steps("none", group, 0.5, spread)
            ratios = none / exact_steps("std", group, 0.25, spread)
            name = f"G = {group}" if group else "exact"
            row[name] = [np.median(ratios), ratios.min(), ratios.max()]
    return analyze.markdown(rows)


def main() -> None:
    """The command line."""
    studies = (letters, rates, norms, groups, overlap, arith, neighbours, model, drawn, pretrained)
    plans = {plan.__name__: plan for plan in studies}
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=about)
    add = parser.add_argument
    reports: dict[str, Any] = {"table": table, "embedded": embedded, "picture": picture}
    reports |= {"thirds": thirds, "fresh": fresh}
    reports |= {"condition": condition, "contrast": contrast, "carried": carried, "exact": exact}
    add("study", choices=[*plans, *reports])
    add("--out", type=Path, default=Path("runs/experiment"), help="where the runs lie")
    add("--jobs", type=int, default=2, help="runs at a time, which share the cores")
    add("--model", help="of model and pretrained: directory or hub name")
    add("--svamp", type=Path, help="of model: JSONL file of SVAMP")
    add("--lr", type=float, default=1e-5, help="of model")
    add("--steps", type=int, default=150, help="of model")
    add("--seeds", type=int, nargs="+", default=COMPARING[:3], help="of model and pretrained")
    given = parser.parse_args()
    if report := reports.get(given.study):
        print(report(given.out))
        return
    if given.study == "model" and not (given.model and given.svamp and given.svamp.is_file()):
        parser.error("model needs --model and --svamp FILE.jsonl")
    failed, folder = False, given.out / given.study

    def make(entry: tuple[str, dict[str, Any]]) -> str:
        return run(folder / entry[0], entry[1], given.jobs)

    with ThreadPoolExecutor(given.jobs) as pool:
        for line in pool.map(make, plans[given.study](given)):
            print(line, flush=True)
            failed = failed or not line.endswith(("exit status 0", "there already"))
    sys.exit(failed)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the runs have stopped with a checkpoint
        sys.exit(130)
