"""The program ``fastadv``: it handles signals before it imports anything that takes time."""

from __future__ import annotations

from fastadv.engine.process import stop


def start() -> None:
    """Run the command line."""
    stop.quiet_interpreter()
    with stop.handled(command=True):
        from fastadv.cli.main import main

        main()
