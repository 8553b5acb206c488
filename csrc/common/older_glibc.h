// Included before all else where FASTREG_OLDER_GLIBC is on: the templates of libstdc++ are made here instead
// of taken from the library, whose newer ones older systems lack.
#pragma once

#include <bits/c++config.h>

#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 0
