"""Generative replay: a generator makes inputs of earlier sources, so that no example needs to be stored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from consilience.core.batch import Batch
from consilience.core.contexts import Beginning, Begun, Context, Learned, Memory, StepView
from consilience.core.correction import Correction
from consilience.core.errors import ConsilienceError
from consilience.core.message import Private
from consilience.core.params import Params, finite
from consilience.core.source import Source
from consilience.core.tree import one_tensor
from consilience.corrections.quadratic import non_negative

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts


@dataclass(frozen=True, eq=False)
class VAE:
    """A conditional variational autoencoder of flat inputs [B, d]; condition [B] is the index of a source.

    q(z|x,c) = N(m(x,c), diag exp v(x,c)), p(z) = N(0, I), one ReLU layer each way; a condition adds its own
    vector to both hidden layers (a one-hot input). p(x|z,c) is Bernoulli, or, if there is an entry
    `log_variance`, a Gaussian with that one trained variance. Kingma & Welling 2014; Sohn et al. 2015.
    """

    weights: Params

    @staticmethod
    def init(
        inputs: int,
        hidden: int,
        latent: int,
        variance: float | None,
        like: Tensor,
        generator: torch.Generator,
    ) -> VAE:
        """Draw one without conditions, uniform in +-1 / sqrt(layer inputs). `variance` None: Bernoulli.

        Weights have the device and type of `like`.
        """
        weights: Params = {}
        shapes = {
            "enter": (inputs, hidden),
            "posterior": (hidden, 2 * latent),
            "decode": (latent, hidden),
            "mean": (hidden, inputs),
        }

        # Drawn in float64 on the CPU, so that every device and precision begins alike.
        for name, (fan, out) in shapes.items():
            for leaf, shape in (("weight", (out, fan)), ("bias", (out,))):
                drawn = (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) / fan**0.5
                weights[f"{name}.{leaf}"] = drawn.to(like.device, like.dtype)

        # Conditions are added by `grown`, one per source.
        weights |= {f"{name}.condition": like.new_zeros(0, hidden) for name in ("enter", "decode")}
        if variance is not None:
            weights["log_variance"] = like.new_tensor(math.log(max(variance, 1e-6)))
        return VAE(weights)

    @property
    def latent(self) -> int:
        """The number of dimensions of z."""
        return self.weights["decode.weight"].shape[1]

    @property
    def bernoulli(self) -> bool:
        """Whether p(x|z,c) is Bernoulli."""
        return "log_variance" not in self.weights

    def grown(self) -> VAE:
        """Add a condition, whose vectors are zero."""
        more = {
            name: torch.cat([weight, weight.new_zeros(1, weight.shape[1])])
            for name, weight in self.weights.items()
            if name.endswith("condition")
        }
        return VAE({**self.weights, **more})

    def to(self, like: Tensor) -> VAE:
        """Move to the device and type of a tensor."""
        return VAE({name: weight.to(like.device, like.dtype) for name, weight in self.weights.items()})

    def _layer(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _hidden(self, name: str, x: Tensor, c: Tensor) -> Tensor:
        return (self._layer(name, x) + self.weights[f"{name}.condition"].index_select(0, c)).relu()

    def decode(self, z: Tensor, c: Tensor) -> Tensor:
        """Return the parameter [B, d] of p(x|z,c): its mean, for Bernoulli the logit of it."""
        return self._layer("mean", self._hidden("decode", z, c))

    def elbo(self, x: Tensor, c: Tensor, noise: Tensor, beta: float = 1.0) -> Tensor:
        """Return log p(x|z,c) - beta KL(q(z|x,c) || p(z)) per sample [B], summed over dimensions.

        z = m + exp(v / 2) noise, with `noise` [B, latent].

        >>> vae = VAE.init(2, 3, 1, None, torch.zeros(()), torch.Generator().manual_seed(0)).grown()
        >>> vae.elbo(torch.ones(5, 2), torch.zeros(5, dtype=torch.long), torch.zeros(5, 1)).shape
        torch.Size([5])
        """
        m, v = self._layer("posterior", self._hidden("enter", x, c)).chunk(2, 1)
        out = self.decode(m + (v / 2).exp() * noise, c)
        if self.bernoulli:
            fit = -F.binary_cross_entropy_with_logits(out, x, reduction="none")
        else:
            s = self.weights["log_variance"]
            fit = -0.5 * ((x - out).square() / s.exp() + s + math.log(2 * math.pi))
        kl = 0.5 * (m.square() + v.exp() - 1 - v)
        return fit.sum(1) - beta * kl.sum(1)

    @torch.no_grad()
    def generate(self, c: Tensor, generator: torch.Generator) -> Tensor:
        """Return the means [B, d] of p(x|z,c), z drawn from the prior."""
        # Means and not samples: the noise of p(x|z,c) would only blur them.
        z = torch.randn(len(c), self.latent, generator=generator, dtype=torch.float64)
        out = self.decode(z.to(self.weights["mean.bias"]), c.to(self.weights["mean.bias"].device))
        return out.sigmoid() if self.bernoulli else out


# A dataclass, so that verbs read it by name on every engine.
@dataclass(frozen=True)
class Taught:
    """A source of the generator: its name, the task that the model was given, its classes."""

    source: str
    task: str | None
    classes: list[int]


@dataclass(frozen=True, eq=False)
class Scholar:
    """The generator, and the sources that it was trained on, one per condition."""

    vae: VAE
    taught: Sequence[Taught]
    old: Sequence[int]
    """The conditions of other sources than those of this visit."""
    shape: tuple[int, ...]
    """The shape of an input."""
    values: int
    """How many values a target has; 0 for classes."""

    def columns(self, task: str | None) -> list[int]:
        """Return the outputs that a task's earlier sources taught."""
        of_task = (self.taught[i] for i in self.old if self.taught[i].task == task)
        return sorted({label for taught in of_task for label in taught.classes})


@dataclass(frozen=True)
class GenerativeReplay(Correction):
    """Deep generative replay: generated inputs of earlier sources, with the former model's answers.

    L = r L_new + (1 - r) L_generated. With `importance="sources"` r = 1/t at the t-th source: each earlier
    source has a part of the step, all of one weight, which share `batch_size`; with "equal" r = 1/2: one
    part, of sources (of one task) drawn alike. `labels="soft"`: T^2 KL(teacher / T || student / T), the
    teacher over the classes that its task was taught, the student over all; "hard": cross-entropy with the
    teacher's argmax. For values both are the squared error to its answers. The teacher is the model at the
    start of the visit.

    After a source the generator, one VAE with the source as condition (so that an input has a task), is
    trained further by Adam on the ELBO: each step has up to `batch_size` new inputs, and as many per earlier
    source, generated by the VAE before this visit. `likelihood="auto"` is Bernoulli if the first source's
    inputs lie in [0, 1], else Gaussian. The new generator replaces the old one. It stores no example, but it
    is private, because a generator may reproduce rare samples. Shin et al. 2017; Kingma & Welling 2014.
    """

    batch_size: int = 32
    hidden: int = 256
    latent: int = 32
    epochs: int = 20
    lr: float = 1e-3
    beta: float = 1.0
    temperature: float = 2.0
    labels: Literal["soft", "hard"] = "soft"
    importance: Literal["sources", "equal"] = "sources"
    likelihood: Literal["auto", "bernoulli", "gaussian"] = "auto"

    kinds: ClassVar[tuple[str, ...]] = ("class", "value")
    takes_places: ClassVar[bool] = False
    takes_mixed: ClassVar[bool] = False
    takes_trees: ClassVar[bool] = False
    instead: ClassVar[str] = "use er"
    shared_items: ClassVar[bool] = False
    needs_boundaries: ClassVar[bool] = True
    neutral: ClassVar[dict[str, int]] = {"batch_size": 0}
    needs_history: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, low in (("batch_size", 0), ("hidden", 1), ("latent", 1), ("epochs", 1)):
            if getattr(self, name) < low:
                raise ConsilienceError(
                    f"`{name}` of the generator must be >= {low}, got {getattr(self, name)}."
                )
        for name in ("lr", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConsilienceError(f"`{name}` must be positive and finite, got {getattr(self, name)}.")
        non_negative("GenerativeReplay", beta=self.beta)

        # The annotations say the same, but nothing checks them at run time.
        for name, allowed in (
            ("labels", ("soft", "hard")),
            ("importance", ("sources", "equal")),
            ("likelihood", ("auto", "bernoulli", "gaussian")),
        ):
            if getattr(self, name) not in allowed:
                raise ConsilienceError(
                    f"`{name}` must be {' or '.join(allowed)}, got {getattr(self, name)!r}."
                )

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if facts.parts > 1:
            return (
                "a step has several sources, and the generator is trained on one after another; "
                "use settings.continual"
            )
        if len(facts.inputs) > 1:
            return "all inputs of a generator must have one shape, and here they differ; use er"
        return None

    def begin(self, start: Beginning) -> Begun:
        """Add nothing, but refuse inputs that cannot be generated before any training.

        Raises ConsilienceError for inputs that are no real numbers, of another shape than before, or outside
        [0, 1] where the likelihood is Bernoulli.
        """
        scholar: Scholar | None = start.recalled
        for source in start.sources:
            x, _ = source.train.first()
            if not x.is_floating_point():
                raise ConsilienceError(
                    f"inputs to generate must be real numbers, got {x.dtype} in {source.name!r}; use er."
                )
            shape = tuple(x.shape[1:])
            if scholar is not None and shape != scholar.shape:
                raise ConsilienceError(
                    f"all inputs of a generator must have one shape, got {shape} in {source.name!r} "
                    f"after {scholar.shape}; use er."
                )

            # A generator keeps the likelihood with which it began; "auto" chooses one that suits.
            bernoulli = self.likelihood == "bernoulli" if scholar is None else scholar.vae.bernoulli
            if bernoulli and not in_unit_interval(source):
                raise ConsilienceError(
                    f"inputs of a Bernoulli generator must lie in [0, 1], got others in {source.name!r}; "
                    "use likelihood='gaussian'."
                )
        return Begun(start.params)

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Scholar | None:
        """Return the generator, if it was trained on other sources than these."""
        names = {source.name for source in sources}
        # `trim` leaves one item, which knows all sources.
        for item in memory.values():
            taught = [Taught(name, task, list(classes)) for name, task, classes in item.meta["seen"]]
            old = [i for i, one in enumerate(taught) if one.source not in names]
            if old:
                vae = VAE(dict(item.tensors))
                return Scholar(vae, taught, old, tuple(item.meta["shape"]), item.meta["values"])
        return None

    def sample(self, ctx: Context, sources: tuple[Source, ...], generator: torch.Generator) -> list[Batch]:
        """Return a part per earlier source, or one of all; `losses` computes their targets."""
        scholar: Scholar = ctx.recalled
        assert ctx.layout is not None
        like = torch.zeros((), dtype=ctx.layout.dtype, device=ctx.layout.device)
        vae, parts = scholar.vae.to(like), []
        for conditions in self._conditions(scholar, generator):
            first = scholar.taught[int(conditions[0])]
            x = vae.generate(conditions, generator).view(len(conditions), *scholar.shape)

            # Nobody reads these targets, but a part must have some of the right kind.
            if scholar.values:
                y = like.new_zeros(len(conditions), scholar.values)
            else:
                y = torch.full((len(conditions),), first.classes[0], device=like.device)
            parts.append(Batch(x, y, first.task))
        return parts

    def _conditions(self, scholar: Scholar, generator: torch.Generator) -> list[Tensor]:
        """Return the conditions [B] of each part to generate."""
        old = list(scholar.old)
        if self.importance == "sources":
            each, more = divmod(self.batch_size, len(old))
            sizes = [max(1, each + (number < more)) for number in range(len(old))]
            return [torch.full((size,), i) for size, i in zip(sizes, old, strict=True)]

        # A part has one task, so that it is of the sources of one.
        one = old[int(torch.randint(len(old), (1,), generator=generator))]
        alike = torch.tensor([i for i in old if scholar.taught[i].task == scholar.taught[one].task])
        return [alike[torch.randint(len(alike), (self.batch_size,), generator=generator)]]

    def losses(self, losses: dict[int, Tensor], step: StepView, ctx: Context) -> dict[int, Tensor]:
        """Replace the losses of generated parts by those against the model before this visit."""
        scholar: Scholar = ctx.recalled
        changed = dict(losses)
        for i, part in enumerate(step.parts):
            if part.drawn_by != self.name:
                continue
            out, teacher = step.outputs[i], step.before(part.x, part.task)
            if scholar.values:
                changed[i] = (out - teacher)[:, : scholar.values].square().mean(1)
            else:
                # The teacher's other columns were never trained for this task.
                columns = torch.tensor(scholar.columns(part.task), device=out.device)
                changed[i] = self._distilled(out, teacher.index_select(1, columns), columns)
        return changed

    def _distilled(self, out: Tensor, teacher: Tensor, columns: Tensor) -> Tensor:
        """Return the losses [B] of outputs [B, C] against those of the teacher over some columns."""
        if self.labels == "hard":
            return F.cross_entropy(out, columns[teacher.argmax(1)], reduction="none")
        # The student's softmax is over all columns, so that mass on new classes costs something.
        target = (teacher / self.temperature).log_softmax(1)
        student = (out / self.temperature).log_softmax(1).index_select(1, columns)
        return self.temperature**2 * (target.exp() * (target - student)).sum(1)

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        """Return the generator after this source; it replaces the one before (in `trim`)."""
        source, scholar, generator = learned.source, ctx.recalled, learned.generator
        inputs, y = next(iter(source.train.chunks(1)))
        x = one_tensor(inputs, "generative replay")
        before: VAE | None = None if scholar is None else scholar.vae.to(x)
        taught = [] if scholar is None else list(scholar.taught)
        vae = before or VAE.init(x[0].numel(), self.hidden, self.latent, self._variance(source), x, generator)

        # A source that comes again has its condition already.
        names = [one.source for one in taught]
        if source.name not in names:
            vae, taught, names = vae.grown(), [*taught, Taught(source.name, None, [])], [*names, source.name]
        current = names.index(source.name)
        taught[current] = Taught(source.name, learned.task, list(source.classes))

        # The caller may have switched gradients off.
        old = [] if scholar is None else scholar.old
        with torch.enable_grad():
            vae = self._train(vae, before, source, current, old, generator)
        finite(
            vae.weights,
            f"the generator after {source.name!r} (a lower lr of it helps where its training diverges)",
        )
        meta = {
            "seen": [(one.source, one.task, one.classes) for one in taught],
            "shape": list(x.shape[1:]),
            "values": y.shape[1] if y.is_floating_point() else 0,
            "order": learned.order,
        }
        return Private(vae.weights, meta)

    def trim(self, memory: Mapping[str, Any], learned: Learned) -> Mapping[str, Any]:
        """Keep only the newest generator, since it was trained on all sources."""
        newest = max(memory, key=lambda source: memory[source].meta["order"])
        return {newest: memory[newest]}

    def _train(
        self,
        vae: VAE,
        before: VAE | None,
        source: Source,
        current: int,
        old: Sequence[int],
        generator: torch.Generator,
    ) -> VAE:
        """Minimise -ELBO by Adam over new batches and, per old source, as many inputs from `before`."""
        leaves = {name: weight.clone().requires_grad_() for name, weight in vae.weights.items()}
        vae, adam = VAE(leaves), torch.optim.Adam(leaves.values(), lr=self.lr)
        for _ in range(self.epochs):
            plan = torch.randperm(len(source.train), generator=generator).split(self.batch_size)
            for batch, _ in source.train.batches(plan):
                x = one_tensor(batch, "generative replay").flatten(1)
                conditions = torch.full((len(batch),), current)
                if before is not None and old:
                    replayed = torch.tensor(old).repeat_interleave(len(x))
                    x = torch.cat([x, before.generate(replayed, generator)])
                    conditions = torch.cat([conditions, replayed])

                # Drawn on the CPU in float64, as all that is random here.
                noise = torch.randn(len(x), vae.latent, generator=generator, dtype=torch.float64).to(x)
                adam.zero_grad()
                (-vae.elbo(x, conditions.to(x.device), noise, self.beta).mean()).backward()
                adam.step()
        return VAE({name: weight.detach() for name, weight in leaves.items()})

    def _variance(self, source: Source) -> float | None:
        """Return the Gaussian's first variance: that of the inputs around their mean; None for Bernoulli."""
        if self.likelihood == "bernoulli" or (self.likelihood == "auto" and in_unit_interval(source)):
            return None

        # By chunks, because the inputs may not fit into memory at once.
        count, total, squares = 0, 0.0, 0.0
        for inputs, _ in source.train.chunks(4096):
            x = one_tensor(inputs, "generative replay")
            count += x.numel()
            total += float(x.double().sum())
            squares += float(x.double().square().sum())
        return squares / count - (total / count) ** 2


def in_unit_interval(source: Source) -> bool:
    """Whether all training inputs lie in [0, 1]."""
    chunks = (one_tensor(x, "generative replay") for x, _ in source.train.chunks(4096))
    return all(bool(((x >= 0) & (x <= 1)).all()) for x in chunks)
