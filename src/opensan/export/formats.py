"""Exported programs as files of each format and weight type."""

import warnings
from pathlib import Path

import numpy as np
import torch
from torch.export import ExportedProgram

from opensan.errors import UserError
from opensan.export.traced import Graph
from opensan.segmenters.exported.runtimes import library

FORMATS = ("onnx", "openvino", "torch")
DTYPES = ("float32", "float16", "bfloat16", "int8")

SMALL = 1024
"""Tensors of fewer numbers keep float32: norms and biases, which cost no space."""

ANY_SIZE = 1 << 40


def check(format: str, dtype: str) -> None:
    """Raises ValueError, one line, on what can't be exported, or when a library is missing."""
    if format not in FORMATS:
        raise UserError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if format == "torch" and dtype != "float32":
        raise UserError("format torch is written with float32 weights only")
    if format == "onnx" and dtype == "bfloat16":
        raise UserError(
            "onnxruntime computes nothing in bfloat16 on a CPU: take float16, as small and more exact, or openvino"
        )
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
    return convert(path, format, dtype)


def convert(path: Path, format: str, dtype: str) -> Path:
    """Turn a float32 .onnx into what is wanted, in its place; returns the file."""
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
        warnings.simplefilter("ignore")  # of torch's own innards
        converted = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=list(graph.example),
            output_names=list(graph.outputs),
        )
        # Weights that a graph slices and transposes become matrices: what is made smaller below is matrices.
        fold_constants(
            converted.model, onnx_shape_inference=False, input_size_limit=ANY_SIZE, output_size_limit=ANY_SIZE
        )
        remove_unused_nodes(converted.model)
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
    _put_first(model, casts)
    onnx.save(model, path)


def _quantize(path: Path) -> None:
    """Matrices as int8, each output channel with its own scale; activations are quantised as they come."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    model = onnx.load(path)
    add_pre_process_metadata(model)  # constants are folded: it would ask for that on stderr
    quantize_dynamic(model, path, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"])


def _store_int8(path: Path) -> None:
    """Matrices as int8, each output channel with its own scale; what is computed with are floats.

    OpenVINO would undo `_quantize` when it reads the file.
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
    for place, node in enumerate(nodes):
        model.graph.node.insert(place, node)


def _to_openvino(path: Path, *, halves: bool) -> Path:
    """`halves` stores floats as float16."""
    import openvino

    target = path.with_suffix(".xml")
    openvino.save_model(openvino.convert_model(path), target, compress_to_fp16=halves)
    path.unlink()
    return target
