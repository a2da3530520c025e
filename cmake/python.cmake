# What Python loads: genfuse_ops, _C, and genfuse_cuda where there is CUDA. All three are installed side by side.

find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 3.0 CONFIG QUIET)
if(NOT pybind11_FOUND)
    execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir OUTPUT_VARIABLE pybind11_DIR
                    OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
    find_package(pybind11 3.0 CONFIG REQUIRED)
endif()

execute_process(COMMAND ${Python_EXECUTABLE} ${PROJECT_SOURCE_DIR}/cmake/find_torch.py
                OUTPUT_VARIABLE found ERROR_VARIABLE complaint RESULT_VARIABLE failed OUTPUT_STRIP_TRAILING_WHITESPACE)
if(failed)
    message(FATAL_ERROR "${complaint}")
endif()
list(GET found 0 GENFUSE_TORCH)
list(GET found 1 GENFUSE_TORCH_VERSION)
list(GET found 2 GENFUSE_TORCH_CUDA)
list(GET found 3 GENFUSE_TORCH_OLDEST)
list(GET found 4 GENFUSE_TORCH_TARGET)
message(STATUS "torch ${GENFUSE_TORCH_VERSION} (CUDA: ${GENFUSE_TORCH_CUDA}) in ${GENFUSE_TORCH}")

# torch is taken by its stable headers and one library alone: its own CMake package would ask for a CUDA toolkit wherever
# torch has CUDA, and offers the unstable C++ API.
add_library(genfuse_torch INTERFACE)
target_include_directories(genfuse_torch SYSTEM INTERFACE ${GENFUSE_TORCH}/include)
target_compile_definitions(genfuse_torch INTERFACE TORCH_TARGET_VERSION=${GENFUSE_TORCH_TARGET})
if(WIN32)
    target_link_libraries(genfuse_torch INTERFACE ${GENFUSE_TORCH}/lib/torch_cpu.lib)
elseif(APPLE)
    target_link_libraries(genfuse_torch INTERFACE ${GENFUSE_TORCH}/lib/libtorch_cpu.dylib)
else()
    target_link_libraries(genfuse_torch INTERFACE ${GENFUSE_TORCH}/lib/libtorch_cpu.so)
endif()

# A path to this machine's torch has no place in a library that may run elsewhere: torch is loaded before it.
set(CMAKE_SKIP_RPATH ON)
if(APPLE)
    set(CMAKE_MACOSX_RPATH OFF)
endif()

# ---- genfuse_ops ------------------------------------------------------------------------------------------------------
# A library's own files are an object library, too: in a target's list of sources they would be linked after the kernels,
# and the order is what keeps new instructions out of shared inline functions (kernels.cmake).
add_library(genfuse_ops_objects OBJECT ${PROJECT_SOURCE_DIR}/csrc/library.cpp ${GENFUSE_OPS_SOURCES})
target_include_directories(genfuse_ops_objects PRIVATE ${PROJECT_SOURCE_DIR}/csrc)
target_compile_options(genfuse_ops_objects PRIVATE ${GENFUSE_WARNINGS} ${GENFUSE_PATH_FLAGS})
target_link_libraries(genfuse_ops_objects PRIVATE genfuse_torch)
add_library(genfuse_ops MODULE $<TARGET_OBJECTS:genfuse_ops_objects> ${GENFUSE_KERNELS})
target_link_libraries(genfuse_ops PRIVATE genfuse_torch)
set_target_properties(genfuse_ops PROPERTIES PREFIX lib LINKER_LANGUAGE CXX)
if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
    target_link_options(genfuse_ops PRIVATE -Wl,--no-undefined)
endif()
install(TARGETS genfuse_ops LIBRARY DESTINATION genfuse)

# ---- genfuse_cuda -----------------------------------------------------------------------------------------------------
set(GENFUSE_BUILD_CUDA OFF)
set(GENFUSE_CUDA_VERSION "")
set(archs "")
if(GENFUSE_CUDA_SOURCES AND (GENFUSE_CUDA STREQUAL "AUTO" OR GENFUSE_CUDA))
    # AUTO leaves a CPU-only torch alone: its users could not run what would take minutes to compile.
    if(NOT GENFUSE_CUDA STREQUAL "AUTO" OR NOT GENFUSE_TORCH_CUDA STREQUAL "none")
        include(CheckLanguage)
        check_language(CUDA)
        if(CMAKE_CUDA_COMPILER)
            set(GENFUSE_BUILD_CUDA ON)
        elseif(NOT GENFUSE_CUDA STREQUAL "AUTO")
            message(FATAL_ERROR "GENFUSE_CUDA=ON, but no CUDA compiler was found: put nvcc on PATH or set CUDACXX.")
        endif()
    endif()
endif()
if(GENFUSE_BUILD_CUDA)
    if(NOT CMAKE_CUDA_ARCHITECTURES)
        set(CMAKE_CUDA_ARCHITECTURES 80)  # replaced below; CMake wants one before it knows the compiler's version
    endif()
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    set(GENFUSE_CUDA_VERSION ${CMAKE_CUDA_COMPILER_VERSION})
    set(archs ${GENFUSE_CUDA_ARCHS})
    if(NOT archs)
        if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
            set(archs 80-real 90-real 100)
        else()
            set(archs 80-real 90)
        endif()
    endif()
    add_library(genfuse_cuda MODULE ${GENFUSE_CUDA_SOURCES})
    target_include_directories(genfuse_cuda PRIVATE ${PROJECT_SOURCE_DIR}/csrc)
    # USE_CUDA shows the shim that gives torch's current stream. A CPU build of torch lacks that symbol, so it stays open
    # until the library is loaded, which happens only where torch has CUDA.
    target_compile_definitions(genfuse_cuda PRIVATE USE_CUDA)
    target_compile_options(genfuse_cuda PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:${GENFUSE_WARNINGS};${GENFUSE_PATH_FLAGS}>"
        $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra --expt-relaxed-constexpr>)
    if(GENFUSE_WERROR)
        target_compile_options(genfuse_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>)
    endif()
    target_link_libraries(genfuse_cuda PRIVATE genfuse_torch CUDA::cudart_static)
    set_target_properties(genfuse_cuda PROPERTIES PREFIX lib CUDA_ARCHITECTURES "${archs}" CUDA_RUNTIME_LIBRARY Static
                          CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON)
    if(WIN32)
        target_link_libraries(genfuse_cuda PRIVATE ${GENFUSE_TORCH}/lib/torch_cuda.lib)
    elseif(APPLE)
        target_link_options(genfuse_cuda PRIVATE -undefined dynamic_lookup)
    endif()
    install(TARGETS genfuse_cuda LIBRARY DESTINATION genfuse)
endif()
message(STATUS "CUDA kernels: ${GENFUSE_BUILD_CUDA} (GENFUSE_CUDA=${GENFUSE_CUDA}) ${GENFUSE_CUDA_VERSION} ${archs}")

# ---- _C ---------------------------------------------------------------------------------------------------------------
add_library(genfuse_module_objects OBJECT ${PROJECT_SOURCE_DIR}/csrc/module.cpp)
target_include_directories(genfuse_module_objects PRIVATE ${PROJECT_SOURCE_DIR}/csrc)
target_compile_options(genfuse_module_objects PRIVATE ${GENFUSE_WARNINGS})
target_link_libraries(genfuse_module_objects PRIVATE pybind11::module)
pybind11_add_module(genfuse_module MODULE NO_EXTRAS $<TARGET_OBJECTS:genfuse_module_objects> ${GENFUSE_KERNELS})
set_target_properties(genfuse_module PROPERTIES OUTPUT_NAME _C LINKER_LANGUAGE CXX)
list(JOIN archs "," archs)
target_compile_definitions(genfuse_module_objects PRIVATE
    GENFUSE_VERSION="${PROJECT_VERSION}"
    GENFUSE_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
    GENFUSE_BUILD_TYPE="${CMAKE_BUILD_TYPE}"
    GENFUSE_TORCH_HEADERS="${GENFUSE_TORCH_VERSION}"
    GENFUSE_TORCH_OLDEST="${GENFUSE_TORCH_OLDEST}"
    GENFUSE_CUDA_VERSION="${GENFUSE_CUDA_VERSION}"
    GENFUSE_CUDA_ARCHS="${archs}")
install(TARGETS genfuse_module LIBRARY DESTINATION genfuse)
