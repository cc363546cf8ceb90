// Runs a bundle's model.pte without Python. It is an example for embedded Linux, and the process
// that gemma-runtime starts if torch is not installed.
//
//   gemma_native MODEL THREADS PREFILL COUNT ID...   prints COUNT greedy tokens that follow the IDs
//   gemma_native MODEL THREADS                       serves logits over stdin and stdout: see serve()

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

// Declared here because the wheel ships this library without its header.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

using executorch::extension::from_blob;
using executorch::extension::Module;

namespace {

class Model {
 public:
  explicit Model(const std::string& path) : module_(path, Module::LoadMode::Mmap) {
    check(module_.load_forward(), "can't load the model");
  }

  // Appends tokens at a position. Returns the logits after the last one, valid until the next call.
  std::span<const float> forward(std::span<int64_t> tokens, int64_t position) {
    const auto count = static_cast<executorch::aten::SizesType>(tokens.size());
    auto ids = from_blob(tokens.data(), {1, count}, executorch::aten::ScalarType::Long);
    auto start = from_blob(&position, {1}, executorch::aten::ScalarType::Long);
    auto outputs = module_.forward({*ids, *start});
    check(outputs.error(), "can't run the model");
    const auto logits = outputs->at(0).toTensor();  // owned by the model
    return {logits.const_data_ptr<float>(), static_cast<size_t>(logits.numel())};
  }

  // The memory of a cache, by the name that the program gives it.
  std::span<char> cache(const std::string& name) {
    // The only way to a buffer; it is deprecated because it can bypass the module.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
    const auto method = module_.method("forward");
#pragma GCC diagnostic pop
    check(method.error(), "can't load the model");
    const auto buffer = (*method)->get_attribute(name);
    check(buffer.error(), "the model names no such cache");
    return {static_cast<char*>(buffer->mutable_data_ptr()), buffer->nbytes()};
  }

 private:
  static void check(executorch::runtime::Error error, const char* what) {
    if (error != executorch::runtime::Error::Ok) {
      throw std::runtime_error(
          std::string(what) + ", executorch error " + std::to_string(static_cast<int>(error)));
    }
  }

  Module module_;
};

void generate(Model& model, size_t prefill, int count, std::vector<int64_t> tokens) {
  int64_t position = 0;
  while (count-- > 0) {
    std::span<const float> logits;
    for (size_t start = 0; start < tokens.size(); start += prefill) {
      auto chunk = std::span(tokens).subspan(start, std::min(prefill, tokens.size() - start));
      logits = model.forward(chunk, position);
      position += static_cast<int64_t>(chunk.size());
    }
    tokens = {std::max_element(logits.begin(), logits.end()) - logits.begin()};
    std::printf("%lld\n", static_cast<long long>(tokens.front()));
    std::fflush(stdout);
  }
}

void read(void* data, size_t bytes) {
  if (std::fread(data, 1, bytes, stdin) != bytes) {
    throw std::runtime_error("input ended within a request");
  }
}

void reply(int64_t size, const void* data, size_t bytes) {
  std::fwrite(&size, sizeof(size), 1, stdout);
  std::fwrite(data, 1, bytes, stdout);
  std::fflush(stdout);
}

constexpr int64_t kReadCache = -1;
constexpr int64_t kWriteCache = -2;

// The rest of a request for a cache, after its header.
void serve_cache(Model& model, int64_t kind, int64_t name_length) {
  std::string name(static_cast<size_t>(name_length), '\0');
  read(name.data(), name.size());
  const auto memory = model.cache(name);
  if (kind == kWriteCache) {
    read(memory.data(), memory.size());
  }
  const auto size = static_cast<int64_t>(memory.size());
  reply(size, memory.data(), kind == kReadCache ? memory.size() : 0);
}

// Answers requests until stdin ends, all in the machine's byte order. There are three:
// - int64 values: a count, a position, and `count` tokens. The reply is an int64, the vocabulary's
//   size, and that many float32 logits.
// - int64 -1, the length of a cache's name, the name. The reply is an int64, the cache's bytes, and
//   the cache.
// - int64 -2, the length of a cache's name, the name, the cache. The reply is an int64, its bytes.
void serve(Model& model) {
  int64_t header[2];
  while (std::fread(header, sizeof(int64_t), 2, stdin) == 2) {
    if (header[0] < 0) {
      serve_cache(model, header[0], header[1]);
      continue;
    }
    std::vector<int64_t> tokens(static_cast<size_t>(header[0]));
    read(tokens.data(), tokens.size() * sizeof(int64_t));
    const auto logits = model.forward(tokens, header[1]);
    reply(static_cast<int64_t>(logits.size()), logits.data(), logits.size_bytes());
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3 && argc < 6) {
    std::fprintf(stderr, "usage: gemma_native MODEL THREADS [PREFILL COUNT ID...]\n");
    return 2;
  }
  try {
    auto* pool = executorch::extension::threadpool::get_threadpool();
    pool->_unsafe_reset_threadpool(static_cast<uint32_t>(std::stoul(argv[2])));
    Model model(argv[1]);
    if (argc == 3) {
      serve(model);
      return 0;
    }
    std::vector<int64_t> tokens;
    for (int i = 5; i < argc; ++i) {
      tokens.push_back(std::stoll(argv[i]));
    }
    generate(model, std::stoul(argv[3]), std::stoi(argv[4]), std::move(tokens));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
