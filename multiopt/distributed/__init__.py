"""Training on several machines, over ``torch.distributed``.

Every result has the same bits on any number of ranks: sums that cross ranks travel as integers
(``multiopt.exact``), or are added in the order of the ranks.
"""

from multiopt.distributed.checkpoints import load_sharded, save_sharded
from multiopt.distributed.replicas import Replicas

__all__ = ["Replicas", "load_sharded", "save_sharded"]
