"""One trunk that tasks steer: by an embedding of the task, or by attention to the trunk's layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consilience.core.checks import whole_number
from consilience.core.errors import ConsilienceError
from consilience.core.params import Params
from consilience.core.tree import Input
from consilience.models.adapted import feature_axis
from consilience.models.composed import Composed, Piece, Run, cut, drawn_modules, halves
from consilience.models.heads import HEADS, HIDDEN, TRUNK, drawn
from consilience.models.module import Factory, ModuleModel

CONDITIONS, MAPS, ATTENTION, MERGE = "conditions.", "condition.", "attention.", "merge."

Form = Literal["sum", "concatenation", "multiplicative", "film", "gating"]
FORMS = ("sum", "concatenation", "multiplicative", "film", "gating")


class Steered(Composed):
    """Layers of a common trunk, each followed by what a task makes of it before its activation.

    A layer is a child of an nn.Sequential that has entries, with the norms after it.
    """

    def __init__(
        self, trunk: ModuleModel | nn.Module | Factory, outputs: int, hidden: Sequence[int] = ()
    ) -> None:
        super().__init__(outputs, None, hidden)
        self.trunk, layers = cut(trunk)
        self.layers = [halves(self.trunk, layer) for layer in layers]
        """Each layer up to its norms, and what follows it."""

    def pieces(self, present: Sequence[str]) -> list[Piece]:
        return [Piece(TRUNK, part) for layer in self.layers for part in layer if part is not None]

    def common_modules(self, generator: torch.Generator) -> tuple[Params, Params]:
        params, buffers = drawn_modules([Piece(TRUNK, self.trunk)], generator)
        held = {TRUNK + name for _, part in self.pieces(()) for name in (*part.entries, *part.buffer_names)}
        return {n: p for n, p in params.items() if n in held}, {n: b for n, b in buffers.items() if n in held}

    def stages(self, run: Run, x: Input) -> list[Tensor]:
        found: list[Tensor] = []
        state: Input = x
        for main, rest in self.layers:
            out = run(main, TRUNK, state)
            found.append(out)
            state = out if rest is None else run(rest, TRUNK, out)
        assert isinstance(state, Tensor)
        return [*found, state]

    def channels(self, layer: int, out: Tensor) -> int:
        """Return the dimension of a layer's channels in its output [B, ...]."""
        if out.dim() == 2:
            return 1
        return feature_axis(self.layers[layer][0].module).dim % out.dim()

    def widths(self, layers: Sequence[int]) -> list[int]:
        """Return the numbers of channels of layers. Raises ConsilienceError where nothing says it."""
        try:
            return [feature_axis(self.layers[i][0].module).width for i in layers]
        except ConsilienceError as error:
            raise ConsilienceError(
                f"the layers of {self.name} must say their widths, as nn.Linear and nn.Conv2d do, got "
                f"{self.trunk.description}; give an nn.Sequential of such layers."
            ) from error


class Conditioned(Steered):
    """A trunk whose layers read an embedding e_t [size] of the task, by one of five forms; heads per task.

    For a layer's channels h, before its activation:

    - "sum": h + A e_t
    - "concatenation": C [h; e_t], a linear map back to the layer's width that begins as [I, A]
    - "multiplicative": h * (1 + A e_t)
    - "film": h * (1 + A e_t) + B e_t (Perez et al. 2018, arXiv:1709.07871)
    - "gating": h * sigmoid(A e_t + c)

    e_t is drawn from N(0, 1); A and B are common to all tasks, uniform in +-1 / sqrt(size), and c begins
    at 0. Entries are `trunk.<name>`, `condition.<layer>.` weight (A), shift (B), bias (c) or matrix (C),
    `conditions.<task>` (e_t), and heads as in `MultiHead`.

    >>> from consilience.models import mlp
    >>> model = Conditioned(mlp(4, (8,)), outputs=10, form="film", size=2)
    >>> sorted(model.init(torch.Generator())[0])
    ['condition.0.shift', 'condition.0.weight', 'trunk.1.bias', 'trunk.1.weight']
    """

    task_prefixes: ClassVar[tuple[str, ...]] = (HEADS, HIDDEN, CONDITIONS)

    def __init__(
        self,
        trunk: ModuleModel | nn.Module | Factory,
        outputs: int,
        form: Form = "film",
        size: int = 16,
        layers: Sequence[int] | None = None,
        hidden: Sequence[int] = (),
    ) -> None:
        super().__init__(trunk, outputs, hidden)
        whole_number(size=size)
        if form not in FORMS:
            raise ConsilienceError(f"`form` must be one of {', '.join(FORMS)}, got {form!r}.")
        count = len(self.layers)
        chosen = tuple(range(count)) if layers is None else tuple(layers)
        if not chosen or not all(i in range(count) for i in chosen):
            raise ConsilienceError(
                f"`layers` must be numbers of the {count} layers of {self.trunk.description}, from 0, got "
                f"{chosen}."
            )
        self.form_of, self.size, self.chosen = form, size, chosen
        self.widths_of = dict(zip(chosen, self.widths(chosen), strict=True))

    @property
    def name(self) -> str:
        """The catalogue's name, with the trunk's."""
        return f"conditioned({self.trunk.name})"

    def __repr__(self) -> str:
        facts = f"form={self.form_of!r}, size={self.size}, layers={self.chosen}, hidden={self.hidden}"
        return f"conditioned({self.trunk!r}, {self.outputs}, {facts})"

    def common_modules(self, generator: torch.Generator) -> tuple[Params, Params]:
        params, buffers = super().common_modules(generator)
        for layer, width in self.widths_of.items():
            bound, place = self.size**-0.5, f"{MAPS}{layer}."
            weight = (2 * torch.rand(width, self.size, generator=generator) - 1) * bound
            if self.form_of == "concatenation":
                params[f"{place}matrix"] = torch.cat([torch.eye(width), weight], 1)
                continue
            params[f"{place}weight"] = weight
            if self.form_of == "film":
                shift = (2 * torch.rand(width, self.size, generator=generator) - 1) * bound
                params[f"{place}shift"] = shift
            if self.form_of == "gating":
                params[f"{place}bias"] = torch.zeros(width)
        return params, buffers

    def own_entries(self, task: str, stages: Sequence[Tensor], generator: torch.Generator) -> Params:
        return {f"{CONDITIONS}{task}": torch.randn(self.size, generator=generator)}

    def task_features(
        self, run: Run, params: Params, x: Input, wanted: Sequence[str], present: Sequence[str]
    ) -> dict[str, Tensor]:
        found = {}
        for task in wanted:
            state: Input = x
            for layer, (main, rest) in enumerate(self.layers):
                state = self._steer(params, task, layer, run(main, TRUNK, state))
                state = state if rest is None else run(rest, TRUNK, state)
            found[task] = state
        return found  # type: ignore[return-value]

    def _steer(self, params: Params, task: str, layer: int, h: Tensor) -> Tensor:
        """Return a layer's output as the task steers it."""
        if layer not in self.widths_of:
            return h
        code, place, axis = params[f"{CONDITIONS}{task}"], f"{MAPS}{layer}.", self.channels(layer, h)
        h = h.movedim(axis, -1)
        if self.form_of == "concatenation":
            joined = torch.cat([h, code.to(h).expand(*h.shape[:-1], -1)], -1)
            return F.linear(joined, params[f"{place}matrix"]).movedim(-1, axis)

        said = params[f"{place}weight"] @ code
        if self.form_of == "sum":
            h = h + said
        elif self.form_of == "gating":
            h = h * (said + params[f"{place}bias"]).sigmoid()
        else:
            h = h * (1 + said)
        if self.form_of == "film":
            h = h + params[f"{place}shift"] @ code
        return h.movedim(-1, axis)


class Attended(Steered):
    """A common trunk, and per task attention that selects from each of its layers (MTAN).

    q_t^l = s_l(a_t^l * h^l),  a_t^l = sigmoid(V_t^l relu(U_t^l [h^l; f^l(q_t^{l-1})] + b_t^l) + c_t^l)

    h^l [B, w, ...] is layer l of the trunk up to its norms, and s_l what follows it, such as its activation
    and pooling; the trunk itself runs without attention. f^l, common to all tasks, is one more layer of the
    kind of layer l; the first layer has none. U_t^l [w, 2 w] ([w, w] for the first) and V_t^l [w, w] act on
    channels, 1 x 1 on maps, and have no norms. psi_t = q_t^L. Entries are `trunk.<name>`, `merge.<name>`
    (f), `attention.<task>.<layer>.hidden.` (U, b) and `.mask.` (V, c), and heads as in `MultiHead`. Liu,
    Johns & Davison 2019, arXiv:1803.10704.

    >>> from consilience.models import mlp
    >>> model = Attended(mlp(4, (8, 8)), outputs=10)
    >>> sorted(model.init(torch.Generator())[0])[:2], model.task_of("attention.a.0.mask.weight")
    (['merge.3.bias', 'merge.3.weight'], 'a')
    """

    task_prefixes: ClassVar[tuple[str, ...]] = (HEADS, HIDDEN, ATTENTION)

    def __init__(
        self, trunk: ModuleModel | nn.Module | Factory, outputs: int, hidden: Sequence[int] = ()
    ) -> None:
        super().__init__(trunk, outputs, hidden)
        self.width_of = self.widths(range(len(self.layers)))

    @property
    def name(self) -> str:
        """The catalogue's name, with the trunk's."""
        return f"mtan({self.trunk.name})"

    def __repr__(self) -> str:
        return f"mtan({self.trunk!r}, {self.outputs}, hidden={self.hidden})"

    def pieces(self, present: Sequence[str]) -> list[Piece]:
        return [*super().pieces(present), *(Piece(MERGE, main) for main, _ in self.layers[1:])]

    def common_modules(self, generator: torch.Generator) -> tuple[Params, Params]:
        params, buffers = super().common_modules(generator)
        # As a whole trunk of other weights, of which the first layer is left out.
        more = self.trunk.init(generator)
        names = {name for main, _ in self.layers[1:] for name in (*main.entries, *main.buffer_names)}
        for mine, theirs in zip((params, buffers), more, strict=True):
            mine.update({MERGE + name: tensor for name, tensor in theirs.items() if name in names})
        return params, buffers

    def own_entries(self, task: str, stages: Sequence[Tensor], generator: torch.Generator) -> Params:
        new: Params = {}
        for layer, width in enumerate(self.width_of):
            place = f"{ATTENTION}{task}.{layer}"
            new |= drawn(f"{place}.hidden", width, width if layer == 0 else 2 * width, generator)
            new |= drawn(f"{place}.mask", width, width, generator)
        return new

    def task_features(
        self, run: Run, params: Params, x: Input, wanted: Sequence[str], present: Sequence[str]
    ) -> dict[str, Tensor]:
        state: Input = x
        selected: dict[str, Tensor] = {}
        for layer, (main, rest) in enumerate(self.layers):
            h = run(main, TRUNK, state)
            for task in wanted:
                read = [h] if layer == 0 else [h, run(main, MERGE, selected[task])]
                chosen = self._mask(params, f"{ATTENTION}{task}.{layer}", layer, read) * h
                selected[task] = chosen if rest is None else run(rest, TRUNK, chosen)
            # Nothing reads the trunk after its last layer.
            if layer + 1 < len(self.layers):
                state = h if rest is None else run(rest, TRUNK, h)
        return selected

    def _mask(self, params: Params, name: str, layer: int, read: Sequence[Tensor]) -> Tensor:
        """Return the attention a [B, w, ...] of a task to a layer."""
        axis = self.channels(layer, read[0])
        h = torch.cat([part.movedim(axis, -1) for part in read], -1)
        h = F.linear(h, params[f"{name}.hidden.weight"], params[f"{name}.hidden.bias"]).relu()
        h = F.linear(h, params[f"{name}.mask.weight"], params[f"{name}.mask.bias"]).sigmoid()
        return h.movedim(-1, axis)
