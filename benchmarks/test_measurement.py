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

import analyze  # noqa: E402
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


# ----------------------------------- progress -----------------------------------

NORMS = "none", "std", "var"
ANSWERS, GROUP = 3, 4  # of every one of 12 prompts; the first answer is the right one
DIAGONALS = {"sgd": torch.ones(3).double(), "diagonal": torch.linspace(0.2, 3, 3).double()}


class Softmax:
    """Twelve policies over three answers that share six weights, and all their possible groups."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(12, ANSWERS, 3, dtype=torch.float64, generator=generator)
        features[:, 0] += 2.0  # skills have something in common
        theta = torch.full((3,), -0.2, dtype=torch.float64)
        probs = torch.softmax(features @ theta, dim=1)  # [12, 3]
        scores = features - torch.einsum("pk,pkd->pd", probs, features)[:, None]
        groups = torch.tensor([*itertools.product(range(ANSWERS), repeat=GROUP)])  # [81, 4]
        self.rewards = (groups == 0).double()  # [81, 4]
        advantages = (self.rewards - self.rewards.mean(1, keepdim=True)) * GROUP / (GROUP - 1)
        terms = advantages[None, ..., None] * scores[:, groups]  # [12, 81, 4, 6]
        self.halves = terms.unflatten(2, (2, 2)).mean(3)  # [12, 81, 2, 6]
        self.chance = probs[:, groups].prod(2)  # [12, 81]
        self.gradients = probs[:, :1] * scores[:, 0]  # [12, 6], of the first answer's probability

    def steps(self, norm):
        """Every prompt's step under every possible group, [12, 81, 6]."""
        scale = grpo.advantage_scale(self.rewards, norm)[:, 0]
        return self.halves.mean(2) * scale[:, None] * (GROUP - 1) / GROUP

    def sample(self, norm, diagonal, count):
        """progress [count, 12, 2], lengths [count], and the halves' pass rates [count, 12, 2]."""
        generator = torch.Generator().manual_seed(1)
        drawn = torch.multinomial(self.chance, count, replacement=True, generator=generator).T
        everyone = torch.arange(12)
        values, lengths = [], []
        for groups in drawn:
            A, B = (self.halves[everyone, groups] * diagonal.sqrt()).unbind(1)
            scale = grpo.advantage_scale(self.rewards[groups], norm)[:, 0]
            value, length = grpo.progress(A @ A.T, A @ B.T, B @ B.T, GROUP, scale)
            values.append(value)
            lengths.append(length)
        rates = self.rewards[drawn].unflatten(2, (2, 2)).mean(3)
        return torch.stack(values), torch.stack(lengths), rates


def within_errors(values, truth, largest=None):
    """Independent values' mean is the truth within 3 standard errors, each below 2% of it."""
    error = values.std() / len(values) ** 0.5
    return abs(values.mean() - truth) < 3 * error < 0.06 * abs(largest or truth)


@slow
@pytest.mark.parametrize("name", DIAGONALS)
@pytest.mark.parametrize("norm", NORMS)
def test_progress_is_what_a_fresh_prompt_learns_from_a_small_step(norm, name):
    """Over all prompts, and over those whose other half has no answer, one, or all right."""
    policies = Softmax()
    step = (policies.chance[..., None] * policies.steps(norm)).sum(1) * DIAGONALS[name]  # [12, 6]
    pairs = policies.gradients @ step.T  # [12, 12], what p's part in the step teaches q
    learnt = (pairs.sum(1) - pairs.diagonal()) / 11  # [12]
    found, _, rates = policies.sample(norm, DIAGONALS[name], 3600)
    assert within_errors(found.mean((1, 2)), learnt.mean())
    for rate in (0, 0.5, 1):
        chance = (policies.chance * (policies.rewards[:, 2:].mean(1) == rate)).sum(1)  # [12]
        inside = rates.flip(2) == rate
        target = chance @ learnt / chance.sum()
        errors = ((found - target) * inside).sum((1, 2)) / (2 * chance.sum())
        assert within_errors(errors, 0.0, learnt.max())


@slow
def test_progress_at_one_length():
    policies, diagonal = Softmax(), DIAGONALS["diagonal"]
    exact, found, squares = {}, {}, {}
    for norm in ("none", "std"):
        steps = policies.steps(norm)
        mean = (policies.chance[..., None] * steps).sum(1)  # [12, 6]
        pairs = policies.gradients @ (mean * diagonal).T
        exact[norm] = (pairs.sum() - pairs.trace()) / 12 / 11
        second = (policies.chance * (steps**2 @ diagonal)).sum()  # of |step|^2, over prompts
        total = (mean.sum(0) ** 2 * diagonal).sum() - ((mean**2) @ diagonal).sum()
        squares[norm] = (second + total) / 144
        values, lengths, _ = policies.sample(norm, diagonal, 2400)
        assert within_errors(lengths**2, squares[norm])
        found[norm] = values.mean((1, 2)).view(-1, 30).mean(1), (lengths**2).view(-1, 30).mean(1)
    kappa = (found["none"][1] / found["std"][1]).sqrt()  # a block's
    expected = (squares["none"] / squares["std"]).sqrt() * exact["std"] - exact["none"]
    difference = kappa * found["std"][0] - found["none"][0]
    assert within_errors(difference, expected, exact["none"])


def test_progress_of_silent_groups_by_hand():
    """Gradients (1, 0), 0 and (2, 1), whole groups alike in both halves; a lr-free step of group 3
    and scales 1, 5, 2: of the others (2/3) * 2 * (2, 1) . (1, 0) / 2, 0, and (2/3) * (2, 0) / 2."""
    g = torch.tensor([[1.0, 0], [0, 0], [2, 1]]).double()
    values, length = grpo.progress(g @ g.T, g @ g.T, g @ g.T, 3, torch.tensor([1.0, 5, 2]).double())
    assert values.flatten().tolist() == pytest.approx([4 / 3, 4 / 3, 0, 0, 2 / 3, 2 / 3])
    assert float(length) == pytest.approx(2 / 9 * 29**0.5)  # of (1 + 4, 0 + 2) * 2/3 / 3


def test_step_diagonal_by_hand():
    """v = 4, 0 and the floor sqrt(2)/10; after one step the bias is undone."""
    x, y = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    adam = torch.optim.AdamW([x, y], lr=0.1, eps=0.5)
    assert grpo.step_diagonal(adam, [x, y]) is None
    x.grad, y.grad = torch.tensor([2.0, 0.0]), torch.zeros(2)
    adam.step()
    D = grpo.step_diagonal(adam, [x, y])
    torch.testing.assert_close(D[0], torch.tensor([1 / 2.5, 1 / (0.1 * 2**0.5 + 0.5)]))
    assert D[1].tolist() == [0, 0]
    sgd = grpo.step_diagonal(torch.optim.SGD([x, y], lr=0.1), [x, y])
    assert [d.tolist() for d in sgd] == [[1, 1]] * 2
    assert grpo.step_diagonal(torch.optim.Adagrad([x, y]), [x, y]) is None


@slow
def test_progress_goes_with_what_letters_learn(tmp_path):
    """In one run without the division: over cells of a letter and ten steps, from step 10 on."""
    changes = dict(norm="none", steps=60, measure_every=1, curvature=False)
    changes |= dict(eval_every=0, eval_problems=8, device="cpu", out=str(tmp_path))
    grpo.train(grpo.Config(**changes))
    found, _ = analyze.compare([analyze.read_run(tmp_path)], None)
    assert found["progress"]["cells"] == 30
    assert found["progress"]["r"] > 0
