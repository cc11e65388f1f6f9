"""Predicted peak memory of one device, by parts. Pure arithmetic on sizes.

A run has phases with different residents: *encode* (text encoders and autoencoder, before the denoiser is loaded), *train*, and
*sample* (the stock pipeline beside the training state, when there are prompts). The peak is the largest of them.

Bytes per trained weight are those of the runtime: `adamw` keeps weight, gradient and two moments in fp32 (16), and autocast holds
a bf16 copy of full-rank weights (2 more); `adamw-bf16` keeps all four in bf16 (8). The moving average is fp32 (4). A frozen base
takes the precision's bytes, or, quantised, those of its kind (`atelier_api.quantizations`) for its layers in the blocks.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from atelier_api.families import FAMILIES, FamilyFacts, Flavour
from atelier_api.quantizations import packed_bytes, unpacked_bytes
from atelier_api.v1alpha1 import TrainingRunSpec
from atelier_api.v1alpha1.adapter import ControlNetAdapter, FullAdapter, LayerAdapter, TextualInversionAdapter
from atelier_api.v1alpha1.model import ModelSpec
from atelier_operator.planner.adapter_sizes import Linear, kept_bytes, parameters
from atelier_operator.planner.extents import drawn_extent, encoded_extent, trained_extent
from atelier_operator.planner.passages import passage_values
from atelier_operator.planner.sharding import Strategy, shards_of
from atelier_operator.planner.techniques import compared_bytes, few_step_parameters, swapped_bytes

GIB = 1 << 30

FIXED_OVERHEAD = {"cuda": GIB, "cpu": GIB * 3 // 4}
"""Bytes of a process before it holds a model: CUDA context, cuBLAS and NCCL buffers; on the CPU the libraries themselves."""

ATTENTION_LAYERS = 2
"""Attention layers of a block that an adapter reaches: self and cross, or picture and text. Blocks of one stream have fewer."""

WIDE_TARGETS = 1.25
"""Linears of the feed-forward keep their inputs too once they carry an adapter (measured 1.09 to 1.33 times as many bytes)."""

LARGEST_INPUT = 8
"""A block's input is at most this fraction (one eighth) of what it keeps: a UNet's deep levels have fewer tokens than its rows say."""

GATHERED_BLOCKS = 2
"""Blocks that FSDP2 and ZeRO-3 hold unsharded at once: the one that computes and the one that is fetched."""

CONDITION_VALUES_PER_PIXEL = 131
"""Values that a control network keeps per pixel of its conditioning picture (measured)."""

TEXT_VALUES_PER_TOKEN = 15 * 12 * 768 + 11 * 32 * 1280
"""Values that SDXL's text encoders, the only ones in which words are learnt, keep for each of their tokens: 15 and 11 (measured 14.3
and 10.3; their GELUs differ) for each unit of width of each of their 12 and 32 layers."""

GUIDED_SAMPLES = 2
"""Samples in a forward pass with classifier-free guidance."""


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of one base model, as numbers of parameters. `parameters`, `layers` and `largest_block` are of one denoiser."""

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
    largest_block: int
    experts: int = 1
    quantized_share: float = 0.98
    fp32_share: float = 0.0
    control_parameters: int = 0
    control_layers: int = 0


@dataclass(frozen=True)
class Choice:
    """What the planner may choose and the memory depends on. `processes` are those of the whole run.

    `tiled_encoding`: what is trained on goes through the autoencoder in tiles; `tiled_samples`: what is drawn does.
    """

    strategy: Strategy
    processes: int
    micro_batch_size: int
    gradient_checkpointing: bool
    tiled_encoding: bool = False
    tiled_samples: bool = False


@dataclass(frozen=True)
class Parts:
    """Bytes on one device while training.

    `copies` are unsharded blocks, bf16 copies of fp32 weights, buckets of gradients, and the unpacked layer of a quantised base.
    """

    base_weights: int
    trained_weights: int
    gradients: int
    optimizer: int
    ema: int
    copies: int
    activations: int
    overhead: int

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class Prediction:
    """Bytes on one device: the parts of training, and the totals of the phases around it. `sample` is 0 without prompts."""

    train: Parts
    encode: int
    sample: int

    @property
    def peak(self) -> int:
        return max(self.train.total, self.encode, self.sample)

    @property
    def phase(self) -> Literal["encode", "train", "sample"]:
        """The phase that has the peak."""
        if self.peak == self.train.total:
            return "train"
        return "encode" if self.peak == self.encode else "sample"


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
        largest_block=flavour.largest_block or -(-flavour.parameters // flavour.layers),
        experts=flavour.experts,
        quantized_share=flavour.quantized_share,
        fp32_share=flavour.fp32_share,
        control_parameters=flavour.control_parameters,
        control_layers=flavour.control_layers,
    )


def table_facts(model: ModelSpec) -> ModelFacts:
    """The facts of the flavour that the spec names, or of the family's first."""
    family = FAMILIES[model.family]
    named = [flavour for flavour in family.flavours if flavour.name == model.flavour]
    return flavour_facts(family, named[0] if named else family.flavours[0])


def predict(spec: TrainingRunSpec, model: ModelFacts, choice: Choice, device: Literal["cpu", "cuda"]) -> Prediction:
    """The peak of each phase for one choice."""
    train = _train_parts(spec, model, choice, device)
    precision = _precision_bytes(spec)
    frozen = (model.encoder_parameters + model.vae_parameters) * precision
    # Batches of the encoding shrink by themselves to what fits: one sample has to.
    extent, tiled = encoded_extent(spec, model.family), choice.tiled_encoding
    encode = frozen + passage_values(model.family.passages.encoding, extent, tiled=tiled) * precision + train.overhead
    sample = _sample_phase(spec, model, choice, train, frozen=frozen) if spec.validation.prompts else 0
    return Prediction(train, encode, sample)


def trained_parameters(spec: TrainingRunSpec, model: ModelFacts) -> int:
    """Parameters that are trained in one denoiser. For adapters an estimate from the sizes of the blocks, rather too high."""
    adapter = spec.adapter
    if isinstance(adapter, FullAdapter):
        return model.parameters + few_step_parameters(spec, model.family, model.width)
    if isinstance(adapter, ControlNetAdapter):
        return model.control_parameters
    if isinstance(adapter, TextualInversionAdapter):
        vectors = sum(each.vectors for each in adapter.tokens)
        return vectors * len(model.family.vocabularies) * model.width  # no encoder of text is wider than that
    layers = model.layers * sum(parameters(adapter, layer) for layer in _adapted_layers(adapter, model))
    return layers + few_step_parameters(spec, model.family, model.width)


def _adapted_layers(adapter: LayerAdapter, model: ModelFacts) -> Iterator[Linear]:
    """The layers of a block that the adapter is put on, rather too many."""
    for _ in range(ATTENTION_LAYERS):
        if not _only(adapter, "mlp"):
            yield from [Linear(model.width, model.width)] * 4
        if not _only(adapter, "attention"):
            yield Linear(model.mlp_width, model.width)
            yield Linear(model.width, model.mlp_width)


def _train_parts(spec: TrainingRunSpec, model: ModelFacts, choice: Choice, device: Literal["cpu", "cuda"]) -> Parts:
    numbers, full, whole = spec.hyperparameters, isinstance(spec.adapter, FullAdapter), _trains_whole_model(spec)
    trained = trained_parameters(spec, model)
    trained_bytes = 2 if numbers.optimizer.type == "adamw-bf16" else 4
    shards = shards_of(choice.strategy, choice.processes, whole=whole)
    # Of several experts one is trained in a step, and gradients are freed after it; but DDP's buckets and ZeRO-3's parts stay.
    freed = choice.strategy in ("single", "deepspeed-zero2") or (choice.strategy == "fsdp2" and whole)
    gradient_sets = 1 if freed else model.experts
    # Of what it trains, ZeRO-2 keeps its part of the weights a second time: the optimizer's, all that it steps.
    optimizer_bytes = trained_bytes * (3 if choice.strategy == "deepspeed-zero2" else 2)
    base = 0 if full else _share(model.experts * _frozen_bytes(spec, model, model.parameters), shards.base)
    if isinstance(spec.adapter, TextualInversionAdapter):  # captions are encoded in the step, on every device
        base += model.encoder_parameters * _precision_bytes(spec)
    return Parts(
        base_weights=base,
        trained_weights=_share(model.experts * trained * trained_bytes, shards.weights),
        gradients=_share(gradient_sets * trained * trained_bytes, shards.gradients),
        optimizer=_share(model.experts * trained * optimizer_bytes, shards.optimizer),
        ema=_share(model.experts * trained * (4 + swapped_bytes(spec, trained_bytes)), shards.ema)
        if numbers.ema
        else 0,
        copies=_copies(spec, model, choice, trained_bytes) + _unpacked(spec, model),
        activations=_activations(spec, model, choice)
        + choice.micro_batch_size * compared_bytes(spec, model.family, model.width),
        overhead=FIXED_OVERHEAD[device],
    )


def _trains_whole_model(spec: TrainingRunSpec) -> bool:
    """Whether most weights of a network are trained: the denoiser's, or a control network's, which is sharded as a model is."""
    return isinstance(spec.adapter, FullAdapter | ControlNetAdapter)


def _copies(spec: TrainingRunSpec, model: ModelFacts, choice: Choice, trained_bytes: int) -> int:
    """Weights in the dtype that computes, where they are stored in another or in parts, and gradients on their way to the sum."""
    whole, compute_bytes, trained = _trains_whole_model(spec), _precision_bytes(spec), trained_parameters(spec, model)
    block = model.largest_block * compute_bytes if whole else _frozen_bytes(spec, model, model.largest_block)
    gathered = GATHERED_BLOCKS * block
    autocast = trained * compute_bytes if whole and trained_bytes > compute_bytes else 0
    # DeepSpeed sums gradients in a bucket of a block's size.
    bucket = min(model.largest_block, trained) * 4
    if choice.strategy == "fsdp2":
        # The gradient of a block is whole, in fp32, until it has been summed over the processes.
        return gathered + (model.largest_block * trained_bytes if whole else 0)
    if choice.strategy == "deepspeed-zero2":
        return autocast + bucket
    if choice.strategy == "deepspeed-zero3":
        return _copies_of_zero3(model, choice, gathered=gathered, bucket=bucket, autocast=autocast)
    return autocast


def _copies_of_zero3(model: ModelFacts, choice: Choice, *, gathered: int, bucket: int, autocast: int) -> int:
    """What ZeRO-3 holds beside its shares. `gathered` blocks are in the dtype that computes; `autocast` are copies of all weights."""
    if not autocast:
        return gathered + bucket
    # Gathered weights are fp32 again, twice the bytes, and are cast again. Without recomputation the backward pass needs every copy.
    copies = gathered if choice.gradient_checkpointing else autocast
    # One bucket for each dtype that gradients travel in.
    return 2 * gathered + copies + bucket + bucket // 2


def _unpacked(spec: TrainingRunSpec, model: ModelFacts) -> int:
    """The largest layer of a quantised base: of attention and feed-forward in one, or of what modulates two streams."""
    if spec.model.quantization is None:
        return 0
    largest = model.width * max(3 * model.width + 2 * model.mlp_width, 12 * model.width)
    return largest * unpacked_bytes(spec.model.quantization, _precision_bytes(spec))


def _frozen_bytes(spec: TrainingRunSpec, model: ModelFacts, parameters: int) -> int:
    """Bytes of so many parameters of the denoiser as they are kept when frozen."""
    kind, precision_bytes = spec.model.quantization, _precision_bytes(spec)
    in_fp32 = math.ceil(parameters * model.fp32_share) * (4 - precision_bytes)  # what they take beyond the others
    if kind is None:
        return parameters * precision_bytes + in_fp32
    packed = int(parameters * model.quantized_share)
    rate = packed_bytes(kind, model.width, model.width) / model.width**2
    return math.ceil(packed * rate) + (parameters - packed) * precision_bytes + in_fp32


def _activations(spec: TrainingRunSpec, model: ModelFacts, choice: Choice) -> int:
    """What the forward pass keeps, and the largest block's temporaries in the backward pass."""
    references = max(len(source.references) for source in spec.data.sources)
    drawn = model.family.latent_tokens(*trained_extent(spec, model.family)) + model.text_tokens
    edge = model.family.reference_resolution(spec.data.resolution)
    tokens = choice.micro_batch_size * (drawn + _reference_tokens(model.family, references, edge))
    kept = model.activation_bytes_per_token * _precision_bytes(spec) // 2
    adapter = spec.adapter
    if isinstance(adapter, ControlNetAdapter):
        block_input = min(model.width * _precision_bytes(spec), kept // LARGEST_INPUT)
        pictures = choice.micro_batch_size * _kept_for_condition(spec, model)
        network_tokens = choice.micro_batch_size * drawn  # it is not shown the references
        return pictures + _controlled(model, choice, kept, block_input, tokens, network_tokens)
    if isinstance(adapter, FullAdapter) or (isinstance(adapter, LayerAdapter) and not _only(adapter, "attention")):
        kept = int(kept * WIDE_TARGETS)
    block = tokens * kept + _kept_by_adapter(spec, model, tokens)
    text = 0
    if isinstance(adapter, TextualInversionAdapter):
        text = choice.micro_batch_size * model.text_tokens * TEXT_VALUES_PER_TOKEN * _precision_bytes(spec)
    if not choice.gradient_checkpointing:
        return text + block * (model.layers + 1)
    block_input = min(model.width * _precision_bytes(spec), kept // LARGEST_INPUT)
    return text + tokens * block_input * model.layers + block * model.family.backward_blocks


def _controlled(
    model: ModelFacts, choice: Choice, kept: int, block_input: int, base_tokens: int, network_tokens: int
) -> int:
    """What a base and its control network keep; for each token one block of the base does `kept`, of an input of `block_input`."""
    # Gradients go through the base's blocks behind the first that the network adds to.
    based = base_tokens * (model.layers - (model.control_layers if model.family.control_pixels else 0))
    networked = network_tokens * model.control_layers
    if not choice.gradient_checkpointing:
        return int(kept * (based + networked * WIDE_TARGETS + base_tokens))
    working = int(base_tokens * kept * WIDE_TARGETS * model.family.backward_blocks)
    # What comes out of a block of the network is kept beside what goes in.
    return block_input * (based + 2 * networked) + working


def _kept_for_condition(spec: TrainingRunSpec, model: ModelFacts) -> int:
    """Of one conditioning picture that is given as pixels, what the layers keep that bring it to the size of latents."""
    if not model.family.control_pixels:
        return 0
    extent = trained_extent(spec, model.family)
    return extent.width * extent.height * CONDITION_VALUES_PER_PIXEL * _precision_bytes(spec)


def _kept_by_adapter(spec: TrainingRunSpec, model: ModelFacts, tokens: int) -> int:
    """What the adapter keeps in a block, beside what LoRA would."""
    adapter = spec.adapter
    if not isinstance(adapter, LayerAdapter):
        return 0
    return sum(kept_bytes(adapter, layer, tokens, _precision_bytes(spec)) for layer in _adapted_layers(adapter, model))


def _reference_tokens(family: FamilyFacts, references: int, edge: int) -> int:
    """Tokens of the reference pictures of one sample, each of the area of a square of `edge`: they are attended to like its own."""
    edge = -(-edge // family.pixel_multiple) * family.pixel_multiple
    return references * family.latent_tokens(edge, edge)


def _sample_phase(spec: TrainingRunSpec, model: ModelFacts, choice: Choice, train: Parts, *, frozen: int) -> int:
    """The state of training without its activations, the stock pipeline's other models, and the larger of its two steps."""
    family, extent = model.family, drawn_extent(spec, model.family)
    precision = _precision_bytes(spec)
    references = max(len(prompt.references) for prompt in spec.validation.prompts)
    edge = family.reference_resolution(family.sample_edge or spec.data.resolution)
    tokens = family.latent_tokens(*extent) + model.text_tokens
    tokens = GUIDED_SAMPLES * (tokens + _reference_tokens(family, references, edge))
    denoise = tokens * model.activation_bytes_per_token * precision // 2
    decode = passage_values(family.passages.decoding, extent, tiled=choice.tiled_samples) * precision
    working = max(denoise, decode)
    # DDP keeps its gradient buckets; the averages are swapped in while sampling, and the weights kept aside.
    state = train.total - train.activations
    aside = train.trained_weights if train.ema else 0
    return state + aside + frozen + working


def _only(adapter: LayerAdapter, preset: str) -> bool:
    """Whether the preset is all that is targeted. Regular expressions count as everything: they may match any module."""
    return set(adapter.targets) == {preset}


def _precision_bytes(spec: TrainingRunSpec) -> int:
    return 2 if spec.hyperparameters.precision == "bf16" else 4


def _share(size: int, shards: int) -> int:
    return -(-size // shards)
