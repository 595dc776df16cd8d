"""What a person does in the UI, done by a browser: launches a backfill and looks around.

`python -m everruns_pipelines_tests.browser docs/images` makes the README's pictures.
"""

import re
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from playwright.sync_api import Page, ViewportSize, expect, sync_playwright

from everruns_pipelines.client import Deployment
from everruns_pipelines.databases.embedded.sample_data import load_sample_data
from everruns_pipelines.databases.postgres import PostgresDatabase
from everruns_pipelines.settings import Settings
from everruns_pipelines_tests.deployment import live_deployment

CHROMIUM = Path("/usr/bin/chromium")

_LOCATION = "locations/everruns_pipelines"
_PATIENCE = 60_000
_WINDOW: ViewportSize = {"width": 1440, "height": 900}
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


def launch_backfill(page: Page, limit: int, picture: Path) -> int:
    """Launch `backfill_reporting` from the launchpad with a limit; how many it says it enqueued."""
    page.goto(f"/{_LOCATION}/jobs/backfill_reporting/playground")
    editor = page.locator(".CodeMirror")
    # What the launchpad proposes by itself.
    expect(editor).to_contain_text("limit: 1000")
    editor.click()
    page.keyboard.press("Control+A")
    page.keyboard.insert_text(f"ops: {{enqueue: {{config: {{limit: {limit}}}}}}}")
    page.get_by_role("button", name="Launch Run").click()
    page.wait_for_url("**/runs/*")
    expect(page.get_by_text("RUN_SUCCESS", exact=True)).to_be_visible()
    page.get_by_placeholder("Filter").fill("step:enqueue")
    row = page.get_by_text("enqueued", exact=True).locator("xpath=ancestor::tr[1]")
    expect(row).to_be_visible()
    page.screenshot(path=picture)
    return int(row.locator("td").last.inner_text())


def look_around(page: Page, pictures: Path) -> None:
    """See the resources, the asset graph, a partitioned fact and the health chart."""
    page.goto(f"/{_LOCATION}/resources")
    expect(page.get_by_text("everruns_postgres", exact=True).first).to_be_visible()
    page.screenshot(path=pictures / "resources.png")
    page.set_viewport_size({"width": 1440, "height": 2400})
    page.goto("/asset-groups")
    expect(page.get_by_text("operations", exact=True).first).to_be_visible()
    page.keyboard.press("Alt+e")
    expect(page.get_by_text("fact_tool_call", exact=True)).to_be_visible()
    expect(page.get_by_text(re.compile("^Loading"))).to_have_count(0)
    expect(page.get_by_text("Materialized", exact=True).first).to_be_visible()
    page.screenshot(path=pictures / "assets.png")
    page.set_viewport_size(_WINDOW)
    yesterday = datetime.now(UTC).date() - timedelta(days=1)
    page.goto(f"/assets/fact_tool_call?view=partitions&partition={yesterday}")
    expect(page.get_by_text("inserted", exact=True).first).to_be_visible()
    page.screenshot(path=pictures / "fact.png")
    page.goto("/assets/pipeline_health?view=events")
    page.get_by_text("[Show Markdown]").click()
    expect(page.get_by_role("img", name="Lag in seconds")).to_be_visible()
    page.screenshot(path=pictures / "health.png")


def see_failed_check(page: Page, picture: Path) -> None:
    """Execute the checks of a fact, and see which days one of them found wrong."""
    page.goto("/assets/fact_tool_call?view=checks&checkDetail=no_missing_rows")
    page.get_by_role("button", name="Execute all").click()
    expect(page.get_by_text(re.compile("missing rows in"))).to_be_visible()
    page.screenshot(path=picture)


def make_pictures(pictures: Path) -> None:
    """Have a deployment of its own go through a loss and its repair, and take pictures of it."""
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        environment = {
            "EVERRUNS_HOME": str(home / "everruns"),
            # A run that lingers tells at its end only which days it has touched.
            "EVERRUNS_LINGER_SECONDS": "0",
            "EVERRUNS_REPORTING_START": str(datetime.now(UTC).date() - timedelta(days=21)),
        }
        postgres = PostgresDatabase(Settings.from_environment(environment))
        with postgres.connect() as connection, live_deployment(home, environment) as live:
            deployment = Deployment(live.url)
            load_sample_data(connection, events=6000)
            deployment.run("measure_health", {})
            deployment.run("project_reporting", {})
            deployment.run("measure_health", {})
            connection.execute("DELETE FROM fact_turn")
            deployment.run("measure_health", {})
            connection.execute("DELETE FROM fact_tool_call WHERE hashtext(source_key) % 3 = 0")
            with opened(live.url) as page:
                see_failed_check(page, pictures / "checks.png")
                launch_backfill(page, 10_000, pictures / "backfill.png")
                deployment.run("measure_health", {})
                look_around(page, pictures)


if __name__ == "__main__":
    make_pictures(Path(sys.argv[1]))
