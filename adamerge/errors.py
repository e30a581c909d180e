"""Named errors: each says what was asked, what was found, and what to do about it."""

from collections.abc import Iterable
from difflib import SequenceMatcher
from reprlib import Repr

NEAR = 0.7  # likeness, of 0 to 1, from which a word counts as a mistyped one
_MOST = 24  # words that a message lists
_BRIEF = Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother, _BRIEF.maxlong = 3, 70, 70, 40


class AdamergeError(Exception):
    """Base of all errors that adamerge raises on purpose.

    Args:
        problem: What was asked and what was found, in one or two sentences.
        hint: What to do about it; printed on a line of its own.
    """

    exit_code = 1

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(f"{problem}\n{hint}" if hint else problem)


class InputError(AdamergeError):
    """A configuration, checkpoint or option that cannot work, found before any work was done."""

    exit_code = 2


class DataError(AdamergeError):
    """A data set that is missing, empty, corrupt or of another label space."""

    exit_code = 3


class NumericError(AdamergeError):
    """A value that stopped being finite, or an adaptation that collapsed."""

    exit_code = 4


class EnvironmentProblem(AdamergeError):
    """The machine lacks something: disk space, network, a GPU, an optional library."""

    exit_code = 5


class AdamergeWarning(UserWarning):
    """Something that a user should look at, but that does not stop the work."""


def nearest(word: object, known: Iterable[str]) -> str:
    """Return which known word is near, or a list of those that are known.

    Near means that at least `NEAR` of the letters agree (`difflib`), without regard to case, or that one
    begins the other. Of words with dots the last parts are compared, and where both have several parts,
    those before them as well:
    ``Lerned`` is near ``adamerge.Learned``, and ``trainer.nonsense`` is near nothing.

    Args:
        word: What was asked for.
        known: What there is.
    """
    known = sorted(known)
    text = str(word)[:200]
    best = max(known, key=lambda name: _likeness(text, name), default="")
    if best and _likeness(text, best) >= NEAR:
        return f"Did you mean {best!r}?"
    return f"Known: {shortlist(known, _MOST)}." if known else ""


def _likeness(word: str, name: str) -> float:
    """Return how alike two words are, of 0 to 1; of words with dots, their least alike parts count."""
    (*before, leaf), (*parents, last) = (text.lower().split(".") for text in (word, name))
    if before and not parents:
        return _ratio(word.lower(), name.lower())
    pairs = [(leaf, last)] + ([(".".join(before), ".".join(parents))] if before and parents else [])
    return min(_ratio(a, b) for a, b in pairs)


def _ratio(a: str, b: str) -> float:
    """Return the share of letters that agree; the beginning of a word, from three letters on, is near it."""
    begins = min(len(a), len(b)) >= 3 and (a.startswith(b) or b.startswith(a))
    alike = SequenceMatcher(None, a, b).ratio()
    return max(alike, NEAR) if begins else alike


def brief(value: object) -> str:
    """Return a value as a message repeats it: in one line, and cut where it is long or deep."""
    return _BRIEF.repr(value)


def shortlist(items: Iterable[object], most: int = 5) -> str:
    """Join the first few items and count the rest, for messages that stay readable."""
    items = [str(item) for item in items]
    rest = len(items) - most
    return ", ".join(items[:most]) + (f" and {rest} more" if rest > 0 else "")
