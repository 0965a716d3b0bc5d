"""`consilience.testing.check` finds what authors do wrong, by name, and says where a part never acts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import consilience as cs

FEW = ("multitask", "continual (class)", "federated", "exmodel (given)")


def fails(part, *says, settings=FEW):
    with pytest.raises(AssertionError) as error:
        cs.testing.check(part, settings=settings)
    for text in says:
        assert text in str(error.value), error.value


@dataclass(frozen=True)
class Away(cs.Correction):
    """(mu / 2) ||theta - theta_start||^2."""

    mu: float = 0.1
    neutral: ClassVar[dict[str, float]] = {"mu": 0.0}

    def penalty(self, step, ctx):
        return 0.5 * self.mu * (step.theta - step.start).square().sum()


def test_a_good_one_passes_and_says_where_it_never_acts():
    report = cs.testing.check(Away(), settings=FEW)
    assert {report.settings[s] for s in FEW[:3]} == {"runs"}
    assert report.settings["exmodel (given)"] == "runs, but never acts"
    assert any("nobody trains there" in note for note in report.notes)
    assert {"pure verbs", "seeded", "resumes", "neutral", "engines agree", "composes"} <= set(report.checks)


def test_a_misspelt_verb_is_found():
    @dataclass(frozen=True)
    class Misspelt(cs.Correction):
        """A penalty."""

        def penality(self, step, ctx):
            return step.theta.sum()

    for part in (Misspelt(), cs.Method("misspelt", (Misspelt(),))):
        fails(part, "Misspelt.penality is no verb or class attribute; did you mean `penalty`?")


def test_a_misspelt_attribute_is_found():
    @dataclass(frozen=True)
    class Misspelt(Away):
        """A penalty."""

        need_revisits: ClassVar[bool] = True

    fails(Misspelt(), "did you mean `needs_revisits`?")


def test_no_verb_at_all_is_found():
    @dataclass(frozen=True)
    class Empty(cs.Correction):
        """Nothing."""

    fails(Empty(), "Empty overrides no verb")


def test_a_neutral_value_of_no_field_is_found():
    @dataclass(frozen=True)
    class Wrong(Away):
        """A penalty."""

        neutral: ClassVar[dict[str, float]] = {"strength": 0.0}

    fails(Wrong(), "`neutral` of Wrong must name fields of the class, got strength")


def test_a_neutral_value_that_trains_otherwise_is_found():
    @dataclass(frozen=True)
    class Shifted(Away):
        """A penalty that a neutral value does not switch off."""

        @property
        def active(self):
            return True

        def penalty(self, step, ctx):
            return 0.1 * step.theta.sum()

    fails(Shifted(), "at its `neutral` values the parameters differ from plain training")


def test_a_wrong_gradient_is_found():
    @dataclass(frozen=True)
    class Half(cs.corrections.Proximal):
        """Half the gradient."""

        def penalty_gradient(self, step, ctx):
            return (step.theta - step.start) * 0.5 * self.mu, 1.0

    fails(Half(), "Half.penalty_gradient differs from the gradient of `penalty` by 0.5 of its norm")


@pytest.mark.parametrize(
    ("verb", "function", "wanted"),
    [
        ("penalty", lambda self, step, ctx: step.theta, "a scalar tensor, got Tensor (246,)"),
        ("penalty", lambda self, step, ctx: 0.5, "a scalar tensor, got 0.5"),
        ("rows", lambda self, step, ctx: cs.Row(step.theta.sum()), "a list of Row"),
        ("losses", lambda self, losses, step, ctx: losses[0] * 2, "{part: losses [B]}"),
        ("losses", lambda self, losses, step, ctx: {0: losses[0].mean()}, "{part: losses [B]}"),
        ("begin", lambda self, start: start.params, "Begun(params, private, frozen)"),
        ("prepare_step", lambda self, ctx, training: {}, "({name: vector}, warning or None)"),
        ("view", lambda self, params, task, ctx: None, "a mapping of parameters, got None"),
        ("mask", lambda self, step, ctx: torch.ones(3), "one per entry of `step.theta`"),
        ("summarise", lambda self, learned, ctx: {"x": 1}, "Statistics, Samples"),
    ],
)
def test_wrong_returns_are_found_by_class_and_verb(verb, function, wanted):
    kind = dataclass(frozen=True)(type("Mine", (cs.Correction,), {"__doc__": "Mine.", verb: function}))
    fails(kind(), f"Mine.{verb} must return", wanted)


def test_a_gradient_without_its_factor_or_penalty_is_found():
    @dataclass(frozen=True)
    class Bare(cs.corrections.Proximal):
        """A vector alone."""

        def penalty_gradient(self, step, ctx):
            return step.theta

    @dataclass(frozen=True)
    class Lone(cs.Correction):
        """A gradient of nothing."""

        def penalty_gradient(self, step, ctx):
            return step.theta, 1.0

    fails(Bare(), "Bare.penalty_gradient must return (vector [n], factor) or None, got Tensor (246,)")
    fails(Lone(), "Lone overrides `penalty_gradient`, but not the `penalty`")


def test_an_error_inside_a_verb_has_its_name_and_a_hint():
    @dataclass(frozen=True)
    class Eager(cs.Correction):
        """It reads what may be None."""

        def penalty(self, step, ctx):
            return ctx.recalled.group("x")

    fails(Eager(), "Eager.penalty raises AttributeError", "declare `needs_history` or `needs_revisits`")


def test_memory_that_nobody_reads_is_noted():
    @dataclass(frozen=True)
    class Dead(Away):
        """It keeps what the default `recall` leaves out."""

        shared_items: ClassVar[bool] = False
        needs_revisits: ClassVar[bool] = True

        def summarise(self, learned, ctx):
            return cs.Private({f"end/{n}": p for n, p in learned.trainable.items()})

    fails(Dead(), "acts in no setting", "override `recall`")


def test_changed_arguments_are_found():
    @dataclass(frozen=True)
    class Grabbing(Away):
        """It changes the losses in place."""

        def losses(self, losses, step, ctx):
            return {i: v.mul_(2) for i, v in losses.items()}

    fails(Grabbing(), "Grabbing.losses changes its arguments")


def test_a_global_random_state_is_found():
    @dataclass(frozen=True)
    class Noisy(Away):
        """Its gradient has noise that no seed keys."""

        def losses(self, losses, step, ctx):
            return {i: v * torch.rand(()) for i, v in losses.items()}

    fails(Noisy(), "the global random state of torch moves")


def test_a_class_that_is_no_frozen_dataclass_is_found():
    class Bare(Away):
        """A penalty."""

    fails(Bare(), "Bare must be a dataclass")


def test_an_aggregator_that_reads_the_order_is_found():
    @dataclass(frozen=True)
    class First(cs.Aggregator):
        """The first row."""

        def combine(self, rows, weights, generator):
            return rows[0] * weights[:1].sum()

    fails(First(), "5 equal rows must give First the sum of weights times its result for one row")


def test_unknown_settings_are_refused():
    with pytest.raises(cs.ConsilienceError, match="unknown setting 'continual'; choose from multitask"):
        cs.testing.check(Away(), settings=["continual"])


def test_corrections_of_a_method_are_a_tuple():
    with pytest.raises(cs.ConsilienceError, match="`corrections` must be a tuple of corrections"):
        cs.Method("x", Away())
    with pytest.raises(cs.ConsilienceError, match="wrap it: Method"):
        cs.run(cs.testing.SETTINGS["multitask"](), Away())
