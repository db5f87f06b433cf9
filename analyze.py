"""Does training show the paper's three phases, and do its reasons hold? Read from grpo.py's logs.

    python analyze.py runs/*-std-* runs/*-none-*    # three seeds or more: phases, tables, theory
    python analyze.py runs/letters-std-0            # one run: its tables, and no verdict

The report goes to the terminal and to analysis.md, its numbers go to analysis.json, and a picture
of the first comparison to phases.png: in the run's directory (of several runs, the directory that
holds them), or in --out.

The paper (Ge et al., arXiv 2601.23135) compares advantages that are divided by the standard
deviation (std) with those that are not (none), and sees three phases in the gap between their pass
rates: in I there is none, in II it opens, in III it no longer widens. Its reasons: first the
rewards' deviation leaves its maximum, then the prompts' gradients lose their orthogonality. "Not
found" is a result.
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

# ----------------------------------------- Reading logs -------------------------------------------

METRICS = ["pass_rate", "reward", "reward_std", "eval_pass_rate", "eval_reward", "feature_cos"]
METRICS += ["feature_cos_centered", "n_gradients", "cos_mean", "cos_std", "cos_positive"]
METRICS += ["cos_small", "interference", "signal_share"]
PROMPTS = ["reward_std", "grad_norm", "grad_sq_signal"]
HALVES = ["pass_rate_half", "reward_std_half", "fisher_half", "curvature"]
# Compared runs may differ in these: settings that are compared, or that do not change training.
FREE = {"norm", "seed", "lr", "out", "resume", "steps", "device", "micro_batch", "save_every"}
FREE |= {"eval_every", "geometry_every", "probe_every"}


@dataclass
class Run:
    """One run's settings and logs; NaN where something was not measured."""

    path: Path
    config: dict[str, Any]
    skipped: int  # lines that could not be read
    end: int  # the last step of training
    # A row a step: METRICS, C = (8/3) sigma, rate and held_out (mean rewards, so of rewards 0 and 1
    # pass rates).
    log: pd.DataFrame
    # A row a prompt and step: PROMPTS.
    prompts: pd.DataFrame
    # A row a half of a group: step, HALVES, own_variance, variance (of the other half's rewards,
    # unbiased).
    halves: pd.DataFrame


def number(value: Any) -> float:
    """A JSON value as a float; NaN for what is no number, or none whose square would be finite."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e100 else math.nan


def read_table(path: Path, keys: list[str], pairs: Sequence[str] = ()) -> tuple[pd.DataFrame, int]:
    """The lines of a log that have a step, each of `pairs` in two columns, and how many other lines
    there are (torn ones, say)."""
    rows, skipped = [], 0
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < 2**53:
            parts = [
                x if isinstance(x, list) and len(x) == 2 else [None] * 2
                for x in map(row.get, pairs)
            ]
            rows.append([row["step"], *map(number, itertools.chain(map(row.get, keys), *parts))])
        else:
            skipped += 1
    columns = ["step", *keys, *(f"{key}{half}" for key in pairs for half in "AB")]
    return pd.DataFrame(rows, columns=columns, dtype=float).astype({"step": int}), skipped


def read_run(path: Path) -> Run:
    """Read a run's directory. Raises ValueError where it has no readable settings or no step."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        log, skipped = read_table(path / "metrics.jsonl", METRICS)
        prompts, more = read_table(path / "prompts.jsonl", PROMPTS, HALVES)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    config = config if isinstance(config, dict) else {}
    sizes = [config.get(name) for name in ("prompts", "group", "seed")]
    valid = all(type(value) is int and 0 <= value < 2**31 for value in sizes) and 0 not in sizes[:2]
    if not valid or not isinstance(config.get("norm"), str):
        raise ValueError(f"{path}: config.json does not name norm, seed, prompts and group")
    if config.get("dtype") == "auto":  # earlier runs stored what it meant
        config["dtype"] = "bfloat16" if "cuda" in str(config.get("device")) else "float32"
    trained = log.loc[log["reward_std"].notna(), "step"]
    if trained.empty:
        raise ValueError(f"{path}: metrics.jsonl has no step")
    log = log.drop_duplicates("step", keep="last").sort_values("step")
    # Where rewards are not 0 or 1 the mean reward counts: it is what was trained.
    log["rate"] = log["reward"].fillna(log["pass_rate"])
    log["held_out"] = log["eval_reward"].fillna(log["eval_pass_rate"])
    log["C"] = 8 / 3 * log["reward_std"]
    halves, group = [], config["group"]
    # C and the predicted gain are defined for rewards of 0 and 1.
    if not np.allclose(log["rate"], log["pass_rate"], equal_nan=True):
        log["C"] = prompts["reward_std"] = math.nan
    for one, other, size in (("A", "B", group // 2), ("B", "A", (group + 1) // 2)):
        half = prompts[["step", *(key + one for key in HALVES)]].set_axis(["step", *HALVES], axis=1)
        variance = prompts["reward_std_half" + other] ** 2 * size / max(1, size - 1)
        halves.append(half.assign(variance=variance, own_variance=half["reward_std_half"] ** 2))
    given = log, prompts, pd.concat(halves).dropna(subset="reward_std_half")
    tables = [table.assign(norm=config["norm"], seed=config["seed"]) for table in given]
    return Run(path, config, skipped + more, int(trained.max()), *tables)


# ------------------------------------------ Statistics --------------------------------------------


def mean_interval(values: Iterable[float]) -> list[float]:
    """Mean, and its 95% interval by Student's t: the interval is NaN for fewer than three values,
    and all is NaN if one value is.

    A bootstrap would not do: means of three to five resampled runs never leave the runs' range, and
    such intervals cover 75% to 94%.
    """
    given, half = pd.Series([*values], dtype=float), math.nan
    mean = float(given.mean(skipna=False))
    if len(given) > 2:
        half = float(stats.t.ppf(0.975, len(given) - 1) * given.sem(skipna=False))
    return [mean, mean - half, mean + half]


def windows(table: pd.DataFrame) -> pd.DataFrame:
    """Means of what is not NaN in min(60, n) windows of equal length, by their first index: [n,
    runs] -> [60, runs]."""
    window = np.arange(len(table)) * min(60, len(table)) // max(1, len(table))
    first = np.unique(window, return_index=True)[1]
    return table.groupby(window).mean().set_axis(table.index[first])


def bins_of(x: pd.Series) -> pd.Series:
    """A label for every value: itself where there are eight or fewer, else one of up to eight bins
    of like size."""
    x = x.round(9)
    return x if x.nunique() <= 8 else np.ceil(8 * x.rank(pct=True))


def bands(groups: Iterable[tuple[float, Iterable[float]]]) -> pd.DataFrame:
    """Mean and interval of the values at every x."""
    rows = {x: mean_interval(values) for x, values in groups}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["mean", "low", "high"])
    return table.dropna(subset="mean")


def correlations(rows: pd.DataFrame) -> pd.Series:
    """Pearson's correlation of two columns in every group of the index that has three pairs and
    variation in both columns."""
    rows = rows.dropna().set_axis(["x", "y"], axis=1).round({"x": 9})  # rounding is no variation
    return rows.groupby(rows.index.names).corr(min_periods=3)["y"].iloc[::2].dropna()


# -------------------------------------------- Phases ----------------------------------------------


@functools.lru_cache(maxsize=8)
def broken_lines(x: tuple[float, ...], count: int) -> tuple[np.ndarray, np.ndarray]:
    """All continuous lines with `count` knots at positions x [n]: their knots [lines, count],
    indices of x, and orthonormal bases [lines, n, 2 + count] of the functions that bend there."""
    n, tenth = len(x), math.ceil(len(x) / 10)
    sets = itertools.combinations(range(tenth, n - tenth + 1), count)
    apart = [s for s in sets if all(b - a >= m for a, b, m in zip(s, s[1:], (tenth, 3)))]
    knots = np.array(apart, int)
    t = (np.array(x) - x[0]) / (x[-1] - x[0])
    hinges = np.maximum(t - t[:, None], 0)[knots].swapaxes(1, 2)  # [lines, n, count]
    straight = np.broadcast_to(np.stack([np.ones(n), t], axis=1), (len(knots), n, 2))
    return knots, np.linalg.qr(np.concatenate([straight, hinges], axis=2))[0]


def best_lines(
    x: tuple[float, ...], y: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least-squares lines with `count` knots, shared by the d series of every draw: [n, draws, d]
    -> knots [draws, count], basis of the first draw's line [n, 2 + count], sum of squares left
    [draws]."""
    knots, bases = broken_lines(x, count)
    weights = bases.swapaxes(1, 2) @ y.reshape(len(y), -1)  # [lines, 2 + count, draws * d]
    explained = np.square(weights).sum(axis=1).reshape(len(bases), *y.shape[1:]).sum(axis=2)
    best, total = explained.argmax(axis=0), np.square(y).sum(axis=(0, 2))
    left = np.maximum(total - explained.max(axis=0), 1e-12 * total + 1e-300)
    return knots[best], bases[best[0]], left


def detect_phases(
    gap: ArrayLike | None, reward_std: ArrayLike, cos_std: ArrayLike, steps: ArrayLike | None = None
) -> dict[str, Any]:
    """Whether the gap between two norms has the three phases of arXiv 2601.23135: there is none, it
    opens, it no longer widens.

    gap: pass rate less that without normalization, [runs, n], a row for each pair of runs with one
    seed ([n]: one pair; None: no run is without). reward_std: mean standard deviation within
    prompts; cos_std: standard deviation of the cosines of prompt gradients; both of the normalized
    runs, shaped like gap. NaN: not measured. steps: [n], rising, by default 0, 1, 2, ... Raises
    ValueError for unequal shapes.

    BIC chooses the number of `knots`, 0 to 3, of a continuous broken line through the runs' mean in
    60 windows. `boundaries`: the first two knots of the better of the lines with 2 and 3, where II
    and III begin, whether BIC supports them or not ([]: too few windows). `intervals`: theirs over
    resampled runs. `line`: its corners. `claims`: by name the value, its 95% interval over runs
    (Student's t), and whether the claim holds (None for fewer than three runs). `found`: there are
    two knots or more, and the claims on the gap hold; `reason` says it in words. Without a gap the
    line is fitted to the other two series.
    """
    series = [reward_std, cos_std] if gap is None else [reward_std, cos_std, gap]
    given = [np.atleast_2d(np.asarray(values, float)).T for values in series]
    index = np.arange(len(given[0])) if steps is None else np.asarray(steps)
    if len({values.shape for values in given}) > 1:
        raise ValueError("series of unequal shapes")
    sigma, spread, *gaps = (windows(pd.DataFrame(values, index)).dropna() for values in given)
    at = gaps[0].index if gaps else sigma.index.intersection(spread.index)
    result: dict[str, Any] = {"found": False, "knots": 0, "claims": {}}
    result |= {"boundaries": [], "intervals": [], "line": []}
    if len(at) < 30:
        return result | {"reason": f"Undecided: {len(at)} windows of what is fitted, 30 are needed"}
    y = np.stack([table.loc[at] for table in gaps or [sigma, spread]], axis=2)  # [windows, runs, d]
    if not gaps:  # of two units
        y = (y - y.mean(axis=(0, 1))) / np.maximum(y.mean(axis=1).std(axis=0), 1e-12)
    x, runs = tuple(map(float, at)), y.shape[1]

    # The data first, then resampled runs. Noise that lasts over several windows looks like bends:
    # so BIC counts fewer windows than there are.
    rows = np.random.default_rng(0).integers(runs, size=(201 if runs > 2 else 1, runs))
    rows[0] = np.arange(runs)
    drawn = y[:, rows].mean(axis=2)  # [windows, draws, d]
    knots, bases, left = zip(*(best_lines(x, drawn, count) for count in range(4)), strict=True)
    noise = drawn[:, 0] - bases[3] @ (bases[3].T @ drawn[:, 0])
    rho = np.clip((noise[1:] * noise[:-1]).sum() / max(np.square(noise).sum(), 1e-300), 0, 0.9)
    size, d = noise.size * (1 - rho) / (1 + rho), y.shape[2]
    penalties = math.log(size) * (d * (2 + np.arange(4)) + np.arange(4))[:, None]
    scores = size * np.log(np.stack(left)) + penalties  # [4, draws]
    three = scores[3] < scores[2]
    chosen = np.where(three[:, None], knots[3][:, :2], knots[2])  # [draws, 2]
    (first, second), bounds = chosen[0], at.to_numpy()[chosen]
    result |= {"knots": int(scores[:, 0].argmin()), "boundaries": bounds[0].tolist()}
    if runs > 2:
        limits = np.quantile(bounds[1:], [0.025, 0.975], axis=0, method="nearest")
        result["intervals"] = limits.T.tolist()

    def claim(name: str, values: Any, above_0: list[Any], also: bool = True) -> None:
        value, *interval = mean_interval(values)
        holds = also and all(mean_interval(each)[1] > 0 for each in above_0)
        sure = (interval, holds) if math.isfinite(interval[0]) else (None, None)
        result["claims"][name] = {"value": value, "interval": sure[0], "holds": sure[1]}

    if gaps:
        basis, third = (bases[3], knots[3][0, 2]) if three[0] else (bases[2], len(x) - 1)
        fit, ends = basis @ (basis.T @ y[:, :, 0]), [0, first, second, third]  # [windows, runs]
        slopes = ((fit[b] - fit[a]) / (x[b] - x[a]) for a, b in itertools.pairwise(ends))
        one, two, last = slopes
        early, rise, lead = y[:first, :, 0].mean(axis=0), fit[second] - fit[first], fit[second]
        widens = any(mean_interval(fit[end] - lead)[1] > 0 for end in (third, -1))
        claim("alike_in_I", two - one, [two - one, lead / 2 - early, lead / 2 + early])
        claim("opens_in_II", rise, [rise, lead])
        claim("stops_in_III", last - two, [two - last], not widens)
        result["line"] = [[int(at[i]), float(fit[i].mean())] for i in sorted({*ends, len(x) - 1})]
    claims = result["claims"]
    failed = [name.replace("_", " ") for name in claims if not claims[name]["holds"]]
    for name, table, sign in (("deviation_falls", sigma, -1), ("orthogonality_falls", spread, 1)):
        change = table[table.index >= at[second]].mean() - table[table.index < at[first]].mean()
        claim(name, change, [sign * change])

    if not gaps:
        reason = (
            "Undecided: phases are those of a gap, and there is none: run --norm none with the "
        )
        reason += "same seeds"
    elif runs < 3:
        reason = "Undecided: no interval over seeds, run three seeds or more"
    elif result["knots"] < 2:
        bends = ("no bend", "one bend")[result["knots"]]
        reason = f"No three phases: the gap is best described by a line with {bends}"
    elif failed:
        reason = f"No three phases: of the claims on the gap not all hold: {', '.join(failed)}"
    else:
        result["found"], (opens, stops) = True, bounds[0]
        reason = (
            f"Three phases: alike to step {opens}, the gap opens to step {stops} and widens no "
        )
        reason += "longer"
        if claims["orthogonality_falls"]["holds"] is False:
            reason += (
                "; but the paper's reason for the third, that orthogonality falls, is not there"
            )
    return result | {"reason": reason}


# --------------------------------------------- Laws -----------------------------------------------


def predicted_gain(grad_squares: ArrayLike, reward_std: ArrayLike) -> float:
    """How much further steps of 1/sigma for each prompt ascend than one step size for all:
    sum(|g|^2/sigma) / sum(|g|^2) / 2, for orthogonal prompts and curvature proportional to sigma.

    grad_squares: [P] squared norms of prompt gradients, or estimates of them without noise;
    reward_std: [P] standard deviations within prompts, at most 1/2 for rewards of 0 and 1. Prompts
    with NaN or without variance are left out. At least 1 for true norms; NaN if the squares do not
    sum to more than 0.
    """
    squares, std = np.asarray(grad_squares, float), np.asarray(reward_std, float)
    present = np.isfinite(squares) & (std > 0)
    total = squares[present].sum()
    return float((squares[present] / std[present]).sum() / total / 2) if total > 0 else math.nan


def curvature_exponent(
    sigma: ArrayLike, variance: ArrayLike, curvature: ArrayLike
) -> dict[str, Any]:
    """Exponent a of |curvature| ~ sigma^a, from signed curvatures averaged in bins of sigma:
    logarithms of single noisy values would be dominated by those near zero. All arguments are [m];
    NaN and sigma 0 are left out.

    sigma: of the half of a group that gave the direction, never of the half that gave the curvature
    (reward / parameter^2): that is proportional to its own half's variance, and the two would make
    a law out of nothing. variance: of the other half's rewards, unbiased, so that its mean in a bin
    is free of sigma's noise (exact for a = 2, some tenths off far from it). Returns `n` and `alpha`
    [value, low, high], 95%, by a weighted fit of c * x^a with c of either sign; NaN with fewer than
    two bins of ten, or an interval wider than 4.
    """
    given = [np.asarray(series, float) for series in (sigma, variance, curvature)]
    rows = pd.DataFrame(np.stack(given, axis=1)).dropna()
    rows = rows[rows[0] > 0]
    bins = rows.groupby(bins_of(rows[0])).agg(["mean", "sem", "size"])
    bins = bins[(bins[0, "size"] >= 10) & (bins[1, "mean"] > 0)]
    x, y, error = np.sqrt(bins[1, "mean"]), bins[2, "mean"], bins[2, "sem"]
    result = {"alpha": [math.nan] * 3, "n": len(rows)}
    no_fit = contextlib.suppress(RuntimeError, TypeError, ValueError)
    with no_fit, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings: Any = dict(p0=(y.mean(), 1), sigma=error, absolute_sigma=True)
        fit, covariance = optimize.curve_fit(lambda x, c, a: c * x**a, x, y, **settings)
        half = 1.96 * math.sqrt(covariance[1, 1])
        if half < 2:
            result["alpha"] = [float(fit[1]), float(fit[1] - half), float(fit[1] + half)]
    return result


# -------------------------------------- Comparison of runs ----------------------------------------


def tabulate(runs: list[Run]) -> pd.DataFrame:
    """A row a run. `title`: the settings that tell the runs it may be compared with from others."""
    configs = [run.config for run in runs]
    names = dict.fromkeys(name for config in configs for name in config if name not in FREE)
    differ = [x for x in names if any(config.get(x) != configs[0].get(x) for config in configs)]
    rows = []
    for run in runs:
        known = differ or ["task"] + ["model"] * bool(run.config.get("model"))
        title = ", ".join(f"{name} {run.config.get(name)!r}" for name in known)
        identity = [run.config["norm"], str(run.config.get("lr")), run.config["seed"]]
        rows.append([title, *identity, run.end, run.log["rate"].mean(), run])
    return pd.DataFrame(rows, columns=["title", "norm", "lr", "seed", "end", "rate", "run"])


def arrange(table: pd.DataFrame) -> dict[str, list[Run]]:
    """Comparisons among rows of `tabulate`: for every learning rate, std's best one first, all
    norms at it; then each norm at its best rate: that whose runs went furthest (a rate with a run
    that did not finish is not the best), and among those the one with the highest mean pass rate.
    """
    merit = table.groupby(["norm", "lr"]).agg({"end": "min", "rate": "mean"})
    best = dict(merit.sort_values(["end", "rate"]).index)  # of a norm's rates the last
    found = {}
    for lr in sorted(set(table["lr"]), key=lambda lr: (lr != best.get("std"), lr)):
        rows = table[table["lr"] == lr]
        if len(best) == 1 or rows["norm"].nunique() > 1:
            found[f"learning rate {lr}"] = [*rows["run"]]
    if len(set(best.values())) > 1:
        title = f"each norm at its best learning rate, {', '.join(map(' '.join, best.items()))}"
        found[title] = [*table.loc[table["lr"] == table["norm"].map(best), "run"]]
    return found


def reach(rates: pd.Series, level: float) -> float:
    """Step at which a pass rate, averaged over a thirtieth of the steps, comes to a level; NaN if
    it never does, or is there from the beginning."""
    means = rates.dropna().rolling(max(1, len(rates) // 30), center=True).mean().dropna()
    steps = means.index[means >= level]
    return math.nan if steps.empty or steps[0] == means.index[0] else float(steps[0])


def foresee(run: Run, stop: float) -> list[float]:
    """predicted_gain from a run without normalization up to a step: from its gradients with the
    noise removed, and as sampled."""
    rows = run.prompts[run.prompts["step"] <= stop].dropna(subset=["grad_norm", "grad_sq_signal"])
    sampled, signal = rows["grad_norm"] ** 2, rows["grad_sq_signal"]
    total = sampled.groupby(rows["step"]).transform("sum")  # every step counts the same
    return [predicted_gain(part / total, rows["reward_std"]) for part in (signal, sampled)]


def corrected_cosine(log: pd.DataFrame, prompts: int) -> float:
    """Cosine of two prompts' gradients without sampling noise, a ratio of means. NaN where the mean
    signal share is within two standard errors of 0."""
    share = log["signal_share"]
    mean = share.mean() if share.mean() > 2 * share.sem() else math.nan
    return (log["interference"].mean() - 1) / max(1, prompts - 1) / mean


def describe_phase(log: pd.DataFrame, prompts: int) -> dict[str, Any]:
    """A row of Table 3, the cosines of all pairs of prompt gradients of some steps together; and C,
    over runs."""
    rows = log.dropna(subset=["n_gradients", "cos_mean", "cos_std"])
    pairs = rows["n_gradients"] * (rows["n_gradients"] - 1) / 2
    squares = rows["cos_std"] ** 2 + rows["cos_mean"] ** 2
    rows = rows[["cos_mean", "cos_positive", "cos_small"]].assign(square=squares)
    mean, positive, small, square = rows.mul(pairs, axis=0).sum(min_count=1) / max(1, pairs.sum())
    row = {"mean": mean, "std": (square - mean**2) ** 0.5, "above 0": positive}
    row |= {"below 0.1 in size": small, "pairs": int(pairs.sum())}
    row |= {"signal share": log["signal_share"].mean(), "corrected": corrected_cosine(log, prompts)}
    row |= {"C": mean_interval(log.groupby("seed")["C"].mean())}
    row |= {"features": log["feature_cos"].mean(), "centred": log["feature_cos_centered"].mean()}
    return row


def compare(
    runs: list[Run], target: float | None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Of runs, as far as the shortest goes: the report's numbers (tables are row to column to
    value, intervals [mean, low, high]), and for the picture series [steps, (label, seed)] and pairs
    [m, 2]."""
    last = min(run.end for run in runs)
    log, halves = (pd.concat([getattr(run, name) for run in runs]) for name in ("log", "halves"))
    held_out = log[log["step"] <= last + 1].groupby(["norm", "seed"])["held_out"].last()
    log, halves = (table[table["step"] <= last] for table in (log, halves))
    norms = sorted({*log["norm"]}, key=lambda norm: (norm == "none", norm != "std", norm))
    main = norms[0]  # the phases are those of this norm
    values = ["rate", "reward_std", "cos_mean", "cos_std"]
    wide = log.pivot(index="step", columns=["norm", "seed"], values=values)
    wide = wide.reindex(columns=norms, level="norm")
    rates, plain = wide["rate"], wide["rate"].get("none", pd.DataFrame())
    gaps = rates.sub(plain, level="seed").drop(columns="none", errors="ignore")
    gaps = gaps.dropna(axis=1, how="all")
    gap, seeds = (gaps[main].T, gaps[main].columns) if main in gaps else (None, rates[main].columns)
    sigma, spread = (wide[name, main][seeds].T for name in ("reward_std", "cos_std"))
    phases = detect_phases(gap, sigma, spread, wide.index)

    # The norms: pass rates, steps to a goal, and for pairs of runs the gap, the speed-up and its
    # prediction.
    ends = rates.apply(lambda rate: rate.dropna().iloc[-max(1, rate.count() // 10) :].mean())
    goal = 0.9 * ends.groupby("norm").mean().min() if target is None else target
    reached, table = rates.apply(reach, level=goal), {}
    for norm in norms:
        row: dict[str, Any] = {"runs": len(ends[norm]), "end": mean_interval(ends[norm])}
        row["held out"] = mean_interval(held_out[norm])
        row[f"steps to {goal:.2f}"] = mean_interval(reached[norm])
        if norm in gaps:
            means = windows(gaps[norm])
            row["at step"] = widest = int(means.mean(axis=1).idxmax())
            row["largest gap"] = mean_interval(means.loc[widest])
            ratios = np.log(reached["none"] / reached[norm])[means.columns]
            row["speed-up"] = np.exp(mean_interval(ratios)).tolist()
        if norm == "std" and norm in gaps:  # the prediction speaks of steps 1/sigma
            others = {run.config["seed"]: run for run in runs if run.config["norm"] == "none"}
            gains = [foresee(others[seed], reached["none", seed]) for seed in seeds]
            row["predicted"], row["with noise"] = map(mean_interval, zip(*gains, strict=True))
        table[norm] = row

    # The phases: cosines, features, C(T).
    mine, size = log[log["norm"] == main], runs[0].config["prompts"]
    edges = [0, *phases["boundaries"], last + 1]
    labels = ["I", "II", "III"] if edges[2:] else ["all steps"]
    phase = pd.cut(mine["step"], edges, right=False, labels=labels)
    rows = {name: describe_phase(part, size) for name, part in mine.groupby(phase, observed=True)}
    split = mine.groupby([phase, "seed"], observed=True)
    angles = {key: abs(corrected_cosine(part, size)) for key, part in split}
    first, third = ([angles.get((x, s), math.nan) for s in rates[main]] for x in ("I", "III"))
    change = mean_interval(np.subtract(third, first))
    running = mine.groupby("step")["C"].mean().expanding().mean()
    below = running.index[running[::-1].cummax()[::-1] < 1]

    # Over prompts, of all norms: correlations and exponents.
    halves = halves.set_index(["norm", "seed", "step"])
    sides = {f"pass rate {sign} ½": halves.query(f"pass_rate_half {sign} 0.5") for sign in "<>"}
    fisher = {"same completions": halves[["own_variance", "fisher_half"]]}
    fisher["across halves"] = halves[["variance", "fisher_half"]]
    curvature = {side: part[["reward_std_half", "curvature"]] for side, part in sides.items()}
    points = {"Fisher against reward variance": fisher, "curvature against σ": curvature}
    pairs: dict[str, Any] = {}
    for name, parts in points.items():
        for label, part in parts.items():
            found = correlations(part)
            interval = mean_interval(found.groupby("seed").mean())
            pairs[f"{name}, {label}"] = {"r": interval, "steps": len(found)}
    laws, length = {}, last // 3 + 1
    for side, part in sides.items():
        for start, cut in part.groupby(part.index.get_level_values("step") // length * length):
            law = curvature_exponent(cut["reward_std_half"], cut["variance"], cut["curvature"])
            laws[f"{side}, from step {start}"] = law

    numbers = {"norm": main, "last_step": last, "phases": phases, "norms": table, "cosines": rows}
    numbers |= {"exponents": laws, "corrected_change": change, "correlations": pairs}
    numbers["C_below_1_since"] = int(below[0]) if len(below) else None
    lines = {"pass rate (training prompts)": rates, "gap in pass rate to none": gaps}
    lines["mean σ within prompts"] = wide["reward_std"]
    cosines = wide.xs(main, axis=1, level="norm")
    lines["cosines of prompt gradients"] = cosines[["cos_std", "cos_mean"]]
    return numbers, lines, points


# -------------------------------------------- Report ----------------------------------------------


def show(value: Any) -> str:
    """A figure, a mean with its interval if it has one, or nothing."""
    if isinstance(value, list):
        mean, low, high = map(show, value)
        return f"{mean} [{low}, {high}]" if math.isfinite(value[1]) else mean
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
        split = f"Norm {found['norm']}: II from step {starts[0]}, III from {starts[1]} "
        split += "(95% over resampled runs)"
    claims, words = "", {True: "holds", False: "does not hold", None: "not decided"}
    for name, claim in phases["claims"].items():
        value = show([claim["value"], *(claim["interval"] or [math.nan] * 2)])
        claims += f"| {name.replace('_', ' ')} | {value} | {words[claim['holds']]} |\n"
    spread = phases["claims"].get("orthogonality_falls", {}).get("holds")
    signs = {(True, False): ", so noise may be all"}
    signs[False, True] = ", so noise hides that orthogonality falls"
    agree = signs.get((spread, change[1] > 0), "")
    below = [f"{show(1 - row['above 0'])} in {name}" for name, row in found["cosines"].items()]
    better = "for no T measured" if since is None else f"for every T from {since} on"
    return f"""
## {title}, up to step {found["last_step"]}

**{phases["reason"]}.**

{split}{"" if phases["found"] else ", and it is not supported" * bool(starts)}.

| claim | value | |
| --- | --- | --- |
{claims}
In order: slope of the gap in II less that in I (pass rate a step), its rise in II, its slope in III
less that in II; changes from I to III of mean σ and of the cosines' deviation, which noise widens
too: without it the cosine changes in size by {show(change)}{agree}.

### Norms
{markdown(found["norms"])}

Steps and speed-up: where every run begins below the goal and reaches it. The largest gap is picked
among 60 windows and a little too large. `with noise`: the prediction from gradients as sampled.

### Cosines of pairs of prompt gradients (Table 3), and C(T) = (8/3) · mean σ
{markdown(found["cosines"])}
| paper, step 0 | 0.000 | 0.045 | 0.505 | 0.977 | 4950 |
| paper, step 260 | 0.039 | 0.066 | 0.727 | 0.803 | 4950 |
| paper, step 500 | 0.056 | 0.130 | 0.664 | 0.524 | 4950 |

Assumption 4 allows no pair below 0; sampled, their share is {", ".join(below)}. GRPO has the better
bound where C(T) < 1: from the start to T it is so {better}. σ of few completions is too low (0.464
for 0.5 at 8), and so is C. Features: mean size of the cosines of prompts' hidden states, raw and
centred; 0.088 in the paper (section 4.1).

### Curvature and reward variance over prompts (Table 1)
{markdown(found["correlations"])}
| paper, same iteration | 0.342 | |
| paper, different iterations | -0.028 | |

### |curvature| ∝ σ^α: 2 at a point (Lemma 3.1), 1 over a step (Lemma 3.3)
{markdown(found["exponents"])}

A dash: an interval wider than 4, or fewer than two σ with ten curvatures each (groups of 8 have one
a side of ½).
"""


# -------------------------------------------- Picture ---------------------------------------------


def draw(path: Path, title: str, found: dict[str, Any], lines: dict, points: dict) -> None:
    """phases.png: series over steps and pairs in bins, with 95% intervals, in Okabe and Ito's
    colours, which everybody can tell apart."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    axes, phases = figure.subplots(2, 3).flat, found["phases"]
    colors, styles = ["#D55E00", "#0072B2", "#009E73", "#CC79A7"], ["-", "--", "-.", ":"]
    for axis, (name, parts) in zip(axes, (lines | points).items(), strict=True):
        axis.set_prop_cycle(color=colors, linestyle=styles)
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
                faint = dict(color=line.get_color(), alpha=0.2, linewidth=0)
                axis.fill_between(rows.index, rows["low"], rows["high"], **faint)
    if phases["line"]:
        corners = np.transpose(phases["line"])
        axes[1].plot(*corners, color="black", linestyle="-", label="fitted line")
    axes[2].axhline(0.375, color="black", linestyle=":", label="C = 1")
    edges = [0, *phases["boundaries"], found["last_step"]] if phases["found"] else []
    spans = [*zip(("I", "II", "III"), edges, edges[1:])]
    for axis, (name, a, b) in itertools.product(axes[:4], spans):
        axis.axvspan(a, b, color="grey", alpha=0.2 * (name == "II"), linewidth=0)
        place = dict(transform=axis.get_xaxis_transform(), ha="center", va="top")
        axis.text((a + b) / 2, 0.98, name, **place, family="serif")
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        axis.locator_params(axis="x", nbins=6)
        axis.legend(handles, labels, title="" if handles else "not measured", fontsize=8)
    figure.suptitle(textwrap.fill(title, 110).replace("$", r"\$"), fontsize=11)
    figure.savefig(path, dpi=120)


# ----------------------------------------- Command line -------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    about = "Phases, norms, geometry and theory in the logs of grpo.py."
    # Without a usage errors take one line.
    parser = argparse.ArgumentParser("analyze.py", argparse.SUPPRESS, about, allow_abbrev=False)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="run directories of grpo.py")
    add("--target", type=float, help="pass rate to reach; else 0.9 of the lowest final one")
    add("--out", type=Path, help="directory of report and picture")
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
    there = "its norm, rate and seed are there already"
    problems += [f"{run.path}: {there}" for run in table[again]["run"]]
    report, pictures = "# Three phases?\n", []
    for title, rows in table[~again].groupby("title", sort=False):
        groups[title] = {}
        report += f"\n# Runs with {title}\n"
        for name, chosen in arrange(rows).items():
            found, lines, points = compare(chosen, given.target)
            groups[title][name] = found
            report += describe(name, found)
            pictures.append((f"{title}, {name}. {found['phases']['reason']}", found, lines, points))
    for run in (run for run in runs if run.skipped):
        report += f"\n{run.path}: {run.skipped} unreadable log lines skipped\n"
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
