// gemm.cuh - what convolution and inner product are to both main loops (gemm.cu, gemm_mma.cu): C[m,n] = sum_k A[m,k] B[n,k], of operands that
// need not exist as matrices; and the main loop of float32, whose sums are exact float32 in the order of k.
//
// Taps says how the pixels of one grid meet those of another through a kernel, on each axis: position = step * pixel + first + tap * cell.
//   forward   pixels of y meet x: position = stride p - pad + dilation c.
//   backward  a pixel h of x meets y at (h + pad - dilation c) / stride where that is whole. Pixels with the same h mod stride meet the
//             same cells c, c + stride/gcd(stride, dilation), ...: each such class is a product of its own, without a factor that is 0, and
//             its positions move by one a pixel and by -dilation/gcd a cell. Nothing else is needed for any stride, pad or dilation.
// A block's number (one dimension) counts tiles along n, then m, groups, classes and splits: neighbours share rows of A in L2. Splits cut k
// into runs whose partial sums a second kernel adds in order (no atomics).
//
// The float32 loop: 128x64 of C by 256 threads, 8x4 products a thread. While it multiplies one slice of 16 columns in shared memory, the next
// is on its way in registers; two slices alternate, one barrier each. It takes operands of any alignment.
// Slices lie as [k][m] and [k][n]; an operand whose columns are k is turned as it is put there. Registers 128 (2 blocks an SM), shared 25,600
// bytes. Bytes: each A slice is read ceil(N/64) times, each B slice ceil(M/128) times, mostly from L2. Operations: 2 M N K; a warp's 3 loads of
// 16 bytes a thread for 32 multiply-adds take 4 clocks of shared memory, which 8 warps share, where the multiply-adds take 8: so these bound it.
// Not measured. Ladder: 1. 12 loads of 4 bytes for 32 multiply-adds, 12 clocks; 2. this.
#pragma once
#include "common.cuh"

struct Geometry {     // of a convolution in two dimensions; channels of all groups, and of one, as they lie for the kernel
  int images, height, width, channels, group_channels;  // x
  int out_height, out_width, outputs, group_outputs;     // y
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int groups, splits;
  int kept_channels, kept_outputs;  // of a group in the weight gradient: fewer where an operand was padded
  int tiles_m, tiles_n;
  long long per_split;  // columns k of one split, a multiple of a slice
};

struct Block {  // which part of which product a block makes
  long long m, n;  // the first row and column
  int group, class_h, class_w, split;
};
__device__ __forceinline__ Block block_of(const Geometry& g, int bm, int bn, bool classes) {
  unsigned rest = blockIdx.x;
  Block b = {};
  b.n = (long long)(rest % g.tiles_n) * bn;
  b.m = (long long)((rest /= g.tiles_n) % g.tiles_m) * bm;
  b.group = (rest /= g.tiles_m) % g.groups;
  rest /= g.groups;
  if (classes) {
    b.class_w = rest % g.stride_w;
    b.class_h = (rest /= g.stride_w) % g.stride_h;
    rest /= g.stride_h;
  }
  b.split = rest;
  return b;
}

struct Axis {
  int pixels, cells, step, first, tap;                // position = step * pixel + first + tap * cell
  int first_pixel, pixel_step, first_cell, cell_step;  // what pixel 0 and cell 0 are, and how far their neighbours
};
__device__ __forceinline__ Axis forward_axis(int out, int kernel, int stride, int pad, int dilation) {
  return {out, kernel, stride, -pad, dilation, 0, 1, 0, 1};
}
__device__ __forceinline__ Axis backward_axis(int size, int kernel, int stride, int pad, int dilation, int offset) {
  if (stride == 1) return {size, kernel, 1, pad, -dilation, 0, 1, 0, 1};
  int cell = 0, period = 1;
  while (cell < kernel && (offset + pad - cell * dilation) % stride) ++cell;
  while (period * dilation % stride) ++period;
  Axis a = {offset < size ? (size - offset - 1) / stride + 1 : 0, cell < kernel ? (kernel - 1 - cell) / period + 1 : 0, 1};
  a.first = a.cells ? (offset + pad - cell * dilation) / stride : 0;
  a.tap = -(period * dilation / stride);
  a.first_pixel = offset, a.pixel_step = stride, a.first_cell = cell, a.cell_step = period;
  return a;
}

struct Taps {
  Axis h, w;
  int images, height, width;                // of what is gathered
  int depth, channels, first_channel;       // its channels of a group, of all, before the group
  int all_height, all_width, kernel_w;      // of what the pixels, and the cells, are a class of
  __device__ __forceinline__ long long rows() const { return (long long)images * h.pixels * w.pixels; }
  __device__ __forceinline__ int columns() const { return h.cells * w.cells * depth; }
  __device__ __forceinline__ int cell(int r, int s) const { return (h.first_cell + r * h.cell_step) * kernel_w + w.first_cell + s * w.cell_step; }
  __device__ __forceinline__ long long pixel(long long m) const {  // among all pixels
    if (h.pixel_step == 1 && w.pixel_step == 1) return m;
    long long line = m / w.pixels, image = line / h.pixels;
    int i = (int)(line - image * h.pixels), j = (int)(m - line * w.pixels);
    return (image * all_height + h.first_pixel + i * h.pixel_step) * all_width + w.first_pixel + j * w.pixel_step;
  }
};
__device__ __forceinline__ Taps forward_taps(const Geometry& g, const Block& b) {
  Axis h = forward_axis(g.out_height, g.kernel_h, g.stride_h, g.pad_h, g.dilation_h), w = forward_axis(g.out_width, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w);
  return {h, w, g.images, g.height, g.width, g.group_channels, g.channels, b.group * g.group_channels, g.out_height, g.out_width, g.kernel_w};
}
__device__ __forceinline__ Taps backward_taps(const Geometry& g, const Block& b) {
  Axis h = backward_axis(g.height, g.kernel_h, g.stride_h, g.pad_h, g.dilation_h, b.class_h);
  Axis w = backward_axis(g.width, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w, b.class_w);
  return {h, w, g.images, g.out_height, g.out_width, g.group_outputs, g.outputs, b.group * g.group_outputs, g.height, g.width, g.kernel_w};
}

// --- what happens to sums on their way out ----------------------------------------------------------------------------------

template <class T>
struct Finish {  // before they are stored in y[at]; `column` counts the outputs
  T* y;
  const float* bias;
  bool relu, accumulate;
  __device__ __forceinline__ float value(long long at, long long column, float sum) const {
    if (bias) sum += bias[column];
    if (relu && !(sum > 0) && !is_nan(sum)) sum = 0;
    return accumulate ? to_float(y[at]) + sum : sum;
  }
  __device__ __forceinline__ void store(long long at, long long column, float sum) const { y[at] = from_float<T>(value(at, column, sum)); }
  // The first `count` of neighbouring sums; whole: all of them, on a 16-byte boundary.
  __device__ __forceinline__ void store_run(long long at, long long column, const Vec<float>* sums, int count, bool whole) const {
    Vec<T> v;
#pragma unroll
    for (int e = 0; e < Vec<T>::size; ++e) {
      if (whole) v[e] = from_float<T>(value(at + e, column + e, sums[e / 4][e % 4]));
      else if (e < count) store(at + e, column + e, sums[e / 4][e % 4]);
    }
    if (whole) store_vec(y + at, v);
  }
};

// --- operands of the float32 loop -------------------------------------------------------------------------------------------
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

// The loop over columns first..last-1 of the operands; write(m, n, sums) gets runs of 4 of the block's part of C, inside or not.
template <bool A_KMAJOR, bool B_KMAJOR, class A, class B, class Write>
__device__ __forceinline__ void multiply_tables(const A& a, const B& b, long long m0, long long n0, long long first, long long last, Write write) {
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
    if (more) put(slot ^ 1);
    __syncthreads();
  }
  core.each(write);
}

// Where runs of neighbouring sums of a block go: element (m, n) of rows x columns of C to place(m) * pitch + first + n of the result, which has
// `all` elements; or, not finished, to the same place in `partial`, which holds a result for each split.
template <class T>
struct Exit {
  Finish<T> finish;
  float* partial;
  long long rows, pitch, first, all;
  int columns;
  bool aligned;

  __device__ __forceinline__ Exit(const Finish<T>& finish_, float* partial_, const Block& block, long long rows_, int columns_, long long pitch_, long long first_, long long all_)
      : finish(finish_), partial(partial_ ? partial_ + block.split * all_ : nullptr), rows(rows_), pitch(pitch_), first(first_), all(all_), columns(columns_) {
    constexpr int RUN = Vec<T>::size;
    aligned = pitch % RUN == 0 && first % RUN == 0 && columns % RUN == 0 && all % RUN == 0 && is_aligned16(finish.y);
  }
  template <int RUN, class Place>
  __device__ __forceinline__ void run(long long m, long long n, const Vec<float>* sums, Place place) const {
    if (m >= rows || n >= columns) return;
    long long at = place(m) * pitch + first + n;
    int count = (int)min((long long)RUN, columns - n);
    if (!partial) {
      finish.store_run(at, first + n, sums, count, aligned);
      return;
    }
    Finish<float> sums_only{partial, nullptr, false, false};
#pragma unroll
    for (int e = 0; e < RUN; e += 4) sums_only.store_run(at + e, 0, sums + e / 4, count - e, aligned);
  }
};
