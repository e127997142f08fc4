"""The mathematics: one rule a file, each a frozen dataclass with a pure Array API update."""

from multiopt.rules.adam import Adam
from multiopt.rules.adamw import AdamW
from multiopt.rules.clipped_adam import ClippedAdam
from multiopt.rules.dct_adam import DCTAdam
from multiopt.rules.rule import Rule
from multiopt.rules.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "ClippedAdam", "DCTAdam", "Rule"]
