"""What a trained network is on disk.

It is a bundle (``afa_core.bundle``); training state (optimiser, step) lies in a file of its own beside it. Nothing
that is read here can execute code.

Import of published checkpoints: ``afa_core.published``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from afa_core.bundle import CONFIG, FORMAT_VERSION, WEIGHTS, BundleConfig, does_not_fit, read_bundle_config
from afa_core.config import CamConfig, LabelConfig, ModelConfig, ParConfig
from afa_core.errors import InputError
from afa_core.model import AFANet, build_model


@dataclass(frozen=True, kw_only=True)
class Bundle(BundleConfig):
    """A network and everything that labelling with it needs."""

    model: AFANet


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
    config = read_bundle_config(folder)
    try:
        model = build_model(config.model_config, len(config.classes))
        load_weights(model, folder)
    except (InputError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise does_not_fit(folder, error) from error
    return Bundle(model=model.eval().to(device), **vars(config))


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
