"""`[student]` and `[teacher]` of a recipe: where a model comes from, and how it is used."""

from typing import Any, Literal

from pydantic import Field, model_validator

from configs.fields import Bool, Float, Int, Layers, Table, Template, Text, Url, names_in

STUDENT = "student"  # as teacher.model: the student itself


class Scratch(Table):
    """A new Llama-shaped model with its own byte-level BPE tokenizer, to be trained by an `sft` recipe."""

    vocab_size: Int = Field(384, ge=264, le=200_000, description="tokens, the 256 bytes and 6 special ones included")
    tokenizer_text: Literal["all", "references"] = Field(
        "all", description="what the tokenizer is trained on: prompts and references, or references alone"
    )
    layers: Int = Field(3, ge=1, le=200, description="transformer blocks")
    width: Int = Field(96, ge=8, le=65_536, description="hidden size")
    heads: Int = Field(4, ge=1, le=512, description="attention heads; divides the width")
    feed_forward: Int = Field(256, ge=8, le=262_144, description="inner size of the MLP")
    context: Int = Field(256, ge=8, le=1_048_576, description="longest sequence, in tokens")

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> "Scratch":
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"heads = {self.heads} must divide width = {self.width} into even parts")
        return self


class Lora(Table):
    """Low-rank adapters (needs the `lora` extra): they alone are trained, and merged into each round's checkpoint."""

    rank: Int = Field(16, ge=1, le=4096, description="of each adapter's two matrices")
    alpha: Float = Field(32.0, gt=0, allow_inf_nan=False, description="the adapters' output is scaled by alpha / rank")
    targets: Layers = Field(
        "all-linear",
        description="names of the layers that get one, such as q_proj; all-linear: every linear layer but the head",
    )


class Context(Table):
    """What a side makes of a prompt, for itself alone."""

    rendering: Literal["chat", "plain"] = Field(
        "chat", description="how messages become a prompt: the tokenizer's chat template, or contents joined by newlines"
    )
    system: str | None = Field(None, description="system message in place of the row's own; empty: none")
    template: Template | None = Field(
        None,
        description="user's last message, of the row in braces: {prompt} is that message itself, {reference} the answer, "
        "others are columns",
    )
    chat_template: str | None = Field(None, min_length=1, description="file in place of its own, relative to the recipe")
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="what the chat template is told, as { enable_thinking = false }"
    )
    prefix: str = Field("", description="how each answer begins: given with the prompt, and not sampled")
    stop: tuple[Text, ...] = Field(
        (), description="tokens, or strings that are one token, that end an answer beside the model's own"
    )

    @model_validator(mode="after")
    def _a_template_is_read(self) -> "Context":
        given = [key for key in ("chat_template", "chat_template_kwargs") if getattr(self, key)]
        if self.rendering == "plain" and given:
            raise ValueError(f"{given[0]} is for rendering = 'chat', and rendering is 'plain'; set rendering or leave it out")
        return self


class Model(Context):
    """Where a model comes from (exactly one of `model`, `recipe`, `scratch`, `cache`) and how it is used."""

    model: str | None = Field(
        None,
        min_length=1,
        description="hub id, local folder (safetensors) or .gguf file; as teacher.model, 'student' is the student itself",
    )
    recipe: str | None = Field(
        None, min_length=1, description="a recipe, beside this file, whose last checkpoint it is; run first"
    )
    scratch: Scratch | None = None
    cache: str | None = Field(
        None,
        min_length=1,
        description="for a teacher: a folder that `potstill cache export` wrote, or the hub id of one, in place of a model",
    )
    weights: Literal["start", "round"] | None = Field(
        None,
        description="teacher.model = 'student': as it was before round 1 (start, where left out), or as it is at the start of "
        "each round",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="weights outside training; auto: bfloat16 on a GPU that has it, else float32"
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|mps|(cuda|xpu)(:\d+)?)$",
        description="cpu, cuda, cuda:1, mps, xpu; auto: a GPU if any",
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="of transformers; vLLM has its own")
    trust_remote_code: Bool = Field(False, description="run the code that the model's folder brings")
    engine: Literal["transformers", "vllm", "server", "auto"] = Field(
        "transformers",
        description="what samples and scores with it: this process, a vLLM process beside it, or vLLM servers; auto: on a GPU "
        "vLLM samples, where it is installed, and this process scores",
    )
    urls: tuple[Url, ...] = Field((), description="engine = 'server': where vLLM serves this model, as http://host:8000")
    vllm_python: str = Field(
        ".venv-vllm/bin/python", min_length=1, description="engine = 'vllm': a Python that has vLLM; `make vllm` makes this one"
    )
    vllm_memory: Float = Field(0.9, gt=0, le=1, description="engine = 'vllm': share of a GPU's memory that it takes")

    lora: Lora | None = Field(None, description="for a student: train adapters and not all weights")
    markers: tuple[tuple[Text, Text], ...] = Field(
        (),
        description="for a teacher of another tokenizer: pairs of what the student and what it writes in one place of an "
        "answer, tokens or text, as [['<think>\\n', '<|channel|>analysis<|message|>']]",
    )
    unpaired: Literal["end", "skip"] = Field(
        "end", description="for such a teacher: a control token that no marker pairs ends what is supervised, or is skipped"
    )

    @model_validator(mode="after")
    def _engine_fields(self) -> "Model":
        if self.engine == "server" and not self.urls:
            raise ValueError("engine = 'server' needs urls, such as urls = ['http://127.0.0.1:8000']")
        owners = {"urls": "server", "vllm_python": "vllm", "vllm_memory": "vllm"}
        for key, owner in owners.items():
            if (
                self.engine not in (owner, *["auto"] * (owner == "vllm"))
                and getattr(self, key) != type(self).model_fields[key].default
            ):
                raise ValueError(
                    f"{key} is for engine = '{owner}', and engine is '{self.engine}'; set engine or leave {key} out"
                )
        return self

    @model_validator(mode="after")
    def _one_source(self) -> "Model":
        given = [key for key in SOURCES if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(SOURCES)}; found {', '.join(given) or 'none'}")
        return self

    @model_validator(mode="after")
    def _a_cache_is_no_model(self) -> "Model":
        fields = Model.model_fields
        given = [name for name in fields if name != "cache" and getattr(self, name) != fields[name].default]
        if self.cache is not None and given:
            raise ValueError(
                f"{given[0]} is about a model, and a cache has none: what its teacher read and wrote is in it; leave it out"
            )
        return self


SOURCES = ("model", "recipe", "scratch", "cache")
OF_RENDERING = ("chat_template", "chat_template_kwargs")
OF_ENGINE = ("urls", "vllm_python", "vllm_memory")


def teach_itself(student: dict[str, Any], teacher: dict[str, Any]) -> dict[str, Any]:
    """`[teacher]` of a student that is its own teacher: what it does not say is as in `[student]`."""
    own = {key: value for key, value in student.items() if key not in (*SOURCES, "lora", "weights")}
    for choice, parts in (("rendering", OF_RENDERING), ("engine", OF_ENGINE)):
        if teacher.get(choice, own.get(choice)) != own.get(choice):  # what belongs to the student's choice is no use here
            own = {key: value for key, value in own.items() if key not in parts}
    return {"weights": "start", **own, **teacher}


def check_contexts(student: Model, teacher: Model | None, role: str = "teacher") -> None:
    """Raise ValueError where what both sides read, or whose weights teach, cannot be meant so."""
    if "reference" in names_in(student.template or ""):
        raise ValueError(
            "student.template names {reference}: the student would read the answer that it is graded by; "
            f"name it in {role}.template alone"
        )
    if student.weights is not None:
        raise ValueError("student.weights: which weights of the student teach is said by teacher.weights; leave it out")
    if teacher is None:
        return
    if teacher.weights is not None and teacher.model != STUDENT:
        found = teacher.model or teacher.recipe or teacher.cache
        raise ValueError(f"{role}.weights is for {role}.model = 'student', and the teacher is '{found}'; leave it out")
    if teacher.model == STUDENT and teacher.engine == "server":
        raise ValueError(
            f"{role}.engine = 'server': this teacher is the student, which no server has; "
            f"set {role}.engine to 'transformers' or 'vllm'"
        )
    if student.prefix and teacher.prefix and student.prefix != teacher.prefix:
        raise ValueError(
            f"student.prefix is {student.prefix!r}, {role}.prefix {teacher.prefix!r}: an answer begins in one way; "
            "give both the same, or leave one of them out"
        )


def describe_teacher(student: Model, teacher: Model | None) -> str:
    """What else sets the teacher apart than its weights, for people: `the teacher alone reads the row's hint`; or nothing."""
    parts: list[str] = []
    if teacher is None:
        return ""
    if teacher.model == STUDENT:
        equal = all(getattr(student, name) == getattr(teacher, name) for name in Context.model_fields)
        parts.append("the teacher is the student itself" + ", in the same context" * equal)
    if alone := privileged(student, teacher):
        parts.append(f"the teacher alone reads the row's {', '.join(alone)}")
    return "; ".join(parts)


def privileged(student: Context, teacher: Context) -> list[str]:
    """The fields of a row that the teacher's template names and the student's does not, without the prompt itself."""
    read, shown = (names_in(side.template or "") for side in (teacher, student))
    return sorted({*read} - {*shown, "prompt", "question"})
