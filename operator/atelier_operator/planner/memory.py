"""Predicted peak memory of one device, by parts. Pure arithmetic on sizes; the formulas are in `predict`.

A run has phases with different residents: *encode* (text encoders and autoencoder, before the denoiser is loaded), *train*, and
*sample* (the stock pipeline beside the training state). The peak is the largest of them.
"""

from dataclasses import dataclass, fields
from typing import Literal

from atelier_api.families import FAMILIES, FamilyFacts, Flavour
from atelier_api.rules import bucket_alignment
from atelier_api.v1alpha1 import TrainingRunSpec
from atelier_api.v1alpha1.adapter import FullAdapter, LoraAdapter
from atelier_api.v1alpha1.model import ModelSpec

GIB = 1 << 30

FIXED_OVERHEAD = {"cuda": GIB, "cpu": GIB * 3 // 4}
"""Bytes of a process before it holds a model: CUDA context, cuBLAS and NCCL buffers; on the CPU the libraries themselves."""

ATTENTION_STREAMS = 2
"""Attention layers of a block that LoRA reaches: self and cross, or picture and text. One-stream blocks have fewer."""

GATHERED_BLOCKS = 2
"""Blocks that FSDP2 holds unsharded at once: the one that computes and the one that is fetched."""

PIXEL_CHANNELS = 128
"""Channels of an autoencoder at full resolution."""

PIXEL_TENSORS = 6
"""Tensors of that width alive at once while it decodes."""

CLIP_CHUNK_FRAMES = 4
"""Frames that a causal video autoencoder holds at full resolution at once."""

Strategy = Literal["single", "ddp", "fsdp2"]


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of one base model. Counts of parameters, not bytes; `parameters`, `layers` and `block_parameters` are of one denoiser."""

    family: FamilyFacts
    origin: str
    parameters: int
    layers: int
    width: int
    mlp_width: int
    text_tokens: int
    encoder_parameters: int
    vae_parameters: int
    activation_bytes_per_token: int
    experts: int = 1

    @property
    def block_parameters(self) -> int:
        """Parameters of one block, taking all for equal."""
        return -(-self.parameters // self.layers)


@dataclass(frozen=True)
class Choice:
    """What the planner may choose and the memory depends on."""

    strategy: Strategy
    processes: int
    micro_batch_size: int
    gradient_checkpointing: bool


@dataclass(frozen=True)
class Parts:
    """Bytes on one device in the training phase."""

    base_weights: int
    trained_weights: int
    gradients: int
    optimizer: int
    ema: int
    gathered: int
    activations: int
    overhead: int

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class Prediction:
    """Bytes on one device: the parts of training, and the totals of the phases around it."""

    train: Parts
    encode: int
    sample: int

    @property
    def peak(self) -> int:
        return max(self.train.total, self.encode, self.sample)


def flavour_facts(family: FamilyFacts, flavour: Flavour) -> ModelFacts:
    """The facts of a published checkpoint."""
    return ModelFacts(
        family=family,
        origin=f"{family.name} {flavour.name}",
        parameters=flavour.parameters,
        layers=flavour.layers,
        width=flavour.width,
        mlp_width=flavour.mlp_width,
        text_tokens=flavour.text_tokens,
        encoder_parameters=flavour.encoder_parameters,
        vae_parameters=flavour.vae_parameters,
        activation_bytes_per_token=flavour.activation_bytes_per_token,
        experts=flavour.experts,
    )


def table_facts(model: ModelSpec) -> ModelFacts:
    """The facts of the flavour that the spec names, or of the family's first."""
    family = FAMILIES[model.family]
    named = [flavour for flavour in family.flavours if flavour.name == model.flavour]
    return flavour_facts(family, named[0] if named else family.flavours[0])
