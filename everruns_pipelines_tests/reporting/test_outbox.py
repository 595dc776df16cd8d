"""The outbox: taking rows, retry, parking, enqueueing again, fairness, purge."""

from collections import Counter
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from everruns_pipelines.databases.postgres import Connection, PostgresDatabase, transaction
from everruns_pipelines.errors import Refusal
from everruns_pipelines.reporting.backfill import BackfillRequest, enqueue
from everruns_pipelines.reporting.outbox import Finished, Outbox, purge, unpark
from everruns_pipelines.reporting.selection import Failure, leave_out
from everruns_pipelines_tests.reporting.recompute import differences
from everruns_pipelines_tests.reporting.world import (
    MAX_ATTEMPTS,
    World,
    application_enqueues,
    drain_all,
    enqueue_all,
    outbox,
    rows,
    value,
    wait_until,
    waiting,
)

HOUR = timedelta(hours=1)
MALFORMED = "no uuid, but a secret"


def opened(connection: Connection, stack: ExitStack, org_id: int | None = None) -> Outbox:
    return stack.enter_context(Outbox.opened(connection, MAX_ATTEMPTS, org_id))


@contextmanager
def taken(connection: Connection, size: int, org_id: int | None = None) -> Generator[Outbox]:
    """A transaction that holds up to `size` rows."""
    with Outbox.opened(connection, MAX_ATTEMPTS, org_id) as outbox:
        cutoff = outbox.cutoff()
        with transaction(connection):
            outbox.take(size, cutoff)
            yield outbox


def held(connection: Connection) -> set[UUID]:
    """The rows that the connection holds."""
    return {id_ for (id_,) in rows(connection, "SELECT outbox_id FROM pg_temp.selection")}


def status(world: World, outbox_id: UUID) -> str:
    return str(outbox(world.connection, outbox_id, "status")[0])


def failing_row(world: World, **columns: Any) -> UUID:
    return world.enqueue(world.org(), "event", MALFORMED, **columns)


def make_due(connection: Connection) -> None:
    connection.execute("UPDATE reporting_outbox SET next_attempt_at = now()")


def seconds_to_next_attempt(world: World, outbox_id: UUID) -> float:
    return float(
        value(
            world.connection,
            "SELECT extract(epoch FROM next_attempt_at - updated_at)::float"
            " FROM reporting_outbox WHERE id = %s",
            outbox_id,
        )
    )


def index_entries_read(connection: Connection) -> int:
    """Of the outbox, by this connection, those of whole scans of the table included."""
    connection.execute("SELECT pg_stat_force_next_flush()")
    connection.execute("SELECT pg_stat_clear_snapshot()")
    return int(
        value(
            connection,
            "SELECT sum(idx_tup_read) + (SELECT seq_tup_read FROM pg_stat_user_tables"
            " WHERE relname = 'reporting_outbox')"
            " FROM pg_stat_user_indexes WHERE relname = 'reporting_outbox'",
        )
    )


def project_like_upstream(connection: Connection) -> UUID | None:
    """A foreign projector: one row at a time, by the rules of the table alone."""
    row = connection.execute(
        "UPDATE reporting_outbox SET status = 'processing', attempts = attempts + 1,"
        " claimed_at = now(), updated_at = now() WHERE id = ("
        "SELECT id FROM reporting_outbox WHERE status IN ('pending', 'failed')"
        " AND next_attempt_at <= now() ORDER BY next_attempt_at LIMIT 1 FOR UPDATE SKIP LOCKED)"
        " RETURNING id"
    ).fetchone()
    if row is None:
        return None
    with connection.transaction():
        connection.execute(
            "INSERT INTO fact_tool_call (org_id, source_key, session_id, created_at,"
            " time_bucket_day, tool_status, call_count, success_count, error_count, timeout_count,"
            " cancelled_count, duration_ms)"
            " SELECT outbox.org_id, 'event:' || event.id, event.session_id, event.ts,"
            " (event.ts AT TIME ZONE 'UTC')::date, 'error', 1, 0, 0, 0, 0, 0"
            " FROM reporting_outbox AS outbox JOIN events AS event"
            " ON event.id = outbox.source_id::uuid WHERE outbox.id = %s"
            " ON CONFLICT (org_id, source_key) DO UPDATE SET projected_at = now()",
            row,
        )
        connection.execute("UPDATE reporting_outbox SET status = 'completed' WHERE id = %s", row)
    return UUID(str(row[0]))


def project_like_the_release_before(connection: Connection) -> int:
    """Our projector of 0.1.0, by its statements: a claim of its own, then facts and completions."""
    with connection.transaction():
        connection.execute(
            "CREATE TEMPORARY TABLE claimed ON COMMIT PRESERVE ROWS AS"
            " SELECT NULL::uuid AS id, NULL::timestamptz AS next_attempt_at WHERE false"
        )
        connection.execute(
            "WITH due AS (SELECT id FROM reporting_outbox WHERE status IN ('pending', 'failed')"
            " AND next_attempt_at <= now() ORDER BY next_attempt_at LIMIT 5"
            " FOR UPDATE SKIP LOCKED), claimed AS ("
            "UPDATE reporting_outbox SET status = 'processing', attempts = attempts + 1,"
            " claimed_at = now(), updated_at = now() WHERE id = ANY (ARRAY(SELECT id FROM due))"
            " RETURNING id, next_attempt_at)"
            " INSERT INTO pg_temp.claimed SELECT * FROM claimed"
        )
        claimed_at = connection.execute(
            "INSERT INTO everruns_pipelines.outbox_claims (claimed_at, lock_key)"
            " VALUES (now(), 1) RETURNING claimed_at"
        ).fetchone()
        assert claimed_at is not None
    with connection.transaction():
        connection.execute(
            "INSERT INTO fact_tool_call (org_id, source_key, session_id, created_at,"
            " time_bucket_day, tool_status, call_count, success_count, error_count, timeout_count,"
            " cancelled_count, duration_ms)"
            " SELECT outbox.org_id, 'event:' || event.id, event.session_id, event.ts,"
            " (event.ts AT TIME ZONE 'UTC')::date, 'error', 1, 0, 0, 0, 0, 0"
            " FROM pg_temp.claimed JOIN reporting_outbox AS outbox USING (id)"
            " JOIN events AS event ON event.id = outbox.source_id::uuid"
            " ON CONFLICT (org_id, source_key) DO NOTHING"
        )
        finished = connection.execute(
            "UPDATE reporting_outbox AS outbox SET status = CASE"
            " WHEN outbox.next_attempt_at <> claimed.next_attempt_at THEN 'pending'"
            " ELSE 'completed' END, last_error = NULL, updated_at = now() FROM pg_temp.claimed"
            " WHERE outbox.id = claimed.id AND outbox.status = 'processing'"
            " AND outbox.claimed_at = %s",
            claimed_at,
        ).rowcount
        connection.execute(
            "DELETE FROM everruns_pipelines.outbox_claims WHERE claimed_at = %s", claimed_at
        )
        connection.execute("DROP TABLE pg_temp.claimed")
    return finished


# Taking rows.


def test_what_is_due_is_taken_and_nothing_else(world: World) -> None:
    due = {world.tool_call(world.org()), world.tool_call(world.org(), status="failed")}
    for status in ("pending", "failed"):
        world.tool_call(world.org(), status=status, next_attempt_at=datetime.now(UTC) + HOUR)
    for status in ("completed", "processing"):
        world.tool_call(world.org(), status=status)
    before = rows(world.connection, "SELECT xmin, id FROM reporting_outbox ORDER BY id")

    with taken(world.connection, 10):
        assert held(world.connection) == due

    after = rows(world.connection, "SELECT xmin, id FROM reporting_outbox ORDER BY id")
    assert after == before


def test_what_is_enqueued_after_the_cutoff_is_left_to_the_next_drain(world: World) -> None:
    before = world.tool_call(world.org())
    with Outbox.opened(world.connection, MAX_ATTEMPTS) as outbox:
        cutoff = outbox.cutoff()
        after = world.tool_call(world.org())
        with transaction(world.connection):
            assert outbox.take(10, cutoff).rows == 1
            assert held(world.connection) == {before}
        with transaction(world.connection):
            assert outbox.take(10, outbox.cutoff()).rows == 2
            assert held(world.connection) == {before, after}


def test_rows_that_somebody_let_go_of_are_found_by_the_same_drain(world: World) -> None:
    org = world.org()
    now = datetime.now(UTC)
    first, second, third = (
        world.tool_call(org, next_attempt_at=now - hours * HOUR) for hours in (3, 2, 1)
    )
    seen: list[set[UUID]] = []

    with Outbox.opened(world.connection, MAX_ATTEMPTS) as outbox:
        cutoff = outbox.cutoff()
        for size in (2, 2, 3):
            with transaction(world.connection):  # nothing is completed
                outbox.take(size, cutoff)
                seen.append(held(world.connection))

    assert seen == [{first, second}, {second, third}, {first, second, third}]


def test_rows_that_somebody_holds_are_skipped_not_waited_for(
    world: World, postgres: PostgresDatabase
) -> None:
    org = world.org()
    theirs, ours = world.tool_call(org), world.tool_call(org)
    world.connection.execute("SET lock_timeout = '5s'")
    with postgres.connect() as other, other.transaction():
        other.execute("SELECT FROM reporting_outbox WHERE id = %s FOR UPDATE", [theirs])
        with taken(world.connection, 10):
            assert held(world.connection) == {ours}


def test_a_foreign_projector_beside_ours_and_every_row_is_completed_once(
    world: World, postgres: PostgresDatabase
) -> None:
    org = world.org()
    session = world.session(org)
    ids = [world.enqueue(org, "event", world.event(session)) for _ in range(60)]
    world.enqueue(org, "session", session, next_attempt_at="infinity")

    def project_foreign() -> list[UUID]:
        with postgres.connect() as connection:
            return list(iter(lambda: project_like_upstream(connection), None))

    with ThreadPoolExecutor(1) as executor:
        foreign = executor.submit(project_foreign)
        ours = drain_all(world.connection, batch_size=3)
        by_foreign = foreign.result(60)

    done = rows(
        world.connection,
        "SELECT attempts, count(*) FROM reporting_outbox WHERE status = 'completed' GROUP BY 1",
    )
    assert done == [(1, len(ids))]
    assert ours.completed + len(by_foreign) == len(ids)
    assert value(world.connection, "SELECT count(*) FROM fact_tool_call") == len(ids)


def test_the_release_before_beside_ours_and_every_row_is_completed_once(
    world: World, postgres: PostgresDatabase
) -> None:
    org = world.org()
    session = world.session(org)
    count = 60
    for _ in range(count):
        world.enqueue(org, "event", world.event(session))

    def project_before() -> int:
        with postgres.connect() as connection:
            return sum(iter(lambda: project_like_the_release_before(connection), 0))

    with ThreadPoolExecutor(1) as executor:
        before = executor.submit(project_before)
        ours = drain_all(world.connection, batch_size=3)
        completed = ours.completed + before.result(60)

    done = rows(
        world.connection, "SELECT status, attempts, count(*) FROM reporting_outbox GROUP BY 1, 2"
    )
    assert done == [("completed", 1, count)]
    assert completed == count
    assert value(world.connection, "SELECT count(*) FROM fact_tool_call") == count


def test_taking_is_fair_so_that_no_tenant_waits_behind_anothers_many_rows(world: World) -> None:
    big, small = world.org(), [world.org() for _ in range(3)]
    session = world.session(big)
    for _ in range(50):
        world.enqueue(big, "event", world.event(session), next_attempt_at=datetime.now(UTC) - HOUR)
    for org in small:
        for _ in range(2):
            world.tool_call(org)

    with taken(world.connection, 20):
        orgs = Counter(
            org for (org,) in rows(world.connection, "SELECT org_id FROM pg_temp.selection")
        )

    assert orgs == {big: 14, **dict.fromkeys(small, 2)}


def test_what_others_hold_leaves_nothing_of_other_tenants_behind(
    world: World, postgres: PostgresDatabase
) -> None:
    for number in range(6):
        due = datetime.now(UTC) - HOUR + timedelta(minutes=number)
        world.tool_call(world.org(), next_attempt_at=due)
    with postgres.connect() as other, taken(other, 2):
        assert drain_all(world.connection, batch_size=2).completed == 4


def test_a_batch_is_not_filled_row_by_row_where_others_hold_most(
    world: World, postgres: PostgresDatabase
) -> None:
    many = world.org()
    for _ in range(9):
        world.tool_call(world.org())
    with postgres.connect() as other, taken(other, 9):
        session = world.session(many)
        for _ in range(50):
            world.enqueue(many, "event", world.event(session))
        with taken(world.connection, 20):
            assert 0 < len(held(world.connection)) < 20
        assert drain_all(world.connection, batch_size=20).completed == 50


def test_taking_reads_what_it_takes_however_many_rows_another_tenant_has_waiting(
    world: World,
) -> None:
    big, *_, small = [world.org() for _ in range(50)]
    world.connection.execute(
        "INSERT INTO reporting_outbox (org_id, source_type, source_id, reason, next_attempt_at)"
        " SELECT %s, 'event', uuidv7()::text, 'event_projection', now() - interval '1 day'"
        " FROM generate_series(1, 20000)",
        [big],
    )
    world.tool_call(small)
    world.connection.execute("ANALYZE reporting_outbox")

    before = index_entries_read(world.connection)
    with taken(world.connection, 100):
        assert len(held(world.connection)) == 100
    read = index_entries_read(world.connection) - before

    assert read < 2_000


def test_finishing_reads_its_batch_and_not_the_whole_queue(world: World) -> None:
    org = world.org()
    world.connection.execute(
        "INSERT INTO reporting_outbox (org_id, source_type, source_id, reason)"
        " SELECT %s, 'event', uuidv7()::text, 'event_projection' FROM generate_series(1, 20000)",
        [org],
    )
    world.connection.execute("ANALYZE reporting_outbox")

    with taken(world.connection, 1_000) as outbox:
        before = index_entries_read(world.connection)
        finished = outbox.finish(1_000, of_sessions=False)
    read = index_entries_read(world.connection) - before

    assert finished == Finished(1_000, 0, 0)
    assert read < 2_000


def test_of_more_organizations_than_a_batch_holds_the_oldest_rows_come_first(world: World) -> None:
    now = datetime.now(UTC)
    ids = [
        world.tool_call(world.org(), next_attempt_at=now - timedelta(minutes=number))
        for number in (3, 5, 1, 4, 2)
    ]
    order: list[set[UUID]] = []

    for _ in range(3):
        with taken(world.connection, 2) as outbox:
            order.append(held(world.connection))
            outbox.finish(2, of_sessions=False)

    assert order == [{ids[1], ids[3]}, {ids[0], ids[4]}, {ids[2]}]


def test_within_an_organization_the_oldest_rows_come_first_whatever_their_status(
    world: World,
) -> None:
    org, now = world.org(), datetime.now(UTC)
    ids = [
        world.tool_call(org, status=status, next_attempt_at=now - timedelta(minutes=minutes))
        for status, minutes in (("pending", 1), ("failed", 4), ("pending", 3), ("failed", 2))
    ]

    with taken(world.connection, 2):
        assert held(world.connection) == {ids[1], ids[2]}


def test_what_is_taken_for_one_organization_is_no_other_ones(world: World) -> None:
    ours, theirs = world.org(), world.org()
    for org in (ours, theirs):
        world.tool_call(org)

    drained = drain_all(world.connection, org_id=ours)

    assert drained.result() == {"claimed": 1, "completed": 1, "failed": 0, "parked": 0}
    left = rows(world.connection, "SELECT org_id FROM reporting_outbox WHERE status = 'pending'")
    assert left == [(theirs,)]


# Rows of foreign projectors that died, and of earlier releases.


@pytest.mark.parametrize("told_by", ["claimed_at", "updated_at"])
def test_a_row_that_is_processing_for_over_15_minutes_is_pending_again(
    world: World, told_by: str
) -> None:
    """One that does not say when it was claimed was claimed when it last changed."""
    now = datetime.now(UTC)
    stale, working = (
        world.tool_call(
            world.org(), status="processing", attempts=MAX_ATTEMPTS, **{told_by: now - age}
        )
        for age in (timedelta(minutes=15, seconds=1), timedelta(minutes=14))
    )

    drained = drain_all(world.connection)

    assert drained.completed == 1
    assert outbox(world.connection, stale, "status", "attempts") == ("completed", MAX_ATTEMPTS)
    assert status(world, working) == "processing"


def test_the_death_of_a_foreign_projector_is_no_failure_of_the_rows_that_it_held(
    world: World,
) -> None:
    id_ = failing_row(
        world,
        status="processing",
        attempts=MAX_ATTEMPTS - 1,
        last_error="it was so",
        claimed_at=datetime.now(UTC) - HOUR,
    )

    drained = drain_all(world.connection)

    assert (drained.failed, drained.parked) == (1, 0)
    assert outbox(world.connection, id_, "status", "attempts") == ("failed", MAX_ATTEMPTS - 1)


def test_stale_rows_that_another_projector_is_returning_are_returned_once(
    world: World, postgres: PostgresDatabase
) -> None:
    long_ago = datetime.now(UTC) - HOUR
    id_ = world.tool_call(world.org(), status="processing", attempts=1, claimed_at=long_ago)
    with postgres.connect() as upstream:
        with upstream.transaction():
            upstream.execute(
                "UPDATE reporting_outbox SET attempts = 2, claimed_at = now() WHERE id = %s", [id_]
            )
            assert drain_all(world.connection).claimed == 0
        assert drain_all(world.connection).claimed == 0

    assert outbox(world.connection, id_, "status", "attempts") == ("processing", 2)


def test_attempts_that_succeeded_before_a_backfill_do_not_count_towards_parking(
    world: World,
) -> None:
    connection = world.connection
    world.session(world.org())
    for _ in range(MAX_ATTEMPTS + 1):
        connection.execute("UPDATE sessions SET total_input_tokens = total_input_tokens + 1")
        assert enqueue(connection, BackfillRequest())["sessions"] == 1
        assert drain_all(connection).completed == 1

    assert rows(connection, "SELECT status, attempts FROM reporting_outbox") == [("completed", 1)]
    assert differences(connection) == []


def test_attempts_that_succeeded_before_an_enqueue_do_not_count_towards_parking(
    world: World,
) -> None:
    connection = world.connection
    id_ = world.tool_call(world.org())
    for _ in range(MAX_ATTEMPTS + 1):
        connection.execute(
            "UPDATE reporting_outbox SET status = 'pending', next_attempt_at = now()"
        )
        assert drain_all(connection).completed == 1
    connection.execute("ALTER TABLE fact_tool_call ADD CHECK (call_count <> 1) NOT VALID")

    for attempts in (1, 2):
        connection.execute(
            "UPDATE reporting_outbox SET next_attempt_at = now(),"
            " status = CASE status WHEN 'completed' THEN 'pending' ELSE status END"
        )
        connection.execute("DELETE FROM fact_tool_call")
        assert drain_all(connection).result()["parked"] == 0
        assert outbox(connection, id_, "status", "attempts") == ("failed", attempts)


# Failure.


@pytest.mark.parametrize(
    ("attempts", "seconds"),
    [(1, 60), (2, 120), (3, 240), (4, 480), (5, 960), (6, 1920), (7, 3600), (8, 3600), (11, 3600)],
)
def test_a_failure_waits_longer_each_time(world: World, attempts: int, seconds: int) -> None:
    last_error = "why" if attempts > 1 else None
    id_ = failing_row(world, attempts=attempts - 1, last_error=last_error)

    drained = drain_all(world.connection)

    assert drained.result() == {"claimed": 1, "completed": 0, "failed": 1, "parked": 0}
    assert outbox(world.connection, id_, "status", "attempts") == ("failed", attempts)
    assert seconds_to_next_attempt(world, id_) == seconds


def test_a_row_is_parked_after_the_last_attempt(world: World) -> None:
    id_ = failing_row(world)
    attempts = 0
    while not (drained := drain_all(world.connection, max_attempts=3)).parked:
        attempts += drained.claimed
        make_due(world.connection)

    assert attempts + drained.claimed == 3
    assert drained.result() == {"claimed": 1, "completed": 0, "failed": 1, "parked": 1}
    assert outbox(world.connection, id_, "status", "attempts") == ("failed", 3)
    assert value(world.connection, "SELECT next_attempt_at = 'infinity' FROM reporting_outbox")
    assert drain_all(world.connection).claimed == 0


def test_an_enqueue_by_the_application_unparks_a_row_for_one_attempt(world: World) -> None:
    id_ = failing_row(
        world,
        status="failed",
        attempts=MAX_ATTEMPTS,
        next_attempt_at="infinity",
        last_error="it was so",
    )
    assert drain_all(world.connection).claimed == 0

    application_enqueues(world.connection, id_)

    assert drain_all(world.connection).result()["parked"] == 1
    assert outbox(world.connection, id_, "status", "attempts") == ("failed", MAX_ATTEMPTS + 1)
    assert value(world.connection, "SELECT next_attempt_at = 'infinity' FROM reporting_outbox")


def test_an_unparked_row_that_succeeds_is_completed_and_its_error_forgotten(world: World) -> None:
    id_ = world.tool_call(
        world.org(),
        status="failed",
        attempts=MAX_ATTEMPTS,
        next_attempt_at="infinity",
        last_error="it was so",
    )
    application_enqueues(world.connection, id_)

    drain_all(world.connection)

    assert outbox(world.connection, id_, "status", "last_error") == ("completed", None)


def test_a_source_id_that_is_no_uuid_fails_and_its_error_holds_no_payload(world: World) -> None:
    org = world.org()
    failing = [
        world.enqueue(org, source_type, f"{MALFORMED} {source_type}")
        for source_type in ("event", "session", "llm_generation", "usage_ledger")
    ]
    fine = world.tool_call(org)

    drain_all(world.connection)

    for id_ in failing:
        failed = outbox(world.connection, id_, "status", "last_error")
        assert failed == ("failed", "the source id is no UUID")
    assert status(world, fine) == "completed"


def test_last_error_holds_2000_characters_at_most(world: World) -> None:
    id_ = world.tool_call(world.org())
    [(org, source)] = rows(world.connection, "SELECT org_id, source_id FROM reporting_outbox")
    with taken(world.connection, 1) as held_outbox:
        leave_out(world.connection, [Failure(org, source, "x" * 5_000)], 0, 2**31 - 1)
        held_outbox.finish(1, of_sessions=False)

    assert outbox(world.connection, id_, "last_error") == ("x" * 2_000,)


def test_unparking_gives_rows_one_more_attempt_and_tells_how_many(world: World) -> None:
    ours, theirs = world.org(), world.org()
    parked: dict[str, Any] = {
        "status": "failed",
        "attempts": MAX_ATTEMPTS,
        "next_attempt_at": "infinity",
        "last_error": "it was so",
    }
    mended = world.tool_call(ours, **parked)
    broken = world.enqueue(ours, "session", MALFORMED, **parked)
    elsewhere = world.tool_call(theirs, **parked)
    later = world.tool_call(ours, status="failed", next_attempt_at=datetime.now(UTC) + HOUR)
    connection = world.connection

    counts = unpark(connection, ours, None, dry_run=True)
    assert counts["unparked"] == 2
    assert drain_all(connection).claimed == 0
    assert unpark(connection, ours, "session", dry_run=True) == {
        "unparked": 1,
        "events": 0,
        "llm_generations": 0,
        "sessions": 1,
        "usage_ledger": 0,
    }

    assert unpark(connection, ours, None, dry_run=False) == counts
    assert drain_all(connection).result() == {
        "claimed": 2,
        "completed": 1,
        "failed": 1,
        "parked": 1,
    }
    assert [status(world, id_) for id_ in (mended, broken, elsewhere, later)] == [
        "completed",
        "failed",
        "failed",
        "failed",
    ]
    assert unpark(connection, None, "event", dry_run=True)["unparked"] == 1


@pytest.mark.parametrize(
    ("field", "org_id", "source_type"), [("org_id", 4_711, None), ("source_type", None, "events")]
)
def test_unparking_what_does_not_exist_is_refused(
    world: World, field: str, org_id: int | None, source_type: str | None
) -> None:
    with pytest.raises(Refusal) as refused:
        unpark(world.connection, org_id, source_type, dry_run=False)

    assert refused.value.errors[0].loc == (field,)


# What completes as a no-op.


def test_unknown_types_vanished_sources_and_another_orgs_sources_complete_as_no_ops(
    world: World,
) -> None:
    org, other = world.org(), world.org()
    session = world.session(other)
    ids = [
        world.enqueue(org, "unknown", MALFORMED),
        world.enqueue(org, "unknown", uuid4()),
        *(world.enqueue(org, t, uuid4()) for t in ("event", "session", "llm_generation")),
        world.enqueue(org, "usage_ledger", uuid4()),
        world.enqueue(org, "event", world.event(session)),
        world.enqueue(org, "event", world.event(session, "input.message")),
        world.enqueue(org, "session", session),
        world.enqueue(org, "llm_generation", world.generation(other, session)),
        world.enqueue(org, "usage_ledger", world.posting(other, session)),
    ]

    drained = drain_all(world.connection)

    assert drained.result() == {
        "claimed": len(ids),
        "completed": len(ids),
        "failed": 0,
        "parked": 0,
    }
    assert drained.outcome.counts == {}
    assert value(world.connection, "SELECT count(*) FROM fact_session") == 0


# Enqueueing again.


@pytest.mark.parametrize(("source", "afterwards"), [("good", "pending"), ("bad", "failed")])
def test_a_row_enqueued_again_while_a_batch_holds_it_is_due_again(
    world: World, postgres: PostgresDatabase, source: str, afterwards: str
) -> None:
    id_ = world.tool_call(world.org()) if source == "good" else failing_row(world)
    with postgres.connect() as application, ThreadPoolExecutor(1) as pool:
        with taken(world.connection, 10) as held_outbox:
            enqueueing = pool.submit(application_enqueues, application, id_)
            with postgres.connect() as watcher:
                wait_until(lambda: waiting(watcher), "the application to wait for the batch")
            held_outbox.finish(1, of_sessions=False)
        enqueueing.result(30)

    assert status(world, id_) == afterwards
    assert value(world.connection, "SELECT next_attempt_at <= now() FROM reporting_outbox")


def test_a_change_during_a_batch_is_projected_afterwards(
    world: World, postgres: PostgresDatabase
) -> None:
    """The source changes, and is enqueued again, while the batch waits for what somebody holds."""
    org = world.org()
    session = world.session(org)
    id_ = world.enqueue(org, "session", session)
    drain_all(world.connection)
    with postgres.connect() as blocker, postgres.connect() as ours, ThreadPoolExecutor(1) as pool:
        world.connection.execute("UPDATE sessions SET total_input_tokens = 1")
        application_enqueues(world.connection, id_)
        with blocker.transaction():
            blocker.execute("SELECT FROM fact_session FOR UPDATE")
            draining = pool.submit(drain_all, ours, max_rows=1)
            wait_until(lambda: waiting(world.connection), "the batch to write")
            world.connection.execute("UPDATE sessions SET total_input_tokens = 2")
            application_enqueues(world.connection, id_)
        draining.result(30)
    assert status(world, id_) == "pending"

    drain_all(world.connection)

    assert status(world, id_) == "completed"
    assert differences(world.connection) == []


def test_a_generation_is_projected_under_whatever_version_it_was_enqueued(world: World) -> None:
    org = world.org()
    late = world.generation(org, output_tokens=7)
    world.enqueue(org, "llm_generation", late, f"{late}:late_usage")

    drain_all(world.connection)

    assert rows(world.connection, "SELECT output_tokens FROM fact_llm_generation") == [(7,)]
    assert rows(world.connection, "SELECT status FROM reporting_outbox") == [("completed",)]


def test_completed_rows_that_are_enqueued_again_are_projected_again(world: World) -> None:
    id_ = world.tool_call(world.org())
    enqueue_all(world.connection)
    drain_all(world.connection)
    world.connection.execute("DELETE FROM fact_tool_call")

    application_enqueues(world.connection, id_)
    drain_all(world.connection)

    assert outbox(world.connection, id_, "status", "attempts") == ("completed", 2)
    assert differences(world.connection) == []


# Purge.


def test_purge_removes_completed_rows_older_than_the_age_and_no_others(world: World) -> None:
    now = datetime.now(UTC)
    org = world.org()

    def row(status: str, age: timedelta) -> UUID:
        when = now - age
        return world.enqueue(
            org, "event", uuid4(), status=status, next_attempt_at=when, updated_at=when
        )

    for _ in range(3):
        row("completed", timedelta(days=8))
    kept = {row("completed", timedelta(days=6))}
    kept |= {row(status, timedelta(days=8)) for status in ("pending", "processing", "failed")}

    assert purge(world.connection, timedelta(days=7)) == 3

    assert {id_ for (id_,) in rows(world.connection, "SELECT id FROM reporting_outbox")} == kept
