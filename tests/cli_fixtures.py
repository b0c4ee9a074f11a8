"""A run that is trained and a bundle that is exported once, by the commands, for all tests.

A plugin, not to be imported: `pytest_plugins = ("cli_fixtures",)`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import TRAINING, Trained, assignments, hrpro_json
from made_once import made_once

SUMMARY, EXPORTED = "train.json", "export.json"  # what the commands say


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = made_once(tmp_path_factory, "trained", train_and_export)
    summary, exported = (json.loads((folder / each).read_text()) for each in (SUMMARY, EXPORTED))
    return Trained(folder / "data", folder / "run", folder / "bundle", summary, exported)


def train_and_export(folder: Path) -> None:
    # Imported here, as is all that needs torch.
    from hrpro.training.example import write_example_dataset

    data, run, bundle = folder / "data", folder / "run", folder / "bundle"
    write_example_dataset(data)
    summary = hrpro_json("train", data, "--out", run, *assignments(TRAINING))
    assert summary.pop("run") == str(run)  # here, for each worker has a copy elsewhere
    (folder / SUMMARY).write_text(json.dumps(summary))
    exported = hrpro_json("export", run, "--out", bundle)
    (folder / EXPORTED).write_text(json.dumps(exported))
