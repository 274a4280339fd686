// What every kernel file shares. There are no #includes of CUDA headers, so that NVRTC needs nothing
// beside the text, and a C++ compiler with `on_host/cuda.h` in front takes the very same source.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef __CUDACC__
// Nearest even, as every f16 of a block is rounded.
__device__ __forceinline__ u16 half_of(float value) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
// Exact.
__device__ __forceinline__ float float_of(u16 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
#endif
