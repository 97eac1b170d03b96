# Interface target `torch_stable`: the headers of LibTorch's stable ABI and libtorch.so.
# Not find_package(Torch): that drags in Caffe2's targets and rewrites the CUDA flags.
execute_process(
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/find_torch.py"
  OUTPUT_VARIABLE torch_facts
  ERROR_VARIABLE torch_error
  RESULT_VARIABLE torch_result
  OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT torch_result EQUAL 0)
  string(STRIP "${torch_error}" torch_error)
  message(FATAL_ERROR "${torch_error}")
endif()
string(REGEX MATCH "^[^\n]*" QUAROT_TORCH_DIR "${torch_facts}")
# Not REGEX REPLACE "^…": that anchor matches again after each replacement and would eat both lines.
string(REGEX MATCH "\n(.*)$" _ "${torch_facts}")
set(QUAROT_TORCH_CUDA "${CMAKE_MATCH_1}")
message(STATUS "torch: ${QUAROT_TORCH_DIR} (CUDA: ${QUAROT_TORCH_CUDA})")

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${QUAROT_TORCH_DIR}/include")
# 2.11: a _C built with any newer torch then runs on 2.11 and later.
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000ULL)
# The registrations need libtorch although no symbol of ours may mention it directly.
target_link_options(torch_stable INTERFACE
  "LINKER:--push-state,--no-as-needed,${QUAROT_TORCH_DIR}/lib/libtorch.so,--pop-state")
