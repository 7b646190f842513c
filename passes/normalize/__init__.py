"""EXPORTED -> NORMAL: functional, and one spelling per meaning.

relu_ = aten.relu_(x)                    relu = aten.relu(x)
view = aten.view(relu_, [-1])     =>     reshape = aten.reshape(relu, [-1])
to = aten.to(view, f32)  # is f32        return reshape
return to
"""

from moe_fx.passes.normalize.bins_in_turn import spell_bins_in_turn
from moe_fx.passes.normalize.choices_in_turn import spell_choices_in_turn
from moe_fx.passes.normalize.column_lists import spell_column_lists
from moe_fx.passes.normalize.cut_rows import spell_parts
from moe_fx.passes.normalize.dropped import spell_dropped_rows
from moe_fx.passes.normalize.equal_values import merge_equal_values
from moe_fx.passes.normalize.functional import functionalize
from moe_fx.passes.normalize.in_order import normalize
from moe_fx.passes.normalize.mask_rows import spell_mask_rows, spell_selected_rows
from moe_fx.passes.normalize.masked_copies import spell_masked_copies
from moe_fx.passes.normalize.masks import flatten_masks, flatten_places, select_masks
from moe_fx.passes.normalize.no_ops import drop_no_ops
from moe_fx.passes.normalize.nonzero_lists import spell_nonzero_lists
from moe_fx.passes.normalize.one_slot_masks import spell_one_slot_masks
from moe_fx.passes.normalize.places_in_turn import spell_places_in_turn
from moe_fx.passes.normalize.regions import inline_regions
from moe_fx.passes.normalize.rows_put import spell_rows_put
from moe_fx.passes.normalize.selections import spell_selections
from moe_fx.passes.normalize.spelling import spell
from moe_fx.passes.normalize.turned import spell_turned
from moe_fx.passes.normalize.unmerge_products import unmerge_products
from moe_fx.passes.normalize.whole_rows import spell_whole_rows
from moe_fx.passes.normalize.written_out import spell_contraries, write_out

__all__ = [
    "drop_no_ops", "flatten_masks", "flatten_places", "functionalize", "inline_regions", "merge_equal_values",
    "normalize", "select_masks", "spell", "spell_bins_in_turn", "spell_choices_in_turn", "spell_column_lists",
    "spell_contraries", "spell_dropped_rows", "spell_mask_rows", "spell_masked_copies", "spell_nonzero_lists",
    "spell_one_slot_masks", "spell_parts", "spell_places_in_turn", "spell_rows_put", "spell_selected_rows",
    "spell_selections", "spell_turned", "spell_whole_rows", "unmerge_products", "write_out",
]  # fmt: skip
