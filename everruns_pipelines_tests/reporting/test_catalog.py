"""One more fact is one more entry of the catalog and one more `.sql` file."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import everruns_pipelines
from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines_tests.reporting.world import World, rows

_ENTRIES = """
    Fact(
        "fact_replacement",
        "Every message that was replaced.",
        (Column("reason", "text", "Why."),),
        (Projection("replacement", EVENT, ("output.message.replaced",)),),
    ),
    Fact(
        "fact_blueprint",
        "Every session of a blueprint.",
        (Column("session_status", "text", "Status of the session."),),
        (
            Projection(
                "blueprint",
                SESSION,
                supersedes="fact.org_id = source.org_id AND fact.session_id = source.source_id",
            ),
        ),
        has_turn=False,
    ),
"""
_SELECTS = {
    "replacement": """
        SELECT org_id, 'event:' || id AS source_key, session_id,
            context ->> 'turn_id' AS turn_id, ts AS created_at, data ->> 'reason' AS reason
        FROM selected
    """,
    "blueprint": """
        SELECT org_id, 'session:' || id || ':of:' || blueprint_id AS source_key,
            id AS session_id, created_at, status AS session_status
        FROM selected
        WHERE blueprint_id IS NOT NULL
    """,
}
_REPAIR = """
import sys
import psycopg
from everruns_pipelines.reporting.backfill import BackfillRequest, enqueue
from everruns_pipelines.reporting.catalog import FACTS
from everruns_pipelines.reporting.database import prepare
from everruns_pipelines.reporting.drain import drain

assert len(FACTS) == 8
with psycopg.connect(sys.argv[1], autocommit=True) as connection:
    for fact in FACTS[:2]:
        columns = ", ".join(f"{column.name} {column.type}" for column in fact.columns)
        connection.execute(
            f"CREATE TABLE IF NOT EXISTS {fact.table} ({columns},"
            " projected_at timestamptz DEFAULT now(), PRIMARY KEY (org_id, source_key))"
        )
    prepare(connection)
    print(enqueue(connection, BackfillRequest())["enqueued"])
    for _ in drain(connection, max_attempts=12):
        pass
"""


def test_one_more_fact_is_projected_and_backfilled(
    connection: Connection, postgres_url: str, tmp_path: Path
) -> None:
    source = Path(everruns_pipelines.__file__).parent
    package = shutil.copytree(source, tmp_path / source.name)
    catalog = package / "reporting" / "catalog.py"
    catalog.write_text(catalog.read_text().replace("FACTS = (", f"FACTS = ({_ENTRIES}", 1))
    for name, select in _SELECTS.items():
        (package / "reporting" / "projections" / f"{name}.sql").write_text(select)

    def repair() -> int:
        run = subprocess.run(
            [sys.executable, "-c", _REPAIR, postgres_url],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert run.returncode == 0, run.stderr
        return int(run.stdout)

    world = World(connection)
    session = world.session(world.org(), blueprint_id="plan")
    world.event(session, "output.message.replaced", data={"reason": "rude"})
    facts = (
        "SELECT reason FROM fact_replacement UNION ALL SELECT session_status FROM fact_blueprint"
    )

    assert repair() == 2
    assert rows(connection, facts) == [("rude",), ("started",)]
    connection.execute("DELETE FROM fact_replacement")
    # What else changes with a session does not count here.
    connection.execute("ALTER TABLE sessions DISABLE TRIGGER USER")
    connection.execute("UPDATE sessions SET blueprint_id = NULL")
    assert repair() == 2
    assert rows(connection, facts) == [("rude",)]
    assert repair() == 0
