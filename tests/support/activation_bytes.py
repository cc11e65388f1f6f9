"""What a training step keeps for its backward pass, measured at full size without a device: on the meta device nothing is allocated.

Two things are imitated, since they happen on a GPU only: autocast to bf16 with CUDA's lists of operations, and flash attention, which
keeps queries, keys, values, output and one fp32 number per query; the kernels that take a mask keep it too, as an addend in bf16.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from atelier_api.families import Flavour
from atelier_api.v1alpha1.adapter import LoraAdapter
from atelier_runtime import adapters
from atelier_runtime.control import Control, Controlled
from atelier_runtime.family import Conditions, Family
from family_models.published_parts import without_memory

IN_BF16 = {
    F.linear,
    F.conv1d,
    F.conv_transpose1d,
    F.conv2d,
    F.conv3d,
    torch.matmul,
    torch.bmm,
    torch.baddbmm,
    torch.einsum,
    Tensor.matmul,
    Tensor.__matmul__,
}
IN_FP32 = {F.layer_norm, F.group_norm, F.softmax, Tensor.softmax, torch.softmax, torch.pow, Tensor.pow, Tensor.__pow__}
IN_FP32 |= {
    torch.exp,
    Tensor.exp,
    torch.rsqrt,
    Tensor.rsqrt,
    torch.cumsum,
    Tensor.sum,
    torch.sum,
    torch.norm,
    Tensor.norm,
}


class FlashAttention(torch.autograd.Function):
    """Saves what the fused kernels save; computes nothing."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor, addend: Tensor | None) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        log_sum = query.new_empty(query.shape[:-1], dtype=torch.float32)
        context.save_for_backward(query, key, value, output, log_sum, addend)
        return output


class CudaAutocast(TorchFunctionMode):
    """CUDA's autocast to bf16, for tensors of any device.

    Masks of captions come with values, since lengths are read from them, and lose them where they meet tensors without. `low` is the
    precision of matrix products and of attention: with fp32 nothing is cast.
    """

    def __init__(self, low: torch.dtype) -> None:
        super().__init__()
        self._low = low
        self._on = True

    @contextmanager
    def off(self) -> Iterator[None]:
        """Nothing is cast, as in layers that switch autocast off."""
        before, self._on = self._on, False
        try:
            yield
        finally:
            self._on = before

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.all:
            # Asked whether a picture is missing that the caller left empty: there is no value to look at.
            return torch.ones((), dtype=torch.bool, device="cpu")
        if function is not Tensor.__getitem__ and (function is F.pad or any(is_valueless(each) for each in args)):
            args = tuple(each.to("meta") if isinstance(each, Tensor) and each.ndim else each for each in args)
        if function is Tensor.__bool__ and args[0].is_meta:
            return True  # a choice by a length, which has no value here: that of long sequences
        if function is F.scaled_dot_product_attention:
            inputs = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            query, key, value = (cast(inputs[name], self._low) for name in ("query", "key", "value"))
            mask = inputs.get("attn_mask")
            return FlashAttention.apply(query, key, value, None if mask is None else mask.to(self._low))
        dtype = self._low if function in IN_BF16 else torch.float32 if function in IN_FP32 else None
        if dtype is not None and self._on:
            args = tuple(cast(argument, dtype) for argument in args)
            kwargs = {key: cast(argument, dtype) for key, argument in kwargs.items()}
        return function(*args, **kwargs)


def is_valueless(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.is_meta


def cast(argument: Any, dtype: torch.dtype) -> Any:
    if isinstance(argument, list | tuple) and argument and isinstance(argument[0], Tensor):
        return type(argument)(cast(item, dtype) for item in argument)
    return argument.to(dtype) if isinstance(argument, Tensor) and argument.is_floating_point() else argument


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor], low: torch.dtype = torch.bfloat16) -> int:
    """Bytes of the tensors that autograd keeps after `forward`, each storage once, without the weights themselves.

    `low` is the precision of matrix products.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held on to, so that no later storage gets its number
        return tensor

    mode = CudaAutocast(low)

    def switched(*_: Any, enabled: bool = True, **__: Any) -> AbstractContextManager[None]:
        return nullcontext() if enabled else mode.off()

    # Layers that switch autocast off for a few lines ask torch for that of their device, and there is none for meta; what is
    # recomputed asks whether there is one, to be under it again.
    known = mock.patch.object(torch.amp, "is_autocast_available", return_value=True)
    asked = mock.patch.object(torch, "autocast", switched)
    plain = mock.patch.object(
        torch.utils.checkpoint, "_get_autocast_kwargs", return_value=({"enabled": True}, {"enabled": False})
    )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), mode, known, asked, plain:
        output = forward()
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def bytes_per_token(
    family: Family,
    flavour: Flavour,
    model: nn.Module,
    features: Callable[[], dict[str, Tensor]] | None = None,
    *,
    shared: Callable[[], dict[str, Tensor]] = dict,
) -> float:
    """Bytes that a block keeps per token of a sample, on the average of the blocks, for LoRA on `attention` over weights in bf16.

    `model` is a published denoiser on the meta device. One sample of 1024 x 1024 pixels, 81 frames of 832 x 480 or 240 seconds, with
    a reference of the same size where the family takes one. A family that needs fp32 is measured in it; half of that is what the
    table would say.
    """
    facts = family.facts
    low = torch.float32 if facts.needs_fp32 else torch.bfloat16
    if facts.needs_fp32:
        model.float()
    width, height, frames = (832, 480, 81) if facts.modality == "video" else (1024, 1024, 1)
    depth = [(frames - 1) // facts.temporal_factor + 1] if facts.modality == "video" else []
    grid = [*depth, height // facts.latent_factor, width // facts.latent_factor]
    if facts.sample_rate is not None:
        width, height, frames = 1, 1, 240 * facts.sample_rate
        grid = [frames // facts.latent_factor]
    with torch.device("meta"):
        noisy = torch.empty(1, facts.latent_channels, *grid)
        references = (torch.empty(1, facts.latent_channels, *noisy.shape[-2:]),) if facts.references else ()
        text = features() if features else text_features(model, flavour.text_tokens)
        conditions = Conditions(text=text, sizes=torch.empty(1, 6), references=references, shared=shared())
        time = torch.empty(1)

    def measured(model: nn.Module) -> int:
        with torch.device("meta"):
            return saved_bytes(model, lambda: family.predict(model, noisy, time, conditions), low)

    # OmniGen's blocks share some of what they keep, more or less of it from one measurement to the next.
    lists = [part.attribute for part in family.blocks if similar(model.get_submodule(part.attribute))]
    lists = [] if family.name == "omnigen" else lists
    total = bytes_of_similar_blocks(family, model, lists, measured)
    pictures = (1 + len(references)) * facts.latent_tokens(width, height, frames)
    return total * 2 / low.itemsize / flavour.layers / (pictures + flavour.text_tokens)


def similar(blocks: nn.Module) -> bool:
    """Whether there are more than four blocks, and all but the first and the last have weights of the same shapes."""
    shapes = [[(name, tensor.shape) for name, tensor in block.named_parameters()] for block in blocks.children()]
    return len(shapes) > 4 and all(each == shapes[1] for each in shapes[2:-1])


def bytes_of_similar_blocks(
    family: Family, model: nn.Module, lists: list[str], measured: Callable[[nn.Module], int]
) -> int:
    """What the whole model keeps, of which each of these lists of blocks is measured with two to four of its blocks.

    Each further block must keep as much as the one before it.
    """
    whole = {name: list(model.get_submodule(name).children()) for name in lists}

    def take(name: str, blocks: list[nn.Module]) -> None:
        model.set_submodule(name, nn.ModuleList(blocks))

    for name, blocks in whole.items():
        take(name, [*blocks[:3], blocks[-1]])
    adapters.install(model, LoraAdapter(rank=16, targets=["attention"]), family)
    total = four = measured(model)
    for name, blocks in whole.items():
        sizes = [four]
        for middle in (blocks[1:2], []):
            take(name, [blocks[0], *middle, blocks[-1]])
            sizes.append(measured(model))
        take(name, [*blocks[:3], blocks[-1]])
        further, before = sizes[0] - sizes[1], sizes[1] - sizes[2]
        assert further == before, f"the blocks of {name} do not keep the same: {sizes}"
        total += (len(blocks) - 4) * further
    return total


def copied_without_memory(control: Control, base: nn.Module) -> nn.Module:
    """The control network of a base on the meta device, in the base's precision and trainable."""
    base.requires_grad_(False)
    network = without_memory(lambda: control.copied(base)).to(torch.bfloat16)
    # Some layers of the base were made such that they can be run without memory.
    modules = dict(base.named_modules())
    for name, module in network.named_modules():
        if isinstance(modules.get(name), type(module)):
            module.__class__ = type(modules[name])
    unused = tuple(f"{name}." for name in control.unused(network))
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not f"{name}.".startswith(unused))
    return network


def bytes_with_control(
    family: Family,
    flavour: Flavour,
    base: Any,
    features: Callable[[], dict[str, Tensor]] | None = None,
    *,
    recompute: bool,
) -> int:
    """Bytes that a frozen base and its control network keep of a sample of 1024 x 1024 pixels, with a reference if it takes one."""
    assert family.control is not None
    network: Any = copied_without_memory(family.control, base)
    if recompute:
        base.enable_gradient_checkpointing()
        network.enable_gradient_checkpointing()
    together = Controlled(base, network, family.control)
    edge = 1024 // int(family.facts.latent_factor)
    with torch.device("meta"):
        noisy = torch.empty(1, family.facts.latent_channels, edge, edge)
        condition = torch.empty(1, 3, 1024, 1024) if family.control.takes == "pixels" else noisy
        text = features() if features else text_features(base, flavour.text_tokens)
        references = (noisy,) if family.facts.references else ()
        conditions = Conditions(text=text, sizes=torch.empty(1, 6), references=references, control=condition)
        return saved_bytes(together, lambda: family.predict(together, noisy, torch.empty(1), conditions))


def text_features(model: Any, tokens: int) -> dict[str, Tensor]:
    """Features of one caption of full length, without values; masks are real, since lengths are read from them.

    A second encoder's tokens join those of the first, so the first may as well have them all.
    """
    config = model.config
    # A caption's own width comes first where a projection leads from it to that of the cross-attention.
    widths = (
        "joint_attention_dim",
        "cap_feat_dim",
        "text_dim",
        "in_text_dim",
        "text_embed_dim",
        "caption_channels",
        "encoder_hid_dim",
        "cross_attention_dim",
    )
    width = next(config[name] for name in widths if config.get(name))
    embedding = config.get("projection_class_embeddings_input_dim")
    pooled = config.get("pooled_projection_dim") or config.get("in_text_dim2")
    pooled = pooled or (embedding - 6 * config.addition_time_embed_dim if embedding else 1)
    return {
        "embeds": torch.empty(1, tokens, width, dtype=torch.bfloat16),
        "pooled": torch.empty(1, pooled, dtype=torch.bfloat16),
        "mask": torch.ones(1, tokens, dtype=torch.bool, device="cpu"),
        "embeds_2": torch.empty(1, 0, config.get("text_embed_2_dim", 1), dtype=torch.bfloat16),
        "mask_2": torch.ones(1, 0, dtype=torch.bool, device="cpu"),
    }
