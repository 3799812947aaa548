// The emulated twins of kernels/primitives.cuh: the same names, run by a whole warp at once.
#pragma once
#include "cuda_emu.h"
typedef unsigned int cf_u32;
typedef unsigned long long cf_u64;
namespace emu {
static inline float bf(uint32_t r, int hi) { return emu_bits<float, unsigned>(hi ? (r & 0xffff0000u) : (r << 16)); }
static inline float tf(uint32_t r) { return emu_bits<float, unsigned>(r & 0xffffe000u); }  // hardware ignores the low 13 bits
struct Mma {
  float* d;
  const cf_u32 *a, *b;
};
static inline void mma_tf32_fn(unsigned, void** r) {  // PTX ISA fragment layout of m16n8k8
  float A[16][8], B[8][8], D[16][8];
  for (int l = 0; l < 32; ++l) {
    auto* x = (Mma*)r[l];
    int g = l >> 2, q = l & 3;
    A[g][q] = tf(x->a[0]);
    A[g + 8][q] = tf(x->a[1]);
    A[g][q + 4] = tf(x->a[2]);
    A[g + 8][q + 4] = tf(x->a[3]);
    B[q][g] = tf(x->b[0]);
    B[q + 4][g] = tf(x->b[1]);
    for (int e = 0; e < 4; ++e) D[g + (e >> 1) * 8][q * 2 + (e & 1)] = x->d[e];
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 8; ++k)
      for (int j = 0; j < 8; ++j) D[i][j] += A[i][k] * B[k][j];
  for (int l = 0; l < 32; ++l) {
    auto* x = (Mma*)r[l];
    int g = l >> 2, q = l & 3;
    for (int e = 0; e < 4; ++e) x->d[e] = D[g + (e >> 1) * 8][q * 2 + (e & 1)];
  }
}
static inline void mma_bf16_fn(unsigned, void** r) {  // m16n8k16
  float A[16][16], B[16][8], D[16][8];
  for (int l = 0; l < 32; ++l) {
    auto* x = (Mma*)r[l];
    int g = l >> 2, q = l & 3;
    for (int h = 0; h < 2; ++h) {
      A[g][q * 2 + h] = bf(x->a[0], h);
      A[g + 8][q * 2 + h] = bf(x->a[1], h);
      A[g][q * 2 + 8 + h] = bf(x->a[2], h);
      A[g + 8][q * 2 + 8 + h] = bf(x->a[3], h);
      B[q * 2 + h][g] = bf(x->b[0], h);
      B[q * 2 + 8 + h][g] = bf(x->b[1], h);
    }
    for (int e = 0; e < 4; ++e) D[g + (e >> 1) * 8][q * 2 + (e & 1)] = x->d[e];
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) D[i][j] += A[i][k] * B[k][j];
  for (int l = 0; l < 32; ++l) {
    auto* x = (Mma*)r[l];
    int g = l >> 2, q = l & 3;
    for (int e = 0; e < 4; ++e) x->d[e] = D[g + (e >> 1) * 8][q * 2 + (e & 1)];
  }
}
struct Ldm {
  const char* row;
  cf_u32* r;
  int n, trans;
};
static inline void ldmatrix_fn(unsigned, void** r) {
  auto* x0 = (Ldm*)r[0];
  int n = x0->n, tr = x0->trans;
  uint16_t M[4][8][8];
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < 8; ++j) memcpy(M[i][j], ((Ldm*)r[i * 8 + j])->row, 16);
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < n; ++i) {
      int a = l >> 2, c = (l & 3) * 2;
      ((Ldm*)r[l])->r[i] = tr ? M[i][c][a] | (cf_u32)M[i][c + 1][a] << 16 : M[i][a][c] | (cf_u32)M[i][a][c + 1] << 16;
    }
}
static inline void ldm(cf_u32* r, const void* row, int n, int tr) {
  if ((int)cur->lane < 8 * n) {
    assert(((uintptr_t)row & 15) == 0);
    access(row, 16, RD);
  }
  Ldm x{(const char*)row, r, n, tr};
  warp_collective(0xffffffffu, &x, ldmatrix_fn, "ldmatrix", false);
}
}  // namespace emu
static inline cf_u32 cf_to_tf32(float x) {
  cf_u32 u = __float_as_uint(x);
  return (u & 0x7f800000u) == 0x7f800000u ? u : (u + 0x1000u) & 0xffffe000u;
}  // rna
static inline void cf_mma_m16n8k8_tf32(float (&d)[4], const cf_u32 (&a)[4], const cf_u32 (&b)[2]) {
  emu::Mma x{d, a, b};
  emu::warp_collective(0xffffffffu, &x, emu::mma_tf32_fn, "mma.tf32", false);
}
static inline void cf_mma_m16n8k16_bf16(float (&d)[4], const cf_u32 (&a)[4], const cf_u32 (&b)[2]) {
  emu::Mma x{d, a, b};
  emu::warp_collective(0xffffffffu, &x, emu::mma_bf16_fn, "mma.bf16", false);
}
static inline void cf_cp_async16(void* s, const void* p, int n) { emu::cp_async(s, p, 16, n); }
static inline void cf_cp_async8(void* s, const void* p, int n) { emu::cp_async(s, p, 8, n); }
static inline void cf_cp_async4(void* s, const void* p, int n) { emu::cp_async(s, p, 4, n); }
static inline void cf_cp_commit() { emu::cp_commit(); }
template <int N>
static inline void cf_cp_wait() {
  emu::cp_wait(N);
}
static inline void cf_ldmatrix_x4(cf_u32 (&r)[4], const void* row) { emu::ldm(r, row, 4, 0); }
static inline void cf_ldmatrix_x2(cf_u32 (&r)[2], const void* row) { emu::ldm(r, row, 2, 0); }
static inline void cf_ldmatrix_x4_trans(cf_u32 (&r)[4], const void* row) { emu::ldm(r, row, 4, 1); }
static inline void cf_ldmatrix_x2_trans(cf_u32 (&r)[2], const void* row) { emu::ldm(r, row, 2, 1); }
static inline void cf_fence_proxy_async() { emu::proxy_fence(); }
static inline void cf_wgmma_fence() { emu::wgmma_fence(); }
static inline void cf_wgmma_commit() { emu::wgmma_commit(); }
template <int N>
static inline void cf_wgmma_wait() {
  emu::wgmma_wait(N);
}
static inline void cf_hold(float&) {}
static inline cf_u64 cf_wgmma_descriptor(const void* start, cf_u32 leading, cf_u32 stride) {
  return (emu::shared_address(start) & 0x3ffff) >> 4 | (cf_u64)(leading >> 4) << 16 | (cf_u64)(stride >> 4) << 32 | 1ull << 62;
}
template <int ACROSS_A, int ACROSS_B, int J>
static inline void cf_wgmma_m64k16_bf16(float (&d)[J][4], cf_u64 a, cf_u64 b) {
  emu::wgmma({&d[0][0], a, b, 8 * J, ACROSS_A != 0, ACROSS_B != 0, nullptr});
}
typedef emu::TensorMap cf_tensor_map;
static inline void cf_mbarrier_init(cf_u64* p, int count) { emu::mbarrier_init(p, count); }
static inline void cf_mbarrier_expect(cf_u64* p, cf_u32 bytes) { emu::mbarrier_expect(p, bytes); }
static inline void cf_mbarrier_wait(cf_u64* p, int parity) { emu::mbarrier_wait(p, parity); }
static inline void cf_load_box(void* to, const cf_tensor_map& map, int column, int row, cf_u64* p) { emu::load_box(to, map, column, row, p); }
static inline void cf_bar_sync(int id, int nthreads) { emu::block_barrier(id, nthreads, 0, 0); }
static inline unsigned short cf_bf16_bits(float x) {
  unsigned u = __float_as_uint(x);
  return x != x ? 0x7fff : (unsigned short)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
