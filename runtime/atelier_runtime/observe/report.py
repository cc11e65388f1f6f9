"""The report of a run: one HTML file that needs nothing else, for a person to open.

Pictures and sounds are embedded, the curve is drawn as SVG here, colours follow the reader's light or dark setting, and there is no
script.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files

from atelier_api.progress import FunnelReport
from atelier_runtime.observe.curve import loss_curve

STYLE = files("atelier_runtime.observe").joinpath("report.css").read_text()


@dataclass(frozen=True)
class Picture:
    """An encoded picture: PNG or WebP bytes, and its width in pixels."""

    data: bytes
    media_type: str
    width: int


@dataclass(frozen=True)
class Sound:
    """An encoded sound of a kind that browsers play."""

    data: bytes
    media_type: str


@dataclass(frozen=True)
class ReportData:
    """Everything the report shows. `facts` are the tiles at the top, `rows` are (step, loss) of every step.

    `techniques` are such rows of the losses beside the objective's, by name. `samples` maps a step to its pictures or sounds, one per
    prompt, None where one is missing. `settings` is the run's YAML.
    """

    title: str
    subtitle: str
    facts: Sequence[tuple[str, str]]
    rows: Sequence[tuple[int, float]]
    prompts: Sequence[str]
    samples: dict[int, Sequence[Picture | Sound | None]]
    funnel: FunnelReport
    seconds: dict[str, float]
    settings: str
    plan: Sequence[tuple[str, str]]
    exports: Sequence[tuple[str, str, str]]
    usage: str
    events: Sequence[str] = field(default_factory=tuple)
    techniques: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)


def render_report(data: ReportData) -> str:
    """The HTML text."""
    parts = [
        f"<h1>{_text(data.title)}</h1><p class=soft>{_text(data.subtitle)}</p>",
        "<div class=facts>"
        + "".join(f"<div class=fact><b>{_text(v)}</b><span>{_text(k)}</span></div>" for k, v in data.facts)
        + "</div>",
        _section("Loss", loss_curve(data.rows)),
        *(_section(f"Loss of {name}", loss_curve(rows)) for name, rows in data.techniques.items()),
        _section("Samples", _gallery(data.prompts, data.samples)) if data.samples else "",
        _section("Data", _funnel(data.funnel)),
        _section("Time", _times(data.seconds)),
        _section("Result", _exports(data.exports) + f"<pre>{_text(data.usage)}</pre>") if data.exports else "",
        _section("Plan", _table(("Choice", "Value"), data.plan)),
        _section("Events", "<ul>" + "".join(f"<li>{_text(event)}</li>" for event in data.events) + "</ul>")
        if data.events
        else "",
        _section("Settings", f"<pre>{_text(data.settings)}</pre>"),
    ]
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_text(data.title)}</title>'
    )
    return (
        f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _section(title: str, body: str) -> str:
    return f"<h2>{_text(title)}</h2>{body}"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    top = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table><tr>{top}</tr>{body}</table></div>"


def _gallery(prompts: Sequence[str], samples: dict[int, Sequence[Picture | Sound | None]]) -> str:
    steps = sorted(samples)
    head = (
        "<tr><th></th>" + "".join(f"<th>{'before' if step == 0 else f'step {step}'}</th>" for step in steps) + "</tr>"
    )
    rows = []
    for index, prompt in enumerate(prompts):
        cells = "".join(f"<td>{_sample(samples[step], index, prompt)}</td>" for step in steps)
        rows.append(f"<tr><td class=prompt>{_text(prompt)}</td>{cells}</tr>")
    return f"<div class=scroll><table class=grid>{head}{''.join(rows)}</table></div>"


def _sample(samples: Sequence[Picture | Sound | None], index: int, prompt: str) -> str:
    sample = samples[index] if index < len(samples) else None
    if sample is None:
        return "<span class=soft>missing</span>"
    source = f'src="data:{sample.media_type};base64,{base64.b64encode(sample.data).decode()}"'
    name = html.escape(prompt, quote=True)
    if isinstance(sample, Sound):
        return f'<audio controls preload=metadata aria-label="{name}" {source}></audio>'
    kind = " class=small" if sample.width < 128 else ""
    return f'<img{kind} alt="{name}" width="{max(sample.width, 96)}" {source}>'


def _funnel(funnel: FunnelReport) -> str:
    rows = [
        ("found", funnel.found),
        ("unreadable", funnel.unreadable),
        ("too small", funnel.too_small),
        ("too short", funnel.too_short),
        ("no caption", funnel.no_caption),
        ("no reference", funnel.no_reference),
        ("no conditioning", funnel.no_conditioning),
        ("kept", funnel.kept),
    ]
    body = _table(("Files", "Count"), rows)
    if funnel.rejected:
        body += "<p class=soft>Left out:</p>" + _table(("File", "Reason"), sorted(funnel.rejected.items()))
    return body


def _times(seconds: dict[str, float]) -> str:
    total = sum(seconds.values()) or 1.0
    rows = [
        (phase, f"{spent:.1f} s", f"{100 * spent / total:.0f} %")
        for phase, spent in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    return _table(("Phase", "Time", "Share"), rows)


def _exports(exports: Sequence[tuple[str, str, str]]) -> str:
    return _table(("Format", "File", "SHA-256"), exports)
