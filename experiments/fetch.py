"""Fetches larger texts to train on: python -m experiments.fetch --names=gcide,anarchism --folder=DIR.

    python -m experiments.train --config.data=text --config.data_path=DIR/gcide

They are packages of Debian's, pinned by version and SHA-256, and their licences (GPL and others) lie beside
them as DIR/NAME.copyright.  What is there and whole is not fetched again.
"""

import dataclasses
import gzip
import hashlib
import re
import shutil
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments.harness.running import cli, files, packages
from jaxquant.artifacts.files import read_bytes, writing

FLAGS = flags.FLAGS
MIRROR = "https://deb.debian.org/debian"
_PIECE = 2**16  # bytes of a dictionary in one file, at least


@dataclasses.dataclass(frozen=True)
class Text:
    """Text in a package of Debian's.

    Attributes:
        package: its path on a mirror.
        sha256: of the package.
        folder: that has the text in it.
        suffix: what the names of the text's files end in, but for ``.gz``.
        digest: of the text, as of `digest_of`.
        convert: from a file's name and content to the files that are written.
    """

    package: str
    sha256: str
    folder: str
    suffix: str
    digest: str
    convert: Callable[[str, bytes], Iterable[tuple[str, bytes]]] = lambda *file: [file]


def entries(name: str, dictionary: bytes) -> Iterator[tuple[str, bytes]]:
    r"""Cuts a dictionary of dictd's between entries into files; its few bytes of Windows-1252 become UTF-8.

    >>> [*entries("d.dict.dz", b"Ace\n   A card.\n\nBox\n   It\x92s a case.\n")]
    [('d_0000.txt', b'Ace\n   A card.\n\nBox\n   It\xe2\x80\x99s a case.\n')]
    """
    text = dictionary.decode("utf-8", "surrogateescape")
    text = re.sub("[\udc80-\udcff]", lambda x: bytes([ord(x[0]) - 0xDC00]).decode("cp1252"), text)
    stem, _, _ = name.partition(".")
    parts, size, count = list[bytes](), 0, 0
    for entry in re.split(r"(?<=\n\n)(?=\S)", text):
        parts.append(entry.encode())
        size += len(parts[-1])
        if size >= _PIECE:
            yield f"{stem}_{count:04}.txt", b"".join(parts)
            parts, size, count = [], 0, count + 1
    if parts:
        yield f"{stem}_{count:04}.txt", b"".join(parts)


TEXTS = {
    # The Collaborative International Dictionary of English.
    "gcide": Text(
        "pool/main/d/dict-gcide/dict-gcide_0.48.5+nmu2_all.deb",
        "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
        "usr/share/dictd",
        ".dict.dz",
        "fbfb9eccc3b00c03f149d7f497d055fcde6eec395bafd0ea69826bb14755b2d7",
        entries,
    ),
    # An Anarchist FAQ, in Markdown.
    "anarchism": Text(
        "pool/main/a/anarchism/anarchism_15.3-3_all.deb",
        "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
        "usr/share/doc/anarchism/markdown",
        ".md",
        "04f154e127df94c16f4e346e6db4e18aba25308ef378ca02e675ad4938082625",
    ),
    # Linux's documentation, in reStructuredText.
    "linux-doc": Text(
        "pool/main/l/linux/linux-doc-6.1_6.1.176-1_all.deb",
        "0d843674607703b9ef8c1db5e715c38ed52ff23574feabfe0d961d552126859f",
        "usr/share/doc/linux-doc-6.1/Documentation",
        ".rst",
        "8b44a141bb8c5a48df23979fa4ee1fba8495ad8824292e87e719c953622d7e5a",
    ),
    # Perl's, in Pod.
    "perl-doc": Text(
        "pool/main/p/perl/perl-doc_5.36.0-7+deb12u3_all.deb",
        "e9e3564ff5ade27de0585835f2acad769bcc545c0a0045a9f55d5401f27f7591",
        "usr/share/perl/5.36.0/pod",
        ".pod",
        "10a36feb65ee7893714058c32628d9f4c46fbfed7e1f32c1b677e98385a95659",
    ),
}


def fetch(names: Sequence[str], folder: str | Path, mirror: str = MIRROR) -> dict[str, Path]:
    """Fetches texts that are not there yet, as UTF-8 files.

    Args:
        names: of `TEXTS`.
        folder: where to; each has a folder of its own in it.
        mirror: of Debian's packages, as its address or ``file://``.

    Returns:
        Their folders, for ``data=text``.

    Raises:
        ValueError: unknown names, something else in a text's place, or a package that is not the pinned one.
        RuntimeError: the mirror cannot be reached.
    """
    unknown = [name for name in names if name not in TEXTS]
    if unknown or not names:
        raise ValueError(
            f"--names are among {', '.join(TEXTS)}; got {', '.join(unknown) or 'none'}"
        )
    if "://" not in mirror:
        raise ValueError(f"--mirror is an address, as {MIRROR} or file:///media; got {mirror!r}")
    folder = Path(folder)
    with files.alone(folder):
        return {name: _fetched(TEXTS[name], folder / name, mirror) for name in names}


def _fetched(text: Text, target: Path, mirror: str) -> Path:
    if target.exists():
        if digest_of(target) != text.digest:
            raise ValueError(
                f"'{target}' is not the text of that name: delete it, or choose another --folder"
            )
        return target
    url = f"{mirror.rstrip('/')}/{urllib.parse.quote(text.package)}"
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name, content in packages.contents(packages.fetch(url, text.sha256)):
        if name.startswith("usr/share/doc/") and name.endswith("/copyright"):
            files.write(target.with_name(f"{target.name}.copyright"), content)
        for path, part in _converted(text, name, content):
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            with writing(target):
                (partial / path).write_bytes(part)
    if digest_of(partial) != text.digest:
        raise ValueError(f"{url} does not give the text that it should: {digest_of(partial)}")
    partial.rename(target)
    return target


def _converted(text: Text, name: str, content: bytes) -> Iterable[tuple[str, bytes]]:
    """(path, content) of the files that a package's file becomes: none where it is not of the text."""
    plain = name.removesuffix(".gz")
    if not name.startswith(f"{text.folder}/") or not plain.endswith(text.suffix):
        return []
    is_packed = content.startswith(b"\x1f\x8b")
    return text.convert(
        plain.removeprefix(f"{text.folder}/"), gzip.decompress(content) if is_packed else content
    )


def digest_of(folder: Path) -> str:
    """The SHA-256 of a folder's files, by name; empty files count."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = read_bytes(path)
        digest.update(f"{path.relative_to(folder).as_posix()}:{len(content)}:".encode() + content)
    return digest.hexdigest()


def main(_: Any) -> None:
    for name, path in fetch(FLAGS.names, FLAGS.folder, FLAGS.mirror).items():
        size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
        print(f"{name}: {size / 1e6:.1f} MB in {path}")


@dataclasses.dataclass
class _Config:
    """There are flags alone."""


if __name__ == "__main__":
    flags.DEFINE_list("names", [*TEXTS], f"What to fetch: {', '.join(TEXTS)}.")
    flags.DEFINE_string("folder", "corpora", "Where to.")
    flags.DEFINE_string("mirror", MIRROR, "A mirror of Debian's packages.")
    cli.main(main, {"fetch": _Config()}, default="fetch")
