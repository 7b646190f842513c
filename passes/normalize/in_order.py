"""The order in which a program is brought to its normal form: what each step leaves, later ones find."""

from __future__ import annotations

from moe_fx.passes.normalize.bins_in_turn import spell_bins_in_turn
from moe_fx.passes.normalize.choices_in_turn import spell_choices_in_turn
from moe_fx.passes.normalize.column_lists import spell_column_lists
from moe_fx.passes.normalize.cut_rows import spell_parts
from moe_fx.passes.normalize.divided_places import spell_divided_places
from moe_fx.passes.normalize.dropped import spell_dropped_rows
from moe_fx.passes.normalize.embedding_bags import write_out_bags
from moe_fx.passes.normalize.equal_values import merge_equal_values
from moe_fx.passes.normalize.functional import functionalize
from moe_fx.passes.normalize.hot_classes import spell_hot_classes
from moe_fx.passes.normalize.id_casts import spell_id_casts
from moe_fx.passes.normalize.literals import spell_literals
from moe_fx.passes.normalize.looked_up import spell_looked_up
from moe_fx.passes.normalize.mask_rows import spell_mask_rows, spell_selected_rows
from moe_fx.passes.normalize.masked_copies import spell_masked_copies
from moe_fx.passes.normalize.masks import flatten_masks, flatten_places, select_masks
from moe_fx.passes.normalize.no_ops import drop_no_ops
from moe_fx.passes.normalize.nonzero_lists import spell_nonzero_lists
from moe_fx.passes.normalize.numbered_rows import spell_numbered_rows
from moe_fx.passes.normalize.one_slot_masks import spell_one_slot_masks
from moe_fx.passes.normalize.places_in_turn import spell_places_in_turn
from moe_fx.passes.normalize.pointwise_convs import spell_pointwise_convs
from moe_fx.passes.normalize.put_in_turn import spell_put_in_turn
from moe_fx.passes.normalize.regions import inline_regions
from moe_fx.passes.normalize.rows_put import spell_rows_put
from moe_fx.passes.normalize.scattered_in_turn import spell_scattered_in_turn
from moe_fx.passes.normalize.selections import spell_selections
from moe_fx.passes.normalize.slot_means import spell_slot_means
from moe_fx.passes.normalize.slots_added import spell_slots_added
from moe_fx.passes.normalize.some_slot import spell_some_slot
from moe_fx.passes.normalize.spelling import spell
from moe_fx.passes.normalize.turned import spell_turned
from moe_fx.passes.normalize.unmerge_products import unmerge_products
from moe_fx.passes.normalize.whole_rows import spell_whole_rows
from moe_fx.passes.normalize.wide_linears import spell_wide_linears
from moe_fx.passes.normalize.written_out import spell_contraries, write_out
from moe_fx.passes.normalize.zeros_computed import drop_computed_zeros

from moe_fx.pipeline import Work

__all__ = ["normalize"]


def normalize(work: Work) -> None:
    """EXPORTED -> NORMAL."""
    graph = work.program.graph
    inline_regions(work.program.graph_module)
    write_out(graph)
    write_out_bags(graph)
    written = work.written = functionalize(graph)
    spell_literals(work.program)
    spell_pointwise_convs(graph, written)
    spell(graph)
    spell_id_casts(graph, written)
    spell_whole_rows(graph, written)
    spell_slot_means(graph, written)
    spell_scattered_in_turn(graph, written)
    spell_contraries(graph, written)
    drop_no_ops(graph, written)
    spell_selected_rows(graph, written)
    select_masks(graph, written)
    spell_hot_classes(graph, written)
    spell_turned(graph, written)
    spell_one_slot_masks(graph, written)
    spell_some_slot(graph, written)
    flatten_masks(graph, written)
    drop_no_ops(graph, written)
    merge_equal_values(graph, written, work.program.weights)
    flatten_places(graph, written)
    spell_wide_linears(graph, written)
    spell_looked_up(graph, written)
    spell(graph)  # what a no-op stood between
    drop_computed_zeros(graph, written)
    spell_mask_rows(graph, written)
    spell_slots_added(graph, written)
    spell_places_in_turn(graph, written)
    unmerge_products(graph, written)
    spell_masked_copies(graph, written)
    if spell_rows_put(graph, written):
        merge_equal_values(graph, written, work.program.weights)  # what the sums read is one for all experts
    spell_divided_places(graph, written)
    spell_numbered_rows(graph, written)
    spell_parts(graph)
    spell_nonzero_lists(graph, written)
    spell_selections(graph, written)
    spell_column_lists(graph, written)
    spell_dropped_rows(graph, written)
    spell_choices_in_turn(graph, written)
    if spell_put_in_turn(graph, written) | spell_bins_in_turn(graph, written):
        merge_equal_values(graph, written, work.program.weights)  # ids that were put together for their counts as well
    spell(graph)  # what was written on the way
