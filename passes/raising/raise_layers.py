"""The raise pass: find every sum over slots, read the layer behind it, check it, put the one node in its place.

    sort, index, _grouped_mm, ..., sum    =>    y = experts(x, ids, (s,), (w1, w2), (), body)

Nothing that the program reads is changed before the whole match, its side conditions and the numeric check have
succeeded; what a layer would read is written before (see taken.py), and dropped if it does not come to it.
"""

from __future__ import annotations

from typing import Any

import torch
from moe_fx.passes.normalize.unmerge_products import merge_products
from moe_fx.passes.raising.anchors import anchors_behind, anchors_near, is_anchor
from moe_fx.passes.raising.choices_left import choices_left
from moe_fx.passes.raising.disguises import one_slot_at, region_at
from moe_fx.passes.raising.experts_first import drop_unread
from moe_fx.passes.raising.lengths import joined_lengths, settle_features
from moe_fx.passes.raising.one_slot import ends_of_one_slot
from moe_fx.passes.raising.prove import Proof, prove
from moe_fx.passes.raising.region import Region
from moe_fx.passes.raising.router import describe_router
from moe_fx.passes.raising.single_token import with_remedy
from moe_fx.passes.raising.taken import flatten, stack_and_shorten
from moe_fx.passes.raising.without_parameters import write_terms
from torch.fx import Node

from moe_fx.experts import experts
from moe_fx.matcher import Miss, op_name
from moe_fx.pipeline import Layer, Work
from moe_fx.program import Program, assuming
from moe_fx.report import describe_miss, module_of
from moe_fx.rewrite import PROVENANCE, Emitter, FakeValues, drop_dead_code, erase_dead, replace
from moe_fx.shapes import known_equal, same_shape, shape_of, tensor_of
from moe_fx.weights import StackedWeight

__all__ = ["raise_layers"]

#: what a miss is filed under when no piece says which disguise it would have been
UNKNOWN_FORM = "experts"


def raise_layers(work: Work) -> None:
    """Replace the layers found; file a miss for what looks like one and is not proven."""
    with assuming(joined_lengths(work.program.graph)):
        settle_features(work.program.graph)
        _raise_all(work)


def _raise_all(work: Work) -> None:
    graph = work.program.graph
    covered: set[Node] = set()
    near: list[tuple[Miss, Node, set[Node]]] = []
    told: set[Node] = set()
    for root in [node for node in graph.nodes if node.op == "call_function"]:
        found = region_at(root)
        if found is None:
            continue
        region, anchors = found
        if isinstance(region, Region):
            covered |= region.interior
            failed = _raise(work, region)
            if failed is not None:
                work.misses.append(describe_miss(region.form, with_remedy(failed, root)))
                told.add(root)
        else:
            near.append((region, root, anchors))
    for root in list(ends_of_one_slot(graph, covered)):
        layer = one_slot_at(root)
        if isinstance(layer, Region):
            failed = _raise(work, layer)
            layer = layer if failed is None else failed
        if isinstance(layer, Region):
            covered |= layer.interior
        elif layer is not None and "ids" in layer.bindings:
            near.append((layer, root, anchors_behind(root)))
    # Of several values in which the same multiplications might have ended, the one that came the furthest tells most.
    for miss, root, anchors in sorted(near, key=lambda each: -each[0].depth):
        if anchors - covered:
            covered |= anchors
            work.misses.append(describe_miss(UNKNOWN_FORM, with_remedy(miss, root)))
            told |= {root, *anchors}
    for node in graph.nodes:
        if is_anchor(node) and node not in covered:
            users = ", ".join(user.name for user in node.users) or "nothing"
            miss = Miss("a sum over each token's slots behind this multiplication", f"only {users}", node)
            work.misses.append(describe_miss(UNKNOWN_FORM, with_remedy(miss, node)))
            covered.update(anchors_near(node))
            told.add(node)
    drop_unread(graph)
    if work.layers:
        drop_dead_code(graph)  # views of weights, which would keep them
    merge_products(graph)
    for miss in choices_left(graph, told, [(miss, root) for miss, root, _ in near]):
        work.misses.append(describe_miss(UNKNOWN_FORM, miss))


def _raise(work: Work, region: Region) -> Miss | None:
    """Check and rewrite one layer; a Miss if it must stay as it is."""
    program = work.program
    undo = stack_and_shorten(program, region)
    flatten(program, region)
    proof = prove(work, region)
    if isinstance(proof, Miss):
        erase_dead(program.graph, region.views)
        undo()
        return proof
    router = describe_router(region.ids, region.slots, proof.selection, _fqns(program))
    node = _rewrite(program, region, proof.clamps)
    work.layers.append(_layer(work, region, node, router, proof))
    write_terms(program, region, flatten, work.written)
    return None


def _in_shape_of(program: Program, root: Node, rows: Node, region: Region) -> Node:
    """The layer's result ``[T, H]`` in the shape that the program goes on with."""
    wanted, have = shape_of(root) or (), shape_of(rows) or ()
    if same_shape(wanted, have):
        return rows
    emit = Emitter(program.graph, root, FakeValues(program.fake_mode))
    inputs = program.graph.find_nodes(op="placeholder")  # of any other value the sizes may be known later
    known: list[Any] = [*reversed(inputs), region.tokens]
    while op_name(known[-1]) == "aten::reshape":  # from batch and sequence, which the result may have apart
        known.append(known[-1].args[0])
    sizes: list[int | Node] = []
    for size in wanted:
        told = ((node, at) for node in reversed(known) for at, each in enumerate(shape_of(node) or ()))
        found = next(((node, at) for node, at in told if known_equal(shape_of(node)[at], size)), None)
        if isinstance(size, int):
            sizes.append(size)
        elif found is None:
            sizes.append(-1)  # batch and sequence in one, beside fixed sizes
        else:
            sizes.append(emit(torch.ops.aten.sym_size.int, *found))
    return emit(torch.ops.aten.reshape.default, rows, sizes)


def _rewrite(program: Program, region: Region, clamp_ids: bool) -> Node:
    graph, root = program.graph, region.root
    name = program.add_body(region.body)
    with graph.inserting_before(root):
        body = graph.get_attr(name)
        ids = region.ids
        if clamp_ids:
            ids = _clamped(program, region)
        node = graph.call_function(
            experts,
            (region.tokens, ids, tuple(region.slots), tuple(region.params), tuple(region.shared), body),
        )
    node.meta.update({key: root.meta[key] for key in PROVENANCE if key in root.meta})
    node.meta["val"] = _rows_like(program, region)
    result = _in_shape_of(program, root, node, region)
    if region.base is not None:
        result = Emitter(graph, root, FakeValues(program.fake_mode))(torch.ops.aten.add.Tensor, region.base, result)
    replace(root, result)
    erase_dead(graph, [root])
    return node


def _rows_like(program: Program, region: Region) -> torch.Tensor:
    """The (fake) value of the layer as rows."""
    value = tensor_of(region.root)
    assert value is not None
    if same_shape(value.shape[:1], region.size[:1]) and value.dim() == 2:
        return value
    with program.fake_mode:
        return value.reshape(-1, value.shape[-1])


def _clamped(program: Program, region: Region) -> Node:
    """Ids as the original used them, where they may name no expert and it clamped them."""
    emit = Emitter(program.graph, region.root, FakeValues(program.fake_mode))
    return emit(torch.ops.aten.clamp.default, region.ids, 0, region.num_experts - 1)


def _layer(work: Work, region: Region, node: Node, router: str, proof: Proof) -> Layer:
    for param in region.params:
        work.program.derive(param)
    weights = [work.program.weights[p] for p in region.params if p in work.program.weights]
    # The experts' own module holds the parameters; where they come from elsewhere, the trace tells the module.
    fqn = _common_module([weight.fqn for weight in weights]) if weights else module_of(region.root)
    parts = {
        weight.fqn: tuple(source.fqn for source in weight.sources)
        for weight in weights if isinstance(weight, StackedWeight)
    }  # fmt: skip
    size = sum(weight.tensor.numel() * weight.tensor.element_size() for weight in weights)
    return Layer(
        node, region.body, fqn, region.form, region.num_experts, region.top_k, router,
        proof.in_range, proof.selection.distinct, proof.result.error if work.config.validate else None,
        proof.result.seconds,
        originals=[p for p in region.params if p in work.program.weights], bytes_before=size, bytes_after=size,
        ids=region.ids.name, output=(region.root.name, ""), parts=parts, visits=region.visits,
    )  # fmt: skip


def _common_module(names: list[str]) -> str:
    """The innermost module that holds all of these parameters."""
    shared: list[str] = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _fqns(program: Program) -> dict[Node, str]:
    return {node: weight.fqn for node, weight in program.weights.items()}
