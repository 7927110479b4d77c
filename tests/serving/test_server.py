"""The served champion: what it generates, and that nothing a client sends is answered with more than one line."""

import base64
import concurrent.futures
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from fastapi.testclient import TestClient
from helpers.project import REPO
from helpers.served import JSON, ask, call, described, params_of, write_model
from helpers.stores import free_port, wait_for
from PIL import Image

from diffusion import params_file, paths
from diffusion.errors import UserError
from diffusion.model.model_file import load_denoiser
from diffusion.sampling import generation
from diffusion.serving import logged_model, registry, requests, server

pytestmark = pytest.mark.xdist_group("served")  # one start of the server
CONDITIONAL = {"model.num_classes": 10, "sample.guidance": 2.0, "tracking.experiment": "faces"}


def generated(folder: Path, count: int, seed: int, **changes: Any) -> np.ndarray:
    """The images that the library itself makes of the model in `folder`."""
    sample, cpu = params_of(**{**CONDITIONAL, **changes}).sample, torch.device("cpu")
    denoiser = load_denoiser(folder / "model.safetensors", sample, cpu)
    return torch.cat([*generation.generate(denoiser, sample, seed, range(count), cpu)]).numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("served")
    write_model(place, params_of(**CONDITIONAL))
    return place


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    """The application within this process."""
    generator = requests.Generator(folder / "model.safetensors", params_of(**CONDITIONAL).sample)
    with TestClient(server.application(generator), raise_server_exceptions=False) as found:
        yield found


def refusal(client: TestClient, body: Any, headers: dict[str, str] = JSON) -> tuple[int, str]:
    """Status and sentence of an answer that says no."""
    answer = client.post("/invocations", content=body, headers=headers)
    found = answer.json()
    assert set(found) == {"detail"}, found
    assert "\n" not in found["detail"]
    return answer.status_code, found["detail"]


def test_the_champion_is_served_as_a_user_starts_it(empty_database: Path, folder: Path) -> None:
    from mlflow import MlflowClient

    database = folder / "mlflow.db"
    database.write_bytes(empty_database.read_bytes())
    store = MlflowClient(f"sqlite:///{database}")
    run = store.create_run(store.create_experiment("faces", artifact_location=(folder / "store").as_uri()))
    params, port = params_of(**CONDITIONAL), free_port()
    weights = folder / "model.safetensors"
    registry.register(store, run.info.run_id, weights, described(weights, params, fd_lite0=1.0))
    params_file.write_yaml(params, folder / "params.yaml")
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{database}", "PYTHONPATH": str(REPO / "src")}
    environment |= {"OMP_NUM_THREADS": "1", "DVC_ROOT": str(folder)}
    command = [sys.executable, "-m", "diffusion", "serve", "--port", str(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)

    def healthy() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        try:
            return call(port, "GET", "/health").status == 200
        except ConnectionError:
            return False

    def raw(seed: int) -> np.ndarray:
        body = json.dumps({"inputs": {"num_images": 3, "seed": seed, "format": "raw"}})
        return np.array(json.loads(call(port, "POST", "/invocations", body).read())["predictions"]["images"])

    try:
        wait_for(healthy)
        with concurrent.futures.ThreadPoolExecutor(8) as clients:
            answers = [*clients.map(raw, range(16))]
    finally:
        process.terminate()
        process.wait()
    for seed, images in enumerate(answers):
        np.testing.assert_array_equal(images, generated(folder, 3, seed))


def test_raw_and_png_are_the_librarys_images(client: TestClient, folder: Path) -> None:
    raw = ask(client, num_images=11, seed=7, format="raw")
    np.testing.assert_array_equal(np.array(raw["images"]), generated(folder, 11, 7))
    assert raw["labels"] == [i % 10 for i in range(11)]
    files = [io.BytesIO(base64.b64decode(text)) for text in ask(client, num_images=11, seed=7)["images"]]
    np.testing.assert_array_equal(np.stack([np.asarray(Image.open(file)) for file in files]), generated(folder, 11, 7))


def test_labels_and_guidance_are_obeyed(client: TestClient, folder: Path) -> None:
    found = ask(client, num_images=5, seed=1, labels=[3, 8], guidance=4, format="raw")
    assert found["labels"] == [3, 8, 3, 8, 3]
    expected = generated(folder, 5, 1, **{"sample.labels": [3, 8], "sample.guidance": 4.0})
    np.testing.assert_array_equal(np.array(found["images"]), expected)


def test_without_a_seed_each_answer_differs_and_names_its_own(client: TestClient) -> None:
    first, second = (ask(client, num_images=1, format="raw") for _ in range(2))
    assert first["images"] != second["images"]
    assert ask(client, num_images=1, format="raw", seed=first["seed"]) == first


def test_null_is_as_left_out(client: TestClient, folder: Path) -> None:
    found = ask(client, num_images=2, seed=7, labels=None, guidance=None, format="raw")
    np.testing.assert_array_equal(np.array(found["images"]), generated(folder, 2, 7))


BAD = [
    ({"num_images": 65}, "num_images: Input should be less than or equal to 64"),
    ({"num_images": 0}, "num_images: Input should be greater than or equal to 1"),
    ({"num_images": 2.0}, "num_images: Input should be a valid integer"),
    ({"num_images": True}, "num_images: Input should be a valid integer"),
    ({"num_images": "16"}, "num_images: Input should be a valid integer"),
    ({"num_images": None}, "num_images: Input should be a valid integer"),
    ({}, "num_images: Field required"),
    ({"num_images": 1, "seed": -1}, "seed: Input should be greater than or equal to 0"),
    ({"num_images": 1, "seed": 2**63}, "seed: Input should be less than or equal to"),
    ({"num_images": 1, "sed": 1}, "sed: Extra inputs are not permitted"),
    ({"num_images": 1, "a\nb" * 500: 1}, "a ba b"),
    ({"num_images": 1, "labels": []}, "labels: List should have at least 1 item"),
    ({"num_images": 1, "labels": 3}, "labels: Input should be a valid list"),
    ({"num_images": 1, "labels": [-1]}, "labels.0: Input should be greater than or equal to 0"),
    ({"num_images": 1, "guidance": -1}, "guidance: Input should be greater than or equal to 0"),
    ({"num_images": 1, "guidance": float("nan")}, "guidance: Input should be a finite number"),
    ({"num_images": 1, "guidance": float("inf")}, "guidance: Input should be"),
    ({"num_images": 1, "format": "jpg"}, "format: Input should be 'png' or 'raw'"),
    ({"num_images": 1, "format": "\ud800"}, "format: Input should be"),  # half of a character
    ({"num_images": 1, "\ud800": 1}, ""),
]


@pytest.mark.parametrize(("inputs", "sentence"), BAD)
def test_a_bad_request_is_a_422_with_one_line(client: TestClient, inputs: dict[str, Any], sentence: str) -> None:
    status, said = refusal(client, json.dumps({"inputs": inputs}))
    assert status == 422
    assert said.startswith(f"body.inputs.{sentence}" if sentence else "body.inputs")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("[" * 30_000, 400),  # too deep for Python's reader
        ('{"inputs": {"num_images": 1, "labels": ' + "[" * 900 + "]" * 900 + "}}", 422),
        ('{"inputs": {"num_images": ' + "9" * 5000 + "}}", 400),  # a number that Python does not read
        ('{"inputs": {"num_images": ' + "9" * 4000 + "}}", 422),
        ('{"inputs": {"num_images": 1e999}}', 422),
        (b'{"\xff": 1}', 400),
        ("{", 422),
        ("", 422),
        ("null", 422),
        ('{"dataframe_records": []}', 422),
        ('{"inputs": {"num_images": 1}, "params": {}}', 422),
        ('{"inputs": [{"num_images": 1}]}', 422),
        (" " * 70_000, 413),
        (iter([b'{"inputs": {"num_images": 1}}']), 411),  # chunked
    ],
    ids=range(14),
)
def test_a_body_that_is_no_request_is_one_line(client: TestClient, body: Any, status: int) -> None:
    assert refusal(client, body)[0] == status


def test_content_types_are_read_as_http_spells_them(client: TestClient) -> None:
    body = json.dumps({"inputs": {"num_images": 1}})
    for kind in ("application/json;", "Application/JSON", "application/json; charset=UTF-8", "application/json ; a=b"):
        assert client.post("/invocations", content=body, headers={"Content-Type": kind}).status_code == 200, kind
    for kind in ("", "text/csv", "application/jsonx", "text/plain; application/json"):
        assert refusal(client, body, {"Content-Type": kind})[0] == 415, kind


def test_unknown_addresses_and_methods_are_one_line_too(client: TestClient) -> None:
    for answer, status in ((client.get("/invocations"), 405), (client.post("/nowhere"), 404)):
        assert answer.status_code == status
        assert set(answer.json()) == {"detail"}


def test_it_survives_malformed_bodies(client: TestClient, folder: Path) -> None:
    good = b'{"inputs": {"num_images": 2, "seed": 7, "labels": [1, 2], "guidance": 1.5}}'
    rng = random.Random(0)
    for _ in range(300):
        body = bytearray(good)
        for _ in range(rng.randint(1, 8)):
            change, at = rng.choice("dir"), rng.randrange(len(body))
            if change == "d":
                del body[at : at + rng.randint(1, 9)]
            elif change == "i":
                body[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
            else:
                body[at] = rng.randrange(256)
        body += b"}"  # whatever the rest is, there is one too many, or one was missing
        answer = client.post("/invocations", content=bytes(body), headers=JSON)
        assert answer.status_code in (200, 400, 422), body
    found = ask(client, num_images=2, seed=7, format="raw")
    np.testing.assert_array_equal(np.array(found["images"]), generated(folder, 2, 7))


def test_what_it_takes_can_be_read_from_it(client: TestClient) -> None:
    described = client.get("/openapi.json").json()
    inputs = described["components"]["schemas"]["Request"]["properties"]
    assert list(inputs) == ["num_images", "seed", "labels", "guidance", "format"]
    assert (inputs["num_images"]["minimum"], inputs["num_images"]["maximum"]) == (1, 64)
    assert set(described["paths"]["/invocations"]["post"]["responses"]) == {
        "200",
        "400",
        "411",
        "413",
        "415",
        "422",
        "503",
    }


def test_it_answers_as_mlflows_own_server(
    client: TestClient, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mlflow models serve` on the same model."""
    from mlflow.pyfunc import load_model, save_model, scoring_server

    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "")  # which it sets
    card = json.loads((folder / "model.json").read_text())
    sample = params_of(**CONDITIONAL).sample.model_dump(mode="json")
    contents = logged_model.packed(tmp_path, folder / "model.safetensors", card, sample)
    save_model(tmp_path / "logged", **contents)
    with TestClient(scoring_server.init(load_model(str(tmp_path / "logged")))) as theirs:
        for inputs in ({"num_images": 2, "seed": 1}, {"num_images": 3, "seed": 2, "labels": [4], "format": "raw"}):
            assert ask(client, **inputs) == ask(theirs, **inputs)
        for path in ("/ping", "/health", "/version"):
            ours, other = client.get(path), theirs.get(path)
            assert (ours.status_code, ours.text, ours.headers["content-type"]) == (
                other.status_code,
                other.text,
                other.headers["content-type"],
            )
        for inputs in ({"num_images": 65}, {"num_images": 1, "labels": [10]}, {"num_images": 1, "format": "jpg"}):
            assert theirs.post("/invocations", json={"inputs": inputs}).status_code == 400


@pytest.mark.parametrize(
    ("classes", "dropout", "refused", "taken"),
    [
        (None, 0.1, {"labels": [0]}, {"guidance": 1.0}),
        (None, 0.1, {"guidance": 2.0}, {}),
        (10, 0.0, {"guidance": 2.0}, {"guidance": 1.0, "labels": [0]}),  # never trained without a class
        (10, 0.1, {"labels": [10]}, {"guidance": 2.0, "labels": [9]}),
    ],
)
def test_a_model_says_what_it_cannot(
    tmp_path: Path, classes: int | None, dropout: float, refused: dict[str, Any], taken: dict[str, Any]
) -> None:
    params = params_of(**{"model.num_classes": classes, "train.label_dropout": dropout})
    generator = requests.Generator(write_model(tmp_path, params), params.sample)
    client = TestClient(server.application(generator))
    status, said = refusal(client, json.dumps({"inputs": {"num_images": 1, **refused}}))
    assert status == 422
    assert next(iter(refused)) in said
    assert ask(client, num_images=1, **taken)


def test_a_model_that_cannot_be_loaded_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def damaged(_: str) -> None:
        raise UserError("model.safetensors cannot be used")

    monkeypatch.setenv(server.MODEL, "somewhere")
    monkeypatch.setattr("mlflow.pyfunc.load_model", damaged)
    with pytest.raises(SystemExit) as caught:
        server.app()
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: model.safetensors cannot be used\n"


def test_without_a_champion_it_says_what_to_do(database: Path) -> None:
    params_file.write_yaml(params_of(), paths.PARAMS)
    result = CliRunner().invoke(server.main)
    assert result.exit_code == 2
    assert result.output.splitlines()[-1].startswith("error: model cifar10-diffusion has no champion: run `dvc repro`")
