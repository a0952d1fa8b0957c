"""`[score]` of a recipe: what is stored of a teacher."""

from pydantic import Field

from configs.fields import Float, Int, Table
from configs.signals import SignalName


class Score(Table):
    """What is stored of the teacher at every token, beside the log-prob of the token itself."""

    signal: SignalName = Field(
        "topk",
        description="topk: the likeliest ids and the mass of the rest; bytes: the law of the next byte, for any student; "
        "hidden: the last hidden state, from which everything can be computed later; sampled: nothing more",
    )
    k: Int = Field(
        64, ge=1, description="most ids (or bytes) a token; with signal = 'hidden' taken at alignment, so that it can change"
    )
    top_p: Float = Field(1.0, gt=0, le=1, description="stop below k once this mass is reached")
    batch_tokens: Int = Field(16_384, ge=1, description="tokens scored at once, padding included")
