"""Kernels that Apple's compiler made, out of a .metallib, on the emulator's runtime.

A metallib holds a module of LLVM bitcode for each kernel (AIR). llvm-dis-19 reads it; the text is
retargeted to this machine, its air.* intrinsics are defined by the emulator's own functions, and an
entry point is made from the metadata that describes the kernel's arguments. Accesses are not
checked here. This compiles nothing of ours: it is the reference that shows how faithfully the
emulator reads a source of which both forms exist.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import emulator

LLVM_DIS = "llvm-dis-19"
BITCODE_WRAPPER = 0x0B17C0DE
BUFFER_BYTES = 16  # sizeof(MslBuffer)
LAYOUT = "e-m:e-p270:32:32-p271:32:32-p272:64:64-i64:64-i128:128-f80:128-n8:16:32:64-S128"
# Where MslContext (shim/msl_rt.h) has what a kernel may know of its place.
POSITIONS = {
    "thread_position_in_threadgroup": 0,
    "thread_position_in_grid": 12,
    "threadgroup_position_in_grid": 24,
    "threads_per_threadgroup": 36,
    "thread_index_in_threadgroup": 72,
    "thread_index_in_simdgroup": 76,
    "simdgroup_index_in_threadgroup": 80,
}
# A lane has elements 0 and 1 of the 64 that the intrinsic's type names.
MULTIPLY = "air.simdgroup_matrix_8x8_multiply_accumulate.v64f32.v64f32.v64f32.v64f32"
_PARTS = [f"%{v}{i} = extractelement <64 x float> %{v}, i32 {i}" for v in "abc" for i in (0, 1)]
_PASSED = ", ".join(f"float %{v}{i}" for v in "abc" for i in (0, 1))
# Name: (result, parameters, body).
INTRINSICS = {
    "air.wg.barrier": ("void", "i32 %0, i32 %1", ["call void @air_barrier() convergent", "ret void"]),
    "air.simdgroup.barrier": (
        "void", "i32 %0, i32 %1", ["call void @air_simdgroup_barrier() convergent", "ret void"],
    ),
    "air.simd_sum.f32": (
        "float", "float %0", ["%r = call float @air_simd_sum(float %0) convergent", "ret float %r"],
    ),
    "air.convert.f.f32.s.i32": ("float", "i32 %0", ["%r = sitofp i32 %0 to float", "ret float %r"]),
    "air.convert.f.f32.f.f16": ("float", "half %0", ["%r = fpext half %0 to float", "ret float %r"]),
    "air.min.s.i32": (
        "i32", "i32 %0, i32 %1",
        ["%c = icmp slt i32 %0, %1", "%r = select i1 %c, i32 %0, i32 %1", "ret i32 %r"],
    ),
    MULTIPLY: (
        "<64 x float>", "<64 x float> %a, <64 x float> %b, <64 x float> %c",
        [
            "%out = alloca [2 x float]", *_PARTS,
            f"call void @air_multiply(ptr %out, {_PASSED}) convergent",
            "%d0 = load float, ptr %out",
            "%p1 = getelementptr float, ptr %out, i32 1", "%d1 = load float, ptr %p1",
            "%r0 = insertelement <64 x float> poison, float %d0, i32 0",
            "%r1 = insertelement <64 x float> %r0, float %d1, i32 1", "ret <64 x float> %r1",
        ],
    ),
}  # fmt: skip
DECLARATIONS = """
declare void @air_barrier() convergent
declare void @air_simdgroup_barrier() convergent
declare float @air_simd_sum(float) convergent
declare void @air_multiply(ptr, float, float, float, float, float, float) convergent
"""
GLUE = """#include "msl_shim.h"
using namespace metal;
extern "C" {
MSL_NOINLINE void air_barrier() { msl_threadgroup_barrier(MSL_SITE); }
MSL_NOINLINE void air_simdgroup_barrier() {
  uint32_t lanes;
  msl_exchange(nullptr, 0, MSL_OP_SIMDGROUP_BARRIER, MSL_SITE, &lanes);
}
MSL_NOINLINE float air_simd_sum(float v) {
  auto lanes = msl_gather(v, MSL_SITE);
  return msl_reduce(lanes, 0, 32, [](float a, float b) { return a + b; });
}
MSL_NOINLINE void air_multiply(float* out, float a0, float a1, float b0, float b1, float c0, float c1) {
  simdgroup_float8x8 a, b, c, d;
  a.e = float2{a0, a1}, b.e = float2{b0, b1}, c.e = float2{c0, c1};
  simdgroup_multiply_accumulate(d, a, b, c);
  out[0] = d.e[0], out[1] = d.e[1];
}
"""


def missing() -> str | None:
    """Why no bitcode can be read here, or None."""
    return None if shutil.which(LLVM_DIS) else f"{LLVM_DIS} is not installed (Debian: llvm-19)"


def modules(metallib: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The bitcode of kernels.

    The layout is as seen in mlx.metallib: a header with the places of the list of functions and of
    the bitcode; each function a list of (4-byte tag, 16-bit size, data).

    Raises:
        KeyError: no such kernel.
        ValueError: no metallib.
    """
    with metallib.open("rb") as file:
        header = file.read(88)
        if header[:4] != b"MTLB":
            raise ValueError(f"{metallib}: not a metallib")
        list_at, list_bytes, *_, bitcode_at, _ = struct.unpack("<8Q", header[24:88])
        file.seek(list_at)
        data = file.read(list_bytes + 4)
        (count,), at, found = struct.unpack_from("<I", data), 4, {}
        for _ in range(count):
            end, field, tags = at + struct.unpack_from("<I", data, at)[0], at + 4, {}
            while field < end and (tag := data[field : field + 4]) != b"ENDT":
                (size,) = struct.unpack_from("<H", data, field + 4)
                tags[tag] = data[field + 6 : field + 6 + size]
                field += 6 + size
            offset, (size,) = (
                struct.unpack("<3Q", tags[b"OFFT"])[2],
                struct.unpack("<Q", tags[b"MDSZ"]),
            )
            found[tags[b"NAME"].rstrip(b"\0").decode()] = (bitcode_at + offset, size)
            at = end
        result = {}
        for name in names:
            offset, size = found[name]
            file.seek(offset)
            result[name] = file.read(size)
            if struct.unpack_from("<I", result[name])[0] != BITCODE_WRAPPER:
                raise ValueError(f"{metallib}: {name} is no bitcode")
    return result


def _metadata(text: str, number: str) -> str:
    return re.search(rf"^!{number} = (.*)$", text, re.M)[1]


def _entry_point(text: str, name: str) -> str:
    """`void msl_entry_<name>(MslArguments*, MslContext*)`, which calls the kernel."""
    kernel = _metadata(text, re.search(r"!air\.kernel = !\{!(\d+)\}", text)[1])
    body, call = [], []
    arguments = _metadata(text, re.findall(r"!(\d+)", kernel)[-1])
    for i, number in enumerate(re.findall(r"!(\d+)", arguments)):
        argument = _metadata(text, number)
        kind = re.search(r'!"air\.(\w+)"', argument)[1]
        if kind == "buffer":
            index = int(re.search(r'location_index", i32 (\d+)', argument)[1])
            space = re.search(r'address_space", i32 (\d+)', argument)[1]
            body += [
                f"%g{i} = getelementptr i8, ptr %a, i64 {BUFFER_BYTES * index}",
                f"%l{i} = load ptr, ptr %g{i}",
                f"%v{i} = addrspacecast ptr %l{i} to ptr addrspace({space})",
            ]
            call.append(f"ptr addrspace({space}) %v{i}")
            continue
        offset = POSITIONS[kind]
        if not re.search(r'arg_type_name", !"(\w+)"', argument)[1].endswith("3"):
            body += [
                f"%g{i} = getelementptr i8, ptr %c, i64 {offset}",
                f"%v{i} = load i32, ptr %g{i}",
            ]
            call.append(f"i32 %v{i}")
            continue
        vector = "poison"
        for k in range(3):
            body += [
                f"%g{i}_{k} = getelementptr i8, ptr %c, i64 {offset + 4 * k}",
                f"%l{i}_{k} = load i32, ptr %g{i}_{k}",
                f"%v{i}_{k} = insertelement <3 x i32> {vector}, i32 %l{i}_{k}, i32 {k}",
            ]
            vector = f"%v{i}_{k}"
        call.append(f"<3 x i32> {vector}")
    lines = [*body, f"call void @{name}({', '.join(call)})", "ret void"]
    return f"define void @msl_entry_{name}(ptr %a, ptr %c) {{\n " + "\n ".join(lines) + "\n}\n"


def _retargeted(text: str, name: str) -> str:
    text = re.sub(r"target datalayout = .*", f'target datalayout = "{LAYOUT}"', text)
    text = re.sub(r"target triple = .*", 'target triple = "x86_64-unknown-linux-gnu"', text)
    text = re.sub(r"^@llvm.global_ctors.*$", "", text, flags=re.M)
    for intrinsic in re.findall(r"^declare .*?@(air\.[\w.]+)\(.*$", text, re.M):
        if intrinsic not in INTRINSICS:
            raise emulator.MetalError(f"{name}: the intrinsic {intrinsic} is not emulated")
        result, parameters, body = INTRINSICS[intrinsic]
        definition = (
            f"define internal {result} @{intrinsic}({parameters}) alwaysinline convergent {{\n "
        )
        definition += "\n ".join(body) + "\n}"
        line = re.compile(r"^declare .*?@" + re.escape(intrinsic) + r"\(.*$", re.M)
        text = line.sub(lambda _, made=definition: made, text)
    return text + DECLARATIONS + _entry_point(text, name)


def load(metallib: Path, names: Sequence[str]) -> emulator.Library:
    """A library of kernels as Apple compiled them.

    Raises:
        MetalError: an intrinsic that is not emulated.
    """
    parts = []
    for name, code in modules(metallib, names).items():
        with tempfile.NamedTemporaryFile(suffix=".bc") as file:
            file.write(code)
            file.flush()
            done = subprocess.run(
                [LLVM_DIS, file.name, "-o", "-"], capture_output=True, text=True, check=True
            )
        text = _retargeted(done.stdout, name)
        flags = ["-w", "-O2", "-march=x86-64-v3", "-fno-optimize-sibling-calls", "-fPIC"]
        parts.append(str(emulator.built("air", text, flags, suffix=".ll")))
    entries = "".join(f"void msl_entry_{n}(MslArguments&, MslContext&);\n" for n in names)
    registered = "".join(f'  msl_register_kernel("{n}", &msl_entry_{n});\n' for n in names)
    glue = f"{GLUE}{entries}}}\nstatic int all = [] {{\n{registered}  return 0;\n}}();\n"
    return emulator.linked([*parts, str(emulator.built("glue", glue, emulator.FLAGS))], "run")
