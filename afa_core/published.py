"""Import of published checkpoints by their own names.

Two kinds are known: a whole AFA network (``encoder.*``, ``decoder.*``, ``attn_proj.*``, ``classifier.weight``,
with or without the ``module.`` of a data-parallel wrapper), and SegFormer's ImageNet ``mit_b*.pth`` (the names of
``encoder.*`` without that prefix, and a classification head that is dropped). Files are opened with
``weights_only=True``: nothing in them is executed. Weights have licences of their own: see the README.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from afa_core.errors import InputError
from afa_core.model import AFANet

_BLOCK_PARTS = {
    "norm1": "attention_norm",
    "attn.q": "attention.query",
    "attn.kv": "attention.key_value",
    "attn.proj": "attention.output",
    "attn.sr": "attention.reduction",
    "attn.norm": "attention.reduction_norm",
    "norm2": "feed_forward_norm",
    "mlp.fc1": "feed_forward.expand",
    "mlp.dwconv.dwconv": "feed_forward.depthwise",
    "mlp.fc2": "feed_forward.contract",
}
_HEADS = {
    "decoder.linear_fuse.conv": "decoder.fusion",
    "decoder.linear_fuse.bn": "decoder.norm",
    "decoder.linear_pred": "decoder.classifier",
    "classifier": "classifier",
    "attn_proj.weight": "affinity_head.head_weight",
    "attn_proj.bias": "affinity_head.bias",
}


def published_to_own_name(name: str) -> str | None:
    """Our name of a parameter or buffer of a published AFA checkpoint; None where there is none."""
    if match := re.fullmatch(r"encoder\.patch_embed([1-4])\.(proj|norm)\.(\w+)", name):
        stage, part, leaf = match.groups()
        return f"backbone.stages.{int(stage) - 1}.merging.{'projection' if part == 'proj' else part}.{leaf}"
    if match := re.fullmatch(r"encoder\.block([1-4])\.(\d+)\.(.+)\.(\w+)", name):
        stage, block, part, leaf = match.groups()
        own = _BLOCK_PARTS.get(part)
        return own and f"backbone.stages.{int(stage) - 1}.blocks.{block}.{own}.{leaf}"
    if match := re.fullmatch(r"encoder\.norm([1-4])\.(\w+)", name):
        return f"backbone.stages.{int(match[1]) - 1}.norm.{match[2]}"
    if match := re.fullmatch(r"decoder\.linear_c([1-4])\.proj\.(\w+)", name):
        return f"decoder.projections.{int(match[1]) - 1}.{match[2]}"
    for published, own in _HEADS.items():
        if name == published or name.startswith(published + "."):
            return own + name.removeprefix(published)
    return None


def import_published(model: AFANet, source: str | Path | Mapping[str, Tensor]) -> None:
    """Fill ``model`` with a published checkpoint, in place.

    Args:
        model: an AFANet with a MiT backbone.
        source: path of the checkpoint, or its entries by their published names.

    Raises:
        InputError: the file cannot be read as weights, or a name is missing, unexpected or of another shape.
    """
    entries = _open(source) if isinstance(source, str | Path) else dict(source)
    entries = {name.removeprefix("module."): value for name, value in entries.items()}
    label = str(source) if isinstance(source, str | Path) else "the published checkpoint"
    backbone_only = not any(name.startswith("encoder.") for name in entries)
    if backbone_only:
        entries = {f"encoder.{name}": value for name, value in entries.items() if not name.startswith("head.")}
    own_state = model.state_dict()
    wanted = {name for name in own_state if not backbone_only or name.startswith("backbone.")}
    renamed = {name: published_to_own_name(name) for name in entries}
    unexpected = sorted(name for name, own in renamed.items() if own not in wanted)
    missing = sorted(wanted - set(renamed.values()))
    if unexpected or missing:
        raise InputError(
            f"{label} does not fit the model (is model.backbone the right one?): "
            f"missing {_some(missing)}; unexpected {_some(unexpected)}"
        )
    state = {str(own): _fitted(name, entries[name], own_state[str(own)]) for name, own in renamed.items()}
    model.load_state_dict(own_state | state)


def _open(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a checkpoint file, also where they lie one level down."""
    if not Path(path).is_file():
        raise InputError(f"no checkpoint at {path}: give the path of a published .pth file")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"{path} is not a checkpoint of plain tensors: {str(error).splitlines()[0]}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path} holds no table of named tensors")
    return content


def _fitted(name: str, value: Tensor, own: Tensor) -> Tensor:
    """``value`` in the shape of ours; 1x1 convolutions may come as linear maps and the other way round."""
    squeezed = [size for size in value.shape if size != 1]
    if squeezed != [size for size in own.shape if size != 1]:
        raise InputError(
            f"{name} has shape {list(value.shape)}, the model wants {list(own.shape)}: "
            "check the number of classes and model.decoder_channels"
        )
    return value.reshape(own.shape)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"
