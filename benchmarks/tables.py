"""Tables and pictures of the results, from logs.

    python benchmarks/tables.py foretold        # does progress foretell who learns what?
    python benchmarks/tables.py undone          # what takes back a part of it: AdamW's scaling?
    python benchmarks/tables.py language        # both questions in a language model
    python benchmarks/tables.py words           # whom each norm would teach, on word problems
    python benchmarks/tables.py findings        # the README's table of gaps
    python benchmarks/tables.py embedded        # of `letters` and `arith`: gaps, held-out rates
    python benchmarks/tables.py levels          # of `letters` and `arith`: the reports in full
    python benchmarks/tables.py carried         # of `pretrained`: gate, gaps, contrast
    python benchmarks/tables.py thirds          # of `model`: gaps by thirds of the run
    python benchmarks/tables.py fresh           # gap in ten more pairs of `letters`
    python benchmarks/tables.py picture         # of `letters`, for the README: picture.png
    python benchmarks/tables.py exact           # no runs: policies whose gradient is known
    python benchmarks/tables.py table --runs runs/experiment       # a line a comparison and norm
    python benchmarks/tables.py condition --runs runs/experiment   # gap against overlap
    python benchmarks/tables.py contrast --runs runs/experiment    # of `drawn`: by kind of task

Logs come from results/, packed by `experiment.py STUDY --pack`; with --runs, from the runs that
experiment.py made there. Intervals are over seeds unless a table says otherwise.
"""

import argparse
import json
import math
import re
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import special, stats

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent)]

from experiment import CELLS, NORMS, whole_runs  # noqa: E402

import analyze  # noqa: E402

# ------------------------------------- What each norm would do -----------------------------------


def by_level(runs: list[analyze.Run]) -> dict[str, list[str]]:
    """Every level by itself, in their order."""
    levels = pd.concat([run.prompts for run in runs])["level"].unique()
    return {f"level {level}": [level] for level in sorted(levels)}


def beside_gap(
    foretelling: list[analyze.Run], pairs: list[analyze.Run], norm: str, step: int
) -> tuple[dict[str, dict[str, Any]], float]:
    """By level, in points: the lead over none that `norm` should have at `step`, foretold by runs
    without the division (mean progress of norm less none from step FIRST on, at one length, times
    `step`), and the lead that pairs of runs had there; and the slope of these on those."""
    parts = by_level(pairs)
    table = analyze.foretell(foretelling, parts, step)["rows"]
    curves = 100 * analyze.smooth_rates(
        pd.concat([run.prompts for run in pairs]), ["norm", "seed", "level"]
    )
    leads = (curves.loc[norm][step] - curves.loc["none"][step]).dropna().unstack("level")
    rows: dict[str, dict[str, Any]] = {}
    for name, (level,) in parts.items():
        ours, none = (table[name][key][0] for key in (norm, "none"))
        seen = analyze.mean_interval(leads[level])
        rows[name] = {"foretold": (ours - none) * step / 100, "seen": seen}
        rows[name]["of none's progress"] = ours / none - 1
    x, y = zip(*((row["foretold"], row["seen"][0]) for row in rows.values()))
    return rows, float(np.polyfit(x, y, 1)[0])


def foretold(root: Path) -> str:
    """Of `foretell`: how progress goes with what is learnt, by the norm that trained; what runs
    without the division foretell of the others, beside what happened, and beside what σ alone does:
    a level gains if its σ in the first ten steps is below the levels' mean."""
    agreement: dict[str, dict[str, Any]] = {}
    summary: dict[str, dict[str, Any]] = {}
    leads: dict[str, dict[str, Any]] = {}
    counts = np.zeros(3, int)  # leads told from 0; the sign foretold; by σ alone
    of_one = defaultdict[int, int](int)  # seed: signs that this run of none foretold
    for task in ("letters", "arith"):
        made = whole_runs(root / "foretell" / task)
        for norm in NORMS:
            mine = [run for run in made if run.config["norm"] == norm]
            found = [analyze.foretell([run], by_level([run]), run.end + 1) for run in mine]
            pooled = analyze.foretell(mine, by_level(mine), 1 + min(run.end for run in mine))
            row = agreement[f"{task}, {norm}"] = {"runs": len(found), "cells": pooled["cells"]}
            for key in ("r", "slope"):
                row[f"{key}, one run"] = analyze.mean_interval(one[key] for one in found)
                row[f"{key}, means of all"] = pooled[key]
        none = [run for run in made if run.config["norm"] == "none"]
        early = pd.concat([run.prompts for run in none]).query("step < 10")
        deviations = early.groupby("level")["reward_std"].mean()
        small = {f"level {name}" for name in deviations.index[deviations < deviations.mean()]}
        for norm in NORMS[1:]:
            for step in (20, 40, 60, 80, 100):
                rows, slope = beside_gap(none, made, norm, step)
                told = [name for name, row in rows.items() if row["seen"][1] * row["seen"][2] > 0]
                right = [name for name in told if same_sign(rows[name])]
                by_sigma = [name for name in told if (name in small) == (rows[name]["seen"][0] > 0)]
                numbers = [len(told), len(right), len(by_sigma)]
                names = "leads told from 0", "sign foretold", "sign by σ alone"
                title = f"{task}, {norm} less none at step {step}"
                summary[title] = dict(zip(names, numbers)) | {"slope": slope}
                leads |= {f"{task}, {norm}, step {step}, {name}": row for name, row in rows.items()}
                if step <= 60:
                    counts += numbers
                    for run in none:
                        alone, _ = beside_gap([run], made, norm, step)
                        of_one[run.config["seed"]] += sum(same_sign(alone[name]) for name in told)
    summary["all to step 60"] = dict(zip(names, counts.tolist()))
    single = [min(of_one.values()), float(np.mean([*of_one.values()])), max(of_one.values())]
    titles = "Progress and what was learnt", "Foretold and seen, in short", "By level, in points"
    tables = map(analyze.markdown, (agreement, summary, leads))
    text = "\n\n".join(f"{title}\n\n{table}" for title, table in zip(titles, tables))
    least, mean, most = map(analyze.show, single)
    return (
        f"{text}\n\nSigns that one run of none foretells, to step 60: {mean} ({least} to {most})."
    )


def same_sign(row: dict[str, Any]) -> bool:
    """Whether a lead was foretold with its sign."""
    return bool(row["foretold"] * row["seen"][0] > 0)


KINDS = "progress", "1 / σ", "groups"


def advance(runs: list[analyze.Run], kind: str, stop: int) -> pd.DataFrame:
    """What each level should be ahead by under std at every step before `stop`, in points, by each
    run of none: [(seed, level), steps].

    kind: "progress", summed along the run of none; or by clocks, as if levels had separate weights
    and no optimizer scaled them: a level passes through what it did under none, at each point at
    the speed of std's scale there over the scale's root mean square, weighted by squared gradients,
    so that steps are as long. The scale is 1 / mean σ ("1 / σ"), or what it is on average in groups
    of the run's size ("groups"), where a prompt that is rarely solved mostly has no σ at all.
    """
    ahead = {}
    for run in runs:
        whole = 100 * analyze.smooth_rates(run.prompts, ["level"])
        steps = np.arange(whole.shape[1])
        adam = run.config.get("optimizer") != "sgd"
        first = analyze.FIRST if adam else 0  # Adam's moments are young before
        if kind == "progress":
            kappa = analyze.same_length(run.log[run.log["step"].between(first, stop - 1)])
            halves = run.halves[run.halves["step"] < stop]
            std, none = (halves[f"progress_{norm}"] * kappa[norm] for norm in ("std", "none"))
            cells = (std - none).groupby([halves["level"], halves["step"] // 10]).mean().unstack()
            gains = 100 * cells[steps[:stop] // 10].to_numpy()  # [levels, stop]
            gains[:, :first] = 0
            leads = np.cumsum(gains, axis=1) - gains
            for level, lead in zip(cells.index, leads):
                ahead[run.config["seed"], level] = pd.Series(lead)
            continue
        if kind == "groups":
            group = run.config["group"]
            ratio = [family_scale(whole.to_numpy() / 100, group, norm) for norm in ("std", "none")]
            speed = pd.DataFrame(ratio[0] / ratio[1], whole.index, whole.columns)
        else:
            deviations = run.prompts.assign(pass_rate=run.prompts["reward_std"])
            speed = 1 / analyze.smooth_rates(deviations, ["level"])
        squares = run.prompts[run.prompts["step"].between(first, stop - 1)]
        squares = squares.groupby(["level", "step"])["grad_sq_signal"].sum()  # of none's gradients
        lengths = speed.stack().loc[squares.index] ** 2
        speed = speed / math.sqrt((lengths * squares).sum() / squares.sum())
        for level, curve in whole.iterrows():
            clock = [0.0]
            while len(clock) < stop:
                clock.append(clock[-1] + np.interp(clock[-1], steps, speed.loc[level]))
            lead = np.interp(clock, steps, curve) - curve.to_numpy()[:stop]
            ahead[run.config["seed"], level] = pd.Series(lead)
    return pd.DataFrame(ahead).T


def reallocated(
    prompts: pd.DataFrame, parts: dict[str, list[str]], stop: int | None = None
) -> tuple[int, dict[str, list[float]]]:
    """analyze.at_equal_progress of std, and by part each seed's reallocation, in points."""
    stop, _ = analyze.at_equal_progress(prompts, "std", parts, stop)
    values = defaultdict[str, list[float]](list)
    for _, own in prompts.groupby("seed"):
        for part, row in analyze.at_equal_progress(own, "std", parts, stop)[1].items():
            values[part].append(row["reallocation"][0])
    return stop, values


def undone(root: Path) -> str:
    """Letters, seeds 40 to 44, by optimizer: reallocation at equal overall pass rate as seen, and
    as foretold by progress in runs of none and by clocks (see `advance`)."""
    folders = {"AdamW": "foretell/letters", "AdamW, one second moment": "undo/scalar"}
    folders |= {"SGD 0.025": "undo/sgd-0.025", "SGD 0.05": "undo/sgd-0.05"}
    rows: dict[str, dict[str, Any]] = {}
    shares_of = defaultdict[tuple[str, str], list[np.ndarray]](list)
    for name, folder in folders.items():
        made = [run for run in whole_runs(root / folder) if run.config["seed"] < 45]
        made = [run for run in made if run.config["norm"] in NORMS[:2]]
        none = [run for run in made if run.config["norm"] == "none"]
        prompts = pd.concat([run.prompts for run in made])
        parts = analyze.cut_levels(prompts)
        stop, seen = reallocated(prompts, parts)
        curves = analyze.smooth_rates(pd.concat([run.prompts for run in none]), ["seed", "level"])
        # Plain SGD's steps are longer under std: what it passed through took none until `until`.
        overall = analyze.smooth_rates(prompts, ["norm", "seed", "level"])
        overall = overall.groupby(["norm", "seed"]).mean().cummax(axis=1)
        reached = [
            np.interp(overall.loc["std", seed][stop - 1], row, row.index)
            for seed, row in overall.loc["none"].iterrows()
        ]
        until = 1 + round(float(np.mean(reached)))
        curves = curves.loc[:, : until - 1]
        found = {"seen": seen}
        for kind in KINDS:
            both = {"none": curves, "std": curves + advance(none, kind, until) / 100}
            long = pd.concat(both, names=["norm", "seed", "level"]).rename_axis(columns="step")
            long = long.stack().rename("pass_rate").reset_index()
            found[f"by {kind}"] = reallocated(long, parts, until)[1]
        for part in [*parts][:2]:
            row = rows[f"{name}, {part}"] = {"to step": stop - 1.0, "of none": until - 1.0}
            row |= {kind: analyze.mean_interval(found[kind][part]) for kind in found}
            for kind in ("1 / σ", "groups"):
                shares = np.divide(seen[part], found[f"by {kind}"][part])
                row[f"seen / by {kind}"] = analyze.mean_interval(shares)
                shares_of[part.split(":")[0], kind].append(shares)
    for (part, kind), (adam, scalar, *_) in shares_of.items():
        row = rows.setdefault(f"one second moment less AdamW, {part}", {})
        row[f"seen / by {kind}"] = analyze.mean_interval(scalar - adam)
    return analyze.markdown(rows)


def language(root: Path) -> str:
    """In the language model: the lead by letter where the runs of `ahead` end, foretold from them
    and seen in ten pairs; and every comparison divided into a common speed-up and a
    reallocation."""
    made = {folder.name: whole_runs(folder) for folder in sorted((root / "pretrained").glob("*/"))}
    leads: dict[str, dict[str, Any]] = {}
    for folder in sorted((root / "ahead").glob("*/")):
        runs = whole_runs(folder)
        if not runs:
            continue
        step = 1 + min(run.end for run in runs)
        rows, slope = beside_gap(runs, made[folder.name], "std", step)
        title = f"{folder.name}, step {step}"
        progress = analyze.foretell(runs, by_level(runs), step)["rows"]  # for its intervals
        for level, row in rows.items():
            row["foretold"] = [step / 100 * x for x in progress[level]["std less none"]]
            leads[f"{title}, {level}"] = row
        leads[f"{title}, slope over levels"] = {"seen": slope}
    letters = next(name for name in made if "0-of-3" in name)
    batch = made.pop("letters-batch")
    seeds = {run.config["seed"] for run in batch}
    studies = {f"{name}, std − none": (own, "std", "none") for name, own in made.items()}
    same = [run for run in made[letters] if run.config["seed"] in seeds]
    studies["letters, batch − none"] = (same + batch, "batch", "none")
    studies["letters, std − batch"] = (same + batch, "std", "batch")
    parted: dict[str, dict[str, Any]] = {}
    for name, (own, norm, base) in studies.items():
        prompts = pd.concat([run.prompts for run in own if run.config["norm"] in (norm, base)])
        prompts = prompts.assign(norm=prompts["norm"].replace(base, "none"))
        stop, table = analyze.at_equal_progress(prompts, norm, analyze.cut_levels(prompts))
        for part, row in table.items():
            values = dict(zip(("lead", "common speed-up", "reallocation"), row.values()))
            parted[f"{name}, {part}"] = {"to step": float(stop - 1)} | values
    titles = "Lead of std, in points", "At equal overall pass rate, in points"
    tables = map(analyze.markdown, (leads, parted))
    return "\n\n".join(f"{title}\n\n{table}" for title, table in zip(titles, tables))


def words(root: Path) -> str:
    """Of `words`: what 100 steps of each norm would teach, by pass rate, in each run and over all;
    the share of groups whose rewards are all equal, and the ratio of std's length to none's."""
    rows: dict[str, dict[str, Any]] = {}
    for folder in sorted((root / "words").glob("*/")):
        made = whole_runs(folder)
        each = {f"seed {run.config['seed']}": [run] for run in made}
        if len(made) > 1:
            each["all runs"] = made
        for name, own in each.items():
            found = analyze.foretell(own, {}, 1 + max(run.end for run in own))
            silent = pd.concat([run.prompts for run in own])["reward_std"] == 0
            for part, row in found["rows"].items():
                row = {key: x[0] if key in NORMS else x for key, x in row.items()}
                more = {"equal rewards": silent.mean(), "rate": found["rate"]}
                rows[f"{folder.name}, {name}, {part}"] = row | (more if part == "all" else {})
    return analyze.markdown(rows)


def levels(root: Path) -> str:
    """The whole reports of analyze.py on std and none: of `letters`, and of `arith` in `foretell`,
    which is shorter, on other seeds, and without curvature."""
    reports = []
    for folder in ("letters/default", "foretell/arith"):
        made = [run for run in whole_runs(root / folder) if run.config["norm"] in NORMS[:2]]
        for title, runs in analyze.arrange(analyze.tabulate(made)).items():
            reports.append(analyze.describe(title, analyze.compare(runs, None)[0]))
    return "".join(reports)


# -------------------------------------- What each norm did ----------------------------------------


def early_geometry(runs: list[analyze.Run]) -> dict[str, list[float]]:
    """Corrected cosine and interference of the first 60 steps, before the runs have parted."""
    free = [analyze.noise_free(analyze.signals(run)[""].loc[:59])[0] for run in runs]
    values = {"corrected cosine": free}
    values["interference"] = [run.log["interference"][run.log["step"] < 60].mean() for run in runs]
    return {name: analyze.mean_interval(each) for name, each in values.items()}


def table(root: Path) -> str:
    """A line for every comparison and norm, with mean pass rates and gaps (points) of all steps; of
    `rates`, mean pass rates over steps and seeds by learning rate."""
    rows: dict[str, dict[str, Any]] = {}
    rates: dict[str, dict[str, Any]] = {}
    for folder in sorted({path.parents[1] for path in root.glob("*/*/*/model")}):
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


def embedded(root: Path) -> str:
    """Of `letters` and `arith` each norm's gap to none, in points, by parts of the run (steps 70 to
    100 were chosen on other seeds), what std has over batch, and mean held-out pass rates."""
    gaps, held = defaultdict[str, dict[str, Any]](dict), defaultdict[str, dict[str, Any]](dict)
    for name in [name for name in ("letters", "arith") if (root / name).exists()]:
        logs = pd.concat([run.log for run in whole_runs(root / name / "default")])
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


def fresh(root: Path) -> str:
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


def picture(root: Path) -> tuple[str, Figure]:
    """Of `letters` the pass rates of std and none, and the lead of std by difficulty,
    means of ten steps with 95% intervals over seeds."""
    runs = [run for run in whole_runs(root / "letters/default") if run.config["norm"] in NORMS[:2]]
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
        (right, lead["std"], "#000000", "-", "all problems", 82, 1.2, "left"),
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
    for a, b, name in zip(edges, edges[1:], ("alike on average", "opens", "closes")):
        right.axvspan(a, b, color="grey", alpha=0.15 * (name == "opens"), linewidth=0)
        above = dict(transform=right.get_xaxis_transform(), ha="center", va="top")
        if b - a > 4 * len(name):  # steps: else there is no room for it
            right.text((a + b) / 2, 0.98, name, fontsize=15, style="italic", **above)
    left.set_title("Pass rate in training (%)", fontsize=18)
    right.set_title("Lead of GRPO (percentage points)", fontsize=18)
    for axis in (left, right):
        axis.set_xlabel("training step", fontsize=15)
        axis.tick_params(labelsize=14)
    return f"{len(lead['std'].columns)} pairs of runs: {phases['reason']}", figure


def condition(root: Path) -> tuple[str, Figure]:
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
        runs = [run for run in whole_runs(root / study) if run.config["norm"] in ("std", "none")]
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
    return analyze.markdown(rows), figure


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


def contrast(root: Path) -> str:
    """Of `drawn`: the gap over all steps by cell, and how much larger it is where skills are
    separate and unequal than in the mean of the other cells: of std, of batch, which has a common
    rate alone, and of std less batch. Intervals are over tasks."""
    rows: dict[str, dict[str, Any]] = {}
    gaps = {}
    for cell in CELLS:
        folders = sorted({path.parents[1] for path in (root / "drawn" / cell).glob("*/*/model")})
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


def carried(root: Path) -> str:
    """Of `pretrained`: a row a task, intervals over seeds; in the window of letters, std over batch
    and batch over none; by how much the gaps of letters are larger than the control's, in their own
    windows and where both stop with the control."""
    made = {folder.name: whole_runs(folder) for folder in sorted((root / "pretrained").glob("*/"))}
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


def findings(root: Path) -> str:
    """The README's table, but for drawn tasks and word problems: gaps of std, in points, over all
    steps, in the language model up to a pass rate of 0.95; and held out at the end."""
    rows: dict[str, dict[str, Any]] = {}
    ends = {"letters/default": 249, "foretell/arith": 119, "pretrained/*-0-of-3": None}
    ends |= {"pretrained/*-3-of-3": None}
    for name, end in ends.items():
        (folder,) = root.glob(name)
        runs = [run for run in whole_runs(folder) if run.config["norm"] in NORMS[:2]]
        rows[name] = {k: analyze.mean_interval(x) for k, x in in_window(runs, end).items()}
    return analyze.markdown(rows)


def thirds(root: Path) -> str:
    """Of `model`, by thirds of the run, intervals over seeds: pass rates, the gap in points, and
    the share of prompts whose completions were all rewarded alike."""
    folders = [path.parent for path in sorted((root / "model").glob("*/*/config.json"))]
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


def exact(root: Path) -> str:
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


FUNCTIONS = [foretold, undone, language, words, findings, levels, embedded, picture, carried]
FUNCTIONS += [thirds, fresh, exact, table, condition, contrast]
TABLES: dict[str, Callable[[Path], Any]] = {function.__name__: function for function in FUNCTIONS}
# The studies in results/ that a table reads; those without an entry have no packed logs.
PACKED: dict[str, tuple[str, ...]] = {
    "foretold": ("foretell",),
    "undone": ("foretell", "undo"),
    "language": ("pretrained", "ahead"),
    "words": ("words",),
    "embedded": ("letters",),
    "levels": ("letters", "foretell"),
    "findings": ("letters", "foretell", "pretrained"),
    "picture": ("letters",),
    "carried": ("pretrained",),
    "thirds": ("model",),
    "fresh": (),
    "exact": (),
}


def unpack(studies: Sequence[str], folder: Path) -> None:
    """Put packed logs of studies into a folder, as experiment.py would leave them."""
    for study in studies:
        with tarfile.open(HERE / "results" / f"{study}.tar.xz") as archive:
            archive.extractall(folder, filter="data")


def main() -> None:
    """The command line."""
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=about)
    parser.add_argument("table", choices=[*TABLES])
    parser.add_argument("--runs", type=Path, help="where experiment.py's runs lie")
    given = parser.parse_args()
    if given.runs is None and given.table not in PACKED:
        parser.error(f"{given.table} has no packed logs: make its runs, and name them by --runs")
    with tempfile.TemporaryDirectory() as folder:
        if given.runs is None:
            unpack(PACKED[given.table], Path(folder))
        try:
            found = TABLES[given.table](given.runs or Path(folder))
        except (KeyError, ValueError, StopIteration):
            if given.runs is None:
                raise
            parser.error(f"{given.runs} lacks runs of {given.table}: make them by experiment.py")
    if isinstance(found, tuple):
        found, figure = found
        figure.savefig(f"{given.table}.png", dpi=100)
    print(found)


if __name__ == "__main__":
    main()
