"""Numbers about a run, for people: its log read back, charts, samples, and the report."""
