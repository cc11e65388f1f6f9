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


class TwinFlow(Block):
    """A few-step generator out of a flow model, without another network as its teacher or its critic (arXiv:2512.05150).

    The network learns F(x, s, r), the average velocity on the way from noise level s down to r; at r = s that is the velocity of the
    base. Its teacher is the moving average of its own weights.
    """

    order: int = Field(
        default=2,
        ge=1,
        le=4,
        description="Passes of the teacher from s - `delta` down to r, of which the target's average velocity is made.",
    )
    delta: Annotated[Decimal, Field(ge=0.001, le=0.5)] = Field(
        default=0.01,
        description="How far in noise level the target looks ahead along the straight path, before the teacher goes on from there.",
    )
    enhanced_ratio: Annotated[Decimal, Field(ge=0, lt=1)] = Field(
        default=0.5,
        description="How much of the teacher's difference between the caption and the empty caption is added to the velocity that is learnt, so that samples need no guidance. 0 saves two passes.",
    )
    target_clamp: Annotated[Decimal, Field(gt=0, le=100)] = Field(
        default=1.0, description="Largest distance, in each number, of the target from the prediction."
    )
    rectify_weight: Annotated[Decimal, Field(ge=0, le=10)] = Field(
        default=0.5,
        description="Weight of the loss that moves what one step draws to where the network tells real from drawn samples no more. 0 turns it off and saves two passes.",
    )
    adversarial: bool = Field(
        default=True,
        description="Whether a quarter of the samples teach the network at negative times what it draws in one step. `rectifyWeight` compares with that.",
    )
    sample_steps: int = Field(default=1, ge=1, le=8, description="Steps in which validation draws, without guidance.")


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
    twin_flow: TwinFlow | None = Field(
        default=None,
        description="Flow families with one time embedder: train a few-step generator; `{}` turns it on. Needs `hyperparameters.ema`. The loss is its own, m / sqrt(m + 1e-6) of the mean squared error m of a sample. Default: off.",
    )
    timesteps: Timesteps = Field(default_factory=Timesteps, description="How noise levels are drawn.")
    noise: Noise = Field(default_factory=Noise, description="Changes to the noise.")
