"""Package map and dependencies of ssv. The folders of the repository become sub-packages of one package."""

from pathlib import Path

from setuptools import Extension, setup

HERE = Path(__file__).parent

ROOMS = ("support", "plugins", "model", "bundle", "runtime", "builder", "client", "ab", "triton_repo")
"""Folders that are packages; tests/unit/test_architecture.py says what each may import."""


def packages() -> list[str]:
    """Every package below the rooms, as it is imported."""
    folders = sorted(init.parent for room in ROOMS for init in (HERE / room).rglob("__init__.py"))
    return [".".join(("ssv", *folder.relative_to(HERE).parts)) for folder in folders]


# Torch is asked for by version: without one, pip brings a build with several GB of CUDA packages along.
TORCH = ["torch==2.13.0", "numpy<2", "safetensors"]
TOKENIZER = ["transformers==5.23.0", "tokenizers", "jinja2"]
# Outputs of a given form; it brings nothing along.
STRUCTURED = ["llguidance==1.9.1"]
SERVER = [*TORCH, *TOKENIZER, *STRUCTURED, "tritonclient[grpc]", "psutil", "fastapi", "uvicorn", "aiohttp"]

EXTRAS = {
    "runtime": [*TORCH, *TOKENIZER],
    "builder": [*TORCH, *TOKENIZER, "gguf", "accelerate", "scipy"],
    # Compiles the kernels of the plugins. PyTorch's CUDA builds bring the Triton that they want along.
    "kernels": [*TORCH, "triton"],
    # What quantizes, and the TensorRT that builds without a GPU. Its sibling for data centres, tensorrt-cu13, is where
    # its GPU is.
    "engines": [*TORCH, *TOKENIZER, "nvidia-modelopt==0.47.0", "tensorrt-rtx-cu13==1.7.1.116"],
    # What watches over a tritonserver that is there, and the OpenAI API before it; `serve` brings a tritonserver along.
    "server": SERVER,
    "serve": [*SERVER, "nvidia-pytriton==0.7.0"],
    "structured": [*STRUCTURED],
    "plot": ["matplotlib"],
    # Comparisons need no torch: they ask servers.
    "ab": ["tritonclient[grpc]", "numpy<2", "scipy", "openai", "matplotlib", "jinja2", "prometheus-client"],
    # lm-eval itself wants no torch. From 25 on pyarrow, which it brings along, wants numpy 2.
    "eval": [*TORCH, *TOKENIZER, "lm-eval==0.4.13", "pyarrow<25", "scipy", "matplotlib"],
    # The bindings are of full TensorRT, without its library: the tests drive its plugin library.
    "dev": [
        *STRUCTURED,
        "pytest",
        "pytest-xdist",
        "hypothesis",
        "cryptography",
        "ruff",
        "mypy",
        "types-PyYAML",
        "types-psutil",
        "types-protobuf",
        "types-grpcio",
        "openai",
        "httpx",
        "jsonschema",
        "kubernetes-validate",
        "tensorrt-cu13-bindings==11.4.0.106",
        # Compiles the CUDA kernels without a GPU; PyTorch's CUDA builds bring their own.
        "nvidia-cuda-nvrtc==13.5.37",
    ],
}

# An engine that others wrote (ssv.runtime.trtllm.install names the same range). Not of `all`: what the public index has
# under this name is a stand-in, and the engine brings a torch of its own.
TRTLLM = ["tensorrt-llm>=1.3.0rc26,<1.5"]

# Clients that others wrote, for tests against a real server (`make test-clients`). Not of `all`: they ask for other
# versions of what is used here, so that they have an environment of their own, without torch. guidellm, which has its
# dependencies here but for torch, is installed beside them without any.
CLIENTS = [
    "aiperf==0.13.0",
    "langchain-openai==1.7.4",
    "litellm==1.110.2",
    "lm-eval[api]==0.4.13",
    "openai",
    "prometheus-client",
    "pydantic-ai-slim[openai]==2.68.0",
    "click~=8.4.0",
    "culsans~=0.10.0",
    "datasets>=5.0.1",
    "eval_type_backport",
    "faker",
    "ftfy",
    "httpx[http2]",
    "loguru",
    "more-itertools",
    "msgpack",
    "sanic",
    "tabulate",
    "transformers",
    "uvloop",
    "websockets",
]

setup(
    name="ssv",
    version="0.1.0",
    description="Sparse Speculative Verification: build, decode, serve and measure draft/target pairs",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    packages=["ssv", *packages()],
    package_dir={"ssv": "package", **{f"ssv.{room}": room for room in ROOMS}},
    package_data={
        "": ["py.typed"],
        "ssv.plugins.cuda": ["*.cu", "*.cuh"],
        "ssv.builder": ["presets/**/*"],
        "ssv.triton_repo": ["*/config.pbtxt", "*/1/*", "*/1/.gitkeep"],
        "ssv.triton_repo.openai": ["web/*"],
        "ssv.ab": ["report.html.jinja", "report.css"],
        "ssv.ab.evaluation": ["evaluation.html.jinja"],
    },
    # Optional: without a C compiler the CPU engine falls back to PyTorch operations.
    ext_modules=[
        Extension(
            "ssv.runtime.engines._cpu",
            ["runtime/engines/_cpu.c", "runtime/engines/_crew.c"],
            depends=["runtime/_processors.h", "runtime/engines/_crew.h", "runtime/engines/_linear.h"],
            extra_compile_args=["-O3", "-ffast-math"],
            libraries=["m"],  # brings the vector expf along
            optional=True,
        ),
        # What is fused is said to be: every processor's kernels give the same bits.
        Extension(
            "ssv.runtime.engines._linear",
            [f"runtime/engines/_linear{part}.c" for part in ("", "_any", "_x86", "_arm")],
            depends=["runtime/_processors.h", "runtime/engines/_linear.h", "runtime/engines/_linear_kernels.h"],
            extra_compile_args=["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"],
            libraries=["m"],
            optional=True,
        ),
        # The same bits with and without fused multiply-adds; infinities and NaN are told apart.
        Extension(
            "ssv.runtime.decode._sampling",
            ["runtime/decode/_sampling.c"],
            depends=["runtime/_processors.h"],
            extra_compile_args=["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"],
            libraries=["m"],
            optional=True,
        ),
    ],
    install_requires=["pydantic>=2", "pyyaml", "rich"],
    extras_require={
        **EXTRAS,
        "all": sorted({name for extra in EXTRAS.values() for name in extra}),
        "clients": CLIENTS,
        "trtllm": TRTLLM,
    },
    entry_points={
        "console_scripts": [
            "ssv-build = ssv.builder.cli:main",
            "ssv-generate = ssv.client.cli:main",
            "ssv-serve = ssv.triton_repo.serve:main",
            "ssv-bench = ssv.ab.bench:main",
            "ssv-ab = ssv.ab.cli:main",
            "ssv-eval = ssv.ab.evaluation.cli:main",
        ]
    },
)
