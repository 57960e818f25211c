"""The papers of a method: those that its recipe cites, and those of its parts."""

from __future__ import annotations

import inspect
import sys

from fastadv.algorithms.contract import Part
from fastadv.algorithms.paper import Paper
from fastadv.algorithms.papers import PAPERS, entries, papers_in
from fastadv.algorithms.parts import PARTS
from fastadv.algorithms.recipe import Recipe
from fastadv.algorithms.recipes.table import METHODS, recipe
from fastadv.algorithms.slots import NONE


def papers_of(row: Recipe) -> list[Paper]:
    """Those that the source of ``row`` and of its published forms cite, and its parts."""
    found = papers_in(row.source, *(form.source for form in row.variants.values()))
    for slot, name in row.parts().items():
        if name != NONE:
            found += papers_of_part(PARTS[slot][name])
    return [paper for paper in PAPERS if paper in found]


def papers_of_part(part: type[Part]) -> list[Paper]:
    """Those that the first paragraphs about ``part`` and its file cite; what follows is about its
    options, which belong to other methods too."""
    texts = (inspect.getdoc(each) or "" for each in (sys.modules[part.__module__], part))
    return papers_in(*(text.partition("\n\n")[0] for text in texts))


def bibtex_of(name: str, variant: str | None = None) -> str:
    """The entries for BibTeX of the method ``name``, of its forms and of its parts."""
    row = recipe(name)
    found = papers_of(row)
    if variant is not None:
        found += papers_of(row.of_variant(variant))
    return entries(paper for paper in PAPERS if paper in found)


def bibliography() -> str:
    """The section of docs/methods.md with all papers: a list, and their entries."""
    used = {paper.key for row in METHODS.values() for paper in papers_of(row)}
    papers = [paper for paper in PAPERS if paper.key in used]
    lines = ["## Papers", "", "The entries of one method: `fastadv methods NAME --bibtex`.", ""]
    lines += [f"- {paper.cited}: {paper.work()}" for paper in papers]
    return "\n".join([*lines, "", "```bibtex", entries(papers), "```"])
