"""Versioned JSON for frozen dataclasses: the one place that reads and writes the contracts."""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from typing import Any, Self

from mball.errors import SchemaError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A frozen dataclass that is also a JSON document.

    Fields may be int, float, str, bool, None, enums of str, tuples of one type, and other such dataclasses.
    """

    def check(self) -> None:
        """Raises SchemaError when the document contradicts itself."""
        raise NotImplementedError

    def to_json(self) -> str:
        """Returns the document as JSON; equal documents give equal text."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Returns the checked document.

        Raises:
            SchemaError: the text is no JSON, has another version, lacks or adds a field, or contradicts itself.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise SchemaError(f"{cls.__name__} is no JSON: {error}") from error
        version = next(field.default for field in dataclasses.fields(cls) if field.name == "version")
        if isinstance(data, dict) and data.get("version") != version:
            raise SchemaError(
                f"{cls.__name__} has version {data.get('version')}; this mball reads version {version}: "
                "record it again, or use the mball that wrote it"
            )
        document = _decode(cls, data, cls.__name__)
        assert isinstance(document, cls)
        document.check()
        return document


def _decode(kind: Any, data: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if data is None and type(None) in arguments:
            return None
        return _decode(next(option for option in arguments if option is not type(None)), data, where)
    if origin is tuple:
        if not isinstance(data, list):
            raise SchemaError(f"{where} must be a list, not {type(data).__name__}")
        return tuple(_decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(data))
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, data, where)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        try:
            return kind(data)
        except ValueError as error:
            known = ", ".join(repr(each.value) for each in kind)
            raise SchemaError(f"{where} must be one of {known}, not {data!r}") from error
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, kind) or (isinstance(data, bool) and kind is not bool):
        raise SchemaError(f"{where} must be {kind.__name__}, not {data!r}")
    return data


def _decode_dataclass(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise SchemaError(f"{where} must be an object, not {type(data).__name__}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := data.keys() - fields.keys():
        raise SchemaError(f"{where} has unknown fields {sorted(unknown)}")
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    if missing := required - data.keys():
        raise SchemaError(f"{where} lacks {sorted(missing)}")
    return kind(**{name: _decode(hints[name], value, f"{where}.{name}") for name, value in data.items()})
