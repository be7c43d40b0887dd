"""Programs that made what is committed here."""
