"""Read a shard's rollouts: the tokens of each row that can be aligned, and where they end in what both sides read."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.models.text import Side
from tasks.tokens.align import byte_ends
from tasks.tokens.markers import Answer, Markers, Part
from tasks.tokens.ragged import flat, offsets_of, rows_of


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """The part of a shard's rollouts that can be aligned: each row's ids up to a control token that ends it.

    Log-probs are float64 in nats.
    """

    status: np.ndarray  # [rows], strings
    ids: np.ndarray  # int32 [tokens]
    offsets: np.ndarray  # int64 [rows + 1]
    stopped: np.ndarray  # bool [rows]: the last of the ids is a stop
    logprobs: np.ndarray  # [tokens], under the policy that sampled; NaN where the student did not sample
    model_logprobs: np.ndarray  # [tokens], under the student at temperature 1 and over all tokens; NaN as above
    escaped: np.ndarray  # bool [rows]: a control token ended the ids
    escapes: np.ndarray  # [rows], under the policy, of that token; NaN where there is none
    ends: np.ndarray  # int64 [tokens]: where they end, in bytes and control tokens, or as `Answer.places` measures it
    markers: np.ndarray  # bool [tokens]: part of a marker
    skipped: np.ndarray  # bool [tokens]: control tokens that the teacher does not read
    answers: dict[int, Answer]  # by row, those with markers or control tokens, where the teacher has another tokenizer


def read_rollouts(rollouts: pa.Table, student: Side, markers: Markers) -> Sampled:
    """Read a shard's rollouts. Where a control token ends an answer, it and what is behind are left out."""
    ids, offsets = flat(rollouts["token_ids"])
    row, rows, lengths = rows_of(offsets), len(offsets) - 1, student.vocabulary.lengths
    is_stop, last = np.isin(ids, student.stop_ids), np.zeros(len(ids), bool)
    last[offsets[1:][np.diff(offsets) > 0] - 1] = True
    widths = np.maximum(lengths[ids], 1)
    ends = byte_ends(widths, offsets)
    texts = rollouts["text"].fill_null("").to_pylist() if markers.texts else []
    answers = {} if markers.same else markers.find(texts, (ids, offsets), student.vocabulary.beta, student.stop_ids)
    keep, marked, skipped, escaping = (np.zeros(len(ids), bool) for _ in range(4))
    keep[:] = True
    for number, answer in answers.items():
        here = slice(offsets[number], offsets[number + 1])
        own, starts = ends[here].copy(), ends[here] - widths[here]
        if (at := int(np.searchsorted(own, answer.limit, side="right"))) < len(own):  # its stop, or what ended it
            escaping[here.start + at] = not (is_stop & last)[here][at] and not lengths[ids[here][at]]
            keep[here][at:] = (is_stop & last)[here][at:] & (starts[at:] == answer.limit)
        marked[here] = answer.holds(starts, own, Part.MARKER)
        skipped[here] = answer.holds(starts, own, Part.SKIPPED)
        ends[here] = answer.places(own, other=False)
    logprobs, model_logprobs = (_spread(column, row) for column in (rollouts["logprobs"], model_logprobs_of(rollouts)))
    escapes = np.full(rows, np.nan)
    escapes[row[escaping]] = logprobs[escaping]
    empty = np.where(rollouts["text"].is_null().to_numpy(), "no_reference", "lossy_text")
    return Sampled(
        status=np.where(np.diff(offsets) > 0, "ok", empty).astype(object),
        ids=ids[keep],
        offsets=offsets_of(np.bincount(row[keep], minlength=rows)),
        stopped=np.bincount(row, is_stop & last & keep, rows) > 0,
        logprobs=logprobs[keep],
        model_logprobs=model_logprobs[keep],
        escaped=np.bincount(row, escaping, rows) > 0,
        escapes=escapes,
        ends=ends[keep],
        markers=marked[keep],
        skipped=skipped[keep],
        answers=answers,
    )


def model_logprobs_of(rollouts: pa.Table) -> pa.ChunkedArray:
    """The student's log-probs at temperature 1 and over all tokens: `logprobs`, where samples were drawn from that law."""
    drawn = rollouts["logprobs"]
    return pc.coalesce(rollouts["model_logprobs"], drawn) if "model_logprobs" in rollouts.column_names else drawn


def _spread(column: pa.ChunkedArray, row: np.ndarray) -> np.ndarray:
    """A column of log-probs as float64 `[tokens]`; `row` `[tokens]` is each token's row. NaN in rows without log-probs."""
    logprobs = np.full(len(row), np.nan)
    logprobs[~column.is_null().to_numpy()[row]] = flat(column)[0]
    return logprobs
