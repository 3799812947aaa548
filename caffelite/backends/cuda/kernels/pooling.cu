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
#include "pooling.cuh"

template <class T, class M, int V, int K>
__global__ void max_pool_forward(const T* __restrict__ x, T* __restrict__ y, M* __restrict__ mask, Windows g) {
  max_of_windows<V, K>(x, g, [&](const Best<V>& best, long long at) { best.store(y + at, mask ? mask + at : mask); });
}
template <class T, class M, int V, int S>
__global__ void max_pool_backward(const T* __restrict__ dy, const M* __restrict__ mask, const T* __restrict__ positive, T* __restrict__ dx, Windows g) {
  if (positive) gather_winners<true, V, S>(dy, mask, positive, dx, g, AsTheyAre());
  else gather_winners<false, V, S>(dy, mask, positive, dx, g, AsTheyAre());
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
  mean_of_windows<V, K>(x, g, [&](const float (&means)[V], long long at) { store_floats(y + at, means); });
}
template <class T, int V, int S>
__global__ void ave_pool_backward(const T* __restrict__ dy, const T* __restrict__ positive, T* __restrict__ dx, Windows g) {
  gather_shares<V, S>(dy, positive, dx, g, AsTheyAre());
}
