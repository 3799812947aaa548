// gemm.cu - convolution in two dimensions and inner product (a 1x1 convolution of M images of one pixel), forward and backward, in float32 that is
// exact; and the passes before and after that tensor cores (gemm_mma.cu) need too.
//
// gemm_forward   y: m = pixel of y, n = output of the group, k = (cell, channel). B = weights (outputs, cells x channels); planar: both the
//                other way round, which adds an image's few channels in the order of Caffe, whose near-ties of max pooling then fall alike.
// gemm_data      dx: m = pixel of x in a class, n = channel of the group, k = (cell of the class, output). B = weights packed as (channels,
//                cells x outputs) by gemm_pack.
// gemm_weights   dw: m = output of the group, n = (cell, channel), k = pixel of y. The last split runs past the end, where operands are 0.
//                db: in the blocks of the first columns, warps 0 to 3 also add up each slice of dy, a thread a column: 16 loads of 4 bytes beside
//                48 of 16, 64 clocks of the SM's shared memory for a slice of 512 or more, where a pass over dy would read 4 bytes an element.
// With one split the result is final: bias, ReLU and dropout (gemm_data: the backward of the ReLU below, or of a dropout and the ReLU before it), rounding or
// accumulating are done on the way out. With more, partial sums (split, C) go to `partial` in float (those of db in double), and gemm_finish, gemm_finish_dropout
// or gemm_weights_finish adds them in order. Main loop, bytes and operations: gemm_float.cuh; of dropout: gemm.cuh.
// gemm_finish    reads 4 bytes a split and writes one element; gemm_pack and gemm_pad read and write each weight, or activation, once.
#include "gemm_float.cuh"

template <bool A_KMAJOR, bool B_KMAJOR, class A, class B, class Place, class Watch = Unwatched>
__device__ __forceinline__ void multiply_float(const A& a, const B& b, const Block& block, long long first, long long last, const Exit<float>& exit, Place place,
                                               Watch watch = Watch()) {
  auto write = [&](int i, int j, const Vec<float>& sums) { exit.run<4>(block.m + i, block.n + j, &sums, place); };
  multiply_tables<A_KMAJOR, B_KMAJOR>(a, b, block.m, block.n, first, last, write, watch);
}

__global__ void __launch_bounds__(THREADS, 2)
    gemm_forward(const float* x, const float* w, const float* bias, float* y, float* partial, Geometry g, bool aligned, bool planar, bool relu, const double* number,
                 Drop drop) {
  Block block = block_of(g, BM, BN, false);
  Windows<float> a{x, forward_taps(g, block), aligned, planar};
  long long count = a.t.columns(), rows = a.t.rows();
  Matrix<float> b{w + (long long)block.group * g.group_outputs * count, g.group_outputs, (int)count, count, aligned};
  long long first = block.split * g.per_split, last = min(first + g.per_split, count);
  Finish<float> finish{y, bias, relu, false, nullptr, 0, number, drop};
  Exit<float> exit(finish, partial, block, rows, g.group_outputs, g.outputs, block.group * g.group_outputs, rows * g.outputs);
  multiply_float<true, true>(a, b, block, first, last, exit, [](long long m) { return m; });
}

__global__ void __launch_bounds__(THREADS, 2) gemm_data(const float* dy, const float* packed, float* dx, const float* positive, float factor, float* partial, Geometry g,
                                                          bool aligned) {
  Block block = block_of(g, BM, BN, true);
  Windows<float> a{dy, backward_taps(g, block), aligned, false};
  long long count = a.t.columns(), rows = a.t.rows(), pitch = (long long)g.kernel_h * g.kernel_w * g.group_outputs;
  if (block.m >= rows) return;  // another class has more pixels
  Filters<float> b{packed + block.group * g.group_channels * pitch, a.t, g.group_channels, pitch, aligned};
  long long first = block.split * g.per_split, last = min(first + g.per_split, count);
  Finish<float> finish{dx, nullptr, false, false, positive, factor};
  Exit<float> exit(finish, partial, block, rows, g.group_channels, g.channels, block.group * g.group_channels, (long long)g.images * g.height * g.width * g.channels);
  multiply_float<true, true>(a, b, block, first, last, exit, [&](long long m) { return a.t.pixel(m); });
}

__global__ void __launch_bounds__(THREADS, 2)
    gemm_weights(const float* x, const float* dy, float* dw, float* db, float* partial, double* partial_b, Geometry g, bool aligned_x, bool aligned_dy, bool accumulate_w,
                 bool accumulate_b) {
  Block block = block_of(g, BM, BN, false);
  Windows<float> b{x, forward_taps(g, block), aligned_x, false};
  long long pixels = b.t.rows(), count = b.t.columns();
  Matrix<float> a{dy + block.group * g.group_outputs, pixels, g.group_outputs, g.outputs, aligned_dy};
  long long first = block.split * g.per_split, last = min(first + g.per_split, pixels);
  Finish<float> finish{dw, nullptr, false, accumulate_w, nullptr};
  Exit<float> exit(finish, partial, block, g.group_outputs, (int)count, count, 0, g.outputs * count);
  double sum = 0;
  BiasGradient bias{db, partial_b, accumulate_b};
  bool sums = bias.wanted(block) && threadIdx.x < BM;
  auto place = [&](long long m) { return (long long)block.group * g.group_outputs + m; };
  multiply_float<false, false>(a, b, block, first, last, exit, place, [&](const float* slice) {
    if (sums) sum += column_sum(slice, threadIdx.x);
  });
  if (sums) bias.store(g, block, threadIdx.x, sum);
}

__device__ __forceinline__ float sum_of(const float* partial, long long i, long long n, int splits) {
  float sum = partial[i];
  for (int s = 1; s < splits; ++s) sum += partial[s * n + i];
  return sum;
}

// dw (n elements) from partial sums (splits, n), as gemm_finish does; db, unless null, from partial_b (outputs, splits), a warp for each output.
__global__ void gemm_weights_finish(const float* partial, const double* partial_b, float* dw, float* db, long long n, int outputs, int splits, bool accumulate_w,
                                    bool accumulate_b) {
  Finish<float> finish{dw, nullptr, false, accumulate_w, nullptr};
  for (long long i = thread_index(); i < n; i += thread_count()) {
    finish.store(i, 0, sum_of(partial, i, n, splits));
  }
  if (!db) return;
  for (long long i = thread_index() >> 5; i < outputs; i += thread_count() >> 5) {
    double sum = 0;
    for (int s = threadIdx.x & 31; s < splits; s += 32) sum += partial_b[i * splits + s];
    sum = warp_sum(sum);
    if ((threadIdx.x & 31) == 0) db[i] = (float)(accumulate_b ? db[i] + sum : sum);
  }
}

// y[i] = the sum of partial[s][i] in the order of s, finished; columns: outputs, for the bias.
template <class T>
__global__ void gemm_finish(const float* partial, const float* bias, const T* positive, float factor, T* y, long long n, int columns, int splits, bool relu) {
  Finish<T> finish{y, bias, relu, false, positive, factor};
  for (long long i = thread_index(); i < n; i += thread_count()) finish.store(i, i % columns, sum_of(partial, i, n, splits));
}

// The same with dropout. A warp takes 512 elements: each lane draws the bits of 16, and then takes every 32nd element and the bits of the lane that drew its.
template <class T>
__global__ void gemm_finish_dropout(const float* partial, const float* bias, T* y, long long n, int columns, int splits, bool relu, const double* number, Drop drop) {
  Finish<T> finish{y, bias, relu, false, nullptr, 0, number, drop};
  int lane = threadIdx.x & 31;
  u64 iteration = (u64)*number;
  for (long long first = (thread_index() >> 5) * 32 * DRAWN; first < n; first += thread_count() * DRAWN) {  // the same for all lanes of a warp
    unsigned mine = draw(first / DRAWN + lane, iteration, drop.seed, drop.layer, drop.threshold);
#pragma unroll 4
    for (int part = 0; part < DRAWN; ++part) {
      int at = part * 32 + lane;
      bool keep = __shfl_sync(0xffffffffu, mine, at / DRAWN) >> (at % DRAWN) & 1;
      long long i = first + at;
      if (i < n) finish.store_dropped(i, i % columns, sum_of(partial, i, n, splits), keep);
    }
  }
}

// Weights (group, outputs, cells, channels) as (group, channels, cells, padded), in the type of the activations; zeros after the outputs.
template <class S, class T>
__global__ void gemm_pack(const S* w, T* packed, int groups, int outputs, int cells, int channels, int padded) {
  long long n = (long long)groups * padded * cells * channels;
  for (long long i = thread_index(); i < n; i += thread_count()) {
    long long rest = i;
    int output = rest % padded;
    int cell = (rest /= padded) % cells;
    int channel = (rest /= cells) % channels;
    long long group = rest / channels;
    packed[i] = from_float<T>(output < outputs ? to_float(w[((group * outputs + output) * cells + cell) * channels + channel]) : 0.f);
  }
}

// x (rows, channels) as (rows, padded), in another type where asked for; zeros after the channels. A thread makes four elements.
template <class S, class T>
__global__ void gemm_pad(const S* x, T* y, long long rows, int channels, int padded) {
  int quads = padded / 4;
  for (long long i = thread_index(); i < rows * quads; i += thread_count()) {
    long long row = i / quads;
    int first = (int)(i - row * quads) * 4;
    T four[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) four[e] = from_float<T>(first + e < channels ? to_float(x[row * channels + first + e]) : 0.f);
    typename Word<4 * sizeof(T)>::type word;
    memcpy(&word, four, sizeof word);
    *reinterpret_cast<typename Word<4 * sizeof(T)>::type*>(y + row * padded + first) = word;
  }
}
