"""What users are told: in one line, and never with a password."""

import pytest
from click.testing import CliRunner

from diffusion.__main__ import main
from diffusion.errors import UserError, brief, checked_url, masked

SECRETS = ["S3cretPw", "p@ss/w0rd", "a:b", "x#y", "q?r"]


@pytest.mark.parametrize("secret", SECRETS)
def test_no_password_is_said(secret: str) -> None:
    said = f"the server at 'http://alice:{secret}@127.0.0.1:5999/api' and postgresql+psycopg2://u:{secret}@db/x failed"
    assert masked(said) == "the server at 'http://***@127.0.0.1:5999/api' and postgresql+psycopg2://***@db/x failed"
    assert secret not in str(UserError(said))
    assert secret not in brief(RuntimeError(f"{said}\n{said}"))


def test_other_words_stay() -> None:
    said = "http://127.0.0.1:5000/#/experiments/1, sqlite:////home/a/b.db; write to me@example.org"
    assert masked(said) == said
    assert masked("postgresql://db/x?user=u&password=secret&sslmode=on") == (
        "postgresql://db/x?user=u&password=***&sslmode=on"
    )


def test_a_long_error_is_cut() -> None:
    assert brief("a\n b" * 100, 20) == "a ba ba ba ba ba ..."


@pytest.mark.parametrize("secret", ["p@ss/w0rd", "p@ss", "pa/ss", "x#y", "q?r"])
def test_an_ambiguous_password_is_refused(secret: str) -> None:
    with pytest.raises(UserError, match=r"^OPTUNA_STORAGE: .* write @ as %40") as refused:
        checked_url("OPTUNA_STORAGE", f"postgresql://u:{secret}@127.0.0.1:1/db")
    assert secret not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:p%40ss%2Fw0rd@127.0.0.1:1/db",
        "http://alice:S3cretPw@127.0.0.1:5999",
        "http://127.0.0.1:5999",
        "sqlite:////home/me@work/study.db",
        "sqlite:///optuna/study.db",
        "databricks",
    ],
)
def test_others_are_taken(url: str) -> None:
    assert checked_url("X", url) == url


@pytest.mark.parametrize(
    "arguments",
    [
        ["interchange", "write", "out"],
        ["lineage"],
        ["metrics", "compare", "a.npz", "b.npz"],
        ["promote"],
        ["serve"],
        ["tune-apply"],
    ],
    ids=" ".join,
)
def test_a_commands_error_is_one_line_and_status_2(arguments: list[str]) -> None:
    """In an empty folder, where every one of them lacks something."""
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
