// updates.cu - sums over flat arrays, scaling, and the solvers' update rules over the parameter arena.
//
// Update rules: one launch for all segments of the arena. A block of 256 takes CHUNK elements of one segment, cut at multiples of CHUNK
// of the arena so that 16-byte accesses fall on their boundaries; it finds its segment by bisection over the table. Elements of a 16-byte
// run that reaches over a segment's end go one by one.
// Every step is a float32 operation rounded by itself, in the order of the numpy backend, so that both give the same bits: products are
// __fmul_rn, which the compiler does not fuse with a sum; division and square root are rounded correctly without fast-math.
// Bytes an element: reads w, g and each state, writes w and each state (and g when the step is asked for): 20 for SGD, 28 for Adam,
// and 2 where the weights are wanted in bfloat16 too, which spares reading them again.
// What changes from one update to the next is read from memory, so that a recorded launch stays right.
// Sums: doubles from the first term on; 4 bytes read an element. Partial sums of up to 1024 blocks, then one block.
// Ladder: this is the first rung; not measured.
#include "elementwise.cuh"
#include "partials.cuh"

// --- sums and scaling ------------------------------------------------------------------------------------------------------
enum Term { VALUE, SQUARE, ABSOLUTE, NOT_FINITE };

template <Term TERM>
__device__ __forceinline__ double term_of(float x) {
  if (TERM == VALUE) return x;
  if (TERM == SQUARE) return (double)x * x;
  if (TERM == ABSOLUTE) return fabsf(x);
  return (__float_as_uint(x) & 0x7f800000u) == 0x7f800000u;
}

template <class T, Term TERM>
__global__ void __launch_bounds__(256, 4) sum_terms(const T* x, double* partial, long long n) {
  double sum = 0;
  sweep<T>(n, packed<16 / sizeof(T)>(x), [&](auto width, long long i) {
    constexpr int N = decltype(width)::value;
    Floats<N> v = load<N>(x + i);
#pragma unroll
    for (int k = 0; k < N; ++k) sum += term_of<TERM>(v[k]);
  });
  store_partial(partial, 0, sum);
}

__global__ void sum_partials(const double* partial, int count, double* sum, double factor, bool accumulate) {
  double all = ordered_sum(partial, 0, count);
  if (threadIdx.x == 0) *sum = (accumulate ? *sum : 0) + factor * all;
}

// norm: the root of the sum of squares; grad_scale: what a gradient is multiplied by so that its norm is at most `limit`, over `divisor`.
__global__ void clip_scale(const double* partial, int count, double* norm, double* grad_scale, double limit, double divisor) {
  double root = sqrt(ordered_sum(partial, 0, count));
  if (threadIdx.x == 0) {
    *norm = root;
    *grad_scale = (root > limit ? limit / root : 1) / divisor;
  }
}

// journal: how many values it holds, whether one was not finite, and the values: see contract.py.
__global__ void append_value(double* journal, int room, const double* value, double divisor) {
  double kept = *value / divisor;
  int place = (int)journal[0];
  if (!(kept - kept == 0)) journal[1] = 1;
  if (place < room) {
    journal[2 + place] = kept;
    journal[0] = place + 1;
  }
}

template <class T>
__global__ void __launch_bounds__(256, 4) scale_values(T* x, float factor, long long n) {
  map(x, n, [=](float v) { return v * factor; }, x);
}

// --- update rules ----------------------------------------------------------------------------------------------------------
constexpr int CHUNK = 4096;  // elements to a block; updates.py knows it too

struct Segment {
  long long start, stop;
  long long block;  // number of its first block
  double lr_mult;
  float decay;
};

// The last segment whose first block is not after this one.
__device__ __forceinline__ Segment segment_of(const Segment* table, int segments) {
  int low = 0, high = segments;
  while (high - low > 1) {
    int middle = (low + high) / 2;
    if (table[middle].block <= blockIdx.x) low = middle;
    else high = middle;
  }
  return table[low];
}

struct Dials {
  const double *rate, *grad_scale, *skip;
};

struct Options {
  float rate, grad_scale;
  int l1, write_step;
};

// A rule turns g' into the step D; h and v are its states, of which only the first STATES exist.
struct Sgd {
  static constexpr int STATES = 1;
  float momentum;
  __device__ __forceinline__ float step(float g, float rate, float& h, float&) const {
    h = __fadd_rn(__fmul_rn(h, momentum), __fmul_rn(g, rate));
    return h;
  }
};

struct Nesterov {
  static constexpr int STATES = 1;
  float momentum, one_more;  // one_more: 1 + momentum
  __device__ __forceinline__ float step(float g, float rate, float& h, float&) const {
    float before = __fmul_rn(h, momentum);
    h = __fadd_rn(before, __fmul_rn(g, rate));
    return __fsub_rn(__fmul_rn(h, one_more), before);
  }
};

// state <- keep state + rest value^2, rest = 1 - keep.
__device__ __forceinline__ void average_square(float& state, float value, float keep, float rest) {
  state = __fadd_rn(__fmul_rn(state, keep), __fmul_rn(__fmul_rn(value, value), rest));
}
__device__ __forceinline__ float divide_by_root(float step, float state, float delta, float rate) {
  return __fmul_rn(__fdiv_rn(step, __fadd_rn(__fsqrt_rn(state), delta)), rate);
}

struct AdaGrad {
  static constexpr int STATES = 1;
  float delta;
  __device__ __forceinline__ float step(float g, float rate, float& h, float&) const {
    h = __fadd_rn(h, __fmul_rn(g, g));
    return divide_by_root(g, h, delta, rate);
  }
};

struct RmsProp {
  static constexpr int STATES = 1;
  float keep, rest, delta;
  __device__ __forceinline__ float step(float g, float rate, float& h, float&) const {
    average_square(h, g, keep, rest);
    return divide_by_root(g, h, delta, rate);
  }
};

struct AdaDelta {
  static constexpr int STATES = 2;
  float keep, rest, delta;
  __device__ __forceinline__ float step(float g, float rate, float& h, float& v) const {
    average_square(h, g, keep, rest);
    float d = __fmul_rn(g, __fsqrt_rn(__fdiv_rn(__fadd_rn(v, delta), __fadd_rn(h, delta))));
    average_square(v, d, keep, rest);
    return __fmul_rn(d, rate);
  }
};

struct Adam {  // the rate holds the correction for the first steps
  static constexpr int STATES = 2;
  float keep1, rest1, keep2, rest2, delta;
  __device__ __forceinline__ float step(float g, float rate, float& h, float& v) const {
    average_square(v, g, keep2, rest2);
    h = __fadd_rn(__fmul_rn(h, keep1), __fmul_rn(g, rest1));
    return divide_by_root(h, v, delta, rate);
  }
};

// lowered: where the weights go in bfloat16, or null.
template <int N, class Rule>
__device__ __forceinline__ void update_run(bf16* lowered, float* w, float* g, float* h, float* v, const Segment& segment, const Rule& rule, const Options& options) {
  Floats<N> weights = load<N>(w), gradients = load<N>(g), first = load<N>(h), second = first;
  if (Rule::STATES == 2) second = load<N>(v);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    float weight = weights[k], gradient = __fmul_rn(gradients[k], options.grad_scale);
    if (segment.decay != 0) {
      float sign = weight > 0 ? 1.f : weight < 0 ? -1.f : weight == 0 ? 0.f : weight;  // NaN has NaN for a sign
      gradient = __fadd_rn(gradient, __fmul_rn(options.l1 ? sign : weight, segment.decay));
    }
    gradients[k] = rule.step(gradient, options.rate, first[k], second[k]);
    weights[k] = __fsub_rn(weight, gradients[k]);
  }
  store<N>(w, weights);
  if (lowered) store<N>(lowered, weights);
  store<N>(h, first);
  if (Rule::STATES == 2) store<N>(v, second);
  if (options.write_step) store<N>(g, gradients);
}

template <class Rule>
__device__ __forceinline__ void update(float* w, float* g, float* h, float* v, const void* table, int segments, Rule rule, Dials dials, int l1, int write_step, bf16* lowered) {
  if (*dials.skip != 0) return;
  Segment segment = segment_of(static_cast<const Segment*>(table), segments);
  Options options{(float)(*dials.rate * segment.lr_mult), (float)*dials.grad_scale, l1, write_step};
  bool pack = packed<4>(w) && packed<4>(g) && packed<4>(h) && packed<4>(v) && packed<4>(lowered);
  long long from = (segment.start / CHUNK + blockIdx.x - segment.block) * CHUNK;
  long long to = min(from + CHUNK, segment.stop);
#pragma unroll 2
  for (long long i = from + 4 * threadIdx.x; i < to; i += 4 * blockDim.x) {
    if (pack && i >= segment.start && i + 4 <= to) {
      update_run<4>(lowered ? lowered + i : lowered, w + i, g + i, h + i, Rule::STATES == 2 ? v + i : v, segment, rule, options);
    } else {
      for (long long k = max(i, segment.start); k < min(i + 4, to); ++k)
        update_run<1>(lowered ? lowered + k : lowered, w + k, g + k, h + k, Rule::STATES == 2 ? v + k : v, segment, rule, options);
    }
  }
}

#define COMMON const unsigned char *table, int segments, const double *rate, const double *grad_scale, const double *skip, int l1, int write_step, bf16 *lowered
#define OPTIONS Dials{rate, grad_scale, skip}, l1, write_step, lowered

__global__ void __launch_bounds__(256, 4) sgd_update(float* w, float* g, float* h, COMMON, float momentum) {
  update(w, g, h, nullptr, table, segments, Sgd{momentum}, OPTIONS);
}
__global__ void __launch_bounds__(256, 4) nesterov_update(float* w, float* g, float* h, COMMON, float momentum, float one_more) {
  update(w, g, h, nullptr, table, segments, Nesterov{momentum, one_more}, OPTIONS);
}
__global__ void __launch_bounds__(256, 4) adagrad_update(float* w, float* g, float* h, COMMON, float delta) {
  update(w, g, h, nullptr, table, segments, AdaGrad{delta}, OPTIONS);
}
__global__ void __launch_bounds__(256, 4) rmsprop_update(float* w, float* g, float* h, COMMON, float keep, float rest, float delta) {
  update(w, g, h, nullptr, table, segments, RmsProp{keep, rest, delta}, OPTIONS);
}
__global__ void __launch_bounds__(256, 4) adadelta_update(float* w, float* g, float* h, float* v, COMMON, float keep, float rest, float delta) {
  update(w, g, h, v, table, segments, AdaDelta{keep, rest, delta}, OPTIONS);
}
__global__ void __launch_bounds__(256, 4)
    adam_update(float* w, float* g, float* h, float* v, COMMON, float keep1, float rest1, float keep2, float rest2, float delta) {
  update(w, g, h, v, table, segments, Adam{keep1, rest1, keep2, rest2, delta}, OPTIONS);
}
