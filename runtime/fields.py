"""Dataclasses from JSON, strictly: a field that is missing, unknown or of the wrong type is refused by its name."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from typing import Any, Literal, TypeVar

from svdprune.runtime.errors import BundleError

T = TypeVar("T")


def read_fields(kind: type[T], content: Any, file: str, where: str = "", again: str = "export the bundle again") -> T:
    """Build a dataclass from a JSON object.

    Args:
        kind: a dataclass whose hints are str, int, float, bool, Literal, ``X | None``, list[X], dict[str, X], Any or
            another such dataclass. Fields with a default may be absent.
        content: what ``json.loads`` gave.
        file: the file's name, for the message.
        where: the dotted name of ``content`` inside the file, "" for the whole.
        again: what to do when a field is missing.

    Raises:
        BundleError: naming the file and the field.
    """
    if not isinstance(content, dict):
        raise BundleError(f"{file}: {where or 'the content'} must be an object, not {_json_type(content)}")
    hints = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    values = {}
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        if item.name in content:
            values[item.name] = _value(hints[item.name], content[item.name], file, prefix + item.name, again)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise BundleError(f"{file}: the field {prefix}{item.name} is missing: {again}")
    unknown = sorted(set(content) - set(hints))
    if unknown:
        raise BundleError(f"{file}: the field {prefix}{unknown[0]} is not known to this svdprune: upgrade svdprune")
    return kind(**values)


def _value(hint: Any, value: Any, file: str, where: str, again: str) -> Any:
    """``value`` checked against one type hint, and converted."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):  # only ever `X | None`
        return None if value is None else _value(arguments[0], value, file, where, again)
    if origin is Literal:
        if value not in arguments:
            choices = ", ".join(map(str, arguments))
            raise BundleError(f"{file}: {where} is {json.dumps(value)}, it must be one of: {choices}")
        return value
    if origin is list:
        _require(isinstance(value, list), file, where, "a list", value)
        return [_value(arguments[0], item, file, f"{where}[{index}]", again) for index, item in enumerate(value)]
    if origin is dict:
        _require(isinstance(value, dict), file, where, "an object", value)
        return {key: _value(arguments[1], item, file, f"{where}[{key!r}]", again) for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return read_fields(hint, value, file, where, again)  # type: ignore[arg-type]
    if hint is float:
        _require(isinstance(value, (int, float)) and not isinstance(value, bool), file, where, "a number", value)
        return float(value)
    if hint is int:
        _require(isinstance(value, int) and not isinstance(value, bool), file, where, "a whole number", value)
    elif hint is bool:
        _require(isinstance(value, bool), file, where, "true or false", value)
    else:
        _require(isinstance(value, str), file, where, "a string", value)
    return value


def _require(fits: bool, file: str, where: str, wanted: str, value: object) -> None:
    if not fits:
        raise BundleError(f"{file}: {where} must be {wanted}, not {_json_type(value)}")


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")
