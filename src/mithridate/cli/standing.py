"""What `mithridate status` prints: a line for each run, and how far all of them are."""

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from mithridate.bench.pace import about
from mithridate.bench.status import CellStatus, GridStatus, State
from mithridate.cli.terminal import out

COLOURS: Mapping[State, str] = {"finished": "green", "failed": "bold red", "unfinished": "yellow", "waiting": "dim"}


def print_status(status: GridStatus) -> None:
    """Print how far a store is."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(overflow="fold", ratio=1)
    table.add_column(no_wrap=True)
    for cell in status.cells:
        table.add_row(Text(cell.run), Text(_said(cell), style=COLOURS[cell.state]))
    out.print(table)
    for cell in status.cells:
        if cell.reason:
            out.print(Text.assemble((f"{cell.run}:", "bold"), f" {cell.reason}"))
    counts = [f"{n} {state}" for state in COLOURS if (n := status.count(state))]
    out.print(Text(f"{len(status.cells)} runs: {', '.join(counts)}"), style="bold")
    if len(status.cells) > status.count("finished"):
        left = status.seconds_left
        at_a_time = f", {status.jobs} runs at a time" if status.jobs > 1 else ""
        out.print(
            "no run has finished yet, so the time left is not known"
            if left is None
            else f"{about(left)} left, by what the finished runs took{at_a_time}"
        )


def _said(cell: CellStatus) -> str:
    of = f"step {cell.step} of {cell.steps}" if cell.steps else f"step {cell.step}"
    match cell.state:
        case "finished":
            return f"finished, {cell.seconds:.1f} s"
        case "waiting":
            return "waiting"
        case state:
            return f"{state}, {of}"
