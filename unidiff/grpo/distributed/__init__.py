"""Training on several processes: DDP, FSDP2 and DeepSpeed's ZeRO-2.

FSDP2 and ZeRO-2 shard the float32 weights, their gradients and the optimizer's state. Each process also holds all
weights for computing, in the dtype that the model was loaded in; they are gathered again after each update. Nothing is
exchanged in between: each process runs as many rollout passes as it needs, and gradients are reduced once, in the last
backward pass of an update, as without sharding.
"""

from unidiff.grpo.distributed.choose import check, weights_for
from unidiff.grpo.distributed.whole import Whole

__all__ = ["Whole", "check", "weights_for"]
