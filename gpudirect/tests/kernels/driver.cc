// What a CUDA driver does for kernels, for tests: linked with `../suite/fake/cuda.c` to a libcuda.so. Memory is the
// host's, and a launch runs the kernel of that name on the host's processor. It refuses what a driver refuses: modules
// that are no PTX that it takes, kernels that the module has not, grids and groups that are too large.
#include "../../kernels/on_host/kernels.cc"

#include <map>
#include <string>

namespace {
enum { OK = 0, INVALID_VALUE = 1, NO_MEMORY = 2, INVALID_IMAGE = 200, INVALID_HANDLE = 400, NOT_FOUND = 500 };
std::map<unsigned long long, size_t> memory;
std::map<std::string, std::string> functions;

// Whether all of a range is memory that was given out.
bool inside(unsigned long long address, size_t bytes) {
  auto next = memory.upper_bound(address);
  if (next == memory.begin()) return false;
  --next;
  return address + bytes <= next->first + next->second;
}
} // namespace

extern "C" {
int cuStreamCreate(void **stream, unsigned flags) {
  if (flags != 1) return INVALID_VALUE;
  *stream = &memory;
  return OK;
}
int kernels_stream_destroy(void *) { return OK; }
int kernels_stream_synchronize(void *stream) { return stream == &memory ? OK : INVALID_HANDLE; }
int cuModuleLoadData(void **module, const char *image) {
  // A driver of CUDA 13.0.
  if (!std::strstr(image, ".version 9.0\n") || !std::strstr(image, ".target sm_90\n")) return INVALID_IMAGE;
  *module = new std::string(image);
  return OK;
}
int cuModuleUnload(void *module) {
  delete static_cast<std::string *>(module);
  return OK;
}
int cuModuleGetFunction(const void **function, void *module, const char *name) {
  const std::string &image = *static_cast<std::string *>(module);
  if (image.find(".visible .entry " + std::string(name) + "(") == std::string::npos) return NOT_FOUND;
  *function = (functions[name] = name).c_str();
  return OK;
}
int cuLaunchKernel(const char *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                   unsigned threads_z, unsigned shared, void *stream, void **parameters, void **extra) {
  if (!x || !y || !z || y > 65535 || z > 65535 || !threads || threads > 1024) return INVALID_VALUE;
  if (threads_y != 1 || threads_z != 1 || shared != 0 || extra || stream != &memory) return INVALID_VALUE;
  const unsigned grid[3] = {x, y, z};
  return terrace_launch(function, grid, threads, parameters) == 0 ? OK : INVALID_HANDLE;
}
int cuMemAlloc_v2(unsigned long long *address, size_t bytes) {
  if (!bytes) return INVALID_VALUE;
  if (bytes > (8ull << 30)) return NO_MEMORY;
  void *taken = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  std::memset(taken, 0xDD, bytes);
  *address = reinterpret_cast<unsigned long long>(taken);
  memory[*address] = bytes;
  return OK;
}
int cuMemFree_v2(unsigned long long address) {
  if (!memory.erase(address)) return INVALID_VALUE;
  std::free(reinterpret_cast<void *>(address));
  return OK;
}
int kernels_set(unsigned long long address, unsigned char value, size_t bytes, void *stream) {
  if (!inside(address, bytes) || stream != &memory) return INVALID_VALUE;
  std::memset(reinterpret_cast<void *>(address), value, bytes);
  return OK;
}
int kernels_copy_in(unsigned long long target, const void *source, size_t bytes, void *stream) {
  if (!inside(target, bytes) || stream != &memory) return INVALID_VALUE;
  std::memcpy(reinterpret_cast<void *>(target), source, bytes);
  return OK;
}
int kernels_copy_out(void *target, unsigned long long source, size_t bytes, void *stream) {
  if (!inside(source, bytes) || stream != &memory) return INVALID_VALUE;
  std::memcpy(target, reinterpret_cast<void *>(source), bytes);
  return OK;
}
}
