"""Defences, one file each: what stands between a batch and the model."""

from mithridate.core.registry import retire
from mithridate.defences.at import AT as AT
from mithridate.defences.bound_update import BoundUpdate as BoundUpdate
from mithridate.defences.chain import Chain as Chain
from mithridate.defences.clip import Clip as Clip
from mithridate.defences.dgc import DGC as DGC
from mithridate.defences.dsc import DSC as DSC
from mithridate.defences.ema import Ema as Ema
from mithridate.defences.fat import Fat as Fat
from mithridate.defences.filter import Filter as Filter
from mithridate.defences.gate import Gate as Gate
from mithridate.defences.mart import Mart as Mart
from mithridate.defences.median_bn import MedianBn as MedianBn
from mithridate.defences.mma import Mma as Mma
from mithridate.defences.none import Standard as Standard
from mithridate.defences.promote import Promote as Promote
from mithridate.defences.skip import Skip as Skip
from mithridate.defences.trades import Trades as Trades

retire(
    "defence",
    "robust",
    'a robust rule is a setting of the server now: write rule = {name = "median"} in [federated].',
)
