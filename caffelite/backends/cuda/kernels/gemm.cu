// gemm.cu - convolution in two dimensions and inner product (a 1x1 convolution of M images of one pixel), forward and backward.
//
// gemm_forward   y: m = pixel of y, n = output of the group, k = (cell, channel). B = weights (outputs, cells x channels); planar: both the
//                other way round, which adds an image's few channels in the order of Caffe, whose near-ties of max pooling then fall alike.
// gemm_data      dx: m = pixel of x, n = channel of the group, k = (cell, output). B = weights packed as (channels, cells x outputs) by gemm_pack.
// gemm_weights   dw: m = output of the group, n = (cell, channel), k = pixel of y. The last split runs past the end, where operands are 0.
//                db: the blocks of the first columns also add up the slices of dy that they have in shared memory, which saves reading dy again
//                (2 bytes an element in bfloat16) for BK/lanes loads of 4 bytes from shared memory a slice and thread.
// With one split the result is final: bias and ReLU (gemm_data: the backward of the ReLU below), rounding or accumulating are done on the way out. With more, partial sums (split, C)
// go to `partial` in float, and gemm_finish adds them in order. Main loop, bytes and operations: gemm.cuh. Ladder: not measured.
#include "gemm.cuh"

template <class T>
struct Finish {  // what happens to a sum before it is stored in y[at]; `column` counts the outputs
  T* y;
  const float* bias;
  bool relu, accumulate;
  const T* positive;  // y's shape: what a ReLU put out whose backward y goes on through
  __device__ __forceinline__ void store(long long at, long long column, float sum) const {
    if (bias) sum += bias[column];
    if (relu && !(sum > 0) && !is_nan(sum)) sum = 0;
    if (positive) sum = rectified(sum, positive[at]);
    y[at] = from_float<T>(accumulate ? to_float(y[at]) + sum : sum);
  }
};

template <class T>
__global__ void __launch_bounds__(THREADS, 2) gemm_forward(const T* x, const T* w, const float* bias, T* y, float* partial, Geometry g, bool aligned, bool planar, bool relu) {
  int group = blockIdx.z % g.groups, split = blockIdx.z / g.groups;
  Windows<T, false> a{x, g, group * g.group_channels, aligned, planar};
  long long count = a.columns(), rows = a.rows();
  Matrix<T> b{w + (long long)group * g.group_outputs * count, g.group_outputs, (int)count, count, aligned};
  long long m0 = (long long)blockIdx.x * BM, n0 = blockIdx.y * BN, first = split * g.per_split, last = min(first + g.per_split, count);
  Finish<T> finish{y, bias, relu, false, nullptr};
  multiply_tables<T, true, true>(a, b, m0, n0, first, last, [&](int i, int j, float sum) {
    long long m = m0 + i, n = n0 + j;
    if (m >= rows || n >= g.group_outputs) return;
    long long column = group * g.group_outputs + n, at = m * g.outputs + column;
    if (partial) partial[split * rows * g.outputs + at] = sum;
    else finish.store(at, column, sum);
  });
}

template <class T>
__global__ void __launch_bounds__(THREADS, 2) gemm_data(const T* dy, const T* packed, T* dx, const T* positive, float* partial, Geometry g, bool aligned) {
  int group = blockIdx.z % g.groups, split = blockIdx.z / g.groups;
  Windows<T, true> a{dy, g, group * g.group_outputs, aligned, false};
  long long count = a.columns(), rows = a.rows();
  Matrix<T> b{packed + (long long)group * g.group_channels * count, g.group_channels, (int)count, count, aligned};
  long long m0 = (long long)blockIdx.x * BM, n0 = blockIdx.y * BN, first = split * g.per_split, last = min(first + g.per_split, count);
  Finish<T> finish{dx, nullptr, false, false, positive};
  multiply_tables<T, true, true>(a, b, m0, n0, first, last, [&](int i, int j, float sum) {
    long long m = m0 + i, n = n0 + j;
    if (m >= rows || n >= g.group_channels) return;
    long long at = m * g.channels + group * g.group_channels + n;
    if (partial) partial[split * rows * g.channels + at] = sum;
    else finish.store(at, 0, sum);
  });
}

template <class T>
__global__ void __launch_bounds__(THREADS, 2)
    gemm_weights(const T* x, const T* dy, float* dw, float* db, float* partial, Geometry g, bool aligned_x, bool aligned_dy, bool accumulate_w, bool accumulate_b) {
  int group = blockIdx.z % g.groups, split = blockIdx.z / g.groups;
  Windows<T, false> b{x, g, group * g.group_channels, aligned_x, false};
  long long pixels = b.rows(), count = b.columns();
  Matrix<T> a{dy + group * g.group_outputs, pixels, g.group_outputs, g.outputs, aligned_dy};
  long long m0 = (long long)blockIdx.x * BM, n0 = (long long)blockIdx.y * BN, first = split * g.per_split, last = min(first + g.per_split, pixels);
  Finish<float> finish{dw, nullptr, false, accumulate_w, nullptr};
  long long results = g.outputs * count, each = results + (db ? 2 * g.outputs : 0);  // of a split: see gemm_weights_finish
  ColumnSums<T> bias;
  bool sums = db && blockIdx.y == 0;
  auto write = [&](int i, int j, float sum) {
    long long m = m0 + i, n = n0 + j;
    if (m >= g.group_outputs || n >= count) return;
    long long at = (group * g.group_outputs + m) * count + n;
    if (partial) partial[split * each + at] = sum;
    else finish.store(at, 0, sum);
  };
  multiply_tables<T, false, false>(a, b, m0, n0, first, last, write, [&](const T* slice, int pitch) {
    if (sums) bias.add(slice, pitch);
  });
  if (!sums) return;
  bias.each([&](int i, double sum) {
    if (m0 + i >= g.group_outputs) return;
    long long at = group * g.group_outputs + m0 + i;
    if (partial) {
      float high = (float)sum, *pair = partial + split * each + results + 2 * at;
      pair[0] = high;
      pair[1] = (float)(sum - high);
    } else {
      db[at] = (float)(accumulate_b ? db[at] + sum : sum);
    }
  });
}

// dw and db (may be null) from the partial sums of gemm_weights, in the order of the splits. results, outputs: their elements. A split leaves its
// terms of dw, and after them those of db as pairs of floats that make a double.
template <class T>
__global__ void gemm_weights_finish(const T* partial, T* dw, T* db, long long results, int outputs, int splits, bool accumulate_w, bool accumulate_b) {
  long long each = results + (db ? 2 * outputs : 0);
  for (long long i = thread_index(); i < results; i += thread_count()) {
    T sum = partial[i];
    for (int s = 1; s < splits; ++s) sum += partial[s * each + i];
    dw[i] = accumulate_w ? dw[i] + sum : sum;
  }
  for (long long i = thread_index(); db && i < outputs; i += thread_count()) {
    double sum = 0;
    for (int s = 0; s < splits; ++s) {
      const T* pair = partial + s * each + results + 2 * i;
      sum += (double)pair[0] + pair[1];
    }
    db[i] = (T)(accumulate_b ? db[i] + sum : sum);
  }
}

// y[i] = the sum of partial[s][i] in the order of s, finished; columns: outputs, for the bias.
template <class T>
__global__ void gemm_finish(const float* partial, const float* bias, const T* positive, T* y, long long n, int columns, int splits, bool relu) {
  Finish<T> finish{y, bias, relu, false, positive};
  for (long long i = thread_index(); i < n; i += thread_count()) {
    float sum = partial[i];
    for (int s = 1; s < splits; ++s) sum += partial[s * n + i];
    finish.store(i, i % columns, sum);
  }
}

// Weights (group, outputs, cells, channels) as (group, channels, cells, outputs), in the type of the activations.
template <class S, class T>
__global__ void gemm_pack(const S* w, T* packed, int groups, int outputs, int cells, int channels) {
  long long n = (long long)groups * outputs * cells * channels;
  for (long long i = thread_index(); i < n; i += thread_count()) {
    long long rest = i;
    int output = rest % outputs;
    int cell = (rest /= outputs) % cells;
    int channel = (rest /= cells) % channels;
    long long group = rest / channels;
    packed[i] = from_float<T>(to_float(w[((group * outputs + output) * cells + cell) * channels + channel]));
  }
}
