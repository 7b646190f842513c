"""The factors of a product, written in letters as in einsum: those of products of one-hot rows among them.

combine = einsum('tk,tke,tkc->tec', s, one_hot(ids), one_hot(rank))

einsum('tec,th->ech', combine != 0, x)        => s != 0: tk, one_hot(ids): tke, one_hot(rank): tkc, x: th
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from moe_fx.passes.raising.anchors import reads_stack
from moe_fx.passes.raising.contraction import Contraction, contraction
from moe_fx.passes.raising.one_hot import is_arange
from moe_fx.passes.raising.through import is_view
from torch.fx import Node

from moe_fx.matcher import arguments, op_name
from moe_fx.shapes import Dim, known_equal, shape_of, tensor_of

__all__ = ["Hot", "Term", "between", "factors", "one_hot_of"]

#: ops on a product of one-hot rows that act on its only other factor: casts, and whether it is zero
STEPS = frozenset({"aten::to", "aten::clone", "aten::ne", "aten::gt"})
#: how many calls there are at most between a product and its one-hot factors
DEEPEST = 12


@dataclass(frozen=True)
class Term:
    """A factor: ``steps`` are applied to it, the last one first."""

    node: Node
    letters: str
    steps: tuple[Node, ...] = ()

    def size(self, letter: str) -> Dim:
        return (shape_of(self.node) or ())[self.letters.index(letter)]


@dataclass(frozen=True)
class Hot:
    """1 where the number in ``source`` is that of a dimension of the term, and 0 elsewhere; "" is one of size 1."""

    source: Node
    letters: tuple[str, ...]
    number: str
    count: Dim


def factors(found: Contraction) -> list[Term]:
    """The factors of a product, those of products of one-hot rows among them."""
    taken = "".join(found.letters)
    unused = (chr(code) for code in itertools.count(ord("a")) if chr(code) not in taken)
    terms: list[Term] = []
    for operand, letters in zip(found.operands, found.letters, strict=True):
        inner = _factors(operand, letters, unused)
        terms += inner if any(one_hot_of(term) is not None for term in inner) else [Term(operand, letters)]
    return terms


def between(found: Contraction, terms: Iterable[Term]) -> set[Node]:
    """The calls that were taken apart on the way to a product's factors."""
    ends, passed, waiting = {term.node for term in terms}, set[Node](), list(found.operands)
    while waiting:
        node = waiting.pop()
        if node not in ends and node not in passed and tensor_of(node) is not None:
            passed.add(node)
            waiting += node.all_input_nodes
    return passed


def _factors(node: Node, letters: str, unused: Iterator[str], depth: int = 0) -> list[Term]:
    whole = Term(node, letters)
    if one_hot_of(whole) is not None or reads_stack(node) or node.op != "call_function" or depth > DEEPEST:
        return [whole]
    name = op_name(node)
    inner: list[Term] = []
    product = _product(node)
    if product is not None and not any(reads_stack(operand) for operand in product.operands):
        named = dict(zip(product.out, letters, strict=True))
        for letter in dict.fromkeys("".join(product.letters)):
            if letter not in named:
                named[letter] = next(unused)
        for operand, own in zip(product.operands, product.letters, strict=True):
            inner += _factors(operand, "".join(named[letter] for letter in own), unused, depth + 1)
    elif is_view(node):
        before = _moved(node, letters, unused)
        inner = _factors(_first(node), before, unused, depth + 1) if before is not None else []
    elif name == "aten::sum":
        inner = _summed(node, letters, unused, depth)
    elif name in STEPS and (name not in ("aten::ne", "aten::gt") or node.args[1] == 0):
        inner = _after(node, _factors(_first(node), letters, unused, depth + 1))
    return inner if any(one_hot_of(term) is not None for term in inner) else [whole]


def _product(node: Node) -> Contraction | None:
    """A product, of broadcast factors too."""
    if op_name(node) != "aten::mul":
        found = contraction(node)
        return found if found is not None and found.bias is None else None
    shapes = [shape_of(operand) for operand in node.args[:2]]
    rank = len(shape_of(node) or ())
    if None in shapes or rank > 20:
        return None
    out = string.ascii_letters[:rank]
    extra = iter(string.ascii_letters[rank:])
    letters = [
        "".join(
            letter if not known_equal(size, 1) else next(extra)
            for letter, size in zip(out[rank - len(shape or ()) :], shape or (), strict=True)
        )
        for shape in shapes
    ]
    left, right = node.args[:2]
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    return Contraction((left, right), (letters[0], letters[1]), out)


def _moved(node: Node, letters: str, unused: Iterator[str]) -> str | None:
    """The letters of what a view is of: its dimensions in another order, or some of size 1 more or fewer."""
    source = node.args[0]
    before, after = shape_of(source) or (), shape_of(node) or ()
    name, given = op_name(node), arguments(node)
    if name in ("aten::transpose", "aten::permute"):
        order = list(range(len(after)))
        if name == "aten::permute":
            order = [dim % len(after) for dim in given["dims"]]
        else:
            one, other = given["dim0"] % len(after), given["dim1"] % len(after)
            order[one], order[other] = other, one
        return "".join(letter for _, letter in sorted(zip(order, letters, strict=True)))
    if name == "aten::expand":
        padded = letters[len(after) - len(before) :]
        return "".join(
            letter if known_equal(size, new) else next(unused)
            for letter, size, new in zip(padded, before, after[len(after) - len(before) :], strict=True)
        )
    wide = [letter for letter, size in zip(letters, after, strict=True) if not known_equal(size, 1)]
    kept = [size for size in before if not known_equal(size, 1)]
    grown = [size for size in after if not known_equal(size, 1)]
    if len(kept) != len(grown) or not all(map(known_equal, kept, grown)):
        return None
    named = iter(wide)
    return "".join(next(unused) if known_equal(size, 1) else next(named) for size in before)


def _summed(node: Node, letters: str, unused: Iterator[str], depth: int) -> list[Term]:
    """The factors of what is summed over one dimension, if one-hot rows have it: that of slots, say."""
    given = arguments(node)
    dims = given.get("dim")
    if not isinstance(dims, list | tuple) or len(dims) != 1 or given["keepdim"] or given["dtype"] is not None:
        return []
    at, over = dims[0] % (len(letters) + 1), next(unused)
    inner = _factors(_first(node), letters[:at] + over + letters[at:], unused, depth + 1)
    return inner if any(over in term.letters and one_hot_of(term) is not None for term in inner) else []


def _after(step: Node, inner: list[Term]) -> list[Term]:
    """A product after a step that keeps zeros: the step is applied to each factor that is not a one-hot row."""
    rest = [term for term in inner if one_hot_of(term) is None]
    value = tensor_of(step)
    # A cast of a product is a product of casts if all of them but one are 0 or 1; a sign is no product of signs.
    rounded = [term for term in rest if (given := tensor_of(term.node)) is None or given.dtype is not torch.bool]
    apart = value is not None and op_name(step) != "aten::gt" and (len(rounded) < 2 or value.dtype is torch.bool)
    if len(rest) > 1 and not apart:
        return []
    return [replace(term, steps=(step, *term.steps)) if term in rest else term for term in inner]


def one_hot_of(term: Term) -> Hot | None:
    """How a factor is a one-hot row; None if it is none."""
    node, letters = term.node, term.letters
    while op_name(node) == "aten::to":
        node = _first(node)
    if op_name(node) == "aten::one_hot" and not term.steps:
        source, count = node.args[0], (shape_of(node) or (0,))[-1]
        return Hot(source, tuple(letters[:-1]), letters[-1], count) if isinstance(source, Node) else None
    if op_name(node) != "aten::eq" or term.steps:
        return None
    shape = shape_of(node) or ()
    for numbers, source in (node.args[:2], node.args[1::-1]):
        own, other = shape_of(numbers), shape_of(source)
        if own is None or other is None or not is_arange(numbers) or not isinstance(source, Node):
            continue
        wide = [dim - len(own) for dim, size in enumerate(own) if not known_equal(size, 1)]
        wide = [-1] if not wide and len(own) == 1 else wide  # of one place only, as bins of a single token have
        if len(wide) != 1 or (len(other) >= -wide[0] and not known_equal(other[wide[0]], 1)):
            continue
        (dim,) = wide
        mine = letters[len(letters) - len(other) :]
        places = range(-len(other), 0)
        own_letters = tuple("" if at == dim else letter for at, letter in zip(places, mine, strict=True))
        return Hot(source, own_letters, letters[dim], shape[dim])
    return None


def _first(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source
