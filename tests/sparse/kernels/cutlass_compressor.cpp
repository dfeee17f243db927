// CUTLASS's own compressor for Hopper, which it writes for a card, run by a block of threads of the CPU.
//
// Compiled as C++, CUTLASS's device functions are plain ones. What they find on a card is given here: which thread of
// which block one is, and a barrier.

#include <cuda_runtime.h>

#include <barrier>
#include <thread>
#include <vector>

static thread_local dim3 threadIdx, blockIdx;
static dim3 gridDim, blockDim;
static std::barrier<>* block_barrier;
static void __syncthreads() { block_barrier->arrive_and_wait(); }

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/gemm/collective/builders/sm90_sparse_config.inl"
#include "cutlass/gemm/gemm.h"
#include "cutlass/transform/kernel/sm90_sparse_gemm_compressor.hpp"

using namespace cute;

using Element = cutlass::half_t;
// That of sm90.cu, which asserts it.
using Config = cutlass::Sm90GemmSparseConfig<sparse_elem<2, Element>, GMMA::Major::K, sparse_elem<8, uint8_t>, _64>;
using Compressor = cutlass::transform::kernel::SM90StructuredSparseCompressor<Shape<int, int, int, int>, Element,
                                                                              cutlass::layout::RowMajor, Config>;

// dense [rows, columns] -> values [rows, columns / 2] and metadata [rows * columns / 8]
extern "C" void compress(int rows, int columns, void* dense, void* values, void* metadata) {
  Compressor::Params params{};
  params.problem_shape = make_shape(rows, 1, columns, 1);
  params.transform.ptr_A = dense;
  get<0>(params.transform.dA) = columns;
  params.transform.ptr_ACompress = values;
  params.transform.ptr_E = metadata;
  gridDim = Compressor::get_grid_shape(params);
  blockDim = Compressor::get_block_shape();
  std::barrier<> barrier(blockDim.x);
  block_barrier = &barrier;
  alignas(128) static char shared[Compressor::SharedStorageSize];
  for (unsigned y = 0; y < gridDim.y; ++y)
    for (unsigned x = 0; x < gridDim.x; ++x) {
      std::vector<std::thread> threads;
      for (unsigned t = 0; t < blockDim.x; ++t)
        threads.emplace_back([=] {
          threadIdx = dim3(t, 0, 0);
          blockIdx = dim3(x, y, 0);
          Compressor::run(params, shared);
        });
      for (auto& thread : threads) thread.join();
    }
}
