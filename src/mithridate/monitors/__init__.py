"""Monitors, one file each: what a service watches, and when it raises an alarm."""

from mithridate.monitors.accuracy_floor import AccuracyFloor as AccuracyFloor
from mithridate.monitors.loss_amplification import LossAmplification as LossAmplification
