// gemm_load.cuh - slices of a product's operands from global to shared memory, by cp.async: what both kinds of tensor core instructions
// (gemm_mma.cuh, gemm_wgmma.cuh) share. A Tile says how many bytes along k a slice has (SLICE), and where a slice keeps a chunk of 16 bytes of
// an operand that lies across k (across).
#pragma once
#include "gemm.cuh"

// Where a row of CHUNKS 16-byte vectors keeps one of them. WORDS: for readers of single words from 4 rows at a time.
template <int CHUNKS, bool WORDS = false>
__device__ __forceinline__ int chunk_of(int row, int chunk) {
  static_assert(CHUNKS % 4 == 0, "rows are multiples of 64 bytes");
  if (WORDS) return chunk ^ (row & 3) << 1;
  return CHUNKS % 8 == 0 ? chunk ^ (row & 7) : chunk ^ (row >> 1 & 3);
}
// A chunk of a row of SLICE bytes, which lies along k: its place in a slice.
template <int SLICE>
__device__ __forceinline__ int along(int row, int chunk) {
  return row * SLICE + chunk_of<SLICE / 16>(row, chunk) * 16;
}

// --- from global to shared memory --------------------------------------------------------------------------------------------

// global lies on a boundary of PIECE bytes also where none are valid: PTX asks for one either way.
template <int PIECE>
__device__ __forceinline__ void copy_piece(unsigned char* shared, const void* global, int valid_bytes) {
  if (PIECE == 16) cf_cp_async16(shared, global, valid_bytes);
  else cf_cp_async8(shared, global, valid_bytes);
}

// What a main loop asks of a loader: fetch(a, b) starts a slice's copies into a slot and moves on; COPIES: by cp.async; await(slice) waits for
// what comes otherwise.
struct Copies {
  static constexpr bool COPIES = true;
  __device__ __forceinline__ void await(int) const {}
};

// Slices of pixels' windows (A) and of weights (B), both along k: forward and data gradient. WEIGHTS: whether B is copied at all.
template <class T, class Tile, int PIECE, bool WEIGHTS = true>
struct WindowLoader : Copies {
  static constexpr int SIZE = PIECE / sizeof(T), ACROSS = Tile::SLICE / PIECE, STEP = Tile::THREADS / ACROSS, BK = Tile::SLICE / sizeof(T);
  static constexpr int A = Tile::M / STEP, B = WEIGHTS ? Tile::N / STEP : 0;
  static_assert(A * STEP == Tile::M && (!WEIGHTS || B * STEP == Tile::N) && STEP % 8 == 0, "every thread copies as many pieces, in rows permuted alike");
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
    to = along<Tile::SLICE>(row, piece * PIECE / 16) + piece * PIECE % 16;
  }
  __device__ __forceinline__ void fetch(unsigned char* a, unsigned char* b) {  // and moves on
    bool inside = r < t.h.cells && s < t.w.cells;
    int up = r * t.h.tap, left = s * t.w.tap;
    int shift = up * t.width + left;
    const T* from = data + channel;
#pragma unroll
    for (int i = 0; i < A; ++i) {
      bool valid = inside && (unsigned)(y[i] + up) < (unsigned)t.height && (unsigned)(x[i] + left) < (unsigned)t.width;
      copy_piece<PIECE>(a + to + i * STEP * Tile::SLICE, valid ? from + (long long)(corner[i] + shift) * t.channels : data, valid ? PIECE : 0);
    }
    int column = (r * t.h.cell_step * t.kernel_w + s * t.w.cell_step) * t.depth + channel;
#pragma unroll
    for (int i = 0; i < B; ++i) {
      bool valid = inside && i * STEP < rows;
      copy_piece<PIECE>(b + to + i * STEP * Tile::SLICE, valid ? weights + (long long)(i * STEP) * pitch + column : data, valid ? PIECE : 0);
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

// Slices of dy (A) and of the windows of x (B), both as rows of pixels k: weight gradient. GRADIENTS: whether A is copied at all.
template <class T, class Tile, int PIECE, bool GRADIENTS = true>
struct PixelLoader : Copies {
  static constexpr int SIZE = 16 / sizeof(T), BK = Tile::SLICE / sizeof(T), ACROSS_A = Tile::M / SIZE, A = BK * ACROSS_A / Tile::THREADS;
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
    for (int i = 0; i < (GRADIENTS ? A : 0); ++i) {
      int v = threadIdx.x + i * Tile::THREADS, row = v / ACROSS_A, chunk = v % ACROSS_A;
      bool valid = k + row < pixels && chunk * SIZE < outputs;
      copy_piece<16>(Tile::template across<Tile::M * (int)sizeof(T), WORDS>(a, row, chunk), valid ? dy + (k + row) * pitch + chunk * SIZE : dy, valid ? 16 : 0);
    }
    int piece = threadIdx.x % ACROSS_B;
#pragma unroll
    for (int i = 0; i < B; ++i) {
      int row = threadIdx.x / ACROSS_B + i * STEP, y = h[i] * t.h.step + up, x = w[i] * t.w.step + left;
      bool valid = inside && image[i] < t.images && (unsigned)y < (unsigned)t.height && (unsigned)x < (unsigned)t.width;
      const T* from = valid ? data + (((long long)image[i] * t.height + y) * t.width + x) * t.channels + shift : data;
      unsigned char* to = Tile::template across<Tile::N * (int)sizeof(T), WORDS>(b, row, piece * PIECE / 16) + piece * PIECE % 16;
      copy_piece<PIECE>(to, from, valid ? PIECE : 0);
      w[i] += across_on, h[i] += lines_on, image[i] += images_on;
      if (w[i] >= t.w.pixels) w[i] -= t.w.pixels, ++h[i];
      if (h[i] >= t.h.pixels) h[i] -= t.h.pixels, ++image[i];
    }
    k += BK;
  }
};

// Loaders of the three products, from column k `first` on. Data gradient: w packed.
template <class Tile, int PIECE, bool WEIGHTS = true, class T>
__device__ __forceinline__ WindowLoader<T, Tile, PIECE, WEIGHTS> forward_loader(const T* x, const T* w, const Geometry& g, const Block& block, const Taps& t, long long first) {
  long long count = t.columns();
  return {x, w + (long long)block.group * g.group_outputs * count, t, block.m, block.n, g.group_outputs, (int)count, first};
}
template <class Tile, bool WEIGHTS = true, class T>
__device__ __forceinline__ WindowLoader<T, Tile, 16, WEIGHTS> data_loader(const T* dy, const T* packed, const Geometry& g, const Block& block, const Taps& t, long long first) {
  int pitch = g.kernel_h * g.kernel_w * g.group_outputs;
  return {dy, packed + (long long)block.group * g.group_channels * pitch, t, block.m, block.n, g.group_channels, pitch, first};
}
template <class Tile, int PIECE, bool GRADIENTS = true, class T>
__device__ __forceinline__ PixelLoader<T, Tile, PIECE, GRADIENTS> weights_loader(const T* x, const T* dy, const Geometry& g, const Block& block, const Taps& t, long long first) {
  return {dy + block.group * g.group_outputs, x, t, block.m, block.n, g.group_outputs, g.outputs, first};
}
