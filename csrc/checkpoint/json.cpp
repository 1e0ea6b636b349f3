#include "checkpoint/json.h"

#include <c10/util/Exception.h>

#include <charconv>
#include <system_error>
#include <utility>

namespace micro_files {
namespace {

constexpr int kDeepest = 64;

bool is_digit(int c) { return c >= '0' && c <= '9'; }

void append_utf8(std::string& out, uint32_t point) {
  const auto put = [&out](uint32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (point < 0x80) {
    put(point);
  } else if (point < 0x800) {
    put(0xC0 | point >> 6);
    put(0x80 | (point & 0x3F));
  } else if (point < 0x10000) {
    put(0xE0 | point >> 12);
    put(0x80 | (point >> 6 & 0x3F));
    put(0x80 | (point & 0x3F));
  } else {
    put(0xF0 | point >> 18);
    put(0x80 | (point >> 12 & 0x3F));
    put(0x80 | (point >> 6 & 0x3F));
    put(0x80 | (point & 0x3F));
  }
}

class Parser {
 public:
  Parser(std::string_view text, const std::string& where) : text_(text), where_(where) {}

  Json document() {
    Json value = parse_value(0);
    skip_space();
    if (at_ < text_.size()) fail("expected the end");
    return value;
  }

 private:
  static constexpr int kEnd = -1;

  int peek() const { return at_ < text_.size() ? static_cast<unsigned char>(text_[at_]) : kEnd; }

  [[noreturn]] void fail_at(size_t at, const std::string& what) const {
    TORCH_CHECK_VALUE(false, where_, ": not valid JSON at byte ", at, ": ", what);
  }
  // What was expected here, and what stands here.
  [[noreturn]] void fail(const std::string& expected) const {
    const int c = peek();
    std::string got = "the end of the text";
    if (c != kEnd) got = c > 0x20 && c < 0x7F ? std::string{'\'', text_[at_], '\''} : "the byte " + std::to_string(c);
    fail_at(at_, expected + ", got " + got);
  }

  void skip_space() {
    while (at_ < text_.size() && std::string_view(" \t\n\r").find(text_[at_]) != std::string_view::npos) ++at_;
  }
  bool accept(char c) {
    if (peek() != static_cast<unsigned char>(c)) return false;
    ++at_;
    return true;
  }

  Json parse_value(int depth) {
    if (depth > kDeepest) fail_at(at_, "more than 64 levels of nesting");
    skip_space();
    switch (peek()) {
      case '{':
        return {parse_object(depth)};
      case '[':
        return {parse_array(depth)};
      case '"':
        return {parse_string()};
      case 't':
        return parse_word("true", {true});
      case 'f':
        return parse_word("false", {false});
      case 'n':
        return parse_word("null", {nullptr});
      default:
        if (is_digit(peek()) || peek() == '-') return parse_number();
        fail("expected a value");
    }
  }

  Json parse_word(std::string_view word, Json value) {
    if (text_.substr(at_, word.size()) != word) fail_at(at_, "expected true, false or null");
    at_ += word.size();
    return value;
  }

  Json::Object parse_object(int depth) {
    Json::Object object;
    ++at_;
    skip_space();
    if (accept('}')) return object;
    do {
      skip_space();
      const size_t start = at_;
      if (peek() != '"') fail("expected a key in quotes");
      std::string key = parse_string();
      skip_space();
      if (!accept(':')) fail("expected ':'");
      Json value = parse_value(depth + 1);
      const auto [place, added] = object.try_emplace(std::move(key), std::move(value));
      if (!added) fail_at(start, "the key \"" + place->first + "\" comes twice");
      skip_space();
    } while (accept(','));
    if (!accept('}')) fail("expected ',' or '}'");
    return object;
  }

  Json::Array parse_array(int depth) {
    Json::Array array;
    ++at_;
    skip_space();
    if (accept(']')) return array;
    do {
      array.push_back(parse_value(depth + 1));
      skip_space();
    } while (accept(','));
    if (!accept(']')) fail("expected ',' or ']'");
    return array;
  }

  std::string parse_string() {
    std::string out;
    ++at_;
    while (!accept('"')) {
      const int c = peek();
      if (c == kEnd) fail("expected the end of a string");
      if (c < 0x20) fail("expected no control character in a string");
      if (c == '\\') {
        parse_escape(out);
      } else if (c < 0x80) {
        out.push_back(text_[at_++]);
      } else {
        copy_utf8(out);
      }
    }
    return out;
  }

  void parse_escape(std::string& out) {
    ++at_;
    constexpr std::string_view kWritten = "\"\\/bfnrt", kMeant = "\"\\/\b\f\n\r\t";
    const int c = peek();
    if (c == 'u') {
      append_utf8(out, parse_code_point());
      return;
    }
    const size_t known = c == kEnd ? std::string_view::npos : kWritten.find(static_cast<char>(c));
    if (known == std::string_view::npos) fail("expected one of \" \\ / b f n r t u behind a backslash");
    out.push_back(kMeant[known]);
    ++at_;
  }

  // Behind the backslash: u and four digits, of which two in a row may make one character.
  uint32_t parse_code_point() {
    const size_t start = at_ - 1;
    const uint32_t high = parse_unit();
    if (high >= 0xDC00 && high < 0xE000) fail_at(start, "half of a surrogate pair");
    if (high < 0xD800 || high >= 0xDC00) return high;
    if (!accept('\\') || peek() != 'u') fail_at(start, "half of a surrogate pair");
    const uint32_t low = parse_unit();
    if (low < 0xDC00 || low >= 0xE000) fail_at(start, "half of a surrogate pair");
    return 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00);
  }

  uint32_t parse_unit() {
    ++at_;
    uint32_t unit = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const int c = peek(), lower = c | 0x20;
      if (is_digit(c)) {
        unit = unit * 16 + static_cast<uint32_t>(c - '0');
      } else if (c != kEnd && lower >= 'a' && lower <= 'f') {
        unit = unit * 16 + static_cast<uint32_t>(lower - 'a' + 10);
      } else {
        fail("expected four hexadecimal digits");
      }
    }
    return unit;
  }

  // One character of two to four bytes, in its shortest form.
  void copy_utf8(std::string& out) {
    const int first = peek();
    const size_t length = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
    if (first < 0xC2 || first > 0xF4 || at_ + length > text_.size()) fail("expected UTF-8");
    uint32_t point = static_cast<uint32_t>(first) & (0x7Fu >> length);
    for (size_t i = 1; i < length; ++i) {
      const auto next = static_cast<unsigned char>(text_[at_ + i]);
      if ((next & 0xC0) != 0x80) fail("expected UTF-8");
      point = point << 6 | (next & 0x3Fu);
    }
    const uint32_t least = length == 4 ? 0x10000 : length == 3 ? 0x800 : 0x80;
    if (point < least || point > 0x10FFFF || (point >= 0xD800 && point < 0xE000)) fail("expected UTF-8");
    out.append(text_.substr(at_, length));
    at_ += length;
  }

  void skip_digits() {
    if (!is_digit(peek())) fail("expected a digit");
    while (is_digit(peek())) ++at_;
  }

  Json parse_number() {
    const size_t start = at_;
    bool whole = true;
    accept('-');
    if (!accept('0')) skip_digits();
    if (accept('.')) {
      whole = false;
      skip_digits();
    }
    if (accept('e') || accept('E')) {
      whole = false;
      if (!accept('-')) accept('+');
      skip_digits();
    }
    const char *begin = text_.data() + start, *end = text_.data() + at_;
    if (int64_t number = 0; whole && std::from_chars(begin, end, number).ec == std::errc()) return {number};
    double number = 0;
    if (std::from_chars(begin, end, number).ec != std::errc()) fail_at(start, "a number that float64 cannot hold");
    return {number};
  }

  std::string_view text_;
  const std::string& where_;
  size_t at_ = 0;
};

}  // namespace

const char* Json::kind() const {
  constexpr const char* kKinds[] = {"null",     "true or false", "a whole number", "a number with a fraction",
                                    "a string", "an array",      "an object"};
  return kKinds[value.index()];
}

const Json* Json::find(std::string_view name) const {
  const auto* object = as<Object>();
  if (object == nullptr) return nullptr;
  const auto found = object->find(name);
  return found == object->end() ? nullptr : &found->second;
}

Json parse_json(std::string_view text, const std::string& where) { return Parser(text, where).document(); }

}  // namespace micro_files
