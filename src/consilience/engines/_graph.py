"""Graphs of a traced step made short: what changes nothing goes, what is known is made once, states are updated in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.shape_prop import ShapeProp

aten = torch.ops.aten
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
"""What makes a tensor of one number (None: its last argument)."""
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


def tidy(graph: GraphModule, args: Sequence[Tensor], states: int) -> GraphModule:
    """The same function to rounding, shorter; the first `states` arguments may be changed in place, to what it gives for them."""
    for simplify in (_known, _pieces, _shaped, _known):
        ShapeProp(graph).propagate(*args)
        for node in list(graph.graph.nodes):
            same = _same(node)
            if same is not None:
                node.replace_all_uses_with(same)
        _once(graph)
        graph.graph.eliminate_dead_code()
        simplify(graph, args[0].device)
        graph.graph.eliminate_dead_code()
    ShapeProp(graph).propagate(*args)
    _once(graph)
    _with_bias(graph.graph)
    _in_place(graph.graph, states)
    graph.graph.eliminate_dead_code()
    _natively(graph.graph)
    graph.recompile()
    return graph


def _shape(node: Any) -> Any:
    meta = node.meta.get("tensor_meta") if isinstance(node, Node) else None
    return getattr(meta, "shape", None)


def _dtype(node: Node) -> Any:
    return getattr(node.meta.get("tensor_meta"), "dtype", None)


def _same(node: Node) -> Node | None:
    """The node whose value this one repeats, or None."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return None
    before = node.args[0]
    if node.target in SHAPES and _shape(node) is not None and _shape(node) == _shape(before):
        return before
    if node.target is aten.detach.default or (node.target is aten.mul.Scalar and node.args[1] == 1):
        return before
    if (
        node.target is aten.transpose.int
        and before.target is aten.transpose.int
        and node.args[1:] == before.args[1:]
    ):
        return before.args[0]  # type: ignore[return-value]
    return None


# what is known before any step


def _known(graph: GraphModule, device: torch.device) -> None:
    """Nodes that no argument's numbers enter are computed now; products with one number become scalings, which are joined."""
    values: dict[Node, Tensor] = {}
    uniform: dict[Node, float] = {}

    def know(node: Node, value: Tensor) -> None:
        values[node] = value
        if value.numel() and value.is_floating_point() and bool((value == value.flatten()[0]).all()):
            uniform[node] = float(value.flatten()[0])

    def keep(node: Node, value: Tensor) -> None:
        name = f"_constant_{len(values)}_{node.name}"
        graph.register_buffer(name, value)
        with graph.graph.inserting_before(node):
            made = graph.graph.get_attr(name)
        made.meta = node.meta
        know(made, value)
        node.replace_all_uses_with(made)

    for node in graph.graph.nodes:
        if node.op == "get_attr":
            know(node, getattr(graph, node.target))
    for node in list(graph.graph.nodes):
        target, meta = node.target, node.meta.get("tensor_meta")
        if node.op != "call_function" or not isinstance(getattr(meta, "dtype", None), torch.dtype):
            continue
        if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()) or not str(target).startswith(
            "aten."
        ):
            continue
        scale = _scaling(node, uniform)
        if target in FILLS and meta.shape.numel() <= FEW:
            number: Any = node.args[-1] if FILLS[target] is None else FILLS[target]
            keep(node, torch.full(meta.shape, number, dtype=meta.dtype, device=device))
        elif all(n in values for n in node.all_input_nodes) and meta.shape.numel() <= FEW:

            def put(a: Any) -> Any:
                return (
                    [put(x) for x in a]
                    if isinstance(a, list | tuple)
                    else values.get(a, a)
                    if isinstance(a, Node)
                    else a
                )

            keep(node, target(*map(put, node.args), **{k: put(a) for k, a in node.kwargs.items()}))
        elif scale is not None:
            x, factor = scale
            if x.target is aten.mul.Scalar and set(x.users) == {node}:
                x, factor = x.args[0], x.args[1] * factor  # type: ignore[assignment, operator]
            with graph.graph.inserting_before(node):
                made = graph.graph.call_function(aten.mul.Scalar, (x, factor)) if factor != 1 else x
            if made is not x:
                made.meta = node.meta
            node.replace_all_uses_with(made)
            graph.graph.erase_node(node)


def _scaling(node: Node, uniform: dict[Node, float]) -> tuple[Node, float] | None:
    """(x, c) where a node is c x, of the shape and type of x."""
    args, found = node.args, None
    if node.target is aten.mul.Tensor:
        for x, c in ((args[0], args[1]), (args[1], args[0])):
            if isinstance(x, Node) and (c in uniform or isinstance(c, float | int)):
                found = x, uniform[c] if isinstance(c, Node) else float(c)  # type: ignore[arg-type]
    elif (
        node.target is aten.div.Tensor
        and isinstance(args[0], Node)
        and (args[1] in uniform or isinstance(args[1], float | int))
    ):
        by = uniform[args[1]] if isinstance(args[1], Node) else float(args[1])  # type: ignore[arg-type]
        found = (args[0], 1 / by) if by else None
    elif (
        node.target is aten.add.Tensor
        and args[0] is args[1]
        and isinstance(args[0], Node)
        and not node.kwargs
    ):
        found = args[0], 2.0
    elif node.target is aten.mul.Scalar and isinstance(args[0], Node) and args[0].target is aten.mul.Scalar:
        found = args[0], float(args[1])  # type: ignore[arg-type]
    elif node.target is aten.neg.default and isinstance(args[0], Node):
        found = args[0], -1.0
    if found is None or _shape(found[0]) != _shape(node):
        return None
    dtype = found[0].meta["tensor_meta"].dtype
    return found if dtype == node.meta["tensor_meta"].dtype and dtype.is_floating_point else None


def _once(graph: GraphModule) -> None:
    """Equal operations of equal arguments are made once."""
    seen: dict[object, Node] = {}
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        target = node.target
        if (
            torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
            or getattr(target, "_schema", None) is None
        ):
            continue
        if target._schema.is_mutable:
            return
        at = (target, repr(node.args), repr(node.kwargs))
        if at in seen:
            node.replace_all_uses_with(seen[at])
        else:
            seen[at] = node


# flat vectors, entry by entry


def _pieces(graph: GraphModule, _: torch.device) -> None:
    """A slice of what is computed number by number is computed from slices, and one of entries put together is that entry."""
    todo = [n for n in graph.graph.nodes if n.target is aten.slice.Tensor and len(n.args) == 4]
    while todo:
        made = [part for node in todo for part in _push(graph.graph, node)]
        if todo == made:
            return
        todo = made


def _push(graph: Graph, node: Node) -> list[Node]:
    """Move one slice up by one operation; the slices that are left to move."""
    x, dim, start, end = node.args
    assert isinstance(x, Node) and isinstance(dim, int) and isinstance(start, int) and isinstance(end, int)
    shape = _shape(x)
    if x.target is aten.cat.default and (x.args[1] if len(x.args) > 1 else 0) == dim:
        at = 0
        for piece in x.args[0]:  # type: ignore[union-attr]
            width = _shape(piece)[dim]
            if (at, at + width) == (start, min(end, shape[dim])):
                node.replace_all_uses_with(piece)  # type: ignore[arg-type]
                graph.erase_node(node)
                return []
            at += width
        return []
    if x.target not in POINTWISE:
        return []
    if any(u.target is not aten.slice.Tensor for u in x.users):
        return [node]
    made: list[Node] = []

    def cut(a: Any) -> Any:
        if not isinstance(a, Node):
            return a
        own = dim - (len(shape) - len(_shape(a)))
        if own < 0 or _shape(a)[own] != shape[dim]:
            return a  # broadcast along it
        part = graph.call_function(aten.slice.Tensor, (a, own, start, end))
        part.meta["tensor_meta"] = _cut(a, own, start, end)
        made.append(part)
        return part

    with graph.inserting_before(node):
        new = graph.call_function(x.target, tuple(cut(a) for a in x.args), x.kwargs)
    new.meta = node.meta
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    if not x.users:
        graph.erase_node(x)
    return made


def _shaped(graph: GraphModule, _: torch.device) -> None:
    """A view of what is computed number by number, for nobody else, is computed from views."""
    todo = [n for n in graph.graph.nodes if n.target in SHAPES and isinstance(n.args[0], Node)]
    while todo:
        node = todo.pop()
        inner, new = node.args[0], _shape(node)
        if (
            inner.target not in POINTWISE
            or len(inner.users) > 1
            or not _shape(inner)
            or not new
            or new[0] != _shape(inner)[0]
        ):
            continue
        sizes = [_fitting(a, _shape(inner), new) for a in inner.args]
        if None in sizes:
            continue
        args = []
        with graph.graph.inserting_before(node):
            for a, size in zip(inner.args, sizes, strict=True):
                if isinstance(a, Node) and _shape(a) != size:
                    a, old = graph.graph.call_function(aten.reshape.default, (a, list(size))), a
                    a.meta["tensor_meta"] = old.meta["tensor_meta"]._replace(shape=size)
                    todo.append(a)
                args.append(a)
            made = graph.graph.call_function(inner.target, tuple(args), inner.kwargs)
        made.meta = node.meta
        node.replace_all_uses_with(made)
        graph.graph.erase_node(node)
        graph.graph.erase_node(inner)


def _fitting(a: Any, shape: torch.Size, new: torch.Size) -> Any:
    """The shape in which an argument of an operation of this shape enters one of a new shape with the same first dimension."""
    own = _shape(a) if isinstance(a, Node) else torch.Size()
    if own == shape:
        return new
    if own == shape[1:] and len(own) == len(shape) - 1:
        return new[1:]
    if own.numel() == 1:
        return torch.Size()
    if len(own) == len(shape) and own[0] == shape[0] and own[1:].numel() == 1:
        return torch.Size([own[0], *[1] * (len(new) - 1)])
    return None


def _cut(a: Node, dim: int, start: int, end: int) -> Any:
    meta = a.meta["tensor_meta"]
    shape = list(meta.shape)
    shape[dim] = min(end, shape[dim]) - start
    return meta._replace(shape=torch.Size(shape))


# calls

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
"""The same operations by torch's own bindings, which are called sooner."""


def _natively(graph: Graph) -> None:
    for node in graph.nodes:
        target = NATIVE.get(node.target) if node.op == "call_function" else None
        if target is not None and "dtype" not in node.kwargs:
            node.op, node.target = ("call_method" if isinstance(target, str) else "call_function"), target


# updates


def _with_bias(graph: Graph) -> None:
    """b + X W is one operation."""
    for node in list(graph.nodes):
        if (
            node.target is not aten.add.Tensor
            or node.kwargs
            or not all(isinstance(a, Node) for a in node.args)
        ):
            continue
        for bias, product in (node.args, node.args[::-1]):
            small = _shape(bias) is not None and _shape(bias).numel() < _shape(node).numel()
            if (
                product.target is aten.bmm.default
                and set(product.users) == {node}
                and small
                and _shape(product) == _shape(node)
            ):
                with graph.inserting_before(node):
                    new = graph.call_function(aten.baddbmm.default, (bias, *product.args))
                new.meta = node.meta
                node.replace_all_uses_with(new)
                graph.erase_node(node)
                break


def _root(node: Any, through: set[Any] = VIEWS) -> Any:
    """The node whose memory this one is a view of."""
    while isinstance(node, Node) and node.target in through and node.args:
        node = node.args[0]
    return node


def _in_place(graph: Graph, states: int) -> None:
    """new = c state + sum of c_i x_i becomes updates of the state, with products added as they are made."""
    output = next(n for n in graph.nodes if n.op == "output")
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    moved: set[Any] = set()
    for i in range(states):
        results = list(output.args[0])
        state, node = inputs[i], results[i]
        roots = [_root(r) for r in results]
        if (
            not isinstance(node, Node)
            or node.op != "call_function"
            or any(r is state for j, r in enumerate(roots) if j != i)
        ):
            continue
        if _shape(node) != _shape(state) or results.count(node) > 1:
            continue
        at = output if set(node.users) == {output} else node
        if at is not output and _read_later(graph, state, node):
            continue
        terms = _terms(graph, node, 1.0, state, top=True)
        own = sum(c for kind, _, c in terms if kind == "state")
        rest = [t for t in terms if t[0] != "state"]
        reads = [any(_root(a) is state for a in args) for _, args, _ in rest]
        if (
            own == 0
            or not rest
            or sum(reads) > 1
            or any(_root(a) in moved for _, args, _ in rest for a in args)
        ):
            continue
        with graph.inserting_before(at):
            new = state
            for (kind, a, c), read in zip(rest, reads, strict=True):
                new = UPDATES[kind](graph, new, a, c / own) if read else new
            new = graph.call_function(aten.mul_.Scalar, (new, own)) if own != 1 else new
            for (kind, a, c), read in zip(rest, reads, strict=True):
                new = new if read else UPDATES[kind](graph, new, a, c)
        moved.add(state)
        if at is output:
            results[i] = new
            output.args = (tuple(results),)
        else:
            node.replace_all_uses_with(new)


UPDATES: dict[str, Callable[[Graph, Node, Any, float], Node]] = {
    "bmm": lambda g, s, a, c: g.call_function(aten.baddbmm_.default, (s, *a), {"alpha": c}),
    "mul": lambda g, s, a, c: g.call_function(aten.addcmul_.default, (s, *a), {"value": c}),
    "add": lambda g, s, a, c: g.call_function(aten.add_.Tensor, (s, *a), {"alpha": c}),
}


def _read_later(graph: Graph, state: Node, node: Node) -> bool:
    """Whether something that comes after `node` reads the state's memory."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    views, found = [state], [state]
    while views:
        for user in views.pop().users:
            if user.op == "call_function" and user.target in VIEWS:
                views.append(user)
            found.append(user)
    return any(order[n] > order[node] for n in found)


def _terms(
    graph: Graph, node: Any, c: float, state: Node, top: bool = False
) -> list[tuple[str, tuple[Any, ...], float]]:
    """A node times c as terms (kind, arguments, coefficient) of a sum; only what nobody else needs is taken apart."""
    shape = _shape(state)
    if _root(node, SHAPES) is state and _shape(node) == shape:
        return [("state", (), c)]
    if not isinstance(node, Node) or node.op != "call_function" or (len(node.users) > 1 and not top):
        return [("add", (node,), c)]
    target = node.target
    args: tuple[Any, ...] = node.args
    if target in (aten.add.Tensor, aten.sub.Tensor) and all(isinstance(a, Node) for a in args):
        sign: Any = node.kwargs.get("alpha", 1) * (1 if target is aten.add.Tensor else -1)  # type: ignore[operator]
        return [*_terms(graph, args[0], c, state), *_terms(graph, args[1], c * sign, state)]
    if target is aten.mul.Scalar:
        return _terms(graph, args[0], c * args[1], state)
    if target is aten.bmm.default and _shape(node) == shape:
        return [("bmm", args, c)]
    if target is aten.mul.Tensor and all(isinstance(a, Node) and _dtype(a) == _dtype(state) for a in args):
        return [("mul", args, c)]
    return [("add", (node,), c)]
