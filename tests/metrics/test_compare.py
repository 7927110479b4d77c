"""`python -m diffusion.metrics` as a stranger uses it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from helpers.pictures import SmallInception, SmallLite0, pictures
from helpers.project import REPO
from PIL import Image

from diffusion import paths
from diffusion.data import grids
from diffusion.data.download.inception_weights import sha256
from diffusion.metrics import compare as compare_module
from diffusion.metrics import frechet_distance, selftest
from diffusion.metrics.__main__ import main


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """made.npz, and the same as PNG files; real.npz; a file of weights. Extractors have few features."""
    monkeypatch.setattr("diffusion.metrics.compare.EfficientNetLite0", SmallLite0)
    monkeypatch.setattr("diffusion.metrics.compare.Inception", SmallInception)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    np.savez("made.npz", images=pictures(12, 1))
    grids.save_all(pictures(12, 1), tmp_path / "made/deeper")
    np.savez("real.npz", images=pictures(14))
    Path("weights.pth").write_text("weights")
    return tmp_path


def compare(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["compare", "--device", "cpu", *arguments], catch_exceptions=False)


def test_two_files_are_compared_and_a_folder_is_its_images(place: Path) -> None:
    found = compare("made.npz", "real.npz", "--extractor", "lite0", "--json", "--batch-size", "5")
    result = json.loads(found.stdout.splitlines()[-1])
    a, b = (images.mean((1, 2)) for images in (pictures(12, 1), pictures(14)))  # SmallLite0's features
    expected = frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
    assert result["fd_lite0_12"] == pytest.approx(expected, rel=1e-4)
    (about,) = result["about"]
    assert (about["of"], about["against"], about["reference"]["split"]) == ("made.npz", "real.npz", "real")
    folder = compare("made", "real.npz", "--extractor", "lite0", "--json", "--batch-size", "5")
    assert json.loads(folder.stdout.splitlines()[-1])["fd_lite0_12"] == result["fd_lite0_12"]


def test_more_measures_of_fewer_images(place: Path) -> None:
    options = ["--extractor", "lite0", "--count", "10", "--measure", "kid", "--measure", "copies"]
    lines = compare("made.npz", "real.npz", *options).stdout
    assert "kd_lite0_10 " in lines
    assert "copies_lite0_10 " in lines
    assert "fd_" not in lines
    assert "kd_lite0_7 " in compare("made.npz", "real.npz", *options[:2], "--measure", "kid", "--keep", "7").stdout


def test_few_images_are_warned_of(place: Path) -> None:
    for count, warned in (("2", True), ("3", False)):
        found = compare("made.npz", "real.npz", "--extractor", "lite0", "--count", count)
        assert f"fd_lite0_{count} " in found.stdout
        assert ("warning: 2 images are fewer than the 3 features" in found.stderr) == warned
        assert ("--measure kid has no such bias" in found.stderr) == warned


def saved_statistics(path: str, rows: np.ndarray, names: tuple[str, str] = ("mu", "sigma"), **more: np.ndarray) -> None:
    np.savez(path, **{names[0]: rows.mean(0), names[1]: np.cov(rows, rowvar=False)}, **more)


@pytest.mark.parametrize("names", [("mu", "sigma"), ("mean", "cov")])
def test_statistics_stand_for_images(place: Path, names: tuple[str, str]) -> None:
    """As pytorch-fid and EDM save them; on either side, and on both."""
    options = ["--extractor", "lite0", "--json"]
    wanted = json.loads(compare("made.npz", "real.npz", *options).stdout.splitlines()[-1])["fd_lite0_12"]
    saved_statistics("real-stats.npz", pictures(14).mean((1, 2)), names)
    saved_statistics("made-stats.npz", pictures(12, 1).mean((1, 2)), names)
    for pair in (("made", "real-stats.npz"), ("real-stats.npz", "made.npz")):
        found = compare(*pair, *options)
        result = json.loads(found.stdout.splitlines()[-1])
        assert result["fd_lite0_12"] == pytest.approx(wanted, rel=1e-5)
        assert result["about"][0]["reference"]["split"] == "statistics"
        assert "real-stats.npz: statistics; the features are assumed to be of EfficientNet-Lite0" in found.stderr
    assert "against the statistics in real-stats.npz" in compare("made.npz", "real-stats.npz", *options[:2]).stdout


def test_two_files_of_statistics_need_no_network(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compare_module.DIMS, "inception", 3)
    mine, other = pictures(14).mean((1, 2)), pictures(12, 1).mean((1, 2))
    saved_statistics("a.npz", mine)
    saved_statistics("b.npz", other)
    result = json.loads(compare("a.npz", "b.npz", "--json").stdout)
    wanted = frechet_distance(mine.mean(0), np.cov(mine, rowvar=False), other.mean(0), np.cov(other, rowvar=False))
    assert result["fid_of_statistics"] == pytest.approx(wanted)
    assert json.loads(compare("a.npz", "a.npz", "--json").stdout)["fid_of_statistics"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["made.npz", "stats.npz", "--extractor", "lite0", "--measure", "kid"], "--measure kid needs images"),
        (
            ["stats.npz", "stats.npz"],
            "shapes (3,) and (3, 3), and the extractor has 2048 features: give",
        ),
        (["made.npz", "nan.npz", "--extractor", "lite0"], "moments hold NaN"),
    ],
)
def test_statistics_that_cannot_be_used_are_one_line(place: Path, arguments: list[str], words: str) -> None:
    saved_statistics("stats.npz", pictures(14).mean((1, 2)))
    saved_statistics("nan.npz", np.full((14, 3), np.nan))
    found = compare(*arguments)
    assert found.exit_code == 2
    assert words in found.stderr


def test_a_file_is_never_taken_for_cifar10(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's train.npz, and a folder without a name."""
    np.savez("train.npz", images=pictures(4))
    options = ["--weights", str(place / "weights.pth"), "--measure", "kid", "--count", "4"]
    assert "kid4_real " in compare("made.npz", "train.npz", *options).stdout
    monkeypatch.chdir(place / "made/deeper")
    found = compare("../../made.npz", ".", *options).stdout
    assert "kid4_real " in found
    assert "against 4 images of .; " in found
    assert f"numpy {np.__version__}" in found
    monkeypatch.setitem(compare_module.NAMED, "cifar10:train", place / "train.npz")
    assert "kid4_train " in compare("../../made.npz", "cifar10:train", *options).stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.npz", "real.npz"], "none.npz is not there: give a folder or zip of pictures"),
        (["cifar10:test", "real.npz"], "run `dvc repro download`"),
        (["small.npz", "real.npz"], "bring them to one size"),
        (["none-high.npz", "none-high.npz"], "none-high.npz holds uint8 (5, 0, 32, 3), not two or more uint8 images"),
        (["made.npz", "cifar10:test", "--measure", "copies"], "copies are looked for among training images"),
        (["made.npz", "real.npz", "--measure", "kid", "--count", "3"], "at least 4 samples and 4 real images"),
        (["float.npz", "real.npz"], "from 0 to 1, not uint8 images"),
        (["nan.npz", "real.npz"], "NaN"),
        (["mixed", "real.npz"], "bring all to one size"),
        (["empty", "real.npz"], "no pictures"),
        (["broken", "real.npz"], "damaged"),
        (["float", "real.npz"], "a.tiff does not have 8 bits a channel, grey or RGB (mode F)"),
        (["deep", "real.npz"], "a.png does not have 8 bits a channel, grey or RGB (mode I;16)"),
        (["made.npz", "real.npz", "--extractor", "inception", "--weights", "empty"], "--weights empty: no such file"),
        (["made.npz", "real.npz", "--extractor", "inception", "--weights", "no.pth"], "no such file"),
        (["made.npz", "made.npz", "--measure", "infinity"], "at least 15 samples"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_mistake_is_one_line(place: Path, arguments: list[str], words: str) -> None:
    np.savez("small.npz", images=pictures(12)[:, ::2, ::2])
    np.savez("none-high.npz", images=np.empty((5, 0, 32, 3), np.uint8))
    np.savez("float.npz", images=np.linspace(0, 1, 12 * 8 * 8 * 3).reshape(12, 8, 8, 3))
    np.savez("nan.npz", images=np.full((12, 8, 8, 3), np.nan))
    for name in ("mixed", "broken", "empty"):
        Path(name).mkdir()
    grids.save_png(pictures(1)[0], place / "mixed/a.png")
    grids.save_png(pictures(1)[0, ::2], place / "mixed/b.png")
    (place / "broken/a.png").write_bytes(b"\x89PNG")
    for name, kind in (("float/a.tiff", np.float32), ("deep/a.png", np.uint16)):
        (place / name).parent.mkdir()
        Image.fromarray(np.full((32, 32), 300, kind)).save(place / name)
    extractor = [] if "--extractor" in arguments else ["--extractor", "lite0"]
    found = compare(*arguments, *extractor)
    assert found.exit_code == 2
    problems = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert len(problems) == 1
    assert words in problems[0]
    assert not any(key in problems[0] for key in ("evaluate.", "sample."))


def test_fid_of_few_images_proposes_kid(place: Path) -> None:
    few = compare("made.npz", "real.npz", "--weights", "weights.pth", "--count", "11")
    assert few.exit_code == 2
    assert "FID needs at least 12 images a side and there are 11: give --measure kid" in few.stderr
    assert "fid12_real " in compare("made.npz", "real.npz", "--weights", "weights.pth").stdout


@pytest.mark.parametrize("wrong", [False, True])
def test_the_selftest_sees_a_wrong_network(monkeypatch: pytest.MonkeyPatch, wrong: bool) -> None:
    """By small networks in the place of all; that the real ones pass is test_features.py's."""

    def network(*_: object, **__: object) -> SmallInception:
        (weights := Path("weights.pth")).write_text("weights")
        return SmallInception(weights)

    monkeypatch.setattr(selftest, "random_weights", lambda path: path)
    monkeypatch.setattr(selftest, "Inception", network)
    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", network)
    theirs = "torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3"
    monkeypatch.setattr(theirs, lambda *_: lambda images: (network()(images),))
    if wrong:
        monkeypatch.setattr(selftest, "resize_as_tensorflow1", lambda x, size: torch.zeros(len(x), 3, size, size))
        monkeypatch.setattr(selftest, "Inception", lambda _: lambda images: 1.01 * network()(images))
        monkeypatch.setattr(selftest, "frechet_distance", lambda *given: 1.01 * frechet_distance(*given))
    result = CliRunner().invoke(main, ["selftest", "--images", "16"], catch_exceptions=False)
    assert result.exit_code == wrong
    assert result.stdout.count("FAILED") == 6 * wrong
    assert result.stdout.splitlines()[-1].startswith("skipped  golden number not compared: nobody has measured it")


def test_the_golden_number_is_compared_where_the_images_are(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / selftest.INCEPTION_NAMES[0]).write_bytes(b"weights")
    monkeypatch.setattr(selftest, "GOLDEN", 3.1)
    monkeypatch.setattr(selftest, "PUBLISHED", sha256(place / selftest.INCEPTION_NAMES[0]))
    monkeypatch.setattr(paths, "WEIGHTS", place)
    ((line, passed),) = selftest.golden()
    assert passed is None
    assert "run `dvc repro download`" in line
    for found, right in ((3.1, True), (3.102, True), (3.11, False), (3.09, False)):
        monkeypatch.setattr(selftest, "compared", lambda *_, found=found, **__: [{"numbers": {"fid10k_train": found}}])
        assert [passed for _, passed in selftest.golden()] == [right]


HEAVY = ("torch_fidelity", "torchmetrics", "torchvision", "pydantic", "requests", "matplotlib")


@pytest.mark.parametrize(
    ("absent", "modules"),
    [(HEAVY, "diffusion.metrics, diffusion.metrics.names"), (("torchmetrics",), "diffusion.training.scoring")],
)
def test_what_does_not_compute_imports_no_heavy_things(absent: tuple[str, ...], modules: str) -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import {modules}"
    run = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": f"{REPO}/src"}, capture_output=True, check=False
    )
    assert run.returncode == 0, run.stderr
