#pragma once
// JSON as model folders hold it: a strict reader (RFC 8259) into plain values.

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace micro_files {

// One value. Whole numbers without fraction and exponent that fit are int64; all others are double.
struct Json {
  using Array = std::vector<Json>;
  using Object = std::map<std::string, Json, std::less<>>;

  std::variant<std::nullptr_t, bool, int64_t, double, std::string, Array, Object> value = nullptr;

  template <class T>
  const T* as() const {
    return std::get_if<T>(&value);
  }
  bool is_null() const { return as<std::nullptr_t>() != nullptr; }
  const char* kind() const;  // "null", "a string", ...: for messages

  // The member of an object, or nullptr where this is no object or has no such member.
  const Json* find(std::string_view name) const;
};

// The one value of a text. Refused, each with the byte where it stands: anything behind the value, a key that comes
// twice, NaN, what is no UTF-8, more than 64 levels. Throws ValueError that begins with `where` (a file).
Json parse_json(std::string_view text, const std::string& where);

}  // namespace micro_files
