"""In what precision, and how, a step is computed on its device: the one place of the trainer that decides on it."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from configs.train import Train
from tasks.models.reference import ModelRef, dtype_of

ADAMW: dict[str, Any] = {"fused": True, "foreach": None}  # one kernel for all weights; every kind of device here has it


def autocasts(config: Train, ref: ModelRef) -> bool:
    """Whether float32 weights are cast to bfloat16 where they are used."""
    return config.param_dtype == "float32" and dtype_of(ref) == torch.bfloat16


def policy_of(config: Train) -> MixedPrecisionPolicy:
    """FSDP's: weights are float32 in their parts, and gathered in `param_dtype`; gradients are added up in float32."""
    half = config.param_dtype == "bfloat16"
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if half else MixedPrecisionPolicy()


def keep_in_half(weights: Iterable[nn.Parameter]) -> None:
    """Cast weights to bfloat16 where they lie. (A module's own `bfloat16` would cast its tables too.)"""
    for weight in weights:
        weight.data = weight.data.bfloat16()


class Masters:
    """float32 weights behind a module in bfloat16: steps are taken with them, so that no update is too small to be kept.

    The gradients of each backward pass are added to theirs in float32, and given up at once.
    """

    def __init__(self, module: nn.Module):
        """`module` is cast to bfloat16; what it was, in float32, is `module` here, with weights of the same names."""
        self.module = copy.deepcopy(module)
        keep_in_half(module.parameters())
        pairs = list(zip(module.parameters(), self.module.parameters(), strict=True))
        self.weights: list[torch.Tensor] = [weight for weight, _ in pairs]
        self.masters: list[torch.Tensor] = [master for _, master in pairs]
        for weight, master in pairs:
            weight.register_post_accumulate_grad_hook(partial(_hand_over, master))

    @torch.no_grad()
    def publish(self) -> None:
        """Round the float32 weights to the module's."""
        torch._foreach_copy_(self.weights, self.masters)


def _hand_over(master: torch.Tensor, weight: torch.Tensor) -> None:
    assert weight.grad is not None
    if master.grad is None:
        master.grad = weight.grad.float()
    else:
        master.grad.add_(weight.grad)
    weight.grad = None


def make_optimizer(weights: Iterable[nn.Parameter], config: Train) -> torch.optim.AdamW:
    """AdamW on those of the weights that are trained."""
    trained = [p for p in weights if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=config.adam_betas,
        **ADAMW,
    )


@contextmanager
def fast_products(on: bool) -> Iterator[None]:
    """TF32 for what is left in float32 beside products in bfloat16, which are coarser still."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
