// eltwise.cu - sums, products and maxima of several arrays of one shape.
//
// Any shape, seen as n elements in memory order. One pass takes up to 4 arrays; with more, the totals so far travel in float (`before` -> `partial`), so that a
// bfloat16 result is rounded once. A thread takes 16 bytes of each array at a time. Moves K + 1 elements for K operations. Tried: this form only. Not measured.
#include "elementwise.cuh"

constexpr int MOST = 4;  // arrays in one pass

template <class T>
struct Inputs {
  const T* x[MOST];
};
template <int K, class T>
__device__ __forceinline__ bool all_packed(const Inputs<T>& in) {
  bool all = true;
  for (int k = 0; k < K; ++k) all = all && packed<16 / sizeof(T)>(in.x[k]);
  return all;
}

// result = before (if any) + or * the inputs in order, to y in T or to partial in float. Each step is rounded, as on the NumPy backend.
// Then relu: max(y, 0); positive: y goes on through the ReLU that put that out.
template <class T, int K, class Step>
__device__ __forceinline__ void fold(const Inputs<T>& in, const float* before, float* partial, const T* positive, bool relu, T* y, long long n, Step step) {
  constexpr int full = 16 / sizeof(T);
  bool pack = all_packed<K>(in) && packed<full>(before) && packed<full>(partial) && packed<full>(positive) && packed<full>(y);
  sweep<T>(n, pack, [=](auto width, long long i) {
    constexpr int N = decltype(width)::value;
    Floats<N> total = {};
    if (before) total = load<N>(before + i);
    for (int k = 0; k < K; ++k) {
      Floats<N> value = load<N>(in.x[k] + i);
      for (int e = 0; e < N; ++e) total[e] = step(k, k > 0 || before, total[e], value[e]);
    }
    if (partial) {
      store<N>(partial + i, total);
      return;
    }
    if (positive) {
      Floats<N> above = load<N>(positive + i);
      for (int e = 0; e < N; ++e) total[e] = rectified(total[e], above[e]);
    }
    for (int e = 0; e < N; ++e) total[e] = !relu || total[e] > 0 || is_nan(total[e]) ? total[e] : 0;
    store<N>(y + i, total);
  });
}
template <class T, int K>
__global__ void eltwise_sum(const T* x0, const T* x1, const T* x2, const T* x3, float c0, float c1, float c2, float c3, const float* before, float* partial,
                            const T* positive, bool relu, T* y, long long n) {
  fold<T, K>({{x0, x1, x2, x3}}, before, partial, positive, relu, y, n, [=](int k, bool more, float total, float value) {
    float term = __fmul_rn(value, k == 0 ? c0 : k == 1 ? c1 : k == 2 ? c2 : c3);
    return more ? __fadd_rn(total, term) : term;
  });
}
template <class T, int K>
__global__ void eltwise_product(const T* x0, const T* x1, const T* x2, const T* x3, const float* before, float* partial, T* y, long long n) {
  fold<T, K>({{x0, x1, x2, x3}}, before, partial, (const T*)nullptr, false, y, n, [](int, bool more, float total, float value) { return more ? __fmul_rn(total, value) : value; });
}
template <class T>
__global__ void eltwise_quotient(const T* x, const T* y, const T* dy, T* dx, long long n) {
  map(dx, n, [](float v, float product, float d) { return product / v * d; }, x, y, dy);
}

// start: the number of the first input. The first pass (start 0) has at least two inputs; later ones go on from y and winner.
template <class T, int K>
__global__ void eltwise_max(const T* x0, const T* x1, const T* x2, const T* x3, T* y, unsigned char* winner, int start, long long n) {
  constexpr int full = 16 / sizeof(T);
  Inputs<T> in = {{x0, x1, x2, x3}};
  sweep<T>(n, all_packed<K>(in) && packed<full>(y) && packed<full>(winner), [=](auto width, long long i) {
    constexpr int N = decltype(width)::value;
    Floats<N> best, number = {};
    if (start) best = load<N>(y + i), number = load<N>(winner + i);
    for (int k = 0; k < K; ++k) {
      Floats<N> value = load<N>(in.x[k] + i);
      for (int e = 0; e < N; ++e) {
        bool first = start + k == 0, second = start + k == 1;  // the second wins unless the first is greater: ties and NaN
        if (first || (second ? !(best[e] > value[e]) : value[e] > best[e])) best[e] = value[e], number[e] = (float)(start + k);
      }
    }
    store<N>(y + i, best);
    store<N>(winner + i, number);
  });
}
template <class T>
__global__ void eltwise_max_backward(const unsigned char* winner, const T* dy, T* dx, int index, long long n) {
  map(dx, n, [=](float number, float d) { return number == (float)index ? d : 0.f; }, winner, dy);
}
