// Gather and scatter between an engine's pages and our blocks.
//
// A block is one buffer, [layer][k or v][slot][kv head][dimension]. An engine keeps pages of its own, a
// tensor a layer or two; where an element lies there is said by strides. Only bytes are moved, so the
// type of an element does not matter. A grid is (parts of a half, halves, blocks): a half is the keys or
// the values of one layer. Within a half the block is contiguous, so vector v of it goes with
//   run  = v / inner         `inner` vectors are contiguous on both sides
//   head = run % heads, slot = run / heads
// Where an engine's heads or slots follow each other without a gap, the host merges them into `inner`.
#include "common.cuh"

struct Move {
  u64 blocks;          // u64[block]: address of the payload
  u64 starts;          // u64[block][runs]: bytes from a base to the first slot of a run of slots
  u64 bases;           // u64[layer][2]: where the engine's keys and values of a layer begin
  u64 slot_stride;     // bytes from one slot of a page to the next
  u64 head_stride;     // bytes from one head of a slot to the next
  u64 half_bytes;      // bytes of a half of a block
  u64 inner_magic;     // ceil(2^40 / inner)
  u64 heads_magic;     // ceil(2^40 / heads)
  u64 run_magic;       // ceil(2^40 / run_slots)
  u32 vectors;         // vectors in a half
  u32 inner;           // vectors that are contiguous on both sides
  u32 heads;           // pieces of a step of slots
  u32 step_slots;      // slots that one piece of `inner` covers
  u32 run_slots;       // slots that lie in one page of the engine, and have one entry of `starts`
  u32 runs;            // entries of `starts` a block
  u32 first_half;      // twice the first layer of this launch
};

// n / d with the magic of d, exact while n * d < 2^40; the host sees to that.
static __device__ __forceinline__ u32 divide(u32 n, u64 magic) { return (u32)(((u64)n * magic) >> 40); }

static __device__ __forceinline__ u64 page_offset(const Move &move, const u64 *starts, u32 vector, u32 size) {
  u32 piece = divide(vector, move.inner_magic);
  u32 within = vector - piece * move.inner;
  u32 step = divide(piece, move.heads_magic);
  u32 head = piece - step * move.heads;
  u32 slot = step * move.step_slots;
  u32 run = divide(slot, move.run_magic);
  u32 in_run = slot - run * move.run_slots;
  return starts[run] + in_run * move.slot_stride + head * move.head_stride + (u64)within * size;
}

// Each thread has up to four vectors on their way at once, so that loads overlap.
static constexpr u32 UNROLL = 4;

template <typename Vector, bool TO_BLOCK> static __device__ __forceinline__ void move_half(const Move &move) {
  const u32 half = move.first_half + blockIdx.y;
  const u64 *starts = (const u64 *)move.starts + (u64)blockIdx.z * move.runs;
  u8 *pages = (u8 *)((const u64 *)move.bases)[half];
  Vector *block = (Vector *)(((const u64 *)move.blocks)[blockIdx.z] + half * move.half_bytes);
  const u32 first = blockIdx.x * blockDim.x * UNROLL + threadIdx.x;
  Vector held[UNROLL];
#pragma unroll
  for (u32 at = 0; at < UNROLL; at++) {
    u32 vector = first + at * blockDim.x;
    if (vector < move.vectors) {
      if (TO_BLOCK)
        held[at] = *(const Vector *)(pages + page_offset(move, starts, vector, sizeof(Vector)));
      else
        held[at] = block[vector];
    }
  }
#pragma unroll
  for (u32 at = 0; at < UNROLL; at++) {
    u32 vector = first + at * blockDim.x;
    if (vector < move.vectors) {
      if (TO_BLOCK)
        block[vector] = held[at];
      else
        *(Vector *)(pages + page_offset(move, starts, vector, sizeof(Vector))) = held[at];
    }
  }
}

struct alignas(16) Vector16 { u32 words[4]; };

extern "C" __global__ void terrace_gather_16(Move move) { move_half<Vector16, true>(move); }
extern "C" __global__ void terrace_gather_4(Move move) { move_half<u32, true>(move); }
extern "C" __global__ void terrace_gather_1(Move move) { move_half<u8, true>(move); }
extern "C" __global__ void terrace_scatter_16(Move move) { move_half<Vector16, false>(move); }
extern "C" __global__ void terrace_scatter_4(Move move) { move_half<u32, false>(move); }
extern "C" __global__ void terrace_scatter_1(Move move) { move_half<u8, false>(move); }
