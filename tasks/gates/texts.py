"""Gates of preflight that need no weights: both tokenizers and templates on the prompts."""

from collections.abc import Iterator

import pyarrow as pa

from tasks.gates.gate import Gate
from tasks.gates.sample import Sample
from tasks.models.text import Side, side


def text_gates(sample: Sample) -> Iterator[Gate]:
    """Both tokenizers and templates on the prompts."""
    limits = sample.recipe.gates
    references = [text for text in sample.prompts["reference"].to_pylist() if text]
    for role, ref in sample.sides().items():
        text_side = side(ref)
        framed = [text_side.frame(prompt.messages, prompt.fields) for prompt in sample.asked]
        texts = [message["content"] for messages in framed for message in messages] + references
        yield stops_gate(role, text_side)
        spelled = [ids is not None for ids in text_side.encoder.encode(texts)]
        detail = f"of {len(texts)} texts" if all(spelled) else f"for example, not {texts[spelled.index(False)]!r:.60}"
        yield Gate(f"{role}: spelled", sum(spelled) / len(texts), limits.spelled, detail=detail)
        rendered = [text_side.render(*prompt) for prompt in sample.asked]
        yield template_gate(role, text_side, rendered)
        yield Gate(f"{role}: boundary", measure_boundary(text_side, sample.prompts, rendered), limits.boundary)


def stops_gate(role: str, text_side: Side) -> Gate:
    """How many ids end an answer, as text; a template whose turn never ends has none to show for it."""
    names = " ".join(text_side.tokenizer.convert_ids_to_tokens(text_side.stop_ids))
    if text_side.ref.rendering == "plain":
        return Gate(f"{role}: stops", len(text_side.stop_ids), detail=names)
    if text_side.turn_end is None:
        return Gate(f"{role}: stops", 0, 1, detail=f"no token behind an assistant's turn in its template; it has {names}")
    end = text_side.tokenizer.convert_ids_to_tokens(text_side.turn_end)
    return Gate(f"{role}: stops", len(text_side.stop_ids), 1, detail=f"{names}; a turn of its template ends in {end}")


def template_gate(role: str, text_side: Side, rendered: list[list[int]]) -> Gate:
    """Prompts that do not begin as they should: with one BOS where the tokenizer itself writes one, and never with two."""
    bos = text_side.tokenizer.bos_token_id
    wanted = int(bos is not None and text_side.tokenizer("a")["input_ids"][:1] == [bos])
    counts = [next((i for i, token in enumerate(ids) if token != bos), len(ids)) for ids in rendered]
    wrong = sum(count > 1 or count < wanted for count in counts)
    right = "1" if wanted else "0 or 1"
    detail = f"the first prompt begins with {counts[0]} BOS, {right} expected; the figure counts prompts that begin otherwise"
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
