"""Named errors: each says what was asked, what was found, and what to do about it."""

from collections.abc import Iterable
from difflib import get_close_matches


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


def nearest(word: str, known: Iterable[str]) -> str:
    """Say which known word is nearest, or list all that are known."""
    known = sorted(known)
    match = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"Did you mean {match[0]!r}?" if match else f"Known: {', '.join(known)}."


def shortlist(items: Iterable[object], most: int = 5) -> str:
    """Join the first few items and count the rest, for messages that stay readable."""
    items = [str(item) for item in items]
    rest = len(items) - most
    return ", ".join(items[:most]) + (f" and {rest} more" if rest > 0 else "")
