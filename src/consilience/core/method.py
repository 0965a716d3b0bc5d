"""Methods: compositions of corrections, aggregators, a consolidator and a mapper. A method never asks which setting it is in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from consilience.core.aggregator import Aggregator, Cone
from consilience.core.consolidator import Consolidator
from consilience.core.correction import Correction, Mapper, overrides
from consilience.core.errors import ConsilienceError, Refusal, kind_of
from consilience.core.params import matches
from consilience.core.weight_space import WeightSpace

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts

NOTHING_KNOWN = {
    True: "no agent learns anything after it learned or heard of another source; it needs a schedule in which learning goes on after that",
    False: "it keeps what it knows to its agent, and no agent learns a second source; give agents several, one after another",
}


@dataclass(frozen=True)
class Method:
    """A name and the parts that make it.

    `aggregator` fills whichever of the two next fields the schedule uses; `step_aggregator` combines the objectives of one step (None: their weighted sum); `hear_aggregator` combines what is
    heard (None: the weighted mean), inside `consolidator` (None: parameters are averaged); `personal` are patterns of
    entries that stay with their agent ("head": the model's); `fixed` are fields of Training that the method itself sets.
    Methods add: `a + b` concatenates corrections; two different values of another field are an error.
    """

    name: str = ""
    corrections: tuple[Correction, ...] = ()
    aggregator: Aggregator | None = None
    step_aggregator: Aggregator | None = None
    exchange_aggregator: Aggregator | None = None
    consolidator: Consolidator | None = None
    mapper: Mapper | None = None
    personal: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [c.name for c in self.all_corrections]
        twice = {n for n in names if names.count(n) > 1}
        if twice:
            raise ConsilienceError(
                f"a composition should have each correction once. Found {', '.join(sorted(twice))} twice."
            )

    @property
    def all_corrections(self) -> tuple[Correction, ...]:
        """The corrections and the mapper."""
        return (*self.corrections, self.mapper) if self.mapper else self.corrections

    @property
    def active(self) -> tuple[Correction, ...]:
        """The corrections that differ from plain training at their hyperparameters; one that widens layers last."""
        return tuple(sorted((c for c in self.all_corrections if c.active), key=lambda c: c.changes_shapes))

    def resolve(self, facts: ScheduleFacts) -> Method:
        """This method for a schedule: `aggregator` put where it is used.

        Raises Refusal where a part could not act at all, by name, with what to do instead.
        """
        m = self
        facts = replace(facts, aware=facts.labelled or m.mapper is not None)
        constraining = [c.active for c in m.corrections if c.adds_constraints]
        if constraining and not any(constraining):
            m = replace(m, step_aggregator=None)  # a cone without constraints
        if m.aggregator is not None:
            step = m.step_aggregator or (m.aggregator if facts.parts > 1 else None)
            hear = m.exchange_aggregator or (m.aggregator if facts.receives_others else None)
            if step is None and hear is None:
                raise Refusal(
                    f"{m.name} has nothing to aggregate: one source a step and nobody hears another agent; use multitask, federated or merging."
                )
            m = replace(m, aggregator=None, step_aggregator=step, exchange_aggregator=hear)
        elif m.exchange_aggregator is not None and not facts.receives_others:
            raise Refusal(
                f"{m.name} combines what is heard, and nobody hears another agent here; use finetune, or a federated or merging setting."
            )
        if (
            m.exchange_aggregator is not None
            and not m.exchange_aggregator.needs_base
            and facts.most_received < 2
            and facts.stages > 1
            and not facts.repeats
        ):
            raise Refusal(
                f"{m.name} averages what is heard, and one model is heard at a time; use parameter_average, or finetune for the last."
            )
        rehearses = any(overrides(c, "sample") or overrides(c, "rows") for c in m.active)
        if m.step_aggregator is not None and facts.parts < 2 and not rehearses:
            raise Refusal(
                f"{m.name} aggregates the objectives of a step, and a step has one here; "
                "use multitask, compose it with er, or methods.aggregate to combine what is heard."
            )
        gathering = [type(c).__name__ for c in m.active if overrides(c, "gather")]
        if len(gathering) > 1:
            raise Refusal(
                f"{m.name}: only one part may say what a learn trains on. Found {' and '.join(gathering)}."
            )
        for c in m.active:
            if c.adds_constraints and not isinstance(m.step_aggregator, Cone):
                found = type(m.step_aggregator).__name__ if m.step_aggregator else "none"
                raise Refusal(
                    f"{m.name}: {type(c).__name__} needs a cone as step aggregator, such as aggregators.gem. Found {found}."
                )
            if c.needs_boundaries and not facts.boundaries:
                raise Refusal(
                    f"{m.name}: {type(c).__name__} needs to know where a source ends, and this stream has no ends; "
                    "use er, derpp, agem or online_ewc."
                )
            inert = c.needs_history and not (facts.shared_history if c.shared_items else facts.own_history)
            why = c.refuse(facts) or (NOTHING_KNOWN[c.shared_items] if inert else None)
            if why:
                raise Refusal(f"{m.name}: {type(c).__name__} would do nothing or do wrong here: {why}.")
        if m.mapper is not None and m.mapper.superposes and not any(overrides(c, "view") for c in m.active):
            raise Refusal(
                f"{m.name}: {type(m.mapper).__name__} would do nothing or do wrong here: no correction gives each task its own view of "
                "the parameters, so that there is nothing to superpose; compose it with supsup, psp, hat, packnet or xdg, or use min_entropy."
            )
        m = replace(m, consolidator=m.receiver(), exchange_aggregator=None, personal=m._personal(facts))
        if m.consolidator is not None and (why := m.consolidator.refuse(facts)):
            raise Refusal(f"{m.name}: {why}.")
        return m

    def _personal(self, facts: ScheduleFacts) -> tuple[str, ...]:
        """The patterns of personal entries, "head" put in the model's names; those with a slash name entries of corrections."""
        if facts.model is None or not self.personal:
            return self.personal
        import torch

        model, found = facts.model, []
        params, buffers = model.init(torch.Generator().manual_seed(0))
        for p in self.personal:
            if p == "head":
                try:
                    found += [n for n in model.head(params, None) if n is not None]
                except ConsilienceError:  # heads come with tasks
                    found.append("heads.*")
            else:
                found.append(p)
        for p in found:
            if "/" not in p and not facts.receives_others:
                raise Refusal(
                    f"{self.name} keeps entries from others, and nobody hears another agent here; use finetune."
                )
            if (
                "/" not in p
                and not any(matches(n, [p]) for n in (*params, *buffers))
                and model.task_of(p) is None
            ):
                raise Refusal(f"{self.name}: personal entries should be the model's. Found none like {p!r}.")
        return tuple(dict.fromkeys(found))

    def receiver(self) -> Consolidator:
        """The consolidator with the aggregator of what is heard; by default parameters are averaged."""
        c = self.consolidator or WeightSpace()
        return (
            replace(c, aggregator=self.exchange_aggregator)
            if isinstance(c, WeightSpace) and self.exchange_aggregator
            else c
        )

    def __add__(self, other: Method) -> Method:
        if not isinstance(other, Method):
            raise ConsilienceError(
                f"a method composes with a method, such as methods.er(). Found {kind_of(other)}."
            )
        values: dict[str, Any] = {
            "name": "+".join(n for n in (self.name, other.name) if n),
            "corrections": self.corrections + other.corrections,
            "personal": self.personal + tuple(p for p in other.personal if p not in self.personal),
            "fixed": {**self.fixed, **other.fixed},
        }
        for k in set(self.fixed) & set(other.fixed):
            if self.fixed[k] != other.fixed[k]:
                raise ConsilienceError(
                    f"methods to compose should agree. Found two values of `{k}` in {values['name']}."
                )
        for f in fields(self):
            if f.name not in values:
                a, b = getattr(self, f.name), getattr(other, f.name)
                if a is not None and b is not None and a != b:
                    raise ConsilienceError(
                        f"methods to compose should agree. Found two values of `{f.name}` in {values['name']}."
                    )
                values[f.name] = b if a is None else a
        return Method(**values)

    @staticmethod
    def of(methods: Method | list[Method] | tuple[Method, ...]) -> Method:
        """One method from one or several that compose."""
        if isinstance(methods, Method):
            return methods
        if not methods:
            raise ConsilienceError("a run should have a method. Found an empty list.")
        if not isinstance(methods, list | tuple) or not isinstance(methods[0], Method):
            found = methods[0] if isinstance(methods, list | tuple) else methods
            raise ConsilienceError(
                f"`method` should be made by consilience.methods, such as methods.er(). Found {kind_of(found)}."
            )
        total = methods[0]
        for m in methods[1:]:
            total = total + m
        return total
