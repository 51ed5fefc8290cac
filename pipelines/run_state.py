"""What a training run is between two steps: weights, optimiser, step. As files of a checkpoint and back.

Random states are no part of it: they follow from (seed, step, rank).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from afa_core.checkpoint import load_training_state, load_weights, save_bundle, save_training_state
from afa_core.finite import check_finite_state
from afa_core.model import AFANet
from pipelines.config import ExperimentConfig

STATE = "training_state.pt"


def write_state(
    folder: Path, model: AFANet, optimizer: Optimizer, classes: tuple[str, ...], experiment: ExperimentConfig,
    **rest: Any,
) -> None:  # fmt: skip
    """Write the files of a checkpoint; ``rest`` are plain values beside the optimiser's: the step, for one."""
    save_bundle(folder, model, classes, experiment.model, experiment.cam, experiment.par, experiment.label)
    save_training_state(folder / STATE, {"optimizer": optimizer.state_dict(), **rest})


def read_state(folder: Path, model: AFANet, optimizer: Optimizer) -> dict[str, Any]:
    """Put what was written back into model and optimiser; the plain values beside it."""
    load_weights(model, folder)
    state = load_training_state(folder / STATE)
    optimizer.load_state_dict(state.pop("optimizer"))
    return state


def check_state(model: AFANet, optimizer: Optimizer, step: int) -> None:
    """See that all of it can be trained on.

    Raises:
        NonFiniteStateError: naming the first tensor that cannot.
    """
    check_finite_state(chain(model.state_dict().items(), _tensors(optimizer)), step)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Set the random generators of this process for one step."""
    state = int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])
    random.seed(state)
    np.random.seed(state % 2**32)
    torch.manual_seed(state % 2**63)


def _tensors(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                yield f"the optimiser's {name}", value
