// A stand-in for NVIDIA's driver: libcuda.so.1 with what virtual memory needs, over memfds, for machines without a GPU.
//
// A handle is a memfd, a reservation is a PROT_NONE range, mapping is mmap of the memfd over a part of it without access,
// granting access is mprotect. So memory is shared between mappings of one handle and gone when the last mapping and the
// last handle are, as on a device. Arguments are checked as the driver documents them, some of them more strictly: every
// call that touches memory wants a current context. Calls named standin_* are the tests': failures, counters, settings.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef int Result;
typedef unsigned long long Address;
typedef struct { int type, id; } Location;
typedef struct { int type, handle_types; Location location; void *security; unsigned char flags[8]; } Properties;
typedef struct { Location location; int flags; } Access;

enum {
  SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101,
  INVALID_CONTEXT = 201, NOT_FOUND = 500, NOT_SUPPORTED = 801,
  DEVICE_LOCATION = 1, PINNED = 1, FILE_DESCRIPTOR = 1, READ_WRITE = 3,
  HOST_ADDRESSES = 91, VIRTUAL_MEMORY_SUPPORTED = 102, FILE_DESCRIPTORS_SUPPORTED = 103,
};

// -- what there is ------------------------------------------------------------------------------------------------------

// The pages of one cuMemCreate; imported ones were counted where they were created.
typedef struct Pages { int fd, handle_types, imported, num_handles, num_mappings; size_t size; } Pages;
typedef struct Handle { Pages *pages; struct Handle *next; } Handle;
typedef struct Mapping { Address address; size_t size; int granted; Pages *pages; struct Mapping *next; } Mapping;
typedef struct Range { Address address; size_t size; int plain; struct Range *next; } Range;

static Handle *handles;
static Mapping *mappings;  // by address
static Range *ranges;      // reservations, and plain allocations
static int initialized, num_retained, lost;  // lost: what broke the context, and every call says from then on
static size_t granularity = 2 << 20, total_bytes = (size_t)1 << 40, taken_bytes;
static int attribute_vmm = 1, attribute_fd = 1, attribute_host = 1, num_devices = 1;
static char primary;  // its address is the primary context
static __thread void *contexts[64];
static __thread int num_contexts;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

// -- failures and counters ----------------------------------------------------------------------------------------------

typedef struct { char name[48]; long first, last, seen; int code; } Rule;
typedef struct { char name[48]; long calls; } Count;
static Rule rules[16];
static int num_rules;
static Count counts[64];
static int num_counts;

static void unlock(int *held) { (void)held; pthread_mutex_unlock(&mutex); }

static Result enter(const char *name) {
  Result failed = SUCCESS;
  int i;
  for (i = 0; i < num_counts && strcmp(counts[i].name, name); i++) {}
  if (i == num_counts && num_counts < 64) strncpy(counts[num_counts++].name, name, 47);
  if (i < 64) counts[i].calls++;
  for (i = 0; i < num_rules; i++) {
    Rule *rule = &rules[i];
    if (rule->name[0] && strcmp(rule->name, name)) continue;
    long seen = ++rule->seen;
    if (!failed && rule->first <= seen && seen <= rule->last) failed = rule->code;
  }
  return failed;
}

// Begins every call: one at a time, counted, and failing if a rule says so.
#define CALL                                                                          \
  __attribute__((cleanup(unlock))) int held = (pthread_mutex_lock(&mutex), 1);        \
  (void)held;                                                                         \
  do { Result failed = enter(__func__); if (failed) return failed; } while (0)
#define REQUIRE(condition, code) do { if (!(condition)) return (code); } while (0)
#define NEEDS_INIT REQUIRE(initialized, NOT_INITIALIZED)
#define NEEDS_CONTEXT NEEDS_INIT; REQUIRE(num_contexts && contexts[num_contexts - 1], INVALID_CONTEXT); REQUIRE(!lost, lost)

// Fails calls number `first` to `last` from now on, of this name ("" for any call), with `code`.
void standin_fail(const char *name, long first, long last, int code) {
  pthread_mutex_lock(&mutex);
  if (num_rules < 16) {
    Rule *rule = &rules[num_rules++];
    memset(rule, 0, sizeof *rule);
    strncpy(rule->name, name, 47);
    rule->first = first, rule->last = last, rule->code = code;
  }
  pthread_mutex_unlock(&mutex);
}
void standin_forget(void) { pthread_mutex_lock(&mutex); num_rules = num_counts = lost = 0; memset(counts, 0, sizeof counts); pthread_mutex_unlock(&mutex); }
long standin_calls(const char *name) {  // "" for all
  long sum = 0;
  pthread_mutex_lock(&mutex);
  for (int i = 0; i < num_counts; i++) if (!name[0] || !strcmp(counts[i].name, name)) sum += counts[i].calls;
  pthread_mutex_unlock(&mutex);
  return sum;
}
void standin_set(size_t granularity_bytes, size_t memory_bytes, int vmm, int descriptors, int devices, int host_addresses) {
  granularity = granularity_bytes, total_bytes = memory_bytes;
  attribute_vmm = vmm, attribute_fd = descriptors, num_devices = devices, attribute_host = host_addresses;
}
size_t standin_taken_bytes(void) { return taken_bytes; }
size_t standin_mapped_bytes(void) { size_t sum = 0; for (Mapping *m = mappings; m; m = m->next) sum += m->size; return sum; }
size_t standin_handle_bytes(void) { size_t sum = 0; for (Handle *h = handles; h; h = h->next) sum += h->pages->size; return sum; }
long standin_num_handles(void) { long n = 0; for (Handle *h = handles; h; h = h->next) n++; return n; }
long standin_num_ranges(void) { long n = 0; for (Range *r = ranges; r; r = r->next) n++; return n; }
long standin_num_retained(void) { return num_retained; }
long standin_num_contexts(void) { return num_contexts; }
void standin_pop_contexts(void) { num_contexts = 0; }

// -- the device and its context -----------------------------------------------------------------------------------------

Result cuInit(unsigned flags) {
  CALL;
  REQUIRE(!flags, INVALID_VALUE);
  REQUIRE(num_devices, NO_DEVICE);
  initialized = 1;
  return SUCCESS;
}
Result cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
Result cuDeviceGet(int *device, int ordinal) {
  CALL; NEEDS_INIT;
  REQUIRE(0 <= ordinal && ordinal < num_devices, INVALID_DEVICE);
  *device = ordinal;
  return SUCCESS;
}
Result cuDeviceGetName(char *name, int size, int device) {
  CALL; NEEDS_INIT;
  REQUIRE(0 <= device && device < num_devices, INVALID_DEVICE);
  strncpy(name, "stand-in", size);
  return SUCCESS;
}
Result cuDeviceGetPCIBusId(char *text, int size, int device) {
  CALL; NEEDS_INIT;
  REQUIRE(0 <= device && device < num_devices && size >= 13, INVALID_VALUE);
  strncpy(text, "0000:3B:00.0", size);
  return SUCCESS;
}
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  CALL; NEEDS_INIT;
  REQUIRE(0 <= device && device < num_devices, INVALID_DEVICE);
  *value = attribute == VIRTUAL_MEMORY_SUPPORTED ? attribute_vmm : attribute == FILE_DESCRIPTORS_SUPPORTED ? attribute_fd : attribute == HOST_ADDRESSES ? attribute_host : 0;
  return SUCCESS;
}
Result cuDevicePrimaryCtxRetain(void **context, int device) {
  CALL; NEEDS_INIT;
  REQUIRE(0 <= device && device < num_devices, INVALID_DEVICE);
  num_retained++;
  *context = &primary;
  return SUCCESS;
}
Result cuDevicePrimaryCtxRelease(int device) {
  CALL; NEEDS_INIT;
  REQUIRE(0 <= device && device < num_devices, INVALID_DEVICE);
  REQUIRE(num_retained, INVALID_CONTEXT);
  num_retained--;
  return SUCCESS;
}
Result cuCtxPushCurrent(void *context) {
  CALL; NEEDS_INIT;
  REQUIRE(context == &primary && num_retained && num_contexts < 64, INVALID_CONTEXT);
  contexts[num_contexts++] = context;
  return SUCCESS;
}
Result cuCtxPopCurrent(void **context) {
  CALL; NEEDS_INIT;
  REQUIRE(num_contexts, INVALID_CONTEXT);
  *context = contexts[--num_contexts];
  return SUCCESS;
}
Result cuMemGetInfo(size_t *available, size_t *total) {
  CALL; NEEDS_CONTEXT;
  *available = taken_bytes < total_bytes ? total_bytes - taken_bytes : 0;
  *total = total_bytes;
  return SUCCESS;
}

// -- pages --------------------------------------------------------------------------------------------------------------

static Handle **find_handle(Address handle) {
  Handle **at = &handles;
  while (*at && (Address)(uintptr_t)*at != handle) at = &(*at)->next;
  return at;
}
static Result new_handle(Address *handle, Pages *pages) {
  Handle *made = malloc(sizeof *made);
  made->pages = pages, made->next = handles, handles = made, pages->num_handles++;
  *handle = (Address)(uintptr_t)made;
  return SUCCESS;
}
static void drop(Pages *pages) {
  if (pages->num_handles || pages->num_mappings) return;
  if (!pages->imported) taken_bytes -= pages->size;
  close(pages->fd);
  free(pages);
}
static int on_device(const Properties *p) {
  return p && p->type == PINNED && p->location.type == DEVICE_LOCATION && 0 <= p->location.id && p->location.id < num_devices;
}

Result cuMemGetAllocationGranularity(size_t *bytes, const Properties *properties, int option) {
  CALL; NEEDS_INIT;
  REQUIRE(on_device(properties) && (option == 0 || option == 1), INVALID_VALUE);
  *bytes = granularity;
  return SUCCESS;
}
Result cuMemCreate(Address *handle, size_t size, const Properties *properties, Address flags) {
  CALL; NEEDS_CONTEXT;
  REQUIRE(attribute_vmm, NOT_SUPPORTED);
  REQUIRE(size && size % granularity == 0 && on_device(properties) && !flags, INVALID_VALUE);
  REQUIRE(!(properties->handle_types & ~FILE_DESCRIPTOR), NOT_SUPPORTED);
  REQUIRE(size <= total_bytes && taken_bytes <= total_bytes - size, OUT_OF_MEMORY);
  int fd = memfd_create("standin", MFD_CLOEXEC);
  REQUIRE(fd >= 0, OUT_OF_MEMORY);
  if (ftruncate(fd, size)) { close(fd); return OUT_OF_MEMORY; }
  Pages *pages = calloc(1, sizeof *pages);
  pages->fd = fd, pages->size = size, pages->handle_types = properties->handle_types;
  taken_bytes += size;
  return new_handle(handle, pages);
}
Result cuMemRelease(Address handle) {
  CALL; NEEDS_CONTEXT;
  Handle **at = find_handle(handle), *found = *at;
  REQUIRE(found, INVALID_VALUE);
  Pages *pages = found->pages;
  *at = found->next;
  free(found);
  pages->num_handles--;
  drop(pages);
  return SUCCESS;
}
Result cuMemExportToShareableHandle(void *out, Address handle, int type, Address flags) {
  CALL; NEEDS_CONTEXT;
  Handle *found = *find_handle(handle);
  REQUIRE(found && !flags, INVALID_VALUE);
  REQUIRE(type == FILE_DESCRIPTOR && found->pages->handle_types & FILE_DESCRIPTOR, NOT_SUPPORTED);
  int fd = dup(found->pages->fd);
  REQUIRE(fd >= 0, OUT_OF_MEMORY);
  *(int *)out = fd;
  return SUCCESS;
}
Result cuMemImportFromShareableHandle(Address *handle, void *in, int type) {
  CALL; NEEDS_CONTEXT;
  struct stat status;
  int fd = (int)(intptr_t)in;
  REQUIRE(type == FILE_DESCRIPTOR && !fstat(fd, &status) && status.st_size, INVALID_VALUE);
  Pages *pages = calloc(1, sizeof *pages);
  pages->fd = dup(fd), pages->size = status.st_size, pages->imported = 1, pages->handle_types = FILE_DESCRIPTOR;
  return new_handle(handle, pages);
}

// -- addresses ----------------------------------------------------------------------------------------------------------

static const int HIDDEN = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

static char *map_aligned(size_t size, size_t alignment, int protection) {
  char *first = mmap(NULL, size + alignment, protection, HIDDEN, -1, 0);
  if (first == MAP_FAILED) return NULL;
  char *start = (char *)(((uintptr_t)first + alignment - 1) / alignment * alignment);
  if (start > first) munmap(first, start - first);
  if (alignment > (size_t)(start - first)) munmap(start + size, alignment - (start - first));
  return start;
}
static void remember_range(Address address, size_t size, int plain) {
  Range *made = malloc(sizeof *made);
  made->address = address, made->size = size, made->plain = plain, made->next = ranges, ranges = made;
}
static Range **find_range(Address address, int plain) {
  Range **at = &ranges;
  while (*at && !((*at)->address == address && (*at)->plain == plain)) at = &(*at)->next;
  return at;
}
static int overlaps(Address address, size_t size) {
  for (Mapping *m = mappings; m; m = m->next)
    if (address < m->address + m->size && m->address < address + size) return 1;
  return 0;
}
// Whether the range is made of whole mappings without a gap; the link to the first of them.
static Mapping **whole_mappings(Address address, size_t size) {
  Mapping **first = &mappings;
  while (*first && (*first)->address != address) first = &(*first)->next;
  Address end = address;
  for (Mapping *m = *first; m && m->address == end && end < address + size; m = m->next) end += m->size;
  return *first && size && end == address + size ? first : NULL;
}

static void sweep_streams(void);
static void sweep_files(void);
static int is_opened(Address address);

// Gives up all there is: what interrupted and failed tests lost.
void standin_sweep(void) {
  sweep_streams();
  sweep_files();
  num_retained = 0;
  while (mappings) {
    Mapping *gone = mappings;
    mappings = gone->next, gone->pages->num_mappings--;
    drop(gone->pages);
    free(gone);
  }
  while (handles) {
    Handle *gone = handles;
    handles = gone->next, gone->pages->num_handles--;
    drop(gone->pages);
    free(gone);
  }
  while (ranges) {
    Range *gone = ranges;
    ranges = gone->next;
    if (gone->plain) taken_bytes -= gone->size;
    munmap((void *)(uintptr_t)gone->address, gone->size);
    free(gone);
  }
}

Result cuMemAddressReserve(Address *address, size_t size, size_t alignment, Address hint, Address flags) {
  CALL; NEEDS_CONTEXT;
  REQUIRE(attribute_vmm, NOT_SUPPORTED);
  REQUIRE(size && size % granularity == 0 && !flags && !(alignment & (alignment - 1)), INVALID_VALUE);
  (void)hint;
  REQUIRE(size < (size_t)1 << 46, OUT_OF_MEMORY);
  char *start = map_aligned(size, alignment > granularity ? alignment : granularity, PROT_NONE);
  REQUIRE(start, OUT_OF_MEMORY);
  *address = (Address)(uintptr_t)start;
  remember_range(*address, size, 0);
  return SUCCESS;
}
Result cuMemAddressFree(Address address, size_t size) {
  CALL; NEEDS_CONTEXT;
  Range **at = find_range(address, 0), *found = *at;
  REQUIRE(found && found->size == size && !overlaps(address, size), INVALID_VALUE);
  munmap((void *)(uintptr_t)address, size);
  *at = found->next;
  free(found);
  return SUCCESS;
}
Result cuMemMap(Address address, size_t size, size_t offset, Address handle, Address flags) {
  CALL; NEEDS_CONTEXT;
  Handle *found = *find_handle(handle);
  REQUIRE(found && !flags && !offset && size && size <= found->pages->size, INVALID_VALUE);
  REQUIRE(address % granularity == 0 && size % granularity == 0, INVALID_VALUE);
  Range *range = ranges;
  while (range && (range->plain || address < range->address || address + size > range->address + range->size)) range = range->next;
  REQUIRE(range && !overlaps(address, size), INVALID_VALUE);
  void *mapped = mmap((void *)(uintptr_t)address, size, PROT_NONE, MAP_SHARED | MAP_FIXED, found->pages->fd, 0);
  REQUIRE(mapped != MAP_FAILED, OUT_OF_MEMORY);
  Mapping **at = &mappings, *made = malloc(sizeof *made);
  while (*at && (*at)->address < address) at = &(*at)->next;
  made->address = address, made->size = size, made->granted = 0, made->pages = found->pages, made->next = *at, *at = made;
  found->pages->num_mappings++;
  return SUCCESS;
}
Result cuMemSetAccess(Address address, size_t size, const Access *access, size_t count) {
  CALL; NEEDS_CONTEXT;
  REQUIRE(count == 1 && access->location.type == DEVICE_LOCATION && access->flags == READ_WRITE, INVALID_VALUE);
  REQUIRE(0 <= access->location.id && access->location.id < num_devices, INVALID_DEVICE);
  Mapping **first = whole_mappings(address, size);
  REQUIRE(first, INVALID_VALUE);
  REQUIRE(!mprotect((void *)(uintptr_t)address, size, PROT_READ | PROT_WRITE), OUT_OF_MEMORY);
  for (Mapping *m = *first; m && m->address < address + size; m = m->next) m->granted = 1;
  return SUCCESS;
}
Result cuMemUnmap(Address address, size_t size) {
  CALL; NEEDS_CONTEXT;
  Mapping **first = whole_mappings(address, size);
  REQUIRE(first, INVALID_VALUE);
  REQUIRE(mmap((void *)(uintptr_t)address, size, PROT_NONE, HIDDEN | MAP_FIXED, -1, 0) != MAP_FAILED, OUT_OF_MEMORY);
  while (*first && (*first)->address < address + size) {
    Mapping *gone = *first;
    *first = gone->next;
    gone->pages->num_mappings--;
    drop(gone->pages);
    free(gone);
  }
  return SUCCESS;
}

// -- plain allocations, and copies that wait ----------------------------------------------------------------------------

Result cuMemAlloc(Address *address, size_t size) {
  CALL; NEEDS_CONTEXT;
  REQUIRE(size, INVALID_VALUE);
  REQUIRE(size <= total_bytes && taken_bytes <= total_bytes - size, OUT_OF_MEMORY);
  char *start = map_aligned(size, 2 << 20, PROT_READ | PROT_WRITE);
  REQUIRE(start, OUT_OF_MEMORY);
  *address = (Address)(uintptr_t)start;
  taken_bytes += size;
  remember_range(*address, size, 1);
  return SUCCESS;
}
Result cuMemFree(Address address) {
  CALL; NEEDS_CONTEXT;
  Range **at = find_range(address, 1), *found = *at;
  REQUIRE(found && !is_opened(address), INVALID_VALUE);
  munmap((void *)(uintptr_t)address, found->size);
  taken_bytes -= found->size;
  *at = found->next;
  free(found);
  return SUCCESS;
}
Result cuMemcpyHtoD(Address to, const void *from, size_t size) {
  CALL; NEEDS_CONTEXT;
  memcpy((void *)(uintptr_t)to, from, size);
  return SUCCESS;
}
Result cuMemcpyDtoH(void *to, Address from, size_t size) {
  CALL; NEEDS_CONTEXT;
  memcpy(to, (void *)(uintptr_t)from, size);
  return SUCCESS;
}

#include "streams.c"
#include "cufile.c"

// -- names --------------------------------------------------------------------------------------------------------------

static const struct { int code; const char *name, *text; } ERRORS[] = {
  {SUCCESS, "CUDA_SUCCESS", "no error"},
  {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
  {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
  {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
  {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
  {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
  {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
  {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
  {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
  {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
  {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
  {ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "part or all of the requested memory range is already mapped"},
  {NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "pointer does not correspond to a registered memory region"},
  {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
  {STREAM_CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
  {CAPTURED_EVENT, "CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event last recorded in a capturing stream"},
  {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
  {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};
static Result describe(int code, const char **text, int is_name) {
  for (size_t i = 0; i < sizeof ERRORS / sizeof *ERRORS; i++)
    if (ERRORS[i].code == code) { *text = is_name ? ERRORS[i].name : ERRORS[i].text; return SUCCESS; }
  *text = NULL;
  return INVALID_VALUE;
}
Result cuGetErrorName(int code, const char **name) { return describe(code, name, 1); }
Result cuGetErrorString(int code, const char **text) { return describe(code, text, 0); }

// What C libraries look up by name has the suffix of its second version there.
#define SECOND(name, parameters) Result name##_v2 parameters __attribute__((alias(#name)));
SECOND(cuDevicePrimaryCtxRelease, (int device))
SECOND(cuCtxPushCurrent, (void *context))
SECOND(cuCtxPopCurrent, (void **context))
SECOND(cuEventDestroy, (Event *handle))

// How bindings find calls. MBALL_STANDIN_WITHOUT names one that this "driver" is too old to have.
Result cuGetProcAddress_v2(const char *symbol, void **function, int version, Address flags, int *status) {
  (void)version, (void)flags;
  const char *without = getenv("MBALL_STANDIN_WITHOUT");
  Dl_info self;
  dladdr((void *)&cuInit, &self);
  void *library = dlopen(self.dli_fname, RTLD_NOLOAD | RTLD_NOW);
  *function = without && !strcmp(without, symbol) ? NULL : dlsym(library, symbol);
  if (library) dlclose(library);
  if (status) *status = *function ? 0 : 1;
  return *function ? SUCCESS : NOT_FOUND;
}
Result cuGetProcAddress(const char *symbol, void **function, int version, Address flags) {
  return cuGetProcAddress_v2(symbol, function, version, flags, NULL);
}
