"""The published code itself, to measure against: ``--published FOLDER``, a clone of github.com/rulixiang/afa.

None of it is part of this project, whose licence it does not share. Its network, its CAM, its random walk and its PAR
are imported from the clone and called in the order of its training script, with the weights of this project's model.
What the script does between the calls is written out here, not called in afa_core: the two are compared. What it
imports besides torch and numpy need not be installed: a step uses none of it but the few parts given here.

Shapes: as in ``afa_core``.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afa_core.affinity import window_mask
from afa_core.backbone.mit import SIZES
from afa_core.backbone.stochastic_depth import StochasticDepth
from afa_core.cam import resize
from afa_core.classes import IGNORE_INDEX
from afa_core.config import CamConfig, LossConfig, ParConfig
from afa_core.model import AFANet
from afa_core.published import published_to_own_name
from afa_core.step import Batch
from pipelines.errors import UsageError

CAM, PAR, LOSS = CamConfig(), ParConfig(), LossConfig()
SETTINGS = SimpleNamespace(
    cam=SimpleNamespace(
        bkg_score=CAM.background_score, low_thre=CAM.background_score_low, high_thre=CAM.background_score_high
    ),
    dataset=SimpleNamespace(ignore_index=IGNORE_INDEX),
)
_FILES = (
    "wetr/model_attn_aff.py", "wetr/mix_transformer.py", "wetr/segformer_head.py", "wetr/PAR.py",
    "utils/camutils.py", "utils/losses.py", "utils/imutils.py",
)  # fmt: skip
_UNUSED = ("imageio", "matplotlib", "matplotlib.pyplot", "pydensecrf", "pydensecrf.densecrf", "pydensecrf.utils",
           "torchvision")  # fmt: skip


class ConvModule(nn.Module):
    """mmcv's convolution, norm and rectifier; its norm over all processes is that of one here."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, norm_cfg: dict[str, Any]) -> None:
        super().__init__()
        del norm_cfg
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, maps: Tensor) -> Tensor:
        """[B, c, h, w] -> [B, k, h, w]."""
        return F.relu(self.bn(self.conv(maps)), inplace=True)


class PublishedCode:
    """A training step by the published code."""

    def __init__(self, folder: str, backbone: str, own: AFANet) -> None:
        """Import the code and give its network this model's weights.

        Args:
            folder: a clone of it.
            backbone: name of the model's, a Mix Transformer.
            own: this project's model; not changed.

        Raises:
            UsageError: the folder does not hold the code, or the code has no such backbone.
        """
        check_clone(folder)
        sys.path.insert(0, folder)
        _stand_in()
        network, self.maps, self.losses, images, refinement = map(
            importlib.import_module,
            ("wetr.model_attn_aff", "utils.camutils", "utils.losses", "utils.imutils", "wetr.PAR"),
        )
        device = own.classifier.weight.device
        self.unit = images.denormalize_img2
        self.par = refinement.PAR(num_iter=PAR.iterations, dilations=list(PAR.dilations)).to(device)
        self.model = _network(network, backbone, own).to(device)

    def training_loss(self, batch: Batch) -> Tensor:
        """The loss of a step; labels are made while the graph of the forward pass is held, as its script does."""
        side = batch.image.shape[2] // 16
        class_logits, seg_logits, _, affinity = self.model(batch.image)
        cam, affinity_matrix = self.multi_scale_cam(batch.image)
        with torch.autocast(batch.image.device.type, enabled=False):  # its walk and PAR stop at 16 bit with an error
            refined_cam, refined_affinity = self.refine(batch, cam.float(), affinity_matrix.float())
        near = window_mask((side, side), CAM.affinity_radius).numpy()
        affinity_label = self.maps.cams_to_affinity_label(refined_cam, mask=near, ignore_index=IGNORE_INDEX)
        aff, _, _ = self.losses.get_aff_loss(affinity, affinity_label)
        seg_logits = resize(seg_logits, refined_cam.shape[1:])
        seg = self.losses.get_seg_loss(seg_logits, refined_affinity.long(), ignore_index=IGNORE_INDEX)
        cls = F.multilabel_soft_margin_loss(class_logits, batch.cls_label)
        loss: Tensor = cls + LOSS.segmentation_weight * seg + LOSS.affinity_weight * aff
        return loss

    def multi_scale_cam(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Maps [B, F, H, W] and the affinity [2B, M, M] of the largest scale, pictures and mirrors."""
        maps: tuple[Tensor, Tensor] = self.maps.multi_scale_cam_with_aff_mat(
            self.model, inputs=image, scales=CAM.scales
        )
        return maps

    def refine(self, batch: Batch, cam: Tensor, affinity: Tensor) -> tuple[Tensor, Tensor]:
        """Labels [B, H, W] of the refined CAM and of the refined affinity CAM."""
        tools, unit, boxes, size = self.maps, self.unit(batch.image.clone()), batch.boxes, batch.image.shape[2:]
        side = int(size[0] * max(CAM.scales)) // 16
        near = window_mask((side, side), CAM.affinity_radius).numpy()
        valid_cam, _ = tools.cam_to_label(cam, cls_label=batch.cls_label, img_box=boxes, ignore_mid=True, cfg=SETTINGS)
        small = resize(valid_cam, (side, side))
        with_background = torch.cat([torch.ones_like(batch.cls_label[:, :1]), batch.cls_label], dim=1)
        found = []
        for score in (CAM.background_score_low, CAM.background_score_high):
            walked = tools.propagte_aff_cam_with_bkg(
                small, aff=affinity.clone(), mask=near, cls_labels=batch.cls_label, bkg_score=score
            )
            walked = resize(walked, size)
            refined = tools.refine_cams_with_cls_label(
                self.par, unit, cams=walked, labels=with_background, img_box=boxes
            )
            found.append(refined.argmax(dim=1))
        low, high = found
        label = high.masked_fill(high == 0, IGNORE_INDEX).masked_fill((high + low) == 0, 0)
        refined_affinity = tools.ignore_img_box(label, img_box=boxes, ignore_index=IGNORE_INDEX)
        refined_cam = tools.refine_cams_with_bkg_v2(
            self.par, unit, cams=cam, cls_labels=batch.cls_label, cfg=SETTINGS, img_box=boxes
        )
        return refined_cam, refined_affinity


def _network(code: ModuleType, backbone: str, own: AFANet) -> nn.Module:
    if backbone not in SIZES or not hasattr(code.mix_transformer, backbone):
        raise UsageError(f"--backbone {backbone}: the published code has mit_b0 to mit_b5")
    network: nn.Module = code.WeTr(
        backbone, num_classes=own.num_foreground + 1, embedding_dim=own.decoder.fusion.out_channels,
        stride=[4, 2, 2, 1], pretrained=False, pooling="gmp",
    )  # fmt: skip
    state = own.state_dict()
    network.load_state_dict(
        {name: state[str(published_to_own_name(name))].view_as(value) for name, value in network.state_dict().items()}
    )
    return network


def check_clone(folder: str) -> None:
    """Raise if the folder does not hold the published code.

    Raises:
        UsageError: it does not.
    """
    missing = [name for name in _FILES if not (Path(folder) / name).is_file()]
    if missing:
        raise UsageError(f"--published {folder}: must be a clone of github.com/rulixiang/afa; it has no {missing[0]}")


def _stand_in() -> None:
    for name in _UNUSED:
        sys.modules[name] = MagicMock()
    sys.modules["mmcv"], sys.modules["mmcv.cnn"] = ModuleType("mmcv"), _module("mmcv.cnn", ConvModule=ConvModule)
    sys.modules["timm.models.layers"] = _module(
        "timm.models.layers", DropPath=StochasticDepth, trunc_normal_=nn.init.trunc_normal_, to_2tuple=_pair
    )


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(content)
    return module


def _pair(value: Any) -> tuple[Any, Any]:
    return value, value
