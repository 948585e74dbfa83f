"""The one exception that people are meant to read."""


class UserError(Exception):
    """Bad input: one line that names the file, the line and the mend.

    The command line prints it without a traceback and exits with status 2.
    """
