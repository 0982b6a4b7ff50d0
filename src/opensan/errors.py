"""Errors that users can meet."""


class UserError(ValueError):
    """Tells a user, in one line, what was wrong, where, and what would be right.

    Only such an error is shown without a traceback by the commands, and answered with a 4xx status by the service. Any
    other exception is a fault of the package.
    """
