"""Questions about shapes that may be symbolic. A question that cannot be decided is answered with "no"."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

__all__ = [
    "Dim", "depends_on_values", "is_number", "known_at_least", "known_equal", "same_expression", "same_shape",
    "shape_of", "tensor_of", "upper_bound",
]  # fmt: skip

Dim = int | torch.SymInt


def tensor_of(node: object) -> torch.Tensor | None:
    """The (fake) tensor that a node yields, or None for anything else."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def shape_of(node: object) -> tuple[Dim, ...] | None:
    """The shape a node yields; None if it yields no tensor."""
    value = tensor_of(node)
    return tuple(map(_plain, value.shape)) if value is not None else None


def _plain(size: Dim) -> Dim:
    """A size that is a symbol in name only, as Dynamo has them, as the number it is."""
    return int(size) if isinstance(size, torch.SymInt) and size.node.expr.is_number else size


def is_number(node: Node) -> bool:
    """Whether a node yields a number, symbolic or not: a size, or a float attribute of a model under Dynamo."""
    return isinstance(node.meta.get("val"), torch.SymFloat | torch.SymInt | torch.SymBool | float | int)


def depends_on_values(size: object) -> bool:
    """Whether a size is one that only the values in a tensor tell, such as how many rows an expert has."""
    return isinstance(size, torch.SymInt) and bool(free_unbacked_symbols(size))


def known_equal(left: Dim, right: Dim) -> bool:
    """Whether two sizes are equal on every run of the program."""
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    return bool(statically_known_true(left == right))


def same_expression(left: Dim, right: Dim) -> bool:
    """Whether two sizes are written alike: a question that costs nothing, where there are many to ask."""
    if isinstance(left, int) or isinstance(right, int):
        return isinstance(left, int) and isinstance(right, int) and left == right
    return bool(left.node.expr == right.node.expr)


def known_at_least(size: Dim, least: Dim) -> bool:
    """Whether a size is no smaller than another on every run of the program."""
    return bool(statically_known_true(size >= least))


def same_shape(left: Sequence[Dim], right: Sequence[Dim]) -> bool:
    """Whether two shapes are equal on every run of the program."""
    return len(left) == len(right) and all(known_equal(a, b) for a, b in zip(left, right, strict=True))


def upper_bound(size: Dim) -> int | None:
    """The largest value a size can take, or None where nothing bounds it."""
    if isinstance(size, int):
        return size
    # A symbolic size's node knows the ranges that the trace (or the user's Dim) gave its symbols.
    env = size.node.shape_env
    bound = env.bound_sympy(size.node.expr) if env is not None else None
    # An unbounded range ends in sys.maxsize - 1 or in an infinity, depending on the torch release.
    if bound is None or not bound.upper.is_number or bound.upper >= 2**40:
        return None
    return int(bound.upper)
