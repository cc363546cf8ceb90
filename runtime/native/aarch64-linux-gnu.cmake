# Cross-compiles gemma_native for 64-bit ARM boards. Needs Debian's or Ubuntu's
# g++-aarch64-linux-gnu, and executorch's wheel for such boards, unpacked but not installed:
#   pip download --no-deps --only-binary=:all: --platform manylinux_2_28_aarch64 executorch==1.5.1
#   unzip -d wheel executorch-*.whl
#   cmake -S . -B build -DCMAKE_TOOLCHAIN_FILE=$PWD/aarch64-linux-gnu.cmake \
#     -DCMAKE_PREFIX_PATH=$PWD/wheel/executorch
#   cmake --build build && cmake --install build --prefix board
# The folder runs on any 64-bit ARM Linux with glibc 2.34 and GCC 12's libstdc++, or newer:
#   board/gemma_native model.pte 4 128 32 2 651 5253
#   GEMMA_NATIVE=board/gemma_native gemma-runtime run BUNDLE "Once upon a time"
# For an older board, build against its own libraries: -DCMAKE_SYSROOT=…
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
find_program(CMAKE_CXX_COMPILER NAMES aarch64-linux-gnu-g++ aarch64-linux-gnu-g++-12 REQUIRED)
