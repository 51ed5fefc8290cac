"""Parameter groups, AdamW, and the warm-up + polynomial schedule.

Source: AFA (CVPR 2022), section 4.1. Heads learn ``head_lr_factor`` times faster than the backbone. The
published run gives the backbone's norms a learning rate of 0; here they are taken out of training altogether,
which gives the same weights and costs no gradient.
"""

from __future__ import annotations

import torch
from torch import nn

from afa_core.config import OptimConfig
from afa_core.model import AFANet

_NORMS = (nn.LayerNorm, nn.BatchNorm2d)


def parameter_groups(model: AFANet) -> dict[str, list[nn.Parameter]]:
    """Every parameter in exactly one of ``backbone``, ``backbone_norms``, ``heads``, ``decoder``."""
    backbone: nn.Module = model.backbone  # type: ignore[assignment]
    norm_ids = {
        id(parameter)
        for module in backbone.modules()
        if isinstance(module, _NORMS)
        for parameter in module.parameters(recurse=False)
    }
    parameters = list(backbone.parameters())
    return {
        "backbone": [parameter for parameter in parameters if id(parameter) not in norm_ids],
        "backbone_norms": [parameter for parameter in parameters if id(parameter) in norm_ids],
        "heads": [*model.classifier.parameters(), *model.affinity_head.parameters()],
        "decoder": list(model.decoder.parameters()),
    }


def build_optimizer(model: AFANet, config: OptimConfig, *, pretrained: bool) -> torch.optim.AdamW:
    """AdamW over the parameter groups; freezes the backbone's norms where the configuration says so.

    Args:
        model: the network, not yet wrapped for data parallelism.
        config: rates and decay.
        pretrained: whether the backbone starts from pre-trained weights.
    """
    groups = parameter_groups(model)
    if config.backbone_norms == "frozen" or (config.backbone_norms == "auto" and pretrained):
        for parameter in groups.pop("backbone_norms"):
            parameter.requires_grad_(False)
    factors = {"backbone": 1.0, "backbone_norms": 1.0}
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "base_lr": config.lr * factors.get(name, config.head_lr_factor),
                "weight_decay": 0.0 if name == "backbone_norms" else config.weight_decay,
            }
            for name, parameters in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        fused=True,  # one pass over every parameter and its moments
    )


def lr_factor(step: int, config: OptimConfig) -> float:
    """What the base learning rate is multiplied with at optimiser step ``step``, counted from 0."""
    if step < config.warmup_steps:
        return 1 - (1 - step / config.warmup_steps) * (1 - config.warmup_ratio)
    return float(max(0.0, 1 - step / config.total_steps) ** config.power)


def apply_schedule(optimizer: torch.optim.Optimizer, step: int, config: OptimConfig) -> None:
    """Set the learning rate of every group for ``step``."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * lr_factor(step, config)
