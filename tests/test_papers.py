"""Every method names the papers it is from, each with a sound BibTeX entry."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from fastadv.algorithms.paper import Paper
from fastadv.algorithms.papers import PAPERS, entries, papers_in
from fastadv.algorithms.recipes.table import METHODS
from fastadv.cli.sources import bibliography, bibtex_of, papers_of

WITHOUT_A_PAPER = {"fzjcdt/FastAT_Benchmark"}
"""Sources that are code, of which there is no paper."""

WITHOUT_ARXIV = {
    "Wang et al. 2020",
    "Chen et al. 2021",
    "Sriramanan et al. 2021",
    "Rade and Moosavi-Dezfooli 2022",
    "Pan et al. 2024",
    "Nguyen et al. 2024",
    "Pan et al. 2025",
}
"""Those that are not on arXiv, or whose number is not known for certain."""

CITED = re.compile(r"[A-Z][\w-]+(?: [A-Z][\w-]+)?(?: et al\.| and [A-Z][\w-]+) (?:19|20)\d\d")


def sources() -> list[str]:
    rows = METHODS.values()
    return [row.source for row in rows] + [
        form.source for row in rows for form in row.variants.values()
    ]


def test_every_source_is_a_known_paper() -> None:
    assert {text for text in sources() if not papers_in(text)} == WITHOUT_A_PAPER
    known = {paper.cited.removeprefix("de ") for paper in PAPERS}
    assert {name for text in sources() for name in CITED.findall(text)} <= known


def test_every_paper_is_of_a_method() -> None:
    assert {paper.cited for row in METHODS.values() for paper in papers_of(row)} == {
        paper.cited for paper in PAPERS
    }


def test_which_papers_lack_a_number() -> None:
    assert {paper.cited for paper in PAPERS if paper.arxiv is None} == WITHOUT_ARXIV
    for paper in PAPERS:
        assert paper.arxiv is None or re.fullmatch(r"\d{4}\.\d{4,5}", paper.arxiv)
        if paper.arxiv is not None:  # no paper is cited by a year before that of its number
            assert 2000 + int(paper.arxiv[:2]) <= paper.year + 1


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.key)
def test_entries(paper: Any) -> None:
    text = paper.bibtex()
    assert text.count("{") == text.count("}")
    assert text.isascii()
    assert text.startswith(("@inproceedings{", "@article{", "@misc{"))
    fields = dict(re.findall(r"^  (\w+) = \{(.*)\},$", text, re.M))
    plain = {name: re.sub(r"[{}]", "", value) for name, value in fields.items()}
    assert plain["title"] == paper.title
    assert plain["year"] == str(paper.year)
    assert len(fields["author"].split(" and ")) == len(paper.authors)
    assert fields.get("eprint") == paper.arxiv
    assert paper.venue or paper.arxiv
    family = re.split(" et al| and ", paper.cited)[0]
    assert family in paper.authors[0]
    assert all(len(name.split(",")) <= 2 for name in paper.authors)
    assert sum(other.key == paper.key for other in PAPERS) == 1


def test_names_of_every_language() -> None:
    names = ("van der Šmíd, Zoë", "Grégory Łuçon", "Søren Ǘ")
    paper = Paper("x 2024", "On Testing", names, 2024, arxiv="2401.00001")
    assert paper.key == "vandersmid2024testing"
    assert paper.line().startswith("van der Šmíd et al.: On Testing.")
    author = "van der {\\v S}m{\\'i}d, Zo{\\\"e} and Gr{\\'e}gory {Ł}u{\\c c}on and S{ø}ren {Ǘ}"
    assert f"author = {{{author}}}" in paper.bibtex()
    assert paper.bibtex().count("{") == paper.bibtex().count("}")
    twice = Paper("x 2024", "On Testing", ("Elias Abad Rocamora", "Pau Two"), 2024)
    assert twice.line().startswith("Rocamora and Two")  # without a comma the last word


def test_citations_are_found_in_every_form() -> None:
    for text in ("Wong et al. 2020", "(Wong et al., 2020)", "(Wong et al., ICLR 2020)"):
        assert [paper.key for paper in papers_in(text)] == ["wong2020fast"], text
    assert [paper.key for paper in papers_in("RAT, Fig. 3a")] == ["nguyen2024intriguing"]
    assert papers_in("RATS, APART-like, Wong et al. 2021") == []


def test_entries_of_a_method() -> None:
    text = bibtex_of("gradalign")
    assert "@inproceedings{andriushchenko2020understanding," in text
    keys = re.findall(r"^@\w+\{(\w+),", bibtex_of("kd-swa"), re.M)
    assert {"chen2021robust", "izmailov2018averaging", "dong2022exploring"} <= set(keys)
    assert len(keys) == len(set(keys))


def test_commands(fastadv_command: Callable[..., Any]) -> None:
    done = fastadv_command("methods", "fast", "--bibtex")
    assert done.out.strip() == bibtex_of("fast")
    assert "name it before" in fastadv_command("methods", "--bibtex").err
    shown = fastadv_command("methods", "elle").out
    assert "arXiv:2401.11618" in shown
    assert "@inproceedings{abadrocamora2024efficient," in shown
    assert "@inproceedings{pang2021bag," in bibliography()
    assert entries(PAPERS[:1]) in bibliography()
