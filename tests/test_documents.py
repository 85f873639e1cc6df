"""Pages about the repository name what is there: files, make targets, commands, arrows, model families.

Docstrings stand alone: none of the package begins with a word that only the name above it completes.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from looptap.capture.models.families import FAMILIES
from looptap.capture.store.quantities import QUANTITIES
from looptap.cli.entry import main
from looptap.tests.test_house import ARROWS, source_paths

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/design.md", "docs/style.md", "docs/store-format.md")
LINKED = (*PAGES, "CHANGELOG.md", "docs/figures.md")
SUFFIXES = "py|md|toml|json|jsonl|html"
# what pages name that is not here: parts of checkpoints and of stores, what is made
FOREIGN = {"config.json", "tokenizer.json", "zarr.json", "report.html", "utils.py"}
STORES = (".looptap/", "<")  # beginnings of keys inside a store
# a docstring that begins with one of these is half a sentence, whose other half is a name
HALVES = "after and as at before but by from in of on or that those to where whose with without"

# the paths of a page are in the text between backticks, and each line of a block of code is such a text
BACKTICKS = re.compile(r"`([^`\n]+)`")
BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
PATH = re.compile(rf"^(?:[\w.-]+/)*[\w.-]+\.(?:{SUFFIXES})$|^(?:[\w.-]+/)+$")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def snippets_of(text: str) -> list[str]:
    """What a page gives as code: between backticks, and lines of blocks."""
    blocks = BLOCK.findall(text)
    lines = (line.partition("  #")[0] for block in blocks for line in block.splitlines())
    return [*BACKTICKS.findall(BLOCK.sub("", text)), *lines]


def missing_paths(text: str) -> list[str]:
    """Paths between backticks that are neither at the root nor, of a bare file's name, anywhere."""
    names = {path.name for path in source_paths(ROOT)}
    named = {snippet for snippet in BACKTICKS.findall(BLOCK.sub("", text)) if PATH.match(snippet)}
    named = {name for name in named - FOREIGN if not name.startswith(STORES) and "NAME" not in name}
    return sorted(n for n in named if not (ROOT / n).exists() and ("/" in n or n not in names))


def missing_in_listings(text: str) -> list[str]:
    """What drawings of the tree name that is not there; what is indented lies in the line above."""
    missing, above = [], {0: ""}
    for block in BLOCK.findall(text):
        for line in block.splitlines() if re.search(r"^kernels/ ", block, re.MULTILINE) else ():
            indent = len(line) - len(line.lstrip())
            words = line.split()
            first, *others = words if all(word.endswith("/") for word in words) else words[:1]
            for name in (first, *others):
                path = f"{above[indent]}{name}"
                if not (ROOT / path).exists():
                    missing.append(path)
            above[indent + 2] = f"{above[indent]}{first}"
    return missing


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z0-9.-]+):", text_of("Makefile"), re.MULTILINE))


def missing_targets(text: str) -> list[str]:
    named = {name for code in snippets_of(text) for name in re.findall(r"\bmake ([a-z][a-z0-9.-]*)", code)}
    return sorted(named - make_targets())


@pytest.fixture(scope="module")
def commands() -> dict[str, set[str]]:
    """Every command, with the commands below it."""
    found = {"": commands_below()}
    found |= {name: commands_below(name) for name in ("study", "bench")}
    return found


def commands_below(*names: str) -> set[str]:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setenv("COLUMNS", "1000")
        patch.setattr(sys, "argv", ["looptap", *names, "--help"])
        patch.setattr(sys, "stdout", lines := Lines())
        main()
    (listed,) = re.findall(r"^usage: looptap.*\{([\w,]+)\}", "".join(lines), re.MULTILINE)
    return set(listed.split(","))


class Lines(list):
    """A stdout that keeps what is written."""

    encoding = "utf-8"

    def write(self, text: str) -> None:
        self.append(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False


def named_commands(text: str) -> set[tuple[str, str]]:
    """The two words after looptap wherever a page shows a command; the second may be an argument."""
    pattern = re.compile(r"(?:^|[\s&(])looptap ([a-z]+)(?: ([a-z]+))?")
    return {found for code in snippets_of(text) for found in pattern.findall(code)}


def docstrings_of(source: str) -> Iterator[tuple[int, str]]:
    """Yields line and text of every docstring: of modules, classes, functions and fields."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(ast.Constant(str(text))):
                yield node.lineno, text


def half_docstrings(root: Path) -> list[str]:
    """Returns docstrings of the package at root that begin with one of HALVES, as path:line: the word."""
    found = []
    for path in source_paths(root):
        for line, text in docstrings_of((root / path).read_text(encoding="utf-8")):
            first = text.split(maxsplit=1)[0]
            if first.lower() in HALVES.split():
                found.append(f"{path}:{line}: {first}")
    return found


@pytest.mark.parametrize("page", PAGES)
def test_paths_are_there(page):
    assert missing_paths(text_of(page)) == []
    assert missing_in_listings(text_of(page)) == []


@pytest.mark.parametrize("page", PAGES)
def test_targets_are_there(page):
    assert missing_targets(text_of(page)) == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_there(page, commands):
    for first, second in named_commands(text_of(page)):
        assert first in commands[""], first
        assert first not in ("study", "bench") or not second or second in commands[first], (first, second)


def test_readme_has_every_command(commands):
    rows = "\n".join(line for line in text_of("README.md").splitlines() if line.startswith("| `looptap"))
    named = set(re.findall(r"[a-z]+", " ".join(BACKTICKS.findall(rows))))
    assert set().union(*commands.values()) - {"demo"} <= named
    assert "make demo" in text_of("README.md")


def test_readme_has_every_family():
    said = re.sub(r"[-_\s]", "", text_of("README.md").lower())
    assert [name for name in FAMILIES if name.replace("_", "") not in said] == []


@pytest.mark.parametrize("page", ["README.md", "docs/design.md"])
def test_tables_have_every_quantity(page):
    rows = [line.split("|")[1] for line in text_of(page).splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in BACKTICKS.findall(row)}
    assert set(QUANTITIES) - named == set()


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", BLOCK.sub("", text_of(page))):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


def test_the_arrows_are_those_that_are_held():
    rows = re.findall(r"^\| `([\w.]+)` \|[^|]*\| ([^|]*) \|$", text_of("CONTRIBUTING.md"), re.MULTILINE)
    drawn = {part: set(BACKTICKS.findall(cell)) for part, cell in rows if part in ARROWS}
    assert drawn == {part: arrows for part, arrows in ARROWS.items() if arrows is not None}


def test_lines_can_be_read():
    for page in PAGES:
        long = [
            n for n, line in enumerate(text_of(page).splitlines(), 1) if len(line) > 150 and line[0] != "|"
        ]
        assert long == [], f"{page} has lines of over 150 characters"


def test_docstrings_stand_alone():
    assert half_docstrings(ROOT) == []


def test_half_a_docstring_is_found(tmp_path):
    files = {
        "whole.py": '"""Offset of a file, as bytes."""\n\n\ndef offset():\n    """Returns it."""\n',
        "kernels/half.py": 'class Half:\n    size: int\n    """\n    of the file"""\n\n    def key(self):\n'
        '        """And its key."""\n        return "Of what?"\n',
        "tests/test_half.py": '"""As a user does it."""\n',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert half_docstrings(tmp_path) == ["kernels/half.py:3: of", "kernels/half.py:7: And"]


def test_a_page_that_names_what_is_not_there_is_found():
    assert missing_paths("see `capture/no_such.py`, `no_such.py`, `capture/nowhere/`, `units.py`") == [
        "capture/no_such.py",
        "capture/nowhere/",
        "no_such.py",
    ]
    assert missing_targets("`make tee` and `make test`") == ["tee"]
    assert named_commands("```\n$ looptap capture MODEL\n```\nand `looptap bench store`") == {
        ("capture", ""),
        ("bench", "store"),
    }
    listing = "```\nkernels/   what\n  gpu/   this\n  tpu/   that\ncli/  tests/  attic/\n```"
    assert missing_in_listings(listing) == ["kernels/tpu/", "attic/"]
