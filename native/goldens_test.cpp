// What the Python package made of a few photos, made again: goldens-test FOLDER. tests/native_goldens.py writes the
// folder and says what is in it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "explainer.hpp"
#include "files.hpp"
#include "image.hpp"
#include "render.hpp"
#include "runtime.hpp"

namespace {

using namespace onnxgbp;
namespace fs = std::filesystem;

/// The values of a float32 array in NumPy's format, version 1.0.
std::vector<float> floats(const fs::path &path) {
    const Bytes bytes = read_file(path.string(), std::size_t{1} << 26);
    const std::size_t start = 10u + bytes.at(8) + 256u * bytes.at(9);
    const std::string header(bytes.begin() + 10, bytes.begin() + static_cast<std::ptrdiff_t>(start));
    if (header.find("'<f4'") == std::string::npos) throw std::runtime_error(path.string() + " is not of float32");
    std::vector<float> values((bytes.size() - start) / sizeof(float));
    std::memcpy(values.data(), bytes.data() + start, values.size() * sizeof(float));
    return values;
}

double largest_error(const std::vector<double> &got, const std::vector<float> &wanted) {
    if (got.size() != wanted.size() || got.empty()) return INFINITY;
    double error = 0, low = wanted[0], high = wanted[0];
    for (std::size_t i = 0; i < got.size(); ++i) {
        error = std::max(error, std::isnan(got[i]) ? INFINITY : std::abs(got[i] - static_cast<double>(wanted[i])));
        low = std::min(low, static_cast<double>(wanted[i]));
        high = std::max(high, static_cast<double>(wanted[i]));
    }
    return error == 0 ? 0 : error / (high - low);
}

/// Pixels that differ.
std::size_t differing(const std::vector<Colour> &got, const std::vector<Colour> &wanted) {
    if (got.size() != wanted.size()) return std::max(got.size(), wanted.size());
    std::size_t count = 0;
    for (std::size_t i = 0; i < got.size(); ++i) count += got[i] != wanted[i];
    return count;
}

bool passes(Explainer &explainer, const fs::path &folder) {
    fs::path photo;
    for (const auto &entry : fs::directory_iterator(folder))
        if (entry.path().stem() == "photo") photo = entry.path();
#ifndef ONNXGBP_PNG
    if (photo.extension() == ".png") {
        std::printf("%s: left out, built without libpng\n", folder.filename().c_str());
        return true;
    }
#endif
    std::int64_t asked = 0, explained = 0;
    if (!(std::ifstream(folder / "target.txt") >> asked >> explained))
        throw std::runtime_error("target.txt is damaged");

    const auto [x, shape] = explainer.preprocessing.prepare(read_image(photo.string()));
    const std::vector<float> input = floats(folder / "input.npy");
    std::size_t wrong = x.size() == input.size() ? 0 : input.size();
    for (std::size_t i = 0; i < std::min(x.size(), input.size()); ++i) wrong += x[i] != input[i];

    const auto target = asked < 0 ? std::nullopt : std::optional(asked);
    const Explanation result = explainer(x, shape, target);
    const double error = largest_error(result.attribution.values(), floats(folder / "attribution.npy"));
    const double score_error = largest_error(result.scores, floats(folder / "scores.npy"));
    const Picture picture = signed_picture(result.attribution, explainer.layout, explainer.preprocessing.channels);
    const std::size_t pixels = differing(picture.image.pixels, read_image((folder / "picture.ppm").string()).pixels);

    std::printf(
        "%s: %zu of %zu input values differ; attribution within %.1e and scores within %.1e of their range; "
        "target %lld; %zu of %zu pixels of the picture differ\n",
        folder.filename().c_str(), wrong, input.size(), error, score_error, static_cast<long long>(result.target),
        pixels, picture.image.pixels.size());
    // The input to the last bit. The rest is another run of float32 arithmetic, which may be split over threads
    // otherwise; a value then falls on the other side of a pixel's rounding now and then.
    return wrong == 0 && error <= 1e-4 && score_error <= 1e-5 && result.target == explained &&
           pixels <= picture.image.pixels.size() / 1000;
}

}  // namespace

int main(int argc, char **argv) {
    if (argc != 2) {
        std::fputs("usage: goldens-test FOLDER\n", stderr);
        return 2;
    }
    try {
        const fs::path folder = argv[1];
        Explainer explainer(Model((folder / "model.onnx").string(), "", Provider::cpu, 0));
        int cases = 0, failed = 0;
        for (const auto &entry : fs::directory_iterator(folder)) {
            if (!entry.is_directory()) continue;
            ++cases;
            failed += !passes(explainer, entry.path());
        }
        std::printf("%d cases, %d failed\n", cases, failed);
        return cases > 0 && failed == 0 ? 0 : 1;
    } catch (const std::exception &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
