"""`StepMeter` by the path that configs name."""

from slicemod.training.common.step_meter import StepMeter

__all__ = ["StepMeter"]
