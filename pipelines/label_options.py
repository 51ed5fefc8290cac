"""How the command line chooses what labelling does: a profile, options over it, one validation."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from typing import Any

from pydantic import TypeAdapter, ValidationError

from afa_core.bundle import BundleConfig
from afa_core.config import CrfConfig, LabelConfig
from pipelines.errors import UsageError

# What is measured of them stands in docs/experiments.md.
PROFILES: dict[str, dict[str, Any]] = {
    "fast": {"scales": (1.0,), "refine": "par"},
    "best": {"scales": (0.5, 0.75, 1.0, 1.25, 1.5), "refine": "affinity+par", "crf": True},
}
OPTIONS = (
    "tags", "tag_probability", "head", "refine", "scales", "crf", "background_score", "ignore_band",
    "max_side_px", "max_megapixels",
)  # fmt: skip


def add_label_options(parser: argparse.ArgumentParser) -> None:
    """Options that make a label another one; what is not given is as the model says."""
    group = parser.add_argument_group("what a label is (all of it is in the configuration digest)")
    group.add_argument("--profile", choices=sorted(PROFILES), help="fast: one scale, no affinity; best: five, and CRF")
    group.add_argument("--tags", choices=["given", "predicted", "auto"], help="auto: given ones where there are")
    group.add_argument("--tag-probability", type=float, help="from which a class counts as predicted")
    group.add_argument("--head", choices=["cam", "segmentation", "agreement"], help="agreement: 255 where they differ")
    group.add_argument("--refine", choices=["none", "par", "affinity", "affinity+par"], help="of the activation maps")
    group.add_argument("--scales", type=_numbers, help="factors on the picture's size, e.g. 1,0.5,1.5")
    group.add_argument("--crf", action=argparse.BooleanOptionalAction, help="dense CRF at the end")
    group.add_argument("--background-score", type=float, help="where background ends, 0..1 (see afa calibrate)")
    group.add_argument("--ignore-band", action="store_true", default=None, help="leave doubtful pixels 255")
    group.add_argument("--max-side-px", type=int, help="larger pictures are labelled at this long side")
    group.add_argument("--max-megapixels", type=float, help="larger pictures are not decoded (default: 100)")


def label_config(arguments: argparse.Namespace, bundle: BundleConfig) -> LabelConfig:
    """The model's own configuration, under the profile, under the options.

    Raises:
        UsageError: an option is out of range.
    """
    values = dataclasses.asdict(bundle.label_config) | PROFILES.get(arguments.profile, {})
    values |= {name: value for name in OPTIONS if (value := getattr(arguments, name)) is not None}
    try:
        return TypeAdapter(LabelConfig).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        option = f"--{str(first['loc'][0]).replace('_', '-')}"
        raise UsageError(f"{option} {first['input']}: {first['msg'].lower()}") from error


def config_digest(config: LabelConfig, bundle: BundleConfig) -> str:
    """SHA-256 over everything but the weights that a label depends on."""
    parts = [dataclasses.asdict(part) for part in (config, bundle.cam_config, bundle.par_config, CrfConfig())]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, e.g. 1,0.5,1.5") from error
