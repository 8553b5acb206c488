"""A step of an optimiser for the interpreted GPU: structs of csrc/common/optimizer_math.h, and the tensors
of a step put into its memory. For tests/test_cuda_sgd.py and tests/test_cuda_adamw.py.
"""

import ctypes

import torch
from cuda_machine import Layout, dtype_number, interpreted, layout_of, seed_at, structure

PARAM, GRAD, AVERAGE, STATE = range(4)  # slots; an optimiser's own state begins at the last
SLOTS = 6

StepTensor = structure(
    "StepTensor",
    """int dtype
    slots data
    pointer counter
    float step
    pointer n_averaged
    unsigned draw
    int64 first, columns, row
    layouts layout""",
    slots=ctypes.c_void_p * SLOTS,
    float=ctypes.c_float,
    unsigned=ctypes.c_uint32,
    layouts=Layout * SLOTS,
)
StepArgs = structure(
    "StepArgs",
    """double lr, weight_decay, l1, ema, grad_factor, clip
    bool proximal, maximize, stochastic_rounding
    Seed seed
    bool lr_wide, ema_wide
    pointer lr_at, ema_at, grad_scale_at, found_inf_at, clip_at""",
)


def flat(tensors, flattens):
    """Layouts of tensors that fill their memory in the same order: they are walked as flat memory, as the
    glue does.
    """
    strides = {t.stride() for t in tensors}
    dense = all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors)
    layouts = [layout_of(t) for t in tensors]
    if len(strides) == 1 and dense and flattens:
        for layout in layouts:
            layout.contiguous = True
    return layouts


def step_args(machine, lr=0.1, weight_decay=0.0, l1=0.0, ema=0.0, proximal=False, maximize=False, seed=None,
              lr_tensor=None, ema_tensor=None, grad_scale=None, found_inf=None, clip=None):  # fmt: skip
    """The arguments that all optimisers have."""

    def at(tensor, name):
        return None if tensor is None else machine.put(tensor, name).at

    wide = [t is not None and t.dtype == torch.float64 for t in (lr_tensor, ema_tensor)]
    return StepArgs(
        lr, weight_decay, l1, ema, -1.0 if maximize else 1.0, 1.0, proximal, maximize, seed is not None,
        seed_at(machine, torch.tensor([seed or 0])), *wide, at(lr_tensor, "lr"), at(ema_tensor, "ema"),
        at(grad_scale, "grad_scale"), at(found_inf, "found_inf"), at(clip, "clip"),
    )  # fmt: skip


def run(op, launcher, lists, counters, n_averaged, args, *, seed=None, misaligned=0, step=0.0, places=None,
        **options):  # fmt: skip
    """Call a launcher. `lists` is {slot: tensors}, `args(machine)` gives its first argument.

    Gives ({slot: tensors}, counters, n_averaged) as the step leaves them, and the reports.
    """
    slots, counts = {}, {}
    names = {PARAM: "param", GRAD: "grad", AVERAGE: "average"}

    def arguments(machine):
        for slot, tensors in lists.items():
            name = names.get(slot, f"state{slot}")
            slots[slot] = [machine.put(t, name, misaligned, readonly=slot == GRAD) for t in tensors]
        for name, tensors in (("counter", counters), ("n_averaged", n_averaged)):
            counts[name] = [machine.put(t, name, readonly=False) for t in tensors]
        table = (StepTensor * len(lists[PARAM]))()
        for i, entry in enumerate(table):
            param = lists[PARAM][i]
            entry.dtype, entry.step = dtype_number(param.dtype), step
            place = places[i] if places else (i, 0, max(1, param.numel()), 0)
            entry.draw, entry.first, entry.columns, entry.row = place
            flattens = seed is None or param.is_contiguous()
            layouts = flat([tensors[i] for tensors in lists.values()], flattens)
            for slot, layout in zip(lists, layouts, strict=True):
                entry.data[slot], entry.layout[slot] = slots[slot][i].at, layout
            entry.counter = counts["counter"][i].at if counters else None
            entry.n_averaged = counts["n_averaged"][i].at if n_averaged else None
        return ctypes.byref(args(machine)), table, ctypes.c_size_t(len(table))

    reports = interpreted(op).call(launcher, arguments, **options)
    results = {slot: [s.result() for s in group] for slot, group in slots.items()}
    return results, *([s.result() for s in counts[name]] for name in ("counter", "n_averaged")), reports
