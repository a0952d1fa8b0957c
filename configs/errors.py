"""Exceptions whose message is written for the user. Every command ends in the same way on each of them."""


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
    """Something outside this process failed: a server does not answer, or an engine's process ended. Another try may succeed.

    The message names it and quotes its last output. Commands print it alone and exit with 1; what is committed stays, and
    the same command goes on from there.
    """


class CannotWrite(Exception):
    """The disk became full or read-only during a run. Nothing that was committed is lost.

    Commands print the message alone and exit with 1; once there is space, the same command goes on.
    """


class Damaged(Exception):
    """A committed file or folder is not what its manifest says. It was found when it was to be read, and nothing was read.

    A flow makes it again and goes on (`storage.damage.mend`). Elsewhere commands print the message alone and exit with 1.
    """

    def __init__(self, path: str):
        super().__init__(path)
        self.path = path

    def __str__(self) -> str:
        return f"{self.path}: its content was altered; the `potstill run` command that made it makes it again"
