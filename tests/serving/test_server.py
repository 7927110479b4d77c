"""The served champion over real HTTP: what it draws, and that nothing a client sends is answered with a 5xx."""

import base64
import concurrent.futures
import http.client
import io
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers.project import REPO
from helpers.served import described, params_of, write_model
from helpers.stores import wait_for
from PIL import Image

from diffusion import params_file, paths
from diffusion.errors import UserError
from diffusion.model.model_file import load_denoiser
from diffusion.sampling import generation
from diffusion.serving import registry, requests, server

pytest.importorskip("mlflow")

pytestmark = pytest.mark.xdist_group("served")  # one start of the server
CONDITIONAL = {"model.num_classes": 10, "sample.guidance": 2.0, "tracking.experiment": "faces"}


def reply(port: int, body: Any, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/invocations", body, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text)


def ask(port: int, **inputs: Any) -> tuple[int, Any]:
    return reply(port, json.dumps({"inputs": inputs}))


@pytest.fixture(scope="module")
def served(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """Port of `python -m diffusion serve`, run as a user does, and the folder with the weights that it serves."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("served")
    database = folder / "mlflow.db"
    database.write_bytes(empty_database.read_bytes())
    client = MlflowClient(f"sqlite:///{database}")
    run = client.create_run(client.create_experiment("faces", artifact_location=(folder / "store").as_uri()))
    params = params_of(**CONDITIONAL)
    weights = write_model(folder, params)
    registry.register(client, run.info.run_id, weights, described(weights, params, fd_lite0=1.0))
    params_file.write_yaml(params, folder / "params.yaml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{database}", "PYTHONPATH": str(REPO / "src")}
    environment |= {"OMP_NUM_THREADS": "1", "DVC_ROOT": str(folder)}
    command = [sys.executable, "-m", "diffusion", "serve", "--port", str(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)

    def healthy() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_for(healthy)
        yield port, folder
    finally:
        process.terminate()
        process.wait()


def drawn(folder: Path, count: int, seed: int, **changes: Any) -> np.ndarray:
    """The same images from the library itself."""
    sample = params_of(**{**CONDITIONAL, **changes}).sample
    cpu = torch.device("cpu")
    parts = generation.generate(
        load_denoiser(folder / "model.safetensors", sample, cpu), sample, seed, range(count), cpu
    )
    return torch.cat([*parts]).numpy()


def test_raw_and_png_are_the_librarys_images(served: tuple[int, Path]) -> None:
    port, folder = served
    status, raw = ask(port, num_images=11, seed=7, format="raw")
    assert status == 200
    np.testing.assert_array_equal(np.array(raw["predictions"]["images"]), drawn(folder, 11, 7))
    assert raw["predictions"]["labels"] == [i % 10 for i in range(11)]
    status, png = ask(port, num_images=11, seed=7)
    files = [io.BytesIO(base64.b64decode(text)) for text in png["predictions"]["images"]]
    np.testing.assert_array_equal(np.stack([np.asarray(Image.open(file)) for file in files]), drawn(folder, 11, 7))


def test_labels_and_guidance_are_obeyed(served: tuple[int, Path]) -> None:
    port, folder = served
    status, found = ask(port, num_images=5, seed=1, labels=[3, 8], guidance=4, format="raw")
    assert status == 200
    assert found["predictions"]["labels"] == [3, 8, 3, 8, 3]
    expected = drawn(folder, 5, 1, **{"sample.labels": [3, 8], "sample.guidance": 4.0})
    np.testing.assert_array_equal(np.array(found["predictions"]["images"]), expected)


def test_without_a_seed_each_answer_differs_and_names_its_own(served: tuple[int, Path]) -> None:
    port, _ = served
    first, second = (ask(port, num_images=1, format="raw")[1]["predictions"] for _ in range(2))
    assert first["images"] != second["images"]
    assert ask(port, num_images=1, format="raw", seed=first["seed"])[1]["predictions"] == first


def nested(depth: int) -> Any:
    found: Any = 0
    for _ in range(depth):
        found = [found]
    return found


BAD = [
    ({"num_images": 65}, "num_images must be a whole number from 1 to 64, not 65"),
    ({"num_images": 0}, "num_images must be a whole number from 1 to 64, not 0"),
    ({"num_images": 2.0}, "num_images must be a whole number from 1 to 64, not 2.0"),
    ({"num_images": True}, "num_images must be a whole number from 1 to 64, not True"),
    ({"num_images": "16"}, "num_images must be a whole number from 1 to 64, not '16'"),
    ({}, "num_images is missing: give a whole number from 1 to 64"),
    ({"num_images": 1, "seed": -1}, "seed must be"),
    ({"num_images": 1, "sed": 1}, "unknown input 'sed': did you mean seed?"),
    ({"num_images": 1, "labels": [10]}, "labels must be a list of classes from 0 to 9"),
    ({"num_images": 1, "labels": []}, "labels must be a list of classes from 0 to 9"),
    ({"num_images": 1, "labels": 3}, "labels must be"),
    ({"num_images": 1, "guidance": -1}, "guidance must be a number from 0 to 100"),
    ({"num_images": 1, "format": "jpg"}, "format must be one of png, raw, not 'jpg'"),
    ({"num_images": 1, "format": "\ud800"}, "inputs cannot be read"),  # half of a character
    ({"num_images": 1, "\ud800": 1}, "unknown input '\\ud800'"),
    ({"num_images": 1, "labels": nested(300)}, "inputs cannot be read"),
    ({"num_images": 1, "seed": None}, "seed must not be null: leave it out"),
    ({"num_images": 1, "labels": None}, "labels must not be null: leave it out"),
    ({"num_images": 1, "guidance": None}, "guidance must not be null: leave it out"),
]


@pytest.mark.parametrize(("inputs", "sentence"), BAD)
def test_a_bad_request_is_a_400_with_one_sentence(
    served: tuple[int, Path], inputs: dict[str, Any], sentence: str
) -> None:
    status, answer = ask(served[0], **inputs)
    assert status == 400
    assert answer["error"].startswith(sentence)
    assert "\n" not in answer["error"]


def test_what_mlflows_server_answers_with_500_or_a_traceback_is_a_4xx_here(served: tuple[int, Path]) -> None:
    port, _ = served
    assert reply(port, "[" * 30_000)[0] == 400
    assert reply(port, '{"inputs": {"num_images": 1, "labels": ' + "[" * 950 + "]" * 950 + "}}")[0] == 400
    assert reply(port, '{"inputs": {"num_images": ' + "9" * 5000 + "}}")[0] == 400
    assert reply(port, '{"inputs": {"num_images": NaN}}')[0] == 400
    assert reply(port, b"\xff\xfe")[0] == 400
    assert reply(port, '{"dataframe_records": []}')[0] == 400
    assert reply(port, " " * 70_000)[0] == 413
    assert reply(port, iter([b'{"inputs": ', b'{"num_images": 1}}']))[0] == 411  # chunked
    both = {"Content-Length": "10", "Transfer-Encoding": "chunked"}  # of which the second would win, without an end
    assert reply(port, iter([b"1\r\n{\r\n0\r\n\r\n"]), **both)[0] == 411
    assert reply(port, "{}", **{"Content-Type": "text/csv"})[0] == 415
    assert reply(port, "{}", **{"Content-Type": ""})[0] == 415


def test_content_types_are_read_as_http_spells_them(served: tuple[int, Path]) -> None:
    port, _ = served
    body = json.dumps({"inputs": {"num_images": 1}})
    for kind in ("application/json;", "Application/JSON", "application/json; charset=UTF-8", "application/json; a=b"):
        assert reply(port, body, **{"Content-Type": kind})[0] == 200, kind
    for kind in ("application/json; charset=utf-16", "application/jsonx", "text/plain; application/json"):
        status, answer = reply(port, body, **{"Content-Type": kind})
        assert (status, set(answer)) == (415, {"error"}), kind


def test_what_mlflow_itself_refuses_is_one_sentence_too(served: tuple[int, Path]) -> None:
    port, _ = served
    for method, path, status in (("GET", "/invocations", 405), ("POST", "/nowhere", 404)):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request(method, path)
        answer = connection.getresponse()
        assert answer.status == status
        assert set(json.loads(answer.read())) == {"error"}
        connection.close()
    refused = {"error_code": "BAD_REQUEST", "message": "Failed to predict data '{}'. \nError: two\n lines"}
    assert server.sentence(json.dumps(refused)) == "two lines"
    assert server.sentence("Request processing time exceeded limit") == "Request processing time exceeded limit"


def test_it_survives_a_thousand_malformed_bodies(served: tuple[int, Path]) -> None:
    port, folder = served
    good = b'{"inputs": {"num_images": 2, "seed": 7, "labels": [1, 2], "guidance": 1.5}}'
    rng = random.Random(0)
    for _ in range(1000):
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
        status, answer = reply(port, bytes(body))
        assert status in (200, 400), (status, body)
        if status == 400:
            assert set(answer) == {"error"}
            assert "\n" not in answer["error"]
    status, answer = ask(port, num_images=2, seed=7, format="raw")
    assert status == 200
    np.testing.assert_array_equal(np.array(answer["predictions"]["images"]), drawn(folder, 2, 7))


def test_eight_clients_at_once_get_their_own_images(served: tuple[int, Path]) -> None:
    port, folder = served
    with concurrent.futures.ThreadPoolExecutor(8) as clients:
        answers = [*clients.map(lambda seed: ask(port, num_images=3, seed=seed, format="raw"), range(16))]
    for seed, (status, answer) in enumerate(answers):
        assert status == 200
        np.testing.assert_array_equal(np.array(answer["predictions"]["images"]), drawn(folder, 3, seed))


def test_models_without_classes_refuse_them() -> None:
    with pytest.raises(UserError, match="knows no classes"):
        requests.parse({"num_images": 1, "labels": [0]}, None)
    with pytest.raises(UserError, match="knows no classes"):
        requests.parse({"num_images": 1, "guidance": 2.0}, None)
    assert requests.parse({"num_images": 1, "guidance": 1}, None) == requests.Request(num_images=1, guidance=1.0)
    with pytest.raises(UserError, match="knows no classes"):  # MLflow's schema lacks it
        server.check(b'{"inputs": {"num_images": 1, "guidance": 1}}', None)


def test_a_model_that_always_knew_the_class_is_not_guided(tmp_path: Path) -> None:
    """The network's row for no class was never trained."""
    known = {"num_images": 1, "labels": [0]}
    with pytest.raises(UserError, match="cannot be guided"):
        requests.parse({**known, "guidance": 2.0}, 10, guidable=False)
    assert requests.parse({**known, "guidance": 1.0}, 10, guidable=False).labels == (0,)
    for share in (0.0, 0.2):
        params = params_of(**{"model.num_classes": 10, "train.label_dropout": share})
        weights = write_model(tmp_path / str(share), params)
        assert requests.Generator(weights, params.sample).guidable == (share > 0)


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
