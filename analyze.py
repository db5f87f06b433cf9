"""What dividing by the standard deviation would do, and what it did, from grpo.py's logs.

    python analyze.py runs/letters-none-0           # one run: what each norm would teach, and whom
    python analyze.py runs/*-std-* runs/*-none-*    # pairs, three seeds or more: what it did, too

The terminal shows what one wants to know first. The whole report goes to analysis.md, its numbers
to analysis.json, and a picture of the first comparison to phases.png: in the run's directory (of
several runs, the directory that holds them), or in --out.

Advantages are divided by the rewards' standard deviation (std), their variance (var) or nothing
(none). The paper (Ge et al., arXiv 2601.23135) sees three phases in the gap between std and none: I
there is none, II it opens, III it no longer widens; as reasons that the deviation leaves its
maximum, then that gradients grow less orthogonal. A mere speed-up may look the same, so the gap is
also split into a common speed-up and a reallocation between problems.
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
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from scipy import ndimage, optimize, stats

# ----------------------------------------- Reading logs -------------------------------------------

# Of prompts: all, of one level, of two.
PAIRS = {"": "all pairs", "_within": "of one level", "_between": "of two levels"}
METRICS = ["pass_rate", "reward", "reward_std", "eval_pass_rate", "eval_reward", "feature_cos"]
METRICS += ["feature_cos_centered", "n_gradients", "cos_mean", "cos_std", "cos_positive"]
METRICS += ["cos_small", "interference", "signal_share"]
NORMS = ["none", "std", "var"]  # whose progress is logged
LENGTHS = [f"length_{kind}" for kind in (*NORMS, "batch", "taken")]
SIGNALS = [f"{value}{pairs}" for pairs in PAIRS for value in ("cos_signal", "cos_sq_signal")]
PROMPTS = ["pass_rate", "reward_std", "grad_sq_signal"]
HALVES = ["pass_rate_half", "reward_std_half", "fisher_half", "curvature"]
HALVES += [f"progress_{norm}" for norm in NORMS]
TABLES = ["log", "prompts", "halves"]  # of a Run
FIRST = 10  # the first step whose progress counts: before, Adam's moments are young
# Compared runs may differ in these: settings that are compared, or that do not change training.
FREE = {"norm", "seed", "lr", "out", "resume", "steps", "device", "micro_batch", "save_every"}
FREE |= {"eval_every", "measure_every", "curvature"}
FREE |= {"geometry_every", "probe_every"}  # in logs of earlier versions
# Okabe and Ito's, which everybody can tell apart.
COLORS = {"std": "#D55E00", "none": "#0072B2", "var": "#E69F00", "batch": "#56B4E9"}
COLORS |= {"hardest": "#CC79A7", "middle": "#009E73", "easiest": "#777777"}


@dataclass
class Run:
    """One run's settings and logs; NaN where something was not measured."""

    path: Path
    config: dict[str, Any]
    skipped: int  # lines that could not be read
    end: int  # the last step of training
    # One row per step: METRICS, C = (8/3) sigma, rate and held_out (mean rewards, so pass rates if
    # rewards are 0 or 1).
    log: pd.DataFrame
    # One row per prompt and step: PROMPTS, level (a text, or None).
    prompts: pd.DataFrame
    # One row per half of a group: step, level, HALVES, its rewards' unbiased variance and third
    # central moment; with `_other`, the other half's variance, third moment, pass rate and Fisher.
    halves: pd.DataFrame


def number(value: Any) -> float:
    """A JSON value as a float; NaN for what is no number, or none whose square would be finite."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e100 else math.nan


def read_table(path: Path, keys: list[str], pairs: Sequence[str] = ()) -> tuple[pd.DataFrame, int]:
    """The lines of a log that have a step, each of `pairs` in two columns, and how many other lines
    there are (torn ones, say)."""
    rows = []
    skipped = 0
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < 2**53:
            level = None if row.get("level") is None else str(row["level"])
            values = [row.get(key) for key in keys]
            for pair in (row.get(key) for key in pairs):
                values += pair if isinstance(pair, list) and len(pair) == 2 else [None, None]
            rows.append([row["step"], level, *map(number, values)])
        else:
            skipped += 1
    columns = ["step", "level", *keys, *(f"{key}{half}" for key in pairs for half in "AB")]
    types = dict.fromkeys(columns[2:], float) | {"step": int}
    return pd.DataFrame(rows, columns=columns).astype(types), skipped


def read_run(path: Path) -> Run:
    """Read a run's directory. Raises ValueError where it has no readable settings or no step."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        log, skipped = read_table(path / "metrics.jsonl", METRICS + SIGNALS + LENGTHS)
        prompts, more = read_table(path / "prompts.jsonl", PROMPTS, HALVES)
    except (OSError, ValueError, RecursionError) as error:
        inside = " ".join(sorted(str(file.parent) for file in path.glob("*/config.json")))
        cause = f"no run, but a directory of runs: {inside}" if inside else error
        raise ValueError(f"{path}: {cause}") from error
    config = config if isinstance(config, dict) else {}
    sizes = [config.get(name) for name in ("prompts", "group", "seed")]
    valid = all(type(value) is int and 0 <= value < 2**31 for value in sizes) and 0 not in sizes[:2]
    if not valid or not isinstance(config.get("norm"), str):
        raise ValueError(f"{path}: config.json does not name norm, seed, prompts and group")
    trained = log.loc[log["reward_std"].notna(), "step"]
    if trained.empty:
        raise ValueError(f"{path}: metrics.jsonl has no step")
    log = log.drop_duplicates("step", keep="last").sort_values("step")
    # Where rewards are not 0 or 1 the mean reward counts: it is what was trained.
    log["rate"] = log["reward"].fillna(log["pass_rate"])
    log["held_out"] = log["eval_reward"].fillna(log["eval_pass_rate"])
    log["C"] = 8 / 3 * log["reward_std"]
    # C, gaps by level and moments are defined for rewards of 0 and 1.
    binary = np.allclose(log["rate"], log["pass_rate"], equal_nan=True)
    if not binary:
        log["C"] = prompts["reward_std"] = prompts["pass_rate"] = math.nan
    sides = []
    group = config["group"]
    for half, n in (("A", (group + 1) // 2), ("B", group // 2)):
        names = ["step", "level", *(key + half for key in HALVES)]
        side = prompts[names].set_axis(["step", "level", *HALVES], axis=1)
        side["variance"] = side["reward_std_half"] ** 2 * n / max(1, n - 1)
        third = side["variance"] * (1 - 2 * side["pass_rate_half"]) * n / max(1, n - 2)
        sides.append(side.assign(third=third if binary and n > 2 else math.nan))
    crossed = ["fisher_half", "variance", "third", "pass_rate_half"]
    halves = [a.join(b[crossed].add_suffix("_other")) for a, b in (sides, sides[::-1])]
    given = log, prompts, pd.concat(halves).dropna(subset="reward_std_half")
    tables = [table.assign(norm=config["norm"], seed=config["seed"]) for table in given]
    return Run(path, config, skipped + more, int(trained.max()), *tables)


# ------------------------------------------ Statistics --------------------------------------------


def mean_interval(values: Iterable[float]) -> list[float]:
    """Mean, and its 95% interval by Student's t: NaN for fewer than three values, all if one is.
    A bootstrap of three to five runs would never leave their range: it covers 75% to 94%."""
    given = pd.Series([*values], dtype=float)
    mean = float(given.mean(skipna=False))
    half = float(stats.t.ppf(0.975, max(1, len(given) - 1)) * given.sem(skipna=False))
    return [mean, mean - half, mean + half] if len(given) > 2 else [mean, math.nan, math.nan]


def windows(table: pd.DataFrame, count: int = 60) -> pd.DataFrame:
    """Means of what is not NaN in min(count, n) windows of equal length, by their first index: [n,
    runs] -> [count, runs]."""
    window = np.arange(len(table)) * min(count, len(table)) // max(1, len(table))
    first = np.unique(window, return_index=True)[1]
    return table.groupby(window).mean().set_axis(table.index[first])


def bands(groups: Iterable[tuple[float, Iterable[float]]]) -> pd.DataFrame:
    """Mean and interval of the values at every x."""
    rows = {x: mean_interval(values) for x, values in groups}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["mean", "low", "high"])
    return table.dropna(subset="mean")


def correlations(rows: pd.DataFrame) -> pd.Series:
    """Pearson's correlation of two columns in every group of the index that has three pairs and
    variation in both columns."""
    rows = rows.dropna().set_axis(["x", "y"], axis=1).round({"x": 9})  # rounding is no variation
    groups = rows.groupby(rows.index.names)
    varied = (groups.max() > groups.min()).all(axis=1) & (groups.size() >= 3)
    rows = rows - groups.transform("mean")
    products = pd.DataFrame({"xy": rows.prod(axis=1), "xx": rows["x"] ** 2, "yy": rows["y"] ** 2})
    sums = products.groupby(rows.index.names).sum()[varied]
    return sums["xy"] / np.sqrt(sums["xx"] * sums["yy"])


# -------------------------------------------- Phases ----------------------------------------------


@functools.lru_cache(maxsize=8)
def broken_lines(x: tuple[float, ...], count: int) -> tuple[np.ndarray, np.ndarray]:
    """All continuous broken lines over positions x [n] with `count` knots, level up to the first
    knot, which may be the very start. Returns their knots [lines, count], as indices of x, and
    orthonormal bases [lines, n, 1 + count] of the functions that bend at those knots."""
    n = len(x)
    tenth = math.ceil(n / 10)
    sets = itertools.combinations([0, *range(tenth, n - tenth + 1)], count)
    apart = [s for s in sets if all(b - a >= m for a, b, m in zip(s, s[1:], (tenth, 3)))]
    knots = np.array(apart, int)
    t = (np.array(x) - x[0]) / (x[-1] - x[0])
    hinges = np.maximum(t - t[:, None], 0)[knots].swapaxes(1, 2)  # [lines, n, count]
    level = np.ones((len(knots), n, 1))
    return knots, np.linalg.qr(np.concatenate([level, hinges], axis=2))[0]


def best_lines(
    x: tuple[float, ...], y: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least-squares lines with `count` knots: y [n, draws] -> knots [draws, count], bases of the
    lines [draws, n, 1 + count], sums of squares left [draws]."""
    knots, bases = broken_lines(x, count)
    explained = np.square(bases.swapaxes(1, 2) @ y).sum(axis=1)  # [lines, draws]
    best = explained.argmax(axis=0)
    total = np.square(y).sum(axis=0)
    left = np.maximum(total - explained.max(axis=0), 1e-12 * total + 1e-300)
    return knots[best], bases[best], left


def detect_phases(
    gap: ArrayLike | None, reward_std: ArrayLike, cos_std: ArrayLike, steps: ArrayLike | None = None
) -> dict[str, Any]:
    """Whether the gap between two norms has the three phases of arXiv 2601.23135.

    gap: pass rate with normalization less that without, [runs, n], a row per pair of one seed ([n]:
    one pair; None: none). reward_std: mean deviation within prompts; cos_std: deviation of the
    cosines of prompt gradients; both of the normalized runs, shaped like gap. NaN: not measured.
    steps: [n], increasing, by default 0, 1, 2, ... Raises ValueError for unequal shapes.

    BIC chooses the number of `knots`, 0 to 3, of a continuous broken `line`, level up to its first
    knot, through the runs' mean in 60 windows. `boundaries`, where II and III begin: the first two
    knots of the better of the lines with 2 and 3; but if that with 3 gains another quarter after
    its second knot, its third, and its first one after the start. `intervals`: of resampled runs.
    `claims` (`describe` has their limits): effect, interval over runs, and verdict: "holds" if that
    lies within the limits, "reversed" if outside, "not seen", "not measured" (in fewer than three
    runs, or fewer than three times in I or III). `found`: those on the gap hold, and at most a
    third of the resamplings lack a phase I.
    """
    series = [reward_std, cos_std, [math.nan] if gap is None else gap]
    given = [np.atleast_2d(np.asarray(values, float)).T for values in series]
    index = np.arange(len(given[0])) if steps is None else np.asarray(steps)
    result: dict[str, Any] = {"found": False, "knots": 0, "claims": {}}
    result |= {"boundaries": [], "intervals": [], "line": []}
    if gap is None:
        return result | {"reason": "Undecided: a gap takes none and another norm, same seeds"}
    if len({values.shape for values in given}) > 1:
        raise ValueError("series of unequal shapes")
    sigma, spread, gaps = [windows(pd.DataFrame(values, index)).dropna() for values in given]
    if len(gaps) < 30:
        return result | {"reason": f"Undecided: {len(gaps)} windows with a gap, 30 are needed"}
    y = gaps.to_numpy()  # [windows, runs]
    at = gaps.index.to_numpy()
    x = tuple(map(float, at))
    runs = y.shape[1]

    # The data first, then resampled runs. Noise that lasts over several windows looks like bends:
    # so BIC counts fewer windows than there are.
    rows = np.random.default_rng(0).integers(runs, size=(201 if runs > 2 else 1, runs))
    rows[0] = np.arange(runs)
    # Few runs are often drawn alike: each different draw is fitted once.
    different, draw = np.unique(np.sort(rows, axis=1), axis=0, return_inverse=True)
    fits = [best_lines(x, y[:, different].mean(axis=2), count) for count in range(4)]
    knots, bases, left = zip(*([part[draw.ravel()] for part in fit] for fit in fits), strict=True)
    drawn = y[:, rows].mean(axis=2)  # [windows, draws]
    lines = (bases[3] @ (bases[3].swapaxes(1, 2) @ drawn.T[..., None]))[..., 0]  # [draws, windows]
    noise = drawn[:, 0] - lines[0]
    rho = np.clip((noise[1:] @ noise[:-1]) / max(noise @ noise, 1e-300), 0, 0.9)
    size = len(noise) * (1 - rho) / (1 + rho)
    scores = size * np.log(np.stack(left))  # [4, draws]
    scores += math.log(size) * (1 + 2 * np.arange(4))[:, None]
    three = scores[3] < scores[2]
    bends = np.where(three[:, None], knots[3][:, :2], knots[2])  # [draws, 2]
    start, then, last = np.take_along_axis(lines, knots[3], axis=1).T
    more = np.maximum(last, lines[:, -1]) - then > abs(then - start) / 4
    later = np.where(knots[3][:, :1] > 0, knots[3][:, ::2], knots[3][:, 1:])
    bends = np.where((three & more)[:, None], later, bends)
    first, second = bends[0]
    bounds = at[bends]
    result |= {"knots": int(scores[:, 0].argmin()), "boundaries": bounds[0].tolist()}
    if runs > 2:
        ends = np.quantile(bounds[1:], [0.025, 0.975], axis=0, method="nearest")
        result["intervals"] = ends.T.tolist()

    def claim(name: str, values: Any, above: float, below: float) -> None:
        effect, *interval = mean_interval(values)
        verdict = "not seen"
        if math.isnan(interval[0]):
            interval, verdict = [], "not measured"
        elif interval[0] > below or interval[1] < above:
            verdict = "reversed"
        elif above < interval[0] and interval[1] < below:
            verdict = "holds"
        result["claims"][name] = {"effect": effect, "interval": interval, "verdict": verdict}

    count = 3 if three[0] else 2
    basis = bases[count][0]
    corners = sorted({0, *knots[count][0], len(x) - 1})
    fit = basis @ (basis.T @ y)  # [windows, runs]
    rise = fit[second] - fit[first]
    after = fit[-1] - fit[second]
    gain = abs(rise.mean())
    claim("alike_in_I", gaps.iloc[:first].mean(), -gain / 4, gain / 4)
    claim("opens_in_II", rise, 0, math.inf)
    half = gain / (x[second] - x[first]) / 2
    claim("stops_in_III", after / (x[-1] - x[second]), -math.inf, half)
    result["line"] = [[int(at[i]), float(fit[i].mean())] for i in corners]
    claims = result["claims"]
    failed = [name.replace("_", " ") for name in claims if claims[name]["verdict"] != "holds"]
    for name, table, *limits in (
        ("deviation_falls", sigma, -math.inf, 0),
        ("orthogonality_falls", spread, 0, math.inf),
    ):
        before = table[table.index < at[first]]
        later = table[table.index >= at[second]]
        enough = min(len(before), len(later)) > 2
        claim(name, later.mean() - before.mean() if enough else [math.nan], *limits)

    if runs < 3:
        reason = "Undecided: no interval over seeds, run three seeds or more"
    elif (bends[:, 0] == 0).mean() > 1 / 3:
        reason = "No three phases: the gap may well open from the start"
    elif failed:
        reason = f"No three phases: these claims on the gap are not confirmed: {', '.join(failed)}"
    else:
        result["found"] = True
        reason = (
            "Three phases: alike on average to step {}, the gap opens until {}; it then widens "
        )
        reason = reason.format(*bounds[0]) + "at less than half that rate, if at all"
        if (verdict := claims["orthogonality_falls"]["verdict"]) != "holds":
            reason += f". The paper's reason, that gradients grow less orthogonal, is {verdict}"
    return result | {"reason": reason}


# --------------------------------------- Laws and progress ----------------------------------------


def signed_law(halves: pd.DataFrame) -> dict[str, float]:
    """Fit curvature against V(1 - 2p), with an intercept; V is the reward variance p(1 - p).

    V(1 - 2p) is estimated without bias by the third central moment of the rewards in the half that
    gave the direction; those of the other half, which gave the curvature, are tied to it. `slope`,
    their covariance over that of both halves' moments, is not flattened by noise; Pearson's `r` is.
    """
    third = halves["third"]
    true = third.cov(halves["third_other"])  # the moments' variance without noise
    slope = third.cov(halves["curvature"]) / true if true > 0 else math.nan
    return {"slope": slope, "r": third.corr(halves["curvature"])}


def signals(run: Run) -> pd.DataFrame:
    """Noise-free means of the inner product xy of two prompts' gradients, its square, (xx + yy) / 2
    and xx yy: a row per step with a gradient, columns (kind of PAIRS, moment). The log has ratios
    of the first two to the last two, which follow from the prompts' squared norms."""
    rows = run.prompts.dropna(subset="grad_sq_signal").fillna({"level": ""})
    rows = rows.assign(n=1.0, s=rows["grad_sq_signal"], q=rows["grad_sq_signal"] ** 2)
    of_levels = rows.groupby(["step", "level"])[["n", "s", "q"]].sum()
    log = run.log.set_index("step")

    def of_pairs(sums: pd.DataFrame) -> pd.DataFrame:
        n, s, q = (sums[name] for name in "nsq")
        return pd.DataFrame({"n": n * (n - 1), "half": (n - 1) * s, "both": s * s - q})

    every = of_pairs(of_levels.groupby("step").sum())
    within = of_pairs(of_levels).groupby("step").sum()
    tables = {}
    for pairs, table in zip(PAIRS, (every, within, every - within), strict=True):
        means = table[["half", "both"]].div(table["n"], axis=0)
        means["product"] = log[f"cos_signal{pairs}"] * means["half"]
        means["square"] = log[f"cos_sq_signal{pairs}"] * means["both"]
        tables[pairs] = means
    return pd.concat(tables, axis=1)


def noise_free(moments: pd.DataFrame) -> list[float]:
    """Ratios of means over rows of `signals` for one kind of pairs: the cosine; the mean square,
    (xy)^2 over xx yy; and the spread, the variance of xy over the mean of xx yy, which is not the
    variance of the cosines if norms differ. NaN if noise leaves no squared norm above 0."""
    half, both, product, square = moments.dropna(subset="product").mean()
    if not (half > 0 and both > 0):
        return [math.nan] * 3
    return [product / half, square / both, (square - product**2) / both]


def cut_levels(prompts: pd.DataFrame) -> dict[str, list[str]]:
    """Levels by pass rate in the first tenth of the steps, cut where the shares of prompts come
    nearest to a third and two thirds; fewer than three levels each by itself."""
    early = prompts[prompts["step"] <= prompts["step"].max() / 10]
    order = early.groupby("level")["pass_rate"].mean().dropna().sort_values().index
    if len(order) < 3:
        return {f"level {level}": [level] for level in order}
    shares = prompts["level"].value_counts(normalize=True)[order].cumsum().to_numpy()
    cuts = itertools.combinations(range(1, len(order)), 2)
    a, b = min(cuts, key=lambda cut: abs(shares[np.subtract(cut, 1)] - [1 / 3, 2 / 3]).sum())
    parts = {"hardest": order[:a], "middle": order[a:b], "easiest": order[b:]}
    return {f"{name}: {', '.join(part)}": [*part] for name, part in parts.items()}


def run_interval(sums: ArrayLike, counts: ArrayLike) -> list[float]:
    """Mean of a value over prompts, and its 95% interval from one run's measured steps: sums [n]
    over the prompts of a step, counts [n] of these; no interval (NaN) below eight steps. The error
    is that of differences between successive steps, in which the value's drift cancels: of
    d = sums - mean counts, sqrt(n / (2 (n - 1)) sum (d_(i+1) - d_i)^2) / sum counts."""
    of_steps = np.asarray(sums, float)
    prompts = np.asarray(counts, float)
    n = len(prompts)
    total = prompts.sum()
    mean = float(of_steps.sum() / total) if total else math.nan
    half = math.nan
    if n >= 8 and total:
        squares = np.square(np.diff(of_steps - mean * prompts)).sum()
        half = float(stats.t.ppf(0.975, n - 1) * math.sqrt(n / (2 * n - 2) * squares) / total)
    return [mean, mean - half, mean + half]


def smooth_rates(prompts: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Mean pass rate of each group of prompts at every step, smoothed over steps by a Gaussian of
    2.5 steps: [groups, steps]."""
    means = prompts.pivot_table("pass_rate", by, "step")
    means = means.reindex(columns=range(prompts["step"].max() + 1))
    means = means.interpolate(axis=1, limit_direction="both")
    means[:] = ndimage.gaussian_filter1d(means.to_numpy(), 2.5, axis=1, mode="nearest")
    return means


def same_length(log: pd.DataFrame) -> pd.Series:
    """How many times as long as a norm's the steps of one run were: sqrt(sum of length_taken^2 /
    sum of the norm's length^2) over its measured steps. Multiplied by it, progress is that of steps
    of one length."""
    squares = log[LENGTHS].dropna(subset=["length_taken", "length_none"]) ** 2
    sums = squares.sum().replace(0, math.nan)
    return np.sqrt(sums["length_taken"] / sums).rename(lambda name: name.removeprefix("length_"))


def foretell(runs: list[Run], parts: dict[str, list[str]], stop: int) -> dict[str, Any]:
    """What steps of each norm would teach, all as long as those taken: points of reward per 100
    steps, by runs of one norm in steps FIRST to `stop` - 1. Empty if progress was not measured.

    parts: levels of the hardest, middle and easiest prompts. Without any, prompts are divided by
    their pass rate, each half of a group by that of the other half, which shares no noise with it.
    Returns `rows` by part and level; `rate`, how long std's steps are at one learning rate, over
    none's; r and slope of what was learnt on what was foretold, in `cells` of level and ten steps.
    """
    log, prompts, halves = (pd.concat([getattr(run, name) for run in runs]) for name in TABLES)
    log = log[log["step"].between(FIRST, stop - 1)]
    scales = pd.DataFrame({seed: same_length(own) for seed, own in log.groupby("seed")}, NORMS)
    rows = halves[halves["step"].between(FIRST, stop - 1)].fillna({"level": ""})
    for norm in NORMS:
        points = 100 * 100 * rows[f"progress_{norm}"]  # of reward, in 100 steps
        rows[norm] = points * rows["seed"].map(scales.loc[norm])
    rows = rows.dropna(subset=NORMS).reset_index(drop=True)
    if rows.empty:
        return {}
    rows["std less none"] = rows["std"] - rows["none"]
    levels = [*itertools.chain(*parts.values())]
    bins = {name: rows["level"].isin(own) for name, own in parts.items()}
    if len(levels) > 3:
        bins |= {f"level {level}": rows["level"] == level for level in levels}
    elif not levels:
        third = np.ceil(3 * rows["pass_rate_half_other"] - 1e-9)
        bins = {"pass rate up to ⅓": third <= 1, "pass rate up to ⅔": third == 2}
        bins["pass rate above"] = third == 3
    bins["all"] = rows["step"] >= 0

    curves = 100 * smooth_rates(prompts.fillna({"level": ""}), ["level"])  # learnt by these runs
    end = min(stop, curves.columns.max()) if len(curves) else 0
    measured = rows.groupby(["seed", "step"]).size().index
    table = {}
    for name, part in ((name, rows[chosen]) for name, chosen in bins.items() if chosen.any()):
        row = {"share": len(part) / len(rows), "pass rate": part["pass_rate_half"].mean()}
        groups = part.groupby(["seed", "step"])
        counts = groups.size().reindex(measured, fill_value=0)
        for key in (*NORMS, "std less none"):
            sums = groups[key].sum().reindex(measured, fill_value=0)
            of_runs = [run_interval(sums[seed], counts[seed]) for seed in measured.unique("seed")]
            row[key] = of_runs[0] if len(of_runs) == 1 else mean_interval(x[0] for x in of_runs)
        if end > FIRST and (levels or name == "all"):
            curve = curves.loc[part["level"].unique()].mean()
            row["learnt"] = 100 * (curve[end] - curve[FIRST]) / (end - FIRST)
        table[name] = row

    norm = runs[0].config["norm"] if runs[0].config["norm"] in NORMS else "none"
    cells = []
    rows["start"] = rows["step"] // 10 * 10
    by_cell = rows[rows["step"] < end].groupby(["level", "start"])[norm].mean()
    for (level, start), points in by_cell.items():
        then = min(start + 10, end)
        learnt = curves.at[level, then] - curves.at[level, start]
        cells.append([points * (then - start) / 100, learnt])
    both = pd.DataFrame(cells, columns=["foretold", "learnt"], dtype=float)
    r = both["foretold"].corr(both["learnt"], min_periods=3)
    slope = r * both["learnt"].std() / both["foretold"].std()
    rate = float((scales.loc["none"] / scales.loc["std"]).mean())
    found = {"rows": table, "rate": rate, "r": r, "slope": slope, "cells": len(cells)}
    return found | {"from": runs[0].config["norm"], "last": stop - 1}


def at_equal_progress(
    prompts: pd.DataFrame, norm: str, parts: dict[str, list[str]], stop: int | None = None
) -> tuple[int, dict[str, dict[str, Any]]]:
    """Divide a norm's gap to none, in points, into a common part, none_l(phi(t)) - none_l(t), and a
    reallocation, norm_l(t) - none_l(phi(t)), for each part of the levels l.

    Pass rates are smoothed and made monotone; phi(t) is the step at which none's mean over levels
    is what the norm's is at t. Means over the steps before `stop`, which is returned too; unless
    given, where a run is above all that its partner reached, or none has made 90% of its rise (on a
    plateau phi is arbitrary). Intervals are over seeds.
    """
    rates = 100 * smooth_rates(prompts, ["norm", "seed", "level"])
    rates[:] = [optimize.isotonic_regression(row).x for row in rates.to_numpy()]
    overall = rates.groupby(["norm", "seed"]).mean()
    both = overall.loc[norm].index.intersection(overall.loc["none"].index)
    of_norm = overall.loc[norm].loc[both]
    of_none = overall.loc["none"].loc[both]
    typical = of_none.mean()
    risen = typical >= typical.iloc[0] + 0.9 * (typical.iloc[-1] - typical.iloc[0])
    above = of_norm.gt(of_none.iloc[:, -1], axis=0).any()
    if stop is None:
        stop = int(np.argmax(risen | above))
    steps = np.arange(rates.shape[1])
    names = f"gap, {norm} − none", "common speed-up", "reallocation"
    table = {}
    for name, levels in parts.items():
        values = []
        for seed in both:
            ours = rates.loc[norm, seed].reindex(levels).mean()
            none = rates.loc["none", seed].reindex(levels).mean()
            phi = np.interp(of_norm.loc[seed], of_none.loc[seed], steps)
            sped_up = np.interp(phi, steps, none)
            curves = pd.DataFrame({0: ours - none, 1: sped_up - none, 2: ours - sped_up})
            values.append(curves[:stop].mean())
        table[name] = {key: mean_interval(own) for key, own in zip(names, np.transpose(values))}
    return stop, table


def opposite_signs(hardest: pd.DataFrame, middle: pd.DataFrame) -> str:
    """In how many seeds, at most, the hardest third's gap is above 0 and the middle one's below in
    a tenth of the run: gaps [steps, seeds]. Chance: the 95% quantile of that maximum with each
    seed's norms swapped at random."""
    tenth = hardest.index * 10 // (hardest.index[-1] + 1)
    signs = np.sign(hardest.groupby(tenth).mean())
    signs = signs.where(signs == -np.sign(middle.groupby(tenth).mean()), 0)  # [tenths, seeds]
    counts = (signs > 0).sum(axis=1)
    swaps = np.random.default_rng(0).choice([-1, 1], size=(2000, 1, signs.shape[1]))
    chance = (signs.to_numpy() * swaps > 0).sum(axis=2).max(axis=1)
    own = hardest.index[tenth == counts.idxmax()]
    limit = np.quantile(chance, 0.95, method="inverted_cdf")
    found = f"In steps {own[0]} to {own[-1]} the hardest third gains and the middle one loses in "
    return found + f"{counts.max()} of {signs.shape[1]} seeds (by chance in up to {limit})."


def mere_speed_up(std: pd.DataFrame, none: pd.DataFrame) -> dict[str, Any]:
    """Whether `detect_phases` finds phases, too, if normalized runs are replaced by their partners
    sped up by the constant, 1 to 2, that fits means best: pass rates [steps, seeds]. The gap is
    then none(constant t), smoothed, plus what smoothing takes from std (noise), less none(t)."""
    pair = pd.concat({"std": std, "none": none}, axis=1).dropna()
    if pair.empty:
        return {"constant": math.nan, "found": False}
    t = pair.index.to_numpy(float)
    smooth = pair.copy()
    smooth[:] = ndimage.gaussian_filter1d(pair.to_numpy(), 2.5, axis=0, mode="nearest")

    # std slowed down is known at every step, none sped up is not.
    constants = np.arange(1, 2, 0.01)
    means = smooth.T.groupby(level=0).mean()
    slowed = [np.interp(t / constant, t, means.loc["std"]) for constant in constants]
    best = float(constants[np.square(slowed - means.loc["none"].to_numpy()).sum(axis=1).argmin()])
    sped_up = smooth["none"].apply(lambda curve: np.interp(best * t, t, curve))
    gap = sped_up + pair["std"] - smooth["std"] - pair["none"]
    gap = gap[best * t <= t[-1]].T
    found = detect_phases(gap, 0 * gap, 0 * gap, gap.columns)["found"]
    return {"constant": best, "found": found}


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
        asked = number(run.config.get("steps", 0))
        rows.append([title, *identity, run.end, asked, run.log["rate"].mean(), run])
    columns = ["title", "norm", "lr", "seed", "end", "asked", "rate", "run"]
    return pd.DataFrame(rows, columns=columns)


def choose(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows of `tabulate` to compare, and why others are left out: one more of its norm, rate
    and seed; or more than a tenth shorter than the longest of its title, unless all are unfinished.
    """
    longest = table.groupby("title")["end"].transform("max")
    finished = (table["end"] + 1 >= table["asked"]).groupby(table["title"]).transform("any")
    short = (table["end"] + 1 < 0.9 * (longest + 1)) & finished
    again = table[~short].duplicated(["title", "norm", "lr", "seed"])
    again = again.reindex(table.index, fill_value=False)
    left_out = [f"{x.path}: its norm, rate and seed are there already" for x in table[again]["run"]]
    for row in table[short].itertuples():
        left_out.append(f"{row.run.path}: unfinished, it ends at step {row.end}")
    return table[~short & ~again], left_out


def arrange(table: pd.DataFrame) -> dict[str, list[Run]]:
    """Comparisons among rows of `tabulate`: all norms at each learning rate, starting with std's
    best; then each norm at its own best rate. That is the one whose runs went furthest (so not one
    with an unfinished run), and among those the one with the highest mean pass rate.
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


def describe_phase(log: pd.DataFrame) -> dict[str, Any]:
    """A row of Table 3: the cosines of all pairs of prompt gradients, pooled over the log's steps;
    and C, with its interval over runs."""
    rows = log.dropna(subset=["n_gradients", "cos_mean", "cos_std"])
    pairs = rows["n_gradients"] * (rows["n_gradients"] - 1) / 2
    squares = rows["cos_std"] ** 2 + rows["cos_mean"] ** 2
    rows = rows[["cos_mean", "cos_positive", "cos_small"]].assign(square=squares)
    mean, positive, small, square = rows.mul(pairs, axis=0).sum(min_count=1) / max(1, pairs.sum())
    row = {"mean": mean, "std": (square - mean**2) ** 0.5, "above 0": positive}
    row |= {"below 0.1 in size": small, "pairs": int(pairs.sum())}
    row |= {"signal share": log["signal_share"].mean()}
    row |= {"C": mean_interval(log.groupby("seed")["C"].mean())}
    row |= {"features": log["feature_cos"].mean(), "centred": log["feature_cos_centered"].mean()}
    return row


def describe_halves(halves: pd.DataFrame, last: int) -> tuple[dict, dict]:
    """Over prompts, for all norms: how Fisher information correlates with reward variance, by part
    of the run and by side of pass rate 1/2, and how far the halves agree; and the signed law."""
    pairs = {"same half": ["variance", "fisher_half"]}
    pairs["across halves"] = ["variance_other", "fisher_half"]
    pairs["reliability of Fisher"] = ["fisher_half", "fisher_half_other"]
    pairs["and of the variance"] = ["variance", "variance_other"]

    def correlate(part: pd.DataFrame) -> dict[str, pd.Series]:
        part = part.set_index(["norm", "seed", "step"])
        return {name: correlations(part[pair]) for name, pair in pairs.items()}

    measured = halves.dropna(subset="fisher_half")
    if measured.empty:
        pairs = {}
    found = {"all": correlate(measured)}
    for k in range(3):
        own = f"step * 3 // {last + 1} == {k}"
        parts = {name: r[r.index.to_frame().eval(own)] for name, r in found["all"].items()}
        found[f"third {k + 1} of the run"] = parts
    for sign in "<>":
        found[f"pass rate {sign} ½"] = correlate(measured.query(f"pass_rate_half {sign} 0.5"))
    fisher: dict[str, dict[str, Any]] = defaultdict(dict)
    for cut, name in itertools.product(found, pairs):
        fisher[cut][name] = mean_interval(found[cut][name].groupby("seed").mean())
    rows = halves.dropna(subset=["third", "third_other", "curvature"])
    laws = pd.DataFrame([signed_law(part) for _, part in rows.groupby("seed") if len(part) > 2])
    law = {name: mean_interval(values) for name, values in laws.items()}
    return fisher, law


def compare(runs: list[Run], target: float | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compare runs up to the end of the shortest: the report's numbers (tables map row to column to
    value; intervals: [mean, low, high]), and series for the picture [steps, (label, seed)]."""
    last = min(run.end for run in runs)
    log, prompts, halves = (pd.concat([getattr(run, name) for run in runs]) for name in TABLES)
    held_out = log[log["step"] <= last + 1].groupby(["norm", "seed"])["held_out"].last()
    log, prompts, halves = [table[table["step"] <= last] for table in (log, prompts, halves)]
    norms = sorted({*log["norm"]}, key=lambda norm: (norm == "none", norm != "std", norm))
    main = norms[0]  # the phases are those of this norm
    values = ["rate", "reward_std", "cos_mean", "cos_std"]
    wide = log.pivot(index="step", columns=["norm", "seed"], values=values)
    wide = wide.reindex(columns=norms, level="norm")
    rates = wide["rate"]
    plain = rates.get("none", pd.DataFrame())
    gaps = rates.sub(plain, level="seed").drop(columns="none", errors="ignore")
    gaps = gaps.dropna(axis=1, how="all")
    gap = gaps[main].T if main in gaps else None
    seeds = rates[main].columns if gap is None else gap.index
    sigma = wide["reward_std", main][seeds].T
    spread = wide["cos_std", main][seeds].T
    phases = detect_phases(gap, sigma, spread, wide.index)
    if gap is not None:
        phases["speed-up"] = mere_speed_up(rates[main][seeds], plain[seeds])
        if phases["found"] and phases["speed-up"]["found"]:
            constant = phases["speed-up"]["constant"]
            phases["reason"] += f". But a common speed-up of {constant:.2f} would look the same"

    # The norms: pass rates, steps to a goal, and for pairs of runs the gap and the speed-up.
    ends = rates.apply(lambda rate: rate.dropna().iloc[-max(1, rate.count() // 10) :].mean())
    goal = 0.9 * ends.groupby("norm").mean().min() if target is None else target
    reached = rates.apply(reach, level=goal)
    table = {}
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
        table[norm] = row

    # The phases: cosines, features, C(T).
    mine = log[log["norm"] == main]
    edges = [0, *phases["boundaries"], last + 1]
    labels = ["I", "II", "III"] if edges[2:] else ["all steps"]
    phase = np.array(labels)[np.searchsorted(phases["boundaries"], mine["step"], "right")]
    rows = {name: describe_phase(part) for name, part in mine.groupby(phase)}

    # Without noise, by phase and kind of pairs.
    moments = [signals(run) for run in runs if run.config["norm"] == main]
    free: dict[str, Any] = {}
    for pairs, kind in PAIRS.items():
        for a, b, name in zip(edges, edges[1:], labels):
            cuts = [noise_free(steps[pairs].loc[a : b - 1]) for steps in moments]
            names = "cosine", "square", "spread"
            free[f"{name}, {kind}"] = dict(zip(names, map(mean_interval, zip(*cuts)), strict=True))

    # What happened to whom, up to the end of the window, and what progress foretold there.
    parts = cut_levels(prompts)
    tenths: dict[str, Any] = {}
    happened: dict[str, Any] = {}
    curves = gaps[[]]
    window = 0
    signs = ""
    if parts and main in gaps:
        part_of = {level: name for name, levels in parts.items() for level in levels}
        named = prompts.assign(part=prompts["level"].map(part_of))
        by_part = named.pivot_table("pass_rate", "step", ["norm", "part", "seed"])
        curves = by_part[main] - by_part["none"]
        curves = curves.reindex(columns=pd.MultiIndex.from_product([parts, seeds]))
        cuts = curves.groupby(curves.index * 10 // (last + 1)).mean()
        cuts.index = [f"from step {tenth * (last + 1) / 10:.0f}" for tenth in cuts.index]
        cuts.loc["all steps"] = curves.mean()
        tenths = {
            x: {part: mean_interval(row[part]) for part in parts} for x, row in cuts.iterrows()
        }
        window, happened = at_equal_progress(prompts, main, parts)
        if len(parts) == 3:
            signs = opposite_signs(*(curves[part] for part in [*parts][:2]))
    source = next(norm for norm in ("none", "std", main) if norm in norms)
    source_runs = [run for run in runs if run.config["norm"] == source]
    progress = foretell(source_runs, parts, window if window > FIRST else last + 1)
    fisher, curvature = describe_halves(halves, last)
    cosines = wide.xs(main, axis=1, level="norm")[["cos_std", "cos_mean"]]
    cosines = cosines.rename(columns={"cos_std": "their deviation", "cos_mean": "their mean"})
    lines = {
        "Pass rate on training prompts (%)": 100 * rates,
        "Lead over none (percentage points)": 100 * gaps,
        "Lead by difficulty (percentage points)": 100 * curves,
        "Deviation σ of a prompt's rewards, mean": wide["reward_std"],
        f"Cosines of two prompts' gradients, {main}": cosines,
    }
    numbers = {"norm": main, "seeds": len(seeds), "last_step": last, "phases": phases}
    numbers |= {"norms": table, "tenths": tenths, "opposite_signs": signs, "cosines": rows}
    numbers |= {"noise_free": free, "fisher": fisher, "curvature": curvature}
    numbers |= {"progress": progress, "window": window, "happened": happened}
    numbers["unfinished"] = all(run.end + 1 < run.config.get("steps", 0) for run in runs)
    numbers["optimizer"] = runs[0].config.get("optimizer", "adamw")
    return numbers, lines


# -------------------------------------- Report and picture ----------------------------------------


def show(value: Any) -> str:
    """A word, a figure, a mean with its interval if it has one, or nothing."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        mean, low, high = map(show, value)
        return f"{mean} [{low}, {high}]" if math.isfinite(value[1]) else mean
    if value is None or not math.isfinite(value):
        return "" if value is None else "–"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def markdown(rows: dict[str, dict[str, Any]], nothing: str = "Not measured.") -> str:
    """Row to column to value as a table."""
    columns = [*dict.fromkeys(itertools.chain(*rows.values()))]
    cells = [["", *columns], ["---"] * (1 + len(columns))]
    cells += [[name, *(show(row.get(column)) for column in columns)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells) if rows else nothing


def aligned(rows: dict[str, dict[str, Any]]) -> str:
    """The same for a terminal."""
    return pd.DataFrame.from_dict(rows, orient="index").map(show).to_string()


def answer(rows: dict[str, dict[str, Any]]) -> str:
    """What dividing by the deviation would give the hardest and the middle third (without levels
    the lower two), by a fixed rule: a difference is told if its interval excludes 0, else how large
    it may be; as a share of none's progress if the interval of that is above 0, else in points."""
    told = []
    limits = []
    for name in [name for name in rows if name != "all"][:2] or ["all"]:
        change, low, high = rows[name]["std less none"]
        base, least, _ = rows[name]["none"]
        if not math.isfinite(low):
            return "Whether dividing by σ would help: run three seeds, or one for longer."
        unit = "%" if least > 0 else " points"
        scale = 100 / base if least > 0 else 1.0
        part = name.split(":")[0]
        who = f"the {part} third" if part in ("hardest", "middle") else f"problems of {name}"
        who = "all problems" if name == "all" else who
        if low > 0 or high < 0:
            sign = "more" if low > 0 else "less"
            told.append(f"{who} {show(float(f'{abs(change) * scale:.2g}'))}{unit} {sign}")
        limits.append(f"{show(float(f'{max(-low, high) * scale:.2g}'))}{unit} ({who})")
    if not told:
        return f"Dividing by σ would change neither by more than {' and '.join(limits)}."
    seen = "" if len(told) == len(limits) else ", with no change seen in the other"
    return f"Dividing by σ would give {' and '.join(told)} per step{seen}."


def first_page(title: str, found: dict[str, Any], table: Callable = markdown) -> str:
    """What one wants to know first, in at most 36 lines of 100 characters."""
    parts = [f"{title}, up to step {found['last_step']}"]
    if found["unfinished"]:
        parts[0] += "; no run is finished, they are compared as far as the shortest went"
    if progress := found["progress"]:
        rows = {}
        for name, row in progress["rows"].items():
            if len(progress["rows"]) <= 10 or not name.startswith("level "):
                rows[name] = {key: x[0] if key in NORMS else x for key, x in row.items()}
        parts += [
            "Who learns what: points of pass rate that 100 steps would add on further problems; "
            "advantages not divided (none), divided by their deviation σ (std) or by σ² (var), and "
            f"steps of one length. From gradients of {progress['from']} in steps {FIRST} to "
            f"{progress['last']}; learnt is what these runs then learnt.",
            table(rows),
            f"**{answer(progress['rows'])}**",
        ]
        rate, r, slope = (show(progress[name]) for name in ("rate", "r", "slope"))
        text = f"At one learning rate std's steps are {rate} times as long as none's"
        if found["optimizer"] == "adamw":
            text += ", which AdamW takes back. With AdamW the figures are those of the first steps "
            text += "after a change of norm; over a whole run the differences are smaller"
        if math.isfinite(progress["r"]):
            text += f". Foretold and learnt agree with r = {r} and slope {slope} "
            text += f"({progress['cells']} cells of a level and ten steps)"
        parts.append(text + ".")
    else:
        parts.append("What each norm would teach (progress) was not measured.")
    if found["window"]:
        parts += [
            f"What {found['norm']} changed: its lead over none in points, mean of steps 0 to "
            f"{found['window'] - 1}. A common speed-up explains the first part, the rest went from "
            f"some problems to others. {found['opposite_signs']}",
            table(found["happened"]),
        ]
    parts.append(f"**{found['phases']['reason']}.**")
    # Neither a heading nor a table is wrapped.
    wrapped = [text if "\n" in text else textwrap.fill(text, 100) for text in parts[1:]]
    return "\n\n".join([parts[0], *wrapped])


def describe(title: str, found: dict[str, Any]) -> str:
    """The report on a comparison, as Markdown."""
    phases = found["phases"]
    bounds = itertools.zip_longest(phases["boundaries"], phases["intervals"], fillvalue="")
    starts = [f"{step} {interval}".strip() for step, interval in bounds]
    split = "There is no split"
    if starts:
        split = f"Norm {found['norm']}: phase II starts at step {starts[0]}, III at {starts[1]} "
        split += "(95% intervals over resampled runs)" * bool(phases["intervals"])
    claims = {}
    for name, claim in phases["claims"].items():
        effect = [claim["effect"], *(claim["interval"] or [math.nan] * 2)]
        claims[name.replace("_", " ")] = {"effect": effect, "verdict": claim["verdict"]}
    mere = "Whether a mere speed-up looks the same was not tried."
    if "speed-up" in phases:
        have = "have" if phases["speed-up"]["found"] else "do not have"
        constant = phases["speed-up"]["constant"]
        mere = f"Runs of none, sped up by {constant:.2f} (which fits best), {have} three phases."
    return f"""
## {first_page(title, found)}

### Phases
{split.strip()}{"" if phases["found"] else ", but this split is not supported" * bool(starts)}.
Intervals are over seeds ({found["seeds"]}), for one task and one starting model.

{markdown(claims)}

In order, the claims hold if the mean gap in I is within a quarter of the gain in II; that gain is
above 0; the gain per step in III is below half that in II; mean σ falls from I to III; and the
cosines' deviation grows (noise widens it). *Not seen*: it may be anything in its interval.

{mere} Of 60
simulations of ten pairs with the toy's noise, three phases are found in 0 without a gap; in 60 of a
sigmoid sped up by 1.1, each time with the remark that a speed-up would look the same; in 58 of
straight lines between which the gap opens and stops, never with that remark.

### Norms
{markdown(found["norms"])}

Steps and speed-up: only if every run starts below the goal and reaches it. The largest gap is
picked from 60 windows, so slightly too large.

### Gap to none by level of difficulty
{markdown(found["tenths"], "The problems have no levels.")}

### Cosines of pairs of prompt gradients as sampled (Table 3), and C(T) = (8/3) · mean σ
{markdown(found["cosines"])}
| paper, step 0 | 0.000 | 0.045 | 0.505 | 0.977 | 4950 |
| paper, step 260 | 0.039 | 0.066 | 0.727 | 0.803 | 4950 |
| paper, step 500 | 0.056 | 0.130 | 0.664 | 0.524 | 4950 |

If C up to T is below 1, Theorem 3.2's bound on the smallest gradient up to T is better for GRPO;
with few completions σ and C come out too low (0.464 for 0.5 at 8). Features: mean |cosine| between
prompts' hidden states, raw and centred; the paper has 0.088 (section 4.1).

### Cosines of prompt gradients without noise
{markdown(found["noise_free"])}

Assumption 4 rules out cosines below 0; a spread above 0 means that interference is heterogeneous.
All are ratios of means; the spread is the inner products' variance over mean |x|²|y|².

### Fisher information and reward variance over prompts (Table 1: 0.342 and -0.028)
{markdown(found["fisher"])}

Mean correlation within a step. Across halves no noise is shared, but noise still lowers r, to at
most about the square root of the two reliabilities' product (each correlates the two halves).

### Signed curvature against V(1 − 2p) over prompts
{markdown({"all steps": found["curvature"]} if found["curvature"] else {})}

The slope is freed of noise, r is not.
"""


def draw_progress(axis: Axes, progress: dict[str, Any]) -> None:
    """Bars of what 100 steps of each norm would teach, and of what was learnt, by part."""
    parts = {k: v for k, v in progress.get("rows", {}).items() if not k.startswith("level ")}
    for k, key in enumerate([*NORMS, "learnt"]):
        bars = [np.ravel(row.get(key, math.nan)) for row in parts.values()]
        x = np.arange(len(bars)) + 0.2 * k - 0.3
        axis.bar(x, [bar[0] for bar in bars], 0.2, label=key, color=COLORS.get(key, "black"))
        for at, (_, *interval) in zip(x, bars):
            if interval:
                axis.vlines(at, *interval, color="black", linewidth=1)
    axis.set(title="Foretold, and learnt (points per 100 steps)", ymargin=0.3)
    axis.set_xticks(range(len(parts)), [name.split(":")[0] for name in parts])
    axis.legend(title="" if parts else "not measured", ncols=4, framealpha=0.6)


def draw(path: Path, title: str, found: dict[str, Any], lines: dict[str, Any]) -> None:
    """phases.png: series over steps, means of a twentieth of the run with 95% intervals over seeds.
    A colour is one norm or one part of the levels, black is anything else."""
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    phases = found["phases"]
    for axis, (name, parts) in zip(axes, lines.items()):
        axis.set(title=name, xlabel="training step", ymargin=0.1)
        for label, style in zip(parts.columns.unique(0), ["-", "--", ":", "-."]):
            rows = bands(windows(parts[label], 20).T.items())
            if len(rows):
                color = COLORS.get(label.split(":")[0], "black")
                axis.plot(rows["mean"], label=label, color=color, linestyle=style, linewidth=2)
                axis.fill_between(rows.index, rows.low, rows.high, color=color, alpha=0.15, lw=0)
    if phases["line"]:
        corners = np.transpose(phases["line"]) * [[1], [100]]
        axes[1].plot(*corners, color="black", linestyle=":", label="fitted line")
    edges = [0, *phases["boundaries"], found["last_step"]] if phases["found"] else []
    for axis in axes[:5]:
        for name, a, b in zip(("I", "II", "III"), edges, edges[1:]):
            axis.axvspan(a, b, color="grey", alpha=0.2 * (name == "II"), linewidth=0)
            top = axis.get_xaxis_transform()
            axis.text((a + b) / 2, 0.98, name, transform=top, ha="center", va="top", family="serif")
        axis.legend(handles=axis.lines, title="" if axis.lines else "not measured", framealpha=0.6)
    draw_progress(axes[5], found["progress"])
    figure.suptitle(textwrap.fill(title, 120).replace("$", r"\$"), fontsize=13)
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
    runs = []
    problems = []
    for path in {path.resolve(): path for path in given.runs if not path.is_file()}.values():
        try:
            runs.append(read_run(path))
        except ValueError as error:
            problems.append(str(error))
    if not runs:
        parser.error(f"no run to read: {'; '.join(problems) or 'no directory'}")

    table, left_out = choose(tabulate(runs))
    problems += left_out
    groups: dict[str, dict[str, Any]] = {}
    report = "# Dividing by the standard deviation: what it would do, and what it did\n"
    pages = []
    for title, rows in table.groupby("title", sort=False):
        groups[title] = {}
        report += f"\n# Runs with {title}\n"
        for name, chosen in arrange(rows).items():
            found, lines = compare(chosen, given.target)
            groups[title][name] = found
            report += describe(name, found)
            picture = f"{title}, {name}. {found['phases']['reason']}", found, lines
            pages.append((first_page(f"{title}, {name}", found, aligned), picture))
    notes = [f"{x.path}: {x.skipped} unreadable log lines skipped" for x in runs if x.skipped]
    notes += [f"left out: {problem}" for problem in problems]
    report += "\n" + "\n\n".join(notes)

    parents = os.path.commonpath([run.path.absolute() for run in runs])
    out = given.out or (runs[0].path if len(runs) == 1 else Path(os.path.relpath(parents)))
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "analysis.md").write_text(report, encoding="utf-8", errors="backslashreplace")
        analysis = pd.Series({"groups": groups, "left_out": problems})
        analysis.to_json(out / "analysis.json", indent=1, double_precision=15)  # NaN becomes null
        draw(out / "phases.png", *pages[0][1])
    except OSError as error:
        parser.error(f"cannot write to {out}: {error.strerror}")
    with contextlib.suppress(BrokenPipeError):
        more = f", with {len(pages) - 1} more comparisons" if len(pages) > 1 else ""
        notes.append(
            f"\nwritten to {out}: analysis.md (everything{more}), analysis.json, phases.png"
        )
        print(pages[0][0].replace("**", ""), *notes, sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
