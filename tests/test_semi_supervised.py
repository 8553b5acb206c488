"""What unlabelled data are worth: ten labelled digits of each class, the other images without labels."""

import pytest
import torch
from torch import nn

import fastreg as fr
from fastreg.lecture.data import load

SEEDS = range(5)


@pytest.fixture(scope="module")
def digits():
    """100 labelled images, 2,000 unlabelled, 3,000 to test on."""
    data = load(None)
    mean, std = data.x_train.mean(), data.x_train.std()
    chosen = torch.cat([(data.y_train == digit).nonzero()[:10, 0] for digit in range(10)])
    train, validation, test = ((x - mean) / std for x in (data.x_train, data.x_validation, data.x_test))
    return train[chosen], data.y_train[chosen], torch.cat([train, validation]), test, data.y_test


def fit(digits, seed, unlabelled_weight=0.0, pretrain=False):
    """Test error in percent of one perceptron trained for 200 steps: the same except for what it makes of the
    unlabelled images.
    """
    x, y, unlabelled, x_test, y_test = digits
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 128), nn.ReLU())
    model = nn.Sequential(nn.Dropout(0.2), encoder, nn.Dropout(0.5), nn.Linear(128, 10))
    if pretrain:
        fr.pretrain_autoencoder(encoder, unlabelled, epochs=10)
    optimizer = fr.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(200):
        loss = fr.cross_entropy(model(x), y)
        if unlabelled_weight:
            batch = unlabelled[torch.randint(len(unlabelled), (100,))]
            with torch.no_grad():
                weak = model.eval()(batch)
            loss = loss + unlabelled_weight * fr.pseudo_label_loss(model.train()(batch), weak)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return 100 * (model.eval()(x_test).argmax(1) != y_test).double().mean().item()


@pytest.fixture(scope="module")
def supervised(digits):
    """Test errors without the unlabelled images, seed by seed."""
    return [fit(digits, seed) for seed in SEEDS]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [dict(unlabelled_weight=1.0), dict(pretrain=True)], ids=["pseudo-labels", "autoencoder"]
)
def test_unlabelled_digits_lower_the_error(digits, supervised, options):
    errors = [fit(digits, seed, **options) for seed in SEEDS]
    mean, alone = (sum(each) / len(SEEDS) for each in (errors, supervised))
    print(f"\n{options}: {mean:.2f} % against {alone:.2f} %, seed by seed {errors} against {supervised}")
    assert all(error < before for error, before in zip(errors, supervised, strict=True))
    assert mean < alone - 2
