"""What a trained network is on disk.

A *bundle* is a folder that is enough to label with: ``model.safetensors`` and ``config.json`` (class list, model,
CAM, PAR and labelling configuration). Training state (optimiser, step) lies in a file of its own beside it.
Nothing that is read here can execute code.

Import of published checkpoints: ``afa_core.published``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from afa_core.classes import check_classes
from afa_core.config import CamConfig, LabelConfig, ModelConfig, ParConfig
from afa_core.errors import InputError
from afa_core.model import AFANet, build_model

ConfigT = TypeVar("ConfigT")

FORMAT_VERSION = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True)
class Bundle:
    """A network and everything that labelling with it needs."""

    model: AFANet
    classes: tuple[str, ...]
    model_config: ModelConfig
    cam_config: CamConfig
    par_config: ParConfig
    label_config: LabelConfig
    digest: str


def save_bundle(
    folder: str | Path,
    model: AFANet,
    classes: tuple[str, ...],
    model_config: ModelConfig,
    cam_config: CamConfig,
    par_config: ParConfig,
    label_config: LabelConfig | None = None,
) -> None:
    """Write weights and configuration into ``folder``, which is made."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    config = {
        "format_version": FORMAT_VERSION,
        "classes": list(classes),
        "model": dataclasses.asdict(model_config),
        "cam": dataclasses.asdict(cam_config),
        "par": dataclasses.asdict(par_config),
        "label": dataclasses.asdict(label_config or LabelConfig()),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_bundle(folder: str | Path, device: torch.device | str = "cpu") -> Bundle:
    """The network of a bundle in evaluation mode, with its configuration.

    Raises:
        InputError: the folder holds no bundle, or one that this version cannot read.
    """
    folder = Path(folder)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder} holds no usable model: it has no {' and no '.join(missing)}")
    try:
        config = json.loads((folder / CONFIG).read_text())
        state = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder} holds no usable model ({CONFIG} and {WEIGHTS}): {error}") from error
    if not isinstance(config, dict) or config.get("format_version") != FORMAT_VERSION:
        raise InputError(f"{folder / CONFIG} has no format_version {FORMAT_VERSION}: written by another version?")
    try:
        classes = check_classes(config["classes"])
        # Weights come from the bundle, so nothing else may be loaded first.
        model_config = dataclasses.replace(config_from_json(ModelConfig, config["model"]), pretrained=None)
        model = build_model(model_config, len(classes))
        model.load_state_dict(state)
        bundle = Bundle(
            model=model.eval(),
            classes=classes,
            model_config=model_config,
            cam_config=config_from_json(CamConfig, config["cam"]),
            par_config=config_from_json(ParConfig, config["par"]),
            label_config=config_from_json(LabelConfig, config["label"]),
            digest=bundle_digest(folder),
        )
    except (InputError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: {CONFIG} and {WEIGHTS} do not fit: {type(error).__name__}: {reason}") from error
    bundle.model.to(device)
    return bundle


def bundle_digest(folder: str | Path) -> str:
    """SHA-256 over configuration and weights, hexadecimal: the identity of a model."""
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        digest.update((Path(folder) / name).read_bytes())
    return digest.hexdigest()


def config_from_json(kind: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """A configuration dataclass from its JSON form, lists back to tuples; TypeError for an unknown key."""
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def save_training_state(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write optimiser state and step (tensors, numbers, strings and containers only)."""
    torch.save(dict(state), path)


def load_training_state(path: str | Path) -> dict[str, Any]:
    """Read what ``save_training_state`` wrote, executing nothing."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def load_weights(model: AFANet, folder: str | Path) -> None:
    """Fill ``model`` with the weights of a bundle."""
    state: dict[str, Tensor] = load_file(Path(folder) / WEIGHTS)
    model.load_state_dict(state)
