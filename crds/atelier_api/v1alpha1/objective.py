"""`spec.objective`: what the network is asked to predict, at which times, with which loss."""

from typing import Annotated, Literal

from pydantic import Field

from atelier_api.v1alpha1.base import Block, Decimal


class Timesteps(Block):
    """How the noise level of a sample is drawn (flow families: sigma in (0, 1], 1 is noise)."""

    sampling: Literal["logit-normal", "uniform", "beta"] = Field(
        default="logit-normal",
        description="Density of sigma before the shift, of flow families and with `diff2Flow`. Otherwise diffusion families draw their time uniformly.",
    )
    logit_mean: Annotated[Decimal, Field(ge=-10, le=10)] = Field(
        default=0.0, description="Mean of the logit-normal density."
    )
    logit_scale: Annotated[Decimal, Field(gt=0, le=10)] = Field(
        default=1.0, description="Standard deviation of the logit-normal density."
    )
    beta_a: Annotated[Decimal, Field(gt=0, le=100)] = Field(
        default=2.0, description="First parameter of the beta density."
    )
    beta_b: Annotated[Decimal, Field(gt=0, le=100)] = Field(
        default=2.0, description="Second parameter of the beta density."
    )
    shift: str = Field(
        default="auto",
        pattern=r"^(auto|dynamic|none|[0-9]+(\.[0-9]+)?)$",
        max_length=32,
        description="Timestep shift k in s' = k s / (1 + (k - 1) s). `auto`: the checkpoint's scheduler, else the family's value; 1 with `diff2Flow`. `dynamic`: by the number of tokens. `none`: 1.",
    )


class Noise(Block):
    """Changes to the noise, diffusion families only."""

    offset: Annotated[Decimal, Field(ge=0, le=1)] = Field(
        default=0.0, description="Strength of offset noise, one value per sample and channel."
    )
    zero_terminal_snr: bool = Field(
        default=False,
        description="Rescale the betas to zero terminal SNR (arXiv:2305.08891). Needs `prediction: v`. Samples are then drawn by DDIM, whose first step is the last of training.",
    )


class Diff2Flow(Block):
    """The flow objective for a network that predicts epsilon or v (arXiv:2506.02221)."""

    max_weight: Annotated[Decimal, Field(ge=1, le=1_000_000)] | None = Field(
        default=None,
        description="Largest weight that a sample's loss is given; 1 leaves the network's own loss. Default: none, which is the loss of flow matching.",
    )


class Objective(Block):
    """Objective and loss."""

    prediction: Literal["auto", "epsilon", "v"] = Field(
        default="auto",
        description="Diffusion families: the quantity predicted. `auto` takes the checkpoint's. Flow families predict noise - clean.",
    )
    loss: Literal["l2", "huber"] = Field(
        default="l2", description="Squared error, or pseudo-Huber 2c(sqrt(d^2 + c^2) - c)."
    )
    huber_c: Annotated[Decimal, Field(gt=0, le=10)] = Field(default=0.1, description="c of the pseudo-Huber loss.")
    min_snr_gamma: Annotated[Decimal, Field(gt=0, le=100)] | None = Field(
        default=None,
        description="Gamma of min-SNR weighting (arXiv:2303.09556), diffusion families only; 5 is advised. Default: off.",
    )
    diff2_flow: Diff2Flow | None = Field(
        default=None,
        description="Diffusion families with betas: train on the flow objective; `{}` turns it on. Times are then drawn as `timesteps` says. Default: off.",
    )
    timesteps: Timesteps = Field(default_factory=Timesteps, description="How noise levels are drawn.")
    noise: Noise = Field(default_factory=Noise, description="Changes to the noise.")
