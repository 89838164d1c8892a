// MLX's Metal device on Linux, for the host code of kernels/metal: what launch.cpp calls,
// defined here instead of in libmlx.dylib, and an objc_msgSend that understands the few
// messages which metal-cpp sends for it. Compiling and launching are handed to Python
// (../host.py), which has the emulator.
//
// Not modelled: asynchrony, hazards, and whether temporaries live long enough.
#define NS_PRIVATE_IMPLEMENTATION
#define MTL_PRIVATE_IMPLEMENTATION
#define CA_PRIVATE_IMPLEMENTATION
#include "mock_device.h"

#include <cstring>
#include <map>
#include <memory>
#include <set>

#include "mlx/backend/metal/device.h"

namespace {

MockCallbacks callbacks;

struct Pipeline {
  std::string entry;
  std::vector<MockConstant> constants;
};

struct Encoder {
  const Pipeline* pipeline = nullptr;
  std::map<int, std::vector<char>> bytes;
  std::map<int, MockBuffer> buffers;
} encoder;

void* set_bytes(void*, SEL, const void* data, size_t bytes, size_t index) {
  encoder.bytes[int(index)].assign((const char*)data, (const char*)data + bytes);
  return nullptr;
}
void* set_pipeline(void*, SEL, void* pipeline) {
  encoder.pipeline = static_cast<const Pipeline*>(pipeline);
  return nullptr;
}
size_t most_threads(void*, SEL) { return callbacks.most_threads; }
void* itself(void* self, SEL) { return self; }

}  // namespace

void mock_device(const MockCallbacks& c) { callbacks = c; }

extern "C" {
// A selector, class or protocol is its own name.
SEL sel_registerName(const char* name) {
  static std::set<std::string> names;
  return (SEL)names.insert(name).first->c_str();
}
Class objc_getClass(const char* name) { return (Class)sel_registerName(name); }
id objc_lookUpClass(const char* name) { return (id)sel_registerName(name); }
Protocol* objc_getProtocol(const char* name) { return (Protocol*)sel_registerName(name); }
Class object_getClass(id) { return nullptr; }
objc_method_description protocol_getMethodDescription(Protocol*, SEL, BOOL, BOOL) { return {}; }
void objc_msgSend_fpret(id, SEL, ...) {}
void objc_msgSend_stret(id, SEL, ...) {}
// What metal-cpp refers to and nothing here reaches.
MTL::Device* MTLCreateSystemDefaultDevice() { return nullptr; }
NS::Array* MTLCopyAllDevices() { return nullptr; }
NS::Array* MTLCopyAllDevicesWithObserver(NS::Object**, MTL::DeviceNotificationHandlerBlock) {
  return nullptr;
}
void MTLRemoveDeviceObserver(const NS::Object*) {}
void* _NSConcreteStackBlock[32];
void* _NSConcreteGlobalBlock[32];
void _Block_object_assign(void*, const void*, int) {}
void _Block_object_dispose(const void*, int) {}

void* mock_receiver(void*, SEL selector) {
  const std::string name = (const char*)selector;
  if (name == "setBytes:length:atIndex:") return (void*)set_bytes;
  if (name == "setComputePipelineState:") return (void*)set_pipeline;
  if (name == "maxTotalThreadsPerThreadgroup") return (void*)most_threads;
  return (void*)itself;
}
}

// Jumps to the receiver of a message with its arguments as they are.
asm(R"(
.text
.globl objc_msgSend
objc_msgSend:
  push %rdi; push %rsi; push %rdx; push %rcx; push %r8; push %r9; sub $8,%rsp
  call mock_receiver
  add $8,%rsp; pop %r9; pop %r8; pop %rcx; pop %rdx; pop %rsi; pop %rdi
  jmp *%rax
)");

namespace mlx::core::metal {

// Never constructed: nothing but their address is used, and an architecture that is empty.
alignas(64) char device_memory[sizeof(Device)], encoder_memory[sizeof(CommandEncoder)];

Device& device(mlx::core::Device) { return *reinterpret_cast<Device*>(device_memory); }
CommandEncoder& get_command_encoder(Stream) {
  return *reinterpret_cast<CommandEncoder*>(encoder_memory);
}
MTL::ComputeCommandEncoder* CommandEncoder::get_command_encoder() {
  return reinterpret_cast<MTL::ComputeCommandEncoder*>(encoder_memory);
}

MTL::Library* Device::get_library(const std::string& name, const CompileOptions&,
                                  const std::function<std::string()>& builder) {
  static std::set<std::string> known;
  const auto found = known.find(name);
  if (found != known.end()) return (MTL::Library*)found->c_str();
  const std::string text = builder();
  char message[4096] = {};
  if (!callbacks.compile(name.c_str(), text.c_str(), message, sizeof message))
    throw std::runtime_error(std::string("[metal::Device] Unable to build metal library\n") +
                             message);
  return (MTL::Library*)known.insert(name).first->c_str();
}

MTL::ComputePipelineState* Device::get_kernel(const std::string& entry, MTL::Library*,
                                              const std::string& hash_name,
                                              const MTLFCList& constants,
                                              const std::vector<MTL::Function*>&) {
  static std::map<std::string, Pipeline> pipelines;
  const auto [found, is_new] = pipelines.try_emplace(hash_name);
  if (is_new) {
    found->second.entry = entry;
    for (const auto& [value, type, index] : constants) {
      MockConstant c{int(index), type == MTL::DataTypeBool, 0};
      c.value = c.is_bool ? int(*(const bool*)value) : *(const int*)value;
      found->second.constants.push_back(c);
    }
  }
  return (MTL::ComputePipelineState*)&found->second;
}

void CommandEncoder::set_input_array(const array& a, int index, int64_t offset) {
  encoder.buffers[index] = {index, (char*)a.data<char>() + offset, a.nbytes() - size_t(offset)};
}
void CommandEncoder::set_output_array(array& a, int index, int64_t offset) {
  set_input_array(a, index, offset);
}
void CommandEncoder::add_temporary(array) {}

void CommandEncoder::dispatch_threadgroups(MTL::Size groups, MTL::Size threads) {
  for (auto& [index, bytes] : encoder.bytes)
    encoder.buffers[index] = {index, bytes.data(), bytes.size()};
  std::vector<MockBuffer> buffers;
  for (const auto& [index, buffer] : encoder.buffers) buffers.push_back(buffer);
  const uint32_t grid[] = {uint32_t(groups.width), uint32_t(groups.height),
                           uint32_t(groups.depth)};
  const uint32_t block[] = {uint32_t(threads.width), uint32_t(threads.height),
                            uint32_t(threads.depth)};
  const Pipeline& p = *encoder.pipeline;
  callbacks.launch(p.entry.c_str(), buffers.data(), int(buffers.size()), p.constants.data(),
                   int(p.constants.size()), grid, block);
  encoder = Encoder{};
}

}  // namespace mlx::core::metal
