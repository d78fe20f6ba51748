"""Attacks of a federation, one file each: what hostile clients send in place of honest updates."""

from mithridate.update_attacks.accumulative import AccumulativeUpdates as AccumulativeUpdates
from mithridate.update_attacks.alie import Alie as Alie
from mithridate.update_attacks.clean import CleanUpdates as CleanUpdates
from mithridate.update_attacks.direct import Direct as Direct
from mithridate.update_attacks.ipm import InnerProductManipulation as InnerProductManipulation
from mithridate.update_attacks.label_flip import LabelFlip as LabelFlip
from mithridate.update_attacks.min_max import MinMax as MinMax
from mithridate.update_attacks.noise import NoiseUpdates as NoiseUpdates
from mithridate.update_attacks.sign_flip import SignFlip as SignFlip
