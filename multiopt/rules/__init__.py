"""The mathematics: one rule a file, each a frozen dataclass with a pure Array API update."""

from multiopt.rules.adafactor import Adafactor
from multiopt.rules.adam import Adam
from multiopt.rules.adamw import AdamW
from multiopt.rules.clipped_adam import ClippedAdam
from multiopt.rules.lamb import LAMB
from multiopt.rules.muon import Muon
from multiopt.rules.rule import Rule
from multiopt.rules.sgd import SGD

__all__ = ["LAMB", "SGD", "Adafactor", "Adam", "AdamW", "ClippedAdam", "Muon", "Rule"]
