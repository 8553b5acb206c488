"""What ranks tell each other before they decide together: one message of a fixed size, which names itself.

A gather of objects is two messages, and pairs silently with another one that some rank has reached instead.
Here every rank sends who it is and what must be the same on all, so that ranks that have come apart hear of
it, all in the same words.
"""

from __future__ import annotations

import datetime
import json
import time
import warnings
from typing import Any, NoReturn

import torch
import torch.distributed as dist

_SIZE = 2048  # bytes of a message
_PATIENCE = 5.0  # seconds in which ranks that have failed must say so to be heard
_LONG = 60.0  # seconds of waiting after which a rank says that it waits


def process_group(op: str, group: Any) -> Any:
    """A ProcessGroup for what a user gives as one: None is the default group, a DeviceMesh of one dimension
    has one.

    Raises:
        RuntimeError: there is no process group.
        ValueError: a mesh of several dimensions. TypeError: none of these.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            f"{op}: there must be a process group, got none; call torch.distributed.init_process_group()"
        )
    if group is None:
        group = dist.group.WORLD
    from torch.distributed.device_mesh import DeviceMesh  # torch itself does not import it

    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"{op}: group must be a mesh of one dimension, got {group.ndim}; give mesh['tp']"
            )
        group = group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{op}: expected a rank of group, got one outside; call it only on its ranks")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{op}: group must be a ProcessGroup that this rank is in, a DeviceMesh or None, got "
            f"{type(group).__name__}"
        )
    return group


def told_by_all(
    op: str, group: dist.ProcessGroup, same: dict[str, Any], own: dict[str, Any], remedy: str
) -> list[dict[str, Any]]:
    """What every rank says of itself, in the order of the ranks, in one message.

    Args:
        same: what must be equal on all ranks; numbers, strings, None and lists of them.
        own: what need not be. A text under "error" ends it on all ranks.
        remedy: the end of the sentence for ranks that have come apart.

    Raises:
        ValueError: on all ranks alike: they differ in `same`, one of them has an error, or one sent something
            else.
        RuntimeError: not all ranks have come: which ones, as far as the others can tell, and
            torch.distributed's error, which says why.
    """
    own = {name: _short(value) if isinstance(value, str) else value for name, value in own.items()}
    text = json.dumps({"op": f"fastreg.{op}", "same": same, "own": own}, default=str).encode()
    if len(text) > _SIZE:
        raise ValueError(f"{op}: what a rank says must fit into {_SIZE} bytes, got {len(text)}")
    sent = torch.zeros(_SIZE, dtype=torch.uint8, device="cpu")
    sent[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    sent = sent.to(_device_of(group))
    got = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    try:
        _wait(dist.all_gather(got, sent, group=group, async_op=True), op, group, remedy)
    except RuntimeError as error:
        raise RuntimeError(
            f"{op}: not all {len(got)} ranks of the group have called it, or one of them has ended"
            f"{_silent_ranks(group, op)} ({error}); {remedy}"
        ) from error
    said = []
    for rank, message in enumerate(got):
        try:
            told = json.loads(message.cpu().numpy().tobytes().rstrip(b"\0"))
            assert told["op"] == f"fastreg.{op}"
        except (ValueError, AssertionError, TypeError, KeyError):
            raise ValueError(f"{op}: rank {rank} of the group is at another call; {remedy}") from None
        said.append(told)
    for name in same:
        for rank, told in enumerate(said):
            first = said[0]["same"].get(name)
            if told["same"].get(name) != first:
                raise ValueError(
                    f"{op}: rank {rank} has {name} {told['same'].get(name)}, rank 0 has {first}; {remedy}"
                )
    for rank, told in enumerate(said):
        if told["own"].get("error"):
            raise ValueError(f"{op}: rank {rank} of the group cannot go on: {told['own']['error']}")
    return [told["own"] for told in said]


def _wait(work: dist.Work, op: str, group: dist.ProcessGroup, remedy: str) -> None:
    """Wait for a message, and warn if that takes long: the time-out of a group is half an hour, and whoever
    has called on one rank alone would see nothing until then. A wait of NCCL that ends early breaks it off.
    """
    if dist.get_backend(group) == "gloo":
        try:
            work.wait(datetime.timedelta(seconds=_LONG))
            return
        except RuntimeError:
            if work.is_completed():
                raise
        warnings.warn(
            f"{op}: rank {dist.get_rank(group)} of the group has waited {_LONG:g} s for others; {remedy}",
            stacklevel=4,
        )
    work.wait()


def _silent_ranks(group: dist.ProcessGroup, op: str) -> str:
    """Which ranks of a group do not say within some seconds that the call has failed on them, too; for a
    sentence. The store through which the ranks once found each other is asked: the group sends nothing more.
    """
    ranks = range(dist.get_world_size(group))
    silent = set(ranks)
    try:
        store = dist.distributed_c10d._get_default_store()
        keys = [f"fastreg.{op}/{group.group_name}/{rank}" for rank in ranks]
        store.set(keys[dist.get_rank(group)], "here")
        end = time.monotonic() + _PATIENCE
        while silent and time.monotonic() < end:
            silent = {rank for rank in silent if not store.check([keys[rank]])}
            time.sleep(0.05)
    except (RuntimeError, AttributeError):  # the rank that kept the store has ended
        return ""
    return f"; no word from rank {', '.join(map(str, sorted(silent)))}" if silent else ""


def raise_the_first(error: Exception | None, *groups: dist.ProcessGroup) -> NoReturn:
    """Raise the same error on all ranks of the groups, which all know that one of them has an error: that of
    the first rank that has one. Of several groups each rank is in one of a kind, as in the rows and columns
    of a mesh.
    """
    for group in groups:
        told: list[Exception | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(told, error, group=group)
        error = next((each for each in told if each is not None), None)
    assert error is not None
    raise error


def _short(text: str) -> str:
    """A text of which JSON makes at most 1,200 bytes."""
    return text.encode("ascii", "replace").decode()[:600]


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """Where the group's messages have to be."""
    if dist.get_backend(group) in ("nccl", "xccl", "hccl"):
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            return torch.device(accelerator.type, torch.accelerator.current_device_index())
    return torch.device("cpu")
