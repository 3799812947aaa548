// partials.cuh - sums over many blocks in a fixed order: each block leaves one double of each kind, one further block adds them up.
#pragma once
#include "common.cuh"

// partial: runs of gridDim.x doubles, one run of each kind. All threads of the block call it.
__device__ __forceinline__ void store_partial(double* partial, int kind, double sum) {
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[kind * gridDim.x + blockIdx.x] = sum;
}

// The sum of one kind, of `count` blocks; every thread of the block gets it.
__device__ __forceinline__ double ordered_sum(const double* partial, int kind, int count) {
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += blockDim.x) sum += partial[kind * count + i];
  return block_sum(sum);
}
