"""Does training show the paper's three phases, and do the paper's reasons hold? Reads the logs of grpo.py and says so.

    python analyze.py runs/*-std-* runs/*-none-*              # three seeds or more of each: phases, tables, theory
    python analyze.py runs/letters-std-0                      # one run: its tables, and no verdict

A report goes to the terminal and to analysis.md, its numbers to analysis.json, a picture of the first comparison to
phases.png, all in the run's directory (of several runs: in the directory that holds them) or in --out.

The paper (Ge et al., arXiv 2601.23135) sees three phases in the gap in pass rate between advantages over their standard
deviation (std) and without (none): I alike, II opening, III no longer widening. Its reasons: first the reward deviation
leaves its maximum, then the prompts' gradients lose their orthogonality. "Not found" is a result.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import sys
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from scipy import optimize, stats

# ---------------------------------------------------- Reading logs ----------------------------------------------------

METRICS = ["pass_rate", "reward", "reward_std", "eval_pass_rate", "eval_reward", "feature_cos", "feature_cos_centered"]
METRICS += ["n_gradients", "cos_mean", "cos_std", "cos_positive", "cos_small", "interference", "signal_share"]
PROMPTS = ["reward_std", "grad_norm", "grad_sq_signal", "fisher"]
HALVES = ["pass_rate_half", "reward_std_half", "fisher_half", "curvature"]
# Settings in which runs that are compared may differ: what is compared, and what changes nothing in training.
FREE = {"norm", "seed", "lr", "out", "resume", "steps", "device", "micro_batch", "save_every"}
FREE |= {"eval_every", "geometry_every", "probe_every"}


@dataclass
class Run:
    """One run's settings and logs; NaN where something was not measured."""

    path: Path
    config: dict[str, Any]
    skipped: int  # lines that could not be read
    end: int  # the last step of training
    log: pd.DataFrame  # a row a step: METRICS, rate and held_out (mean rewards, pass rates if 0 or 1), C = (8/3) sigma
    prompts: pd.DataFrame  # a row a prompt and step: PROMPTS, variance (of the same completions' rewards)
    halves: pd.DataFrame  # a row a half of a group: step, HALVES, variance (of the other half's rewards, unbiased)


def number(value: Any) -> float:
    """A JSON value as a float; NaN for what is no number, or none whose square would be finite."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e100 else math.nan


def read_table(path: Path, keys: list[str], pairs: Sequence[str] = ()) -> tuple[pd.DataFrame, int]:
    """The lines of a log that have a step, a pair in two columns, and how many others there are (half lines, say)."""
    rows, skipped = [], 0
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < 2**53:
            parts = [row[key] if isinstance(row.get(key), list) and len(row[key]) == 2 else [None] * 2 for key in pairs]
            rows.append([row["step"], *map(number, itertools.chain(map(row.get, keys), *parts))])
        else:
            skipped += 1
    columns = ["step", *keys, *(f"{key}{half}" for key in pairs for half in "AB")]
    return pd.DataFrame(rows, columns=columns, dtype=float).astype({"step": int}), skipped


def read_run(path: Path) -> Run:
    """A run's directory. Raises ValueError where it has no readable settings or no line of metrics."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        log, skipped = read_table(path / "metrics.jsonl", METRICS)
        prompts, more = read_table(path / "prompts.jsonl", PROMPTS, HALVES)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    sizes = [config.get(name) for name in ("prompts", "group", "seed")] if isinstance(config, dict) else [None]
    valid = all(type(value) is int and 0 <= value < 2**31 for value in sizes) and 0 not in sizes[:2]
    if not valid or not isinstance(config.get("norm"), str):
        raise ValueError(f"{path}: config.json does not name norm, seed, prompts and group")
    trained = log.loc[log["reward_std"].notna(), "step"]
    if trained.empty:
        raise ValueError(f"{path}: metrics.jsonl has no step")
    log = log.drop_duplicates("step", keep="last").sort_values("step")
    log["rate"] = log["reward"].fillna(log["pass_rate"])  # of rewards other than 0 and 1 what was trained counts
    log["held_out"] = log["eval_reward"].fillna(log["eval_pass_rate"])
    log["C"] = 8 / 3 * log["reward_std"]
    prompts["variance"], halves = prompts["reward_std"] ** 2, []
    if not np.allclose(log["rate"], log["pass_rate"], equal_nan=True):  # C and predicted gain are of rewards of 0 and 1
        log["C"] = prompts["reward_std"] = math.nan
    for one, other, size in (("A", "B", config["group"] // 2), ("B", "A", (config["group"] + 1) // 2)):
        half = prompts[["step", *(key + one for key in HALVES)]].set_axis(["step", *HALVES], axis=1)
        halves.append(half.assign(variance=prompts["reward_std_half" + other] ** 2 * size / max(1, size - 1)))
    measured = pd.concat(halves).dropna(subset="reward_std_half")
    tables = [table.assign(norm=config["norm"], seed=config["seed"]) for table in (log, prompts, measured)]
    return Run(path, config, skipped + more, int(trained.max()), *tables)


# ----------------------------------------------------- Statistics -----------------------------------------------------


def mean_interval(values: Iterable[float]) -> list[float]:
    """Mean, and its 95% interval by Student's t: NaN for fewer than three values, all NaN if one of them is.

    Not by bootstrap: means of three to five resampled runs never leave their range, and cover 75% to 94%.
    """
    given = pd.Series([*values], dtype=float)
    mean = float(given.mean(skipna=False))
    half = float(stats.t.ppf(0.975, len(given) - 1) * given.sem(skipna=False)) if len(given) > 2 else math.nan
    return [mean, mean - half, mean + half]


def windows(table: pd.DataFrame) -> pd.DataFrame:
    """Means of what is not NaN in min(60, n) windows of equal length, by their first index: [n, runs] -> [60, runs]."""
    window = np.arange(len(table)) * min(60, len(table)) // max(1, len(table))
    return table.groupby(window).mean().set_axis(table.index[np.unique(window, return_index=True)[1]])


def bins_of(x: pd.Series) -> pd.Series:
    """A label for every value: itself where there are eight or fewer, else one of up to eight bins of like size."""
    x = x.round(9)
    return x if x.nunique() <= 8 else np.ceil(8 * x.rank(pct=True))


def bands(groups: Iterable[tuple[float, Iterable[float]]]) -> pd.DataFrame:
    """Mean and interval of the values at every x."""
    rows = {x: mean_interval(values) for x, values in groups}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["mean", "low", "high"]).dropna(subset="mean")


def correlations(rows: pd.DataFrame) -> pd.Series:
    """Pearson's correlation of two columns in every group of the index that has three pairs and variation in both."""
    rows = rows.dropna().set_axis(["x", "y"], axis=1).round({"x": 9})  # rounding is no variation
    return rows.groupby(rows.index.names).corr(min_periods=3)["y"].iloc[::2].dropna()


# ------------------------------------------------------- Phases -------------------------------------------------------


@functools.lru_cache(maxsize=8)
def broken_lines(x: tuple[float, ...], count: int) -> tuple[np.ndarray, np.ndarray]:
    """All continuous lines with `count` knots at positions x [n]: their knots [lines, count], indices of x, and
    orthonormal bases [lines, n, 2 + count] of the functions that bend there."""
    n, tenth = len(x), math.ceil(len(x) / 10)
    sets = itertools.combinations(range(tenth, n - tenth + 1), count)
    apart = [s for s in sets if all(b - a >= m for a, b, m in zip(s, s[1:], (tenth, 3), strict=False))]
    knots = np.array(apart, int)
    t = (np.array(x) - x[0]) / (x[-1] - x[0])
    hinges = np.maximum(t - t[:, None], 0)[knots].swapaxes(1, 2)  # [lines, n, count]
    straight = np.broadcast_to(np.stack([np.ones(n), t], axis=1), (len(knots), n, 2))
    return knots, np.linalg.qr(np.concatenate([straight, hinges], axis=2))[0]


def best_lines(x: tuple[float, ...], y: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least-squares lines with `count` knots, shared by the d series of every draw: [n, draws, d] -> knots [draws,
    count], basis of the first draw's line [n, 2 + count], sum of squares left [draws]."""
    knots, bases = broken_lines(x, count)
    explained = np.square(bases.swapaxes(1, 2) @ y.reshape(len(y), -1)).sum(axis=1)  # [lines, draws * d]
    explained = explained.reshape(len(bases), *y.shape[1:]).sum(axis=2)
    best, total = explained.argmax(axis=0), np.square(y).sum(axis=(0, 2))
    return knots[best], bases[best[0]], np.maximum(total - explained.max(axis=0), 1e-12 * total + 1e-300)


def detect_phases(
    gap: ArrayLike | None, reward_std: ArrayLike, cos_std: ArrayLike, steps: ArrayLike | None = None
) -> dict[str, Any]:
    """Whether the gap between two norms has the three phases of arXiv 2601.23135: alike, opening, no longer widening.

    gap: pass rate less that without normalization, [runs, n], a row a pair of runs with one seed ([n]: one pair; None:
    there is no run without). reward_std, cos_std: mean within-prompt standard deviation, and standard deviation of the
    cosines of prompt gradients, of the normalized runs, same shape. NaN: not measured. steps: [n], rising, by default
    0, 1, 2, ... Raises ValueError for unequal shapes.

    BIC chooses the number of `knots`, 0 to 3, of a continuous broken line through the runs' mean in 60 windows.
    `boundaries` are the first two of the better line of 2 and 3, where II and III begin, supported or not ([]: too
    short); `intervals` theirs over resampled runs; `line` its corners. `claims`: name to value, 95% interval over runs
    (Student's t), and whether it holds (None for fewer than three runs). `found`: two knots or more, and the claims on
    the gap hold; `reason` says it in words. Without a gap the line is that of the other two series.
    """
    given = [np.atleast_2d(np.asarray(series, float)).T for series in (reward_std, cos_std, gap) if series is not None]
    index = np.arange(len(given[0])) if steps is None else np.asarray(steps)
    if len({series.shape for series in given}) > 1:
        raise ValueError("series of unequal shapes")
    sigma, spread, *gaps = (windows(pd.DataFrame(series, index)).dropna() for series in given)  # [windows, runs]
    at = gaps[0].index if gaps else sigma.index.intersection(spread.index)
    result: dict[str, Any] = {"found": False, "knots": 0, "boundaries": [], "intervals": [], "line": [], "claims": {}}
    if len(at) < 30:
        return result | {"reason": f"Undecided: {len(at)} windows of what is fitted, 30 are needed"}
    y = np.stack([series.loc[at] for series in gaps or [sigma, spread]], axis=2)  # [windows, runs, d]
    if not gaps:  # of two units
        y = (y - y.mean(axis=(0, 1))) / np.maximum(y.mean(axis=1).std(axis=0), 1e-12)
    x, runs = tuple(map(float, at)), y.shape[1]

    # The data first, then resampled runs. Noise that remembers imitates bends: the windows that BIC counts are fewer.
    rows = np.random.default_rng(0).integers(runs, size=(201 if runs > 2 else 1, runs))
    rows[0] = np.arange(runs)
    drawn = y[:, rows].mean(axis=2)  # [windows, draws, d]
    knots, bases, left = zip(*(best_lines(x, drawn, count) for count in range(4)), strict=True)
    noise = drawn[:, 0] - bases[3] @ (bases[3].T @ drawn[:, 0])
    rho = np.clip((noise[1:] * noise[:-1]).sum() / max(np.square(noise).sum(), 1e-300), 0, 0.9)
    size, d = noise.size * (1 - rho) / (1 + rho), y.shape[2]
    scores = np.stack([size * np.log(left[k]) + (d * (2 + k) + k) * math.log(size) for k in range(4)])  # [4, draws]
    three = scores[3] < scores[2]
    chosen = np.where(three[:, None], knots[3][:, :2], knots[2])  # [draws, 2]
    (first, second), bounds = chosen[0], at.to_numpy()[chosen]
    result |= {"knots": int(scores[:, 0].argmin()), "boundaries": bounds[0].tolist()}
    if runs > 2:
        result["intervals"] = np.quantile(bounds[1:], [0.025, 0.975], axis=0, method="nearest").T.tolist()

    def claim(name: str, values: Any, above_0: list[Any], also: bool = True) -> None:
        value, *interval = mean_interval(values)
        holds = also and all(mean_interval(each)[1] > 0 for each in above_0)
        sure = (interval, holds) if math.isfinite(interval[0]) else (None, None)
        result["claims"][name] = {"value": value, "interval": sure[0], "holds": sure[1]}

    if gaps:
        basis, third = (bases[3], knots[3][0, 2]) if three[0] else (bases[2], len(x) - 1)
        fit, ends = basis @ (basis.T @ y[:, :, 0]), [0, first, second, third]  # [windows, runs]
        one, two, last = ((fit[b] - fit[a]) / (x[b] - x[a]) for a, b in itertools.pairwise(ends))  # slopes
        early, rise, lead = y[:first, :, 0].mean(axis=0), fit[second] - fit[first], fit[second]
        widens = any(mean_interval(fit[end] - lead)[1] > 0 for end in (third, -1))
        claim("alike_in_I", two - one, [two - one, lead / 2 - early, lead / 2 + early])
        claim("opens_in_II", rise, [rise, lead])
        claim("stops_in_III", last - two, [two - last], not widens)
        result["line"] = [[int(at[i]), float(fit[i].mean())] for i in sorted({*ends, len(x) - 1})]
    failed = [name.replace("_", " ") for name, found in result["claims"].items() if not found["holds"]]
    for name, series, sign in (("deviation_falls", sigma, -1), ("orthogonality_falls", spread, 1)):
        change = series[series.index >= at[second]].mean() - series[series.index < at[first]].mean()
        claim(name, change, [sign * change])

    if not gaps:
        reason = "Undecided: phases are those of a gap, and there is none: run --norm none with the same seeds"
    elif runs < 3:
        reason = "Undecided: no interval over seeds, run three seeds or more"
    elif result["knots"] < 2:
        reason = f"No three phases: the gap is best described by a line with {('no bend', 'one bend')[result['knots']]}"
    elif failed:
        reason = f"No three phases: of the claims on the gap not all hold: {', '.join(failed)}"
    else:
        result["found"] = True
        reason = "Three phases: alike to step {}, the gap opens to step {} and widens no longer".format(*bounds[0])
        if result["claims"]["orthogonality_falls"]["holds"] is False:
            reason += "; but the paper's reason for the third, that orthogonality falls, is not there"
    return result | {"reason": reason}


# -------------------------------------------------------- Laws --------------------------------------------------------


def predicted_gain(grad_squares: ArrayLike, reward_std: ArrayLike) -> float:
    """Ascent gained by steps 1/sigma a prompt over one step size for all, sum(|g|^2/sigma) / sum(|g|^2) / 2.

    grad_squares: [P] squared norms of prompt gradients, or estimates without noise; reward_std: [P] within-prompt
    standard deviations, at most 1/2 for rewards of 0 and 1. Prompts with NaN or without variance are left out. At least
    1 for true norms; NaN if they do not sum to more than 0. Holds for orthogonal prompts and curvature proportional to
    sigma.
    """
    squares, std = np.asarray(grad_squares, float), np.asarray(reward_std, float)
    present = np.isfinite(squares) & (std > 0)
    total = squares[present].sum()
    return float((squares[present] / std[present]).sum() / total / 2) if total > 0 else math.nan


def curvature_exponent(sigma: ArrayLike, variance: ArrayLike, curvature: ArrayLike) -> dict[str, Any]:
    """Exponent a of |curvature| ~ sigma^a, from signed curvatures averaged in bins of sigma: logarithms of single noisy
    values are dominated by those near zero. All arguments are [m]; NaN and sigma 0 are left out.

    sigma: of the half of a group that gave the direction, never of the half that gave the curvature (reward /
    parameter^2), which is proportional to its own variance and makes a law of nothing; variance: unbiased, of the other
    half's rewards: its mean in a bin is free of the noise of sigma (exact for 2, some tenths off far from it). Returns
    `n` and `alpha` [value, low, high], 95%, by the weighted fit of c * x^a with c of either sign; NaN with fewer than
    two bins of ten, or an interval wider than 4.
    """
    given = [np.asarray(series, float) for series in (sigma, variance, curvature)]
    rows = pd.DataFrame(np.stack(given, axis=1)).dropna()
    rows = rows[rows[0] > 0]
    bins = rows.groupby(bins_of(rows[0])).agg(["mean", "sem", "size"])
    bins = bins[(bins[0, "size"] >= 10) & (bins[1, "mean"] > 0)]
    x, y, error = np.sqrt(bins[1, "mean"]), bins[2, "mean"], bins[2, "sem"]
    result = {"alpha": [math.nan] * 3, "n": len(rows)}
    with contextlib.suppress(RuntimeError, TypeError, ValueError), warnings.catch_warnings():  # no fit
        warnings.simplefilter("ignore")
        fit, covariance = optimize.curve_fit(lambda x, c, a: c * x**a, x, y, (y.mean(), 1), error, absolute_sigma=True)
        half = 1.96 * math.sqrt(covariance[1, 1])
        if half < 2:
            result["alpha"] = [float(fit[1]), float(fit[1] - half), float(fit[1] + half)]
    return result


# ------------------------------------------------- Comparison of runs -------------------------------------------------


def tabulate(runs: list[Run]) -> pd.DataFrame:
    """A row a run; `title`: the settings in which runs that may be compared differ from the others."""
    names = dict.fromkeys(name for run in runs for name in run.config if name not in FREE)
    differ = [name for name in names if any(run.config.get(name) != runs[0].config.get(name) for run in runs)]
    rows = []
    for run in runs:
        known = differ or ["task"] + ["model"] * bool(run.config.get("model"))
        title = ", ".join(f"{name} {run.config.get(name)!r}" for name in known)
        identity = [run.config["norm"], str(run.config.get("lr")), run.config["seed"]]
        rows.append([title, *identity, run.end, run.log["rate"].mean(), run])
    return pd.DataFrame(rows, columns=["title", "norm", "lr", "seed", "end", "rate", "run"])


def arrange(table: pd.DataFrame) -> dict[str, list[Run]]:
    """Comparisons among rows of `tabulate`: all norms at one learning rate, for every rate, that of std's best first,
    then each at its best: by how far its runs went (one that came to no end is not the best), then by mean rate."""
    merit = table.groupby(["norm", "lr"]).agg({"end": "min", "rate": "mean"}).sort_values(["end", "rate"])
    best, found = dict(merit.index), {}  # of a norm's rates the last
    for lr in sorted(set(table["lr"]), key=lambda lr: (lr != best.get("std"), lr)):
        rows = table[table["lr"] == lr]
        if len(best) == 1 or rows["norm"].nunique() > 1:
            found[f"learning rate {lr}"] = [*rows["run"]]
    if len(set(best.values())) > 1:
        title = f"each norm at its best learning rate, {', '.join(map(' '.join, best.items()))}"
        found[title] = [*table.loc[table["lr"] == table["norm"].map(best), "run"]]
    return found


def reach(rates: pd.Series, level: float) -> float:
    """Step at which a pass rate, in the mean of a thirtieth of the steps, comes to a level; NaN if never or at once."""
    means = rates.dropna().rolling(max(1, len(rates) // 30), center=True).mean().dropna()
    steps = means.index[means >= level]
    return math.nan if steps.empty or steps[0] == means.index[0] else float(steps[0])


def foresee(run: Run, stop: float) -> list[float]:
    """predicted_gain of a run without normalization up to a step, with the noise removed and as sampled."""
    rows = run.prompts[run.prompts["step"] <= stop].dropna(subset=["grad_norm", "grad_sq_signal"])
    squares = rows["grad_norm"] ** 2
    total = squares.groupby(rows["step"]).transform("sum")  # every step counts the same
    return [predicted_gain(part / total, rows["reward_std"]) for part in (rows["grad_sq_signal"], squares)]


def corrected_cosine(log: pd.DataFrame, prompts: int) -> float:
    """Cosine of two prompts' gradients without sampling noise, a ratio of means; NaN below two errors of the share."""
    share = log["signal_share"]
    mean = share.mean() if share.mean() > 2 * share.sem() else math.nan
    return (log["interference"].mean() - 1) / max(1, prompts - 1) / mean


def describe_phase(log: pd.DataFrame, prompts: int) -> dict[str, Any]:
    """A row of Table 3, the cosines of all pairs of prompt gradients of some steps together; and C, over runs."""
    rows = log.dropna(subset=["n_gradients", "cos_mean", "cos_std"])
    pairs = rows["n_gradients"] * (rows["n_gradients"] - 1) / 2
    rows = rows[["cos_mean", "cos_positive", "cos_small"]].assign(square=rows["cos_std"] ** 2 + rows["cos_mean"] ** 2)
    mean, positive, small, square = rows.mul(pairs, axis=0).sum(min_count=1) / max(1, pairs.sum())
    row = {"mean": mean, "std": (square - mean**2) ** 0.5, "above 0": positive, "below 0.1 in size": small}
    row |= {"pairs": int(pairs.sum()), "signal share": log["signal_share"].mean()}
    row |= {"corrected": corrected_cosine(log, prompts), "C": mean_interval(log.groupby("seed")["C"].mean())}
    return row | {"features": log["feature_cos"].mean(), "centred": log["feature_cos_centered"].mean()}


def compare(runs: list[Run], target: float | None) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Of runs, as far as the shortest goes: the numbers of the report (tables are row to column to value, intervals
    [mean, low, high]); series [steps, (label, seed)] and pairs [m, 2] for the picture."""
    last = min(run.end for run in runs)
    log, prompts, halves = (pd.concat([getattr(run, name) for run in runs]) for name in ("log", "prompts", "halves"))
    held_out = log[log["step"] <= last + 1].groupby(["norm", "seed"])["held_out"].last()
    log, prompts, halves = (table[table["step"] <= last] for table in (log, prompts, halves))
    norms = sorted({*log["norm"]}, key=lambda norm: (norm == "none", norm != "std", norm))
    wide = log.pivot(index="step", columns=["norm", "seed"], values=["rate", "reward_std", "cos_mean", "cos_std"])
    wide, main = wide.reindex(columns=norms, level="norm"), norms[0]  # the phases are those of the main norm
    rates, plain = wide["rate"], wide["rate"].get("none", pd.DataFrame())
    gaps = rates.sub(plain, level="seed").drop(columns="none", errors="ignore").dropna(axis=1, how="all")
    gap, seeds = (gaps[main].T, gaps[main].columns) if main in gaps else (None, rates[main].columns)
    phases = detect_phases(gap, wide["reward_std", main][seeds].T, wide["cos_std", main][seeds].T, wide.index)

    # The norms: pass rates, steps to a goal, and of pairs of runs the gap, the speed-up and its prediction.
    ends = rates.apply(lambda rate: rate.dropna().iloc[-max(1, rate.count() // 10) :].mean())
    goal = 0.9 * ends.groupby("norm").mean().min() if target is None else target
    reached, table = rates.apply(reach, level=goal), {}
    for norm in norms:
        row = {"runs": len(ends[norm]), "end": mean_interval(ends[norm]), "held out": mean_interval(held_out[norm])}
        row[f"steps to {goal:.2f}"] = mean_interval(reached[norm])
        if norm in gaps:
            means = windows(gaps[norm])
            row["at step"] = widest = int(means.mean(axis=1).idxmax())
            row["largest gap"] = mean_interval(means.loc[widest])
            row["speed-up"] = np.exp(mean_interval(np.log(reached["none"] / reached[norm])[means.columns])).tolist()
        if norm == "std" and norm in gaps:  # the prediction speaks of steps 1/sigma
            others = {run.config["seed"]: run for run in runs if run.config["norm"] == "none"}
            gains = [foresee(others[seed], reached["none", seed]) for seed in seeds]
            row["predicted"], row["with noise"] = map(mean_interval, zip(*gains, strict=True))
        table[norm] = row

    # The phases: cosines, features, C(T).
    mine, size, edges = log[log["norm"] == main], runs[0].config["prompts"], [0, *phases["boundaries"], last + 1]
    phase = pd.cut(mine["step"], edges, right=False, labels=["I", "II", "III"] if edges[2:] else ["all steps"])
    rows = {name: describe_phase(part, size) for name, part in mine.groupby(phase, observed=True)}
    angles = {key: abs(corrected_cosine(part, size)) for key, part in mine.groupby([phase, "seed"], observed=True)}
    change = mean_interval(angles.get(("III", seed), math.nan) - angles.get(("I", seed), 0) for seed in rates[main])
    running = mine.groupby("step")["C"].mean().expanding().mean()
    below = running.index[running[::-1].cummax()[::-1] < 1]

    # Over prompts, of all norms: correlations and exponents.
    prompts, halves = (rows.set_index(["norm", "seed", "step"]) for rows in (prompts, halves))
    sides = {f"pass rate {sign} ½": halves.query(f"pass_rate_half {sign} 0.5") for sign in "<>"}
    fisher = {"same completions": prompts[["variance", "fisher"]], "across halves": halves[["variance", "fisher_half"]]}
    curvature = {side: part[["reward_std_half", "curvature"]] for side, part in sides.items()}
    points = {"Fisher against reward variance": fisher, "curvature against σ": curvature}
    pairs = {f"{name}, {label}": correlations(part) for name, parts in points.items() for label, part in parts.items()}
    laws, third = {}, last // 3 + 1
    for side, part in sides.items():
        for start, cut in part.groupby(part.index.get_level_values("step") // third * third):
            law = curvature_exponent(cut["reward_std_half"], cut["variance"], cut["curvature"])
            laws[f"{side}, from step {start}"] = law

    found = {"norm": main, "last_step": last, "phases": phases, "norms": table, "cosines": rows, "exponents": laws}
    found |= {"corrected_change": change, "C_below_1_since": int(below[0]) if len(below) else None}
    found["correlations"] = {
        name: {"r": mean_interval(values.groupby("seed").mean()), "steps": len(values)}
        for name, values in pairs.items()
    }
    lines = {"pass rate (training prompts)": rates, "gap in pass rate to none": gaps}
    lines["mean σ within prompts"] = wide["reward_std"]
    lines["cosines of prompt gradients"] = wide.xs(main, axis=1, level="norm")[["cos_std", "cos_mean"]]
    return found, lines, points


# ------------------------------------------------------- Report -------------------------------------------------------


def show(value: Any) -> str:
    """A figure, a mean with its interval if it has one, or nothing."""
    if isinstance(value, list):
        return show(value[0]) + (f" [{show(value[1])}, {show(value[2])}]" if math.isfinite(value[1]) else "")
    if value is None or not math.isfinite(value):
        return "" if value is None else "–"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """Row to column to value as a table."""
    columns = [*dict.fromkeys(itertools.chain(*rows.values()))]
    cells = [["", *columns], ["---"] * (1 + len(columns))]
    cells += [[name, *(show(row.get(column)) for column in columns)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells) if rows else "Not measured."


def describe(title: str, found: dict[str, Any]) -> str:
    """The report on a comparison, as Markdown."""
    phases, change, since = found["phases"], found["corrected_change"], found["C_below_1_since"]
    bounds = itertools.zip_longest(phases["boundaries"], phases["intervals"], fillvalue="")
    starts = [f"{step} {interval}".strip() for step, interval in bounds]
    split = "There is no split"
    if starts:
        split = f"Norm {found['norm']}: II from step {starts[0]}, III from {starts[1]} (95% over resampled runs)"
    claims, words = "", {True: "holds", False: "does not hold", None: "not decided"}
    for name, claim in phases["claims"].items():
        value = show([claim["value"], *(claim["interval"] or [math.nan] * 2)])
        claims += f"| {name.replace('_', ' ')} | {value} | {words[claim['holds']]} |\n"
    spread = phases["claims"].get("orthogonality_falls", {}).get("holds")
    signs = {(True, False): ", so noise may be all", (False, True): ", so noise hides that orthogonality falls"}
    agree = signs.get((spread, change[1] > 0), "")
    conflict = ", ".join(f"{show(1 - row['above 0'])} in {name}" for name, row in found["cosines"].items())
    return f"""
## {title}, up to step {found["last_step"]}

**{phases["reason"]}.**

{split}{"" if phases["found"] else ", and it is not supported" * bool(starts)}.

| claim | value | |
| --- | --- | --- |
{claims}
In order: slope of the gap in II less that in I (pass rate a step), its rise in II, its slope in III less that in II;
changes from I to III of mean σ and of the cosines' deviation, which noise widens too: without it the cosine changes in
size by {show(change)}{agree}.

### Norms
{markdown(found["norms"])}

Steps and speed-up: where every run begins below the goal and reaches it. The largest gap is picked among 60 windows and
a little too large. `with noise`: the prediction from gradients as sampled.

### Cosines of pairs of prompt gradients (Table 3), and C(T) = (8/3) · mean σ
{markdown(found["cosines"])}
| paper, step 0 | 0.000 | 0.045 | 0.505 | 0.977 | 4950 |
| paper, step 260 | 0.039 | 0.066 | 0.727 | 0.803 | 4950 |
| paper, step 500 | 0.056 | 0.130 | 0.664 | 0.524 | 4950 |

Assumption 4 allows no pair below 0; sampled, their share is {conflict}. GRPO has the better bound where
C(T) < 1: from the start to T it is so {"for no T measured" if since is None else f"for every T from {since} on"}. σ of
few completions is too low (0.464 for 0.5 at 8), and so is C. Features: mean size of the cosines of prompts' hidden
states, raw and centred; 0.088 in the paper (section 4.1).

### Curvature and reward variance over prompts (Table 1)
{markdown(found["correlations"])}
| paper, same iteration | 0.342 | |
| paper, different iterations | -0.028 | |

### |curvature| ∝ σ^α: 2 at a point (Lemma 3.1), 1 over a step (Lemma 3.3)
{markdown(found["exponents"])}

A dash: an interval wider than 4, or fewer than two σ with ten curvatures each (groups of 8 have one a side of ½).
"""


# ------------------------------------------------------ Picture -------------------------------------------------------


def draw(path: Path, title: str, found: dict[str, Any], lines: dict, points: dict) -> None:
    """phases.png: series over steps and pairs in bins, with 95% intervals, in Okabe and Ito's colours for all eyes."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    axes, phases = figure.subplots(2, 3).flat, found["phases"]
    for axis, (name, parts) in zip(axes, (lines | points).items(), strict=True):
        axis.set_prop_cycle(color=["#D55E00", "#0072B2", "#009E73", "#CC79A7"], linestyle=["-", "--", "-.", ":"])
        axis.set(title=name, xlabel="step" * (name in lines), ymargin=0.1)
        for label in parts.columns.unique(0) if name in lines else parts:
            part = parts[label]
            if name in lines:
                rows = bands(windows(part).T.items())
            else:
                part = part.dropna()
                bins = part.groupby(bins_of(part.iloc[:, 0]))
                rows = bands((x_y.iloc[:, 0].mean(), x_y.iloc[:, 1]) for _, x_y in bins)
            if len(rows):
                (line,) = axis.plot(rows["mean"], label=label, marker="o" if name in points else "")
                axis.fill_between(rows.index, rows["low"], rows["high"], color=line.get_color(), alpha=0.2, linewidth=0)
    if phases["line"]:
        axes[1].plot(*np.transpose(phases["line"]), color="black", linestyle="-", label="fitted line")
    axes[2].axhline(0.375, color="black", linestyle=":", label="C = 1")
    edges = [0, *phases["boundaries"], found["last_step"]] if phases["found"] else []
    for axis, (name, a, b) in itertools.product(axes[:4], zip(("I", "II", "III"), edges, edges[1:], strict=False)):
        axis.axvspan(a, b, color="grey", alpha=0.2 * (name == "II"), linewidth=0)
        axis.text((a + b) / 2, 0.98, name, transform=axis.get_xaxis_transform(), ha="center", va="top", family="serif")
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        axis.locator_params(axis="x", nbins=6)
        axis.legend(handles, labels, title="" if handles else "not measured", fontsize=8)
    figure.suptitle(textwrap.fill(title, 110).replace("$", r"\$"), fontsize=11)
    figure.savefig(path, dpi=120)


# ---------------------------------------------------- Command line ----------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    about = "Phases, norms, geometry and theory in the logs of grpo.py."
    parser = argparse.ArgumentParser("analyze.py", argparse.SUPPRESS, about, allow_abbrev=False)  # errors in one line
    parser.add_argument("runs", nargs="+", type=Path, help="run directories of grpo.py")
    parser.add_argument("--target", type=float, help="pass rate to reach; else 0.9 of the lowest final one")
    parser.add_argument("--out", type=Path, help="directory of report and picture")
    given = parser.parse_args(arguments)
    runs, problems = [], []
    for path in {path.resolve(): path for path in given.runs if not path.is_file()}.values():
        try:
            runs.append(read_run(path))
        except ValueError as error:
            problems.append(str(error))
    if not runs:
        parser.error(f"no run to read: {'; '.join(problems) or 'no directory'}")

    table, groups = tabulate(runs), dict[str, dict[str, Any]]()
    again = table.duplicated(["title", "norm", "lr", "seed"])
    problems += [f"{run.path}: its norm, rate and seed are there already" for run in table[again]["run"]]
    report, pictures = "# Three phases?\n", []
    for title, rows in table[~again].groupby("title", sort=False):
        groups[title] = {}
        report += f"\n# Runs with {title}\n"
        for name, chosen in arrange(rows).items():
            found, lines, points = compare(chosen, given.target)
            groups[title][name] = found
            report += describe(name, found)
            pictures.append((f"{title}, {name}. {found['phases']['reason']}", found, lines, points))
    report += "".join(f"\n{run.path}: {run.skipped} unreadable log lines skipped\n" for run in runs if run.skipped)
    report += "".join(f"\nleft out: {problem}\n" for problem in problems)

    parents = os.path.commonpath([run.path.absolute() for run in runs])
    out = given.out or (runs[0].path if len(runs) == 1 else Path(os.path.relpath(parents)))
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "analysis.md").write_text(report, encoding="utf-8", errors="backslashreplace")
        analysis = pd.Series({"groups": groups, "left_out": problems})
        analysis.to_json(out / "analysis.json", indent=1, double_precision=15)  # NaN becomes null
        draw(out / "phases.png", *pictures[0])
    except OSError as error:
        parser.error(f"cannot write to {out}: {error.strerror}")
    with contextlib.suppress(BrokenPipeError):
        print(f"{report}\nwritten: analysis.md, analysis.json and phases.png in {out}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
