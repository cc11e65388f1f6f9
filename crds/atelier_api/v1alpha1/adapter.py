"""`spec.adapter`: what is trained."""

from typing import Annotated, Literal

from pydantic import Field

from atelier_api.v1alpha1.base import Block, Decimal

# A field that several types have is the same in all of them, but for its default: the CRD has one schema for it.
Rank = Annotated[
    int,
    Field(
        ge=1,
        le=1024,
        description="Rank of the trained matrices. Of `lokr` that of the second factor, which is a whole matrix where the rank is at least half its longer side: by default everywhere.",
    ),
]
Alpha = Annotated[
    Annotated[Decimal, Field(gt=0, le=65536)] | None,
    Field(
        description="Scale numerator: the update is multiplied by alpha / rank, of `dylora` by alpha / the ranks in use. Default: the rank; for `loha`, `locon` and `dylora` half the rank."
    ),
]
Dora = Annotated[bool, Field(description="Weight decomposition (DoRA, arXiv:2402.09353).")]
Slider = Annotated[
    bool,
    Field(
        description="Train a slider (arXiv:2311.12092): in each step the update is multiplied by the `sliderStrength` of that step's samples. The result does more of something at weight 1, and less of it at -1. Not with `dora`."
    ),
]
Targets = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=512)]],
    Field(
        min_length=1,
        max_length=32,
        description="Presets of the family (`attention`, `mlp`, `all`) or regular expressions that match whole module names.",
    ),
]
BlockSize = Annotated[
    int,
    Field(
        ge=2,
        le=1024,
        description="Largest side of the rotated blocks; each layer takes the nearest one below that divides its outputs.",
    ),
]


class LoraAdapter(Block):
    """Low-rank adaptation (arXiv:2106.09685) through peft."""

    type: Literal["lora"] = "lora"
    rank: Rank = 16
    alpha: Alpha = None
    dropout: Annotated[Decimal, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Dropout in front of the first matrix."
    )
    init: Literal["default", "gaussian"] = Field(
        default="default",
        description="Start values of the first matrix: `default` is Kaiming-uniform, `gaussian` is N(0, 1/rank). The second matrix starts at zero.",
    )
    dora: Dora = False
    rslora: bool = Field(default=False, description="Rank-stabilised scale alpha / sqrt(rank) (arXiv:2312.03732).")
    slider: Slider = False
    targets: Targets = Field(default=["attention"])


class LokrAdapter(Block):
    """Kronecker product of a small matrix and a large or low-rank one (LoKr, arXiv:2309.14859) through lycoris-lora."""

    type: Literal["lokr"]
    rank: Rank = 1024
    alpha: Alpha = None
    factor: int = Field(
        default=16,
        ge=2,
        le=1024,
        description="Side of the first factor; a layer that it does not divide takes the nearest divisor below. Larger: fewer parameters.",
    )
    decompose_both: bool = Field(
        default=False,
        description="Make the first factor low-rank as well, where the rank is below half its longer side.",
    )
    dora: Dora = False
    slider: Slider = False
    targets: Targets = Field(default=["attention"])


class LohaAdapter(Block):
    """Element-wise product of two low-rank updates (LoHa, arXiv:2108.06098) through lycoris-lora."""

    type: Literal["loha"]
    rank: Rank = 32
    alpha: Alpha = None
    dora: Dora = False
    slider: Slider = False
    targets: Targets = Field(default=["attention"])


class LoconAdapter(Block):
    """Low-rank adaptation in the layout of lycoris-lora (LoCon)."""

    type: Literal["locon"]
    rank: Rank = 64
    alpha: Alpha = None
    dora: Dora = False
    slider: Slider = False
    targets: Targets = Field(default=["attention"])


class DiagOftAdapter(Block):
    """Rotation of blocks of outputs (orthogonal fine-tuning, arXiv:2306.07280) through lycoris-lora."""

    type: Literal["diag-oft"]
    block_size: BlockSize = 64
    slider: Slider = False
    targets: Targets = Field(default=["attention"])


class BoftAdapter(Block):
    """Rotation by a butterfly of blocks (BOFT, arXiv:2311.06243) through lycoris-lora."""

    type: Literal["boft"]
    block_size: BlockSize = 64
    slider: Slider = False
    targets: Targets = Field(default=["attention"])


class DyloraAdapter(Block):
    """Low-rank adaptation that can be cut to a lower rank (DyLoRA, arXiv:2210.07558), in the layout of lycoris-lora."""

    type: Literal["dylora"]
    rank: Rank = 128
    alpha: Alpha = None
    rank_block: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="Ranks that are trained together: each step draws one block of them and uses it and those before it. Must divide the rank; the result can be cut to its multiples.",
    )
    slider: Slider = False
    targets: Targets = Field(default=["attention"])


class Ia3Adapter(Block):
    """A factor for each output or input of a layer ((IA)³, arXiv:2205.05638) through lycoris-lora."""

    type: Literal["ia3"]
    input_targets: list[Annotated[str, Field(min_length=1, max_length=512)]] = Field(
        default=[],
        max_length=32,
        description="Those of the targets whose inputs are scaled instead of their outputs, in the same form. The paper has the last layer of each feed-forward here.",
    )
    slider: Slider = False
    targets: Targets = Field(default=["attention"])


class InvertedToken(Block):
    """A placeholder and the vectors that stand for it."""

    token: str = Field(
        max_length=64,
        pattern=r"^<[a-z0-9]+(-[a-z0-9]+)*>$",
        description="Placeholder, as it stands in captions and prompts: lower-case words, digits and hyphens between `<` and `>`.",
    )
    initializer: str = Field(
        min_length=1,
        max_length=256,
        description="Word or words whose vectors the placeholder starts from, in turns where it has more vectors than they have tokens.",
    )
    vectors: int = Field(
        default=1,
        ge=1,
        le=32,
        description="Vectors of the placeholder, each of which takes the place of a token in the caption. At least as many as the initializer has tokens.",
    )


class TextualInversionAdapter(Block):
    """New words for the text encoders, and nothing else (textual inversion, arXiv:2208.01618)."""

    type: Literal["textual-inversion"]
    tokens: list[InvertedToken] = Field(
        default=[],
        max_length=16,
        description="Placeholders that are learnt, at least one. Each caption must have one: `data.captions.trigger` puts it there.",
    )


class FullAdapter(Block):
    """Full-rank: every weight of the denoiser is trained."""

    type: Literal["full"]


class ControlNetAdapter(Block):
    """A control network (ControlNet, arXiv:2302.05543): a trained copy of the frozen base's own blocks, steered by a picture."""

    type: Literal["controlnet"]


DecomposableAdapter = LokrAdapter | LohaAdapter | LoconAdapter
"""The types of lycoris-lora that know weight decomposition."""

ScaledLycorisAdapter = DecomposableAdapter | DyloraAdapter
"""The types of lycoris-lora whose update is scaled by alpha / rank."""

LycorisAdapter = DecomposableAdapter | DiagOftAdapter | BoftAdapter | DyloraAdapter | Ia3Adapter
"""The types of lycoris-lora."""

LayerAdapter = LoraAdapter | LycorisAdapter
"""The types that are put on layers of the denoiser, which their `targets` name."""

Adapter = Annotated[
    LayerAdapter | TextualInversionAdapter | FullAdapter | ControlNetAdapter, Field(discriminator="type")
]


def alpha_of(adapter: LoraAdapter | ScaledLycorisAdapter) -> float:
    """The scale numerator, its default filled in."""
    if adapter.alpha is not None:
        return adapter.alpha
    halved = isinstance(adapter, LohaAdapter | LoconAdapter | DyloraAdapter)
    return adapter.rank / 2 if halved else float(adapter.rank)


def rebuilds_weights(adapter: Adapter) -> bool:
    """Whether lycoris-lora computes the whole changed weight, in the precision of the trained ones, at every forward pass."""
    if isinstance(adapter, DiagOftAdapter | BoftAdapter):
        return True
    return isinstance(adapter, DecomposableAdapter) and adapter.dora


def is_slider(adapter: Adapter) -> bool:
    """Whether the strength of the adapter is that of each step's samples."""
    return isinstance(adapter, LayerAdapter) and adapter.slider


def has_strength(adapter: Adapter) -> bool:
    """Whether the update can be multiplied by a number, such that at 0 it is the base that is left.

    Weight decomposition has trained norms beside its update, which no number multiplies.
    """
    decomposes = isinstance(adapter, LoraAdapter | DecomposableAdapter) and adapter.dora
    return isinstance(adapter, LayerAdapter) and not decomposes
