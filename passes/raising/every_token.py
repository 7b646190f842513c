"""Disguise: every token is gathered for every expert, and each expert's results are added to all tokens.

at = torch.arange(T).view(1, -1).expand(E, -1).reshape(-1, 1).expand(-1, H)      # 0, 1, ..., T-1, E times
rows = x.gather(0, at) * table.T.reshape(-1, 1)
out = torch.zeros_like(x).scatter_add(0, at, body(rows.view(E, T, H), weight).view(-1, H))
"""

from __future__ import annotations

from moe_fx.passes.raising.pieces import EXPERT_MAJOR, Dispatch, Piece, arange

from moe_fx.pattern import ANY, Var, aten, either, optional

__all__ = ["ADDED", "PIECES"]

#: as many as there are experts: every token once for each (`region.py`)
copies = Var("num_copies")
row = either(aten.unsqueeze(arange(), 0), aten.reshape(arange(), [1, -1]))
times = either(aten.expand(row, [copies, ANY]), aten.repeat(row, [copies, 1]))
token = either(aten.reshape(optional(aten.clone, times), ANY), aten.repeat(arange(), [copies]))
base, summed = Var("base", rank=2), Var("summed", rank=2)

#: where such a layer ends
ADDED = either(
    aten.index_add(base, 0, token, summed),
    aten.index_put(base, [token], summed, True),
)
PIECES: tuple[Piece, ...] = (Dispatch(EXPERT_MAJOR, aten.index(Var("tokens", rank=2), [token])),)
