"""Keeps an agent platform's derived data, reporting facts and items, equal to its source."""

__version__ = "0.2.0"
