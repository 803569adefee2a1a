"""The one exception for the user's mistakes."""


class UserError(ValueError):
    """Something the user can mend: the message names the thing and the fix.

    The command line prints it without a traceback and exits with 2; from Python it is a `ValueError`.
    """
