"""The mathematics: one file per rule, and what rules share.

Each rule is a frozen dataclass of hyperparameters with a pure update, written against the Array API
(``rule``). Declarations of fields are in ``declared``, arithmetic that is equal everywhere in
``arithmetic``, exact sums in ``sums`` and ``means``, made of ``pieces``, weight decay in ``decay``,
and averages of parameters in ``average``.
"""

from multiopt.rules.adabelief import AdaBelief
from multiopt.rules.adadelta import Adadelta
from multiopt.rules.adafactor import Adafactor
from multiopt.rules.adagrad import Adagrad
from multiopt.rules.adagrad_rmsprop import AdagradRMSProp
from multiopt.rules.adam import Adam
from multiopt.rules.adamax import Adamax
from multiopt.rules.adamw import AdamW
from multiopt.rules.asgd import ASGD
from multiopt.rules.clipped_adam import ClippedAdam
from multiopt.rules.dct_adam import DCTAdam
from multiopt.rules.lamb import LAMB
from multiopt.rules.lion import Lion
from multiopt.rules.muon import Muon
from multiopt.rules.nadam import NAdam
from multiopt.rules.radam import RAdam
from multiopt.rules.rmsprop import RMSprop
from multiopt.rules.rprop import Rprop
from multiopt.rules.rule import Rule
from multiopt.rules.sgd import SGD

__all__ = [
    "ASGD",
    "LAMB",
    "SGD",
    "AdaBelief",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "AdagradRMSProp",
    "Adam",
    "AdamW",
    "Adamax",
    "ClippedAdam",
    "DCTAdam",
    "Lion",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "Rule",
]
