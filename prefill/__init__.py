"""What a worker does when it prefills."""
