// batch_norm_scale.cu - batch normalisation with the Scale, and the ReLU, that follow, forward and backward, of memory with the channels last.
//
// Shapes, thread mapping: as in batch_norm.cu, which makes the statistics. A warp for each channel adds up the slabs' sums.
// forward   y = h s + b, h = (x - mean) inverse; relu: max(y, 0).
// backward  g = dy, or with relu what of it comes through: x gives h and y again, in forward's steps, so that no more is kept than x. First the
//           sums of g and of g h, then dx = s inverse (g - mean(g) - h mean(g h)).
// Bytes an element (bfloat16): forward 4, backward 4 for the sums and 6 for the pass; the three layers one by one move 24 and 32. A thread adds
// its pixels' terms in float (SUM_BLOCKS and LEAST of batch_norm.py make them few), blocks and slabs in double. Ladder: the first rung; not measured.
#include "batch_norm.cuh"

struct Scaled {
  float mean, inverse, scale, shift;
  __device__ __forceinline__ void set(const float* means, const float* variance, const float* s, const float* b, float eps, int channel) {
    mean = means[channel];
    inverse = 1.f / sqrtf(variance[channel] + eps);
    scale = s[channel];
    shift = b[channel];
  }
  __device__ __forceinline__ float normal(float x) const { return (x - mean) * inverse; }
  __device__ __forceinline__ float out(float h) const { return __fadd_rn(__fmul_rn(h, scale), shift); }
};

// body(Floats of x, Floats of dy, at) for the pixels of a thread; dy may be null.
template <int N, bool PACK, class T, class Body>
__device__ __forceinline__ void each_pixel(const T* x, const T* dy, long long pixel, long long end, int rows, int channels, Body body) {
#pragma unroll 2
  for (; pixel < end; pixel += rows) {
    long long at = pixel * channels;
    Floats<N> v = load_as<N, PACK>(x + at), d = v;
    if (dy) d = load_as<N, PACK>(dy + at);
    body(v, d, at);
  }
}
template <class T, int N>
__global__ void __launch_bounds__(256, 2) matrix_scale(const T* x, const float* means, const float* variance, const float* s, const float* b, float eps, bool relu,
                                                       T* y, long long pixels, int channels, int columns, long long slab) {
  Place<N> place(pixels, channels, columns, slab);
  if (!place.any) return;
  Scaled own[N];
#pragma unroll
  for (int k = 0; k < N; ++k) own[k].set(means, variance, s, b, eps, place.channel + k);
  x += place.channel;
  y += place.channel;
  auto run = [&](auto pack) {
    constexpr bool PACK = decltype(pack)::value;
    each_pixel<N, PACK>(x, (const T*)nullptr, place.pixel, place.end, place.rows, channels, [&](Floats<N>& v, Floats<N>&, long long at) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        float out = own[k].out(own[k].normal(v[k]));
        v[k] = !relu || out > 0 || is_nan(out) ? out : 0;
      }
      store_as<N, PACK>(y + at, v);
    });
  };
  if (packed<N>(x) && packed<N>(y)) run(Width<1>());
  else run(Width<0>());
}

template <class T, int N>
__global__ void __launch_bounds__(256, 2)
    matrix_scale_sums(const T* x, const T* dy, const float* means, const float* variance, const float* s, const float* b, float eps, bool relu, double* partial,
                      long long pixels, int channels, int columns, long long slab) {
  Place<N> place(pixels, channels, columns, slab);
  float g[N] = {}, gh[N] = {};
  if (place.any) {
    Scaled own[N];
#pragma unroll
    for (int k = 0; k < N; ++k) own[k].set(means, variance, s, b, eps, place.channel + k);
    x += place.channel;
    dy += place.channel;
    auto run = [&](auto pack) {
      each_pixel<N, decltype(pack)::value>(x, dy, place.pixel, place.end, place.rows, channels, [&](Floats<N>& v, Floats<N>& d, long long) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
          float h = own[k].normal(v[k]), given = relu ? rectified(d[k], own[k].out(h)) : d[k];
          g[k] += given;
          gh[k] = fmaf(given, h, gh[k]);
        }
      });
    };
    if (packed<N>(x) && packed<N>(dy)) run(Width<1>());
    else run(Width<0>());
  }
  double first[N], second[N];
#pragma unroll
  for (int k = 0; k < N; ++k) first[k] = g[k], second[k] = gh[k];
  leave_sums<N>(first, second, partial, channels, columns);
}

// A warp for each channel: db, ds (may be null) from the slabs' sums of g and g h, and their means.
__global__ void __launch_bounds__(256, 4) channel_scale_sums(const double* partial, int slabs, int channels, double count, float* ds, float* db, bool accumulate_s,
                                                             bool accumulate_b, float* mean_g, float* mean_gh) {
  int channel = thread_index() / 32, lane = threadIdx.x % 32;
  if (channel >= channels) return;  // a whole warp
  double g, gh;
  slab_sums(partial, slabs, channel, g, gh);
  if (lane) return;
  if (ds) ds[channel] = (float)(accumulate_s ? ds[channel] + gh : gh);
  if (db) db[channel] = (float)(accumulate_b ? db[channel] + g : g);
  mean_g[channel] = (float)(g / count);
  mean_gh[channel] = (float)(gh / count);
}

// mean_g, mean_gh: null where mean and variance are fixed. dx may be dy.
template <class T, int N>
__global__ void __launch_bounds__(256, 2)
    matrix_scale_pass(const T* x, const T* dy, const float* means, const float* variance, const float* s, const float* b, float eps, bool relu, const float* mean_g,
                      const float* mean_gh, T* dx, long long pixels, int channels, int columns, long long slab) {
  Place<N> place(pixels, channels, columns, slab);
  if (!place.any) return;
  Scaled own[N];
  float centre[N], slope[N];
#pragma unroll
  for (int k = 0; k < N; ++k) {
    own[k].set(means, variance, s, b, eps, place.channel + k);
    centre[k] = mean_g ? mean_g[place.channel + k] : 0;
    slope[k] = mean_g ? mean_gh[place.channel + k] : 0;
  }
  x += place.channel;
  dy += place.channel;
  dx += place.channel;
  auto run = [&](auto pack) {
    constexpr bool PACK = decltype(pack)::value;
    each_pixel<N, PACK>(x, dy, place.pixel, place.end, place.rows, channels, [&](Floats<N>& v, Floats<N>& d, long long at) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        float h = own[k].normal(v[k]), given = relu ? rectified(d[k], own[k].out(h)) : d[k];
        d[k] = (mean_g ? given - centre[k] - h * slope[k] : given) * (own[k].scale * own[k].inverse);
      }
      store_as<N, PACK>(dx + at, d);
    });
  };
  if (packed<N>(x) && packed<N>(dy) && packed<N>(dx)) run(Width<1>());
  else run(Width<0>());
}
