import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion.errors import UserError
from diffusion.model.denoiser import Denoiser, Prediction
from diffusion.model.schedules import make_schedule
from diffusion.model.unet import UNet
from diffusion.sampling import generation, panels

CPU = torch.device("cpu")


@pytest.fixture
def denoiser(tiny) -> Denoiser:
    torch.manual_seed(0)
    net = UNet(tiny().model)
    torch.nn.init.normal_(net.head.weight, std=0.05)
    return Denoiser(net.eval(), make_schedule("cosine", 50), "v", clip_x0=True)


@pytest.mark.parametrize(
    "options",
    [{"sampler": "ddim"}, {"sampler": "ddim", "eta": 1.0}, {"sampler": "ddpm"}, {"sampler": "unipc"}],
    ids=str,
)
def test_an_image_does_not_depend_on_the_batch_it_is_made_in(
    tiny, denoiser: Denoiser, options: dict[str, object]
) -> None:
    config = tiny().sample.model_copy(update=options)
    sets = []
    for batch_size in (1, 5, 12):
        sized = config.model_copy(update={"batch_size": batch_size})
        sets.append(torch.cat(list(generation.generate(denoiser, sized, 7, range(12), CPU))))
    for other in sets[1:]:
        assert int((sets[0].int() - other.int()).abs().max()) <= 1  # float rounding may differ between batch shapes
    assert not sets[0][0].equal(sets[0][1])
    later = torch.cat(list(generation.generate(denoiser, config, 7, range(9, 12), CPU)))
    assert int((later.int() - sets[0][9:].int()).abs().max()) <= 1


def test_an_images_class_does_not_depend_on_the_batch(tiny) -> None:
    assert generation.labels_of(tiny().sample, None, range(3)) is None
    assert generation.labels_of(tiny().sample, 10, range(8, 13)).tolist() == [8, 9, 0, 1, 2]
    config = tiny().sample.model_copy(update={"labels": (3, 5, 7)})
    assert generation.labels_of(config, 10, range(2, 6)).tolist() == [7, 3, 5, 7]
    with pytest.raises(UserError, match="classes from 0 to 6"):
        generation.labels_of(config, 7, range(2))
    with pytest.raises(UserError, match="knows no classes"):
        generation.labels_of(config, None, range(2))


def test_guided_images_do_not_depend_on_the_batch(tiny) -> None:
    torch.manual_seed(0)
    net = UNet(tiny().model.model_copy(update={"num_classes": 3}))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    denoiser = Denoiser(net.eval(), make_schedule("cosine", 50), "v", clip_x0=True)
    sets = []
    for batch_size in (2, 7):
        config = tiny().sample.model_copy(update={"guidance": 2.0, "batch_size": batch_size})
        sets.append(torch.cat(list(generation.generate(denoiser, config, 7, range(7), CPU))).int())
    assert int((sets[0] - sets[1]).abs().max()) <= 1
    plain = tiny().sample.model_copy(update={"batch_size": 7})
    assert not torch.cat(list(generation.generate(denoiser, plain, 7, range(7), CPU))).int().equal(sets[1])


def test_another_seed_is_another_set(tiny, denoiser: Denoiser) -> None:
    config = tiny().sample
    one, other = (torch.cat(list(generation.generate(denoiser, config, seed, range(4), CPU))) for seed in (0, 1))
    assert all(not a.equal(b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("choice", "device", "images", "compiles"),
    [
        ("auto", "cuda", generation.COMPILE_FROM // 4, True),
        ("auto", "cuda", generation.COMPILE_FROM // 4 - 1, False),
        ("auto", "cpu", generation.COMPILE_FROM, False),
        ("on", "cpu", 1, True),
        ("off", "cuda", generation.COMPILE_FROM, False),
    ],
)
def test_compilation_is_for_large_sets_on_cuda(
    tiny, denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch, choice: str, device: str, images: int, compiles: bool
) -> None:
    """At four steps an image."""
    asked = []
    monkeypatch.setattr(generation, "_compiled", lambda *_, must: asked.append(must))
    config = tiny().sample.model_copy(update={"compile": choice})
    drawing = generation.ImageGenerator(denoiser, config, 0, torch.device(device), size=4, images=images)
    assert asked == [choice == "on"] * compiles
    assert (drawing.denoiser, drawing.fixed_shape) == (denoiser, False)


def test_stages_begin_with_noise_and_end_with_the_image(tiny, denoiser: Denoiser) -> None:
    config = tiny().sample
    frames = panels.stages(denoiser, config, 0, range(3), CPU, columns=4)
    assert frames.shape == (4, 3, 32, 32, 3)
    assert frames[-1].equal(torch.cat(list(generation.generate(denoiser, config, 0, range(3), CPU))))
    x_T = next(iter(generation.trajectory(denoiser, config, 0, range(3), CPU)))
    assert frames[0].equal(generation.to_uint8(x_T))


def test_more_steps_than_the_model_has_are_one_line(tiny, denoiser: Denoiser) -> None:
    known = denoiser.schedule.num_steps
    config = tiny().sample.model_copy(update={"steps": known + 1})
    with pytest.raises(UserError, match=f"sample.steps = {known + 1}: this model has {known} steps"):
        next(iter(generation.trajectory(denoiser, config, 0, range(1), CPU)))


class Small(Denoiser):
    """A device whose memory holds `most` images."""

    most = 3

    def __call__(self, x_t: Tensor, t: Tensor) -> Prediction:
        if len(x_t) > self.most:
            raise torch.OutOfMemoryError("no")
        self.largest = max(len(x_t), getattr(self, "largest", 0))
        return super().__call__(x_t, t)


@pytest.mark.parametrize("options", [{"sampler": "ddim"}, {"sampler": "ddpm"}], ids=str)
def test_too_large_a_batch_is_halved_until_it_fits(tiny, denoiser: Denoiser, options: dict[str, object]) -> None:
    config = tiny().sample.model_copy(update={"batch_size": 10, **options})
    small = Small(denoiser.net, denoiser.schedule, "v", clip_x0=True)
    progress: list[float] = []
    drawing = generation.ImageGenerator(small, config, 7, CPU, size=10, images=13, advanced=progress.append)
    drawn = list(drawing.batches([range(10), range(10, 13)]))
    assert sum(progress) == pytest.approx(13)
    assert len(progress) > 5 * config.steps  # five batches that fit, told of step by step
    assert [i for indices, _ in drawn for i in indices] == list(range(13))
    assert drawing.size == small.largest == 3
    by_three = config.model_copy(update={"batch_size": 3})
    alone = torch.cat(list(generation.generate(denoiser, by_three, 7, range(13), CPU)))
    found = torch.cat([images() for _, images in drawn])
    assert int((found.int() - alone.int()).abs().max()) <= 1  # float rounding may differ between batch shapes
    small.most = 0
    with pytest.raises(UserError, match="not fit"):
        list(drawing.batches([range(2)]))


def test_null_makes_batches_of_about_equal_size(tiny, denoiser: Denoiser) -> None:
    config = tiny().sample.model_copy(update={"batch_size": None})
    for images in (1, 7, 255, 256, 257, 2000, 2048):
        size = generation.batch_size(denoiser, config, images, CPU)
        lengths = [len(batch) for batch in generation.cut(range(images), size)]
        assert max(lengths) <= 256
        assert len(lengths) == -(-images // 256)
        assert max(lengths) - min(lengths) < len(lengths)
    assert generation.batch_size(denoiser, config.model_copy(update={"batch_size": 100}), 30, CPU) == 30


def test_a_compiled_network_sees_one_shape(tiny, denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last batch is filled up; the images are those of the network itself."""
    shapes = []

    def compiler(net: torch.nn.Module, **_: object):
        def run(x: Tensor, t: Tensor) -> Tensor:
            shapes.append((x.shape, x.stride()))
            return net(x, t)

        return run

    config = tiny().sample.model_copy(update={"batch_size": 5, "steps": 3})
    plain = torch.cat(list(generation.generate(denoiser, config, 7, range(12), CPU)))
    monkeypatch.setattr(torch, "compile", compiler)
    on = config.model_copy(update={"compile": "on"})
    compiled = torch.cat(list(generation.generate(denoiser, on, 7, range(12), CPU)))
    assert len(shapes) == 1 + 3 * 3
    assert len(set(shapes)) == 1
    assert int((compiled.int() - plain.int()).abs().max()) <= 1
    assert compiled.shape == plain.shape


def test_a_compiler_that_fails_is_an_error_only_if_it_must_work(
    tiny, denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(x: Tensor, t: Tensor) -> Tensor:
        raise RuntimeError("no C compiler\nfound")

    monkeypatch.setattr(torch, "compile", lambda net, **_: fail)
    on = tiny().sample.model_copy(update={"compile": "on"})
    with pytest.raises(UserError, match=r"sample\.compile is on and compiling fails here \(no C compiler found\)"):
        list(generation.generate(denoiser, on, 0, range(2), CPU))
    assert generation._compiled(denoiser, on, 2, CPU, must=False) is None
    assert "not compiled (no C compiler found)" in capsys.readouterr().err


class Reads(TorchDispatchMode):
    """Counts the times that a value is handed from a tensor to Python: each would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{"sampler": "ddim", "eta": 0.5}, {"sampler": "ddpm"}], ids=str)
def test_the_steps_read_nothing_back(tiny, denoiser: Denoiser, options: dict[str, object]) -> None:
    config = tiny().sample.model_copy(update=options)
    with Reads() as reads:
        for _ in generation.trajectory(denoiser, config, 0, range(2), CPU):
            pass
        assert reads.count == 0
        float(torch.zeros(1))
    assert reads.count == 1
