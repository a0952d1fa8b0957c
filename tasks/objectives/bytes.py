"""`bytes`: the divergence of both models' next-byte laws, where the teacher stands on a boundary (MATHS.md §5).

Whatever their tokens are, both models say something about the next byte of the completion: see `ByteLaws`.
"""

import numpy as np
import torch

from configs.objectives import Bytes
from tasks.objectives.base import ObjectiveModule, Pairing, Projection, Terms
from tasks.objectives.divergences import bucketed_jsd
from tasks.tokens.align import byte_ends
from tasks.tokens.byte_laws import REST, STOP, TINY, ByteLaws, first_classes
from tasks.tokens.ragged import add_up, expand, index_in_row, offsets_of, rows_of
from tasks.tokens.vocabulary import Vocabulary


class BytesObjective(ObjectiveModule):
    config: Bytes

    def __init__(self, config: Bytes, *, student: Vocabulary, teacher: Vocabulary):
        super().__init__(config)
        self.student, self.teacher = student, teacher
        self.laws = ByteLaws(student)

    # -- the teacher's side, in the align stage ------------------------------------------------------------------------

    def project(self, pairing: Pairing) -> Projection:
        counts, classes, masses = pairing.laws or self.teacher_laws(pairing)
        row = rows_of(pairing.teacher_offsets)
        ends = byte_ends(self.teacher.lengths[pairing.teacher_ids], pairing.teacher_offsets)
        begins = ends - self.teacher.lengths[pairing.teacher_ids]  # where the teacher stands before each of its tokens
        token, inside = self._student_place(pairing, row, begins)
        keep = token >= 0

        # Where the student is inside a token, it cannot stop: the teacher's law is taken given that it does not.
        owner = np.repeat(np.arange(len(row)), counts)
        wanted = keep[owner] & (classes != REST) & ~((inside[owner] > 0) & (classes == STOP))
        stop_mass = np.bincount(owner[classes == STOP], masses[classes == STOP], len(row)) * (inside > 0)
        masses = masses / np.maximum(1 - stop_mass, TINY)[owner]
        covered = np.bincount(owner[wanted], masses[wanted], len(row))
        # Terms read the distribution that chose the last token, for its cover, and the one after it.
        starts = np.where((inside == 0) & (token > 0), token - 1, token)
        with np.errstate(divide="ignore"):
            return Projection(
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

    def teacher_laws(self, pairing: Pairing) -> tuple[np.ndarray, ...]:
        """The law before each teacher token, covers applied: counts a token, classes, masses (sparse)."""
        vocabulary, ids = self.teacher, pairing.teacher_ids
        owner = np.repeat(np.arange(len(ids)), np.diff(pairing.top_offsets))
        mass = np.exp(pairing.top_logprobs)
        classes = first_classes(vocabulary)[pairing.top_ids]
        rest = np.exp(pairing.rest)

        # The cover of token j, read from the distribution that chose token j - 1.
        after = np.flatnonzero(index_in_row(pairing.teacher_offsets) > 0)
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

    def _student_place(self, pairing: Pairing, row: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For byte `at` of each row: the student token that holds the next byte, and how many of its bytes come before.

        A token of -1 where the student has none there. The stop stands behind the last byte, on both sides.
        """
        lengths = self.student.lengths[pairing.student_ids]
        ends = byte_ends(lengths, pairing.student_offsets)
        span = max(int(ends.max(initial=0)), int(at.max(initial=0))) + 2
        s_row = rows_of(pairing.student_offsets)
        # A stop has no bytes: give it one, so that it holds the place behind the last.
        found = np.searchsorted(s_row * span + ends + (lengths == 0), row * span + at, side="right")
        held = (found < len(ends)) & (np.append(s_row, -1)[found] == row)
        found = np.minimum(found, len(ends) - 1)
        inside = at - (ends - lengths)[found]
        return np.where(held, found - pairing.student_offsets[row], -1), np.where(held, inside, 0)

    # -- the student's side, in the train stage ------------------------------------------------------------------------

    def forward(self, logits: torch.Tensor, terms: Terms) -> torch.Tensor:
        law = self.laws(logits, terms.actual, terms.start, terms.end, terms.inside)
        student = law.gather(1, terms.ids).clamp(min=TINY).log().masked_fill(terms.logprobs.isneginf(), -torch.inf)
        return bucketed_jsd(terms.logprobs, terms.rest, student, self.config.beta)
