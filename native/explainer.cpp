#include "explainer.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "error.hpp"
#include "json.hpp"

namespace onnxgbp {
namespace {

const std::string kPrefix = "onnxgbp.";

bool ends_with(const std::string &text, const std::string &end) {
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

/// The list of texts under a key of the metadata; other values are no text, and stay empty.
std::vector<std::string> texts(const std::string &key, const std::optional<std::string> &metadata) {
    std::vector<std::string> result;
    if (!metadata) return result;
    json::Value document;
    try {
        document = json::parse(*metadata);
    } catch (const std::invalid_argument &) {
        document = {};
    }
    const auto *items = document.get<json::Array>();
    if (!items) throw Error("the model's metadata '" + kPrefix + key + "' is no JSON list");
    for (const json::Value &item : *items) {
        const auto *text = item.get<std::string>();
        result.push_back(text ? *text : "");
    }
    return result;
}

bool is_float(Type type) { return type == Type::float16 || type == Type::float32 || type == Type::float64; }

}  // namespace

Explainer::Explainer(Model model) : model_(std::move(model)) {
    const auto method = said("method"), target = said("target"), explained = said("explained");
    if (!method || !target || !explained)
        throw Error("the model is no converted file: make one with onnxgbp convert --target input");
    mode_ = *target;
    const bool fixed = !mode_.empty() && mode_.find_first_not_of("0123456789") == std::string::npos;
    if (mode_ != "input" && mode_ != "argmax" && !fixed)
        throw Error("the model was converted with --target " + mode_ +
                    ", and this program feeds one class: convert with --target input");
    if (method->find(',') != std::string::npos)
        throw Error("the model was converted with --methods " + *method +
                    "; this program explains by one: convert with --method");
    const std::vector<std::string> wrt = texts("wrt", said("wrt"));
    const std::size_t fed = mode_ == "input" ? 2 : 1;
    if (wrt.size() != 1 || model_.inputs.size() != fed)
        throw Error("the model takes or explains more than one tensor; this program explains one picture");
    const Port &input = model_.inputs.front();
    if (!is_float(input.type)) throw Error("input '" + input.name + "' is of no float type");
    if (model_.outputs.size() < 2 || model_.outputs.back().type != Type::int64 ||
        !is_float(model_.outputs[model_.outputs.size() - 2].type) ||
        (fed == 2 && model_.inputs.back().type != Type::int64))
        throw Error("the model's inputs and outputs are not those that onnxgbp convert writes");
    preprocessing = Preprocessing::of(said("preprocessing"), input.name, input.shape);
    if (input.shape.front() > 1)
        throw Error("the model takes " + std::to_string(input.shape.front()) +
                    " pictures at a time; export it with a free batch");
    labels_ = texts("labels", said("labels"));
    explains_unit = said("unit").has_value();
    behind = said("stripped").value_or("");
    if (wrt.front() == input.name) layout = preprocessing.layout;
    find_scores(model_.outputs.size() - 2);
    std::string mixed;
    for (const std::string &rule : texts("rules", said("rules")))
        if (rule != "*=" + *method) mixed += (mixed.empty() ? ", with " : ", ") + rule;
    headline = *method + mixed + " of '" + *explained + "'" + (explains_unit ? " (unit " + *said("unit") + ")" : "");
}

std::optional<std::string> Explainer::said(const std::string &key) const {
    const auto found = model_.metadata.find(kPrefix + key);
    return found == model_.metadata.end() ? std::nullopt : std::optional(found->second);
}

/// The output that shows the explained tensor, as it is or behind a softmax; else the first of a float type.
void Explainer::find_scores(std::size_t theirs) {
    const std::string explained = *said("explained");
    for (std::size_t i = 0; i < theirs; ++i) {
        const Port &output = model_.outputs[i];
        if (!is_float(output.type)) continue;
        const bool shown = output.name == explained || ends_with(behind, " of output '" + output.name + "'");
        if (shown || !scores_) scores_ = output;
        if (!shown) continue;
        if (output.shape.size() > 1 && output.shape[1] > 0) classes_ = output.shape[1];
        return;
    }
}

void Explainer::check_target(std::optional<std::int64_t> target) const {
    if (!target) return;
    if (explains_unit) throw Error("unit " + *said("unit") + " is explained: leave the target out");
    if (*target < 0 || (classes_ && *target >= *classes_))
        throw Error(
            "target " + std::to_string(*target) + " is out of range: " +
            (classes_ ? "the model has " + std::to_string(*classes_) + " classes, 0 to " + std::to_string(*classes_ - 1)
                      : "it counts from 0"));
    if (mode_ != "input" && mode_ != std::to_string(*target))
        throw Error("the model was converted with --target " + mode_ +
                    ": leave the target out, or convert with --target input");
}

Explanation Explainer::operator()(const std::vector<float> &x, const std::vector<std::int64_t> &shape,
                                  std::optional<std::int64_t> target) {
    check_target(target);
    std::vector<Tensor> given{Tensor::of(model_.inputs.front().type, shape, x)};
    if (mode_ == "input") given.push_back(Tensor::of({1}, {target.value_or(-1)}));
    std::vector<std::string> wanted{model_.outputs[model_.outputs.size() - 2].name, model_.outputs.back().name};
    if (scores_) wanted.push_back(scores_->name);
    std::vector<Tensor> made = model_.run(given, wanted);
    Tensor &attribution = made[0];
    if (attribution.shape.size() != 4 || attribution.shape.front() != 1 || made[1].values().size() != 1)
        throw Error("the attribution is not that of one picture");
    attribution.shape.erase(attribution.shape.begin());
    Explanation result{{}, static_cast<std::int64_t>(made[1].values().front()), std::move(attribution)};
    if (scores_) {
        const auto &dims = made[2].shape;
        std::vector<double> scores = made[2].values();
        const std::int64_t longest = dims.empty() ? 1 : *std::max_element(dims.begin(), dims.end());
        if (static_cast<std::int64_t>(scores.size()) == longest)
            result.scores = std::move(scores);  // a map has no classes
    }
    return result;
}

std::string Explainer::label(std::int64_t index) const {
    const bool named = index >= 0 && static_cast<std::size_t>(index) < labels_.size();
    return named ? labels_[static_cast<std::size_t>(index)] : "";
}

}  // namespace onnxgbp
