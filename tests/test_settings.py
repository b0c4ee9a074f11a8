"""Settings: what is read, in which order, and what each wrong setting is answered with."""

from __future__ import annotations

import math
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from hrpro.engine.settings import Settings, SettingsError, describe, load_settings
from hrpro.engine.wire import HrproError


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Window(Settings):
    hop_snippets: int = Field(2, ge=1, description="new snippets in a window")
    window_snippets: int | None = Field(None, ge=1, description="length of a window")
    ratio: float = Field(0.5, gt=0, lt=1)


class Engine(Settings):
    window: Window = Window(hop_snippets=4)
    thresholds: tuple[float, ...] = Field((0.1, 0.2), min_length=1)
    mining: Literal["attention", "points"] = "attention"
    colour: Colour = Colour.RED
    folder: Path | None = None
    verbose: bool = False
    name: str = "engine"
    limits: dict[str, int] = Field(default_factory=dict)
    spare: Window | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Engine:
        if self.verbose and self.name == "quiet":
            raise ValueError("verbose: expected false for the name 'quiet'")
        return self


class Run(Settings):
    data: Path = Field(description="the data set")
    steps: int = Field(10, ge=1, le=100)


def complaint(file: Path | None, *assignments: str, model: type[Settings] = Engine) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(model, file, assignments)
    return str(caught.value)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "settings.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_without_anything_the_defaults_hold() -> None:
    assert load_settings(Engine) == Engine()
    assert load_settings(Engine).window.hop_snippets == 4


def test_an_empty_file_changes_nothing(write: Any) -> None:
    assert load_settings(Engine, write("# nothing yet\n")) == Engine()


def test_the_file_goes_over_defaults_and_assignments_over_the_file(write: Any) -> None:
    file = write("window: {hop_snippets: 3, ratio: 0.25}\nmining: points\n")
    settings = load_settings(Engine, file, ["window.hop_snippets=5", "window.hop_snippets=6"])
    assert settings.window == Window(hop_snippets=6, ratio=0.25)
    assert settings.mining == "points"


@pytest.mark.parametrize(
    ("assignment", "name", "value"),
    [
        ("thresholds=[0.3, 1, 2e-1]", "thresholds", (0.3, 1.0, 0.2)),
        ("folder=/data/x", "folder", Path("/data/x")),
        ("folder=null", "folder", None),
        ("folder=", "folder", None),
        ("verbose=true", "verbose", True),
        ("colour=blue", "colour", Colour.BLUE),
        ("name=a=b", "name", "a=b"),  # only the first = divides
        ("name='12'", "name", "12"),
        ("limits.cam1=3", "limits", {"cam1": 3}),
        ("limits={a: 1}", "limits", {"a": 1}),
        (" name =x", "name", "x"),
    ],
)
def test_assigned_values_are_yaml(assignment: str, name: str, value: object) -> None:
    assert getattr(load_settings(Engine, assignments=[assignment]), name) == value


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1.e-3", ".1e-2", "0.001", "1.0e-3"])
def test_every_way_to_write_a_float_is_a_number(text: str) -> None:
    assert load_settings(Engine, assignments=[f"window.ratio={text}"]).window.ratio == 0.001
    # And the ordinary loader of the library is not changed by it.
    assert yaml.safe_load("1e-3") == "1e-3"


@given(st.floats(0, 1, exclude_min=True, exclude_max=True), st.integers(1, 10**9))
def test_what_python_prints_is_read_back(ratio: float, hop_snippets: int) -> None:
    assignments = [f"window.ratio={ratio!r}", f"window.hop_snippets={hop_snippets!r}"]
    window = load_settings(Engine, assignments=assignments).window
    assert (window.ratio, window.hop_snippets) == (ratio, hop_snippets)


def test_an_assignment_can_fill_a_group_that_is_null() -> None:
    spare = load_settings(Engine, assignments=["spare.ratio=0.1"]).spare
    assert spare == Window(ratio=0.1)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        # The nearest name: in the same group, then the same name in another group.
        (
            "window.hop_snippet=2",
            "window.hop_snippet: no such setting, did you mean window.hop_snippets?",
        ),
        ("windows.hop_snippets=2", "windows: no such setting, did you mean window?"),
        ("window_snippets=2", "window_snippets: no such setting, did you mean"),
        ("mininf=points", "mininf: no such setting, did you mean mining?"),
        # Nothing is near: all names of the group.
        (
            "window.zzz=1",
            "window.zzz: no such setting, expected one of "
            "window.hop_snippets, window.window_snippets, window.ratio",
        ),
    ],
)
def test_unknown_names_get_the_nearest_one(assignment: str, message: str) -> None:
    text = complaint(None, assignment)
    assert text.startswith(message)
    assert text.endswith(f"(--set {assignment})")


def test_the_same_name_in_another_group_is_offered() -> None:
    assert "did you mean window.hop_snippets?" in complaint(None, "hop_snippets=2")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("window.hop_snippets=0", "window.hop_snippets: expected integer >= 1, came 0"),
        ("window.hop_snippets=2.5", "window.hop_snippets: expected integer >= 1, came 2.5"),
        ("window.hop_snippets=true", "window.hop_snippets: expected integer >= 1, came true"),
        ("window.hop_snippets='3'", 'window.hop_snippets: expected integer >= 1, came "3"'),
        (
            "window.window_snippets=0",
            "window.window_snippets: expected integer >= 1 or null, came 0",
        ),
        ("window.ratio=1", "window.ratio: expected number > 0 and < 1, came 1"),
        ("window.ratio=.nan", "window.ratio: expected number > 0 and < 1, came NaN"),
        ("window.ratio=.inf", "window.ratio: expected number > 0 and < 1, came Infinity"),
        ("window=3", "window: expected group of settings, came 3"),
        ("thresholds=[]", "thresholds: expected list of number, length >= 1, came []"),
        ("thresholds=0.1", "thresholds: expected list of number, length >= 1, came 0.1"),
        ("thresholds=[0.1, x]", 'thresholds.1: expected a valid number, came "x"'),
        ("mining=all", 'mining: expected "attention" or "points", came "all"'),
        ("colour=green", 'colour: expected "red" or "blue", came "green"'),
        ("name=12", "name: expected text, came 12"),
        ("name=2026-01-01", None),  # a date in YAML; text for a text
        ("verbose=1", "verbose: expected true or false, came 1"),
        ("folder=7", "folder: expected path or null, came 7"),
    ],
)
def test_wrong_values_name_path_range_and_origin(assignment: str, message: str | None) -> None:
    if message is None:
        assert load_settings(Engine, assignments=[assignment]).name == "2026-01-01"
    else:
        assert complaint(None, assignment) == f"{message} (--set {assignment})"


def test_a_missing_setting_is_named() -> None:
    assert complaint(None, model=Run) == "data: expected path, came nothing"


def test_the_origin_is_the_file_unless_an_assignment_came_after(write: Any) -> None:
    file = write("window: {hop_snippets: 0}\n")
    wrong = "window.hop_snippets: expected integer >= 1, came 0"
    assert complaint(file) == f"{wrong} ({file})"
    assert complaint(file, "window.ratio=0.1") == f"{wrong} ({file})"
    assert (
        complaint(file, "window.hop_snippets=-1")
        == "window.hop_snippets: expected integer >= 1, came -1 (--set window.hop_snippets=-1)"
    )


def test_all_that_is_wrong_is_listed_at_once(write: Any) -> None:
    file = write("window: {hops_snippets: 0}\nverbos: true\n")
    assert complaint(file, "name=1").splitlines() == [
        "3 settings are wrong:",
        f"  window.hops_snippets: no such setting, did you mean window.hop_snippets? ({file})",
        "  name: expected text, came 1 (--set name=1)",
        f"  verbos: no such setting, did you mean verbose? ({file})",
    ]


def test_a_validator_of_the_group_speaks_for_itself() -> None:
    assert complaint(None, "verbose=true", "name=quiet") == (
        "verbose: expected false for the name 'quiet' (--set verbose=true, --set name=quiet)"
    )


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("verbose", "--set verbose: expected path=value"),
        ("=1", "--set =1: expected path=value"),
        ("window..ratio=1", "--set window..ratio=1: expected path=value"),
        ("thresholds=[1", "--set thresholds=[1: not a YAML value"),
        ("name=!!python/object/apply:os.getcwd []", "not a YAML value: could not determine"),
    ],
)
def test_an_assignment_that_cannot_be_read(assignment: str, message: str) -> None:
    assert message in complaint(None, assignment)


def test_an_assignment_into_a_value_is_refused() -> None:
    assert complaint(None, "window=3", "window.ratio=0.1") == (
        "2 settings are wrong:\n"
        "  --set window.ratio=0.1: window is not a group, it was given as 3 (--set window=3)\n"
        "  window: expected group of settings, came 3 (--set window=3)"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", ", line 2: 'name' is given twice"),
        ("- a\n", ": expected settings as 'name: value', came [\"a\"]"),
        ("1: a\n", ", line 1: expected a name, came 1"),
        ("window: {ratio: 1\n", ", line 2: "),
        ("name: !!python/name:os.system\n", ", line 1: could not determine a constructor"),
        ("window: &w\n  ratio: *w\n", ": Circular reference detected"),
        ("a: 1\n---\nb: 2\n", ", line 2: but found another document"),
    ],
)
def test_a_file_that_is_not_settings(write: Any, text: str, message: str) -> None:
    file = write(text)
    assert complaint(file).startswith(f"{file}{message}")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    assert complaint(missing) == f"{missing}: cannot be read: No such file or directory"
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert complaint(binary) == f"{binary}: expected YAML in UTF-8, came other bytes"


def test_the_error_belongs_to_the_tree() -> None:
    assert issubclass(SettingsError, HrproError)
    assert issubclass(SettingsError, ValueError)


def test_settings_are_frozen_finite_and_closed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Window().ratio = 0.1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="finite"):
        Window(ratio=math.nan)
    with pytest.raises(ValidationError, match="Extra inputs"):
        Window(hops=1)  # type: ignore[call-arg]


def test_describe_lists_every_setting_with_range_and_default() -> None:
    assert [tuple(row) for row in describe(Engine)] == [
        ("window.hop_snippets", "integer >= 1", "4", "new snippets in a window"),
        ("window.window_snippets", "integer >= 1 or null", "null", "length of a window"),
        ("window.ratio", "number > 0 and < 1", "0.5", ""),
        ("thresholds", "list of number, length >= 1", "[0.1, 0.2]", ""),
        ("mining", '"attention" or "points"', '"attention"', ""),
        ("colour", '"red" or "blue"', '"red"', ""),
        ("folder", "path or null", "null", ""),
        ("verbose", "true or false", "false", ""),
        ("name", "text", '"engine"', ""),
        ("limits", "map of integer", "{}", ""),
        ("spare", "group of settings or null", "null", ""),
        ("spare.hop_snippets", "integer >= 1", "2", "new snippets in a window"),
        ("spare.window_snippets", "integer >= 1 or null", "null", "length of a window"),
        ("spare.ratio", "number > 0 and < 1", "0.5", ""),
    ]
    assert [tuple(row) for row in describe(Run)] == [
        ("data", "path", "required", "the data set"),
        ("steps", "integer >= 1 and <= 100", "10", ""),
    ]


def test_every_described_default_can_be_set() -> None:
    rows = [row for row in describe(Engine) if not row.path.startswith("spare.")]
    assignments = [f"{row.path}={row.default}" for row in rows]
    assert load_settings(Engine, assignments=assignments) == Engine()
