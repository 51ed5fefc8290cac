"""What makes training faster without being part of the method: number formats, recomputation, compilation, profiles."""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from afa_core.backbone import kernels
from afa_core.backbone.mit import MixTransformer
from afa_core.config import STRICT, CountOrZero
from afa_core.errors import InputError

PROFILE_ROWS = 40
# The first steps pay for what later ones find ready.
PROFILE_AFTER = 3


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """How a training step is computed. Only float32 without TF32 gives the published numbers."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    # bfloat16: the network under autocast; affinity, refinement, losses, weights and optimiser stay in 32 bit.
    precision: Literal["float32", "bfloat16"] = "float32"
    # Products of 32-bit numbers on the GPU rounded to TF32's 10 bits.
    tf32: bool = False
    # The backbone through torch.compile: minutes at the start, for every size of picture.
    compile: bool = False
    # Backbone blocks run again in the backward pass instead of keeping their activations. Mix Transformers only.
    gradient_checkpointing: bool = False
    # Steps of each start of the job that are profiled on rank 0; the trace goes to the run, under profiles/.
    profile_steps: CountOrZero = 0


def can_checkpoint(backbone: str) -> bool:
    """Whether backbones of this name can run their blocks again in the backward pass."""
    return backbone.startswith("mit_")


def check_compiler(config: SpeedConfig) -> None:
    """See that what is to be compiled can be: for the processor that is done by a C++ compiler.

    Raises:
        InputError: there is none.
    """
    if config.compile and not torch.cuda.is_available():
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise InputError(
                "speed.compile=true: there is no C++ compiler here; install g++, or say in CXX where one is"
            ) from error


def apply_speed(config: SpeedConfig, backbone: Any) -> None:
    """Set up this process and the backbone before its first pass.

    Raises:
        InputError: see ``check_compiler``; or the backbone cannot run its blocks again.
    """
    check_compiler(config)
    kernels.allow_tf32(config.tf32)
    if isinstance(backbone, MixTransformer):
        backbone.gradient_checkpointing = config.gradient_checkpointing
    elif config.gradient_checkpointing:
        raise InputError("speed.gradient_checkpointing=true: this backbone has none, a Mix Transformer has")
    if config.compile:
        assert isinstance(backbone, nn.Module)
        backbone.compile(dynamic=False)  # one for sizes of any kind its compiler cannot make


def uncompiled(config: SpeedConfig) -> AbstractContextManager[Any]:
    """Without the compiler for a while: pictures of ever new sizes would use up what it has room for."""
    return torch.compiler.set_stance("force_eager") if config.compile else nullcontext()


class StepProfiler:
    """Profiles some steps of a job; ``chrome://tracing`` and Perfetto show the trace."""

    def __init__(self, steps: int, store: Callable[[bytes, str], None]) -> None:
        self._store = store
        self._left = PROFILE_AFTER + steps if steps else 0
        self._steps = steps
        self._profile: profile | None = None

    def before_step(self) -> None:
        """Start when the first steps are over."""
        if self._left and self._left == self._steps:
            activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
            self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
            self._profile.start()

    def after_step(self, step: int) -> None:
        """Count, and hand the profile over after the last one."""
        self._left = max(0, self._left - 1)
        if not self._left:
            self.close(step)

    def close(self, step: int) -> None:
        """Hand over what there is at the end of a job, which may be shorter than was thought."""
        if self._profile is None:
            return
        self._profile.stop()
        with tempfile.TemporaryDirectory(prefix="afa-profile-") as folder:
            trace = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(trace))
            self._store(gzip.compress(trace.read_bytes()), f"profiles/step-{step:06d}.json.gz")
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = self._profile.key_averages().table(sort_by=order, row_limit=PROFILE_ROWS)
        self._store(table.encode(), f"profiles/step-{step:06d}.txt")
        self._profile = None
