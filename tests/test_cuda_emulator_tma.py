"""TMA and mbarriers on the emulator: boxes of a matrix, inside and across its edges, and planted faults of every kind."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from test_cuda_emulator import Planted, array

from caffelite.backends.cuda.array import Boxes
from caffelite.backends.cuda.emulator import ORDERS, EmulatedProgram, EmulatorDriver
from caffelite.errors import BackendError

ROWS, COLUMNS, HEIGHT = 37, 104, 16
SOURCE = """
#include "common.cuh"
enum {
  NOTHING, NO_INIT, NO_INIT_FENCE, NO_INIT_BARRIER, NO_WAIT, ONE_THREAD_WAITS, TOO_FEW_BYTES, NO_ARRIVAL, WRONG_PHASE, OVERWRITTEN, ASKEW, OUTSIDE, LEFT_BEHIND
};
// y: the two boxes (16 x 64 each) from (row, column) and 64 columns on, as floats.
__global__ void boxes(const __grid_constant__ cf_tensor_map map, float* y, int row, int column, int fault) {
  CF_DYNAMIC_SHARED_1024(unsigned char, shared);
  cf_u64* arrival = reinterpret_cast<cf_u64*>(shared + 4096);
  if (threadIdx.x == 0 && fault != NO_INIT) {
    cf_mbarrier_init(arrival, 1);
    if (fault != NO_INIT_FENCE) cf_fence_proxy_async();
  }
  if (fault != NO_INIT_BARRIER) __syncthreads();
  for (int turn = 0; turn < 2; ++turn) {
    if (threadIdx.x == 0) {
      if (fault != NO_ARRIVAL) cf_mbarrier_expect(arrival, fault == TOO_FEW_BYTES ? 1024 : 2048);
      unsigned char* to = shared + (fault == ASKEW ? 128 : fault == OUTSIDE ? 3072 : 0);
      cf_load_box(to, map, column + 64 * turn, row, arrival);
    }
    if (fault == LEFT_BEHIND) return;
    if (fault == OVERWRITTEN && threadIdx.x == 0) shared[100] = 0;
    int parity = fault == WRONG_PHASE ? 1 - turn : turn;
    if (fault != NO_WAIT && (fault != ONE_THREAD_WAITS || threadIdx.x == 0)) cf_mbarrier_wait(arrival, parity);
    for (int i = threadIdx.x; i < 1024; i += 128) {
      int r = i / 64, c = i % 64, at = r * 128 + ((c / 8) ^ (r & 7)) * 16 + c % 8 * 2;
      y[turn * 1024 + i] = to_float(*reinterpret_cast<const bf16*>(shared + at));
    }
    __syncthreads();
  }
}
// d = a b of two boxes, 64 x 64 each; wait: which warps wait for them.
__global__ void product(const __grid_constant__ cf_tensor_map map, float* y, int wait) {
  CF_DYNAMIC_SHARED_1024(unsigned char, shared);
  cf_u64* arrival = reinterpret_cast<cf_u64*>(shared + 16384);
  if (threadIdx.x == 0) {
    cf_mbarrier_init(arrival, 1);
    cf_fence_proxy_async();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    cf_mbarrier_expect(arrival, 16384);
    cf_load_box(shared, map, 0, 0, arrival);
    cf_load_box(shared + 8192, map, 0, 64, arrival);
  }
  if (wait >> threadIdx.x / 32 & 1) cf_mbarrier_wait(arrival, 0);
  float d[8][4] = {};
  cf_wgmma_fence();
  cf_u64 a = cf_wgmma_descriptor(shared, 16, 1024), b = cf_wgmma_descriptor(shared + 8192, 16, 1024);
  for (int k = 0; k < 4; ++k) cf_wgmma_m64k16_bf16<0, 0>(d, a + 2 * k, b + 2 * k);
  cf_wgmma_commit();
  cf_wgmma_wait<0>();
  int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  for (int j = 0; j < 8; ++j)
    for (int e = 0; e < 4; ++e) y[(row + e / 2 * 8) * 64 + 8 * j + column + e % 2] = d[j][e];
}
"""
FAULTS = {  # what is said in check mode; whether also in fast mode
    "NO_INIT": ("mbarrier WITHOUT mbarrier.init", "told"),
    "NO_INIT_FENCE": ("mbarrier INITIALISED WITHOUT fence.proxy.async", "told"),
    "NO_INIT_BARRIER": ("RACE with mbarrier.init", "told"),
    "NO_WAIT": ("ACCESS TO A BOX IN FLIGHT|A BLOCK EXITS", "told"),
    "ONE_THREAD_WAITS": ("RACE read-after-write|ACCESS TO A BOX IN FLIGHT", ""),
    "TOO_FEW_BYTES": ("DEADLOCK", "told"),
    "NO_ARRIVAL": ("DEADLOCK", "told"),
    "WRONG_PHASE": ("ACCESS TO A BOX IN FLIGHT|DEADLOCK", "told"),
    "OVERWRITTEN": ("ACCESS TO A BOX IN FLIGHT", ""),
    "ASKEW": ("TMA: MISALIGNED box", "told"),
    "OUTSIDE": ("TMA: A BOX OUTSIDE DYNAMIC SHARED MEMORY", "told"),
    "LEFT_BEHIND": ("A BLOCK EXITS while boxes are in flight", "told"),
}
NUMBERS = ["NOTHING", *FAULTS]


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    planted = Planted("planted", ["boxes", "product"])
    planted.folder = tmp_path_factory.mktemp("planted")
    planted.path.write_text(SOURCE)
    return planted


@pytest.fixture(scope="module", params=["fast", "check"])
def program(module: Planted, request: pytest.FixtureRequest) -> EmulatedProgram:
    return EmulatorDriver(request.param, "up").load(module)  # what a fault does depends on the order


def matrix(rows: int, columns: int, height: int) -> tuple[Boxes, np.ndarray]:
    values = np.random.default_rng(7).integers(-9, 10, (rows, columns)).astype(ml_dtypes.bfloat16)
    return Boxes(array(values), rows, columns, height), values.astype(np.float64)


def load(program: EmulatedProgram, boxes: Boxes, row: int, column: int, fault: str = "NOTHING") -> Any:
    y = array(np.zeros((2, HEIGHT, 64), np.float32))
    program.launch("boxes", (1, 1, 1), (128, 1, 1), [boxes, y, np.int32(row), np.int32(column), np.int32(NUMBERS.index(fault))], 4096 + 64)
    return EmulatorDriver("fast").to_host(y)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (3, 5), (30, 0), (-4, -20), (40, 200)])
def test_boxes_hold_zeros_outside_the_matrix(program: EmulatedProgram, row: int, column: int) -> None:
    boxes, values = matrix(ROWS, COLUMNS, HEIGHT)
    around = np.zeros((ROWS + 200, COLUMNS + 600))
    around[50 : 50 + ROWS, 50 : 50 + COLUMNS] = values
    want = [around[50 + row : 66 + row, 50 + start : 114 + start] for start in (column, column + 64)]
    np.testing.assert_array_equal(load(program, boxes, row, column), want)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(program: EmulatedProgram, fault: str) -> None:
    boxes, _ = matrix(ROWS, COLUMNS, HEIGHT)
    said, how = FAULTS[fault]
    if program._driver.mode == "check" or how == "told":
        with pytest.raises(BackendError, match=said):
            load(program, boxes, 0, 0, fault)


@pytest.mark.parametrize("mode", ["fast", "check"])
@pytest.mark.parametrize("order", ORDERS)
def test_products_of_boxes_in_any_order(module: Planted, order: str, mode: str) -> None:
    boxes, values = matrix(128, 64, 64)
    y = array(np.zeros((64, 64), np.float32))
    EmulatorDriver(mode, order).load(module).launch("product", (1, 1, 1), (128, 1, 1), [boxes, y, np.int32(15)], 16384 + 64)
    np.testing.assert_array_equal(EmulatorDriver("fast").to_host(y), values[:64] @ values[64:].T)


def test_each_warp_has_to_wait(module: Planted) -> None:
    for warps in (7, 11, 14):
        arguments = [matrix(128, 64, 64)[0], array(np.zeros((64, 64), np.float32)), np.int32(warps)]
        with pytest.raises(BackendError, match="wgmma READS A BOX THAT A WARP HAS NOT WAITED FOR"):
            EmulatorDriver("check").load(module).launch("product", (1, 1, 1), (128, 1, 1), arguments, 16384 + 64)


def test_a_matrix_beyond_its_array_is_read_out_of_bounds(module: Planted) -> None:
    boxes, _ = matrix(ROWS, COLUMNS, HEIGHT)
    with pytest.raises(BackendError, match="OUT-OF-BOUNDS read"):
        load(EmulatorDriver("check").load(module), Boxes(boxes.array, ROWS + 9, COLUMNS, HEIGHT), 30, 0)


def test_matrices_have_a_parameter_of_their_own(module: Planted) -> None:
    boxes, _ = matrix(ROWS, COLUMNS, HEIGHT)
    program = EmulatorDriver("fast").load(module)
    with pytest.raises(BackendError, match="product, argument 1: a matrix in boxes for the parameter Pf4"):
        program.launch("product", (1, 1, 1), (128, 1, 1), [boxes, boxes, np.int32(15)], 16384 + 64)
    with pytest.raises(BackendError, match="TMA: MISALIGNED matrix"):
        load(program, Boxes(boxes.array.at(2, (ROWS, COLUMNS - 1), (2 * COLUMNS, 2), boxes.array.dtype), ROWS, COLUMNS, HEIGHT), 0, 0)
