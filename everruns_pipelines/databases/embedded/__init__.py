"""The default when nothing is configured: databases from wheels, and data to try them on."""
