"""Gates of preflight that need no weights: both tokenizers and templates on the prompts."""

from collections.abc import Iterator

import pyarrow as pa
from transformers import AutoConfig

from tasks.gates.gate import Gate
from tasks.gates.sample import Sample
from tasks.models.reference import ModelRef
from tasks.models.text import Side, side


def text_gates(sample: Sample) -> Iterator[Gate]:
    """Both tokenizers and templates on the prompts."""
    limits = sample.recipe.gates
    texts = [m["content"] for messages in sample.messages for m in messages]
    texts += [text for text in sample.prompts["reference"].to_pylist() if text]
    for role, ref in sample.sides().items():
        text_side = side(ref)
        spelled = [ids is not None for ids in text_side.encoder.encode(texts)]
        detail = f"of {len(texts)} texts" if all(spelled) else f"for example, not {texts[spelled.index(False)]!r:.60}"
        yield Gate(f"{role}: spelled", sum(spelled) / len(texts), limits.spelled, detail=detail)
        rendered = [text_side.render(messages) for messages in sample.messages]
        yield template_gate(role, text_side, rendered)
        yield Gate(f"{role}: boundary", measure_boundary(text_side, sample.prompts, rendered), limits.boundary)
        longest = max(map(len, rendered))
        if context := context_of(ref):
            needed = longest + sample.recipe.rollout.max_new_tokens
            detail = f"longest prompt ({longest} tokens) plus rollout.max_new_tokens; the limit is the model's context"
            yield Gate(f"{role}: room", needed, context, detail=detail)


def template_gate(role: str, text_side: Side, rendered: list[list[int]]) -> Gate:
    """Prompts that do not begin as they should: with one BOS where the tokenizer itself writes one, and never with two."""
    bos = text_side.tokenizer.bos_token_id
    wanted = int(bos is not None and text_side.tokenizer("a")["input_ids"][:1] == [bos])
    counts = [next((i for i, token in enumerate(ids) if token != bos), len(ids)) for ids in rendered]
    wrong = sum(count > 1 or count < wanted for count in counts)
    detail = f"the first prompt begins with {counts[0]} BOS, {wanted} expected; the figure counts prompts that begin otherwise"
    return Gate(f"{role}: template", wrong, 0, detail=detail)


def measure_boundary(text_side: Side, prompts: pa.Table, rendered: list[list[int]]) -> float | None:
    """Share of prompts whose tokens stay the same when their reference follows; None without references."""
    tokenizer, kept = text_side.tokenizer, []
    for ids, reference in zip(rendered, prompts["reference"].to_pylist(), strict=True):
        if reference:
            text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            alone, followed = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, text + reference))
            kept.append(followed[: len(alone)] == alone)
    return sum(kept) / len(kept) if kept else None


def context_of(ref: ModelRef) -> int | None:
    """The longest sequence that a model's positions allow; None where its config does not say."""
    config = AutoConfig.from_pretrained(ref.local, trust_remote_code=ref.trust_remote_code).get_text_config()
    return getattr(config, "max_position_embeddings", None)
