"""Reporting facts: projected from canonical rows through the outbox, compared, backfilled."""
