"""Compiles, without a GPU, all kernels that the operations would launch on one architecture, and
describes them.

    python -m tests.compile.worker sm_90 1/2          # half of them
    python -m tests.compile.worker sm_90 1/1 full     # all, with every combination of constants

It prints a JSON object with "kernels", the names of all kernels, "described", the names of those
that get descriptors, and "rows", the compiled ones.

It is a process of its own, because under pytest jit functions are interpreted. Kernels that were
compiled before come from Triton's cache, which processes may share.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import launch
from kernels.operations import OPERATIONS, Make, flatten

# The multiprocessors of a usual card. The numbers of splits and the tiles depend on them.
SMS = {
    "sm_75": 40,
    "sm_80": 108,
    "sm_86": 82,
    "sm_89": 128,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 170,
    "gfx942": 304,
    "gfx1100": 96,
}
# (batch, in, out): a small network's first layer, a batch that is split, large tiles, and unaligned
# sizes with one output.
SHAPES = [(32, 784, 100), (2048, 100, 50), (8192, 1024, 2048), (7, 33, 1)]
# label -> (element type, torch.set_float32_matmul_precision)
PRECISIONS = {
    "ieee": (torch.float32, "highest"),
    "tf32x3": (torch.float32, "high"),
    "tf32": (torch.float32, "medium"),
    "fp16": (torch.float16, "highest"),
    "bf16": (torch.bfloat16, "highest"),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.float64: "*fp64",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def signature(value):
    """The type that Triton gives an argument at launch. 1, None and a constexpr are constants."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{POINTERS[value.base.dtype][1:]}{value.block_shape}>"
    if isinstance(value, tuple):
        types = map(signature, value)
        return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int) and value != 1:
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32" if isinstance(value, float) else "constexpr"


def specialise(value, path, constants, attributes):
    """Adds what Triton knows of the value: a constant, or that 16 divides it or its address."""
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            specialise(item, (*path, i), constants, attributes)
    elif isinstance(value, torch.Tensor):
        if value.storage_offset() * value.element_size() % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
    elif signature(value) == "constexpr":
        constants[path] = value
    elif isinstance(value, int) and not isinstance(value, bool) and value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]


def as_source(kernel, args, options):
    """(source, options) for the compilation of a launch."""
    names, types, constants, attributes = kernel.arg_names, {}, {}, {}
    given = dict(zip(names, args)) | {k: v for k, v in options.items() if k in names}
    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr:
            types[parameter.name], constants[i,] = "constexpr", value
        else:
            types[parameter.name] = signature(value)
            specialise(value, (i,), constants, attributes)
    source = ASTSource(kernel, types, constants, attributes)
    return source, {"enable_fp_fusion": True} | {k: v for k, v in options.items() if k not in names}


def launches(arch, full=False):
    """The launches to compile, as [(label, precision, source, options)].

    There is one for each kernel, precision and configuration, the one with the most arguments and
    the longest activation. Strides that 16 divides make no difference. If full, sm_80 and sm_90
    have all shapes. In two precisions sm_90 then also has every combination of constants and
    missing arguments for the first shape, and every activation for the last.
    """
    found = {}
    for precision, (dtype, setting) in PRECISIONS.items():
        torch.set_float32_matmul_precision(setting)
        thorough = full and arch == "sm_90" and precision in ("ieee", "bf16")
        for shape in SHAPES if full and arch in ("sm_80", "sm_90") else SHAPES[1:3]:
            for name, op in OPERATIONS.items():
                for label, arguments in op.cases(Make("meta", dtype), *shape):
                    for kernel, args, options in listed(arch, op, arguments):
                        key = identity(
                            kernel,
                            args,
                            options,
                            thorough and shape == SHAPES[0],
                            thorough and shape == SHAPES[-1],
                        )
                        functions = sum(
                            len(v.src)
                            for v in options.values()
                            if isinstance(v, triton.JITFunction)
                        )
                        weight = len(flatten(args)), functions
                        if weight > found.get((dtype, key), ((-1, 0),))[0]:
                            text = f"{kernel.fn.__name__} of {name}, {label}, {precision}, {shape}"
                            found[dtype, key] = (
                                weight,
                                text,
                                precision,
                                *as_source(kernel, args, options),
                            )
    return [entry[1:] for entry in found.values()]


def listed(arch, op, arguments):
    """(kernel, arguments, options) of each launch of the operation's forward and backward, with
    products in kernels and by the library. Tiles are loaded by pointers, and by TMA where possible.
    """
    seen = []
    record = lambda kernel, grid, args, options: seen.append((kernel, args, options))  # noqa: E731
    with launch.dry_run(arch, SMS[arch]), launch.observe(record):
        for products, tma in (("fused", True), ("fused", False), ("library", False)):
            with launch.use(products=products, tma=tma):
                op.results(arguments)
    return seen


def identity(kernel, args, options, every_constant, every_activation):
    """A key for a launch. Of launches with the same key only one is compiled."""
    constants = {k: v for k, v in options.items() if not isinstance(v, triton.JITFunction)}
    descriptors = sum(isinstance(v, TensorDescriptor) for v in args)
    if every_constant:
        more = [signature(v) if isinstance(v, torch.Tensor | tuple) else v is None for v in args]
    else:
        # Tiles matter only in kernels with products. Elsewhere they follow the shape.
        tiles = ("BLOCK", "num_", "PRECISION") if "PRECISION" in constants else ("num_",)
        constants = {k: v for k, v in constants.items() if k.startswith(tiles)}
        more = (
            [v.__name__ for v in options.values() if isinstance(v, triton.JITFunction)]
            if every_activation
            else []
        )
    return str((kernel.fn.__name__, descriptors, constants, more))


def target(arch):
    """Triton's name for an architecture, with the lanes of a warp: 64 on CDNA, 32 elsewhere."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


def compile_and_describe(arch, label, precision, source, options):
    """The kernel as a dict for JSON, with its error, or its registers, stack, shared memory and
    instructions.
    """
    row = {"label": label, "precision": precision, "kernel": source.fn.__name__, **options}
    row |= {
        name: value
        for (i, *_), value in source.constants.items()
        if (name := source.fn.arg_names[i]).startswith("BLOCK")
    }
    try:
        compiled = triton.compile(source, target=target(arch), options=options)
    except Exception as error:  # the test judges errors of any kind
        return row | {"error": f"{type(error).__name__}: {error}"[-600:]}
    assembly = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    row |= {"described": described(source), "bulk": assembly.count("cp.async.bulk.tensor")}
    row |= {"shared": compiled.metadata.shared, "dots": compiled.asm["ttir"].count("tt.dot ")}
    row["products"] = sorted(
        set(re.findall(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_s?mfma|v_wmma", assembly))
    )
    if arch.startswith("sm_"):
        row |= resources(compiled.asm["cubin"]) | {"uneven": uneven_sums(assembly)}
    else:
        row |= {
            "stack": sum(int(n) for n in re.findall(r"ScratchSize: (\d+)", assembly)),
            "registers": max(map(int, re.findall(r"\.vgpr_count:\s+(\d+)", assembly)), default=0),
        }
    return row


def described(source):
    """How many arguments of a launch are descriptors, which the tensor memory accelerator reads."""
    return sum(str(kind).startswith("tensordesc") for kind in source.signature.values())


def uneven_sums(ptx):
    """The number of sums over lanes that start with a fused multiply-add a·b + (neighbour's a·b).

    It rounds the neighbour's product but not its own, so the two lanes hold different sums. If both
    store to one address, either may remain.
    """
    register = r"(%\w+)"
    products = {
        out: {a, b}
        for out, a, b in re.findall(rf"\bmul\.f32\s+{register}, {register}, {register};", ptx)
    }
    sent = dict(re.findall(rf"\bshfl\.sync\.\w+\.b32\s+{register}, {register},", ptx))
    fused = re.findall(rf"\bfma\.rn\.f32\s+{register}, {register}, {register}, {register};", ptx)
    return sum(products.get(sent.get(c)) == {a, b} for _, a, b, c in fused)


def resources(cubin):
    """Registers, spills, and bytes of stack and local memory. Spilled numbers are on the stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    found = dict(zip(("registers", "stack", "local"), map(int, used.groups())))
    return found | {"spills": spills(cubin) if found["stack"] else 0}


def spills(cubin):
    """Loads and stores of local memory in the machine code.

    A stack frame alone is no spill, because calls reserve one.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP.with_name("nvdisasm"), "-c", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return len(re.findall(r"\b(?:LDL|STL)\b", text))


if __name__ == "__main__":
    architecture, share, *more = sys.argv[1:]
    part, parts = map(int, share.split("/"))
    found = launches(architecture, full=more == ["full"])
    rows = [compile_and_describe(architecture, *each) for each in found[part - 1 :: parts]]
    names = sorted({source.fn.__name__ for _, _, source, _ in found})
    by_tma = sorted({source.fn.__name__ for _, _, source, _ in found if described(source)})
    json.dump({"kernels": names, "described": by_tma, "rows": rows}, sys.stdout)
