"""Whole clusters: configuration, processes, launchers, benchmarks, command line."""
