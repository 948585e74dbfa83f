"""The exceptions that end a command with one line for its user, and not with a traceback."""


class UserError(Exception):
    """Bad input. The message is one line, `WHERE: what is wrong: the remedy`; WHERE is a file, line or name.

    The command line prints it without a traceback and exits with status 2.
    """


class Diverged(UserError):
    """A training run had a loss that is not finite, or a spike. The message names the step and a remedy.

    The command line exits with status 3, since the same command would meet the same batch again.
    """


class Preempted(Exception):
    """The machine asked the process to end (SIGTERM), and the work so far is saved. The message is one line.

    The command line prints it and exits with status 143, as a shell reports SIGTERM.
    """


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message, else its class's name; at most 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
