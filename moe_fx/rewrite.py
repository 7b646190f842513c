"""The only code that edits graphs: insert a call, put one value in another's place, erase what became dead."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from moe_fx.constants import is_zero, moved
from moe_fx.experts import experts
from moe_fx.matcher import op_name
from moe_fx.shapes import same_shape, shape_of

__all__ = [
    "EXPERTS_FIRST", "GIVEN", "Emitter", "FakeValues", "Outline", "after", "drop_dead_code", "erase_dead",
    "only_asserted", "outline", "replace", "respell", "same_graph",
]  # fmt: skip

#: marks what an expert without parameters adds to a layer's result, with its number
WITHOUT_PARAMETERS = "moe_fx_without_parameters"

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


@dataclass(frozen=True)
class Outline:
    """What a graph computes, as numbers that equal graphs share: what it yields and writes, asserts, and each node."""

    yielded: list[int]
    asserted: set[int]
    numbers: dict[Node, int]


def outline(
    graph: Graph,
    constants: Mapping[Node, torch.Tensor],
    weights: Collection[int] | None = None,
    idle: Callable[[int], bool] = lambda expert: False,
) -> Outline:
    """What a graph computes, to be compared with others.

    The layers raised count as zeros.

    Args:
        graph: without dead code. constants: the values of those placeholders that are constants.
        weights: where a layer is compared with what is left of one without rows, the numbers of its routing weights:
            zeros times these, times plain numbers, and sums of them, are zeros, and what zeros are added to is itself.
        idle: which of the experts without parameters have no rows, and add nothing.
    """
    zeros: set[Node] = set()
    numbers: dict[Node, int] = {}
    yielded: list[int] = []
    asserted: set[int] = set()
    same: dict[Node, Node] = {}
    for node in graph.nodes:
        value, alone = node.meta.get("val"), node.meta.get(WITHOUT_PARAMETERS)
        if alone is not None and idle(alone):
            numbers[node] = numbers[node.args[0]]
            zeros |= {node} if node.args[0] in zeros else set()
            continue
        base = _added_zeros(node, zeros) if weights is not None else None
        if base is None and weights is not None and op_name(node) == "aten::reshape":
            # In its own shape again, what was reshaped for a layer is what it was.
            same[node] = same.get(node.args[0], node.args[0])
            base = same[node] if same_shape(shape_of(same[node]) or (), shape_of(node) or ("",)) else None
        if base is not None:
            numbers[node], same[node] = numbers[base], same.get(base, base)
            zeros |= {node} if base in zeros else set()
            continue
        if _is_left_of_layer(node, zeros, numbers, weights):
            zeros.add(node)
        if node in zeros or moved(node) in zeros:
            assert isinstance(value, torch.Tensor)
            key: Any = ("zeros", value.dtype, value.dim())
        elif node in constants:
            key = ("constant", constants[node].dtype, str(constants[node].tolist()))
        elif node.op in ("placeholder", "get_attr"):
            key = (node.op, node.target, _code(node))
        else:
            # What an assertion says to a reader names a node.
            args = node.args[:1] if op_name(node) in ASSERTS else (node.args, node.kwargs)
            key = (node.target, str(map_arg(args, lambda n: f"%{numbers[n]}")))
        numbers[node] = _NUMBERS.setdefault(key, len(_NUMBERS))
        if op_name(node) in ASSERTS:
            asserted.add(numbers[node])
        elif node.op == "output" or (node.op == "call_function" and not is_pure(node)):
            yielded.append(numbers[node])
    return Outline(yielded, asserted, numbers)


def _code(node: Node) -> str:
    """What a graph that another one calls does, such as a branch of ``torch.cond``; empty for anything else."""
    owner = node.graph.owning_module
    module = getattr(owner, str(node.target), None) if owner is not None and node.op == "get_attr" else None
    if not isinstance(module, GraphModule):
        return ""
    inner = module.graph.find_nodes(op="get_attr")
    return "\n".join([str(module.code), *map(_code, inner)])


def _added_zeros(node: Node, zeros: Collection[Node]) -> Node | None:
    """What a layer that counts as zeros is added to, such as the residual; None for any other value."""
    value = node.meta.get("val")
    if op_name(node) != "aten::add" or node.kwargs or len(node.args) != 2:
        return None
    for added, base in (node.args, node.args[::-1]):
        if isinstance(added, Node) and isinstance(base, Node) and moved(added) in zeros:
            before = base.meta.get("val")
            alike = isinstance(before, torch.Tensor) and isinstance(value, torch.Tensor) and before.dtype == value.dtype
            if alike and same_shape(before.shape, value.shape):
                return base
    return None


def _is_left_of_layer(
    node: Node, zeros: Collection[Node], numbers: Mapping[Node, int], weights: Collection[int] | None
) -> bool:
    if node.target is experts or (isinstance(node.meta.get("val"), torch.Tensor) and is_zero(node)):
        return True
    if weights is None:
        return False
    if op_name(node) in ("aten::empty", "aten::empty_like", "aten::new_empty"):
        return True  # nobody knows what stands where no row was written
    if op_name(node) in ("aten::stack", "aten::gather", "aten::index", "aten::take_along_dim"):
        source = node.args[0]  # the places that are read of zeros are no matter
        return all(each in zeros for each in (source if isinstance(source, list | tuple) else [source]))
    if op_name(node) == "aten::linear" and len(node.args) == 2:
        # One of the model's own, such as that behind a latent layer: with some experts idle, it is compared.
        return (
            node.args[0] in zeros and isinstance(node.args[1], Node) and node.args[1].op in ("placeholder", "get_attr")
        )
    if op_name(node) not in ("aten::mul", "aten::sum", "aten::einsum", "aten::bmm", "aten::matmul"):
        return False
    if any(isinstance(factor, float) and not math.isfinite(factor) for factor in node.args):
        return False
    factors = [moved(factor) for factor in node.all_input_nodes]
    others = [factor for factor in factors if factor not in zeros]
    return len(others) < len(factors) and all(_is_weight(factor, numbers, weights) for factor in others)


def _is_weight(factor: Node, numbers: Mapping[Node, int], weights: Collection[int]) -> bool:
    """Whether a factor is a routing weight, some of these, or a table that holds some of them and zeros."""
    while numbers[factor] not in weights:
        if op_name(factor) in ("aten::select", "aten::slice"):
            source = factor.args[0]
        elif op_name(factor) == "aten::scatter" and is_zero(factor.args[0]):
            source = factor.args[3]
        else:
            return False
        if not isinstance(source, Node):
            return False
        factor = moved(source)
    return True


#: numbers given to what a node computes, for the time of a process
_NUMBERS: dict[Any, int] = {}


def same_graph(one: Graph, other: Graph) -> bool:
    """Whether two graphs make the same calls in the same order on the same values."""
    twin: dict[Node, Node] = {}
    if len(one.nodes) != len(other.nodes):
        return False
    for mine, theirs in zip(one.nodes, other.nodes, strict=True):
        twin[mine] = theirs
        expected = map_arg((mine.args, mine.kwargs), twin.__getitem__)
        if (mine.op, mine.target, expected) != (theirs.op, theirs.target, (theirs.args, theirs.kwargs)):
            return False
        if _code(mine) != _code(theirs):
            return False
    return True
