import numpy as np
import torch
from helpers.project import REPO

from diffusion import params_file
from diffusion.model.schedules import SCHEDULES
from diffusion.model.unet import Block, UNet
from diffusion.report import diagrams, figures


def test_the_diagram_has_every_layer_as_the_data_pass_it() -> None:
    """Against hooks on a real run."""
    net = UNet(params_file.load(REPO / "params.yaml").model)
    layers, skips = diagrams.traced(net)
    seen: list[tuple[int, int]] = []
    for module in [net.stem, *net.down, *net.middle, *net.up, net.head]:
        module.register_forward_hook(lambda m, inputs, out: seen.append((out.shape[1], out.shape[2])))
    with torch.no_grad():
        net(torch.randn(1, 3, 32, 32), torch.tensor([5]))
    assert [(layer.channels, layer.size) for layer in layers] == seen
    attended = [layer.kind == "residual block with attention" for layer in layers]
    assert sum(attended) == sum(m.__class__.__name__ == "SelfAttention" for m in net.modules())
    assert len(skips) == sum(isinstance(m, Block) for m in net.up)
    for start, end in skips:  # what is joined has one size
        assert layers[start].size == layers[end].size


def test_the_unet_figure_names_sizes_channels_and_parameters() -> None:
    net = UNet(params_file.load(REPO / "params.yaml").model)
    figure = diagrams.unet_figure(net)
    words = " ".join(t.get_text() for t in [*figure.axes[0].texts, *figure.texts])
    assert f"{sum(p.numel() for p in net.parameters()):,} parameters" in words
    for size in ("16x16", "8x8", "4x4"):
        assert size in words


def test_schedules_are_shown_on_the_same_image_and_noise() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    figure = diagrams.schedules_noising_figure(image, 100, columns=4)
    words = [t.get_text() for t in figure.texts]
    assert [name for name in SCHEDULES if name in words] == list(SCHEDULES)
    assert "$t=99$" in words


def test_the_solvers_figure_holds_every_score(tmp_path) -> None:
    scores = {"ddim trailing 5": 400.0, "ddim trailing 10": 350.0, "unipc karras 10": 330.0, "ddpm uniform 1000": 320.0}
    figure = diagrams.solvers_figure(scores)
    drawn = {
        (line.get_label(), float(x)): float(y)
        for line in figure.axes[0].lines
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    }
    assert drawn == {(key.rpartition(" ")[0], float(key.rpartition(" ")[2])): value for key, value in scores.items()}
    figures.save(figure, tmp_path / "solvers.png")
    assert (tmp_path / "solvers.png").stat().st_size > 1000
