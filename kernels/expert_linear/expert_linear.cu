#include <algorithm>
#include <cassert>

#include "common/cuda/launch.cuh"
#include "expert_linear/expert_linear.cuh"
#include "expert_linear/linear_launch.h"

namespace micro_kernels::cuda {
namespace {

template <class T, class Group>
bool all_fast(const Group* groups, int64_t count) {
  return std::all_of(groups, groups + count, [](const Group& g) { return fast_factors<T>(g); });
}

// Calls body.operator()<rows of a tile, path>() with those of many rows.
template <class T, class Body>
Status with_many_rows(bool chunks, bool tf32, Body&& body) {
  if (!chunks) return body.template operator()<kSlowRows<T>, Path::kAnywhere>();
  if constexpr (std::is_same_v<T, float>)
    if (tf32) return body.template operator()<kManyRows<T>, Path::kTf32>();
  return body.template operator()<kManyRows<T>, Path::kChunks>();
}

// Calls body.operator()<T, rows of a tile, path>() for a product whose tiles' rows are rows of the groups.
template <class Group, class Body>
Status with_tile(const Group* groups, int64_t count, DType dtype, bool tf32, Body&& body) {
  return dispatch_device(dtype, [&]<class T>() {
    const bool chunks = all_fast<T>(groups, count);
    if constexpr (sizeof(T) == 2)
      if (chunks && std::all_of(groups, groups + count, [](const Group& g) { return fits_few_rows<T>(g); }))
        return body.template operator()<T, kFewRows, Path::kChunks>();
    return with_many_rows<T>(chunks, tf32,
                             [&]<int kRows, Path kPath>() { return body.template operator()<T, kRows, kPath>(); });
  });
}

template <class T, int kRows, class Group, class RowTiles, class ColumnTiles>
Status launch_groups(void (*kernel)(LinearLaunch<Group>), const Group* groups, int64_t count, void* stream,
                     const RowTiles& row_tiles, const ColumnTiles& column_tiles) {
  assert(0 < count && count <= kMostGroups);
  LinearLaunch<Group> params{};
  int64_t blocks = 0;
  params.count = static_cast<int>(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t down = row_tiles(groups[i]);
    params.groups[i] = groups[i];
    params.first_block[i] = static_cast<unsigned>(blocks);
    params.row_tiles[i] = static_cast<unsigned>(down);
    params.fast_result[i] = fast_result<T>(groups[i]);
    params.positions[i] = Remainder(positions(groups[i]));
    blocks += down * column_tiles(groups[i]);
  }
  if (blocks == 0) return Status::kOk;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kLinearThreads), sizeof(LinearShared<T, kRows>),
                stream, params);
}

}  // namespace

Status linear(const LinearGroup* groups, int64_t count, DType dtype, void* stream, bool tf32) {
  return with_tile(groups, count, dtype, tf32, [&]<class T, int kRows, Path kPath>() {
    for (int64_t i = 0; i < count; ++i)
      if (groups[i].cos && !can_rotate<T, kRows>(groups[i])) return Status::kUnsupported;
    return launch_groups<T, kRows>(
        linear_kernel<T, kRows, kPath>, groups, count, stream,
        [](const LinearGroup& g) { return row_tiles(g.rows, g.experts, g.offsets != nullptr, kRows); },
        [](const LinearGroup& g) { return pieces(g.out, kTileColumns<T, kRows> / (g.up ? 2 : 1)); });
  });
}

Status linear_grad_x(const LinearGradXGroup* groups, int64_t count, DType dtype, void* stream, bool tf32) {
  return with_tile(groups, count, dtype, tf32, [&]<class T, int kRows, Path kPath>() {
    return launch_groups<T, kRows>(
        linear_grad_x_kernel<T, kRows, kPath>, groups, count, stream,
        [](const LinearGradXGroup& g) {
          return row_tiles(g.rows, g.sum_experts ? 1 : g.experts, g.offsets != nullptr, kRows);
        },
        [](const LinearGradXGroup& g) { return pieces(g.in, kTileColumns<T, kRows>); });
  });
}

Status linear_grad_weight(const LinearGradWeightGroup* groups, int64_t count, DType dtype, void* stream, bool tf32) {
  return dispatch_device(dtype, [&]<class T>() {
    return with_many_rows<T>(all_fast<T>(groups, count), tf32, [&]<int kRows, Path kPath>() {
      return launch_groups<T, kRows>(
          linear_grad_weight_kernel<T, kRows, kPath>, groups, count, stream,
          [](const LinearGradWeightGroup& g) { return g.experts * pieces(g.out, kRows); },
          [](const LinearGradWeightGroup& g) { return pieces(g.in, kTileColumns<T, kRows>); });
    });
  });
}

// ---- the operator --------------------------------------------------------------------------------------------------

Status expert_linear(const ExpertLinearParams& p, void* stream) {
  LinearGroup group;
  group.x = {p.x, nullptr, p.in};
  group.weight = p.weight;
  group.weight_expert_stride = p.out * p.in;
  group.y = {p.y, nullptr, p.out};
  group.offsets = p.offsets;
  group.rows = p.rows, group.experts = p.experts, group.in = p.in, group.out = p.out;
  return linear(&group, 1, p.dtype, stream, p.tf32);
}

Status expert_linear_backward(const ExpertLinearBackwardParams& p, void* stream) {
  const ConstRows grad_y{p.grad_y, nullptr, p.out};
  if (p.grad_x) {
    LinearGradXGroup group;
    group.sources[0] = {.grad_y = grad_y, .weight = p.weight, .weight_expert_stride = p.out * p.in, .out = p.out};
    group.grad_x = {p.grad_x, nullptr, p.in};
    group.offsets = p.offsets;
    group.rows = p.rows, group.experts = p.experts, group.in = p.in;
    const Status status = linear_grad_x(&group, 1, p.dtype, stream, p.tf32);
    if (status != Status::kOk) return status;
  }
  if (!p.grad_weight) return Status::kOk;
  LinearGradWeightGroup group;
  group.grad_y = grad_y;
  group.x = {p.x, nullptr, p.in};
  group.grad_weight = p.grad_weight;
  group.offsets = p.offsets;
  group.rows = p.rows, group.experts = p.experts, group.in = p.in, group.out = p.out;
  return linear_grad_weight(&group, 1, p.dtype, stream, p.tf32);
}

}  // namespace micro_kernels::cuda
