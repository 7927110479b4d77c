"""Which version is the champion: scores, promotion by hand, several processes at once, kills."""

import contextlib
import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.served import params_of
from helpers.stores import warnings

from diffusion import params_file, paths
from diffusion.errors import UserError
from diffusion.serving import registry

Register = Callable[..., str]


def holder(client: Any, alias: str) -> str:
    return str(client.get_model_version_by_alias("faces", alias).version)


def test_the_better_version_is_champion_and_the_newest_candidate(client: Any, add: Register) -> None:
    assert [add(1, fd_lite0=300.0), holder(client, "champion"), holder(client, "candidate")] == ["1", "1", "1"]
    assert [add(2, fd_lite0=310.0), holder(client, "champion"), holder(client, "candidate")] == ["2", "1", "2"]
    assert [add(3, fd_lite0=299.9), holder(client, "champion"), holder(client, "candidate")] == ["3", "3", "3"]


def test_version_10_is_newer_than_version_9(
    client: Any, add: Register, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A server sends the numbers as texts, a database of our own does not."""
    from mlflow.entities.model_registry import ModelVersion

    monkeypatch.setattr(ModelVersion, "version", property(lambda self: str(self._version)))
    client.create_registered_model("faces")
    for _ in range(8):
        client.create_model_version("faces", tmp_path.as_uri())
    assert [add(1, fd_lite0=300.0), holder(client, "candidate")] == ["9", "9"]
    assert [add(2, fd_lite0=310.0), holder(client, "candidate")] == ["10", "10"]
    assert [add(1, fd_lite0=300.0), holder(client, "candidate")] == ["9", "10"]  # sent again
    params_file.write_yaml(params_of(**{"tracking.experiment": "faces"}), paths.PARAMS)
    listed = CliRunner().invoke(registry.main).output.splitlines()
    assert [line.split()[0] for line in listed] == [str(number) for number in range(1, 11)]


def test_scores_of_other_conditions_move_nothing(
    client: Any, add: Register, capsys: pytest.CaptureFixture[str]
) -> None:
    add(1, fd_lite0=300.0)
    capsys.readouterr()
    add(2, of=" of another split", fd_lite0=10.0)
    add(3, fid=5.0)
    assert holder(client, "champion") == "1"
    said = warnings(capsys)
    assert len(said) == 2
    assert "make promote VERSION=2" in said[0]


def test_fid_decides_where_both_have_it(client: Any, add: Register) -> None:
    add(1, fd_lite0=300.0, fid=50.0)
    add(2, fd_lite0=200.0, fid=60.0)
    assert holder(client, "champion") == "1"
    add(3, fd_lite0=400.0, fid=40.0)
    assert holder(client, "champion") == "3"


def test_the_new_scores_decide_not_those_of_fewer_samples_before(client: Any, add: Register) -> None:
    add(1, fid2k_train=30.0)
    add(2, fid2k_train=31.0)
    add(1, fid50k_train=12.0)
    assert (holder(client, "champion"), holder(client, "candidate")) == ("1", "2")
    add(2, fid50k_train=11.0)
    assert holder(client, "champion") == "2"


def test_promotion_by_hand(client: Any, add: Register, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(1, fd_lite0=300.0)
    add(2, fd_lite0=310.0)
    monkeypatch.chdir(tmp_path)
    params_file.write_yaml(params_of(**{"tracking.experiment": "faces"}), paths.PARAMS)
    listed = CliRunner().invoke(registry.main, ["2"])
    assert listed.exit_code == 0, listed.output
    assert holder(client, "champion") == "2"
    lines = listed.output.splitlines()
    assert [line.split()[:2] for line in lines] == [["1", "-"], ["2", "candidate/champion"]]
    refused = CliRunner().invoke(registry.main, ["3"])
    assert refused.exit_code == 2
    assert "no version 3" in refused.output
    with pytest.raises(UserError, match="no version 9"):
        registry.promote(client, "faces", 9)


def test_a_promotion_by_hand_stays_when_a_score_is_sent_again(client: Any, add: Register) -> None:
    add(1, fd_lite0=300.0)
    add(2, fd_lite0=250.0)
    assert holder(client, "champion") == "2"
    registry.promote(client, "faces", 1)
    add(2, fd_lite0=250.0)
    assert holder(client, "champion") == "1"
    add(3, fd_lite0=200.0)
    assert holder(client, "champion") == "3"
    client.set_registered_model_alias("faces", "champion", "2")  # as on MLflow's pages
    add(3, fd_lite0=200.0)
    assert holder(client, "champion") == "2"


ROUNDS = {f"round_{at}": 30.0 for at in range(1, 20)}  # a metric for each interruption


class Interrupted:
    """A client that does something else before its call number `at`, once."""

    def __init__(self, client: Any, at: int, action: Callable[[], Any]) -> None:
        self.client, self.left, self.action = client, at, action

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                self.action()
            return getattr(self.client, name)(*args, **kwargs)

        return call


def test_of_two_evaluations_at_once_the_better_is_champion(client: Any, add: Register) -> None:
    """That of version 3 happens between any two calls of that of version 2."""
    add(1, **ROUNDS)
    add(2)
    add(3)
    for at in itertools.count(1):
        client.set_registered_model_alias("faces", "champion", "1")
        through = Interrupted(client, at, partial(add, 3, **{f"round_{at}": 10.0}))
        add(2, **{f"round_{at}": 20.0}, through=through)
        if through.left > 0:  # it makes fewer calls
            break
        assert holder(client, "champion") == "3", at
    assert at > 10


def test_what_a_kill_left_undone_is_done_when_it_is_sent_again(client: Any, add: Register) -> None:
    add(1, **ROUNDS)
    add(2)
    for at in itertools.count(1):
        client.set_registered_model_alias("faces", "champion", "1")
        through = Interrupted(client, at, lambda: sys.exit(9))
        with contextlib.suppress(SystemExit):
            add(2, **{f"round_{at}": 20.0}, through=through)
        add(2, **{f"round_{at}": 20.0})
        assert holder(client, "champion") == "2", at
        if through.left > 0:
            break
    assert at > 10
    assert len(client.search_model_versions("name = 'faces'")) == 2
