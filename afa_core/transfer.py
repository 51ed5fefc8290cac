"""Results on their way from the device, which goes on with what it is asked next."""

from __future__ import annotations

import torch
from torch import Tensor


class Transfer:
    """Tensors that are copied to the CPU behind whatever their device has been asked before."""

    def __init__(self, *tensors: Tensor) -> None:
        """Begin to copy tensors of one device."""
        self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._arrival: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            self._arrival = torch.cuda.Event(blocking=True)  # whoever waits sleeps
            with torch.cuda.device_of(tensors[0]):  # which need not be this thread's current one
                self._arrival.record()

    def arrived(self) -> list[Tensor]:
        """The copies, in memory that is locked for the device; waits for them, in any thread."""
        if self._arrival:
            self._arrival.synchronize()
        return self._copies
