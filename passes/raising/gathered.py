"""Disguise: every row gathers its expert's weight, and a batched matrix multiply applies it.

rows = x.repeat_interleave(K, 0)                     # [T*K, H]
y = torch.bmm(weight[ids.reshape(-1)], rows[..., None]).squeeze(-1)
out = (body(y) * s.reshape(-1, 1)).view(T, K, H).sum(1)
"""

from __future__ import annotations

from moe_fx.passes.raising.pieces import TOKEN_MAJOR, Dispatch, Piece, arange, spread, widened_arange

from moe_fx.pattern import ANY, Var, aten, either, optional

tokens, top_k = Var("tokens"), Var("top_k")

repeated = spread(aten.unsqueeze(tokens, 1))
token_of_row = either(
    aten.floor_divide(arange(), top_k),
    aten.repeat_interleave(arange(), top_k),
    widened_arange(),
)

PIECES: tuple[Piece, ...] = (
    Dispatch(TOKEN_MAJOR, aten.repeat_interleave(tokens, top_k, 0)),
    Dispatch(TOKEN_MAJOR, aten.reshape(optional(aten.clone, repeated), ANY)),
    Dispatch(TOKEN_MAJOR, aten.index(tokens, [token_of_row])),
)
