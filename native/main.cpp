// onnxgbp-run: the command line.
#include <getopt.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "error.hpp"
#include "explainer.hpp"
#include "files.hpp"
#include "image.hpp"
#include "render.hpp"
#include "runtime.hpp"

namespace {

using namespace onnxgbp;

constexpr int kRefused = 1, kUsage = 2;

constexpr char kHelp[] =
    "Usage: onnxgbp-run [OPTION]... MODEL IMAGE\n"
    "\n"
    "Explains IMAGE (PPM, or PNG where built with libpng) with MODEL, a file that `onnxgbp convert` wrote: prints the\n"
    "strongest classes and the one that is explained, and writes the attribution where asked to.\n"
    "\n"
    "  -o, --out FILE       write the signed attribution as a picture, .ppm or .png\n"
    "      --raw FILE       write it raw, as a NumPy array (.npy)\n"
    "      --target K       the class to explain, or argmax (the default); MODEL converted with --target input\n"
    "      --top K          how many classes to print (default 5)\n"
    "      --provider NAME  cpu (the default), or cuda: CUDA, or an error\n"
    "      --threads N      threads within one operator (default: ONNX Runtime's choice)\n"
    "      --library FILE   ONNX Runtime's library; else the environment's ONNXRUNTIME_LIBRARY, else\n"
    "                       libonnxruntime.so.1 or libonnxruntime.so where the loader finds it\n"
    "  -h, --help           print this\n"
    "      --version        print the version\n"
    "\n"
    "Exit status: 0 done, 1 refused, 2 wrong usage.\n";

struct Options {
    std::string model, image, library, out, raw;
    std::optional<std::int64_t> target;
    std::size_t top = 5;
    int threads = 0;
    Provider provider = Provider::cpu;
};

[[noreturn]] void usage(const std::string &fault) {
    std::fprintf(stderr, "onnxgbp-run: %s; try --help\n", fault.c_str());
    std::exit(kUsage);
}

int count(const std::string &option, const char *text, int least) {
    char *end = nullptr;
    const long value = std::strtol(text, &end, 10);
    if (end == text || *end != '\0' || value < least || value > INT_MAX)
        usage("--" + option + " '" + text + "' is no integer of " + std::to_string(least) + " or more");
    return static_cast<int>(value);
}

Options parsed(int argc, char **argv) {
    enum : int { kLibrary = 256, kProvider, kTarget, kThreads, kRaw, kTop, kVersion };
    const option names[] = {{"out", required_argument, nullptr, 'o'},
                            {"raw", required_argument, nullptr, kRaw},
                            {"target", required_argument, nullptr, kTarget},
                            {"top", required_argument, nullptr, kTop},
                            {"provider", required_argument, nullptr, kProvider},
                            {"threads", required_argument, nullptr, kThreads},
                            {"library", required_argument, nullptr, kLibrary},
                            {"help", no_argument, nullptr, 'h'},
                            {"version", no_argument, nullptr, kVersion},
                            {nullptr, 0, nullptr, 0}};
    Options options;
    for (int c; (c = getopt_long(argc, argv, "ho:", names, nullptr)) != -1;) {
        const std::string value = optarg ? optarg : "";
        switch (c) {
            case 'o':
                options.out = value;
                break;
            case kRaw:
                options.raw = value;
                break;
            case kTarget:
                options.target =
                    value == "argmax" ? std::nullopt : std::optional<std::int64_t>(count("target", optarg, 0));
                break;
            case kTop:
                options.top = static_cast<std::size_t>(count("top", optarg, 0));
                break;
            case kProvider:
                if (value != "cpu" && value != "cuda") usage("--provider '" + value + "' is neither cpu nor cuda");
                options.provider = value == "cuda" ? Provider::cuda : Provider::cpu;
                break;
            case kThreads:
                options.threads = count("threads", optarg, 1);
                break;
            case kLibrary:
                options.library = value;
                break;
            case 'h':
                std::fputs(kHelp, stdout);
                std::exit(0);
            case kVersion:
                std::puts("onnxgbp-run " ONNXGBP_VERSION);
                std::exit(0);
            default:
                std::exit(kUsage);  // getopt has said why
        }
    }
    if (argc - optind != 2) usage(argc - optind < 2 ? "give a model and an image" : "more than a model and an image");
    options.model = argv[optind];
    options.image = argv[optind + 1];
    return options;
}

/// Text from a model's file, without what a terminal would take for a command.
std::string shown(std::string text) {
    std::replace_if(text.begin(), text.end(), [](unsigned char c) { return c < 0x20 || c == 0x7F; }, '?');
    return text;
}

std::string named(const Explainer &explainer, std::int64_t index) {
    const std::string label = explainer.explains_unit ? "" : explainer.label(index);
    return std::to_string(index) + (label.empty() ? "" : " " + shown(label));
}

/// The classes in order of their scores, equal ones by number, what is no number last.
std::vector<std::size_t> strongest(const std::vector<double> &scores, std::size_t most) {
    std::vector<std::size_t> order(scores.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
        return scores[a] > scores[b] || (std::isnan(scores[b]) && !std::isnan(scores[a]));
    });
    order.resize(std::min(order.size(), most));
    return order;
}

std::string numpy_type(Type type) { return type == Type::float16 ? "f2" : type == Type::float64 ? "f8" : "f4"; }

void run(const Options &options) {
    if (!options.out.empty()) check_picture_name(options.out);
    Explainer explainer(Model(options.model, options.library, options.provider, options.threads));
    explainer.check_target(options.target);
    const auto [x, shape] = explainer.preprocessing.prepare(read_image(options.image));
    const Explanation result = explainer(x, shape, options.target);
    const Picture picture = signed_picture(result.attribution, explainer.layout, explainer.preprocessing.channels);
    if (!options.raw.empty()) {
        const Tensor &raw = result.attribution;
        write_file(options.raw, npy(numpy_type(raw.type), raw.shape, raw.data));
    }
    if (!options.out.empty()) write_image(options.out, picture.image);

    const char *provider = options.provider == Provider::cuda ? "cuda" : "cpu";
    std::printf("%s: %s on %s%s%s\n", options.model.c_str(), shown(explainer.headline).c_str(), provider,
                explainer.behind.empty() ? "" : "; ", shown(explainer.behind).c_str());
    std::printf("input: %s\n", explainer.preprocessing.text().c_str());
    if (!explainer.preprocessing.assumed.empty()) {
        std::string names;
        for (const std::string &name : explainer.preprocessing.assumed) names += (names.empty() ? "" : ", ") + name;
        std::printf("the model does not say how to prepare an image; assumed %s\n", names.c_str());
    }
    std::printf("%s\n", options.image.c_str());
    for (const std::size_t index : strongest(result.scores, options.top))
        std::printf("  %10.4g  %s\n", result.scores[index], named(explainer, static_cast<std::int64_t>(index)).c_str());
    std::printf("  explained: %s\n", named(explainer, result.target).c_str());
    std::printf("  clip: %.4g (%gth percentile of |attribution|)\n", picture.clip, kPercentile);
    if (!picture.warning.empty()) std::printf("  warning: %s\n", picture.warning.c_str());
    if (std::fflush(stdout) != 0 || std::ferror(stdout)) throw Error("cannot print: standard output takes no more");
}

}  // namespace

int main(int argc, char **argv) {
    const Options options = parsed(argc, argv);
    try {
        run(options);
    } catch (const std::bad_alloc &) {
        std::fputs("onnxgbp-run: not enough memory\n", stderr);
        return kRefused;
    } catch (const std::exception &error) {
        std::fprintf(stderr, "onnxgbp-run: %s\n", shown(error.what()).c_str());
        return kRefused;
    }
    return 0;
}
