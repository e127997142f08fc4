"""Training on several machines, over ``torch.distributed``.

Every result has the same bits on any number of ranks: sums that cross ranks travel as integers
(``multiopt.exact``), or are added in the order of the ranks.
"""

from multiopt.distributed.checkpoints import load_sharded, save_sharded
from multiopt.distributed.norm import global_norm
from multiopt.distributed.replicas import Replicas

__all__ = ["Replicas", "global_norm", "load_sharded", "save_sharded"]
