"""Anchors: calls that only an MoE layer contains. Where one is left over, a layer was nearly found."""

from __future__ import annotations

import operator

from moe_fx.passes.raising.ancestors import MIXING, ancestors
from moe_fx.passes.raising.contraction import contraction
from moe_fx.passes.raising.routing import CHOOSING
from moe_fx.passes.raising.where_chains import is_where_chain
from torch.fx import Node

from moe_fx.constants import reads_shapes
from moe_fx.matcher import arguments, is_pointwise, op_name
from moe_fx.report import module_of
from moe_fx.rewrite import GIVEN
from moe_fx.shapes import depends_on_values, known_equal, shape_of

__all__ = [
    "anchors_behind",
    "anchors_near",
    "is_anchor",
    "is_cut_linear",
    "leads_to_experts",
    "reads_chosen_stack",
    "reads_stack",
]

#: ops by which the scores of some experts come to differ from those of all others
SETTING_APART = frozenset({"aten::scatter", "aten::one_hot", "aten::masked_fill", "aten::index_put", "aten::where"})

GROUPED = frozenset({"aten::_grouped_mm", "transformers::grouped_mm_fallback", "moe_fx::grouped_mm"})
MATRIX_PRODUCTS = frozenset({"aten::bmm", "aten::baddbmm", "aten::matmul", "aten::einsum"})
PRODUCTS = MATRIX_PRODUCTS | {"aten::mul"}
#: what leaves one number of a token's scores
NUMBERS = frozenset({"aten::sum", "aten::amax", "aten::argmax", "aten::max", "aten::gather", "aten::select"})
#: casts and views, after which numbers are numbers
MOVING = frozenset({
    "aten::to", "aten::clone", "aten::unsqueeze", "aten::squeeze", "aten::reshape", "aten::permute", "aten::transpose",
})  # fmt: skip
#: views and casts through which a weight is read
STEPS = frozenset({
    "aten::index", "aten::transpose", "aten::permute", "aten::to", "aten::reshape", "aten::unsqueeze", "aten::expand",
    "aten::select", "aten::clone",
})  # fmt: skip


def is_anchor(node: Node, chosen: bool = True) -> bool:
    """Whether a call multiplies with weights that are stacked over experts and chosen by row.

    Not ``chosen``: all experts on all rows, which other layers do too (heads, blocks, adapters).
    """
    name = op_name(node)
    if name in ("aten::bmm", "aten::matmul"):
        return any(_stacked_weight(arg, gathered=chosen) for arg in node.args)
    grouped = name in ("aten::_grouped_mm", "transformers::grouped_mm_fallback", "moe_fx::grouped_mm")
    return grouped and any(_stacked_weight(arg, gathered=False) for arg in node.args)


def _stacked_weight(node: object, gathered: bool) -> bool:
    steps = set()
    while isinstance(node, Node) and op_name(node) in ("aten::index", "aten::transpose", "aten::to"):
        steps.add(op_name(node))
        node = node.args[0]
    if gathered and "aten::index" not in steps:
        return False
    shape = shape_of(node)
    return isinstance(node, Node) and node.op in ("placeholder", "get_attr") and shape is not None and len(shape) == 3


def anchors_behind(value: Node, chosen: bool = True) -> set[Node]:
    """Multiplications with stacked weights that a value is computed by, a layer's depth back.

    Not ``chosen``: only if something between the token's linears and the value sets scores of some experts apart.
    """
    if not chosen and not any(op_name(node) in SETTING_APART for node in ancestors(value, through=("aten::bmm",))):
        return set()
    seen: set[Node] = set()
    pending = [value]
    anchors = set()
    while pending and len(seen) < 400:
        node = pending.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if is_anchor(node, chosen):
            anchors.add(node)
        pending.extend(node.all_input_nodes)
    return anchors


def anchors_near(node: Node) -> set[Node]:
    """Further multiplications of the same module: one miss speaks for all of them."""
    module = module_of(node)
    return {other for other in node.graph.nodes if is_anchor(other) and module_of(other) == module}


def leads_to_experts(value: Node, through: bool = False) -> bool:
    """Whether a value is computed by multiplying with weights that are stacked over experts, or with stacked results.

    What lies behind other products, such as a router's, or a choice, is not looked at; ``through`` looks behind the
    first.
    """
    seen: set[Node] = set()
    pending = list(value.all_input_nodes) if through else [value]
    while pending and len(seen) < 400:
        node = pending.pop()
        if node in seen or node.op != "call_function" or reads_shapes(node):
            continue
        seen.add(node)
        name = op_name(node)
        if name is None and node.target is not operator.getitem:
            continue
        if (
            name in GROUPED
            or (_stacks(node) and not all(map(_is_number, arguments(node)["tensors"])))
            or _joins_parts(node)
            or is_where_chain(node)
            or (name == "aten::index" and (_is_stack(node.args[0]) or _is_cut_in_stack(node.args[0])))
        ):
            return True
        if name in PRODUCTS and any(reads_stack(operand) for operand in node.all_input_nodes):
            return True
        # An expert of one neuron is a row; what rows chose is multiplied alone where it is an embedding.
        if name in MATRIX_PRODUCTS and any(reads_chosen_stack(operand) for operand in node.all_input_nodes):
            return True
        if name not in MIXING and name not in CHOOSING:
            pending.extend(node.all_input_nodes)
    return False


def is_cut_linear(value: Node) -> bool:
    """Whether a value is what one linear makes of every token, cut by a further dimension: perhaps by expert."""
    cut, node = False, value
    for _ in range(12):
        if op_name(node) in ("aten::linear", "aten::addmm", "aten::mm", "aten::matmul"):
            return cut
        cut |= op_name(node) == "aten::reshape" and len(shape_of(node) or ()) > len(shape_of(node.args[0]) or ())
        views = ("aten::reshape", "aten::to", "aten::split_with_sizes", "aten::slice")
        passes = is_pointwise(node.target) or op_name(node) in views or node.target is operator.getitem
        if not passes or not isinstance(node.args[0], Node):
            return False
        node = node.args[0]
    return False


def _stacks(node: Node) -> bool:
    """Whether tensors are stacked, or joined along a dimension in which each is one wide."""
    if op_name(node) != "aten::cat":
        return op_name(node) == "aten::stack"
    dim, parts = arguments(node)["dim"], arguments(node)["tensors"]
    return len(parts) > 1 and all(
        len(shape_of(part) or ()) > 2 and known_equal(shape_of(part)[dim], 1) for part in parts
    )


def _is_number(value: object, depth: int = 0) -> bool:
    """Whether a value is a number for each token: something over all features, or experts, and ops on such numbers."""
    if not isinstance(value, Node) or value.op != "call_function" or depth > 12:
        return not isinstance(value, Node)
    made_by = value.args[0] if value.target is operator.getitem else value
    if op_name(made_by) in NUMBERS:
        return True
    if _is_inner_product(made_by):
        return True
    steps = is_pointwise(value.target) or op_name(value) in MOVING
    return steps and all(_is_number(each, depth + 1) for each in value.all_input_nodes)


def _is_inner_product(node: object) -> bool:
    """Whether a value is the score of an expert that a one-hot row names, as ``se,se->s`` is, or a ``bmm`` of it."""
    found = contraction(node) if isinstance(node, Node) and op_name(node) in ("aten::einsum", "aten::bmm") else None
    if found is None or not found.summed or found.bias is not None:
        return False
    wide = [frozenset(each for each in letters if not known_equal(found.size(each), 1)) for letters in found.letters]
    return len(set(wide)) == 1


def _joins_parts(node: Node) -> bool:
    """Whether a value is made of parts, of which only values tell how many rows they have."""
    if op_name(node) == "aten::cat" and arguments(node)["dim"] == 0:
        parts = arguments(node)["tensors"]
    elif op_name(node) == "aten::slice_scatter" and arguments(node)["dim"] == 0:
        parts = [arguments(node)["src"]]
    elif op_name(node) == "aten::index_put":
        parts = [arguments(node)["values"]]
    else:
        return False
    return any(depends_on_values((shape_of(part) or (0,))[0]) for part in parts)


def _is_stack(node: object) -> bool:
    shape = shape_of(node)
    if op_name(node) == "aten::stack" and isinstance(node, Node):
        parts = arguments(node)["tensors"]
        return all(part.op in ("placeholder", "get_attr") and len(shape_of(part) or ()) > 1 for part in parts)
    if not isinstance(node, Node) or node.op not in ("placeholder", "get_attr") or shape is None or len(shape) < 3:
        return False
    # An input of any batch size, such as the one that a router multiplies, is no parameter.
    return GIVEN not in node.meta and all(isinstance(size, int) for size in shape)


def _is_cut_in_stack(node: object) -> bool:
    """Whether a value is one matrix of all experts' rows, with a dimension for the experts."""
    whole = node.args[0] if isinstance(node, Node) and op_name(node) == "aten::reshape" else None
    return isinstance(whole, Node) and whole.op in ("placeholder", "get_attr") and len(shape_of(node) or ()) >= 3


def reads_chosen_stack(node: Node) -> bool:
    """Whether an operand is what rows chose of parameters that are stacked over experts."""
    chosen = False
    while op_name(node) in STEPS and isinstance(node.args[0], Node):
        chosen |= op_name(node) == "aten::index"
        node = node.args[0]
    return chosen and node.op in ("placeholder", "get_attr") and len(shape_of(node) or ()) >= 2


def reads_stack(node: Node) -> bool:
    """Whether an operand is a stack of matrices, seen through views and casts."""
    while op_name(node) in STEPS and isinstance(node.args[0], Node):
        chosen = node.args[0] if op_name(node) == "aten::index" else node
        if _is_cut_in_stack(chosen):
            return True
        node = node.args[0]
    return _is_stack(node)
