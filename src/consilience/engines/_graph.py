"""Simplify the graph of a traced step: fewer operations, constants computed once, states updated in place.

A step of a small model takes as long as its operations take to start: with half as many it is twice as fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.shape_prop import ShapeProp

aten = torch.ops.aten
# The groups list operations that traced steps contain. One that is missing is left as it is: slow, not wrong.
SHAPES = {aten.expand.default, aten.view.default, aten._unsafe_view.default, aten.reshape.default}
VIEWS = {
    *SHAPES,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.select.int,
    aten.slice.Tensor,
    aten.t.default,
    aten.alias.default,
    aten.detach.default,
}
FILLS = {
    aten.ones_like.default: 1,
    aten.zeros_like.default: 0,
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
    aten.zeros.default: 0,
    aten.ones.default: 1,
    aten.new_full.default: None,
    aten.full_like.default: None,
    aten.full.default: None,
}
"""Operations that fill a tensor with one number (None: the last argument)."""
POINTWISE = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.mul.Scalar,
    aten.div.Scalar,
    aten.add.Scalar,
    aten.neg.default,
}
FEW = 1 << 16
"""Numbers up to which a constant is kept as a tensor."""


def simplify(graph: GraphModule, args: Sequence[Tensor], states: int) -> GraphModule:
    """Simplify a graph in place; it computes the same function up to rounding.

    The first `states` arguments may be changed in place, to what the graph returns for them.
    """
    # Each pass leaves something for the next: slices of constants, for example, are constants again.
    for simplified in (_fold_constants, _push_slices, _push_shapes, _fold_constants):
        ShapeProp(graph).propagate(*args)
        for node in list(graph.graph.nodes):
            same = _repeated(node)
            if same is not None:
                node.replace_all_uses_with(same)
        _merge_equal(graph)
        graph.graph.eliminate_dead_code()
        simplified(graph, args[0].device)
        graph.graph.eliminate_dead_code()

    ShapeProp(graph).propagate(*args)
    _merge_equal(graph)
    _fuse_bias(graph.graph)

    # Last, because no other pass may move an operation across one that writes into its argument.
    _update_in_place(graph.graph, states)
    graph.graph.eliminate_dead_code()
    _call_natively(graph.graph)
    graph.recompile()
    return graph


def _shape(node: Any) -> Any:
    meta = node.meta.get("tensor_meta") if isinstance(node, Node) else None
    return getattr(meta, "shape", None)


def _dtype(node: Node) -> Any:
    return getattr(node.meta.get("tensor_meta"), "dtype", None)


def _draws(target: Any) -> bool:
    """Whether an operation draws random numbers, so that two calls differ."""
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def _repeated(node: Node) -> Node | None:
    """Return the node whose value this one repeats, or None."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return None
    before = node.args[0]
    if node.target in SHAPES and _shape(node) is not None and _shape(node) == _shape(before):
        return before
    if node.target is aten.detach.default or (node.target is aten.mul.Scalar and node.args[1] == 1):
        return before

    # Two transpositions of the same dimensions cancel.
    transposes = node.target is aten.transpose.int and before.target is aten.transpose.int
    if transposes and node.args[1:] == before.args[1:]:
        return before.args[0]  # type: ignore[return-value]
    return None


# Constants


class Scaling(NamedTuple):
    """A node that is `factor` times `node`."""

    node: Node
    factor: float


class Constants:
    """The tensors of a graph that do not depend on its arguments."""

    def __init__(self, graph: GraphModule) -> None:
        self.graph = graph
        self.values: dict[Node, Tensor] = {}
        self.uniform: dict[Node, float] = {}
        """Those whose numbers are all equal, with that number."""
        for node in graph.graph.nodes:
            if node.op == "get_attr":
                self._add(node, getattr(graph, node.target))

    def _add(self, node: Node, value: Tensor) -> None:
        self.values[node] = value
        if value.numel() and value.is_floating_point() and bool((value == value.flatten()[0]).all()):
            self.uniform[node] = float(value.flatten()[0])

    def replace(self, node: Node, value: Tensor) -> None:
        """Put a constant in the place of a node."""
        name = f"_constant_{len(self.values)}_{node.name}"
        self.graph.register_buffer(name, value)
        with self.graph.graph.inserting_before(node):
            constant = self.graph.graph.get_attr(name)
        constant.meta = node.meta
        self._add(constant, value)
        node.replace_all_uses_with(constant)

    def computed(self, node: Node) -> Tensor:
        """Run a node whose arguments are all constants."""

        def value(arg: Any) -> Any:
            if isinstance(arg, list | tuple):
                return [value(entry) for entry in arg]
            return self.values.get(arg, arg) if isinstance(arg, Node) else arg

        target: Any = node.target
        options = {name: value(arg) for name, arg in node.kwargs.items()}
        result: Tensor = target(*map(value, node.args), **options)
        return result


def _fold_constants(graph: GraphModule, device: torch.device) -> None:
    """Compute nodes that depend on no argument; make products with one number scalings, and join those."""
    constants = Constants(graph)
    for node in list(graph.graph.nodes):
        target, meta = node.target, node.meta.get("tensor_meta")
        if node.op != "call_function" or not isinstance(getattr(meta, "dtype", None), torch.dtype):
            continue
        if _draws(target) or not str(target).startswith("aten."):
            continue

        # Large constants would take memory in every program.
        if target in FILLS and meta.shape.numel() <= FEW:
            number: Any = node.args[-1] if FILLS[target] is None else FILLS[target]
            constants.replace(node, torch.full(meta.shape, number, dtype=meta.dtype, device=device))
        elif all(each in constants.values for each in node.all_input_nodes) and meta.shape.numel() <= FEW:
            constants.replace(node, constants.computed(node))
        elif (scaling := _scaling(node, constants.uniform)) is not None:
            _scale(graph.graph, node, scaling)


def _scale(graph: Graph, node: Node, scaling: Scaling) -> None:
    """Replace a node by a scaling, joined with the scaling that its argument may be."""
    inner, factor = scaling
    if inner.target is aten.mul.Scalar and set(inner.users) == {node}:
        inner, factor = inner.args[0], inner.args[1] * factor  # type: ignore[assignment, operator]
    with graph.inserting_before(node):
        scaled = graph.call_function(aten.mul.Scalar, (inner, factor)) if factor != 1 else inner
    if scaled is not inner:
        scaled.meta = node.meta
    node.replace_all_uses_with(scaled)
    graph.erase_node(node)


def _scaling(node: Node, uniform: dict[Node, float]) -> Scaling | None:
    """Write a node as a scaling of another one of its shape and type, or None."""
    found = _factored(node, uniform)
    if found is None or _shape(found.node) != _shape(node):
        return None

    # A number is rounded to the type of the tensor that it meets, which must not change.
    dtype = found.node.meta["tensor_meta"].dtype
    return found if dtype == node.meta["tensor_meta"].dtype and dtype.is_floating_point else None


def _factored(node: Node, uniform: dict[Node, float]) -> Scaling | None:
    """Write a node as a number times one of its arguments, or None."""
    target, args = node.target, node.args

    def number(arg: Any) -> float | None:
        if isinstance(arg, Node):
            return uniform.get(arg)
        return float(arg) if isinstance(arg, float | int) else None

    # Where both arguments are numbers, the second pair wins.
    if target is aten.mul.Tensor:
        found = None
        for arg, other in ((args[0], args[1]), (args[1], args[0])):
            factor = number(other)
            if isinstance(arg, Node) and factor is not None:
                found = Scaling(arg, factor)
        return found

    first = args[0] if args else None
    if not isinstance(first, Node):
        return None
    if target is aten.div.Tensor:
        by = number(args[1])
        return Scaling(first, 1 / by) if by else None
    if target is aten.add.Tensor and first is args[1] and not node.kwargs:
        return Scaling(first, 2.0)
    if target is aten.mul.Scalar and first.target is aten.mul.Scalar:
        return Scaling(first, float(args[1]))  # type: ignore[arg-type]
    if target is aten.neg.default:
        return Scaling(first, -1.0)
    return None


def _merge_equal(graph: GraphModule) -> None:
    """Compute equal operations on equal arguments once."""
    seen: dict[object, Node] = {}
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        schema = getattr(node.target, "_schema", None)
        if _draws(node.target) or schema is None:
            continue

        # After an operation that writes into its argument, equal arguments need no longer hold equal numbers.
        if schema.is_mutable:
            return
        key = (node.target, repr(node.args), repr(node.kwargs))
        if key in seen:
            node.replace_all_uses_with(seen[key])
        else:
            seen[key] = node


# Flat vectors, entry by entry


def _push_slices(graph: GraphModule, _: torch.device) -> None:
    """Compute slices of elementwise results from slices of the arguments.

    A slice of joined entries is then one of the entries, so the joined vector [n] need not exist.
    """
    slices = [node for node in graph.graph.nodes if node.target is aten.slice.Tensor and len(node.args) == 4]
    # Each turn moves every slice by one operation, until none can move.
    while slices:
        moved = [part for node in slices for part in _push_slice(graph.graph, node)]
        if slices == moved:
            return
        slices = moved


def _push_slice(graph: Graph, node: Node) -> list[Node]:
    """Move one slice up by one operation; return the slices that are left to move."""
    inner, dim, start, end = node.args
    assert (
        isinstance(inner, Node) and isinstance(dim, int) and isinstance(start, int) and isinstance(end, int)
    )
    shape = _shape(inner)
    if inner.target is aten.cat.default and (inner.args[1] if len(inner.args) > 1 else 0) == dim:
        _take_entry(graph, node, inner, (start, min(end, shape[dim])))
        return []
    if inner.target not in POINTWISE:
        return []

    # Another user needs the operation as a whole, which would then be computed twice.
    if any(user.target is not aten.slice.Tensor for user in inner.users):
        return [node]
    moved: list[Node] = []

    def cut(arg: Any) -> Any:
        if not isinstance(arg, Node):
            return arg

        # An argument with fewer dimensions, or of size 1 in this one, is broadcast along it.
        own = dim - (len(shape) - len(_shape(arg)))
        if own < 0 or _shape(arg)[own] != shape[dim]:
            return arg
        part = graph.call_function(aten.slice.Tensor, (arg, own, start, end))
        part.meta["tensor_meta"] = _sliced_meta(arg, own, start, end)
        moved.append(part)
        return part

    with graph.inserting_before(node):
        new = graph.call_function(inner.target, tuple(cut(arg) for arg in inner.args), inner.kwargs)
    new.meta = node.meta
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    if not inner.users:
        graph.erase_node(inner)
    return moved


def _take_entry(graph: Graph, node: Node, joined: Node, span: tuple[int, int]) -> None:
    """Replace a slice of joined tensors by one of them, if it is exactly one."""
    dim, start = node.args[1], 0
    for entry in joined.args[0]:  # type: ignore[union-attr]
        width = _shape(entry)[dim]
        if (start, start + width) == span:
            node.replace_all_uses_with(entry)  # type: ignore[arg-type]
            graph.erase_node(node)
            return
        start += width


def _sliced_meta(node: Node, dim: int, start: int, end: int) -> Any:
    """Return the shape and type of a slice."""
    meta = node.meta["tensor_meta"]
    shape = list(meta.shape)
    shape[dim] = min(end, shape[dim]) - start
    return meta._replace(shape=torch.Size(shape))


def _push_shapes(graph: GraphModule, _: torch.device) -> None:
    """Compute views of elementwise results from views of the arguments, unless others read the results."""
    views = [node for node in graph.graph.nodes if node.target in SHAPES and isinstance(node.args[0], Node)]
    while views:
        node = views.pop()
        inner, new = node.args[0], _shape(node)
        if inner.target not in POINTWISE or len(inner.users) > 1 or not _shape(inner):
            continue
        # The first dimension counts the agents, and a view that mixes it with others stays.
        if not new or new[0] != _shape(inner)[0]:
            continue
        shapes = [_viewed_shape(arg, _shape(inner), new) for arg in inner.args]
        if None in shapes:
            continue

        args = []
        with graph.graph.inserting_before(node):
            for arg, shape in zip(inner.args, shapes, strict=True):
                viewed = arg
                if isinstance(arg, Node) and _shape(arg) != shape:
                    viewed = graph.graph.call_function(aten.reshape.default, (arg, list(shape)))
                    viewed.meta["tensor_meta"] = arg.meta["tensor_meta"]._replace(shape=shape)
                    views.append(viewed)
                args.append(viewed)
            made = graph.graph.call_function(inner.target, tuple(args), inner.kwargs)
        made.meta = node.meta
        node.replace_all_uses_with(made)
        graph.graph.erase_node(node)
        graph.graph.erase_node(inner)


def _viewed_shape(arg: Any, shape: torch.Size, new: torch.Size) -> Any:
    """Return the shape that an argument of an elementwise operation needs if the result has shape `new`.

    `shape` is that of the result before; both have the same first dimension. None: it cannot be viewed.
    """
    own = _shape(arg) if isinstance(arg, Node) else torch.Size()
    if own == shape:
        return new
    if own == shape[1:] and len(own) == len(shape) - 1:
        return new[1:]
    if own.numel() == 1:
        return torch.Size()
    # One number per agent.
    if len(own) == len(shape) and own[0] == shape[0] and own[1:].numel() == 1:
        return torch.Size([own[0], *[1] * (len(new) - 1)])
    return None


# Calls

NATIVE: dict[Any, Any] = {
    aten.bmm.default: torch.bmm,
    aten.baddbmm.default: torch.baddbmm,
    aten.relu.default: torch.relu,
    aten.transpose.int: torch.transpose,
    aten.sum.dim_IntList: torch.sum,
    aten.scatter_add.default: torch.scatter_add,
    aten.mul.Scalar: torch.mul,
    aten.mul.Tensor: torch.mul,
    aten.add.Tensor: torch.add,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.reshape.default: torch.reshape,
    aten.view.default: "view",
    aten.add_.Tensor: "add_",
    aten.mul_.Scalar: "mul_",
    aten.baddbmm_.default: "baddbmm_",
    aten.addcmul_.default: "addcmul_",
}
"""The same operations by torch's own bindings, which start faster than those of `torch.ops`."""


def _call_natively(graph: Graph) -> None:
    """Call operations by torch's own bindings."""
    for node in graph.nodes:
        target = NATIVE.get(node.target) if node.op == "call_function" else None
        if target is not None and "dtype" not in node.kwargs:
            node.op, node.target = ("call_method" if isinstance(target, str) else "call_function"), target


# Updates


def _fuse_bias(graph: Graph) -> None:
    """Make b + X W one operation."""
    for node in list(graph.nodes):
        plain = node.target is aten.add.Tensor and not node.kwargs
        if not plain or not all(isinstance(arg, Node) for arg in node.args):
            continue

        for bias, product in (node.args, node.args[::-1]):
            # A bias is smaller than the product. A larger tensor may be a state, which is updated in place.
            small = _shape(bias) is not None and _shape(bias).numel() < _shape(node).numel()
            alone = product.target is aten.bmm.default and set(product.users) == {node}
            if alone and small and _shape(product) == _shape(node):
                with graph.inserting_before(node):
                    fused = graph.call_function(aten.baddbmm.default, (bias, *product.args))
                fused.meta = node.meta
                node.replace_all_uses_with(fused)
                graph.erase_node(node)
                break


class Term(NamedTuple):
    """One term of a sum: `factor` times the state, a product ("bmm", "mul"), or a tensor ("add")."""

    kind: str
    args: tuple[Any, ...]
    factor: float


def _update_in_place(graph: Graph, states: int) -> None:
    """Turn new = c state + sum of c_i x_i into updates of the state.

    A product is added to the state as it is computed, so no step makes a copy of all parameters.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    output = next(node for node in graph.nodes if node.op == "output")
    moved: set[Any] = set()
    for index, state in enumerate(inputs[:states]):
        results = list(output.args[0])
        node = results[index]
        # The update comes last where only the caller reads the new state, and else where it was computed.
        last = isinstance(node, Node) and set(node.users) == {output}
        if not _is_replaceable(graph, state, index, results, last):
            continue

        terms = _terms(graph, node, 1.0, state, top=True)
        own = sum(term.factor for term in terms if term.kind == "state")
        rest = [term for term in terms if term.kind != "state"]
        reads = [any(_memory_of(arg) is state for arg in term.args) for term in rest]
        # Only the first update may read the old state, and none may read a state that was updated before.
        reads_moved = any(_memory_of(arg) in moved for term in rest for arg in term.args)
        if own == 0 or not rest or sum(reads) > 1 or reads_moved:
            continue

        with graph.inserting_before(output if last else node):
            new = _updated(graph, state, own, rest, reads)
        moved.add(state)
        if last:
            results[index] = new
            output.args = (tuple(results),)
        else:
            node.replace_all_uses_with(new)


def _is_replaceable(graph: Graph, state: Node, index: int, results: list[Any], last: bool) -> bool:
    """Whether nothing needs a state after its new value is there."""
    node = results[index]
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    if any(_memory_of(result) is state for i, result in enumerate(results) if i != index):
        return False
    if _shape(node) != _shape(state) or results.count(node) > 1:
        return False
    return last or not _read_later(graph, state, node)


def _updated(graph: Graph, state: Node, own: float, terms: list[Term], reads: list[bool]) -> Node:
    """Write own * state + terms as updates of the state; the term that reads the state comes first."""
    new = state
    for term, read in zip(terms, reads, strict=True):
        new = UPDATES[term.kind](graph, new, term.args, term.factor / own) if read else new
    new = graph.call_function(aten.mul_.Scalar, (new, own)) if own != 1 else new
    for term, read in zip(terms, reads, strict=True):
        new = new if read else UPDATES[term.kind](graph, new, term.args, term.factor)
    return new


UPDATES: dict[str, Callable[[Graph, Node, Any, float], Node]] = {
    "bmm": lambda graph, state, args, factor: graph.call_function(
        aten.baddbmm_.default, (state, *args), {"alpha": factor}
    ),
    "mul": lambda graph, state, args, factor: graph.call_function(
        aten.addcmul_.default, (state, *args), {"value": factor}
    ),
    "add": lambda graph, state, args, factor: graph.call_function(
        aten.add_.Tensor, (state, *args), {"alpha": factor}
    ),
}
"""The operation that adds a term of each kind to a state in place."""


def _memory_of(node: Any) -> Any:
    """Return the node whose memory this one is a view of."""
    return _under(node, VIEWS)


def _under(node: Any, views: set[Any]) -> Any:
    """Return the node below a chain of operations of these kinds."""
    while isinstance(node, Node) and node.target in views and node.args:
        node = node.args[0]
    return node


def _read_later(graph: Graph, state: Node, node: Node) -> bool:
    """Whether something after `node` reads the state's memory."""
    order = {each: i for i, each in enumerate(graph.nodes)}
    views, readers = [state], [state]
    while views:
        for user in views.pop().users:
            if user.op == "call_function" and user.target in VIEWS:
                views.append(user)
            readers.append(user)
    return any(order[reader] > order[node] for reader in readers)


def _terms(graph: Graph, node: Any, factor: float, state: Node, top: bool = False) -> list[Term]:
    """Write factor * node as a sum of terms; a node that others read stays one term, except at the top."""
    shape = _shape(state)
    if _under(node, SHAPES) is state and _shape(node) == shape:
        return [Term("state", (), factor)]
    if not isinstance(node, Node) or node.op != "call_function" or (len(node.users) > 1 and not top):
        return [Term("add", (node,), factor)]

    target = node.target
    args: tuple[Any, ...] = node.args
    if target in (aten.add.Tensor, aten.sub.Tensor) and all(isinstance(arg, Node) for arg in args):
        alpha: Any = node.kwargs.get("alpha", 1)
        sign = alpha if target is aten.add.Tensor else -alpha
        return [*_terms(graph, args[0], factor, state), *_terms(graph, args[1], factor * sign, state)]
    if target is aten.mul.Scalar:
        return _terms(graph, args[0], factor * args[1], state)

    if target is aten.bmm.default and _shape(node) == shape:
        return [Term("bmm", args, factor)]
    same_type = all(isinstance(arg, Node) and _dtype(arg) == _dtype(state) for arg in args)
    if target is aten.mul.Tensor and same_type:
        return [Term("mul", args, factor)]
    return [Term("add", (node,), factor)]
