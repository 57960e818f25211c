"""The names of options in a sentence, as the command line writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from fastadv.errors import UserError
from fastadv.run.spelling import as_flag


@contextmanager
def told_in_dashes(given: Iterable[str]) -> Iterator[None]:
    """Inside, a ``UserError`` names the options ``given`` with dashes: --bn-passes, where a part,
    which also serves Python, says bn_passes."""
    names = [name for name in given if "_" in name]  # others are English words, too
    try:
        yield
    except UserError as error:
        if not names:
            raise
        pattern = rf"(?<![\w.-])(?:{'|'.join(map(re.escape, names))})(?![\w=(.])"
        said = re.sub(pattern, lambda found: as_flag(found[0]), str(error))
        error.args = (said,)  # the error stays what it is: some hold more than a sentence
        raise
