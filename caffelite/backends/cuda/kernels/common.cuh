// common.cuh - what all kernels share: 16-bit floats, 16-byte vectors, grid strides, sums over a warp and a block.
#pragma once
#include "primitives.cuh"
#ifdef __CUDACC_RTC__  // NVRTC has no <cmath> and no <cfloat>
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#elif !defined(CF_EMU)
#include <cfloat>
#include <cmath>
#endif

struct bf16 {
  unsigned short bits;
};

// --- conversions: arithmetic is float whatever the storage; rounding is to nearest, ties to even ---------------------------
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ __forceinline__ float to_float(unsigned char x) { return x; }
__device__ __forceinline__ float to_float(int x) { return (float)x; }
template <class T>
__device__ __forceinline__ T from_float(float x) {
  return (T)x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return bf16{cf_bf16_bits(x)};
}
__device__ __forceinline__ bool is_nan(float x) { return x != x; }
// A gradient taken on through the ReLU that put out `positive`.
template <class T>
__device__ __forceinline__ float rectified(float gradient, T positive) {
  return to_float(positive) > 0 ? gradient : 0 * gradient;
}

// --- 16 bytes at a time -------------------------------------------------------------------------------------------------
template <class T>
struct alignas(16) Vec {
  static constexpr int size = 16 / sizeof(T);
  T items[size];
  __device__ __forceinline__ T& operator[](int i) { return items[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return items[i]; }
};
template <class T>
__device__ __forceinline__ Vec<T> load_vec(const T* p) {  // p on a 16-byte boundary
  uint4 raw = *reinterpret_cast<const uint4*>(p);
  Vec<T> v;
  memcpy(&v, &raw, 16);
  return v;
}
template <class T>
__device__ __forceinline__ void store_vec(T* p, const Vec<T>& v) {
  uint4 raw;
  memcpy(&raw, &v, 16);
  *reinterpret_cast<uint4*>(p) = raw;
}
template <int BYTES>
struct Word {  // what moves BYTES in one instruction, or in BYTES / 16 of them
  typedef uint4 type;
};
template <>
struct Word<1> {
  typedef unsigned char type;
};
template <>
struct Word<2> {
  typedef unsigned short type;
};
template <>
struct Word<4> {
  typedef unsigned type;
};
template <>
struct Word<8> {
  typedef uint2 type;
};

__device__ __forceinline__ bool is_aligned16(const void* p) { return ((unsigned long long)p & 15) == 0; }

// --- a loop over items by all threads of the grid --------------------------------------------------------------------------
__device__ __forceinline__ long long thread_index() { return blockIdx.x * (long long)blockDim.x + threadIdx.x; }
__device__ __forceinline__ long long thread_count() { return gridDim.x * (long long)blockDim.x; }

// --- reductions in a fixed order -------------------------------------------------------------------------------------------
template <class V>
__device__ __forceinline__ V warp_sum(V v) {  // all 32 lanes call it; every lane gets the sum
  for (int offset = 16; offset; offset >>= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}
template <class V>
__device__ __forceinline__ V warp_max(V v) {
  for (int offset = 16; offset; offset >>= 1) {
    V other = __shfl_xor_sync(0xffffffffu, v, offset);
    v = other > v ? other : v;
  }
  return v;
}
// All threads of the block call it (a whole number of warps); every thread gets the sum. Holds two barriers.
template <class V>
__device__ __forceinline__ V block_sum(V v) {
  __shared__ V partial[32];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  v = warp_sum(v);
  __syncthreads();
  if (lane == 0) partial[warp] = v;
  __syncthreads();
  v = warp_sum(lane < warps ? partial[lane] : V(0));
  return v;
}
