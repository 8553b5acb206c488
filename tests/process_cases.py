"""What a program with threads, worker processes and an abrupt end does with the ops: run by
tests/test_processes.py in a process of its own, whose end belongs to the test.

It prints a line for each part that went well. Worker processes that are spawned import this file.
"""

import atexit
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor


def last():
    """Runs after what torch and fastreg do at the end, because it is registered before their import."""
    print("end", bool(WORK[0](1)), flush=True)


if __name__ == "__main__":
    atexit.register(last)

import torch  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

import fastreg as fr  # noqa: E402

LARGE = 40_003  # an op takes several threads for it
ROUNDS = 2


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def dropouts(i):
    x = numbers(LARGE, seed=i).requires_grad_()
    y = fr.dropout(x, 0.3, generator=generator(i))
    z = fr.dropout_add(y, x.detach(), 0.5, generator=generator(i + 1))
    z = fr.alpha_dropout(z, 0.2, True, generator=generator(i + 2))
    return [z.detach(), *torch.autograd.grad(z.square().sum(), x), fr.dropout_with_mask(x, 0.1, seed=i)[1]]


def losses(i):
    x, target = numbers(300, 101, seed=i).requires_grad_(), torch.arange(300) % 101
    loss = fr.cross_entropy(x, target, label_smoothing=0.1)
    w = numbers(50, 101, seed=i + 1).requires_grad_()
    linear = fr.linear_cross_entropy(x, w, target % 50, label_smoothing=0.1)
    return [loss.detach(), linear.detach(), *torch.autograd.grad(loss + linear, (x, w))]


def steps(i):
    p = torch.nn.Parameter(numbers(LARGE, seed=i))
    optimizer = fr.optim.SGD([p], lr=0.1, momentum=0.9, l1=0.01, weight_decay=0.01)
    for j in range(3):
        p.grad = numbers(LARGE, seed=i + j)
        optimizer.step()
    return [p.detach(), fr.fgsm_step(p.detach(), p.grad, 0.1, bounds=(0.0, 1.0))]


def pictures(i):
    augment = fr.augment.Augment(hflip=0.5, rotate=15, brightness=0.3, contrast=0.3, blur=(3, (0.1, 2.0)))
    return [augment(numbers(8, 3, 40, 40, seed=i).sigmoid(), generator=generator(i))]


def small_steps(i):
    """What C++ collects from the groups and the state, and an average."""
    p = [torch.nn.Parameter(numbers(7, 3, seed=i + j)) for j in range(5)]
    optimizer = fr.optim.AdamW(p, lr=0.1, weight_decay=0.1, ema=0.9, max_norm=1.0)
    for j in range(3):
        for k, parameter in enumerate(p):
            parameter.grad = numbers(7, 3, seed=i + j + k)
        optimizer.step()
    with optimizer.averaged():
        return [q.detach().clone() for q in p]


def heads(i):
    q, k, v = (numbers(2, 3, 70, 8, seed=i + j).requires_grad_() for j in range(3))
    y = fr.scaled_dot_product_attention(q, k, v, dropout_p=0.2, is_causal=True, generator=generator(i))
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (q, k, v))]


def policies(i):
    augment = fr.augment.Augment.trivial()
    x = (numbers(8, 3, 32, 32, seed=i) * 60 + 128).clamp(0, 255).to(torch.uint8)
    return [augment(x, generator=generator(i))]


WORK = (dropouts, losses, steps, small_steps, heads, pictures, policies)


class Worked(Dataset):
    """Its items are what the ops make of their index, in whatever process."""

    def __len__(self):
        return len(WORK)

    def __getitem__(self, i):
        return i, [t.numpy() for t in WORK[i](i)]


def equal(got, want):
    return len(got) == len(want) and all(
        torch.equal(torch.as_tensor(a), b) for a, b in zip(got, want, strict=True)
    )


def at_once():
    """All ops on many threads at once, each of which may start threads of its own: the bits of one alone."""
    jobs = [(work, i) for i in range(ROUNDS) for work in WORK]
    want = [work(i) for work, i in jobs]
    barrier = threading.Barrier(4)

    def run(part):
        barrier.wait()
        return [work(i) for work, i in jobs[part::4]]

    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(run, range(4)))
    for part, results in enumerate(parts):
        for got, expected, job in zip(results, want[part::4], jobs[part::4], strict=True):
            assert equal(got, expected), job
    print("threads")


def changed_while_it_steps():
    """One thread takes steps, another sets the rate, as a schedule of its own might: every step has one of
    the rates, and no number that is gone.
    """
    p = [torch.nn.Parameter(torch.zeros(3)) for _ in range(20)]
    optimizer = fr.optim.SGD(p, lr=1.0, momentum=0.0)
    stop = threading.Event()

    def schedule():
        rate = 1.0
        while not stop.is_set():
            rate = 3.0 - rate  # 1 and 2, a new number each time
            optimizer.param_groups[0]["lr"] = float(rate)

    for q in p:
        q.grad = torch.ones(3)
    thread = threading.Thread(target=schedule)
    thread.start()
    for _ in range(1000):
        before = p[0].detach().clone()
        optimizer.step()
        assert (before - p[0].detach() - 1).abs().min() < 1e-3 or (
            before - p[0].detach() - 2
        ).abs().min() < 1e-3
    stop.set()
    thread.join()
    print("schedule")


def in_workers(context, workers):
    want = [work(i) for i, work in enumerate(WORK)]
    loader = DataLoader(
        Worked(), batch_size=None, num_workers=workers, multiprocessing_context=context, timeout=100
    )
    for i, got in loader:
        assert equal(got, want[i]), (context, WORK[i])
    print(context)


KEPT = []  # alive until the interpreter is gone


def at_the_end():
    """Graphs, modules and an optimiser that nobody frees."""
    x = numbers(1000).requires_grad_()
    y = fr.dropout(x, 0.5)
    loss = fr.cross_entropy(y.view(10, 100), torch.zeros(10, dtype=torch.long))
    optimizer = fr.optim.SGD([x], lr=0.1, momentum=0.9)
    loss.backward(retain_graph=True)
    optimizer.step()
    seed = torch.tensor([3])
    KEPT.extend([x, y, loss, optimizer, seed, fr.nn.Dropout(0.5), iter(DataLoader(Worked(), num_workers=0))])
    sys.kept = KEPT


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of a fork beside threads, which is what is tried here
    torch.set_num_threads(2)
    at_once()
    changed_while_it_steps()
    in_workers("fork", 2)
    in_workers("spawn", 1)
    at_the_end()
