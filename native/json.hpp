// JSON as a model's metadata holds it (RFC 8259). Read only.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace onnxgbp::json {

struct Value;
using Array = std::vector<Value>;
using Object = std::map<std::string, Value>;

/// A number keeps how it was spelled, for 256 and 256.0 are not the same to a reader that wants an integer.
struct Number {
    double value;
    bool integer;
};

struct Value {
    std::variant<std::nullptr_t, bool, Number, std::string, Array, Object> held;

    template <typename T>
    const T *get() const {
        return std::get_if<T>(&held);
    }
    bool is_null() const { return std::holds_alternative<std::nullptr_t>(held); }
};

/// Throws std::invalid_argument, which says what is wrong, for anything but one JSON value.
Value parse(std::string_view text);

}  // namespace onnxgbp::json
