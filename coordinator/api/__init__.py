"""The front door: vLLM's own HTTP server over a client that stands for the cluster."""
