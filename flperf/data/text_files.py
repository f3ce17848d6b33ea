"""Reads text files that a user hands over. Whatever else such a file holds ends in an error of one line that names the
file, the row and the key or option that points to it.

The text is UTF-8, with or without a byte order mark, which Excel writes. A file name can be any bytes: bytes that are
not UTF-8 come out as Python's surrogate escapes, which every function that opens a file turns back into these bytes.
`is_utf8` tells such text apart.
"""

import csv
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from flperf.errors import UserError, first_line

HEAD_BYTES = 4096  # in which a file that is not text shows


def existing_file(file: str | None, key: str, what: str) -> str:
    """The file that a key names. If it is no file, raises `UserError`: "point the key to `what`"."""
    if file is None:
        raise UserError(f"{key}: is not set; point it to {what}")
    if not os.path.isfile(file):
        raise UserError(f"{key}: {_why_no_file(file)}; point it to {what}")
    return file


def has_header(file: str | None, columns: list[str]) -> bool:
    """Whether a CSV exists and its first line names these columns, which identifies its format. Binary files have no
    header."""
    if file is None or not os.path.isfile(file):
        return False
    try:
        with open(file, "rb") as lines:
            first = lines.readline(1000)
    except OSError:  # reported where its rows are read
        return False
    return first.decode("utf-8-sig", errors="replace").strip() == ",".join(columns)


def text_rows(file: str | None, key: str, what: str) -> Iterator[tuple[int, str]]:
    """(row, text) of the lines that are not empty; rows count from 1."""
    with _open_text(file, key, what) as lines:
        for row, line in enumerate(lines, start=1):
            if "\0" in line:
                raise not_text(f"{file}: row {row}", key, what)
            if line.strip():
                yield row, line.rstrip("\n")


def csv_rows(file: str | None, key: str, what: str) -> Iterator[tuple[int, list[str]]]:
    """(row, cells) of the rows of a CSV that are not empty, its header included; rows count from 1."""
    with _open_text(file, key, what, newline="") as lines:  # line ends in a quoted cell are part of it
        reader, row = csv.reader(lines), 0
        while True:
            row += 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise UserError(f"{file}: row {row}: is not a row of a CSV: {error}") from None
            if any("\0" in cell for cell in cells):
                raise not_text(f"{file}: row {row}", key, what)
            if cells:
                yield row, cells


def read_json(file: str | None, key: str, what: str) -> Any:
    """What a JSON file holds."""
    with _open_text(file, key, what) as lines:
        content = lines.read()
        if not is_utf8(content):
            raise not_text(str(file), key, what)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: is not valid JSON: {first_line(error)}") from None


def is_utf8(text: str) -> bool:
    """Whether text was read from bytes that are UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def not_text(where: str, key: str, what: str) -> UserError:
    """The error for bytes that are not UTF-8."""
    return UserError(f"{where}: is not UTF-8 text; save it as UTF-8, or point {key} to {what}")


@contextmanager
def _open_text(file: str | None, key: str, what: str, newline: str | None = None) -> Iterator[TextIO]:
    file = existing_file(file, key, what)
    try:
        with open(file, "rb") as content:
            if b"\0" in content.read(HEAD_BYTES):  # a binary file, or UTF-16
                raise not_text(file, key, what)
        with open(file, newline=newline, encoding="utf-8-sig", errors="surrogateescape") as lines:
            yield lines
    except OSError as error:
        raise UserError(f"{key}: {file} cannot be read: {error.strerror}") from None


def _why_no_file(file: str) -> str:
    try:
        os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return f"there is no file {file}"
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        return f"{file!r} cannot be read: {getattr(error, 'strerror', error)}"
    return f"{file} is a folder" if os.path.isdir(file) else f"{file} is a pipe or device, not a file"
