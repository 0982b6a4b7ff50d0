"""Exported programs as files of each format and weight type."""

import warnings
from pathlib import Path

import numpy as np
import torch
from torch.export import ExportedProgram

from opensan.export.graphs import Graph
from opensan.runtime.graphs import library

FORMATS = ("onnx", "openvino", "torch")
DTYPES = ("float32", "float16", "int8")

SMALL = 1024
"""Tensors of fewer numbers keep float32: norms and biases, which cost no space."""


def check(format: str, dtype: str) -> None:
    """Raises ValueError, one line, on what can't be exported, or when a library is missing."""
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if format == "torch" and dtype != "float32":
        raise ValueError("format torch is written with float32 weights only")
    if format != "torch":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            library(name, "onnx")
    if format == "openvino":
        library("openvino", "openvino")


def write(name: str, graph: Graph, folder: Path, format: str, dtype: str) -> Path:
    """Write one graph to `folder`; returns its file. The matrices of the label map are inputs: they have no dtype."""
    program = graph.program()
    if format == "torch":
        path = folder / f"{name}.pt2"
        torch.export.save(program, path)
        return path
    path = folder / f"{name}.onnx"
    _write_onnx(program, graph, path)
    if dtype == "float16":
        _store_halves(path)
    if dtype == "int8":
        _quantize(path)
    return path if format == "onnx" else _to_openvino(path)


def _write_onnx(program: ExportedProgram, graph: Graph, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own innards
        converted = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=list(graph.example),
            output_names=list(graph.outputs),
        )
        converted.save(path)


def _store_halves(path: Path) -> None:
    """Store large weights as float16, read back to float32 when the graph is loaded: half the file, same arithmetic."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or np.prod(tensor.dims) < SMALL:
            continue
        name, stored = tensor.name, f"{tensor.name}.float16"
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), stored))
        casts.append(onnx.helper.make_node("Cast", [stored], [name], to=onnx.TensorProto.FLOAT))
    for place, cast in enumerate(casts):
        model.graph.node.insert(place, cast)
    onnx.save(model, path)


def _quantize(path: Path) -> None:
    """Matrices as int8, each output channel with its own scale; activations are quantised as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(path, path, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])


def _to_openvino(path: Path) -> Path:
    import openvino

    target = path.with_suffix(".xml")
    openvino.save_model(openvino.convert_model(path), target, compress_to_fp16=False)
    path.unlink()
    return target
