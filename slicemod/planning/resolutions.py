"""Which resolutions a model can be asked about."""

from collections.abc import Sequence

from slicemod.user_error import FieldError

HIGHEST_RESOLUTION = 2**14


def check_resolutions(resolutions: Sequence[int], step: int) -> None:
    """Raise for edges in pixels that are no multiples of `step`, or too large.

    Raises:
        FieldError: names the edge and the nearest one that will do.
    """
    for pixels in resolutions:
        if pixels < step or pixels % step or pixels > HIGHEST_RESOLUTION:
            nearest = min(max(1, round(pixels / step)) * step, HIGHEST_RESOLUTION)
            raise FieldError(
                f"resolution: expected multiples of {step} pixels, which this model halves down to whole latents, up "
                f"to {HIGHEST_RESOLUTION}; got {pixels}. Take {nearest}."
            )
