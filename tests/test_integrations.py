"""Early stopping inside Lightning, transformers and ignite, with the real packages.

Proven for each: it stops at the epoch at which `fastreg.EarlyStopping` does and leaves the weights of the
best one; what does not count does not (sanity check, evaluation after training); a metric that is missing is
an error; training resumed from a checkpoint stops where the uninterrupted one does; the ranks stop together;
fastreg imports without the packages.
"""

import json
import math
import os
import socket
import sys
import warnings

import pytest
import torch
from helpers import on_ranks, run_python
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastreg as fr

NAN = math.nan
SCORES = [9.0, 7.0, NAN, 4.0, 5.0, 6.0, 4.5, 3.0, 2.0]  # with patience 3: best at index 3, stop at 6
HINT = 'needs pip install "torch-fastreg[test]"'


def expected(scores, **options):
    """(epochs run, best epoch) by the class itself, which test_early_stopping.py proves."""
    stopper = fr.EarlyStopping(**options)
    for score in scores:
        if stopper.step(score):
            break
    return stopper.epoch, stopper.best_epoch


assert expected(SCORES, patience=3) == (7, 3)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():  # of the packages, about loggers and workers
        warnings.simplefilter("ignore")
        yield


# --------------------------------------------------------------------------------------------------
# imports
def test_fastreg_imports_none_of_them():
    code = """if True:
        import sys, fastreg, fastreg.integrations
        print({"lightning", "pytorch_lightning", "transformers", "ignite"} & set(sys.modules))
    """
    assert run_python(code).stdout.strip() == "set()"


def test_a_missing_package_is_named_with_its_remedy():
    code = """if True:
        import importlib, sys
        for name in ("lightning", "pytorch_lightning", "transformers", "ignite"):
            sys.modules[name] = None
        for name in ("lightning", "transformers", "ignite"):
            try:
                importlib.import_module(f"fastreg.integrations.{name}")
            except ImportError as error:
                print(error)
    """
    lines = run_python(code).stdout.splitlines()
    assert len(lines) == 3
    for line, remedy in zip(lines, ("lightning", "transformers accelerate", "pytorch-ignite"), strict=True):
        assert "cannot import it" in line and line.endswith(f"pip install {remedy}")


# --------------------------------------------------------------------------------------------------
# Lightning
def lightning_parts():
    pytest.importorskip("lightning", reason=HINT)
    import lightning.pytorch as pl

    from fastreg.integrations.lightning import EarlyStopping

    class Scripted(pl.LightningModule):
        """Trains a weight; its validation loss is what the test wants."""

        def __init__(self, scores):
            super().__init__()
            self.scores, self.w, self.seen = scores, nn.Parameter(torch.zeros(2)), []

        def training_step(self, batch, index):
            return (self.w - batch[0].mean()).square().sum()

        def validation_step(self, batch, index):
            # Two batches whose mean is the score.
            score = (
                self.scores[0]
                if self.trainer.sanity_checking
                else self.scores[min(len(self.seen) // 2, len(self.scores) - 1)]
            )
            self.log("val_loss", score + (1.0 if index else -1.0))
            if not self.trainer.sanity_checking:
                self.seen.append(self.w.detach().clone())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    def fit(module, *callbacks, ckpt_path=None, **options):
        loader = DataLoader(TensorDataset(torch.ones(4)), batch_size=2)
        trainer = pl.Trainer(
            **{
                **dict(max_epochs=20, accelerator="cpu", logger=False, enable_checkpointing=False),
                **dict(enable_progress_bar=False, enable_model_summary=False),
                **options,
            },
            callbacks=list(callbacks),
        )
        trainer.fit(module, loader, loader, ckpt_path=ckpt_path)
        return trainer

    return pl, EarlyStopping, Scripted, fit


def test_lightning_stops_and_restores():
    _, EarlyStopping, Scripted, fit = lightning_parts()
    module, stop = Scripted(SCORES), EarlyStopping("val_loss", patience=3)
    trainer = fit(module, stop)
    assert (
        trainer.current_epoch == stop.stopper.epoch == 7
        and stop.stopper.best_epoch == 3
        and stop.stopper.best == 4.0
    )
    assert trainer.should_stop and "no improvement in 3 epochs" in stop.stopper.reason
    assert torch.equal(module.w, module.seen[2 * 3]) and not torch.equal(module.seen[6], module.seen[-1])

    again = Scripted([1.0, 2.0])  # a new module: the old best is forgotten
    fit(again, stop, max_epochs=2)
    assert stop.stopper.best == 1.0 and torch.equal(again.w, again.seen[0])


def test_lightning_options_decision_only_and_several_validations_per_epoch():
    _, EarlyStopping, Scripted, fit = lightning_parts()
    module, stop = (
        Scripted([-s for s in SCORES]),
        EarlyStopping("val_loss", restore=False, mode="max", patience=3),
    )
    fit(module, stop)
    assert stop.stopper.epoch == 7 and stop.stopper.state_dict()["snapshot"] == []
    assert not torch.equal(module.w, module.seen[6])
    module, stop = Scripted(SCORES), EarlyStopping("val_loss", patience=3)
    trainer = fit(module, stop, val_check_interval=0.5)
    assert stop.stopper.epoch == 7 and trainer.global_step == 7 and torch.equal(module.w, module.seen[6])
    module, stop = Scripted(SCORES), EarlyStopping("val_loss", patience=3)
    fit(module, stop, fast_dev_run=True)
    assert stop.stopper.epoch == 0
    with pytest.raises(ValueError, match=r"expected the metric 'val_acc', got \['val_loss'\]; log it with"):
        fit(Scripted(SCORES), EarlyStopping("val_acc"))
    with pytest.raises(ValueError, match="patience must be at least 0, got -1"):
        EarlyStopping("val_loss", patience=-1)
    assert EarlyStopping("a").state_key != EarlyStopping("b").state_key


@pytest.mark.parametrize("cut", [2, 5])
def test_lightning_resumes(cut, tmp_path):
    """Cut before and after the best epoch; the checkpoint brings the count and the best weights back."""
    _, EarlyStopping, Scripted, fit = lightning_parts()
    whole = Scripted(SCORES)
    fit(whole, EarlyStopping("val_loss", patience=3))
    first = Scripted(SCORES)
    # The weights in the checkpoint must be those of the last epoch, so it is written before training ends.
    pl = sys.modules["lightning.pytorch"]

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == cut - 1:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    fit(first, EarlyStopping("val_loss", patience=3), Save(), max_epochs=cut)
    second, stop = Scripted(SCORES[cut:]), EarlyStopping("val_loss", patience=3)
    trainer = fit(second, stop, ckpt_path=tmp_path / "cut.ckpt")
    assert trainer.current_epoch == stop.stopper.epoch == 7 and stop.stopper.best_epoch == 3
    assert torch.equal(second.w, whole.w)


RANK_SCORES = [[5.0, 4.0, 1.0, 6.0, 7.0, 8.0], [5.0, 2.0, NAN, 9.0, 1.0, 8.0]]


def lightning_rank(rank, port, out):
    torch.set_num_threads(1)
    torchrun = dict(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=2, RANK=rank, LOCAL_RANK=rank, GROUP_RANK=0
    )
    os.environ.update({name: str(value) for name, value in torchrun.items()}, TORCHELASTIC_RUN_ID="test")
    _, EarlyStopping, Scripted, fit = lightning_parts()
    module, stop = Scripted(RANK_SCORES[rank]), EarlyStopping("val_loss", patience=3)
    trainer = fit(
        module, stop, strategy="ddp", devices=2, num_sanity_val_steps=0, use_distributed_sampler=False
    )
    stopper = stop.stopper
    torch.save(
        (trainer.current_epoch, stopper.best, stopper.best_epoch, torch.equal(module.w, module.seen[2])),
        f"{out}{rank}",
    )


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_lightning_ranks_stop_together(tmp_path):
    """Two ranks under Lightning's own DDP, each with losses of its own, one of them with a NaN."""
    pytest.importorskip("lightning", reason=HINT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    on_ranks(2, lightning_rank, port, str(tmp_path / "rank"), group=False)
    means = [sum(pair) / 2 for pair in zip(*RANK_SCORES, strict=True)]
    assert expected(means, patience=3) == (5, 1)
    for rank in range(2):
        assert torch.load(tmp_path / f"rank{rank}") == (5, 3.0, 1, True)


# --------------------------------------------------------------------------------------------------
# transformers
def trainer_parts():
    pytest.importorskip("transformers", reason=HINT)
    pytest.importorskip("accelerate", reason=HINT)
    import transformers

    from fastreg.integrations.transformers import EarlyStopping

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2))

        def forward(self, x, labels=None):
            return {"loss": (self.w - x.mean()).square().sum(), "logits": self.w.expand(len(x), 2)}

    def make(scores, tmp_path, *callbacks, key="score", **options):
        """The metric of evaluation i is scores[i]; also gives the weights as they were then."""
        seen, model = [], Model()

        def compute_metrics(_):
            seen.append(model.w.detach().clone())
            return {key: scores[min(len(seen), len(scores)) - 1]}

        data = [{"x": torch.ones(3), "labels": torch.zeros(())} for _ in range(4)]
        arguments = transformers.TrainingArguments(
            **{
                **dict(
                    output_dir=str(tmp_path),
                    eval_strategy="epoch",
                    save_strategy="no",
                    num_train_epochs=20,
                    use_cpu=True,
                ),
                **dict(
                    per_device_train_batch_size=2, report_to="none", disable_tqdm=True, learning_rate=0.01
                ),
                **dict(logging_strategy="no", lr_scheduler_type="constant", optim="sgd"),
                **options,
            }
        )
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=data,
            eval_dataset=data,
            compute_metrics=compute_metrics,
            callbacks=list(callbacks),
        )
        return trainer, model, seen

    return EarlyStopping, make


def test_transformers_stops_and_restores(tmp_path):
    EarlyStopping, make = trainer_parts()
    stop = EarlyStopping("eval_score", patience=3)
    trainer, model, seen = make(SCORES, tmp_path, stop)
    trainer.evaluate()  # before and after training: not an epoch of it
    del seen[:]
    trainer.train()
    assert trainer.state.epoch == stop.stopper.epoch == 7 and stop.stopper.best_epoch == 3
    assert torch.equal(model.w, seen[3]) and not torch.equal(seen[3], seen[6])
    trainer.evaluate()
    assert stop.stopper.epoch == 7
    del seen[:]
    trainer.train()  # a second training is judged anew
    assert stop.stopper.epoch == 7 and torch.equal(model.w, seen[3])


def test_transformers_options_and_a_missing_metric(tmp_path):
    EarlyStopping, make = trainer_parts()
    stop = EarlyStopping("eval_score", restore=False, mode="max", patience=3)
    trainer, model, seen = make([-s for s in SCORES], tmp_path, stop)
    trainer.train()
    assert stop.stopper.epoch == 7 and torch.equal(model.w, seen[6])
    trainer, *_ = make(SCORES, tmp_path, EarlyStopping("score"))
    with pytest.raises(
        ValueError, match=r"expected the metric 'score', got .*'eval_score'.*; name one of these"
    ):
        trainer.train()
    stop = EarlyStopping("eval_b_score", patience=3)  # of two evaluation sets the second is watched
    trainer, _, seen = make([s for score in SCORES for s in (0.0, score)], tmp_path, stop)
    trainer.eval_dataset = {"a": trainer.eval_dataset, "b": trainer.eval_dataset}
    trainer.train()
    assert stop.stopper.epoch == 7 and len(seen) == 14
    with pytest.raises(TypeError, match=r"EarlyStopping: arguments must be .*got 'wait'"):
        EarlyStopping(wait=3)


@pytest.mark.parametrize(("cut", "again"), [(2, True), (5, True), (5, False)])
def test_transformers_resumes(cut, again, tmp_path):
    """The count goes on where that is asked for; weights from before the cut are not in the checkpoint, and
    that is said.
    """
    EarlyStopping, make = trainer_parts()
    trainer, *_ = make(
        SCORES, tmp_path, EarlyStopping("eval_score", patience=3), save_strategy="epoch", num_train_epochs=cut
    )
    trainer.train()
    checkpoint = tmp_path / f"checkpoint-{2 * cut}"
    assert (
        "EarlyStopping" in json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]
    )
    trainer, model, seen = make(
        SCORES[cut:],
        tmp_path,
        EarlyStopping("eval_score", patience=3),
        restore_callback_states_from_checkpoint=again,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=str(checkpoint))
    stop = next(c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyStopping))
    said = [w for w in caught if "before the resumption" in str(w.message)]
    if again:
        assert trainer.state.epoch == stop.stopper.epoch == 7 and stop.stopper.best_epoch == 3
        assert len(said) == (cut == 5)
        assert torch.equal(model.w, seen[3 - cut] if cut == 2 else seen[-1])
    else:
        assert stop.stopper.epoch == trainer.state.epoch - cut and stop.stopper.best == 2.0 and not said


# --------------------------------------------------------------------------------------------------
# ignite
def ignite_parts(scores):
    pytest.importorskip("ignite", reason=HINT)
    from ignite.engine import Engine, Events

    from fastreg.integrations.ignite import EarlyStopping

    model, seen = nn.Linear(1, 1), []

    def train(engine, batch):
        with torch.no_grad():
            model.weight += 1

    def evaluate(engine, batch):
        seen.append(model.weight.detach().clone())
        engine.state.metrics["loss"] = scores[min(len(seen), len(scores)) - 1]

    trainer, evaluator = Engine(train), Engine(evaluate)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda _: evaluator.run([0]))
    return EarlyStopping, Events, model, seen, trainer, evaluator


def test_ignite_stops_and_restores():
    EarlyStopping, Events, model, seen, trainer, evaluator = ignite_parts(SCORES)
    handler = EarlyStopping(lambda engine: -engine.state.metrics["loss"], trainer, model, patience=3)
    evaluator.add_event_handler(Events.COMPLETED, handler)
    at_end = []
    trainer.add_event_handler(Events.COMPLETED, lambda _: at_end.append(model.weight.detach().clone()))
    trainer.run(range(2), max_epochs=20)
    assert trainer.state.epoch == handler.stopper.epoch == 7 and handler.stopper.best_epoch == 3
    assert (
        torch.equal(model.weight, seen[3])
        and torch.equal(at_end[0], seen[3])
        and not torch.equal(seen[3], seen[6])
    )
    assert handler.state_dict() == handler.stopper.state_dict()
    other = EarlyStopping(lambda engine: 0.0, trainer, model)
    other.load_state_dict(handler.state_dict())
    assert other.stopper.best == handler.stopper.best == -4.0


def test_ignite_mode_and_wrong_arguments():
    EarlyStopping, Events, _, _, trainer, evaluator = ignite_parts(SCORES)
    handler = EarlyStopping(lambda engine: engine.state.metrics["loss"], trainer, mode="min", patience=3)
    evaluator.add_event_handler(Events.COMPLETED, handler)
    trainer.run([0], max_epochs=20)
    assert trainer.state.epoch == 7
    with pytest.raises(TypeError, match="expected a function and an ignite Engine, got Engine and function"):
        EarlyStopping(trainer, lambda engine: 0.0)


@pytest.mark.parametrize("how", ["terminate", "skip_completed", "epoch and terminate", "max_iters"])
def test_ignite_restores_however_the_run_ends(how):
    """Another handler may end the run, in every way that ignite has."""
    EarlyStopping, Events, model, seen, trainer, evaluator = ignite_parts(SCORES)
    handler = EarlyStopping(lambda engine: -engine.state.metrics["loss"], trainer, model, patience=9)
    evaluator.add_event_handler(Events.COMPLETED, handler)
    run = dict(max_epochs=20)
    if how == "max_iters":
        run = dict(max_iters=12)

    @trainer.on(Events.ITERATION_COMPLETED(once=11))
    def end(engine):
        if how == "epoch and terminate":
            engine.terminate_epoch()
        elif how != "max_iters":
            engine.terminate(**({"skip_completed": True} if how == "skip_completed" else {}))

    if how == "epoch and terminate":
        trainer.add_event_handler(Events.EPOCH_COMPLETED(once=6), lambda engine: engine.terminate())
    trainer.run(range(2), **run)
    assert trainer.state.iteration <= 12 and handler.stopper.best_epoch == 3
    assert torch.equal(model.weight, seen[3]) and not torch.equal(seen[3], seen[-1])


def test_ignite_goes_on_after_an_interruption():
    """An interrupted run is not over: it goes on from the weights it had."""
    EarlyStopping, Events, model, seen, trainer, evaluator = ignite_parts(SCORES)
    handler = EarlyStopping(lambda engine: -engine.state.metrics["loss"], trainer, model, patience=3)
    evaluator.add_event_handler(Events.COMPLETED, handler)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=11), lambda engine: engine.interrupt())
    start = model.weight.detach().clone()
    trainer.run(range(2), max_epochs=20)
    assert torch.equal(model.weight, start + 11)
    trainer.run(range(2), max_epochs=20)
    assert trainer.state.epoch == handler.stopper.epoch == 7 and torch.equal(model.weight, seen[3])


def test_ignite_says_when_nothing_was_judged():
    EarlyStopping, Events, model, _, trainer, evaluator = ignite_parts(SCORES)
    handler = EarlyStopping(lambda engine: 0.0, trainer, model)
    with pytest.warns(RuntimeWarning, match="the trainer ended without a run of the evaluator"):
        trainer.run(range(2), max_epochs=2)
    evaluator.add_event_handler(Events.COMPLETED, handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.run(range(2), max_epochs=4)
