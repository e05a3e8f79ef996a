/* What all the C code is written in: the number that build.py chooses, and threads where there is OpenMP. */
#pragma once

#include <stdint.h>

#ifdef _OPENMP
#include <omp.h>
#define thread_number() omp_get_thread_num()
#else
#define thread_number() 0
#endif

#ifndef REAL
#define REAL float
#endif
#define BYTES_float 4
#define BYTES_double 8
#define BYTES_OF(type) BYTES_##type
#define BYTES_OF_MACRO(type) BYTES_OF(type)
#define REAL_BYTES BYTES_OF_MACRO(REAL) /* for the preprocessor, which does not know sizeof */
typedef REAL real;
