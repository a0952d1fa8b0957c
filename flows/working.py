"""The commands that run something: run, preflight, compare, up."""

from pathlib import Path

from configs.errors import BadInput, Stopped
from flows.ending import starting, work_on
from flows.options import ROUNDS, Set, Whole
from flows.terminal import log_plainly, print_line, print_table


def run(
    config: Path,
    *,
    rounds: Whole | None = None,
    set_: Set = (),
) -> None:
    """Run a recipe, or continue its run, until it has N rounds. An identical second call does nothing.

    The fields of a recipe are described in configs/README.md and configs/schema.py.

    Parameters
    ----------
    config
        The recipe: a TOML file, such as configs/quickstart.toml.
    rounds
        Number of rounds after which to stop, counted from the start of the run. Default: the recipe's.
    set_
        Set a field of the recipe, such as `--set train.learning_rate=1e-4`. May be repeated.
    """
    if rounds is not None and rounds < 0:
        raise BadInput(f"--rounds {rounds}: give 0 or more")
    log_plainly()
    from configs.load import load_recipe

    recipe = load_recipe(config, set_)
    work_on(recipe, rounds)
    from flows.start import announce, check_data, find_result
    from storage.store import Run

    Run(recipe.root, recipe.name).check_recipe(recipe)
    Run(recipe.root, recipe.name).check_free()
    announce(config, recipe, rounds)
    if (result := find_result(recipe, rounds)) is None:
        check_data(recipe)
        from flows.server import start_server

        wait_for_server = start_server()  # beside the other imports and checks
        from flows.refuse import check_recipe

        check_recipe(recipe)
        from flows.distill import distill

        wait_for_server()
        with starting():
            result = distill(str(config), rounds=rounds, overrides=set_)
    print_table(ROUNDS, result["table"])
    print_line(f"The run is in {result['run']}, its last student in {result['student']}")


def preflight(
    config: Path,
    *,
    prompts: Whole = 64,
    set_: Set = (),
) -> None:
    """Check a recipe on a few prompts before it is run. The exit status is 1 where a limit of its [gates] is breached.

    Parameters
    ----------
    config
        The recipe: a TOML file, such as configs/quickstart.toml.
    prompts
        Number of its prompts to try.
    set_
        Set a field of the recipe, such as `--set rollout.max_new_tokens=512`. May be repeated.
    """
    if prompts < 1:
        raise BadInput(f"--prompts {prompts}: give 1 or more")
    log_plainly()
    from configs.load import load_recipe

    recipe = load_recipe(config, set_)
    from flows.server import start_server

    wait_for_server = start_server()  # beside the imports and the checks
    from flows.preflight import preflight as run_preflight
    from flows.refuse import check_recipe

    check_recipe(recipe, rendering=False)
    wait_for_server()
    with starting():
        rows = run_preflight(str(config), prompts=prompts, overrides=set_)
    print_table("Preflight", [{key: row[key] for key in ("gate", "value", "limit", "result", "detail")} for row in rows])
    if breached := [f"{row['gate']}: {row['advice']}" for row in rows if row["result"] == "BREACHED"]:
        raise Stopped("\n  ".join([f"{config}: {len(breached)} of {len(rows)} gates breached", *breached]))


def compare(
    config: Path,
    *,
    objectives: str,
    seeds: str = "",
    rounds: Whole | None = None,
    set_: Set = (),
) -> None:
    """Run a recipe under several objectives. Show how they differ on the same prompts and seeds, with 95% intervals.

    Parameters
    ----------
    config
        The recipe: a TOML file, such as configs/quickstart.toml.
    objectives
        Two or more objectives, such as bytes,gold:merge=sum,alm. The others are compared with the first.
    seeds
        Seeds of each objective's runs, such as 0,1,2. Default: the recipe's seed.
    rounds
        Number of rounds after which to compare. Default: the recipe's.
    set_
        Set a field of the recipe, such as `--set rollout.prompts=512`. May be repeated.
    """
    if rounds is not None and rounds < 1:
        raise BadInput(f"--rounds {rounds}: give 1 or more")
    if not all(seed.strip().isdecimal() for seed in seeds.split(",") if seeds):
        raise BadInput(f"--seeds {seeds}: give whole numbers with commas between them, such as 0,1,2")
    log_plainly()
    from flows.server import start_server

    wait_for_server = start_server()  # beside the imports and the checks
    from flows.compare import compare as run_comparison
    from flows.compare import plan_runs

    names, numbers = tuple(objectives.split(",")), tuple(int(seed) for seed in seeds.split(",") if seeds)
    plan_runs(str(config), names, numbers, set_)
    wait_for_server()
    with starting():
        rows = run_comparison(str(config), objectives=names, seeds=numbers, rounds=rounds, overrides=set_)
    print_table("Objectives (difference: of accuracy; divergence: nats per byte; seconds: of training)", rows)


def up() -> None:
    """Start Prefect's server, a worker and the deployments of prefect.yaml, all in one. Ctrl-C ends all of it.

    A server that PREFECT_API_URL or a profile of Prefect names is used in place of a new one.
    """
    from flows.up import bring_up

    bring_up(print_line)
