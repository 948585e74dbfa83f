"""The exceptions that people are meant to read."""


class UserError(Exception):
    """Bad input: one line that names the file, the line and the hint.

    The command line prints it without a traceback and exits with status 2.
    """


class Diverged(UserError):
    """The numbers of a training went wrong: one line that names the step and the remedy.

    The command line exits with status 3: the same command would meet the same batch again.
    """


class Preempted(Exception):
    """The machine asked the process to end (SIGTERM); what was done is saved. One line that says so.

    The command line prints it and exits with status 143, as a shell tells of SIGTERM.
    """
