"""The pages that are made and not written: one for each public name, from its docstring, the formula that
docs/formulas.md has for it and its definition in plain torch; and the table of all results of the benchmarks.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import shutil
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import fastreg

HERE = Path(__file__).parent
MADE = HERE / "generated"
RESULTS = HERE.parent / "benchmarks" / "results"
REPORT = HERE.parent / "report" / "index.html"

# Commands, and the code behind them: what is behind a door is no public name. The plugin of pytest has names
# for pytest alone, and needs it.
DOORS = {"fastreg.cli", "fastreg.benchmarks", "fastreg.lecture", "fastreg.__main__", "fastreg.testing"}


# ------------------------------------------------------------------------------------------------------------
# The public names


def public_modules() -> list[ModuleType]:
    """fastreg and its public submodules; the shorter names first."""
    found = [fastreg]
    # The __path__ of an editable install leads to the checkout as well, where tests and tools lie.
    for info in pkgutil.walk_packages([str(Path(fastreg.__file__).parent)], "fastreg."):
        private = any(part.startswith("_") for part in info.name.split(".")[1:])
        if not private and not any(f"{info.name}.".startswith(f"{door}.") for door in DOORS):
            found.append(importlib.import_module(info.name))
    found = [
        module for module in found if module.__name__ != "fastreg.integrations"
    ]  # which holds modules alone
    return sorted(found, key=lambda module: (module.__name__.count("."), module.__name__))


def public_names() -> dict[str, Any]:
    """Each public function and class under the shortest of its names."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for module in public_modules():
        for name in sorted(getattr(module, "__all__", ())):
            value = getattr(module, name)
            if not inspect.ismodule(value) and id(value) not in seen:
                seen.add(id(value))
                found[f"{module.__name__}.{name}"] = value
    return found


# ------------------------------------------------------------------------------------------------------------
# What docs/formulas.md has for them


def formulas() -> dict[str, str]:
    """The section of docs/formulas.md for each name that one of its headings gives."""
    found: dict[str, str] = {}
    parts = re.split(r"^### (.+)\n", (HERE / "formulas.md").read_text(encoding="utf-8"), flags=re.M)
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
        text = re.split(r"^## ", text, flags=re.M)[0]
        for name in re.findall(r"`(fastreg[\w.]+)`", heading):
            found[name] = text.strip()
    return found


def definitions(section: str) -> list[tuple[str, str]]:
    """(file, function) of each definition that a section names after "Definition:"."""
    line = re.search(r"^Definition: (.+)$", section, flags=re.M)
    if not line:
        return []
    return [(path, name) for path, name in re.findall(r"`([\w/]+\.py):(\w+)`", line[1])]


# ------------------------------------------------------------------------------------------------------------
# The pages


def reference_page(name: str, value: Any, section: str) -> str:
    """The page of one public name, in Markdown."""
    kind = "autoclass" if inspect.isclass(value) else "autofunction"
    members = "\n   :members:" if kind == "autoclass" else ""
    if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer):  # what optimisers share is theirs
        members += "\n   :inherited-members: Optimizer"
    text, _, _ = section.partition("Definition:")
    lines = [f"# {name.removeprefix('fastreg.')}", "", "```{eval-rst}", f".. {kind}:: {name}{members}", "```"]
    lines += ["", "## Formula", "", text.strip(), ""]
    shown = definitions(section)
    if shown:
        lines += ["## Definition in plain torch", ""]
        lines += [
            "What the kernels compute, what runs on a device without one, and what the tests compare with.",
            "",
        ]
    for path, function in shown:
        lines += [
            f"`{path}`",
            "",
            f"```{{literalinclude}} ../../../{path}",
            f":pyobject: {function}",
            "```",
            "",
        ]
    if value.__doc__ and "ource" not in value.__doc__:
        source = _source_of_module(value)
        lines += [f"## Source\n\n{source}\n"] if source else []
    return "\n".join(lines)


def _source_of_module(value: Any) -> str:
    """What the module of a function says of where its formula comes from: the parts in brackets that name a
    year.
    """
    text = " ".join((inspect.getdoc(inspect.getmodule(value)) or "").split())
    return "; ".join(re.findall(r"\(([^()]*\b(?:19|20)\d\d[^()]*)\)", text))


def _summary(value: Any) -> str:
    """The first sentence of a docstring."""
    text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.;:]) ", text)[0].rstrip(";:")


def _index(names: dict[str, Any]) -> str:
    lines = ["# Reference", "", "One page per public name; `import fastreg as fr`.", ""]
    modules: dict[str, list[str]] = {}
    for name in names:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    for module, members in modules.items():
        lines += [f"## {module}", "", "| | |", "|---|---|"]
        lines += [
            f"| [{name.rpartition('.')[2]}]({name}.md) | {_cell(_summary(names[name]))} |" for name in members
        ]
        lines += ["", "```{toctree}", ":hidden:", "", *members, "```", ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Plain text with code in backticks as a cell of a table."""
    parts = re.split(r"(`[^`]+`)", text.replace("|", r"\|"))
    return "".join(part if part.startswith("`") else re.sub(r"([<*_])", r"\\\1", part) for part in parts)


def example_page(script: Path) -> str:
    """The page of one script of examples/: what it shows, and the script. tests/test_examples.py runs it."""
    said = " ".join((ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "").split())
    title = script.stem.replace("_", " ").capitalize()
    show = f"```{{literalinclude}} ../../../examples/{script.name}\n```"
    return f"# {title}\n\n{said}\n\n```sh\npython examples/{script.name}\n```\n\n{show}\n"


def _examples() -> dict[str, str]:
    scripts = sorted((HERE.parent / "examples").glob("*.py"))
    pages = {f"examples/{script.stem}.md": example_page(script) for script in scripts}
    listed = "\n".join(script.stem for script in scripts)
    text = "One script for each method, forty lines at most, on data that come with a package."
    pages["examples/index.md"] = f"# Examples\n\n{text}\n\n```{{toctree}}\n{listed}\n```\n"
    return pages


def results_page() -> str:
    """All results in benchmarks/results/: one table over all of them, then each."""
    from fastreg.benchmarks import contribution

    found = [(file, contribution.load(file)) for file in sorted(RESULTS.glob("*.json"))]
    lines = ["# What was measured where", "", _ABOUT_RESULTS, "", "## All machines", ""]
    lines += ["| machine | threads | " + " | ".join(_ops(found)) + " | slower than torch |"]
    lines += ["|---" * (3 + len(_ops(found))) + "|"]
    lines += [_summary_row(made, _ops(found)) for _, made in found]
    for file, made in found:
        lines += ["", *_one_result(file, made)]
    return "\n".join(lines) + "\n"


_ABOUT_RESULTS = """Drawn from the files in `benchmarks/results/`, each of one machine. A number is how many
times as long torch takes, the geometric mean over the rows of an op; below 1 fastreg is slower. Every row
that was measured is kept, lost ones too. To add a machine, run the command there and put the file that it
names into that folder. It holds the processor, the versions and the numbers, and no host, user or path; its
schema is `benchmarks/results.schema.json`.

```sh
fastreg bench --contribute                        # about half an hour; --quick takes two minutes
fastreg bench --contribute bench/results.json     # of a run that has been made
```"""


def _ops(found: list[tuple[Path, dict[str, Any]]]) -> list[str]:
    return sorted({row["op"] for _, made in found for row in made["rows"]})


def _machine(made: dict[str, Any]) -> str:
    machine = made["machine"]
    return (
        machine["gpu"]["name"]
        if machine["gpu"]
        else f"{machine['cpu']}, {machine['build']['instruction_set']}"
    )


def _summary_row(made: dict[str, Any], ops: list[str]) -> str:
    cells = []
    for op in ops:
        ratios = [row["against_eager"]["median"] for row in made["rows"] if row["op"] == op]
        cells.append(f"{statistics.geometric_mean(ratios):.1f}×" if ratios else "–")
    slower = sum(row["against_eager"]["median"] < 1 for row in made["rows"])
    cells.append(f"{slower} of {len(made['rows'])} rows")
    return f"| {_machine(made)} | {made['settings']['threads']} | {' | '.join(cells)} |"


def _one_result(file: Path, made: dict[str, Any]) -> list[str]:
    from fastreg.benchmarks import table

    m, build = made["machine"], made["machine"]["build"]
    load = (
        f", load average {m['load_before'][0]:g} before and {m['load_after'][0]:g} after"
        if m["load_before"]
        else ""
    )
    busy = m["load_before"] and max(m["load_before"][0], m["load_after"][0]) > 1.5 * m["cores_allowed"]
    warning = (
        " **The machine was busy with other work; its ratios are not those of a quiet one.**" if busy else ""
    )
    shown = table.columns(made)
    return [
        f"## {_machine(made)}, {made['date']}",
        "",
        f"{m['cpu']}, {m['cores_allowed']} of {m['cores']} cores, {m['system']}{load}; torch {m['torch']}, "
        f"Python {m['python']}, fastreg {build['version']} built by {build['compiler']}, autograd in "
        f"{m['autograd']}; sizes: {made['settings']['scale']}; copying moves "
        f"{made['copy_bandwidth'] / 1e9:.1f} GB/s. Memory is ours : torch's. `{file.name}`{warning}",
        "",
        f"| work | {' | '.join(title for title, _ in shown)} |",
        "|---" * (1 + len(shown)) + "|",
        *(
            f"| {table.name(row)} | {' | '.join(cell(row) for _, cell in shown)} |"
            for row in table.ordered(made)
        ),
        "",
        f"{table.reached(made)} {table.spread(made)}",
        *(f"\nFailed: {each['case']}" for each in made["failed"]),
    ]


def made_pages() -> dict[str, str]:
    """The text of all pages that are made, by their path below docs/generated/."""
    names, sections = public_names(), formulas()
    pages = {
        f"reference/{name}.md": reference_page(name, v, sections.get(name, "")) for name, v in names.items()
    }
    pages["reference/index.md"] = _index(names)
    return pages | _examples() | {"results.md": results_page(), "report.md": report_page()}


def report_page() -> str:
    """The report of `fastreg demo` in a frame, where there is one, or how to make it."""
    said = (
        "`make demo` trains every method on real data, with stock torch and with fastreg side by side, and "
        "holds each claim of a lecture on regularisation against the numbers."
    )
    if not REPORT.exists():
        said += " It has not been run in the tree that these pages were made from."
        return f"# The lecture, live\n\n{said}\n"
    frame = '<iframe class="report" src="../lecture.html" title="The report"></iframe>'
    return f"# The lecture, live\n\n{said}\n\n```{{raw}} html\n{frame}\n```\n"


def write_pages() -> None:
    """Write all pages that are made; those that are the same as before keep their date."""
    pages = made_pages()
    for path, text in pages.items():
        file = MADE / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
    for file in MADE.rglob("*.md"):
        if str(file.relative_to(MADE)) not in pages:
            file.unlink()


# ------------------------------------------------------------------------------------------------------------
# Docstrings, which are text for a terminal, as reStructuredText


def as_rst(lines: list[str]) -> list[str]:
    """A docstring's lines with what reStructuredText would take for markup escaped, outside of code."""
    made, in_code = [], False
    for line in lines:
        indented = line.startswith("    ") or not line.strip()
        in_code = (in_code and indented) or line.strip() == "::" or line.rstrip().endswith("::")
        made.append(line if in_code else "".join(_escaped(part) for part in re.split(r"(`[^`]+`)", line)))
    return made


def _escaped(part: str) -> str:
    if part.startswith("`"):
        return part
    part = re.sub(r"(?<!\\)\|", r"\\|", part)
    part = re.sub(r"(?<=\w)_(?=\W|$)", r"\\_", part)
    part = re.sub(r"\*(?=[^*\w]|$)|(?<=[(,] )\*(?=\w+\))", r"\\*", part)
    return re.sub(r"^(Source|Shape|Memory|Note): (?=\S)", r"**\1:** ", part)


def _process(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    lines[:] = as_rst(lines)


def _role(
    name: str, rawtext: str, text: str, lineno: int, inliner: Any, options: Any = None, content: Any = ()
):
    """`name` in a docstring: a link where it is a public name of fastreg, else code."""
    from docutils import nodes

    return [_linked(nodes.literal(text, text), _full_name(text))], []


def _full_name(text: str) -> str | None:
    """The public name that a word of code means; None where it means none."""
    short = text.removeprefix("fastreg.").removeprefix("fr.").removesuffix("()")
    found = (f"fastreg.{short}", *(f"fastreg.{module}.{short}" for module in ("nn", "optim", "augment")))
    return next((name for name in found if name in _NAMES), None)


def _linked(code: Any, name: str | None) -> Any:
    from sphinx.addnodes import pending_xref

    if name is None:
        return code
    return pending_xref("", code, refdomain="py", reftype="obj", reftarget=name, refexplicit=True)


def _link_names(app: Any, doctree: Any) -> None:
    """Make of `fr.dropout` on a written page a link to its page."""
    from docutils import nodes
    from sphinx.addnodes import pending_xref

    for code in list(doctree.findall(nodes.literal)):
        text = code.astext()
        inside = (nodes.title, nodes.reference, pending_xref)
        if text.startswith(("fr.", "fastreg.")) and not isinstance(code.parent, inside):
            code.replace_self(_linked(code.deepcopy(), _full_name(text)))


_NAMES: set[str] = set()


# ------------------------------------------------------------------------------------------------------------
# Sphinx


def from_elsewhere(text: str) -> list[str]:
    """The addresses that a page or style sheet would load something from when it is looked at."""
    tags = r"<(?:script|link|img|iframe|source|video|object)\b[^>]*?"
    tags += r"(?:src|href|data)=[\"']((?:https?:)?//[^\"']+)"
    styles = r"(?:@import\s+|url\(\s*)(?:url\()?[\"']?((?:https?:)?//[^\"')]+)"
    return re.findall(tags, text) + re.findall(styles, text)


def _finish(app: Any, error: Exception | None) -> None:
    """Put the report beside the pages, and refuse what would load something from the network."""
    if error is None and app.builder.format == "html":
        if REPORT.exists():
            shutil.copy(REPORT, Path(app.outdir) / "lecture.html")
        for file in [*Path(app.outdir).rglob("*.html"), *Path(app.outdir).rglob("*.css")]:
            found = from_elsewhere(file.read_text(encoding="utf-8"))
            if found:
                raise ValueError(f"{file} would load {found[0]} from the network; put it into docs/static")


def _listed(app: Any, docname: str, content: list[str]) -> None:
    """Leave out of the front page's list what is not there: "[n]ame" is a page that may come later."""
    if docname == "index":
        lines = content[0].splitlines(keepends=True)
        content[0] = "".join(
            line
            for line in lines
            if not re.match(r"\[\w\]\w+$", line) or any(HERE.glob(f"{line.strip()}.md"))
        )


def setup(app: Any) -> dict[str, bool]:
    """Write the pages and register how docstrings are read; Sphinx calls this."""
    write_pages()
    _NAMES.update(public_names())
    app.add_role("named", _role)
    app.config.default_role = "named"
    app.connect("source-read", _listed)
    app.connect("doctree-read", _link_names)
    app.connect("build-finished", _finish)
    app.connect("autodoc-process-docstring", _process, priority=100)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}
