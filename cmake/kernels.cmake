# The kernels: every csrc/<op>_cpu.cpp, once for each instruction set, as object libraries.

if(MSVC AND NOT CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
    message(FATAL_ERROR "The kernels use vector extensions that only GCC and Clang have: build with clang-cl (-T ClangCL).")
endif()

# No -ffast-math: NaN and infinity must come through. The three flags below change no result but the contraction to FMA.
set(GENFUSE_KERNEL_FLAGS -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math)
set(GENFUSE_WARNINGS -Wall -Wextra)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    list(APPEND GENFUSE_WARNINGS -Wno-psabi)  # vector arguments never cross a library's border
endif()
if(GENFUSE_WERROR)
    list(APPEND GENFUSE_WARNINGS -Werror)
endif()
# A failed check names its file: csrc/..., wherever the sources lay when they were compiled.
set(GENFUSE_PATH_FLAGS -ffile-prefix-map=${PROJECT_SOURCE_DIR}/=)
if(CMAKE_CXX_COMPILER_FRONTEND_VARIANT STREQUAL "MSVC")  # clang-cl takes GCC's flags behind a prefix
    list(TRANSFORM GENFUSE_KERNEL_FLAGS PREPEND /clang:)
    list(TRANSFORM GENFUSE_PATH_FLAGS PREPEND /clang:)
endif()

string(TOLOWER "${CMAKE_SYSTEM_PROCESSOR}" GENFUSE_PROCESSOR)
set(GENFUSE_ISAS baseline)
set(GENFUSE_FLAGS_baseline "")
if(GENFUSE_PROCESSOR MATCHES "^(x86_64|amd64)$" AND NOT CMAKE_OSX_ARCHITECTURES MATCHES "arm64")
    list(APPEND GENFUSE_ISAS avx2 avx512)
    set(GENFUSE_FLAGS_avx2 -mavx2 -mfma -mf16c)
    # GCC and Clang prefer 256-bit vectors even with AVX-512; the kernels ask for the width they want.
    set(GENFUSE_FLAGS_avx512 -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
endif()

set(GENFUSE_CPU_SOURCES "")
set(GENFUSE_OPS_SOURCES "")
set(GENFUSE_CUDA_SOURCES "")
foreach(op IN LISTS GENFUSE_OPS)
    set(found FALSE)
    foreach(layer "CPU:_cpu.cpp" "OPS:_ops.cpp" "CUDA:_cuda.cu" "CUDA:_cuda_ops.cpp")
        string(REPLACE ":" ";" layer "${layer}")
        list(GET layer 0 library)
        list(GET layer 1 suffix)
        set(source ${PROJECT_SOURCE_DIR}/csrc/${op}${suffix})
        if(EXISTS ${source})
            list(APPEND GENFUSE_${library}_SOURCES ${source})
            set(found TRUE)
        endif()
    endforeach()
    if(NOT found)
        message(WARNING "${op} is in GENFUSE_OPS, but there is no csrc/${op}_*.cpp")
    endif()
endforeach()
file(GLOB GENFUSE_LAYERS ${PROJECT_SOURCE_DIR}/csrc/*/*_cpu.cpp ${PROJECT_SOURCE_DIR}/csrc/*/*_ops.cpp
     ${PROJECT_SOURCE_DIR}/csrc/*/*_cuda.cu)
list(REMOVE_ITEM GENFUSE_LAYERS ${GENFUSE_CPU_SOURCES} ${GENFUSE_OPS_SOURCES} ${GENFUSE_CUDA_SOURCES})
if(GENFUSE_LAYERS)
    message(WARNING "Not built, because its stem is not in GENFUSE_OPS (CMakeLists.txt): ${GENFUSE_LAYERS}")
endif()

list(TRANSFORM GENFUSE_COMMON PREPEND ${PROJECT_SOURCE_DIR}/csrc/)
add_library(genfuse_common OBJECT ${GENFUSE_COMMON})
target_include_directories(genfuse_common PRIVATE ${PROJECT_SOURCE_DIR}/csrc)
target_compile_options(genfuse_common PRIVATE ${GENFUSE_WARNINGS} ${GENFUSE_KERNEL_FLAGS})
list(JOIN GENFUSE_ISAS "," GENFUSE_ISA_LIST)
target_compile_definitions(genfuse_common PRIVATE GENFUSE_ISA=baseline GENFUSE_ISAS="${GENFUSE_ISA_LIST}")

# The order matters. An inline function of the standard library that several files use exists in several versions, and the
# linker keeps the first: with the oldest instruction set in front, that one runs everywhere.
set(GENFUSE_KERNELS $<TARGET_OBJECTS:genfuse_common>)
if(GENFUSE_CPU_SOURCES)
    foreach(isa IN LISTS GENFUSE_ISAS)
        add_library(genfuse_kernels_${isa} OBJECT ${GENFUSE_CPU_SOURCES})
        target_include_directories(genfuse_kernels_${isa} PRIVATE ${PROJECT_SOURCE_DIR}/csrc)
        target_compile_definitions(genfuse_kernels_${isa} PRIVATE GENFUSE_ISA=${isa})
        target_compile_options(genfuse_kernels_${isa} PRIVATE ${GENFUSE_WARNINGS} ${GENFUSE_KERNEL_FLAGS} ${GENFUSE_FLAGS_${isa}})
        list(APPEND GENFUSE_KERNELS $<TARGET_OBJECTS:genfuse_kernels_${isa}>)
    endforeach()
endif()
