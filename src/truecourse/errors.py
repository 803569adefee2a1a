"""The two exceptions that a user meets."""


class UserError(ValueError):
    """Something the user can mend before anything runs: the message names the thing and the fix.

    The command line prints it without a traceback and exits with 2; from Python it is a `ValueError`.
    """


class RunError(RuntimeError):
    """A run that cannot go on (disk full, NaN, a model that does not fit): what happened, what is safe, what to do.

    The command line prints it without a traceback and exits with 1.
    """
