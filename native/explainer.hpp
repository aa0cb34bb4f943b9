// A converted file behind a call: which of its inputs and outputs are the network's and which are onnxgbp's.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "preprocessing.hpp"
#include "runtime.hpp"

namespace onnxgbp {

/// scores: one for each class, empty where the network's output has no such shape; target: the class (or channel) that
/// was explained; attribution: raw and signed, without the batch axis.
struct Explanation {
    std::vector<double> scores;
    std::int64_t target;
    Tensor attribution;
};

class Explainer {
 public:
    /// Throws Error: not a converted file, or one that takes more than one picture.
    explicit Explainer(Model model);

    /// x: float, the shape of the one input; target: a class, or nothing for the strongest.
    /// Throws Error: a target out of range or not the one that the file was made for, or the runtime fails.
    Explanation operator()(const std::vector<float> &x, const std::vector<std::int64_t> &shape,
                           std::optional<std::int64_t> target);

    /// The name of a class, or "".
    std::string label(std::int64_t index) const;

    /// Throws Error where the file does not take this target.
    void check_target(std::optional<std::int64_t> target) const;

    Preprocessing preprocessing;
    std::string headline;          // what is explained, by which method
    std::string behind;            // what was walked back over to reach it, or ""
    std::optional<Layout> layout;  // of the attribution; nothing where it is not the input's
    bool explains_unit = false;    // an inner unit: its number is no class

 private:
    std::optional<std::string> said(const std::string &key) const;
    void find_scores(std::size_t theirs);

    Model model_;
    std::vector<std::string> labels_;
    std::string mode_;
    std::optional<Port> scores_;
    std::optional<std::int64_t> classes_;
};

}  // namespace onnxgbp
