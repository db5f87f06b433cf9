"""Are there three phases, and does dividing by the standard deviation help? Reads the logs of grpo.py and decides.

    python analyze.py runs/arith-std-0                        # one run: phases, curvature against sigma
    python analyze.py runs/*-std-* runs/*-none-*              # several: their comparison too
    python analyze.py --orthogonality corrected runs/*        # the verdict on what is left without sampling noise

A report goes to the terminal and to analysis.md, its numbers to analysis.json, a picture to phases.png, all in the
run's directory (of several runs: in the directory that holds them) or in --out.

The claim under test (Ge et al., arXiv 2601.23135): training has an early phase of high reward variance and
orthogonality (I), a transition (II) and a late phase in which orthogonality is lost (III). "Not found" is a result.

The file reads top to bottom: reading logs, phases, the curvature law, comparison of norms, report, picture.
"""

import argparse
import contextlib
import io
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import ruptures
from numpy.typing import ArrayLike
from scipy import optimize, stats

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib import ticker  # noqa: E402

# ---------------------------------------------------- Reading logs ----------------------------------------------------

KEYS = ["pass_rate", "reward", "reward_std", "cos_abs", "interference", "signal_share", "predicted_gain",
        "eval_pass_rate", "eval_reward"]
# Two ways to measure orthogonality, and the predicted gain.
KINDS = {"sampled": ("1 − mean |cos|", "as sampled"), "corrected": ("1 − cosine", "noise removed")}
# Settings in which runs that are compared may differ: what is compared, and what changes nothing in training.
FREE = ("norm", "seed", "lr", "out", "resume", "cache", "save_every", "eval_every", "steps", "device", "micro_batch",
        "geometry_every", "probe_every", "sketch", "reward_timeout", "rank_timeout")


@dataclass
class Run:
    """One run's settings and logs."""

    path: Path
    config: dict[str, Any]
    log: pd.DataFrame  # index: step; columns: KEYS, sampled, corrected, signal_gain; NaN where not measured
    halves: pd.DataFrame  # step; pass rate, sigma of the half that gave a direction; variance, curvature of the other
    skipped: int  # lines that could not be read


def number(value: Any) -> float:
    """A JSON value as a float; NaN for what is no number, or none whose square would be finite."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e100 else math.nan


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of a log that have a step, and the number of other lines (a killed run leaves half a line)."""
    rows, skipped = [], 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < 2**53:
                rows.append(row)
            else:
                skipped += 1
    return rows, skipped


def corrected_cosine(log: pd.DataFrame, prompts: int) -> pd.Series:
    """Cosine of two prompts' gradients without sampling noise: mean inner product over mean squared norm of the signal.

    A step's own signal share comes close to 0 late in training: the running mean of 25 measured steps stands below the
    line, and where that is not two standard errors above 0 there is no signal to speak of, and NaN.
    """
    measured = log.dropna(subset=["interference", "signal_share"])
    window = measured["signal_share"].rolling(25, center=True, min_periods=1)
    share = window.mean()
    return (measured["interference"] - 1) / max(1, prompts - 1) / share.where(share > 2 * window.sem().fillna(0))


def signal_gain(rows: list[dict[str, Any]]) -> pd.Series:
    """Of every step 1/2 * sum(|g|^2 / sigma), |g|^2 without sampling noise, over the sampled sum(|g|^2).

    Over the signal share it is the predicted gain without noise; but a step's share may be next to nothing, so both are
    averaged over steps first.
    """
    names = ["step", "grad_sq_signal", "reward_std", "grad_norm"]
    table = pd.DataFrame([[number(row.get(name)) for name in names] for row in rows], columns=names).dropna()
    table = table[table["reward_std"] > 0]
    table["above"], table["below"] = table["grad_sq_signal"] / table["reward_std"] / 2, table["grad_norm"] ** 2
    sums = table.groupby("step")[["above", "below"]].sum()
    return sums["above"] / sums["below"]


def read_halves(rows: list[dict[str, Any]], group: int) -> pd.DataFrame:
    """What probes tell of the half that gave the direction, and the other's unbiased variance and its curvature."""
    names, sizes, found = ("pass_rate_half", "reward_std_half", "curvature"), ((group + 1) // 2, group // 2), []
    for row in rows:
        pairs = [row.get(name) for name in names]
        if all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            rate, std, curvature = ([number(value) for value in pair] for pair in pairs)  # type: ignore[union-attr]
            for one, other in ((0, 1), (1, 0)):
                variance = std[other] ** 2 * sizes[other] / max(1, sizes[other] - 1)
                found.append((row["step"], rate[one], std[one], variance, curvature[one]))
    table = pd.DataFrame(found, columns=["step", "rate", "sigma", "variance", "curvature"], dtype=float).dropna()
    return table[table["sigma"] > 0]


def read_run(path: Path) -> Run:
    """A run's directory. Raises ValueError where it has no readable settings or no line of metrics."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        metrics, skipped = read_lines(path / "metrics.jsonl")
        rows, more = read_lines(path / "prompts.jsonl") if (path / "prompts.jsonl").exists() else ([], 0)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    numbers = [config.get(name) for name in ("prompts", "group", "seed")] if isinstance(config, dict) else [None]
    valid = all(type(value) is int and 0 <= value < 2**31 for value in numbers) and 0 not in numbers[:2]
    if not valid or not isinstance(config.get("norm"), str):
        raise ValueError(f"{path}: config.json does not name norm, seed, prompts and group")
    lines = {row["step"]: [number(row.get(key)) for key in KEYS] for row in metrics}  # of a repeated step the last
    log = pd.DataFrame.from_dict(lines, orient="index", columns=KEYS).sort_index()
    if log["reward_std"].notna().sum() == 0:
        raise ValueError(f"{path}: metrics.jsonl has no step")
    for rate, reward in (("pass_rate", "reward"), ("eval_pass_rate", "eval_reward")):
        log[rate] = log[reward].fillna(log[rate])  # equal for rewards of 0 and 1; of others what was trained counts
    log["sampled"], log["corrected"] = 1 - log["cos_abs"], 1 - corrected_cosine(log, config["prompts"])
    log["signal_gain"] = signal_gain(rows)
    return Run(path, config, log, read_halves(rows, config["group"]), skipped + more)


# ------------------------------------------------------- Phases -------------------------------------------------------

SHORTEST = 30  # steps below which there is nothing to split
NAMES = ("reward deviation", "orthogonality")


def split(series: np.ndarray, segments: int, least: int) -> list[int]:
    """First indices of all segments but the first: the exact least-squares fit of levels to a series [n, d]."""
    if segments == 1:
        return []
    return ruptures.KernelCPD(kernel="linear", min_size=least).fit(series).predict(n_bkps=segments - 1)[:-1]


def level_columns(n: int, breaks: Sequence[int]) -> np.ndarray:
    """Indicators of the segments, [n, segments]."""
    return np.eye(len(breaks) + 1)[np.searchsorted(breaks, np.arange(n), side="right")]


def fitted_levels(series: np.ndarray, breaks: Sequence[int]) -> np.ndarray:
    """Every segment's mean, at each of its steps. [n, d] -> [n, d]."""
    columns = level_columns(len(series), breaks)
    return columns @ ((columns.T @ series) / columns.sum(axis=0)[:, None])


def log_likelihood(y: np.ndarray, columns: np.ndarray) -> float:
    """In nats, of a series [n] as a combination of columns [n, k] plus AR(1) noise, at the best parameters.

    Noise that remembers imitates steps and slopes: the iterated regression of Cochrane and Orcutt (1949) takes the
    memory out of both sides first.
    """
    wanted, given, rho = y, columns, 0.0
    for _ in range(5):
        coefficients = np.linalg.lstsq(given, wanted, rcond=None)[0]
        noise = y - columns @ coefficients
        rho = float(np.clip(noise[1:] @ noise[:-1] / max(noise[:-1] @ noise[:-1], 1e-300), -0.99, 0.99))
        wanted, given = y[1:] - rho * y[:-1], columns[1:] - rho * columns[:-1]
    error = wanted - given @ np.linalg.lstsq(given, wanted, rcond=None)[0]
    return -len(error) / 2 * math.log(max(error @ error / len(error), 1e-12))


def best_smooth(y: np.ndarray, step: np.ndarray) -> tuple[float, str]:
    """Score and name of the best rival of three levels for a series [n]: a straight line, an exponential or a logistic
    curve, the first two also with one step, at the given place (an indicator, [n]).

    The score is the log-likelihood in nats less ln(n)/2 a parameter (BIC, Schwarz 1978).
    """
    n = len(y)
    t, one, price = np.linspace(0, 1, n), np.ones(n), math.log(n) / 2

    def decay(x: np.ndarray) -> np.ndarray:
        return np.exp(-t * math.exp(min(x[0], 7.0)))

    def logistic(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(np.clip((t - x[0]) / math.exp(np.clip(x[1], -8, 3)), -60, 60)))

    found = {}
    for end, more in (("", []), (" and a step", [step])):
        columns = np.stack([one, t, *more], axis=1)
        found["straight line" + end] = log_likelihood(y, columns) - (2 + 2 * len(more)) * price
        for name, shape, ranges in (("exponential", decay, [(-1, 5)]), ("logistic", logistic, [(0, 1), (-5.5, -0.5)])):
            if more and shape is logistic:  # a steep one and a step are three levels
                continue

            def left(x: np.ndarray, shape: Any = shape, more: list[np.ndarray] = more) -> float:
                return -log_likelihood(y, np.stack([one, shape(x), *more], axis=1))

            *_, lowest, _, _ = optimize.brute(left, ranges, Ns=8, full_output=True)
            found[name + end] = -float(lowest) - (2 + len(ranges) + 2 * len(more)) * price
    name = max(found, key=lambda key: found[key])
    return found[name], name


def block_length(noise: np.ndarray) -> int:
    """Steps that resampling must keep together, for noise [n, d]: the rule for AR(1) series of Carlstein (1986)."""
    rho = max(float(x[1:] @ x[:-1] / max(x @ x, 1e-300)) for x in noise.T)
    rho = min(max(rho, 0.0), 0.95)
    return max(2, round((2 * rho / (1 - rho**2)) ** (2 / 3) * len(noise) ** (1 / 3)))


def permutation_p(series: np.ndarray, segments: int, least: int, draws: int, rng: np.random.Generator) -> float:
    """Probability, without the last of `segments` segments, of a gain from it as large as the one observed.

    What one segment fewer leaves unexplained is permuted in blocks, so that its memory stays, and fitted again.
    """

    def gain(values: np.ndarray) -> float:
        fewer, all_of_them = (fitted_levels(values, split(values, k, least)) for k in (segments - 1, segments))
        return np.square(values - fewer).sum() / max(np.square(values - all_of_them).sum(), 1e-300)

    n, observed = len(series), gain(series)
    null = fitted_levels(series, split(series, segments - 1, least))
    size = block_length(series - fitted_levels(series, split(series, segments, least)))
    as_large = 0
    for _ in range(draws):
        noise = np.roll(series - null, rng.integers(n), axis=0)
        blocks = np.array_split(noise, math.ceil(n / size))
        as_large += gain(null + np.concatenate([blocks[i] for i in rng.permutation(len(blocks))])) >= observed
    return (1 + as_large) / (1 + draws)


def resample_split(
    series: np.ndarray, breaks: list[int], least: int, draws: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Block bootstrap of a split of a series [n, d] in three: its breaks [draws, 2] and the changes of the levels from
    the first segment to the last [draws, d]."""
    n, fit = len(series), fitted_levels(series, breaks)
    noise = series - fit
    size = block_length(noise)
    found, changes = [], []
    for _ in range(draws):
        rows = (rng.integers(n, size=math.ceil(n / size))[:, None] + np.arange(size)).ravel()[:n] % n
        drawn = fit + noise[rows]
        found.append(split(drawn, 3, least))
        changes.append(drawn[found[-1][1] :].mean(axis=0) - drawn[: found[-1][0]].mean(axis=0))
    return np.array(found), np.array(changes)


def slope(y: np.ndarray, x: np.ndarray) -> float:
    """Least-squares slope; NaN entries of y are left out, and fewer than two points have none."""
    known = np.isfinite(y)
    if known.sum() < 2 or np.ptp(x[known]) == 0:
        return math.nan
    return float(np.polyfit(x[known], y[known], 1)[0])


def detect_phases(
    reward_std: ArrayLike, orthogonality: ArrayLike, pass_rate: ArrayLike | None = None,
    steps: ArrayLike | None = None, draws: int = 199, seed: int = 0,
) -> dict[str, Any]:
    """Whether two series of training, taken together, have the three phases of arXiv 2601.23135.

    reward_std: mean within-prompt standard deviation; orthogonality: of the prompts' gradients; pass_rate: or None;
    steps: their step numbers, 0, 1, 2, ... by default. All of one length; where one of the first two is NaN the step is
    left out; above 400 steps neighbours are averaged.

    The series are split in three by the exact least-squares fit of levels to both at once: `boundaries` (first steps of
    II and III), `intervals` (95%, block bootstrap), `levels`, whether or not the data support it. `segments` is how
    many they do support: 1, 2 or 3 levels by log-likelihood with AR(1) noise, less ln(n)/2 nats a level and ln(n) a
    boundary, one of n places. `p_value` is that of the last of these segments (of a second, if there is one), by block
    permutation. Found means: three segments, p below 0.05; in both series three levels do better than smooth monotone
    curves and than one step with a decay; both fall from I to III, with 95% intervals below 0; and the pass rate rises
    fastest in I. `reason` says what was found or which of this failed. Raises ValueError for unequal lengths.
    """
    columns = [np.asarray(x, float) for x in (reward_std, orthogonality)]
    columns += [np.full(len(columns[0]), math.nan) if pass_rate is None else np.asarray(pass_rate, float)]
    columns += [np.arange(len(columns[0]), dtype=float) if steps is None else np.asarray(steps, float)]
    if any(column.shape != columns[0].shape or column.ndim != 1 for column in columns):
        raise ValueError(f"series of unequal lengths: {', '.join(str(column.shape) for column in columns)}")
    table = np.stack(columns, axis=1)
    table = table[np.isfinite(table[:, [0, 1, 3]]).all(axis=1)]  # [n, 4]
    result: dict[str, Any] = {"found": False, "segments": 1, "boundaries": [], "intervals": [], "p_value": math.nan,
                              "levels": [], "reason": ""}
    constant = [name for name, column in zip(NAMES, table.T, strict=False) if len(np.unique(column)) < 2]
    if len(table) < SHORTEST or constant:
        short = f"{len(table)} steps have both measures, {SHORTEST} are needed"
        return result | {"reason": short if len(table) < SHORTEST else f"constant: {' and '.join(constant)}"}
    if len(table) > 400:
        width = math.ceil(len(table) / 300)
        parts = np.array_split(table, len(table) // width)
        table = np.stack([np.append(part[:, :3].mean(axis=0), part[0, 3]) for part in parts])
    return result | decide(table[:, :2], table[:, 2], table[:, 3], np.random.default_rng(seed), draws)


def decide(
    series: np.ndarray, pass_rate: np.ndarray, steps: np.ndarray, rng: np.random.Generator, draws: int
) -> dict[str, Any]:
    """detect_phases of clean series: [n, 2] of reward deviation and orthogonality, [n], [n]."""
    n, spread = len(series), series.std(axis=0)
    scaled, least = (series - series.mean(axis=0)) / spread, max(5, len(series) // 20)
    breaks = {k: split(scaled, k, least) for k in (1, 2, 3)}
    # Nats, a row a series: ln(n)/2 a level, and ln(n), for one of n places, a boundary that the two series share.
    scores = {k: np.array([log_likelihood(y, level_columns(n, breaks[k])) for y in scaled.T])
              - (k / 2 + (k - 1) / 2) * math.log(n) for k in breaks}
    segments = max(scores, key=lambda k: scores[k].sum())
    smooth = [best_smooth(y, level_columns(n, breaks[2])[:, 1]) for y in scaled.T]
    p_value = permutation_p(scaled, max(2, segments), least, draws, rng)
    first, last = breaks[3]
    found, changes = resample_split(scaled, breaks[3], least, draws, rng)
    lows, highs = np.quantile(found, [0.025, 0.975], axis=0).round().astype(int)
    fall = series[last:].mean(axis=0) - series[:first].mean(axis=0)
    low, high = np.quantile(changes, [0.025, 0.975], axis=0) * spread
    rises = [slope(pass_rate[a:b], steps[a:b]) for a, b in ((0, first), (first, last), (last, n))]

    words = ("one segment", "two segments", "three segments")
    failed = [words[segments - 1]] if segments < 3 else []
    if segments == 3 and p_value >= 0.05:
        failed.append(f"the third segment may be chance (p = {p_value:.2f})")
    for i, name in enumerate(NAMES):
        if (lead := smooth[i][0] - scores[3][i]) >= 0:
            failed.append(f"{name}: {smooth[i][1]} beats three levels by {lead:.0f} nats")
        if high[i] >= 0:
            failed.append(f"{name} did not fall: {fall[i]:+.3f} [{low[i]:.3f}, {high[i]:.3f}]")
    if np.isfinite(rises).all() and not rises[0] > max(rises[1:]):
        failed.append("the pass rate does not rise fastest in I: " + ", ".join(f"{100 * x:+.2f}" for x in rises)
                      + " in 100 steps of I, II, III")
    good = (f"reward deviation {fall[0]:+.3f} [{low[0]:.3f}, {high[0]:.3f}] and orthogonality {fall[1]:+.3f} "
            f"[{low[1]:.3f}, {high[1]:.3f}] from I to III")
    if not np.isfinite(rises).all():
        good += "; the pass rate was not checked"
    return {
        "found": not failed, "segments": segments, "p_value": p_value, "reason": "; ".join(failed) or good,
        "boundaries": [int(steps[i]) for i in breaks[3]],
        "intervals": [[int(steps[a]), int(steps[b])] for a, b in zip(lows, highs, strict=True)],
        "levels": [series[a:b].mean(axis=0).tolist() for a, b in ((0, first), (first, last), (last, n))],
    }


# ------------------------------------------------- The curvature law --------------------------------------------------

EXPONENTS = np.linspace(-4, 8, 601)  # among which a law is sought


def power_law(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Exponent a of the weighted least-squares fit y = c * x^a, of either sign. x, y: [draws, bins] -> [draws].

    On signed averages, not on their logarithms: a bin near zero would be an outlier there. a is one of EXPONENTS.
    """
    powers = np.exp(np.log(x)[:, None, :] * EXPONENTS[:, None])  # [draws, exponents, bins]
    explained = (weights * powers * y[:, None, :]).sum(axis=2) ** 2 / (weights * powers**2).sum(axis=2)
    return EXPONENTS[explained.argmax(axis=1)]


def curvature_law(
    sigma: np.ndarray, variance: np.ndarray, curvature: np.ndarray, cluster: np.ndarray, draws: int = 400, seed: int = 0
) -> dict[str, Any]:
    """Exponent alpha of |curvature| ~ sigma^alpha, from signed curvatures averaged in bins of sigma.

    All arguments are [m]. sigma: of the half of a group that gave the direction, never of the half that gave the
    curvature, which is proportional to its own variance and would make a law of nothing; variance: unbiased reward
    variance of the other half; cluster: what was measured together, resampled as one (95% bootstrap intervals).

    alpha: against the root of the bins' mean variance of the other half, free of the noise of sigma (exact for 2, some
    tenths off far from it); alpha_raw: against sigma itself, whose noise makes any law too flat. `verdict`, of alpha:
    "undetermined" where its interval is wider than 1 or reaches the end of EXPONENTS. bins: sigma, mean, standard
    error, envelope (90% quantile of |curvature|), n.
    """
    sigma = sigma.round(9)
    values = np.unique(sigma)
    edges = values if len(values) <= 8 else np.unique(np.quantile(sigma, np.linspace(0, 1, 9))[:-1])
    bin_of = np.searchsorted(edges, sigma, side="right") - 1
    _, cluster = np.unique(cluster, return_inverse=True)
    sums = np.zeros((4, cluster.max(initial=-1) + 1, len(edges)))  # [quantity, cluster, bin]
    for row, value in zip(sums, (np.ones_like(sigma), sigma, variance, curvature), strict=True):
        np.add.at(row, (cluster, bin_of), value)
    counts = sums[0].sum(axis=0)
    kept = [k for k in range(len(edges)) if counts[k] >= 10 and sums[2, :, k].sum() > 0]
    result: dict[str, Any] = {"n": len(sigma), "bins": [], "verdict": "undetermined"}
    if len(kept) < 3:
        return result | {"reason": f"{len(kept)} values of sigma with 10 curvatures or more, 3 are needed"}
    groups = [curvature[bin_of == k] for k in kept]
    errors = np.array([stats.sem(group) for group in groups])
    rng = np.random.default_rng(seed)
    chosen = rng.multinomial(sums.shape[1], np.full(sums.shape[1], 1 / sums.shape[1]), size=draws)
    chosen = np.concatenate([np.ones((1, sums.shape[1]), int), chosen])  # the data first, then the draws
    drawn = np.einsum("dc,qcb->qdb", chosen, sums[:, :, kept])  # [quantity, 1 + draws, bins]
    full = (drawn[0] > 0).all(axis=1) & (drawn[2] > 0).all(axis=1)
    if full.mean() < 0.9:  # what is left would be a selection
        return result | {"reason": "too few probes for an interval"}
    result["bins"] = [
        {"sigma": float(sums[1, :, k].sum() / counts[k]), "mean": float(group.mean()), "error": float(error),
         "envelope": float(np.quantile(np.abs(group), 0.9)), "n": len(group)}
        for k, group, error in zip(kept, groups, errors, strict=True)]
    count, sigmas, variances, means = drawn[0, full], drawn[1, full], drawn[2, full], drawn[3, full]
    weights = 1 / np.maximum(errors, 1e-9 * np.abs(curvature).max() + 1e-100) ** 2
    for name, x in (("alpha_raw", sigmas / count), ("alpha", np.sqrt(variances / count))):
        found = power_law(x, means / count, weights)
        low, high = np.quantile(found[1:], [0.025, 0.975])
        result |= {name: float(found[0]), f"{name}_interval": [float(low), float(high)]}
    low, high = result["alpha_interval"]
    sure = {float(np.sign(group.mean())) for group, error in zip(groups, errors, strict=True)
            if abs(group.mean()) > 2 * error}
    if len(sure) == 2:
        result["verdict"] = "no power law, the mean changes its sign"
    elif high - low <= 1 and EXPONENTS[0] < low and high < EXPONENTS[-1]:
        held = [str(reference) for reference in (1, 2) if low <= reference <= high]
        result["verdict"] = f"agrees with {' and '.join(held)}" if held else "neither 1 nor 2"
    return result


def curvature_laws(runs: list[Run]) -> dict[str, Any]:
    """curvature_law of all runs' probes, for pass rates below and above 1/2 (of the half that gave the direction).

    Curvature and sigma both change while training goes on, which pooled would look like a law of the two: `thirds` has
    alpha and its interval for each third of the steps, and where two of these exclude each other there is no one law.
    """
    table = pd.concat([run.halves.assign(cluster=f"{i} ") for i, run in enumerate(runs)])
    table["cluster"] += table["step"].astype(str)
    table["third"] = 3 * table["step"] // (table["step"].max() + 1)

    def fit(rows: pd.DataFrame) -> dict[str, Any]:
        return curvature_law(*(rows[name].to_numpy() for name in ("sigma", "variance", "curvature", "cluster")))

    laws = {}
    for side, rows in {"below": table[table["rate"] < 0.5], "above": table[table["rate"] > 0.5]}.items():
        law, parts = fit(rows), [fit(rows[rows["third"] == i]) for i in range(3)]
        law["thirds"] = [[part["alpha"], *part["alpha_interval"]] if part["bins"] else [math.nan] * 3 for part in parts]
        _, lows, highs = np.array(law["thirds"]).T
        if law["bins"] and np.fmax.reduce(lows) > np.fmin.reduce(highs):  # of those that there are
            law["verdict"] = "no single power law, α changes during training"
        laws[side] = law
    return laws


# ------------------------------------------------ Comparison of norms -------------------------------------------------


def mean_interval(values: Iterable[float]) -> list[float]:
    """Mean, and its 95% interval by Student's t over runs; NaN for the interval of fewer than three.

    Not by bootstrap: means of three to five resampled runs never leave their range, and cover 75% to 94%.
    """
    known = np.array([value for value in values if math.isfinite(value)])
    if len(known) < 3:
        return [float(known.mean()) if len(known) else math.nan, math.nan, math.nan]
    half = stats.t.ppf(0.975, len(known) - 1) * stats.sem(known)
    return [float(known.mean()), float(known.mean() - half), float(known.mean() + half)]


def together(runs: list[Run], key: str) -> pd.DataFrame:
    """A series of all runs side by side, [steps, runs]."""
    return pd.concat([run.log[key] for run in runs], axis=1)


def windows(table: Any, count: int = 30) -> Any:
    """Means of about `count` windows of a table or series over steps, indexed by their middle steps."""
    window = table.index // max(1, math.ceil((table.index[-1] + 1) / count))
    return table.groupby(window).mean().set_axis(table.index.to_series().groupby(window).mean().to_numpy())


def all_reached(steps: Sequence[float]) -> list[float]:
    """mean_interval of steps to a target, or of what is computed from them; NaN unless every run has reached it."""
    return mean_interval(steps) if all(map(math.isfinite, steps)) else [math.nan] * 3


def curve(table: pd.DataFrame) -> list[list[float]]:
    """Step, mean and interval over runs of every window: [windows, 4]."""
    return [[float(step), *mean_interval(row)] for step, row in zip(table.index, table.to_numpy(), strict=True)]


def last_tenth(run: Run) -> float:
    """Mean pass rate of the last tenth of the steps."""
    rates = run.log["pass_rate"].dropna()
    return float(rates.iloc[-max(1, len(rates) // 10) :].mean())


def reach(run: Run, levels: np.ndarray) -> np.ndarray:
    """Steps at which the pass rate, a mean of windows, first reaches the levels; NaN where it never does."""
    best = windows(run.log["pass_rate"]).dropna().cummax().drop_duplicates()
    return np.interp(levels, best, best.index, right=math.nan) if len(best) else np.full(len(levels), math.nan)


def predicted(run: Run, start: float, stop: float) -> list[float]:
    """Predicted speed-up over steps start to stop of a run without normalization, of every one of KINDS.

    As sampled: the harmonic mean of its log's predicted gain, since what took it one step takes 1/gain. Noise removed:
    signal_gain over signal share, means of these steps; NaN where the share is not two standard errors above 0.
    """
    inside = run.log[(run.log.index >= start) & (run.log.index <= stop)].dropna(subset="predicted_gain")
    gain, above, share = (inside[key] for key in ("predicted_gain", "signal_gain", "signal_share"))
    sampled = float(stats.hmean(gain)) if len(gain) and (gain > 0).all() else math.nan
    return [sampled, above.mean() / share.mean() if share.mean() > 2 * share.sem() else math.nan]


def growth(ours: Run, other: Run, boundaries: list[int]) -> list[float]:
    """Growth of the gain in pass rate of one run over another in 100 steps of I, II and III."""
    gain = (ours.log["pass_rate"] - other.log["pass_rate"]).dropna()
    edges = [0, *boundaries, math.inf]
    parts = [gain[(gain.index >= a) & (gain.index < b)] for a, b in zip(edges, edges[1:], strict=False)]
    return [100 * slope(part.to_numpy(), part.index.to_numpy()) for part in parts] if boundaries else [math.nan] * 3


def rank_correlation(pairs: np.ndarray, draws: int = 400) -> list[float]:
    """Spearman's correlation of [pairs, k, 2], and its 95% interval by bootstrap over pairs, if there are 4 or more."""

    def rank(rows: np.ndarray) -> float:
        x, y = pairs[rows].reshape(-1, 2).T
        known = np.isfinite(x) & np.isfinite(y)
        if known.sum() < 3 or np.ptp(x[known]) == 0 or np.ptp(y[known]) == 0:
            return math.nan
        return float(stats.spearmanr(x[known], y[known]).statistic)

    rng, n = np.random.default_rng(0), len(pairs)
    drawn = [rank(rng.integers(n, size=n)) for _ in range(draws)] if n >= 4 else [math.nan]
    known = [rho for rho in drawn if math.isfinite(rho)] or [math.nan]
    return [rank(np.arange(n)), *(float(value) for value in np.quantile(known, [0.025, 0.975]))]


def against_none(ours: list[Run], others: list[Run], target: float, phases: dict[str, Any]) -> dict[str, Any]:
    """Runs of a norm against runs without normalization, paired by seed: gain, its growth, speed-up and prediction."""
    by_seed = {run.config["seed"]: run for run in others}
    pairs = [(run, by_seed[run.config["seed"]]) for run in ours if run.config["seed"] in by_seed]
    if not pairs:
        return {"pairs": 0, "measured": [], "bands": []}
    gains = windows(pd.concat([run.log["pass_rate"] - other.log["pass_rate"] for run, other in pairs], axis=1))
    grown = [growth(run, other, phases[str(run.path)]["boundaries"]) for run, other in pairs]
    std = ours[0].config["norm"] == "std"  # the prediction speaks of steps 1/sigma
    foresee = predicted if std else lambda *_: [math.nan] * 2
    measured, bands = [], []  # [speed-up, *predicted] of each pair: to the target, and in five rises on the way
    for run, other in pairs:
        start = max(float(windows(r.log["pass_rate"]).iloc[0]) for r in (run, other))
        levels = np.linspace(min(start, target), target, 6)
        fast, slow = reach(run, levels), reach(other, levels)
        ratio = slow[-1] / fast[-1] if start < target else math.nan  # no race where one begins beyond the end
        measured.append([ratio, *foresee(other, 0, slow[-1])])
        took, needed = (np.where(np.diff(x) > 0, np.diff(x), math.nan) for x in (slow, fast))
        foreseen = [foresee(other, a, b) for a, b in zip(slow, slow[1:], strict=False)]
        bands.append(np.column_stack([took / needed, foreseen]).tolist())
    ratios, *columns = np.array(measured).T
    by_kind = dict(zip(KINDS, columns, strict=True))
    return {
        "pairs": len(pairs), "gain": curve(gains),
        "final_gain": mean_interval([last_tenth(run) - last_tenth(other) for run, other in pairs]),
        "growth": [mean_interval([row[i] for row in grown]) for i in range(3)],
        "growth_III_less_I": mean_interval([row[2] - row[0] for row in grown]),
        "speed_up": np.exp(all_reached(np.log(ratios))).tolist(),
        "predicted_speed_up": {kind: all_reached(gain) for kind, gain in by_kind.items()},
        "over_predicted": {kind: np.exp(all_reached(np.log(ratios / gain))).tolist() for kind, gain in by_kind.items()},
        "measured": measured, "bands": bands,
    }


def compare(runs: list[Run], phases: dict[str, Any], decides: str, target: float | None) -> dict[str, Any]:
    """Runs that differ in norm, seed and learning rate alone: each norm at its best rate, and against `none`.

    One run a norm, rate and seed; those of the best rates as far as each of them goes.
    """

    def end(run: Run) -> int:
        """Its last step."""
        return int(run.log["reward_std"].last_valid_index())

    def merit(tried: dict[int, Run]) -> tuple[int, float]:
        """Of a rate: how far its runs went, as one that came to no end is not the best, then their mean pass rate."""
        return min(map(end, tried.values())), float(np.mean([run.log["pass_rate"].mean() for run in tried.values()]))

    arms: dict[str, dict[float, dict[int, Run]]] = {}
    for run in runs:
        by_rate = arms.setdefault(run.config["norm"], {})
        by_rate.setdefault(number(run.config.get("lr")), {}).setdefault(run.config["seed"], run)
    best = {norm: max(by_rate, key=lambda lr: merit(by_rate[lr])) for norm, by_rate in arms.items()}
    whole = [run for norm in arms for run in arms[norm][best[norm]].values()]
    short = len({int(run.log.index[-1]) for run in whole}) > 1  # some were stopped, or are still running
    last = min(end(run) if short else int(run.log.index[-1]) for run in whole)
    last = max(last, *(int(run.log.index[0]) for run in whole))  # a log may have lost its beginning
    chosen = {norm: [replace(run, log=run.log.loc[:last]) for run in arms[norm][best[norm]].values()] for norm in arms}
    finals = {norm: [last_tenth(run) for run in arm] for norm, arm in chosen.items()}
    goal = float(0.9 * min(np.mean(rates) for rates in finals.values())) if target is None else target
    norms = {}
    for norm, arm in chosen.items():
        steps = [float(reach(run, np.array([goal]))[0]) for run in arm]
        norms[norm] = {
            "lr": best[norm], "rates": sorted(arms[norm]), "runs": [str(run.path) for run in arm],
            "curve": curve(windows(together(arm, "pass_rate"))), "pass_rate": mean_interval(finals[norm]),
            "held_out": mean_interval([[math.nan, *run.log["eval_pass_rate"].dropna()][-1] for run in arm]),
            "steps_to_target": all_reached(steps), "reached": int(np.isfinite(steps).sum()),
            "phases": run_phases(arm) if len(arm) > 1 else phases[str(arm[0].path)],
        }
    used = [run for rates in arms.values() for by_seed in rates.values() for run in by_seed.values()]
    others = [norm for norm in chosen if norm != "none" and "none" in chosen]
    splits = {path: found[decides] for path, found in phases.items()}
    return {"last_step": last, "cut": short, "target": goal, "norms": norms,
            "law": curvature_laws(used),
            "twice": sorted(str(run.path) for run in runs if run.path not in {run.path for run in used}),
            "against_none": {norm: against_none(chosen[norm], chosen["none"], goal, splits) for norm in others}}


def run_phases(runs: list[Run]) -> dict[str, dict[str, Any]]:
    """detect_phases of a run, or of the mean of several, with either measure of orthogonality."""
    mean = {key: together(runs, key).mean(axis=1, skipna=False)
            for key in ("reward_std", "pass_rate", "sampled", "corrected")}
    steps = mean["reward_std"].index
    return {kind: detect_phases(mean["reward_std"], mean[kind], mean["pass_rate"], steps)
            for kind in ("sampled", "corrected")}


# ------------------------------------------------------- Report -------------------------------------------------------


def group_runs(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs that may be compared, under the settings in which their group differs from the others."""
    configs = [{name: value for name, value in run.config.items() if name not in FREE} for run in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    differ = [name for name in names if any(config.get(name) != configs[0].get(name) for config in configs)]
    groups: dict[str, list[Run]] = {}
    titles: dict[str, str] = {}  # of the settings in full: two of them may look alike when cut short
    for run, config in zip(runs, configs, strict=True):
        told = [name for name in differ or ("task", "model") if name in config]
        title = ", ".join(f"{name} {' '.join(str(config[name]).split())[-40:]}" for name in told) or "equal settings"
        key = json.dumps([config.get(name) for name in differ])
        titles.setdefault(key, f"{title} ({len(groups) + 1})" if title in groups else title)
        groups.setdefault(titles[key], []).append(run)
    return groups


def show(values: Sequence[float], digits: int = 3) -> str:
    """A mean with its interval, if it has one."""
    if not math.isfinite(values[0]):
        return "-"
    interval = f" [{values[1]:.{digits}f}, {values[2]:.{digits}f}]" if math.isfinite(values[1]) else ""
    return f"{values[0]:.{digits}f}{interval}"


ORDINALS = ("", "second", "second", "third")  # the segment that a p-value is about, by the number supported


def phase_lines(name: str, phases: dict[str, Any], decides: str) -> list[str]:
    """What the report says of a run's phases."""
    words = {kind: "found" if phase["found"] else "not found" if phase["boundaries"] else "not decided"
             for kind, phase in phases.items()}
    lines = ["", f"**{name}: {'three phases ' * phases[decides]['found']}{words[decides]}**", ""]
    for kind, names in KINDS.items():
        phase = phases[kind]
        lines.append(f"- {', '.join(names)}: {words[kind]}: {phase['reason']}")
        if phase["boundaries"]:
            (a, b), (i, j) = phase["boundaries"], phase["intervals"]
            sigma, angle = (" → ".join(f"{level[k]:.3f}" for level in phase["levels"]) for k in (0, 1))
            lines.append(f"  best split: II from step {a} [{i[0]}, {i[1]}], III from {b} [{j[0]}, {j[1]}]; σ {sigma}; "
                         f"orthogonality {angle}; p = {phase['p_value']:.3f} for a {ORDINALS[phase['segments']]} level")
    both = all(phase["boundaries"] for phase in phases.values())  # and not too short a series
    if both and phases["sampled"]["found"] and not phases["corrected"]["found"]:
        lines.append("- the two disagree: what changed between the phases may be the sampling noise alone")
    elif both and phases["corrected"]["found"] and not phases["sampled"]["found"]:
        lines.append("- the two disagree: sampling noise hides what changed in the geometry")
    return lines


def norm_lines(group: dict[str, Any]) -> list[str]:
    """What the report says of the norms of a group, side by side and against `none`."""
    goal = f"{group['target']:.2f}"
    title = f"| norm | learning rate | runs | pass rate, last tenth | held out | steps to {goal} |"
    lines = ["", title, "|---" * 6 + "|"]
    for norm, arm in group["norms"].items():
        tried = len(arm["rates"])
        rate = f"{arm['lr']:g}" + (f" (best of {tried}, by mean pass rate of these same runs)" if tried > 1 else "")
        runs, all_of_them = len(arm["runs"]), arm["reached"] == len(arm["runs"])
        steps = show(arm["steps_to_target"], 0) if all_of_them else f"reached by {arm['reached']} of {runs}"
        lines.append(f"| {norm} | {rate} | {runs} | {show(arm['pass_rate'])} | {show(arm['held_out'])} | {steps} |")
    if group["cut"]:
        lines += ["", f"Compared up to step {group['last_step']}, the last that all of these runs have."]
    lines += [f"\nleft out, its norm, rate and seed are there already: {path}" for path in group["twice"]]
    for norm, found in group["against_none"].items():
        if not found["pairs"]:
            lines += ["", f"{norm} and none have no seed in common: not compared."]
            continue
        _, low, high = found["growth_III_less_I"]
        verdict = "yes" if high < 0 else "no" if low > 0 else "undetermined"
        lines += [
            "", f"{norm} − none, paired by seed, {found['pairs']} pairs:", "",
            f"- final gain in pass rate {show(found['final_gain'])}",
            "- its growth in 100 steps of I, II, III (best split, whether found or not): "
            + ", ".join(show(value, 4) for value in found["growth"]),
            f"- less growth in III than in I: {verdict} ({show(found['growth_III_less_I'], 4)})",
            f"- speed-up to {goal}: measured {show(found['speed_up'])}"]
        for kind, (_, how) in KINDS.items() if norm == "std" else ():
            lines.append(f"  predicted from gradients {how}: {show(found['predicted_speed_up'][kind])}; measured over "
                         f"predicted: {show(found['over_predicted'][kind])}")
    return lines


def law_lines(law: dict[str, Any]) -> list[str]:
    """What the report says of |curvature| ~ sigma^alpha."""
    lines = ["", "Curvature along the gradient, |curvature| ∝ σ^α (references: 1 the bound, 2 the variance), by σ and "
             "pass rate of the half of a group that gave the direction; the 90% are of single, noisy estimates:"]
    for side, title in (("below", "pass rate < ½"), ("above", "pass rate > ½")):
        found = law[side]
        if not found["bins"]:
            lines += ["", f"- {title}, n = {found['n']}: undetermined, {found['reason']}"]
            continue
        (low, high), raw = found["alpha_interval"], [found["alpha_raw"], *found["alpha_raw_interval"]]
        known = f", α = {show([found['alpha'], low, high], 2)} (against σ with its noise {show(raw, 2)})"
        inside = EXPONENTS[0] < low and high < EXPONENTS[-1]
        thirds = ", ".join(show(part, 2) for part in found["thirds"])
        lines += ["", f"- {title}, n = {found['n']}: **{found['verdict']}**{known if inside else ''}; α in the first, "
                  f"second and last third of the steps: {thirds}", "",
                  "  | σ | mean curvature ± standard error | 90% of \\|curvature\\| below | the same over σ | n |",
                  "  " + "|---" * 5 + "|"]
        lines += [f"  | {b['sigma']:.3f} | {b['mean']:.4g} ± {b['error']:.2g} | {b['envelope']:.4g} | "
                  f"{b['envelope'] / b['sigma']:.4g} | {b['n']} |" for b in found["bins"]]
    return lines


def write_report(analysis: dict[str, Any]) -> str:
    """The analysis as Markdown."""
    decides, lines = analysis["orthogonality"], ["# Phases", ""]
    for kind, (_, how) in KINDS.items():
        all_phases = [run["phases"][kind] for run in analysis["runs"].values()]
        decided = [phase["found"] for phase in all_phases if phase["boundaries"]]
        lines.append(f"Three phases, orthogonality {how}: found in {sum(decided)} of {len(decided)} runs"
                     + f", not decided in {len(all_phases) - len(decided)}" * (len(decided) < len(all_phases)) + ".\n")
    for path, run in analysis["runs"].items():
        lines += phase_lines(f"{path}, norm {run['norm']}, {run['steps']} steps", run["phases"], decides)
        lines += [f"- {run['skipped']} unreadable log lines skipped"] if run["skipped"] else []
    for title, group in analysis["groups"].items():
        lines += ["", f"# Runs with {title}"]
        for norm, arm in group["norms"].items():
            if len(arm["runs"]) > 1:
                lines += phase_lines(f"mean of {len(arm['runs'])} runs, norm {norm}", arm["phases"], decides)
        lines += [*norm_lines(group), *law_lines(group["law"])]
    if analysis["prediction"]:
        lines += ["", "# Does the predicted gain predict?", ""]
        lines += ["Rank correlation of measured and predicted speed-up, over `none`:", ""]
        lines += [f"- {name}: {show(rho, 2)} ({n} pairs of runs)" for name, (rho, n) in analysis["prediction"].items()]
    return "\n".join([*lines, *(f"\nleft out: {problem}" for problem in analysis["left_out"])]) + "\n"


def analyse(runs: list[Run], problems: list[str], decides: str, target: float | None) -> dict[str, Any]:
    """All numbers of the report."""
    phases = {str(run.path): run_phases([run]) for run in runs}
    groups = {title: compare(members, phases, decides, target) for title, members in group_runs(runs).items()}
    compared = [group["against_none"]["std"] for group in groups.values() if "std" in group["against_none"]]
    tables: dict[str, np.ndarray] = {}
    for way, key, count in (("run by run", "measured", 1), ("in five equal rises of the pass rate", "bands", 5)):
        pairs = np.array([pair for found in compared for pair in found[key]]).reshape(-1, count, 3)
        tables |= {f"{way}, gradients {how}": pairs[..., [0, 1 + i]] for i, (_, how) in enumerate(KINDS.values())}
    return {
        "orthogonality": decides,
        "runs": {str(run.path): {"norm": run.config["norm"], "seed": run.config["seed"], "skipped": run.skipped,
                                 "steps": int(run.log["reward_std"].count()), "phases": phases[str(run.path)]}
                 for run in runs},
        "groups": groups, "left_out": problems,
        "prediction": {name: (rank_correlation(table), len(table)) for name, table in tables.items() if len(table)},
    }


# ------------------------------------------------------ Picture -------------------------------------------------------

# Okabe and Ito's colours, told apart by colour-blind readers; every norm has its dash as well.
STYLES = {"none": ("#0072B2", "--"), "std": ("#D55E00", "-"), "var": ("#009E73", "-."), "batch": ("#CC79A7", ":")}


def draw_series(axis: Any, runs: list[Run], key: str, norm: str) -> None:
    """A series averaged over windows and runs, with its 95% interval over three runs or more."""
    colour, dash = STYLES.get(norm, ("black", "-"))
    steps, mean, low, high = np.array(curve(windows(together(runs, key)))).T
    axis.plot(steps, mean, dash, color=colour, label=f"{norm} ({len(runs)})")
    axis.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)


def draw_phases(axis: Any, phase: dict[str, Any], last: int) -> None:
    """The three segments shaded and named I, II, III (1, 2, 3 if not found), their boundaries' intervals darker."""
    edges, names = [0, *phase["boundaries"], last], ("I", "II", "III") if phase["found"] else ("1", "2", "3")
    for (low, high), step in zip(phase["intervals"], phase["boundaries"], strict=True):
        axis.axvspan(low, high, color="grey", alpha=0.35, linewidth=0)
        axis.axvline(step, color="black", linewidth=0.8)
    for i, (a, b) in enumerate(zip(edges, edges[1:], strict=False) if phase["boundaries"] else []):
        axis.axvspan(a, b, color="grey", alpha=(0.12, 0.0, 0.12)[i], linewidth=0)
        axis.text((a + b) / 2, 1.02, names[i], transform=axis.get_xaxis_transform(), ha="center", fontsize=9)


def draw_law(axis: Any, law: dict[str, Any]) -> None:
    """|mean curvature| against sigma on log axes with its envelope, and lines of slope 1 and 2 through the highest."""
    points = []
    for side, title, colour in (("below", "pass rate < ½", "#0072B2"), ("above", "pass rate > ½", "#D55E00")):
        for i, row in enumerate(law[side]["bins"]):
            size, up = abs(row["mean"]), row["mean"] > 0
            error = [[min(row["error"], 0.9 * size)], [row["error"]]]  # what reaches 0 has no place on a log axis
            axis.errorbar(row["sigma"], size, error, color=colour, capsize=2, marker="^" if up else "v")
            axis.plot(row["sigma"], row["envelope"], "o", color=colour, mfc="none", label=title if i == 0 else None)
            points.append((row["envelope"], row["sigma"]))
    axis.set(xlabel="σ of the half that gave the direction (reward)", ylabel="curvature (reward / parameter²)")
    if not points:
        axis.text(0.5, 0.5, "too few curvatures", transform=axis.transAxes, ha="center")
        return
    y0, x0 = max(points)
    x = np.array([min(sigma for _, sigma in points) / 1.1, max(sigma for _, sigma in points) * 1.1])
    axis.plot(x, y0 * (x / x0), "-k", linewidth=1, label="∝ σ, the bound")
    axis.plot(x, y0 * (x / x0) ** 2, ":k", linewidth=1, label="∝ σ², the variance")
    axis.set(xscale="log", yscale="log")
    axis.set_ylim(bottom=axis.get_ylim()[0] / 30)  # room for the legend
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 4, 5)))
    axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%.1f"))
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axis.set_title("○ 90% lie below   ▲▼ |mean|, sign ±", fontsize=8)
    axis.legend(fontsize=7, loc="lower left")


def draw_picture(path: Path, runs: list[Run], group: dict[str, Any], decides: str, title: str) -> None:
    """phases.png: a group's pass rate, reward deviation, orthogonality, predicted gain and curvature."""
    by_path = {str(run.path): run for run in runs}
    arms = {norm: [by_path[name] for name in arm["runs"]] for norm, arm in group["norms"].items()}
    shaded = "std" if "std" in arms else next(iter(arms))
    phases, last = group["norms"][shaded]["phases"], max(1, *(int(run.log.index[-1]) for run in runs))
    phase = phases[decides]
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    panels = {"pass_rate": "pass rate (training prompts)", "reward_std": "mean σ within prompts (reward)",
              "sampled": "orthogonality: 1 − mean |cos|", "corrected": "without noise: 1 − cosine",
              "predicted_gain": "predicted gain, as sampled (ratio)"}
    for axis, (key, label) in zip(axes.flat, panels.items(), strict=False):
        for norm, arm in arms.items():
            draw_series(axis, arm, key, norm)
        axis.set(xlabel="step", ylabel=label, xlim=(0, last))
        draw_phases(axis, phases.get(key, phase), last)
    axes[0, 0].legend(title="norm (runs)", fontsize=8, title_fontsize=8)
    draw_law(axes[1, 2], group["law"])
    bounds = " and ".join(f"{step} [{low}, {high}]" for step, (low, high) in
                          zip(phase["boundaries"], phase["intervals"], strict=True))
    verdict = "three phases found" if phase["found"] else "three phases NOT found; shaded is the best split"
    verdict += f", boundaries at step {bounds}" if bounds else ""
    figure.suptitle(f"{title}; norm {shaded}: {verdict}".replace("$", r"\$"), fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---------------------------------------------------- Command line ----------------------------------------------------


WRITTEN = ("analysis.md", "analysis.json", "phases.png")


class Parser(argparse.ArgumentParser):
    """A wrong flag or value is one line and exit status 2."""

    def error(self, message: str) -> Any:
        self.exit(2, f"analyze.py: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(prog="analyze.py", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories of grpo.py")
    parser.add_argument("--orthogonality", choices=["sampled", "corrected"], default="sampled",
                        help="the measure that decides; the report has both")
    parser.add_argument("--target", type=float, help="pass rate to reach; without it 0.9 of the lowest final one")
    parser.add_argument("--out", type=Path, help="directory of report and picture")
    given = parser.parse_args(arguments)
    if given.target is not None and not math.isfinite(given.target):
        parser.error(f"--target is {given.target}, not a finite number")
    runs, problems = [], []
    for path in {path.resolve(): path for path in given.runs if path.name not in WRITTEN}.values():
        try:
            runs.append(read_run(path))
        except ValueError as error:
            problems.append(str(error))
    if not runs:
        parser.error(f"no run to read: {'; '.join(problems) or 'reports alone'}")
    parents = os.path.commonpath([run.path.absolute() for run in runs])
    out = given.out or (runs[0].path if len(runs) == 1 else Path(os.path.relpath(parents)))
    analysis, groups = analyse(runs, problems, given.orthogonality, given.target), group_runs(runs)
    report, title = write_report(analysis), next(iter(groups))
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "analysis.md").write_text(report, encoding="utf-8", errors="backslashreplace")
        plain = json.loads(json.dumps(analysis), parse_constant=lambda _: None)  # JSON has no NaN
        (out / "analysis.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
        draw_picture(out / "phases.png", groups[title], analysis["groups"][title], given.orthogonality, title)
    except OSError as error:
        parser.error(f"cannot write to {out}: {error.strerror}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    pictured = f" (of the runs with {title})" if len(groups) > 1 else ""
    with contextlib.suppress(BrokenPipeError):
        print(f"{report}\nwritten: analysis.md, analysis.json and phases.png{pictured} in {out}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
