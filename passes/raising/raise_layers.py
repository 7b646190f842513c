"""The raise pass: find every sum over slots, read the layer behind it, check it, put the one node in its place.

    sort, index, _grouped_mm, ..., sum    =>    y = experts(x, ids, (s,), (w1, w2), (), body)

Nothing is changed before the whole match, its side conditions and the numeric check have succeeded.
"""

from __future__ import annotations

import torch
from moe_fx.passes.normalize.functional import memory_of
from moe_fx.passes.raising.anchors import anchors_behind, anchors_near, is_anchor
from moe_fx.passes.raising.choices_left import choices_left
from moe_fx.passes.raising.disguises import one_slot_at, region_at
from moe_fx.passes.raising.experts_first import drop_unread
from moe_fx.passes.raising.negatives import may_be_negative
from moe_fx.passes.raising.one_slot import ends_of_one_slot
from moe_fx.passes.raising.region import Region
from moe_fx.passes.raising.routing import describe_router, foreign_slot, selection_of
from moe_fx.passes.raising.rows_of_linears import several_rows_at_once
from moe_fx.passes.raising.without_parameters import write_terms
from torch.fx import Node

from moe_fx.check import CheckResult, check_layer
from moe_fx.experts import experts
from moe_fx.matcher import Miss, op_name
from moe_fx.pipeline import Layer, Work
from moe_fx.program import Program, StackedWeight, stacked_name
from moe_fx.report import describe_miss, module_of
from moe_fx.rewrite import PROVENANCE, Emitter, FakeValues, erase_dead, replace
from moe_fx.shapes import known_equal, same_shape, shape_of, tensor_of

__all__ = ["raise_layers"]

#: what a miss is filed under when no piece says which disguise it would have been
UNKNOWN_FORM = "experts"


def raise_layers(work: Work) -> None:
    """Replace the layers found; file a miss for what looks like one and is not proven."""
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
                work.misses.append(describe_miss(region.form, failed))
                told.add(root)
        else:
            near.append((region, root, anchors))
    for root in list(ends_of_one_slot(graph, covered)):
        layer = one_slot_at(root)
        if isinstance(layer, Region):
            layer = _raise(work, layer) or layer
        if isinstance(layer, Region):
            covered |= layer.interior
        elif layer is not None and "ids" in layer.bindings:
            near.append((layer, root, anchors_behind(root)))
    # Of several values in which the same multiplications might have ended, the one that came the furthest tells most.
    for miss, root, anchors in sorted(near, key=lambda each: -each[0].depth):
        if anchors - covered:
            covered |= anchors
            work.misses.append(describe_miss(UNKNOWN_FORM, miss))
            told |= {root, *anchors}
    for node in graph.nodes:
        if is_anchor(node) and node not in covered:
            users = ", ".join(user.name for user in node.users) or "nothing"
            miss = Miss("a sum over each token's slots behind this multiplication", f"only {users}", node)
            work.misses.append(describe_miss(UNKNOWN_FORM, miss))
            covered.update(anchors_near(node))
            told.add(node)
    drop_unread(graph)
    for miss in choices_left(graph, told, [(miss, root) for miss, root, _ in near]):
        work.misses.append(describe_miss(UNKNOWN_FORM, miss))


def _raise(work: Work, region: Region) -> Miss | None:
    """Check and rewrite one layer; a Miss if it must stay as it is."""
    program = work.program
    apart = [place for place, param in enumerate(region.params) if isinstance(param, tuple)]
    for place in apart:
        region.params[place] = _stacked(program, region.params[place], region.root)
    shortened = _shorten(program, region)
    _flatten(program, region)
    wrong = _prove_and_rewrite(work, region)
    if wrong is None:
        write_terms(program, region, _flatten)
    else:
        erase_dead(program.graph, region.views)
        erase_dead(program.graph, shortened)
        for place in apart:
            if not region.params[place].users:  # another layer's, if it has any
                program.weights.pop(region.params[place], None)
                erase_dead(program.graph, [region.params[place]])
    return wrong


def _shorten(program: Program, region: Region) -> list[Node]:
    """Parameters of the layer's experts only, where they hold something for others that it never comes to."""
    count, shortened = region.num_experts, []
    for place, param in enumerate(region.params):
        if isinstance(param, Node) and not known_equal((shape_of(param) or (0,))[0], count):
            emit = Emitter(program.graph, region.step or region.root, FakeValues(program.fake_mode))
            shortened.append(emit(torch.ops.aten.slice.Tensor, param, 0, 0, count))
            region.params[place] = shortened[-1]
    return shortened


def _flatten(program: Program, region: Region) -> None:
    """Tokens, ids and slots as rows: a model may keep batch and sequence apart, or have no dimension for one slot."""
    emit = Emitter(program.graph, region.root, FakeValues(program.fake_mode))

    def flat(node: Node, *inner: int) -> Node:
        if node in region.tables:
            return looked_up(node)
        if node in region.each_token and top_k != 1:
            return repeated(node)
        if known_equal((shape_of(node) or (0,))[0], region.size[0]) and len(shape_of(node) or ()) == 1 + len(inner):
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


def _in_shape_of(program: Program, root: Node, rows: Node, region: Region) -> Node:
    """The layer's result ``[T, H]`` in the shape that the program goes on with."""
    wanted, have = shape_of(root) or (), shape_of(rows) or ()
    if same_shape(wanted, have):
        return rows
    emit = Emitter(program.graph, root, FakeValues(program.fake_mode))
    source = region.tokens.args[0] if region.tokens in region.views else region.tokens
    outer = shape_of(source) or ()
    sizes: list[int | Node] = []
    for size in wanted:
        at = next((at for at, each in enumerate(outer) if known_equal(each, size)), None)
        if isinstance(size, int):
            sizes.append(size)
        elif at is None:
            sizes.append(-1)  # batch and sequence in one, beside fixed sizes
        else:
            sizes.append(emit(torch.ops.aten.sym_size.int, source, at))
    return emit(torch.ops.aten.reshape.default, rows, sizes)


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


def _prove_and_rewrite(work: Work, region: Region) -> Miss | None:
    program = work.program
    for node in (*region.inputs, *([region.base] if region.base is not None else [])):
        if memory_of(node) in work.written:
            return Miss("operands that nobody writes in place", f"{node.name}, whose memory is written", node)
    given_ids = region.ids.args[0] if region.ids in region.views else region.ids
    assert isinstance(given_ids, Node)
    selection = selection_of(given_ids, region.num_experts)
    # What some of the experts are traced for is compared, and never run: fewer experts than ids may name.
    if region.distinct and region.top_k > 1 and not selection.distinct and not work.partial:
        return Miss("ids that are certainly distinct for each token", f"{given_ids.name}, which may repeat", given_ids)
    if not region.slots and region.top_k == 1 and selection.chooser is None:
        # Adapters that requests name are the same equation, and no experts.
        return Miss("an expert chosen by scores, or a routing weight", f"{given_ids.name}, which is given", given_ids)
    for slot in region.slots:
        foreign = foreign_slot(slot, given_ids, selection)
        if foreign is not None:
            chooser = selection.chooser.name if selection.chooser is not None else ""
            return Miss(
                f"routing weights chosen by {chooser}, like the ids",
                f"{slot.name}, chosen by {foreign.name}",
                slot,
            )
    # Gathering with an id that names no expert is an error, unless ids are clamped first; sorted rows skip it, and so
    # does a loop, unless its mask has no class for it.
    clamps = "last_expert" in region.bindings and "perm" not in region.bindings
    loops = "expert" in region.bindings
    skips = (
        "perm" in region.bindings
        or "rows_skipped" in region.bindings
        or (loops and region.bindings.get("num_classes") != region.num_experts)
    )
    in_range = selection.in_range or not skips or "looked_up" in region.bindings
    if "counts_beyond" in region.bindings and not selection.in_range and not work.partial:
        return Miss("ids that certainly name an expert", f"{given_ids.name}, which may be counted beyond", given_ids)
    indexed = "indexed" in region.bindings or "looked_up" in region.bindings
    if indexed and region.bindings.get("lowest_expert") != 0 and not selection.in_range:
        # An index counts from the end where it is negative.
        computed = may_be_negative(given_ids, lambda node: _values(program, node))
        if computed is not None:
            wanted = "ids that are certainly not negative"
            return Miss(wanted, f"{computed.name} ({op_name(computed) or computed.op})", given_ids)
    every = tuple(range(region.num_experts))
    for visited in region.visits:
        if visited != every and not work.partial:
            return Miss(f"every expert of {len(every)} once", f"experts {', '.join(map(str, visited))}", region.root)
    if region.tables and not in_range and not work.partial:
        return Miss("ids that certainly name an expert", f"{given_ids.name}, looked up in a table", given_ids)
    wide = several_rows_at_once(region)
    if wide is not None:
        return wide
    result = CheckResult(float("nan"), 0, 0.0)
    if work.config.validate:
        operands = (region.tokens, region.ids, region.slots, region.params, region.shared)
        each = region.bindings["expert"] if region.step is not None else None
        root = region.step or region.root
        result = check_layer(
            root, operands, region.body, in_range, selection.distinct, each, region.views, region.base,
            region.not_negative,
        )  # fmt: skip
        if not result.passed:
            wanted = "the same numbers from the layer and its experts node"
            found = result.problem or f"a difference of {result.error:.1e} of the output's range"
            return Miss(wanted, found, region.root)
    router = describe_router(region.ids, region.slots, selection, _fqns(program))
    node = _rewrite(program, region, clamps and not selection.in_range)
    work.layers.append(_layer(work, region, node, router, in_range, selection.distinct, result))
    return None


def _values(program: Program, node: Node) -> torch.Tensor | None:
    """The values of one of the model's own tensors, if it has any."""
    weight = program.weights.get(node)
    return weight.values() if weight is not None and weight.has_values else None


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


def _layer(
    work: Work, region: Region, node: Node, router: str, in_range: bool, distinct: bool, result: CheckResult
) -> Layer:
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
        in_range, distinct, result.error if work.config.validate else None, result.seconds,
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
