// gemm.cuh - what convolution and inner product are to both main loops (gemm_float.cuh, gemm_mma.cuh): C[m,n] = sum_k A[m,k] B[n,k], of
// operands that need not exist as matrices.
//
// Taps says how the pixels of one grid meet those of another through a kernel, on each axis: position = step * pixel + first + tap * cell.
//   forward   pixels of y meet x: position = stride p - pad + dilation c.
//   backward  a pixel h of x meets y at (h + pad - dilation c) / stride where that is whole. Pixels with the same h mod stride meet the
//             same cells c, c + stride/gcd(stride, dilation), ...: each such class is a product of its own, without a factor that is 0, and
//             its positions move by one a pixel and by -dilation/gcd a cell. Nothing else is needed for any stride, pad or dilation.
// A block's number (one dimension) counts tiles along n, then m, groups, classes and splits: neighbours share rows of A in L2. Splits cut k
// into runs whose partial sums a second kernel adds in order (no atomics).
#pragma once
#include "dropout.cuh"

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
// Dropout reads nothing: the thread that stores a run of 16 bytes draws the block of random bits that it falls into (dropout.cu), about 200 integer
// multiplications for 8 outputs in bfloat16 or 4 in float; 2 or 4 neighbours draw the same one. A run that is not on a boundary may fall into two. Sums in
// splits leave through gemm_finish_dropout, where a lane draws for 16. Its gradient, in gemm_data, is a multiplication beside what the ReLU's costs: `positive`,
// one element, is read for both. Passes of their own would move 5 bytes forward and 5 more backward in bfloat16, 9 and 9 in float. Not measured.
// Ladder: this form only. Untried: one draw for the runs of neighbouring threads.

template <class T>
struct Finish {  // before they are stored in y[at]; `column` counts the outputs
  T* y;
  const float* bias;
  bool relu, accumulate;
  const T* positive;    // y's shape: what a ReLU put out whose backward y goes on through, or, with a factor, the dropout after that ReLU
  float factor;         // 1 / (1 - ratio) of that dropout; 0: none
  const double* number;  // the pass, whose random bits drop some of y; null: nothing is dropped
  Drop drop;
  __device__ __forceinline__ float value(long long at, long long column, float sum) const {
    if (bias) sum += bias[column];
    if (relu && !(sum > 0) && !is_nan(sum)) sum = 0;
    if (factor) sum = dropped(to_float(from_float<T>(sum)), factor, 1);  // rounded as if stored, here and below
    if (positive) sum = rectified(sum, positive[at]);
    return accumulate ? to_float(y[at]) + sum : sum;
  }
  __device__ __forceinline__ void store(long long at, long long column, float sum) const { y[at] = from_float<T>(value(at, column, sum)); }
  __device__ __forceinline__ void store_dropped(long long at, long long column, float sum, bool keep) const {
    y[at] = from_float<T>(dropped(to_float(from_float<T>(value(at, column, sum))), drop.factor, keep));
  }
  // The first `count` of neighbouring sums; whole: all of them, on a 16-byte boundary.
  __device__ __forceinline__ void store_run(long long at, long long column, const Vec<float>* sums, int count, bool whole) const {
    Vec<T> v;
    unsigned bits = number ? kept(at, whole ? Vec<T>::size : count, (u64)*number, drop) : 0;
#pragma unroll
    for (int e = 0; e < Vec<T>::size; ++e) {
      if (!whole && e >= count) continue;
      v[e] = from_float<T>(value(at + e, column + e, sums[e / 4][e % 4]));
      if (number) v[e] = from_float<T>(dropped(to_float(v[e]), drop.factor, bits >> e & 1));
      if (!whole) y[at + e] = v[e];
    }
    if (whole) store_vec(y + at, v);
  }
};

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
    aligned = pitch % RUN == 0 && first % RUN == 0 && columns % RUN == 0 && all % RUN == 0 && is_aligned16(finish.y) && is_aligned16(finish.positive);
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
    Finish<float> sums_only{partial, nullptr, false, false, nullptr};
#pragma unroll
    for (int e = 0; e < RUN; e += 4) sums_only.store_run(at + e, 0, sums + e / 4, count - e, aligned);
  }
};

// --- the bias gradient beside the weight gradient -----------------------------------------------------------------------------
// The blocks of the first columns (wanted()) add up dy's slices as they lie in shared memory, so that dy is not read again for db. A slice's
// terms are added in float, slices and splits in double, each output by one thread.

struct BiasGradient {
  float* db;        // null: not wanted
  double* partial;  // (outputs, splits); null: db is final
  bool accumulate;
  __device__ __forceinline__ bool wanted(const Block& block) const { return db && block.n == 0; }
  // The sum of column m of the block's dy, padding or not.
  __device__ __forceinline__ void store(const Geometry& g, const Block& block, int m, double sum) const {
    if (block.m + m >= g.kept_outputs) return;
    long long at = (long long)block.group * g.kept_outputs + block.m + m;
    if (partial) partial[at * g.splits + block.split] = sum;
    else db[at] = (float)(accumulate ? db[at] + sum : sum);
  }
};
struct Unwatched {
  template <class T>
  __device__ __forceinline__ void operator()(const T*) const {}
};
