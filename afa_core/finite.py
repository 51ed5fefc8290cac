"""States that cannot be trained on: infinite or not a number."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class NonFiniteStateError(ArithmeticError):
    """Gradients, weights or statistics are infinite or not a number; the message names the step and the tensor."""


def check_finite_gradients(model: nn.Module, step: int) -> None:
    """Raise if the optimiser would make weights of these gradients that cannot be trained on.

    Raises:
        NonFiniteStateError: naming the step.
    """
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in model.parameters() if weight.grad is not None])
    if not norm.isfinite():
        raise NonFiniteStateError(f"gradient norm is {float(norm)} at step {step}")


def check_finite_state(named: Iterable[tuple[str, Tensor]], step: int) -> None:
    """Raise if a tensor must not be saved.

    Raises:
        NonFiniteStateError: naming the step and the first such tensor.
    """
    bad = next((name for name, value in named if not value.isfinite().all()), None)
    if bad is not None:
        raise NonFiniteStateError(f"{bad} is not finite after {step} steps")
