// broadcast.cuh - operands that broadcast along some axes of an array, and sums over these axes.
//
// The array's axes, in memory order and with neighbours of one kind joined, are (d0 broadcast, d1 kept, d2 broadcast, d3 kept): the operand has d1 d3
// elements, and element i of the array meets element (i / (d2 d3)) % d1 * d3 + i % d3. A factor per channel, channels last, is (positions, 1, 1, channels);
// one per channel of (N,C,L) is (N, C, L, 1); one for each image and channel, channels last, is (1, N, H W, C).
#pragma once
#include "elementwise.cuh"

struct Runs {  // broadcast.py passes it
  long long d0, d1, d2, d3;
};

// --- reading -----------------------------------------------------------------------------------------------------------------
// The operand's elements for N elements of the array from i on, i a multiple of N.
template <int N, class S>
__device__ __forceinline__ Floats<N> load_spread(const S* s, long long i, const Runs& runs) {
  long long after = runs.d2 * runs.d3, column = runs.d3 == 1 ? 0 : i % runs.d3, row = runs.d1 == 1 ? 0 : i / after % runs.d1;
  if (runs.d3 % N == 0 && packed<N>(s)) return load<N>(s + row * runs.d3 + column);  // neighbours too
  long long left = runs.d1 == 1 ? -1 : after - i % after;  // elements before the next row
  Floats<N> values;
  for (int k = 0; k < N; ++k) {
    values[k] = to_float(s[row * runs.d3 + column]);
    if (++column == runs.d3) column = 0;
    if (--left == 0) {
      left = after;
      if (++row == runs.d1) row = 0;
    }
  }
  return values;
}

// --- sums ------------------------------------------------------------------------------------------------------------------
// partial[output * slabs + slab], or out where partial is null: the sum of Term over the rows of a slab.
//
// A block has blockDim.x threads along the outputs, N of them neighbours in memory to a thread, and blockDim.y along the rows (the d0 d2 terms of an
// output). gridDim.x tiles cover the outputs, gridDim.y slabs of `run` rows the rows. A thread adds RUN terms in float, then continues in double; the block
// adds its rows pairwise. The order depends on the shapes alone. Reads each element once: sizeof(T) or 2 sizeof(T) bytes and 2 operations.
// Tried: this form only. Not measured.
struct SumTerm {
  static constexpr bool pair = false;  // reads dy alone
  static __device__ __forceinline__ float term(float, float dy) { return dy; }
};
struct ProductTerm {
  static constexpr bool pair = true;
  static __device__ __forceinline__ float term(float x, float dy) { return x * dy; }
};

constexpr int BLOCK = 256, RUN = 8;

template <class Term, class T, int N>
__device__ __forceinline__ void add_terms(Floats<N>& sum, const T* x, const T* dy, long long at, bool pack) {
  Floats<N> d = pack ? load<N>(dy + at) : load_singles<N>(dy + at), v = d;
  if (Term::pair) v = pack ? load<N>(x + at) : load_singles<N>(x + at);
  for (int k = 0; k < N; ++k) sum[k] += Term::term(v[k], d[k]);
}
template <int N>
__device__ __forceinline__ void add_block(double (&sum)[N]) {  // over threadIdx.y; the threads with threadIdx.y == 0 get the result
  __shared__ double shared[N][BLOCK];
  int thread = threadIdx.y * blockDim.x + threadIdx.x;
  for (int k = 0; k < N; ++k) shared[k][thread] = sum[k];
  for (int rows = blockDim.y, half; rows > 1; rows = half) {
    half = (rows + 1) / 2;
    __syncthreads();
    if (threadIdx.y + half < rows)
      for (int k = 0; k < N; ++k) shared[k][thread] += shared[k][thread + half * blockDim.x];
  }
  for (int k = 0; k < N; ++k) sum[k] = shared[k][thread];  // what this thread wrote last
}
template <class Term, class T, int N>
__global__ void __launch_bounds__(BLOCK, 3)
    reduce(const T* x, const T* dy, double* partial, float* out, Runs runs, long long run, int accumulate) {
  const long long d0 = runs.d0, d1 = runs.d1, d2 = runs.d2, d3 = runs.d3;
  long long output = (blockIdx.x * (long long)blockDim.x + threadIdx.x) * N, rows = d0 * d2;
  long long stop = min((blockIdx.y + 1) * run, rows), base = output / d3 * d2 * d3 + output % d3;
  bool pack = packed<N>(dy) && (!Term::pair || packed<N>(x)), inside = output < d1 * d3;
  double sum[N] = {};
  for (long long row = blockIdx.y * run + threadIdx.y; inside && row < stop; row += RUN * blockDim.y) {
    Floats<N> part = {};
    for (int u = 0; u < RUN; ++u) {
      long long r = row + u * blockDim.y;
      long long at = d0 == 1 ? r * d3 : d2 == 1 ? r * (d1 * d3) : (r / d2 * d1 * d2 + r % d2) * d3;
      if (r < stop) add_terms<Term, T, N>(part, x, dy, base + at, pack);
    }
    for (int k = 0; k < N; ++k) sum[k] += part[k];
  }
  add_block<N>(sum);
  if (threadIdx.y || !inside) return;
  for (int k = 0; k < N; ++k) {
    if (partial) partial[(output + k) * gridDim.y + blockIdx.y] = sum[k];
    else out[output + k] = (float)(accumulate ? out[output + k] + sum[k] : sum[k]);
  }
}
// out[i] (+)= the sum of partial[i * terms] and the terms - 1 after it, by one warp. O is float.
template <class O>
__global__ void reduce_finish(const double* partial, O* out, long long terms, long long n, int accumulate) {
  long long i = thread_index() >> 5;
  if (i >= n) return;  // all lanes of the warp
  double sum = 0;
  for (long long k = threadIdx.x & 31; k < terms; k += 32) sum += partial[i * terms + k];
  sum = warp_sum(sum);
  if ((threadIdx.x & 31) == 0) out[i] = (O)(accumulate ? out[i] + sum : sum);
}
