"""Methods beside GRPO, each by the one function of grpo.py that it replaces. All else stays as it
is, the random numbers too.

    python benchmarks/neighbours.py vl-norm --norm std --seed 1     # any flags of grpo.py
    python benchmarks/neighbours.py nsgd --lr 0.1                   # lr: the length of a step
    python benchmarks/neighbours.py vespo --epochs 4                # at one epoch it is REINFORCE
    python benchmarks/neighbours.py spo

    method    instead of
    vl-norm   token_weights       longer completions, whose gradients vary more, count less
                                  (arXiv 2509.07558)
    nsgd      make_optimizer      steps of one length along the momentum (arXiv 2410.16561)
    vespo     policy_loss         a smooth weight of the sequence's importance ratio, no clip
                                  (arXiv 2602.10693)
    spo       group_advantages    a baseline that remembers each prompt; norms are not used
                                  (arXiv 2509.13232)

Geometry and probe are off. To get the gradient of a prompt's expected reward, they divide its part
of the update by the norm's scale and by a single weight for all its completions, and they assume
rewards centred on the group's mean. With spo and vl-norm that would give a different gradient. With
nsgd and vespo they would measure the same as with GRPO, because they run before the optimizer's
step, at a batch's first update, where the importance ratio is 1.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo  # noqa: E402


def vl_norm_weights(lengths: Tensor, agg: str, a: float = 0.75) -> Tensor:
    """length^-a over its sum over the batch. If a gradient's variance grows like the length, a = 1
    gives the least variance. lengths: [P, G]; agg is not used. Returns [P, G].
    """
    powers = lengths.float() ** -a
    return powers / powers.sum()


class NormalizedSGD(torch.optim.Optimizer):
    """SGD by steps of lr * m / |m|, m the exponential mean of the gradients and |m| its size over
    all parameters together; no step where m = 0."""

    def __init__(self, parameters: list[Tensor], lr: float, momentum: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        (settings,) = self.param_groups
        parameters = settings["params"]
        means = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in parameters]
        for mean, parameter in zip(means, parameters):
            mean.lerp_(parameter.grad, 1 - settings["momentum"])
        size = float(get_total_norm(means))
        for mean, parameter in zip(means if size else (), parameters):
            parameter.sub_(mean, alpha=settings["lr"] / size)


def vespo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor, clip: float
) -> Tensor:
    """-sum of weights * phi(W) * A * logprobs, W the importance ratio of the whole sequence; phi is
    not differentiated. phi(W) = W^c1 * exp(c2 * (1 - W)) is 1 at W = 1 and near 0 far from it; (c1,
    c2) is (2, 3) where A > 0, else (3, 2).
    logprobs, old_logprobs: [n, T], 0 beyond a completion; advantages, weights: [n, 1]; clip is not
    used.
    """
    log_ratio = (logprobs.detach() - old_logprobs).sum(dim=1, keepdim=True).clamp(-20, 20)  # [n, 1]
    c1 = torch.where(advantages > 0, 2.0, 3.0)
    phi = (c1 * log_ratio + (5 - c1) * (1 - log_ratio.exp())).exp()
    return -(weights * phi * advantages * logprobs).sum()


class Tracker:
    """SPO's baseline: it keeps a Beta distribution of each prompt's pass rate, and normalizes the
    advantages over the batch. Before a prompt's new rewards are added, its old ones are discounted
    by rho = 2^(-KL / 0.06), but by at least 0.875 and at most 0.96. The KL, in nats a token, is
    from the policy that last sampled the prompt to the present one, on the completions of then.

    Simplified: a group counts as G observations. The first baseline is the mean of the group's
    other rewards, where the paper samples each prompt in advance. Prompts come in turn, not by
    uncertainty.
    """

    def __init__(self) -> None:
        # By a prompt's tokens: counts of right and wrong, and its completions of the last time.
        self.beta: dict[tuple[int, ...], tuple[float, float]] = {}
        self.last: dict[tuple[int, ...], Any] = {}
        self.sample = grpo.rollout

    def rollout(
        self, policy: grpo.Policy, prompts: list[list[int]], uniforms: Tensor, temperature: float
    ) -> grpo.Batch:
        """grpo.rollout; it keeps what group_advantages is not given: policy, prompts, tokens."""
        self.policy, self.temperature = policy, temperature
        self.batch = self.sample(policy, prompts, uniforms, temperature)
        return self.batch

    def groups(self) -> list[Any]:
        """The batch's prompts, each as a batch of its own with what `divergence` needs."""
        names = ("tokens", "lengths", "logprobs")
        columns = zip(*(getattr(self.batch, name).split(1) for name in names))
        parts = [dict(zip(names, map(torch.clone, column))) for column in columns]
        return [SimpleNamespace(prompts=[p], **x) for p, x in zip(self.batch.prompts, parts)]

    @torch.no_grad()
    def divergence(self, group: Any) -> float:
        """Estimate of KL(policy then || policy now) in nats a token, on completions of then."""
        config, total = SimpleNamespace(temperature=self.temperature), 0.0
        for rows in grpo.split_rows(group, range(group.lengths.numel()), self.policy.limits):
            now = grpo.completion_logprobs(self.policy, group, rows, config)
            then = group.logprobs.flatten(0, 1)[rows, : now.shape[1]].to(now)
            total += float(grpo.k3_divergence(then, then, now).sum())  # 0 beyond a completion
        return total / float(group.lengths.sum())

    def advantages(self, rewards: Tensor, norm: str) -> Tensor:
        """(A - mean) / deviation over the batch, A = reward - baseline.
        rewards: [P, G] in [0, 1] -> [P, G]; norm is not used."""
        found = []
        for group, row in zip(grpo.gather(self.groups()), rewards):
            key, right, n = tuple(group.prompts[0]), float(row.sum()), len(row)
            alpha, beta = self.beta.get(key, (0.0, 0.0))
            if key in self.last:
                found.append(row - alpha / (alpha + beta))
                rho = min(max(2 ** (-self.divergence(self.last[key]) / 0.06), 0.875), 0.96)
                alpha, beta = rho * alpha, rho * beta
            else:
                found.append(row - (right - row) / (n - 1))
            self.beta[key], self.last[key] = (alpha + right, beta + n - right), group
        A = torch.stack(found)
        return (A - A.mean()) / (A.std(correction=0) + 1e-6)


@dataclass
class Config(grpo.Config):
    """grpo.Config plus the method, so that config.json records it and analyze.py can tell these
    runs from those of grpo.py."""

    method: Literal["vl-norm", "nsgd", "vespo", "spo"] = "vl-norm"  # the first argument
    geometry_every: int = 0
    probe_every: int = 0

    def __post_init__(self) -> None:
        if self.geometry_every or self.probe_every:
            off = "what they measure is defined for grpo.py's own weights and advantages"
            raise grpo.InputError(f"geometry_every and probe_every are 0 here: {off}")
        if self.method == "spo" and self.resume:
            lost = "its tracker is not in the checkpoint"
            raise grpo.InputError(f"a run of spo cannot be resumed: {lost}")
        given = self.out
        super().__post_init__()  # which names the task, where none is given
        self.out = given or f"runs/{self.task}-{self.method}-{self.norm}-{self.seed}"


def main(arguments: Sequence[str]) -> int:
    """Put the method named first in its place and run grpo.main; returns the exit status."""
    tracker = Tracker()
    functions: dict[str, dict[str, Any]] = {
        "vl-norm": {"token_weights": vl_norm_weights},
        "nsgd": {"make_optimizer": lambda masters, config: NormalizedSGD(masters, config.lr)},
        "vespo": {"policy_loss": vespo_loss},
        "spo": {"group_advantages": tracker.advantages, "rollout": tracker.rollout},
    }
    method, *rest = arguments or ["none"]
    if method not in functions:
        wanted = f"the first argument is one of {', '.join(functions)}"
        print(f"neighbours.py: error: {wanted}", file=sys.stderr)
        return 2
    vars(grpo).update(functions[method], Config=Config)
    return grpo.main([f"--method={method}", *rest])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
