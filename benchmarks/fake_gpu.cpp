// A CUDA device for torch's CPU build, whose tensors have shapes, strides, types and no numbers.
//
// An operator on them runs torch's kernel for "meta" tensors, which computes shapes, and its results
// become tensors of the GPU. Numbers that reach the host are 1.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <unordered_set>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::DispatchKey;
using c10::IValue;
using c10::OperatorHandle;
using c10::Storage;
using c10::Stream;
using torch::jit::Stack;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Device exchangeDevice(Device device) const override { return device; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Stream getStream(Device device) const noexcept override { return getDefaultStream(device); }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
};

Guard guard;
const Device GPU(DeviceType::CUDA, 0), SHAPES(DeviceType::Meta);

// --- tensors without numbers --------------------------------------------------------------------

Storage storage(size_t bytes, Device device) {
  auto* allocator = device.is_meta() ? c10::GetAllocator(DeviceType::Meta) : nullptr;
  auto nothing = at::DataPtr(nullptr, device);
  return Storage(Storage::use_byte_size_t(), bytes, std::move(nothing), allocator, device.is_meta());
}

Tensor like(const Tensor& x, Storage storage, DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), x.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
  return made;
}

// The tensors of the GPU in one call, each with its shape.
class Call {
 public:
  explicit Call(const std::string& name) : name_(name) {}

  Tensor shape(const Tensor& x) {
    if (!x.defined() || (!x.is_cuda() && x.dim() == 0)) return x;
    TORCH_CHECK(x.is_cuda(), name_, ": expected all tensors on the GPU, found one on ", x.device());
    for (auto& [real, known] : pairs_)
      if (real.is_same(x)) return known;
    auto made = like(x, storage(x.storage().nbytes(), SHAPES), DispatchKey::Meta);
    pairs_.emplace_back(x, made);
    return made;
  }

  // The tensor of the GPU for a result: an argument, a view of one, or a new tensor.
  Tensor result(const Tensor& x) {
    if (!x.defined()) return x;
    for (auto& [real, known] : pairs_) {
      if (known.is_same(x)) return real;
      if (known.storage().unsafeGetStorageImpl() == x.storage().unsafeGetStorageImpl())
        return like(x, real.storage(), DispatchKey::CUDA);
    }
    return like(x, storage(x.storage().nbytes(), GPU), DispatchKey::CUDA);
  }

  // Give arguments the shapes that the call has given them in place.
  void resize() {
    for (auto& [real, known] : pairs_) {
      if (real.sizes() == known.sizes() && real.strides() == known.strides()) continue;
      real.storage().unsafeGetStorageImpl()->set_nbytes(known.storage().nbytes());
      real.unsafeGetTensorImpl()->set_sizes_and_strides(known.sizes(), known.strides(), known.storage_offset());
    }
  }

 private:
  std::string name_;
  std::vector<std::pair<Tensor, Tensor>> pairs_;
};

template <class F>
IValue mapped(const IValue& value, F&& f) {
  if (value.isTensor()) return f(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& x : value.toTensorVector()) list.push_back(f(x));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor>& x : value.toOptionalTensorList())
      list.push_back(x ? std::optional<Tensor>(f(*x)) : std::nullopt);
    return list;
  }
  return value;
}

// --- kernels ------------------------------------------------------------------------------------

void by_shape(const OperatorHandle& op, Stack* stack) {
  Call call(op.schema().name());
  for (auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    auto& argument = const_cast<IValue&>(value);
    argument = value.isDevice() ? IValue(SHAPES) : mapped(value, [&](const Tensor& x) { return call.shape(x); });
  }
  op.redispatchBoxed(c10::DispatchKeySet(DispatchKey::Meta), stack);
  call.resize();
  for (auto& value : torch::jit::last(*stack, op.schema().returns().size()))
    const_cast<IValue&>(value) = mapped(value, [&](const Tensor& x) { return call.result(x); });
}

// Operators that change lists of tensors in place.
void nothing(const OperatorHandle& op, Stack* stack) {
  torch::jit::drop(*stack, op.schema().arguments().size());
}

// Pointwise operators: quick where all tensors are alike, and by shape elsewhere.
void pointwise(const OperatorHandle& op, Stack* stack) {
  const Tensor* first = nullptr;
  bool alike = true;
  for (auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (!value.isTensor()) continue;
    const Tensor& x = value.toTensor();
    if (x.unsafeGetTensorImpl()->is_wrapped_number()) continue;
    first = first ? first : &x;
    alike = alike && x.is_cuda() && x.is_floating_point() && x.dtype() == first->dtype() &&
            x.sizes() == first->sizes() && x.strides() == first->strides();
  }
  if (!first || !alike || !first->is_non_overlapping_and_dense()) return by_shape(op, stack);
  auto made = like(*first, storage(first->numel() * first->element_size(), GPU), DispatchKey::CUDA);
  made.unsafeGetTensorImpl()->set_sizes_and_strides(first->sizes(), first->strides(), 0);
  torch::jit::drop(*stack, op.schema().arguments().size());
  stack->emplace_back(std::move(made));
}

void copy(const OperatorHandle&, Stack* stack) {
  auto target = (*stack)[stack->size() - 3].toTensor();
  if (target.is_cpu()) target.fill_(1);
  torch::jit::drop(*stack, 3);
  stack->emplace_back(std::move(target));
}

void item(const OperatorHandle&, Stack* stack) {
  bool whole = !torch::jit::pop(*stack).toTensor().is_floating_point();
  stack->emplace_back(whole ? at::Scalar(1) : at::Scalar(1.0));
}

// Results and gradients of a convolution are channels last if its input or its weight is.
at::MemoryFormat format_of(const Tensor& x, const Tensor& weight) {
  for (const auto& each : {x, weight})
    if (each.suggest_memory_format() == at::MemoryFormat::ChannelsLast) return at::MemoryFormat::ChannelsLast;
  return at::MemoryFormat::Contiguous;
}

void convolution(const OperatorHandle& op, Stack* stack) {
  auto x = (*stack)[stack->size() - 9].toTensor(), weight = (*stack)[stack->size() - 8].toTensor();
  by_shape(op, stack);
  auto sizes = torch::jit::pop(*stack).toTensor().sizes().vec();
  stack->emplace_back(at::empty(sizes, x.options().memory_format(format_of(x, weight))));
}

void convolution_backward(const OperatorHandle&, Stack* stack) {
  auto x = (*stack)[stack->size() - 10].toTensor(), weight = (*stack)[stack->size() - 9].toTensor();
  auto mask = stack->back().toBoolList();
  auto format = format_of(x, weight);
  torch::jit::drop(*stack, 11);
  auto gradient = [&](bool wanted, at::IntArrayRef sizes, at::MemoryFormat format) {
    return wanted ? at::empty(sizes, x.options().memory_format(format)) : Tensor();
  };
  stack->emplace_back(gradient(mask[0], x.sizes(), format));
  stack->emplace_back(gradient(mask[1], weight.sizes(), format));
  stack->emplace_back(gradient(mask[2], {weight.size(0)}, at::MemoryFormat::Contiguous));
}

// Group norm takes and returns NCHW.
void group_norm(const OperatorHandle&, Stack* stack) {
  auto x = (*stack)[stack->size() - 8].toTensor();
  auto groups = (*stack)[stack->size() - 2].toInt();
  torch::jit::drop(*stack, 8);
  stack->emplace_back(at::empty(x.sizes(), x.options()));
  for (int n = 0; n < 2; ++n) stack->emplace_back(at::empty({x.size(0), groups}, x.options()));
}

// The norm of each tensor of a list.
void norms(const OperatorHandle& op, Stack* stack) {
  auto list = (*stack)[stack->size() - op.schema().arguments().size()].toTensorVector();
  c10::List<Tensor> made;
  for (const auto& x : list) made.push_back(at::empty({}, x.options()));
  torch::jit::drop(*stack, op.schema().arguments().size());
  stack->emplace_back(std::move(made));
}

template <void (*kernel)(const OperatorHandle&, Stack*)>
torch::CppFunction boxed() {
  return torch::CppFunction::makeFromBoxedFunction<kernel>();
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(boxed<&by_shape>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("copy_", boxed<&copy>());
  m.impl("_local_scalar_dense", boxed<&item>());
  m.impl("convolution", boxed<&convolution>());
  m.impl("convolution_backward", boxed<&convolution_backward>());
  m.impl("native_group_norm", boxed<&group_norm>());
  m.impl("_foreach_norm.Scalar", boxed<&norms>());
  // It has a kernel on a GPU; elsewhere torch composes it of others.
  m.impl("native_layer_norm", boxed<&by_shape>());
  for (const char* name :
       {"_foreach_add_.Scalar", "_foreach_add_.List", "_foreach_mul_.Scalar", "_foreach_mul_.Tensor", "_foreach_mul_.List",
        "_foreach_div_.Scalar", "_foreach_div_.Tensor", "_foreach_lerp_.Scalar", "_foreach_lerp_.List",
        "_foreach_copy_", "_fused_adam_", "_fused_adamw_"})
    m.impl(name, boxed<&nothing>());
  for (const char* name :
       {"add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "addcmul", "pow.Tensor_Scalar", "neg", "exp", "log", "sqrt",
        "rsqrt", "sin", "cos", "sigmoid", "softplus", "silu", "silu_backward", "gelu", "gelu_backward"})
    m.impl(name, boxed<&pointwise>());
}

// --- pinned memory of the host ------------------------------------------------------------------

struct Pinned final : at::Allocator {
  std::unordered_set<const void*> known;

  c10::DataPtr allocate(size_t bytes) override {
    auto* memory = new c10::DataPtr(c10::GetAllocator(DeviceType::CPU)->allocate(bytes));
    known.insert(memory->get());
    return {memory->get(), memory, &release, Device(DeviceType::CPU)};
  }
  static void release(void* memory);
  void copy_data(void* target, const void* source, size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }
};

Pinned pinned;

void Pinned::release(void* memory) {
  auto* owner = static_cast<c10::DataPtr*>(memory);
  pinned.known.erase(owner->get());
  delete owner;
}

}  // namespace

namespace at {
// torch looks for hooks by this name.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
  bool isPinnedPtr(const void* memory) const override { return pinned.known.count(memory) > 0; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at

extern "C" void install() {
  auto place = static_cast<size_t>(DeviceType::CUDA);
  c10::impl::device_guard_impl_registry[place].store(&guard);
}
