"""`sft` (MATHS.md §5): cross-entropy on the completion's own ids."""

import numpy as np
import torch
from hypothesis import given, settings
from toys import SEEDS, losses, random_rows, random_vocabulary

from configs.objectives import Sft
from tasks import objectives


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_sft_is_cross_entropy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    toy = random_vocabulary(rng, stops=2)
    rows = random_rows(rng, toy, toy, same_ids=True)
    logits = torch.from_numpy(np.concatenate(rows.s) + 3.0)
    labels = torch.tensor([i for ids in rows.student_ids for i in ids])
    wanted = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert torch.allclose(losses(objectives.build(Sft(name="sft"), student=toy, teacher=toy), rows), wanted)
