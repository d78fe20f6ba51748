"""Aggregators, one file a rule: a matrix of updates (client, parameter) in, one update (parameter,) out.

The rules are written here because the kept library that has them on torch tensors, ByzFL, requires torchvision,
matplotlib and seaborn, and builds many of them on (client, client, parameter) intermediates.
"""

from mithridate.aggregators.bucketing import Bucketing as Bucketing
from mithridate.aggregators.bulyan import Bulyan as Bulyan
from mithridate.aggregators.centered_clipping import CenteredClipping as CenteredClipping
from mithridate.aggregators.fltrust import FLTrust as FLTrust
from mithridate.aggregators.geometric_median import GeometricMedian as GeometricMedian
from mithridate.aggregators.krum import Krum as Krum
from mithridate.aggregators.mean import Mean as Mean
from mithridate.aggregators.median import Median as Median
from mithridate.aggregators.multi_krum import MultiKrum as MultiKrum
from mithridate.aggregators.nnm import NearestNeighbourMixing as NearestNeighbourMixing
from mithridate.aggregators.norm_bounding import NormBounding as NormBounding
from mithridate.aggregators.trimmed_mean import TrimmedMean as TrimmedMean
