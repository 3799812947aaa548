// primitives.cuh - every device primitive that needs inline PTX, wrapped once. On machines without a GPU the emulator's primitives_emu.h
// gives the same names (CF_EMU is defined there).
//
// cf_to_tf32                        rounds to tf32's 10 bits of mantissa, ties away from zero (the tensor cores themselves would truncate)
// cf_mma_m16n8k8_tf32               d += a b with a 16x8 (4 registers), b 8x8 (2), d 16x8 float (4), in the PTX manual's fragment layout
// cf_mma_m16n8k16_bf16              the same with a 16x16 and b 16x8 in bfloat16, two to a register
// cf_cp_async16, 8, 4               copy 16, 8 or 4 bytes global -> shared without a register; beyond `valid_bytes` zeros are written
// cf_cp_commit, cf_cp_wait<N>       close a group of copies; wait until at most N groups of this thread are open
// cf_ldmatrix_x4, x2, *_trans       8x8 matrices of 16-bit values from shared memory; lane i gives the address of row i
// cf_bf16_bits                      float -> bfloat16, to nearest even
#pragma once
#ifdef CF_EMU
#include "primitives_emu.h"
#define CF_DYNAMIC_SHARED(type, name) type* name = (type*)emu::g.dyn
#else
typedef unsigned int cf_u32;
#define CF_DEV __device__ __forceinline__
#define CF_DYNAMIC_SHARED(type, name)                            \
  extern __shared__ __align__(16) unsigned char cf_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(cf_dynamic_shared)

CF_DEV unsigned short cf_bf16_bits(float x) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
CF_DEV cf_u32 cf_to_tf32(float x) {
  cf_u32 bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}
CF_DEV void cf_mma_m16n8k8_tf32(float (&d)[4], const cf_u32 (&a)[4], const cf_u32 (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
CF_DEV void cf_mma_m16n8k16_bf16(float (&d)[4], const cf_u32 (&a)[4], const cf_u32 (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
CF_DEV cf_u32 cf_shared_address(const void* p) { return (cf_u32)__cvta_generic_to_shared(p); }
CF_DEV void cf_cp_async16(void* shared, const void* global, int valid_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(cf_shared_address(shared)), "l"(global), "r"(valid_bytes) : "memory");
}
CF_DEV void cf_cp_async8(void* shared, const void* global, int valid_bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(cf_shared_address(shared)), "l"(global), "r"(valid_bytes) : "memory");
}
CF_DEV void cf_cp_async4(void* shared, const void* global, int valid_bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(cf_shared_address(shared)), "l"(global), "r"(valid_bytes) : "memory");
}
CF_DEV void cf_cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
CF_DEV void cf_cp_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#define CF_LDMATRIX4(name, modifier)                                                                          \
  CF_DEV void name(cf_u32(&r)[4], const void* row) {                                                          \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" modifier ".shared.b16 {%0,%1,%2,%3}, [%4];"                  \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(cf_shared_address(row)) : "memory");  \
  }
#define CF_LDMATRIX2(name, modifier)                                                                          \
  CF_DEV void name(cf_u32(&r)[2], const void* row) {                                                          \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" modifier ".shared.b16 {%0,%1}, [%2];"                        \
                 : "=r"(r[0]), "=r"(r[1]) : "r"(cf_shared_address(row)) : "memory");                          \
  }
CF_LDMATRIX4(cf_ldmatrix_x4, "")
CF_LDMATRIX4(cf_ldmatrix_x4_trans, ".trans")
CF_LDMATRIX2(cf_ldmatrix_x2, "")
CF_LDMATRIX2(cf_ldmatrix_x2_trans, ".trans")
#endif
