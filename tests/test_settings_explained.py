"""The file with all settings: it says what each means, and changes nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import hrpro

from hrpro.engine.config import EngineConfig
from hrpro.engine.serve import BROUGHT_BY_BUNDLE
from hrpro.engine.settings import Settings, describe, explain, load_settings
from hrpro.training.config import TrainingConfig

MODELS = [EngineConfig, TrainingConfig]


def switched_on(text: str) -> str:
    """With the settings that were switched off: these have no space behind their "#", or two."""
    return re.sub(r"^#(?=[a-z]|  [a-z])", "", text, flags=re.MULTILINE)


def loaded(model: type[Settings], text: str, folder: Path) -> Settings:
    file = folder / "settings.yaml"
    file.write_text(text, encoding="utf-8")
    return load_settings(model, file)


@pytest.mark.parametrize("model", MODELS)
def test_a_file_with_all_settings_loads_to_the_defaults(
    model: type[Settings], tmp_path: Path
) -> None:
    assert loaded(model, explain(model), tmp_path) == model()


def test_so_does_one_whose_switched_off_settings_are_switched_on(tmp_path: Path) -> None:
    text = explain(EngineConfig, BROUGHT_BY_BUNDLE)
    assert text != explain(EngineConfig)
    assert loaded(EngineConfig, switched_on(text), tmp_path) == EngineConfig()
    changed = switched_on(text).replace("  event_start: 0.5", "  event_start: 0.6")
    assert loaded(EngineConfig, changed, tmp_path).localization.event_start == 0.6  # type: ignore[attr-defined]


@pytest.mark.parametrize("model", MODELS)
def test_every_setting_is_in_it_with_its_meaning(model: type[Settings]) -> None:
    text = explain(model)
    comments = re.sub(r"\s*\n\s*# ", " ", text)
    for row in describe(model):
        name = row.path.rpartition(".")[2]
        if row.type != "group of settings":
            assert re.search(rf"^ *{name}: {re.escape(row.default)}$", text, re.MULTILINE), row
        assert row.description in comments, row


def test_what_a_bundle_brings_stays_the_bundles(tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(explain(EngineConfig, BROUGHT_BY_BUNDLE))
    own = {"window": {"hop_snippets": 3}, "localization": {"completeness_weight": 0.125}}
    config = load_settings(EngineConfig, file, base=own)
    assert config.window.hop_snippets == 3
    assert config.localization.completeness_weight == 0.125


@pytest.mark.parametrize(("what", "model"), [("engine", EngineConfig), ("train", TrainingConfig)])
def test_the_command_prints_such_a_file(what: str, model: type[Settings], tmp_path: Path) -> None:
    said = hrpro("config", what, "--explain").stdout
    assert said.startswith(f"# Settings of hrpro {'serve' if what == 'engine' else 'train'}")
    assert loaded(model, said, tmp_path) == model()
