"""Products with one-hot rows choose: what is summed over the experts is what the slot's own expert has.

einsum('th,enh,tke->tkn', x, w, one_hot(ids))                  # w[ids]: 'th,tknh->tkn'

combine = einsum('tk,tke,tkc->tec', s, one_hot(ids), one_hot(rank))
rows = einsum('tec,th->ech', combine != 0, x)                  # x of the slot that is put to place c of expert e's bin
out = einsum('tec,ech->th', combine, body(rows))               # einsum('tk,tkh->th', s, body(rows)[ids, rank])

A factor that is itself such a product is taken as its own factors. A one-hot row says that two letters speak of one
thing: of a slot and its expert, or its place; it is then left out.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from moe_fx.passes.raising.axes import EXPERT, PLACE, SLOT, Axis, Place, features
from moe_fx.passes.raising.contraction import Contraction
from moe_fx.passes.raising.factors import Hot, Term, between, factors, one_hot_of
from moe_fx.passes.raising.outside import Outside
from moe_fx.passes.raising.products import Factor
from moe_fx.passes.raising.rank import Rank
from moe_fx.passes.raising.ranks import Ranks
from moe_fx.passes.raising.writer import Writer
from torch.fx import Node

from moe_fx.shapes import Dim, known_equal

__all__ = ["Choice", "chosen", "summed_slots"]


@dataclass
class Choice:
    """A product without its one-hot factors: its ``place`` tells which of its letters are rows.

    ``apart`` are the products among its operands that were taken apart.
    """

    found: Contraction
    place: Place
    steps: list[tuple[Node, ...]] = field(default_factory=list)
    apart: frozenset[Node] = frozenset()

    def factor(self, body: Writer, which: int, given: Factor) -> Factor:
        """A factor after the steps of its term, without dimensions of size 1."""
        node = given.value.node
        for step in reversed(self.steps[which]):
            target: Any = step.target
            node = body.write(target, node, *step.args[1:], **dict(step.kwargs))
        kept = [at for at, letter in enumerate(given.letters) if given.place[at] or letter in self.found.out]
        letters, place = "".join(given.letters[at] for at in kept), tuple(given.place[at] for at in kept)
        return Factor(body.reshaped(replace(given.value, node=node), features(place)), letters, place)


def chosen(walk: Outside, found: Contraction, place: Place) -> Choice | None:
    """A product whose one-hot factors are read as choices; None where there are none, or one of them is none."""
    terms = factors(found)
    hots = _hots(found, terms)
    if not hots or walk.dense or found.bias is not None:
        return None
    before = dict(walk.bindings), walk.sizes
    at = _identified(walk, hots, dict(zip(found.out, place, strict=True)))
    rest = [term for term in terms if one_hot_of(term) is None and not (at and _is_one(walk, term, at))]
    if at is None or not rest or not _is_choice(walk, found, hots, at):
        walk.bindings, walk.sizes = before
        return None
    if any(term.steps for term in rest) and not any(PLACE in dim for dim in at.values()):
        walk.bindings["counted_once"] = True  # what is done to a sum over slots is done to each: there is one
    rows = [letter for letter in at if letter not in found.out]
    product = Contraction(
        tuple(term.node for term in rest), tuple(term.letters for term in rest), found.out + "".join(rows)
    )
    apart = frozenset(between(found, terms))
    return Choice(product, (*place, *(at[letter] for letter in rows)), [term.steps for term in rest], apart)


def summed_slots(found: Contraction) -> Iterator[tuple[str | None, Dim]]:
    """The letters of a product that may be those of a token's slots, or none of them if it has one slot only."""
    terms = factors(found)
    hots = _hots(found, terms)
    if not hots:
        return
    known = {*found.out, *(hot.number for hot in hots)}
    unknown = {letter for hot in hots for letter in hot.letters if letter and letter not in known}
    for letter in sorted(unknown):
        yield letter, next(term.size(letter) for term in terms if letter in term.letters)
    if not unknown:
        yield None, 1


def _hots(found: Contraction, terms: list[Term]) -> list[Hot]:
    """The one-hot factors. A dimension of size 1 that no other factor has, as of the only slot, is none of theirs."""
    seen = Counter([*found.out, *(letter for term in terms for letter in term.letters)])
    hots = [(term, hot) for term in terms if (hot := one_hot_of(term)) is not None]

    def alone(term: Term, letter: str) -> bool:
        return bool(letter) and seen[letter] == 1 and known_equal(term.size(letter), 1)

    return [replace(hot, letters=tuple("" if alone(term, letter) else letter for letter in hot.letters))
            for term, hot in hots]  # fmt: skip


def _identified(walk: Outside, hots: list[Hot], at: dict[str, tuple[Axis, ...]]) -> dict[str, tuple[Axis, ...]] | None:
    """What the letters of one-hot rows stand for; None if one of these is neither a slot's expert nor its place."""
    ranks, waiting = Ranks(walk), list(hots)
    by_bin = any(PLACE in dim for dim in at.values())
    while waiting:
        for hot in waiting:
            for known in _slots(walk, hot, at) if by_bin else [at]:
                axes = _number(walk, ranks, hot, known)
                if axes is not None and known.get(hot.number, axes) == axes:
                    at = {**known, hot.number: axes}
                    break
            else:
                continue
            waiting.remove(hot)
            break
        else:
            return None
    return at


def _number(walk: Outside, ranks: Ranks, hot: Hot, at: dict[str, tuple[Axis, ...]]) -> tuple[Axis, ...] | None:
    """What the number of a one-hot row is: the slot's expert, its place in the expert's bin, or in all bins."""
    if any(letter and letter not in at for letter in hot.letters):
        return None
    place: Place = tuple(at.get(letter, ()) for letter in hot.letters)
    read = ranks.read(hot.source, place)
    if read is None:
        read = Rank(ids=1) if ranks.ids(hot.source, place) else None
    # What is counted by expert is known for the slot's own, which this is.
    read = replace(read, elsewhere=None) if read is not None else None
    if read == Rank(ids=1) and isinstance(hot.count, int):
        known = walk.bindings.setdefault("num_classes", hot.count) == hot.count
        walk.sizes = {**walk.sizes, EXPERT: hot.count}
        return (EXPERT,) if known else None
    if read == Rank(rank=1):
        return (PLACE,) if ranks.bins_of(hot.count, hot.source, grouped=True) else None
    if read is not None and read.ranked and not (isinstance(read.ids, int) and read.ids == 0):
        return (EXPERT, PLACE) if ranks.bins_of(read.ids, hot.source, grouped=True) else None
    ids = walk.bindings.get("ids")
    if ids is not None:
        wanted = f"one-hot rows of {ids.name}, or of ranks from 0 up among the rows of an expert"
        ranks.miss(wanted, f"those of {hot.source.name}", hot.source, near=1)
    return None


def _slots(walk: Outside, hot: Hot, at: dict[str, tuple[Axis, ...]]) -> Iterator[dict[str, tuple[Axis, ...]]]:
    """In which ways the letters of a one-hot row may be those of tokens and slots."""
    letters = [letter for letter in hot.letters if letter and letter not in at]
    rows: list[Place] = [(*((token,) for token in walk.tokens), (SLOT,)), ((*walk.tokens, SLOT),), (walk.tokens,)]
    for places in dict.fromkeys(itertools.chain(*(itertools.permutations(each, len(letters)) for each in rows))):
        guess = dict(zip(letters, places, strict=True))
        # A token's letter is one: sums over two of them are not sums over slots.
        if not {axis for dim in at.values() for axis in dim} & {axis for dim in places for axis in dim}:
            yield {**at, **guess}


def _is_choice(walk: Outside, found: Contraction, hots: list[Hot], at: dict[str, tuple[Axis, ...]]) -> bool:
    """Whether one-hot rows choose, by slot, an expert or a place, or by place, the one slot that is there.

    Where a slot and its number are both seen in the result, they mask it. Of bins that are apart for each group of
    tokens, the group is always seen: in another group, another slot has the same place.
    """
    groups = Ranks(walk).groups if any(PLACE in dim for dim in at.values()) else frozenset()
    grouped = {letter for letter, dim in at.items() if groups & set(dim)}
    if not grouped <= set(found.out) or not groups <= {axis for letter in grouped for axis in at[letter]}:
        Ranks(walk).miss("bins for each group of tokens within which ranks are counted", "bins for all", walk.root)
        return False
    told = {hot.number for hot in hots}
    group = {letter for letter in grouped if groups.issuperset(at[letter])}
    slots = {letter for hot in hots for letter in hot.letters if letter and at[letter]} - told - group
    masks = any(hot.number in found.out and slots & set(hot.letters) & set(found.out) for hot in hots)
    by_bin = {axis for letter in found.out for axis in at[letter] if axis in (EXPERT, PLACE)}
    numbers = {axis for hot in hots if hot.number in found.out for axis in at[hot.number]}
    summed = slots - set(found.out)
    return not masks and (by_bin == numbers == {EXPERT, PLACE} if summed else not numbers)


def _is_one(walk: Outside, term: Term, at: dict[str, tuple[Axis, ...]]) -> bool:
    """Whether a factor is certainly 1 for every slot, as a mask is of rows that are kept if all of them are."""
    if any(letter not in at and not known_equal(term.size(letter), 1) for letter in term.letters):
        return False
    read = Ranks(walk).read(term.node, tuple(at.get(letter, ()) for letter in term.letters))
    return read is not None and read.fixed and read.plus == 1
