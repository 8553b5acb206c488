"""The structs in which launchers take their arguments, declared again in ctypes for the tests of the CUDA
kernels, against the compiler: name, place, size and kind of every field, and that there is no further one.

A C++ file is written from the ctypes declarations, compiled by g++ and run. It reads the fields by name. A
structured binding, which must name every field of a struct, finds one that C++ has and ctypes has not.
"""

import contextlib
import ctypes
import importlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_machine import CSRC, STRUCTURES

for test in sorted(Path(__file__).parent.glob("test_cuda_*.py")):  # each declares its own on import
    if test.stem != Path(__file__).stem:
        importlib.import_module(test.stem)

PROGRAM = """
#include <cstddef>
#include <cstdio>
#include <type_traits>
{includes}
template <class T>
constexpr char kind = std::is_floating_point_v<T>                      ? 'f'
                      : std::is_pointer_v<T>                           ? 'p'
                      : std::is_array_v<T> || std::is_class_v<T>       ? 's'
                      : std::is_integral_v<T> || std::is_enum_v<T>     ? 'i'
                                                                       : '?';
#define FIELD(T, f) \
  printf(", [\\"%s\\", %zu, %zu, \\"%c\\"]", \\
         #f, offsetof(T, f), sizeof(((T*)nullptr)->f), kind<decltype(T::f)>)
using namespace fastreg;
{bindings}
int main() {{
  printf("{{");
{reports}
  printf("}}");
}}
"""


def own_fields(structure):
    return [name for name, _ in structure._fields_]


def all_fields(structure):
    inherited = structure.__base__
    before = [] if inherited is ctypes.Structure else all_fields(inherited)
    return before + own_fields(structure)


def program(csrc, structures):
    """The C++ file; a header is included where it defines a struct that was declared."""
    headers = [path for path in sorted(csrc.glob("*/*.h")) if "torch/" not in path.read_text()]
    text = {path: path.read_text() for path in headers}
    needed, bindings, reports = [], [], []
    for name, structure in structures.items():
        last = name.split("::")[-1]
        defined = [path for path in headers if re.search(rf"^ *struct {last}\b.*{{", text[path], re.M)]
        assert len(defined) == 1, f"struct {name} is defined in {[str(path) for path in defined]}"
        needed += defined
        if structure.__base__ is not ctypes.Structure:
            base = f"std::is_base_of_v<{structure.__base__.__name__}, {name}>"
            bindings.append(f'static_assert({base}, "{name} inherits from something else");')
        elif not re.search(rf"^ *struct {last}\s*:", text[defined[0]], re.M):
            # C++ does not decompose a struct with bases; its size shows a field that was added there.
            names = ", ".join(own_fields(structure))
            bindings.append(f"void all_fields(const {name}& whole_) {{ const auto& [{names}] = whole_; }}")
        fields = "\n".join(f"  FIELD({name}, {field});" for field in all_fields(structure))
        reports.append(f'  printf("\\"{name}\\": [%zu", sizeof({name}));\n{fields}\n  printf("]");')
    return PROGRAM.format(
        includes="\n".join(f'#include "{path}"' for path in dict.fromkeys(needed)),
        bindings="\n".join(bindings),
        reports='\n  printf(",\\n");\n'.join(reports),
    )


def compiled(csrc, folder, structures):
    """{struct: [size, [field, offset, size, kind], ...]} as g++ lays it out."""
    source = folder / "structures.cpp"
    source.write_text(program(csrc, structures))
    command = ["g++", "-std=c++20", "-w", "-DFASTREG_ISA=baseline", source, "-o", folder / "structures"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[:4000]
    printed = subprocess.run([folder / "structures"], capture_output=True, text=True, check=True).stdout
    return json.loads(printed)


def declared(structure):
    """The same of a structure of ctypes."""

    types = dict(field for c in structure.__mro__ for field in getattr(c, "_fields_", ()))

    def kind(name):
        type_ = types[name]
        if issubclass(type_, (ctypes.Structure, ctypes.Array)):
            return "s"
        return {"d": "f", "f": "f", "P": "p"}.get(type_._type_, "i")

    places = [(name, getattr(structure, name)) for name in all_fields(structure)]
    return [ctypes.sizeof(structure), *([name, at.offset, at.size, kind(name)] for name, at in places)]


def check(csrc, folder, structures):
    found = compiled(csrc, folder, structures)
    for name, structure in structures.items():
        assert found[name] == declared(structure), name
        if structure.__base__ is not ctypes.Structure:  # no room where a further field could hide
            end = ctypes.sizeof(structure.__base__)
            for field in own_fields(structure):
                at = getattr(structure, field)
                assert at.offset == end, f"a gap in {name} before {field}: it must be declared without a base"
                end += at.size
            assert end == ctypes.sizeof(structure), f"a gap at the end of {name}"


def test_the_structures_are_those_of_the_compiler(tmp_path):
    assert len(STRUCTURES) >= 15
    check(CSRC, tmp_path, STRUCTURES)


def test_every_structure_of_the_tests_is_compared():
    def below(cls):
        return {cls}.union(*map(below, cls.__subclasses__()))

    ours = [c for c in below(ctypes.Structure) if c.__module__.startswith(("test_cuda", "cuda_"))]
    assert {c.__name__ for c in ours} == set(STRUCTURES), "declare it by cuda_machine.structure(...)"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("int dims = 0;", "int dims = 0;", None),
        ("int dims = 0;", "int dimensions = 0;", "has no member named .dims"),
        ("int dims = 0;", "int64_t dims = 0;", "Layout"),
        ("int dims = 0;\n  bool contiguous = true;", "bool contiguous = true;\n  int dims = 0;", "Layout"),
        ("bool contiguous = true;", "bool contiguous = true, dense = true;", "only 5 names provided"),
        ("int64_t numel = 0;", "double numel = 0;", "Layout"),
    ],
    ids=["unchanged", "renamed", "widened", "moved", "added where padding was", "of another kind"],
)
def test_a_changed_field_is_noticed(old, new, says, tmp_path):
    shutil.copytree(CSRC, tmp_path / "csrc")
    header = tmp_path / "csrc" / "common" / "device.h"
    # What stands behind the struct uses its fields, and is of no interest here.
    text = header.read_text().split("// Calls f(position")[0] + "}\n"
    assert text.count(old) == 1
    header.write_text(text.replace(old, new))
    with pytest.raises(AssertionError, match=says) if says else contextlib.nullcontext():
        check(tmp_path / "csrc", tmp_path, {"Layout": STRUCTURES["Layout"]})
