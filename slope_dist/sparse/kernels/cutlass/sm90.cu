// Products of 2:4 weights on Hopper, by the sparse collective of CUTLASS 3: one tile shape and element type a library.
//
// What is computed is Y^T [O, T] = W [O, I] X^T [I, T]: Hopper's sparse instruction takes its sparse operand from the
// left. Y^T in columns is Y in rows, so nothing is transposed in memory.
//
// Given by tiles.py: SLOPE_ELEMENT, SLOPE_TILE_M, SLOPE_TILE_N, SLOPE_CLUSTER_M, SLOPE_COOPERATIVE (0 or 1). All tiles
// are 64 deep, because the order of the metadata depends on the depth.

#include <cuda_runtime.h>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/operations.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

namespace {

using namespace cute;

using Element = SLOPE_ELEMENT;
using Tile = Shape<Int<SLOPE_TILE_M>, Int<SLOPE_TILE_N>, _64>;
using Cluster = Shape<Int<SLOPE_CLUSTER_M>, _1, _1>;
using Columns = cutlass::layout::ColumnMajor;
// Entries of the 16 bytes that a tensor map asks for.
constexpr int kAlignment = 128 / cutlass::sizeof_bits<Element>::value;

#if SLOPE_COOPERATIVE
using MainloopSchedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecializedCooperative;
#else
using MainloopSchedule = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecialized;
#endif

// Bias and addend join the accumulator in fp32: one rounding.
using Fusion = cutlass::epilogue::fusion::LinCombPerRowBias<Element, float, Element, Element>;

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, Element, Columns, kAlignment, Element, Columns,
    kAlignment, EpilogueSchedule, Fusion>::CollectiveOp;

using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Element, cutlass::layout::RowMajor, 2 * kAlignment,
    Element, Columns, kAlignment, float, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
    MainloopSchedule>::CollectiveOp;
using Config = typename Mainloop::SparseConfig;
// The order that layout.py makes; a test holds that against CUTLASS's own compressor.
static_assert(is_same_v<Config, cutlass::Sm90GemmSparseConfig<sparse_elem<2, Element>, GMMA::Major::K,
                                                              sparse_elem<8, uint8_t>, _64>>);

using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

}  // namespace

extern "C" int slope_product(int rows, int columns, int tokens, const void* values, const void* metadata,
                             const void* x, const void* bias, const void* addend, void* y, int device, int processors,
                             void* stream) {
  auto shape = make_shape(rows, tokens, columns, 1);
  typename Gemm::Arguments arguments;
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = shape;
  arguments.mainloop.ptr_A = static_cast<const Element*>(values);
  arguments.mainloop.layout_a = Config::fill_layoutA(shape);
  arguments.mainloop.ptr_B = static_cast<const Element*>(x);
  get<0>(arguments.mainloop.dB) = columns;
  arguments.mainloop.ptr_E = static_cast<const typename Mainloop::ElementE*>(metadata);
  arguments.mainloop.layout_e = Config::fill_layoutE(shape);
  arguments.epilogue.thread.beta = addend ? 1.0f : 0.0f;
  arguments.epilogue.thread.bias_ptr = static_cast<const Element*>(bias);
  // A tensor map cannot be made of a null pointer; with beta 0 what it describes is not read.
  arguments.epilogue.ptr_C = static_cast<const Element*>(addend ? addend : y);
  get<1>(arguments.epilogue.dC) = rows;
  arguments.epilogue.ptr_D = static_cast<Element*>(y);
  get<1>(arguments.epilogue.dD) = rows;
  // Asking the driver in every call would take longer than the launch.
  arguments.hw_info.device_id = device;
  arguments.hw_info.sm_count = processors;

  if (Gemm::get_workspace_size(arguments) != 0) return static_cast<int>(cutlass::Status::kErrorWorkspaceNull);
  cutlass::Status status = Gemm::can_implement(arguments);
  if (status != cutlass::Status::kSuccess) return static_cast<int>(status);
  Gemm gemm;
  return static_cast<int>(gemm.run(arguments, nullptr, static_cast<cudaStream_t>(stream)));
}

extern "C" const char* slope_reason(int code) { return cutlassGetStatusString(static_cast<cutlass::Status>(code)); }
