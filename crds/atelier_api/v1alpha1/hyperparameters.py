"""`spec.hyperparameters`: steps, batch, learning rate, optimizer, precision."""

from typing import Annotated, Literal

from pydantic import Field

from atelier_api.v1alpha1.base import Block, Decimal


class LearningRateSchedule(Block):
    """How the learning rate moves over the run."""

    type: Literal["constant", "linear", "cosine", "polynomial"] = Field(
        default="constant",
        description="Shape after the warm-up; all but `constant` fall to `end` times the learning rate at the last step.",
    )
    warmup_steps: int = Field(default=0, ge=0, le=1_000_000, description="Steps of linear rise from zero.")
    end: Annotated[Decimal, Field(ge=0, le=1)] = Field(
        default=0.0, description="Last value as a fraction of the learning rate."
    )
    power: Annotated[Decimal, Field(gt=0, le=10)] = Field(default=0.8, description="Exponent of the polynomial shape.")


class Optimizer(Block):
    """AdamW (arXiv:1711.05101)."""

    type: Literal["adamw", "adamw-bf16"] = Field(
        default="adamw",
        description="`adamw` keeps trained weights and moments in fp32. `adamw-bf16` keeps them in bf16 and rounds stochastically.",
    )
    beta1: Annotated[Decimal, Field(ge=0, lt=1)] = Field(default=0.9, description="Decay of the first moment.")
    beta2: Annotated[Decimal, Field(ge=0, lt=1)] = Field(default=0.999, description="Decay of the second moment.")
    epsilon: Annotated[Decimal, Field(gt=0, le=1)] = Field(default=1e-8, description="Term added to the denominator.")
    weight_decay: Annotated[Decimal, Field(ge=0, le=10)] = Field(default=0.01, description="Decoupled weight decay.")


class Ema(Block):
    """Exponential moving average of the trained weights; samples and exports use it."""

    decay: Annotated[Decimal, Field(gt=0, lt=1)] = Field(
        default=0.995, description="Decay; early steps use min(decay, (1 + n) / (10 + n))."
    )


class Hyperparameters(Block):
    """Numbers of the training loop."""

    steps: int = Field(ge=1, le=10_000_000, description="Optimizer steps of the run.")
    global_batch_size: int = Field(
        default=1, ge=1, le=65536, description="Samples per optimizer step over all processes and accumulation steps."
    )
    micro_batch_size: int | None = Field(
        default=None, ge=1, le=4096, description="Samples per forward pass and process. Default: the planner's choice."
    )
    learning_rate: Annotated[Decimal, Field(gt=0, le=1)] | None = Field(
        default=None, description="Peak learning rate. Default: 1e-4 for adapters, 1e-5 for full-rank."
    )
    schedule: LearningRateSchedule = Field(default_factory=LearningRateSchedule, description="Learning-rate schedule.")
    optimizer: Optimizer = Field(default_factory=Optimizer, description="Optimizer.")
    gradient_clip: Annotated[Decimal, Field(gt=0, le=1000)] | None = Field(
        default=1.0, description="Largest norm of the gradient; `null` turns clipping off."
    )
    ema: Ema | None = Field(default=None, description="Moving average of the trained weights. Default: off.")
    seed: int = Field(default=42, ge=0, le=2**31 - 1, description="Seed of everything random in the run.")
    precision: Literal["bf16", "fp32"] = Field(
        default="bf16", description="Precision of the base model and of the forward pass. The loss is always fp32."
    )
    gradient_checkpointing: bool | None = Field(
        default=None, description="Recompute activations in the backward pass. Default: the planner's choice."
    )
