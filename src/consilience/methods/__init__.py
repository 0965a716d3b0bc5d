"""The catalogue of methods: functions of a few lines that return a composition.

Each runs in every setting where it can act, and refuses in the others by name; `docs/methods.md` has the
table.
Signatures import no torch, so that the command line answers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from consilience import lazy
from consilience.core.errors import suggest_arguments
from consilience.methods.continual import cumulative, finetune, from_scratch, joint, scroll
from consilience.methods.distillation import distil, feddf
from consilience.methods.exmodel import (
    average_ensemble,
    entropy_ensemble,
    exmodel_distillation,
    oracle_ensemble,
    parameter_average,
)
from consilience.methods.federated import (
    fed3r,
    fedadagrad,
    fedadam,
    fedavg,
    fedavgm,
    fedcm,
    feddyn,
    fedhbm,
    fednova,
    fedprox,
    fedyogi,
    ghbm,
    local_ghbm,
    scaffold,
    wsm,
)
from consilience.methods.isolation import den, hat, infer, packnet, pnn, psp, supsup, xdg
from consilience.methods.merging import (
    aggregate,
    average,
    fisher_merging,
    opcm,
    regmean,
    running_average,
    talos,
    task_arithmetic,
    ties,
)
from consilience.methods.multitask import (
    aligned_mtl,
    cagrad,
    conflicts,
    deep_supervision,
    dwa,
    fairgrad,
    famo,
    gradnorm,
    gradvac,
    imtl_g,
    mgda,
    nash_mtl,
    pcgrad,
    rlw,
    scale_invariant,
    sdmgrad,
    soft_sharing,
    task_weights,
    uncertainty,
    upgrad,
    worst_task,
)
from consilience.methods.personal import fedweit, personal
from consilience.methods.regularisation import ewc, l2sp, less_forgetting, lwf, mas, online_ewc, si
from consilience.methods.rehearsal import (
    agem,
    der,
    derpp,
    er,
    er_ace,
    gdumb,
    gem,
    generative_replay,
    gss,
    icarl,
)
from consilience.methods.skill import skill

__all__ = [
    "agem",
    "aggregate",
    "aligned_mtl",
    "average",
    "average_ensemble",
    "cagrad",
    "conflicts",
    "cumulative",
    "deep_supervision",
    "den",
    "der",
    "derpp",
    "distil",
    "dwa",
    "entropy_ensemble",
    "er",
    "er_ace",
    "ewc",
    "exmodel_distillation",
    "fairgrad",
    "famo",
    "fed3r",
    "fedadagrad",
    "fedadam",
    "fedavg",
    "fedavgm",
    "fedcm",
    "feddf",
    "feddyn",
    "fedhbm",
    "fednova",
    "fedprox",
    "fedweit",
    "fedyogi",
    "finetune",
    "fisher_merging",
    "from_scratch",
    "gdumb",
    "gem",
    "generative_replay",
    "ghbm",
    "gradnorm",
    "gradvac",
    "gss",
    "hat",
    "icarl",
    "imtl_g",
    "infer",
    "joint",
    "l2sp",
    "less_forgetting",
    "local_ghbm",
    "lwf",
    "mas",
    "mgda",
    "nash_mtl",
    "online_ewc",
    "opcm",
    "oracle_ensemble",
    "packnet",
    "parameter_average",
    "pcgrad",
    "personal",
    "pnn",
    "psp",
    "regmean",
    "rlw",
    "running_average",
    "scaffold",
    "scale_invariant",
    "scroll",
    "sdmgrad",
    "si",
    "skill",
    "soft_sharing",
    "supsup",
    "talos",
    "task_arithmetic",
    "task_weights",
    "ties",
    "uncertainty",
    "upgrad",
    "worst_task",
    "wsm",
    "xdg",
]

if not TYPE_CHECKING:
    __getattr__ = lazy.suggest(__name__)
    suggest_arguments(__name__)
