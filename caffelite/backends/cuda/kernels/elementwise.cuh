// elementwise.cuh - passes over flat arrays: elements are widened to float, 16 bytes of the activation type at a time where all pointers allow it.
#pragma once
#include "common.cuh"

// --- N elements of any storage type as floats ------------------------------------------------------------------------------
template <int N>
struct Floats {
  float items[N];
  __device__ __forceinline__ float& operator[](int i) { return items[i]; }
  __device__ __forceinline__ const float& operator[](int i) const { return items[i]; }
};

template <int N, class X>
__device__ __forceinline__ bool packed(const X* p) {  // p allows load<N> and store<N>; so does a null pointer, which its user must not follow
  constexpr int bytes = sizeof(typename Word<N * sizeof(X)>::type);
  return ((unsigned long long)p & (bytes - 1)) == 0;
}
template <int N, class X>
__device__ __forceinline__ Floats<N> load(const X* p) {
  typedef typename Word<N * sizeof(X)>::type R;
  constexpr int count = N * sizeof(X) / sizeof(R);
  R raw[count];
  for (int i = 0; i < count; ++i) raw[i] = reinterpret_cast<const R*>(p)[i];
  X items[N];
  memcpy(items, raw, sizeof(items));
  Floats<N> values;
  for (int i = 0; i < N; ++i) values[i] = to_float(items[i]);
  return values;
}
template <int N, class X>
__device__ __forceinline__ Floats<N> load_singles(const X* p) {
  Floats<N> values;
  for (int i = 0; i < N; ++i) values[i] = to_float(p[i]);
  return values;
}
template <int N, class X>
__device__ __forceinline__ void store(X* p, const Floats<N>& values) {
  typedef typename Word<N * sizeof(X)>::type R;
  constexpr int count = N * sizeof(X) / sizeof(R);
  X items[N];
  for (int i = 0; i < N; ++i) items[i] = from_float<X>(values[i]);
  R raw[count];
  memcpy(raw, items, sizeof(items));
  for (int i = 0; i < count; ++i) reinterpret_cast<R*>(p)[i] = raw[i];
}

// --- loops -----------------------------------------------------------------------------------------------------------------
template <int N>
struct Width {
  static constexpr int value = N;
};
// body(Width<N>(), i) for the N elements from i on, N being 16 bytes of T, where `pack` says that all pointers allow it and there are as many; else
// body(Width<1>(), i) for each of them. All N stay with one thread, so that no two threads write into one 32-bit word.
template <class T, class Body>
__device__ __forceinline__ void sweep(long long n, bool pack, Body body) {
  constexpr int N = 16 / sizeof(T);
  for (long long i = thread_index() * N; i < n; i += thread_count() * N) {
    if (pack && i + N <= n) body(Width<N>(), i);
    else
      for (int k = 0; k < N && i + k < n; ++k) body(Width<1>(), i + k);
  }
}
// y[i] = f(x[i]...), rounded once. y may be one of the x: a thread reads its elements before it writes them.
template <class T, class F, class... X>
__device__ __forceinline__ void map(T* y, long long n, F f, const X*... x) {
  constexpr int full = 16 / sizeof(T);
  sweep<T>(n, (packed<full>(y) && ... && packed<full>(x)), [=](auto width, long long i) {
    constexpr int N = decltype(width)::value;
    auto all = [&](const auto&... values) {
      Floats<N> result;
      for (int k = 0; k < N; ++k) result[k] = f(values[k]...);
      return result;
    };
    store<N>(y + i, all(load<N>(x + i)...));
  });
}
