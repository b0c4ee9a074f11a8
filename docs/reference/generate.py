"""What the site has that no page says: the reference, from the code, and the files linked to.

A page has `<!-- generated: NAME -->` where the part of that name belongs; the parts are made
whenever the site is built. Pages are written for the repository, where links may leave docs/; here
such a link leads to a copy of the file: a page where it is one, else plain text.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType, SimpleNamespace
from typing import Any

from markdown.extensions.toc import slugify
from properdocs.config.defaults import ProperDocsConfig
from properdocs.exceptions import PluginError
from properdocs.structure.files import File, Files
from properdocs.structure.pages import Page
from pygments.formatters import HtmlFormatter

import hrpro.clients
import hrpro.clients.testing
from hrpro.engine.config import EngineConfig
from hrpro.engine.feeds import Counters
from hrpro.engine.metrics import DEPLOY_REFUSED, Metrics
from hrpro.engine.settings import Settings, describe
from hrpro.engine.timebase import SnippetClock
from hrpro.engine.wire import ERROR_CODES, LATER_CODES, RECOVERABLE_CODES
from hrpro.training.config import TrainingConfig

ROOT = Path(__file__).resolve().parents[2]
# Files beside docs/ that are pages of the site, too; a README.md would be an index.
PAGES = {"README.md": "overview.md", "SECURITY.md": "SECURITY.md", "CHANGELOG.md": "CHANGELOG.md"}
_LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)\s#]+)")
_NUMBERED = re.compile(r"(?<=\]\()([^)\s#]*)#(?=\d)")
_PLACE = re.compile(r"<!-- generated: ([\w-]+) -->")


# ---- the build ---------------------------------------------------------------------------------


def on_config(config: ProperDocsConfig) -> ProperDocsConfig:
    """Headings that begin with a number have a letter before it: the theme wants CSS selectors."""

    def slug(text: str, separator: str) -> str:
        made = slugify(text, separator)
        return f"section-{made}" if made[:1].isdigit() else made

    config.mdx_configs["toc"]["slugify"] = slug
    return config


def on_files(files: Files, config: ProperDocsConfig) -> Files:
    """The pages and files beside docs/, and the colours of code."""
    for name, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    for page in files.documentation_pages():
        for target in _LINK.findall(page.content_string):
            path = _in_repository(page.src_uri, target)
            uri = _in_site(path)
            if uri.startswith("source/") and files.get_file_from_path(uri) is None:
                if not (ROOT / path).is_file():
                    raise PluginError(f"{page.src_uri}: '{target}' is no file of the project")
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, "code.css", content=_code_colours()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """The page as the site has it."""
    here = page.file.src_uri

    def link(match: re.Match[str]) -> str:
        target = _in_site(_in_repository(here, match[0]))
        return os.path.relpath(target, PurePosixPath(here).parent)

    def part(match: re.Match[str]) -> str:
        if match[1] not in GENERATED:
            raise PluginError(f"{here}: expected one of {', '.join(GENERATED)}, got '{match[1]}'")
        return GENERATED[match[1]]()

    return _PLACE.sub(part, _NUMBERED.sub(r"\1#section-", _LINK.sub(link, markdown)))


def _in_repository(page_uri: str, target: str) -> str:
    """The path from the root of what a page links to."""
    is_beside = page_uri in PAGES.values()
    folder = PurePosixPath() if is_beside else PurePosixPath("docs", page_uri).parent
    return os.path.normpath(folder / target)


def _in_site(path: str) -> str:
    """Where the site has a file of the repository."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/") and not path.endswith(".py"):
        return path.removeprefix("docs/")
    return f"source/{path}.txt"


def _code_colours() -> str:
    """Of Pygments' classes, on light and on dark ground."""
    light, dark = (
        HtmlFormatter(style=style).get_style_defs(f"[data-bs-theme={ground}] .codehilite")
        for ground, style in (("light", "default"), ("dark", "github-dark"))
    )
    return f"{light}\n{dark}\n.codehilite {{ background: none !important; }}\n"


# ---- the reference -----------------------------------------------------------------------------


def command_line() -> str:
    """Every command with its arguments and options, as typer documents them."""
    told = subprocess.run(
        [sys.executable, "-m", "typer", "hrpro.clients.cli", "utils", "docs", "--name", "hrpro"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    told = told[told.index("\n## ") :]  # each page has a title of its own
    told = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+", "", told)  # cut off in mid-sentence
    return re.sub(r"(\*\*Options\*\*:\n\n)?\* `--help`.*\n", "", told)


def settings(model: type[Settings]) -> str:
    """A table for each group of settings."""
    groups: dict[str, list[str]] = {"": []}
    for row in describe(model):
        group = row.path.rpartition(".")[0]
        cells = (f"`{row.path}`", row.type, f"`{row.default}`", row.description)
        groups.setdefault(group, []).append(_row(*cells))
    return "\n".join(
        f"## {f'`{group}`' if group else 'General'}\n\n"
        + _table(("setting", "type", "default", "meaning"), rows)
        for group, rows in groups.items()
    )


def python_api() -> str:
    """What `hrpro.clients` exports, and what it has for tests: signatures and docstrings."""
    exported = sorted(hrpro.clients.__all__, key=str.lower)
    testing = hrpro.clients.testing
    own = [name for name, each in vars(testing).items() if _is_public(name, each, testing)]
    parts = [_described(name, getattr(hrpro.clients, name)) for name in exported]
    return "\n".join(
        parts + [_described(f"testing.{each}", getattr(testing, each)) for each in own]
    )


def _is_public(name: str, thing: object, module: ModuleType) -> bool:
    return not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__


def _described(name: str, thing: Any) -> str:
    # Exceptions have the signature of Exception, which inspect cannot tell.
    signed = not (inspect.isclass(thing) and issubclass(thing, Exception))
    parts = [f"## `{name}`", *([_signature(thing.__name__, thing)] if signed else [])]
    parts.append(inspect.getdoc(thing) or "")
    if inspect.isclass(thing):
        parts += _members(thing)
    return "\n\n".join(parts) + "\n"


def _members(cls: type) -> Iterator[str]:
    """Public methods and properties, in the order of their definition, those of bases first.

    What a message has from the protocol's own base class is of no use to a reader.
    """
    own_fields = {field.name for field in fields(cls)} if is_dataclass(cls) else set()
    names = dict.fromkeys(
        name
        for base in reversed(cls.__mro__)
        if base is cls or base.__module__.startswith("hrpro.clients")
        for name in vars(base)
        if not name.startswith("_")
    )
    for name in names:
        member = inspect.getattr_static(cls, name)
        said = inspect.getdoc(member)
        if name in own_fields or not said:
            continue
        if isinstance(member, property):
            yield f"### `{cls.__name__}.{name}`\n\n{said}"
        elif inspect.isroutine(member):
            yield f"### `{cls.__name__}.{name}`\n\n{_signature(name, getattr(cls, name))}\n\n{said}"


def _signature(name: str, thing: Callable[..., Any]) -> str:
    signature = inspect.signature(thing)
    parameters = [
        str(each.replace(annotation=_Verbatim(each.annotation)))
        for each in signature.parameters.values()
        if each.name not in ("self", "cls")
    ]
    result = signature.return_annotation
    after = "" if inspect.isclass(thing) or result is signature.empty else f" -> {result}"
    line = f"{name}({', '.join(parameters)}){after}"
    if len(line) > 88:
        line = "{}(\n    {},\n){}".format(name, ",\n    ".join(parameters), after)
    return f"```python\n{line}\n```"


class _Verbatim(str):
    """An annotation as it is written, for inspect to show without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def metrics() -> str:
    """The families of an engine that serves, as Prometheus is told them."""
    measured = Metrics()
    nobody = SimpleNamespace(previous=None, canary=None)
    nobody.current = SimpleNamespace(provider="", bundle_id="")
    measured.watch(
        SimpleNamespace(instance="", counters=Counters(), refused=Counter(), state="serving"),
        SimpleNamespace(deployments=nobody, streams={}, snippets_scored=0, clock=SnippetClock()),
    )
    rows = []
    for family in sorted(measured.registry.collect(), key=lambda family: family.name):
        if family.name.startswith("process_"):
            continue
        names = {"counter": "_total", "info": "_info"}
        labels = sorted({key for sample in family.samples for key in sample.labels} - {"le"})
        name = f"`{family.name}{names.get(family.type, '')}`"
        rows.append(_row(name, family.type, ", ".join(labels), family.documentation))
    return _table(("metric", "kind", "labels", "meaning"), rows)


def error_codes() -> str:
    """What engines refuse with."""
    then = dict.fromkeys(RECOVERABLE_CODES, "says Hello, and goes on")
    then |= dict.fromkeys(LATER_CODES, "waits a moment, then the same")
    then[DEPLOY_REFUSED] = "does not get it: it answers a deploy"
    rows = [
        _row(f"`{code}`", meaning, then.get(code, "raises `StreamError`"))
        for code, meaning in ERROR_CODES.items()
    ]
    return _table(("code", "meaning", "`FeatureFeeder`"), rows)


def _table(titles: tuple[str, ...], rows: list[str]) -> str:
    return "\n".join([_row(*titles), _row(*("---" for _ in titles)), *rows]) + "\n"


def _row(*cells: str) -> str:
    escaped = (" ".join(cell.split()).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


GENERATED: dict[str, Callable[[], str]] = {
    "command-line": command_line,
    "engine-settings": lambda: settings(EngineConfig),
    "training-settings": lambda: settings(TrainingConfig),
    "python": python_api,
    "metrics": metrics,
    "error-codes": error_codes,
}
