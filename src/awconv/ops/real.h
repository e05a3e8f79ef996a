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
typedef REAL real;
