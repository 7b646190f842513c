"""Whether a layer reads memory that an op in place still writes: what such an op does is no value's to tell.

mask = one_hot(ids, E).permute(2, 0, 1)
mask[:, 0].fill_(0)                          # stays in place: other views of the mask are read later
token, slot = where(mask[e])                 # computed from ids, as far as the graph tells
"""

from __future__ import annotations

from collections.abc import Collection

from moe_fx.passes.normalize.functional import memory_of
from moe_fx.passes.raising.ancestors import ancestors
from moe_fx.passes.raising.region import Region
from torch.fx import Node

from moe_fx.matcher import Miss

__all__ = ["written_in_place"]


def written_in_place(region: Region, written: Collection[Node]) -> Miss | None:
    """What a layer reads of memory that is ``written``; of its routing, also how that was made."""
    if not written:
        return None
    given = [*region.inputs, *([region.base] if region.base is not None else [])]
    sources = [source for view in region.views for source in view.all_input_nodes]
    inside = _computed(region.root, {*given, *sources})
    made = {node for each in (region.ids, *region.slots) for node in ancestors(each)}
    for node in (*given, *sorted(inside), *sorted(made)):
        memory = memory_of(node)
        # What the model keeps is read before it is written anew.
        if memory in written and (node not in made or node in given or memory.op == "call_function"):
            return Miss("operands that nobody writes in place", f"{node.name}, whose memory is written", node)
    return None


def _computed(root: Node, inputs: Collection[Node]) -> set[Node]:
    """What stands between a layer's inputs and its result."""
    seen: set[Node] = set()
    pending = [root]
    while pending:
        node = pending.pop()
        if node not in seen and node not in inputs and node.op == "call_function":
            seen.add(node)
            pending.extend(node.all_input_nodes)
    return seen
