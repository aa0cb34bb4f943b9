// ONNX Runtime, loaded while the program runs. The one place that knows its headers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace onnxgbp {

enum class Type { float16, float32, float64, int64, other };

/// An input or an output of a model. shape: 0 or below for a free dimension.
struct Port {
    std::string name;
    Type type;
    std::vector<std::int64_t> shape;
};

/// A C-ordered tensor. data: its bytes, as the model takes or gives them.
struct Tensor {
    Type type;
    std::vector<std::int64_t> shape;
    std::vector<std::byte> data;

    /// Of a float type. Throws Error where float16 cannot hold a value.
    static Tensor of(Type type, const std::vector<std::int64_t> &shape, const std::vector<float> &values);
    static Tensor of(const std::vector<std::int64_t> &shape, const std::vector<std::int64_t> &values);

    std::vector<double> values() const;
};

enum class Provider { cpu, cuda };

/// A model in a session.
class Model {
 public:
    /// library: the path of a libonnxruntime, or "" for ONNXRUNTIME_LIBRARY in the environment and then the loader's;
    /// threads: within one operator, 0 leaves it to ONNX Runtime. Throws Error: no library, one that is too old, a file
    /// that is no model, or CUDA that does not work.
    Model(const std::string &path, const std::string &library, Provider provider, int threads);
    Model(Model &&) noexcept;
    ~Model();

    std::vector<Port> inputs, outputs;
    std::map<std::string, std::string> metadata;

    /// One run: a tensor for each input, in their order, to the outputs named. Throws Error where the runtime fails.
    std::vector<Tensor> run(const std::vector<Tensor> &given, const std::vector<std::string> &wanted);

 private:
    struct Session;
    std::unique_ptr<Session> session_;
    std::string path_;
};

}  // namespace onnxgbp
