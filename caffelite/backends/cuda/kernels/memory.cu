// memory.cu - fill and copy, between float, bf16 and integers, for arrays that lie without gaps in one order and for any strides.
//
// fill_dense, copy_dense: n elements in memory order; 16 bytes a thread where both sides lie on 16-byte boundaries. Bytes: each element
// read once and written once, no arithmetic. fill_any, copy_any: element i is the i-th in logical C order; each thread finds its
// coordinates by division, axis by axis, so these are for layouts met seldom (a flattened feature map, a sliced blob).
// Ladder: this is the first rung; not measured.
#include "common.cuh"

struct Layout {  // the axes of more than one element, outermost first; strides in elements
  int axes;
  long long size[8], stride[8];
};

__device__ __forceinline__ long long offset_of(const Layout& layout, long long i) {
  long long offset = 0;
  for (int axis = layout.axes - 1; axis >= 0; --axis) {
    long long rest = i / layout.size[axis];
    offset += (i - rest * layout.size[axis]) * layout.stride[axis];
    i = rest;
  }
  return offset;
}

template <class S, class T>
struct Convert {
  static __device__ __forceinline__ T apply(S x) { return from_float<T>(to_float(x)); }
};
template <class T>
struct Convert<T, T> {  // bits are kept: integers beyond float's 24 bits, and NaN payloads
  static __device__ __forceinline__ T apply(T x) { return x; }
};

template <>
struct Convert<float, double> {
  static __device__ __forceinline__ double apply(float x) { return x; }
};
template <>
struct Convert<double, float> {
  static __device__ __forceinline__ float apply(double x) { return (float)x; }
};

template <class T>
__global__ void fill_dense(T* x, float value, long long n) {
  T item = from_float<T>(value);
  for (long long i = thread_index(); i < n; i += thread_count()) x[i] = item;
}

template <class T>
__global__ void fill_any(T* x, Layout layout, float value, long long n) {
  T item = from_float<T>(value);
  for (long long i = thread_index(); i < n; i += thread_count()) x[offset_of(layout, i)] = item;
}

struct Cells {
  double value[8];
};

__global__ void assign_cells(double* x, Cells cells, int n) {
#pragma unroll
  for (int i = 0; i < 8; ++i)  // by numbers known to the compiler: an array of parameters that is indexed at run time would be copied first
    if (i < n) x[i] = cells.value[i];
}

template <class S, class T>
__global__ void copy_dense(const S* x, T* y, long long n) {
  constexpr int width = Vec<T>::size < Vec<S>::size ? Vec<S>::size : Vec<T>::size;  // elements in 16 bytes of the narrower type
  constexpr int loads = width / Vec<S>::size, stores = width / Vec<T>::size;
  long long whole = is_aligned16(x) && is_aligned16(y) ? n / width : 0;
  for (long long i = thread_index(); i < whole; i += thread_count()) {
    S in[width];
    T out[width];
#pragma unroll
    for (int k = 0; k < loads; ++k) {
      Vec<S> v = load_vec(x + i * width + k * Vec<S>::size);
#pragma unroll
      for (int j = 0; j < Vec<S>::size; ++j) in[k * Vec<S>::size + j] = v[j];
    }
#pragma unroll
    for (int j = 0; j < width; ++j) out[j] = Convert<S, T>::apply(in[j]);
#pragma unroll
    for (int k = 0; k < stores; ++k) {
      Vec<T> v;
#pragma unroll
      for (int j = 0; j < Vec<T>::size; ++j) v[j] = out[k * Vec<T>::size + j];
      store_vec(y + i * width + k * Vec<T>::size, v);
    }
  }
  for (long long i = whole * width + thread_index(); i < n; i += thread_count()) y[i] = Convert<S, T>::apply(x[i]);
}

template <class S, class T>
__global__ void copy_any(const S* x, Layout from, T* y, Layout to, long long n) {
  for (long long i = thread_index(); i < n; i += thread_count()) y[offset_of(to, i)] = Convert<S, T>::apply(x[offset_of(from, i)]);
}
