"""Debian's packages, fetched from a mirror, verified and read, without apt and without root."""

import hashlib
import http.client
import io
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

from jaxquant.artifacts.files import Missing, read_bytes

_WAITS = (1.0, 4.0)  # seconds before another attempt
_LARGEST = 2**30  # bytes of a package, at most
_LOST = (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException)


def fetch(url: str, sha256: str) -> bytes:
    """Returns a package, if it is the pinned one; a connection that fails is tried again twice.

    Args:
        url: of the package on any mirror; also ``file://``.
        sha256: of it.

    Raises:
        ValueError: it is not there, or what came is not the pinned package.
        RuntimeError: the mirror cannot be reached.
    """
    package = _read(url)
    found = hashlib.sha256(package).hexdigest()
    if found != sha256:
        raise ValueError(f"{url} has SHA-256 {found}; expected {sha256}")
    return package


def _read(url: str) -> bytes:
    if url.startswith("file:"):
        path = urllib.request.url2pathname(urllib.parse.urlsplit(url).path)
        try:
            return read_bytes(path, _LARGEST, url)
        except Missing:
            raise ValueError(f"{url} is not there") from None
    for wait in (*_WAITS, None):
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                package = response.read(_LARGEST + 1)
            if len(package) > _LARGEST:
                raise ValueError(f"{url} has more than {_LARGEST:,} bytes, which no package has")
            return package
        except _LOST as error:
            reason = getattr(error, "reason", None) or str(error) or type(error).__name__
            code = getattr(error, "code", 0)
            if isinstance(reason, FileNotFoundError) or 400 <= code < 500:
                raise ValueError(f"{url} is not there: {reason}") from None
            if wait is None:
                raise RuntimeError(f"{url} cannot be fetched: {reason}") from None
            time.sleep(wait)
    raise AssertionError


def contents(package: bytes) -> Iterator[tuple[str, bytes]]:
    """Returns (path, content) of each file that a package installs; paths have no slash in front.

    Raises:
        ValueError: it is no package.
    """
    with tarfile.open(fileobj=io.BytesIO(_ar_member(package, "data.tar"))) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            if file is not None:
                yield member.name.removeprefix("./"), file.read()


def _ar_member(archive: bytes, prefix: str) -> bytes:
    """Returns the first member of an ar archive whose name begins so: 60 bytes of header, padded to even."""
    at = len(b"!<arch>\n")
    while at < len(archive):
        name, size = archive[at : at + 16].decode("ascii"), int(archive[at + 48 : at + 58])
        if name.startswith(prefix):
            return archive[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise ValueError(f"the archive has no member {prefix}*")
