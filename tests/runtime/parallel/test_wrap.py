"""What a wrapped denoiser looks like from outside, in a group of this process alone."""

from collections.abc import Iterator

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import nn
from torch.distributed.tensor import DTensor

from atelier_api.run_file import ExecutionPlan
from atelier_api.v1alpha1.hyperparameters import Hyperparameters
from atelier_runtime import parallel
from atelier_runtime.families import get_family
from atelier_runtime.family import Blocks
from atelier_runtime.parallel.wrap import blocks_of
from family_models import tiny_pipeline

FAMILY = get_family("sd3")
NUMBERS = Hyperparameters(steps=1, precision="fp32")


def plan(strategy: str, **changes: object) -> ExecutionPlan:
    return ExecutionPlan(
        strategy=strategy, device="cpu", nodes=1, processes_per_node=1, micro_batch_size=1, gradient_accumulation=1,
        gradient_checkpointing=False, learning_rate=1e-4, threads_per_process=1, predicted_peak_memory_bytes=0,
    ).model_copy(update=changes)  # fmt: skip


@pytest.fixture
def alone() -> Iterator[parallel.Distributed]:
    yield parallel.start(plan("single"))
    parallel.stop()


@pytest.fixture
def denoiser() -> SD3Transformer2DModel:
    return tiny_pipeline("sd3").transformer.requires_grad_(True)


def predict(denoiser: nn.Module) -> torch.Tensor:
    config = parallel.unwrap(denoiser).config
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(1, 5, config.joint_attention_dim, generator=generator)
    pooled = torch.randn(1, config.pooled_projection_dim, generator=generator)
    noisy = torch.randn(1, 16, 8, 8, generator=generator)
    return denoiser(
        hidden_states=noisy, encoder_hidden_states=text, pooled_projections=pooled, timestep=torch.tensor([500.0]),
        return_dict=False,
    )[0]  # fmt: skip


def test_single_gives_the_denoiser_itself(alone, denoiser) -> None:  # type: ignore[no-untyped-def]
    assert parallel.wrap(denoiser, plan("single"), FAMILY, alone, hyperparameters=NUMBERS) is denoiser
    assert parallel.unwrap(denoiser) is denoiser


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
@pytest.mark.parametrize("wanted", [True, False])
def test_recomputation_is_switched_on_when_the_plan_wants_it(alone, denoiser, strategy: str, wanted: bool) -> None:  # type: ignore[no-untyped-def]
    wrapped = parallel.wrap(
        denoiser, plan(strategy, gradient_checkpointing=wanted), FAMILY, alone, hyperparameters=NUMBERS
    )
    assert wrapped.is_gradient_checkpointing is wanted


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("trained", ["everything", "one block's attention"])
def test_a_wrapped_denoiser_predicts_and_is_asked_as_the_plain_one(
    alone, denoiser, strategy: str, trained: str
) -> None:  # type: ignore[no-untyped-def]
    if trained != "everything":
        denoiser.requires_grad_(False)
        denoiser.transformer_blocks[0].attn.requires_grad_(True)
    expected, config = predict(denoiser).detach(), denoiser.config
    wrapped = parallel.wrap(denoiser, plan(strategy), FAMILY, alone, hyperparameters=NUMBERS)
    torch.testing.assert_close(predict(wrapped), expected)
    assert wrapped.config is config
    assert wrapped.dtype == torch.float32
    assert parallel.unwrap(wrapped) is denoiser
    with pytest.raises(AttributeError, match="no_such_attribute"):
        _ = wrapped.no_such_attribute


def test_fsdp_shards_blocks_and_rest_but_not_a_trained_minority(alone, denoiser) -> None:  # type: ignore[no-untyped-def]
    denoiser.requires_grad_(False)
    denoiser.transformer_blocks[0].attn.requires_grad_(True)
    parallel.wrap(denoiser, plan("fsdp2"), FAMILY, alone, hyperparameters=NUMBERS)
    for name, parameter in denoiser.named_parameters():
        assert isinstance(parameter, DTensor) is not parameter.requires_grad, name


def test_weights_are_sharded_again_after_a_forward_pass_without_gradients(alone, denoiser) -> None:  # type: ignore[no-untyped-def]
    wrapped = parallel.wrap(denoiser, plan("fsdp2"), FAMILY, alone, hyperparameters=NUMBERS)
    with torch.no_grad():
        before = predict(wrapped)
        assert all(isinstance(parameter, DTensor) for parameter in denoiser.parameters())
        denoiser.proj_out.weight.mul_(2)
        assert not torch.equal(predict(wrapped), before)


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
def test_full_state_gives_copies_of_what_is_named(alone, denoiser, strategy: str) -> None:  # type: ignore[no-untyped-def]
    expected = denoiser.proj_out.weight.detach().clone()
    wrapped = parallel.wrap(denoiser, plan(strategy), FAMILY, alone, hyperparameters=NUMBERS)
    state = parallel.full_state(wrapped, ["proj_out.weight", "pos_embed.pos_embed"])
    with torch.no_grad():
        denoiser.proj_out.weight.zero_()
    assert list(state) == ["proj_out.weight", "pos_embed.pos_embed"]
    assert torch.equal(state["proj_out.weight"], expected)


def test_a_micro_batch_before_the_last_keeps_replicated_gradients_from_being_summed(alone, denoiser) -> None:  # type: ignore[no-untyped-def]
    wrapped = parallel.wrap(denoiser, plan("ddp"), FAMILY, alone, hyperparameters=NUMBERS)
    summed: list[int] = []

    def count(_: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        summed.append(bucket.buffer().numel())
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, count)
    with parallel.micro_batch(wrapped, last=False):
        predict(wrapped).sum().backward()
    assert not summed
    with parallel.micro_batch(wrapped, last=True):
        predict(wrapped).sum().backward()
    assert sum(summed) == sum(parameter.numel() for parameter in denoiser.parameters())


def test_a_trained_parameter_without_gradient_fails_in_the_second_step(alone, denoiser) -> None:  # type: ignore[no-untyped-def]
    denoiser.register_parameter("dead", nn.Parameter(torch.ones(2)))
    wrapped = parallel.wrap(denoiser, plan("ddp"), FAMILY, alone, hyperparameters=NUMBERS)
    predict(wrapped).sum().backward()
    with pytest.raises(RuntimeError, match="did not receive grad"):
        predict(wrapped)


def test_blocks_are_found_in_lists_of_lists_and_alone(denoiser) -> None:  # type: ignore[no-untyped-def]
    inner = nn.ModuleList([nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)]), nn.ModuleList([nn.Linear(1, 1)])])
    outer = nn.ModuleDict({"down": nn.ModuleDict({"lists": inner}), "mid": nn.Linear(1, 1)})

    class Nested(type(FAMILY)):  # type: ignore[misc]
        blocks = (Blocks("down.lists"), Blocks("mid"))

    assert blocks_of(outer, Nested()) == [*inner[0], *inner[1], outer["mid"]]
    assert blocks_of(denoiser, FAMILY) == list(denoiser.transformer_blocks)
