"""What grpo.py measures, against the truth in closed form: over all possible groups, or many."""

import itertools
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import grpo  # noqa: E402
from test_grpo import make_policy, measure, slow, with_advantages  # noqa: E402


class LogLinear(torch.nn.Module):
    """P prompts of a token, K answers of a token, the first one right, in closed form:
    softmax(features[x] @ theta)."""

    def __init__(self, P, K):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.features = torch.randn(P, K, 6, dtype=torch.float64, generator=generator)
        self.theta = torch.nn.Parameter(torch.randn(6, dtype=torch.float64, generator=generator))
        self.device = torch.device("cpu")
        self.config = None

    def forward(self, ids, **_):
        return SimpleNamespace(logits=self.features[ids] @ self.theta.double())

    def closed_form(self, p):
        """Probabilities [K], scores [K, D]; the expected reward's gradient [D], Hessian [D, D]."""
        probs = torch.softmax(self.features[p] @ self.theta.detach(), -1)
        scores = self.features[p] - probs @ self.features[p]
        centred = probs * ((torch.arange(len(probs)) == 0).double() - probs[0])
        return probs, scores, centred @ scores, torch.einsum("k,ki,kj->ij", centred, scores, scores)

    def measured(self, prompts, actions):
        """Both halves of each group. prompts: [n]; actions: [n, G] -> n pairs."""
        tokens = torch.as_tensor(actions)[..., None]  # [n, G, 1]
        nothing = torch.zeros(tokens.shape).double()
        ones = torch.ones_like(tokens[..., 0])
        batch = grpo.Batch([[p] for p in prompts], tokens, ones, nothing, nothing, nothing)
        batch.rewards = (tokens[..., 0] == 0).double()
        batch = with_advantages(batch, "std", "sequence")
        config = grpo.Config(group=tokens.shape[1], curvature=True)
        _, _, halves = measure(make_policy(self), batch, config)
        return [*zip(halves[::2], halves[1::2])]


@pytest.mark.parametrize("G", [2, 3, pytest.param(4, marks=slow)])
def test_measure_averages_to_the_truth_over_all_possible_groups(G):
    """Gradient, corrected norm, cosine, signal share, Fisher trace E|grad log pi|^2; curvature,
    where it can be had."""
    model = LogLinear(2, 3)
    first = (G + 1) // 2
    groups = [*itertools.product(range(3), repeat=G)]
    truth = []
    moments = []
    for p in range(2):
        probs, scores, gradient, _ = model.closed_form(p)
        average = 0.0
        for actions, pair in zip(groups, model.measured([p] * len(groups), groups)):
            halves = actions[:first], actions[first:]
            for half, own, other in zip(pair, halves, halves[::-1]):
                alike = len({action == 0 for action in own}) == 1
                assert math.isnan(half["curvature"]) == (alike or len(other) < 2)
            A, B = (half["vector"].double() for half in pair)
            whole = (first * A + (G - first) * B) / G
            fisher = torch.tensor([half["fisher_half"] for half in pair])
            sums = torch.cat([whole, fisher, torch.outer(A, B).flatten()])
            average += probs[list(actions)].prod() * sums
        expected = torch.cat([gradient, (probs @ scores.square().sum(1)).expand(2)])
        torch.testing.assert_close(average[:8], expected, rtol=1e-5, atol=1e-6)
        truth.append(gradient)
        moments.append(average[8:].view(6, 6))
    x, y = truth
    # By linearity these are the means of the products that gradient_geometry divides: x y, and as
    # prompts are independent (x_A y_A)(x_B y_B), are traces of E[x_A x_B'] and of E[y_A y_B'].
    factor = 1 + 1 / (G - 1) ** 2
    for moment, g in zip(moments, truth):
        torch.testing.assert_close(moment, factor * torch.outer(g, g), rtol=1e-5, atol=1e-6)
    squared = float((moments[0] * moments[1]).sum() / (moments[0].trace() * moments[1].trace()))
    assert squared == pytest.approx(float((x @ y) ** 2 / (x @ x) / (y @ y)), rel=1e-5)
    found, _ = grpo.gradient_geometry(torch.stack(truth), torch.stack(truth), G, [1, 2])
    assert found["cos_sq_signal"] == pytest.approx(squared, rel=1e-5)
    exact = float(2 * x @ y / (x @ x + y @ y))
    assert found["cos_signal"] == pytest.approx(factor * exact, rel=1e-5)


def within(values, truth, errors=3):
    """Whether independent values' mean agrees with the truth within so many standard errors."""
    values = np.asarray(values)
    return abs(values.mean() - truth) < errors * values.std(ddof=1) / len(values) ** 0.5


@slow
def test_probe_curvature_is_the_true_one_along_the_same_directions():
    model = LogLinear(300, 5)
    torch.manual_seed(0)
    forms = [model.closed_form(p) for p in range(300)]
    actions = torch.stack([torch.multinomial(form[0], 16, replacement=True) for form in forms])
    errors = []
    truths = []
    for form, pair in zip(forms, model.measured(range(300), actions)):
        for half in pair:
            if not math.isnan(half["curvature"]):
                v = half["vector"].double()
                truths.append(float(v @ form[3] @ v / v.square().sum()))
                errors.append(half["curvature"] - truths[-1])
    scaled = np.array(errors) * truths  # neither shifted nor scaled
    assert within(errors, 0.0) and within(scaled, 0.0)
    assert not within(scaled + np.square(truths), 0.0, 6)  # if all estimates were 0, it would show


@pytest.mark.parametrize("large", [[1.0] * 5, [100.0, 1, 1, 1, 1]])
def test_count_sketch_preserves_inner_products_without_bias(large):
    """Unbiased, with the stated deviation, also where all that is large is one matrix column."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 40, 5) * torch.tensor(large)
    products = []
    for _ in range(2000):
        signs = torch.randint(0, 2, (200,), dtype=torch.int8) * 2 - 1
        products.append(float(torch.dot(*(grpo.count_sketch([x], signs, 17) for x in (a, b)))))
    assert within(products, float((a * b).sum()))
    assert np.std(products) == pytest.approx(float(a.norm() * b.norm()) / 17**0.5, rel=0.15)
