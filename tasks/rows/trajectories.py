"""Conversations of several answers: each of the assistant's turns is a row, whose prompt is all that came before it."""

from dataclasses import dataclass
from typing import Literal

from storage.lineage import digest_json
from tasks.rows.conventions import Reading
from tasks.rows.messages import UNASKED


@dataclass(frozen=True)
class Trajectory:
    """Which turn of which conversation a row is."""

    id: str
    turn: int  # of the assistant, from 0


def list_turns(reading: Reading, turns: Literal["last", "all"] = "all") -> list[tuple[Reading, Trajectory | None]]:
    """A conversation as one reading for each of the assistant's answers, the last one as it was read; or the last one alone.

    An answer that calls tools has no text to learn from, as at the end of a conversation; one before which nothing was asked is
    part of the prompts alone.
    """
    if turns == "last":
        return [(reading, None)]
    found = []
    for at, message in enumerate(reading.messages):
        before = reading.messages[:at]
        if message["role"] == "assistant" and any(earlier["role"] not in UNASKED for earlier in before):
            found.append(Reading(before, None if "tool_calls" in message else message["content"], reading.tools))
    identity = digest_json([reading.messages, reading.reference, reading.tools])[:16]
    return [(turn, Trajectory(identity, number)) for number, turn in enumerate([*found, reading])]
