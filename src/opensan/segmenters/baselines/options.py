"""Options of the baselines; needs no torch."""

from typing import Annotated, ClassVar

from pydantic import Field

from opensan.config import Config, Ratio

Share = Annotated[float, Field(ge=0, le=1)]


class Options(Config):
    """Base of all methods' options."""

    published: ClassVar[dict[str, object]] = {}
    """The published value of an option that is given without one."""

    def chosen(self) -> list[str]:
        """Return the options that differ from the defaults, as they are written."""
        values = self.model_dump()
        return [
            name if value is True else f"{name}={value}"
            for name, field in type(self).model_fields.items()
            if (value := values[name]) != field.default
        ]


class DenseOptions(Options):
    """MaskCLIP (Zhou et al.)."""

    published: ClassVar[dict[str, object]] = {"denoise": 0.5, "smooth": 1.0}
    plain: bool = False
    """Leave out the last block's residual sum and its MLP, as later papers do."""
    denoise: Share | None = None
    """Prompt denoising: words that reach this probability nowhere in the image are dropped."""
    smooth: Share | None = None
    """Key smoothing: positions whose best word has a lower probability take a mean over all positions, weighted by
    the similarity of their keys."""
    scale: Ratio = 1.0
    """The CLIP image is the padded image times this factor."""


class TwoStageOptions(Options):
    """The two-stage baseline (SimSeg)."""

    trained: str | None = None
    """A file of words, or the name of a ready set: words that had masks in training. Others: none had."""
    weight: Share = 0.8
    """Exponent of the proposals' own probability for words that had masks, and of the crops' for all others."""
    side: Annotated[int, Field(gt=0, le=4_096)] | None = None
    """Side in pixels of a crop's picture; None: that of the images which CLIP was trained on."""


class MaskTokenOptions(Options):
    """MaskCLIP (Ding et al.)."""

    scale: Ratio | None = None
    """The CLIP image is the padded image times this factor; None: SAN's own, `clip_scale`."""
    relative: str | None = None
    """A .safetensors file with the weights of relative mask attention (`RelativeMaskAttention`); None: without it."""
