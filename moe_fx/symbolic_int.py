"""``int()`` of a number that depends on the data, which Python can only answer with a number: here with its symbol.

capacity = int(counts.max())        # torch.export: "could not extract specialized integer"

While a model is traced, ``int`` stands in the modules in which it is written for what leaves a symbol as it is: only
where the source calls it, or asks ``isinstance``, and so cannot tell the difference.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from moe_fx.errors import ExportError

__all__ = ["ASKED_FOR", "symbolic_int"]

#: what torch.export says where a number of Python is asked for
ASKED_FOR = "Could not extract specialized integer"


class _Symbol(torch.SymInt):
    """A number that ``int()`` was asked for. Its text would be that of its symbol."""

    def __str__(self) -> str:
        raise ExportError("the text of a number that depends on the data")

    def __format__(self, spec: str) -> str:
        return str(self)


class _LikeInt(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, builtins.int | torch.SymInt)


class _Int(builtins.int, metaclass=_LikeInt):
    """``int``, but for symbols and tensors of whole numbers, whose number is a symbol."""

    def __new__(cls, value: Any = 0, *args: Any) -> Any:
        if isinstance(value, torch.Tensor) and not value.dtype.is_floating_point and not value.dtype.is_complex:
            value = value.item()
        if type(value) is torch.SymInt:
            return _Symbol(value.node)
        return value if isinstance(value, torch.SymInt) else builtins.int(value, *args)


@contextlib.contextmanager
def symbolic_int(model: torch.nn.Module) -> Iterator[None]:
    """``int()`` keeps symbols in the modules in which the classes of ``model`` are written."""
    changed = [module for module in _modules(model) if "int" not in vars(module) and _only_calls_it(module)]
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


def _only_calls_it(module: ModuleType) -> bool:
    """Whether a module's source does nothing with ``int`` but call it, annotate, and ask whether something is one."""
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError, SyntaxError):
        return False
    fine: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            fine.add(node.func)
            if isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                fine.update(each for kind in node.args[1:] for each in ast.walk(kind))
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if annotation is not None:
                fine.update(ast.walk(annotation))
    named = (node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "int")
    return all(node in fine for node in named)
