"""What ends a command without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """What was wrong, with the value, and what to do about it: shown as one line."""


class Diverged(UserError):
    """Training, or a solution in closed form, gave what is not finite.

    Args:
        reason: as of UserError. number: of the run, where several are trained side by side.
    """

    def __init__(self, reason: str, number: int = 0) -> None:
        super().__init__(reason)
        self.number = number

    def __reduce__(self) -> tuple[type[Diverged], tuple[str, int]]:
        return type(self), (str(self), self.number)  # a worker's reaches the command as a pickle


class Interrupted(Exception):
    """The work was asked to stop and has left what it goes on from."""
