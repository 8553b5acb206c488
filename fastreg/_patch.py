"""fastreg for code that knows only torch: in a `with` block, in the whole process, or in one model.

Patched are `dropout`, `dropout1d`, `dropout2d`, `dropout3d`, `alpha_dropout`, `feature_alpha_dropout`,
`cross_entropy`, `linear_cross_entropy` and, where it drops anything, `scaled_dot_product_attention` of
torch.nn.functional. torch's modules (nn.Dropout, nn.CrossEntropyLoss, nn.TransformerEncoderLayer,
nn.MultiheadAttention) call these functions and so change with them. The dropout in torch's RNN kernels stays
torch's.

How torch's functions are exchanged stands in _exchange.py.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import inspect
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch.compiler import is_compiling
from torch.overrides import has_torch_function, has_torch_function_unary, has_torch_function_variadic

from . import nn
from ._attention import scaled_dot_product_attention
from ._checks import DTYPES, check_choice, or_torchs
from ._cross_entropy import cross_entropy, is_torchs
from ._dropout import dropout
from ._dropout_family import alpha_dropout, dropout1d, dropout2d, dropout3d, feature_alpha_dropout
from ._exchange import ExchangedCode, ExchangedName
from ._linear_cross_entropy import linear_cross_entropy
from ._losses_of_timm import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from ._recomputation import Drawn
from ._registry import cuda, fast
from ._transforms import autocast_dtype, is_sharded, is_transformed

# Whose dropout a program has that is compiled for a GPU while torch is patched.
Compiled = Literal["torch", "ours"]

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_patched = False
_compiled: Compiled = "torch"


def _has_kernel(tensor: Any) -> bool:
    return (
        (type(tensor) in _PLAIN or _is_placed(tensor))
        and (tensor.is_cpu or (tensor.is_cuda and cuda is not None))
        and tensor.dtype in DTYPES
        and tensor.layout == torch.strided
        and not tensor.is_nested
    )


def _is_placed(tensor: Any) -> bool:
    """Whether it is a DTensor whose ranks hold all of it or parts of it, and not summands. Of others torch's
    dropout draws another mask on each rank, or the same for each part.
    """
    return is_sharded(tensor) and not any(placement.is_partial() for placement in tensor.placements)


def _is_replaced() -> bool:
    # Under transforms the operators have no rules, a jit trace would record them without a derivative, and an
    # exported program may run where fastreg is not. Code that was compiled while patched is compiled anew
    # when `_patched` changes.
    return _patched and not is_transformed()


# A mode, a subclass of Tensor and a Proxy of torch.fx are asked first, and by torch's own function. Then
# comes the usual case: what `fast` takes meets all the conditions that follow.


def _instead_of(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """What one of torch's functions for dropout does while it is patched."""
    usual = fast.dropout if fast is not None and ours is dropout else None

    def run_dropout(input, p, training, inplace):
        if has_torch_function_unary(input):
            return original(input, p, training, inplace)
        if usual is not None and not is_compiling():
            try:
                output = usual(input, p, training, inplace)
            except ValueError:  # what it refuses, ours refuses below with torch's type
                output = None
            if output is not None:
                return output
        if (
            _has_kernel(input)
            and isinstance(p, (float, int))
            and _is_replaced()
            and not (is_compiling() and _is_left_to_compiler(input))
        ):
            if is_compiling():
                return ours(input, p, training, inplace)
            try:
                return ours(input, p, training, inplace)
            except (TypeError, ValueError) as error:
                refusal = error
            return or_torchs(refusal, original, input, p, training, inplace)
        return original(input, p, training, inplace)

    return run_dropout


def _instead_of_cross_entropy(original: Callable[..., Any]) -> Callable[..., Any]:
    """What torch's cross_entropy does while it is patched."""

    def run_cross_entropy(
        input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
    ):
        options = weight, size_average, ignore_index, reduce, reduction, label_smoothing
        if has_torch_function_variadic(input, target, weight):
            return original(input, target, *options)
        usual = weight is None or not is_torchs(input, target, weight)
        if usual and fast is not None and not is_compiling():
            try:
                loss = fast.cross_entropy(input, target, *options, "uniform", 0.0, "nan", None)
            except ValueError:  # what it refuses, ours refuses below with torch's type
                loss = None
            if loss is not None:
                return loss
        if (
            _has_kernel(input)
            and (type(target) in _PLAIN or _is_placed(target))
            and target.device == input.device
            and (weight is None or (_has_kernel(weight) and not weight.requires_grad))
            and not is_torchs(input, target, weight)
            and _is_replaced()
        ):
            if is_compiling():
                return cross_entropy(input, target, *options)
            try:
                return cross_entropy(input, target, *options)
            except (TypeError, ValueError) as error:
                refusal = error
            return or_torchs(refusal, original, input, target, *options)
        return original(input, target, *options)

    return run_cross_entropy


def _instead_of_linear_cross_entropy(original: Callable[..., Any]) -> Callable[..., Any]:
    """What torch's linear_cross_entropy, which it has from 2.14 on, does while it is patched."""

    def run_linear_cross_entropy(
        input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, options
    ):
        tensors = input, linear_weight, target
        named = dict(reduction=reduction, label_smoothing=label_smoothing)
        theirs = named | dict(
            linear_bias=linear_bias, weight=weight, ignore_index=ignore_index, options=options
        )
        if (
            has_torch_function_variadic(*tensors, linear_bias, weight)
            or not all(type(t) in _PLAIN for t in (*tensors, linear_bias, weight) if t is not None)
            or not all(_has_kernel(t) for t in (input, linear_weight, linear_bias, weight) if t is not None)
            or not _is_replaced()
            or not _takes_chunks_of_ours(input, options)
            or input.dim() not in (1, 2)
            or linear_weight.dim() != 2
            # torch knows probabilities by their shape, ours by their dtype.
            or (target.shape == (*input.shape[:-1], len(linear_weight))) != target.is_floating_point()
            or (target.is_floating_point() and ignore_index is not None)
            or is_torchs(input, target, weight)
            or any(t.requires_grad for t in (target, weight) if t is not None)
        ):
            return original(*tensors, **theirs)
        named |= dict(ignore_index=-100 if ignore_index is None else ignore_index, class_weight=weight)
        if is_compiling():
            return linear_cross_entropy(*tensors, linear_bias, **named)
        try:
            return linear_cross_entropy(*tensors, linear_bias, **named)
        except (TypeError, ValueError) as error:
            refusal = error
        return or_torchs(refusal, original, *tensors, **theirs)

    return run_linear_cross_entropy


def _takes_chunks_of_ours(input: torch.Tensor, options: Any) -> bool:
    """Whether torch's options for its own chunks leave their size and arithmetic open. Under autocast torch's
    chunks compute in another dtype than the two functions.
    """
    if options is None:
        return True
    if not dataclasses.is_dataclass(options):
        return False  # torch says what it takes
    chosen = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    left = {field.name: field.default for field in dataclasses.fields(options)}
    left["allow_retain_graph"] = chosen["allow_retain_graph"]  # ours always does
    return chosen == left and autocast_dtype(input.device.type) is None


def _is_left_to_compiler(input: torch.Tensor) -> bool:
    # Compiled for a GPU, torch's dropout becomes part of the kernels of its neighbours. That moves fewer
    # bytes than any kernel of its own.
    return _is_on_gpu(input) and _compiled == "torch"


def _is_on_gpu(input: torch.Tensor) -> bool:
    return input.is_cuda


# ---- attention


def _instead_of_attention(original: Callable[..., Any]) -> Callable[..., Any]:
    """What stands in the place of torch's scaled_dot_product_attention."""

    @functools.wraps(original)
    def run_attention(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
    ):
        options = dict(scale=scale, enable_gqa=enable_gqa)
        arguments = query, key, value, attn_mask, dropout_p, is_causal
        if (
            dropout_p
            and _patched  # a replacement that a partial or a graph keeps ends with the patch
            and _is_replaced()
            and not has_torch_function((query, key, value, attn_mask))
            and all(_has_kernel(t) and t.is_cpu for t in (query, key, value))
            and (
                attn_mask is None
                or ((type(attn_mask) in _PLAIN or _is_placed(attn_mask)) and attn_mask.is_cpu)
            )
        ):
            if is_compiling():
                return scaled_dot_product_attention(*arguments, **options)
            if torch.backends.cuda.math_sdp_enabled():  # the only one of torch's kernels that drops on a CPU
                for tell in _watchers:
                    tell(original.__name__, True)
                try:
                    return scaled_dot_product_attention(*arguments, **options)
                except (TypeError, ValueError) as error:
                    refusal = error
                return or_torchs(refusal, original, *arguments, **options)
        return original(*arguments, **options)

    return run_attention


_DROPOUT = "input", "p", "training", "inplace"
_CROSS_ENTROPY = (
    *("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction"),
    "label_smoothing",
)
_LINEAR_CROSS_ENTROPY = (
    *("input", "linear_weight", "target", "linear_bias", "weight", "reduction", "ignore_index"),
    *("label_smoothing", "options"),
)


def _has_linear_cross_entropy() -> bool:
    """Whether torch has it with the arguments that are known here: it is young, and may yet change."""
    function = getattr(F, "linear_cross_entropy", None)
    return function is not None and tuple(inspect.signature(function).parameters) == _LINEAR_CROSS_ENTROPY


# Held while functions are exchanged: of two threads that enter and leave blocks each finds a whole state.
_switching = threading.RLock()
_blocks = 0  # open `patched` blocks that began without a patch of the process


def _exchanged(ours: Callable[..., Any]) -> ExchangedCode:
    if ours is cross_entropy:
        return ExchangedCode(F.cross_entropy, _CROSS_ENTROPY, _instead_of_cross_entropy)
    if ours is linear_cross_entropy:
        return ExchangedCode(F.linear_cross_entropy, _LINEAR_CROSS_ENTROPY, _instead_of_linear_cross_entropy)
    function = getattr(F, ours.__name__)
    return ExchangedCode(function, _DROPOUT, lambda original: _instead_of(original, ours))


_FUNCTIONS = [
    _exchanged(ours)
    for ours in (
        *(dropout, dropout1d, dropout2d, dropout3d, alpha_dropout, feature_alpha_dropout),
        cross_entropy,
        *((linear_cross_entropy,) if _has_linear_cross_entropy() else ()),
    )
]
# What torch's functions do while they are not patched, by name.
_TORCH = types.SimpleNamespace(**{each.original.__name__: each.original for each in _FUNCTIONS})


class _Attention:
    """The replacement as an object that is no function, for torch's attention is none of Python's either: it
    does not become a method of a class that holds it, and a pickle of it is one of torch's.
    """

    def __init__(self, original: Callable[..., Any]) -> None:
        self._original, self._run = original, _instead_of_attention(original)
        functools.update_wrapper(self, original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def __repr__(self) -> str:
        return repr(self._original)

    def __deepcopy__(self, _: Any) -> _Attention:
        return self

    def __copy__(self) -> _Attention:
        return self

    def __reduce__(self) -> Any:
        return copy.copy, (self._original,)  # which gives a function itself


_our_attention = _Attention(F.scaled_dot_product_attention)
_ATTENTION = ExchangedName(F.scaled_dot_product_attention, _our_attention)
# torch.jit.script knows attention by its object, because it has no source in Python.
torch.jit._builtins._register_builtin(_our_attention, "aten::scaled_dot_product_attention")


def _tell_dynamo(patched: bool) -> None:
    """Let torch.compile see the replacements, which would be hidden by the three places in it that know
    torch's functions by name.

    Its table of functions that go into a graph unopened holds names and is read when it is first needed. A
    replacement found there under a name of torch.nn.functional would be traced with tensors for which fastreg
    has no kernel, and be cached as torch's. While the patch lasts, that entry therefore names torch's own
    function, wherever that is. Attention must be opened, so that its dropout is found. And an
    nn.CrossEntropyLoss that is made inside compiled code is never called.
    """
    # every torch.optim.Optimizer imports them too
    rules = importlib.import_module("torch._dynamo.trace_rules")
    classes = importlib.import_module("torch._dynamo.variables.user_defined").UserDefinedClassVariable
    for table in rules.torch_name_rule_map:
        for name in (*vars(_TORCH), "multi_head_attention_forward"):
            names = f"torch.nn.functional.{name}", f"{__name__}._TORCH#{name}"  # no such attribute: no rule
            old, new = names if patched else names[::-1]
            if old in table:
                table[new] = table.pop(old)
    rules.clear_lru_cache()
    if patched and hasattr(classes, "_call_cross_entropy_loss"):
        _dynamo_loss.append(classes._call_cross_entropy_loss)
        classes._call_cross_entropy_loss = _loss_in_dynamo
    elif not patched and _dynamo_loss:
        classes._call_cross_entropy_loss = _dynamo_loss.pop()


_dynamo_loss: list[Any] = []  # torch.compile's own method while it is exchanged


def _loss_in_dynamo(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    """Makes the nn.CrossEntropyLoss that compiled code asks for, on our function."""
    from torch._dynamo.variables.base import VariableTracker
    from torch._dynamo.variables.misc import LambdaVariable

    options = (
        dict(zip(list(inspect.signature(_TORCH.cross_entropy).parameters)[2:], args, strict=False)) | kwargs
    )
    function = VariableTracker.build(tx, F.cross_entropy)
    return LambdaVariable(lambda input, target: function.call_function(tx, [input, target], options))


def patch(*, compiled: Compiled | None = None) -> None:
    """Put fastreg's dropout and cross-entropy under torch.nn.functional, for the whole process, until
    `unpatch`.

    On a CPU, attention with dropout is `fastreg.scaled_dot_product_attention`, whose memory grows with the
    length and not with its square. On a GPU it stays torch's, and so does all dropout under torch.compile,
    which fuses it into the operations around it, unless `compiled` is "ours". `fastreg.dropout` by name is
    always ours.

    torch's functions keep their identity, so that whoever holds one, under any name, in a table or in a
    partial, calls the patched one. Attention is exchanged among the globals of every loaded module; where it
    is kept elsewhere it is not found.
    `linear_cross_entropy` and nn.LinearCrossEntropyLoss never hold their logits, also where classes are
    smoothed; options that set the size of torch's own chunks, or their arithmetic, are left to torch.
    DTensors get what the whole tensor would get, wherever its parts lie: one mask, one loss.

    Inputs for which fastreg has no kernel (other devices and dtypes, tensor subclasses, weights that require
    a gradient) and transforms (functorch, forward-mode derivatives, torch.jit) go to torch as before. Calling
    it twice does no harm.

    Args:
        compiled: what dropout is in a program that torch.compile makes for a GPU. "torch": the compiler's,
            which moves the fewest bytes. "ours": fastreg's operator, whose mask is that of eager code for the
            same seed, and the same when it is computed again (a checkpoint, a memory budget below 1); the
            compiler's had faults there. None leaves it as it is, "torch" at first.
    """
    global _compiled
    if compiled is not None:
        check_choice("patch", "compiled", compiled, get_args(Compiled))
        _compiled = compiled
    if not _patched:
        _switch(True)


def unpatch() -> None:
    """Undo `patch`: every function is torch's own again. Without a patch it does nothing."""
    global _compiled
    _compiled = "torch"
    if _patched:
        _switch(False)


@torch._disable_dynamo  # torch.compiler.disable would import the compiler here, which takes a second
def _switch(to: bool) -> None:
    global _patched
    with _switching:
        if to == _patched:  # another thread was first
            return
        _prepare()
        _tell_dynamo(to)
        _patched = to
        for function in _FUNCTIONS:
            function.exchange(to)
        _ATTENTION.exchange(to)


_watchers: list[Callable[[str, bool], None]] = []


def watch(tell: Callable[[str, bool], None] | None) -> None:
    """Let `tell(name, is_ours)` know of the calls of patched functions outside of compiled code: with True of
    each call, with False of each that is handed on to torch. None ends it.
    """
    for function in _FUNCTIONS:
        function.watch(tell)
    _watchers[:] = [] if tell is None else [tell]


class _AsItWas:
    """What a checkpoint runs: as patched and as converted as everything was at `then`, whenever it is called,
    and, `again`, with the seeds that its first pass drew from generators given by name.
    """

    def __init__(
        self, function: Callable[..., Any], then: tuple[bool, Compiled, int], again: bool = False
    ) -> None:
        self._function, self._then, self._again = function, then, again
        self.drawn = Drawn()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        again, self._again = self._again, True
        now = _state()
        with self.drawn.drawing(again):
            if self._then == now:
                return self._function(*args, **kwargs)
            _restore(*self._then)
            try:
                return self._function(*args, **kwargs)
            finally:
                _restore(*now)


_UNTOUCHED: tuple[bool, Compiled, int] = False, "torch", 0


def _state() -> tuple[bool, Compiled, int]:
    return _patched, _compiled, _conversions.in_force


def _restore(to: bool, compiled: Compiled, conversions: int) -> None:
    global _compiled
    _compiled = compiled
    if to != _patched:
        _switch(to)
    _conversions.go_to(conversions)


@functools.cache
def _prepare() -> None:
    """What is done once, before the first patch."""
    # Both keep the functions that they find at their first call, which must be torch's.
    torch.overrides.get_testing_overrides()
    torch.overrides.get_overridable_functions()


def _remember_in_checkpoints() -> None:
    """From now on torch.utils.checkpoint recomputes a forward pass as patched as it was, with its modules as
    converted as they were and with its seeds: everything else would draw another mask. What ran before was
    neither patched nor converted.
    """
    checkpoints = importlib.import_module("torch.utils.checkpoint")
    reentrant, frame = checkpoints.CheckpointFunction, checkpoints._CheckpointFrame
    if "recompute_fn" in vars(frame):  # this module is loaded again; what is there finds its new functions
        return
    forward, backward = reentrant.forward, reentrant.backward
    hook = checkpoints._checkpoint_hook  # the forward pass of a frame is whatever runs within this
    make, enter, leave = hook.__init__, hook.__enter__, hook.__exit__

    @functools.wraps(forward)
    def run_forward(ctx, run_function, *args):
        return forward(ctx, _AsItWas(run_function, _state()), *args)

    @functools.wraps(backward)
    def run_backward(ctx, *args):
        # A subclass may have a forward of its own, of which nothing is known.
        if ctx._forward_cls is reentrant and not isinstance(ctx.run_function, _AsItWas):
            ctx.run_function = _AsItWas(ctx.run_function, _UNTOUCHED, again=True)
        return backward(ctx, *args)

    reentrant.forward, reentrant.backward = staticmethod(run_forward), staticmethod(run_backward)
    frame.recompute_fn = _Recomputed()

    @functools.wraps(make)
    def make_hook(self, frame):
        self._fastreg_drawn = frame.recompute_fn.drawn
        make(self, frame)

    @functools.wraps(enter)
    def enter_hook(self):
        self._fastreg_drawn.begin(again=False)
        return enter(self)

    @functools.wraps(leave)
    def leave_hook(self, *args):
        if hasattr(self, "_fastreg_drawn"):  # not where the pass itself has imported fastreg
            self._fastreg_drawn.end()
        return leave(self, *args)

    hook.__init__, hook.__enter__, hook.__exit__ = make_hook, enter_hook, leave_hook


class _Recomputed:
    """The attribute `recompute_fn` of a checkpoint that is not reentrant."""

    def __get__(self, frame: Any, _: type) -> Any:
        function = vars(frame)["recompute_fn"]
        return function if isinstance(function, _AsItWas) else _AsItWas(function, _UNTOUCHED, again=True)

    def __set__(self, frame: Any, function: Callable[..., Any]) -> None:
        vars(frame)["recompute_fn"] = _AsItWas(function, _state(), again=True)


try:
    _remember_in_checkpoints()
except AttributeError as error:  # a later torch may have other names for its own
    warnings.warn(
        f"fastreg does not know the checkpoints of torch {torch.__version__} ({error}): where something is "
        f"patched or converted after their forward pass, the backward pass may draw other masks",
        stacklevel=2,
    )


class _Block(contextlib.ContextDecorator):
    """What `patched` gives: a block of code, or a decorator of functions, whose calls are such blocks."""

    def __init__(self, compiled: Compiled | None) -> None:
        self._asked_for = compiled
        self._entered: list[tuple[Compiled, bool]] = []

    def __call__(self, function: Any) -> Any:
        kinds = inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction
        if any(is_one(function) for is_one in kinds):
            raise TypeError(
                f"patched: expected a function that runs when it is called, got {function.__qualname__}, a "
                f"generator or coroutine, which runs later; put `with fastreg.patched():` into its body"
            )
        return super().__call__(function)

    def _recreate_cm(self) -> _Block:  # calls of one function may overlap
        return _Block(self._asked_for)

    def __enter__(self) -> None:
        if torch.compiler.is_dynamo_compiling():  # which cannot trace a lock
            self._enter()
        else:
            with _switching:
                self._enter()

    def __exit__(self, *_: object) -> None:
        if torch.compiler.is_dynamo_compiling():
            self._leave()
        else:
            with _switching:
                self._leave()

    def _enter(self) -> None:
        global _blocks
        state = _compiled, _patched and not _blocks
        patch(compiled=self._asked_for)
        self._entered.append(state)
        _blocks += not state[1]  # threads may leave their blocks in any order

    def _leave(self) -> None:
        global _blocks, _compiled
        _compiled, within = self._entered.pop()
        _blocks -= not within
        if not within and not _blocks:
            unpatch()


def patched(*, compiled: Compiled | None = None) -> _Block:
    """`patch` for a block of code; inside another patch it changes nothing but `compiled`, if that is given.

    >>> with fastreg.patched():
    ...     train(model)

    As a decorator it is a block around each call of a function.

    Raises:
        TypeError: it decorates a generator or a coroutine, which runs after the call that makes it.
    """
    return _Block(compiled)


_MODULES = {
    getattr(torch.nn, name): getattr(nn, name)
    for name in (
        "Dropout",
        "Dropout1d",
        "Dropout2d",
        "Dropout3d",
        "AlphaDropout",
        "FeatureAlphaDropout",
        "CrossEntropyLoss",
    )
}
# What they do; a program may have given a class of torch another forward, which convert leaves to it.
_FORWARDS = {kind: kind.forward for kind in _MODULES}
# What others call their modules, which are known without being imported.
_BY_NAME = {
    "timm.layers.drop.DropPath": nn.DropPath,
    "timm.loss.cross_entropy.LabelSmoothingCrossEntropy": LabelSmoothingCrossEntropy,
    "timm.loss.cross_entropy.SoftTargetCrossEntropy": SoftTargetCrossEntropy,
}


# What a module that `convert` lets keep its class has among its attributes.
_KEPT = "_fastreg_kept"


class _Kept:
    """That attribute. Where a copy or a pickle of the module comes to be, the class must ask for it, too."""

    def __reduce__(self) -> Any:
        return _let_classes_ask, ()


@functools.cache
def _asking(kind: type[torch.nn.Module]) -> ExchangedCode:
    """The forward of a class of torch's, which asks each module whether it is converted. Its identity stays
    as with all that is exchanged, and for all other modules so does what it does.
    """
    ours: Any = _MODULES[kind].forward
    arguments = ("self", "input", "target") if kind is torch.nn.CrossEntropyLoss else ("self", "input")

    def make(theirs: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: torch.nn.Module, *args: Any) -> Any:
            # Compiled code has no guard of what a dict has not; outside of it a missing attribute takes time.
            is_kept = hasattr(self, _KEPT) if is_compiling() else _KEPT in self.__dict__
            return (ours if is_kept else theirs)(self, *args)

        return forward

    return ExchangedCode(_FORWARDS[kind], arguments, make)


def _let_classes_ask() -> _Kept:
    """Let every class of torch's ask; for good, since nobody knows when the last such module goes."""
    for kind in _MODULES:
        asking = _asking(kind)
        if not asking.is_exchanged:
            asking.exchange(True)
            # No guard of compiled code looks at the code of a method.
            if "torch._dynamo" in sys.modules:
                torch.compiler.reset()
    return _Kept()


class _Conversion:
    """One module that was converted, and what it has to be again for a while.

    Args:
        module: as it is before.
        names: the attributes that a conversion sets or takes away.
        forget: called when the module is gone.
    """

    def __init__(
        self, module: torch.nn.Module, names: tuple[str, ...], forget: Callable[[Any], None]
    ) -> None:
        self._names, self._module = names, weakref.ref(module, forget)
        self._other = self._look(module)

    def _look(self, module: torch.nn.Module) -> tuple[type[torch.nn.Module], dict[str, Any]]:
        attributes = vars(module)
        return type(module), {name: attributes[name] for name in self._names if name in attributes}

    def swap(self) -> None:
        """Let the module be what it was, or what it has become."""
        module = self._module()
        if module is not None:
            kind, attributes = self._other
            self._other = self._look(module)
            for name in self._names:
                vars(module).pop(name, None)
            vars(module).update(attributes)
            _change_class(module, kind)


class _Conversions:
    """All conversions of modules that are alive, numbered from 1.

    Attributes:
        in_force: the number of the last one that holds now; a recomputation may undo the last ones for as
            long as it runs.
    """

    def __init__(self) -> None:
        self._all: dict[int, _Conversion] = {}
        self._last = self.in_force = 0

    def add(self, module: torch.nn.Module, *names: str) -> None:
        """`module` is about to be converted, which changes the attributes `names`."""
        # A model that converts what it calls may do so while it is recomputed, or compiled.
        if is_compiling() or self.in_force != self._last:
            return
        self._last = self.in_force = number = self._last + 1

        def forget(_: Any) -> None:
            self._all.pop(number, None)

        self._all[number] = _Conversion(module, names, forget)

    def go_to(self, number: int) -> None:
        """Let all up to this one hold, and no other."""
        if number == self.in_force:
            return
        with _switching:
            low, high = sorted((number, self.in_force))
            between = sorted(item for item in list(self._all.items()) if low < item[0] <= high)
            for _, conversion in between if number == high else reversed(between):
                conversion.swap()
            self.in_force = number


_conversions = _Conversions()


_Model = TypeVar("_Model", bound=torch.nn.Module)


def convert(model: _Model, *, keep_class: bool = False) -> _Model:
    """Exchange the dropout and cross-entropy modules of a model for fastreg's, in place.

    Modules keep their identity, name, mode, hooks and attributes; subclasses of torch's modules are left
    alone. Stochastic depth of timm (`DropPath`) and of torchvision (`StochasticDepth`, mode "row") becomes
    `fastreg.nn.DropPath`; timm's `LabelSmoothingCrossEntropy` and `SoftTargetCrossEntropy` run on
    `fastreg.cross_entropy`. docs/reach.md lists what is exchanged and what is not.

    Args:
        model: Module.
        keep_class: torch's modules keep their class, for libraries that look up the exact class of a module,
            as BackPACK and `torch.ao.quantization` do. What runs is the same: the class's `forward`, whose
            code is exchanged for good, asks each module whether it is converted. A pickle of the model needs
            fastreg either way. Modules of other libraries are left alone then, and so are modules that have
            been converted before.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is no Module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    check_choice("convert", "keep_class", keep_class, (False, True))
    for module in model.modules():
        kind = f"{type(module).__module__}.{type(module).__name__}"
        if type(module) in _MODULES:
            if type(module).forward is not _FORWARDS[type(module)]:
                continue
            _conversions.add(module, _KEPT)
            if keep_class:
                vars(module)[_KEPT] = _let_classes_ask()
            else:
                vars(module).pop(_KEPT, None)
                _change_class(module, _MODULES[type(module)])
        elif keep_class:
            continue
        elif kind in _BY_NAME:
            _conversions.add(module)
            _change_class(module, _BY_NAME[kind])
        elif kind == "torchvision.ops.stochastic_depth.StochasticDepth" and module.mode == "row":
            _conversions.add(module, "p", "_p")
            _change_class(module, nn.DropPath)
            vars(module)["_p"] = vars(module).pop("p")
    return model


def _change_class(module: torch.nn.Module, to: type[torch.nn.Module]) -> None:
    """Make `module` one of class `to`, also for code that torch.compile has already compiled.

    torch 2.10 guards compiled code by the version of the module's attributes, which another class does not
    change. Setting an attribute does.
    """
    module.__class__ = to
    attributes = vars(module)
    attributes["_fastreg_converted"] = True
    del attributes["_fastreg_converted"]
