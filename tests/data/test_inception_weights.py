"""Inception's weights: found, fetched from a local server, and what the weights stage says of them."""

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from helpers.misbehaving import CONTENT, SHA256, Server, cut_after, fine, status

from diffusion import paths
from diffusion.data.download import inception_weights
from diffusion.data.download.inception_weights import WeightsUnavailableError, find_inception_weights
from diffusion.errors import UserError
from diffusion.metrics import extraction
from diffusion.pipeline.weights import write_card


@pytest.fixture
def config(tiny):
    return tiny().evaluate


@pytest.fixture(autouse=True)
def _no_torch_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def fetched_from(monkeypatch: pytest.MonkeyPatch, *urls: str) -> None:
    monkeypatch.setattr(inception_weights, "INCEPTION_URLS", {f"mirror {i}": url for i, url in enumerate(urls, 1)})


def test_weights_are_fetched_checked_and_kept(
    config, serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(fine)
    fetched_from(monkeypatch, server.url)
    monkeypatch.setattr(inception_weights, "INCEPTION_SHA256", SHA256)
    found = find_inception_weights(config, tmp_path / "kept")
    assert found.read_bytes() == CONTENT
    assert find_inception_weights(config, tmp_path / "kept") == found
    assert server.ranges == [None]


def test_what_was_interrupted_is_continued_from_the_other_address(
    config, serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = serve(cut_after(1000)), serve(fine)
    fetched_from(monkeypatch, first.url, second.url)
    monkeypatch.setattr(inception_weights, "INCEPTION_SHA256", SHA256)
    assert find_inception_weights(config, tmp_path / "kept").read_bytes() == CONTENT
    assert second.ranges == ["bytes=4000-"]


def test_local_asks_no_network(
    config, serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(fine)
    fetched_from(monkeypatch, server.url)
    local = config.model_copy(update={"inception": "local"})
    with pytest.raises(WeightsUnavailableError, match="local"):
        find_inception_weights(local, tmp_path)
    assert server.ranges == []
    monkeypatch.setattr(inception_weights, "INCEPTION_SHA256", SHA256)
    (tmp_path / inception_weights.INCEPTION_FILE).write_bytes(CONTENT)
    assert find_inception_weights(local, tmp_path) == tmp_path / inception_weights.INCEPTION_FILE


def test_a_download_with_another_digest_is_not_kept(
    config, serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched_from(monkeypatch, serve(fine).url, serve(status(404)).url)
    with pytest.raises(WeightsUnavailableError, match=f"mirror 1: wrong file: sha256 {SHA256}.*; mirror 2: HTTP 404"):
        find_inception_weights(config, tmp_path / "kept")
    assert not list((tmp_path / "kept").glob("*.pth*"))


@pytest.mark.parametrize("name", inception_weights.INCEPTION_NAMES)
def test_a_damaged_file_in_the_weights_folder_is_not_passed_over(config, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"half a file")
    with pytest.raises(UserError, match=r"6726825d.*evaluate\.inception_weights"):
        find_inception_weights(config, tmp_path)
    assert (tmp_path / name).read_bytes() == b"half a file"


def test_torchs_cache_and_fidelitys_name_are_looked_into(
    config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "torch/hub/checkpoints" / inception_weights.INCEPTION_NAMES[1]
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"weights")
    monkeypatch.setattr(inception_weights, "INCEPTION_SHA256", inception_weights.sha256(cached))
    assert find_inception_weights(config, tmp_path / "none") == cached


def test_a_named_file_has_to_be_there(config, tmp_path: Path) -> None:
    named = config.model_copy(update={"inception_weights": str(tmp_path / "mine.pth")})
    with pytest.raises(UserError, match=r"evaluate\.inception_weights"):
        find_inception_weights(named, tmp_path)
    (tmp_path / "mine.pth").touch()
    assert find_inception_weights(named, tmp_path) == tmp_path / "mine.pth"


def test_the_cache_is_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert inception_weights.torch_cache() == Path(torch.hub.get_dir()) / "checkpoints"
    monkeypatch.delenv("TORCH_HOME")
    assert inception_weights.torch_cache() == Path(torch.hub.get_dir()) / "checkpoints"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert inception_weights.torch_cache() == Path(torch.hub.get_dir()) / "checkpoints"


def card() -> dict[str, str | None]:
    found: dict[str, str | None] = json.loads(paths.WEIGHTS_CARD.read_text())
    return found


@pytest.fixture
def unreachable(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    fetched_from(monkeypatch, "http://127.0.0.1:9/w.pth")


def test_the_card_follows_the_weights_wherever_they_are(
    tiny, unreachable: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = tiny(**{"evaluate.inception": "auto"})
    write_card(params)
    assert card()["inception_sha256"] is None
    places = (
        inception_weights.torch_cache() / inception_weights.INCEPTION_NAMES[1],
        paths.WEIGHTS / inception_weights.INCEPTION_FILE,
    )
    for number, place in enumerate(places):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(bytes([number]))
        monkeypatch.setattr(inception_weights, "INCEPTION_SHA256", inception_weights.sha256(place))
        write_card(params)
        assert card()["inception_sha256"] == inception_weights.sha256(place)
    named = tiny(**{"evaluate.inception": "auto", "evaluate.inception_weights": str(tmp_path / "mine.pth")})
    for content in (b"one", b"two"):
        (tmp_path / "mine.pth").write_bytes(content)
        write_card(named)
        assert card()["inception_sha256"] == hashlib.sha256(content).hexdigest()


def test_the_card_names_the_versions_and_nothing_that_changes_by_itself(tiny, workspace: Path) -> None:
    write_card(tiny())
    first = paths.WEIGHTS_CARD.read_bytes()
    write_card(tiny())
    assert paths.WEIGHTS_CARD.read_bytes() == first
    packages = ("torch-fidelity", "efficientnet-lite-pytorch")
    assert card() == {"inception_sha256": None, **{name: version(name) for name in packages}}


def test_absent_is_an_error_only_if_they_are_required(
    tiny, unreachable: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"evaluate\.inception is require and the weights are missing \(mirror 1: Conn"):
        write_card(tiny(**{"evaluate.inception": "require", "evaluate.measures": ["kid"]}))
    assert not paths.WEIGHTS_CARD.exists()
    write_card(tiny(**{"evaluate.inception": "auto"}))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("no Inception weights: not at hand, and not to be fetched (mirror 1: Connection refused)")


def test_looking_again_says_what_changed(tiny, unreachable: None, capsys: pytest.CaptureFixture[str]) -> None:
    params = tiny(**{"evaluate.inception": "local", "evaluate.inception_weights": None})
    for _ in range(2):
        write_card(params)
    assert "weights: nothing has changed" in capsys.readouterr().err
    write_card(tiny(**{"evaluate.inception_weights": str(mine(b"mine")), "evaluate.inception": "local"}))
    digest = hashlib.sha256(b"mine").hexdigest()
    assert f"weights: inception_sha256 was none, is {digest}: `dvc repro` runs" in capsys.readouterr().err


def mine(content: bytes) -> Path:
    Path("mine.pth").write_bytes(content)
    return Path("mine.pth").absolute()


def test_what_depends_on_the_answer_follows_it(
    tiny, unreachable: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not what lies there by now: DVC would not know of that."""
    config = tiny(**{"evaluate.inception": "local"}).evaluate
    with pytest.raises(UserError, match="run `dvc repro weights`"):
        extraction.inception_weights(config)
    write_card(tiny(**{"evaluate.inception": "local"}))
    named = config.model_copy(update={"inception_weights": str(mine(b"late"))})
    assert extraction.inception_weights(named) is None
    assert "FID IS SKIPPED" in (said := capsys.readouterr().err)
    assert "then `make weights` and `dvc repro`" in said
    write_card(tiny(**{"evaluate.inception": "local", "evaluate.inception_weights": named.inception_weights}))
    assert extraction.inception_weights(named) == mine(b"late")
    with pytest.raises(UserError, match="Inception's weights are gone"):
        extraction.inception_weights(config)
    mine(b"another")
    with pytest.raises(UserError, match=r"is not what data/weights\.json says: run `make weights`"):
        extraction.inception_weights(named)
