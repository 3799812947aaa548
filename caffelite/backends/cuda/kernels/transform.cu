// transform.cu - images as records hold them (uint8 planes) cropped, mirrored, centred and scaled into a channels-last batch of T.
//
// planes (R*C, height, width); places: record, top, left, mirrored for each of the N images; y (N, rows, columns, C). A thread makes the
// 16 bytes of y that lie side by side: it finds the coordinates of the first element by division and walks on from there, over the ends of
// rows and images too. Its reads are single bytes, but those of a warp lie side by side in one row of each plane and come from the caches.
// (value - mean) * scale are two operations rounded by themselves (__fsub_rn, __fmul_rn, which are never fused), as on the host.
// Bytes an element: 1 read (and 4 of a mean image, from the caches), sizeof(T) written.
// Ladder: this is the first rung; not measured.
#include "elementwise.cuh"

struct Images {
  int channels, height, width;  // as stored
  int rows, columns;            // as cropped
  int mean_image;               // whether the mean has a value for each pixel, or one for each channel
};

struct Place {
  int record, top, left, mirrored;
};

__device__ __forceinline__ Place place_of(const int* places, long long image) {
  const int* p = places + 4 * image;
  return Place{p[0], p[1], p[2], p[3]};
}

struct Walk {  // along the elements of y
  long long image;
  int row, column, channel;
};

__device__ __forceinline__ Walk walk_from(long long i, const Images& s) {
  int line = s.columns * s.channels;
  long long image = i / ((long long)s.rows * line);
  int rest = (int)(i - image * s.rows * line);
  int row = rest / line, column = (rest - row * line) / s.channels;
  return Walk{image, row, column, rest - row * line - column * s.channels};
}

__device__ __forceinline__ bool step(Walk& w, const Images& s) {  // true on coming to another image
  if (++w.channel < s.channels) return false;
  w.channel = 0;
  if (++w.column < s.columns) return false;
  w.column = 0;
  if (++w.row < s.rows) return false;
  w.row = 0;
  ++w.image;
  return true;
}

__device__ __forceinline__ float value_at(const unsigned char* planes, const float* mean, float scale, const Images& s, const Walk& w, const Place& p) {
  long long pixel = (long long)(p.top + w.row) * s.width + p.left + (p.mirrored ? s.columns - 1 - w.column : w.column);
  long long size = (long long)s.height * s.width;
  float value = to_float(planes[((long long)p.record * s.channels + w.channel) * size + pixel]);
  if (mean) value = __fsub_rn(value, mean[s.mean_image ? w.channel * size + pixel : w.channel]);
  return __fmul_rn(value, scale);
}

template <class T>
__global__ void __launch_bounds__(256, 4)
    transform(const unsigned char* planes, const int* places, const float* mean, T* y, Images shape, float scale, long long n) {
  sweep<T>(n, packed<16 / sizeof(T)>(y), [&](auto width, long long i) {
    constexpr int N = decltype(width)::value;
    Walk walk = walk_from(i, shape);
    Place place = place_of(places, walk.image);
    Floats<N> values;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      values[k] = value_at(planes, mean, scale, shape, walk, place);
      if (k + 1 < N && step(walk, shape)) place = place_of(places, walk.image);
    }
    store<N>(y + i, values);
  });
}
