"""Static int8 quantisation of an ONNX file by ONNX Runtime."""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    qdq_loss_debug,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

Batches = Callable[[], Iterable[np.ndarray]]
"""A function that begins anew with batches of normalised images, float32 `[B, C, H, W]`."""


class _Reader(CalibrationDataReader):
    def __init__(self, batches: Iterable[np.ndarray]):
        self._batches: Iterator[np.ndarray] = iter(batches)

    def get_next(self):
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch}


def quantize(source: Path, target: Path, batches: Batches, notes: dict):
    """Write a network with int8 weights, one scale for each channel, and uint8 activations.

    The smallest and largest value of each activation come from the images. Weights take 7 of their
    8 bits, because processors without VNNI instructions add products of 8 bits in 16 and overflow.

    Args:
      source: a float32 network without BatchNorm, of `torch_ref.onnx_file`.
      notes: kept in the file beside those of the source, each value as JSON.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            target,
            _Reader(batches()),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    model = onnx.load(target)
    kept = {entry.key: entry.value for entry in onnx.load(source).metadata_props}
    kept |= {name: json.dumps(value, allow_nan=False) for name, value in notes.items()}
    onnx.helper.set_model_props(model, kept)
    onnx.save(model, target)


def signal_to_noise(source: Path, target: Path, batches: Batches) -> dict[str, float]:
    """Signal to noise of the outputs of each convolution and dense layer, in decibels.

    Args:
      source, target: the float32 network, and the int8 network made of it.

    Returns:
      {layer, by PyTorch's name: decibels}, the noisiest first.
    """
    traces = []
    with tempfile.TemporaryDirectory() as folder:
        for number, path in enumerate((target, source)):
            traced = str(Path(folder) / f"{number}.onnx")
            qdq_loss_debug.modify_model_output_intermediate_tensors(str(path), traced)
            reader = _Reader(batches())
            traces.append(qdq_loss_debug.collect_activations(traced, reader))
    matched = qdq_loss_debug.create_activation_matching(*traces)
    errors = qdq_loss_debug.compute_activation_error(matched)
    layers = _layers(source)
    found = {layers[n]: float(e["xmodel_err"]) for n, e in errors.items() if n in layers}
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def _layers(path: Path) -> dict[str, str]:
    """{output of a layer with a kernel: the layer's name, from its kernel's}. The output of a layer
    with a ReLU is that of the ReLU, because ONNX Runtime quantises the two together."""
    graph = onnx.load(path).graph
    relus = {node.input[0]: node.output[0] for node in graph.node if node.op_type == "Relu"}
    return {
        relus.get(node.output[0], node.output[0]): node.input[1].removesuffix(".weight")
        for node in graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul")
    }
