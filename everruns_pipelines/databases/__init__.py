"""Connections to PostgreSQL and ClickHouse, and what is ours in them. Knows no fact and no item."""
