#include "runtime.hpp"

// No symbol of the library is linked: it has one version for each release, and the program would run with no other.
#define ORT_API_MANUAL_INIT
#include <dlfcn.h>
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <type_traits>
#include <utility>

#include "error.hpp"

namespace onnxgbp {
namespace {

/// The first line of what the runtime says, without its own prefix: [ONNXRuntimeError] : a number : a kind : ...
std::string short_text(const char *said) {
    const std::string separator = " : ";
    std::string text(said);
    text.resize(std::min(text.find('\n'), text.size()));
    if (const std::size_t prefix = text.find("[ONNXRuntimeError]"); prefix != std::string::npos) {
        text.erase(0, prefix);
        for (int part = 0; part < 3; ++part)
            if (const std::size_t end = text.find(separator); end != std::string::npos)
                text.erase(0, end + separator.size());
    }
    return text;
}

/// Calls `f` with a value of the C++ type.
template <typename F>
void with_type(Type type, F f) {
    switch (type) {
        case Type::float16:
            return f(Ort::Float16_t());
        case Type::float32:
            return f(float());
        case Type::float64:
            return f(double());
        case Type::int64:
            return f(std::int64_t());
        case Type::other:
            break;
    }
    throw Error("a tensor is of a type that this program does not read");
}

Type type_of(ONNXTensorElementDataType type) {
    switch (type) {
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
            return Type::float16;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
            return Type::float32;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE:
            return Type::float64;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
            return Type::int64;
        default:
            return Type::other;
    }
}

ONNXTensorElementDataType code_of(Type type) {
    ONNXTensorElementDataType code = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    with_type(type, [&](auto zero) { code = Ort::TypeToTensorType<decltype(zero)>::type; });
    return code;
}

/// Loads the library, which stays: ONNX Runtime has threads and exit handlers of its own.
void *load(const std::string &library) {
    setenv("ORT_DISABLE_TELEMETRY", "1", 0);  // from 1.29 on it reports to its makers; =0 in the environment lets it
    const char *environment = std::getenv("ONNXRUNTIME_LIBRARY");
    std::vector<std::string> names{"libonnxruntime.so.1", "libonnxruntime.so"};
    if (!library.empty())
        names = {library};
    else if (environment && *environment)
        names = {environment};
    std::string fault;
    for (const std::string &name : names) {
        if (void *handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) return handle;
        const char *said = dlerror();
        if (fault.empty()) fault = said ? said : name;
    }
    throw Error("cannot load ONNX Runtime: " + fault + "; name it with --library or ONNXRUNTIME_LIBRARY");
}

void start_api(const std::string &library) {
    void *handle = load(library);
    using Base = const OrtApiBase *(*)();
    const auto base = reinterpret_cast<Base>(dlsym(handle, "OrtGetApiBase"));
    if (!base)
        throw Error("cannot load ONNX Runtime: " + (library.empty() ? "the library found" : library) +
                    " is no ONNX Runtime");
    const std::string version = base()->GetVersionString();
    // Asked for an interface that it does not have, the library prints a line of its own: 1.N is known to have N.
    const bool old = version.rfind("1.", 0) == 0 && std::atoi(version.c_str() + 2) < ORT_API_VERSION;
    const OrtApi *api = old ? nullptr : base()->GetApi(ORT_API_VERSION);
    if (!api)
        throw Error("ONNX Runtime " + version + " is too old: this program needs 1." + std::to_string(ORT_API_VERSION) +
                    " or newer");
    Ort::InitApi(api);
}

void add_cuda(Ort::SessionOptions &options) {
    const OrtApi &api = Ort::GetApi();
    const std::vector<std::string> compiled_in = Ort::GetAvailableProviders();
    if (std::find(compiled_in.begin(), compiled_in.end(), "CUDAExecutionProvider") == compiled_in.end())
        throw Error("this ONNX Runtime has no CUDA: give the library of a GPU build, or choose --provider cpu");
    OrtCUDAProviderOptionsV2 *cuda = nullptr;
    Ort::ThrowOnError(api.CreateCUDAProviderOptions(&cuda));
    const std::unique_ptr<OrtCUDAProviderOptionsV2, decltype(api.ReleaseCUDAProviderOptions)> owner(
        cuda, api.ReleaseCUDAProviderOptions);
    // TF32 keeps 10 bits of mantissa: enough to flip ReLU decisions and with them whole pixels of the map.
    const char *const key = "use_tf32", *const value = "0";
    Ort::ThrowOnError(api.UpdateCUDAProviderOptions(cuda, &key, &value, 1));
    options.AppendExecutionProvider_CUDA_V2(*cuda);
}

Port port(const std::string &name, const Ort::TypeInfo &info) {
    if (info.GetONNXType() != ONNX_TYPE_TENSOR) return {name, Type::other, {}};
    const auto tensor = info.GetTensorTypeAndShapeInfo();
    return {name, type_of(tensor.GetElementType()), tensor.GetShape()};
}

template <typename T>
Tensor packed(Type type, const std::vector<std::int64_t> &shape, const std::vector<T> &values) {
    Tensor tensor{type, shape, std::vector<std::byte>(values.size() * sizeof(T))};
    std::memcpy(tensor.data.data(), values.data(), tensor.data.size());
    return tensor;
}

}  // namespace

Tensor Tensor::of(Type type, const std::vector<std::int64_t> &shape, const std::vector<float> &values) {
    Tensor result{type, shape, {}};
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        std::vector<T> cast;
        cast.reserve(values.size());
        for (const float value : values) {
            if constexpr (std::is_same_v<T, Ort::Float16_t>) {
                cast.push_back(Ort::Float16_t(value));
                if (std::isfinite(value) && cast.back().IsInfinity())
                    throw Error("the model's input is float16, which cannot hold the picture's values");
            } else {
                cast.push_back(static_cast<T>(value));
            }
        }
        result = packed(type, shape, cast);
    });
    return result;
}

Tensor Tensor::of(const std::vector<std::int64_t> &shape, const std::vector<std::int64_t> &values) {
    return packed(Type::int64, shape, values);
}

std::vector<double> Tensor::values() const {
    std::vector<double> result;
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        for (std::size_t at = 0; at + sizeof(T) <= data.size(); at += sizeof(T)) {
            T value;
            std::memcpy(&value, data.data() + at, sizeof(T));
            if constexpr (std::is_same_v<T, Ort::Float16_t>)
                result.push_back(static_cast<double>(value.ToFloat()));
            else
                result.push_back(static_cast<double>(value));
        }
    });
    return result;
}

struct Model::Session {
    Ort::Env env{ORT_LOGGING_LEVEL_FATAL};  // every fault arrives as an exception; its own lines would only repeat it
    Ort::Session session{nullptr};
};

Model::Model(const std::string &path, const std::string &library, Provider provider, int threads) : path_(path) {
    if (!std::ifstream(path, std::ios::binary).good())
        throw Error("cannot read " + path + ": no such file, or not readable");
    start_api(library);
    try {
        session_ = std::make_unique<Session>();
        Ort::SessionOptions options;
        options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_FATAL);
        if (threads > 0) options.SetIntraOpNumThreads(threads);
        if (provider == Provider::cuda) {
            try {
                add_cuda(options);
                session_->session = Ort::Session(session_->env, path.c_str(), options);
            } catch (const Ort::Exception &error) {
                throw Error("CUDA does not work here (" + short_text(error.what()) +
                            "): check driver, CUDA and cuDNN, or choose --provider cpu");
            }
        } else {
            session_->session = Ort::Session(session_->env, path.c_str(), options);
        }
        const Ort::Session &session = session_->session;
        Ort::AllocatorWithDefaultOptions allocator;
        for (std::size_t i = 0; i < session.GetInputCount(); ++i)
            inputs.push_back(port(session.GetInputNameAllocated(i, allocator).get(), session.GetInputTypeInfo(i)));
        for (std::size_t i = 0; i < session.GetOutputCount(); ++i)
            outputs.push_back(port(session.GetOutputNameAllocated(i, allocator).get(), session.GetOutputTypeInfo(i)));
        const Ort::ModelMetadata said = session.GetModelMetadata();
        for (const auto &key : said.GetCustomMetadataMapKeysAllocated(allocator))
            metadata[key.get()] = said.LookupCustomMetadataMapAllocated(key.get(), allocator).get();
    } catch (const Ort::Exception &error) {
        throw Error("ONNX Runtime cannot load " + path + ": " + short_text(error.what()));
    }
}

Model::Model(Model &&) noexcept = default;
Model::~Model() = default;

std::vector<Tensor> Model::run(const std::vector<Tensor> &given, const std::vector<std::string> &wanted) {
    try {
        const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
        std::vector<Ort::Value> values;
        std::vector<const char *> names, results;
        for (std::size_t i = 0; i < given.size(); ++i) {
            const Tensor &tensor = given[i];
            auto *data =
                const_cast<std::byte *>(tensor.data.data());  // the interface has no const; inputs are only read
            values.push_back(Ort::Value::CreateTensor(memory, data, tensor.data.size(), tensor.shape.data(),
                                                      tensor.shape.size(), code_of(tensor.type)));
            names.push_back(inputs[i].name.c_str());
        }
        for (const std::string &name : wanted) results.push_back(name.c_str());
        const auto made = session_->session.Run(Ort::RunOptions{nullptr}, names.data(), values.data(), values.size(),
                                                results.data(), results.size());
        std::vector<Tensor> tensors;
        for (const Ort::Value &value : made) {
            const auto info = value.GetTensorTypeAndShapeInfo();
            Tensor tensor{type_of(info.GetElementType()), info.GetShape(), {}};
            with_type(tensor.type, [&](auto zero) {
                const auto *data = static_cast<const std::byte *>(value.GetTensorRawData());
                tensor.data.assign(data, data + info.GetElementCount() * sizeof(zero));
            });
            tensors.push_back(std::move(tensor));
        }
        return tensors;
    } catch (const Ort::Exception &error) {
        throw Error("ONNX Runtime could not run " + path_ + ": " + short_text(error.what()));
    }
}

}  // namespace onnxgbp
