"""Models, inputs and observers for tests/test_patch*.py and tests/test_convert.py."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")


LOSSES = ("cross_entropy", *(("linear_cross_entropy",) if hasattr(F, "linear_cross_entropy") else ()))


NAMES = (*DROPOUTS, *LOSSES)


TORCH = {name: getattr(F, name) for name in NAMES}
CODES = {name: function.__code__ for name, function in TORCH.items()}


def is_patched(name="dropout"):
    """Whether a function of torch does what fastreg wants; it must be the same function in any case."""
    assert getattr(F, name) is TORCH[name]
    return TORCH[name].__code__ is not CODES[name]


def nothing_is_patched():
    return not any(map(is_patched, NAMES))


NN = torch._C._nn  # where no name is exchanged


TORCH_OPS = {
    "aten::native_dropout",
    "aten::dropout",
    "aten::dropout_",
    "aten::feature_dropout",
    "aten::cross_entropy_loss",
}


SHAPES = {"dropout1d": (4, 3, 5), "dropout2d": (4, 3, 5, 2), "dropout3d": (4, 3, 5, 2, 2)}


@contextlib.contextmanager
def ops_seen():
    """The names of all operators that run inside, complete at the end of the block; variants of ours count as
    one.
    """
    seen = set()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield seen
    seen.update(event.key for event in profile.key_averages())
    seen.update(
        op
        for op in ("fastreg::dropout", "fastreg::cross_entropy")
        if any(name.startswith(op) for name in seen)
    )


def uses_fastreg(function, op="fastreg::dropout"):
    """Whether fastreg's operator runs in `function`, and torch's does not; one of the two must."""
    with ops_seen() as seen:
        function()
    ours, theirs = op in seen, bool(seen & TORCH_OPS)
    assert ours != theirs, sorted(seen)
    return ours


def arguments(name, dtype=torch.float32):
    if name == "cross_entropy":
        return torch.randn(4, 5, dtype=dtype), torch.tensor([0, 1, 2, 4])
    if name == "linear_cross_entropy":
        return torch.randn(4, 3, dtype=dtype), torch.randn(5, 3, dtype=dtype), torch.tensor([0, 1, 2, 4])
    return torch.randn(SHAPES.get(name, (4, 3, 5)), dtype=dtype), 0.4, True


def modules_and_inputs():
    flat, image, volume = torch.randn(4, 6), torch.randn(4, 3, 5, 5), torch.randn(2, 3, 2, 4, 4)
    return [
        (nn.Dropout(0.5), flat),
        (nn.Dropout(0.5, inplace=True), flat),
        (nn.Dropout1d(0.5), torch.randn(4, 3, 5)),
        (nn.Dropout2d(0.5), image),
        (nn.Dropout3d(0.5), volume),
        (nn.AlphaDropout(0.5), flat),
        (nn.FeatureAlphaDropout(0.5), image),
    ]


INDICES = torch.tensor([0, 1, 2, 4])


def transformers():
    module = pytest.importorskip("transformers", reason="needs the package transformers")
    module.logging.set_verbosity_error()
    return module


def bert(p):
    hf = transformers()
    config = hf.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=p,
        attention_probs_dropout_prob=p,
        num_labels=3,
        problem_type="single_label_classification",
        # So that dropout of the attention is a call of a function, not inside a kernel.
        attn_implementation="eager",
    )
    batch = {"input_ids": torch.randint(50, (8, 10)), "labels": torch.randint(3, (8,))}
    return hf.BertForSequenceClassification(config), lambda model: model(**batch).loss


def gpt2(p):
    hf = transformers()
    config = hf.GPT2Config(
        vocab_size=50,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=p,
        embd_pdrop=p,
        attn_pdrop=p,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    tokens = torch.randint(50, (4, 10))
    model = hf.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # unset, it is logged, which torch.compile cannot trace
    return model, lambda model: model(input_ids=tokens, labels=tokens).loss


class DropPath(nn.Module):
    """As everyone writes it, for the network below."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        kept = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.p
        return x * kept / (1 - self.p)


class Block(nn.Module):
    def __init__(self, width, p):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Dropout2d(p),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.path = DropPath(p)

    def forward(self, x):
        return F.relu(x + self.path(self.body(x)))


class ResNet(nn.Module):
    def __init__(self, p, width=8):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.blocks = nn.ModuleList([Block(width, p) for _ in range(2)])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.ModuleDict({"drop": nn.Dropout(p, inplace=True), "linear": nn.Linear(width, 5)})

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head["linear"](self.head["drop"](torch.flatten(self.pool(x), 1)))


def with_loss(model, x, target, **options):
    loss = nn.CrossEntropyLoss(**options)
    return model, lambda model: loss(model(x), target)


def resnet(p):
    return with_loss(ResNet(p), torch.randn(8, 3, 8, 8), torch.randint(5, (8,)), label_smoothing=0.1)


def encoder(p):
    layer = nn.TransformerEncoderLayer(16, 2, 32, p, batch_first=True)
    layer.self_attn.dropout = 0.0  # that one stays torch's in compiled code
    model = nn.Sequential(
        nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Flatten(), nn.Linear(16 * 6, 4)
    )
    return with_loss(model, torch.randn(8, 6, 16), torch.randint(4, (8,)))


class Attention(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(16, 2, p, batch_first=True), nn.Linear(16, 4)

    def forward(self, x):
        return self.out(self.attention(x, x, x, need_weights=True)[0]).transpose(1, 2)


def attention(p):
    return with_loss(Attention(p), torch.randn(8, 6, 16), torch.randint(4, (8, 6)))


def mlp(p):
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(p), nn.Linear(16, 4))
    return with_loss(model, torch.randn(8, 6), torch.randint(4, (8,)))


MODELS = [bert, gpt2, resnet, encoder, attention]


def named(function):
    return function.__name__


def train(model, loss_of, steps, lr=0.1, autocast=False):
    """Anyone's training code; it knows nothing of fastreg. Gives the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class Functional(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.4, self.training) + 1


def assert_compiles(model, loss_of):
    """Compiled, a converted model trains as eagerly, by fastreg's dropout."""
    eager = copy.deepcopy(model)
    torch.manual_seed(5)
    expected = train(eager, loss_of, 3, 0.02)
    torch.manual_seed(5)
    with ops_seen() as seen:
        result = train(model, torch.compile(loss_of, backend="aot_eager", fullgraph=True), 3, 0.02)
    assert "fastreg::dropout" in seen
    assert result == pytest.approx(expected, rel=1e-4)
