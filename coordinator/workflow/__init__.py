"""What is known of workflows: declared graphs, learned profiles, forecasts of demand. Pure."""
