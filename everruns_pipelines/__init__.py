"""Keeps an agent platform's derived data, reporting facts and items, equal to its source."""
