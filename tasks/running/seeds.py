"""Seeds that derive from names and numbers, never from order or time."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^62) from its parts, such as (run seed, round, prompt, sample)."""
    data = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 2


def derive_uniform(*parts: int | str) -> float:
    """A number in [0, 1) from its parts."""
    return derive_seed(*parts) / 2.0**62
