"""Arrow schemas of a run's tables: the public contract. Columns may be added, none renamed."""

import pyarrow as pa

LEFT_OUT = "left_out"  # the status of a row that rollout.keep does not let go on

_ids = pa.list_(pa.int32())
_logprobs = pa.list_(pa.float32())

VOCAB = pa.schema(
    {
        "token_id": pa.int32(),
        "bytes": pa.binary(),  # null for special tokens
        "role": pa.string(),  # text, stop, bos, pad, control
        "match_id": pa.int32(),  # id of the same class in the other vocabulary; -1: none
        "prefix_id": pa.int32(),  # the other vocabulary's longest token that is a byte prefix; -1: none
    }
)


TURNS = {"trajectory_id": pa.string(), "turn": pa.int32()}  # only where conversations are read turn by turn


def prompts_schema(of_messages: tuple[str, ...] = (), tools: bool = False, turns: bool = False) -> pa.Schema:
    """Of `prompts`: with the fields of messages, and the tools, that a source has beside role and content; with `turns`."""
    message = pa.struct({name: pa.string() for name in ("role", "content", *of_messages)})  # tool_calls as JSON
    columns = {
        "prompt_id": pa.string(),
        "messages": pa.list_(message),
        "reference": pa.string(),
        "metadata": pa.string(),  # JSON
        "split": pa.string(),  # train, eval
    }
    return pa.schema(columns | ({"tools": pa.string()} if tools else {}) | (TURNS if turns else {}))  # tools as JSON


PROMPTS = prompts_schema()

ACCOUNTS = pa.schema(
    {
        "source": pa.string(),  # a path of the recipe, a dataset, a task
        "read_as": pa.string(),  # the convention
        "outcome": pa.string(),  # what became of rows; those of all outcomes are the rows that were read
        "rows": pa.int64(),
        "without_reference": pa.int64(),  # of these rows
    }
)

COMPLETIONS = pa.schema(
    {
        "rollout_id": pa.string(),
        "prompt_id": pa.string(),
        "policy": pa.string(),  # digest of the teacher
        "text": pa.string(),  # without control tokens
        "token_ids": _ids,  # as sampled, stop included
        "finish_reason": pa.string(),  # stop, length
        "engine": pa.string(),  # the engine that sampled it, with its version
    }
)

ROLLOUTS = pa.schema(
    {
        "rollout_id": pa.string(),
        "prompt_id": pa.string(),
        **TURNS,
        "round": pa.int32(),
        "sample": pa.int32(),
        "source": pa.string(),  # student, teacher, reference
        "policy": pa.string(),  # digest of the model that wrote it; empty for references
        "prompt_token_ids": _ids,
        "token_ids": _ids,  # as sampled, stop included
        "logprobs": _logprobs,  # of token_ids under the behaviour policy; null where the student did not sample
        # Only where rollouts are drawn at another temperature than 1, or with top_p or top_k: of token_ids under the student
        # itself, the stop as one event. Else `logprobs` are those, and a table has no such column.
        "model_logprobs": _logprobs,
        "text": pa.string(),  # without control tokens
        "finish_reason": pa.string(),  # stop, length
        "seed": pa.int64(),
        "engine": pa.string(),
    }
)

REWARDS = pa.schema(
    {
        "rollout_id": pa.string(),  # of the student's own samples
        "score": pa.float64(),  # by evaluate.scorer, 1: right; null where there is nothing to grade by
        "advantage": pa.float32(),  # among the samples of the same prompt; 0 where all are equal or nothing is graded
        "kept": pa.bool_(),  # whether the row goes on to scoring and training
    }
)

SCORES = pa.schema(
    {
        "rollout_id": pa.string(),
        "teacher": pa.string(),  # digest
        "teacher_name": pa.string(),  # only where there are several: as `teachers` names it
        "token_ids": _ids,  # the teacher's own, stop included
        "logprobs": _logprobs,
        # The signal: the columns of the recipe's score.signal; the others are null. `sampled` has none.
        "top_ids": _ids,  # topk: flat; top_counts says how many belong to each token
        "top_logprobs": pa.list_(pa.float16()),
        "top_counts": pa.list_(pa.int16()),
        "law_classes": pa.list_(pa.int16()),  # bytes: the next byte, or 256 for the stop; flat, law_counts per token
        "law_logprobs": pa.list_(pa.float16()),
        "law_counts": pa.list_(pa.int16()),
        "rest": _logprobs,  # topk, bytes: log mass outside the events
        "hidden": pa.large_list(pa.float16()),  # hidden: last hidden states, flat, the model's width per token
        "status": pa.string(),  # ok, or why the row was not scored
    }
)

# A cache (`storage.caches`): texts with what a teacher said of them, its vocabulary, and the prompts without their split.
CACHED_TEXTS = pa.schema(
    [
        pa.field("prompt_id", pa.string()),
        pa.field("source", pa.string()),  # teacher: its own completion; reference: it was given
        pa.field("text", pa.string()),  # without control tokens
        pa.field("finish_reason", pa.string()),  # stop, length
        *(SCORES.field(name) for name in ("token_ids", "logprobs", "law_classes", "law_logprobs", "law_counts", "rest")),
    ]
)
CACHED_VOCAB = pa.schema([VOCAB.field(name) for name in ("token_id", "bytes", "role")])

ALIGNED = pa.schema(
    {
        "rollout_id": pa.string(),
        "teacher_name": pa.string(),  # only where there are several
        "student_ends": _ids,  # exclusive ends in student tokens, one per unit (and per skipped token), the stop unit last
        "teacher_ends": _ids,
        "byte_ends": _ids,
        "kind": pa.list_(pa.int8()),  # tasks/tokens/align.py: Kind
        # A unit's under the student itself, whichever law it was drawn by, 0 for a skipped token; null: not sampled.
        "student_logprobs": _logprobs,
        "teacher_logprobs": _logprobs,
        "status": pa.string(),
        "supervised_bytes": pa.int32(),  # these four sum to the completion's bytes
        "unmatched_bytes": pa.int32(),
        "dropped_bytes": pa.int32(),
        "tail_bytes": pa.int32(),
        "units": pa.int32(),  # terms of the loss
        "unpaired": pa.int32(),  # control tokens that the teacher's side has no counterpart for: skipped, or the row's end
        "canonical": pa.bool_(),  # whether the ids are the encoding of the text
        # The objective's projection of the teacher: one entry per term, in order (tasks/objectives/base.py).
        "term_starts": _ids,  # student tokens whose next-token distributions the term reads
        "term_ends": _ids,  # exclusive
        "term_inside": _ids,  # bytes of the last of them that were read before; null where not used
        "term_behaviour": _logprobs,  # the term's log-prob under the policy that sampled it; null where not used
        "target_counts": _ids,
        "target_ids": _ids,  # flat events: student ids, or classes of bytes
        "target_logprobs": _logprobs,
        "target_rest": _logprobs,  # log mass outside those events
        "unmatched_counts": _ids,
        "unmatched_logprobs": _logprobs,
    }
)

STEPS = pa.schema(
    {
        "step": pa.int32(),  # counted over the whole run
        "round": pa.int32(),
        "loss": pa.float64(),  # nats per unit
        "grad_norm": pa.float64(),
        "learning_rate": pa.float64(),
        "rows": pa.int32(),
        "units": pa.int64(),
        "tokens": pa.int64(),  # student tokens, prompt and completion
        "seconds": pa.float64(),
    }
)

EVALS = pa.schema(
    {
        "model": pa.string(),  # student, teacher
        "teacher_name": pa.string(),  # only where there are several: the one that the prompt belongs to
        "round": pa.int32(),
        "decoding": pa.string(),  # greedy, sampled; cached: a held-out text of a cache, in place of an answer
        "prompt_id": pa.string(),
        "sample": pa.int32(),
        "text": pa.string(),
        "reference": pa.string(),
        "score": pa.float64(),  # null, as `correct`, where there is nothing to grade by
        "correct": pa.bool_(),
        "finish_reason": pa.string(),
        "tokens": pa.int32(),
        "bytes": pa.int32(),
        "logprob": pa.float64(),  # of the completion under the model that wrote it, at temperature 1 and over all tokens
        "teacher_logprob": pa.float64(),  # under the teacher; null where the text is not all that was sampled
        # (logprob - teacher_logprob) / bytes: one sample of KL(student ‖ teacher), nats per byte. Of a cached text
        # KL(teacher ‖ student) of next-byte laws, summed over it, / bytes.
        "divergence": pa.float64(),
    }
)

GATES = pa.schema(
    {
        "gate": pa.string(),
        "round": pa.int32(),
        "value": pa.float64(),  # null: nothing to measure it on
        "detail": pa.string(),
    }
)

TEACHER = "teacher_name"


def without_teacher(schema: pa.Schema) -> pa.Schema:
    """The columns of a table where a recipe has one teacher, or none: no name is needed."""
    return schema.remove(schema.get_field_index(TEACHER))


SCHEMAS = {
    "vocab": VOCAB,
    "prompts": PROMPTS,
    "accounts": ACCOUNTS,
    "completions": COMPLETIONS,
    "rollouts": ROLLOUTS,
    "rewards": REWARDS,
    "scores": SCORES,
    "aligned": ALIGNED,
    "steps": STEPS,
    "evals": EVALS,
    "gates": GATES,
}


def explain_columns(table: str, found: pa.Schema) -> str | None:
    """Why a file with these columns is no part of `table`; None where it is one. Older runs lack columns that came later."""
    wanted = [column for column in SCHEMAS.get(table, found) if column.name in found.names]
    if not wanted:
        return f"it has no column of {table}"
    for column in wanted:
        kind = found.field(column.name).type
        if _outline(kind) != _outline(column.type):
            return f"its column {column.name} is {kind}, not {column.type}"
    return None


def _outline(kind: pa.DataType) -> str:
    """A type without the names of what is in lists, and the fields of structs, which follow a source of prompts."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return f"{'large ' * pa.types.is_large_list(kind)}list of {_outline(kind.value_type)}"
    return "struct" if pa.types.is_struct(kind) else str(kind)
