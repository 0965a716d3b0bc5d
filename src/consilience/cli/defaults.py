"""Defaults of the command line: what is chosen where a setting or a data set is named and nothing else."""

from __future__ import annotations

from typing import Any

FEDERATED: dict[str, Any] = {
    "split": "dirichlet",
    "split.clients": 10,
    "split.alpha": 0.5,
    "method": "fedavg",
    "training.epochs": 1,
}

# A setting of the user is treated as "continual".
FITTING: dict[str, dict[str, Any]] = {
    "multitask": {"split": "permute", "split.n": 3, "method": "pcgrad", "setting.scenario": "domain"},
    "continual": {"split": "classes", "split.n": 5, "method": "er"},
    "federated": FEDERATED,
    "federated_continual": {
        "split": "iid+classes",
        "split.iid.clients": 3,
        "split.classes.n": 5,
        "method": "er",
        "setting.rounds": 3,
        "training.epochs": 2,
    },
    "hierarchical": FEDERATED,
    "gossip": FEDERATED,
    "merging": {"split": "dirichlet", "split.clients": 3, "split.alpha": 1.0, "method": "average"},
    "exmodel": {"split": "classes", "split.n": 5, "method": "entropy_ensemble"},
    "skill": {"split": "classes", "split.n": 5, "method": "skill"},
}
"""Options that fit a setting."""

# A diagnosis has no setting of its own: it trains tasks together, and each alone.
DIAGNOSE: dict[str, Any] = {
    "split": "classes",
    "split.n": 5,
    "methods": "uncertainty,gradnorm,pcgrad",
    "setting.scenario": "task",
}
"""Options that fit a diagnosis."""

# These have fewer classes than the default split makes parts, or come as several sources already.
FITTING_DATA: dict[str, dict[str, Any]] = {
    "breast_cancer": {"split.n": 2, "split.classes.n": 2},
    "wine": {"split.n": 3, "split.classes.n": 3},
    "diabetes": {"split": "iid", "split.clients": 3},
    "core50": {"split": "none"},
    "clear": {"split": "none"},
    "shakespeare": {"split": "none", "model": "char_lstm"},
}
"""Options that fit a data set; they override those of the setting."""

SPLIT_ARGUMENTS: dict[str, Any] = {"n": 5, "clients": 5, "alpha": 0.5, "angles": 4}
"""Arguments of splits that have no default in the library."""
