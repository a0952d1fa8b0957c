"""`sft`: cross-entropy on the rows' own tokens."""

import numpy as np
import pyarrow as pa
import torch

from configs.objectives import Sft
from tasks.objectives.base import ObjectiveModule, Pairing, Projection, Terms
from tasks.tokens.ragged import flat, index_in_row, ragged, rows_of
from tasks.tokens.vocabulary import Vocabulary


class SftObjective(ObjectiveModule):
    config: Sft

    def __init__(self, config: Sft, *, student: Vocabulary, teacher: Vocabulary):
        super().__init__(config)
        self.lengths = student.lengths

    def project(self, pairing: Pairing) -> Projection:
        ids, offsets = pairing.student_ids, pairing.student_offsets
        position = index_in_row(offsets)
        return Projection(
            offsets=offsets,
            starts=position,
            ends=position + 1,
            counts=np.ones(len(ids), np.int64),
            ids=ids,
            logprobs=np.zeros(len(ids)),
            rest=np.full(len(ids), -np.inf),
            supervised=np.bincount(rows_of(offsets), self.lengths[ids], pairing.rows).astype(np.int64),
        )

    def prepare(self, rows: pa.Table, seed: int) -> pa.Table:
        share = self.config.corrupt_rows
        return corrupt_tokens(rows, share, self.config.corrupt_tokens, seed) if share else rows

    def forward(self, logits: torch.Tensor, terms: Terms) -> torch.Tensor:
        return -logits.log_softmax(-1)[terms.start, terms.ids[:, 0]]


def corrupt_tokens(rows: pa.Table, rows_share: float, tokens_share: float, seed: int) -> pa.Table:
    """`rows` with a column `input_ids`: `token_ids` where some are replaced by others of the table.

    A model that has read wrong tokens in training can still grade what comes behind a student's mistake.
    """
    random = np.random.default_rng(seed)
    tokens, offsets = flat(rows["token_ids"])
    row = rows_of(offsets)
    chosen = (random.random(len(rows)) < rows_share)[row] & (random.random(len(row)) < tokens_share)
    shown = np.where(chosen, random.permutation(tokens), tokens)
    return rows.append_column("input_ids", ragged(shown, offsets, pa.int32()))
