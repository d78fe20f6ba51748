"""How numbers and names are written. Names come from the store and are not trusted: they are cleaned here, once."""

import math
import re
from collections.abc import Sequence

MISSING = "—"
"""Stands where there is no number."""

_SPREADSHEET_FORMULA = re.compile(r"^\s*[=+\-@]")
_MARKDOWN_MARK = re.compile(r"[\\`*\[\]|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def one_line(value: object) -> str:
    r"""Text on one line without control, bidirectional or other unprintable characters.

    >>> one_line("a\x1b[31m\n b")
    'a [31m b'
    """
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def spreadsheet_safe(text: str) -> str:
    """Text that a spreadsheet does not read as a formula.

    Args:
        text: An untrusted name; numbers must not come here.

    >>> spreadsheet_safe("=1+1")
    "'=1+1"
    """
    return f"'{text}" if _SPREADSHEET_FORMULA.match(text) else text


def markdown_safe(text: str) -> str:
    r"""Text that a Markdown table shows as it is.

    >>> markdown_safe("a|b <i> small_cnn")
    'a\\|b &lt;i&gt; small_cnn'
    """
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN_MARK.sub(lambda mark: f"\\{mark[0]}", text)


def file_stem(*names: str) -> str:
    """Names joined into something safe in a file name; may be the same for different names.

    >>> file_stem("digits", "../../etc")
    'digits-etc'
    """
    slugs = (re.sub(r"[^A-Za-z0-9_]+", "-", name)[:32].strip("-") for name in names)
    return "-".join(slug for slug in slugs if slug)


def number(value: object) -> float | None:
    """The value if it is a finite number, otherwise None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def decimal(value: float, digits: int = 1) -> str:
    """Rounded, and zero never negative.

    >>> decimal(-0.01)
    '0.0'
    """
    return f"{round(value, digits) + 0.0:.{digits}f}"


def points(fraction: float) -> str:
    """A difference of accuracies in percentage points, or an accuracy in percent.

    >>> points(0.182)
    '18.2'
    """
    return decimal(100 * fraction)


def with_spread(mean: float | None, std: float | None, digits: int = 1, *, scale: float = 1) -> str:
    """A mean with its standard deviation, or alone if that is None.

    >>> with_spread(0.5, 0.25, scale=100), with_spread(2, None), with_spread(None, None)
    ('50.0 ± 25.0', '2.0', '—')
    """
    if mean is None:
        return MISSING
    return decimal(scale * mean, digits) + ("" if std is None else f" ± {decimal(scale * std, digits)}")


def span(values: Sequence[float]) -> str:
    """Whole numbers as one figure, or as the range that they cover.

    >>> span([4, 4]), span([3, 7])
    ('4', '3 to 7')
    """
    if not values:
        return MISSING
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def noun_of(count: object, noun: str) -> str:
    """A noun in the singular after 1, otherwise in the plural.

    >>> noun_of(1, "seed"), noun_of("3 to 7", "batch"), noun_of(2, "class")
    ('seed', 'batches', 'classes')
    """
    return noun if str(count) == "1" else f"{noun}es" if noun in {"batch", "class"} else f"{noun}s"


def counted(count: object, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "batch"), counted("4", "batch")
    ('1 batch', '4 batches')
    """
    return f"{count} {noun_of(count, noun)}"


def out_of(part: int, total: int) -> str:
    """How many of some runs; the number alone if it is all of them.

    >>> out_of(2, 3), out_of(3, 3)
    ('2 of 3', '3')
    """
    return str(total) if part == total else f"{part} of {total}"


def with_step_noun(noun: str, text: str) -> str:
    """Words about batches, with the noun for what a step of the run takes in put in their place.

    Args:
        noun: What one step takes in: `batch`, or `round` of a federation.
        text: Our own words, never names from the store.

    >>> with_step_noun("round", "seconds a batch"), with_step_noun("round", "phase (batches)")
    ('seconds a round', 'phase (rounds)')
    """
    return text.replace("batches", noun_of(2, noun)).replace("batch", noun)


def listed(names: Sequence[str]) -> str:
    """Names in a sentence.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
