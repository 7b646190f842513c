"""Products of tensors that sum over dimensions, in one notation: that of einsum, a letter for each dimension.

bmm(a, b)              bmk,bkn->bmn
linear(x, w)           tk,nk->tn
(a * b).sum(-1)        tnk,nk->tn
"""

from __future__ import annotations

import string
from dataclasses import dataclass

from torch.fx import Node

from moe_fx.matcher import arguments, op_name
from moe_fx.shapes import Dim, known_equal, shape_of

__all__ = ["Contraction", "contraction"]


@dataclass(frozen=True)
class Contraction:
    """``out``, the product of two or more operands, summed over the letters that it lacks; ``bias`` is added to it."""

    operands: tuple[Node, ...]
    letters: tuple[str, ...]
    out: str
    bias: Node | None = None

    @property
    def summed(self) -> str:
        shared = [letter for letter in dict.fromkeys("".join(self.letters)) if letter not in self.out]
        return "".join(letter for letter in shared if sum(letter in letters for letters in self.letters) > 1)

    def size(self, letter: str) -> Dim:
        """How large a dimension is; where an operand is broadcast, that of the others."""
        sizes = [
            (shape_of(operand) or ())[letters.index(letter)]
            for operand, letters in zip(self.operands, self.letters, strict=True)
            if letter in letters
        ]
        return next((size for size in sizes if not known_equal(size, 1)), sizes[0])


def contraction(node: Node) -> Contraction | None:
    """The product that a node is; None for any other op, and for what this notation does not cover."""
    name = op_name(node)
    if name == "aten::einsum":
        return _einsum(node)
    if name == "aten::sum":
        return _multiply_and_sum(node)
    if name in ("aten::addmm", "aten::baddbmm"):
        return _with_bias(node)
    if name not in ("aten::bmm", "aten::mm", "aten::matmul", "aten::linear"):
        return None
    left, right, *rest = node.args
    ranks = [len(shape_of(operand) or ()) for operand in (left, right)]
    if min(ranks) < 2 or not isinstance(left, Node) or not isinstance(right, Node):
        return None
    batch = string.ascii_uppercase[: max(ranks) - 2]
    first, second = batch[len(batch) - ranks[0] + 2 :], batch[len(batch) - ranks[1] + 2 :]
    if name == "aten::linear":
        bias = rest[0] if rest and isinstance(rest[0], Node) else None
        return Contraction((left, right), (f"{first}mk", "nk"), f"{batch}mn", bias)
    return Contraction((left, right), (f"{first}mk", f"{second}kn"), f"{batch}mn")


def _with_bias(node: Node) -> Contraction | None:
    given = arguments(node)
    if given["beta"] != 1 or given["alpha"] != 1:
        return None
    if op_name(node) == "aten::addmm":
        return Contraction((given["mat1"], given["mat2"]), ("mk", "kn"), "mn", given["self"])
    return Contraction((given["batch1"], given["batch2"]), ("bmk", "bkn"), "bmn", given["self"])


def _einsum(node: Node) -> Contraction | None:
    equation, operands = node.args[:2]
    inputs, arrow, out = str(equation).replace(" ", "").partition("->")
    letters = inputs.split(",")
    plain = arrow and all(part.isalpha() and len(set(part)) == len(part) for part in (*letters, out))
    if not plain or len(letters) < 2 or not isinstance(operands, list | tuple):
        return None
    # A letter of one operand only is summed by itself: no product of matrices.
    alone = {letter for letter in inputs if inputs.count(letter) == 1} - {","}
    if not all(isinstance(operand, Node) for operand in operands) or not alone <= set(out):
        return None
    return Contraction(tuple(operands), tuple(letters), out)


def _multiply_and_sum(node: Node) -> Contraction | None:
    given = arguments(node)
    product, dims = given["self"], given.get("dim")
    if op_name(product) != "aten::mul" or not isinstance(dims, list | tuple) or len(dims) != 1 or given.get("keepdim"):
        return None
    if given.get("dtype") is not None or len(product.users) != 1:
        return None
    left, right = product.args[:2]
    shapes, rank = [shape_of(operand) for operand in (left, right)], len(shape_of(product) or ())
    if not isinstance(left, Node) or not isinstance(right, Node) or rank > 20 or None in shapes:
        return None
    names = string.ascii_lowercase[:rank]
    summed = names[dims[0] % rank]
    letters = [names[rank - len(shape or ()) :] for shape in shapes]
    sizes = [
        (shape or ())[each.index(summed)] if summed in each else 1 for shape, each in zip(shapes, letters, strict=True)
    ]
    if not known_equal(sizes[0], sizes[1]):
        return None
    return Contraction((left, right), (letters[0], letters[1]), names.replace(summed, ""))
