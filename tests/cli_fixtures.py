"""A run that is trained and a bundle that is exported once, by the commands, for all tests.

A plugin, not to be imported: `pytest_plugins = ("cli_fixtures",)`.
"""

from __future__ import annotations

import pytest
from commands import TRAINING, Trained, assignments, hrpro_json


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    # Imported here, as is all that needs torch.
    from hrpro.training.example import write_example_dataset

    folder = tmp_path_factory.mktemp("trained")
    data, run, bundle = folder / "data", folder / "run", folder / "bundle"
    write_example_dataset(data)
    summary = hrpro_json("train", data, "--out", run, *assignments(TRAINING))
    exported = hrpro_json("export", run, "--out", bundle)
    return Trained(data, run, bundle, summary, exported)
