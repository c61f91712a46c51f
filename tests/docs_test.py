"""The pages in docs/: their Python runs, the reference is whole, and words are the field's own."""

import re
import types

import pytest
from conftest import ROOT

import jaxquant as jq
from experiments.harness.reporting import markdown

PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
WITH_PYTHON = [page for page in PAGES if BLOCK.search(page.read_text())]
REFERENCE = {
    name: module for name, module in vars(jq).items() if isinstance(module, types.ModuleType)
}
# Words that have a plain one in the field: sensitivity, split, models.
PRIVATE = [
    "felt",
    "ahead",
    "laid",
    "cutting",
    "spans",
    "claiming",
    "guarding",
    "lineage",
    "subjects",
    "ledger",
    "contests?",
    "sees_all",
    "describe_operation",
    "operation_from",
]
CODE = re.compile(r"```.*?```|`[^`\n]+`|\]\([^)]*\)", re.DOTALL)


def name_of(page):
    return str(page.relative_to(ROOT / "docs"))


@pytest.mark.first(1)
@pytest.mark.usefixtures("as_users_compute")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_a_pages_python_runs(page):
    source = "\n".join(BLOCK.findall(page.read_text()))
    exec(compile(source, str(page), "exec"), {"__name__": page.stem})


def test_the_guides_have_python_that_runs():
    guides = "getting_started quantize recipes training optimizer_state ptq qlora laws numerics"
    assert {f"{name}.md" for name in guides.split()} <= set(map(name_of, WITH_PYTHON))


def public(module):
    """A module's public names: those that it lists, or those that it defines."""
    own = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return getattr(module, "__all__", own)


@pytest.mark.parametrize("name", ["", *(name for name in jq.__all__ if name in REFERENCE)])
def test_the_reference_has_every_public_name(name):
    module = REFERENCE[name] if name else jq
    page = (ROOT / "docs" / "api" / f"{name or 'quantizers'}.md").read_text()
    described = set(
        re.findall(rf"^\.\. auto\w+:: {re.escape(module.__name__)}\.(\w+)$", page, re.M)
    )
    # Constants and modules are rows of tables, or in a list in code font.
    written = set(re.findall(r"`(\w+)`", page))
    of_use = set(public(module))
    assert of_use
    assert of_use <= described | written, sorted(of_use - described - written)
    assert described <= of_use, sorted(described - of_use)
    callables = {n for n in of_use if isinstance(getattr(module, n), types.FunctionType | type)}
    elsewhere = set(public(jq.formats)) if not name else set()
    assert callables - elsewhere <= described, sorted(callables - elsewhere - described)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "SECURITY.md", *PAGES], ids=lambda p: p.name
)
def test_words_are_the_fields_own(page):
    prose = CODE.sub(" ", page.read_text())
    found = re.findall(rf"\b(?:{'|'.join(PRIVATE)}|leaves it be)\b", prose, re.IGNORECASE)
    assert not found, found


def intervals_in(page):
    return markdown.intervals(page.read_text())


def test_what_studies_found_is_the_same_everywhere():
    found = {page.name: intervals_in(page) for page in PAGES if page.parent.name == "studies"}
    pages, records = set().union(*found.values()), intervals_in(ROOT / "experiments" / "README.md")
    assert len(records) > 90
    assert records <= pages, sorted(records - pages)
    assert intervals_in(ROOT / "README.md") <= pages
    assert pages - records <= found["index.md"], sorted(pages - records)


def test_links_between_pages_lead_somewhere():
    written = ["README.md", "SECURITY.md", "CONTRIBUTING.md", "experiments/README.md"]
    for page in [*(ROOT / name for name in written), *PAGES]:
        text = page.read_text()
        own = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
        kept = re.findall(
            r"github\.com/jaxquant/jaxquant/(?:blob|tree)/main/([\w./-]+)|"
            r"colab\.research\.google\.com/github/jaxquant/jaxquant/blob/main/([\w./-]+)",
            text,
        )
        places = [page.parent / link for link in own] + [ROOT / (a or b) for a, b in kept]
        assert [str(place) for place in places if not place.exists()] == []
