"""The objectives that a recipe may name, and their options (MATHS.md §5)."""

from typing import Annotated, Literal

from pydantic import Field

from configs.fields import Float, Int, Table


class Divergence(Table):
    beta: Float = Field(1.0, ge=0, le=1, description="JSD's β: 0 forward KL(T‖S), 1 reverse KL(S‖T)")


class Gkd(Divergence):
    """Same tokenizer: the divergence at every position."""

    name: Literal["gkd"]
    rest: Literal["bucket", "drop", "renormalise"] = Field("bucket", description="what becomes of mass outside the top k")


class Uld(Table):
    """Sorted L1 over positions paired by index."""

    name: Literal["uld"]
    cross_entropy: Float = Field(0.0, ge=0, description="weight of cross-entropy on the rollout's own tokens")


class Gold(Divergence):
    """Units merged on both sides; a divergence on matched entries, sorted L1 on unmatched ones."""

    name: Literal["gold"]
    merge: Literal["chain", "sum", "observed"] = "chain"
    matched_weight: Float = Field(1.0, ge=0)
    unmatched_weight: Float = Field(1.0, ge=0)
    rest: Literal["bucket", "drop", "renormalise"] = "bucket"


class Bytes(Divergence):
    """The divergence of both models' next-byte laws where the teacher stands on a boundary."""

    name: Literal["bytes"]


class Strict(Table):
    """One-to-one units and the stop; both laws on matched ids alone, reverse KL on the likeliest."""

    name: Literal["strict"]
    top: Int = Field(16, ge=1, le=1024, description="likeliest ids of either side that are compared")


class Alm(Table):
    """A unit's probability on both sides, as two coins."""

    name: Literal["alm"]
    beta: Float = Field(0.0, ge=0, le=1, description="JSD's β: 0 forward KL(T‖S), 1 reverse KL(S‖T)")
    temperature: Float = Field(1.0, gt=0, le=1000, description="τ: probabilities are taken to the power 1/τ")


class Bpm(Divergence):
    """The teacher's mass at a unit's start, carried onto student tokens by their bytes."""

    name: Literal["bpm"]


class Opd(Table):
    """Policy gradient on the log-ratio of a unit; on-policy rows only."""

    name: Literal["opd"]
    clip: Float = Field(2.0, ge=1, description="C: largest importance weight")


class Sft(Table):
    """Cross-entropy on the rows' own tokens; no teacher signal."""

    name: Literal["sft"]
    corrupt_rows: Float = Field(0.0, ge=0, le=1, description="share of rows whose input is corrupted")
    corrupt_tokens: Float = Field(
        0.3, ge=0, le=1, description="share of completion tokens replaced in such a row's input; the labels stay"
    )


# What each objective can be computed from.
SIGNALS = {
    **dict.fromkeys(("gkd", "uld", "gold", "strict", "bpm"), ("topk", "hidden")),
    "bytes": ("topk", "bytes", "hidden"),
    **dict.fromkeys(("alm", "opd", "sft"), ("topk", "bytes", "hidden", "sampled")),
}

Objective = Annotated[Gkd | Uld | Gold | Bytes | Strict | Alm | Bpm | Opd | Sft, Field(discriminator="name")]
