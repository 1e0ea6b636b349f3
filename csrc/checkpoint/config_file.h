#pragma once

#include <string_view>

#include "micro/config.h"

namespace micro_files {

// The text of a config.json. Fields that are not there have the defaults of MiCRoConfig, sizes have none. Throws
// ValueError that begins with `where` (the file) and names the field, what it is and what was expected.
micro::ModelConfig parse_config(std::string_view text, const std::string& where);

// eos_token_id of a generation_config.json: none, one or several.
std::vector<int64_t> parse_eos_token_ids(std::string_view text, const std::string& where);

}  // namespace micro_files
