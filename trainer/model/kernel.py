"""Which kernels of attention there are, fastest first."""

from __future__ import annotations

import torch

from shardio.errors import PlanError
from trainer.model.kernels.cpp import CppKernel
from trainer.model.kernels.gather import GatherKernel
from trainer.model.kernels.kernel import Kernel

AUTO = "auto"
KERNELS: dict[str, Kernel] = {"cpp": CppKernel(), "torch": GatherKernel()}


def find_kernel(name: str, device: torch.device | str) -> Kernel:
    """The kernel of that name; `auto` for the first that can be had.

    Raises: PlanError if it is unknown, or cannot be had for the device.
    """
    device = torch.device(device)
    if name == AUTO:
        return next(kernel for kernel in KERNELS.values() if not kernel.lacking(device))
    check_kernel(name)
    if why := KERNELS[name].lacking(device):
        raise PlanError(f"attention kernel {name} cannot be had: {why}. Use kernel auto or torch.")
    return KERNELS[name]


def check_kernel(name: str) -> None:
    """PlanError if there is no such kernel."""
    if name not in (AUTO, *KERNELS):
        raise PlanError(f"attention kernel {name!r} is unknown. Use one of: {', '.join((AUTO, *KERNELS))}.")
