"""`spec.model`: the base model that a run starts from."""

from typing import Literal

from pydantic import Field

from atelier_api.quantizations import Quantization
from atelier_api.v1alpha1.base import Block
from atelier_api.v1alpha1.references import SecretRef


class ModelSpec(Block):
    """The base model."""

    family: str = Field(description="Model family, one of `atelier models`.", min_length=1, max_length=63)
    flavour: str | None = Field(
        default=None,
        description="Published size or variant of the family, for the memory prediction. Default: the family's first one. Ignored once the checkpoint is on the machine: its own files are read.",
        max_length=63,
    )
    source: str = Field(
        description="Where the checkpoint lies, laid out as a hub repository of diffusers: a local folder, `hf://owner/name` (optionally `@revision`; HF_TOKEN for gated ones), or `s3://bucket/prefix` with the connection of `spec.storage.s3`. Remote ones are fetched before the ranks start and kept on the machine.",
        min_length=1,
        max_length=2048,
    )
    credentials_ref: SecretRef | None = Field(
        default=None, description="On a cluster: Secret with HF_TOKEN, for gated and private repositories."
    )
    revision: str | None = Field(
        default=None,
        description="Branch, tag or commit of a hub repository; a commit is never another model tomorrow. Default: main.",
        max_length=128,
    )
    quantization: Quantization | None = Field(
        default=None,
        description="Keep the frozen base in 8 or 4 bits below an adapter: its linear layers are quantised when it is loaded, and take part in full precision. Saves memory, not time. `int8` and `fp8` (e4m3) have a scale for each row, `nf4` one for each 64 weights. Default: `hyperparameters.precision`.",
    )
    autoencoder_tiling: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Whether samples go through the autoencoder in overlapping tiles, which bounds its memory. `auto`: those that are drawn where they would not fit as a whole, and those that are trained on where nothing fits otherwise. Latents that were made of tiles differ a little at their seams, and are cached apart; `never` keeps them as a whole on every machine, `always` in tiles.",
    )
