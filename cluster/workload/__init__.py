"""Workloads: what runs of agent workflows ask of a cluster, read from traces or generated."""
