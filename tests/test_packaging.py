"""The package as it is installed: complete, under one name, and nothing generic beside it."""

from __future__ import annotations

import importlib.util
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
from commands import hrpro
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("clients", "engine", "export", "training")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def installed() -> Distribution:
    try:
        found = distribution("hrpro-stream")
    except PackageNotFoundError:
        pytest.skip("hrpro-stream is not installed here: the wheel was not looked at")
    if Path(str(found.locate_file(""))).resolve() == ROOT:
        pytest.skip("hrpro-stream is only found as a source tree: the wheel was not looked at")
    return found


def test_every_folder_with_modules_is_packaged(project: dict[str, Any]) -> None:
    there = {
        "hrpro." + ".".join(module.parent.relative_to(ROOT).parts)
        for folder in FOLDERS
        for module in (ROOT / folder).rglob("*.py")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == there


def test_every_part_is_typed_and_says_what_it_is() -> None:
    for folder in FOLDERS:
        assert (ROOT / folder / "py.typed").is_file()
        assert (ROOT / folder / "__init__.py").read_text(encoding="utf-8").startswith('"""')


def test_the_wheel_holds_every_file_and_only_hrpro(installed: Distribution) -> None:
    files = {Path(str(file)) for file in installed.files or ()}
    tops = {file.parts[0] for file in files if ".." not in file.parts}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"hrpro"}
    sources = {
        Path("hrpro") / path.relative_to(ROOT)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc" and ROOT / "clients" / "js" not in path.parents
    }
    assert {file for file in files if file.parts[0] == "hrpro" and file.suffix != ".pyc"} == sources


def test_the_tests_run_against_the_wheel(installed: Distribution) -> None:
    spec = importlib.util.find_spec("hrpro.engine")
    assert spec is not None
    assert Path(str(spec.origin)) == installed.locate_file("hrpro/engine/__init__.py")
    for folder in FOLDERS:
        assert importlib.util.find_spec(folder) is None, f"{folder} can be imported bare"


def test_the_command_says_its_version(project: dict[str, Any], installed: Distribution) -> None:
    assert hrpro("--version").stdout == f"hrpro-stream {project['project']['version']}\n"


@pytest.mark.parametrize(
    ("platform", "machine", "build"),
    [
        ("linux", "x86_64", "onnxruntime-gpu"),
        ("win32", "AMD64", "onnxruntime-gpu"),
        ("linux", "aarch64", "onnxruntime"),
        ("win32", "ARM64", "onnxruntime"),
        ("darwin", "x86_64", "onnxruntime"),
        ("darwin", "arm64", "onnxruntime"),
    ],
)
def test_each_platform_gets_one_onnxruntime(
    project: dict[str, Any], platform: str, machine: str, build: str
) -> None:
    environment = {"sys_platform": platform, "platform_machine": machine}
    wanted = [
        requirement.name
        for requirement in map(Requirement, project["project"]["dependencies"])
        if requirement.name.startswith("onnxruntime")
        and (requirement.marker is None or requirement.marker.evaluate(environment))
    ]
    assert wanted == [build]


def test_what_is_wanted_is_pinned(project: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    versions = {pin.name.lower().replace("_", "-"): str(pin.specifier)[2:] for pin in pins}
    assert len(versions) == len(pins)
    extras = project["project"]["optional-dependencies"].values()
    for text in [
        *project["project"]["dependencies"],
        *(text for extra in extras for text in extra),
    ]:
        requirement = Requirement(text)
        assert versions[requirement.name.lower()] in requirement.specifier, text
