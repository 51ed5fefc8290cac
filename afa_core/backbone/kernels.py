"""Matrix products and attention of a backbone, in two ways that differ by rounding alone.

    exact   operation for operation what the published implementation runs
    fast    the same sums in another order

The exact way is for small pictures, where speed does not matter and golden tensors are compared: the multi-scale CAM
divides each class's map by its own maximum, and for a class that is hardly there this blows the rounding of another
order (1e-7 in a feature) up beyond 1e-5. Labelled classes stay within it either way (docs/decisions/kernels.md).

On the CPU the fast way works in pieces that stay in the cache. Products are oneDNN's on processors with AVX-512 that
are not Intel's: it reaches twice the rate of MKL's there, torch's own choice, which takes AVX2. Elsewhere MKL is as
fast or faster, and does not keep half a MiB for every size. Attention is torch's fused one, whose products are MKL's;
where those are slow, passes without gradient take it in pieces.

Shapes: B images, N queries, M keys, n heads of d channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Pictures with fewer pixels are computed the exact way.
FAST_FROM_PIXELS = 2**16
# Attention logits of one piece: 4 MiB stay in the cache of a core or of its neighbours.
PIECE_LOGITS = 2**20


def allow_tf32(allowed: bool) -> None:
    """Whether this process's GPU may round numbers of 32 bits to TF32's 10 in products and convolutions.

    Of itself torch does so in convolutions, which is beyond the tolerances of the golden tensors.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def best_device() -> torch.device:
    """This process's GPU, if it has one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_large(size: tuple[int, ...]) -> bool:
    """Whether pictures of a size (H, W) are worth the fast way."""
    return size[0] * size[1] >= FAST_FROM_PIXELS


def passes_alone(size: tuple[int, ...], device: torch.device) -> bool:
    """Whether such pictures are better computed one by one: on the CPU a batch of large ones leaves the cache."""
    return device.type == "cpu" and is_large(size)


def linear(tokens: Tensor, weight: Tensor, bias: Tensor | None, *, fast: bool) -> Tensor:
    """x W^T + b: [..., c] with weights [k, c] -> [..., k]."""
    if works_in_pieces(tokens, fast=fast):
        return _Linear.apply(tokens, weight, bias) if torch.is_grad_enabled() else _product(tokens, weight, bias)
    return F.linear(tokens, weight, bias)


def similarity(query: Tensor, key: Tensor) -> Tensor:
    """Q K^T of [B, N, d] and [B, M, d] -> [B, N, M]."""
    if works_in_pieces(query, fast=True):
        return torch.stack([linear(rows, columns, None, fast=True) for rows, columns in zip(query, key, strict=True)])
    return query @ key.transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, *, fast: bool) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V of [B, n, N, d], [B, n, M, d], [B, n, M, d] -> [B, n, N, d]."""
    if not fast:
        return ((query @ key.transpose(2, 3)) * query.shape[3] ** -0.5).softmax(dim=3) @ value
    if works_in_pieces(query, fast=fast) and onednn_is_faster() and not torch.is_grad_enabled():
        return _attend_in_pieces(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)


def _attend_in_pieces(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    batch, heads, length, channels = query.shape
    attended = query.new_empty(batch, length, heads, channels).transpose(1, 2)
    rows = max(1, PIECE_LOGITS // key.shape[2])
    for index in range(batch):
        for head in range(heads):
            keys = key[index, head] * channels**-0.5  # of which there are fewer than queries
            values = value[index, head].contiguous().t()
            for start, stop in even_cuts(length, rows):
                share = _product(query[index, head, start:stop], keys, None).softmax(dim=1)
                attended[index, head, start:stop] = _product(share, values, None)
    return attended


def even_cuts(length: int, most: int) -> list[tuple[int, int]]:
    """A length in as few pieces of at most so many as will do, and even ones: oneDNN keeps 0.5 MiB for every size."""
    number = -(-length // most)
    return list(pairwise(length * cut // number for cut in range(number + 1)))


def recomputed(function: Callable[[Tensor], Tensor], tokens: Tensor, *parameters: Tensor) -> Tensor:
    """The function of tokens, and of parameters it knows; for the gradient it is computed again, nothing is kept.

    It must not draw random numbers. Torch's own checkpoint does, but imports torch's compiler: 70 MiB.
    """
    if torch.is_grad_enabled():
        return _Recomputed.apply(function, tokens, *parameters)
    return function(tokens)


def works_in_pieces(tokens: Tensor, *, fast: bool) -> bool:
    """Whether the fast way is that of the CPU here: pieces that stay in the cache, and its own choice of products.

    Not under torch.compile, which makes products of its own and has no code for oneDNN's with weights that train.
    """
    return (
        fast
        and not torch.compiler.is_compiling()
        and tokens.device.type == "cpu"
        and tokens.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )


@lru_cache
def onednn_is_faster() -> bool:
    """Whether products are oneDNN's: where it is to be had, and MKL is not or leaves AVX-512 alone."""
    cpu_facts = Path("/proc/cpuinfo")
    intel = cpu_facts.exists() and "GenuineIntel" in cpu_facts.read_text()
    mkl_is_slow = torch.backends.cpu.get_cpu_capability() == "AVX512" and not intel
    return (
        (mkl_is_slow or not torch.backends.mkl.is_available())
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b. Weights must be dense, transposed or not: with gaps oneDNN takes a slow path."""
    if onednn_is_faster():
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return F.linear(rows, weight, bias)


class _Linear(torch.autograd.Function):
    """A linear map whose three products, forward and backward, are those of ``_product``."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        return _product(tokens, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        tokens, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        gradient = gradient.contiguous()
        flat = gradient.view(-1, gradient.shape[-1])
        return (
            _product(gradient, weight.t(), None) if wanted[0] else None,
            _weight_gradient(flat, tokens.reshape(-1, tokens.shape[-1])) if wanted[1] else None,
            flat.sum(0) if wanted[2] else None,
        )


class _Recomputed(torch.autograd.Function):
    """A function whose intermediate results are not kept."""

    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], *tensors: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(tensors[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            tokens = tokens.detach().requires_grad_(ctx.needs_input_grad[1])
            made = ctx.function(tokens)
        wanted = [tensor for tensor in (tokens, *parameters) if tensor.requires_grad]
        made_gradients = iter(torch.autograd.grad(made, wanted, gradient))
        return None, *(next(made_gradients) if needed else None for needed in ctx.needs_input_grad[1:])


def _weight_gradient(gradient: Tensor, tokens: Tensor) -> Tensor:
    """g^T x of [n, k] and [n, c] -> [k, c]. Turned rows are copied, turned weights are not: rows are the narrower."""
    if gradient.shape[1] <= tokens.shape[1]:
        return _product(gradient.t(), tokens.t(), None)
    return _product(tokens.t(), gradient.t(), None).t()
