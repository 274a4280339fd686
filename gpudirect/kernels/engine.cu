// The arithmetic of the reference engine: what the kernels of the worker do on a processor, to the bit.
//
// Every output is one chain of correctly rounded operations in one order, which depends neither on the
// batch nor on the cut into threads: sums of products run over the columns in ascending order, sums along
// a row keep sixteen partial sums and add those in one tree. So it must be compiled without contraction of
// products and sums (--fmad=false) and with exact division and roots, and no tensor core is used: nobody
// says in which order one of those adds. Weights are f16 in panels of 32 rows, [panel][column][32].
#include "common.cuh"

static constexpr u32 LANES = 16;
static constexpr u32 BLOCK_TOKENS = 16;
static constexpr u32 PANEL_ROWS = 32;
static constexpr u32 HEAD_DIM_MAX = 256;
static constexpr u32 ROW_THREADS = 128;

struct Embed {
  u64 weights;  // u16 panels of the vocabulary
  u64 tokens;   // u32[token]
  u64 target;   // float[token][columns]
  u32 columns;
};

// One group of threads a token.
extern "C" __global__ void terrace_embed(Embed embed) {
  u32 token = ((const u32 *)embed.tokens)[blockIdx.x];
  const u16 *panel = (const u16 *)embed.weights + (u64)(token / PANEL_ROWS) * embed.columns * PANEL_ROWS;
  float *target = (float *)embed.target + (u64)blockIdx.x * embed.columns;
  for (u32 column = threadIdx.x; column < embed.columns; column += blockDim.x)
    target[column] = float_of(panel[column * PANEL_ROWS + token % PANEL_ROWS]);
}

// Adds sixteen partial sums, the halves onto each other. All threads of a block call it.
static __device__ float sum_of_lanes(float *lanes) {
  for (u32 width = LANES / 2; width > 0; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) lanes[threadIdx.x] += lanes[threadIdx.x + width];
  }
  __syncthreads();
  return lanes[0];
}

struct RmsNorm {
  u64 source;  // float[row][columns]
  u64 weight;  // float[columns]
  u64 target;  // float[row][columns]
  u32 columns;
  float epsilon;
};

// One group of threads a row.
extern "C" __global__ void __launch_bounds__(ROW_THREADS) terrace_rms_norm(RmsNorm norm) {
  __shared__ float lanes[LANES];
  const float *source = (const float *)norm.source + (u64)blockIdx.x * norm.columns;
  const float *weight = (const float *)norm.weight;
  float *target = (float *)norm.target + (u64)blockIdx.x * norm.columns;
  if (threadIdx.x < LANES) {
    float squares = 0.0f;
    for (u32 at = threadIdx.x; at < norm.columns; at += LANES) squares = __fmaf_rn(source[at], source[at], squares);
    lanes[threadIdx.x] = squares;
  }
  float mean = __fdiv_rn(sum_of_lanes(lanes), (float)norm.columns);
  float scale = __fdiv_rn(1.0f, __fsqrt_rn(mean + norm.epsilon));
  for (u32 at = threadIdx.x; at < norm.columns; at += blockDim.x) target[at] = source[at] * scale * weight[at];
}

struct Product {
  u64 weights;  // u16[panel][column][32]
  u64 input;    // float[token][columns]
  u64 output;   // float[token][rows]
  u32 columns;  // a multiple of 16
  u32 rows;
  u32 tokens;
};

// A group of 16 by 16 threads computes a tile of 64 tokens by 64 rows, a thread 4 by 4 of it. Tiles are
// padded, never cut otherwise, and the columns of an output are never split.
static constexpr u32 TILE = 64;
static constexpr u32 DEPTH = 16;
static constexpr u32 SIDE = 4;
static constexpr u32 PRODUCT_THREADS = 256;

extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS) terrace_product(Product product) {
  __shared__ float weights[DEPTH][TILE];
  __shared__ float inputs[DEPTH][TILE + SIDE];
  const u32 thread = threadIdx.x;
  const u32 first_row = blockIdx.x * TILE, first_token = blockIdx.y * TILE;
  const u32 row = thread % DEPTH * SIDE, token = thread / DEPTH * SIDE;
  const u32 panels = (product.rows + PANEL_ROWS - 1) / PANEL_ROWS;
  const u16 *lines = (const u16 *)product.weights;
  const float *input = (const float *)product.input;
  float sums[SIDE][SIDE] = {};
  for (u32 column = 0; column < product.columns; column += DEPTH) {
#pragma unroll
    for (u32 part = 0; part < TILE * DEPTH / PRODUCT_THREADS; part++) {
      u32 at = part * PRODUCT_THREADS + thread;
      u32 lane = at % TILE, depth = at / TILE;
      u32 panel = (first_row + lane) / PANEL_ROWS;
      u64 line = (u64)panel * product.columns + column + depth;
      weights[depth][lane] = panel < panels ? float_of(lines[line * PANEL_ROWS + lane % PANEL_ROWS]) : 0.0f;
      u32 place = at / DEPTH, step = at % DEPTH;
      u64 from = (u64)(first_token + place) * product.columns + column + step;
      inputs[step][place] = first_token + place < product.tokens ? input[from] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (u32 depth = 0; depth < DEPTH; depth++)
#pragma unroll
      for (u32 t = 0; t < SIDE; t++)
#pragma unroll
        for (u32 r = 0; r < SIDE; r++)
          sums[t][r] = __fmaf_rn(weights[depth][row + r], inputs[depth][token + t], sums[t][r]);
    __syncthreads();
  }
#pragma unroll
  for (u32 t = 0; t < SIDE; t++)
#pragma unroll
    for (u32 r = 0; r < SIDE; r++) {
      u32 to_token = first_token + token + t, to_row = first_row + row + r;
      if (to_token < product.tokens && to_row < product.rows)
        ((float *)product.output)[(u64)to_token * product.rows + to_row] = sums[t][r];
    }
}

struct Add {
  u64 target;  // float[count]
  u64 addend;  // float[count]
  u64 count;
};

extern "C" __global__ void terrace_add(Add add) {
  u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (at < add.count) ((float *)add.target)[at] += ((const float *)add.addend)[at];
}

struct Place {
  u64 product;  // float[token][heads + 2 kv_heads][head_dim]: queries, keys, values
  u64 turns;    // float[token][head_dim / 2][2]: cosine and sine of every pair
  u64 queries;  // float[token][heads][head_dim]
  u64 slots;    // u64[token]: the token's slot in its block, or 0 if the block is sealed
  u64 keys_at;    // bytes from there to the layer's keys
  u64 values_at;  // and to its values
  u32 heads;
  u32 kv_heads;
  u32 head_dim;
};

// Turns queries and keys by their position, rounds keys and values, and writes them where they stay. One
// group of threads a token. What a sealed block holds already is not written again.
extern "C" __global__ void terrace_place(Place place) {
  const u32 pairs = place.head_dim / 2;
  const u32 all = (place.heads + 2 * place.kv_heads) * pairs;
  const float *product = (const float *)place.product + (u64)blockIdx.x * all * 2;
  const float *turns = (const float *)place.turns + (u64)blockIdx.x * place.head_dim;
  float *queries = (float *)place.queries + (u64)blockIdx.x * place.heads * place.head_dim;
  const u64 slot = ((const u64 *)place.slots)[blockIdx.x];
  u16 *keys = (u16 *)(slot + place.keys_at), *values = (u16 *)(slot + place.values_at);
  for (u32 at = threadIdx.x; at < all; at += blockDim.x) {
    u32 head = at / pairs, pair = at % pairs;
    float x = product[at * 2], y = product[at * 2 + 1];
    float cosine = turns[pair * 2], sine = turns[pair * 2 + 1];
    float turned_x = x * cosine - y * sine, turned_y = x * sine + y * cosine;
    if (head < place.heads) {
      queries[at * 2] = turned_x;
      queries[at * 2 + 1] = turned_y;
    } else if (slot == 0) {
      continue;
    } else if (head < place.heads + place.kv_heads) {
      u32 to = (at - place.heads * pairs) * 2;
      keys[to] = half_of(turned_x);
      keys[to + 1] = half_of(turned_y);
    } else {
      u32 to = (at - (place.heads + place.kv_heads) * pairs) * 2;
      values[to] = half_of(x);
      values[to + 1] = half_of(y);
    }
  }
}

static __device__ float exponential(float x) {
  const float round = 12582912.0f;
  x = x > -87.0f ? x : -87.0f;
  x = x < 88.0f ? x : 88.0f;
  float n = __fmaf_rn(x, 1.44269504088896341f, round) - round;
  float r = __fmaf_rn(n, -0.6933594f, x);
  r = __fmaf_rn(n, 2.1219444e-4f, r);
  float p = 1.9875692e-4f;
  p = __fmaf_rn(p, r, 1.3982e-3f);
  p = __fmaf_rn(p, r, 8.333452e-3f);
  p = __fmaf_rn(p, r, 4.1665796e-2f);
  p = __fmaf_rn(p, r, 1.6666665e-1f);
  p = __fmaf_rn(p, r, 0.5f);
  p = __fmaf_rn(p, r * r, r) + 1.0f;
  return __int_as_float(__float_as_int(p) + (int)((u32)(int)n << 23));
}

struct Attend {
  u64 queries;    // float[token][heads][head_dim]
  u64 output;     // the same shape
  u64 blocks;     // u64[]: payloads of the blocks of all sequences
  u64 sequences;  // u32[token]: where in `blocks` the token's sequence begins
  u64 positions;  // u32[token]
  u64 scores;     // float[tokens of this launch][heads][stride]
  u64 keys_at;    // bytes from a payload to the layer's keys
  u64 values_at;  // and to its values
  u32 first;      // first token of this launch
  u32 heads;
  u32 heads_shared;  // query heads that share keys
  u32 head_dim;
  u32 slot_bytes;  // from one slot to the next
  u32 stride;      // scores of a head
  float scale;
};

// One group of threads a token and query head. K and V are read from the blocks where they lie, those of
// the tokens being computed included.
extern "C" __global__ void __launch_bounds__(ROW_THREADS) terrace_attend(Attend attend) {
  __shared__ float query[HEAD_DIM_MAX];
  __shared__ float parts[ROW_THREADS];
  const u32 thread = threadIdx.x;
  const u32 token = attend.first + blockIdx.x, head = blockIdx.y;
  const u64 row = ((u64)token * attend.heads + head) * attend.head_dim;
  const u32 seen = ((const u32 *)attend.positions)[token] + 1;
  const u64 *blocks = (const u64 *)attend.blocks + ((const u32 *)attend.sequences)[token];
  const u64 head_at = (u64)(head / attend.heads_shared) * attend.head_dim * sizeof(u16);
  float *scores = (float *)attend.scores + ((u64)blockIdx.x * attend.heads + head) * attend.stride;
  for (u32 dim = thread; dim < attend.head_dim; dim += ROW_THREADS)
    query[dim] = ((const float *)attend.queries)[row + dim] * attend.scale;
  __syncthreads();

  float largest = -__int_as_float(0x7f800000);
  for (u32 position = thread; position < seen; position += ROW_THREADS) {
    u64 slot = blocks[position / BLOCK_TOKENS] + position % BLOCK_TOKENS * attend.slot_bytes;
    const u16 *keys = (const u16 *)(slot + attend.keys_at + head_at);
    float score = 0.0f;
    for (u32 dim = 0; dim < attend.head_dim; dim++) score = __fmaf_rn(float_of(keys[dim]), query[dim], score);
    scores[position] = score;
    largest = score > largest ? score : largest;
  }
  parts[thread] = largest;
  for (u32 width = ROW_THREADS / 2; width > 0; width /= 2) {
    __syncthreads();
    if (thread < width && parts[thread + width] > parts[thread]) parts[thread] = parts[thread + width];
  }
  __syncthreads();
  largest = parts[0];
  for (u32 position = thread; position < seen; position += ROW_THREADS)
    scores[position] = exponential(scores[position] - largest);
  __syncthreads();

  if (thread < LANES) {
    float total = 0.0f;
    for (u32 position = thread; position < seen; position += LANES) total += scores[position];
    parts[thread] = total;
  }
  float scale = __fdiv_rn(1.0f, sum_of_lanes(parts));
  for (u32 position = thread; position < seen; position += ROW_THREADS) scores[position] *= scale;
  __syncthreads();

  for (u32 dim = thread; dim < attend.head_dim; dim += ROW_THREADS) {
    float sum = 0.0f;
    for (u32 position = 0; position < seen; position++) {
      u64 slot = blocks[position / BLOCK_TOKENS] + position % BLOCK_TOKENS * attend.slot_bytes;
      u16 value = ((const u16 *)(slot + attend.values_at + head_at))[dim];
      sum = __fmaf_rn(float_of(value), scores[position], sum);
    }
    ((float *)attend.output)[row + dim] = sum;
  }
}

struct Silu {
  u64 product;  // float[token][2][columns]: gates, then ups
  u64 target;   // float[token][columns]
  u32 columns;
};

// One group of threads a token.
extern "C" __global__ void terrace_silu(Silu silu) {
  const float *gates = (const float *)silu.product + (u64)blockIdx.x * 2 * silu.columns;
  float *target = (float *)silu.target + (u64)blockIdx.x * silu.columns;
  for (u32 at = threadIdx.x; at < silu.columns; at += blockDim.x) {
    float gate = gates[at];
    target[at] = __fdiv_rn(gate, exponential(0.0f - gate) + 1.0f) * gates[silu.columns + at];
  }
}

struct Rows {
  u64 source;   // float[][columns]
  u64 indexes;  // u32[row]
  u64 target;   // float[row][columns]
  u32 columns;
};

// One group of threads a row.
extern "C" __global__ void terrace_rows(Rows rows) {
  const float *source = (const float *)rows.source + (u64)((const u32 *)rows.indexes)[blockIdx.x] * rows.columns;
  float *target = (float *)rows.target + (u64)blockIdx.x * rows.columns;
  for (u32 at = threadIdx.x; at < rows.columns; at += blockDim.x) target[at] = source[at];
}
