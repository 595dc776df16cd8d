"""Rebuilds from a server over HTTP, which refuses, stalls, or cuts its answer in the middle."""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from dagster import DagsterInstance

from everruns_pipelines.databases.clickhouse import ClickHouseDatabase, ClickHouseFailure
from everruns_pipelines.errors import Refusal
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.databases.http_engine import Fault, HttpEngine, serving
from everruns_pipelines_tests.items.world import Span, World, envelope, key
from everruns_pipelines_tests.operations.test_alerts import Watch


@pytest.fixture
def server(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpEngine]:
    monkeypatch.setattr("everruns_pipelines.databases.clickhouse.PAUSES", (0.0, 0.0))
    with serving(world.clickhouse) as server:
        yield server


def _over_http(world: World, server: HttpEngine, **environment: str) -> World:
    settings = world.clickhouse.settings.model_dump(by_alias=True, exclude_none=True)
    settings |= {"EVERRUNS_CLICKHOUSE_DSN": server.dsn, **environment}
    remote = ClickHouseDatabase(Settings.model_validate(settings))
    return World(world.postgres, remote, world.connection)


def test_a_rebuild_over_http_is_the_same_rebuild(world: World) -> None:
    world.add(
        Span([envelope("one", data={"text": "it's\ta \\ 'tab'\n\x08\x0c\r\x0b \u2028 😀"})]),
        Span([envelope("run")], name="run", trace="run", session=None, run="run 'x'"),
    )
    runs = ("run 'x'", *(str(number) for number in range(2000)))
    with serving(world.clickhouse) as server:
        assert _over_http(world, server).rebuild(run_ids=runs).inserted == 2
    before = world.items()
    assert world.rebuild(run_ids=("run 'x'",)).unchanged == 2
    assert world.items() == before


@pytest.mark.parametrize(
    "fault", ["hang up", "cut", "error", "error in the middle", "no length", "stall", "stranger"]
)
def test_one_fault_is_survived(
    world: World, server: HttpEngine, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.add(Span([envelope("one"), envelope("two")], name="a"), Span([envelope("three")]))
    remote = _over_http(world, server)
    if fault == "stall":
        monkeypatch.setattr("everruns_pipelines.databases.clickhouse.STALL_TIMEOUT", 3)
    server.faults = [fault]
    assert remote.rebuild().inserted == 3
    assert server.faults == []


@pytest.mark.parametrize(
    ("faulty", "fault"),
    [
        ("currentDatabase", "no length"),
        ("currentDatabase", "stranger"),
        ("system.columns", "stranger"),
        ("system.tables", "stranger"),
        ("system.data_skipping_indices", "stranger"),
        ("GROUP BY TraceId", "stranger"),
        ("system.columns", "error in the middle"),
        ("system.data_skipping_indices", "no length"),
        ("GROUP BY TraceId", "error in the middle"),
        ("GROUP BY TraceId", "no length"),
    ],
)
def test_one_fault_in_what_is_asked_before_the_spans_is_survived(
    world: World, server: HttpEngine, faulty: str, fault: Fault
) -> None:
    world.add(*(Span([envelope(str(n))], name=str(n), trace=str(n)) for n in range(6)))
    remote = _over_http(world, server)
    server.faulty = faulty
    server.faults = [fault]
    assert remote.rebuild().inserted == 6
    assert server.faults == []


def test_faults_without_end_fail_the_run_and_write_nothing(
    world: World, server: HttpEngine
) -> None:
    world.add(Span([envelope("one"), envelope("two")]))
    remote = _over_http(world, server)
    server.faults = ["cut", "error in the middle", "hang up", "hang up", "hang up", "hang up"]
    with pytest.raises(ClickHouseFailure) as raised:
        remote.rebuild()
    assert "secret" not in str(raised.value)
    assert "title of one" not in str(raised.value)
    assert world.items() == {}


@pytest.mark.parametrize("code", [10, 43, 46, 47, 386])
def test_what_cannot_pass_is_refused_at_once_in_one_line(
    world: World, server: HttpEngine, code: int
) -> None:
    world.add(Span([envelope("one")]))
    remote = _over_http(world, server)
    server.faults = [code, code]
    with pytest.raises(Refusal, match=f"ClickHouse cannot answer: .*Code: {code}") as raised:
        remote.rebuild()
    assert "\n" not in raised.value.detail
    assert len(server.faults) == 1
    assert not [message for message in remote.log if "Trying again" in message]
    assert world.items() == {}


# What a profile may set, and whether a rebuild gets its answer all the same.
_PROFILES: dict[str, tuple[Mapping[str, str], bool]] = {
    "limit": ({"limit": "3"}, True),
    # Already the driver does not get its first answer.
    "offset": ({"offset": "3"}, False),
    "rows read": ({"max_rows_to_read": "3", "read_overflow_mode": "break"}, False),
    "bytes read": ({"max_bytes_to_read": "300", "read_overflow_mode": "break"}, False),
    "rows of a result": ({"max_result_rows": "3", "result_overflow_mode": "break"}, False),
    "bytes of a result": ({"max_result_bytes": "300", "result_overflow_mode": "break"}, False),
    "rows to sort": ({"max_rows_to_sort": "3", "sort_overflow_mode": "break"}, False),
    # Nothing that is asked has a DISTINCT.
    "rows of DISTINCT": ({"max_rows_in_distinct": "3", "distinct_overflow_mode": "break"}, True),
    "rows to group": ({"max_rows_to_group_by": "3", "group_by_overflow_mode": "any"}, False),
    "rows of a set": ({"max_rows_in_set": "3", "set_overflow_mode": "break"}, False),
    "time": ({"max_execution_time": "0.001", "timeout_overflow_mode": "break"}, False),
    "modes alone": (
        {
            "read_overflow_mode": "break",
            "result_overflow_mode": "break",
            "group_by_overflow_mode": "any",
            "timeout_overflow_mode": "break",
        },
        True,
    ),
}


def _many(world: World) -> int:
    """Spans in several parts, each of a trace of its own."""
    for tens in range(4):
        names = [f"{tens}{ones}" for ones in range(10)]
        world.add(*(Span([envelope(name)], name=name, trace=name) for name in names))
    return 40


@pytest.mark.deploy
@pytest.mark.parametrize(("profile", "is_granted"), _PROFILES.values(), ids=_PROFILES)
def test_a_profile_that_cuts_answers_makes_all_items_or_none(
    world: World, monkeypatch: pytest.MonkeyPatch, profile: Mapping[str, str], is_granted: bool
) -> None:
    monkeypatch.setattr("everruns_pipelines.databases.clickhouse.PAUSES", (0.0, 0.0))
    number = _many(world)
    with serving(world.clickhouse, profile={"max_block_size": "5", **profile}) as server:
        remote = _over_http(world, server)
        if is_granted:
            assert remote.rebuild().inserted == number
        else:
            with pytest.raises((Refusal, ClickHouseFailure)):
                remote.rebuild()
    assert len(world.items()) == (number if is_granted else 0)


@pytest.mark.deploy
@pytest.mark.parametrize("name", [name for name in _PROFILES if name not in ("limit", "offset")])
def test_a_profile_that_cuts_answers_and_cannot_be_changed_is_refused(
    world: World, name: str
) -> None:
    _many(world)
    fixed = {**_PROFILES[name][0], "max_execution_time": "600", "readonly": "1"}
    with serving(world.clickhouse, profile=fixed) as server:
        remote = _over_http(world, server)
        with pytest.raises(Refusal, match="settings profile may cut answers") as raised:
            remote.rebuild()
    assert raised.value.code == "permission_denied"
    assert "\n" not in raised.value.detail
    assert world.items() == {}


def test_a_certificate_that_is_not_trusted_is_refused_at_once(
    world: World, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.add(Span([envelope("one")]))
    with serving(world.clickhouse, certificate=certificate) as server:
        remote = _over_http(world, server)
        with pytest.raises(Refusal, match="SSL_CERT_FILE") as raised:
            remote.rebuild()
        assert "\n" not in raised.value.detail
        assert not [message for message in remote.log if "Trying again" in message]
        assert server.queries == []
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert remote.rebuild().inserted == 1


def test_alerts_trust_the_certificates_that_rebuilds_trust(
    world: World,
    certificate: Path,
    home: Path,
    instance: DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(world.clickhouse, certificate=certificate) as server:
        environment = {
            "EVERRUNS_PARTS": "items",
            "EVERRUNS_POSTGRES_URL": world.postgres.url,
            "EVERRUNS_CLICKHOUSE_DSN": server.dsn,
            "EVERRUNS_HOME": str(home),
            "EVERRUNS_ALERT_URLS": "json://127.0.0.1:1",
        }
        watch = Watch(instance, environment)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        watch.tick()
        assert watch.away() == []
        monkeypatch.delenv("SSL_CERT_FILE")
        watch.tick()
        assert watch.away() == ["EVERRUNS_CLICKHOUSE_DSN"]


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate that nobody has signed, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "server.pem"
    path.write_bytes(
        signed.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return path


def test_a_server_that_refuses_is_asked_again_and_then_the_run_fails(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("everruns_pipelines.databases.clickhouse.PAUSES", (0.0, 0.0))
    with serving(world.clickhouse) as server:
        gone = _over_http(world, server)
    with pytest.raises(ClickHouseFailure):
        gone.rebuild()
    assert len(gone.log) == 2
    assert all("Trying again" in message for message in gone.log)


def test_an_unknown_table_is_refused(world: World, server: HttpEngine) -> None:
    remote = _over_http(world, server, EVERRUNS_SPANS_TABLE="nowhere.spans")
    with pytest.raises(Refusal, match="EVERRUNS_SPANS_TABLE") as raised:
        remote.rebuild()
    assert raised.value.code == "incompatible_schema"


def test_a_table_that_lacks_columns_is_refused(world: World) -> None:
    with world.clickhouse.connect() as clickhouse:
        clickhouse.client.command(
            "CREATE TABLE IF NOT EXISTS thin (TraceId String) ENGINE = Memory"
        )
    settings = world.clickhouse.settings.model_copy(update={"spans_table": "thin"})
    thin = World(world.postgres, ClickHouseDatabase(settings), world.connection)
    with pytest.raises(Refusal, match="lacks Duration, SpanAttributes, SpanId, Timestamp"):
        thin.rebuild()


def test_a_qualified_table_without_its_companion_is_read_too(world: World) -> None:
    with world.clickhouse.connect() as clickhouse:
        clickhouse.client.command("CREATE DATABASE IF NOT EXISTS elsewhere")
        clickhouse.client.command("DROP TABLE IF EXISTS elsewhere.spans")
        clickhouse.client.command("CREATE TABLE elsewhere.spans AS otel_traces")
    world.add(Span([envelope("one")]))
    with world.clickhouse.connect() as clickhouse:
        clickhouse.client.command("INSERT INTO elsewhere.spans SELECT * FROM otel_traces")
    settings = world.clickhouse.settings.model_copy(update={"spans_table": "elsewhere.spans"})
    moved = World(world.postgres, ClickHouseDatabase(settings), world.connection)
    assert moved.rebuild().inserted == 1
    assert world.items().keys() == {key("one")}
