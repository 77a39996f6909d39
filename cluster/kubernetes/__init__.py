"""A cluster file as Kubernetes manifests: plain objects, dumped as YAML."""
