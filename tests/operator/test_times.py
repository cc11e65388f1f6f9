"""Times of the API, read and written."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atelier_operator.times import format_time, parse_time

NOON = datetime(2026, 11, 1, 12, tzinfo=UTC)
TEXTS = {
    "the API's": ("2026-11-01T12:00:00Z", NOON),
    "microseconds of a Lease": ("2026-11-01T12:00:00.250000Z", NOON + timedelta(seconds=0.25)),
    "another zone": ("2026-11-01T14:00:00+02:00", NOON),
    "no zone": ("2026-11-01T12:00:00", NOON),
    "nothing": (None, None),
    "empty": ("", None),
    "no time": ("yesterday", None),
}


@pytest.mark.parametrize(("text", "time"), TEXTS.values(), ids=TEXTS)
def test_a_time_is_read_or_there_is_none(text: str | None, time: datetime | None) -> None:
    assert parse_time(text) == time


@given(st.datetimes(datetime(1970, 1, 2), datetime(9000, 1, 1), timezones=st.just(timezone(timedelta(hours=5)))))
def test_a_written_time_is_read_back_to_the_second(time: datetime) -> None:
    assert parse_time(format_time(time)) == time.replace(microsecond=0)
