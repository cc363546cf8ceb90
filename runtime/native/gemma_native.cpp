// Runs a bundle's model.pte without Python: an example for embedded Linux, and the process behind
// gemma-runtime where torch is not installed.
//
//   gemma_native MODEL THREADS PREFILL COUNT ID...   prints COUNT greedy tokens after the given ones
//   gemma_native MODEL THREADS                       serves logits: see serve()

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

// The wheel ships this library without its header.
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

  // Appends tokens at a position; the logits after the last of them, valid until the next call.
  std::span<const float> forward(std::span<int64_t> tokens, int64_t position) {
    const auto count = static_cast<executorch::aten::SizesType>(tokens.size());
    auto ids = from_blob(tokens.data(), {1, count}, executorch::aten::ScalarType::Long);
    auto start = from_blob(&position, {1}, executorch::aten::ScalarType::Long);
    auto outputs = module_.forward({*ids, *start});
    check(outputs.error(), "can't run the model");
    const auto logits = outputs->at(0).toTensor();  // in the model's own memory
    return {logits.const_data_ptr<float>(), static_cast<size_t>(logits.numel())};
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
    for (size_t at = 0; at < tokens.size(); at += prefill) {
      auto chunk = std::span(tokens).subspan(at, std::min(prefill, tokens.size() - at));
      logits = model.forward(chunk, position);
      position += static_cast<int64_t>(chunk.size());
    }
    tokens = {std::max_element(logits.begin(), logits.end()) - logits.begin()};
    std::printf("%lld\n", static_cast<long long>(tokens.front()));
    std::fflush(stdout);
  }
}

// Reads int64 words in the machine's byte order: a count, a position, that many tokens. Writes an
// int64, the size of the vocabulary, and that many float32 logits. Ends with its input.
void serve(Model& model) {
  int64_t header[2];
  while (std::fread(header, sizeof(int64_t), 2, stdin) == 2) {
    std::vector<int64_t> tokens(static_cast<size_t>(header[0]));
    if (std::fread(tokens.data(), sizeof(int64_t), tokens.size(), stdin) != tokens.size()) {
      throw std::runtime_error("input ended within a request");
    }
    const auto logits = model.forward(tokens, header[1]);
    const auto size = static_cast<int64_t>(logits.size());
    std::fwrite(&size, sizeof(size), 1, stdout);
    std::fwrite(logits.data(), sizeof(float), logits.size(), stdout);
    std::fflush(stdout);
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
