"""The objectives that a recipe may name, with their options and needs (MATHS.md §5). Each is declared once.

`tasks/objectives/NAME.py` computes an objective.
"""

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field

from configs.fields import Float, Int, Table
from configs.signals import Quantity

OBJECTIVES: "dict[str, type[ObjectiveConfig]]" = {}  # by name, in the order of this file
IDS: frozenset[Quantity] = frozenset(("ids",))
PATH: frozenset[Quantity] = frozenset(("path",))
REST = "how mass outside the top k is treated"


class ObjectiveConfig(Table):
    """`[objective]` of a recipe. A subclass with a `name` is an objective; its class variables declare what it needs."""

    name: str
    reads: ClassVar[frozenset[Quantity]]  # of the teacher; one of them is enough
    needs_teacher: ClassVar[bool] = True
    one_tokenizer: ClassVar[bool] = False  # both sides must have the same
    needs_matches: ClassVar[bool] = False  # compares ids that both vocabularies have
    needs_one_to_one: ClassVar[bool] = False  # units of several tokens teach it little, or mislead it
    given_text: ClassVar[bool] = False  # learns from references or the teacher's completions alone: rollout.on_policy = 0

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        if names := get_args(cls.model_fields["name"].annotation):
            OBJECTIVES[names[0]] = cls


class JsdConfig(ObjectiveConfig):
    """Base of the objectives that compare two distributions by JSD."""

    beta: Float = Field(1.0, ge=0, le=1, description="JSD's β: 0 forward KL(T‖S), 1 reverse KL(S‖T)")


class Gkd(JsdConfig):
    """The divergence at every position, for one tokenizer on both sides."""

    name: Literal["gkd"]
    rest: Literal["bucket", "drop", "renormalise"] = Field("bucket", description=REST)

    reads = IDS
    one_tokenizer = True
    needs_matches = True


class Uld(ObjectiveConfig):
    """Sorted L1 over positions paired by index."""

    name: Literal["uld"]
    cross_entropy: Float = Field(0.0, ge=0, description="weight of the cross-entropy on the rollout's tokens")

    reads = IDS
    needs_matches = True


class Gold(JsdConfig):
    """Units merged on both sides: a divergence on matched entries, sorted L1 on unmatched ones."""

    name: Literal["gold"]
    merge: Literal["chain", "sum", "observed"] = Field("chain", description="how the tokens of a unit become one distribution")
    matched_weight: Float = Field(1.0, ge=0, description="weight of the divergence on matched entries")
    unmatched_weight: Float = Field(1.0, ge=0, description="weight of the sorted L1 on unmatched ones")
    rest: Literal["bucket", "drop", "renormalise"] = Field("bucket", description=REST)

    reads = IDS
    needs_matches = True
    needs_one_to_one = True


class Bytes(JsdConfig):
    """The divergence of both models' next-byte laws where the teacher stands on a boundary."""

    name: Literal["bytes"]

    reads: ClassVar[frozenset[Quantity]] = frozenset(("laws", "ids"))


class Strict(ObjectiveConfig):
    """One-to-one units and the stop: both distributions on matched ids only, reverse KL on the likeliest of them."""

    name: Literal["strict"]
    top: Int = Field(16, ge=1, le=1024, description="how many of the likeliest ids of each side are compared")

    reads = IDS
    needs_matches = True
    needs_one_to_one = True


class Alm(ObjectiveConfig):
    """JSD of a unit's probability on both sides, each taken as a coin (p, 1 - p)."""

    name: Literal["alm"]
    beta: Float = Field(0.0, ge=0, le=1, description="JSD's β: 0 forward KL(T‖S), 1 reverse KL(S‖T)")
    temperature: Float = Field(1.0, gt=0, le=1000, description="τ: probabilities are taken to the power 1/τ")

    reads = PATH


class Bpm(JsdConfig):
    """The teacher's mass at a unit's start, carried onto student tokens by their bytes."""

    name: Literal["bpm"]

    reads = IDS
    needs_matches = True


class Opd(ObjectiveConfig):
    """Policy gradient on the log-ratio of a unit; on-policy rows only."""

    name: Literal["opd"]
    clip: Float = Field(2.0, ge=1, description="C: largest importance weight")

    reads = PATH


class Sft(ObjectiveConfig):
    """Cross-entropy on the rows' tokens, without a teacher's signal."""

    name: Literal["sft"]
    corrupt_rows: Float = Field(0.0, ge=0, le=1, description="share of rows whose input is corrupted")
    corrupt_tokens: Float = Field(
        0.3, ge=0, le=1, description="share of completion tokens replaced in the input of a corrupted row; the labels stay"
    )

    reads = PATH
    needs_teacher = False
    given_text = True


class RewardAlone(ObjectiveConfig):
    """No teacher: rewards alone ([reward], MATHS.md §10)."""

    name: Literal["reward"]

    reads = PATH
    needs_teacher = False


if TYPE_CHECKING:
    Objective = ObjectiveConfig
else:
    Objective = Annotated[reduce(or_, OBJECTIVES.values()), Field(discriminator="name")]
