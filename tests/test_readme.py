"""What README.md and docs/ say is true: the examples run, the commands exist, the links lead on."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from commands import (
    PATIENCE_S,
    Engine,
    command_lines,
    engine,
    environment,
    hrpro,
    program,
    published_in_process,
    words_of,
)
from driving import finals
from tiny_model import tiny_recording
from typer.main import get_command

from hrpro.clients.cli import app
from hrpro.engine.messages import ActionEvent
from hrpro.engine.settings import load_settings
from hrpro.training.config import TrainingConfig

if TYPE_CHECKING:
    from hrpro.export.bundle import Bundle

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    """The `hrpro` command lines of README and of what is in docs/."""
    return [line for document in DOCUMENTS for line in command_lines(document)]


# ---- the examples ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(bundle: Bundle) -> Iterator[Engine]:
    with engine(bundle.folder) as running_engine:
        yield running_engine


def test_the_examples_run_as_they_stand(bundle: Bundle, served: Engine, tmp_path: Path) -> None:
    recording = tiny_recording(150, seed=3)
    np.save(tmp_path / "recording.npy", recording)
    programs = {}
    for name in ("feeder", "subscriber"):
        text = program(README, name).replace("tcp://127.0.0.1:5555", served.feed)
        programs[name] = text.replace("tcp://127.0.0.1:5556", served.events)
    connected = "subscriber.wait_connected()"
    assert programs["subscriber"].count(connected) == 1
    # The only change: the feeder must not begin before the subscriber says so.
    programs["subscriber"] = programs["subscriber"].replace(
        connected, f"{connected}; print('connected', flush=True)"
    )
    options = {"cwd": tmp_path, "env": environment(), "text": True}
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", programs["subscriber"]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    ) as subscriber:
        try:
            assert subscriber.stdout is not None
            assert subscriber.stdout.readline() == "connected\n"
            feeder = subprocess.run(
                [sys.executable, "-W", "error", "-c", programs["feeder"]],
                check=False,
                capture_output=True,
                timeout=PATIENCE_S,
                **options,
            )
            heard, complaint = subscriber.communicate(timeout=PATIENCE_S)
        finally:
            subscriber.kill()
    assert (feeder.returncode, feeder.stderr) == (0, "")
    assert (subscriber.returncode, complaint) == (0, "")

    published = published_in_process(bundle.folder, {"cam1": recording})["cam1"]
    events = [each for each in published if isinstance(each, ActionEvent)]
    ends = [each for each in events if each.kind == "end"]
    assert len(ends) > 3
    assert feeder.stdout == f"{len(finals(published))} proposals, {len(events)} events\n"
    assert heard.splitlines() == [
        f"{each.label}: {each.start_s:.1f} to {each.end_s:.1f} s" for each in ends
    ]


# ---- the commands ------------------------------------------------------------------------------


def test_there_are_commands_to_check() -> None:
    named = {line.split()[1] for line in commands()}
    assert named >= {"train", "evaluate", "export", "stream-eval", "serve", "watch", "feed"}


@pytest.mark.parametrize("line", commands())
def test_a_command_line_of_the_readme_is_one(line: str) -> None:
    words = words_of(line)
    command = get_command(app)
    while hasattr(command, "commands"):  # a group, such as `hrpro feed`
        assert words[0] in command.commands, line
        command = command.commands[words.pop(0)]
    command.make_context(line, words)  # raises for an unknown option and for a missing one


@pytest.mark.parametrize(
    "command", ["train", "evaluate", "export", "stream-eval", "status", "streams", "drain"]
)
def test_these_commands_print_json(command: str) -> None:
    parameters = get_command(app).commands[command].params  # type: ignore[attr-defined]
    assert "--json" in {option for each in parameters for option in each.opts}


def test_settings_that_training_compares_are_there() -> None:
    text = (ROOT / "docs" / "TRAINING.md").read_text(encoding="utf-8")
    spans = re.findall(r"`([^`]+)`", re.sub(r"^    .*$", "", text, flags=re.MULTILINE))
    spans += re.findall(r"--row \"[^\":]*:([^\"]*)\"", text)
    named = [
        re.sub(r"^--set ", "", span).split()
        for span in spans
        if re.match(r"^(--set )?[a-z0-9_.]+=(?!\.\.\.)[^A-Z ]+( |$)", span.strip())
    ]
    assert len(named) > 15
    for assignments in named:
        load_settings(TrainingConfig, None, assignments)  # raises for what is no setting


def test_help_names_every_command() -> None:
    said = hrpro("--help").stdout
    for line in commands():
        assert f" {line.split()[1]} " in said


def test_the_tests_that_hold_the_promises_are_there() -> None:
    text = (ROOT / "docs" / "RELIABILITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    assert len(named) > 15
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test


# ---- the links ---------------------------------------------------------------------------------


def anchors(document: Path) -> set[str]:
    """What headings can be linked to as."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading).strip().lower() for heading in headings)
    return {heading.replace(" ", "-") for heading in words}


def links(document: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return sorted({target for target in targets if "://" not in target})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    assert links(document)
    for link in links(document):
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), f"{document.name}: {link}"
        assert target.is_relative_to(ROOT), f"{document.name}: {link} leaves the project"
        if anchor:
            assert anchor in anchors(target), f"{document.name}: {link}"
