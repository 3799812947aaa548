// pool_dropout.cu - max and average pooling with the dropout of what they give, in one pass each way.
//
// Shapes, thread mapping, K and S: as in pooling.cu. A thread draws the block of random bits that its V channels fall into (dropout.cu says which), so 16 / V
// threads draw the same one: about 200 integer multiplications for V outputs, each of which takes kernel^2 elements from memory or a cache.
//
// max: mask (as in pooling.cu) gets "no winner" where the output is dropped, so that the gradient needs no mask of its own: dx adds up dy / (1 - ratio), rounded
// to T, from the windows whose mask has the pixel's number. ave: `keep` has 1 or 0 for each output, and backward reads it beside dy.
//
// Bytes for each output in bfloat16 beyond what pooling moves by itself: none for max, 1 each way for ave. A pass of dropout moves 5 forward and 5 backward.
// Ladder: this form only; not measured. Untried: one draw for two outputs of neighbouring threads.
#include "dropout.cuh"
#include "pooling.cuh"

// out = what is left of V neighbouring outputs, of which the first has number `at`; rounded to T before and after. Bit v of the result: it is kept.
template <class T, int V>
__device__ __forceinline__ unsigned drop(const float (&values)[V], long long at, u64 iteration, const Drop& d, float (&out)[V]) {
  unsigned bits = draw(at / DRAWN, iteration, d.seed, d.layer, d.threshold) >> (at % DRAWN);
#pragma unroll
  for (int v = 0; v < V; ++v) out[v] = dropped(to_float(from_float<T>(values[v])), d.factor, (float)(bits >> v & 1));
  return bits;
}

template <class T, class M, int V, int K>
__global__ void max_pool_dropout_forward(const T* __restrict__ x, T* __restrict__ y, M* __restrict__ mask, const double* number, Drop d, Windows g) {
  u64 iteration = (u64)*number;
  max_of_windows<V, K>(x, g, [&](Best<V>& best, long long at) {
    unsigned bits = drop<T>(best.value, at, iteration, d, best.value);
#pragma unroll
    for (int v = 0; v < V; ++v) best.winner[v] = bits >> v & 1 ? best.winner[v] : -1;
    best.store(y + at, mask ? mask + at : mask);
  });
}
template <class T, class M, int V, int S>
__global__ void max_pool_dropout_backward(const T* __restrict__ dy, const M* __restrict__ mask, const T* __restrict__ positive, T* __restrict__ dx, float factor,
                                          Windows g) {
  auto kept = [=](const Pack<T, V>& gradient, long long, float (&given)[V]) {
#pragma unroll
    for (int v = 0; v < V; ++v) given[v] = to_float(from_float<T>(__fmul_rn(to_float(gradient[v]), factor)));
  };
  if (positive) gather_winners<true, V, S>(dy, mask, positive, dx, g, kept);
  else gather_winners<false, V, S>(dy, mask, positive, dx, g, kept);
}

template <class T, int V, int K>
__global__ void ave_pool_dropout_forward(const T* __restrict__ x, T* __restrict__ y, unsigned char* __restrict__ keep, const double* number, Drop d, Windows g) {
  u64 iteration = (u64)*number;
  mean_of_windows<V, K>(x, g, [&](float (&means)[V], long long at) {
    unsigned bits = drop<T>(means, at, iteration, d, means);
    store_floats(y + at, means);
    if (!keep) return;
    Pack<unsigned char, V> kept;
#pragma unroll
    for (int v = 0; v < V; ++v) kept[v] = bits >> v & 1;
    store_pack(keep + at, kept);
  });
}
template <class T, int V, int S>
__global__ void ave_pool_dropout_backward(const T* __restrict__ dy, const unsigned char* __restrict__ keep, const T* __restrict__ positive, T* __restrict__ dx,
                                          float factor, Windows g) {
  gather_shares<V, S>(dy, positive, dx, g, [=](const Pack<T, V>& gradient, long long at, float (&given)[V]) {
    Pack<unsigned char, V> kept = load_pack<V>(keep + at);
#pragma unroll
    for (int v = 0; v < V; ++v) given[v] = to_float(from_float<T>(dropped(to_float(gradient[v]), factor, to_float(kept[v]))));
  });
}
