"""A data set that is larger than the memory that training may take."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import environment

DIM, LENGTH, RECORDINGS = 64, 8_000, 80  # 2 MB each, 164 MB

# What is private to the process counts, not the maps of files: RLIMIT_DATA.
LIMITED = """
import resource, sys
from pathlib import Path
import torch
from hrpro.training.config import TrainingConfig
from hrpro.training.data import read_training_split
from hrpro.training.train import train

torch.set_num_threads(1)
weight = torch.ones(8, 8, requires_grad=True)
(weight @ weight).sum().backward()
torch.optim.Adam([weight]).step()  # the first one imports tens of megabytes
status = Path("/proc/self/status").read_text()
used = int(status.split("VmData:")[1].split()[0]) * 1024
allowed = used + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
config = TrainingConfig.model_validate({
    "threads": 1,
    "model": {"blocks": 1, "attention_past": 8, "instance_width": 16},
    "snippet_stage": {"steps": 3, "batch_size": 4, "crop_snippets": 64},
    "instance_stage": {"steps": 3, "batch_size": 32},
    "localization": {"thresholds": [0.2], "peak_gate": 0.0},
})
train(config, read_training_split(Path(sys.argv[1])), lambda *_: None, scratch=Path(sys.argv[1]))
print("trained")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts private memory on Linux")
def test_features_need_not_fit_into_memory(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    (tmp_path / "features" / "train").mkdir(parents=True)
    (tmp_path / "point_labels").mkdir()
    piece = random.normal(size=(LENGTH, DIM)).astype(np.float32)
    piece[100:110] += 3.0
    names = [f"r{number}" for number in range(RECORDINGS)]
    for name in names:
        np.save(tmp_path / "features" / "train" / f"{name}.npy", piece)
    (tmp_path / "split_train.txt").write_text("\n".join(names))
    with (tmp_path / "point_labels" / "p.csv").open("w", newline="") as file:
        rows = [("wave", name, 105 * 16) for name in names]
        csv.writer(file).writerows([("class", "video_id", "point"), *rows])

    allowed = 100_000_000  # over what torch takes for itself; the features alone are 164 MB
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), str(allowed)],
        check=False, capture_output=True, text=True, timeout=300, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "trained\n"
