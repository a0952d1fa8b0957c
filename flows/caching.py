"""`potstill cache`: what a run's teacher said of texts, as a data set."""

from cyclopts import App

from configs.errors import BadInput
from flows.terminal import log_plainly, print_line

MOST = 0.1  # nats: what is rounded more than that is not worth training on

cache = App(name="cache", help="Write what a run's teacher said of texts as a data set, which teaches students of any family.")


@cache.command
def export(run: str, out: str, *, error: float = 0.001, top_p: float = 1.0) -> None:
    """Write the scored texts of a run that its student did not write, as Parquet with a data card.

    A recipe with `teacher = { cache = "OUT" }` learns from it without the teacher. The run has score.signal = "bytes" and
    rollout.on_policy below 1.

    Parameters
    ----------
    run
        A run's folder or URI, such as runs/quickstart.
    out
        A new folder. It can be sent to the Hugging Face Hub as it is: `hf upload --repo-type dataset NAME OUT`.
    error
        Round log-probs so that the expected log-prob of a law changes by so many nats at most; 0: not at all.
    top_p
        Of each law the likeliest bytes alone that have this mass, where the run has stored more.
    """
    if not 0 <= error <= MOST:
        raise BadInput(f"--error {error}: give nats, from 0 to {MOST}")
    if not 0 < top_p <= 1:
        raise BadInput(f"--top-p {top_p}: give a mass above 0, at most 1")
    log_plainly()
    from tasks.caches.export import export_cache

    told = export_cache(run, out, error=error, top_p=top_p)
    print_line(
        f"{out}: {told['texts']:,} texts of {told['prompts']:,} prompts, {told['tokens']:,} tokens of the teacher; "
        f"{told['bytes_per_token']:.1f} bytes per token on disk, rounded by {told['rounding']['largest']:.1g} nats at most"
    )
