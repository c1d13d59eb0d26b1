// y = (a b^T) * scale_m * scale_n + u v^T on Hopper: codes in int8 or e4m3, narrow bf16 operands, y in bf16.
//
// a (M, K), b (N, K) are int8 (or, with FLOATS, e4m3), u (M, P), v (N, P) bf16, y (M, N) bf16; all rows contiguous,
// starting at multiples of 16 bytes; scale_m (M), scale_n (N or null: ones) fp32. Codes are summed in int32, exactly
// (e4m3's in the tensor cores' own accumulator), the sums scaled where they lie, in registers, and u v^T added to
// them there: what LoRA's delta and the directions apart cost is P / 16 bf16 instructions, and no column of codes.
//
// A block's tile is 128 x 256: two warpgroups with 64 x 256 sums each, and a thread that has the hardware copy tiles
// of 128 bytes a row (TMA, 128-byte swizzle) into STAGES places. Two blocks, one below the other, are a cluster: each
// copies half of b's tile into both. Blocks stay and take tile after tile; copies run ahead into the next one's.
//
// Built by h200_products.py, which puts the three wgmma wrappers in the place of //WGMMA//.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef FLOATS
#define FLOATS 0  // codes are e4m3
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef GROUP
#define GROUP 8  // clusters' tiles, one below the other, that take all columns before the next GROUP's
#endif
// y leaves by shared memory, BATCH parts of 64 columns between two barriers, BUFFERS such batches a warpgroup.
#ifndef BATCH
#define BATCH 1
#endif
#ifndef BUFFERS
#define BUFFERS 2
#endif
#define ROWS 128
#define COLUMNS 256
#define ROW_BYTES 128
#define A_BYTES (ROWS * ROW_BYTES)
#define B_BYTES (COLUMNS * ROW_BYTES)
#define STAGE_BYTES (A_BYTES + B_BYTES)
#define PART_BYTES (64 * ROW_BYTES)

struct __align__(64) Map { u64 opaque[16]; };  // CUtensorMap

//WGMMA//

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Of an operand whose rows are 128 bytes of K, swizzled: 8 rows are 1,024 bytes apart.
__device__ __forceinline__ u64 descriptor(u32 address) {
  return (u64)((address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}
__device__ __forceinline__ void barrier_init(u32 bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}
__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra WAIT;\nDONE:\n}\n"
      ::"r"(bar), "r"(parity) : "memory");
}
// No .release.cluster: it is a fence of all memory, 600 cycles a tile of K. What is told is that wgmma has read.
__device__ __forceinline__ void barrier_arrive(u32 bar, u32 block) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [there];\n}\n"
      ::"r"(bar), "r"(block) : "memory");
}
__device__ __forceinline__ void load(u32 to, const Map* map, u32 bar, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
      ::"r"(to), "l"(map), "r"(bar), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void load_into_both(u32 to, const Map* map, u32 bar, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to), "l"(map), "r"(bar), "r"(x), "r"(y), "h"((u16)3) : "memory");
}
__device__ __forceinline__ void store(const Map* map, u32 from, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];"
               ::"l"(map), "r"(from), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait_for() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// What the compiler must not take from registers before the wait above: it knows no other order.
__device__ __forceinline__ void settle(int (&sums)[128]) {
#pragma unroll
  for (int i = 0; i < 128; i++) asm volatile("" : "+r"(sums[i])::"memory");
}
__device__ __forceinline__ void meet(int group) {  // of a warpgroup's threads
  if (group) asm volatile("bar.sync 2, 128;" ::: "memory");
  else asm volatile("bar.sync 1, 128;" ::: "memory");
}
__device__ __forceinline__ u32 pair(int low, int high) {
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(__int_as_float(high)), "f"(__int_as_float(low)));
  return both;
}
// Sums are bits of one kind of register before and after: as ints and floats they would need twice as many.
__device__ __forceinline__ void scale_in_place(int& x, float scale) {
#if FLOATS
  x = __float_as_int(__int_as_float(x) * scale);
#else
  x = __float_as_int((float)x * scale);
#endif
}

struct Place { int m, n; };
__device__ __forceinline__ Place place_of(int tile, int tiles_m, int tiles_n) {
  int group = tile / (GROUP * tiles_n), rest = tile - group * GROUP * tiles_n;
  int first = group * GROUP, size = min(GROUP, tiles_m - first);
  return {first + rest % size, rest / size};
}

extern "C" __global__ void __launch_bounds__(384, 1) __cluster_dims__(2, 1, 1)
products(const __grid_constant__ Map a, const __grid_constant__ Map b, const __grid_constant__ Map u,
         const __grid_constant__ Map v, const __grid_constant__ Map y, const float* __restrict__ scale_m,
         const float* __restrict__ scale_n, int M, int N, int k_tiles, int p_steps) {
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ __align__(8) u64 full[STAGES], empty[STAGES];
  __shared__ float scales[2][COLUMNS];
  u32 base = shared_address(memory), full0 = shared_address(full), empty0 = shared_address(empty), rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  int thread = threadIdx.x, group = thread >> 7;
  if (thread == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(full0 + 8 * i, 1);
      barrier_init(empty0 + 8 * i, 4);  // two warpgroups of two blocks
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
  int tiles_m = (M + 2 * ROWS - 1) / (2 * ROWS), tiles_n = (N + COLUMNS - 1) / COLUMNS, tiles = tiles_m * tiles_n;
  int p_tiles = (p_steps + 3) >> 2, step = gridDim.x >> 1;
  if (group == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (thread == 256) {
      int stage = 0, phase = 0;
      for (int tile = blockIdx.x >> 1; tile < tiles; tile += step) {
        Place at = place_of(tile, tiles_m, tiles_n);
        int row = (at.m * 2 + rank) * ROWS, column = at.n * COLUMNS + rank * (COLUMNS / 2);
        for (int k = 0; k < k_tiles + p_tiles; k++) {
          barrier_wait(empty0 + 8 * stage, phase ^ 1);
          u32 bar = full0 + 8 * stage, to = base + stage * STAGE_BYTES;
          bool is_narrow = k >= k_tiles;  // 64 numbers of bf16 are as many bytes as 128 codes
          int x = is_narrow ? (k - k_tiles) * 64 : k * 128;
          barrier_expect(bar, STAGE_BYTES);
          load(to, is_narrow ? &u : &a, bar, x, row);
          load_into_both(to + A_BYTES + rank * (B_BYTES / 2), is_narrow ? &v : &b, bar, x, column);
          if (++stage == STAGES) stage = 0, phase ^= 1;
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    int lane = thread & 31, warp = (thread >> 5) & 3, local = thread & 127;
    int stage = 0, phase = 0, batches = 0;
    bool speaks = local == 0, tells = local < 2;  // to whom: block `local` of the cluster
    u32 out = base + STAGES * STAGE_BYTES + group * BATCH * BUFFERS * PART_BYTES;
    u32 own_row = (warp * 16 + (lane & 15)) * ROW_BYTES;  // the row that stmatrix takes this lane's address of
    float* own_scales = scales[group];
    for (int tile = blockIdx.x >> 1; tile < tiles; tile += step) {
      Place at = place_of(tile, tiles_m, tiles_n);
      int row = (at.m * 2 + rank) * ROWS + group * 64, column = at.n * COLUMNS;
      int left = column + local, right = left + 128;
      float scale_left = scale_n && left < N ? scale_n[left] : 1.0f;  // on their way until the sums are there
      float scale_right = scale_n && right < N ? scale_n[right] : 1.0f;
      int upper = row + warp * 16 + (lane >> 2), lower = upper + 8;
      float scale_upper = upper < M ? scale_m[upper] : 0.0f, scale_lower = lower < M ? scale_m[lower] : 0.0f;
      int sums[128], before = 0;
      for (int k = 0; k < k_tiles; k++) {
        barrier_wait(full0 + 8 * stage, phase);
        u32 place = base + stage * STAGE_BYTES;
        u64 da = descriptor(place + group * PART_BYTES), db = descriptor(place + A_BYTES);
        fence();
#pragma unroll
        for (int i = 0; i < 4; i++) multiply_codes(sums, da + 2 * i, db + 2 * i, k | i);
        commit();
        if (k) {
          wait_for<1>();
          if (tells) barrier_arrive(empty0 + 8 * before, local);
        }
        before = stage;
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
      wait_for<0>();
      settle(sums);
      if (tells) barrier_arrive(empty0 + 8 * before, local);
      own_scales[local] = scale_left;
      own_scales[local + 128] = scale_right;
      meet(group);
#pragma unroll
      for (int i = 0; i < 32; i++) {
        float2 w = *(float2*)&own_scales[8 * i + 2 * (lane & 3)];
        scale_in_place(sums[4 * i], scale_upper * w.x);
        scale_in_place(sums[4 * i + 1], scale_upper * w.y);
        scale_in_place(sums[4 * i + 2], scale_lower * w.x);
        scale_in_place(sums[4 * i + 3], scale_lower * w.y);
      }
      for (int p = 0; p < p_tiles; p++) {
        barrier_wait(full0 + 8 * stage, phase);
        u32 place = base + stage * STAGE_BYTES;
        u64 da = descriptor(place + group * PART_BYTES), db = descriptor(place + A_BYTES);
        int steps = p_steps - 4 * p;
        if (steps >= 4) {
          fence();
#pragma unroll
          for (int i = 0; i < 4; i++) multiply_bf16(sums, da + 2 * i, db + 2 * i, 1);
          commit();
          wait_for<0>();
        } else {
#pragma unroll 1
          for (int i = 0; i < steps; i++) {
            fence();
            multiply_bf16(sums, da + 2 * i, db + 2 * i, 1);
            commit();
            wait_for<0>();
          }
        }
        settle(sums);
        if (tells) barrier_arrive(empty0 + 8 * stage, local);
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
#pragma unroll
      for (int first = 0; first < 4; first += BATCH) {
        u32 to = out + (batches % BUFFERS) * BATCH * PART_BYTES;
        if (speaks) asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(BUFFERS - 1) : "memory");
        meet(group);
#pragma unroll
        for (int j = 0; j < 4 * BATCH; j++) {
          int i = 4 * (first * 8 + 2 * j);  // 16 columns
          u32 there = to + (j >> 2) * PART_BYTES + own_row + (((2 * (j & 3) + (lane >> 4)) ^ (lane & 7)) << 4);
          asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                       ::"r"(there), "r"(pair(sums[i], sums[i + 1])), "r"(pair(sums[i + 2], sums[i + 3])),
                       "r"(pair(sums[i + 4], sums[i + 5])), "r"(pair(sums[i + 6], sums[i + 7])) : "memory");
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        meet(group);
        if (speaks) {
          for (int part = 0; part < BATCH; part++)
            store(&y, to + part * PART_BYTES, column + (first + part) * 64, row);
          asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        }
        batches++;
      }
    }
    if (speaks) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
  __syncwarp();  // the copying thread's, which went another way
  // The other block may still copy into this one, or tell its barriers.
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
