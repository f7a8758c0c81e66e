"""Compile every kernel as its launcher would on a GPU generation, without a GPU, and report resources and instructions.

    python tests/support/aot.py fp16:90 fp32:80     JSON on stdout: per job one object per kernel and case

The launchers run on CPU tensors with `JITFunction.run` replaced by a recorder, so tiles, flags and alignments are those
of a real launch.
"""

import itertools
import json
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from unpadded_kernels.activation import KINDS, activation_triton
from unpadded_kernels.attention import attention_triton, make_tile_map
from unpadded_kernels.embedding import embedding_triton
from unpadded_kernels.layer_norm import add_layer_norm_triton, pre_layer_norm_triton, rms_norm_triton
from unpadded_kernels.linear import linear_invariant_triton
from unpadded_kernels.matryoshka import matryoshka_triton
from unpadded_kernels.moe import expert_mlp_triton
from unpadded_kernels.pooling import masked_mean_pool_triton, mean_pool_triton
from unpadded_kernels.rotary import rotary_triton
from unpadded_kernels.tiles import attention_block_m
from unpadded_kernels.vocabulary_max import vocabulary_max_triton

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA", "QMMA", "QGMMA", "UTCQMMA", "LDL", "STL", "WARPGROUP.ARRIVE")
WIDE_LOAD = re.compile(r"\b(LDG|LDGSTS)\.[A-Z0-9.]*128|\bUTMALDG")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# Per multiprocessor.
REGISTERS, SHARED = 65536, {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TOKENS = 256

Launch = tuple[JITFunction, tuple[int, ...], tuple[Any, ...], dict[str, Any]]


def launches(call: Callable[[], object]) -> list[Launch]:
    """Return the launches of `call`: kernel, grid, positional and keyword arguments."""
    recorded: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        recorded.append((kernel, grid, args, kwargs))

    run, JITFunction.run = JITFunction.run, record
    try:
        call()
    finally:
        JITFunction.run = run
    return recorded


def cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield (name, call of a launcher) for the dimensions of supported models."""

    def rows(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    cu_seqlens = torch.tensor([0, 100, TOKENS], dtype=torch.int32)
    ids = torch.zeros(TOKENS, dtype=torch.int32)
    for hidden in (384, 768, 1024):
        x, row = rows(TOKENS, hidden), rows(hidden)
        yield f"hidden {hidden}", lambda x=x, row=row: add_layer_norm_triton(x, x, row, row, 1e-5)
    for hidden in (768, 1152, 2304):
        x, row = rows(TOKENS, hidden), rows(hidden)
        yield f"rms, hidden {hidden}, sum", lambda x=x, row=row: rms_norm_triton(x, x, row, 1e-5)
    x, row = rows(TOKENS, 768), rows(768)
    yield "hidden 768, with sum", lambda: pre_layer_norm_triton(x, x, row, row, 1e-5)
    yield "rms, hidden 768", lambda: rms_norm_triton(x, None, row, 1e-5)
    for types in (None, ids):
        name = "word, type, position" + (", types" if types is ids else "")
        yield name, lambda types=types: embedding_triton(ids, ids, types, x, x, x, row, row, 1e-5)
    for kind in KINDS:
        yield kind, lambda kind=kind: activation_triton(rows(TOKENS, 6144), kind)
    yield "12 heads of 64", lambda: rotary_triton(rows(TOKENS, 3, 12, 64), torch.empty(TOKENS, 64))
    yield "768 columns", lambda: mean_pool_triton(x, cu_seqlens)
    if dtype == torch.float16:
        yield "768 columns", lambda: matryoshka_triton(torch.empty(TOKENS, 768), True, 256, True)
    yield "int64 mask", lambda: masked_mean_pool_triton(rows(2, TOKENS, 768), ids.view(2, -1).long().repeat(1, 2), True)
    for head_dim in (16, 32, 64, 96, 128):
        # Models with a position bias have heads of 64; sm_80 spills with larger ones. Other variants take registers, of
        # which smaller heads leave more.
        variants = ("", ", window", ", alibi", *([", position bias"] if head_dim <= 64 else []))
        for variant in variants if head_dim == 64 or (head_dim > 64 and dtype == torch.float16) else variants[:1]:
            qkv, window = rows(TOKENS, 3, 12, head_dim), 128 if variant == ", window" else None
            tile_map = make_tile_map([100, TOKENS - 100], attention_block_m(dtype, head_dim, qkv.device))
            slopes = torch.empty(12) if variant == ", alibi" else None
            table = torch.empty(12, 183) if variant == ", position bias" else None
            arguments = qkv, cu_seqlens, TOKENS, 0.1, window, slopes, tile_map, table
            yield f"head_dim {head_dim}{variant}", lambda arguments=arguments: attention_triton(*arguments)
    keys = torch.tensor([50, 60], dtype=torch.int32)
    tile_map = make_tile_map([100, TOKENS - 100], attention_block_m(dtype, 64, qkv.device), keys)
    arguments = rows(TOKENS, 3, 12, 64), cu_seqlens, TOKENS, 0.1, 128, None, tile_map, None, keys
    yield "head_dim 64, window, keys", lambda arguments=arguments: attention_triton(*arguments)
    for inner, outer, kind in ((768, 2304, None), (768, 6144, "swiglu"), (768, 3072, "gelu")):
        arguments = rows(TOKENS, inner), rows(outer, inner), rows(outer), kind
        name = f"{inner} to {outer}" + (f", {kind}" if kind else "")
        yield name, lambda arguments=arguments: linear_invariant_triton(*arguments)
    arguments = rows(TOKENS, 768), rows(8, 768), rows(8, 3072, 768), rows(8, 768, 3072), rows(768), 2, "gelu"
    yield "8 experts", lambda arguments=arguments: expert_mlp_triton(*arguments)
    arguments = rows(TOKENS, 768), rows(30522, 768), torch.empty(30522), cu_seqlens
    yield "768 to 30522", lambda arguments=arguments: vocabulary_max_triton(*arguments)


def source(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[ASTSource, dict[str, Any]]:
    """Return the kernel specialized as by the JIT for these arguments, and the launch options."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value, key = values.pop(parameter.name), (index,)
        is_int = isinstance(value, int) and not isinstance(value, bool)
        if parameter.is_constexpr or value is None or (is_int and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[key] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            block = ", ".join(map(str, value.block_shape))
            signature[parameter.name] = f"tensordesc<{NAMES[value.base.dtype]}[{block}]>"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{NAMES[value.dtype]}"
            attributes[key] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if is_int and value % 16 == 0 and not parameter.do_not_specialize:
                attributes[key] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes), values


def resources(compiled: Any, capability: int) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        ran = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True)
    match = re.search(r"REG:(\d+) STACK:(\d+)", ran.stdout + ran.stderr)
    registers, stack = int(match[1]), int(match[2])
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    return {
        "warps": warps,
        "registers": registers,
        "stack": stack,
        "shared": shared,
        "programs_per_multiprocessor": min(by_registers, SHARED[capability] // (shared + 1024), 32, 64 // warps),
    }


def machine_code(cubin: bytes) -> bytes:
    """Return the instructions of a file with one kernel: the section .text.<kernel> of an ELF file."""
    (start,), (size, count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HHH", cubin, 58)
    # of a section: place of its name, type, flags, address, place and size of its contents
    sections = [struct.unpack_from("<IIQQQQ", cubin, start + size * index) for index in range(count)]
    names_start = sections[names][4]
    (code,) = (cubin[at : at + n] for name, *_, at, n in sections if cubin.startswith(b".text.", names_start + name))
    return code


def disassembled(cubins: list[bytes], capability: int) -> Iterator[list[str]]:
    """Yield the instructions of each kernel. One process reads all, because it takes 0.3 s to start."""
    codes = [machine_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        command = [TOOLS / "nvdisasm", "-b", f"SM{capability}" + "a" * (capability >= 90), file.name]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = iter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/.*", ran.stdout, re.M))
    for code in codes:
        yield list(itertools.islice(lines, len(code) // 16))
    assert next(lines, None) is None


def counts(sass: list[str]) -> dict[str, int]:
    """Count the instructions that the tests limit."""
    text = "\n".join(sass)
    return {
        "instructions": max(index for index, line in enumerate(sass) if "EXIT" in line) + 1,
        "wide_loads": len(WIDE_LOAD.findall(text)),
        **{name: len(re.findall(rf"\b{name}", text)) for name in INSTRUCTIONS},
    }


def compile_cases(job: str) -> list[dict[str, Any]]:
    """Compile and describe every case of a job such as fp16:90."""
    dtype, generation = job.split(":")
    capability = int(generation)
    for op in ("attention", "linear", "moe", "vocabulary_max"):
        sys.modules[f"unpadded_kernels.{op}"].generation = lambda device: {89: 80}.get(capability, capability)
    result, cubins = [], []
    for case, call in cases(DTYPES[dtype]):
        for kernel, grid, args, kwargs in launches(call):
            row = {"kernel": kernel.__name__, "case": case, "dtype": dtype, "capability": capability}
            specialized, options = source(kernel, args, kwargs)
            compiled = triton.compile(specialized, target=GPUTarget("cuda", capability, 32), options=options)
            rows = [arg for arg in args if isinstance(arg, torch.Tensor) and len(arg) == TOKENS]
            row |= {"programs": math.prod(grid), "bytes": sum(arg.nbytes for arg in rows)}
            result.append(row | resources(compiled, capability))
            cubins.append(compiled.asm["cubin"])
    return [row | counts(sass) for row, sass in zip(result, disassembled(cubins, capability), strict=True)]


def main() -> None:
    assert not os.environ.get("TRITON_INTERPRET"), "the interpreter compiles nothing: unset TRITON_INTERPRET"
    jobs = sys.argv[1:]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        json.dump(dict(zip(jobs, pool.map(compile_cases, jobs), strict=True)), sys.stdout)


if __name__ == "__main__":
    main()
