// channels.cuh - work on the places of a channels-last plane: a thread takes V neighbouring channels of one pixel.
//
// Blocks are (channel groups, pixels); grids are (tiles of pixels, images): channels.py makes both. So a thread divides once, to tell
// a pixel's row from its column, and the threads of a warp touch one unbroken run of memory wherever a block covers all channels.
#pragma once
#include "common.cuh"

template <class T, int V>
struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Pack {  // V elements, moved in as few accesses as they allow
  T items[V];
  __device__ __forceinline__ T& operator[](int i) { return items[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return items[i]; }
};

// p lies on a boundary of V elements or of 16 bytes, whichever is less, in an array that the kernel does not write. (Plain loads, through
// which the compiler sees, came out as several narrow ones where the elements of a pack go different ways.)
template <int V, class T>
__device__ __forceinline__ Pack<T, V> load_pack(const T* p) {
  constexpr int bytes = sizeof(T) * V < 16 ? sizeof(T) * V : 16, words = sizeof(T) * V / bytes;
  typedef typename Word<bytes>::type word;
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < words; ++i) {
    word raw = __ldg(reinterpret_cast<const word*>(p) + i);
    memcpy(reinterpret_cast<char*>(&pack) + i * bytes, &raw, bytes);
  }
  return pack;
}
template <class T, int V>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, V>& pack) {
  constexpr int bytes = sizeof(T) * V < 16 ? sizeof(T) * V : 16, words = sizeof(T) * V / bytes;
  typedef typename Word<bytes>::type word;
#pragma unroll
  for (int i = 0; i < words; ++i) {
    word raw;
    memcpy(&raw, reinterpret_cast<const char*>(&pack) + i * bytes, bytes);
    reinterpret_cast<word*>(p)[i] = raw;
  }
}
template <class T, int V>
__device__ __forceinline__ void store_floats(T* p, const float (&values)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) pack[v] = from_float<T>(values[v]);
  store_pack(p, pack);
}

// body(image, h, w, c) for every place that falls to this thread; c is the first of its V channels.
template <int V, class Body>
__device__ __forceinline__ void each_place(int images, int height, int width, int channels, Body body) {
  int pixel = blockIdx.x * blockDim.y + threadIdx.y;
  if (pixel >= height * width) return;
  int h = (unsigned)pixel / (unsigned)width, w = pixel - h * width;
  for (int image = blockIdx.y; image < images; image += gridDim.y)
    for (int c = threadIdx.x * V; c < channels; c += blockDim.x * V) body(image, h, w, c);
}

// Elements before (image, h, w, c) in an array of those extents.
__device__ __forceinline__ long long offset_of(int image, int h, int w, int c, int height, int width, int channels) {
  return (((long long)image * height + h) * width + w) * channels + c;
}
