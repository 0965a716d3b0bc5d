"""The README's examples run, and give what they say."""

from __future__ import annotations

import datetime
import doctest
import importlib.util
import inspect
import json
import os
import re
import runpy
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import consilience as cs

ROOT = Path(__file__).parents[1]
HOOKS = ROOT / "docs" / "hooks.py"
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("code", BLOCKS, ids=["ten lines", "your own", "one list"])
def test_the_readme_runs(code, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    for line in capsys.readouterr().out.splitlines():
        assert "nan" not in line
        if "+-" in line:  # what the page shows is what comes out, but for other machines' rounding
            shown = next(
                text for text in README.splitlines() if text.split()[:1] == line.split()[:1] and "+-" in text
            )
            assert abs(float(line.split()[1]) - float(shown.split()[1])) < 0.03, line


def test_the_examples_of_the_agents_page_run(capsys, tmp_path):
    first, second = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "skill.md").read_text(), re.S)
    here: dict[str, Any] = {}
    exec(compile(first.replace("/tmp/", f"{tmp_path}/"), "skill.md", "exec"), here)
    there: dict[str, Any] = {}
    exec(compile(second.replace("/tmp/", f"{tmp_path}/"), "skill.md", "exec"), there)
    agent, x = here["result"].agent, there["x"]
    columns = there["agent"].frame.columns(agent.frame.labels)
    assert (agent.predict(x) == there["p"][:, columns]).all(), (
        "without any data it answers what the other answers"
    )
    score, mapper = (float(v) for v in re.findall(r"(\d\.\d+|\d\.\d)", capsys.readouterr().out))
    assert score > 0.8 and mapper > 0.8


PAGES = sorted(
    page.relative_to(ROOT / "docs").as_posix()
    for page in (ROOT / "docs").rglob("*.md")
    if page.name not in ("skill.md", "your-own-method.md") and "```python" in page.read_text()
)


@pytest.mark.parametrize("name", PAGES)
def test_the_code_of_the_docs_runs(name, tmp_path, monkeypatch):
    """The blocks of a page run in order, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    here: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / name).read_text(), re.S):
        exec(compile(code, name, "exec"), here)


def test_the_blocks_for_transformers_run(tmp_path, monkeypatch):
    """Those that need transformers and peft are marked `py`; a small model of random weights stands in."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from tokenizers import Tokenizer, models, pre_tokenizers

    monkeypatch.chdir(tmp_path)
    kinds = {"vocab_size": 2000, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**kinds, intermediate_size=8)
    transformers.BertForSequenceClassification(config).save_pretrained("model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "film", "meal"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    )
    fast.save_pretrained("model")

    texts, moods = ["a good film", "a bad meal"] * 20, ["good", "bad"] * 20
    data = {name: (texts, moods) for name in ("films", "food")}
    here: dict[str, Any] = {
        "cs": cs,
        "folder": "model",
        "data": data,
    }
    for code in re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.S):
        exec(compile(code, "data.md", "exec"), here)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    # Five rounds of two clients are 20 messages: a tenth of the base each is more than adapters and head.
    base = sum(value.nbytes for value in here["model"].state_dict().values())
    assert here["result"].costs["bytes"] < 20 * base / 10


def test_the_worked_examples_are_the_files():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "your-own-method.md").read_text(), re.S)
    files = [path.read_text() for path in sorted((ROOT / "examples").glob("*.py"))]
    assert len(blocks) == 5
    for block in blocks:
        # The page leaves out the docstring of the file, the __future__ import and what runs as a script.
        code = block.split("\n\n\n", 1)[1].strip()
        assert any(code in file for file in files), block[:200]


def test_the_table_of_verbs_is_true():
    """Every class that the page names as a user of a verb overrides it, and every verb is in the table."""
    from consilience import corrections, mappers
    from consilience.core.correction import Correction, overrides

    page = (ROOT / "docs" / "your-own-method.md").read_text()
    rows = re.findall(r"^\|[^|]*\| (`\w+.*?) \|.*\| ([\w, ]+) \|$", page, re.M)
    named = set()
    for verbs, users in rows:
        for verb in re.findall(r"`(\w+)(?:\(|`)", verbs):
            named.add(verb)
            for user in users.split(", "):
                kind = getattr(corrections, user, None) or getattr(mappers, user)
                own = any(
                    verb in vars(k) for k in kind.__mro__ if k is not Correction and issubclass(k, Correction)
                )
                assert own, (verb, user)
    verbs = {n for n, f in vars(Correction).items() if callable(f) and not n.startswith("_")}
    assert verbs <= named, verbs - named
    assert overrides


def test_the_worked_examples_run(capsys):
    page = (ROOT / "docs" / "your-own-method.md").read_text()
    scripts = re.findall(r"`python (examples/\w+\.py)`", page)
    assert len(scripts) == 5
    for script in scripts:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert "continual" in capsys.readouterr().out


def test_the_commands_of_the_readme_are_accepted(tmp_path):
    commands = re.findall(r"^consilience (run|compare) (.*)$", (ROOT / "README.md").read_text(), re.M)
    assert len(commands) == 2
    for name, rest in commands:
        arguments = rest.replace("runs/", f"{tmp_path}/").split()
        done = subprocess.run(
            [sys.executable, "-m", "consilience.cli", name, *arguments, "--training.epochs", "1"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_the_readme_counts_the_cells_of_the_table():
    pinned = json.loads((ROOT / "tests" / "pinned" / "methods.json").read_text())
    cells = [cell for row in pinned.values() for cell in row.values()]
    found = re.search(r"of (\d+) method-and-setting cells, (\d+) run", README)
    assert found is not None
    assert [int(n) for n in found.groups()] == [len(cells), cells.count("runs")]


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py")))
def test_result_scripts_start_on_todays_code(name, monkeypatch):
    """Each is imported whole: what it takes from the package is there, and `make results` knows it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(os, "environ", dict(os.environ))  # some set their number of threads
    module = importlib.import_module(name)
    assert module.__doc__
    if hasattr(module, "main") and name not in ("results", "style"):
        commands = importlib.import_module("results").SCRIPTS
        assert any(script.command.startswith(f"{name}.py") for script in commands)


def test_old_results_are_listed_with_their_age(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    results = importlib.import_module("results")
    (tmp_path / "results").mkdir()
    facts = {"date": "2026-01-02 03:04 UTC", "commit": "0000000", "minutes": 1.25}
    (tmp_path / "results" / "old.json").write_text(json.dumps(facts))
    monkeypatch.setattr(results, "HERE", tmp_path)
    head, row = results.ages().splitlines()
    assert head.split()[:1] == ["result"] and row.split()[:5] == [
        "old",
        "2026-01-02",
        "03:04",
        "UTC",
        "0000000",
    ]
    days = (
        datetime.datetime.now(datetime.UTC) - datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC)
    ).days
    assert row.split()[5:] == [str(days), "unknown", "1.2"]


@pytest.mark.parametrize(
    ("scores", "tried", "value", "edge"),
    [
        ({1: 0.5, 2: 0.9, 3: 0.4}, [1, 2, 3], 2, False),
        ({0: 0.6, 1: 0.7, 2: 0.2, 3: 0.1}, [0, 1, 2, 3], 1, False),
        ({1: 0.1, 2: 0.2, 3: 0.7, 4: 0.8}, [1, 2, 3, 4], 4, True),
        ({1: 0.5, 2: 0.5, 3: 0.5}, [1, 2, 3], 2, False),
    ],
    ids=["middle", "neighbour", "edge", "equal"],
)
def test_strengths_are_chosen_from_as_many_values_for_every_method(scores, tried, value, edge, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tune = importlib.import_module("common").tune
    asked = []

    def score(trials):
        asked.extend(trials)
        return [scores[int(v)] for _, v in trials]

    choice = tune({"m": (0.0, 1.0, 2.0, 3.0, 4.0)}, score)["m"]
    assert sorted(v for _, v in asked) == tried == [v for v, _ in choice.tried]
    assert (choice.value, choice.edge) == (value, edge) and ("*" in str(choice)) == edge


def result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def page(name: str) -> str:
    """A page of the docs as one line."""
    return " ".join((ROOT / "docs" / name).read_text().split())


def test_figures_of_the_agents_page_are_those_of_the_results():
    """docs/skill.md against skill.json, skill_seeds.json, heads.json and mapping.json."""
    text, found = page("skill.md"), result("skill")
    learners = {n.partition(" (")[0]: v for n, v in found["statistics"].items()}
    fourier = next(v for n, v in learners.items() if "Fourier" in n)
    rows = {
        "heads with biases, routed by Mahalanobis": found["scores"]["LLL, BB, MAHA"],
        "heads alone, routed by Mahalanobis": found["scores"]["LLL, MAHA"],
        "one ridge head on random Fourier features": fourier,
        "LDA over all classes": learners["LDA over all classes"],
        "one ridge head": learners["one ridge head"],
        "ER with 10 images per class": found["scores"]["ER (10 a class)"],
        "ER with 1 image per class": found["scores"]["ER (1 a class)"],
    }
    for name, value in rows.items():
        assert f"| {name} | {100 * value:.1f} |" in text, (name, value)
    with_labels = found["with labels"]
    assert f"heads with biases reach {with_labels['LLL, BB']} and heads alone {with_labels['LLL']}" in text
    assert f"the task of {100 * found['mapper at the end']['MAHA']:.1f} % of images" in text

    names, oracle = [task["name"] for task in found["tasks"]], found["oracle"]
    for task, shown in (("mnist_m", "MNIST-M: "), ("cifar10 5-9", "CIFAR-10, classes 5 to 9: ")):
        before, after = (100 * oracle[what][names.index(task)] for what in ("head", "BB"))
        assert f"({shown}{before:.0f} to {after:.0f})" in text, (task, before, after)

    means: dict[str, list[float]] = {}
    for seed in result("skill_seeds")["seeds"].values():
        for name, scores in seed["scores"].items():
            means.setdefault(name, []).append(100 * sum(scores) / len(scores))
    ours = statistics_of(means.pop("LLL, BB, MAHA"))
    assert f"heads with biases have {ours[0]:.1f} ± {ours[1]:.1f}" in text
    er = statistics_of(means["ER (10 a class)"])[0]
    one_head = [n for n in means if "routed" not in n and n not in ("LLL, MAHA", "ER (10 a class)")]
    best = max(statistics_of(means[n])[0] for n in one_head)
    assert f"the best statistics learner by {ours[0] - best:.1f} and ER by {ours[0] - er:.1f}" in text

    heads = {
        name: {column: sum(r[column] for r in rows) / len(rows) for column in rows[0]}
        for name, rows in result("heads")["rows"].items()
    }
    new, plain = "one class of each, over their norm", "one class of each, as they are"
    quoted = [heads[n][new] for n in ("trained with norm='inf'", "trained", "ridge", "prototypes")]
    quoted.append(heads["prototypes"][plain])
    for value in quoted:
        assert f"{value:.2f}".lstrip("0") in text, value
    anchors = {n: row["bytes"] for n, row in result("mapping")["real"]["mappers"].items()}
    twelfth = anchors["mahalanobis"] / anchors["mahalanobis, rank 64"]
    assert "a twelfth of the bytes" in text and 11.5 < twelfth < 12.6


def statistics_of(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    return statistics.mean(values), statistics.stdev(values)


def test_figures_of_ex_model_distillation_are_those_of_the_results():
    """docs/settings/exmodel.md against exmodel_mnist.json."""
    text = page("settings/exmodel.md")
    rows = {
        run["row"]: 100 * run["seeds"][0]["score"]
        for run in result("exmodel_mnist")["runs"]
        if run["scenario"] == "nc"
    }
    ours = [rows[name] for name in ("strokes", "strokes, both, over samples", "ours (and 3 x the steps)")]
    for said in (
        f"the surest expert is right in {rows['entropy']:.0f} %",
        f"the one that knows the digit in {rows['oracle']:.1f} %",
        f"{rows['Model Inversion ED']:.0f} with inversion,",
        f"{rows['Data Impression ED']:.0f} with data impression",
        f"and {rows['Aux. Data ED']:.0f} with Fashion-MNIST",
        "Strokes give {:.0f}, over samples {:.0f}, and with three times the steps {:.0f}.".format(*ours),
        f"upper bound, give {rows['Replay ED']:.0f}.",
    ):
        assert said in text, said


def test_figures_of_multitask_learning_are_those_of_the_results():
    text = page("settings/multitask.md")

    def shown(rows: list[dict[str, float]] | list[float], name: str = "", percent: int = 100) -> str:
        """Mean ± standard deviation over seeds, of one task or of the mean over all."""
        each = [
            (r[name] if name else statistics.mean(r.values())) if isinstance(r, dict) else r for r in rows
        ]
        mean, spread = statistics_of([percent * value for value in each])
        return f"{mean:.1f} ± {spread:.1f}"

    domains = result("multitask_domains")
    scores = domains["scores"]
    assert f"each domain alone {shown(scores['TF-IDF, alone'])} %" in text
    nets = {net: shown(scores[f"TF-IDF, uniform, {net}"]) for net in ("MMoE", "PLE", "cross-stitch")}
    assert f"hard sharing {shown(scores['TF-IDF, uniform, hard sharing'])}" in text
    assert all(f"{net} {value}" in text for net, value in nets.items())
    means = {n: statistics.mean(statistics.mean(r.values()) for r in rows) for n, rows in scores.items()}
    for name, mean in means.items():
        kind, _, net = name.partition(", ")
        if kind == "TF-IDF" and net != "alone":
            assert 100 * abs(mean - means[f"TF-IDF, uniform, {net.partition(', ')[2]}"]) <= 0.4, name
    many = domains["many terms"]
    assert f"40,000 terms has {shown(many['hard sharing, large'])}" in text
    for name, value in (("on all domains", 87.5), ("and per domain", 83.6)):
        assert f"{name} {value}" in text
        assert abs(100 * many[f"logistic regression {name.removeprefix('and ')}"][0] - value) <= 0.05

    mixed, task = result("multitask_mixed")["scores"], "mnist/map"
    assert f"R2 {shown(mixed['uniform'], task)} %, alone {shown(mixed['alone'], task)}" in text
    digits = {n: statistics.mean(100 * r["mnist/digit"] for r in rows) for n, rows in mixed.items()}
    for name, words in (("Nash-MTL", "costs the digits"), ("MGDA", "costs them")):
        assert f"{shown(mixed[name], task)}" in text
        assert f"{words} {digits['uniform'] - digits[name]:.1f}" in text
    tokens = result("multitask_tokens")
    for name, words in (("uniform", "together"), ("alone", "alone")):
        tags, entities = (shown(tokens["scores"][name], task) for task in ("upos", "ner"))
        assert f"{words} {tags}" in text and entities in text, name
    most = [f"{100 * tokens['most frequent'][task]:.1f}" for task in ("upos", "ner")]
    assert f"the most frequent tag of a word has {most[0]} and {most[1]};" in text
    sentiment = [shown(tokens["scores"][name], "sentiment") for name in ("uniform", "alone")]
    assert f"sharing: {sentiment[0]} against {sentiment[1]} (" in text
    sentences = result("multitask_sentences")["scores"]
    said = {"proportional": "proportional sampling", "alone": "each task alone"}
    assert all(f"{said.get(n, n)} {shown(rows)}" in text for n, rows in sentences.items())


def test_figures_of_padding_are_those_of_the_results():
    ratios = {n: sum(v) / len(v) for n, v in result("lengths")["ratios"].items()}
    text = page("targets.md")
    assert f"have {ratios['one batch']:.2f} times as many places as words" in text
    assert f"shuffled batches of 32 have {ratios['shuffled']:.2f} times" in text
    assert f"by length they have {ratios['by length']:.2f} times" in text


def test_the_table_of_aggregators_is_that_of_the_results(monkeypatch):
    """docs/aggregators.md against matrix.json, which has every aggregator of the catalogue of its day."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    matrix, rows = importlib.import_module("matrix"), result("matrix")["rows"]
    text = (ROOT / "docs" / "aggregators.md").read_text()
    assert text.partition(matrix.BEGIN)[2].partition(matrix.END)[0].strip() == matrix.table(rows)
    clean = ("gradients", "updates", "experts")

    means = {
        name: {c: 100 * statistics.mean(cell["scores"]) for c, cell in row.items() if "scores" in cell}
        for name, row in rows.items()
    }
    for column in clean:
        assert max(means, key=lambda name: means[name].get(column, 0.0)) == "ties"
    ties, mean = means["ties"], means["mean"]
    said = page("aggregators.md")
    assert (
        "{}, {} and {}, where the mean has {}, {} and {}.".format(
            *(f"{row[c]:.1f}" for row in (ties, mean) for c in clean)
        )
        in said
    )
    bad = {name: f"{row['bad client']:.1f}" for name, row in means.items() if "bad client" in row}
    assert f"it falls to {bad['ties']}, below the mean" in said
    assert f"multi-Krum ({bad['multi_krum']}) and the geometric median ({bad['geometric_median']})" in said
    assert f"the mean has {bad['mean']}. Krum" in said
    assert sorted(bad.values())[-2:] == [bad["geometric_median"], bad["multi_krum"]]
    for name in ("pcgrad", "mgda", "cagrad", "imtl_g", "nash_mtl", "upgrad"):
        assert all(abs(means[name][c] - mean[c]) < 1.5 for c in clean), name
    losses = [mean[c] - means["aligned_mtl"][c] for c in clean]
    assert f"up to {max(losses):.1f} points, on task vectors" in said and losses[2] == max(losses)
    assert all(abs(means["arithmetic"][c] - mean[c]) < 0.05 for c in clean)
    assert not means["gem"] and not means["agem"] and "gradients" not in means["fisher"]


def test_figures_of_curricula_are_those_of_the_results():
    orders = result("curricula")["orders"]

    def mean(name: str, what: str = "accuracy") -> float:
        return 100 * statistics.mean(run[what] for run in orders[name]["runs"])

    text = page("training.md")
    assert f"(2,000 images, a small conv net, three seeds) it has {mean('random order'):.1f} %" in text
    assert f"competence {mean('competence'):.1f} %, where random order with as many steps" in text
    assert f"has {mean('random order, as many'):.1f} %, baby steps {mean('baby-step'):.1f} %" in text
    assert f"self-paced {mean('self-paced'):.1f} %, the hardest first {mean('anti'):.1f} %" in text
    others = [name for name in orders if not name.startswith("random")]
    assert all(mean(name) < mean("random order") for name in others)

    by_loss = [name for name in others if "random" not in name]
    first = [mean(name, "wrong at first") for name in by_loss]
    assert f"are {min(first):.1f} to {max(first):.1f} % of what came first" in text
    assert f"and {mean('random order', 'wrong at first'):.1f} % of all" in text


def test_links_of_the_docs_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


@pytest.fixture(scope="module")
def hooks() -> Any:
    """The module that makes pages of the site from the code."""
    spec = importlib.util.spec_from_file_location("hooks", HOOKS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert doctest.testmod(module).failed == 0
    return module


def test_the_catalogue_has_every_method(hooks):
    page = hooks.catalogue()
    for name in cs.methods.__all__:
        function = getattr(cs.methods, name)
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert "**Paper:** " in section, name
        assert "**Runs in" in section, name
        assert "!!! note" in section or "no parts" in section, name

        # Each argument has a row with its default, and a meaning.
        for parameter in inspect.signature(function).parameters.values():
            default = "required" if parameter.default is parameter.empty else hooks.written(parameter.default)
            row = re.search(rf"^\| `{parameter.name}` \| `?(.*?)`? \| (.+) \|$", section, re.M)
            assert row is not None and row.group(1) == default and len(row.group(2)) > 3, (name, parameter)


def test_the_reference_has_every_public_name_and_room(hooks):
    pages = hooks.reference()
    top = pages["reference/consilience.md"]
    for name in cs.__all__:
        if inspect.ismodule(getattr(cs, name)):
            assert f"]({name}.md)" in top and f"::: consilience.{name}." in pages[f"reference/{name}.md"], (
                name
            )
        else:
            assert f"::: consilience.{name}\n" in top, name

    listed = {title: page for entry in hooks.reference_nav() for title, page in entry.items()}
    assert set(listed.values()) == set(pages)
    assert set(hooks.all_rooms()) <= set(listed), "a room has no page; see docs/rooms.py"


def test_the_benchmarks_are_pages(hooks):
    pages, figures = hooks.benchmarks(), {path.name for path in hooks.RESULTS.glob("*.svg")}
    listed = {page for entry in hooks.benchmarks_nav() for page in entry.values()}
    assert listed == set(pages)
    for text in pages.values():
        assert set(re.findall(r"\]\((\w+\.svg)\)", text)) <= figures


@pytest.mark.slow
def test_the_site_builds_and_asks_no_server(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install -e '.[docs]'")
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?(https?:[^\" >]*)", page.read_text()
        )
        assert not loaded, (page, loaded)
    for sheet in tmp_path.rglob("*.css"):
        assert not re.findall(r"url\([\"']?https?:", sheet.read_text()), sheet
