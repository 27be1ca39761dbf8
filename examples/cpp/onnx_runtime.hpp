// Run an ONNX file through onnxruntime's C API, one thread, no exceptions across the boundary.
//
// With the header of an onnxruntime release (-I .../include) that header is used. Without one, the few entries of its
// function table that are needed are declared here by their position: onnxruntime only ever appends to that table.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if __has_include(<onnxruntime_c_api.h>)
#include <onnxruntime_c_api.h>
#else
struct OrtStatus;
struct OrtEnv;
struct OrtSession;
struct OrtSessionOptions;
struct OrtRunOptions;
struct OrtMemoryInfo;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
enum { ORT_API_VERSION = 16, ORT_LOGGING_LEVEL_FATAL = 4, OrtDeviceAllocator = 0, OrtMemTypeDefault = 0 };
enum { ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 = 2 };

struct OrtApi {
    void* f0_1[2];
    const char* (*GetErrorMessage)(const OrtStatus*);                                                     // 2
    OrtStatus* (*CreateEnv)(int, const char*, OrtEnv**);                                                  // 3
    void* f4_6[3];
    void* f7;
    OrtStatus* (*CreateSessionFromArray)(const OrtEnv*, const void*, size_t, const OrtSessionOptions*, OrtSession**);  // 8
    OrtStatus* (*Run)(OrtSession*, const OrtRunOptions*, const char* const*, const OrtValue* const*, size_t,
                      const char* const*, size_t, OrtValue**);                                            // 9
    OrtStatus* (*CreateSessionOptions)(OrtSessionOptions**);                                              // 10
    void* f11_23[13];
    OrtStatus* (*SetIntraOpNumThreads)(OrtSessionOptions*, int);                                          // 24
    void* f25_48[24];
    OrtStatus* (*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo*, void*, size_t, const int64_t*, size_t, int,
                                                 OrtValue**);                                             // 49
    void* f50;
    OrtStatus* (*GetTensorMutableData)(OrtValue*, void**);                                                // 51
    void* f52_63[12];
    OrtStatus* (*GetTensorShapeElementCount)(const OrtTensorTypeAndShapeInfo*, size_t*);                  // 64
    OrtStatus* (*GetTensorTypeAndShape)(const OrtValue*, OrtTensorTypeAndShapeInfo**);                    // 65
    void* f66_68[3];
    OrtStatus* (*CreateCpuMemoryInfo)(int, int, OrtMemoryInfo**);                                         // 69
    void* f70_91[22];
    void (*ReleaseEnv)(OrtEnv*);                                                                          // 92
    void (*ReleaseStatus)(OrtStatus*);                                                                    // 93
    void (*ReleaseMemoryInfo)(OrtMemoryInfo*);                                                            // 94
    void (*ReleaseSession)(OrtSession*);                                                                  // 95
    void (*ReleaseValue)(OrtValue*);                                                                      // 96
    void* f97_98[2];
    void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo*);                                    // 99
    void (*ReleaseSessionOptions)(OrtSessionOptions*);                                                    // 100
};

struct OrtApiBase {
    const OrtApi* (*GetApi)(uint32_t version);
    const char* (*GetVersionString)();
};

extern "C" const OrtApiBase* OrtGetApiBase();
#endif

// The positions hold whichever declaration is compiled.
static_assert(offsetof(OrtApi, Run) == 9 * sizeof(void*) && offsetof(OrtApi, SetIntraOpNumThreads) == 24 * sizeof(void*) &&
              offsetof(OrtApi, GetTensorMutableData) == 51 * sizeof(void*) &&
              offsetof(OrtApi, CreateCpuMemoryInfo) == 69 * sizeof(void*) &&
              offsetof(OrtApi, ReleaseSessionOptions) == 100 * sizeof(void*));

// Load one ONNX file and run it with one input of bytes or floats.
class Network {
public:
    explicit Network(const std::string& model) {
        api_ = OrtGetApiBase()->GetApi(ORT_API_VERSION);
        if (!api_) throw std::runtime_error("this onnxruntime is older than the program. Install a newer one.");
        OrtSessionOptions* options = nullptr;
        check(api_->CreateEnv(ORT_LOGGING_LEVEL_FATAL, "pkd", &env_));
        check(api_->CreateSessionOptions(&options));
        check(api_->SetIntraOpNumThreads(options, 1));
        OrtStatus* status = api_->CreateSessionFromArray(env_, model.data(), model.size(), options, &session_);
        api_->ReleaseSessionOptions(options);
        check(status);
        check(api_->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &memory_));
    }
    Network(const Network&) = delete;
    Network& operator=(const Network&) = delete;
    ~Network() {
        if (memory_) api_->ReleaseMemoryInfo(memory_);
        if (session_) api_->ReleaseSession(session_);
        if (env_) api_->ReleaseEnv(env_);
    }

    // Run uint8 data of this shape → the numbers of each output, in the order of their names.
    std::vector<std::vector<float>> run(const char* input, std::vector<uint8_t>& data, const std::vector<int64_t>& shape,
                                        const std::vector<const char*>& outputs) {
        return run(input, data.data(), data.size(), ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, shape, outputs);
    }

    // Run float32 data of this shape.
    std::vector<std::vector<float>> run(const char* input, std::vector<float>& data, const std::vector<int64_t>& shape,
                                        const std::vector<const char*>& outputs) {
        return run(input, data.data(), data.size() * sizeof(float), ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, shape, outputs);
    }

private:
    template <class Type>
    std::vector<std::vector<float>> run(const char* input, void* data, size_t bytes, Type type,
                                        const std::vector<int64_t>& shape, const std::vector<const char*>& outputs) {
        OrtValue* taken = nullptr;
        check(api_->CreateTensorWithDataAsOrtValue(memory_, data, bytes, shape.data(), shape.size(), type, &taken));
        std::vector<OrtValue*> given(outputs.size(), nullptr);
        OrtStatus* status = api_->Run(session_, nullptr, &input, &taken, 1, outputs.data(), outputs.size(), given.data());
        api_->ReleaseValue(taken);
        check(status);
        std::vector<std::vector<float>> found;
        for (OrtValue* value : given) {
            OrtTensorTypeAndShapeInfo* info = nullptr;
            size_t count = 0;
            void* numbers = nullptr;
            check(api_->GetTensorTypeAndShape(value, &info));
            check(api_->GetTensorShapeElementCount(info, &count));
            check(api_->GetTensorMutableData(value, &numbers));
            found.emplace_back(static_cast<float*>(numbers), static_cast<float*>(numbers) + count);
            api_->ReleaseTensorTypeAndShapeInfo(info);
            api_->ReleaseValue(value);
        }
        return found;
    }

    void check(OrtStatus* status) {
        if (!status) return;
        std::string said = api_->GetErrorMessage(status);
        api_->ReleaseStatus(status);
        throw std::runtime_error("onnxruntime: " + said);
    }

    const OrtApi* api_ = nullptr;
    OrtEnv* env_ = nullptr;
    OrtSession* session_ = nullptr;
    OrtMemoryInfo* memory_ = nullptr;
};
