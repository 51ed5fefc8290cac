"""Errors a user can mend.

The command line prints an ``InputError`` as one line and exits with code 2; every other exception is
a defect and keeps its traceback.
"""


class InputError(ValueError):
    """The input is wrong; the message names the thing and says what would be right."""
