"""Checked access to the fields of a JSON document; every error names the file and the path inside it."""

from __future__ import annotations

import json
import math
import unicodedata
from pathlib import Path

from ssa.errors import ConfigError, DataError

MAX_TEXT = 1000  # a name or command longer than this is cut: it would push everything else off the page


def read_text(path: Path) -> str:
    """The UTF-8 text of a regular file, or a :class:`DataError` that names it."""
    if not path.is_file():
        raise DataError(str(path), "no regular file", "a result file", "`ssa eval` or `ssa train` to write one")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(str(path), f"a bad byte at offset {error.start}", "UTF-8 text") from error
    except OSError as error:
        raise DataError(str(path), error.strerror or "a read error", "a readable file") from error


def parse_json(text: str, where: str) -> object:
    """Parse one JSON document. NaN and Infinity are accepted, as Python's writer produces them."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = "" if "\n" not in text.strip() else f":{error.lineno}"
        got = f"malformed JSON ({error.msg} at column {error.colno})"
        raise DataError(f"{where}{line}", got, "one complete JSON document") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; thousands of nested lists
        raise DataError(where, f"unreadable JSON ({error})", "one complete JSON document") from error


def visible(text: str) -> str:
    """The text with control, direction and surrogate characters written as escapes, cut to a sane length.

    Markup is left alone: escaping it is the business of whoever prints it.
    """
    if len(text) > MAX_TEXT:
        text = text[:MAX_TEXT] + "…"
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    if unicodedata.category(character) == "Zs":
        return " "
    return character.encode("unicode_escape").decode("ascii")


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    return names.get(type(value)) or f"the number {value!r:.40}"


class Fields:
    """One JSON object. Unknown keys are ignored, so a newer minor version of a schema stays readable."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise DataError(where, _kind(value), "an object")
        self._value, self.where = value, where

    def __contains__(self, key: str) -> bool:
        return self._value.get(key) is not None

    def _error(self, key: str, expected: str) -> DataError:
        got = _kind(self._value[key]) if key in self._value else "no such key"
        return DataError(f"{self.where}: {key}", got, expected)

    def child(self, key: str) -> Fields:
        """The object under ``key``."""
        if not isinstance(self._value.get(key), dict):
            raise self._error(key, "an object")
        return Fields(self._value[key], f"{self.where}: {key}")

    def children(self, key: str) -> list[Fields]:
        """The list of objects under ``key``; empty where the key is missing or null."""
        items = self._value.get(key)
        if items is None:
            return []
        if not isinstance(items, list):
            raise self._error(key, "a list of objects")
        return [Fields(item, f"{self.where}: {key}[{index}]") for index, item in enumerate(items)]

    def text(self, key: str) -> str:
        """A required text, made visible."""
        if not isinstance(self._value.get(key), str):
            raise self._error(key, "a text")
        return visible(self._value[key])

    def text_or_none(self, key: str) -> str | None:
        """A text, or ``None`` where the key is missing or null."""
        return self.text(key) if key in self else None

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        """A text out of a closed set."""
        value = self._value.get(key)
        if value not in allowed:
            raise DataError(f"{self.where}: {key}", repr(value)[:80], " or ".join(map(repr, allowed)))
        return str(value)

    def count(self, key: str) -> int:
        """A required whole number >= 0."""
        value = self._value.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._error(key, "a whole number >= 0")
        return value

    def count_or_none(self, key: str) -> int | None:
        """A whole number, or ``None`` where the key is missing or null."""
        return self.count(key) if key in self else None

    def number(self, key: str) -> float:
        """A measurement; NaN where the key is missing or null."""
        return _number(self._value.get(key), f"{self.where}: {key}")

    def numbers(self, key: str) -> dict[str, float]:
        """An object of measurements by name; empty where the key is missing or null."""
        if key not in self:
            return {}
        return {k: _number(v, f"{self.where}: {key}.{k}") for k, v in self.child(key)._value.items()}

    def matrix(self, key: str) -> tuple[tuple[float, ...], ...]:
        """A square matrix of measurements."""
        rows = self._value.get(key)
        if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
            raise self._error(key, "a list of lists")
        for index, row in enumerate(rows):
            if len(row) != len(rows):
                where = f"{self.where}: {key}[{index}]"
                raise DataError(where, f"{len(row)} entries", f"{len(rows)}, as many as there are rows")
        return tuple(tuple(_number(item, f"{self.where}: {key}") for item in row) for row in rows)

    def described(self, key: str) -> tuple[tuple[str, str], ...]:
        """The object under ``key`` as pairs of texts, for display only; empty where missing or null."""
        if key not in self:
            return ()
        items = self.child(key)._value.items()
        shown = ((k, v if isinstance(v, str) else json.dumps(v)) for k, v in items if v is not None)
        return tuple((visible(k), visible(v)) for k, v in shown)

    def require_schema(self, name: str, major: int) -> None:
        """Refuse another kind of document, and major versions this reader does not know."""
        got = self._value.get("schema")
        supported = f"{name}/{major}"
        if not isinstance(got, str):
            raise ConfigError(self.where, "no schema name", f"the schema {supported}")
        known, _, version = got.partition("/")
        if known == name and version.split(".")[0] == str(major):
            return
        hint = "a newer release of sparse-sparse-attention" if known == name else None
        raise ConfigError(self.where, f"the schema {visible(got)!r}", f"{supported} (the supported version)", hint)


def _number(value: object, where: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(where, _kind(value), "a number or null")
    try:
        return float(value)
    except OverflowError:
        return math.inf
