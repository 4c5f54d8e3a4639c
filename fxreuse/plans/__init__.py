"""Plans: what to rewrite, as strings and as values."""
