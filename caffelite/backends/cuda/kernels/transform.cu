// transform.cu - images as records hold them (uint8 planes) cropped, mirrored, centred and scaled into a channels-last batch of T; or rotated and zoomed.
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

// --- rotated, zoomed and lit: the four pixels around a place, which six numbers for each image say --------------------------------
// warps: oy, ah, aw, ox, bh, bw and what is added to each channel, for each of the N images. A place is found once for the channels of a pixel.
// Bytes an element: 4 read (from the caches; and 16 of a mean image), sizeof(T) written. Not measured.
struct Around {
  int first, right, below;  // the upper left pixel in a plane, and how far its neighbours are
  float x, y;               // how near those are, from 0 to 1
};

__device__ __forceinline__ float place_along(const float* warp, int row, int column, int size) {
  float at = __fadd_rn(__fadd_rn(warp[0], __fmul_rn(warp[1], (float)row)), __fmul_rn(warp[2], (float)column));
  return fminf(fmaxf(at, 0.f), (float)(size - 1));
}

__device__ __forceinline__ Around around(const float* warp, const Images& s, const Walk& w) {
  float r = place_along(warp, w.row, w.column, s.height), q = place_along(warp + 3, w.row, w.column, s.width);
  int i = (int)r, j = (int)q;
  return Around{i * s.width + j, j + 1 < s.width, i + 1 < s.height ? s.width : 0, __fsub_rn(q, (float)j), __fsub_rn(r, (float)i)};
}

__device__ __forceinline__ float between(float a, float b, float f) { return __fadd_rn(a, __fmul_rn(f, __fsub_rn(b, a))); }

struct Centred {  // a plane less its mean
  const unsigned char* plane;
  const float* mean;  // or null
  int mean_image;
  __device__ __forceinline__ float operator[](int i) const {
    float value = to_float(plane[i]);
    return mean ? __fsub_rn(value, mean[mean_image ? i : 0]) : value;
  }
};

__device__ __forceinline__ float warped_at(const unsigned char* planes, const float* mean, const Images& s, int record, int channel, const Around& a) {
  long long size = (long long)s.height * s.width;
  Centred image{planes + ((long long)record * s.channels + channel) * size, mean ? mean + (s.mean_image ? channel * size : channel) : nullptr, s.mean_image};
  int lower = a.first + a.below;
  float above = between(image[a.first], image[a.first + a.right], a.x);
  return between(above, between(image[lower], image[lower + a.right], a.x), a.y);
}

template <class T>
__global__ void __launch_bounds__(256, 4)
    transform_warped(const unsigned char* planes, const int* places, const float* warps, const float* mean, T* y, Images shape, float scale, long long n) {
  sweep<T>(n, packed<16 / sizeof(T)>(y), [&](auto width, long long i) {
    constexpr int N = decltype(width)::value;
    Walk walk = walk_from(i, shape);
    const float* warp = warps + walk.image * (6 + shape.channels);
    int record = places[4 * walk.image];
    Around pixels = around(warp, shape, walk);
    Floats<N> values;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      float value = warped_at(planes, mean, shape, record, walk.channel, pixels);
      values[k] = __fmul_rn(__fadd_rn(value, warp[6 + walk.channel]), scale);
      if (k + 1 < N && step(walk, shape)) {
        warp += 6 + shape.channels;
        record = places[4 * walk.image];
      }
      if (k + 1 < N && walk.channel == 0) pixels = around(warp, shape, walk);
    }
    store<N>(y + i, values);
  });
}
