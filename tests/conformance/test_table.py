"""The pinned table method x setting, docs/methods.md, and pinned values. `python tests/conformance/kit.py
--pin` writes them."""

from __future__ import annotations

import math

import kit
import pytest
import torch

import consilience as cs
from consilience import testing

ROWS = pytest.mark.parametrize("row", list(kit.ROWS))
AGAIN = "run `python tests/conformance/kit.py --pin` and review the difference"
CONTINUAL = ("continual (class)", "continual (task)", "continual (domain)")

MUST_RUN = {
    "finetune": tuple(testing.SETTINGS),
    "joint": ("multitask", *CONTINUAL),
    "deep_supervision": ("multitask", *CONTINUAL, "federated", "merging"),
    **dict.fromkeys(kit.TOGETHER, ("multitask",)),
    "cumulative": ("multitask", *CONTINUAL, "federated_continual", "skill"),
    **dict.fromkeys(("from_scratch", "gdumb", "scroll"), CONTINUAL),
    **dict.fromkeys(("icarl", "less_forgetting"), (*CONTINUAL, "federated_continual")),
    **dict.fromkeys(("ewc", "si", "lwf"), (*CONTINUAL, "federated", "federated_continual", "skill")),
    "er": (*CONTINUAL, "federated_continual", "skill"),
    **dict.fromkeys(
        (
            "fedavg",
            "fedprox",
            "fedadagrad",
            "fedadam",
            "fedavgm",
            "fedcm",
            "feddyn",
            "fednova",
            "fedyogi",
            "ghbm",
            "local_ghbm",
            "scaffold",
            "wsm",
        ),
        ("federated", "federated_continual"),
    ),
    "fedhbm": (),
    **dict.fromkeys(("average", "task_arithmetic", "ties"), ("federated", "federated_continual", "merging")),
    **dict.fromkeys(("fisher_merging", "regmean"), ("federated", "federated_continual", "merging", "skill")),
    "running_average": tuple(testing.SETTINGS),
    "opcm": ("merging", "exmodel"),
    "talos": ("multitask", *CONTINUAL, "federated", "federated_continual", "merging", "exmodel", "skill"),
    "soft_sharing": ("multitask", "continual (class)", "continual (task)", "federated"),
    "pcgrad": ("multitask",),
    "fedweit": ("continual (task)",),
    "distil(unlabelled)": ("merging",),
    **dict.fromkeys(
        (
            "dac(auxiliary)",
            "deep_model_consolidation(unlabelled)",
            "exmodel_distillation(auxiliary)",
        ),
        ("merging", "exmodel", "exmodel (given)"),
    ),
    "batch_model_consolidation(sources)": ("merging", "exmodel"),
    "feddf(unlabelled)": ("federated", "federated_continual", "merging"),
    "personal": ("federated", "federated_continual"),
    "fed3r": (*CONTINUAL, "multitask", "federated", "federated_continual", "merging", "exmodel", "skill"),
    **dict.fromkeys(
        ("oracle_ensemble", "average_ensemble", "entropy_ensemble"),
        ("merging", "exmodel", "exmodel (given)", "skill"),
    ),
    "parameter_average": ("merging", "exmodel", "exmodel (given)"),
    "skill": (*CONTINUAL, "merging", "exmodel", "skill"),
    **dict.fromkeys(
        ("aggregate(mean)", "aggregate(ties)", "aggregate(pcgrad)"), ("multitask", "federated", "merging")
    ),
    "er+pcgrad": CONTINUAL,
    **dict.fromkeys(("agem", "der", "derpp", "er_ace", "gem"), (*CONTINUAL, "federated_continual")),
    **dict.fromkeys(("generative_replay", "gss"), (*CONTINUAL, "federated_continual", "skill")),
    **dict.fromkeys(("den", "hat", "packnet", "pnn", "psp", "supsup", "xdg"), ("continual (task)",)),
    **dict.fromkeys(
        ("hat+infer(expert_gate)", "packnet+infer(mahalanobis)", "supsup+infer(superposition)"), CONTINUAL
    ),
    **dict.fromkeys(("l2sp", "mas", "online_ewc"), (*CONTINUAL, "federated", "federated_continual")),
}
"""What no refusal may take away."""


def test_table_has_every_method_and_setting() -> None:
    pinned = kit.read("methods")
    new = ", ".join(kit.ROWS.keys() - pinned.keys())
    assert not new, f"{new} is not pinned yet: {AGAIN}"
    assert list(pinned) == list(kit.ROWS), AGAIN
    assert all(list(cells) == list(testing.SETTINGS) for cells in pinned.values()), AGAIN
    assert MUST_RUN.keys() == kit.ROWS.keys()


@ROWS
def test_runs_or_refuses_as_pinned(row: str) -> None:
    for setting, pinned in kit.read("methods")[row].items():
        cell = kit.cell(row, setting)
        if isinstance(cell, str):
            assert cell == pinned, f"{row} in {setting}; {AGAIN}"
            assert setting not in MUST_RUN[row]
            assert len(cell.splitlines()) == 1 and cell.endswith(".")
            continue
        assert pinned == "runs", f"{row} in {setting} runs; {AGAIN}"
        assert cell.matrix.shape == (len(cell.stages) + 1, 3)
        assert all(math.isfinite(v) and 0 <= v <= 1 for v in cell.matrix.flat)
        assert all(torch.isfinite(p).all() for p in cell.params.values())
        x = testing.sources()[1].test.whole()[0]
        p = cell.predict(x)
        model = kit.model_of(row, setting)
        assert p.shape == (len(x), model.outputs // (1 + model.earlier))
        assert torch.allclose(p.sum(1), torch.ones(len(x)), atol=1e-5)


def test_the_page_is_up_to_date() -> None:
    assert kit.TABLE.read_text(encoding="utf-8") == kit.render(kit.read("methods")), AGAIN


@ROWS
def test_values_are_as_pinned(row: str) -> None:
    """In float64: the final score, the sum of the parameters (and those of experts), the sum of their
    magnitudes."""
    pinned = kit.read("values")[row]
    assert list(pinned) == kit.pinned_settings(kit.read("methods")[row]), AGAIN
    for setting, values in pinned.items():
        assert kit.values(row, setting) == pytest.approx(values, rel=1e-6, abs=1e-6), (
            f"{row} in {setting}; {AGAIN}"
        )


def test_methods_of_one_meaning_have_one_value() -> None:
    """Different names of the same thing, and the same thing by two roads."""
    for setting, rows in {
        "federated_continual": ("finetune", "average", "fedavg", "aggregate(mean)"),
        "merging": ("finetune", "average", "fedavg", "aggregate(mean)", "task_arithmetic"),
        "multitask": ("finetune", "aggregate(mean)"),
    }.items():
        found = [kit.values(r, setting) for r in rows]
        assert all(v == pytest.approx(found[0], abs=1e-9) for v in found), setting
    fed3r = [
        kit.values("fed3r", s) for s in ("continual (class)", "federated", "merging", "skill", "multitask")
    ]
    assert all(v == pytest.approx(fed3r[0], abs=1e-8) for v in fed3r)


def test_a_refusal_is_a_consilience_error_and_comes_before_work() -> None:
    with pytest.raises(cs.Refusal) as error:
        cs.run(testing.SETTINGS["federated"](), cs.methods.pcgrad(), model=testing.plain_model())
    assert isinstance(error.value, cs.ConsilienceError) and "use multitask" in str(error.value)
    with pytest.raises(cs.Refusal, match="one linear head that all sources share"):
        cs.run(testing.SETTINGS["skill"](), cs.methods.fed3r(), model=kit.heads())
