"""What a tensor says of the rows of an expert, as far as `moe_fx.export` follows it through a trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Meaning"]

Tensor = torch.Tensor
#: what a model asks to learn how many elements a tensor has
SIZES = (
    Tensor.numel, torch.numel, Tensor.nelement, Tensor.size, Tensor.__len__, Tensor.shape.__get__,  # type: ignore[attr-defined]
)  # fmt: skip
#: what says nothing of how many elements there are
DESCRIPTIONS = tuple(
    getattr(Tensor, name).__get__ for name in ("ndim", "dtype", "device", "layout", "requires_grad", "is_sparse")
)
NEGATIONS = (torch.logical_not, Tensor.logical_not, torch.bitwise_not, Tensor.bitwise_not, Tensor.__invert__)
EQUALS = (torch.eq, Tensor.eq, Tensor.__eq__)
POSITIVE = (torch.gt, Tensor.gt, Tensor.__gt__, torch.greater, Tensor.greater, torch.ne, Tensor.ne, Tensor.__ne__)
TOTALS = (torch.sum, Tensor.sum, torch.any, Tensor.any, torch.count_nonzero, Tensor.count_nonzero)
RESHAPES = (
    torch.squeeze, Tensor.squeeze, torch.unsqueeze, Tensor.unsqueeze, Tensor.reshape, torch.reshape, Tensor.view,
    torch.flatten, Tensor.flatten, Tensor.bool, Tensor.long, Tensor.int, Tensor.to, Tensor.contiguous, Tensor.cpu,
)  # fmt: skip
LISTS = (Tensor.tolist, Tensor.numpy, Tensor.unbind, torch.unbind)
ELEMENTS = (Tensor.__iter__, Tensor.unbind, torch.unbind)
BINS = (torch.bincount, Tensor.bincount, torch.histc, Tensor.histc)
SCATTERS = (Tensor.scatter, Tensor.scatter_, torch.scatter)
JOINS = (torch.cat, torch.concat, torch.concatenate)
SPLITS = (torch.split, Tensor.split)
RUNNING = (torch.cumsum, Tensor.cumsum)
UNIQUE = (torch.unique, Tensor.unique)
UNIQUE_IN_ORDER = (torch.unique_consecutive, Tensor.unique_consecutive)
SORTS = (torch.sort, Tensor.sort, torch.argsort, Tensor.argsort)
#: what chooses experts by their scores, the last dimension, and which of its results are the numbers of experts
CHOICES: dict[Any, int | None] = dict.fromkeys(
    (torch.topk, Tensor.topk, torch.max, Tensor.max, torch.sort, Tensor.sort), 1
)
CHOICES |= dict.fromkeys((torch.argmax, Tensor.argmax, torch.argsort, Tensor.argsort))
PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__)
SUMS = (torch.add, Tensor.add, Tensor.__add__)
READS = (Tensor.__getitem__, Tensor.select, torch.select)


@dataclass(frozen=True)
class Meaning:
    """What a tensor says of the rows of an expert.

    ``kind``: "mask" where they are, "rows" their places, "count" how many there are, or whether there are any (``no``:
    whether there are none). ``positive``: of weights, those above zero only. ``source``: the tensor that it was read
    from, which says it of all experts. ``total``: of counts, how many ids were counted, and ``bins`` how many experts
    there are, if that is known. ``ids``: what was counted. ``ends``: the counts were added up, one expert after the
    other; this is what they were.
    """

    kind: str
    source: Tensor
    expert: int | None
    no: bool = False
    positive: bool = False
    total: Any = None
    bins: Any = None
    ids: Tensor | None = None
    ends: Tensor | None = None

    def same_expert(self, other: Meaning) -> bool:
        same = self.source is other.source and self.expert == other.expert
        return same and self.positive == other.positive
