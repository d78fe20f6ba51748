"""Every example of README, docs and examples does what the page says."""

from pathlib import Path

import pytest

pytest.importorskip("sybil", reason="sybil is not installed")

from tests.docs.pages import PAGES, ROOT, Broken, check, forms, run_page

SLOW = {
    "docs/howto/simulate.md": "a burn-in and 250 rounds",
    "docs/howto/hugging-face.md": "imports transformers",
    "docs/howto/lightning.md": "imports Lightning",
    "docs/howto/own-data.md": "two runs and their reports",
    "docs/howto/own-component.md": "all checks of a component",
    "docs/howto/plugin.md": "four runs and their report",
    "docs/howto/resume.md": "two commands and their reports",
    "docs/howto/sweep.md": "three commands, one of them with processes of its own",
}
"""Pages that take more than a few seconds, and why."""


def names(*, slow: bool) -> list[str]:
    return [name for path in PAGES if ((name := str(path.relative_to(ROOT))) in SLOW) == slow]


@pytest.mark.slow  # all of them together
@pytest.mark.parametrize("name", names(slow=False))
def test_a_page(name: str, tmp_path: Path) -> None:
    run_page(ROOT / name, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of Lightning and transformers, about torch
@pytest.mark.parametrize("name", names(slow=True))
def test_a_page_that_takes_longer(name: str, tmp_path: Path) -> None:
    run_page(ROOT / name, tmp_path)


@pytest.mark.parametrize(
    ("block", "line", "said"),
    [
        ("```python\nx = 1\n\nassert x == 2, 'two'\n```\n", 6, "two"),
        ("```python\nx = (\n```\n", 4, "SyntaxError"),
        ("```toml\na = = 1\n```\n", 3, "TOMLDecodeError"),
        ("```sh\nmithridate list defences gaet\n```\n", 3, "nearest"),
        ("<!-- parsed: long -->\n```sh\nmithridate run RECIPE --seed 0\n```\n", 4, "--seed"),
        ("```sh\npython benchmarks/nothing.py\n```\n", 3, "benchmarks/nothing.py"),
    ],
)
def test_an_example_that_fails_names_its_file_and_line(block: str, line: int, said: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n{block}", encoding="utf-8")
    with pytest.raises(Broken) as broken:
        run_page(page, tmp_path)
    assert str(broken.value).startswith(f"{page}:{line}: ")
    assert said in str(broken.value) or said == "nearest"


def test_a_line_of_a_manual_stands_for_several_commands() -> None:
    assert forms("mithridate run RECIPE [--device auto|cpu] --set 'run.seeds=[0,1]' [ID...]  # why") == [
        ["run", "RECIPE", "--device", device, "--set", "run.seeds=[0,1]", "ID"] for device in ("auto", "cpu")
    ]
    assert forms("mithridate run RECIPE --jobs 2 | --engine ray") == [
        ["run", "RECIPE", "--jobs", "2"],
        ["run", "RECIPE", "--engine", "ray"],
    ]
    with pytest.raises(ValueError, match="no command 'mithridate walk'"):
        check(["walk"])
    check(["--install-completion"])
