"""Statistics of analyze.py on data of known truth: bias, and how often intervals cover it;
`GRPO_SLOW=1 pytest` runs the slow ones."""

import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import analyze  # noqa: E402
import grpo  # noqa: E402
from test_grpo import slow  # noqa: E402


def halves_of(rng, groups: int, slope: float) -> pd.DataFrame:
    """Of groups of 16 right with p: curvature slope * V(1 - 2p), with noise; as read_run has it."""
    p = rng.uniform(0.02, 0.98, groups)
    rates = rng.binomial(8, p, size=(2, groups)) / 8
    thirds = rates * (1 - rates) * (1 - 2 * rates) * 8 / 7 * 8 / 6
    law = slope * p * (1 - p) * (1 - 2 * p) + 0.3 * rng.normal(size=groups)
    return pd.DataFrame({"third": thirds[0], "third_other": thirds[1], "curvature": law})


def test_the_signed_law_is_not_flattened_by_the_noise_of_its_moments():
    rng = np.random.default_rng(0)
    slopes = [analyze.signed_law(halves_of(rng, 2000, 5.0))["slope"] for _ in range(40)]
    assert np.mean(slopes) == pytest.approx(5, abs=4 * np.std(slopes) / math.sqrt(40))
    rows = halves_of(rng, 2000, 5.0)
    flat = rows["third"].cov(rows["curvature"]) / rows["third"].var()
    assert flat < 0.8 * np.mean(slopes)
    assert analyze.signed_law(rows)["r"] == pytest.approx(rows["third"].corr(rows["curvature"]))


@slow
@pytest.mark.parametrize("slope", [0.0, 5.0])
def test_intervals_of_the_signed_law_over_five_seeds_cover_it(slope):
    rng, covered = np.random.default_rng(1), 0
    for _ in range(200):
        seeds = [analyze.signed_law(halves_of(rng, 400, slope))["slope"] for _ in range(5)]
        _, low, high = analyze.mean_interval(seeds)
        covered += low < slope < high
    assert covered >= 180  # of 190; at a coverage of 0.95 there are fewer once in 300 times


# Squared norms 1, 4, 9 and 0 (no reward differs); x y of the four prompts, of levels a, a, b, b.
TRUE_GRADIENTS = np.array([[1.0, 0, 0], [1.2, 1.6, 0], [0, -3, 0], [0, 0, 0]])


def write_signals(path: Path, steps: int, noise: float, seed: int = 0) -> analyze.Run:
    """A run with the log that grpo.py would write for TRUE_GRADIENTS, seen in two halves."""
    rng, rows, lines = np.random.default_rng(seed), [], []
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
    G, found = TRUE_GRADIENTS @ TRUE_GRADIENTS.T, {}
    same = np.equal.outer([*"aabb"], [*"aabb"])
    apart = ~np.eye(4, dtype=bool)
    for kind, chosen in (("", apart), ("_within", same & apart), ("_between", ~same)):
        xy, norms = G[chosen], G.diagonal()
        half, both = (np.add.outer(norms, norms) / 2)[chosen], np.outer(norms, norms)[chosen]
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
def test_intervals_of_cosines_squares_and_spreads_over_seeds_cover_the_truth(tmp_path):
    covered, rounds = defaultdict(int), 200
    for n in range(rounds):
        runs = [write_signals(tmp_path / f"{n}-{k}", 60, 0.7, 5 * n + k) for k in range(5)]
        moments = [analyze.signals(run) for run in runs]
        for kind, expected in true_signals().items():
            values = zip(*(analyze.noise_free(each[kind]) for each in moments))
            for k, (value, true) in enumerate(zip(values, expected)):
                _, low, high = analyze.mean_interval(value)
                covered[kind, k] += low <= true <= high
    assert min(covered.values()) >= 0.9 * rounds, covered
