"""What went wrong so that one message says all; in a module that costs nothing to import."""

from __future__ import annotations


class CommandFailure(Exception):
    """A command could not do what it was asked; the message is for the person who asked."""
