"""A denoiser under DeepSpeed's ZeRO (arXiv:1910.02054): what each rank holds of it, and how a step is taken.

* stage 2: every rank has all weights; gradients and optimizer state are sharded.
* stage 3: the weights, frozen ones too, are sharded as well, and gathered module by module for as long as they compute.

Precision is autocast's, as with the other strategies: frozen weights stay in the dtype they were loaded in, trained ones are fp32.
At stage 3 the linear layers of a model that is trained as a whole travel in bf16 under autocast, and so do their gradients: DeepSpeed
has one dtype for both. All other gradients are summed in fp32. What was gathered is fp32 again, and autocast casts it once more:
it must not keep the copies until the end of the pass, which would be those of the whole model.

DeepSpeed's own checkpoints are tied to the number of ranks; ours are made of whole tensors, which this module gathers and deals out.
"""

import contextlib
import importlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from atelier_api.run_file import ExecutionPlan
from atelier_api.v1alpha1.hyperparameters import Hyperparameters
from atelier_runtime.parallel.distributed import Distributed
from atelier_runtime.parallel.transparent import Transparent

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each element, by torch's names."""

LIVE_BLOCKS = 2
"""Blocks whose weights stage 3 may hold gathered at once: the one that computes and the one that is fetched."""

LOWER_PRECISION = tuple(f"torch.nn.{kind}" for kind in ("Linear", "Conv1d", "Conv2d", "Conv3d"))
"""Layers whose fp32 weights autocast computes with in bf16: gathered in bf16 they are the same numbers, and half the traffic."""

Stage = Literal[2, 3]
STAGES: dict[str, Stage] = {"deepspeed-zero2": 2, "deepspeed-zero3": 3}
"""Stage by the plan's strategy."""


class Partitioned(Transparent, nn.Module):
    """A denoiser run by DeepSpeed."""

    def __init__(self, engine: Any, stage: Stage) -> None:
        super().__init__()
        self.module: nn.Module = engine.module
        self.stage = stage
        self._announced = False
        # Not a submodule: the engine is a module that contains the model itself.
        self.__dict__["engine"] = engine

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """The model's. In a micro-batch the engine hears of the first pass alone: it expects a backward pass for each it hears of."""
        announce = torch.is_grad_enabled() and not self._announced
        self._announced |= announce
        return (self.engine if announce else self.module)(*arguments, **named)

    def start_micro_batch(self) -> None:
        """The forward passes that follow, however many, have one backward pass."""
        self._announced = False

    def step(self, learning_rate: float) -> Tensor:
        """One optimizer step with the gradients of the backward passes since the last. Gives their norm before clipping.

        The norm of gradients that are not finite is infinite, and no weight is changed. Collective.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        norm = self.engine.get_global_grad_norm() if self.engine.was_step_applied() else float("inf")
        return torch.as_tensor(norm, dtype=torch.float32, device=self.engine.device)

    def state(self) -> Sequence[tuple[Tensor, dict[str, Tensor]]]:
        """This rank's parts of all trained weights, each a flat fp32 vector, and the optimizer's state of it; the live ones."""
        optimizer = self.engine.optimizer
        parts = optimizer.single_partition_of_fp32_groups if self.stage == 2 else optimizer.fp32_partitioned_groups_flat
        return [(part, optimizer.optimizer.state[part]) for part in parts]

    def link_state(self) -> None:
        """Tell DeepSpeed that the dictionaries of `state` have been filled: it looks for the parts of a parameter in them."""
        if self.stage == 2:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def moment(self, parameter: Parameter, name: str) -> Tensor:
        """One of the `MOMENTS` of a trained parameter, whole, on the device. Collective."""
        from deepspeed.utils import safe_get_full_optimizer_state

        whole: Tensor = safe_get_full_optimizer_state(parameter, name)
        return whole

    def set_moment(self, parameter: Parameter, name: str, whole: Tensor) -> None:
        """Take over a moment. `whole` is the same on all ranks."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage == 2:
            safe_set_full_optimizer_state(parameter, whole, name)
        else:
            safe_set_local_optimizer_state(parameter, self.part_of(parameter, whole), name)

    def weight(self, parameter: Parameter) -> Tensor:
        """A parameter as it computes, trained or frozen, whole, on the device. Collective."""
        if self.stage == 2:
            return parameter.detach()
        return self.whole(parameter, self.part(parameter))

    def set_weight(self, parameter: Parameter, whole: Tensor) -> None:
        """Take over a trained weight, both as it computes and in the optimizer. `whole` is the same on all ranks."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        part = self.part_of(parameter, whole)
        if self.stage == 2:
            safe_set_full_fp32_param(parameter, whole)
        else:
            safe_set_local_fp32_param(parameter, part)
        self.part(parameter).data.copy_(part)

    def part(self, parameter: Parameter) -> Tensor:
        """What this rank holds of a parameter, the live tensor: all of it, or at stage 3 a flat share, the last one padded."""
        return parameter if self.stage == 2 else parameter.ds_tensor  # type: ignore[attr-defined]

    def part_of(self, parameter: Parameter, whole: Tensor) -> Tensor:
        """The elements of `whole` that `part` is made of."""
        if self.stage == 2:
            return whole
        share = self.part(parameter).numel()
        padded = torch.nn.functional.pad(whole.flatten(), (0, share * self.engine.dp_world_size - whole.numel()))
        return padded.narrow(0, share * torch.distributed.get_rank(), share)

    def whole(self, parameter: Parameter, part: Tensor) -> Tensor:
        """The tensor of the parameter's shape that the ranks have parts of, like those of `part`. Collective."""
        if self.stage == 2:
            return part
        parts = part.new_empty(part.numel() * self.engine.dp_world_size)
        torch.distributed.all_gather_into_tensor(parts, part.contiguous())
        shape: torch.Size = parameter.ds_shape  # type: ignore[attr-defined]
        return parts[: shape.numel()].view(shape)

    def release(self) -> None:
        """Give back weights that are still gathered: they would hide what is written to the parts."""
        if self.stage == 3:
            self.engine.optimizer.empty_partition_cache()


def partition(
    denoiser: nn.Module,
    plan: ExecutionPlan,
    hyperparameters: Hyperparameters,
    distributed: Distributed,
    *,
    largest_block: int,
    whole_model: bool,
) -> Partitioned:
    """The denoiser under the plan's stage, on the device of `distributed`; at stage 3 it may come from the CPU.

    The optimizer is torch's AdamW, whose state is made by the caller. `largest_block` is the number of elements of the largest
    block; `whole_model` whether most of the weights are trained. Trained parameters are made those of rank 0. Collective.
    """
    stage = STAGES[plan.strategy]
    deepspeed = _library(distributed.device)
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    bucket = min(largest_block, sum(parameter.numel() for parameter in trained))
    config = _config(stage, plan, hyperparameters, largest_block=largest_block, bucket=bucket)
    if hyperparameters.precision == "bf16":
        # The engine switches an outer autocast off. What is of no listed class travels in the dtype it is stored in.
        autocast: dict[str, Any] = {"enabled": True, "dtype": "bfloat16"}
        listed = LOWER_PRECISION if stage == 3 and whole_model else ()
        config["torch_autocast"] = autocast | {"lower_precision_safe_modules": list(listed)}
    if stage == 3:
        for module in denoiser.modules():
            # DeepSpeed asks again and again, and it takes torch long to say that a module has no such attribute.
            deepspeed.utils.set_z3_leaf_module(module, False)
        _drop_copies(denoiser)
        deepspeed.zero.Init(module=denoiser, config_dict_or_path=config)
        for buffer in denoiser.buffers():
            buffer.data = buffer.data.to(distributed.device)
    else:
        denoiser.to(distributed.device)
    numbers = hyperparameters.optimizer
    optimizer = torch.optim.AdamW(
        trained,
        lr=plan.learning_rate,
        betas=(numbers.beta1, numbers.beta2),
        eps=numbers.epsilon,
        weight_decay=numbers.weight_decay,
        fused=True,
    )
    engine, *_ = deepspeed.initialize(model=denoiser, optimizer=optimizer, config=config)
    return Partitioned(engine, stage)


def _drop_copies(denoiser: nn.Module) -> None:
    """Have autocast drop its bf16 copies of the denoiser's fp32 weights at once, whoever entered it."""
    outer: list[bool] = []

    def enter(_module: nn.Module, _inputs: object) -> None:
        outer.append(torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)

    def leave(_module: nn.Module, _inputs: object, _output: object) -> None:
        torch.set_autocast_cache_enabled(outer.pop())

    denoiser.register_forward_pre_hook(enter)
    denoiser.register_forward_hook(leave, always_call=True)


def _library(device: torch.device) -> Any:
    """DeepSpeed, for the device, talking through our process group and not to the console."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.runtime.zero import partitioned_param_coordinator

    _import_without_compiler("deepspeed.runtime.zero.muon.original_muon")
    # Before it gives back what a module has gathered, it asks all modules of the next two blocks what they hold.
    partitioned_param_coordinator.iter_params = _parameters_of
    # Else each hook of each module asks several times whether somebody records ranges.
    deepspeed.utils.nvtx.enable_nvtx = False
    if device.type == "cpu":
        set_accelerator(CPU_Accelerator())  # it takes a GPU where there is one
        # Else it compiles collectives of its own for processes of one machine, which takes a compiler and half a minute.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def _import_without_compiler(name: str) -> None:
    """Import a module of DeepSpeed whose functions are not compiled.

    It imports those of an optimizer to say that ours is another one, and torch's compiler with them, which takes seconds.
    """
    from deepspeed.runtime import compiler

    compile_later = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        with contextlib.suppress(ModuleNotFoundError):  # a version without it imports nothing of the kind
            importlib.import_module(name)
    finally:
        compiler.compile = compile_later


def _parameters_of(module: nn.Module, recurse: bool = False) -> Iterator[Parameter]:
    """What DeepSpeed's `iter_params` gives, without making names: the module's parameters, and those of others that it reads."""
    own = module.parameters() if recurse else (held for held in module._parameters.values() if held is not None)
    external: Iterable[tuple[int, Parameter]] = module.ds_external_parameters()  # type: ignore[operator]
    return chain(own, (parameter for _, parameter in external))


def _config(
    stage: Stage, plan: ExecutionPlan, hyperparameters: Hyperparameters, *, largest_block: int, bucket: int
) -> dict[str, Any]:
    """DeepSpeed's settings, sizes in elements. What bounds its memory is set here, so that the planner can count on it."""
    zero: dict[str, Any] = {
        "stage": stage,
        # It would replace torch's `linear` for good.
        "memory_efficient_linear": False,
        "reduce_bucket_size": bucket,
    }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": largest_block,
            "stage3_max_live_parameters": LIVE_BLOCKS * largest_block,
            "stage3_max_reuse_distance": LIVE_BLOCKS * largest_block,
            # Everything is sharded, small vectors too: they travel with the matrices beside them.
            "stage3_param_persistence_threshold": 0,
        }
    return {
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        # Whoever calls `step` says when the gradients are complete.
        "managed_gradient_accumulation": False,
        "gradient_clipping": hyperparameters.gradient_clip or 0.0,
        "zero_optimization": zero,
        "steps_per_print": None,
    }
