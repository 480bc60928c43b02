"""One exception for every mistake that is not ours."""


class UserError(Exception):
    """A mistake that a user, a file or a peer made: one or two lines that say what, where and how to mend it.

    The command line prints the message without a traceback and leaves with exit code 2.
    """
