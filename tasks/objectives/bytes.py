"""`bytes`: the divergence of both models' next-byte laws, where the teacher stands on a boundary (MATHS.md §5).

Both models imply a law of the completion's next byte, whatever their tokens are: see `ByteLaws`.
"""

import numpy as np
import torch

from configs.objectives import Bytes
from tasks.objectives.base import WHOLE, ObjectiveModule, Pairing, Projection, Terms, log_of, project_units, unit_sums
from tasks.objectives.divergences import bucketed_jsd
from tasks.tokens.byte_laws import REST, STOP, TINY, ByteLaws, first_classes
from tasks.tokens.ragged import add_up, expand, index_in_row, offsets_of, rows_of
from tasks.tokens.vocabulary import Vocabulary


class BytesObjective(ObjectiveModule):
    """JSD of both models' next-byte laws."""

    config: Bytes

    def __init__(self, config: Bytes, *, student: Vocabulary, teacher: Vocabulary):
        super().__init__(config)
        self.student, self.teacher = student, teacher
        self.laws = ByteLaws(student)

    # -- the teacher's side, in the align stage ------------------------------------------------------------------------

    def project(self, pairing: Pairing) -> Projection:
        counts, classes, masses = pairing.laws or self.teacher_laws(pairing)
        units, row = pairing.units, rows_of(pairing.teacher_offsets)
        unit = np.repeat(np.arange(len(units.rows)), units.teacher_ends - units.teacher_starts)
        token, inside = self._find_student_tokens(pairing, unit)
        keep = ~units.controls[unit]  # a control token or marker has no bytes: it is an event of its own

        # Inside a token the student cannot stop: there the teacher's law is conditioned on not stopping.
        owner = np.repeat(np.arange(len(row)), counts)
        wanted = keep[owner] & (classes != REST) & ~((inside[owner] > 0) & (classes == STOP))
        stop_mass = np.bincount(owner[classes == STOP], masses[classes == STOP], len(row)) * (inside > 0)
        masses = masses / np.maximum(1 - stop_mass, TINY)[owner]
        covered = np.bincount(owner[wanted], masses[wanted], len(row))
        # A term reads the distribution that chose the last token, for its cover, and the one after that token.
        starts = np.where((inside == 0) & (token > 0), token - 1, token)
        with np.errstate(divide="ignore"):
            laws = Projection(
                offsets=offsets_of(np.bincount(row[keep], minlength=pairing.rows)),
                starts=starts[keep],
                ends=token[keep] + 1,
                counts=np.bincount(owner[wanted], minlength=len(row))[keep],
                ids=classes[wanted],
                logprobs=np.log(masses[wanted]),
                rest=np.log(np.maximum(1 - covered, 0))[keep],
                supervised=np.bincount(row[keep & (self.teacher.lengths[pairing.teacher_ids] > 0)], minlength=pairing.rows),
                inside=inside[keep],
            )
        return _add_controls(laws, unit[keep], pairing) if units.controls.any() else laws

    def teacher_laws(self, pairing: Pairing) -> tuple[np.ndarray, ...]:
        """The law before each teacher token, covers applied, sparse: counts `[tokens]`; classes and masses, flat."""
        vocabulary, ids = self.teacher, pairing.teacher_ids
        owner = np.repeat(np.arange(len(ids)), np.diff(pairing.top_offsets))
        mass = np.exp(pairing.top_logprobs)
        classes = first_classes(vocabulary)[pairing.top_ids]
        rest = np.exp(pairing.rest)

        # The cover of token j, read from the distribution that chose token j - 1.
        after = np.flatnonzero(index_in_row(pairing.teacher_offsets) > 0)
        after = after[vocabulary.lengths[ids[after - 1]] > 0]  # no longer token begins with a control token
        previous = ids[after - 1]
        low, equal, high = vocabulary.prefix_range(previous, vocabulary.lengths[previous])
        entries, boundary = expand(pairing.top_offsets[after - 1], pairing.top_offsets[after])
        rank = vocabulary.rank[pairing.top_ids[entries]]
        longer = (rank >= equal[boundary]) & (rank < high[boundary])
        same = (rank >= low[boundary]) & (rank < equal[boundary])
        path = np.ones(len(ids))
        path[after] = np.maximum(
            np.bincount(boundary[same], mass[entries[same]], len(after)), np.exp(pairing.teacher_logprobs[after - 1])
        )
        cover, at = entries[longer], boundary[longer]
        cover_class = vocabulary.byte_at(pairing.top_ids[cover], vocabulary.lengths[previous[at]]).astype(np.int64)
        total = path + np.bincount(after[at], mass[cover], len(ids))
        tokens = np.arange(len(ids))
        where = np.concatenate([owner, tokens, after[at]])
        masses = np.concatenate([mass * path[owner], rest * path, mass[cover]]) / total[where]
        return add_up(where, np.concatenate([classes, np.full(len(ids), REST), cover_class]), masses, len(ids))

    def _find_student_tokens(self, pairing: Pairing, unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each teacher token, of `unit` `[teacher tokens]`: the student token, counted in its row, that holds the byte at
        which it begins, and how many bytes of that student token come before. A stop holds the place behind the last byte.
        """
        units = pairing.units
        place, s_unit = expand(units.student_starts, units.student_ends)
        lengths = self.student.lengths[pairing.student_ids[pairing.student_offsets[units.rows[s_unit]] + place]]
        begins = _bytes_before(lengths, s_unit)
        at = _bytes_before(self.teacher.lengths[pairing.teacher_ids], unit)
        ends = begins + np.maximum(lengths, 1)  # a stop has no bytes: it gets one here
        span = max(int(ends.max(initial=0)), int(at.max(initial=0))) + 2
        index = np.searchsorted(s_unit * span + ends, unit * span + at, side="right")
        index = np.minimum(index, len(ends) - 1)  # only in a marker may the teacher have more bytes
        return place[index], at - begins[index]

    # -- the student's side, in the train stage ------------------------------------------------------------------------

    def forward(self, logits: torch.Tensor, terms: Terms) -> torch.Tensor:
        law, actual = self.laws(logits, terms.actual, terms.start, terms.end, terms.inside.clamp(min=0))
        path = unit_sums(log_of(actual), terms)[:, None]
        student = torch.where((terms.inside == WHOLE)[:, None], path, law.gather(1, terms.ids).clamp(min=TINY).log())
        student = student.masked_fill(terms.logprobs.isneginf(), -torch.inf)
        return bucketed_jsd(terms.logprobs, terms.rest, student, self.config.beta)


def _bytes_before(lengths: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Bytes of its unit before each token, `[tokens]`, from the tokens' `lengths` and `unit` in order."""
    begins = np.cumsum(lengths, dtype=np.int64) - lengths
    before: np.ndarray = begins - begins[np.searchsorted(unit, unit)]
    return before


def _add_controls(laws: Projection, unit: np.ndarray, pairing: Pairing) -> Projection:
    """`laws`, whose terms are of `unit` `[terms]`, and among them a term of each control token or marker: its whole path."""
    coins = project_units(pairing, only=pairing.units.controls)
    order = np.argsort(np.concatenate([unit, np.flatnonzero(pairing.units.controls)]), kind="stable")

    def join(of_laws: np.ndarray | None, of_coins: np.ndarray) -> np.ndarray:
        assert of_laws is not None
        return np.concatenate([of_laws, of_coins])[order]

    counts = np.concatenate([laws.counts, coins.counts])
    events, _ = expand((offsets_of(counts)[:-1])[order], offsets_of(counts)[1:][order])
    return Projection(
        offsets=laws.offsets + coins.offsets,
        starts=join(laws.starts, coins.starts),
        ends=join(laws.ends, coins.ends),
        counts=counts[order],
        ids=np.concatenate([laws.ids, coins.ids])[events],
        logprobs=np.concatenate([laws.logprobs, coins.logprobs])[events],
        rest=join(laws.rest, coins.rest),
        supervised=laws.supervised + coins.supervised,
        inside=join(laws.inside, np.full(len(coins.starts), WHOLE)),
    )
