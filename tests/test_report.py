"""The report room: text and Markdown tables, the HTML file, results read from folders."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest

import consilience as cs
from consilience import ConsilienceError, Result, report
from consilience.report._significance import differences
from consilience.report._svg import Axis, lines_chart
from consilience.report._text import cell

VOID = {"meta", "link", "br", "hr", "img", "input"}


def make(
    method="ewc",
    stages=3,
    sources=3,
    repeats=2,
    metric="accuracy",
    setting="continual",
    learned=True,
    **other,
) -> Result:
    g = np.random.default_rng(len(method))
    costs = {"macs": 1_200_000, "bytes": 3_400, "seconds": 75.0}
    fields = dict(
        setting=setting,
        data="digits",
        method=method,
        model="MLP",
        metric=metric,
        seed=0,
        sources=tuple(f"digits/{j}" for j in range(sources)),
        stages=tuple(f"stage {i}" for i in range(stages)),
        learned_at=tuple(min(j + 1, stages) if learned else None for j in range(sources)),
        matrices=g.random((repeats, stages + 1, sources)),
        costs=costs,
        curve=[
            {"score": 0.1 * i, "macs": 10.0 * i, "bytes": 5.0 * i, "seconds": 1.0 * i}
            for i in range(stages + 1)
        ],
        config={"method": {"name": method, "strength": 1.5}, "seed": 0},
        versions={"torch": "2.11.0"},
    )
    return Result(**{**fields, **other})


class Checker(HTMLParser):
    """Every opened element is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.svgs: list[dict[str, str | None]] = []
        self.scripts = 0
        self.ids: list[str] = []
        # For each figure the ways to save it; for each table its link and its rows.
        self.figures: list[list[str]] = []
        self.tables: list[tuple[str, list[list[str]]]] = []
        self.saved = ""

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids += [given["id"]] if "id" in given else []
        if tag == "figure":
            self.figures.append([])
        if "data-save" in given:
            self.figures[-1].append(given["data-save"])
        if tag == "a" and given.get("class") == "save":
            assert given["download"].endswith(".csv")
            self.saved = given["href"]
        if tag == "table":
            self.tables.append((self.saved, []))
            self.saved = ""
        if tag == "tr":
            self.tables[-1][1].append([])
        if tag in ("th", "td"):
            self.tables[-1][1][-1].append("")
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "action", "srcset")]
        self.scripts += tag == "script"
        if tag == "svg":
            self.svgs.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in {"path", "rect", "circle"}, tag

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and "table" in self.open and {"th", "td"} & {*self.open}:
            self.tables[-1][1][-1][-1] += data


def checked(path: Path) -> tuple[str, Checker]:
    text = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    assert all(v.startswith(("#", "data:,", "data:text/csv")) for v in checker.links), checker.links
    assert all(v[1:] in checker.ids for v in checker.links if v.startswith("#"))
    assert not re.search(r"(src|href|url|import)\s*[=(]?\s*[\"']?\s*(https?:)?//", text)
    assert checker.scripts == 1
    assert all(s["aria-label"] for s in checker.svgs)

    # Every figure can be saved both ways, and every table as what it shows.
    assert len(checker.figures) == len(checker.svgs)
    assert all(ways == ["svg", "png"] for ways in checker.figures)
    for link, rows in checker.tables:
        kind, _, content = link.partition(",")
        assert kind == "data:text/csv;charset=utf-8"
        saved = list(csv.reader(io.StringIO(unquote(content))))
        assert saved == [[cell(value) for value in row] for row in rows]
        assert all(any(row[j] != "-" for row in rows[1:]) for j in range(len(rows[0])))
    return text, checker


def test_table_says_what_agrees_once_and_what_differs_in_columns():
    text = report.table(
        [make("ewc"), make("er"), make("fedavg", setting="federated", learned=False, repeats=1)]
    )
    first, head, _, *rows = text.splitlines()
    assert first == "data digits, model MLP, metric accuracy"
    assert head.split()[:4] == ["method", "setting", "repeats", "accuracy"]
    assert [r.split()[:3] for r in rows] == [
        ["ewc", "continual", "2"],
        ["er", "continual", "2"],
        ["fedavg", "federated", "1"],
    ]
    assert rows[2].split()[4:7] == ["-", "-", "-"], (
        "one repeat has no deviation, several visits have no forgetting"
    )
    assert "mapper" not in head
    assert len({len(line) for line in text.splitlines()[1:]}) == 1
    assert "\x1b" not in text


def test_table_of_one_shows_its_matrix_and_units():
    r = make(mapper=np.array([[0.5, 0.25, 0.75]] * 2))
    text = report.table([r])
    assert f"{100 * r.score:.1f} ± {100 * r.score_std:.1f}" in text
    for part in (
        "1.20 M",
        "3.40 kB",
        "1 min 15 s",
        "mapper %",
        "75.0",
        "(start)",
        "stage 2",
        f"{100 * r.matrix[-1, -1]:.1f}",
    ):
        assert part in text
    plain = make(metric="r2")
    assert f"{plain.score:.3f} ± {plain.score_std:.3f}" in report.table([plain])


def test_table_cuts_a_large_matrix():
    lines = report.table([make(stages=100, sources=100)]).splitlines()
    matrix = lines[6:]
    assert len(matrix) == 2 + 20
    assert matrix[0].split()[0] == "stage"
    assert len(re.split(r"\s{2,}", matrix[0])) == 1 + 12
    assert matrix[-1].startswith("stage 99")
    assert max(map(len, matrix)) < 150


def test_markdown_is_rectangular_and_escapes():
    lines = report.markdown([make("a|b<i>"), make("er")]).splitlines()
    assert lines[0].startswith("setting continual")
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines[2:]} == {9}
    assert "a\\|b&lt;i>" in lines[4]


@pytest.mark.parametrize(
    "make_text", [report.table, report.markdown, lambda r: report.write(r, "/nowhere/x.html")]
)
def test_nothing_to_show_is_an_error(make_text):
    with pytest.raises(ConsilienceError, match="at least one result"):
        make_text([])


def test_write_has_all_charts_for_every_result(tmp_path):
    results = [
        make("ewc"),
        make("er", mapper=np.full((2, 3), 0.5)),
        make("fedavg", setting="federated", learned=False),
    ]
    path = report.write(results, tmp_path / "deep" / "report.html", title="Three & more")
    text, checker = checked(path)
    # continual: over stages, MACs, bytes; federated: MACs, bytes;
    # each result: heat map, lines, final scores, and bars of forgetting, in rounds too
    assert len(checker.svgs) == 3 + 2 + 3 * 4
    assert "Three &amp; more" in text
    assert text.count("<details class=result") == 3
    for part in ("strength: 1.5", "2.11.0", "prefers-color-scheme:dark", "tabular-nums", "@media print"):
        assert part in text
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    again = report.write(results, tmp_path / "again.html", title="Three & more")
    assert again.read_bytes() == path.read_bytes()


def test_every_client_counts_the_same_in_the_score_and_the_report_says_so(tmp_path):
    """Tests of 2 and 18 examples, one of them all wrong: .5, where a mean by examples would be .1 or .9."""
    x, y = np.eye(2, dtype="float32")[[0, 1] * 9], np.array([0, 1] * 9)
    clients = [
        cs.data.arrays(x, y, test=(x[:n], y[:n] if right else 1 - y[:n]), name=name, space="one")
        for name, n, right in (("small", 2, True), ("large", 18, False))
    ]
    fit = cs.Training(epochs=5, lr=0.5)
    r = cs.run(cs.settings.federated(clients, rounds=3), cs.methods.fedavg(), cs.models.linear(2, 2), fit)
    assert r.matrix[-1].tolist() == [1.0, 0.0] and r.score == 0.5
    text = " ".join(r.report(tmp_path / "r.html").read_text().split())
    assert "in their mean every source or client counts the same, however many examples it has" in text


def test_write_escapes_every_name(tmp_path):
    evil = '<script>alert("1")</script>\'"&</textarea></style>'
    r = replace(
        make(evil),
        setting=evil,
        data=evil,
        model=evil,
        metric=evil,
        sources=(evil,) * 3,
        stages=(evil,) * 3,
        config={evil: {"x": evil}},
        versions={evil: evil},
    )
    text, _ = checked(report.write([r, make("er", setting=evil)], tmp_path / "x.html", title=evil))
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text


@pytest.mark.parametrize(("stages", "sources"), [(1, 5), (20, 10), (10, 20), (100, 100), (60, 2), (1, 1)])
def test_every_shape_of_matrix(tmp_path, stages, sources):
    r = make(stages=stages, sources=sources)
    text, _ = checked(report.write([r], tmp_path / "x.html"))
    heat = text[text.index('aria-label="Heat map') :]
    heat = heat[: heat.index("</svg>")]
    written = heat.count('class="v"')
    assert written == ((stages + 1) * sources if sources <= 24 and stages < 42 else 0)
    assert "NaN" not in heat
    assert len(text) < 1_000_000


def test_nan_none_and_zero(tmp_path):
    m = np.full((2, 4, 3), 0.5)
    m[:, 2, 1] = np.nan
    results = [
        make("some", matrices=m),
        make("none", matrices=m * np.nan, curve=(), config={}, versions={}),
        make("free", costs={"macs": 0, "bytes": 0, "seconds": None}),
        make("wide", costs={"macs": 10**12, "bytes": 10, "seconds": 1e5}),
        make("partial", costs={}, mapper=np.full((2, 3), np.nan)),
        make("r", metric="r2", matrices=m * -1e7),
    ]
    assert "nan" in report.table(results)
    text, _ = checked(report.write(results, tmp_path / "x.html"))
    shapes = re.findall(r'\b(?:d|x|y|cx|cy|width|height|viewBox|transform)="([^"]*)"', text)
    assert shapes
    assert not [s for s in shapes if "nan" in s or "inf" in s]
    assert "log scale" in text


def test_load_reads_what_was_written(tmp_path):
    r = make(mapper=np.full((2, 3), 0.25))
    (tmp_path / "result.json").write_text(json.dumps(r.to_json()))
    back = report.load(tmp_path)
    assert report.table([back]) == report.table([r])
    np.testing.assert_array_equal(back.matrices, r.matrices)


def test_a_result_of_a_folder_shows_itself(tmp_path):
    """`Result.load` gives what `run` gives, without the agent."""
    (tmp_path / "result.json").write_text(json.dumps(make().to_json()))
    back = cs.Result.load(tmp_path)
    assert type(back) is cs.Result and back.agent is None
    assert back.table() == report.table([make()])
    assert back.report(tmp_path / "x.html").exists()
    with pytest.raises(ConsilienceError, match="has no result.json"):
        cs.Result.load(tmp_path / "nowhere")


def test_load_reads_null_as_nan(tmp_path):
    d = make().to_json()
    d["matrices"][0][0][0] = None
    (tmp_path / "result.json").write_text(json.dumps(d))
    assert np.isnan(report.load(str(tmp_path)).matrices[0, 0, 0])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "has no result.json"),
        ("{", "complete JSON"),
        ("[1]", "JSON object, got a list"),
        ("{}", "must have `setting`, got none"),
        (b"\xff\xfe\x00", "complete JSON"),
        ({"matrices": [[1.0], [2.0, 3.0]]}, "at "),
        ({"stages": ["one"]}, "repeats x 2 x 3"),
        ({"learned_at": None}, "at "),
        ({"matrices": []}, "got 0"),
    ],
)
def test_load_names_the_path(tmp_path, content, says):
    path = tmp_path / "result.json"
    if isinstance(content, dict):
        content = json.dumps(make().to_json() | content)
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConsilienceError, match=re.escape(says)) as e:
        report.load(tmp_path)
    assert str(tmp_path) in str(e.value)
    assert "\n" not in str(e.value)


def test_write_where_nothing_can_be_written(tmp_path):
    with pytest.raises(ConsilienceError, match="cannot write"):
        report.write([make()], tmp_path)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here to open the file with")
def test_opens_in_a_browser(tmp_path):
    results = [make("ewc"), make("er <b>"), make("fedavg", setting="federated", learned=False)]
    path = report.write(results, tmp_path / "report.html")

    def chromium(*how: str) -> str:
        flags = [
            "headless",
            "no-sandbox",
            "disable-gpu",
            "disable-quic",
            "no-first-run",
            "disable-background-networking",
        ]
        flags = [f"--{f}" for f in (*flags, "disable-component-update", "disable-sync")]
        profile = tmp_path / f"profile{len(list(tmp_path.iterdir()))}"
        profile.mkdir()
        command = ["chromium", *flags, f"--user-data-dir={profile}", *how, path.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    dom = chromium("--dump-dom")
    assert dom.count("<svg") == 17
    for name in ("ewc", "er &lt;b&gt;", "fedavg"):
        assert f"<h3>{name}</h3>" in dom
    shot = tmp_path / "shot.png"
    chromium(f"--screenshot={shot}", "--window-size=1300,2400")
    data = shot.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(data) > 20_000


def ran(R: list[list[float]], learned_at: tuple[int | None, ...], **more: Any) -> cs.Result:
    """A result with this matrix, and nothing else of interest."""
    matrices = np.array([R])
    given = {
        "setting": "continual",
        "data": "toy",
        "method": "ewc",
        "model": "mlp",
        "metric": "accuracy",
        "seed": 0,
        "sources": tuple(f"s{j}" for j in range(matrices.shape[2])),
        "stages": tuple(f"t{i}" for i in range(1, matrices.shape[1])),
        "costs": {"macs": 2000, "bytes": 0, "steps": 3, "seconds": 0.5, "by_agent": {}},
    }
    return cs.Result(matrices=matrices, learned_at=learned_at, **{**given, **more})


def test_accuracy_over_seen_sources_stability_and_plasticity_by_hand():
    R = [[0.1, 0.1, 0.2], [0.9, 0.1, 0.2], [0.7, 0.8, 0.2], [0.5, 0.6, 0.7]]
    result = ran(R, (1, 2, 3))
    assert result.seen == pytest.approx([0.9, (0.7 + 0.8) / 2, (0.5 + 0.6 + 0.7) / 3])
    assert result.average_incremental == pytest.approx((0.9 + 0.75 + 0.6) / 3)
    assert result.plasticity == pytest.approx((0.9 + 0.8 + 0.7) / 3)
    assert result.stability == pytest.approx((0.5 + 0.6) / 2)

    # Learned at several stages there is no "when learned"; the source is seen from the first stage.
    several = ran(R, (None, 2, 3))
    assert several.plasticity is None and several.stability is None
    assert several.seen == pytest.approx(result.seen)
    # One that nobody trains on is never seen.
    assert ran(R, (1, 2, 0)).seen == pytest.approx([0.9, 0.75, 0.55])


def test_a_result_is_five_lines_a_frame_and_a_figure(tmp_path):
    result = ran([[0.0, 0.0], [0.5, 0.25], [0.25, 1.0]], (1, 2), labels=(("d", "a"), ("d", "b")))
    lines = repr(result).splitlines()
    assert (
        len(lines) == 5
        and "ewc in continual on toy" in lines[0]
        and "2 stages, 2 sources, 1 repeat" in lines[0]
    )
    assert "score 0.625" in lines[1] and "forgetting 0.250" in lines[2] and "a, b" in lines[3]
    assert "0.625" not in result._repr_html_() and "62.5" in result._repr_html_()
    for kind in ("seen", "sources", "costs", "balance"):
        path = result.plot(kind).save(tmp_path / f"{kind}.svg")
        root = xml.etree.ElementTree.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
    with pytest.raises(ConsilienceError, match="`kind`"):
        result.plot("pie")

    # Two results of one name, of which one has a stage without a score.
    other = replace(result, curve=[{"score": None, "macs": 1, "bytes": 0, "seconds": 0.1}])
    for kind in ("seen", "costs", "balance"):
        assert "ewc (2)" in report.plot([result, other], kind).svg
    with pytest.raises(ConsilienceError, match="learned at one stage"):
        ran([[0.0], [1.0], [1.0]], (None,)).plot("balance")
    with pytest.raises(ConsilienceError, match="same stages"):
        report.plot([result, ran([[0.0], [1.0]], (1,))])

    pandas = pytest.importorskip("pandas")
    frame = result.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and len(frame) == 3 * 2
    assert frame[(frame.stage == 2) & (frame.source == "s0")].score.item() == 0.25


def test_hasattr_is_false_for_what_a_result_does_not_have():
    """It raised a ConsilienceError, so that tools which look at attributes failed."""
    read = ran([[0.0], [1.0]], (1,), metric="mse", higher={"mse": False})
    assert not hasattr(read, "params") and not hasattr(read, "accuracy") and hasattr(read, "score")
    with pytest.raises(ConsilienceError, match="read from a folder"):
        _ = read.params


def test_a_page_has_its_contents_and_no_empty_column_or_tile(tmp_path):
    many = [
        make("ewc"),
        make("er"),
        make("fedavg", setting="federated", learned=False, costs={"macs": 5, "bytes": 0, "seconds": 1.0}),
    ]
    text, checker = checked(report.write(many, tmp_path / "x.html"))
    nav = text[text.index("<nav") : text.index("</nav>")]
    assert re.findall(r'href="(#[^"]*)"', nav) == ["#g0", "#r0", "#r1", "#g1", "#r2"]
    heads = [rows[0] for _, rows in checker.tables]
    assert ["method", "MACs", "bytes", "time"] in heads and ["method", "MACs", "time"] in heads
    assert "forward transfer" not in next(rows[0] for _, rows in checker.tables if rows[1][0] == "fedavg")
    assert "<dd>-</dd>" not in text and "<dd>0 B</dd>" not in text


def test_rounds_show_what_they_forget(tmp_path):
    """Two sources at three rounds each: .9 after one stage and .4 at the end, and none lost of the other."""
    R = [[0.1, 0.1], [0.9, 0.1], [0.8, 0.3], [0.4, 0.7]]
    result = ran(R, (None, None), setting="federated_continual")
    assert result.forgetting is None
    text, checker = checked(report.write([result], tmp_path / "x.html"))
    assert "s0: 50.0" in text and "Global forgetting" in text.replace("global", "Global")
    (sources,) = [rows for _, rows in checker.tables if rows[0][0] == "source"]
    assert [dict(zip(sources[0], row, strict=True))["forgetting"] for row in sources[1:]] == ["50.0", "-40.0"]


def test_the_table_of_sources_forgets_as_the_bars_and_the_result_do(tmp_path):
    """Each seed forgets from its own best stage: from the mean over seeds less would be lost. What is learned
    last has no forgetting."""
    R = np.array(
        [
            [[0.1, 0.1, 0.1], [0.9, 0.1, 0.1], [0.5, 0.8, 0.1], [0.4, 0.6, 0.9]],
            [[0.1, 0.1, 0.1], [0.5, 0.1, 0.1], [0.7, 0.9, 0.1], [0.4, 0.3, 0.8]],
        ]
    )
    result = replace(make(stages=3, sources=3, repeats=2), matrices=R, metrics={}, learned_at=(1, 2, 3))
    wanted = [(0.9 - 0.4 + 0.7 - 0.4) / 2, (0.8 - 0.6 + 0.9 - 0.3) / 2]
    assert result.forgetting == pytest.approx(np.mean(wanted))
    text, checker = checked(report.write([result], tmp_path / "x.html"))
    (rows,) = [rows for _, rows in checker.tables if rows[0][0] == "source"]
    found = [dict(zip(rows[0], row, strict=True))["forgetting"] for row in rows[1:]]
    assert found == [*(f"{100 * value:.1f}" for value in wanted), "-"]
    for source, value in zip(result.sources[:2], wanted, strict=True):
        assert f"<title>{source}: {100 * value:.1f}" in text


def test_lines_that_coincide_are_distinguished_and_say_their_values():
    axis = Axis(True, lambda v: f"{v:.2f}", lambda v, step: f"{v:.1f}")
    series = [("one", [0.1, 0.5, 0.9]), ("two", [0.1, 0.5, 0.9]), ("three", [0.1, 0.2, 0.3])]
    svg = lines_chart("label", ["start", "a", "b"], series, axis)
    assert "one = two" in svg and ">three<" in svg
    dashes = re.findall(r'class="l s\d strong" d="[^"]*"(?: stroke-dasharray="([^"]*)")?', svg)
    assert len(dashes) == 3 == len({*dashes})
    for name, values in series:
        for stage, value in zip(("start", "a", "b"), values, strict=True):
            assert f"<title>{name}, {stage}: {value:.2f}</title>" in svg


def test_names_are_never_cut(tmp_path):
    long = [f"the hospital of a town with a very long name, number {i}" for i in range(3)]
    result = replace(make(), sources=tuple(long), stages=tuple(f"{name} is next" for name in long))
    text, _ = checked(report.write([result, make("er")], tmp_path / "x.html"))
    assert "\u2026" not in text
    words = [" ".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg)) for svg in text.split("<svg")[1:]]
    assert any(all(name in " ".join(said.split()) for name in long) for said in words)


def test_hover_reads_cells_too_small_for_text(tmp_path):
    result = make(stages=60, sources=60)
    text, _ = checked(report.write([result], tmp_path / "x.html"))
    facts = json.loads(unescape(re.search(r'data-cells="([^"]*)"', text)[1]))
    assert facts["rows"][:2] == ["start", "stage 0"] and facts["names"] == list(result.sources)
    assert facts["values"][7][9] == f"{100 * result.matrix[7, 9]:.0f}"


def test_no_curve_has_two_points(tmp_path):
    """Runs of one stage, such as a merge, are a start and an end."""
    results = [make("average", stages=1, learned=False), make("ties", stages=1, learned=False)]
    text, checker = checked(report.write(results, tmp_path / "x.html"))
    labels = [svg["aria-label"].partition(":")[0] for svg in checker.svgs]
    assert "Line chart" not in labels and labels.count("Bar chart") == 2
    assert 'class="ring"' in text and 'class="trail' not in text


def test_significance_is_a_paired_t_test_with_holm_and_claims_nothing_for_one_seed(tmp_path):
    from scipy.stats import ttest_rel

    g = np.random.default_rng(0)

    def method(name, mean, repeats=4):
        return make(name, matrices=np.clip(mean + 0.05 * g.standard_normal((repeats, 4, 3)), 0, 1))

    results = [method("a", 0.5), method("bb", 0.8), method("ccc", 0.77)]
    found = differences(results)
    p = {i: ttest_rel(results[1].scores, results[i].scores).pvalue for i in (0, 2)}
    first, second = sorted(p, key=p.get)
    assert found[first].p == pytest.approx(2 * p[first])
    assert found[second].p == pytest.approx(max(2 * p[first], p[second]))
    assert found[0].behind == pytest.approx(results[1].score - results[0].score) and found[0].seeds == 4
    _, checker = checked(report.write(results, tmp_path / "x.html"))
    (rows,) = [rows for _, rows in checker.tables if "p" in rows[0]]
    assert [row[0] for row in rows[1:]] == ["a", "ccc"] and rows[1][-1] == "yes"
    assert {row[rows[0].index("seeds")] for row in rows[1:]} == {"4"}

    # One seed shows no spread, equal differences have none, and other seeds are no pairs.
    alone = [method("a", 0.5, 1), method("bb", 0.8, 1)]
    assert differences(alone) == {}
    text, _ = checked(report.write(alone, tmp_path / "y.html"))
    assert "With one seed per result nothing can be said about chance" in text
    same = make("a", matrices=np.full((3, 4, 3), 0.25)), make("bb", matrices=np.full((3, 4, 3), 0.5))
    assert np.isnan(differences(same)[0].p)
    assert differences([results[0], replace(results[1], seed=7)]) == {}


def test_the_upper_bound_bands_sizes_and_classes_are_shown(tmp_path):
    counts = np.array([[8, 2, 0], [1, 6, 3]])
    more = {
        "labels": (("d", "cat"), ("d", "<dog>")),
        "confusion": counts,
        "sizes": ((70, 5), (40, 8), (3, 7)),
    }
    results = [make("joint"), make("er", **more)]
    text, checker = checked(report.write(results, tmp_path / "x.html"))
    assert f"upper bound (joint, at the end): {100 * results[0].score:.1f} %" in text
    assert text.count('class="bs c') == 2
    tables = {rows[0][0]: rows for _, rows in checker.tables}
    assert tables["class"][1:] == [["cat", "10", "80.0", "<dog>"], ["<dog>", "10", "60.0", "no class"]]
    # Of the bars of training examples, and of the table of sources.
    assert "digits/0: 70" in text and tables["source"][1][1:3] == ["70", "5"]
    assert "cat, no class: 0.0 %" in text and "&lt;dog&gt;, no class: 30.0 %" in text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here to save the figures with")
def test_figures_are_saved_as_files_that_stand_alone(tmp_path):
    """The page's script, asked by a click, gives an SVG that parses and a PNG of the size of its canvas."""
    path = report.write([make()], tmp_path / "report.html")
    probe = """<script>const got=[];HTMLAnchorElement.prototype.click=function(){
    got.push(this.download,this.href);
    if(got.length===4)document.body.innerHTML="<pre id=got>"+got.join("\\n").replaceAll("<","&lt;")+"</pre>"};
    document.querySelectorAll("figure")[0].querySelectorAll("[data-save]").forEach(b=>b.dispatchEvent(
    new MouseEvent("click",{bubbles:true})))</script></body>"""
    path.write_text(path.read_text().replace("</body>", probe))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = ["chromium", *flags, "--virtual-time-budget=5000", "--dump-dom", path.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    lines = re.search(r'<pre id="got">(.*?)</pre>', dom, re.S)[1].split("\n")
    assert [lines[0].split(".")[1], lines[2].split(".")[1]] == ["svg", "png"]
    root = xml.etree.ElementTree.fromstring(unquote(unescape(lines[1])).partition(",")[2])
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert lines[3].startswith("data:image/png;base64,iVBOR") and len(lines[3]) > 2000
