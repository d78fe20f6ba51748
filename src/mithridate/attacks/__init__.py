"""Attacks, one file each: what an adversary does to the batches of a stream."""

from mithridate.attacks.accumulative import Accumulative as Accumulative
from mithridate.attacks.clean import Clean as Clean
from mithridate.attacks.fgsm import FGSM as FGSM
from mithridate.attacks.gate_aware import GateAware as GateAware
from mithridate.attacks.gradient_inversion import GradientInversion as GradientInversion
from mithridate.attacks.label_flip import WrongLabels as WrongLabels
from mithridate.attacks.mim import MIM as MIM
from mithridate.attacks.noise import Noise as Noise
from mithridate.attacks.pgd import PGD as PGD
from mithridate.attacks.vanilla import Vanilla as Vanilla
from mithridate.attacks.worst_samples import WorstSamples as WorstSamples
