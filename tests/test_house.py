"""The house rules of the source tree, counted: lengths of files and functions, nothing twice, ops by name."""

import ast
import itertools
import re
import subprocess
from collections import defaultdict

import pytest
from helpers import ROOT

FILE_LINES, FUNCTION_LINES, TEST_LINES, SHARED_LINES, COLUMNS = 450, 90, 800, 12, 110
PHASED_LINES = 60  # what is longer says what its parts do
CPP = (".h", ".cpp", ".cu")


def tracked(*folders, endings):
    """The files below `folders` with one of the endings: those that git knows, or all without git."""
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True).stdout
    found = [ROOT / name for name in listed.splitlines()]
    found = found or [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return sorted(path for path in found if path.suffix in endings and path.is_file())


def name_of(path):
    return str(path.relative_to(ROOT))


def functions(text):
    """(name, first line, number of lines) of each function of C++ in clang-format's Google style.

    A definition starts on a line of its own indentation, its head has parentheses and ends with an opening
    brace, and the brace that closes it stands alone at the same indentation.
    """
    lines = text.splitlines()
    other = r"namespace|struct|enum|class|union|extern \"C\" \{|#|//|\}|\s"
    head = re.compile(rf"^( {{0,4}})(?!{other})\S")
    for first, line in enumerate(lines):
        found = head.match(line)
        if not found:
            continue
        last = first
        while last < len(lines) and not re.search(r"[{;}]\s*(//.*)?$", lines[last]):
            last += 1
        signature = " ".join(lines[first : last + 1])
        if last == len(lines) or "(" not in signature or not re.search(r"\{\s*(//.*)?$", signature):
            continue
        name = re.search(r"([\w:~]+|operator\S+)\s*\(", signature)
        control = ("if", "for", "while", "switch", "else", "do", "catch", "try", "return")
        if not name or name[1] in control or signature.lstrip().startswith(control):
            continue
        closing = re.compile(rf"^{found[1]}\}}[;,)]*\s*(//.*)?$")
        end = next((i for i in range(last + 1, len(lines)) if closing.match(lines[i])), None)
        if end is not None:
            yield name[1], first + 1, end - first + 1


def test_the_counter_counts():
    source = "int f(int a,\n      int b) {\n  return a;\n}\nstruct S {\n  void g() {\n    h();\n  }\n};\n"
    assert list(functions(source)) == [("f", 1, 4), ("g", 6, 3)]
    counted = [n for path in tracked("csrc", endings=CPP) for _, _, n in functions(path.read_text())]
    assert len(counted) > 300 and max(counted) > 20


def test_no_file_of_csrc_is_long():
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in tracked("csrc", endings=CPP)}
    assert {name: lines for name, lines in lengths.items() if lines > FILE_LINES} == {}


def test_no_function_of_csrc_is_long():
    long = {
        f"{name_of(path)}:{line} {name}": lines
        for path in tracked("csrc", endings=CPP)
        for name, line, lines in functions(path.read_text())
        if lines > FUNCTION_LINES
    }
    assert long == {}


def python_functions(text):
    """(name, first line, its lines without head and docstring) of each function."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            first = body[0].lineno if body else node.end_lineno + 1
            while first > node.lineno + 1 and lines[first - 2].lstrip().startswith("#"):
                first -= 1
            yield node.name, node.lineno, lines[first - 1 : node.end_lineno]


def test_a_long_function_says_what_its_parts_do():
    """In comments on lines of their own, or in C++ beside the code."""
    silent = []
    for path in tracked("csrc", "tests", endings=CPP):
        text = path.read_text()
        for name, line, count in functions(text):
            inside = text.splitlines()[line : line + count - 1]
            if count > PHASED_LINES and not any("//" in part for part in inside):
                silent.append(f"{name_of(path)}:{line} {name}")
    for path in tracked("fastreg", "lecture", "benchmarks", "tests", "tools", endings=(".py",)):
        for name, line, inside in python_functions(path.read_text()):
            if len(inside) > PHASED_LINES and not any(part.lstrip().startswith("#") for part in inside):
                silent.append(f"{name_of(path)}:{line} {name}")
    assert silent == []


def test_no_test_file_is_long():
    files = tracked("tests", endings=(".py", *CPP))
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in files}
    assert {name: lines for name, lines in lengths.items() if lines > TEST_LINES} == {}


def test_lines_of_csrc_fit():
    files = [*tracked("csrc", "tests/native", "cmake", endings=(*CPP, ".cmake")), ROOT / "CMakeLists.txt"]
    wide = [
        f"{name_of(p)}:{i + 1}"
        for p in files
        for i, t in enumerate(p.read_text().splitlines())
        if len(t) > COLUMNS
    ]
    assert wide == []


def test_no_module_imports_a_private_name_of_another():
    wrong, modules = [], {path.stem for path in tracked("fastreg", "benchmarks", endings=(".py",))} | {"_C"}
    for path in tracked("fastreg", "lecture", "benchmarks", endings=(".py",)):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("fastreg")):
                private = [
                    a.name for a in node.names if a.name.startswith("_") and not a.name.startswith("__")
                ]
                private = [name for name in private if name not in modules]  # A module itself may be private.
                wrong += [f"{name_of(path)}: {name}" for name in private]
    assert wrong == []


def test_whether_a_program_is_exported_is_asked_in_one_place():
    """torch.compiler.is_exporting() is true in all that torch 2.10 compiles; ours, in _transforms, is not."""
    asking = re.compile(r"torch\.compiler\.is_exporting|from torch\.compiler import .*\bis_exporting\b")
    found = [path.name for path in tracked("fastreg", endings=(".py",)) if asking.search(path.read_text())]
    assert found == ["_transforms.py"]


def statements(path):
    """[(line number, line without white space)] of what is neither blank, comment, import nor punctuation."""
    kept = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = re.sub(r"\s+", "", line)
        if re.search(r"\w", text) and not re.match(r"//|#|\*|import|from\w+import|using", text):
            kept.append((number, text))
    return kept


def shared_runs():
    """{(file and line, file and line)} where more than SHARED_LINES statements stand twice, first line of
    each run.
    """
    places, runs, length = defaultdict(list), set(), SHARED_LINES + 1
    for path in tracked("csrc", "fastreg", endings=(".py", *CPP)):
        kept = statements(path)
        for i in range(len(kept) - length + 1):
            places["\n".join(text for _, text in kept[i : i + length])].append((path, kept[i][0]))
    for found in places.values():
        for (path, line), (other, other_line) in itertools.pairwise(found):
            runs.add(((name_of(path), line), (name_of(other), other_line)))
    return runs


def test_nothing_stands_twice():
    """More than twelve statements in two places are one piece of code that was written twice.

    A reason that they are not stands at the first of the two, in a comment with the words "stands twice".
    """
    unexplained = []
    for (path, line), (other, other_line) in shared_runs():
        around = "\n".join((ROOT / path).read_text().splitlines()[max(0, line - 25) : line + SHARED_LINES])
        if "stands twice" not in around:
            unexplained.append(f"{path}:{line} ~ {other}:{other_line}")
    assert sorted(unexplained) == []


def test_an_option_of_the_loss_stands_in_eight_places():
    """Which csrc/cross_entropy/cross_entropy_math.h lists for whoever adds one."""
    found = [
        name_of(p) for p in tracked("csrc", endings=CPP) if "z_loss" in re.sub("//.*", "", p.read_text())
    ]
    for path in tracked("fastreg", endings=(".py",)):
        if path.parent.name == "integrations":  # They name what a language model's loss has.
            continue
        for node in ast.parse(path.read_text()).body:
            names = {
                name
                for part in ast.walk(node)
                for field in ("arg", "id", "attr", "value", "name")
                if isinstance(name := getattr(part, field, None), str)
            }
            if "z_loss" in names:
                found.append(f"{name_of(path)}: {getattr(node, 'name', 'a statement')}")
    assert sorted(found) == [
        "csrc/cross_entropy/cross_entropy_autograd.h",
        "csrc/cross_entropy/cross_entropy_math.h",
        "fastreg/_cross_entropy.py: LossOptions",
        "fastreg/_cross_entropy.py: cross_entropy",
        "fastreg/_linear_cross_entropy.py: linear_cross_entropy",
        "fastreg/_sharded_cross_entropy.py: cross_entropy",
        "fastreg/_sharded_cross_entropy.py: linear_cross_entropy",
        "fastreg/nn.py: CrossEntropyLoss",
    ]


OPS = sorted(path.parent.name for path in ROOT.glob("csrc/*/*_op.cpp"))


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_found_by_its_name(op):
    """Its files carry its name, wherever they stand: kernels, operator, Python, tests, benchmark."""
    names = {
        path.name for path in tracked(".", endings=(".py", *CPP)) if op in path.name or op in path.parent.name
    }
    wanted = {
        f"{op}_math.h",
        f"{op}_cpu.cpp",
        f"{op}_op.cpp",
        f"{op}_test.cpp",
        f"bench_{op}.py",
    }
    # An op for which torch's operators do on CUDA says so where its checks stand.
    if "There is no CUDA kernel" not in (ROOT / f"csrc/{op}/{op}_op.cpp").read_text().replace("\n// ", " "):
        wanted |= {f"{op}_cuda.cu", f"test_cuda_{op}.py"}
    assert wanted <= names, wanted - names
    python = {f"_{op}.py"} <= names or (ROOT / "fastreg" / op).is_dir() or op == "example"
    assert python and any(name.startswith(f"test_{op}") for name in names)


def ops_in_a_row(text):
    """The most ops that `text` names one after the other, in quotes, also by their forms: "dropout_add"."""
    rows = re.findall(r'"\w+"(?:\W{1,6}"\w+")+', text)
    return max(
        (sum(any(op in word for word in re.findall(r"\w+", row)) for op in OPS) for row in rows), default=0
    )


def test_no_list_of_ops_outside_of_the_tree():
    """No build file and no tool of the tests names the ops one after the other."""
    assert ops_in_a_row('("dropout", "dropout2d")') == 1
    assert ops_in_a_row('["fgsm_step",\n"sgd_", "augment"]') == 3
    several = re.compile(r"dropout\W{1,6}sgd|sgd\W{1,6}dropout|sgd\W{1,6}fgsm|fgsm\W{1,6}sgd")
    files = [ROOT / "CMakeLists.txt", *tracked("cmake", "tests", "csrc", endings=(".py", ".cmake", *CPP))]
    texts = {name_of(path): path.read_text() for path in files if path.name != "test_house.py"}
    assert [name for name, text in texts.items() if several.search(text) or ops_in_a_row(text) >= 3] == []
