"""The optimiser of the pico suite's weight matrices: Muon. Training only; needs torch."""

from __future__ import annotations

from collections.abc import Iterable

import torch

# Quintic Newton-Schulz coefficients of Jordan et al., "Muon" (2024, kellerjordan.github.io/posts/muon).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalised(matrix: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Float32 [R, C] -> the same shape with all singular values near 1 (between about 0.7 and 1.2)."""
    a, b, c = _NEWTON_SCHULZ
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Momentum (Nesterov) whose step is orthogonalised; decoupled decay; one rate for every shape."""

    def __init__(self, matrices: Iterable[torch.Tensor], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                buffer = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                buffer.lerp_(weight.grad, 1 - group["momentum"])
                direction = weight.grad.lerp(buffer, group["momentum"])
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(orthogonalised(direction), alpha=-group["lr"])
