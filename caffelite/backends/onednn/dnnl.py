"""oneDNN's C API as far as caffelite uses it: descriptors, primitives with their memory, and shared scratch memory.

Only this file and library.py know ctypes. The numbers are those of oneDNN 3's public headers (dnnl_types.h).
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from caffelite.backends.contract import Array, Ints
from caffelite.backends.onednn import library
from caffelite.errors import BackendError

SRC, SRC1, DST, WEIGHTS, BIAS, MEAN, VARIANCE, SCALE, SHIFT, WORKSPACE, SCRATCHPAD = 1, 2, 17, 33, 41, 49, 50, 51, 52, 64, 80
DIFF_SRC, DIFF_DST, DIFF_WEIGHTS, DIFF_BIAS, DIFF_SCALE, DIFF_SHIFT = 129, 145, 161, 169, 255, 256
MULTIPLE_SRC, ATTR_SCALES, POST_OP = 1024, 4096, 32768  # offsets of argument numbers; post-op i is POST_OP * (i + 1) | SRC1
TRAINING, INFERENCE, BACKWARD = 64, 96, 128
CONVOLUTION_DIRECT = 1
RELU, RELU_FROM_DST = 0x20, 0x100
POOL_MAX, POOL_AVE_INCLUDE, POOL_AVE_EXCLUDE = 0x1FF, 0x2FF, 0x3FF
LRN_ACROSS = 0xAFF
BINARY_MUL, BINARY_MAX = 0x1FFF1, 0x1FFF2
SOFTMAX_ACCURATE = 0x30000
USE_GLOBAL_STATISTICS, USE_SCALE, USE_SHIFT = 1, 2, 4

F32, BF16, S32, U8 = 3, 2, 4, 6
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(np.float32)
TYPES: dict[Any, int] = {FLOAT32: F32, BFLOAT16: BF16, np.dtype(np.int32): S32, np.dtype(np.uint8): U8}

_STATUS = ("success", "out of memory", "invalid arguments", "not implemented", "last implementation reached", "run-time error", "not required")
_ANY_TAG, _ENGINE_CPU, _STREAM_IN_ORDER, _QUERY_IMPLEMENTATION, _QUERY_ARGUMENT = 1, 1, 1, 8, 255
_MAX_AXES = 12
_Dims = ctypes.c_int64 * _MAX_AXES
_P, _I, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_float


class Unsupported(Exception):
    """oneDNN has no implementation for what was asked; the caller falls back to NumPy."""


class _Argument(ctypes.Structure):
    _fields_ = (("number", _I), ("memory", _P))


# ReLU is fused as a PReLU of slope 0: the plain ReLU post-op turns NaN into 0 and would hide a diverged net.
RELU_POST_OP = ("prelu", 0)
RELU_SLOPE = {POST_OP | WEIGHTS: np.zeros(16, np.float32)}


# After the primitive descriptor and the engine. P: descriptor or attribute, D: dims, I: int, F: float.
_DESCRIPTORS = {
    "convolution_forward": "IIPPPPDDDDP",
    "convolution_backward_data": "IPPPDDDDPP",
    "convolution_backward_weights": "IPPPPDDDDPP",
    "matmul": "PPPPP",
    "pooling_forward": "IIPPDDDDDP",
    "pooling_backward": "IPPDDDDDPP",
    "lrn_forward": "IIPPLFFFP",
    "lrn_backward": "IPPPLFFFPP",
    "softmax_forward": "IIPPIP",
    "softmax_backward": "IPPPIPP",
    "eltwise_forward": "IIPPFFP",
    "eltwise_backward": "IPPPFFPP",
    "prelu_forward": "IPPPP",
    "binary": "IPPPP",
    "batch_normalization_forward": "IPPFIP",
    "batch_normalization_backward": "IPPPFIPP",
}
_CTYPES = {"P": _P, "D": _P, "I": _I, "F": _F, "L": ctypes.c_int64}


class _Handle:
    """Owns one object of the library."""

    __slots__ = ("_destroy", "value")

    def __init__(self, value: Any, destroy: Any) -> None:
        self.value, self._destroy = value, destroy

    def __del__(self) -> None:
        self._destroy(self.value)


class Descriptor(_Handle):
    """A memory descriptor: shape, type and layout of an array, without the array."""

    __slots__ = ("nbytes",)

    def __init__(self, value: Any, destroy: Any, nbytes: int) -> None:
        super().__init__(value, destroy)
        self.nbytes = nbytes


class PrimitiveDescriptor(_Handle):
    """What a primitive will compute, in which layouts."""

    __slots__ = ()


class Primitive:
    """A compiled operation with one memory object for each argument; calling it with the arrays' addresses runs it.

    `fixed` arguments keep the small array they are given here, such as the slope of a fused ReLU."""

    __slots__ = ("_arguments", "_count", "_execute", "_fixed", "_memories", "_primitive", "_scratch", "_scratch_bytes", "_set", "_stream")

    def __init__(self, dnnl: Dnnl, descriptor: PrimitiveDescriptor, numbers: Sequence[int], fixed: Mapping[int, Array] | None = None) -> None:
        need = dnnl.argument(descriptor, SCRATCHPAD)
        self._scratch, self._scratch_bytes = dnnl.scratch, need.nbytes
        self._fixed = fixed or {}
        numbers = [*numbers, *([SCRATCHPAD] if need.nbytes else []), *self._fixed]
        self._primitive = dnnl.create("primitive_create", "primitive_destroy", descriptor.value)
        self._memories = [dnnl.memory(dnnl.scalar if number & ATTR_SCALES else dnnl.argument(descriptor, number)) for number in numbers]
        self._count = len(numbers)
        self._arguments = (_Argument * self._count)(*[_Argument(n, m.value) for n, m in zip(numbers, self._memories)])
        for memory, array in zip(self._memories[self._count - len(self._fixed) :], self._fixed.values()):
            dnnl.lib.dnnl_memory_set_data_handle(memory.value, array.ctypes.data)
        self._execute, self._set, self._stream = dnnl.lib.dnnl_primitive_execute, dnnl.lib.dnnl_memory_set_data_handle, dnnl.stream

    def __call__(self, *addresses: int) -> None:
        """Runs on the arrays at `addresses`, in the order of the argument numbers given at creation."""
        if self._scratch_bytes:
            addresses = (*addresses, self._scratch.address("scratchpad", self._scratch_bytes))
        for memory, address in zip(self._memories, addresses):
            self._set(memory.value, address)
        status = self._execute(self._primitive.value, self._stream.value, self._count, self._arguments)
        if status:
            raise BackendError(f"oneDNN failed to run a primitive: {describe(status)}")


class Scratch:
    """Memory that is needed within one op only: one buffer for each purpose, as large as the largest need so far."""

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}
        self._addresses: dict[str, tuple[int, int]] = {}

    def address(self, purpose: str, nbytes: int) -> int:
        """A 64-byte aligned address of at least nbytes; its contents last until the purpose is asked for again."""
        held, address = self._addresses.get(purpose, (-1, 0))
        if nbytes <= held:
            return address
        self._buffers.pop(purpose, None)
        buffer = np.empty(nbytes + 64, np.uint8)
        address = -(-buffer.ctypes.data // 64) * 64
        self._buffers[purpose], self._addresses[purpose] = buffer, (nbytes, address)
        return address

    def array(self, purpose: str, count: int, dtype: Any) -> Array:
        """The same memory as a flat array."""
        itemsize = np.dtype(dtype).itemsize
        address = self.address(purpose, count * itemsize)
        buffer = self._buffers[purpose]
        start = address - buffer.ctypes.data
        return buffer[start : start + count * itemsize].view(dtype)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())


def describe(status: int) -> str:
    """oneDNN's name for a status code."""
    return _STATUS[status] if 0 <= status < len(_STATUS) else f"status {status}"


def dims(values: Sequence[int]) -> Any:
    return _Dims(*values)


class Dnnl:
    """One engine and one in-order stream on the CPU, and makers of everything else."""

    def __init__(self) -> None:
        self.lib = library.load()
        self._declare()
        self.scratch = Scratch()
        self.engine = self._cpu_engine()
        self.stream = self.create("stream_create", "stream_destroy", self.engine.value, _STREAM_IN_ORDER)
        # One attribute for all plain primitives: scratchpads are ours, so that all of them share one buffer.
        self.plain = self.attributes()
        self.scalar = self.strided((1,), (1,), F32)  # what a run-time scale is; primitives do not describe theirs

    def _cpu_engine(self) -> _Handle:
        """BackendError where the library was built for other devices, as those that come with SYCL are."""
        try:
            return self.create("engine_create", "engine_destroy", _ENGINE_CPU, 0)
        except Unsupported as refusal:
            raise BackendError(f"this oneDNN library computes nothing on CPUs by itself ({refusal})", hint=library.INSTALL) from None

    def _declare(self) -> None:
        """Tells ctypes the argument types; every function returns a status unless said otherwise."""
        lib = self.lib
        for name, code in _DESCRIPTORS.items():
            getattr(lib, f"dnnl_{name}_primitive_desc_create").argtypes = [_P, _P, *(_CTYPES[c] for c in code)]
        lib.dnnl_reorder_primitive_desc_create.argtypes = [_P] * 6
        lib.dnnl_sum_primitive_desc_create.argtypes = [_P, _P, _P, _I, _P, _P, _P]
        lib.dnnl_engine_create.argtypes = [_P, _I, ctypes.c_size_t]
        lib.dnnl_stream_create.argtypes = [_P, _P, ctypes.c_uint]
        lib.dnnl_memory_create.argtypes = [_P, _P, _P, _P]
        lib.dnnl_memory_set_data_handle.argtypes = [_P, _P]
        lib.dnnl_memory_desc_create_with_strides.argtypes = [_P, _I, _P, _I, _P]
        lib.dnnl_memory_desc_create_with_tag.argtypes = [_P, _I, _P, _I, _I]
        lib.dnnl_memory_desc_get_size.argtypes, lib.dnnl_memory_desc_get_size.restype = [_P], ctypes.c_size_t
        lib.dnnl_memory_desc_equal.argtypes = [_P, _P]
        lib.dnnl_primitive_create.argtypes = [_P, _P]
        lib.dnnl_primitive_execute.argtypes = [_P, _P, _I, _P]
        lib.dnnl_primitive_desc_query.argtypes = [_P, _I, _I, _P]
        lib.dnnl_primitive_desc_query_md.argtypes, lib.dnnl_primitive_desc_query_md.restype = [_P, _I, _I], _P
        lib.dnnl_memory_desc_clone.argtypes = [_P, _P]
        lib.dnnl_primitive_attr_create.argtypes = [_P]
        lib.dnnl_primitive_attr_set_scratchpad_mode.argtypes = [_P, _I]
        lib.dnnl_primitive_attr_set_post_ops.argtypes = [_P, _P]
        lib.dnnl_primitive_attr_set_scales_mask.argtypes = [_P, _I, _I]
        lib.dnnl_post_ops_create.argtypes = [_P]
        lib.dnnl_post_ops_append_eltwise.argtypes = [_P, _I, _F, _F]
        lib.dnnl_post_ops_append_sum.argtypes = [_P, _F, ctypes.c_int32, _I]
        lib.dnnl_post_ops_append_prelu.argtypes = [_P, _I]
        lib.dnnl_post_ops_append_binary.argtypes = [_P, _I, _P]
        for kind in ("engine", "stream", "memory", "memory_desc", "primitive", "primitive_desc", "primitive_attr", "post_ops"):
            getattr(lib, f"dnnl_{kind}_destroy").argtypes = [_P]

    def create(self, make: str, destroy: str, *arguments: Any) -> _Handle:
        """Calls dnnl_<make>(&object, ...); the object lives as long as the handle. Unsupported or BackendError on failure."""
        value = self._make(f"dnnl_{make}", arguments)
        return _Handle(value, getattr(self.lib, f"dnnl_{destroy}"))

    def _make(self, function: str, arguments: Sequence[Any]) -> int:
        value = _P()
        status = getattr(self.lib, function)(ctypes.byref(value), *arguments)
        if status in (2, 3):
            raise Unsupported(f"{function}: {describe(status)}")
        if status or value.value is None:
            raise BackendError(f"{function} failed: {describe(status)}")
        return value.value

    def _descriptor(self, function: str, *arguments: Any) -> Descriptor:
        value = self._make(function, arguments)
        return Descriptor(value, self.lib.dnnl_memory_desc_destroy, self.lib.dnnl_memory_desc_get_size(value))

    def strided(self, shape: Ints, strides: Ints, dtype: int) -> Descriptor:
        """Describes an array by strides counted in elements."""
        return self._descriptor("dnnl_memory_desc_create_with_strides", len(shape), dims(shape), dtype, dims(strides))

    def any(self, shape: Ints, dtype: int) -> Descriptor:
        """Describes an array whose layout the primitive may choose."""
        return self._descriptor("dnnl_memory_desc_create_with_tag", len(shape), dims(shape), dtype, _ANY_TAG)

    def argument(self, descriptor: PrimitiveDescriptor, number: int) -> Descriptor:
        """The layout of one argument as the primitive wants it; nbytes 0 when it takes no such argument."""
        found = self.lib.dnnl_primitive_desc_query_md(descriptor.value, _QUERY_ARGUMENT, number)
        return self._descriptor("dnnl_memory_desc_clone", found)

    def equal(self, a: Descriptor, b: Descriptor) -> bool:
        return bool(self.lib.dnnl_memory_desc_equal(a.value, b.value))

    def memory(self, descriptor: Descriptor) -> _Handle:
        """A memory object without memory; Primitive gives it an address before each run."""
        return self.create("memory_create", "memory_destroy", descriptor.value, self.engine.value, None)

    def attributes(self, *post_ops: tuple[Any, ...], scales: Sequence[int] = ()) -> _Handle:
        """Attributes with our scratchpad and post-ops, each ("eltwise", algorithm, alpha, beta), ("sum", scale), ("prelu", mask)
        or ("binary", algorithm, descriptor), and one run-time scale for each argument number in `scales`."""
        attributes = self.create("primitive_attr_create", "primitive_attr_destroy")
        self._check(self.lib.dnnl_primitive_attr_set_scratchpad_mode(attributes.value, 1))
        for number in scales:
            self._check(self.lib.dnnl_primitive_attr_set_scales_mask(attributes.value, number, 0))
        if post_ops:
            chain = self.create("post_ops_create", "post_ops_destroy")
            for kind, *values in post_ops:
                self._append(chain, kind, values)
            self._check(self.lib.dnnl_primitive_attr_set_post_ops(attributes.value, chain.value))
        return attributes

    def _append(self, chain: _Handle, kind: str, values: Sequence[Any]) -> None:
        if kind == "eltwise":
            self._check(self.lib.dnnl_post_ops_append_eltwise(chain.value, *values))
        elif kind == "sum":
            self._check(self.lib.dnnl_post_ops_append_sum(chain.value, values[0], 0, 0))
        elif kind == "prelu":
            self._check(self.lib.dnnl_post_ops_append_prelu(chain.value, *values))
        else:
            self._check(self.lib.dnnl_post_ops_append_binary(chain.value, values[0], values[1].value))

    def _check(self, status: int) -> None:
        if status in (2, 3):
            raise Unsupported(describe(status))
        if status:
            raise BackendError(f"oneDNN failed: {describe(status)}")

    def primitive_descriptor(self, kind: str, *arguments: Any) -> PrimitiveDescriptor:
        """dnnl_<kind>_primitive_desc_create; handles and tuples of ints are passed as the C API wants them.

        Unsupported also where oneDNN has only its reference code, which takes up to a thousand times as long as NumPy."""
        plain = [dims(a) if isinstance(a, tuple) else a.value if isinstance(a, _Handle) else a for a in arguments]
        value = self._make(f"dnnl_{kind}_primitive_desc_create", (self.engine.value, *plain))
        descriptor = PrimitiveDescriptor(value, self.lib.dnnl_primitive_desc_destroy)
        if self.implementation(descriptor).startswith("ref"):
            raise Unsupported(f"{kind}: only reference code")
        return descriptor

    def reorder(self, source: Descriptor, target: Descriptor, *, add: bool = False) -> Primitive:
        """A copy from one layout and type to another; add: target += source."""
        attributes = self.attributes(("sum", 1.0)) if add else self.plain
        engine = self.engine.value
        value = self._make("dnnl_reorder_primitive_desc_create", (source.value, engine, target.value, engine, attributes.value))
        return Primitive(self, PrimitiveDescriptor(value, self.lib.dnnl_primitive_desc_destroy), (SRC, DST))

    def sum(self, target: Descriptor, sources: Sequence[Descriptor], scales: Sequence[float]) -> Primitive:
        """target = sum of scales[i] * sources[i]."""
        count = len(sources)
        factors, parts = (_F * count)(*scales), (_P * count)(*[s.value for s in sources])
        value = self._make("dnnl_sum_primitive_desc_create", (self.engine.value, target.value, count, factors, parts, self.plain.value))
        descriptor = PrimitiveDescriptor(value, self.lib.dnnl_primitive_desc_destroy)
        return Primitive(self, descriptor, (*(MULTIPLE_SRC + i for i in range(count)), DST))

    def implementation(self, descriptor: PrimitiveDescriptor) -> str:
        """The name of the implementation oneDNN picked, such as "brgconv:avx512_core_bf16"."""
        name = ctypes.c_char_p()
        self._check(self.lib.dnnl_primitive_desc_query(descriptor.value, _QUERY_IMPLEMENTATION, 0, ctypes.byref(name)))
        return (name.value or b"").decode()

    def instruction_set(self) -> int:
        """The bits of dnnl_cpu_isa_t that oneDNN uses on this machine."""
        return int(self.lib.dnnl_get_effective_cpu_isa())
