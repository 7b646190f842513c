"""Disguise: rows are sorted that stand slot after slot, the first of every token, then the second, ...

perm = ids.t().reshape(-1).argsort()                 # row i is slot perm[i] // T of token perm[i] % T
rows = x.repeat(K, 1)[perm]                          # or x[perm % T]
y = body(rows) * s.t().reshape(-1)[perm]             # from here to there as in `grouped.py`
out = y[inverse of perm].view(K, T, H).sum(0)
"""

from __future__ import annotations

from moe_fx.passes.raising import grouped
from moe_fx.passes.raising.grouped import top_k
from moe_fx.passes.raising.pieces import SLOT_MAJOR, SORTED, Dispatch, Piece, View, arange

from moe_fx.pattern import Var, aten, either

perm = grouped.places_of(grouped.by_slot)
token_of_row = either(aten.remainder(perm, Var("num_tokens")), aten.index(aten.repeat(arange(), [top_k]), [perm]))

PIECES: tuple[Piece, ...] = (
    View(SLOT_MAJOR, grouped.put_back(perm), to=SORTED),
    Dispatch(SORTED, aten.index(Var("tokens"), [token_of_row])),
    View(SORTED, aten.index(Var("rows", rank=(1, 2)), [perm]), to=SLOT_MAJOR),
    Dispatch(SLOT_MAJOR, aten.repeat(Var("tokens", rank=2), [top_k, 1])),
)
