// Runs a bundle's ONNX graph on ONNX Runtime's C library. For tests only: the app runs Core ML or ExecuTorch.
#ifndef ONNX_SESSION_H
#define ONNX_SESSION_H

#include <stddef.h>
#include <stdint.h>

typedef struct OnnxSession OnnxSession;

/// Never null; `onnx_error` returns what went wrong.
OnnxSession *_Nonnull onnx_open(const char *_Nonnull path);

/// The first error, null if there was none.
const char *_Nullable onnx_error(const OnnxSession *_Nonnull session);

/// Adds a float32 cache of zeros, read as `past` and written in place as `present`.
void onnx_add_cache(OnnxSession *_Nonnull session, const char *_Nonnull past, const char *_Nonnull present,
                    const int64_t *_Nonnull shape, size_t rank);

/// Appends tokens; `total` counts them and all before. `logits` has room for `rows` rows of the vocabulary.
void onnx_run(OnnxSession *_Nonnull session, const int64_t *_Nonnull tokens, int64_t count, int32_t total,
              float *_Nonnull logits, int64_t rows, int64_t vocabulary);

void onnx_close(OnnxSession *_Nonnull session);

/// The library's version, such as 1.29.0.
const char *_Nonnull onnx_version(void);

#endif
