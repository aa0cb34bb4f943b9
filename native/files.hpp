// Files read within bounds, and files written whole or not at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace onnxgbp {

using Bytes = std::vector<std::uint8_t>;

/// The whole file. Throws Error where it cannot be read or is larger than `limit` bytes.
Bytes read_file(const std::string &path, std::size_t limit);

/// Writes the bytes aside and moves them into place; a link is followed. Throws Error, and leaves nothing, on failure.
void write_file(const std::string &path, const Bytes &bytes);

/// A C-ordered array in numpy's own format, version 1.0. type: a kind and a size as numpy spells them, such as f4.
Bytes npy(std::string_view type, const std::vector<std::int64_t> &shape, const std::vector<std::byte> &data);

}  // namespace onnxgbp
