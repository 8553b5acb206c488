"""The operator behind `fr.optim.SGD`: one step over lists of tensors, in place."""

import torch

from ._registry import define

# One call for all tensors of a group. momentum_started, one float32 flag per tensor that the op sets to 1, is
# only there with dampening, whose first step differs: a step skipped for an overflow is not the first, and
# only the op knows.
define(
    "sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] momentum_started, "
    "float lr, "
    "float momentum, float dampening, float weight_decay, float l1, bool nesterov, bool proximal, bool "
    "decoupled, "
    "bool maximize, Tensor? lr_tensor=None, Tensor? grad_scale=None, Tensor? found_inf=None, Tensor? "
    "seed=None) -> ()"
)


@torch.library.register_fake("fastreg::sgd_")
def _(params, grads, momentum_buffers, momentum_started, *args, **kwargs):
    return None


sgd_ = torch.ops.fastreg.sgd_.default
