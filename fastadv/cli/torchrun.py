"""The program ``fastadv-torchrun``: torchrun with our exit codes, without its page of failures.

It takes torchrun's arguments: ``fastadv-torchrun --nproc-per-node 8 -m fastadv train ...``. What
one process says is all that is printed, and its exit code is that of the program. SIGUSR1 and the
other signals that ask to stop reach the processes.
"""

from __future__ import annotations

import logging
import signal
import sys

from fastadv.engine.process import stop
from fastadv.exit_codes import ExitCode, after_stop


def launch() -> None:
    """Run torchrun with the words of the command line."""
    stop.quiet_interpreter()
    with stop.handled(command=True):
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable()  # the page of failures, and what torchrun does with its processes
    parser = run.get_args_parser()
    words = sys.argv[1:]
    if "--signals-to-handle" in parser.format_help():
        words = ["--signals-to-handle", ",".join([*stop.NAMES, "SIGQUIT"]), *words]
    try:
        run.run(parser.parse_args(words))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else ExitCode.GO_ON)
    except SignalException as error:
        sys.exit(after_stop(signal.Signals(error.sigval).name))
    except KeyboardInterrupt:
        sys.exit(after_stop("SIGINT"))


if __name__ == "__main__":
    launch()
