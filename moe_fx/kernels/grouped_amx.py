"""The CPU kernel of ``moe_fx::grouped_mm`` and ``moe_fx::grouped_mm_int4``: bfloat16 rows on a CPU with AMX tiles.

It is C++ beside this file, built at its first use for the machine that runs it (a few seconds, once) and kept in
``~/.cache/moe_fx`` (or ``$XDG_CACHE_HOME/moe_fx``). Where it cannot be built, the ops do without; their results are
the same but for the order of sums. ``$CXX`` names the compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

__all__ = ["grouped_mm_amx", "unavailable", "unfit", "unfit_sizes"]

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-fopenmp", "-Wno-psabi", "-Wno-ignored-attributes")
#: what the kernel's instructions are called in /proc/cpuinfo
NEEDED = frozenset({"amx_bf16", "avx512_bf16", "avx512bw"})
#: up to how many rows of a group are multiplied by dot products, by bits of a weight: measured on two cores
FEW_ROWS = {16: 2, 8: 4, 4: 4}
#: beyond how many rows of a group torch.mm is faster, weights being widened for it first
MANY_ROWS = {16: 320, 8: 384, 4: 384}
#: and beyond how many numbers in a group's bfloat16 rows, which are read anew for every few outputs: what L2 holds
MANY_NUMBERS = 2**19


def unavailable() -> str | None:
    """Why the kernel does not run on this machine, or None; the first call builds it."""
    library = _library()
    return library if isinstance(library, str) else None


def unfit(rows: torch.Tensor, weights: torch.Tensor, group: int | None = None) -> str | None:
    """Why the kernel does not take these operands, or None; shapes as in :func:`grouped_mm_amx`."""
    if rows.device.type != "cpu" or weights.device.type != "cpu":
        return f"the AMX kernel runs on a CPU, not {rows.device.type}"
    if rows.dtype is not torch.bfloat16 or weights.dtype not in (torch.bfloat16, torch.int8, torch.uint8):
        return f"the AMX kernel multiplies bfloat16 rows, not {rows.dtype} with {weights.dtype}"
    if not weights.is_contiguous():
        return "the AMX kernel reads weights [E, N, K] that are contiguous"
    return unfit_sizes(weights.shape[1], rows.shape[1], group) or unavailable()


def unfit_sizes(outputs: int, inputs: int, group: int | None = None) -> str | None:
    """Why the kernel does not take weights ``[outputs, inputs]``, int4 ones in groups of ``group``, or None."""
    if outputs % 16 == inputs % 32 == (group or 0) % 32 == 0:
        return None
    sizes = f"{outputs} x {inputs}" + (f" in groups of {group}" if group else "")
    return f"the AMX kernel takes multiples of 16 outputs, and of 32 inputs and group_size, not {sizes}"


def grouped_mm_amx(
    rows: torch.Tensor,
    weights: torch.Tensor,
    offsets: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
) -> None:
    """Each group of rows times its expert's weights; operands that :func:`unfit` has nothing against.

    Args:
        rows: bfloat16 ``[S, K]``, ordered by expert.
        weights: ``[E, N, K]`` bfloat16 or int8 (no scale is applied), or uint8 ``[E, N, K / 2]``.
        offsets: int32 ``[E]``, where each expert's rows end.
        out: bfloat16 ``[S, N]``, contiguous; rows behind the last group are left as they are.
        scale, zero: of int4 weights, as in :class:`moe_fx.Int4WeightOnly`; scale in bfloat16.
    """
    library = _library()
    assert not isinstance(library, str), library
    rows, offsets = rows.contiguous(), offsets.contiguous()
    scale, zero = (tensor if tensor is None else tensor.contiguous() for tensor in (scale, zero))
    bits = {torch.bfloat16: 16, torch.int8: 8, torch.uint8: 4}[weights.dtype]
    experts, outputs, _ = weights.shape
    inputs = rows.shape[1]
    group = inputs if scale is None else inputs // scale.shape[2]
    stored = (*map(_pointer, (weights, scale, zero)), *map(ctypes.c_long, (outputs, inputs, bits, group)))
    threads = torch.get_num_threads()
    many = min(MANY_ROWS[bits], MANY_NUMBERS // inputs) if bits == 16 else MANY_ROWS[bits]
    library.grouped_mm(
        *stored, threads, *map(_pointer, (rows, offsets, out)), *map(ctypes.c_long, (experts, FEW_ROWS[bits], many))
    )
    if rows.shape[0] <= many:
        return
    wide = None if bits == 16 else rows.new_empty(outputs, inputs)
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end - start > many:
            if wide is not None:
                library.widen(*stored, threads, ctypes.c_long(expert), _pointer(wide))
            matrix = weights[expert] if wide is None else wide
            # The weights on the left are read as they lie (alone, for 121 to 141 rows: 15 to 22% less time).
            torch.mm(matrix, rows[start:end].t(), out=out[start:end].t())
        start = max(start, end)


def _pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@functools.cache
def _library() -> Any | str:
    """The built kernel, or why there is none."""
    features = _features()
    missing = sorted(NEEDED.difference(features.split()))
    if missing:
        return f"the AMX kernel needs a CPU with {', '.join(missing)}"
    try:
        library = ctypes.CDLL(str(_built(features)))
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stderr", "") or str(error)
        return f"the AMX kernel could not be built: {output.strip().splitlines()[-1] if output.strip() else error!r}"
    return library if library.usable() else "torch's tile products do not run on this CPU"


def _features() -> str:
    """What Linux says the CPU can do; elsewhere nothing."""
    try:
        return next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return ""


def _built(features: str) -> Path:
    """The shared library, built unless an earlier process has."""
    compiler = cpp_extension.get_cxx_compiler()
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    libraries = [flag for path in cpp_extension.library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    # libgomp comes from the same place as torch's: one pool of threads, not two.
    command = [compiler, *FLAGS, *includes, str(SOURCE), *libraries, "-lc10", "-ltorch_cpu"]
    told_apart = "\n".join([SOURCE.read_text(), torch.__version__, features, *command])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_fx"
    built = cache / f"grouped_amx-{hashlib.sha256(told_apart.encode()).hexdigest()[:16]}.so"
    if not built.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            # Built aside and moved into place at once: processes may build at the same time.
            aside = Path(folder) / built.name
            subprocess.run([*command, "-o", str(aside)], check=True, capture_output=True, text=True)
            aside.replace(built)
    return built
