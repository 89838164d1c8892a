// Nothing: the emulator has no os_log.
#pragma once
