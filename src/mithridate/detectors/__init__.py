"""Detectors, one file each: a score a sample, lower for the more suspicious."""

from mithridate.detectors.discrepancy import Discrepancy as Discrepancy
from mithridate.detectors.gda import GDA as GDA
from mithridate.detectors.gmm import GMM as GMM
from mithridate.detectors.kd import KernelDensity as KernelDensity
from mithridate.detectors.lid import LID as LID
from mithridate.detectors.loss import Loss as Loss
