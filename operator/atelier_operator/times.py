"""Times of the Kubernetes API: RFC 3339 in UTC, whole seconds."""

from datetime import UTC, datetime


def parse_time(text: str | None) -> datetime | None:
    """The time in a string of the API; None where there is none, or none that can be read."""
    if not text:
        return None
    try:
        time = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def format_time(time: datetime) -> str:
    """The string of a time."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
