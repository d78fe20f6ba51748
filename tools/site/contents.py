"""The tree of contents: the lists of links on the front page are it, so that it is written once."""

import re

_LINK = re.compile(r"^- \[[^\]]+\]\(([\w/.-]+)\.(?:md|ipynb)\)", re.MULTILINE)
"""An item of a list that begins with a link to a page."""


def trees(front_page: str) -> str:
    """A hidden toctree for every section of the front page that lists pages.

    Args:
        front_page: Markdown; sections begin with `## `.

    Returns:
        Directives, as MyST reads them.
    """
    sections = re.split(r"^## ", front_page, flags=re.MULTILINE)[1:]
    listed = [(section.partition("\n")[0].strip(), _LINK.findall(section)) for section in sections]
    return "\n".join(
        "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""])
        for caption, pages in listed
        if pages
    )


def outward(page: str, *, depth: int) -> str:
    """A page in which each link to a Markdown file outside docs/ is a download, as Sphinx has no page of it.

    Args:
        page: Markdown.
        depth: How many folders below docs/ it lies.
    """
    out = re.escape("../" * (depth + 1))
    return re.sub(rf"\[([^\]]+)\]\(({out}(?!\.\.)[^)#]+\.md)\)", r"{download}`\1 <\2>`", page)
