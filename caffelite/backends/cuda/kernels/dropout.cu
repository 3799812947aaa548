// dropout.cu - y = x m / (1-ratio) with the mask m drawn on the way, and dx = dy m / (1-ratio); without a mask, from what the dropout after a ReLU put out: see the contract.
//
// Any shape, seen as n elements in memory order. Philox 4x64-10 (Salmon et al. 2011) with key (seed, layer) and counter (block + 1, 0, iteration, 0) gives
// 4 words of 64 bits, so 16 mask values of 16 bits, lowest first: block b decides elements 16b..16b+15, independent of all others. A warp works on 512
// elements: each lane draws one block and keeps its 16 decisions as bits; then the lanes walk along the 512 elements 16 bytes at a time and fetch the bits
// from the lane that drew them, so that all accesses are neighbours. Forward moves 2 elements and a byte (bfloat16: 5 bytes) for about 20 integer operations
// an element, backward the same bytes. Tried: this form only. Not measured.
#include "dropout.cuh"
#include "elementwise.cuh"

constexpr int CHUNK = 32 * DRAWN;  // elements of a warp

template <int N, class T>
__device__ __forceinline__ void drop(const T* x, T* y, unsigned char* mask, long long i, unsigned bits, float factor) {  // bit k: element i + k
  Floats<N> v = load<N>(x + i), keep;
  for (int k = 0; k < N; ++k) keep[k] = (float)(bits >> k & 1);
  for (int k = 0; k < N; ++k) v[k] = dropped(v[k], factor, keep[k]);
  store<N>(mask + i, keep);
  store<N>(y + i, v);
}
template <class T>
__global__ void dropout_forward(const T* x, T* y, unsigned char* mask, const double* number, Drop d, long long n) {
  constexpr int N = 16 / sizeof(T);
  bool pack = packed<N>(x) && packed<N>(y) && packed<N>(mask);
  int lane = threadIdx.x & 31;
  u64 iteration = (u64)*number;
  for (long long chunk = thread_index() >> 5; chunk * CHUNK < n; chunk += thread_count() >> 5) {  // the same for all lanes of a warp
    unsigned mine = draw(chunk * 32 + lane, iteration, d.seed, d.layer, d.threshold);
    for (int part = 0; part < DRAWN / N; ++part) {
      int at = (part * 32 + lane) * N;  // within the chunk
      unsigned bits = __shfl_sync(0xffffffffu, mine, at / DRAWN) >> (at % DRAWN);
      long long i = chunk * CHUNK + at;
      if (pack && i + N <= n) drop<N>(x, y, mask, i, bits, d.factor);
      else
        for (int k = 0; k < N && i + k < n; ++k) drop<1>(x, y, mask, i + k, bits >> k, d.factor);
    }
  }
}
template <class T>
__global__ void dropout_backward(const T* dy, const unsigned char* mask, const T* positive, T* dx, float factor, long long n) {
  auto drop = [=](float d, float keep) { return dropped(d, factor, keep); };
  if (!mask) map(dx, n, [=](float d, float above) { return rectified(drop(d, 1), above); }, dy, positive);
  else if (positive) map(dx, n, [=](float d, float keep, float above) { return rectified(drop(d, keep), above); }, dy, mask, positive);
  else map(dx, n, drop, dy, mask);
}
