"""``afa bench step``: a training iteration, forward, pseudo-labels, losses and gradients, against its plain form."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from afa_core.config import CamConfig, LossConfig, ParConfig
from afa_core.step import training_step
from pipelines.benchmarks import plain_form
from pipelines.benchmarks.cases import FORMS, PUBLISHED, Size, add_size_arguments, forms_in_turns, prepare
from pipelines.benchmarks.measure import Measurement, peak_mib, repeat
from pipelines.benchmarks.published_code import PublishedCode
from pipelines.speed import SpeedConfig, apply_speed

# Step 0 is in the phase that all labels are made in.
LOSS = LossConfig(classification_steps=0, affinity_label_step=0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``afa bench step``."""
    add_size_arguments(parser)
    parser.add_argument("--bfloat16", action="store_true", help="the network under autocast")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--compiled", action="store_true", help="the backbone through torch.compile")
    parser.add_argument("--only", choices=FORMS, help="measure one of the two forms")


def run(arguments: argparse.Namespace) -> list[Measurement]:
    """The plain form and this project's, for every crop."""
    return forms_in_turns("step", measure, arguments, [arguments.only] if arguments.only else FORMS)


def measure(size: Size, form: str, repetitions: int) -> Measurement:
    """One form, in this process."""
    model, batch = prepare(size)
    model.train()
    network: nn.Module = model
    mixed = torch.autocast(size.device.type, torch.bfloat16, enabled=size.bfloat16)
    loss: Callable[[], Tensor]
    if form == PUBLISHED:
        code = PublishedCode(size.published, size.backbone, model)
        network = code.model.train()

        def loss() -> Tensor:
            with mixed:
                return code.training_loss(batch)
    elif form == "plain":
        plain_form.use_plain_kernels()

        def loss() -> Tensor:
            with mixed:
                return plain_form.training_loss(model, batch, CamConfig(), ParConfig(), LOSS)
    else:
        speed = SpeedConfig(compile=size.compiled, gradient_checkpointing=size.gradient_checkpointing)
        apply_speed(speed, model.backbone)

        def loss() -> Tensor:
            return training_step(model, batch, 0, CamConfig(), ParConfig(), LOSS, bfloat16=size.bfloat16).loss

    def iterate() -> None:
        network.zero_grad()
        loss().backward()

    seconds = repeat(iterate, repetitions)
    return Measurement(name=form, seconds=seconds, images=size.batch, peak_mib=peak_mib())
