import itertools
import json
import shutil
import subprocess
import time

import altair as alt
import pandas as pd
import pytest
from conftest import ROOT

from experiments.harness.reporting import findings, prose, provenance, report
from experiments.harness.reporting.charts import Axis, Scale, labelled_lines
from experiments.harness.reporting.findings import UNRESOLVED, Finding, Published
from experiments.harness.reporting.layout import Figure, Report, Section

pytestmark = pytest.mark.exhaustive  # looks at our studies, not at versions of others

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
DRIVER = shutil.which("chromedriver")


def chart(title):
    data = pd.DataFrame({"x": [1, 2], "y": [1, 4], "kind": ["</script>", "b"]})
    return alt.Chart(data, title=title).mark_line().encode(x="x:Q", y="y:Q", color="kind:N")


KUMAR = Published(0.507, 0.507, "Kumar <et al.>", "steeper than", "flatter than")
SOURCE = provenance.Source(
    "study", "Is it so?", ("2411.04330 (Scaling & Laws)",), "python -m experiments.study"
)


@pytest.fixture
def page(tmp_path):
    figure = Figure("lines", "Two lines", "A <caption> & more.", [chart("one"), chart("two")])
    table = pd.DataFrame({"a & b": ["<1>"]})
    section = Section(
        "Part </title>", ["Text."], [("A table", table)], [figure], [("Folded", table)]
    )
    found = [Finding("Is <it> so?", "γ", "yes", 0.66, 0.56, 0.76, published=KUMAR)]
    made = Report("Title <b>", found, [section], {"x": 1}, ["1 of 2 & so on."], SOURCE)
    report.write(tmp_path, made)
    return tmp_path


def test_everything_is_written(page):
    summary = json.loads((page / "summary.json").read_text())
    assert summary["x"] == 1
    (finding,) = summary["findings"]
    assert (finding["answer"], finding["against"], finding["low"]) == ("yes", "above", 0.56)
    assert finding["published"]["low"] == 0.507
    assert (page / "figures" / "lines.svg").read_text().startswith("<svg")
    assert (page / "figures" / "lines.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_says_where_it_comes_from(page):
    html = (page / "report.html").read_text()
    link = '<a href="https://arxiv.org/abs/2411.04330">Scaling &amp; Laws, arXiv 2411.04330</a>'
    assert link in html
    assert "<code>python -m experiments.study</code>" in html
    assert provenance.today() in html
    assert '<a href="summary.json">' in html


def head_of(folder, command, seeds, finding):
    source = provenance.Source("study", "Is it so?", (), command, seeds)
    report.write(folder, Report("Title", [finding], [], {}, source=source))
    return (folder / "report.html").read_text()


def test_the_head_states_intervals_seeds_and_smoke_runs(tmp_path):
    found = Finding("Is it so?", "γ", "yes", 0.66, 0.56, 0.76)
    command = "python -m experiments.study --preset={} --workdir=DIR"
    html = head_of(tmp_path, command.format("smoke"), (3, 3), found)
    assert "Intervals are at 90 %. 3 seeds per setting." in html
    assert "A smoke run: nothing can be concluded from it." in html
    assert "Papers" not in html
    html = head_of(tmp_path, command.format("laptop"), (1, 3), Finding("Is it so?", "γ", "yes"))
    assert "1 to 3 seeds per setting." in html
    assert "Intervals" not in html
    assert "A smoke run" not in html
    assert "per setting" not in head_of(tmp_path, command.format("laptop"), None, found)


@pytest.mark.parametrize("changed", [False, True])
def test_changes_that_are_not_committed_are_said(tmp_path, monkeypatch, changed):
    monkeypatch.setattr(provenance, "commit", lambda: "a" * 40)
    monkeypatch.setattr(provenance, "has_changes", lambda: changed)
    report.write(tmp_path, Report("Title", [], [], {}))
    html = (tmp_path / "report.html").read_text()
    assert ("with changes that are not committed" in html) is changed


def test_changes_are_those_of_tracked_files(tmp_path, monkeypatch):
    def git(*words):
        name = ("-c", "user.name=x", "-c", "user.email=x@example.com")
        subprocess.run(["git", *name, *words], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(provenance, "_HERE", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert (provenance.commit(), provenance.has_changes()) == ("", False)
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    (tmp_path / "run").write_text("untracked")
    assert not provenance.has_changes()
    (tmp_path / "file").write_text("two")
    assert provenance.has_changes()


def test_a_finding_is_written_alike_on_the_page_and_on_a_terminal(page):
    html = (page / "report.html").read_text()
    assert "Steeper than the published 0.507 (Kumar &lt;et al.&gt;)" in html
    finding = Finding("Is it so?", "γ", "yes", 0.66, 0.56, 0.76, published=KUMAR)
    assert findings.to_text([finding], ["1 of 2."]).splitlines() == [
        "1 of 2.",
        "Is it so? Yes.",
        "  γ: yes, 0.66 [0.56, 0.76]; steeper than the published 0.507 (Kumar <et al.>)",
    ]


@pytest.mark.parametrize(
    ("low", "high", "published", "expected"),
    [
        (0.52, 0.7, KUMAR, "above"),
        (0.2, 0.4, KUMAR, "below"),
        (0.4, 0.6, KUMAR, "agrees"),
        (-0.1, 0.6, KUMAR, UNRESOLVED),  # neither the published value nor none is excluded
        (None, None, KUMAR, UNRESOLVED),
        (6.9, 7.8, Published(7, 8, "x", tolerance=0.5), "agrees"),
        (4.0, 7.8, Published(7, 8, "x", tolerance=0.5), UNRESOLVED),
        (4.0, 6.0, Published(7, 8, "x", tolerance=0.5), "below"),
        (0.4, 0.6, None, ""),
    ],
)
def test_an_interval_stands_to_what_is_published(low, high, published, expected):
    assert Finding("?", "γ", "", 0.5, low, high, published=published).against == expected


def test_what_is_unresolved_says_what_could_have_been_shown():
    row = {"mean": 0.1, "low": -0.2, "high": 0.4}
    found = findings.from_mean("?", "gain", row, "better", "worse", unit="nats")
    assert (found.answer, found.least_effect) == (UNRESOLVED, pytest.approx(0.3))
    assert "the least effect that these runs could show is 0.30 nats" in findings.sentence(found)
    resolved = findings.from_mean("?", "gain", row | {"low": 0.01}, "better", "worse")
    assert (resolved.answer, resolved.power_text()) == ("better", "")
    single = findings.from_mean("?", "gain", row | {"low": None}, "better", "worse")
    assert (single.answer, single.least_effect) == (UNRESOLVED, None)


def test_labels_at_the_ends_of_lines_are_not_written_over_each_other():
    table = pd.DataFrame(
        {"x": [1, 2] * 3, "y": [0.0, 1.0, 0.0, 1.001, 0.0, 0.5], "kind": list("aabbcc")}
    )
    drawn = labelled_lines(
        table, None, Axis("x", "x"), Axis("y", "y"), "kind", Scale.of("kind", table["kind"])
    )
    ends = next(rows for rows in drawn.to_dict()["datasets"].values() if "label" in rows[0])
    heights = sorted(row["y"] for row in ends)
    assert min(b - a for a, b in itertools.pairwise(heights)) > 0.05


@pytest.mark.parametrize(
    "name",
    [
        *("benchmark", "gradient_precision", "optimizer_states"),
        *("pretrained_quantization", "ptq_overtraining"),
        *("qat_efficiency", "training_precision"),
    ],
)
def test_every_study_has_method_text_beside_it(name):
    text = prose.read(str(ROOT / "experiments" / name / "report.py"))
    assert text["Measured"]
    assert all(paragraphs for paragraphs in text.values())


def test_text_is_escaped_and_nothing_is_fetched(page):
    html = (page / "report.html").read_text()
    assert "<title>Title &lt;b&gt;</title>" in html
    assert "Is &lt;it&gt; so?" in html
    assert "A &lt;caption&gt; &amp; more." in html
    assert "&lt;1&gt;" in html
    for tag in ("<script src", '<link rel="stylesheet"', '<img src="http', "@import"):
        assert tag not in html


def open_page(path, width):
    """The page in headless Chromium without a network: what it logged, and what it drew."""
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(path.as_uri())
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            drawn, panels = browser.execute_script(
                "return [window.drawn, document.querySelectorAll('.panel').length]"
            )
            if drawn == panels:
                break
            time.sleep(0.1)
        boxes = browser.execute_script(
            """return [...document.querySelectorAll('.panel svg')].map(svg => {
              const box = svg.getBoundingClientRect();
              const marks = svg.querySelectorAll('.mark-line path, .mark-symbol path').length;
              return [box.left, box.right, box.height, marks];
            })"""
        )
        overflow = browser.execute_script("return document.documentElement.scrollWidth")
        fetched = browser.execute_script(
            "return performance.getEntriesByType('resource').map(e => e.name)"
            ".filter(name => !name.startsWith('data:'))"
        )
        return {
            "log": browser.get_log("browser"), "drawn": drawn, "panels": panels, "boxes": boxes,
            "page_width": overflow, "fetched": fetched,
        }  # fmt: skip
    finally:
        browser.quit()


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium and ChromeDriver installed")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_smoke_report_is_drawn_whole_in_a_browser(smoke, width):
    seen = open_page(smoke.workdir / "report.html", width)
    assert seen["log"] == []
    assert seen["fetched"] == []
    assert seen["drawn"] == seen["panels"] == len(seen["boxes"]) > 4
    assert seen["page_width"] <= width
    for left, right, height, marks in seen["boxes"]:
        assert 0 <= left < right <= width
        assert right - left > 0.7 * min(width, 400)
        assert height > 150
        assert marks > 0
