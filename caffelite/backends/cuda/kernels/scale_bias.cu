// scale_bias.cu - y = x s + b with operands that broadcast along some axes, and the gradients of s and b.
//
// broadcast.cuh says which element of s and b an element of x meets, and how the gradients are added. A thread takes 16 bytes of x at a time; s and b are read
// 16 bytes at a time as well where they lie along x's innermost axis (one per channel, channels last), and come from the cache. Moves 2 elements of x
// (bfloat16: 4 bytes) for 2 operations. Tried: this form only. Not measured.
#include "broadcast.cuh"

// s or b may be null. Rounds after the product and after the sum, as the NumPy backend does.
template <class T, class S, class B>
__global__ void scale_bias(const T* x, const S* s, const B* b, T* y, Runs runs, long long n) {
  constexpr int full = 16 / sizeof(T);
  sweep<T>(n, packed<full>(x) && packed<full>(y), [=](auto width, long long i) {
    constexpr int N = decltype(width)::value;
    Floats<N> v = load<N>(x + i);
    if (s) {
      Floats<N> factor = load_spread<N>(s, i, runs);
      for (int k = 0; k < N; ++k) v[k] = __fmul_rn(v[k], factor[k]);
    }
    if (b) {
      Floats<N> term = load_spread<N>(b, i, runs);
      for (int k = 0; k < N; ++k) v[k] = __fadd_rn(v[k], term[k]);
    }
    store<N>(y + i, v);
  });
}
// The operand itself along the array: for the few patterns that have more than two broadcast runs of axes, and for s and b of different ones.
template <class S>
__global__ void spread(const S* s, S* y, Runs runs, long long n) {
  for (long long i = thread_index(); i < n; i += thread_count()) y[i] = s[i / (runs.d2 * runs.d3) % runs.d1 * runs.d3 + i % runs.d3];
}
