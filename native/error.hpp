#pragma once

#include <stdexcept>

namespace onnxgbp {

/// Wrong input, in one line: what, where, the way out. The program prints it and exits with status 1.
class Error : public std::runtime_error {
 public:
    using std::runtime_error::runtime_error;
};

}  // namespace onnxgbp
