"""The digests of sets of which files are not there any more."""

from __future__ import annotations

import dataclasses

from fastadv.data.listing import Placed


def as_begun(content: dict[str, str], files: Placed) -> tuple[dict[str, str], Placed]:
    """``content``, the digests of the sets as they are; with the digest that a set was begun with
    in place of that of the files that are left. The marks of the files say that they are the same.
    """
    known = files.listing.content
    if not known:
        return content, dataclasses.replace(
            files, listing=dataclasses.replace(files.listing, content=content)
        )
    found = dict(content)
    if len(files.train) < len(files.listing.train):
        found["training data"] = known.get("training data", "")
    if len(files.test) < len(files.listing.test):
        found["test data"] = known.get("test data", "")
    return found, files
