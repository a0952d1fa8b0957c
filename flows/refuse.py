"""Refuse a recipe that cannot work before anything is written, with one message that says what would be right."""

from configs.errors import BadInput
from configs.load import inherit_overrides, load_recipe
from configs.models import STUDENT
from configs.schema import Recipe
from configs.signals import SIGNALS
from configs.teachers import role_of, suffix_of
from flows.compute import check_compute
from flows.start import check_data, models_of
from flows.track import check_trackers
from storage.receipt import read_receipt, trust_inputs
from storage.store import Run, round_slot
from tasks.caches.recall import check_cached_prompts
from tasks.engines.choose import check_engine
from tasks.gates.rendering import refuse_rendering
from tasks.models.pair import make_markers
from tasks.models.reference import ModelRef, check_machine, make_reference, read_template, refer_to_cache
from tasks.models.text import side
from tasks.models.weights import check_weights
from tasks.rows.round import Teachers
from tasks.training.adapters import check_lora
from tasks.training.processes import check_processes


def check_recipe(recipe: Recipe, above: tuple[str, ...] = (), *, rendering: bool = True) -> None:
    """Refuse a run's folder, devices, prompts or models that cannot work, as far as they exist already.

    `above` are the recipes that need this one's model. Preflight has `rendering` among its gates.
    """
    check_data(recipe)
    trust_inputs(read_receipt(Run(recipe.root, recipe.name)))
    configs = models_of(recipe)
    for role, config in configs.items() if recipe.compute.runner == "local" else ():
        if config.engine != "server":
            check_machine(role, config)
    check_processes(recipe)
    check_compute(recipe.compute)
    check_trackers(recipe)
    refs: dict[str, ModelRef] = {}
    for role, config in configs.items():
        if config.chat_template is not None:
            read_template(config.chat_template)  # before a model is made that it is for
        if config.recipe is not None:
            if config.recipe in above:
                raise BadInput(f"{role}.recipe: {config.recipe} needs its own model; name a recipe that does not need itself")
            maker = load_recipe(config.recipe, inherit_overrides(recipe, config.recipe))
            check_recipe(maker, (*above, config.recipe), rendering=rendering)
        if config.cache is not None:
            cache = refer_to_cache(config.cache)
            check_cached_prompts(recipe, cache)
            check_pair(recipe, student=refs.get("student"), teacher=cache)
            continue
        source = recipe.student.model if config.model == STUDENT and role != "student" else config.model
        if source is not None:
            refs[role] = ref = make_reference(config, source)
            if config.engine != "server":
                check_weights(ref)
            if config.lora is not None:
                check_lora(ref, config.lora)
    views = recipe.by_teacher()
    teachers = {name: refs[role_of(view.teacher)] for name, view in views.items() if role_of(view.teacher) in refs}
    check_pairs(recipe, student=refs.get("student"), teachers=teachers)
    if rendering:
        refuse_rendering(recipe, refs)


def check_pairs(recipe: Recipe, *, student: ModelRef | None, teachers: Teachers) -> None:
    """Refuse models that do not fit the recipe or each other. None, or no name, stands for a model that is still to be made."""
    for name, view in recipe.by_teacher().items():
        check_pair(view, student=student, teacher=teachers.get(name))


def check_pair(recipe: Recipe, *, student: ModelRef | None, teacher: ModelRef | None) -> None:
    """The same of a recipe with one teacher, or none."""
    for ref in (student, teacher):
        if ref is not None:
            side(ref).check()
            check_engine(ref)
    counts_ids = SIGNALS[recipe.score.signal].counts_ids
    if teacher is not None and counts_ids and recipe.score.k > side(teacher).vocabulary.size:
        raise BadInput(
            f"score.k = {recipe.score.k} is more than the {side(teacher).vocabulary.size} ids "
            f"of the teacher's vocabulary ({teacher.path}); set score.k to at most that"
        )
    if student is None or teacher is None:
        return
    same = make_markers(recipe, student=side(student), teacher=side(teacher)).same
    config = recipe.teacher
    if same and config is not None and (config.markers or config.unpaired != "end"):
        field = f"{role_of(config)}.{'markers' if config.markers else 'unpaired'}"
        raise BadInput(
            f"{field} is about what two tokenizers write; {student.path} and {teacher.path} have one, "
            "so their control tokens are tokens like any other; leave it out"
        )
    if recipe.objective.one_tokenizer and not same:
        raise BadInput(
            f"objective.name = '{recipe.objective.name}' needs one tokenizer on both sides; "
            f"the tokenizers of {student.path} and {teacher.path} differ; choose objective.name = 'bytes' or 'gold'"
        )


def check_weights_unchanged(run: Run, *, student: ModelRef | None, teachers: Teachers) -> None:
    """Refuse to go on with a run whose models were replaced: what is committed would be made anew over it."""
    refs = {"student": student} | {"teacher" + suffix_of(name): ref for name, ref in teachers.items()}
    for role, ref in refs.items():
        cached = ref is not None and ref.cached
        what = "laws" if cached else "weights"
        manifest = run.manifest(round_slot(0, "evals", "cached" if cached else role))
        before = manifest["inputs"]["teacher" if cached else "model"]["digest"] if manifest else None
        if ref is not None and before not in (None, ref.digest):
            raise BadInput(
                f"{run.path}: this run began with another {role}: the {what} of {ref.path} are {ref.digest[:12]}, and were "
                f"{before[:12]}; put them back, or give this recipe another name (--set name=…)"
            )
