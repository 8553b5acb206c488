"""Parameter sharing: two places of a network that hold one and the same tensor, and go on doing so.

One parameter in several places is the constraint that these weights are equal. Its gradient is the sum over
the places; an optimiser steps it, and a penalty counts it, once (Goodfellow, Bengio, Courville 2016, section
7.9). A convolution is the same idea inside one layer: one small weight at every position.

Plain `b.weight = a.weight` shares a parameter too, until something gives a module new parameters:
load_state_dict(assign=True), or to_empty of a model on the meta device, puts a tensor of its own into each
place. Here the two methods through which this happens are watched.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

__all__ = ["share_parameters", "unshare_parameters"]

# Where a parameter stands: the module and the parameter's name there.
Place: TypeAlias = tuple[torch.nn.Module, str]

# The two methods of a module through which torch replaces parameters; it has hooks around neither.
_REPLACING = ("_apply", "_load_from_state_dict")


class _Keeper:
    """Stands in one module for a method that may replace parameters: what was one tensor before the call is
    one tensor after it.

    sharing: lists of places that share a parameter; the keepers of all modules concerned hold the same lists.
    Deep copies and pickles take the lists along, so that the keepers of a copy watch the copy.
    """

    def __init__(self, module: torch.nn.Module, method: str, sharing: list[list[Place]]) -> None:
        self.module, self.method, self.sharing = module, method, sharing

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = [_tensors(places) for places in self.sharing]
        result = getattr(type(self.module), self.method)(self.module, *args, **kwargs)
        for places, old in zip(self.sharing, before, strict=True):
            # Where someone has given a place a parameter of its own since, nothing is tied again.
            if all(p is old[0] for p in old):
                new = next((p for p in _tensors(places) if p is not old[0]), old[0])
                _tie(places, new)
        return result


def _tensors(places: list[Place]) -> list[torch.nn.Parameter | None]:
    return [module._parameters.get(leaf) for module, leaf in places]


def _tie(places: list[Place], parameter: torch.nn.Parameter | None) -> None:
    for module, leaf in places:
        module._parameters[leaf] = parameter


def _sharing(module: torch.nn.Module) -> list[list[Place]]:
    """The lists of places that the module's keepers watch."""
    keeper = module.__dict__.get(_REPLACING[0])
    return keeper.sharing if isinstance(keeper, _Keeper) else []


def _watch(module: torch.nn.Module, sharing: list[list[Place]]) -> None:
    """Let the module's keepers watch these lists of places; without any, the keepers are removed."""
    for method in _REPLACING:
        if sharing:
            module.__dict__[method] = _Keeper(module, method, sharing)
        elif isinstance(module.__dict__.get(method), _Keeper):
            del module.__dict__[method]


def share_parameters(*modules_or_names: torch.nn.Module | str) -> None:
    """Make parameters of several modules one tensor that stays one.

    ::

        fr.share_parameters(first, second)  # modules: each parameter of `first` is also that of `second`
        fr.share_parameters(model, "embedding.weight", "head.weight")  # parameters or submodules of `model`

    The values (and the gradient, if any) of the first named are kept, those of the others are dropped: share
    before an optimiser is made. The tensor has all its names in `state_dict`, where its memory is one; where
    a checkpoint has other values under each, the last one loaded holds. Buffers, such as BatchNorm's
    statistics, are not shared. Calls add up: a with b and b with c are all three.

    The sharing survives load_state_dict (`assign=True` included), to, half, to_empty and the like, of the
    whole model or a part; deepcopy and pickle (of a part: the modules it shares with come along);
    DistributedDataParallel, FSDP2 and `safetensors.torch.save_model`. `fastreg.optim.SGD`, `penalty_groups`
    and `penalty` count it once.

    Args:
        *modules_or_names: two or more modules; or one module and two or more names, of parameters or
            submodules below it, as in `named_parameters()` and `named_modules()`. Modules are shared
            parameter by parameter, by the names below them.

    Raises:
        ValueError: fewer than two, the same twice, an unknown name, modules without parameters or with other
            names of parameters; parameters that differ in shape, dtype, device or requires_grad, or are not
            initialised yet. Nothing is shared then.
        TypeError: neither modules nor a module and names.

    Source: Goodfellow, Bengio, Courville 2016, section 7.9; tied embeddings: Press and Wolf 2017.
    """
    op = "share_parameters"
    sides = _resolve(op, modules_or_names)
    if len(sides) < 2:
        raise ValueError(f"{op}: expected at least two modules or names to share, got {len(sides)}")
    (first_label, first), *others = sides
    for label, other in others:
        if other.keys() != first.keys():
            raise ValueError(
                f"{op}: expected the same parameters in both, got {sorted(first)} in {first_label}, "
                f"{sorted(other)} in {label}; "
                "share them by name, share_parameters(model, 'a.weight', 'b.weight')"
            )
        for name in first:
            _check_equal(
                op,
                first[name],
                other[name],
                *(f"{side}.{name}".rstrip(".") for side in (first_label, label)),
            )
    sharing = [[side[name] for _, side in sides] for name in first]
    for places in sharing:
        if len({(id(module), leaf) for module, leaf in places}) < len(places):
            raise ValueError(f"{op}: expected different parameters, got the same one twice; name each once")
    for places in sharing:
        _join(places)


def _join(places: list[Place]) -> None:
    """Tie these places, and all that share with one of them already, and watch them."""
    whole = [*places]
    for module, leaf in places:
        for other in _sharing(module):
            if _has(other, module, leaf):
                held = module._parameters[leaf]
                whole += [
                    place for place in other if _tensors([place])[0] is held and not _has(whole, *place)
                ]
    _tie(whole, _tensors(places)[0])
    for module in {id(module): module for module, _ in whole}.values():
        rest = [other for other in _sharing(module) if not any(_has(whole, *place) for place in other)]
        _watch(module, [*rest, whole])


def _has(places: list[Place], module: torch.nn.Module, leaf: str) -> bool:
    return any(module is other and leaf == name for other, name in places)


def unshare_parameters(*modules_or_names: torch.nn.Module | str) -> None:
    """End the sharing: give each place a parameter of its own, with the values it has now.

    Args:
        *modules_or_names: modules, all of whose parameters leave what they share; or one module and names
            below it. Where all places leave, the first named keeps the tensor.

    A parameter that is not shared through `share_parameters` is left alone. Make the optimiser anew.

    Raises:
        ValueError: an unknown name. TypeError: neither modules nor names.
    """
    sides = _resolve("unshare_parameters", modules_or_names)
    for _, places in reversed(sides):
        for module, leaf in reversed(places.values()):
            for shared in [one for one in _sharing(module) if _has(one, module, leaf)]:
                _leave(shared, module, leaf)


def _leave(shared: list[Place], module: torch.nn.Module, leaf: str) -> None:
    """Take one place out of those that share a parameter."""
    rest = [place for place in shared if not (place[0] is module and place[1] == leaf)]
    held = module._parameters[leaf]
    if held is not None and any(p is held for p in _tensors(rest)):
        own = torch.nn.Parameter(held.detach().clone(), requires_grad=held.requires_grad)
        module._parameters[leaf] = own
    for owner in {id(m): m for m, _ in shared}.values():
        kept = [other for other in _sharing(owner) if other is not shared]
        if len(rest) > 1 and any(m is owner for m, _ in rest):
            kept.append(rest)
        _watch(owner, kept)


def _resolve(op: str, modules_or_names: tuple[Any, ...]) -> list[tuple[str, dict[str, Place]]]:
    """[(label, {name below it: place})] of what is to be shared, one entry for each module or name."""
    root, *names = modules_or_names or (None,)
    if not isinstance(root, torch.nn.Module) or not (
        all(isinstance(n, str) for n in names) or all(isinstance(n, torch.nn.Module) for n in names)
    ):
        got = ", ".join(type(value).__name__ for value in modules_or_names)
        raise TypeError(
            f"{op}: expected modules, or one module and names of parameters or submodules, got ({got})"
        )
    if not names or isinstance(names[0], torch.nn.Module):
        chosen: list[tuple[str, Any]] = [(type(module).__name__, module) for module in (root, *names)]
    else:
        modules = dict(root.named_modules(remove_duplicate=False))
        chosen = []
        for name in names:
            parent, _, leaf = name.rpartition(".")
            if name and name in modules:
                chosen.append((name, modules[name]))
            elif parent in modules and modules[parent]._parameters.get(leaf) is not None:
                chosen.append((name, (modules[parent], leaf)))
            else:
                raise ValueError(
                    f"{op}: {type(root).__name__} has no parameter or submodule {name!r}; see its "
                    f"named_parameters()"
                )
    sides = []
    for label, what in chosen:
        places = {"": what} if isinstance(what, tuple) else _places(what)
        if not places and op == "share_parameters":
            raise ValueError(f"{op}: {label} has no parameters to share")
        sides.append((label, places))
    return sides


def _places(root: torch.nn.Module) -> dict[str, Place]:
    """Where the parameters below a module stand, by name."""
    return {
        f"{name}.{leaf}".lstrip("."): (module, leaf)
        for name, module in root.named_modules(remove_duplicate=False)
        for leaf, p in module._parameters.items()
        if p is not None
    }


def _check_equal(op: str, first: Place, second: Place, first_name: str, second_name: str) -> None:
    """Raise unless one parameter can stand at both places."""
    held: list[Any] = [module._parameters[leaf] for module, leaf in (first, second)]
    a, b = held
    for name, p in ((first_name, a), (second_name, b)):
        if torch.nn.parameter.is_lazy(p):
            raise ValueError(f"{op}: {name} has no shape yet; run the model once first")
    for what, remedy in (
        ("shape", "a transposed weight is used with torch.nn.functional.linear(x, weight.t())"),
        ("dtype", "convert one with .to()"),
        ("device", "move one with .to()"),
        ("requires_grad", "freeze both or neither with requires_grad_()"),
    ):
        left, right = (tuple(p.shape) if what == "shape" else getattr(p, what) for p in (a, b))
        if left != right:
            raise ValueError(
                f"{op}: expected one {what}, got {left} for {first_name} and {right} for {second_name}; "
                f"{remedy}"
            )
