"""Methods: compositions of corrections, aggregators, a consolidator and a mapper.

A method never asks which setting it is in. It refuses a schedule in which a part could not act.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from consilience.core.aggregator import Aggregator, Cone, Linear, Stateful
from consilience.core.consolidator import Consolidator
from consilience.core.correction import Correction, Mapper, overrides
from consilience.core.errors import ConsilienceError, Refusal, kind_of
from consilience.core.params import matches
from consilience.core.weight_space import WeightSpace, factor_pair

if TYPE_CHECKING:
    from consilience.core.schedule import ScheduleFacts


class Rule(NamedTuple):
    """A reason to refuse a method in a schedule."""

    applies: bool
    reason: str
    remedy: str
    """What to do instead; "" where the reason says it."""

    @property
    def text(self) -> str:
        """The reason, and what to do instead."""
        return f"{self.reason}; {self.remedy}" if self.remedy else self.reason


@dataclass(frozen=True)
class Method:
    """A name and the parts that make a method.

    Methods add: `a + b` has the corrections of both. Two different values of another field are an error.
    """

    name: str = ""
    corrections: tuple[Correction, ...] = ()
    """How training changes, in the order in which they act."""
    aggregator: Aggregator | None = None
    """Fills `step_aggregator` or `exchange_aggregator`, whichever the schedule uses."""
    step_aggregator: Aggregator | None = None
    """Combines the objectives of one step. None: their weighted sum."""
    step_level: Literal["features"] | None = None
    """"features": the step aggregator weighs objectives by their gradients with respect to the features.

    One backward pass from the features then serves all objectives. None: by those with respect to the
    parameters, one backward pass each."""
    exchange_aggregator: Aggregator | None = None
    """Combines received parameters inside the consolidator. None: their weighted mean."""
    consolidator: Consolidator | None = None
    """Puts received messages into the state. None: `WeightSpace`, which combines parameters."""
    mapper: Mapper | None = None
    """Weights experts for each input. None: experts are averaged."""
    personal: tuple[str, ...] = ()
    """Patterns of entries that stay with their agent ("head": the model's head)."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Training` that the method sets itself."""

    def __post_init__(self) -> None:
        if not isinstance(self.corrections, tuple) or not all(
            isinstance(c, Correction) for c in self.corrections
        ):
            raise ConsilienceError(
                "`corrections` must be a tuple of corrections, as in Method('name', (EWC(),)), "
                f"got {kind_of(self.corrections)}."
            )
        if self.step_level not in (None, "features"):
            raise ConsilienceError(f"`step_level` must be 'features' or None, got {self.step_level!r}.")
        names = [correction.name for correction in self.all_corrections]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ConsilienceError(
                f"a composition must have each correction once, got {', '.join(sorted(twice))} twice."
            )

    @property
    def all_corrections(self) -> tuple[Correction, ...]:
        """The corrections and the mapper."""
        return (*self.corrections, self.mapper) if self.mapper else self.corrections

    @property
    def active(self) -> tuple[Correction, ...]:
        """The corrections that differ from plain training; those that change shapes come last."""
        active = (correction for correction in self.all_corrections if correction.active)
        # A stable sort: otherwise the order is the user's.
        return tuple(sorted(active, key=lambda correction: correction.changes_shapes))

    def resolve(self, facts: ScheduleFacts) -> Method:
        """Return this method with its parts in their places for a schedule.

        Raises Refusal where a part could not act, with its name and what to do instead.
        """
        facts = replace(facts, aware=facts.labelled or self.mapper is not None)
        placed = self._placed(facts)
        for rule in self._rules(placed, facts):
            if rule.applies:
                raise Refusal(f"{self.name}: {rule.text}.")

        receiver = placed.receiver().informed(facts)
        self._check_senders(receiver, facts)
        # The model is initialised for the names of its entries, so this comes after all that costs nothing.
        personal = placed._personal_entries(facts)
        if reason := receiver.unfit(facts) or receiver.refuse(facts):
            raise Refusal(f"{self.name}: {reason}.")
        self._check_factors(receiver, facts, personal)
        return replace(placed, consolidator=receiver, exchange_aggregator=None, personal=personal)

    def _check_senders(self, receiver: Consolidator, facts: ScheduleFacts) -> None:
        """Refuse experts with models of their own where entries are used, and incomplete ones where asked."""
        name = type(receiver).__name__
        others = [sender for sender, known in facts.senders.items() if known.model is not None]
        if others and not receiver.asks:
            raise Refusal(
                f"{self.name}: {name} uses the entries of received models, and the expert {others[0]!r} has "
                "its own; use exmodel_distillation, or leave out its `model` where it is the run's."
            )
        if receiver.asks and self.personal:
            raise Refusal(
                f"{self.name}: {name} asks received models for answers, and without the personal entries "
                f"({', '.join(self.personal)}) they have none; leave them out."
            )

    def _check_factors(self, receiver: Consolidator, facts: ScheduleFacts, personal: tuple[str, ...]) -> None:
        """Refuse to combine both factors of a product, such as those of LoRA."""
        if facts.model is None or not (isinstance(receiver, WeightSpace) and receiver.combines(facts)):
            return
        params, _ = facts.model.init(torch.Generator().manual_seed(0))
        pair = factor_pair(n for n in params if not facts.model.frozen(n) and not matches(n, personal))
        # The product of two means is not the mean of the products; with one factor in common it is.
        if pair is not None:
            raise Refusal(
                f"{self.name}: it would combine {pair[0]!r} and {pair[1]!r} one by one, and the model uses "
                "their product, whose mean is another; freeze every lora_A (requires_grad=False), or keep "
                "it personal, or merge adapters with cs.merge."
            )

    def _placed(self, facts: ScheduleFacts) -> Method:
        """Return this method with `aggregator` moved to where the schedule has something to aggregate."""
        step = self.step_aggregator
        constraints = [correction.active for correction in self.corrections if correction.adds_constraints]
        if constraints and not any(constraints):
            # The cone came with corrections whose hyperparameters make them plain training.
            step = None
        if self.aggregator is None:
            return replace(self, step_aggregator=step)

        if step is None and facts.parts > 1:
            step = self.aggregator
        exchange = self.exchange_aggregator
        if exchange is None and facts.receives_others:
            exchange = self.aggregator
        # An aggregator that found no place is refused by the first rule.
        left = self.aggregator if step is None and exchange is None else None
        return replace(self, aggregator=left, step_aggregator=step, exchange_aggregator=exchange)

    def _rules(self, placed: Method, facts: ScheduleFacts) -> Iterator[Rule]:
        """Yield the rules in the order in which users should read them.

        One after another, because later rules ask corrections that count on the earlier ones.
        """
        exchange, step = placed.exchange_aggregator, placed.step_aggregator

        # What is aggregated, and where.
        yield Rule(
            placed.aggregator is not None,
            "it has nothing to aggregate: a step has one source, and no agent receives from another",
            "use multitask, federated or merging",
        )
        yield Rule(
            self.aggregator is None and exchange is not None and not facts.receives_others,
            "it combines received models, and no agent receives from another here",
            "use finetune, or a federated or merging setting",
        )
        # The mean of one model is that model. One stage is a merge of what is given, which may be one model.
        one_at_a_time = facts.most_received < 2 and facts.stages > 1 and not facts.repeats
        yield Rule(
            exchange is not None and not exchange.needs_base and one_at_a_time,
            "it averages received models, and one is received at a time",
            "use parameter_average, or finetune for the last model",
        )
        yield Rule(
            isinstance(exchange, Stateful),
            f"{type(exchange).__name__} remembers earlier calls by the names of its rows, which models lack",
            "use one without a memory, such as pcgrad",
        )
        for combines in (exchange, step):
            # Rows of its own may be constraints, whatever a part says of itself.
            sets = (part.adds_constraints or overrides(part, "rows") for part in placed.active)
            constrained = combines is step and any(sets)
            name = type(combines).__name__
            yield Rule(
                isinstance(combines, Cone) and not constrained,
                f"{name} keeps to constraints, and here nothing sets any, so that it would be the mean",
                "use mean, or methods.gem and methods.agem with an earlier source",
            )
            yield Rule(
                combines is not None and combines.takes_entry_weights,
                f"{name} weighs entries by importances, which come with no row here: it would be the mean",
                "use methods.fisher_merging, or cs.merge with importances",
            )
        for combines, count, what in (
            (exchange, facts.most_received, "models are received"),
            (step, facts.parts, "tasks stand in a step"),
        ):
            most = None if combines is None else combines.most_rows
            yield Rule(
                most is not None and count > most,
                f"{type(combines).__name__} combines {most} rows, and {count} {what}",
                "use mean, or fewer",
            )
        # Rehearsal and further rows are objectives of their own, also where a step has one source.
        rehearses = any(overrides(part, "sample") or overrides(part, "rows") for part in placed.active)
        yield Rule(
            step is not None and facts.parts < 2 and not rehearses,
            "it aggregates the objectives of a step, and a step has one here",
            "use multitask, compose it with er, or combine received models with methods.aggregate",
        )

        if self.step_level is not None:
            yield from _feature_rules(placed, facts, rehearses)

        # What each correction needs.
        gathering = [type(part).__name__ for part in placed.active if overrides(part, "gather")]
        yield Rule(
            len(gathering) > 1,
            f"only one part may choose what a visit trains on, got {' and '.join(gathering)}",
            "leave one out",
        )

        for correction in placed.active:
            yield from _correction_rules(correction, step, facts)

        views = any(overrides(part, "view") for part in placed.active)
        yield Rule(
            placed.mapper is not None and placed.mapper.superposes and not views,
            f"{type(placed.mapper).__name__} would do nothing or do wrong here: no correction gives each "
            "task its own view of the parameters, so that there is nothing to superpose",
            "compose it with supsup, psp, hat, packnet or xdg, or use min_entropy",
        )

    def _personal_entries(self, facts: ScheduleFacts) -> tuple[str, ...]:
        """Return the patterns of personal entries, with "head" replaced by the names of the model's head.

        Patterns with a slash name entries that corrections add.
        """
        if facts.model is None or not self.personal:
            return self.personal

        model = facts.model
        params, buffers = model.init(torch.Generator().manual_seed(0))
        patterns: list[str] = []
        for pattern in self.personal:
            if pattern != "head":
                patterns.append(pattern)
                continue
            try:
                patterns += [name for name in model.head(params, None) if name is not None]
            except ConsilienceError:
                # There is no common head: heads come with their tasks.
                patterns.append("heads.*")

        for pattern in patterns:
            # No model has these before the correction adds them, so they cannot be looked up.
            if "/" in pattern:
                continue
            if not facts.receives_others:
                raise Refusal(
                    f"{self.name}: it keeps entries to their agent, and no agent receives from another here; "
                    "use finetune."
                )
            known = any(matches(name, [pattern]) for name in (*params, *buffers))
            if not known and model.task_of(pattern) is None:
                raise Refusal(
                    f"{self.name}: personal entries must be the model's, got {pattern!r} that it lacks."
                )
        return tuple(dict.fromkeys(patterns))

    def receiver(self) -> Consolidator:
        """Return the consolidator that agents use: `consolidator`, or `WeightSpace` where there is none.

        A `WeightSpace` gets `exchange_aggregator`, if there is one; other consolidators combine in their own
        way.
        """
        consolidator = self.consolidator or WeightSpace()
        if isinstance(consolidator, WeightSpace) and self.exchange_aggregator:
            return replace(consolidator, aggregator=self.exchange_aggregator)
        return consolidator

    def __add__(self, other: Method) -> Method:
        if not isinstance(other, Method):
            raise ConsilienceError(
                f"a method composes with a method, such as methods.er(), got {kind_of(other)}."
            )
        name = "+".join(part for part in (self.name, other.name) if part)
        values: dict[str, Any] = {
            "name": name,
            "corrections": self.corrections + other.corrections,
            "personal": tuple(dict.fromkeys((*self.personal, *other.personal))),
            "fixed": {**self.fixed, **other.fixed},
        }
        for key in self.fixed:
            if key in other.fixed and self.fixed[key] != other.fixed[key]:
                raise ConsilienceError(f"methods to compose must agree, got two values of `{key}` in {name}.")

        # All other fields hold one part: at most one of the two methods may bring it, or both the same.
        for part in (each.name for each in fields(self)):
            if part in values:
                continue
            mine, theirs = getattr(self, part), getattr(other, part)
            if mine is not None and theirs is not None and mine != theirs:
                raise ConsilienceError(
                    f"methods to compose must agree, got two values of `{part}` in {name}."
                )
            values[part] = theirs if mine is None else mine
        return Method(**values)

    @staticmethod
    def of(methods: Method | list[Method] | tuple[Method, ...]) -> Method:
        """Return one method from one, or from several that compose."""
        if isinstance(methods, Method):
            return methods
        if not methods:
            raise ConsilienceError("a run needs a method, got an empty list.")
        if not isinstance(methods, list | tuple) or not isinstance(methods[0], Method):
            found = methods[0] if isinstance(methods, list | tuple) else methods
            wrap = (
                f"; wrap it: Method('name', ({type(found).__name__}(...),))"
                if isinstance(found, Correction)
                else ""
            )
            raise ConsilienceError(
                "`method` must be a Method, such as methods.er() of consilience.methods, "
                f"got {kind_of(found)}{wrap}."
            )
        # Left to right, so that corrections act in the order in which they are listed.
        total = methods[0]
        for method in methods[1:]:
            total = total + method
        return total


def _feature_rules(placed: Method, facts: ScheduleFacts, rehearses: bool) -> Iterator[Rule]:
    """Yield the rules about a step aggregator at the level of features."""
    step, level = placed.step_aggregator, 'level="parameters"'
    yield Rule(
        not (isinstance(step, Linear) and step.needs_gram),
        "the feature level weighs objectives by the inner products of their gradients, which "
        f"{'nothing' if step is None else type(step).__name__} reads here",
        "use mgda, pcgrad, cagrad or another that does",
    )
    yield Rule(
        not facts.alike,
        "the feature level needs one batch of inputs for all tasks of a step, and here they have others",
        f"make tasks of the same inputs by data.tasks, or use {level}",
    )
    yield Rule(
        rehearses,
        "the feature level needs one batch of inputs for all objectives of a step, and a correction adds "
        "objectives of its own",
        f"use {level}",
    )

    # Entries of a view are a task's own, and norms are those over parameters.
    reading = [part.name for part in placed.active if part.needs_norms or overrides(part, "view")]
    yield Rule(
        bool(reading),
        f"{', '.join(reading)} needs the gradients or the parameters of each task, which the feature level "
        "does not have",
        f"use {level}",
    )

    model = facts.model
    yield Rule(
        model is not None and not model.passes_features,
        f"the feature level needs a model whose tasks share features before a head, got {model!r:.80}",
        f"use models.multi_head, name the `head` in models.wrap, or use {level}",
    )


def _correction_rules(
    correction: Correction, step: Aggregator | None, facts: ScheduleFacts
) -> Iterator[Rule]:
    """Yield the rules about one correction."""
    name = type(correction).__name__
    idle = f"{name} would do nothing or do wrong here"
    yield Rule(
        correction.adds_constraints and not isinstance(step, Cone),
        f"{name} needs a cone as step aggregator, got {type(step).__name__ if step else 'none'}",
        "use one such as aggregators.gem",
    )
    yield Rule(
        correction.needs_boundaries and not facts.boundaries,
        f"{name} needs to know where a source ends, and this stream has no ends",
        "use er, derpp, agem or online_ewc",
    )

    unfit = correction.unfit(facts)
    yield Rule(bool(unfit), str(unfit), "")

    # A correction's own reason says more than the general ones below, so it comes first.
    # Evaluated only here: it may count on the rules above.
    own = correction.refuse(facts)
    yield Rule(bool(own), f"{idle}: {own}", "")

    # What others trained on counts as history only for items that travel.
    history = facts.shared_history if correction.shared_items else facts.own_history
    if correction.shared_items:
        reason = "no agent trains after it trained on, or received, another source"
        remedy = "use a schedule in which training goes on after that"
    else:
        reason = "its items stay with their agent, and no agent trains on a second source"
        remedy = "give agents several sources, one after another"
    yield Rule(correction.needs_history and not history, f"{idle}: {reason}", remedy)
    yield Rule(
        correction.needs_revisits and not facts.revisited,
        f"{idle}: it acts when an agent trains on a source again, and here none does",
        "use a setting with several rounds",
    )
