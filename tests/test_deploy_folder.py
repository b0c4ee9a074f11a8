"""What deploy/ has for operators: it says what it should, and its command line serves.

Containers and services are not started here: there is no docker, podman or running systemd in a
test. What can be told from the files is, and the command of the service runs as a process.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import PATIENCE_S, environment, hrpro_json
from logged import logged_in
from tiny_model import DIM, tiny_recording
from typer.main import get_command

from hrpro.clients import EventSubscriber, FeatureFeeder
from hrpro.clients.cli import app
from hrpro.engine.config import EngineConfig
from hrpro.engine.settings import load_settings
from hrpro.export.bundle import Bundle

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
UNIT = DEPLOY / "hrpro-engine.service"
SETTINGS = DEPLOY / "engine.yaml"
NOBODY = 65534


def serve_options(words: list[str]) -> dict[str, Any]:
    """The options of a `hrpro serve` command line, without its `hrpro serve`; checked as such."""
    command = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    return dict(command.make_context("serve", list(words)).params)


# ---- the container -------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """Each instruction of the Containerfile with its arguments in one line."""
    lines = (DEPLOY / "Containerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    found = [line.split(maxsplit=1) for line in text.replace("\\\n", " ").splitlines() if line]
    return [(name, " ".join(rest.split())) for name, rest in found]


def values(instruction: str) -> list[str]:
    return [rest for name, rest in instructions() if name == instruction]


def last_stage() -> list[tuple[str, str]]:
    stages = [n for n, (name, _) in enumerate(instructions()) if name == "FROM"]
    return instructions()[stages[-1] :]


def test_all_instructions_are_known() -> None:
    known = {
        "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "VOLUME", "EXPOSE", "STOPSIGNAL",
        "HEALTHCHECK", "ENTRYPOINT", "CMD",
    }  # fmt: skip
    assert {name for name, _ in instructions()} <= known


def test_base_images_are_pinned() -> None:
    images = [each.split()[0] for each in values("FROM")]
    assert len(images) == 2 and len(set(images)) == 1
    assert re.fullmatch(r"[a-z.]+/library/python:3\.\d+\.\d+-slim-[a-z]+", images[0])


def test_all_of_the_package_is_copied() -> None:
    copied = {path.rstrip("/") for each in values("COPY") for path in each.split()[:-1]}
    root = DEPLOY.parent
    for path in copied - {"--from=build", "/opt/hrpro"}:
        assert (root / path).exists(), path
    assert copied >= {"clients", "engine", "export", "training", "pyproject.toml", "LICENSE"}


def test_it_runs_as_nobody_special_and_writes_nowhere_else_than_to_its_volume() -> None:
    stage = last_stage()
    (user,) = [rest for name, rest in stage if name == "USER"]
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user)
    after_user = stage[stage.index(("USER", user)) :]
    assert not {name for name, _ in after_user} & {"RUN", "COPY", "ADD"}
    (volumes,) = [json.loads(rest) for name, rest in stage if name == "VOLUME"]
    assert volumes == ["/var/cache/hrpro", "/var/lib/hrpro"]
    assert any("install -d -o hrpro /var/cache/hrpro /var/lib/hrpro" in rest for _, rest in stage)
    (variables,) = values("ENV")
    assert "PYTHONDONTWRITEBYTECODE=1" in variables.split()


def test_its_command_line_serves_and_is_asked_how_it_is() -> None:
    (entry,), (rest,) = values("ENTRYPOINT"), values("CMD")
    command = json.loads(entry) + json.loads(rest)  # the form without a shell, so signals arrive
    assert command[:2] == ["hrpro", "serve"]
    options = serve_options(command[2:])
    assert options["bundle"] == Path("/bundle")
    assert values("STOPSIGNAL") == ["SIGTERM"]
    (exposed,) = values("EXPOSE")
    addresses = [options[side] for side in ("feed", "events", "control", "metrics")]
    assert [address.rpartition(":")[2] for address in addresses] == exposed.split()
    (health,) = values("HEALTHCHECK")
    assert f"http://127.0.0.1:{addresses[3].rpartition(':')[2]}/healthz" in health
    assert f"{SETTINGS.relative_to(DEPLOY.parent)} {options['config']}" in values("COPY")


def health_check(port: str) -> int:
    (health,) = values("HEALTHCHECK")
    program = json.loads(health[health.index("[") :])
    assert program[:2] == ["python", "-c"]
    code = program[2].replace(":9100/", f":{port}/")
    return subprocess.run(
        [sys.executable, "-c", code], check=False, stderr=subprocess.DEVNULL
    ).returncode


# ---- the service ---------------------------------------------------------------------------------


def unit() -> dict[str, list[str]]:
    """The settings of the service, each with all its values."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def test_the_service_is_confined() -> None:
    service = unit()
    assert service["DynamicUser"] == service["NoNewPrivileges"] == ["yes"]
    assert service["ProtectSystem"] == ["strict"]
    assert service["CapabilityBoundingSet"] == [""]
    assert service["Restart"] == ["on-failure"]
    assert "User" not in service and "WatchdogSec" not in service


def test_who_stops_the_engine_waits_for_its_drain() -> None:
    config = load_settings(EngineConfig, SETTINGS)
    (stop_s,) = unit()["TimeoutStopSec"]
    # A request to Triton may be on its way, and a turn of the loop may have begun.
    assert int(stop_s) >= config.drain_s + config.triton.deadline_s + 10
    container = (DEPLOY / "Containerfile").read_text()
    (container_s,) = re.findall(r"--stop-timeout (\d+)", container)
    assert int(container_s) == int(stop_s)


needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here"
)


@needs_systemd
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    # It wants to find the program.
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/hrpro/bin/hrpro", sys.executable))
    said = subprocess.run(
        ["systemd-analyze", "verify", str(copy)], check=False, capture_output=True, text=True
    )
    complaints = [line for line in said.stderr.splitlines() if UNIT.name in line]
    assert (said.returncode, complaints) == (0, [])


@needs_systemd
def test_systemd_finds_little_exposed() -> None:
    said = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(UNIT)],
        check=False,
        capture_output=True,
        text=True,
    )
    if "Overall exposure" not in said.stdout:
        pytest.skip(f"this systemd cannot judge a file: {said.stderr.strip()}")
    (exposure,) = re.findall(r"exposure level for \S+: ([\d.]+)", said.stdout)
    assert float(exposure) <= 2.0


# ---- its command as a process --------------------------------------------------------------------


@pytest.fixture
def installed(bundle: Bundle) -> Iterator[Path]:
    """A folder that others can read, with a bundle and the settings, and one they can write to."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        shutil.copytree(bundle.folder, folder / "bundle")
        shutil.copy(SETTINGS, folder / "engine.yaml")
        for each in (folder, *folder.rglob("*")):
            each.chmod(0o555 if each.is_dir() else 0o444)
        folder.chmod(0o755)
        (folder / "state").mkdir()
        (folder / "state").chmod(0o777)
        folder.chmod(0o555)
        yield folder
        for each in (folder, folder / "bundle"):
            each.chmod(0o755)


def unprivileged() -> tuple[list[str], dict[str, Any]]:
    """A prefix and options that let a command be nobody, where this may be.

    Where python is in a folder that nobody cannot read, it is let read all, but write nothing more.
    """
    if os.geteuid() != 0:
        return [], {}
    options = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    reads = "-all,+dac_read_search"
    prefix = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    prefix += [f"--inh-caps={reads}", f"--ambient-caps={reads}"]
    for way in (([], options), (prefix, {})):
        with contextlib.suppress(OSError):
            program = [*way[0], sys.executable, "-c", "import hrpro.clients"]
            tried = subprocess.run(program, check=False, stderr=subprocess.DEVNULL, **way[1])
            if tried.returncode == 0:
                return way
    return [], {}


def command(installed: Path) -> list[str]:
    """The service's own, with other places and free ports."""
    program, serve, *rest = shlex.split(unit()["ExecStart"][0])
    assert (Path(program).name, serve) == ("hrpro", "serve")
    places = {
        "/opt/hrpro/bundle": str(installed / "bundle"),
        "/etc/hrpro/engine.yaml": str(installed / "engine.yaml"),
        "/var/lib/hrpro": str(installed / "state"),
    }
    assert places.keys() <= set(rest)
    words = [re.sub(r"^(tcp://)?127\.0\.0\.1:\d+$", r"\g<1>127.0.0.1:0", each) for each in rest]
    words = [places.get(word, word) for word in words]
    return [sys.executable, "-m", "hrpro.clients.cli", "serve", *words, "--json"]


def test_the_services_command_runs_without_privileges_and_leaves(installed: Path) -> None:
    prefix, options = unprivileged()
    process = subprocess.Popen(
        [*prefix, *command(installed)],
        cwd=installed,
        env={**environment(), "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        ready = json.loads(line)
        status = Path(f"/proc/{process.pid}/status")
        if (prefix or options) and status.exists():
            assert f"Uid:\t{NOBODY}\t{NOBODY}\t" in status.read_text()
        base = ready["metrics"].removesuffix("/metrics")
        for path in ("healthz", "readyz"):
            with urllib.request.urlopen(f"{base}/{path}", timeout=PATIENCE_S) as answer:
                assert answer.status == 200
        assert health_check(base.rpartition(":")[2]) == 0
        with (
            EventSubscriber(ready["events"]) as subscriber,
            FeatureFeeder(ready["feed"], "cam", DIM) as feeder,
        ):
            subscriber.wait_connected(PATIENCE_S)
            feeder.send(tiny_recording(60))
            feeder.flush()
            heard = subscriber.receive(PATIENCE_S)
            assert heard is not None
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
        assert heard in logged_in(installed / "state")
        assert health_check(base.rpartition(":")[2]) != 0
    finally:
        process.kill()
        process.communicate()
    assert {path.name for path in installed.iterdir()} == {"bundle", "engine.yaml", "state"}


def test_the_sample_settings_are_the_defaults_that_it_says(bundle: Bundle) -> None:
    given = yaml.safe_load(SETTINGS.read_text())
    defaults = EngineConfig().model_dump(mode="json")
    assert given == {name: defaults[name] for name in given}
    assert hrpro_json("serve", bundle.folder, "--config", SETTINGS, "--check")["ok"]
