"""Experts as files: cards, other formats without pickle or code, and what is refused by name."""

from __future__ import annotations

import io
import json
import pickle
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import consilience as cs
from consilience import experts, models
from consilience.core.params import key, save
from consilience.experts._architecture import Normalised
from consilience.experts._card import KEY, Card

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def task(number: int = 1) -> cs.Source:
    return cs.data.split_classes(cs.data.digits(), 5)[number]


def expert_of(model: cs.Model, source: cs.Source | None = None, name: str = "one") -> cs.Expert:
    params, buffers = model.init(key(0, "expert"))
    # Statistics of norms that are not those of a new model.
    buffers = {n: b + 0.5 if b.is_floating_point() else b for n, b in buffers.items()}
    return cs.Expert(name, params, source or task(), buffers, model=model)


def answers(expert: cs.Expert, x: torch.Tensor) -> torch.Tensor:
    return expert.model(dict(expert.params), dict(expert.buffers), x, None, False)[0]


# --------------------------------------------------------------------------------------------- our own files


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (models.linear(64), (64,)),
        (models.mlp(64, (8, 4)), (64,)),
        (models.lenet(size=12), (1, 12, 12)),
        (models.conv(size=8, width=4), (1, 8, 8)),
        (models.resnet(20, channels=1, norm="batch", width=4), (1, 8, 8)),
        (models.fourier_features(models.mlp(64, (4,)), 8), (64,)),
        (models.multi_head(models.mlp(64, (4,)), 10), (64,)),
    ],
    ids=lambda value: value.name if isinstance(value, cs.Model) else "",
)
def test_a_file_has_all_that_is_needed_to_ask_an_expert(model, shape, tmp_path):
    x = torch.rand(5, *shape, generator=key(1))
    source = task().map(x=lambda x: x[:, :1].expand(-1, torch.Size(shape).numel()).reshape(-1, *shape))
    expert = expert_of(model, source)
    if isinstance(model, models.MultiHead):
        params, buffers = model.grow(dict(expert.params), dict(expert.buffers), source, key(0))
        expert = cs.Expert("one", params, source, buffers, model=model)
    experts.save(expert, tmp_path / "a.safetensors", licence="CC0", accuracy={"test": 0.5})
    card, again = experts.card(tmp_path / "a.safetensors"), experts.load(tmp_path / "a.safetensors")
    assert (card.licence, card.accuracy, card.data, card.shape) == ("CC0", {"test": 0.5}, source.name, shape)
    assert card.knows == (("digits", "2"), ("digits", "3")) and card.task == source.task
    assert again.name == "one" and again.labels == expert.labels
    assert again.source.classes == source.classes and len(again.source.test) == 0
    assert torch.equal(answers(again, x), answers(expert, x))


def test_normalisation_is_in_front_of_the_teacher(tmp_path):
    """Experts that were trained on normalised inputs take what all others take."""
    inner = models.conv(channels=3, size=8, width=4)
    model = Normalised(inner, (0.1, 0.2, 0.3), (0.5, 1.0, 2.0))
    source = task().map(x=lambda x: x.reshape(-1, 1, 8, 8).expand(-1, 3, 8, 8))
    expert = expert_of(model, source)
    experts.save(expert, tmp_path / "a.safetensors")
    again = experts.load(tmp_path / "a.safetensors")
    x = torch.rand(4, 3, 8, 8, generator=key(1))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.1, 0.2, 0.3), (0.5, 1.0, 2.0)))
    want = inner(dict(expert.params), {}, (x - mean) / std, None, False)[0]
    assert torch.allclose(answers(again, x), want, atol=1e-6)
    forward, _ = again.model.bind(dict(again.params), {}, False)
    assert torch.allclose(forward(x, None), want, atol=1e-6)
    assert torch.equal(
        again.model.features(dict(again.params), {}, x),
        inner.features(dict(expert.params), {}, (x - mean) / std),
    )
    assert not torch.allclose(
        answers(experts.load(tmp_path / "a.safetensors"), x),
        answers(cs.Expert("plain", expert.params, source, model=inner), x),
    )


def test_cards_survive_json_and_refuse_contradictions():
    card = Card(
        "a",
        "mlp(4)",
        (("s", "x"), ("s", "y")),
        (1,),
        "t",
        (4,),
        mean=(0.5,),
        std=(2.0,),
        accuracy={"v": 1.0},
        made_from=experts._files.origins([Card("b", "mlp(4)", (("s", "x"),), licence="CC0", content="12")]),
    )
    assert Card.of_json(json.loads(json.dumps(card.to_json())), "here") == card
    assert card.knows == (("s", "y"),)
    good = card.to_json()
    for change, says in (
        ({"labels": []}, "a label of its own for each output"),
        ({"labels": [["s", "x"], ["s", "x"]]}, "a label of its own for each output"),
        ({"classes": [2]}, "must be different outputs below 2"),
        ({"std": [0.0]}, "positive `std`"),
        ({"mean": []}, "must be given together"),
        ({"accuracy": {"v": 97}}, r"must be in \[0, 1\]"),
        ({"format": 9}, "must have the format 1, got 9"),
        ({"author": "x"}, "has no field 'author'"),
        ({"labels": 3}, "must be one of consilience's"),
        ({"name": "<a>"}, "stand in angle brackets"),
    ):
        with pytest.raises(cs.ConsilienceError, match=says):
            Card.of_json({**good, **change}, "here")


def test_a_file_without_a_card_is_refused_until_it_is_described(tmp_path):
    model = models.mlp(64, (4,))
    expert = expert_of(model)
    save(tmp_path / "plain.safetensors", expert.params)
    torch.save(expert.params, tmp_path / "plain.pth")
    labels = [("digits", str(i)) for i in range(10)]
    for path in (tmp_path / "plain.safetensors", tmp_path / "plain.pth"):
        with pytest.raises(
            cs.ConsilienceError, match="'plain' must have a card.* `labels` and `model`: .*--classes"
        ):
            experts.load(path)
        with pytest.raises(cs.ConsilienceError, match="give `labels`: what its outputs mean"):
            experts.load(path, model)
        with pytest.raises(cs.ConsilienceError, match="give `shape`, or a `source`"):
            experts.load(path, model, labels)
        for given in (model, "mlp(64, (4,))", models.nets.mlp(64, (4,), 10)):
            again = experts.load(path, given, labels, shape=(64,))
            x = torch.rand(3, 64)
            assert torch.equal(answers(again, x), answers(expert, x))
        assert experts.load(path, model, task(), shape=(64,)).source.classes == (2, 3)
        assert experts.load(path, model, labels, source=task()).source.name == "digits/2-3"
    # A card next to the file says the same.
    card = Card("two", "mlp(64, (4,))", tuple(labels), (0, 1), shape=(64,))
    (tmp_path / "plain.pth.card.json").write_text(json.dumps(card.to_json()))
    assert experts.load(tmp_path / "plain.pth").source.classes == (0, 1)


def test_the_folder_of_a_run_is_an_expert(tmp_path):
    source, model = task(), models.mlp(64, (4,))
    schedule, training = cs.settings.continual([source]), cs.Training(epochs=1)
    result = cs.run(schedule, cs.methods.finetune(), model, training, out=tmp_path / "run")
    with pytest.raises(cs.ConsilienceError, match="'run' must have a card, .* give `model`"):
        experts.load(tmp_path / "run")
    again = experts.load(tmp_path / "run", model, shape=(64,))
    x = source.test.whole()[0]
    assert again.labels == result.labels
    assert torch.equal(answers(again, x).argmax(1), result.agent.predict(x).argmax(1))


def test_a_folder_of_the_hub_is_called_by_its_name(tmp_path):
    expert = expert_of(models.mlp(64, (4,)))
    save(tmp_path / "digits" / "model.safetensors", expert.params)
    again = experts.load(tmp_path / "digits", expert.model, expert.labels, shape=(64,))
    assert again.name == "digits" and torch.equal(again.params["1.bias"], expert.params["1.bias"])


def test_a_damaged_file_is_found(tmp_path):
    path = experts.save(expert_of(models.mlp(64, (4,))), tmp_path / "a.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(cs.ConsilienceError, match="entries of expert 'one' must be those of its card"):
        experts.load(path)
    path.write_bytes(data[:-8])
    with pytest.raises(cs.ConsilienceError, match="safetensors"):
        experts.load(path)


BAD = {
    "missing": (
        lambda p: p.pop("1.bias"),
        "'one' must have all entries of its model, got none called '1.bias'",
    ),
    "shape": (
        lambda p: p.update({"1.bias": torch.zeros(3)}),
        r"'one' must have the shapes .*\(3,\) for '1.bias'",
    ),
    "more": (
        lambda p: p.update(other=torch.zeros(3)),
        "'one' must have no entries but its model's, got 'other'",
    ),
    "nan": (lambda p: p["1.bias"].fill_(torch.nan), "NaN or infinity in '1.bias' of the expert 'one'"),
}


@pytest.mark.parametrize("case", BAD)
def test_entries_that_do_not_fit_are_refused_on_both_sides(case, tmp_path):
    change, says = BAD[case]
    expert = expert_of(models.mlp(64, (4,)))
    params = {name: entry.clone() for name, entry in expert.params.items()}
    change(params)
    with pytest.raises(cs.ConsilienceError, match=says):
        experts.save(cs.Expert("one", params, task(), model=expert.model), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir()), "nothing is left by half"
    save(tmp_path / "one.safetensors", params)
    with pytest.raises(cs.ConsilienceError, match=says):
        experts.load(tmp_path / "one.safetensors", expert.model, task(), shape=(64,))


def test_labels_must_have_outputs(tmp_path):
    model = models.mlp(64, (4,), 1)
    with pytest.raises(
        cs.ConsilienceError, match="labels must be as many as its model's outputs, got 10 and 1"
    ):
        experts.save(expert_of(model), tmp_path / "a.safetensors")
    two = expert_of(models.mlp(64, (4,), 2))
    experts.save(two, tmp_path / "a.safetensors")
    assert experts.load(tmp_path / "a.safetensors").labels == (("digits", "2"), ("digits", "3"))
    wrong = cs.Expert("w", two.params, task(), labels=(("digits", "2"), ("digits", "9")), model=two.model)
    with pytest.raises(cs.ConsilienceError, match="output for each class of its source, got none for .*'3'"):
        experts.save(wrong, tmp_path / "b.safetensors")


# ---------------------------------------------------------------------------------------------- architectures


def test_code_of_a_card_is_imported_only_with_trust(tmp_path, monkeypatch):
    (tmp_path / "their_net.py").write_text(
        "from torch import nn\nopen('ran', 'w').close()\ndef make(width): return nn.Linear(64, width)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = models.wrap(nn.Linear(64, 10))
    expert = expert_of(model)
    with pytest.raises(
        cs.ConsilienceError, match='a name that builds it again, got Linear; give model="timm:NAME"'
    ):
        experts.save(expert, "a.safetensors")
    experts.save(expert, "a.safetensors", "their_net:make", {"width": 10})
    (tmp_path / "ran").unlink(missing_ok=True)
    sys.modules.pop("their_net", None)
    with pytest.raises(cs.ConsilienceError, match="'one' names code, their_net:make, .*--trust"):
        experts.load("a.safetensors")
    assert not (tmp_path / "ran").exists(), "nothing of it was imported"
    x = torch.rand(2, 64)
    assert torch.equal(answers(experts.load("a.safetensors", trust=True), x), answers(expert, x))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mlp(64, (4,)", "must be a call such as"),
        ("mlpp(64)", "nearest: mlp"),
        ("__import__('os')", "must be one of those of consilience.models"),
        ("mlp(open('x'))", "must be one of those of consilience.models"),
        ("mlp(1 + x)", "plain arguments"),
        ("mlp(0)", "`inputs` must be a whole number >= 1"),
        ("mlp(nosuch=1)", "has no argument `nosuch`"),
        ("backbone('resnet18')", "must be one of those of consilience.models"),
        ("64", "must be a call of a model"),
        ("transformers:BertModel", "transformers|must be a class such as AutoModel"),
        ("timm:nosuch_model", "timm"),
        ("timm:hf-hub:someone/model", "timm"),
    ],
)
def test_architectures_that_cannot_be_built_are_refused_by_the_experts_name(text, says, tmp_path):
    expert = expert_of(models.mlp(64, (4,)))
    card = Card("one", text, expert.labels, shape=(64,))
    save(tmp_path / "a.safetensors", expert.params, {KEY: json.dumps(card.to_json())})
    with pytest.raises(cs.ConsilienceError, match=says):
        experts.load(tmp_path / "a.safetensors", trust=False)


def test_models_of_timm_and_transformers_need_no_code(tmp_path):
    timm = pytest.importorskip("timm")
    transformers = pytest.importorskip("transformers")
    source = task().map(x=lambda x: x.reshape(-1, 1, 8, 8).repeat(1, 3, 4, 4))
    x = torch.rand(2, 3, 32, 32)
    sizes = {"num_classes": 10, "in_chans": 3}
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = {"model_type": "vit", "image_size": 32, "patch_size": 8, "num_labels": 10, **small}
    plain = {name: value for name, value in config.items() if name != "model_type"}
    made = transformers.AutoModelForImageClassification.from_config(
        transformers.AutoConfig.for_model("vit", **plain)
    )
    for model, text, arguments in (
        (models.wrap(timm.create_model("resnet10t", **sizes)), "timm:resnet10t", sizes),
        (models.wrap(made, outputs=10), "transformers:AutoModelForImageClassification", config),
    ):
        params, buffers = model.init(key(0))
        expert = cs.Expert("one", params, source, buffers, model=model)
        experts.save(expert, tmp_path / "a.safetensors", text, arguments)
        assert torch.equal(answers(experts.load(tmp_path / "a.safetensors"), x), answers(expert, x))


@pytest.mark.parametrize("key", ["auto_map", "_attn_implementation", "attn_implementation"])
def test_configurations_name_no_code(key, tmp_path):
    pytest.importorskip("transformers")
    card = Card(
        "one",
        "transformers:AutoModelForImageClassification",
        expert_of(models.mlp(64)).labels,
        shape=(3, 32, 32),
        arguments={"model_type": "vit", "parts": [{key: "someone/kernel"}]},
    )
    save(tmp_path / "a.safetensors", {"w": torch.zeros(1)}, {KEY: json.dumps(card.to_json())})
    with pytest.raises(cs.ConsilienceError, match=f"'one' must name no code, got '{key}'"):
        experts.load(tmp_path / "a.safetensors")


# ------------------------------------------------------------------------------------------ archives of torch


class Net(nn.Module):
    """Branches, norms, a non-persistent buffer, in-place activations, and sizes that follow the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(64, 3)
        self.register_buffer("scale", torch.full((4, 1, 1), 2.0), persistent=False)

    def forward(self, x):
        z = nn.functional.relu(self.norm(self.conv(x)), inplace=True) * self.scale
        a, b = z.chunk(2, 1)
        return self.head(torch.cat([b, a + 0.1], 1).view(x.shape[0], -1))


def net() -> nn.Module:
    torch.manual_seed(0)
    made = Net().eval()
    nn.init.normal_(made.norm.running_mean)
    return made


LABELS = [("letters", name) for name in "abc"]
X = torch.rand(5, 1, 4, 4, generator=key(5))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    batch = torch.export.Dim("batch")
    for name, dynamic in (("fixed", None), ("free", ({0: batch},))):
        program = torch.export.export(net(), (torch.rand(2, 1, 4, 4),), dynamic_shapes=dynamic)
        torch.export.save(program, folder / f"{name}.pt2")
    return folder


@pytest.mark.parametrize("name", ["fixed", "free"])
def test_an_archive_of_torch_export_answers_as_its_module_with_gradients(name, exported):
    expert = experts.load(exported / f"{name}.pt2", labels=LABELS)
    assert (expert.name, expert.source.train.first()[0].shape) == (name, (1, 1, 4, 4))
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    out, want = answers(expert, x), net()(y)
    assert torch.equal(out, want)
    out.square().sum().backward()
    want.square().sum().backward()
    assert torch.allclose(x.grad, y.grad)
    # The weights are under their own names.
    assert {"entries.conv/weight", "entries.head/bias"} < set(expert.params)


def test_a_card_next_to_an_archive_describes_it(exported):
    expert = experts.load(exported / "free.pt2", labels=LABELS, name="vowels")
    experts.save(expert, exported / "free.pt2", licence="CC0")
    assert experts.load(exported / "free.pt2").name == "vowels"
    assert experts.card(exported / "free.pt2").licence == "CC0"
    (exported / "free.pt2.card.json").unlink()


def test_probabilities_are_taken_back_to_logits(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)).eval()
    torch.export.save(torch.export.export(module, (torch.rand(2, 4),)), tmp_path / "a.pt2")
    x = torch.rand(7, 4)
    out = answers(experts.load(tmp_path / "a.pt2", labels=LABELS), x)
    assert torch.allclose(out, module[0](x))


class Ran:
    """An object whose pickle writes a file when it is read."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def rewritten(path: Path, out: Path, changes: dict[str, bytes]) -> Path:
    """A copy of an archive with other files in it; names may end as given."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            found = next((data for end, data in changes.items() if name.endswith(end)), old.read(name))
            new.writestr(name, found)
    return out


def test_no_pickle_of_an_archive_is_read(exported, tmp_path):
    """`torch.export.load` would run this one."""
    evil = pickle.dumps(Ran(str(tmp_path / "ran")))
    path = rewritten(exported / "free.pt2", tmp_path / "a.pt2", {"sample_inputs/model.pt": evil})
    assert torch.equal(answers(experts.load(path, labels=LABELS), X), net()(X))
    assert not (tmp_path / "ran").exists()

    buffer = io.BytesIO()
    torch.save(Ran(str(tmp_path / "ran")), buffer)
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("weights_config.json"))
        config = json.loads(archive.read(name))
    config["config"]["conv.weight"]["use_pickle"] = True
    changes = {"weights_config.json": json.dumps(config).encode(), "weights/weight_0": buffer.getvalue()}
    path = rewritten(exported / "free.pt2", tmp_path / "b.pt2", changes)
    with pytest.raises(cs.ConsilienceError, match="'b' must need no pickle, got one for 'conv.weight'"):
        experts.load(path, labels=LABELS)
    assert not (tmp_path / "ran").exists()


def test_texts_and_operators_of_an_archive_are_no_code(exported, tmp_path):
    with zipfile.ZipFile(exported / "free.pt2") as archive:
        text = archive.read(next(n for n in archive.namelist() if n.endswith("models/model.json"))).decode()
    ran = tmp_path / "ran"
    # A size that torch.export.load gives to sympy, which evaluates it.
    evil = text.replace("Symbol('s77', positive=True, integer=True)", f"open({str(ran)!r}, 'w')")
    evil = evil if evil != text else text.replace('"expr_str": "', f'"expr_str": "open({str(ran)!r}) or ')
    path = rewritten(exported / "free.pt2", tmp_path / "a.pt2", {"models/model.json": evil.encode()})
    experts.load(path, labels=LABELS)
    assert not ran.exists()
    for target in (
        "torch.load",
        "torch.ops.aten.from_file.default",
        "_operator.attrgetter",
        "torch.ops.aten.rand.default",
    ):
        other = text.replace("torch.ops.aten.conv2d.default", target)
        path = rewritten(exported / "free.pt2", tmp_path / "b.pt2", {"models/model.json": other.encode()})
        with pytest.raises(
            cs.ConsilienceError, match=f"'b' must have operators of the list .* got '{target}'"
        ):
            experts.load(path, labels=LABELS)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        z = self.first(x)
        part = z[:, :2]
        z.relu_()
        return self.head(torch.cat([part, part], 1))


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(x), x


PROGRAMS = {
    "training mode": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).train(), "eval mode"),
    "batch norm that trains": (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train(), "eval"),
    "shared memory": (lambda: Shared().eval(), "must not change memory that has several names, got 'relu_'"),
    "two outputs": (lambda: Doubled().eval(), "must have one tensor as its output, got 2 outputs"),
    "no logits": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Unflatten(1, (3, 1))).eval(), "must give logits"),
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_archives_that_are_no_classifiers_are_refused_by_name(case, tmp_path):
    make, says = PROGRAMS[case]
    with torch.no_grad():
        program = torch.export.export(make(), (torch.rand(2, 4),))
    torch.export.save(program, tmp_path / "worst.pt2")
    with pytest.raises(cs.ConsilienceError, match=f"'worst' .*{says}"):
        experts.load(tmp_path / "worst.pt2", labels=LABELS)


def test_damaged_archives_are_refused_in_one_line(exported, tmp_path):
    data = (exported / "free.pt2").read_bytes()
    for number, cut in enumerate((b"", data[:100], data[: len(data) // 2], b"PK" + data[2:200])):
        (tmp_path / f"{number}.pt2").write_bytes(cut)
        with pytest.raises(cs.ConsilienceError, match="archive of torch.export"):
            experts.load(tmp_path / f"{number}.pt2", labels=LABELS)
    for ends in ({"models/model.json": b"{"}, {"models/model.json": b"[]"}, {"weights_config.json": b"{}"}):
        path = rewritten(exported / "free.pt2", tmp_path / "x.pt2", ends)
        with pytest.raises(cs.ConsilienceError, match="'x'"):
            experts.load(path, labels=LABELS)
    with pytest.raises(cs.ConsilienceError, match="has no effect on free.pt2"):
        experts.load(exported / "free.pt2", models.mlp(4), LABELS)
    with pytest.raises(cs.ConsilienceError, match="an output for each label, got 3 outputs and 4 labels"):
        experts.load(exported / "free.pt2", labels=[*LABELS, ("letters", "d")])


@pytest.mark.parametrize("end", ["safetensors", "pth", "onnx", "pkl"])
def test_pickles_are_not_run_whatever_they_are_called(end, tmp_path):
    if end == "onnx":
        pytest.importorskip("onnx")
    (tmp_path / f"a.{end}").write_bytes(pickle.dumps(Ran(str(tmp_path / "ran"))))
    with pytest.raises(cs.ConsilienceError):
        experts.load(tmp_path / f"a.{end}", models.mlp(64) if end != "onnx" else None, LABELS, shape=(64,))
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------------- ONNX


def onnx_file(path: Path, nodes, inputs, weights=None, shape=(4,), batch="batch", opset=20, outputs=("out",)):
    """Write an ONNX file of some nodes (kind, inputs, outputs, attributes)."""
    onnx = pytest.importorskip("onnx")
    make, numbers = onnx.helper, onnx.numpy_helper
    graph = make.make_graph(
        [make.make_node(kind, list(ins), list(outs), **given) for kind, ins, outs, given in nodes],
        "graph",
        [make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [batch, *shape]) for name in inputs],
        [make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
        [numbers.from_array(torch.as_tensor(w).numpy(), name) for name, w in (weights or {}).items()],
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", opset)], ir_version=9)
    onnx.save(model, str(path))
    return path


def whole(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long)


IMAGES, ROWS = (2, 7, 6), (4,)
KERNEL = torch.rand(4, 2, 3, 2, generator=key(6))
OPERATORS = {
    "gemm": (ROWS, "Gemm", [torch.rand(3, 4), torch.rand(3)], {"transB": 1, "alpha": 0.5, "beta": 2.0}, 20),
    "conv": (IMAGES, "Conv", [KERNEL, torch.rand(4)], {"pads": [1, 0, 1, 0], "strides": [2, 1]}, 20),
    "conv, uneven": (IMAGES, "Conv", [KERNEL], {"pads": [0, 1, 2, 0], "dilations": [2, 1]}, 20),
    "conv, same": (IMAGES, "Conv", [KERNEL], {"auto_pad": "SAME_UPPER", "strides": [2, 3]}, 20),
    "conv, same below": (IMAGES, "Conv", [KERNEL], {"auto_pad": "SAME_LOWER"}, 20),
    "conv, groups": (IMAGES, "Conv", [torch.rand(4, 1, 2, 2)], {"group": 2}, 20),
    "max": (IMAGES, "MaxPool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}, 20),
    "max, uneven": (IMAGES, "MaxPool", [], {"kernel_shape": [2, 3], "pads": [1, 0, 0, 0]}, 20),
    "max, ceil": (IMAGES, "MaxPool", [], {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}, 20),
    "mean": (IMAGES, "AveragePool", [], {"kernel_shape": [3, 2], "pads": [1, 1, 1, 1]}, 20),
    "mean, padded": (
        IMAGES,
        "AveragePool",
        [],
        {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1},
        20,
    ),
    "mean, uneven": (IMAGES, "AveragePool", [], {"kernel_shape": [2, 2], "pads": [1, 0, 0, 1]}, 20),
    "mean of all": (IMAGES, "GlobalAveragePool", [], {}, 20),
    "largest of all": (IMAGES, "GlobalMaxPool", [], {}, 20),
    "batch norm": (
        IMAGES,
        "BatchNormalization",
        [torch.rand(2) + 0.5 for _ in range(4)],
        {"epsilon": 0.01},
        20,
    ),
    "instance norm": (IMAGES, "InstanceNormalization", [torch.rand(2), torch.rand(2)], {"epsilon": 0.1}, 20),
    "layer norm": (ROWS, "LayerNormalization", [torch.rand(4), torch.rand(4)], {"axis": -1}, 20),
    "reshape": (IMAGES, "Reshape", [whole(0, -1, 3)], {}, 20),
    "flatten": (IMAGES, "Flatten", [], {"axis": 2}, 20),
    "transpose": (IMAGES, "Transpose", [], {"perm": [0, 3, 1, 2]}, 20),
    "slice": (IMAGES, "Slice", [whole(1, -1), whole(2, -9), whole(1, 2), whole(1, -2)], {}, 20),
    "old slice": (IMAGES, "Slice", [], {"starts": [1], "ends": [-1], "axes": [3]}, 9),
    "gather": (IMAGES, "Gather", [whole(-1, 0)], {"axis": 2}, 20),
    "gather one": (IMAGES, "Gather", [torch.tensor(1)], {"axis": 1}, 20),
    "pad": (IMAGES, "Pad", [whole(0, 0, 1, 2, 0, 0, 0, 1), torch.tensor(0.5)], {}, 20),
    "reflect": (IMAGES, "Pad", [whole(0, 0, 1, 2, 0, 0, 0, 1)], {"mode": "reflect"}, 20),
    "edge": (IMAGES, "Pad", [whole(0, 0, 1, 2, 0, 0, 0, 1)], {"mode": "edge"}, 20),
    "squeeze": ((1, 4), "Squeeze", [whole(1)], {}, 20),
    "old squeeze": ((1, 4), "Squeeze", [], {"axes": [1]}, 11),
    "unsqueeze": (ROWS, "Unsqueeze", [whole(-1, 1)], {}, 20),
    "expand": ((1, 4), "Expand", [whole(1, 3, 1)], {}, 20),
    "tile": (ROWS, "Tile", [whole(1, 2)], {}, 20),
    "mean over": (IMAGES, "ReduceMean", [whole(-1, 1)], {"keepdims": 0}, 20),
    "old mean over": (IMAGES, "ReduceMean", [], {"axes": [2, 3]}, 13),
    "sum over": (IMAGES, "ReduceSum", [whole(1)], {}, 20),
    "clip": (ROWS, "Clip", [torch.tensor(0.2), torch.tensor(0.7)], {}, 20),
    "old clip": (ROWS, "Clip", [], {"min": 0.2, "max": 0.7}, 6),
    "prelu": (IMAGES, "PRelu", [torch.rand(2, 1, 1)], {}, 20),
    "leaky": (ROWS, "LeakyRelu", [], {"alpha": 0.3}, 20),
    "elu": (ROWS, "Elu", [], {"alpha": 0.3}, 20),
    "hard sigmoid": (ROWS, "HardSigmoid", [], {"alpha": 0.3, "beta": 0.4}, 20),
    "hard swish": (ROWS, "HardSwish", [], {}, 20),
    "gelu": (ROWS, "Gelu", [], {"approximate": "tanh"}, 20),
    "erf": (ROWS, "Erf", [], {}, 20),
    "power": (ROWS, "Pow", [torch.tensor(3.0)], {}, 20),
    "matrices": ((3, 4), "MatMul", [torch.rand(4, 5)], {}, 20),
    "cast": (ROWS, "Cast", [], {"to": 7}, 20),
    "dropout": (ROWS, "Dropout", [], {}, 20),
}


@pytest.mark.parametrize("case", OPERATORS)
def test_operators_are_those_of_the_reference(case, tmp_path):
    shape, kind, more, given, opset = OPERATORS[case]
    names = [f"w{i}" for i in range(len(more))]
    nodes = [(kind, ["x", *names], ["out"], given)]
    path = onnx_file(
        tmp_path / "a.onnx", nodes, ["x"], dict(zip(names, more, strict=True)), shape, opset=opset
    )
    from onnx.reference import ReferenceEvaluator

    from consilience.experts._graph import Graph
    from consilience.experts._onnx import program_of

    x = 2 * torch.rand(3, *shape, generator=key(7)) - 1
    (want,) = ReferenceEvaluator(str(path)).run(None, {"x": x.numpy()})
    out = Graph(program_of(path, "a"))(x)
    assert out.shape == want.shape
    assert torch.allclose(out.double(), torch.as_tensor(want.copy()).double(), atol=1e-5)


def small_onnx(path: Path, **more) -> Path:
    """A net as exporters write it: its batch in a constant or not, probabilities at the end."""
    weights = {
        "kernel": torch.rand(4, 1, 3, 3, generator=key(1)) - 0.5,
        "head": torch.rand(3, 16, generator=key(2)) - 0.5,
        "bias": torch.rand(3, generator=key(3)),
    }
    nodes = [
        ("Conv", ["x", "kernel"], ["a"], {"pads": [1, 1, 1, 1]}),
        ("Relu", ["a"], ["b"], {}),
        ("MaxPool", ["b"], ["c"], {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("Shape", ["c"], ["s"], {}),
        ("Gather", ["s", "zero"], ["n"], {}),
        ("Concat", ["n", "rest"], ["to"], {"axis": 0}),
        ("Reshape", ["c", "to"], ["d"], {}),
        ("Gemm", ["d", "head", "bias"], ["z"], {"transB": 1}),
        ("Softmax", ["z"], ["out"], {"axis": 1}),
    ]
    return onnx_file(path, nodes, ["x"], {**weights, "zero": whole(0), "rest": whole(-1)}, (1, 4, 4), **more)


@pytest.mark.parametrize("batch", ["batch", 1, 2])
def test_an_onnx_file_gives_logits_with_gradients(batch, tmp_path):
    path = small_onnx(tmp_path / "small.onnx", batch=batch)
    expert = experts.load(path, labels=LABELS)
    assert expert.source.train.first()[0].shape == (1, 1, 4, 4)
    x = X.clone().requires_grad_()
    out = answers(expert, x)
    from onnx.reference import ReferenceEvaluator

    reference = ReferenceEvaluator(str(path))
    want = torch.cat([torch.as_tensor(reference.run(None, {"x": row[None].numpy()})[0]) for row in X])
    assert out.shape == (5, 3) and torch.allclose(out.softmax(1), want, atol=1e-6)
    assert not torch.allclose(out, want), "logits, not probabilities"
    out.sum().backward()
    step = torch.zeros_like(X)
    step[0, 0, 1, 1] = 1e-3
    with torch.no_grad():
        slope = (answers(expert, X + step) - answers(expert, X - step)).sum() / 2e-3
    assert float(slope) == pytest.approx(float(x.grad[0, 0, 1, 1]), abs=2e-2)


def test_onnx_files_that_are_not_read_say_why_by_name(tmp_path):
    onnx = pytest.importorskip("onnx")
    gemm = ("Gemm", ["x", "w"], ["z"], {})
    weights = {"w": torch.rand(4, 3)}

    def refused(name, nodes, says, **more):
        path = onnx_file(tmp_path / f"{name}.onnx", nodes, ["x"], weights, **more)
        with pytest.raises(cs.ConsilienceError, match=f"'{name}' .*{says}"):
            experts.load(path, labels=LABELS)

    refused("odd", [gemm, ("Einsum", ["z"], ["out"], {"equation": "ij->ij"})], "list .* got Einsum; export")
    refused("numbers", [gemm, ("ArgMax", ["z"], ["out"], {"axis": 1})], "got ArgMax")
    refused("extra", [("Gemm", ["x", "w"], ["out"], {"gamma": 1.0})], "got Gemm with gamma")
    refused("two", [gemm, ("Relu", ["z"], ["out"], {})], "one output, got 2: z, out", outputs=("z", "out"))
    refused("whole", [gemm, ("Cast", ["z"], ["out"], {"to": 7})], "must give logits .* got torch.int64")
    refused("cut", [("Gemm", ["x", "nothing"], ["out"], {})], "nothing")
    norm = ("BatchNormalization", ["z", *["w0"] * 4], ["out"], {"training_mode": 1})
    refused("training", [gemm, norm], "eval mode")

    # Weights may lie next to the file, and nowhere else.
    path = onnx_file(tmp_path / "far.onnx", [("Gemm", ["x", "w"], ["out"], {})], ["x"], weights)
    model, apart = onnx.load(str(path)), {"save_as_external_data": True, "size_threshold": 0}
    onnx.save(model, str(tmp_path / "near.onnx"), location="near.data", **apart)
    x = torch.rand(2, 4)
    assert torch.allclose(answers(experts.load(tmp_path / "near.onnx", labels=LABELS), x), x @ weights["w"])
    for place in ("../secret", "/etc/hostname", "link"):
        model = onnx.load(str(tmp_path / "far.onnx"), load_external_data=False)
        model.graph.initializer[0].raw_data = b"x" * 48
        onnx.external_data_helper.set_external_data(model.graph.initializer[0], place, 0, 48)
        (tmp_path / "far.onnx").write_bytes(model.SerializeToString())
        if place == "link":
            (tmp_path / "link").symlink_to("/etc/hostname")
        with pytest.raises(cs.ConsilienceError, match="far|link"):
            experts.load(tmp_path / "far.onnx", labels=LABELS)


def test_an_onnx_file_needs_the_package_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    (tmp_path / "a.onnx").write_bytes(b"x")
    with pytest.raises(cs.ConsilienceError, match=r"'a' is an ONNX file.* pip install consilience\[onnx\]"):
        experts.load(tmp_path / "a.onnx", labels=LABELS)
