// batch_norm.cuh - what batch normalisation with and without a Scale share: how a block's threads share a matrix (pixels, channels), and how two sums
// of each channel are left by blocks and added up. Thread mapping: batch_norm.cu.
#pragma once
#include "elementwise.cuh"

template <int N, bool PACK, class T>
__device__ __forceinline__ Floats<N> load_as(const T* p) {
  return PACK ? load<N>(p) : load_singles<N>(p);
}

template <int N, bool PACK, class T>
__device__ __forceinline__ void store_as(T* p, const Floats<N>& values) {
  if (PACK) {
    store<N>(p, values);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) p[k] = from_float<T>(values[k]);
  }
}

// What a thread of a matrix kernel works on.
template <int N>
struct Place {
  int rows, channel;
  long long pixel, end;
  bool any;
  __device__ __forceinline__ Place(long long pixels, int channels, int columns, long long slab) {
    rows = 256 / columns;
    int row = threadIdx.x / columns;
    channel = (blockIdx.x * columns + threadIdx.x % columns) * N;
    pixel = blockIdx.y * slab + row;
    end = min(pixels, (blockIdx.y + 1) * slab);
    any = row < rows && channel < channels;
  }
};

// --- two sums of each channel ------------------------------------------------------------------------------------------------
// partial <- the sums of a block's rows, a and b being a thread's for its N channels: pixels in the order of the rows.
template <int N>
__device__ __forceinline__ void leave_sums(const double (&a)[N], const double (&b)[N], double* partial, int channels, int columns) {
  __shared__ double first[256 * N], second[256 * N];
  int rows = 256 / columns;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    first[threadIdx.x * N + k] = a[k];
    second[threadIdx.x * N + k] = b[k];
  }
  __syncthreads();
  int mine = threadIdx.x, own = blockIdx.x * columns * N + mine;  // one channel a thread
  if (mine < columns * N && own < channels) {
    double sum_a = 0, sum_b = 0;
    for (int r = 0; r < rows; ++r) {
      sum_a += first[r * columns * N + mine];
      sum_b += second[r * columns * N + mine];
    }
    partial[2LL * own * gridDim.y + blockIdx.y] = sum_a;
    partial[(2LL * own + 1) * gridDim.y + blockIdx.y] = sum_b;
  }
}

// Both sums of a channel over the slabs, in all lanes of the warp that asks.
__device__ __forceinline__ void slab_sums(const double* partial, int slabs, int channel, double& a, double& b) {
  const double* mine = partial + 2LL * channel * slabs;
  a = b = 0;
  for (int i = threadIdx.x % 32; i < slabs; i += 32) {
    a += mine[i];
    b += mine[slabs + i];
  }
  a = warp_sum(a);
  b = warp_sum(b);
}
