"""Damage: facts that were there and are lost, or wrong. It heals within minutes, and a check of
`pipeline_health` says so: it fails when a run begins to heal, and passes once a look finds no more.
"""

from collections.abc import Iterator
from datetime import datetime

import dagster as dg

from everruns_pipelines.orchestration.asset_keys import HEALTH, asset_key
from everruns_pipelines.orchestration.checks import check_name, evaluations
from everruns_pipelines.settings import Settings

DAMAGED = "damaged"


def damage(
    settings: Settings, sources: int, oldest: datetime, run_id: str
) -> dg.AssetCheckEvaluation:
    """What was found.

    Args:
        sources: how many have damaged facts.
        oldest: when the oldest of them happened or last changed.
        run_id: the run that heals them.
    """
    return _evaluation(
        settings,
        False,
        f"{sources:,} sources had lost facts, or had facts that were wrong or late; the oldest is "
        f"of {oldest:%F %T} UTC. Run {run_id} heals them.",
        {
            f"{DAMAGED}_rows": sources,
            "oldest": dg.MetadataValue.timestamp(oldest),
            "healed_by": dg.MetadataValue.dagster_run(run_id),
            "to_repair": f"nothing is to be done if run {run_id} succeeds",
        },
    )


def no_damage(
    instance: dg.DagsterInstance, settings: Settings
) -> Iterator[dg.AssetCheckEvaluation]:
    """That nothing is damaged any more, if something was at the last look."""
    for _, newest in evaluations(instance, _check(settings)):
        if not newest.passed:
            yield _evaluation(settings, True, "A look at all history finds no damage any more.", {})


def _check(settings: Settings) -> dg.AssetCheckKey:
    return dg.AssetCheckKey(asset_key(settings, HEALTH), check_name(DAMAGED))


def _evaluation(
    settings: Settings,
    passed: bool,
    description: str,
    metadata: dict[str, dg.MetadataValue | str | int],
) -> dg.AssetCheckEvaluation:
    key = _check(settings)
    return dg.AssetCheckEvaluation(
        asset_key=key.asset_key,
        check_name=key.name,
        passed=passed,
        description=description,
        metadata=metadata,
    )
