#include "json.hpp"

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <utility>

namespace onnxgbp::json {
namespace {

constexpr int kDeepest = 64;  // the parser calls itself: a file of brackets must not use up the stack

class Parser {
 public:
    explicit Parser(std::string_view text) : text_(text) {}

    Value document() {
        Value value = this->value(0);
        space();
        if (at_ != text_.size()) fail("something follows its end");
        return value;
    }

 private:
    [[noreturn]] void fail(const std::string &what) const {
        throw std::invalid_argument(what + " at byte " + std::to_string(at_));
    }

    char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

    bool accept(char wanted) {
        if (at_ == text_.size() || text_[at_] != wanted) return false;
        ++at_;
        return true;
    }

    void expect(char wanted) {
        if (!accept(wanted)) fail(std::string("no '") + wanted + "'");
    }

    void space() {
        while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos) ++at_;
    }

    bool word(std::string_view wanted) {
        if (text_.substr(at_, wanted.size()) != wanted) return false;
        at_ += wanted.size();
        return true;
    }

    Value value(int depth) {
        if (depth > kDeepest) fail("nested too deeply");
        space();
        switch (peek()) {
            case '{':
                return {object(depth)};
            case '[':
                return {array(depth)};
            case '"':
                return {string()};
            default:
                if (word("null")) return {nullptr};
                if (word("true")) return {true};
                if (word("false")) return {false};
                return {number()};
        }
    }

    Object object(int depth) {
        Object members;
        expect('{');
        space();
        if (accept('}')) return members;
        do {
            space();
            std::string name = string();
            space();
            expect(':');
            members.insert_or_assign(std::move(name), value(depth + 1));
            space();
        } while (accept(','));
        expect('}');
        return members;
    }

    Array array(int depth) {
        Array items;
        expect('[');
        space();
        if (accept(']')) return items;
        do {
            items.push_back(value(depth + 1));
            space();
        } while (accept(','));
        expect(']');
        return items;
    }

    std::string string() {
        std::string result;
        expect('"');
        while (!accept('"')) {
            if (at_ == text_.size()) fail("a string without an end");
            const char c = text_[at_++];
            if (static_cast<unsigned char>(c) < 0x20) fail("a control character in a string");
            if (c == '\\')
                escape(result);
            else
                result += c;
        }
        return result;
    }

    void escape(std::string &result) {
        static constexpr std::string_view kEscapes = "\"\\/bfnrt", kMeant = "\"\\/\b\f\n\r\t";
        const char c = peek();
        ++at_;
        if (c == 'u') return unicode(result);
        const std::size_t which = kEscapes.find(c);
        if (c == '\0' || which == std::string_view::npos) fail("an unknown escape");
        result += kMeant[which];
    }

    std::uint32_t hex4() {
        std::uint32_t code = 0;
        for (int i = 0; i < 4; ++i, ++at_) {
            const char c = peek();
            const int digit = c >= '0' && c <= '9'   ? c - '0'
                              : c >= 'a' && c <= 'f' ? c - 'a' + 10
                              : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                     : -1;
            if (digit < 0) fail("no four hexadecimal digits behind \\u");
            code = code * 16 + static_cast<std::uint32_t>(digit);
        }
        return code;
    }

    /// One code point as UTF-8; a half of a surrogate pair becomes U+FFFD.
    void unicode(std::string &result) {
        std::uint32_t code = hex4();
        if (code >= 0xD800 && code < 0xDC00 && text_.substr(at_, 2) == "\\u") {
            const std::size_t before = at_;
            at_ += 2;
            const std::uint32_t low = hex4();
            if (low >= 0xDC00 && low < 0xE000)
                code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
            else
                at_ = before;
        }
        if (code >= 0xD800 && code < 0xE000) code = 0xFFFD;
        const auto tail = [&](int shift) { return static_cast<char>(0x80 | ((code >> shift) & 0x3F)); };
        if (code < 0x80) {
            result += static_cast<char>(code);
        } else if (code < 0x800) {
            result += {static_cast<char>(0xC0 | (code >> 6)), tail(0)};
        } else if (code < 0x10000) {
            result += {static_cast<char>(0xE0 | (code >> 12)), tail(6), tail(0)};
        } else {
            result += {static_cast<char>(0xF0 | (code >> 18)), tail(12), tail(6), tail(0)};
        }
    }

    void digits() {
        const std::size_t start = at_;
        while (peek() >= '0' && peek() <= '9') ++at_;
        if (at_ == start) fail("no value");
    }

    Number number() {
        const std::size_t start = at_;
        bool integer = true;
        accept('-');
        if (!accept('0')) digits();
        if (accept('.')) {
            integer = false;
            digits();
        }
        if (accept('e') || accept('E')) {
            integer = false;
            if (!accept('+')) accept('-');
            digits();
        }
        const std::string spelled(text_.substr(start, at_ - start));  // strtod wants an end
        return {std::strtod(spelled.c_str(), nullptr), integer};
    }

    std::string_view text_;
    std::size_t at_ = 0;
};

}  // namespace

Value parse(std::string_view text) { return Parser(text).document(); }

}  // namespace onnxgbp::json
