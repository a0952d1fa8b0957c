"""`gold`: a divergence of units that are merged on both sides. With one tokenizer it is exactly `gkd`.

"Unlocking On-Policy Distillation for Any Model Family"; the merges are described in MATHS.md §5.
"""

import numpy as np
import torch

from configs.objectives import Gold
from tasks.objectives.base import WHOLE, ObjectiveModule, Pairing, Projection, Terms, log_of, unit_sums
from tasks.objectives.classes import Classes, Subset
from tasks.objectives.divergences import bucketed_jsd
from tasks.tokens.align import Kind
from tasks.tokens.byte_laws import expand_ranges
from tasks.tokens.masses import read_masses
from tasks.tokens.ragged import add_up, expand
from tasks.tokens.vocabulary import Vocabulary, match_to_student

IMPOSSIBLE = -1000.0  # a log mass whose exponential is 0


class GoldObjective(ObjectiveModule):
    """JSD on matched ids and sorted L1 on unmatched ones, per merged unit."""

    config: Gold

    def __init__(self, config: Gold, *, student: Vocabulary, teacher: Vocabulary):
        super().__init__(config)
        self.to_student = match_to_student(student=student, teacher=teacher)
        self.teacher_class, self.student_class = teacher.representative, student.representative
        self.teacher_size = teacher.size
        matched = np.zeros(student.size, bool)
        matched[self.to_student[self.to_student >= 0]] = True
        unmatched = np.flatnonzero(~matched & (student.representative == np.arange(student.size)))
        self.unmatched = Subset(student, unmatched)
        self.classes = Classes(student)

    def project(self, pairing: Pairing) -> Projection:
        """Units as terms. All of the teacher's stop ids become one event, the student's stop (`to_student`)."""
        units = pairing.units
        row = units.rows
        first = pairing.teacher_offsets[row] + units.teacher_starts
        last = pairing.teacher_offsets[row] + units.teacher_ends - 1
        total = np.concatenate([[0.0], np.cumsum(pairing.teacher_logprobs)])
        if self.config.merge == "sum":
            teacher_ids, logprobs, unit = self._sum(pairing, first, last)
        else:
            at = last if self.config.merge == "chain" else first
            path = total[last + 1] - total[first] - pairing.teacher_logprobs[at]  # the unit's other tokens
            entries, unit = expand(pairing.top_offsets[at], pairing.top_offsets[at + 1])
            logprobs = pairing.top_logprobs[entries] + path[unit]
            teacher_ids = pairing.top_ids[entries]

        markers = np.flatnonzero(units.kind == Kind.MARKER)
        text = units.kind[unit] != Kind.MARKER
        teacher_ids, logprobs, unit = teacher_ids[text], logprobs[text], unit[text]
        ids, mass = self.to_student[teacher_ids], np.exp(logprobs)
        hit = ids >= 0
        held, marker_ids, marker_mass = self._events_of_markers(pairing, markers)
        counts, target_ids, masses = add_up(
            np.concatenate([unit[hit], held]),
            np.concatenate([ids[hit].astype(np.int64), marker_ids]),
            np.concatenate([mass[hit], marker_mass]),
            len(row),
        )
        owner = np.repeat(np.arange(len(row)), counts)
        covered = np.bincount(owner, masses, len(row))
        classes = self.teacher_class[teacher_ids[~hit]].astype(np.int64)
        unmatched_counts, _, unmatched = add_up(unit[~hit], classes, mass[~hit], len(row))
        order = np.lexsort((-unmatched, np.repeat(np.arange(len(row)), unmatched_counts)))
        with np.errstate(divide="ignore"):
            return Projection(
                offsets=units.offsets,
                starts=units.student_starts,
                ends=units.student_ends,
                counts=counts,
                ids=target_ids,
                logprobs=np.log(masses),
                rest=np.log(np.maximum(1 - covered, 0)),
                supervised=np.bincount(row, units.sizes * (counts > 0), pairing.rows).astype(np.int64),
                inside=np.where(units.kind == Kind.MARKER, WHOLE, 0) if len(markers) else None,
                unmatched_counts=unmatched_counts,
                unmatched_logprobs=np.log(unmatched[order]),
            )

    def _events_of_markers(self, pairing: Pairing, markers: np.ndarray) -> tuple[np.ndarray, ...]:
        """A marker is one event: its units, the student ids that stand for it in the merged vector, and P_T of its path.

        In a product of experts (`sum`) no id stands for a path.
        """
        if self.config.merge == "sum":
            return markers[:0], markers[:0], np.zeros(0)
        units = pairing.units
        at = units.student_ends - 1 if self.config.merge == "chain" else units.student_starts
        token = pairing.student_offsets[units.rows[markers]] + at[markers]
        stand = self.student_class[pairing.student_ids[token]].astype(np.int64)
        return markers, stand, np.exp(pairing.paths[markers])

    def _sum(self, pairing: Pairing, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, ...]:
        """softmax(Σ_i log p_i) per unit. An id outside a token's top k gets an even share of that token's rest.

        Exact where the top k is the vocabulary. Returns teacher ids, log masses and their units, all flat.
        """
        tokens, unit_of_token = expand(first, last + 1)
        sizes = np.diff(pairing.top_offsets)[tokens]
        with np.errstate(divide="ignore"):
            floor = pairing.rest[tokens] - np.log(np.maximum(self.teacher_size - sizes, 1))
        floor = np.maximum(floor, IMPOSSIBLE)
        entries, token = expand(pairing.top_offsets[tokens], pairing.top_offsets[tokens + 1])
        lift = pairing.top_logprobs[entries] - floor[token]
        counts, ids, lifts = add_up(unit_of_token[token], pairing.top_ids[entries].astype(np.int64), lift, len(first))
        unit = np.repeat(np.arange(len(first)), counts)
        base = np.bincount(unit_of_token, floor, len(first))
        logits = lifts + base[unit]
        outside = (self.teacher_size - counts) * np.exp(base)
        normaliser = np.log(np.bincount(unit, np.exp(logits), len(first)) + outside)
        return ids, logits - normaliser[unit], unit

    def forward(self, logits: torch.Tensor, terms: Terms) -> torch.Tensor:
        actual = terms.actual
        if self.config.merge == "sum":
            position, unit = expand_ranges(terms.start, terms.end)
            # Σ log p and Σ logits differ by a constant, which does not change the softmax.
            logits = logits.new_zeros(len(terms.start), logits.shape[1]).index_add(0, unit, logits[position])
            at, actual = torch.arange(len(logits), device=logits.device), actual[:0]
        else:
            at = terms.end - 1 if self.config.merge == "chain" else terms.start
        ids, events = terms.ids, terms.ids.shape[1]
        unmatched = self.config.unmatched_weight if len(self.unmatched) else 0

        def find(mass: torch.Tensor) -> torch.Tensor:
            nonlocal ids
            if unmatched:
                ids = torch.cat([terms.ids, self.unmatched.top(mass, terms.unmatched.shape[1])[at]], 1)
            path = torch.arange(len(actual), device=mass.device) * mass.shape[1] + actual
            return torch.cat([path, self.classes.places(at, ids)])

        read, totals, _ = read_masses(logits, find, self.unmatched if unmatched else None)
        law = self.classes.add_up(read[len(actual) :], ids)
        path = log_of(read[: len(actual)])
        # the log mass of the unit's other tokens
        rest_of_path = unit_sums(path, terms) - path[at] if len(actual) else law.new_zeros(len(law))
        student = (log_of(law[:, :events]) + rest_of_path[:, None]).masked_fill(terms.logprobs.isneginf(), -torch.inf)
        loss = bucketed_jsd(terms.logprobs, terms.rest, student, self.config.beta, self.config.rest)
        loss = self.config.matched_weight * loss
        if unmatched:
            path_mass = rest_of_path.exp()
            top, total = law[:, events:] * path_mass[:, None], totals[at, 0] * path_mass
            difference = self._sorted_l1(top, total, terms.unmatched.exp())
            loss = loss + unmatched * difference.masked_fill(terms.inside == WHOLE, 0)
        return loss

    @staticmethod
    def _sorted_l1(top: torch.Tensor, total: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Σ_k |s_(k) - t_(k)| of two sets of masses, the shorter one padded with zeros: `[terms]`.

        `teacher` `[terms, K']` is sorted, the largest first. Of the student the largest masses `top` `[terms, k]` and the
        `total` `[terms]` are enough: the teacher has no more masses above 0.
        """
        k = top.shape[1]
        difference = (top - teacher[:, :k]).abs().sum(-1) + teacher[:, k:].sum(-1)
        return difference + (total - top.sum(-1)).clamp(min=0)
