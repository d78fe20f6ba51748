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
    """A page whose links out of docs/ fit the site, which has no page of what lies there.

    Args:
        page: Markdown.
        depth: How many folders below docs/ it lies.

    Returns:
        Links to Markdown files are downloads, and those to folders are their words alone.
    """
    out = re.escape("../" * (depth + 1)) + r"(?!\.\.)"
    page = re.sub(rf"\[([^\]]+)\]\(({out}[^)#]+\.md)\)", r"{download}`\1 <\2>`", page)
    return re.sub(rf"\[([^\]]+)\]\({out}[\w/-]+\)", r"\1", page)
