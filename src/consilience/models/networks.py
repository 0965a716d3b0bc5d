"""One network per task, of which the first layers may be common; units that mix the networks' layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consilience.core.errors import ConsilienceError
from consilience.core.model import Sharing
from consilience.core.params import Params
from consilience.core.tree import Input
from consilience.models.adapted import feature_axis
from consilience.models.composed import Composed, Piece, Run, cut
from consilience.models.heads import HEADS, HIDDEN, TRUNK, escape, tasks
from consilience.models.module import Factory, ModuleModel

NETS, STITCH = "nets.", "stitch."

Unit = Literal["stitch", "nddr", "sluice"]


class Networks(Composed):
    """The first k layers of a trunk are common, the others exist once per task; then heads.

    psi_t = f_t^L(.. f_t^{k+1}(f^k(.. f^1(x)))). With k = 0 the tasks have independent networks, with k = L
    they share all but their heads, as in `MultiHead`. A layer is a child of an nn.Sequential that has
    entries, with the activations and norms after it; any other trunk is one layer. Entries are
    `trunk.<name>` of common layers and `nets.<task>.<name>` of the others, with the names of the trunk, and
    heads as in `MultiHead`. The networks of tasks begin with different weights if a function makes the trunk,
    and with equal ones if the trunk is a module with weights.

    >>> from consilience.models import mlp
    >>> model = Networks(mlp(4, (8, 8)), outputs=10, shared=1)
    >>> [name for name in model.init(torch.Generator())[0]], len(model.layers)
    (['trunk.1.weight', 'trunk.1.bias'], 2)
    """

    task_prefixes: ClassVar[tuple[str, ...]] = (HEADS, HIDDEN, NETS)

    def __init__(
        self,
        trunk: ModuleModel | nn.Module | Factory,
        outputs: int,
        shared: int,
        hidden: Sequence[int] = (),
        norm: Literal["inf"] | None = None,
    ) -> None:
        super().__init__(outputs, norm, hidden)
        self.trunk, self.layers = cut(trunk)
        if isinstance(shared, bool) or not isinstance(shared, int) or not 0 <= shared <= len(self.layers):
            raise ConsilienceError(
                f"`shared` must be in 0 .. {len(self.layers)}, the number of layers of "
                f"{self.trunk.description}, got {shared!r}."
            )
        self.depth = shared
        """k, the number of common layers."""

    @property
    def name(self) -> str:
        """The catalogue's name, with the trunk's."""
        return f"multi_head({self.trunk.name})"

    def __repr__(self) -> str:
        return f"multi_head({self.trunk!r}, {self.outputs}, hidden={self.hidden}, shared={self.depth})"

    def pieces(self, present: Sequence[str]) -> list[Piece]:
        common = [Piece(TRUNK, layer) for layer in self.layers[: self.depth]]
        own = self.layers[self.depth :]
        return [*common, *(Piece(f"{NETS}{task}.", layer) for task in present for layer in own)]

    def common_modules(self, generator: torch.Generator) -> tuple[Params, Params]:
        return self._drawn(TRUNK, self.layers[: self.depth], generator)

    def own_modules(self, task: str, generator: torch.Generator) -> tuple[Params, Params]:
        return self._drawn(f"{NETS}{task}.", self.layers[self.depth :], generator)

    def _drawn(
        self, prefix: str, layers: Sequence[ModuleModel], generator: torch.Generator
    ) -> tuple[Params, Params]:
        """Return the first entries of some layers of a trunk; the trunk is drawn as a whole."""
        params, buffers = self.trunk.init(generator)
        names = {name for layer in layers for name in (*layer.entries, *layer.buffer_names)}
        params, buffers = (
            {prefix + name: tensor for name, tensor in held.items() if name in names}
            for held in (params, buffers)
        )
        return params, buffers

    def own_entries(self, task: str, stages: Sequence[Tensor], generator: torch.Generator) -> Params:
        return {}

    def stages(self, run: Run, x: Input) -> list[Tensor]:
        found: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            found.append(run(layer, TRUNK if i < self.depth else None, found[-1] if found else x))
        return found

    def task_features(
        self, run: Run, params: Params, x: Input, wanted: Sequence[str], present: Sequence[str]
    ) -> dict[str, Tensor]:
        states = dict.fromkeys(wanted, self._common(run, x))
        for layer in self.layers[self.depth :]:
            states = {task: run(layer, f"{NETS}{task}.", state) for task, state in states.items()}
        return states  # type: ignore[return-value]

    def _common(self, run: Run, x: Input) -> Input:
        """Return what the common layers give."""
        for layer in self.layers[: self.depth]:
            x = run(layer, TRUNK, x)
        return x


class Stitched(Networks):
    """Networks of tasks that read one another: a unit after each layer l mixes what all networks give.

    h_t^l = U_tt^l f_t^l(h_t^{l-1}) + 1 / (T - 1) sum_{s != t} U_ts^l f_s^l(h_s^{l-1})

    for T tasks, so that the scale does not depend on T; for T = 2 the equations are those of the papers.

    - "stitch": U_ts = alpha_ts, a number (cross-stitch; Misra et al. 2016, arXiv:1604.03539).
    - "nddr": U_ts, a matrix over channels, which is a 1 x 1 convolution of the networks' joined channels
      (NDDR-CNN; Gao et al. 2019, arXiv:1801.08297). It begins as a multiple of the identity; without norm.
    - "sluice": U_ts = alpha_ts [G, G] between G equal subspaces of the channels, and psi_t = sum_l beta_t^l
      h_t^l over layers of equal shape (sluice networks; Ruder et al. 2019, arXiv:1705.08142). Their penalty
      that makes subspaces orthogonal is not in it.

    U_tt begins at `own` and U_ts at `other` times the identity (of a sluice all entries of U_ts, and those
    off the diagonal of U_tt); beta at `own` for the last layer, and `other` / (layers - 1) for each other.
    With own = 1 and other = 0 they are independent networks. The entries are `stitch.<task>.<l>.<other
    task>`, and `stitch.<task>.beta` [L]. With `shared` = k the first k layers are common and have no unit.
    All networks are reached by the losses of all tasks. A unit between two tasks comes with the later.

    >>> from consilience.models import mlp
    >>> model = Stitched(mlp(4, (8, 8)), outputs=10, unit="stitch")
    >>> model.shared("nets.a.1.weight"), model.shared("stitch.a.1.b"), model.task_of("stitch.a.1.b")
    (True, False, 'a')
    """

    task_prefixes: ClassVar[tuple[str, ...]] = (HEADS, HIDDEN, NETS, STITCH)

    def __init__(
        self,
        trunk: ModuleModel | nn.Module | Factory,
        outputs: int,
        unit: Unit,
        own: float = 0.9,
        other: float = 0.1,
        shared: int = 0,
        hidden: Sequence[int] = (),
        subspaces: int = 2,
    ) -> None:
        super().__init__(trunk, outputs, shared, hidden)
        self.unit, self.own, self.other, self.subspaces = unit, float(own), float(other), subspaces
        if shared == len(self.layers):
            raise ConsilienceError(
                f"`shared` must leave a layer to the networks of tasks, got all {shared} of "
                f"{self.trunk.description}."
            )
        for name, value in (("own", own), ("other", other)):
            if not abs(value) < float("inf"):
                raise ConsilienceError(f"`{name}` must be finite, got {value}.")

    @property
    def name(self) -> str:
        known = {"stitch": "cross_stitch", "nddr": "nddr", "sluice": "sluice"}
        return f"{known[self.unit]}({self.trunk.name})"

    def __repr__(self) -> str:
        more = f", subspaces={self.subspaces}" if self.unit == "sluice" else ""
        facts = f"own={self.own}, other={self.other}, shared={self.depth}, hidden={self.hidden}{more}"
        return f"{self.name.partition('(')[0]}({self.trunk!r}, {self.outputs}, {facts})"

    @property
    def reads_others(self) -> bool:
        return True

    def shared(self, entry: str) -> bool:
        # The last unit and the betas make the features of their own task alone.
        if entry.startswith(STITCH):
            return entry.split(".")[2] not in (str(len(self.layers) - 1), "beta")
        return entry.startswith(NETS) or super().shared(entry)

    def own_entries(self, task: str, stages: Sequence[Tensor], generator: torch.Generator) -> Params:
        """Return the units of a task with itself, and its betas."""
        new = {self._unit_name(task, i, task): self._first(i, stages[i], True) for i in self._mixed}
        if self.unit != "sluice":
            return new

        shapes = {tuple(stages[i].shape[1:]) for i in self._mixed}
        if len(shapes) > 1:
            raise ConsilienceError(
                "a sluice network mixes layers of one shape for its heads, got "
                f"{', '.join(map(str, sorted(shapes)))}; give layers of equal width, or use cross_stitch."
            )
        others = len(self._mixed) - 1
        betas = [self.other / max(others, 1)] * others + [self.own]
        return {**new, f"{STITCH}{task}.beta": torch.tensor(betas)}

    def joined(self, params: Params) -> Params:
        """Return the parameters with units between all tasks."""
        present, new = tasks(params), Params()
        for task in present:
            for other in present:
                for i in self._mixed:
                    name, like = self._unit_name(task, i, other), self._unit_name(task, i, task)
                    if name not in params and like in params:
                        new[name] = self._between(params[like])
        return {**params, **new}

    @property
    def _mixed(self) -> range:
        """The layers that a unit follows."""
        return range(self.depth, len(self.layers))

    def _unit_name(self, task: str, layer: int, other: str) -> str:
        return f"{STITCH}{task}.{layer}.{other}"

    def _first(self, layer: int, out: Tensor, own: bool) -> Tensor:
        """Return the first value of a task's unit with itself, after a layer that gives `out`."""
        width = out.shape[self._channels(layer, out)]
        if self.unit == "stitch":
            return torch.tensor(self.own)
        if self.unit == "nddr":
            return self.own * torch.eye(width)
        if self.subspaces < 1 or width % self.subspaces:
            raise ConsilienceError(
                f"`subspaces` must divide the width of each layer, got {self.subspaces} for {width} channels."
            )
        eye = torch.eye(self.subspaces)
        return self.own * eye + self.other * (1 - eye)

    def _between(self, like: Tensor) -> Tensor:
        """Return the first value of a unit with another task."""
        if self.unit == "nddr":
            return self.other * torch.eye(len(like), dtype=like.dtype, device=like.device)
        return torch.full_like(like, self.other)

    def _channels(self, layer: int, out: Tensor) -> int:
        """Return the dimension of a layer's channels in its output [B, ...]: 1 of maps, else the last."""
        if out.dim() != 3:
            return 1
        # Tokens have their features last, and sequences of convolutions in the middle.
        try:
            return 1 if feature_axis(self.layers[layer].module).dim == 1 else 2
        except ConsilienceError:
            return 2

    def task_features(
        self, run: Run, params: Params, x: Input, wanted: Sequence[str], present: Sequence[str]
    ) -> dict[str, Tensor]:
        inputs: dict[str, Input] = dict.fromkeys(present, self._common(run, x))
        kept: dict[str, list[Tensor]] = {task: [] for task in wanted}
        for i in self._mixed:
            given = {task: run(self.layers[i], f"{NETS}{task}.", own) for task, own in inputs.items()}
            # After the last layer only the features that are asked for are mixed.
            readers = present if i + 1 < len(self.layers) else wanted
            mixed = {task: self._mix(params, task, i, given) for task in readers}
            for task in wanted:
                kept[task].append(mixed[task])
            inputs = dict(mixed)
        if self.unit != "sluice":
            return {task: layers[-1] for task, layers in kept.items()}
        found = {}
        for task, layers in kept.items():
            weighted = [part * h for part, h in zip(params[f"{STITCH}{task}.beta"], layers, strict=True)]
            found[task] = sum(weighted[1:], start=weighted[0])
        return found

    def _mix(self, params: Params, task: str, layer: int, given: dict[str, Tensor]) -> Tensor:
        """Return h_t^l from what the networks of all tasks give."""
        out = self._apply(params[self._unit_name(task, layer, task)], layer, given[task])
        # A network that was received without units to it has none yet.
        others = [o for o in given if o != task and self._unit_name(task, layer, o) in params]
        for other in others:
            unit = params[self._unit_name(task, layer, other)] / len(others)
            out = out + self._apply(unit, layer, given[other])
        return out

    def _apply(self, unit: Tensor, layer: int, h: Tensor) -> Tensor:
        """Return U h, over the channels of h."""
        if self.unit == "stitch":
            return unit * h
        h = h.movedim(self._channels(layer, h), -1)
        if self.unit == "nddr":
            h = F.linear(h, unit)
        else:
            h = (unit @ h.unflatten(-1, (self.subspaces, -1))).flatten(-2)
        return h.movedim(-1, self._channels(layer, h))

    def sharing(self, params: Params, buffers: Params, x: Input, task: str) -> dict[str, Sharing]:
        """Return the size of the unit of a task with each other, by layer; of matrices the mean diagonal."""
        own = escape(task)
        present = [other for other in tasks(params) if self._unit_name(own, self.depth, other) in params]
        if own not in present:
            return {}
        found = {}
        for i in self._mixed:
            units = [params[self._unit_name(own, i, other)] for other in present]
            sizes = [unit if unit.dim() == 0 else unit.diagonal().mean() for unit in units]
            found[f"layer {i}"] = Sharing(tuple(present), torch.stack(sizes)[None], False)
        if self.unit == "sluice":
            names = tuple(f"layer {i}" for i in self._mixed)
            found["skip"] = Sharing(names, params[f"{STITCH}{own}.beta"][None], False)
        return found
