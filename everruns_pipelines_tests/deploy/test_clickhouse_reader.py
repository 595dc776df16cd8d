"""deploy/clickhouse/reader.sql grants what is needed: tried by the engine's own access control.

chDB makes no users, but has the one of its configuration: it gets what the file grants.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from everruns_pipelines.databases.clickhouse import ClickHouseDatabase
from everruns_pipelines.databases.embedded.clickhouse import span_tables
from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.deployment import ROOT
from everruns_pipelines_tests.items.world import PROJECT, SESSION, Span, World, envelope

pytestmark = pytest.mark.deploy

READER = ROOT / "deploy" / "clickhouse" / "reader.sql"
STATEMENTS = [
    " ".join(statement.split())
    for statement in re.sub(r"--.*", "", READER.read_text()).split(";")
    if statement.strip()
]
GRANTS = [one.removesuffix(" TO everruns_pipelines") for one in STATEMENTS if "GRANT" in one]
[PROFILE] = [one.rpartition("SETTINGS ")[2] for one in STATEMENTS if "CREATE SETTINGS" in one]

# In a process of its own: the engine reads its configuration once.
_COMMAND = """
import sys
import clickhouse_connect
from everruns_pipelines.commands import main
from everruns_pipelines.databases import clickhouse

def client(*, dsn, settings=None):
    return clickhouse_connect.get_client(dsn=dsn, chdb_options={"config-file": sys.argv[1]})

clickhouse._client = client
sys.exit(main.run(sys.argv[2:]))
"""


@pytest.fixture
def spans(settings: Settings, connection: Connection, tmp_path: Path) -> dict[str, str]:
    """An item in a span; the environment that finds it."""
    assert settings.postgres_url is not None
    environment = {
        "EVERRUNS_POSTGRES_URL": settings.postgres_url.get_secret_value(),
        "EVERRUNS_CLICKHOUSE_DSN": f"chdb://{tmp_path}/spans",
        "EVERRUNS_HOME": str(settings.home),
    }
    own = Settings.from_environment(environment)
    clickhouse = ClickHouseDatabase(own)
    with clickhouse.connect() as opened:
        for statement in span_tables():
            opened.client.command(statement)
    world = World(PostgresDatabase(own), clickhouse, connection)
    world.add_project("webapp", PROJECT)
    world.add(Span([envelope("one")]))
    return environment


def as_reader(
    environment: dict[str, str], directory: Path, grants: list[str], profile: str, *command: str
) -> subprocess.CompletedProcess[str]:
    """Run a command as a user with these grants and this profile."""
    settings = "".join(
        f"<{name}>{value}</{name}>"
        for name, value in (setting.split(" = ") for setting in profile.split(", "))
    )
    queries = "".join(f"<query>{escape(grant)}</query>" for grant in grants)
    (directory / "users.xml").write_text(
        "<clickhouse><quotas><default/></quotas>"
        f"<profiles><default>{settings}</default></profiles>"
        "<users><default><password/><profile>default</profile><quota>default</quota>"
        f"<grants>{queries}</grants></default></users></clickhouse>"
    )
    (directory / "config.xml").write_text(
        "<clickhouse><logger><level>none</level></logger>"
        f"<path>{directory}/spans/</path><users_config>{directory}/users.xml</users_config>"
        f"<user_directories><users_xml><path>{directory}/users.xml</path></users_xml>"
        "</user_directories><access_control_improvements>"
        "<select_from_system_db_requires_grant>true</select_from_system_db_requires_grant>"
        "</access_control_improvements></clickhouse>"
    )
    return subprocess.run(
        [sys.executable, "-c", _COMMAND, str(directory / "config.xml"), *command],
        env={**os.environ, **environment, "DAGSTER_HOME": ""},
        capture_output=True,
        text=True,
        check=False,
    )


REBUILD = (
    *("rebuild", "--organization", "acme", "--workspace", "red", "--project", "webapp"),
    *("--session-id", SESSION),
)


@pytest.mark.parametrize("profile", [PROFILE, "readonly = 1"])
def test_items_are_rebuilt_by_a_user_who_may_only_read(
    spans: dict[str, str], tmp_path: Path, profile: str
) -> None:
    done = as_reader(spans, tmp_path, GRANTS, profile, *REBUILD)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"processed": 1}
    told = as_reader(spans, tmp_path, GRANTS, profile, "doctor").stdout
    assert "spans are found by bloom_filter and bloom_filter indexes" in told, told


@pytest.mark.parametrize(
    ("grants", "profile", "told"),
    [
        (GRANTS[1:], PROFILE, "no such table, or does not show it to this user: otel_traces"),
        (
            GRANTS,
            "readonly = 1, result_overflow_mode = break",
            "The ClickHouse user's settings profile may cut answers",
        ),
    ],
)
def test_what_is_wrong_is_told(
    spans: dict[str, str], tmp_path: Path, grants: list[str], profile: str, told: str
) -> None:
    done = as_reader(spans, tmp_path, grants, profile, *REBUILD)
    assert done.returncode == 2
    assert told in json.loads(done.stdout)["detail"]


def test_the_file_is_right_by_the_engines_grammar(tmp_path: Path) -> None:
    own = Settings.from_environment({"EVERRUNS_CLICKHOUSE_DSN": f"chdb://{tmp_path}/any"})
    with ClickHouseDatabase(own).connect() as opened:
        for statement in STATEMENTS:
            query = "SELECT formatQuery({statement:String}) != '' AS is_right"
            assert opened.rows(query, {"statement": statement}, ["is_right"]) == [["1"]]
