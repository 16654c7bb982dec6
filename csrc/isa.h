// The instruction set of this process, chosen once, and the call that goes to the kernels compiled for it.
//
// Every csrc/cpu/*.cpp is compiled as baseline, avx2 and avx512 (POSTTRAIN_ISA names which), each into a namespace
// of that name. A kernel file defines its functions in `namespace posttrain::POSTTRAIN_ISA` and lists them in
// cpu/kernels.h. Kernel files use no standard-library templates: those would be compiled with wide
// instructions too, and the linker could pick that copy for every caller on an old CPU.
#pragma once

namespace posttrain {

enum class Isa { baseline, avx2, avx512 };

// The best instruction set this CPU has, or the one named by POSTTRAIN_ISA in the environment if the CPU has it.
Isa isa();
const char* isa_name();

}  // namespace posttrain

#if defined(__x86_64__) || defined(_M_X64)
#define POSTTRAIN_CALL(fn, ...)                                           \
  (::posttrain::isa() == ::posttrain::Isa::avx512                         \
       ? ::posttrain::avx512::fn(__VA_ARGS__)                             \
       : ::posttrain::isa() == ::posttrain::Isa::avx2 ? ::posttrain::avx2::fn(__VA_ARGS__) \
                                                      : ::posttrain::baseline::fn(__VA_ARGS__))
#else
#define POSTTRAIN_CALL(fn, ...) ::posttrain::baseline::fn(__VA_ARGS__)
#endif
