"""Which commands `potstill` has."""

from importlib.metadata import version

from cyclopts import App, CycloptsError

from configs.errors import BadInput, CannotWrite, Damaged, Stopped, Unavailable
from flows.caching import cache
from flows.ending import end, ending
from flows.looking import align, inspect, push, report
from flows.working import compare, preflight, run, up

app = App(
    name="potstill",
    help="On-policy distillation of a large language model into a small one of any family.",
    version=version("potstill"),
    suppress_keyboard_interrupt=False,  # `ending` handles it
)
for command in (run, preflight, compare, inspect, report, push, align, up):
    app.command(command)
app.command(cache)
app.command("flows.clean:clean", help="Show what of a run is not to be kept, and clear it.")
app.command("flows.recipe:recipe", help="Write a commented recipe to start from, or tell what a recipe may say.")


def run_command() -> None:
    """Do what the arguments say.

    A user's mistake, a stop and a full disk each end with one message; `configs.errors` has their statuses.
    """
    with ending():
        try:
            app(exit_on_error=False, print_error=False)
        except (BadInput, CycloptsError) as error:
            end(str(error), 2)
        except (CannotWrite, Damaged, Stopped) as error:
            end(str(error), 1)
        except Unavailable as error:
            end(f"{error}\npotstill: the same command goes on from what is committed", 1)
