"""How Sphinx builds these pages: `sphinx-build -W -q docs docs/_build`.

Nothing is fetched and no notebook runs, so that a build needs no network and takes a minute.  Notebooks are
shown with the outputs that they have in colab/, to which docs/notebooks is a link.
"""

import os
import re
import types

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jaxquant

project = "jaxquant"
author = "The jaxquant authors"
copyright = "2026, the jaxquant authors"
version = release = jaxquant.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]

# A name in single backquotes links to what it names, and is set as code either way.
default_role = "py:obj"
add_module_names = False
python_maximum_signature_line_length = 88
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_default_options = {"members": True}
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_custom_sections = [("Attributes", "params_style")]

html_theme = "sphinx_book_theme"
html_title = "jaxquant"
html_static_path = ["_static"]
html_css_files = ["jaxquant.css"]
html_copy_source = False
html_theme_options = {
    "repository_url": "https://github.com/jaxquant/jaxquant",
    "repository_branch": "main",
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_issues_button": True,
    "navbar_persistent": [],
    "show_navbar_depth": 1,
    "show_toc_level": 2,
}


# Docstrings are plain text with code in backquotes.  These parts of one stay as they are.
_KEPT = re.compile(
    r"^ *>>>.*\n?(?:[ ]*\S.*\n?)*|^ *\* |``[^`]+``|`[^`]+`|(?<![\w*])\*[A-Za-z][\w -]*\*(?![\w*])",
    re.MULTILINE,
)
_RETURNS = re.compile(r"^Returns:\n((?:    .*\n?)+)", re.MULTILINE)


def _as_rst(app, what, name, obj, options, lines):
    """Marks that mean something to reStructuredText are escaped, and plurals of code are let stand."""
    text, found, at = _RETURNS.sub(_returned, "\n".join(lines)), [], 0
    for kept in _KEPT.finditer(text):
        found += [_escaped(text[at : kept.start()]), kept.group()]
        if kept.group().endswith("`") and re.match(r"\w", text[kept.end() :]):
            found.append("\\ ")
        at = kept.end()
    lines[:] = "".join([*found, _escaped(text[at:])]).split("\n")
    if what in ("property", "attribute"):
        lines.insert(0, "\\ ")  # or napoleon takes what is before a colon for a type


def _returned(section):
    """A section of returns as a field; napoleon would take what is before a colon for a type."""
    return ":returns: " + section.group(1).strip().replace("\n", "\n   ") + "\n"


def _escaped(text):
    return re.sub(r"([*|])", r"\\\1", text)


def _skip_plain_fields(app, what, name, obj, skip, options):
    """A named tuple's fields, and those whose default is a function: the class's docstring has them."""
    is_plain = (getattr(obj, "__doc__", None) or "").startswith("Alias for field number")
    is_default = isinstance(obj, types.FunctionType) and "." not in obj.__qualname__
    return True if is_plain or is_default else skip


def setup(app):
    app.connect("autodoc-skip-member", _skip_plain_fields)
    app.connect("autodoc-process-docstring", _as_rst, priority=400)  # before napoleon
