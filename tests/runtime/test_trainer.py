"""What the trainer draws from: the same numbers as ever, whoever seeds the generators."""

import pytest
import torch

from atelier_runtime.trainer import sample_generator, seed_torch


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
