"""transformers' Trainer with our parts: the smoothed loss, penalties that leave biases and norms alone,
scores of every number type, and a stopper that gets no evaluation.
"""

import decimal
import fractions
import json
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fastreg as fr

HINT = 'needs pip install "torch-fastreg[test]"'
transformers = pytest.importorskip("transformers", reason=HINT)
pytest.importorskip("accelerate", reason=HINT)

from fastreg.integrations.transformers import (  # noqa: E402
    AveragedWeights,
    EarlyStopping,
    loss,
    optimizer,
)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():  # of transformers', about loaders and devices
        warnings.filterwarnings("ignore", module="transformers|torch.utils")
        yield


def arguments(folder, **options):
    fixed = dict(use_cpu=True, report_to="none", disable_tqdm=True, logging_strategy="no", save_strategy="no")
    fixed |= dict(per_device_train_batch_size=2, learning_rate=0.01, lr_scheduler_type="constant")
    return transformers.TrainingArguments(output_dir=str(folder), **fixed | options)


# --------------------------------------------------------------------------------------------------
# The loss
def labels_of(shape, classes, ignored=0.3):
    labels = torch.randint(classes, shape)
    return torch.where(torch.rand(shape) < ignored, -100, labels)


def reference(logits, labels, shift, smoothing, count=None):
    """The smoothed loss in float64, word by word."""
    if shift:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    rows, wanted = logits.reshape(-1, logits.shape[-1]).double(), labels.reshape(-1)
    rows, wanted = rows[wanted != -100], wanted[wanted != -100]
    logs = rows - rows.logsumexp(-1, keepdim=True)
    each = -(1 - smoothing) * logs[range(len(wanted)), wanted] - smoothing * logs.mean(-1)
    return each.sum() / (len(wanted) if count is None else count)


KINDS = {
    "causal": (transformers.modeling_outputs.CausalLMOutputWithPast, (2, 7), None, True),
    "masked": (transformers.modeling_outputs.MaskedLMOutput, (2, 7), None, False),
    "classes": (transformers.modeling_outputs.SequenceClassifierOutput, (5,), None, False),
    "dict": (dict, (2, 7), None, False),
    "dict, shifted": (dict, (2, 7), True, True),
    "tuple": (lambda logits: (logits, "cache"), (2, 7), True, True),
    "tuple of classes": (lambda logits: (logits,), (5,), None, False),
}


@pytest.mark.parametrize("count", [None, 11, torch.tensor(11)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_loss(kind, dtype, count):
    """Value and gradient of the definition, in float32 whatever the logits are, and as LabelSmoother's in
    float32.
    """
    make, shape, shift, shifted = KINDS[kind]
    torch.manual_seed(4)
    logits = (torch.randn(*shape, 13) * 4).to(dtype).requires_grad_()
    labels = labels_of(shape, 13)
    function = pickle.loads(pickle.dumps(loss(label_smoothing=0.1, shift=shift)))
    value = function(make(logits=logits), labels, num_items_in_batch=count)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide = logits.detach().double().requires_grad_()
    wanted = reference(wide, labels, shifted, 0.1, count)
    torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-6)
    value *= 2  # as Trainer multiplies it, in place, by the number of ranks
    (grad,), (wanted_grad,) = torch.autograd.grad(value, logits), torch.autograd.grad(2 * wanted, wide)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=max(step, 1e-5), atol=max(step / 64, 1e-7))
    if dtype == torch.float32:
        smoother = transformers.trainer_pt_utils.LabelSmoother(0.1)
        theirs = smoother({"logits": logits}, labels, shift_labels=shifted, num_items_in_batch=count)
        torch.testing.assert_close(value / 2, theirs.detach() + 0 * value)


def test_loss_keeps_what_trainers_own_loses():
    """At bfloat16 logits LabelSmoother's logarithms are bfloat16, and off by a hundredth."""
    torch.manual_seed(0)
    logits, labels = (torch.randn(4, 9, 50) * 4).bfloat16(), torch.randint(50, (4, 9))
    wanted = reference(logits, labels, False, 0.1)
    ours = loss(label_smoothing=0.1)({"logits": logits}, labels)
    theirs = transformers.trainer_pt_utils.LabelSmoother(0.1)({"logits": logits}, labels)
    assert abs(ours - wanted) < 1e-5 < abs(theirs - wanted)


def test_loss_errors_and_options():
    logits, labels = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    with pytest.raises(ValueError, match=r"loss: shift must be True or False .* got None"):
        loss()((logits,), labels)
    with pytest.raises(ValueError, match="loss: expected labels, got None"):
        loss()({"logits": logits}, None)
    weight = torch.rand(5)
    value = loss(0.2, smoothing="others", z_loss=0.1, weight=weight, ignore_index=2)(
        {"logits": logits}, labels
    )
    rows = logits.reshape(-1, 5), labels.reshape(-1), weight
    options = dict(label_smoothing=0.2, smoothing="others", z_loss=0.1, ignore_index=2)
    assert torch.equal(value, fr.cross_entropy(*rows, **options))


def tiny_gpt2():
    torch.manual_seed(0)
    sizes = dict(n_layer=1, n_head=2, n_embd=16, vocab_size=50, n_positions=16)
    config = transformers.GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return transformers.GPT2LMHeadModel(config)


def test_loss_in_a_trainer(tmp_path):
    """The same weights as with label_smoothing_factor, gradient accumulation and ignored labels included."""
    torch.manual_seed(1)
    data = [{"input_ids": (ids := torch.randint(50, (8,))), "labels": ids.clone()} for _ in range(8)]
    data[0]["labels"][3:] = -100
    weights = []
    for ours in (True, False):
        model = tiny_gpt2()
        options = dict(max_steps=3, gradient_accumulation_steps=2, optim="sgd", seed=3, max_grad_norm=0.0)
        smoothing = {} if ours else dict(label_smoothing_factor=0.1)
        trainer = transformers.Trainer(
            model,
            arguments(tmp_path, **options, **smoothing),
            train_dataset=data,
            compute_loss_func=loss(label_smoothing=0.1) if ours else None,
        )
        trainer.train()
        weights.append([p.detach() for p in model.parameters()])
    start = [p.detach() for p in tiny_gpt2().parameters()]
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(weights[0], start, strict=True))


# --------------------------------------------------------------------------------------------------
# Penalties
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_l1_leaves_biases_and_norms_alone(weight_decay, tmp_path):
    """l1 among the optimiser's arguments falls on what Trainer itself would decay, whether it does or not."""
    model = tiny_gpt2()
    data = [{"input_ids": torch.zeros(4, dtype=torch.long), "labels": torch.zeros(4, dtype=torch.long)}] * 4
    trainer = transformers.Trainer(
        model,
        arguments(tmp_path, max_steps=1, weight_decay=weight_decay),
        train_dataset=data,
        optimizer_cls_and_kwargs=(fr.optim.SGD, {"lr": 0.01, "l1": 0.5}),
    )
    trainer.train()
    l1 = {p: group["l1"] for group in trainer.optimizer.param_groups for p in group["params"]}
    names = {name: l1[p] for name, p in model.named_parameters()}
    free = {name for name in names if name.endswith("bias") or "ln_" in name}
    assert {name for name, value in names.items() if value == 0} == free and len(free) > 5
    assert {value for name, value in names.items() if name not in free} == {0.5}


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_adamw_for_trainer(weight_decay, tmp_path):
    """Trainer's own AdamW with its clipping, step by step; then l1, and an average that is copied out."""
    ids = [torch.tensor([1, 2, 3, 4]), torch.tensor([4, 3, 2, 1])]
    data = [{"input_ids": row, "labels": row} for row in ids * 4]
    options = dict(max_steps=4, weight_decay=weight_decay, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-3)
    models, trainers = [], []
    for clip, more in ((0.05, None), (0.0, dict(max_norm=0.05)), (0.0, dict(l1=1e-3, ema=0.5))):
        torch.manual_seed(0)
        models.append(tiny_gpt2())
        given = arguments(tmp_path, max_grad_norm=clip, **options)
        kind = None if more is None else optimizer(given, **more)
        trainers.append(
            transformers.Trainer(models[-1], given, train_dataset=data, optimizer_cls_and_kwargs=kind)
        )
        trainers[-1].train()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    names = {p: name for name, p in models[2].named_parameters()}
    groups = trainers[2].optimizer.param_groups
    assert {g["l1"] for g in groups} == {0.0, 1e-3} and {g["weight_decay"] for g in groups} == {
        0.0,
        weight_decay,
    }
    free = {names[p] for g in groups if g["l1"] == 0 for p in g["params"]}
    assert free == {name for name in names.values() if name.endswith("bias") or "ln_" in name}
    assert fr.optim.sparsity([p for g in groups if g["l1"] for p in g["params"]]) > 0
    ours = trainers[2].optimizer.optimizer
    averages = {p: state["ema"] for p, state in ours.state.items()}
    ours.copy_averaged_to(models[2])
    assert averages and all(torch.equal(p, average) for p, average in averages.items())
    with pytest.raises(ValueError, match=r"max_grad_norm=0.5 and max_norm=1.0; construct .* max_grad_norm=0"):
        optimizer(arguments(tmp_path, max_grad_norm=0.5), max_norm=1.0)


def test_which_groups_are_free_of_l1():
    weight, bias, norm = (
        nn.Parameter(torch.ones(2, 2)),
        nn.Parameter(torch.ones(2)),
        nn.Parameter(torch.ones(3)),
    )

    def l1(*groups, **options):
        copies = (dict(group) for group in groups)  # a group is kept, and has all options from then on
        return [group["l1"] for group in fr.optim.SGD(copies, lr=0.1, **options).param_groups]

    decayed, free = {"params": [weight], "weight_decay": 0.1}, {"params": [bias, norm], "weight_decay": 0.0}
    assert l1(decayed, free, l1=0.5) == [0.5, 0.0] and l1(free, decayed, l1=0.5) == [0.0, 0.5]
    named = {"params": [("bias", bias)], "weight_decay": 0}
    assert l1({"params": [("weight", weight)]}, named, l1=0.5) == [0.5, 0.0]
    # Asked for, alone, without weight_decay of its own, or with a matrix among them: as given.
    assert l1(decayed, {**free, "l1": 0.25}, l1=0.5) == [0.5, 0.25]
    assert l1(free, l1=0.5) == [0.5]
    assert l1(decayed, {"params": bias}, l1=0.5) == [0.5, 0.5]
    assert l1({"params": bias}, {**decayed, "weight_decay": 0.0}, l1=0.5) == [0.5, 0.5]
    assert [group["l1"] for group in fr.optim.SGD([weight, bias], lr=0.1, l1=0.5).param_groups] == [0.5]


# --------------------------------------------------------------------------------------------------
# Early stopping
class Scored(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def forward(self, x, labels=None):
        return {"loss": (self.w - x.mean()).square().sum(), "logits": self.w.expand(len(x), 2)}


def scored_trainer(folder, stop, score=lambda value: value, **options):
    """The metric falls by one in each evaluation until the third."""
    seen, data = [], [{"x": torch.ones(3), "labels": torch.zeros(())} for _ in range(4)]

    def compute_metrics(_):
        seen.append(0)
        return {"score": score([5, 4, 3][min(len(seen), 3) - 1])}

    return transformers.Trainer(
        Scored(),
        arguments(folder, **{**dict(eval_strategy="epoch", num_train_epochs=8), **options}),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=compute_metrics,
        callbacks=[stop],
    )


NUMBERS = {
    "int": int,
    "numpy int": np.int16,
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
    "array": np.array,
    "array of one": lambda value: np.array([value]),
    "fraction": fractions.Fraction,
    "decimal": decimal.Decimal,
    "tensor": torch.tensor,
    "bfloat16": lambda value: torch.tensor([value], dtype=torch.bfloat16),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_scores_of_every_number_type(kind):
    """The callback alone, since Trainer itself changes some of them first."""
    number, stop = (
        NUMBERS[kind],
        EarlyStopping(restore=False, patience=np.int64(2), min_delta=np.float32(0.5)),
    )
    control = transformers.TrainerControl()
    stop.on_train_begin(transformers.TrainingArguments("x", eval_strategy="epoch"), None, control)
    for value in (5, 4, 3, 3, 3):
        assert not control.should_training_stop
        stop.on_evaluate(None, None, control, {"eval_loss": number(value)})
    assert control.should_training_stop and stop.stopper.best == 3.0
    state = json.loads(json.dumps(stop.state()))  # as Trainer writes it
    again = EarlyStopping.from_state(state)
    assert again.options == {"patience": 2, "min_delta": 0.5} and again.progress["best"] == 3.0
    with pytest.raises(TypeError, match="expected one real number"):
        stop.on_evaluate(None, None, control, {"eval_loss": "1"})


@pytest.mark.parametrize("kind", ["float32", "array", "decimal", "tensor"])
def test_scores_through_a_trainer(kind, tmp_path):
    stop = EarlyStopping("eval_score", patience=2, min_delta=np.float32(0.5))
    # Arrays and decimals among the metrics keep Trainer itself from saving a checkpoint.
    save = "epoch" if kind in ("float32", "tensor") else "no"
    trainer = scored_trainer(tmp_path, stop, NUMBERS[kind], save_strategy=save, save_total_limit=1)
    trainer.train()
    assert stop.stopper.best == 3.0 and trainer.state.epoch == 5


def test_no_evaluation_is_said_at_the_start(tmp_path):
    trainer = scored_trainer(tmp_path, EarlyStopping("eval_score"), eval_strategy="no")
    with pytest.raises(ValueError, match=r"expected evaluations during training, got eval_strategy='no'"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_training_that_ends_before_the_first_evaluation(tmp_path):
    trainer = scored_trainer(tmp_path, EarlyStopping("eval_score"), eval_delay=100)
    with pytest.warns(RuntimeWarning, match="training ended before an evaluation had 'eval_score'"):
        trainer.train()
    assert math.isclose(trainer.state.epoch, 8)


@pytest.mark.parametrize("first", [AveragedWeights, EarlyStopping], ids=lambda cls: cls.__name__)
def test_the_best_averages_are_restored(first, tmp_path):
    """Those that were evaluated, in whatever order the callbacks stand; training goes on with the weights."""
    scores, evaluated, started = iter([9.0, 1.0, 5.0, 6.0]), [], []

    class Watched(transformers.Trainer):
        def evaluate(self, *args, **kwargs):
            evaluated.append([p.detach().clone() for p in self.model.parameters()])
            metrics = {"eval_score": next(scores)}
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

        def training_step(self, model, *args, **kwargs):
            started.append([p.detach().clone() for p in model.parameters()])
            return super().training_step(model, *args, **kwargs)

    ids = [torch.tensor([1, 2, 3, 4]), torch.tensor([4, 3, 2, 1])]
    data = [{"input_ids": row, "labels": row} for row in ids * 2]
    given = arguments(tmp_path, max_steps=20, eval_strategy="epoch", max_grad_norm=0)
    torch.manual_seed(0)
    model, stop = tiny_gpt2(), EarlyStopping("eval_score", patience=2)
    callbacks = [AveragedWeights(), stop]
    trainer = Watched(
        model, given, train_dataset=data, eval_dataset=data,
        optimizer_cls_and_kwargs=optimizer(given, ema=0.9),
        callbacks=callbacks if first is AveragedWeights else callbacks[::-1],
    )  # fmt: skip
    trainer.train()
    assert len(evaluated) == 4 and stop.stopper.best_epoch == 1
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), evaluated[1], strict=True))
    # Steps 0 to 7, two for each epoch; the step after an evaluation starts from other weights than those.
    for n in range(3):
        assert not all(torch.equal(*pair) for pair in zip(started[2 * n + 2], evaluated[n], strict=True))
