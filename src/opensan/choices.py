"""The values that commands, functions and files let a user choose from, each listed here alone."""

from typing import Literal

Speed = Literal["exact", "fast", "fastest"]
"""Speed of the image half: as the benchmarks' protocol has it; faster, with nearly its labels; or the device's fastest
way, which changes more labels (docs/speed.md says how many)."""

Dtype = Literal["float32", "bfloat16"]
"""Precision of the image half's matrix products."""

ExportFormat = Literal["onnx", "openvino", "torch"]
"""Format of an exported model's graphs; "torch" is torch.export's .pt2 files."""

ExportDtype = Literal["float32", "float16", "bfloat16", "int8"]
"""Precision of an exported model's weights."""

AblationData = Literal["scenes", "photographs"]
"""Images that ablations are trained and tested on: drawn ones, or CamVid and LabelMeFacade."""

Objects = Literal["parts", "proposals"]
"""How objects of one word are told apart: by connected parts of its region, or by the model's proposals."""

Tuned = Literal["vectors", "context", "both"]
"""Parts of words that `opensan tune words` fits: a vector for each word, one offset for all words, or both."""

Engine = Literal["ray"]
"""Engine that spreads images over processes or machines."""

SearchBy = Literal["region", "area"]
"""How a search scores an image for a word: by its best region's probability, or by the mean score of its pixels."""

Adapt = Literal["each", "keep"]
"""Start of the adaptation to an image at test time: each image from the model's own weights, or from the weights of
the image before."""
