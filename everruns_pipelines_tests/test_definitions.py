"""The public surface, as a file under version control: what changes there shows in a diff.

`EVERRUNS_WRITE_SNAPSHOT=1 pytest everruns_pipelines_tests/test_definitions.py` writes it anew.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import dagster as dg
import yaml
from dagster import Definitions

from everruns_pipelines.definitions import build_definitions
from everruns_pipelines.reporting.catalog import FACTS
from everruns_pipelines.reporting.lineage import columns_of
from everruns_pipelines.settings import Settings

SNAPSHOT = Path(__file__).with_name("definitions.yaml")


def test_the_public_surface_is_the_recorded_one() -> None:
    surface = yaml.safe_dump(_surface(_definitions()), sort_keys=False, width=100)
    if os.environ.get("EVERRUNS_WRITE_SNAPSHOT"):
        SNAPSHOT.write_text(surface)
    assert surface == SNAPSHOT.read_text()


def test_the_definitions_load() -> None:
    Definitions.validate_loadable(_definitions())


def test_loading_the_definitions_loads_no_driver_and_no_engine() -> None:
    heavy = {"apprise", "chdb", "clickhouse_connect", "fsspec", "pandas", "psycopg", "pyarrow"}
    heavy |= {"requests", "rich"}
    code = (
        "import sys, dagster; before = set(sys.modules);"
        "from everruns_pipelines.definitions import defs; import everruns_pipelines.client;"
        f"print(sorted({heavy} & (set(sys.modules) - before)))"
    )
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True, check=True
    )
    assert told.stdout.strip() == "[]"


def test_a_backfill_is_one_run_unless_it_is_to_be_cut() -> None:
    cut = Settings.from_environment({"EVERRUNS_MAX_PARTITIONS_PER_RUN": "30"})
    for settings, most in ((Settings.from_environment({}), None), (cut, 30)):
        partitioned = [
            asset
            for asset in build_definitions(settings).resolve_asset_graph().asset_nodes
            if asset.is_materializable and asset.partitions_def is not None
        ]
        assert len(partitioned) == 7
        for asset in partitioned:
            assert asset.backfill_policy is not None
            assert asset.backfill_policy.max_partitions_per_run == most


def test_every_column_of_an_asset_is_described() -> None:
    for spec in _definitions().resolve_all_asset_specs():
        assert spec.description, spec.key
        schema: Any = spec.metadata.get("dagster/column_schema")
        for column in schema.columns if schema else ():
            assert column.description, (spec.key, column.name)


def test_the_lineage_of_columns_names_columns_that_are_read() -> None:
    specs = {spec.key: spec for spec in _definitions().resolve_all_asset_specs()}
    facts = [spec for spec in specs.values() if spec.group_name == "reporting"]
    assert len(facts) == 6
    for fact in facts:
        lineage: dg.TableColumnLineage = fact.metadata["dagster/column_lineage"]
        assert lineage.deps_by_column.keys() <= _columns(fact)
        for column, deps in lineage.deps_by_column.items():
            for dep in deps:
                assert dep.asset_key in {one.asset_key for one in fact.deps}, (fact.key, column)
                assert dep.column_name in _columns(specs[dep.asset_key]), (fact.key, column)


def test_a_column_that_the_projection_provides_has_no_lineage_from_the_session() -> None:
    by_fact = {fact.table: columns_of(fact) for fact in FACTS}
    assert by_fact["fact_turn"]["agent_id"] == [("sessions", "agent_id")]
    assert "agent_id" not in by_fact["fact_budget_posting"]
    assert by_fact["fact_turn"]["time_bucket_day"] == [("events", "ts"), ("archived_events", "ts")]


def test_every_job_describes_itself_and_its_config() -> None:
    repository = _definitions().get_repository_def()
    for job in _jobs(repository):
        assert job.description, job.name
        for path, field in _fields(job):
            assert field.description, (job.name, path)


def _columns(spec: dg.AssetSpec) -> set[str]:
    schema: dg.TableSchema = spec.metadata["dagster/column_schema"]
    return {column.name for column in schema.columns}


def _definitions() -> dg.Definitions:
    settings = Settings.from_environment({})
    return build_definitions(settings.model_copy(update={"reporting_start": date(2026, 1, 1)}))


def _surface(definitions: dg.Definitions) -> dict[str, Any]:
    repository = definitions.get_repository_def()
    specs = sorted(definitions.resolve_all_asset_specs(), key=lambda spec: spec.key)
    return {
        "assets": {spec.key.to_user_string(): _asset(spec) for spec in specs},
        "checks": sorted(
            key.to_user_string() for key in definitions.resolve_asset_graph().asset_check_keys
        ),
        "jobs": {job.name: _job(job) for job in _jobs(repository)},
        "sensors": {
            sensor.name: {
                "job": sensor.job_name,
                "seconds": sensor.minimum_interval_seconds,
                "default": sensor.default_status.value,
            }
            for sensor in sorted(repository.sensor_defs, key=lambda one: one.name)
        },
        "schedules": {
            schedule.name: {
                "job": schedule.job_name,
                "cron": schedule.cron_schedule,
                "default": schedule.default_status.value,
            }
            for schedule in sorted(repository.schedule_defs, key=lambda one: one.name)
        },
    }


def _asset(spec: dg.AssetSpec) -> dict[str, Any]:
    schema: Any = spec.metadata.get("dagster/column_schema")
    described: dict[str, Any] = {
        "group": spec.group_name,
        "kinds": sorted(spec.kinds),
        "owners": list(spec.owners),
        "tags": {name: value for name, value in spec.tags.items() if "/kind/" not in name},
        "table": spec.metadata.get("dagster/table_name"),
        "from": sorted(dep.asset_key.to_user_string() for dep in spec.deps),
        "partitions": type(spec.partitions_def).__name__ if spec.partitions_def else None,
        "freshness": type(spec.freshness_policy).__name__ if spec.freshness_policy else None,
        "columns": {column.name: column.type for column in schema.columns} if schema else None,
    }
    return {name: value for name, value in described.items() if value}


def _jobs(repository: dg.RepositoryDefinition) -> list[dg.JobDefinition]:
    jobs = [job for job in repository.get_all_jobs() if not job.name.startswith("__")]
    return sorted(jobs, key=lambda job: job.name)


def _job(job: dg.JobDefinition) -> dict[str, Any]:
    return {
        "ops": sorted(node.name for node in job.nodes),
        "config": {
            path: {
                "type": field.config_type.given_name or field.config_type.key,
                **({"default": field.default_value} if field.default_provided else {}),
                "required": field.is_required,
            }
            for path, field in _fields(job)
        },
    }


def _fields(job: dg.JobDefinition) -> Iterator[tuple[str, Any]]:
    """The config fields of a job's ops, each under the op's name."""
    for node in sorted(job.nodes, key=lambda one: one.name):
        definition: Any = node.definition
        fields: dict[str, Any] = getattr(
            getattr(definition.config_schema, "config_type", None), "fields", {}
        )
        for name, field in sorted(fields.items()):
            yield f"{node.name}.{name}", field
