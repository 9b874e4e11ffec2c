// Segments of a GPU's memory for PyTorch's caching allocator, as torch.cuda.MemPool asks for them through
// CUDAPluggableAllocator: made of the same physical pages as an arena, and never more than they were given.
//
// Plain C, so that nothing here needs Python: PyTorch takes the GIL before its allocator's lock in some places and the
// lock before us in all, so a call back into Python could wait for a thread that waits for the lock. No CUDA headers
// either: libcuda.so.1 is opened when the first GPU is. Python configures it through ctypes, by the same functions that
// the tests in C call. Functions return 0, a code of the driver (positive) or one of `Code` (negative).
//
// [Note: pages] A page is a handle of the driver with its size: it is mapped and unmapped whole. A segment is an address
// range of its own, backed by extents and, where less is left than one, by granules; access is granted once. Whoever
// owns a page may map it, hand it on or release it, and there is always one owner: the arena's pool, or this library.
// `mball_lend` and `mball_take_back` change the owner, and taking a donor does. Nothing here ever hands out a page that
// is mapped. A page's record is made with the page, so giving pages back needs no memory and cannot fail.
//
// [Note: limit] `held` is the bytes of all pages owned here: in segments, in segments that are leaving, and pooled. It
// never exceeds `limit`. The limit moves with pages that change owners: lending and donors raise it by their size, taking
// back lowers it. So arena and segments together stay within what both were given at first, whoever holds which.
//
// [Note: leaving] PyTorch does not wait before it frees a segment of a pool with an allocator of its own. It waits for
// the events of *other* streams that used a block (synchronize_and_free_events, c10/cuda/CUDACachingAllocator.cpp), but
// what the block's own stream was given may still run: release_block calls the allocator's raw_delete where it would
// call cudaFree, and leaves the waiting to cudaFree. Unmapping waits for nobody. So a freed segment first has an event
// recorded on its stream, and leaves once that is over: nobody waits in free, and malloc waits only when it is dry.
// The stream is the one that was current when the segment was made, as raw_alloc passes it. Two kinds of work it does not
// stand for: what runs on another stream because torch.cuda.caching_allocator_alloc was called with one that was not
// current, and replays of a graph that was captured into the pool, on whichever stream they run. Whoever has those waits
// for them before the pool, or the graph, goes. (PyTorch's own expandable segments wait for one stream, too.)
//
// [Note: retries] Within torch.cuda.use_mem_pool PyTorch does not free cached blocks and try again, as it does elsewhere:
// a pool in use counts as a capture under way (captures_underway), during which nothing is released. The first NULL is
// an OutOfMemoryError. So malloc itself does all that can be done before it returns NULL. And what a pool has cached it
// gives up only when the MemPool is gone and the cache is emptied (release_cached_blocks looks at graph_pools_freeable).
//
// [Note: one mutex] Calls come seldom (PyTorch caches what it got), and the driver has locks of its own, so one mutex for
// everything is enough. It is the last lock before the driver's: who holds it calls nothing but the driver, so the order
// is PyTorch's lock, then this, then the driver's. Python's threads wait for it without the GIL, which ctypes lets go.
// It is held while malloc waits for the GPU: what streams were given needs none of these locks to go on.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

// Of this file, by whoever compiles it: so a library that was compiled before it was changed is not used.
#ifndef SOURCE_DIGEST
#define SOURCE_DIGEST "unknown"
#endif

enum { MOST_DEVICES = 64, HISTORY = 4096, BUCKETS = 1024 };

typedef enum {
  NOT_OPEN = -1,
  FORKED = -2,
  BUSY = -3,
  OVER_LIMIT = -4,
  NO_HOST_MEMORY = -5,
  NO_DRIVER = -6,
  INVALID = -7,
  TAKEN = -8,
  UNKNOWN = -9,
} Code;
static const char *const CODE_NAMES[] = {
  "MBALL_DONE", "MBALL_NOT_OPEN", "MBALL_FORKED", "MBALL_BUSY", "MBALL_OVER_LIMIT", "MBALL_NO_HOST_MEMORY",
  "MBALL_NO_DRIVER", "MBALL_INVALID", "MBALL_TAKEN", "MBALL_UNKNOWN",
};

// -- the driver ---------------------------------------------------------------------------------------------------------

typedef int Result;
typedef unsigned long long Address;  // an address of the GPU's, or a handle of pages
typedef struct { int type, id; } Location;
typedef struct { int type, handle_types; Location location; void *security; unsigned char flags[8]; } Properties;
typedef struct { Location location; int flags; } Access;

enum {
  SUCCESS = 0, OUT_OF_MEMORY = 2, NOT_READY = 600,
  DEVICE_LOCATION = 1, PINNED = 1, READ_WRITE = 3, MINIMUM_GRANULARITY = 0,
  VIRTUAL_MEMORY_SUPPORTED = 102, DISABLE_TIMING = 2, CAPTURE_RELAXED = 2,
};

#define CALLS(X)                                                                            \
  X(cuInit, "cuInit", (unsigned))                                                           \
  X(cuGetErrorName, "cuGetErrorName", (Result, const char **))                              \
  X(cuDeviceGet, "cuDeviceGet", (int *, int))                                               \
  X(cuDeviceGetAttribute, "cuDeviceGetAttribute", (int *, int, int))                        \
  X(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (void **, int))                   \
  X(cuDevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2", (int))                       \
  X(cuCtxPushCurrent, "cuCtxPushCurrent_v2", (void *))                                      \
  X(cuCtxPopCurrent, "cuCtxPopCurrent_v2", (void **))                                       \
  X(cuThreadExchangeStreamCaptureMode, "cuThreadExchangeStreamCaptureMode", (int *))        \
  X(cuStreamIsCapturing, "cuStreamIsCapturing", (void *, int *))                            \
  X(cuEventCreate, "cuEventCreate", (void **, unsigned))                                    \
  X(cuEventRecord, "cuEventRecord", (void *, void *))                                       \
  X(cuEventQuery, "cuEventQuery", (void *))                                                 \
  X(cuEventSynchronize, "cuEventSynchronize", (void *))                                     \
  X(cuEventDestroy, "cuEventDestroy_v2", (void *))                                          \
  X(cuMemGetAllocationGranularity, "cuMemGetAllocationGranularity", (size_t *, const Properties *, int)) \
  X(cuMemCreate, "cuMemCreate", (Address *, size_t, const Properties *, Address))           \
  X(cuMemRelease, "cuMemRelease", (Address))                                                \
  X(cuMemAddressReserve, "cuMemAddressReserve", (Address *, size_t, size_t, Address, Address)) \
  X(cuMemAddressFree, "cuMemAddressFree", (Address, size_t))                                \
  X(cuMemMap, "cuMemMap", (Address, size_t, size_t, Address, Address))                      \
  X(cuMemSetAccess, "cuMemSetAccess", (Address, size_t, const Access *, size_t))            \
  X(cuMemUnmap, "cuMemUnmap", (Address, size_t))

#define DECLARE(name, symbol, parameters) Result (*name) parameters;
static struct { CALLS(DECLARE) } driver;
static int driver_is_loaded;

// -- what there is ------------------------------------------------------------------------------------------------------

typedef struct Page {
  Address handle;
  size_t size;
  int is_offered;  // the engine's still
  struct Shelf *shelf;  // where it lies when nobody uses it; it is there before the page is
  struct Page *next, *same;
} Page;
// Pooled pages of one size. There are few sizes, and a shelf stays once there was a page of its size.
typedef struct Shelf { size_t size; Page *first; struct Shelf *next; } Shelf;

typedef struct Segment {
  Address address;  // 0: nothing is reserved
  size_t size, requested;
  void *stream, *event;
  enum { UNUSED, UNFENCED, FENCED } fence;  // of one that leaves: what has to be over before
  uint64_t time_us;
  struct Segment *next;
  size_t num_pages, num_mapped;
  Page *pages[];  // side by side from the start; of them the first num_mapped are mapped
} Segment;

// A mapped extent of the arena that nobody needs now. The engine owns it until it is taken.
typedef struct Donor {
  uint64_t id;
  Address address;
  Page *page;
  void *event;  // what has to be over before; NULL: nothing
  int is_taken;
  struct Donor *before, *next, *same;
} Donor;

// These are read by Python: 64-bit fields only.
typedef struct { uint64_t number, outcome; } Offer;  // 0: it was not made; it was not withdrawn
enum { KEPT = 1, GIVEN = 2 };                        // outcomes
typedef struct { uint64_t address, size, requested, stream, is_leaving, time_us; } Listed;
typedef struct { uint64_t time_us, action, address, size, stream; } Entry;
typedef struct { char call[48], name[64]; int64_t code; uint64_t size, count; } Failure;
typedef struct {
  uint64_t granule, extent, limit, held, pooled, in_use, leaving, offered, peak_held, peak_in_use;
  uint64_t num_segments, num_leaving, num_pooled, num_offered;
  uint64_t num_mallocs, num_frees, num_failed, num_waits, num_taken;       // since it was opened, as the next ones
  uint64_t taken, lent, taken_back, created, released;                     // bytes
} Statistics;
enum { MADE, FREED, GONE, FAILED, DONATED };  // actions of entries

typedef struct {
  int is_open, device;
  void *context;
  Properties place;
  Access access;
  Statistics now;
  Shelf *shelves;  // the largest first
  Segment *segments, *leaving;
  Donor *donors, *last_donor;  // as they were offered
  Page *known[BUCKETS];  // all pages, those of donors too
  Donor *numbered[BUCKETS];
  uint64_t next_donor;
  Entry *history;
  uint64_t num_entries;  // ever; the last HISTORY are kept
} Device;

static Device devices[MOST_DEVICES];
// Apart from the devices: a failure outlives what it kept from being opened, and the generation is read without a lock.
static Failure failures[MOST_DEVICES];
static _Atomic uint64_t generations[MOST_DEVICES];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static _Atomic pid_t process;  // who opened the first GPU; 0: nobody yet

static uint64_t now_us(void) {
  struct timespec time;
  clock_gettime(CLOCK_REALTIME, &time);
  return (uint64_t)time.tv_sec * 1000000 + (uint64_t)time.tv_nsec / 1000;
}

// -- failures -----------------------------------------------------------------------------------------------------------

// Keeps what went wrong for whoever asks; returns the code.
static int fail(int ordinal, const char *call, size_t size, int code) {
  Failure *failure = &failures[ordinal];
  const char *name = NULL;
  if (code < 0) name = CODE_NAMES[-code];
  else if (!driver_is_loaded || driver.cuGetErrorName(code, &name) != SUCCESS || !name) name = "unknown";
  memset(failure->call, 0, sizeof failure->call);
  memset(failure->name, 0, sizeof failure->name);
  strncpy(failure->call, call, sizeof failure->call - 1);
  strncpy(failure->name, name, sizeof failure->name - 1);
  failure->code = code, failure->size = size, failure->count++;
  return code;
}
static int check(int ordinal, const char *call, size_t size, Result result) {
  return result == SUCCESS ? SUCCESS : fail(ordinal, call, size, result);
}
#define ORDINAL(device) ((int)((device) - devices))
#define TRY(device, size, call, ...) check(ORDINAL(device), #call, size, driver.call(__VA_ARGS__))

static void remember(Device *device, int action, Address address, size_t size, const void *stream) {
  Entry *entry = &device->history[device->num_entries++ % HISTORY];
  *entry = (Entry){now_us(), (uint64_t)action, address, size, (uint64_t)(uintptr_t)stream};
}

// -- who is there -------------------------------------------------------------------------------------------------------

static int is_forked(void) {
  pid_t opener = atomic_load(&process);
  return opener && opener != getpid();
}
// Takes the mutex and returns the device, or why not, without the mutex. In a forked child it is left alone, since a
// thread that is not there may have it.
static int enter(int ordinal, Device **device) {
  if (is_forked()) return FORKED;
  if (ordinal < 0 || ordinal >= MOST_DEVICES) return INVALID;
  pthread_mutex_lock(&mutex);
  *device = &devices[ordinal];
  if ((*device)->is_open) return SUCCESS;
  fail(ordinal, "a call", 0, NOT_OPEN);
  pthread_mutex_unlock(&mutex);
  return NOT_OPEN;
}
static void leave(void) { pthread_mutex_unlock(&mutex); }

typedef struct { int mode; } Turn;  // what has to be put back

// Makes the context current. Queries of events break a graph capture on another thread unless this one is relaxed.
static int begin(Device *device, Turn *turn) {
  int code = TRY(device, 0, cuCtxPushCurrent, device->context);
  if (code) return code;
  turn->mode = CAPTURE_RELAXED;
  code = TRY(device, 0, cuThreadExchangeStreamCaptureMode, &turn->mode);
  if (code) {
    void *context;
    TRY(device, 0, cuCtxPopCurrent, &context);
  }
  return code;
}
// What was done stays done if this fails, so nobody is told but who asks for the last failure.
static void end(Device *device, Turn *turn) {
  void *context;
  TRY(device, 0, cuThreadExchangeStreamCaptureMode, &turn->mode);
  TRY(device, 0, cuCtxPopCurrent, &context);
}

// -- pages --------------------------------------------------------------------------------------------------------------

static void hold(Device *device, size_t size) {
  device->now.held += size;
  if (device->now.held > device->now.peak_held) device->now.peak_held = device->now.held;
}
static Page **bucket(Device *device, Address handle) {
  return &device->known[(handle * 0x9e3779b97f4a7c15u) >> 54];  // the upper ten bits
}
static Page *find_page(Device *device, Address handle) {
  Page *page = *bucket(device, handle);
  while (page && page->handle != handle) page = page->same;
  return page;
}
// Returns a record for a page of `size` bytes that is not known yet, or NULL.
static Page *new_page(Device *device, size_t size) {
  Page *page = calloc(1, sizeof *page);
  Shelf **at = &device->shelves;
  while (*at && (*at)->size > size) at = &(*at)->next;
  if (page && (!*at || (*at)->size != size)) {
    Shelf *made = malloc(sizeof *made);
    if (made) *made = (Shelf){size, NULL, *at}, *at = made;
  }
  if (!page || !*at || (*at)->size != size) {
    free(page);
    fail(ORDINAL(device), "malloc", sizeof *page, NO_HOST_MEMORY);
    return NULL;
  }
  page->size = size, page->shelf = *at;
  return page;
}
static void know(Device *device, Page *page, Address handle) {
  Page **at = bucket(device, handle);
  page->handle = handle, page->same = *at, *at = page;
}
static void forget(Device *device, Page *page) {
  Page **at = bucket(device, page->handle);
  while (*at != page) at = &(*at)->same;
  *at = page->same;
  free(page);
}
static void shelve(Device *device, Page *page) {
  page->next = page->shelf->first, page->shelf->first = page;
  device->now.pooled += page->size, device->now.num_pooled++;
}
static Page *unshelve(Device *device, Shelf *shelf) {
  Page *page = shelf->first;
  shelf->first = page->next;
  device->now.pooled -= page->size, device->now.num_pooled--;
  return page;
}
// The shelf of the largest pooled page of at most `most` bytes, or NULL.
static Shelf *largest(const Device *device, size_t most) {
  Shelf *shelf = device->shelves;
  while (shelf && (shelf->size > most || !shelf->first)) shelf = shelf->next;
  return shelf;
}
// Gives the largest pooled page to the driver; returns its size, 0 if there is none or the driver did not take it.
static size_t release_one(Device *device) {
  Shelf *shelf = largest(device, SIZE_MAX);
  if (!shelf || TRY(device, shelf->size, cuMemRelease, shelf->first->handle)) return 0;
  device->now.held -= shelf->size, device->now.released += shelf->size;
  forget(device, unshelve(device, shelf));
  return shelf->size;
}

// -- segments that leave ------------------------------------------------------------------------------------------------

// Whether all is over that its stream was given before it was freed; with `waits`, makes sure of it.
static int is_over(Device *device, Segment *segment, int waits) {
  if (segment->fence == UNUSED) return 1;
  if (segment->fence == UNFENCED) {
    // While a stream is being captured, what is recorded on it becomes a part of the graph. It is tried again later, which
    // is as good: a later event stands for more.
    int status = 0;
    if (TRY(device, segment->size, cuStreamIsCapturing, segment->stream, &status) || status) return 0;
    if (TRY(device, segment->size, cuEventRecord, segment->event, segment->stream)) return 0;
    segment->fence = FENCED;
  }
  if (waits) {
    device->now.num_waits++;
    return !TRY(device, segment->size, cuEventSynchronize, segment->event);
  }
  Result result = driver.cuEventQuery(segment->event);
  if (result == NOT_READY) return 0;
  return !check(ORDINAL(device), "cuEventQuery", segment->size, result);
}
// Takes a segment that is over apart, from its place in the list of those that leave; returns the bytes of the pages that
// are free now. Where the driver refuses a step, the rest is left for the next time.
static size_t dismantle(Device *device, Segment **at) {
  Segment *segment = *at;
  size_t size = 0, mapped = 0;
  for (size_t i = 0; i < segment->num_mapped; i++) mapped += segment->pages[i]->size;
  if (mapped && TRY(device, mapped, cuMemUnmap, segment->address, mapped)) return 0;
  segment->num_mapped = 0, segment->fence = UNUSED;
  while (segment->num_pages) {
    Page *page = segment->pages[--segment->num_pages];
    size += page->size;
    shelve(device, page);
  }
  device->now.leaving -= size;
  if (segment->address && TRY(device, segment->size, cuMemAddressFree, segment->address, segment->size)) return size;
  if (segment->address && segment->requested) remember(device, GONE, segment->address, segment->size, segment->stream);
  segment->address = 0;
  if (segment->event && TRY(device, 0, cuEventDestroy, segment->event)) return size;
  *at = segment->next;
  device->now.num_leaving--;
  free(segment);
  return size;
}
// Takes apart what is over, or with `waits` the first that can be waited for; returns the bytes that are free now.
static size_t sweep(Device *device, int waits) {
  size_t size = 0;
  for (Segment **at = &device->leaving; *at && !(waits && size);) {
    Segment *segment = *at, *next = segment->next;
    if (is_over(device, segment, waits)) size += dismantle(device, at);
    if (*at != next) at = &segment->next;
  }
  return size;
}

// -- donors -------------------------------------------------------------------------------------------------------------

// Takes the first donor whose event is over, or with `waits` the first that can be waited for; returns its size.
static size_t take_donor(Device *device, int waits) {
  for (Donor *donor = device->donors; donor; donor = donor->next) {
    if (donor->is_taken) continue;
    Page *page = donor->page;
    if (donor->event && waits) {
      device->now.num_waits++;
      if (TRY(device, page->size, cuEventSynchronize, donor->event)) continue;
    } else if (donor->event) {
      Result result = driver.cuEventQuery(donor->event);
      if (result == NOT_READY || check(ORDINAL(device), "cuEventQuery", page->size, result)) continue;
    }
    if (TRY(device, page->size, cuMemUnmap, donor->address, page->size)) continue;
    donor->is_taken = 1, donor->page = NULL, page->is_offered = 0;
    device->now.offered -= page->size, device->now.num_offered--;
    device->now.taken += page->size, device->now.num_taken++;
    device->now.limit += page->size;
    hold(device, page->size);
    remember(device, DONATED, donor->address, page->size, NULL);
    size_t size = page->size;
    shelve(device, page);
    atomic_fetch_add(&generations[ORDINAL(device)], 1);
    return size;
  }
  return 0;
}

static void forget_donor(Device *device, Donor *donor) {
  Donor **at = &device->numbered[donor->id % BUCKETS];
  while (*at != donor) at = &(*at)->same;
  *at = donor->same;
  *(donor->before ? &donor->before->next : &device->donors) = donor->next;
  *(donor->next ? &donor->next->before : &device->last_donor) = donor->before;
  if (!donor->is_taken) {
    device->now.offered -= donor->page->size, device->now.num_offered--;
    forget(device, donor->page);
  }
  free(donor);
}

// -- segments that come -------------------------------------------------------------------------------------------------

// Returns a page of `size` bytes, or NULL. Room is made, within the limit and on the GPU, by what costs least first:
// pooled pages of other sizes, segments that have left, donors, and then by waiting.
static Page *take_page(Device *device, size_t size, int *code) {
  for (;;) {
    Shelf *shelf = largest(device, size);
    if (shelf && shelf->size == size) return unshelve(device, shelf);
    *code = OVER_LIMIT;
    if (size <= device->now.limit - device->now.held) {
      Address handle;
      Page *page = new_page(device, size);
      if (!page) { *code = NO_HOST_MEMORY; return NULL; }
      *code = TRY(device, size, cuMemCreate, &handle, size, &device->place, 0);
      if (*code == SUCCESS) {
        know(device, page, handle);
        device->now.created += size;
        hold(device, size);
        return page;
      }
      free(page);
      if (*code != OUT_OF_MEMORY) return NULL;
    }
    if (release_one(device) || sweep(device, 0) || take_donor(device, 0)) continue;
    if (sweep(device, 1) || take_donor(device, 1)) continue;
    if (*code == OVER_LIMIT) fail(ORDINAL(device), "mball_malloc", size, OVER_LIMIT);
    return NULL;
  }
}
static int build(Device *device, Segment *segment) {
  size_t extent = device->now.extent, granule = device->now.granule, offset = 0;
  int code = SUCCESS;
  while (offset < segment->size) {
    Page *page = take_page(device, segment->size - offset >= extent ? extent : granule, &code);
    if (!page) return code;
    segment->pages[segment->num_pages++] = page;
    device->now.leaving += page->size;  // until it is whole
    offset += page->size;
  }
  // So that large mappings lie on their own multiple.
  size_t alignment = segment->size >= extent ? extent & -extent : 0;
  code = TRY(device, segment->size, cuMemAddressReserve, &segment->address, segment->size, alignment, 0, 0);
  if (code) { segment->address = 0; return code; }
  for (offset = 0; segment->num_mapped < segment->num_pages; segment->num_mapped++) {
    Page *page = segment->pages[segment->num_mapped];
    code = TRY(device, page->size, cuMemMap, segment->address + offset, page->size, 0, page->handle, 0);
    if (code) return code;
    offset += page->size;
  }
  code = TRY(device, segment->size, cuMemSetAccess, segment->address, segment->size, &device->access, 1);
  if (code) return code;
  // Made now, so that freeing needs nothing.
  code = TRY(device, 0, cuEventCreate, &segment->event, DISABLE_TIMING);
  if (code) segment->event = NULL;
  return code;
}
static Address allocate(Device *device, size_t requested, void *stream) {
  size_t granule = device->now.granule, extent = device->now.extent;
  // What all that is offered and all that is not in use does not make up for would only be taken for nothing.
  size_t most = device->now.limit - device->now.in_use + device->now.offered;
  if (requested > most / granule * granule) {
    fail(ORDINAL(device), "mball_malloc", requested, OVER_LIMIT);
    return 0;
  }
  size_t size = (requested + granule - 1) / granule * granule;
  size_t num_pages = size / extent + size % extent / granule;
  Segment *segment = calloc(1, sizeof *segment + num_pages * sizeof(Page *));
  if (!segment) {
    fail(ORDINAL(device), "malloc", sizeof *segment + num_pages * sizeof(Page *), NO_HOST_MEMORY);
    return 0;
  }
  segment->size = size, segment->stream = stream, segment->time_us = now_us();
  sweep(device, 0);
  if (build(device, segment)) {
    // What was done so far leaves like any segment, but no stream ever knew of it.
    segment->next = device->leaving, device->leaving = segment;
    device->now.num_leaving++;
    dismantle(device, &device->leaving);
    return 0;
  }
  device->now.leaving -= size;
  segment->requested = requested;
  segment->next = device->segments, device->segments = segment;
  device->now.num_segments++, device->now.num_mallocs++, device->now.in_use += size;
  if (device->now.in_use > device->now.peak_in_use) device->now.peak_in_use = device->now.in_use;
  remember(device, MADE, segment->address, size, stream);
  return segment->address;
}

// -- what PyTorch calls -------------------------------------------------------------------------------------------------

// Returns the address of a new segment of at least `size` bytes, or NULL; then all is as before but for pages that may be
// pooled now, and the last failure says why. May wait for work of streams, when nothing else is left.
EXPORT void *mball_malloc(ssize_t size, int ordinal, void *stream) {
  Device *device;
  Turn turn;
  Address address = 0;
  if (enter(ordinal, &device)) return NULL;
  if (size <= 0) fail(ordinal, "mball_malloc", 0, INVALID);
  else if (!begin(device, &turn)) {
    address = allocate(device, (size_t)size, stream);
    end(device, &turn);
  }
  if (!address) {
    device->now.num_failed++;
    remember(device, FAILED, 0, size > 0 ? (size_t)size : 0, stream);
  }
  leave();
  return (void *)(uintptr_t)address;
}

// Frees a segment: it leaves when what `stream` was given is over. Waits for nothing. See [Note: leaving].
EXPORT void mball_free(void *pointer, ssize_t size, int ordinal, void *stream) {
  (void)size;  // the segment knows
  Device *device;
  Turn turn;
  if (!pointer || enter(ordinal, &device)) return;
  Segment **at = &device->segments;
  while (*at && (*at)->address != (Address)(uintptr_t)pointer) at = &(*at)->next;
  Segment *segment = *at;
  if (!segment) fail(ordinal, "mball_free", 0, UNKNOWN);
  else {
    *at = segment->next;
    segment->next = NULL, segment->stream = stream, segment->fence = UNFENCED;
    for (at = &device->leaving; *at; at = &(*at)->next) {}
    *at = segment;  // those that were freed first leave first
    device->now.num_segments--, device->now.num_leaving++, device->now.num_frees++;
    device->now.in_use -= segment->size, device->now.leaving += segment->size;
    remember(device, FREED, segment->address, segment->size, stream);
    if (!begin(device, &turn)) {
      sweep(device, 0);
      end(device, &turn);
    }
  }
  leave();
}

// -- what the engine calls ----------------------------------------------------------------------------------------------

EXPORT const char *mball_source(void) { return SOURCE_DIGEST; }

static int load_driver(int ordinal) {
  if (driver_is_loaded) return SUCCESS;
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  if (!library) return fail(ordinal, "dlopen of libcuda.so.1", 0, NO_DRIVER);
#define FIND(name, symbol, parameters)                                       \
  *(void **)&driver.name = dlsym(library, symbol);                           \
  if (!driver.name) return fail(ordinal, "dlsym of " symbol, 0, NO_DRIVER);
  CALLS(FIND)
  driver_is_loaded = 1;
  return SUCCESS;
}
static int open_device(Device *device, size_t limit, size_t extent) {
  int ordinal = ORDINAL(device), code, has_virtual_memory;
  size_t granule;
  void *context;
  if ((code = load_driver(ordinal))) return code;
  if ((code = TRY(device, 0, cuInit, 0))) return code;
  if ((code = TRY(device, 0, cuDeviceGet, &device->device, ordinal))) return code;
  if ((code = TRY(device, 0, cuDeviceGetAttribute, &has_virtual_memory, VIRTUAL_MEMORY_SUPPORTED, device->device))) return code;
  if (!has_virtual_memory) return fail(ordinal, "mball_open, which needs virtual memory", 0, INVALID);
  device->place = (Properties){.type = PINNED, .location = {DEVICE_LOCATION, device->device}};
  device->access = (Access){device->place.location, READ_WRITE};
  if ((code = TRY(device, 0, cuMemGetAllocationGranularity, &granule, &device->place, MINIMUM_GRANULARITY))) return code;
  Entry *history = malloc(HISTORY * sizeof *history);
  if (!history) return fail(ordinal, "malloc", HISTORY * sizeof *history, NO_HOST_MEMORY);
  if ((code = TRY(device, 0, cuDevicePrimaryCtxRetain, &context, device->device))) { free(history); return code; }
  device->context = context, device->history = history;
  device->now.granule = granule, device->now.limit = limit;
  device->now.extent = extent <= granule ? granule : (extent + granule - 1) / granule * granule;
  device->is_open = 1;
  return SUCCESS;
}
static const size_t MOST_BYTES = (size_t)1 << 62;  // so that no sum of sizes overflows
static int is_size(const Device *device, size_t size) {
  return size && size % device->now.granule == 0 && size <= MOST_BYTES >> 16;
}

// Begins to serve GPU `ordinal` with at most `limit` bytes, in extents of `extent` bytes rounded up to the granularity.
EXPORT int mball_open(int ordinal, size_t limit, size_t extent) {
  if (is_forked()) return FORKED;
  if (ordinal < 0 || ordinal >= MOST_DEVICES) return INVALID;
  pthread_mutex_lock(&mutex);
  Device *device = &devices[ordinal];
  int code;
  if (device->is_open) code = fail(ordinal, "mball_open", limit, BUSY);
  else if (limit > MOST_BYTES || extent > MOST_BYTES) code = fail(ordinal, "mball_open", limit, INVALID);
  else {
    memset(device, 0, sizeof *device);
    code = open_device(device, limit, extent);
    if (!code) atomic_store(&process, getpid());
  }
  pthread_mutex_unlock(&mutex);
  return code;
}

// Gives everything to the driver, after waiting for what leaves. Refused while a segment is in use. Donors are the
// engine's again. After a failure it can be asked for again.
EXPORT int mball_close(int ordinal) {
  Device *device;
  Turn turn;
  int code = enter(ordinal, &device);
  if (code) return code;
  if (device->segments) code = fail(ordinal, "mball_close", device->now.in_use, BUSY);
  else if (!(code = begin(device, &turn))) {
    uint64_t count = failures[ordinal].count;
    while (sweep(device, 1)) {}
    while (release_one(device)) {}
    if (device->leaving || device->now.pooled) {  // the driver refused something, or a stream is being captured
      if (failures[ordinal].count == count) fail(ordinal, "mball_close", device->now.held, BUSY);
      code = (int)failures[ordinal].code;
    }
    end(device, &turn);
  }
  if (!code && !(code = TRY(device, 0, cuDevicePrimaryCtxRelease, device->device))) {
    while (device->donors) forget_donor(device, device->donors);
    while (device->shelves) {
      Shelf *gone = device->shelves;
      device->shelves = gone->next;
      free(gone);
    }
    free(device->history);
    device->is_open = 0;
  }
  leave();
  return code;
}

// Makes the limit `limit` bytes. What is over it is given to the driver; refused if that is not enough.
EXPORT int mball_set_limit(int ordinal, size_t limit) {
  Device *device;
  Turn turn;
  int code = enter(ordinal, &device);
  if (code) return code;
  if (limit > MOST_BYTES) code = fail(ordinal, "mball_set_limit", limit, INVALID);
  else if (limit < device->now.held && !(code = begin(device, &turn))) {
    sweep(device, 0);
    while (device->now.held > limit && release_one(device)) {}
    end(device, &turn);
    if (device->now.held > limit) code = fail(ordinal, "mball_set_limit", limit, BUSY);
  }
  if (!code) device->now.limit = limit;
  leave();
  return code;
}

// Makes the limit `limit` bytes, or what segments take, in use and leaving, if that is more; `used` says how much that
// is. In one go: other threads may allocate meanwhile. Pooled pages over the limit are given to the driver.
EXPORT int mball_fit_limit(int ordinal, size_t limit, size_t *used) {
  Device *device;
  Turn turn;
  *used = 0;
  int code = enter(ordinal, &device);
  if (code) return code;
  if (limit > MOST_BYTES) code = fail(ordinal, "mball_fit_limit", limit, INVALID);
  else if (!(code = begin(device, &turn))) {
    sweep(device, 0);
    *used = device->now.in_use + device->now.leaving;
    if (limit < *used) limit = *used;
    while (device->now.held > limit && release_one(device)) {}
    end(device, &turn);
    if (device->now.held > limit) code = fail(ordinal, "mball_fit_limit", limit, BUSY);
    else device->now.limit = limit;
  }
  leave();
  return code;
}

// Gives pooled pages to the driver until `size` bytes went or none is left; `released` says how many did.
EXPORT int mball_trim(int ordinal, size_t size, size_t *released) {
  Device *device;
  Turn turn;
  *released = 0;
  int code = enter(ordinal, &device);
  if (code) return code;
  if (!(code = begin(device, &turn))) {
    sweep(device, 0);
    while (*released < size && device->now.pooled) {
      size_t gone = release_one(device);
      if (!gone) { code = (int)failures[ordinal].code; break; }
      *released += gone;
    }
    end(device, &turn);
  }
  leave();
  return code;
}

// Takes over pages that are mapped nowhere, all or none of them; the limit rises by their size.
EXPORT int mball_lend(int ordinal, size_t count, const Address *handles, const size_t *sizes) {
  Device *device;
  Page *pages = NULL;
  size_t sum = 0;
  int code = enter(ordinal, &device);
  if (code) return code;
  for (size_t i = 0; i < count && !code; i++) {
    if (find_page(device, handles[i]) || !is_size(device, sizes[i]) || count > 1 << 14) {
      code = fail(ordinal, "mball_lend", sizes[i], INVALID);
      break;
    }
    Page *page = new_page(device, sizes[i]);
    if (!page) { code = NO_HOST_MEMORY; break; }
    know(device, page, handles[i]);
    page->next = pages, pages = page, sum += sizes[i];
  }
  if (!code && device->now.limit + sum > MOST_BYTES) code = fail(ordinal, "mball_lend", sum, INVALID);
  while (pages) {
    Page *page = pages;
    pages = page->next;
    if (code) { forget(device, page); continue; }
    device->now.limit += page->size, device->now.lent += page->size;
    hold(device, page->size);
    shelve(device, page);
  }
  leave();
  return code;
}

// Hands pooled pages over, of at most `size` bytes together and at most `capacity` of them; the limit sinks by their
// size. `count` says how many there are, as soon as they are in `handles` and `sizes`.
EXPORT int mball_take_back(int ordinal, size_t size, size_t capacity, Address *handles, size_t *sizes, size_t *count) {
  Device *device;
  Turn turn;
  *count = 0;
  int code = enter(ordinal, &device);
  if (code) return code;
  if (device->leaving && !(code = begin(device, &turn))) {
    sweep(device, 0);
    end(device, &turn);
  }
  for (Shelf *shelf; *count < capacity && (shelf = largest(device, size));) {
    Page *page = unshelve(device, shelf);
    handles[*count] = page->handle, sizes[*count] = page->size, ++*count;
    size -= page->size;
    device->now.held -= page->size, device->now.limit -= page->size, device->now.taken_back += page->size;
    forget(device, page);
  }
  leave();
  return SUCCESS;
}

// Whether a handle's pages are owned here. Those of a donor are not before it is taken.
EXPORT int mball_owns(int ordinal, Address handle) {
  Device *device;
  int code = enter(ordinal, &device);
  if (code) return 0;
  const Page *page = find_page(device, handle);
  int owns = page && !page->is_offered;
  leave();
  return owns;
}

// Offers a mapped extent that may be taken once `event` (NULL: at any time) is over; those offered first go first.
EXPORT int mball_offer(int ordinal, Address address, size_t size, Address handle, void *event, Offer *offer) {
  Device *device;
  int code = enter(ordinal, &device);
  if (code) return code;
  Donor *donor = NULL;
  Page *page = NULL;
  if (!address || !is_size(device, size) || find_page(device, handle)) code = fail(ordinal, "mball_offer", size, INVALID);
  else if (!(donor = malloc(sizeof *donor))) code = fail(ordinal, "malloc", sizeof *donor, NO_HOST_MEMORY);
  else if (!(page = new_page(device, size))) code = NO_HOST_MEMORY;
  if (code) free(donor);
  else {
    know(device, page, handle);
    page->is_offered = 1;
    *donor = (Donor){.id = ++device->next_donor, .address = address, .page = page, .event = event};
    *offer = (Offer){donor->id, 0};
    donor->before = device->last_donor, device->last_donor = donor;
    *(donor->before ? &donor->before->next : &device->donors) = donor;
    donor->same = device->numbered[donor->id % BUCKETS], device->numbered[donor->id % BUCKETS] = donor;
    device->now.offered += size, device->now.num_offered++;
  }
  leave();
  return code;
}

// Ends an offer: 0, and the extent is the engine's as before, or TAKEN, and neither handle nor mapping is there any more.
// That is in `offer` too: who is interrupted behind the call finds it there.
EXPORT int mball_withdraw(int ordinal, Offer *offer) {
  Device *device;
  int code = enter(ordinal, &device);
  if (code) return code;
  Donor *donor = device->numbered[offer->number % BUCKETS];
  while (donor && donor->id != offer->number) donor = donor->same;
  if (!donor) code = fail(ordinal, "mball_withdraw", 0, UNKNOWN);
  else {
    code = donor->is_taken ? TAKEN : SUCCESS;
    offer->outcome = donor->is_taken ? GIVEN : KEPT;
    forget_donor(device, donor);
  }
  leave();
  return code;
}

// Writes the ids of donors that were taken and not withdrawn yet; returns how many there are.
EXPORT size_t mball_taken(int ordinal, size_t capacity, uint64_t *ids) {
  Device *device;
  size_t count = 0;
  if (enter(ordinal, &device)) return 0;
  for (const Donor *d = device->donors; d; d = d->next)
    if (d->is_taken) {
      if (count < capacity) ids[count] = d->id;
      count++;
    }
  leave();
  return count;
}

// Where to read, at any time and without a call, how many donors were ever taken.
EXPORT const void *mball_generation(int ordinal) {
  return ordinal < 0 || ordinal >= MOST_DEVICES ? NULL : (const void *)&generations[ordinal];
}

EXPORT int mball_statistics(int ordinal, Statistics *out) {
  Device *device;
  int code = enter(ordinal, &device);
  if (code) return code;
  *out = device->now;
  leave();
  return SUCCESS;
}

// Writes the segments, those in use and those that leave; returns how many there are.
EXPORT size_t mball_list(int ordinal, size_t capacity, Listed *out) {
  Device *device;
  size_t count = 0;
  if (enter(ordinal, &device)) return 0;
  const Segment *lists[] = {device->segments, device->leaving};
  for (int i = 0; i < 2; i++)
    for (const Segment *s = lists[i]; s; s = s->next) {
      if (!s->requested || !s->num_pages) continue;  // what is left of one that never was whole, or is unmapped
      if (count < capacity)
        out[count] = (Listed){s->address, s->size, s->requested, (uint64_t)(uintptr_t)s->stream, (uint64_t)i, s->time_us};
      count++;
    }
  leave();
  return count;
}

// Writes the last entries of the history, the oldest first; returns how many there are.
EXPORT size_t mball_history(int ordinal, size_t capacity, Entry *out) {
  Device *device;
  if (enter(ordinal, &device)) return 0;
  size_t kept = device->num_entries < HISTORY ? (size_t)device->num_entries : HISTORY;
  if (kept > capacity) kept = capacity;
  for (size_t i = 0; i < kept; i++) out[i] = device->history[(device->num_entries - kept + i) % HISTORY];
  leave();
  return kept;
}

// The last failure, also of a device that could not be opened. In a forked child it is FORKED.
EXPORT void mball_failure(int ordinal, Failure *out) {
  memset(out, 0, sizeof *out);
  if (is_forked() || ordinal < 0 || ordinal >= MOST_DEVICES) {
    out->code = is_forked() ? FORKED : INVALID;
    strncpy(out->name, CODE_NAMES[-out->code], sizeof out->name - 1);
    return;
  }
  pthread_mutex_lock(&mutex);
  *out = failures[ordinal];
  pthread_mutex_unlock(&mutex);
}
