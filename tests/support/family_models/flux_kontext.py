"""Flux.1 Kontext: the parts of Flux.1 in a pipeline of its own."""

from dataclasses import replace

from diffusers import FluxKontextPipeline

from family_models import flux
from family_models.kinds import Published

TINY = {"flux_kontext": replace(flux.TINY["flux"], make=lambda: FluxKontextPipeline(**flux.tiny().components))}

PUBLISHED = Published(
    denoisers={"dev": flux.PUBLISHED.denoisers["dev"]},
    encoders=flux.PUBLISHED.encoders,
    autoencoder=flux.PUBLISHED.autoencoder,
)
