"""Tensors that say they are on a GPU and are computed by the processor.

What cannot be found out without a GPU is whether its kernels are right and fast. What can: that no operation is handed
tensors of both devices, that autocast's types fit together, and how often the processor waits for the device.
``device.cpp`` has to be built and loaded before torch is imported; ``load`` does that.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import tempfile
import traceback
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any


def load() -> None:
    """Torch with ``device.cpp``."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch_folder = Path(spec.origin).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "device.so"
        options = [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"]
        source = Path(__file__).with_name("device.cpp")
        subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", source, "-o", library, *options], check=True)
        for made in (torch_folder / "lib" / "libc10.so", torch_folder / "lib" / "libtorch_cpu.so", library):
            ctypes.CDLL(str(made), os.RTLD_GLOBAL)


load()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_flatten, tree_map  # noqa: E402

GPU = torch.device("cuda", 0)
# Operations that take tensors of both devices on a real one, too; scalars travel with any.
TRANSFERS = ("_to_copy", "copy_", "_local_scalar_dense")
LOCKING = {"is_pinned": lambda _: False, "_pin_memory": torch.clone}  # of memory, which only a GPU's driver can do
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
SIZED_BY_NUMBERS = ("nonzero", "masked_select", "_unique2", "repeat_interleave")
WAITS: Counter[str] = Counter()  # for the device, by the line that waits


class GpuTensor(Tensor):
    """A tensor on the pretended GPU around the one that holds its numbers."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> GpuTensor:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made: GpuTensor = Tensor._make_wrapper_subclass(cls, held.shape, **layout, device=GPU)  # type: ignore
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"gpu {self.held}"

    def tolist(self) -> Any:
        count_wait()
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(operation, args, kwargs or {})


class PretendedGpu(TorchDispatchMode):
    """Inside, ``device="cuda"`` is to be had."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(operation, args, kwargs or {})

    def __enter__(self) -> PretendedGpu:
        torch.cuda._lazy_init = lambda: None
        torch.cuda.is_available = lambda: True
        torch.cuda.is_bf16_supported = lambda *_, **__: True
        torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = lambda _: 0
        torch.cuda.Event = partial(torch.Event, GPU)  # type: ignore[assignment,misc]
        # Data that is given in Python goes through the processor to the device.
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self


def to_gpu(module: nn.Module) -> None:
    """Move a network."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(GpuTensor(parameter.data))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = GpuTensor(buffer)


def run(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation by the processor, if a GPU would take what it is given."""
    name, target = operation._schema.name.split("::")[1], kwargs.get("device")
    if name in LOCKING:
        return LOCKING[name](args[0])
    given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    on_gpu = [value for value in given if isinstance(value, GpuTensor)]
    strays = [value for value in given if not isinstance(value, GpuTensor) and value.dim()]
    if on_gpu and strays and name not in TRANSFERS + INDEXING:
        raise RuntimeError(f"{operation}: on the GPU, but not {[tuple(value.shape) for value in strays]}")
    away = target is not None and torch.device(target).type != "cuda"
    # A result whose size depends on numbers: those that a mask chooses.
    sized = name in SIZED_BY_NUMBERS or (name == "index" and any(value.dtype == torch.bool for value in given[1:]))
    # A copy between the two, in either direction: only from locked memory is it not waited for of itself.
    copied = name == "_to_copy" and target is not None and away == bool(on_gpu) and not kwargs.get("non_blocking")
    if copied or (on_gpu and (name == "_local_scalar_dense" or sized)):
        count_wait()
    stays = not away if target is not None else bool(on_gpu)
    if name == "copy_":
        stays = isinstance(args[0], GpuTensor)
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda value: value.held if isinstance(value, GpuTensor) else value, (args, kwargs))
    made = operation(*args, **kwargs)
    return tree_map(partial(wrapped, {id(value.held): value for value in on_gpu}), made) if stays else made


def wrapped(known: dict[int, GpuTensor], value: Any) -> Any:
    """A result on the GPU; what was changed in place is the tensor that was given."""
    if not isinstance(value, Tensor):
        return value
    return known[id(value)] if id(value) in known else GpuTensor(value)


def count_wait() -> None:
    """The line of the project that asks for a number."""
    frames = [frame for frame in traceback.extract_stack() if f"{os.sep}afa_core{os.sep}" in frame.filename]
    WAITS[f"{Path(frames[-1].filename).name}: {frames[-1].line}" if frames else "elsewhere"] += 1
