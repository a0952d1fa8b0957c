"""The entry point of `potstill`. It imports the commands, which takes a second, when a stop ends it with one line already."""

import os

from flows.stops import on_stops


def main() -> None:
    """Run the command that the arguments name."""
    on_stops(_stop_at_once)
    from flows.commands import run_command

    run_command()


def _stop_at_once(number: int, _: object) -> None:
    os.write(2, b"potstill: stopped before it began; the same command starts again\n")
    os._exit(128 + number)


if __name__ == "__main__":
    main()
