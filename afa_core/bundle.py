"""What a bundle says beside its weights: all that the driver of a labelling job needs, which so has no use for torch.

A *bundle* is a folder that is enough to label with: ``model.safetensors`` and ``config.json`` (class list, model,
CAM, PAR and labelling configuration). ``checkpoint`` writes it and makes the network of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open

from afa_core.classes import check_classes
from afa_core.config import CamConfig, LabelConfig, ModelConfig, ParConfig
from afa_core.errors import InputError

ConfigT = TypeVar("ConfigT")

FORMAT_VERSION = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True, kw_only=True)
class BundleConfig:
    """Everything that labelling with a network needs but the network."""

    classes: tuple[str, ...]
    model_config: ModelConfig
    cam_config: CamConfig
    par_config: ParConfig
    label_config: LabelConfig
    digest: str


def read_bundle_config(folder: str | Path) -> BundleConfig:
    """What a bundle says; that its weights are a whole file of weights is seen, not that they fit.

    Raises:
        InputError: the folder holds no bundle, or one that this version cannot read.
    """
    folder = Path(folder)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder} holds no usable model: it has no {' and no '.join(missing)}")
    try:
        config = json.loads((folder / CONFIG).read_text())
        with safe_open(folder / WEIGHTS, "numpy"):
            pass
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder} holds no usable model ({CONFIG} and {WEIGHTS}): {error}") from error
    if not isinstance(config, dict) or config.get("format_version") != FORMAT_VERSION:
        raise InputError(f"{folder / CONFIG} has no format_version {FORMAT_VERSION}: written by another version?")
    try:
        return BundleConfig(
            classes=check_classes(config["classes"]),
            # Weights come from the bundle, so nothing else may be loaded first.
            model_config=dataclasses.replace(config_from_json(ModelConfig, config["model"]), pretrained=None),
            cam_config=config_from_json(CamConfig, config["cam"]),
            par_config=config_from_json(ParConfig, config["par"]),
            label_config=config_from_json(LabelConfig, config["label"]),
            digest=bundle_digest(folder),
        )
    except (InputError, KeyError, TypeError, ValueError) as error:
        raise does_not_fit(folder, error) from error


def does_not_fit(folder: Path, error: Exception) -> InputError:
    """What is said of a bundle with something in it that no network can be made of."""
    reason = " ".join(str(error).split())[:300]
    return InputError(f"{folder}: {CONFIG} and {WEIGHTS} do not fit: {type(error).__name__}: {reason}")


def bundle_digest(folder: str | Path) -> str:
    """SHA-256 over configuration and weights, hexadecimal: the identity of a model."""
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        digest.update((Path(folder) / name).read_bytes())
    return digest.hexdigest()


def config_from_json(kind: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """A configuration dataclass from its JSON form, lists back to tuples; TypeError for an unknown key."""
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
