"""A layer, found: the operands of its ``experts`` node and the body of one expert, and whether they fit together."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_fx.passes.raising.routing import chosen_once, selection_of
from torch.fx import GraphModule, Node

from moe_fx.constants import reads_shapes
from moe_fx.matcher import Miss, op_name
from moe_fx.rewrite import GIVEN, only_asserted
from moe_fx.shapes import Dim, known_equal, shape_of, tensor_of

__all__ = ["Region", "computed_with", "misfit", "read_beside", "read_outside", "told_of_ids"]

#: what pieces say of ids that name no expert, of how an id was changed before it was used, and of how many a token has
OF_IDS = frozenset({
    "last_expert", "lowest_expert", "num_compared", "num_classes", "num_experts", "counts_beyond", "rows_skipped",
    "indexed", "looked_up",
})  # fmt: skip


#: of ids that are broadcast to the tokens: chosen by scores, or by whoever calls the model
CHOSEN = "chosen for several tokens at once: expand the ids to all tokens, before experts are compared with them"
GIVEN_IDS = (
    "given for several tokens at once, such as a whole sequence or image: adapters that the caller names, which are no "
    "MoE layer, as no router chooses them"
)


@dataclass
class Region:
    """A layer, found: the operands of its ``experts`` node, and the nodes it replaces.

    ``interior`` are the values that exist only inside the layer; ``bindings`` what the pieces captured; ``distinct``
    says that the layer means the equation only if a token's ids differ. ``step`` is the last node of a loop's first
    step, where the layer is one. A parameter that the model holds as one per expert is a tuple of these. ``size`` is
    how many tokens there are, and slots for each. ``features`` are the sizes that a row of tokens and slots has, which
    need not stand as ``[T, ...]`` and ``[T, K, ...]`` in the program; ``views`` are written to make them so. Slots
    among ``tables [T, E]`` are looked up by ids. The experts' sum is added to ``base``, if there is one. ``visits``
    are the experts whose rows were joined, where they were cut apart. Some tables are certainly ``not_negative``. Some
    slots are numbers for ``each_token``, the same in all of its slots; some are ``summed`` over those slots that name
    one expert, and the result ``adds_up`` to the equation's if it is what an expert makes, times this sum. Experts
    without parameters, which are none of the layer's, stand ``alone`` behind it: their numbers and steps.
    """

    root: Node
    form: str
    tokens: Node
    ids: Node
    slots: list[Node]
    params: list[Node | tuple[Node, ...]]
    shared: list[Node]
    body: GraphModule
    interior: set[Node]
    bindings: dict[str, Any]
    distinct: bool = False
    step: Node | None = None
    size: tuple[Dim, Dim] = (0, 0)
    features: dict[Node, tuple[int, ...]] = field(default_factory=dict)
    views: list[Node] = field(default_factory=list)
    tables: set[Node] = field(default_factory=set)
    base: Node | None = None
    visits: list[tuple[int, ...]] = field(default_factory=list)
    not_negative: set[Node] = field(default_factory=set)
    alone: list[tuple[int, Region]] = field(default_factory=list)
    each_token: set[Node] = field(default_factory=set)
    summed: bool = False
    adds_up: bool = False

    @property
    def num_experts(self) -> int:
        counts = [experts_of(param) for param in self.params]
        # A loop that visits no more of them reads nothing else of a longer parameter.
        experts = min(counts) if self.visits else counts[0]
        assert isinstance(experts, int)
        return experts

    @property
    def ids_per_token(self) -> Dim:
        shape = shape_of(self.ids)
        assert shape is not None
        apart = len(shape_of(self.tokens) or ()) - len(self.features.get(self.tokens, ()))
        # One expert per token needs no dimension; batch and sequence may stand apart in the ids only.
        alone = known_equal(self.size[1], 1) and (len(shape) == apart or chosen_once(self.ids))
        return 1 if len(shape) == 1 or alone else shape[-1]

    @property
    def top_k(self) -> int:
        top_k = self.ids_per_token
        assert isinstance(top_k, int)
        return top_k

    @property
    def sorts_away(self) -> bool:
        """Whether rows of ids that name no expert are sorted behind all groups, or set to zero."""
        grouped = "sort_grouped_mm" in self.form.split("+") or "rows_masked" in self.bindings
        return "perm" in self.bindings and grouped

    @property
    def inputs(self) -> list[Node]:
        params = [node for param in self.params for node in (param if isinstance(param, tuple) else (param,))]
        return [self.tokens, self.ids, *self.slots, *params, *self.shared]


def experts_of(param: Node | tuple[Node, ...]) -> Dim:
    """Of how many experts a parameter is."""
    return len(param) if isinstance(param, tuple) else (shape_of(param) or (0,))[0]


def told_of_ids(bindings: Mapping[str, Any]) -> dict[str, Any]:
    """What was captured that says what becomes of an id; of nodes, only that there is one."""
    return {name: bindings[name] for name in OF_IDS & bindings.keys()}


def read_outside(
    interior: Collection[Node],
    ends: Collection[Node],
    own: Collection[Node] | None = None,
    operands: Iterable[Node] = (),
) -> Miss | None:
    """A value that exists only inside a layer, and is read elsewhere than in it and by its ``ends``.

    ``own``: which of them a layer computes anew; others, such as where an expert has rows, may stay beside it, unless
    the layer's ``operands`` are made of them: what an expert makes of its rows would then depend on all of them.
    """

    def serves(user: Node) -> bool:
        if user in interior or user in ends or only_asserted(user):
            return True
        # Some ask for a size, on behalf of these.
        return bool(user.users) and reads_shapes(user) and all(serves(reader) for reader in user.users)

    beside: Node | None = None
    for node in interior:
        for user in node.users:
            if serves(user):
                continue
            if own is None or node in own:
                return _read_by(node, user)
            beside = node
    if beside is None or not _are_made_of(interior, operands):
        return None
    return _read_by(beside, next(user for user in beside.users if not serves(user)))


def _read_by(node: Node, user: Node) -> Miss:
    wanted = f"{node.name} to be read inside the layer only"
    return Miss(wanted, f"{user.name} ({op_name(user) or user.op})", node, depth=10**6)


def _are_made_of(interior: Collection[Node], operands: Iterable[Node]) -> bool:
    seen, pending = set[Node](), [node for node in operands if node not in interior]
    while pending:
        node = pending.pop()
        if node in interior:
            return True
        if node not in seen:
            seen.add(node)
            pending += node.all_input_nodes
    return False


def computed_with(fed: Iterable[Node], interior: Collection[Node]) -> set[Node]:
    """What of a layer's interior is computed with parameters, or with anything else that all rows share (``fed``)."""
    fed, computed = set(fed), set()
    for node in sorted(interior):
        if node in fed or any(each in fed or _is_of_parameters(each) for each in node.all_input_nodes):
            fed.add(node)
            computed.add(node)
    return computed


def _is_of_parameters(value: Node, most: int = 4) -> bool:
    """Whether a value is parameters, or a view of some; ``most`` calls are looked through."""
    if value.op in ("placeholder", "get_attr"):
        return GIVEN not in value.meta and tensor_of(value) is not None
    inputs = value.all_input_nodes
    return most > 0 and bool(inputs) and all(_is_of_parameters(each, most - 1) for each in inputs)


def read_beside(region: Region, ends: Collection[Node]) -> Miss | None:
    """As :func:`read_outside`, of a layer that was put together of several."""
    params = [each for param in region.params for each in (param if isinstance(param, tuple) else (param,))]
    operands = (region.tokens, *region.slots, *params, *region.shared)
    return read_outside(region.interior, ends, computed_with(region.shared, region.interior), operands)


def misfit(region: Region) -> Miss | None:
    """The side conditions: sizes that must be equal for the equation to hold. What is wrong, or None."""
    found = region.bindings
    num_tokens, top_k = region.size
    tokens, ids = region.tokens, region.ids

    def miss(wanted: str, node: Node, text: str) -> Miss:
        return Miss(wanted, text, node, dict(found), depth=10**6)

    def size(node: Node, dim: int = 0) -> Dim:
        return (shape_of(node) or (0,))[dim]

    if (value := tensor_of(ids)) is not None and value.is_floating_point():
        return miss("ids that are whole numbers", ids, f"{ids.name} of {value.dtype}")
    if {"perm", "listed_once"} <= found.keys():  # of the rows of one expert, each has another first
        return miss(
            "rows in one order", found["perm"], f"{found['perm'].name} beside that of {found['listed_once'].name}"
        )
    for wanted, node, expected in (
        (f"expert ids for each of {num_tokens} x {top_k} slots", ids, num_tokens * top_k),
        (f"{num_tokens} token rows", tokens, num_tokens * math.prod(region.features.get(tokens, ()))),
    ):
        total: Dim = 1
        for each in shape_of(node) or (0,):
            total = total * each
        if not known_equal(total, expected):
            shape = f"shape {list(shape_of(node) or ())}"
            if node is ids and known_equal(top_k, 1) and any(known_equal(each, 1) for each in shape_of(ids) or ()):
                chosen = selection_of(ids, 0).chooser is not None
                shape = f"{ids.name} of {shape}, {CHOSEN if chosen else GIVEN_IDS}"
            return miss(wanted, node, shape)
    if not isinstance(region.ids_per_token, int):
        return miss("a fixed number of experts for each token", ids, f"{region.ids_per_token}")
    if not known_equal(region.ids_per_token, top_k):
        return miss(f"ids of {top_k} experts for each token", ids, f"{ids.name} of {region.ids_per_token}")
    taken = found.get("num_tokens", num_tokens)
    if not known_equal(taken.meta["val"] if isinstance(taken, Node) else taken, num_tokens):
        return miss(f"rows of {num_tokens} tokens, slot after slot", tokens, f"of {taken}")
    if found.get("top_k", top_k) != top_k:
        return miss(f"{top_k} rows for each token", tokens, f"{found['top_k']}")
    if not region.params:
        same = "none: all experts hold the same" if region.shared else "none"
        return miss("parameters that differ from expert to expert", region.root, same)
    counts = [experts_of(param) for param in region.params]
    fixed = all(isinstance(count, int) for count in counts)
    experts = min(counts) if fixed and region.visits else counts[0]
    # Of those that a loop never comes to, a longer parameter may hold something.
    longer = fixed and bool(region.visits)
    longer = longer and all(max(visited) < experts or len(visited) == experts for visited in region.visits)
    for param, count in zip(region.params, counts, strict=True):
        if not isinstance(experts, int) or not (known_equal(count, experts) or longer):
            shown = param[0] if isinstance(param, tuple) else param
            return miss(f"parameters of {experts} experts", shown, f"{count} experts")
    for classes in (found.get("num_classes", experts), found.get("num_compared", experts)):
        if classes < experts:
            return miss(f"a class for each of {experts} experts", ids, f"{classes} classes")
    if found.get("num_experts", experts) != experts:
        return miss(f"rows counted for {experts} experts", ids, f"for {found['num_experts']}: an expert is missing")
    if found.get("num_copies", experts) != experts:
        return miss(f"every token once for each of {experts} experts", tokens, f"{found['num_copies']} times as many")
    last = found.get("last_expert", experts - 1)
    if last != experts - 1:
        return miss(f"ids up to {experts - 1}", ids, f"ids clamped to {last}: an expert is missing")
    return None
