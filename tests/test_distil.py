"""Distilling teachers into a student, streams of experts as files, and choosing among them."""

from __future__ import annotations

import json
import math
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import consilience as cs
from consilience import experts, models
from consilience.cli.main import main
from consilience.consolidators.teachers import Joint
from consilience.core.params import key
from consilience.core.teacher import Teacher
from consilience.experts import _distil, _pictures, _suggest, _train

DIGITS = cs.data.digits()
X = torch.randn(200, 6, generator=key("x"))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def source(name="one", classes=(0, 1, 2), space="s", of=3) -> cs.Source:
    """A source of some of the classes of a label space."""
    y = torch.tensor(classes)[torch.arange(len(X)) % len(classes)]
    names, test = [str(i) for i in range(of)], (X[160:], y[160:])
    made = cs.data.arrays(X[:160], y[:160], test, names, name, space=space)
    return replace(made, classes=classes)


def linear(outputs: int = 3, seed: int = 0, scale: float = 3.0) -> tuple[cs.Model, dict[str, torch.Tensor]]:
    model = models.linear(6, outputs)
    return model, {name: scale * p for name, p in model.init(key(seed))[0].items()}


def expert(name: str = "one", outputs: int = 3, seed: int = 0, **more) -> cs.Expert:
    model, params = linear(outputs, seed)
    return cs.Expert(name, params, source(name, **more), model=model)


def far(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# -------------------------------------------------------------------------------------------- what is learned


@pytest.mark.parametrize(
    "options", [{}, {"of": "logits"}, {"features": 1.0}, {"features": 1.0, "of": "logits"}]
)
def test_a_model_distilled_into_itself_does_not_change(options):
    model = models.mlp(6, (5,), 3)
    params, _ = model.init(key(3))
    teacher = cs.Expert("one", params, source(), model=model)
    result = cs.distil([teacher], model, X, base=params, steps=20, lr=0.1, **options)
    assert far(params, result.params) == 0


def test_a_linear_teacher_is_recovered_by_a_linear_student():
    teacher = expert()
    result = cs.distil([teacher], models.linear(6, 3), X, of="logits", lr=0.05, steps=500)
    assert far(teacher.params, result.params) < 1e-4
    # Probabilities do not change with a constant in all logits.
    result = cs.distil([teacher], models.linear(6, 3), X, lr=0.1, steps=600, temperature=3.0)
    centred = [{n: p - p.mean(0) for n, p in ps.items()} for ps in (teacher.params, result.params)]
    assert far(*centred) < 1e-4


def test_the_student_sees_the_view_that_the_teacher_sees():
    """With other views for each, noise would stay in the loss, and in the student."""

    def noisy(x, generator=None):
        return x + torch.randn(x.shape)

    teacher = expert()
    result = cs.distil([teacher], models.linear(6, 3), X, of="logits", lr=0.05, steps=300, augment=noisy)
    assert far(teacher.params, result.params) < 1e-4


def test_the_loss_is_that_of_the_papers():
    part = cs.consolidators.teacher_distillation(X, temperature=2.5)
    out, aim = torch.randn(4, 3, generator=key(1)), torch.randn(4, 3, generator=key(2))
    p = (aim / 2.5).softmax(1)
    want = 2.5**2 * (p * (p.log() - (out / 2.5).softmax(1).log())).sum(1).mean()
    assert torch.allclose(part.divergence(out, aim), want)
    assert torch.allclose(part.divergence(aim + 7, aim), torch.zeros(()), atol=1e-6)
    part = cs.consolidators.teacher_distillation(X, of="logits")
    assert torch.allclose(part.divergence(out, aim), ((out - aim) ** 2).mean())


def test_the_loss_of_features_teaches_features():
    """A student of other width learns the teacher's features through the projector."""
    model = models.mlp(6, (5,), 3)
    params, _ = model.init(key(3))
    teacher, student = cs.Expert("one", params, source(), model=model), models.mlp(6, (9,), 3)
    wanted = model.features(params, {}, X)

    def explained(result: cs.Result) -> float:
        """How much of the teacher's features a linear map of the student's gives."""
        psi = student.features(dict(result.params), {}, X)
        psi = torch.cat([psi, torch.ones(len(psi), 1)], 1)
        left = wanted - psi @ torch.linalg.lstsq(psi, wanted).solution
        return 1 - float(left.square().sum() / (wanted - wanted.mean(0)).square().sum())

    without, with_ = (
        explained(cs.distil([teacher], student, X, steps=150, lr=0.02, features=weight))
        for weight in (0.0, 30.0)
    )
    assert with_ > without + 0.02


def teachers() -> list[Teacher]:
    made = []
    for number, (classes, outputs) in enumerate([((0, 2), (1, 0)), ((2, 4, 5), (0, 1, 2))]):
        model, params = linear(3, number)
        made.append(Teacher(f"t{number}", model, params, {}, classes=classes, outputs=outputs))
    return made


def test_answers_are_means_over_those_that_know_a_class():
    joint = Joint.of(teachers(), (2.0, 0.5))
    assert joint.columns.tolist() == [0, 2, 4, 5]
    first, second = (t.model(dict(t.params), {}, X, None, False)[0] for t in teachers())
    first, second = first / 2, second / 0.5
    want = torch.stack([first[:, 1], (first[:, 0] + second[:, 0]) / 2, second[:, 1], second[:, 2]], 1)
    assert torch.allclose(joint.answer(X), want, atol=1e-5)
    other = Joint.of(teachers()[::-1], (0.5, 2.0))
    assert torch.allclose(other.answer(X), want, atol=1e-5), "whatever their order"


def test_scales_of_teachers_become_one():
    part = cs.consolidators.teacher_distillation(X, calibrate="scale")
    both = teachers()
    both[1] = replace(both[1], params={name: 10 * p for name, p in both[1].params.items()})
    scales = part._scales(both, X)

    def rms(teacher: Teacher, scale: float) -> float:
        z = teacher(X) / scale
        return float((z - z.mean(1, keepdim=True)).square().mean().sqrt())

    assert rms(both[0], scales[0]) == pytest.approx(rms(both[1], scales[1]), rel=1e-5)
    assert sum(scales) / 2 == pytest.approx(1.0)


def test_temperatures_have_the_least_cross_entropy():
    y = (torch.arange(200) * 7) % 3
    z = 4 * F.one_hot(y, 3).float() + 3 * torch.randn(200, 3, generator=key(4))
    found = _distil.temperature_of(z, y)
    grid = torch.linspace(0.1, 10, 2000)
    losses = torch.stack([F.cross_entropy(z / t, y) for t in grid])
    assert found == pytest.approx(float(grid[losses.argmin()]), abs=0.01)
    assert _distil.temperature_of(z, z.argmax(1)) < 0.06, "as sharp as it can be where all is right"


def test_teachers_of_any_kind_make_one_student(tmp_path):
    """A net of ours, one that normalises, and an archive of torch.export, over overlapping classes."""
    parts = [(0, 1, 2, 3), (3, 4, 5, 6), (6, 7, 8, 9)]
    one = cs.data.split_classes(DIGITS, 1)[0]
    made = []
    for number, classes in enumerate(parts):
        y = one.train.targets()
        rows = torch.isin(y, torch.tensor(classes)).nonzero()[:, 0]
        part = replace(one.select(rows), name=f"part-{number}", classes=classes)
        model = (
            models.mlp(64, (32,))
            if number != 1
            else experts._architecture.Normalised(models.mlp(64, (32,)), (0.3,), (0.4,))
        )
        result = cs.run(cs.settings.continual([part]), cs.methods.finetune(), model, cs.Training(epochs=3))
        path = tmp_path / f"part-{number}.safetensors"
        experts.save(
            cs.Expert(f"part-{number}", result.params, part, labels=result.labels, model=model), path
        )
        made.append(path)
    loaded = experts.load(made[2])
    module = models.nets.mlp(64, (32,), 10)
    module.load_state_dict(dict(loaded.params))
    torch.export.save(torch.export.export(module.eval(), (torch.rand(2, 64),)), tmp_path / "part-2.pt2")
    experts.save(loaded, tmp_path / "part-2.pt2")
    made[2] = tmp_path / "part-2.pt2"

    result = cs.distil(made, models.mlp(64, (16,)), DIGITS, steps=150, lr=0.02)
    assert set(result.labels) == set(DIGITS.labels)
    rows = [
        _distil.row_of(e, _distil.known_part(DIGITS, result.labels), result.labels)
        for e in _distil.experts_of(made)
    ]
    assert all(row.own > 0.5 for row in rows)
    assert result.score > max(row.accuracy for row in rows) + 0.1, "it knows more than any teacher"


def test_unlabelled_inputs_are_enough_and_only_known_classes_are_judged():
    teacher = cs.Expert("one", linear()[1], source(), model=linear()[0])
    card = experts._card.Card("one", "", teacher.labels, shape=(6,))
    blank = replace(teacher, source=experts._files.blank(card))
    result = cs.distil([blank], linear()[0], X, steps=3)
    assert math.isnan(result.score)
    test = source("test", (1, 2, 4), of=5)
    part = _distil.known_part(test, _distil.union([teacher]))
    assert part.labels == (("s", "1"), ("s", "2"))
    assert set(part.test.targets().tolist()) == {0, 1}
    right = teacher.model(dict(teacher.params), {}, part.test.whole()[0], None, False)[0].argmax(1) - 1
    result = cs.distil([teacher], linear()[0], X, test=test, base=teacher.params, steps=3)
    assert result.score == pytest.approx(float((right == part.test.targets()).double().mean()))
    assert _distil.known_part(source("other", space="t"), _distil.union([teacher])) is None


# ------------------------------------------------------------------------------------------------- bad input


def test_teachers_that_cannot_be_asked_are_refused_by_name():
    one, two = expert("one"), expert("two", seed=1)
    wide = cs.Expert("wide", models.linear(7, 3).init(key(0))[0], source("wide"), model=models.linear(7, 3))
    wild = replace(two, name="wild", params={name: p * math.inf for name, p in two.params.items()})
    huge = replace(two, name="huge", params={name: p * 1e38 for name, p in two.params.items()})
    headless = models.wrap(nn.Sequential(nn.Linear(6, 3), nn.ReLU()), outputs=3, headless=True)
    for given, options, says in (
        ([replace(one, model=None)], {}, "must have its `model`, got none in 'one'"),
        ([one, one], {}, "names of their own, got 'one' twice"),
        ([], {}, "at least one teacher, got none"),
        ([3], {}, "must be an Expert or the path of one, got 3"),
        (["/no/such.safetensors"], {}, "got nothing at /no/such.safetensors"),
        ([one, wide], {}, r"must fit the expert 'wide', got inputs \(6,\)"),
        ([one, wild], {}, "finite, got NaN or infinity in .* of"),
        ([one, huge], {}, "must be finite, got NaN or infinity from 'huge'"),
        ([one], {"temperatures": {"other": 2.0}}, r"name teachers that are not there \(other\)"),
        ([one], {"temperatures": {"one": 0.0}}, "`one` must be positive"),
        ([one], {"calibrate": "labels"}, "needs a source of classes with validation examples"),
        ([one], {"temprature": 2.0}, "no argument `temprature`; nearest: temperature"),
        ([one], {"features": -1.0}, "`features` must be >= 0"),
        ([one], {"of": "latents"}, "`of` must be probabilities or logits"),
        ([one], {"steps": -1}, "`steps` must be a whole number >= 0"),
    ):
        with pytest.raises(cs.ConsilienceError, match=says):
            cs.distil(given, linear()[0], X, **{"steps": 2, **options})
    with pytest.raises(cs.ConsilienceError, match=r"must fit the student, got inputs \(6,\)"):
        cs.distil([one], models.linear(5, 3), X)
    with pytest.raises(cs.ConsilienceError, match="`unlabelled` must be finite inputs"):
        cs.distil([one], linear()[0], X * math.nan)
    assert headless.headless


def test_streams_are_refused_by_the_method_for_all_at_once():
    given = [expert("one"), expert("two", seed=1)]
    with pytest.raises(cs.Refusal, match="learns from all teachers at once"):
        cs.run(cs.settings.exmodel(given), cs.methods.distil(X), linear()[0])


def test_temperatures_come_from_the_validation_part():
    one = expert("one")
    hot = replace(one, name="hot", params={name: 4 * p for name, p in one.params.items()})
    hot = replace(hot, source=source("hot"))
    found = _distil.temperatures([one, hot], source("data"))
    assert found["hot"] == pytest.approx(4 * found["one"], rel=0.02) or found["hot"] == pytest.approx(20.0)
    with pytest.raises(cs.ConsilienceError, match="validation examples of the classes of 'one'"):
        _distil.temperatures([one], source("data", space="t"))


# ----------------------------------------------------------------------------------------- streams of experts


def test_scenarios_of_the_paper():
    names = {s: _train.stream(DIGITS, s, 5, 0) for s in _train.SCENARIOS}
    assert [len(names[s].sources) for s in ("joint", "nc", "mt", "ni")] == [1, 5, 5, 5]
    assert names["mt"].scenario == "task" and names["nc"].scenario == "class"
    assert sorted(c for part in names["nc"].sources for c in part.classes) == list(range(10))
    assert all(len(part.classes) == 2 for part in names["nc"].sources)
    assert all(len(part.classes) == 10 for part in names["ni"].sources)
    assert sum(len(part.train) for part in names["ni"].sources) == len(DIGITS.train)
    nic = names["nic"].sources
    assert len(nic) >= 4 and sum(len(p.train) + len(p.validation) for p in nic) == len(DIGITS.train) + len(
        DIGITS.validation
    )
    orders = [[p.name for p in _train.stream(DIGITS, "nc", 5, seed).sources] for seed in (0, 1)]
    assert orders[0] != orders[1], "the order is that of the seed"
    with pytest.raises(cs.ConsilienceError, match="nearest: nic"):
        _train.stream(DIGITS, "nicc", 5, 0)


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("stream")
    return experts.train(DIGITS, folder, models.mlp(64, (16,)), cs.Training(epochs=3), licence="CC0")


def test_a_stream_of_experts_is_kept_with_cards(stream, tmp_path):
    assert [path.relative_to(stream[0].parents[1]).as_posix() for path in stream] == [
        f"seed-0/expert-{number}.safetensors" for number in range(5)
    ]
    cards = [experts.card(path) for path in stream]
    assert [len(card.knows) for card in cards] == [2] * 5 and all(card.licence == "CC0" for card in cards)
    one = experts.load(stream[0])
    part = _train.stream(DIGITS, "nc", 5, 0).sources[0]
    test = _distil.known_part(part, cards[0].knows)
    assert _distil.row_of(one, test, cards[0].knows).own == next(iter(cards[0].accuracy.values())) > 0.8
    with pytest.raises(cs.ConsilienceError, match="must have no experts yet"):
        experts.train(DIGITS, stream[0].parents[1], models.mlp(64, (16,)))
    # What is there stays, and only what is missing is trained again, to the bit.
    before = [experts.card(path) for path in stream]
    stream[2].unlink()
    said: list[str] = []
    training = cs.Training(epochs=3)
    again = experts.train(
        DIGITS,
        stream[0].parents[1],
        models.mlp(64, (16,)),
        training,
        licence="CC0",
        resume=True,
        progress=said.append,
    )
    assert [experts.card(path) for path in again] == before and len(said) == 1


def test_offers_are_chosen_by_names_gain_and_agreement(stream, tmp_path):
    folder = stream[0].parents[1]
    found = experts.suggest(folder, ["0", "1", "10"])
    knows = {path: {name for _, name in experts.card(path).knows} for path in stream}
    assert {name for file in found.files for name in knows[file]} >= {"0", "1"}
    assert all(knows[file] & {"0", "1"} for file in found.files)
    assert found.missing == ("10",) and "no offered expert knows 10" in found.table()
    # Restated: each time the largest sum of improvements.
    known = {"0": 0.0, "1": 0.0}
    for offer in found.offers:
        score = max(offer.card.accuracy.values())
        gain = sum(max(0, score - known[n]) for n in known if n in knows[offer.file])
        assert offer.gain == pytest.approx(gain) and offer.suggested == (gain > 0)
        known |= {n: max(known[n], score) for n in known if n in knows[offer.file] and offer.suggested}
    one = experts.suggest(folder, [("digits", "0"), ("letters", "1")], budget=1)
    assert len(one.files) == 1 and one.missing == ("1",), "a label space is another class"
    with pytest.raises(cs.ConsilienceError, match="must have files with cards, got none"):
        experts.suggest(tmp_path, ["0"])
    with pytest.raises(cs.ConsilienceError, match="different names"):
        experts.suggest(folder, ["0", "0"])


def test_agreement_finds_the_expert_that_answers_otherwise(tmp_path):
    model, params = linear(3, 0)
    for name, values in (("a", params), ("b", params), ("c", {n: -p for n, p in params.items()})):
        one = cs.Expert(name, values, source(name), model=model)
        experts.save(one, tmp_path / f"{name}.safetensors", accuracy={"test": 0.9})
    found = experts.suggest(tmp_path, ["0"], data=X)
    agreement = {offer.file.stem: offer.agreement for offer in found.offers}
    assert agreement["a"] == agreement["b"] > agreement["c"] + 0.3
    assert found.files[0].stem == "a" and found.files == [tmp_path / "a.safetensors"]
    assert _suggest.similarity("Fire-Truck", "fire truck") == 1


# --------------------------------------------------------------------------------------------------- commands


def test_one_command_makes_one_model_of_five(stream, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["distil", *map(str, stream), "--student", "mlp", "--student.hidden", "[8]", "--data", "digits"]
    assert main([*argv, "--steps", "60", "--lr", "0.02", "--licence", "CC0", "-o", str(out)]) == 0
    text = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    rows = {row["name"]: row for row in report["models"]}
    assert list(rows) == [*(f"expert-{n}" for n in range(5)), "all teachers", "student"]
    assert rows["student"]["parameters"] == 64 * 8 + 8 + 8 * 10 + 10 == rows["student"]["bytes"] // 4
    assert rows["student"]["macs"] == 64 * 8 + 8 * 10
    assert "student" in text and (out / "report.md").read_text().count("expert-") == 5
    card = experts.card(out / "student.safetensors")
    assert (card.model, card.licence, len(card.knows)) == ("mlp(64, (8,), 10)", "CC0", 10)
    assert [origin.name for origin in card.made_from] == [f"expert-{n}" for n in range(5)]
    assert card.made_from[0].content == experts.card(stream[0]).content
    assert card.made_from[0].licence == "CC0"
    # The file is the student: it answers as the report says.
    student = experts.load(out / "student.safetensors")
    test = _distil.known_part(DIGITS, card.knows)
    assert _distil.row_of(student, test, card.knows).accuracy == rows["student"]["accuracy"]
    assert card.accuracy == {"digits, test": rows["student"]["accuracy"]}


def test_a_killed_command_is_resumed(stream, tmp_path, capsys):
    """The student is the one of a command that was not killed; with --resume a first command begins."""
    argv = ["distil", *map(str, stream), "--student", "mlp", "--student.hidden", "[8]", "--data", "digits"]
    argv += ["--steps", "30", "--resume", "true"]
    assert main([*argv, "-o", str(tmp_path / "whole")]) == 0
    cut = tmp_path / "cut"
    assert main([*argv, "-o", str(cut)]) == 0
    # Killed before it ended: no result, and no student.
    for name in ("run/result.json", "student.safetensors", "report.json", "report.md"):
        (cut / name).unlink()
    assert main([*argv[:-2], "-o", str(cut)]) != 0
    assert "must be a new folder" in capsys.readouterr().err
    assert main([*argv, "-o", str(cut)]) == 0
    found = [experts.load(tmp_path / name / "student.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(found[0].params[name], entry) for name, entry in found[1].params.items())


def test_a_stream_of_files_becomes_one_model(stream, tmp_path, capsys):
    folder = tmp_path / "images"
    argv = [
        "experts",
        "train",
        "--data",
        "digits",
        "--data.image",
        "true",
        "--experts",
        "2",
        "--model",
        "conv",
    ]
    more = ["--model.width", "4", "--training.epochs", "1", "-o", str(folder)]
    assert main([*argv, *more]) == 0
    assert "expert-1.safetensors" in capsys.readouterr().out
    files = sorted(map(str, folder.rglob("*.safetensors")))
    argv = ["exmodel", *files, "--student", "conv", "--student.width", "4", "--size", "40", "--steps", "5"]
    test = ["--test", "digits", "--test.image", "true"]
    out = tmp_path / "out"
    assert main([*argv, *test, "--maker.steps", "3", "-o", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert list(report["after each expert"]) == ["expert-0", "expert-1"]
    card = experts.card(out / "exmodel.safetensors")
    assert len(card.knows) == 10 and len(card.made_from) == 2
    assert (out / "memory.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    more = ["--maker", "auxiliary", "--auxiliary", "digits", "--auxiliary.image", "true"]
    assert main([*argv, *more, "-o", str(tmp_path / "other")]) == 0
    assert "after each expert" not in (tmp_path / "other" / "report.json").read_text()


def test_cards_and_suggestions_are_printed(stream, capsys):
    assert main(["experts", "card", str(stream[0])]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "expert-0"
    assert main(["experts", "suggest", str(stream[0].parents[1]), "--wanted", "0, 1", "--budget", "1"]) == 0
    text = capsys.readouterr().out
    assert "knows" in text and text.count("yes") == 1
    assert main(["experts"]) == 2
    assert "train" in capsys.readouterr().out


COMMANDS = {
    "no teachers": (["distil", "--data", "digits", "-o", "NEW"], "needs teachers"),
    "no data": (["distil", "FILE", "-o", "NEW"], "`--data` must be"),
    "no out": (["distil", "FILE", "--data", "digits"], "`--out` must be a new folder"),
    "out exists": (["distil", "FILE", "--data", "digits", "-o", "OLD"], "must be a new folder, and"),
    "option": (["distil", "FILE", "--data", "digits", "--temprature", "1"], "nearest: --temperature"),
    "student": (["distil", "FILE", "--data", "digits", "--student", "mpl"], "nearest: mlp"),
    "no card": (["distil", "PLAIN", "--data", "digits", "-o", "NEW"], "'plain' must have a card"),
    "no space": (
        ["distil", "PLAIN", "--classes", "a", "--data", "digits", "-o", "NEW"],
        "give `--space` too",
    ),
    "empty folder": (["distil", "FILE", "--data", "OLD", "-o", "NEW"], "must hold images"),
    "other inputs": (["distil", "FILE", "--data", "wine", "-o", "NEW"], "must fit the"),
    "no experts": (["exmodel", "-o", "NEW"], "needs the files of experts"),
    "auxiliary alone": (["exmodel", "FILE", "--auxiliary", "digits", "-o", "NEW"], "give both"),
    "maker alone": (["exmodel", "FILE", "--maker", "auxiliary", "-o", "NEW"], "give both"),
    "maker": (["exmodel", "FILE", "--maker", "inversions", "-o", "NEW"], "nearest: inversion"),
    "word": (["experts", "trian"], "nearest: train"),
    "words": (["experts", "train", "x", "-o", "NEW"], "takes options only"),
    "wanted": (["experts", "suggest", "OLD"], "`--wanted`"),
    "card": (["experts", "card", "PLAIN"], "has no card"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_bad_commands_are_one_line(case, stream, tmp_path, capsys):
    argv, says = COMMANDS[case]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file.txt").write_text("")
    from consilience.core.params import save

    save(tmp_path / "plain.safetensors", linear()[1])
    words = {
        "FILE": stream[0],
        "OLD": tmp_path / "old",
        "NEW": tmp_path / "new",
        "PLAIN": tmp_path / "plain.safetensors",
    }
    assert main([str(words.get(word, word)) for word in argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert says in err
    assert not (tmp_path / "new").exists(), "nothing is begun"


def test_folders_of_images_are_inputs(stream, tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    x = DIGITS.train.whole()[0][:6].reshape(-1, 8, 8)
    (tmp_path / "flat").mkdir()
    for number, one in enumerate(x):
        image.fromarray((255 * one).to(torch.uint8).numpy()).save(tmp_path / "flat" / f"{number}.png")
    argv = ["distil", str(stream[0]), "--data", str(tmp_path / "flat"), "--data.grey", "true"]
    more = ["--data.flat", "true", "--steps", "2", "-o", str(tmp_path / "out")]
    assert main([*argv, *more]) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["models"][-1]["accuracy"] is None


def test_pictures_are_png_files(tmp_path):
    x, y = torch.rand(5, 1, 8, 8, generator=key(1)), torch.tensor([3, 3, 1, 1, 1])
    picture = _pictures.grid_of(x, y, 3)
    assert picture.shape == (2 * 33 + 1, 3 * 33 + 1, 3)
    # The first sample of class 1, over its own range.
    one = (x[2, 0] - x[2].min()) / (x[2].max() - x[2].min())
    assert torch.equal(picture[1:33:4, 1:33:4, 0], (255 * one).round().to(torch.uint8))
    assert _pictures.write_pictures(tmp_path / "a.png", x, y)
    data = (tmp_path / "a.png").read_bytes()
    picture = _pictures.grid_of(x, y)
    width, height = struct.unpack(">II", data[16:24])
    assert (height, width) == picture.shape[:2]
    lines = zlib.decompress(data[data.index(b"IDAT") + 4 : data.index(b"IEND") - 8])
    assert torch.equal(
        torch.frombuffer(bytearray(lines), dtype=torch.uint8).view(height, -1)[:, 1:].reshape(picture.shape),
        picture,
    )
    assert not _pictures.write_pictures(tmp_path / "b.png", torch.rand(2, 4), torch.zeros(2))


# ------------------------------------------------------------------------------------ other inputs and models


def test_tokens_and_parts_are_inputs_too():
    tokens = torch.randint(0, 6, (60, 4), generator=key("tokens"))
    y = torch.arange(60) % 6
    part = cs.data.arrays(tokens, y, name="text", classes=list("abcdef"), space="letters")
    model = models.char_lstm(6, 4, 5)
    params, buffers = model.init(key(0))
    teacher = cs.Expert("text", params, part, buffers, model=model)
    result = cs.distil([teacher], model, tokens, base=params, steps=5)
    assert far(params, result.params) == 0
    result = cs.distil([teacher], models.char_lstm(6, 4, 8), part, steps=3)
    assert len(result.labels) == 6

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 2), nn.Linear(4, 2)

        def forward(self, a, b):
            return self.left(a) + self.right(b)

    parts = {"a": torch.rand(40, 3, generator=key(1)), "b": torch.rand(40, 4, generator=key(2))}
    part = cs.data.arrays(parts, torch.arange(40) % 2, name="parts", space="two")
    model = models.wrap(Both(), outputs=2)
    teacher = cs.Expert("parts", model.init(key(0))[0], part, model=model)
    result = cs.distil([teacher], models.wrap(Both, outputs=2), parts, of="logits", lr=0.05, steps=500)
    x = cs.Tree(parts)
    one, other = (model(dict(p), {}, x, None, False)[0] for p in (teacher.params, result.params))
    assert torch.allclose(one, other, atol=1e-2)


def test_students_with_norms_and_dropout_are_trained_by_the_key_alone():
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

        def forward(self, x):
            return self.last(F.dropout(self.norm(self.first(x)).relu(), 0.3, self.training))

    torch.manual_seed(0)
    runs = [cs.distil([expert()], models.wrap(Drops), X, steps=8, seed=5) for _ in range(2)]
    assert all(torch.equal(runs[0].params[name], runs[1].params[name]) for name in runs[0].params)
    assert float(runs[0].params["norm.running_mean"].abs().max()) > 0, "statistics are of the student's own"


def test_an_expert_without_gradients_serves_every_maker_but_inversion(tmp_path):
    """A file may round its inputs: its answers then do not depend on them smoothly."""
    onnx = pytest.importorskip("onnx")
    make, numbers = onnx.helper, onnx.numpy_helper
    nodes = [
        make.make_node("Cast", ["x"], ["i"], to=7),
        make.make_node("Cast", ["i"], ["f"], to=1),
        make.make_node("Gemm", ["f", "w"], ["out"]),
    ]
    weight = numbers.from_array(torch.rand(4, 2, generator=key(1)).numpy(), "w")
    kinds = [make.make_tensor_value_info("x", 1, ["n", 4])], [make.make_tensor_value_info("out", 1, None)]
    onnx.save(make.make_model(make.make_graph(nodes, "g", *kinds, [weight])), str(tmp_path / "steps.onnx"))
    one = experts.load(tmp_path / "steps.onnx", labels=[("s", "0"), ("s", "1")])
    schedule, student = cs.settings.exmodel([one]), models.mlp(4, (4,), 2)
    with pytest.raises(cs.ConsilienceError, match="Inversion needs gradients .* 'steps' gives none"):
        cs.run(schedule, cs.methods.exmodel_distillation(cs.memory.inversion(steps=2), 8, 2), student)
    other = cs.memory.auxiliary(torch.rand(30, 4, generator=key(2)) * 9)
    cs.run(schedule, cs.methods.exmodel_distillation(other, 8, 2), student)
    assert len(cs.distil([one], student, torch.rand(30, 4), steps=2).labels) == 2
