"""Whether something listens to operators that only torch's own operators know how to answer."""

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether a transform of torch.func or a forward-mode derivative is active.

    The operators of fastreg have no batching rules and no forward-mode derivatives, so there an op has to be
    made of torch's operators.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
