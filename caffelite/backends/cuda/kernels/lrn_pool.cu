// lrn_pool.cu - local response normalisation across channels and max pooling of what it gives, in one pass each way.
//
// Shapes: x, dx (N,H,W,C); y, dy, mask (N,P,Q,C). Boxes of 2H+1 channels; V channels a thread, 16 bytes' worth; see lrn.cuh and pooling.cuh.
//
// lrn_max_pool_forward: blocks are (groups of V channels, places), grids (tiles of side x side outputs and runs of channels, images). A block normalises the
// pixels that its outputs' windows hold, into shared memory and rounded to T, as LRN would have stored them; then each thread goes through windows there. So a
// pixel is normalised once, but for those that two tiles share: with kernel 3, stride 2 and side 5, 121 pixels for 100.
// lrn_max_pool_backward<S>: blocks are (all groups of a pixel, pixels). A thread adds up what its pixel won in the windows around it (dy where mask has its
// number; rounded to T), computes scale and value again, and leaves dy y / s of its first and last channels in shared memory, for its neighbours' boxes;
// neighbouring threads' lie side by side there, in different banks.
// Both give the bits that lrn.cu and pooling.cu give one after the other.
//
// Bytes for each element of x in bfloat16, kernel 3 and stride 2 (a quarter as many outputs): forward 2 + (2+1)/4, backward 2 + (2+1)/4 + 2: 7.5 together;
// one after the other forward 4 + 2 + (2+1)/4, backward (2+1)/4 + 2 + 6 + 2: 17.5, and with the ReLU below on the way the same.
// Operations with size 5 and beta 3/4: about 35 forward, 45 backward. Ladder: this form only; not measured. Normalising in each window anew, without shared
// memory, would take 2.25 times the square roots. Untried: wider tiles that keep their lower rows for the next one.
#include "lrn.cuh"
#include "pooling.cuh"

constexpr int BLOCK = 256;  // threads of a block at most

template <class T, int H>
__device__ __forceinline__ Pack<T, Vec<T>::size> normalised(const T* pixel, int c, const Lrn& g) {
  constexpr int V = Vec<T>::size;
  Around<T, H> around(pixel, c, g.channels, H);
  float power[V];
  around.powers(g, power);
  Pack<T, V> out;
#pragma unroll
  for (int v = 0; v < V; ++v) out[v] = from_float<T>(power[v] * around.values[V + v]);
  return out;
}

template <class T, class M, int H>
__global__ void lrn_max_pool_forward(const T* __restrict__ x, T* __restrict__ y, M* __restrict__ mask, Lrn g, Windows o, int side) {
  constexpr int V = Vec<T>::size;
  typedef Pack<T, V> Cell;
  CF_DYNAMIC_SHARED(Cell, cells);  // (rows, columns, groups)
  int down = (o.out_h + side - 1) / side, across = (o.out_w + side - 1) / side, tile = blockIdx.x % (down * across);
  int c = (blockIdx.x / (down * across) * blockDim.x + threadIdx.x) * V;
  int first_p = tile / across * side, first_q = tile % across * side, top = first_p * o.stride_h - o.pad_h, left = first_q * o.stride_w - o.pad_w;
  int rows = (side - 1) * o.stride_h + o.kernel_h, columns = (side - 1) * o.stride_w + o.kernel_w;
  for (int n = blockIdx.y; n < o.images; n += gridDim.y) {
    for (int i = threadIdx.y; i < rows * columns; i += blockDim.y) {
      int h = top + i / columns, w = left + i % columns;
      if (c < o.channels && h >= 0 && h < o.height && w >= 0 && w < o.width)
        cells[i * blockDim.x + threadIdx.x] = normalised<T, H>(x + offset_of(n, h, w, 0, o.height, o.width, o.channels), c, g);
    }
    __syncthreads();
    for (int i = threadIdx.y; i < side * side; i += blockDim.y) {
      int p = first_p + i / side, q = first_q + i % side;
      if (c >= o.channels || p >= o.out_h || q >= o.out_w) continue;
      int own_h = p * o.stride_h - o.pad_h, own_w = q * o.stride_w - o.pad_w;
      Best<V> best;
      for (int h = max(own_h, 0); h < min(own_h + o.kernel_h, o.height); ++h)
        for (int w = max(own_w, 0); w < min(own_w + o.kernel_w, o.width); ++w)
          best.meet((h - own_h) * o.kernel_w + w - own_w, cells[((h - top) * columns + w - left) * blockDim.x + threadIdx.x]);
      long long at = offset_of(n, p, q, c, o.out_h, o.out_w, o.channels);
      best.store(y + at, mask ? mask + at : mask);
    }
    __syncthreads();  // before the next image's pixels come
  }
}

template <class T, class M, int H, int S>
__global__ void __launch_bounds__(BLOCK, 4) lrn_max_pool_backward(const T* __restrict__ x, const T* __restrict__ dy, const M* __restrict__ mask, T* __restrict__ dx, Lrn g, Windows o,
                                      bool relu) {
  constexpr int V = Vec<T>::size;
  static_assert(H <= V, "a box needs no more than the vectors beside a thread's own");
  __shared__ float heads[H][BLOCK], tails[H][BLOCK];  // dy y / s of each thread's first H channels, and of its last
  int pixel = blockIdx.x * blockDim.y + threadIdx.y, last = o.height * o.width - 1, c = threadIdx.x * V;
  int h = min(pixel, last) / o.width, w = min(pixel, last) % o.width;  // threads beyond the plane work along, so that all meet at the barriers
  int own = threadIdx.y * blockDim.x + threadIdx.x;
  for (int n = blockIdx.y; n < o.images; n += gridDim.y) {
    long long start = offset_of(n, h, w, 0, o.height, o.width, o.channels);
    float gradient[V] = {}, out[V], around[3 * V] = {};
    add_winners<V, S>(dy, mask, o, n, h, w, c, gradient, AsTheyAre());
    Around<T, H> near(x + start, c, o.channels, H);
    near.powers(g, out);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      gradient[v] = to_float(from_float<T>(gradient[v]));
      float output = to_float(from_float<T>(out[v] * near.values[V + v]));
      around[V + v] = gradient[v] * output / near.scale(g, V + v);
      if (v < H) heads[v][own] = around[V + v];
      if (v >= V - H) tails[v - (V - H)][own] = around[V + v];
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < H; ++d) {
      if (c > 0) around[V - 1 - d] = tails[H - 1 - d][own - 1];
      if (c + V < o.channels) around[2 * V + d] = heads[d][own + 1];
    }
#pragma unroll
    for (int v = 0; v < V; ++v) {
      out[v] = gradient_of(g, near.values[V + v], gradient[v], out[v], sum_around<H>(around, V + v));
      if (relu) out[v] = rectified(out[v], near.values[V + v]);
    }
    if (pixel <= last) store_floats(dx + start + c, out);
    __syncthreads();  // before the next image's ratios come
  }
}
