"""What `fastreg doctor` and the errors of loading advise is right for a wheel's user and for a checkout's."""

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
import sysconfig
import types

import pytest
import torch
from helpers import ROOT

from fastreg import _distribution, _registry
from fastreg.cli import doctor

FORCED = "pip install --no-build-isolation --force-reinstall --no-deps"
FROM_INDEX = f"{FORCED} --no-binary torch-fastreg torch-fastreg"


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """installed(how): fastreg seems to have come as a "wheel", or from a "folder", whose path is given back,
    as an "editable" one or from one that is "gone" by now; packages to build with are there.
    """

    def pretend(how):
        folder = tmp_path / "checkout"
        if how != "gone":
            folder.mkdir(exist_ok=True)
        origin = {"url": folder.as_uri(), "dir_info": {"editable": True} if how == "editable" else {}}
        if how == "wheel":
            origin = {"url": "file:///tmp/torch_fastreg.whl", "archive_info": {}}
        ours = types.SimpleNamespace(read_text=lambda name: json.dumps(origin))
        monkeypatch.setattr(importlib.metadata, "distribution", lambda name: ours)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: ours)
        return str(folder)

    return pretend


def test_rebuilding_starts_from_where_fastreg_came_from(installed, monkeypatch):
    folder = installed("folder")
    assert _distribution.rebuild() == f"{FORCED} {folder}"
    assert _distribution.rebuild("-Cx") == f"{FORCED} -Cx {folder}"
    # Without -e the checkout's own environment would run a copy from then on.
    installed("editable")
    assert _distribution.rebuild() == f"{FORCED} -e {folder}"
    installed("wheel")
    assert _distribution.rebuild() == FROM_INDEX
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert _distribution.rebuild() == f"pip install scikit-build-core pybind11 cmake ninja && {FROM_INDEX}"


def test_a_folder_that_is_gone_is_not_named(installed):
    installed("gone")
    assert _distribution.rebuild() == FROM_INDEX


@pytest.fixture
def upgraded(installed, monkeypatch):
    """upgraded(how, version): why there is no C++ autograd after torch became that version."""

    def reason(how, version, built=("_autograd_2_9", "_autograd_2_10", "_autograd_2_15")):
        installed(how)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(_registry, "_built", lambda prefix: list(built))
        monkeypatch.setattr(torch, "__version__", version)
        monkeypatch.delenv("FASTREG_AUTOGRAD", raising=False)
        module, why_not = _registry._load_autograd()
        assert module is None and why_not.startswith(
            f"fastreg's C++ autograd was not built for torch {version}"
        )
        return why_not

    return reason


def test_a_newer_torch_has_its_autograd_in_a_later_release(upgraded):
    later = "; a release of fastreg that is later than torch 2.16 has it: pip install torch-fastreg --upgrade"
    said = upgraded("wheel", "2.16.1+cu140")
    assert f"2.16.1+cu140, only for 2.9, 2.10, 2.15{later}; rebuild it with this torch: pip" in said
    assert "release" not in upgraded("wheel", "2.12.0")  # left out on purpose: a later one has no more
    assert "release" not in upgraded("editable", "2.16.1") and "only for 2.9, 2.10, 2.15;" in said.replace(
        later, ";"
    )
    assert "only for" not in upgraded("wheel", "2.16.1", built=())


def test_doctor_says_what_is_slower_and_which_release_has_the_rest(upgraded, monkeypatch):
    why_not = upgraded("wheel", "2.16.0")
    monkeypatch.undo()
    monkeypatch.setattr(_registry, "fast", None)
    monkeypatch.setattr(_registry, "why_not_fast", why_not)
    lines = list(doctor._lines(doctor.collect()))
    at = lines.index(("autograd", "Python in use: same results, slower for small tensors"))
    assert "a release of fastreg that is later than torch 2.16 has it" in lines[at + 1][1]


def test_modules_that_this_python_cannot_load_are_not_counted(monkeypatch, tmp_path):
    ours, theirs = sysconfig.get_config_var("EXT_SUFFIX"), ".cpython-309-x86_64-linux-gnu.so"
    for name in (f"_autograd_2_10{ours}", f"_autograd_2_11{theirs}", f"_C{ours}"):
        (tmp_path / name).touch()
    monkeypatch.setattr(sys.modules["fastreg"], "__path__", [str(tmp_path)])
    assert _registry._built("_autograd_") == ["_autograd_2_10"]


def test_kernels_for_another_cuda_are_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(_registry, "_built", lambda prefix: ["_C_cuda13"])
    module, why_not = _registry._load_cuda()
    assert module is None and f"without kernels for CUDA 12, which torch {torch.__version__} uses" in why_not
    assert "(it has those for CUDA 13, which need a torch of that CUDA); with an nvcc 12.x" in why_not
    monkeypatch.setattr(_registry, "_built", lambda prefix: [])
    assert "uses; with an nvcc 12.x on PATH, rebuild it: pip" in _registry._load_cuda()[1]


@pytest.mark.parametrize("capability", [(7, 0), (9, 0)])  # older than the code, and newer
def test_a_gpu_without_code_is_told_how_to_get_it(capability, installed, monkeypatch):
    installed("wheel")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capability)
    kernels = types.SimpleNamespace(build_info=lambda: {"architectures": "80-real", "nvcc": "13.0"})
    monkeypatch.setattr(_registry, "cuda", kernels)
    monkeypatch.setattr(_registry, "why_no_cuda", None)
    cuda = doctor._cuda()
    number = "{}.{}".format(*capability)
    assert not cuda["usable"] and cuda["why_not"] == (
        f"A GPU (sm_{number.replace('.', '')}) cannot run fastreg's kernels, which were built for 80-real; "
        f"with an nvcc of CUDA 13.0 on PATH, rebuild them: export TORCH_CUDA_ARCH_LIST={number}; {FORCED} "
        "-Ccmake.define.FASTREG_CUDA=ON --no-binary torch-fastreg torch-fastreg"
    )


def test_a_stranger_is_removed_as_fits_how_fastreg_was_installed(installed, monkeypatch):
    stranger = types.SimpleNamespace(version="1.2", metadata={"Summary": "sparse regressions"})
    monkeypatch.setattr(importlib.metadata, "distributions", lambda name: [stranger])
    installed("wheel")
    (said,) = _distribution.strangers()
    assert "fastreg 1.2 (sparse regressions)" in said and said.endswith(
        "overwritten the other; run: pip uninstall -y fastreg torch-fastreg; pip install torch-fastreg"
    )
    folder = installed("folder")
    assert _distribution.strangers()[0].endswith(f"torch-fastreg; pip install --no-build-isolation {folder}")
    installed("editable")  # nothing of a checkout is overwritten
    assert _distribution.strangers()[0].endswith("this checkout hides it; run: pip uninstall -y fastreg")


def test_the_module_of_another_python_is_named(tmp_path):
    """Python's own message speaks of a circular import."""
    shutil.copytree(
        ROOT / "fastreg", tmp_path / "fastreg", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    (tmp_path / "fastreg/_C.cpython-309-x86_64-linux-gnu.so").touch()
    torch_at = str(importlib.metadata.distribution("torch").locate_file(""))
    # -S: no .pth file, whose finder would lead to the checkout's modules.
    code = f"import sys; sys.path += [{str(tmp_path)!r}, {torch_at!r}]; import fastreg"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    line = done.stderr.strip().splitlines()[-1]
    wanted = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert f"this Python loads {wanted}, and _C.cpython-309-x86_64-linux-gnu.so is there" in line
    assert line.endswith("pip install torch-fastreg, or `make build` in a checkout")


def test_a_stranger_that_took_the_place_of_fastreg_is_named(tmp_path):
    """Whichever of the two was installed last has the other's `__init__.py`."""
    (tmp_path / "fastreg").mkdir()
    for name in ("__main__.py", "_distribution.py", "cli"):
        copy = shutil.copytree if name == "cli" else shutil.copy
        copy(ROOT / "fastreg" / name, tmp_path / "fastreg" / name)
    (tmp_path / "fastreg/__init__.py").write_text("__version__ = '1.2'\n")
    for name, version in {"fastreg": "1.2", "torch_fastreg": "0.2.0"}.items():
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: sparse regressions\n"
        (info / "METADATA").write_text(text)
    command = [sys.executable, "-S", "-m", "fastreg", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(
        f"fastreg: {tmp_path / 'fastreg/__init__.py'} is another project's; "
        "the distribution fastreg 1.2 (sparse regressions) is installed too"
    )
    assert "run: pip uninstall -y fastreg torch-fastreg; pip install torch-fastreg" in done.stderr


@pytest.mark.parametrize("enabled", [True, False])
def test_a_free_threaded_python_is_named(monkeypatch, enabled):
    assert not any("GIL" in text for _, text in doctor._lines({**doctor.collect(), "gil": "always"}))
    found = sysconfig.get_config_var
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: name == "Py_GIL_DISABLED" or found(name))
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: enabled, raising=False)
    texts = [text for _, text in doctor._lines(doctor.collect())]
    assert f"free-threaded, its GIL is {'on' if enabled else 'off'}" in texts
