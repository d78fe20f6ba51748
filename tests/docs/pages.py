"""Pages of the docs as programs: their Python is run in one namespace a page, their commands and recipes are tried.

What a reader does not see, in HTML comments:

    <!--- invisible-code-block: python      set-up that a reader has anyway: a model, a loader, a folder
    <!--- skip: next if(...) --->           a block that needs a library which is not installed
    <!-- parsed: why -->                    above a block of commands: they are not run, their arguments are checked
"""

import importlib.util
import itertools
import re
import shlex
import sys
import tomllib
import traceback
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import SkipTest

import pytest
import torch
import typer
from sybil import Document, Example
from sybil.parsers.myst import CodeBlockParser, PythonCodeBlockParser, SkipParser
from sybil.typing import Parser

from mithridate.cli import app as cli
from mithridate.core import registry
from tests.command import invoke

ROOT = Path(__file__).parents[2]

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*/README.md")])

_PARSED = re.compile(r"<!-- parsed: \S.* -->\s*\Z")
_SHELL = ("sh", "bash")


class Broken(AssertionError):
    """An example of a page that does not do what the page says; the message begins with file and line."""


def run_page(path: Path, folder: Path) -> Counter[str]:
    """Run every example of a page, in the order of the page and one namespace.

    Args:
        path: Markdown.
        folder: An empty one, in which the examples find themselves.

    Returns:
        How many blocks and command lines there were, by what became of them.

    Raises:
        Broken: The first example that fails.
    """
    counts: Counter[str] = Counter()
    parsers: list[Parser] = [PythonCodeBlockParser(), CodeBlockParser("toml", _toml), SkipParser()]
    parsers += [CodeBlockParser(language, lambda example: _shell(example, counts)) for language in _SHELL]
    document = Document.parse(str(path), *parsers)
    module = ModuleType("page")  # so that a class of the page has a module in which its names are looked up
    document.namespace = module.__dict__
    document.namespace |= {"ROOT": ROOT, "importlib": importlib}
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.chdir(folder)
        patch.setenv("HOME", str(folder))  # an example must not reach the user's own files
        patch.setitem(sys.modules, module.__name__, module)
        patch.setattr(registry, "_entries", {kind: registry.entries(kind) for kind in registry.KINDS})
        for example in document.examples():
            counts[_evaluated(example, path)] += 1
    return counts


def _evaluated(example: Example, path: Path) -> str:
    kind = str(example.region.lexemes.get("arguments", "skip") if example.region.lexemes else "skip")
    try:
        example.evaluate()
    except SkipTest:
        return f"{kind}, skipped"
    except Exception as error:
        inside = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = inside[-1] if inside else getattr(error, "lineno", None) or example.line
        where = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        raise Broken(f"{where}:{line}: {type(error).__name__}: {error}") from error
    return kind


def _toml(example: Example) -> None:
    """A block of TOML can be read, and the examples that follow find its text under the name `toml`."""
    example.namespace["toml"] = str(example.parsed)
    tomllib.loads(example.parsed)


def _shell(example: Example, counts: Counter[str]) -> None:
    """Commands of this library are run, or their arguments checked; scripts that others name are there."""
    only_parsed = bool(_PARSED.search(example.document.text[: example.region.start]))
    for command in str(example.parsed).replace("\\\n", " ").splitlines():
        words = shlex.split(command, comments=True)
        if words[:1] == ["mithridate"]:
            counts["commands, parsed" if only_parsed else "commands, run"] += 1
            for form in forms(command) if only_parsed else [words[1:]]:
                check(form) if only_parsed else _run(form)
        elif words[:1] == ["python"]:
            place = ROOT / words[2].replace(".", "/") if words[1] == "-m" else ROOT / words[1]
            if not place.exists():
                raise FileNotFoundError(f"{' '.join(words)}: there is no {place.relative_to(ROOT)}.")


def _run(words: list[str]) -> None:
    result = invoke(*words)
    if result.code:
        raise AssertionError(f"mithridate {shlex.join(words)} ended with {result.code}: {result.err or result.out}")


def forms(command: str) -> list[list[str]]:
    """The arguments that a line of a manual stands for.

    Args:
        command: With a comment, `[what may be left out]`, `one|or|the other`, and `...` where more may follow.

    Returns:
        One list for each choice, with everything that may be left out.
    """
    words = shlex.split(
        re.sub(r"(?<!\S)\[(?=[A-Za-z-])|(?<=[A-Z])\]|\](?=[\s\].]|$)|\.\.\.", "", command), comments=True
    )
    lines, rest = [], words[1:]
    while "|" in rest:  # the same command with other options
        end = rest.index("|")
        lines.append(rest[:end])
        rest = [*itertools.takewhile(lambda word: not word.startswith("-"), rest[:end]), *rest[end + 1 :]]
    lines.append(rest)
    return [list(choice) for line in lines for choice in itertools.product(*(word.split("|") for word in line))]


def check(words: list[str]) -> None:
    """Raise what the command line would say of its arguments.

    Args:
        words: After `mithridate`.
    """
    root: Any = typer.main.get_command(cli.app)
    if words[0] in {option for parameter in root.params for option in parameter.opts}:
        return
    if words[0] not in root.commands:
        raise ValueError(f"there is no command 'mithridate {words[0]}'.")
    try:
        root.commands[words[0]].make_context(words[0], words[1:])
    except Exception as error:  # of click, or of the click that newer versions of typer hold
        said = error.format_message() if hasattr(error, "format_message") else error
        raise ValueError(f"mithridate {shlex.join(words)}: {said}") from error
