#include "files.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <system_error>
#include <utility>

#include "error.hpp"

namespace onnxgbp {
namespace {

constexpr int kMostLinks = 40;  // as Linux follows

Error cannot(const std::string &what, const std::string &path, int code) {
    return Error("cannot " + what + " " + path + ": " + std::generic_category().message(code));
}

/// A file beside the one that is to be written; removed unless it was moved into place.
class Aside {
 public:
    explicit Aside(const std::filesystem::path &target)
        : name_((target.parent_path() / ("." + target.filename().string().substr(0, 100) + ".XXXXXX")).string()),
          descriptor_(mkstemp(name_.data())) {
        if (descriptor_ < 0) throw std::system_error(errno, std::generic_category());
    }
    Aside(const Aside &) = delete;
    Aside &operator=(const Aside &) = delete;
    ~Aside() {
        if (descriptor_ >= 0) close(descriptor_);
        if (!moved_) unlink(name_.c_str());
    }

    void write(const Bytes &bytes) {
        for (std::size_t done = 0; done < bytes.size();) {
            const ssize_t count = ::write(descriptor_, bytes.data() + done, bytes.size() - done);
            if (count >= 0)
                done += static_cast<std::size_t>(count);
            else if (errno != EINTR)
                throw std::system_error(errno, std::generic_category());
        }
    }

    void move_to(const std::filesystem::path &target) {
        const mode_t mask = umask(0);
        umask(mask);
        const bool open = fchmod(descriptor_, 0666 & ~mask) == 0;  // mkstemp's 0600 would surprise whoever reads it
        const bool closed = close(std::exchange(descriptor_, -1)) == 0;
        if (!open || !closed || std::rename(name_.c_str(), target.c_str()) != 0)
            throw std::system_error(errno, std::generic_category());
        moved_ = true;
    }

 private:
    std::string name_;
    int descriptor_;
    bool moved_ = false;
};

}  // namespace

Bytes read_file(const std::string &path, std::size_t limit) {
    const auto close = [](std::FILE *file) { std::fclose(file); };
    const std::unique_ptr<std::FILE, decltype(close)> file(std::fopen(path.c_str(), "rb"), close);
    if (!file) throw cannot("read", path, errno);
    Bytes bytes;
    constexpr std::size_t kChunk = 1 << 20;
    std::size_t count = kChunk;
    while (count == kChunk && bytes.size() <= limit) {
        const std::size_t size = bytes.size();
        bytes.resize(size + kChunk);
        count = std::fread(bytes.data() + size, 1, kChunk, file.get());
        bytes.resize(size + count);
    }
    if (std::ferror(file.get())) throw cannot("read", path, errno);
    if (bytes.size() > limit) throw Error("cannot read " + path + ": larger than " + std::to_string(limit) + " bytes");
    return bytes;
}

void write_file(const std::string &path, const Bytes &bytes) {
    namespace fs = std::filesystem;
    try {
        fs::path target = fs::absolute(path);
        for (int links = 0; fs::is_symlink(target); ++links) {
            if (links == kMostLinks) throw cannot("write", path, ELOOP);
            target = target.parent_path() / fs::read_symlink(target);
        }
        if (fs::exists(target) && !fs::is_regular_file(target))
            throw Error("cannot write " + path + ": it is there already and no regular file");
        Aside aside(target);
        aside.write(bytes);
        aside.move_to(target);
    } catch (const std::system_error &error) {
        throw Error("cannot write " + path + ": " + error.code().message());
    }
}

Bytes npy(std::string_view type, const std::vector<std::int64_t> &shape, const std::vector<std::byte> &data) {
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    const char order = '>';
#else
    const char order = '<';
#endif
    std::string header =
        std::string("{'descr': '") + order + std::string(type) + "', 'fortran_order': False, 'shape': (";
    for (const std::int64_t size : shape) header += std::to_string(size) + ",";
    header += "), }";
    constexpr std::size_t kBefore = 10, kAlignment = 64;  // magic, version and the header's length; of what follows
    header.append(kAlignment - 1 - (kBefore + header.size()) % kAlignment, ' ');
    header += '\n';
    const std::string magic = "\x93NUMPY\x01" + std::string(1, '\0');
    Bytes bytes(magic.begin(), magic.end());
    bytes.push_back(static_cast<std::uint8_t>(header.size() & 0xFF));
    bytes.push_back(static_cast<std::uint8_t>(header.size() >> 8));
    bytes.insert(bytes.end(), header.begin(), header.end());
    const auto *raw = reinterpret_cast<const std::uint8_t *>(data.data());
    bytes.insert(bytes.end(), raw, raw + data.size());
    return bytes;
}

}  // namespace onnxgbp
