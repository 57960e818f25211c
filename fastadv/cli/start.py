"""The program ``fastadv``: it handles signals before it imports anything that takes time."""

from __future__ import annotations

import signal


def start() -> None:
    """Run the command line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback until it is handled
    from fastadv.engine.process import stop

    stop.quiet_interpreter()
    with stop.handled(command=True):
        from fastadv.cli.main import main

        main()
