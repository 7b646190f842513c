"""What disguises are made of: kinds of pieces, and the order in which routed rows stand.

Routed rows stand in one of these layouts on their way from the tokens to the sum:

    slots         [T, K, ...]   one row per token and slot
    token_major   [T*K, ...]    the same, flat: row t*K + k
    slot_major    [K*T, ...]    the same, slot after slot: row k*T + t
    sorted        [T*K, ...]    ordered by expert: row i is slot perm[i]
    tokens       [T, ...]      every token, in a loop in which every expert takes all of them
    flat_tokens  [T, ...]      the same where tokens have several dimensions, such as batch and sequence: in one
    expert_major  [E*T, ...]   every token for every expert: row e*T + t
    hits          [n, ...]      the rows of one expert, in a loop over all of them

A piece says what a value in one layout may be: the place where token rows come in, where a routing weight comes
in, where a row meets its expert's weight, ... What is none of these and is row-local belongs to the body.
The names that pieces capture are shared by the whole layer (`ids`, `perm`, `top_k`, ...), so that all of its
pieces speak of the same routing; only `rows`, `slot`, `weight` and `param` are a piece's own.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_fx.pattern import ANY, WHOLE, Last, Pattern, aten, either, optional

__all__ = [
    "EXPERT_MAJOR", "FLAT_TOKENS", "HITS", "SLOTS", "SLOT_MAJOR", "SORTED", "TOKENS", "TOKEN_MAJOR", "Column",
    "Dispatch", "ExpertLinear", "ExpertRow", "Mask", "Piece", "Put", "Slot", "View", "arange", "spread",
    "widened_arange",
]  # fmt: skip

SLOTS, TOKEN_MAJOR, SLOT_MAJOR, SORTED = "slots", "token_major", "slot_major", "sorted"
TOKENS, FLAT_TOKENS, HITS, EXPERT_MAJOR = "tokens", "flat_tokens", "hits", "expert_major"

#: names whose values differ from piece to piece
LOCAL = ("rows", "slot", "table", "weight", "bias", "param", "put_into")


@dataclass(frozen=True)
class Piece:
    """A pattern for values in ``layout``."""

    layout: str
    pattern: Pattern


@dataclass(frozen=True)
class Dispatch(Piece):
    """Token rows come in: captures ``tokens [T, ...]``."""


@dataclass(frozen=True)
class Slot(Piece):
    """What travels with a slot comes in, such as the routing weight: captures ``slot [T, K, ...]``.

    ``summed``: it is added up over all slots in which a token's ids name the expert.
    """

    summed: bool = False


@dataclass(frozen=True)
class Column(Piece):
    """An expert's column of a table of routing weights, at the rows routed to it: captures ``table [T, E]``.

    ``masked``: it is zero at all other rows because a mask says so, whatever the table holds there.
    """

    masked: bool = False


@dataclass(frozen=True)
class ExpertLinear(Piece):
    """A row meets its expert's weight: captures ``rows``, ``weight [E, N, K]`` or ``[E, K, N]``, perhaps ``bias``."""

    form: str
    transposed: bool = False


@dataclass(frozen=True)
class ExpertRow(Piece):
    """An expert's parameter, such as a bias, is laid beside its rows: captures ``param [E, ...]``.

    ``by_id``: it is looked up by ids as they are, so that one which names no expert would be an error.
    """

    by_id: bool = False


@dataclass(frozen=True)
class Mask(Piece):
    """Rows of no expert, or of all other experts, are set to zero: captures ``rows``."""


@dataclass(frozen=True)
class Put(Piece):
    """The rows of one expert are put among all tokens', which are zero: captures ``rows`` and ``put_into``."""


@dataclass(frozen=True)
class View(Piece):
    """The same rows in another layout: captures ``rows``, which stand in the layout ``to``."""

    to: str


def arange() -> Pattern:
    """0, 1, 2, ... of any length and dtype."""
    return either(aten.arange(ANY, dtype=WHOLE), aten.arange(0, ANY, dtype=WHOLE))


def spread(value: Pattern) -> Pattern:
    """Repeated along a dimension of size 1; with one slot per token there is nothing to repeat."""
    return optional(lambda single: aten.expand(single, ANY), value)


def widened_arange(numbers: Pattern | None = None) -> Pattern:
    """0, 0, 1, 1, ...: each token's number once for every slot, as `repeat_interleave` is decomposed."""
    return aten.reshape(optional(aten.clone, spread(aten.unsqueeze(numbers or arange(), Last(1)))), ANY)
