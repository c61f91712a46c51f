import json
import shutil
import time

import altair as alt
import pandas as pd
import pytest

from experiments.harness.reporting import report

pytestmark = pytest.mark.exhaustive  # looks at our studies, not at versions of others

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
DRIVER = shutil.which("chromedriver")


def chart(title):
    data = pd.DataFrame({"x": [1, 2], "y": [1, 4], "kind": ["</script>", "b"]})
    return alt.Chart(data, title=title).mark_line().encode(x="x:Q", y="y:Q", color="kind:N")


@pytest.fixture
def page(tmp_path):
    figure = report.Figure(
        "lines", "Two lines", "A <caption> & more.", [chart("one"), chart("two")]
    )
    table = pd.DataFrame({"a & b": ["<1>"]})
    section = report.Section("Part </title>", ["Text."], [("A table", table)], [figure])
    report.write(tmp_path, "Title <b>", "Lead & so on.", [section], {"x": 1})
    return tmp_path


def test_everything_is_written(page):
    assert json.loads((page / "summary.json").read_text()) == {"x": 1}
    assert (page / "figures" / "lines.svg").read_text().startswith("<svg")
    assert (page / "figures" / "lines.png").read_bytes().startswith(b"\x89PNG")


def test_text_is_escaped_and_nothing_is_fetched(page):
    html = (page / "report.html").read_text()
    assert "<title>Title &lt;b&gt;</title>" in html
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
