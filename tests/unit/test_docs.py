"""README and docs/ say nothing of files, commands, options and rooms that are not there."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from checkout import ROOT
from picture_of_rooms import picture, rooms

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
COMMANDS = {
    entry.name: entry.module for entry in entry_points(group="console_scripts") if entry.name.startswith("ssv-")
}
PACKAGES = {room.partition("/")[0] for room in rooms()}
FOLDERS = {*PACKAGES, ".ci", "benchmarks", "deploy", "docs", "package", "tests"}

SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def outside_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def blocks(text: str) -> str:
    """What is between fences, or indented by four."""
    fenced = re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^    (.*)$", outside_blocks(text), flags=re.MULTILINE)
    return "\n".join([*fenced, *indented])


def spans(text: str) -> list[str]:
    return SPAN.findall(outside_blocks(text))


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", outside_blocks(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def wrong_links(page: Path, text: str) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", outside_blocks(text)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            yield target


def wrong_paths(text: str) -> Iterator[str]:
    """Paths of the repository that are not there: in code, and with a folder of it at their beginning."""
    for word in re.findall(r"[\w./*-]+", "\n".join([*spans(text), blocks(text)])):
        first, slash, _ = word.partition("/")
        if slash and first in FOLDERS and not any(ROOT.glob(word.rstrip("/"))):
            yield word


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of each command of ours.

    What is continued on the next line ends with a backslash, or is indented there.
    """
    joined = re.sub(r"\\\n|\n +", " ", re.sub(r"(?m)(^|\s)#.*$", "", blocks(text)))
    for line in [*joined.splitlines(), *spans(text)]:
        for command in line.split("&&"):
            words = command.split()
            if words and words[0] in COMMANDS:
                yield words


@cache
def options() -> dict[str, set[str]]:
    """Options by command: "ssv-bench", "ssv-build", "ssv-build pair"."""
    found = {}
    for name, module in COMMANDS.items():
        parser = importlib.import_module(module)._parser()
        found[name] = set(parser._option_string_actions)
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found |= {f"{name} {sub}": set(each._option_string_actions) for sub, each in action.choices.items()}
    return found


def wrong_options(text: str) -> Iterator[str]:
    for name, *words in command_lines(text):
        has_subcommands = any(command.startswith(f"{name} ") for command in options())
        command = f"{name} {words[0]}" if has_subcommands and words and not words[0].startswith("-") else name
        if command not in options():
            yield command
            continue
        asked = OPTION.findall(" ".join(words))
        yield from (f"{command}: {option}" for option in asked if option not in options()[command])
    alone = [span.split()[0] for span in spans(text) if span.startswith("--")]
    yield from (option for option in alone if not any(option in known for known in options().values()))


def wrong_targets(text: str) -> Iterator[str]:
    """What make is asked for and the Makefile does not have."""
    known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for line in [*blocks(text).splitlines(), *spans(text)]:
        if (asked := re.match(r"make ([a-z-]+)", line)) and asked.group(1) not in known:
            yield line


def wrong_tests(text: str) -> Iterator[str]:
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    yield from (name for name in spans(text) if re.fullmatch(r"test_\w+", name) and f"def {name}(" not in tests)


def wrong_names(text: str) -> Iterator[str]:
    """Names of a file's own, such as `_plugins`, that are not in the file that the section's heading names; in no file
    of ours, if it names none."""
    for section in re.split(r"^(?=#)", outside_blocks(text), flags=re.MULTILINE):
        heading = section.partition("\n")[0] if section.startswith("#") else ""
        named = [path for span in spans(heading) if (path := ROOT / span).is_file()]
        names = [name for name in spans(section) if re.fullmatch(r"_[A-Za-z]\w+", name)]
        if names:
            sources = named or [path for folder in {*PACKAGES, "benchmarks"} for path in (ROOT / folder).rglob("*.py")]
            written = "\n".join(path.read_text() for path in sources)
            yield from (name for name in names if not re.search(rf"\b{name}\b", written))


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= 10_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    assert not list(wrong_links(page, text))
    assert not list(wrong_paths(text))
    assert not list(wrong_options(text))
    assert not list(wrong_targets(text))
    assert not list(wrong_tests(text))
    assert not list(wrong_names(text))


def test_the_readme_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    assert not [page.name for page in PAGES[2:] if f"(docs/{page.name})" not in readme]


def test_the_picture_of_the_rooms_is_that_of_the_table() -> None:
    drawn = re.search(r"^```mermaid\n(.*?)^```$", ARCHITECTURE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert drawn is not None
    assert drawn.group(1) == picture(rooms()), "print it anew: python tests/support/picture_of_rooms.py"


def test_the_picture_leaves_out_what_other_arrows_lead_to() -> None:
    table = {"a": (), "b/c.py": ("a",), "d": ("a", "b/c.py")}
    assert picture(table) == (
        'flowchart TD\n    d["d"]\n    b_c_py["b/c.py"]\n    a["a"]\n    d --> b_c_py\n    b_c_py --> a\n'
    )


def test_every_room_and_every_file_of_a_room_is_described() -> None:
    described = set(re.findall(r"^\| `([^`]+)` \|", ARCHITECTURE.read_text(), flags=re.MULTILINE))
    assert not set(rooms()) - described
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.suffix in (".py", ".c")]
    names = {path.relative_to(ROOT).as_posix() for path in files if path.name != "__init__.py"}
    assert not names - described


PLANTED = {
    "link": "[x](docs/nothing.md)",
    "anchor": "[x](docs/results.md#nothing)",
    "path": "see `runtime/nothing.py`",
    "path in a command": "```sh\nssv-bench --bundle x --prompts benchmarks/prompts/nothing.jsonl\n```",
    "option": "```sh\nssv-bench --bundel x\n```",
    "option of another command": "```sh\nssv-build inspect --bundle x --role target\n```",
    "option on the next line": "```sh\nssv-serve --bundle x \\\n    --nothing\nssv-bench --bundle x\n```",
    "option in an indented block": "    ssv-generate --nothing x",
    "option in a sentence": "with `ssv-ab run --nothing`",
    "option by itself": "give `--nothing 3`",
    "subcommand": "```sh\nssv-build nothing x\n```",
    "target": "run `make nothing`",
    "test": "see `test_that_nobody_wrote`",
    "name of a file's own": "## In `model/gguf.py`\n\nAdd it to `_LAYER_NAMES`.",
    "name of another file": "## In `model/gguf.py`\n\nAdd it to `_plugins`.",
    "name of no file": "Add it to `_plugs`.",
}


@pytest.mark.parametrize("text", PLANTED.values(), ids=PLANTED)
def test_what_is_not_there_is_found(text: str) -> None:
    page = ROOT / "README.md"
    found = [
        *wrong_links(page, text),
        *wrong_paths(text),
        *wrong_options(text),
        *wrong_targets(text),
        *wrong_tests(text),
        *wrong_names(text),
    ]
    assert len(found) == 1, found
