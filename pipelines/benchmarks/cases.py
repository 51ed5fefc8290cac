"""The made-up inputs that the benchmarks of the step and its parts run on: any size, no data needed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from afa_core.backbone import kernels
from afa_core.config import ModelConfig
from afa_core.model import AFANet, build_model
from afa_core.step import Batch
from pipelines.benchmarks.measure import Case, Measurement, in_turns
from pipelines.benchmarks.published_code import check_clone
from pipelines.errors import UsageError
from pipelines.speed import can_checkpoint

# At the CAM's half scale the finest grid still has to hold the first stage's reduction.
SMALLEST_CROP_PX = 64
# Whose scales of 1 and 1.5 are whole tokens.
PUBLISHED_CROP_PX = 32
FORMS = ("plain", "here")
PUBLISHED = "published"


@dataclass(frozen=True)
class Size:
    """What is measured: plain values, so that it travels to a process of its own."""

    backbone: str = "mit_b1"
    crop_px: int = 320
    batch: int = 2
    classes: int = 20
    tags: int = 2  # a picture
    threads: int = 0  # 0: torch's own choice
    bfloat16: bool = False
    gradient_checkpointing: bool = False
    compiled: bool = False
    published: str = ""  # folder of a clone of the published code

    @property
    def device(self) -> torch.device:
        """A GPU if there is one."""
        return kernels.best_device()


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the sizes."""
    parser.add_argument("--backbone", default="mit_b1")
    parser.add_argument("--crop", type=int, nargs="+", default=[320], metavar="PIXELS")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--classes", type=int, default=20, help="foreground classes")
    parser.add_argument("--tags", type=int, default=2, help="labelled classes of a picture")
    parser.add_argument(
        "--published", default="", metavar="FOLDER", help="measure the published code in this clone, too"
    )
    parser.add_argument("--threads", type=int, default=0, help="default: one a processor")
    parser.add_argument("--repetitions", type=int, default=3, help="counted calls of a case and round")
    parser.add_argument("--rounds", type=int, default=1, help="turns that the cases take")


def forms_in_turns(
    part: str,
    measure: Callable[[Size, str, int], Measurement],
    arguments: argparse.Namespace,
    forms: Sequence[str] = FORMS,
) -> list[Measurement]:
    """Measure the forms of a part of the step, for every crop that was asked for, the published code's first."""
    forms = [PUBLISHED, *forms] if arguments.published else forms
    cases = [
        Case(f"{part}/{size.crop_px}/{form}", measure, (size, form, arguments.repetitions))
        for size in sizes_from(arguments)
        for form in forms
    ]
    return in_turns(cases, arguments.rounds)


def sizes_from(arguments: argparse.Namespace) -> list[Size]:
    """A size for every crop that was asked for.

    Raises:
        UsageError: a number is too small, or the published code is not where it was said to be.
    """
    if arguments.published:
        check_clone(arguments.published)
        odd = [crop_px for crop_px in arguments.crop if crop_px % PUBLISHED_CROP_PX]
        if odd:
            raise UsageError(f"--crop {odd[0]}: the published code takes multiples of {PUBLISHED_CROP_PX}")
    least = {"crop": SMALLEST_CROP_PX, "batch": 1, "classes": 1, "tags": 0, "threads": 0, "repetitions": 1, "rounds": 1}
    check_numbers(arguments, least)
    if getattr(arguments, "gradient_checkpointing", False) and not can_checkpoint(arguments.backbone):
        raise UsageError(f"--gradient-checkpointing: {arguments.backbone} has none, a Mix Transformer (mit_...) has")
    return [
        Size(
            backbone=arguments.backbone,
            crop_px=crop_px,
            batch=arguments.batch,
            classes=arguments.classes,
            tags=min(arguments.tags, arguments.classes),
            threads=arguments.threads,
            bfloat16=getattr(arguments, "bfloat16", False),
            gradient_checkpointing=getattr(arguments, "gradient_checkpointing", False),
            compiled=getattr(arguments, "compiled", False),
            published=arguments.published,
        )
        for crop_px in arguments.crop
    ]


def check_numbers(arguments: argparse.Namespace, least: Mapping[str, int]) -> None:
    """See that options are at least so much.

    Raises:
        UsageError: one is not.
    """
    for name, bound in least.items():
        given = getattr(arguments, name)
        for value in given if isinstance(given, list) else [given]:
            if value < bound:
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least {bound}")


def prepare(size: Size) -> tuple[AFANet, Batch]:
    """Network with random weights and a batch of smooth random pictures, on the device."""
    if size.threads:
        torch.set_num_threads(size.threads)
    torch.manual_seed(0)
    model = build_model(ModelConfig(backbone=size.backbone), size.classes).to(size.device)
    coarse = torch.rand(size.batch, 3, size.crop_px // 16, size.crop_px // 16)
    image = torch.nn.functional.interpolate(coarse, size=[size.crop_px] * 2, mode="bicubic") * 4 - 2
    cls_label = torch.zeros(size.batch, size.classes)
    for index in range(size.batch):
        cls_label[index, torch.randperm(size.classes)[: size.tags]] = 1
    boxes = torch.tensor([[0, size.crop_px, 0, size.crop_px]] * size.batch)
    return model, Batch(image.to(size.device), cls_label.to(size.device), boxes)
