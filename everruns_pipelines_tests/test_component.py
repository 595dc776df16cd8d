"""Our definitions in a Dagster project of others, made as Dagster's own tools make projects."""

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import dagster as dg
import pytest
import yaml

from everruns_pipelines.component import EverrunsPipelinesComponent
from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.errors import SettingsError
from everruns_pipelines.parts import definitions_of_parts
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.reporting.world import World, value

# Assets, a group, a resource and a job whose names are ones of ours too.
THEIRS = """
import dagster as dg

@dg.asset(group_name="reporting")
def fact_turn(postgres: dg.ResourceParam[str]) -> str:
    return postgres

@dg.asset(deps=[dg.AssetKey(["ours", "fact_turn"])])
def weekly_report() -> None: ...

@dg.op
def project() -> None: ...

@dg.job
def project_reporting() -> None:
    project()

defs = dg.Definitions(
    assets=[fact_turn, weekly_report], jobs=[project_reporting], resources={"postgres": "theirs"}
)
"""


@pytest.fixture
def project(tmp_path: Path, postgres_url: str) -> "Project":
    return Project(tmp_path, postgres_url)


class Project:
    """A project in a temporary directory, with our component beside what is theirs."""

    def __init__(self, directory: Path, postgres_url: str) -> None:
        self.root = directory / "theirs"
        self.home = directory / "home"
        self.home.mkdir()
        (self.home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
        self.environment = {
            **{name: text for name, text in os.environ.items() if "EVERRUNS" not in name},
            "HOME": str(self.home),
            "DAGSTER_HOME": str(self.home),
            "PLATFORM_URL": postgres_url,
            "PYTHONPATH": str(self.root / "src"),
        }
        self.run("create-dagster", "project", str(self.root), "--no-uv-sync")
        (self.root / "src/theirs/defs/theirs.py").write_text(THEIRS)

    def add_ours(self, **attributes: object) -> None:
        directory = self.root / "src/theirs/defs/ours"
        directory.mkdir()
        described = {
            "type": "everruns_pipelines.component.EverrunsPipelinesComponent",
            "attributes": attributes,
        }
        (directory / "defs.yaml").write_text(yaml.safe_dump(described))

    def run(self, command: str, *arguments: str) -> str:
        done = subprocess.run(
            [Path(sys.executable).with_name(command), *arguments],
            cwd=self.root if self.root.exists() else None,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.mark.deploy
def test_a_project_of_others_takes_us_in_and_runs_a_backfill(
    project: Project, connection: Connection
) -> None:
    world = World(connection)
    now = datetime.now(UTC)
    world.event(world.session(world.org()), ts=now)
    project.add_ours(
        postgres_url="{{ env.PLATFORM_URL }}",
        parts="reporting",
        prefix="ours",
        reporting_start=f"{now:%Y}-01-01",
    )

    project.run("dg", "check", "yaml")
    project.run("dg", "check", "defs")
    project.run("dg", "launch", "--job", "ours_backfill_reporting")

    assert value(connection, "SELECT count(*) FROM fact_tool_call") == 1
    connection.execute("DELETE FROM fact_tool_call")
    project.run("dg", "launch", "--assets", "ours/fact_tool_call", "--partition", f"{now:%F}")
    assert value(connection, "SELECT count(*) FROM fact_tool_call") == 1
    with dg.DagsterInstance.from_config(str(project.home)) as instance:
        keys = {key.to_user_string() for key in instance.all_asset_keys()}
    assert {"ours/fact_tool_call", "ours/fact_session"} <= keys
    assert not [key for key in keys if not key.startswith("ours/")]


def test_every_setting_is_a_field() -> None:
    # These belong to who operates Dagster, which is not us.
    web_server = {"allowed_hosts", "api_tokens", "graphql_headers"}
    theirs = {"dagster_postgres_url", "runs_keep_days", *web_server}
    variables = {name for name, field in Settings.model_fields.items() if field.alias}
    assert variables - theirs <= set(EverrunsPipelinesComponent.model_fields)


@pytest.mark.parametrize("automation", [True, False])
def test_the_prefix_is_before_every_key_and_job(postgres_url: str, automation: bool) -> None:
    component = EverrunsPipelinesComponent(
        prefix="ours", automation=automation, postgres_url=postgres_url, outbox_keep_days=3
    )
    built = component.build_defs(cast("dg.ComponentLoadContext", None))
    repository = built.get_repository_def()
    keys = repository.asset_graph.get_all_asset_keys()
    assert keys
    assert {key.path[0] for key in keys} == {"ours"}
    jobs = [job for job in repository.get_all_jobs() if not job.name.startswith("__")]
    assert {job.name.split("_")[0] for job in jobs} == {"ours"}
    automatic = [*repository.sensor_defs, *repository.schedule_defs]
    assert bool(automatic) == automation
    assert {str(one.job_name).split("_")[0] for one in automatic} <= {"ours"}
    assert built.executor is None
    assert all(key.startswith("everruns_") for key in built.resources or ())


def test_no_op_has_a_name_that_a_project_of_others_may_use() -> None:
    jobs = definitions_of_parts(Settings.from_environment({})).jobs or []
    ops = [
        node.definition for job in jobs if isinstance(job, dg.JobDefinition) for node in job.nodes
    ]
    assert [op.name for op in ops if not op.name.startswith("everruns_")] == []


def test_a_wrong_field_stops_the_start_and_names_its_variable() -> None:
    component = EverrunsPipelinesComponent(postgres_url="mysql://user:hunter2@host/db")
    with pytest.raises(SettingsError, match=r"^EVERRUNS_POSTGRES_URL: expected") as refused:
        component.build_defs(cast("dg.ComponentLoadContext", None))
    assert "hunter2" not in str(refused.value)
