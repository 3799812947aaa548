// pooling.cuh - windows of a plane, forward and backward: what pooling and the layers it is fused with share.
#pragma once
#include "channels.cuh"

struct Windows {
  int images, channels, height, width, out_h, out_w, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
};

// visit(number, V channels) for each cell of the window at (top, left) that lies in the image, row by row. image: its first pixel.
template <int V, int K, class T, class Visit>
__device__ __forceinline__ void visit_cells(const T* image, const Windows& g, int top, int left, Visit visit) {
  if (K && top >= 0 && left >= 0 && top + K <= g.height && left + K <= g.width) {
    constexpr int side = K ? K : 1, cells = side * side;
    Pack<T, V> items[cells];
#pragma unroll
    for (int i = 0; i < cells; ++i) items[i] = load_pack<V>(image + (long long)((top + i / side) * g.width + left + i % side) * g.channels);
#pragma unroll
    for (int i = 0; i < cells; ++i) visit(i, items[i]);
    return;
  }
  int bottom = min(top + g.kernel_h, g.height), right = min(left + g.kernel_w, g.width);
  for (int h = max(top, 0); h < bottom; ++h)
    for (int w = max(left, 0); w < right; ++w) visit((h - top) * g.kernel_w + w - left, load_pack<V>(image + (long long)(h * g.width + w) * g.channels));
}

// The windows first..last along one axis that hold position i; none if first > last.
struct Span {
  int first, last;
};
template <int S>
__device__ __forceinline__ Span windows_of(int i, int pad, int kernel, int any_stride, int out) {
  unsigned stride = S ? S : any_stride, padded = i + pad;
  int first = padded < (unsigned)kernel ? 0 : (padded - kernel) / stride + 1;
  return Span{first, min((int)(padded / stride), out - 1)};
}

// visit(p, q, at, number) for each window that holds pixel (h, w) of image n, from the last to the first, so that what they give is added in the order
// of the cells in the window. at: elements before channel c of (p, q) in arrays of the outputs; number: the pixel's in that window.
template <int S, class Visit>
__device__ __forceinline__ void visit_windows(const Windows& g, int n, int h, int w, int c, Visit visit) {
  int stride_h = S ? S : g.stride_h, stride_w = S ? S : g.stride_w;
  Span rows = windows_of<S>(h, g.pad_h, g.kernel_h, stride_h, g.out_h), columns = windows_of<S>(w, g.pad_w, g.kernel_w, stride_w, g.out_w);
  for (int p = rows.last; p >= rows.first; --p)
    for (int q = columns.last; q >= columns.first; --q)
      visit(p, q, offset_of(n, p, q, c, g.out_h, g.out_w, g.channels), (h + g.pad_h - p * stride_h) * g.kernel_w + w + g.pad_w - q * stride_w);
}

// The window's extent along one axis in the padded plane; what lies beyond the padding does not count.
__device__ __forceinline__ int extent_of(int p, int size, int kernel, int stride, int pad) {
  int start = p * stride - pad;
  return min(start + kernel, size + pad) - start;
}
__device__ __forceinline__ float area_of(const Windows& g, int p, int q) {
  return (float)(extent_of(p, g.height, g.kernel_h, g.stride_h, g.pad_h) * extent_of(q, g.width, g.kernel_w, g.stride_w, g.pad_w));
}

// --- the largest value of a window --------------------------------------------------------------------------------------------
template <int V>
struct Best {
  float value[V];
  int winner[V];  // -1: none
  __device__ __forceinline__ Best() {
#pragma unroll
    for (int v = 0; v < V; ++v) value[v] = -FLT_MAX, winner[v] = -1;
  }
  template <class T>
  __device__ __forceinline__ void meet(int number, const Pack<T, V>& cell) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float here = to_float(cell[v]);
      bool wins = here > value[v];  // false for NaN
      value[v] = wins ? here : value[v];
      winner[v] = wins ? number : winner[v];
    }
  }
  template <class T, class M>
  __device__ __forceinline__ void store(T* y, M* mask) const {
    store_floats(y, value);
    if (!mask) return;
    Pack<M, V> numbers;
#pragma unroll
    for (int v = 0; v < V; ++v) numbers[v] = (M)winner[v];  // no winner: -1, as unsigned char 255
    store_pack(mask, numbers);
  }
};

// Gradients as they are, for add_winners and what follows from it.
struct AsTheyAre {
  template <class T, int V>
  __device__ __forceinline__ void operator()(const Pack<T, V>& gradient, long long, float (&given)[V]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) given[v] = to_float(gradient[v]);
  }
};

// total += what the windows that hold pixel (h, w) give to those of its channels c .. c+V-1 that won there: of(gradient, at) for V gradients.
template <int V, int S, class T, class M, class Of>
__device__ __forceinline__ void add_winners(const T* __restrict__ dy, const M* __restrict__ mask, const Windows& g, int n, int h, int w, int c,
                                            float (&total)[V], Of of) {
  visit_windows<S>(g, n, h, w, c, [&](int, int, long long at, int number) {
    Pack<M, V> winner = load_pack<V>(mask + at);
    Pack<T, V> gradient = load_pack<V>(dy + at);
    float given[V];
    of(gradient, at, given);
#pragma unroll
    for (int v = 0; v < V; ++v) total[v] += winner[v] == (M)number ? given[v] : 0.0f;
  });
}

// --- whole passes; finish and of say what is stored, and of what --------------------------------------------------------------
// finish(best, at) for every output: at is the number of elements before its V channels.
template <int V, int K, class T, class Finish>
__device__ __forceinline__ void max_of_windows(const T* __restrict__ x, const Windows& g, Finish finish) {
  each_place<V>(g.images, g.out_h, g.out_w, g.channels, [&](int n, int p, int q, int c) {
    Best<V> best;
    auto meet = [&](int number, const Pack<T, V>& cell) { best.meet(number, cell); };
    visit_cells<V, K>(x + offset_of(n, 0, 0, c, g.height, g.width, g.channels), g, p * g.stride_h - g.pad_h, q * g.stride_w - g.pad_w, meet);
    finish(best, offset_of(n, p, q, c, g.out_h, g.out_w, g.channels));
  });
}
// finish(means, at) likewise.
template <int V, int K, class T, class Finish>
__device__ __forceinline__ void mean_of_windows(const T* __restrict__ x, const Windows& g, Finish finish) {
  each_place<V>(g.images, g.out_h, g.out_w, g.channels, [&](int n, int p, int q, int c) {
    float total[V] = {};
    auto add = [&](int, const Pack<T, V>& cell) {
#pragma unroll
      for (int v = 0; v < V; ++v) total[v] += to_float(cell[v]);
    };
    visit_cells<V, K>(x + offset_of(n, 0, 0, c, g.height, g.width, g.channels), g, p * g.stride_h - g.pad_h, q * g.stride_w - g.pad_w, add);
    float area = area_of(g, p, q);
#pragma unroll
    for (int v = 0; v < V; ++v) total[v] /= area;  // an empty window: 0 / 0
    finish(total, offset_of(n, p, q, c, g.out_h, g.out_w, g.channels));
  });
}

// dx from what windows give to their winners: of(gradient, at, given) for V gradients. positive: y, where the gradient goes on through the ReLU that made x.
template <bool RECTIFY, int V, int S, class T, class M, class Of>
__device__ __forceinline__ void gather_winners(const T* __restrict__ dy, const M* __restrict__ mask, const T* __restrict__ positive, T* __restrict__ dx,
                                               const Windows& g, Of of) {
  each_place<V>(g.images, g.height, g.width, g.channels, [&](int n, int h, int w, int c) {
    float total[V] = {};
    add_winners<V, S>(dy, mask, g, n, h, w, c, total, [&](const Pack<T, V>& gradient, long long at, float (&given)[V]) {
      Pack<T, V> above = gradient;
      if (RECTIFY) above = load_pack<V>(positive + at);
      of(gradient, at, given);
#pragma unroll
      for (int v = 0; v < V; ++v) given[v] = RECTIFY ? rectified(given[v], above[v]) : given[v];
    });
    store_floats(dx + offset_of(n, h, w, c, g.height, g.width, g.channels), total);
  });
}
// dx from what windows give to all their cells. positive: x, for such a ReLU.
template <int V, int S, class T, class Of>
__device__ __forceinline__ void gather_shares(const T* __restrict__ dy, const T* __restrict__ positive, T* __restrict__ dx, const Windows& g, Of of) {
  each_place<V>(g.images, g.height, g.width, g.channels, [&](int n, int h, int w, int c) {
    float total[V] = {};
    visit_windows<S>(g, n, h, w, c, [&](int p, int q, long long at, int) {
      Pack<T, V> gradient = load_pack<V>(dy + at);
      float given[V], share = 1.0f / area_of(g, p, q);  // one division for V channels
      of(gradient, at, given);
#pragma unroll
      for (int v = 0; v < V; ++v) total[v] = __fadd_rn(total[v], __fmul_rn(given[v], share));  // never fused: the bits are the same whatever `of` does
    });
    long long own = offset_of(n, h, w, c, g.height, g.width, g.channels);
    if (positive) {
      Pack<T, V> above = load_pack<V>(positive + own);
#pragma unroll
      for (int v = 0; v < V; ++v) total[v] = rectified(total[v], above[v]);
    }
    store_floats(dx + own, total);
  });
}
