"""The router behind a layer's ids and weights: what they are computed from, and a line about it for the report."""

from __future__ import annotations

from moe_fx.passes.raising.ancestors import ancestors
from moe_fx.passes.raising.routing import CHOOSING, Selection
from torch.fx import Node

from moe_fx.matcher import arguments, op_name
from moe_fx.shapes import shape_of, tensor_of

__all__ = ["describe_router", "foreign_slot"]


def foreign_slot(slot: Node, ids: Node, selection: Selection) -> Node | None:
    """The op that chose a routing weight, if it is another one than chose the layer's ids."""
    if selection.chooser is None:
        return None
    mine = set(ancestors(ids))
    chosen = [node for node in ancestors(slot) if op_name(node) in CHOOSING]
    # Of the same scores, the largest and its place are one choice.
    scores = arguments(selection.chooser)["self"]
    if not chosen or any(node in mine or arguments(node)["self"] is scores for node in chosen):
        return None
    if ids in ancestors(slot):
        return None
    return chosen[0]


def describe_router(ids: Node, slots: list[Node], selection: Selection, fqn_of: dict[Node, str]) -> str:
    """One line on the router: scores, choice, what happens to the weights, and the weight's name."""
    if selection.chooser is None:
        return "ids are given" if ids.op == "placeholder" else "unknown choice"
    behind = list(ancestors(ids)) + [node for slot in slots for node in ancestors(slot)]
    names = [op_name(node) for node in behind]
    words = []
    scores = [word for word in ("softmax", "sigmoid", "softplus", "tanh") if f"aten::{word}" in names]
    if "aten::softmax" in names and selection.chooser is not None:
        after = not any(op_name(n) == "aten::softmax" for n in ancestors(selection.chooser))
        scores = [word + " after choice" if word == "softmax" and after else word for word in scores]
    words += scores or ["raw scores"]
    k = shape_of(ids)
    choice = (op_name(selection.chooser) or "").removeprefix("aten::")
    groups = sum(node is not selection.chooser and op_name(node) == "aten::topk" for node in set(behind))
    words.append(f"{choice} {k[-1] if k else '?'}" + (" within groups" if groups else ""))
    renormalized = any(
        op_name(node) in ("aten::div", "aten::div_") and _divides_by_sum(node)
        for slot in slots
        for node in ancestors(slot)
    )
    words += ["renormalised"] if renormalized else []
    scales = {arguments(n)["other"] for slot in slots for n in ancestors(slot)
              if op_name(n) == "aten::mul" and isinstance(arguments(n)["other"], float)}  # fmt: skip
    words += [f"times {scale:g}" for scale in sorted(scales)]
    weights = dict.fromkeys(fqn_of[n.args[1]] for n in behind
                            if op_name(n) == "aten::linear" and n.args[1] in fqn_of)  # fmt: skip
    dtypes = {str(value.dtype).removeprefix("torch.") for slot in slots if (value := tensor_of(slot)) is not None}
    words += sorted(dtypes)
    return ", ".join(words) + (f" of {', '.join(weights)}" if weights else "")


def _divides_by_sum(node: Node) -> bool:
    return (
        any(op_name(part) == "aten::sum" for part in ancestors(node.args[1], 8))
        if isinstance(node.args[1], Node)
        else False
    )
