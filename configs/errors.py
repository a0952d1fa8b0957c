"""The exceptions that end a command with a message alone."""


class BadInput(Exception):
    """A recipe, file or model that cannot be used: what, where, and what would be right.

    The message is for the person who wrote the recipe. Commands print it alone and exit with 2;
    a flow fails with it as its reason.
    """


class CannotWrite(Exception):
    """The disk became full or read-only during a run: nobody's mistake, and nothing committed is lost.

    Commands print it alone and exit with 1; once there is space, the same command goes on.
    """
