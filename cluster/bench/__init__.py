"""Benchmarks: each module measures one thing and returns figures by name."""
