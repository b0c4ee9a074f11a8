"""Frozen typed settings, and the one way in which they are read from a file and command line.

    HrproError
    +-- SettingsError           a setting that is unknown, missing or out of range, or an unreadable
                                file (also a ValueError)

A group of settings is a class on `Settings`; groups nest, and a setting is named by its dotted
path: `localization.soft_nms_sigma`. Defaults stand in the class and nowhere else. `load_settings`
lays a YAML file over them and then assignments (`--set path=value`), in that order.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from hrpro.engine.settings_text import (
    SettingDescription,
    describe,
    explain,
    group_of,
    type_text,
)
from hrpro.engine.wire import HrproError

__all__ = [
    "SettingDescription",
    "Settings",
    "SettingsError",
    "describe",
    "differences",
    "explain",
    "load_settings",
]


class SettingsError(HrproError, ValueError):
    """Settings that cannot be used; the message names each path, what was expected and what came.

    It also says where the value came from: the file or the assignment.
    """


class Settings(BaseModel):
    """A group of settings: frozen, finite numbers only, and unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


AnySettings = TypeVar("AnySettings", bound=Settings)


def load_settings(
    model: type[AnySettings],
    file: Path | None = None,
    assignments: Sequence[str] = (),
    base: Mapping[str, Any] | None = None,
) -> AnySettings:
    """Settings of the class `model` from its defaults, a YAML file and `path=value` assignments.

    Later ones win. `base` takes the place of defaults where it has values: a bundle's own.
    Values of assignments are YAML too: `hop=2`, `rates=[0.1, 0.2]`, `width=null`. Values are not
    converted from one type to another, except whole numbers to floats. Raises SettingsError, which
    lists all that is wrong.
    """
    given = _Given({}, file, {})
    _lay_over(given.values, base or {})
    if file is not None:
        _lay_over(given.values, _read_file(file))
    lines: list[str] = []
    for assignment in assignments:
        try:
            _assign(given, assignment)
        except SettingsError as error:
            lines.append(str(error))
    try:
        # Through JSON, because strictness there still takes a list for a tuple and text for a path.
        text = json.dumps(given.values, default=str)
        loaded = model.model_validate_json(text, strict=True)
        if not lines:
            return loaded
    except ValidationError as error:
        lines += [_complaint(model, given, detail) for detail in error.errors()]
    except (ValueError, RecursionError) as error:  # a YAML alias can hold itself
        lines.append(f"{file or 'settings'}: {error}")
    if len(lines) > 1:
        lines.insert(0, f"{len(lines)} settings are wrong:")
    raise SettingsError("\n  ".join(lines))


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """Path, old and new value of each entry that differs between two nested maps."""
    found = []
    for name in sorted({*old, *new}):
        was, now = old.get(name), new.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            found += differences(was, now, f"{prefix}{name}.")
        elif was != now:
            found.append((f"{prefix}{name}", was, now))
    return found


# --- reading -------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"expected a name, came {key!r}", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return dict(super().construct_mapping(node, deep=deep))


# YAML 1.1 takes 1e-3 for text, since it has no dot. A copy, so that other loaders stay as they are.
_Loader.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


@dataclass(frozen=True)
class _Given:
    """What was given: `values` nested by group, and the text of the assignment to each path."""

    values: dict[str, Any]
    file: Path | None
    assigned: dict[tuple[str, ...], str]

    def origin(self, path: tuple[str | int, ...]) -> str:
        """Where the value at `path`, or anything below it, was set."""
        texts = [
            text
            for assigned, text in self.assigned.items()
            if all(one == other for one, other in zip(assigned, path, strict=False))
        ]
        if texts:
            return ", ".join(texts)
        return str(self.file) if self.file is not None else "default"


def _parse_yaml(text: str) -> Any:
    # Not yaml.load, which reads like the unsafe loader: this one is a SafeLoader.
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _read_file(file: Path) -> dict[str, Any]:
    try:
        values = _parse_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{file}: expected YAML in UTF-8, came other bytes") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SettingsError(f"{file}{_yaml_problem(error)}") from None
    if values is None:  # an empty file
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"{file}: expected settings as 'name: value', came {_shown(values)}")
    return values


def _lay_over(values: dict[str, Any], above: Mapping[str, Any]) -> None:
    """Put the values of `above` over `values`, group by group."""
    for name, value in above.items():
        if isinstance(value, Mapping) and isinstance(values.get(name), dict):
            _lay_over(values[name], value)
        else:
            values[name] = dict(value) if isinstance(value, Mapping) else value


def _yaml_problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"{f', line {mark.line + 1}' if mark else ''}: {problem}"


def _assign(given: _Given, assignment: str) -> None:
    """Put one `path=value` into the nested values."""
    name, equals, text = assignment.partition("=")
    path = tuple(part.strip() for part in name.split("."))
    if not equals or not all(path):
        raise SettingsError(f"--set {assignment}: expected path=value, such as group.name=1")
    try:
        value = _parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = getattr(error, "problem", None) or str(error)
        raise SettingsError(f"--set {assignment}: not a YAML value: {problem}") from None
    group = given.values
    for depth, part in enumerate(path[:-1], start=1):
        if group.get(part) is None:
            group[part] = {}
        group = group[part]
        if not isinstance(group, dict):
            raise SettingsError(
                f"--set {assignment}: {'.'.join(path[:depth])} is not a group, "
                f"it was given as {_shown(group)} ({given.origin(path[:depth])})"
            )
    group[path[-1]] = value
    given.assigned[path] = f"--set {assignment}"


# --- what is wrong -------------------------------------------------------------------------------


def _complaint(model: type[Settings], given: _Given, detail: Mapping[str, Any]) -> str:
    """One line for one of pydantic's errors."""
    path: tuple[str | int, ...] = detail["loc"]
    name = ".".join(map(str, path))
    origin = given.origin(path)
    if detail["type"] == "extra_forbidden":
        return f"{name}: no such setting{_suggestion(model, path)} ({origin})"
    field = _find_field(model, path)
    if detail["type"] == "value_error":
        # A validator's own words; those of a group name the setting themselves.
        return f"{name}{': ' if name else ''}{detail['ctx']['error']} ({origin})"
    if detail["type"] == "missing":
        return f"{name}: expected {type_text(field)}, came nothing"
    expected = type_text(field) if field else _pydantic_text(detail["msg"])
    return f"{name}: expected {expected}, came {_shown(detail['input'])} ({origin})"


def _pydantic_text(message: str) -> str:
    return message.removeprefix("Input should be ")


def _shown(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _suggestion(model: type[Settings], path: tuple[str | int, ...]) -> str:
    """The same name in another group, else the nearest in the same group, else in another."""
    name = str(path[-1])
    group: type[BaseModel] | None = model
    if len(path) > 1:
        group = group_of(_find_field(model, path[:-1]))
    if group is None:
        return ""
    prefix = "".join(f"{part}." for part in path[:-1])
    # Reversed, so that of equal names the first one defined stays.
    elsewhere = {row.path.rpartition(".")[2]: row.path for row in reversed(describe(model))}
    if name in elsewhere:
        return f", did you mean {elsewhere[name]}?"
    beside = difflib.get_close_matches(name, group.model_fields, n=1)
    if beside:
        return f", did you mean {prefix}{beside[0]}?"
    far = difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.8)
    if far:
        return f", did you mean {elsewhere[far[0]]}?"
    return f", expected one of {', '.join(prefix + field for field in group.model_fields)}"


def _find_field(model: type[BaseModel], path: tuple[str | int, ...]) -> FieldInfo | None:
    """The field at `path`; None for an item of a list or map, or where there is none."""
    group: type[BaseModel] | None = model
    field = None
    for part in path:
        if group is None or part not in group.model_fields:
            return None
        field = group.model_fields[str(part)]
        group = group_of(field)
    return field
