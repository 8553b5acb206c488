"""The tools that make and try a wheel: what they ask of pip, and what they write."""

import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from helpers import ROOT, run_python, tool

import fastreg as fr
from fastreg import _registry


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A site whose pip knows only its own folder of wheels, and is held back by a constraint."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    with zipfile.ZipFile(shelf / "torch-9.9.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("torch/include/torch/version.h", "9.9.0")
        wheel.writestr("torch/lib/libtorch.so", "large")
        wheel.writestr(
            "torch-9.9.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 9.9.0\n"
        )
        wheel.writestr("torch-9.9.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("torch-9.9.0.dist-info/RECORD", "")
    other = "cp312" if sys.version_info[:2] != (3, 12) else "cp313"
    with zipfile.ZipFile(shelf / f"torch-9.9.2-{other}-none-any.whl", "w") as wheel:
        text = "Metadata-Version: 2.1\nName: torch\nVersion: 9.9.2\n"
        wheel.writestr("torch-9.9.2.dist-info/METADATA", text)
        wheel.writestr("torch-9.9.2.dist-info/WHEEL", f"Wheel-Version: 1.0\nTag: {other}-none-any\n")
        wheel.writestr("torch-9.9.2.dist-info/RECORD", "")
    (tmp_path / "constraints.txt").write_text("torch<3\n")
    config = f"[global]\nno-index = true\nfind-links = {shelf}\nconstraint = {tmp_path / 'constraints.txt'}\n"
    (tmp_path / "pip.conf").write_text(config)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    return tmp_path


# Before Python 3.12 find_spec("pip") makes setuptools, which inductor imports, fail in the same process.
@pytest.mark.skipif(not list(importlib.metadata.distributions(name="pip")), reason="needs pip")
def test_headers_come_from_the_users_index_whatever_torch_is_installed(site, capsys):
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(site), "torch==9.9.0"]
    assert subprocess.run(command, capture_output=True).returncode != 0  # the constraint holds
    wheel = tool("wheel")
    folder = wheel.headers("9.9.0", site / "headers")
    assert (folder / "include/torch/version.h").read_text() == "9.9.0"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["9.9.0"]
    with pytest.raises(
        SystemExit,
        match=r"(?s)torch 9\.9\.1, whose headers .*No matching .* --headers a folder with 9\.9\.1/inc",
    ):
        wheel.headers("9.9.1", site / "headers")
    # torch 2.15 has no wheel for Python 3.10, and 2.14 none for 3.15: there nobody can have that torch.
    assert wheel.headers("9.9.2", site / "headers") is None
    assert "without C++ autograd for torch 9.9.2" in capsys.readouterr().out


@pytest.mark.skipif(not shutil.which("readelf"), reason="no readelf; apt-get install binutils")
def test_functions_that_newer_systems_changed_are_known():
    """`make wheel` leads calls of them to their oldest version; auditwheel refuses a wheel in which one is
    forgotten, after a long build.
    """
    known = re.search(r"set\(older_functions(.*?)\)", (ROOT / "cmake/older_glibc.cmake").read_text(), re.S)[1]
    known = {*known.split(), "__libc_single_threaded"}
    for module in filter(None, (fr._C, _registry.fast, _registry.cuda)):
        command = ["readelf", "-W", "--dyn-syms", module.__file__]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        called = re.findall(r"UND (\w+)@GLIBC_(\d+)\.(\d+)", said)
        assert called
        newer = {name for name, *version in called if tuple(map(int, version)) > (2, 28)}
        assert newer <= known, f"{module.__name__}: {newer - known}"


def test_the_table_is_written_between_its_marks(tmp_path):
    check = tool("wheel_check")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{check.BEGIN}old\n{check.END}after\n")
    check.write(page, tmp_path / "some.whl", check.HEAD + "| 2.10.0 | C++ | _C | 3/3 |\n")
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "`some.whl`" in text and "| 2.10.0 | C++ | _C | 3/3 |\n" in text
    (tmp_path / "other.md").write_text("no marks")
    with pytest.raises(SystemExit, match="must have one line"):
        check.write(tmp_path / "other.md", tmp_path / "some.whl", "")
    assert (ROOT / "docs/compatibility.md").read_text().count(check.BEGIN) == 1


def test_one_wheel_or_none_is_chosen(tmp_path):
    check = tool("wheel_check")
    with pytest.raises(SystemExit, match="has 0; run `make wheel`"):
        check._only_wheel(tmp_path)
    here = f"torch_fastreg-1-cp311-cp311-linux_{platform.machine()}.whl"
    (tmp_path / here).touch()
    (tmp_path / "torch_fastreg-1-cp311-cp311-linux_another.whl").touch()
    assert check._only_wheel(tmp_path).name == here


def test_a_tag_of_a_newer_glibc_is_refused():
    runs = tool("wheel").runs_on_glibc_2_28
    both = "torch_fastreg-1-cp311-cp311-manylinux_2_24_aarch64.manylinux_2_28_aarch64.whl"
    assert runs(both, "aarch64") and not runs(both, "x86_64")
    assert not runs("torch_fastreg-1-cp311-cp311-manylinux_2_34_x86_64.whl", "x86_64")
    assert not runs("torch_fastreg-1-cp311-cp311-linux_x86_64.whl", "x86_64")


@pytest.mark.skipif(not all(map(shutil.which, ("g++", "readelf"))), reason="needs g++ and readelf")
def test_modules_that_a_release_must_not_have_are_refused(monkeypatch, tmp_path):
    look_at = tool("wheel")._look_at_module
    source, other = tmp_path / "source.cpp", tmp_path / "libother.so"
    source.write_text("const char* where() { return __FILE__; }\n")

    def module(name, file, *options):
        command = ["g++", "-shared", "-fPIC", "-x", "c++", str(file), "-o", str(tmp_path / name), *options]
        subprocess.run(command, check=True)
        return tmp_path / name

    module(other.name, os.devnull, "-Wl,-soname,libother.so.1")
    clean = module("_autograd_9_9.so", source, f"-ffile-prefix-map={tmp_path}/=")
    assert look_at(clean, [str(tmp_path)]) == []
    linked = ("-Wl,-rpath,/somewhere", "-Wl,--no-as-needed", "-x", "none", str(other))
    assert look_at(module("_autograd_9_8.so", source, *linked), [str(tmp_path)]) == [
        "has an RPATH",
        "needs libother.so.1",
        f"contains the path {tmp_path}",
    ]
    audit = tmp_path / "torch-abi-audit"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    for said, faults in {"STABLE": 0, "UNSTABLE": 1, "nothing": 1}.items():
        audit.write_text(f"#!/bin/sh\necho {said}\n")
        audit.chmod(0o755)
        assert len(look_at(clean.rename(tmp_path / "_C.so"), [])) == faults
        clean = (tmp_path / "_C.so").rename(clean)


def test_every_wheel_in_the_folder_has_a_checksum(tmp_path):
    for arch in ("x86_64", "aarch64"):
        (tmp_path / f"torch_fastreg-1-cp311-cp311-linux_{arch}.whl").write_text(arch)
    sums = tool("wheel").checksums(tmp_path)
    assert [name.split("linux_")[1] for name in sums] == ["aarch64.whl", "x86_64.whl"]
    assert sums["torch_fastreg-1-cp311-cp311-linux_x86_64.whl"] == hashlib.sha256(b"x86_64").hexdigest()


@pytest.fixture
def wheel_of(tmp_path):
    """wheel_of(minor, version, **files): a wheel of fastreg for CPython 3.`minor`, with `files` besides."""

    def make(minor, version="1", **files):
        suffix = f"cpython-3{minor}-x86_64-linux-gnu.so"
        content = {
            f"fastreg/_C.{suffix}": f"kernels of 3.{minor}",
            f"fastreg/_autograd_2_{minor}.{suffix}": "autograd",
            "fastreg/__init__.py": "import fastreg._C",
            **{f"fastreg/{name}": text for name, text in files.items()},
        }
        tag, about = f"cp3{minor}-cp3{minor}-linux_x86_64", f"torch_fastreg-{version}.dist-info"
        content |= {
            f"{about}/METADATA": f"Metadata-Version: 2.1\nName: torch-fastreg\nVersion: {version}\n",
            f"{about}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n\n",
        }
        hashes = {name: hashlib.sha256(text.encode()).digest() for name, text in content.items()}
        coded = {name: base64.urlsafe_b64encode(h).decode().rstrip("=") for name, h in hashes.items()}
        record = "".join(f"{name},sha256={coded[name]},{len(content[name])}\n" for name in content)
        path = tmp_path / f"torch_fastreg-{version}-{tag}.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            for name, text in {**content, f"{about}/RECORD": f"{record}{about}/RECORD,,\n"}.items():
                wheel.writestr(zipfile.ZipInfo(name, (2026, 1, 2, 3, 4, 6)), text)
        return path

    return make


@pytest.mark.skipif(
    not importlib.util.find_spec("wheel"), reason="needs wheel, which make wheel-merge installs"
)
def test_wheels_of_several_pythons_become_one(wheel_of, tmp_path):
    merge = tool("merge_wheels").merge
    wheels = [wheel_of(minor) for minor in (10, 12)]
    made = merge(wheels, tmp_path / "out")
    assert made.name == "torch_fastreg-1-cp310.cp312-cp310.cp312-linux_x86_64.whl"
    with zipfile.ZipFile(made) as wheel:
        assert wheel.testzip() is None
        modules = {name for name in wheel.namelist() if name.endswith(".so")}
        assert modules == {
            f"fastreg/{name}.cpython-3{minor}-x86_64-linux-gnu.so"
            for minor in (10, 12)
            for name in ("_C", f"_autograd_2_{minor}")
        }
        assert wheel.read("fastreg/_C.cpython-312-x86_64-linux-gnu.so") == b"kernels of 3.12"
        recorded = wheel.read("torch_fastreg-1.dist-info/RECORD").decode()
        assert all(f"{name},sha256=" in recorded for name in modules)
        told = wheel.read("torch_fastreg-1.dist-info/WHEEL").decode().splitlines()
    assert [line for line in told if line.startswith("Tag: ")] == [
        "Tag: cp310-cp310-linux_x86_64",
        "Tag: cp312-cp312-linux_x86_64",
    ]
    first = made.read_bytes()
    assert merge(wheels, tmp_path / "out").read_bytes() == first


@pytest.mark.parametrize(
    ("minor", "version", "files", "said"),
    [
        (12, "2", {}, "another version or platform"),
        (10, "1", {}, "the same CPython"),
        (12, "1", {"_C_cuda13.cpython-312-x86_64-linux-gnu.so": ""}, "only one of them has _C_cuda13"),
        (12, "1", {"__init__.py": "import os"}, "fastreg/__init__.py is another"),
        (12, "1", {"more.py": ""}, "fastreg/more.py is another"),
    ],
)
def test_wheels_that_are_not_of_one_build_are_not_merged(minor, version, files, said, wheel_of, tmp_path):
    first = wheel_of(10)
    with pytest.raises(SystemExit, match=f"does not fit {first.name}: {said}"):
        tool("merge_wheels").merge([first, wheel_of(minor, version, **files)], tmp_path / "out")
    with pytest.raises(SystemExit, match="the same CPython"):  # of two that are not the first
        tool("merge_wheels").merge([wheel_of(9), first, first], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_smoke_of_a_wheel_has_arguments_for_every_operator():
    """It says so itself where it runs, which is after a wheel was made."""
    program = """
import json, wheel_smoke
print(json.dumps([sorted(wheel_smoke.operator_arguments()), sorted(wheel_smoke.fr._registry._registered)]))
"""
    done = run_python(program, check=True, PYTHONPATH=ROOT / "tests")
    looked_at, there = map(set, json.loads(done.stdout.splitlines()[-1]))
    assert there - looked_at == {"sharded_cross_entropy", "sharded_linear_cross_entropy", "traced_seed"}
    assert looked_at <= there
