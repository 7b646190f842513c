"""Choices among experts of which no layer came, and of which nothing was said yet: a miss must not be silent.

A choice (a ``topk``, an ``argmax``, ...) among E scores is taken for one of experts if, next to it, rows meet
parameters of E experts: a stack with a dimension of E, E matrices of one shape, or one linear whose results are cut
into E parts; or if a linear gave each token several scores, and what is chosen by them goes into a later product.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Sequence
from itertools import takewhile

from moe_fx.passes.raising import routing
from moe_fx.passes.raising.ancestors import MIXING, ancestors
from moe_fx.passes.raising.single_token import chosen_for_one_token, with_remedy
from torch.fx import Graph, Node

from moe_fx.experts import experts
from moe_fx.matcher import Miss, arguments, op_name
from moe_fx.shapes import depends_on_values, known_equal, shape_of, tensor_of

__all__ = ["choices_left"]

#: the scores of a choice may also be compared with the last that passes
CHOOSING = routing.CHOOSING | {"aten::kthvalue"}
PRODUCTS = frozenset({
    "aten::linear", "aten::mm", "aten::addmm", "aten::matmul", "aten::bmm", "aten::baddbmm", "aten::einsum",
    "aten::mul", "aten::conv1d", "aten::conv2d", "aten::convolution", "aten::bilinear", "aten::_trilinear",
})  # fmt: skip
#: what a parameter is read through
READ = frozenset({
    "aten::index", "aten::index_select", "aten::select", "aten::slice", "aten::transpose", "aten::permute", "aten::to",
    "aten::reshape", "aten::unsqueeze", "aten::squeeze", "aten::expand", "aten::clone", "aten::gather", "aten::unbind",
    "aten::split_with_sizes", "aten::repeat",
})  # fmt: skip
#: what of that gives sizes of its own, such as those of the tokens whose ids it is read by
PICKED = frozenset({"aten::index", "aten::index_select", "aten::gather", "aten::expand", "aten::repeat"})
#: what is made of several parameters, of which one is looked at
JOINED = frozenset({"aten::stack", "aten::cat", "aten::block_diag"})
VIEWS = frozenset({"aten::reshape", "aten::unflatten"})
CUTS = frozenset({"aten::split_with_sizes", "aten::split", "aten::chunk"})

STEPS = frozenset({"aten::to", "aten::softmax", "aten::sigmoid", "aten::clone", "aten::mul", "aten::add"})
TURNS = frozenset({"aten::transpose", "aten::permute", "aten::select"})
MASKING = frozenset({"aten::mul", "aten::where", "aten::masked_fill"})
TESTS = frozenset({"aten::bitwise_not", "aten::logical_not", "aten::gt", "aten::ne"})
#: how deep a walk must have come for its mismatch to say more than that tokens are dropped
FAR = 10**5

WANTED = "a sum over each token's slots, or over all experts, of what the experts make of it"


def choices_left(graph: Graph, told: Collection[Node], near: Sequence[tuple[Miss, Node]]) -> Iterator[Miss]:
    """A reason for each choice without a layer.

    ``told`` are nodes of which the report speaks already, ``near`` the mismatches that it does not, each with the node
    from which it was looked for: the deepest is the reason.
    """
    known: set[Node] = set()
    for layer in graph.find_nodes(op="call_function", target=experts):
        known.update(each for node in layer.all_input_nodes for each in ancestors(node))
    known.update(each for root in told for node in root.all_input_nodes for each in ancestors(node))
    order = {node: place for place, node in enumerate(graph.nodes)}
    choices = _choices(graph)
    for place, group in enumerate(choices):
        if known.intersection(group):
            continue
        # The experts may have been computed before one is chosen.
        start = order[choices[place - 1][-1]] if place else -1
        end = order[choices[place + 1][0]] if place + 1 < len(choices) else len(order)
        window = [node for node, at in order.items() if start < at < end]
        if any(node in told for node in window) or not (
            any(_meet_experts(window, count) for count in _counts(group)) or _routes(group, window)
        ):
            continue
        within = [(miss, root) for miss, root in near if start < order.get(root, -1) < end]
        reason = max((miss for miss, _ in within), key=lambda miss: miss.depth, default=None)
        # Of one token, an expert gets one row at most.
        limited = (reason is None or reason.depth < FAR) and not chosen_for_one_token(group[-1])
        far = reason is not None and reason.depth >= FAR
        by_slot = None if far else _masked_by_slot(window, group)
        reasons = (_limit(window) if limited else None, by_slot, reason, _chosen_by_experts(group), _no_sum(group[-1]))
        yield with_remedy(next(miss for miss in reasons if miss is not None), group[-1])


def _no_sum(choice: Node) -> Miss:
    found = (
        f"{choice.name}, of whose choice no such sum is made, or in a way that no rule knows (moe_fx.register adds one)"
    )
    return Miss(WANTED, found, choice)


def _limit(window: Sequence[Node]) -> Miss | None:
    """Where an expert takes no more than some number of rows, if it shows."""
    for node in window:
        name, given = op_name(node), arguments(node) if op_name(node) in ("aten::lt", "aten::le", "aten::slice") else {}
        if name in ("aten::lt", "aten::le") and isinstance(given["other"], int) and _counts_rows(given["self"]):
            found = f"{node.name}: tokens can be dropped, as ranks are held to {given['other']}"
        elif (
            name == "aten::slice" and given["dim"] == 0 and isinstance(given["end"], int) and _some_rows(given["self"])
        ):
            found = f"{node.name}: tokens can be dropped, as it takes {given['end']} rows of an expert at most"
        else:
            continue
        return Miss("every row that an expert can get", found, node)
    return None


def _masked_by_slot(window: Sequence[Node], group: Sequence[Node]) -> Miss | None:
    """Where the results of all experts are masked by one-hot rows of every slot, and not summed over experts first."""
    for node in window:
        shape = shape_of(node) or ()
        if op_name(node) not in ("aten::one_hot", "aten::eq") or len(shape) < 3 or known_equal(shape[-2], 1):
            continue
        if not isinstance(shape[-1], int) or shape[-1] not in _counts(group):
            continue
        if set(group).isdisjoint(ancestors(node)) or not _masks_results(node):
            continue
        wanted = "the results of the chosen experts, one for each slot, before they are weighed and summed"
        remedy = "choose first: torch.einsum('tke,teh->tkh', mask, results), or results.gather(1, ids)"
        return Miss(wanted, f"{node.name}, by which all experts' results are masked slot by slot; {remedy}", node)
    return None


def _masks_results(mask: Node) -> bool:
    """Whether a mask by slot and expert meets values that have features beside both."""
    pending, seen, rank = [mask], set[Node](), len(shape_of(mask) or ())
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        shape = shape_of(node) or ()
        if op_name(node) in MASKING and len(shape) > rank and not known_equal(shape[-1], 1):
            return True
        if node is mask or op_name(node) in (*MASKING, *STEPS, *READ, *TESTS):
            pending.extend(node.users)
    return False


def _counts_rows(value: object, depth: int = 8) -> bool:
    """Whether a value is a rank among the rows of an expert: something added up along the tokens."""
    if not isinstance(value, Node) or value.op != "call_function" or not depth:
        return False
    return op_name(value) == "aten::cumsum" or any(_counts_rows(each, depth - 1) for each in value.all_input_nodes)


def _some_rows(value: Node) -> bool:
    return depends_on_values((shape_of(value) or (0,))[0])


def _chosen_by_experts(group: Sequence[Node]) -> Miss | None:
    """Where an expert chooses its tokens: along a column of the scores, or along scores that are turned around."""
    for node in group:
        scores = node.args[0]
        while isinstance(scores, Node) and op_name(scores) in (*STEPS, *TURNS):
            if op_name(scores) in TURNS and op_name(node) == "aten::topk":
                found = f"{node.name}, by which each expert chooses its tokens"
                return Miss("experts that are chosen for each token", found, node)
            scores = scores.args[0]
    return None


def _choices(graph: Graph) -> list[list[Node]]:
    """Ops that choose by score; those made of another's choice, or with no product between them, belong together."""
    groups: list[list[Node]] = []
    between = True
    for node in graph.nodes:
        between |= op_name(node) in PRODUCTS and _parameter(node) is not None
        value = tensor_of(node.args[0]) if op_name(node) in CHOOSING and node.args else None
        if value is None or not value.is_floating_point() or arguments(node).get("dim", -1) is None:
            continue
        if _keeps_finite(node):
            continue
        if groups and (not between or set(groups[-1]).intersection(ancestors(node.args[0]))):
            groups[-1].append(node)
        else:
            groups.append([node])
        between = False
    return groups


def _keeps_finite(node: Node) -> bool:
    """Whether of a maximum only the value is used, taken from what an exponential is made of: no choice."""
    values = list(node.users) if op_name(node) == "aten::max" else []
    less = [user for value in values for user in value.users]
    return (
        bool(less)
        and all(value.target is operator.getitem and value.args[1] == 0 for value in values)
        and all(op_name(each) == "aten::sub" for each in less)
        and all(op_name(user) in ("aten::softmax", "aten::exp") for each in less for user in each.users)
    )


def _counts(group: Sequence[Node]) -> set[int]:
    """How many experts a choice may be among: of scores by token and expert, that of the experts is fixed."""
    sizes = (size for node in group for size in (shape_of(node.args[0]) or ())[-2:])
    return {size for size in sizes if isinstance(size, int) and size > 1}


def _routes(group: Sequence[Node], window: Sequence[Node]) -> bool:
    """Whether a linear gives each row several scores, and what is chosen by them goes into a later product."""
    behind = [each for node in group for each in ancestors(node) if op_name(each) in MIXING]
    if not any(_parameter(node) is not None and not known_equal((shape_of(node) or (1,))[-1], 1) for node in behind):
        return False
    chosen = set(group)
    for node in window:
        if not chosen.isdisjoint(node.all_input_nodes):
            chosen.add(node)
            if op_name(node) in PRODUCTS and _parameter(node) is not None:
                return True
    return False


def _parameter(product: Node) -> Node | None:
    """The parameter, or input, that is one of a product's factors."""
    return next(iter(_read(product)), None)


def _read(product: Node) -> list[Node]:
    """The parameter that is one of a product's factors, and what it is read through, from there on."""
    for operand in product.all_input_nodes:
        read = [operand]
        while read[0].all_input_nodes and (op_name(read[0]) in (*READ, *JOINED, None)):
            read.insert(0, read[0].all_input_nodes[0])
        shape = shape_of(read[0]) or ()
        if (
            read[0].op in ("placeholder", "get_attr")
            and len(shape) > 1
            and all(isinstance(each, int) for each in shape)
        ):
            return read
    return []


def _meet_experts(window: Sequence[Node], count: int) -> bool:
    """Whether rows meet parameters of as many experts."""
    # By shape, the parameter of every product: an expert that is held in several places has but one.
    alike: dict[tuple[object, ...], list[Node]] = {}
    for node in window:
        if op_name(node) not in PRODUCTS:
            continue
        if any(op_name(each) == "aten::stack" and len(each.args[0]) == count for each in _operands(node)):
            return True
        read = _read(node)
        if not read:
            continue
        whole = takewhile(lambda each: op_name(each) not in PICKED, read)
        shapes = [shape_of(each) or () for each in whole]
        if any(len(shape) > 2 and any(known_equal(size, count) for size in shape) for shape in shapes):
            return True
        alike.setdefault(tuple(shapes[0]), []).append(read[0])
        for user in node.users:
            inner = (shape_of(user) or ())[-2:] if op_name(user) in VIEWS else ()
            if any(known_equal(size, count) for size in inner) or (op_name(user) in CUTS and len(user.users) == count):
                return True
    return any(len(parameters) >= count and len(set(parameters)) > 1 for parameters in alike.values())


def _operands(product: Node) -> Iterator[Node]:
    """What is multiplied, and what that is a view of."""
    for operand in product.all_input_nodes:
        yield operand
        while op_name(operand) in READ and isinstance(operand.args[0], Node):
            operand = operand.args[0]
            yield operand
