"""Training on two ranks by the ways that torch and the trainers have for it: the weights are those of one
process that sees both halves of each batch.
"""

import contextlib
import itertools
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import on_ranks
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn.parallel import DistributedDataParallel

import fastreg as fr

HINT = 'needs pip install "torch-fastreg[test]"'
OPTIMIZERS = {
    "SGD": lambda params: fr.optim.SGD(params, lr=0.1, momentum=0.9, l1=0.01, l1_mode="proximal", ema=0.5),
    "AdamW": lambda params: fr.optim.AdamW(params, lr=0.05, l1=0.01, max_norm=1.0),
}
STEPS, ROWS = 6, 4  # of a rank


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def batches():
    """(STEPS, 2, ROWS, …): inputs and classes of both ranks."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, 2, ROWS, 5, generator=generator)
    return x, torch.randint(3, (STEPS, 2, ROWS), generator=generator)


def loss_of(model, x, y):
    return fr.cross_entropy(model(x.flatten(0, -2)), y.flatten(), label_smoothing=0.1)


def of_one_process(make, accumulated=1):
    model = network()
    optimizer = make(model.parameters())
    for n, (x, y) in enumerate(zip(*batches(), strict=True)):
        (loss_of(model, x, y) / accumulated).backward()
        if n % accumulated == accumulated - 1:
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizer


def assert_same(model, one):
    for p, q in zip(model.parameters(), one.parameters(), strict=True):
        whole = p.full_tensor() if isinstance(p, DTensor) else p
        torch.testing.assert_close(whole.detach(), q.detach(), rtol=1e-5, atol=2e-6)


MODES = {
    "plain": dict(),
    "views of buckets": dict(gradient_as_bucket_view=True),
    "small buckets": dict(gradient_as_bucket_view=True, bucket_cap_mb=1e-4),
    "static graph": dict(static_graph=True),
    "unused": dict(find_unused_parameters=True),
}


def ddp(rank):
    x, y = (t[:, rank] for t in batches())
    for make in OPTIMIZERS.values():
        for options in MODES.values():
            for set_to_none in (True, False):
                model = DistributedDataParallel(network(), **options)
                optimizer = make(model.parameters())
                for each in zip(x, y, strict=True):
                    loss_of(model, *each).backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none)
                assert_same(model.module, of_one_process(make)[0])
        # Gradients that are summed over three batches without a message.
        model = DistributedDataParallel(network(), gradient_as_bucket_view=True)
        optimizer = make(model.parameters())
        for n, each in enumerate(zip(x, y, strict=True)):
            last = n % 3 == 2
            with contextlib.nullcontext() if last else model.no_sync():
                (loss_of(model, *each) / 3).backward()
            if last:
                optimizer.step()
                optimizer.zero_grad()
        assert_same(model.module, of_one_process(make, 3)[0])


def uneven(rank):
    """Rank 1 has one batch less. What rank 0 does alone counts half, as join() has it."""
    model = DistributedDataParallel(network())
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    one = network()
    single = OPTIMIZERS["SGD"](one.parameters())
    x, y = batches()
    with model.join():
        for each in list(zip(x[:, rank], y[:, rank], strict=True))[: STEPS - rank]:
            optimizer.zero_grad()
            loss_of(model, *each).backward()
            optimizer.step()
    for n in range(STEPS):
        single.zero_grad()
        parts = range(1 if n == STEPS - 1 else 2)
        (sum(loss_of(one, x[n, r], y[n, r]) for r in parts) / 2).backward()
        single.step()
    if rank == 0:
        assert_same(model.module, one)


def zero(rank):
    """The state of the optimiser is split over the ranks, with uneven inputs too."""
    x, y = (t[:, rank] for t in batches())
    model = DistributedDataParallel(network())
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), fr.optim.SGD, lr=0.1, momentum=0.9, l1=0.01, weight_decay=0.1
    )

    def make(params):
        return fr.optim.SGD(params, lr=0.1, momentum=0.9, l1=0.01, weight_decay=0.1)

    with Join([model, optimizer]):
        for each in zip(x, y, strict=True):
            optimizer.zero_grad()
            loss_of(model, *each).backward()
            optimizer.step()
    one, single = of_one_process(make)
    assert_same(model.module, one)
    optimizer.consolidate_state_dict(to=0)
    if rank == 0:
        again = make(model.module.parameters())
        again.load_state_dict(optimizer.state_dict())
        for p, q in zip(model.module.parameters(), one.parameters(), strict=True):
            torch.testing.assert_close(again.state[p]["momentum_buffer"], single.state[q]["momentum_buffer"])


def sharded(model):
    """FSDP2, layer by layer."""
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    return model


def compiled(rank):
    """torch.compile outside of what gathers the gradients, inside of it, and of the step of shards."""
    x, y = (t[:, rank] for t in batches())
    for make in OPTIMIZERS.values():
        for wrapped in (
            lambda m: torch.compile(DistributedDataParallel(m), backend="aot_eager"),
            lambda m: DistributedDataParallel(torch.compile(m, backend="aot_eager")),
            sharded,
        ):
            torch._dynamo.reset()
            network_ = network()
            model = wrapped(network_)
            optimizer = make(model.parameters())
            step = optimizer.step
            if wrapped is sharded:
                step = torch.compile(step, backend="aot_eager")
            for each in zip(x, y, strict=True):
                optimizer.zero_grad()
                loss_of(model, *each).backward()
                step()
            assert_same(network_, of_one_process(make)[0])
    torch._dynamo.reset()


def scaled(rank):
    """An overflow on one rank skips the step on all, the first step and a later one, and halves the scale."""
    x, y = batches()
    for make, wrap in itertools.product(OPTIMIZERS.values(), (DistributedDataParallel, sharded)):
        one = network()
        several = wrap(network())
        optimizers = make(one.parameters()), make(several.parameters())
        scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
        for n in range(STEPS):
            factor = torch.inf if n in (0, 3) else 1.0
            losses = (
                factor * loss_of(one, x[n], y[n]),
                (factor if rank else 1.0) * loss_of(several, x[n, rank], y[n, rank]),
            )
            for loss, optimizer, scaler in zip(losses, optimizers, scalers, strict=True):
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale() == 256
        assert_same(several, one)


def parallel_loss(rank):
    """Inside torch's loss_parallel(), ours by either name is right also where torch's refuses to smooth."""
    mesh = init_device_mesh("cpu", (2,))
    x, y = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    for options in (dict(), dict(label_smoothing=0.1), dict(label_smoothing=0.1, reduction="sum")):
        whole = x.clone().requires_grad_()
        want = F.cross_entropy(whole, y, **options)
        want.backward()
        for name in (fr, F):
            part = distribute_tensor(x, mesh, [Shard(1)]).requires_grad_()
            with loss_parallel(), fr.patched():
                loss = name.cross_entropy(part, y, **options)
                loss.backward()
            torch.testing.assert_close(loss.full_tensor(), want)
            torch.testing.assert_close(part.grad.full_tensor(), whole.grad)


def on_rank(rank):
    for check in (ddp, uneven, zero, compiled, scaled, parallel_loss):
        check(rank)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_as_one_process():
    on_ranks(2, on_rank)


def as_torchrun(rank, port):
    """What torchrun tells a process of itself."""
    told = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=2, RANK=rank, LOCAL_RANK=rank)
    told |= dict(LOCAL_WORLD_SIZE=2, GROUP_RANK=0, TORCHELASTIC_RUN_ID="test", ACCELERATE_USE_CPU="true")
    os.environ.update({name: str(value) for name, value in told.items()})


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def with_accelerate(rank, port):
    """accelerate starts the group itself, as under `torchrun`."""
    as_torchrun(rank, port)
    from accelerate import Accelerator
    from torch.utils.data import DataLoader, TensorDataset

    x, y = batches()
    for make in OPTIMIZERS.values():
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = network()
        loader = DataLoader(TensorDataset(x.reshape(-1, 5), y.reshape(-1)), ROWS)
        model, optimizer, loader = accelerator.prepare(model, make(model.parameters()), loader)
        assert accelerator.num_processes == 2
        for each in loader:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, *each))
                optimizer.step()
                optimizer.zero_grad()
        assert_same(accelerator.unwrap_model(model), of_one_process(make, 2)[0])


def with_transformers(rank, port, folder):
    """Trainer under torchrun with our loss, optimiser and stopper."""
    as_torchrun(rank, port)
    import transformers

    from fastreg.integrations.transformers import EarlyStopping, loss, optimizer

    x, y = batches()
    samples = [{"x": a, "labels": b} for a, b in zip(x.reshape(-1, 5), y.reshape(-1), strict=True)]

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network()

        def forward(self, x, labels=None):
            return {"logits": self.network(x)}

    arguments = transformers.TrainingArguments(
        output_dir=folder, use_cpu=True, ddp_backend="gloo", report_to="none", disable_tqdm=True,
        logging_strategy="no", save_strategy="no", eval_strategy="epoch", num_train_epochs=2,
        per_device_train_batch_size=ROWS, learning_rate=0.05, lr_scheduler_type="constant", max_grad_norm=0,
    )  # fmt: skip
    assert arguments.world_size == 2
    model, stop = Wrapped(), EarlyStopping("eval_loss", patience=3)
    trainer = transformers.Trainer(
        model, arguments, train_dataset=samples, eval_dataset=samples, callbacks=[stop],
        compute_loss_func=loss(shift=False, label_smoothing=0.1),
        optimizer_cls_and_kwargs=optimizer(arguments, l1=0.01),
    )  # fmt: skip
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(samples)
    trainer.train()
    assert stop.stopper.epoch == 2 and stop.stopper.best_epoch == 1

    one = network()
    groups = [{"params": [one[0].weight, one[2].weight]}, {"params": [one[0].bias, one[2].bias], "l1": 0.0}]
    single = fr.optim.AdamW(groups, lr=0.05, weight_decay=0.0, l1=0.01)
    for _ in range(2):
        for each in zip(x, y, strict=True):
            single.zero_grad()
            loss_of(one, *each).backward()
            single.step()
    assert_same(model.network, one)


def with_lightning(rank, port, strategy):
    """Trainer under torchrun with our loss, optimiser and stopper, by DDP and by FSDP2."""
    as_torchrun(rank, port)
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader, TensorDataset

    from fastreg.integrations.lightning import EarlyStopping

    x, y = batches()
    scores = (5.0, 1.0, 3.0, 4.0, 6.0)

    class Module(pl.LightningModule):
        def __init__(self, make):
            super().__init__()
            self.network, self.configure_optimizers = network(), lambda: make(self.parameters())

        def configure_model(self):
            if strategy == "fsdp" and not isinstance(self.network[0].weight, DTensor):
                sharded(self.network)

        def training_step(self, batch, index):
            return loss_of(self.network, *batch)

        def validation_step(self, batch, index):
            self.log("val_loss", scores[self.current_epoch] + rank - 0.5)

    for make in OPTIMIZERS.values():
        loader = DataLoader(TensorDataset(x[:, rank].reshape(-1, 5), y[:, rank].reshape(-1)), ROWS)
        module, stop = Module(make), EarlyStopping("val_loss", patience=2)
        how = "ddp"
        if strategy == "fsdp":
            how = pl.strategies.ModelParallelStrategy(process_group_backend="gloo")
        trainer = pl.Trainer(
            max_epochs=5, accelerator="cpu", devices=2, strategy=how, callbacks=[stop], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            num_sanity_val_steps=0, use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(module, loader, loader)
        assert (trainer.current_epoch, stop.stopper.best_epoch, stop.stopper.best) == (4, 1, 1.0)
        one = network()
        single = make(one.parameters())
        for _ in range(2):  # up to the best epoch
            for each in zip(x, y, strict=True):
                single.zero_grad()
                loss_of(one, *each).backward()
                single.step()
        assert_same(module.network, one)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("trainer", ["accelerate", "transformers", "lightning ddp", "lightning fsdp"])
def test_trainers(trainer, tmp_path):
    name, *strategy = trainer.split()
    pytest.importorskip(name, reason=HINT)
    pytest.importorskip("accelerate", reason=HINT)
    if strategy:
        on_ranks(2, with_lightning, free_port(), *strategy, group=False)
    elif trainer == "accelerate":
        on_ranks(2, with_accelerate, free_port(), group=False)
    else:
        on_ranks(2, with_transformers, free_port(), str(tmp_path), group=False)
