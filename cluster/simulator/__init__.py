"""A whole cluster in virtual time: the live core, everything around it simulated."""
