"""The raw results: a JSON file a row, written when it is measured, so that an interrupted run goes on; a CSV of all at the end."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffgraft.methods.files import write_atomic

from .cases import Bout, Method

Row = dict[str, Any]


def key_of(bout: Bout, method: Method, circumstances: Mapping[str, Any]) -> str:
    """What makes two rows the same measurement: pipeline, method, setting, and how it is measured."""
    what = [bout.arm, bout.pipeline, bout.steps, bout.env, asdict(method), dict(circumstances)]
    what += [dict(bout.shape)] if bout.shape else []
    digest = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:10]
    return "-".join([bout.arm, bout.pipeline, method.label.replace(" ", "_").replace("+", ""), digest])


CIRCUMSTANCES = ("rounds", "samples", "reference_steps", "device", "dtype", "full", "compile", "timed_batch", "attention")
"""Columns that say how a row was measured: what makes rows comparable."""


def way(row: Row) -> str:
    """How a row of the speed arm was run, where that is not eager, one picture a call, native attention."""
    parts = ["compiled"] if row["compile"] else []
    parts += [f"batch {row['timed_batch']}"] if row["timed_batch"] > 1 else []
    return ", ".join([*parts, *([row["attention"]] if row["attention"] != "native" else [])])


class Store:
    """The rows of one benchmark in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        return self.folder / "rows" / f"{key}.json"

    def has(self, key: str) -> bool:
        return self.path(key).exists()

    def put(self, key: str, row: Row) -> None:
        write_atomic(self.path(key), (json.dumps(row, indent=1) + "\n").encode())

    def forget_failures(self) -> None:
        """Delete the rows of methods that failed."""
        for row in self:
            if row["error"]:
                self.path(row["key"]).unlink()

    def __iter__(self) -> Iterator[Row]:
        for path in sorted((self.folder / "rows").glob("*.json")):
            yield {"key": path.stem, **json.loads(path.read_text(encoding="utf-8"))}

    def write_csv(self, path: Path) -> None:
        """All rows as one table; lists and mappings stay JSON in their cell."""
        rows = list(self)
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in row.items()})
        write_atomic(path, text.getvalue().encode())
