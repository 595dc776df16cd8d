"""Arguments that several commands share."""

import argparse


def number(text: str) -> int:
    """A whole number, or what to say instead of `invalid int value`."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r:.60}") from None


def add_org_id(parser: argparse.ArgumentParser) -> None:
    """`--org-id`."""
    parser.add_argument("--org-id", type=number, help="one organization; all if not given")


def add_days(parser: argparse.ArgumentParser) -> None:
    """`--days`."""
    parser.add_argument("--days", type=number, default=7, help="days to compare, default 7")


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """`--dry-run`."""
    parser.add_argument("--dry-run", action="store_true", help="count only, write nothing")


def add_launch(parser: argparse.ArgumentParser) -> None:
    """What every command that launches a job has: `--verbose`, `--url`."""
    parser.add_argument(
        "--verbose", action="store_true", help="print every count, not only those of the API"
    )
    parser.add_argument("--url", help="run it in the deployment at http://host:port, not here")
