// The declarations of cpu/kernels.h for every instruction set this build has.
#pragma once

#define POSTTRAIN_ISA baseline
#include "cpu/kernels.h"
#undef POSTTRAIN_ISA

#if defined(__x86_64__) || defined(_M_X64)
#define POSTTRAIN_ISA avx2
#include "cpu/kernels.h"
#undef POSTTRAIN_ISA
#define POSTTRAIN_ISA avx512
#include "cpu/kernels.h"
#undef POSTTRAIN_ISA
#endif
