"""Graphs of a traced step made short: what changes nothing goes, what is the same is made once, updates happen in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.shape_prop import ShapeProp

aten = torch.ops.aten
SHAPES = {aten.expand.default, aten.view.default, aten._unsafe_view.default, aten.reshape.default}
VIEWS = {*SHAPES, aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
         aten.select.int, aten.slice.Tensor, aten.t.default, aten.alias.default, aten.detach.default}  # fmt: skip


def tidy(graph: GraphModule, args: Sequence[Tensor], states: int) -> GraphModule:
    """The same function, shorter; the first `states` arguments may be changed in place, to what it gives for them."""
    ShapeProp(graph).propagate(*args)
    for node in list(graph.graph.nodes):
        same = _same(node)
        if same is not None:
            node.replace_all_uses_with(same)
    graph.graph.eliminate_dead_code()
    _constants(graph)
    _once(graph)
    graph.graph.eliminate_dead_code()
    _in_place(graph, states)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _shape(node: Any) -> Any:
    meta = node.meta.get("tensor_meta") if isinstance(node, Node) else None
    return getattr(meta, "shape", None)


def _same(node: Node) -> Node | None:
    """The node whose value this one repeats, or None."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return None
    before = node.args[0]
    if node.target in SHAPES and _shape(node) is not None and _shape(node) == _shape(before):
        return before
    if node.target is aten.detach.default or (node.target is aten.mul.Scalar and node.args[1] == 1):
        return before
    if node.target is aten.transpose.int and before.target is aten.transpose.int and node.args[1:] == before.args[1:]:
        return before.args[0]  # type: ignore[return-value]
    return None


def _constants(graph: GraphModule) -> None:
    """Nodes that no tensor enters are computed now."""
    for i, node in enumerate(list(graph.graph.nodes)):
        if node.op != "call_function" or node.all_input_nodes or not str(node.target).startswith("aten."):
            continue
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        value = node.target(*node.args, **node.kwargs)
        if isinstance(value, Tensor):
            name = f"_constant_{i}"
            graph.register_buffer(name, value)
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(graph.graph.get_attr(name))


def _once(graph: GraphModule) -> None:
    """Equal operations of equal arguments are made once."""
    seen: dict[object, Node] = {}
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        target = node.target
        if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()) or getattr(target, "_schema", None) is None:
            continue
        if target._schema.is_mutable:
            return
        at = (target, repr(node.args), repr(node.kwargs))
        if at in seen:
            node.replace_all_uses_with(seen[at])
        else:
            seen[at] = node


def _roots(node: Any) -> Node | None:
    """The node whose memory this one is a view of."""
    while isinstance(node, Node) and node.target in VIEWS and node.args:
        node = node.args[0]
    return node if isinstance(node, Node) else None


def _in_place(graph: GraphModule, states: int) -> None:
    """new = state + alpha x becomes an update of the state, with a product of matrices added as it is made."""
    nodes = list(graph.graph.nodes)
    output = nodes[-1]
    inputs = [n for n in nodes if n.op == "placeholder"]
    results = list(output.args[0])
    roots = [_roots(r) for r in results]
    for i in range(states):
        node, state = results[i], inputs[i]
        plain = isinstance(node, Node) and node.target is aten.add.Tensor and node.args[0] is state
        if not plain or any(r is state for j, r in enumerate(roots) if j != i) or set(node.users) != {output}:
            continue
        x, alpha = node.args[1], node.kwargs.get("alpha", 1)
        if _shape(x) != _shape(state):
            continue
        with graph.graph.inserting_before(output):
            if x.target is aten.bmm.default and set(x.users) == {node}:
                new = graph.graph.call_function(aten.baddbmm_.default, (state, *x.args), {"alpha": alpha})
            else:
                new = graph.graph.call_function(aten.add_.Tensor, (state, x), {"alpha": alpha})
        results[i] = new
    output.args = (tuple(results),)
