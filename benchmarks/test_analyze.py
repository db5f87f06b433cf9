"""Tests of analyze.py: by hand, by another method, and on data of known truth, of which the slow
ones (`GRPO_SLOW=1 pytest`) count how often intervals cover it."""

import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import analyze  # noqa: E402
import grpo  # noqa: E402

slow = pytest.mark.skipif(not os.environ.get("GRPO_SLOW"), reason="slow: set GRPO_SLOW=1")

# -------------------------------------------- phases ----------------------------------------------

SHAPES = dict(level=[0, 0, 1, 1], narrows=[0, 0, 1, 0.4], none=[0] * 4, grows=[0, 0.3, 0.7, 1])
SHAPES |= dict(constant=[1] * 4, late=[0, 0, 0.5, 1], behind=[-1, -1, 0, 0], lead=[0.7, 0.7, 1, 1])
HOW = "", " smooth", " onsets", " smooth onsets"
TRUE = [f"{name}{how}" for name in ("level", "narrows") for how in HOW]
FALSE = ["none", "grows", "late", "constant", "behind", "lead", "dip", "once", "curve"]


def detected(kind: str, count: int) -> tuple[float, float]:
    """Shares of series (4 runs, 300 steps, AR(1) noise) with phases found, and with both boundaries
    within 15 steps."""
    rng = np.random.default_rng(7)
    t = np.arange(300)
    found = 0
    close = 0
    for _ in range(count):
        top, a = rng.uniform(0.05, 0.06), rng.uniform(60, 130)
        b = rng.uniform(a + 50, 230)
        gap = 0.02 * rng.normal(size=(4, 300))
        for i in range(1, 300):
            gap[:, i] = 0.3 * gap[:, i - 1] + math.sqrt(1 - 0.3**2) * gap[:, i]
        walk = np.cumsum(rng.normal(size=300)) / math.sqrt(300)
        for row, shift in zip(gap, rng.uniform(-15, 15, 4) * ("onsets" in kind), strict=True):
            knots = [0, a + shift, b + shift, 300] if kind != "late" else [0, a, (a + 300) / 2, 300]
            shape = np.interp(t, knots, SHAPES.get(kind.split()[0], [0] * 4))
            if kind == "walk":
                shape = walk
            elif kind == "dip":
                shape = np.interp(t, [a, (a + b) / 2, b], [0, -1, 0])
            elif kind in ("once", "curve"):  # opens from the start on
                shape = np.interp(t, [0, b / 2, b], [0, 0.75 if kind == "curve" else 0.5, 1])
            smooth = np.convolve(np.pad(shape, 6, "edge"), np.ones(12) / 12, "same")[6:-6]
            row += top * (smooth if "smooth" in kind else shape)
        result = analyze.detect_phases(gap, 0 * gap, 0 * gap)
        found += result["found"]
        close += np.abs(np.subtract(result["boundaries"], (a, b))).max() <= 15
    return found / count, close / count


def test_detect_phases_finds_planted_ones():
    # At a share of 0.85 there are fewer once in 350 times.
    assert detected("level smooth onsets", 8)[0] >= 5 / 8


def test_detect_phases_finds_none_where_there_are_none():
    assert sum(detected(kind, 1)[0] for kind in FALSE) <= 1


@slow
@pytest.mark.parametrize("kind", [*TRUE, *FALSE, "walk"])
def test_detect_phases_on_series_of_every_kind(kind):
    # "once" is found most often of those without phases, 3% of 400: a hundred are too few to say.
    found, close = detected(kind, 200 if kind == "once" else 100)
    if kind in TRUE:
        assert found >= 0.85 and close >= 0.6
    else:
        assert found <= (0.2 if kind == "walk" else 0.05)


def brute(y: np.ndarray, count: int) -> tuple[float, tuple[int, ...], np.ndarray]:
    """Sum of squares, knots and residuals of the best broken line through 30 values, by a
    regression for each."""
    t = np.arange(30)
    found = []
    for knots in itertools.combinations([0, *range(3, 28)], count):
        if all(b - a >= 3 for a, b in itertools.pairwise(knots)):
            columns = np.stack([t**0, *(np.clip(t - k, 0, None) for k in knots)], axis=1)
            left = y - columns @ np.linalg.lstsq(columns, y, rcond=None)[0]
            found.append((float(left @ left), knots, left))
    return min(found, key=lambda fit: fit[0])


@pytest.mark.parametrize(("seed", "lasting"), [(0, 0.0), (1, 0.0), (5, 0.8)])
def test_detect_phases_takes_the_best_of_all_lines(seed, lasting):
    """Noise that lasts from window to window makes fewer windows of them, and fewer knots."""
    line = np.interp(np.arange(30), [0, 10, 20, 30], [0, 0, 1 + seed, 1]) * (lasting == 0)
    y = 0.3 * np.random.default_rng(seed).normal(size=30)
    for i in range(1, 30):
        y[i] += lasting * y[i - 1]
    y += line
    fits = [brute(y, count) for count in range(4)]
    noise = fits[3][2]
    rho = max(0, noise[1:] @ noise[:-1] / (noise @ noise))
    size = 30 * (1 - rho) / (1 + rho)
    costs = [(1 + 2 * k) * math.log(size) for k in range(4)]
    scores = [size * math.log(left) + cost for (left, _, _), cost in zip(fits, costs)]
    result = analyze.detect_phases(y, y, y)
    assert result["knots"] == np.argmin(scores)
    wider = y - noise
    a, b, c = fits[3][1]  # of three knots the third, if the gap still widens
    late = max(wider[c], wider[-1]) - wider[b] > abs(wider[b] - wider[a]) / 4
    three = [a or b, c] if late else [a, b]
    assert result["boundaries"] == (three if scores[3] < scores[2] else list(fits[2][1]))


def test_detect_phases_begins_with_the_runs_themselves():
    """Before it resamples them: their boundaries are those of their mean."""
    rng = np.random.default_rng(3)
    shape = np.interp(np.arange(60), [0, 20, 40, 60], [0, 0, 1, 1])
    runs = shape * rng.uniform(0.2, 2, size=(5, 1)) + 0.2 * rng.normal(size=(5, 60))
    mean = runs.mean(axis=0)
    assert (
        analyze.detect_phases(runs, runs, runs)["boundaries"]
        == analyze.detect_phases(mean, mean, mean)["boundaries"]
    )


def test_broken_lines_keep_their_knots_apart():
    """The first two by a tenth of 60 positions, the others by three."""
    knots, bases = analyze.broken_lines(tuple(range(60)), 3)
    assert np.diff(knots).min(axis=0).tolist() == [6, 3]
    assert knots.min(axis=0)[0] == 0 and knots.max() == 54
    assert bases.shape == (len(knots), 60, 4)


def test_bands_are_means_with_their_intervals():
    table = analyze.bands([(5, [1.0, 2.0, 3.0]), (6, [math.nan] * 3)])
    mean, low, high = analyze.mean_interval([1.0, 2.0, 3.0])
    assert table.to_dict("index") == {5: {"mean": mean, "low": low, "high": high}}
    assert low < mean < high


def test_markdown_and_number_by_hand():
    rows = {"a": {"x": 1.5}, "b": {"x": 2, "y": [0.25, 0.1, 0.4]}}
    lines = ["|  | x | y |", "| --- | --- | --- |", "| a | 1.5 |  |", "| b | 2 | 0.25 [0.1, 0.4] |"]
    assert analyze.markdown(rows) == "\n".join(lines) and analyze.markdown({}) == "Not measured."
    assert analyze.number(9e99) == 9e99 and math.isnan(analyze.number(1e100))


ALIKE, OPENS, STOPS, NOT = "alike_in_I", "opens_in_II", "stops_in_III", "not measured"
# Three runs of 0.9, 1 and 1.1 times a line: intervals are 0.248 of the effect to either side.
CASES = [
    ((0, 0, 6, 6), {}),
    ((0, 0, 6, 0), {}),
    ((1, 1, 5, 5), {ALIKE: "not seen"}),  # a quarter of 4 is within 1 +- 0.25
    ((2, 2, 6, 6), {ALIKE: "reversed"}),
    ((-6, -6, 0, 0), {ALIKE: "reversed"}),
    ((0, 0, 5, 6), {}),  # 1 +- 0.25 is below half of 5
    ((0, 0, 4, 6), {STOPS: "not seen"}),
    ((0, 0, 4, 7), {STOPS: "reversed"}),
    ((0, 0, -6, -6), {OPENS: "reversed"}),
]


@pytest.mark.parametrize(("corners", "failed"), CASES)
def test_detect_phases_judges_claims_on_lines_without_noise(corners, failed):
    scales = np.array([[0.9], [1.0], [1.1]])
    shape = np.interp(np.arange(60), [0, 20, 40, 60], corners)
    sigma = np.repeat([0.4, 0.3, 0.2], 20) * scales
    result = analyze.detect_phases(shape * scales, sigma, 0 * sigma, 5 * np.arange(60))
    claims = result["claims"]
    _, two, three = np.diff(corners) / 100
    assert result["boundaries"] == [100, 200] and result["intervals"] == [[100, 100], [200, 200]]
    found = {name: x["verdict"] for name, x in claims.items() if x["verdict"] != "holds"}
    assert found == failed | {"orthogonality_falls": "not seen"}
    values = {ALIKE: corners[0], OPENS: 100 * two, STOPS: three, "deviation_falls": -0.2}
    for name, value in values.items():
        half = 4.302653 * 0.1 / math.sqrt(3) * abs(value)  # Student's t with two degrees of freedom
        assert claims[name]["effect"] == pytest.approx(value, abs=1e-9)
        interval = pytest.approx([value - half, value + half], rel=1e-5, abs=1e-9)
        assert claims[name]["interval"] == interval
    assert result["found"] == ("alike on average to step 100" in result["reason"]) == (not failed)


def planted() -> tuple[np.ndarray, np.ndarray]:
    """A gap of 120 steps that opens from step 40 to 80, and a deviation that falls at 60: three
    runs of each."""
    shape = np.repeat(np.interp(np.arange(60), [0, 20, 40, 60], [0, 0, 6, 6]), 2)
    return np.outer([0.9, 1, 1.1], shape), np.repeat([[0.4] * 60 + [0.2] * 60], 3, axis=0)


def test_detect_phases_leaves_out_what_is_missing():
    gap, sigma = planted()
    gap[0, :10:2] = np.nan  # halves of windows
    gap[1, 100:102] = sigma[1, 118:] = np.nan  # a window of two steps
    result = analyze.detect_phases(gap, sigma, np.nan * gap)
    assert result["found"] and result["boundaries"] == [40, 80]
    assert result["claims"]["deviation_falls"]["effect"] == pytest.approx(-0.2)
    lost = result["claims"]["orthogonality_falls"]
    assert math.isnan(lost["effect"]) and lost["interval"] == [] and lost["verdict"] == NOT


@pytest.mark.parametrize(("first", "verdict"), [(10, "holds"), (20, NOT)])
def test_detect_phases_needs_three_measured_steps_in_a_phase(first, verdict):
    """Of phase I, steps 0 to 39, every tenth step is measured from 10 or from 20 on."""
    gap, sigma = planted()
    spread = np.full_like(gap, np.nan)
    spread[:, first::10] = [0.2]
    spread[:, 80:] += 0.1
    claim = analyze.detect_phases(gap, sigma, spread)["claims"]["orthogonality_falls"]
    assert claim["verdict"] == verdict
    assert claim["effect"] == pytest.approx(0.1 if verdict == "holds" else np.nan, nan_ok=True)


def test_detect_phases_of_one_pair_is_undecided():
    gap, sigma = planted()
    one = analyze.detect_phases(gap[1], sigma[0], sigma[0])
    assert not one["found"] and "run three seeds or more" in one["reason"]
    assert one["claims"][OPENS] == {"effect": pytest.approx(6), "interval": [], "verdict": NOT}
    assert one["intervals"] == []


def test_detect_phases_of_few_windows_is_undecided():
    gap, sigma = planted()
    gap[:, 60:] = gap[0, 20:22] = np.nan
    short = analyze.detect_phases(gap, sigma, sigma)
    assert short["boundaries"] == [] and short["claims"] == {}
    assert short["reason"].startswith("Undecided: 29 windows")


def test_detect_phases_without_a_gap_is_undecided():
    sigma = np.full((3, 60), 0.3)
    result = analyze.detect_phases(None, sigma, sigma)
    assert not result["found"] and result["claims"] == {} and result["boundaries"] == []
    assert "none and another norm" in result["reason"]


def test_detect_phases_refuses_unequal_shapes():
    gap, sigma = planted()
    with pytest.raises(ValueError, match="unequal shapes"):
        analyze.detect_phases(gap, sigma, sigma[:2])


def five_pairs(rates: np.ndarray) -> pd.DataFrame:
    """Rates [steps] of five seeds with noise of 0.5 points."""
    rng = np.random.default_rng(int(1e6 * rates.mean()))
    return pd.DataFrame(rates[:, None] + 0.005 * rng.normal(size=(len(rates), 5)))


def test_mere_speed_up_has_the_constant_and_the_phases_of_a_sigmoid_sped_up():
    t = np.arange(250)
    none, std = (1 / (1 + np.exp((90 - speed * t) / 18)) for speed in (1, 1.1))
    found = analyze.mere_speed_up(five_pairs(std), five_pairs(none))
    assert found["constant"] == pytest.approx(1.1, abs=0.011) and found["found"]


@slow
def test_mere_speed_up_of_a_straight_line_has_no_phases():
    t = np.arange(250)
    gap = np.interp(t, [0, 100, 150, 250], [0, 0, 0.1, 0.1])  # which are phases, by another cause
    none = five_pairs(0.2 + t / 500)
    std = five_pairs(0.2 + t / 500 + gap)
    assert analyze.detect_phases((std - none).T, 0 * none.T, 0 * none.T)["found"]
    assert not analyze.mere_speed_up(std, none)["found"]


def drifting(rng, rates: np.ndarray) -> pd.DataFrame:
    """Rates [steps] of ten runs with the noise of the toy's pairs (seeds 20 to 29 of letters, in
    the gap: 1.6 points from step to step, and 1 point that lasts for 40 steps)."""
    n = len(rates)
    slow = rng.normal(size=(n, 10)) * math.sqrt(1 - 0.975**2)
    slow[0] = rng.normal(size=10)
    for i in range(1, n):
        slow[i] += 0.975 * slow[i - 1]
    return pd.DataFrame(rates[:, None] + 0.007 * slow + 0.0115 * rng.normal(size=(n, 10)))


T = np.arange(250)
LINE = 0.2 + T / 500
OPENING = np.interp(T, [0, 60, 100, 250], [0, 0, 0.05, 0.05])
SIGMOID = 1 / (1 + np.exp((90 - T) / 18))
# Pass rates of none and std; how often of 60 phases are found, and that a speed-up has them too.
SPEED_UPS = {
    "no gap": (SIGMOID, SIGMOID, 0, 0),
    "a speed-up of 1.1": (SIGMOID, 1 / (1 + np.exp((90 - 1.1 * T) / 18)), 60, 60),
    "phases on a line": (LINE, LINE + OPENING, 58, 0),
}


@slow
@pytest.mark.parametrize("kind", SPEED_UPS)
def test_mere_speed_up_rates_are_those_in_the_report(kind):
    none, std, *expected = SPEED_UPS[kind]
    rng = np.random.default_rng(0)
    counts = np.zeros(2, int)
    for _ in range(60):
        plain = drifting(rng, none)
        normalized = drifting(rng, std)
        gap = (normalized - plain).T
        found = analyze.detect_phases(gap, 0 * gap, 0 * gap)["found"]
        counts += [found, found and analyze.mere_speed_up(normalized, plain)["found"]]
    assert counts.tolist() == expected


# ------------------------------ progress and equal overall pass rates -----------------------------


def test_run_interval_by_hand():
    """Means of 1/2, differences of 1 between eight steps: (8 / 14 * 7)^0.5 / 8 = 1/4."""
    values = pd.Series([0, 1] * 4)
    half = 2.364624 / 4  # Student's t with seven degrees of freedom
    found = analyze.run_interval(values, pd.Series([1] * 8))
    assert found == pytest.approx([0.5, 0.5 - half, 0.5 + half])
    short = analyze.run_interval(values[:7], pd.Series([1] * 7))
    assert short == pytest.approx([3 / 7, np.nan, np.nan], nan_ok=True)
    counts = pd.Series(range(8))  # steps without such a prompt, too
    assert analyze.run_interval(3 * counts, counts) == pytest.approx([3, 3, 3])


@slow
def test_run_interval_covers_the_mean_of_what_drifts():
    """A value that falls from 2 to 0 over 24 steps, of a number of prompts that varies."""
    rng = np.random.default_rng(0)
    truth = np.linspace(2, 0, 24)
    covered = 0
    for _ in range(400):
        counts = rng.binomial(16, 1 / 6, 24)
        sums = counts * truth + np.sqrt(counts) * rng.normal(size=24)
        _, low, high = analyze.run_interval(pd.Series(sums), pd.Series(counts))
        covered += low <= truth.mean() <= high
    assert covered >= 0.9 * 400


def test_same_length_is_a_ratio_of_sums_over_steps_with_both():
    """Of 3 and 4 taken and of 1 and 2 of none: 5 over the root of 5. The skipped step and the one
    without moments do not count."""
    taken, none = [3, np.nan, 4, 9], [1, 7, 2, np.nan]
    log = pd.DataFrame(dict(length_taken=taken, length_none=none, length_std=[2, 7, 4, np.nan]))
    found = analyze.same_length(log.reindex(columns=analyze.LENGTHS))
    assert found["none"] == pytest.approx(5**0.5)
    assert found["std"] == pytest.approx(5**0.5 / 2) and np.isnan(found["var"])


PARTS = {"hardest: a": ["a"], "middle: b": ["b"], "easiest: c": ["c"]}
RISE = dict(a=0.001, b=0.002, c=0.003)  # a step
LENGTHS = dict(length_none=1.0, length_std=4.0, length_var=8.0, length_batch=3.0, length_taken=2.0)


def write_progress(path: Path, seed: int = 0, **changes) -> analyze.Run:
    """A run without the division, of 120 steps on three levels that rise by RISE at every step; its
    progress is 1/0.8 of that, and under std 1, 2 and 0.5 times none's at one length."""

    def measured(step, level):
        rate = 0.1 + RISE[level] * step
        none = RISE[level] / 0.8 / 2  # as the step taken was 2 times as long
        std = 4 * none * dict(a=1, b=2, c=0.5)[level]
        wild = 99 if step < 10 else 0  # the first steps do not count
        progress = dict(progress_none=[none + 0.001 + wild, none - 0.001], progress_std=[std, std])
        halves = dict(pass_rate_half=[rate, rate], reward_std_half=[0.3, 0.3])
        return halves | progress | dict(progress_var=[4 * none] * 2) | changes

    rates = {level: 0.1 + rise * np.arange(120) for level, rise in RISE.items()}
    columns = {name: [length] * 120 for name, length in LENGTHS.items()}
    columns["length_std"][:10] = [99.0] * 10
    return analyze.read_run(write_run(path, rates, "none", seed, columns, measured))


def test_foretell_at_one_length_by_hand(tmp_path):
    found = analyze.foretell([write_progress(tmp_path / "run")], PARTS, 100)
    rows = found["rows"]
    assert [*rows] == [*PARTS, "all"] and found["rate"] == 4
    # Points per 100 steps: 1e4 of RISE / 0.8.
    for (name, row), none in zip(rows.items(), (12.5, 25, 37.5, 25)):
        assert row["none"] == pytest.approx([none] * 3), name
        assert row["var"] == pytest.approx([none / 2] * 3)
    more = [row["std less none"][0] for row in rows.values()]
    assert more == pytest.approx([0, 25, -18.75, 25 / 12])
    assert [row["learnt"] for row in rows.values()] == pytest.approx([10, 20, 30, 20])
    assert rows["middle: b"]["share"] == pytest.approx(1 / 3)
    assert rows["middle: b"]["pass rate"] == pytest.approx(0.1 + 0.002 * 50)  # 10, 20, ... 90


def test_foretell_of_a_level_that_is_not_in_every_step(tmp_path):
    run = write_progress(tmp_path / "run")
    run.halves = run.halves.query("level != 'a' or step < 50")
    rows = analyze.foretell([run], PARTS, 100)["rows"]
    assert rows["hardest: a"]["none"] == pytest.approx([12.5] * 3)
    assert rows["hardest: a"]["share"] == pytest.approx(4 / 22)  # steps 10 to 40 of 10 to 90


def test_foretell_r_and_slope_of_what_was_learnt(tmp_path):
    found = analyze.foretell([write_progress(tmp_path / "run")], PARTS, 100)
    assert found["cells"] == 27
    assert [found["r"], found["slope"]] == pytest.approx([1, 0.8])


def test_foretell_several_runs_with_an_interval_over_seeds(tmp_path):
    runs = [write_progress(tmp_path / f"{seed}", seed) for seed in range(3)]
    for run, factor in zip(runs, (0.9, 1.0, 1.1)):
        run.halves["progress_none"] *= factor
    row = analyze.foretell(runs, PARTS, 100)["rows"]["all"]
    half = 4.302653 * 0.1 / 3**0.5 * 25
    assert row["none"] == pytest.approx([25, 25 - half, 25 + half])


def test_foretell_without_levels_by_the_other_halfs_pass_rate(tmp_path):
    halves = dict(pass_rate_half=[0.2, 0.9], progress_none=[1e-4, 5e-4], progress_std=[0, 0])
    run = write_progress(tmp_path / "run", level=None, **halves)
    run.prompts["level"] = None
    rows = analyze.foretell([run], {}, 100)["rows"]
    # The half with pass rate 0.2 is where the other one has 0.9.
    assert [*rows] == ["pass rate up to ⅓", "pass rate above", "all"]
    assert [row["none"][0] for row in rows.values()] == pytest.approx([10, 2, 6])
    assert [row["pass rate"] for row in rows.values()] == pytest.approx([0.9, 0.2, 0.55])


def test_foretell_of_rewards_other_than_0_and_1_is_of_all_problems(tmp_path):
    run = write_progress(tmp_path / "run", pass_rate_half=None, level=None)
    run.prompts = run.prompts.assign(pass_rate=np.nan, level=None)
    rows = analyze.foretell([run], {}, 100)["rows"]
    assert [*rows] == ["all"] and rows["all"]["none"][0] == pytest.approx(25)
    assert "all problems 8.3% more" in analyze.answer(rows)


def test_foretell_without_progress_or_lengths_is_empty(tmp_path):
    run = write_progress(tmp_path / "run", progress_var=None)
    assert analyze.foretell([run], PARTS, 100) == {}
    run = write_progress(tmp_path / "again")
    run.log["length_taken"] = np.nan
    assert analyze.foretell([run], PARTS, 100) == {}


def table_of(rates: dict[str, dict[str, list]]) -> pd.DataFrame:
    """Prompts of norm, level and a curve for each seed."""
    rows = [
        dict(norm=norm, level=level, seed=seed, step=step, pass_rate=rate)
        for norm, curves in rates.items()
        for level, of_seeds in curves.items()
        for seed, curve in enumerate(of_seeds)
        for step, rate in enumerate(curve)
    ]
    return pd.DataFrame(rows)


def test_at_equal_progress_by_hand():
    """Straight lines: std is 1.2 times as fast, and moves 4 points from b to a."""
    t = np.arange(101)
    none = {"a": [0.2 + 0.001 * t], "b": [0.3 + 0.002 * t]}
    std = {"a": [0.24 + 0.0012 * t], "b": [0.26 + 0.0024 * t]}
    stop, found = analyze.at_equal_progress(
        table_of({"none": none, "std": std}), "std", {"a": ["a"], "b": ["b"]}
    )
    # Smoothed, none's last rate is one step's less (2.5 * 0.4): std is above it from 99 / 1.2 on.
    assert stop == 83
    a, b = ([values[0] for values in row.values()] for row in found.values())
    # Means over steps 0 to 82, so of 41: 0.2 * 41 steps of 0.1 and 0.2 points each.
    assert a == pytest.approx([4.82, 0.82, 4], abs=0.02)
    assert b == pytest.approx([-2.36, 1.64, -4], abs=0.02)
    assert sum(a[1:]) == pytest.approx(a[0], abs=1e-12) and a[2] + b[2] == pytest.approx(0)


def test_at_equal_progress_does_not_take_a_peak_for_the_level():
    """0.4 and 0.2 by turns are 0.3 as a rising curve, not 0.4; at step 120 both rise to 0.9."""
    turns = np.append(np.tile(np.repeat([0.4, 0.2], 10), 6), [0.9] * 30)
    level = np.where(np.arange(150) < 120, 0.3, 0.9)
    prompts = table_of({"none": {"a": [turns]}, "std": {"a": [level]}})
    _, found = analyze.at_equal_progress(prompts, "std", {"a": ["a"]})
    assert found["a"]["gap, std − none"][0] == pytest.approx(0, abs=0.5)


def test_at_equal_progress_ends_where_none_has_made_most_of_its_rise():
    t = np.arange(200)
    none = {"a": [0.2 + 0.006 * np.minimum(t, 100)]}
    stop, _ = analyze.at_equal_progress(table_of({"none": none, "std": none}), "std", {"a": ["a"]})
    # Smoothed, it starts a step higher: nine tenths from step 1 to 100.
    assert stop == 91


@slow
def test_at_equal_progress_of_the_logs_of_the_pretrained_model(tmp_path):
    """Recomputed by other code: 1.63 points for the hardest letters, -1.77 for the middle ones."""
    (archive,) = (Path(__file__).parent.parent).rglob("pretrained.tar.xz")
    subprocess.run(["tar", "xf", archive, "-C", tmp_path], check=True)
    (folder,) = tmp_path.rglob("SmolLM2-135M-Instruct-0-of-3")
    prompts = pd.concat([analyze.read_run(path).prompts for path in sorted(folder.iterdir())])
    stop, found = analyze.at_equal_progress(prompts, "std", analyze.cut_levels(prompts))
    assert stop == 80
    hardest, middle, _ = (row["reallocation"][0] for row in found.values())
    assert [hardest, middle] == pytest.approx([1.63, -1.77], abs=0.005)


def test_at_equal_progress_has_no_window_where_none_learns_nothing():
    flat = {"a": [np.full(60, 0.3)]}
    std = {"a": [saturating(50, 60)]}
    stop, found = analyze.at_equal_progress(
        table_of({"none": flat, "std": std}), "std", {"a": ["a"]}
    )
    assert stop == 0 and math.isnan(found["a"]["reallocation"][0])


KINDS = [f"{shape} {effect}" for shape in ("sigmoid", "toy") for effect in ("speed", "trade")]


def simulated(kind: str, rng) -> tuple[pd.DataFrame, float]:
    """Five pairs of six levels and the true mean reallocation of the hardest two, in points (up to
    the window's end of the true curves). Three prompts of each level at every step, in groups of
    16. Sped up by 1.03 to 1.3, or besides a trade of up to 4 points between hardest and middle."""
    steps = np.arange(200)
    speed = rng.uniform(1.03, 1.3)
    middles = np.array([120, 110, 80, 70, 40, 20]) * rng.uniform(0.8, 1.1)
    width = rng.uniform(12, 20)

    def true(t: np.ndarray) -> np.ndarray:  # [levels, steps]
        x = (t - middles[:, None]) / width
        if kind.startswith("toy"):  # slow, then fast, then slow: as skills that saturate
            return 0.03 + 0.95 * (1 - np.exp(-np.exp(np.minimum(x, 3))))
        return 1 / (1 + np.exp(-x))

    none = true(steps)
    std = true(speed * steps)
    trade = 0.04 * np.exp(-(((steps - 60) / 30) ** 2)) * kind.endswith("trade")
    room = np.minimum(std, 1 - std).min(axis=0)  # both stay within 0 and 1
    std = std + np.minimum(trade, room) * np.array([[1], [1], [-1], [-1], [0], [0]])
    overall = std.mean(axis=0)
    phi = np.interp(overall, none.mean(axis=0), steps)
    moved = (std - [np.interp(phi, steps, curve) for curve in none])[:2].mean(axis=0)
    curves = {
        norm: {
            level: [rng.binomial(48, rates[k]) / 48 for _ in range(5)]
            for k, level in enumerate("abcdef")
        }
        for norm, rates in (("none", none), ("std", std))
    }
    return table_of(curves), 100 * moved


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_at_equal_progress_is_unbiased_and_covers(kind):
    rng = np.random.default_rng(3)
    parts = {"hardest": [*"ab"], "middle": [*"cd"], "easiest": [*"ef"]}
    covered = 0
    biases = []
    halves = []
    for _ in range(100):
        prompts, moved = simulated(kind, rng)
        stop, found = analyze.at_equal_progress(prompts, "std", parts)
        gap, common, (mean, low, high) = found["hardest"].values()
        assert gap[0] == pytest.approx(common[0] + mean, abs=1e-9)
        truth = moved[:stop].mean()
        covered += low <= truth <= high
        biases.append(mean - truth)
        halves.append((high - low) / 2)
    assert covered >= 90 and abs(np.mean(biases)) <= np.mean(halves) / 3


def test_opposite_signs_by_hand():
    """Five seeds, 20 steps: in steps 6 and 7 all have hard ahead and middle behind. Of five tosses
    at most four are alike with a chance of 31 in 32."""
    hardest = pd.DataFrame(np.full((20, 5), 0.01))
    middle = hardest.copy()
    middle.loc[6:7] = -0.02
    text = analyze.opposite_signs(hardest, middle)
    assert "In steps 6 to 7 " in text and "in 5 of 5 seeds (by chance in up to 4)" in text


ROW = {"std less none": [10, 5, 15], "none": [50, 40, 60]}
ANSWERS = [
    ([10, 5, 15], [-15, -20, -10], "give the hardest third 20% more and the middle third 30% less"),
    (
        [10, -5, 15],
        [2, -3, 6],
        "would change neither by more than 30% (the hardest third) and 12% (the middle",
    ),
    ([10, -5, 15], [-15, -20, -10], "give the middle third 30% less per step, with no change seen"),
    ([10, math.nan, math.nan], [1, 0, 2], "run three seeds"),
]


@pytest.mark.parametrize(("hardest", "middle", "text"), ANSWERS)
def test_answer_by_the_fixed_rule(hardest, middle, text):
    rows = {"hardest: a": ROW | {"std less none": hardest}}
    rows |= {"middle: b": ROW | {"std less none": middle}}
    assert text in analyze.answer(rows)


def test_answer_in_points_where_nothing_is_learnt_without_the_division():
    rows = {"pass rate up to ⅓": ROW | {"none": [5, -1, 11]}, "pass rate up to ⅔": ROW}
    expected = (
        "problems of pass rate up to ⅓ 10 points more and problems of pass rate up to ⅔ 20% more"
    )
    assert expected in analyze.answer(rows)


# --------------------------------------- levels and theory ----------------------------------------


def first_prompts(counts: dict[str, int], rates: str) -> pd.DataFrame:
    """Of levels a, b, ... so many prompts at step 0, of pass rates in tenths; later ones do not
    count."""
    rows = []
    for level, count in counts.items():
        rows += [(0, level, int(rates["abcdef".index(level)]) / 10)] * count
    return pd.DataFrame([*rows, (99, "f", 0.0)], columns=["step", "level", "pass_rate"])


def test_cut_levels_near_a_third_and_two_thirds_by_first_pass_rates():
    equal = first_prompts(dict.fromkeys("abcdef", 10), "215789")
    parts = {"hardest: b, a": [*"ba"], "middle: c, d": [*"cd"], "easiest: e, f": [*"ef"]}
    assert analyze.cut_levels(equal) == parts
    # a is more than a third, and the cuts are apart
    unequal = first_prompts(dict(a=50, b=30, c=10, d=10), "1234")
    assert [*analyze.cut_levels(unequal)] == ["hardest: a", "middle: b", "easiest: c, d"]
    few = analyze.cut_levels(first_prompts(dict(a=5, b=5), "21"))
    assert few == {"level b": ["b"], "level a": ["a"]}


def test_describe_halves_sees_fisher_change_its_sign():
    rng = np.random.default_rng(0)
    steps = np.repeat(np.arange(30), 8)
    variance = rng.random(240)
    sign = np.where(steps < 10, -1, 1)
    columns = dict(step=steps, norm="std", seed=0, level="a", pass_rate_half=0.3, curvature=np.nan)
    columns |= dict(variance=variance, variance_other=variance, fisher_half=sign * variance)
    columns |= dict(fisher_half_other=rng.random(240), third=np.nan, third_other=np.nan)
    fisher, _ = analyze.describe_halves(pd.DataFrame(columns), 29)
    found = [row["across halves"][0] for row in fisher.values()]
    assert found == pytest.approx([1 / 3, -1, 1, 1, 1 / 3, np.nan], nan_ok=True)
    assert fisher["all"]["and of the variance"][0] == pytest.approx(1)


def test_correlations_are_free_of_noise_across_halves():
    """Two answers at p = 1/2, whose scores are +1 and -1: of the same completions variance and
    Fisher are tied, across halves they are not."""
    scores = 2.0 * (np.random.default_rng(1).random((200, 16, 2, 8)) < 0.5) - 1
    index = pd.Index(np.repeat(range(200), 16), name="step")
    variance = (scores > 0).var(axis=-1, ddof=1)  # [steps, prompts, halves]
    fisher = scores.mean(axis=-1) ** 2
    tied = pd.DataFrame({"v": variance[..., 0].ravel(), "f": fisher[..., 0].ravel()}, index)
    free = pd.DataFrame({"v": variance[..., 1].ravel(), "f": fisher[..., 0].ravel()}, index)
    assert analyze.correlations(tied).to_numpy() == pytest.approx(np.full(200, -1))
    r = analyze.correlations(free)
    assert abs(r.mean()) < 4 * r.sem()
    expected = [np.corrcoef(variance[k, :, 1], fisher[k, :, 0])[0, 1] for k in range(200)]
    assert r.to_numpy() == pytest.approx(expected, abs=1e-8)  # of values rounded to 1e-9


def test_correlations_need_three_pairs_that_vary():
    rows = {
        "few": ([1, 2], [1, 2]),
        "flat": ([1, 2, 3], [5, 5, 5]),
        "whole": ([1, 2, 4], [1, 2, 3]),
    }
    rows["rounding"] = ([0.3, 0.3 + 1e-12, 0.3 + 3e-12], [1, 2, 3])
    rows["gap"] = ([1, 2, np.nan], [1, 2, 3])
    parts = {name: pd.DataFrame({"v": v, "f": f}) for name, (v, f) in rows.items()}
    found = analyze.correlations(pd.concat(parts, names=["step"]).droplevel(1))
    # Of 1, 2, 4 and 1, 2, 3: covariance 3, variances 14/3 and 2.
    assert found.to_dict() == pytest.approx({"whole": 3 / math.sqrt(14 / 3 * 2)})


def test_describe_phase_pools_the_cosines_of_all_pairs():
    rng = np.random.default_rng(2)
    rows = []
    pooled = []
    for n in (3, 8, 5):
        unit = rng.normal(size=(n, 6)) + 0.5
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        cosines = (unit @ unit.T)[np.triu_indices(n, 1)]
        pooled += cosines.tolist()
        shares = (cosines > 0).mean(), (abs(cosines) < 0.1).mean()
        rows.append([n, cosines.mean(), cosines.std(), *shares, 2.5, 0.5])
    names = ["n_gradients", "cos_mean", "cos_std", "cos_positive", "cos_small", "interference"]
    log = pd.DataFrame(rows, columns=[*names, "signal_share"])
    log = log.assign(seed=0, C=0.6, feature_cos=0.2, feature_cos_centered=0.1)
    row = analyze.describe_phase(log)
    cosines = np.array(pooled)
    assert [row["mean"], row["std"]] == pytest.approx([cosines.mean(), cosines.std()])
    assert row["above 0"] == pytest.approx((cosines > 0).mean()) and row["pairs"] == 3 + 28 + 10
    assert row["below 0.1 in size"] == pytest.approx((abs(cosines) < 0.1).mean())


def halves_of(rng, groups: int, slope: float) -> pd.DataFrame:
    """Of groups of 16 right with p: curvature slope * V(1 - 2p), with noise; as read_run has it."""
    p = rng.uniform(0.02, 0.98, groups)
    rates = rng.binomial(8, p, size=(2, groups)) / 8
    thirds = rates * (1 - rates) * (1 - 2 * rates) * 8 / 7 * 8 / 6
    law = slope * p * (1 - p) * (1 - 2 * p) + 0.3 * rng.normal(size=groups)
    return pd.DataFrame({"third": thirds[0], "third_other": thirds[1], "curvature": law})


def test_signed_law_is_not_flattened_by_the_noise_of_its_moments():
    rng = np.random.default_rng(0)
    slopes = [analyze.signed_law(halves_of(rng, 2000, 5.0))["slope"] for _ in range(40)]
    assert np.mean(slopes) == pytest.approx(5, abs=4 * np.std(slopes) / math.sqrt(40))
    rows = halves_of(rng, 2000, 5.0)
    flat = rows["third"].cov(rows["curvature"]) / rows["third"].var()
    assert flat < 0.8 * np.mean(slopes)
    assert analyze.signed_law(rows)["r"] == pytest.approx(rows["third"].corr(rows["curvature"]))


@slow
@pytest.mark.parametrize("slope", [0.0, 5.0])
def test_signed_law_intervals_over_five_seeds_cover_it(slope):
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        seeds = [analyze.signed_law(halves_of(rng, 400, slope))["slope"] for _ in range(5)]
        _, low, high = analyze.mean_interval(seeds)
        covered += low < slope < high
    assert covered >= 180  # of 190; at a coverage of 0.95 there are fewer once in 300 times


# Squared norms 1, 4, 9 and 0 (no reward differs); x y of the four prompts, of levels a, a, b, b.
TRUE_GRADIENTS = np.array([[1.0, 0, 0], [1.2, 1.6, 0], [0, -3, 0], [0, 0, 0]])


def write_signals(path: Path, steps: int, noise: float, seed: int = 0) -> analyze.Run:
    """A run with the log that grpo.py would write for TRUE_GRADIENTS, seen in two halves."""
    rng = np.random.default_rng(seed)
    rows = []
    lines = []
    for step in range(steps):
        A, B = (torch.tensor(TRUE_GRADIENTS + noise * rng.normal(size=(4, 3))) for _ in "AB")
        A[3] = B[3] = 0
        # So large a group that the leave-one-out factor is 1.
        line, columns = grpo.gradient_geometry(A, B, 10**6, [*"aabb"])
        lines.append({"step": step, "reward_std": 0.3, "pass_rate": 0.5} | line)
        columns = {name: values.tolist() for name, values in columns.items()}
        rows += [
            dict(step=step, level=level) | {name: columns[name][p] for name in columns}
            for p, level in enumerate("aabb")
        ]
    path.mkdir(parents=True)
    settings = dict(norm="std", seed=seed, prompts=4, group=8)
    (path / "config.json").write_text(json.dumps(settings))
    for name, table in (("metrics", lines), ("prompts", rows)):
        pd.DataFrame(table).to_json(path / f"{name}.jsonl", orient="records", lines=True)
    return analyze.read_run(path)


def true_signals() -> dict[str, list[float]]:
    """By kind of pairs: cosine, mean square and spread."""
    G = TRUE_GRADIENTS @ TRUE_GRADIENTS.T
    found = {}
    same = np.equal.outer([*"aabb"], [*"aabb"])
    apart = ~np.eye(4, dtype=bool)
    norms = G.diagonal()
    for kind, chosen in (("", apart), ("_within", same & apart), ("_between", ~same)):
        xy = G[chosen]
        half = (np.add.outer(norms, norms) / 2)[chosen]
        both = np.outer(norms, norms)[chosen]
        square = (xy**2).mean() / both.mean()
        found[kind] = [xy.mean() / half.mean(), square, xy.var() / both.mean()]
    return found


def test_signals_of_known_gradients_of_unequal_norm(tmp_path):
    moments = analyze.signals(write_signals(tmp_path / "exact", 3, 0.0))
    for kind, expected in true_signals().items():
        assert analyze.noise_free(moments[kind]) == pytest.approx(expected)
    silent = moments[""].assign(half=0.0)  # no norm is left to divide by
    assert np.isnan(analyze.noise_free(silent)).all()


@slow
def test_signals_intervals_over_seeds_cover_the_truth(tmp_path):
    covered: dict = defaultdict(int)
    rounds = 200
    for n in range(rounds):
        runs = [write_signals(tmp_path / f"{n}-{k}", 60, 0.7, 5 * n + k) for k in range(5)]
        moments = [analyze.signals(run) for run in runs]
        for kind, expected in true_signals().items():
            values = zip(*(analyze.noise_free(each[kind]) for each in moments))
            for k, (value, true) in enumerate(zip(values, expected)):
                _, low, high = analyze.mean_interval(value)
                covered[kind, k] += low <= true <= high
    assert min(covered.values()) >= 0.9 * rounds, covered


# ---------------------------------------- comparing runs ------------------------------------------


def write_run(path: Path, rates, norm="std", seed=0, columns=(), measured=None, **config) -> Path:
    """A finished run's directory. rates: the pass rate at every step, or {level: such rates}, of
    one prompt each. columns: more of metrics.jsonl. measured(step, level): a prompt's columns at
    every tenth step."""
    levels = rates if isinstance(rates, dict) else {"a": rates}
    (path / "model").mkdir(parents=True)
    settings = dict(norm=norm, seed=seed, lr=1e-3, prompts=16, group=5, task="letters")
    (path / "config.json").write_text(json.dumps(settings | config))
    means = np.mean([*levels.values()], axis=0)
    log = pd.DataFrame(dict(step=range(len(means)), reward=means, pass_rate=means, reward_std=0.3))
    log.loc[::10, ["n_gradients", "cos_mean", "cos_std", "signal_share"]] = [16, 0.02, 0.1, 0.5]
    held_out = {"step": len(means), "eval_reward": float(means[-1]) if len(means) else 0.0}
    lines = log.assign(**dict(columns)).to_json(orient="records", lines=True)
    (path / "metrics.jsonl").write_text(f"{lines}{json.dumps(held_out)}\n")
    rows = []
    for step, (level, values) in itertools.product(range(len(means)), levels.items()):
        row = dict(step=step, level=level, pass_rate=float(values[step]), reward_std=0.3)
        rows.append(row | (measured(step, level) if measured and step % 10 == 0 else {}))
    (path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def saturating(tau: float, n: int = 100) -> np.ndarray:
    return 0.2 + 0.7 * (1 - np.exp(-np.arange(n) / tau))


def compared(runs: list[Path], target: float | None = None) -> dict:
    """The numbers of runs that are all compared."""
    return analyze.compare([analyze.read_run(run) for run in runs], target)[0]


def test_compare_twice_as_fast_is_a_speed_up_of_two(tmp_path):
    paths = [
        write_run(tmp_path / f"{norm}-{seed}", saturating(tau + seed, 180), norm, seed)
        for norm, tau in (("none", 100), ("std", 50))
        for seed in range(3)
    ]
    found = compared(paths, 0.6)
    runs = [saturating(50 + seed, 180) for seed in range(3)]
    none, std = (found["norms"][norm] for norm in ("none", "std"))
    # From 0.2 + 0.7 (1 - exp(-t/tau)) = 0.6, but for steps and half steps of whole numbers.
    assert none["steps to 0.60"][0] == pytest.approx(101 * math.log(7 / 3), abs=1.5)
    assert std["speed-up"][0] == pytest.approx(101 / 51, rel=1.5 / 43)
    assert std["end"][0] == pytest.approx(np.mean([run[-18:] for run in runs]))
    assert std["held out"][0] == pytest.approx(np.mean([run[-1] for run in runs]))
    gaps = [run - saturating(100 + seed, 180) for seed, run in enumerate(runs)]
    gap = np.mean(gaps, axis=0).reshape(60, 3).mean(axis=1)
    assert std["at step"] == 3 * gap.argmax()
    assert std["largest gap"][0] == pytest.approx(gap.max())
    assert found["phases"]["boundaries"] and not found["phases"]["found"]
    assert "but this split is not supported." in analyze.describe("", found)


def test_reach_is_the_first_step_on_average_or_nan():
    """0, 0.01, ... 0.59, whose means of two stand at the second."""
    rates = pd.Series(np.arange(60) / 100)
    assert analyze.reach(rates, 0.2) == 21  # 0.195 at 20, 0.205 at 21
    assert math.isnan(analyze.reach(rates, 0.6))  # never
    assert math.isnan(analyze.reach(rates + 0.5, 0.5))  # there from the beginning


def test_compare_rewards_other_than_0_and_1_by_their_mean_without_theory(tmp_path):
    runs = [
        write_run(tmp_path / norm, np.full(60, rate), norm, columns={"reward": rate + 0.2})
        for norm, rate in (("none", 0.4), ("std", 0.5))
    ]
    found = compared(runs)
    norms = found["norms"]["std"]
    assert norms["end"][0] == pytest.approx(0.7)
    assert all(math.isnan(row["C"][0]) for row in found["cosines"].values())
    assert norms["largest gap"][0] == pytest.approx(0.1)
    assert found["tenths"] == {}  # of prompts the mean reward is not logged


def test_compare_runs_without_a_common_level(tmp_path):
    runs = [
        write_run(tmp_path / norm, {"a": saturating(50), level: saturating(20)}, norm)
        for norm, level in (("none", "b"), ("std", "c"))
    ]
    found = compared(runs)
    gaps = found["tenths"]["all steps"]
    assert [math.isnan(gap[0]) for gap in gaps.values()] == [False, True, True]


@slow
def test_compare_pairs_seeds_and_goes_as_far_as_killed_runs_went(tmp_path):
    runs = [
        write_run(tmp_path / f"{norm}-{seed}", saturating(50 + seed, end), norm, seed)
        for norm, end, seeds in (("none", 40, (0, 1, 2, 7)), ("std", 60, (2, 1, 0, 9)))
        for seed in seeds
    ]
    found = compared(runs)
    std, phases = found["norms"]["std"], found["phases"]
    assert found["last_step"] == 39 and std["runs"] == 4
    assert std["largest gap"] == pytest.approx([0, 0, 0], abs=1e-12)  # of seeds 0, 1, 2 alone
    assert phases["knots"] == 0 and not phases["found"]


def chosen(folder: Path, ends: dict[tuple[str, int], int], steps: int) -> tuple[list, list]:
    """Names of the runs that `choose` keeps of some that should have gone to `steps`, and why not
    the others."""
    paths = [
        write_run(folder / f"{norm}-{seed}", saturating(50, end), norm, seed, steps=steps)
        for (norm, seed), end in ends.items()
    ]
    table, left_out = analyze.choose(analyze.tabulate([analyze.read_run(path) for path in paths]))
    return [run.path.name for run in table["run"]], left_out


def test_choose_leaves_out_what_is_a_tenth_shorter_and_says_so(tmp_path):
    ends = {("none", 0): 40, ("std", 0): 36, ("none", 1): 40, ("std", 1): 35}
    names, left_out = chosen(tmp_path, ends, 40)
    assert names == ["none-0", "std-0", "none-1"]
    assert left_out == [f"{tmp_path / 'std-1'}: unfinished, it ends at step 34"]


def test_answer_tells_what_is_seen_or_how_large_it_may_be():
    """A share of none's progress where that is above 0; else points."""
    base = [50.0, 40.0, 60.0]
    rows = {
        "hardest: a": {"none": base, "std less none": [10.0, 5.0, 15.0]},
        "middle: b": {"none": base, "std less none": [-2.0, -5.0, 1.0]},
        "all": {"none": base, "std less none": [0.0, -1.0, 1.0]},
    }
    assert analyze.answer(rows) == (
        "Dividing by σ would give the hardest third 20% more per step, with no change seen in the "
        "other."
    )
    rows["hardest: a"] = {"none": [5.0, -1.0, 11.0], "std less none": [-2.0, -7.0, 3.0]}
    assert analyze.answer(rows) == (
        "Dividing by σ would change neither by more than 7 points (the hardest third) and 10% "
        "(the middle third)."
    )


def test_choose_counts_a_seed_once(tmp_path):
    paths = [write_run(tmp_path / str(i), saturating(50, 40), "std", seed=3) for i in range(2)]
    table, left_out = analyze.choose(analyze.tabulate([analyze.read_run(path) for path in paths]))
    assert [run.path.name for run in table["run"]] == ["0"]
    assert left_out == [f"{tmp_path / '1'}: its norm, rate and seed are there already"]


def test_choose_keeps_all_if_all_are_unfinished(tmp_path):
    names, left_out = chosen(tmp_path, {("none", 0): 40, ("std", 0): 20}, 100)
    assert names == ["none-0", "std-0"] and left_out == []
    found = compared([*tmp_path.iterdir()])
    assert found["last_step"] == 19 and "no run is finished" in analyze.first_page("", found)


def test_arrange_every_rate_then_each_norm_at_its_best(tmp_path):
    taus = {("std", 1e-3): 50, ("std", 1e-2): 20, ("none", 1e-3): 60, ("none", 1e-2): 90}
    paths = [
        write_run(tmp_path / f"{norm}-{lr}", saturating(tau), norm, lr=lr)
        for (norm, lr), tau in taus.items()
    ]
    # The one at 0.1 came to no end.
    paths += [write_run(tmp_path / "none-0.1", saturating(10, 40), "none", lr=0.1)]
    views = analyze.arrange(analyze.tabulate([analyze.read_run(path) for path in paths]))
    names = [[title, *sorted(run.path.name for run in runs)] for title, runs in views.items()]
    assert names[0] == ["learning rate 0.01", "none-0.01", "std-0.01"]  # std's best rate
    assert names[1] == ["learning rate 0.001", "none-0.001", "std-0.001"]
    title = "each norm at its best learning rate, none 0.001, std 0.01"
    assert names[2:] == [[title, "none-0.001", "std-0.01"]]


# -------------------------------------- logs and command line -------------------------------------


@slow
def test_main_compares_runs_that_differ_in_more_apart_and_a_seed_once(tmp_path):
    more = [
        {"group": 8, "geometry_every": 10},
        {"group": 8, "eval_every": 3, "measure_every": 20, "curvature": True},
        {"group": 64, "a": "$x_$\n"},
        {"group": 8, "device": "cpu"},
    ]
    runs = [
        write_run(tmp_path / str(i), saturating(50, 40), "none" if i == 1 else "std", **config)
        for i, config in enumerate(more)
    ]
    report = tmp_path / "analysis.md"
    report.write_text("of an earlier analysis, which `runs/*` names, too")
    assert analyze.main([*map(str, runs), str(runs[0] / ".." / "0"), str(report)]) == 0
    found = json.loads((tmp_path / "analysis.json").read_text())
    views = found["groups"]
    sizes = {name: [len(view["norms"]) for view in views[name].values()] for name in views}
    assert sizes == {"group 8, a None": [2], "group 64, a '$x_$\\n'": [1]}
    assert found["left_out"] == [f"{runs[3]}: its norm, rate and seed are there already"]
    assert (tmp_path / "phases.png").read_bytes()[:4] == b"\x89PNG"


def write_halves(path: Path) -> Path:
    """A run of two steps with three prompts each: groups of 5, so halves of 3 and 2."""
    write_run(path, [0.5, 0.5])
    rows = [
        dict(step=step, pass_rate=0.5, pass_rate_half=[0.2, 0.7], reward_std_half=[std, 0.4])
        for step in range(2)
        for std in (0.3, 0.4, 0.5)
    ]
    (path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_read_run_has_each_halfs_unbiased_moments_beside_the_others(tmp_path):
    halves = analyze.read_run(write_halves(tmp_path / "run")).halves
    three = [0.3, 0.4, 0.5] * 2
    assert halves["reward_std_half"].tolist() == three + [0.4] * 6
    a = np.square(three) * 3 / 2
    b = np.full(6, 0.16 * 2)
    assert halves["variance"].to_numpy() == pytest.approx(np.concatenate([a, b]))
    assert halves["variance_other"].to_numpy() == pytest.approx(np.concatenate([b, a]))
    expected = np.append(a * (1 - 2 * 0.2) * 3, [np.nan] * 6)  # of two there is no third moment
    assert halves["third"].to_numpy() == pytest.approx(expected, nan_ok=True)
    assert halves["curvature"].isna().all() and halves["fisher_half"].isna().all()


def test_read_run_skips_lines_that_are_not_a_steps(tmp_path):
    path = write_run(tmp_path / "run", saturating(50, 4))
    whole = analyze.read_run(path)
    junk = ["{", "[1]", "", '{"step": "1"}', '{"step": true}', '{"no": 1}', '{"step": -1}', "\0"]
    junk += ["[" * 10**5, "é"]
    with (path / "metrics.jsonl").open("ab") as file:
        file.write("\n".join(junk).encode() + b'\n\xff\xfe\n{"step": 41, "pass_ra')
    damaged = analyze.read_run(path)
    assert damaged.skipped == len(junk) + 2 and damaged.log.equals(whole.log)


def test_read_run_takes_what_is_no_number_for_not_measured(tmp_path):
    path = write_run(tmp_path / "run", saturating(50, 4))
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "pass_rate": "1", "reward_std": [1], "cos_std": 1e999')
        file.write(f', "reward": {10**400}}}')
    half = '{"step": 7, "reward_std_half": [0.5], "curvature": 3, "fisher": null}\n'
    (path / "prompts.jsonl").write_text(half)
    run = analyze.read_run(path)
    assert run.log.iloc[-1][analyze.METRICS].isna().all() and run.halves.empty


@slow
def test_main_shows_the_first_page_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(analyze, "draw", lambda *_: None)
    t = np.arange(100)
    middles = dict(zip("abcdef", (80, 75, 50, 45, 20, 10)))
    for norm, seed in itertools.product(("none", "std"), range(3)):
        speed = 1.1 + 0.01 * seed if norm == "std" else 1
        rates = {level: 1 / (1 + np.exp((m - speed * t) / 9)) for level, m in middles.items()}
        progress = {f"progress_{name}": [0.01, 0.02] for name in analyze.NORMS}
        halves = dict(pass_rate_half=[0.5, 0.5], reward_std_half=[0.4, 0.4]) | progress
        columns = {name: [length] * 100 for name, length in LENGTHS.items()}
        path = tmp_path / f"{norm}-{seed}"
        write_run(path, rates, norm, seed, columns, lambda *_, row=halves: row)
    assert analyze.main([*map(str, tmp_path.iterdir())]) == 0
    text = capsys.readouterr().out
    assert text.count("\n") <= 40 and max(map(len, text.splitlines()[:-1])) <= 100
    lines = {line[:10]: line.split() for line in text.splitlines()}
    # At one length std's progress is a quarter of none's, 2 * 150 points.
    assert lines["level f   "][4:6] == ["300", "75"]
    assert "std's steps are 4 times as long" in text and "reallocation" in text
    assert "gradients of none in steps 10 to 8" in text and "**" not in text
    report = (tmp_path / "analysis.md").read_text()
    assert "Fisher" in report and "Fisher" not in text


def test_main_lists_the_runs_in_a_directory_without_one(tmp_path, capsys):
    runs = [write_run(tmp_path / name, saturating(50, 9)) for name in ("b", "a")]
    with pytest.raises(SystemExit):
        analyze.main([str(tmp_path)])
    assert f"a directory of runs: {runs[1]} {runs[0]}" in capsys.readouterr().err


def test_draw_progress_has_a_bar_for_every_norm_and_what_was_learnt(tmp_path):
    rows = analyze.foretell([write_progress(tmp_path / "run")], PARTS, 100)
    axis = Figure().subplots()
    analyze.draw_progress(axis, rows)
    heights = [round(bar.get_height(), 3) for bar in axis.patches]
    # Of hardest, middle, easiest and all: none, std, var, learnt.
    assert heights[:8] == [12.5, 25, 37.5, 25, 12.5, 50, 18.75, 27.083]
    assert heights[12:] == [10, 20, 30, 20]


def test_main_names_what_it_skips_and_leaves_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(analyze, "draw", lambda *_: None)
    path = write_run(tmp_path / "run", saturating(50, 4))
    with (path / "metrics.jsonl").open("a") as file:
        file.write("{\n{\n")
    assert analyze.main([str(path), str(tmp_path / "nothing"), str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert f"{path}: 2 unreadable log lines skipped" in text
    assert "Undecided: a gap takes none and another norm" in text
    assert text.count("left out:") == 2 and f"left out: {tmp_path / 'nothing'}: " in text


def test_main_with_nothing_to_analyse_or_wrong_flags_prints_one_line(tmp_path, capsys):
    empty = str(write_run(tmp_path / "empty", []))
    good = str(write_run(tmp_path / "good", saturating(50, 9)))
    (tmp_path / "file").write_text("")
    cases = {(empty, str(tmp_path / "no")): "no run to read: ", (): "required: runs"}
    cases[good, "--out", str(tmp_path / "file" / "x")] = "cannot write to "
    cases["--x", "run"] = "unrecognized"
    for arguments, message in cases.items():
        with pytest.raises(SystemExit) as exit:
            analyze.main(arguments)
        text = capsys.readouterr().err
        assert exit.value.code == 2 and text.count("\n") == 1
        assert text.startswith("analyze.py: error: ") and message in text


@slow
def test_main_takes_twenty_long_runs_in_half_a_minute(tmp_path):
    def measured(step, level):
        halves = dict(pass_rate_half=[0.2, 0.7], reward_std_half=[0.4, 0.4], curvature=[0.1, 0.2])
        progress = {f"progress_{norm}": [0.001, 0.002] for norm in analyze.NORMS}
        return dict(grad_sq_signal=0.2) | halves | progress

    columns = {name: [length] * 1000 for name, length in LENGTHS.items()}
    levels = {f"{level}{n}": saturating(200, 1000) for level in "abcd" for n in range(4)}
    paths = [
        write_run(tmp_path / f"{norm}-{seed}", levels, norm, seed, dict(columns), measured)
        for norm in ("none", "std")
        for seed in range(10)
    ]
    began = time.perf_counter()
    command = [sys.executable, analyze.__file__, *map(str, paths)]
    subprocess.run(command, check=True, capture_output=True)
    assert time.perf_counter() - began < 30
