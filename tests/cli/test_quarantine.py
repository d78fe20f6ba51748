"""`mithridate quarantine`: what a user sees of refused batches, and which mistakes end with exit code 2 and no deed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mithridate.core.batch import AnyBatch, Batch
from mithridate.guard import Quarantine, StepRecord, read_batch
from tests.command import invoke, python

REFUSED = StepRecord(attempt=12, step=9, verdict="refused", reason="[red]worst class fell[/]", seconds=0.1)
IMAGES = Batch(torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 10)
IDS = torch.tensor([[104, 105, 0], [98, 121, 101]])
TEXTS = Batch({"input_ids": IDS, "attention_mask": (IDS > 0).long()}, torch.tensor([1, 0]))
DECODER = """
def letters(ids):
    assert isinstance(ids, list) and all(type(number) is int for number in ids), ids
    return "".join(map(chr, ids)) + "\\x1b[31m"

def broken(ids):
    raise IndexError("no such token")
"""


@pytest.fixture
def guard(tmp_path: Path) -> Path:
    """A guard's folder."""
    return tmp_path / "guard"


@pytest.fixture(autouse=True)
def quarantine(guard: Path) -> Quarantine:
    return Quarantine(guard / "quarantine")


def put(quarantine: Quarantine, batch: AnyBatch = IMAGES, attempt: int = 12) -> str:
    scores = np.linspace(0, 1, batch.size)
    return quarantine.put(batch, record=replace(REFUSED, attempt=attempt), scores=scores)


def test_a_list_shows_every_batch_and_the_words_of_others_as_they_are(quarantine: Quarantine, guard: Path) -> None:
    first, second, third = (put(quarantine, attempt=attempt) for attempt in (3, 1, 2))
    (quarantine.folder / f"{third}.safetensors").unlink()
    for folder in (guard, quarantine.folder):
        page = invoke("quarantine", "list", folder)
        assert page.code == 0
        assert page.out.index(second) < page.out.index(third) < page.out.index(first)
        assert page.out.count("[red]worst class fell[/]") == 2
        assert page.out.count("damaged:") == 1
        assert "3 batches, " in page.out
    assert "0 batches, 0.0 MB" in invoke("quarantine", "list", Quarantine(guard / "empty").folder).out


def test_a_list_says_what_was_not_stored(guard: Path) -> None:
    small = Quarantine(guard / "small", max_bytes=100)
    assert put(small) == ""
    assert "1 batch not stored, for there was no room" in invoke("quarantine", "list", small.folder).out


def test_one_batch_is_shown_in_full(quarantine: Quarantine, guard: Path) -> None:
    name = put(quarantine)
    page = invoke("quarantine", "show", guard, name)
    assert page.code == 0
    for text in (name, "12, after 9 steps that stayed, rank 0", "float32 (12, 3, 8, 8)", "int64 (12)", "and 2 more"):
        assert text in page.out
    assert quarantine.show(name).sha256 in page.out
    content = bytearray((quarantine.folder / f"{name}.safetensors").read_bytes())
    content[-1] ^= 1
    (quarantine.folder / f"{name}.safetensors").write_bytes(content)
    assert "its SHA-256 differs" in invoke("quarantine", "show", guard, "--all").out


@pytest.mark.slow
def test_pictures_are_drawn_of_images_alone(quarantine: Quarantine, guard: Path, tmp_path: Path) -> None:
    images, texts = put(quarantine), put(quarantine, TEXTS)
    path = tmp_path / "batch.png"
    assert invoke("quarantine", "show", guard, images, "--pictures", path).code == 0
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    shades = {tuple(pixel) for pixel in pixels.tolist()}
    first = tuple((IMAGES.x[0, :, 0, 0] * 255).byte().tolist())
    assert first in shades  # every pixel of an image is one square of its very colour
    page = invoke("quarantine", "show", guard, texts, "--pictures", tmp_path / "text.png")
    assert page.code == 2
    assert "holds no images" in page.err
    assert not (tmp_path / "text.png").exists()


def test_token_ids_become_text_without_their_padding(
    quarantine: Quarantine, guard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, images = put(quarantine, TEXTS), put(quarantine, IMAGES)
    (tmp_path / "letters_of_a_test.py").write_text(DECODER)
    monkeypatch.syspath_prepend(tmp_path)
    page = invoke("quarantine", "show", guard, name, "--decoder", "letters_of_a_test:letters")
    assert page.code == 0, page.err
    assert "0: target 1 score 0: hi [31m" in page.out
    assert "1: target 0 score 1: bye [31m" in page.out
    assert "\x1b" not in page.stdout
    for decoder, ids, message in (
        ("letters_of_a_test:broken", name, "raised IndexError: no such token"),
        ("letters_of_a_test:absent", name, "there is no such function"),
        ("no_such_module:f", name, "cannot be imported"),
        ("letters", name, "write package.module:function"),
        ("letters_of_a_test:letters", images, "holds no token ids"),
    ):
        page = invoke("quarantine", "show", guard, ids, "--decoder", decoder)
        assert (page.code, message in page.err) == (2, True), page.err


def test_released_batches_can_be_learned_again(quarantine: Quarantine, guard: Path, tmp_path: Path) -> None:
    names = [put(quarantine, attempt=attempt) for attempt in (1, 2, 3)]
    page = invoke("quarantine", "release", guard, *names[:2], "--to", tmp_path / "out")
    assert page.code == 0, page.err
    for name in names[:2]:
        assert str(tmp_path / "out" / f"{name}.safetensors") in page.out
        assert read_batch(tmp_path / "out" / f"{name}.safetensors").x.equal(IMAGES.x)
    assert [entry.id for entry in quarantine.list()] == names[2:]


def test_dropped_batches_are_gone(quarantine: Quarantine, guard: Path) -> None:
    names = [put(quarantine, attempt=attempt) for attempt in (1, 2, 3)]
    assert "1 batch dropped" in invoke("quarantine", "drop", guard, names[1]).out
    assert [entry.id for entry in quarantine.list()] == [names[0], names[2]]
    assert "2 batches dropped" in invoke("quarantine", "drop", guard, "--all").out
    assert quarantine.list() == ()


def test_a_mistake_does_nothing(quarantine: Quarantine, guard: Path, tmp_path: Path) -> None:
    name, damaged = put(quarantine), put(quarantine, attempt=13)
    (quarantine.folder / f"{damaged}.safetensors").unlink()
    out = tmp_path / "out"
    for arguments, message in (
        (("drop", guard), "name the batches to drop"),
        (("drop", guard, name, "a1-r0-01234567"), "there is no batch a1-r0-01234567"),
        (("drop", guard, name, "../../x"), "is no id of a batch"),
        (("drop", guard, name, "--all"), "ids or --all"),
        (("drop", guard, name, "--to", out), "--to goes with `quarantine release`"),
        (("list", guard, name), "shows all batches"),
        (("list", tmp_path), "is no quarantine of this library"),
        (("release", guard, name), "say with --to"),
        (("release", guard, "--all", "--to", out), "nothing was released"),
        (("show", guard, "--all", "--pictures", out / "x.png"), "give one id"),
        (("show", guard, name, "--pictures", out / "x.jpg"), "ends with .png"),
    ):
        page = invoke("quarantine", *arguments)
        assert (page.code, message in page.err) == (2, True), (arguments, page.err)
    assert [entry.id for entry in quarantine.list()] == [name, damaged]
    assert not out.exists()


def test_a_list_needs_no_torch_and_the_command_is_there(quarantine: Quarantine, guard: Path) -> None:
    name = put(quarantine)
    code = (
        "import sys\nfrom mithridate.cli.app import app\n"
        "sys.argv = ['mithridate', 'quarantine', 'list', sys.argv[1]]\n"
        "try:\n    app()\nexcept SystemExit:\n    print('torch' in sys.modules)\n"
    )
    done = python(code, guard, env={"COLUMNS": "200"})
    assert done.stdout.splitlines()[-1] == "False", done.stderr
    assert name in done.stdout
