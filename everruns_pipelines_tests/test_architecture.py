"""Rules of the house that the imports show."""

import ast

import pytest

from everruns_pipelines_tests.architecture import LEVELS, PACKAGE, drawn, imports, picture, upwards

_KNOW_DAGSTER = {"assets.py", "automation.py", "jobs.py"}


def test_the_picture_in_the_docs_is_the_code_s() -> None:
    assert drawn() == picture(), "run python -m everruns_pipelines_tests.architecture"


def test_every_room_has_its_place() -> None:
    assert imports().keys() <= {room for rooms in LEVELS for room in rooms}


def test_no_import_goes_upwards() -> None:
    assert upwards() == []


@pytest.mark.parametrize(("domain", "other"), [("reporting", "items"), ("items", "reporting")])
def test_the_domains_do_not_know_each_other(domain: str, other: str) -> None:
    assert other not in imports()[domain]


@pytest.mark.parametrize("domain", ["reporting", "items"])
def test_a_domain_works_without_dagster(domain: str) -> None:
    knowing = {
        path.name
        for path in (PACKAGE / domain).glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom) and "dagster" in ast.unparse(node).split()
    }
    assert knowing == _KNOW_DAGSTER
