// Products of 2:4 weights on Ampere, by the sparse main loop of CUTLASS 2: one tile shape and element type a library.
//
// What is computed is Y^T [O, T] = W [O, I] X^T [I, T]: the sparse operand of the instruction is its left one. Y^T is
// wanted in columns, which is Y in rows. CUTLASS stores sparse products in rows only, so main loop and launch are its
// own and the way out is ours.
//
// Given by tiles.py: SLOPE_ELEMENT, SLOPE_TILE_M, SLOPE_TILE_N, SLOPE_WARP_M, SLOPE_WARP_N, SLOPE_STAGES.

#include <cuda_runtime.h>

#include "cutlass/arch/memory.h"
#include "cutlass/cutlass.h"
#include "cutlass/gemm/threadblock/default_sparse_mma.h"
#include "cutlass/gemm/threadblock/threadblock_swizzle.h"
#include "cutlass/numeric_conversion.h"

namespace {

using Element = SLOPE_ELEMENT;
using Tile = cutlass::gemm::GemmShape<SLOPE_TILE_M, SLOPE_TILE_N, 64>;
using Warp = cutlass::gemm::GemmShape<SLOPE_WARP_M, SLOPE_WARP_N, 64>;
using Instruction = cutlass::gemm::GemmShape<16, 8, 32>;
// Entries of one 16-byte access.
constexpr int kVector = 8;

using Mma = typename cutlass::gemm::threadblock::DefaultSparseMma<
    Element, cutlass::layout::RowMajor, kVector, Element, cutlass::layout::ColumnMajor, kVector, float,
    cutlass::layout::RowMajor, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Tile, Warp, Instruction,
    SLOPE_STAGES, cutlass::arch::OpMultiplyAdd>::ThreadblockMma;
using Swizzle = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>;

constexpr int kWarpsM = Tile::kM / Warp::kM;
constexpr int kThreads = 32 * kWarpsM * (Tile::kN / Warp::kN);
static_assert(kThreads == 32 * Mma::WarpCount::kCount, "no warps share a part of the tile");
static_assert(sizeof(typename Mma::ElementE) == 2, "the order of the metadata is that of 16-bit words");

// Accumulators of a tile in shared memory, by columns. Four more floats a column: the eight rows and four pairs of
// columns that the lanes of a warp write at once then lie in 32 different banks.
constexpr int kPitch = Tile::kM + 4;
static_assert(kPitch % 16 == 4 && kPitch % 4 == 0, "");

union Shared {
  typename Mma::SharedStorage main_loop;
  alignas(16) float columns[Tile::kN * kPitch];
};

struct Parameters {
  cutlass::gemm::GemmCoord size;
  cutlass::gemm::GemmCoord grid;
  int swizzle;
  typename Mma::IteratorA::Params values_layout;
  typename Mma::IteratorB::Params x_layout;
  typename Mma::IteratorE::Params metadata_layout;
  Element* values;
  Element* x;
  typename Mma::ElementE* metadata;
  const Element* bias;
  const Element* addend;
  Element* y;
};

__device__ void stage(Shared& shared, const typename Mma::FragmentC& accumulators, int warp, int lane) {
  constexpr int kTilesM = Warp::kM / Instruction::kM;
  constexpr int kTilesN = Warp::kN / Instruction::kN;
  static_assert(Mma::FragmentC::kElements == 4 * kTilesM * kTilesN, "");
  int row = warp % kWarpsM * Warp::kM + lane / 4;
  int column = warp / kWarpsM * Warp::kN + lane % 4 * 2;
  CUTLASS_PRAGMA_UNROLL
  for (int n = 0; n < kTilesN; ++n) {
    CUTLASS_PRAGMA_UNROLL
    for (int m = 0; m < kTilesM; ++m) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 4; ++i) {
        int at = (column + n * Instruction::kN + i % 2) * kPitch + row + m * Instruction::kM + i / 2 * 8;
        shared.columns[at] = accumulators[4 * (m + n * kTilesM) + i];
      }
    }
  }
}

__device__ void add(float (&sum)[kVector], const Element* from) {
  auto part = *reinterpret_cast<const cutlass::AlignedArray<Element, kVector>*>(from);
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kVector; ++i) sum[i] += static_cast<float>(part[i]);
}

// Bias and addend join the accumulator in fp32: one rounding.
__device__ void store(const Parameters& p, const Shared& shared, int first_row, int first_token) {
  constexpr int kVectors = Tile::kM / kVector;
  static_assert(kThreads % kVectors == 0 && Tile::kN % (kThreads / kVectors) == 0, "every thread does equal work");
  int row = threadIdx.x % kVectors * kVector;
  // A vector is inside or outside: the number of rows is a multiple of 32.
  if (first_row + row >= p.size.m()) return;
  for (int n = threadIdx.x / kVectors; n < Tile::kN && first_token + n < p.size.n(); n += kThreads / kVectors) {
    float sum[kVector];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kVector; i += 4)
      *reinterpret_cast<float4*>(sum + i) = *reinterpret_cast<const float4*>(shared.columns + n * kPitch + row + i);
    long long at = static_cast<long long>(first_token + n) * p.size.m() + first_row + row;
    if (p.bias) add(sum, p.bias + first_row + row);
    if (p.addend) add(sum, p.addend + at);
    cutlass::AlignedArray<Element, kVector> rounded;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kVector; ++i) rounded[i] = Element(sum[i]);
    *reinterpret_cast<cutlass::AlignedArray<Element, kVector>*>(p.y + at) = rounded;
  }
}

__global__ void __launch_bounds__(kThreads) product(Parameters p) {
  extern __shared__ __align__(128) char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  auto block = Swizzle().get_tile_offset(p.swizzle);
  // The grid is rounded up to whole swizzles.
  if (block.m() >= p.grid.m() || block.n() >= p.grid.n()) return;
  int row = block.m() * Tile::kM;
  int token = block.n() * Tile::kN;
  int thread = threadIdx.x;
  int warp = cutlass::canonical_warp_idx_sync();
  int kept = p.size.k() / Mma::kSparse;

  typename Mma::IteratorA values(p.values_layout, p.values, {p.size.m(), kept}, thread, {row, 0});
  typename Mma::IteratorB x(p.x_layout, p.x, {p.size.k(), p.size.n()}, thread, {0, token});
  typename Mma::IteratorE metadata(p.metadata_layout, p.metadata, {p.size.m(), kept / Mma::kElementsPerElementE},
                                   thread, {row, 0});
  typename Mma::FragmentC accumulators;
  accumulators.clear();
  Mma mma(shared.main_loop, thread, warp, thread % 32);
  mma(p.size.k() / Tile::kK, accumulators, values, x, metadata, accumulators);

  // Copies ahead of the last step may still be on their way to the memory that is now used anew.
  cutlass::arch::cp_async_wait<0>();
  __syncthreads();
  stage(shared, accumulators, warp, thread % 32);
  __syncthreads();
  store(p, shared, row, token);
}

}  // namespace

extern "C" int slope_product(int rows, int columns, int tokens, const void* values, const void* metadata,
                             const void* x, const void* bias, const void* addend, void* y, int device, int processors,
                             void* stream) {
  (void)device, (void)processors;
  cutlass::gemm::GemmCoord size(rows, tokens, columns);
  auto grid = Swizzle::get_tiled_shape(size, {Tile::kM, Tile::kN, Tile::kK}, 1);
  int swizzle = Swizzle::get_log_tile(grid);
  Parameters parameters{
      size,
      grid,
      swizzle,
      cutlass::layout::RowMajor(columns / Mma::kSparse),
      cutlass::layout::ColumnMajor(columns),
      typename Mma::LayoutE(Mma::LayoutE::packed({rows, columns / Mma::kSparse / Mma::kElementsPerElementE})),
      static_cast<Element*>(const_cast<void*>(values)),
      static_cast<Element*>(const_cast<void*>(x)),
      static_cast<typename Mma::ElementE*>(const_cast<void*>(metadata)),
      static_cast<const Element*>(bias),
      static_cast<const Element*>(addend),
      static_cast<Element*>(y),
  };
  // Once a device would do; asking which device this is takes as long as saying it again.
  cudaError_t error = cudaFuncSetAttribute(product, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (error != cudaSuccess) return error;
  product<<<Swizzle::get_grid_shape(grid), kThreads, sizeof(Shared), static_cast<cudaStream_t>(stream)>>>(parameters);
  return cudaGetLastError();
}

extern "C" const char* slope_reason(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
