"""One row of a trace: every column is typed, described and in the store."""

from typing import get_type_hints

import pyarrow as pa

from mithridate.bench.store import TRACE_SCHEMA
from mithridate.simulation.trace import COLUMNS, NOTHING_SENT, Sent, TraceRow


def test_the_columns_are_those_of_a_row_in_the_order_of_the_store() -> None:
    assert set(COLUMNS) == set(get_type_hints(TraceRow))
    assert len(set(COLUMNS)) == len(COLUMNS)
    assert tuple(TRACE_SCHEMA.names) == COLUMNS


def test_every_column_is_described() -> None:
    text = TraceRow.__doc__ or ""
    assert [name for name in COLUMNS if f"{name}: " not in text] == []


def test_the_state_before_the_stream_has_all_columns_of_what_was_sent() -> None:
    assert NOTHING_SENT.keys() == get_type_hints(Sent).keys()


def test_types_of_the_store_are_those_of_the_row() -> None:
    types = {name: TRACE_SCHEMA.field(name).type for name in COLUMNS}
    assert (types["step"], types["quarantined"]) == (pa.int64(), pa.int64())
    assert (types["phase"], types["verdict"], types["alarms"]) == (pa.string(),) * 3
    assert types["admitted"] == pa.bool_()
    assert {types[name] for name in ("accuracy", "batch_loss", "flagged_clean", "seconds")} == {pa.float64()}
