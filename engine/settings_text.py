"""Settings in words: every setting with its type, range and default, for help and messages."""

from __future__ import annotations

import inspect
import json
import textwrap
import types
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

_TYPE_TEXTS: Mapping[object, str] = {
    int: "integer",
    float: "number",
    bool: "true or false",
    str: "text",
    Path: "path",
    type(None): "null",
    Any: "anything",
}
_LIMIT_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


class SettingDescription(NamedTuple):
    """One row of a help text: `type` with its range, `default` as it would stand in a file."""

    path: str
    type: str
    default: str
    description: str


def describe(model: type[BaseModel]) -> list[SettingDescription]:
    """Every setting of `model` and of the groups in it, in the order of their definition."""
    return list(_described(model, None, ""))


def _described(
    model: type[BaseModel], default: BaseModel | None, prefix: str
) -> Iterator[SettingDescription]:
    for name, field in model.model_fields.items():
        value = _default_of(field, name, default)
        group = group_of(field)
        if group is None or not isinstance(value, group):
            required = value is PydanticUndefined
            text = "required" if required else json.dumps(value, default=_plain)
            yield SettingDescription(prefix + name, type_text(field), text, field.description or "")
        if group is not None:
            instance = value if isinstance(value, group) else None
            yield from _described(group, instance, f"{prefix}{name}.")


def _default_of(field: FieldInfo, name: str, group: BaseModel | None) -> Any:
    """What a setting is where it is not given: that of the group it stands in, or its own."""
    if group is not None:
        return getattr(group, name)
    return field.get_default(call_default_factory=True)


def explain(model: type[BaseModel], brought: Collection[str] = ()) -> str:
    """A YAML file with every setting of `model`, its meaning, type and default.

    It loads to the defaults. Groups in ``brought`` get their defaults from elsewhere, so their
    lines are switched off: "#" without a space after it, where comments have one.
    """
    return "\n".join(_explained(model, None, "", brought)) + "\n"


def _explained(
    model: type[BaseModel], default: BaseModel | None, indent: str, brought: Collection[str]
) -> Iterator[str]:
    for name, field in model.model_fields.items():
        value = _default_of(field, name, default)
        group = group_of(field)
        off = "#" if name in brought else ""
        if isinstance(value, BaseModel):
            yield ""
            yield from _comment(inspect.getdoc(type(value)) or "", indent)
            if off:
                yield from _comment("Switched off here: without a line, the bundle's own.", indent)
            yield f"{off}{indent}{name}:"
            for line in _explained(type(value), value, indent + "  ", ()):
                yield off + line if line and not line.lstrip().startswith("#") else line
            continue
        meaning = f"{field.description}; " if field.description else ""
        yield from _comment(meaning + type_text(field), indent)
        if group is not None:
            names = ", ".join(group.model_fields)
            yield from _comment(f"a group of settings: {names}", indent)
        if value is PydanticUndefined:
            yield f"#{indent}{name}: required"
        else:
            yield f"{indent}{name}: {json.dumps(value, default=_plain)}"


def _comment(text: str, indent: str) -> list[str]:
    prefix = f"{indent}# "
    return textwrap.wrap(
        " ".join(text.split()), 100, initial_indent=prefix, subsequent_indent=prefix
    )


def _plain(value: object) -> object:
    return value.value if isinstance(value, Enum) else str(value)


def group_of(field: FieldInfo | None) -> type[BaseModel] | None:
    """The settings class of a field that holds a group (or null), else None."""
    if field is None:
        return None
    for member in _members(field.annotation):
        if isinstance(member, type) and issubclass(member, BaseModel):
            return member
    return None


def _members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union; any other annotation alone."""
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def type_text(field: FieldInfo | None) -> str:
    """The type of a field with its range: `integer >= 1 or null`."""
    if field is None:
        return "a value"
    limits = " and ".join(
        f"{sign} {getattr(limit, key):g}"
        for limit in field.metadata
        for key, sign in _LIMIT_SIGNS.items()
        if getattr(limit, key, None) is not None
    )
    lengths = " and ".join(
        f"{words} {getattr(limit, key)}"
        for limit in field.metadata
        for key, words in (("min_length", "length >="), ("max_length", "length <="))
        if getattr(limit, key, None) is not None
    )
    range_text = f" {limits}" if limits else f", {lengths}," if lengths else ""
    texts = [
        _annotation_text(member) + ("" if member is type(None) else range_text)
        for member in _members(field.annotation)
    ]
    return " or ".join(texts).rstrip(",")


def _annotation_text(annotation: Any) -> str:
    if annotation in _TYPE_TEXTS:
        return _TYPE_TEXTS[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(json.dumps(value) for value in arguments)
    if origin is Annotated:
        return _annotation_text(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(map(_annotation_text, arguments))
    if origin is tuple and arguments[-1:] != (Ellipsis,):
        return f"list [{', '.join(map(_annotation_text, arguments))}]"
    if origin in (tuple, list, set, frozenset):
        return f"list of {_annotation_text(arguments[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"map of {_annotation_text(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " or ".join(json.dumps(member.value) for member in annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "group of settings"
    return getattr(annotation, "__name__", str(annotation))
