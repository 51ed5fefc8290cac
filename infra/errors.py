"""Errors a user can mend, on the side of the outside world.

The command line prints a ``ServiceError`` as one line and exits with code 2.
"""


class ServiceError(LookupError):
    """A tracking server, registry entry or stored object is not there or not usable; the message names it."""
