"""The files of an audit: audit.json is the truth, and the others follow from it alone."""

from collections.abc import Callable, Mapping
from pathlib import Path

from mithridate.audit.output.junit import junit
from mithridate.audit.output.markdown import markdown
from mithridate.audit.output.page import page
from mithridate.audit.output.sarif import sarif
from mithridate.audit.result import Audited
from mithridate.core.files import locked, write_whole

LOCK = ".audit.lock"

FORMS: Mapping[str, Callable[[Audited], str]] = {
    "audit.html": page,
    "audit.md": markdown,
    "audit.xml": junit,
    "audit.sarif": sarif,
    "audit.json": lambda audited: audited.model_dump_json(indent=1),
}
"""By the name of the file; the truth comes last, so that where it stands the others do."""


def write_outputs(audited: Audited, folder: Path) -> None:
    """Write every file, each whole or not at all.

    Args:
        audited: The audit.
        folder: Where; made if missing.

    Raises:
        WriteError: The file system refuses.
    """
    texts = {name: form(audited) for name, form in FORMS.items()}
    with locked(folder / LOCK):
        for name, text in texts.items():
            write_whole(folder / name, text)
