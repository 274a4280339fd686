// The checksum of a block, CRC-64/NVMe, by many threads.
//
// A sum without its first state and last inversion is linear over GF(2): payload words w[0..n) of eight
// bytes are worth the sum of w[i] * x^(64 (n - i)) modulo the polynomial. Bit 63 stands for x^0, as in
// every reflected CRC. Words are dealt to the threads of a row like cards, so that loads are coalesced; a
// thread multiplies what it has by x^(64 THREADS) and adds its next word. That product is eight look-ups.
// The first state is added to the first word; words before the first, which fill the first row, are zero.
#include "common.cuh"

static constexpr u32 THREADS = 256;
static constexpr u64 POLYNOMIAL = 0x9A6C9329AC4BC9B5ull;

struct Sum {
  u64 blocks;        // u64[block]: address of the payload, a multiple of 8
  u64 states;        // u64[block]: state after the seed
  u64 sums;          // u64[block]: zeros before, the sum without its inversion after
  u64 advance;       // u64[8][256]: byte b at place k, times x^(64 THREADS)
  u64 columns;       // u64[THREADS]: x^(64 (THREADS - 1 - thread))
  u64 powers;        // u64[64]: x^(2^k)
  u32 words;         // words of a payload
  u32 rows;          // rows of THREADS words, the first one filled up in front
  u32 rows_a_group;  // rows that one group of threads adds up
};

static __device__ u64 multiply(u64 a, u64 b) {
  u64 product = 0;
  for (int bit = 63; bit >= 0; bit--) {
    if (a >> bit & 1) product ^= b;
    b = (b >> 1) ^ (b & 1 ? POLYNOMIAL : 0);
  }
  return product;
}

static __device__ u64 power(const u64 *powers, u64 exponent) {
  u64 product = 1ull << 63;
  for (u32 bit = 0; exponent != 0; bit++, exponent >>= 1)
    if (exponent & 1) product = multiply(product, powers[bit]);
  return product;
}

extern "C" __global__ void __launch_bounds__(THREADS) terrace_checksum(Sum sum) {
  __shared__ u64 table[8 * 256];
  __shared__ u64 parts[THREADS];
  const u32 thread = threadIdx.x;
  for (u32 at = thread; at < 8 * 256; at += THREADS) table[at] = ((const u64 *)sum.advance)[at];
  __syncthreads();

  const u64 *payload = (const u64 *)((const u64 *)sum.blocks)[blockIdx.y];
  const u32 padding = sum.rows * THREADS - sum.words;
  const u32 first_row = blockIdx.x * sum.rows_a_group;
  const u32 end_row = first_row + sum.rows_a_group < sum.rows ? first_row + sum.rows_a_group : sum.rows;
  u64 held = 0;
  for (u32 row = first_row; row < end_row; row++) {
    u32 place = row * THREADS + thread;
    u64 word = place < padding ? 0 : payload[place - padding];
    if (place == padding) word ^= ((const u64 *)sum.states)[blockIdx.y];
    u64 moved = 0;
#pragma unroll
    for (u32 byte = 0; byte < 8; byte++) moved ^= table[byte * 256 + (u32)(held >> (8 * byte) & 255)];
    held = moved ^ word;
  }

  parts[thread] = multiply(held, ((const u64 *)sum.columns)[thread]);
  __syncthreads();
  for (u32 width = THREADS / 2; width > 0; width /= 2) {
    if (thread < width) parts[thread] ^= parts[thread + width];
    __syncthreads();
  }
  if (thread == 0) {
    u64 behind = 64 + (u64)(sum.rows - end_row) * THREADS * 64;
    atomicXor((u64 *)sum.sums + blockIdx.y, multiply(parts[0], power((const u64 *)sum.powers, behind)));
  }
}
