// gemm_wgmma.cuh - the main loop on tensor cores by wgmma (Hopper, sm_90a): bf16 operands from shared memory, sums in float. Loaders, ways
// out and the bias gradient are those of gemm_mma.cuh.
//
// A block of two warpgroups makes BM x BN of C, each warpgroup half its rows, or its columns where BM is no multiple of 128. Slices of 128 bytes
// along k (64 bf16, four wgmma for each 64 rows) come by cp.async; a fence makes a thread's own copies visible to the async proxy, through which
// wgmma reads, and one barrier a slice shows them to all. A warpgroup leaves a slice's products running while the next slice's
// are started and further ones fetched: it waits only for those before. So a slot is free for a copy two slices after its own, and STAGES - 2
// slices are on their way.
// A slice lies in atoms of 8 rows of 128 bytes whose 16-byte chunks are permuted by the row's number, as chunk_of does: what the hardware
// calls a 128-byte swizzle, counted from multiples of 1024 bytes. Along k (forward, data gradient) rows are rows of the operand. Along m or n
// (weight gradient: both operands as they lie in memory) rows are pixels k, and panels of 64 columns follow one another, 8192 bytes each.
//
//            warpgroups  sums a  slots  shared   blocks   FLOP for a byte of bf16 read
//  block     (m x n)     thread         bytes    an SM    from shared   from L2
// 128 x 64    2 x 1        32      4     99,328     2         32          43
// 128 x 96    2 x 1        48      4    115,712     2         38          55
// 128 x 128   2 x 1        64      3     99,328     2         43          64
// 128 x 192   2 x 1        96      5    205,824     1         48          77
// 256 x 96    2 x 1        96      5    227,328     1         38          70
// 256 x 192   2 x 1       192      4    231,424     1         48         110
//  64 x 128   1 x 2        32      4     98,816     2         32          43      these four: weight gradients, m their outputs
// 128 x 128   2 x 1        64      3     99,328     2         43          64
// 192 x 128   1 x 2        96      5    206,336     1         32          77
// 256 x 128   2 x 1       128      4    198,656     1         43          85
// Bytes from shared: every wgmma reads 64 rows of A and all its columns of B. An SM's tensor cores make 4096 FLOP a clock, shared memory gives
// 128 bytes. Nothing lies in static shared memory, which would come before the slots and move them off their boundary.
// Registers: tests/data/cuda-resources.csv. Operations: 2 M N K. Not measured.
//
// tf32 stays on mma.sync: wgmma cuts off its low 13 bits, so that operands had to be rounded in shared memory, a pass over every slice that reads
// and writes more bytes there than the products read; and it has no operands across k. Images (3 channels, pieces of 8 bytes) stay there too.
// Ladder: 1. one tile, slices through registers; 2. mma.sync and cp.async (gemm_mma.cuh); 3. this; 4. TMA (gemm_tma.cuh). Not measured.
#pragma once
#include "gemm_mma.cuh"

template <int M_, int N_>
struct GroupTile {
  static constexpr int M = M_, N = N_, SLICE = 128, THREADS = 256, GROUPS_M = M % 128 == 0 ? 2 : 1, GROUPS_N = 2 / GROUPS_M;
  static constexpr int WM = M / GROUPS_M, WN = N / GROUPS_N, MI = WM / 64, NJ = WN / 8;  // a warpgroup's part, in products of 64 rows; its columns
  static constexpr int BLOCKS = MI * NJ <= 16 ? 2 : 1;                               // of an SM, which bounds the registers
  static constexpr int A_BYTES = M * SLICE, B_BYTES = N * SLICE, STAGE_BYTES = A_BYTES + B_BYTES;
  static constexpr int FIT = (BLOCKS == 2 ? 112 : 225) * 1024 / STAGE_BYTES, STAGES = FIT < 5 ? FIT : 5, SLOTS = STAGES * STAGE_BYTES;
  static_assert(WM % 64 == 0 && WN % 8 == 0 && STAGES >= 3, "whole products; a slot that is read, one that may still be, one that is filled");
  static __device__ __forceinline__ int group() { return threadIdx.x / 128; }
  // Where this warp's fragments lie in the block: the first row of the i-th, the first column.
  static __device__ __forceinline__ int row(int i) { return group() / GROUPS_N * WM + 64 * i + (int)(threadIdx.x / 32 % 4) * 16; }
  static __device__ __forceinline__ int column() { return group() % GROUPS_N * WN; }
  // A chunk of a slice [k][row], in panels of 64 columns.
  template <int BYTES, bool WORDS, class Byte>
  static __device__ __forceinline__ Byte* across(Byte* slice, int row, int chunk) {
    static_assert(!WORDS && BYTES % 128 == 0, "16-bit values, whole panels");
    return slice + chunk / 8 * PANEL + along<SLICE>(row, chunk % 8);
  }
  static constexpr int ATOM = 1024, PANEL = SLICE / 2 * 128;
};

template <class Tile_, bool KMAJOR>
struct GroupProduct : Sums<Tile_> {
  typedef bf16 Kind;
  typedef Tile_ Tile;
  using Sums<Tile>::sum;
  static_assert(KMAJOR || Tile::WN % 64 == 0, "whole panels");

  // Starts a slice's products.
  __device__ __forceinline__ void start(const unsigned char* a, const unsigned char* b) {
    constexpr int LEADING = KMAJOR ? 16 : Tile::PANEL, ROWS = 64 * 128;     // 64 rows along k, or a panel of 64 columns: as many bytes
    constexpr int FURTHER = (KMAJOR ? 32 : 2 * Tile::ATOM) / 16;            // 16 columns k, in the units of a descriptor
    cf_u64 left = cf_wgmma_descriptor(a + Tile::group() / Tile::GROUPS_N * Tile::MI * ROWS, LEADING, Tile::ATOM);
    cf_u64 right = cf_wgmma_descriptor(b + Tile::column() * Tile::SLICE, LEADING, Tile::ATOM);
    cf_wgmma_fence();
#pragma unroll
    for (int k = 0; k < Tile::SLICE / 32; ++k)
#pragma unroll
      for (int i = 0; i < Tile::MI; ++i) cf_wgmma_m64k16_bf16<!KMAJOR, !KMAJOR>(sum[i], left + k * FURTHER + i * ROWS / 16, right + k * FURTHER);
    cf_wgmma_commit();
  }
  // No sum is set later, or read earlier, than here.
  __device__ __forceinline__ void hold() {
#pragma unroll
    for (int i = 0; i < Tile::MI; ++i)
#pragma unroll
      for (int j = 0; j < Tile::NJ; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) cf_hold(sum[i][j][e]);
  }
  // As MmaProduct::accumulate.
  template <class Loader, class Watch = Unwatched>
  __device__ __forceinline__ void accumulate(Loader& loader, unsigned char* shared, long long first, long long last, Watch watch = Watch()) {
    constexpr int BK = Tile::SLICE / 2, AHEAD = Tile::STAGES - 2;
    int slices = last > first ? (int)((last - first + BK - 1) / BK) : 0;
    auto fetch = [&](int slice) {
      unsigned char* slot = shared + slice % Tile::STAGES * Tile::STAGE_BYTES;
      if (slice < slices) loader.fetch(slot, slot + Tile::A_BYTES);
      if (Loader::COPIES) cf_cp_commit();  // an empty group too: the count of groups is the count of slices
    };
#pragma unroll
    for (int slice = 0; slice < AHEAD; ++slice) fetch(slice);
    hold();
#pragma unroll 1
    for (int slice = 0; slice < slices; ++slice) {
      if (Loader::COPIES) {
        cf_cp_wait<AHEAD - 1>();
        cf_fence_proxy_async();
      }
      loader.await(slice);
      __syncthreads();
      const unsigned char* slot = shared + slice % Tile::STAGES * Tile::STAGE_BYTES;
      start(slot, slot + Tile::A_BYTES);
      fetch(slice + AHEAD);
      watch(slot);
      cf_wgmma_wait<1>();
    }
    cf_wgmma_wait<0>();
    hold();
    cf_cp_wait<0>();
    __syncthreads();
  }
};

// Behind the slots: the block's taps, which are read anew for every slice since registers are short, or the sums of the bias gradient; 8 BM bytes.
constexpr int BEHIND_TAPS = 256;
template <class Tile>
__device__ __forceinline__ const Taps& kept_taps(unsigned char* shared, const Geometry& g, const Block& block, bool forward) {
  static_assert(sizeof(Taps) <= BEHIND_TAPS && BEHIND_TAPS + 64 <= 8 * Tile::M, "fits behind the slots");
  Taps* t = reinterpret_cast<Taps*>(shared + Tile::SLOTS);
  if (threadIdx.x == 0) *t = forward ? forward_taps(g, block) : backward_taps(g, block);
  __syncthreads();
  return *t;
}
