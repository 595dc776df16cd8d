"""What a person does in the UI, done by a browser: presses its buttons and looks around.

`python -m everruns_pipelines_tests.browser docs/images` takes the README's pictures.
"""

import re
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from playwright.sync_api import Locator, Page, ViewportSize, expect, sync_playwright

from everruns_pipelines.client import Deployment
from everruns_pipelines.databases.clickhouse import ClickHouseDatabase
from everruns_pipelines.databases.embedded.sample_data import load_sample_data
from everruns_pipelines.databases.embedded.sample_items import load_sample_items
from everruns_pipelines.databases.postgres import Connection, PostgresDatabase
from everruns_pipelines.reporting.catalog import FACTS
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.deployment import LiveDeployment, live_deployment, until

CHROMIUM = Path("/usr/bin/chromium")

_LOCATION = "locations/everruns_pipelines"
_PATIENCE = 60_000
_WINDOW: ViewportSize = {"width": 1440, "height": 900}
_TALL = 1900
# No sandbox, since CI is root in a container; no talk to anybody but the webserver.
_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_CHECK = re.compile(r"^(no_\w+_rows)\n(Succeeded|Failed)$", re.MULTILINE)


@contextmanager
def opened(url: str) -> Generator[Page]:
    """A page of a headless browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=list(_ARGUMENTS))
        page = browser.new_page(viewport=_WINDOW, base_url=url)
        page.set_default_timeout(_PATIENCE)
        expect.set_options(timeout=_PATIENCE)
        yield page
        browser.close()


@contextmanager
def sample_deployment(
    home: Path, *, events: int, days: int
) -> Generator[tuple[LiveDeployment, Connection]]:
    """A deployment with databases of its own, and sample data whose facts are made."""
    environment = {
        "EVERRUNS_HOME": str(home / "everruns"),
        # A run that lingers tells at its end only which days it has touched.
        "EVERRUNS_LINGER_SECONDS": "0",
        "EVERRUNS_REPORTING_START": str(datetime.now(UTC).date() - timedelta(days=days + 7)),
    }
    settings = Settings.from_environment(environment)
    with PostgresDatabase(settings).connect() as connection:
        load_sample_data(connection, events=events, days=days, enqueued_share=1.0)
        with ClickHouseDatabase(settings).connect() as clickhouse:
            load_sample_items(connection, clickhouse)
        with live_deployment(home, environment) as live:
            Deployment(live.url).run("measure_health", {})
            # By the sensor.
            due = "SELECT FROM reporting_outbox WHERE status <> 'completed' LIMIT 1"
            until(lambda: connection.execute(due).fetchone() is None, "all facts are made")
            yield live, connection


def launch_backfill(page: Page, limit: int) -> int:
    """Launch `backfill_reporting` with what the launchpad proposes, but for the limit; how many it
    says it enqueued.
    """
    page.goto(f"/{_LOCATION}/jobs/backfill_reporting/playground")
    editor = page.locator(".CodeMirror")
    expect(editor).to_contain_text("limit: 1000")
    editor.evaluate(
        "(editor, limit) => editor.CodeMirror.setValue("
        "editor.CodeMirror.getValue().replace('limit: 1000', 'limit: ' + limit))",
        limit,
    )
    page.get_by_role("button", name="Launch Run").click()
    page.wait_for_url("**/runs/*")
    expect(page.get_by_text("RUN_SUCCESS", exact=True)).to_be_visible()
    page.get_by_placeholder("Filter").fill("step:enqueue")
    return _number(page, "enqueued")


def execute_checks(page: Page, asset: str) -> dict[str, str]:
    """Press "Execute all" on the Checks tab of an asset that no check has looked at yet; what the
    page says of each, in the end.
    """
    page.goto(f"/assets/{asset}?view=checks&checkDetail=no_missing_rows")
    page.get_by_role("button", name="Execute all").click()
    number = page.get_by_text(re.compile(r"^Checks \(\d\)$")).inner_text()[-2]
    results: dict[str, str] = {}

    def are_there() -> bool:
        results.update(_CHECK.findall(page.locator("body").inner_text()))
        return len(results) == int(number)

    until(are_there, "each check has a result")
    return results


def materialize(page: Page, asset: str, first: date, last: date) -> None:
    """Launch the materialization of a day, or of a range of days, from the asset's page."""
    page.goto(f"/assets/{asset}?view=partitions")
    page.get_by_role("button", name=re.compile("Materialize")).first.click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("textbox").click()
    page.keyboard.press("Control+A")
    page.keyboard.insert_text(str(first) if first == last else f"[{first}...{last}]")
    page.keyboard.press("Enter")
    what = "Launch 1 run" if first == last else "Launch backfill"
    dialog.get_by_role("button", name=what).click()
    expect(dialog).to_have_count(0)


def materialized(page: Page, asset: str, day: date) -> int:
    """How many rows the page of a partition says were inserted when the whole day was made."""

    def is_told() -> bool:
        # An open page does not follow.
        page.goto(f"/assets/{asset}?view=partitions&partition={day}")
        expect(page.get_by_text("Latest materialization")).to_be_visible()
        page.wait_for_load_state("networkidle")
        return page.get_by_text("the whole day", exact=True).is_visible()

    until(is_told, f"{asset} of {day} is materialized")
    return _number(page, "inserted")


def terminate(page: Page, run: str, when: str) -> None:
    """Terminate a run once its log says `when`; the page shows it as canceled within 10 s."""
    page.goto(f"/runs/{run}")
    expect(page.get_by_text(when)).to_be_visible()
    page.get_by_role("button", name="Terminate").click()
    page.get_by_role("dialog").get_by_role("button", name="Terminate 1 run").click()
    expect(page.get_by_text("Canceled", exact=True).first).to_be_visible(timeout=10_000)


def _number(page: Page, name: str) -> int:
    """The number beside a name in a table of metadata."""
    row = page.get_by_text(name, exact=True).first.locator("xpath=ancestor::tr[1]")
    expect(row).to_be_visible()
    return int(row.locator("td").nth(1).inner_text())


def look_around(page: Page, pictures: Path) -> None:
    """See a resource, all assets, a fact's lineage and partitions, and the health chart."""
    yesterday = datetime.now(UTC).date() - timedelta(days=1)
    page.goto(f"/{_LOCATION}/resources/everruns_postgres")
    expect(page.get_by_text("********")).to_be_visible()
    _picture(page, pictures / "resources.png")
    page.goto("/asset-groups~not%20group%3A%22platform%22/")
    expect(page.get_by_text("operations", exact=True).first).to_be_visible()
    page.keyboard.press("Alt+e")
    expect(page.get_by_text("fact_tool_call", exact=True)).to_be_visible()
    page.set_viewport_size({"width": _WINDOW["width"], "height": _TALL})
    page.reload()  # which fits the graph into the window
    _picture(page, pictures / "assets.png", page.get_by_text("Materialized", exact=True), _TALL)
    page.goto("/assets/fact_tool_call?view=lineage")
    _picture(page, pictures / "lineage.png", page.get_by_text("archived_events", exact=True))
    page.goto(f"/assets/fact_tool_call?view=partitions&partition={yesterday}")
    _picture(page, pictures / "fact.png", page.get_by_text("inserted", exact=True))
    page.goto("/assets/pipeline_health?view=events")
    page.get_by_text("[Show Markdown]").click()
    _picture(page, pictures / "health.png", page.get_by_role("img", name="Lag in seconds"), 960)


def _picture(page: Page, path: Path, seen: Locator | None = None, height: int = 900) -> None:
    """Take a picture in a window of that height, once something is seen in it."""
    page.set_viewport_size({"width": _WINDOW["width"], "height": height})
    if seen is not None:
        expect(seen.first).to_be_visible()
    expect(page.get_by_text(re.compile("^Loading"))).to_have_count(0)
    page.screenshot(path=path)
    page.set_viewport_size(_WINDOW)


def take_pictures(pictures: Path) -> None:
    """Have a deployment of its own go through a loss and its repair, and take pictures of it."""
    with (
        tempfile.TemporaryDirectory() as directory,
        sample_deployment(Path(directory), events=6000, days=14) as (live, connection),
        opened(live.url) as page,
    ):
        deployment = Deployment(live.url)
        deployment.run("measure_health", {})
        connection.execute("DELETE FROM fact_turn")
        deployment.run("measure_health", {})
        connection.execute("DELETE FROM fact_tool_call WHERE hashtext(source_key) % 3 = 0")
        execute_checks(page, "fact_tool_call")
        _picture(page, pictures / "checks.png", page.get_by_text(re.compile("missing rows in")))
        launch_backfill(page, 10_000)
        _picture(page, pictures / "backfill.png")
        today = datetime.now(UTC).date()
        for asset in ("items", "fact_tool_call"):
            materialize(page, asset, today - timedelta(days=1), today - timedelta(days=1))
            materialized(page, asset, today - timedelta(days=1))
        for asset in ("items", *(fact.table for fact in FACTS)):
            execute_checks(page, asset)
        deployment.run("measure_health", {})
        look_around(page, pictures)


if __name__ == "__main__":
    take_pictures(Path(sys.argv[1]))
