"""Command lines and configuration files drawn at random: right, nearly right, and hostile."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

from fastadv.algorithms.options import all_options
from fastadv.algorithms.parts import PARTS, names
from fastadv.algorithms.recipes.table import METHODS
from fastadv.cli.command_help import options_of
from fastadv.cli.main import CALLED, COMMANDS
from fastadv.declared import plain_type
from fastadv.run.request import setting_types
from fastadv.run.spelling import as_flag

WORDS = (
    *("", " ", "0", "1", "-1", "2.5", "8/255", "1/0", "nan", "inf", "-inf", "1e999", "1e-999"),
    *("9" * 40, "-" * 30, "x" * 5_000, "ten", "true", "none", "None", "\t", "a\nb", "\x1b[31mred"),
    *(
        "[bold]x[/]",
        "[/]",
        "{}",
        "%s",
        "$HOME",
        "~",
        "~nobody",
        "'",
        '"',
        "\\",
        "é",
        "ß∂",
        "日本語",
    ),
    *("\u202etxt", "\udcff", "２", "1_000", "0x10", "1,2,3", ",", "2@0,5@30", "2@", "0..1@3", "@"),
    *("best", "last", "both", "digits", "pgd", "clean,pgd-20", "clean,clean", "pgd-0", "pgd-99999"),
    *("--", "-", "--lr", "-h", "folder:", "npz:", "digits:x", "module:", ":callable", "timm:"),
)
PATHS = ("config", "resume", "plugin", "out", "unlabelled", "data_root", "weights", "images")
DATA = ("folder:", "npz:", "imagenet:", "tinyimagenet:")
METHOD_NAMES = tuple(METHODS)


def make_places(folder: Path) -> list[str]:
    """Paths that hold no run, no data and no configuration, made in ``folder``."""
    (folder / "empty").mkdir()
    (folder / "locked").mkdir()
    (folder / "file").write_bytes(b"\0\1\2" * 40)
    (folder / "text.npz").write_text("no archive")
    (folder / "[bold]\x1b[31m\nname").mkdir()
    (folder / "damaged").mkdir()
    (folder / "damaged" / "config.toml").write_text('method = "apart"\n')
    (folder / "odd").mkdir()
    (folder / "odd" / "config.toml").symlink_to("/dev/zero")
    (folder / "bad.py").write_text("raise RuntimeError('no')\n")
    (folder / "syntax.py").write_text("def (:\n")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "images" / "train" / "a").mkdir(parents=True)
    (folder / "images" / "train" / "a" / "x.png").write_bytes(b"no image")
    os.chmod(folder / "locked", 0o555)
    found = sorted(path.name for path in folder.iterdir())
    others = ["/dev/null", "/dev/zero", "/dev/tty", "/", "missing/deep", "file/below", "../.."]
    return [*found, *others]


class Lines:
    """Draws from ``seed``. ``places`` are paths for options that take one."""

    def __init__(self, seed: int, places: list[str]) -> None:
        self.random, self.places = random.Random(seed), places
        classes = [part for parts in PARTS.values() for part in parts.values()]
        self._hints = {**all_options(classes), **setting_types()}
        self._settings = [*self._hints, *PARTS]

    def line(self) -> list[str]:
        """The words of a command line."""
        draw = self.random
        command = draw.choice([*["train"] * 12, *COMMANDS, self._typo("train")])
        if command == "bench":  # a right line would measure for minutes
            return [command, "-h"]
        words = [command]
        for _ in range(draw.choice((0, 1, 1, 2, 2, 3, 5, 9))):
            words += self._pair(command)
        if draw.random() < 0.15:
            words.insert(draw.randrange(len(words) + 1), self._any())
        if draw.random() < 0.1:
            words += words[1:3]  # given twice
        if draw.random() < 0.05:
            words.append("--dry-run")
        return words

    def configuration(self) -> bytes:
        """The content of a file for ``--config``."""
        draw = self.random
        if draw.random() < 0.1:
            return draw.choice((b"", b"\xff\xfe", b"\xef\xbb\xbfa = 1", b"[" * 9_000, b"a\0b = 1"))
        lines = []
        for _ in range(draw.choice((0, 1, 2, 4, 8))):
            name = draw.choice(self._settings)
            if draw.random() < 0.15:
                name = draw.choice((self._typo(name), self._any()))
            if draw.random() < 0.1:
                lines.append(draw.choice(("[options]", "[other]", "[[options]]")))
            lines.append(f"{name} = {self._literal(name)}")
        text = "\n".join(lines) + "\n"
        if draw.random() < 0.1:
            text = text[: draw.randrange(len(text))]
        return text.encode("utf-8", "surrogateescape")

    def _pair(self, command: str) -> list[str]:
        """An option of ``command`` and its value."""
        draw = self.random
        if command in CALLED:
            rows = options_of(CALLED[command])
            flag, _, value = draw.choice(rows).flag.partition(" ") if rows else ("--x", "", "")
            if draw.random() < 0.4:
                return [draw.choice((*self.places, "apart", self._any()))]
            name = flag.strip("-").replace("-", "_")
        else:
            name = draw.choice((*self._settings, "config", "name", "resume", "plugin"))
            value = "" if plain_type(self._hints.get(name, str)) is bool else "TEXT"
            flag = as_flag(name)
        if draw.random() < 0.1:
            flag = draw.choice((self._typo(flag), flag.upper(), flag[1:], flag.replace("-", "—")))
        if not value:
            return [flag]
        given = self._value(name)
        return [f"{flag}={given}"] if draw.random() < 0.3 else [flag, given]

    def _value(self, name: str) -> str:
        draw = self.random
        if draw.random() < 0.35:
            return self._any()
        if name == "resume" and draw.random() < 0.3:
            return draw.choice(("auto", "auto", "aut", "Auto"))
        if name in PATHS:
            return draw.choice(self.places)
        if name == "data" and draw.random() < 0.5:
            return draw.choice(DATA) + draw.choice(self.places)
        choices: dict[str, Callable[[], str]] = {
            "method": lambda: draw.choice(METHOD_NAMES),
            "variant": lambda: draw.choice(("fastat", "apart", "paper")),
            "data": lambda: draw.choice(("digits", "cifar10", "synthetic", "svhn")),
        }
        if name in choices:
            return choices[name]()
        if name in PARTS:
            return draw.choice(names(name))
        options = getattr(plain_type(self._hints.get(name, str)), "__args__", None)
        if options and all(isinstance(each, str) for each in options):
            return self._typo(draw.choice(options)) if draw.random() < 0.3 else draw.choice(options)
        return draw.choice(("1", "2", "3", "0.5", "0.1", "0.9", "8/255", "64"))

    def _literal(self, name: str) -> str:
        """A value of TOML."""
        draw = self.random
        value = self._value(name)
        kind = draw.random()
        if kind < 0.4:
            return '"' + "".join(map(_in_toml, value)) + '"'
        odd = ("nan", "inf", "1e999", "9" * 400, "-1", "true", "2020-01-01", "10:00:00", "[]", "{}")
        odd += ("[1, [2]]", "{a = 1}", '["x", 1]', "", "'''", "0x1f", "[" * 2_000)
        return draw.choice(odd) if kind < 0.7 else value

    def _any(self) -> str:
        return self.random.choice((*WORDS, *self.places))

    def _typo(self, word: str) -> str:
        if len(word) < 2:
            return word + "x"
        at = self.random.randrange(len(word) - 1)
        how = self.random.randrange(3)
        if how == 0:
            return word[:at] + word[at + 1 :]
        if how == 1:
            return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        return word[:at] + word[at] + word[at:]


def _in_toml(character: str) -> str:
    plain = character.isprintable() and character not in '"\\'
    return character if plain else f"\\u{ord(character):04x}"
