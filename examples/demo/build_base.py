"""Builds the base model of the demo: a complete, tiny Stable Diffusion 3 that writes digits in three inks.

The folder it writes is laid out as a repository of a model hub and loads with the stock pipeline, without a network:

    StableDiffusion3Pipeline.from_pretrained("examples/demo/base", dtype=torch.float32)

The autoencoder is trained on digits in all colours, the denoiser on black, blue and green digits only, so that a LoRA
can teach it a new ink.
One seed gives one model on one machine with one thread; about fifteen minutes on one CPU core.

    python examples/demo/build_base.py OUT
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from base_model import MAX_TOKENS, build_pipeline, round_to_half, store
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from digits import INKS, WORDS, Colour, Digits, caption, draw, read_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

BASE_INKS = ("black", "blue", "green")
CAPTION_DROPOUT = 0.1
DRAWINGS_PER_DIGIT = 2  # in each ink, each with its own shift and colour variation


@dataclass(frozen=True)
class TrainingSet:
    """What the denoiser is trained on: scaled `latents` [N, 4, 8, 8], and for each the row of its caption in the code
    tables `states` [C, 32, 96] and `pooled` [C, 96]. The last row of the tables is the empty caption."""

    latents: Tensor
    captions: Tensor
    states: Tensor
    pooled: Tensor


def draw_batch(digits: Digits, chosen: list[int], inks: list[Colour], generator: np.random.Generator) -> Tensor:
    """The chosen digits in the given inks as [B, 3, 32, 32] in [-1, 1]."""
    pictures = [np.asarray(draw(digits.cells[i], ink, generator)) for i, ink in zip(chosen, inks, strict=True)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(vae: AutoencoderKL, digits: Digits, steps: int, seed: int) -> None:
    """Trains the autoencoder on digits in every colour and stores the latents' mean and scale in its config."""
    generator = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    progress = Progress("autoencoder", steps)
    for _ in range(steps):
        chosen = generator.integers(len(digits.cells), size=32).tolist()
        named = generator.choice(list(INKS.values()), size=16).tolist()
        anyhow = generator.uniform(0, 0.9, size=(16, 3)).tolist()
        pictures = draw_batch(digits, chosen, named + anyhow, generator)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pictures).latent_dist
            noise = torch.from_numpy(generator.standard_normal(posterior.mean.shape, dtype=np.float32))
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = decoded.float() - pictures
        loss = (
            error.abs().mean() + 0.5 * error.square().mean() + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()
        )
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress.step(loss.item())
    round_to_half(vae)
    inks = generator.choice(list(INKS.values()), size=512).tolist()
    pictures = draw_batch(digits, generator.integers(len(digits.cells), size=512).tolist(), inks, generator)
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.mean
        error = (vae.decode(latents).sample.clamp(-1, 1) - pictures) / 2
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    print(f"autoencoder: {-10 * error.square().mean().log10().item():.1f} dB on 512 drawings", flush=True)


@torch.no_grad()
def build_training_set(pipeline: StableDiffusion3Pipeline, digits: Digits, seed: int) -> TrainingSet:
    """Encodes every digit in every ink of the base, and the captions with the pipeline's own `encode_prompt`."""
    generator = np.random.default_rng(seed)
    texts = [caption(ink, digit) for ink in BASE_INKS for digit in range(len(WORDS))]
    states, _, pooled, _ = pipeline.encode_prompt(
        [*texts, ""], None, None, do_classifier_free_guidance=False, max_sequence_length=MAX_TOKENS
    )
    vae = pipeline.vae
    latents, captions = [], []
    everything = list(range(len(digits.cells)))
    for row, ink in enumerate(BASE_INKS):
        for _ in range(DRAWINGS_PER_DIGIT):
            pictures = draw_batch(digits, everything, [INKS[ink]] * len(everything), generator)
            encoded = torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(128)])
            latents.append((encoded - vae.config.shift_factor) * vae.config.scaling_factor)
            captions.append(torch.from_numpy(digits.labels) + row * len(WORDS))
    return TrainingSet(torch.cat(latents), torch.cat(captions), states, pooled)


def train_denoiser(transformer: SD3Transformer2DModel, data: TrainingSet, steps: int, seed: int) -> None:
    """Trains by rectified flow with logit-normal times; leaves the moving average of the weights in `transformer`."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 50, 1 - step / steps))
    average = AveragedModel(transformer, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    empty = len(data.states) - 1
    progress = Progress("denoiser", steps)
    for _ in range(steps):
        chosen = torch.randint(len(data.latents), (64,), generator=generator)
        dropped = torch.rand(64, generator=generator) < CAPTION_DROPOUT
        captions = data.captions[chosen].masked_fill(dropped, empty)
        clean = data.latents[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        sigma = torch.randn(64, generator=generator).sigmoid()
        mixed = torch.lerp(clean, noise, sigma[:, None, None, None])
        velocity = transformer(
            hidden_states=mixed,
            timestep=sigma * 1000,
            encoder_hidden_states=data.states[captions],
            pooled_projections=data.pooled[captions],
        ).sample
        loss = functional.mse_loss(velocity, noise - clean)
        loss.backward()
        nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.update_parameters(transformer)
        progress.step(loss.item())
    transformer.load_state_dict(average.module.state_dict())
    round_to_half(transformer)


class Progress:
    """Prints the mean loss and the time left every 100 steps."""

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps, self.done = name, steps, 0
        self.losses: list[float] = []
        self.started = time.monotonic()

    def step(self, loss: float) -> None:
        self.done += 1
        self.losses.append(loss)
        if self.done % 100 and self.done != self.steps:
            return
        left = (time.monotonic() - self.started) / self.done * (self.steps - self.done)
        mean = sum(self.losses) / len(self.losses)
        print(f"{self.name}: step {self.done}/{self.steps}  loss {mean:.4f}  {left:.0f} s left", flush=True)
        self.losses.clear()


def main(arguments: list[str]) -> None:
    """Builds, trains and stores the base model."""
    parser = argparse.ArgumentParser(description="Build the base model of the demo.")
    parser.add_argument("out", type=Path, help="folder to write the model to")
    parser.add_argument("--vae-steps", type=int, default=1000, help="steps of the autoencoder")
    parser.add_argument("--steps", type=int, default=2400, help="steps of the denoiser")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    digits = read_digits("train")
    pipeline = build_pipeline()
    train_vae(pipeline.vae, digits, options.vae_steps, options.seed)
    data = build_training_set(pipeline, digits, options.seed + 1)
    train_denoiser(pipeline.transformer, data, options.steps, options.seed + 2)
    store(pipeline, options.out)
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(f"{options.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])
