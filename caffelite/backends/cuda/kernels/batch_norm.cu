// batch_norm.cu - statistics of channels, normalisation and its backward passes.
//
// Channels last (and 2 axes): memory is a matrix (pixels, channels). A block of 256 owns `columns` runs of N neighbouring channels, N being 16
// bytes where the channels divide so, and a slab of pixels: a warp reads unbroken memory, and a channel's parameters stay in registers.
// Other numbers of axes: memory is (outer, channels, inner); sums take a block for each channel and slab, the passes a block for each plane.
// Statistics: a thread's values as distances from its first one, in float; means and squared distances of threads, blocks and slabs are put together in
// double, each block leaving its two in `partial` (channels, 2, slabs). Never E[x^2] - E[x]^2 of the values themselves.
// Backward's sums: doubles from the first term on; a conversion and two double operations an element stay below memory time where doubles run at half
// rate (sm_80, sm_90). A warp for each channel adds up the slabs in a fixed order.
// With a Scale and a ReLU after it: batch_norm_scale.cu.
// Bytes an element (float32): statistics 4, forward 8, backward 8 for the sums and 12 for the pass, backward_global 8.
// Ladder: this is the first rung; not measured.
#include "batch_norm.cuh"

// --- moments: mean and sum of squared distances ----------------------------------------------------------------------------------
// A thread's values of a channel, as distances from the first of them, so that squares keep their digits whatever the mean.
struct Moments {
  float origin = 0, sum = 0, squares = 0;
  __device__ __forceinline__ void add(float x) {
    float distance = x - origin;
    sum += distance;
    squares = fmaf(distance, distance, squares);
  }
  __device__ __forceinline__ double mean(double count) const { return count ? origin + sum / count : 0.; }
  __device__ __forceinline__ double spread(double count) const { return count ? squares - (double)sum * sum / count : 0.; }
};
// How many of first, first + step, ... lie before end.
__device__ __forceinline__ long long count_of(long long first, long long end, long long step) { return first < end ? (end - first + step - 1) / step : 0; }

// columns: runs of N channels to a block; slab: pixels to a block. partial <- each slab's mean and sum of squared distances from it.
template <class T, int N>
__global__ void __launch_bounds__(256, 3) matrix_moments(const T* x, double* partial, long long pixels, int channels, int columns, long long slab) {
  __shared__ double means[256 * N], spreads[256 * N];
  int rows = 256 / columns, column = threadIdx.x % columns, row = threadIdx.x / columns;
  int channel = (blockIdx.x * columns + column) * N;
  long long start = blockIdx.y * slab, end = min(pixels, start + slab);
  Moments own[N];
  double count = count_of(start + row, end, rows);
  if (row < rows && channel < channels && count) {
    const T* from = x + channel;
    auto run = [&](auto pack) {
      constexpr bool PACK = decltype(pack)::value;
      Floats<N> first = load_as<N, PACK>(from + (start + row) * channels);
#pragma unroll
      for (int k = 0; k < N; ++k) own[k].origin = first[k];
#pragma unroll 4
      for (long long pixel = start + row + rows; pixel < end; pixel += rows) {
        Floats<N> v = load_as<N, PACK>(from + pixel * channels);
#pragma unroll
        for (int k = 0; k < N; ++k) own[k].add(v[k]);
      }
    };
    if (packed<N>(from)) run(Width<1>());
    else run(Width<0>());
  }
#pragma unroll
  for (int k = 0; k < N; ++k) {
    means[threadIdx.x * N + k] = own[k].mean(count);
    spreads[threadIdx.x * N + k] = own[k].spread(count);
  }
  __syncthreads();
  int mine = threadIdx.x, width = columns * N, to = blockIdx.x * width + mine;  // one channel a thread
  if (mine < width && to < channels) {
    double mean = 0, spread = 0;
    for (int r = 0; r < rows; ++r) mean += count_of(start + r, end, rows) * means[r * width + mine];
    mean /= end - start;
    for (int r = 0; r < rows; ++r) {
      double distance = means[r * width + mine] - mean;
      spread += spreads[r * width + mine] + count_of(start + r, end, rows) * distance * distance;
    }
    partial[2LL * to * gridDim.y + blockIdx.y] = mean;
    partial[(2LL * to + 1) * gridDim.y + blockIdx.y] = spread;
  }
}

// Block (channel, slab); count: outer * inner elements of a channel.
template <class T>
__global__ void __launch_bounds__(256, 4) plane_moments(const T* x, double* partial, long long count, int channels, long long inner, long long slab) {
  long long start = blockIdx.y * slab, end = min(count, start + slab);
  Moments own;
  for (long long i = start + threadIdx.x; i < end; i += 256) {
    float v = to_float(x[(i / inner * channels + blockIdx.x) * inner + i % inner]);
    if (i == start + threadIdx.x) own.origin = v;
    own.add(v);
  }
  double held = count_of(start + threadIdx.x, end, 256), mean = block_sum(held * own.mean(held)) / (end - start), distance = own.mean(held) - mean;
  double spread = block_sum(own.spread(held) + held * distance * distance);
  if (threadIdx.x == 0) {
    partial[2LL * blockIdx.x * gridDim.y + blockIdx.y] = mean;
    partial[(2LL * blockIdx.x + 1) * gridDim.y + blockIdx.y] = spread;
  }
}

// A warp for each channel: its mean and biased variance from those of the slabs.
__global__ void __launch_bounds__(256, 4)
    channel_moments(const double* partial, int slabs, int channels, double count, long long slab, float* mean, float* variance) {
  int channel = thread_index() / 32, lane = threadIdx.x % 32;
  if (channel >= channels) return;  // a whole warp
  const double* means = partial + 2LL * channel * slabs;
  auto held = [&](int i) { return i + 1 < slabs ? (double)slab : count - (double)slab * (slabs - 1); };
  double centre = 0, spread = 0;
  for (int i = lane; i < slabs; i += 32) centre += held(i) * means[i];
  centre = warp_sum(centre) / count;
  for (int i = lane; i < slabs; i += 32) {
    double distance = means[i] - centre;
    spread += means[slabs + i] + held(i) * distance * distance;
  }
  spread = warp_sum(spread) / count;
  if (lane == 0) {
    mean[channel] = (float)centre;
    variance[channel] = (float)(spread < 0 ? 0 : spread);  // below 0 by rounding alone; NaN stays
  }
}

// --- sums of dy and dy y -----------------------------------------------------------------------
// a, b += the terms of pixels pixel, pixel + rows, ... before end. PACK: all pointers allow 16-byte accesses.
template <int N, bool PACK, class T>
__device__ __forceinline__ void add_pixels(const T* x, const T* y, long long pixel, long long end, int rows, int channels, double (&a)[N], double (&b)[N]) {
#pragma unroll (PACK ? 4 : 2)  // registers are short: on sm_100 four rows of single elements at once would spill
  for (; pixel < end; pixel += rows) {
    Floats<N> v = load_as<N, PACK>(x + pixel * channels), w = load_as<N, PACK>(y + pixel * channels);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      a[k] += v[k];
      b[k] += (double)v[k] * w[k];
    }
  }
}

// x is dy, y the normalised output.
template <class T, int N>
__global__ void __launch_bounds__(256, 3)
    matrix_sums(const T* x, const T* y, double* partial, long long pixels, int channels, int columns, long long slab) {
  Place<N> place(pixels, channels, columns, slab);
  double a[N] = {}, b[N] = {};
  if (place.any) {
    x += place.channel;
    y += place.channel;
    if (packed<N>(x) && packed<N>(y)) add_pixels<N, true>(x, y, place.pixel, place.end, place.rows, channels, a, b);
    else add_pixels<N, false>(x, y, place.pixel, place.end, place.rows, channels, a, b);
  }
  leave_sums<N>(a, b, partial, channels, columns);
}

// Block (channel, slab); count: outer * inner elements of a channel.
template <class T>
__global__ void __launch_bounds__(256, 4)
    plane_sums(const T* x, const T* y, double* partial, long long count, int channels, long long inner, long long slab) {
  long long end = min(count, (blockIdx.y + 1) * slab), i = blockIdx.y * slab + threadIdx.x;
  long long plane = i / inner, place = i % inner, planes = 256 / inner, places = 256 % inner;
  double a = 0, b = 0;
  for (; i < end; i += 256) {
    long long at = (plane * channels + blockIdx.x) * inner + place;
    float v = to_float(x[at]), w = to_float(y[at]);
    a += v;
    b += (double)v * w;
    plane += planes;
    place += places;
    if (place >= inner) {
      place -= inner;
      ++plane;
    }
  }
  a = block_sum(a);
  b = block_sum(b);
  if (threadIdx.x == 0) {
    partial[2LL * blockIdx.x * gridDim.y + blockIdx.y] = a;
    partial[(2LL * blockIdx.x + 1) * gridDim.y + blockIdx.y] = b;
  }
}

// first, second: the means of both sums.
__global__ void __launch_bounds__(256, 4) channel_means(const double* partial, int slabs, int channels, double count, float* first, float* second) {
  int channel = thread_index() / 32, lane = threadIdx.x % 32;
  if (channel >= channels) return;  // a whole warp
  double a, b;
  slab_sums(partial, slabs, channel, a, b);
  if (lane == 0) {
    first[channel] = (float)(a / count);
    second[channel] = (float)(b / count);
  }
}

// --- moving sums -----------------------------------------------------------------------------------------------------------
__global__ void accumulate(const float* mean, const float* variance, float* mean_sum, float* variance_sum, float* weight, const double* skip,
                           float fraction, float correction, int channels) {
  if (skip && *skip != 0) return;
  for (long long i = thread_index(); i < channels; i += thread_count()) {
    mean_sum[i] = __fadd_rn(__fmul_rn(fraction, mean_sum[i]), mean[i]);
    variance_sum[i] = __fadd_rn(__fmul_rn(fraction, variance_sum[i]), __fmul_rn(correction, variance[i]));
  }
  if (thread_index() == 0) *weight = __fadd_rn(__fmul_rn(fraction, *weight), 1.f);
}
__global__ void global_statistics(const float* mean_sum, const float* variance_sum, const float* weight, float* mean, float* variance, int channels) {
  float factor = *weight == 0 ? 0 : 1 / *weight;
  for (long long i = thread_index(); i < channels; i += thread_count()) {
    mean[i] = mean_sum[i] * factor;
    variance[i] = variance_sum[i] * factor;
  }
}

// --- passes ----------------------------------------------------------------------------------------------------------------
enum Rule { FORWARD, BACKWARD, GLOBAL };

// What a channel's elements need: FORWARD (x - mean) inverse; BACKWARD (dy - mean - y product) inverse; GLOBAL dy inverse.
template <Rule RULE>
struct Channel {
  float mean, product, inverse;
  __device__ __forceinline__ void set(const float* means, const float* products, const float* variance, float eps, int channel) {
    mean = RULE == GLOBAL ? 0.f : means[channel];
    product = RULE == BACKWARD ? products[channel] : 0.f;
    inverse = 1.f / sqrtf(variance[channel] + eps);
  }
  __device__ __forceinline__ float of(float x, float y) const {
    if (RULE == FORWARD) return (x - mean) * inverse;
    if (RULE == BACKWARD) return (x - mean - y * product) * inverse;
    return x * inverse;
  }
};

template <int N, bool PACK, Rule RULE, class T>
__device__ __forceinline__ void pass_pixels(const T* x, const T* y, T* out, const Channel<RULE> (&own)[N], long long pixel, long long end, int rows,
                                            int channels) {
#pragma unroll 2
  for (; pixel < end; pixel += rows) {
    long long at = pixel * channels;
    Floats<N> v = load_as<N, PACK>(x + at), w = v;
    if (RULE == BACKWARD) w = load_as<N, PACK>(y + at);
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] = own[k].of(v[k], w[k]);
    store_as<N, PACK>(out + at, v);
  }
}

// x is dy but in FORWARD; y, means and products may be null where the rule has no use for them. out may be x.
template <class T, int N, Rule RULE>
__global__ void __launch_bounds__(256, 4) matrix_pass(const T* x, const T* y, const float* means, const float* products, const float* variance, float eps,
                                                      T* out, long long pixels, int channels, int columns, long long slab) {
  Place<N> place(pixels, channels, columns, slab);
  if (!place.any) return;
  Channel<RULE> own[N];
#pragma unroll
  for (int k = 0; k < N; ++k) own[k].set(means, products, variance, eps, place.channel + k);
  x += place.channel;
  y += place.channel;
  out += place.channel;
  if (packed<N>(x) && packed<N>(y) && packed<N>(out)) pass_pixels<N, true>(x, y, out, own, place.pixel, place.end, place.rows, channels);
  else pass_pixels<N, false>(x, y, out, own, place.pixel, place.end, place.rows, channels);
}

template <class T, Rule RULE>
__global__ void __launch_bounds__(256, 4) plane_pass(const T* x, const T* y, const float* means, const float* products, const float* variance, float eps,
                                                     T* out, long long planes, int channels, long long inner) {
  for (long long plane = blockIdx.x; plane < planes; plane += gridDim.x) {
    Channel<RULE> own;
    own.set(means, products, variance, eps, plane % channels);
    for (long long i = plane * inner + threadIdx.x; i < (plane + 1) * inner; i += blockDim.x)
      out[i] = from_float<T>(own.of(to_float(x[i]), RULE == BACKWARD ? to_float(y[i]) : 0.f));
  }
}
