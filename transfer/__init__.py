"""How KV moves between workers: connector, handles, leases, links."""
