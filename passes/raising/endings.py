"""How a layer may end: with a sum over each token's slots, or over all experts.

rows.sum(1)                                      # [T, K, H]
torch.einsum("tk,tkh->th", w, rows)              # the routing weights in the sum
torch.einsum("te,tei,ehi->th", w, rows, down)    # and the last product
(w.unsqueeze(1) @ rows).squeeze(1)               # bmm of [T, 1, K] and [T, K, H]
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from moe_fx.passes.raising import every_token
from moe_fx.passes.raising.axes import EXPERT, ONE, SLOT, SORTED_ROW, TOKEN, Axis, Place, size_of
from moe_fx.passes.raising.choices import summed_slots
from moe_fx.passes.raising.contraction import Contraction, contraction
from torch.fx import Node

from moe_fx.constants import filled_with
from moe_fx.matcher import Match, arguments, match, op_name
from moe_fx.shapes import Dim, known_equal, shape_of

__all__ = ["Ending", "endings", "token_axes"]


@dataclass(frozen=True)
class Ending:
    """What ``root`` sums over slots or experts, and its ``place``: a value, or a product that is nowhere by itself.

    ``result`` is the place of the sum; ``sizes`` of the row axes, of which ``tokens`` are tokens. It is added to
    ``base``, if there is one.
    """

    summed: Node | Contraction
    place: Place
    result: Place
    sizes: dict[str, Dim]
    tokens: tuple[str, ...]
    base: Node | None = None


def endings(root: Node) -> Iterator[Ending]:
    """What a node may be the end of."""
    shape = shape_of(root)
    if shape is None or len(shape) < 2:
        return
    if op_name(root) == "aten::sum":
        yield from _sums(root, shape)
    added = match(every_token.ADDED, root)
    if isinstance(added, Match) and isinstance(added["num_copies"], int):
        known = _axes(shape, EXPERT, added["num_copies"])
        if known is not None:
            sizes, tokens, place = known
            added_to = None if filled_with(added["base"]) == 0 else added["base"]
            yield Ending(added["summed"], ((EXPERT, *tokens), place[-1]), place, sizes, tokens, added_to)
    found = contraction(root)
    if found is None or found.bias is not None:
        return
    apart = _merged(found.operands, shape[0])
    for letter in found.summed:
        count = found.size(letter)
        if not isinstance(count, int) or not (len(found.summed) > 1 or len(found.letters) > 2 or _weighs(found)):
            continue
        product = replace(found, out=found.out + letter)
        for axis, batch in itertools.product((SLOT, EXPERT), (shape[:1], apart)):
            known = _axes((*batch, *shape[1:]), axis, count) if batch is not None else None
            if known is None:
                continue
            sizes, tokens, place = known
            place = (tuple(name for dim in place[: len(batch)] for name in dim), *place[len(batch) :])
            yield Ending(product, (*place, (axis,)), place, sizes, tokens)
    for slot, count in summed_slots(found):
        known = _axes(shape, SLOT, count) if isinstance(count, int) else None
        if known is not None:
            sizes, tokens, place = known
            product = found if slot is None else replace(found, out=found.out + slot)
            yield Ending(product, place if slot is None else (*place, (SLOT,)), place, sizes, tokens)


def _weighs(found: Contraction) -> bool:
    """Whether one of two factors is a number per row: routing weights have no features."""
    rows = {letter for letter in found.out if all(letter in letters for letters in found.letters)}
    plain = {letter for letters in found.letters for letter in letters if known_equal(found.size(letter), 1)}
    return any(set(letters) <= {*rows, *plain, *found.summed} for letters in found.letters)


def _merged(operands: Sequence[Node], size: Dim) -> tuple[Dim, ...] | None:
    """The dimensions, such as batch and sequence, that were merged into one of ``size`` for a product of matrices."""
    for operand in operands:
        before = shape_of(operand.args[0]) if op_name(operand) == "aten::reshape" else None
        for many in range(2, len(before or ())):
            if before is not None and known_equal(math.prod(before[:many]), size):
                return before[:many]
    return None


def _sums(root: Node, shape: tuple[Dim, ...]) -> Iterator[Ending]:
    given = arguments(root)
    dims, summed = given.get("dim"), given["self"]
    if not isinstance(dims, list | tuple) or len(dims) != 1 or given.get("keepdim") or given.get("dtype") is not None:
        return
    before = shape_of(summed) or ()
    dim = dims[0] % len(before)
    count = before[dim]
    if not isinstance(count, int):
        return
    for axis in (SLOT, EXPERT):
        known = _axes(shape, axis, count)
        if known is None:
            return
        sizes, tokens, place = known
        yield Ending(summed, (*place[:dim], (axis,), *place[dim:]), place, sizes, tokens)


def _axes(shape: tuple[Dim, ...], axis: str, count: int) -> tuple[dict[str, Dim], tuple[str, ...], Place] | None:
    """The row axes of a sum over ``axis``, whose result is ``[tokens..., H]``."""
    known = token_axes(shape)
    if known is None:
        return None
    sizes, tokens, place = known
    sizes[axis] = count
    if axis == SLOT:
        sizes[SORTED_ROW] = size_of((*tokens, SLOT), sizes)
    return sizes, tokens, place


def token_axes(shape: tuple[Dim, ...]) -> tuple[dict[str, Dim], tuple[str, ...], Place] | None:
    """Of ``[tokens..., H]``: sizes of the row axes, the names of those of the tokens, and its place.

    Dimensions of size 1 may stand anywhere.
    """
    wide = [place for place, size in enumerate(shape) if not known_equal(size, 1)]
    if not wide or not isinstance(shape[wide[-1]], int):
        return None
    counted = wide[:-1] or [0]  # one token is a token
    if counted[-1] >= wide[-1]:
        return None
    tokens = (TOKEN,) if len(counted) == 1 else tuple(f"{TOKEN}{number}" for number in range(len(counted)))
    sizes: dict[str, Dim] = {ONE: 1}
    sizes.update((token, shape[at]) for token, at in zip(tokens, counted, strict=True))
    named: dict[int, tuple[Axis, ...]] = {at: (token,) for token, at in zip(tokens, counted, strict=True)}
    last: Axis = shape[wide[-1]]
    return sizes, tokens, tuple(named.get(at, (last,) if at == wide[-1] else ()) for at in range(len(shape)))
