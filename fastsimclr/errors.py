"""The exception for user errors."""


class UserError(ValueError):
    """A user error, described in one line: what was got, what was expected, what to do. Commands exit with code 2."""
