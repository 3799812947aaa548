// lrn.cuh - scales of local response normalisation: what lrn.cu and the pooling it is fused with share. Products that are added to something are rounded
// by themselves (__fmul_rn): which of them a compiler fuses with the addition differs from kernel to kernel, and the bits are to be the same.
#pragma once
#include "channels.cuh"

struct Lrn {
  int images, channels, height, width, half_c, half_h, half_w;  // the box reaches half_* cells to each side
  float k, factor, beta;
};

// s from the sum of the squares around a cell; dx from the sum of the ratios dy y / s, and x and dy themselves.
__device__ __forceinline__ float scale_of(const Lrn& g, float squares) { return __fadd_rn(g.k, __fmul_rn(g.factor, squares)); }
__device__ __forceinline__ float gradient_of(const Lrn& g, float x, float dy, float power, float ratios) {
  return __fsub_rn(__fmul_rn(dy, power), __fmul_rn(2 * g.factor * g.beta * x, ratios));
}

// s <- s^-beta; 3/4 is what nets use, and needs no powf.
template <int V>
__device__ __forceinline__ void raise(float (&s)[V], float beta) {
  if (beta == 0.75f) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float root = rsqrtf(s[v]);
      s[v] = root * sqrtf(root);
    }
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) s[v] = powf(s[v], -beta);
  }
}

// --- boxes of 2H+1 channels that need no more than the vectors to the left and right of a thread's own --------------------------
// Channels c-V .. c+2V-1 of a pixel, zeros outside it. What is not used of values costs nothing.
template <class T, int V>
__device__ __forceinline__ void load_around(const T* pixel, int c, int channels, float (&values)[3 * V]) {
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    int from = c + (i - 1) * V;
    bool inside = from >= 0 && from < channels;
    Pack<T, V> pack = load_pack<V>(pixel + (inside ? from : c));
#pragma unroll
    for (int v = 0; v < V; ++v) values[i * V + v] = inside ? to_float(pack[v]) : 0.0f;
  }
}

template <int H, int count>
__device__ __forceinline__ float sum_around(const float (&values)[count], int i) {
  float sum = 0;
#pragma unroll
  for (int d = -H; d <= H; ++d) sum += values[i + d];
  return sum;
}

// Of V channels of a pixel: the values around them, and their scales s.
template <class T, int H>
struct Around {
  static constexpr int V = Vec<T>::size;
  float values[3 * V], squares[3 * V];
  // reach: how far beyond the V channels squares will be asked for.
  __device__ __forceinline__ Around(const T* pixel, int c, int channels, int reach) {
    load_around<T, V>(pixel, c, channels, values);
#pragma unroll
    for (int i = 0; i < 3 * V; ++i)
      if (i >= V - reach && i < 2 * V + reach) squares[i] = __fmul_rn(values[i], values[i]);
  }
  __device__ __forceinline__ float scale(const Lrn& g, int i) const { return scale_of(g, sum_around<H>(squares, i)); }
  // power = s^-beta of the V channels
  __device__ __forceinline__ void powers(const Lrn& g, float (&power)[V]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) power[v] = scale(g, V + v);
    raise(power, g.beta);
  }
};
