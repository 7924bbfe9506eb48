"""A mistake of the user's: shown as one line, without a traceback."""


class UserError(Exception):
    """What was wrong, with the value, and what to do about it."""
