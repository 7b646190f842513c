"""``int()`` of a number that depends on the data, which Python can only answer with a number: here with its symbol.

capacity = int(counts.max())        # torch.export: "could not extract specialized integer"

While a model is traced, ``int`` stands in the modules in which it is written for what leaves a symbol as it is.
"""

from __future__ import annotations

import builtins
import contextlib
import dis
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

__all__ = ["ASKED_FOR", "symbolic_int"]

#: what torch.export says where a number of Python is asked for
ASKED_FOR = "Could not extract specialized integer"


class _LikeInt(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, builtins.int)


class _Int(builtins.int, metaclass=_LikeInt):
    """``int``, but for symbols and tensors of whole numbers, whose number is a symbol."""

    def __new__(cls, value: Any = 0, *args: Any) -> Any:
        if isinstance(value, torch.Tensor) and not value.dtype.is_floating_point and not value.dtype.is_complex:
            value = value.item()
        return value if isinstance(value, torch.SymInt) else builtins.int(value, *args)


@contextlib.contextmanager
def symbolic_int(model: torch.nn.Module) -> Iterator[None]:
    """``int()`` keeps symbols in the modules in which the classes of ``model`` are written."""
    changed = [module for module in _modules(model) if "int" not in vars(module) and not _looks_at_types(module)]
    try:
        for module in changed:
            vars(module)["int"] = _Int
        yield
    finally:
        for module in changed:
            del vars(module)["int"]


def _modules(model: torch.nn.Module) -> list[ModuleType]:
    classes = {cls for part in model.modules() for cls in type(part).__mro__}
    names = {cls.__module__ for cls in classes if cls.__module__.partition(".")[0] not in ("builtins", "torch")}
    return [sys.modules[name] for name in sorted(names) if name in sys.modules]


def _looks_at_types(module: ModuleType) -> bool:
    """Whether some function asks whether a type is ``int`` itself."""
    pending: list[Any] = []
    for value in vars(module).values():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        functions = vars(value).values() if isinstance(value, type) else [value]
        pending += [each.__code__ for each in functions if isinstance(each, FunctionType)]
    while pending:
        code = pending.pop()
        named = {each.argval for each in dis.get_instructions(code) if each.opname == "LOAD_GLOBAL"}
        if {"int", "type"} <= named:
            return True
        pending += [each for each in code.co_consts if isinstance(each, CodeType)]
    return False
