"""The direction of imports, and that nothing is unpickled or evaluated."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("builder", "plugins", "runtime", "triton_repo", "client", "ab")
MODULES = sorted(
    p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py") if p.name not in ("__init__.py", "model.py")
)
SHIMS = sorted((ROOT / "triton_repo").glob("*/1/model.py"))
COMPOSITION_ROOTS = {"builder/cli.py", "triton_repo/serve.py"}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_is_imported_from_the_right(path: Path) -> None:
    banned = {
        "plugins": ("ssv.",),
        "builder": ("ssv.runtime", "ssv.triton_repo", "ssv.client", "ssv.ab"),
        "runtime": ("ssv.triton_repo", "ssv.client", "ssv.ab"),
        "triton_repo": ("ssv.client", "ssv.ab"),
        "client": ("ssv.triton_repo", "ssv.ab"),
        "ab": ("ssv.runtime", "ssv.triton_repo"),
    }
    if name_of(path) in COMPOSITION_ROOTS:
        return
    folder = path.relative_to(ROOT).parts[0]
    wrong = [m for m in imports_of(path) if m.startswith(banned[folder]) and not m.startswith(f"ssv.{folder}")]
    assert not wrong


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_may_import_and_keeps_to_it(path: Path) -> None:
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    if name_of(path) in COMPOSITION_ROOTS:
        assert "composition root" in doc.lower()
        return
    stated = re.search(r"May import: (.*)", doc, re.DOTALL)
    assert stated, "the module's docstring lacks its `May import:`"
    text = re.sub(r"\s+", " ", stated.group(1))
    if "everything" in text:
        return
    used = {
        m for m in imports_of(path) if re.fullmatch(r"ssv\.(builder|runtime|plugins|triton_repo|client|ab)\.\w+", m)
    }
    used = {m for m in used if (ROOT / Path(*m.split(".")[1:])).with_suffix(".py").exists()}
    # `ssv.builder.a, .b; ssv.runtime.c` lists modules of one package after its first.
    allowed = set()
    for part in text.split(";"):
        package = re.search(r"ssv\.(\w+)", part)
        if package:
            allowed |= {f"ssv.{package.group(1)}.{name}" for name in re.findall(r"\.(\w+)", part)}
    assert used <= allowed, f"imports {sorted(used - allowed)}, allows {sorted(allowed)}"


@pytest.mark.parametrize(
    "name", ["scheduler", "prompt_cache", "intake", "pieces", "server_metrics", "tokenizer", "text"]
)
def test_what_is_no_arithmetic_imports_no_torch(name: str) -> None:
    assert not any(m.split(".")[0] == "torch" for m in imports_of(ROOT / "runtime" / f"{name}.py"))


@pytest.mark.parametrize("path", SHIMS, ids=name_of)
def test_models_of_the_server_import_the_runtime_alone(path: Path) -> None:
    # The router is a client of its arms that lives in the server.
    banned = ("ssv.triton_repo", "ssv.client", "ssv.plugins") + (() if "ab_router" in path.parts else ("ssv.ab",))
    wrong = [m for m in imports_of(path) if m.startswith(banned)]
    assert SHIMS and not wrong


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    names = {ast.unparse(call.func) for call in calls}
    assert not names & {"eval", "exec", "torch.load", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load"}
    assert not imports_of(path) & {"pickle", "cloudpickle", "dill", "joblib"}
    assert not any(k.arg == "trust_remote_code" for call in calls for k in call.keywords)
