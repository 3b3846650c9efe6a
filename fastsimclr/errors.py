"""The one exception that says: this is yours to mend, and here is how."""


class UserError(ValueError):
    """A user's mistake, in one line: what was got, what is expected, what to do. Entry points exit with code 2."""
