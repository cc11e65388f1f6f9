"""What the trainer draws from: the same numbers as ever, whoever seeds the generators."""

import pytest
import torch

from atelier_runtime.trainer import control_input, sample_generator, seed_torch


def devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


@pytest.mark.parametrize("device", devices(), ids=str)
@pytest.mark.parametrize("seed", [0, 7, (1 << 63) - 1])
def test_seeding_the_generators_in_use_draws_what_torchs_own_seeding_does(seed: int, device: torch.device) -> None:
    def draws() -> list[torch.Tensor]:
        return [
            torch.randn(7),
            torch.rand(5),
            torch.randn(300, device=device),
            torch.randperm(9),
            torch.rand(3, device=device),
        ]

    torch.manual_seed(seed)
    expected = draws()
    torch.randn(11)  # half of a pair of normal numbers is left over
    seed_torch(seed, device)
    assert all(torch.equal(one, other) for one, other in zip(draws(), expected, strict=True))


def test_a_spare_generator_draws_what_a_new_one_does() -> None:
    spare = torch.Generator()
    for slot in (0, 3, -1):
        torch.randn(3, generator=spare)  # half of a pair of normal numbers is left over
        torch.rand((), generator=spare, dtype=torch.float64)
        used, new = sample_generator(5, 40, slot, spare), sample_generator(5, 40, slot)
        assert used is spare
        for shape in ((3,), (16, 4, 4), (1,)):
            assert torch.equal(torch.randn(shape, generator=used), torch.randn(shape, generator=new))


def test_a_control_network_is_given_pixels_from_0_to_1() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    given = control_input({"pixels": pixels}, [torch.Generator()], torch.device("cpu"))
    torch.testing.assert_close(given, torch.tensor([0.0, 0.2, 1.0]).view(1, 3, 1, 1))


def test_a_control_network_is_given_a_draw_of_each_samples_latents_by_its_own_generator() -> None:
    mean, std = torch.ones(2, 4, 2, 2), torch.full((2, 4, 2, 2), 0.5)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    given = control_input({"mean": mean, "std": std}, generators, torch.device("cpu"))
    expected = [1 + 0.5 * torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    assert torch.equal(given, torch.stack(expected))
    assert torch.equal(control_input({"mean": mean}, generators, torch.device("cpu")), mean)
