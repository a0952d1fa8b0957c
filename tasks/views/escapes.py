"""Text of a model or a data set, safe to look at."""

# A model can write sequences that a terminal obeys: they are shown, but for line ends and tabs.
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def escape_controls(text: str) -> str:
    """The text with control characters as `\\x1b`."""
    return text.translate(CONTROLS)
