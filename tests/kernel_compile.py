"""Triton kernels without a GPU: compiled for absent chips, and run by the interpreter."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.marks import slow_but

# Compute capability -> shared memory that one block may ask for, in bytes.
CHIPS = {
    80: 163 * 1024,  # A100
    86: 99 * 1024,  # RTX 30, A10
    89: 99 * 1024,  # RTX 40, L4
    90: 227 * 1024,  # H100, H200
    100: 227 * 1024,  # B200
    120: 99 * 1024,  # RTX 50
}
# Arguments of kernels that are None on one GPU.
OF_SEVERAL_GPUS = ("others", "broken")
# For parametrize: compiling for one chip tells most faults, the others are left to the slow tests.
EVERY_CHIP = slow_but([90], CHIPS)


def compile_for(
    kernel: Any,
    signature: dict[str, Any],
    constexprs: dict[str, Any],
    capability: int,
    num_warps: int,
    num_stages: int,
    multiples: Collection[str] = (),
) -> Any:
    """Compile a @triton.jit function with the toolchain's own ptxas; returns Triton's kernel.

    ``signature`` gives the type of each argument that is not in ``constexprs`` ("*bf16", "i32"; a
    tuple has one for each of its values);
    pointers are taken as 16-byte aligned, as PyTorch's are; "tensordesc<bf16[64,128]>" is a tensor
    descriptor of such tiles; ``multiples`` names numbers that 16 divides. OVERLAP is as on that
    chip.
    ``metadata.shared`` is in bytes, ``asm["ptx"]`` is text.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    overlap = capability >= 90
    constexprs = {name: None for name in OF_SEVERAL_GPUS if name not in signature} | constexprs
    if "OVERLAP" in kernel.arg_names:
        constexprs = constexprs | {"OVERLAP": overlap}
    types = {
        name: "constexpr" if name in constexprs else signature[name] for name in kernel.arg_names
    }
    aligned = {
        (index, *place): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        for place, kind in _each(types[name])
        if kind[0] == "*" or name in multiples
    }
    constexprs = {name: value for name, value in constexprs.items() if name in types}
    source = ASTSource(kernel, types, constexprs=constexprs, attrs=aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages, "launch_pdl": overlap}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"], f"{kernel.__name__} gave no machine code for sm_{capability}"
    return compiled


def _each(kind: Any) -> Iterator[tuple[tuple[int, ...], str]]:
    """The types of an argument, each with its place in a tuple, if it is one."""
    if isinstance(kind, tuple):
        yield from (((place,), one) for place, one in enumerate(kind))
    else:
        yield (), kind


def read_before_waiting(
    kernel: Any, constexprs: dict[str, Any], ptx: str, descriptors: Collection[str] = ()
) -> set[str]:
    """What a kernel reads before it waits for its predecessors, by argument; nothing is written.

    The wait must be there, at the top level of the text. An address is traced to its arguments
    through the registers that it was made from. One of the ``descriptors``, of a matrix, takes the
    places of five.
    """
    head, wait, _ = ptx.partition("griddepcontrol.wait")
    assert wait and not re.search(r"\b(st\.global|st\.async|atom\.|red\.)", head)
    absent = {*constexprs, *OF_SEVERAL_GPUS, "OVERLAP"}
    names = [name for name in kernel.arg_names if name not in absent]
    names = [name for name in names for _ in range(5 if name in descriptors else 1)]
    made_from: dict[str, set[str]] = {}
    read: set[str] = set()
    for line in re.sub(r"//.*", "", head).splitlines():
        used = re.findall(r"%[a-z]+\d+|_param_\d+", re.sub(r"@!?%p\d+", "", line))
        for place in used:
            if place.startswith("_param_") and int(place[7:]) < len(names):
                made_from.setdefault(place, {names[int(place[7:])]})
        if re.search(r"\b(ld\.global|cp\.async\.c[ag]|cp\.async\.bulk|tensormap)", line):
            used = re.findall(r"%[a-z]+\d+", " ".join(re.findall(r"\[.*?\]", line)))
            read = read.union(*(made_from.get(place, set()) for place in used))
        elif used:
            sources = (made_from.get(place, set()) for place in used)
            made_from[used[0]] = set[str]().union(*sources)
    return read


@contextmanager
def interpreted(module: ModuleType) -> Iterator[None]:
    """Within, the module's kernels run on the CPU, in Triton's interpreter.

    Setting TRITON_INTERPRET does this only if nothing has imported Triton or the kernels before.
    """
    import triton.experimental.gluon  # noqa: F401  (a launch imports it, and it wants them compiled)
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    patch_language = interpreter._patch_lang
    scopes: dict[frozenset[int], Any] = {}

    def patch_once(function: Any) -> Any:
        """Triton patches its language at every call, and at calls within kernels for good."""
        modules = frozenset(id(m) for m in function.__globals__.values() if m in (tl, tl.core))
        if modules not in scopes:
            scopes[modules] = patch_language(function)
        return interpreter._LangPatchScope()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", _multiply)
        patch.setattr(interpreter.ReduceOps, "apply_impl", _refusing_open_ties())
        for owner in (tl, tl.standard, module):  # tl.max and its like are kernels too
            for name, value in list(vars(owner).items()):
                if isinstance(value, JITFunction):
                    patch.setattr(owner, name, interpreter.InterpretedFunction(value.fn))
        try:
            yield
        finally:
            for scope in reversed(scopes.values()):
                scope.restore()


@contextmanager
def rounding_as_a_gpu(*modules: ModuleType) -> Iterator[None]:
    """The same for several modules; casts to 16 and 8 bits go to the nearest, as a GPU's.

    The interpreter's own to bfloat16 truncates, and to fp8 rounds halves up.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    nearest = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}

    def to_nearest(x: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source != tl.float32 or target not in nearest:
            return convert(x, source, target, rounding)
        rounded = torch.from_numpy(x.copy()).to(nearest[target])
        bits = torch.int16 if target == tl.bfloat16 else torch.uint8
        return rounded.view(bits).numpy().view(f"uint{8 * rounded.itemsize}")

    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(interpreter, "_convert_float", to_nearest)
        for module in modules:
            stack.enter_context(interpreted(module))
        yield


def _refusing_open_ties() -> Any:
    """The interpreter's reduction, which takes the leftmost of equals, also where a GPU may not."""
    import triton.language as tl
    from triton.runtime.interpreter import ReduceOps

    reduce = ReduceOps.apply_impl

    def checked(self: Any, values: Any) -> Any:
        fast = (
            tl.standard._argmax_combine_tie_break_fast,
            tl.standard._argmin_combine_tie_break_fast,
        )
        assert self.combine_fn not in fast, "the kernel does not say which of equals wins"
        return reduce(self, values)

    return checked


def _multiply(builder: Any, a: Any, b: Any, c: Any, *rest: Any) -> Any:
    """A product whose rows do not depend on each other, as a GPU's matrix units make it.

    It adds one column of ``a`` after another to what it is given, so that a sum that goes from tile
    to tile has the same bits for tiles of any size: a share of one that begins or ends elsewhere is
    seen. The interpreter's own is numpy's, which knows no bfloat16 and keeps to no order.
    """
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    if a.dtype.scalar != tl.float32:
        a, b = builder.create_fp_ext(a, tl.float32), builder.create_fp_ext(b, tl.float32)
    total = c.data.copy()
    for column, row in zip(a.data.T, b.data, strict=True):
        total += column[:, None] * row
    return TensorHandle(total, c.dtype.scalar)
