import pytest
import torch
from helpers.project import REPO

from diffusion import config, params_file
from diffusion.model.layers import Downsample, SelfAttention, TimestepEmbedding, attention
from diffusion.model.unet import UNet


@pytest.fixture
def tiny_model(tiny) -> config.ModelConfig:
    return tiny().model


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_a_fresh_network_answers_zero_in_the_shape_of_its_input(tiny_model, patch_size: int) -> None:
    net = UNet(tiny_model.model_copy(update={"patch_size": patch_size}))
    x = torch.randn(2, 3, 32, 32)
    out = net(x, torch.tensor([0, 49]))
    assert out.shape == x.shape
    assert float(out.detach().abs().max()) == 0.0


def randomised(net: torch.nn.Module) -> torch.nn.Module:
    """The zero-initialised layers would hide what is upstream of them."""
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5, generator=generator)
    return net.eval()


def test_every_parameter_and_both_inputs_matter(tiny_model) -> None:
    net = randomised(UNet(tiny_model))
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    net(x, torch.tensor([3, 40])).square().mean().backward()
    assert (x.grad != 0).all()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name
    with torch.no_grad():
        assert not net(x, torch.tensor([3, 40])).equal(net(x, torch.tensor([4, 40])))


def test_images_do_not_see_each_other(tiny_model) -> None:
    net = randomised(UNet(tiny_model))
    x, t = torch.randn(3, 3, 32, 32), torch.tensor([1, 20, 49])
    with torch.no_grad():
        together = net(x, t)
        alone = torch.cat([net(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_dropout_acts_in_training_only(tiny_model) -> None:
    net = randomised(UNet(tiny_model.model_copy(update={"dropout": 0.5})))
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([5])
    with torch.no_grad():
        assert net(x, t).equal(net(x, t))
        net.train()
        assert not net(x, t).equal(net(x, t))


def test_attention_is_where_params_say(tiny_model) -> None:
    def sizes(resolutions: tuple[int, ...]) -> set[int]:
        net = UNet(tiny_model.model_copy(update={"multipliers": (1, 1, 1), "attention_resolutions": resolutions}))
        seen: set[int] = set()
        for module in net.modules():
            if isinstance(module, SelfAttention):
                module.register_forward_hook(lambda m, inputs, out: seen.add(inputs[0].shape[-1]))
        net(torch.randn(1, 3, 32, 32), torch.tensor([0]))
        return seen

    middle = 4  # 16 -> 8 -> 4; the middle block always attends
    assert sizes(()) == {middle}
    assert sizes((16,)) == {16, middle}
    assert sizes((8, 4)) == {8, 4}


def test_a_conditional_network_tells_classes_apart(tiny_model) -> None:
    net = randomised(UNet(tiny_model.model_copy(update={"num_classes": 10})))
    x, t = torch.randn(1, 3, 32, 32).expand(4, -1, -1, -1), torch.full((4,), 7)
    with torch.no_grad():
        outputs = net(x, t, torch.tensor([0, 9, -1, -1]))
        assert not outputs[0].allclose(outputs[1])
        assert not outputs[0].allclose(outputs[2])
        torch.testing.assert_close(outputs[2], outputs[3], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(net(x, t), net(x, t, torch.full((4,), -1)), rtol=0, atol=0)


def test_what_was_done_to_an_image_matters_and_nothing_is_nothing(tiny_model) -> None:
    net = randomised(UNet(tiny_model.model_copy(update={"augment": 0.1})))
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([7])
    with torch.no_grad():
        assert net(x, t, augment=torch.zeros(1, 8)).equal(net(x, t))
        assert not net(x, t, augment=torch.ones(1, 8)).allclose(net(x, t))


def test_same_padding_is_tensorflows() -> None:
    """TensorFlow pads an even size that is halved by a 3x3 kernel with nothing before and one after."""
    torch.manual_seed(0)
    layer, x = Downsample(2, "same"), torch.randn(1, 2, 6, 6)
    padded = torch.cat([torch.cat([x, torch.zeros(1, 2, 1, 6)], dim=2), torch.zeros(1, 2, 7, 1)], dim=3)
    windows = torch.stack([padded[:, :, i : i + 3, j : j + 3] for i in (0, 2, 4) for j in (0, 2, 4)], dim=-1)
    expected = torch.einsum("bchwn,ochw->bon", windows, layer.conv.weight) + layer.conv.bias.view(1, 2, 1)
    torch.testing.assert_close(layer(x), expected.view(1, 2, 3, 3), rtol=1e-4, atol=1e-5)


def test_labels_are_refused_by_an_unconditional_network(tiny_model) -> None:
    with pytest.raises(ValueError, match="unconditional"):
        UNet(tiny_model)(torch.randn(1, 3, 32, 32), torch.tensor([0]), torch.tensor([1]))


def test_channels_last_and_bf16_compute_the_same_function() -> None:
    net = randomised(UNet(params_file.load(REPO / "params.yaml").model))
    x, t = torch.randn(4, 3, 32, 32), torch.tensor([1, 300, 600, 999])
    with torch.no_grad():
        plain = net(x, t)
        last = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t)
        with torch.autocast("cpu", torch.bfloat16):
            half = net(x.to(memory_format=torch.channels_last), t)
    torch.testing.assert_close(last, plain, rtol=1e-3, atol=1e-4)
    assert float((half - plain).norm() / plain.norm()) < 0.03


def test_plain_attention_is_torchs() -> None:
    q, k, v = torch.randn(3, 2, 4, 16, 8).unbind(0)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attention(q, k, v), expected, rtol=1e-5, atol=1e-5)


def test_the_timestep_embedding_is_the_transformers() -> None:
    embedding = TimestepEmbedding(8, 16)
    embedding.mlp = torch.nn.Identity()
    t = torch.tensor([0, 7, 999])
    expected = torch.stack(
        [
            torch.cat([torch.sin(t * 10_000 ** (-i / 3)) for i in range(4)]).view(4, 3).T,
            torch.cat([torch.cos(t * 10_000 ** (-i / 3)) for i in range(4)]).view(4, 3).T,
        ],
        dim=1,
    ).reshape(3, 8)
    torch.testing.assert_close(embedding(t), expected, rtol=1e-4, atol=1e-4)
