"""Generative replay: a generator, which learns continually itself, makes inputs of earlier sources; no example is kept."""

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
from consilience.corrections.quadratic import non_negative

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts


@dataclass(frozen=True, eq=False)
class VAE:
    """A conditional variational autoencoder of flat inputs [B, d]; the condition [B] is the index of a source.

    q(z|x,c) = N(m(x,c), diag exp v(x,c)), p(z) = N(0, I), one ReLU layer each way; a condition adds a vector of its own to
    both hidden layers (a one-hot input). p(x|z,c) is Bernoulli, or where there is an entry `log_variance` a Gaussian with
    that one learned variance. Kingma & Welling 2014; Sohn et al. 2015.
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
        """Without any condition; uniform in +-1 / sqrt(inputs of the layer). `variance` None: Bernoulli."""
        weights: Params = {}
        shapes = {
            "enter": (inputs, hidden),
            "posterior": (hidden, 2 * latent),
            "decode": (latent, hidden),
            "mean": (hidden, inputs),
        }
        for name, (fan, out) in shapes.items():
            for leaf, shape in (("weight", (out, fan)), ("bias", (out,))):
                w = (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) / fan**0.5
                weights[f"{name}.{leaf}"] = w.to(like.device, like.dtype)
        weights |= {f"{name}.condition": like.new_zeros(0, hidden) for name in ("enter", "decode")}
        if variance is not None:
            weights["log_variance"] = like.new_tensor(math.log(max(variance, 1e-6)))
        return VAE(weights)

    @property
    def latent(self) -> int:
        return self.weights["decode.weight"].shape[1]

    def grown(self) -> VAE:
        """With one more condition, whose vectors are zero."""
        more = {
            k: torch.cat([w, w.new_zeros(1, w.shape[1])])
            for k, w in self.weights.items()
            if k.endswith("condition")
        }
        return VAE({**self.weights, **more})

    def to(self, like: Tensor) -> VAE:
        """On the device and in the type of a tensor."""
        return VAE({k: w.to(like.device, like.dtype) for k, w in self.weights.items()})

    def _layer(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _hidden(self, name: str, x: Tensor, c: Tensor) -> Tensor:
        return (self._layer(name, x) + self.weights[f"{name}.condition"].index_select(0, c)).relu()

    def decode(self, z: Tensor, c: Tensor) -> Tensor:
        """The parameter [B, d] of p(x|z,c): its mean, for Bernoulli the logit of it."""
        return self._layer("mean", self._hidden("decode", z, c))

    def elbo(self, x: Tensor, c: Tensor, noise: Tensor, beta: float = 1.0) -> Tensor:
        """log p(x|z,c) - beta KL(q(z|x,c) || p(z)) of each sample [B], summed over dimensions; z = m + exp(v / 2) noise [B, latent].

        >>> vae = VAE.init(2, 3, 1, None, torch.zeros(()), torch.Generator().manual_seed(0)).grown()
        >>> vae.elbo(torch.ones(5, 2), torch.zeros(5, dtype=torch.long), torch.zeros(5, 1)).shape
        torch.Size([5])
        """
        m, v = self._layer("posterior", self._hidden("enter", x, c)).chunk(2, 1)
        out = self.decode(m + (v / 2).exp() * noise, c)
        if "log_variance" in self.weights:
            s = self.weights["log_variance"]
            fit = -0.5 * ((x - out).square() / s.exp() + s + math.log(2 * math.pi))
        else:
            fit = -F.binary_cross_entropy_with_logits(out, x, reduction="none")
        kl = 0.5 * (m.square() + v.exp() - 1 - v)
        return fit.sum(1) - beta * kl.sum(1)

    @torch.no_grad()
    def generate(self, c: Tensor, generator: torch.Generator) -> Tensor:
        """The means [B, d] of p(x|z,c), z drawn from the prior."""
        z = torch.randn(len(c), self.latent, generator=generator, dtype=torch.float64)
        out = self.decode(z.to(self.weights["mean.bias"]), c.to(self.weights["mean.bias"].device))
        return out if "log_variance" in self.weights else out.sigmoid()


@dataclass(frozen=True, eq=False)
class Scholar:
    """What is known of the sources seen: the generator, (source, task, classes) of each of its conditions, and those to replay."""

    vae: VAE
    seen: Sequence[tuple[str, str | None, list[int]]]
    old: Sequence[int]
    """The conditions of other sources than those learned now."""
    shape: tuple[int, ...]
    """Of one input."""
    values: int
    """How many values a target has; 0 for classes."""

    def columns(self, task: str | None) -> list[int]:
        """The outputs that a task's earlier sources have taught."""
        return sorted({k for i in self.old if self.seen[i][1] == task for k in self.seen[i][2]})


@dataclass(frozen=True)
class GenerativeReplay(Correction):
    """Deep generative replay: generated inputs of earlier sources, with the answers of the model as it was.

    L = r L_new + (1 - r) L_generated. With `importance="sources"` r = 1/t at the t-th source: each earlier source has a part
    of the step, all of one weight, which share `batch_size`; with "equal" r = 1/2: one part, of sources (of one task) drawn
    alike. `labels="soft"`: T^2 KL(teacher / T || student / T), the teacher over the classes that its task was taught, the student over all;
    "hard": cross-entropy with the teacher's argmax. For values both are the squared error to its answers. The teacher is
    the model when this learn began.

    After a source the generator, one VAE with the source as condition (so that an input has a task), is trained on from what it was by Adam
    on the ELBO: each step has up to `batch_size` new inputs, and as many of each earlier source as its former self generates.
    `likelihood="auto"` is Bernoulli where the first source's inputs lie in [0, 1], else Gaussian. It replaces the one before, keeps
    no example, and is private, for a generator may reproduce rare samples. Shin et al. 2017; Kingma & Welling 2014.
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

    shared_items: ClassVar[bool] = False
    needs_boundaries: ClassVar[bool] = True
    neutral: ClassVar[dict[str, int]] = {"batch_size": 0}
    needs_history: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, low in (("batch_size", 0), ("hidden", 1), ("latent", 1), ("epochs", 1)):
            if getattr(self, name) < low:
                raise ConsilienceError(
                    f"`{name}` of the generator should be >= {low}. Found `{name} = {getattr(self, name)}`."
                )
        for name in ("lr", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConsilienceError(
                    f"`{name}` should be positive and finite. Found `{name} = {getattr(self, name)}`."
                )
        non_negative("GenerativeReplay", beta=self.beta)
        for name, allowed in (
            ("labels", ("soft", "hard")),
            ("importance", ("sources", "equal")),
            ("likelihood", ("auto", "bernoulli", "gaussian")),
        ):
            if getattr(self, name) not in allowed:
                raise ConsilienceError(
                    f"`{name}` should be {' or '.join(allowed)}. Found `{name} = {getattr(self, name)!r}`."
                )

    def refuse(self, facts: ScheduleFacts) -> str | None:
        if facts.parts > 1:
            return "a step has several sources, and the generator learns one after another; use settings.continual"
        return None

    def begin(self, start: Beginning) -> Begun:
        """Nothing is added: inputs that cannot be generated are refused before any training."""
        params, sources, known = start.params, start.sources, start.recalled
        for s in sources:
            x, _ = s.train.select(torch.arange(1)).whole()
            if not x.is_floating_point():
                raise ConsilienceError(
                    f"inputs to generate should be real numbers. Found {x.dtype} in {s.name!r}; use er."
                )
            if known is not None and tuple(x.shape[1:]) != known.shape:
                raise ConsilienceError(
                    f"inputs of one generator should have one shape. Found {tuple(x.shape[1:])} in {s.name!r}, before {known.shape}."
                )
            bernoulli = (
                self.likelihood == "bernoulli" if known is None else "log_variance" not in known.vae.weights
            )
            if bernoulli and not self._unit(s):
                raise ConsilienceError(
                    f"inputs of a Bernoulli generator should lie in [0, 1]. Found others in {s.name!r}; use likelihood='gaussian'."
                )
        return Begun(params)

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Scholar | None:
        """The generator, where it has seen other sources than these."""
        now = {s.name for s in sources}
        for item in memory.values():
            seen = [(name, task, list(classes)) for name, task, classes in item.meta["seen"]]
            old = [i for i, (name, *_) in enumerate(seen) if name not in now]
            if old:
                return Scholar(
                    VAE(dict(item.tensors)), seen, old, tuple(item.meta["shape"]), item.meta["values"]
                )
        return None

    def sample(self, ctx: Context, sources: tuple[Source, ...], generator: torch.Generator) -> list[Batch]:
        """A part for each earlier source, or one; their targets are put in `losses`."""
        known: Scholar = ctx.recalled
        assert ctx.layout is not None
        like = torch.zeros((), dtype=ctx.layout.dtype, device=ctx.layout.device)
        vae, old = known.vae.to(like), list(known.old)
        if self.importance == "sources":
            each, more = divmod(self.batch_size, len(old))
            drawn = [torch.full((max(1, each + (n < more)),), i) for n, i in enumerate(old)]
        else:
            one = old[int(torch.randint(len(old), (1,), generator=generator))]
            alike = torch.tensor([i for i in old if known.seen[i][1] == known.seen[one][1]])
            drawn = [alike[torch.randint(len(alike), (self.batch_size,), generator=generator)]]
        parts = []
        for c in drawn:
            names = dict.fromkeys(known.seen[i][0] for i in c.tolist())
            _, task, classes = known.seen[int(c[0])]
            x = vae.generate(c, generator).view(len(c), *known.shape)
            y = (
                like.new_zeros(len(c), known.values)
                if known.values
                else torch.full((len(c),), classes[0], device=like.device)
            )
            parts.append(Batch(x, y, task, source="+".join(names)))
        return parts

    def losses(self, losses: dict[int, Tensor], step: StepView, ctx: Context) -> dict[int, Tensor]:
        """Those of the generated parts: against the answers of the model as it was."""
        bent = dict(losses)
        for i, p in enumerate(step.parts):
            if p.drawn_by != self.name:
                continue
            out, teacher = step.outputs[i], step.before(p.x, p.task)
            if ctx.recalled.values:
                bent[i] = (out - teacher)[:, : ctx.recalled.values].square().mean(1)
                continue
            columns = torch.tensor(ctx.recalled.columns(p.task), device=out.device)
            if self.labels == "hard":
                bent[i] = F.cross_entropy(
                    out, columns[teacher.index_select(1, columns).argmax(1)], reduction="none"
                )
                continue
            t = (teacher.index_select(1, columns) / self.temperature).log_softmax(1)
            s = (out / self.temperature).log_softmax(1).index_select(1, columns)
            bent[i] = self.temperature**2 * (t.exp() * (t - s)).sum(1)
        return bent

    def summarise(self, learned: Learned, ctx: Context) -> Private:
        """The generator after this source; it replaces the one before (`trim`)."""
        source, known = learned.source, ctx.recalled
        x, y = next(iter(source.train.chunks(1)))
        generator = learned.generator
        before: VAE | None = None if known is None else known.vae.to(x)
        seen = [] if known is None else list(known.seen)
        vae = before or VAE.init(x[0].numel(), self.hidden, self.latent, self._variance(source), x, generator)
        if source.name not in [name for name, *_ in seen]:
            vae, seen = vae.grown(), [*seen, (source.name, None, [])]
        now = [name for name, *_ in seen].index(source.name)
        seen[now] = (source.name, learned.task, list(source.classes))
        with torch.enable_grad():
            vae = self._train(vae, before, source, now, [] if known is None else known.old, generator)
        finite(
            vae.weights,
            f"the generator after {source.name!r} (a lower lr of it helps where its training diverges)",
        )
        meta = {
            "seen": seen,
            "shape": list(x.shape[1:]),
            "values": y.shape[1] if y.is_floating_point() else 0,
            "order": learned.order,
        }
        return Private(vae.weights, meta)

    def trim(self, memory: Mapping[str, Any], learned: Learned) -> Mapping[str, Any]:
        """The newest generator alone: it is the whole knowledge."""
        newest = max(memory, key=lambda s: memory[s].meta["order"])
        return {newest: memory[newest]}

    def _train(
        self,
        vae: VAE,
        before: VAE | None,
        source: Source,
        now: int,
        old: Sequence[int],
        generator: torch.Generator,
    ) -> VAE:
        """Adam on -ELBO over a new batch and, of each earlier source, as many generated by `before`."""
        leaves = {k: w.clone().requires_grad_() for k, w in vae.weights.items()}
        vae, adam = VAE(leaves), torch.optim.Adam(leaves.values(), lr=self.lr)
        for _ in range(self.epochs):
            plan = torch.randperm(len(source.train), generator=generator).split(self.batch_size)
            for x, _ in source.train.batches(plan):
                x, c = x.flatten(1), torch.full((len(x),), now)
                if before is not None and old:
                    replayed = torch.tensor(old).repeat_interleave(len(x))
                    x, c = torch.cat([x, before.generate(replayed, generator)]), torch.cat([c, replayed])
                noise = torch.randn(len(x), vae.latent, generator=generator, dtype=torch.float64).to(x)
                adam.zero_grad()
                (-vae.elbo(x, c.to(x.device), noise, self.beta).mean()).backward()
                adam.step()
        return VAE({k: w.detach() for k, w in leaves.items()})

    def _unit(self, source: Source) -> bool:
        return all(bool(((x >= 0) & (x <= 1)).all()) for x, _ in source.train.chunks(4096))

    def _variance(self, source: Source) -> float | None:
        """None for a Bernoulli likelihood, else where the Gaussian's variance begins: that of the inputs around their mean."""
        if self.likelihood == "bernoulli" or (self.likelihood == "auto" and self._unit(source)):
            return None
        n, total, squares = 0, 0.0, 0.0
        for x, _ in source.train.chunks(4096):
            n, total, squares = (
                n + x.numel(),
                total + float(x.double().sum()),
                squares + float(x.double().square().sum()),
            )
        return squares / n - (total / n) ** 2
