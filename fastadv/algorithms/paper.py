"""A paper, and its entry for BibTeX."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

# Combining marks of Unicode -> the accents of TeX; those that are letters need a space.
_ACCENTS = dict(zip("\u0300\u0301\u0302\u0303\u0304\u0307\u0308", "`'^~=.\"", strict=True)) | dict(
    zip("\u0306\u030a\u030b\u030c\u0327\u0328", ("u ", "r ", "H ", "v ", "c ", "k "), strict=True)
)
_FORMULA = re.compile(r"\b(?=[A-Z-]*[A-Z]{2})[A-Z-]+\b|\b[A-Z][a-z]+[A-Z]\w*")  # FGSM, ZeroGrad


@dataclass(frozen=True)
class Paper:
    """``cited`` is how sources and docstrings name it, without a comma: "Wong et al. 2020";
    ``also`` are its short name and the repositories of its code. ``authors`` are full names as
    BibTeX has them: the last word is the family name, or what stands before a comma.
    ``venue`` is a conference, or with ``journal`` a journal; "" for one on arXiv only. ``arxiv``
    is None where there is none, or where none is known for certain; ``url`` is a page of it."""

    cited: str
    title: str
    authors: tuple[str, ...]
    year: int
    venue: str = ""
    journal: bool = False
    arxiv: str | None = None
    url: str | None = None
    also: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The key of the entry: wong2020fast."""
        family = _plain(_family(self.authors[0])).lower()
        words = re.findall(r"[a-z]+", _plain(self.title).lower())
        first = next(word for word in words if word not in ("a", "an", "on", "the"))
        return f"{re.sub('[^a-z]', '', family)}{self.year}{first}"

    def line(self) -> str:
        """Authors, title, venue, year and number in a line."""
        family = [_family(author) for author in self.authors]
        names = f"{family[0]} et al." if len(family) > 2 else " and ".join(family)
        return f"{names}: {self.work()}"

    def work(self) -> str:
        """Title, venue, year and number."""
        number = f", arXiv:{self.arxiv}" if self.arxiv else ""
        end = "" if self.title.endswith(("!", "?")) else "."
        return f"{self.title}{end} {self.venue or 'arXiv'} {self.year}{number}"

    def bibtex(self) -> str:
        """The entry."""
        kind, place = "misc", None
        if self.venue:
            kind = "article" if self.journal else "inproceedings"
            place = ("journal" if self.journal else "booktitle", self.venue)
        fields = [
            ("title", _FORMULA.sub(lambda found: f"{{{found[0]}}}", self.title)),
            ("author", " and ".join(self.authors)),
            ("year", str(self.year)),
        ]
        if place is not None:
            fields.insert(2, place)
        if self.arxiv is not None:
            fields += [("eprint", self.arxiv), ("archivePrefix", "arXiv")]
        if self.url is not None:
            fields.append(("url", self.url))
        lines = [f"  {name} = {{{_in_tex(value)}}}," for name, value in fields]
        return "\n".join([f"@{kind}{{{self.key},", *lines, "}"])


def _family(author: str) -> str:
    family, comma, _ = author.partition(",")
    return family if comma else author.split()[-1]


def _plain(text: str) -> str:
    """``text`` without accents."""
    apart = unicodedata.normalize("NFD", text)
    return "".join(letter for letter in apart if not unicodedata.combining(letter))


def _in_tex(text: str) -> str:
    """``text`` with TeX's accents; a letter that they cannot make stays, as a group of its own."""
    return "".join(map(_letter, unicodedata.normalize("NFC", text))).replace("&", "\\&")


def _letter(letter: str) -> str:
    if letter.isascii():
        return letter
    base, *marks = list(unicodedata.normalize("NFD", letter))
    if len(marks) == 1 and marks[0] in _ACCENTS:
        return f"{{\\{_ACCENTS[marks[0]]}{base}}}"
    return f"{{{letter}}}"
