"""The loss curve as an SVG: every step faint, a running mean strong."""

import math
from collections.abc import Sequence

WIDTH, HEIGHT = 1040, 280
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 34
MOST_POINTS = 1000


def loss_curve(rows: Sequence[tuple[int, float]]) -> str:
    """SVG text for rows of (step, loss); a sentence instead when there is nothing to draw."""
    rows = [(step, loss) for step, loss in rows if math.isfinite(loss)]
    if len(rows) < 2:
        return "<p class=soft>No steps were trained.</p>"
    means = _running_mean([loss for _, loss in rows], window=max(1, len(rows) // 25))
    low, high = _range([loss for _, loss in rows])
    first, last = rows[0][0], rows[-1][0]

    def point(step: float, loss: float) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / max(1, last - first)
        y = TOP + (HEIGHT - TOP - BOTTOM) * (1 - (min(max(loss, low), high) - low) / (high - low))
        return f"{x:.1f},{y:.1f}"

    stride = max(1, len(rows) // MOST_POINTS)
    raw = " ".join(point(step, loss) for step, loss in rows[::stride])
    mean = " ".join(point(step, value) for (step, _), value in list(zip(rows, means, strict=True))[::stride])
    grid = "".join(_horizontal(point(first, value), value) for value in _ticks(low, high))
    labels = "".join(_step_label(point(step, low), round(step)) for step in _ticks(first, last))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%" role="img" aria-label="loss by step">{grid}{labels}'
        f'<polyline class="raw" fill="none" points="{raw}"/><polyline class="mean" fill="none" points="{mean}"/></svg>'
    )


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        means.append(total / min(index + 1, window))
    return means


def _range(values: Sequence[float]) -> tuple[float, float]:
    """From the smallest value to the 99th percentile: single spikes do not flatten the curve."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)))]
    margin = 0.05 * (high - low) or max(abs(high), 1e-6) * 0.05
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers inside [low, high]."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    start = math.ceil(low / size)
    return [index * size for index in range(start, math.floor(high / size) + 1)]


def _horizontal(at: str, value: float) -> str:
    y = at.split(",")[1]
    return (
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        f'<text x="{LEFT - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{value:.4g}</text>'
    )


def _step_label(at: str, step: int) -> str:
    x = at.split(",", maxsplit=1)[0]
    return f'<text x="{x}" y="{HEIGHT - 10}" text-anchor="middle">{step}</text>'
