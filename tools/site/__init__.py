"""What the docs site adds to the Markdown in docs/: pages that follow from the code, and the tree of contents.

A page that is named in `GENERATED` is a file in docs/ with a title and an introduction, and reads on its own where
nobody builds the site; what follows from the registry, the command line or the committed results is put below it when
the site is built, and is kept nowhere.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from tools.site.api import api
from tools.site.commands import commands
from tools.site.components import component_pages, matrix
from tools.site.contents import outward, trees
from tools.site.identifiers import identifiers
from tools.site.papers import papers

GENERATED: Mapping[str, Callable[[], str]] = {
    "reference/attacks": partial(component_pages, "attack", "update_attack"),
    "reference/defences": partial(component_pages, "defence"),
    "reference/matrix": matrix,
    "reference/aggregators": partial(component_pages, "aggregator"),
    "reference/detectors": partial(component_pages, "detector", "monitor"),
    "reference/models": partial(component_pages, "model"),
    "reference/commands": commands,
    "reference/api": api,
    "reference/identifiers": identifiers,
    "reference/papers": papers,
}
"""What is put below a page, by the page."""


def setup(app: Any) -> dict[str, Any]:  # noqa: ANN401  (Sphinx is no dependency of the types)
    """Let pages be completed, and docstrings be read as they are written; Sphinx calls this when it starts."""
    app.connect("source-read", _completed)
    app.connect("autodoc-process-docstring", _plain_attributes, priority=400)  # before napoleon, at 500
    return {"parallel_read_safe": True, "version": "1"}


def _completed(app: Any, page: str, source: list[str]) -> None:  # noqa: ANN401
    """A page's Markdown with what is generated below it, and links that lead out of docs/ as downloads."""
    source[0] = outward(source[0], depth=page.count("/"))
    if page in GENERATED:
        source[0] += f"\n{GENERATED[page]()}"
    if page == app.config.root_doc:
        source[0] += f"\n{trees(source[0])}"


def _plain_attributes(app: Any, what: str, name: str, value: object, options: object, lines: list[str]) -> None:  # noqa: ANN401
    """What an attribute is, as it is written: napoleon would take words before a colon on the first line for its type.

    A field whose default is a function of torch would bring torch's page on it.
    """
    if what in {"attribute", "property", "data"}:
        lines.insert(0, "")
    elif what == "method" and str(getattr(value, "__module__", "")).startswith("torch."):
        lines.clear()
