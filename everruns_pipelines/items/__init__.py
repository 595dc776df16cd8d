"""Items: re-materialized from the spans that reported them."""
