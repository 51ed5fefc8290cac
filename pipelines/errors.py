"""Errors a user can mend, raised by the stages themselves.

``pipelines.cli`` prints these, ``InputError`` and ``ServiceError`` as one line and exits with code 2.
"""


class UsageError(Exception):
    """A command was asked for something it cannot do; the message names it and the way out."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: like Ctrl-C, but for the exit status."""
