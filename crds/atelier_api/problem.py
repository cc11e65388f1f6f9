"""One mistake in a document, and how values and near misses are written in its message."""

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

LONGEST_SHOWN = 80


@dataclass(frozen=True)
class Problem:
    """A mistake at `path` (`spec.data.sources[0].uri`). `message` is the whole sentence and names the path."""

    path: str
    value: Any
    message: str

    def __str__(self) -> str:
        return self.message


def refused(path: str, value: Any, allowed: str) -> Problem:
    """`spec.adapter.rank is 0; must be 1–1024`."""
    return Problem(path, value, f"{path} is {shown(value)}; {allowed}")


def shown(value: Any) -> str:
    """A value as the user wrote it, cut where it is long: 'flux', 48, true, empty, ['foo']."""
    if value is None:
        return "empty"
    if isinstance(value, str):
        return repr(value) if len(value) <= LONGEST_SHOWN else f"{value[:LONGEST_SHOWN]!r}…"
    if isinstance(value, (bool, int, float)):
        return _number_shown(value)
    if isinstance(value, (list, tuple)):
        if all(isinstance(item, (str, int, float, bool)) for item in value[:8]) and len(value) <= 8:
            text = "[" + ", ".join(shown(item) for item in value) + "]"
            if len(text) <= LONGEST_SHOWN:
                return text
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "a mapping"
    return repr(str(value)[:LONGEST_SHOWN])


def _number_shown(value: float) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return "a number of more than 60 digits"
    return json.dumps(value)


def nearest(word: Any, known: Iterable[str]) -> str | None:
    """The known word that `word` was probably meant to be, if any. Case and underscores do not count."""
    plain = {_plain(name): name for name in known}
    matches = difflib.get_close_matches(_plain(str(word)[:100]), plain, n=1, cutoff=0.6)
    return plain[matches[0]] if matches else None


def choice(word: Any, known: Iterable[str]) -> str:
    """What to say about a word that is none of `known`: `did you mean sdxl? allowed: flux, sdxl`."""
    names = list(known)
    near = nearest(word, names)
    return (f"did you mean {near}? " if near else "") + f"allowed: {', '.join(names)}"


def _plain(word: str) -> str:
    return word.replace("_", "").replace("-", "").lower()
