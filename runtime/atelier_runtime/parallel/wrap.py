"""A denoiser spread over the ranks, and what has to be undone to look inside.

Which weights are sharded (FSDP2) and which replicated (DDP):

* ddp: everything is replicated, gradients of trained parameters are averaged.
* fsdp2, few weights trained (an adapter): the frozen base is sharded, the adapter is replicated. An adapter's layers are tiny, and
  lie in another dtype inside the base's blocks, where a sharded group wants one dtype for all that it trains.
* fsdp2, most weights trained: these are sharded, but for what has another dtype than the bulk (modules kept in fp32, a few vectors).
* nothing trained, the base of a control network: sharded by fsdp2, and else left to each rank.
* deepspeed-zero2, deepspeed-zero3: see `zero`.

So a sharded denoiser may also be inside DDP, which then knows the replicated parameters only.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from atelier_api.run_file import ExecutionPlan
from atelier_api.v1alpha1.hyperparameters import Hyperparameters
from atelier_runtime.family import Family, named_blocks
from atelier_runtime.parallel.distributed import Distributed
from atelier_runtime.parallel.transparent import Transparent
from atelier_runtime.parallel.zero import STAGES, Partitioned, partition


class Replicated(Transparent, DistributedDataParallel):
    """A denoiser in DDP."""


def wrap(
    denoiser: nn.Module,
    plan: ExecutionPlan,
    family: Family,
    distributed: Distributed,
    *,
    hyperparameters: Hyperparameters,
) -> nn.Module:
    """The denoiser as the plan's strategy calls it. Call it after the adapter is on and before the optimizer is built.

    Parameters are sharded in place: under fsdp2 those of the denoiser are DTensors afterwards, and on the device of `distributed` (a
    denoiser that does not fit there as a whole is given on the CPU). Trained parameters are made those of rank 0.
    With precision bf16, FSDP's sharded weights that are stored in fp32 travel and compute in bf16, which halves the traffic; their
    gradients are summed in fp32. Collective.
    """
    if plan.gradient_checkpointing:
        enable: Any = denoiser.enable_gradient_checkpointing
        enable(_recomputed)  # before sharding: recomputation gathers weights again
    trained = {id(p) for p in denoiser.parameters() if p.requires_grad}
    if plan.strategy == "single" or (plan.strategy == "ddp" and not trained):
        return denoiser
    if plan.strategy == "ddp":
        return _replicate(denoiser, trained)
    if plan.strategy in STAGES:
        largest = max(sum(p.numel() for p in block.parameters()) for block in blocks_of(denoiser, family))
        whole_model = not _trains_adapter(denoiser)
        return partition(denoiser, plan, hyperparameters, distributed, largest_block=largest, whole_model=whole_model)
    compute_dtype = torch.bfloat16 if hyperparameters.precision == "bf16" else None
    replicated = _replicated_under_sharding(denoiser, compute_dtype)
    _shard(denoiser, family, replicated, distributed, _policy(denoiser, compute_dtype))
    return _replicate(denoiser, {id(p) for p in replicated}) if replicated else denoiser


def shards_weights(plan: ExecutionPlan) -> bool:
    """Whether no rank holds all weights: a model may then not fit on one device, and all ranks take part in every forward pass."""
    return plan.strategy in ("fsdp2", "deepspeed-zero3")


def unwrap(module: nn.Module) -> nn.Module:
    """The diffusers model inside, which is the one that was given to `wrap`."""
    return module.module if isinstance(module, Replicated | Partitioned) else module


def micro_batch(module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Forward passes of a micro-batch and their one backward pass. Gradients of replicated parameters stay with this rank until the
    `last` of a step, which sums them over the ranks.

    Gradients of sharded parameters, and under DeepSpeed all, are summed in every pass all the same: kept back, each rank would hold
    the gradient of the whole model, which did not fit in the first place.
    """
    if isinstance(module, Partitioned):
        module.start_micro_batch()
    return nullcontext() if last else _kept_back(module)


@contextmanager
def _kept_back(module: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for part in (module, *module.children()):  # a control network is beside its base
            if isinstance(part, Replicated):
                stack.enter_context(part.no_sync())
        yield


def full_state(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of the parameters and buffers `names` of the unwrapped module, whole and on the CPU; empty but on rank 0.

    Collective: all ranks give the same names in the same order. One tensor at a time is whole on the device.
    """
    model = unwrap(module)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    first = torch.distributed.get_rank() == 0
    state: dict[str, Tensor] = {}
    for name in names:
        tensor = tensors[name]
        if isinstance(module, Partitioned) and isinstance(tensor, Parameter):
            whole = module.weight(tensor)
        else:
            held = tensor.detach()
            whole = held.full_tensor() if isinstance(held, DTensor) else held
        if first:
            state[name] = whole.to("cpu", copy=True)
    return state


def blocks_of(denoiser: nn.Module, family: Family) -> list[nn.Module]:
    """The family's repeated blocks, in order, those of its control network behind them."""
    lists = family.control.lists if family.control is not None else ()
    paths = [*(blocks.attribute for blocks in family.blocks), *lists]
    return [block for path in paths for _, block in named_blocks(denoiser, path)]


def _recomputed(block: Callable[..., Any], *arguments: Any) -> Any:
    """The block's outputs; its activations are computed again in the backward pass.

    FSDP2 makes views of what goes into a block in the forward pass alone. A view has another stride along a dimension of size 1, by
    which torch chooses how it multiplies matrices and so what it saves, and recomputation that saves something else is an error.
    What is a view already has the same strides both times.
    """
    views = [a.view_as(a) if isinstance(a, Tensor) and a.requires_grad else a for a in arguments]
    return checkpoint(block, *views, use_reentrant=False)


def _trains_adapter(denoiser: nn.Module) -> bool:
    """Whether few of the weights are trained, or they are packed. Otherwise the model itself is, perhaps but for a few dead layers."""
    if not all(p.is_floating_point() for p in denoiser.parameters()):
        return True  # packed weights: fewer numbers than the weights that they stand for
    sizes = [(p.numel(), p.requires_grad) for p in denoiser.parameters()]
    return sum(size for size, trained in sizes if trained) < sum(size for size, _ in sizes) / 2


def _replicated_under_sharding(denoiser: nn.Module, compute_dtype: torch.dtype | None) -> list[Parameter]:
    """The trained parameters that FSDP leaves alone."""
    trained = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    if _trains_adapter(denoiser):
        return list(trained.values())
    sizes: Counter[torch.dtype] = Counter()
    for parameter in trained.values():
        sizes[parameter.dtype] += parameter.numel()
    bulk = sizes.most_common(1)[0][0]
    kept_in_fp32 = set(getattr(denoiser, "_keep_in_fp32_modules", None) or ()) if compute_dtype else set()
    return [p for name, p in trained.items() if p.dtype != bulk or kept_in_fp32 & set(name.split("."))]


def _policy(denoiser: nn.Module, compute_dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    """What sharded weights travel and compute in. A frozen base stays in the dtype it was loaded in.

    Inputs are never cast: rotary tables and time embeddings are fp32 on purpose, and autocast casts what it should.
    """
    if compute_dtype is None or _trains_adapter(denoiser):
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)


def _shard(
    denoiser: nn.Module,
    family: Family,
    replicated: Sequence[Parameter],
    distributed: Distributed,
    policy: MixedPrecisionPolicy,
) -> None:
    mesh = init_device_mesh(distributed.device.type, (distributed.world_size,))
    for parameter in replicated:  # FSDP moves what it shards, block by block: the denoiser may come from the CPU
        parameter.data = parameter.data.to(distributed.device)
    # The root, too, gives its weights back after the forward pass: kept whole through sampling, they would hide what is written to
    # the shards in the meantime (a moving average put in, the weights put back).
    for module in [*blocks_of(denoiser, family), denoiser]:
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=set(replicated), reshard_after_forward=True)


def _replicate(denoiser: nn.Module, reduced: set[int]) -> Replicated:
    """DDP over the parameters with these ids. Everything else is the checkpoint's, equal on all ranks, and is not even broadcast.

    No static graph and no search for unused parameters: a trained parameter without a gradient is a mistake of the family's list of
    dead modules, and fails loudly in the second step.
    """
    ignored = [name for name, parameter in denoiser.named_parameters() if id(parameter) not in reduced]
    ignored += [name for name, _ in denoiser.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(denoiser, ignored)  # type: ignore[no-untyped-call]
    return Replicated(denoiser, forward_sync_buffers=False, gradient_as_bucket_view=True)
