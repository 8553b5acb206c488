"""Parameter sharing: two places of a network that hold one and the same tensor, and go on doing so.

One parameter in several places is the constraint that these weights are equal. Its gradient is the sum over
the places; an optimiser steps it, and a penalty counts it, once (Goodfellow, Bengio, Courville 2016, section
7.9). A convolution is the same idea inside one layer: one small weight at every position.

Plain `b.weight = a.weight` does that, too, until something gives a module new parameters:
load_state_dict(assign=True), or to_empty of a model on the meta device, puts a tensor of its own into each
place. Here those two ways in are watched.
"""

import torch

# The two methods of a module through which torch replaces parameters; it has hooks around neither.
_REPLACING = ("_apply", "_load_from_state_dict")


class _Keeper:
    """Stands in one module for a method that may replace parameters: what was one tensor before the call is
    one after it.

    groups: lists of places (module, name of the parameter there), shared among the keepers of all modules
    concerned. Deep copies and pickles take the groups along, so that the copies' keepers watch the copies.
    """

    def __init__(self, module, method, groups):
        self.module, self.method, self.groups = module, method, groups

    def __call__(self, *args, **kwargs):
        before = [_tensors(group) for group in self.groups]
        result = getattr(type(self.module), self.method)(self.module, *args, **kwargs)
        for group, old in zip(self.groups, before, strict=True):
            if all(p is old[0] for p in old):  # not if someone has given a place a parameter of its own since
                new = next((p for p in _tensors(group) if p is not old[0]), old[0])
                _tie(group, new)
        return result


def _tensors(group):
    return [module._parameters.get(leaf) for module, leaf in group]


def _tie(group, parameter):
    for module, leaf in group:
        module._parameters[leaf] = parameter


def _groups(module):
    keeper = module.__dict__.get(_REPLACING[0])
    return keeper.groups if isinstance(keeper, _Keeper) else []


def _watch(module, groups):
    """Let the module's keepers watch these groups; none, and they are gone."""
    for method in _REPLACING:
        if groups:
            module.__dict__[method] = _Keeper(module, method, groups)
        elif isinstance(module.__dict__.get(method), _Keeper):
            del module.__dict__[method]


def share_parameters(*modules_or_names):
    """Make parameters of several modules one tensor that stays one.

    ::

        fr.share_parameters(first, second)  # modules: each parameter of `first` is that of `second`, too
        fr.share_parameters(model, "embedding.weight", "head.weight")  # names of parameters, or of submodules, of `model`

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
    for label, places in others:
        if places.keys() != first.keys():
            raise ValueError(
                f"{op}: expected the same parameters in both, got {sorted(first)} in {first_label}, "
                f"{sorted(places)} in {label}; "
                "share them by name, share_parameters(model, 'a.weight', 'b.weight')"
            )
        for name in first:
            _check_equal(
                op,
                first[name],
                places[name],
                *(f"{side}.{name}".rstrip(".") for side in (first_label, label)),
            )
    groups = [[side[name] for _, side in sides] for name in first]
    for group in groups:
        if len({(id(module), leaf) for module, leaf in group}) < len(group):
            raise ValueError(f"{op}: expected different parameters, got the same one twice; name each once")
    for group in groups:
        _join(group)


def _join(group):
    """Tie the places of a group, and of all that share with one of them, and watch them."""
    whole = [*group]
    for module, leaf in group:
        for other in _groups(module):
            if _has(other, module, leaf):
                held = module._parameters[leaf]
                whole += [
                    place for place in other if _tensors([place])[0] is held and not _has(whole, *place)
                ]
    _tie(whole, group[0][0]._parameters[group[0][1]])
    for module in {id(module): module for module, _ in whole}.values():
        rest = [g for g in _groups(module) if not any(_has(whole, *place) for place in g)]
        _watch(module, [*rest, whole])


def _has(group, module, leaf):
    return any(module is other and leaf == name for other, name in group)


def unshare_parameters(*modules_or_names):
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
            for group in [g for g in _groups(module) if _has(g, module, leaf)]:
                rest = [place for place in group if not (place[0] is module and place[1] == leaf)]
                shared = module._parameters[leaf]
                if any(p is shared for p in _tensors(rest)):
                    own = torch.nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
                    module._parameters[leaf] = own
                for owner in {id(m): m for m, _ in group}.values():
                    kept = [g for g in _groups(owner) if g is not group]
                    _watch(
                        owner, [*kept, rest] if len(rest) > 1 and any(m is owner for m, _ in rest) else kept
                    )


def _resolve(op, modules_or_names):
    """[(label, {name below it: (module, name there)})] of what is to be shared, one entry for each module or
    name.
    """
    root, *names = modules_or_names or (None,)
    if not isinstance(root, torch.nn.Module) or not (
        all(isinstance(n, str) for n in names) or all(isinstance(n, torch.nn.Module) for n in names)
    ):
        got = ", ".join(type(value).__name__ for value in modules_or_names)
        raise TypeError(
            f"{op}: expected modules, or one module and names of parameters or submodules, got ({got})"
        )
    if not names or isinstance(names[0], torch.nn.Module):
        chosen = [(type(module).__name__, module) for module in (root, *names)]
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


def _places(root):
    return {
        f"{name}.{leaf}".lstrip("."): (module, leaf)
        for name, module in root.named_modules(remove_duplicate=False)
        for leaf, p in module._parameters.items()
        if p is not None
    }


def _check_equal(op, first, second, first_name, second_name):
    a, b = (module._parameters[leaf] for module, leaf in (first, second))
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
