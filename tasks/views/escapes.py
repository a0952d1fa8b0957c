"""Text of a model or a data set, safe to look at."""

LONGEST = 20_000  # characters of a text that are shown: a row may hold any number

# A model can write sequences that a terminal obeys: they are shown, but for line ends and tabs.
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
# Line ends that are none to a terminal, and what turns the direction of all that follows, so that it is read as something else.
CONTROLS |= {code: f"\\u{code:04x}" for code in (0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def escape_controls(text: str) -> str:
    """The text with control characters as `\\x1b`, or `\\u202e`."""
    return text.translate(CONTROLS)


def shorten(text: str, longest: int = LONGEST) -> str:
    """The text, or its first characters and how many more there are."""
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text) - longest:,} more characters)"
