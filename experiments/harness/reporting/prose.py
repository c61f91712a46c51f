"""Method text: read from ``method.md`` beside a study, and written as HTML.

Of Markdown it knows headings of level 2, paragraphs, ``code``, **bold** and [links](https://...).
"""

import html
import re
from pathlib import Path


def read(study_file: str) -> dict[str, list[str]]:
    """Paragraphs of the ``method.md`` beside a module, by heading.

    Args:
        study_file: ``__file__`` of the module.
    """
    text = (Path(study_file).parent / "method.md").read_text(encoding="utf-8")
    parts = re.split(r"^## +(.+)$", text, flags=re.MULTILINE)
    return {
        title.strip(): paragraphs(body)
        for title, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def paragraphs(text: str) -> list[str]:
    """Text between empty lines, each on one line.

    >>> paragraphs("One\\nand one.\\n\\nTwo.")
    ['One and one.', 'Two.']
    """
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def to_html(text: str) -> str:
    """One paragraph's content.

    >>> to_html("See [a < b](https://arxiv.org/abs/1), `x`.")
    'See <a href="https://arxiv.org/abs/1">a &lt; b</a>, <code>x</code>.'
    """
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"\[([^\]]+)\]\((https://[^)\s\"]+)\)", r'<a href="\2">\1</a>', text)
