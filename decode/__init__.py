"""What a worker does when it decodes."""
