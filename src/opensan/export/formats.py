"""Write exported programs as files of each format and weight type."""

import warnings
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch.export import ExportedProgram

from opensan.choices import ExportDtype, ExportFormat
from opensan.errors import UserError
from opensan.export.traced import Graph
from opensan.segmenters.exported.runtimes import library

SMALL = 1024
"""Tensors of fewer numbers (norms, biases) keep float32, because they take little space."""

ANY_SIZE = 1 << 40


def check(format: str, dtype: str) -> None:
    """Raise UserError if the format and dtype can't be exported or a library is missing."""
    if format not in get_args(ExportFormat):
        raise UserError(f"format {format!r} is not one of {', '.join(get_args(ExportFormat))}")
    if dtype not in get_args(ExportDtype):
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(get_args(ExportDtype))}")
    if format == "torch" and dtype != "float32":
        raise UserError("format torch is written with float32 weights only")
    if format == "onnx" and dtype == "bfloat16":
        raise UserError(
            "onnxruntime has no bfloat16 on a CPU: choose float16 (same size, more exact) or format openvino"
        )
    if format != "torch":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            library(name, "onnx")
    if format == "openvino":
        library("openvino", "openvino")


def write(name: str, graph: Graph, folder: Path, format: str, dtype: str) -> Path:
    """Write one graph to `folder` and return its file. The label map's matrices are inputs, so they have no dtype."""
    program = graph.program()
    if format == "torch":
        path = folder / f"{name}.pt2"
        torch.export.save(program, path)
        return path
    path = folder / f"{name}.onnx"
    _write_onnx(program, graph, path)
    return convert(path, format, dtype)


def convert(path: Path, format: str, dtype: str) -> Path:
    """Convert a float32 .onnx in place to `format` and `dtype`; return the file."""
    if format == "onnx":
        if dtype == "int8":
            _quantize(path)
        if dtype in ("float16", "int8"):
            _store_halves(path)
        return path
    if dtype == "int8":
        _store_int8(path)
    return _to_openvino(path, halves=dtype != "float32")


def _write_onnx(program: ExportedProgram, graph: Graph, path: Path) -> None:
    from onnxscript.optimizer import fold_constants, remove_unused_nodes

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about torch's own code
        converted = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=list(graph.example),
            output_names=list(graph.outputs),
        )
        assert converted is not None  # as the exporter is dynamo's
        # Folding turns weights that a graph slices and transposes into matrices, which the steps below can shrink.
        fold_constants(
            converted.model, onnx_shape_inference=False, input_size_limit=ANY_SIZE, output_size_limit=ANY_SIZE
        )
        remove_unused_nodes(converted.model)
        converted.save(path)


def _store_halves(path: Path) -> None:
    """Store large weights as float16 and read them back as float32 at load: half the file, same arithmetic."""
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
    _put_first(model, casts)
    onnx.save(model, path)


def _quantize(path: Path) -> None:
    """Quantise matrices to int8 with a scale per output channel; activations are quantised at run time."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    model = onnx.load(path)
    add_pre_process_metadata(model)  # without it, quantize_dynamic warns on stderr, though constants are folded
    # Seven bits: sums of products of eight are cut off on processors without VNNI instructions.
    quantize_dynamic(
        model, path, per_channel=True, reduce_range=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"]
    )


def _store_int8(path: Path) -> None:
    """Store matrices as int8 with a scale per output channel; computation stays in floating point.

    `_quantize` does not serve for OpenVINO, which would undo it when it reads the file.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    matrices = {node.input[1] for node in model.graph.node if node.op_type == "MatMul"}
    scalings = []
    for tensor in list(model.graph.initializer):
        if tensor.name not in matrices or len(tensor.dims) != 2 or np.prod(tensor.dims) < SMALL:
            continue
        name, stored, scale = tensor.name, f"{tensor.name}.int8", f"{tensor.name}.scale"
        matrix = numpy_helper.to_array(tensor)
        steps = np.maximum(np.abs(matrix).max(axis=0), np.finfo(np.float32).tiny) / np.float32(127)
        tensor.CopyFrom(numpy_helper.from_array(np.round(matrix / steps).astype(np.int8), stored))
        model.graph.initializer.append(numpy_helper.from_array(steps, scale))
        scalings.append(onnx.helper.make_node("DequantizeLinear", [stored, scale], [name], axis=1))
    _put_first(model, scalings)
    onnx.save(model, path)


def _put_first(model, nodes) -> None:
    for index, node in enumerate(nodes):
        model.graph.node.insert(index, node)


def _to_openvino(path: Path, *, halves: bool) -> Path:
    """Convert to OpenVINO's files; `halves` stores floats as float16."""
    import openvino

    target = path.with_suffix(".xml")
    openvino.save_model(openvino.convert_model(path), target, compress_to_fp16=halves)
    path.unlink()
    return target
