"""The pieces known. To add some: declare them in a file of their own, and name it here."""

from __future__ import annotations

from moe_fx.passes.raising import every_token, gathered, grouped, routing_map, slot_major
from moe_fx.passes.raising.pieces import Piece

from moe_fx.errors import ConfigError

__all__ = ["known_pieces", "register"]

#: the pieces between a sum over slots, or over all experts, and the tokens
PIECES: tuple[Piece, ...] = (
    *slot_major.PIECES, *grouped.PIECES, *routing_map.PIECES, *gathered.PIECES, *every_token.PIECES
)  # fmt: skip
#: pieces from outside this package
REGISTERED: list[Piece] = []


def known_pieces() -> tuple[Piece, ...]:
    """All that a value between a sum and the tokens may be."""
    return (*PIECES, *REGISTERED)


def register(*pieces: Piece) -> None:
    """Declare pieces of a disguise that the library does not know, from outside it.

    Args:
        pieces: of :mod:`moe_fx.passes.raising.pieces`, tried after the library's own between a sum and the tokens. A
            piece says what a value in one layout may be; the layer it helps to find is proven and checked as any other.

    Raises:
        ConfigError: something that is no piece.
    """
    for piece in pieces:
        if not isinstance(piece, Piece) or type(piece) is Piece:
            kinds = "Dispatch, Slot, ExpertLinear, ExpertRow, Mask or View"
            raise ConfigError(f"moe_fx.register takes pieces ({kinds} of moe_fx.passes.raising.pieces), not {piece!r}")
    REGISTERED.extend(piece for piece in pieces if piece not in REGISTERED)
