"""The only code that edits graphs: insert a call, put one value in another's place, erase what became dead."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from moe_fx.matcher import op_name

__all__ = [
    "EXPERTS_FIRST", "GIVEN", "Emitter", "FakeValues", "after", "drop_dead_code", "erase_dead", "only_asserted",
    "replace", "respell",
]  # fmt: skip

#: what a new node tells about where it comes from
PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn")

#: marks, among the keys of a node's meta: a parameter written with its experts first; what a model is called with
EXPERTS_FIRST, GIVEN = "moe_fx_experts_first", "moe_fx_given"

#: what torch.export writes for numbers that depend on sizes
SIZE_CALLS = frozenset({"sym_max", "sym_min", "sym_not", "sym_ite", "sym_float", "sym_int", "sym_sum"})

ASSERTS = frozenset({"aten::_assert_tensor_metadata", "aten::_assert_async", "aten::_assert_scalar"})


class FakeValues:
    """The (fake) values of calls. Equal calls on operands of equal shape, dtype and device are evaluated once:
    the layers of a model are alike, and evaluating with symbolic sizes is what writing a call costs most."""

    def __init__(self, fake_mode: Any) -> None:
        self.fake_mode = fake_mode
        self._known: dict[Any, Any] = {}

    def of(self, node: Node) -> Any:
        key = (node.target, _signature(node.args), _signature(node.kwargs))
        if key not in self._known:
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            with self.fake_mode, torch.no_grad():
                self._known[key] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self._known[key]


def _signature(arg: Any) -> Any:
    """All that the fake value of a call can depend on in an argument, hashable."""
    if isinstance(arg, Node):
        arg = arg.meta["val"]
    if isinstance(arg, torch.Tensor):
        return (arg.dtype, arg.device, _signature(arg.shape), _signature(arg.stride()))
    if isinstance(arg, torch.SymInt | torch.SymFloat | torch.SymBool):
        return arg.node.expr
    if isinstance(arg, list | tuple):
        return (type(arg).__name__, *map(_signature, arg))
    if isinstance(arg, dict):
        return tuple((key, _signature(value)) for key, value in sorted(arg.items()))
    return (type(arg), arg)  # 1, 1.0 and True are equal, and mean different dtypes


class Emitter:
    """Writes calls before a node, each with its (fake) value, on behalf of the node it replaces."""

    def __init__(self, graph: Graph, before: Node, values: FakeValues) -> None:
        self.graph = graph
        self.before = before
        self.values = values
        self.provenance = {key: before.meta[key] for key in PROVENANCE if key in before.meta}
        self._recorded: list[Any] | None = None
        self._replayed: Iterator[Any] | None = None

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """``target(*args, **kwargs)`` as a node."""
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        node.meta.update(self.provenance)
        node.meta["val"] = self.values.of(node) if self._replayed is None else next(self._replayed)
        if self._recorded is not None:
            self._recorded.append(node.meta["val"])
        return node

    def repeat(self, count: int, write: Callable[[int], None]) -> None:
        """``write(i)`` for each i; every time writes the same ops on the same shapes, which are found out once."""
        for i in range(count):
            if i == 0:
                self._recorded = []
                write(0)
                recorded, self._recorded = self._recorded, None
            else:
                self._replayed = iter(recorded)
                write(i)
                self._replayed = None

    def inline(self, body: GraphModule, inputs: Iterable[Any], calls: Mapping[Any, Callable[..., Any]]) -> Any:
        """Write the nodes of ``body`` here, its placeholders bound to ``inputs``; its output is returned.

        ``calls`` maps targets of the body to functions of their arguments that write them differently.
        """
        given = iter(inputs)
        written: dict[Node, Any] = {}
        for node in body.graph.nodes:
            if node.op == "placeholder":
                written[node] = next(given)
            elif node.op == "output":
                return written[node.args[0]]
            else:
                args = map_arg(node.args, written.__getitem__)
                kwargs = map_arg(node.kwargs, written.__getitem__)
                write = calls.get(node.target, functools.partial(self, node.target))
                written[node] = write(*args, **kwargs)
        raise AssertionError("a body has an output")


def after(node: Node) -> Node:
    """Before which node a call on a value can stand: behind the value, and all inputs."""
    following = node.next
    while following.op == "placeholder":
        following = following.next
    return following


def respell(node: Node, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Call another op that yields the very same value."""
    node.target, node.args, node.kwargs = target, args, kwargs


def replace(old: Node, new: Node) -> None:
    """All users of ``old`` read ``new``; ``old`` stays for :func:`erase_dead` to find."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def drop_dead_code(graph: Graph) -> None:
    """Erase what nobody reads, and what only that reads; unlike torch.fx's own, never a call that may have effects."""
    for node in reversed(graph.nodes):
        if not node.users and is_pure(node):
            graph.erase_node(node)


def is_pure(node: Node) -> bool:
    """Whether a call may vanish when nobody reads it."""
    if node.op == "get_attr":
        return True
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return not node.target._schema.is_mutable and op_name(node) not in ASSERTS
    # Arithmetic on sizes, and our own. Of anything else nothing is known: torch.vmap is entered and left by calls.
    name, module = getattr(node.target, "__name__", ""), getattr(node.target, "__module__", None) or ""
    writes = module == "_operator" and name.startswith(("set", "del", "i"))
    return name in SIZE_CALLS or (module.split(".")[0] in ("_operator", "math", "moe_fx") and not writes)


def only_asserted(node: Node) -> bool:
    """Whether a node is an assertion, or is computed for assertions only, or for nothing."""
    waiting, seen = [node], set[Node]()
    while waiting:
        each = waiting.pop()
        if each not in seen and op_name(each) not in ASSERTS:
            if not is_pure(each):
                return False
            seen.add(each)
            waiting += each.users
    return True


def asserting(node: Node) -> list[Node]:
    """The assertions about a node and what is computed for them, users first."""
    found: list[Node] = []
    for user in node.users:
        found += [other for other in [*asserting(user), user] if other not in found]
    return found


def erase_dead(graph: Graph, starts: Iterable[Node]) -> None:
    """Erase those of ``starts`` that nobody reads, then what only they read, and so on.

    An assertion about a value does not keep it alive: it speaks of something that is no longer computed.
    """
    pending = list(starts)
    erased: set[Node] = set()
    while pending:
        node = pending.pop()
        if node in erased or not is_pure(node):
            continue
        if not all(only_asserted(user) for user in node.users):
            continue
        for user in asserting(node):
            if user not in erased:
                pending.extend(user.all_input_nodes)
                erased.add(user)
                graph.erase_node(user)
        pending.extend(node.all_input_nodes)
        erased.add(node)
        graph.erase_node(node)
