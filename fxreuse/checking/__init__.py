"""Whether a rewritten model computes what it should, and what it costs: measured."""
