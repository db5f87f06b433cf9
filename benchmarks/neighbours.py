"""Methods beside GRPO, each as the one function of grpo.py that it changes; all else, random numbers too, stays.

    python benchmarks/neighbours.py vl-norm --norm std --seed 1     # any flags of grpo.py
    python benchmarks/neighbours.py nsgd --lr 0.1                   # lr: the length of a step
    python benchmarks/neighbours.py vespo --epochs 4                # at one epoch it is REINFORCE
    python benchmarks/neighbours.py spo

    method    instead of
    vl-norm   token_weights       longer completions, whose gradients vary more, count less (arXiv 2509.07558)
    nsgd      make_optimizer      steps of one length along the momentum (arXiv 2410.16561)
    vespo     policy_loss         a smooth weight of the sequence's importance ratio, no clip (arXiv 2602.10693)
    spo       group_advantages    a baseline that remembers each prompt; norms are not used (arXiv 2509.13232)

Geometry and probe are off: they measure gradients that would go past three of these functions.
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
    """length^-a over its sum over the batch; at a = 1 the variance is least, if a gradient's grows like its length.
    lengths: [P, G]; agg is not used. Returns [P, G].
    """
    powers = lengths.float() ** -a
    return powers / powers.sum()


class NormalizedSGD(torch.optim.Optimizer):
    """SGD along the exponential mean m of gradients by lr * m / |m|, of all parameters together; no step at m = 0."""

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


def vespo_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor, clip: float) -> Tensor:
    """-sum of weights * phi(W) * A * logprobs, W the importance ratio of the whole sequence, phi not differentiated.
    phi(W) = W^c1 * exp(c2 * (1 - W)), 1 at W = 1, near 0 far off it; (c1, c2) = (2, 3) where A > 0, else (3, 2).
    logprobs, old_logprobs: [n, T], 0 beyond a completion; advantages, weights: [n, 1]; clip is not used.
    """
    log_ratio = (logprobs.detach() - old_logprobs).sum(dim=1, keepdim=True).clamp(-20, 20)  # [n, 1]
    c1 = torch.where(advantages > 0, 2.0, 3.0)
    phi = (c1 * log_ratio + (5 - c1) * (1 - log_ratio.exp())).exp()
    return -(weights * phi * advantages * logprobs).sum()


class Tracker:
    """SPO's baseline: for each prompt a Beta distribution of its pass rate, and advantages normalized over the batch.
    Before a prompt's new rewards are added, its old ones are discounted by rho = 2^(-KL / 0.06), within 0.875 and 0.96;
    KL, in nats a token, is from the policy that sampled the prompt last to the present one, on those completions.
    Simplified: a group is G observations; the first baseline is the mean of the group's other rewards, where the paper
    samples each prompt in advance; prompts come in turn, not by uncertainty.
    """

    def __init__(self) -> None:
        self.beta: dict[tuple[int, ...], tuple[float, float]] = {}  # of a prompt's tokens: counts of right and wrong
        self.last: dict[tuple[int, ...], grpo.Group] = {}
        self.sample = grpo.rollout

    def rollout(self, policy: grpo.Policy, prompts: list[list[int]], uniforms: Tensor, temperature: float):
        """grpo.rollout, which has what group_advantages is not given: the policy, the prompts and their tokens."""
        self.policy, self.temperature = policy, temperature
        self.groups = self.sample(policy, prompts, uniforms, temperature)
        return self.groups

    @torch.no_grad()
    def divergence(self, group: grpo.Group) -> float:
        """Estimate of KL(policy then || policy now) in nats a token, on completions sampled then."""
        config: Any = SimpleNamespace(micro_batch=4096, device=self.policy.model.device, temperature=self.temperature)
        total = 0.0
        for rows, now in grpo.pass_logprobs(self.policy.model, group, list(range(len(group.tokens))), config):
            then = group.logprobs[rows, : now.shape[1]].to(now)
            total += float(grpo.k3_divergence(then, then, now).sum())  # 0 beyond a completion
        return total / float(group.lengths.sum())

    def advantages(self, rewards: Tensor, norm: str) -> Tensor:
        """(A - mean) / deviation over the batch, A = reward - baseline. rewards: [P, G] in [0, 1] -> [P, G]."""
        found = []
        for group, row in zip(grpo.gather(self.groups), rewards):
            key, right, n = tuple(group.prompt.tolist()), float(row.sum()), len(row)
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
    """grpo.Config with the method in it, and so in config.json: analyze.py tells its runs from those of grpo.py."""

    method: Literal["vl-norm", "nsgd", "vespo", "spo"] = "vl-norm"  # the first argument
    geometry_every: int = 0
    probe_every: int = 0

    def __post_init__(self) -> None:
        if self.geometry_every or self.probe_every:
            raise grpo.InputError("geometry_every and probe_every are 0 here: they would measure another method")
        if self.method == "spo" and self.resume:
            raise grpo.InputError("a run of spo cannot be resumed: its tracker is not in the checkpoint")
        self.out = self.out or f"runs/{self.task}-{self.method}-{self.norm}-{self.seed}"
        super().__post_init__()


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
        print(f"neighbours.py: error: the first argument is one of {', '.join(functions)}", file=sys.stderr)
        return 2
    vars(grpo).update(functions[method], Config=Config)
    return grpo.main([f"--method={method}", *rest])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
