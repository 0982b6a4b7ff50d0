"""Open exported graphs as functions on numpy arrays. Needs the format's own library, but not torch."""

import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np

from opensan.errors import UserError, install, reason

Run = Callable[..., list[np.ndarray]]
"""Function from inputs by name to the outputs in their order."""

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}
"""Format -> suffix of a graph's file."""


def open_graph(path: Path, *, threads: int = 0, narrow: bool = False, later: bool = False) -> Run:
    """Load an .onnx or an OpenVINO .xml. `threads` 0 leaves the number to the library.

    `narrow`: OpenVINO computes with bfloat16 where the processor can. `later`: load it at its first call, which then
    reports a damaged file.

    Raises UserError, one line, when the file is missing or damaged, or the library is not installed.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; an exported model is a whole folder")
    if later:
        return _Later(lambda: open_graph(path, threads=threads, narrow=narrow))
    return _open_onnx(path, threads) if path.suffix == ".onnx" else _open_openvino(path, threads, narrow)


class _Later:
    """A graph that is loaded when it is first run; threads may share it."""

    def __init__(self, load: Callable[[], Run]) -> None:
        self._load = load
        self._run: Run | None = None
        self._turn = threading.Lock()

    def __call__(self, **inputs: np.ndarray) -> list[np.ndarray]:
        with self._turn:
            if self._run is None:
                self._run = self._load()
        return self._run(**inputs)


def library(name: str, extra: str):
    """Import an optional library. Raises UserError, one line naming the extra, if it is not installed."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise UserError(f"this needs {name}: {install(extra)}") from None


def _open_onnx(path: Path, threads: int) -> Run:
    onnxruntime = library("onnxruntime", "onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only
    # Threads sleep while they have nothing to do: by default they wait in a loop, which takes half as much processor
    # time again of a first answer, and takes it from whatever else runs, such as reading the next images.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions have no common base
        raise UserError(f"{path}: not a graph that onnxruntime can run ({reason(error)})") from None
    return lambda **inputs: session.run(None, inputs)


def _open_openvino(path: Path, threads: int, narrow: bool) -> Run:
    openvino = library("openvino", "openvino")
    settings: dict[str, str | int] = {"INFERENCE_PRECISION_HINT": "bf16" if narrow else "f32"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    try:
        compiled = openvino.Core().compile_model(path, "CPU", settings)
    except RuntimeError as error:
        raise UserError(f"{path}: not a graph that OpenVINO can run ({reason(error)})") from None

    def run(**inputs: np.ndarray) -> list[np.ndarray]:
        # Each call has its own request, so threads may share the graph.
        outputs = compiled.create_infer_request().infer(inputs)
        return [np.array(outputs[output]) for output in compiled.outputs]

    return run
