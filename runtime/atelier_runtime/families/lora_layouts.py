"""How ComfyUI and kohya's scripts name the layers of each family in a LoRA file.

Facts are those of ComfyUI's `comfy/lora.py` and `comfy/utils.py`, of sd-scripts' `networks/lora_{flux,sd3}.py`, and of diffusers'
`loaders/lora_conversion_utils.py`, which reads such files back:

family    layer name in the file                             read by the stock pipeline's `load_lora_weights`
sdxl      lora_unet_<diffusers name with underscores>        yes
flux      lora_unet_<name in the original repository>        yes; `linear1` at the published width only
sd3       lora_unet_<name in the original repository>        no: diffusers has no converter, and loads nothing without an error
z_image   diffusion_model.<diffusers name>                   yes
wan       diffusion_model.<name in the original repository>  yes; the second expert with `load_into_transformer_2=True`

The original repositories of Flux and Stable Diffusion 3 fuse query, key and value (Flux also the first feed-forward layer of its
single blocks) into one layer: several modules of diffusers become one LoRA of a multiple of the rank.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

ATTENTION_NAMES = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}


@dataclass(frozen=True)
class LoraKey:
    """Where the LoRA of a module goes. The layer `name` holds `len(heights)` modules below each other, this one is number `part`.

    `heights` are the output rows of the parts as multiples of the input width, which a part that is not trained cannot tell.
    """

    name: str
    part: int = 0
    heights: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Rule:
    """A regular expression over whole module names, the template of the layer's name, and the place in a fused layer."""

    module: str
    layer: str
    part: int = 0
    heights: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class LoraLayout:
    """One family's names. `architecture` is the id in the modelspec header. `flat`: kohya's underscores, else dots."""

    architecture: str
    flat: bool
    rules: tuple[Rule, ...]

    def key(self, module: str) -> LoraKey | None:
        """The place of a module (its full name in diffusers); None where the layout has no name for it."""
        for rule in self.rules:
            if match := re.fullmatch(rule.module, module):
                layer = match.expand(rule.layer)
                name = f"lora_unet_{layer.replace('.', '_')}" if self.flat else f"diffusion_model.{layer}"
                return LoraKey(name, rule.part, rule.heights)
        return None


def _fused(prefix: str, modules: tuple[str, ...], layer: str, heights: tuple[int, ...]) -> Iterator[Rule]:
    for part, module in enumerate(modules):
        yield Rule(prefix + re.escape(module), layer, part, heights)


def _plain(prefix: str, layer_prefix: str, names: dict[str, str]) -> Iterator[Rule]:
    for module, layer in names.items():
        yield Rule(prefix + re.escape(module), layer_prefix + layer)


_QUERY_KEY_VALUE = ("to_q", "to_k", "to_v")
_ADDED_QUERY_KEY_VALUE = ("add_q_proj", "add_k_proj", "add_v_proj")
_THIRDS = (1, 1, 1)

SDXL = LoraLayout(
    architecture="stable-diffusion-xl-v1-base",
    flat=True,
    rules=(
        Rule(
            r"(?:down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.\d+\."
            r"(?:proj_in|proj_out|transformer_blocks\.\d+\.(?:attn[12]\.(?:to_[qkv]|to_out\.0)|ff\.net\.(?:0\.proj|2)))",
            r"\g<0>",
        ),
    ),
)

_DOUBLE, _SINGLE = r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."
FLUX = LoraLayout(
    architecture="flux-1-dev",
    flat=True,
    rules=(
        *_fused(_DOUBLE + r"attn\.", _QUERY_KEY_VALUE, r"double_blocks.\1.img_attn.qkv", _THIRDS),
        *_fused(_DOUBLE + r"attn\.", _ADDED_QUERY_KEY_VALUE, r"double_blocks.\1.txt_attn.qkv", _THIRDS),
        *_fused(
            _SINGLE,
            ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            r"single_blocks.\1.linear1",
            (1, 1, 1, 4),
        ),
        *_plain(
            _DOUBLE,
            r"double_blocks.\1.",
            {
                "attn.to_out.0": "img_attn.proj",
                "attn.to_add_out": "txt_attn.proj",
                "ff.net.0.proj": "img_mlp.0",
                "ff.net.2": "img_mlp.2",
                "ff_context.net.0.proj": "txt_mlp.0",
                "ff_context.net.2": "txt_mlp.2",
                "norm1.linear": "img_mod.lin",
                "norm1_context.linear": "txt_mod.lin",
            },
        ),
        *_plain(_SINGLE, r"single_blocks.\1.", {"proj_out": "linear2", "norm.linear": "modulation.lin"}),
    ),
)

SD3 = LoraLayout(
    architecture="stable-diffusion-3",
    flat=True,
    rules=(
        *_fused(_DOUBLE + r"attn\.", _QUERY_KEY_VALUE, r"joint_blocks.\1.x_block.attn.qkv", _THIRDS),
        *_fused(_DOUBLE + r"attn2\.", _QUERY_KEY_VALUE, r"joint_blocks.\1.x_block.attn2.qkv", _THIRDS),
        *_fused(_DOUBLE + r"attn\.", _ADDED_QUERY_KEY_VALUE, r"joint_blocks.\1.context_block.attn.qkv", _THIRDS),
        *_plain(
            _DOUBLE,
            r"joint_blocks.\1.",
            {
                "attn.to_out.0": "x_block.attn.proj",
                "attn2.to_out.0": "x_block.attn2.proj",
                "attn.to_add_out": "context_block.attn.proj",
                "ff.net.0.proj": "x_block.mlp.fc1",
                "ff.net.2": "x_block.mlp.fc2",
                "ff_context.net.0.proj": "context_block.mlp.fc1",
                "ff_context.net.2": "context_block.mlp.fc2",
            },
        ),
    ),
)

Z_IMAGE = LoraLayout(
    architecture="z-image",
    flat=False,
    rules=(
        Rule(
            r"(?:layers|context_refiner|noise_refiner)\.\d+\."
            r"(?:attention\.(?:to_[qkv]|to_out\.0)|feed_forward\.w[123]|adaLN_modulation\.0)",
            r"\g<0>",
        ),
    ),
)

WAN = LoraLayout(
    architecture="wan",
    flat=False,
    rules=(
        *_plain(r"blocks\.(\d+)\.attn1\.", r"blocks.\1.self_attn.", ATTENTION_NAMES),
        *_plain(r"blocks\.(\d+)\.attn2\.", r"blocks.\1.cross_attn.", ATTENTION_NAMES),
        *_plain(r"blocks\.(\d+)\.ffn\.", r"blocks.\1.ffn.", {"net.0.proj": "0", "net.2": "2"}),
    ),
)

LORA_LAYOUTS: dict[str, LoraLayout] = {"sdxl": SDXL, "flux": FLUX, "sd3": SD3, "z_image": Z_IMAGE, "wan": WAN}
