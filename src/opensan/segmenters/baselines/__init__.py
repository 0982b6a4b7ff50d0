"""Other methods on the same weights, to compare SAN with; they stand where a model does: "METHOD[,OPTION...]:MODEL".

    maskclip      dense CLIP without training (Zhou et al., ECCV 2022)
    two-stage     mask proposals, and a crop of each for CLIP (Xu et al., SimSeg, ECCV 2022)
    mask-tokens   mask proposals, and a class token for each in CLIP (Ding et al., MaskCLIP, ICML 2023)

Only the heads of the modules are imported here: torch, when a model is loaded.
"""

import re
from typing import NamedTuple

from opensan.config import parse_config
from opensan.segmenters.baselines.options import DenseOptions, MaskTokenOptions, Options, TwoStageOptions

METHODS: dict[str, type[Options]] = {
    "maskclip": DenseOptions,
    "two-stage": TwoStageOptions,
    "mask-tokens": MaskTokenOptions,
}
"""Name of a method -> its options."""

_SOURCE = re.compile(rf"(?P<method>{'|'.join(METHODS)})(?P<options>(?:,[^,:]*)*):(?P<model>.+)", re.DOTALL)


class Baseline(NamedTuple):
    """A method, its options, and the model whose weights it uses."""

    method: str
    options: Options
    model: str

    @property
    def name(self) -> str:
        """The method with the options that differ from the defaults; for people."""
        return ",".join([self.method, *self.options.chosen()])


def parse_baseline(source: str) -> Baseline | None:
    """Read "METHOD[,OPTION...]:MODEL"; None if `source` names no method. An option is a name, or name=value.

    Raises UserError, one line, for an unknown option or a value that does not fit.
    """
    match = _SOURCE.fullmatch(source)
    if match is None:
        return None
    method, given = match["method"], [part for part in match["options"].split(",") if part]
    kind = METHODS[method]
    settings: dict[str, object] = {}
    for option in given:
        name, equals, value = option.partition("=")
        settings[name] = value if equals else kind.published.get(name, True)
    return Baseline(method, parse_config(kind, settings, method), match["model"])
