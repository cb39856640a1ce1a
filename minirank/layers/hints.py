"""What somebody meant who wrote a name or glob that matches nothing: words for errors."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase

from ..checks import quoted_names

SHOWN = 4  # names in one hint


def did_you_mean(name: str, known: Collection[str], *, globs: bool = False) -> str:
    """A hint for an error message: what among the known names `name` looks like.

    Args:
        name: a name, or a glob where a name is expected.
        globs: whether a glob will do in its place. Then globs are suggested too.

    >>> did_you_mean("encoder.fd", ["encoder.fc", "decoder.fc"])
    "did you mean 'encoder.fc', 'decoder.fc'?"
    >>> did_you_mean("query", ["layer.0.query", "layer.1.query"], globs=True)
    "did you mean '*.query'?"
    >>> did_you_mean("layer.*.qery", ["layer.0.query", "layer.1.query"], globs=True)
    "did you mean 'layer.*.query'?"
    """
    meant = _meant_globs(name, known) if globs else _meant_names(name, known)
    if not _is_glob(name) and not any(map(_is_glob, meant)):
        meant = list(dict.fromkeys(meant + _close_names(name, known)))
    if meant:
        more = f" ({len(meant):,} names in all)" if len(meant) > SHOWN else ""
        return f"did you mean {', '.join(map(repr, meant[:SHOWN]))}{more}?"
    if _is_glob(name):
        kinds = list(dict.fromkeys(_parts(known_name)[-1] for known_name in known))
        return f"names end in {', '.join(map(repr, kinds[: 2 * SHOWN]))}"
    return f"the names that there are: {quoted_names([k for k in known if k])}"


def _close_names(name: str, known: Collection[str]) -> list[str]:
    """Names spelled nearly so, then names with the same last part."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    last = _parts(name)[-1]
    return (close + [k for k in known if _parts(k)[-1] == last and k not in close][:3])[:SHOWN]


def _meant_names(name: str, known: Collection[str]) -> list[str]:
    """The names that the first matching one of the candidates selects."""
    for candidate in _candidates(name, known):
        matched = [known_name for known_name in known if fnmatchcase(known_name, candidate)]
        if matched:
            return matched
    return []


def _meant_globs(name: str, known: Collection[str]) -> list[str]:
    """The first glob among the candidates that selects a name, alone in a list."""
    globs = filter(_is_glob, _candidates(name, known))
    return [glob for glob in globs if _matches_any(glob, known)][:1]


def _candidates(name: str, known: Collection[str]) -> Iterator[str]:
    """Globs that may be meant: the name as it is, with its misspelled parts replaced; each of them
    also at the end of longer names, and for all names that begin so."""
    spelled = _spelled(name, known)
    for start in dict.fromkeys([name, spelled]):
        yield start
        yield f"*.{start}"
    for start in dict.fromkeys([name, spelled]):
        yield f"{start}.*"
        yield f"*.{start}.*"


def _spelled(name: str, known: Collection[str]) -> str:
    """The name, in which each part that no known name has is replaced by the nearest one.

    >>> _spelled("encodr.*.qery", ["encoder.0.query"])
    'encoder.*.query'
    """
    parts = dict.fromkeys(part for known_name in known for part in _parts(known_name))
    return ".".join(_nearest(part, parts) for part in _parts(name))


def _nearest(part: str, parts: Iterable[str]) -> str:
    """`part`, or the part that its letters are nearest to. Stars at its ends stay."""
    letters = part.strip("*")
    if not letters or any(fnmatchcase(known, part) for known in parts):
        return part
    close = difflib.get_close_matches(letters, list(parts), n=1, cutoff=0.6)
    return part.replace(letters, close[0]) if close else part


def _matches_any(pattern: str, known: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in known)


def _is_glob(name: str) -> bool:
    return any(character in name for character in "*?[")


def _parts(name: str) -> list[str]:
    return name.split(".")
