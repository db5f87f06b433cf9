"""Methods beside GRPO, each by the functions of grpo.py that it replaces. All else stays as it
is, the random numbers and the measurements too.

    python benchmarks/neighbours.py vl-norm --norm std --seed 1     # any flags of grpo.py
    python benchmarks/neighbours.py nsgd --lr 0.1                   # lr: the length of a step
    python benchmarks/neighbours.py vespo --epochs 4                # at one epoch it is REINFORCE

    method    instead of
    vl-norm   token_weights       longer completions, whose gradients vary more, count less
                                  (arXiv 2509.07558)
    nsgd      make_optimizer      steps of one length along the momentum (arXiv 2410.16561)
    vespo     policy_loss         a smooth weight of the sequence's importance ratio, no clip
                                  (arXiv 2602.10693)
    scalar    make_optimizer,     AdamW with one second moment for all weights, the mean of their
              step_diagonal       squared gradients: it scales steps, and turns none
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo  # noqa: E402
from grpo import resolve as resolve_settings  # noqa: E402


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


class ScalarAdamW(torch.optim.Optimizer):
    """AdamW without weight decay, and with one second moment: the mean over all weights."""

    def __init__(self, parameters: list[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8})

    def root(self, state: dict[str, Any]) -> Tensor:
        """The root of the second moment, free of its bias."""
        slow = self.param_groups[0]["betas"][1]
        return (state["square"] / (1 - slow ** float(state["step"]))).sqrt()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        (settings,) = self.param_groups
        parameters = settings["params"]
        fast, slow = settings["betas"]
        count = sum(p.numel() for p in parameters)
        square = torch.stack([p.grad.square().sum() for p in parameters]).sum() / count
        for p in parameters:  # each keeps the moment, so that a checkpoint has all it needs
            state = self.state[p]
            if not state:
                state.update(step=torch.zeros(()), mean=torch.zeros_like(p))
                state["square"] = torch.zeros_like(square)
            state["step"] += 1
            state["mean"].lerp_(p.grad, 1 - fast)
            state["square"].lerp_(square, 1 - slow)
            mean = state["mean"] / (1 - fast ** float(state["step"]))
            p.sub_(settings["lr"] * mean / (self.root(state) + settings["eps"]))


def scalar_diagonal(optimizer: ScalarAdamW, parameters: list[Tensor]) -> list[Tensor] | None:
    """grpo.step_diagonal of ScalarAdamW: one number, in tensors like the parameters."""
    if not all(optimizer.state[p] for p in parameters):
        return None
    eps = optimizer.param_groups[0]["eps"]
    return [torch.ones_like(p) / (optimizer.root(optimizer.state[p]) + eps) for p in parameters]


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


@dataclass
class Config(grpo.Config):
    """grpo.Config plus the method, so that config.json records it and analyze.py can tell these
    runs from those of grpo.py. `out` is by default runs/TASK-METHOD-NORM-SEED."""

    method: Literal["vl-norm", "nsgd", "vespo", "scalar"] = "vl-norm"  # the first argument


def resolve(config: Config) -> Config:
    """grpo.resolve, with this script's default of `out`."""
    if config.out is None:
        task = resolve_settings(config).task
        config = replace(config, out=f"runs/{task}-{config.method}-{config.norm}-{config.seed}")
    return resolve_settings(config)


def main(arguments: Sequence[str]) -> int:
    """Put the method named first in its place and run grpo.main; returns the exit status."""
    functions: dict[str, dict[str, Any]] = {
        "vl-norm": {"token_weights": vl_norm_weights},
        "nsgd": {"make_optimizer": lambda masters, config: NormalizedSGD(masters, config.lr)},
        "vespo": {"policy_loss": vespo_loss},
        "scalar": {
            "make_optimizer": lambda masters, config: ScalarAdamW(masters, config.lr),
            "step_diagonal": scalar_diagonal,
        },
    }
    method, *rest = arguments or ["none"]
    if method not in functions:
        wanted = f"the first argument is one of {', '.join(functions)}"
        print(f"neighbours.py: error: {wanted}", file=sys.stderr)
        return 2
    vars(grpo).update(functions[method], Config=Config, resolve=resolve)
    return grpo.main([f"--method={method}", *rest])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
