"""A folder of versions of a model: published whole, judged, withdrawn, and gone back from in one call.

    root/0001/model            what was saved: a folder or a file
    root/0001/version.json     its name, its card, its verdict, and SHA-256 of every file
    root/0001/withdrawn.json   why it no longer serves, where it does not

Published files never change.  What serves is the latest version that passed its gate, was not withdrawn and
is whole.  A folder without version.json is no version, whatever its name.  One that is damaged, or a copy of
another, does not serve, and keeps none of the others from it.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax import nnx

from jaxquant.artifacts import files
from jaxquant.artifacts.cards import Card, versions_now
from jaxquant.artifacts.checksums import check_digests, digests, read_checked, with_checksum
from jaxquant.artifacts.folders import load_card, move_into_place, temporary_folder
from jaxquant.nnx import saving
from jaxquant.quality.gates import Check, Verdict

VERSION = 2
_WITHOUT_NAME = 1  # the version of records before they held their name
_KIND = "jaxquant published version"
_NAME = re.compile(r"[0-9]{4,}")
_MODEL, _RECORD, _WITHDRAWN = "model", "version.json", "withdrawn.json"


@dataclasses.dataclass(frozen=True)
class Versions:
    """The versions in a folder.

    Any number of processes, on one file system, may publish, withdraw and read at a time.

    Args:
        root: the folder; made when something is published.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     versions = Versions(root)
    ...     for text in ("first", "second"):
    ...         name = versions.publish(
    ...             lambda path: path.write_text(text), Card.empty(), Verdict("pass", "99", ())
    ...         )
    ...     versions.latest_passing(), versions.roll_back("answers in the wrong language")
    ('0002', '0001')
    """

    root: Path

    def __post_init__(self):
        object.__setattr__(self, "root", Path(self.root))

    def publish(
        self, model: nnx.Module | Callable[[Path], Any], card: Card, verdict: Verdict | None
    ) -> str:
        """Writes a new version, which appears when it is whole.

        Args:
            model: a frozen NNX model, or a function that writes one to the path that it is given, as a
                folder or as a file.
            card: what it is; it gets the verdict.
            verdict: of `jaxquant.quality.gate`; with None, or one that is not a pass, it does not serve.

        Returns:
            Its name: "0001", "0002" …

        Raises:
            ValueError: a function that writes nothing, or what is neither file nor folder; no card, or one
                with another verdict.
            OSError: it cannot be written; nothing of it stays.
        """
        if not isinstance(model, nnx.Module) and not callable(model):
            raise ValueError(f"model is a frozen NNX model or a function of a path; got {model!r}")
        if not isinstance(card, Card):
            raise ValueError(f"card is a Card, such as Card.empty(); got {card!r}")
        if verdict is not None and not isinstance(verdict, Verdict):
            raise ValueError(f"verdict is a Verdict or None; got {verdict!r}")
        judged = dataclasses.replace(card, verdict=verdict)
        if card.verdict not in (None, judged.verdict):
            raise ValueError("the card has another verdict than the one it is published with")
        with temporary_folder(self.root) as temporary, files.writing(self.root):
            path = temporary / _MODEL
            if isinstance(model, nnx.Module):
                saving.save(path, model, judged)
                judged = load_card(path)
            else:
                model(path)
                judged = dataclasses.replace(judged, versions=versions_now())
            body = {"card": judged.to_dict(), "files": digests(temporary)}
            if not body["files"]:
                raise ValueError(f"{model!r} wrote nothing to the path that it was given")
            number = 1 + max((int(name) for name in self.names()), default=0)
            while not self._publish(temporary, f"{number:04}", body):
                number += 1  # another process was first
        return f"{number:04}"

    def _publish(self, temporary: Path, name: str, body: dict[str, Any]) -> bool:
        record = with_checksum(_KIND, VERSION, {"name": name, **body})
        files.write(temporary / _RECORD, record)
        return move_into_place(temporary, self.root / name)

    def names(self) -> tuple[str, ...]:
        """Returns all versions, the earliest first; other folders with a numeric name are skipped."""
        named = self._numbered()
        return tuple(name for name in named if os.path.lexists(self.root / name / _RECORD))

    def path(self, name: str) -> Path:
        """Returns the folder of a version's model.

        Raises:
            ValueError: no such version.
        """
        return self._folder(name) / _MODEL

    def card(self, name: str) -> Card:
        """Returns a version's card.

        Raises:
            ValueError: no such version, or one whose record is damaged.
        """
        return Card.from_dict(self._record(name).get("card", {}))

    def verdict(self, name: str) -> Verdict | None:
        """Returns a version's verdict, None where it was not judged.

        Raises:
            ValueError: as `card`.
        """
        fields = self.card(name).verdict
        if fields is None:
            return None
        try:
            checks = tuple(Check(**check) for check in fields["checks"])
            return Verdict(fields["status"], fields["tier"], checks)
        except (KeyError, TypeError) as error:
            raise ValueError(f"the verdict of {name} is none of a gate: {error!r}") from None

    def withdraw(self, name: str, reason: str) -> None:
        """Withdraws a version for good.

        Raises:
            ValueError: no such version, no reason, or one that was withdrawn before.
            OSError: it cannot be written; the version is then not withdrawn.
        """
        if not isinstance(reason, str) or not reason.strip():
            raise ValueError(f"withdrawing takes a reason in words; got {reason!r}")
        path = self._folder(name) / _WITHDRAWN
        try:
            # Created by one process only; that it is there is what counts, were its writer to die now.
            file = open(path, "x", encoding="utf-8")  # noqa: SIM115
        except FileExistsError:
            raise ValueError(f"{name} is withdrawn already: {self.withdrawn(name)}") from None
        try:
            with files.writing(path), file:
                file.write(json.dumps({"reason": reason}))
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)
            raise

    def withdrawn(self, name: str) -> str | None:
        """Returns why a version was withdrawn; None if it was not.

        Raises:
            ValueError: no such version.
        """
        try:
            return str(files.read_json(self._folder(name) / _WITHDRAWN)["reason"])
        except files.Missing:
            return None
        except (ValueError, KeyError, TypeError):
            return "for a reason that cannot be read"

    def problem(self, name: str) -> str | None:
        """Returns why a version cannot serve; None if it can.  Reads all of its files.

        Raises:
            ValueError: no such version.
        """
        if (reason := self.withdrawn(name)) is not None:
            return f"withdrawn: {reason}"
        try:
            verdict = self.verdict(name)
            if verdict is None:
                return "not judged"
            if not verdict:
                return f"judged {verdict.status!r}"
            check_digests(self._folder(name), self._record(name).get("files"), (_MODEL,))
        except (ValueError, KeyError, TypeError, OSError) as error:
            return f"damaged: {error}"
        return None

    def latest_passing(self) -> str:
        """Returns the version that serves: the latest without a `problem`.

        Raises:
            ValueError: there is none; it says what is wrong with each.
        """
        problems = []
        for name in reversed(self.names()):
            if (problem := self.problem(name)) is None:
                return name
            problems.append(f"{name} is {problem}")
        others = [name for name in self._numbered() if name not in self.names()]
        problems += [f"{name} is no version, since it has no {_RECORD}" for name in others]
        raise ValueError(
            f"{self.root} has no version to serve: {'; '.join(problems) or 'nothing is published'}"
        )

    def roll_back(self, reason: str) -> str:
        """Withdraws the serving version.

        Args:
            reason: why, in words.

        Returns:
            The version that serves now, the one before.

        Raises:
            ValueError: none serves; there is none before it to serve, and then it is not withdrawn; another
                process has just withdrawn it.
        """
        serving = self.latest_passing()
        before = [name for name in self.names() if int(name) < int(serving)]
        if all(self.problem(name) is not None for name in before):
            raise ValueError(f"{serving} serves on: there is no version before it to go back to")
        self.withdraw(serving, reason)
        return self.latest_passing()

    def _numbered(self) -> list[str]:
        """Returns the paths that are named as versions, by number."""
        if not self.root.is_dir():
            return []
        return sorted(filter(_NAME.fullmatch, os.listdir(self.root)), key=int)

    def _folder(self, name: str) -> Path:
        if name not in self.names():
            hint = f", since that has no {_RECORD}" if name in self._numbered() else ""
            raise ValueError(
                f"{self.root} has no version {name!r}{hint}; it has {', '.join(self.names()) or 'none'}"
            )
        return self.root / name

    def _record(self, name: str) -> dict[str, Any]:
        path = self._folder(name) / _RECORD
        record = read_checked(path, _KIND, VERSION, _WITHOUT_NAME)
        if record["version"] != _WITHOUT_NAME and record.get("name") != name:
            raise ValueError(f"{path} is the record of {record.get('name')!r}, not of {name!r}")
        return record
