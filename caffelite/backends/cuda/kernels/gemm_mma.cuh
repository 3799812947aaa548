// gemm_mma.cuh - a main loop on tensor cores (mma.sync, Ampere and later): bf16 operands (m16n8k16), or float32 ones rounded to tf32
// (m16n8k8); sums in float. Operands come in pieces of 16 bytes, or 8 where an image's channels are padded to four.
//
// A block of 4 or 8 warps makes BM x BN of C. Slices of 64 bytes along k (32 bf16, 16 tf32) go from global to shared memory by cp.async, in
// STAGES slots, so that three are on their way while one is multiplied; one barrier a slice, which says both that the slice has come and that
// the slot to be filled next has been read. What lies outside an operand is written as zeros by the copy itself (valid_bytes).
// Shared memory has no padding: the 16-byte chunks of a row are permuted (chunk_of), so that the 8 rows that ldmatrix takes at once, and
// the 8 neighbours that a copy writes, lie in different banks.
// A thread's pieces of a k-major operand have one column in common: a slice costs one cell and channel a thread, and two comparisons and an
// address for each piece of A. Weight gradients read both operands [k][m]: bf16 by ldmatrix.trans, tf32 by single words, whose chunks are
// permuted for that. tf32 is rounded (cvt.rna) as fragments are loaded: tensor cores themselves would cut off the low 13 bits, and sums of
// one sign would lean by 7e-4.
// Sums leave through shared memory, 16 rows of a warp at a time, as vectors of 16 bytes where the result is aligned.
//
//            warps     sums a  shared   blocks an SM   FLOP for a byte of bf16 read
//  block     (m x n)   thread  bytes    H100 / A100    from shared   from L2
//  64 x 64    2 x 2      32    32,768      4 / 4            16          32
// 128 x 64    2 x 2      64    49,152      3 / 3            21          43
// 128 x 96    2 x 2      96    57,344      3 / 2            27          55
// 128 x 128   2 x 2     128    65,536      2 / 2            32          64
// 128 x 192   2 x 4      96    81,920      1 / 1            27          77
// (Weight gradients: 8 BM bytes more, for the bias gradient.) Blocks: by registers (65,536) and shared memory (228 or 164 KB). Bytes: A is read ceil(N/BN) times, B ceil(M/BM) times, (BM + BN) 64 a slice,
// mostly from L2; C is written once, and for each split once more in float.
// tf32: half the FLOP a byte. Shared memory gives 128 bytes a clock: 16 FLOP a byte are 2048 a clock, what an A100's tensor cores make; an
// H100's make 4096, of which mma.sync reaches about two thirds. Weight gradients use the transposed blocks (192x128, ...), since their m
// are the outputs. Registers: tests/data/cuda-resources.csv. Operations: 2 M N K. Not measured.
// Ladder: 1. one tile, 128x64, slices through registers in two slots; 2. this; 3. wgmma on Hopper (gemm_wgmma.cuh); 4. with TMA (gemm_tma.cuh).
#pragma once
#include "gemm_tensor.cuh"

template <int M_, int N_>
struct MmaTile {
  static constexpr int STAGES = 4, SLICE = 64;
  static constexpr int M = M_, N = N_, WARPS_M = M == 192 ? 4 : 2, WARPS_N = N == 192 ? 4 : 2, THREADS = 32 * WARPS_M * WARPS_N;
  static constexpr int WM = M / WARPS_M, WN = N / WARPS_N, MI = WM / 16, NJ = WN / 8;                 // a warp's part, in products of 16x8
  static constexpr int BLOCKS = MI * NJ <= 8 ? 4 : THREADS == 256 ? 1 : MI * NJ <= 24 ? 3 : 2;  // of an SM, which bounds the registers
  static constexpr int A_BYTES = M * SLICE, STAGE_BYTES = (M + N) * SLICE;
  // Where this warp's fragments lie in the block: the first row of the i-th, the first column.
  static __device__ __forceinline__ int row(int i) { return (int)(threadIdx.x >> 5) / WARPS_N * WM + 16 * i; }
  static __device__ __forceinline__ int column() { return (int)(threadIdx.x >> 5) % WARPS_N * WN; }
  // A chunk of a slice [k][row], in rows of BYTES.
  template <int BYTES, bool WORDS, class Byte>
  static __device__ __forceinline__ Byte* across(Byte* slice, int row, int chunk) {
    return slice + row * BYTES + chunk_of<BYTES / 16, WORDS>(row, chunk) * 16;
  }
};

// --- products ----------------------------------------------------------------------------------------------------------------

// Fragments of ROWS x k operands: 16 rows for A, 16 rows (two fragments of 8) for B. KMAJOR: [row][k] in shared memory; else [k][row].
template <class Kind, class Tile, bool KMAJOR, int ROWS>
struct Fragments;

template <class Tile, bool KMAJOR, int ROWS>
struct Fragments<bf16, Tile, KMAJOR, ROWS> {
  static constexpr int K = 16;
  static __device__ __forceinline__ void mma(float (&d)[4], const cf_u32 (&a)[4], const cf_u32 (&b)[2]) { cf_mma_m16n8k16_bf16(d, a, b); }
  // Four 8x8 matrices, each row's address given by one lane: rows and k of matrix i are 8 further where bit 0, or 1, of i says so for A, and
  // the other way round for B.
  static __device__ __forceinline__ void load(cf_u32 (&f)[4], const unsigned char* from, int row, int k, bool of_b) {
    int lane = threadIdx.x & 31, line = lane & 7, low = lane >> 3 & 1, high = lane >> 4, down = of_b ? high : low, further = of_b ? low : high;
    if (KMAJOR) {
      int at = row + down * 8 + line;
      cf_ldmatrix_x4(f, from + along<Tile::SLICE>(at, k / 8 + further));
    } else {
      int at = k + further * 8 + line;
      cf_ldmatrix_x4_trans(f, Tile::template across<ROWS * 2, false>(from, at, row / 8 + down));
    }
  }
};

template <class Tile, bool KMAJOR, int ROWS>
struct Fragments<tf32, Tile, KMAJOR, ROWS> {
  static constexpr int K = 8;
  static __device__ __forceinline__ void mma(float (&d)[4], const cf_u32 (&a)[4], const cf_u32 (&b)[2]) { cf_mma_m16n8k8_tf32(d, a, b); }
  static __device__ __forceinline__ void load(cf_u32 (&f)[4], const unsigned char* from, int row, int k, bool of_b) {
    int lane = threadIdx.x & 31;
    if (KMAJOR) {  // a row of an 8x8 matrix of 16 bits is 4 floats, one to a lane: just the fragment
      int line = lane & 7, low = lane >> 3 & 1, high = lane >> 4, down = of_b ? high : low, further = of_b ? low : high, at = row + down * 8 + line;
      cf_ldmatrix_x4(f, from + along<Tile::SLICE>(at, k / 4 + further));
    } else {
      int q = lane & 3;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int m = row + (lane >> 2) + (of_b ? i >> 1 : i & 1) * 8, at = k + q + (of_b ? i & 1 : i >> 1) * 4;
        f[i] = *reinterpret_cast<const cf_u32*>(Tile::template across<ROWS * 4, true>(from, at, m >> 2) + (m & 3) * 4);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) f[i] = cf_to_tf32(__uint_as_float(f[i]));
  }
};

template <class Kind_, class Tile_, bool KMAJOR>
struct MmaProduct : Sums<Tile_> {
  typedef Kind_ Kind;
  typedef Tile_ Tile;
  using Sums<Tile>::sum;

  __device__ __forceinline__ void multiply(const unsigned char* a, const unsigned char* b) {
    using Left = Fragments<Kind, Tile, KMAJOR, Tile::M>;
    using Right = Fragments<Kind, Tile, KMAJOR, Tile::N>;
    int m0 = Tile::row(0), n0 = Tile::column();
#pragma unroll
    for (int k = 0; k < Tile::SLICE / (int)sizeof(typename Storage<Kind>::type); k += Left::K) {
      cf_u32 left[Tile::MI][4], right[Tile::NJ / 2][4];
#pragma unroll
      for (int i = 0; i < Tile::MI; ++i) Left::load(left[i], a, m0 + 16 * i, k, false);
#pragma unroll
      for (int j = 0; j < Tile::NJ / 2; ++j) Right::load(right[j], b, n0 + 16 * j, k, true);
#pragma unroll
      for (int i = 0; i < Tile::MI; ++i)
#pragma unroll
        for (int j = 0; j < Tile::NJ; ++j) Left::mma(sum[i][j], left[i], {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]});
    }
  }
  // The sums over columns k first..last-1; afterwards all warps have left shared memory. watch(slice) sees every slice of A, which no warp
  // overwrites meanwhile.
  template <class Loader, class Watch = Unwatched>
  __device__ __forceinline__ void accumulate(Loader& loader, unsigned char* shared, long long first, long long last, Watch watch = Watch()) {
    constexpr int BK = Tile::SLICE / (int)sizeof(typename Storage<Kind>::type);
    int slices = last > first ? (int)((last - first + BK - 1) / BK) : 0;
    auto fetch = [&](int slice) {
      unsigned char* slot = shared + slice % Tile::STAGES * Tile::STAGE_BYTES;
      if (slice < slices) loader.fetch(slot, slot + Tile::A_BYTES);
      cf_cp_commit();  // an empty group too: the count of groups is the count of slices
    };
#pragma unroll
    for (int slice = 0; slice < Tile::STAGES - 1; ++slice) fetch(slice);
    for (int slice = 0; slice < slices; ++slice) {
      cf_cp_wait<Tile::STAGES - 2>();
      __syncthreads();
      fetch(slice + Tile::STAGES - 1);
      const unsigned char* slot = shared + slice % Tile::STAGES * Tile::STAGE_BYTES;
      multiply(slot, slot + Tile::A_BYTES);
      watch(slot);
    }
    cf_cp_wait<0>();
    __syncthreads();
  }
};

// Adds each column of a slice [k][m] of A to sum[m], always by the same thread: the bias gradient (gemm.cuh). Beside the block's own work
//   bf16  the tensor cores multiply by ones, one product for each BN / 8 (128x128: 6% more), with fragments that are loaded again (16 ldmatrix
//         beside 64), and half the lanes add a double in shared memory for 16 columns. Element by element: 32 values a thread, 2 instructions each.
//   tf32  BM threads add 16 words each: dy itself, not rounded to tf32. A warp's 32 neighbours are 8 whole chunks, which the permutation
//         keeps together: no bank twice, BM / 2 clocks of shared memory beside 256 (128x128). Then one double in shared memory.
// Not measured.
template <class Tile>
struct ColumnSums<bf16, Tile> {
  static __device__ __forceinline__ void add(const unsigned char* slice, double* sum) {
    using Left = Fragments<bf16, Tile, false, Tile::M>;
    constexpr cf_u32 ONES = 0x3f803f80;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll 1
    for (int m = 16 * warp; m < Tile::M; m += Tile::THREADS / 2) {
      float d[4] = {};
#pragma unroll (Tile::M == 96 ? 1 : 4)  // 96x128 has no registers to spare: on sm_100 it would spill
      for (int k = 0; k < Tile::SLICE / 2; k += Left::K) {
        cf_u32 left[4];
        Left::load(left, slice, m, k, false);
        Left::mma(d, left, {ONES, ONES});
      }
      int half = lane & 3;  // all columns of d are alike: of the four lanes of a row, one adds it, and one the row 8 below
      if (half < 2) sum[m + (lane >> 2) + 8 * half] += half ? d[2] : d[0];
    }
  }
};

template <class Tile>
struct ColumnSums<tf32, Tile> {
  static_assert(Tile::M <= Tile::THREADS, "a thread for each column");
  static __device__ __forceinline__ void add(const unsigned char* slice, double* sum) {
    int m = threadIdx.x;
    if (m >= Tile::M) return;
    float part = 0;
#pragma unroll
    for (int k = 0; k < Tile::SLICE / 4; ++k)
      part += *reinterpret_cast<const float*>(Tile::template across<Tile::M * 4, true>(slice, k, m >> 2) + (m & 3) * 4);
    sum[m] += part;
  }
};
