"""Programs: the step of stacked agents as a graph of tensor operations, traced once and replayed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from consilience.engines._graph import simplify

LONG = 300
"""Steps after which a program on a GPU is compiled by default. On a CPU the simplified graph is as fast."""


class Program:
    """The step of stacked agents as a graph of tensor operations.

    Traced once, replayed at each step, and compiled when it is asked for or when it runs long on a GPU.

    Args:
        step: the step of one agent, (its state, constants, data) -> its new state.
        args: the stacked arguments to trace with.
        dims: the dimension of each argument that counts the agents, or None.
        states: how many arguments are the state.
    """

    def __init__(
        self,
        step: Callable[..., tuple[Tensor, ...]],
        args: list[Tensor],
        dims: list[int | None],
        states: int,
    ) -> None:
        self.whole, self.states, self.ran = trace(step, args, dims), states, 0
        # Simplifying runs the graph on its arguments and edits it, so both are copies.
        self.graph = simplify(copy.deepcopy(self.whole), [tensor.clone() for tensor in args], states)
        self.fast: Callable[..., None] | None = None
        self.tried = False

        self.keeps: object = None
        """Objects whose identity is in the program's key, kept alive so that none takes their id."""

    def __call__(
        self, args: list[Tensor], compiled: bool | None, note: Callable[[str], None]
    ) -> Sequence[Tensor]:
        """Run one step: (state, constants, data) -> new state; the state may be changed in place."""
        self.ran += 1
        runs_long = compiled is None and self.ran > LONG and args[0].is_cuda
        if not self.tried and (compiled or runs_long):
            self.tried = True
            self._compile(args, note)

        # The compiled program writes the new state into the old one itself.
        if self.fast is not None:
            self.fast(*args)
            return args[: self.states]
        return self.graph(*args)  # type: ignore[no-any-return]

    def _compile(self, args: list[Tensor], note: Callable[[str], None]) -> None:
        """Compile the traced graph; where that fails, the simplified one stays in use."""
        graph, states = self.whole, self.states

        def fast(*tensors: Tensor) -> None:
            for old, new in zip(tensors[:states], graph(*tensors), strict=True):
                old.copy_(new)

        compiled = torch.compile(fast, dynamic=False)
        # All programs share the code object of `fast`, and so its limit on recompilations.
        limits: dict[str, Any] = {
            name: max(4096, getattr(torch._dynamo.config, name))
            for name in ("recompile_limit", "accumulated_recompile_limit")
        }
        try:
            with torch._dynamo.config.patch(**limits, fail_on_recompile_limit_hit=True):
                compiled(*[tensor.clone() for tensor in args])
        except Exception as error:
            note(f"a program is not compiled: {type(error).__name__}: {str(error).splitlines()[0]}")
        else:
            self.fast = compiled


def trace(step: Callable[..., tuple[Tensor, ...]], args: list[Tensor], dims: list[int | None]) -> GraphModule:
    """Trace the step of one agent for a stack of agents."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.enable_grad():
        graph = make_fx(torch.vmap(step, in_dims=tuple(dims)))(*args)

        # Operations that write into a tensor would hide dependencies from the passes of `simplify`.
        schemas = [getattr(node.target, "_schema", None) for node in graph.graph.nodes]
        if any(getattr(schema, "is_mutable", False) for schema in schemas):
            graph = make_fx(torch.func.functionalize(graph))(*args)

    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph
