"""wgmma on the emulator: products of matrices laid out as the PTX manual says, by descriptors of any kind, and planted faults of every kind."""

from __future__ import annotations

from contextlib import suppress

import ml_dtypes
import numpy as np
import pytest
from test_cuda_emulator import Planted, array

from caffelite.backends.cuda.emulator import ORDERS, EmulatedProgram, EmulatorDriver
from caffelite.backends.cuda.emulator.build import HERE, OWN
from caffelite.errors import BackendError

ATOM, DEPTH = 1024, 16
SOURCE = """
#include "common.cuh"
template <int J>
__device__ void put(float* y, float (&d)[J][4]) {
  int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  for (int j = 0; j < J; ++j)
    for (int e = 0; e < 4; ++e) y[(row + e / 2 * 8) * 8 * J + 8 * j + column + e % 2] = d[j][e];
}
// d = 1 + a b, of shared memory that holds `bytes` of `image`: a at its beginning, b `b_at` bytes behind.
template <int J, int ACROSS_A, int ACROSS_B>
__global__ void product(const unsigned char* image, float* y, int bytes, int b_at, int leading_a, int stride_a, int leading_b, int stride_b, long long flip_a,
                        long long flip_b) {
  CF_DYNAMIC_SHARED_1024(unsigned char, shared);
  for (int i = threadIdx.x; i < bytes; i += 128) shared[i] = image[i];
  cf_fence_proxy_async();
  __syncthreads();
  float d[J][4];
  for (int j = 0; j < J; ++j)
    for (int e = 0; e < 4; ++e) d[j][e] = 1;
  cf_wgmma_fence();
  cf_u64 a = cf_wgmma_descriptor(shared, leading_a, stride_a), b = cf_wgmma_descriptor(shared + b_at, leading_b, stride_b);
  cf_wgmma_m64k16_bf16<ACROSS_A, ACROSS_B>(d, a ^ flip_a, b ^ flip_b);
  cf_wgmma_commit();
  cf_wgmma_wait<0>();
  put(y, d);
}
// Two products of ones, one after the other, 16 each; `fault` names what is wrong.
enum {
  NOTHING, NO_PROXY_FENCE, PROXY_FENCE_TOO_LATE, COPY_NOT_AWAITED, NO_BARRIER, NO_FENCE, NO_WAIT, NO_COMMIT, TOO_FEW_AWAITED,
  OVERWRITTEN, DISAGREE, A_WARP_LESS, ASKEW, OUTSIDE
};
__global__ void planted(const unsigned char* image, float* y, int fault) {
  CF_DYNAMIC_SHARED_1024(unsigned char, shared);
  for (int i = 16 * threadIdx.x; i < 16384; i += 2048) cf_cp_async16(shared + i, image + i, 16);
  cf_cp_commit();
  if (fault != COPY_NOT_AWAITED) cf_cp_wait<0>();
  if (fault != NO_PROXY_FENCE && fault != PROXY_FENCE_TOO_LATE) cf_fence_proxy_async();
  if (fault != NO_BARRIER) __syncthreads();
  if (fault == PROXY_FENCE_TOO_LATE && threadIdx.x % 2) cf_fence_proxy_async();  // some of the writers, and not the barrier's readers
  float d[8][4] = {};
  cf_u64 a = cf_wgmma_descriptor(shared, 16, 1024), b = cf_wgmma_descriptor(shared + 8192, 16, 1024);
  if (fault == DISAGREE && threadIdx.x / 32 == 2) b += 2;
  if (fault == ASKEW) a += 8;
  if (fault == OUTSIDE) b += 512;
  if (fault != NO_FENCE) cf_wgmma_fence();
  if (fault == A_WARP_LESS && threadIdx.x < 32) return;
  cf_wgmma_m64k16_bf16<0, 0>(d, a, b);
  cf_wgmma_commit();
  if (fault == OVERWRITTEN && threadIdx.x == 77) shared[8192] = 0;
  cf_wgmma_m64k16_bf16<0, 0>(d, a + 2, b + 2);
  if (fault != NO_COMMIT) cf_wgmma_commit();
  if (fault == TOO_FEW_AWAITED) cf_wgmma_wait<1>();
  else if (fault != NO_WAIT) cf_wgmma_wait<0>();
  put(y, d);
  if (fault == NO_COMMIT) cf_wgmma_commit();
  cf_wgmma_wait<0>();
}
__global__ void leaves(const unsigned char* image, float* y, int fault) {
  CF_DYNAMIC_SHARED_1024(unsigned char, shared);
  for (int i = threadIdx.x; i < 16384; i += 128) shared[i] = image[i];
  __syncthreads();
  cf_fence_proxy_async();  // the readers' own does as well
  float d[8][4] = {};
  cf_wgmma_fence();
  cf_wgmma_m64k16_bf16<0, 0>(d, cf_wgmma_descriptor(shared, 16, 1024), cf_wgmma_descriptor(shared + 8192, 16, 1024));
  cf_wgmma_commit();
  if (!fault) cf_wgmma_wait<0>();
}
"""
FAULTS = {  # what the check says, and what else must come out wrong without it: the value, or nothing that shows
    "NO_PROXY_FENCE": ("wgmma READS WHAT WAS WRITTEN WITHOUT fence.proxy.async", None),
    "PROXY_FENCE_TOO_LATE": ("wgmma READS WHAT WAS WRITTEN WITHOUT fence.proxy.async", None),
    "COPY_NOT_AWAITED": ("IN-FLIGHT cp.async", np.nan),
    "NO_BARRIER": ("RACE read-after-write", None),
    "NO_FENCE": ("wgmma WITHOUT wgmma.fence", "told"),
    "NO_WAIT": ("ACCUMULATORS OF A wgmma TOUCHED BEFORE wgmma.wait_group", np.nan),
    "NO_COMMIT": ("ACCUMULATORS OF A wgmma TOUCHED BEFORE wgmma.wait_group", np.nan),
    "TOO_FEW_AWAITED": ("ACCUMULATORS OF A wgmma TOUCHED BEFORE wgmma.wait_group", np.nan),
    "OVERWRITTEN": ("WRITE TO WHAT A wgmma IN FLIGHT READS", 32.0),
    "DISAGREE": ("WARPS OF A WARPGROUP DISAGREE", "told"),
    "A_WARP_LESS": ("DEADLOCK", "told"),
    "ASKEW": ("wgmma: MISALIGNED swizzle atom", "told"),
    "OUTSIDE": ("wgmma READS OUTSIDE DYNAMIC SHARED MEMORY", "told"),
}
NUMBERS = ["NOTHING", *FAULTS]
SHAPES = [(across_a, across_b, n) for n in (64, 96, 128, 192) for across_a, across_b in ((0, 0), (1, 1), (0, 1), (1, 0)) if n != 96 or not across_b]
NAMES = {(a, b, n): f"product<{n // 8}, {a}, {b}>" for a, b, n in SHAPES}


# Of 64 rows nothing lies `leading` bytes (bits 16 to 29) further.
BITS = [
    (bit, across, operand)
    for bit, across in ((1, 0), (6, 0), (9, 1), (26, 1), (38, 0), (38, 1), (49, 0), (62, 0), (63, 1))
    for operand in (0, 1)
    if bit != 26 or operand
]


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    planted = Planted("planted", ["planted", "leaves", *NAMES.values()])
    planted.folder = tmp_path_factory.mktemp("planted")
    planted.path.write_text(SOURCE)
    return planted


@pytest.fixture(scope="module", params=["fast", "check"])
def program(module: Planted, request: pytest.FixtureRequest) -> EmulatedProgram:
    return EmulatorDriver(request.param, "up").load(module)  # what a fault does depends on the order


def laid_out(matrix: np.ndarray, across: int, leading: int, stride: int, size: int) -> np.ndarray:
    """Bytes of shared memory that hold matrix (rows, 16) as the manual's canonical layouts with a 128-byte swizzle have it.

    Along k: atoms of 8 rows, 128 bytes each, `stride` bytes apart. Across: atoms of 8 columns k, each of 64 rows' values in 128 bytes, `stride`
    apart, and `leading` from 64 rows to the next 64. Address bits 4 to 6 are changed by bits 7 to 9.
    """
    image = np.zeros(size // 2, np.uint16)
    for (row, k), bits in np.ndenumerate(matrix.astype(ml_dtypes.bfloat16).view(np.uint16)):
        address = row % 64 * 2 + row // 64 * leading + k % 8 * 128 + k // 8 * stride if across else k * 2 + row % 8 * 128 + row // 8 * stride
        image[(address ^ (address // 128 % 8) * 16) // 2] = bits
    return image.view(np.uint8)


def multiply(
    program: EmulatedProgram, across_a: int, across_b: int, n: int, *, apart: int = 1, flip: tuple[int, int] = (0, 0)
) -> tuple[np.ndarray, np.ndarray]:
    """What a wgmma of small whole numbers gives, and what it should. apart: atoms from one to the next."""
    rng = np.random.default_rng(5)
    a, b = rng.integers(-4, 5, (64, DEPTH)), rng.integers(-4, 5, (n, DEPTH))
    images, strides = [], []
    for matrix, across in ((a, across_a), (b, across_b)):
        stride = apart * ATOM
        leading = 2 * stride + ATOM if across else 16
        atoms = (len(matrix) // 64 * leading + 2 * stride if across else len(matrix) // 8 * stride) // ATOM + 1
        images.append(laid_out(matrix, across, leading, stride, atoms * ATOM))
        strides += [np.int32(leading), np.int32(stride)]
    image, y = array(np.concatenate([*images, np.zeros(4 * ATOM, np.uint8)])), array(np.zeros((64, n), np.float32))
    numbers = [np.int32(image.size), np.int32(len(images[0])), *strides, *(np.int64(bits) for bits in flip)]
    program.launch(NAMES[across_a, across_b, n], (1, 1, 1), (128, 1, 1), [image, y, *numbers], image.size)
    return EmulatorDriver("fast").to_host(y), 1.0 + a @ b.T


@pytest.mark.parametrize(("across_a", "across_b", "n"), SHAPES)
def test_a_product_is_read_through_its_descriptors(program: EmulatedProgram, across_a: int, across_b: int, n: int) -> None:
    for apart in (1, 2):
        np.testing.assert_array_equal(*multiply(program, across_a, across_b, n, apart=apart))


@pytest.mark.parametrize(("bit", "across", "operand"), BITS)
def test_a_wrong_bit_of_a_descriptor_shows(program: EmulatedProgram, bit: int, across: int, operand: int) -> None:
    """Of the start, leading, stride, base and swizzle; bit 62 as no swizzle, 63 as another one."""
    flip = (1 << bit) - (1 << 64 if bit == 63 else 0)
    flips = (flip, 0) if operand == 0 else (0, flip)
    with suppress(BackendError):  # an error tells it too
        got, want = multiply(program, across, across, 128, flip=flips)
        assert (got != want).any()


def planted(program: EmulatedProgram, fault: str) -> np.ndarray:
    image, y = array(np.full(8192, 1, ml_dtypes.bfloat16).view(np.uint8)), array(np.zeros((64, 64), np.float32))
    program.launch("planted", (1, 1, 1), (128, 1, 1), [image, y, np.int32(NUMBERS.index(fault))], 16384)
    return EmulatorDriver("fast").to_host(y)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(program: EmulatedProgram, fault: str) -> None:
    said, value = FAULTS[fault]
    if program._driver.mode == "check" or value == "told":
        with pytest.raises(BackendError, match=said):
            planted(program, fault)
    elif value is not None:
        assert not (planted(program, fault) == 32).all(), "wrong also where nothing is checked"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mode", ["fast", "check"])
def test_a_sound_pipeline_is_sound_in_any_order(module: Planted, mode: str, order: str) -> None:
    program = EmulatorDriver(mode, order).load(module)
    np.testing.assert_array_equal(planted(program, "NOTHING"), np.full((64, 64), 32.0))


def test_nobody_leaves_a_product_behind(program: EmulatedProgram) -> None:
    image, y = array(np.zeros(16384, np.uint8)), array(np.zeros((64, 64), np.float32))
    program.launch("leaves", (1, 1, 1), (128, 1, 1), [image, y, np.int32(0)], 16384)
    with pytest.raises(BackendError, match="A THREAD EXITS while a wgmma of its is in flight"):
        program.launch("leaves", (1, 1, 1), (128, 1, 1), [image, y, np.int32(1)], 16384)


def test_a_fault_has_its_line(module: Planted) -> None:
    with pytest.raises(BackendError) as caught:
        planted(EmulatorDriver("check").load(module), "NO_FENCE")
    line = int(str(caught.value).split("planted.cu:")[1].split()[0])
    assert "cf_wgmma_m64k16_bf16<0, 0>(d, a, b);" in SOURCE.split("\n")[line - 1]


def test_the_emulator_is_compiled_anew_when_a_file_of_its_changes() -> None:
    assert {path.name for path in OWN} == {path.name for path in HERE.iterdir() if path.suffix in (".h", ".cpp")}
