"""`atelier models`: what can be trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from atelier_cli import terminal

if TYPE_CHECKING:
    from atelier_api.families import FamilyFacts


def models(
    name: Annotated[str | None, typer.Argument(help="A family, for its checkpoints and rules.")] = None,
    proved: Annotated[
        bool, typer.Option("--proved", help="Show what tests have shown of each family, or of the one.")
    ] = False,
) -> None:
    """List the model families, or the checkpoints and rules of one."""
    from atelier_api.errors import ConfigError
    from atelier_api.families import FAMILIES
    from atelier_api.problem import choice

    if name is not None and name not in FAMILIES:
        raise ConfigError(f"there is no family {name}; {choice(name, FAMILIES)}")
    if proved:
        from atelier_cli import conformance

        conformance.show(list(FAMILIES) if name is None else [name])
    elif name is None:
        rows = [
            (facts.name, facts.title, facts.modality, facts.objective, _sizes(facts), facts.licence)
            for facts in FAMILIES.values()
        ]
        terminal.table(("FAMILY", "MODEL", "KIND", "OBJECTIVE", "PARAMETERS", "LICENCE"), rows)
    else:
        _show(FAMILIES[name])


def _sizes(facts: FamilyFacts) -> str:
    sizes = sorted({flavour.parameters for flavour in facts.flavours})
    return ", ".join(dict.fromkeys(terminal.parameters(size) for size in sizes))


def _show(facts: FamilyFacts) -> None:
    terminal.say(f"{facts.name}: {facts.title}", style="bold")
    shift = facts.shift if isinstance(facts.shift, str) else f"{facts.shift:g}"
    rows = [
        ("kind", facts.modality),
        ("objective", facts.objective),
        ("shift", shift),
        _size(facts),
        ("licence", facts.licence),
    ]
    if facts.frame_rule is not None:
        multiple, rest = facts.frame_rule
        rows.insert(4, ("frames", f"{multiple}n + {rest}"))
    if facts.frame_rate is not None:
        rows.insert(5, ("rate", f"{facts.frame_rate:g} frames per second"))
    rows += _proved(facts)
    terminal.facts(rows)
    terminal.say()
    flavours = [
        (
            flavour.name,
            flavour.source,
            _denoiser(flavour.parameters, flavour.experts),
            terminal.parameters(flavour.encoder_parameters),
        )
        for flavour in facts.flavours
    ]
    terminal.table(("FLAVOUR", "SOURCE", "DENOISER", "TEXT ENCODERS"), flavours, right=(2, 3))


def _proved(facts: FamilyFacts) -> list[tuple[str, str]]:
    """What the tests have shown of the family."""
    from atelier_api.families.conformance import PROVED, table

    cells = [cell for cell, value in table().get(facts.name, {}).items() if value == PROVED]
    return [("proved", ", ".join(cells) or "nothing yet")]


def _size(facts: FamilyFacts) -> tuple[str, str]:
    if facts.sample_rate is not None:
        return "sound", f"{facts.sample_rate} samples per second on two channels, {facts.latent_factor} to a latent"
    return "pixels", f"edges are multiples of {facts.pixel_multiple}"


def _denoiser(parameters: int, experts: int) -> str:
    return terminal.parameters(parameters) if experts == 1 else f"{experts} × {terminal.parameters(parameters)}"
