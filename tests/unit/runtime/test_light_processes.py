"""What needs no network imports no torch: in a process of its own each, since here others have imported it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT
from tiny_bundle import build, write_recipe

PROGRAM = """
import contextlib, io, json, sys
from pathlib import Path

def command(module, *arguments):
    main = __import__(module, fromlist=["main"]).main
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        return main(list(arguments))

def model(name, **parameters):
    "A model of the server, initialized, with a server's library that is made up."
    import importlib.util, types
    fake = types.ModuleType("triton_python_backend_utils")
    class Family:
        COUNTER = GAUGE = 0
        def __init__(self, **settings): pass
        def Metric(self, labels): return self
    fake.MetricFamily = Family
    sys.modules[fake.__name__] = fake
    spec = importlib.util.spec_from_file_location(name, Path(ROOT) / "triton_repo" / name / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    instance = module.TritonPythonModel()
    config = {"name": name, "parameters": {key: {"string_value": value} for key, value in parameters.items()}}
    instance.initialize({"model_config": json.dumps(config)})
    return instance

ROOT, bundle = sys.argv[1:]
BODY
heavy = sorted({"torch", "transformers"} & sys.modules.keys())
print(" ".join(heavy) or "light")
"""

BODIES = {
    "ssv-build --help": 'command("ssv.builder.cli", "--help")',
    "ssv-build pair --help": 'command("ssv.builder.cli", "pair", "--help")',
    "ssv-build inspect": 'assert command("ssv.builder.cli", "inspect", "--bundle", bundle) == 0',
    "ssv-build inspect --json": 'assert command("ssv.builder.cli", "inspect", "--bundle", bundle, "--json") == 0',
    "ssv-generate --help": 'command("ssv.client.cli", "--help")',
    "ssv-generate --url": 'assert command("ssv.client.cli", "hello", "--url", "grpc://127.0.0.1:1") == 2',
    "ssv-bench --help": 'command("ssv.ab.bench", "--help")',
    "ssv-eval --help": 'command("ssv.ab.evaluation.cli", "--help")',
    "ssv-ab --help": 'command("ssv.ab.cli", "--help")',
    "ssv-serve --help": 'command("ssv.triton_repo.serve", "--help")',
    "ssv-serve": 'assert command("ssv.triton_repo.serve", "--bundle", bundle, "--tritonserver", "/nowhere") == 2',
    "the OpenAI API": (
        "from ssv.triton_repo.openai.translation import Models\n"
        'assert Models.of_bundle(Path(bundle)).tiers[0] == "premium"\n'
        'command("ssv.triton_repo.openai.process", "--help")'
    ),
    "preprocessing": 'model("preprocessing", bundle=bundle)',
    "postprocessing": 'model("postprocessing", bundle=bundle)',
    "ab_router": (
        "from ssv.ab.routing import Routing\n"
        'arms = {"a": {"share": 0.5}, "b": {"share": 0.5, "tier": "premium"}}\n'
        'routing = Routing.model_validate({"arms": arms, "log": str(Path(bundle).parent / "log.jsonl"), "salt": "x"})\n'
        'router = model("ab_router", routing=routing.model_dump_json(), own_url="grpc://127.0.0.1:1", certificate="")\n'
        "router.finalize()"
    ),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("light")
    build(write_recipe(base), base / "bundle")
    return base / "bundle"


def imported(body: str, bundle: Path) -> str:
    program = PROGRAM.replace("BODY", body)
    done = subprocess.run([sys.executable, "-c", program, str(ROOT), str(bundle)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_no_torch(body: str, bundle: Path) -> None:
    assert imported(body, bundle) == "light"


def test_the_check_sees_torch(bundle: Path) -> None:
    assert imported("import ssv.runtime.llm", bundle) == "torch"


def test_an_engine_needs_no_transformers(bundle: Path) -> None:
    """Nor half of what torch brings along."""
    body = "from ssv.runtime.llm import LLM\nLLM.load(bundle, max_length=64)\nassert 'sympy' not in sys.modules"
    assert imported(body, bundle) == "torch"


DECODES = (
    "from ssv import LLM, Request, SamplingParams\n"
    "llm = LLM.load(bundle, max_length=64)\n"
    'llm.generate([Request((3, 4), "premium", SamplingParams(max_tokens=4))])\n'
)
REPORT = """
print(sorted(name for name in sys.modules if name.startswith(("ssv.builder", "tensorrt"))))
sys.exit()
"""


@pytest.mark.parametrize("body", ["import ssv.runtime\n", DECODES], ids=["import", "decoding"])
def test_the_runtime_loads_no_builder_and_no_tensorrt(body: str, bundle: Path) -> None:
    assert imported(f"{body}{REPORT}", bundle) == "[]"


def test_the_check_sees_a_builder(bundle: Path) -> None:
    assert imported(f"import ssv.builder.place\n{REPORT}", bundle) != "[]"
