// losses.cu - softmax along any axis, softmax with logistic loss, euclidean loss, accuracy.
//
// Softmax and what is built on it see memory as (outer, classes, inner); a row is the `classes` elements `inner` apart. A group of `width`
// neighbouring lanes takes a row: a power of two up to a warp where the axis is contiguous (inner = 1), one lane where it is not, so that
// neighbouring lanes read neighbouring rows. Contiguous rows go 16 bytes at a time where their length and address allow.
// Bytes: softmax reads x three times (the largest, the sum of exp, the result; the 2nd and 3rd time from cache, a row being a few KB) and
// writes y once; two expf and a division an element. Sums run in double: one add an element. Backward reads y and dy twice, writes dx.
// Losses are summed block by block into `partial` and then by one block, both in a fixed order; class counts are integer atomics.
// Ladder: this is the first rung; not measured.
#include "elementwise.cuh"
#include "partials.cuh"

// How many elements of a row a thread takes at a time: 16 bytes of the narrower type.
template <class A, class B>
constexpr int run_length() {
  return 16 / (sizeof(A) < sizeof(B) ? sizeof(A) : sizeof(B));
}

// --- rows and labels -------------------------------------------------------------------------------------------------------
struct Row {
  long long number, base;  // which row; where its first element lies
  int count;               // its elements; 0 for lanes beyond the last row, which still take part in shuffles
  int member, width;       // this lane's place in its group
};

__device__ __forceinline__ Row row_of(long long item, long long rows, int classes, long long inner, int width) {
  long long number = item / width;
  return {number, number / inner * classes * inner + number % inner, number < rows ? classes : 0, (int)(item % width), width};
}

// How many lanes all rows take: whole warps, so that a loop over them runs equally often in all lanes of a warp.
__device__ __forceinline__ long long lanes(long long rows, int width) { return (rows * width + 31) / 32 * 32; }

template <class V>
__device__ __forceinline__ V group_sum(V v, int width) {
  for (int offset = width >> 1; offset; offset >>= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}
__device__ __forceinline__ float group_max(float v, int width) {
  for (int offset = width >> 1; offset; offset >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, offset));
  return v;
}

constexpr int IGNORED = -1, BAD = -2;

// ignore: NaN where no label is ignored, which equals nothing.
__device__ __forceinline__ int class_of(float label, int classes, double ignore) {
  double whole = truncf(label);
  if (whole == ignore) return IGNORED;
  return whole >= 0 && whole < classes ? (int)whole : BAD;  // NaN is bad
}

// --- softmax ---------------------------------------------------------------------------------------------------------------
struct Softmax {
  float largest, total;
  __device__ __forceinline__ float of(float x) const { return expf(x - largest) / total; }
};

template <int N, class T, class P>
__device__ __forceinline__ Softmax softmax_row(const T* x, P* y, const Row& row, long long inner) {
  float largest = -INFINITY;
  for (int k = row.member * N; k < row.count; k += row.width * N) {
    Floats<N> v = load<N>(x + row.base + k * inner);
#pragma unroll
    for (int j = 0; j < N; ++j) largest = fmaxf(largest, v[j]);
  }
  largest = group_max(largest, row.width);
  double total = 0;
  for (int k = row.member * N; k < row.count; k += row.width * N) {
    Floats<N> v = load<N>(x + row.base + k * inner);
#pragma unroll
    for (int j = 0; j < N; ++j) total += expf(v[j] - largest);
  }
  Softmax softmax{largest, (float)group_sum(total, row.width)};
  for (int k = row.member * N; k < row.count; k += row.width * N) {
    Floats<N> v = load<N>(x + row.base + k * inner);
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = softmax.of(v[j]);
    store<N>(y + row.base + k * inner, v);
  }
  return softmax;
}

template <class T, class P>
__global__ void __launch_bounds__(256, 4) softmax_forward(const T* x, P* y, long long rows, int classes, long long inner, int width) {
  constexpr int N = run_length<T, P>();
  bool whole = inner == 1 && classes % N == 0 && is_aligned16(x) && is_aligned16(y);
  for (long long item = thread_index(); item < lanes(rows, width); item += thread_count()) {
    Row row = row_of(item, rows, classes, inner, width);
    if (whole) softmax_row<N>(x, y, row, inner);
    else softmax_row<1>(x, y, row, inner);
  }
}

template <int N, class T, class D>
__device__ __forceinline__ void softmax_backward_row(const T* y, const T* dy, D* dx, const Row& row, long long inner) {
  double dot = 0;
  for (int k = row.member * N; k < row.count; k += row.width * N) {
    Floats<N> p = load<N>(y + row.base + k * inner);
    Floats<N> d = load<N>(dy + row.base + k * inner);
#pragma unroll
    for (int j = 0; j < N; ++j) dot += d[j] * p[j];
  }
  float sum = (float)group_sum(dot, row.width);
  for (int k = row.member * N; k < row.count; k += row.width * N) {
    Floats<N> p = load<N>(y + row.base + k * inner);
    Floats<N> d = load<N>(dy + row.base + k * inner);
#pragma unroll
    for (int j = 0; j < N; ++j) d[j] = p[j] * (d[j] - sum);
    store<N>(dx + row.base + k * inner, d);
  }
}

template <class T, class D>
__global__ void __launch_bounds__(256, 4) softmax_backward(const T* y, const T* dy, D* dx, long long rows, int classes, long long inner, int width) {
  constexpr int N = run_length<T, D>();
  bool whole = inner == 1 && classes % N == 0 && is_aligned16(y) && is_aligned16(dy) && is_aligned16(dx);
  for (long long item = thread_index(); item < lanes(rows, width); item += thread_count()) {
    Row row = row_of(item, rows, classes, inner, width);
    if (whole) softmax_backward_row<N>(y, dy, dx, row, inner);
    else softmax_backward_row<1>(y, dy, dx, row, inner);
  }
}

// --- softmax loss ----------------------------------------------------------------------------------------------------------
// Kinds of partial sums: what is summed, the positions that count, the bad labels.
__device__ __forceinline__ void store_partials(double* partial, double sum, double counted, double bad) {
  store_partial(partial, 0, sum);
  store_partial(partial, 1, counted);
  store_partial(partial, 2, bad);
}

template <class T>
__global__ void __launch_bounds__(256, 4)
    softmax_loss_forward(const T* x, const float* label, float* prob, double* partial, long long rows, int classes, long long inner, int width, double ignore) {
  constexpr int N = run_length<T, float>();
  bool whole = inner == 1 && classes % N == 0 && is_aligned16(x) && is_aligned16(prob);
  double sum = 0, counted = 0, bad = 0;
  for (long long item = thread_index(); item < lanes(rows, width); item += thread_count()) {
    Row row = row_of(item, rows, classes, inner, width);
    Softmax softmax = whole ? softmax_row<N>(x, prob, row, inner) : softmax_row<1>(x, prob, row, inner);
    if (row.count && row.member == 0) {
      int number = class_of(label[row.number], classes, ignore);
      bad += number == BAD;
      if (number >= 0) {
        float p = softmax.of(to_float(x[row.base + number * inner]));
        sum -= log((double)(p < FLT_MIN ? FLT_MIN : p));  // NaN stays NaN
        counted += 1;
      }
    }
  }
  store_partials(partial, sum, counted, bad);
}

// divisor: 0 for the positions that count. One block.
__global__ void softmax_loss_result(const double* partial, int count, double divisor, float* loss, float* normalizer, int* any_bad) {
  double sum = ordered_sum(partial, 0, count), counted = ordered_sum(partial, 1, count), bad = ordered_sum(partial, 2, count);
  if (threadIdx.x == 0) {
    if (divisor == 0) divisor = counted > 1 ? counted : 1;
    *loss = bad > 0 ? NAN : (float)(sum / divisor);
    *normalizer = (float)divisor;
    *any_bad = bad > 0;
  }
}

template <int N, class T>
__device__ __forceinline__ void softmax_loss_backward_row(const float* prob, T* dx, const Row& row, long long inner, int number, float scale) {
  for (int k = row.member * N; k < row.count; k += row.width * N) {
    Floats<N> v = load<N>(prob + row.base + k * inner);
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = number == IGNORED ? 0.f : (k + j == number ? v[j] - 1.f : v[j]) * scale;
    store<N>(dx + row.base + k * inner, v);
  }
}

template <class T>
__global__ void __launch_bounds__(256, 4) softmax_loss_backward(const float* prob, const float* label, const float* dloss, const float* normalizer, T* dx,
                                                             long long rows, int classes, long long inner, int width, double ignore) {
  constexpr int N = run_length<float, T>();
  bool whole = inner == 1 && classes % N == 0 && is_aligned16(prob) && is_aligned16(dx);
  float scale = *dloss / *normalizer;
  for (long long item = thread_index(); item < lanes(rows, width); item += thread_count()) {
    Row row = row_of(item, rows, classes, inner, width);
    if (!row.count) continue;  // no shuffles here
    int number = class_of(label[row.number], classes, ignore);
    if (whole) softmax_loss_backward_row<N>(prob, dx, row, inner, number, scale);
    else softmax_loss_backward_row<1>(prob, dx, row, inner, number, scale);
  }
}

// --- accuracy --------------------------------------------------------------------------------------------------------------
__global__ void clear(int* counts, int n) {
  for (long long i = thread_index(); i < n; i += thread_count()) counts[i] = 0;
}

// per_class: null, or `classes` counts of right positions and then `classes` of all, cleared before.
template <class T>
__global__ void __launch_bounds__(256, 4) accuracy_count(const T* x, const float* label, double* partial, int* per_class, long long rows, int classes,
                                                      long long inner, int width, int top_k, double ignore) {
  double right = 0, counted = 0, bad = 0;
  for (long long item = thread_index(); item < lanes(rows, width); item += thread_count()) {
    Row row = row_of(item, rows, classes, inner, width);
    int number = row.count ? class_of(label[row.number], classes, ignore) : IGNORED;
    float score = number >= 0 ? to_float(x[row.base + number * inner]) : 0.f;
    int rivals = 0;
    for (int k = row.member; k < row.count; k += row.width) rivals += k != number && to_float(x[row.base + k * inner]) >= score;
    rivals = group_sum(rivals, row.width);
    if (row.member == 0) {
      bad += number == BAD;
      if (number >= 0) {
        int hit = rivals < top_k;
        right += hit;
        counted += 1;
        if (per_class) {
          atomicAdd(per_class + number, hit);
          atomicAdd(per_class + classes + number, 1);
        }
      }
    }
  }
  store_partials(partial, right, counted, bad);
}

__global__ void accuracy_result(const double* partial, int count, float* accuracy, int* any_bad) {
  double right = ordered_sum(partial, 0, count), counted = ordered_sum(partial, 1, count), bad = ordered_sum(partial, 2, count);
  if (threadIdx.x == 0) {
    *accuracy = bad > 0 ? NAN : (float)(right / (counted > 1 ? counted : 1));
    *any_bad = bad > 0;
  }
}

__global__ void accuracy_per_class(const int* counts, float* per_class, int classes) {
  for (long long i = thread_index(); i < classes; i += thread_count()) {
    int all = counts[classes + i];
    per_class[i] = (float)(counts[i] / (double)(all > 1 ? all : 1));
  }
}

// --- euclidean loss --------------------------------------------------------------------------------------------------------
template <class A, class B>
__global__ void __launch_bounds__(256, 4) euclidean_loss_forward(const A* a, const B* b, double* partial, long long n) {
  double sum = 0;
  sweep<A>(n, packed<16 / sizeof(A)>(a) && packed<16 / sizeof(A)>(b), [&](auto width, long long i) {
    constexpr int N = decltype(width)::value;
    Floats<N> u = load<N>(a + i), v = load<N>(b + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      double difference = u[j] - v[j];
      sum += difference * difference;
    }
  });
  store_partial(partial, 0, sum);
}

__global__ void euclidean_loss_result(const double* partial, int count, double divisor, float* loss) {
  double sum = ordered_sum(partial, 0, count);
  if (threadIdx.x == 0) *loss = (float)(sum / divisor);
}

// signed_count: sign * a.shape[0].
template <class A, class B, class D>
__global__ void __launch_bounds__(256, 4) euclidean_loss_backward(const A* a, const B* b, const float* dloss, D* dx, float signed_count, long long n) {
  float scale = *dloss / signed_count;
  map(dx, n, [=](float u, float v) { return (u - v) * scale; }, a, b);
}
