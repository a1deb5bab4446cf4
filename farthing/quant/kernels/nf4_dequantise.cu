// W as bf16 [n, k], for products of so many rows that reading it so costs little.
// A block of threads a block of W; the layout is nf4.py's.

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;

constexpr int SIDE = 64;
constexpr int CODE_BYTES = SIDE * SIDE / 2;
constexpr int BLOCK_BYTES = CODE_BYTES + SIDE * 2;
constexpr int TILE_BLOCKS = 4;
constexpr int PITCH = SIDE + 8;  // of a row in shared memory, against bank conflicts

struct Dequantise {
    const u8* weight;
    u16* out;
    int n, k;
    float scale;
    float codebook[16];
};

__device__ float half_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ u32 to_bf16_pair(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

extern "C" __global__ void __launch_bounds__(128)
    nf4_dequantise(const __grid_constant__ Dequantise p) {
    __shared__ __align__(16) u16 rows[SIDE][PITCH];
    int depth = p.k / SIDE, blocks_down = (p.n + SIDE - 1) / SIDE;
    int down = blockIdx.y, along = blockIdx.x;
    int tile = down / TILE_BLOCKS, in_tile = down % TILE_BLOCKS;
    int tile_blocks = min(TILE_BLOCKS, blocks_down - tile * TILE_BLOCKS);
    long long index = (long long)tile * TILE_BLOCKS * depth + along * tile_blocks + in_tile;
    const u8* block = p.weight + index * BLOCK_BYTES;

    int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16 + lane / 4, column = lane % 4 * 2;
    uint4 codes = reinterpret_cast<const uint4*>(block)[threadIdx.x];
    const u16* scales = reinterpret_cast<const u16*>(block + CODE_BYTES);
    int pair = threadIdx.x / 32 * 16 + lane / 4 * 2;
    float scale[2] = {half_to_float(scales[pair]) * p.scale, half_to_float(scales[pair + 1]) * p.scale};
    float code = 0;  // lane l holds entry l % 16; a shuffle looks one up
#pragma unroll
    for (int i = 0; i < 16; ++i)
        if (lane % 16 == i) code = p.codebook[i];
    u32 words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        u32 byte = words[i / 4] >> i % 4 * 8 & 255;
        int half = i % 2;
        float low = __shfl_sync(~0u, code, byte >> 4) * scale[half];
        float high = __shfl_sync(~0u, code, byte & 15) * scale[half];
        int k = i / 4 * 16 + i % 4 / 2 * 8 + column;
        *reinterpret_cast<u32*>(&rows[first + half * 8][k]) = to_bf16_pair(low, high);
    }
#if __CUDA_ARCH__ >= 900
    // Only now may the kernel before no longer use the memory of `out`.
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    __syncthreads();
    for (int i = threadIdx.x; i < SIDE * 8; i += 128) {
        int row = i / 8, chunk = i % 8 * 8;
        if (down * SIDE + row < p.n) {
            u16* to = p.out + (long long)(down * SIDE + row) * p.k + along * SIDE + chunk;
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&rows[row][chunk]);
        }
    }
}
