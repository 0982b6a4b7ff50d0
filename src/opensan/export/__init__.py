"""Export a model as graphs for other runtimes: image, words, labels, text tower (see docs/export.md)."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from opensan.assemble.calibration import FILE_NAME as CALIBRATION_NAME
from opensan.assemble.calibration import Calibration
from opensan.config import CONFIG_NAME, EXPORT_NAME, TOKENIZER_NAME
from opensan.errors import UserError, writing
from opensan.export import formats
from opensan.export.check import Parity, parity
from opensan.export.traced import graphs
from opensan.files import flush_folder, temporary_path, write_text
from opensan.model import SAN
from opensan.model.identity import image_identity
from opensan.segmenters.exported.manifest import ExportManifest
from opensan.segmenters.exported.requirements import REQUIREMENTS_NAME, RUNTIME, requirements
from opensan.segmenters.exported.runtimes import Run, open_graph
from opensan.segmenters.exported.text import WORDS_NAME, EmbeddedWords
from opensan.text.encoder import TextEncoder
from opensan.vocabulary import Vocabulary

__all__ = ["Parity", "export"]


def export(
    model: SAN,
    folder: str | os.PathLike,
    *,
    format: str = "onnx",
    dtype: str = "float32",
    text: bool = True,
    words: Vocabulary | None = None,
    calibration: Calibration | None = None,
    progress: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> tuple[Path, Parity]:
    """Write `model` to a new `folder`, all or nothing, after checking that the files answer as the model does.

    Args:
        format: "onnx", "openvino", or "torch" (torch.export's .pt2).
        dtype: of the weights: "float32", "float16" (stored so, computed with in float32), "bfloat16" (OpenVINO only:
            stored as float16, the image graph computes in bfloat16 where the processor can), "int8".
        text: also write the text tower; without it, the folder answers `words` only.
        words: a vocabulary to embed now and store beside the graphs.
        calibration: of `model`, to store beside the graphs; a loaded folder uses it.
        progress: called before each step, with its name, how many steps are done, and how many there are.

    Returns:
        The folder, and the result of the check. If the check did not pass, no folder remains.

    Raises:
        ValueError: one line: an unknown format, a missing library, a folder that exists or can't be written.
    """
    formats.check(format, dtype)
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists already: choose another folder, or move it away")
    model = model.snapshot()
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(folder)
        temporary.mkdir()
    try:
        runs = {}
        traced = graphs(model, text=text)
        steps = len(traced) + 2  # words, check
        for done, (name, graph) in enumerate(traced.items()):
            progress(f"exporting {name}", done, steps)
            with writing(folder):
                path = formats.write(name, graph, temporary, format, dtype)
            runs[name] = _opened(path, narrow=name == "image" and dtype == "bfloat16")
        progress("embedding words", steps - 2, steps)
        with writing(folder):
            _describe(model, temporary, format, dtype, text, words, calibration)
        progress("checking", steps - 1, steps)
        result = parity(model, runs, dtype)
        del runs
        if result.passed:
            with writing(folder):
                flush_folder(temporary)
                temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder, result


def _opened(path: Path, *, narrow: bool) -> Run:
    if path.suffix != ".pt2":
        return open_graph(path, narrow=narrow)
    module = torch.export.load(path).module()

    def run(**inputs):
        outputs = module(*map(torch.from_numpy, inputs.values()))
        return [tensor.numpy() for tensor in (outputs if isinstance(outputs, tuple | list) else (outputs,))]

    return run


def _describe(
    model: SAN,
    folder: Path,
    format: str,
    dtype: str,
    text: bool,
    words: Vocabulary | None,
    calibration: Calibration | None = None,
) -> None:
    """Write the files that stand beside the graphs: manifest, configuration, tokens, words, calibration."""
    encoder = TextEncoder(model, disk_cache=False)
    tower, unseen = encoder.tower()
    suffix = "" if dtype == "float32" else f"-{dtype}"
    manifest = ExportManifest(
        format=cast(Any, format),  # checked by `formats.check`, and by the manifest again
        dtype=cast(Any, dtype),
        image=image_identity(model) + suffix,
        text=text,
        text_tower=f"{tower} {format} {dtype}",
        seen_tokens=None if unseen is None else tuple((~unseen).nonzero()[0].tolist()),
    )
    if words is not None:
        words = replace(words, tuned=None)  # the rows are kept by their prompts, which tuned words do not follow
        EmbeddedWords.of(words, encoder.rows(words), manifest.text_tower).save(folder / WORDS_NAME)
    if format in RUNTIME:
        own_tokenizer = model.config.clip.text.own_tokenizer
        write_text(folder / REQUIREMENTS_NAME, requirements(format, own_tokenizer=own_tokenizer))
    if calibration is not None:
        calibration.save(folder / CALIBRATION_NAME)
    if model.tokenizer is not None:
        (folder / TOKENIZER_NAME).write_bytes(model.tokenizer)
    write_text(folder / EXPORT_NAME, manifest.model_dump_json(indent=1) + "\n")
    write_text(folder / CONFIG_NAME, model.config.model_dump_json(indent=2) + "\n")
