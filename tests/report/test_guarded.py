"""The page of a guard's folder: counts are those of the log, words of others are only words, and damage is told."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mithridate.core.batch import AnyBatch, Batch
from mithridate.core.errors import StoreError, WriteError
from mithridate.guard import Quarantine, StepLog, StepRecord
from mithridate.guard.step_log import Logged
from mithridate.report.figures.guarded_steps import MOST_POINTS, guarded_steps
from mithridate.report.figures.quarantined_images import images_of, quarantined_images
from mithridate.report.guarded import build_guard_report
from mithridate.report.tables.refusals import MOST_STEPS, reasons, reasons_table, steps_table
from tests.command import invoke

STEP = StepRecord(attempt=1, step=0, verdict="admitted", seconds=0.01)
IMAGES = Batch(torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(3))


def text(html: Path) -> str:
    """What the page says, without its tags, drawings and style."""
    body = re.sub(r"<svg.*?</svg>|<style>.*?</style>|<script>.*?</script>", "", html.read_text(), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def written(folder: Path, records: Sequence[StepRecord], **more: Any) -> Path:
    log = StepLog(folder, defence={"name": "gate", "tolerance": 0.125}, environment={"torch": "2.13.0"}, **more)
    for record in records:
        log.note(record)
    log.close()
    return folder


def records() -> list[StepRecord]:
    """Twenty steps: three warm up, two are refused in a row, one is shortened."""
    steps = [replace(STEP, attempt=n, warm_up=n < 4, trusted_loss=1 / n, trusted_worst=0.5) for n in range(1, 21)]
    for n in (10, 11):
        why = f"worst class fell by 0.{n}"
        steps[n - 1] = replace(
            steps[n - 1], verdict="refused", reason=why, refusals_in_a_row=n - 9, trusted_loss=float("inf")
        )
    steps[14] = replace(steps[14], verdict="shortened", reason="too long")
    return steps


def test_it_tells_what_was_refused_when_and_why(tmp_path: Path) -> None:
    folder = written(tmp_path / "guard", records())
    quarantine = Quarantine(folder / "quarantine", max_bytes=4_000)
    names = [quarantine.put(IMAGES, record=record, scores=[0.5, 1.5, 2.5]) for record in records()[9:11]]
    small = Batch(torch.arange(4).view(2, 2), torch.arange(2))
    names += [quarantine.put(small, record=records()[14])]
    assert quarantine.put(Batch(torch.zeros(99, 99), torch.zeros(99)), record=records()[15]) == ""
    built = build_guard_report(folder)
    page = text(built.html)
    assert built.html == folder / "report.html"
    assert built.headline == "2 refusals in 20 steps, at most 2 in a row; 1 shortened."
    for words in (
        built.headline,
        "Attempted steps 1 to 20,",
        "defence gate.",
        "took 10.0 ms of a step",
        "The warm-up took 3 steps.",
        "3 batches in quarantine.",
        "1 batch more not stored",
        "worst class fell by 0.10 refused 2 10 11",
        "too long shortened 1 15 15",
        "tolerance 0.125",
        "torch 2.13.0",
        *names,
    ):
        assert words in page
    html = built.html.read_text()
    assert html.count("<svg") == 3  # the curves and two batches of images
    marks = ('<p class="headline">', "<dd>2 of 20</dd>", "<dd>10.0 ms</dd>", "<svg", "<table")
    assert sorted(marks, key=html.index) == list(marks)  # the chart right under the headline
    assert not list(folder.glob(".report.html*.part"))


def test_words_of_others_are_only_words(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\x1b[31m\u202e"
    folder = written(tmp_path / "guard", [replace(STEP, verdict="refused", reason=evil, batch=evil)])
    Quarantine(folder / "quarantine").put(IMAGES, record=replace(STEP, verdict="refused", reason=evil))
    html = build_guard_report(folder).html.read_text()
    assert html.count("<script>") == 1
    assert "&lt;script&gt;alert(1)" in html
    assert not set(html) & {"\x1b", "\u202e"}


def test_a_guard_that_refuses_everything_says_so_first(tmp_path: Path) -> None:
    steps = [replace(STEP, attempt=n, verdict="refused", refusals_in_a_row=n) for n in range(1, 175)]
    built = build_guard_report(written(tmp_path / "guard", steps), tmp_path / "page")
    assert built.headline == "The last 174 steps were all refused: nothing is learned any more."
    assert built.html == tmp_path / "page" / "report.html"
    assert "no reason given refused 174 1 174" in text(built.html)


def test_every_step_of_a_refused_window_is_counted(tmp_path: Path) -> None:
    steps = [replace(STEP, attempt=1), replace(STEP, attempt=11, steps=10, verdict="refused", refusals_in_a_row=1)]
    built = build_guard_report(written(tmp_path / "guard", steps))
    assert built.headline == "1 refusal in 11 steps."
    assert "<dd>10 of 11</dd>" in built.html.read_text()


def test_a_quiet_guard_and_one_that_has_not_begun_have_a_page_too(tmp_path: Path) -> None:
    quiet = build_guard_report(written(tmp_path / "quiet", [STEP, *(replace(STEP, attempt=n) for n in (450, 900))]))
    assert quiet.headline == "No refusal in 900 steps."
    assert quiet.reasons.empty
    assert "measures nothing on a trusted set" in text(quiet.html)
    assert "Steps are judged 449 at a time" in text(quiet.html)
    before = quiet.html.read_bytes()
    assert build_guard_report(tmp_path / "quiet").html.read_bytes() == before
    begun = build_guard_report(written(tmp_path / "begun", []))
    assert begun.headline == "No step has been tried yet."


def test_damage_and_resumed_trainings_are_told(tmp_path: Path) -> None:
    folder = written(tmp_path / "guard", records())
    with (folder / "steps.jsonl").open("a") as file:
        file.write('{"attempt": ')
    written(folder, [replace(STEP, attempt=n) for n in range(15, 31)])
    quarantine = Quarantine(folder / "quarantine")
    name = quarantine.put(IMAGES, record=records()[9])
    content = bytearray((quarantine.folder / f"{name}.safetensors").read_bytes())
    content[-1] ^= 1
    (quarantine.folder / f"{name}.safetensors").write_bytes(content)
    page = text(build_guard_report(folder).html)
    assert "2 refusals in 30 steps" in page
    assert "attached 2 times; 6 steps that a resumed training took again counted once" in page
    assert "1 line of the log cannot be read" in page
    assert name in page
    with pytest.raises(StoreError, match="is no folder of a guard"):
        build_guard_report(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(WriteError):
        build_guard_report(folder, tmp_path / "file")


def test_each_rank_has_its_rows(tmp_path: Path) -> None:
    for rank in (0, 1):
        written(tmp_path / "guard", [replace(STEP, rank=rank, verdict="refused", reason=f"by rank {rank}")], rank=rank)
    built = build_guard_report(tmp_path / "guard")
    assert built.reasons.markdown().startswith("| rank | why |")
    page = text(built.html)
    assert "2 ranks have a log" in page
    assert "rank 0 by rank 0 refused 1 1 1 rank 1 by rank 1 refused 1 1 1" in page


def test_reasons_that_differ_in_their_figures_are_one(tmp_path: Path) -> None:
    steps = [
        Logged(replace(STEP, attempt=n, verdict="refused", reason=why), 0.0)
        for n, why in enumerate(["fell by 1e-3", "rose", "fell by 0.25", "fell by 7"], start=1)
    ]
    assert [(r.words, r.attempts) for r in reasons(steps)] == [("fell by 1e-3", [1, 3, 4]), ("rose", [2])]
    assert reasons_table({0: steps}).rows["rank 0"][0] == ["fell by 1e-3", "refused", "3", "1", "4"]


def test_of_very_many_steps_the_newest_are_listed_and_points_are_thinned() -> None:
    steps = [
        replace(STEP, attempt=n, verdict="refused" if n % 2 else "admitted", trusted_loss=float(n % 100 == 50))
        for n in range(1, 8_001)
    ]
    table = steps_table({0: [Logged(step, 0.0) for step in steps]})
    (rows,) = table.rows.values()
    assert len(rows) == MOST_STEPS
    assert rows[0][0] == "7999"
    assert f"{4_000 - MOST_STEPS} older steps not shown" in table.note
    drawing = guarded_steps(steps)
    assert drawing is not None
    assert len(drawing.svg) < 150 * MOST_POINTS
    assert "4000 refused steps" in drawing.alt


def test_curves_need_something_to_draw() -> None:
    assert guarded_steps([]) is None
    assert guarded_steps([STEP]) is None
    assert guarded_steps([replace(STEP, trusted_loss=float("nan"))]) is None
    drawing = guarded_steps([replace(STEP, attempt=n, trusted_loss=loss) for n, loss in enumerate((0.0, 1e30, -5.0))])
    assert drawing is not None
    assert "loss on the trusted set" in drawing.alt


def test_images_are_found_and_shown_in_black_to_white(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path)
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    noise[0, 0, 0, 0] = float("nan")
    cases: dict[str, tuple[AnyBatch, bool, str]] = {
        "bytes": (Batch((255 * IMAGES.x).byte(), IMAGES.y), True, "Shown: 3 samples"),
        "normalised": (Batch({"pixel_values": 3 * noise}, torch.arange(2)), True, "shown from black to white. Values"),
        "nothing finite": (Batch(noise * float("nan"), torch.arange(2)), True, "No value is finite"),
        "table": (Batch(torch.rand(3, 4), torch.arange(3)), False, ""),
        "tokens": (Batch(torch.zeros(2, 3, 4, 4, dtype=torch.long), torch.arange(2)), False, ""),
        "half": (Batch(IMAGES.x.half(), IMAGES.y), True, "its target"),
    }
    for number, (name, (batch, drawn, words)) in enumerate(cases.items()):
        entry = quarantine.show(quarantine.put(batch, record=replace(STEP, attempt=number)))
        drawing = quarantined_images(entry, quarantine.arrays(entry.id))
        assert (drawing is not None) is drawn, name
        assert drawing is None or words in drawing.caption, name
    found = images_of({"inputs": np.full((1, 1, 2, 2), 51, dtype=np.uint8)})
    assert found is not None
    np.testing.assert_allclose(found, 0.2, rtol=1e-6)
    many = Batch(IMAGES.x[:1].expand(50, 1, 8, 8), torch.zeros(50))
    entry = quarantine.show(quarantine.put(many, record=STEP))
    drawing = quarantined_images(entry, quarantine.arrays(entry.id), most=4)
    assert drawing is not None
    assert "the first 4 of 50" in drawing.caption


def test_the_command_writes_the_page_and_prints_why(tmp_path: Path) -> None:
    folder = written(tmp_path / "guard", records())
    page = invoke("report", folder, "--out", tmp_path / "page")
    assert page.code == 0, page.err
    assert "2 refusals in 20 steps" in page.out
    assert "worst class fell by 0.10 refused 2 10 11" in page.out
    assert f"report: {tmp_path / 'page' / 'report.html'}" in page.out
    table = invoke("report", folder, "--format", "csv")
    assert table.out.startswith("why,verdict,steps,first,last worst class fell by 0.10,refused,2,10,11 ")
    both = invoke("report", folder, tmp_path)
    assert (both.code, "give it alone" in both.err) == (2, True)
