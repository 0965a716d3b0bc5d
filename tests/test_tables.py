"""Tables: values by hand, splits, sums of clients, and every refusal."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import consilience as cs
from consilience import data
from consilience.core.errors import ConsilienceError
from consilience.core.source import Source
from consilience.data import _reading
from consilience.data._tables import moments

NAN = float("nan")

PEOPLE = """age,city,smokes,sick
30,Rome,yes,ill
40,Oslo,no,well
50,Rome,no,well
60,Bonn,yes,ill
"""


def written(folder: Path, text: str, name: str = "people.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def whole(source: Source, part: str = "train") -> tuple[Any, Any]:
    return getattr(source, part).whole()


def refused(rule: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(ConsilienceError) as error:
        data.table(*args, **kwargs)
    assert rule in str(error.value), str(error.value)
    assert "\n" not in str(error.value)


# Values.


def test_columns_by_hand(tmp_path):
    path = written(tmp_path, PEOPLE)
    source = data.table(path, "sick", test=path, validation=0)
    x, y = whole(source)
    # Mean 45 and deviation sqrt(500 / 3); then Bonn, Oslo, Rome, and no, yes.
    deviation = (500 / 3) ** 0.5
    expected = [
        [-15 / deviation, 0, 0, 1, 0, 1],
        [-5 / deviation, 0, 1, 0, 1, 0],
        [5 / deviation, 0, 0, 1, 1, 0],
        [15 / deviation, 1, 0, 0, 0, 1],
    ]
    assert torch.allclose(x, torch.tensor(expected, dtype=torch.float64), atol=1e-12)
    assert y.tolist() == [0, 1, 1, 0]
    assert source.labels == (("people", "ill"), ("people", "well"))
    assert source.name == "people"
    assert source.kind == "class"


def test_declared_classes_keep_their_order(tmp_path):
    path = written(tmp_path, PEOPLE)
    source = data.table(path, "sick", test=path, validation=0, classes=["well", "ill", "dead"], space="s")
    assert whole(source)[1].tolist() == [1, 0, 0, 1]
    assert source.labels == (("s", "well"), ("s", "ill"), ("s", "dead"))
    refused("labels must be among the classes well, got 'ill' in line 2 of", path, "sick", classes=["well"])


def test_statistics_are_those_of_the_training_rows():
    values = np.arange(40.0) ** 2
    source = data.table({"v": values, "y": ["a", "b"] * 20}, "y", validation=0.2, seed=3)
    raw = data.table({"v": values, "y": ["a", "b"] * 20}, "y", validation=0.2, seed=3, standardise="none")
    train = whole(raw)[0].double()
    assert set(train.flatten().tolist()) < set(values.tolist())
    for part in ("train", "validation", "test"):
        expected = (whole(raw, part)[0].double() - train.mean(0)) / train.std(0)
        assert torch.allclose(whole(source, part)[0].double(), expected, atol=1e-6)


def test_splits_are_those_of_arrays():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 2)).astype("float32"), np.arange(60) % 3
    table = data.table(
        {"a": x[:, 0], "b": x[:, 1], "y": y}, "y", kind="class", name="same", seed=4, standardise="none"
    )
    arrays = data.arrays(x, y, name="same", seed=4)
    for part in ("train", "validation", "test"):
        for own, other in zip(whole(table, part), whole(arrays, part), strict=True):
            assert torch.equal(own, other)
    again = data.table({"a": x[:, 0], "b": x[:, 1], "y": y}, "y", kind="class", name="same", seed=5)
    assert not torch.equal(whole(again, "test")[1], whole(table, "test")[1])


def test_kinds_of_targets():
    numbers = {"x": [1.0, 2, 3, 4], "a": [0, 1, 1, 0], "b": [1, 1, 0, 0], "c": [0.5, 1.5, 2.5, 3.5]}
    labels = data.table(numbers, ["a", "b"], test=numbers, validation=0, ignore=["c"])
    assert labels.kind == "labels"
    assert whole(labels)[1].tolist() == [[0, 1], [1, 1], [1, 0], [0, 0]]
    assert labels.labels == (("table", "a"), ("table", "b"))
    values = data.table(numbers, ["a", "c"], test=numbers, validation=0)
    assert values.kind == "value"
    assert whole(values)[1].tolist() == [[0, 0.5], [1, 1.5], [1, 2.5], [0, 3.5]]
    one = data.table(numbers, "c", test=numbers, validation=0)
    assert one.kind == "value"
    assert one.labels == (("table", "c"),)
    # Whole numbers are a choice of the user.
    refused('2 different ones in the target \'a\'; say kind="class" or kind="value"', numbers, "a")
    assert data.table(numbers, "a", test=numbers, kind="value").kind == "value"
    named = data.table(numbers, "a", test=numbers, kind="class")
    assert named.labels == (("table", "0"), ("table", "1"))
    assert data.table(numbers, "a", test=numbers, classes=[1, 0]).labels == (("table", "1"), ("table", "0"))
    many = {"x": np.arange(60.0), "y": np.arange(60)}
    assert data.table(many, "y").kind == "value"


def test_classes_of_numbers_are_in_the_order_of_numbers():
    rows = {"x": [1.0, 2, 3], "y": [10, 9, 100]}
    source = data.table(rows, "y", test=rows, validation=0, kind="class")
    assert [name for _, name in source.labels] == ["9", "10", "100"]
    assert whole(source)[1].tolist() == [1, 0, 2]


def test_values_of_targets_are_standardised_on_request():
    rows = {"x": [1.0, 2, 3], "y": [100.5, 200.5, 300.5]}
    source = data.table(rows, "y", test=rows, validation=0, standardise="all")
    expected = torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64)
    assert torch.allclose(whole(source)[1], expected)
    assert torch.allclose(whole(source, "test")[1], expected)
    plain = data.table(rows, "y", test=rows, validation=0)
    assert whole(plain)[1].flatten().tolist() == [100.5, 200.5, 300.5]


@pytest.mark.parametrize("value", [0.0, 0.1, 1e9 + 0.1, -3.3])
def test_a_constant_column_becomes_zero(value):
    rows = {"v": [value] * 7, "u": [1.0, 2, 3, 4, 5, 6, 7], "y": list("abababa")}
    other = {"v": [value + 5], "u": [1.0], "y": ["a"]}
    source = data.table(rows, "y", test=other, validation=0)
    assert whole(source)[0][:, 0].tolist() == [0.0] * 7
    assert whole(source, "test")[0][0, 0] == 0


def test_text_stays_text(tmp_path):
    path = written(tmp_path, "zip,country,code,y\n01234,NA,01,a\n98765,FR,1,b\n01234,FR,01,a\n")
    source = data.table(path, "y", test=path, validation=0, categories=["zip", "code"])
    # 01234, 98765; FR, NA; 01, 1.
    assert whole(source)[0].tolist() == [[1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 1], [1, 0, 1, 0, 1, 0]]
    labels = data.table(path, "code", test=path, validation=0, kind="class", ignore=["zip"])
    assert sorted(name for _, name in labels.labels) == ["01", "1"]


def test_declared_categories():
    rows = {"c": ["x", "y", "x"], "y": ["a", "b", "a"]}
    test = {"c": ["z"], "y": ["a"]}
    source = data.table(rows, "y", test=test, validation=0, categories={"c": ["z", "y", "x"]})
    assert whole(source)[0].tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 1]]
    assert whole(source, "test")[0].tolist() == [[1, 0, 0]]
    refused(
        "column 'c' must have one of its 2 known categories, got 'z' in row 0 of `test`; declare it in "
        "categories={'c': [...]}.",
        rows,
        "y",
        test=test,
    )


# Missing values.

HOLES = "age,city,y\n10,Rome,a\n,Rome,b\n30,,a\n20,Oslo,b\n"


def test_missing_values_are_named(tmp_path):
    path = written(tmp_path, HOLES)
    refused(
        f"got none for column 'age' in line 3 of {path}; complete it, or choose missing='mean'", path, "y"
    )
    refused("got none for column 'y' in row 1", {"x": [1.0, 2], "y": ["a", None]}, "y")


def test_missing_values_get_the_mean(tmp_path):
    path = written(tmp_path, HOLES)
    source = data.table(path, "y", test=path, validation=0, missing="mean")
    x = whole(source)[0]
    assert x[:, 0].tolist() == [-1, 0, 1, 0]
    # Oslo is a third of the cities that are there.
    assert torch.allclose(x[2, 1:], torch.tensor([1 / 3, 2 / 3], dtype=x.dtype))


def test_missing_values_get_a_number(tmp_path):
    path = written(tmp_path, HOLES)
    source = data.table(path, "y", test=path, validation=0, missing=40, standardise="none")
    assert whole(source)[0].tolist() == [[10, 0, 1], [40, 0, 1], [30, 0, 0], [20, 1, 0]]


def test_rows_with_missing_values_are_dropped(tmp_path):
    path = written(tmp_path, HOLES)
    source = data.table(path, "y", test=path, validation=0, missing="drop", standardise="none")
    assert whole(source)[0].tolist() == [[10, 0, 1], [20, 1, 0]]
    assert len(source.test) == 2
    refused("some row of `rows` must be complete", {"x": [None, None], "y": ["a", "b"]}, "y", missing="drop")
    refused(
        "some row of `rows` must be complete, got none of group 'h'.",
        {"x": [1.0, None], "y": ["a", "b"], "g": ["f", "h"]},
        "y",
        missing="drop",
        group="g",
    )


def test_the_mean_is_that_of_the_training_rows():
    train = {"v": [1.0, 2.0, 3.0], "y": ["a", "b", "a"]}
    test = {"v": [None, 100.0], "y": ["a", "b"]}
    source = data.table(train, "y", test=test, validation=0, missing="mean", standardise="none")
    assert whole(source, "test")[0].flatten().tolist() == [2, 100]
    refused(
        "a column must have a value in some training row, got none in 'v'; leave it out with ignore=['v'].",
        {"v": [None, None], "u": [1.0, 2.0], "y": ["a", "b"]},
        "y",
        test=test | {"u": [1.0, 2.0]},
        validation=0,
        missing="mean",
    )


def test_some_targets_may_be_missing():
    rows = {"x": [1.0, 2, 3], "a": [1, None, None], "b": [0, 1, None]}
    source = data.table(rows, ["a", "b"], test=rows, validation=0, missing="mean")
    y = whole(source)[1]
    assert len(y) == 2
    assert y[0].tolist() == [1, 0]
    assert y[1].isnan().tolist() == [True, False]


# Groups.


def hospitals(rows: int = 90) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    where = np.array(["north", "south", "west"])[rng.integers(0, 3, rows)]
    age = rng.normal(50, 10, rows) + 20 * (where == "south")
    # Sums of squares of such a column lose all digits.
    code = 1e9 + rng.normal(0, 1, rows)
    return {
        "age": age,
        "code": code,
        "sex": np.array(["f", "m"])[rng.integers(0, 2, rows)],
        "hospital": where,
        "sick": np.where(age > 55, "ill", "well"),
    }


def test_groups_are_standardised_by_summed_statistics():
    rows = hospitals()
    parts = data.table(rows, "sick", group="hospital", name="h")
    raw = data.table(rows, "sick", group="hospital", name="h", standardise="none")
    assert [part.name for part in parts] == ["h/north", "h/south", "h/west"]
    assert len({part.labels for part in parts}) == 1
    assert parts[0].labels == (("h", "ill"), ("h", "well"))
    assert {part.classes for part in parts} == {(0, 1)}

    pooled = torch.cat([whole(part)[0] for part in raw]).double()
    together = torch.cat([whole(part)[0] for part in parts])
    assert abs(float(together[:, 0].mean())) < 1e-6
    assert abs(float(together[:, 0].double().std()) - 1) < 1e-6
    for mine, plain in zip(parts, raw, strict=True):
        expected = (whole(plain)[0][:, 0].double() - pooled[:, 0].mean()) / pooled[:, 0].std()
        assert torch.allclose(whole(mine)[0][:, 0].double(), expected, atol=1e-5)
        # The column of the group is no input, and the categories are common.
        assert whole(mine)[0].shape[1] == 4


def test_sums_of_clients_equal_pooled_statistics():
    generator = torch.Generator().manual_seed(0)
    pooled = torch.randn(1000, 3, generator=generator, dtype=torch.float64)
    pooled = pooled * torch.tensor([1.0, 1e-3, 1e4]) + torch.tensor([0.0, 1e6, -5.0], dtype=torch.float64)
    mean, deviation = moments(list(pooled.split([1, 299, 650, 50])))
    # In 80 bits, because torch's own deviation of the second column is wrong in the eighth digit.
    exact = pooled.numpy().astype(np.longdouble)
    assert np.allclose(mean.numpy(), exact.mean(0).astype(float), rtol=1e-12, atol=0)
    assert np.allclose(deviation.numpy(), exact.std(0, ddof=1).astype(float), rtol=1e-12, atol=0)
    naive = (pooled.square().mean(0) - pooled.mean(0).square()).clamp_min(0).sqrt()
    assert abs(float(naive[1] / deviation[1]) - 1) > 1e-3


def test_groups_and_test_tables():
    rows = hospitals()
    parts = data.table(rows, "sick", test=rows, group="hospital")
    assert [len(part.test) for part in parts] == [
        int((rows["hospital"] == name).sum()) for name in ("north", "south", "west")
    ]
    common = {name: column for name, column in rows.items() if name != "hospital"}
    shared = data.table(rows, "sick", test=common, group="hospital")
    assert [len(part.test) for part in shared] == [90, 90, 90]
    refused(
        "test data must have the groups of the training data, got 'east' in one of them only.",
        rows,
        "sick",
        test=rows | {"hospital": ["east", *rows["hospital"][1:]]},
        group="hospital",
    )
    refused(
        "every row must have a group, got none for column 'hospital' in row 1",
        rows | {"hospital": ["north", None, *rows["hospital"][2:]]},
        "sick",
        group="hospital",
    )
    refused(
        "got 0.2 of 1 examples of 'table/b'",
        {"x": [1.0] * 5, "y": list("nmnmn"), "g": list("aaaab")},
        "y",
        group="g",
    )


def test_a_table_in_the_settings():
    parts = data.table(hospitals(), "sick", group="hospital")
    training = cs.Training(epochs=5, lr=0.2)
    for schedule, method in (
        (cs.settings.federated(parts, rounds=2), cs.methods.fedavg()),
        (cs.settings.continual(parts, "domain"), cs.methods.er()),
        (cs.settings.multitask(parts), cs.methods.finetune()),
        (cs.settings.merging(parts), cs.methods.aggregate(cs.aggregators.Mean())),
    ):
        result = cs.run(schedule, method, model=cs.models.mlp(4, (16,), 2), training=training)
        assert result.score > 0.75, schedule


# Files and frames.


def test_forms_of_csv(tmp_path):
    expected = whole(data.table(written(tmp_path, PEOPLE), "sick", test=0.25, validation=0))[0]
    semicolons = PEOPLE.replace(",", ";")
    spaced = "\n".join(", ".join(line.split(",")) for line in PEOPLE.splitlines()) + "\n\n"
    quoted = PEOPLE.replace("Rome", '"Ro,\nme"').replace("Oslo", '"Os""lo"')
    for name, text in (
        ("semicolons.csv", semicolons),
        ("tabs.tsv", PEOPLE.replace(",", "\t")),
        ("spaced.csv", spaced),
        ("marked.csv", "\ufeff" + PEOPLE),
        ("windows.csv", PEOPLE.replace("\n", "\r\n")),
        ("quoted.csv", quoted),
    ):
        path = tmp_path / name
        path.write_bytes(text.encode())
        source = data.table(path, "sick", test=0.25, validation=0, name="people")
        assert torch.equal(whole(source)[0], expected), name


def test_large_files_are_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(_reading, "AT_ONCE", 3)
    lines = [f"{i},{'' if i < 3 else 'abc'[i % 3]},{'yn'[i % 2]}" for i in range(10)]
    path = written(tmp_path, "\n".join(["v,c,y", *lines]))
    source = data.table(path, "y", test=path, validation=0, missing=0, standardise="none")
    assert whole(source)[0][:, 0].tolist() == list(range(10))
    assert whole(source)[0][:4, 1:].tolist() == [[0, 0, 0]] * 3 + [[1, 0, 0]]
    late = written(tmp_path, "\n".join(["v,y", *[f"{i},y" for i in range(9)], "x,n"]), "late.csv")
    refused(f"got 'x' in line 11 of {late} and 0 in line 2", late, "y")


def test_words_for_missing_numbers_may_be_categories(tmp_path, monkeypatch):
    monkeypatch.setattr(_reading, "AT_ONCE", 2)
    rows = ["n,c,y", "1,None,a", "2,NA,b", ",None,a", "NA,None,b", "5,yes,a", "null,,b"]
    path = written(tmp_path, "\n".join(rows))
    x = whole(data.table(path, "y", test=path, validation=0, missing=0, standardise="none"))[0]
    # NA, None and yes are categories; among numbers, NA and null are missing.
    assert x.tolist() == [[1, 0, 1, 0], [2, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [5, 0, 0, 1], [0, 0, 0, 0]]


def test_lines_of_json(tmp_path):
    rows = [{"a": 1, "c": "x", "y": "n"}, {"a": 2.5, "y": "m", "c": "z"}, {"c": "x", "y": "n"}]
    path = written(tmp_path, "\n".join(map(json.dumps, rows)) + "\n\n", "rows.jsonl")
    source = data.table(path, "y", test=path, validation=0, missing=9, standardise="none")
    assert whole(source)[0].tolist() == [[1, 1, 0], [2.5, 0, 1], [9, 1, 0]]
    refused("got none for column 'a' in line 3", path, "y")
    bad = written(tmp_path, '{"a": 1}\n{"a": \n', "bad.jsonl")
    refused(f"every line of {bad} must be JSON, got line 2", bad, "y")
    refused("must be an object", written(tmp_path, "[1]\n", "list.jsonl"), "y")
    nested = written(tmp_path, '{"a": [1], "y": "n"}\n', "nested.jsonl")
    refused("column 'a' must hold numbers or text, got [1] in line 1 of", nested, "y")
    refused("must have rows, got an empty file", written(tmp_path, "\n", "empty.jsonl"), "y")


FRAMES = importlib.util.find_spec("pandas") is not None


@pytest.mark.skipif(not FRAMES, reason="pandas is missing")
def test_frames_of_pandas(tmp_path):
    import pandas as pd

    path = written(tmp_path, PEOPLE)
    expected = whole(data.table(path, "sick", test=path, validation=0))
    frame = pd.read_csv(path)
    categorical = frame.astype({"city": "category", "age": "Int64", "smokes": "string"})
    for rows in (frame, categorical, frame.set_index(frame["age"] + 7)):
        source = data.table(rows, "sick", test=rows, validation=0, name="people")
        assert torch.equal(whole(source)[0], expected[0])
        assert torch.equal(whole(source)[1], expected[1])

    holes = categorical.copy()
    holes.loc[1, ["age", "city"]] = pd.NA
    refused("got none for column 'age' in row 1 of `rows`", holes, "sick")
    filled = data.table(holes, "sick", test=holes, validation=0, missing="mean")
    assert whole(filled)[0][1, 0] == 0
    refused("must have different names, got 'age' twice", frame[["age", "age", "sick"]], "sick")
    refused("names of columns of `rows` must be text, got 0", pd.DataFrame(np.eye(3)), "sick")
    dates = frame.assign(day=pd.to_datetime(["2024-01-01"] * 4))
    refused("column 'day' must hold numbers or text", dates, "sick")
    objects = frame.assign(age=[1, "2", 3, 4])
    refused(
        "column 'age' must be all numbers or all text, got '2' in row 1 of `rows` and 1 in row 0 of `rows`",
        objects,
        "sick",
    )
    assert whole(data.table(frame.assign(flag=[True, False] * 2), "sick"))[0].shape[1] == 7


def test_parquet(tmp_path):
    path = tmp_path / "people.parquet"
    path.write_bytes(b"PAR1")
    if importlib.util.find_spec("pyarrow") is None:
        refused("reading parquet needs pyarrow, which is not installed: pip install pyarrow.", path, "sick")
        return
    import pandas as pd

    refused(f"cannot read {path} as .parquet", path, "sick")
    table = written(tmp_path, PEOPLE)
    pd.read_csv(table).to_parquet(path)
    expected = whole(data.table(table, "sick", test=table, validation=0))
    source = data.table(path, "sick", test=path, validation=0)
    assert torch.equal(whole(source)[0], expected[0])
    refused("nearest: sick.", path, "sik")


def test_datasets():
    datasets = pytest.importorskip("datasets", reason="datasets is missing")
    features = datasets.Features(
        {"age": datasets.Value("int32"), "label": datasets.ClassLabel(names=["well", "ill"])}
    )
    rows = datasets.Dataset.from_dict({"age": [1, 2, 3, 4], "label": [1, 0, 1, 0]}, features=features)
    # A view in another order and with a format gives the same plain numbers.
    for dataset in (rows, rows.select([0, 1, 2, 3]).with_format("torch")):
        source = data.table(dataset, "label", test=dataset, validation=0)
        assert source.labels == (("table", "well"), ("table", "ill"))
        assert whole(source)[1].tolist() == [1, 0, 1, 0]
    splits = datasets.DatasetDict({"train": rows, "test": rows})
    refused("must be one table, got the splits train, test; pass one, such as dataset['train'].", splits, "y")
    unknown = datasets.Dataset.from_dict({"age": [1, 2], "label": [1, -1]}, features=features)
    refused("got none for column 'label' in row 1", unknown, "label")


# Refusals.


@pytest.mark.parametrize(
    ("rule", "text", "options"),
    [
        ("must have a line of column names, got an empty file.", "", {}),
        ("must have rows, got none below the column names.", "a,y\n", {}),
        ("must have different names, got 'a' twice.", "a,a,y\n1,2,n\n", {}),
        ("must have 2 cells, got 3 in line 3.", "a,y\n1,n\n2,m,5\n", {}),
        (
            "must have a name, got none for column 1; an index may be left out with",
            ",a,y\n0,1,n\n1,2,m\n",
            {},
        ),
        ("`target` must be one of the columns, got 'z'; nearest: a, y.", "a,y\n1,n\n2,m\n", {"target": "z"}),
        (
            "`group` must be one of the columns, got 'sitee'; nearest: site.",
            "site,y\n1,n\n",
            {"group": "sitee"},
        ),
        ("`ignore` must be one of the columns, got 'b'", "a,y\n1,n\n", {"ignore": "b"}),
        ("`categories` must be one of the columns, got 'b'", "a,y\n1,n\n", {"categories": ["b"]}),
        ("must have a column besides the targets, got none.", "y\nn\nm\n", {}),
        ("column 'a' must be all numbers or all text, got 'x' in line 3", "a,y\n1,n\nx,m\n", {}),
        ("column 'a' must be finite, got infinity in line 2", "a,y\n1e999,n\n1,m\n", {}),
        ("numbers must have a decimal point, got '1,5' in column 'a'", 'a,y\n"1,5",n\n"2,5",m\n', {}),
        (
            "`missing` must be 'refuse', 'mean', 'drop' or a number, got 'median'.",
            PEOPLE,
            {"missing": "median"},
        ),
        ("`standardise` must be 'inputs', 'all' or 'none', got 'yes'.", PEOPLE, {"standardise": "yes"}),
        ("`test` must be a fraction in (0, 1), got 2.", PEOPLE, {"test": 2}),
        ("`kind` must be one of class, value, labels, got 'klass'.", PEOPLE, {"kind": "klass"}),
        ("classes must be one target column, got", PEOPLE, {"target": ["age", "city"], "kind": "class"}),
        ("several target columns must be numbers, got text in 'city'", PEOPLE, {"target": ["age", "city"]}),
        ("targets of kind 'value' must be numbers, got text", PEOPLE, {"target": "city", "kind": "value"}),
        (
            "labels must be 0 or 1, got 30 for column 'age' in line 2",
            PEOPLE,
            {"target": "age", "kind": "labels"},
        ),
        ("`classes` must be a list of different names", PEOPLE, {"target": "city", "classes": ["a", "a"]}),
        ("`target` must be the name of a column, or several, got none.", PEOPLE, {"target": []}),
        ("`target` must be the name of a column, or several, got 3.", PEOPLE, {"target": 3}),
        ("`ignore` must be the name of a column, or several, got [0].", PEOPLE, {"ignore": [0]}),
        ("`group` must be the name of a column, or several, got (1,).", PEOPLE, {"group": 1}),
        ("`categories` must be the name of a column, or several, got 2.", PEOPLE, {"categories": 2}),
        ("`missing` must be 'refuse', 'mean', 'drop' or a number, got nan.", PEOPLE, {"missing": NAN}),
        (
            "values of a column must be below 1e150, got larger ones in 'a'.",
            "a,y\n" + "".join(f"{i}e290,{'nm'[i % 2]}\n" for i in range(12)),
            {},
        ),
    ],
)
def test_files_that_are_refused(tmp_path, rule, text, options):
    refused(rule, written(tmp_path, text), **({"target": "y" if "y\n" in text[:20] else "sick"} | options))


def test_a_category_that_is_declared_twice_is_one():
    rows = {"a": ["u", "v"] * 5, "y": ["n", "m"] * 5}
    source = data.table(rows, "y", categories={"a": ["v", "u", "v"]}, validation=0)
    assert whole(source)[0].shape[1] == 2


def test_an_index_may_be_left_out(tmp_path):
    path = written(tmp_path, ",a,y\n0,1,n\n1,2,m\n")
    assert whole(data.table(path, "y", test=path, validation=0, ignore=[""]))[0].shape == (2, 1)


def test_columns_of_a_test_table(tmp_path):
    train = written(tmp_path, PEOPLE)
    lacking = written(tmp_path, "city,smokes,sick\nRome,yes,ill\n", "lacking.csv")
    refused(
        f"must have the columns of the training data, got none called 'age' in {lacking}.",
        train,
        "sick",
        test=lacking,
    )
    wrong = written(tmp_path, "age,city,smokes,sick\nold,Rome,yes,ill\n", "wrong.csv")
    refused(
        f"column 'age' must be numbers as in the training data, got 'old' in line 2 of {wrong}.",
        train,
        "sick",
        test=wrong,
    )
    unknown = written(tmp_path, "age,city,smokes,sick\n30,Paris,yes,ill\n", "unknown.csv")
    refused(f"one of its 3 known categories, got 'Paris' in line 2 of {unknown}", train, "sick", test=unknown)
    # Other columns, and another order, are no fault.
    more = written(tmp_path, "sick,extra,smokes,city,age\nill,1,yes,Rome,30\n", "more.csv")
    source = data.table(train, "sick", test=more, validation=0)
    assert torch.equal(whole(source, "test")[0][0], whole(source)[0][0])


def test_text_that_is_no_category():
    names = [f"name {i}" for i in range(60)]
    refused(
        "column 'n' must have few categories, got 60 different texts in 60 rows, such as 'name 0'; leave it "
        "out with ignore=['n']",
        {"n": names, "y": ["a", "b"] * 30},
        "y",
    )


def test_things_that_are_no_table(tmp_path):
    refused("must be a readable file, got none at no/such.csv", "no/such.csv", "y")
    refused("must be a .csv, .tsv, .jsonl or .parquet file, got a.xlsx", written(tmp_path, "", "a.xlsx"), "y")
    refused("must be a file, a DataFrame, a datasets.Dataset or a mapping", 3, "y")
    refused("columns of `rows` must be equally long, got {'a': 2, 'y': 1}", {"a": [1, 2], "y": ["n"]}, "y")
    refused("must have one value per row, got shape (2, 2)", {"a": np.eye(2), "y": ["n", "m"]}, "y")
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00a,y\n")
    refused(f"cannot read {binary}", binary, "y")


# The command line.


def test_a_table_on_the_command_line(tmp_path):
    lines = [f"{i % 7},{'ab'[i % 2]},{'north' if i % 3 else 'south'},{'yn'[i % 2]}" for i in range(60)]
    path = written(tmp_path, "\n".join(["v,c,site,y", *lines]))
    options = f"--data.rows {path} --data.target y --data.group site"
    training = "--setting federated --setting.rounds 2 --method fedavg --training.lr 0.5"
    command = ["run", "--data", "table", *options.split(), *training.split()]
    done = subprocess.run(
        [sys.executable, "-m", "consilience.cli", *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "1.0" in done.stdout


def test_float64_columns_stay_so_for_a_run_in_float64():
    rng = np.random.default_rng(0)
    x = 1.0 + 1e-9 * rng.normal(size=40)
    rows = {"x": x, "y": 3.0 + 1e-9 * rng.normal(size=40)}
    plain = data.table(rows, "y", test=rows, validation=0, standardise="none")
    assert whole(plain)[0][:, 0].numpy().tolist() == x.tolist()
    assert whole(plain)[1][:, 0].numpy().tolist() == rows["y"].tolist()
    # In float32 all of them are 1, and would be standardised to 0.
    column = whole(data.table(rows, "y", test=rows, validation=0))[0][:, 0].numpy()
    assert np.allclose(column, (x - x.mean()) / x.std(ddof=1), atol=1e-6, rtol=0) and column.std() > 0.9
