"""Metrics: values by hand and against scikit-learn and torchmetrics, sums over chunks, several in one run.

And what forgetting and transfer make of their direction, and of NaN.
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import consilience as cs
from consilience import metrics
from consilience.core.errors import Interrupted
from consilience.core.losses import BCE, CrossEntropy, Focal, Huber, Poisson
from consilience.core.metrics import global_forgetting, lost, mean, summary, worst
from consilience.core.source import LabelFrame, Target
from consilience.loop.session import confusion_of
from consilience.metrics.choice import as_metric, metrics_of

NAN = float("nan")
TRAINING = cs.Training(epochs=1)
NAMES = [name for name in metrics.__all__ if name != "own"]
MADE = {
    **{name: getattr(metrics, name)() for name in NAMES},
    "f1 micro": metrics.f1("micro"),
    "top 2": metrics.top_k(2),
    "iou at .3": metrics.iou(0.3),
}


def classes(n=240, c=4, places=(), seed=0):
    """Probabilities with ties, and targets of all classes."""
    g = torch.Generator().manual_seed(seed)
    p = torch.rand(n, c, *places, generator=g).mul(8).round().div(4).double().softmax(1)
    return p, torch.randint(c, (n, *places), generator=g)


def labels(n=240, k=3, places=(), seed=0):
    g = torch.Generator().manual_seed(seed)
    p = torch.rand(n, k, *places, generator=g).double()
    return p, (torch.rand(n, k, *places, generator=g) < 0.3).double()


def values(n=240, k=2, places=(), seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.randn(n, k, *places, generator=g).double()
    return y + torch.randn(n, k, *places, generator=g), y


PAIRS = {"class": classes, "labels": labels, "value": values}


def cases():
    return [(name, kind) for name, metric in MADE.items() for kind in metric.kinds]


# values


def test_classes_are_scikit_learns():
    from sklearn import metrics as theirs

    p, y = classes()
    # scikit-learn breaks ties otherwise, so its top k is asked where there are none.
    sharp = p + torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) / 1e3
    answer = p.argmax(1)
    found = {
        metrics.accuracy(): theirs.accuracy_score(y, answer),
        metrics.balanced_accuracy(): theirs.balanced_accuracy_score(y, answer),
        metrics.f1(): theirs.f1_score(y, answer, average="macro"),
        metrics.f1("micro"): theirs.f1_score(y, answer, average="micro"),
        metrics.iou(): theirs.jaccard_score(y, answer, average="macro"),
        metrics.auroc(): theirs.roc_auc_score(y, p, multi_class="ovr"),
        metrics.loss(): theirs.log_loss(y, p),
        metrics.perplexity(): math.exp(theirs.log_loss(y, p)),
    }
    for metric, value in found.items():
        assert metric(p, y) == pytest.approx(value, abs=1e-12), metric.name
    for k in (1, 2, 3):
        assert metrics.top_k(k)(sharp, y) == pytest.approx(theirs.top_k_accuracy_score(y, sharp, k=k))
    assert metrics.top_k(1)(p, y) == metrics.accuracy()(p, y) == metrics.f1("micro")(p, y)


def test_labels_are_scikit_learns():
    from sklearn import metrics as theirs

    p, y = labels()
    answer = p > 0.5
    found = {
        metrics.f1(): theirs.f1_score(y, answer, average="macro"),
        metrics.f1("micro"): theirs.f1_score(y, answer, average="micro"),
        metrics.f1(threshold=0.3): theirs.f1_score(y, p > 0.3, average="macro"),
        metrics.iou(): theirs.jaccard_score(y, answer, average="macro"),
        metrics.auroc(): theirs.roc_auc_score(y, p, average="macro"),
        metrics.loss().of(Target("labels", BCE())): np.mean(
            [theirs.log_loss(y[:, j], p[:, j]) for j in range(3)]
        ),
    }
    for metric, value in found.items():
        assert metric(p, y) == pytest.approx(value, abs=1e-12), metric.name


def test_values_are_scikit_learns():
    from sklearn import metrics as theirs

    p, y = values()
    assert metrics.mse()(p, y) == pytest.approx(theirs.mean_squared_error(y, p), abs=1e-12)
    assert metrics.mae()(p, y) == pytest.approx(theirs.mean_absolute_error(y, p), abs=1e-12)
    assert metrics.loss()(p, y) == pytest.approx(theirs.mean_squared_error(y, p), abs=1e-12)
    whole = theirs.r2_score(y, p, multioutput="variance_weighted")
    assert metrics.r2()(p, y) == pytest.approx(whole, abs=1e-12)

    # More outputs than values, as models have that also serve others.
    wide = torch.cat([p, torch.full((len(p), 1), 1e9)], 1)
    assert metrics.r2()(wide, y) == metrics.r2()(p, y)
    assert metrics.mae()(wide, y) == metrics.mae()(p, y)


def test_counts_by_hand():
    """Answers 0 0 1 2 and nothing; targets 0 1 1 0 2."""
    p = torch.tensor([[0.9, 0.1, 0], [0.6, 0.4, 0], [0.1, 0.8, 0.1], [0, 0.1, 0.9], [0, 0, 0]])
    y = torch.tensor([0, 1, 1, 0, 2])
    assert metrics.accuracy()(p, y) == 2 / 5
    # TP 1 1 0, predicted 2 1 1, true 2 2 1.
    assert metrics.balanced_accuracy()(p, y) == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert metrics.f1()(p, y) == pytest.approx((2 / 4 + 2 / 3 + 0) / 3)
    assert metrics.f1("micro")(p, y) == pytest.approx(4 / 9)
    assert metrics.iou()(p, y) == pytest.approx((1 / 3 + 1 / 2 + 0) / 3)
    # Ranks of the targets: first, second, first, third; a row of zeros is no answer.
    assert [metrics.top_k(k)(p, y) for k in (1, 2, 3)] == [2 / 5, 3 / 5, 3 / 5]


def test_classes_that_neither_occur_nor_are_predicted_are_left_out():
    p, y = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]]), torch.tensor([0, 1])
    assert [metric(p, y) for metric in (metrics.f1(), metrics.iou(), metrics.balanced_accuracy())] == [
        1.0
    ] * 3
    # Labels too: the second is never true and never predicted.
    q = torch.tensor([[0.9, 0.1], [0.2, 0.1]])
    assert metrics.f1()(q, torch.tensor([[1.0, 0.0], [0.0, 0.0]])) == 1.0
    assert metrics.auroc()(q, torch.tensor([[1.0, 0.0], [0.0, 0.0]])) == 1.0


def test_the_loss_is_the_tasks_own():
    """As it is trained: with weights, smoothing, focal factors, and on the scale of its outputs."""
    g = torch.Generator().manual_seed(3)
    out, y = torch.randn(50, 3, generator=g).double(), torch.randint(3, (50,), generator=g)
    frame = LabelFrame((("a", "x"), ("a", "y"), ("a", "z")))
    for loss in (CrossEntropy(smoothing=0.1), CrossEntropy({"y": 3.0}), Focal(gamma=1.5)):
        target = Target("class", loss.fitted(("x", "y", "z"), 3, (0, 1, 2)))
        answer = replace(frame, targets={"": target}).answer(out)
        assert metrics.loss().of(target)(answer, y) == pytest.approx(float(target.mean(out, y)), abs=1e-12)

    hits = (torch.rand(50, 3, generator=g) < 0.4).double()
    for kind, loss, wanted in (
        ("labels", BCE({"x": 2.0}).fitted(("x", "y", "z"), 3, (0, 1, 2)), hits),
        ("value", Huber(0.5), out + 1),
        ("value", Poisson(), hits * 4),
    ):
        target = Target(kind, loss)
        found = metrics.loss().of(target)(loss.answer(out), wanted)
        assert found == pytest.approx(float(target.mean(out, wanted)), abs=1e-12)


def test_impossible_and_missing_answers_have_a_finite_loss():
    p, y = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([1, 0])
    least = -math.log(torch.finfo(torch.float32).tiny)
    assert metrics.loss()(p[:1], y[:1]) == pytest.approx(least)
    assert metrics.loss()(p[1:], y[1:]) == pytest.approx(math.log(2))
    assert metrics.perplexity()(p, y) == pytest.approx(math.exp((least + math.log(2)) / 2))
    certain = metrics.loss().of(Target("labels", BCE()))(torch.ones(1, 1), torch.zeros(1, 1))
    assert 15 < certain < 17
    # But a model that gives NaN is not a model that says nothing.
    assert math.isnan(metrics.loss()(torch.full((1, 2), NAN), torch.tensor([0])))


def test_undefined_is_nan():
    p = torch.tensor([[0.3, 0.7], [0.6, 0.4]])
    none = torch.tensor([-100, -100])
    for name in ("accuracy", "balanced_accuracy", "f1", "iou", "auroc", "loss", "perplexity", "top_k"):
        assert math.isnan(MADE[name](p, none)), name
    for name in ("mse", "mae", "r2", "loss"):
        assert math.isnan(MADE[name](p, torch.full((2, 2), NAN))), name
    assert math.isnan(metrics.auroc()(p, torch.tensor([1, 1])))
    assert math.isnan(metrics.r2()(p, torch.full((2, 2), 0.1)))
    assert math.isnan(metrics.accuracy().running().value())


# sums


@pytest.mark.parametrize("places", [(), (5,), (3, 2)])
@pytest.mark.parametrize(("name", "kind"), cases())
def test_chunks_are_the_whole(name, kind, places):
    metric = MADE[name].of(Target(kind, {"class": CrossEntropy(), "labels": BCE(), "value": Huber()}[kind]))
    p, y = PAIRS[kind](n=90, places=places)
    y[torch.rand(y.shape, generator=torch.Generator().manual_seed(5)) < 0.2] = (
        -100 if kind == "class" else NAN
    )
    running = metric.running()
    # One chunk has one example, one nothing to compare with, and one is empty.
    y[40:47] = -100 if kind == "class" else NAN
    for a, b in ((0, 1), (1, 40), (40, 47), (47, 47), (47, 90)):
        running.update(p[a:b], y[a:b])
    assert running.value() == pytest.approx(metric(p, y), rel=1e-12, abs=1e-12)

    # Places are examples, in any order, and missing targets are as if they were not there.
    rows = p.movedim(1, -1).reshape(-1, p.shape[1])
    flat = y.reshape(-1) if kind == "class" else y.movedim(1, -1).reshape(-1, y.shape[1])
    assert metric(rows, flat) == pytest.approx(metric(p, y), rel=1e-12, abs=1e-12)
    if kind == "class":
        assert metric(rows[flat >= 0], flat[flat >= 0]) == pytest.approx(metric(p, y), rel=1e-12)


def test_r2_holds_far_from_zero():
    """Sums of squares would have lost all digits of targets that are years."""
    p, y = values(1000, 1)
    for shift in (0.0, 2e3, 1e8):
        running = metrics.r2().running()
        for a in range(0, 1000, 130):
            running.update(p[a : a + 130] + shift, y[a : a + 130] + shift)
        assert running.value() == pytest.approx(metrics.r2()(p, y), rel=1e-6)
    assert math.isnan(metrics.r2()(p + 1e8, torch.full_like(y, 1e8 + 0.1)))


def test_functions_of_users_measure_chunks_of_sequences_of_other_lengths():
    """Tokens are padded chunk by chunk; places that a chunk lacks have no target."""
    right = metrics.own(lambda p, y: (p.argmax(1) == y)[y != -100].double().mean(), True, "right")
    chunks = [(torch.rand(2, 3, size), torch.randint(3, (2, size))) for size in (4, 7, 5)]
    running = right.running()
    for p, y in chunks:
        running.update(p, y)
    hits = torch.cat([(p.argmax(1) == y).flatten() for p, y in chunks])
    assert running.value() == pytest.approx(float(hits.double().mean()))


def test_only_ranks_and_functions_of_users_keep_predictions():
    assert {name for name, metric in MADE.items() if metric.keeps} == {"auroc"}
    assert metrics.own(lambda p, y: 0.0, True).keeps
    for name, kind in cases():
        sums = MADE[name].sums(*PAIRS[kind]())
        kept = sum(tensor.numel() for tensor in sums.values())
        assert (kept > 100) == MADE[name].keeps, name


def test_names_say_what_is_no_default():
    assert [MADE[name].name for name in NAMES] == NAMES
    assert metrics.f1("micro", 0.4).name == "f1(average=micro, threshold=0.4)"
    assert metrics.loss().of(Target("value", Huber())).name == "loss"


def test_directions():
    assert [name for name in NAMES if MADE[name].higher is False] == [
        "loss",
        "mae",
        "mean_angle",
        "mse",
        "perplexity",
    ]
    assert all(MADE[name].higher is not None for name in NAMES)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: metrics.top_k(0), "`k` must be a whole number >= 1, got 0"),
        (lambda: metrics.f1("weighted"), "`average` must be macro or micro, got 'weighted'"),
        (lambda: metrics.f1(threshold=1.0), "`threshold` must be in [0, 1), got 1.0"),
        (lambda: metrics.iou(NAN), "`threshold` must be in [0, 1), got nan"),
        (lambda: metrics.own(3, True), "an own metric must be a function, got 3"),
        (lambda: metrics.own(max, "up"), "`higher` must be True or False, got 'up'"),
        (lambda: metrics.own(max, None), "`higher` must be True or False, got None"),
        (lambda: metrics.own(lambda p, y: p, True, "m")(*classes()), "the metric 'm' must give one number"),
        (lambda: metrics.own(lambda p, y: None, True, "m")(*classes()), "must give one number, got None"),
    ],
)
def test_bad_arguments_are_refused(make, text):
    with pytest.raises(cs.ConsilienceError) as e:
        make()
    assert text in str(e.value) and "\n" not in str(e.value)


# functions and objects from elsewhere


class Counting:
    """What torchmetrics' objects are: error rate over updates. The copies of all uses count together."""

    higher_is_better = False
    made = 0

    def __init__(self):
        self.reset()

    def reset(self):
        self.wrong = self.count = 0

    def update(self, p, y):
        self.wrong += int((p.argmax(1) != y).sum())
        self.count += len(y)

    def compute(self):
        return torch.tensor(self.wrong / self.count)


def fbeta(p, y, beta):
    return np.float32(beta / 4)


@pytest.mark.parametrize(
    ("give", "name"),
    [
        (functools.partial(fbeta, beta=2), "fbeta(beta=2)"),
        (functools.partial(functools.partial(fbeta), beta=2), "fbeta(beta=2)"),
        (lambda p, y: torch.tensor(0.5), "<lambda>"),
        (lambda p, y: torch.tensor([[0.5]]), "<lambda>"),
        (lambda p, y: np.float64(0.5), "<lambda>"),
        (lambda p, y: np.array([0.5]), "<lambda>"),
    ],
)
def test_functions_of_users_have_names_and_give_any_kind_of_number(tmp_path, give, name):
    schedule = cs.settings.continual(cs.data.split_classes(cs.data.digits(), 5)[:2])
    result = cs.run(schedule, cs.methods.finetune(), training=TRAINING, metric=give, out=tmp_path / "run")
    assert (result.metric, result.score) == (name, 0.5)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["matrix"] == [[0.5, 0.5]] * 3


def test_a_metric_without_a_direction_is_refused_where_one_is_needed():
    schedule = cs.settings.continual(cs.data.split_classes(cs.data.digits(), 5)[:2])
    with pytest.warns(
        UserWarning, match="'<lambda>' has no direction, so forgetting and transfer will not be"
    ):
        result = cs.run(schedule, cs.methods.finetune(), training=TRAINING, metric=lambda p, y: 0.5)
    assert result.score == 0.5
    for read in (
        lambda: result.forgetting,
        lambda: result.backward_transfer,
        lambda: result.forward_transfer,
        lambda: result.global_forgetting,
        lambda: result.local_forgetting,
        result.worst,
    ):
        with pytest.raises(
            cs.ConsilienceError, match="need a metric with a direction, and '<lambda>' has none"
        ):
            read()
    # A column that no row has is left out.
    assert "forgetting" not in result.table() and "transfer" not in result.table()
    assert result.to_json()["forgetting"] is None and result.to_json()["higher"] is None

    def rate(p, y):
        return float((p.argmax(1) != y).double().mean())

    rate.higher = False
    again = cs.run(schedule, cs.methods.finetune(), training=TRAINING, metric=["accuracy", rate])
    assert again.of_metric("rate").forgetting == pytest.approx(again.forgetting)
    assert again.of_metric("rate").score == pytest.approx(1 - again.score)


def test_an_object_of_torchmetrics_is_copied_for_each_use():
    schedule = cs.settings.continual(cs.data.split_classes(cs.data.digits(), 5)[:2])
    mine = Counting()
    mine.update(torch.eye(2), torch.tensor([1, 1]))
    result = cs.run(schedule, cs.methods.finetune(), training=TRAINING, metric=["accuracy", mine], repeats=2)
    other = result.of_metric("Counting")
    assert other.matrices == pytest.approx(1 - result.matrices, abs=1e-6)
    assert other.higher["Counting"] is False and other.forgetting == pytest.approx(result.forgetting)
    assert (mine.wrong, mine.count) == (1, 2)


def test_no_torchmetrics_is_imported():
    code = (
        "import sys, consilience as cs\n"
        "assert not {'torch', 'numpy'} & sys.modules.keys()\n"
        "cs.metrics.__all__; assert 'torch' not in sys.modules\n"
        "cs.metrics.f1(); assert 'torchmetrics' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.peers
def test_values_are_torchmetrics():
    theirs = pytest.importorskip("torchmetrics")
    c = theirs.classification
    p, y = classes(places=(4,))
    y[torch.rand(y.shape, generator=torch.Generator().manual_seed(5)) < 0.2] = -100
    q, hits = labels()
    made, wanted = values()
    found = [
        (metrics.accuracy(), c.MulticlassAccuracy(4, average="micro", ignore_index=-100), p, y),
        (metrics.balanced_accuracy(), c.MulticlassRecall(4, ignore_index=-100), p, y),
        (metrics.f1(), c.MulticlassF1Score(4, ignore_index=-100), p, y),
        (metrics.f1("micro"), c.MulticlassF1Score(4, average="micro", ignore_index=-100), p, y),
        (metrics.iou(), c.MulticlassJaccardIndex(4, ignore_index=-100), p, y),
        (metrics.auroc(), c.MulticlassAUROC(4, ignore_index=-100), p, y),
        (metrics.f1(), c.MultilabelF1Score(3), q, hits.long()),
        (metrics.auroc(), c.MultilabelAUROC(3), q, hits.long()),
        (metrics.mse(), theirs.MeanSquaredError(), made, wanted),
        (metrics.mae(), theirs.MeanAbsoluteError(), made, wanted),
        (metrics.r2(), theirs.R2Score(multioutput="variance_weighted"), made, wanted),
    ]
    for metric, their, answer, target in found:
        own = metric(answer, target.double() if target.shape == answer.shape else target)
        assert own == pytest.approx(float(their(answer, target)), abs=1e-5), metric.name
        wrapped = metrics_of(their, [cs.data.digits()], LabelFrame(()))["digits"][0]
        running = wrapped.running()
        for a in range(0, len(answer), 100):
            running.update(answer[a : a + 100], target[a : a + 100])
        assert running.value() == pytest.approx(own, abs=1e-5)
        assert wrapped.name == type(their).__name__
        assert wrapped.higher is metric.higher, metric.name
    tokens = theirs.text.Perplexity(ignore_index=-100)
    flat = p.movedim(1, -1)
    assert metrics.perplexity()(p, y) == pytest.approx(float(tokens(flat.log(), y)), rel=1e-5)


def test_an_object_that_compares_as_it_likes_is_no_function_of_the_catalogue():
    """As objects of torchmetrics do: to compare two of them makes a third, which counts as true."""

    class Like:
        higher_is_better = True
        __hash__ = None

        def __eq__(self, other):
            return True

        def __init__(self):
            self.right = self.count = 0

        def update(self, p, y):
            self.right, self.count = self.right + int((p.argmax(1) == y).sum()), self.count + len(y)

        def compute(self):
            return torch.tensor(self.right / self.count)

        def reset(self):
            self.__init__()

    (wrapped,) = metrics_of(Like(), [cs.data.digits()], LabelFrame(()))["digits"]
    assert wrapped(torch.eye(2), torch.tensor([0, 0])) == 0.5 and wrapped.higher


@dataclass(frozen=True)
class Confidence(cs.Metric):
    """The mean probability of the true class: a metric of a user that adds up."""

    power: float = 1.0

    def sums(self, p, y):
        return {"p": p.gather(1, y[:, None]).double().pow(self.power).sum(), "count": torch.tensor(len(y))}

    def value(self, sums):
        return float(sums["p"] / sums["count"])


def test_a_metric_of_a_user_that_adds_up():
    schedule = cs.settings.continual(cs.data.split_classes(cs.data.digits(), 5)[:2])
    result = cs.run(
        schedule, cs.methods.finetune(), training=TRAINING, metric=[Confidence(), Confidence(2.0)]
    )
    assert (result.metric, [*result.metrics]) == ("Confidence", ["Confidence(power=2.0)"])
    p = result.predict(schedule.judged[1].test.whole()[0])
    true = p.gather(1, schedule.judged[1].test.targets()[:, None])
    assert result.matrix[-1, 1] == pytest.approx(float(true.double().mean()))


# forgetting, transfer, worst: direction and NaN

R = np.array([[0.1, 0.2, 0.3], [0.9, 0.25, 0.35], [0.7, 0.8, 0.45], [0.6, 0.85, 0.95]])


def test_less_is_better_by_hand():
    """As errors 1 - R: the same forgetting and transfer, by min instead of max."""
    more, less = summary(R, [1, 2, 3]), summary(1 - R, [1, 2, 3], higher=False)
    for name in ("forgetting", "backward_transfer", "forward_transfer"):
        assert less[name] == pytest.approx(more[name])
    assert less["score"] == pytest.approx(1 - more["score"])
    assert more["normalised"] is not None and less["normalised"] is None
    assert less["forgetting"] == pytest.approx(((0.4 - 0.1) + (0.15 - 0.2)) / 2)
    assert global_forgetting(1 - R, higher=False) == pytest.approx(global_forgetting(R))
    assert worst(np.array([1.0, 4.0, NAN, 2.0, 3.0]), 0.5, higher=False) == 3.5
    assert worst(np.array([1.0, 4.0, NAN, 2.0, 3.0]), 0.5) == 1.5


def test_nan_of_one_source_leaves_the_others():
    undefined = R.copy()
    undefined[:, 0] = NAN
    rest, kept = summary(undefined, [1, 2, 3]), summary(R[:, 1:], [2, 3])
    assert rest == pytest.approx(kept)
    assert global_forgetting(undefined) == pytest.approx(global_forgetting(R[:, 1:]))
    # At one stage only: the source has a past all the same.
    undefined = R.copy()
    undefined[1, 0] = NAN
    assert summary(undefined, [1, 2, 3])["forgetting"] == pytest.approx(((0.7 - 0.6) + (0.8 - 0.85)) / 2)
    assert summary(undefined, [1, 2, 3])["backward_transfer"] == pytest.approx(0.85 - 0.8)
    nothing = summary(np.full((4, 3), NAN), [1, 2, 3])
    assert math.isnan(nothing["score"]) and nothing["forgetting"] is None
    assert math.isnan(lost(np.array([0.1, NAN, 0.5])))


def test_means_of_all_values_are_numpys():
    g = np.random.default_rng(0)
    for shape in ((7,), (3, 5), (4, 11, 13)):
        found = g.random(shape)
        assert float(mean(found)) == pytest.approx(found.mean(), rel=1e-15)
        for axis in range(len(shape)):
            assert np.array_equal(mean(found, axis), found.mean(axis))


@pytest.mark.filterwarnings("ignore:the metric is undefined")
def test_a_source_of_one_class_spoils_nothing(tmp_path):
    """Of the first source there is no AUROC; in 0.1 forgetting was NaN for that, and the score was not."""
    d = cs.data.digits()
    mix = [cs.data.split_classes(d, 10)[0], *cs.data.split_classes(d, 4)[1:]]
    schedule = cs.settings.continual([replace(s, name=f"s{i}") for i, s in enumerate(mix)])
    out = tmp_path / "run"
    result = cs.run(schedule, cs.methods.finetune(), training=TRAINING, metric="auroc", out=out)
    assert np.isnan(result.matrix[:, 0]).all() and np.isfinite(result.matrix[:, 1:]).all()
    by_hand = [result.matrix[1:-1, j].max() - result.matrix[-1, j] for j in (1, 2)]
    assert result.forgetting == pytest.approx(np.mean(by_hand))
    for name in ("backward_transfer", "global_forgetting", "score"):
        assert math.isfinite(getattr(result, name)), name
    assert all(math.isfinite(point["score"]) for point in result.curve)
    again = cs.Result.load(out)
    assert again.forgetting == result.forgetting and np.isnan(again.matrix[0, 0])
    page = result.report(tmp_path / "r.html").read_text()
    assert "goes from nan" not in page and "mean nan" not in page


def test_a_repeat_without_a_value_leaves_the_others():
    matrices = np.stack([R, R])
    matrices[1, -1] = NAN
    result = made(matrices=matrices)
    assert result.scores[0] == pytest.approx(R[-1].mean()) and math.isnan(result.scores[1])
    assert result.score == pytest.approx(R[-1].mean()) and result.score_std == 0.0
    assert np.array_equal(result.matrix[-1], R[-1])
    assert result.worst() == pytest.approx(0.6) and result.spread == pytest.approx(R[-1].std())
    mapped = made(matrices=np.stack([R, R]), mapper=np.array([[0.5, 0.5, NAN], [0.5, 0.5, 0.75]]))
    assert mapped.mapper_accuracy == 0.75


def made(**fields):
    plain = {
        "setting": "continual",
        "data": "d",
        "method": "m",
        "model": "mlp",
        "metric": "accuracy",
        "seed": 0,
    }
    costs = {"macs": 1, "bytes": 0, "steps": 1, "seconds": 1.0}
    plain |= {"sources": ("a", "b", "c"), "stages": ("a", "b", "c"), "learned_at": (1, 2, 3), "costs": costs}
    return cs.Result(**{**plain, "matrices": R[None], **fields})


# several in one run


def test_several_metrics_are_as_each_alone(tmp_path):
    schedule = cs.settings.continual(cs.data.split_classes(cs.data.digits(), 5)[:3])
    chosen = ["accuracy", "auroc", "loss", metrics.f1("micro")]
    run = functools.partial(cs.run, schedule, cs.methods.er(50), training=TRAINING, repeats=2)
    result = run(metric=chosen, out=tmp_path / "run", curve_steps=3, judge_clients=True)
    assert (result.metric, [*result.metrics]) == ("accuracy", ["auroc", "loss", "f1(average=micro)"])
    for metric in chosen:
        alone = run(metric=metric)
        mine = result.of_metric(alone.metric)
        assert np.array_equal(mine.matrices, alone.matrices) and mine.metric == alone.metric
        assert mine.forgetting == alone.forgetting and mine.normalised == alone.normalised
        assert [point["score"] for point in mine.curve] == [point["score"] for point in alone.curve]
    assert result.of_metric("loss").normalised is None

    points = result.of_metric("auroc").learning_curve
    assert [point["metrics"]["auroc"] for point in points] == [point["score"] for point in points]
    assert [point["steps"] for point in points] == [point["steps"] for point in result.learning_curve]
    with pytest.raises(cs.ConsilienceError, match="one of those of the run, got 'auroq'; nearest: auroc"):
        result.of_metric("auroq")

    # In result.json, from there, in the log and in the tables.
    held = json.loads((tmp_path / "run" / "result.json").read_text())
    assert held["metrics"]["loss"]["forgetting"] == result.of_metric("loss").forgetting
    assert held["metrics"]["loss"]["higher"] is False and held["higher"] is True
    again = cs.Result.load(tmp_path / "run")
    for name in result.metrics:
        assert np.array_equal(again.metrics[name], result.metrics[name])
        assert again.of_metric(name).table() == result.of_metric(name).table()
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["event"] == "stage" and not line["repeat"]][-1]
    assert last["metrics"]["auroc"] == pytest.approx(result.of_metric("auroc").scores[0])
    rows = [line.split() for line in result.table().splitlines() if line.startswith("er ")]
    assert [row[1] for row in rows] == ["accuracy", "auroc", "loss", "f1(average=micro)"]
    assert "loss (less is better) after each stage" in result.table()
    page = result.report(tmp_path / "r.html").read_text()
    assert all(f"er, {name}" in page for name in ("accuracy", "auroc", "loss"))


def test_a_run_of_several_metrics_resumes(tmp_path):
    sources = cs.data.split_classes(cs.data.digits(), 5)[:3]
    schedule, chosen = cs.settings.continual(sources), ["accuracy", "auroc", "mine"]

    def mine(p, y):
        return float(p.amax(1).double().mean())

    chosen[2] = cs.metrics.own(mine, True)
    run = functools.partial(cs.run, schedule, cs.methods.er(50), training=TRAINING)
    whole = run(metric=chosen)

    def stop(line):
        if line["event"] == "stage" and line["stage"] == 2:
            raise KeyboardInterrupt

    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(metric=chosen, out=out, progress=stop, checkpoint_steps=2)
    with pytest.raises(
        cs.ConsilienceError, match="`metric` was accuracy, auroc, mine and is accuracy, auroc now"
    ):
        run(metric=chosen[:2], out=out, resume=True)
    again = run(metric=chosen, out=out, resume=True)
    assert np.array_equal(again.matrices, whole.matrices)
    for name in whole.metrics:
        assert np.array_equal(again.metrics[name], whole.metrics[name])
    assert [p["metrics"] for p in again.curve] == [p["metrics"] for p in whole.curve]


def mixed():
    """Classes, values and labels of the same inputs."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 5, generator=g)
    y = {
        "class": (x[:, 0] > 0).long(),
        "value": x @ torch.randn(5, 2, generator=g),
        "labels": (x[:, :3] > 0).float(),
    }
    y["labels"][::7, 1] = NAN
    # One test for all of them: tasks of the same inputs are refused with tests of their own.
    return [
        cs.data.arrays(x[60:], target[60:], test=(x[:60], target[:60]), name=kind, kind=kind)
        for kind, target in y.items()
    ]


@pytest.mark.parametrize("scenario", ["task", "domain"])
def test_each_task_has_a_metric_and_a_direction(tmp_path, scenario):
    sources = mixed()
    run = functools.partial(
        cs.run,
        cs.settings.continual(sources, scenario),
        cs.methods.finetune(),
        training=cs.Training(epochs=2),
    )
    result = run(metric={"class": ["accuracy", "loss"], "value": "mse"}, out=tmp_path / "run")
    assert result.measured_by == ("accuracy", "mse", "auroc")
    assert [*result.metrics] == ["accuracy", "mse", "auroc", "loss"]
    for read in (lambda: result.score, lambda: result.forgetting, result.worst, lambda: result.spread):
        with pytest.raises(cs.ConsilienceError, match="different metrics .* use `result.of_metric"):
            read()

    mse = result.of_metric("mse")
    assert np.isnan(mse.matrix[:, [0, 2]]).all()
    assert mse.score == mse.matrix[-1, 1] == result.matrix[-1, 1]
    assert mse.matrix[2, 1] < mse.matrix[0, 1], "it has learned"
    assert mse.forgetting == pytest.approx(mse.matrix[3, 1] - mse.matrix[2, 1])
    assert result.accuracy == result.matrix[-1, 0]

    # By hand, on the outputs that belong to each task.
    test = result.agent.schedule.judged[1].test
    frame = result.agent.schedule.frame
    columns = list(frame.tasks["value"])
    p = result.predict(test.whole()[0], "value" if scenario == "task" else None)[:, columns]
    assert mse.score == pytest.approx(float((p - test.targets()).square().double().mean()), rel=1e-6)

    again = cs.Result.load(tmp_path / "run")
    assert again.measured_by == result.measured_by and again.table() == result.table()
    held = json.loads((tmp_path / "run" / "result.json").read_text())
    assert held["score"] is None and held["metrics"]["mse"]["forgetting"] == mse.forgetting
    assert [row.split()[1] for row in result.table().splitlines() if row.startswith("finetune")] == [
        *result.metrics
    ]
    assert result.report(tmp_path / "r.html").exists()

    # A list has one for each kind; a source's own comes first.
    listed = run(metric=["mae", "balanced_accuracy", "f1"])
    assert listed.measured_by == ("balanced_accuracy", "mae", "f1")
    own = cs.run(
        cs.settings.continual([replace(sources[0], metric="auroc"), sources[2]], scenario),
        cs.methods.finetune(),
        training=TRAINING,
        metric="f1",
    )
    assert own.measured_by == ("auroc", "f1") and [*own.metrics] == ["auroc", "f1"]
    assert np.isfinite(own.metrics["f1"]).all(), "the class source has f1 next to its own"


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        ("accuracy", "`metric` must be for targets of kind 'value', as those of 'value' are, got 'accuracy'"),
        ({"value": "accuracy"}, "`metric` must be for targets of kind 'value'"),
        ({"class": "accuracy", "labls": "f1"}, "the tasks and the kinds of targets, got 'labls'"),
        (["accuracy", "mse", "auroc", "r3"], "got 'r3'; nearest: r2"),
        ({"class": []}, "must have at least one metric"),
    ],
)
def test_metrics_of_another_kind_are_refused(metric, text):
    with pytest.raises(cs.ConsilienceError) as e:
        cs.run(cs.settings.continual(mixed(), "task"), cs.methods.finetune(), metric=metric)
    assert text in str(e.value) and "\n" not in str(e.value)


def test_a_sources_own_metric_must_fit_it():
    sources = [replace(mixed()[0], metric="mse")]
    with pytest.raises(cs.ConsilienceError, match="of kind 'class', as those of 'class' are, got 'mse'"):
        cs.run(cs.settings.continual(sources), cs.methods.finetune(), metric="accuracy")


def test_clients_are_judged_by_the_first_metric():
    clients = cs.data.iid(cs.data.diabetes(), 3, local_test=True)
    schedule = cs.settings.federated(clients, rounds=2)
    result = cs.run(
        schedule, cs.methods.fedavg(), training=TRAINING, metric=["mse", "r2"], judge_clients=True
    )
    lost_by_hand = [visit["others_after"] - visit["others_before"] for visit in result.local]
    assert result.local_forgetting == pytest.approx(np.mean(lost_by_hand))
    assert result.worst(0.1) == result.matrix[-1].max()
    assert result.of_metric("r2").worst(0.1) == result.metrics["r2"][0, -1].min()
    assert result.of_metric("r2").personal is None


def test_a_report_knows_the_direction(tmp_path):
    low = made(metric="mse", method="low", higher={"mse": False})
    high = made(metric="mse", method="high", higher={"mse": False}, matrices=2 * R[None])
    path = cs.report.write([low, high], tmp_path / "r.html")
    page = path.read_text()
    assert page.count('score best"') == 1 and "low" in page[max(0, page.index('score best"') - 200) :][:250]
    assert "best low" in page
    assert "mse (less is better)" in cs.report.table([low, high])
    unknown = [replace(result, higher={"mse": None}) for result in (low, high)]
    text = cs.report.write(unknown, tmp_path / "u.html").read_text()
    assert 'score best"' not in text and "best low" not in text


def test_any_examples_can_be_scored():
    """As early stopping does with validation data."""
    from consilience.loop.checks import RunOptions, check_all
    from consilience.loop.trial import Trial

    schedule = cs.settings.continual(cs.data.split_classes(cs.data.digits(), 5)[:2])
    setup = check_all(
        schedule,
        cs.methods.finetune(),
        cs.models.mlp(64, (8,), 10),
        TRAINING,
        RunOptions(metric=["loss", "f1"]),
    )
    trial = Trial(setup, 0, 0, lambda line: None, lambda trial, job: None, lambda trial: None)
    source = setup.schedule.sources[1]
    agent = trial.agents[schedule.evaluated]
    score = trial.judge.score(agent, source.validation, source)
    x, y = source.validation.whole()
    p = agent.predict(x)
    assert score.values == pytest.approx({"loss": metrics.loss()(p, y), "f1": metrics.f1()(p, y)})
    assert score.first == score.values["loss"]

    # With the parameters of a step inside a visit, the agent still has those before it.
    job = agent.prepare([source.name])
    assert trial.judge.score_job(job, source.validation, source).values == pytest.approx(score.values)
    with torch.no_grad():
        job.carry.theta.zero_()
    flat = trial.judge.score_job(job, source.validation, source).first
    assert (
        flat == pytest.approx(math.log(10)) and trial.judge.score(agent, source.validation, source) == score
    )


# on the command line


def test_the_command_line_takes_names_with_arguments(tmp_path, capsys, monkeypatch):
    from consilience.cli.main import main

    (tmp_path / "mine.py").write_text("def half(p, y):\n    return 0.5\n\nhalf.higher = True\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["--data", "digits", "--split", "classes", "--training.epochs", "1", "--method", "finetune"]
    chosen = "accuracy,f1(average=micro), top_k(3), mine.half"
    assert main(["run", *words, "--metric", chosen, "--out", "r"]) == 0
    out = capsys.readouterr().out
    found = cs.Result.load("r")
    assert (found.metric, [*found.metrics]) == ("accuracy", ["f1(average=micro)", "top_k(k=3)", "half"])
    assert np.array_equal(found.metrics["f1(average=micro)"], found.matrices)
    assert (found.metrics["top_k(k=3)"] >= found.matrices).all() and (found.metrics["half"] == 0.5).all()
    assert f"f1(average=micro) {found.score:.3f}" in out and "half 0.500" in out

    # A list in a file, and a comparison.
    (tmp_path / "c.yaml").write_text(
        "metric: [auroc, loss]\nmethods: [finetune, er]\ntraining: {epochs: 1}\n"
    )
    assert main(["compare", "--config", "c.yaml", "--out", "c"]) == 0
    figures = json.loads((tmp_path / "c" / "compare.json").read_text())["results"]["er"]
    assert figures["metric"] == "auroc" and figures["metrics"]["loss"]["score"] > 0
    assert main(["report", "c", "--out", "c/again.html"]) == 0
    rows = [
        line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.startswith(("er ", "fine"))
    ]
    assert rows[-4:] == [["er", "auroc"], ["er", "loss"], ["finetune", "auroc"], ["finetune", "loss"]]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("acuracy", "nearest: accuracy"),
        ("accuracy,", "`metric` must be a name, or a name with its arguments, got ''"),
        ("f1(averge=micro)", "unexpected keyword argument 'averge'"),
        ("f1(average=weighted)", "`average` must be macro or micro, got 'weighted'"),
        ("f1(open('x'))", "`metric` must be a name, or a name with its arguments"),
        ("own", "`metric` must be one of the catalogue's, got 'own'"),
        ("mse", "must be for targets of kind 'class'"),
    ],
)
def test_the_command_line_refuses(text, says, capsys):
    from consilience.cli.main import main

    assert main(["run", "--metric", text, "--training.epochs", "1"]) == 2
    found = capsys.readouterr()
    assert says in found.err and found.err.count("\n") == 1


def test_help_lists_all_metrics(capsys):
    from consilience.cli.main import main

    assert main(["run", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in NAMES)


def test_a_function_of_the_catalogue_is_the_metric_that_it_makes():
    assert as_metric(metrics.f1) == as_metric("f1") and as_metric(metrics.top_k) == metrics.top_k()
    with pytest.raises(cs.ConsilienceError, match="`metric` must be"):
        as_metric(metrics.AUROC)


# Forward transfer needs outputs that were trained before.

DIGITS = cs.data.digits()


def transferred(sources, scenario, model=None):
    method, training = cs.methods.finetune(), cs.Training(epochs=1, batch_size=256)
    return cs.run(cs.settings.continual(sources, scenario), method, model, training)


@pytest.mark.parametrize(
    ("sources", "scenario", "heads"),
    [
        (cs.data.split_classes(DIGITS, 5)[:3], "class", False),
        (cs.data.split_classes(DIGITS, 5)[:3], "task", False),
        (cs.data.permute(DIGITS, 2), "task", True),
    ],
)
def test_forward_transfer_is_absent_where_a_source_has_outputs_that_nobody_trained(
    tmp_path, sources, scenario, heads
):
    model = cs.models.multi_head(cs.models.mlp(64, (8,), 10), 10) if heads else None
    result = transferred(sources, scenario, model)
    assert result.forward_transfer is None and result.figure("backward_transfer") is not None
    assert "forward transfer" not in result.table()
    assert "forward transfer" not in result.report(tmp_path / "report.html").read_text()


@pytest.mark.parametrize("scenario", ["domain", "task"])
def test_forward_transfer_is_that_of_sources_whose_outputs_are_known(scenario):
    result = transferred(cs.data.permute(DIGITS, 3), scenario, cs.models.mlp(64, (8,), 10))
    R = result.matrix
    expected = ((R[1, 1] - R[0, 1]) + (R[2, 2] - R[0, 2])) / 2
    assert result.forward_transfer == pytest.approx(expected) and "forward transfer" in result.table()
    assert cs.Result.from_json(result.to_json()).forward_transfer == pytest.approx(expected)

    # Of results that do not say it, all count, as before.
    content = {name: value for name, value in result.to_json().items() if name not in ("foreseen", "sha256")}
    assert cs.Result.from_json(content).forward_transfer == pytest.approx(expected)


def test_forward_transfer_counts_the_sources_that_allow_it():
    first, second = cs.data.split_classes(DIGITS, 5)[:2]
    again = replace(first, name="again", train=first.train.select(torch.arange(60)))
    # Classes of their own tests, so that no test image is trained on.
    again = replace(again, test=first.test, validation=first.validation)
    result = transferred([first, second, again], "class")
    R = result.matrix
    assert result.foreseen == (False, False, True)
    assert result.forward_transfer == pytest.approx(R[2, 2] - R[0, 2])


def test_answers_are_counted_by_class_and_resumed(tmp_path):
    """The counts are those of a loop over the test data; a resumed run, and one read back, has the same."""
    sources = cs.data.split_classes(cs.data.digits(), 2)
    schedule, fit = cs.settings.continual(sources), cs.Training(epochs=2, lr=0.1)

    def begun(stop=None):
        def progress(line):
            if line["event"] == stop and line.get("stage") == 1:
                raise KeyboardInterrupt

        return cs.run(
            schedule,
            cs.methods.er(50),
            cs.models.mlp(64, (16,)),
            fit,
            repeats=2,
            out=tmp_path / "run",
            resume=stop is None and (tmp_path / "run").exists(),
            progress=progress,
        )

    with pytest.raises((KeyboardInterrupt, Interrupted)):
        begun("stage")
    found = begun()
    wanted = np.zeros((10, 11), int)
    for seed in range(2):
        alone = cs.run(schedule, cs.methods.er(50), cs.models.mlp(64, (16,)), fit, seed=seed)
        for source in schedule.judged:
            x, y = source.test.whole()
            for true, answer in zip(y.tolist(), alone.predict(x).argmax(1).tolist(), strict=True):
                wanted[true, answer] += 1
    assert found.confusion.tolist() == wanted.tolist()
    assert found.sizes == tuple((len(s.train), len(s.test)) for s in schedule.judged)
    back = cs.Result.load(tmp_path / "run")
    assert back.confusion.tolist() == wanted.tolist() and back.sizes == found.sizes


def test_answers_are_not_counted_where_they_are_not_those_of_the_score():
    """Values have no classes, a run that returns an earlier stage has other answers, one test counts once."""
    fit = cs.Training(epochs=1)
    assert (
        cs.run(cs.settings.continual([cs.data.diabetes()]), cs.methods.finetune(), training=fit).confusion
        is None
    )
    assert confusion_of([{"confusion": [[1, 0]]}], [{"stage": 4, "returned": 2}]) is None
    clients = cs.data.iid(cs.data.digits(), 3)
    once = cs.run(cs.settings.federated(clients, rounds=1), cs.methods.fedavg(), training=fit)
    assert once.confusion.sum() == len(cs.data.digits().test)
    assert np.trace(once.confusion[:, :-1]) / once.confusion.sum() == pytest.approx(once.score)
