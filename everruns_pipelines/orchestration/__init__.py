"""What both domains share of Dagster. Knows no fact and no item."""
