"""Triton, where it is installed; where it is not, names that let the modules with kernels be imported.

Kernels are annotated with strings (``from __future__ import annotations``), so a stub of ``jit`` is all they need.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

__all__ = [
    "AVAILABLE", "INTERPRETED", "after_previous", "before_next", "is_opaque", "jit", "opaque", "overlapped", "overlaps",
    "tl", "triton", "unavailable", "wrapped",
]  # fmt: skip

try:
    triton: Any = importlib.import_module("triton")
    tl: Any = importlib.import_module("triton.language")
except ImportError:  # a machine without a GPU
    triton = tl = None

AVAILABLE: bool = triton is not None
#: TRITON_INTERPRET=1: kernels run as Python on the CPU, without inline assembly
INTERPRETED: bool = AVAILABLE and bool(triton.knobs.runtime.interpret)


def jit(do_not_specialize: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """``triton.jit``, or nothing where there is no Triton."""
    return triton.jit(do_not_specialize=list(do_not_specialize)) if AVAILABLE else lambda function: function


_OPAQUE: ContextVar[bool] = ContextVar("opaque", default=False)


@contextmanager
def opaque() -> Iterator[None]:
    """Within, kernels are launched without torch.compile's wrapper: for ops that it does not look into."""
    token = _OPAQUE.set(True)
    try:
        yield
    finally:
        _OPAQUE.reset(token)


def is_opaque() -> bool:
    """Whether what runs now is no part of a graph: operands have values, and kernels may take tensor descriptors."""
    return INTERPRETED or _OPAQUE.get()


def wrapped(kernel: Any) -> Any:
    """A kernel that torch.compile can see through."""
    return kernel if is_opaque() else torch.library.wrap_triton(kernel)


def overlaps() -> bool:
    """Whether kernels are launched so that one may be set up while the one before still runs: in opaque ops.

    torch.compile has no way to ask for programmatic dependent launch; and instructions that have an effect keep it from
    seeing which operands a kernel writes (it would copy all of them), so that there they must not be in the kernel.
    """
    return AVAILABLE and not INTERPRETED and _OPAQUE.get()


def overlapped(kernel: Any) -> Any:
    """As :func:`wrapped`, for a kernel that begins with :func:`after_previous`, and is told of :func:`overlaps`."""
    return _Overlapped(kernel) if overlaps() else wrapped(kernel)


class _Overlapped:
    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return functools.partial(self.kernel[grid], launch_pdl=True)


@jit()
def after_previous(OVERLAP: tl.constexpr):
    """Wait for the kernels before: no memory may be touched until then, and no program may end."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@jit()
def before_next(OVERLAP: tl.constexpr):
    """The next kernel may be set up, once all programs are here: after :func:`after_previous`."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


def unavailable(device: torch.device) -> str | None:
    """Why this library's kernels do not run on a device, or None."""
    if device.type != "cuda":
        return f"the fused kernels need a GPU of compute capability 9.0, not {device.type}"
    if not AVAILABLE:
        return "the fused kernels need Triton, which is not installed"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "the fused kernels need a GPU of compute capability 9.0, found none here"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):  # later ones do not compile all tiles (Triton 3.6), and none was ever tried
        found = ".".join(map(str, capability))
        return f"the fused kernels need a GPU of compute capability 9.0, found {found}"
    return None
