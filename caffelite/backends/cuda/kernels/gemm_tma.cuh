// gemm_tma.cuh - wgmma's main loop (gemm_wgmma.cuh) with operands that TMA brings: those that are plain matrices. Weights are, in every forward
// product, and in data gradients of stride 1; pixels are where a kernel has one cell, stride 1 and no pad (and in forward and data gradient one
// group, since k goes on into the next one's channels); dy always is in the weight gradient. Others are gathered by cp.async beside.
//
// One thread asks for a slice's boxes of 128 bytes along memory: BM, or BN, rows of an operand that lies along k, or 64 pixels k for each
// 64 columns of one that lies across. An mbarrier for each slot counts their bytes, its phases are the rounds of the slots, and every
// thread waits for it, as for its own copies, before the slice's barrier. Nothing else changes: slots are free when they were. Column sums of dy read
// a slot by ldmatrix, through the generic proxy: what they read has been added up, and two barriers passed, before a box overwrites it, so that there
// is nothing for a proxy fence to order. What a block writes into its slots by itself comes after its last box.
// What a gather costs falls away: 8 to 20 instructions and a copy for each 16 bytes. Bytes, operations and shared memory are as in
// gemm_wgmma.cuh, 64 bytes of mbarriers more in weight gradients (elsewhere they lie behind the taps). Not measured.
// Ladder: 1. to 3. see gemm_wgmma.cuh; 4. this. Next: a warp of its own that loads, and blocks that go on to further tiles.
#pragma once
#include "gemm_wgmma.cuh"

struct NoGather {
  __device__ __forceinline__ void fetch(unsigned char*, unsigned char*) const {}
};

// LEFT, RIGHT: whether A, and B, come in boxes; the others through `gather`.
template <class Tile, bool KMAJOR, bool LEFT, bool RIGHT, class Gather>
struct BoxLoader {
  static constexpr bool COPIES = !(LEFT && RIGHT);
  static constexpr int BYTES = (LEFT ? Tile::A_BYTES : 0) + (RIGHT ? Tile::B_BYTES : 0);
  Gather gather;
  const cf_tensor_map &left, &right;
  int m, n, k;         // the block's first row, or column, in the matrices; the next slice's first column k
  cf_u64* arrivals;    // an mbarrier for each slot
  int slot;

  __device__ __forceinline__ void fetch(unsigned char* a, unsigned char* b) {  // and moves on
    if (threadIdx.x == 0) {
      cf_mbarrier_expect(arrivals + slot, BYTES);
      if (LEFT) load<Tile::M>(a, left, m);
      if (RIGHT) load<Tile::N>(b, right, n);
    }
    gather.fetch(a, b);
    k += Tile::SLICE / 2;
    slot = slot + 1 < Tile::STAGES ? slot + 1 : 0;
  }
  template <int SIZE>
  __device__ __forceinline__ void load(unsigned char* to, const cf_tensor_map& map, int at) const {
    if constexpr (KMAJOR) {
      cf_load_box(to, map, k, at, arrivals + slot);
    } else {
#pragma unroll
      for (int panel = 0; panel < SIZE / 64; ++panel) cf_load_box(to + panel * Tile::PANEL, map, at + 64 * panel, k, arrivals + slot);
    }
  }
  __device__ __forceinline__ void await(int slice) const { cf_mbarrier_wait(arrivals + slice % Tile::STAGES, slice / Tile::STAGES & 1); }
};

// The mbarriers, ready for use after the block's next barrier.
template <class Tile>
__device__ __forceinline__ cf_u64* make_arrivals(unsigned char* behind) {
  cf_u64* arrivals = reinterpret_cast<cf_u64*>(behind);
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < Tile::STAGES; ++slot) cf_mbarrier_init(arrivals + slot, 1);
    cf_fence_proxy_async();
  }
  return arrivals;
}
