"""What a region takes from the program, as the experts node takes it: one stack of each parameter, rows of tokens.

    weights [e] of every expert, x [B, S, H], ids [B, S, K]   =>   stack [E, ...], x [B * S, H], ids [B * S, K]

All of it is written before the layer is proven, and is dead if it is not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from moe_fx.passes.raising.region import Region
from torch.fx import Node

from moe_fx.program import Program
from moe_fx.rewrite import Emitter, FakeValues, erase_dead
from moe_fx.shapes import known_equal, same_shape, shape_of
from moe_fx.weights import StackedWeight, stacked_name

__all__ = ["flatten", "stack_and_shorten"]


def stack_and_shorten(program: Program, region: Region) -> Callable[[], None]:
    """Make each parameter one stack of the layer's experts; returns what undoes it."""
    apart = [place for place, param in enumerate(region.params) if isinstance(param, tuple)]
    for place in apart:
        region.params[place] = _stacked(program, region.params[place], region.root)
    shortened = _shorten(program, region)

    def undo() -> None:
        erase_dead(program.graph, shortened)
        for place in apart:
            if not region.params[place].users:  # another layer's, if it has any
                program.weights.pop(region.params[place], None)
                erase_dead(program.graph, [region.params[place]])

    return undo


def _shorten(program: Program, region: Region) -> list[Node]:
    """Parameters of the layer's experts only, where they hold something for others that it never comes to."""
    count, shortened = region.num_experts, []
    for place, param in enumerate(region.params):
        if isinstance(param, Node) and not known_equal((shape_of(param) or (0,))[0], count):
            emit = Emitter(program.graph, region.step or region.root, FakeValues(program.fake_mode))
            shortened.append(emit(torch.ops.aten.slice.Tensor, param, 0, 0, count))
            region.params[place] = shortened[-1]
    return shortened


def flatten(program: Program, region: Region) -> None:
    """Tokens, ids and slots as rows: a model may keep batch and sequence apart, or have no dimension for one slot."""
    emit = Emitter(program.graph, region.root, FakeValues(program.fake_mode))

    def flat(node: Node, *inner: int) -> Node:
        if node in region.tables:
            return looked_up(node)
        if node in region.each_token and top_k != 1:
            return repeated(node)
        if same_shape(shape_of(node) or (), (region.size[0], *inner)):
            return node
        region.views.append(emit(torch.ops.aten.reshape.default, node, [-1, *inner]))
        return region.views[-1]

    def looked_up(table: Node) -> Node:
        shape = shape_of(table) or ()
        # The check reads the views in order, from those that the layer takes to what the model has.
        place = len(region.views)
        if len(shape) > 2:
            table = emit(torch.ops.aten.reshape.default, table, [-1, shape[-1]])
            region.views.append(table)
        region.views.insert(place, emit(torch.ops.aten.gather.default, table, -1, region.ids))
        return region.views[place]

    def repeated(number: Node) -> Node:
        place = len(region.views)
        if not known_equal((shape_of(number) or ())[-1], 1) or len(shape_of(number) or ()) != 2:
            number = emit(torch.ops.aten.reshape.default, number, [-1, 1])
            region.views.append(number)
        region.views.insert(place, emit(torch.ops.aten.expand.default, number, [-1, top_k]))
        return region.views[place]

    top_k = region.top_k
    region.tokens = flat(region.tokens, *region.features.get(region.tokens, ()))
    region.ids = flat(region.ids, top_k)
    region.slots = [flat(slot, top_k, *region.features.get(slot, ())) for slot in region.slots]


def _stacked(program: Program, parts: tuple[Node, ...], before: Node) -> Node:
    """One parameter of those that the model holds for each expert; a model may call the same experts twice."""
    known = (node for node, each in program.weights.items() if isinstance(each, StackedWeight) and each.nodes == parts)
    for stack in known:
        if before < stack:
            before.prepend(stack)
        return stack
    emit = Emitter(program.graph, before, FakeValues(program.fake_mode))
    stack = emit(torch.ops.aten.stack.default, list(parts))
    sources = tuple(program.weights[part] for part in parts if part in program.weights)
    if len(sources) == len(parts):
        value = stack.meta["val"]
        like = torch.empty(value.shape, dtype=value.dtype, device="meta")
        name = stacked_name([each.fqn for each in sources], {each.fqn for each in program.weights.values()})
        program.weights[stack] = StackedWeight(name, like, sources, parts)
    return stack
