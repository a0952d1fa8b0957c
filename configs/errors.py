"""The exceptions that a person is to read, so that every command can end the same way."""


class BadInput(Exception):
    """A recipe, file or model that cannot be used: what, where, and what would be right.

    The message is for the person who wrote the recipe. Commands print it alone and exit with 2;
    a flow fails with it as its reason.
    """


class Stopped(Exception):
    """A gate was breached: going on would spend time on a result that is not worth it.

    The message has the figures and what to do. Commands print it alone and exit with 1; what is committed stays.
    """


class Unavailable(Exception):
    """Something outside this process broke: a server does not answer, an engine's process ended. Worth trying again.

    The message names it and says what its last words were. Commands print it alone and exit with 1; what is committed
    stays, and the same command goes on from there.
    """


class CannotWrite(Exception):
    """The disk became full or read-only during a run: nobody's mistake, and nothing committed is lost.

    Commands print it alone and exit with 1; once there is space, the same command goes on.
    """
