r"""Regular expressions of files, matched within a bound: Python's own can take 2^n steps for n letters.

A node of the expression gives, for some places in the text, those where it can end; within repetitions each
is found once, so that the time grows as nodes · letters².  This matches what `re.fullmatch` matches, for
expressions of letters, classes, escapes, groups, ``|``, repetitions, lookahead, and flags at the front.
Others are refused: back references, lookbehind, conditions, atomic groups, possessive repetitions.
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import NoReturn

LONGEST = 1000  # letters of an expression, at most
DEEPEST = 20  # groups within each other, at most

# From places in a text to those where a node that begins at one of them can end.
_Ends = Callable[[str, int, dict], int]

_COUNTS = re.compile(r"\{(\d*)(,?)(\d*)\}")
_FLAGS = re.compile(r"\(\?([aisu]+)\)")
_GROUP = re.compile(r"\((?:\?(?::|P<[A-Za-z_]\w*>|=|!))?")
# One letter, or a place: a class, an escape that is no back reference, or what stands for itself.
_ATOM = re.compile(
    r"\[\^?\]?(?:\\.|[^\]\\])*\]|\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[dDwWsSbBAZntrfva]|[^\w])"
    r"|[^()\[\]|*+?\\]",
    re.DOTALL,
)


class Expression(str):
    """A regular expression that `jaxquant.engine.rules` matches within a bound.

    Raises:
        ValueError: one that `re` does not take, that is longer or nested deeper than is matched here, or that
            has what is not.

    >>> Expression("blocks/(0|1)/.*").fullmatch("blocks/1/up")
    True
    >>> Expression("(a+)+b").fullmatch("a" * 300) is None
    True
    """

    __slots__ = ()

    def __init__(self, text: str):
        del text
        _parse(str(self))

    @property
    def pattern(self) -> str:
        """The text of the expression, as in `re.Pattern`."""
        return str(self)

    def fullmatch(self, text: str) -> bool | None:
        """Returns true where it matches all of a text, else None."""
        return _matches(str(self), text) or None


@functools.lru_cache(maxsize=4096)
def _matches(pattern: str, text: str) -> bool:
    return bool(_parse(pattern)(text, 1, {}) >> len(text))


@functools.lru_cache(maxsize=256)
def _parse(pattern: str) -> _Ends:
    if len(pattern) > LONGEST:
        raise ValueError(
            f"rule {pattern[:40]!r}… has {len(pattern)} letters; at most {LONGEST} are read of a file"
        )
    try:
        return _Parser(pattern).whole()
    except (re.error, OverflowError) as error:
        raise ValueError(f"rule {pattern!r} is not a regular expression: {error}") from None


class _Parser:
    """Recursive descent, one method for each level of the grammar."""

    def __init__(self, pattern: str):
        self.pattern, self.at, self.depth, self.flags = pattern, 0, 0, 0

    def whole(self) -> _Ends:
        if match := _FLAGS.match(self.pattern):
            self.at = match.end()
            for letter in match[1]:
                self.flags |= re.RegexFlag[letter.upper()]
        found = self.alternatives()
        if self.at < len(self.pattern):
            self.refuse()
        return found

    def alternatives(self) -> _Ends:
        found = [self.sequence()]
        while self.pattern.startswith("|", self.at):
            self.at += 1
            found.append(self.sequence())
        return found[0] if len(found) == 1 else _alternatives(found)

    def sequence(self) -> _Ends:
        found = []
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            found.append(self.repeated())
        return _sequence(found)

    def repeated(self) -> _Ends:
        found, start = self.single(), self.at
        low, high = self.counts()
        if self.at == start:
            return found
        if self.pattern.startswith("?", self.at):
            self.at += 1  # how few are tried first is no matter where all of the text is matched
        if self.pattern.startswith(("*", "+", "?"), self.at) or self.has_counts():
            self.refuse()
        return _repeat(found, low, high)

    def has_counts(self) -> re.Match[str] | None:
        match = _COUNTS.match(self.pattern, self.at)
        return match if match and match[0] != "{}" else None

    def counts(self) -> tuple[int, int | None]:
        """Parses a repetition's minimum and maximum."""
        simple = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        letter = self.pattern[self.at : self.at + 1]
        if letter in simple:
            self.at += 1
            return simple[letter]
        if match := self.has_counts():
            self.at = match.end()
            low = int(match[1] or 0)
            high = (int(match[3]) if match[3] else None) if match[2] else low
            if high is not None and high < low:
                self.refuse()
            return low, high
        return 1, 1

    def single(self) -> _Ends:
        if self.pattern[self.at] == "(":
            return self.group()
        match = _ATOM.match(self.pattern, self.at)
        if not match:
            self.refuse()
        self.at = match.end()
        return _one(re.compile(match[0], self.flags))

    def group(self) -> _Ends:
        match = _GROUP.match(self.pattern, self.at)
        if match is None or self.pattern.startswith("?", match.end()) or self.depth >= DEEPEST:
            self.refuse()
        self.at, self.depth = match.end(), self.depth + 1
        found = self.alternatives()
        if not self.pattern.startswith(")", self.at):
            self.refuse()
        self.at, self.depth = self.at + 1, self.depth - 1
        is_look = match[0] in ("(?=", "(?!")
        return _lookahead(found, match[0] == "(?=") if is_look else found

    def refuse(self) -> NoReturn:
        re.compile(self.pattern)  # what is none at all says so itself
        raise ValueError(
            f"rule {self.pattern!r} has {self.pattern[self.at : self.at + 6]!r} at letter {self.at}, which "
            "is not matched in a rule of a file; what is are letters, classes, groups up to "
            f"{DEEPEST} deep, |, *, +, ?, {{m,n}} and lookahead"
        )


# ---------------------------------------------------------------------------------------------------
# Nodes.  Places are the bits of a number: the lowest is the place before the first letter.


def _one(compiled: re.Pattern[str]) -> _Ends:
    def ends(text: str, places: int, known: dict) -> int:
        found = 0
        for at in _bits(places):
            match = compiled.match(text, at)
            found |= 0 if match is None else 1 << match.end()
        return found

    return ends


def _sequence(parts: list[_Ends]) -> _Ends:
    def ends(text: str, places: int, known: dict) -> int:
        for part in parts:
            places = part(text, places, known)
        return places

    return parts[0] if len(parts) == 1 else ends


def _alternatives(parts: list[_Ends]) -> _Ends:
    def ends(text: str, places: int, known: dict) -> int:
        found = 0
        for part in parts:
            found |= part(text, places, known)
        return found

    return ends


def _repeat(part: _Ends, low: int, high: int | None) -> _Ends:
    def ends(text: str, places: int, known: dict) -> int:
        # More than one for each letter and one beside add nothing but empty ones.
        most = len(text) + 1
        for _ in range(min(low, most)):
            places = _from_each(part, text, places, known)
        found = new = places
        for _ in range(most if high is None else min(high - low, most)):
            new = _from_each(part, text, new, known) & ~found
            if not new:
                break
            found |= new
        return found

    return ends


def _lookahead(part: _Ends, is_there: bool) -> _Ends:
    def ends(text: str, places: int, known: dict) -> int:
        found = 0
        for at in _bits(places):
            found |= (bool(_from_each(part, text, 1 << at, known)) == is_there) << at
        return found

    return ends


def _from_each(part: _Ends, text: str, places: int, known: dict) -> int:
    """Tries a repetition once from each position, however deeply repetitions nest."""
    found = 0
    for at in _bits(places):
        key = (part, at)
        if key not in known:
            known[key] = part(text, 1 << at, known)
        found |= known[key]
    return found


def _bits(places: int) -> Iterator[int]:
    while places:
        yield (places & -places).bit_length() - 1
        places &= places - 1
