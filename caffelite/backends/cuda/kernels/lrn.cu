// lrn.cu - local response normalisation across channels and within a channel, channels last: y = x s^-beta, s = k + factor * (sum of x^2
// over the box around a cell), dx = dy s^-beta - 2 factor beta x * (sum of dy y / s over the box).
//
// Shapes: all arrays (N,H,W,C). Thread mapping (channels.cuh): V channels of one pixel; V is 16 bytes' worth, or 1.
//
// lrn_across_forward, lrn_across_backward<T, H>: boxes of 2H+1 channels that need no more than the vectors to the left and right of a
// thread's own: it loads those too (its neighbours have brought them into the L1 cache), so nothing is exchanged and nothing kept:
// backward computes the scales again. Bytes an element in bfloat16: 4 forward, 6 + 2 backward; in float32 twice that. Operations with
// size 5 and beta 3/4: about 25 forward, 50 backward, of which one or two are reciprocal square roots.
//
// lrn_forward, lrn_ratios, lrn_backward<T, V>: boxes of any extent in channels (V = 1 only), rows and columns. Backward takes two passes
// with dy y / s as float32 between them: 4 bytes written and read again for each element; each pass adds up its box anew, from a cache.
// Ladder: these are the first rung; not measured. Untried: halos by shuffles, and sums by row and then by column for wide squares.
#include "lrn.cuh"

// --- boxes of a few channels ------------------------------------------------------------------------------------------------
template <class T, int H>
__global__ void lrn_across_forward(const T* __restrict__ x, T* __restrict__ y, Lrn g) {
  constexpr int V = Vec<T>::size;
  each_place<V>(g.images, g.height, g.width, g.channels, [&](int n, int h, int w, int c) {
    long long pixel = offset_of(n, h, w, 0, g.height, g.width, g.channels);
    Around<T, H> around(x + pixel, c, g.channels, H);
    float out[V];
    around.powers(g, out);
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] *= around.values[V + v];
    store_floats(y + pixel + c, out);
  });
}

template <class T, int H>
__global__ void lrn_across_backward(const T* __restrict__ x, const T* __restrict__ y, const T* __restrict__ dy, T* __restrict__ dx, Lrn g, bool relu) {
  constexpr int V = Vec<T>::size;
  static_assert(2 * H <= V, "a ratio H channels away needs squares 2H away");
  each_place<V>(g.images, g.height, g.width, g.channels, [&](int n, int h, int w, int c) {
    long long pixel = offset_of(n, h, w, 0, g.height, g.width, g.channels);
    Around<T, H> around(x + pixel, c, g.channels, 2 * H);
    float outputs[3 * V], gradients[3 * V], scales[3 * V], ratios[3 * V], out[V];
    load_around<T, V>(y + pixel, c, g.channels, outputs);
    load_around<T, V>(dy + pixel, c, g.channels, gradients);
#pragma unroll
    for (int i = V - H; i < 2 * V + H; ++i) {
      scales[i] = around.scale(g, i);
      // Outside the pixel there is no ratio, whatever the scale
      ratios[i] = c + i - V >= 0 && c + i - V < g.channels ? gradients[i] * outputs[i] / scales[i] : 0.0f;
    }
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] = scales[V + v];
    raise(out, g.beta);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      out[v] = gradient_of(g, around.values[V + v], gradients[V + v], out[v], sum_around<H>(ratios, V + v));
      if (relu) out[v] = rectified(out[v], around.values[V + v]);
    }
    store_floats(dx + pixel + c, out);
  });
}

// --- boxes of any extent ----------------------------------------------------------------------------------------------------
struct Identity {
  static __device__ __forceinline__ float of(float x) { return x; }
};
struct Square {
  static __device__ __forceinline__ float of(float x) { return __fmul_rn(x, x); }
};

// total[v] = sum of Term over the box around (h, w, c + v) of an image, cells outside it counting as zeros.
template <class Term, class T, int V>
__device__ __forceinline__ void sum_box(const T* image, const Lrn& g, int h, int w, int c, float (&total)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) total[v] = 0;
  int bottom = min(h + g.half_h, g.height - 1), right = min(w + g.half_w, g.width - 1);
  int first = V == 1 ? max(c - g.half_c, 0) : c, last = V == 1 ? min(c + g.half_c, g.channels - 1) : c;
  for (int i = max(h - g.half_h, 0); i <= bottom; ++i)
    for (int j = max(w - g.half_w, 0); j <= right; ++j)
      for (int k = first; k <= last; ++k) {
        Pack<T, V> cell = load_pack<V>(image + (long long)(i * g.width + j) * g.channels + k);
#pragma unroll
        for (int v = 0; v < V; ++v) total[v] += Term::of(to_float(cell[v]));
      }
}

template <class T, int V>
__global__ void lrn_forward(const T* __restrict__ x, T* __restrict__ y, Lrn g) {
  each_place<V>(g.images, g.height, g.width, g.channels, [&](int n, int h, int w, int c) {
    long long image = offset_of(n, 0, 0, 0, g.height, g.width, g.channels), at = offset_of(n, h, w, c, g.height, g.width, g.channels);
    float out[V];
    sum_box<Square>(x + image, g, h, w, c, out);
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] = scale_of(g, out[v]);
    raise(out, g.beta);
    Pack<T, V> values = load_pack<V>(x + at);
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] *= to_float(values[v]);
    store_floats(y + at, out);
  });
}

template <class T, int V>
__global__ void lrn_ratios(const T* __restrict__ x, const T* __restrict__ y, const T* __restrict__ dy, float* __restrict__ ratios, Lrn g) {
  each_place<V>(g.images, g.height, g.width, g.channels, [&](int n, int h, int w, int c) {
    long long image = offset_of(n, 0, 0, 0, g.height, g.width, g.channels), at = offset_of(n, h, w, c, g.height, g.width, g.channels);
    float out[V];
    sum_box<Square>(x + image, g, h, w, c, out);
    Pack<T, V> outputs = load_pack<V>(y + at), gradients = load_pack<V>(dy + at);
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] = to_float(gradients[v]) * to_float(outputs[v]) / scale_of(g, out[v]);
    store_floats(ratios + at, out);
  });
}

template <class T, int V>
__global__ void lrn_backward(const T* __restrict__ x, const T* __restrict__ dy, const float* __restrict__ ratios, T* __restrict__ dx, Lrn g, bool relu) {
  each_place<V>(g.images, g.height, g.width, g.channels, [&](int n, int h, int w, int c) {
    long long image = offset_of(n, 0, 0, 0, g.height, g.width, g.channels), at = offset_of(n, h, w, c, g.height, g.width, g.channels);
    float powers[V], sums[V];
    sum_box<Square>(x + image, g, h, w, c, powers);
#pragma unroll
    for (int v = 0; v < V; ++v) powers[v] = scale_of(g, powers[v]);
    raise(powers, g.beta);
    sum_box<Identity>(ratios + image, g, h, w, c, sums);
    Pack<T, V> values = load_pack<V>(x + at), gradients = load_pack<V>(dy + at);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      sums[v] = gradient_of(g, to_float(values[v]), to_float(gradients[v]), powers[v], sums[v]);
      if (relu) sums[v] = rectified(sums[v], values[v]);
    }
    store_floats(dx + at, sums);
  });
}
