"""The next-byte law of `bytes` as MATHS.md §5 defines it: loops over the vocabulary."""

import numpy as np

from tasks.tokens.vocabulary import Vocabulary

STOP, REST, CLASSES = 256, 257, 258


def first_law(toy: Vocabulary, p: np.ndarray) -> np.ndarray:
    """The law on a boundary without looking back: first bytes, the stop, and the rest."""
    law = np.zeros(CLASSES)
    for i, value in enumerate(toy.beta.values):
        law[STOP if i in toy.stop_ids else REST if value is None else value[0]] += p[i]
    return law


def boundary_law(toy: Vocabulary, p: np.ndarray, previous: np.ndarray | None = None, token: int = -1) -> np.ndarray:
    """The law on a boundary; behind `token`, which was chosen from `previous`, with its first-order cover."""
    law = first_law(toy, p)
    if previous is None:
        return law
    q = toy.beta.values[token]
    cover, path = np.zeros(CLASSES), 0.0
    for i, value in enumerate(toy.beta.values):
        if value == q:
            path += previous[i]
        elif value is not None and value.startswith(q):
            cover[value[len(q)]] += previous[i]
    return (cover + path * law) / (cover.sum() + path)


def inside_law(toy: Vocabulary, p: np.ndarray, q: bytes) -> np.ndarray:
    """The law inside a token of which `q` has been read, given that the token goes on."""
    law = np.zeros(CLASSES)
    for i, value in enumerate(toy.beta.values):
        if value is not None and value.startswith(q) and value != q:
            law[value[len(q)]] += p[i]
    return law / law.sum()


def law_at(toy: Vocabulary, table: np.ndarray, ids: list[int], token: int, inside: int) -> np.ndarray:
    """The law `inside` bytes into the token at index `token` of a completion; `table` has probabilities a position."""
    if inside:
        return inside_law(toy, table[token], toy.beta.values[ids[token]][:inside])
    if token == 0:
        return boundary_law(toy, table[0])
    return boundary_law(toy, table[token], table[token - 1], ids[token - 1])


def places(toy: Vocabulary, ids: list[int]) -> dict[int, tuple[int, int]]:
    """For each byte of a completion, and the end when it stops: the token that holds it and the bytes before it in there."""
    found, at = {}, 0
    for index, i in enumerate(ids):
        value = toy.beta.values[i]
        if value is None:
            found[at] = (index, 0)
        else:
            found |= {at + inside: (index, inside) for inside in range(len(value))}
            at += len(value)
    return found
