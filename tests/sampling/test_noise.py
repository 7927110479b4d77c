import math
import threading

import pytest
import torch

from diffusion.sampling.noise import generators, standard_normals

CPU = torch.device("cpu")


def drawn(indices: list[int], shape: tuple[int, ...], steps: int, ahead: int | None = None) -> torch.Tensor:
    """(steps, B, *shape)."""
    source = standard_normals(3, indices, shape, CPU, ahead=ahead)
    return torch.stack([next(source) for _ in range(steps)])


@pytest.mark.parametrize("ahead", [None, 1, 3, 8])
@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 6, 6)], ids=["whole blocks of 16", "108 numbers an image"])
def test_an_images_noise_depends_on_neither_batch_nor_chunk(shape: tuple[int, ...], ahead: int | None) -> None:
    together = drawn([0, 1, 2, 7], shape, 11, ahead)
    for column, index in enumerate([0, 1, 2, 7]):
        assert drawn([index], shape, 11)[:, 0].equal(together[:, column])
    assert together.unique().numel() > 0.999 * together.numel()  # no number comes twice


def test_no_two_images_have_the_same_noise() -> None:
    """Nor do they correlate. Hashes of these two, cut to the 32 bits that a generator keeps, are equal."""
    images = next(standard_normals(1, [44115, 44116, 44995], (3, 32, 32), CPU)).flatten(1)
    assert images.corrcoef().triu(1).abs().max() < 4 / math.sqrt(3 * 32 * 32)
    seeds = {source.initial_seed() for source in generators(1, range(100_000))}
    assert len(seeds) == 100_000
    assert max(seeds) < 2**32
    assert not seeds & {source.initial_seed() for source in generators(2, range(100_000))}


def test_a_steps_noise_is_the_next_draw_of_the_images_own_generator() -> None:
    (source,) = generators(3, [5])
    for step in drawn([5], (3, 32, 32), 4, ahead=2):
        assert step[0].equal(torch.randn((3, 32, 32), generator=source))


def test_threads_end_with_the_stream() -> None:
    before = threading.active_count()
    source = standard_normals(0, range(5), (3, 8, 8), CPU, ahead=4)
    for _ in range(7):
        next(source)
    assert threading.active_count() > before
    source.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
