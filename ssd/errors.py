"""What ends a command without a traceback."""


class UserError(Exception):
    """What was wrong, with the value, and what to do about it: shown as one line."""


class Interrupted(Exception):
    """The work was asked to stop and has left what it goes on from."""
