"""Compile every Triton kernel for every architecture, without a GPU, and print what each one needs, as JSON.

Run in a process of its own, without TRITON_INTERPRET: `python tests/kernels/aot.py [module ...]`, or `-` for modules
that are named on lines of the input; an empty line ends each one's reports. A module of posttrain.kernels that launches
kernels has a function `ahead_of_time()` that yields them with their production block sizes, as tuples:

    (name, jit function, signature {argument: type}, constexprs {argument: value}, options {"num_warps": ...})

An option "capability" says that these block sizes are for one architecture; otherwise all of them are compiled.
A type is written as Triton writes it, with `:16` for what is a multiple of 16: `*bf16:16`, `i32:16`, `i64`, `fp32`.
"""

import json
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import posttrain.kernels

# Compute capability -> bytes of shared memory a block may have.
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
ARCHITECTURES = (80, 89, 90, 100, 120)  # 86 only where a kernel has block sizes of its own for it
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def report(capability: int, entry) -> dict[str, int | str]:
    """Shared memory, registers, stack and local memory (both are spills) of one kernel."""
    name, function, signature, constexprs, options = entry
    types = {argument: kind.removesuffix(":16") for argument, kind in signature.items()}
    aligned = [argument for argument, kind in signature.items() if kind.endswith(":16")]
    attributes = {(function.arg_names.index(argument),): [["tt.divisibility", 16]] for argument in aligned}
    source = ASTSource(function, types | dict.fromkeys(constexprs, "constexpr"), constexprs, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = _resources(compiled.asm["cubin"])
    return {
        "kernel": name,
        "capability": capability,
        "shared": compiled.metadata.shared,
        "registers": usage["REG"],
        "spilled": usage["STACK"] + usage["LOCAL"],
    }


def _resources(cubin: bytes) -> dict[str, int]:
    """What `cuobjdump` says a kernel uses, as in `REG:32 STACK:0 SHARED:0 LOCAL:0`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    words = next(line for line in text.splitlines() if "REG:" in line).split()
    return {key: int(value) for key, value in (word.split(":")[:2] for word in words if ":" in word) if value.isdigit()}


def launching_modules() -> list[str]:
    """The modules of posttrain.kernels that launch kernels; the others hold device functions."""
    names = [found.name for found in pkgutil.iter_modules(posttrain.kernels.__path__)]
    return [name for name in names if hasattr(import_module(f"posttrain.kernels.{name}"), "ahead_of_time")]


def main(modules: Iterable[str]) -> None:
    """Print one JSON object per kernel and architecture of each of these modules of posttrain.kernels."""
    for module in modules:
        for entry in import_module(f"posttrain.kernels.{module}").ahead_of_time():
            options = entry[-1]
            only = options.pop("capability", None)
            for capability in ARCHITECTURES if only is None else (only,):
                print(json.dumps({"module": module, **report(capability, entry)}))
        print(flush=True)


if __name__ == "__main__":
    main((line.strip() for line in sys.stdin) if sys.argv[1:] == ["-"] else sys.argv[1:] or launching_modules())
