"""The callback for Lightning among the hooks of others, and fr.optim.SGD under Lightning's precisions.

tests/test_integrations.py proves that it stops and restores; here it does so whoever logs the metric and
whenever, and says so where nobody does.
"""

import itertools
import logging
import math
import warnings

import forked
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastreg as fr

pl = pytest.importorskip("lightning.pytorch", reason='needs pip install "torch-fastreg[test]"')

from fastreg.integrations.lightning import AveragedWeights, EarlyStopping  # noqa: E402

SCORES = [9.0, 1.0, 5.0, 6.0, 7.0, 8.0]  # with patience 2: best at index 1, stop at 3


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():  # of Lightning's, about workers and loggers
        warnings.filterwarnings("ignore", module="lightning")
        yield


class Net(pl.LightningModule):
    """Logs the next score in the hook `where`, its own or that of the callback below."""

    def __init__(self, where, before=False):
        super().__init__()
        self.l, self.where, self.before, self.seen = nn.Linear(1, 1), where, before, []

    def reached(self, where):
        if where == self.where and not self.trainer.sanity_checking:
            self.log("m", SCORES[min(len(self.seen), len(SCORES) - 1)])
            self.seen.append(self.l.weight.detach().clone())

    def on_train_start(self):
        if self.before:
            self.log("m", 99.0)

    def training_step(self, batch, index):
        if index == 1:
            self.reached("training_step")
        return self.l(batch[0]).square().mean()

    def validation_step(self, batch, index):
        if index == 0:
            self.reached("validation_step")

    def on_validation_epoch_end(self):
        self.reached("on_validation_epoch_end")

    def on_train_epoch_end(self):
        self.reached("on_train_epoch_end")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Logger(pl.Callback):
    def on_validation_epoch_end(self, trainer, module):
        module.reached("callback's on_validation_epoch_end")

    def on_train_epoch_end(self, trainer, module):
        module.reached("callback's on_train_epoch_end")


WHERE = {
    "training": ["training_step", "on_train_epoch_end", "callback's on_train_epoch_end"],
    "validation": [
        "validation_step",
        "on_validation_epoch_end",
        "callback's on_validation_epoch_end",
    ],
}


def fit(module, *callbacks, **options):
    loader = DataLoader(TensorDataset(torch.ones(4, 1)), batch_size=2)
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, logger=False)
    options = {"max_epochs": 10, "enable_checkpointing": False, **options}
    trainer = pl.Trainer(accelerator="cpu", callbacks=list(callbacks), **quiet, **options)
    trainer.fit(module, loader, loader)
    return trainer


@pytest.mark.parametrize("before", [False, True], ids=["", "logged before training"])
@pytest.mark.parametrize(
    "options",
    [dict(), dict(val_check_interval=0.5), dict(check_val_every_n_epoch=2), dict(limit_val_batches=0)],
    ids=str,
)
def test_whoever_logs_and_whenever(options, before):
    """One score is one step of the stopper, and the weights are those at which it was logged."""
    # In the first epoch Lightning itself lets the value from before stand for that of a step.
    kinds = ["training"] if "limit_val_batches" in options else ["training", "validation"]
    for kind in kinds:
        for i, where in enumerate(WHERE[kind][1:] if before else WHERE[kind]):
            stop, module = EarlyStopping("m", patience=2), Net(where, before)
            trainer = fit(module, *([stop, Logger()] if i else [Logger(), stop]), **options)
            stopper = stop.stopper
            assert (stopper.epoch, stopper.best_epoch, stopper.best) == (4, 1, 1.0), where
            epochs = {"val_check_interval": 2, "check_val_every_n_epoch": 8}.get(*options or [""], 4)
            assert trainer.current_epoch == (epochs if kind == "validation" else 4), where
            if where != "training_step":  # where a step follows
                assert torch.equal(module.l.weight, module.seen[1]), where
            assert stop.wait_count == 2 and stop.best_score == 1.0
            assert stop.stopped_epoch == trainer.current_epoch - 1
            assert trainer.early_stopping_callback is stop


@pytest.mark.parametrize(
    "options",
    [dict(), dict(val_check_interval=0.5), dict(check_val_every_n_epoch=2), dict(limit_val_batches=0)],
    ids=str,
)
def test_nobody_logs(options):
    with pytest.raises(ValueError, match=r"expected the metric 'm', got \[\]; log it with self.log") as error:
        fit(Net("nowhere"), EarlyStopping("m"), **options)
    assert ("none is run" in str(error.value)) == ("limit_val_batches" in options)


def test_nobody_logs_in_an_endless_epoch():
    """The end of such an epoch never comes, so the first validation must have the metric."""

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return itertools.repeat(torch.ones(1))

    loader = DataLoader(Endless(), batch_size=2)
    validation = DataLoader(TensorDataset(torch.ones(4, 1)), batch_size=2)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=50,
        val_check_interval=5,
        limit_val_batches=2,
        callbacks=[EarlyStopping("m")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(ValueError, match="expected the metric 'm'"):
        trainer.fit(Net("nowhere"), loader, validation)
    assert trainer.global_step == 5


def test_training_that_ends_before_the_first_validation():
    stop = EarlyStopping("m")
    with pytest.warns(RuntimeWarning, match="training ended before the metric 'm' was read once"):
        fit(Net("validation_step"), stop, check_val_every_n_epoch=5, max_epochs=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        fit(Net("validation_step"), EarlyStopping("m"), fast_dev_run=True)
        fit(Net("validation_step"), EarlyStopping("m"), max_epochs=1)


def test_the_name_that_the_program_uses(tmp_path):
    """lightning.pytorch and pytorch_lightning have a class each; ours is of the one that was imported."""
    code = """if True:
        import {}, fastreg.integrations.lightning as ours
        print(ours.EarlyStopping.__mro__[1].__module__.startswith({!r}))
    """
    pytest.importorskip("pytorch_lightning")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        run = forked.finished(forked.start(code.format(name, name), folder=tmp_path), tmp_path)
        assert run.stdout.strip() == "True", run.stderr


# --------------------------------------------------------------------------------------------------
# Precisions
class Trained(pl.LightningModule):
    """A small regression whose optimiser is given."""

    def __init__(self, optimizer, **options):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.optimizer, self.options, self.norms = optimizer, options, []

    def training_step(self, batch, index):
        loss = (self.net(batch[0]).float() - 1).square().mean() * 100
        return loss * math.inf if index == 2 else loss  # an overflow, which a scaler skips

    def on_before_zero_grad(self, optimizer):
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        self.norms += [torch.stack([g.float().norm() for g in grads]).norm().item()] if grads else []

    def configure_optimizers(self):
        momentum = dict(momentum=0.9) if issubclass(self.optimizer, torch.optim.SGD) else {}
        optimizer = self.optimizer(self.parameters(), lr=0.05, **momentum, **self.options)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2), "interval": "step"}]


def trained(optimizer, precision, algorithm, **options):
    """The weights and the norms of the gradients at each `zero_grad`."""
    plugins, module = None, Trained(optimizer, **options)
    if precision == "16-mixed":  # on the CPU Lightning would make bf16-mixed of the name
        from lightning.pytorch.plugins import MixedPrecision

        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        plugins, precision = MixedPrecision("16-mixed", "cpu", scaler=scaler), None
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=6 if plugins else 2,
        precision=precision,
        plugins=plugins,
        gradient_clip_val=0.5 if algorithm else None,
        gradient_clip_algorithm=algorithm,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.randn(12, 3, generator=torch.Generator().manual_seed(3))
    trainer.fit(module, DataLoader(TensorDataset(data), batch_size=2))
    return [p.detach().float() for p in module.parameters()], module.norms


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true", "32-true"])
def test_clipping_under_every_precision(precision, algorithm, kind):
    """Our optimisers as they are built by default take what torch's take, overflowing steps included."""
    ours, our_norms = trained(getattr(fr.optim, kind), precision, algorithm)
    theirs, their_norms = trained(getattr(torch.optim, kind), precision, algorithm)
    for a, b in zip(ours, theirs, strict=True):
        # bfloat16 weights are rounded once a step instead of once an operation.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-2 if precision == "bf16-true" else 1e-5)
    assert len(our_norms) == len(their_norms) > 0
    if algorithm == "norm":
        assert all(not math.isfinite(norm) or norm <= 0.51 for norm in our_norms)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("precision", ["16-mixed", "32-true"])
def test_clipping_in_the_step(precision, kind):
    """max_norm does what Lightning's clipping does, with and without a scaler, and leaves the gradients."""
    ours, our_norms = trained(getattr(fr.optim, kind), precision, None, max_norm=0.5)
    theirs, _ = trained(getattr(torch.optim, kind), precision, "norm")
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert max(filter(math.isfinite, our_norms)) > 0.6


class Averaged(Trained):
    """Remembers the weights of its validations."""

    validations = ()

    def validation_step(self, batch, index):
        if index == 0 and not self.trainer.sanity_checking:
            self.seen = [p.detach().clone() for p in self.parameters()]
            self.validations += (self.seen,)
            self.log("score", SCORES[len(self.validations) - 1])
        self.log("loss", self.net(batch[0]).square().mean())


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_averages_in_validation(kind, tmp_path):
    """Validation sees the averages, training and checkpoints the weights, and a resumed run goes on."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    data = DataLoader(
        TensorDataset(torch.randn(4, 3, generator=torch.Generator().manual_seed(3))), batch_size=2
    )
    runs = []
    for resumes in (False, True):
        module = Averaged(getattr(fr.optim, kind), ema=0.9, ema_warmup=True, max_norm=0.5)
        saver = ModelCheckpoint(tmp_path / str(resumes), save_top_k=-1, filename="{epoch}")
        for end in (1, 3) if resumes else (3,):
            trainer = pl.Trainer(
                accelerator="cpu", max_epochs=end, logger=False, callbacks=[AveragedWeights(), saver],
                enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip
            trainer.fit(
                module, data, data, ckpt_path=tmp_path / "True/epoch=0.ckpt" if end > 1 and resumes else None
            )
        optimizer = module.optimizers().optimizer
        for p, seen in zip(module.parameters(), module.seen, strict=True):
            assert torch.equal(optimizer.state[p]["ema"], seen) and not torch.equal(p.detach(), seen)
        saved = torch.load(saver.best_model_path or saver.last_model_path, weights_only=False)["state_dict"]
        if not resumes:
            assert all(torch.equal(saved[name], p.detach()) for name, p in module.named_parameters())
        runs.append([*module.seen, *(p.detach() for p in module.parameters())])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def of_four():
    return DataLoader(
        TensorDataset(torch.randn(4, 3, generator=torch.Generator().manual_seed(3))), batch_size=2
    )


@pytest.mark.parametrize("interval", [1.0, 0.5])
@pytest.mark.parametrize("first", [AveragedWeights, EarlyStopping], ids=lambda cls: cls.__name__)
def test_the_best_averages_are_restored(first, interval):
    """Those that were validated, in whatever order the callbacks stand."""
    module, stop = Averaged(fr.optim.AdamW, ema=0.9), EarlyStopping("score", patience=2)
    callbacks = [AveragedWeights(), stop]
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=6, logger=False, enable_checkpointing=False,
        val_check_interval=interval, num_sanity_val_steps=2,
        callbacks=callbacks if first is AveragedWeights else callbacks[::-1],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, of_four(), of_four())
    assert stop.stopper.best_epoch == 1 and len(module.validations) == 4
    for p, seen, last in zip(module.parameters(), *(module.validations[i] for i in (1, 3)), strict=True):
        assert torch.equal(p, seen) and not torch.equal(p, last)
    trainer.validate(module, of_four(), verbose=False)
    assert all(torch.equal(*pair) for pair in zip(module.parameters(), module.seen, strict=True))


def test_a_validation_that_raises_leaves_the_weights():
    class Fails(Averaged):
        def validation_step(self, batch, index):
            raise ArithmeticError("of the model")

    module = Fails(fr.optim.AdamW, ema=0.9)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, num_sanity_val_steps=0,
        callbacks=[AveragedWeights()], enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(ArithmeticError):
        trainer.fit(module, of_four(), of_four())
    optimizer = trainer.optimizers[0]
    for p in module.parameters():
        assert not torch.equal(p, optimizer.state[p]["ema"])
    with optimizer.averaged():  # it was outside
        assert all(torch.isfinite(p).all() for p in module.parameters())


def test_fused_is_refused_with_clipping_as_torch_is():
    for optimizer in (torch.optim.SGD, fr.optim.SGD):
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            trained(optimizer, "bf16-mixed", "norm", fused=True)
