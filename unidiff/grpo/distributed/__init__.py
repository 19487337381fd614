"""Training on several processes: which ways work, and how each shares the weights out.

Under FSDP2 and DeepSpeed's ZeRO-2 the float32 weights, their gradients and the optimizer's state are shared out among
the processes. The weights that the model computes with are whole on each of them, in the dtype that it was loaded in,
and are put together again after each update. Nothing is exchanged in between: rollouts take as many passes as they need
on each process, and gradients meet once, in the last backward pass of an update, as without sharding.
"""

from unidiff.grpo.distributed.choose import check, weights_for
from unidiff.grpo.distributed.whole import Whole

__all__ = ["Whole", "check", "weights_for"]
