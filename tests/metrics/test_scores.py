import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.pictures import SmallInception, SmallLite0, pictures

from diffusion import paths
from diffusion.config import Params
from diffusion.data.download.inception_weights import sha256
from diffusion.errors import UserError
from diffusion.metrics import extraction, features, frechet_distance
from diffusion.metrics.extraction import moments_of
from diffusion.metrics.reference import Reference
from diffusion.metrics.scores import evaluate
from diffusion.pipeline.reference import write_references

CPU = torch.device("cpu")
REQUIRED = {"evaluate.inception": "require", "sample.num_images": 5000}  # enough for the rules of params.yaml


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Real images and samples where the stages look for them; no weights; three features for fd_lite0."""
    monkeypatch.setattr(extraction, "EfficientNetLite0", SmallLite0)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(paths, "WEIGHTS", tmp_path / "weights")
    paths.IMAGES.mkdir(parents=True)
    paths.SAMPLES.mkdir()
    np.save(paths.TRAIN_IMAGES, pictures(30))
    np.savez(paths.SAMPLES_NPZ, images=pictures(25, 1))
    return tmp_path


def test_samples_of_another_size_than_the_real_images_are_refused(tiny, workspace: Path) -> None:
    write_references(tiny())
    np.savez(paths.SAMPLES_NPZ, images=pictures(25, 1)[:, ::2, ::2])
    with pytest.raises(UserError, match=r"image_shape was \[32, 32, 3\], is \[16, 16, 3\]"):
        evaluate(tiny(), paths.SAMPLES_NPZ, {})


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_grey_images_are_scored_as_rgb_and_what_is_transparent_as_white(tiny, workspace: Path, channels: int) -> None:
    scores = []
    sets = pictures(30), pictures(25, 1)
    masks = [np.random.default_rng(0).random(images.shape[:3])[..., None] < 0.5 for images in sets]
    colours = [images[..., : 1 if channels < 3 else 3] for images in sets]
    alpha = [np.concatenate([c, np.where(m, 255, 0).astype(np.uint8)], -1) for c, m in zip(colours, masks, strict=True)]
    shown = [np.where(m | (channels % 2 == 1), c, 255).astype(np.uint8) for c, m in zip(colours, masks, strict=True)]
    as_rgb = [np.broadcast_to(images, (*images.shape[:3], 3)) for images in shown]
    for real, made in (colours if channels % 2 else alpha, as_rgb):
        np.save(paths.TRAIN_IMAGES, real)
        np.savez(paths.SAMPLES_NPZ, images=made)
        write_references(tiny())
        scores.append(evaluate(tiny(), paths.SAMPLES_NPZ, {})["fd_lite0_25"])
    assert scores[0] == scores[1]


def with_inception(params: Params, choice: str) -> Params:
    return params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"inception": choice})})


def test_the_score_is_the_distance_of_both_sets(tiny, workspace: Path) -> None:
    write_references(tiny())
    result = evaluate(tiny(), paths.SAMPLES_NPZ, {"sampler": "ddim"})
    real, made = (images.mean((1, 2)) for images in (pictures(30)[:20], pictures(25, 1)))  # SmallLite0's features
    expected = frechet_distance(made.mean(0), np.cov(made, rowvar=False), real.mean(0), np.cov(real, rowvar=False))
    assert result["fd_lite0_25"] == pytest.approx(expected, rel=1e-4)
    assert not any(name.startswith(("fid", "kid")) for name in result)
    about = result["about"][0]
    assert about["metric"] == "fd_lite0_25"
    assert (about["samples"], about["reference"]["images"], about["reference"]["split"]) == (25, 20, "train")
    assert about["sampler"] == "ddim"
    json.dumps(result)


def test_auto_without_weights_says_so_loudly_and_goes_on(
    tiny, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answered(None)
    write_references(with_inception(tiny(), "auto"))
    lines = [line for line in capsys.readouterr().err.splitlines() if "FID IS SKIPPED" in line]
    assert len(lines) == 1
    assert "pt_inception-2015-12-05-6726825d.pth" in lines[0]
    assert sorted(p.name for p in paths.REFERENCE.iterdir()) == ["fd_lite0.npz"]


def test_require_without_weights_is_an_error(tiny, workspace: Path) -> None:
    answered(None)
    with pytest.raises(UserError, match=r"evaluate\.inception is require"):
        write_references(with_inception(tiny(), "require"))


@pytest.mark.parametrize(
    "change", [{"evaluate.reference_images": 15}, {"evaluate.reference_split": "test"}], ids=["images", "split"]
)
def test_a_reference_of_other_images_is_not_used(tiny, workspace: Path, change: dict[str, object]) -> None:
    write_references(tiny())
    with pytest.raises(UserError, match=f"is {next(iter(change.values()))}.*dvc repro -sf reference"):
        evaluate(tiny(**change), paths.SAMPLES_NPZ, {})


@pytest.fixture
def with_weights(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights of the user's own."""
    monkeypatch.setattr(extraction, "Inception", SmallInception)
    (workspace / "mine.pth").write_text("weights")
    monkeypatch.setattr(extraction, "at_hand", lambda config: workspace / "mine.pth")
    answered(workspace / "mine.pth")
    return workspace / "mine.pth"


def answered(weights: Path | None) -> None:
    """The weights stage has found these."""
    paths.WEIGHTS_CARD.write_text(json.dumps({"inception_sha256": weights and sha256(weights)}))


def test_fid_goes_through_the_stages_as_in_torchmetrics(
    tiny, with_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    params = tiny(**{"evaluate.inception": "auto", "evaluate.inception_images": 20})
    write_references(params)
    assert "comparable with no published number" in capsys.readouterr().err
    result = evaluate(params, paths.SAMPLES_NPZ, {"weights": "ema"})
    theirs = FrechetInceptionDistance(feature=SmallInception(with_weights), input_img_size=(3, 32, 32))
    theirs.set_dtype(torch.float64)
    theirs.update(torch.from_numpy(pictures(30)[:20]).permute(0, 3, 1, 2), real=True)
    theirs.update(torch.from_numpy(pictures(25, 1)[:20]).permute(0, 3, 1, 2), real=False)
    assert result["fid20_train"] == pytest.approx(float(theirs.compute()), rel=1e-4)

    assert [(a["samples"], a["weights"]) for a in result["about"] if a["metric"] == "fid20_train"] == [(20, "ema")]

    with_weights.write_text("other weights")
    with pytest.raises(UserError, match="run `make weights`"):
        evaluate(params, paths.SAMPLES_NPZ, {})
    answered(with_weights)
    with pytest.raises(UserError, match="weights_sha256"):
        evaluate(params, paths.SAMPLES_NPZ, {})


def test_a_stale_fid_reference_is_neither_used_nor_kept(tiny, with_weights: Path) -> None:
    params = tiny(**{**REQUIRED, "evaluate.inception_images": 20})
    write_references(params)
    off = with_inception(params, "off")
    assert "fid20_train" not in evaluate(off, paths.SAMPLES_NPZ, {})
    write_references(off)
    assert not (paths.REFERENCE / "fid.npz").exists()
    assert "fid20_train" not in evaluate(with_inception(params, "auto"), paths.SAMPLES_NPZ, {})
    with pytest.raises(UserError, match=r"fid\.npz"):
        evaluate(params, paths.SAMPLES_NPZ, {})


def test_fid_of_fewer_images_than_features_is_refused(tiny, with_weights: Path) -> None:
    few = {**REQUIRED, "evaluate.inception_images": 11}
    with pytest.raises(UserError, match=r"evaluate\.inception_images = 11"):  # before any training
        write_references(tiny(**few))
    params = tiny(**few | {"evaluate.inception_images": 20})
    write_references(params)
    np.savez(paths.SAMPLES_NPZ, images=pictures(11))
    with pytest.raises(UserError, match=r"sample\.num_images"):
        evaluate(params, paths.SAMPLES_NPZ, {})


def test_few_samples_are_offered_kid(tiny, with_weights: Path) -> None:
    """FID of them is an error that says so, and what it proposes works."""
    few = {**REQUIRED, "evaluate.inception_images": 11}
    with pytest.raises(UserError, match=r"evaluate\.measures without frechet \(KID, kid"):
        write_references(tiny(**few))
    params = tiny(**few, **{"evaluate.measures": ["kid"]})
    write_references(params)
    np.savez(paths.SAMPLES_NPZ, images=pictures(11, 1))
    result = evaluate(params, paths.SAMPLES_NPZ, {})
    assert set(result) == {"kd_lite0_11", "kd_lite0_11_std", "kid11_train", "kid11_train_std", "about"}


def test_blocks_are_the_samples_in_order(tiny, with_weights: Path) -> None:
    """25 samples in three blocks of 8: one is in none of them; FID judges 3 x 20, or what there is."""
    params = tiny(
        **{
            **REQUIRED,
            "evaluate.inception_images": 20,
            "evaluate.repeats": 2,
            "evaluate.measures": ["frechet"],
        }
    )
    write_references(params)
    result = evaluate(params, paths.SAMPLES_NPZ, {})
    made = pictures(25, 1)
    reference = Reference.load(paths.REFERENCE / "fid.npz", {})
    distances = []
    for block in (made[:12], made[12:24]):
        found = moments_of(block, SmallInception(with_weights), 5, CPU, "test")
        distances.append(frechet_distance(found.mean, found.cov, reference.mean, reference.cov))
    assert result["fid2x12_train_mean"] == pytest.approx(np.mean(distances))
    assert result["fid2x12_train_std"] == pytest.approx(np.std(distances, ddof=1))
    assert result["fid2x12_train_min"] == pytest.approx(min(distances))
    whole = moments_of(made, SmallInception(with_weights), 5, CPU, "test")
    expected = frechet_distance(whole.mean, whole.cov, reference.mean, reference.cov)
    assert result["fid25_train"] == pytest.approx(expected)
    in_three = params.evaluate.model_copy(update={"repeats": 3})
    with pytest.raises(UserError, match=r"there are 8 in each of evaluate\.repeats = 3 blocks"):
        evaluate(params.model_copy(update={"evaluate": in_three}), paths.SAMPLES_NPZ, {})


def test_the_other_measures_are_of_the_stored_features(tiny, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KID, precision and recall, copies: the functions themselves on features that EfficientNet computed in one go."""
    from diffusion.metrics.neighbours import copies, kid, precision_recall

    monkeypatch.setattr(extraction, "EfficientNetLite0", features.EfficientNetLite0)
    few = {"evaluate.reference_images": 30, "evaluate.measures": ["kid", "precision_recall", "copies"]}
    params = tiny(**few, **{"evaluate.kept_features": 18})
    write_references(params)
    made = np.concatenate([pictures(30)[4:5], pictures(24, 1)])  # the first is a training image
    np.savez(paths.SAMPLES_NPZ, images=made)
    result = evaluate(params, paths.SAMPLES_NPZ, {"sampler": "ddim"})
    extractor = features.EfficientNetLite0()
    a, b = (extractor(torch.from_numpy(x[:18]).permute(0, 3, 1, 2)) for x in (made, pictures(30)))
    assert result["kd_lite0_18"] == pytest.approx(kid(a, b)["mean"], rel=1e-3)
    assert (result["precision_lite0_18"], result["recall_lite0_18"]) == precision_recall(a, b)
    assert result["copies_lite0_18"] == copies(a, b).share == 1 / 18
    details = {entry["measure"]: entry for entry in result["about"]}
    assert len(details["copies"]["pairs"]) == 16
    assert details["copies"]["pairs"][0][:2] == [0, 4]
    assert details["copies"]["pairs"][0][2] == pytest.approx(0, abs=1e-3)
    for entry in details.values():
        assert entry["reference"]["extractor"]["implementation"].startswith("efficientnet-lite-pytorch ")
        assert (entry["reference"]["split"], entry["reference"]["images"], entry["sampler"]) == ("train", 30, "ddim")
        assert torch.__version__.startswith(entry["versions"]["torch"].split("+")[0])
    with pytest.raises(UserError, match="kept was 18, is 17"):
        evaluate(tiny(**few, **{"evaluate.kept_features": 17}), paths.SAMPLES_NPZ, {})


def test_copies_are_looked_for_among_training_images_alone(tiny, workspace: Path) -> None:
    np.save(paths.TEST_IMAGES, pictures(30, 2))
    params = tiny(**{"evaluate.reference_split": "test", "evaluate.measures": ["copies", "precision_recall"]})
    write_references(params)
    assert set(evaluate(params, paths.SAMPLES_NPZ, {})) == {"precision_lite0_20", "recall_lite0_20", "about"}


def test_a_reference_of_other_code_is_not_used(tiny, with_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = tiny(**REQUIRED, **{"evaluate.inception_images": 20})
    write_references(params)
    monkeypatch.setattr(features, "feature_code", lambda: "of another version")
    with pytest.raises(UserError, match=r"code was \w+, is of another version"):
        evaluate(params, paths.SAMPLES_NPZ, {})


def test_off_is_silent(tiny, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_references(with_inception(tiny(), "off"))
    assert "FID" not in capsys.readouterr().err


def test_too_many_reference_images_are_refused(tiny, workspace: Path) -> None:
    with pytest.raises(UserError, match="31 reference images"):
        write_references(tiny(**{"evaluate.reference_images": 31}))
