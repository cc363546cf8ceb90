#include "OnnxSession.h"

#include <stdlib.h>
#include <string.h>

#include "onnxruntime_c_api.h"

enum { CACHES = 128 };

struct OnnxSession {
    const OrtApi *api;
    OrtEnv *environment;
    OrtSession *session;
    OrtMemoryInfo *memory;
    OrtIoBinding *binding;
    OrtValue *caches[CACHES];
    float *floats[CACHES];
    size_t count;
    char *error;
};

// Whether every call so far has succeeded; keeps the message of the first error.
static int succeeded(OnnxSession *session, OrtStatus *status) {
    if (status == NULL) return session->error == NULL;
    if (session->error == NULL) session->error = strdup(session->api->GetErrorMessage(status));
    session->api->ReleaseStatus(status);
    return 0;
}

// ONNX Runtime 1.29 and later collects usage data by default. A variable that is already set keeps its value.
static void disable_telemetry(void) {
    setenv("ORT_DISABLE_TELEMETRY", "1", 0);
    setenv("ORT_TELEMETRY_DISABLED", "1", 0); // the older name
}

OnnxSession *onnx_open(const char *path) {
    disable_telemetry();
    OnnxSession *session = calloc(1, sizeof *session);
    if (session == NULL) abort();
    const OrtApi *api = session->api = OrtGetApiBase()->GetApi(ORT_API_VERSION);
    OrtSessionOptions *options = NULL;
    if (succeeded(session, api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "test", &session->environment))
        && succeeded(session, api->CreateSessionOptions(&options))
        && succeeded(session, api->SetIntraOpNumThreads(options, 1))
        && succeeded(session, api->CreateSession(session->environment, path, options, &session->session))
        && succeeded(session, api->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &session->memory)))
        succeeded(session, api->CreateIoBinding(session->session, &session->binding));
    if (options != NULL) api->ReleaseSessionOptions(options);
    return session;
}

const char *onnx_error(const OnnxSession *session) { return session->error; }

// Binds the caller's memory as an input or output. The value is stored in `kept` if given, else released.
static void bind(OnnxSession *session, const char *input, const char *output, void *data, size_t bytes,
                 const int64_t *shape, size_t rank, ONNXTensorElementDataType type, OrtValue **kept) {
    const OrtApi *api = session->api;
    OrtValue *value = NULL;
    if (!succeeded(session, api->CreateTensorWithDataAsOrtValue(session->memory, data, bytes, shape, rank, type, &value)))
        return;
    if (input != NULL) succeeded(session, api->BindInput(session->binding, input, value));
    if (output != NULL) succeeded(session, api->BindOutput(session->binding, output, value));
    if (kept != NULL) *kept = value;
    else api->ReleaseValue(value);
}

void onnx_add_cache(OnnxSession *session, const char *past, const char *present, const int64_t *shape, size_t rank) {
    if (session->error != NULL || session->count == CACHES) abort();
    size_t elements = 1;
    for (size_t index = 0; index < rank; index++) elements *= (size_t)shape[index];
    float *floats = session->floats[session->count] = calloc(elements, sizeof *floats);
    OrtValue **kept = &session->caches[session->count++];
    bind(session, past, present, floats, elements * sizeof *floats, shape, rank, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, kept);
}

void onnx_run(OnnxSession *session, const int64_t *tokens, int64_t count, int32_t total, float *logits, int64_t rows,
              int64_t vocabulary) {
    int64_t *positions = malloc((size_t)rows * sizeof *positions);
    for (int64_t row = 0; row < rows; row++) positions[row] = count - rows + row;
    const int64_t shape[] = {1, count}, logits_shape[] = {1, rows, vocabulary};
    size_t bytes = (size_t)(rows * vocabulary) * sizeof *logits;
    bind(session, "tokens", NULL, (void *)tokens, (size_t)count * sizeof *tokens, shape, 2, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, NULL);
    bind(session, "total", NULL, &total, sizeof total, NULL, 0, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, NULL);
    bind(session, "wanted", NULL, positions, (size_t)rows * sizeof *positions, &rows, 1, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, NULL);
    bind(session, NULL, "logits", logits, bytes, logits_shape, 3, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, NULL);
    if (session->error == NULL) succeeded(session, session->api->RunWithBinding(session->session, NULL, session->binding));
    free(positions);
}

void onnx_close(OnnxSession *session) {
    const OrtApi *api = session->api;
    if (session->binding != NULL) api->ReleaseIoBinding(session->binding);
    for (size_t index = 0; index < session->count; index++) {
        if (session->caches[index] != NULL) api->ReleaseValue(session->caches[index]);
        free(session->floats[index]);
    }
    if (session->memory != NULL) api->ReleaseMemoryInfo(session->memory);
    if (session->session != NULL) api->ReleaseSession(session->session);
    if (session->environment != NULL) api->ReleaseEnv(session->environment);
    free(session->error);
    free(session);
}

const char *onnx_version(void) { return OrtGetApiBase()->GetVersionString(); }
