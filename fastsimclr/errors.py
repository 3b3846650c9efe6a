"""The exceptions of fastsimclr."""


class UserError(ValueError):
    """A user error, described in one line: what was got, what was expected, what to do. Commands exit with code 2."""

    on_all_ranks = False
    """Whether all ranks raise it together, so that rank 0 prints it; see fastsimclr.distributed.raise_on_all_ranks."""


class OtherRankError(RuntimeError):
    """An internal error of another rank, which reports it with its traceback. Commands exit with code 1."""


class RunError(RuntimeError):
    """A run that could not do its work for a reason outside it, such as a full disk. Commands exit with code 1."""
