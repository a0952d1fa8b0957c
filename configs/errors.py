"""The one exception that a user's mistake raises, so that every command can end the same way."""


class BadInput(Exception):
    """A recipe, file or model that cannot be used: what, where, and what would be right.

    The message is for the person who wrote the recipe. Commands print it alone and exit with 2;
    a flow fails with it as its reason.
    """
