// pooling.cu - max pooling (with the winner's number in its window) and average pooling, forward and backward, channels last.
//
// Shapes: x, dx (N,H,W,C); y, dy, mask, top (N,P,Q,C). Thread mapping (channels.cuh): V channels of one output, backward of one input
// pixel: V is 16 bytes' worth, or 1 where C is no multiple of that. K: a square kernel known when compiling, whose loads are all under
// way at once where the window lies inside the image; S: the stride likewise, so that backward does not divide; 0: any.
//
// Backward gathers over the windows that hold a pixel, so there are no atomics; they are added from the last to the first, which is the
// order of the cells in the window.
//
// Bytes for each element of x, kernel 3 and stride 2 in bfloat16, a quarter as many outputs: max forward 2 + (2+1)/4, backward the same;
// average 2 + 2/4 both ways. With a ReLU's backward on the way, max reads 2/4 more (y), average 2 (x). Forward reads an input pixel 2.25 times, all but one of them from a cache. Operations: a comparison and two
// selections for each cell, or an addition.
// Ladder: one output a thread; not measured. Untried: two outputs one above the other in a thread, which would read 1.25 rows a row
// instead of 1.5 from the L2 cache.
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

// The window's extent along one axis in the padded plane; what lies beyond the padding does not count.
__device__ __forceinline__ int extent_of(int p, int size, int kernel, int stride, int pad) {
  int start = p * stride - pad;
  return min(start + kernel, size + pad) - start;
}
__device__ __forceinline__ float area_of(const Windows& g, int p, int q) {
  return (float)(extent_of(p, g.height, g.kernel_h, g.stride_h, g.pad_h) * extent_of(q, g.width, g.kernel_w, g.stride_w, g.pad_w));
}

template <class T, class M, int V, int K>
__global__ void max_pool_forward(const T* __restrict__ x, T* __restrict__ y, M* __restrict__ mask, Windows g) {
  each_place<V>(g.images, g.out_h, g.out_w, g.channels, [&](int n, int p, int q, int c) {
    float best[V];
    int winner[V];
#pragma unroll
    for (int v = 0; v < V; ++v) best[v] = -FLT_MAX, winner[v] = -1;
    auto compare = [&](int number, const Pack<T, V>& cell) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        float value = to_float(cell[v]);
        bool wins = value > best[v];  // false for NaN
        best[v] = wins ? value : best[v];
        winner[v] = wins ? number : winner[v];
      }
    };
    visit_cells<V, K>(x + offset_of(n, 0, 0, c, g.height, g.width, g.channels), g, p * g.stride_h - g.pad_h, q * g.stride_w - g.pad_w, compare);
    long long at = offset_of(n, p, q, c, g.out_h, g.out_w, g.channels);
    store_floats(y + at, best);
    if (!mask) return;
    Pack<M, V> numbers;
#pragma unroll
    for (int v = 0; v < V; ++v) numbers[v] = (M)winner[v];  // no winner: -1, as unsigned char 255
    store_pack(mask + at, numbers);
  });
}

template <bool RECTIFY, int V, int S, class T, class M>
__device__ __forceinline__ void gather_winners(const T* __restrict__ dy, const M* __restrict__ mask, const T* __restrict__ positive, T* __restrict__ dx,
                                               const Windows& g) {
  each_place<V>(g.images, g.height, g.width, g.channels, [&](int n, int h, int w, int c) {
    int stride_h = S ? S : g.stride_h, stride_w = S ? S : g.stride_w;
    Span rows = windows_of<S>(h, g.pad_h, g.kernel_h, stride_h, g.out_h), columns = windows_of<S>(w, g.pad_w, g.kernel_w, stride_w, g.out_w);
    float total[V] = {};
    for (int p = rows.last; p >= rows.first; --p)
      for (int q = columns.last; q >= columns.first; --q) {
        M number = (M)((h + g.pad_h - p * stride_h) * g.kernel_w + w + g.pad_w - q * stride_w);  // this pixel's in the window
        long long at = offset_of(n, p, q, c, g.out_h, g.out_w, g.channels);
        Pack<M, V> winner = load_pack<V>(mask + at);
        Pack<T, V> gradient = load_pack<V>(dy + at), above = gradient;
        if (RECTIFY) above = load_pack<V>(positive + at);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          float given = RECTIFY ? rectified(to_float(gradient[v]), above[v]) : to_float(gradient[v]);
          total[v] += winner[v] == number ? given : 0.0f;
        }
      }
    store_floats(dx + offset_of(n, h, w, c, g.height, g.width, g.channels), total);
  });
}
// positive: y, where the gradient goes on through the ReLU that made x; else null.
template <class T, class M, int V, int S>
__global__ void max_pool_backward(const T* __restrict__ dy, const M* __restrict__ mask, const T* __restrict__ positive, T* __restrict__ dx, Windows g) {
  if (positive) gather_winners<true, V, S>(dy, mask, positive, dx, g);
  else gather_winners<false, V, S>(dy, mask, positive, dx, g);
}

template <class T, class M, int V>
__global__ void max_pool_indices(const M* __restrict__ mask, T* __restrict__ top, Windows g) {
  each_place<V>(g.images, g.out_h, g.out_w, g.channels, [&](int n, int p, int q, int c) {
    long long at = offset_of(n, p, q, c, g.out_h, g.out_w, g.channels);
    Pack<M, V> winner = load_pack<V>(mask + at);
    float index[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      int number = winner[v], row = number / g.kernel_w;
      int h = p * g.stride_h - g.pad_h + row, w = q * g.stride_w - g.pad_w + number - row * g.kernel_w;
      index[v] = winner[v] == (M)-1 ? -1.0f : (float)(h * g.width + w);
    }
    store_floats(top + at, index);
  });
}

template <class T, int V, int K>
__global__ void ave_pool_forward(const T* __restrict__ x, T* __restrict__ y, Windows g) {
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
    store_floats(y + offset_of(n, p, q, c, g.out_h, g.out_w, g.channels), total);
  });
}

template <class T, int V, int S>
__global__ void ave_pool_backward(const T* __restrict__ dy, const T* __restrict__ positive, T* __restrict__ dx, Windows g) {
  each_place<V>(g.images, g.height, g.width, g.channels, [&](int n, int h, int w, int c) {
    int stride_h = S ? S : g.stride_h, stride_w = S ? S : g.stride_w;
    Span rows = windows_of<S>(h, g.pad_h, g.kernel_h, stride_h, g.out_h), columns = windows_of<S>(w, g.pad_w, g.kernel_w, stride_w, g.out_w);
    float total[V] = {};
    for (int p = rows.last; p >= rows.first; --p)
      for (int q = columns.last; q >= columns.first; --q) {
        Pack<T, V> gradient = load_pack<V>(dy + offset_of(n, p, q, c, g.out_h, g.out_w, g.channels));
        float share = 1.0f / area_of(g, p, q);  // one division for V channels
#pragma unroll
        for (int v = 0; v < V; ++v) total[v] += to_float(gradient[v]) * share;
      }
    long long own = offset_of(n, h, w, c, g.height, g.width, g.channels);
    if (positive) {
      Pack<T, V> above = load_pack<V>(positive + own);
#pragma unroll
      for (int v = 0; v < V; ++v) total[v] = rectified(total[v], above[v]);
    }
    store_floats(dx + own, total);
  });
}
