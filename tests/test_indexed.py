"""Indexed datasets: what a sample draws depends on its index, the seed and the epoch, whatever the batch, the
order, the ranks and the workers, and whatever the samples are.
"""

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

import fastreg as fr
from fastreg.augment import Augment, Indexed

COUNT = 12
IMAGES = torch.rand(COUNT, 3, 8, 9, generator=torch.Generator().manual_seed(0))
UNEVEN = [image[:, : 5 + i % 3, : 4 + i % 4] for i, image in enumerate(IMAGES)]
AUGMENTS = {
    "pass": lambda: Augment(hflip=0.5, rotate=20, brightness=0.3, size=(6, 7), crop=(0.3, 1.0), erase=0.5),
    "policy": lambda: Augment.trivial(),
    "noise of colour": lambda: Augment(saturation=0.5, hue=0.1),
}


class Samples(torch.utils.data.Dataset):
    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return COUNT

    def __getitem__(self, i):
        if self.kind == "pair":
            return IMAGES[i], i
        if self.kind == "uneven":
            return UNEVEN[i], i
        boxes = torch.tensor([[1.0, 1.0, 5.0 + i % 3, 6.0]])
        return {"image": IMAGES[i], "boxes": boxes, "label": i}


def epoch_of(kind, augment, epoch=0, seed=3, batch_size=4, ranks=1, **options):
    """{index: what became of the image, and of its boxes}."""
    data = Indexed(Samples(kind), seed)
    found = {}
    for rank in range(ranks):
        sampler = (
            DistributedSampler(data, ranks, rank, seed=batch_size) if ranks > 1 else SequentialSampler(data)
        )
        loader = DataLoader(data, batch_size, sampler=sampler, collate_fn=augment.collate, **options)
        data.set_epoch(epoch)
        for batch in loader:
            parts = batch.values() if isinstance(batch, dict) else batch
            *moved, labels = parts
            labels = labels.tolist() if isinstance(labels, torch.Tensor) else labels
            for i, *sample in zip(labels, *moved, strict=True):
                found[int(i)] = torch.cat([part.reshape(-1).float() for part in sample])
    assert sorted(found) == list(range(COUNT))
    return torch.nn.utils.rnn.pad_sequence([found[i] for i in range(COUNT)], padding_value=-1.0)


KINDS = [(kind, name) for kind in ("pair", "targets") for name in AUGMENTS] + [("uneven", "pass")]


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_whatever_the_batches_and_ranks(kind, name):
    augment = AUGMENTS[name]()
    want = epoch_of(kind, augment)
    for options in (dict(batch_size=1), dict(batch_size=5), dict(ranks=2), dict(ranks=3, batch_size=2)):
        torch.manual_seed(options.get("ranks", 1))  # generators have no say
        assert torch.equal(epoch_of(kind, augment, **options), want), options
    for other in (dict(epoch=1), dict(seed=4)):
        assert not torch.equal(epoch_of(kind, augment, **other), want)
    assert torch.equal(epoch_of(kind, augment), want)


def test_it_is_what_sample_draws():
    augment = AUGMENTS["pass"]()
    data = Indexed(Samples("pair"), 3)
    samples = [data[i] for i in (7, 2)]
    index = torch.tensor([7, 2])
    params = augment.sample(IMAGES[index], seed=samples[0].seed, index=index)
    assert torch.equal(augment.collate(samples)[0], fr.augment.apply(IMAGES[index], params))
    assert data[-1].number == COUNT - 1 and len(data) == COUNT


def test_workers_that_persist_see_the_epoch():
    augment, data = AUGMENTS["pass"](), Indexed(Samples("pair"), 3)
    loader = DataLoader(data, 4, collate_fn=augment.collate, num_workers=1, persistent_workers=True)
    seen = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        seen.append(torch.cat([images for images, _ in loader]))
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])


def test_others_are_collated_as_before():
    augment = AUGMENTS["pass"]()
    data = Indexed(Samples("pair"))
    plain, indexed = [(IMAGES[i], i) for i in range(3)], [data[i] for i in range(3)]
    for mode in (True, False):
        augment.train(mode)
        torch.manual_seed(0)
        want = augment.collate(plain)[0]
        augment.collate(indexed)
        torch.manual_seed(0)
        assert torch.equal(augment.collate(plain)[0], want)  # nothing is left of the indexed batch
    assert torch.equal(augment.collate(indexed)[0], want)  # in evaluation nothing is drawn


class AtOnce(Samples):
    asked = 0

    def __getitems__(self, indices):
        AtOnce.asked += 1
        return [self[i] for i in indices]


def test_samples_that_come_at_once():
    """DataLoader's way to ask a dataset for a whole batch reaches the one that is wrapped."""
    augment = AUGMENTS["pass"]()
    for data in (Samples("pair"), AtOnce("pair")):
        loader = DataLoader(Indexed(data, 3), 4, collate_fn=augment.collate)
        whole = torch.cat([images for images, _ in loader])
        data = Indexed(data, 3)
        assert torch.equal(whole, torch.cat([augment.collate([data[i]])[0] for i in range(COUNT)]))
    assert AtOnce.asked == COUNT // 4


def test_joined_datasets_are_wrapped_together():
    augment, one = AUGMENTS["pass"](), Indexed(Samples("pair"), 3)
    joined = torch.utils.data.ConcatDataset([one, Indexed(Samples("pair"), 3)])
    loader = DataLoader(joined, 8, collate_fn=augment.collate)
    with pytest.raises(ValueError, match=r"one Indexed dataset, .* got 2; wrap what joins .*ConcatDataset"):
        list(loader)
    right = Indexed(torch.utils.data.ConcatDataset([Samples("pair"), Samples("pair")]), 3)
    images = torch.cat([batch for batch, _ in DataLoader(right, 8, collate_fn=augment.collate)])
    assert torch.equal(images[:COUNT], torch.cat([augment.collate([one[i]])[0] for i in range(COUNT)]))
    assert not torch.equal(images[:COUNT], images[COUNT:])


def test_errors():
    data = Indexed(Samples("pair"))
    with pytest.raises(TypeError, match="dataset must have __getitem__ and __len__, got list_iterator"):
        Indexed(iter([]))
    with pytest.raises(TypeError, match="seed must be an int"):
        Indexed([], 0.5)
    with pytest.raises(ValueError, match="epoch must be"):
        data.set_epoch(-1)
    with pytest.raises(TypeError, match="epoch must be"):
        data.set_epoch(0.5)
    first = data[0]
    data.set_epoch(1)
    with pytest.raises(ValueError, match="must be of one epoch, got 2"):
        AUGMENTS["pass"]().collate([first, data[1]])
