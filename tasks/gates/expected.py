"""The gate on what both sides expect of an answer's beginning: whether one thinks there and the other does not."""

import re
from collections import defaultdict

import numpy as np

from tasks.gates.gate import Gate
from tasks.gates.sample import Sample
from tasks.models.reference import ModelRef
from tasks.models.text import Side, side
from tasks.signals import make_signal

TAG = re.compile(r"<\|?(/?)(think|thinking|thought|reason|reasoning)\|?>|\[(/?)THINK\]", re.IGNORECASE)
OPENERS = ("<think>", "<thinking>", "<thought>", "<reasoning>", "[THINK]")  # where they are text of several tokens
TEXT = "text"
K = 64  # first tokens that are looked at

Events = dict[str, float]  # mean probabilities of TEXT, tokens that are written first, and tags that the prompt has opened


def expect(sample: Sample, role: str, ref: ModelRef) -> Events:
    """What a side's answers begin with, over the prompts of a sample, in names that both sides share."""
    text_side, events = side(ref), defaultdict[str, float](float)
    prompts = [text_side.render(*prompt) for prompt in sample.asked]
    signal = make_signal("topk", min(K, text_side.vocabulary.size))
    scores = sample.engine(ref).score(prompts, [text_side.stop_ids[:1] for _ in prompts], signal)
    names = _shared_names(sample, role, text_side)
    for ids, (messages, *_), scored in zip(prompts, sample.asked, scores, strict=True):
        if tag := find_open_tag(str(text_side.tokenizer.decode(ids, skip_special_tokens=False)), str(messages[-1]["content"])):
            events[f"{tag}, which its prompt has opened"] += 1 / len(prompts)
            continue
        first = scored.columns["top_ids"].tolist(), np.exp(scored.columns["top_logprobs"].astype(float)).tolist()
        for i, mass in zip(*first, strict=True):
            events[names.get(i) or _name(text_side, i)] += mass / len(prompts)
    return {**events, TEXT: events[TEXT] + max(1 - sum(events.values()), 0)}


def find_open_tag(text: str, content: str) -> str | None:
    """The tag of thinking that a prompt leaves open behind the `content` of its last message; None where there is none."""
    last = [*TAG.finditer(text.rpartition(content)[2])][-1:]
    return None if not last or last[0][1] or last[0][3] else last[0][0]


def expected_gate(sample: Sample, *, student: Events, teacher: Events) -> Gate:
    """How much of what comes first differs: the distance of both sides' probabilities of each token and of text."""
    distance = sum(abs(student.get(name, 0) - teacher.get(name, 0)) for name in student | teacher) / 2
    told = "; ".join(f"{role} {_tell(events)}" for role, events in (("student", student), ("teacher", teacher)))
    return Gate("expected", distance, sample.recipe.gates.expected, detail=f"an answer begins with: {told}")


def _tell(events: Events) -> str:
    likeliest = sorted(events.items(), key=lambda event: -event[1])
    return ", ".join(f"{name} {mass:.0%}" for name, mass in likeliest[:2] if mass >= 0.01)


def _shared_names(sample: Sample, role: str, text_side: Side) -> dict[int, str]:
    """Names of a side's control tokens: the student's own where a marker begins with them, else marked as this side's."""
    if sample.teacher is None or (markers := sample.markers(sample.teacher)).same:
        return {}
    roles, student = text_side.beta.roles, side(sample.student)
    names = {i: f"{_name(text_side, i)} ({role}'s)" for i, kind in enumerate(roles) if kind == "control"}
    for own, other in markers.pairs:
        names[(own if role == "student" else other).ids[0]] = _name(student, own.ids[0])
    return names


def _name(text_side: Side, i: int) -> str:
    """A token that begins something other than text, by its content; TEXT for others."""
    value = text_side.beta.values[i]
    if value is None:
        return str(text_side.tokenizer.convert_ids_to_tokens(i)) if text_side.beta.roles[i] == "control" else TEXT
    text = value.decode(errors="replace")
    return next((tag for tag in OPENERS if tag.startswith(text) or text.startswith(tag)), TEXT)
