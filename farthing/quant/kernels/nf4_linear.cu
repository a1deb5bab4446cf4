// y = x W^T for a bitsandbytes 4-bit W, at the speed of reading W. The layout is nf4.py's.
//
// Compiled for ROWS = 8, 16, 32 or 64 rows of x and SHARED_BYTES of shared memory.
//
// A tile is 256 rows of W by all of K, cut into stages of 64 columns. The stages of all tiles,
// in order, are dealt to the grid in equal ranges, so a tile may be shared: each of its thread
// blocks then leaves a partial sum, and when all are there each adds up its share of the tile. The
// order of every sum depends on the shape of W and the grid alone: not on ROWS, not on timing.
//
// Weights are the tensor core's 16-row operand and x its 8-row one, so 8 rows cost what 1 does.
// A byte of W is decoded by one look-up into a table of pairs of bf16. On Hopper one warp feeds
// the ring with bulk copies and four warpgroups multiply by wgmma; elsewhere all 16 warps copy
// with cp.async and multiply by mma.sync. The accumulators lie alike, so the rest is shared.

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER 1
#else
#define HOPPER 0
#endif

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int SIDE = 64;                          // rows and columns of a block of W
constexpr int CODE_BYTES = SIDE * SIDE / 2;       // its codes; SIDE fp16 scales follow them
constexpr int BLOCK_BYTES = CODE_BYTES + SIDE * 2;
constexpr int TILE_BLOCKS = 4;                    // blocks side by side in a stage
constexpr int TILE_ROWS = TILE_BLOCKS * SIDE;
constexpr int WEIGHT_BYTES = TILE_BLOCKS * BLOCK_BYTES;
constexpr int X_BYTES = ROWS * SIDE * 2;
constexpr int WORKERS = TILE_BLOCKS * 128;        // threads that multiply: a warpgroup a block
constexpr int COLUMN_TILES = ROWS / 8;
constexpr int PARTIALS = COLUMN_TILES * WORKERS;  // float4 in a tile's partial sum

// A copy a lane, so that look-ups meet no bank conflict, where shared memory is large and the
// memory fast; there entries lie 256 bytes apart, which makes an address one byte_perm.
constexpr int TABLE_COPIES = HOPPER ? 32 : 16;
constexpr int TABLE_STRIDE = HOPPER ? 256 : 64;
constexpr int TABLE_BYTES = 256 * TABLE_STRIDE;

struct alignas(64) TensorMap {
    u64 words[16];
};

struct Linear {
    const u8* weight;
    const u16* x;          // bf16 [rows, k]; Hopper reads it through the tensor map
    const u16* bias;       // bf16 [n], or null
    u16* y;                // bf16 [rows, n]
    float4* partials;      // [grid][2][PARTIALS]
    u32* arrivals;         // [tiles], all zero between launches
    const u8* next_weight; // what a later launch will read, or null
    u64 next_bytes;
    int rows, n, k;
    u32 depth;             // stages in a tile
    u32 stages;            // in all tiles
    u32 tall_stages;       // of them, those four blocks tall: all but those of a ragged last tile
    u32 last_blocks;       // blocks side by side in the others
    float scale;           // a power of two that the fp16 scales leave out
    u16 codebook[16];      // bf16
};

// ---- which stages are whose ----

// Thread block `cta` has stages first_of(cta) to first_of(cta + 1).
__device__ u32 first_of(const Linear& p, u32 cta) { return cta * p.stages / gridDim.x; }

__device__ u32 owner(const Linear& p, u32 stage) {
    return ((stage + 1) * gridDim.x - 1) / p.stages;
}

__device__ u32 blocks_in(const Linear& p, u32 stage) {
    return stage < p.tall_stages ? TILE_BLOCKS : p.last_blocks;
}

__device__ const u8* weights_of(const Linear& p, u32 stage) {
    u32 tall = min(stage, p.tall_stages);
    return p.weight + (u64)tall * WEIGHT_BYTES + (stage - tall) * p.last_blocks * BLOCK_BYTES;
}

// ---- small instructions ----

__device__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ void arrive(u32* count) {  // for all that was written before, and was seen written
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
}

__device__ void sync_workers() { asm volatile("bar.sync 1, %0;" ::"n"(WORKERS) : "memory"); }

__device__ float half_to_float(u32 bits) {
    float value;
    asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(value) : "r"(bits));
    return value;
}

__device__ u16 to_bf16(float value) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ float from_bf16(u16 bits) { return __uint_as_float((u32)bits << 16); }

// ---- decoding ----

// Entry b, once a copy: the two weights of byte b as a pair of bf16, the earlier one low.
__device__ void build_table(const Linear& p, u32 table) {
    int copy = threadIdx.x % TABLE_COPIES, late = threadIdx.x / TABLE_COPIES % 16;
    u32 high = (u32)p.codebook[late] << 16;
#pragma unroll
    for (int early = 0; early < 16; ++early) {
        u32 at = table + (early * 16 + late) * TABLE_STRIDE + copy * 4;
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(high | p.codebook[early]) : "memory");
    }
}

__device__ u32 look_up(u32 copy, u32 codes, int byte) {
    u32 at, pair;
    if (TABLE_STRIDE == 256)  // the table is aligned to its 64 KB
        at = __byte_perm(codes, copy, 0x7604 | byte << 4);
    else
        at = copy + (codes >> 8 * byte & 255) * TABLE_STRIDE;
    asm("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(at));
    return pair;
}

// Where a worker finds its part of a stage, as addresses in shared memory.
struct Place {
    u32 copy;    // its copy of the table
    u32 codes;   // in a stage: its 32 weights of a block
    u32 scales;  // in a stage: the scales of its rows, g and g + 8 of its warp's 16

    __device__ Place(u32 table) {
        int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
        u32 block = threadIdx.x / 128 * BLOCK_BYTES;
        copy = table + lane % TABLE_COPIES * 4;
        codes = block + warp * 512 + lane * 16;
        scales = block + CODE_BYTES + warp * 32 + lane / 4 * 4;
    }

    // A warp's 16 rows by 64 columns as the tensor core's four A operands.
    __device__ void decode(u32 stage, u32 (&a)[4][4]) const {
        u32 words[4];
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(stage + codes));
#pragma unroll
        for (int s = 0; s < 4; ++s)
#pragma unroll
            for (int j = 0; j < 4; ++j) a[s][j] = look_up(copy, words[s], j);
    }

    __device__ float2 row_scales(u32 stage) const {
        u32 bits;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(bits) : "r"(stage + scales));
        return {half_to_float(bits & 0xffff), half_to_float(bits >> 16)};
    }
};

// For each 8 rows of x: rows g, g, g + 8, g + 8 of W by rows 2t, 2t + 1 of x.
using Accumulator = float[COLUMN_TILES * 4];

// Absmax multiply the sum over a block's 64 columns rather than each weight.
__device__ void add_scaled(float* sum, const float* d, float2 scale) {
    sum[0] += scale.x * d[0];
    sum[1] += scale.x * d[1];
    sum[2] += scale.y * d[2];
    sum[3] += scale.y * d[3];
}

// ---- the end of a tile ----

constexpr u32 BATCH = 12;  // partial sums on their way at once

__device__ void add(float4& sum, float4 more) {
    sum = {sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w};
}

__device__ float4 four(const float* sum) { return {sum[0], sum[1], sum[2], sum[3]}; }

// Four sums of worker `worker`: two rows of W by two rows of x.
__device__ void store(const Linear& p, int tile, int column_tile, int worker, float4 sum) {
    int row = (worker / 32) * 16 + worker % 32 / 4 + tile * TILE_ROWS;
    int column = column_tile * 8 + worker % 4 * 2;
    float sums[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int m = row + i / 2 * 8;
        int r = column + i % 2;
        if (m < p.n && r < p.rows) {
            float bias = p.bias ? from_bf16(p.bias[m]) : 0.0f;
            p.y[(long long)r * p.n + m] = to_bf16(sums[i] * p.scale + bias);
        }
    }
}

// Where a thread block leaves its part of a tile that it shares. It can share two: the one that its
// stages begin in and the one that they end in.
__device__ float4* partial(const Linear& p, u32 cta, bool begins_tile) {
    return p.partials + (u64)(2 * cta + begins_tile) * PARTIALS;
}

// Adds up this thread block's share of a tile when all its sharers have left their partial sums.
__device__ void add_up(const Linear& p, u32 tile) {
    u32 first = owner(p, tile * p.depth);
    u32 sharers = owner(p, (tile + 1) * p.depth - 1) - first + 1;
    if (threadIdx.x == 0) {
        u32 arrived;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                        : "=r"(arrived) : "l"(p.arrivals + tile) : "memory");
        while (arrived < sharers);
        atomicInc(p.arrivals + tile, 2 * sharers - 1);  // the last to leave takes it back to zero
    }
    u32 share = blockIdx.x - first, end = (share + 1) * PARTIALS / sharers;
    sync_workers();
    for (u32 i = share * PARTIALS / sharers + threadIdx.x; i < end; i += WORKERS) {
        const float4* part = partial(p, first, true) + i;
        float4 sum = __ldcg(part);
        part += PARTIALS;  // the others took the tile over
        for (u32 j = 1; j < sharers; j += BATCH, part += BATCH * 2 * PARTIALS) {
            float4 more[BATCH];
#pragma unroll
            for (u32 b = 0; b < BATCH; ++b)
                more[b] = j + b < sharers ? __ldcg(part + b * 2 * PARTIALS) : float4{};
#pragma unroll
            for (u32 b = 0; b < BATCH; ++b) add(sum, more[b]);
        }
        store(p, tile, i / WORKERS, i % WORKERS, sum);
    }
}

// What the workers of a thread block do. A ring waits for a stage, multiplies or skips it and frees it.
template <class Ring>
__device__ void work(const Linear& p, Ring& ring) {
    u32 begin = first_of(p, blockIdx.x), end = first_of(p, blockIdx.x + 1);
    u32 first = begin / p.depth, last = (end - 1) / p.depth;
    bool shares_first = begin > first * p.depth || end < (first + 1) * p.depth;
    bool shares_last = last > first && end < (last + 1) * p.depth;
    for (u32 tile = first; tile <= last; ++tile) {
        u32 from = max(begin, tile * p.depth), to = min(end, (tile + 1) * p.depth);
        Accumulator sum = {};
        if (threadIdx.x / 128 < blocks_in(p, from))
            ring.multiply(to - from, sum);
        else
            for (u32 left = to - from; left > 0; --left) ring.skip();
        bool whole = to - from == p.depth;
        float4* part = partial(p, blockIdx.x, from == tile * p.depth) + threadIdx.x;
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; ++c) {
            if (whole)
                store(p, tile, c, threadIdx.x, four(sum + 4 * c));
            else
                part[c * WORKERS] = four(sum + 4 * c);
        }
    }
    sync_workers();
    if (threadIdx.x == 0) {
        if (shares_first) arrive(p.arrivals + first);
        if (shares_last) arrive(p.arrivals + last);
    }
    if (shares_first) add_up(p, first);
    if (shares_last) add_up(p, last);
}

#if HOPPER

__device__ void barrier_init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ void barrier_expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

__device__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ void copy_weights(u32 to, const u8* from, int bytes, u32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// ROWS rows by 64 columns of x, in the 128-byte swizzle that wgmma reads; zeros past the last row.
__device__ void copy_x(u32 to, const TensorMap* map, int column, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3}], [%4];" ::"r"(to), "l"(map), "r"(column), "r"(0), "r"(barrier)
        : "memory");
}

__device__ void wgmma(float (&d)[4], const u32 (&a)[4], u64 b, int add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %9, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3},"
        " {%4, %5, %6, %7}, %8, add, 1, 1, 0;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

#define EIGHT(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])

__device__ void wgmma(float (&d)[8], const u32 (&a)[4], u64 b, int add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %13, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7},"
        " {%8, %9, %10, %11}, %12, add, 1, 1, 0;\n}"
        : EIGHT(d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

__device__ void wgmma(float (&d)[16], const u32 (&a)[4], u64 b, int add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %21, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7,"
        " %8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, add, 1, 1, 0;\n}"
        : EIGHT(d, 0), EIGHT(d, 8)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

__device__ void wgmma(float (&d)[32], const u32 (&a)[4], u64 b, int add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7,"
        " %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23,"
        " %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, add, 1, 1, 0;\n}"
        : EIGHT(d, 0), EIGHT(d, 8), EIGHT(d, 16), EIGHT(d, 24)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

// Where a K-major operand of 128-byte swizzled rows lies: eight rows are 1024 bytes.
__device__ u64 swizzled_operand(u32 at) {
    u32 low = __shfl_sync(~0u, 1u << 16 | at >> 4, 0);  // tells the compiler that it is uniform
    return (u64)((1024 >> 4) | 1u << 30) << 32 | low;
}

// x and the barriers lie before the table, whose alignment leaves them 63 KB; weights after it.
constexpr int FRONT_BYTES = TABLE_BYTES - 1024;
constexpr int STAGES_OF_X = (FRONT_BYTES - 512) / X_BYTES;
constexpr int STAGES_OF_WEIGHTS = (SHARED_BYTES - FRONT_BYTES - TABLE_BYTES) / WEIGHT_BYTES;
constexpr int STAGES = STAGES_OF_X < STAGES_OF_WEIGHTS ? STAGES_OF_X : STAGES_OF_WEIGHTS;
static_assert(STAGES >= 4 && STAGES * 16 <= 512, "a ring, and room for its barriers");

struct Shared {  // addresses
    u32 start, table;

    __device__ Shared(const u8* memory)
        : start(shared_address(memory)),
          table((start + TABLE_BYTES - 1) & ~(u32)(TABLE_BYTES - 1)) {
        if (table - start < FRONT_BYTES) __trap();
    }
    __device__ u32 x(int slot) const { return start + slot * X_BYTES; }
    __device__ u32 full(int slot) const { return x(STAGES) + slot * 8; }
    __device__ u32 empty(int slot) const { return full(STAGES) + slot * 8; }
    __device__ u32 weights(int slot) const { return table + TABLE_BYTES + slot * WEIGHT_BYTES; }
};

struct Position {  // in the ring
    int slot = 0;
    u32 parity = 0;

    __device__ void advance() {
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
};

// The memory would idle from here until the next launch asks; so begin to bring its weights into
// the L2 cache, for each block as much as fills its ring.
__device__ void prefetch_next(const Linear& p) {
    u64 lines = p.next_bytes / 128;
    u64 from = lines * blockIdx.x / gridDim.x, to = lines * (blockIdx.x + 1) / gridDim.x;
    to = min(to, from + STAGES * WEIGHT_BYTES / 128);
    for (; from < to; from += WEIGHT_BYTES / 128) {
        u32 bytes = (u32)min(to - from, (u64)WEIGHT_BYTES / 128) * 128;
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p.next_weight + from * 128),
                     "r"(bytes));
    }
}

// One thread: weights are asked for at once, x only when the kernel before has written it.
__device__ void feed(const Linear& p, const TensorMap* map, const Shared& shared) {
    u32 begin = first_of(p, blockIdx.x), end = first_of(p, blockIdx.x + 1);
    int column = begin % p.depth * SIDE;
    auto ask_weights = [&](u32 stage, int slot) {
        int bytes = blocks_in(p, stage) * BLOCK_BYTES;
        barrier_expect(shared.full(slot), bytes + X_BYTES);
        copy_weights(shared.weights(slot), weights_of(p, stage), bytes, shared.full(slot));
    };
    auto ask_x = [&](int slot) {
        copy_x(shared.x(slot), map, column, shared.full(slot));
        column = column + SIDE == p.k ? 0 : column + SIDE;
    };
    u32 ahead = min(STAGES, end - begin);
    for (u32 i = 0; i < ahead; ++i) ask_weights(begin + i, i);
    wait_for_previous_kernel();
    let_next_kernel_start();
    for (u32 i = 0; i < ahead; ++i) ask_x(i);
    Position at;
    for (u32 stage = begin + ahead; stage < end; ++stage) {
        barrier_wait(shared.empty(at.slot), at.parity);
        ask_weights(stage, at.slot);
        ask_x(at.slot);
        at.advance();
    }
    if (p.next_weight) prefetch_next(p);
}

struct BulkRing {
    Shared shared;
    Place place;
    Position at;

    __device__ BulkRing(const Shared& shared) : shared(shared), place(shared.table) {}

    __device__ void multiply(int stages, Accumulator& sum) {
        for (; stages > 0; --stages) {
            barrier_wait(shared.full(at.slot), at.parity);
            u32 a[4][4];
            float d[COLUMN_TILES * 4];
            place.decode(shared.weights(at.slot), a);
            float2 scale = place.row_scales(shared.weights(at.slot));
            u64 x = swizzled_operand(shared.x(at.slot));
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int s = 0; s < 4; ++s) wgmma(d, a[s], x + 2 * s, s > 0);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
            for (int c = 0; c < COLUMN_TILES; ++c) add_scaled(sum + 4 * c, d + 4 * c, scale);
            free();
        }
    }

    __device__ void skip() {
        barrier_wait(shared.full(at.slot), at.parity);
        free();
    }

    __device__ void free() {
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(shared.empty(at.slot));
        at.advance();
    }
};

extern "C" __global__ void __launch_bounds__(WORKERS + 32, 1)
    nf4_linear(const __grid_constant__ TensorMap map, const __grid_constant__ Linear p) {
    extern __shared__ __align__(1024) u8 memory[];
    Shared shared(memory);
    if (threadIdx.x == WORKERS) {
        asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(shared.full(i), 1);
            barrier_init(shared.empty(i), WORKERS / 32);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x == WORKERS) {
        feed(p, &map, shared);
    } else if (threadIdx.x < WORKERS) {
        // x, which is asked for after the kernel before has ended, orders all that follows.
        build_table(p, shared.table);
        sync_workers();
        BulkRing ring(shared);
        work(p, ring);
    }
}

#else

constexpr int STAGE_BYTES = X_BYTES + WEIGHT_BYTES;
constexpr int STAGES = (SHARED_BYTES - TABLE_BYTES) / STAGE_BYTES;
static_assert(STAGES >= 3, "a ring");

__device__ void copy16(u32 to, const void* from, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(real ? 16 : 0) : "memory");
}

__device__ void load_matrices(u32 row, u32 (&r)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row) : "memory");
}

__device__ void mma(float* d, const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
        " {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// All workers copy each stage; 16-byte chunk c of a row r of x lies at c ^ (r & 7).
struct AsyncRing {
    const Linear& p;
    u32 stages;  // in shared memory
    Place place;
    u32 next, end;  // the next stage to ask for
    int asked = 0, used = 0;

    __device__ AsyncRing(const Linear& p, u32 table)
        : p(p),
          stages(table + TABLE_BYTES),
          place(table),
          next(first_of(p, blockIdx.x)),
          end(first_of(p, blockIdx.x + 1)) {
        for (int i = 0; i < STAGES - 1; ++i) ask();
    }

    __device__ void ask() {
        if (next < end) {
            int bytes = blocks_in(p, next) * BLOCK_BYTES;
            const u8* weights = weights_of(p, next);
            u32 x = stages + asked % STAGES * STAGE_BYTES;
            for (int i = threadIdx.x * 16; i < bytes; i += WORKERS * 16)
                copy16(x + X_BYTES + i, weights + i, true);
            int column = next % p.depth * SIDE;
            for (int i = threadIdx.x; i < ROWS * 8; i += WORKERS) {
                int row = i / 8, chunk = i % 8;
                bool real = row < p.rows;
                const u16* from = p.x + (u64)(real ? row : 0) * p.k + column + chunk * 8;
                copy16(x + row * 128 + (chunk ^ (row & 7)) * 16, from, real);
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        ++next, ++asked;
    }

    __device__ void multiply(int stages, Accumulator& sum) {
        for (; stages > 0; --stages) multiply_one(take(), sum);
    }

    __device__ void multiply_one(u32 stage, Accumulator& sum) {
        u32 a[4][4];
        place.decode(stage + X_BYTES, a);
        float2 scale = place.row_scales(stage + X_BYTES);
        int row = threadIdx.x % 8, chunk = threadIdx.x % 32 / 8;
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; ++c) {
            float d[4] = {0, 0, 0, 0};
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                u32 b[4];
                load_matrices(stage + c * 1024 + row * 128 + ((chunk + 4 * half) ^ row) * 16, b);
                mma(d, a[2 * half], b[0], b[1]);
                mma(d, a[2 * half + 1], b[2], b[3]);
            }
            add_scaled(sum + 4 * c, d, scale);
        }
    }

    __device__ void skip() { take(); }

    // Waits for the next stage and asks for another in the place of the one used before it.
    __device__ u32 take() {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        __syncthreads();
        ask();
        return stages + used++ % STAGES * STAGE_BYTES;
    }
};

extern "C" __global__ void __launch_bounds__(WORKERS, 1)
    nf4_linear(const __grid_constant__ TensorMap, const __grid_constant__ Linear p) {
    extern __shared__ __align__(1024) u8 memory[];
    u32 table = shared_address(memory);
    let_next_kernel_start();
    build_table(p, table);
    wait_for_previous_kernel();
    AsyncRing ring(p, table);
    work(p, ring);
}

#endif
