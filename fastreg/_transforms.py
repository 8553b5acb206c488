"""What surrounds a call and changes what its operators do: torch.func, forward mode, recording, autocast."""

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.jit import is_tracing
from torch.overrides import handle_torch_function


def is_transformed() -> bool:
    """Whether a transform of torch.func or a forward-mode derivative is active, or a graph is recorded for
    elsewhere.

    The operators of fastreg have no batching rules and no forward-mode derivatives, so there an op has to be
    made of torch's operators.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or is_recorded()


def is_recorded() -> bool:
    """Whether torch.export, torch.onnx.export or torch.jit.trace make a graph that will run where fastreg may
    not be, and in which an operator recorded by torch.jit has no derivative.
    """
    return is_exporting() or is_tracing()


_HAS_FLAG = hasattr(torch.compiler, "_is_exporting_flag")


def is_exporting() -> bool:
    """Whether torch.export makes a program that will run where fastreg may not be.

    Dynamo of torch 2.10 takes torch.compiler.is_exporting() to be true in all that it compiles. The flag
    behind it is read rightly.
    """
    return torch.compiler._is_exporting_flag if _HAS_FLAG else torch.compiler.is_exporting()


def is_foreign(*values: Any) -> bool:
    """Whether one is no tensor but knows torch's functions, as the Proxy of torch.fx does."""
    for value in values:
        known = value is None or isinstance(value, torch.Tensor)
        if not known and hasattr(type(value), "__torch_function__"):
            return True
    return False


def handed_over(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """What becomes of a call of `function` where an argument is foreign: for torch.fx a node of its graph.

    arguments: by name; others than those of the function are left out.
    """
    parameters = inspect.signature(function).parameters.values()
    args = [arguments[each.name] for each in parameters if each.kind is not each.KEYWORD_ONLY]
    kwargs = {each.name: arguments[each.name] for each in parameters if each.kind is each.KEYWORD_ONLY}
    foreign = [value for value in (*args, *kwargs.values()) if is_foreign(value)]
    return handle_torch_function(function, foreign, *args, **kwargs)


def as_node(module: torch.nn.Module, *arguments: Any) -> Any:
    """What the call of a module is in a graph of torch.fx: one node, as for the modules of torch.nn."""
    tracer: Any = next(value.tracer for value in arguments if isinstance(value, torch.fx.Proxy))
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, {})


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether this one stands for many tensors, or for a tensor and its derivative.

    A gradient may do so where no transform is active: in a backward pass with is_grads_batched.
    """
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def is_sharded_below(tensor: Any) -> bool:
    """Whether it is a DTensor, or one that transforms of torch.func have wrapped."""
    functorch = torch._C._functorch
    while isinstance(tensor, torch.Tensor) and functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return is_sharded(tensor)


def has_transformed_parts(*tensors: Any) -> bool:
    """Whether a transform of torch.func is active, or a tensor has a tangent, and one of these is a DTensor.
    What splits it into its parts and joins them knows no derivative but that of a backward pass.
    """
    if is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return any(map(is_sharded_below, tensors))
    return forward_ad._current_level >= 0 and any(
        is_sharded(tensor) and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def wants_derivative(tensor: torch.Tensor) -> bool:
    """Whether a derivative with respect to a tensor is asked for, backwards or forwards."""
    if tensor.requires_grad and torch.is_grad_enabled():
        return True
    if forward_ad._current_level < 0:
        return False
    functorch = torch._C._functorch
    while not is_compiling() and functorch.is_batchedtensor(tensor):  # of which torch knows no tangent
        tensor = functorch.get_unwrapped(tensor)
    return forward_ad.unpack_dual(tensor).tangent is not None


def is_hidden() -> bool:
    """Whether values cannot be looked at, because torch.compile traces, torch.func.vmap computes many at
    once, or FakeTensorMode computes none. torch.compile does not know what lists the transforms of
    torch.func, so that it is asked first.
    """
    if is_compiling() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return True
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in stack)


def may_look(tensor: torch.Tensor) -> bool:
    """Whether its values may be read: on a GPU that would wait for it."""
    return tensor.device.type == "cpu" and not is_hidden()


def is_sharded(value: object) -> bool:
    """Whether it is a DTensor."""
    return type(value) is not torch.Tensor and hasattr(value, "device_mesh")


# Whether torch has autocast for a kind of device. It is asked here, because Dynamo of torch 2.10 cannot trace
# the question.
_AUTOCAST = {kind: torch.amp.is_autocast_available(kind) for kind in ("cpu", "cuda", "xpu", "mps", "meta")}


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast computes with on a device; None where it is off, or the device has none."""
    available = _AUTOCAST.get(device_type)
    if available is None:  # a device from outside of torch
        available = torch.amp.is_autocast_available(device_type)
    if available and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """A context in which operators on a device compute in the dtypes that they are given."""
    if autocast_dtype(device_type) is None:
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def with_own_code(wrapper: Any) -> Any:
    """What a decorator has made of a function, with code under the function's name: torch.compile counts its
    recompilations by code, which all that the decorator makes would share.
    """
    wrapper.__code__ = wrapper.__code__.replace(co_name=wrapper.__name__)
    return wrapper
