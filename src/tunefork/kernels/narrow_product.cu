// y = (a b^T) * scale_m * scale_n + u v^T on Hopper: codes in int8, narrow bf16 operands, y in bf16.
//
// a (M, K), b (N, K) are int8, u (M, P), v (N, P) bf16, y (M, N) bf16; all rows contiguous, starting at multiples of
// 16 bytes; scale_m (M), scale_n (N, or null: ones) fp32. Codes are summed in int32, exactly, the sums scaled where
// they lie, in registers, and u v^T added to them there: what LoRA's delta and the directions apart cost is P / 16
// bf16 instructions, and no column of codes.
//
// A block's tile is 128 x 256: two warpgroups with 64 x 256 sums each, and a thread that has the hardware copy tiles
// of 128 bytes a row (TMA, 128-byte swizzle) into STAGES places. Two blocks, one below the other, are a cluster: each
// copies half of b's tile into both. Blocks stay and take tile after tile; copies run ahead into the next one's.
//
// No header is read: NVRTC compiles this where it runs (cuda_source.py).

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Defined where it is compiled: BF16, a and b are bf16, without scales, a up to three matrices side by side; TURNED,
// with BF16, b is (K, N) and v (P, N); COLUMNS 128, tiles of half the width, where there are few.
#ifndef COLUMNS
#define COLUMNS 256
#endif
#define STAGES (COLUMNS == 256 ? 4 : 6)
#define NUM_SUMS (COLUMNS / 2)  // a thread's
#define GROUP 8  // clusters' tiles, one below the other, that take all columns before the next GROUP's
#define BATCH 2  // parts of 64 columns of y between two barriers; of four forms on an H200 the quickest
#define ROWS 128
#define ROW_BYTES 128
#define A_BYTES (ROWS * ROW_BYTES)
#define B_BYTES (COLUMNS * ROW_BYTES)
#define STAGE_BYTES (A_BYTES + B_BYTES)
#define PART_BYTES (64 * ROW_BYTES)

struct __align__(64) Map { u64 opaque[16]; };  // CUtensorMap

#define REGISTERS_LOW \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define REGISTERS_HIGH \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SUMS_LOW \
  "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]), \
  "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]), \
  "+r"(d[16]), "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]), \
  "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31]), \
  "+r"(d[32]), "+r"(d[33]), "+r"(d[34]), "+r"(d[35]), "+r"(d[36]), "+r"(d[37]), "+r"(d[38]), "+r"(d[39]), \
  "+r"(d[40]), "+r"(d[41]), "+r"(d[42]), "+r"(d[43]), "+r"(d[44]), "+r"(d[45]), "+r"(d[46]), "+r"(d[47]), \
  "+r"(d[48]), "+r"(d[49]), "+r"(d[50]), "+r"(d[51]), "+r"(d[52]), "+r"(d[53]), "+r"(d[54]), "+r"(d[55]), \
  "+r"(d[56]), "+r"(d[57]), "+r"(d[58]), "+r"(d[59]), "+r"(d[60]), "+r"(d[61]), "+r"(d[62]), "+r"(d[63])
#define SUMS_HIGH \
  "+r"(d[64]), "+r"(d[65]), "+r"(d[66]), "+r"(d[67]), "+r"(d[68]), "+r"(d[69]), "+r"(d[70]), "+r"(d[71]), \
  "+r"(d[72]), "+r"(d[73]), "+r"(d[74]), "+r"(d[75]), "+r"(d[76]), "+r"(d[77]), "+r"(d[78]), "+r"(d[79]), \
  "+r"(d[80]), "+r"(d[81]), "+r"(d[82]), "+r"(d[83]), "+r"(d[84]), "+r"(d[85]), "+r"(d[86]), "+r"(d[87]), \
  "+r"(d[88]), "+r"(d[89]), "+r"(d[90]), "+r"(d[91]), "+r"(d[92]), "+r"(d[93]), "+r"(d[94]), "+r"(d[95]), \
  "+r"(d[96]), "+r"(d[97]), "+r"(d[98]), "+r"(d[99]), "+r"(d[100]), "+r"(d[101]), "+r"(d[102]), "+r"(d[103]), \
  "+r"(d[104]), "+r"(d[105]), "+r"(d[106]), "+r"(d[107]), "+r"(d[108]), "+r"(d[109]), "+r"(d[110]), "+r"(d[111]), \
  "+r"(d[112]), "+r"(d[113]), "+r"(d[114]), "+r"(d[115]), "+r"(d[116]), "+r"(d[117]), "+r"(d[118]), "+r"(d[119]), \
  "+r"(d[120]), "+r"(d[121]), "+r"(d[122]), "+r"(d[123]), "+r"(d[124]), "+r"(d[125]), "+r"(d[126]), "+r"(d[127])
#if COLUMNS == 256
#define REGISTERS REGISTERS_LOW ", " REGISTERS_HIGH
#define SUMS SUMS_LOW, SUMS_HIGH
#define OPERANDS "%128, %129"
#define ADDS "%130"
#define WIDTH "256"
#else
#define REGISTERS REGISTERS_LOW
#define SUMS SUMS_LOW
#define OPERANDS "%64, %65"
#define ADDS "%66"
#define WIDTH "128"
#endif
// Of a warpgroup, 64 x COLUMNS sums: d += a b^T, or d = a b^T where `adds` is 0.
#define MULTIPLY(name, kind, signs) \
  __device__ __forceinline__ void name(int (&d)[NUM_SUMS], u64 a, u64 b, int adds) { \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADDS ", 0;\nwgmma.mma_async.sync.aligned.m64n" WIDTH kind " {" \
                 REGISTERS "}, " OPERANDS ", p" signs ";\n}\n" : SUMS : "l"(a), "l"(b), "r"(adds)); \
  }
#ifdef TURNED
MULTIPLY(multiply_bf16, "k16.f32.bf16.bf16", ", 1, 1, 0, 1")
#else
MULTIPLY(multiply_bf16, "k16.f32.bf16.bf16", ", 1, 1, 0, 0")
#endif
#ifdef BF16
#define multiply multiply_bf16
#define K_COLUMNS 64
#else
MULTIPLY(multiply, "k32.s32.s8.s8", "")
#define K_COLUMNS 128
#endif

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Of an operand whose rows are 128 bytes of K, swizzled: 8 rows are 1,024 bytes apart.
__device__ __forceinline__ u64 descriptor(u32 address) {
  return (u64)((address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}
#ifdef TURNED
// Of one whose rows, of K, are 128 bytes of N: 64 columns of N lie 8,192 bytes from the next 64.
__device__ __forceinline__ u64 descriptor_b(u32 address) {
  return (u64)((address & 0x3FFFF) >> 4) | (512ull << 16) | (64ull << 32) | (1ull << 62);
}
#define STEP_B 128  // 16 rows of K, in units of 16 bytes
#else
#define descriptor_b descriptor
#define STEP_B 2
#endif
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
__device__ __forceinline__ void settle(int (&sums)[NUM_SUMS]) {
#pragma unroll
  for (int i = 0; i < NUM_SUMS; i++) asm volatile("" : "+r"(sums[i])::"memory");
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
__device__ __forceinline__ void scale_in_place(int& x, float scale) { x = __float_as_int((float)x * scale); }

struct Place { int m, n; };
__device__ __forceinline__ Place place_of(int tile, int tiles_m, int tiles_n) {
  int group = tile / (GROUP * tiles_n), rest = tile - group * GROUP * tiles_n;
  int first = group * GROUP, size = min(GROUP, tiles_m - first);
  return {first + rest % size, rest / size};
}

#ifdef BF16
// a's columns are those of up to three matrices, one beside the other; the second's tiles of K begin at `second`, ...
extern "C" __global__ void __launch_bounds__(384, 1) __cluster_dims__(2, 1, 1)
bf16_product(const __grid_constant__ Map a, const __grid_constant__ Map a2, const __grid_constant__ Map a3,
             const __grid_constant__ Map b, const __grid_constant__ Map u, const __grid_constant__ Map v,
             const __grid_constant__ Map y, int M, int N, int second, int third, int k_tiles, int p_steps) {
#else
extern "C" __global__ void __launch_bounds__(384, 1) __cluster_dims__(2, 1, 1)
int8_product(const __grid_constant__ Map a, const __grid_constant__ Map b, const __grid_constant__ Map u,
             const __grid_constant__ Map v, const __grid_constant__ Map y, const float* __restrict__ scale_m,
             const float* __restrict__ scale_n, int M, int N, int k_tiles, int p_steps) {
  __shared__ float scales[2][COLUMNS];
#endif
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ __align__(8) u64 full[STAGES], empty[STAGES];
  u32 base = shared_address(memory), full0 = shared_address(full), empty0 = shared_address(empty), rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  int thread = threadIdx.x, group = __shfl_sync(~0u, thread >> 7, 0);
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
        for (int turn = 0; turn < k_tiles + p_tiles; turn++) {
#ifdef BF16
          int k = turn < p_tiles ? turn + k_tiles : turn - p_tiles;
#else
          int k = turn;
#endif
          barrier_wait(empty0 + 8 * stage, phase ^ 1);
          u32 bar = full0 + 8 * stage, to = base + stage * STAGE_BYTES;
          bool is_narrow = k >= k_tiles;  // 64 numbers of bf16 are as many bytes as 128 codes
          int x = is_narrow ? (k - k_tiles) * 64 : k * K_COLUMNS, x_a = x;
          const Map* of_a = is_narrow ? &u : &a;
#ifdef BF16
          if (!is_narrow && k >= second) of_a = k < third ? &a2 : &a3, x_a = (k - (k < third ? second : third)) * 64;
#endif
          barrier_expect(bar, STAGE_BYTES);
          load(to, of_a, bar, x_a, row);
          const Map* of_b = is_narrow ? &v : &b;
          to += A_BYTES + rank * (B_BYTES / 2);
#ifdef TURNED
#pragma unroll
          for (int i = 0; i < COLUMNS / 128; i++) load_into_both(to + i * 8192, of_b, bar, column + 64 * i, x);
#else
          load_into_both(to, of_b, bar, x, column);
#endif
          if (++stage == STAGES) stage = 0, phase ^= 1;
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    int lane = thread & 31, warp = (thread >> 5) & 3, local = thread & 127;
    int stage = 0, phase = 0;
    bool speaks = local == 0, tells = local < 2;  // to whom: block `local` of the cluster
    u32 out = base + STAGES * STAGE_BYTES + group * BATCH * PART_BYTES;
    u32 own_row = (warp * 16 + (lane & 15)) * ROW_BYTES;  // the row that stmatrix takes this lane's address of
#ifndef BF16
    float* own_scales = scales[group];
#endif
    for (int tile = blockIdx.x >> 1; tile < tiles; tile += step) {
      Place at = place_of(tile, tiles_m, tiles_n);
      int row = (at.m * 2 + rank) * ROWS + group * 64, column = at.n * COLUMNS;
#ifndef BF16
      int left = column + local, right = left + 128;  // the latter where a tile is so wide
      float scale_left = scale_n && left < N ? scale_n[left] : 1.0f;  // on their way until the sums are there
      float scale_right = scale_n && right < N ? scale_n[right] : 1.0f;
      int upper = row + warp * 16 + (lane >> 2), lower = upper + 8;
      float scale_upper = upper < M ? scale_m[upper] : 0.0f, scale_lower = lower < M ? scale_m[lower] : 0.0f;
#endif
      int sums[NUM_SUMS], before = 0;
      auto multiply_narrow = [&](int is_begun) {
        for (int p = 0; p < p_tiles; p++) {
          barrier_wait(full0 + 8 * stage, phase);
          u32 place = base + stage * STAGE_BYTES;
          u64 da = descriptor(place + group * PART_BYTES), db = descriptor_b(place + A_BYTES);
          int steps = min(p_steps - 4 * p, 4);
          fence();
#pragma unroll 1
          for (int i = 0; i < steps; i++) multiply_bf16(sums, da + 2 * i, db + STEP_B * i, is_begun | p | i);
          commit();
          if (p) {
            wait_for<1>();
            if (tells) barrier_arrive(empty0 + 8 * before, local);
          }
          before = stage;
          if (++stage == STAGES) stage = 0, phase ^= 1;
        }
      };
#ifdef BF16
      multiply_narrow(0);  // first: behind the others it would be waited for by itself
      int is_begun = p_tiles;
#else
      const int is_begun = 0;
#endif
      for (int k = 0; k < k_tiles; k++) {
        barrier_wait(full0 + 8 * stage, phase);
        u32 place = base + stage * STAGE_BYTES;
        u64 da = descriptor(place + group * PART_BYTES), db = descriptor_b(place + A_BYTES);
        fence();
#pragma unroll
        for (int i = 0; i < 4; i++) multiply(sums, da + 2 * i, db + STEP_B * i, is_begun | k | i);
        commit();
        if (is_begun | k) {
          wait_for<1>();
          if (tells) barrier_arrive(empty0 + 8 * before, local);
        }
        before = stage;
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
      wait_for<0>();
      settle(sums);
      if (tells) barrier_arrive(empty0 + 8 * before, local);
#ifndef BF16
      own_scales[local] = scale_left;
      if (COLUMNS == 256) own_scales[local + 128] = scale_right;
      meet(group);
#pragma unroll
      for (int i = 0; i < COLUMNS / 8; i++) {
        float2 w = *(float2*)&own_scales[8 * i + 2 * (lane & 3)];
        scale_in_place(sums[4 * i], scale_upper * w.x);
        scale_in_place(sums[4 * i + 1], scale_upper * w.y);
        scale_in_place(sums[4 * i + 2], scale_lower * w.x);
        scale_in_place(sums[4 * i + 3], scale_lower * w.y);
      }
      if (p_tiles) {
        multiply_narrow(1);
        wait_for<0>();
        settle(sums);
        if (tells) barrier_arrive(empty0 + 8 * before, local);
      }
#endif
#pragma unroll
      for (int first = 0; first < COLUMNS / 64; first += BATCH) {
        if (speaks) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        meet(group);
#pragma unroll
        for (int j = 0; j < 4 * BATCH; j++) {
          int i = 4 * (first * 8 + 2 * j);  // 16 columns
          u32 there = out + (j >> 2) * PART_BYTES + own_row + (((2 * (j & 3) + (lane >> 4)) ^ (lane & 7)) << 4);
          asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                       ::"r"(there), "r"(pair(sums[i], sums[i + 1])), "r"(pair(sums[i + 2], sums[i + 3])),
                       "r"(pair(sums[i + 4], sums[i + 5])), "r"(pair(sums[i + 6], sums[i + 7])) : "memory");
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        meet(group);
        if (speaks) {
          for (int part = 0; part < BATCH; part++)
            store(&y, out + part * PART_BYTES, column + (first + part) * 64, row);
          asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        }
      }
    }
    if (speaks) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
  __syncwarp();  // the copying thread's, which went another way
  // The other block may still copy into this one, or tell its barriers.
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
