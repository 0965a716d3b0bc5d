"""Corrections: how earlier training, of this agent and of others, changes the training on a source.

A correction is one class that runs in every setting. It overrides the verbs that it needs, and the loop calls
them:

| when | verbs, in the order in which they are called |
|---|---|
| before a run | `refuse`, `default_model` |
| before a visit | `recall`, `gather`, `begin`, `prepare_step`, `trace_init` |
| in each step | `sample`, `view`, `losses`, `rows`, `mask`, `penalty_gradient` or `penalty`, `trace` |
| after a visit | `figures`, `summarise`, `trim` |
| in an exchange | `refuse_message`, `after_receive` |
| in prediction | `recall`, `view`; of a mapper also `route` |

A visit is the training of one agent in one `Train` phase: on one source, or on several whose batches meet in
every step. theta [n] is the flat vector of all trainable parameters of a visit, in the order of its `Layout`.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from consilience.core.batch import Batch
from consilience.core.contexts import Beginning, Begun, Context, Learned, Memory, Routing, Row, StepView
from consilience.core.message import Item, Statistics
from consilience.core.model import Model
from consilience.core.params import Params
from consilience.core.source import Source
from consilience.core.takes import Takes

if TYPE_CHECKING:
    from consilience.core.message import Message
    from consilience.core.schedule import ScheduleFacts
    from consilience.core.state import State
    from consilience.core.training import Training

NO_TRAINING = "it changes training, and here only trained models are given; use parameter_average"
"""Why a correction refuses a schedule in which no agent trains."""


class Correction(Takes, ABC):
    """A change to training. Subclasses are frozen dataclasses whose fields are the hyperparameters.

    Every verb is optional, and costs nothing when it is not overridden. Verbs are pure: they read their
    arguments, draw from the generator that they are given, and return a value. What they must remember goes
    through what they return:

    - `summarise` returns an item to keep after a visit. `recall` turns the items into `ctx.recalled` at the
      next one.
    - `begin` returns private tensors that last for one visit, as `ctx.private`.
    - `trace` returns what accumulates over the steps, as `ctx.trace`.

    `ctx` is the `Context` of this correction alone. The verbs that run in each step must be functions of
    tensors: no branch on the value of a tensor, no `.item()`, `.unique()` or `nonzero()`, and no random
    draws. Engines compile these verbs and stack agents.

    The attributes of `Takes` (`kinds`, `takes_places`, `takes_mixed`, `takes_trees`) say which inputs and
    targets it is right for; a schedule with others is refused by name.
    """

    shared_items: ClassVar[bool] = True
    """Whether the items that it returns may leave the agent.

    If so, they are `Shared`, and the agents that receive them recall them too. If not, they must be
    `Private`.
    """

    flat: ClassVar[tuple[str, ...]] = ()
    """Groups of the recalled item to lay out as vectors [n].

    With `flat = ("anchor",)`, the tensors `anchor/NAME` of `ctx.recalled` become `ctx.flat["anchor"]`.
    Entries that the item lacks are zero. Used by all quadratic penalties.
    """

    neutral: ClassVar[Mapping[str, Any]] = {}
    """Values of its fields at which it is plain training, to the bit, such as `{"strength": 0.0}`.

    The correction is left out of the step where all of them hold. Empty: it always acts.
    """

    needs_history: ClassVar[bool] = False
    """Whether it acts only after training on another source.

    Its step verbs other than `trace` are left out while `recall` returns None. A schedule without such
    history is refused: without `ScheduleFacts.shared_history`, or `own_history` where items are private.
    """

    needs_revisits: ClassVar[bool] = False
    """Whether it acts only where an agent trains on a source again. Refused elsewhere."""

    needs_delivery: ClassVar[bool] = False
    """Whether its own items belong to parameters that others combine, as SCAFFOLD's control variates do.

    A visit whose parameters nobody received (a client that dropped out) then has not taken place: when the
    agent receives again, its items are put back to what they were before the visit.
    """

    needs_boundaries: ClassVar[bool] = False
    """Whether it must know where a source ends. A stream that does not say so is refused."""

    needs_norms: ClassVar[bool] = False
    """Whether its `trace` reads `StepView.norms` or `grams`: each objective then has a backward pass of its
    own, as it has under an aggregator that weighs by a Gramian, where they cost nothing more."""

    needs_index: ClassVar[bool] = False
    """Whether it reads `Batch.index`, which says which training examples a batch has.

    A trace with one entry per example then keeps something of each, as `Context.sizes` says how many there
    are.
    """

    needs_last_step: ClassVar[bool] = False
    """Whether it acts at set steps of a visit, such as one that prunes, so that no visit may end early."""

    adds_constraints: ClassVar[bool] = False
    """Whether its `rows` are constraints. They need a cone as step aggregator, such as `aggregators.gem`."""

    changes_shapes: ClassVar[bool] = False
    """Whether its `view` returns entries of other shapes. It then acts after all other corrections."""

    @property
    def name(self) -> str:
        """The key of its items in messages and in `State.memory`, and part of the key of its random draws."""
        return type(self).__name__

    @property
    def active(self) -> bool:
        """Whether it differs from plain training at its hyperparameters."""
        return not self.neutral or any(getattr(self, name) != value for name, value in self.neutral.items())

    # Before a run: nothing is trained yet, so that a refusal costs nothing.

    def refuse(self, facts: ScheduleFacts) -> str | None:
        """Return why it could not act in such a schedule, or would be wrong, and what to use; or None.

        The text continues "NAME would do nothing or do wrong here: ", such as "it needs labels of tasks; use
        scenario='task'". Called once before a run. Most corrections use it.
        """
        return None

    def default_model(self, inputs: tuple[int, ...], outputs: int) -> Model | None:
        """Return the model for inputs [B, *inputs] and `outputs` classes where a user gives none; or None.

        Used by corrections and mappers that need a kind of model: `Columns`, `HAT`, `PackNet`, and anchors on
        features.
        """
        return None

    # Before a visit. These run once per visit, and may use Python freely.

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Any:
        """Return what to know in a visit to `sources`, as `ctx.recalled`; or None if there is nothing yet.

        `memory` has the items of this correction by (sender, source): received ones, and this agent's own.
        Default: the sum of the `Statistics` of all other sources, as EWC uses it. Overridden where a sum is
        not right: by buffers, LwF, SI, PackNet, HAT and SCAFFOLD.

        Called once per visit, and with `sources = ()` in prediction if the correction has a `view`. With
        `flat` the result must be an `Item`. Shapes should not depend on the number of visits: engines
        compile a program per shape.
        """
        names = {source.name for source in sources}
        total: Statistics | None = None
        # By source and then sender, so that the sum does not depend on the order of arrival.
        for (_, source), item in sorted(memory.items(), key=lambda entry: (entry[0][1], entry[0][0])):
            if source not in names and isinstance(item, Statistics):
                total = item if total is None else total + item
        return total

    def gather(
        self, sources: tuple[Source, ...], recalled: Any, generator: torch.Generator
    ) -> tuple[Source, ...]:
        """Return the sources to train on in place of the given ones, such as their union with earlier data.

        Called once per visit, after `recall`. Their `task` is None where the model is not given tasks. The
        generator draws the same numbers as that of `begin`. At most one part of a method may override it.
        Used by joint training, GDumb and iCaRL.
        """
        return sources

    def begin(self, start: Beginning) -> Begun:
        """Return the parameters to train from, private tensors for this visit, and the entries to freeze.

        Entries may be added for sources that the agent visits for the first time; shapes must not change.
        `private` becomes `ctx.private`, and is not averaged or kept. Frozen entries are left out of theta.
        Called once per visit, after `gather`. Used for masks (PackNet, SupSup, TaLoS), added entries
        (FedWeIt, DEN), fresh starts and solved heads.
        """
        return Begun(start.params)

    def prepare_step(self, ctx: Context, training: Training) -> tuple[dict[str, Tensor], str | None]:
        """Return the vectors for the steps, which replace `ctx.flat`, and a warning or None.

        Called once per visit, when `ctx.layout`, `ctx.start` and `ctx.flat` are known. What does not change
        from step to step is best computed here. The warning says what in `training` does not fit, such as a
        learning rate at which a penalty diverges; it is shown once per run. Used by EWC, SI, HAT and by all
        corrections of client drift.
        """
        return ctx.flat, None

    def trace_init(self, ctx: Context) -> dict[str, Tensor]:
        """Return the trace before the first step, such as `{"path": torch.zeros_like(ctx.theta)}`.

        Called once per visit, for corrections that override `trace`. A trace continues over the visits to a
        source: at a later visit the kept one takes its place, if the shapes are still the same. Used by SI,
        PackNet and DEN.
        """
        return {}

    # In each step. All but `sample` are traced by compilers and stacked over agents.

    def sample(self, ctx: Context, sources: tuple[Source, ...], generator: torch.Generator) -> list[Batch]:
        """Return further batches for this step: rehearsal.

        Called before each step, outside the compiled part, with a generator of its own for each step. The
        batches are forwarded together with the others, and each is an objective unless its `weight` is 0.
        Used by buffers, generative replay, GEM and A-GEM.
        """
        return []

    def view(self, params: Params, task: str | None, ctx: Context) -> Params:
        """Return the parameters that the model sees for a task: masked, scaled, or combined.

        Called in each forward pass, in training and prediction; it must be differentiable in `params`, which
        it leaves unchanged. In training `ctx.clock` and `ctx.horizon` are set. In prediction `ctx` has
        `recalled` and `model` only. Used by PackNet, HAT, SupSup, PSP, XdG, DEN, FedWeIt and iCaRL.
        """
        return params

    def losses(self, losses: dict[int, Tensor], step: StepView, ctx: Context) -> dict[int, Tensor]:
        """Return the losses of the samples, {part: [B]}, where `part` is the index in `step.parts`.

        Called once per step, on cross-entropies or squared errors. The loop averages each part's losses after
        this. Used by ER-ACE, iCaRL, WSM and generative replay.
        """
        return losses

    def rows(self, step: StepView, ctx: Context) -> list[Row]:
        """Return further objectives, or constraints, each a scalar loss with its weight.

        Called once per step. Each row is differentiated like the loss of a batch, and goes through the step
        aggregator. Used for distillation (LwF, DER) and constraints (GEM, A-GEM).
        """
        return []

    def mask(self, step: StepView, ctx: Context) -> Tensor:
        """Return factors [n] for the gradients of all rows, before they are aggregated.

        Called once per step. Entries with factor 0 stay as they are: neither momentum nor weight decay moves
        them. Used by PackNet, HAT, SupSup, TaLoS and DEN.
        """
        return torch.ones_like(step.theta)

    def penalty(self, step: StepView, ctx: Context) -> Tensor:
        """Return a scalar function of `step.theta`, whose gradient is added after the rows are aggregated.

        Called once per step. It is no row, because its gradient is zero at its anchor, where aggregators such
        as MGDA would stop. Used by EWC, SI, FedProx, HAT, FedDyn and SCAFFOLD.
        """
        return step.theta.new_zeros(())

    def penalty_gradient(self, step: StepView, ctx: Context) -> tuple[Tensor, float] | None:
        """Return the gradient of `penalty` as (vector [n], factor) where a formula is known, else None.

        It saves a backward pass per step, and must equal what autograd finds. None leaves it to autograd, and
        so does a subclass that overrides `penalty` alone. The vector is only read. Used by quadratic
        penalties and client drift.
        """
        return None

    def trace(self, step: StepView, ctx: Context, grad: Tensor, delta: Tensor) -> dict[str, Tensor]:
        """Return the trace after a step.

        `ctx.trace` is the trace before it, `grad` [n] the aggregated gradient without penalties, and `delta`
        [n] what the step adds to `step.theta`. Called once per step, after the optimiser. Names and shapes
        must be those of `trace_init`. Used by SI, PackNet and DEN.
        """
        return ctx.trace

    # After a visit.

    def figures(self, ctx: Context) -> dict[str, Any]:
        """Return what the log says of the visit: numbers by name, and lists and mappings of them.

        Called after a visit, once. They are in `Result.visits`; trackers get the plain numbers. Used by
        conflict statistics.
        """
        return {}

    def summarise(self, learned: Learned, ctx: Context) -> Item | None:
        """Return the item to keep of a source: `Shared` if it may leave the agent, `Private` if not; or None.

        Called after a visit, once per source of it. The item replaces the one of an earlier visit; None
        leaves that as it is. Used by all corrections that recall.
        """
        return None

    def trim(self, memory: Mapping[str, Any], learned: Learned) -> Mapping[str, Any]:
        """Return this agent's own items of this correction, {source: item}, cut to a budget over all sources.

        Called after a visit, once all its sources were summarised, if there are own items. `learned` is that
        of the last source, with a generator of its own. An item under `names.WHOLE` that is Shared is sent
        with the agent's parameters. Used by buffers, generative replay, SCAFFOLD and FedNova's local steps.
        """
        return memory

    # In an exchange.

    def refuse_message(self, message: Message, params: Params) -> str | None:
        """Return why a message has an item of this correction that cannot be used here, or None.

        Called once for each message that arrives, before it is taken, with the agent's `params`. The text
        continues " in SOURCE of SENDER.". All numbers are finite. Default: entries `GROUP/NAME` of
        `Statistics` must have the shape of the agent's entry NAME. Overridden by mappers with anchors and
        by moments of inputs and of features.
        """
        item = message.items.get(self.name)
        if not isinstance(item, Statistics):
            return None
        for name, tensor in item.tensors.items():
            own = params.get(name.partition("/")[2])
            if own is not None and own.shape != tensor.shape:
                return (
                    "statistics must have the shapes of the receiver's entries, here "
                    f"{tuple(own.shape)}, got {tuple(tensor.shape)} for {name!r} of {self.name}"
                )
        return None

    def after_receive(
        self, before: State, after: State, memory: Mapping[str, Any], fresh: Sequence[Message]
    ) -> Mapping[str, Any]:
        """Return this agent's own items of this correction, {source: item}, after it received `fresh`.

        `before` is the state before the exchange: `before.base` are the parameters after the last one, and
        `before.params` those that the agent trained since. `after` is the state after it. Called once per
        exchange.

        A Shared item under `names.WHOLE` is sent with the agent's own parameters; whoever receives it recalls
        it under (sender, `names.WHOLE`). Used by GHBM and FedCM (a history of the global parameters),
        SCAFFOLD (the sum of control variates), FedNova and FedWeIt.
        """
        return memory


def overrides(correction: Correction, verb: str) -> bool:
    """Whether a correction has its own form of a verb.

    >>> overrides(Correction(), "penalty")
    False
    """
    return getattr(type(correction), verb) is not getattr(Correction, verb)


def knows_gradient(correction: Correction) -> bool:
    """Whether its `penalty_gradient` belongs to its `penalty`: from the same class or a subclass."""
    # A subclass with a penalty of its own would inherit the gradient of another penalty.
    classes = type(correction).__mro__

    def depth(verb: str) -> int:
        return next(level for level, kind in enumerate(classes) if verb in vars(kind))

    return depth("penalty_gradient") <= depth("penalty")


class Mapper(Correction):
    """A correction that also routes: it weights the experts for each input.

    Its `summarise` keeps anchors of a source, such as the means of features, which `route` compares with an
    input.
    """

    needs_label: ClassVar[bool] = False
    """Whether it is given the true task at evaluation: an oracle, as an upper bound."""

    superposes: ClassVar[bool] = False
    """Whether it uses `Routing.superposed`. Some correction of the method must then have a `view`."""

    @property
    def rejects(self) -> bool:
        """Whether it may say that no expert knows an input; it is then asked also about a single expert."""
        return False

    def recall(self, memory: Memory, sources: tuple[Source, ...]) -> Any:
        """Return None: training knows nothing of the anchors, which `route` reads itself."""
        return None

    def route(self, routing: Routing, memory: Memory) -> Tensor:
        """Return weights [B, experts] for a batch.

        Each row sums to 1, or is zero where no expert knows the input. Called in prediction where no task is
        given. `memory` has the items of this mapper by (sender, source).
        """
        raise NotImplementedError
