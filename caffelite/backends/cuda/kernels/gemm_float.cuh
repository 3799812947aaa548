// gemm_float.cuh - the main loop of float32, whose sums are exact float32 in the order of k: 128x64 of C by 256 threads, 8x4 products a thread.
//
// While it multiplies one slice of 16 columns in shared memory, the next is on its way in registers; two slices alternate, one barrier each.
// It takes operands of any alignment. Slices lie as [k][m] and [k][n]; an operand whose columns are k is turned as it is put there.
// Registers up to 128 (2 blocks an SM), shared 25,600 bytes. Bytes: each A slice is read ceil(N/64) times, each B slice ceil(M/128) times,
// mostly from L2. Operations: 2 M N K; for 32 multiply-adds of a thread, 8 clocks of the SM for a warp, 3 loads of 16 bytes from shared memory, 4
// to 12 clocks by how far equal addresses are merged. Not measured.
// Ladder: 1. 12 loads of 4 bytes for 32 multiply-adds, 12 clocks; 2. this.
#pragma once
#include "gemm.cuh"

// --- operands ---------------------------------------------------------------------------------------------------------------
// A table gives 16 bytes of neighbouring columns at a time, zeros outside. It is read by cursors: row() and column() work out once where an
// index lies, next_row() and next_column() move on by a slice, dividing only where a line or a cell ends, get() fetches 16 bytes there.

constexpr int THREADS = 256, BM = 128, BN = 64, BK = 16;

__device__ __forceinline__ void carry(int& digit, int base, int& next) {
  if (digit < base) return;
  int over = digit / base;
  digit -= over * base;
  next += over;
}

template <class T>
struct Matrix {  // rows x columns with `pitch` elements from row to row. aligned: columns and pitch are multiples of a vector
  const T* data;
  long long rows;
  int columns;
  long long pitch;
  bool aligned;
  using Row = long long;
  using Column = int;
  __device__ __forceinline__ Row row(long long index) const { return index; }
  __device__ __forceinline__ Column column(long long index) const { return (int)index; }
  __device__ __forceinline__ void next_row(Row& row, int by) const { row += by; }
  __device__ __forceinline__ void next_column(Column& column, int by) const { column += by; }
  __device__ __forceinline__ Vec<T> get(const Row& row, const Column& column) const {
    Vec<T> v = {};
    if (row >= rows || column >= columns) return v;
    const T* p = data + row * pitch + column;
    if (aligned) return load_vec(p);
#pragma unroll
    for (int i = 0; i < Vec<T>::size; ++i)
      if (column + i < columns) v[i] = p[i];
    return v;
  }
};

struct Cell {  // a column of a gathered operand
  int cell, channel;
};

// Row: a pixel. Column: (kernel cell, channel of the group) of what the pixel's window holds there; planar: (channel, kernel cell), for sums
// in Caffe's order.
template <class T>
struct Windows {
  const T* data;
  Taps t;
  bool aligned;  // channels of a group, and of all, are multiples of a vector
  bool planar;   // and then not aligned
  struct Row {
    int image, h, w;
  };
  using Column = Cell;

  __device__ __forceinline__ int cells() const { return t.h.cells * t.w.cells; }
  __device__ __forceinline__ Row row(long long index) const {
    if (!t.rows()) return {t.images, 0, 0};
    long long line = index / t.w.pixels;
    return {(int)(line / t.h.pixels), (int)(line % t.h.pixels), (int)(index - line * t.w.pixels)};
  }
  __device__ __forceinline__ Column column(long long index) const {
    int inner = planar ? cells() : t.depth;
    if (!inner) return {0, 0};
    int outer = (int)(index / inner), rest = (int)index - outer * inner;
    return planar ? Column{rest, outer} : Column{outer, rest};
  }
  __device__ __forceinline__ void next_row(Row& row, int by) const {
    row.w += by;
    carry(row.w, t.w.pixels, row.h);
    carry(row.h, t.h.pixels, row.image);
  }
  __device__ __forceinline__ void next_column(Column& column, int by) const {
    if (planar) {
      column.cell += by;
      carry(column.cell, cells(), column.channel);
    } else {
      column.channel += by;
      carry(column.channel, t.depth, column.cell);
    }
  }
  __device__ __forceinline__ bool inside(const Row& row, const Column& column) const {
    return row.image < t.images && column.cell < cells() && column.channel < t.depth;
  }
  // Where the pixel's window holds the kernel cell and channel; null outside the image.
  __device__ __forceinline__ const T* at(const Row& row, const Column& column) const {
    int r = column.cell / t.w.cells, s = column.cell - r * t.w.cells;
    int y = row.h * t.h.step + t.h.first + r * t.h.tap, x = row.w * t.w.step + t.w.first + s * t.w.tap;
    if ((unsigned)y >= (unsigned)t.height || (unsigned)x >= (unsigned)t.width) return nullptr;
    return data + (((long long)row.image * t.height + y) * t.width + x) * t.channels + t.first_channel + column.channel;
  }
  __device__ __forceinline__ Vec<T> get(const Row& row, Column column) const {
    Vec<T> v = {};
    if (!inside(row, column)) return v;
    if (aligned) {
      const T* p = at(row, column);
      return p ? load_vec(p) : v;
    }
#pragma unroll
    for (int i = 0; i < Vec<T>::size; ++i) {
      if (inside(row, column)) {
        const T* p = at(row, column);
        if (p) v[i] = *p;
      }
      next_column(column, 1);
    }
    return v;
  }
};

// Weights as (rows, all cells, depth), of which a class of pixels meets the cells of `t`.
template <class T>
struct Filters {
  const T* data;
  Taps t;
  long long rows, pitch;
  bool aligned;
  using Row = long long;
  using Column = Cell;
  __device__ __forceinline__ Row row(long long index) const { return index; }
  __device__ __forceinline__ Column column(long long index) const {
    if (!t.depth) return {0, 0};
    int cell = (int)(index / t.depth);
    return {cell, (int)index - cell * t.depth};
  }
  __device__ __forceinline__ void next_row(Row& row, int by) const { row += by; }
  __device__ __forceinline__ void next_column(Column& column, int by) const {
    column.channel += by;
    carry(column.channel, t.depth, column.cell);
  }
  __device__ __forceinline__ const T* at(const Row& row, const Column& column) const {
    int r = column.cell / t.w.cells, s = column.cell - r * t.w.cells;
    return data + row * pitch + (long long)t.cell(r, s) * t.depth + column.channel;
  }
  __device__ __forceinline__ Vec<T> get(const Row& row, Column column) const {
    Vec<T> v = {};
    if (row >= rows || column.cell >= t.h.cells * t.w.cells) return v;
    if (aligned) return load_vec(at(row, column));
#pragma unroll
    for (int i = 0; i < Vec<T>::size; ++i) {
      if (column.cell < t.h.cells * t.w.cells) v[i] = *at(row, column);
      next_column(column, 1);
    }
    return v;
  }
};

// --- slices in shared memory ------------------------------------------------------------------------------------------------

// SPAN rows (or columns) of an operand, BK deep, as [k][span]. KMAJOR: the table's columns are k, and are turned on their way.
template <class T, class Table, int SPAN, bool KMAJOR>
struct Slice {
  static constexpr int pitch = SPAN + 4;
  static constexpr int rows = KMAJOR ? SPAN : BK, columns = KMAJOR ? BK : SPAN;
  static constexpr int across = columns / Vec<T>::size;  // vectors in a row
  static constexpr int each = rows * across / THREADS;
  static_assert(each * THREADS == rows * across, "every thread holds as many vectors");
  Vec<T> held[each];
  typename Table::Row row[each];
  typename Table::Column column[each];

  __device__ __forceinline__ void start(const Table& table, long long first, long long k) {
#pragma unroll
    for (int i = 0; i < each; ++i) {
      int v = threadIdx.x + i * THREADS;
      row[i] = table.row((KMAJOR ? first : k) + v / across);
      column[i] = table.column((KMAJOR ? k : first) + v % across * Vec<T>::size);
    }
  }
  __device__ __forceinline__ void fetch(const Table& table) {  // and moves on
#pragma unroll
    for (int i = 0; i < each; ++i) {
      held[i] = table.get(row[i], column[i]);
      if (KMAJOR) table.next_column(column[i], BK);
      else table.next_row(row[i], BK);
    }
  }
  __device__ __forceinline__ void put(T* shared) const {
#pragma unroll
    for (int i = 0; i < each; ++i) {
      int v = threadIdx.x + i * THREADS, down = v / across, along = v % across * Vec<T>::size;
      if (KMAJOR) {
#pragma unroll
        for (int e = 0; e < Vec<T>::size; ++e) shared[(along + e) * pitch + down] = held[i][e];
      } else {
        store_vec(shared + down * pitch + along, held[i]);
      }
    }
  }
};

// --- products of a slice ----------------------------------------------------------------------------------------------------

template <int A_PITCH, int B_PITCH>
struct Core {
  static constexpr int HALVES = BM / 64;  // a thread's rows: four neighbours in each 64; its columns: four neighbours
  float sum[HALVES][4][4] = {};
  __device__ __forceinline__ void multiply(const float* a, const float* b) {
    int n = (threadIdx.x & 15) * 4, m = (threadIdx.x >> 4) * 4;
#pragma unroll
    for (int k = 0; k < BK; ++k) {
      Vec<float> column = load_vec(b + k * B_PITCH + n);
#pragma unroll
      for (int h = 0; h < HALVES; ++h) {
        Vec<float> row = load_vec(a + k * A_PITCH + m + 64 * h);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[h][i][j] = fmaf(row[i], column[j], sum[h][i][j]);  // in so many words: the emulator rounds as a GPU does
      }
    }
  }
  template <class Write>
  __device__ __forceinline__ void each(Write write) const {
    int n = (threadIdx.x & 15) * 4, m = (threadIdx.x >> 4) * 4;
#pragma unroll
    for (int h = 0; h < HALVES; ++h)
#pragma unroll
      for (int i = 0; i < 4; ++i) write(m + 64 * h + i, n, Vec<float>{sum[h][i][0], sum[h][i][1], sum[h][i][2], sum[h][i][3]});
  }
};

// A slice of A as [k][m]: the sum of its column m. Neighbouring threads read neighbouring words.
__device__ __forceinline__ float column_sum(const float* slice, int m) {
  float sum = 0;
#pragma unroll
  for (int k = 0; k < BK; ++k) sum += slice[k * (BM + 4) + m];
  return sum;
}

// The loop over columns first..last-1 of the operands; write(m, n, sums) gets runs of 4 of the block's part of C, inside or not. watch(slice)
// sees every slice of A, in shared memory.
template <bool A_KMAJOR, bool B_KMAJOR, class A, class B, class Write, class Watch = Unwatched>
__device__ __forceinline__ void multiply_tables(const A& a, const B& b, long long m0, long long n0, long long first, long long last, Write write, Watch watch = Watch()) {
  using SliceA = Slice<float, A, BM, A_KMAJOR>;
  using SliceB = Slice<float, B, BN, B_KMAJOR>;
  __shared__ __align__(16) float shared_a[2][BK * SliceA::pitch];
  __shared__ __align__(16) float shared_b[2][BK * SliceB::pitch];
  SliceA next_a;
  SliceB next_b;
  Core<SliceA::pitch, SliceB::pitch> core;
  next_a.start(a, m0, first);
  next_b.start(b, n0, first);
  auto fetch = [&] {
    next_a.fetch(a);
    next_b.fetch(b);
  };
  auto put = [&](int slot) {
    next_a.put(shared_a[slot]);
    next_b.put(shared_b[slot]);
  };
  fetch();
  put(0);
  __syncthreads();
  int slot = 0;
  for (long long k = first; k < last; k += BK, slot ^= 1) {
    bool more = k + BK < last;
    if (more) fetch();
    core.multiply(shared_a[slot], shared_b[slot]);
    watch(shared_a[slot]);
    if (more) put(slot ^ 1);
    __syncthreads();
  }
  core.each(write);
}
