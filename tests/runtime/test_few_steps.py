"""Even steps in the place of a checkpoint's own scheduler."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from atelier_runtime.few_steps import even_steps_for


def test_steps_of_noise_that_counts_as_a_multiple_of_the_picture_are_those_of_the_flow() -> None:
    given = FlowMatchEulerDiscreteScheduler()
    given.register_to_config(sigma_max=80.0, final_sigmas_type="sigma_min")
    even, generator = even_steps_for(given), torch.Generator().manual_seed(1)
    even.set_timesteps(3)
    assert even.config.final_sigmas_type == "zero"
    latents = 80 * torch.randn(1, 4, generator=generator)
    for step, t in enumerate(even.timesteps):
        start, end, multiple = even.step_times.start, even.step_times.end, even.sigmas[step]
        velocity = torch.randn(1, 4, generator=generator)
        x = (1 - start) * latents
        picture = x - start * velocity
        latents = even.step((latents - picture) / multiple, t, latents, return_dict=False)[0]
        torch.testing.assert_close((1 - end) * latents, x - (start - end) * velocity, atol=1e-4, rtol=1e-4)
    assert float(end) == 0


def test_steps_that_count_from_noise_at_zero_are_those_of_the_flow() -> None:
    even = even_steps_for(FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, invert_sigmas=True))
    even.set_timesteps(2)
    assert even.timesteps.tolist() == [0.0, 0.5]
    latents = torch.randn(1, 4, generator=torch.Generator().manual_seed(1))
    for t in even.timesteps:
        start, end = even.step_times.start, even.step_times.end
        moved = even.step(-latents, t, latents, return_dict=False)[0]  # a velocity towards the picture
        torch.testing.assert_close(moved, latents - (start - end) * latents)
        latents = moved
