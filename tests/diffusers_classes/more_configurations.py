"""Small configurations of model classes of diffusers that its own tests of models leave out."""

from __future__ import annotations

from functools import partial

import diffusers

from tests.diffusers_classes.configurations import Configuration
from tests.diffusers_classes.more.autoencoders import AUTOENCODERS
from tests.diffusers_classes.more.encoders import ENCODERS
from tests.diffusers_classes.more.transformers import TRANSFORMERS
from tests.diffusers_classes.more.unets import UNETS

# Classes that are not called by themselves, and where their attention is called instead.
PARTS = {
    **dict.fromkeys(
        (
            "FluxMultiControlNetModel",
            "HunyuanDiT2DMultiControlNetModel",
            "MultiAdapter",
            "MultiControlNetModel",
            "QwenImageMultiControlNetModel",
            "SD3MultiControlNetModel",
        ),
        "calls others of this table",
    ),
    "MotionAdapter": "its parts are called by UNetMotionModel",
    "ControlNetXSAdapter": "its parts are called by UNetControlNetXSModel",
}


def more_configurations() -> list[Configuration]:
    """Those of classes that this version of diffusers has."""
    return [
        Configuration(name, getattr(diffusers, name), partial(dict, arguments), inputs)
        for name, (arguments, inputs) in (UNETS | TRANSFORMERS | AUTOENCODERS | ENCODERS).items()
        if hasattr(diffusers, name)
    ]
