// gemm.cuh - the one main loop behind convolution and inner product: C[m,n] = sum_k A[m,k] B[n,k], of operands that need not exist as matrices.
//
// An operand is a Table: it gives 16 bytes of neighbouring columns at a time, zeros outside. A Matrix lies in
// memory; Windows gathers a convolution's input (or, backward, its output gradient) on the fly, so that no column buffer is written.
// Operand A is read [m][k] or, KMAJOR false, [k][m] (a weight gradient sums over pixels, which are the rows in memory); likewise B.
// A block makes BM x BN of C with 256 threads. While it multiplies one slice of BK columns in shared memory, the next slice is on its way in
// registers; two slices alternate, one barrier each. float: 8x4 products a thread from scalars in shared memory, sums in the order of k.
// bf16: tensor cores, mma m16n8k16 fed by ldmatrix, 8 warps of 32x32, sums in float.
// blockIdx.z = split * groups + group: splits cut k into runs whose partial sums a second kernel adds in order (no atomics).
// Rows of shared memory are padded so that 8 rows of an 8x8 matrix, or 16 neighbouring n, fall into different banks.
// Bytes: each A slice is read ceil(N/BN) times and each B slice ceil(M/BM) times, mostly from L2. Operations: 2 M N K.
// Ladder: this is the first rung; not measured. Next: 16-byte cp.async in 3 or 4 stages, 128x128 and 128x192 tiles, wgmma and TMA on Hopper.
#pragma once
#include "common.cuh"

struct Geometry {     // of a convolution in two dimensions; channels of all groups, and of one
  int images, height, width, channels, group_channels;  // x
  int out_height, out_width, outputs, group_outputs;     // y
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int groups, splits;
  long long per_split;  // columns k of one split, a multiple of BK
};

constexpr int THREADS = 256, BM = 128, BN = 64;
template <class T>
struct Depth {
  static constexpr int BK = sizeof(T) == 4 ? 16 : 32;
};

// --- operands ---------------------------------------------------------------------------------------------------------------
// A table is read by cursors: row() and column() work out once where an index lies, next_row() and next_column() move on by a slice,
// dividing only where a line or a cell ends, get() fetches 16 bytes there.

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

// Row: a pixel of y (BACKWARD false) or x (true). Column: (kernel cell, channel of the group) of what the pixel's window holds there; planar:
// (channel, kernel cell), for sums in Caffe's order.
template <class T, bool BACKWARD>
struct Windows {
  const T* data;  // x, or dy
  Geometry g;
  int first_channel;  // of the group
  bool aligned;       // channels of a group, and of all, are multiples of a vector
  bool planar;        // and then not aligned
  struct Row {
    int image, h, w;
  };
  struct Column {
    int cell, channel;
  };

  __device__ __forceinline__ int depth() const { return BACKWARD ? g.group_outputs : g.group_channels; }
  __device__ __forceinline__ int cells() const { return g.kernel_h * g.kernel_w; }
  __device__ __forceinline__ int all_channels() const { return BACKWARD ? g.outputs : g.channels; }
  __device__ __forceinline__ int width() const { return BACKWARD ? g.width : g.out_width; }
  __device__ __forceinline__ int height() const { return BACKWARD ? g.height : g.out_height; }
  __device__ __forceinline__ long long rows() const { return (long long)g.images * height() * width(); }
  __device__ __forceinline__ int columns() const { return cells() * depth(); }

  __device__ __forceinline__ Row row(long long index) const {
    long long line = index / width();
    return {(int)(line / height()), (int)(line % height()), (int)(index - line * width())};
  }
  __device__ __forceinline__ Column column(long long index) const {
    int inner = planar ? cells() : depth(), outer = (int)(index / inner), rest = (int)index - outer * inner;
    return planar ? Column{rest, outer} : Column{outer, rest};
  }
  static __device__ __forceinline__ void carry(int& digit, int base, int& next) {
    if (digit < base) return;
    int over = digit / base;
    digit -= over * base;
    next += over;
  }
  __device__ __forceinline__ void next_row(Row& row, int by) const {
    row.w += by;
    carry(row.w, width(), row.h);
    carry(row.h, height(), row.image);
  }
  __device__ __forceinline__ void next_column(Column& column, int by) const {
    if (planar) {
      column.cell += by;
      carry(column.cell, cells(), column.channel);
    } else {
      column.channel += by;
      carry(column.channel, depth(), column.cell);
    }
  }
  __device__ __forceinline__ bool inside(const Row& row, const Column& column) const {
    return row.image < g.images && column.cell < cells() && column.channel < depth();
  }
  // Where the pixel's window holds the kernel cell and channel; null outside the image, or between the steps of a stride.
  __device__ __forceinline__ const T* at(const Row& row, const Column& column) const {
    int r = column.cell / g.kernel_w, s = column.cell - r * g.kernel_w, y, x;
    if (!BACKWARD) {
      y = row.h * g.stride_h - g.pad_h + r * g.dilation_h;
      x = row.w * g.stride_w - g.pad_w + s * g.dilation_w;
      if ((unsigned)y >= (unsigned)g.height || (unsigned)x >= (unsigned)g.width) return nullptr;
    } else {
      y = row.h + g.pad_h - r * g.dilation_h;
      x = row.w + g.pad_w - s * g.dilation_w;
      if (y < 0 || x < 0) return nullptr;
      if (g.stride_h > 1 || g.stride_w > 1) {
        if (y % g.stride_h || x % g.stride_w) return nullptr;
        y /= g.stride_h;
        x /= g.stride_w;
      }
      if (y >= g.out_height || x >= g.out_width) return nullptr;
    }
    int down = BACKWARD ? g.out_height : g.height, across = BACKWARD ? g.out_width : g.width;
    return data + (((long long)row.image * down + y) * across + x) * all_channels() + first_channel + column.channel;
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

// --- slices in shared memory ------------------------------------------------------------------------------------------------

// ROWS x COLUMNS of a table, one after another along its columns (KMAJOR) or rows.
template <class T, class Table, int ROWS, int COLUMNS, bool KMAJOR>
struct Slice {
  static constexpr int pad = sizeof(T) == 4 ? 4 : 8;
  static constexpr int pitch = COLUMNS + pad;
  static constexpr int across = COLUMNS / Vec<T>::size;  // vectors in a row
  static constexpr int each = ROWS * across / THREADS;
  static_assert(each * THREADS == ROWS * across, "every thread holds as many vectors");
  Vec<T> held[each];
  typename Table::Row row[each];
  typename Table::Column column[each];

  __device__ __forceinline__ void start(const Table& table, long long first_row, long long first_column) {
#pragma unroll
    for (int i = 0; i < each; ++i) {
      int v = threadIdx.x + i * THREADS;
      row[i] = table.row(first_row + v / across);
      column[i] = table.column(first_column + v % across * Vec<T>::size);
    }
  }
  __device__ __forceinline__ void fetch(const Table& table) {  // and moves on
#pragma unroll
    for (int i = 0; i < each; ++i) {
      held[i] = table.get(row[i], column[i]);
      if (KMAJOR) table.next_column(column[i], COLUMNS);
      else table.next_row(row[i], ROWS);
    }
  }
  __device__ __forceinline__ void put(T* shared) const {
#pragma unroll
    for (int i = 0; i < each; ++i) {
      int v = threadIdx.x + i * THREADS;
      store_vec(shared + v / across * pitch + v % across * Vec<T>::size, held[i]);
    }
  }
};

// --- products of a slice ----------------------------------------------------------------------------------------------------

template <class T, bool A_KMAJOR, bool B_KMAJOR, int A_PITCH, int B_PITCH>
struct Core;

template <bool A_KMAJOR, bool B_KMAJOR, int A_PITCH, int B_PITCH>
struct Core<float, A_KMAJOR, B_KMAJOR, A_PITCH, B_PITCH> {
  static constexpr int TM = BM / 16, TN = BN / 16;  // rows ty + 16 i, columns tx + 16 j
  float sum[TM][TN] = {};
  __device__ __forceinline__ void multiply(const float* a, const float* b) {
    int tx = threadIdx.x & 15, ty = threadIdx.x >> 4;
#pragma unroll
    for (int k = 0; k < Depth<float>::BK; ++k) {
      float row[TM], column[TN];
#pragma unroll
      for (int i = 0; i < TM; ++i) row[i] = A_KMAJOR ? a[(ty + 16 * i) * A_PITCH + k] : a[k * A_PITCH + ty + 16 * i];
#pragma unroll
      for (int j = 0; j < TN; ++j) column[j] = B_KMAJOR ? b[(tx + 16 * j) * B_PITCH + k] : b[k * B_PITCH + tx + 16 * j];
#pragma unroll
      for (int i = 0; i < TM; ++i)
#pragma unroll
        for (int j = 0; j < TN; ++j) sum[i][j] = fmaf(row[i], column[j], sum[i][j]);  // in so many words: the emulator rounds as a GPU does
    }
  }
  template <class Write>
  __device__ __forceinline__ void each(Write write) const {
    int tx = threadIdx.x & 15, ty = threadIdx.x >> 4;
#pragma unroll
    for (int i = 0; i < TM; ++i)
#pragma unroll
      for (int j = 0; j < TN; ++j) write(ty + 16 * i, tx + 16 * j, sum[i][j]);
  }
};

template <bool A_KMAJOR, bool B_KMAJOR, int A_PITCH, int B_PITCH>
struct Core<bf16, A_KMAJOR, B_KMAJOR, A_PITCH, B_PITCH> {
  static constexpr int MI = 2, NJ = 4;  // 16x8 products of a warp's 32x32
  float sum[MI][NJ][4] = {};
  __device__ __forceinline__ void multiply(const bf16* a, const bf16* b) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, m0 = (warp >> 1) * 32, n0 = (warp & 1) * 32;
    int line = lane & 7, low = lane >> 3 & 1, high = lane >> 4;  // the row of an 8x8 matrix whose address this lane gives, and which matrix
#pragma unroll
    for (int k = 0; k < Depth<bf16>::BK; k += 16) {
      cf_u32 left[MI][4], right[NJ][2];
#pragma unroll
      for (int i = 0; i < MI; ++i) {  // matrices: upper and lower rows for the first 8 k, then for the next
        int m = m0 + 16 * i;
        if (A_KMAJOR) cf_ldmatrix_x4(left[i], a + (m + low * 8 + line) * A_PITCH + k + high * 8);
        else cf_ldmatrix_x4_trans(left[i], a + (k + high * 8 + line) * A_PITCH + m + low * 8);
      }
#pragma unroll
      for (int j = 0; j < NJ; j += 2) {  // matrices: both halves of k for 8 columns, then for the next 8
        int n = n0 + 8 * j;
        cf_u32 both[4];
        if (B_KMAJOR) cf_ldmatrix_x4(both, b + (n + high * 8 + line) * B_PITCH + k + low * 8);
        else cf_ldmatrix_x4_trans(both, b + (k + low * 8 + line) * B_PITCH + n + high * 8);
        right[j][0] = both[0], right[j][1] = both[1], right[j + 1][0] = both[2], right[j + 1][1] = both[3];
      }
#pragma unroll
      for (int i = 0; i < MI; ++i)
#pragma unroll
        for (int j = 0; j < NJ; ++j) cf_mma_m16n8k16_bf16(sum[i][j], left[i], right[j]);
    }
  }
  template <class Write>
  __device__ __forceinline__ void each(Write write) const {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int m0 = (warp >> 1) * 32 + (lane >> 2), n0 = (warp & 1) * 32 + (lane & 3) * 2;
#pragma unroll
    for (int i = 0; i < MI; ++i)
#pragma unroll
      for (int j = 0; j < NJ; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) write(m0 + 16 * i + (e >> 1) * 8, n0 + 8 * j + (e & 1), sum[i][j][e]);
  }
};

// Sums over k of an operand that is read [k][m], from its slices in shared memory: the bias gradient beside the weight gradient. Neighbouring lanes
// share a word of columns, and each takes every LANES-th row of a slice; a slice's terms are added in float, the slices in double.
template <class T>
struct ColumnSums {
  static constexpr int wide = 4 / sizeof(T), lanes = THREADS * wide / BM;  // columns in a word; lanes that share one
  static_assert(lanes * BM == THREADS * wide && Depth<T>::BK % lanes == 0, "every lane adds as many terms");
  double sum[wide] = {};
  __device__ __forceinline__ int column() const { return threadIdx.x / lanes * wide; }
  __device__ __forceinline__ void add(const T* slice, int pitch) {
    float part[wide] = {};
    const T* own = slice + threadIdx.x % lanes * pitch + column();
#pragma unroll
    for (int k = 0; k < Depth<T>::BK; k += lanes) {
      unsigned word = *reinterpret_cast<const unsigned*>(own + k * pitch);
      T items[wide];
      memcpy(items, &word, 4);
#pragma unroll
      for (int i = 0; i < wide; ++i) part[i] += to_float(items[i]);
    }
#pragma unroll
    for (int i = 0; i < wide; ++i) sum[i] += part[i];
  }
  template <class Write>
  __device__ __forceinline__ void each(Write write) {  // write(m, sum) from one lane for each m; all lanes of the warp call it
#pragma unroll
    for (int i = 0; i < wide; ++i) {
      for (int offset = lanes / 2; offset; offset >>= 1) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], offset);
      if (threadIdx.x % lanes == 0) write(column() + i, sum[i]);
    }
  }
};
struct NoSums {
  template <class T>
  __device__ __forceinline__ void operator()(const T*, int) const {}
};

// The loop over columns first..last-1 of the operands; write(m, n, sum) gets each element of the block's part of C, inside or not.
// watch(slice, pitch) sees every slice of A in shared memory.
template <class T, bool A_KMAJOR, bool B_KMAJOR, class A, class B, class Write, class Watch = NoSums>
__device__ __forceinline__ void multiply_tables(const A& a, const B& b, long long m0, long long n0, long long first, long long last, Write write,
                                                Watch watch = Watch()) {
  constexpr int BK = Depth<T>::BK;
  using SliceA = Slice<T, A, A_KMAJOR ? BM : BK, A_KMAJOR ? BK : BM, A_KMAJOR>;
  using SliceB = Slice<T, B, B_KMAJOR ? BN : BK, B_KMAJOR ? BK : BN, B_KMAJOR>;
  __shared__ __align__(16) T shared_a[2][(A_KMAJOR ? BM : BK) * SliceA::pitch];
  __shared__ __align__(16) T shared_b[2][(B_KMAJOR ? BN : BK) * SliceB::pitch];
  SliceA next_a;
  SliceB next_b;
  Core<T, A_KMAJOR, B_KMAJOR, SliceA::pitch, SliceB::pitch> core;
  next_a.start(a, A_KMAJOR ? m0 : first, A_KMAJOR ? first : m0);
  next_b.start(b, B_KMAJOR ? n0 : first, B_KMAJOR ? first : n0);
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
    watch(shared_a[slot], SliceA::pitch);
    if (more) put(slot ^ 1);
    __syncthreads();
  }
  core.each(write);
}
