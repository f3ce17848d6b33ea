"""The results of all sections in one JSON file, which is rewritten at each row, and their tables.

    {"device", "started", "versions", "quick", "sections": {name: {"rows", "notes", "errors", "seconds"}}}

A row has "table", "row" and its numbers; rows of one table have the same columns.
"""

import json
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flperf.files import atomic_file

PACKAGES = ("torch", "triton", "transformers", "deepspeed", "av", "decord", "nvidia-dali-cuda130", "torchvision")


class Results:
    """The file of results. One process at a time writes to it."""

    def __init__(self, path: Path):
        self.path = path

    def start(self, device: str, quick: bool) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = {name: text for name in PACKAGES if (text := _version(name))}
        started = time.strftime("%Y-%m-%dT%H:%M:%S")
        self._write({"device": device, "started": started, "versions": found, "quick": quick, "sections": {}})

    def read(self) -> dict:
        return json.loads(self.path.read_text())

    def row(self, section: str, table: str, row: str, **values: Any) -> None:
        """Add a row of a table and print it."""
        values = {name: _rounded(value) for name, value in values.items()}
        self._section(section, lambda found: found.setdefault("rows", []).append({"table": table, "row": row} | values))
        print(f"{table} | {row} | " + ", ".join(f"{name} {value}" for name, value in values.items()), flush=True)

    def fail(self, section: str, error: str) -> None:
        """Add an error and print it."""
        self._section(section, lambda found: found.setdefault("errors", []).append(error))
        print(f"!! {section}: {error}", flush=True)

    def note(self, section: str, text: str) -> None:
        """Add a remark, such as what was left out, and print it."""
        self._section(section, lambda found: found.setdefault("notes", []).append(text))
        print(f"-- {section}: {text}", flush=True)

    def add(self, section: str, **values: Any) -> None:
        self._section(section, lambda found: found.update(values))

    def _section(self, name: str, change) -> None:
        content = self.read()
        change(content["sections"].setdefault(name, {}))
        self._write(content)

    def _write(self, content: dict) -> None:
        with atomic_file(self.path) as unfinished:
            unfinished.write_text(json.dumps(content, indent=1) + "\n")


def tables(content: dict) -> str:
    """All tables in Markdown, each section with its errors."""
    parts = [f"{content['device']}, " + ", ".join(f"{k} {v}" for k, v in content["versions"].items())]
    for name, section in content["sections"].items():
        parts.append(f"## {name}, {section.get('seconds', 0):.0f} s")
        grouped: dict[str, list[dict]] = {}
        for row in section.get("rows", []):
            grouped.setdefault(row["table"], []).append(row)
        parts += [_table(title, rows) for title, rows in grouped.items()]
        parts += [f"- error: {error}" for error in section.get("errors", [])]
        parts += [f"- {note}" for note in section.get("notes", [])]
    return "\n\n".join(parts)


def _table(title: str, rows: list[dict]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in ("table", "row")))
    lines = [[title, *columns], ["---"] * (len(columns) + 1)]
    lines += [[row["row"], *(_shown(row.get(column)) for column in columns)] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _rounded(value: Any) -> Any:
    """Four significant digits."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
