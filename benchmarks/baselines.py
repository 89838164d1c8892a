"""One case with one library: ours, MLX, torch, onnxruntime, OpenVINO.

A peer binds a case to a ``Run`` over the same weights (or, where its storage has no room for them,
the nearest it has), and returns None for what it cannot do. Conversions are done once for each set
of weights and never timed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lowbit import ops

from benchmarks.cases import Case
from benchmarks.operands import Inputs, Weights
from benchmarks.timing import Run

OURS = "lowbit"
INT8 = "/i8"  # ends the names of peers that round activations to int8: another computation
PRODUCTS = ("matvec", "matmul", "qqmm")  # x [M, K] times the transpose of packed weights
# Peers may round weights, zero points or activations to what their storage has; more than this is
# another computation. MLX in 16-bit types is compared whatever its error is: it is what is being
# replaced.
PEER_ERROR = 0.05
# CPU time that a library's workers used while the process slept after a call: torch (OpenMP) 4 to
# 7 ms, onnxruntime 35 to 42 ms; MLX and OpenVINO none.
TORCH_SETTLE = 0.01
ORT_SETTLE = 0.05


@dataclass(frozen=True)
class Peer:
    """A column of the table."""

    name: str
    note: str
    bind: Callable[[Case, Weights, Inputs], Run | None]
    max_error: float = PEER_ERROR
    dense: bool = False  # reads dequantized weights
    rotates: bool = True  # otherwise cold rows would measure switching between compiled models
    settle: float = 0.0  # seconds that its worker threads go on spinning after a call


def load_peers(threads: int) -> tuple[dict[str, Peer], dict[str, str], list[str]]:
    """Peers that are installed, each set to ``threads`` threads.

    Returns:
        (name -> peer with ours first, distribution -> version, names of the libraries that are
        missing)
    """
    peers = [
        Peer(OURS, "mlx_lowbit.ops", _lowbit),
        Peer("mlx", "the same function of mlx.core", _mlx, max_error=np.inf),
        Peer("mlx/f32", "the same with float32 activations and scales", _mlx_float32),
        Peer("mlx/dense", "matmul of mlx.core, dequantized weights", _mlx_dense, np.inf, True),
    ]
    versions = {name: importlib.metadata.version(name) for name in ("mlx", "numpy")}
    missing = []
    for library, make in (
        ("torch", _torch),
        ("onnxruntime", _onnxruntime),
        ("openvino", _openvino),
    ):
        try:
            peers += make(threads)
            versions[library] = importlib.metadata.version(library)
        except ImportError as error:
            needs = f" (needs {error.name})" if error.name != library else ""
            missing.append(library + needs)
    return {peer.name: peer for peer in peers}, versions, missing


def _evaluated(build: Callable[[], Any]) -> Run:
    def run() -> Any:
        result = build()
        mx.eval(result)
        return result

    return run


def _mlx_interface(api: Any, case: Case, weights: Weights, inputs: Inputs) -> Run | None:
    """The case through ``api``: mlx.core and mlx_lowbit.ops have the same functions."""
    x, kw = inputs.x, weights.keywords
    if case.op == "quantize":
        return _evaluated(lambda: [a for a in api.quantize(weights.source, **kw) if a is not None])
    if case.op == "dequantize":
        return _evaluated(lambda: api.dequantize(*weights.packed, dtype=weights.dtype, **kw))
    if case.op == "qqmm":
        return _evaluated(lambda: api.qqmm(x, *weights.packed, **kw))
    if case.op == "gather":
        kw |= {"rhs_indices": inputs.experts, "sorted_indices": inputs.sorted}
        return _evaluated(lambda: api.gather_qmm(x, *weights.packed, **kw))
    return _evaluated(lambda: api.quantized_matmul(x, *weights.packed, **kw))


def _lowbit(case: Case, weights: Weights, inputs: Inputs) -> Run | None:
    if case.op == "linear":
        return _evaluated(lambda: ops.linear(inputs.x, weights.source))
    return _mlx_interface(ops, case, weights, inputs)


def _mlx(case: Case, weights: Weights, inputs: Inputs) -> Run | None:
    if case.op == "linear":
        return None  # the same as mlx/dense
    if case.op == "qqmm" and case.m > 1 and mx.default_device() == mx.cpu:
        return None  # MLX has one row there, and ends the process from inside eval otherwise
    return _mlx_interface(mx, case, weights, inputs)


def _mlx_float32(case: Case, weights: Weights, inputs: Inputs) -> Run | None:
    if case.op not in (*PRODUCTS, "gather") or case.dtype == "float32":
        return None

    def widen() -> Weights:
        w, *rest = weights.packed
        if weights.format.has_biases:
            rest = [a.astype(mx.float32) for a in rest]
        wide = replace(weights, packed=(w, *rest), dtype=mx.float32, _made={})
        mx.eval(wide.packed)
        return wide

    return _mlx(case, weights.once("mlx/f32", widen), inputs.astype(mx.float32))


def _mlx_dense(case: Case, weights: Weights, inputs: Inputs) -> Run | None:
    if case.op in ("quantize", "dequantize"):
        return None
    if case.op == "gather" and case.dtype != "float32" and mx.default_device() == mx.cpu:
        return None  # gather_mm has only float32 there
    w = weights.dense.swapaxes(-1, -2)
    if case.op == "gather":
        chosen, ordered = inputs.experts, inputs.sorted
        return _evaluated(
            lambda: mx.gather_mm(inputs.x, w, rhs_indices=chosen, sorted_indices=ordered)
        )
    return _evaluated(lambda: inputs.x @ w)


def _numpy32(a: mx.array) -> np.ndarray:
    return np.array(a.astype(mx.float32))


def _affine_bytes(case: Case, weights: Weights) -> int | None:
    """Codes a byte, 1 or 2, where other libraries store the packed words alike; otherwise None."""
    if case.op not in ("matvec", "matmul"):
        return None
    f = weights.format
    return 8 // f.bits if f.mode == "affine" and f.bits in (4, 8) else None


def _affine_parts(weights: Weights) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packed codes uint8 [N, bytes], scales float32 [N, groups], zero points uint8 [N, groups].

    A zero point is the code nearest to 0.
    """
    w, scales, biases = weights.packed
    s = _numpy32(scales)
    zero = np.rint(-_numpy32(biases) / np.where(s == 0, 1, s))
    top = 2**weights.format.bits - 1
    return np.array(w).view(np.uint8), s, np.clip(zero, 0, top).astype(np.uint8)


def _pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """uint8 codes [..., n] below 16 -> [..., ceil(n / 2)], the even ones in the low half."""
    pad = [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)]
    codes = np.pad(codes, pad)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def _torch(threads: int) -> list[Peer]:
    torch = importlib.import_module("torch")
    torch.set_num_threads(threads)

    def tensor(a: mx.array, dtype: mx.Dtype) -> Any:
        return torch.from_numpy(_numpy32(a)).to(getattr(torch, str(dtype).rsplit(".", 1)[-1]))

    def dense(case: Case, weights: Weights, inputs: Inputs) -> Run | None:
        if case.op not in (*PRODUCTS, "linear"):
            return None
        w = weights.once("torch", lambda: tensor(weights.dense, weights.dtype))
        x = tensor(inputs.x, weights.dtype)
        return lambda: torch.nn.functional.linear(x, w)

    def pack4(weights: Weights) -> tuple[Any, Any]:
        raw, scales, _ = _affine_parts(weights)
        codes = np.stack([raw & 15, raw >> 4], -1).reshape(raw.shape[0], -1)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            torch.from_numpy(codes.astype(np.int32)), 1
        )
        # value = (code - 8) * scale + zero
        zeros = _numpy32(weights.packed[2]) + 8 * scales
        pairs = np.ascontiguousarray(np.stack([scales.T, zeros.T], -1))
        return packed, torch.from_numpy(pairs).bfloat16()

    def pack8(weights: Weights) -> tuple[Any, Any]:
        dense = _numpy32(weights.dense)
        scales = np.maximum(np.abs(dense).max(1), 1e-20) / 127
        codes = np.rint(dense / scales[:, None]).astype(np.int8)
        return torch.from_numpy(codes), torch.from_numpy(scales).bfloat16()

    def packed(case: Case, weights: Weights, inputs: Inputs) -> Run | None:
        per_byte = _affine_bytes(case, weights)
        if per_byte is None or case.dtype != "bfloat16":
            return None
        x = tensor(inputs.x, mx.bfloat16)
        if per_byte == 1:
            w, scales = weights.once("torch/pack", lambda: pack8(weights))
            return lambda: torch.ops.aten._weight_int8pack_mm(x, w, scales)
        w, pairs = weights.once("torch/pack", lambda: pack4(weights))
        group = weights.format.group_size
        return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, group, pairs)

    dense_note = "nn.functional.linear with dequantized weights"
    note = "_weight_int4pack_mm_for_cpu; 8 bits: _weight_int8pack_mm (scales a channel)"
    return [
        Peer("torch", dense_note, dense, dense=True, settle=TORCH_SETTLE),
        Peer("torch/pack", note, packed, settle=TORCH_SETTLE),
    ]


def _onnxruntime(threads: int) -> list[Peer]:
    ort = importlib.import_module("onnxruntime")
    onnx = importlib.import_module("onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads

    def session(weights: Weights, level: int) -> Any:
        f, shape = weights.format, weights.shape
        raw, scales, zeros = _affine_parts(weights)
        zeros = zeros if f.bits == 8 else _pack_nibbles(zeros)
        blocks = raw.reshape(shape.n, shape.k // f.group_size, -1)
        stored = {"w": blocks, "scales": scales, "zeros": zeros}
        node = onnx.helper.make_node(
            "MatMulNBits", ["x", *stored], ["y"], domain="com.microsoft",
            K=shape.k, N=shape.n, bits=f.bits, block_size=f.group_size, accuracy_level=level,
        )  # fmt: skip
        sides = [
            [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["m", size])]
            for name, size in (("x", shape.k), ("y", shape.n))
        ]
        tensors = [onnx.numpy_helper.from_array(a, name) for name, a in stored.items()]
        graph = onnx.helper.make_graph([node], "linear", *sides, tensors)
        domains = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=domains, ir_version=9)
        return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])

    def bind(level: int, case: Case, weights: Weights, inputs: Inputs) -> Run | None:
        if _affine_bytes(case, weights) is None:
            return None
        run = weights.once(f"onnxruntime/{level}", lambda: session(weights, level))
        y = ort.OrtValue.ortvalue_from_shape_and_type([case.m, case.shape.n], np.float32)
        io = run.io_binding()
        io.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(_numpy32(inputs.x)))
        io.bind_ortvalue_output("y", y)

        def once() -> np.ndarray:
            run.run_with_iobinding(io)
            return y.numpy()

        return once

    note = "MatMulNBits, float32 activations"
    int8_note = f"{note} quantized to int8 inside (accuracy_level 4)"
    return [
        Peer("ort", note, partial(bind, 0), rotates=False, settle=ORT_SETTLE),
        Peer("ort" + INT8, int8_note, partial(bind, 4), rotates=False, settle=ORT_SETTLE),
    ]


def _openvino(threads: int) -> list[Peer]:
    ov = importlib.import_module("openvino")
    op = importlib.import_module("openvino.opset13")
    core = ov.Core()
    # mode, bits -> element type. Scales go in as float16, which all of these values fit.
    types = {
        ("affine", 4): ov.Type.u4,
        ("affine", 8): ov.Type.u8,
        ("mxfp4", 4): ov.Type.f4e2m1,
        ("nvfp4", 4): ov.Type.f4e2m1,
        ("mxfp8", 8): ov.Type.f8e4m3,
    }

    def compiled(weights: Weights, precision: str, group: int) -> tuple[Any, Any]:
        f, shape = weights.format, weights.shape
        groups, kept = shape.k // f.group_size, []

        def constant(raw: np.ndarray, *size: int) -> Any:
            kept.append(
                np.ascontiguousarray(raw).view(np.uint8).reshape(-1)
            )  # not copied by Tensor
            tensor = ov.Tensor(kept[-1], ov.Shape([shape.n, *size]), types[f.mode, f.bits])
            return op.convert(op.constant(tensor), np.float16)

        value = constant(np.array(weights.packed[0]), groups, f.group_size)
        if f.mode == "affine":
            _, scales, zeros = _affine_parts(weights)
            zeros = zeros if f.bits == 8 else _pack_nibbles(zeros.reshape(-1))
            value = op.subtract(value, constant(zeros, groups, 1))
        elif f.mode == "nvfp4":
            scales = _numpy32(mx.from_fp8(weights.packed[1], dtype=mx.float32))
        else:
            scales = np.exp2(np.array(weights.packed[1]).astype(np.float32) - 127)
        scale = op.constant(scales.astype(np.float16)[..., None])
        value = op.reshape(op.multiply(value, scale), [shape.n, shape.k], False)
        x = op.parameter([-1, shape.k], np.float32, name="x")
        model = ov.Model([op.matmul(x, op.convert(value, np.float32), False, True)], [x])
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group),
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
        }
        return core.compile_model(model, "CPU", settings), kept

    def bind(
        precision: str, group: int, case: Case, weights: Weights, inputs: Inputs
    ) -> Run | None:
        if case.op not in ("matvec", "matmul"):
            return None
        if (weights.format.mode, weights.format.bits) not in types:
            return None
        key = f"openvino/{precision}/{group}"
        model, _ = weights.once(key, lambda: compiled(weights, precision, group))
        request, x = model.create_infer_request(), _numpy32(inputs.x)
        return lambda: request.infer({0: x}, share_inputs=True, share_outputs=True)[0]

    def weight_only(case: Case, weights: Weights, inputs: Inputs) -> Run | None:
        precision = {"bfloat16": "bf16", "float32": "f32"}.get(case.dtype)
        return bind(precision, 0, case, weights, inputs) if precision else None

    def int8(case: Case, weights: Weights, inputs: Inputs) -> Run | None:
        if _affine_bytes(case, weights) is None:
            return None
        return bind("f32", weights.format.group_size, case, weights, inputs)

    note = "MatMul with compressed weights, the precision of the case"
    int8_note = "the same in float32 with activations quantized to int8 a group"
    return [
        Peer("ov", note, weight_only, rotates=False),
        Peer("ov" + INT8, int8_note, int8, rotates=False),
    ]
