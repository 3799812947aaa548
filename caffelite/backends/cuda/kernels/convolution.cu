// convolution.cu - convolution over one, three or more spatial axes, forward and backward: plain, one thread for each result.
//
// Blobs with other than 4 axes lie in C order: x (N,C,*size), w (O,C/group,*kernel), y (N,O,*out). Each thread walks over all cells and
// channels that its result needs and adds in double, in one fixed order. Bytes: each operand is read once for every result that needs it,
// from cache at best. Two spatial axes, which nets for images have, go through gemm.cu instead. Ladder: not measured.
#include "common.cuh"

constexpr int MOST_AXES = 6;
struct Space {
  int axes, images, channels, outputs, group_channels, group_outputs, cells, inside, out_inside;  // cells, positions of x and y in a plane
  int size[MOST_AXES], out[MOST_AXES], kernel[MOST_AXES], stride[MOST_AXES], pad[MOST_AXES], dilation[MOST_AXES];
};

// The position in x that output position `out` meets with kernel cell `cell`; -1 in the padding.
__device__ __forceinline__ int source_of(const Space& s, int out, int cell) {
  int position = 0, step = 1;
  for (int axis = s.axes - 1; axis >= 0; --axis) {
    int at = out % s.out[axis] * s.stride[axis] - s.pad[axis] + cell % s.kernel[axis] * s.dilation[axis];
    if ((unsigned)at >= (unsigned)s.size[axis]) return -1;
    position += at * step;
    step *= s.size[axis], out /= s.out[axis], cell /= s.kernel[axis];
  }
  return position;
}

// The output position whose window has x's position `inside` under kernel cell `cell`; -1 where there is none.
__device__ __forceinline__ int target_of(const Space& s, int inside, int cell) {
  int position = 0, step = 1;
  for (int axis = s.axes - 1; axis >= 0; --axis) {
    int at = inside % s.size[axis] + s.pad[axis] - cell % s.kernel[axis] * s.dilation[axis];
    if (at < 0 || at % s.stride[axis] || at / s.stride[axis] >= s.out[axis]) return -1;
    position += at / s.stride[axis] * step;
    step *= s.out[axis], inside /= s.size[axis], cell /= s.kernel[axis];
  }
  return position;
}

template <class T, class W, class B>
__global__ void convolution_forward(const T* x, const W* w, const B* b, T* y, Space s, bool relu, long long n) {
  for (long long i = thread_index(); i < n; i += thread_count()) {
    int position = i % s.out_inside, output = i / s.out_inside % s.outputs, image = i / s.out_inside / s.outputs;
    int first = output / s.group_outputs * s.group_channels;
    double sum = b ? to_float(b[output]) : 0;
    for (int cell = 0; cell < s.cells; ++cell) {
      int source = source_of(s, position, cell);
      if (source < 0) continue;
      for (int c = 0; c < s.group_channels; ++c)
        sum += (double)to_float(x[((long long)image * s.channels + first + c) * s.inside + source]) *
               to_float(w[((long long)output * s.group_channels + c) * s.cells + cell]);
    }
    y[i] = from_float<T>((float)(relu && sum < 0 ? 0 : sum));
  }
}

template <class T, class W>
__global__ void convolution_backward_data(const T* dy, const W* w, T* dx, const T* positive, Space s, long long n) {
  for (long long i = thread_index(); i < n; i += thread_count()) {
    int position = i % s.inside, channel = i / s.inside % s.channels, image = i / s.inside / s.channels;
    int first = channel / s.group_channels * s.group_outputs, own = channel % s.group_channels;
    double sum = 0;
    for (int cell = 0; cell < s.cells; ++cell) {
      int target = target_of(s, position, cell);
      if (target < 0) continue;
      for (int o = first; o < first + s.group_outputs; ++o)
        sum += (double)to_float(dy[((long long)image * s.outputs + o) * s.out_inside + target]) *
               to_float(w[((long long)o * s.group_channels + own) * s.cells + cell]);
    }
    dx[i] = from_float<T>(positive ? rectified((float)sum, positive[i]) : (float)sum);
  }
}

template <class T>
__global__ void convolution_backward_weights(const T* x, const T* dy, float* dw, Space s, bool accumulate, long long n) {
  for (long long i = thread_index(); i < n; i += thread_count()) {
    int cell = i % s.cells, own = i / s.cells % s.group_channels, output = i / s.cells / s.group_channels;
    int channel = output / s.group_outputs * s.group_channels + own;
    double sum = 0;
    for (int image = 0; image < s.images; ++image)
      for (int position = 0; position < s.out_inside; ++position) {
        int source = source_of(s, position, cell);
        if (source < 0) continue;
        sum += (double)to_float(x[((long long)image * s.channels + channel) * s.inside + source]) *
               to_float(dy[((long long)image * s.outputs + output) * s.out_inside + position]);
      }
    dw[i] = (float)(accumulate ? dw[i] + sum : sum);
  }
}
