"""Continual learning by isolation: every task has weights, units or keys of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
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


def pnn() -> Method:
    """Progressive networks: each task has a column of its own, which reads the columns of earlier tasks and leaves them as they are.

    The columns are the model's: `models.progressive` or `models.progressive_conv`, which a run takes where none is given.

    Paper: Rusu et al. 2016.
    """
    from consilience.core.method import Method
    from consilience.corrections.isolation import Columns

    return Method("pnn", (Columns(),))
