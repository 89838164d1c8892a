// Nothing: the emulator's math functions take bfloat themselves.
#pragma once
