"""Tokens: made once, kept as hashes, read again when their file changes."""

import json
import logging
import os
from pathlib import Path

import pytest

from everruns_pipelines.commands import main
from everruns_pipelines.errors import SettingsError
from everruns_pipelines.serve.tokens import Grant, TokenFile, make_token

ADMIN = Grant("admin", frozenset({"reports:admin", "metrics:read"}))
BOUND = Grant("bound", frozenset({"reports:admin", "items:admin"}), 7, "acme")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


def test_the_command_prints_the_token_once_and_a_line_without_it(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["token", "nightly", "--scope", "reports:admin", "--org-id", "7"]
    assert main.run(command) == 0
    told = json.loads(capsys.readouterr().out)
    path.write_text(f"# made today\n\n{told['line']}\n")
    assert told["token"] not in told["line"]
    assert TokenFile(path).find(told["token"]) == Grant("nightly", frozenset({"reports:admin"}), 7)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["a b", "--scope", "reports:admin"], "name: expected letters"),
        (["x", "--scope", "everything"], "scope: expected some of"),
        (["x"], "--scope"),
        (["x", "--scope", "reports:admin", "--organization", "acme"], "org_id: expected one"),
        (["x", "--scope", "items:admin", "--org-id", "7"], "organization: expected one"),
        (["x", "--scope", "metrics:read", "--org-id", "7"], "scope: expected no metrics:read"),
        (["x", "--scope", "items:admin", "--organization", "a b"], "organization: expected the"),
    ],
)
def test_what_the_file_could_not_hold_is_refused(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["token", *arguments]) == 2
    assert told in json.loads(capsys.readouterr().out)["detail"]


def test_the_file_is_read_again_when_it_changes(path: Path) -> None:
    (admin, line), (bound, other) = make_token(ADMIN), make_token(BOUND)
    path.write_text(line + "\n")
    tokens = TokenFile(path)
    assert (tokens.find(admin), tokens.find(bound), tokens.find("")) == (ADMIN, None, None)
    path.write_text(other + "\n")
    assert (tokens.find(admin), tokens.find(bound)) == (None, BOUND)
    # Replaced as a whole, of the same size and at the same time.
    again = path.with_suffix(".new")
    third, same_size = make_token(BOUND)
    again.write_text(same_size + "\n")
    os.utime(again, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    again.replace(path)
    assert (tokens.find(bound), tokens.find(third)) == (None, BOUND)


def test_when_the_file_goes_nobody_gets_in_until_it_is_back(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token, line = make_token(ADMIN)
    path.write_text(line)
    tokens = TokenFile(path)
    path.unlink()
    assert tokens.find(token) is None
    assert "none is accepted" in caplog.text
    path.write_text(f"{line}\nnightly {token}\n")
    with caplog.at_level(logging.ERROR):
        assert tokens.find(token) == ADMIN
    assert "Line 2 of the tokens is not understood" in caplog.text
    assert token not in caplog.text


@pytest.mark.parametrize(
    "line",
    ["secret", "x sha256:secret scopes=reports:admin", "LINE secret", "LINE org_id=secret", "\x80"],
)
def test_a_file_that_is_wrong_stops_the_start_and_is_not_quoted(path: Path, line: str) -> None:
    _, right = make_token(ADMIN)
    path.write_bytes(line.replace("LINE", right).encode("latin-1"))
    with pytest.raises(SettingsError, match=r"^EVERRUNS_API_TOKENS: ") as refused:
        TokenFile(path)
    assert "secret" not in str(refused.value)


def test_a_file_that_is_not_there_stops_the_start(path: Path) -> None:
    with pytest.raises(SettingsError, match="EVERRUNS_API_TOKENS: expected a file"):
        TokenFile(path)
