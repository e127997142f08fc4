"""The mathematics: one rule a file, each a frozen dataclass with a pure Array API update."""

from multiopt.rules.adabelief import AdaBelief
from multiopt.rules.adam import Adam
from multiopt.rules.adamax import Adamax
from multiopt.rules.adamw import AdamW
from multiopt.rules.clipped_adam import ClippedAdam
from multiopt.rules.nadam import NAdam
from multiopt.rules.radam import RAdam
from multiopt.rules.rule import Rule
from multiopt.rules.sgd import SGD

__all__ = [
    "SGD",
    "AdaBelief",
    "Adam",
    "AdamW",
    "Adamax",
    "ClippedAdam",
    "NAdam",
    "RAdam",
    "Rule",
]
