// Runs the tests whose names contain the first argument (all without one); the exit status is the
// number of failures.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <string>

#include "testing.h"

int main(int argc, char** argv) {
  const std::string filter = argc > 1 ? argv[1] : "";
  int failed = 0, ran = 0;
  for (const auto& test : quarot::testing::tests()) {
    if (std::string(test.name).find(filter) == std::string::npos) continue;
    ++ran;
    try {
      test.body();
      std::printf("ok   %s\n", test.name);
    } catch (const std::exception& error) {
      ++failed;
      std::printf("FAIL %s\n     %s\n", test.name, error.what());
    }
    std::fflush(stdout);
  }
  std::printf("%d of %d tests passed\n", ran - failed, ran);
  return ran == 0 ? 1 : std::min(failed, 100);
}
