"""The outbox: claim, lease, retry, parking, fencing, fairness, purge."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from everruns_pipelines.databases.postgres import Connection, PostgresDatabase, transaction
from everruns_pipelines.reporting.backfill import BackfillRequest, enqueue
from everruns_pipelines.reporting.catalog import EVENT
from everruns_pipelines.reporting.outbox import Claim, Finished, Outbox, purge
from everruns_pipelines.reporting.projector import Failure
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


def opened(connection: Connection, stack: ExitStack) -> Outbox:
    return stack.enter_context(Outbox.opened(connection, MAX_ATTEMPTS))


def finish(held: Outbox, claim: Claim) -> Finished:
    others = held.finish(claim, of_sessions=False)
    sessions = held.finish(claim, of_sessions=True)
    held.forget(claim)
    return Finished(
        others.completed + sessions.completed,
        others.failed + sessions.failed,
        others.parked + sessions.parked,
    )


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


# Claim.


def test_a_claim_takes_due_rows_makes_them_processing_and_counts_the_attempt(world: World) -> None:
    pending, failed = world.tool_call(world.org()), world.tool_call(world.org(), status="failed")
    later = [
        world.tool_call(world.org(), status=status, next_attempt_at=datetime.now(UTC) + HOUR)
        for status in ("pending", "failed")
    ]
    done = [world.tool_call(world.org(), status=status) for status in ("completed", "processing")]
    untouched = [outbox(world.connection, id_, "xmin") for id_ in (*later, *done)]

    with ExitStack() as stack:
        claim = opened(world.connection, stack).claim(10)

        assert claim is not None
        assert claim.size == 2
        for id_ in (pending, failed):
            claimed = outbox(world.connection, id_, "status", "attempts", "claimed_at")
            assert claimed == ("processing", 1, claim.claimed_at)
        assert [outbox(world.connection, id_, "xmin") for id_ in (*later, *done)] == untouched


def test_what_is_claimed_is_claimed_by_nobody_else(
    world: World, postgres: PostgresDatabase
) -> None:
    world.tool_call(world.org())
    with postgres.connect() as other, ExitStack() as stack:
        assert opened(world.connection, stack).claim(10) is not None
        assert opened(other, stack).claim(10) is None


def test_rows_that_somebody_else_is_claiming_are_skipped_not_waited_for(
    world: World, postgres: PostgresDatabase
) -> None:
    org = world.org()
    theirs, ours = world.tool_call(org), world.tool_call(org)
    with postgres.connect() as other, other.transaction():
        other.execute("SELECT FROM reporting_outbox WHERE id = %s FOR UPDATE", [theirs])
        with ExitStack() as stack:
            claim = opened(world.connection, stack).claim(10)
            assert claim is not None
            assert claim.size == 1
            assert status(world, ours) == "processing"
            assert status(world, theirs) == "pending"
            world.connection.execute("SET lock_timeout = '5s'")


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


def test_claiming_is_fair_so_that_no_tenant_waits_behind_anothers_many_rows(world: World) -> None:
    big, small = world.org(), [world.org() for _ in range(3)]
    session = world.session(big)
    for _ in range(50):
        world.enqueue(big, "event", world.event(session), next_attempt_at=datetime.now(UTC) - HOUR)
    for org in small:
        for _ in range(2):
            world.tool_call(org)

    with ExitStack() as stack:
        claim = opened(world.connection, stack).claim(20)

    assert claim is not None
    assert claim.size == 20
    claimed = Counter(
        org
        for (org,) in rows(
            world.connection, "SELECT org_id FROM reporting_outbox WHERE claimed_at IS NOT NULL"
        )
    )
    assert claimed == {big: 14, **dict.fromkeys(small, 2)}


def test_a_claim_reads_what_it_takes_however_many_rows_another_tenant_has_waiting(
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

    with ExitStack() as stack:
        held = opened(world.connection, stack)
        before = index_entries_read(world.connection)
        claim = held.claim(100)
        read = index_entries_read(world.connection) - before

    assert claim is not None
    assert claim.size == 100
    assert read < 2_000


def test_a_claim_in_the_same_microsecond_as_anothers_is_made_again(
    world: World, postgres: PostgresDatabase
) -> None:
    world.tool_call(world.org())
    claimed_at = "timestamptz '2026-01-01 00:00:00Z'"
    world.connection.execute(
        f"INSERT INTO everruns_pipelines.outbox_claims VALUES ({claimed_at}, 1);"
        "CREATE SEQUENCE claims;"
        "CREATE FUNCTION collide() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF nextval('claims') = 1 THEN NEW.claimed_at := {claimed_at}; END IF;"
        " RETURN NEW; END $$;"
        "CREATE TRIGGER collide BEFORE INSERT ON everruns_pipelines.outbox_claims"
        " FOR EACH ROW EXECUTE FUNCTION collide()"
    )

    with postgres.connect() as other, ExitStack() as stack:
        other.execute("SELECT pg_advisory_lock(1)")  # whoever made the other claim is alive
        claim = opened(world.connection, stack).claim(10)

    assert claim is not None
    assert claim.size == 1
    assert value(world.connection, "SELECT last_value FROM claims") == 2


def test_finishing_reads_its_batch_and_not_the_whole_queue(world: World) -> None:
    org = world.org()
    world.connection.execute(
        "INSERT INTO reporting_outbox (org_id, source_type, source_id, reason)"
        " SELECT %s, 'event', uuidv7()::text, 'event_projection' FROM generate_series(1, 20000)",
        [org],
    )
    world.connection.execute("ANALYZE reporting_outbox")

    with ExitStack() as stack:
        held = opened(world.connection, stack)
        claim = held.claim(1_000)
        assert claim is not None
        with transaction(world.connection):
            before = index_entries_read(world.connection)
            finished = held.finish(claim, of_sessions=False)
        read = index_entries_read(world.connection) - before

    assert finished == Finished(1_000, 0, 0)
    assert read < 10_000


def test_of_more_organizations_than_a_batch_holds_the_oldest_rows_come_first(world: World) -> None:
    now = datetime.now(UTC)
    ids = [
        world.tool_call(world.org(), next_attempt_at=now - timedelta(minutes=number))
        for number in (3, 5, 1, 4, 2)
    ]
    order: list[UUID] = []

    with ExitStack() as stack:
        held = opened(world.connection, stack)
        while claim := held.claim(2):
            taken = rows(
                world.connection,
                "SELECT id FROM reporting_outbox WHERE claimed_at = %s ORDER BY next_attempt_at",
                claim.claimed_at,
            )
            order += [id_ for (id_,) in taken]

    assert order == [ids[number] for number in (1, 3, 0, 4, 2)]


def test_within_an_organization_the_oldest_rows_come_first_whatever_their_status(
    world: World,
) -> None:
    org, now = world.org(), datetime.now(UTC)
    ids = [
        world.tool_call(org, status=status, next_attempt_at=now - timedelta(minutes=minutes))
        for status, minutes in (("pending", 1), ("failed", 4), ("pending", 3), ("failed", 2))
    ]

    with ExitStack() as stack:
        assert opened(world.connection, stack).claim(2) is not None

    assert [status(world, id_) for id_ in ids] == ["pending", "processing", "processing", "failed"]


def test_a_claim_for_one_organization_takes_no_other_ones_rows(world: World) -> None:
    ours, theirs = world.org(), world.org()
    for org in (ours, theirs):
        world.tool_call(org)

    drained = drain_all(world.connection, org_id=ours)

    assert drained.result() == {"claimed": 1, "completed": 1, "failed": 0, "parked": 0}
    left = rows(world.connection, "SELECT org_id FROM reporting_outbox WHERE status = 'pending'")
    assert left == [(theirs,)]


# Lost claims.


def test_a_row_that_is_processing_for_over_15_minutes_is_pending_again(world: World) -> None:
    now = datetime.now(UTC)
    stale, working = (
        world.tool_call(world.org(), status="processing", attempts=1, claimed_at=now - age)
        for age in (timedelta(minutes=15, seconds=1), timedelta(minutes=14))
    )

    drained = drain_all(world.connection)

    assert drained.completed == 1
    assert outbox(world.connection, stale, "status", "attempts") == ("completed", 2)
    assert outbox(world.connection, working, "status", "attempts") == ("processing", 1)


def test_a_row_that_is_processing_since_nobody_knows_when_is_pending_after_its_last_change(
    world: World,
) -> None:
    now = datetime.now(UTC)
    stale, working = (
        world.tool_call(
            world.org(), status="processing", attempts=MAX_ATTEMPTS, updated_at=now - age
        )
        for age in (timedelta(minutes=15, seconds=1), timedelta(minutes=14))
    )

    drained = drain_all(world.connection)

    assert drained.completed == 1
    assert status(world, stale) == "completed"
    assert status(world, working) == "processing"


def test_the_rows_of_a_projector_that_died_return_at_once(
    world: World, postgres: PostgresDatabase
) -> None:
    id_ = world.tool_call(world.org())
    with postgres.connect() as dying, ExitStack() as stack:
        claim = opened(dying, stack).claim(10)
        assert claim is not None
        assert drain_all(world.connection).claimed == 0
        world.connection.execute("SELECT pg_terminate_backend(%s)", [dying.info.backend_pid])
        with pytest.raises(psycopg.OperationalError):
            dying.execute("SELECT")

    assert drain_all(world.connection).completed == 1
    assert outbox(world.connection, id_, "status", "attempts") == ("completed", 2)
    assert value(world.connection, "SELECT count(*) FROM everruns_pipelines.outbox_claims") == 0


def test_a_row_whose_projectors_keep_dying_is_parked_and_blames_no_row(world: World) -> None:
    long_ago = datetime.now(UTC) - HOUR
    id_ = world.tool_call(
        world.org(), status="processing", attempts=MAX_ATTEMPTS, claimed_at=long_ago
    )
    world.connection.execute("UPDATE reporting_outbox SET next_attempt_at = %s", [long_ago - HOUR])

    assert drain_all(world.connection).claimed == 0

    parked = outbox(world.connection, id_, "status", "last_error")
    assert parked == ("failed", "its projector died while working on it")
    assert value(world.connection, "SELECT next_attempt_at = 'infinity' FROM reporting_outbox")


def test_attempts_that_succeeded_before_a_backfill_do_not_count_towards_parking(
    world: World, postgres: PostgresDatabase
) -> None:
    connection = world.connection
    world.session(world.org())
    for _ in range(MAX_ATTEMPTS):
        connection.execute("UPDATE sessions SET total_input_tokens = total_input_tokens + 1")
        assert enqueue(connection, BackfillRequest())["sessions"] == 1
        assert drain_all(connection).completed == 1
    connection.execute("UPDATE sessions SET total_input_tokens = total_input_tokens + 1")
    enqueue(connection, BackfillRequest())
    with postgres.connect() as dying, ExitStack() as stack:
        assert opened(dying, stack).claim(10) is not None
        dying.close()

    wait_until(lambda: drain_all(connection).completed == 1, "the row to be returned")

    assert rows(connection, "SELECT status, attempts FROM reporting_outbox") == [("completed", 2)]
    assert differences(connection) == []


def test_a_row_that_was_enqueued_again_before_its_projector_died_gets_its_one_attempt(
    world: World,
) -> None:
    id_ = world.tool_call(
        world.org(),
        status="processing",
        attempts=MAX_ATTEMPTS,
        claimed_at=datetime.now(UTC) - HOUR,
    )
    application_enqueues(world.connection, id_)

    assert drain_all(world.connection).completed == 1
    assert status(world, id_) == "completed"


# Failure.


@pytest.mark.parametrize(
    ("attempts", "seconds"),
    [(1, 60), (2, 120), (3, 240), (4, 480), (5, 960), (6, 1920), (7, 3600), (8, 3600), (11, 3600)],
)
def test_a_failure_waits_longer_each_time(world: World, attempts: int, seconds: int) -> None:
    id_ = failing_row(world, attempts=attempts - 1)

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
    id_ = failing_row(world, status="failed", attempts=MAX_ATTEMPTS, next_attempt_at="infinity")
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
    with ExitStack() as stack:
        held = opened(world.connection, stack)
        claim = held.claim(1)
        assert claim is not None
        with transaction(world.connection):
            held.fail(EVENT, [Failure(org, source, "x" * 5_000)])
            finish(held, claim)

    assert outbox(world.connection, id_, "last_error") == ("x" * 2_000,)


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


# Fencing and re-enqueueing.


def test_a_worker_that_lost_its_claim_completes_nothing(
    world: World, postgres: PostgresDatabase
) -> None:
    lost, kept = (world.tool_call(world.org()) for _ in range(2))
    with postgres.connect() as other, ExitStack() as stack:
        slow = opened(world.connection, stack)
        claim = slow.claim(10)
        assert claim is not None
        with transaction(world.connection):
            other.execute(
                "UPDATE reporting_outbox SET claimed_at = claimed_at - interval '16 minutes'"
                " WHERE id = %s",
                [lost],
            )
            taken_over = opened(other, stack).claim(10)
            assert taken_over is not None
            finished = finish(slow, claim)

        assert finished == Finished(completed=1, failed=0, parked=0)
        assert status(world, kept) == "completed"
        now_held = outbox(world.connection, lost, "status", "claimed_at", "attempts")
        assert now_held == ("processing", taken_over.claimed_at, 2)


@pytest.mark.parametrize("source", ["good", "bad"])
def test_a_row_enqueued_again_while_it_is_processing_is_pending_again(
    world: World, postgres: PostgresDatabase, source: str
) -> None:
    id_ = world.tool_call(world.org()) if source == "good" else failing_row(world)
    with postgres.connect() as application, ExitStack() as stack:
        held = opened(world.connection, stack)
        claim = held.claim(10)
        assert claim is not None
        with transaction(world.connection):
            application_enqueues(application, id_)
            assert finish(held, claim) == Finished(completed=0, failed=0, parked=0)

    assert status(world, id_) == "pending"
    assert value(world.connection, "SELECT next_attempt_at <= now() FROM reporting_outbox")


def test_a_change_during_a_batch_is_projected_afterwards(
    world: World, postgres: PostgresDatabase
) -> None:
    """The source changes and is enqueued again after the batch has read it."""
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
        assert draining.result(30).claimed == 1
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


# Release and purge.


def test_released_rows_are_due_as_if_they_had_not_been_claimed(world: World) -> None:
    id_ = world.tool_call(world.org(), attempts=3)
    before = outbox(world.connection, id_, "status", "attempts", "next_attempt_at")
    with ExitStack() as stack:
        held = opened(world.connection, stack)
        claim = held.claim(10)
        assert claim is not None
        held.release(claim)

    assert outbox(world.connection, id_, "status", "attempts", "next_attempt_at") == before
    assert value(world.connection, "SELECT count(*) FROM everruns_pipelines.outbox_claims") == 0


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
