"""A command whose options are known only at run time."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def with_options(
    command: Callable[[dict[str, Any]], None], parameters: list[inspect.Parameter]
) -> Callable[..., None]:
    """``command`` as a function with ``parameters``, called with what was given of them."""

    def run(**given: Any) -> None:
        command({name: value for name, value in given.items() if value is not None})

    run.__doc__ = command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {entry.name: entry.annotation for entry in parameters}
    return run
