"""The rooms of the repository: who imports whom. The table is the architecture, and it is exact in both directions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A room, a folder or one file of it, and the rooms that it imports. Each stands below all that it imports.
ROOMS: dict[str, tuple[str, ...]] = {
    "support": (),
    "plugins": (),
    "model": ("support", "plugins"),
    "bundle": ("support",),
    "runtime": ("support", "model", "bundle"),
    "runtime/engines": ("support", "plugins", "model", "bundle", "runtime"),
    "runtime/decode": ("support", "plugins", "bundle", "runtime", "runtime/engines"),
    "runtime/decode/drafters": ("bundle", "runtime/engines", "runtime/decode"),
    "runtime/decode/ahead.py": ("bundle", "runtime/engines", "runtime/decode", "runtime/decode/drafters"),
    "runtime/decode/membership.py": (
        "bundle",
        "runtime",
        "runtime/engines",
        "runtime/decode",
        "runtime/decode/drafters",
    ),
    "runtime/decode/round.py": (
        "bundle",
        "runtime",
        "runtime/engines",
        "runtime/decode",
        "runtime/decode/drafters",
        "runtime/decode/membership.py",
        "runtime/decode/ahead.py",
    ),
    "runtime/decode/loop.py": ("bundle", "runtime", "runtime/decode", "runtime/decode/round.py"),
    "runtime/trtllm": (
        "support",
        "model",
        "bundle",
        "runtime",
        "runtime/engines",
        "runtime/decode",
        "runtime/decode/drafters",
        "runtime/decode/loop.py",
    ),
    "runtime/llm.py": (
        "support",
        "model",
        "bundle",
        "runtime",
        "runtime/engines",
        "runtime/decode",
        "runtime/decode/membership.py",
        "runtime/decode/round.py",
        "runtime/decode/loop.py",
        "runtime/trtllm",
    ),
    "runtime/serving": ("support", "bundle", "runtime", "runtime/decode", "runtime/llm.py"),
    "builder/config.py": ("support", "bundle"),
    "builder/tokenizer.py": ("support", "model"),
    "builder/target.py": ("support", "model", "bundle", "builder/tokenizer.py"),
    "builder/training": (
        "support",
        "plugins",
        "model",
        "bundle",
        "builder/config.py",
        "builder/tokenizer.py",
        "builder/target.py",
    ),
    "builder/tensorrt": ("support", "plugins", "model", "bundle", "builder/config.py"),
    "builder": (
        "support",
        "model",
        "bundle",
        "runtime",
        "runtime/engines",
        "runtime/decode",
        "runtime/decode/drafters",
        "runtime/decode/round.py",
        "runtime/trtllm",
        "runtime/llm.py",
        "builder/config.py",
        "builder/tokenizer.py",
        "builder/target.py",
        "builder/training",
        "builder/tensorrt",
    ),
    "client": ("support", "runtime", "runtime/llm.py"),
    "ab": ("support", "runtime", "runtime/decode", "runtime/llm.py", "client"),
    "triton_repo/openai": ("support", "bundle", "runtime", "runtime/serving", "client"),
    "triton_repo": (
        "support",
        "bundle",
        "runtime",
        "runtime/decode",
        "runtime/trtllm",
        "runtime/llm.py",
        "runtime/serving",
        "ab",
    ),
}

FOLDERS = tuple(dict.fromkeys(room.split("/")[0] for room in ROOMS))


# What imports a module whose name it is given.
BY_NAME = ("import_module", "__import__", "find_spec", "run_module")
# Who imports by a name that is made up when it runs: packages of others that may be absent, or are one of several.
NAMES_MADE_UP = {
    "builder.tensorrt.lowering",
    "bundle.tensorrt_api",
    "plugins.registration",
}


def modules_of(root: Path) -> dict[str, Path]:
    """Files by the dotted name under which they are imported, without "ssv."; a package has its folder's name."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(path: Path, root: Path) -> str:
    """The room that a file is in: its own if it has one, else that of the nearest folder.

    Raises:
        LookupError: it is in no room.
    """
    name = path.relative_to(root).as_posix()
    for room in (name, *(folder.as_posix() for folder in Path(name).parents)):
        if room in ROOMS:
            return room
    raise LookupError(f"{name} is in no room: add its folder to the table")


def imported_names(path: Path, name: str) -> Iterator[str]:
    """Every name that a file imports from ssv, wherever in it: "builder.config" as well as "builder.config.Recipe"."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]

    def absolute(named: str, of: list[str]) -> str:
        rest = named.lstrip(".")
        level = len(named) - len(rest)
        return ".".join([*["ssv", *of][: len(of) + 2 - level], *([rest] if rest else [])]) if level else named

    tree = ast.parse(path.read_text())
    by_name = importers(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = absolute("." * node.level + (node.module or ""), package)
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and called(node) in by_name:
            first, *others = texts_of(node) or [""]
            within = next((text.split(".")[1:] for text in others if text.startswith("ssv.")), package)
            base = absolute(first, within)
            names = [base, *(f"{base}.{text}" for text in others)]
        else:
            continue
        yield from (each.removeprefix("ssv.").rstrip(".") for each in names if each.startswith("ssv."))


def importers(tree: ast.AST) -> set[str]:
    """The names under which a file has what imports by name."""
    imported = [a for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names if a.name in BY_NAME]
    bound = [n for n in ast.walk(tree) if isinstance(n, ast.Assign) and ast.unparse(n.value).endswith(BY_NAME)]
    return {*BY_NAME, *(a.asname or a.name for a in imported), *(ast.unparse(t) for n in bound for t in n.targets)}


def called(call: ast.Call) -> str | None:
    """The last part of the name of what is called."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)


def texts_of(call: ast.Call) -> list[str]:
    """The texts that a call is given, whatever they are given as; of one that begins with a text, that beginning."""

    def text(node: ast.AST) -> str | None:
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else None
        if isinstance(node, ast.JoinedStr):
            return text(node.values[0]) if node.values else None
        if isinstance(node, ast.BinOp):
            left, right = text(node.left), text(node.right)
            return None if left is None else left + (right or "")
        return None

    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    inner = [each for node in given for each in (node.elts if isinstance(node, ast.List | ast.Tuple) else [node])]
    return [found for node in inner if (found := text(node)) is not None]


def imports(root: Path) -> dict[str, set[str]]:
    """The modules that each module imports; of `from ssv.runtime import llm` it is runtime.llm, not the package.

    Raises:
        LookupError: something is imported from ssv that is not there.
    """
    modules = modules_of(root)
    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        own = found.setdefault(name, set())
        for each in imported_names(path, name):
            parts = each.split(".")
            # The longest part of a name that is a module; what follows it is something in it.
            target = next((t for n in range(len(parts), 0, -1) if (t := ".".join(parts[:n])) in modules), None)
            if target is None:
                raise LookupError(f"{path.relative_to(root)} imports ssv.{each}, which is not there")
            own.add(target)
        # `from package import module` names the package too: what was meant is the module.
        own -= {t for t in own if modules[t].name == "__init__.py" and any(o.startswith(f"{t}.") for o in own)}
        own.discard(name)
    return found


def edges(root: Path) -> dict[tuple[str, str], list[str]]:
    """Imports between rooms, and the modules that make them."""
    modules, found = modules_of(root), {}
    for name, targets in imports(root).items():
        for target in targets:
            edge = room_of(modules[name], root), room_of(modules[target], root)
            if edge[0] != edge[1]:
                found.setdefault(edge, []).append(f"{name} imports {target}")
    return found


def wrong(root: Path) -> list[str]:
    """Imports that the table does not allow."""
    return sorted(each for (room, of), names in edges(root).items() if of not in ROOMS[room] for each in names)


def test_rooms_import_what_stands_in_the_table() -> None:
    assert not wrong(ROOT)


def test_nothing_that_is_allowed_is_unused() -> None:
    used = edges(ROOT)
    assert not [(room, of) for room, allowed in ROOMS.items() for of in allowed if (room, of) not in used]


def test_the_table_goes_one_way() -> None:
    order = list(ROOMS)
    assert not [(room, of) for room, allowed in ROOMS.items() for of in allowed if order.index(of) >= order.index(room)]


def test_every_room_is_there() -> None:
    assert not [room for room in ROOMS if not (ROOT / room).exists()]


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph, done, path = imports(ROOT), set(), []

    def visit(name: str) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for target in sorted(graph[name]):
            visit(target)
        done.add(path.pop())

    for name in sorted(graph):
        visit(name)


PLANTED = {
    "a from-import": "from ssv.{upper} import anything",
    "an import": "import ssv.{upper}",
    "an import under another name": "import ssv.{upper} as x",
    "a from-import of the module": "from ssv.{package} import {module}",
    "among others, in brackets": "from ssv.{package} import (\n    {module} as y,\n)",
    "inside a function": "def f():\n    from ssv.{upper} import anything",
    "for types alone": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ssv.{upper} import anything",
    "by name": 'import importlib\nx = importlib.import_module("ssv.{upper}")',
    "by a name in a keyword": 'import importlib\nx = importlib.import_module(name="ssv.{upper}")',
    "by a name within a package": 'import importlib\nx = importlib.import_module(".{module}", "ssv.{package}")',
    "by a relative name": 'import importlib\nx = importlib.import_module("..{upper}", __package__)',
    "by a name in two parts": 'import importlib\nx = importlib.import_module("ssv." + "{upper}")',
    "by a function of another name": 'from importlib import import_module as load\nx = load("ssv.{upper}")',
    "by a function bound to another name": 'import importlib\nload = importlib.import_module\nx = load("ssv.{upper}")',
    "by a module of another name": 'import importlib as i\nx = i.import_module("ssv.{upper}")',
    "by the function below all": 'x = __import__("ssv.{package}", fromlist=["{module}"])',
    "by that function, of the whole package": 'x = __import__("ssv", fromlist=["{upper}"])',
    "by what runs a module": 'import runpy\nrunpy.run_module("ssv.{upper}")',
    "everything": "from ssv.{upper} import *",
}


@pytest.mark.parametrize("line", PLANTED.values(), ids=PLANTED)
@pytest.mark.parametrize(("room", "upper"), [("plugins", "builder.pair"), ("plugins", "runtime.engines.torch_engine")])
def test_an_upward_import_is_found(tmp_path: Path, line: str, room: str, upper: str) -> None:
    package, _, module = upper.rpartition(".")
    for name in (room, package.replace(".", "/")):
        for folder in (Path(name), *Path(name).parents):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            if folder != Path():
                (tmp_path / folder / "__init__.py").touch()
    (tmp_path / f"{upper.replace('.', '/')}.py").write_text("anything = 1\n")
    (tmp_path / room / "planted.py").write_text(line.format(upper=upper, package=package, module=module) + "\n")
    assert wrong(tmp_path) == [f"{room}.planted imports {upper}"]


def test_what_is_ours_is_imported_by_a_name_that_stands_there() -> None:
    made_up = set()
    for name, path in modules_of(ROOT).items():
        tree = ast.parse(path.read_text())
        assert "import_module" not in {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}, name
        by_name = importers(tree) - {"find_spec"}
        for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
            if called(call) in by_name:
                made_up |= {name} if not all(isinstance(arg, ast.Constant) for arg in call.args) else set()
    assert made_up == NAMES_MADE_UP


@pytest.mark.parametrize(
    ("folder", "line"), [("plugins", "from ..builder import pair"), ("plugins/sub", "from ...builder.pair import x")]
)
@pytest.mark.parametrize("file", ["planted.py", "__init__.py"])
def test_relative_imports_are_found(tmp_path: Path, folder: str, line: str, file: str) -> None:
    for each in ("builder", folder):
        (tmp_path / each).mkdir(parents=True)
    for name in ("builder/__init__.py", "builder/pair.py"):
        (tmp_path / name).touch()
    (tmp_path / folder / file).write_text(line + "\n")
    planted = folder.replace("/", ".") + (".planted" if file == "planted.py" else "")
    assert wrong(tmp_path) == [f"{planted} imports builder.pair"]


@pytest.mark.parametrize("line", ["import ssv.builder", "from ssv import builder", "from .. import builder as b"])
def test_a_package_that_is_imported_is_found(tmp_path: Path, line: str) -> None:
    for name in ("plugins", "builder"):
        (tmp_path / name).mkdir()
    (tmp_path / "builder/__init__.py").write_text("x = 1\n")
    (tmp_path / "plugins/planted.py").write_text(f"{line}\n")
    assert wrong(tmp_path) == ["plugins.planted imports builder"]


def test_an_import_of_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/planted.py").write_text("from ssv.builder.consol import error\n")
    with pytest.raises(LookupError, match=r"plugins/planted.py imports ssv.builder.consol"):
        wrong(tmp_path)


def test_a_file_outside_of_all_rooms_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "runtime/elsewhere").mkdir(parents=True)
    with pytest.raises(LookupError, match="is in no room"):
        room_of(tmp_path / "elsewhere/x.py", tmp_path)


MODULES = sorted(modules_of(ROOT).items())


@pytest.mark.parametrize(("name", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_nothing_is_unpickled_or_evaluated(name: str, path: Path) -> None:
    tree = ast.parse(path.read_text())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    names = {ast.unparse(call.func) for call in calls}
    # The one file that reads pickles, for their tensors alone, and refuses what else they hold.
    loads = [call for call in calls if ast.unparse(call.func) == "torch.load"]
    assert not loads or name == "builder.convert"
    assert all(any(ast.unparse(k) == "weights_only=True" for k in call.keywords) for call in loads)
    assert not names & {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load"}
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    assert not modules & {"pickle", "cloudpickle", "dill", "joblib"}
    assert not any(k.arg == "trust_remote_code" for call in calls for k in call.keywords)
