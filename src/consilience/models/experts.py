"""Mixtures of experts per task: shared experts, experts of tasks, and gates that weigh them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consilience.core.checks import whole_number
from consilience.core.errors import ConsilienceError
from consilience.core.model import Sharing
from consilience.core.params import Params
from consilience.core.tree import Input
from consilience.models.composed import Composed, Piece, Run, drawn_modules, module_of, pooled
from consilience.models.heads import HEADS, HIDDEN, as_type, drawn, escape, tasks
from consilience.models.module import Factory, ModuleModel

STEM, EXPERTS, OWN, GATES, GATE = "stem.", "experts.", "own.", "gates.", "gate."

Given = ModuleModel | nn.Module | Factory
"""A module, a function that makes one, or a model of one."""


class Mixture(Composed):
    """Layers of experts that all tasks share and experts of tasks, weighed per task by gates; then heads.

    h_t^l = sum_i g_t,i^l E_i^l over the own experts of task t, which read h_t^{l-1}, and the shared ones,
    which read h_s^{l-1}; g_t^l = softmax(W_t^l h_t^{l-1} + b_t^l). h_s^l is the mixture of the experts of all
    tasks and of the shared ones, by a shared gate on h_s^{l-1}; the last layer has none. psi_t = h_t^L, and
    h_t^0 = h_s^0 = z = stem(x), or x without a stem. Gates read vectors [B, d]: the mean over the places of
    what experts read, or x flattened. One layer without own experts is MMoE (Ma et al. 2018,
    doi:10.1145/3219819.3220007), one layer with them CGC, and several are PLE (Tang et al. 2020,
    doi:10.1145/3383313.3412236). One expert in all is hard sharing: its gate is 1.

    Entries are `stem.<name>`, `experts.<layer>.<i>.<name>`, `own.<task>.<layer>.<i>.<name>`, the gates
    `gates.<task>.<layer>.weight` [own + shared, d] and `.bias`, a task's own experts first, and heads as in
    `MultiHead`; of the shared gates `gate.<layer>.weight` [shared, d], and with each task
    `own.<task>.<layer>.gate.weight` [own, d]. Gates begin uniform in +-1 / sqrt(d), shared gates at 0. Own
    experts below the last layer are reached by the losses of all tasks.

    >>> from torch import nn
    >>> model = Mixture([lambda: nn.Linear(4, 3), lambda: nn.Linear(3, 3)], outputs=10, shared=1, own=1)
    >>> list(model.init(torch.Generator())[0])[:2]
    ['experts.0.0.weight', 'experts.0.0.bias']
    >>> model.shared("own.a.0.0.weight"), model.shared("own.a.1.0.weight")
    (True, False)
    """

    task_prefixes: ClassVar[tuple[str, ...]] = (HEADS, HIDDEN, GATES, OWN)

    def __init__(
        self,
        layers: Sequence[Given],
        outputs: int,
        shared: int,
        own: int = 0,
        stem: Given | None = None,
        hidden: Sequence[int] = (),
    ) -> None:
        super().__init__(outputs, None, hidden)
        if not layers:
            raise ConsilienceError("`experts` must have a module per extraction layer, got none.")
        whole_number(shared=shared)
        whole_number(0, own=own)
        self.experts = [module_of(layer, "an expert") for layer in layers]
        self.count, self.own = shared, own
        self.stem = None if stem is None else module_of(stem, "`stem`")

    @property
    def name(self) -> str:
        """The catalogue's name, with the first expert's."""
        known = "ple" if len(self.experts) > 1 else "cgc" if self.own else "mmoe"
        return f"{known}({self.experts[0].name})"

    def __repr__(self) -> str:
        listed = ", ".join(map(repr, self.experts))
        facts = f"shared={self.count}, own={self.own}, stem={self.stem!r}, hidden={self.hidden}"
        return f"{self.name.partition('(')[0]}({listed}, {self.outputs}, {facts})"

    @property
    def reads_others(self) -> bool:
        return self.own > 0 and len(self.experts) > 1

    def shared(self, entry: str) -> bool:
        # The shared gates read own experts of all layers but the last, and through them the gates below.
        if self.own and entry.startswith((OWN, GATES)):
            above = len(self.experts) - (1 if entry.startswith(OWN) else 2)
            return int(entry.split(".")[2]) < above
        return super().shared(entry)

    def pieces(self, present: Sequence[str]) -> list[Piece]:
        found = [] if self.stem is None else [Piece(STEM, self.stem)]
        for layer, expert in enumerate(self.experts):
            found += [Piece(f"{EXPERTS}{layer}.{i}.", expert) for i in range(self.count)]
            found += [Piece(f"{OWN}{task}.{layer}.{i}.", expert) for task in present for i in range(self.own)]
        return found

    def common_modules(self, generator: torch.Generator) -> tuple[Params, Params]:
        # Experts first, so that one without a stem begins as the trunk of `multi_head`.
        pieces = self.pieces(())
        return drawn_modules(sorted(pieces, key=lambda piece: piece.prefix == STEM), generator)

    def own_modules(self, task: str, generator: torch.Generator) -> tuple[Params, Params]:
        common = self.pieces(())
        return drawn_modules([piece for piece in self.pieces([task]) if piece not in common], generator)

    def own_entries(self, task: str, stages: Sequence[Tensor], generator: torch.Generator) -> Params:
        """Return the gates of a task; `stages` are z and what an expert of each layer gives."""
        new: Params = {}
        last = len(self.experts) - 1
        for layer, z in enumerate(stages[:-1]):
            new |= drawn(f"{GATES}{task}.{layer}", self.own + self.count, z.shape[-1], generator)
            # Equal weights are no trap here, because experts differ. The first task brings the common rows.
            rows = [(f"{GATE}{layer}", self.count), (f"{OWN}{task}.{layer}.gate", self.own)]
            for place, count in rows if layer < last else ():
                if count:
                    new[f"{place}.weight"] = torch.zeros(count, z.shape[-1])
                    new[f"{place}.bias"] = torch.zeros(count)
        return new

    def stages(self, run: Run, x: Input) -> list[Tensor]:
        z = self._stemmed(run, x)
        found, state = [self._read(z, x)], z
        for layer, expert in enumerate(self.experts):
            out = run(expert, f"{EXPERTS}{layer}.0.", state)
            last = layer + 1 == len(self.experts)
            found.append(out if last else self._read(out, x))
            state = out
        return found

    def _stemmed(self, run: Run, x: Input) -> Input:
        return x if self.stem is None else run(self.stem, STEM, x)

    def _read(self, z: Input, x: Input) -> Tensor:
        """Return what gates read [B, d]: z over its places, where x are the inputs of the model."""
        if not isinstance(z, Tensor) or not z.is_floating_point():
            raise ConsilienceError(
                f"the gates of {self.name} read numbers with fractions, got "
                f"{z.dtype if isinstance(z, Tensor) else 'inputs of several parts'}; give a `stem`, such as "
                "an embedding, that experts and gates read."
            )
        # Pixels have no features of their own: a gate sees all of them.
        if z is x:
            return z.flatten(1)
        # Maps [B, channels, *places] have their channels first.
        return pooled(z if z.dim() < 4 else z.movedim(1, -1), x)

    def task_features(
        self, run: Run, params: Params, x: Input, wanted: Sequence[str], present: Sequence[str]
    ) -> dict[str, Tensor]:
        return self._extracted(run, params, x, wanted, present, {})

    def _extracted(
        self,
        run: Run,
        params: Params,
        x: Input,
        wanted: Sequence[str],
        present: Sequence[str],
        gates: dict[str, list[Tensor]],
    ) -> dict[str, Tensor]:
        """Return psi_t; the weights of the gates of each task are put into `gates`, layer by layer."""
        z = self._stemmed(run, x)
        common: Input = z
        states: dict[str, Input] = dict.fromkeys(present if self.reads_others else wanted, z)
        for layer, expert in enumerate(self.experts):
            last = layer + 1 == len(self.experts)
            own = {
                task: [run(expert, f"{OWN}{task}.{layer}.{i}.", state) for i in range(self.own)]
                for task, state in states.items()
                if not last or task in wanted
            }
            shared = [run(expert, f"{EXPERTS}{layer}.{i}.", common) for i in range(self.count)]

            # Each task weighs its own experts and the shared ones.
            mixed: dict[str, Input] = {}
            for task, outs in own.items():
                weights = _gate(params, f"{GATES}{task}.{layer}", self._read(states[task], x)).softmax(1)
                gates.setdefault(task, []).append(weights)
                mixed[task] = _mix(weights, [*outs, *shared])
            if not last:
                weights = self._common_gate(params, layer, self._read(common, x), [*own])
                gates.setdefault("", []).append(weights)
                common = _mix(weights, [*(out for outs in own.values() for out in outs), *shared])
            states = mixed
        return {task: states[task] for task in wanted}  # type: ignore[misc]

    def _common_gate(self, params: Params, layer: int, z: Tensor, own: Sequence[str]) -> Tensor:
        """Return the weights [B, n] of the experts of tasks, then of the shared ones, for the next layer."""
        rows = [f"{OWN}{task}.{layer}.gate" for task in own] if self.own else []
        logits = [_gate(params, name, z) for name in (*rows, f"{GATE}{layer}")]
        return torch.cat(logits, 1).softmax(1)

    def sharing(self, params: Params, buffers: Params, x: Input, task: str) -> dict[str, Sharing]:
        """Return the gates of a task, by layer."""
        found, present = escape(task), tasks(params)
        if found not in present:
            return {}
        gates: dict[str, list[Tensor]] = {}
        self._extracted(self._functional(params, buffers, False, {}), params, x, [found], present, gates)
        places = {
            f"layer {i}": Sharing((*self._own_parts(found, i), *self._parts(i)), each, True)
            for i, each in enumerate(gates[found])
        }
        # The shared gates weigh the experts of all tasks that ran.
        ran = sorted(gates.keys() - {""})
        for i, each in enumerate(gates.get("", ())):
            own = [part for other in ran for part in self._own_parts(other, i)]
            places[f"layer {i}, shared gate"] = Sharing((*own, *self._parts(i)), each, True)
        return places

    def _parts(self, layer: int) -> list[str]:
        """Return the names of the shared experts of a layer."""
        return [f"expert {layer}.{i}" for i in range(self.count)]

    def _own_parts(self, task: str, layer: int) -> list[str]:
        """Return the names of a task's experts of a layer."""
        return [f"own {layer}.{i} of {task}" for i in range(self.own)]


def _gate(params: Params, name: str, z: Tensor) -> Tensor:
    """Return the logits [B, n] of a gate on z [B, d]."""
    weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
    return F.linear(as_type(z, weight), weight, bias)


def _mix(weights: Tensor, outs: Sequence[Tensor]) -> Tensor:
    """Return sum_i w_i E_i for weights [B, n] and outputs [B, ...] of n experts."""
    stack = torch.stack(list(outs), 1)
    return (weights.to(stack).view(*weights.shape, *[1] * (stack.dim() - 2)) * stack).sum(1)
