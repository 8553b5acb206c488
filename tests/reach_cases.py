"""What `patch` and `convert` could reach: docs/reach.md has a row for each."""

import importlib
import warnings
from functools import partial

import torch
import torch.nn.functional as F
from patch_cases import TORCH_OPS, bert, ops_seen
from torch import nn

import fastreg as fr

X, CHANNELS, IMAGE = torch.randn(6, 8), torch.randn(4, 3, 5), torch.randn(4, 3, 5, 5)
VOLUME, SEQUENCE, Q = torch.randn(2, 3, 2, 4, 4), torch.randn(2, 5, 8), torch.randn(2, 2, 5, 4)
Y, SOFT = torch.tensor([0, 1, 2, 3, 7, 0]), torch.rand(6, 8).softmax(1)


class Stranger(nn.Dropout):
    """A subclass of torch's module that does something of its own."""

    def forward(self, input):
        return F.dropout(input, self.p, self.training) * 2


class Layer(nn.Module):
    """A module whose forward pass calls functions."""

    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


def of(module, *inputs):
    """A case: the module, built anew, and what it is given."""
    return lambda change: partial(change(module()), *inputs)


def call(function, *inputs, **options):
    """A case without a module."""
    return lambda change: partial(function, *inputs, **options)


def scripted(change):
    return partial(torch.jit.script(change(nn.Sequential(nn.Dropout(0.5)))), X)


def compiled(change):
    module = torch.compile(change(nn.Sequential(nn.Dropout(0.5))), backend="aot_eager")
    return partial(module, X)


def per_sample(change):
    return partial(torch.func.vmap(change(nn.Dropout(0.5)), randomness="different"), X)


def forward_mode(change):
    loss = change(nn.CrossEntropyLoss())
    return partial(torch.func.jvp, lambda x: loss(x, Y), (X,), (X,))


def nested(change):
    values = torch.nested.nested_tensor([X[:2], X[2:]], layout=torch.jagged)
    return partial(change(nn.Dropout(0.5)), values)


FUNCTIONS = {
    "`F.dropout`, under any name": call(F.dropout, X),
    "`F.dropout1d`": call(F.dropout1d, CHANNELS),
    "`F.dropout2d`": call(F.dropout2d, IMAGE),
    "`F.dropout3d`": call(F.dropout3d, VOLUME),
    "`F.alpha_dropout`": call(F.alpha_dropout, X, training=True),
    "`F.feature_alpha_dropout`": call(F.feature_alpha_dropout, IMAGE, training=True),
    "`F.cross_entropy`, indices": call(F.cross_entropy, X, Y),
    "`F.cross_entropy`, probabilities": call(F.cross_entropy, X, SOFT, label_smoothing=0.1),
    "`F.scaled_dot_product_attention`, `dropout_p` > 0": call(
        lambda: F.scaled_dot_product_attention(Q, Q, Q, dropout_p=0.5)
    ),
    "`F.nll_loss` of `F.log_softmax`": call(lambda: F.nll_loss(F.log_softmax(X, 1), Y)),
    "`F.kl_div`, `F.binary_cross_entropy_with_logits`": call(F.binary_cross_entropy_with_logits, X, SOFT),
    "`torch.dropout`": call(torch.dropout, X, 0.5, True),
    "`torch.ops.aten.dropout`, and so calls from C++": call(torch.ops.aten.dropout, X, 0.5, True),
    "`torch.ops.aten.cross_entropy_loss`, and so calls from C++": call(
        torch.ops.aten.cross_entropy_loss, X, Y
    ),
}
if hasattr(F, "linear_cross_entropy"):
    FUNCTIONS["`F.linear_cross_entropy`, which then never holds its logits"] = call(
        F.linear_cross_entropy, X, torch.randn(8, 8), Y
    )

MODULES = {
    "`nn.Dropout`": of(nn.Dropout, X),
    "`nn.Dropout1d`": of(nn.Dropout1d, CHANNELS),
    "`nn.Dropout2d`": of(nn.Dropout2d, IMAGE),
    "`nn.Dropout3d`": of(nn.Dropout3d, VOLUME),
    "`nn.AlphaDropout`": of(nn.AlphaDropout, X),
    "`nn.FeatureAlphaDropout`": of(nn.FeatureAlphaDropout, IMAGE),
    "`nn.CrossEntropyLoss`": of(nn.CrossEntropyLoss, X, Y),
    "`nn.MultiheadAttention(dropout=)`": of(
        lambda: nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True), SEQUENCE, SEQUENCE, SEQUENCE
    ),
    "`nn.TransformerEncoderLayer`": of(lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.5), SEQUENCE),
    "`nn.TransformerDecoderLayer`": of(lambda: nn.TransformerDecoderLayer(8, 2, 16, 0.5), SEQUENCE, SEQUENCE),
    "`nn.RNN`, `nn.LSTM`, `nn.GRU(dropout=)`": of(lambda: nn.LSTM(8, 8, 2, dropout=0.5), SEQUENCE),
    "`nn.NLLLoss`": of(nn.NLLLoss, X, Y),
    "`nn.AdaptiveLogSoftmaxWithLoss`": of(lambda: nn.AdaptiveLogSoftmaxWithLoss(8, 9, [3]), X, Y),
    "a subclass of `nn.Dropout` that calls `F.dropout`": of(Stranger, X),
    "a module whose `forward` calls `F.dropout`": of(Layer, X),
}
if hasattr(nn, "LinearCrossEntropyLoss"):
    MODULES["`nn.LinearCrossEntropyLoss`"] = of(lambda: nn.LinearCrossEntropyLoss(8, 8), X, Y)

WAYS = {
    "`nn.Dropout` under `torch.compile`, CPU": compiled,
    "`nn.Dropout` under `torch.func.vmap`": per_sample,
    "`nn.CrossEntropyLoss` under `torch.func.jvp`": forward_mode,
    "`nn.Dropout` of a nested tensor": nested,
}
if hasattr(torch.jit, "script"):
    WAYS["`nn.Dropout` under `torch.jit.script`"] = scripted


def from_library(module, make):
    """A case that needs a package; None where it is not installed."""

    def case(change):
        return make(importlib.import_module(module), change)

    case.needs = module
    return case


def bert_loss(_, change):
    model, loss_of = bert(0.1)
    return partial(loss_of, change(model))


def smoother(library, change):
    return lambda: library.LabelSmoother(0.1)({"logits": X[None]}, Y[None])


def causal(library, change):
    return lambda: library.ForCausalLMLoss(X[None], Y[None], vocab_size=8)


def made(name, *inputs, **options):
    return lambda library, change: partial(
        change(nn.Sequential(getattr(library, name)(**options)))[0], *inputs
    )


LIBRARIES = {
    "timm `DropPath`": from_library("timm.layers", made("DropPath", X, drop_prob=0.5)),
    "timm `drop_path`": from_library("timm.layers", lambda m, _: lambda: m.drop_path(X, 0.5, True)),
    "timm `DropBlock2d`, `PatchDropout`": from_library(
        "timm.layers", made("PatchDropout", SEQUENCE, prob=0.5)
    ),
    "timm `LabelSmoothingCrossEntropy`": from_library("timm.loss", made("LabelSmoothingCrossEntropy", X, Y)),
    "timm `SoftTargetCrossEntropy`": from_library("timm.loss", made("SoftTargetCrossEntropy", X, SOFT)),
    'torchvision `StochasticDepth`, mode "row"': from_library(
        "torchvision.ops", made("StochasticDepth", X, p=0.5, mode="row")
    ),
    'torchvision `StochasticDepth`, mode "batch"': from_library(
        "torchvision.ops", made("StochasticDepth", X, p=0.5, mode="batch")
    ),
    "torchvision `stochastic_depth`": from_library(
        "torchvision.ops", lambda m, _: lambda: m.stochastic_depth(X, 0.5, "row", True)
    ),
    "torchvision `DropBlock2d`": from_library(
        "torchvision.ops", made("DropBlock2d", IMAGE, p=0.5, block_size=3)
    ),
    "transformers, BERT with its loss": from_library("transformers", bert_loss),
    "transformers, loss of a causal language model": from_library("transformers.loss.loss_utils", causal),
    "transformers, `label_smoothing_factor` of the Trainer": from_library(
        "transformers.trainer_pt_utils", smoother
    ),
}

CASES = FUNCTIONS | MODULES | WAYS | LIBRARIES


def verdict(run):
    """ "✓": all of it is ours, "in part", or "–"."""
    with warnings.catch_warnings(), ops_seen() as seen:
        warnings.simplefilter("ignore")
        run()
    ours = any(name.startswith("fastreg::") for name in seen)
    return ("in part" if seen & TORCH_OPS else "✓") if ours else "–"


def row(name):
    """The row of the table: the name, and what patch and convert reach of it."""
    assert verdict(CASES[name](lambda module: module)) == "–"
    with fr.patched():
        patched = verdict(CASES[name](lambda module: module))
    converts = name not in FUNCTIONS
    converted = verdict(CASES[name](fr.convert)) if converts else "–"
    return f"| {name} | {patched} | {converted} |"
