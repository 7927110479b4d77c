"""The sample stage: what it keeps of a stopped one, how it fails, and that processes share it to the same bits."""

import errno
import json
import re
import shutil
import signal
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import run, run_all, wait_for_file, write_params
from helpers.locked import interrupt, locked
from helpers.preloaded import Command
from PIL import Image

from diffusion import paths
from diffusion.pipeline import sample
from diffusion.sampling import generation
from diffusion.sampling.partial import PartialSamples
from diffusion.tracking import runs

OVERRIDES = {"sample.sampler": "ddpm", "sample.batch_size": 4, "sample.num_images": 14}


@pytest.fixture
def trained(finished: Path) -> Path:
    write_params(**OVERRIDES)
    shutil.rmtree(paths.SAMPLES)  # nothing has been sampled
    for lock in paths.RUNS.glob("*/samples-*.lock"):
        lock.unlink()
    return finished


def samples() -> np.ndarray:
    with np.load(paths.SAMPLES_NPZ) as archive:
        return archive["images"]


def png_files_are(images: np.ndarray) -> None:
    assert len(list((paths.SAMPLES / "png").iterdir())) == len(images)
    for i, image in enumerate(images):
        np.testing.assert_array_equal(np.asarray(Image.open(paths.SAMPLES / f"png/{i:05d}.png")), image)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """Notes the batches that are drawn; raises `error` in the place of batch number `at`."""
    seen: dict[str, object] = {"drawn": [], "at": None, "error": None}
    draw = generation.ImageGenerator._generate

    def noting(self: generation.ImageGenerator, part: range) -> object:
        if len(seen["drawn"]) == seen["at"]:  # type: ignore[arg-type]
            raise seen["error"]  # type: ignore[misc]
        seen["drawn"].append(part)  # type: ignore[attr-defined]
        return draw(self, part)

    monkeypatch.setattr(generation.ImageGenerator, "_generate", noting)
    return seen  # type: ignore[return-value]


def test_a_pair_that_works_badly_is_warned_of(trained: Path) -> None:
    assert "warning" not in run("sample").output
    write_params(**OVERRIDES, **{"sample.variance": "fixed_large"})
    assert "warning: sample.variance = fixed_large leaves noise in the images with 4 steps" in run("sample").output
    assert len(samples()) == 14


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("driver lost")], ids=["stopped", "crashed"])
def test_a_stopped_sampling_goes_on_to_the_same_images(
    trained: Path, batches: dict[str, object], error: BaseException
) -> None:
    run_all("sample")
    whole, strip = samples(), (paths.SAMPLES / "denoising.png").read_bytes()
    assert batches["drawn"] == [range(4), range(4, 8), range(8, 12), range(12, 14)]
    paths.SAMPLES_NPZ.unlink()

    batches |= {"drawn": [], "at": 3, "error": error}
    if isinstance(error, KeyboardInterrupt):
        result = run("sample")
        assert result.exit_code == 130
        assert result.output.endswith("finished batches are kept, `dvc repro` goes on from there\n")
        assert len([*paths.RUNS.glob("*/samples-*/*.npz")]) == 3
    else:
        with pytest.raises(RuntimeError, match="driver lost"):
            run("sample")
    assert not paths.SAMPLES_NPZ.exists()
    kept = len([*paths.RUNS.glob("*/samples-*/*.npz")])

    batches |= {"drawn": [], "at": None}
    result = run("sample")
    assert result.exit_code == 0
    assert f"resuming: {4 * kept} of 14 images are done" in result.output
    assert batches["drawn"] == [range(4), range(4, 8), range(8, 12), range(12, 14)][kept:]
    np.testing.assert_array_equal(samples(), whole)
    png_files_are(whole)
    assert (paths.SAMPLES / "denoising.png").read_bytes() == strip
    assert not [*paths.RUNS.glob("*/samples-*/*")]


@pytest.mark.parametrize(
    "change", [{"sample.steps": 3}, {"seed": 1}, {"sample.clip_x0": False}, {"sample.num_images": 10}], ids=str
)
def test_what_other_params_left_is_not_used(
    trained: Path, batches: dict[str, object], change: dict[str, object]
) -> None:
    batches |= {"at": 2, "error": KeyboardInterrupt()}
    assert run("sample").exit_code == 130
    batches |= {"drawn": [], "at": None}
    write_params(**OVERRIDES | change)
    assert "resuming" not in run("sample").output
    assert batches["drawn"][0] == range(4)  # type: ignore[index]


def test_another_batch_size_goes_on_with_what_is_there(trained: Path, batches: dict[str, object]) -> None:
    batches |= {"at": 2, "error": KeyboardInterrupt()}
    assert run("sample").exit_code == 130
    batches |= {"drawn": [], "at": None}
    write_params(**OVERRIDES | {"sample.batch_size": 3, "sample.save_png": False})
    assert "resuming: 8 of 14" in run("sample").output
    assert batches["drawn"] == [range(8, 9), range(9, 12), range(12, 14)]
    assert not (paths.SAMPLES / "png").exists() or not [*(paths.SAMPLES / "png").iterdir()]


def test_a_full_disk_is_one_line_and_keeps_what_is_there(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = PartialSamples.save

    def full(self: PartialSamples, indices: range, images: np.ndarray) -> None:
        if indices.start >= 8:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.folder / "x.npz"))
        save(self, indices, images)

    with monkeypatch.context() as patch:
        patch.setattr(PartialSamples, "save", full)
        result = run("sample")
    assert result.exit_code == 2
    assert re.search(r"error: \S+x\.npz: No space left on device: put that right; .*\n$", result.output)
    assert "resuming: 8 of 14" in run("sample").output
    assert samples().shape == (14, 32, 32, 3)


def test_who_draws_other_samples_here_is_waited_for_too(trained: Path) -> None:
    """A stage that outlived its killed `dvc` would go on to write its images among these."""
    with locked(paths.SAMPLE_LOCK):
        result = run("sample", "--sample.steps", "3")
    assert result.exit_code == 0
    assert "is sampling here" in result.output


def test_images_that_are_there_are_kept(trained: Path, batches: dict[str, object]) -> None:
    """Byte for byte, for what no image depends on; what shows them is made anew."""
    run_all("sample")
    whole = samples()
    files = {path: path.read_bytes() for path in paths.SAMPLES.rglob("*") if path.is_file()}
    inode = paths.SAMPLES_NPZ.stat().st_ino
    (paths.SAMPLES / "grid.png").write_bytes(b"old")
    (paths.SAMPLES / "classes.png").write_bytes(b"of another model")
    batches["drawn"] = []
    result = run("sample")
    assert "sample: samples/images.npz has these images already: they are kept" in result.output
    assert batches["drawn"] == []
    assert {path: path.read_bytes() for path in paths.SAMPLES.rglob("*") if path.is_file()} == files
    assert paths.SAMPLES_NPZ.stat().st_ino == inode

    write_params(**OVERRIDES | {"sample.save_png": False, "sample.batch_size": 3})
    run_all("sample")
    assert not (paths.SAMPLES / "png").exists()
    write_params(**OVERRIDES)
    run_all("sample")
    png_files_are(whole)
    assert batches["drawn"] == []


def torn() -> None:
    paths.SAMPLES_NPZ.write_bytes(paths.SAMPLES_NPZ.read_bytes()[:-1])


def flipped() -> None:
    raw = bytearray(paths.SAMPLES_NPZ.read_bytes())
    raw[len(raw) // 2] ^= 1
    paths.SAMPLES_NPZ.write_bytes(raw)


def old_card() -> None:
    card = json.loads(paths.SAMPLES_CARD.read_text())
    del card["images"]
    paths.SAMPLES_CARD.write_text(json.dumps(card))


def other_model() -> None:
    weights = bytearray(paths.MODEL.read_bytes())
    weights[-1] ^= 1
    paths.MODEL.write_bytes(weights)


@pytest.mark.parametrize(
    "change",
    [
        torn,
        flipped,
        old_card,
        other_model,
        lambda: paths.SAMPLES_CARD.write_text("{torn"),
        lambda: paths.SAMPLES_NPZ.unlink(),
        lambda: write_params(**OVERRIDES | {"sample.steps": 3}),
        lambda: write_params(**OVERRIDES | {"seed": 1}),
        "code",
    ],
)
def test_other_or_damaged_images_are_drawn_anew(
    trained: Path, batches: dict[str, object], monkeypatch: pytest.MonkeyPatch, change: object
) -> None:
    run_all("sample")
    if change == "code":
        monkeypatch.setattr(sample, "code_digests", lambda *_, **__: {"sampling/samplers.py": "edited"})
    else:
        change()  # type: ignore[operator]
    batches["drawn"] = []
    assert "are kept" not in run("sample").output
    assert batches["drawn"] == [range(4), range(4, 8), range(8, 12), range(12, 14)]
    card = json.loads(paths.SAMPLES_CARD.read_text())
    assert card["images"]["sha256"] == sha256(paths.SAMPLES_NPZ.read_bytes()).hexdigest()


def test_old_images_are_not_taken_for_new_ones(trained: Path, batches: dict[str, object]) -> None:
    """A stage that is stopped leaves no card, and nothing that a card could be written for."""
    run_all("sample")
    write_params(**OVERRIDES | {"sample.steps": 3, "sample.save_png": False})
    batches |= {"drawn": [], "at": 1, "error": KeyboardInterrupt()}
    assert run("sample").exit_code == 130
    assert not [path for path in paths.SAMPLES.rglob("*") if path.is_file()]


def test_links_into_a_cache_are_replaced_and_not_written_through(trained: Path, tmp_path: Path) -> None:
    run_all("sample")
    cache = tmp_path / "cache"
    cache.mkdir()
    for path in [path for path in paths.SAMPLES.rglob("*") if path.is_file()]:
        path.rename(cache / path.name)
        path.hardlink_to(cache / path.name)
    before = {path: path.read_bytes() for path in cache.iterdir()}
    run_all("sample")
    assert "are kept" in run("sample").output
    write_params(**OVERRIDES | {"sample.steps": 3})
    run_all("sample")
    assert {path: path.read_bytes() for path in cache.iterdir()} == before


def test_guidance_is_not_shown_of_a_network_that_always_knew_the_class(workspace: Path) -> None:
    classes = {"model.num_classes": 10, "train.label_dropout": 0.0, "sample.num_images": 10}
    write_params(**classes)
    run_all("prepare", "train", "sample")
    assert (paths.SAMPLES / "grid.png").exists()
    assert not (paths.SAMPLES / "guidance.png").exists()


def test_a_second_process_waits_and_goes_on(trained: Path, batches: dict[str, object]) -> None:
    batches |= {"at": 1, "error": KeyboardInterrupt()}
    run("sample")
    batches["at"] = None
    (folder,) = [path for path in paths.RUNS.glob("*/samples-*") if path.is_dir()]
    with locked(folder.with_suffix(".lock")):
        result = run("sample")
    assert result.exit_code == 0
    assert "waiting for another process (" in result.output
    assert "), which is generating these samples\n" in result.output
    assert "resuming: 4 of 14" in result.output


def test_a_process_that_waits_leaves_the_run_alone_and_can_be_stopped(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "attach", lambda *_, **__: pytest.fail("it attaches to the run"))
    with locked(paths.SAMPLE_LOCK, then=interrupt):
        result = run("sample")
    assert result.exit_code == 130
    assert "waiting for another process (" in result.output


@pytest.mark.slow
def test_a_killed_sampling_goes_on_to_the_same_images(trained: Path) -> None:
    many = {"sample.num_images": 48, "sample.steps": 20, "sample.save_png": False}
    write_params(**OVERRIDES | many)
    process = Command("stages.sample")
    wait_for_file(process, lambda: any(paths.RUNS.glob("*/samples-*/*.npz")))
    process.send_signal(signal.SIGKILL)
    said = process.wait()
    assert process.returncode == -signal.SIGKILL, said
    assert "resuming: " in run("sample").output
    resumed = samples()
    shutil.rmtree(paths.SAMPLES)
    run_all("sample")
    np.testing.assert_array_equal(resumed, samples())
