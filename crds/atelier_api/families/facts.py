"""What validation and the planner must know of a model family, without torch.

Sizes are those of the published configs: tests/runtime/test_family_facts.py builds each one without memory and compares.

`activation_bytes_per_token` is measured there on a whole forward pass over one sample (1024 x 1024 pixels, clips 81 frames of
832 x 480, sounds 240 seconds) as: bytes of all storages that autograd saves, weights apart / layers / (latent tokens + text tokens).
It assumes CUDA's autocast, so norms and their inputs are kept in fp32, and flash attention, which keeps query, key, value, output and
one number per query; of a family that needs fp32 it is half of what that keeps. With adapters on `all` as well it is 1.14 to 1.32
times as much, in full-rank training 1.17 (UNet) to 1.76 times.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from atelier_api.quantizations import QUANTIZATIONS, Quantization


@dataclass(frozen=True)
class Flavour:
    """A published checkpoint and its sizes.

    `parameters` counts the denoiser only (one expert), `width` is the hidden size of a block, `mlp_width` of its feed-forward.
    `text_tokens` are the tokens that take part in attention beside the picture's. `encoder_parameters` counts the encoders of text and
    of pictures that are shown,
    `vae_parameters` the autoencoder. `activation_bytes_per_token` is what one block keeps for the backward pass of LoRA on
    `attention`, in bf16 and without recompute, per token of a sample (averaged where blocks differ). `largest_block` is the
    parameters of the largest unit that is sharded as a whole, where the blocks differ; 0: they are all alike. `guidance` is what the
    stock pipeline does with a negative prompt: contrasts with it (`on`), does so only when it is given a guidance (`off`), or ignores
    it, as the checkpoint embeds its guidance (`distilled`). `frames` are those of a clip that an image-to-video checkpoint is shown.
    `quantized_share` is the part of `parameters` that a quantised base keeps in few bits, at most 0.02 too little; `fp32_share` is the
    part that the network's class keeps in fp32 whatever the precision, 0 below 0.01. tests/operator/planner/test_quantized_memory.py
    measures both. `text_blocks` are those of `layers` that the text alone goes through. `control_parameters` and `control_layers` are
    those of the control network that is trained beside it; 0 where none can be.
    """

    name: str
    source: str
    parameters: int
    layers: int
    width: int
    mlp_width: int
    text_tokens: int
    encoder_parameters: int
    vae_parameters: int
    activation_bytes_per_token: int
    experts: int = 1
    largest_block: int = 0
    guidance: Literal["on", "off", "distilled"] = "on"
    frames: tuple[Literal["first", "last"], ...] = ()
    quantized_share: float = 0.98
    fp32_share: float = 0.0
    text_blocks: int = 0
    control_parameters: int = 0
    control_layers: int = 0

    @property
    def picture_blocks(self) -> int:
        """Blocks that the tokens of what is drawn go through."""
        return self.layers - self.text_blocks


@dataclass(frozen=True)
class Vocabulary:
    """A text encoder that the stock pipeline can be given new tokens for: its components, and its name in files of such tokens."""

    key: str
    tokenizer: str
    text_encoder: str


@dataclass(frozen=True)
class Passage:
    """What an autoencoder holds of a sample that goes through it in one direction.

    `values` for each pixel of each of the `frames` that it works on at once, of a sound for each of its samples in time; 0 frames: all
    of a clip. `tile` is the edge in pixels, or the length in a sound's samples, of the tiles that it can work on instead; 0: none.
    """

    values: int
    frames: int = 1
    tile: int = 512


@dataclass(frozen=True)
class Passages:
    """Both directions, measured at published sizes by tests/operator/planner/test_autoencoder_memory.py.

    `untiled` is why the autoencoder does not work on tiles, empty where it does.
    """

    encoding: Passage
    decoding: Passage
    untiled: str = ""

    @property
    def largest_whole(self) -> int:
        """Edge in pixels, or length, up to which a sample certainly stays in one piece where tiles are switched on."""
        return min(self.encoding.tile, self.decoding.tile)


@dataclass(frozen=True)
class FamilyFacts:
    """One family. `frame_rule` (m, r): a clip has n = r modulo m frames. `shift` is the fallback where a checkpoint names none.

    `latent_factor` and `temporal_factor` are the autoencoder's, a fraction where pixels are scaled in front of it; `patch` is the side
    of a token in latent pixels. `autoencoder` names the components between pixels and latents, the one that encodes first.
    `noise_schedule`: the noise of a diffusion family grows by the checkpoint's betas, at integer steps, or as a cosine of a continuous
    time. `needs_fp32` is why a family cannot be trained in bf16, empty where it can. `pipelines` are the `_class_name`s in
    `model_index.json` of checkpoints that the family can train. Above `guidance_above` the stock pipeline contrasts with the negative
    prompt. `backward_blocks` is how many average blocks' activations the backward pass holds with recompute: one and its gradients,
    but more in a UNet, whose widest level is many times the average. `lora_component` is the component that takes a LoRA where the
    stock pipeline has no loader for one. `kohya`: LoRA files of ComfyUI and kohya-ss have names for its layers. `library` is the
    Python module that has the pipeline and the denoisers. `references` is how many reference pictures a sample may have beside its
    target: a family that takes some trains on pairs, and each sample needs at least one.
    `reference_edge` is the edge of the square whose area they are scaled to, where that is not `data.resolution`. `continues`: the
    denoiser is shown as many first frames of a clip as a run says, of a number that fits `frame_rule`.
    `sample_rate` is in samples per second, of a family of sounds; its `latent_factor` is in samples, its `patch` in latents.
    `own_shift`: the stock pipeline shifts its noise levels by `shift` itself, whatever the checkpoint's scheduler says; `empirical`
    by the number of tokens and of its steps.
    `negative_prompts`: what it contrasts with can be written; else it is something learnt. `sample_edge` is
    that of what the stock pipeline draws, in the aspect of the reference and as large, where it takes no size. `quantizations`
    are the kinds that its frozen base may be kept in; `quantization_doubt` says why it has not all of them, or why none is advised.
    `uncontrolled` is why no control network can be trained for the family, empty where one can; `control_pixels`: it is given pixels,
    and joins the base behind the blocks that it copies, so that no gradient goes through those.
    `vocabularies` are those of text encoders in which textual inversion can learn words: all that tell the denoiser of a caption's
    words, where the stock pipeline loads new ones; none: there is no textual inversion.
    `passages` are those of samples through the autoencoder; where nothing is said, of diffusers' `AutoencoderKL`.
    `time_vectors` is how many vectors of a block's width its time embedder makes; `time_embedder_parameters` are those of a second one
    and of what is added at negative times, where they do not follow from that.
    """

    name: str
    title: str
    modality: Literal["image", "video", "audio"]
    objective: Literal["flow", "diffusion"]
    pixel_multiple: int
    latent_channels: int
    latent_factor: int | Fraction
    patch: int
    shift: float | Literal["dynamic", "empirical", "none"]
    licence: str
    flavours: tuple[Flavour, ...]
    frame_rule: tuple[int, int] | None = None
    temporal_factor: int = 1
    frame_rate: float | None = None
    pipelines: tuple[str, ...] = ()
    guidance_above: float = 1.0
    backward_blocks: int = 2
    kohya: bool = True
    references: int = 0
    reference_edge: int | None = None
    sample_edge: int | None = None
    lora_component: str | None = None
    library: str = "diffusers"
    continues: bool = False
    sample_rate: int | None = None
    own_shift: bool = False
    negative_prompts: bool = True
    autoencoder: tuple[str, ...] = ("vae",)
    noise_schedule: Literal["betas", "cosine"] = "betas"
    needs_fp32: str = ""
    quantizations: tuple[Quantization, ...] = QUANTIZATIONS
    quantization_doubt: str = ""
    uncontrolled: str = "none is built in for it"
    control_pixels: bool = False
    vocabularies: tuple[Vocabulary, ...] = ()
    passages: Passages = Passages(Passage(768), Passage(768))
    time_vectors: int = 1
    time_embedder_parameters: int = 0

    def reference_resolution(self, resolution: int) -> int:
        """Edge in pixels of the square whose area references have in a run of `resolution`."""
        return self.reference_edge or resolution

    def latent_tokens(self, width: int, height: int, frames: int = 1) -> int:
        """Tokens of one sample of `width` x `height` pixels and `frames` frames; of a sound of `frames` samples."""
        if self.modality == "audio":
            latents = -(-frames // self.latent_factor)
            return -(-latents // self.patch)
        edge = self.latent_factor * self.patch
        latent_frames = (frames - 1) // self.temporal_factor + 1
        return (width // edge) * (height // edge) * latent_frames
