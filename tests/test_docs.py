"""Every block of Python on the pages runs as it stands, every link leads somewhere, every public name has a
page with its formula, and what Sphinx makes of it loads nothing from elsewhere.
"""

import importlib
import inspect
import operator
import re
import sys

import pytest
import torch
from helpers import ROOT
from torch import nn
from torch.nn import functional as F

import fastreg as fr
from fastreg import _distribution, _registry
from fastreg.benchmarks import ranks

sys.path.insert(0, str(ROOT / "docs"))
import made_pages

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def blocks(page):
    """(heading, code) of each block of Python on a page."""
    heading, found = "", []
    parts = re.split(r"^(#+ [^\n]*|```python\n.*?^```)$", (ROOT / page).read_text(), flags=re.M | re.S)
    for part in parts:
        if part.startswith("#"):
            heading = part.lstrip("# ")
        elif part.startswith("```python"):
            found.append((heading, part.removeprefix("```python\n").removesuffix("```")))
    return found


class Net(nn.Module):
    """A classifier of images (N, 3, 8, 8) with the names that the pages speak of."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Linear(16, 10), nn.Linear(16, 10)
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Dropout(0.1))

    def forward(self, x):
        return self.head(self.trunk(x))


def script():
    """What a reader of the pages has: a model, a batch, a loss, and what is named where it is used."""
    model, x, y = Net(), torch.rand(16, 3, 8, 8), torch.arange(16) % 10
    linear, images = nn.Linear(8, 8), torch.randint(256, (4, 3, 40, 40), dtype=torch.uint8)
    data = torch.utils.data.TensorDataset(x, y)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def make():
        model = Net()
        return model, torch.optim.SGD(model.parameters(), 0.1)

    def train_epoch(model, optimizer, batches):
        for images, classes in batches:
            F.cross_entropy(model(images), classes).backward()

    return dict(
        fr=fr, torch=torch, nn=nn, F=F, model=model, x=x, y=y, logits=model(x), linear=linear, h=linear(x),
        data=data, loss=F.cross_entropy(model(x), y), optimizer=optimizer, head=model.head,
        hidden=torch.randn(16, 16),
        mean=torch.full((3,), 0.5), std=torch.full((3,), 0.2), free=fr.FreeAdversarial(8 / 255, replays=4),
        test_loader=[(x, y)], images=images, train=lambda model: None, validate=lambda model: 0.5, make=make,
        train_epoch=train_epoch, train_set=data, validation_set=data, weakly_augmented=x,
        strongly_augmented=x, encoder=nn.Sequential(nn.Linear(192, 128), nn.ReLU()), unlabelled=x.flatten(1),
        digit=torch.randn(16, 10, requires_grad=True), slant=torch.randn(16, requires_grad=True),
        t=torch.randn(16), first=nn.Linear(4, 4), second=nn.Linear(4, 4),
    )  # fmt: skip


try:
    MADE = made_pages.made_pages()
except ImportError:  # a trainer that the reference has a page for
    MADE = None
made = pytest.mark.skipif(MADE is None, reason='the reference needs pip install "torch-fastreg[test]"')
CASES_OF = {page.name: blocks(page) for page in PAGES}
CASES = [(page.relative_to(ROOT).as_posix(), *block) for page in PAGES for block in blocks(page)]


@pytest.mark.parametrize(
    "page, heading, code", CASES, ids=[f"{page} {heading}" for page, heading, _ in CASES]
)
def test_every_block_runs(page, heading, code):
    names = script()
    if heading == "Augmentation":  # mixes the batch of the augmented images, which have classes of their own
        names["y"] = names["y"][:4]
    try:
        exec(compile(code, f"{page}: {heading}", "exec"), names)
    finally:
        fr.unpatch()


def test_there_are_blocks_to_run():
    assert len(CASES) >= 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_not_run_is_marked(page):
    """A fenced block is Python and runs, or says what else it is."""
    fences = re.findall(r"^```(.*)$", page.read_text(), flags=re.M)
    assert len(fences) % 2 == 0
    for language in fences[::2]:
        assert language in ("python", "sh", "text", "tcl", "{toctree}"), language


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if target.startswith("generated/"):
            assert MADE is None or target.removeprefix("generated/") in MADE, target
        elif "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_distribution_has_one_name():
    """`pip install fastreg` would bring another project's package."""
    wrong = re.compile(r"pip install[^\n]{0,40}[ \"'`]fastreg(?![\w./-])")
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if parts[0] in (".git", ".venv", "build", "dist", "findings") or not path.is_file():
            continue
        if (
            path.suffix in (".py", ".md", ".toml", ".cpp", ".txt", ".cmake", ".yml")
            and path.name != "test_docs.py"
        ):
            assert not wrong.search(path.read_text()), path


# ---- the reference


@made
def test_every_public_name_has_a_formula_and_a_page():
    """A new public name belongs into docs/formulas.md."""
    names, sections = made_pages.public_names(), made_pages.formulas()
    assert set(names) == set(sections)
    for name in names:
        section = sections[name]
        assert "$$" in section or section.startswith("No formula:"), name
        page = MADE[f"reference/{name}.md"]
        assert f":: {name}\n" in page and f"]({name}.md)" in MADE["reference/index.md"]
    for short in set(fr.__all__) - {"augment", "nn", "optim"}:
        assert f"fastreg.{short}" in names or getattr(fr, short).__name__.startswith("fastreg."), short


@made
def test_no_public_function_is_left_out_by_a_module_without_a_list():
    known = {id(value) for value in made_pages.public_names().values()}
    for module in made_pages.public_modules():
        for name, value in vars(module).items():
            if not hasattr(module, "__all__") and not name.startswith("_") and callable(value):
                assert getattr(value, "__module__", "") != module.__name__ or id(value) in known, (
                    module,
                    name,
                )


def test_the_definitions_that_are_shown_are_there_and_are_all():
    shown = {pair for section in made_pages.formulas().values() for pair in made_pages.definitions(section)}
    for path, name in shown:
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), flags=re.M), (path, name)
    functions = {name for _, name in shown} | {"operator"}  # what unpacks the options of cross-entropy's
    for op in _registry.declared():
        plain = _registry.plain_definition(op)
        assert op == "example" or plain is None or plain.__name__ in functions, op


def test_the_front_page_lists_every_page():
    listed = (ROOT / "docs" / "index.md").read_text().replace("[", "").replace("]", "").splitlines()
    for page in ROOT.glob("docs/*.md"):
        assert page.stem in listed or page.stem == "index", page


def test_what_an_index_shows_needs_nothing_of_the_repository():
    """There a relative link leads nowhere, and a picture is missing."""
    tomllib = pytest.importorskip("tomllib", reason="of Python 3.11")
    shown = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["readme"]
    text = (ROOT / shown).read_text()
    links = re.findall(
        r"\]\(\s*<?([^)>\s]*)|^\[[^\]]+\]:\s*(\S+)|(?:src|href)\s*=\s*[\"']?([^\"'\s>]*)", text, re.M
    )
    assert all(target.startswith("https://") for target in map("".join, links)), links
    assert f"pip install {_distribution.NAME}" in text and len(CASES_OF[shown]) > 0


def test_the_page_for_language_models_leads_somewhere():
    """docs/llms.txt is copied beside the pages as it is: nothing else reads it."""
    text = (ROOT / "docs" / "llms.txt").read_text()
    pages = re.findall(r"\]\(([^)]+)\)", text)
    assert len(pages) > 8
    for page in pages:
        source = page.removesuffix(".html") + ".md"
        made_here = MADE is not None and source.removeprefix("generated/") in MADE
        assert page.endswith(".html") and (made_here or (ROOT / "docs" / source).is_file()), page
    assert {page.stem for page in ROOT.glob("docs/*.md")} >= {"guide", "formulas"}
    for name, options in re.findall(r"\bfr\.([\w.]+)\(([^()]*)", text):
        value = operator.attrgetter(name)(fr)
        known = set(inspect.signature(value).parameters)
        assert set(re.findall(r"(\w+)=", options)) <= known, (name, options)


@pytest.mark.parametrize("page, least", [("coming_from.md", 31), ("llms.txt", 9)])
def test_names_of_fastreg_that_a_page_names_exist(page, least):
    text = (ROOT / "docs" / page).read_text()
    names = {name.rstrip(".") for name in re.findall(r"\b(?:fr|fastreg)\.([a-zA-Z_][\w.]*)", text)}
    assert len(names) >= least
    for name in names:
        value = fr
        for part in name.split("."):
            if not hasattr(value, part):
                importlib.import_module(f"{value.__name__}.{part}")
            value = getattr(value, part)
    options = set(re.findall(r"`Augment\(([^`]*)\)`", text))
    known = fr.augment.Augment.__init__.__kwdefaults__
    for name in re.findall(r"(\w+)=", " ".join(options)):
        assert name in known, name


def test_docstrings_are_made_safe_for_restructuredtext():
    made = made_pages.as_rst(["|w|_1 of (*, C)", "", "::", "", "    a * b | c", "", "Source: X `a|b`"])
    assert made == [r"\|w\|_1 of (\*, C)", "", "::", "", "    a * b | c", "", "**Source:** X `a|b`"]


@pytest.mark.parametrize(
    "text, found",
    [
        ('<script src="https://cdn/x.js"></script>', ["https://cdn/x.js"]),
        ('<link rel="stylesheet" href="//fonts/a.css">', ["//fonts/a.css"]),
        ("@import url('https://fonts/b.css');", ["https://fonts/b.css"]),
        ("src: url(https://fonts/c.woff2)", ["https://fonts/c.woff2"]),
        ('<a href="https://example.org">a link is followed by hand</a><script src="_static/x.js">', []),
    ],
)
def test_what_would_come_from_elsewhere_is_found(text, found):
    assert made_pages.from_elsewhere(text) == found


@made
def test_a_page_in_html(tmp_path):
    """A page with a formula, a table and a function, by the settings of docs/conf.py, without a warning."""
    sphinx = pytest.importorskip("sphinx.application", reason='needs pip install "torch-fastreg[docs]"')
    source = tmp_path / "source"
    source.mkdir()
    page = (
        "# One\n\n$$ y = \\frac{x}{1-p} $$\n\n"
        + MADE["reference/fastreg.pack_mask.md"].split("## Formula")[0]
    )
    (source / "index.md").write_text(page)
    settings = {"html_extra_path": [], "html_static_path": [], "html_css_files": [], "extensions": EXTENSIONS}
    app = sphinx.Sphinx(
        source, ROOT / "docs", tmp_path / "out", tmp_path / "tree", "html", settings,
        status=None, warningiserror=True, exception_on_warning=True,
    )  # fmt: skip
    app.build()
    html = (tmp_path / "out" / "index.html").read_text()
    assert "<mfrac>" in html and "bool tensor" in html
    assert made_pages.from_elsewhere(html) == []


# viewcode reads all modules, which takes longer than the rest.
EXTENSIONS = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "made_pages", "mathml"]


def test_the_page_of_many_ranks_is_drawn():
    """The table has what the picture shows, the text the numbers of its model."""
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    measured = ranks.table_of(page)
    assert all(measured[name].keys() == {1, 2, 4} for name in ranks.MEASURED)
    gathered, logits = (ranks.MODEL[name](64) for name in list(ranks.MODEL)[1::-1])
    assert gathered == 2 * 2**20 and f"on 64 ranks {gathered / 2**20:.0f} MiB, beside the" in page
    assert round(logits / 2**20) == 2
    assert ranks.drawn(page).startswith(b"\x89PNG") and (ROOT / "docs" / "scale.png").is_file()
