import threading

import pytest
import torch

from diffusion.noise import standard_normals
from diffusion.runtime import generator

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


def test_a_steps_noise_is_the_next_draw_of_the_images_own_generator() -> None:
    source = generator(3, "sample", 5)
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
