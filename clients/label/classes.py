"""The classes of a data folder, in the order of their number keys; kept in classes.txt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from hrpro.engine.wire import HrproError, ProtocolError, checked
from hrpro.engine.wire import label as wire_label
from hrpro.training.data import known_classes
from hrpro.training.data_config import DataConfig
from hrpro.training.files import replaced_file


class ClassesError(HrproError, ValueError):
    """Classes that the data folder cannot have."""


class ClassFile:
    """Classes to choose from: those that are known, those of the points, then ``given`` ones.

    classes.txt is written when there are others than it lists. Raises ClassesError and DataError.
    """

    def __init__(
        self, folder: Path, config: DataConfig, used: Iterable[str], given: Sequence[str]
    ) -> None:
        self._path = folder / "classes.txt"
        self._preset = config.published.classes if config.published else None
        known = known_classes(folder, config) or ()
        self._classes = tuple(dict.fromkeys([*known, *sorted(set(used))]))
        if set(given) - set(self._classes):
            self.replace([*self._classes, *given])

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes; the first ten have number keys."""
        return self._classes

    def replace(self, labels: Sequence[str]) -> None:
        """Have just these classes, each once, and write them down."""
        classes = tuple(dict.fromkeys(_checked(label) for label in labels))
        if self._preset is not None and set(classes) != set(self._preset):
            raise ClassesError("the data set's preset has classes of its own: none can be changed")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(self._path) as temporary:
            temporary.write_text("".join(f"{each}\n" for each in classes), encoding="utf-8")
        self._classes = classes


def _checked(label: str) -> str:
    try:
        return str(checked("class", wire_label, label.strip()))
    except ProtocolError as error:
        raise ClassesError(str(error)) from None
