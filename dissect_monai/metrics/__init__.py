"""Pure numbers: scores, intervals, probes."""
