// A CUDA device that is this process's own memory, for tests of what stands above the kernels where there is no GPU.
// Tensors say "cuda", torch's operators run on the host, every wait of the host for the device is noted.
//   micro_emulated  linked with micro's operators and the emulated kernels (MICRO_EMULATED): takes libmicro's place
//   pretend_cuda    beside libmicro, whose kernels find no driver
//
// For a torch without CUDA only: another one has the real things under these names.

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#ifdef MICRO_EMULATED
#include "emu/machine.h"
namespace emu = micro_kernels::emu;
#else
namespace emu {
void* allocate(size_t bytes) { return std::aligned_alloc(256, (bytes + 255) / 256 * 256); }
void release(void* memory) { std::free(memory); }
void written_by_host(void*, size_t) {}
}  // namespace emu
#endif

namespace {

using at::Tensor;
using c10::IValue;

const c10::Device kDevice(c10::kCUDA, 0);
constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

// ---- waits of the host ---------------------------------------------------------------------------------------------

std::mutex waits_lock;
std::vector<std::string> waits;

void note_wait(const std::string& what) {
  const std::lock_guard guard(waits_lock);
  waits.push_back(what);
}

std::vector<std::string> take_waits() {
  const std::lock_guard guard(waits_lock);
  return std::exchange(waits, {});
}

// torch's operators that look at values on the host before they return.
const std::set<std::string> kWaiting{"aten::_local_scalar_dense",
                                     "aten::nonzero",
                                     "aten::masked_select",
                                     "aten::_unique2",
                                     "aten::equal",
                                     "aten::bincount",
                                     "aten::is_nonzero",
                                     "aten::unique_consecutive",
                                     "aten::repeat_interleave"};

// ---- device, stream and memory -------------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream getDefaultStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  void* getStreamNativeHandle(const c10::Stream) const override { return nullptr; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  // All work is done when a call returns.
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override { note_wait("synchronizeEvent"); }
  void synchronizeStream(const c10::Stream&) const override { note_wait("synchronizeStream"); }
  void synchronizeDevice(const c10::DeviceIndex) const override { note_wait("synchronizeDevice"); }
};

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? emu::allocate(bytes) : nullptr;
    return {data, data, &Memory::free, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &Memory::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
    emu::written_by_host(to, bytes);
  }
  static void free(void* data) {
    if (data) emu::release(data);
  }
};

Memory memory;

Tensor empty(c10::SymIntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(sizes), &memory, kKeys, c10::dtype_or_default(dtype),
                                   format);
}

Tensor empty_strided(c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), &memory,
                                           kKeys, c10::dtype_or_default(dtype));
}

// ---- torch's operators, on the host --------------------------------------------------------------------------------

Tensor with_layout(const c10::Storage& storage, c10::DispatchKeySet keys, const Tensor& like) {
  Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), keys, like.dtype());
  tensor.unsafeGetTensorImpl()->set_storage_offset(like.storage_offset());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides());
  return tensor;
}

// The tensors of one call as the host sees them: the same bytes.
class HostView {
 public:
  Tensor of(const Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    for (const auto& [device, host] : tensors_)
      if (device.is_same(tensor)) return host;
    const Tensor host = with_layout(storage(tensor.storage()), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor);
    tensors_.emplace_back(tensor, host);
    return host;
  }

  // A result of the host as one of the device: what was given, a view of it, or something new.
  Tensor back(const Tensor& host) {
    if (!host.defined()) return host;
    for (const auto& [device, view] : tensors_)
      if (view.is_same(host)) return device;
    for (const auto& [device, view] : storages_)
      if (view.is_alias_of(host.storage())) return with_layout(device, kKeys, host);
    return with_layout(copied(host.storage()), kKeys, host);
  }

  // After the call: the host has written to `tensor`, and may have given it another size.
  void was_written(const Tensor& tensor) {
    const Tensor host = of(tensor);
    if (host.is_same(tensor)) return;
    auto* impl = tensor.unsafeGetTensorImpl();
    if (host.storage().data() != tensor.storage().data()) impl->set_storage_keep_dtype(copied(host.storage()));
    if (host.sizes() != tensor.sizes() || host.strides() != tensor.strides())
      impl->set_sizes_and_strides(host.sizes(), host.strides());
    if (tensor.storage().nbytes()) emu::written_by_host(tensor.storage().mutable_data(), tensor.storage().nbytes());
  }

 private:
  c10::Storage storage(const c10::Storage& device) {
    for (const auto& [known, host] : storages_)
      if (known.is_alias_of(device)) return host;
    void* data = device.mutable_data();
    c10::Storage host(
        c10::Storage::use_byte_size_t(), device.nbytes(),
        c10::DataPtr(
            data, new c10::Storage(device), [](void* kept) { delete static_cast<c10::Storage*>(kept); }, c10::kCPU),
        c10::GetCPUAllocator(), /*resizable=*/true);
    storages_.emplace_back(device, host);
    return host;
  }

  static c10::Storage copied(const c10::Storage& host) {
    c10::Storage device(c10::Storage::use_byte_size_t(), host.nbytes(), &memory, /*resizable=*/true);
    if (host.nbytes()) memory.copy_data(device.mutable_data(), host.data(), host.nbytes());
    return device;
  }

  std::vector<std::pair<Tensor, Tensor>> tensors_;  // of the device, of the host
  std::vector<std::pair<c10::Storage, c10::Storage>> storages_;
};

IValue each_tensor(const IValue& value, const std::function<Tensor(const Tensor&)>& change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorVector()) list.push_back(change(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector())
      list.push_back(tensor ? std::optional(change(*tensor)) : std::nullopt);
    return list;
  }
  if (value.isDevice() && value.toDevice().is_cuda()) return c10::Device(c10::kCPU);
  return value;
}

bool looks_at_a_mask(const std::string& name, const torch::jit::Stack& arguments) {
  if (!name.starts_with("aten::index") && !name.starts_with("aten::_index_put")) return false;
  for (const IValue& value : arguments) {
    if (!value.isOptionalTensorList()) continue;
    for (const std::optional<Tensor>& index : value.toOptionalTensorVector())
      if (index && index->defined() && (index->scalar_type() == at::kBool || index->scalar_type() == at::kByte))
        return true;
  }
  return false;
}

void on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t count = schema.arguments().size();
  const torch::jit::Stack given(stack->end() - static_cast<int64_t>(count), stack->end());
  if (kWaiting.contains(schema.name()) || looks_at_a_mask(schema.name(), given)) note_wait(schema.name());
  HostView view;
  torch::jit::Stack call;
  for (const IValue& value : given) call.push_back(each_tensor(value, [&](const Tensor& t) { return view.of(t); }));
  op.callBoxed(&call);
  for (size_t i = 0; i < count; ++i) {
    const auto* alias = schema.arguments()[i].alias_info();
    if (alias && alias->isWrite())
      each_tensor(given[i], [&](const Tensor& tensor) {
        view.was_written(tensor);
        return tensor;
      });
  }
  stack->resize(stack->size() - count);
  for (const IValue& value : call)
    stack->push_back(each_tensor(value, [&](const Tensor& tensor) { return view.back(tensor); }));
}

Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  if (to.is_cpu() && from.numel() > 0) note_wait("a copy to the host");
  if (from.is_cpu() && !non_blocking && from.numel() > 0) note_wait("a blocking copy from the host");
  HostView view;
  view.of(to).copy_(view.of(from));
  if (to.is_cuda()) view.was_written(to);
  return to;
}

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

namespace at {
// What torch asks about CUDA as a whole. The registry finds it by this name.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  Allocator* getCUDADeviceAllocator() const override { return &memory; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
}

TORCH_LIBRARY(pretend_cuda, m) { m.def("take_waits() -> str[]", take_waits); }
