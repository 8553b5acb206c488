"""Every block of Python in the README and the guide runs as it stands, and every link leads somewhere."""

import re

import pytest
import torch
from helpers import ROOT
from torch import nn
from torch.nn import functional as F

import fastreg as fr

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


CASES = [(page, *block) for page in ("README.md", "docs/guide.md") for block in blocks(page)]


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
    assert len(CASES) >= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target:
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
