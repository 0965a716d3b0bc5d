"""Continual learning by isolation: every task has weights, units or keys of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from consilience.core.correction import Mapper
    from consilience.core.method import Method


def packnet(keep: float = 0.5, retrain: float = 0.5) -> Method:
    """PackNet: each task keeps its largest weights, retrains and freezes them; later tasks get the others.

    Paper: Mallya & Lazebnik 2018.

    Args:
        keep: the share of each layer's free weights that a task keeps.
        retrain: the share of the epochs after pruning.
    """
    from consilience.core.method import Method
    from consilience.corrections.isolation import PackNet

    return Method("packnet", (PackNet(keep, retrain),))


def hat(sparsity: float = 0.1, s_max: float = 400.0, hard: bool = True) -> Method:
    """Hard attention to the task: each task learns which units it uses, and these keep their weights.

    Paper: Serrà et al. 2018.

    Args:
        sparsity: of the regulariser that leaves units to later tasks. Layers of a hundred units take .01 to
            .75 alike; with few units or epochs a smaller one, such as .02, as all units of a task may fall
            silent, which is warned about.
        s_max: the steepest sigmoid, at the last batch of an epoch.
        hard: masks of earlier and predicted tasks are 0 or 1, so that their outputs do not change; soft ones
            drift.
    """
    from consilience.core.method import Method
    from consilience.corrections.isolation import HAT

    return Method("hat", (HAT(sparsity, s_max, hard),))


def supsup(keep: float = 0.5) -> Method:
    """Supermasks in superposition: fixed random weights, one learned mask per task; masks can be sent.

    Paper: Wortsman et al. 2020.

    Args:
        keep: the share of each layer's weights that a task uses.
    """
    from consilience.core.method import Method
    from consilience.corrections.superposition import SupSup

    return Method("supsup", (SupSup(keep),), personal=("supsup/*",))


def psp(flips: float = 0.5, keys: Literal["binary", "complex", "rotation"] = "binary") -> Method:
    """Parameter superposition: each task multiplies the inputs of every layer by its own random key.

    Paper: Cheung et al. 2019.

    Args:
        flips: the share of signs that are -1 in binary keys; 0 is plain training, whatever the keys.
        keys: "binary" signs, "complex" phases on pairs of inputs, or a "rotation" of all inputs.
    """
    from consilience.core.method import Method
    from consilience.corrections.superposition import PSP

    return Method("psp", (PSP(flips, keys),))


def xdg(fraction: float = 0.8) -> Method:
    """Context-dependent gating: for each task a random part of the hidden units is silent.

    Paper: Masse, Grant & Freedman 2018.

    Args:
        fraction: of the units of each hidden layer that are silent; 0 is plain training.
    """
    from consilience.core.method import Method
    from consilience.corrections.superposition import XdG

    return Method("xdg", (XdG(fraction),))


def pnn() -> Method:
    """Progressive networks: one column per task, which reads the earlier columns and never changes them.

    The columns are the model's: `models.progressive` or `models.progressive_conv` (the default here).

    Paper: Rusu et al. 2016.
    """
    from consilience.core.method import Method
    from consilience.corrections.isolation import Columns

    return Method("pnn", (Columns(),))


def den(
    units: int = 10,
    threshold: float = 0.01,
    drift: float = 0.05,
    l1: float = 0.001,
    l2: float = 0.0001,
    group: float = 0.01,
    anchor: float = 0.5,
) -> Method:
    """Dynamically expandable network: retrain the units a task needs, add units, split those that drift.

    Paper: Yoon, Yang, Lee & Hwang 2018.

    Args:
        units: added to each hidden layer where a task expands; 0 never adds any.
        threshold: the loss after retraining above which a task expands.
        drift: how far a unit's incoming weights may move before it is split; infinite never splits, 0 keeps
            old answers to the bit.
        l1: of the first task's weights, of a new head and of added units, whose weights near 0 then are 0.
        l2: of what is retrained.
        group: of the incoming weights of each added unit: those of norm near 0 are dropped.
        anchor: of the squared distance to the old weights while units may drift.
    """
    from consilience.core.method import Method
    from consilience.corrections.expansion import DEN

    return Method("den", (DEN(units, threshold, drift, l1, l2, group, anchor),))


def infer(mapper: Mapper) -> Method:
    """Infer the task by this mapper where no task label is given; compose it with any isolation method.

    Training knows the task of each source; at evaluation the mapper chooses whose expert, mask or head
    answers.

    Paper: Aljundi et al. 2017 (Expert Gate); Wortsman et al. 2020 (superposition).

    Args:
        mapper: one of `consilience.mappers`.
    """
    from consilience.core.correction import Mapper as Kind
    from consilience.core.errors import ConsilienceError, kind_of
    from consilience.core.method import Method

    if not isinstance(mapper, Kind):
        raise ConsilienceError(
            f"`mapper` must be made by consilience.mappers, such as min_entropy(), got {kind_of(mapper)}."
        )
    return Method(type(mapper).__name__.lower(), mapper=mapper)
