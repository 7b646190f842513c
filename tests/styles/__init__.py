"""MoE layers as real authors write them; see `base.py`."""

from styles import (
    all_at_once,
    around,
    asking,
    bins,
    bins_in_turn,
    bins_of_groups,
    choices,
    dispatcher,
    found_rows,
    from_scratch,
    gathered,
    grouped,
    modules,
    one_after_another,
    one_hot,
    rows_put,
    stacked,
)
from styles.base import STYLES, Style

__all__ = [
    "STYLES",
    "Style",
    "all_at_once",
    "around",
    "asking",
    "bins",
    "bins_in_turn",
    "bins_of_groups",
    "choices",
    "dispatcher",
    "found_rows",
    "from_scratch",
    "gathered",
    "grouped",
    "modules",
    "one_after_another",
    "one_hot",
    "rows_put",
    "stacked",
]
