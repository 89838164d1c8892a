// The Objective-C runtime declarations that metal-cpp uses; mock_device.cpp defines those that
// are called.
#pragma once
#include <math.h>  // INFINITY, which metal-cpp expects from here
#include <stddef.h>
#include <stdint.h>
typedef struct objc_class* Class;
typedef struct objc_object {
  Class isa;
}* id;
typedef struct objc_selector* SEL;
typedef struct objc_method* Method;
typedef struct objc_object Protocol;
typedef void (*IMP)(void);
typedef signed char BOOL;
struct objc_method_description {
  SEL name;
  char* types;
};
extern "C" {
SEL sel_registerName(const char*);
const char* sel_getName(SEL);
Class objc_getClass(const char*);
id objc_lookUpClass(const char*);
Protocol* objc_getProtocol(const char*);
Class object_getClass(id);
const char* object_getClassName(id);
objc_method_description protocol_getMethodDescription(Protocol*, SEL, BOOL, BOOL);
IMP class_getMethodImplementation(Class, SEL);
Method class_getInstanceMethod(Class, SEL);
}
