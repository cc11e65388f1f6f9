"""The loop of diffusers' example trainers on a GPU, over the same network, samples and precision as ours.

`train_dreambooth_lora_flux.py` for flow matching and `train_text_to_image_lora_sdxl.py` for diffusion, with cached latents and text:
accelerate with bf16 autocast, torch's default AdamW, clipping at 1, a constant schedule, `.item()` and a progress bar in every step.
"""

from typing import Any, cast

import diffusers
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from gpu_run import SAMPLES, EncodedSamples, random_denoiser
from peer_loop import PeerLoop, PeerParts
from peft import LoraConfig
from torch import Tensor
from workloads import SCHEDULERS, Workload

from atelier_api.families import FAMILIES
from atelier_api.run_file import RunFile
from atelier_runtime import adapters
from atelier_runtime.families import get_family
from atelier_runtime.family import Conditions


class GpuPeer(PeerLoop):
    """`compiled`: with `compile_repeated_blocks`, the flag that diffusers recommends."""

    def __init__(self, work: Workload, file: RunFile, device: torch.device, *, compiled: bool = False) -> None:
        AcceleratorState._reset_state(True)  # one process has several peers
        GradientState._reset_state()
        family = get_family(work.family)
        model = cast("Any", random_denoiser(work, device))
        samples = EncodedSamples(work, file, model, device)
        targets = adapters.resolve_targets(model, ["all"], family)
        model.add_adapter(
            LoraConfig(r=work.rank, lora_alpha=work.rank, init_lora_weights="gaussian", target_modules=sorted(targets))
        )
        model.train()
        if work.recompute:
            model.enable_gradient_checkpointing()
        if compiled:
            model.compile_repeated_blocks()
        scheduler = SCHEDULERS[FAMILIES[work.family].objective]
        self._diffusion = FAMILIES[work.family].objective == "diffusion"
        self._sizes = samples.load(samples.order.batch(0).slots, step=0, epoch=0).sizes[:1].to(device)
        super().__init__(
            PeerParts(
                accelerator=Accelerator(mixed_precision="bf16", cpu=device.type == "cpu"),
                model=model,
                predict=family.predict,
                samples=[
                    (samples.latents(i).to(device), {key: value.to(device) for key, value in samples.text(i).items()})
                    for i in range(SAMPLES)
                ],
                batch_size=work.batch,
                scheduler=getattr(diffusers, scheduler["_class_name"]).from_config(scheduler),
                fused=False,
            )
        )

    def _loss(self, latents: Tensor, text: dict[str, Tensor]) -> Tensor:
        if not self._diffusion:
            return super()._loss(latents, text)
        noise = torch.randn_like(latents)
        steps = self._schedule.config.num_train_timesteps
        timesteps = torch.randint(0, steps, (len(latents),), device=latents.device).long()
        noisy = self._schedule.add_noise(latents, noise, timesteps)
        conditions = Conditions(text, self._sizes.repeat(len(latents), 1))
        prediction = self._predict(self._prepared.model, noisy, timesteps, conditions)
        return torch.nn.functional.mse_loss(prediction.float(), noise.float(), reduction="mean")
