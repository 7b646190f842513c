"""Where a layer with one expert per token ends, which sums nothing: behind its last product, and its bias.

h = torch.bmm(x[:, None], up[ids])
y = torch.bmm(act(h), down[ids]).squeeze(1) + bias[ids]      # here
return y * s                                                 # the routing weight may as well follow

ys = torch.stack([expert(x) for expert in experts], 1)
return ys[torch.arange(T), ids] * s                          # or where a token's expert is chosen of all results
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from moe_fx.passes.raising.anchors import leads_to_experts, reads_chosen_stack
from moe_fx.passes.raising.contraction import contraction
from moe_fx.passes.raising.routing import CHOOSING
from moe_fx.passes.raising.through import is_elementwise, is_view
from torch.fx import Graph, Node

from moe_fx.matcher import arguments, op_name
from moe_fx.shapes import shape_of

__all__ = ["ends_of_one_slot"]

#: ops that make scores of scores, and how far a choice by them is looked for
SCORES, NEAR = frozenset({"aten::softmax", "aten::log_softmax", "aten::layer_norm"}), 20


def ends_of_one_slot(graph: Graph, covered: Collection[Node]) -> Iterator[Node]:
    """Values in which a layer may end that nobody sums, the last first."""
    seen: set[Node] = set()
    for node in reversed(graph.nodes):
        if node in seen or node in covered or node.op != "call_function":
            continue
        found = contraction(node)
        product = found is not None and any(reads_chosen_stack(operand) for operand in found.operands)
        if not product and not _chooses_result(node):
            continue
        seen |= _behind(node)
        yield _end(node)


def _chooses_result(node: Node) -> bool:
    """Whether a value is read from several results: a stack of them, or what all experts' stacked parameters make."""
    stack: Any = node.args[0] if op_name(node) in ("aten::index", "aten::gather", "aten::take_along_dim") else None
    if not isinstance(stack, Node) or stack.op != "call_function":
        return False
    results = arguments(stack)["tensors"] if op_name(stack) == "aten::stack" else []
    computed = len(results) > 1 and all(
        each.op == "call_function" and len(shape_of(each) or ()) > 1 for each in results
    )
    computed |= not results and len(shape_of(stack) or ()) > 2 and leads_to_experts(stack)
    return computed and not _is_chosen_by(node)


def _is_chosen_by(node: Node) -> bool:
    """Whether a value is scores, by which the next choice is made: of two levels, the second router."""
    seen, pending = set[Node](), [node]
    while pending and len(seen) < NEAR:
        current = pending.pop()
        seen.add(current)
        if op_name(current) in CHOOSING:
            return True
        if current is node or is_view(current) or is_elementwise(current) or op_name(current) in SCORES:
            pending.extend(user for user in current.users if user not in seen)
    return False


def _end(product: Node) -> Node:
    """The last of the ops behind a product that reads a parameter of the chosen expert."""
    end = node = product
    while len(node.users) == 1:
        (user,) = node.users
        if not is_view(user) and not is_elementwise(user):
            break
        with_bias = any(other is not node and reads_chosen_stack(other) for other in user.all_input_nodes)
        if with_bias or (is_view(user) and end is node):
            end = user
        node = user
    return end


def _behind(node: Node) -> set[Node]:
    """What a product is computed from, the layer's own products among it."""
    seen: set[Node] = set()
    pending = [node]
    while pending and len(seen) < 400:
        current = pending.pop()
        if current not in seen and current.op == "call_function" and op_name(current) != "aten::topk":
            seen.add(current)
            pending.extend(current.all_input_nodes)
    return seen
