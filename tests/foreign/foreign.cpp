// A device of another type whose memory is host memory: what the wiring for a GPU is tested with where there is none.
//
// Its tensors say `foreign:0`. An operator that gets one is handed to the CPU's kernel, which sees CPU tensors on the
// very same memory, so the results are the CPU's bit for bit, and writes land where they should. What the kernel made
// is foreign afterwards. Before that, tensors of two devices in one operator are refused as CUDA refuses them.

#include <limits>
#include <mutex>
#include <map>
#include <atomic>
#include <cstdlib>
#include <vector>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/Operators.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_fused_sdp_choice_ops.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

namespace {

using at::Tensor;
using c10::Device;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using c10::Storage;
using torch::jit::Stack;

constexpr auto kForeign = c10::DeviceType::PrivateUse1;
constexpr auto kForeignBit = c10::BackendComponent::PrivateUse1Bit;
constexpr auto kHostBit = c10::BackendComponent::CPUBit;
const Device kDevice(kForeign, 0);

// -- memory ----------------------------------------------------------------------------------------------------------

std::atomic<int64_t> allocated_bytes{0};
std::atomic<int64_t> peak_bytes{0};

// As a caching allocator has it: sizes are rounded up, what is freed is kept, and at the cap there is an error.
std::atomic<int64_t> rounding_bytes{1};
std::atomic<int64_t> held_bytes{0};
std::atomic<int64_t> reserved_bytes{0};
std::atomic<int64_t> cap_bytes{std::numeric_limits<int64_t>::max()};

int64_t hold(int64_t bytes) {
  const int64_t step = rounding_bytes.load();
  const int64_t rounded = (bytes + step - 1) / step * step;
  const int64_t now = held_bytes.fetch_add(rounded) + rounded;
  if (now > cap_bytes.load()) {
    held_bytes -= rounded;
    TORCH_CHECK_WITH(OutOfMemoryError, false, "foreign out of memory. Tried to allocate ", bytes, " bytes with ",
                     now - rounded, " held of ", cap_bytes.load(), " that are allowed");
  }
  int64_t reserved = reserved_bytes.load();
  while (now > reserved && !reserved_bytes.compare_exchange_weak(reserved, now)) {
  }
  return rounded;
}

void count(int64_t bytes) {
  const int64_t now = allocated_bytes.fetch_add(bytes) + bytes;
  int64_t peak = peak_bytes.load();
  while (now > peak && !peak_bytes.compare_exchange_weak(peak, now)) {
  }
}

// Who gives memory in the CPU allocator's place, by the functions that torch.cuda.MemPool would call; nobody at first.
using Malloc = void* (*)(ssize_t, int, void*);
using Free = void (*)(void*, ssize_t, int, void*);
std::atomic<Malloc> route_malloc{nullptr};
std::atomic<Free> route_free{nullptr};

// As torch does it keeps what is freed, until it is told to empty its cache, for tensors of about that size.
std::mutex kept_mutex;
std::multimap<int64_t, void*> kept;

void* routed(int64_t bytes, int64_t* size) {
  const int64_t step = rounding_bytes.load();
  *size = (bytes + step - 1) / step * step;
  {
    std::lock_guard<std::mutex> guard(kept_mutex);
    auto found = kept.lower_bound(*size);
    if (found != kept.end() && found->first <= 2 * *size) {
      void* address = found->second;
      *size = found->first;
      kept.erase(found);
      return address;
    }
  }
  return route_malloc.load()(static_cast<ssize_t>(*size), 0, nullptr);
}

// Memory that the CPU's allocator gave, or whoever is in its place. What a CPU kernel made becomes foreign without a copy, and counts from then on.
struct Counted {
  c10::DataPtr memory;
  Storage storage;  // of the CPU tensor that it was, or none
  int64_t bytes;
  int64_t held;
  void* routed;  // memory that is kept when it is freed
};

void uncount(void* context) {
  auto* counted = static_cast<Counted*>(context);
  allocated_bytes -= counted->bytes;
  held_bytes -= counted->held;
  if (counted->routed) {
    std::lock_guard<std::mutex> guard(kept_mutex);
    kept.emplace(counted->held, counted->routed);
  }
  delete counted;
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (route_malloc.load() && bytes) {
      int64_t size = 0;
      void* address = routed(static_cast<int64_t>(bytes), &size);
      TORCH_CHECK_WITH(OutOfMemoryError, address, "foreign out of memory. Tried to allocate ", bytes, " bytes");
      auto* counted = new Counted{c10::DataPtr(), Storage(), static_cast<int64_t>(bytes), size, address};
      held_bytes += size;
      count(counted->bytes);
      return {address, counted, &uncount, kDevice};
    }
    const int64_t held = hold(static_cast<int64_t>(bytes));
    auto memory = c10::GetAllocator(c10::kCPU)->allocate(bytes);
    void* address = memory.get();
    auto* counted = new Counted{std::move(memory), Storage(), static_cast<int64_t>(bytes), held, nullptr};
    count(counted->bytes);
    return {address, counted, &uncount, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;  // the address alone does not say how much to take off the count
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

Allocator allocator;
REGISTER_ALLOCATOR(kForeign, &allocator)

c10::DataPtr adopted(const Storage& host) {
  const int64_t bytes = static_cast<int64_t>(host.nbytes());
  if (route_malloc.load()) {
    auto memory = allocator.allocate(host.nbytes());
    allocator.copy_data(memory.get(), host.data(), host.nbytes());
    return memory;
  }
  auto* counted = new Counted{c10::DataPtr(), host, bytes, hold(bytes), nullptr};
  count(counted->bytes);
  return {host.mutable_data(), counted, &uncount, kDevice};
}

void let_storage_go(void* context) {
  delete static_cast<Storage*>(context);
}

// -- crossing to the CPU and back ------------------------------------------------------------------------------------

bool is_foreign(const Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == kForeign;
}

// What a tensor is but for its device: dense, conjugated, of inference mode or not.
DispatchKeySet keys_for(const Tensor& like, c10::BackendComponent from, c10::BackendComponent to) {
  const auto keys = like.key_set() - c10::autocast_dispatch_keyset;
  return keys.remove_backend(from) | DispatchKeySet(to) | c10::getAutocastRelatedKeySetFromBackend(to);
}

Tensor on_storage(const Tensor& like, const Storage& storage, c10::BackendComponent from, c10::BackendComponent to) {
  TORCH_CHECK(like.layout() == c10::kStrided, "tests' foreign device has strided tensors only");
  auto result = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, Storage(storage), keys_for(like, from, to), like.dtype());
  auto* impl = result.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number())
    impl->set_wrapped_number(true);
  return result;
}

// The tensors of one call. The same tensor stays the same and shared storages stay shared: kernels look for overlap.
class Crossing {
 public:
  Tensor to_host(const Tensor& tensor) {
    if (!is_foreign(tensor)) {
      if (tensor.defined())
        own_.push_back(tensor);
      return tensor;
    }
    for (const auto& [foreign, host] : tensors_)
      if (foreign.is_same(tensor))
        return host;
    auto host = on_storage(tensor, host_storage(tensor.storage()), kForeignBit, kHostBit);
    // ATen chooses kernels by that (convolutions do).
    if (tensor.requires_grad())
      host.set_requires_grad(true);
    tensors_.emplace_back(tensor, host);
    return host;
  }

  Tensor to_foreign(const Tensor& tensor) {
    if (!tensor.defined() || !tensor.device().is_cpu())
      return tensor;
    for (const auto& own : own_)
      if (own.is_same(tensor))
        return tensor;
    for (const auto& [foreign, host] : tensors_)
      if (host.is_same(tensor))
        return foreign;
    TORCH_CHECK(tensor.layout() == c10::kStrided, "tests' foreign device has strided tensors only");
    return on_storage(tensor, foreign_storage(tensor.storage()), kHostBit, kForeignBit);
  }

  IValue to_host(const IValue& value) {
    if (value.isTensor())
      return to_host(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> hosts;
      for (const auto& tensor : value.toTensorVector())
        hosts.push_back(to_host(tensor));
      return hosts;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> hosts;
      for (const auto& tensor : value.toOptionalTensorVector())
        hosts.push_back(tensor ? std::make_optional(to_host(*tensor)) : std::nullopt);
      return hosts;
    }
    if (value.isDevice() && value.toDevice().type() == kForeign)
      return Device(c10::kCPU);
    if (value.isGenerator())
      return host_generator(value.toGenerator());
    return value;
  }

  IValue to_foreign(const IValue& value) {
    if (value.isTensor())
      return to_foreign(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> foreign;
      for (const auto& tensor : value.toTensorVector())
        foreign.push_back(to_foreign(tensor));
      return foreign;
    }
    return value;
  }

  // What the kernel resized (`out=` of another size, `resize_`) is resized where it came from.
  void finish() {
    for (const auto& entry : storages_) {
      if (!entry.foreign || !entry.lent || entry.host.data() == entry.address)
        continue;
      auto* storage = entry.foreign.unsafeGetStorageImpl();
      storage->set_data_ptr_noswap(adopted(entry.host));
      storage->set_nbytes(entry.host.nbytes());
    }
    for (const auto& [foreign, host] : tensors_)
      if (host.sizes() != foreign.sizes() || host.strides() != foreign.strides() ||
          host.storage_offset() != foreign.storage_offset())
        foreign.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
  }

 private:
  struct Pair {
    Storage foreign, host;
    const void* address;
    bool lent;  // from the foreign tensor to the CPU's kernel; else the kernel made it
  };

  static IValue host_generator(const at::Generator& generator);

  Storage host_storage(const Storage& foreign) {
    for (const auto& pair : storages_)
      if (pair.foreign.is_alias_of(foreign))
        return pair.host;
    void* address = foreign.mutable_data();
    // Holds the memory, should a kernel keep a tensor of its own on it.
    c10::DataPtr memory(address, new Storage(foreign), &let_storage_go, Device(c10::kCPU));
    Storage host(
        Storage::use_byte_size_t(),
        foreign.nbytes(),
        std::move(memory),
        c10::GetAllocator(c10::kCPU),
        foreign.resizable());
    storages_.push_back({foreign, host, address, true});
    return host;
  }

  Storage foreign_storage(const Storage& host) {
    for (const auto& pair : storages_)
      if (pair.host.is_alias_of(host))
        return pair.foreign;
    Storage foreign(Storage::use_byte_size_t(), host.nbytes(), adopted(host), &allocator, true);
    storages_.push_back({foreign, host, host.data(), false});
    return foreign;
  }

  std::vector<std::pair<Tensor, Tensor>> tensors_;
  std::vector<Tensor> own_;  // CPU tensors among the arguments, which stay what they are
  std::vector<Pair> storages_;
};

// -- devices do not mix ----------------------------------------------------------------------------------------------

// `pointwise` is torch's tag for operators that take a tensor without dimensions from the CPU; these do, and lack it.
bool takes_cpu_scalars(const c10::OperatorHandle& op) {
  const auto& name = op.schema().name();
  return op.hasTag(at::Tag::pointwise) || name == "aten::fill_" || name == "aten::index_put_" ||
      name == "aten::index_put" || name == "aten::_index_put_impl_" || name == "aten::masked_fill_" ||
      name == "aten::index_fill_" || name == "aten::index_fill";
}

bool may_be_on_cpu(const c10::OperatorHandle& op, const c10::Argument& argument, const Tensor& tensor) {
  const auto& name = op.schema().name();
  if (argument.name() == "indices" &&
      (name.rfind("aten::index", 0) == 0 || name.rfind("aten::_index_put_impl_", 0) == 0 ||
       name.rfind("aten::_unsafe_index", 0) == 0))
    return true;
  if (argument.name() == "batch_sizes")  // of packed sequences: on the CPU with every device
    return true;
  const bool is_written = argument.alias_info() && argument.alias_info()->isWrite();
  return tensor.dim() == 0 && !is_written && takes_cpu_scalars(op);
}

void check_devices(const c10::OperatorHandle& op, const Stack& stack) {
  const auto& arguments = op.schema().arguments();
  const auto values = torch::jit::last(stack, arguments.size());
  const auto check = [&](const c10::Argument& argument, const Tensor& tensor) {
    if (!tensor.defined() || tensor.device().type() == kForeign || may_be_on_cpu(op, argument, tensor))
      return;
    TORCH_CHECK(
        false,
        "Expected all tensors to be on the same device, but found at least two devices, ",
        kDevice,
        " and ",
        tensor.device(),
        "! (when checking argument for argument ",
        argument.name(),
        " in method ",
        op.operator_name(),
        ")");
  };
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (values[i].isTensor()) {
      check(arguments[i], values[i].toTensor());
    } else if (values[i].isTensorList()) {
      for (const auto& tensor : values[i].toTensorVector())
        check(arguments[i], tensor);
    } else if (values[i].isOptionalTensorList()) {
      for (const auto& tensor : values[i].toOptionalTensorVector())
        if (tensor)
          check(arguments[i], *tensor);
    } else if (values[i].isGenerator()) {
      TORCH_CHECK(
          values[i].toGenerator().device().type() == kForeign,
          "Expected a 'foreign' device type for generator but found '",
          values[i].toGenerator().device().type(),
          "'");
    }
  }
}

// -- operators -------------------------------------------------------------------------------------------------------

// A kernel of the CPU calls others, which must be the CPU's as they are: no gradients, no versions, no casts.
struct OnlyKernels {
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard no_casts{c10::autocast_dispatch_keyset};
};

// What an operator is made of on the CPU is called as there: a view of a weight must know that the weight wants
// gradients, since matmul decides by that.
c10::impl::PODLocalDispatchKeySet with_autograd() {
  auto keys = c10::impl::tls_local_dispatch_key_set();
  const bool is_inference = c10::InferenceMode::is_enabled();
  const DispatchKeySet views(DispatchKey::ADInplaceOrView);
  auto included = is_inference ? keys.included_ : keys.included_ | views;
  auto excluded = (keys.excluded_ - c10::autograd_dispatch_keyset_with_ADInplaceOrView) | c10::autocast_dispatch_keyset;
  if (is_inference)
    excluded = excluded | c10::autograd_dispatch_keyset;
  c10::impl::PODLocalDispatchKeySet result{};
  result.set_included(included);
  result.set_excluded(excluded);
  return result;
}

template <typename Call>
void cross(const c10::OperatorHandle& op, Stack* stack, const Call& call) {
  check_devices(op, *stack);
  Crossing crossing;
  const auto num_arguments = op.schema().arguments().size();
  for (auto i = stack->size() - num_arguments; i < stack->size(); ++i)
    (*stack)[i] = crossing.to_host((*stack)[i]);
  call();
  crossing.finish();
  const auto num_results = op.schema().returns().size();
  for (auto i = stack->size() - num_results; i < stack->size(); ++i)
    (*stack)[i] = crossing.to_foreign((*stack)[i]);
}

void run_on_host(const c10::OperatorHandle& op, DispatchKeySet /*keys*/, Stack* stack) {
  cross(op, stack, [&] {
    OnlyKernels only;
    op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  });
}

void run_parts_on_host(const c10::OperatorHandle& op, DispatchKeySet /*keys*/, Stack* stack) {
  cross(op, stack, [&] {
    {
      c10::impl::ForceDispatchKeyGuard guard(with_autograd());
      op.callBoxed(stack);
    }
    for (auto i = stack->size() - op.schema().returns().size(); i < stack->size(); ++i)
      (*stack)[i] = (*stack)[i].toTensor().detach();  // gradients are found in another way; see Again
  });
}

Tensor empty(
    c10::IntArrayRef size,
    std::optional<c10::ScalarType> dtype,
    std::optional<c10::Layout> /*layout*/,
    std::optional<Device> /*device*/,
    std::optional<bool> pin_memory,
    std::optional<c10::MemoryFormat> format) {
  TORCH_CHECK(!pin_memory.value_or(false), "Only dense CPU tensors can be pinned");
  const DispatchKeySet keys(DispatchKey::PrivateUse1);
  return Tensor(at::detail::empty_generic(size, &allocator, keys, c10::dtype_or_default(dtype), format));
}

Tensor empty_strided(
    c10::IntArrayRef size,
    c10::IntArrayRef stride,
    std::optional<c10::ScalarType> dtype,
    std::optional<c10::Layout> /*layout*/,
    std::optional<Device> /*device*/,
    std::optional<bool> pin_memory) {
  TORCH_CHECK(!pin_memory.value_or(false), "Only dense CPU tensors can be pinned");
  const DispatchKeySet keys(DispatchKey::PrivateUse1);
  return Tensor(at::detail::empty_strided_generic(size, stride, &allocator, keys, c10::dtype_or_default(dtype)));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool /*non_blocking*/) {
  Crossing crossing;
  OnlyKernels only;
  crossing.to_host(to).copy_(crossing.to_host(from));
  return to;
}

Tensor& set_storage(
    Tensor& tensor, Storage storage, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  TORCH_CHECK(storage.device() == tensor.device(), "a storage of ", storage.device(), " for a tensor of ", kDevice);
  std::vector<int64_t> contiguous(size.size(), 1);
  for (auto i = static_cast<int64_t>(size.size()) - 2; i >= 0; --i)
    contiguous[i] = contiguous[i + 1] * std::max<int64_t>(size[i + 1], 1);
  const auto strides = size.size() == stride.size() ? stride : c10::IntArrayRef(contiguous);
  const auto needed = at::detail::computeStorageNbytes(size, strides, tensor.element_size(), offset);
  TORCH_CHECK(needed <= storage.nbytes(), "a storage of ", storage.nbytes(), " bytes is too small for ", needed);
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_sizes_and_strides(size, strides, offset);
  return tensor;
}

Tensor& set_whole_storage(Tensor& tensor, Storage storage) {
  const auto count = static_cast<int64_t>(storage.nbytes() / tensor.element_size());
  return set_storage(tensor, std::move(storage), 0, {count}, {});
}

Tensor& set_nothing(Tensor& tensor) {
  return set_storage(tensor, Storage(Storage::use_byte_size_t(), 0, &allocator, true), 0, {0}, {});
}

void record_stream(Tensor& /*tensor*/, c10::Stream /*stream*/) {}  // everything is done when a call returns

// Other devices have one operator for dropout, whose gradient is scaled in another order than the CPU's is.
Tensor dropout_backward(const Tensor& grad, const Tensor& mask, double scale) {
  return grad.mul(mask.to(grad.scalar_type()).div_(1 / scale));
}

// What attention is made of is the CPU's choice too.
int64_t choose_attention(
    const Tensor& query,
    const Tensor& key,
    const Tensor& value,
    const std::optional<Tensor>& mask,
    double dropout_p,
    bool is_causal,
    std::optional<double> scale,
    bool enable_gqa) {
  // It looks at sizes and settings only, so tensors without memory (Dynamo's) go as they are.
  return at::_ops::_fused_sdp_choice::redispatch(
      DispatchKeySet(DispatchKey::CPU), query, key, value, mask, dropout_p, is_causal, scale, enable_gqa);
}

// -- gradients of operators that are one operator here ---------------------------------------------------------------

std::vector<Tensor> tensors_among(c10::ArrayRef<IValue> values) {
  std::vector<Tensor> found;
  for (const auto& value : values) {
    if (value.isTensor() && value.toTensor().defined())
      found.push_back(value.toTensor());
    else if (value.isTensorList())
      for (const auto& tensor : value.toTensorVector())
        found.push_back(tensor);
  }
  return found;
}

// Recurrent layers are made of other operators, and of other ones for other devices than for the CPU. Here they are one
// operator, as with cuDNN. Its gradients are found by computing it again.
struct Again final : torch::autograd::Node {
  Again(const c10::OperatorHandle& op, c10::ArrayRef<IValue> arguments, torch::autograd::edge_list&& edges)
      : Node(std::move(edges)), op_(op), arguments_(arguments.begin(), arguments.end()) {
    for (const auto& tensor : tensors_among(arguments))
      saved_.emplace_back(tensor, false);
    // Tensors are kept as autograd keeps them, which notices when they are written.
    for (auto& value : arguments_) {
      is_tensor_.push_back(value.isTensor() && value.toTensor().defined());
      if (is_tensor_.back())
        value = Tensor();
    }
  }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override {
    Crossing crossing;
    std::vector<Tensor> inputs;
    for (auto& saved : saved_) {
      auto input = crossing.to_host(saved.unpack()).detach();
      inputs.push_back(input.set_requires_grad(input.is_floating_point() && should_compute_output(inputs.size())));
    }
    Stack stack;
    size_t next = 0;
    for (size_t i = 0; i < arguments_.size(); ++i) {
      if (is_tensor_[i]) {
        stack.emplace_back(inputs[next++]);
      } else if (arguments_[i].isTensorList()) {
        c10::List<Tensor> list;
        for (size_t j = 0; j < arguments_[i].toListRef().size(); ++j)
          list.push_back(inputs[next++]);
        stack.emplace_back(list);
      } else {
        stack.push_back(arguments_[i]);
      }
    }
    torch::autograd::variable_list outputs, wanted, of;
    {
      at::AutoGradMode with_gradients(true);
      op_.callBoxed(&stack);
    }
    const auto results = tensors_among(stack);
    for (size_t i = 0; i < results.size(); ++i) {
      if (!grads[i].defined())
        continue;
      outputs.push_back(results[i]);
      of.push_back(crossing.to_host(grads[i]).detach());
    }
    for (const auto& input : inputs)
      if (input.requires_grad())
        wanted.push_back(input);
    torch::autograd::variable_list found(inputs.size());
    if (outputs.empty())
      return found;
    const auto computed = torch::autograd::grad(outputs, wanted, of, std::nullopt, false, true);
    for (size_t i = 0, j = 0; i < inputs.size(); ++i)
      if (inputs[i].requires_grad()) {
        const auto& grad = computed[j++];
        found[i] = grad.defined() ? crossing.to_foreign(grad.detach()) : Tensor();
      }
    return found;
  }

  std::string name() const override {
    return "ForeignAgain";
  }

  void release_variables() override {
    saved_.clear();
  }

 private:
  c10::OperatorHandle op_;
  std::vector<IValue> arguments_;
  std::vector<bool> is_tensor_;
  std::vector<torch::autograd::SavedVariable> saved_;
};

// Shared pointers up to torch 2.12 or so, intrusive ones since.
using NodePointer = decltype(torch::autograd::Edge::function);

template <typename Pointer>
Pointer owned(Again* node) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>)
    return Pointer(node);
  else
    return Pointer::unsafe_steal_from_new(node);
}

void run_with_gradients(const c10::OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  const auto inputs = tensors_among(arguments);
  bool needed = false;
  for (const auto& input : inputs)
    needed = needed || (at::GradMode::is_enabled() && input.requires_grad());
  NodePointer node;
  if (needed)
    node = owned<NodePointer>(new Again(op, arguments, torch::autograd::collect_next_edges(inputs)));
  {
    at::AutoDispatchBelowAutograd below;
    op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
  }
  if (node)
    for (const auto& result : tensors_among(torch::jit::last(*stack, op.schema().returns().size())))
      torch::autograd::set_history(result, node);
}

constexpr const char* kLeaves[] = {
    "gru.input",
    "gru.data",
    "gru_cell",
    "lstm.input",
    "lstm.data",
    "lstm_cell",
    "rnn_tanh.input",
    "rnn_tanh.data",
    "rnn_relu.input",
    "rnn_relu.data",
};

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

// What is only marked as conjugated is copied to be resolved, so a copy must take it as it is.
TORCH_LIBRARY_IMPL(aten, Conjugate, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, Negative, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

// Autocast casts for these, as it does for CUDA; others take what they get.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(convolution, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv1d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(softplus, fp32)
  KERNEL_PRIVATEUSEONE(rsqrt, fp32)
  KERNEL_PRIVATEUSEONE(pow, Tensor_Scalar, fp32)
  KERNEL_PRIVATEUSEONE(layer_norm, fp32)
  KERNEL_PRIVATEUSEONE(native_layer_norm, fp32)
  KERNEL_PRIVATEUSEONE(group_norm, fp32)
  KERNEL_PRIVATEUSEONE(softmax, int, fp32_set_opt_dtype)
  KERNEL_PRIVATEUSEONE(addcmul, promote)
  KERNEL_PRIVATEUSEONE(dot, promote)
  KERNEL_PRIVATEUSEONE(cat, promote)
  KERNEL_PRIVATEUSEONE(tensordot, promote)
}

// Operators of which the CPU has a kernel though there is one for any device too: that would give other bits.
bool has_kernel_beside(const c10::OperatorHandle& op) {
  return op.hasKernelForDispatchKey(DispatchKey::CPU) &&
      (op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutograd) ||
       op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutogradNonFunctional) ||
       op.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd));
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    const auto op = name.getNamespace() == "aten" ? dispatcher.findSchema(name) : std::nullopt;
    if (op && has_kernel_beside(*op))
      library.impl(c10::toString(name).c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  }
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("set_", &set_nothing);
  library.impl("set_.source_Storage", &set_whole_storage);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("record_stream", &record_stream);
  library.impl("native_dropout_backward", &dropout_backward);
  // These choose kernels by the device. They are the CPU's choice where the CPU chooses.
  for (const auto* name : {"convolution", "convolution_backward"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  for (const auto* name : kLeaves)
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_parts_on_host>());
}

TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, library) {
  for (const auto* name : kLeaves)
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_with_gradients>());
}

// -- generators ------------------------------------------------------------------------------------------------------

// Gives the CPU's random numbers: one of the CPU's inside, the default one for the default.
struct Generator final : c10::GeneratorImpl {
  explicit Generator(at::Generator host)
      : GeneratorImpl(kDevice, DispatchKeySet(DispatchKey::PrivateUse1)), host(std::move(host)) {}
  void set_current_seed(uint64_t seed) override {
    host.set_current_seed(seed);
  }
  void set_offset(uint64_t offset) override {
    host.set_offset(offset);
  }
  uint64_t get_offset() const override {
    return host.get_offset();
  }
  uint64_t current_seed() const override {
    return host.current_seed();
  }
  uint64_t seed() override {
    return host.seed();
  }
  void set_state(const c10::TensorImpl& state) override {
    host.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host.unsafeGetGeneratorImpl()->get_state();
  }
  GeneratorImpl* clone_impl() const override {
    return new Generator(host.clone());
  }
  at::Generator host;
};

IValue Crossing::host_generator(const at::Generator& generator) {
  if (generator.device().type() != kForeign)
    return generator;
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->host;
}

// -- what torch asks a device ----------------------------------------------------------------------------------------

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex /*index*/) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return 1;
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return 0;
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex /*index*/) const override {
    static const auto generator = at::make_generator<Generator>(at::detail::getDefaultCPUGenerator());
    return generator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex /*index*/) const override {
    return at::make_generator<Generator>(at::detail::createCPUGenerator());
  }
  Device getDeviceFromPtr(void* /*data*/) const override {
    return kDevice;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return c10::GetAllocator(c10::kCPU);
  }
  void resizePrivateUse1Bytes(const Storage& storage, size_t bytes) const override {
    auto memory = allocator.allocate(bytes);
    if (const auto kept = std::min(bytes, storage.nbytes()); kept > 0)
      allocator.copy_data(memory.get(), storage.data(), kept);
    auto* impl = storage.unsafeGetStorageImpl();
    impl->set_data_ptr_noswap(std::move(memory));
    impl->set_nbytes(bytes);
  }
};

thread_local c10::StreamId current_stream = 0;
std::atomic<c10::StreamId> last_stream{0};

// Streams have names and nothing more: whatever is called has happened when the call returns.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<kForeign> {
  Device exchangeDevice(Device /*device*/) const override {
    return kDevice;
  }
  Device getDevice() const override {
    return kDevice;
  }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() <= 0, "there is one foreign device, and this is not it: ", device);
  }
  c10::Stream getStream(Device /*device*/) const noexcept override {
    return c10::Stream(c10::Stream::UNSAFE, kDevice, current_stream);
  }
  c10::Stream getDefaultStream(Device /*device*/) const override {
    return c10::Stream(c10::Stream::DEFAULT, kDevice);
  }
  c10::Stream getStreamFromGlobalPool(Device /*device*/, bool /*high*/) const override {
    return c10::Stream(c10::Stream::UNSAFE, kDevice, ++last_stream);
  }
  c10::Stream getNewStream(Device /*device*/, int /*priority*/) const override {
    return c10::Stream(c10::Stream::UNSAFE, kDevice, ++last_stream);
  }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override {
    const auto before = current_stream;
    current_stream = stream.id();
    return c10::Stream(c10::Stream::UNSAFE, kDevice, before);
  }
  void record(void** event, const c10::Stream& /*s*/, c10::DeviceIndex /*i*/, c10::EventFlag /*f*/) const override {
    *event = &last_stream;  // not null: recorded
  }
  void block(void* /*event*/, const c10::Stream& /*stream*/) const override {}
  bool queryEvent(void* /*event*/) const override {
    return true;
  }
  void synchronizeEvent(void* /*event*/) const override {}
  void synchronizeDevice(c10::DeviceIndex /*index*/) const override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// Autograd starts its threads at the first backward pass there is, one for each device that it knows by then. If that
// pass is over, the foreign device gets its thread now.
struct Engine : torch::autograd::Engine {
  static void start_thread() {
    auto& engine = torch::autograd::Engine::get_default_engine();
    const bool has_started = (engine.*(&Engine::thread_pool_shared_)) != nullptr;
    if (has_started && (engine.*(&Engine::device_ready_queues_)).empty())
      (engine.*(&Engine::start_device_threads))();
  }
};

// -- memory that others own ------------------------------------------------------------------------------------------

using Release = void (*)(int64_t);
std::atomic<Release> release{nullptr};

struct Kept {
  int64_t keep;
};

void let_go(void* context) {
  auto* kept = static_cast<Kept*>(context);
  if (const auto call = release.load())
    call(kept->keep);
  delete kept;
}

Tensor on_memory(int64_t address, int64_t size_bytes, int64_t keep) {
  c10::DataPtr memory(reinterpret_cast<void*>(address), new Kept{keep}, &let_go, kDevice);
  Storage storage(Storage::use_byte_size_t(), size_bytes, std::move(memory), nullptr, false);
  const DispatchKeySet keys(DispatchKey::PrivateUse1);
  auto result =
      at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, caffe2::TypeMeta::Make<uint8_t>());
  result.unsafeGetTensorImpl()->set_sizes_contiguous({size_bytes});
  return result;
}

TORCH_LIBRARY(foreign, library) {
  library.def("on_memory(int address, int size_bytes, int keep) -> Tensor", &on_memory);
}

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &choose_attention)
}

extern "C" {

int64_t foreign_allocated_bytes() {
  return allocated_bytes.load();
}

int64_t foreign_peak_bytes() {
  return peak_bytes.load();
}

void foreign_reset_peak() {
  peak_bytes.store(allocated_bytes.load());
}

int64_t foreign_held_bytes() {
  return held_bytes.load();
}

int64_t foreign_reserved_bytes() {
  return reserved_bytes.load();
}

void foreign_empty_cache() {
  reserved_bytes.store(held_bytes.load());
  std::lock_guard<std::mutex> guard(kept_mutex);
  for (const auto& [size, address] : kept)
    route_free.load()(address, size, 0, nullptr);
  kept.clear();
}

// What tensors hold together, rounded up each, before an allocation is an error; negative: nothing is.
void foreign_cap(int64_t bytes) {
  cap_bytes.store(bytes < 0 ? std::numeric_limits<int64_t>::max() : bytes);
}

// Has others give memory from now on, and take back what they gave when the cache is emptied; null: nobody gives any.
void foreign_route(Malloc give, Free take) {
  if (take)
    route_free.store(take);
  route_malloc.store(give);
}

void foreign_round(int64_t bytes) {
  rounding_bytes.store(bytes);
}

// Says who is told which `keep` is let go, on whichever thread drops it; nobody at the end of the process.
void foreign_tell(Release whom) {
  release.store(whom);
}

void foreign_begin() {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  Engine::start_thread();
}

}  // extern "C"
