"""Which row of which weight feeds which channel: read off the graph."""
