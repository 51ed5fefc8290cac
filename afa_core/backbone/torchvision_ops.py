"""Lets timm import beside a CPU build of torch.

timm imports torchvision, whose wheels on the package index are built for CUDA. Beside a CPU-only torch its
operator library cannot load, and ``import torchvision`` fails with "operator torchvision::nms does not
exist" while it registers shape functions for operators that this project never calls. Declaring their
schemas (no implementation) cures it. Where the operators exist, this does nothing.
"""

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declarations: list[torch.library.Library] = []  # a declaration lives as long as its object


def declare_missing_operators() -> None:
    """Make ``import torchvision`` work; to be called before timm is imported."""
    if _declarations:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
        _declarations.append(library)
    except ImportError:
        return  # timm says itself what it misses
