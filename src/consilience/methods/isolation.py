"""Continual learning by isolation: every task has weights, units or keys of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from consilience.core.correction import Mapper
    from consilience.core.method import Method


def packnet(keep: float = 0.5, retrain: float = 0.5) -> Method:
    """PackNet: each task keeps its largest weights, retrains and freezes them; the others are free for later tasks.

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
        sparsity: of the regulariser that leaves units to later tasks.
        s_max: the steepest sigmoid, at the last batch of an epoch.
        hard: masks of earlier and predicted tasks are 0 or 1, so that their outputs do not change; else they drift.
    """
    from consilience.core.method import Method
    from consilience.corrections.isolation import HAT

    return Method("hat", (HAT(sparsity, s_max, hard),))


def supsup(keep: float = 0.5) -> Method:
    """Supermasks in superposition: fixed random weights, and a learned mask for each task, which can be exchanged.

    Paper: Wortsman et al. 2020.

    Args:
        keep: the share of each layer's weights that a task uses.
    """
    from consilience.core.method import Method
    from consilience.corrections.contexts import SupSup

    return Method("supsup", (SupSup(keep),), personal=("supsup/*",))


def psp(flips: float = 0.5) -> Method:
    """Parameter superposition: each task multiplies the inputs of every layer by its own random signs.

    Paper: Cheung et al. 2019.

    Args:
        flips: the share of signs that are -1; 0 is plain training.
    """
    from consilience.core.method import Method
    from consilience.corrections.contexts import PSP

    return Method("psp", (PSP(flips),))


def xdg(fraction: float = 0.8) -> Method:
    """Context-dependent gating: for each task a random part of the hidden units is silent.

    Paper: Masse, Grant & Freedman 2018.

    Args:
        fraction: of the units of each hidden layer that are silent; 0 is plain training.
    """
    from consilience.core.method import Method
    from consilience.corrections.contexts import XdG

    return Method("xdg", (XdG(fraction),))


def infer(mapper: Mapper) -> Method:
    """Tasks are inferred by this mapper where no label is told: composed with any method that treats each task in its own way.

    Training is told the task of each source; at evaluation the mapper chooses whose expert, mask or head answers.

    Paper: Aljundi et al. 2017 (Expert Gate); Wortsman et al. 2020 (superposition).

    Args:
        mapper: one of `consilience.mappers`.
    """
    from consilience.core.correction import Mapper as Kind
    from consilience.core.errors import ConsilienceError, kind_of
    from consilience.core.method import Method

    if not isinstance(mapper, Kind):
        raise ConsilienceError(f"`mapper` should be made by consilience.mappers, such as min_entropy(). Found {kind_of(mapper)}.")
    return Method(type(mapper).__name__.lower(), mapper=mapper)
