"""Errors that are shown to the user in one line; `flperf.commands.common` prints them without a traceback."""

import re


class UserError(Exception):
    """A mistake that the user can fix. It is printed as one line, without a traceback."""


def first_line(error: Exception) -> str:
    """The first line of a library's error message, or the error's class if there is no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def printable(text: str) -> str:
    """Text in which control characters, line breaks and bytes that are not UTF-8 are shown as escapes (`\\n`, `\\xe9`),
    so that a message with a file name is one line, and every terminal takes it."""
    return re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", _escape, text)


def _escape(found: re.Match[str]) -> str:
    character = found[0]
    if "\udc80" <= character <= "\udcff":  # a byte that is not UTF-8, as a surrogate escape
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
