"""The page's colours can be read: contrast of every text and every line with what it stands on, in both modes."""

import re
from importlib.resources import files

import pytest

from mithridate.report.figures.drawing import PALETTE

CSS = files("mithridate.report").joinpath("page.css").read_text(encoding="utf-8")
BACKGROUNDS = ("paper", "tint")
TEXTS = ("ink", "soft", "link", "serious", "caution", "note", "good")

LINES = ("ink", "blue", "orange", "red", "green", "pink", "sky", "edge", "faint")
"""Colours of figures that carry what is shown."""

LEAST = 4.5
"""WCAG 2.2, 1.4.3, for text of normal size."""

LEAST_OF_LINES = 3.0
"""WCAG 2.2, 1.4.11, for graphical objects."""


def palette(mode: str) -> dict[str, tuple[float, ...]]:
    """Colours by name, of a mode; what dark mode does not change is as in light mode."""
    blocks = re.findall(r":root \{(.*?)\}", CSS, flags=re.DOTALL)
    light, dark = blocks[0], re.findall(r"dark\) \{\s*:root \{(.*?)\}", CSS, flags=re.DOTALL)[0]
    colours = dict(re.findall(r"--(\w+): #([0-9a-f]{6})", light))
    colours |= dict(re.findall(r"--(\w+): #([0-9a-f]{6})", dark)) if mode == "dark" else {}
    return {name: tuple(int(c[i : i + 2], 16) / 255 for i in (0, 2, 4)) for name, c in colours.items()}


def luminance(colour: tuple[float, ...]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_guideline() -> None:
    assert contrast((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)) == pytest.approx(21)


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_text_can_be_read(mode: str, text: str, background: str) -> None:
    colours = palette(mode)
    assert contrast(colours[text], colours[background]) >= LEAST


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("background", ["paper", "shade"])
def test_every_line_of_a_figure_stands_out(mode: str, line: str, background: str) -> None:
    colours = palette(mode)
    assert contrast(colours[line], colours[background]) >= LEAST_OF_LINES


def test_the_page_has_every_colour_of_the_figures_and_their_files_are_the_light_ones() -> None:
    light, dark = palette("light"), palette("dark")
    assert {*LINES, "grid", "shade", "paper"} == set(PALETTE)
    for name, colour in PALETTE.items():
        assert name in dark
        if name not in {"ink", "paper"}:  # the page's ink is a little softer than a file's black
            assert tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)) == light[name]
