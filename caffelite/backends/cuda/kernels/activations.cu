// activations.cu - ReLU, ELU, Sigmoid, TanH, Power and PReLU, forward and backward.
//
// Any shape, seen as n elements in memory order. A thread takes 16 bytes (8 bfloat16 or 4 float) at a time, neighbours take neighbouring ones; arrays off a
// 16-byte boundary and the last few elements go one by one. Forward moves 2 elements (bfloat16: 4 bytes), backward 3; about 1 to 30 operations each, so
// memory is the limit. PReLU's slopes come from the cache (broadcast.cuh); their gradient reads 2 elements and adds them as broadcast.cuh says.
// Tried: this form only. Not measured.
#include "broadcast.cuh"

template <class T>
__global__ void relu_forward(const T* x, T* y, float slope, long long n) {
  // A zero slope keeps NaN and makes -infinity 0.
  map(y, n, [=](float v) { return v > 0 ? v : slope != 0 ? slope * v : is_nan(v) ? v : 0.f; }, x);
}
template <class T>
__global__ void relu_backward(const T* y, const T* dy, T* dx, float slope, long long n) {
  map(dx, n, [=](float out, float d) { return d * (out > 0 ? 1.f : slope); }, y, dy);
}

template <class T>
__global__ void elu_forward(const T* x, T* y, float alpha, long long n) {
  map(y, n, [=](float v) { return v > 0 ? v : alpha * expm1f(v); }, x);
}
template <class T>
__global__ void elu_backward(const T* y, const T* dy, T* dx, float alpha, long long n) {
  map(dx, n, [=](float out, float d) { return out > 0 ? d : d * (alpha + out); }, y, dy);
}

template <class T>
__global__ void sigmoid_forward(const T* x, T* y, long long n) {
  map(y, n, [](float v) { return 0.5f * tanhf(0.5f * v) + 0.5f; }, x);
}
template <class T>
__global__ void sigmoid_backward(const T* y, const T* dy, T* dx, long long n) {
  map(dx, n, [](float out, float d) { return d * (out * (1 - out)); }, y, dy);
}

template <class T>
__global__ void tanh_forward(const T* x, T* y, long long n) {
  map(y, n, [](float v) { return tanhf(v); }, x);
}
template <class T>
__global__ void tanh_backward(const T* y, const T* dy, T* dx, long long n) {
  map(dx, n, [](float out, float d) { return d * (1 - out * out); }, y, dy);
}

// --- Power: the exponents that need no powf are the same for all elements ------------------------------------------------------
__device__ __forceinline__ float powered(float base, float power) {
  if (power == 1) return base;
  if (power == 2) return base * base;
  if (power == 0.5f) return sqrtf(base);
  if (power == -1) return 1 / base;
  return powf(base, power);
}
template <class T>
__global__ void power_forward(const T* x, T* y, float power, float scale, float shift, long long n) {
  map(y, n, [=](float v) { return powered(__fadd_rn(shift, __fmul_rn(scale, v)), power); }, x);
}
template <class T>
__global__ void power_constant(T* y, float value, long long n) {  // a power that does not depend on x
  map(y, n, [=]() { return value; });
}
// power 1 and 2: dx = dy (constant + slope x)
template <class T>
__global__ void power_backward_line(const T* x, const T* dy, T* dx, float constant, float slope, long long n) {
  if (slope == 0) map(dx, n, [=](float d) { return constant * d; }, dy);  // x may be infinite
  else map(dx, n, [=](float v, float d) { return d * __fadd_rn(constant, __fmul_rn(slope, v)); }, x, dy);
}
// other powers: dx = dy (factor y / (shift + scale x)), where factor = power scale; without a shift, scale is 1 and factor = power
template <class T>
__global__ void power_backward(const T* x, const T* y, const T* dy, T* dx, float factor, float scale, float shift, long long n) {
  // The base rounds as forward's did, so that a base of 0 divides 0 by 0.
  map(dx, n, [=](float v, float out, float d) { return d * (factor * out / __fadd_rn(shift, __fmul_rn(scale, v))); }, x, y, dy);
}

// --- PReLU: slope a[index of the channel], see broadcast.cuh -------------------------------------------------------------------
template <class T, class A>
__global__ void prelu_forward(const T* x, const A* a, T* y, Runs runs, long long n) {
  constexpr int full = 16 / sizeof(T);
  sweep<T>(n, packed<full>(x) && packed<full>(y), [=](auto width, long long i) {
    constexpr int N = decltype(width)::value;
    Floats<N> v = load<N>(x + i), slope = load_spread<N>(a, i, runs);
    for (int k = 0; k < N; ++k) v[k] = v[k] > 0 ? v[k] : slope[k] * v[k];
    store<N>(y + i, v);
  });
}
template <class T, class A>
__global__ void prelu_backward_data(const T* x, const A* a, const T* dy, T* dx, Runs runs, long long n) {
  constexpr int full = 16 / sizeof(T);
  sweep<T>(n, packed<full>(x) && packed<full>(dy) && packed<full>(dx), [=](auto width, long long i) {
    constexpr int N = decltype(width)::value;
    Floats<N> v = load<N>(x + i), d = load<N>(dy + i), slope = load_spread<N>(a, i, runs);
    for (int k = 0; k < N; ++k) d[k] = v[k] > 0 ? d[k] : slope[k] * d[k];
    store<N>(dx + i, d);
  });
}

struct SlopeTerm {
  static constexpr bool pair = true;
  static __device__ __forceinline__ float term(float x, float dy) { return x <= 0 ? x * dy : 0.f; }
};
