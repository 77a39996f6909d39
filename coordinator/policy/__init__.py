"""Policies: pure functions from frozen views to choices."""
