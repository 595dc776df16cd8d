"""Items in Dagster: the asset by day, its checks, and the job with its run config."""

from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import pytest

from everruns_pipelines.definitions import build_definitions
from everruns_pipelines.items.assets import item_assets
from everruns_pipelines.items.jobs import check_items, rebuild_items
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.items.world import SESSION, Span, World, envelope, key

_SCOPE = {"organization": "acme", "workspace": "red", "project": "webapp"}
_COUNTS = {
    "processed",
    "inserted",
    "refreshed",
    "unchanged",
    "rejected",
    "offloaded",
    "links_created",
    "links_unresolved",
}

_COUNTED = ("missing_rows", "underway_rows", "expected_rows")


@pytest.fixture
def definitions(world: World) -> dg.Definitions:
    made = item_assets(world.clickhouse.settings)
    return dg.Definitions(
        assets=[made.asset],
        asset_checks=[made.checks],
        jobs=[
            rebuild_items,
            _define_job("days", selection=["items"]),
            check_items,
        ],
        resources={
            "everruns_items_postgres": world.postgres,
            "everruns_clickhouse": world.clickhouse,
            "everruns_io_manager": dg.mem_io_manager,
        },
    )


def _define_job(name: str, **selection: Any) -> Any:
    return getattr(dg, "define_asset_job")(name, **selection)  # noqa: B009, its types are not known


def _rebuild(definitions: dg.Definitions, **config: Any) -> dg.ExecuteInProcessResult:
    return definitions.get_job_def("rebuild_items").execute_in_process(
        run_config={"ops": {"rebuild": {"config": {**_SCOPE, **config}}}}
    )


def _days(definitions: dg.Definitions, first: str, last: str) -> dg.ExecuteInProcessResult:
    return definitions.get_job_def("days").execute_in_process(
        tags={
            "dagster/asset_partition_range_start": first,
            "dagster/asset_partition_range_end": last,
        },
    )


def test_the_job_returns_the_counts_and_tells_them_as_metadata(
    world: World, definitions: dg.Definitions
) -> None:
    world.add(Span([envelope("one"), {"no": "key"}]))
    result = _rebuild(definitions, session_id=SESSION)
    counts = result.output_for_node("rebuild")
    assert counts.keys() == _COUNTS
    assert (counts["processed"], counts["rejected"]) == (1, 1)
    outputs: list[Any] = [
        event.event_specific_data for event in result.all_node_events if event.is_successful_output
    ]
    metadata = outputs[0].metadata
    assert {name: metadata[name].value for name in _COUNTS} == counts
    assert metadata["rejections"].records[0].data == {"reason": "invalid_field", "envelopes": 1}


def test_a_refusal_fails_the_run_with_the_error_of_the_api(definitions: dg.Definitions) -> None:
    with pytest.raises(dg.Failure, match="Name a session") as raised:
        _rebuild(definitions)
    error: Any = raised.value.metadata["error"].value
    assert error["code"] == "validation_error"


def test_a_range_of_days_in_one_run_with_counts_per_day(
    world: World, definitions: dg.Definitions
) -> None:
    world.add(
        Span([envelope("first")], name="first"),
        Span([envelope("late")], name="late", start=Span().start.replace(hour=23, minute=59)),
        Span([envelope("second")], name="second", start=Span().start.replace(day=2)),
        Span([envelope("outside")], name="outside", start=Span().start.replace(day=4)),
    )
    result = _days(definitions, "2026-01-01", "2026-01-03")
    processed = {
        event.partition: event.materialization.metadata["processed"].value
        for event in result.get_asset_materialization_events()
    }
    assert processed == {"2026-01-01": 2, "2026-01-02": 1, "2026-01-03": 0}
    assert all(check.passed for check in result.get_asset_check_evaluations())
    assert world.items().keys() == {key("first"), key("late"), key("second")}


def test_a_run_of_no_day_is_refused(definitions: dg.Definitions) -> None:
    with pytest.raises(dg.Failure, match="expected a day, or a range of days"):
        definitions.resolve_job_def("days").execute_in_process()


def test_a_range_that_ends_before_it_begins_is_refused_by_asset_and_checks(
    definitions: dg.Definitions,
) -> None:
    with pytest.raises(dg.Failure, match="expected the first day of the range first"):
        _days(definitions, "2026-01-03", "2026-01-01")
    with pytest.raises(dg.Failure, match="expected the first day of the range first"):
        definitions.resolve_job_def("check_items").execute_in_process(
            tags={
                "dagster/asset_partition_range_start": "2026-01-03",
                "dagster/asset_partition_range_end": "2026-01-01",
            }
        )


def test_the_checks_find_missing_and_different_items(
    world: World, definitions: dg.Definitions
) -> None:
    world.post("different", title="edited")
    world.add(Span([envelope("missing"), envelope("different")]))
    result = definitions.resolve_job_def("check_items").execute_in_process(
        # A partition_key is compared with the assets' days, and a run of checks has no asset.
        tags={"dagster/partition": "2026-01-01"}
    )
    found = {check.check_name: check for check in result.get_asset_check_evaluations()}
    missing = found["no_missing_rows"]
    different = found["no_stale_rows"]
    assert (missing.passed, missing.metadata["missing_rows"].value) == (False, 1)
    assert (different.passed, different.metadata["stale_rows"].value) == (False, 1)
    assert world.items().keys() == {key("different")}


def test_what_was_reported_minutes_ago_may_be_under_way(
    world: World, definitions: dg.Definitions
) -> None:
    links = [{"target_ref": "target", "relationship": "x"}]
    for name, minutes in (("late", 16), ("under way", 5)):
        started = datetime.now(UTC) - timedelta(minutes=minutes)
        world.add(Span([envelope(name, links=links)], name=name, start=started))
    world.post("target", ref="target")
    result = definitions.resolve_job_def("check_items").execute_in_process()
    found = {check.check_name: check for check in result.get_asset_check_evaluations()}
    counted = {name: found["no_missing_rows"].metadata[name].value for name in _COUNTED}
    assert counted == {"missing_rows": 1, "underway_rows": 1, "expected_rows": 2}


def test_the_checks_find_a_missing_link(world: World, definitions: dg.Definitions) -> None:
    links = [{"target_ref": "me", "relationship": "same as"}]
    world.add(Span([envelope("one", ref="me", links=links)]))
    world.rebuild()
    assert _differing(definitions) == 0
    world.connection.execute("DELETE FROM item_links")
    assert _differing(definitions) == 1


def _differing(definitions: dg.Definitions) -> Any:
    result = definitions.resolve_job_def("check_items").execute_in_process(
        tags={"dagster/partition": "2026-01-01"}
    )
    [check] = [
        check
        for check in result.get_asset_check_evaluations()
        if check.check_name == "no_stale_rows"
    ]
    assert check.passed == (check.metadata["stale_rows"].value == 0)
    return check.metadata["stale_rows"].value


def test_every_column_of_the_table_is_described(world: World) -> None:
    spec = item_assets(world.clickhouse.settings).asset.get_asset_spec()
    schema: Any = spec.metadata["dagster/column_schema"]
    described = {column.name: column.description for column in schema.columns}
    rows = world.connection.execute(
        "SELECT column_name FROM information_schema.columns"
        " WHERE table_schema = 'public' AND table_name = 'items'"
    )
    assert described.keys() == {name for (name,) in rows}
    assert all(described.values())
    assert (spec.group_name, spec.kinds) == ("items", {"postgres", "clickhouse"})


def test_before_the_first_span_there_is_nothing_to_check(settings: Settings) -> None:
    result = build_definitions(settings).resolve_job_def("check_items").execute_in_process()
    checks = result.get_asset_check_evaluations()
    assert {check.check_name: check.passed for check in checks} == {
        "no_missing_rows": True,
        "no_stale_rows": True,
    }
