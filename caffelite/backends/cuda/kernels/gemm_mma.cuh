// gemm_mma.cuh - the main loop on tensor cores (mma.sync, Ampere and later): bf16 operands (m16n8k16), or float32 ones rounded to tf32
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
// Ladder: 1. one tile, 128x64, slices through registers in two slots; 2. this. Next: wgmma and TMA on Hopper.
#pragma once
#include "gemm.cuh"

struct tf32 {};  // float32 in memory
template <class Kind>
struct Storage {
  typedef Kind type;
};
template <>
struct Storage<tf32> {
  typedef float type;
};

constexpr int STAGES = 4, SLICE_BYTES = 64;

template <int M_, int N_>
struct Tile {
  static constexpr int M = M_, N = N_, WARPS_M = M == 192 ? 4 : 2, WARPS_N = N == 192 ? 4 : 2, THREADS = 32 * WARPS_M * WARPS_N;
  static constexpr int WM = M / WARPS_M, WN = N / WARPS_N, MI = WM / 16, NJ = WN / 8;                 // a warp's part, in products of 16x8
  static constexpr int BLOCKS = MI * NJ <= 8 ? 4 : THREADS == 256 ? 1 : MI * NJ <= 24 ? 3 : 2;  // of an SM, which bounds the registers
  static constexpr int A_BYTES = M * SLICE_BYTES, STAGE_BYTES = (M + N) * SLICE_BYTES;
};

// Where a row of CHUNKS 16-byte vectors keeps one of them. WORDS: for readers of single words from 4 rows at a time.
template <int CHUNKS, bool WORDS = false>
__device__ __forceinline__ int chunk_of(int row, int chunk) {
  static_assert(CHUNKS % 4 == 0, "rows are multiples of 64 bytes");
  if (WORDS) return chunk ^ (row & 3) << 1;
  return CHUNKS % 8 == 0 ? chunk ^ (row & 7) : chunk ^ (row >> 1 & 3);
}

// --- from global to shared memory --------------------------------------------------------------------------------------------

// global lies on a boundary of PIECE bytes also where none are valid: PTX asks for one either way.
template <int PIECE>
__device__ __forceinline__ void copy_piece(unsigned char* shared, const void* global, int valid_bytes) {
  if (PIECE == 16) cf_cp_async16(shared, global, valid_bytes);
  else cf_cp_async8(shared, global, valid_bytes);
}

// Slices of pixels' windows (A) and of weights (B), both along k: forward and data gradient.
template <class T, class Tile, int PIECE>
struct WindowLoader {
  static constexpr int SIZE = PIECE / sizeof(T), ACROSS = SLICE_BYTES / PIECE, STEP = Tile::THREADS / ACROSS, BK = SLICE_BYTES / sizeof(T);
  static constexpr int A = Tile::M / STEP, B = Tile::N / STEP;
  static_assert(A * STEP == Tile::M && B * STEP == Tile::N && STEP % 8 == 0, "every thread copies as many pieces, in rows permuted alike");
  const T *data, *weights;  // of the group
  const Taps& t;
  int corner[A], y[A], x[A];    // of a pixel's window: what cell 0 would meet, as a pixel of all images, which may lie outside, and in its own
  int rows, r, s, channel, to;  // rows of B from this thread's first one on; the piece's column; its place in shared memory
  int pitch;

  __device__ __forceinline__ WindowLoader(const T* data_, const T* weights_, const Taps& t_, long long m0, long long n0, int n, int pitch_, long long k)
      : data(data_ + t_.first_channel), weights(weights_), t(t_), pitch(pitch_) {
    int row = threadIdx.x / ACROSS, piece = threadIdx.x % ACROSS;
    long long pixels = t.rows(), column = k + piece * SIZE;
#pragma unroll
    for (int i = 0; i < A; ++i) {
      long long m = m0 + row + i * STEP, line = m / t.w.pixels, image = line / t.h.pixels;
      y[i] = (int)(line - image * t.h.pixels) * t.h.step + t.h.first;
      x[i] = (int)(m - line * t.w.pixels) * t.w.step + t.w.first;
      corner[i] = (int)((image * t.height + y[i]) * t.width + x[i]);
      if (m >= pixels) y[i] = -(1 << 30);  // outside, whatever the cell
    }
    weights += (n0 + row) * pitch + (long long)t.cell(0, 0) * t.depth;
    rows = (int)(n - n0 - row);
    int cell = (int)(column / t.depth), across = t.w.cells ? t.w.cells : 1;
    channel = (int)(column - (long long)cell * t.depth);
    r = cell / across, s = cell - r * across;
    to = row * SLICE_BYTES + chunk_of<4>(row, piece * PIECE / 16) * 16 + piece * PIECE % 16;
  }
  __device__ __forceinline__ void fetch(unsigned char* a, unsigned char* b) {  // and moves on
    bool inside = r < t.h.cells && s < t.w.cells;
    int up = r * t.h.tap, left = s * t.w.tap;
    int shift = up * t.width + left;
    const T* from = data + channel;
#pragma unroll
    for (int i = 0; i < A; ++i) {
      bool valid = inside && (unsigned)(y[i] + up) < (unsigned)t.height && (unsigned)(x[i] + left) < (unsigned)t.width;
      copy_piece<PIECE>(a + to + i * STEP * SLICE_BYTES, valid ? from + (long long)(corner[i] + shift) * t.channels : data, valid ? PIECE : 0);
    }
    int column = (r * t.h.cell_step * t.kernel_w + s * t.w.cell_step) * t.depth + channel;
#pragma unroll
    for (int i = 0; i < B; ++i) {
      bool valid = inside && i * STEP < rows;
      copy_piece<PIECE>(b + to + i * STEP * SLICE_BYTES, valid ? weights + (long long)(i * STEP) * pitch + column : data, valid ? PIECE : 0);
    }
    channel += BK;
    if (channel >= t.depth) {
      int over = channel / t.depth;
      channel -= over * t.depth;
      s += over;
      if (s >= t.w.cells && t.w.cells) r += s / t.w.cells, s %= t.w.cells;
    }
  }
};

// Slices of dy (A) and of the windows of x (B), both as rows of pixels k: weight gradient.
template <class T, class Tile, int PIECE>
struct PixelLoader {
  static constexpr int SIZE = 16 / sizeof(T), BK = SLICE_BYTES / sizeof(T), ACROSS_A = Tile::M / SIZE, A = BK * ACROSS_A / Tile::THREADS;
  static constexpr int SIZE_B = PIECE / sizeof(T), ACROSS_B = Tile::N / SIZE_B, STEP = Tile::THREADS / ACROSS_B, B = BK / STEP;
  static_assert(A * Tile::THREADS == BK * ACROSS_A && B * STEP == BK && STEP * ACROSS_B == Tile::THREADS, "every thread copies as many pieces");
  static constexpr bool WORDS = sizeof(T) == 4;
  const T *dy, *data;
  const Taps& t;
  long long pixels, k;
  int outputs, pitch;                             // of dy: those from m0 on; in a row
  int image[B], h[B], w[B];                       // pixels of B's pieces
  int images_on, lines_on, across_on;             // BK pixels further, in images, lines and pixels
  int up, left;                                   // what this thread's column of B adds to a pixel's position
  long long shift;
  bool inside;

  __device__ __forceinline__ PixelLoader(const T* dy_, const T* data_, const Taps& t_, long long m0, long long n0, int group_outputs, int outputs_, long long k_)
      : dy(dy_ + m0), data(data_), t(t_), pixels(t_.rows()), k(k_), outputs((int)(group_outputs - m0)), pitch(outputs_) {
    int line = t.w.pixels, plane = line * t.h.pixels;
    images_on = BK / plane, lines_on = BK % plane / line, across_on = BK % plane % line;
#pragma unroll
    for (int i = 0; i < B; ++i) {
      long long pixel = k + threadIdx.x / ACROSS_B + i * STEP;
      image[i] = (int)(pixel / plane);
      int rest = (int)(pixel - (long long)image[i] * plane);
      h[i] = rest / line, w[i] = rest - h[i] * line;
    }
    long long column = n0 + threadIdx.x % ACROSS_B * SIZE_B;
    inside = column < t.columns();
    int cell = (int)(column / t.depth), r = cell / t.w.cells, s = cell - r * t.w.cells;
    up = r * t.h.tap + t.h.first, left = s * t.w.tap + t.w.first;
    shift = t.first_channel + column - (long long)cell * t.depth;
  }
  __device__ __forceinline__ void fetch(unsigned char* a, unsigned char* b) {
#pragma unroll
    for (int i = 0; i < A; ++i) {
      int v = threadIdx.x + i * Tile::THREADS, row = v / ACROSS_A, chunk = v % ACROSS_A;
      bool valid = k + row < pixels && chunk * SIZE < outputs;
      copy_piece<16>(a + row * Tile::M * sizeof(T) + chunk_of<ACROSS_A, WORDS>(row, chunk) * 16, valid ? dy + (k + row) * pitch + chunk * SIZE : dy, valid ? 16 : 0);
    }
    int piece = threadIdx.x % ACROSS_B;
#pragma unroll
    for (int i = 0; i < B; ++i) {
      int row = threadIdx.x / ACROSS_B + i * STEP, y = h[i] * t.h.step + up, x = w[i] * t.w.step + left;
      bool valid = inside && image[i] < t.images && (unsigned)y < (unsigned)t.height && (unsigned)x < (unsigned)t.width;
      const T* from = valid ? data + (((long long)image[i] * t.height + y) * t.width + x) * t.channels + shift : data;
      int to = row * Tile::N * (int)sizeof(T) + chunk_of<Tile::N * (int)sizeof(T) / 16, WORDS>(row, piece * PIECE / 16) * 16 + piece * PIECE % 16;
      copy_piece<PIECE>(b + to, from, valid ? PIECE : 0);
      w[i] += across_on, h[i] += lines_on, image[i] += images_on;
      if (w[i] >= t.w.pixels) w[i] -= t.w.pixels, ++h[i];
      if (h[i] >= t.h.pixels) h[i] -= t.h.pixels, ++image[i];
    }
    k += BK;
  }
};

// --- products ----------------------------------------------------------------------------------------------------------------

// Fragments of ROWS x k operands: 16 rows for A, 16 rows (two fragments of 8) for B. KMAJOR: [row][k] in shared memory; else [k][row].
template <class Kind, bool KMAJOR, int ROWS>
struct Fragments;

template <bool KMAJOR, int ROWS>
struct Fragments<bf16, KMAJOR, ROWS> {
  static constexpr int K = 16;
  static __device__ __forceinline__ void mma(float (&d)[4], const cf_u32 (&a)[4], const cf_u32 (&b)[2]) { cf_mma_m16n8k16_bf16(d, a, b); }
  // Four 8x8 matrices, each row's address given by one lane: rows and k of matrix i are 8 further where bit 0, or 1, of i says so for A, and
  // the other way round for B.
  static __device__ __forceinline__ void load(cf_u32 (&f)[4], const unsigned char* from, int row, int k, bool of_b) {
    int lane = threadIdx.x & 31, line = lane & 7, low = lane >> 3 & 1, high = lane >> 4, down = of_b ? high : low, along = of_b ? low : high;
    if (KMAJOR) {
      int at = row + down * 8 + line;
      cf_ldmatrix_x4(f, from + at * SLICE_BYTES + chunk_of<4>(at, k / 8 + along) * 16);
    } else {
      int at = k + along * 8 + line;
      cf_ldmatrix_x4_trans(f, from + at * ROWS * 2 + chunk_of<ROWS / 8>(at, row / 8 + down) * 16);
    }
  }
};

template <bool KMAJOR, int ROWS>
struct Fragments<tf32, KMAJOR, ROWS> {
  static constexpr int K = 8;
  static __device__ __forceinline__ void mma(float (&d)[4], const cf_u32 (&a)[4], const cf_u32 (&b)[2]) { cf_mma_m16n8k8_tf32(d, a, b); }
  static __device__ __forceinline__ void load(cf_u32 (&f)[4], const unsigned char* from, int row, int k, bool of_b) {
    int lane = threadIdx.x & 31;
    if (KMAJOR) {  // a row of an 8x8 matrix of 16 bits is 4 floats, one to a lane: just the fragment
      int line = lane & 7, low = lane >> 3 & 1, high = lane >> 4, down = of_b ? high : low, along = of_b ? low : high, at = row + down * 8 + line;
      cf_ldmatrix_x4(f, from + at * SLICE_BYTES + chunk_of<4>(at, k / 4 + along) * 16);
    } else {
      int q = lane & 3;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int m = row + (lane >> 2) + (of_b ? i >> 1 : i & 1) * 8, at = k + q + (of_b ? i & 1 : i >> 1) * 4;
        f[i] = *reinterpret_cast<const cf_u32*>(from + at * ROWS * 4 + chunk_of<ROWS / 4, true>(at, m >> 2) * 16 + (m & 3) * 4);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) f[i] = cf_to_tf32(__uint_as_float(f[i]));
  }
};

template <class Kind, class Tile, bool KMAJOR>
struct Product {
  float sum[Tile::MI][Tile::NJ][4] = {};

  __device__ __forceinline__ void multiply(const unsigned char* a, const unsigned char* b) {
    using Left = Fragments<Kind, KMAJOR, Tile::M>;
    using Right = Fragments<Kind, KMAJOR, Tile::N>;
    int warp = threadIdx.x >> 5, m0 = warp / Tile::WARPS_N * Tile::WM, n0 = warp % Tile::WARPS_N * Tile::WN;
#pragma unroll
    for (int k = 0; k < SLICE_BYTES / (int)sizeof(typename Storage<Kind>::type); k += Left::K) {
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
  // write(i, j, sums) gets runs of RUN neighbouring sums of the block's row i from column j on, inside C or not. All warps have left `shared`.
  template <int RUN, class Write>
  __device__ __forceinline__ void drain(float* shared, Write write) const {
    constexpr int PITCH = Tile::WN + 8, ACROSS = Tile::WN / RUN;  // 8 more: 4 rows of pairs lie in different banks
    static_assert(Tile::THREADS / 32 * 16 * PITCH * 4 <= STAGES * Tile::STAGE_BYTES, "fits into the slots");
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, m0 = warp / Tile::WARPS_N * Tile::WM, n0 = warp % Tile::WARPS_N * Tile::WN;
    float* strip = shared + warp * 16 * PITCH;
#pragma unroll
    for (int i = 0; i < Tile::MI; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::NJ; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<float2*>(strip + ((lane >> 2) + 8 * half) * PITCH + 8 * j + 2 * (lane & 3)) = make_float2(sum[i][j][2 * half], sum[i][j][2 * half + 1]);
      __syncwarp();
#pragma unroll 1
      for (int run = lane; run < 16 * ACROSS; run += 32) {
        int row = run / ACROSS, column = run % ACROSS * RUN;
        Vec<float> sums[RUN / 4];
#pragma unroll
        for (int e = 0; e < RUN / 4; ++e) sums[e] = load_vec(strip + row * PITCH + column + 4 * e);
        write(m0 + 16 * i + row, n0 + column, sums);
      }
      __syncwarp();
    }
  }
};

// Adds each column of a slice [k][m] of A to sum[m], always by the same thread: the bias gradient (gemm.cuh). Beside the block's own work
//   bf16  the tensor cores multiply by ones, one product for each BN / 8 (128x128: 6% more), with fragments that are loaded again (16 ldmatrix
//         beside 64), and half the lanes add a double in shared memory for 16 columns. Element by element: 32 values a thread, 2 instructions each.
//   tf32  BM threads add 16 words each: dy itself, not rounded to tf32. A warp's 32 neighbours are 8 whole chunks, which the permutation
//         keeps together: no bank twice, BM / 2 clocks of shared memory beside 256 (128x128). Then one double in shared memory.
// Not measured.
template <class Kind, class Tile>
struct ColumnSums;

template <class Tile>
struct ColumnSums<bf16, Tile> {
  static __device__ __forceinline__ void add(const unsigned char* slice, double* sum) {
    using Left = Fragments<bf16, false, Tile::M>;
    constexpr cf_u32 ONES = 0x3f803f80;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll 1
    for (int m = 16 * warp; m < Tile::M; m += Tile::THREADS / 2) {
      float d[4] = {};
#pragma unroll
      for (int k = 0; k < SLICE_BYTES / 2; k += Left::K) {
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
    for (int k = 0; k < SLICE_BYTES / 4; ++k)
      part += *reinterpret_cast<const float*>(slice + k * Tile::M * 4 + chunk_of<Tile::M / 4, true>(k, m >> 2) * 16 + (m & 3) * 4);
    sum[m] += part;
  }
};

// The loop over columns k first..last-1; afterwards all warps have left shared memory. watch(slice) sees every slice of A, which no warp
// overwrites meanwhile.
template <class Tile, int BK, class Loader, class P, class Watch = Unwatched>
__device__ __forceinline__ void multiply_slices(Loader& loader, P& product, unsigned char* shared, long long first, long long last, Watch watch = Watch()) {
  int slices = last > first ? (int)((last - first + BK - 1) / BK) : 0;
  auto fetch = [&](int slice) {
    unsigned char* slot = shared + slice % STAGES * Tile::STAGE_BYTES;
    if (slice < slices) loader.fetch(slot, slot + Tile::A_BYTES);
    cf_cp_commit();  // an empty group too: the count of groups is the count of slices
  };
#pragma unroll
  for (int slice = 0; slice < STAGES - 1; ++slice) fetch(slice);
  for (int slice = 0; slice < slices; ++slice) {
    cf_cp_wait<STAGES - 2>();
    __syncthreads();
    fetch(slice + STAGES - 1);
    const unsigned char* slot = shared + slice % STAGES * Tile::STAGE_BYTES;
    product.multiply(slot, slot + Tile::A_BYTES);
    watch(slot);
  }
  cf_cp_wait<0>();
  __syncthreads();
}
